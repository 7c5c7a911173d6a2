"""Record a run even while MLflow cannot be reached: write to a file first, and send it in the background.

Every Recorder appends to a spool file of its own, `<time>-<run>.spool.jsonl`: a head (study, run, parameters), then one
line per point, tag, result and status, each with its time. A thread sends the lines in order and in batches, and notes
after each batch how far it has come. What is sent twice, because a process was killed in between, changes nothing: a
metric with the same key, step, value and time exists once in MLflow's database, and tags and statuses are overwritten.
A file is removed once MLflow has it. A file that was left behind is sent by the next Recorder on its folder, or by
`send_spooled_records`. A killed process loses nothing that it recorded; a machine that loses power loses at most what
came after the last batch, before which the file is flushed to disk.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from scaling.common.json_text import dump_json
from scaling.common.measurement import Measurement
from scaling.tracking.client import import_mlflow, resolve_uri
from scaling.tracking.experiment import read_git_commit
from scaling.tracking.log import now_ms, point_to_metrics, result_to_metrics, serialize_params
from scaling.tracking.sender import (
    CLOSE_SECONDS,
    FIRST_TIMEOUT_SECONDS,
    LONGEST_TIMEOUT_SECONDS,
    SpoolSender,
    send_leftover_file,
)
from scaling.tracking.spool import (
    SPOOL_SUFFIX,
    SpoolHead,
    SpoolRecord,
    get_lock,
    list_spool_files,
    release_lock,
    summarize_error,
)

logger = logging.getLogger("muscale.scaling")

# Records after which a batch is sent at once. Batches reach 90 times as many points a second as one request per point.
FLUSH_POINTS = 100
# Seconds until the first batch: a run that ends before is sent as a whole, in half the requests.
FIRST_FLUSH_SECONDS = 2.0
# Seconds between batches, so that a long run can be watched.
FLUSH_SECONDS = 10.0
# Seconds until a failed request is tried again, doubled each time.
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 30.0
# Most bytes kept in memory while the disk takes nothing.
MAX_BUFFERED_BYTES = 4_000_000


class Recorder:
    """Record one run of a study, whether MLflow answers or not.

    The run and its study's run are found by name, or created. Only a folder that cannot be written raises, and only
    before the run. Leaving the `with` block waits while MLflow takes records, and at most CLOSE_SECONDS for its next
    answer. If an error leaves the block before `finish`, the run becomes FAILED, or KILLED if it was interrupted.

    Attributes:
        uri: The store's tracking URI, a SQLite file by its absolute path.
        name: The name of the run.
        folder: Where the spool files are.
        path: The spool file of this run.
        lost: Records that neither disk nor memory could hold.

    Example:
        with Recorder(uri, study, name, role="proxy", params=params, folder=folder) as run:
            for point in train(...):
                run.add(point)
    """

    def __init__(
        self, uri: str | None, study: str, name: str, *, role: str, params: Mapping[str, Any], folder: Path
    ) -> None:
        """Create the spool file and write its head.

        Args:
            uri: The store's tracking URI; by default `scaling.tracking.client.default_uri()`.
            study: The study's name.
            name: The name of the configuration or target.
            role: "proxy", "confirm" or "target".
            params: The settings of the run.
            folder: Where the spool file goes; created if it does not exist. The folder around it must exist.

        Raises:
            OSError: If the folder cannot be written.
        """
        texts = serialize_params(params)
        # Without its parents: a study that was removed meanwhile is not made again.
        folder.mkdir(exist_ok=True)
        self.uri, self.name, self.folder = resolve_uri(uri), name, folder
        self.lost = 0
        self.path = folder / f"{time.time_ns():020d}-{re.sub(r'[^-.0-9A-Za-z]', '_', name)}{SPOOL_SUFFIX}"
        self._sender = SpoolSender(self.uri)
        self._lock = get_lock(self.path)
        self._lock.acquire()
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        # Lines that the disk has not taken yet, and the error that it gave.
        self._buffer: list[bytes] = []
        self._disk_error = ""
        self._written = self._arrived = 0
        # Flags shared with the thread, changed while holding `_wake`.
        self._closing = self._hurry = self._finished = self._disconnected = False
        self._wake, self._first_attempt = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._send_in_background, name=f"records of {name}", daemon=True)
        head: SpoolHead = {
            "study": study,
            "name": name,
            "role": role,
            "params": texts,
            "commit": read_git_commit_once(),
            "at": now_ms(),
        }
        self._write(head)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not self._finished:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")
        self.close()

    def add(self, point: Measurement) -> None:
        """Record one point of the curve."""
        if metrics := point_to_metrics(point):
            self._write({"at": now_ms(), "step": point.tokens, "metrics": metrics})

    def log_result(self, *, rung: int, tokens: int, loss: float, seconds: float, checkpoint: Path | None) -> None:
        """Record the result of one rung.

        Args:
            rung: The number of the rung.
            tokens: Training tokens.
            loss: Final loss, nats per token; NaN or infinite if the run diverged.
            seconds: Training time.
            checkpoint: Where the model was saved, if it was.
        """
        metrics, tags = result_to_metrics(rung=rung, tokens=tokens, loss=loss, seconds=seconds, checkpoint=checkpoint)
        self._write({"at": now_ms(), "step": tokens, "metrics": metrics, "tags": tags})

    def log_figures(self, values: Mapping[str, float]) -> None:
        """Record figures of the whole run at step 0. Values that are not finite are left out."""
        finite = {k: v for k, v in values.items() if math.isfinite(v)}
        self._write({"at": now_ms(), "step": 0, "metrics": finite})

    def set_tag(self, name: str, value: str) -> None:
        """Record a tag and send it at once."""
        self._write({"at": now_ms(), "tags": {name: value}}, hurry=True)

    def finish(self, status: str = "FINISHED") -> None:
        """Record how the run ended: "FINISHED", "FAILED" or "KILLED"."""
        self._finished = True
        self._write({"at": now_ms(), "status": status})

    @property
    def pending(self) -> int:
        """How many records of this run are not known to be in MLflow."""
        return self._written + len(self._buffer) - self._arrived

    def wait_for_run_id(self) -> str | None:
        """Return the run's id in MLflow, or None if the first attempt to reach it fails or takes over CLOSE_SECONDS."""
        # The import takes seconds that are not the server's fault.
        import_mlflow()
        with self._wake:
            self._hurry = True
            self._wake.notify()
        self._first_attempt.wait(CLOSE_SECONDS)
        return self._sender.runs[self.path][1] if self.path in self._sender.runs else None

    def close(self) -> None:
        """Send the rest while MLflow takes it. What it does not take stays in the folder."""
        with self._wake:
            if self._closing:
                return
            self._flush()
            self.lost += len(self._buffer)
            self._buffer.clear()
            os.close(self._file)
            self._closing = True
            self._wake.notify()
        closed = time.monotonic()
        while self._thread.is_alive() and time.monotonic() < max(closed, self._sender.last_progress) + CLOSE_SECONDS:
            self._thread.join(0.1)
        if self.lost:
            logger.error(
                f"{self.name}: {self.lost} records are lost, because {self.path} could not be written: "
                f"{self._disk_error}"
            )
        if self.pending:
            logger.warning(
                f"{self.name}: {self.pending} records are not in MLflow yet; "
                f"they are kept in {self.folder} and sent later"
            )

    def _write(self, record: SpoolHead | SpoolRecord, *, hurry: bool = False) -> None:
        line = (dump_json(record) + "\n").encode()
        with self._wake:
            self._buffer.append(line)
            self._flush()
            while self._buffer and sum(map(len, self._buffer)) > MAX_BUFFERED_BYTES:
                self._buffer.pop(0)
                self.lost += 1
            self._hurry |= hurry or self.pending >= FLUSH_POINTS
            if self._hurry:
                self._wake.notify()

    def _flush(self) -> None:
        """Append to the file what is not on disk yet, each line whole or not at all."""
        while self._buffer:
            end = os.fstat(self._file).st_size
            try:
                if os.write(self._file, self._buffer[0]) < len(self._buffer[0]):
                    raise OSError("no space left for a whole line")
            except OSError as error:
                os.ftruncate(self._file, end)
                if not self._disk_error:
                    logger.warning(
                        f"{self.name}: cannot write records to {self.path}: {error}; "
                        "they are kept in memory, and training continues"
                    )
                self._disk_error = str(error)
                return
            del self._buffer[0]
            self._written += 1

    def _send_in_background(self) -> None:
        """Run the thread: wait, send what there is, and repeat; once more after the end of the run."""
        wait, is_last = FIRST_FLUSH_SECONDS, False
        while not is_last:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or (self._hurry and not self._disconnected), wait)
                is_last, self._hurry = self._closing, False
            try:
                for path in list_spool_files(self.folder):
                    if path < self.path:
                        send_leftover_file(self._sender, path, before=self.name)
                for count in self._sender.send(self.path):
                    self._arrived += count
                if self._disconnected:
                    logger.info(f"{self.name}: MLflow answers again and has all records")
                wait, self._disconnected, self._sender.timeout = FLUSH_SECONDS, False, FIRST_TIMEOUT_SECONDS
                if is_last:
                    self._sender.clean_up(self.path)
            # Whatever the error is, it must not stop a training.
            except Exception as error:
                if not self._disconnected:
                    logger.warning(
                        f"{self.name}: records wait in {self.folder}, because MLflow does not take them: "
                        f"{summarize_error(error)}"
                    )
                wait = min(2 * wait, LONGEST_RETRY_SECONDS) if self._disconnected else FIRST_RETRY_SECONDS
                self._disconnected = True
                self._sender.timeout = min(2 * self._sender.timeout, LONGEST_TIMEOUT_SECONDS)
            self._first_attempt.set()
        release_lock(self._lock, self.path)


@cache
def read_git_commit_once() -> str:
    """Return the git commit at the first call, which is that of the code that this process runs."""
    return read_git_commit()
