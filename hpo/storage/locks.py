"""The lock under which a search takes its decisions, for every kind of storage.

A journal or an SQLite file has a lock file beside it. PostgreSQL has an advisory lock, which the server releases when
the holder's connection ends. Any other storage that processes share (MySQL, Optuna's gRPC proxy) has a queue of
tickets in a study of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
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

from hpo.storage.leases import LeaseMonitor, identify_host, identify_process, is_alive, parse_process_name

POLL_SECONDS = 0.05
# Interval of a ticket holder's heartbeat. A decision may take longer.
BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 30.0
# Length of the holder's name in a lock file.
NAME_BYTES = 128
# Log the holder of a file lock after waiting this long.
LATE_SECONDS = 15.0

logger = logging.getLogger("muscale.hpo")
_thread_locks: weakref.WeakKeyDictionary[BaseStorage, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


class Flock:
    """A file lock between processes and threads, which the system releases when its holder ends for any reason.

    It uses flock(2), which queues those that wait. The thread that holds it may lock it again. The file holds the
    name of its last holder.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(Path(path).absolute())
        self._thread_lock = threading.RLock()
        self._depth = 0
        self._file = -1

    def acquire(self) -> bool:
        """Wait for the lock and take it. Returns True."""
        self._thread_lock.acquire()
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
            self._thread_lock.release()
            raise
        return True

    def release(self) -> None:
        """Release the lock, if it was taken once."""
        self._depth -= 1
        if self._depth == 0:
            # Closing the file releases its lock.
            os.close(self._file)
        self._thread_lock.release()

    def _wait(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            timer = threading.Timer(LATE_SECONDS, self._log_holder)
            timer.daemon = True
            timer.start()
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            finally:
                timer.cancel()
        # Overwrite the previous name, padded, because truncating the file first would take longer.
        name = _get_own_name(os.getpid()).encode().ljust(NAME_BYTES)
        # The disk may be full. The lock works without the name, which is only for the log.
        with contextlib.suppress(OSError):
            os.pwrite(self._file, name, 0)

    def _log_holder(self) -> None:
        holder = Path(self._path).read_text(errors="replace").strip()
        process_name = parse_process_name(holder)
        message = f"waiting for {self._path} since {LATE_SECONDS:g} s: {holder or 'another process'} holds it"
        if process_name is not None and process_name[0] == identify_host():
            pid = process_name[1]
            # The process may end at this moment.
            with contextlib.suppress(psutil.NoSuchProcess):
                message += (
                    f" ({psutil.Process(pid).status()}); `kill -CONT {pid}` continues it if it was stopped, "
                    f"`kill -9 {pid}` frees the lock"
                )
        logger.warning(message)

    def __enter__(self) -> Flock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@cache
def _get_own_name(process: int) -> str:
    """Return this process's name, looked up once. A forked process has another number and so another entry."""
    return identify_process()


def make_lock(storage: BaseStorage, opened: BaseStorage, study: str) -> AbstractContextManager[Any]:
    """Return the lock of a study in a storage that is not a local file.

    Args:
        storage: The storage as it was given or created.
        opened: The storage as Optuna uses it, with its cache.
        study: Name of the study.
    """
    # Optuna's cache keeps the database behind it as _backend.
    inner = getattr(storage, "_backend", storage)
    if isinstance(inner, RDBStorage) and inner.engine.url.get_backend_name() == "postgresql":
        return NestedLock(get_thread_lock(storage), AdvisoryLock(inner, study))
    if isinstance(inner, InMemoryStorage | JournalStorage) or (
        isinstance(inner, RDBStorage) and inner.engine.url.get_backend_name() == "sqlite"
    ):
        return get_thread_lock(storage)
    return NestedLock(get_thread_lock(storage), TicketLock(opened, study))


def get_thread_lock(storage: BaseStorage) -> threading.RLock:
    """Return the lock between the threads of this process that share a storage object."""
    with _guard:
        return _thread_locks.setdefault(storage, threading.RLock())


class NestedLock:
    """Two locks that are taken together, such as one between threads outside one between processes.

    With the threads' lock outside, each process waits for the inner lock only once.
    """

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


class AdvisoryLock:
    """PostgreSQL's advisory lock of a session, on a connection of its own.

    A lost connection is an error, which is raised at the latest when the lock is released.
    """

    def __init__(self, storage: RDBStorage, study: str) -> None:
        self._engine = storage.engine
        self._key = int.from_bytes(sha256(f"muscale/{study}".encode()).digest()[:8], "big", signed=True)
        self._connection: Any = None

    def __enter__(self) -> None:
        from sqlalchemy import text

        connection = self._engine.connect()
        try:
            connection.execute(text("select pg_advisory_lock(:key)"), {"key": self._key})
            # The lock belongs to the session, so that no transaction has to stay open meanwhile.
            connection.commit()
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
        except DBAPIError:
            # The server released the lock when it lost the connection.
            connection.invalidate()
        finally:
            connection.close()


class TicketLock:
    """A queue on the storage itself, for storages that offer no lock.

    A ticket is a trial of the study `<name>.lock`. The storage numbers the trials, and the lowest one that is still
    running holds the lock.

    A ticket is revoked if its holder is dead or has shown no heartbeat for EXPIRY_SECONDS. A holder that comes back
    after that learns of it on leaving (RuntimeError). Two decisions may then have overlapped, and `Search` lets the
    first one count.
    """

    def __init__(self, storage: BaseStorage, study: str) -> None:
        self._storage, self._name = storage, f"{study}.lock"
        self._study_id: int | None = None
        self._owner = identify_process()
        self._monitor = LeaseMonitor(EXPIRY_SECONDS)
        # Seconds that a decision takes at least, judged by the last ones of this process.
        self._decision_seconds = POLL_SECONDS
        self._entered = 0.0
        self._ticket: int | None = None
        self._stop = threading.Event()

    def __enter__(self) -> None:
        study_id = self._open_study()
        ticket = self._storage.create_new_trial(
            study_id, create_trial(state=TrialState.RUNNING, user_attrs={"beat": [self._owner, 0]})
        )
        self._ticket = ticket
        self._stop = threading.Event()
        threading.Thread(target=self._keep_beating, args=(ticket, self._stop), daemon=True).start()
        try:
            self._wait(study_id, ticket)
        except BaseException:
            self._leave()
            raise
        self._entered = time.monotonic()

    def _wait(self, study_id: int, ticket: int) -> None:
        """Wait until no older ticket is left.

        Listing all tickets is expensive behind a proxy. A ticket therefore lists them again only when it could be
        next at the earliest, and the next one in the queue watches only the ticket before it.
        """
        while older := self._list_older(study_id, ticket):
            expired = self._monitor.find_expired(older)
            for trial in older:
                if trial.number in expired or not is_alive(_read_holder(trial)):
                    self._end(trial._trial_id, TrialState.FAIL)
            if len(older) > 1:
                time.sleep(min(max(self._decision_seconds * (len(older) - 1), POLL_SECONDS), BEAT_SECONDS))
            elif self._watch(older[0]):
                return

    def _list_older(self, study_id: int, ticket: int) -> list[FrozenTrial]:
        running = self._storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        return [t for t in running if t._trial_id < ticket]

    def _watch(self, trial: FrozenTrial) -> bool:
        """Wait for a ticket to end. False if its process has ended, or its heartbeat may have stopped."""
        pause = min(max(self._decision_seconds / 4, POLL_SECONDS / 10), POLL_SECONDS)
        for _ in range(round(BEAT_SECONDS / pause)):
            if self._storage.get_trial(trial._trial_id).state.is_finished():
                return True
            if not is_alive(_read_holder(trial)):
                break
            time.sleep(pause)
        return False

    def __exit__(self, *error: object) -> None:
        self._decision_seconds = min(time.monotonic() - self._entered, 2 * self._decision_seconds)
        if not self._leave() and error[0] is None:
            raise RuntimeError(
                f"the lock of study {self._name!r} was taken from this process, whose heartbeat had stopped"
            )

    def _leave(self) -> bool:
        """End the ticket of this process. False if it was revoked."""
        self._stop.set()
        ticket, self._ticket = self._ticket, None
        return ticket is not None and self._end(ticket, TrialState.COMPLETE)

    def _end(self, ticket: int, state: TrialState) -> bool:
        try:
            return self._storage.set_trial_state_values(ticket, state, (0.0,) if state == TrialState.COMPLETE else None)
        except UpdateFinishedTrialError:
            return False

    def _keep_beating(self, ticket: int, stop: threading.Event) -> None:
        beat = 0
        while not stop.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._storage.set_trial_user_attr(ticket, "beat", [self._owner, beat])
            except UpdateFinishedTrialError:
                return

    def _open_study(self) -> int:
        """Return the id of the tickets' study, which is created by the first process."""
        if self._study_id is None:
            from optuna.exceptions import DuplicatedStudyError

            try:
                self._study_id = self._storage.create_new_study([StudyDirection.MINIMIZE], self._name)
            except DuplicatedStudyError:
                self._study_id = self._storage.get_study_id_from_name(self._name)
        return self._study_id


def _read_holder(ticket: FrozenTrial) -> str:
    return str(ticket.user_attrs["beat"][0])
