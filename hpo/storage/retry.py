"""Storages that go away for a while: a server that is restarted, a disk that is full."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from scaling.common.cli import say
from scaling.common.redact import without_passwords

T = TypeVar("T")
PATIENCE_SECONDS = 600.0  # with a storage that does not answer


class Stop(Protocol):
    """Whether this process was told to stop, as hpo.worker.signals.StopSignals knows it."""

    @property
    def requested(self) -> bool: ...


def patiently(do: Callable[[], T], stop: Stop | None = None) -> T:
    """Do it again while the storage is away, for PATIENCE_SECONDS at most, or until this process is told to stop."""
    began, wait = time.monotonic(), 0.5
    while True:
        try:
            return do()
        except storage_errors() as error:
            if (stop is not None and stop.requested) or time.monotonic() - began > PATIENCE_SECONDS:
                raise
            say(f"the storage does not answer, trying again in {wait:g} s: {type(error).__name__}")
            time.sleep(wait)
            wait = min(2 * wait, 15.0)


@contextlib.contextmanager
def answering(storage: str | None) -> Iterator[None]:
    """ValueError where a server, or the disk's space, goes while a study is opened: whoever starts a command can do so again."""
    try:
        yield
    except storage_errors() as error:
        if isinstance(error, OSError):
            raise ValueError(
                f"the study cannot be read or written ({error}): make room, or mend its rights, and then this again"
            ) from error
        raise ValueError(
            f"{without_passwords(storage or 'the storage')} does not answer any more ({type(error).__name__}): start it, and then this again"
        ) from error


def storage_errors() -> tuple[type[Exception], ...]:
    """What Optuna's storages and our locks raise when a server, or the disk's space, has gone for a while."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError

    errors: tuple[type[Exception], ...] = (StorageInternalError, DBAPIError, OSError)
    grpc = sys.modules.get("grpc")  # loaded by a storage that needs it
    return errors if grpc is None else (*errors, grpc.RpcError)
