"""Which run to do next: the one after which the interval at the target is expected to be narrowest.

For every candidate the outcomes that the laws foresee are added to the evidence and the laws are really fitted again;
no formula for the gain is assumed. The outcomes are those of the law: should the law be wrong, the run tells more
than is said here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import norm

from scaling.common.quantities import format_count
from scaling.fitting.averaging import fit_averaged_forms, whiten_runs
from scaling.fitting.loss_law import Fit
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law

MAX_RATIO_TO_LARGEST = 3.0  # times the compute of the largest run so far, at most
MAX_SHARE_OF_TARGET = 0.1  # of the target's compute, at most
SIZE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the largest N, the target's at most
MIN_TOKENS_RATIO = 0.25  # times the fewest of the data
SWEEP_FACTORS = (0.5, 1.0, 2.0)  # of lr and of batch, in the sweep of nine
# Of the interval's width now: what is left above this is no gain. In 12 planted worlds a run smaller than every other
# was said to leave .77 to 1.16, median .95: the fit's noise estimate moves so much.
NO_GAIN_RATIO = 0.9
QUADRATURE_NODES = ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6))  # Gauss-Hermite, standard normal


@dataclass(frozen=True)
class Sweep:
    """Nine runs of one N and D, lr and batch each at half, once and twice the law's."""

    N: float
    D: float
    C: float  # FLOPs of all nine
    lr: tuple[float, ...]
    batch_tokens: tuple[float, ...]
    lr_factor: tuple[float, float]  # interval at the target, now and then: within this factor either way
    batch_factor: tuple[float, float]
    expected_regret: tuple[float, float]  # relative loss, now and then


@dataclass(frozen=True)
class NextRun:
    """One run for the loss, nine for lr and batch. All intervals are those at the target."""

    N: float
    D: float
    C: float  # FLOPs
    lr: float  # the law's there
    batch_tokens: float
    compute_loss_half_width: tuple[float, float]  # half width of the loss interval, relative: now, and as expected after the run
    sweep: Sweep
    mass: float  # of the intervals
    at_most: float  # FLOPs of one run

    def __str__(self) -> str:
        s, (now, then) = self.sweep, (_format_half_width(v) for v in self.loss_half)
        gain = f"loss within {now}, then about {then}"
        if self.loss_half[1] > NO_GAIN_RATIO * self.loss_half[0]:
            gain = f"loss within {now}, then {then}: no gain to speak of at this price; raise --at-most"
        cells = [
            ("one run", f"N {format_count(self.N)}, D {format_count(self.D)}, {self.C:.2g} FLOPs"),
            ("", f"lr {self.lr:.3g}, batch {format_count(self.batch_tokens)} tokens"),
            ("", gain),
            ("nine runs", f"N {format_count(s.N)}, D {format_count(s.D)}, {s.C:.2g} FLOPs in all"),
            (
                "",
                f"lr {', '.join(f'{v:.3g}' for v in s.lr)}, each with batch {', '.join(map(format_count, s.batch_tokens))}",
            ),
            (
                "",
                f"lr within a factor {s.lr_factor[0]:.2f}, then {s.lr_factor[1]:.2f}; batch {s.batch_factor[0]:.2f}, then "
                f"{s.batch_factor[1]:.2f}; regret {100 * s.expected_regret[0]:.2f} %, then {100 * s.expected_regret[1]:.2f} %",
            ),
        ]
        return "\n".join(f"  {name:12}{text}" for name, text in cells)


def _format_half_width(half: float) -> str:
    return f"± {100 * half:.2f} %" if half < 0.5 else f"a factor {math.exp(min(half, 700.0)):.3g}"


def plan_next(
    hp: HPFit,
    fit: Fit,
    N: float,
    D: float,
    *,
    run_noise: float,
    mass: float = 0.9,
    at_most: float | None = None,
    seq_len: int | None = None,
) -> NextRun:
    """The run, and the sweep, of at most `at_most` FLOPs each run that narrow the answer at (N, D) most.

    hp, fit, run_noise: as the recommendation at (N, D) was made from. at_most: 3 times the largest run, a tenth of the
    target at most, when not given. seq_len: batches are whole sequences of it. ValueError when no run near the data is
    so small.
    """
    sizes = list_candidates(hp, N, D, at_most)
    now = compute_loss_half_width(fit, run_noise, N, D, mass)
    runs = [(simulate_run(hp, fit, run_noise, size, tokens, N, D, mass), size, tokens) for size, tokens in sizes]
    then, size, tokens = min(runs)
    lr, batch = (float(v) for v in hp.law(size, tokens))
    if seq_len is not None:
        batch = seq_len * max(1.0, round(batch / seq_len))
    refitted = [(simulate_sweep(hp, fit, *place, seq_len), place) for place in sizes]
    swept, place = min(refitted, key=lambda found: found[0].expected_regret(N, D))
    lrs, batches = choose_sweep_settings(hp, *place, seq_len)
    factors = list(zip(compute_interval_factors(hp, N, D, mass), compute_interval_factors(swept, N, D, mass), strict=True))
    sweep = Sweep(
        *place,
        C=len(SWEEP_FACTORS) ** 2 * 6 * place[0] * place[1],
        lr=lrs,
        batch_tokens=batches,
        lr_factor=factors[0],
        batch_factor=factors[1],
        expected_regret=(hp.expected_regret(N, D), swept.expected_regret(N, D)),
    )
    limit = compute_default_limit(hp, N, D) if at_most is None else at_most
    return NextRun(size, tokens, 6 * size * tokens, lr, batch, (now, then), sweep, mass, limit)


