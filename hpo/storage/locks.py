"""The lock under which a search takes its decisions, wherever its study is stored.

A file beside a journal or an SQLite file; an advisory lock of PostgreSQL, which its server gives up with the connection of whoever
held it; for any other storage that processes share (MySQL, Optuna's gRPC proxy) tickets in a study of their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import weakref
from contextlib import AbstractContextManager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.storage.leases import LeaseMonitor, host, is_alive, process_name, process_of
from scaling.common.cli import say

POLL_SECONDS = 0.05
BEAT_SECONDS = 5.0  # of who holds a ticket; a decision may take longer than that
EXPIRY_SECONDS = 30.0
NAME_BYTES = 128
LATE_SECONDS = 15.0  # of waiting for a file's lock, after which its holder is named

_threads: weakref.WeakKeyDictionary[BaseStorage, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


class Flock:
    """A lock between processes and threads that the system gives up with its holder, however that ends; waits in its queue."""

    def __init__(self, path: str | Path) -> None:
        self._path = str(Path(path).absolute())
        self._thread = threading.RLock()  # the same file may be locked again by whoever has it
        self._depth = 0
        self._file = -1

    def acquire(self) -> bool:
        self._thread.acquire()
        try:
            if self._depth == 0:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    self._wait()
                except BaseException:
                    os.close(self._file)
                    raise
            self._depth += 1
        except BaseException:
            self._thread.release()
            raise
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            os.close(self._file)  # and with it the lock
        self._thread.release()

    def _wait(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            late = threading.Timer(LATE_SECONDS, self._say_holder)
            late.daemon = True
            late.start()
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            finally:
                late.cancel()
        name = (
            _name(os.getpid()).encode().ljust(NAME_BYTES)
        )  # over the one before: to cut the file first would take longer
        with contextlib.suppress(OSError):  # a full disk: the lock is what counts, this is for whoever wonders
            os.pwrite(self._file, name, 0)

    def _say_holder(self) -> None:
        holder = Path(self._path).read_text(errors="replace").strip()
        process = process_of(holder)
        said = f"waiting for {self._path} since {LATE_SECONDS:g} s: {holder or 'another process'} holds it"
        if process is not None and process[0] == host():
            pid = process[1]
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends in this very moment
                said += f" ({psutil.Process(pid).status()}); `kill -CONT {pid}` lets it go on where it was stopped, "
                said += f"`kill -9 {pid}` frees the lock"
        say(said)

    def __enter__(self) -> Flock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@cache
def _name(_: int) -> str:
    """This process's, looked up once; a forked one has another number."""
    return process_name()


def lock_of(storage: BaseStorage, opened: BaseStorage, study: str) -> AbstractContextManager[Any]:
    """The lock of a study in a storage that is no local file. storage: as it was given or made; opened: as Optuna uses it."""
    inner = getattr(storage, "_backend", storage)  # of Optuna's cache in front of a database
    if isinstance(inner, RDBStorage) and inner.engine.url.get_backend_name() == "postgresql":
        return NestedLock(threads_lock(storage), Advisory(inner, study))
    if isinstance(inner, InMemoryStorage | JournalStorage) or (
        isinstance(inner, RDBStorage) and inner.engine.url.get_backend_name() == "sqlite"
    ):
        return threads_lock(storage)
    return NestedLock(threads_lock(storage), TicketLock(opened, study))


def threads_lock(storage: BaseStorage) -> threading.RLock:
    """Between the threads of this process that share a storage object."""
    with _guard:
        return _threads.setdefault(storage, threading.RLock())


class NestedLock:
    """One lock inside the other: threads first, so that a process comes to the other one once."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        try:
            self.inner.__enter__()
        except BaseException:
            self.outer.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self.inner.__exit__(*error)
        finally:
            self.outer.__exit__(*error)


class Advisory:
    """PostgreSQL's lock of a session, on a connection of its own. A lost connection is an error, at the latest on leaving."""

    def __init__(self, storage: RDBStorage, study: str) -> None:
        self._engine = storage.engine
        self._key = int.from_bytes(sha256(f"muscale/{study}".encode()).digest()[:8], "big", signed=True)
        self._connection: Any = None

    def __enter__(self) -> None:
        from sqlalchemy import text

        connection = self._engine.connect()
        try:
            connection.execute(text("select pg_advisory_lock(:key)"), {"key": self._key})
            connection.commit()  # the lock is the session's: no transaction stays open meanwhile
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        self._connection = connection

    def __exit__(self, *_: object) -> None:
        from sqlalchemy import text
        from sqlalchemy.exc import DBAPIError

        connection, self._connection = self._connection, None
        try:
            connection.execute(text("select pg_advisory_unlock(:key)"), {"key": self._key})
            connection.commit()
        except DBAPIError:  # the server gave the lock up when it lost the connection
            connection.invalidate()
        finally:
            connection.close()


