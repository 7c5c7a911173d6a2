"""Read the trials of a study for a model: settings in the unit cube, fidelities, losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.samplers.unit_cube import Cube
from hpo.storage.trial_attributes import is_infeasible, read_stopped
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
    """

    points: Array
    levels: list[Fidelity]
    loss: Array
    stopped: NDArray[np.bool_]
    resumed_tokens: Array
    n_configurations: int

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
    done: list[tuple[FrozenTrial, float]] = []
    pending: list[tuple[FrozenTrial, float]] = []
    configurations = set()
    for trial in study.get_trials(deepcopy=False):
        if trial.number == asking or trial.state == TrialState.WAITING:
            continue
        configurations.add(trial.user_attrs.get("config", trial.number))
        if not cube.contains(trial):
            continue
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            is_unusable = not math.isfinite(trial.value) or is_infeasible(trial)
            done.append((trial, math.nan if is_unusable else sign * trial.value))
        elif (stopped := read_stopped(trial)) is not None:
            done.append((trial, sign * stopped.mean))
        elif trial.state == TrialState.FAIL and trial.user_attrs.get("diverged") is True:
            done.append((trial, math.nan))
        elif trial.state == TrialState.RUNNING:
            pending.append((trial, math.nan))
    trials = [trial for trial, _ in done + pending]
    return Observations(
        np.array([cube.to_unit(t.params) for t in trials], float).reshape(-1, len(cube.space)),
        [get_fidelity(t, target) for t in trials],
        np.array([loss for _, loss in done], float),
        np.array([read_stopped(trial) is not None for trial, _ in done], bool),
        np.array([float(t.user_attrs.get("resumed_tokens") or 0) for t in trials], float),
        len(configurations),
    )


def get_direction(study: optuna.Study) -> StudyDirection:
    """Return the direction of a study's single objective; raise ValueError if it has several."""
    if len(study.directions) != 1:
        raise ValueError(
            f"MultiFidelitySampler minimises one loss, got a study with {len(study.directions)} directions"
        )
    return study.direction
