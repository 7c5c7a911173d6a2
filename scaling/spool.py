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
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout

from scaling import tracking
from scaling.cli import say
from scaling.runs import Measurement
from scaling.secrets import without_passwords
from scaling.spool_lines import is_head, is_record, read_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

FLUSH_POINTS = 100  # log_batch writes 90 times as many points a second as one call per point
FIRST_SECONDS = 2.0  # a run that ends before is sent as a whole, in half the requests
FLUSH_SECONDS = 10.0  # so that a long run can be watched
BATCH = 200  # lines of at most 3 metrics; MLflow takes 1000
MAX_TAGS = 100  # per request, by MLflow
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds until a failed sending is tried again, doubled each time
FIRST_TIMEOUT, LONGEST_TIMEOUT = 10.0, 120.0  # seconds for a request, likewise: a slow server is not one that is away
END_SECONDS = 10.0  # that the end of a run waits for an MLflow that gives no sign of life
KEPT_BYTES = 4_000_000  # in memory, while the disk takes nothing
ENDING, ASIDE = ".spool.jsonl", ".refused.jsonl"


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
        head = {"study": study, "name": name, "role": role, "params": tracking.flat_params(params)}
        folder.mkdir(parents=True, exist_ok=True)
        self.uri, self.name, self.folder = uri or tracking.default_uri(), name, folder
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
        self._write(head | {"commit": _commit(), "at": tracking.now_ms()})

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not self._ended:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")
        self.close()

    def add(self, point: Measurement) -> None:
        """One point of the curve."""
        if metrics := tracking.metrics_of(point):
            self._write({"at": tracking.now_ms(), "step": point.tokens, "metrics": metrics})

    def result(self, *, rung: int, tokens: int, loss: float, seconds: float, checkpoint: Path | None) -> None:
        """The outcome of one rung; NaN loss means diverged."""
        metrics, tags = tracking.result_of(rung=rung, tokens=tokens, loss=loss, seconds=seconds, checkpoint=checkpoint)
        self._write({"at": tracking.now_ms(), "step": tokens, "metrics": metrics, "tags": tags})

    def figures(self, values: Mapping[str, float]) -> None:
        """Figures of the whole run, at no step of it; what is not finite is left out."""
        kept = {k: v for k, v in values.items() if math.isfinite(v)}
        self._write({"at": tracking.now_ms(), "step": 0, "metrics": kept})

    def tag(self, name: str, value: str) -> None:
        """A tag, on its way at once."""
        self._write({"at": tracking.now_ms(), "tags": {name: value}}, hurry=True)

    def finish(self, status: str = "FINISHED") -> None:
        """FINISHED, FAILED or KILLED."""
        self._ended = True
        self._write({"at": tracking.now_ms(), "status": status})

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


def send(folder: Path, uri: str | None = None) -> int:
    """Send what Recorders left in the folder; the number of records that are still not in MLflow."""
    sender = _Sender(uri or tracking.default_uri())
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
            tracking.load()  # seconds, for which no server is to blame
            self.alive = time.monotonic()
            self._client = _connected(self.uri)
            self.alive = time.monotonic()
        return self._client

    def send(self, path: Path) -> Iterator[int]:
        """Send the file's whole lines, from where it was left; yields the number of lines of each batch that has arrived."""
        with path.open("r+b") as file, tracking.impatient(self.timeout):
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
            with tracking.impatient():
                tracking.drop_twins(self.client, *self.runs[path])
        for file in (path, _note_of(path)):
            file.unlink(missing_ok=True)

    def _find_or_make(
        self, head: Mapping[str, Any], folder: Path, *, reopen: bool
    ) -> tuple[tuple[str, str], dict[str, str]]:
        """(parent's id, id), and the parameters that the run lacks."""
        client = self.client  # imports and a connection: seconds, for which nobody else should wait
        try:
            with FileLock(folder / ".spool.lock", timeout=END_SECONDS):  # two arms of one study would make it twice
                parent = tracking.study_run(client, head["study"])
                name, role, params = head["name"], head["role"], head["params"]
                run, owed = tracking.child_lacking(
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
            tracking.log_records(self.client, run, metrics, tags, owed)
        except Exception as error:
            if not tracking.refused(error):
                raise
            if owed:
                tracking.log_records(self.client, run, [], {}, owed)
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
            tracking.finish(self.client, run, status=ends[-1]["status"], at=ends[-1]["at"])


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
    return tracking.connect(uri)


@cache
def _commit() -> str:
    """Of the code that this process began with."""
    return tracking.git_commit()


def _spooled(folder: Path) -> list[Path]:
    """The files with records, oldest first."""
    return sorted(folder.glob("*" + ENDING))


def _aside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(ENDING) + ASIDE)


def _set_aside(path: Path, record: Mapping[str, Any]) -> None:
    with _aside(path).open("a") as file:
        file.write(json.dumps(record) + "\n")


def _batch(file: BinaryIO, size: int, path: Path) -> list[dict[str, Any]]:
    """The next `size` records of whole lines, at most; the file then stands behind them. Lines that are none are set aside."""
    records: list[dict[str, Any]] = []
    names: set[str] = set()
    while len(records) < size and len(names) < MAX_TAGS - 1:
        end = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(end)
            break
        record = read_line(line, is_record)
        if record is None:
            say(f"{path}: a line that is no record, kept in {_aside(path)}")
            _set_aside(path, {"refused": "no record", "line": line.decode(errors="replace")})
            continue
        records.append(record)
        names |= record.get("tags", {}).keys()
    return records


def _left(path: Path) -> int:
    """How many records of a file have not arrived."""
    with path.open("rb") as file:
        file.seek(_position(path))
        return sum(line.endswith(b"\n") for line in file)


def _position(path: Path) -> int:
    """Bytes of a file that have arrived."""
    try:
        return max(0, int(_note_of(path).read_text()))
    except (FileNotFoundError, ValueError):
        return 0  # what is sent twice does no harm


def _write_position(path: Path, position: int) -> None:
    """Whole or not at all."""
    beside = _note_of(path).with_suffix(".tmp")
    with beside.open("w") as file:
        file.write(str(position))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, _note_of(path))


def _note_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(ENDING) + ".sent")


def _lock_of(path: Path) -> FileLock:
    return FileLock(f"{path}.lock", thread_local=False)


def _release(lock: FileLock, path: Path) -> None:
    lock.release()
    if not path.exists():
        Path(lock.lock_file).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (without_passwords(error).splitlines() or [type(error).__name__])[0][:300]
