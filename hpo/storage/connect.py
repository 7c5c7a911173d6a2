"""Connect to an Optuna storage (a journal, a database or a gRPC proxy) and to the lock for a search's decisions."""

from __future__ import annotations

import os
import time
import warnings
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage, get_storage

from hpo.storage.journal import open_journal
from hpo.storage.locks import Flock, make_lock
from scaling.common.redact import redact_passwords

# How long to wait for a gRPC proxy that does not answer.
SERVER_SECONDS = 30
# How often to open a fresh database in which another process makes the same tables, and the first pause in between.
OPEN_ATTEMPTS, OPEN_PAUSE_SECONDS = 8, 0.1
# What databases say of tables and rows that another process is making, in an OperationalError.
RACE_WORDS = ("already exists", "database is locked", "no such table", "doesn't exist")


def open_storage(
    storage: str | Path | BaseStorage | None, lock: str | Path | None, study: str
) -> tuple[BaseStorage, AbstractContextManager[Any]]:
    """Open a storage, and the lock under which decisions about a study in it are taken.

    Args:
        storage: A path that ends in .journal, whose folder is created; a URL of a database, or grpc://HOST:PORT of
            Optuna's proxy; an Optuna storage; or None for memory.
        lock: The file to lock. Default: one beside the journal or the SQLite file; otherwise see `hpo.storage.locks`.
        study: Name of the study.

    Returns:
        The storage and the lock.

    Raises:
        ValueError: If the storage is none of these, does not answer, or is a damaged journal.
    """
    beside: str | None = None
    created: BaseStorage
    opened: BaseStorage
    if storage is None:
        created = opened = InMemoryStorage()
    elif isinstance(storage, BaseStorage):
        created, opened = storage, get_storage(storage)
    elif str(storage).endswith(".journal") and "://" not in str(storage):
        path = Path(storage).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        created = opened = open_journal(path)
        beside = f"{path}.ask.lock"
    elif str(storage).startswith("grpc://"):
        created = opened = _open_proxy(str(storage))
    elif "://" in str(storage):
        # SQLite, in memory or in a file, gets a new connection each time; a server gets one for the whole process.
        is_sqlite = str(storage).startswith("sqlite")
        if is_sqlite and (file := _find_sqlite_file(str(storage))) is not None:
            beside = f"{file}.ask.lock"
            # Only one process may make the tables of a new file.
            with Flock(beside):
                created, opened = _open_database(str(storage))
        else:
            created, opened = _open_database(str(storage)) if is_sqlite else _open_server(str(storage), os.getpid())
    else:
        raise ValueError(
            "storage must be a path that ends in .journal, a URL such as sqlite:///study.db, postgresql://... or "
            f"grpc://HOST:PORT, an Optuna storage or None (memory), got {str(storage)!r}"
        )
    if lock is not None or beside is not None:
        return opened, Flock(str(lock if lock is not None else beside))
    return opened, make_lock(created, opened, study)


def _open_proxy(url: str) -> BaseStorage:
    """Connect to Optuna's gRPC proxy.

    ValueError if the address is invalid, the proxy's package is missing, or it does not answer.
    """
    from optuna.storages import GrpcStorageProxy

    host, _, port = url.removeprefix("grpc://").partition(":")
    if not host or not port.isdigit():
        raise ValueError(f"needed grpc://HOST:PORT, got {url!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            proxy = GrpcStorageProxy(host=host, port=int(port))
    except ImportError as error:
        raise ValueError("storage grpc:// needs the packages of Optuna's proxy: pip install 'muscale[grpc]'") from error
    try:
        proxy.wait_server_ready(timeout=SERVER_SECONDS)
    except ConnectionError as error:
        raise ValueError(
            f"no proxy answers at {url} within {SERVER_SECONDS} s: start Optuna's proxy, or correct the address"
        ) from error
    return proxy


def _find_sqlite_file(url: str) -> Path | None:
    """Return the file of an SQLite database, or None if it is in memory. ValueError if its folder does not exist."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(url).database
    except ArgumentError as error:
        raise ValueError(f"needed an address such as sqlite:///study.db, got {url!r}") from error
    if name in (None, "", ":memory:") or "mode=memory" in url:
        return None
    file = Path(str(name).removeprefix("file:")).absolute()
    if not file.parent.is_dir():
        raise ValueError(f"{url}: there is no folder {file.parent}: make it, or correct the address")
    return file


def _open_database(url: str) -> tuple[RDBStorage, BaseStorage]:
    """Return a connection pool, and Optuna's cache in front of it, which all studies of a process should share.

    The tables of a fresh database are made by one process. Optuna does not lock it meanwhile, so another one may find
    half of them; it tries again.

    ValueError if the database cannot be reached or its driver is missing.
    """
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    for attempt in range(OPEN_ATTEMPTS):
        try:
            return _connect(url)
        except ValueError as error:
            cause = error.__cause__
            is_race = isinstance(cause, IntegrityError | ProgrammingError) or (
                isinstance(cause, OperationalError) and any(words in str(cause) for words in RACE_WORDS)
            )
            if not is_race or attempt == OPEN_ATTEMPTS - 1:
                raise
            time.sleep(OPEN_PAUSE_SECONDS * 2**attempt * (1 + os.getpid() % 16 / 16))
    raise AssertionError("the last attempt returns or raises")


def _connect(url: str) -> tuple[RDBStorage, BaseStorage]:
    """Connect to a database once, and make the tables that it lacks."""
    from sqlalchemy.exc import DBAPIError

    try:
        # Name the driver of our extra, because SQLAlchemy's default has changed.
        driver = url.replace("postgresql://", "postgresql+psycopg2://", 1) if url.startswith("postgresql://") else url
        # The pre-ping replaces a connection that a restarted server has forgotten before it is used.
        storage = RDBStorage(driver, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise ValueError(
            f"{url.partition(':')[0]}:// needs its driver, for PostgreSQL pip install 'muscale[postgresql]'"
        ) from error
    except DBAPIError as error:
        reason = redact_passwords(str(error.orig).splitlines()[0])
        raise ValueError(
            f"{redact_passwords(url)} does not answer: {reason}; start it, or correct the address"
        ) from error
    return storage, get_storage(storage)


@cache
def _open_server(url: str, process: int) -> tuple[RDBStorage, BaseStorage]:
    """Return the database connection that all searches of a process share.

    The process number is part of the cache's key, because a forked process must not use its parent's connections.
    """
    return _open_database(url)
