"""The loss curve of a run that has not begun, with a band, from the curves of smaller runs.

    ln loss(t) = ln L(N, t) + r(t; N, lr, batch) + noise

L is the law of annealed losses; r, how far the constant-rate trunk lies above it, is measured along the small runs: at each
of a grid of tokens t a Gaussian regression of r on ln N, ln lr and ln batch (quadratic in the last two), centred on the run to
come, so that its intercept is the answer. Early on t is far below any run that the law was fitted to; r makes good for that,
since the same L is taken of the small runs and of the large one. Beyond the longest trunk r stays, its variance grows.

The band is of one new run: noise, the regression, the law. Where sizes are missed by more than that by the curves and
the law of the others, it is widened; never narrowed: what a factor below 1 gained on two recorded studies was lost at once to the
spread of seeds, early 5 %, that no proxy had shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from scaling.common.arrays import Array
from scaling.curves.loss_curve import read_curve

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

    from scaling.fitting.loss_law import Fit

STEP = 0.5 * math.log(2)  # of the grid, in ln tokens: as far apart as a trainer's points
REACH = math.log(6)  # sd of the weights, in ln lr and ln batch: farther runs say little about this one
NEAR = 0.3  # weight of runs that the regression is tested on
LEAST_RUNS, LEAST_WEIGHT = 4, 3.0  # at a token count; below, nothing is predicted there
MOST_RUNS = 60  # curves read from a store, those of the nearest settings: a history is a query
# Prior sd of the coefficients: level; per e-fold of N, lr, batch; squares and product. Assumed, wide.
PRIOR = np.array([1.0, 0.03, 0.3, 0.3, 0.1, 0.1, 0.1])
NOISE, WORTH = 0.01, 3.0  # usual sd of one point in ln loss, and the points that this belief counts as
WORTH_SIZES = 2.0  # held-out sizes that the belief in the variances as they are counts as
DRIFT = 0.02  # sd of r per e-fold of tokens beyond the longest trunk. Assumed


@dataclass(frozen=True)
class Trunk:
    """Points of one run at its constant rate, and the settings that its level depends on."""

    N: float
    lr: float  # at base width
    batch_tokens: float
    tokens: Array
    loss: Array  # nats per token


@dataclass(frozen=True)
class Band:
    """Loss on the trunk of one run to come: best guess and interval at each of these token counts, ascending."""

    tokens: tuple[float, ...]
    loss: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mass: float  # of the interval, at one token count
    runs: int  # whose curves it rests on
    scale: float  # factor on the sd: above 1 where held-out sizes were missed by more than expected

    def __post_init__(self) -> None:
        columns = (self.tokens, self.loss, self.low, self.high)
        if not self.tokens or any(len(column) != len(self.tokens) for column in columns):
            raise ValueError("a band needs as many losses, lows and highs as token counts, one at least")
        if any(b <= a for a, b in zip(self.tokens, self.tokens[1:], strict=False)) or not self.tokens[0] > 0:
            raise ValueError("a band needs positive token counts in ascending order")
        if any(not 0 < low <= loss <= high for _, loss, low, high in zip(*columns, strict=True)):
            raise ValueError("a band needs 0 < low <= loss <= high at every token count")

    def at(self, tokens: float) -> tuple[float, float, float] | None:
        """(low, loss, high) after so many tokens, linear in logs between points; None outside of them."""
        if not self.tokens[0] * (1 - 1e-9) <= tokens <= self.tokens[-1] * (1 + 1e-9):
            return None
        x = np.log(self.tokens)
        low, loss, high = (
            float(np.exp(np.interp(math.log(tokens), x, np.log(y)))) for y in (self.low, self.loss, self.high)
        )
        return low, loss, high


def predict_trunk(
    trunks: Sequence[Trunk],
    fit: Fit,
    *,
    N: float,
    D: float,
    lr: float,
    batch_tokens: float,
    mass: float = 0.95,
    without: Mapping[float, Fit] = {},
) -> Band:
    """The curve to expect of a run of N parameters at this rate and batch, up to D tokens.

    trunks: of the smaller runs, all of one schedule without a horizon. fit: the loss law of their annealed losses. without: that law
    fitted without each size, for how far it is missed then.
    ValueError when too few runs have points at the same tokens.
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass must lie between 0 and 1, got {mass}")
    runs = [_PlannedRun.of(trunk, fit, N, lr, batch_tokens) for trunk in trunks]
    grid = _grid(runs, D)
    if not grid.size:
        raise ValueError(
            f"a curve needs {LEAST_RUNS} runs or more near lr {lr:.3g} and batch {batch_tokens:,.0f} with points at the same "
            f"tokens, got {len(runs)} with points: train more proxies near these settings"
        )
    mean, variance = _answers(runs, grid)
    last = grid[-1]
    ahead = np.arange(last + STEP, math.log(D) - 1e-9, STEP)
    ahead = np.append(ahead, math.log(D)) if math.log(D) > last else ahead
    x = np.concatenate([grid, ahead])
    mean = np.concatenate([mean, np.full(ahead.size, mean[-1])])
    variance = np.concatenate([variance, variance[-1] + (DRIFT * (ahead - last)) ** 2])
    scale = _scale(trunks, without, grid, (N, lr, batch_tokens))
    middle = np.log(fit.predict(N, np.exp(x))) + mean
    half = NormalDist().inv_cdf(0.5 + mass / 2) * scale * np.sqrt(variance + _law_sd(fit, N, x) ** 2)
    columns = (np.exp(x), np.exp(middle), np.exp(middle - half), np.exp(middle + half))
    tokens, loss, below, above = (tuple(float(v) for v in column) for column in columns)
    return Band(tokens, loss, below, above, mass, len(runs), scale)


