"""Map a search space to the unit cube, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from scaling.common.arrays import Array


def _count_cells(distribution: BaseDistribution) -> int | None:
    """Return the number of evenly spaced values; None for a continuous parameter or an integer on a log scale."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return math.floor((distribution.high - distribution.low) / distribution.step + 1e-8) + 1
    return None


def _find_range(distribution: IntDistribution | FloatDistribution) -> tuple[float, float]:
    """Return the values (or their logarithms) at 0 and 1 of a parameter without cells.

    The range of an integer extends half a unit beyond both ends.
    """
    half = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    low, high = distribution.low - half, distribution.high + half
    return (math.log(low), math.log(high)) if distribution.log else (low, high)


def check_distribution(
    name: str, distribution: BaseDistribution
) -> CategoricalDistribution | IntDistribution | FloatDistribution:
    """Return a distribution of a supported kind; raise ValueError for any other."""
    if isinstance(distribution, CategoricalDistribution | IntDistribution | FloatDistribution):
        return distribution
    raise ValueError(f"{name}: needed a Float, Int or Categorical distribution, got {type(distribution).__name__}")


def _convert_to_unit(distribution: CategoricalDistribution | IntDistribution | FloatDistribution, value: Any) -> float:
    """Return the coordinate of a value."""
    cells = _count_cells(distribution)
    if isinstance(distribution, CategoricalDistribution):
        return (int(distribution.to_internal_repr(value)) + 0.5) / len(distribution.choices)
    if cells is not None:
        # Only parameters with a step have cells.
        assert distribution.step is not None
        return float((round((value - distribution.low) / distribution.step) + 0.5) / cells)
    low, high = _find_range(distribution)
    raw = math.log(value) if distribution.log else float(value)
    return 0.5 if high == low else (raw - low) / (high - low)


def convert_from_unit(distribution: CategoricalDistribution | IntDistribution | FloatDistribution, unit: float) -> Any:
    """Return the value at a coordinate between 0 and 1."""
    cells = _count_cells(distribution)
    if cells is not None:
        k = min(int(unit * cells), cells - 1)
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices[k]
        assert distribution.step is not None
        value = distribution.low + k * distribution.step
        return value if isinstance(distribution, IntDistribution) else min(float(value), distribution.high)
    assert not isinstance(distribution, CategoricalDistribution)
    low, high = _find_range(distribution)
    raw = low + unit * (high - low)
    value = min(max(math.exp(raw) if distribution.log else raw, distribution.low), distribution.high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)


@dataclass(frozen=True)
class Cube:
    """A search space as the unit cube, with one coordinate per parameter in the order of the space.

    Continuous parameters fill [0, 1], logarithmic ones in their logarithm. One of k evenly spaced values or categories
    is the middle of one of k equal cells. A snapped point stands for values that exist, so the model sees rounded
    values.

    Attributes:
        space: Distributions by name.
        distributions: The same, checked to be of a supported kind.

    Raises:
        ValueError: If the space is empty, or a distribution is not a float, int or categorical one.
    """

    space: dict[str, BaseDistribution]
    distributions: dict[str, CategoricalDistribution | IntDistribution | FloatDistribution] = field(init=False)

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("a search space needs at least one parameter, got none: add a distribution")
        kinds = {name: check_distribution(name, distribution) for name, distribution in self.space.items()}
        object.__setattr__(self, "distributions", kinds)

    @cached_property
    def nominal(self) -> NDArray[np.bool_]:
        """Which coordinates are categories, [p]."""
        return np.array([isinstance(d, CategoricalDistribution) for d in self.distributions.values()])

    def get_range(self, name: str) -> tuple[float, float]:
        """Return the values, or their logarithms, at 0 and 1 of a float, or of an integer on a log scale."""
        distribution = self.distributions[name]
        assert not isinstance(distribution, CategoricalDistribution)
        return _find_range(distribution)

    def to_unit(self, params: dict[str, Any]) -> Array:
        """Return the cube point [p] of settings."""
        return np.array([_convert_to_unit(d, params[name]) for name, d in self.distributions.items()], float)

    def to_params(self, point: Array) -> dict[str, Any]:
        """Return the settings at a cube point [p]."""
        return {
            name: convert_from_unit(d, float(u)) for (name, d), u in zip(self.distributions.items(), point, strict=True)
        }

    def contains(self, trial: FrozenTrial) -> bool:
        """Return whether the trial has a value inside the space for every parameter."""
        for name, distribution in self.distributions.items():
            if name not in trial.params:
                return False
            value = trial.params[name]
            if isinstance(distribution, CategoricalDistribution):
                if value not in distribution.choices:
                    return False
            elif isinstance(value, str | bool) or value is None or not distribution.low <= value <= distribution.high:
                return False
        return True

    def snap(self, points: Array) -> Array:
        """Move each point [m, p] to the nearest one that stands for existing values."""
        out = np.empty_like(points)
        for j, distribution in enumerate(self.distributions.values()):
            cells = _count_cells(distribution)
            if cells is not None:
                out[:, j] = (np.minimum(np.floor(points[:, j] * cells), cells - 1) + 0.5) / cells
            elif isinstance(distribution, IntDistribution):
                low, high = _find_range(distribution)
                values = np.rint(np.exp(low + points[:, j] * (high - low))).clip(distribution.low, distribution.high)
                out[:, j] = (np.log(values) - low) / (high - low)
            else:
                out[:, j] = 0.5 if distribution.single() else points[:, j]
        return out

    def encode(self, points: Array) -> Array:
        """Turn snapped points [m, p] into model inputs [m, d]: a category becomes k columns of 0 and 1."""
        columns = []
        for j, distribution in enumerate(self.distributions.values()):
            if isinstance(distribution, CategoricalDistribution):
                k = len(distribution.choices)
                columns.append(np.eye(k)[np.minimum((points[:, j] * k).astype(int), k - 1)])
            else:
                columns.append(points[:, j : j + 1])
        return np.hstack(columns)
