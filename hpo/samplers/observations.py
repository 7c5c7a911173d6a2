"""Read the trials of a study for a model: settings in the unit cube, fidelities, losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.samplers.unit_cube import Cube
from hpo.storage.trial_attributes import is_infeasible, is_search_trial, read_stopped
from scaling.common.arrays import Array
from scaling.laws.compute import Fidelity


@dataclass(frozen=True)
class Observations:
    """The n finished runs of a study, followed by its q pending runs.

    Attributes:
        points: Settings as cube points, [n + q, p].
        levels: Fidelities, n + q of them.
        loss: Losses to minimise, [n]. NaN for a diverged run, a forecast for a stopped one.
        stopped: Which runs were stopped early, [n].
        resumed_tokens: Tokens that a run did not train itself, [n + q].
        n_configurations: Number of distinct configurations ever started, failed ones included.
        started_at: Fidelities that the runs were started for, n + q of them. They are the levels, except of runs that
            a pruner ended.
        failed: Cube points of the trials of a plain study that ended without a loss, [f, p].
    """

    points: Array
    levels: list[Fidelity]
    loss: Array
    stopped: NDArray[np.bool_]
    resumed_tokens: Array
    n_configurations: int
    started_at: list[Fidelity]
    failed: Array

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Which losses were measured and are finite, [n]."""
        return np.isfinite(self.loss) & ~self.stopped


def get_fidelity(trial: FrozenTrial, default: Fidelity) -> Fidelity:
    """Return the fidelity in a trial's user attributes, or the default."""
    attrs = trial.user_attrs
    return Fidelity(float(attrs["N"]), float(attrs["tokens"])) if "N" in attrs and "tokens" in attrs else default


def read_observations(study: optuna.Study, cube: Cube, target: Fidelity, asking: int | None = None) -> Observations:
    """Read the trials of a study.

    Args:
        study: The study.
        cube: The search space. Trials outside it are ignored.
        target: Fidelity of trials without one.
        asking: Number of the trial that asks for parameters; it is ignored.

    Raises:
        ValueError: If the study has more than one objective.
    """
    sign = -1.0 if get_direction(study) == StudyDirection.MAXIMIZE else 1.0
    trials = study.get_trials(deepcopy=False)
    last_steps = _find_last_steps(trials, target)
    done: list[_Run] = []
    pending: list[_Run] = []
    failed: list[Array] = []
    configurations = set()
    for trial in trials:
        if trial.number == asking or trial.state == TrialState.WAITING:
            continue
        configurations.add(trial.user_attrs.get("config", trial.number))
        if not cube.contains(trial):
            if _has_failed(trial) and cube.contains_known(trial):
                failed.append(cube.complete_to_unit(trial.params, trial.number))
            continue
        level = get_fidelity(trial, target)
        if _has_failed(trial):
            failed.append(cube.to_unit(trial.params))
        elif trial.state == TrialState.COMPLETE and trial.value is not None:
            is_unusable = not math.isfinite(trial.value) or is_infeasible(trial)
            done.append(_Run(trial, level, math.nan if is_unusable else sign * trial.value))
        elif (stopped := read_stopped(trial)) is not None:
            done.append(_Run(trial, level, sign * stopped.mean))
        elif trial.state == TrialState.FAIL and trial.user_attrs.get("diverged") is True:
            done.append(_Run(trial, level, math.nan))
        elif trial.state == TrialState.PRUNED and not is_search_trial(trial):
            step, value = _read_last_report(trial)
            share = (step + 1) / (last_steps[level] + 1)
            done.append(_Run(trial, Fidelity(level.N, level.D * share), sign * value))
        elif trial.state == TrialState.RUNNING:
            pending.append(_Run(trial, level, math.nan))
    runs = done + pending
    return Observations(
        np.array([cube.to_unit(run.trial.params) for run in runs], float).reshape(-1, len(cube.space)),
        [run.level for run in runs],
        np.array([run.loss for run in done], float),
        np.array([read_stopped(run.trial) is not None for run in done], bool),
        np.array([float(run.trial.user_attrs.get("resumed_tokens") or 0) for run in runs], float),
        len(configurations),
        [get_fidelity(run.trial, target) for run in runs],
        np.array(failed, float).reshape(-1, len(cube.space)),
    )


class _Run(NamedTuple):
    """A trial with the fidelity and the loss that the model uses."""

    trial: FrozenTrial
    level: Fidelity
    loss: float


def _has_failed(trial: FrozenTrial) -> bool:
    """Return whether a trial of a plain study ended without a loss that can be used.

    It raised an exception, returned NaN or infinity, violates a constraint, or was pruned before it had reported a
    value. A search asks for a run without a result again, so such a trial of a search shows nothing about its settings.
    """
    if is_search_trial(trial):
        return False
    if trial.state == TrialState.FAIL:
        return trial.user_attrs.get("diverged") is not True
    if trial.state == TrialState.COMPLETE:
        return trial.value is not None and (not math.isfinite(trial.value) or is_infeasible(trial))
    if trial.state == TrialState.PRUNED:
        return read_stopped(trial) is None and not math.isfinite(_read_last_report(trial)[1])
    return False


def _read_last_report(trial: FrozenTrial) -> tuple[int, float]:
    """Return the last step that a trial reported, and its value there; NaN without a report."""
    step = max(trial.intermediate_values, default=0)
    return step, trial.intermediate_values.get(step, math.nan)


def _find_last_steps(trials: Sequence[FrozenTrial], target: Fidelity) -> dict[Fidelity, int]:
    """Return the last step that any trial reported, by the fidelity that the trials were started for."""
    last_steps: dict[Fidelity, int] = {}
    for trial in trials:
        if trial.intermediate_values:
            level = get_fidelity(trial, target)
            last_steps[level] = max(last_steps.get(level, 0), *trial.intermediate_values)
    return last_steps


def get_direction(study: optuna.Study) -> StudyDirection:
    """Return the direction of a study's single objective; raise ValueError if it has several."""
    if len(study.directions) != 1:
        raise ValueError(
            f"MultiFidelitySampler minimises one loss, got a study with {len(study.directions)} directions"
        )
    return study.direction