def laws_without(floors: pd.DataFrame) -> dict[float, Fit]:
    """The loss law without each size, of those whose leaving leaves two. floors: N, D, loss of every group (`HPFit.floors`)."""
    from scaling.fitting.loss_law import fit_loss_law

    sizes = sorted(floors["N"].unique())
    left = {float(size): floors[floors["N"] != size] for size in sizes if len(sizes) > 2}
    return {size: fit_loss_law(*(f[c].to_numpy(float) for c in ("N", "D", "loss"))) for size, f in left.items()}


def study_trunks(client: MlflowClient, runs: pd.DataFrame, *, lr: float, batch_tokens: float) -> list[Trunk]:
    """The trunks of a study's proxies, those of the settings nearest to these first; diverged ones and targets left out."""
    from scaling.tracking import log

    mine = runs[(runs["role"] == "proxy") & ~runs["diverged"] & runs["lr"].gt(0) & runs["batch_tokens"].gt(0)]
    mine = mine.drop_duplicates("run_id")
    far = np.log(mine["lr"] / lr) ** 2 + np.log(mine["batch_tokens"] / batch_tokens) ** 2
    found = []
    for row in mine.loc[far.sort_values(kind="stable").index[:MOST_RUNS]].itertuples():
        tokens, loss = log.read_curve(client, str(row.run_id))
        if any(math.isfinite(v) for v in loss):
            found.append(Trunk(row.N, row.lr, row.batch_tokens, *read_curve(tokens, loss)))
    return found


@dataclass(frozen=True)
class _PlannedRun:
    """One trunk in the terms of the regression."""

    size: float
    weight: float
    terms: Array  # of the coefficients, [7]
    x: Array  # ln tokens
    r: Array  # ln loss - ln L

    @classmethod
    def of(cls, trunk: Trunk, fit: Fit, N: float, lr: float, batch_tokens: float) -> _PlannedRun:
        tokens, loss = read_curve(trunk.tokens, trunk.loss)
        a, b = math.log(trunk.lr / lr), math.log(trunk.batch_tokens / batch_tokens)
        terms = np.array([1.0, math.log(trunk.N / N), a, b, a * a, a * b, b * b])
        weight = math.exp(-0.5 * (a * a + b * b) / REACH**2)
        return cls(trunk.N, weight, terms, np.log(tokens), np.log(loss) - np.log(fit.predict(trunk.N, tokens)))

    def at(self, x: float) -> float | None:
        """r there, linear between points; None outside of them, but for a batch more or less."""
        if not self.x[0] - 0.05 <= x <= self.x[-1] + 0.05:
            return None
        return float(np.interp(x, self.x, self.r))


