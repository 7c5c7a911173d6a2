"""A damped Newton method for many small smooth problems at once: all starts, or all bootstraps, in one batch.

Every fit of this package (the Huber fit of the loss law, its two averaged members, the learning-rate bowls) is one
objective handed to `minimise`; a batch of a thousand five-parameter problems costs a few matrix products per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scaling.common.arrays import Array

# k problems, p parameters, m data

TINY = 1e-22  # values this small are nil: residuals of 1e-11 and less, rounding


class Local(NamedTuple):
    """An objective near a point: what a Newton step needs."""

    value: Array  # (k,)
    gradient: Array  # (k, p)
    hessian: Array  # (k, p, p), may be indefinite
    metric: Array  # (k, p, p), positive semidefinite: steps are damped in this metric


Objective: TypeAlias = Callable[[Array, NDArray[np.intp]], Local]  # (theta (k, p), which problems (k,)) -> Local


class Minimum(NamedTuple):
    theta: Array  # (k, p)
    value: Array  # (k,)
    converged: NDArray[np.bool_]  # (k,)


def minimise(
    objective: Objective,
    start: Array,
    *,
    lower: Array | None = None,
    upper: Array | None = None,
    iterations: int = 150,
    tolerance: float = 1e-13,
) -> Minimum:
    """Local minima reached from `start` (k, p) by Newton steps with Levenberg's damping, each problem with its own.

    A step is kept only when it lowers the value, so the value never rises. `lower` and `upper` (p,) are a box: a
    parameter at a bound that the gradient pushes outward is held there. Done when a little-damped step gains less than
    `tolerance` of the value, or when no step of any length gains.
    """
    k, p = start.shape
    low = np.full(p, -np.inf) if lower is None else lower
    high = np.full(p, np.inf) if upper is None else upper
    theta = np.clip(start, low, high)
    at = objective(theta, np.arange(k))
    damping = np.full(k, 1e-2)
    value, converged = at.value.copy(), np.zeros(k, bool)
    active = np.arange(k)
    for _ in range(iterations):
        here = theta[active]
        step = _step(at, here, damping[active], low, high)
        trial = np.clip(here + step, low, high)
        new = objective(trial, active)
        gain = at.value - new.value
        better = gain > 0  # NaN is not better
        theta[active[better]] = trial[better]
        value[active] = np.where(better, new.value, at.value)
        small = np.where(np.isfinite(gain), np.abs(gain), np.inf) <= tolerance * np.abs(at.value) + TINY
        done = (small & (damping[active] <= 1.0)) | (damping[active] > 1e9)
        damping[active] *= np.where(better, 0.15, 6.0)
        converged[active[done]] = True
        active = active[~done]
        if not active.size:
            break
        keep = better[~done]
        at = Local(*(_where(keep, after[~done], before[~done]) for before, after in zip(at, new, strict=True)))
    return Minimum(theta, value, converged)


def _step(at: Local, theta: Array, damping: Array, low: Array, high: Array) -> Array:
    held = ((theta <= low) & (at.gradient > 0)) | ((theta >= high) & (at.gradient < 0))
    diagonal = np.arange(theta.shape[1])
    scale = np.sqrt(at.metric[:, diagonal, diagonal])
    # a parameter that no data see has no curvature at all: a sliver of the largest keeps it where it is
    scale = np.maximum(scale, 1e-6 * scale.max(1, keepdims=True) + 1e-100)
    matrix = (at.hessian + damping[:, None, None] * at.metric) / scale[:, :, None] / scale[:, None, :]
    matrix = np.where(held[:, :, None] | held[:, None, :], 0.0, matrix)
    matrix[:, diagonal, diagonal] += np.where(held, 1.0, 1e-12)
    pull = (np.where(held, 0.0, at.gradient) / scale)[:, :, None]
    try:
        step = np.linalg.solve(matrix, pull)
    except np.linalg.LinAlgError:  # some problem of the batch has a direction of no curvature: bend it up a little
        curvature, directions = np.linalg.eigh(matrix)
        curvature = np.maximum(np.abs(curvature), 1e-10)
        step = directions @ (np.swapaxes(directions, 1, 2) @ pull / curvature[:, :, None])
    return np.asarray(-step[:, :, 0] / scale)


def _where(mask: NDArray[np.bool_], yes: Array, no: Array) -> Array:
    return np.asarray(np.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no))


def penalised_squares(residual: Array, jacobian: Array, weight: Array, away: Array, precision: Array) -> Local:
    """Half of sum(weight residual²) + away' diag(precision) away, by Gauss-Newton.

    residual, weight (k, m); jacobian (k, m, p) of the model, not of the residual; away (k, p) from the prior's centre;
    precision (p,). Marquardt's scaling: the metric is the diagonal.
    """
    weighted = jacobian * weight[:, :, None]
    hessian = np.swapaxes(weighted, 1, 2) @ jacobian
    p = precision.size
    hessian[:, np.arange(p), np.arange(p)] += precision
    gradient = away * precision - (residual[:, None, :] @ weighted)[:, 0]
    value = 0.5 * (np.sum(weight * residual**2, 1) + np.sum(precision * away**2, 1))
    metric = np.zeros_like(hessian)
    metric[:, np.arange(p), np.arange(p)] = hessian[:, np.arange(p), np.arange(p)]
    return Local(value, gradient, hessian, metric)
