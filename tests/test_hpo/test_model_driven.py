"""A search without brackets, whose model chooses settings, rungs and which runs continue."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from hpo.search.search import Search
from hpo.search.view import Job
from scaling.laws.compute import Fidelity

optuna.logging.set_verbosity(optuna.logging.WARNING)

LR: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-4, 1e-1, log=True)}
LEVELS = (100, 300, 900, 2700)
SIZES = (1e6, 4e6)


def open_search(**options: Any) -> Search:
    defaults: dict[str, Any] = {"space": LR, "tokens": (100, 2700), "sampler": "mfbo"}
    return Search(**(defaults | options))


# Three rungs.
SHORT = (300, 2700)


def compute_loss(job: Job) -> float:
    """Return the loss of a bowl around lr = 0.01 whose centre drifts with the tokens. Above 0.05 it diverges."""
    lr, f = float(job.params["lr"]), job.fidelity
    if lr > 0.05:
        return math.nan
    return float(2.0 + 3 / f.D**0.3 + 0.1 * math.log(lr / 0.01 / (f.D / 900) ** 0.2) ** 2 + 100 / f.N**0.5)


def run(search: Search, most: int, loss: Callable[[Job], float] = compute_loss) -> list[Job]:
    jobs = []
    for _ in range(most):
        job = search.ask()
        assert job is not None
        search.tell(job, loss(job))
        jobs.append(job)
    return jobs


def outline(jobs: Sequence[Job]) -> list[tuple[Any, ...]]:
    return [(j.config, j.rung, j.resume_from, j.fidelity, tuple(j.params.items())) for j in jobs]


def identify_settings(job: Job, digits: int = 9) -> tuple[Any, ...]:
    """Return what identifies a job's settings: floats that differ only by rounding are equal."""
    return (job.fidelity.N, *(float(f"{x:.{digits}g}") if isinstance(x, float) else x for x in job.params.values()))


def check_climbs(search: Search, jobs: Sequence[Job]) -> None:
    """Check that every job starts at the bottom or continues its configuration's finished run one rung below.

    No run may be repeated, and the tokens must add up.
    """
    done: dict[tuple[int, int], Job] = {}
    for job in jobs:
        assert (job.config, job.rung) not in done
        assert search.ladder.levels[job.rung] == job.fidelity.D
        if job.rung == 0:
            assert (job.config, job.resume_from, job.resume_tokens) == (job.number, None, None)
        else:
            below = done[job.config, job.rung - 1]
            assert (job.resume_from, job.resume_tokens) == (below.number, below.fidelity.D)
            assert (job.params, job.fidelity.N) == (below.params, below.fidelity.N)
            trial = search.study.trials[below.number]
            assert trial.state == TrialState.COMPLETE
            assert math.isfinite(trial.value or 0.0)
        done[job.config, job.rung] = job
    of_settings = {(identify_settings(job), job.rung) for job in jobs}
    assert len(of_settings) == len(jobs)
    highest = {c: max(d.fidelity.D for (config, _), d in done.items() if config == c) for c, _ in done}
    progress = search.progress
    assert progress.done == len(jobs)
    assert progress.configurations == len(highest)
    assert progress.tokens_spent == sum(highest.values())
    assert progress.tokens_saved == sum(job.resume_tokens or 0 for job in jobs)


# With the model


@pytest.fixture(scope="module")
def climbed() -> tuple[Search, list[Job]]:
    search = open_search(seed=1, tokens=SHORT)
    return search, run(search, 45)


def test_where_runs_resume_they_climb_rung_by_rung_and_none_is_run_twice(climbed: tuple[Search, list[Job]]) -> None:
    search, jobs = climbed
    check_climbs(search, jobs)
    assert max(job.rung for job in jobs) == 2
    assert min(abs(math.log(j.params["lr"] / 0.0125)) for j in jobs if j.rung == 2) < 0.5
    assert abs(math.log(search.best()["lr"] / 0.0125)) < 0.3


def test_a_run_ends_where_it_was_wanted_unless_it_diverges_or_is_hopeless(climbed: tuple[Search, list[Job]]) -> None:
    search, jobs = climbed
    trials = search.study.trials
    arrived = 0
    for config in {job.config for job in jobs}:
        mine = [t for t in trials if t.user_attrs["config"] == config]
        goal, last = mine[-1].user_attrs["goal"], mine[-1]
        assert all(a.user_attrs["goal"] <= b.user_attrs["goal"] for a, b in pairwise(mine))
        assert last.user_attrs["rung"] <= goal
        arrived += last.user_attrs["rung"] == goal > 0
        on_the_way = last.number != trials[-1].number and last.user_attrs["rung"] < goal
        if on_the_way and not last.user_attrs.get("diverged"):
            worst = {"lr": last.params["lr"]}
            assert search._sampler.is_hopeless(search.study, LR, worst, search.target)  # type: ignore[attr-defined]
    assert arrived >= 3


def test_two_searches_with_one_seed_are_the_same_and_other_seeds_differ(climbed: tuple[Search, list[Job]]) -> None:
    expected = outline(climbed[1])[:15]
    assert outline(run(open_search(seed=1, tokens=SHORT), 15)) == expected
    assert outline(run(open_search(seed=2, tokens=SHORT), 3)) != expected[:3]


def test_where_runs_do_not_resume_the_rung_is_chosen_at_once() -> None:
    search = open_search(seed=3, resumable=False, tokens=SHORT)
    jobs = run(search, 35)
    assert all((job.config, job.resume_from) == (job.number, None) for job in jobs)
    assert {job.rung for job in jobs} >= {0, 2}
    assert len({(identify_settings(job), job.rung) for job in jobs}) == len(jobs)
    assert search.progress.tokens_spent == sum(job.fidelity.D for job in jobs)
    assert search.progress.tokens_saved == 0
    assert abs(math.log(search.best()["lr"] / 0.0125)) < 0.3


