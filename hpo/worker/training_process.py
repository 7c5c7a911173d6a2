"""The process that trains for a worker: what kills a training, or makes it hang, ends that process and not the worker.

It is started once and trains one job after the other, so that imports and data are paid for once; a new one takes its place when it
has gone. It ends with its worker, however that ends, and also when the worker stands still for longer than its lease: another
worker trains the job by then.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from hpo.storage.leases import BEATS
from hpo.storage.retry import storage_errors
from hpo.study.config import StudyConfig
from hpo.worker.early_stopping import EarlyStopper, Hopeless
from hpo.worker.job import run_job
from hpo.worker.signals import StopSignals
from scaling.common.cli import say

if TYPE_CHECKING:
    from hpo.search.view import Job
    from hpo.storage.trial_attributes import Stopped
    from hpo.study.files import StudyFiles
    from scaling.common.measurement import Measurement

POLL_SECONDS = 0.1
START_SECONDS = 300.0  # for imports and data, where runs have a timeout
STOOD_STILL = 75  # exit code: the worker gave no sign of life for a lease
MEMORY = ("MemoryError", "OutOfMemoryError")
OOM_SCORE = 500  # of 1000: where the system runs out of memory, this process goes first


class Crashed(Exception):
    """A training ended without an outcome: its process was killed, ran out of memory, or hung."""


class WorkerStalled(Exception):
    """This worker was stopped for so long that its training process has gone."""


@dataclass
class ChildProcessTrainer:
    """Trains jobs in a process of its own. `with Apart(...) as apart: apart.train(job, ...)`.

    lease, seconds: as the search's. timeout: seconds without a measurement after which a training hangs; None: never.
    """

    study: StudyConfig
    files: StudyFiles
    uri: str
    lease: float
    timeout: float | None = None

    def __post_init__(self) -> None:
        self._process: Any = None
        self._channel: Connection | None = None
        self._alive: Connection | None = None

    def __enter__(self) -> ChildProcessTrainer:
        self._start()  # its imports run beside the worker's own
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(
        self, job: Job, watch: EarlyStopper | None, beat: Callable[[], None], stop: StopSignals
    ) -> list[float] | Stopped:
        """As run_job. Crashed; KeyboardInterrupt when `stop` was asked for; what `beat`, called some times a lease, raises.

        RuntimeError with the traceback when the trainer raised anything else.
        """
        try:
            return self._trained(job, watch, beat, stop)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            ended = self._ended(beat)
            raise (KeyboardInterrupt if stop.requested else ended) from None  # told to stop before it could listen
        except BaseException:
            self.kill()
            raise

    def _trained(
        self, job: Job, watch: EarlyStopper | None, beat: Callable[[], None], stop: StopSignals
    ) -> list[float] | Stopped:
        channel = self._start()
        channel.send(job)
        heard = beaten = time.monotonic()
        patience = (
            None if self.timeout is None else max(self.timeout, START_SECONDS)
        )  # with imports, before it has begun
        told = False
        while True:
            if stop.requested and not told:
                self._process.terminate()
                told = True
            if self._channel_ready():
                kind, value = channel.recv()
                heard, patience = time.monotonic(), self.timeout
                if kind == "begun":
                    continue
                if kind == "point":
                    channel.send(_judged(watch, value))
                    continue
                if kind in ("stopped", "failed", "memory"):
                    self.close()
                if kind == "stopped":
                    raise KeyboardInterrupt
                if kind == "memory":
                    raise Crashed(f"out of memory: {value}")
                if kind == "failed":
                    raise RuntimeError(f"the trainer failed on {job.params} at {job.fidelity}:\n{value}")
                return value  # type: ignore[no-any-return]
            now = time.monotonic()
            if now - beaten > self.lease / BEATS:
                self._sign_of_life()
                beat()
                beaten = now
            if patience is not None and now - heard > patience:
                raise Crashed(f"no measurement for {patience:g} s: killed as hanging")

    def kill(self) -> None:
        """End the process and all that it has started, at once."""
        if self._process is not None and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()  # it may not have its group yet
        self.close()

    def close(self) -> None:
        """Let the process go; it ends when its pipes do."""
        for end in (self._channel, self._alive):
            if end is not None:
                end.close()
        if self._process is not None:
            self._process.join()
        self._process = self._channel = self._alive = None

    def _start(self) -> Connection:
        if self._channel is not None and self._process.is_alive():
            return self._channel
        self.close()
        context = multiprocessing.get_context("spawn")  # neither threads nor a device of the worker's
        self._channel, channel = context.Pipe()
        alive, self._alive = context.Pipe(duplex=False)
        given = (channel, alive, self.study, self.files, self.uri, self.lease)
        self._process = context.Process(target=_main, args=given)
        self._process.start()
        channel.close()
        alive.close()
        return self._channel

    def _channel_ready(self) -> bool:
        assert self._channel is not None
        try:
            return self._channel.poll(POLL_SECONDS)
        except (BrokenPipeError, ConnectionResetError):
            return True  # and reading says so

    def _sign_of_life(self) -> None:
        assert self._alive is not None
        with contextlib.suppress(BrokenPipeError):  # it has gone: the channel says so
            self._alive.send(None)

    def _ended(self, beat: Callable[[], None]) -> Exception:
        """Why the process has gone without a word."""
        process = self._process
        process.join()
        code = process.exitcode
        self.close()
        if code == STOOD_STILL:
            beat()  # Lost, if the job is another's by now
            return WorkerStalled("this worker stood still for longer than its lease")
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return Crashed(f"its process was killed ({name}{': out of memory?' if name == 'SIGKILL' else ''})")
        return Crashed(f"its process ended (exit code {code})")


def _judged(watch: EarlyStopper | None, point: Measurement | None) -> Stopped | None:
    """What the watch, which knows the other runs, says of a point; of what is known already, where there is none."""
    if watch is None:
        return None
    try:
        watch.check() if point is None else watch.look(point)
    except Hopeless as hopeless:
        return hopeless.stopped
    except storage_errors() as error:
        say(f"a point is not kept for forecasts: the storage does not answer ({type(error).__name__})")
    return None


@dataclass
class _Reporting:
    """Every point goes to the worker, whose watch answers."""

    channel: Connection

    def check(self) -> None:
        self.look(None)

    def look(self, point: Measurement | None) -> None:
        self.channel.send(("point", point))
        if (stopped := self.channel.recv()) is not None:
            raise Hopeless(stopped)


class _Life:
    """Ends this process, and all that it has started, with its worker, or when that stands still while there is a job."""

    def __init__(self, alive: Connection, lease: float) -> None:
        self._alive, self._lease = alive, lease
        self._since = math.inf  # when the worker was last heard of, or the job began
        threading.Thread(target=self._watch, daemon=True).start()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = math.inf

    def _watch(self) -> None:
        try:
            while time.monotonic() - self._since <= self._lease:
                if self._alive.poll(self._lease / BEATS):
                    self._alive.recv()
                    if self._since < math.inf:
                        self._since = time.monotonic()
            code = STOOD_STILL
        except (EOFError, OSError):
            code = 0
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(code)


def _main(
    channel: Connection, alive: Connection, study: StudyConfig, files: StudyFiles, uri: str, lease: float
) -> None:
    os.setpgid(0, 0)  # so that a program that the trainer starts can be ended with it
    with contextlib.suppress(OSError):  # Linux's
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    life = _Life(alive, lease)
    with StopSignals() as stop, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        trainer = study.make_trainer()
        while not stop.requested:
            job = channel.recv()
            channel.send(("begun", None))
            with life.at_work():
                try:
                    outcome = run_job(job, trainer, files, uri, stop, _Reporting(channel))
                except KeyboardInterrupt:
                    channel.send(("stopped", None))
                    return
                except (EOFError, BrokenPipeError, ConnectionResetError):
                    raise
                except Exception as error:  # whatever a trainer raises: the worker says it
                    memory = type(error).__name__ in MEMORY
                    channel.send(("memory", str(error)) if memory else ("failed", traceback.format_exc()))
                    return
            channel.send(("done", outcome))
