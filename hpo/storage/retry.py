"""Wait for a storage that is away for a while: a server that restarts, a disk that is full."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from scaling.common.redact import redact_passwords

T = TypeVar("T")
# How long to wait for a storage that does not answer.
PATIENCE_SECONDS = 600.0

logger = logging.getLogger("muscale.hpo")


class StopRequest(Protocol):
    """A request to stop this process, such as `hpo.worker.signals.StopSignals`."""

    @property
    def requested(self) -> bool:
        """Whether this process was told to stop."""


def retry_storage(
    operation: Callable[[], T], stop: StopRequest | None = None, check: Callable[[], None] | None = None
) -> T:
    """Call a function again until the storage answers.

    Args:
        operation: What to call. It may be called several times.
        stop: Give up when this is requested.
        check: Is called after each error, and raises if it is pointless to wait.

    Returns:
        What `operation` returns.

    Raises:
        Exception: The storage's error, see `get_storage_errors`, after PATIENCE_SECONDS or when `stop` is requested.
    """
    started, wait = time.monotonic(), 0.5
    while True:
        try:
            return operation()
        except get_storage_errors() as error:
            if check is not None:
                check()
            if (stop is not None and stop.requested) or time.monotonic() - started > PATIENCE_SECONDS:
                raise
            logger.warning(f"the storage does not answer, trying again in {wait:g} s: {type(error).__name__}")
            time.sleep(wait)
            wait = min(2 * wait, 15.0)


@contextlib.contextmanager
def refuse_storage_errors(storage: str | None) -> Iterator[None]:
    """Turn the errors of a storage into a ValueError while a study is opened, when a user can still act on them.

    Args:
        storage: The storage's URL or path, for the message; None for the study's journal.

    Raises:
        ValueError: If the storage does not answer, or the disk is full or not readable.
    """
    try:
        yield
    except get_storage_errors() as error:
        if isinstance(error, OSError):
            raise ValueError(
                f"the study cannot be read or written ({error}): "
                "free disk space or fix the permissions, then run the command again"
            ) from error
        name = redact_passwords(storage or "the storage")
        raise ValueError(
            f"{name} no longer answers ({type(error).__name__}): start it, then run the command again"
        ) from error


def get_storage_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions by which Optuna's storages and our locks report that the server or the disk is away."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError

    errors: tuple[type[Exception], ...] = (StorageInternalError, DBAPIError, OSError)
    # Loaded only by a storage that needs it.
    grpc = sys.modules.get("grpc")
    return errors if grpc is None else (*errors, grpc.RpcError)
