"""The MLflow client: connect, retry, bound the time of a request, tell refusals from outages."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from filelock import FileLock

from scaling.common.redact import without_passwords

if TYPE_CHECKING:
    from mlflow import MlflowClient

RETRIES, REQUEST = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
_changing = threading.Lock()  # of the environment, by the impatient
_impatient: list[None] = []  # one for each that is inside
_before: dict[str, str | None] = {}


def default_uri() -> str:
    """MLFLOW_TRACKING_URI when it is set, else mlflow.db in the current folder (the project's root)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def connect(uri: str | None = None) -> MlflowClient:
    """A client of the store at `uri`, which is created and migrated first, by one process at a time."""
    import logging

    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for data
    for name in ("mlflow", "alembic"):  # each start of a fresh store would print a page of migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = uri or default_uri()
    if uri.startswith("sqlite:///"):
        # Several processes that open a fresh file at once all fail, so the first to come makes it while the others wait.
        path = Path(uri.removeprefix("sqlite:///")).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            path.touch()  # SQLite itself would let no group write to it, whatever the umask says
            client = MlflowClient(f"sqlite:///{path}")
            client.search_experiments(max_results=1)
            return client
    return MlflowClient(uri)


def load() -> None:
    """Import MLflow, which takes seconds, before a clock that should not count them."""
    import mlflow  # noqa: F401


def away(uri: str | None = None) -> str | None:
    """Why the store does not answer, in a line; None when it does."""
    try:
        with impatient():
            connect(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow's, requests', SQLAlchemy's, the file system's: all of them mean the same here
        said = without_passwords(error).splitlines()
        return f"{type(error).__name__}: {said[0][:200] if said else 'no reason given'}"
    return None


def experiment_id(client: MlflowClient, study: str) -> str:
    """The study's experiment; a ValueError names the nearest studies when there is none."""
    found = client.get_experiment_by_name(study)
    if found is None:
        names = [e.name for e in client.search_experiments() if e.name != "Default"]
        near = difflib.get_close_matches(study, names, n=3, cutoff=0.3) or sorted(names)[:5]
        known = f"known studies: {', '.join(near)}" if near else "the store is empty: launch a study first"
        raise ValueError(f"no study {study!r} in MLflow at {without_passwords(client.tracking_uri)}; {known}")
    return cast(str, found.experiment_id)


@contextmanager
def impatient(seconds: float = 10.0) -> Iterator[None]:
    """MLflow's own retries (for minutes, and also of requests that make things) off, its timeout short unless it was set.

    MLflow reads both from the environment at every call, so that calls of other threads are impatient meanwhile, too.
    """
    with _changing:
        if not _impatient:
            _before.update({name: os.environ.get(name) for name in (RETRIES, REQUEST)})
            os.environ[RETRIES] = "0"
            os.environ.setdefault(REQUEST, str(round(seconds)))
        _impatient.append(None)
    try:
        yield
    finally:
        with _changing:
            _impatient.pop()
            if not _impatient:
                for name, value in _before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


def refused(error: Exception) -> bool:
    """Whether MLflow will never take this: not away, not busy, not the wrong address, but told something that it cannot keep."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
