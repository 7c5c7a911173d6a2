"""Send spooled records to MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from scaling.common.cli import say
from scaling.common.redact import without_passwords
from scaling.tracking.client import connect, default_uri, impatient, load, refused
from scaling.tracking.experiment import child_lacking, drop_twins, finish, study_run
from scaling.tracking.log import log_records
from scaling.tracking.spool import (
    _aside,
    _batch,
    _first_line,
    _left,
    _lock_of,
    _note_of,
    _position,
    _release,
    _set_aside,
    _spooled,
    _write_position,
    is_head,
    read_line,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = 200  # lines of at most 3 metrics; MLflow takes 1000
FIRST_TIMEOUT, LONGEST_TIMEOUT = 10.0, 120.0  # seconds for a request, likewise: a slow server is not one that is away
END_SECONDS = 10.0  # that the end of a run waits for an MLflow that gives no sign of life


def send(folder: Path, uri: str | None = None) -> int:
    """Send what Recorders left in the folder; the number of records that are still not in MLflow."""
    sender = _Sender(uri or default_uri())
    try:
        for path in _spooled(folder):
            _send_left(sender, path)
    except Exception as error:  # said, and counted below
        say(f"records wait in {folder}, MLflow does not take them: {_first_line(error)}")
    return sum(_left(path) for path in _spooled(folder))


class _Sender:
    """A connection, made when it is first needed, and the runs that were found or made there."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.runs: dict[Path, tuple[str, str]] = {}  # file -> (parent's id, id)
        self.owed: dict[Path, dict[str, str]] = {}  # parameters that go with a file's first records
        self.positions: dict[Path, int] = {}  # bytes that have arrived
        self.alive = 0.0  # when it was last seen to make progress, by time.monotonic
        self.timeout = FIRST_TIMEOUT
        self.batch = BATCH  # smaller after a failure, in case a slow server takes too long over so many
        self.stumbled = False  # a request to make a run may have come to nothing, or not
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            load()  # seconds, for which no server is to blame
            self.alive = time.monotonic()
            self._client = _connected(self.uri)
            self.alive = time.monotonic()
        return self._client

    def send(self, path: Path) -> Iterator[int]:
        """Send the file's whole lines, from where it was left; yields the number of lines of each batch that has arrived."""
        with path.open("r+b") as file, impatient(self.timeout):
            os.fsync(file.fileno())
            head = file.readline()
            if not head.endswith(b"\n"):
                return
            position = self.positions.get(path) or _position(path)
            if path not in self.runs:
                told = read_line(head, is_head)
                if told is None:
                    say(f"{path}: its first line names no run; kept as {_aside(path)}")
                    path.rename(_aside(path))
                    return
                self.runs[path], self.owed[path] = self._find_or_make(told, path.parent, reopen=not position)
            _, run = self.runs[path]
            heads = int(not position)
            file.seek(position or len(head))
            while (records := _batch(file, self.batch, path)) or heads:
                self.batch = max(1, self.batch // 2)
                self._put(run, records, path)
                self.batch = min(BATCH, 4 * self.batch)
                self._note(path, file.tell())
                yield heads + len(records)
                heads = 0

    def _note(self, path: Path, position: int) -> None:
        """Keep how far a file has arrived. Where the disk is full, only here: what is sent twice does no harm."""
        self.positions[path] = position
        self.alive = time.monotonic()
        try:
            _write_position(path, position)
        except OSError as error:
            say(f"{_note_of(path)}: cannot be written: {error}")

    def end(self, path: Path) -> None:
        """Remove a file that has arrived, and runs that a server made of requests given up as unanswered."""
        if self.stumbled and path in self.runs:
            with impatient():
                drop_twins(self.client, *self.runs[path])
        for file in (path, _note_of(path)):
            file.unlink(missing_ok=True)

    def _find_or_make(
        self, head: Mapping[str, Any], folder: Path, *, reopen: bool
    ) -> tuple[tuple[str, str], dict[str, str]]:
        """(parent's id, id), and the parameters that the run lacks."""
        client = self.client  # imports and a connection: seconds, for which nobody else should wait
        try:
            with FileLock(folder / ".spool.lock", timeout=END_SECONDS):  # two arms of one study would make it twice
                parent = study_run(client, head["study"])
                name, role, params = head["name"], head["role"], head["params"]
                run, owed = child_lacking(
                    client, parent, name, role, params, commit=head["commit"], began=head["at"], reopen=reopen
                )
                return (parent, run), owed
        except Exception:
            self.stumbled = True
            raise

    def _put(self, run: str, records: list[dict[str, Any]], path: Path) -> None:
        """One batch. Of one that MLflow refuses for good, each record alone; what is refused is set aside.

        Parameters that it refuses are no record's fault: they are an error as long as they are owed.
        """
        owed = self.owed.get(path, {})
        metrics = [(r["metrics"], r["step"], r["at"]) for r in records if "metrics" in r]
        tags = {name: value for r in records for name, value in r.get("tags", {}).items()}
        try:
            log_records(self.client, run, metrics, tags, owed)
        except Exception as error:
            if not refused(error):
                raise
            if owed:
                log_records(self.client, run, [], {}, owed)
                del self.owed[path]
                self._put(run, records, path)
                return
            if len(records) == 1:
                say(f"MLflow REFUSES a record, kept in {_aside(path)}: {_first_line(error)}")
                _set_aside(path, records[0] | {"refused": without_passwords(error)})
                return
            for record in records:
                self._put(run, [record], path)
            return
        self.owed.pop(path, None)
        ends = [r for r in records if "status" in r]
        if ends:
            finish(self.client, run, status=ends[-1]["status"], at=ends[-1]["at"])


def _send_left(sender: _Sender, path: Path, *, before: str | None = None) -> None:
    """Send a file whose process has ended, and remove it; one that is in other hands is left to them.

    before: the run whose own records are waiting. RuntimeError when the file is of the same run and still in other hands.
    """
    lock = _lock_of(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as held:
        with path.open("rb") as file:
            head = file.readline()
        if before is not None and head.endswith(b"\n") and (read_line(head, is_head) or {}).get("name") == before:
            raise RuntimeError(f"earlier records of {before} are in the hands of another process, {path}") from held
        return
    try:
        if path.exists():
            for _ in sender.send(path):
                pass
            if not path.exists():
                return
            if _position(path) < path.stat().st_size:
                say(f"{path}: its last line was cut off when its writer was killed, and is left out")
            sender.end(path)
    finally:
        _release(lock, path)


@cache
def _connected(uri: str) -> MlflowClient:
    return connect(uri)
