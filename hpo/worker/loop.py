"""The loop of one worker: ask, train, tell, whatever happens to trainings, storages and other workers meanwhile."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from textwrap import indent
from typing import TYPE_CHECKING, TypeVar

from hpo.storage.leases import LeaseLost
from hpo.storage.presence import StudyRemoved, announce_presence, check_not_removed
from hpo.storage.retry import get_storage_errors, retry_storage
from hpo.storage.trial_attributes import Stopped
from hpo.study.config import StudyConfig, load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import open_existing
from hpo.study.trainer import Trainer
from hpo.worker.checkpoints import CheckpointDamaged, find_starts, set_aside
from hpo.worker.curve_recording import CurveRecorder
from hpo.worker.early_stopping import make_early_stopper
from hpo.worker.failures import FIRST_FAILURES, MAX_FAILURES_IN_A_ROW, TrainingFailed, describe_error
from hpo.worker.job import TrainingMonitor, read_losses, record_crash, run_job
from hpo.worker.signals import POLL_SECONDS, StopSignals
from hpo.worker.training_process import ChildProcessTrainer, TrainingCrashed, WorkerStalled
from scaling.tracking.client import default_uri

if TYPE_CHECKING:
    from hpo.search.search import Search
    from hpo.search.view import Job

T = TypeVar("T")

logger = logging.getLogger("muscale.hpo")


def run_worker(
    files: StudyFiles, *, uri: str | None = None, storage: str | None = None, in_child_process: bool = True
) -> int:
    """Run one worker: ask, train and tell until nothing is left.

    Args:
        files: The study's files.
        uri: The MLflow store; None for the default one.
        storage: The URL of the storage that the study was launched in; None for its journal.
        in_child_process: Train in a child process, so that the worker survives a training that is killed, hangs or runs
            out of memory.

    Returns:
        The exit code: 0 if the search is finished, 130 if a signal stopped the worker, 1 if the study was removed, or
        if so many trainings failed that the cause is probably not their settings.
    """
    study, trainer = load_study(files.toml)
    store = uri or default_uri()
    job_trainer: ChildProcessTrainer | InProcessTrainer = InProcessTrainer(trainer, files, store)
    if in_child_process:
        job_trainer = ChildProcessTrainer(study, files, store, study.workers.lease, study.workers.timeout)
    with StopSignals() as stop, announce_presence(files.folder, "worker"), job_trainer:
        search = open_existing(files, study, trainer, storage=storage)
        try:
            return StudyWorker(files, study, trainer, search, job_trainer, store, stop).run()
        except StudyRemoved as removed:
            logger.error(f"{removed}; this worker ends")
            return 1


@dataclass
class StudyWorker:
    """Asks, trains and tells.

    Attributes:
        files: The study's files.
        study: The study.
        trainer: The study's trainer, which describes runs.
        search: The study's search.
        job_trainer: Trains jobs.
        store: The MLflow store.
        stop: The stop signals.
        failed_in_a_row: Numbers of the trials whose trainings failed since the last one that did not.
    """

    files: StudyFiles
    study: StudyConfig
    trainer: Trainer
    search: Search
    job_trainer: ChildProcessTrainer | InProcessTrainer
    store: str
    stop: StopSignals
    failed_in_a_row: set[int] = field(default_factory=set)

    def run(self) -> int:
        """Work until nothing is left, and return the exit code."""
        last_failure = ""
        while not self.stop.requested:
            job = self._retry(self.search.ask)
            if job is None:
                if self._retry(lambda: self.search.finished):
                    return 0
                if self._retry(lambda: self.search.is_stuck):
                    self._log_first_failures(last_failure)
                    return 1
                # The next rung waits for a run of another worker.
                time.sleep(POLL_SECONDS)
                continue
            try:
                outcome = self._train(job)
            except KeyboardInterrupt:
                # The next worker that asks continues the job from its checkpoint.
                self._retry(partial(release_job, self.search, job))
                return 130
            except TrainingCrashed as crash:
                losses = read_losses(job, self.files)
                if losses is None:
                    self._retry(partial(self._handle_crash, job, str(crash)))
                    continue
                # The training had finished, and its process was only waiting for MLflow.
                outcome = losses
            except TrainingFailed as failure:
                check_not_removed(self.files.settings)
                last_failure = failure.reason
                if not self._retry(partial(self._handle_failure, job, failure)):
                    return 1
                continue
            except (LeaseLost, WorkerStalled) as error:
                logger.warning(f"trial {job.number} is left to other workers: {error}")
                continue
            self.failed_in_a_row.clear()
            self._retry(partial(record_outcome, self.search, job, outcome))
        return 130

    def _retry(self, operation: Callable[[], T]) -> T:
        """Call a function until the storage answers, unless the study was removed."""
        check = partial(check_not_removed, self.files.settings)
        try:
            return retry_storage(operation, self.stop, check)
        except KeyError:
            # A database has no such study any more.
            check()
            raise

    def _train(self, job: Job) -> list[float] | Stopped:
        """Train a job, from the checkpoints that are intact."""
        while True:
            # A study that was removed is not made again.
            check_not_removed(self.files.settings)
            starts = find_starts(job, self.files)
            if starts != [job.get_start(repeat) for repeat in range(job.seeds)]:
                job = self._retry(partial(self.search.record_start, job, starts))
            stopper = self._retry(partial(make_early_stopper, self.search, job, self.trainer, self.study.search.stop))
            first_result = self.files.result(job.config, int(job.fidelity.D), 0)
            monitor = CurveRecorder(self.search, job, first_result) if stopper is None else stopper
            try:
                return self.job_trainer.train(job, monitor, partial(self._keep_lease, job), self.stop)
            except CheckpointDamaged as damaged:
                # It is missing at the next turn, which finds another one to start from.
                logger.warning(f"{damaged.reason}: it is renamed to {damaged.path.name}.damaged")
                set_aside(damaged.path)

    def _keep_lease(self, job: Job) -> None:
        """Write a heartbeat of a job, unless the study was removed."""
        check_not_removed(self.files.settings)
        keep_lease(self.search, job)

    def _handle_crash(self, job: Job, reason: str, word: str = "crashed") -> None:
        """Give a job back whose training crashed or failed, or record it as diverged after its last attempt."""
        attempts = self.study.workers.attempts
        try:
            gave_up = self.search.crashed(job, reason, attempts=attempts)
        except LeaseLost as error:
            logger.warning(f"trial {job.number} is left to other workers: {error}")
            return
        consequence = "it counts as diverged" if gave_up else "it will be tried once more"
        if not gave_up and attempts > 2:
            consequence = f"it will be tried again, up to {attempts} times in all"
        separator = ";" if "\n" not in reason else "\n "
        logger.warning(f"trial {job.number} {word}: {reason}{separator} {consequence}")
        if gave_up:
            record_crash(job, self.trainer, self.files, self.store, reason)

    def _handle_failure(self, job: Job, failure: TrainingFailed) -> bool:
        """Give a job back whose trainer raised an error, or record it as diverged after its last attempt.

        Returns:
            Whether the worker continues. It does not if the cause is probably not the settings.
        """
        name, resume = self.files.name, f"`hpo resume {self.files.name}`"
        if failure.is_of_machine:
            release_job(self.search, job)
            logger.error(f"trial {job.number}: {failure}; this worker ends: fix the cause, then {resume} continues")
            return False
        self.failed_in_a_row.add(job.number)
        if not self.search.has_result:
            with contextlib.suppress(LeaseLost):
                self.search.crashed(job, failure.reason, attempts=None)
            if len(self.search.set_aside) >= FIRST_FAILURES:
                self._log_first_failures(failure.reason)
                return False
            logger.warning(f"trial {job.number} failed: {failure}\n  other settings are tried first")
            return True
        self._handle_crash(job, failure.reason, "failed")
        if len(self.failed_in_a_row) < MAX_FAILURES_IN_A_ROW:
            return True
        logger.error(
            f"study {name}: {MAX_FAILURES_IN_A_ROW} settings failed in a row, so this worker ends: if the cause is "
            f"not these settings, fix it; {resume} continues in any case"
        )
        return False

    def _log_first_failures(self, reason: str) -> None:
        count = len(self.search.set_aside)
        tried = f"the first {count} settings that it tried all" if count > 1 else "the only settings that it could try"
        logger.error(
            f"study {self.files.name}: {tried} failed in this worker, the last one with\n{indent(reason, '  ')}\n"
            "so the cause is probably the trainer and not the settings, and the worker ends. Nothing counts as "
            f"diverged. Fix the cause, then `hpo resume {self.files.name}` tries them again"
        )


def record_outcome(search: Search, job: Job, outcome: list[float] | Stopped) -> None:
    """Tell the search the outcome of a job, unless another worker has done so.

    Args:
        search: The search.
        job: The job.
        outcome: The loss of each seed, or where and why the run was stopped early.
    """
    try:
        if isinstance(outcome, Stopped):
            search.stop(job, outcome)
        else:
            if math.isfinite(outcome[0]):
                # The end of the trial's curve.
                search.report(job, int(job.fidelity.D), outcome[0])
            search.tell(job, outcome)
    except LeaseLost as error:
        logger.warning(f"the result of trial {job.number} is not counted: {error}")


def release_job(search: Search, job: Job) -> None:
    """Give an unfinished job back, so that another worker can take it at once, unless one has taken it already."""
    with contextlib.suppress(LeaseLost):
        search.beat(job)
        search.release(job)


def keep_lease(search: Search, job: Job) -> None:
    """Write a heartbeat of a job. If the storage is down, log it and continue: no other worker can take the job then.

    Raises:
        LeaseLost: If another worker has taken the job.
    """
    try:
        search.beat(job)
    except get_storage_errors() as error:
        logger.warning(f"trial {job.number}: the storage does not answer ({type(error).__name__}); training continues")


@dataclass
class InProcessTrainer:
    """Trains jobs in this process, with the interface of `ChildProcessTrainer`.

    Attributes:
        trainer: The study's trainer.
        files: The study's files.
        uri: The MLflow store.
    """

    trainer: Trainer
    files: StudyFiles
    uri: str

    def __enter__(self) -> InProcessTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def train(
        self, job: Job, monitor: TrainingMonitor | None, beat: Callable[[], None], stop: StopSignals
    ) -> list[float] | Stopped:
        """Train a job as `run_job` does. `beat` is not called, because nothing runs beside the training.

        Raises:
            TrainingFailed: If the trainer raised an error.
        """
        try:
            return run_job(job, self.trainer, self.files, self.uri, stop, monitor)
        except (CheckpointDamaged, LeaseLost):
            raise
        # A trainer may raise anything.
        except Exception as error:
            raise describe_error(error, self.files.log(job.config, int(job.fidelity.D))) from error
