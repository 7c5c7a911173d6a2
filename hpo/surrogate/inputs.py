"""Inputs of the Gaussian process: the domain of the settings, fidelity axes, centres of belief."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scaling.common.arrays import Array

AXES = 2  # tokens, size: the last two columns of every model input


class Domain(Protocol):
    """The settings as a unit cube with one coordinate per parameter."""

    @property
    def nominal(self) -> NDArray[np.bool_]:
        """[p], which coordinates are categories without an order."""

    def snap(self, cube: Array) -> Array:
        """[m, p] -> [m, p], each point moved to the nearest one that stands for real settings."""

    def features(self, cube: Array) -> Array:
        """[m, p] -> [m, d], the model's inputs of snapped points."""


@dataclass(frozen=True)
class Centre:
    """A belief in the model's terms: feature columns [k], the centre at the target [k], and how it moves per unit of the
    two fidelity coordinates [2, k]; curvature: of the bowl, in units of z."""

    columns: tuple[int, ...]
    at_target: Array
    moves: Array
    curvature: float
