"""Where the best learning rate lies at each size, and whether it stays: the analysis of a transfer test, pure.

A rate is the integer j of lr0 * 2^(j/2): half octaves of the grid. docs/math.md §10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 5  # rates that the parabola goes through
COARSE = 4  # half octaves between the first rates: a factor of 4
FURTHER = 8  # the penalty is extrapolated to this many times the largest size
DRAWS = 2000
MASS = 0.95  # of every interval
# What a parametrization that transfers must show (docs/math.md §10).
MAX_SHIFT, MAX_REGRET, MAX_GAMMA = 0.5, 0.003, 0.1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BootstrapInterval:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class LossParabola:
    """Loss against log2 lr at one size: a parabola through the best five rates."""

    size: int  # width or depth
    best: BootstrapInterval  # log2 of the best lr, as the configuration stores it (at base size)
    loss: float  # there, nats per token, mean over seeds
    curvature: float  # loss - least = curvature * octaves²
    noise: float  # standard deviation of one run about bowl and seed, nats; shared by all sizes
    rates: tuple[float, ...]  # log2 lr of every rate tried, ascending
    losses: tuple[float, ...]  # mean over the seeds it was tried with
    window: tuple[float, float]  # log2 lr of the first and the last of the five


@dataclass(frozen=True)
class TransferArm:
    """One parametrization over all sizes."""

    name: str
    bowls: tuple[LossParabola, ...]  # by size
    gamma: BootstrapInterval  # lr*(size) = lr_inf * size^-gamma
    shift: BootstrapInterval  # octaves from the smallest size's best rate to the largest's
    regret: BootstrapInterval  # nats that the largest loses with the smallest's best rate; inf: it diverges there
    penalty: BootstrapInterval  # nats lost FURTHER times beyond the largest size, by gamma and the largest's curvature

    @property
    def relative_regret(self) -> float:
        """Regret as a share of the largest's loss."""
        return self.regret.value / self.bowls[-1].loss

    @property
    def misses(self) -> tuple[str, ...]:
        """Which of the three goals are not met."""
        met = {
            f"|shift| <= {MAX_SHIFT:g} octaves": abs(self.shift.value) <= MAX_SHIFT,
            f"regret <= {MAX_REGRET:.1%}": self.relative_regret <= MAX_REGRET,
            f"|gamma| <= {MAX_GAMMA:g}": abs(self.gamma.value) <= MAX_GAMMA,
        }
        return tuple(goal for goal, yes in met.items() if not yes)


def choose_next_rates(losses: Mapping[int, float], start: int = 0, coarse: int = COARSE) -> list[int]:
    """Which rates to try next, given the loss at those tried (inf: diverged); none once the best five are known.

    From three rates `coarse` half octaves apart: outwards while the best is at an end, then inwards to the half
    octaves around it, then on at the lower end of the best five until what lies beyond both ends is worse. Assumes one
    minimum.
    """
    if not losses:
        return [start - coarse, start, start + coarse]
    tried = sorted(losses)
    best = min(tried, key=lambda j: losses[j])
    at = tried.index(best)
    if not math.isfinite(losses[best]):
        return [tried[0] - COARSE]
    if at == 0:
        return [best - (tried[1] - best if len(tried) > 1 else 1)]
    if at == len(tried) - 1:
        return [best + best - tried[-2]]
    for reach in (2, 1):
        missing = [j for j in (best - reach, best + reach) if j not in losses]
        if missing and (reach == 1 or any(abs(best - j) > reach for j in (tried[at - 1], tried[at + 1]))):
            return missing
    if missing := [j for j in (best - 2, best + 2) if j not in losses]:
        return missing
    first, last = find_best_window(losses)
    beyond = first - 1 if losses[first] < losses[last] else last + 1
    return [] if beyond in losses else [beyond]


def find_best_window(losses: Mapping[int, float]) -> tuple[int, int]:
    """First and last of the five neighbouring rates around the best, grown from it towards the lower side."""
    first = last = min(losses, key=lambda j: losses[j])
    while last - first < WINDOW - 1:
        below, above = losses.get(first - 1, math.inf), losses.get(last + 1, math.inf)
        if math.isinf(below) and math.isinf(above):
            break
        first, last = (first - 1, last) if below <= above else (first, last + 1)
    return first, last


