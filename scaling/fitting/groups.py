"""Group runs of equal or nearly equal N and D, and sum over groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scaling.common.arrays import Array

# Logarithms that differ by less than this are one value, whatever lies beside them: the steps of a run rarely divide
# its tokens exactly.
SAME = 2e-3
# Logarithms that differ by less than this are one value if other values are much farther away.
CLOSE = 0.06
# How much farther: the gaps around a cluster are at least so many times its width.
SEPARATION = 3.0


def cluster_values(values: Array) -> NDArray[np.intp]:
    """Number the clusters of values on a line, in ascending order.

    A cluster is at most `SAME` wide, or at most `CLOSE` wide and set apart from its neighbours by gaps of at least
    `SEPARATION` times its width. So evenly spaced values, however dense, are not chained into one.

    Args:
        values: Logarithms, (m,).

    Returns:
        The cluster of each value, (m,).
    """
    distinct, inverse = np.unique(values, return_inverse=True)
    gaps = np.diff(distinct)
    first = np.zeros(distinct.size, bool)
    # Of each open range its ends, and the gaps on both sides.
    ranges = [(0, distinct.size - 1, np.inf, np.inf)] if distinct.size else []
    while ranges:
        start, end, before, after = ranges.pop()
        width = distinct[end] - distinct[start]
        if width <= SAME or (width <= CLOSE and SEPARATION * width <= min(before, after)):
            first[start] = True
            continue
        at = start + int(np.argmax(gaps[start:end]))
        ranges += [(start, at, before, float(gaps[at])), (at + 1, end, float(gaps[at]), after)]
    return np.asarray(np.cumsum(first) - 1)[inverse.ravel()]


@dataclass(frozen=True)
class Groups:
    """Runs sorted by group.

    Attributes:
        order: Indices of the runs, sorted by group, (m,).
        of: Group of each run in the original order, (m,).
        starts: Where each group begins in `order`, (groups,).
        counts: Number of runs in each group, (groups,).
        N: Geometric mean N of each group, (groups,).
        D: Geometric mean D of each group, (groups,).
    """

    order: NDArray[np.intp]
    of: NDArray[np.intp]
    starts: NDArray[np.intp]
    counts: NDArray[np.intp]
    N: Array
    D: Array


def group_runs(N: Array, D: Array) -> Groups:
    """Group runs of equal or nearly equal N and D.

    Args:
        N: Parameters that multiply tokens, (m,).
        D: Training tokens, (m,).

    Returns:
        The groups, sorted by N and then D. See `cluster_values` for what is nearly equal; D is compared among the runs
        of one N.
    """
    log_n, log_d = np.log(N), np.log(D)
    size = cluster_values(log_n)
    tokens = np.empty_like(size)
    by_size = np.argsort(size, kind="stable")
    for rows in np.split(by_size, np.flatnonzero(np.diff(size[by_size])) + 1):
        tokens[rows] = cluster_values(log_d[rows])
    order = np.lexsort((tokens, size))
    first = np.r_[True, (np.diff(size[order]) != 0) | (np.diff(tokens[order]) != 0)]
    starts = np.flatnonzero(first)
    counts = np.diff(np.r_[starts, order.size])
    of = np.empty_like(order)
    of[order] = np.cumsum(first) - 1
    return Groups(order, of, starts, counts, _average(N[order], starts, counts), _average(D[order], starts, counts))


def _average(values: Array, starts: NDArray[np.intp], counts: NDArray[np.intp]) -> Array:
    """Return the geometric mean of each group of sorted values, and exactly the value where all are equal."""
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return np.where(low == high, low, np.exp(np.add.reduceat(np.log(values), starts) / counts))


@dataclass(frozen=True)
class GroupedRuns:
    """Runs of several (N, D) groups, in logs and sorted by group.

    Attributes:
        y: ln loss, (m,).
        lr: ln of the learning rate, (m,).
        batch: ln of the batch size in tokens, (m,).
        n: ln N minus the mean over groups, (m,). Within a group it may differ a little.
        d: ln D minus the mean over groups, (m,).
        starts: Where each group begins, (groups,).
    """

    y: Array
    lr: Array
    batch: Array
    n: Array
    d: Array
    starts: NDArray[np.intp]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.starts.size)

    @property
    def counts(self) -> NDArray[np.intp]:
        """Number of runs in each group, (groups,)."""
        return np.asarray(np.diff(np.r_[self.starts, self.y.size]))

    @cached_property
    def group(self) -> NDArray[np.intp]:
        """Group of each run, (m,)."""
        return np.repeat(np.arange(self.groups), self.counts)

    def sum(self, values: Array, axis: int = -1) -> Array:
        """Sum over the runs of each group along an axis of length m."""
        return np.asarray(np.add.reduceat(values, self.starts, axis=axis))

    def select(self, rows: NDArray[np.intp]) -> GroupedRuns:
        """Return the runs of ascending rows, of which every group must keep one."""
        starts = np.searchsorted(self.group[rows], np.arange(self.groups))
        return GroupedRuns(self.y[rows], self.lr[rows], self.batch[rows], self.n[rows], self.d[rows], starts)
