"""Analyse a transfer test: where the best learning rate lies at each size, and whether it moves.

A rate is the integer j of lr0 * 2^(j/2), so the grid has half octaves (docs/math.md §10). Nothing here trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Rates through which the parabola is fitted.
WINDOW = 5
# Half octaves between the first rates: a factor of 4.
COARSE = 4
# The penalty is extrapolated to this many times the largest size.
FURTHER = 8
# Bootstrap draws.
DRAWS = 2000
# The probability of every interval.
MASS = 0.95
# The goals for a parametrization that transfers (docs/math.md §10).
MAX_SHIFT, MAX_REGRET, MAX_GAMMA = 0.5, 0.003, 0.1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BootstrapInterval:
    """An estimate with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class LossParabola:
    """Loss against log2 lr at one size: a parabola through the best five rates.

    Attributes:
        size: Width or depth.
        best: log2 of the best lr, as the configuration stores it (at base size).
        loss: The loss there, in nats per token, mean over seeds.
        curvature: In nats per octave²: loss - least loss = curvature * octaves².
        noise: Standard deviation of one run about parabola and seed, in nats; shared by all sizes.
        rates: log2 lr of every rate tried, ascending.
        losses: Their losses, mean over the seeds each was tried with.
        window: log2 lr of the first and the last of the five.
    """

    size: int
    best: BootstrapInterval
    loss: float
    curvature: float
    noise: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    window: tuple[float, float]


@dataclass(frozen=True)
class TransferArm:
    """One parametrization over all sizes.

    Attributes:
        name: Its name.
        bowls: The parabola of each size.
        gamma: The exponent in lr*(size) = lr_inf * size^-gamma.
        shift: Octaves from the smallest size's best rate to the largest's.
        regret: Nats that the largest size loses with the smallest size's best rate; inf if it diverges there.
        penalty: Nats lost at `FURTHER` times the largest size, by gamma and the largest size's curvature.
    """

    name: str
    bowls: tuple[LossParabola, ...]
    gamma: BootstrapInterval
    shift: BootstrapInterval
    regret: BootstrapInterval
    penalty: BootstrapInterval

    @property
    def relative_regret(self) -> float:
        """The regret as a share of the largest size's loss."""
        return self.regret.value / self.bowls[-1].loss

    @property
    def misses(self) -> tuple[str, ...]:
        """The goals that are not met."""
        met = {
            f"|shift| <= {MAX_SHIFT:g} octaves": abs(self.shift.value) <= MAX_SHIFT,
            f"regret <= {MAX_REGRET:.1%}": self.relative_regret <= MAX_REGRET,
            f"|gamma| <= {MAX_GAMMA:g}": abs(self.gamma.value) <= MAX_GAMMA,
        }
        return tuple(goal for goal, yes in met.items() if not yes)


def choose_next_rates(losses: Mapping[int, float], start: int = 0, coarse: int = COARSE) -> list[int]:
    """Choose the rates to try next.

    The search starts with three rates `coarse` half octaves apart. It moves outwards while the best is at an end, then
    inwards to the half octaves around it, then continues at the lower end of the best five until the rates beyond both
    ends are worse. One minimum is assumed.

    Args:
        losses: The loss at each rate tried; inf if it diverged.
        start: The first rate.
        coarse: Half octaves between the first rates.

    Returns:
        The rates; empty once the best five are known.
    """
    if not losses:
        return [start - coarse, start, start + coarse]
    tried = sorted(losses)
    best = min(tried, key=lambda j: losses[j])
    index = tried.index(best)
    if not math.isfinite(losses[best]):
        return [tried[0] - COARSE]
    if index == 0:
        return [best - (tried[1] - best if len(tried) > 1 else 1)]
    if index == len(tried) - 1:
        return [best + best - tried[-2]]
    for reach in (2, 1):
        missing = [j for j in (best - reach, best + reach) if j not in losses]
        if missing and (reach == 1 or any(abs(best - j) > reach for j in (tried[index - 1], tried[index + 1]))):
            return missing
    if missing := [j for j in (best - 2, best + 2) if j not in losses]:
        return missing
    first, last = find_best_window(losses)
    beyond = first - 1 if losses[first] < losses[last] else last + 1
    return [] if beyond in losses else [beyond]


