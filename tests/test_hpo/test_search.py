"""A search from start to end: promotions, raises, kills, enqueued trials, storages and bad input."""

import math
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from hpo.search.hyperband import compute_rung_sizes
from hpo.search.search import Search
from hpo.search.view import Job
from scaling.laws.compute import Fidelity

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "batch": IntDistribution(8, 64, step=8),
    "kind": CategoricalDistribution(["a", "b"]),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_search(**options: Any) -> Search:
    return Search(**({"space": SPACE, "tokens": (100, 900), "sampler": "random", "iterations": 1} | options))


def compute_loss(job: Job) -> float:
    return abs(math.log(job.params["lr"] / 1e-2)) + 100 / job.fidelity.D + job.params["batch"] / 1000


def run(search: Search, loss: Callable[[Job], float] = compute_loss, most: int = 10_000) -> list[Job]:
    jobs: list[Job] = []
    while len(jobs) < most and (job := search.ask()) is not None:
        jobs.append(job)
        search.tell(job, loss(job))
    return jobs


def outline(jobs: list[Job]) -> list[tuple[Any, ...]]:
    return [(j.config, j.rung, j.resume_from, j.fidelity, tuple(j.params.items()), j.bracket) for j in jobs]


def name_dead_worker() -> str:
    """Return the name of a worker on this host that has ended."""
    with subprocess.Popen(["sleep", "10"]) as process:
        created = psutil.Process(process.pid).create_time()
        process.kill()
    return f"{socket.gethostname()}/{process.pid}/{created!r}"


# A search from start to end


def test_one_iteration_runs_every_rung_of_every_bracket() -> None:
    search = open_search()
    jobs = run(search)
    expected = Counter({(k, k + i): n for k in range(3) for i, n in enumerate(compute_rung_sizes(k, 2, 3))})
    assert Counter((j.bracket.start, j.rung) for j in jobs) == expected
    assert search.finished
    assert search.ask() is None
    # 3 are of the first bracket, 5 of the second.
    assert [j.fidelity.D for j in jobs if j.rung == 1] == [300] * 8
    assert {t.state for t in search.study.trials} == {TrialState.COMPLETE}


def test_the_best_of_a_rung_are_promoted_and_name_what_they_continue() -> None:
    search = open_search()
    jobs = run(search)
    by_number = {j.number: j for j in jobs}
    for job in jobs:
        if job.rung > job.bracket.start:
            assert job.resume_from is not None
            before = by_number[job.resume_from]
            assert (before.config, before.rung, before.params) == (job.config, job.rung - 1, job.params)
            assert job.resume_tokens == before.fidelity.D
        else:
            assert (job.resume_from, job.resume_tokens, job.config) == (None, None, job.number)
    first = sorted((j for j in jobs if j.bracket.start == 0 and j.rung == 0), key=compute_loss)
    assert {j.config for j in jobs if j.bracket.start == 0 and j.rung == 1} == {j.config for j in first[:3]}


def test_a_trial_describes_itself_in_its_attributes() -> None:
    search = open_search(sizes=[2e6, 1e6], worker="me")
    jobs = run(search)
    promoted = next(j for j in jobs if j.resume_from is not None)
    trial = search.study.trials[promoted.number]
    assert trial.user_attrs == {
        "tokens": promoted.fidelity.D,
        "N": promoted.fidelity.N,
        "config": promoted.config,
        "rung": promoted.rung,
        "bracket": list(promoted.bracket),
        "continues": promoted.resume_from,
        "resumed_tokens": promoted.resume_tokens,
        "seeds": 1,
        "resumed_seeds": 1,
        "worker": "me",
    }
    assert trial.params == promoted.params
    # Sizes are kept in ascending order.
    assert {j.fidelity.N for j in jobs if j.bracket.size == 0} == {1e6}
    assert search.target == Fidelity(2e6, 900)


def test_without_checkpoints_nothing_is_resumed_but_the_lineage_is_kept() -> None:
    search = open_search(resumable=False)
    jobs = run(search)
    assert all(j.resume_from is None and j.resume_tokens is None for j in jobs)
    top = next(j for j in jobs if j.rung == 2 and j.bracket.start == 0)
    assert search.study.trials[top.number].user_attrs["continues"] is not None
    assert search.progress.tokens_saved == 0
    assert search.progress.tokens_spent == sum(j.fidelity.D for j in jobs)


