"""Compute-optimal N and D without a loss law, approach 2 of Hoffmann et al. (arXiv 2203.15556): a parabola in ln N through
the runs of each compute, then N_opt and D_opt as power laws of compute; and the terms in which `scaling.fitting.envelope` gives
approaches 1 and 3, so that a reader can compare the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import t as student

from scaling.common.arrays import Array
from scaling.fitting.loss_law import FitError, check_rows
from scaling.laws.formulas import PowerLaw

LEAST_RUNS = 4  # distinct N in a group: a parabola has three coefficients
GAP = 0.05  # in ln C: runs nearer than this are of one group
WIDEST = 0.25  # in ln C: a group spread wider than this is no isoFLOP group
WINDOW = 0.02  # runs whose fitted ln L lies this much above the minimum count a quarter; .05 and more shift the minimum
# by 5 to 8 % of N on lopsided planted laws (2 to 3 % here), at a third less spread of the exponent


@dataclass(frozen=True)
class Optimum:
    """The best N and D at one compute."""

    C: float
    N: float
    D: float
    loss: float
    sd: float  # of ln N; NaN by the envelope, where single points have none
    runs: int
    status: str  # "ok", or why the power law leaves it out


@dataclass(frozen=True)
class Trend:
    """A power law of compute and how sure it is."""

    law: PowerLaw
    centre: float  # ln C about which `covariance` is
    covariance: Array  # (2, 2) of (ln y at the centre, exponent)
    freedom: float  # degrees of freedom of the t distribution

    def exponent_interval(self, mass: float = 0.8) -> tuple[float, float]:
        """(low, high) that hold the exponent with probability `mass`."""
        reach = float(student.ppf(0.5 + mass / 2, self.freedom) * np.sqrt(self.covariance[1, 1]))
        return self.law.exponent - reach, self.law.exponent + reach

    def interval(self, C: ArrayLike, mass: float = 0.8) -> tuple[Array, Array]:
        """(low, high) of the optimum at C FLOPs; shape of C."""
        away = np.log(np.asarray(C, float)) - self.centre
        v = self.covariance[0, 0] + 2 * away * self.covariance[0, 1] + away**2 * self.covariance[1, 1]
        reach = np.exp(student.ppf(0.5 + mass / 2, self.freedom) * np.sqrt(v))
        return np.asarray(self.law(C) / reach), np.asarray(self.law(C) * reach)


@dataclass(frozen=True)
class Frontier:
    """N_opt(C) and D_opt(C) by one approach."""

    approach: str  # "envelope", "isoflop" or "law"
    N: Trend
    D: Trend
    points: tuple[Optimum, ...]  # none by the law
    range: tuple[float, float]  # of C, FLOPs
    status: str  # "ok", or what is doubtful, in sentences


def fit_isoflop(
    N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, C: ArrayLike | None = None, budgets: ArrayLike | None = None
) -> Frontier:
    """Approach 2: per group of equal compute the minimum of a parabola of ln L in ln N, then power laws through the
    minima, each weighted by its own variance and a common scatter.

    1-d arrays, one run each; C in FLOPs, 6 N D when not given. budgets: nominal FLOPs; runs within 20 % join the
    nearest. Without, runs nearer than 5 % to each other make a group. FitError below two usable groups.
    """
    n, d, y, c = logs(N, D, loss, C)
    groups = _groups(c, budgets)
    slope = 0.0
    for _ in range(3):  # a group's computes differ a little: runs are moved to its mean along the trend of the minima
        points = _minima(n, d, y, c, groups, slope)
        good = [p for p in points if p.status == "ok"]
        if len(good) >= 2:
            slope = float(np.polyfit(np.log([p.C for p in good]), np.log([p.loss for p in good]), 1)[0])
    if len(good) < 2:
        why = "; ".join(f"C = {p.C:.2g}: {p.status}" for p in points) or f"{len(groups)} groups of compute"
        raise FitError(
            f"approach 2 needs 2 or more groups of compute with a minimum inside, got {len(good)} ({why}): "
            "train sizes on both sides of the optimum at each compute, or give budgets"
        )
    at = np.log([p.C for p in good])
    variance = np.array([p.sd**2 for p in good])
    doubts = []
    if len(good) < 3:
        doubts.append("Two groups: the power laws pass through both, so their intervals are guesses.")
    left = len(points) - len(good)
    if left:
        doubts.append(f"{left} of {len(points)} groups have no usable minimum: {_reasons(points)}.")
    size, tokens = (_trend(at, np.log(v), variance) for v in ([p.N for p in good], [p.D for p in good]))
    return Frontier("isoflop", size, tokens, tuple(points), span(at), " ".join(doubts) or "ok")


def logs(N: ArrayLike, D: ArrayLike, loss: ArrayLike, C: ArrayLike | None) -> tuple[Array, Array, Array, Array]:
    size, tokens, losses = (np.asarray(v, float) for v in (N, D, loss))
    check_rows(size, tokens, losses, 1.0, 0)
    compute = 6 * size * tokens if C is None else np.asarray(C, float)
    if compute.shape != losses.shape or not np.all(np.isfinite(compute) & (compute > 0)):
        raise ValueError(
            f"C needs one positive number of FLOPs per run, got shape {compute.shape} for {losses.size} runs"
        )
    return np.log(size), np.log(tokens), np.log(losses), np.log(compute)


def _groups(c: Array, budgets: ArrayLike | None) -> list[NDArray[np.intp]]:
    if budgets is not None:
        nominal = np.log(np.sort(np.asarray(budgets, float).ravel()))
        nearest = np.argmin(np.abs(c[:, None] - nominal), 1)
        near = np.abs(c - nominal[nearest]) < np.log(1.2)
        return [np.flatnonzero(near & (nearest == g)) for g in range(nominal.size)]
    order = np.argsort(c, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(c[order]) > GAP) + 1)
    return [g for g in parts if g.size >= LEAST_RUNS and np.ptp(c[g]) <= WIDEST]


def _minima(n: Array, d: Array, y: Array, c: Array, groups: list[NDArray[np.intp]], slope: float) -> list[Optimum]:
    """A parabola per group; the noise is pooled over groups, for most have few runs."""
    fits, squares, freedom = [], 0.0, 0.0
    for rows in groups:
        if np.unique(np.round(n[rows], 2)).size < LEAST_RUNS:
            continue
        middle = float(c[rows].mean())
        coefficients, inverse, pool = _parabola(n[rows] - n[rows].mean(), y[rows] - slope * (c[rows] - middle))
        squares, freedom = squares + pool[0], freedom + pool[1]
        fits.append((rows, middle, coefficients, inverse))
    noise = squares / max(freedom, 1.0)
    points = []
    for rows, middle, (level, b, a), inverse in fits:
        x = n[rows] - n[rows].mean()
        best = -b / (2 * a) if a > 0 else np.nan
        by = np.array([0.0, -1.0, -2 * best]) / (2 * a)  # derivative of the minimum's place
        sd = float(np.sqrt(noise * by @ inverse @ by))
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
            Optimum(
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


def _parabola(x: Array, y: Array) -> tuple[Array, Array, tuple[float, float]]:
    """Coefficients (1, x, x²) of the part of the curve near its minimum, their covariance over the noise variance, and
    (weighted squares, degrees of freedom). Weights fade with the fitted height: far from it no curve is a parabola.
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


