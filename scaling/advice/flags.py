"""Flags: reasons to doubt a recommendation, each in a sentence or two that also say what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling.common.quantities import format_count
from scaling.fitting.loss_law import Allocation, Fit
from scaling.fitting.lr_batch_law import HPFit

# A target farther than this beyond the largest N or D, as a ratio, is a serious doubt. Assumed: the laws were checked
# on real runs up to 33 times the compute.
MAX_RATIO = 30.0
CHECKED_COMPUTE_RATIO = 33.0
# The same for compute: about MAX_RATIO in N and in D.
MAX_COMPUTE_RATIO = 1000.0
# A target this many times smaller than the smallest N is a serious doubt: there the intervals of lr and batch are too
# narrow.
MAX_RATIO_BELOW = 2.0
# (N, D) groups; with fewer, hold-out tests of the laws mean little.
ENOUGH_GROUPS = 6
# A setting within this share of the searched range (in logarithms) lies at its edge.
EDGE_SHARE = 0.1
# What is worth mentioning: a relative disagreement between the two forms of the loss law, a factor in the best batch by
# its trend in N, and a factor between two optima of N.
NOTABLE_DISAGREEMENT = 0.01
NOTABLE_BATCH_FACTOR = 1.2
NOTABLE_OPTIMUM_FACTOR = 1.5
SETTING_NAMES = {"lr": "learning rate", "batch_tokens": "batch"}

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
    """

    code: str
    text: str
    serious: bool


def collect_flags(
    hp: HPFit,
    fit: Fit,
    runs: pd.DataFrame,
    searched: Mapping[str, tuple[float, float]],
    N: float,
    D: float,
) -> list[Flag]:
    """Return all flags of a recommendation.

    Args:
        hp: The law of learning rate and batch.
        fit: The loss law.
        runs: The runs that the laws were fitted to.
        searched: The searched range of each setting, from `find_searched_ranges`.
        N: Parameters of the target that multiply tokens.
        D: Training tokens of the target.

    Returns:
        The flags, in the order in which they were checked; there is always one on how N was counted.
    """
    return [
        *_flag_extrapolation(hp, N, D),
        *_flag_few_scales(hp, N, D),
        *_flag_edges(hp, searched, N, D),
        *_flag_fits(hp, fit),
        *_flag_forms(fit, N, D),
        _flag_convention(runs),
    ]


def find_searched_ranges(hp: HPFit, space: Mapping[str, Sequence[float]] | None) -> dict[str, tuple[float, float]]:
    """Return the range of lr and batch_tokens that was searched; where `space` lacks it, the range of the runs.

    Args:
        hp: The law of learning rate and batch.
        space: (low, high) of the settings that were searched.

    Returns:
        (low, high) of "lr" and "batch_tokens".

    Raises:
        ValueError: If a range is not 0 < low <= high.
    """
    searched = {name: hp.ranges[name] for name in SETTING_NAMES}
    for name in SETTING_NAMES:
        if space is not None and name in space:
            low, high = (float(v) for v in space[name])
            if not 0 < low <= high:
                raise ValueError(f"space[{name!r}] must be (low, high) with 0 < low <= high, got {space[name]}")
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


def _flag_extrapolation(hp: HPFit, N: float, D: float) -> list[Flag]:
    """Return flags for a target outside the sizes, tokens and compute of the data."""
    flags = []
    for name, value in (("N", N), ("D", D)):
        low, high = hp.ranges[name]
        ratio = max(value / high, low / value)
        if ratio > 1 + 1e-9:
            relation = (
                f"{_format_ratio(ratio)} times the largest" if value > high else f"{1 / ratio:.3g} times the smallest"
            )
            text = f"The target's {name} is {relation} in the data ({format_count(low)} to {format_count(high)})."
            if ratio > MAX_RATIO:
                text += f" The laws are not checked beyond a factor of {MAX_RATIO:.0f}: add runs closer to the target."
            flags.append(Flag(f"beyond-{name}", text, serious=ratio > MAX_RATIO))
    largest = 6 * float((hp.floors["N"] * hp.floors["D"]).max())
    ratio = 6 * N * D / largest
    if ratio > 1 + 1e-9:
        text = f"The target's compute is {_format_ratio(ratio)} times that of the largest run ({largest:.3g} FLOPs)."
        if ratio > CHECKED_COMPUTE_RATIO:
            text += (
                f" Intervals of the loss were checked on real runs only up to {CHECKED_COMPUTE_RATIO:.0f} times: "
                "add larger runs."
            )
        flags.append(Flag("beyond-C", text, serious=ratio > MAX_COMPUTE_RATIO))
    low, high = hp.ranges["N"]
    if low / N > 1 + 1e-9:
        text = (
            "Below the smallest N, the intervals of learning rate and batch are too narrow, and the expected regret is "
            "not an upper bound: add runs of a smaller model."
        )
        flags.append(Flag("below-N", text, serious=low / N > MAX_RATIO_BELOW))
    factor = (N / high) ** hp.law.batch_N
    if N > high and not 1 / NOTABLE_BATCH_FACTOR < factor < NOTABLE_BATCH_FACTOR:
        exponent_low, exponent_high = hp.exponents(0.9)["batch_N"]
        text = (
            f"Beyond the largest N, the best batch is extrapolated as N^{hp.law.batch_N:+.2f} (90 % interval: "
            f"{exponent_low:+.2f} to {exponent_high:+.2f}), an average of no trend in N, as other studies found, and "
            f"of the trend in these runs: the recommended batch is {factor:.2g} times that at the largest N. If you "
            "can, try half and twice this batch, too."
        )
        flags.append(Flag("batch-beyond-N", text, serious=False))
    return flags


def _format_ratio(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"


def _flag_few_scales(hp: HPFit, N: float, D: float) -> list[Flag]:
    """Return flags for data with too few sizes, token counts or groups."""
    flags = []
    for name, value, least, more in (("N", N, 3, "sizes"), ("D", D, 2, "token counts")):
        count = hp.floors[name].nunique()
        if count < least:
            low, high = hp.ranges[name]
            is_outside = not low <= value <= high
            text = (
                f"The data has {count} distinct {name}, and a trend in {name} needs at least {least}: add other {more}."
            )
            flags.append(Flag(f"few-{name}", text, serious=is_outside))
    groups = len(hp.floors)
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
    groups = [hp.interval(n, d, mass=0.9) for n, d in zip(hp.floors["N"], hp.floors["D"], strict=True)]
    best = (float(v) for v in hp.law(N, D))
    for i, (name, value) in enumerate(zip(SETTING_NAMES, best, strict=True)):
        low, high = searched[name]
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


def _flag_fits(hp: HPFit, fit: Fit) -> list[Flag]:
    """Return flags for what the fits themselves report as doubtful."""
    flags = []
    for name, is_identified in hp.identified.items():
        if not is_identified:
            text = (
                f"The runs do not show where the best {SETTING_NAMES[name]} is, so the answer comes mostly from the "
                f"prior: vary {name} more within each group of equal N and D."
            )
            flags.append(Flag(f"{name}-unidentified", text, serious=True))
    if hp.status != "ok":
        flags.append(Flag("hp-fit", f"Law of learning rate and batch: {hp.status}", serious=False))
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
        loss = math.exp(float(member.moments(n, d)[0][0]))
        predictions.append(f"{loss:.4f} {form} (weight {member.weight:.2f})")
    text = (
        f"The two averaged forms of the loss law disagree by {100 * disagreement:.1f} % (sd): "
        f"{', '.join(predictions)}. The interval of the loss takes this into account."
    )
    return [Flag("forms-disagree", text, serious=False)]


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
