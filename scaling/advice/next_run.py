"""Choose the run to do next: the one after which the interval at the target is expected to be narrowest.

For every candidate, the outcomes that the laws predict are added to the evidence and the laws are fitted again; no
formula for the gain is assumed. The outcomes are drawn from the laws: if a law is wrong, the run teaches more than is
promised here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import pandas as pd
from scipy.special import ndtri

from scaling.common.quantities import format_count
from scaling.fitting.averaging import fit_averaged_forms, whiten_runs
from scaling.fitting.loss_law import Fit
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law

# The default limit on the compute of one run: this many times the largest run so far, and this share of the target.
MAX_RATIO_TO_LARGEST = 3.0
MAX_SHARE_OF_TARGET = 0.1
# Sizes that are tried, relative to the largest N; none exceeds the target's.
SIZE_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
# The fewest tokens that are tried, relative to the fewest in the data.
MIN_TOKENS_RATIO = 0.25
# Learning rates and batches of the sweep of nine, relative to the law's.
SWEEP_FACTORS = (0.5, 1.0, 2.0)
# A run that leaves more than this share of the interval's width is no gain. In 12 planted worlds, a run smaller than
# all others was predicted to leave 0.77 to 1.16, median 0.95, because the estimate of the noise moves so much.
NO_GAIN_RATIO = 0.9
# Gauss-Hermite nodes and weights of a standard normal distribution.
QUADRATURE_NODES = ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6))


class SweepNote(TypedDict):
    """A `Sweep` as JSON keeps it."""

    N: float
    D: float
    C: float
    lr: list[float]
    batch_tokens: list[float]
    lr_factor: list[float]
    batch_factor: list[float]
    expected_regret: list[float]


class NextRunNote(TypedDict):
    """A `NextRun` as JSON keeps it."""

    N: float
    D: float
    C: float
    lr: float
    batch_tokens: float
    loss_half: list[float]
    sweep: SweepNote
    mass: float
    at_most: float


@dataclass(frozen=True)
class Sweep:
    """Nine runs of one N and D, with lr and batch each at half, once and twice the law's.

    Attributes:
        N: Parameters that multiply tokens.
        D: Training tokens of each run.
        C: Compute of all nine, FLOPs.
        lr: The three peak learning rates, at base width.
        batch_tokens: The three batches, tokens per optimizer step.
        lr_factor: The interval of lr at the target, now and expected after the sweep: within this factor up and down.
        batch_factor: The same of the batch.
        expected_regret: The expected regret at the target, now and after the sweep, as a share of the loss.
    """

    N: float
    D: float
    C: float
    lr: tuple[float, ...]
    batch_tokens: tuple[float, ...]
    lr_factor: tuple[float, float]
    batch_factor: tuple[float, float]
    expected_regret: tuple[float, float]


@dataclass(frozen=True)
class NextRun:
    """What to run next: one run to narrow the interval of the loss, and nine to narrow those of lr and batch.

    Attributes:
        N: Parameters that multiply tokens.
        D: Training tokens.
        C: Compute of the run, FLOPs.
        lr: The law's peak learning rate for it, at base width.
        batch_tokens: The law's batch for it, tokens per optimizer step.
        loss_half: Half the width of the interval of ln loss at the target, now and expected after the run.
        sweep: The nine runs.
        mass: The probability that each interval holds.
        at_most: The limit on the compute of one run, FLOPs.
    """

    N: float
    D: float
    C: float
    lr: float
    batch_tokens: float
    loss_half: tuple[float, float]
    sweep: Sweep
    mass: float
    at_most: float

    def __str__(self) -> str:
        sweep, (now, after) = self.sweep, (_format_half_width(v) for v in self.loss_half)
        loss = [f"loss at the target: {now} now, about {after} after"]
        if self.loss_half[1] > NO_GAIN_RATIO * self.loss_half[0]:
            loss = [f"loss at the target: {now} now, {after} after", "(no gain worth the price: raise --at-most)"]
        rates, batches = ", ".join(f"{v:.3g}" for v in sweep.lr), ", ".join(map(format_count, sweep.batch_tokens))
        regret, regret_after = (f"{100 * v:.2f} %" for v in sweep.expected_regret)
        lr_now, lr_after = (f"{v:.2f}" for v in sweep.lr_factor)
        batch_now, batch_after = (f"{v:.2f}" for v in sweep.batch_factor)
        cells = [
            ("one run", f"N {format_count(self.N)}, D {format_count(self.D)}, {self.C:.2g} FLOPs"),
            ("", f"lr {self.lr:.3g}, batch {format_count(self.batch_tokens)} tokens"),
            *(("", line) for line in loss),
            ("nine runs", f"N {format_count(sweep.N)}, D {format_count(sweep.D)}, {sweep.C:.2g} FLOPs in total"),
            ("", f"lr {rates}, each with batch {batches}"),
            ("", f"lr at the target: within a factor of {lr_now} now, {lr_after} after"),
            ("", f"batch at the target: within a factor of {batch_now} now, {batch_after} after"),
            ("", f"expected regret at the target: {regret} now, {regret_after} after"),
        ]
        return "\n".join(f"  {name:12}{text}" for name, text in cells)


def _format_half_width(half: float) -> str:
    """Return half the width of an interval of ln loss as a percentage or, if it is wide, as a factor."""
    return f"± {100 * half:.2f} %" if half < 0.5 else f"within a factor of {math.exp(min(half, 700.0)):.3g}"


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
    """Choose the run, and the sweep of nine, that are expected to narrow the recommendation at (N, D) most.

    Args:
        hp: The law of learning rate and batch that the recommendation is based on.
        fit: The loss law that it is based on.
        N: Parameters of the target that multiply tokens.
        D: Training tokens of the target.
        run_noise: The noise of one run (sd of ln loss) that the minima do not contain, from `LossEvidence.run_noise`.
        mass: The probability that each interval holds.
        at_most: The most FLOPs of one run; by default 3 times the largest run, but not more than a tenth of the target.
        seq_len: Sequence length. If given, batches are whole sequences.

    Returns:
        The run and the sweep, with the intervals now and expected after them.

    Raises:
        ValueError: If no run near the data costs so little.
    """
    candidates = list_candidates(hp, N, D, at_most)
    now = compute_loss_half_width(fit, run_noise, N, D, mass)
    after, size, tokens = min(
        (simulate_run(hp, fit, run_noise, size, tokens, N, D, mass), size, tokens) for size, tokens in candidates
    )
    lr, batch = (float(v) for v in hp.law(size, tokens))
    if seq_len is not None:
        batch = seq_len * max(1.0, round(batch / seq_len))
    sweep = _plan_sweep(hp, fit, N, D, candidates, mass, seq_len)
    limit = compute_default_limit(hp, N, D) if at_most is None else at_most
    return NextRun(
        N=size,
        D=tokens,
        C=6 * size * tokens,
        lr=lr,
        batch_tokens=batch,
        loss_half=(now, after),
        sweep=sweep,
        mass=mass,
        at_most=limit,
    )


def _plan_sweep(
    hp: HPFit,
    fit: Fit,
    N: float,
    D: float,
    candidates: list[tuple[float, float]],
    mass: float,
    seq_len: int | None,
) -> Sweep:
    """Choose the sweep after which the expected regret at (N, D) is least."""
    fits = [(simulate_sweep(hp, fit, *candidate, seq_len), candidate) for candidate in candidates]
    refitted, (size, tokens) = min(fits, key=lambda pair: pair[0].expected_regret(N, D))
    lrs, batches = choose_sweep_settings(hp, size, tokens, seq_len)
    lr_factor, batch_factor = zip(
        compute_interval_factors(hp, N, D, mass), compute_interval_factors(refitted, N, D, mass), strict=True
    )
    return Sweep(
        N=size,
        D=tokens,
        C=len(SWEEP_FACTORS) ** 2 * 6 * size * tokens,
        lr=lrs,
        batch_tokens=batches,
        lr_factor=lr_factor,
        batch_factor=batch_factor,
        expected_regret=(hp.expected_regret(N, D), refitted.expected_regret(N, D)),
    )


def compute_default_limit(hp: HPFit, N: float, D: float) -> float:
    """Return the default limit on the FLOPs of one run: 3 times the largest so far, at most a tenth of the target's."""
    largest = 6 * float((hp.floors["N"] * hp.floors["D"]).max())
    return min(MAX_RATIO_TO_LARGEST * largest, MAX_SHARE_OF_TARGET * 6 * N * D)


