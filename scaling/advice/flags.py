"""What to doubt in a recommendation, each doubt with its reason in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scaling.common.quantities import format_count
from scaling.fitting.loss_law import Allocation, Fit
from scaling.fitting.lr_batch_law import HPFit

MAX_RATIO = 30.0  # times the largest N or D of the data. Assumed: the laws were checked to 33 times in compute
CHECKED_COMPUTE_RATIO = 33.0  # times the largest compute
MAX_COMPUTE_RATIO = 1000.0  # times the largest compute: about TOO_FAR in N and in D
MAX_RATIO_BELOW = 2.0  # times below the smallest N: there the lr/batch intervals do not hold
ENOUGH_GROUPS = 6  # (N, D) groups; below, hold-out tests of the laws become thin
EDGE_SHARE = 0.1  # within this share of the searched range (in logs) counts as at its edge
NOTABLE_DISAGREEMENT = 0.01  # relative; a disagreement of the loss law's two forms that is worth saying
NOTABLE_BATCH_FACTOR = 1.2  # a factor in B* by its trend in N that is worth saying
NOTABLE_OPTIMUM_FACTOR = 1.5  # a factor between two optima of N that is worth saying
SETTING_NAMES = {"lr": "learning rate", "batch_tokens": "batch"}

CONVENTIONS = {
    "multiplying": "parameters that multiply tokens: no input embedding, the unembedding once",
    "total": "every parameter (Chinchilla)",
    "nonembedding": "non-embedding parameters (Kaplan)",
    "as given": "as given in the run table; whether with or without embeddings was not recorded",
    "mixed": "counted in several ways in one table",
}


@dataclass(frozen=True)
class Flag:
    """A doubt. A serious one means: do not trust the recommendation."""

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
    """Every doubt about a recommendation for (N, D). runs: those that were used; searched: as from `searched_ranges`."""
    return [
        *_flag_extrapolation(hp, N, D),
        *_flag_few_scales(hp, N, D),
        *_flag_edges(hp, searched, N, D),
        *_flag_fits(hp, fit),
        *_flag_forms(fit, N, D),
        _flag_convention(runs),
    ]


def find_searched_ranges(hp: HPFit, space: Mapping[str, Sequence[float]] | None) -> dict[str, tuple[float, float]]:
    """lr and batch_tokens: what was searched, or else what the runs cover."""
    searched = {name: hp.ranges[name] for name in SETTING_NAMES}
    for name in SETTING_NAMES:
        if space is not None and name in space:
            low, high = (float(v) for v in space[name])
            if not 0 < low <= high:
                raise ValueError(f"space[{name!r}] must be (low, high) with 0 < low <= high, got {space[name]}")
            searched[name] = (low, high)
    return searched


def find_convention(runs: pd.DataFrame) -> str:
    """How N was counted: one of CONVENTIONS. By the table's own word, else by which other count N equals."""
    if "N_convention" in runs and runs["N_convention"].notna().any():
        said = runs["N_convention"].fillna("as given").unique()
        return (str(said[0]) if said[0] in CONVENTIONS else "as given") if len(said) == 1 else "mixed"
    known = _find_other_counts(runs)
    for column in known:
        if np.array_equal(runs[column].to_numpy(float), runs["N"].to_numpy(float)):
            return column.removeprefix("N_")
    return "multiplying" if known else "as given"


def _find_other_counts(runs: pd.DataFrame) -> list[str]:
    return [c for c in ("N_total", "N_nonembedding") if c in runs and runs[c].notna().all()]


def _flag_convention(runs: pd.DataFrame) -> Flag:
    kind, known = find_convention(runs), _find_other_counts(runs)
    text = f"N: {CONVENTIONS[kind]}. Count the target's N in the same way."
    if known:
        largest = runs.iloc[int(runs["N"].to_numpy(float).argmax())]
        counts = ", ".join(f"{c} {float(largest[c]):,.0f}" for c in known)
        text += f" At the largest proxy: N {float(largest['N']):,.0f}, {counts}."
    return Flag("n-convention", text, serious=kind == "mixed")


