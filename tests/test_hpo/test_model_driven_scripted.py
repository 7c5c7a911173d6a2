"""A search without brackets, with a scripted sampler: which runs climb, which are dropped, and what comes first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from hpo.samplers.multi_fidelity import MultiFidelitySampler
from hpo.samplers.unit_cube import Cube
from hpo.search.search import Search
from hpo.search.view import Job
from scaling.laws.compute import Fidelity
from tests.test_hpo.test_model_driven import LR, compute_loss, open_search, run


class Scripted(RandomSampler):
    """Proposes given settings in order. Finds hopeless what it is told to or, with a judge, what the judge does."""

    def __init__(self, *proposals: tuple[float, int], judge: MultiFidelitySampler | None = None) -> None:
        super().__init__(seed=0)
        self.proposals, self.judge = list(proposals), judge
        self.hopeless, self.continues = set[float](), set[bool]()

    def propose(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        slots: Sequence[Fidelity],
        cost: Callable[[Fidelity], float],
        target: Fidelity,
        *,
        continues: bool = False,
        limit: float = math.inf,
    ) -> tuple[dict[str, Any], int]:
        lr, tokens = self.proposals.pop(0)
        self.continues.add(continues)
        assert [cost(slot) for slot in slots] == sorted(cost(slot) for slot in slots)
        return {"lr": lr}, next(i for i, slot in enumerate(slots) if slot.D == tokens)

    def is_hopeless(
        self, study: optuna.Study, space: dict[str, BaseDistribution], params: dict[str, Any], target: Fidelity
    ) -> bool:
        if self.judge is not None:
            return self.judge.is_hopeless(study, space, params, target)
        return params["lr"] in self.hopeless

    def best(self, study: optuna.Study, space: dict[str, BaseDistribution], target: Fidelity) -> dict[str, Any]:
        return {"lr": 0.5}


def run_course(
    search: Search, most: int, loss: Callable[[Job], float] = compute_loss
) -> list[tuple[float, int, int | None]]:
    return [(job.params["lr"], job.rung, job.resume_from) for job in run(search, most, loss)]


def test_a_wanted_rung_is_reached_from_below_before_anything_else_is_asked_for() -> None:
    sampler = Scripted((0.01, 900), (0.02, 100), (0.01, 2700), (0.02, 900))
    assert run_course(open_search(sampler=sampler), 7) == [
        (0.01, 0, None),
        (0.01, 1, 0),
        (0.01, 2, 1),
        (0.02, 0, None),
        # The same configuration, wanted at a higher rung, continues.
        (0.01, 3, 2),
        # Wanted two rungs higher, it climbs one at a time.
        (0.02, 1, 3),
        (0.02, 2, 5),
    ]
    assert sampler.continues == {True}


def test_without_resuming_the_wanted_rung_is_run_from_the_beginning() -> None:
    sampler = Scripted((0.01, 900), (0.01, 2700), (0.02, 100))
    expected = [(0.01, 2, None), (0.01, 3, None), (0.02, 0, None)]
    assert run_course(open_search(sampler=sampler, resumable=False), 3) == expected
    assert sampler.continues == {False}


def test_hopeless_and_diverged_runs_do_not_climb_on() -> None:
    sampler = Scripted((0.01, 2700), (0.06, 2700), (0.02, 300))
    search = open_search(sampler=sampler)
    assert run_course(search, 1) == [(0.01, 0, None)]
    sampler.hopeless.add(0.01)
    assert run_course(search, 3) == [(0.06, 0, None), (0.02, 0, None), (0.02, 1, 2)]
    # Later runs may make it promising again.
    sampler.hopeless.clear()
    assert run_course(search, 1) == [(0.01, 1, 0)]


def test_a_run_that_turns_out_worse_on_the_way_than_it_looked_is_dropped_by_the_model() -> None:
    """At the bottom the optimum is 0.0063. From the second rung on, losses may rise beyond 0.0022."""

    def find_highest_rung(slope: float) -> int:
        def loss(job: Job) -> float:
            x = math.log(job.params["lr"] / 1e-4) / math.log(1e3)
            return 2.0 + 0.3 / (1 + job.rung) + (x - 0.6) ** 2 + slope * max(0.0, x - 0.45) * (job.rung > 0)

        uniform = [0.64, 0.27, 0.04, 0.02, 0.81, 0.91]
        known = [*((1e-4 * 1e3**u, 100) for u in uniform), (1e-4 * 1e3**0.4, 2700)]
        promising = 1e-4 * 1e3**0.75
        judge = MultiFidelitySampler(seed=0)
        search = open_search(sampler=Scripted(*known, (promising, 2700), (1e-4, 100), judge=judge))
        rung = -1
        while (job := run(search, 1, loss)[0]).params["lr"] != 1e-4:
            rung = job.rung if job.params["lr"] == promising else rung
        return rung

    assert find_highest_rung(slope=0.0) == 3
    assert 1 <= find_highest_rung(slope=1.0) < 3


def test_a_diverged_run_is_never_continued_even_when_it_is_wanted() -> None:
    sampler = Scripted((0.06, 100), (0.06, 300), (0.02, 100))
    search = open_search(sampler=sampler)
    assert all(resume is None for _, _, resume in run_course(search, 3))


def test_no_ask_waits_for_a_run_in_progress() -> None:
    sampler = Scripted((0.01, 300), (0.02, 300), (0.01, 2700), (0.03, 100))
    search = open_search(sampler=sampler)
    first, second = search.ask(), search.ask()
    assert first is not None
    assert second is not None
    assert (first.params["lr"], second.params["lr"]) == (0.01, 0.02)
    search.tell(second, 2.0)
    climbing = search.ask()
    assert climbing is not None
    assert (climbing.config, climbing.rung) == (second.config, 1)


def test_after_a_raise_a_goal_stays_what_it_was() -> None:
    sampler = Scripted((0.01, 900), (0.02, 2700), (0.01, 2700))
    search = open_search(sampler=sampler, tokens=(100, 900))
    assert run_course(search, 2) == [(0.01, 0, None), (0.01, 1, 0)]
    search.extend(2700)
    assert run_course(search, 6) == [
        (0.01, 2, 1),
        (0.02, 0, None),
        (0.02, 1, 3),
        (0.02, 2, 4),
        (0.02, 3, 5),
        (0.01, 3, 2),
    ]


def test_what_was_enqueued_is_run_first_at_the_bottom_and_may_be_wanted_higher() -> None:
    sampler = Scripted((0.02, 300), (0.0316, 300))
    search = open_search(sampler=sampler)
    search.study.enqueue_trial({"lr": 0.0316})
    search.study.enqueue_trial({"lr": 0.001})
    expected = [(0.0316, 0, None), (0.001, 0, None), (0.02, 0, None), (0.02, 1, 2), (0.0316, 1, 0)]
    assert run_course(search, 5) == expected


def test_a_trial_enqueued_during_a_climb_is_run_next_and_the_climb_then_continues() -> None:
    search = open_search(sampler=Scripted((0.02, 900)))
    assert run_course(search, 1) == [(0.02, 0, None)]
    search.study.enqueue_trial({"lr": 0.001})
    assert run_course(search, 3) == [(0.001, 0, None), (0.02, 1, 0), (0.02, 2, 2)]


@pytest.mark.parametrize("lr", [0.001, 0.003, 0.01, 0.03])
def test_enqueued_settings_after_rounding_are_the_same_configuration(lr: float) -> None:
    """The model works in the unit cube, and settings that return from there differ in the last digit."""
    back = Cube(LR).to_params(Cube(LR).to_unit({"lr": lr}))["lr"]
    assert back == pytest.approx(lr, rel=1e-12)
    search = open_search(sampler=Scripted((back, 300)))
    search.study.enqueue_trial({"lr": lr})
    assert run_course(search, 2) == [(lr, 0, None), (lr, 1, 0)]


@pytest.mark.parametrize("resumable", [True, False])
def test_a_run_that_failed_from_outside_is_asked_again(resumable: bool) -> None:
    search = open_search(sampler=Scripted((0.01, 300), (0.02, 100)), resumable=resumable)
    lost = search.ask()
    assert lost is not None
    search.study.tell(lost.number, state=TrialState.FAIL)
    again = search.ask()
    assert again is not None
    assert (again.config, again.rung, again.params) == (lost.config, lost.rung, lost.params)
