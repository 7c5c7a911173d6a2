"""A damped Newton method for many small smooth problems at once: all starts, or all bootstraps, in one batch.

Every fit of this package (the Huber fit of the loss law, its two averaged members, the bowls of learning rate and
batch) is one objective passed to `minimise`. A batch of a thousand five-parameter problems costs a few matrix products
per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scaling.common.arrays import Array

# Shapes: k problems, p parameters, m data.

# Values this small are zero up to rounding: residuals of 1e-11 and less.
NEGLIGIBLE = 1e-22


class LocalModel(NamedTuple):
    """An objective near a point: what a Newton step needs.

    Attributes:
        value: Shape (k,).
        gradient: Shape (k, p).
        hessian: Shape (k, p, p); it may be indefinite.
        metric: Shape (k, p, p), positive semidefinite. Steps are damped in this metric.
    """

    value: Array
    gradient: Array
    hessian: Array
    metric: Array


# A function of theta (k, p) and the indices of the problems (k,).
Objective: TypeAlias = Callable[[Array, NDArray[np.intp]], LocalModel]


class Minimum(NamedTuple):
    """Where each problem ended: theta (k, p), its value (k,), and whether it converged (k,)."""

    theta: Array
    value: Array
    converged: NDArray[np.bool_]


def minimise(
    objective: Objective,
    start: Array,
    *,
    lower: Array | None = None,
    upper: Array | None = None,
    iterations: int = 150,
    tolerance: float = 1e-13,
) -> Minimum:
    """Find local minima by Newton steps with Levenberg's damping, adapted for each problem separately.

    A step is kept only if it lowers the value, so the value never rises. A problem has converged when a lightly damped
    step gains less than `tolerance` of the value, or when no step of any length gains.

    Args:
        objective: The objective and its derivatives.
        start: Where to start, shape (k, p).
        lower: Lower bounds, shape (p,). A parameter at a bound toward which the gradient points is held there.
        upper: Upper bounds, shape (p,).
        iterations: The largest number of steps.
        tolerance: The relative gain below which a problem has converged.

    Returns:
        The minima; their values are never above those at the start.
    """
    k, p = start.shape
    low = np.full(p, -np.inf) if lower is None else lower
    high = np.full(p, np.inf) if upper is None else upper
    theta = np.clip(start, low, high)
    local = objective(theta, np.arange(k))
    damping = np.full(k, 1e-2)
    value, converged = local.value.copy(), np.zeros(k, bool)
    active = np.arange(k)
    for _ in range(iterations):
        current = theta[active]
        step = _compute_step(local, current, damping[active], low, high)
        trial = np.clip(current + step, low, high)
        new = objective(trial, active)
        gain = local.value - new.value
        # NaN is not better.
        better = gain > 0
        theta[active[better]] = trial[better]
        value[active] = np.where(better, new.value, local.value)
        small = np.where(np.isfinite(gain), np.abs(gain), np.inf) <= tolerance * np.abs(local.value) + NEGLIGIBLE
        done = (small & (damping[active] <= 1.0)) | (damping[active] > 1e9)
        damping[active] *= np.where(better, 0.15, 6.0)
        converged[active[done]] = True
        active = active[~done]
        if not active.size:
            break
        keep = better[~done]
        local = LocalModel(
            *(_select(keep, after[~done], before[~done]) for before, after in zip(local, new, strict=True))
        )
    return Minimum(theta, value, converged)


def _compute_step(local: LocalModel, theta: Array, damping: Array, low: Array, high: Array) -> Array:
    """Return the damped Newton step (k, p), zero in parameters that the gradient pushes against a bound."""
    held = ((theta <= low) & (local.gradient > 0)) | ((theta >= high) & (local.gradient < 0))
    diagonal = np.arange(theta.shape[1])
    scale = np.sqrt(local.metric[:, diagonal, diagonal])
    # A parameter that no data inform has no curvature: a small share of the largest one keeps it where it is.
    scale = np.maximum(scale, 1e-6 * scale.max(1, keepdims=True) + 1e-100)
    matrix = (local.hessian + damping[:, None, None] * local.metric) / scale[:, :, None] / scale[:, None, :]
    matrix = np.where(held[:, :, None] | held[:, None, :], 0.0, matrix)
    matrix[:, diagonal, diagonal] += np.where(held, 1.0, 1e-12)
    pull = (np.where(held, 0.0, local.gradient) / scale)[:, :, None]
    try:
        step = np.linalg.solve(matrix, pull)
    # Some problem of the batch has a direction without curvature: it gets a little.
    except np.linalg.LinAlgError:
        curvature, directions = np.linalg.eigh(matrix)
        curvature = np.maximum(np.abs(curvature), 1e-10)
        step = directions @ (np.swapaxes(directions, 1, 2) @ pull / curvature[:, :, None])
    return np.asarray(-step[:, :, 0] / scale)


def _select(mask: NDArray[np.bool_], yes: Array, no: Array) -> Array:
    """Select whole problems: `yes` where the mask (k,) holds, else `no`."""
    return np.asarray(np.where(mask.reshape(-1, *[1] * (yes.ndim - 1)), yes, no))


def evaluate_penalised_squares(
    residual: Array, jacobian: Array, weight: Array, away: Array, precision: Array
) -> LocalModel:
    """Return half of sum(weight residual²) + away' precision away, with its Gauss-Newton Hessian.

    The metric is the diagonal of the Hessian (Marquardt's scaling).

    Args:
        residual: Shape (k, m).
        jacobian: Of the model, not of the residual, shape (k, m, p).
        weight: Shape (k, m).
        away: Distance from the prior's centre, shape (k, p).
        precision: Of the prior, shape (p,) for a diagonal one, or (p, p).
    """
    weighted = jacobian * weight[:, :, None]
    hessian = np.swapaxes(weighted, 1, 2) @ jacobian
    p = len(precision)
    if precision.ndim == 1:
        hessian[:, np.arange(p), np.arange(p)] += precision
        pull = away * precision
    else:
        hessian += precision
        pull = away @ precision
    gradient = pull - (residual[:, None, :] @ weighted)[:, 0]
    value = 0.5 * (np.sum(weight * residual**2, 1) + np.sum(pull * away, 1))
    metric = np.zeros_like(hessian)
    metric[:, np.arange(p), np.arange(p)] = hessian[:, np.arange(p), np.arange(p)]
    return LocalModel(value, gradient, hessian, metric)