def compute_default_limit(hp: HPFit, N: float, D: float) -> float:
    """FLOPs of one run: 3 times the largest so far, at most a tenth of the target's."""
    return min(MAX_RATIO_TO_LARGEST * 6 * float((hp.floors["N"] * hp.floors["D"]).max()), MAX_SHARE_OF_TARGET * 6 * N * D)


def list_candidates(hp: HPFit, N: float, D: float, at_most: float | None = None) -> list[tuple[float, float]]:
    """(N, D) that cost the limit, of sizes about the largest; never more parameters or tokens than the target or the data."""
    limit = compute_default_limit(hp, N, D) if at_most is None else at_most
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"at_most must be positive FLOPs, got {at_most}")
    centre = min(hp.ranges["N"][1], N)
    sizes = sorted({s for s in (*(f * centre for f in SIZE_FACTORS), N) if s <= min(N, SIZE_FACTORS[-1] * centre) * (1 + 1e-9)})
    most, least = max(D, hp.ranges["D"][1]), MIN_TOKENS_RATIO * hp.ranges["D"][0]
    found = [(s, min(limit / (6 * s), most)) for s in sizes if limit / (6 * s) >= least]
    if not found:
        needed = 6 * sizes[0] * least
        raise ValueError(f"a next run near the data needs {needed:.3g} FLOPs or more, got at most {limit:.3g}")
    return found


def compute_loss_half_width(fit: Fit, run_noise: float, N: float, D: float, mass: float) -> float:
    """Half the interval of ln L of one new run: the law's, widened by what runs scatter about the minima it was fitted to."""
    half = math.log(float(fit.interval(N, D, mass)[1]) / float(fit.predict(N, D)))
    return math.hypot(half, float(norm.ppf(0.5 + mass / 2)) * run_noise)


def compute_interval_factors(hp: HPFit, N: float, D: float, mass: float) -> tuple[float, float]:
    """Of lr and batch: the interval is this factor either way, the geometric mean of both sides."""
    (a, b), (c, d) = hp.interval(N, D, mass)
    return math.sqrt(b / a), math.sqrt(d / c)


def simulate_run(
    hp: HPFit, fit: Fit, run_noise: float, size: float, tokens: float, N: float, D: float, mass: float
) -> float:
    """Expected half width of the loss interval at (N, D) once one run at (size, tokens) is part of the evidence."""
    floors = hp.floors
    sd = compute_loss_half_width(fit, run_noise, size, tokens, math.erf(math.sqrt(0.5)))
    middle = math.log(float(fit.predict(size, tokens)))
    log_n, log_d = (np.log([*floors[c], v]) for c, v in (("N", size), ("D", tokens)))
    centre = (float(log_n.mean()), float(log_d.mean()))
    expected = 0.0  # mean of the logarithm: one far outcome would rule the mean where the law foresees hardly anything
    for node, weight in QUADRATURE_NODES:
        y = np.array([*np.log(floors["loss"]), middle + node * sd])
        # what the interval is made of, without the printed law, which it does not use
        again = replace(fit, centre=centre, members=fit_averaged_forms(whiten_runs(log_n, log_d, y, centre)))
        expected += weight * math.log(compute_loss_half_width(again, run_noise, N, D, mass))
    return math.exp(expected)


def choose_sweep_settings(
    hp: HPFit, size: float, tokens: float, seq_len: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rates and batches of the sweep: half, once and twice the law's; three different whole numbers of sequences."""
    lrs, batches = (tuple(float(v) * f for f in SWEEP_FACTORS) for v in hp.law(size, tokens))
    if seq_len is not None:
        counts: list[int] = []
        for batch in batches:
            counts.append(max(round(batch / seq_len), counts[-1] + 1 if counts else 1))
        batches = tuple(float(n * seq_len) for n in counts)
    return lrs, batches


def simulate_sweep(hp: HPFit, fit: Fit, size: float, tokens: float, seq_len: int | None = None) -> HPFit:
    """The lr/batch law once nine runs at (size, tokens) have come out as it says."""
    lr, batch = (v.ravel() for v in np.meshgrid(*choose_sweep_settings(hp, size, tokens, seq_len)))
    loss = float(fit.predict(size, tokens)) * np.exp(hp.height(lr, batch, size, tokens))
    new = pd.DataFrame({"N": size, "D": tokens, "lr": lr, "batch_tokens": batch, "loss": loss})
    old = hp.used[list(new.columns)]
    if "parametrization" in hp.used:
        old = old.assign(parametrization=hp.used["parametrization"])
        new = new.assign(parametrization=hp.used["parametrization"].iloc[0])
    return fit_hp_law(pd.concat([old, new], ignore_index=True))
