"""Who is alive: leases by the reader's clock, processes by their number; late results are counted once or refused."""

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


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def search(storage: Any, worker: str, **changes: Any) -> Search:
    given = {
        "tokens": (1, 9),
        "sampler": "random",
        "iterations": 1,
        "storage": storage,
        "worker": worker,
        "lease": 60.0,
    }
    return Search(SPACE, **(given | changes))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all searches that are opened from now on."""
    clock = Clock()
    monkeypatch.setattr(LeaseMonitor.__init__, "__defaults__", (clock,))
    return clock


def test_a_beat_that_stands_still_for_a_lease_has_expired_by_the_readers_own_clock() -> None:
    clock = Clock()
    sightings = LeaseMonitor(60.0, clock)
    study = optuna.create_study()
    trial = study.ask()
    trial.set_user_attr("worker", "elsewhere")
    for beat in range(3):
        trial.set_user_attr("beat", beat)
        assert not sightings.find_expired(study.trials)
        clock.now += 60.0
        assert not sightings.find_expired(study.trials)
    clock.now += 0.1
    assert sightings.find_expired(study.trials) == {0}
    trial.set_user_attr("worker", "another")  # who took it over begins at the same number
    assert not sightings.find_expired(study.trials)
    clock.now += 61
    assert sightings.find_expired(study.trials) == {0}
    study.tell(trial, 1.0)
    assert not sightings.find_expired(study.trials)
    silent = study.ask()
    clock.now += 1e6
    silent.set_user_attr("worker", "of a notebook")
    assert not sightings.find_expired(study.trials), "who never beats has no lease"


def test_a_run_from_another_host_is_taken_over_after_its_lease_and_the_late_result_is_refused(clock: Clock) -> None:
    storage = optuna.storages.InMemoryStorage()
    here, there = search(storage, "here"), search(storage, "there")
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


def test_a_result_that_comes_late_but_before_anyone_took_the_run_counts(clock: Clock) -> None:
    here = search(None, "here")
    job = here.ask()
    assert job is not None
    clock.now += 1e6
    here.tell(job, 1.0)
    assert here.study.trials[job.number].value == 1.0


def test_a_clock_that_jumps_takes_nothing_from_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day is nobody's business here: neither the reader's nor the worker's."""
    import datetime
    import time

    storage = optuna.storages.InMemoryStorage()
    here, there = search(storage, "here"), search(storage, "there")
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
            search(None, "here", lease=wrong)


def test_an_ask_that_broke_off_after_its_write_is_taken_up_by_the_same_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = search(None, identify_process())
    create_trial = TrialWriter.create_trial

    def broken(*args: Any) -> FrozenTrial:
        create_trial(*args)
        raise ConnectionError("the server has gone")

    monkeypatch.setattr(TrialWriter, "create_trial", broken)
    with pytest.raises(ConnectionError):
        mine.ask()
    monkeypatch.undo()
    job = mine.ask()
    assert job is not None
    assert job.number == 0
    assert mine.ask().number == 1  # type: ignore[union-attr]


def test_a_crash_is_tried_once_more_and_then_ranks_last() -> None:
    mine = search(None, "here")
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


def test_processes_of_this_host_are_known_by_number_and_start_and_of_others_nothing_is_said() -> None:
    mine = identify_process()
    assert parse_process_name(mine) == (identify_host(), os.getpid(), psutil.Process().create_time())
    assert is_alive(mine)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    name = f"{identify_host()}/{child.pid}/{psutil.Process(child.pid).create_time()!r}"
    assert is_alive(name)
    assert not is_alive(f"{identify_host()}/{child.pid}/{1.0!r}"), "the number was another's once"
    child.kill()
    child.wait()
    assert not is_alive(name)
    assert is_alive(f"elsewhere/{child.pid}/1.0")
    before = mine.replace(identify_host(), identify_host().split(":")[0])
    assert is_alive(before), "as studies have it that began before there were namespaces in names"
    assert not is_alive(before.replace(f"/{os.getpid()}/", f"/{child.pid}/"))


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="Linux's namespaces")
def test_a_container_of_the_same_host_name_is_another_host() -> None:
    name, namespace = identify_host().rsplit(":", 1)
    assert is_alive(f"{name}:{int(namespace) + 1}/99999999/1.0")
    assert not is_alive(f"{identify_host()}/99999999/1.0")
