"""A budget instead of brackets."""

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


def search(budget: float, **options: Any) -> Search:
    return Search(SPACE, tokens=(100, 900), cost=lambda f: f.D / 900, budget=budget, **options)


def run(it: Search) -> float:
    """Run until nothing is given; what was paid."""
    paid = 0.0
    while (job := it.ask()) is not None:
        paid += (job.fidelity.D - (job.resume_tokens or 0)) / 900
        it.tell(job, (job.params["x"] - 0.3) ** 2 + 10 / job.fidelity.D)
    return paid


@pytest.mark.parametrize("sampler", ["mfbo", "random"])
@pytest.mark.parametrize("resumable", [True, False])
def test_a_budget_is_spent_and_a_model_does_not_overspend_it(sampler: str, resumable: bool) -> None:
    it = search(3.0, sampler=sampler, resumable=resumable)
    assert not it.finished
    paid = run(it)
    assert it.finished
    most = 3.0 if sampler == "mfbo" else 4.0  # brackets are played to the end of the run that was begun
    assert 3.0 - 1 / 9 < paid <= most + 1e-9


def test_a_larger_budget_goes_on_where_the_smaller_ended(tmp_path: Path) -> None:
    storage = tmp_path / "s.journal"
    first = run(search(2.0, storage=storage))
    more = search(4.0, storage=storage)
    assert not more.finished
    assert 4.0 - 1 / 9 < first + run(more) <= 4.0 + 1e-9
    assert search(3.0, storage=storage).finished
    whole = search(4.0)
    assert run(whole) == pytest.approx(4.0, abs=1 / 9)


def test_the_plan_is_the_worth_of_the_budget_in_whole_runs() -> None:
    it = search(2.5, sizes=(1e3, 4e3))
    plan = it.plan()
    assert not plan.counted
    assert plan.increments == [Fidelity(4e3, 900), Fidelity(4e3, 900), Fidelity(4e3, 450)]
    assert it.progress.planned is None
    assert it.progress.tokens_planned == 2250


def test_a_budget_that_cannot_pay_one_run_is_finished_at_once() -> None:
    it = search(0.1)
    assert it.ask() is None
    assert it.finished


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_is_positive_and_finite(budget: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        search(budget)


def test_a_budget_and_iterations_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="in place of iterations"):
        search(1.0, iterations=1)
    tokens = {"min": 100, "max": 900}
    with pytest.raises(ValueError, match="got both: remove one"):
        SearchTable.model_validate({"tokens": tokens, "budget": 4, "iterations": 2})
    assert SearchTable.model_validate({"tokens": tokens}).iterations == 1
    table = SearchTable.model_validate({"tokens": tokens, "budget": 4})
    assert table.iterations is None
    assert SearchTable.model_validate_json(table.model_dump_json()) == table


def test_a_model_climbs_to_the_rung_it_wanted_and_pays_only_the_way() -> None:
    it = search(6.0, resumable=True)
    run(it)
    trials = it.study.trials
    climbed = [t for t in trials if t.user_attrs["rung"] > 0]
    assert climbed
    for trial in climbed:
        before = trials[trial.user_attrs["continues"]]
        assert before.params == trial.params
        assert before.user_attrs["rung"] == trial.user_attrs["rung"] - 1
        assert trial.user_attrs["resumed_tokens"] == before.user_attrs["tokens"]
        assert trial.user_attrs["goal"] >= trial.user_attrs["rung"]
