"""Predict a loss by averaging two forms, each with a small curvature, and an effect shared by the runs of one N.

Beyond its data, a law with a floor (Hoffmann et al., arXiv 2203.15556) is mostly too high, and one without a floor
(Kaplan et al., arXiv 2001.08361) is mostly too low. So both are fitted, with weak priors on the exponents, and
averaged. Each may curve in ln N and ln D with coefficients of N(0, 0.002²). Runs of one N are one model, often one run
read at several D, so they share a residual, whose size is estimated from the table. It shifts the prediction for that N
and widens the interval of any other N. Runs near the largest compute have the most weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scaling.common.arrays import Array
from scaling.fitting.newton import LocalModel, evaluate_penalised_squares, minimise

# A function of theta (k, 5), and n, d (m,), which are ln N and ln D minus their means. It returns ln L (k, m) and its
# Jacobian (k, m, 5).
FormFunction: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Array]]

# Lower bound of the noise in ln L. No table is known more exactly.
MIN_SD = 5e-4
# Prior sd of the amplitudes. It only serves to make the fit of a table with one N or one D unique.
AMPLITUDE_SD = 30.0
# Prior sd of the three curvatures. On four of five families of tables 0.001 to 0.004 was better than no curvature.
CURVATURE_SD = 0.002
# The effect shared by one N fades with exp(-|change of ln D| / 8). Values from 4 to no fading performed alike.
FADE_LENGTH = 8.0
# Candidates for the variance of the effect, in units of the variance of the noise. The most likely one is used.
EFFECT_GRID = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)
# Power of the likelihood that weights the forms. The runs of one table are far from independent.
TEMPER = 1 / 16


def compute_shares(theta: Array, n: Array, d: Array) -> tuple[tuple[Array, Array, Array], Array]:
    """Evaluate E + A/N^alpha + B/D^beta in logs.

    Args:
        theta: (a, alpha, b, beta, e) of k problems, (k, 5): ln of the terms is a - alpha n, b - beta d and e.
        n: ln N minus its mean, (m,).
        d: ln D minus its mean, (m,).

    Returns:
        The shares of the three terms in the sum, and ln of the sum, each (k, m).
    """
    a, alpha, b, beta, e = theta.T[:, :, None]
    z1, z2 = a - alpha * n, b - beta * d
    top = np.maximum(np.maximum(z1, z2), e)
    x1, x2, x3 = np.exp(z1 - top), np.exp(z2 - top), np.exp(e - top)
    total = x1 + x2 + x3
    return (x1 / total, x2 / total, x3 / total), top + np.log(total)


def evaluate_floor_form(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """Evaluate Hoffmann's law, ln(e^(a - alpha n) + e^(b - beta d) + e^e), and its Jacobian."""
    (p1, p2, p3), f = compute_shares(theta, n, d)
    return f, np.stack([p1, -n * p1, p2, -d * p2, p3], 2)


