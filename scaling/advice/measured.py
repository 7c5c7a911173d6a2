"""Compare the law of learning rate and batch with the best runs where both speak of the same size."""

from __future__ import annotations

import numpy as np

from scaling.advice.flags import Flag
from scaling.advice.table_fits import SETTING_NAMES, TableFits
from scaling.common.quantities import format_count
from scaling.fitting.groups import group_runs

# Runs that a group of equal N and D needs.
MIN_RUNS = 5
# Runs within so many standard deviations of the lowest loss may be as good, and the sd is at least this (of ln loss).
# With 4, none of 12 planted tables that obey the law is flagged; with 2.5, two are.
NEAR_SD, MIN_NOISE = 4.0, 0.001


def flag_measured_best(fits: TableFits, mass: float) -> list[Flag]:
    """Return a flag for each setting whose best measured values lie outside the law's interval.

    They are compared at the largest size with enough runs: at the target itself nothing may have been measured.

    Args:
        fits: The laws of the table.
        mass: The probability that the law's interval holds.
    """
    hp = fits.hp
    if hp is None:
        return []
    runs = hp.used
    groups = group_runs(runs["N"].to_numpy(float), runs["D"].to_numpy(float))
    large = np.flatnonzero(groups.counts >= MIN_RUNS)
    if not large.size:
        return []
    group = large[np.argmax(groups.N[large] * groups.D[large])]
    N, D = float(groups.N[group]), float(groups.D[group])
    own = runs[groups.of == group]
    noise = max(float(np.mean([f.noise for f in hp.fits])), MIN_NOISE)
    loss = np.log(own["loss"].to_numpy(float))
    near = own[loss <= loss.min() + NEAR_SD * noise]
    best = own.iloc[int(loss.argmin())]
    flags = []
    for (name, word), (low, high) in zip(SETTING_NAMES.items(), hp.interval(N, D, mass), strict=True):
        # The best value may lie anywhere up to the next ones that were tried.
        tried, least, most = np.sort(own[name].to_numpy(float)), float(near[name].min()), float(near[name].max())
        below, above = tried[tried < least], tried[tried > most]
        least, most = (below[-1] if below.size else 0.0), (above[0] if above.size else np.inf)
        if fits.states[name] != "varied" or (least <= high and most >= low):
            continue
        show = (lambda v: f"{v:.3g}") if name == "lr" else format_count
        text = (
            f"At N {format_count(N)}, D {format_count(D)}, the best measured {word} is {show(best[name])}, and the law "
            f"says {show(low)} to {show(high)}. Measure both there: the law may not hold for these runs."
        )
        flags.append(Flag(f"measured-{name}", text, serious=False))
    return flags
