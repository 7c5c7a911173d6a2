"""Log to stderr from the commands, and show that they work.

Libraries only create loggers under "muscale" and leave handlers to the program.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from scaling.common.redact import redact_passwords

ROOT = "muscale"
# A command that answers within this many seconds shows nothing.
PATIENCE = 0.7


class RedactingFormatter(logging.Formatter):
    """Format a record as its message alone, without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_passwords(super().format(record))


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Write to what sys.stderr is at that moment, so that redirecting it works after the handler was made."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        return sys.stderr


def configure_logging(level: int = logging.INFO) -> None:
    """Send the records of all muscale loggers to stderr, one line each.

    A second call only changes the level. Records still propagate to the root logger's handlers, if a program has any.

    Args:
        level: The least level that is shown: `logging.INFO` for progress, `logging.WARNING` for `--quiet`,
            `logging.DEBUG` for `-v`.
    """
    logger = logging.getLogger(ROOT)
    logger.setLevel(level)
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        handler = StderrHandler()
        handler.setFormatter(RedactingFormatter("%(message)s"))
        logger.addHandler(handler)


@contextmanager
def log_warnings() -> Iterator[None]:
    """Log each of Python's warnings as one line, once, while the block runs, instead of printing where it was raised.

    Warnings of installed libraries are for their callers: they are shown with `-v` only.
    """
    logger = logging.getLogger(ROOT)
    shown: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            level = logging.DEBUG if "site-packages" in filename else logging.WARNING
            logger.log(level, f"warning: {message}")

    with warnings.catch_warnings():
        # A module-level function that the standard library documents as replaceable.
        warnings.showwarning = show
        yield


@contextmanager
def show_progress(
    what: str, *, steps: int | None = None, name: str = ROOT, quiet: bool = False
) -> Iterator[Callable[[str], None]]:
    """Show what a command is doing while the block runs.

    On a terminal this is a bar that disappears at the end. Elsewhere the first description is logged once, if the block
    takes longer than `PATIENCE`. With `--quiet` (a logger above INFO) nothing is shown.

    Args:
        what: What the command is doing, such as "fitting laws to runs.csv".
        steps: How many steps the work has; None if that is not known.
        name: The logger whose level decides.
        quiet: Show nothing, as for `--json` without a terminal.

    Yields:
        A function that marks one step as done and shows what comes next.
    """
    logger = logging.getLogger(name)
    if not logger.isEnabledFor(logging.INFO) or (quiet and not sys.stderr.isatty()):
        yield lambda text: None
    elif sys.stderr.isatty():
        with _show_bar(what, steps) as advance:
            yield advance
    else:
        timer = threading.Timer(PATIENCE, lambda: logger.info(f"{what} ..."))
        timer.daemon = True
        timer.start()
        try:
            yield lambda text: None
        finally:
            timer.cancel()


@contextmanager
def _show_bar(what: str, steps: int | None) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=steps)

        def advance(text: str) -> None:
            progress.update(task, advance=1, description=text)

        yield advance
