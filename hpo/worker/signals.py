"""Stop signals: SIGINT and SIGTERM as a flag that a training reads between steps."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from scaling.common.signals import handle_signals

if TYPE_CHECKING:
    from scaling.common.measurement import Measurement

POLL_SECONDS = 0.5
GRACE_SECONDS = 30.0  # for a worker that was told to stop: the step in hand, one checkpoint


class StopSignals:
    """SIGINT and SIGTERM: noted at once, but raised only inside a trainer's steps, never while asking, telling or recording."""

    def __init__(self) -> None:
        self.requested = False
        self._inside = False
        self._installed = handle_signals(self._note)

    def __enter__(self) -> StopSignals:
        self._installed.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._installed.__exit__(*error)  # type: ignore[arg-type]

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
