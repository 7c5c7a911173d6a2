"""What the three commands share: how they refuse bad input, stop when told to, and take common options."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scaling.common.redact import without_passwords

Uri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow store; default $MLFLOW_TRACKING_URI or ./mlflow.db")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what it would cost, and start nothing")]


@contextmanager
def refusing() -> Iterator[None]:
    """Bad input (ValueError, a file that is not there or closed to us) ends with its message and exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        say(f"error: {error}")
        raise typer.Exit(2) from error


class Commands(TyperGroup):
    """A command whose tracebacks, too, are without passwords: those of databases and servers quote their URLs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            if without_passwords(text) == text:
                raise
            say(text.rstrip())
            raise SystemExit(1) from None


class Terminated(KeyboardInterrupt):
    """SIGTERM, by the same door as Ctrl-C."""


def interrupted_code(stop: KeyboardInterrupt) -> int:
    """The exit code that a shell expects: 143 after SIGTERM, 130 after Ctrl-C."""
    return 143 if isinstance(stop, Terminated) else 130


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises a KeyboardInterrupt, too, so that both leave by the same door and save on the way."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    """Progress and errors go to stderr, without passwords; stdout is for data."""
    print(without_passwords(text), file=sys.stderr, flush=True)