def test_after_a_raise_the_new_top_is_used_and_nothing_is_run_again() -> None:
    search = open_search(seed=4, tokens=(300, 900))
    first = run(search, 15)
    before = [(t.number, t.state, t.value) for t in search.study.trials]
    search.extend(2700)
    assert search.target == Fidelity(1.0, 2700)
    later = run(search, 30)
    check_climbs(search, [*first, *later])
    assert [(t.number, t.state, t.value) for t in search.study.trials[:15]] == before
    assert any(job.rung == 2 for job in later)
    # The first random runs are not repeated either. A new search does not know yet where the optimum is.
    fresh = run(open_search(seed=4, tokens=SHORT), 3)
    assert max(abs(math.log(job.params["lr"] / 0.012)) for job in later[:3]) < 1.0
    assert max(abs(math.log(job.params["lr"] / 0.012)) for job in fresh) > 1.5


def test_killed_and_opened_again_at_any_point_it_decides_the_same(tmp_path: Path) -> None:
    def go(kills: random.Random | None, storage: Any) -> list[tuple[Any, ...]]:
        jobs, search = [], open_search(seed=6, storage=storage, worker="one")
        for _ in range(16):
            job = search.ask()
            assert job is not None
            # The worker is killed while the run is in progress.
            if kills is not None and kills.random() < 0.4:
                search = open_search(seed=6, storage=storage, worker="one")
                assert search.ask() == job
            search.tell(job, compute_loss(job))
            if kills is not None and kills.random() < 0.4:
                search = open_search(seed=6, storage=storage, worker="one")
            jobs.append(job)
        return outline(jobs)

    expected = go(None, InMemoryStorage())
    assert go(random.Random(0), tmp_path / "study.journal") == expected


def test_four_threads_run_nothing_twice_and_none_waits_forever() -> None:
    storage, done, lock = InMemoryStorage(), list[Job](), threading.Lock()
    errors: list[BaseException] = []

    def work(worker: str) -> None:
        try:
            search = open_search(seed=7, storage=storage, worker=worker)
            for _ in range(7):
                job = search.ask()
                # A search without end always has a job.
                assert job is not None
                search.tell(job, compute_loss(job))
                with lock:
                    done.append(job)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"w{i}",), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not errors
    check_climbs(open_search(seed=7, storage=storage, worker="reader"), sorted(done, key=lambda job: job.number))


def test_jobs_that_run_at_the_same_time_are_different_runs() -> None:
    """Several jobs are asked for before any is told, with and without a model."""
    search, jobs = open_search(seed=8), list[Job]()
    for most in (8, 6):
        asked = [job for _ in range(most) if (job := search.ask()) is not None]
        assert len({(identify_settings(job, 3), job.rung) for job in asked}) == len(asked) == most
        for job in asked:
            search.tell(job, compute_loss(job))
        jobs += asked
    check_climbs(search, jobs)


def test_several_sizes_share_the_model_and_each_run_keeps_its_size() -> None:
    search = open_search(seed=9, sizes=SIZES, tokens=(300, 900))
    jobs = run(search, 40)
    check_climbs(search, jobs)
    assert {job.fidelity.N for job in jobs} == set(SIZES)
    # The first random runs are at the cheapest fidelity.
    assert {job.fidelity.N for job in jobs[:3]} == {SIZES[0]}
    assert search.target == Fidelity(SIZES[1], 900)
    assert any(job.fidelity == search.target for job in jobs)
    assert abs(math.log(search.best()["lr"] / 0.01)) < 0.4


TINY: dict[str, BaseDistribution] = {"n": IntDistribution(1, 3), "kind": CategoricalDistribution(["a", "b"])}
ODD: dict[str, Callable[[Job], float]] = {
    "NaN": lambda job: math.nan,
    "infinite": lambda job: math.inf,
    "constant": lambda job: 2.0,
    "mixed": lambda job: [math.nan, math.inf, 2.0, 2.0, 1e30, -5.0, 2.0 + 0.1 * job.params["n"]][job.number % 7],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("odd", "resumable"), [("NaN", True), ("NaN", False), ("infinite", True), ("constant", True), ("mixed", False)]
)
def test_odd_losses_on_a_tiny_space_end_when_every_run_has_been_made(odd: str, resumable: bool) -> None:
    search, jobs = open_search(space=TINY, tokens=(100, 900), resumable=resumable, seed=10), list[Job]()
    while (job := search.ask()) is not None:
        search.tell(job, ODD[odd](job))
        jobs.append(job)
    assert search.finished
    assert len({(identify_settings(job), job.rung) for job in jobs}) == len(jobs) <= 18
    if resumable:
        for job in jobs:
            assert job.resume_from is None or search.study.trials[job.resume_from].state == TrialState.COMPLETE
    if odd == "constant":
        assert len(jobs) == 18
    # Settings that diverged are not run for longer.
    if resumable and odd in ("NaN", "infinite"):
        assert [job.rung for job in jobs] == [0] * 6
    if odd in ("NaN", "infinite"):
        with pytest.raises(ValueError, match="finite loss"):
            search.best()
    else:
        assert set(search.best()) == set(TINY)


def test_odd_losses_from_the_start_do_not_stop_it() -> None:
    for odd in ODD.values():
        search = open_search(space=TINY, tokens=(100, 300), seed=11)
        assert len(run(search, 6, odd)) == 6
