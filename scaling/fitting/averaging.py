"""The prediction of a loss: two forms averaged, each bent a little, and an effect that the runs of one N share.

Beyond its data a law with a floor (Hoffmann et al., arXiv 2203.15556) is mostly too high and one without (Kaplan et
al., arXiv 2001.08361) mostly too low: both are fitted, with weak priors on the exponents, and averaged. Each may bend
in ln N and ln D by coefficients of N(0, .002²). Runs of one N are one model, often one run read at several D, so they
share a residual; how large it is, is read from the table. It moves the prediction for that N and widens the interval
of any other. Runs near the largest compute weigh most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scaling.common.arrays import Array
from scaling.fitting.newton import Local, minimise, penalised_squares

# theta (k, 5), n and d (m,), logs less their means -> ln L (k, m) and its Jacobian (k, m, 5)
Form: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Array]]

LEAST_SD = 5e-4  # of ln L: no table is known to this
WEAK = 30.0  # sd of the amplitudes' prior: only there so that a table with one N or one D has an answer
BEND = 0.002  # prior sd of the three curvatures; .001 to .004 fared better than none on four of five families of tables
FADE = 8.0  # the effect of one N fades with exp(-|change of ln D| / 8); 4 to no fading fared alike
EFFECTS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)  # its variance, in units of the noise's: the likeliest is taken
TEMPER = 1 / 16  # power of the likelihood that weighs the forms: runs of one table are far from independent


def softmax(theta: Array, n: Array, d: Array) -> tuple[tuple[Array, Array, Array], Array]:
    """Shares of the three terms of E + A/N^alpha + B/D^beta and ln of their sum, each (k, m)."""
    a, alpha, b, beta, e = theta.T[:, :, None]
    z1, z2 = a - alpha * n, b - beta * d
    top = np.maximum(np.maximum(z1, z2), e)
    x1, x2, x3 = np.exp(z1 - top), np.exp(z2 - top), np.exp(e - top)
    total = x1 + x2 + x3
    return (x1 / total, x2 / total, x3 / total), top + np.log(total)


def floor_form(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """ln(e^(a - alpha n) + e^(b - beta d) + e^e): Hoffmann's law."""
    (p1, p2, p3), f = softmax(theta, n, d)
    return f, np.stack([p1, -n * p1, p2, -d * p2, p3], 2)


