"""Who of a search's workers is alive: processes of this host by their number, others by the beat of their leases.

A worker that holds a lease writes a number, one higher each time, into its running trial. Whoever asks remembers since when it
has seen the same number: by its own clock, which no other host shares and nobody sets. So a new worker waits for a whole
lease before it takes up a trial from another host; one of a dead process of its own host it takes at once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Container, Iterable

import psutil
from optuna.trial import FrozenTrial, TrialState

BEATS = 3  # in the time of a lease: one that comes late costs nothing
CLOCK_SECONDS = 1.0  # two readings of one process's start may differ by this much when the clock is set in between


class LeaseLost(ValueError):
    """A trial that is no longer this worker's: its lease ran out and another has taken it, or it has been told."""


class LeaseMonitor:
    """Since when each running trial's beat has been seen unchanged."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """seconds: of a lease, the same for all workers of a study. clock: one that is never set."""
        self._seconds, self._clock = seconds, clock
        self._seen: dict[int, tuple[object, float]] = {}

    def expired(self, trials: Iterable[FrozenTrial]) -> set[int]:
        """The numbers of those whose beat has stood still for a lease."""
        now = self._clock()
        beats = {
            t.number: (t.user_attrs.get("worker"), t.user_attrs["beat"])
            for t in trials
            if t.state == TrialState.RUNNING and "beat" in t.user_attrs
        }
        self._seen = {
            number: self._seen[number] if self._seen.get(number, (None,))[0] == beat else (beat, now)
            for number, beat in beats.items()
        }
        return {number for number, (_, since) in self._seen.items() if now - since > self._seconds}


def host() -> str:
    """This host, and on Linux the process numbers that are valid here: containers of one host name have their own."""
    try:
        return f"{socket.gethostname()}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def process_name() -> str:
    """host/pid/start time of this process: a pid alone is used again."""
    return f"{host()}/{os.getpid()}/{psutil.Process().create_time()!r}"


def process_of(worker: str) -> tuple[str, int, float] | None:
    """host, pid and start time, when a worker's name is of that form."""
    parts = worker.rsplit("/", 2)
    try:
        return parts[0], int(parts[1]), float(parts[2])
    except (IndexError, ValueError):
        return None


def abandoned(
    trials: Iterable[FrozenTrial], worker: str, held: Container[int], expired: Container[int] = ()
) -> list[FrozenTrial]:
    """Trials of a search that nobody works on: given back, of a dead worker, of one whose lease ran out, or waiting in Optuna's queue.

    worker: who asks; held: numbers of the trials that were handed out to it since it was started; expired: see Sightings.
    """
    alive: dict[str, bool] = {}
    found = []
    for trial in trials:
        if trial.state.is_finished() or "bracket" not in trial.user_attrs:
            continue
        owner = str(trial.user_attrs.get("worker") or "")
        if trial.state == TrialState.RUNNING and owner == worker:
            # Not handed out: a worker of that name was started again, or an ask broke off after its write.
            if trial.number in held or ("beat" not in trial.user_attrs and process_of(owner) is not None):
                continue
        elif trial.state == TrialState.RUNNING and trial.number not in expired:
            if owner not in alive:
                alive[owner] = is_alive(owner)
            if alive[owner]:
                continue
        found.append(trial)
    return found


def is_alive(worker: str) -> bool:
    """Whether a worker may still be working. One on another host, or with a name of its own, counts as alive."""
    if not worker:
        return False  # given back
    process = process_of(worker)
    if process is None or process[0] not in (
        host(),
        socket.gethostname(),
    ):  # the second: studies before there was the first
        return True
    try:
        found = psutil.Process(process[1])
        same = abs(found.create_time() - process[2]) <= CLOCK_SECONDS
        return bool(same and found.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