def test_progress_counts_what_was_planned_spent_and_saved() -> None:
    search = open_search()
    before, plan = search.progress, search.plan()
    assert (before.done, before.planned, before.configurations) == (0, 22, 0)
    assert plan.configurations == 9 + 5 + 3
    # 9 at 100, 3 and 1 more steps of 200 and 600; 5 at 300, 1 more of 600; 3 at 900
    assert before.tokens_planned == 900 + 600 + 600 + 1500 + 600 + 2700 == sum(f.D for f in plan.increments)
    jobs = run(search, most=15)
    pending = search.ask()
    assert pending is not None
    now = search.progress
    assert (now.done, now.running, now.planned, now.tokens_planned) == (15, 1, 22, 6900)
    search.tell(pending, 1.0)
    jobs += [pending, *run(search)]
    after = search.progress
    assert after.tokens_spent == after.tokens_planned == 6900
    assert after.tokens_spent + after.tokens_saved == sum(j.fidelity.D for j in jobs)
    assert (after.configurations, after.done, after.running, after.diverged) == (17, 22, 0, 0)
    assert search.plan().increments == []


def test_a_search_without_end_goes_on_and_has_no_plan() -> None:
    search = open_search(iterations=None)
    jobs = run(search, most=50)
    assert [j.bracket.iteration for j in jobs] == [0] * 22 + [1] * 22 + [2] * 6
    assert not search.finished
    assert search.progress.planned is None
    with pytest.raises(ValueError, match="without end"):
        search.plan()


def test_while_everything_waits_for_a_running_job_there_is_no_job_but_the_search_is_not_finished() -> None:
    search = open_search()
    jobs = [search.ask() for _ in range(17)]
    assert None not in jobs
    assert search.ask() is None
    assert not search.finished
    other = open_search(iterations=None)
    assert [job.bracket.iteration for job in (other.ask() for _ in range(18)) if job][-1] == 1


def test_best_is_the_lowest_loss_at_the_highest_fidelity() -> None:
    search = open_search(sizes=(1.0, 2.0))
    with pytest.raises(ValueError, match="no run has finished"):
        search.best()
    jobs = run(search, loss=lambda j: compute_loss(j) + 10 * j.fidelity.D + 10 * j.fidelity.N)
    top = [j for j in jobs if j.fidelity == Fidelity(2.0, 900)]
    assert search.best() == min(top, key=compute_loss).params


def test_several_sizes_each_have_a_hyperband() -> None:
    jobs = run(open_search(sizes=(1e6, 4e6)))
    assert Counter(j.bracket.size for j in jobs) == {0: 22, 1: 22}
    configs = {j.config: j.fidelity.N for j in jobs}
    assert all(configs[j.config] == j.fidelity.N for j in jobs)
    starts = [j.fidelity.C for j in jobs if j.config == j.number]
    # The cheapest slot is filled first.
    assert starts == sorted(starts)


# Raising the largest run


def test_an_extended_search_promotes_what_one_from_scratch_would() -> None:
    search = open_search()
    known = {(j.config, j.rung) for j in run(search)}
    search.extend(2700)
    assert not search.finished
    more = run(search)
    assert not known & {(j.config, j.rung) for j in more}
    assert len({(j.config, j.rung) for j in more}) == len(more)
    for start in range(4):
        for i, n in enumerate(compute_rung_sizes(start, 3, 3)):
            at = {c for c, r in known if r == start + i} | {j.config for j in more if j.rung == start + i}
            assert len(at) >= n
    assert max(j.fidelity.D for j in more) == 2700
    assert search.target.D == 2700


@pytest.mark.parametrize("variant", ["discarding", "preserving", "efficient"])
def test_every_variant_extends_and_ends(variant: Any) -> None:
    search = open_search(variant=variant)
    run(search)
    left = search.plan(max_tokens=2700)
    # Planning writes nothing.
    assert search.finished
    search.extend(2700)
    assert search.plan() == left
    more = run(search)
    assert search.finished
    assert len(more) >= len(left.increments)
    if variant == "efficient":
        assert len(more) == len(left.increments)
        total = sum(sum(compute_rung_sizes(k, 3, 3)) for k in range(4))
        assert search.progress.done == total


