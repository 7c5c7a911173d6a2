"""One job: the repeats of a configuration, trained one after the other and recorded, and the signals that may stop it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpo.study.files import suffix
from hpo.study.trainer import Trainer
from hpo.worker.early_stopping import Hopeless
from hpo.worker.results import read_result, write_result
from hpo.worker.signals import StopSignals
from scaling.laws.compute import Fidelity
from scaling.tracking.recorder import Recorder

if TYPE_CHECKING:
    from hpo.search.view import Job
    from hpo.storage.trial_attributes import Stopped
    from hpo.study.files import StudyFiles
    from scaling.common.measurement import Measurement


class Watching(Protocol):
    """What may end a training on its way, by raising Hopeless: see hpo.worker.early_stopping.EarlyStopper."""

    def check(self) -> None:
        """Before it goes on."""

    def look(self, point: Measurement) -> None:
        """At a point that is not the last."""


def run_job(
    job: Job,
    trainer: Trainer,
    files: StudyFiles,
    uri: str,
    stop: StopSignals,
    watch: Watching | None = None,
) -> list[float] | Stopped:
    """Train one (configuration, rung), repeat by repeat, and record each; the losses, NaN where it diverged, or where and
    why `watch` stopped it.

    The first repeat that diverges ends it: the others are NaN, too. KeyboardInterrupt when `stop` was asked for, but only
    while it trains: a repeat that has ended is recorded, and not trained again by whoever takes the job up.
    """
    tokens = int(job.fidelity.D)
    losses: list[float] = []
    for repeat in range(job.seeds):
        result, save = files.result(job.config, tokens, repeat), files.checkpoint(job.config, tokens, repeat)
        save.parent.mkdir(parents=True, exist_ok=True)
        if result.exists():
            loss = read_result(result)
        else:
            params = trainer.describe(job.params, job.fidelity, repeat=repeat) | {
                "config": job.config,
                "bracket": list(job.bracket),
                "repeat": repeat,
            }
            resume = None
            if job.resume_tokens and repeat < job.resume_seeds:
                resume = files.checkpoint(job.config, job.resume_tokens, repeat)
            keep, began = files.partial(job.config, tokens, repeat), time.perf_counter()
            name = f"config-{job.config:04d}{suffix(repeat)}"
            recorder = Recorder(uri, files.name, name, role="proxy", params=params, folder=files.records)
            with recorder as record:
                try:
                    loss = train_once(
                        trainer,
                        job.params,
                        job.fidelity,
                        repeat,
                        resume=resume,
                        save=save,
                        keep=keep,
                        record=record,
                        ended=partial(_keep_result, record, job, save, result),
                        stop=stop,
                        watch=watch,
                    )
                except Hopeless as given_up:
                    keep.unlink(missing_ok=True)
                    stopped = asdict(given_up.stopped) | {"seconds": time.perf_counter() - began}
                    record.tag(f"rung_{job.rung}/stopped", json.dumps(stopped))
                    record.finish("KILLED")
                    return given_up.stopped
        losses.append(loss)
        if math.isnan(loss):
            return losses + [math.nan] * (job.seeds - len(losses))
    return losses


def _keep_result(record: Recorder, job: Job, save: Path, result: Path, loss: float, seconds: float) -> None:
    """Before anything else can happen to it: MLflow may be slow, and the worker that will tell the study be killed meanwhile."""
    checkpoint = None if math.isnan(loss) else save
    record.result(rung=job.rung, tokens=int(job.fidelity.D), loss=loss, seconds=seconds, checkpoint=checkpoint)
    record.finish()
    write_result(result, loss)


def ended(job: Job, files: StudyFiles) -> list[float] | None:
    """The losses of a job all of whose trainings have ended, whatever became of their process then; else None."""
    losses: list[float] = []
    for repeat in range(job.seeds):
        result = files.result(job.config, int(job.fidelity.D), repeat)
        if not result.exists():
            return None
        losses.append(read_result(result))
        if math.isnan(losses[-1]):
            break
    return losses + [math.nan] * (job.seeds - len(losses))


def record_crash(job: Job, trainer: Trainer, files: StudyFiles, uri: str, why: str) -> None:
    """Record a job that was given up after it had crashed, as diverged, with the reason as a tag."""
    params = trainer.describe(job.params, job.fidelity) | {
        "config": job.config,
        "bracket": list(job.bracket),
        "repeat": 0,
    }
    name, tokens = f"config-{job.config:04d}", int(job.fidelity.D)
    with Recorder(uri, files.name, name, role="proxy", params=params, folder=files.records) as record:
        record.tag(f"rung_{job.rung}/crashed", why)
        record.result(rung=job.rung, tokens=tokens, loss=math.nan, seconds=0.0, checkpoint=None)
        record.finish("FAILED")


def train_once(
    trainer: Trainer,
    params: Mapping[str, Any],
    fidelity: Fidelity,
    repeat: int,
    *,
    keep: Path,
    record: Recorder,
    ended: Callable[[float, float], None],
    stop: StopSignals,
    resume: Path | None = None,
    save: Path | None = None,
    watch: Watching | None = None,
) -> float:
    """One training with its curve; its loss, NaN when it diverged. It goes on from `keep` if that exists.

    ended: gets loss and seconds before the trainer removes what `keep` holds, so that at no moment neither is on disk.
    KeyboardInterrupt, with the state in `keep`, when `stop` was asked for before the end; Hopeless when `watch` says so.
    """
    if watch is not None:
        watch.check()
    started = time.perf_counter()
    resume = keep if keep.exists() else resume
    points = trainer(params, fidelity, resume=resume, save=save, keep=keep, repeat=repeat)
    with contextlib.closing(points), _told_its_run(trainer, record):  # type: ignore[type-var]
        for point in stop.interrupting(points):
            record.add(point)
            if point.final:
                loss = math.nan if point.diverged else point.loss
                ended(loss, time.perf_counter() - started)
                return loss
            if watch is not None:
                watch.look(point)
    raise RuntimeError(
        f"the trainer ended {dict(params)} at {fidelity} without a final measurement: it must yield one with final=True"
    )


@contextlib.contextmanager
def _told_its_run(trainer: Trainer, record: Recorder) -> Iterator[None]:
    """Let a trainer that is another program find its MLflow run, in case it reports there."""
    run = record.run_id() if getattr(trainer, "is_program", False) else None
    told = {} if run is None else {"MLFLOW_RUN_ID": run, "MLFLOW_TRACKING_URI": record.uri}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
