"""Connect to an Optuna storage: a journal, a database, or a gRPC proxy, with the lock for its decisions."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage, get_storage

from hpo.storage.journal import open_journal
from hpo.storage.locks import Flock, lock_of
from scaling.common.redact import without_passwords

SERVER_SECONDS = 30  # that a proxy which does not answer is waited for


def open_storage(
    storage: str | Path | BaseStorage | None, lock: str | Path | None, study: str
) -> tuple[BaseStorage, AbstractContextManager[Any]]:
    """The storage, and the lock under which decisions on this study are taken in it.

    A path that ends in .journal (its folder is made), a URL (a database's, or grpc://HOST:PORT of Optuna's proxy), an Optuna
    storage, or None for memory. ValueError when a journal is damaged. The lock: the file `lock`, else one beside the journal or the SQLite file, else hpo.storage.locks says.
    """
    beside: str | None = None
    made: BaseStorage
    opened: BaseStorage
    if storage is None:
        made = opened = InMemoryStorage()
    elif isinstance(storage, BaseStorage):
        made, opened = storage, get_storage(storage)
    elif str(storage).endswith(".journal") and "://" not in str(storage):
        path = Path(storage).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        made = opened = open_journal(path)
        beside = f"{path}.ask.lock"
    elif str(storage).startswith("grpc://"):
        made = opened = _proxy(str(storage))
    elif "://" in str(storage):
        # a database in memory, or the file of one, is opened anew; a server once
        sqlite = str(storage).startswith("sqlite")
        made, opened = found = _database(str(storage)) if sqlite else _server(str(storage), os.getpid())
        database = found[0].engine.url
        if database.get_backend_name() == "sqlite" and database.database not in (None, "", ":memory:"):
            beside = f"{Path(str(database.database)).absolute()}.ask.lock"
    else:
        raise ValueError(
            "storage must be a path that ends in .journal, a URL such as sqlite:///study.db, postgresql://... or grpc://HOST:PORT, "
            f"an Optuna storage or None (memory), got {str(storage)!r}"
        )
    if lock is not None or beside is not None:
        return opened, Flock(str(lock if lock is not None else beside))
    return opened, lock_of(made, opened, study)


def _proxy(url: str) -> BaseStorage:
    """Optuna's gRPC proxy. ValueError when the address is none, or its extra is missing."""
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
            f"no proxy answers at {url} within {SERVER_SECONDS} s: start Optuna's, or mend the address"
        ) from error
    return proxy


def _database(url: str) -> tuple[RDBStorage, BaseStorage]:
    """A connection pool, and Optuna's cache in front of it, which is to be one for all studies opened. ValueError when it cannot be reached."""
    from sqlalchemy.exc import DBAPIError

    try:
        # The driver of our extra: SQLAlchemy's default has changed. A connection that a restarted server has forgotten is replaced before
        # it is used.
        named = url.replace("postgresql://", "postgresql+psycopg2://", 1) if url.startswith("postgresql://") else url
        storage = RDBStorage(named, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise ValueError(
            f"{url.partition(':')[0]}:// needs its driver, for PostgreSQL pip install 'muscale[postgresql]'"
        ) from error
    except DBAPIError as error:
        said = without_passwords(str(error.orig).splitlines()[0])
        raise ValueError(f"{without_passwords(url)} does not answer: {said}; start it, or mend the address") from error
    return storage, get_storage(storage)


@cache
def _server(url: str, process: int) -> tuple[RDBStorage, BaseStorage]:
    """The same, one for all searches of a process; a fork must not use its parent's connections."""
    return _database(url)
