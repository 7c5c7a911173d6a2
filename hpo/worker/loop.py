"""The loop of one worker: ask, train, tell, whatever happens to trainings, storages and other workers meanwhile."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hpo.storage.leases import LeaseLost
from hpo.storage.retry import get_storage_errors, retry_storage
from hpo.storage.trial_attributes import Stopped
from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import open_existing
from hpo.study.trainer import Trainer
from hpo.worker.early_stopping import EarlyStopper, make_early_stopper
from hpo.worker.job import read_losses, record_crash, run_job
from hpo.worker.signals import POLL_SECONDS, StopSignals
from hpo.worker.training_process import ChildProcessTrainer, TrainingCrashed, WorkerStalled
from scaling.tracking.client import default_uri

if TYPE_CHECKING:
    from hpo.search.search import Search
    from hpo.search.view import Job

logger = logging.getLogger("muscale.hpo")


def run_worker(
    files: StudyFiles, *, uri: str | None = None, storage: str | None = None, in_child_process: bool = True
) -> int:
    """Run one worker: ask, train and tell until nothing is left.

    Args:
        files: The study's files.
        uri: The MLflow store; None for the default one.
        storage: The URL of the storage that the study was launched in; None for its journal.
        in_child_process: Train in a child process. A training that is killed, hangs or runs out of memory is then tried
            once more and afterwards counts as diverged, and the worker survives.

    Returns:
        The exit code: 0 if the search is finished, 130 if a signal stopped the worker.
    """
    study, trainer = load_study(files.toml)
    store = uri or default_uri()
    job_trainer: ChildProcessTrainer | InProcessTrainer = InProcessTrainer(trainer, files, store)
    if in_child_process:
        job_trainer = ChildProcessTrainer(study, files, store, study.workers.lease, study.workers.timeout)
    with StopSignals() as stop, job_trainer:
        search = open_existing(files, study, trainer, storage=storage)
        while not stop.requested:
            job = retry_storage(search.ask, stop)
            if job is None:
                if retry_storage(lambda: search.finished, stop):
                    return 0
                # The next rung waits for a run of another worker.
                time.sleep(POLL_SECONDS)
                continue
            try:
                monitor = retry_storage(partial(make_early_stopper, search, job, trainer, study.search.stop), stop)
                outcome = job_trainer.train(job, monitor, partial(keep_lease, search, job), stop)
            except KeyboardInterrupt:
                # The next worker that asks continues the job from its checkpoint.
                retry_storage(partial(release_job, search, job), stop)
                return 130
            except TrainingCrashed as crash:
                losses = read_losses(job, files)
                if losses is None:
                    retry_storage(partial(handle_crash, search, job, trainer, files, store, str(crash)), stop)
                    continue
                # The training had finished, and its process was only waiting for MLflow.
                outcome = losses
            except (LeaseLost, WorkerStalled) as error:
                logger.warning(f"trial {job.number} is left to other workers: {error}")
                continue
            retry_storage(partial(record_outcome, search, job, outcome), stop)
    return 130


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


def handle_crash(search: Search, job: Job, trainer: Trainer, files: StudyFiles, store: str, reason: str) -> None:
    """Release a job whose training crashed, or record it as diverged if it crashed before.

    Args:
        search: The search.
        job: The job.
        trainer: The study's trainer.
        files: The study's files.
        store: The MLflow store.
        reason: Why the training crashed.
    """
    try:
        gave_up = search.crashed(job, reason)
    except LeaseLost as error:
        logger.warning(f"trial {job.number} is left to other workers: {error}")
        return
    consequence = "it counts as diverged" if gave_up else "it will be tried once more"
    logger.warning(f"trial {job.number} crashed: {reason}; {consequence}")
    if gave_up:
        record_crash(job, trainer, files, store, reason)


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
        self, job: Job, monitor: EarlyStopper | None, beat: Callable[[], None], stop: StopSignals
    ) -> list[float] | Stopped:
        """Train a job as `run_job` does. `beat` is not called, because nothing runs beside the training."""
        return run_job(job, self.trainer, self.files, self.uri, stop, monitor)
