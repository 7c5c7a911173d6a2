"""Write the trials of a search: when they are created, taken over, reported on and finished.

`hpo.search.view` reads them, and `hpo.storage.trial_attributes.TrialAttributes` describes their user attributes. The
intermediate values of a trial are points of its loss curve, with the tokens as steps.

A trial is created with its attributes in one write, so that a kill at any point leaves either nothing or a running
trial of a dead worker. It may lack parameters then; the worker that starts it fills them in.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.samplers.drawing import complete_settings
from hpo.samplers.unit_cube import find_wrong_values
from hpo.search.model_driven import NextTrial
from hpo.search.view import Job, View
from hpo.storage.leases import LeaseLost
from hpo.storage.trial_attributes import (
    Stopped,
    TrialAttributes,
    is_search_trial,
    read_config,
    read_crashes,
    read_seeds,
)
from scaling.common.suggest import did_you_mean


@dataclass(frozen=True)
class TrialWriter:
    """Writes the trials of one search for one worker.

    It writes to the storage, because an Optuna study can neither create a trial that is already running nor write to
    one that another process started.

    Attributes:
        study: The Optuna study.
        storage: Its storage.
        space: The search space.
        sizes: Parameters N of the proxies, in ascending order.
        worker: Name of the worker.
        is_leased: Whether trials have a lease, so that another worker may take them over.
        resumable: Whether promotions resume from checkpoints.
        make_sampler: Returns the sampler that chooses the parameters of the trial with a given number.
        study_id: The study's id in the storage.
    """

    study: optuna.Study
    storage: BaseStorage
    space: Mapping[str, BaseDistribution]
    sizes: Sequence[float]
    worker: str
    is_leased: bool
    resumable: bool
    make_sampler: Callable[[int], BaseSampler]
    study_id: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "study_id", self.storage.get_study_id_from_name(self.study.study_name))

    # Start trials

    def create_trial(self, view: View, chosen: NextTrial) -> FrozenTrial:
        """Create a running trial in one write.

        Args:
            view: The search.
            chosen: What the trial is to be. Without parameters, the sampler chooses them when the trial is started.
        """
        attributes, params = self._describe(view, chosen), chosen.params
        trial_id = self.storage.create_new_trial(
            self.study_id,
            create_trial(
                state=TrialState.RUNNING,
                params={name: params[name] for name in self.space} if params else {},
                distributions=dict(self.space) if params else {},
                user_attrs=attributes.to_stored(),
            ),
        )
        trial = self.storage.get_trial(trial_id)
        # A trial that was enqueued by hand at this moment has taken the number.
        if chosen.config is None and attributes.config != trial.number:
            self._write(trial_id, config=trial.number)
            return self.storage.get_trial(trial_id)
        return trial

    def list_enqueued(self, view: View) -> Iterator[FrozenTrial]:
        """Yield the trials that were enqueued by hand. One with values outside the space is failed with a warning."""
        for trial in view.trials:
            if trial.state == TrialState.WAITING and not is_search_trial(trial) and self._check_enqueued(trial):
                yield trial

    def read_fixed(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return the parameters of an enqueued trial that a user has fixed, without those that are not searched."""
        return {k: v for k, v in trial.system_attrs.get("fixed_params", {}).items() if k in self.space}

    def take_enqueued(self, view: View, trial: FrozenTrial, chosen: NextTrial) -> FrozenTrial:
        """Start a trial that was enqueued by hand.

        Args:
            view: The search.
            trial: The trial.
            chosen: What it is to be. Its parameters are not used: the trial has its own.

        Returns:
            The running trial.
        """
        attributes = self._describe(view, chosen).to_stored()
        trial_id = self._find_id(trial.number)
        config = trial.number if chosen.config is None else chosen.config
        for name, value in (attributes | {"config": config}).items():
            self.storage.set_trial_user_attr(trial_id, name, value)
        return self.start_trial(trial.number)

    def continue_run(self, trial: FrozenTrial, chosen: NextTrial) -> FrozenTrial:
        """Make a running trial the next one of a configuration with the same settings."""
        trial_id, resumed = self._find_id(trial.number), chosen.continues if self.resumable else None
        self._write(
            trial_id,
            config=chosen.config,
            continues=None if chosen.continues is None else chosen.continues.number,
            resumed_tokens=0 if resumed is None else int(resumed.user_attrs["tokens"]),
            resumed_seeds=0 if resumed is None else read_seeds(resumed),
        )
        return self.storage.get_trial(trial_id)

    def close_repeated(self, trial: FrozenTrial, repeats: int) -> None:
        """End a running trial that is not run, because it would be the same run as an earlier one."""
        trial_id = self._find_id(trial.number)
        self._write(trial_id, repeats=repeats)
        self.storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def start_trial(self, number: int, trial: FrozenTrial | None = None) -> FrozenTrial:
        """Make a search's trial run on this worker, with all its parameters.

        Args:
            number: Number of the trial.
            trial: The trial as it is now, if that is known. Each reading is half a dozen statements on a server.

        Returns:
            The running trial.
        """
        trial_id = self._find_id(number)
        trial = trial or self.storage.get_trial(trial_id)
        expected = {"worker": self.worker, "config": read_config(trial)}
        changes = {name: value for name, value in expected.items() if trial.user_attrs.get(name) != value}
        self._write(trial_id, **changes)
        is_waiting, is_complete = trial.state == TrialState.WAITING, self.space.keys() <= trial.params.keys()
        if is_waiting:
            self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        if not is_complete:
            complete_settings(self.space, self.study.study_name, self.storage, self.make_sampler(number), trial_id)
        return self.storage.get_trial(trial_id) if changes or is_waiting or not is_complete else trial

    def _describe(self, view: View, chosen: NextTrial) -> TrialAttributes:
        """Return the attributes of the next trial. Those that do not apply are left out, not None."""
        resumed = chosen.continues if self.resumable else None
        optional: dict[str, Any] = {"beat": 0} if self.is_leased else {}
        if chosen.goal is not None:
            optional["goal"] = chosen.goal
        return TrialAttributes(
            **optional,
            tokens=view.ladder.levels[chosen.rung],
            N=self.sizes[chosen.bracket.size],
            config=len(view.trials) if chosen.config is None else chosen.config,
            rung=chosen.rung,
            continues=None if chosen.continues is None else chosen.continues.number,
            resumed_tokens=0 if resumed is None else resumed.user_attrs["tokens"],
            seeds=view.ladder.seeds_at(chosen.rung),
            resumed_seeds=0 if resumed is None else read_seeds(resumed),
            worker=self.worker,
            bracket=list(chosen.bracket),
        )

    def _check_enqueued(self, trial: FrozenTrial) -> bool:
        """Return whether the settings of an enqueued trial are in the search space; fail the trial if not."""
        fixed, searched = trial.system_attrs.get("fixed_params", {}), ", ".join(self.space)
        mistakes = [
            f"{name!r} is not searched, {did_you_mean(name, self.space, cutoff=0.0)} (searched: {searched})"
            for name in fixed
            if name not in self.space
        ]
        mistakes += find_wrong_values(self.space, fixed)
        if mistakes:
            reason = "; ".join(mistakes)
            warnings.warn(f"the enqueued trial {trial.number} is not run: {reason}", UserWarning, stacklevel=5)
            self.storage.set_trial_state_values(self._find_id(trial.number), TrialState.RUNNING)
            self.study.tell(trial.number, state=TrialState.FAIL)
            return False
        return True

    # Keep running trials

    def record_heartbeat(self, job: Job) -> None:
        """Increment the heartbeat of a job's lease. LeaseLost if the trial is another worker's by now, or has ended."""
        trial_id, trial = self.find_running(job, owner=self.worker)
        with _refuse_finished(job):
            self._write(trial_id, beat=int(trial.user_attrs.get("beat", 0)) + 1)

    def report_point(self, job: Job, tokens: int, loss: float) -> None:
        """Record a point of a job's loss curve. It replaces one at the same tokens."""
        self.storage.set_trial_intermediate_value(self.find_running(job)[0], tokens, loss)

    def release_trial(self, job: Job) -> None:
        """Give a job's trial back, so that the next ask returns it."""
        self._write(self.find_running(job)[0], worker="")

    def record_crash(self, job: Job, reason: str) -> int:
        """Record why a job's training crashed.

        Returns:
            How many times it has crashed.
        """
        trial_id, trial = self.find_running(job, owner=self.worker)
        crashes = [*read_crashes(trial), reason]
        self._write(trial_id, crashes=crashes)
        return len(crashes)

    def record_start(self, job: Job, started_tokens: Sequence[int]) -> None:
        """Record where each seed of a job starts, which is not where it was to continue."""
        self._write(self.find_running(job)[0], started_tokens=list(started_tokens))

    # End trials

    def finish_trial(self, job: Job, losses: Sequence[float]) -> None:
        """End a job's trial with the mean of its losses, or as diverged if one of them is not finite.

        Args:
            job: The job.
            losses: One loss per seed.

        Raises:
            ValueError: If the job is not running, or the number of losses is wrong. Nothing is changed then.
            LeaseLost: If the trial is another worker's by now, or has ended.
        """
        (trial_id, trial), seeds = self.find_running(job, owner=self._leased_owner), job.seeds
        if len(losses) != seeds:
            raise ValueError(
                f"trial {job.number} is {seeds} training{'s' if seeds > 1 else ''}, got {len(losses)} "
                f"loss{'es' if len(losses) != 1 else ''}: tell one per seed"
            )
        with _refuse_finished(job):
            if seeds > 1:
                self._write(trial_id, losses=[x if math.isfinite(x) else None for x in losses])
            if all(math.isfinite(x) for x in losses):
                self._end(trial_id, trial, TrialState.COMPLETE, [float(sum(x / seeds for x in losses))])
            else:
                self._write(trial_id, diverged=True)
                self._end(trial_id, trial, TrialState.FAIL)

    def stop_trial(self, job: Job, stopped: Stopped) -> None:
        """End a job's trial as stopped early. ValueError, and nothing is changed, if the job is not running."""
        trial_id, _ = self.find_running(job, owner=self._leased_owner)
        with _refuse_finished(job):
            self._write(trial_id, stopped=stopped)
            # Study.tell would take the last point of the curve for the trial's value.
            self.storage.set_trial_state_values(trial_id, TrialState.PRUNED)

    def close_abandoned(self, trial: FrozenTrial) -> None:
        """End a running trial that no worker is running, by its recorded outcome or else as one without a result."""
        state = TrialState.PRUNED if trial.user_attrs.get("stopped") else TrialState.FAIL
        self.storage.set_trial_state_values(self._find_id(trial.number), state)

    def _end(self, trial_id: int, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None = None) -> None:
        """Do what Study.tell does without reading the trial twice more, a tenth of a trial's cost behind a proxy."""
        try:
            self.study.sampler.after_trial(self.study, trial, state, values)
        finally:
            self.storage.set_trial_state_values(trial_id, state, values)

    # Find and write

    @property
    def _leased_owner(self) -> str | None:
        """The worker that a trial must belong to when it ends: only a leased trial can have been taken over."""
        return self.worker if self.is_leased else None

    def find_running(self, job: Job, *, owner: str | None = None) -> tuple[int, FrozenTrial]:
        """Find a job's trial.

        Args:
            job: The job.
            owner: Name of the worker that it must belong to; None for any.

        Returns:
            The trial's id in the storage, and the trial.

        Raises:
            ValueError: If it does not exist or is not this search's.
            LeaseLost: If it is not running, or belongs to another worker.
        """
        name = f"trial {job.number} of study {self.study.study_name!r}"
        try:
            trial_id = self._find_id(job.number) if job.number >= 0 else None
        except KeyError:
            trial_id = None
        if trial_id is None:
            raise ValueError(f"{name} does not exist: tell only jobs that this search's ask() gave")
        trial = self.storage.get_trial(trial_id)
        attributes, expected = trial.user_attrs, (list(job.bracket), job.rung, job.seeds)
        if (attributes.get("bracket"), attributes.get("rung"), read_seeds(trial)) != expected:
            raise ValueError(f"{name} is not the run {job}: tell only jobs that this search's ask() gave")
        if trial.state != TrialState.RUNNING:
            raise LeaseLost(f"{name} is not running but {trial.state.name}: a job is told once")
        actual = attributes.get("worker")
        if owner is not None and actual != owner:
            raise LeaseLost(
                f"{name} was taken over by {actual or 'no worker yet'}: its lease had expired, or it was given back"
            )
        return trial_id, trial

    def _find_id(self, number: int) -> int:
        """Return a trial's id in the storage."""
        return self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)

    def _write(self, trial_id: int, **changes: Any) -> None:
        """Write some attributes of a trial, one after the other."""
        for name, value in TrialAttributes.store_changes(**changes).items():
            self.storage.set_trial_user_attr(trial_id, name, value)


@contextmanager
def _refuse_finished(job: Job) -> Iterator[None]:
    """Raise LeaseLost where another process ended the trial between reading and writing it."""
    try:
        yield
    except UpdateFinishedTrialError as error:
        raise LeaseLost(f"trial {job.number} was told by another process in the meantime") from error
