"""Stop signals: SIGINT and SIGTERM as a flag that a training reads between steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling.common.measurement import Measurement

POLL_SECONDS = 0.5
GRACE_SECONDS = 30.0  # for a worker that was told to stop: the step in hand, one checkpoint


class StopSignals:
    """SIGINT and SIGTERM: noted at once, but raised only inside a trainer's steps, never while asking, telling or recording."""

    def __init__(self) -> None:
        self.requested = False
        self._inside = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _: int, __: FrameType | None) -> None:
        first = not self.requested
        self.requested = True
        if self._inside and first:
            raise KeyboardInterrupt

    def interrupting(self, points: Iterator[Measurement]) -> Iterator[Measurement]:
        """The same points; a signal interrupts the making of one, and one that came before interrupts at once."""
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