def test_an_extended_study_opens_with_its_first_and_with_its_present_settings(tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    search = open_search(storage=storage)
    run(search, most=5)
    search.extend(2700)
    for tokens in ((100, 900), (100, 2700)):
        again = open_search(storage=storage, tokens=tokens)
        assert again.ladder.levels == (100, 300, 900, 2700)
    with pytest.raises(ValueError, match="raised to 2700"):
        open_search(storage=storage, tokens=(100, 8100))
    with pytest.raises(ValueError, match="nearest values are 2700 and 8100"):
        search.extend(5000)
    with pytest.raises(ValueError, match="2700"):
        search.check_extend(900)
    assert search.ladder.levels[-1] == 2700


# One state and many processes, any of which may be killed


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe", "gp"])
def test_a_search_that_is_reopened_at_every_step_gives_the_same_sequence(tmp_path: Path, sampler: str) -> None:
    expected = run(open_search(sampler=sampler, seed=7))
    reopened = []
    while True:
        search = open_search(sampler=sampler, seed=7, storage=tmp_path / "study.journal")
        if not (one := run(search, most=1)):
            break
        reopened += one
    assert outline(reopened) == outline(expected)
    other = run(open_search(sampler=sampler, seed=8))
    assert outline(other) != outline(expected)


def test_configurations_differ_from_each_other() -> None:
    for sampler in ("random", "qmc"):
        search = open_search(sampler=sampler)
        jobs = [search.ask() for _ in range(17)]
        assert len({j.params["lr"] for j in jobs if j}) == 17


def test_the_default_sampler_finds_the_optimum() -> None:
    search = Search({"x": FloatDistribution(0, 1)}, tokens=(1, 3), iterations=1)
    jobs = run(search, loss=lambda j: (j.params["x"] - 0.3) ** 2 + 1 / j.fidelity.D)
    assert Counter((j.bracket.start, j.rung) for j in jobs) == {(0, 0): 3, (0, 1): 1, (1, 1): 2}
    assert abs(search.best()["x"] - 0.3) < 0.2


def test_any_optuna_sampler_works() -> None:
    search = open_search(sampler=TPESampler(seed=1))
    assert len(run(search)) == 22
    assert search.study.sampler.__class__ is TPESampler


def test_a_job_of_a_dead_process_is_taken_over_as_the_same_trial(tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    undisturbed = run(open_search())
    left = []
    # The worker is killed while a configuration, the first promotion and a late promotion are running.
    for at in (3, 9, 20):
        search = open_search(storage=storage, worker=name_dead_worker())
        run(search, most=at - len(search.study.trials))
        job = search.ask()
        assert job is not None
        left.append(job)
        heir = open_search(storage=storage)
        again = heir.ask()
        assert again == job
        assert heir.study.trials[job.number].user_attrs["worker"] == heir.worker
        heir.tell(job, compute_loss(job))
    run(open_search(storage=storage))
    trials = open_search(storage=storage).study.trials
    assert len(trials) == 22
    assert [t.params for t in trials] == [j.params for j in undisturbed]


def test_jobs_of_live_processes_and_of_other_hosts_are_not_taken_over() -> None:
    storage = InMemoryStorage()
    alive = f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time()!r}"
    numbers = []
    for worker in (alive, "elsewhere/1/2.0", "gpu0"):
        job = open_search(storage=storage, worker=worker).ask()
        assert job is not None
        numbers.append(job.number)
    last = open_search(storage=storage).ask()
    assert last is not None
    assert last.number not in numbers
    # The pid of a dead process was given to this one.
    reused = f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time() - 1000!r}"
    orphan = open_search(storage=storage, worker=reused).ask()
    assert open_search(storage=storage).ask() == orphan


def test_a_named_worker_takes_up_its_own_job_after_a_restart_only() -> None:
    storage = InMemoryStorage()
    search = open_search(storage=storage, worker="gpu0")
    first, second = search.ask(), search.ask()
    assert first is not None
    assert second is not None
    assert first.number != second.number
    assert open_search(storage=storage, worker="gpu0").ask() == first


def test_a_killed_process_that_was_not_waited_for_is_dead() -> None:
    storage = InMemoryStorage()
    with subprocess.Popen(["sleep", "10"]) as process:
        worker = f"{socket.gethostname()}/{process.pid}/{psutil.Process(process.pid).create_time()!r}"
        job = open_search(storage=storage, worker=worker).ask()
        assert open_search(storage=storage).ask() != job
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        assert open_search(storage=storage).ask() == job


