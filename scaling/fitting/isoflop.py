"""Compute-optimal N and D from isoFLOP profiles: approach 2 of Hoffmann et al. (arXiv 2203.15556).

A parabola in ln N is fitted to the runs of each compute budget, then N_opt and D_opt as power laws of compute. The
result types are shared with approaches 1 and 3 in `scaling.fitting.envelope`, so that all three can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit

from scaling.common.arrays import Array
from scaling.fitting.loss_law import FitError, check_rows
from scaling.laws.formulas import PowerLaw

# The least number of distinct N in a group: a parabola has three coefficients.
MIN_SIZES = 4
# Runs whose ln C differ by less than this belong to one group.
GROUP_GAP = 0.05
# A group whose ln C spread more than this is not an isoFLOP group.
MAX_SPREAD = 0.25
# Runs whose fitted ln L lies this far above the minimum get a quarter of the weight. With 0.05 and more the minimum
# moves by 5 to 8 % of N on asymmetric planted laws (2 to 3 % with this value), while the exponent spreads a third less.
WINDOW = 0.02


@dataclass(frozen=True)
class ComputeOptimum:
    """The best N and D at one compute budget.

    Attributes:
        C: Compute, in FLOPs.
        N: Parameters.
        D: Tokens.
        loss: Fitted loss at the optimum, in nats per token.
        sd: Standard deviation of ln N; NaN for the envelope, whose points have none.
        runs: Number of runs behind it.
        status: "ok", or why the power law excludes it.
    """

    C: float
    N: float
    D: float
    loss: float
    sd: float
    runs: int
    status: str


@dataclass(frozen=True)
class Trend:
    """A power law of compute with its uncertainty.

    Attributes:
        law: The power law.
        centre: The ln C at which `covariance` applies.
        covariance: Shape (2, 2), of (ln y at the centre, exponent).
        freedom: Degrees of freedom of the t distribution of the intervals.
    """

    law: PowerLaw
    centre: float
    covariance: Array
    freedom: float

    def exponent_interval(self, mass: float = 0.8) -> tuple[float, float]:
        """Return the interval (low, high) that contains the exponent with probability `mass`."""
        reach = float(stdtrit(self.freedom, 0.5 + mass / 2) * np.sqrt(self.covariance[1, 1]))
        return self.law.exponent - reach, self.law.exponent + reach

    def interval(self, C: ArrayLike, mass: float = 0.8) -> tuple[Array, Array]:
        """Return the interval (low, high) of the optimum at C FLOPs, each with the shape of C."""
        away = np.log(np.asarray(C, float)) - self.centre
        v = self.covariance[0, 0] + 2 * away * self.covariance[0, 1] + away**2 * self.covariance[1, 1]
        reach = np.exp(stdtrit(self.freedom, 0.5 + mass / 2) * np.sqrt(v))
        return np.asarray(self.law(C) / reach), np.asarray(self.law(C) * reach)


@dataclass(frozen=True)
class Frontier:
    """N_opt(C) and D_opt(C) from one of the three approaches.

    Attributes:
        approach: "envelope", "isoflop" or "law".
        N: The trend of the optimal number of parameters.
        D: The trend of the optimal number of tokens.
        points: The optima behind the trends; empty for the law.
        range: The least and the largest compute that is covered, in FLOPs.
        status: "ok", or the doubts, in sentences.
    """

    approach: str
    N: Trend
    D: Trend
    points: tuple[ComputeOptimum, ...]
    range: tuple[float, float]
    status: str


def fit_isoflop(
    N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, C: ArrayLike | None = None, budgets: ArrayLike | None = None
) -> Frontier:
    """Fit compute-optimal N and D by approach 2 of Hoffmann et al. (arXiv 2203.15556).

    In each group of equal compute, the minimum of a parabola of ln L in ln N; then power laws through the minima, each
    weighted by its own variance plus a common scatter.

    Args:
        N: Parameters of each run, shape (m,).
        D: Tokens of each run, shape (m,).
        loss: Final loss of each run, in nats per token, shape (m,).
        C: Compute of each run in FLOPs, shape (m,). Default: 6 N D.
        budgets: Nominal compute budgets in FLOPs; runs within 20 % join the nearest one. Without them, runs whose
            compute differs by less than 5 % form a group.

    Returns:
        The trends of N_opt and D_opt with their points.

    Raises:
        FitError: If fewer than two groups have a usable minimum.
        ValueError: If a row is not usable.

    Example:
        >>> frontier = fit_isoflop(runs["N"], runs["D"], runs["loss"], C=runs["C"])
        >>> frontier.N.law(1e24), frontier.N.exponent_interval(0.8)
    """
    n, d, y, c = take_logs(N, D, loss, C)
    groups = _group_runs(c, budgets)
    slope = 0.0
    # The computes of a group differ a little, so its runs are moved to the mean along the trend of the minima.
    for _ in range(3):
        points = _find_minima(n, d, y, c, groups, slope)
        good = [p for p in points if p.status == "ok"]
        if len(good) >= 2:
            slope = float(np.polyfit(np.log([p.C for p in good]), np.log([p.loss for p in good]), 1)[0])
    if len(good) < 2:
        why = "; ".join(f"C = {p.C:.2g}: {p.status}" for p in points) or f"{len(groups)} groups of compute"
        raise FitError(
            f"approach 2 needs 2 or more groups of compute with a minimum inside, got {len(good)} ({why}): "
            "train sizes on both sides of the optimum at each compute, or name the budgets (--budgets 1e18,3e18)"
        )
    log_c = np.log([p.C for p in good])
    variance = np.array([p.sd**2 for p in good])
    doubts = []
    if len(good) < 3:
        doubts.append("Two groups: the power laws pass through both, so their intervals are guesses.")
    left = len(points) - len(good)
    if left:
        doubts.append(f"{left} of {len(points)} groups have no usable minimum: {_list_reasons(points)}.")
    size, tokens = (_fit_trend(log_c, np.log(v), variance) for v in ([p.N for p in good], [p.D for p in good]))
    return Frontier("isoflop", size, tokens, tuple(points), find_range(log_c), " ".join(doubts) or "ok")


def take_logs(N: ArrayLike, D: ArrayLike, loss: ArrayLike, C: ArrayLike | None) -> tuple[Array, Array, Array, Array]:
    """Return ln N, ln D, ln L and ln C of runs, each (m,). ValueError for unusable rows; C defaults to 6 N D."""
    size, tokens, losses = (np.asarray(v, float) for v in (N, D, loss))
    check_rows(size, tokens, losses, 1.0, 0)
    compute = 6 * size * tokens if C is None else np.asarray(C, float)
    if compute.shape != losses.shape or not np.all(np.isfinite(compute) & (compute > 0)):
        raise ValueError(
            f"C needs one positive number of FLOPs per run, got shape {compute.shape} for {losses.size} runs"
        )
    return np.log(size), np.log(tokens), np.log(losses), np.log(compute)


def _group_runs(c: Array, budgets: ArrayLike | None) -> list[NDArray[np.intp]]:
    """Return the rows of each group of equal compute."""
    if budgets is not None:
        nominal = np.log(np.sort(np.asarray(budgets, float).ravel()))
        nearest = np.argmin(np.abs(c[:, None] - nominal), 1)
        near = np.abs(c - nominal[nearest]) < np.log(1.2)
        return [np.flatnonzero(near & (nearest == g)) for g in range(nominal.size)]
    order = np.argsort(c, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(c[order]) > GROUP_GAP) + 1)
    return [g for g in parts if g.size >= MIN_SIZES and np.ptp(c[g]) <= MAX_SPREAD]


def _find_minima(
    n: Array, d: Array, y: Array, c: Array, groups: list[NDArray[np.intp]], slope: float
) -> list[ComputeOptimum]:
    """Fit a parabola to each group. The noise is pooled over groups, because most have few runs."""
    fits, squares, freedom = [], 0.0, 0.0
    for rows in groups:
        if np.unique(np.round(n[rows], 2)).size < MIN_SIZES:
            continue
        middle = float(c[rows].mean())
        coefficients, inverse, pool = _fit_parabola(n[rows] - n[rows].mean(), y[rows] - slope * (c[rows] - middle))
        squares, freedom = squares + pool[0], freedom + pool[1]
        fits.append((rows, middle, coefficients, inverse))
    noise = squares / max(freedom, 1.0)
    points = []
    for rows, middle, (level, b, a), inverse in fits:
        x = n[rows] - n[rows].mean()
        best = -b / (2 * a) if a > 0 else np.nan
        # The derivative of the minimum's position by the coefficients.
        derivative = np.array([0.0, -1.0, -2 * best]) / (2 * a)
        sd = float(np.sqrt(noise * derivative @ inverse @ derivative))
        status = "ok"
        if not a > 0:
            status = "no minimum"
        elif not x.min() < best < x.max():
            status = "the minimum is outside the sizes"
        elif sd > 1:
            status = "the minimum is too flat to place"
        tokens = np.polyfit(x, d[rows] + n[rows] - c[rows], 1) if np.ptp(x) > 0 else np.array([0.0, 0.0])
        size = best + float(n[rows].mean())
        points.append(
            ComputeOptimum(
                C=float(np.exp(middle)),
                N=float(np.exp(size)),
                D=float(np.exp(middle - size + np.polyval(tokens, best))),
                loss=float(np.exp(level + b * best + a * best**2)),
                sd=sd,
                runs=len(rows),
                status=status,
            )
        )
    return points


def _fit_parabola(x: Array, y: Array) -> tuple[Array, Array, tuple[float, float]]:
    """Fit a parabola to the part of a curve near its minimum.

    Weights fall with the fitted height above the minimum, since no curve is a parabola far from it.

    Returns:
        Coefficients of (1, x, x²); their covariance divided by the noise variance; (weighted squares, degrees of
        freedom).
    """
    design = np.stack([np.ones_like(x), x, x * x], 1)
    height = y - y.min()
    for _ in range(8):
        weight = 1 / (1 + (height / WINDOW) ** 2) ** 2
        precision = (design.T * weight) @ design + 1e-9 * np.eye(3)
        coefficients = np.linalg.solve(precision, design.T @ (weight * y))
        if coefficients[2] <= 0:
            break
        fitted = design @ coefficients
        least = coefficients[0] - coefficients[1] ** 2 / (4 * coefficients[2])
        height = np.maximum(fitted - max(least, float(fitted.min()) - WINDOW), 0.0)
    inverse = np.linalg.inv(precision)
    sandwich = inverse @ ((design.T * weight**2) @ design) @ inverse
    residual = y - design @ coefficients
    return coefficients, sandwich, (float(np.sum(weight * residual**2)), max(float(weight.sum()) - 3.0, 0.0))


def _fit_trend(c: Array, y: Array, variance: Array) -> Trend:
    """Fit a weighted line in logs, with scatter beyond the points' own variance by Paule and Mandel's equation."""
    middle, freedom = float(c.mean()), len(c) - 2
    design = np.stack([np.ones_like(c), c - middle], 1)

    def fit_line(scatter: float) -> tuple[Array, Array, float]:
        weight = 1 / (variance + scatter)
        inverse = np.linalg.inv((design.T * weight) @ design)
        line = np.asarray(inverse @ (design.T @ (weight * y)))
        return line, np.asarray(inverse), float(np.sum(weight * (y - design @ line) ** 2))

    scatter = 0.0
    if freedom > 0 and fit_line(0.0)[2] > freedom:
        top = float(np.sum((y - y.mean()) ** 2)) + 1e-12
        scatter = float(brentq(lambda s: fit_line(s)[2] - freedom, 0.0, top))
    line, inverse, _ = fit_line(scatter)
    law = PowerLaw(float(np.exp(line[0] - line[1] * middle)), float(line[1]))
    return Trend(law, middle, inverse, float(max(freedom, 1)))


def find_range(c: Array) -> tuple[float, float]:
    """Return the least and the largest compute, in FLOPs, of values of ln C."""
    return float(np.exp(c.min())), float(np.exp(c.max()))


def _list_reasons(points: Sequence[ComputeOptimum]) -> str:
    return ", ".join(sorted({p.status for p in points if p.status != "ok"}))
