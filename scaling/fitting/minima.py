"""The lowest loss of a group within the settings that it tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scaling.common.arrays import Array
from scaling.fitting.bowl import B2_INDEX, BowlFit
from scaling.fitting.groups import GroupedRuns

# Points along each axis of the settings that a group tried.
POINTS = 9


def compute_untried_depths(fits: Sequence[BowlFit], data: GroupedRuns, identified: Mapping[str, bool]) -> Array:
    """Return how far the minimum of the bowl lies below the lowest loss within the settings that each group tried.

    Those are all values between the smallest and the largest that the group tried of a setting whose optimum the runs
    identify, and the group's own values of any other setting: the shape of the bowl between them would be that of the
    prior.

    Args:
        fits: The bowls, which are averaged.
        data: The runs.
        identified: Whether the runs identify the optimum, for "lr" and "batch_tokens".

    Returns:
        Depths in ln L, at least 0, (groups,).
    """
    share = np.linspace(0, 1, POINTS)
    lr, batch = (
        np.minimum.reduceat(v, data.starts)[:, None]
        + (np.maximum.reduceat(v, data.starts) - np.minimum.reduceat(v, data.starts))[:, None] * share
        for v in (data.lr, data.batch)
    )
    n, d = data.sum(data.n) / data.counts, data.sum(data.d) / data.counts
    if identified["lr"] and identified["batch_tokens"]:
        u, v = np.repeat(lr, POINTS, axis=1), np.tile(batch, POINTS)
        return np.asarray(np.mean([_evaluate(fit, u, v, n, d).min(1) for fit in fits], 0))
    # One row for each run, of which the lowest of the group counts.
    if identified["lr"]:
        u, v = lr[data.group], np.repeat(data.batch[:, None], POINTS, axis=1)
    elif identified["batch_tokens"]:
        u, v = np.repeat(data.lr[:, None], POINTS, axis=1), batch[data.group]
    else:
        u, v = data.lr[:, None], data.batch[:, None]
    heights = [_evaluate(fit, u, v, n[data.group], d[data.group]).min(1) for fit in fits]
    return np.asarray(np.mean([np.minimum.reduceat(h, data.starts) for h in heights], 0))


def _evaluate(fit: BowlFit, lr: Array, batch: Array, n: Array, d: Array) -> Array:
    """Return the height (rows, points) of a bowl at ln lr and ln batch (rows, points), for n and d (rows,)."""
    a0, a1, a2, b0, b1, b2 = fit.theta[: B2_INDEX + 1]
    u, v = lr - (a0 + a1 * n + a2 * d)[:, None], batch - (b0 + b1 * d + b2 * n)[:, None]
    wide = [np.broadcast_to(x[:, None], u.shape).ravel() for x in (n, d)]
    return np.maximum(fit.height(u.ravel(), v.ravel(), *wide).reshape(u.shape), 0.0)
