"""The MLflow client: connect to a store, bound the time of a request, and tell a refusal from an outage."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from filelock import FileLock

from scaling.common.redact import redact_passwords
from scaling.common.suggest import find_similar

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own environment variables for the retries and the timeout of a request.
RETRIES_VARIABLE, TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"

SQLITE = "sqlite:///"

# State of `fail_fast`: one entry per active block, and the variables as they were before the first of them.
_environment_lock = threading.Lock()
_active_blocks: list[None] = []
_saved_environment: dict[str, str | None] = {}


def default_uri() -> str:
    """Return $MLFLOW_TRACKING_URI, or mlflow.db in the working directory (the project's root) if it is not set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path('mlflow.db').resolve()}"


def resolve_uri(uri: str | None = None) -> str:
    """Return a store's tracking URI so that it means the same in every folder: a SQLite file by its absolute path.

    Args:
        uri: The URI; by default `default_uri()`.
    """
    uri = uri or default_uri()
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}" if uri.startswith(SQLITE) else uri


def connect(uri: str | None = None) -> MlflowClient:
    """Return a client of an MLflow store.

    A SQLite store that does not exist is created and migrated first, by one process at a time.

    Args:
        uri: The store's tracking URI; by default `default_uri()`.

    Returns:
        An MLflow client.
    """
    from mlflow import MlflowClient

    # Stdout is for data.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Without this, each start of a fresh store prints a page of migrations.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = resolve_uri(uri)
    if uri.startswith(SQLITE):
        # Several processes that open a fresh file at once all fail, so the first one creates it while the others wait.
        path = Path(uri.removeprefix(SQLITE))
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            # SQLite itself creates a file that a group cannot write, whatever the umask allows.
            path.touch()
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
            return client
    return MlflowClient(uri)


def import_mlflow() -> None:
    """Import MLflow, which takes seconds, before a clock starts that should not count them."""
    import mlflow  # noqa: F401


def describe_outage(uri: str | None = None) -> str | None:
    """Return why the store does not answer, in one line without passwords, or None if it does.

    Args:
        uri: The store's tracking URI; by default `default_uri()`.
    """
    try:
        with fail_fast():
            connect(uri).search_experiments(max_results=1)
    # The error may come from MLflow, requests, SQLAlchemy or the file system; here they all mean the same.
    except Exception as error:
        lines = redact_passwords(error).splitlines()
        return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"
    return None


def find_experiment_id(client: MlflowClient, study: str) -> str:
    """Return the id of the experiment of a study.

    Args:
        client: The MLflow client.
        study: The study's name, which is also the name of its experiment.

    Returns:
        MLflow's experiment id.

    Raises:
        ValueError: If there is no such experiment. The message names the most similar studies.
    """
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        names = [e.name for e in client.search_experiments() if e.name != "Default"]
        similar = find_similar(study, names, count=3, cutoff=0.3) or sorted(names)[:5]
        known = f"known studies: {', '.join(similar)}" if similar else "the store is empty: launch a study first"
        raise ValueError(f"no study {study!r} in MLflow at {redact_passwords(client.tracking_uri)}; {known}")
    return cast(str, experiment.experiment_id)


@contextmanager
def fail_fast(seconds: float = 10.0) -> Iterator[None]:
    """Disable MLflow's retries in the block and shorten its request timeout.

    By default MLflow retries for minutes, also requests that create something. It reads both settings from the
    environment at every call, so the calls of other threads fail fast meanwhile, too.

    Args:
        seconds: The timeout of a request, unless the user has set MLFLOW_HTTP_REQUEST_TIMEOUT.
    """
    with _environment_lock:
        if not _active_blocks:
            _saved_environment.update({name: os.environ.get(name) for name in (RETRIES_VARIABLE, TIMEOUT_VARIABLE)})
            os.environ[RETRIES_VARIABLE] = "0"
            os.environ.setdefault(TIMEOUT_VARIABLE, str(round(seconds)))
        _active_blocks.append(None)
    try:
        yield
    finally:
        with _environment_lock:
            _active_blocks.pop()
            if not _active_blocks:
                for name, value in _saved_environment.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


def is_refusal(error: Exception) -> bool:
    """Return whether MLflow rejects the content of a request, so that sending it again cannot help.

    An outage, a busy server or a wrong address is not a refusal.
    """
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
