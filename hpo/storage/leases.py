"""Find out which workers of a search are alive: those of this host by their process, others by their lease.

A worker that holds a lease increments a number, the heartbeat, in its running trial. A reader remembers since when it
has seen the same number, by its own monotonic clock, which is neither set nor compared with another host's. A new
worker therefore waits for a whole lease before it takes over a trial from another host. It takes over a trial of a
dead process of its own host at once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Container, Iterable

import psutil
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.trial_attributes import is_search_trial

# Heartbeats in the time of a lease, so that a late one costs nothing.
BEATS_PER_LEASE = 3
# Two readings of a process's start time may differ by this much when the clock is set in between.
CLOCK_SECONDS = 1.0


class LeaseLost(ValueError):
    """The trial is not this worker's any more: its lease expired and another worker took it, or it has a result."""


class LeaseMonitor:
    """Remember since when each running trial has shown the same heartbeat."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Create a monitor that has seen nothing yet.

        Args:
            seconds: Length of a lease, the same for all workers of a study.
            clock: A clock that is never set.
        """
        self._seconds, self._clock = seconds, clock
        self._seen: dict[int, tuple[object, float]] = {}

    def find_expired(self, trials: Iterable[FrozenTrial]) -> set[int]:
        """Return the numbers of the running trials whose heartbeat has not changed for the length of a lease.

        Args:
            trials: All trials of the study as they are now.
        """
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


def identify_host() -> str:
    """Return the name of this host and, on Linux, its process namespace.

    Containers may share a host name but have process numbers of their own.
    """
    try:
        return f"{socket.gethostname()}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def identify_process() -> str:
    """Return host/pid/start time of this process. The start time is needed because process numbers are reused."""
    return f"{identify_host()}/{os.getpid()}/{psutil.Process().create_time()!r}"


def parse_process_name(worker: str) -> tuple[str, int, float] | None:
    """Return host, pid and start time of a worker's name, or None if it is not of the form of `identify_process`."""
    parts = worker.rsplit("/", 2)
    try:
        return parts[0], int(parts[1]), float(parts[2])
    except (IndexError, ValueError):
        return None


def find_abandoned(
    trials: Iterable[FrozenTrial], worker: str, held: Container[int], expired: Container[int] = ()
) -> list[FrozenTrial]:
    """Return the unfinished trials of a search that no worker is running.

    These are trials that were given back, trials of dead workers or with an expired lease, and trials in Optuna's queue
    that have the attributes of a search.

    Args:
        trials: All trials of the study.
        worker: Name of the worker that asks.
        held: Numbers of the trials that it was given since it was started.
        expired: Numbers of the trials with an expired lease, see `LeaseMonitor`.
    """
    alive: dict[str, bool] = {}
    abandoned = []
    for trial in trials:
        if trial.state.is_finished() or not is_search_trial(trial):
            continue
        owner = str(trial.user_attrs.get("worker") or "")
        if trial.state == TrialState.RUNNING and owner == worker:
            # If this worker was not given its own trial, it was restarted under the same name, or an ask failed after
            # its write.
            if trial.number in held or ("beat" not in trial.user_attrs and parse_process_name(owner) is not None):
                continue
        elif trial.state == TrialState.RUNNING and trial.number not in expired:
            if owner not in alive:
                alive[owner] = is_alive(owner)
            if alive[owner]:
                continue
        abandoned.append(trial)
    return abandoned


def is_alive(worker: str) -> bool:
    """Return whether a worker may still be working.

    A worker on another host, or with a name of another form, counts as alive. An empty name means that the trial was
    given back.
    """
    if not worker:
        return False
    process_name = parse_process_name(worker)
    if process_name is None or not is_on_this_host(worker):
        return True
    _, pid, created = process_name
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - created) <= CLOCK_SECONDS
        return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def is_on_this_host(worker: str) -> bool:
    """Return whether a worker's name is that of a process of this host."""
    process_name = parse_process_name(worker)
    # The bare host name stands in studies that are older than the namespace in names.
    return process_name is not None and process_name[0] in (identify_host(), socket.gethostname())