def test_a_released_job_is_asked_again_as_the_same_trial() -> None:
    search = open_search()
    job, other = search.ask(), search.ask()
    assert job is not None
    assert other is not None
    search.release(job)
    assert search.ask() == job
    search.tell(job, 1.0)
    with pytest.raises(ValueError, match="told once"):
        search.release(job)


def test_a_trial_whose_worker_was_killed_before_it_had_parameters_is_completed() -> None:
    storage = InMemoryStorage()
    search = open_search(storage=storage)
    expected = run(open_search(), most=3)
    run(search, most=2)
    model = dict(search.study.trials[1].user_attrs) | {"config": 2, "worker": name_dead_worker()}
    study_id = storage.get_study_id_from_name("search")
    half = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=model)
    storage.create_new_trial(study_id, half)
    assert outline([search.ask()]) == outline(expected[2:])  # type: ignore[list-item]
    assert len(search.study.trials) == 3


def test_a_trial_that_failed_before_it_had_parameters_is_no_configuration() -> None:
    search = open_search()
    attrs = {"tokens": 100, "N": 1.0, "config": 0, "rung": 0, "bracket": [0, 0, 0], "continues": None, "worker": "x"}
    search.study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attrs))
    jobs = run(search)
    assert len(jobs) == 22
    assert 0 not in {j.config for j in jobs}
    assert search.progress.configurations == 17


def test_a_waiting_trial_that_describes_a_job_is_taken_as_that_job() -> None:
    search = open_search()
    jobs = run(search, most=17)
    job = search.ask()
    assert job is not None
    attrs = dict(search.study.trials[job.number].user_attrs)
    search.study.tell(job.number, state=TrialState.FAIL)
    search.study.enqueue_trial(job.params, user_attrs=attrs)
    again = search.ask()
    assert again is not None
    assert outline([again]) == outline([job])
    assert again.number == len(jobs) + 1
    assert search.study.trials[again.number].state == TrialState.RUNNING


def test_a_kill_between_the_two_writes_of_a_divergence_is_a_divergence() -> None:
    storage = InMemoryStorage()
    job = open_search(storage=storage, worker=name_dead_worker()).ask()
    assert job is not None
    trial_id = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name("search"), job.number)
    storage.set_trial_user_attr(trial_id, "diverged", True)
    search = open_search(storage=storage)
    following = search.ask()
    assert following is not None
    assert following.config != job.config
    assert search.progress.diverged == 1


def test_a_second_run_of_the_same_evaluation_is_closed() -> None:
    """Two processes without a common lock may both start a promotion. The first one that is told counts."""
    search = open_search()
    run(search, most=17)
    job = search.ask()
    assert job is not None
    attrs = dict(search.study.trials[job.number].user_attrs) | {"worker": ""}
    search.study.add_trial(
        optuna.trial.create_trial(state=TrialState.RUNNING, params=job.params, distributions=SPACE, user_attrs=attrs)
    )
    following = search.ask()
    assert following is not None
    assert (following.config, following.rung) != (job.config, job.rung)
    assert search.study.trials[job.number + 1].state == TrialState.FAIL
    search.tell(job, 1.0)
    assert search.progress.done == 18


def test_a_run_that_failed_from_outside_is_asked_again() -> None:
    search = open_search()
    job = search.ask()
    assert job is not None
    # This is what the dashboard does.
    search.study.tell(job.number, state=TrialState.FAIL)
    again = search.ask()
    assert again is not None
    assert (again.config, again.params, again.fidelity, again.rung) == (job.config, job.params, job.fidelity, job.rung)
    assert again.number != job.number
    search.tell(again, 1.0)
    assert len(run(search)) == 21
    assert search.progress.done == 22


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_a_diverged_run_ranks_last_and_is_not_asked_again(worst: float) -> None:
    search = open_search()

    def loss(job: Job) -> float:
        return worst if job.bracket.start == 0 and job.config > 1 else compute_loss(job)

    jobs = run(search, loss)
    diverged = [t for t in search.study.trials if t.state == TrialState.FAIL]
    assert len(diverged) == 7
    assert all(t.user_attrs["diverged"] is True for t in diverged)
    assert len({(j.config, j.rung) for j in jobs}) == len(jobs)
    rungs = Counter(j.rung for j in jobs if j.bracket.start == 0)
    # Two were left for three places.
    assert rungs[1] == 2
    assert search.finished
    assert search.progress.diverged == 7