def find_best_window(losses: Mapping[int, float]) -> tuple[int, int]:
    """Return the first and the last of the five neighbouring rates around the best, extended towards the lower loss."""
    first = last = min(losses, key=lambda j: losses[j])
    while last - first < WINDOW - 1:
        below, above = losses.get(first - 1, math.inf), losses.get(last + 1, math.inf)
        if math.isinf(below) and math.isinf(above):
            break
        first, last = (first - 1, last) if below <= above else (first, last + 1)
    return first, last


def fit_arm(
    name: str, losses: Mapping[int, Mapping[tuple[int, int], float]], log2_lr0: float, *, seed: int = 0
) -> TransferArm:
    """Fit the parabolas of one parametrization, and what follows from them.

    Intervals contain the truth with 95 % probability: the noise of one run, pooled over sizes from the residuals of
    seeds and parabolas, is drawn again (with the uncertainty of its own size), and everything is fitted again.

    Args:
        name: The arm's name.
        losses: For each size, (rate, seed) -> final loss in nats per token; inf if it diverged. Every rate of a size's
            best five must have been run with the same seeds.
        log2_lr0: log2 of the lr of rate 0.
        seed: Seed of the bootstrap.

    Returns:
        The arm.

    Raises:
        ValueError: If a size has fewer than four rates with a finite loss, or no minimum inside them.
    """
    sizes = sorted(losses)
    if len(sizes) < 2:
        raise ValueError(f"needed at least two sizes to compare, got {sizes}: add sizes")
    blocks = [_fit_window(losses[size], size) for size in sizes]
    squares = sum(float((block.residuals**2).sum()) for block in blocks)
    freedom = sum(block.freedom for block in blocks)
    noise = math.sqrt(squares / freedom)
    generator = np.random.default_rng(seed)
    spread = noise * np.sqrt(freedom / generator.chisquare(freedom, DRAWS))
    vertices: list[Floats] = []
    bottoms: list[Floats] = []
    bends: list[Floats] = []
    for block in blocks:
        error = generator.standard_normal((DRAWS, len(block.x))) * spread[:, None] / math.sqrt(block.seeds)
        # If the parabola of a draw opens downwards, or its vertex leaves the window, its minimum is at an end.
        at, height, bend = _find_vertices(block.x, np.vstack([block.means, block.means + error]))
        if not bend[0] > 0 or not block.x[0] < at[0] < block.x[-1]:
            raise ValueError(
                f"needed a minimum of the loss inside the rates tried, got none at size {block.size}: "
                "noise hides it; add seeds or tokens (stored runs are not repeated)"
            )
        vertices.append(at)
        bottoms.append(height)
        bends.append(bend)
    # Size, draw; draw 0 is the fit itself.
    log2_lr = log2_lr0 + np.array(vertices) / 2
    # Per octave².
    curvature = 4 * np.array(bends)
    weight = 1 / np.maximum(log2_lr[:, 1:].std(axis=1), 1e-3)
    gamma = -np.polyfit(np.log2(sizes), log2_lr, 1, w=weight)[0]
    regret = _compute_regret(losses[sizes[-1]], blocks[-1], np.array(vertices[0]), bottoms[-1], vertices[-1], bends[-1])
    bowls = []
    for i, (size, block) in enumerate(zip(sizes, blocks, strict=True)):
        means = _average_seeds(losses[size])
        bowls.append(
            LossParabola(
                size=size,
                best=_summarize_draws(log2_lr[i]),
                loss=float(bottoms[i][0]),
                curvature=float(curvature[i][0]),
                noise=noise,
                rates=tuple(log2_lr0 + j / 2 for j in means),
                losses=tuple(means.values()),
                window=(log2_lr0 + block.x[0] / 2, log2_lr0 + block.x[-1] / 2),
            )
        )
    octaves = math.log2(FURTHER * sizes[-1] / sizes[0])
    return TransferArm(
        name=name,
        bowls=tuple(bowls),
        gamma=_summarize_draws(gamma),
        shift=_summarize_draws(log2_lr[-1] - log2_lr[0]),
        regret=_summarize_draws(regret),
        penalty=_summarize_draws(np.maximum(curvature[-1], 0) * (gamma * octaves) ** 2),
    )


