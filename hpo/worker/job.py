"""One job: the repeats of a configuration, trained one after the other and recorded, with what may stop them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpo.storage.trial_attributes import Stopped
from hpo.study.files import repeat_suffix
from hpo.study.trainer import RunSettings, Trainer
from hpo.worker.checkpoints import CheckpointDamaged, measure_checkpoint, set_aside
from hpo.worker.early_stopping import StoppedEarly
from hpo.worker.failures import OUT_OF_MEMORY_ERRORS
from hpo.worker.results import read_result, write_result
from hpo.worker.signals import StopSignals
from scaling.laws.compute import Fidelity
from scaling.tracking.recorder import Recorder

if TYPE_CHECKING:
    from hpo.search.view import Job
    from hpo.study.files import StudyFiles
    from scaling.common.measurement import Measurement


logger = logging.getLogger("muscale.hpo")


class TrainingMonitor(Protocol):
    """Watches a training. It may stop it by raising `StoppedEarly`, as `EarlyStopper` does."""

    def check(self) -> None:
        """Decide from what is known before the training continues."""

    def observe(self, point: Measurement) -> None:
        """Decide at a point that is not the last one."""


@dataclass(frozen=True)
class CheckpointPaths:
    """Where one training reads and writes its state.

    Attributes:
        keep: Its state when it is interrupted. The training continues from this file if it exists.
        resume: The checkpoint of a shorter run to continue from; None: start from the beginning.
        save: The checkpoint of the finished run; None: do not write one.
    """

    keep: Path
    resume: Path | None = None
    save: Path | None = None


def run_job(
    job: Job,
    trainer: Trainer,
    files: StudyFiles,
    uri: str,
    stop: StopSignals,
    monitor: TrainingMonitor | None = None,
) -> list[float] | Stopped:
    """Train one configuration at one rung, repeat by repeat, and record each repeat.

    Repeats that have finished are on disk and are not trained again, whichever worker runs the job next.

    Args:
        job: The job.
        trainer: The study's trainer.
        files: The study's files.
        uri: The MLflow store.
        stop: The stop signals. They interrupt only while a repeat trains.
        monitor: Decides whether to stop the run early.

    Returns:
        The loss of each repeat; NaN for one that diverged and for all after it, which are not trained. Or where and why
        `monitor` stopped the run.

    Raises:
        KeyboardInterrupt: If a stop signal arrived before the end.
        CheckpointDamaged: If the trainer cannot read the checkpoint that it was to continue.
    """
    losses: list[float] = []
    for repeat in range(job.seeds):
        known = _read_known_loss(files.result(job.config, int(job.fidelity.D), repeat))
        outcome: float | Stopped
        outcome = _train_repeat(job, repeat, trainer, files, uri, stop, monitor) if known is None else known
        if isinstance(outcome, Stopped):
            return outcome
        losses.append(outcome)
        if math.isnan(outcome):
            break
    return _pad_losses(losses, job)


def _train_repeat(
    job: Job,
    repeat: int,
    trainer: Trainer,
    files: StudyFiles,
    uri: str,
    stop: StopSignals,
    monitor: TrainingMonitor | None,
) -> float | Stopped:
    """Train and record one repeat of a job. Return its loss, or where and why it was stopped early."""
    tokens = int(job.fidelity.D)
    result = files.result(job.config, tokens, repeat)
    start = job.get_start(repeat)
    resume = files.checkpoint(job.config, start, repeat) if start else None
    save = files.checkpoint(job.config, tokens, repeat)
    checkpoints = CheckpointPaths(files.partial(job.config, tokens, repeat), resume, save)
    # Without its parents: a study that was removed meanwhile is not made again.
    save.parent.mkdir(exist_ok=True)
    was_interrupted = checkpoints.keep.exists()
    params = _describe(job, trainer, repeat)
    name = f"config-{job.config:04d}{repeat_suffix(repeat)}"
    began = time.perf_counter()
    with Recorder(uri, files.name, name, role="proxy", params=params, folder=files.records) as record:
        try:
            return train_once(
                trainer,
                job.params,
                job.fidelity,
                repeat,
                checkpoints=checkpoints,
                record=record,
                on_result=partial(_save_result, record, job, save, result),
                stop=stop,
                monitor=monitor,
            )
        except StoppedEarly as early:
            checkpoints.keep.unlink(missing_ok=True)
            stopped = asdict(early.stopped) | {"seconds": time.perf_counter() - began}
            record.set_tag(f"rung_{job.rung}/stopped", json.dumps(stopped))
            record.finish("KILLED")
            return early.stopped
        except Exception as error:
            # What was saved at the interruption may be the cause. The next attempt starts from the checkpoint.
            if was_interrupted and not _is_of_process(error):
                checkpoints.keep.unlink(missing_ok=True)
            raise


def _is_of_process(error: Exception) -> bool:
    """Return whether an error shows that the process lacks memory or has lost its worker."""
    return isinstance(error, EOFError | ConnectionError) or type(error).__name__ in OUT_OF_MEMORY_ERRORS


def _read_known_loss(result: Path) -> float | None:
    """Return the loss of a training that has finished, or None. A damaged file is set aside with a warning."""
    if not result.exists():
        return None
    try:
        return read_result(result)
    except ValueError:
        set_aside(result)
        logger.warning(f"result {result} is damaged: it is renamed to {result.name}.damaged, and the run is repeated")
        return None


def _describe(job: Job, trainer: Trainer, repeat: int) -> RunSettings:
    """Return the settings of one repeat of a job for the record."""
    return trainer.describe(job.params, job.fidelity, repeat=repeat) | {
        "config": job.config,
        "bracket": list(job.bracket),
        "repeat": repeat,
    }


def _pad_losses(losses: list[float], job: Job) -> list[float]:
    """Return a loss for each seed of a job: NaN for those that were not trained because one had diverged."""
    return losses + [math.nan] * (job.seeds - len(losses))


def _save_result(record: Recorder, job: Job, save: Path, result: Path, loss: float, seconds: float) -> None:
    """Record the loss of a repeat in MLflow's spool file and on disk.

    This comes first, because MLflow may be slow to answer, and the worker may be killed before it tells the study.
    """
    checkpoint = None if math.isnan(loss) else save
    record.log_result(rung=job.rung, tokens=int(job.fidelity.D), loss=loss, seconds=seconds, checkpoint=checkpoint)
    record.finish()
    write_result(result, loss, None if checkpoint is None else measure_checkpoint(checkpoint))


def read_losses(job: Job, files: StudyFiles) -> list[float] | None:
    """Return the losses of a job from disk, whatever became of the process that trained it.

    Args:
        job: The job.
        files: The study's files.

    Returns:
        The loss of each repeat, as `run_job` returns them; None if some repeat has not finished.
    """
    losses: list[float] = []
    for repeat in range(job.seeds):
        loss = _read_known_loss(files.result(job.config, int(job.fidelity.D), repeat))
        if loss is None:
            return None
        losses.append(loss)
        if math.isnan(losses[-1]):
            break
    return _pad_losses(losses, job)


def record_crash(job: Job, trainer: Trainer, files: StudyFiles, uri: str, reason: str) -> None:
    """Record a job that was given up after it had crashed: as diverged, with the reason as a tag.

    Args:
        job: The job.
        trainer: The study's trainer.
        files: The study's files.
        uri: The MLflow store.
        reason: Why it crashed the last time.
    """
    params = _describe(job, trainer, 0)
    name, tokens = f"config-{job.config:04d}", int(job.fidelity.D)
    with Recorder(uri, files.name, name, role="proxy", params=params, folder=files.records) as record:
        record.set_tag(f"rung_{job.rung}/crashed", reason)
        record.log_result(rung=job.rung, tokens=tokens, loss=math.nan, seconds=0.0, checkpoint=None)
        record.finish("FAILED")


def train_once(
    trainer: Trainer,
    params: Mapping[str, Any],
    fidelity: Fidelity,
    repeat: int,
    *,
    checkpoints: CheckpointPaths,
    record: Recorder,
    on_result: Callable[[float, float], None],
    stop: StopSignals,
    monitor: TrainingMonitor | None = None,
) -> float:
    """Train one repeat and record its curve.

    Args:
        trainer: The study's trainer.
        params: The searched parameters.
        fidelity: N and D of the run.
        repeat: The index of the random seed.
        checkpoints: Where the training reads and writes its state.
        record: The run's record, which gets every point.
        on_result: Is called with the loss and the seconds before the trainer removes `checkpoints.keep`, so that at
            every moment one of them is on disk.
        stop: The stop signals.
        monitor: Decides whether to stop the run early.

    Returns:
        The final loss, in nats per token; NaN if the run diverged.

    Raises:
        KeyboardInterrupt: If a stop signal arrived before the end. The state is then in `checkpoints.keep`.
        StoppedEarly: If `monitor` stopped the run.
        RuntimeError: If the trainer ends without a final measurement.
        CheckpointDamaged: If the trainer cannot read `checkpoints.resume`.
    """
    if monitor is not None:
        monitor.check()
    keep, paths = checkpoints.keep, checkpoints
    if keep.is_file() and keep.stat().st_size == 0:
        logger.warning(f"the state of an interrupted run, {keep}, is empty: the run starts again where it began")
        keep.unlink()
    common = (trainer, params, fidelity, repeat)
    if keep.exists():
        try:
            return _train_from(keep, *common, paths, record, on_result, stop, monitor)
        except CheckpointDamaged as damaged:
            set_aside(keep)
            logger.warning(
                f"the state of an interrupted run, {keep}, is damaged: it was renamed to {keep.name}.damaged, and the "
                f"run starts again where it began ({damaged.reason})"
            )
    return _train_from(paths.resume, *common, paths, record, on_result, stop, monitor)


def _train_from(
    resume: Path | None,
    trainer: Trainer,
    params: Mapping[str, Any],
    fidelity: Fidelity,
    repeat: int,
    checkpoints: CheckpointPaths,
    record: Recorder,
    on_result: Callable[[float, float], None],
    stop: StopSignals,
    monitor: TrainingMonitor | None,
) -> float:
    """Train one repeat from a checkpoint, or from the beginning, as `train_once` does."""
    started = time.perf_counter()
    save, keep = checkpoints.save, checkpoints.keep
    points = trainer(params, fidelity, resume=resume, save=save, keep=keep, repeat=repeat)
    with contextlib.closing(points), _export_run_id(trainer, record):  # type: ignore[type-var]
        for point in stop.iterate(_explain_damage(points, resume)):
            record.add(point)
            if point.final:
                loss = math.nan if point.diverged else point.loss
                on_result(loss, time.perf_counter() - started)
                return loss
            if monitor is not None:
                monitor.observe(point)
    raise RuntimeError(
        f"the trainer ended {dict(params)} at {fidelity} without a final measurement: it must yield one with final=True"
    )


def _explain_damage(points: Iterator[Measurement], resume: Path | None) -> Iterator[Measurement]:
    """Yield the points of a training. Its error before the first one that names its checkpoint means that is damaged.

    Raises:
        CheckpointDamaged: If it is.
    """
    try:
        first = next(points, None)
    except (ValueError, OSError) as error:
        if resume is not None and str(resume) in str(error):
            raise CheckpointDamaged(resume, str(error)) from error
        raise
    if first is not None:
        yield first
        yield from points


@contextlib.contextmanager
def _export_run_id(trainer: Trainer, record: Recorder) -> Iterator[None]:
    """Put the MLflow run into the environment of a trainer that is another program, in case it reports there."""
    run = record.wait_for_run_id() if getattr(trainer, "is_program", False) else None
    variables = {} if run is None else {"MLFLOW_RUN_ID": run, "MLFLOW_TRACKING_URI": record.uri}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