def list_candidates(hp: HPFit, N: float, D: float, at_most: float | None = None) -> list[tuple[float, float]]:
    """Return candidates for the next run, of sizes around the largest so far.

    Args:
        hp: The law of learning rate and batch.
        N: Parameters of the target that multiply tokens.
        D: Training tokens of the target.
        at_most: The FLOPs of each candidate; by default `compute_default_limit`.

    Returns:
        (N, D) of each. They cost the limit, unless that would exceed the tokens of the target and the data.

    Raises:
        ValueError: If the limit is not positive, or too low for any run near the data.
    """
    limit = compute_default_limit(hp, N, D) if at_most is None else at_most
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"at_most must be positive FLOPs, got {at_most}")
    centre = min(hp.ranges["N"][1], N)
    largest = min(N, SIZE_FACTORS[-1] * centre) * (1 + 1e-9)
    sizes = sorted({size for size in (*(factor * centre for factor in SIZE_FACTORS), N) if size <= largest})
    most, least = max(D, hp.ranges["D"][1]), MIN_TOKENS_RATIO * hp.ranges["D"][0]
    candidates = [(s, min(limit / (6 * s), most)) for s in sizes if limit / (6 * s) >= least]
    if not candidates:
        needed = 6 * sizes[0] * least
        raise ValueError(f"a next run near the data needs {needed:.3g} FLOPs or more, got at most {limit:.3g}")
    return candidates


