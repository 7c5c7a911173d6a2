"""One bowl for all sizes: its shapes, their priors, and the fit of one shape to grouped runs.

    ln L = offset of the (N, D) group + e^(en n + ed d) bowl(u + (kn n + kd d) v, v) + noise
    u = ln lr - (a0 + a1 n + a2 d),  v = ln B - (b0 + b1 d + b2 n),  n, d = ln N, ln D about the groups' mean

The bowl becomes flatter and turns slightly with size: on a public table of real runs its height falls as D^-0.14. With
one rigid bowl the optima of the groups were too high by 8 % in lr and 12 % in B, with this one by 3 and 6 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from scaling.common.arrays import Array
from scaling.fitting.newton import LocalModel, evaluate_penalised_squares, minimise

# theta: a0, a1 (n), a2 (d), b0, b1 (d), b2 (n); kn, kd, en, ed; then the shape, which is ln h1, ln h2, k, and c1..c4
# (cubic) or b, s1, s2 (exponential).

# A function of shape (k, q), and u, v (k, m). It returns the value and its derivatives by u and v, (k, m) each, and its
# derivative by the shape, (k, m, q).
BowlFunction: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Array, Array, Array]]

# Index of b2 in theta.
B2_INDEX = 5
# Prior sd of b2.
B2_SD = 0.2
# Index at which the shape begins in theta.
SHAPE_START = 10
# Bound of |ln| of the change of a height with size, far beyond any data.
MAX_LOG_STRETCH = 5.0
# Lower bound of the noise in ln L.
MIN_SD = 7e-4
# Candidates for the sd of a group's own optimum about the law.
SHIFT_GRID = np.array([0.03, 0.05, 0.08, 0.12, 0.2, 0.3])


@dataclass(frozen=True)
class BowlFit:
    """One of the averaged bowls, fitted.

    A cell is a pair of assumed standard deviations of the groups' own shifts.

    Attributes:
        form: "cubic" or "exponential".
        tau: Height (in ln L) at which the weights of the runs fade.
        theta: Coefficients, (10 + shape,): see `scaling.fitting.bowl`.
        noise: Standard deviation of ln L of one run.
        covariance: Covariance of the six coefficients of the optimum in each cell, (cells, 6, 6).
        shifts: Standard deviation of a group's own shift of ln lr* and ln B* in each cell, (cells, 2).
        cells: Weights of the cells, with sum 1, (cells,).
        floors: Fitted minimum of ln L in each group, (groups,).
        floor_variance: Variance of these minima, (groups,).
        weight: Weight of this fit in the average.
    """

    form: str
    tau: float
    theta: Array
    noise: float
    covariance: Array
    shifts: Array
    cells: Array
    floors: Array
    floor_variance: Array
    weight: float = 1.0

    def height(self, u: Array, v: Array, n: Array | float, d: Array | float) -> Array:
        """Return ln L above the minimum.

        Args:
            u: ln lr minus ln lr*, (m,).
            v: ln B minus ln B*, (m,).
            n: ln N minus the mean of the groups, (m,) or a number.
            d: ln D minus the mean of the groups, (m,) or a number.
        """
        kn, kd, en, ed = self.theta[B2_INDEX + 1 : SHAPE_START]
        scale = np.exp(np.clip(en * n + ed * d, -MAX_LOG_STRETCH, MAX_LOG_STRETCH))
        turned = u + (kn * n + kd * d) * v
        return np.asarray(scale * BOWLS[self.form](self.theta[None, SHAPE_START:], turned[None], v[None])[0][0])

    @property
    def spread(self) -> Array:
        """Covariance of the six coefficients, averaged over the cells, (6, 6)."""
        return np.asarray(np.tensordot(self.cells, self.covariance, 1))

    def without_b2(self, weight: float) -> BowlFit:
        """Return the fit conditioned on a B* that does not move with N. weight: its weight in the average."""
        along = self.spread[:, B2_INDEX] / self.spread[B2_INDEX, B2_INDEX]
        theta = self.theta.copy()
        theta[: B2_INDEX + 1] -= along * self.theta[B2_INDEX]
        column = self.covariance[:, :, B2_INDEX]
        removed = column[:, :, None] * column[:, None, :] / column[:, B2_INDEX, None, None]
        return replace(self, theta=theta, covariance=self.covariance - removed, weight=weight)


@dataclass(frozen=True)
class GroupedRuns:
    """Runs of several (N, D) groups, in logs.

    Attributes:
        y: ln loss, (m,).
        lr: ln of the learning rate, (m,).
        batch: ln of the batch size in tokens, (m,).
        n: ln N minus the mean over groups, (m,).
        d: ln D minus the mean over groups, (m,).
        group: Index of the group of each run, (m,).
        groups: Number of groups.
    """

    y: Array
    lr: Array
    batch: Array
    n: Array
    d: Array
    group: NDArray[np.intp]
    groups: int

    @property
    def one_hot(self) -> Array:
        """One-hot groups of the runs, (m, groups): group sums are matrix products."""
        return np.eye(self.groups)[self.group]


def evaluate_cubic(shape: Array, u: Array, v: Array) -> tuple[Array, Array, Array, Array]:
    """Evaluate h1 (u + k v)² + h2 v² + c1 u³ + c2 u² v + c3 u v² + c4 v³ and its derivatives; see `BowlFunction`."""
    log_h1, log_h2, k, c1, c2, c3, c4 = shape.T[:, :, None]
    h1, h2, z = np.exp(np.clip(log_h1, -30, 30)), np.exp(np.clip(log_h2, -30, 30)), u + k * v
    first, second = h1 * z * z, h2 * v * v
    uu, uv, vv = u * u, u * v, v * v
    value = first + second + c1 * uu * u + c2 * uu * v + c3 * u * vv + c4 * vv * v
    by_u = 2 * h1 * z + 3 * c1 * uu + 2 * c2 * uv + c3 * vv
    by_v = 2 * h1 * z * k + 2 * h2 * v + c2 * uu + 2 * c3 * uv + 3 * c4 * vv
    return value, by_u, by_v, np.stack([first, second, 2 * h1 * z * v, uu * u, uu * v, u * vv, vv * v], 2)


def evaluate_exponential(shape: Array, u: Array, v: Array) -> tuple[Array, Array, Array, Array]:
    """Evaluate h1 phi(u + k v; s1) + h2 phi(v + b u; s2), which is convex and steeper on one side.

    The derivatives are those of `BowlFunction`.
    """
    log_h1, log_h2, k, b, s1, s2 = shape.T[:, :, None]
    h1, h2 = np.exp(np.clip(log_h1, -30, 30)), np.exp(np.clip(log_h2, -30, 30))
    f1, z1, t1 = phi(u + k * v, s1)
    f2, z2, t2 = phi(v + b * u, s2)
    by_u, by_v = h1 * z1 + h2 * z2 * b, h1 * z1 * k + h2 * z2
    by_shape = np.stack([h1 * f1, h2 * f2, h1 * z1 * v, h2 * z2 * u, h1 * t1, h2 * t2], 2)
    return h1 * f1 + h2 * f2, by_u, by_v, by_shape


def phi(z: Array, s: Array) -> tuple[Array, Array, Array]:
    """Evaluate phi(z; s) = 2 (e^(sz) - sz - 1) / s², which is z² at s = 0, and its derivatives by z and s."""
    x = np.clip(s * z, -40.0, 40.0)
    tiny = np.abs(x) < 1e-2
    safe = np.where(tiny, 1.0, x)
    grown, inverse, zz = np.expm1(safe), 1 / safe, z * z
    rest = 2 * (grown - safe) * inverse * inverse
    g = np.where(tiny, 1 + x * (1 / 3 + x * (1 / 12 + x / 60)), rest)
    slope = np.where(tiny, 1 / 3 + x * (1 / 6 + x * (1 / 20 + x / 90)), 2 * (grown * inverse - rest) * inverse)
    first = np.where(tiny, 1 + x * (1 / 2 + x * (1 / 6 + x / 24)), grown * inverse)
    return zz * g, 2 * z * first, zz * z * slope


BOWLS: dict[str, BowlFunction] = {"cubic": evaluate_cubic, "exponential": evaluate_exponential}


def make_prior(form: str, centre: tuple[float, float], mup: bool) -> tuple[Array, Array]:
    """Return the mean and the standard deviation of the prior of theta.

    It is centred on the exponents of Step Law (arXiv 2503.04715) and wider. On small sweeps the prior was measured to
    matter.

    Args:
        form: "cubic" or "exponential".
        centre: Means of ln N and ln D over the groups.
        mup: Whether learning rates are those of the base width under muP.
    """
    if mup:
        # Assumed, not measured: at base width muP keeps lr* constant in N. With tokens it falls as D^-0.32 at a fixed
        # batch (arXiv 2409.19913), plus about half of the batch's exponent. The level is the default of the proxies.
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


def evaluate_model(form: str, theta: Array, data: GroupedRuns) -> tuple[Array, Array]:
    """Evaluate the bowl at the runs, (k, m), and its Jacobian, (k, m, p), for theta (k, p)."""
    a0, a1, a2, b0, b1, b2, kn, kd, en, ed = theta[:, :SHAPE_START].T[:, :, None]
    n, d = data.n, data.d
    u, v, turn = data.lr - (a0 + a1 * n + a2 * d), data.batch - (b0 + b1 * d + b2 * n), kn * n + kd * d
    scale = np.exp(np.clip(en * n + ed * d, -MAX_LOG_STRETCH, MAX_LOG_STRETCH))
    value, by_u, by_v, by_shape = BOWLS[form](theta[:, SHAPE_START:], u + turn * v, v)
    value, by_u, by_v = scale * value, scale * by_u, scale * by_v
    twist = by_u * v
    by_v = by_v + turn * by_u
    columns = [-by_u, -by_u * n, -by_u * d, -by_v, -by_v * d, -by_v * n, twist * n, twist * d, value * n, value * d]
    return value, np.concatenate([np.stack(columns, 2), scale[:, :, None] * by_shape], 2)


def fit_bowl(form: str, tau: float, data: GroupedRuns, prior: tuple[Array, Array]) -> BowlFit:
    """Fit one bowl by robust weighted least squares, with the offsets of the groups profiled out.

    The weights fade with the fitted height over tau, not with the measured gap, in six rounds from two starts.

    Args:
        form: "cubic" or "exponential".
        tau: Height (in ln L) at which a run's weight is half.
        data: The runs.
        prior: Mean and standard deviation of theta, as from `make_prior`.
    """
    mean, sd = prior
    precision = sd**-2.0
    one_hot = data.one_hot
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

        def objective(at: Array, rows: NDArray[np.intp], weight: Array = weight, s: Array = s) -> LocalModel:
            w = weight[rows]
            value, jacobian = evaluate_model(form, at, data)
            r, jacobian = _subtract_group_means(data.y - value, w, one_hot), _subtract_group_means(jacobian, w, one_hot)
            return evaluate_penalised_squares(r, jacobian, w / s[rows, None] ** 2, at - mean, precision)

        theta = minimise(objective, theta, tolerance=1e-9, iterations=60).theta
        value, _ = evaluate_model(form, theta, data)
        r = _subtract_group_means(data.y - value, weight, one_hot)
        total = weight.sum(1)
        used, weight = weight, 5 / (4 + (r / s[:, None]) ** 2) / (1 + (value / tau) ** 2)
        s = np.sqrt(np.sum(used * r**2, 1) / np.maximum(total - data.groups - 8, total / 4))
        s = np.maximum(s, MIN_SD)

    # Each of the two results weights the runs differently, so compare them on one scale: weights of the first round and
    # a Student t likelihood.
    r = _subtract_group_means(data.y - value, np.tile(first, (2, 1)), one_hot)
    misfit = 2.5 * np.sum(first * np.log1p((r / s.min()) ** 2 / 4), 1) + 0.5 * np.sum(((theta - mean) / sd) ** 2, 1)
    best = int(np.argmin(misfit))
    return _marginalise_shifts(form, tau, theta[best], float(s[best]), used[best], data, mean, precision)


def _subtract_group_means(values: Array, weight: Array, one_hot: Array) -> Array:
    """Subtract from values (k, m) or (k, m, p) the weighted mean of their group, which profiles the offsets out."""
    total = weight @ one_hot
    if values.ndim == 2:
        return values - ((weight * values) @ one_hot / total) @ one_hot.T
    mean = np.swapaxes(one_hot.T @ (weight[:, :, None] * values), 1, 2) / total[:, None, :]
    return values - np.swapaxes(mean @ one_hot.T, 1, 2)


def _marginalise_shifts(
    form: str, tau: float, theta: Array, s: float, weight: Array, data: GroupedRuns, mean: Array, precision: Array
) -> BowlFit:
    """Linearise at the fit, and marginalise over a shift of each group's optimum, on a grid of its sds in lr and batch.

    The coefficients take the step to their mean under these shifts. It weights groups more equally than their numbers
    of runs would.
    """
    value, jacobian = (v[0] for v in evaluate_model(form, theta[None], data))
    one_hot, p = data.one_hot, theta.size
    total = weight @ one_hot
    offset = (weight * (data.y - value)) @ one_hot / total
    # Shape (groups, p).
    slope = (one_hot.T @ (weight[:, None] * jacobian)) / total[:, None]
    x = np.concatenate([jacobian - slope[data.group], (data.y - value - offset[data.group])[:, None]], 1) / s
    gram = np.stack([(x[i].T * weight[i]) @ x[i] for i in (data.group == g for g in range(data.groups))])

    prior = np.diag(precision)
    away = precision * (theta - mean)
    grid = np.array([(lr, batch) for lr in SHIFT_GRID for batch in SHIFT_GRID])
    score, covariance, steps = np.empty(len(grid)), np.empty((len(grid), p, p)), np.empty((len(grid), p))
    for i, sds in enumerate(grid):
        # Shapes (groups, 2, 2) and (groups, 2, p + 1).
        inner = np.eye(2) + sds[:, None] * gram[:, [0, 3]][:, :, [0, 3]] * sds
        across = sds[:, None] * gram[:, [0, 3]]
        left = np.sum(gram - np.swapaxes(across, 1, 2) @ np.linalg.solve(inner, across), 0)
        precise = left[:p, :p] + prior
        covariance[i] = np.linalg.inv(precise)
        pull = left[:p, p] - away
        steps[i] = covariance[i] @ pull
        misfit = left[p, p] - pull @ steps[i]
        # A log-normal prior of the shifts about 0.1.
        log_prior = np.sum((np.log(sds / 0.1) / 0.5) ** 2)
        score[i] = -0.5 * (np.linalg.slogdet(inner)[1].sum() + np.linalg.slogdet(precise)[1] + misfit + log_prior)
    cells = np.exp(score - score.max())
    cells /= cells.sum()
    spread = np.tensordot(cells, covariance, 1)
    floor_variance = s**2 / total + np.einsum("gp,pq,gq->g", slope, spread, slope)
    theta = theta.copy()
    theta[: B2_INDEX + 1] += (cells @ steps)[: B2_INDEX + 1]
    return BowlFit(
        form, tau, theta, s, covariance[:, : B2_INDEX + 1, : B2_INDEX + 1], grid, cells, offset, floor_variance
    )