def fit_arm(name: str, losses: Mapping[int, Mapping[tuple[int, int], float]], log2_lr0: float, *, seed: int = 0) -> TransferArm:
    """Bowls and what follows from them.

    losses: per size, (rate, seed of the run) -> final loss, nats; inf where it diverged. Every rate of a size's best
    five must have been run with the same seeds. Intervals hold 95 %: noise of one run, pooled over sizes from what
    seeds and parabolas leave, is drawn anew (with the uncertainty of its own size) and all is fitted again.

    Raises ValueError where there is no bowl: fewer than four rates with a finite loss, or no minimum inside them.
    """
    sizes = sorted(losses)
    if len(sizes) < 2:
        raise ValueError(f"needed at least two sizes to compare, got {sizes}: add sizes")
    blocks = [_block(losses[size], size) for size in sizes]
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
        # A draw whose parabola opens downwards, or whose vertex leaves the window, has its minimum at an end.
        at, height, bend = _vertices(block.x, np.vstack([block.means, block.means + error]))
        if not bend[0] > 0 or not block.x[0] < at[0] < block.x[-1]:
            raise ValueError(
                f"needed a minimum of the loss inside the rates tried, got none at size {block.size}: "
                "noise hides it; add seeds or tokens (runs that were kept are not run again)"
            )
        vertices.append(at)
        bottoms.append(height)
        bends.append(bend)
    log2_lr = log2_lr0 + np.array(vertices) / 2  # size, draw; draw 0 is the fit itself
    curvature = 4 * np.array(bends)  # per octave²
    weight = 1 / np.maximum(log2_lr[:, 1:].std(axis=1), 1e-3)
    gamma = -np.polyfit(np.log2(sizes), log2_lr, 1, w=weight)[0]
    regret = _regret(losses[sizes[-1]], blocks[-1], np.array(vertices[0]), bottoms[-1], vertices[-1], bends[-1])
    bowls = []
    for i, (size, block) in enumerate(zip(sizes, blocks, strict=True)):
        means = _means(losses[size])
        bowls.append(
            LossParabola(
                size=size,
                best=_interval(log2_lr[i]),
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
        gamma=_interval(gamma),
        shift=_interval(log2_lr[-1] - log2_lr[0]),
        regret=_interval(regret),
        penalty=_interval(np.maximum(curvature[-1], 0) * (gamma * octaves) ** 2),
    )


@dataclass(frozen=True)
class _FitWindow:
    """The best five rates of one size, with all their seeds."""

    size: int
    x: Floats  # rates, ascending
    means: Floats
    residuals: Floats  # rate, seed
    seeds: int
    freedom: int


def _block(runs: Mapping[tuple[int, int], float], size: int) -> _FitWindow:
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


def _vertices(x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """Place, height and bend of the least point, within x, of the parabola through each row of y [draw, rate]."""
    bend, tilt, level = np.polyfit(x, y.T, 2)
    at = np.clip(-tilt / np.where(bend > 0, 2 * bend, math.nan), x[0], x[-1])
    low, high = (bend * end**2 + tilt * end for end in (x[0], x[-1]))
    at = np.where(bend > 0, at, np.where(low <= high, x[0], x[-1]))
    return at, bend * at**2 + tilt * at + level, bend


def _regret(
    runs: Mapping[tuple[int, int], float], block: _FitWindow, at: Floats, least: Floats, best: Floats, bend: Floats
) -> Floats:
    """Loss at rates `at` above the least: by the parabola inside its window, else by what was measured around them."""
    means = _means(runs)
    known = np.array(list(means), float)
    inside = (at >= block.x[0]) & (at <= block.x[-1])
    measured = np.interp(at, known, np.array(list(means.values()))) - least
    measured = np.where((at < known[0]) | (at > known[-1]), math.nan, measured)
    return np.where(inside, np.maximum(bend, 0) * (at - best) ** 2, measured)


def _means(runs: Mapping[tuple[int, int], float]) -> dict[int, float]:
    """Mean over seeds at each rate, ascending; a rate without all seeds is moved by what its seeds are off."""
    seeds = sorted({seed for _, seed in runs})
    full = [j for j in {j for j, _ in runs} if all((j, s) in runs and math.isfinite(runs[j, s]) for s in seeds)]
    typical = float(np.mean([runs[j, s] for j in full for s in seeds])) if full else 0.0
    offset = {s: float(np.mean([runs[j, s] for j in full])) - typical if full else 0.0 for s in seeds}
    return {
        j: float(np.mean([runs[j, s] - offset[s] for s in seeds if (j, s) in runs]))
        for j in sorted({j for j, _ in runs})
    }


def _interval(draws: Floats | Sequence[float]) -> BootstrapInterval:
    """Draw 0 with the middle of the others."""
    values = np.asarray(draws, float)
    if not np.isfinite(values).all():
        return BootstrapInterval(float(values[0]), math.nan, math.nan)
    low, high = np.quantile(values[1:], [(1 - MASS) / 2, (1 + MASS) / 2])
    return BootstrapInterval(float(values[0]), float(low), float(high))