def compute_loss_half_width(fit: Fit, run_noise: float, N: float, D: float, mass: float) -> float:
    """Return half the width of the interval of ln loss of one new run.

    It is that of the law, widened by the scatter of runs around the minima that the law was fitted to.

    Args:
        fit: The loss law.
        run_noise: That scatter, sd of ln loss.
        N: Parameters that multiply tokens.
        D: Training tokens.
        mass: The probability that the interval holds.
    """
    half = math.log(float(fit.interval(N, D, mass)[1]) / float(fit.predict(N, D)))
    return math.hypot(half, float(ndtri(0.5 + mass / 2)) * run_noise)


def compute_interval_factors(hp: HPFit, N: float, D: float, mass: float) -> tuple[float, float]:
    """Return the factors by which lr and batch may be off: the geometric mean of both sides of each interval."""
    (lr_low, lr_high), (batch_low, batch_high) = hp.interval(N, D, mass)
    return math.sqrt(lr_high / lr_low), math.sqrt(batch_high / batch_low)


def simulate_run(
    hp: HPFit, fit: Fit, run_noise: float, size: float, tokens: float, N: float, D: float, mass: float
) -> float:
    """Return half the width of the interval of ln loss at (N, D) that is expected after one run at (size, tokens)."""
    floors = hp.floors
    sd = compute_loss_half_width(fit, run_noise, size, tokens, math.erf(math.sqrt(0.5)))
    middle = math.log(float(fit.predict(size, tokens)))
    log_n, log_d = (np.log([*floors[c], v]) for c, v in (("N", size), ("D", tokens)))
    centre = (float(log_n.mean()), float(log_d.mean()))
    # The mean of the logarithm: otherwise a single far outcome would dominate where the law predicts little.
    expected = 0.0
    for node, weight in QUADRATURE_NODES:
        y = np.array([*np.log(floors["loss"]), middle + node * sd])
        # The printed law is not fitted again, since the interval does not use it.
        refitted = replace(fit, centre=centre, members=fit_averaged_forms(whiten_runs(log_n, log_d, y, centre)))
        expected += weight * math.log(compute_loss_half_width(refitted, run_noise, N, D, mass))
    return math.exp(expected)


def choose_sweep_settings(
    hp: HPFit, size: float, tokens: float, seq_len: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the three learning rates and the three batches of the sweep: half, once and twice the law's.

    With a sequence length, the batches are three different whole numbers of sequences.
    """
    lrs, batches = (tuple(float(v) * f for f in SWEEP_FACTORS) for v in hp.law(size, tokens))
    if seq_len is not None:
        counts: list[int] = []
        for batch in batches:
            counts.append(max(round(batch / seq_len), counts[-1] + 1 if counts else 1))
        batches = tuple(float(n * seq_len) for n in counts)
    return lrs, batches


def simulate_sweep(hp: HPFit, fit: Fit, size: float, tokens: float, seq_len: int | None = None) -> HPFit:
    """Return the law of learning rate and batch after nine runs at (size, tokens) with the losses that it predicts."""
    lr, batch = (v.ravel() for v in np.meshgrid(*choose_sweep_settings(hp, size, tokens, seq_len)))
    loss = float(fit.predict(size, tokens)) * np.exp(hp.height(lr, batch, size, tokens))
    new = pd.DataFrame({"N": size, "D": tokens, "lr": lr, "batch_tokens": batch, "loss": loss})
    old = hp.used[list(new.columns)]
    if "parametrization" in hp.used:
        old = old.assign(parametrization=hp.used["parametrization"])
        new = new.assign(parametrization=hp.used["parametrization"].iloc[0])
    return fit_hp_law(pd.concat([old, new], ignore_index=True))
