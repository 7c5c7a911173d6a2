"""One bowl for all sizes: its shapes, their priors, and the fit of one shape to grouped runs.

    ln L = offset of the (N, D) group + e^(en n + ed d) bowl(u + (kn n + kd d) v, v) + noise
    u = ln lr - (a0 + a1 n + a2 d),  v = ln B - (b0 + b1 d + b2 n),  n, d = ln N, ln D about the groups' mean

The bowl becomes flatter and turns slightly with size: on a public table of real runs its height falls as D^-0.14, and a
rigid bowl's optima were too high by 8 % in lr and 12 % in B, with this one by 3 and 6 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from scaling.common.arrays import Array
from scaling.fitting.averaging import evaluate_floor_form, make_form_prior
from scaling.fitting.groups import GroupedRuns
from scaling.fitting.newton import LocalModel, evaluate_penalised_squares, minimise

# theta: a0, a1 (n), a2 (d), b0, b1 (d), b2 (n); kn, kd, en, ed; then the shape, which is ln h1, ln h2, k, and c1..c4
# (cubic) or b, s1, s2 (exponential).

# A function of shape (k, q), and u, v (k, m). It returns the value and its derivatives by u and v, (k, m) each, and its
# derivative by the shape, (k, m, q).
BowlFunction: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Array, Array, Array]]

# Index of b2 in theta, and its prior sd.
B2_INDEX, B2_SD = 5, 0.2
# Indices of the exponents of N and D of lr*, and of D and N of B*, in theta.
LR_EXPONENTS, BATCH_EXPONENTS = (1, 2), (4, 5)
# Prior sds of the sums of these exponents. Where D is proportional to N, published laws have lr* ~ N^-0.41 and N^-0.25,
# and B* ~ N^0.57 and N^0.65 (arXiv 2503.04715, 2401.02954). None is known for lr* under muP.
LR_TOGETHER_SD, BATCH_TOGETHER_SD = 0.2, 0.2
TOGETHER = [(LR_EXPONENTS, LR_TOGETHER_SD), (BATCH_EXPONENTS, BATCH_TOGETHER_SD)]
# Index at which the shape begins in theta.
SHAPE_START = 10
# Bound of |ln| of the change of a height with size, far beyond any data.
MAX_LOG_STRETCH = 5.0
# Lower bound of the noise in ln L.
MIN_SD = 7e-4
# Number of coefficients of the base law, which stand at the end of theta while a bowl is fitted.
BASE_SIZE = 5
# Prior sd of a group's offset from the base law, in ln L. Measured on replayed designs (studies/LOG.md).
OFFSET_SD = 0.01
# The same in the first round, before the base law is known.
FIRST_OFFSET_SD = 0.1
# The first rounds see about so many runs of a larger table.
MAX_RUNS = 3000
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


def make_precision(sd: Array, mup: bool) -> Array:
    """Return the prior precision of theta, (p, p). How optima move when N and D grow together is known best."""
    precision = np.diag(sd**-2.0)
    known = [(BATCH_EXPONENTS, BATCH_TOGETHER_SD)] if mup else TOGETHER
    for exponents, together in known:
        precision[np.ix_(exponents, exponents)] += together**-2.0
    return precision


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
    """Fit one bowl by robust weighted least squares, together with a loss law and an offset of each group from it.

    The offsets are profiled out. The weights fade with the fitted height over tau, not with the measured gap, in six
    rounds from two starts. Of a large table, the first rounds see a random part.

    Args:
        form: "cubic" or "exponential".
        tau: Height (in ln L) at which a run's weight is half.
        data: The runs.
        prior: Mean and precision of theta, as from `make_prior` and `make_precision`.
    """
    base, base_mean, base_sd = _start_base_law(data)
    mean, precision = np.r_[prior[0], base_mean], block_diag(prior[1], np.diag(base_sd**-2.0))
    few = _thin_out(data)
    gap = _measure_gap(few, base)

    near = gap <= max(0.01, float(np.partition(gap, min(2, gap.size - 1))[min(2, gap.size - 1)]))
    start = np.r_[prior[0], base]
    centroid = start.copy()
    centroid[0] = np.mean((few.lr - mean[1] * few.n - mean[2] * few.d)[near])
    centroid[3] = np.mean((few.batch - mean[4] * few.d - mean[5] * few.n)[near])

    first = np.exp(-gap / tau)
    tie = np.full((2, data.groups), FIRST_OFFSET_SD**-2.0)
    weight = np.tile(first, (2, 1))
    theta, s, used, tie, value = _iterate_weights(
        form, tau, few, mean, precision, np.stack([start, centroid]), weight, np.full(2, 0.004), tie, 6
    )
    # Each of the two results weights the runs differently, so compare them on one scale: weights of the first round and
    # a Student t likelihood.
    r = _remove_offsets(few.y - value, weight / s.min() ** 2, tie, few)
    away = theta - mean
    misfit = 2.5 * np.sum(first * np.log1p((r / s.min()) ** 2 / 4), 1) + 0.5 * np.sum(away @ precision * away, 1)
    best = int(np.argmin(misfit))
    theta, s, used, tie = theta[best], s[best], used[best], tie[best]
    if few is not data:
        value, _ = _evaluate_with_base(form, theta[None], data)
        height, _ = evaluate_model(form, theta[None, : mean.size - BASE_SIZE], data)
        r = data.y - value
        r = r - _fit_offsets(r, np.ones_like(value) / s**2, tie[None], data)[:, data.group]
        weight = _compute_weights(r, height, np.full(1, s), tau)
        rounds = _iterate_weights(form, tau, data, mean, precision, theta[None], weight, np.full(1, s), tie[None], 1)
        theta, s, used, tie = (v[0] for v in rounds[:4])
    return _marginalise_shifts(form, tau, theta, float(s), used, tie, data, mean, precision)


def _iterate_weights(
    form: str,
    tau: float,
    data: GroupedRuns,
    mean: Array,
    precision: Array,
    theta: Array,
    weight: Array,
    s: Array,
    tie: Array,
    rounds: int,
) -> tuple[Array, Array, Array, Array, Array]:
    """Alternate least squares with the weights of runs and groups.

    Returns:
        theta (k, p), noise (k,), and the weights (k, m) and ties (k, groups) that gave them; the model (k, m).
    """
    for _ in range(rounds):

        def objective(
            at: Array, rows: NDArray[np.intp], weight: Array = weight, s: Array = s, tie: Array = tie
        ) -> LocalModel:
            w = weight[rows] / s[rows, None] ** 2
            value, jacobian = _evaluate_with_base(form, at, data)
            residual = _remove_offsets(data.y - value, w, tie[rows], data)
            return evaluate_penalised_squares(
                residual, _remove_offsets(jacobian, w, tie[rows], data), w, at - mean, precision
            )

        theta = minimise(objective, theta, tolerance=1e-9, iterations=60).theta
        value, _ = _evaluate_with_base(form, theta, data)
        height, _ = evaluate_model(form, theta[:, : mean.size - BASE_SIZE], data)
        w = weight / s[:, None] ** 2
        total = data.sum(w)
        freedom = weight.sum(1) - np.sum(total / (total + tie), 1) - 8
        r = data.y - value
        held, tie = tie, _tie_groups(r, w, data)
        r = r - _fit_offsets(r, w, held, data)[:, data.group]
        used, weight = weight, _compute_weights(r, height, s, tau)
        s = np.sqrt(np.sum(used * r**2, 1) / np.maximum(freedom, used.sum(1) / 4))
        s = np.maximum(s, MIN_SD)
    return theta, s, used, held, value


def _compute_weights(residual: Array, height: Array, s: Array, tau: float) -> Array:
    """Return the weights of the runs: they fade with the residual over the noise and with the height over tau."""
    return np.asarray(5 / (4 + (residual / s[:, None]) ** 2) / (1 + (height / tau) ** 2))


def _fit_offsets(residual: Array, weight: Array, tie: Array, data: GroupedRuns) -> Array:
    """Return the offset of each group from the base law, (k, groups).

    Args:
        residual: Shape (k, m).
        weight: Precision of each residual, (k, m).
        tie: Prior precision of each offset, (k, groups).
        data: The runs.
    """
    return data.sum(weight * residual) / (data.sum(weight) + tie)


def _tie_groups(residual: Array, weight: Array, data: GroupedRuns) -> Array:
    """Return the prior precision of each group's offset, (k, groups).

    It is that of a Cauchy distribution, so that groups far from the base law, such as those of another corpus, keep an
    offset of their own.
    """
    offset = data.sum(weight * residual) / data.sum(weight)
    scale = np.maximum(OFFSET_SD, 1.48 * np.median(np.abs(offset), axis=1, keepdims=True))
    return np.asarray(2 / (scale**2 + offset**2))


def _remove_offsets(values: Array, weight: Array, tie: Array, data: GroupedRuns) -> Array:
    """Subtract from values (k, m) or (k, m, p) a share of the weighted mean of their group.

    With the share 1 - sqrt(P / (W + P)), where W is the sum of a group's weights and P the prior precision of its
    offset, the weighted squares of the result are those that profiling the offset out leaves.
    """
    total = data.sum(weight)
    share = (1 - np.sqrt(tie / (total + tie))) / total
    if values.ndim == 2:
        return values - (share * data.sum(weight * values))[:, data.group]
    return values - (share[:, :, None] * data.sum(weight[:, :, None] * values, axis=1))[:, data.group]


def _evaluate_with_base(form: str, theta: Array, data: GroupedRuns) -> tuple[Array, Array]:
    """Evaluate base law plus bowl at the runs, (k, m), and its Jacobian, (k, m, p), for theta (k, p)."""
    value, jacobian = evaluate_model(form, theta[:, :-BASE_SIZE], data)
    law, by_law = evaluate_floor_form(theta[:, -BASE_SIZE:], data.n, data.d)
    return value + law, np.concatenate([jacobian, by_law], 2)


def _start_base_law(data: GroupedRuns) -> tuple[Array, Array, Array]:
    """Return the base law through the lowest runs, and mean and sd of its prior, (5,) each."""
    lowest = np.minimum.reduceat(data.y, data.starts)
    starts, mean, sd = (v[..., :BASE_SIZE] for v in make_form_prior("floor", lowest - lowest.mean()))
    level = float(lowest.mean())
    shift = np.array([level, 0, level, 0, level])
    starts, mean, precision = starts + shift, mean + shift, sd**-2.0
    n, d = data.n[data.starts], data.d[data.starts]
    weight = np.ones(lowest.size)
    theta = starts
    for _ in range(4):

        def objective(at: Array, _: NDArray[np.intp], weight: Array = weight) -> LocalModel:
            f, jacobian = evaluate_floor_form(at, n, d)
            return evaluate_penalised_squares(
                lowest - f, jacobian, np.broadcast_to(weight / 0.02**2, f.shape), at - mean, precision
            )

        ends = minimise(objective, theta, tolerance=1e-7, iterations=40)
        theta = ends.theta[[int(np.argmin(ends.value))]]
        # Groups of few runs lie above the law by how badly they are tuned, so their lower edge is sought.
        r = lowest - evaluate_floor_form(theta, n, d)[0][0]
        weight = np.where(r > 0, 1 / (1 + np.maximum(r, 0) / 0.02), 1.0)
    return theta[0], mean, sd


def _measure_gap(data: GroupedRuns, base: Array) -> Array:
    """Return how far each run lies above the lowest of its group, or above the base law where that is lower."""
    lowest = np.minimum.reduceat(data.y, data.starts)
    above = data.y - evaluate_floor_form(base[None], data.n, data.d)[0][0]
    return np.maximum(data.y - lowest[data.group], np.where(data.counts[data.group] < 3, above, 0.0))


def _thin_out(data: GroupedRuns) -> GroupedRuns:
    """Return a random part of a large table, in which every group keeps some runs."""
    if data.y.size <= MAX_RUNS:
        return data
    rng = np.random.default_rng(0)
    rank = np.empty(data.y.size, np.intp)
    shuffled = rng.permutation(data.y.size)
    order = shuffled[np.argsort(data.group[shuffled], kind="stable")]
    rank[order] = np.arange(data.y.size) - np.repeat(data.starts, data.counts)
    limit = int(np.sort(rank)[MAX_RUNS - 1]) + 1
    return data.select(np.flatnonzero(rank < limit))


def _marginalise_shifts(
    form: str,
    tau: float,
    theta: Array,
    s: float,
    weight: Array,
    tie: Array,
    data: GroupedRuns,
    mean: Array,
    precision: Array,
) -> BowlFit:
    """Linearise at the fit, and marginalise over a shift of each group's optimum, on a grid of its sds in lr and batch.

    The coefficients take the step to their mean under these shifts. It weights groups more equally than their numbers
    of runs would.
    """
    value, jacobian = (v[0] for v in _evaluate_with_base(form, theta[None], data))
    p = theta.size
    w = weight[None] / s**2
    rows = np.concatenate([jacobian, (data.y - value)[:, None]], 1)[None]
    x = _remove_offsets(rows, w, tie[None], data)[0] * np.sqrt(w[0])[:, None]
    gram = np.stack([part.T @ part for part in np.split(x, data.starts[1:])])

    away = precision @ (theta - mean)
    grid = np.array([(lr, batch) for lr in SHIFT_GRID for batch in SHIFT_GRID])
    score, covariance, steps = np.empty(len(grid)), np.empty((len(grid), p, p)), np.empty((len(grid), p))
    for i, sds in enumerate(grid):
        # Shapes (groups, 2, 2) and (groups, 2, p + 1).
        inner = np.eye(2) + sds[:, None] * gram[:, [0, 3]][:, :, [0, 3]] * sds
        across = sds[:, None] * gram[:, [0, 3]]
        left = np.sum(gram - np.swapaxes(across, 1, 2) @ np.linalg.solve(inner, across), 0)
        precise = left[:p, :p] + precision
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
    bowl = slice(0, p - BASE_SIZE)
    theta = theta.copy()
    theta[: B2_INDEX + 1] += (cells @ steps)[: B2_INDEX + 1]
    # The minimum of a group is the mean of its own runs, each lowered by the fitted height and moved along the base law
    # to the group's centre.
    height, by_bowl = (v[0] for v in evaluate_model(form, theta[None, bowl], data))
    law = evaluate_floor_form(theta[None, -BASE_SIZE:], data.n, data.d)[0][0]
    total = data.sum(weight)
    centre = data.sum(data.n) / data.counts, data.sum(data.d) / data.counts
    at_centre = evaluate_floor_form(theta[None, -BASE_SIZE:], *centre)[0][0]
    floors = data.sum(weight * (data.y - height - law)) / total + at_centre
    slope = data.sum(weight[:, None] * by_bowl, axis=0) / total[:, None]
    floor_variance = s**2 / total + np.einsum("gp,pq,gq->g", slope, spread[bowl, bowl], slope)
    kept = slice(0, B2_INDEX + 1)
    return BowlFit(form, tau, theta[bowl], s, covariance[:, kept, kept], grid, cells, floors, floor_variance)