def _flag_extrapolation(hp: HPFit, N: float, D: float) -> list[Flag]:
    flags = []
    largest = 6 * float((hp.floors["N"] * hp.floors["D"]).max())
    for name, value in (("N", N), ("D", D)):
        low, high = hp.ranges[name]
        ratio = max(value / high, low / value)
        if ratio > 1 + 1e-9:
            side = "above" if value > high else "below"
            text = f"The target's {name} is {ratio:.3g} times {side} the data ({format_count(low)} to {format_count(high)})."
            if ratio > MAX_RATIO:
                text += f" Laws are not checked beyond {MAX_RATIO:.0f} times: add runs nearer to it."
            flags.append(Flag(f"beyond-{name}", text, serious=ratio > MAX_RATIO))
    ratio = 6 * N * D / largest
    if ratio > 1 + 1e-9:
        text = f"The target's compute is {ratio:.3g} times that of the largest run ({largest:.3g} FLOPs)."
        if ratio > CHECKED_COMPUTE_RATIO:
            text += f" Loss intervals were checked on real runs to {CHECKED_COMPUTE_RATIO:.0f} times only."
        flags.append(Flag("beyond-C", text, serious=ratio > MAX_COMPUTE_RATIO))
    low, high = hp.ranges["N"]
    if low / N > 1 + 1e-9:
        text = (
            "Below the smallest N the learning-rate and batch intervals hold too seldom and the expected regret is no "
            "upper bound: add runs of a smaller model."
        )
        flags.append(Flag("below-N", text, serious=low / N > MAX_RATIO_BELOW))
    factor = (N / high) ** hp.law.batch_N
    if N > high and not 1 / NOTABLE_BATCH_FACTOR < factor < NOTABLE_BATCH_FACTOR:
        near, far = hp.exponents(0.9)["batch_N"]
        text = (
            f"B* is carried beyond the trained N as N^{hp.law.batch_N:+.2f} (90 %: {near:+.2f} to {far:+.2f}), an average "
            "of no trend in N, as other studies found, and of the one these runs show: the recommended batch is "
            f"{factor:.2g} times that at the largest N. Try a batch half and twice as large if you can."
        )
        flags.append(Flag("batch-beyond-N", text, serious=False))
    return flags


def _flag_few_scales(hp: HPFit, N: float, D: float) -> list[Flag]:
    flags = []
    for name, value, least in (("N", N, 3), ("D", D, 2)):
        distinct = hp.floors[name].nunique()
        if distinct < least:
            low, high = hp.ranges[name]
            outside = not low <= value <= high
            text = f"{distinct} distinct {name} in the data; a trend in {name} needs at least {least}."
            flags.append(Flag(f"few-{name}", text, serious=outside))
    groups = len(hp.floors)
    if groups < ENOUGH_GROUPS:
        flags.append(
            Flag("few-groups", f"{groups} (N, D) groups; {ENOUGH_GROUPS} or more make a law.", serious=groups < 3)
        )
    return flags