def test_a_job_that_is_told_twice_or_unknown_changes_nothing() -> None:
    search = open_search()
    job = search.ask()
    assert job is not None
    for bad in (
        Job(job.params, job.fidelity, None, 99, 99, 0, job.bracket),
        Job(job.params, job.fidelity, None, -1, 0, 0, job.bracket),
        Job(job.params, job.fidelity, None, job.number, job.config, 1, job.bracket),
    ):
        with pytest.raises(ValueError, match="ask"):
            search.tell(bad, 1.0)
    search.tell(job, 1.0)
    for loss in (2.0, math.nan):
        with pytest.raises(ValueError, match="told once"):
            search.tell(job, loss)
    trial = search.study.trials[0]
    assert (trial.value, trial.state) == (1.0, TrialState.COMPLETE)
    assert "diverged" not in trial.user_attrs


# Trials enqueued by hand


def test_an_enqueued_trial_becomes_a_configuration_and_the_sampler_fills_in_the_rest() -> None:
    search = open_search()
    search.study.enqueue_trial({"lr": 0.02, "batch": 16, "kind": "b"})
    search.study.enqueue_trial({"lr": 0.05})
    first, second = search.ask(), search.ask()
    assert first is not None
    assert second is not None
    assert first.params == {"lr": 0.02, "batch": 16, "kind": "b"}
    assert (first.config, first.rung, first.fidelity.D) == (first.number, 0, 100)
    assert second.params["lr"] == 0.05
    assert second.params.keys() == SPACE.keys()


def test_an_enqueued_trial_waits_for_room_and_blocks_nothing() -> None:
    search = open_search()
    # All configurations are started.
    jobs = [search.ask() for _ in range(17)]
    search.study.enqueue_trial({"lr": 0.02, "batch": 16, "kind": "b"})
    for job in jobs:
        assert job is not None
        search.tell(job, compute_loss(job))
    # Promotions overtake it.
    assert len(run(search)) == 5
    assert search.finished
    assert search.study.trials[17].state == TrialState.WAITING
    search.extend(2700)
    assert search.ask().number == 17  # type: ignore[union-attr]


def test_a_trial_that_is_enqueued_while_another_is_chosen_does_not_affect_it() -> None:
    # The cost is computed between reading the trials and creating the new one.
    def cost(fidelity: Fidelity) -> float:
        if len(search.study.trials) == 3:
            search.study.enqueue_trial({"lr": 0.02})
        return fidelity.C

    search = open_search(cost=cost)
    jobs = run(search)
    assert {j.number: j.config for j in jobs}[4] == 4
    assert [j.params["lr"] == 0.02 for j in jobs[:6]] == [False] * 4 + [True, False]
    assert len(jobs) == 22


def test_an_enqueued_trial_outside_the_space_fails_with_a_warning() -> None:
    search = open_search()
    search.study.enqueue_trial({"lr": 5.0})
    with pytest.warns(UserWarning, match="trial 0 is not run.*lr"):
        job = search.ask()
    assert job is not None
    assert job.number == 1
    assert search.study.trials[0].state == TrialState.FAIL


# Storage


def test_an_existing_study_with_other_settings_is_refused_with_all_differences(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    open_search(storage=storage, sizes=(1.0, 2.0))
    changed = {**SPACE, "lr": FloatDistribution(1e-4, 1.0, log=True), "extra": FloatDistribution(0, 1)}
    del changed["kind"]
    with pytest.raises(ValueError, match="other settings") as caught:
        open_search(storage=storage, space=changed, tokens=(10, 900), variant="efficient")
    for what in ("space, lr:", "space, extra:", "space, kind:", "tokens:", "variant:", "sizes:"):
        assert what in str(caught.value)
    assert "eta" not in str(caught.value)
    open_search(storage=storage, sizes=(2.0, 1.0))


def test_a_study_may_be_opened_again_with_another_target(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    assert open_search(storage=storage, target=Fidelity(4.0, 5.0), sizes=(1.0,)).target == Fidelity(4.0, 5.0)
    assert open_search(storage=storage, target=Fidelity(8.0, 9.0), sizes=(1.0,)).target == Fidelity(8.0, 9.0)


def test_a_study_that_no_search_made_is_refused() -> None:
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="search", sampler=RandomSampler(seed=0))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(ValueError, match="not made by a Search"):
        open_search(storage=storage)
    optuna.create_study(storage=storage, study_name="up", direction="maximize")
    with pytest.raises(ValueError, match="minimize"):
        open_search(storage=storage, name="up")


def test_all_storages_give_the_same_search(tmp_path: Path) -> None:
    memory = outline(run(open_search()))
    for storage in (tmp_path / "a.journal", str(tmp_path / "deep" / "b.journal"), f"sqlite:///{tmp_path / 'c.db'}"):
        assert outline(run(open_search(storage=storage))) == memory


def test_a_relative_journal_survives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    search = open_search(storage="study.journal")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert len(run(search)) == 22
    assert not list((tmp_path / "inside").iterdir())


def test_threads_that_share_a_storage_never_run_an_evaluation_twice() -> None:
    storage = InMemoryStorage()
    done: list[Job] = []

    def work(worker: str) -> None:
        search = open_search(storage=storage, worker=worker)
        while not search.finished:
            if (job := search.ask()) is not None:
                search.tell(job, compute_loss(job))
                done.append(job)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(j.config, j.rung) for j in done}) == len(done) == 22


