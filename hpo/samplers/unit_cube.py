"""Map a search space to the unit cube, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from scaling.common.arrays import Array


def find_equal_choices(choices: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return the pairs of choices that an Optuna study cannot tell apart, such as 0 and False, or 1 and 1.0.

    It stores a choice as the index of the first one that is equal, so the later one would never be run.
    """
    pairs = []
    for i, later in enumerate(choices):
        for earlier in choices[:i]:
            # NaN is no choice that a study can find again, either.
            if earlier == later or (earlier != earlier and later != later):
                pairs.append((earlier, later))
                break
    return pairs


def describe_equal_choices(pairs: Sequence[tuple[Any, Any]]) -> str:
    """Return what is wrong with equal choices and what to do, to be put after the name of their parameter."""
    named = ", ".join(f"{earlier!r} and {later!r}" for earlier, later in pairs)
    remedy = "" if all(isinstance(choice, str) for pair in pairs for choice in pair) else ", or write both as text"
    return f"the choices {named} are equal, so the later one would never be run: remove one of them{remedy}"


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


def find_wrong_values(space: Mapping[str, BaseDistribution], params: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each parameter of a space whose value is outside its distribution. Others are ignored."""
    problems = []
    for name, value in params.items():
        if name not in space:
            continue
        distribution = check_distribution(name, space[name])
        if isinstance(distribution, CategoricalDistribution):
            needed = None if value in distribution.choices else f"one of {', '.join(map(repr, distribution.choices))}"
        else:
            needed = _describe_range(distribution, value)
        if needed is not None:
            problems.append(f"{name}: needed {needed}, got {value!r}")
    return problems


def _describe_range(distribution: IntDistribution | FloatDistribution, value: Any) -> str | None:
    """Return which numbers a distribution contains if the value is none of them, else None."""
    low, step = distribution.low, distribution.step
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and low <= value <= distribution.high:
        steps = (float(value) - low) / step if step else 0.0
        if abs(steps - round(steps)) < 1e-8:
            return None
    kind = "a whole number" if isinstance(distribution, IntDistribution) else "a number"
    grid = f" in steps of {step:g}" if step and step != 1 else ""
    return f"{kind} from {low:g} to {distribution.high:g}{grid}"


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

    def complete_to_unit(self, params: dict[str, Any], seed: int) -> Array:
        """Return the cube point [p] of settings that may lack parameters, which are drawn uniformly.

        A trial that failed before it had all parameters fails whatever the others are, and different draws show that.
        """
        drawn = self.snap(np.random.default_rng(seed).random((1, len(self.distributions))))[0]
        items = self.distributions.items()
        known = [_convert_to_unit(d, params[name]) if name in params else drawn[j] for j, (name, d) in enumerate(items)]
        return np.array(known, float)

    def contains(self, trial: FrozenTrial) -> bool:
        """Return whether the trial has a value inside the space for every parameter."""
        return self.distributions.keys() <= trial.params.keys() and self.contains_known(trial)

    def contains_known(self, trial: FrozenTrial) -> bool:
        """Return whether the trial has at least one parameter of the space, and only values inside the space."""
        known = [name for name in self.distributions if name in trial.params]
        return bool(known) and all(self._is_inside(name, trial.params[name]) for name in known)

    def _is_inside(self, name: str, value: Any) -> bool:
        """Return whether a value of a parameter is inside the space."""
        distribution = self.distributions[name]
        if isinstance(distribution, CategoricalDistribution):
            return value in distribution.choices
        is_number = value is not None and not isinstance(value, str | bool)
        return is_number and bool(distribution.low <= value <= distribution.high)

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
