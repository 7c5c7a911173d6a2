"""A search without brackets: the sampler's model chooses settings, fidelity, and which run continues.

The model names settings and the rung at which it wants to see them. Where runs resume, they climb there rung by rung,
which costs the same. Each rung teaches something on the way, including that the run is not worth continuing. The wanted
rung is stored in the trial's attribute `goal`. Without it every ask would start another run and none would arrive there
(this was tried). The functions here are pure and keep no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from hpo.samplers.protocols import FidelitySampler
from hpo.samplers.unit_cube import Cube
from hpo.search.hyperband import Bracket
from hpo.search.view import View
from hpo.storage.trial_attributes import read_last_tokens, read_resumed_seeds, read_seeds
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
        size, attributes = trial.user_attrs["N"], trial.user_attrs
        total += read_seeds(trial) * cost(Fidelity(size, read_last_tokens(trial)))
        if resumed_seeds := read_resumed_seeds(trial):
            total -= resumed_seeds * cost(Fidelity(size, attributes["resumed_tokens"]))
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
) -> NextTrial:
    """Return the trial that the sampler's model wants next.

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
    params, chosen = sampler.propose(study, space, slots, cost, target, continues=resumable, limit=left)
    goal = goals[chosen]
    if not resumable:
        return NextTrial(params, goal.start, goal)
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
    return NextTrial(params, 0, bottom, goal=goal.start)


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
