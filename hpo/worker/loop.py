"""One worker of a study: ask, train, tell, whatever happens to trainings, storages and other workers meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hpo.storage.leases import LeaseLost
from hpo.storage.retry import patiently, storage_errors
from hpo.storage.trial_attributes import Stopped
from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import open_existing
from hpo.study.trainer import Trainer
from hpo.worker.early_stopping import EarlyStopper, watch_of
from hpo.worker.job import ended, record_crash, run_job
from hpo.worker.signals import POLL_SECONDS, StopSignals
from hpo.worker.training_process import ChildProcessTrainer, Crashed, WorkerStalled
from scaling.common.cli import say
from scaling.tracking.client import default_uri

if TYPE_CHECKING:
    from hpo.search.search import Search
    from hpo.search.view import Job


def work(files: StudyFiles, *, uri: str | None = None, storage: str | None = None, apart: bool = True) -> int:
    """One worker: ask, train, tell until nothing is left. The exit code.

    apart: train in a process of its own, so that a training that is killed, hangs or runs out of memory is tried once more and then
    counts as diverged, and the worker lives.
    """
    study, trainer = load_study(files.toml)
    store = uri or default_uri()
    here = (
        ChildProcessTrainer(study, files, store, study.workers.lease, study.workers.timeout)
        if apart
        else InProcessTrainer(trainer, files, store)
    )
    with StopSignals() as stop, here as training:
        search = open_existing(files, study, trainer, storage=storage)
        while not stop.requested:
            job = patiently(search.ask, stop)
            if job is None:
                if patiently(lambda: search.finished, stop):
                    return 0
                time.sleep(POLL_SECONDS)  # the rung that would follow waits for another worker's run
                continue
            try:
                watch = patiently(partial(watch_of, search, job, trainer, study.search.stop), stop)
                outcome = training.train(job, watch, partial(keep_lease, search, job), stop)
            except KeyboardInterrupt:
                patiently(partial(give_back, search, job), stop)  # whoever asks next takes it up from what is on disk
                return 130
            except Crashed as crash:
                losses = ended(job, files)
                if losses is None:
                    patiently(partial(count_crash, search, job, trainer, files, store, str(crash)), stop)
                    continue
                outcome = losses  # it was only MLflow that it still waited for
            except (LeaseLost, WorkerStalled) as lost:
                say(f"trial {job.number} is left to others: {lost}")
                continue
            patiently(partial(tell, search, job, outcome), stop)
    return 130


def tell(search: Search, job: Job, outcome: list[float] | Stopped) -> None:
    """Record an outcome, unless another worker has by now."""
    try:
        if isinstance(outcome, Stopped):
            search.stop(job, outcome)
        else:
            search.tell(job, outcome)
    except LeaseLost as lost:
        say(f"an outcome is not counted: {lost}")


def give_back(search: Search, job: Job) -> None:
    """Let others have a job at once, unless one has it already."""
    with contextlib.suppress(LeaseLost):
        search.beat(job)
        search.release(job)


def keep_lease(search: Search, job: Job) -> None:
    """A beat; where the storage is away none can be written, nor read by who would take the job."""
    try:
        search.beat(job)
    except storage_errors() as error:
        say(f"trial {job.number}: the storage does not answer ({type(error).__name__}); training goes on")


def count_crash(search: Search, job: Job, trainer: Trainer, files: StudyFiles, store: str, why: str) -> None:
    """Let a job that crashed be tried once more, or record it as diverged."""
    try:
        given_up = search.crashed(job, why)
    except LeaseLost as lost:
        say(f"trial {job.number} is left to others: {lost}")
        return
    say(f"trial {job.number} crashed: {why}; {'it counts as diverged' if given_up else 'it will be tried once more'}")
    if given_up:
        record_crash(job, trainer, files, store, why)


@dataclass
class InProcessTrainer:
    """Trains jobs in this process."""

    trainer: Trainer
    files: StudyFiles
    uri: str

    def __enter__(self) -> InProcessTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def train(
        self, job: Job, watch: EarlyStopper | None, beat: Callable[[], None], stop: StopSignals
    ) -> list[float] | Stopped:
        return run_job(job, self.trainer, self.files, self.uri, stop, watch)
