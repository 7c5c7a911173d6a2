"""Tell runs apart, so that none is made twice: which settings have been run where, and which could still be run.

A run is one setting at one size and rung, with all its seeds. Trainings are reproducible, so a second one would only
cost. A space without a continuous parameter has a limited number of settings; when all of them have been run at a size
and rung, there is nothing left to start there. The functions here are pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, product
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from hpo.samplers.unit_cube import Cube
from hpo.search.hyperband import Room
from hpo.search.view import View
from hpo.storage.trial_attributes import read_config, read_loss

# What identifies settings: for each parameter the index of its value, or the value itself where it is on no grid.
SettingsKey = tuple[int | float | str, ...]
# "taken": the run exists, or its settings ended at a shorter run. "busy": wait for a shorter run of the same settings.
RunState = Literal["free", "busy", "taken"]

# Values whose steps differ by less than this are the same.
STEP_TOLERANCE = 1e-6
# Settings that are compared when the sampler's own proposal has been run already. A space with more is sampled.
MAX_LISTED_SETTINGS = 4096


@dataclass(frozen=True)
class SettingsGrid:
    """The settings of a search space, told apart up to rounding.

    Attributes:
        space: The search space.
    """

    space: Mapping[str, BaseDistribution]
    # Keys by the number of the configuration, whose settings never change.
    _known: dict[int, SettingsKey] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def sizes(self) -> tuple[int | None, ...]:
        """The number of values of each parameter; None for a continuous one."""
        return tuple(_count_values(distribution) for distribution in self.space.values())

    @cached_property
    def count(self) -> float:
        """The number of settings in the space; infinity if a parameter is continuous."""
        return math.inf if None in self.sizes else math.prod(size for size in self.sizes if size is not None)

    def identify(self, params: Mapping[str, Any]) -> SettingsKey:
        """Return what identifies settings: equal for equal settings, also if a float was rounded differently."""
        return tuple(_identify_value(distribution, params[name]) for name, distribution in self.space.items())

    def identify_config(self, config: int, params: Mapping[str, Any]) -> SettingsKey:
        """Return what identifies the settings of a configuration, which is looked up once."""
        key = self._known.get(config)
        if key is None:
            key = self._known[config] = self.identify(params)
        return key

    def is_listed(self, key: SettingsKey) -> bool:
        """Return whether settings are among those that the space consists of, which enqueued ones need not be."""
        return all(
            isinstance(part, int) and size is not None and 0 <= part < size
            for part, size in zip(key, self.sizes, strict=True)
        )

    def make_params(self, cells: Sequence[int]) -> dict[str, Any]:
        """Return the settings with the given index of each value."""
        return {
            name: _get_value(distribution, cell)
            for (name, distribution), cell in zip(self.space.items(), cells, strict=True)
        }

    def iterate(self) -> Iterator[tuple[int, ...]]:
        """Yield the indices of all settings of a space without continuous parameters."""
        return product(*(range(size) for size in self.sizes if size is not None))


@dataclass(frozen=True)
class RunIndex:
    """The runs of a search by their settings.

    Attributes:
        view: The search.
        grid: Its settings.
        besides: Number of a trial that is left out.
    """

    view: View
    grid: SettingsGrid
    besides: int | None = None

    @cached_property
    def runs(self) -> dict[tuple[int, SettingsKey], dict[int, FrozenTrial]]:
        """The trial that counts at each rung, by index of the size and settings."""
        found: dict[tuple[int, SettingsKey], dict[int, FrozenTrial]] = {}
        names = self.grid.space.keys()
        for (config, rung), trial in self.view.evaluations.items():
            # The worker that starts a trial fills in the parameters that it lacks.
            if names <= trial.params.keys() and trial.number != self.besides:
                key = self.grid.identify_config(config, trial.params)
                rungs = found.setdefault((int(trial.user_attrs["bracket"][1]), key), {})
                if rung not in rungs or not rungs[rung].state.is_finished():
                    rungs[rung] = trial
        return found

    @cached_property
    def _rooms(self) -> dict[tuple[int, int], Room]:
        return {}

    def find(self, size: int, params: Mapping[str, Any]) -> dict[int, FrozenTrial]:
        """Return the runs of settings at a size, by rung."""
        return self.runs.get((size, self.grid.identify(params)), {})

    def check(self, size: int, rung: int, params: Mapping[str, Any]) -> RunState:
        """Return whether settings can be run at a size and rung."""
        return _check_runs(self.find(size, params), rung)

    def count_room(self, size: int, rung: int) -> Room:
        """Return how many settings could still be run at a size and rung of a space without continuous parameters."""
        room = self._rooms.get((size, rung))
        if room is None:
            states = [
                _check_runs(runs, rung)
                for (at, key), runs in self.runs.items()
                if at == size and self.grid.is_listed(key)
            ]
            busy, taken = states.count("busy"), states.count("taken")
            room = self._rooms[size, rung] = Room(int(self.grid.count) - busy - taken, busy)
        return room

    def choose(
        self,
        wanted: Mapping[str, Any],
        is_free: Callable[[dict[str, Any]], bool],
        *,
        rng: np.random.Generator,
        rank: Callable[[Sequence[dict[str, Any]]], Sequence[float] | None] | None = None,
    ) -> dict[str, Any] | None:
        """Return settings that can be run in place of some that cannot, in a space without continuous parameters.

        Args:
            wanted: The settings that cannot be run.
            is_free: Whether settings can be run.
            rng: Draws settings of a space that is too large to list.
            rank: Returns a score for each of several settings, of which the lowest is chosen. By default, and where it
                returns None, those that are the nearest to the wanted ones in the unit cube are chosen.

        Returns:
            The settings; None if there are none.
        """
        free = [params for params in self._list_candidates(wanted, rng) if is_free(params)]
        if not free and self.grid.count > MAX_LISTED_SETTINGS:
            # Only settings that have been run are not free, so a free one is among the first of the list.
            first = islice(self.grid.iterate(), len(self.runs) + 1)
            free = [params for cells in first if is_free(params := self.grid.make_params(cells))][:1]
        if not free:
            return None
        scores = None if rank is None else rank(free)
        if scores is None:
            cube = Cube(dict(self.grid.space))
            origin = cube.encode(cube.to_unit(dict(wanted))[None])
            points = cube.encode(np.array([cube.to_unit(params) for params in free]))
            scores = [float(x) for x in np.square(points - origin).sum(axis=1)]
        return free[int(np.argmin(np.asarray(scores, float)))]

    def _list_candidates(self, wanted: Mapping[str, Any], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Yield all settings of a small space; of a large one, the neighbours of some settings and a random sample."""
        if self.grid.count <= MAX_LISTED_SETTINGS:
            yield from map(self.grid.make_params, self.grid.iterate())
            return
        sizes = [size for size in self.grid.sizes if size is not None]
        key = self.grid.identify(wanted)
        if self.grid.is_listed(key):
            cells = [int(part) for part in key]
            for i, size in enumerate(sizes):
                for neighbour in (cells[i] - 1, cells[i] + 1):
                    if 0 <= neighbour < size:
                        yield self.grid.make_params([*cells[:i], neighbour, *cells[i + 1 :]])
        for _ in range(MAX_LISTED_SETTINGS // 16):
            yield self.grid.make_params([int(rng.integers(size)) for size in sizes])


def find_checkpoint(runs: Mapping[int, FrozenTrial], rung: int) -> FrozenTrial | None:
    """Return the longest finished run below a rung, which a run there can continue; None if there is none.

    Args:
        runs: The runs of one setting at one size, by rung.
        rung: The rung to reach.
    """
    below = [r for r, trial in runs.items() if r < rung and trial.state.is_finished()]
    return runs[max(below)] if below else None


def find_config(runs: Mapping[int, FrozenTrial]) -> int | None:
    """Return the number of the configuration that a new run of the same settings belongs to; None for a new one."""
    return min((read_config(trial) for trial in runs.values()), default=None)


def _check_runs(runs: Mapping[int, FrozenTrial], rung: int) -> RunState:
    """Return whether settings with some runs at a size can be run at a rung there."""
    if rung in runs:
        return "taken"
    below = [trial for r, trial in runs.items() if r < rung]
    # A run that diverged or was stopped early ends its settings, as in a bracket.
    if any(trial.state.is_finished() and not math.isfinite(read_loss(trial)) for trial in below):
        return "taken"
    return "free" if all(trial.state.is_finished() for trial in below) else "busy"


def _count_values(distribution: BaseDistribution) -> int | None:
    """Return how many values a parameter can have; None for a continuous one."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return math.floor((distribution.high - distribution.low) / distribution.step + 1e-8) + 1
    return None


def _identify_value(distribution: BaseDistribution, value: Any) -> int | float | str:
    """Return the index of a value or, if it is on no grid, the value without its last digits."""
    if isinstance(distribution, CategoricalDistribution):
        try:
            return int(distribution.to_internal_repr(value))
        except ValueError:
            return repr(value)
    if not isinstance(distribution, IntDistribution | FloatDistribution) or isinstance(value, str):
        return repr(value)
    if distribution.step is None:
        return float(f"{value:.9g}")
    steps = (value - distribution.low) / distribution.step
    return round(steps) if abs(steps - round(steps)) < STEP_TOLERANCE else float(f"{value:.9g}")


def _get_value(distribution: BaseDistribution, cell: int) -> Any:
    """Return the value with an index."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[cell]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    assert distribution.step is not None
    value = distribution.low + cell * distribution.step
    return value if isinstance(distribution, IntDistribution) else min(float(value), distribution.high)