def _flag_edges(hp: HPFit, searched: Mapping[str, tuple[float, float]], N: float, D: float) -> list[Flag]:
    """Optima at or over the edge of what was searched: those of the data's groups, and the recommended one."""
    flags = []
    groups = [hp.interval(n, d, mass=0.9) for n, d in zip(hp.floors["N"], hp.floors["D"], strict=True)]
    best = (float(v) for v in hp.law(N, D))
    for i, (name, value) in enumerate(zip(SETTING_NAMES, best, strict=True)):
        low, high = searched[name]
        say = (lambda v: f"{v:.4g}") if name == "lr" else format_count
        if low == high:
            continue  # one value was tried: `_doubts` says that the optimum is not identified
        margin = EDGE_SHARE * math.log(high / low)
        # A group's optimum counts as outside when its whole interval is: a bowl seen from one side only.
        below, above = sum(g[i][1] < low for g in groups), sum(g[i][0] > high for g in groups)
        for side, outside in (("low", below), ("high", above)):
            if outside > len(groups) / 2:
                beyond, further = ("below", "lower") if side == "low" else ("above", "higher")
                text = (
                    f"The best {SETTING_NAMES[name]} lies {beyond} the searched range ({say(low)} to {say(high)}), with its whole 90 % "
                    f"interval, in {outside} of {len(groups)} groups: search {further}."
                )
                flags.append(Flag(f"{name}-unbracketed-{side}", text, serious=True))
        for side, edge, depth in (("low", low, math.log(value / low)), ("high", high, math.log(high / value))):
            if depth >= margin:
                continue
            where = "at the edge of" if depth >= 0 else "outside"
            text = (
                f"The recommended {SETTING_NAMES[name]} {say(value)} is {where} the searched range ({say(low)} to {say(high)}), on "
                f"the {side} side; it is not clipped. To measure it, widen {name} beyond {say(edge)}."
            )
            flags.append(Flag(f"{name}-edge-{side}", text, serious=False))
    return flags


def _flag_fits(hp: HPFit, fit: Fit) -> list[Flag]:
    flags = []
    for name, known in hp.identified.items():
        if not known:
            text = f"The runs do not say where the best {SETTING_NAMES[name]} is; the answer is mostly the prior's."
            flags.append(Flag(f"{name}-unidentified", text, serious=True))
    if hp.status != "ok":
        flags.append(Flag("hp-fit", f"Learning-rate/batch law: {hp.status}", serious=False))
    if fit.status != "ok":
        flags.append(Flag("loss-fit", f"Loss law: {fit.status}", serious=False))
    return flags


def _flag_forms(fit: Fit, N: float, D: float) -> list[Flag]:
    """The two averaged forms side by side, when they are far apart."""
    apart = float(fit.disagreement(N, D))
    if apart < NOTABLE_DISAGREEMENT:
        return []
    n, d = (np.array([math.log(v) - c]) for v, c in zip((N, D), fit.centre, strict=True))
    said = [
        f"{math.exp(float(m.moments(n, d)[0][0])):.4f} with a {m.form} (weight {m.weight:.2f})" for m in fit.members
    ]
    text = f"The averaged forms disagree on the loss by {100 * apart:.1f} % (sd): {', '.join(said)}; the interval counts it."
    return [Flag("forms-disagree", text.replace("with a no floor", "without a floor"), serious=False)]


def flag_optimum(fit: Fit, C: float, best: Allocation) -> list[Flag]:
    """Of the compute-optimal N and D: no interval, or another place by the plain law, which bends otherwise."""
    flags = []
    if not best.bounded:
        text = "The compute-optimal N and D have no interval: the runs allow any size. Vary N and D/N more."
        flags.append(Flag("optimum", text, serious=True))
    try:
        law = float(fit.law.optimum(C)[0])
    except ValueError:
        return flags
    if abs(math.log(law / best.N)) > math.log(NOTABLE_OPTIMUM_FACTOR):
        text = (
            f"By the plain law E + A/N^alpha + B/D^beta the compute-optimal N is {format_count(law)}, by the averaged forms "
            f"{format_count(best.N)}, where the averaged loss is {100 * _compute_loss_excess(fit, C, law, best.N):.2f} % lower than there."
        )
        flags.append(Flag("optimum-forms", text, serious=False))
    return flags


def _compute_loss_excess(fit: Fit, C: float, N: float, best: float) -> float:
    """Predicted loss at N over that at the best N, less 1, at equal compute."""
    there, here = fit.predict(np.array([N, best]), C / 6.0 / np.array([N, best]))
    return float(there / here - 1)