def _grid(runs: Sequence[_PlannedRun], D: float) -> Array:
    """ln tokens, ascending, at which enough runs have points, D at most."""
    if not runs:
        return np.empty(0)
    first, last = min(run.x[0] for run in runs), max(run.x[-1] for run in runs)
    grid = np.arange(first, min(last, math.log(D)) + 0.05, STEP)
    enough = []
    for x in grid:
        there = [run.weight for run in runs if run.at(x) is not None]
        enough.append(len(there) >= LEAST_RUNS and sum(there) >= LEAST_WEIGHT)
    return np.asarray(grid[np.array(enough, bool)])


@dataclass(frozen=True)
class _Local:
    """The regression at one token count."""

    theta: Array  # [7]
    covariance: Array
    noise: float  # variance of one point

    def __call__(self, terms: Array) -> tuple[float, float]:
        """Mean and variance, with one point's noise, of r for a run of these terms."""
        return float(terms @ self.theta), float(terms @ self.covariance @ terms) + self.noise


def _answers(runs: Sequence[_PlannedRun], grid: Array) -> tuple[Array, Array]:
    """Mean and variance of r of the run to come at each grid point."""
    mean, variance = zip(*(_regress(runs, float(x))(np.eye(len(PRIOR))[0]) for x in grid), strict=True)
    return np.array(mean), np.array(variance)


def _regress(runs: Sequence[_PlannedRun], x: float) -> _Local:
    there = [(run, r) for run in runs if (r := run.at(x)) is not None]
    design = np.array([run.terms for run, _ in there])
    weight = np.array([run.weight for run, _ in there])
    values = np.array([r for _, r in there])
    square, pull, noise = (design.T * weight) @ design, design.T @ (weight * values), NOISE**2
    for _ in range(8):  # the noise and the coefficients by turns
        covariance = np.linalg.inv(square / noise + np.diag(PRIOR**-2.0))
        theta = covariance @ pull / noise
        used = float(np.sum(covariance * square)) / noise
        left = float(weight @ (values - design @ theta) ** 2)
        noise = (WORTH * NOISE**2 + left) / (WORTH + max(float(weight.sum()) - used, 0.0))
    return _Local(theta, covariance, noise)


def _law_sd(fit: Fit, N: float, x: Array) -> Array:
    """Of ln L. It counts where the law was fitted; below that r has taken its place, but for how it goes with N."""
    low, high = fit.interval(N, np.maximum(np.exp(x), fit.ranges["D"][0]), 0.6827)
    return np.asarray(np.log(high / low) / 2)


def _scale(trunks: Sequence[Trunk], without: Mapping[float, Fit], grid: Array, settings: tuple[float, ...]) -> float:
    """Factor on the sd, 1 at least, from how sizes are missed by the curves and the law of the others: the root of their mean z^2, each size
    one piece of evidence, since its points err together, beside WORTH_SIZES that were missed as expected."""
    squares = []
    for size, fit in without.items():
        runs = [_PlannedRun.of(trunk, fit, *settings) for trunk in trunks]
        others = [run for run in runs if run.size != size]
        tested = [run for run in runs if run.size == size and run.weight > NEAR]
        x = np.array([v for v in grid if sum(run.at(float(v)) is not None for run in others) >= LEAST_RUNS])
        if not (tested and x.size):
            continue
        known = [(float(v), _regress(others, float(v)), sd) for v, sd in zip(x, _law_sd(fit, size, x), strict=True)]
        z2 = []
        for run in tested:
            for v, local, sd in known:
                if (r := run.at(v)) is not None:
                    mean, variance = local(run.terms)
                    z2.append((r - mean) ** 2 / (variance + sd**2))
        if z2:
            squares.append(float(np.mean(z2)))
    return max(1.0, math.sqrt((WORTH_SIZES + sum(squares)) / (WORTH_SIZES + len(squares))))