def evaluate_no_floor_form(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """Evaluate e^k ln(e^(a - alpha n) + e^(b - beta d)), Kaplan's law with one more exponent, and its Jacobian."""
    a, alpha, b, beta, k = theta.T[:, :, None]
    z1, z2 = a - alpha * n, b - beta * d
    inner = np.logaddexp(z1, z2)
    p1, p2, power = np.exp(z1 - inner), np.exp(z2 - inner), np.exp(np.clip(k, -20, 20))
    f = power * inner
    return f, np.stack([power * p1, -power * n * p1, power * p2, -power * d * p2, f], 2)


FORMS: dict[str, FormFunction] = {"floor": evaluate_floor_form, "no floor": evaluate_no_floor_form}


def _evaluate_curved(form: str, theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """Evaluate the form plus c1 n² + c2 n d + c3 d², (k, m), and its Jacobian (k, m, 8)."""
    f, jacobian = FORMS[form](theta[:, :5], n, d)
    squares = np.stack([n * n, n * d, d * d], 1)
    by_curvature = np.broadcast_to(squares, (len(theta), *squares.shape))
    return f + theta[:, 5:] @ squares.T, np.concatenate([jacobian, by_curvature], 2)


@dataclass(frozen=True)
class WhitenedRuns:
    """The runs, and the rotation that makes the shared effects independent of each other.

    Attributes:
        n: ln N minus its mean, (m,).
        d: ln D minus its mean, (m,).
        y: ln loss minus `level`, (m,).
        level: Mean ln loss. Subtracting it makes the priors of the forms independent of the unit of the loss.
        weight: Weights of the runs, (m,).
        model: Index of the distinct N of each run, (m,).
        rotation: Sparse matrix (m, m). rotation @ noise has variance 1, and rotation @ effect has variance `spread`.
        spread: Variance of the rotated effect, (m,).
    """

    n: Array
    d: Array
    y: Array
    level: float
    weight: Array
    model: NDArray[np.intp]
    rotation: Any
    spread: Array

    @property
    def effective(self) -> float:
        """Effective number of runs, the sum of the weights."""
        return float(self.weight.sum())


def whiten_runs(
    log_n: Array, log_d: Array, y: Array, centre: tuple[float, float], credit: Array | None = None
) -> WhitenedRuns:
    """Weight the runs by compute, and decompose the correlation of the effect that runs of one N share.

    A run has the weight min(1, C / C90)^1.5 with C90 the 90 % quantile of the compute, scaled so that the sum of the
    weights is the effective number of runs. With R = W^(1/2) K W^(1/2) = Q diag(spread) Q' and K the correlation of the
    effect, noise/weight + share * effect has the variance 1 + share * spread in the coordinates Q' W^(1/2). This holds
    for every share, so one decomposition is enough.

    Args:
        log_n: ln N, (m,).
        log_d: ln D, (m,).
        y: ln loss, (m,).
        centre: Means of ln N and ln D.
        credit: Factors between 0 and 1 of the weights, (m,); default 1.
    """
    q = np.minimum(1.0, np.exp(log_n + log_d - np.quantile(log_n + log_d, 0.9))) ** 1.5
    q = q if credit is None else q * credit
    q = np.maximum(q, 1e-4)
    weight = q * q.sum() / np.sum(q * q)
    n, d = log_n - centre[0], log_d - centre[1]
    model = _number_models(n)
    blocks, spread = [], np.empty(n.size)
    order = np.argsort(model, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(model[order])) + 1):
        root = np.sqrt(weight[rows])
        values, vectors = np.linalg.eigh(root[:, None] * _compute_fading(d[rows], d[rows]) * root)
        spread[rows] = np.maximum(values, 0.0)
        blocks.append((np.repeat(rows, rows.size), np.tile(rows, rows.size), (vectors.T * root).ravel()))
    at, of, value = (np.concatenate(v) for v in zip(*blocks, strict=True))
    rotation = sparse.csr_array((value, (at, of)), shape=(n.size, n.size))
    level = float(y.mean())
    return WhitenedRuns(n, d, y - level, level, np.asarray(weight), model, rotation, spread)


def _number_models(n: Array) -> NDArray[np.intp]:
    """Number the distinct N; those whose logarithms agree to 1e-6 count as one."""
    order = np.argsort(n, kind="stable")
    number = np.zeros(n.size, np.intp)
    number[order[1:]] = np.cumsum(np.diff(n[order]) > 1e-6)
    return number


def _compute_fading(d: Array, other: Array) -> Array:
    """Return the correlation of the shared effect between token counts d (m,) and other (k,), as (m, k)."""
    return np.asarray(np.exp(-np.abs(d[:, None] - other) / FADE_LENGTH))


@dataclass(frozen=True)
class AveragedForm:
    """One of the two averaged forms, fitted.

    Attributes:
        form: "floor" or "no floor".
        theta: The five coefficients of the form, then its curvatures in n², n d and d², (8,).
        covariance: Covariance of theta in the Laplace approximation, (8, 8).
        noise: Root mean square residual of ln L without the shared effect: one run about its model.
        weight: Weight in the average. The weights sum to 1.
        effect: Variance of what the runs of one N share, in units of scale².
        scale: Standard deviation of ln L of one run, corrected for the degrees of freedom.
        deviance: Lower values fit better. It determines the weight.
        table: The runs.
    """

    form: str
    theta: Array
    covariance: Array
    noise: float
    weight: float
    effect: float
    scale: float
    deviance: float
    table: WhitenedRuns

    def evaluate(self, theta: Array, n: Array, d: Array) -> Array:
        """Return ln L (k, m) of a new model for coefficients theta (k, 8) at n, d (m,)."""
        return self.table.level + _evaluate_curved(self.form, theta, n, d)[0]

    def moments(self, n: Array, d: Array) -> tuple[Array, Array]:
        """Return the mean (m,) and variance (m,) of the expected ln L of a model at n, d (m,).

        Where this N was trained, the residuals of its runs are taken into account.
        """
        f, jacobian = (v[0] for v in _evaluate_curved(self.form, self.theta[None], n, d))
        if self.effect == 0:
            return self.table.level + f, np.einsum("mi,ij,mj->m", jacobian, self.covariance, jacobian)
        t = self.table
        scale = self.scale * np.sqrt(1 + self.effect * t.spread)
        fitted, rows = (v[0] for v in _evaluate_curved(self.form, self.theta[None], t.n, t.d))
        shared = self.effect * self.scale**2 * (np.abs(n[:, None] - t.n) < 1e-6) * _compute_fading(d, t.d)
        # Shape (points, m).
        gain = (t.rotation @ shared.T).T / scale
        f = f + gain @ ((t.rotation @ (t.y - fitted)) / scale)
        jacobian = jacobian - gain @ ((t.rotation @ rows) / scale[:, None])
        within = np.einsum("mi,ij,mj->m", jacobian, self.covariance, jacobian)
        return t.level + f, within + self.effect * self.scale**2 - np.sum(gain**2, 1)


def fit_averaged_forms(table: WhitenedRuns) -> tuple[AveragedForm, ...]:
    """Fit both forms to a table, with weights that sum to 1."""
    members = [_fit_averaged_form(form, table) for form in FORMS]
    power = -TEMPER * np.array([m.deviance for m in members])
    share = np.exp(power - power.max())
    share = share / share.sum()
    return tuple(replace(m, weight=float(w)) for m, w in zip(members, share, strict=True))


def make_form_prior(form: str, y: Array) -> tuple[Array, Array, Array]:
    """Return starts (4, 8), and mean and sd of the prior, (8,).

    The exponents are 0.35 ± 0.2 with a floor, and 0.7 ± 0.4 inside the power e^(-1 ± 1) without one.
    """
    if form == "floor":
        floor = y.min() - 0.3
        term = np.log((1 - np.exp(floor)) / 2)
        starts = [[term, a, term, b, floor] for a in (0.2, 0.5) for b in (0.2, 0.5)]
        centre, sd = [term, 0.35, term, 0.35, floor], [AMPLITUDE_SD, 0.2, AMPLITUDE_SD, 0.2, AMPLITUDE_SD]
    else:
        starts = [[-0.7, a, -0.7, a, k] for a in (0.2, 0.6) for k in (-1.5, -0.5)]
        centre, sd = [-0.7, 0.7, -0.7, 0.7, -1.0], [AMPLITUDE_SD, 0.4, AMPLITUDE_SD, 0.4, 1.0]
    return (
        np.pad(np.array(starts), ((0, 0), (0, 3))),
        np.array([*centre, 0, 0, 0]),
        np.array([*sd, CURVATURE_SD, CURVATURE_SD, CURVATURE_SD]),
    )


def _fit_averaged_form(form: str, table: WhitenedRuns) -> AveragedForm:
    """Alternate penalised least squares on ln L with the noise, then estimate the shared effect from the residuals.

    The fit of the form ignores the shared effect: generalised least squares would give every N the same weight, and
    predicts new sizes less well.
    """
    theta, centre, sd = make_form_prior(form, table.y)
    precision, m = sd**-2.0, table.effective
    freedom, s = max(m - 5, m / 3, 1.0), 0.01
    for sweep in range(6):

        def objective(at: Array, _: NDArray[np.intp], s: float = s) -> LocalModel:
            f, jacobian = _evaluate_curved(form, at, table.n, table.d)
            weight = np.broadcast_to(table.weight / s**2, f.shape)
            return evaluate_penalised_squares(table.y - f, jacobian, weight, at - centre, precision)

        # The first sweep only finds the best start.
        ends = minimise(objective, theta, tolerance=1e-7, iterations=150 if sweep else 20)
        best = ends.theta[np.argmin(ends.value)]
        theta = best[None]
        f, jacobian = (v[0] for v in _evaluate_curved(form, best[None], table.n, table.d))
        squares = float(np.sum(table.weight * (table.y - f) ** 2))
        before, s = s, max(np.sqrt(squares / freedom), MIN_SD)
        if sweep and abs(s / before - 1) < 0.03:
            break
    residual, rotated = table.rotation @ (table.y - f), table.rotation @ jacobian
    effect, scale = _estimate_effect(residual, rotated, table, precision, s, freedom)
    spread = 1 + effect * table.spread
    # The sandwich covariance of the least-squares estimate under the noise and the effect.
    inverse = np.linalg.inv((jacobian.T * (table.weight / s**2)) @ jacobian + np.diag(precision))
    middle = (rotated.T * (spread * scale**2 / s**4)) @ rotated + np.diag(precision)
    noise = max(float(np.sqrt(np.sum(residual**2 / spread) / m)), MIN_SD)
    deviance = m * np.log(max(np.sqrt(squares / m), MIN_SD))
    return AveragedForm(form, best, inverse @ middle @ inverse, noise, 1.0, effect, scale, float(deviance), table)


def _estimate_effect(
    residual: Array, jacobian: Array, table: WhitenedRuns, precision: Array, scale: float, freedom: float
) -> tuple[float, float]:
    """Return the variance of the shared effect with the highest marginal likelihood, and the noise.

    The form is linearised, and the noise is profiled out.
    """
    best = (np.inf, 0.0, scale)
    for effect in EFFECT_GRID if np.bincount(table.model).max() > 1 else (0.0,):
        weight = 1 / (1 + effect * table.spread)
        curvature = (jacobian.T * weight) @ jacobian + np.diag(precision) * scale**2
        pull = jacobian.T @ (weight * residual)
        squares = float(np.sum(weight * residual**2) - pull @ np.linalg.solve(curvature, pull))
        new = max(np.sqrt(max(squares, 0.0) / freedom), MIN_SD)
        value = 0.5 * squares / new**2 + table.effective * np.log(new) - 0.5 * float(np.sum(np.log(weight)))
        value += 0.5 * float(np.linalg.slogdet(curvature)[1])
        if value < best[0] - 1e-9:
            best = (value, effect, float(new))
    return best[1], best[2]
