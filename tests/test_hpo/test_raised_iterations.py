"""A search with iterations is given more of them: the outcome is that of a search which had them from the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, FloatDistribution

from hpo.search.search import Search
from hpo.search.view import Job
from hpo.study.lifecycle import SettingChange, _is_allowed

LR: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-4, 1e-1, log=True)}


def open_search(**options: Any) -> Search:
    defaults: dict[str, Any] = {"space": LR, "tokens": (100, 900), "sampler": "random", "iterations": 1}
    return Search(**(defaults | options))


def run(search: Search) -> list[tuple[Any, ...]]:
    jobs = []
    while (job := search.ask()) is not None:
        search.tell(job, compute_loss(job))
        jobs.append((job.number, job.config, job.rung, job.resume_from, job.bracket, tuple(job.params.items())))
    return jobs


def compute_loss(job: Job) -> float:
    return float(abs(job.params["lr"] - 0.01) + 3 / job.fidelity.D**0.3)


@pytest.mark.parametrize("sampler", ["random", "tpe", "mfbo"])
def test_a_raised_search_is_the_one_that_had_its_iterations_from_the_start(sampler: str) -> None:
    at_once, raised = open_search(sampler=sampler, iterations=2), open_search(sampler=sampler)
    first = run(raised)
    assert raised.finished
    assert raised.plan(iterations=2).configurations > 0
    raised.extend(iterations=2)
    assert not raised.finished
    assert raised.current_iterations == 2
    assert [*first, *run(raised)] == run(at_once)
    assert raised.finished
    assert raised.progress == at_once.progress


def test_a_study_that_is_opened_with_more_iterations_goes_on(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    first = run(open_search(storage=storage))
    more = open_search(storage=storage, iterations=2)
    assert not more.finished
    # Nothing is stored before something is run.
    assert open_search(storage=storage).finished
    assert [*first, *run(more)] == run(open_search(iterations=2))
    # The study may then be opened with the first number or the present one.
    assert open_search(storage=storage).current_iterations == 2
    assert open_search(storage=storage, iterations=2).finished
    assert not open_search(storage=storage, iterations=3).finished


def test_iterations_are_never_lowered(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    open_search(storage=storage, iterations=2).extend(iterations=4)
    with pytest.raises(ValueError, match="iterations: the study has 2 raised to 4, got 3; they can only be raised"):
        open_search(storage=storage, iterations=3)
    with pytest.raises(ValueError, match="iterations: the study has 2 raised to 4, got 1"):
        open_search(storage=storage, iterations=1)
    with pytest.raises(ValueError, match="iterations: the study has 2 raised to 4, got None"):
        open_search(storage=storage, iterations=None)
    with pytest.raises(ValueError, match="iterations can only be raised, got 3: the study has 4"):
        open_search(storage=storage, iterations=2).extend(iterations=3)
    endless = open_search(iterations=None)
    with pytest.raises(ValueError, match="iterations can only be raised, got 2: the study has no iterations"):
        endless.extend(iterations=2)


def test_the_longest_run_and_the_iterations_can_be_raised_together() -> None:
    search = open_search()
    run(search)
    search.extend(2700, iterations=2)
    assert (search.ladder.levels[-1], search.current_iterations) == (2700, 2)
    run(search)
    assert {t.user_attrs["bracket"][0] for t in search.study.trials} == {0, 1}
    assert max(t.user_attrs["tokens"] for t in search.study.trials) == 2700


@pytest.mark.parametrize(
    ("name", "old", "new", "allowed"),
    [
        ("search.iterations", 1, 2, True),
        ("search.iterations", 2, 1, False),
        ("search.iterations", 1, None, False),
        ("search.budget", 3.0, 2.0, True),
        ("search.budget", None, 2.0, False),
        ("search.eta", 3, 4, False),
    ],
)
def test_a_study_file_may_raise_its_iterations(name: str, old: Any, new: Any, allowed: bool) -> None:
    assert _is_allowed(SettingChange(name, old, new)) is allowed
