"""A search without brackets: the sampler's model chooses settings, fidelity, and which run goes on.

It names settings and the rung where it wants to see them. Where runs resume, they climb there rung by rung, which costs
the same; each rung teaches something on the way, also that it is not worth while to go on. The rung that was wanted
stands in the trial's attribute "goal": without it every ask would begin another run and none would arrive (tried).
Nothing here remembers anything.
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
from hpo.storage.trial_attributes import last_tokens, resumed_seeds_of, seeds_of
from scaling.laws.compute import Fidelity


class NextTrial(NamedTuple):
    """The trial to be made. config: the configuration that it continues, None for a new one."""

    params: dict[str, Any]
    rung: int
    bracket: Bracket
    config: int | None = None
    continues: FrozenTrial | None = None
    goal: int | None = None


def paid(view: View, cost: Callable[[Fidelity], float]) -> float:
    """What all runs cost, those in progress as if they had ended, stopped ones up to there. cost: of one training from the beginning."""
    total = 0.0
    for trial in view.at.values():
        size, attrs = trial.user_attrs["N"], trial.user_attrs
        total += seeds_of(trial) * cost(Fidelity(size, last_tokens(trial)))
        if resumed_seeds_of(trial):
            total -= resumed_seeds_of(trial) * cost(Fidelity(size, attrs["resumed_tokens"]))
    return total


def wanted(
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
    """What to run next. cost: of an evaluation from the beginning; left: what may still be spent, in the same unit, at
    least the cheapest evaluation."""
    levels = view.ladder.levels
    for entry in view.entries:
        if not entry.losses:  # its only run failed without a result: once more
            lost = view.trials[entry.config]
            rung, goal = int(lost.user_attrs["rung"]), lost.user_attrs.get("goal")
            return NextTrial(lost.params, rung, entry.bracket, entry.config, goal=goal)
    if resumable:
        climb = _climbing(view, lambda params: sampler.is_hopeless(study, space, params, target), cost, left)
        if climb is not None:
            return climb
    goals = [Bracket(0, size, rung) for size in range(len(sizes)) for rung in range(len(levels))]
    goals.sort(key=lambda goal: cost(Fidelity(sizes[goal.size], levels[goal.start])))
    slots = [Fidelity(sizes[goal.size], levels[goal.start]) for goal in goals]
    params, chosen = sampler.propose(study, space, slots, cost, target, continues=resumable, limit=left)
    goal = goals[chosen]
    if not resumable:
        return NextTrial(params, goal.start, goal)
    cube = Cube(space)  # settings that differ by rounding are the same
    bottom, at = Bracket(0, goal.size, 0), cube.unit(params)
    for entry in view.entries:
        rung = max(entry.losses, default=-1)
        before, loss = view.at.get((entry.config, rung)), entry.losses.get(rung)
        if before is None or entry.bracket != bottom or not cube.holds(before):
            continue
        if np.abs(cube.unit(before.params) - at).max() > 1e-9:
            continue
        if loss is not None and math.isfinite(loss) and rung < goal.start:
            return NextTrial(before.params, rung + 1, bottom, entry.config, before, goal.start)
    return NextTrial(params, 0, bottom, goal=goal.start)


def _climbing(
    view: View, is_hopeless: Callable[[dict[str, Any]], bool], cost: Callable[[Fidelity], float], left: float
) -> NextTrial | None:
    """The next rung of a run that is on its way, if there is one that still promises something and can be paid."""
    for entry in view.entries:
        rung = max(entry.losses, default=-1)
        last = view.at.get((entry.config, rung))
        if last is None or rung >= min(int(last.user_attrs.get("goal") or 0), view.ladder.top):
            continue
        loss = entry.losses[rung]
        if loss is None or not math.isfinite(loss):  # it runs, or has diverged
            continue
        size = last.user_attrs["N"]
        below, above = (Fidelity(size, view.ladder.levels[k]) for k in (rung, rung + 1))
        if cost(above) - cost(below) <= left and not is_hopeless(last.params):
            goal = int(last.user_attrs["goal"])
            return NextTrial(last.params, rung + 1, entry.bracket, entry.config, last, goal)
    return None
