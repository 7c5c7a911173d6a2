"""A run's record that outlives MLflow's absence: written to a file first, sent in the background, kept until it has arrived.

Every Recorder appends to a file of its own, `<time>-<run>.spool.jsonl`: a head (study, run, parameters), then one line per
point, tag, result and status, each with its time. A thread sends the lines in order, in batches, and notes after each how far
it came. What is sent twice, because a process died in between, changes nothing: a metric of the same key, step, value and time
is one in MLflow's database; tags and statuses are overwritten. A file that has arrived is removed, one that was left
behind is sent by the next Recorder on its folder, or by `send`. A killed process loses nothing that it recorded, a machine
without power at most what came after the last batch, before which the file is synchronized.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.common.cli import say
from scaling.common.measurement import Measurement
from scaling.tracking.client import default_uri
from scaling.tracking.experiment import git_commit
from scaling.tracking.log import flat_params, metrics_of, now_ms, result_of
from scaling.tracking.sender import END_SECONDS, FIRST_TIMEOUT, LONGEST_TIMEOUT, _send_left, _Sender
from scaling.tracking.spool import ENDING, _first_line, _lock_of, _release, _spooled

if TYPE_CHECKING:
    pass

FLUSH_POINTS = 100  # log_batch writes 90 times as many points a second as one call per point
FIRST_SECONDS = 2.0  # a run that ends before is sent as a whole, in half the requests
FLUSH_SECONDS = 10.0  # so that a long run can be watched
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds until a failed sending is tried again, doubled each time
KEPT_BYTES = 4_000_000  # in memory, while the disk takes nothing


class Recorder:
    """Records one run of a study, whether MLflow answers or not: `with Recorder(...) as run: run.add(point)`.

    The run, and its study's, are found by name, or made. Only bad input raises, and before the run: a parameter that is too
    long (ValueError), a folder that cannot be written (OSError). Leaving the `with` waits for MLflow while it takes
    records, and at most END_SECONDS for its next answer; left by an error without `finish`, the run is FAILED, or KILLED
    when it was interrupted.
    """

    def __init__(
        self, uri: str | None, study: str, name: str, *, role: str, params: Mapping[str, Any], folder: Path
    ) -> None:
        head = {"study": study, "name": name, "role": role, "params": flat_params(params)}
        folder.mkdir(parents=True, exist_ok=True)
        self.uri, self.name, self.folder = uri or default_uri(), name, folder
        self.lost = 0  # records that neither disk nor memory could hold
        self.path = folder / f"{time.time_ns():020d}-{re.sub(r'[^-.0-9A-Za-z]', '_', name)}{ENDING}"
        self._sender = _Sender(self.uri)
        self._lock = _lock_of(self.path)
        self._lock.acquire()
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._kept: list[bytes] = []  # what the disk has not taken yet
        self._full = ""  # why
        self._written = self._arrived = 0
        self._closing = self._hurry = self._ended = self._away = False
        self._wake, self._tried = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._send, name=f"records of {name}", daemon=True)
        self._write(head | {"commit": _commit(), "at": now_ms()})

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not self._ended:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")
        self.close()

    def add(self, point: Measurement) -> None:
        """One point of the curve."""
        if metrics := metrics_of(point):
            self._write({"at": now_ms(), "step": point.tokens, "metrics": metrics})

    def result(self, *, rung: int, tokens: int, loss: float, seconds: float, checkpoint: Path | None) -> None:
        """The outcome of one rung; NaN loss means diverged."""
        metrics, tags = result_of(rung=rung, tokens=tokens, loss=loss, seconds=seconds, checkpoint=checkpoint)
        self._write({"at": now_ms(), "step": tokens, "metrics": metrics, "tags": tags})

    def figures(self, values: Mapping[str, float]) -> None:
        """Figures of the whole run, at no step of it; what is not finite is left out."""
        kept = {k: v for k, v in values.items() if math.isfinite(v)}
        self._write({"at": now_ms(), "step": 0, "metrics": kept})

    def tag(self, name: str, value: str) -> None:
        """A tag, on its way at once."""
        self._write({"at": now_ms(), "tags": {name: value}}, hurry=True)

    def finish(self, status: str = "FINISHED") -> None:
        """FINISHED, FAILED or KILLED."""
        self._ended = True
        self._write({"at": now_ms(), "status": status})

    @property
    def pending(self) -> int:
        """Records of this run of which it is not known yet that MLflow has them."""
        return self._written + len(self._kept) - self._arrived

    def run_id(self) -> str | None:
        """The run's id in MLflow; None when it did not answer the first time, or not within END_SECONDS."""
        with self._wake:
            self._hurry = True
            self._wake.notify()
        self._tried.wait(END_SECONDS)
        return self._sender.runs[self.path][1] if self.path in self._sender.runs else None

    def close(self) -> None:
        """Send the rest while MLflow takes it; what is left stays in the folder."""
        with self._wake:
            if self._closing:
                return
            self._flush()
            self.lost += len(self._kept)
            self._kept.clear()
            os.close(self._file)
            self._closing = True
            self._wake.notify()
        closed = time.monotonic()
        while self._thread.is_alive() and time.monotonic() < max(closed, self._sender.alive) + END_SECONDS:
            self._thread.join(0.1)
        if self.lost:
            say(f"{self.name}: {self.lost} RECORDS ARE LOST: {self.path} could not be written ({self._full})")
        if self.pending:
            say(f"{self.name}: {self.pending} records are not in MLflow yet; {self.folder} keeps them to be sent later")

    def _write(self, record: Mapping[str, Any], *, hurry: bool = False) -> None:
        line = (json.dumps(record) + "\n").encode()
        with self._wake:
            self._kept.append(line)
            self._flush()
            while self._kept and sum(map(len, self._kept)) > KEPT_BYTES:
                self._kept.pop(0)
                self.lost += 1
            self._hurry |= hurry or self.pending >= FLUSH_POINTS
            if self._hurry:
                self._wake.notify()

    def _flush(self) -> None:
        """Append what is not on disk yet, each line whole or not at all."""
        while self._kept:
            end = os.fstat(self._file).st_size
            try:
                if os.write(self._file, self._kept[0]) < len(self._kept[0]):
                    raise OSError("no space left for a whole line")
            except OSError as error:
                os.ftruncate(self._file, end)
                if not self._full:
                    say(f"{self.name}: CANNOT RECORD to {self.path}: {error}; records wait in memory, training goes on")
                self._full = str(error)
                return
            del self._kept[0]
            self._written += 1

    def _send(self) -> None:
        """The thread: wait, send what there is, again; after the end once more."""
        wait, last = FIRST_SECONDS, False
        while not last:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or (self._hurry and not self._away), wait)
                last, self._hurry = self._closing, False
            try:
                for path in _spooled(self.folder):
                    if path < self.path:
                        _send_left(self._sender, path, before=self.name)
                for count in self._sender.send(self.path):
                    self._arrived += count
                if self._away:
                    say(f"{self.name}: MLflow answers again and has all records")
                wait, self._away, self._sender.timeout = FLUSH_SECONDS, False, FIRST_TIMEOUT
                if last:
                    self._sender.end(self.path)
            except Exception as error:  # whatever it is, it must not stop a training, and is said
                if not self._away:
                    say(f"{self.name}: records wait in {self.folder}, MLflow does not take them: {_first_line(error)}")
                wait, self._away = min(2 * wait, LONGEST_WAIT) if self._away else FIRST_WAIT, True
                self._sender.timeout = min(2 * self._sender.timeout, LONGEST_TIMEOUT)
            self._tried.set()
        _release(self._lock, self.path)


@cache
def _commit() -> str:
    """Of the code that this process began with."""
    return git_commit()
