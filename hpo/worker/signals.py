"""Stop signals: SIGINT and SIGTERM as a flag that a training reads between its steps."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from scaling.common.signals import handle_signals

if TYPE_CHECKING:
    from scaling.common.measurement import Measurement

POLL_SECONDS = 0.5
# How long a stopped worker may take to finish its current step and write a checkpoint.
GRACE_SECONDS = 30.0


class StopSignals:
    """Handle SIGINT and SIGTERM in a `with` block.

    They are noted at once, but raise KeyboardInterrupt only within a trainer's steps, never while a worker asks,
    reports or records.

    Attributes:
        requested: Whether a signal has arrived.
    """

    def __init__(self) -> None:
        self.requested = False
        self._inside = False
        self._installed = handle_signals(self._receive)

    def __enter__(self) -> StopSignals:
        self._installed.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._installed.__exit__(*error)  # type: ignore[arg-type]

    def _receive(self, _: int, __: FrameType | None) -> None:
        is_first = not self.requested
        self.requested = True
        if self._inside and is_first:
            raise KeyboardInterrupt

    def iterate(self, points: Iterator[Measurement]) -> Iterator[Measurement]:
        """Yield the points of a training, which a signal interrupts while it computes the next one.

        Raises:
            KeyboardInterrupt: If a signal arrives within a step, or arrived before it.
        """
        while True:
            self._inside = True
            try:
                if self.requested:
                    raise KeyboardInterrupt
                point = next(points, None)
            finally:
                self._inside = False
            if point is None:
                return
            yield point
