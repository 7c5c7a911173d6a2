"""Inputs of the Gaussian process: settings, fidelity coordinates, standardised losses, and the prior on the optimum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scaling.common.arrays import Array
from scaling.laws.compute import Fidelity

# The fidelity axes are tokens and size: the last two columns of every model input.
AXES = 2
# Excess losses are compressed above this many upper quartiles.
TAIL_START = 1.0


class Domain(Protocol):
    """The settings as a unit cube with one coordinate per parameter."""

    @property
    def nominal(self) -> NDArray[np.bool_]:
        """Which coordinates are categories without an order, [p]."""

    def snap(self, points: Array) -> Array:
        """Move each point [m, p] to the nearest one that stands for real settings, [m, p]."""

    def encode(self, points: Array) -> Array:
        """Turn snapped points [m, p] into model inputs [m, d]."""


@dataclass(frozen=True)
class BowlPrior:
    """A quadratic bowl over some feature columns, the prior mean of the Gaussian process.

    Attributes:
        columns: Indices of the k feature columns that the bowl depends on.
        at_target: Centre of the bowl at the target, [k].
        moves: Shift of the centre per unit of each fidelity coordinate, [2, k].
        curvature: Height of the bowl at a distance of 1 from its centre, in units of z (see `hpo.surrogate.gp`).
    """

    columns: tuple[int, ...]
    at_target: Array
    moves: Array
    curvature: float


def compute_fidelity_coordinates(levels: Sequence[Fidelity], target: Fidelity) -> Array:
    """Return the coordinates (t, s) of fidelities, as defined in `hpo.surrogate.kernel`.

    Args:
        levels: The n fidelities. The lowest of them gets the coordinate 1 on each axis.
        target: The fidelity at (0, 0). Levels beyond it get negative coordinates.

    Returns:
        Coordinates [n, 2].

    Raises:
        ValueError: If a token count or a size is not positive and finite.
    """
    sizes = np.array([[f.D, f.N] for f in levels], float).reshape(-1, AXES)
    if not (np.isfinite(sizes).all() and (sizes > 0).all() and target.N > 0 and target.D > 0):
        raise ValueError("fidelities need positive, finite N and D: check the trials' 'tokens' and 'N', and the target")
    below = np.log(np.array([target.D, target.N], float)) - np.log(sizes)
    span = np.abs(below).max(axis=0, initial=0.0)
    coordinates: Array = np.divide(below, span, out=np.zeros_like(below), where=span > 1e-12)
    return coordinates


def standardise(y: Array, level: NDArray[np.int64]) -> tuple[Array, float, float]:
    """Standardise losses and compress their upper tail: z = (y' - offset) / scale.

    With b the lowest loss of a level, y' = y up to an excess of c over b, and b + c (1 + ln((y - b) / c)) above it, so
    that the slopes agree where the parts meet. c is `TAIL_START` times the upper quartile of the positive excesses of
    all levels. (A search that has settled has a small median excess, and compression by the median would distort what
    it learned earlier.) A loss that is not finite counts as the worst finite loss of its level, or of all levels when
    its own has none.

    The alternative of compressing from b upwards, c ln(1 + (y - b) / c), distorts each level according to where its
    best run happens to lie. With two or three runs per level this hid the drift of a planted optimum (25 runs on nine
    levels: errors up to a third of the cube, against 0.05).

    Args:
        y: Losses [n].
        level: Level ids [n].

    Returns:
        z [n], offset, scale.

    Raises:
        ValueError: If no loss is finite.
    """
    finite = np.isfinite(y)
    if not finite.any():
        raise ValueError("a surrogate needs at least one finite loss, got none: run other settings first")
    y, best = y.copy(), np.empty_like(y)
    for level_id in np.unique(level):
        in_level = level == level_id
        worst = y[in_level & finite] if (in_level & finite).any() else y[finite]
        y[in_level & ~finite] = worst.max()
        best[in_level] = y[in_level].min()
    excess = y - best
    if (excess > 0).any():
        c = TAIL_START * float(np.quantile(excess[excess > 0], 0.75))
        y = best + np.where(excess > c, c * (1.0 + np.log(np.maximum(excess, c) / c)), excess)
    _, ids = np.unique(level, return_inverse=True)
    within = y - (np.bincount(ids, y) / np.bincount(ids))[ids]
    freedom = len(y) - int(ids.max()) - 1
    scale = math.sqrt(float(within @ within) / freedom) if freedom > 0 else 0.0
    tiny = 1e-12 * max(1.0, float(np.abs(y).max()))
    # One run per level, or equal losses.
    if scale <= tiny:
        scale = float(y.std()) if float(y.std()) > tiny else 1.0
    offset = float(y.mean())
    return (y - offset) / scale, offset, scale
