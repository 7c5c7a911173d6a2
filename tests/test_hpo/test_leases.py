"""Which workers are alive: leases by the reader's clock, processes by their number; late results count once at most."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial

from hpo.search.search import Search
from hpo.search.trial_writer import TrialWriter
from hpo.storage.leases import LeaseLost, LeaseMonitor, identify_host, identify_process, is_alive, parse_process_name

SPACE = {"lr": FloatDistribution(1e-4, 1.0, log=True)}


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def open_search(storage: Any, worker: str, **changes: Any) -> Search:
    defaults = {
        "tokens": (1, 9),
        "sampler": "random",
        "iterations": 1,
        "storage": storage,
        "worker": worker,
        "lease": 60.0,
    }
    return Search(SPACE, **(defaults | changes))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock for all searches that are opened from now on."""
    clock = FakeClock()
    monkeypatch.setattr(LeaseMonitor.__init__, "__defaults__", (clock,))
    return clock


def test_a_heartbeat_that_stops_for_a_lease_has_expired_by_the_readers_own_clock() -> None:
    clock = FakeClock()
    monitor = LeaseMonitor(60.0, clock)
    study = optuna.create_study()
    trial = study.ask()
    trial.set_user_attr("worker", "elsewhere")
    for beat in range(3):
        trial.set_user_attr("beat", beat)
        assert not monitor.find_expired(study.trials)
        clock.now += 60.0
        assert not monitor.find_expired(study.trials)
    clock.now += 0.1
    assert monitor.find_expired(study.trials) == {0}
    # The worker that took it over starts at the same number.
    trial.set_user_attr("worker", "another")
    assert not monitor.find_expired(study.trials)
    clock.now += 61
    assert monitor.find_expired(study.trials) == {0}
    study.tell(trial, 1.0)
    assert not monitor.find_expired(study.trials)
    silent = study.ask()
    clock.now += 1e6
    silent.set_user_attr("worker", "a notebook")
    assert not monitor.find_expired(study.trials), "a worker without heartbeats has no lease"


def test_a_run_from_another_host_is_taken_over_after_its_lease_and_the_late_result_is_refused(clock: FakeClock) -> None:
    storage = optuna.storages.InMemoryStorage()
    here, there = open_search(storage, "here"), open_search(storage, "there")
    job = there.ask()
    assert job is not None
    assert here.ask().number != job.number  # type: ignore[union-attr]
    clock.now += 59
    there.beat(job)
    clock.now += 59
    assert here.ask().number != job.number  # type: ignore[union-attr]
    clock.now += 61
    again = here.ask()
    assert again is not None
    assert (again.number, again.params) == (job.number, job.params)
    with pytest.raises(LeaseLost, match="taken over by here"):
        there.beat(job)
    with pytest.raises(LeaseLost, match="taken over by here"):
        there.tell(job, 1.0)
    here.tell(again, 2.0)
    with pytest.raises(LeaseLost, match="COMPLETE"):
        there.tell(job, 1.0)
    assert [t.value for t in here.study.trials if t.number == job.number] == [2.0]


def test_a_result_that_comes_late_but_before_anyone_took_the_run_counts(clock: FakeClock) -> None:
    here = open_search(None, "here")
    job = here.ask()
    assert job is not None
    clock.now += 1e6
    here.tell(job, 1.0)
    assert here.study.trials[job.number].value == 1.0


def test_a_clock_that_jumps_takes_no_trial_from_any_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the reader's nor the worker's time of day matters."""
    import datetime
    import time

    storage = optuna.storages.InMemoryStorage()
    here, there = open_search(storage, "here"), open_search(storage, "there")
    job = there.ask()
    assert job is not None
    for jump in (1e7, -1e7):
        real = time.time()
        monkeypatch.setattr(time, "time", lambda real=real, jump=jump: real + jump)
        assert datetime.datetime.now().year > 2000
        assert here.ask().number != job.number  # type: ignore[union-attr]
        there.beat(job)
    there.tell(job, 1.0)


def test_a_lease_must_be_positive() -> None:
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="lease must be positive"):
            open_search(None, "here", lease=wrong)


def test_an_ask_that_failed_after_its_write_is_repeated_by_the_same_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = open_search(None, identify_process())
    create_trial = TrialWriter.create_trial

    def fail_after_write(*args: Any) -> FrozenTrial:
        create_trial(*args)
        raise ConnectionError("the server has gone")

    monkeypatch.setattr(TrialWriter, "create_trial", fail_after_write)
    with pytest.raises(ConnectionError):
        mine.ask()
    monkeypatch.undo()
    job = mine.ask()
    assert job is not None
    assert job.number == 0
    assert mine.ask().number == 1  # type: ignore[union-attr]


def test_a_crashed_job_is_asked_once_more_and_then_ranks_last() -> None:
    mine = open_search(None, "here")
    job = mine.ask()
    assert job is not None
    assert not mine.crashed(job, "killed")
    again = mine.ask()
    assert again is not None
    assert (again.number, again.params) == (job.number, job.params)
    assert mine.crashed(again, "killed again")
    trial = mine.study.trials[job.number]
    assert trial.user_attrs["crashes"] == ["killed", "killed again"]
    assert mine.progress.diverged == 1
    assert mine.ask().number != job.number  # type: ignore[union-attr]


def test_processes_of_this_host_are_known_by_number_and_start_time_and_others_count_as_alive() -> None:
    mine = identify_process()
    assert parse_process_name(mine) == (identify_host(), os.getpid(), psutil.Process().create_time())
    assert is_alive(mine)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    name = f"{identify_host()}/{child.pid}/{psutil.Process(child.pid).create_time()!r}"
    assert is_alive(name)
    assert not is_alive(f"{identify_host()}/{child.pid}/{1.0!r}"), "the number belonged to another process before"
    child.kill()
    child.wait()
    assert not is_alive(name)
    assert is_alive(f"elsewhere/{child.pid}/1.0")
    before = mine.replace(identify_host(), identify_host().split(":")[0])
    assert is_alive(before), "as in studies that are older than namespaces in names"
    assert not is_alive(before.replace(f"/{os.getpid()}/", f"/{child.pid}/"))


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="Linux's namespaces")
def test_a_container_of_the_same_host_name_is_another_host() -> None:
    name, namespace = identify_host().rsplit(":", 1)
    assert is_alive(f"{name}:{int(namespace) + 1}/99999999/1.0")
    assert not is_alive(f"{identify_host()}/99999999/1.0")