@dataclass(frozen=True)
class _FitWindow:
    """The best five rates x of one size, ascending, with all their seeds. The residuals are [rate, seed]."""

    size: int
    x: Floats
    means: Floats
    residuals: Floats
    seeds: int
    freedom: int


def _fit_window(runs: Mapping[tuple[int, int], float], size: int) -> _FitWindow:
    seeds = sorted({seed for _, seed in runs})
    full = {j: [runs[j, s] for s in seeds] for j in {j for j, _ in runs} if all((j, s) in runs for s in seeds)}
    first, last = find_best_window({j: float(np.mean(v)) for j, v in full.items()}) if full else (0, 0)
    x = np.array([j for j in sorted(full) if first <= j <= last and np.isfinite(full[j]).all()], float)
    if len(x) < 4:
        raise ValueError(
            f"needed at least four neighbouring rates with a finite loss and all seeds at size {size}, got {len(x)}"
        )
    y = np.array([full[int(j)] for j in x])
    means = y.mean(axis=1)
    fitted = np.polyval(np.polyfit(x, means, 2), x)
    residuals = y - fitted[:, None] - (y - means[:, None]).mean(axis=0)
    return _FitWindow(size, x, means, residuals, len(seeds), y.size - len(seeds) - 2)


def _find_vertices(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """Return position, height and curvature of the minimum within x of the parabola through each row y [draw, rate]."""
    bend, tilt, level = np.polyfit(x, y.T, 2)
    at = np.clip(-tilt / np.where(bend > 0, 2 * bend, math.nan), x[0], x[-1])
    low, high = (bend * end**2 + tilt * end for end in (x[0], x[-1]))
    at = np.where(bend > 0, at, np.where(low <= high, x[0], x[-1]))
    return at, bend * at**2 + tilt * at + level, bend


def _compute_regret(
    runs: Mapping[tuple[int, int], float], block: _FitWindow, at: Floats, least: Floats, best: Floats, bend: Floats
) -> Floats:
    """Return the loss at rates `at` above the least: by the parabola in its window, else by measured neighbours."""
    means = _average_seeds(runs)
    known = np.array(list(means), float)
    inside = (at >= block.x[0]) & (at <= block.x[-1])
    measured = np.interp(at, known, np.array(list(means.values()))) - least
    measured = np.where((at < known[0]) | (at > known[-1]), math.nan, measured)
    return np.where(inside, np.maximum(bend, 0) * (at - best) ** 2, measured)


def _average_seeds(runs: Mapping[tuple[int, int], float]) -> dict[int, float]:
    """Average over seeds at each rate, ascending. A rate without all seeds is corrected by the offsets of its seeds."""
    seeds = sorted({seed for _, seed in runs})
    full = [j for j in {j for j, _ in runs} if all((j, s) in runs and math.isfinite(runs[j, s]) for s in seeds)]
    typical = float(np.mean([runs[j, s] for j in full for s in seeds])) if full else 0.0
    offset = {s: float(np.mean([runs[j, s] for j in full])) - typical if full else 0.0 for s in seeds}
    return {
        j: float(np.mean([runs[j, s] - offset[s] for s in seeds if (j, s) in runs]))
        for j in sorted({j for j, _ in runs})
    }


def _summarize_draws(draws: Floats | Sequence[float]) -> BootstrapInterval:
    """Return draw 0 with the central interval of the others."""
    values = np.asarray(draws, float)
    if not np.isfinite(values).all():
        return BootstrapInterval(float(values[0]), math.nan, math.nan)
    low, high = np.quantile(values[1:], [(1 - MASS) / 2, (1 + MASS) / 2])
    return BootstrapInterval(float(values[0]), float(low), float(high))
