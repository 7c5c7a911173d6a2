"""One bowl for all sizes: its shapes, their priors, and the fit of one of them to grouped runs.

    ln L = offset of the (N, D) group + e^(en n + ed d) bowl(u + (kn n + kd d) v, v) + noise
    u = ln lr - (a0 + a1 n + a2 d),  v = ln B - (b0 + b1 d + b2 n),  n, d = ln N, ln D about the groups' mean

The bowl grows flatter and turns a little with size: on a public table of real runs the height goes as D^-.14. With
one rigid bowl the optima of groups came out too high by 8 % in lr and 12 % in B, with this one by 3 and 6 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from scaling.common.arrays import Array
from scaling.fitting.newton import Local, minimise, penalised_squares

# theta: a0, a1 (n), a2 (d), b0, b1 (d), b2 (n); kn, kd, en, ed; then the shape: ln h1, ln h2, k, and c1..c4 or b, s1, s2
Bowl: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Array, Array, Array]]
# shape (k, q), u, v (k, m) -> value, d/du, d/dv (k, m), d/dshape (k, m, q)

B2 = 5  # where b2 is
B2_SD = 0.2  # of b2, beforehand, where it is not nil
SHAPE = 10  # where the shape begins
STRETCH = 5.0  # |ln| of a height's change with size is held below this, far beyond any data
LEAST_SD = 7e-4  # of ln L
SHIFTS = np.array([0.03, 0.05, 0.08, 0.12, 0.2, 0.3])  # sd of one group's own optimum about the law


@dataclass(frozen=True)
class BowlFit:
    """One of the averaged fits."""

    form: str  # "cubic" or "exponential"
    tau: float
    theta: Array  # (10 + shape,)
    noise: float  # sd of one run's ln L
    covariance: Array  # (cells, 6, 6) of the six coefficients, one for each pair of shift sds
    shifts: Array  # (cells, 2) sd of a group's own shift of ln lr*, ln B*
    cells: Array  # (cells,) their weights, sum 1
    floors: Array  # (groups,) fitted minimum of ln L
    floor_variance: Array  # (groups,)
    weight: float = 1.0  # in the average

    def height(self, u: Array, v: Array, n: Array | float, d: Array | float) -> Array:
        """ln L above the minimum at offsets (u, v) from the optimum; all of shape (m,), n and d may be scalars."""
        kn, kd, en, ed = self.theta[B2 + 1 : SHAPE]
        scale = np.exp(np.clip(en * n + ed * d, -STRETCH, STRETCH))
        turned = u + (kn * n + kd * d) * v
        return np.asarray(scale * BOWLS[self.form](self.theta[None, SHAPE:], turned[None], v[None])[0][0])

    @property
    def spread(self) -> Array:
        """(6, 6) covariance of the coefficients, mean over the cells."""
        return np.asarray(np.tensordot(self.cells, self.covariance, 1))

    def without_b2(self, weight: float) -> BowlFit:
        """The same fit on condition that B* does not move with N: the other coefficients go along."""
        along = self.spread[:, B2] / self.spread[B2, B2]
        theta = self.theta.copy()
        theta[: B2 + 1] -= along * self.theta[B2]
        column = self.covariance[:, :, B2]
        removed = column[:, :, None] * column[:, None, :] / column[:, B2, None, None]
        return replace(self, theta=theta, covariance=self.covariance - removed, weight=weight)


@dataclass(frozen=True)
class Grouped:
    """Runs of several (N, D) groups, in logs."""

    y: Array  # (m,) ln loss
    lr: Array  # (m,) logs
    batch: Array  # (m,)
    n: Array  # (m,) ln N less the centre
    d: Array  # (m,)
    group: NDArray[np.intp]  # (m,)
    groups: int

    @property
    def member(self) -> Array:
        """(m, groups) one-hot: group sums are matrix products."""
        return np.eye(self.groups)[self.group]


def cubic(shape: Array, u: Array, v: Array) -> tuple[Array, Array, Array, Array]:
    """h1 (u + k v)² + h2 v² + c1 u³ + c2 u² v + c3 u v² + c4 v³"""
    log_h1, log_h2, k, c1, c2, c3, c4 = shape.T[:, :, None]
    h1, h2, z = np.exp(np.clip(log_h1, -30, 30)), np.exp(np.clip(log_h2, -30, 30)), u + k * v
    first, second = h1 * z * z, h2 * v * v
    uu, uv, vv = u * u, u * v, v * v
    value = first + second + c1 * uu * u + c2 * uu * v + c3 * u * vv + c4 * vv * v
    by_u = 2 * h1 * z + 3 * c1 * uu + 2 * c2 * uv + c3 * vv
    by_v = 2 * h1 * z * k + 2 * h2 * v + c2 * uu + 2 * c3 * uv + 3 * c4 * vv
    return value, by_u, by_v, np.stack([first, second, 2 * h1 * z * v, uu * u, uu * v, u * vv, vv * v], 2)


def exponential(shape: Array, u: Array, v: Array) -> tuple[Array, Array, Array, Array]:
    """h1 phi(u + k v; s1) + h2 phi(v + b u; s2): convex, steeper on one side"""
    log_h1, log_h2, k, b, s1, s2 = shape.T[:, :, None]
    h1, h2 = np.exp(np.clip(log_h1, -30, 30)), np.exp(np.clip(log_h2, -30, 30))
    f1, z1, t1 = phi(u + k * v, s1)
    f2, z2, t2 = phi(v + b * u, s2)
    by_u, by_v = h1 * z1 + h2 * z2 * b, h1 * z1 * k + h2 * z2
    by_shape = np.stack([h1 * f1, h2 * f2, h1 * z1 * v, h2 * z2 * u, h1 * t1, h2 * t2], 2)
    return h1 * f1 + h2 * f2, by_u, by_v, by_shape


def phi(z: Array, s: Array) -> tuple[Array, Array, Array]:
    """phi(z; s) = 2 (e^(sz) - sz - 1) / s², z² at s = 0; with its derivatives by z and s."""
    x = np.clip(s * z, -40.0, 40.0)
    tiny = np.abs(x) < 1e-2
    safe = np.where(tiny, 1.0, x)
    grown, inverse, zz = np.expm1(safe), 1 / safe, z * z
    rest = 2 * (grown - safe) * inverse * inverse
    g = np.where(tiny, 1 + x * (1 / 3 + x * (1 / 12 + x / 60)), rest)
    slope = np.where(tiny, 1 / 3 + x * (1 / 6 + x * (1 / 20 + x / 90)), 2 * (grown * inverse - rest) * inverse)
    first = np.where(tiny, 1 + x * (1 / 2 + x * (1 / 6 + x / 24)), grown * inverse)
    return zz * g, 2 * z * first, zz * z * slope


BOWLS: dict[str, Bowl] = {"cubic": cubic, "exponential": exponential}


def prior_of(form: str, centre: tuple[float, float], mup: bool) -> tuple[Array, Array]:
    """(mean, sd) of theta. Step Law's exponents widened; measured to matter on small sweeps."""
    if mup:
        # Assumed: lr* is stored at base width, where muP leaves it alone; with tokens it falls as D^-.32 at fixed batch
        # (arXiv 2409.19913), plus about half of the batch's exponent. The level is that of the proxies' default.
        a1, a2, level, N, D = (0.0, 0.1), (-0.1, 0.25), np.log(2.0**-7), 1e5, 2e5
    else:
        a1, a2, level, N, D = (-0.6, 0.3), (0.2, 0.3), np.log(2e-3), 4e8, 2e10
    b1, b2 = (0.5, 0.2), (0.0, B2_SD)
    a0 = level + a1[0] * (centre[0] - np.log(N)) + a2[0] * (centre[1] - np.log(D))
    b0 = np.log(4e5) + b1[0] * (centre[1] - np.log(2e10)) + b2[0] * (centre[0] - np.log(4e8))
    pairs = [(a0, 1.5), a1, a2, (b0, 1.5), b1, b2, *[(0.0, 0.1)] * 4]
    pairs += [(np.log(0.01), 1.0), (np.log(0.005), 1.0), (-0.3, 0.4)]
    pairs += [(0.0, 0.01)] * 4 if form == "cubic" else [(0.0, 0.4), (0.5, 0.5), (0.0, 0.5)]
    mean, sd = np.array(pairs, float).T
    return mean, sd


