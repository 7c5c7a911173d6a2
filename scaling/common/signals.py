"""Handle SIGINT and SIGTERM: both end a command by the same path, and neither arrives where it would tear a state
apart.

Only this module installs handlers. Python runs them in the main thread, between two of its bytecodes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. It takes the same path as Ctrl-C, so that both save state on the way out."""


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code that a shell expects: 143 after SIGTERM, 130 after Ctrl-C."""
    return 143 if isinstance(interrupt, Terminated) else 130


@contextmanager
def handle_signals(
    handler: Callable[[int, FrameType | None], Any] | signal.Handlers, numbers: Sequence[int] = STOP_SIGNALS
) -> Iterator[None]:
    """Install a handler for the block and restore the previous ones after it.

    Args:
        handler: What to call, or `signal.SIG_IGN` or `signal.SIG_DFL`.
        numbers: The signals to handle.
    """
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            # None means that the handler was not installed from Python, so it cannot be put back.
            signal.signal(number, before if before is not None else signal.SIG_DFL)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM in the block, as Ctrl-C raises KeyboardInterrupt."""

    def terminate(_: int, __: FrameType | None) -> None:
        raise Terminated

    with handle_signals(terminate, (signal.SIGTERM,)):
        yield


@contextmanager
def defer_signals() -> Iterator[list[int]]:
    """Delay SIGINT and SIGTERM until the end of the block.

    Signals interrupt only the main thread, so in any other thread nothing is changed.

    Yields:
        The numbers of the signals received so far, oldest first. They are raised again after the block.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    try:
        with handle_signals(lambda number, _: received.append(number)):
            yield received
    finally:
        for number in received:
            signal.raise_signal(number)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM from here to the end of the process, which is already stopping."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
