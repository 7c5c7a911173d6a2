"""No run is made twice: not the same settings at a size and rung, and none beside a checkpoint that it can continue."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from hpo.search.distinct import SettingsGrid
from hpo.search.hyperband import Bracket, Entry, FreeSlots, Promote, Room, count_remaining, list_moves
from hpo.search.ladder import Ladder
from hpo.search.search import Search
from hpo.search.view import Job

pytestmark = pytest.mark.filterwarnings("ignore")
optuna.logging.set_verbosity(optuna.logging.WARNING)

# Six settings.
SMALL: dict[str, BaseDistribution] = {
    "kind": CategoricalDistribution(["a", "b", "c"]),
    "depth": IntDistribution(0, 1),
}


def open_search(**options: Any) -> Search:
    defaults: dict[str, Any] = {"space": SMALL, "tokens": (100, 900), "sampler": "random"}
    return Search(**(defaults | options))


def compute_loss(job: Job) -> float:
    kind = {"a": 0.0, "b": 0.2, "c": 0.1}[str(job.params["kind"])]
    return kind + 0.03 * float(job.params["depth"]) + float(3 / job.fidelity.D**0.3)


def identify(job: Job) -> tuple[Any, ...]:
    return (tuple(job.params.items()), job.fidelity)


def run(search: Search, most: int = 100, loss: Callable[[Job], float] = compute_loss) -> list[Job]:
    """Run until there is no job, and check that no run was made twice and all checkpoints were used."""
    jobs = list[Job]()
    reached: dict[tuple[Any, ...], list[int]] = {}
    while len(jobs) < most and (job := search.ask()) is not None:
        settings = (*job.params.values(), job.fidelity.N)
        shorter = [d for d in reached.get(settings, []) if d < job.fidelity.D]
        if search.resumable:
            assert (job.resume_tokens or 0) == max(shorter, default=0)
        reached.setdefault(settings, []).append(int(job.fidelity.D))
        search.tell(job, loss(job))
        jobs.append(job)
    assert max(Counter(map(identify, jobs)).values()) == 1
    return jobs


@pytest.mark.parametrize("sampler", ["mfbo", "random", "tpe", "qmc"])
def test_a_search_without_end_makes_every_run_of_a_small_space_once_and_ends(sampler: str) -> None:
    search = open_search(sampler=sampler)
    # Six settings at three rungs.
    assert len(run(search)) == 18
    assert search.finished
    assert search.ask() is None
    progress = search.progress
    assert (progress.done, progress.configurations) == (18, 6)
    # Each setting is trained once for 900 tokens, whatever it went through.
    assert progress.tokens_spent == 6 * 900


@pytest.mark.parametrize("sampler", ["mfbo", "random"])
def test_without_checkpoints_each_run_is_made_once_too(sampler: str) -> None:
    search = open_search(sampler=sampler, resumable=False)
    assert len(run(search)) == 18
    assert search.progress.tokens_spent == 6 * (100 + 300 + 900)


def test_several_sizes_are_exhausted_each() -> None:
    assert len(run(open_search(sizes=(1e3, 4e3)))) == 36


def test_a_second_iteration_of_hyperband_takes_the_settings_that_are_left() -> None:
    # One Hyperband would have 9 + 3 + 1, 5 + 1 and 3 runs. The space has 6 settings at each rung.
    once, twice = open_search(iterations=1), open_search(iterations=3)
    jobs = run(once)
    assert Counter(job.rung for job in jobs)[0] == 6
    assert once.finished
    assert once.progress.planned == once.progress.done == len(jobs)
    assert len(run(twice)) == 18
    assert twice.finished


def test_what_is_planned_is_at_most_what_the_space_allows() -> None:
    search = open_search(iterations=1)
    planned = search.progress.planned
    done = len(run(search))
    assert planned is not None
    assert done <= planned <= 18


def test_a_raise_of_an_exhausted_search_continues_every_setting_from_its_checkpoint() -> None:
    search = open_search()
    run(search)
    search.extend(2700)
    jobs = list[Job]()
    while (job := search.ask()) is not None:
        search.tell(job, compute_loss(job))
        jobs.append(job)
    assert [(job.fidelity.D, job.resume_tokens) for job in jobs] == [(2700, 900)] * 6


def test_the_end_is_explained_with_the_runs_and_what_is_left_of_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    search = open_search(budget=12 * 900.0, cost=lambda f: f.D)
    assert search.explain_end() is None
    with caplog.at_level(logging.WARNING):
        run(search)
        assert search.ask() is None
    expected = "its 6 settings allowed 18 runs, none twice; 50% of the budget is left"
    assert [record.message for record in caplog.records] == [f"the search space is exhausted: {expected}"]
    assert search.explain_end() == caplog.records[0].message


def test_a_budget_that_ends_first_needs_no_explanation() -> None:
    search = open_search(budget=3 * 900.0, cost=lambda f: f.D)
    run(search)
    assert search.finished
    assert search.explain_end() is None


def test_a_rest_of_the_budget_that_pays_no_other_run_is_explained() -> None:
    # The third step of a setting costs 600 tokens. When the others have been made, less than that is left.
    budget = 6 * 300.0 + 2 * 600.0 + 500.0
    search = open_search(budget=budget, cost=lambda f: f.D, sampler="mfbo")
    jobs = run(search)
    assert search.finished
    paid = sum(job.fidelity.D - (job.resume_tokens or 0) for job in jobs)
    # How much is left depends on the order of the runs, in which processors differ.
    left = budget - paid
    highest = Counter(tuple(job.params.values()) for job in jobs)
    assert 100 <= left < min({1: 200, 2: 600}.get(count, 10**6) for count in highest.values())
    expected = f"its 6 settings allowed {len(jobs)} runs, none twice, and any other costs more than the"
    assert search.explain_end() == (
        f"no run that is left can be paid: {expected} {left / budget:.0%} of the budget that is left"
    )


def test_a_new_configuration_equal_to_a_known_one_continues_its_checkpoint() -> None:
    """The brackets that start higher take settings of the bracket below where no others are left."""
    search = open_search(iterations=3)
    jobs = run(search)
    brackets: dict[int, set[Bracket]] = {}
    for job in jobs:
        brackets.setdefault(job.config, set()).add(job.bracket)
    assert len(brackets) == 6
    continued = [job for job in jobs if job.rung == job.bracket.start > 0 and job.resume_tokens]
    assert continued
    for job in continued:
        assert job.resume_from is not None
        assert search.study.trials[job.resume_from].params == job.params


def test_enqueued_settings_that_were_run_are_not_run_again(caplog: pytest.LogCaptureFixture) -> None:
    search = open_search()
    first = search.ask()
    assert first is not None
    search.tell(first, compute_loss(first))
    search.study.enqueue_trial(first.params)
    with caplog.at_level(logging.WARNING):
        run(search, most=3)
    closed = search.study.trials[1]
    assert (closed.state, closed.user_attrs["repeats"]) == (TrialState.FAIL, first.config)
    assert f"the enqueued trial 1 is not run: its settings are those of {first.config}" in caplog.text
    assert search.progress.done == 4


def test_settings_of_which_a_user_fixes_a_part_are_not_run_twice_either() -> None:
    search = open_search()
    for _ in range(12):
        search.study.enqueue_trial({"kind": "b"})
    jobs = run(search)
    assert len(jobs) == 18


def test_a_search_that_is_opened_again_at_every_step_makes_the_same_runs(tmp_path: Path) -> None:
    at_once = run(open_search(iterations=2))
    jobs = list[Job]()
    while (job := open_search(iterations=2, storage=tmp_path / "s.journal", worker="one").ask()) is not None:
        open_search(iterations=2, storage=tmp_path / "s.journal", worker="one").tell(job, compute_loss(job))
        jobs.append(job)
    assert [(*identify(j), j.config, j.resume_from) for j in jobs] == [
        (*identify(j), j.config, j.resume_from) for j in at_once
    ]


def test_jobs_that_are_asked_at_the_same_time_wait_for_a_shorter_run_rather_than_start_beside_it() -> None:
    space: dict[str, BaseDistribution] = {"kind": CategoricalDistribution(["a", "b"]), "depth": IntDistribution(0, 1)}
    search = open_search(space=space, tokens=(100, 300), iterations=4)
    running, done = list[Job](), list[Job]()
    while not search.finished:
        while (job := search.ask()) is not None:
            running.append(job)
        finished = running.pop(0)
        search.tell(finished, compute_loss(finished))
        done.append(finished)
    assert max(Counter(map(identify, done)).values()) == 1
    assert len(done) == 8
    for job in done:
        shorter = [j for j in done if j.number < job.number and j.params == job.params and j.rung < job.rung]
        assert job.resume_tokens == (100 if shorter else None)


def test_a_continuous_space_is_never_exhausted_and_its_settings_are_told_apart() -> None:
    grid = SettingsGrid({"x": FloatDistribution(0.0, 1.0), "n": IntDistribution(1, 3)})
    assert grid.count == float("inf")
    assert grid.identify({"x": 0.1 + 0.2, "n": 2}) == grid.identify({"x": 0.3, "n": 2})
    assert grid.identify({"x": 0.3, "n": 2}) != grid.identify({"x": 0.3001, "n": 2})
    search = open_search(space={"x": FloatDistribution(0.0, 1.0)}, sampler="random")
    jobs = [search.ask() for _ in range(30)]
    assert None not in jobs
    assert search.explain_end() is None


def test_settings_are_counted_and_listed() -> None:
    grid = SettingsGrid(
        {
            "kind": CategoricalDistribution(["a", None, True]),
            "batch": IntDistribution(1, 64, log=True),
            "depth": IntDistribution(2, 10, step=4),
            "drop": FloatDistribution(0.0, 0.3, step=0.1),
        }
    )
    assert grid.count == 3 * 64 * 3 * 4
    listed = [grid.make_params(cells) for cells in grid.iterate()]
    assert len({grid.identify(params) for params in listed}) == len(listed) == grid.count
    assert listed[0] == {"kind": "a", "batch": 1, "depth": 2, "drop": 0.0}
    assert listed[-1] == {"kind": True, "batch": 64, "depth": 10, "drop": pytest.approx(0.3)}
    # Settings that a user enqueued between the steps are others.
    assert not grid.is_listed(grid.identify({"kind": "a", "batch": 1, "depth": 3, "drop": 0.0}))


def test_a_space_of_many_settings_is_sampled_for_one_that_has_not_been_run() -> None:
    space: dict[str, BaseDistribution] = {"n": IntDistribution(1, 100_000), "m": IntDistribution(1, 100_000)}

    class Stubborn(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> int:
            return 7

    search = open_search(space=space, sampler=Stubborn(), tokens=(100, 100))
    jobs = run(search, most=10, loss=lambda job: 2.0)
    assert len(jobs) == 10
    assert jobs[0].params == {"n": 7, "m": 7}
    # What is nearest to the settings that the sampler wants is run in their place.
    assert all(abs(job.params["n"] - 7) + abs(job.params["m"] - 7) <= 2000 for job in jobs[1:5])


# The brackets


def test_a_bracket_without_room_is_complete_with_what_it_has() -> None:
    ladder, bracket = Ladder((1, 3, 9), 3), Bracket(0, 0, 0)
    entries = [Entry(n, bracket, {0: float(n)}) for n in range(4)]
    # Nine places, of which the bracket waits for five more configurations unless there are none.
    assert list_moves(entries, ladder, iterations=1)[0] == FreeSlots(bracket, 5)
    no_room = list_moves(entries, ladder, iterations=1, room=lambda size, rung: Room(0, 0))
    assert no_room == [Promote(0, 1), Promote(1, 1), Promote(2, 1)]
    waiting = list_moves(entries, ladder, iterations=1, room=lambda size, rung: Room(0, 1))
    assert waiting == []
    two = list_moves(entries, ladder, iterations=1, room=lambda size, rung: Room(2, 0))
    assert two[0] == FreeSlots(bracket, 2)


def test_a_search_without_end_has_no_moves_without_room() -> None:
    assert list_moves([], Ladder((1, 3), 3), iterations=None, room=lambda size, rung: Room(0, 0)) == []


def test_what_remains_is_limited_by_the_room_at_each_rung() -> None:
    ladder = Ladder((1, 3, 9), 3)
    remaining = count_remaining([], ladder, iterations=2, room=lambda size, rung: Room(4, 0))
    by_rung = Counter[int]()
    for _, rung, missing in remaining:
        by_rung[rung] += missing
    assert max(by_rung.values()) <= 4
    assert by_rung[0] == 4