def _model(form: str, theta: Array, data: Grouped) -> tuple[Array, Array]:
    """Bowl (k, m) and its Jacobian (k, m, p)."""
    a0, a1, a2, b0, b1, b2, kn, kd, en, ed = theta[:, :SHAPE].T[:, :, None]
    n, d = data.n, data.d
    u, v, turn = data.lr - (a0 + a1 * n + a2 * d), data.batch - (b0 + b1 * d + b2 * n), kn * n + kd * d
    scale = np.exp(np.clip(en * n + ed * d, -STRETCH, STRETCH))
    value, by_u, by_v, by_shape = BOWLS[form](theta[:, SHAPE:], u + turn * v, v)
    value, by_u, by_v = scale * value, scale * by_u, scale * by_v
    twist = by_u * v
    by_v = by_v + turn * by_u
    columns = [-by_u, -by_u * n, -by_u * d, -by_v, -by_v * d, -by_v * n, twist * n, twist * d, value * n, value * d]
    return value, np.concatenate([np.stack(columns, 2), scale[:, :, None] * by_shape], 2)


def fit_bowl(form: str, tau: float, data: Grouped, prior: tuple[Array, Array]) -> BowlFit:
    """Robust weighted least squares with group offsets profiled out; prior: (mean, sd) of theta, as from `prior_of`.

    Weights fade with the fitted height over tau (in ln L), not with the measured gap: six rounds, two starts.
    """
    mean, sd = prior
    precision = sd**-2.0
    member = data.member
    lowest = np.full(data.groups, np.inf)
    np.minimum.at(lowest, data.group, data.y)
    gap = data.y - lowest[data.group]

    near = gap <= 0.01
    centroid = mean.copy()
    centroid[0] = np.mean((data.lr - mean[1] * data.n - mean[2] * data.d)[near])
    centroid[3] = np.mean((data.batch - mean[4] * data.d - mean[5] * data.n)[near])
    theta = np.stack([mean, centroid])

    first = np.exp(-gap / tau)
    weight = np.tile(first, (2, 1))
    s = np.full(2, 0.004)
    for _ in range(6):

        def local(at: Array, rows: NDArray[np.intp], weight: Array = weight, s: Array = s) -> Local:
            w = weight[rows]
            value, jacobian = _model(form, at, data)
            r, jacobian = _less_group_mean(data.y - value, w, member), _less_group_mean(jacobian, w, member)
            return penalised_squares(r, jacobian, w / s[rows, None] ** 2, at - mean, precision)

        theta = minimise(local, theta, tolerance=1e-9, iterations=60).theta
        value, _ = _model(form, theta, data)
        r = _less_group_mean(data.y - value, weight, member)
        total = weight.sum(1)
        used, weight = weight, 5 / (4 + (r / s[:, None]) ** 2) / (1 + (value / tau) ** 2)
        s = np.sqrt(np.sum(used * r**2, 1) / np.maximum(total - data.groups - 8, total / 4))
        s = np.maximum(s, LEAST_SD)

    # The two ends weigh runs each in its own way, so compare them on one scale: the first pass's weights, Student's t
    r = _less_group_mean(data.y - value, np.tile(first, (2, 1)), member)
    misfit = 2.5 * np.sum(first * np.log1p((r / s.min()) ** 2 / 4), 1) + 0.5 * np.sum(((theta - mean) / sd) ** 2, 1)
    best = int(np.argmin(misfit))
    return _evidence(form, tau, theta[best], float(s[best]), used[best], data, mean, precision)