WORKER = """
import sys, time, optuna
from optuna.distributions import FloatDistribution
from hpo.search.search import Search
optuna.logging.set_verbosity(optuna.logging.WARNING)
search = Search({"x": FloatDistribution(0, 1)}, tokens=(1, 27), iterations=1, sampler="random", storage=sys.argv[1])
while not search.finished:
    job = search.ask()
    if job is None:
        time.sleep(0.01)
    else:
        if len(sys.argv) > 2 and job.number >= int(sys.argv[2]):
            import os; os._exit(9)
        search.tell(job, job.params["x"] + 1 / job.fidelity.D)
"""


@pytest.mark.slow
def test_processes_that_share_a_journal_and_one_that_is_killed_run_all_exactly_once(tmp_path: Path) -> None:
    journal = str(tmp_path / "study.journal")
    command = [sys.executable, "-c", WORKER, journal]
    workers = [subprocess.Popen(command), subprocess.Popen(command), subprocess.Popen([*command, "10"])]
    assert sorted(w.wait(timeout=120) for w in workers) in ([0, 0, 9], [0, 0, 0])
    search = Search({"x": FloatDistribution(0, 1)}, tokens=(1, 27), iterations=1, sampler="random", storage=journal)
    assert search.finished
    trials = search.study.trials
    runs = [(t.user_attrs["config"], t.user_attrs["rung"]) for t in trials]
    assert len(set(runs)) == len(runs) == sum(sum(compute_rung_sizes(k, 3, 3)) for k in range(4))
    assert {t.state for t in trials} == {TrialState.COMPLETE}


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"lr": FloatDistribution(0.1, 0.1)}}, "'lr' has a single value"),
        ({"space": {"lr": (1e-4, 1e-1)}}, "'lr' needs an Optuna distribution"),
        ({"tokens": (900, 100)}, "min <= max"),
        ({"tokens": (0, 100)}, "positive"),
        ({"tokens": (-5, 100)}, "positive"),
        ({"tokens": (1.5, 100)}, "whole"),
        ({"tokens": (math.nan, 100)}, "whole"),
        ({"tokens": (100,)}, "smallest run, largest run"),
        ({"eta": 1}, "eta must be an integer of at least 2"),
        ({"eta": 2.5}, "eta must be an integer of at least 2"),
        ({"sizes": ()}, "at least one"),
        ({"sizes": (1e6, 1e6)}, "must differ"),
        ({"sizes": (1e6, -1.0)}, "positive"),
        ({"target": Fidelity(0.0, 1.0)}, "target"),
        ({"scheduler": "hyperband"}, "did you mean incremental-hyperband"),
        ({"variant": "discading"}, "did you mean discarding"),
        ({"sampler": "mfbbo"}, "did you mean mfbo"),
        ({"sampler": 3}, "Optuna sampler"),
        ({"iterations": 0}, "iterations"),
        ({"seed": -1}, "seed"),
        ({"worker": ""}, "worker"),
        ({"storage": "study.txt"}, "journal"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(options: dict[str, Any], message: str) -> None:
    storage = InMemoryStorage()
    with pytest.raises(ValueError, match=message):
        open_search(**({"storage": storage} | options))
    assert storage.get_all_studies() == []


def test_a_search_with_one_rung_is_plain_sampling() -> None:
    with pytest.warns(UserWarning, match="one rung"):
        search = open_search(tokens=(100, 200), iterations=5)
    assert [j.fidelity.D for j in run(search)] == [200] * 5