def no_floor_form(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """e^k ln(e^(a - alpha n) + e^(b - beta d)): (A/N^.. + B/D^..)^(e^k), Kaplan's law with one exponent more."""
    a, alpha, b, beta, k = theta.T[:, :, None]
    z1, z2 = a - alpha * n, b - beta * d
    inner = np.logaddexp(z1, z2)
    p1, p2, power = np.exp(z1 - inner), np.exp(z2 - inner), np.exp(np.clip(k, -20, 20))
    f = power * inner
    return f, np.stack([power * p1, -power * n * p1, power * p2, -power * d * p2, f], 2)


FORMS: dict[str, Form] = {"floor": floor_form, "no floor": no_floor_form}


def _bent(form: str, theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """The form plus c1 n² + c2 n d + c3 d²: (k, m) and Jacobian (k, m, 8)."""
    f, jacobian = FORMS[form](theta[:, :5], n, d)
    bends = np.stack([n * n, n * d, d * d], 1)
    return f + theta[:, 5:] @ bends.T, np.concatenate([jacobian, np.broadcast_to(bends, (len(theta), *bends.shape))], 2)


@dataclass(frozen=True)
class WhitenedRuns:
    """The runs, and the rotation that makes the shared effects independent of each other."""

    n: Array  # (m,)
    d: Array  # (m,)
    y: Array  # (m,) ln loss less `level`
    level: float  # mean ln loss: the forms' priors then do not depend on the unit of the loss
    weight: Array  # (m,) of the runs
    model: NDArray[np.intp]  # (m,) which distinct N
    rotation: Any  # sparse (m, m): rotation @ noise has variance 1, rotation @ effect has variance `spread`
    spread: Array  # (m,)

    @property
    def effective(self) -> float:
        """Runs that count."""
        return float(self.weight.sum())


def tabulate(log_n: Array, log_d: Array, y: Array, centre: tuple[float, float]) -> WhitenedRuns:
    """Weights by compute, min(1, C / C90)^1.5 with C90 the 90 % quantile; their sum is the effective number of runs.

    With R = W^(1/2) K W^(1/2) = Q diag(spread) Q', K the effect's correlation, noise/weight + share * effect has
    variance 1 + share * spread in the coordinates Q' W^(1/2), whatever the share: one decomposition serves all.
    """
    q = np.minimum(1.0, np.exp(log_n + log_d - np.quantile(log_n + log_d, 0.9))) ** 1.5
    q = np.maximum(q, 1e-4)
    weight = q * q.sum() / np.sum(q * q)
    n, d = log_n - centre[0], log_d - centre[1]
    model = _models(n)
    blocks, spread = [], np.empty(n.size)
    order = np.argsort(model, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(model[order])) + 1):
        root = np.sqrt(weight[rows])
        values, vectors = np.linalg.eigh(root[:, None] * _fading(d[rows], d[rows]) * root)
        spread[rows] = np.maximum(values, 0.0)
        blocks.append((np.repeat(rows, rows.size), np.tile(rows, rows.size), (vectors.T * root).ravel()))
    at, of, value = (np.concatenate(v) for v in zip(*blocks, strict=True))
    rotation = sparse.csr_array((value, (at, of)), shape=(n.size, n.size))
    level = float(y.mean())
    return WhitenedRuns(n, d, y - level, level, np.asarray(weight), model, rotation, spread)


def _models(n: Array) -> NDArray[np.intp]:
    """Numbers of the distinct N (equal to 1e-6)."""
    order = np.argsort(n, kind="stable")
    number = np.zeros(n.size, np.intp)
    number[order[1:]] = np.cumsum(np.diff(n[order]) > 1e-6)
    return number


def _fading(d: Array, other: Array) -> Array:
    return np.asarray(np.exp(-np.abs(d[:, None] - other) / FADE))


@dataclass(frozen=True)
class Member:
    """One of the two averaged forms, fitted."""

    form: str  # "floor" or "no floor"
    theta: Array  # (8,): the form's five, then curvatures in n², n d, d²
    covariance: Array  # (8, 8), Laplace
    noise: float  # rms residual of ln L without the shared effect: one run about its model
    weight: float
    effect: float  # variance of what the runs of one N share, in units of scale²
    scale: float  # sd of ln L of one run, with the degrees of freedom taken off
    deviance: float  # smaller fits better; weighs the members
    table: WhitenedRuns

    def curves(self, theta: Array, n: Array, d: Array) -> Array:
        """ln L of a new model for coefficients (k, 8) at n, d (m,): (k, m)."""
        return self.table.level + _bent(self.form, theta, n, d)[0]

    def moments(self, n: Array, d: Array) -> tuple[Array, Array]:
        """Mean and variance of ln L expected of a model with this N; where N was trained, its runs' residuals count."""
        f, jacobian = (v[0] for v in _bent(self.form, self.theta[None], n, d))
        if self.effect == 0:
            return self.table.level + f, np.einsum("mi,ij,mj->m", jacobian, self.covariance, jacobian)
        t = self.table
        scale = self.scale * np.sqrt(1 + self.effect * t.spread)
        fitted, rows = (v[0] for v in _bent(self.form, self.theta[None], t.n, t.d))
        shared = self.effect * self.scale**2 * (np.abs(n[:, None] - t.n) < 1e-6) * _fading(d, t.d)
        gain = (t.rotation @ shared.T).T / scale  # (points, m)
        f = f + gain @ ((t.rotation @ (t.y - fitted)) / scale)
        jacobian = jacobian - gain @ ((t.rotation @ rows) / scale[:, None])
        within = np.einsum("mi,ij,mj->m", jacobian, self.covariance, jacobian)
        return t.level + f, within + self.effect * self.scale**2 - np.sum(gain**2, 1)


def fit_members(table: WhitenedRuns) -> tuple[Member, ...]:
    """Both forms, with weights that sum to 1."""
    members = [_member(form, table) for form in FORMS]
    power = -TEMPER * np.array([m.deviance for m in members])
    share = np.exp(power - power.max())
    share = share / share.sum()
    return tuple(replace(m, weight=float(w)) for m, w in zip(members, share, strict=True))


def _prior(form: str, y: Array) -> tuple[Array, Array, Array]:
    """Starts (4, 8), prior centre and sd (8,). Exponents: .35 ± .2 with a floor; .7 ± .4 inside the power e^(-1 ± 1)."""
    if form == "floor":
        floor = y.min() - 0.3
        term = np.log((1 - np.exp(floor)) / 2)
        starts = [[term, a, term, b, floor] for a in (0.2, 0.5) for b in (0.2, 0.5)]
        centre, sd = [term, 0.35, term, 0.35, floor], [WEAK, 0.2, WEAK, 0.2, WEAK]
    else:
        starts = [[-0.7, a, -0.7, a, k] for a in (0.2, 0.6) for k in (-1.5, -0.5)]
        centre, sd = [-0.7, 0.7, -0.7, 0.7, -1.0], [WEAK, 0.4, WEAK, 0.4, 1.0]
    return np.pad(np.array(starts), ((0, 0), (0, 3))), np.array([*centre, 0, 0, 0]), np.array([*sd, BEND, BEND, BEND])


def _member(form: str, table: WhitenedRuns) -> Member:
    """Penalised least squares on ln L in turn with the noise; then, from the residuals, the effect that runs share.

    The form heeds no shared effect: generalised least squares would count every N alike, and foresees new sizes worse.
    """
    theta, centre, sd = _prior(form, table.y)
    precision, m = sd**-2.0, table.effective
    freedom, s = max(m - 5, m / 3, 1.0), 0.01
    for sweep in range(6):

        def local(at: Array, _: NDArray[np.intp], s: float = s) -> Local:
            f, jacobian = _bent(form, at, table.n, table.d)
            weight = np.broadcast_to(table.weight / s**2, f.shape)
            return penalised_squares(table.y - f, jacobian, weight, at - centre, precision)

        ends = minimise(local, theta, tolerance=1e-7, iterations=150 if sweep else 20)  # first, which start is best
        best = ends.theta[np.argmin(ends.value)]
        theta = best[None]
        f, jacobian = (v[0] for v in _bent(form, best[None], table.n, table.d))
        squares = float(np.sum(table.weight * (table.y - f) ** 2))
        before, s = s, max(np.sqrt(squares / freedom), LEAST_SD)
        if sweep and abs(s / before - 1) < 0.03:
            break
    residual, turned = table.rotation @ (table.y - f), table.rotation @ jacobian
    effect, scale = _noise(residual, turned, table, precision, s, freedom)
    spread = 1 + effect * table.spread
    # least squares' own covariance under the noise and the effect together
    inverse = np.linalg.inv((jacobian.T * (table.weight / s**2)) @ jacobian + np.diag(precision))
    together = (turned.T * (spread * scale**2 / s**4)) @ turned + np.diag(precision)
    noise = max(float(np.sqrt(np.sum(residual**2 / spread) / m)), LEAST_SD)
    deviance = m * np.log(max(np.sqrt(squares / m), LEAST_SD))
    return Member(form, best, inverse @ together @ inverse, noise, 1.0, effect, scale, float(deviance), table)


def _noise(
    residual: Array, jacobian: Array, table: WhitenedRuns, precision: Array, scale: float, freedom: float
) -> tuple[float, float]:
    """The size of the shared effect of highest marginal likelihood (form linearised, noise profiled), and the noise."""
    best = (np.inf, 0.0, scale)
    for effect in EFFECTS if np.bincount(table.model).max() > 1 else (0.0,):
        weight = 1 / (1 + effect * table.spread)
        curvature = (jacobian.T * weight) @ jacobian + np.diag(precision) * scale**2
        pull = jacobian.T @ (weight * residual)
        squares = float(np.sum(weight * residual**2) - pull @ np.linalg.solve(curvature, pull))
        new = max(np.sqrt(max(squares, 0.0) / freedom), LEAST_SD)
        value = 0.5 * squares / new**2 + table.effective * np.log(new) - 0.5 * float(np.sum(np.log(weight)))
        value += 0.5 * float(np.linalg.slogdet(curvature)[1])
        if value < best[0] - 1e-9:
            best = (value, effect, float(new))
    return best[1], best[2]