def _less_group_mean(values: Array, weight: Array, member: Array) -> Array:
    """values (k, m) or (k, m, p) less the weighted mean of their group: offsets profiled out."""
    total = weight @ member
    if values.ndim == 2:
        return values - ((weight * values) @ member / total) @ member.T
    mean = np.swapaxes(member.T @ (weight[:, :, None] * values), 1, 2) / total[:, None, :]
    return values - np.swapaxes(mean @ member.T, 1, 2)


def _evidence(
    form: str, tau: float, theta: Array, s: float, weight: Array, data: Grouped, mean: Array, precision: Array
) -> BowlFit:
    """Linearise at the fit; each group's optimum is shifted by its own (lr, batch) of unknown sds, on a grid.

    The coefficients take the step to their mean under these shifts, in which groups count more alike than their runs.
    """
    value, jacobian = (v[0] for v in _model(form, theta[None], data))
    member, p = data.member, theta.size
    total = weight @ member
    offset = (weight * (data.y - value)) @ member / total
    slope = (member.T @ (weight[:, None] * jacobian)) / total[:, None]  # (groups, p)
    x = np.concatenate([jacobian - slope[data.group], (data.y - value - offset[data.group])[:, None]], 1) / s
    gram = np.stack([(x[i].T * weight[i]) @ x[i] for i in (data.group == g for g in range(data.groups))])

    prior = np.diag(precision)
    away = precision * (theta - mean)
    grid = np.array([(lr, batch) for lr in SHIFTS for batch in SHIFTS])
    score, covariance, steps = np.empty(len(grid)), np.empty((len(grid), p, p)), np.empty((len(grid), p))
    for i, sds in enumerate(grid):
        inner = np.eye(2) + sds[:, None] * gram[:, [0, 3]][:, :, [0, 3]] * sds  # (groups, 2, 2)
        across = sds[:, None] * gram[:, [0, 3]]  # (groups, 2, p + 1)
        left = np.sum(gram - np.swapaxes(across, 1, 2) @ np.linalg.solve(inner, across), 0)
        precise = left[:p, :p] + prior
        covariance[i] = np.linalg.inv(precise)
        pull = left[:p, p] - away
        steps[i] = covariance[i] @ pull
        misfit = left[p, p] - pull @ steps[i]
        log_prior = np.sum((np.log(sds / 0.1) / 0.5) ** 2)  # log-normal about .1
        score[i] = -0.5 * (np.linalg.slogdet(inner)[1].sum() + np.linalg.slogdet(precise)[1] + misfit + log_prior)
    cells = np.exp(score - score.max())
    cells /= cells.sum()
    spread = np.tensordot(cells, covariance, 1)
    floor_variance = s**2 / total + np.einsum("gp,pq,gq->g", slope, spread, slope)
    theta = theta.copy()
    theta[: B2 + 1] += (cells @ steps)[: B2 + 1]
    return BowlFit(form, tau, theta, s, covariance[:, : B2 + 1, : B2 + 1], grid, cells, offset, floor_variance)