class TicketLock:
    """A queue on the storage itself, for those that offer nothing else: a trial of the study `<name>.lock` is a ticket, numbers are
    given out by the storage, and the lowest that is still running holds the lock.

    A ticket whose holder is dead, or has not moved for EXPIRY_SECONDS, is taken from it. One that comes back after that finds out on
    leaving (RuntimeError); two decisions may then have overlapped, of which `Search` lets the first count.
    """

    def __init__(self, storage: BaseStorage, study: str) -> None:
        self._storage, self._name = storage, f"{study}.lock"
        self._study: int | None = None
        self._owner = process_name()
        self._seen = LeaseMonitor(EXPIRY_SECONDS)
        self._holds = POLL_SECONDS  # seconds that a decision takes at least, to go by the last ones of this process
        self._since = 0.0
        self._ticket: int | None = None
        self._stop = threading.Event()

    def __enter__(self) -> None:
        study = self._opened()
        ticket = self._storage.create_new_trial(
            study, create_trial(state=TrialState.RUNNING, user_attrs={"beat": [self._owner, 0]})
        )
        self._ticket = ticket
        self._stop = threading.Event()
        threading.Thread(target=self._beat, args=(ticket, self._stop), daemon=True).start()
        try:
            self._wait(study, ticket)
        except BaseException:
            self._leave()
            raise
        self._since = time.monotonic()

    def _wait(self, study: int, ticket: int) -> None:
        """Until no ticket is left that is older than this one.

        Behind a proxy a list of all that wait is dear. So one looks at it again when one could be next at the earliest, and who is
        next looks at the one before alone.
        """
        while before := self._before(study, ticket):
            gone = self._seen.expired(before)
            for t in before:
                if t.number in gone or not is_alive(_holder(t)):
                    self._end(t._trial_id, TrialState.FAIL)
            if len(before) > 1:
                time.sleep(min(max(self._holds * (len(before) - 1), POLL_SECONDS), BEAT_SECONDS))
            elif self._watch(before[0]):
                return

    def _before(self, study: int, ticket: int) -> list[FrozenTrial]:
        waiting = self._storage.get_all_trials(study, deepcopy=False, states=(TrialState.RUNNING,))
        return [t for t in waiting if t._trial_id < ticket]

    def _watch(self, last: FrozenTrial) -> bool:
        """Wait until it has ended (True), or its process has, or its beat may have stood still."""
        pause = min(max(self._holds / 4, POLL_SECONDS / 10), POLL_SECONDS)
        for _ in range(round(BEAT_SECONDS / pause)):
            if self._storage.get_trial(last._trial_id).state.is_finished():
                return True
            if not is_alive(_holder(last)):
                break
            time.sleep(pause)
        return False

    def __exit__(self, *error: object) -> None:
        self._holds = min(time.monotonic() - self._since, 2 * self._holds)
        if not self._leave() and error[0] is None:
            raise RuntimeError(f"the lock of study {self._name!r} was taken from this process, which had stood still")

    def _leave(self) -> bool:
        self._stop.set()
        ticket, self._ticket = self._ticket, None
        return ticket is not None and self._end(ticket, TrialState.COMPLETE)

    def _end(self, ticket: int, state: TrialState) -> bool:
        try:
            return self._storage.set_trial_state_values(ticket, state, (0.0,) if state == TrialState.COMPLETE else None)
        except UpdateFinishedTrialError:
            return False

    def _beat(self, ticket: int, stop: threading.Event) -> None:
        beat = 0
        while not stop.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._storage.set_trial_user_attr(ticket, "beat", [self._owner, beat])
            except UpdateFinishedTrialError:
                return

    def _opened(self) -> int:
        if self._study is None:
            from optuna.exceptions import DuplicatedStudyError

            try:
                self._study = self._storage.create_new_study([StudyDirection.MINIMIZE], self._name)
            except DuplicatedStudyError:
                self._study = self._storage.get_study_id_from_name(self._name)
        return self._study


def _holder(ticket: FrozenTrial) -> str:
    return str(ticket.user_attrs["beat"][0])
