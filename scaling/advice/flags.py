"""Flags: reasons to doubt a recommendation, each in a sentence or two that also say what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling.advice.conditions import MixedConditions
from scaling.advice.table_fits import SETTING_NAMES, TableFits, describe_settings_used
from scaling.common.quantities import format_count
from scaling.fitting.groups import cluster_values
from scaling.fitting.loss_law import Allocation, Fit
from scaling.fitting.lr_batch_law import HPFit

# A target farther than this beyond the largest N or D, as a ratio, is a serious doubt, and so is the same in both for
# compute. On worlds drawn from real runs, answers up to 75 times beyond lost no more than nearer ones with as wide an
# interval of lr (studies/LOG.md); losses of real runs were checked up to 33 times the compute.
MAX_RATIO = 100.0
MAX_COMPUTE_RATIO = 10_000.0
CHECKED_COMPUTE_RATIO = 33.0
# The settings are doubtful if the 90 % interval of lr* reaches farther than this factor to either side. In these
# worlds it did in 10 % of the answers that lost less than 0.3 %, and in 91 % of those that lost more than 1 %.
MAX_LR_FACTOR = 3.7
# A target this many times smaller than the smallest N is a serious doubt: there the intervals of lr and batch are too
# narrow.
MAX_RATIO_BELOW = 2.0
# (N, D) groups; with fewer, hold-out tests of the laws mean little.
ENOUGH_GROUPS = 6
# A setting within this share of the searched range (in logarithms) lies at its edge.
EDGE_SHARE = 0.1
# Groups whose optimum is compared with the searched range, because each takes 1 ms.
MAX_CHECKED_GROUPS = 100
# What is worth mentioning: a relative disagreement between the two forms of the loss law, a factor in the best batch by
# its trend in N, and a factor between two optima of N.
NOTABLE_DISAGREEMENT = 0.01
NOTABLE_BATCH_FACTOR = 1.2
NOTABLE_OPTIMUM_FACTOR = 1.5
# A predicted loss by this factor below the lowest or above the highest loss of the runs is no answer, and neither is an
# interval whose ends differ by the other factor.
MAX_LOSS_FACTOR, MAX_INTERVAL_FACTOR = 30.0, 1000.0

# How N was counted, as a recommendation keeps it.
CONVENTIONS = {
    "multiplying": "parameters that multiply tokens: no input embedding, the unembedding once",
    "total": "every parameter (Chinchilla)",
    "nonembedding": "non-embedding parameters (Kaplan)",
    "as given": "as given in the run table; whether with or without embeddings was not recorded",
    "mixed": "counted in several ways in one table",
}
# The same as a flag, with what to do.
COUNT_IN_THE_SAME_WAY = "Count the N of the target in the same way."
CONVENTION_FLAGS = {
    "multiplying": (
        "N counts the parameters that multiply tokens: no input embedding, the unembedding once. "
        f"{COUNT_IN_THE_SAME_WAY}"
    ),
    "total": f"N counts every parameter, as Chinchilla does. {COUNT_IN_THE_SAME_WAY}",
    "nonembedding": f"N counts the non-embedding parameters, as Kaplan does. {COUNT_IN_THE_SAME_WAY}",
    "as given": f"The run table does not record whether N includes embeddings. {COUNT_IN_THE_SAME_WAY}",
    "mixed": "N is counted in several ways in one table. Import the runs again with one way of counting.",
}


@dataclass(frozen=True)
class Flag:
    """A reason to doubt a recommendation.

    Attributes:
        code: A stable identifier, such as "beyond-N".
        text: The reason and what to do about it, in plain words.
        serious: Whether the recommendation should not be trusted because of it.
        short: The same in at most two lines of a terminal; empty if the first sentences of the text are short enough.
    """

    code: str
    text: str
    serious: bool
    short: str = ""

    @property
    def about_settings(self) -> bool:
        """Whether only the learning rate and the batch are doubtful because of it, and not the loss."""
        return self.code.startswith(("lr-", "batch", "hp-", "measured-"))


def collect_flags(
    fits: TableFits,
    fit: Fit,
    searched: Mapping[str, tuple[float, float]],
    N: float,
    D: float,
    mixed: MixedConditions | None,
) -> list[Flag]:
    """Return all flags of a recommendation.

    Args:
        fits: The laws of the table.
        fit: Its loss law.
        searched: The searched range of each setting, from `find_searched_ranges`.
        N: Parameters of the target that multiply tokens.
        D: Training tokens of the target.
        mixed: What runs alike differ in, from `find_mixed_conditions`.

    Returns:
        The flags, in the order in which they were checked; there is always one on how N was counted.
    """
    return [
        *_flag_conditions(mixed),
        *_flag_extrapolation(fits, N, D),
        *_flag_few_scales(fits, N, D),
        *([] if fits.hp is None else _flag_edges(fits.hp, searched, N, D)),
        *([] if fits.hp is None else _flag_wide_interval(fits, fits.hp, N, D)),
        *_flag_fits(fits, fit),
        *_flag_forms(fit, N, D),
        _flag_convention(fits.used),
    ]


def flag_absurd_loss(loss: float, interval: tuple[float, float], losses: pd.Series[float]) -> list[Flag]:
    """Return a serious flag if a predicted loss is so far from the losses of the runs that it is no answer."""
    is_far = not losses.min() / MAX_LOSS_FACTOR < loss < losses.max() * MAX_LOSS_FACTOR
    if not is_far and interval[1] < MAX_INTERVAL_FACTOR * interval[0]:
        return []
    text = (
        "The runs allow no answer for the loss of this target: it lies too far from them. Check its N and D, and the "
        "units of N and D in the table."
    )
    return [Flag("no-answer", text, serious=True)]


def _flag_conditions(mixed: MixedConditions | None) -> list[Flag]:
    """Return a flag if the runs differ in something that the laws do not know."""
    return [] if mixed is None else [Flag("mixed-conditions", str(mixed), serious=mixed.serious, short=mixed.short)]


def find_searched_ranges(
    fits: TableFits, space: Mapping[str, Sequence[float]] | None
) -> dict[str, tuple[float, float]]:
    """Return the range of lr and batch_tokens that was searched; where `space` lacks it, the range of the runs.

    Args:
        fits: The laws of the table.
        space: (low, high) of the settings that were searched.

    Returns:
        (low, high) of "lr" and "batch_tokens"; settings that the runs did not vary are left out.

    Raises:
        ValueError: If a range is not 0 < low <= high.
    """
    searched = {}
    if fits.hp is not None:
        searched = {name: fits.hp.ranges[name] for name in SETTING_NAMES if fits.states[name] == "varied"}
    for name in SETTING_NAMES:
        if space is not None and name in space:
            low, high = (float(v) for v in space[name])
            if not 0 < low <= high:
                raise ValueError(f"space[{name!r}] must be (low, high) with 0 < low <= high, got {space[name]}")
            if name in searched:
                searched[name] = (low, high)
    return searched


def find_convention(runs: pd.DataFrame) -> str:
    """Return how N was counted, as a key of `CONVENTIONS`.

    The column N_convention decides. Without it, the other count decides that N is equal to.
    """
    if "N_convention" in runs and runs["N_convention"].notna().any():
        conventions = runs["N_convention"].fillna("as given").unique()
        if len(conventions) > 1:
            return "mixed"
        return str(conventions[0]) if conventions[0] in CONVENTIONS else "as given"
    columns = _find_other_counts(runs)
    for column in columns:
        if np.array_equal(runs[column].to_numpy(float), runs["N"].to_numpy(float)):
            return column.removeprefix("N_")
    return "multiplying" if columns else "as given"


def _find_other_counts(runs: pd.DataFrame) -> list[str]:
    return [c for c in ("N_total", "N_nonembedding") if c in runs and runs[c].notna().all()]


def _flag_convention(runs: pd.DataFrame) -> Flag:
    """Return a flag that says how N was counted."""
    convention, columns = find_convention(runs), _find_other_counts(runs)
    text = CONVENTION_FLAGS[convention]
    if columns:
        largest = runs.iloc[int(runs["N"].to_numpy(float).argmax())]
        counts = ", ".join(f"{c} {float(largest[c]):,.0f}" for c in columns)
        text += f" The largest proxy has N {float(largest['N']):,.0f}, {counts}."
    return Flag("n-convention", text, serious=convention == "mixed")


def _flag_extrapolation(fits: TableFits, N: float, D: float) -> list[Flag]:
    """Return flags for a target outside the sizes, tokens and compute of the data."""
    flags, beyond = [], []
    for name, value in (("N", N), ("D", D)):
        low, high = fits.ranges[name]
        ratio = max(value / high, low / value)
        if ratio > 1 + 1e-9:
            relation = (
                f"{_format_ratio(ratio)} times the largest" if value > high else f"{1 / ratio:.3g} times the smallest"
            )
            beyond.append(f"{relation} {name}")
            text = f"The target's {name} is {relation} in the data ({format_count(low)} to {format_count(high)})."
            if ratio > MAX_RATIO:
                text += f" The laws are not checked beyond a factor of {MAX_RATIO:.0f}: add runs closer to the target."
            flags.append(Flag(f"beyond-{name}", text, serious=ratio > MAX_RATIO))
    largest = 6 * float((fits.groups["N"] * fits.groups["D"]).max())
    ratio = 6 * N * D / largest
    if ratio > 1 + 1e-9:
        text = f"The target's compute is {_format_ratio(ratio)} times that of the largest run ({largest:.3g} FLOPs)."
        if ratio > CHECKED_COMPUTE_RATIO:
            text += (
                f" Intervals of the loss were checked on real runs only up to {CHECKED_COMPUTE_RATIO:.0f} times: "
                "add larger runs."
            )
        beyond.append(f"{_format_ratio(ratio)} times the largest compute")
        listed = beyond[0] if len(beyond) == 1 else f"{', '.join(beyond[:-1])} and {beyond[-1]}"
        short = f"The target has {listed} in the data."
        flags.append(Flag("beyond-C", text, serious=ratio > MAX_COMPUTE_RATIO, short=short))
    if fits.hp is None:
        return flags
    hp = fits.hp
    low, high = fits.ranges["N"]
    if low / N > 1 + 1e-9:
        text = (
            "Below the smallest N, the intervals of learning rate and batch are too narrow, and the expected regret is "
            "not an upper bound: add runs of a smaller model."
        )
        flags.append(Flag("below-N", text, serious=low / N > MAX_RATIO_BELOW))
    factor = (N / high) ** hp.law.batch_N
    is_answered = fits.states["batch_tokens"] == "varied"
    if is_answered and N > high and not 1 / NOTABLE_BATCH_FACTOR < factor < NOTABLE_BATCH_FACTOR:
        exponent_low, exponent_high = hp.exponents(0.9)["batch_N"]
        text = (
            f"Beyond the largest N, the best batch is extrapolated as N^{hp.law.batch_N:+.2f} (90 % interval: "
            f"{exponent_low:+.2f} to {exponent_high:+.2f}), an average of no trend in N, as other studies found, and "
            f"of the trend in these runs: the recommended batch is {factor:.2g} times that at the largest N. If you "
            "can, try half and twice this batch, too."
        )
        short = (
            f"Beyond the largest N, the best batch is extrapolated as N^{hp.law.batch_N:+.2f} ({exponent_low:+.2f} to "
            f"{exponent_high:+.2f}): try half and twice this batch, too."
        )
        flags.append(Flag("batch-beyond-N", text, serious=False, short=short))
    return flags


def _format_ratio(ratio: float) -> str:
    return f"{ratio:,.0f}" if 1000 <= ratio < 1e6 else f"{ratio:.3g}"


def _flag_few_scales(fits: TableFits, N: float, D: float) -> list[Flag]:
    """Return flags for data with too few sizes, token counts or groups."""
    flags = []
    for name, value, least, more in (("N", N, 3, "sizes"), ("D", D, 2, "token counts")):
        count = int(cluster_values(np.log(fits.groups[name].to_numpy(float))).max()) + 1
        if count < least:
            low, high = fits.ranges[name]
            is_outside = not low <= value <= high
            text = (
                f"The data has {count} distinct {name}, and a trend in {name} needs at least {least}: add other {more}."
            )
            flags.append(Flag(f"few-{name}", text, serious=is_outside))
    groups = len(fits.groups)
    if groups < ENOUGH_GROUPS:
        text = (
            f"The data has {groups} groups of equal N and D, and a law needs at least {ENOUGH_GROUPS} to be tested: "
            "add other sizes or token counts."
        )
        flags.append(Flag("few-groups", text, serious=groups < 3))
    return flags


def _flag_edges(hp: HPFit, searched: Mapping[str, tuple[float, float]], N: float, D: float) -> list[Flag]:
    """Return flags for optima at or beyond the edge of the searched range, of the groups and of the target."""
    flags = []
    checked = np.unique(np.linspace(0, len(hp.floors) - 1, min(len(hp.floors), MAX_CHECKED_GROUPS)).round().astype(int))
    floors = hp.floors.iloc[checked]
    groups = [hp.interval(n, d, mass=0.9) for n, d in zip(floors["N"], floors["D"], strict=True)]
    best = (float(v) for v in hp.law(N, D))
    for i, (name, value) in enumerate(zip(SETTING_NAMES, best, strict=True)):
        # A setting that was not varied has no range, and no answer either.
        low, high = searched.get(name, (0.0, 0.0))
        # With a single value, `_flag_fits` reports that the optimum is not identified.
        if low == high:
            continue
        show = (lambda v: f"{v:.4g}") if name == "lr" else format_count
        searched_range = f"the searched range ({show(low)} to {show(high)})"
        # The optimum of a group counts as outside if its whole interval is: only one side of the bowl was seen.
        n_below, n_above = sum(g[i][1] < low for g in groups), sum(g[i][0] > high for g in groups)
        for side, count in (("low", n_below), ("high", n_above)):
            if count > len(groups) / 2:
                relation, direction = ("below", "lower") if side == "low" else ("above", "higher")
                text = (
                    f"In {count} of {len(groups)} groups, the whole 90 % interval of the best {SETTING_NAMES[name]} "
                    f"lies {relation} {searched_range}: search {direction}."
                )
                flags.append(Flag(f"{name}-unbracketed-{side}", text, serious=True))
        margin = EDGE_SHARE * math.log(high / low)
        for side, edge, depth in (("low", low, math.log(value / low)), ("high", high, math.log(high / value))):
            if depth >= margin:
                continue
            end, relation = ("lower", "below") if side == "low" else ("upper", "above")
            place = f"at the {end} end of {searched_range}" if depth >= 0 else f"{relation} {searched_range}"
            text = (
                f"The recommended {SETTING_NAMES[name]}, {show(value)}, lies {place}, to which it is not clipped. To "
                f"measure it, extend {name} {relation} {show(edge)}."
            )
            flags.append(Flag(f"{name}-edge-{side}", text, serious=False))
    return flags


def _flag_wide_interval(fits: TableFits, hp: HPFit, N: float, D: float) -> list[Flag]:
    """Return a serious flag if the best learning rate of the target is hardly known."""
    (low, high), _ = hp.interval(N, D, mass=0.9)
    factor = math.sqrt(high / low)
    # An optimum that the runs do not show has a flag of its own.
    if factor <= MAX_LR_FACTOR or fits.states["lr"] != "varied" or not hp.identified["lr"]:
        return []
    text = (
        f"At this target the best learning rate is known only within a factor of {factor:.2g} to either side: add runs "
        "nearer to it, or more of them."
    )
    return [Flag("lr-wide", text, serious=True)]


def _flag_fits(fits: TableFits, fit: Fit) -> list[Flag]:
    """Return flags for what the fits themselves report as doubtful."""
    flags = []
    for name, is_identified in ({} if fits.hp is None else fits.hp.identified).items():
        if not is_identified and fits.states[name] == "varied":
            text = (
                f"The runs do not show where the best {SETTING_NAMES[name]} is, so the answer comes mostly from the "
                f"prior: vary {name} more within each group of equal N and D."
            )
            short = f"The runs do not show where the best {SETTING_NAMES[name]} is: vary {name} more at equal N and D."
            flags.append(Flag(f"{name}-unidentified", text, serious=True, short=short))
    if fits.hp is not None and fits.hp.status != "ok":
        flags.append(Flag("hp-fit", f"Law of learning rate and batch: {fits.hp.status}", serious=False))
    if text := describe_settings_used(fits):
        flags.append(Flag("hp-settings", text, serious=False))
    if fits.n_without_settings:
        text = (
            f"{fits.n_without_settings} of {len(fits.used)} runs have no learning rate or batch in the table, and are "
            "left out of that law."
        )
        flags.append(Flag("hp-empty", text, serious=False))
    for doubt in () if fits.loss is None else fits.loss.doubts:
        flags.append(Flag("loss-evidence", doubt, serious=False))
    if fit.status != "ok":
        flags.append(Flag("loss-fit", f"Loss law: {fit.status}", serious=False))
    return flags


def _flag_forms(fit: Fit, N: float, D: float) -> list[Flag]:
    """Return a flag if the two averaged forms of the loss law are far apart at the target."""
    disagreement = float(fit.disagreement(N, D))
    if disagreement < NOTABLE_DISAGREEMENT:
        return []
    n, d = (np.array([math.log(v) - c]) for v, c in zip((N, D), fit.centre, strict=True))
    predictions = []
    for member in fit.members:
        form = "without a floor" if member.form == "no floor" else f"with a {member.form}"
        loss = math.exp(min(float(member.moments(n, d)[0][0]), 700.0))
        predictions.append(f"{format_loss(loss)} {form} (weight {member.weight:.2f})")
    text = (
        f"The two averaged forms of the loss law disagree by {_format_share(disagreement)} (sd): "
        f"{', '.join(predictions)}. The interval of the loss takes this into account."
    )
    return [Flag("forms-disagree", text, serious=False)]


def format_loss(value: float) -> str:
    """Return a loss with four decimals or, where that is absurd, with a power of ten."""
    return f"{value:.4f}" if 1e-3 <= value < 1e4 else f"{value:.3g}"


def _format_share(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 1 else f"a factor of {math.exp(min(share, 700.0)):.3g}"


def flag_optimum(fit: Fit, C: float, best: Allocation) -> list[Flag]:
    """Return flags for compute-optimal N and D.

    Args:
        fit: The loss law.
        C: Compute of the target, FLOPs.
        best: The compute-optimal N and D by the averaged prediction.

    Returns:
        A serious flag if they have no interval, and a note if the plain law puts them elsewhere.
    """
    flags = []
    if not best.bounded:
        text = "The compute-optimal N and D have no interval, because the runs allow any size: vary N and D/N more."
        flags.append(Flag("optimum", text, serious=True))
    try:
        N = float(fit.law.optimum(C)[0])
    except ValueError:
        return flags
    if abs(math.log(N / best.N)) > math.log(NOTABLE_OPTIMUM_FACTOR):
        text = (
            f"The plain law E + A/N^alpha + B/D^beta puts the compute-optimal N at {format_count(N)}, the averaged "
            f"forms at {format_count(best.N)}, where they predict a loss that is "
            f"{100 * _compute_loss_excess(fit, C, N, best.N):.2f} % lower."
        )
        flags.append(Flag("optimum-forms", text, serious=False))
    return flags


def _compute_loss_excess(fit: Fit, C: float, N: float, best: float) -> float:
    """Return by which share the predicted loss is higher at N than at the best N, at equal compute."""
    loss, best_loss = fit.predict(np.array([N, best]), C / 6.0 / np.array([N, best]))
    return float(loss / best_loss - 1)
