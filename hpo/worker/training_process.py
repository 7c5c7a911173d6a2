"""Train in a child process, so a crash or hang spares the worker.

The process is started once and trains one job after the other, so that imports and data are paid for once. If it
ends, a new one takes its place. It ends with its worker, however the worker ends. It also ends when the worker stalls
for longer than its lease, because another worker trains the job by then.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from hpo.storage.leases import BEATS_PER_LEASE
from hpo.storage.retry import get_storage_errors
from hpo.study.config import StudyConfig
from hpo.worker.checkpoints import CheckpointDamaged
from hpo.worker.early_stopping import StoppedEarly
from hpo.worker.failures import OUT_OF_MEMORY_ERRORS, describe_error
from hpo.worker.job import TrainingMonitor, run_job
from hpo.worker.signals import StopSignals
from scaling.common.logs import configure_logging

if TYPE_CHECKING:
    from hpo.search.view import Job
    from hpo.storage.trial_attributes import Stopped
    from hpo.study.files import StudyFiles
    from scaling.common.measurement import Measurement

logger = logging.getLogger("muscale.hpo")

POLL_SECONDS = 0.1
# How long a training with a timeout may take to import and to load data before its first sign of life.
START_SECONDS = 300.0
# Exit code of the process when the worker has stalled for longer than its lease.
EXIT_STALLED = 75
# Of at most 1000. If the system runs out of memory, it kills this process before the worker.
OOM_SCORE = 500


class TrainingCrashed(Exception):
    """A training ended without a result: its process was killed, ran out of memory, or hung."""


class WorkerStalled(Exception):
    """This worker was suspended for so long that its training process has ended."""


@dataclass
class ChildProcessTrainer:
    """Trains jobs in a child process: `with ChildProcessTrainer(...) as trainer: trainer.train(job, ...)`.

    Attributes:
        study: The study, from which the process constructs its trainer.
        files: The study's files.
        uri: The MLflow store.
        lease: Seconds of the search's lease.
        timeout: Seconds without a measurement after which a training is killed as hanging; None: never.
    """

    study: StudyConfig
    files: StudyFiles
    uri: str
    lease: float
    timeout: float | None = None

    def __post_init__(self) -> None:
        self._process: Any = None
        self._channel: Connection | None = None
        self._heartbeat: Connection | None = None

    def __enter__(self) -> ChildProcessTrainer:
        # Its imports then run beside the worker's own.
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(
        self, job: Job, monitor: TrainingMonitor | None, beat: Callable[[], None], stop: StopSignals
    ) -> list[float] | Stopped:
        """Train a job as `run_job` does, in the child process.

        Args:
            job: The job.
            monitor: Receives each point, and may stop the run early.
            beat: Writes a heartbeat. It is called several times per lease, and what it raises ends the training.
            stop: The stop signals.

        Returns:
            The loss of each repeat, or where and why the run was stopped early.

        Raises:
            TrainingCrashed: If the process was killed, ran out of memory, or hung.
            WorkerStalled: If this worker was suspended for longer than its lease.
            KeyboardInterrupt: If a stop signal arrived.
            CheckpointDamaged: If the trainer cannot read the checkpoint that it was to continue.
            TrainingFailed: If the trainer raised any other error.
        """
        try:
            return self._train(job, monitor, beat, stop)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            error = self._explain_exit(beat)
            # A signal may end the process before it handles signals.
            raise (KeyboardInterrupt if stop.requested else error) from None
        except BaseException:
            self.kill()
            raise

    def _train(
        self, job: Job, monitor: TrainingMonitor | None, beat: Callable[[], None], stop: StopSignals
    ) -> list[float] | Stopped:
        channel = self._start()
        channel.send(job)
        last_message = last_beat = time.monotonic()
        # Until the job has begun, the process may still import.
        timeout = None if self.timeout is None else max(self.timeout, START_SECONDS)
        was_terminated = False
        while True:
            if stop.requested and not was_terminated:
                self._process.terminate()
                was_terminated = True
            if self._has_message():
                kind, value = channel.recv()
                last_message, timeout = time.monotonic(), self.timeout
                if kind == "begun":
                    continue
                if kind == "point":
                    channel.send(_judge(monitor, value))
                    continue
                if kind in ("stopped", "failed", "damaged", "memory"):
                    self.close()
                if kind == "stopped":
                    raise KeyboardInterrupt
                if kind == "memory":
                    raise TrainingCrashed(f"out of memory: {value}")
                if kind in ("failed", "damaged"):
                    raise value
                return value  # type: ignore[no-any-return]
            now = time.monotonic()
            if now - last_beat > self.lease / BEATS_PER_LEASE:
                self._send_heartbeat()
                beat()
                last_beat = now
            if timeout is not None and now - last_message > timeout:
                raise TrainingCrashed(f"no measurement for {timeout:g} s: killed as hanging")

    def kill(self) -> None:
        """Kill the process and everything that it has started."""
        if self._process is not None and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            # The process may not have made its own group yet.
            self._process.kill()
        self.close()

    def close(self) -> None:
        """Close the pipes, upon which the process ends, and wait for it."""
        for end in (self._channel, self._heartbeat):
            if end is not None:
                end.close()
        if self._process is not None:
            self._process.join()
        self._process = self._channel = self._heartbeat = None

    def _start(self) -> Connection:
        """Start the process unless it runs, and return the pipe to it."""
        if self._channel is not None and self._process.is_alive():
            return self._channel
        self.close()
        # A spawned process inherits neither the worker's threads nor its GPU context.
        context = multiprocessing.get_context("spawn")
        self._channel, channel = context.Pipe()
        heartbeat, self._heartbeat = context.Pipe(duplex=False)
        level = logger.getEffectiveLevel()
        arguments = (channel, heartbeat, self.study, self.files, self.uri, self.lease, level)
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        channel.close()
        heartbeat.close()
        return self._channel

    def _has_message(self) -> bool:
        """Wait up to POLL_SECONDS for a message of the process, and return whether there is one."""
        assert self._channel is not None
        try:
            return self._channel.poll(POLL_SECONDS)
        except (BrokenPipeError, ConnectionResetError):
            # Reading the message raises the error again.
            return True

    def _send_heartbeat(self) -> None:
        """Show the process that its worker is alive."""
        assert self._heartbeat is not None
        # If the process has ended, the next message reports it.
        with contextlib.suppress(BrokenPipeError):
            self._heartbeat.send(None)

    def _explain_exit(self, beat: Callable[[], None]) -> Exception:
        """Return why the process ended without a result.

        Raises:
            LeaseLost: If `beat` finds that another worker has taken the job.
        """
        process = self._process
        process.join()
        code = process.exitcode
        self.close()
        if code == EXIT_STALLED:
            beat()
            return WorkerStalled("this worker stalled for longer than its lease")
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return TrainingCrashed(f"its process was killed ({name}{': out of memory?' if name == 'SIGKILL' else ''})")
        return TrainingCrashed(f"its process ended (exit code {code})")


def _judge(monitor: TrainingMonitor | None, point: Measurement | None) -> Stopped | None:
    """Ask the monitor whether the run stops at a point; None: at the last point that it knows."""
    if monitor is None:
        return None
    try:
        monitor.check() if point is None else monitor.observe(point)
    except StoppedEarly as early:
        return early.stopped
    except get_storage_errors() as error:
        logger.warning(f"a point is not stored for forecasts: the storage does not answer ({type(error).__name__})")
    return None


@dataclass
class _MonitorProxy:
    """Stands for the worker's monitor in the training process: sends every point there and waits for the decision."""

    channel: Connection

    def check(self) -> None:
        self._ask(None)

    def observe(self, point: Measurement) -> None:
        self._ask(point)

    def _ask(self, point: Measurement | None) -> None:
        self.channel.send(("point", point))
        if (stopped := self.channel.recv()) is not None:
            raise StoppedEarly(stopped)


