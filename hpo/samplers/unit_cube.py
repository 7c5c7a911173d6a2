"""A search space as the unit cube, and back."""

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
    """How many evenly spaced values a parameter has; None when it is continuous or an integer on a log scale."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return math.floor((distribution.high - distribution.low) / distribution.step + 1e-8) + 1
    return None


def _find_range(distribution: IntDistribution | FloatDistribution) -> tuple[float, float]:
    """The values (or their logarithms) at 0 and 1 of a parameter without cells; integers get half a unit more."""
    half = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    low, high = distribution.low - half, distribution.high + half
    return (math.log(low), math.log(high)) if distribution.log else (low, high)


def check_distribution(
    name: str, distribution: BaseDistribution
) -> CategoricalDistribution | IntDistribution | FloatDistribution:
    if isinstance(distribution, CategoricalDistribution | IntDistribution | FloatDistribution):
        return distribution
    raise ValueError(f"{name}: needed a Float, Int or Categorical distribution, got {type(distribution).__name__}")


def _convert_to_unit(distribution: CategoricalDistribution | IntDistribution | FloatDistribution, value: Any) -> float:
    cells = _count_cells(distribution)
    if isinstance(distribution, CategoricalDistribution):
        return (int(distribution.to_internal_repr(value)) + 0.5) / len(distribution.choices)
    if cells is not None:
        assert distribution.step is not None  # only stepped parameters and categories have cells
        return float((round((value - distribution.low) / distribution.step) + 0.5) / cells)
    low, high = _find_range(distribution)
    raw = math.log(value) if distribution.log else float(value)
    return 0.5 if high == low else (raw - low) / (high - low)


def convert_from_unit(distribution: CategoricalDistribution | IntDistribution | FloatDistribution, unit: float) -> Any:
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
    """A search space as the unit cube, one coordinate per parameter in the order of the space's names.

    Continuous parameters fill [0, 1], logarithmic ones in their logarithm. One of k evenly spaced values or
    categories is the middle of one of k equal cells. A snapped point stands for values that exist: rounding comes
    before the model.
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
        return np.array([isinstance(d, CategoricalDistribution) for d in self.distributions.values()])

    def get_range(self, name: str) -> tuple[float, float]:
        """The values, or their logarithms, at 0 and 1 of a parameter that is a float or an integer on a log scale."""
        distribution = self.distributions[name]
        assert not isinstance(distribution, CategoricalDistribution)
        return _find_range(distribution)

    def to_unit(self, params: dict[str, Any]) -> Array:
        return np.array([_convert_to_unit(d, params[name]) for name, d in self.distributions.items()], float)

    def to_params(self, point: Array) -> dict[str, Any]:
        return {name: convert_from_unit(d, float(u)) for (name, d), u in zip(self.distributions.items(), point, strict=True)}

    def contains(self, trial: FrozenTrial) -> bool:
        """Whether the trial has a value inside the space for every parameter."""
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

    def snap(self, cube: Array) -> Array:
        out = np.empty_like(cube)
        for j, distribution in enumerate(self.distributions.values()):
            cells = _count_cells(distribution)
            if cells is not None:
                out[:, j] = (np.minimum(np.floor(cube[:, j] * cells), cells - 1) + 0.5) / cells
            elif isinstance(distribution, IntDistribution):
                low, high = _find_range(distribution)
                values = np.rint(np.exp(low + cube[:, j] * (high - low))).clip(distribution.low, distribution.high)
                out[:, j] = (np.log(values) - low) / (high - low)
            else:
                out[:, j] = 0.5 if distribution.single() else cube[:, j]
        return out

    def encode(self, cube: Array) -> Array:
        """Snapped points [m, p] -> model inputs [m, d]: numbers as they are, a category as k columns of 0 and 1."""
        columns = []
        for j, distribution in enumerate(self.distributions.values()):
            if isinstance(distribution, CategoricalDistribution):
                k = len(distribution.choices)
                columns.append(np.eye(k)[np.minimum((cube[:, j] * k).astype(int), k - 1)])
            else:
                columns.append(cube[:, j : j + 1])
        return np.hstack(columns)