def _trend(c: Array, y: Array, variance: Array) -> Trend:
    """Weighted line in logs; scatter beyond the points' own variance by Paule and Mandel's moment equation."""
    middle, freedom = float(c.mean()), len(c) - 2
    design = np.stack([np.ones_like(c), c - middle], 1)

    def solve(scatter: float) -> tuple[Array, Array, float]:
        weight = 1 / (variance + scatter)
        inverse = np.linalg.inv((design.T * weight) @ design)
        line = np.asarray(inverse @ (design.T @ (weight * y)))
        return line, np.asarray(inverse), float(np.sum(weight * (y - design @ line) ** 2))

    scatter = 0.0
    if freedom > 0 and solve(0.0)[2] > freedom:
        top = float(np.sum((y - y.mean()) ** 2)) + 1e-12
        scatter = float(brentq(lambda s: solve(s)[2] - freedom, 0.0, top))
    line, inverse, _ = solve(scatter)
    law = PowerLaw(float(np.exp(line[0] - line[1] * middle)), float(line[1]))
    return Trend(law, middle, inverse, float(max(freedom, 1)))


def span(c: Array) -> tuple[float, float]:
    return float(np.exp(c.min())), float(np.exp(c.max()))


def _reasons(points: Sequence[Optimum]) -> str:
    return ", ".join(sorted({p.status for p in points if p.status != "ok"}))