class _Watchdog:
    """Ends this process and everything that it has started, when its worker ends or stalls during a job."""

    def __init__(self, heartbeat: Connection, lease: float) -> None:
        self._heartbeat, self._lease = heartbeat, lease
        # When the last heartbeat arrived or the job began. Without a job, a stalled worker does no harm.
        self._since = math.inf
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def during_job(self) -> Iterator[None]:
        """Demand heartbeats in the block."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = math.inf

    def _watch(self) -> None:
        try:
            while time.monotonic() - self._since <= self._lease:
                if self._heartbeat.poll(self._lease / BEATS_PER_LEASE):
                    self._heartbeat.recv()
                    if self._since < math.inf:
                        self._since = time.monotonic()
            code = EXIT_STALLED
        except (EOFError, OSError):
            code = 0
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(code)


def _serve(
    channel: Connection,
    heartbeat: Connection,
    study: StudyConfig,
    files: StudyFiles,
    uri: str,
    lease: float,
    level: int,
) -> None:
    """Run in the child process: train the jobs that arrive through `channel`, and answer with their results."""
    configure_logging(level)
    # A program that the trainer starts can then be killed with this process.
    os.setpgid(0, 0)
    # Only Linux has this file.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    watchdog = _Watchdog(heartbeat, lease)
    with StopSignals() as stop, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        trainer = study.make_trainer()
        while not stop.requested:
            job = channel.recv()
            channel.send(("begun", None))
            with watchdog.during_job():
                try:
                    outcome = run_job(job, trainer, files, uri, stop, _MonitorProxy(channel))
                except KeyboardInterrupt:
                    channel.send(("stopped", None))
                    return
                except (EOFError, BrokenPipeError, ConnectionResetError):
                    raise
                except CheckpointDamaged as damaged:
                    channel.send(("damaged", damaged))
                    return
                # A trainer may raise anything, which the worker reports.
                except Exception as error:
                    if type(error).__name__ in OUT_OF_MEMORY_ERRORS:
                        channel.send(("memory", str(error)))
                    else:
                        channel.send(("failed", describe_error(error, files.log(job.config, int(job.fidelity.D)))))
                    return
            channel.send(("done", outcome))
