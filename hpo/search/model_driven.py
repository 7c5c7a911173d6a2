"""A search without brackets: the sampler's model chooses settings, fidelity, and which run continues.

The model names settings and the rung at which it wants to see them. Where runs resume, they climb there rung by rung,
which costs the same. Each rung teaches something on the way, including that the run is not worth continuing. The wanted
rung is stored in the trial's attribute `goal`. Without it every ask would start another run and none would arrive there
(this was tried). The functions here are pure and keep no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial

from hpo.samplers.drawing import draw_settings
from hpo.samplers.protocols import FidelitySampler, Predictor
from hpo.samplers.unit_cube import Cube
from hpo.search.distinct import RunIndex, find_checkpoint, find_config
from hpo.search.hyperband import Bracket
from hpo.search.view import View
from hpo.storage.trial_attributes import list_started_tokens, read_last_tokens, read_seeds
from scaling.laws.compute import Fidelity


class NextTrial(NamedTuple):
    """The trial to create next.

    Attributes:
        params: The configuration; empty to let the sampler choose it when the trial starts.
        rung: Index of the rung.
        bracket: The bracket.
        config: Number of the configuration that it continues; None for a new one.
        continues: The configuration's trial at the rung below.
        goal: The rung at which the sampler's model wants the configuration.
    """

    params: dict[str, Any]
    rung: int
    bracket: Bracket
    config: int | None = None
    continues: FrozenTrial | None = None
    goal: int | None = None


def compute_spent_cost(view: View, cost: Callable[[Fidelity], float]) -> float:
    """Return what all runs cost.

    Runs in progress count as if they had ended, and runs that were stopped early only up to that point.

    Args:
        view: The search.
        cost: Cost of one training from the beginning.
    """
    total = 0.0
    for trial in view.evaluations.values():
        size = trial.user_attrs["N"]
        total += read_seeds(trial) * cost(Fidelity(size, read_last_tokens(trial)))
        for tokens in list_started_tokens(trial):
            total -= cost(Fidelity(size, tokens))
    return total


def choose_next(
    view: View,
    sampler: FidelitySampler,
    study: optuna.Study,
    space: dict[str, BaseDistribution],
    *,
    sizes: Sequence[float],
    cost: Callable[[Fidelity], float],
    target: Fidelity,
    resumable: bool,
    left: float,
    index: RunIndex,
    seed: int,
) -> NextTrial | None:
    """Return the trial that the sampler's model wants next.

    A model may want a run again, which tells nothing new. Then the run with the lowest predicted loss at the target is
    made instead, of those that can be made at that fidelity or, if there are none, at the one with the nearest cost.

    Args:
        view: The search.
        sampler: A sampler with a model.
        study: The Optuna study, which the sampler reads.
        space: The search space.
        sizes: Parameters N of the proxies, in ascending order.
        cost: Cost of an evaluation from the beginning.
        target: Where the settings are to be good.
        resumable: Whether runs resume from checkpoints.
        left: What may still be spent, in the unit of `cost`: at least the cheapest evaluation.
        index: The runs by their settings.
        seed: Seed of draws in place of settings that have been run.

    Returns:
        The trial; None if the space has no run that can be made now.
    """
    levels = view.ladder.levels
    for entry in view.entries:
        # The configuration's only run failed without a result: repeat it.
        if not entry.losses:
            lost = view.trials[entry.config]
            rung, goal_rung = int(lost.user_attrs["rung"]), lost.user_attrs.get("goal")
            return NextTrial(lost.params, rung, entry.bracket, entry.config, goal=goal_rung)
    if resumable:
        climb = _find_climb(view, lambda params: sampler.is_hopeless(study, space, params, target), cost, left)
        if climb is not None:
            return climb
    goals = [Bracket(0, size, rung) for size in range(len(sizes)) for rung in range(len(levels))]
    goals.sort(key=lambda goal: cost(Fidelity(sizes[goal.size], levels[goal.start])))
    slots = [Fidelity(sizes[goal.size], levels[goal.start]) for goal in goals]
    if index.grid.count < math.inf and not has_next_run(index, sizes, cost, left, resumable=resumable):
        return None
    params, chosen = sampler.propose(study, space, slots, cost, target, continues=resumable, limit=left)
    goal = goals[chosen]
    next_runs = _NextRuns(index, sizes, cost, left, resumable)
    if not resumable:
        if next_runs.find(goal, params) is not None:
            return NextTrial(params, goal.start, goal)
        return _choose_instead(next_runs, sampler, study, space, target, params, goal, goals, seed)
    # Settings that differ only by rounding in the unit cube are the same configuration.
    cube = Cube(space)
    bottom, point = Bracket(0, goal.size, 0), cube.to_unit(params)
    for entry in view.entries:
        rung = max(entry.losses, default=-1)
        trial, loss = view.evaluations.get((entry.config, rung)), entry.losses.get(rung)
        if trial is None or entry.bracket != bottom or not cube.contains(trial):
            continue
        if np.abs(cube.to_unit(trial.params) - point).max() > 1e-9:
            continue
        if loss is not None and math.isfinite(loss) and rung < goal.start:
            return NextTrial(trial.params, rung + 1, bottom, entry.config, trial, goal.start)
    if not index.find(goal.size, params):
        return NextTrial(params, 0, bottom, goal=goal.start)
    return _choose_instead(next_runs, sampler, study, space, target, params, goal, goals, seed)


@dataclass(frozen=True)
class _NextRuns:
    """Finds the next run of some settings on the way to a goal, if it can be made and paid.

    Attributes:
        index: The runs by their settings.
        sizes: Parameters N of the proxies, in ascending order.
        cost: Cost of an evaluation from the beginning.
        left: What may still be spent.
        resumable: Whether runs start at the lowest rung and climb to their goal.
    """

    index: RunIndex
    sizes: Sequence[float]
    cost: Callable[[Fidelity], float]
    left: float
    resumable: bool

    def find(self, goal: Bracket, params: dict[str, Any]) -> NextTrial | None:
        """Return the next run of settings on the way to the rung and size of a goal; None if there is none."""
        runs, levels = self.index.find(goal.size, params), self.index.view.ladder.levels
        bottom = Bracket(0, goal.size, 0) if self.resumable else goal
        rung = goal.start
        if self.resumable:
            rung = max(runs, default=-1) + 1
            if rung > goal.start:
                return None
        if self.index.check(goal.size, rung, params) != "free":
            return None
        below = find_checkpoint(runs, rung) if self.resumable else None
        price = self.cost(Fidelity(self.sizes[goal.size], levels[rung]))
        if below is None:
            if price > self.left * (1 + 1e-9):
                return None
            return NextTrial(params, rung, bottom, goal=goal.start if self.resumable else None)
        price -= self.cost(Fidelity(self.sizes[goal.size], below.user_attrs["tokens"]))
        if price > self.left * (1 + 1e-9):
            return None
        return NextTrial(below.params, rung, bottom, find_config(runs), below, goal.start)

    def list_known(self, size: int) -> Iterator[dict[str, Any]]:
        """Yield the settings that have been run at a size."""
        for (at, key), runs in self.index.runs.items():
            if at == size and self.index.grid.is_listed(key):
                yield next(iter(runs.values())).params


def has_next_run(
    index: RunIndex, sizes: Sequence[float], cost: Callable[[Fidelity], float], left: float, *, resumable: bool
) -> bool:
    """Return whether any run can be made now and paid, in a space with a limited number of settings.

    Args:
        index: The runs by their settings.
        sizes: Parameters N of the proxies, in ascending order.
        cost: Cost of an evaluation from the beginning.
        left: What may still be spent.
        resumable: Whether runs start at the lowest rung and climb to their goal.
    """
    next_runs = _NextRuns(index, sizes, cost, left, resumable)
    levels = index.view.ladder.levels
    for size, N in enumerate(sizes):
        known = list(next_runs.list_known(size))
        affordable = [rung for rung, tokens in enumerate(levels) if cost(Fidelity(N, tokens)) <= left * (1 + 1e-9)]
        if len(known) < index.grid.count and affordable:
            return True
        goals = [Bracket(0, size, rung) for rung in ([len(levels) - 1] if resumable else affordable)]
        if any(next_runs.find(goal, params) is not None for goal in goals for params in known):
            return True
    return False


def _choose_instead(
    next_runs: _NextRuns,
    sampler: FidelitySampler,
    study: optuna.Study,
    space: dict[str, BaseDistribution],
    target: Fidelity,
    wanted: dict[str, Any],
    goal: Bracket,
    goals: Sequence[Bracket],
    seed: int,
) -> NextTrial | None:
    """Return a run in place of one that exists, at the goal or the nearest one to it in cost; None if there is none."""
    index, levels = next_runs.index, next_runs.index.view.ladder.levels
    if index.grid.count == math.inf:
        return next_runs.find(goal, draw_settings(space, study, RandomSampler(seed=seed)))

    def predict(several: Sequence[dict[str, Any]]) -> Sequence[float] | None:
        losses = sampler.predict(study, space, several, target) if isinstance(sampler, Predictor) else None
        return None if losses is None else [float(x) for x in losses]

    def measure_distance(other: Bracket) -> float:
        mine, its = (next_runs.cost(Fidelity(next_runs.sizes[g.size], levels[g.start])) for g in (goal, other))
        return abs(math.log(its / mine))

    rng = np.random.default_rng(seed)
    # Sorting is stable: of two goals at the same distance, the cheaper one comes first.
    for other in sorted(goals, key=measure_distance):

        def is_free(params: dict[str, Any], other: Bracket = other) -> bool:
            return next_runs.find(other, params) is not None

        instead = index.choose(wanted, is_free, rng=rng, rank=predict)
        if instead is not None:
            return next_runs.find(other, instead)
    return None


def _find_climb(
    view: View, is_hopeless: Callable[[dict[str, Any]], bool], cost: Callable[[Fidelity], float], left: float
) -> NextTrial | None:
    """Return the next rung of a run below its goal, if there is one that is promising and can be paid."""
    for entry in view.entries:
        rung = max(entry.losses, default=-1)
        last = view.evaluations.get((entry.config, rung))
        if last is None or rung >= min(int(last.user_attrs.get("goal") or 0), view.ladder.top):
            continue
        loss = entry.losses[rung]
        # It is still running, or has diverged.
        if loss is None or not math.isfinite(loss):
            continue
        size = last.user_attrs["N"]
        below, above = (Fidelity(size, view.ladder.levels[k]) for k in (rung, rung + 1))
        if cost(above) - cost(below) <= left and not is_hopeless(last.params):
            goal = int(last.user_attrs["goal"])
            return NextTrial(last.params, rung + 1, entry.bracket, entry.config, last, goal)
    return None
