"""Predict the loss curve of a run that has not begun, with a band, from the curves of smaller runs.

    ln loss(t) = ln L(N, t) + r(t; N, lr, batch) + noise

L is the law of annealed losses. The offset r, how far the constant-rate trunk lies above it, is measured along the
small runs: at each token count t of a grid, by a Gaussian regression of r on ln N, ln lr and ln batch (quadratic in the
last two), centred on the planned run, so that its intercept is the answer. Early on, t is far below any run that the
law was fitted to; r corrects that, since the same L is used for the small runs and the planned one. Beyond the longest
trunk, r stays and its variance grows.

The band is that of one new run: noise, regression and law. If sizes that were held out are missed by more than that, it
is widened. It is never narrowed: a factor below 1 helped on two recorded studies, but what it gained was lost at once
to the spread between seeds, 5 % early on, which no proxy had shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from scaling.common.arrays import Array
from scaling.curves.loss_curve import clean_curve

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

    from scaling.fitting.loss_law import Fit

# Step of the grid, in ln tokens: about the distance between the points of a trainer.
GRID_STEP = 0.5 * math.log(2)
# Sd of the weights of runs, in ln lr and ln batch: settings farther away say little about the planned run.
SETTING_REACH = math.log(6)
# Least weight of the runs that the regression is tested on.
MIN_TEST_WEIGHT = 0.3
# Runs and their total weight at a token count; with fewer, nothing is predicted there.
MIN_RUNS, MIN_WEIGHT = 4, 3.0
# Curves read from a store, those with the nearest settings, because each history is a query.
MAX_RUNS = 60
# Prior sd of the coefficients: level; per e-fold of N, lr and batch; squares and product. Assumed, and wide.
PRIOR_SD = np.array([1.0, 0.03, 0.3, 0.3, 0.1, 0.1, 0.1])
# Usual sd of one point in ln loss, and how many points this belief counts as.
USUAL_NOISE, PRIOR_POINTS = 0.01, 3.0
# How many held-out sizes the belief counts as that the variances are right.
PRIOR_SIZES = 2.0
# Sd of r per e-fold of tokens beyond the longest trunk. Assumed, not measured.
DRIFT_SD = 0.02


@dataclass(frozen=True)
class Trunk:
    """The points of one run at its constant rate, and the settings that its level depends on.

    Attributes:
        N: Parameters that multiply tokens.
        lr: Peak learning rate, at base width.
        batch_tokens: Tokens per optimizer step.
        tokens: Training tokens at each point, 1-d.
        loss: Loss at each point, nats per token, 1-d.
    """

    N: float
    lr: float
    batch_tokens: float
    tokens: Array
    loss: Array


@dataclass(frozen=True)
class LossBand:
    """The loss on the trunk of one planned run: best guess and interval at several token counts.

    Attributes:
        tokens: Training tokens, ascending.
        loss: The best guess at each of them, nats per token.
        low: The lower end of the interval, nats per token.
        high: The upper end of the interval, nats per token.
        mass: The probability that the interval holds, at one token count.
        runs: How many curves the band is based on.
        scale: The factor on the sd: above 1 if held-out sizes were missed by more than expected.
    """

    tokens: tuple[float, ...]
    loss: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mass: float
    runs: int
    scale: float

    def __post_init__(self) -> None:
        columns = (self.tokens, self.loss, self.low, self.high)
        if not self.tokens or any(len(column) != len(self.tokens) for column in columns):
            raise ValueError("a band needs as many losses, lows and highs as token counts, one at least")
        if any(b <= a for a, b in zip(self.tokens, self.tokens[1:], strict=False)) or not self.tokens[0] > 0:
            raise ValueError("a band needs positive token counts in ascending order")
        if any(not 0 < low <= loss <= high for _, loss, low, high in zip(*columns, strict=True)):
            raise ValueError("a band needs 0 < low <= loss <= high at every token count")

    def at(self, tokens: float) -> tuple[float, float, float] | None:
        """Return (low, loss, high) at a token count, interpolated linearly in logarithms, or None outside the band."""
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
) -> LossBand:
    """Predict the loss curve of a planned run on its constant-rate trunk.

    Args:
        trunks: The trunks of smaller runs, all under a schedule without a horizon.
        fit: The loss law, fitted to their annealed losses.
        N: Parameters of the planned run that multiply tokens.
        D: Training tokens of the planned run.
        lr: Its peak learning rate, at base width.
        batch_tokens: Its tokens per optimizer step.
        mass: The probability that the interval holds, at one token count.
        without: The loss law fitted without each size, from `fit_laws_without_each_size`, to test how far that size is
            missed.

    Returns:
        The band, up to D tokens.

    Raises:
        ValueError: If too few runs have points at the same tokens.
    """
    if not 0 < mass < 1:
        raise ValueError(f"mass must lie between 0 and 1, got {mass}")
    runs = [_TrunkTerms.from_trunk(trunk, fit, N, lr, batch_tokens) for trunk in trunks]
    grid = _build_grid(runs, D)
    if not grid.size:
        raise ValueError(
            f"a curve needs {MIN_RUNS} runs or more near lr {lr:.3g} and batch {batch_tokens:,.0f} with points at the "
            f"same tokens, got {len(runs)} with points: train more proxies near these settings"
        )
    mean, variance = _predict_offsets(runs, grid)
    last = grid[-1]
    ahead = np.arange(last + GRID_STEP, math.log(D) - 1e-9, GRID_STEP)
    ahead = np.append(ahead, math.log(D)) if math.log(D) > last else ahead
    x = np.concatenate([grid, ahead])
    mean = np.concatenate([mean, np.full(ahead.size, mean[-1])])
    variance = np.concatenate([variance, variance[-1] + (DRIFT_SD * (ahead - last)) ** 2])
    scale = _compute_sd_factor(trunks, without, grid, (N, lr, batch_tokens))
    middle = np.log(fit.predict(N, np.exp(x))) + mean
    half_width = NormalDist().inv_cdf(0.5 + mass / 2) * scale * np.sqrt(variance + _compute_law_sd(fit, N, x) ** 2)
    columns = (np.exp(x), np.exp(middle), np.exp(middle - half_width), np.exp(middle + half_width))
    tokens, loss, low, high = (tuple(float(v) for v in column) for column in columns)
    return LossBand(tokens, loss, low, high, mass, len(runs), scale)


def fit_laws_without_each_size(floors: pd.DataFrame) -> dict[float, Fit]:
    """Fit the loss law without each size in turn.

    Args:
        floors: N, D and loss of every (N, D) group, as in `HPFit.floors`.

    Returns:
        The law without each N; empty if fewer than two sizes would be left.
    """
    from scaling.fitting.loss_law import fit_loss_law

    sizes = sorted(floors["N"].unique())
    rest = {float(size): floors[floors["N"] != size] for size in sizes if len(sizes) > 2}
    return {size: fit_loss_law(*(f[c].to_numpy(float) for c in ("N", "D", "loss"))) for size, f in rest.items()}


def read_study_trunks(client: MlflowClient, runs: pd.DataFrame, *, lr: float, batch_tokens: float) -> list[Trunk]:
    """Return the trunks of the proxies of a study, those with the nearest settings first.

    Args:
        client: The MLflow client.
        runs: The study's checked run table. Diverged runs and targets are left out.
        lr: Peak learning rate of the planned run, at base width.
        batch_tokens: Tokens per optimizer step of the planned run.

    Returns:
        At most `MAX_RUNS` trunks.
    """
    from scaling.tracking.log import read_curve

    proxies = runs[(runs["role"] == "proxy") & ~runs["diverged"] & runs["lr"].gt(0) & runs["batch_tokens"].gt(0)]
    proxies = proxies.drop_duplicates("run_id")
    distance = np.log(proxies["lr"] / lr) ** 2 + np.log(proxies["batch_tokens"] / batch_tokens) ** 2
    trunks = []
    for row in proxies.loc[distance.sort_values(kind="stable").index[:MAX_RUNS]].itertuples():
        tokens, loss = read_curve(client, str(row.run_id))
        if any(math.isfinite(v) for v in loss):
            trunks.append(Trunk(row.N, row.lr, row.batch_tokens, *clean_curve(tokens, loss)))
    return trunks


@dataclass(frozen=True)
class _TrunkTerms:
    """One trunk in the terms of the regression.

    Attributes:
        size: Its N.
        weight: Its weight, from the distance of its settings.
        terms: What the coefficients are multiplied by, shape [7].
        x: ln tokens.
        r: ln loss - ln L.
    """

    size: float
    weight: float
    terms: Array
    x: Array
    r: Array

    @classmethod
    def from_trunk(cls, trunk: Trunk, fit: Fit, N: float, lr: float, batch_tokens: float) -> _TrunkTerms:
        """Return the terms of a trunk, relative to the planned run."""
        tokens, loss = clean_curve(trunk.tokens, trunk.loss)
        a, b = math.log(trunk.lr / lr), math.log(trunk.batch_tokens / batch_tokens)
        terms = np.array([1.0, math.log(trunk.N / N), a, b, a * a, a * b, b * b])
        weight = math.exp(-0.5 * (a * a + b * b) / SETTING_REACH**2)
        return cls(trunk.N, weight, terms, np.log(tokens), np.log(loss) - np.log(fit.predict(trunk.N, tokens)))

    def at(self, x: float) -> float | None:
        """Return r at this ln tokens, interpolated linearly; None outside of the points by more than about a batch."""
        if not self.x[0] - 0.05 <= x <= self.x[-1] + 0.05:
            return None
        return float(np.interp(x, self.x, self.r))


def _build_grid(runs: Sequence[_TrunkTerms], D: float) -> Array:
    """Return the ln tokens, ascending and at most ln D, at which enough runs have points."""
    if not runs:
        return np.empty(0)
    first, last = min(run.x[0] for run in runs), max(run.x[-1] for run in runs)
    grid = np.arange(first, min(last, math.log(D)) + 0.05, GRID_STEP)
    has_enough = []
    for x in grid:
        weights = [run.weight for run in runs if run.at(x) is not None]
        has_enough.append(len(weights) >= MIN_RUNS and sum(weights) >= MIN_WEIGHT)
    return np.asarray(grid[np.array(has_enough, bool)])


@dataclass(frozen=True)
class _LocalRegression:
    """The regression at one token count.

    Attributes:
        theta: Means of the coefficients, shape [7].
        covariance: Their covariance, shape [7, 7].
        noise: Variance of one point.
    """

    theta: Array
    covariance: Array
    noise: float

    def __call__(self, terms: Array) -> tuple[float, float]:
        """Return the mean and the variance of r for a run with these terms, including the noise of one point."""
        return float(terms @ self.theta), float(terms @ self.covariance @ terms) + self.noise


def _predict_offsets(runs: Sequence[_TrunkTerms], grid: Array) -> tuple[Array, Array]:
    """Return the mean and the variance of r of the planned run at each grid point."""
    mean, variance = zip(*(_regress(runs, float(x))(np.eye(len(PRIOR_SD))[0]) for x in grid), strict=True)
    return np.array(mean), np.array(variance)


def _regress(runs: Sequence[_TrunkTerms], x: float) -> _LocalRegression:
    """Regress r on the settings of the runs that have points at this ln tokens."""
    points = [(run, r) for run in runs if (r := run.at(x)) is not None]
    design = np.array([run.terms for run, _ in points])
    weight = np.array([run.weight for run, _ in points])
    values = np.array([r for _, r in points])
    square, pull, noise = (design.T * weight) @ design, design.T @ (weight * values), USUAL_NOISE**2
    # Estimate the noise and the coefficients in turns.
    for _ in range(8):
        covariance = np.linalg.inv(square / noise + np.diag(PRIOR_SD**-2.0))
        theta = covariance @ pull / noise
        used = float(np.sum(covariance * square)) / noise
        left = float(weight @ (values - design @ theta) ** 2)
        noise = (PRIOR_POINTS * USUAL_NOISE**2 + left) / (PRIOR_POINTS + max(float(weight.sum()) - used, 0.0))
    return _LocalRegression(theta, covariance, noise)


def _compute_law_sd(fit: Fit, N: float, x: Array) -> Array:
    """Return the sd of ln L at these ln tokens.

    Below the tokens that the law was fitted to, r replaces L, except for its dependence on N: there the sd is that at
    the fewest tokens.
    """
    low, high = fit.interval(N, np.maximum(np.exp(x), fit.ranges["D"][0]), 0.6827)
    return np.asarray(np.log(high / low) / 2)


def _compute_sd_factor(
    trunks: Sequence[Trunk], without: Mapping[float, Fit], grid: Array, settings: tuple[float, ...]
) -> float:
    """Return the factor on the sd, at least 1: the root of the mean z^2 with which sizes are missed by the others.

    Each size is one piece of evidence, since its points err together. PRIOR_SIZES more sizes are assumed to be missed
    as expected.
    """
    squares = []
    for size, fit in without.items():
        runs = [_TrunkTerms.from_trunk(trunk, fit, *settings) for trunk in trunks]
        others = [run for run in runs if run.size != size]
        tested = [run for run in runs if run.size == size and run.weight > MIN_TEST_WEIGHT]
        x = np.array([v for v in grid if sum(run.at(float(v)) is not None for run in others) >= MIN_RUNS])
        if not (tested and x.size):
            continue
        sds = _compute_law_sd(fit, size, x)
        regressions = [(float(v), _regress(others, float(v)), sd) for v, sd in zip(x, sds, strict=True)]
        z2 = []
        for run in tested:
            for v, predict, sd in regressions:
                if (r := run.at(v)) is not None:
                    mean, variance = predict(run.terms)
                    z2.append((r - mean) ** 2 / (variance + sd**2))
        if z2:
            squares.append(float(np.mean(z2)))
    return max(1.0, math.sqrt((PRIOR_SIZES + sum(squares)) / (PRIOR_SIZES + len(squares))))
