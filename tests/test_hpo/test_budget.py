"""A search with a budget instead of brackets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution

from hpo import Search
from hpo.study.schema import SearchTable
from scaling.laws.compute import Fidelity

SPACE = {"x": FloatDistribution(0.0, 1.0)}


def open_search(budget: float, **options: Any) -> Search:
    return Search(SPACE, tokens=(100, 900), cost=lambda f: f.D / 900, budget=budget, **options)


def run(search: Search) -> float:
    """Run until there is no job, and return what was paid."""
    paid = 0.0
    while (job := search.ask()) is not None:
        paid += (job.fidelity.D - (job.resume_tokens or 0)) / 900
        search.tell(job, (job.params["x"] - 0.3) ** 2 + 10 / job.fidelity.D)
    return paid


@pytest.mark.parametrize("sampler", ["mfbo", "random"])
@pytest.mark.parametrize("resumable", [True, False])
def test_a_budget_is_spent_and_a_model_does_not_overspend_it(sampler: str, resumable: bool) -> None:
    search = open_search(3.0, sampler=sampler, resumable=resumable)
    assert not search.finished
    paid = run(search)
    assert search.finished
    # Brackets finish the run that was started.
    most = 3.0 if sampler == "mfbo" else 4.0
    assert 3.0 - 1 / 9 < paid <= most + 1e-9


def test_a_larger_budget_continues_where_the_smaller_one_ended(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    first = run(open_search(2.0, storage=storage))
    more = open_search(4.0, storage=storage)
    assert not more.finished
    assert 4.0 - 1 / 9 < first + run(more) <= 4.0 + 1e-9
    assert open_search(3.0, storage=storage).finished
    at_once = open_search(4.0)
    assert run(at_once) == pytest.approx(4.0, abs=1 / 9)


def test_the_plan_is_the_worth_of_the_budget_in_whole_runs() -> None:
    search = open_search(2.5, sizes=(1e3, 4e3))
    plan = search.plan()
    assert not plan.counted
    assert plan.increments == [Fidelity(4e3, 900), Fidelity(4e3, 900), Fidelity(4e3, 450)]
    assert search.progress.planned is None
    assert search.progress.tokens_planned == 2250


def test_a_budget_that_cannot_pay_one_run_is_finished_at_once() -> None:
    search = open_search(0.1)
    assert search.ask() is None
    assert search.finished


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_is_positive_and_finite(budget: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        open_search(budget)


def test_a_budget_and_iterations_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="in place of iterations"):
        open_search(1.0, iterations=1)
    tokens = {"min": 100, "max": 900}
    with pytest.raises(ValueError, match="got both: remove one"):
        SearchTable.model_validate({"tokens": tokens, "budget": 4, "iterations": 2})
    assert SearchTable.model_validate({"tokens": tokens}).iterations == 1
    table = SearchTable.model_validate({"tokens": tokens, "budget": 4})
    assert table.iterations is None
    assert SearchTable.model_validate_json(table.model_dump_json()) == table


def test_a_model_climbs_to_the_rung_it_wanted_and_pays_only_the_way() -> None:
    search = open_search(6.0, resumable=True)
    run(search)
    trials = search.study.trials
    climbed = [t for t in trials if t.user_attrs["rung"] > 0]
    assert climbed
    for trial in climbed:
        before = trials[trial.user_attrs["continues"]]
        assert before.params == trial.params
        assert before.user_attrs["rung"] == trial.user_attrs["rung"] - 1
        assert trial.user_attrs["resumed_tokens"] == before.user_attrs["tokens"]
        assert trial.user_attrs["goal"] >= trial.user_attrs["rung"]
