"""`hpo.plan`: the design against its formula done another way, what it spends, and the search that runs it."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

import hpo
from hpo.planning import design as design_module
from hpo.planning.design import Design, DesignError, Group, choose_design, compute_variances, expected_regret
from hpo.planning.law_search import LawInputs, find_law_inputs
from hpo.search.ladder import Ladder
from hpo.search.search import Search
from hpo.search.view import Job

N, D, SEQ = 1e9, 5e10, 2048
SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(2e-4, 3e-2, log=True),
    "batch_seqs": IntDistribution(4, 1024, log=True),
}


def make_plan(share: float = 0.01, **options: Any) -> hpo.Plan:
    return hpo.plan(N, D, flops=share * 6 * N * D, seq_len=SEQ, **{"space": SPACE, **options})


class PlantedLaw:
    """Losses of a planted law with a bowl about its optimum, which is flatter to the left of the learning rate."""

    def __init__(self, noise: float = 0.0) -> None:
        self.rng, self.noise = np.random.default_rng(0), noise

    def find_optimum(self, size: float, tokens: float) -> tuple[float, float]:
        lr = 1.8e-3 * (size / 1e8) ** -0.55 * (tokens / 1e10) ** 0.15
        return lr, 2.5e5 * (tokens / 1e10) ** 0.5

    def find_least(self, size: float, tokens: float) -> float:
        return float(1.7 + 400 * size**-0.33 + 1100 * tokens**-0.37)

    def __call__(self, size: float, tokens: float, lr: float, batch: float) -> float:
        best_lr, best_batch = self.find_optimum(size, tokens)
        u, v = math.log(lr / best_lr), math.log(batch / best_batch)
        height = 0.018 * (math.exp(min(u, 4.0)) - u - 1) + 0.008 * v * v
        return self.find_least(size, tokens) * math.exp(height + self.noise * self.rng.normal())


def run_plan(search: Search, run: Callable[[Job], float], limit: int = 1000) -> list[Job]:
    jobs = []
    while (job := search.ask()) is not None and len(jobs) < limit:
        jobs.append(job)
        search.tell(job, run(job))
    return jobs


def train(law: PlantedLaw, job: Job) -> float:
    return law(job.fidelity.N, job.fidelity.D, job.params["lr"], SEQ * job.params["batch_seqs"])


# The design


@pytest.mark.parametrize("mup", [False, True])
def test_variances_are_those_of_a_regression_with_every_shift_as_a_coefficient(mup: bool) -> None:
    """The same by information instead of covariance, with the groups' shifts among the unknowns."""
    groups = (Group(1e7, 10**8, 9), Group(2e7, 5 * 10**8, 1), Group(4e7, 3 * 10**8, 5), Group(8e7, 10**9, 6))
    design = Design(groups, 4, 3)
    got = compute_variances(design, N, D, mup=mup)
    measured = [g for g in groups if g.runs >= 3]
    for i, sds in enumerate(design_module.PRIOR_SDS_MUP if mup else design_module.PRIOR_SDS):
        h, radius = design_module.CURVATURES[i], design_module.RING_RADIUS
        k = len(measured)
        prior = np.diag([s**-2 for s in (*sds, *[design_module.BEND_SD] * 3, *[design_module.SHIFT_SD] * (k + 1))])
        information = prior.copy()
        for j, g in enumerate(measured):
            n, d = math.log(g.N / N), math.log(g.tokens / D)
            row = np.r_[1, n, d, n * n, n * d, d * d, np.zeros(k + 1)]
            row[6 + j] = 1
            noise = math.hypot(design_module.RUN_NOISE, design_module.SHAPE_NOISE * h * radius**2)
            variance = noise**2 / (max(g.runs - 3, 0.2) * (2 * h * radius) ** 2 / 2)
            information += np.outer(row, row) / variance
        at_target = np.zeros(6 + k + 1)
        at_target[[0, -1]] = 1
        assert got[i] == pytest.approx(at_target @ np.linalg.solve(information, at_target), rel=1e-6)


@pytest.mark.parametrize("share", [0.002, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("target", [(1e9, 5e10), (4e8, 5e10), (7e9, 1.4e12)])
def test_a_design_spends_its_budget_on_a_ladder_of_sizes_and_lengths(share: float, target: tuple[float, float]) -> None:
    size, tokens = target
    flops = share * 6 * size * tokens
    design = choose_design(size, tokens, flops)
    assert 0.97 * flops < design.flops <= flops * (1 + 1e-9)
    costs = [group.N * group.tokens for group in design.groups]
    assert costs == sorted(costs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = Ladder.make(*design.tokens, design.eta).levels
    assert {group.tokens for group in design.groups} <= set(levels)
    assert min(design.sizes) >= design_module.LEAST_N
    # N and D move together along most groups, and apart in two.
    assert sum(group.runs == design_module.PAIR_RUNS for group in design.groups) == 2
    assert design.groups[-1].N == max(design.sizes)
    assert design.groups[-1].tokens == design.tokens[1]


def test_more_compute_is_expected_to_bring_less_regret() -> None:
    regrets = [
        expected_regret(choose_design(N, D, share * 6 * N * D), N, D) for share in (0.002, 0.005, 0.01, 0.03, 0.1)
    ]
    assert regrets == sorted(regrets, reverse=True)


def test_sizes_are_those_that_can_be_trained() -> None:
    sizes = [2.2e6, 5e6, 9e6, 2.1e7, 4.4e7, 9e7]
    design = choose_design(N, D, 0.01 * 6 * N * D, sizes=sizes)
    assert set(design.sizes) <= set(sizes)
    assert len(design.sizes) >= 3


def test_no_two_groups_are_of_one_size_and_length() -> None:
    """One size may be the nearest to two that are wanted. Counted twice, its runs would fill both groups."""
    middle = 3e7 / math.sqrt(3)
    limits = design_module._Limits(N, D, [middle, 4e8], 2e6, 1.0)
    assert design_module._choose_sizes(3e7, 3, 1, limits) is None
    assert design_module._choose_sizes(3e7, 3, 1, replace(limits, sizes=[1e7, middle, 3e7])) == [3e7, 1e7]


def test_a_budget_that_is_too_small_is_refused_with_one_that_is_enough() -> None:
    with pytest.raises(DesignError, match=r"does not pay for runs of different sizes.*are needed") as refusal:
        choose_design(N, D, 1e-6 * 6 * N * D)
    enough = float(str(refusal.value).split("about ")[1].split(" FLOPs")[0])
    assert choose_design(N, D, 1.05 * enough).runs > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [3e7]}, "two sizes or more"),
        ({"sizes": [3e9, 4e9]}, "two sizes or more"),
        ({"least_N": 9e8}, "lie below the target|are needed"),
    ],
)
def test_limits_that_leave_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DesignError, match=message):
        choose_design(N, D, 0.01 * 6 * N * D, **options)


# What the law is about


def test_all_mistakes_in_a_space_are_reported() -> None:
    space: dict[str, BaseDistribution] = {
        "rate": FloatDistribution(0, 1),
        "batch_size": CategoricalDistribution([1, 2]),
        "beta": FloatDistribution(0.8, 0.99),
    }
    with pytest.raises(ValueError, match="learning rate") as error:
        find_law_inputs(space, None, mup=False)
    for part in ("learning rate", "no law of rate, beta", "batch_size needs a range", "seq_len"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="batch_tokens"):
        find_law_inputs({"lr": SPACE["lr"]}, None, mup=False)
    with pytest.raises(ValueError, match="lr needs a range above 0"):
        find_law_inputs({"lr": FloatDistribution(0, 1), "batch_seqs": SPACE["batch_seqs"]}, 8, mup=False)


def test_names_and_units_of_the_batch() -> None:
    assert find_law_inputs(SPACE, SEQ, mup=True) == LawInputs("lr", "batch_seqs", SEQ, True)
    space = {"learning_rate": SPACE["lr"], "batch_tokens": IntDistribution(1024, 10**6, log=True)}
    assert find_law_inputs(space, None, mup=False) == LawInputs("learning_rate", "batch_tokens", 1.0)
    assert find_law_inputs({"lr": SPACE["lr"]}, None, mup=False, batch_tokens=4096) == LawInputs("lr", None, 4096.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 2.0}, ["search at the target itself"]),
        ({"share": math.nan, "parametrization": "other"}, ["flops must be positive", "'standard' or 'mup'"]),
    ],
)
def test_bad_requests_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as error:
        make_plan(**options)
    assert all(word in str(error.value) for word in words)


# The search


def test_a_plan_is_run_to_its_end_and_no_further() -> None:
    plan, law = make_plan(), PlantedLaw()
    search = plan.search()
    jobs = run_plan(search, lambda job: train(law, job))
    made = Counter((job.fidelity.N, int(job.fidelity.D)) for job in jobs)
    assert made == {(group.N, group.tokens): group.runs for group in plan.groups}
    assert sum(6 * job.fidelity.N * job.fidelity.D for job in jobs) == pytest.approx(plan.flops)
    assert search.finished
    assert search.ask() is None
    assert search.progress.done == search.progress.planned == plan.design.runs
    assert all(job.resume_from is None for job in jobs)


def test_runs_lie_on_a_ring_about_one_run_near_the_optimum() -> None:
    plan, law = make_plan(), PlantedLaw()
    jobs = run_plan(plan.search(), lambda job: train(law, job))
    top = plan.groups[-1]
    best = np.log(law.find_optimum(top.N, top.tokens))
    *ring, middle = np.log([[job.params["lr"], SEQ * job.params["batch_seqs"]] for job in jobs[-top.runs :]])
    assert np.abs(middle - best).max() < 0.5
    distances = np.hypot(*(np.array(ring) - middle).T)
    # The batch is a whole number of sequences.
    assert distances.min() > 0.78
    assert distances.max() < 1.65
    # They stand all around it.
    angles = np.sort(np.arctan2(*(np.array(ring) - middle).T))
    assert np.diff(np.r_[angles, angles[0] + 2 * math.pi]).max() < 2.2


@pytest.mark.parametrize("parametrization", ["standard", "mup"])
def test_the_answer_is_close_to_a_planted_optimum(parametrization: Any) -> None:
    """Random settings in this space lie 1.4 and 1.6 away on average, in ln lr and ln B."""
    plan, law = make_plan(parametrization=parametrization), PlantedLaw(noise=0.001)
    base = 1e8

    def train_scaled(job: Job) -> float:
        # Under muP the searched rate is that of the base size.
        scale = (job.fidelity.N / base) ** -0.55 if parametrization == "mup" else 1.0
        lr = job.params["lr"] * scale
        return law(job.fidelity.N, job.fidelity.D, lr, SEQ * job.params["batch_seqs"])

    search = plan.search()
    run_plan(search, train_scaled)
    best = search.best()
    lr, batch = law.find_optimum(N, D)
    lr = lr / (N / base) ** -0.55 if parametrization == "mup" else lr
    assert abs(math.log(best["lr"] / lr)) < 0.45
    assert abs(math.log(SEQ * best["batch_seqs"] / batch)) < 0.45
    # The last runs are near the optimum of their group, as the law foresaw it.
    top = plan.groups[-1]
    finished = [t for t in search.study.trials if t.user_attrs["N"] == top.N and t.user_attrs["tokens"] == top.tokens]
    lowest = min(t.value for t in finished if t.value is not None)
    assert lowest < law.find_least(top.N, top.tokens) * 1.01


def test_a_killed_search_continues_with_the_same_runs(tmp_path: Path) -> None:
    law = PlantedLaw()
    whole = run_plan(make_plan().search(), lambda job: train(law, job))
    journal = tmp_path / "study.journal"
    first = make_plan().search(storage=journal, worker="one")
    done = run_plan(first, lambda job: train(law, job), limit=13)
    # It was killed with a job that it had asked for.
    del first
    rest = run_plan(make_plan().search(storage=journal, worker="one"), lambda job: train(law, job))
    assert [(j.params, j.fidelity) for j in done + rest] == [(j.params, j.fidelity) for j in whole]


def test_parallel_workers_run_the_plan_once() -> None:
    plan, law = make_plan(), PlantedLaw()
    search = plan.search()
    running: list[Job] = []
    made: Counter[tuple[float, int]] = Counter()
    rng = np.random.default_rng(1)
    while True:
        while len(running) < 7 and (job := search.ask()) is not None:
            running.append(job)
            made[job.fidelity.N, int(job.fidelity.D)] += 1
        if not running:
            break
        job = running.pop(int(rng.integers(len(running))))
        search.tell(job, train(law, job))
    assert made == {(group.N, group.tokens): group.runs for group in plan.groups}
    lr, _ = law.find_optimum(N, D)
    assert abs(math.log(search.best()["lr"] / lr)) < 0.6


def test_runs_stay_below_learning_rates_that_diverged() -> None:
    plan, law = make_plan(), PlantedLaw()
    limit = 6e-3

    def train_or_diverge(job: Job) -> float:
        return math.nan if job.params["lr"] > limit else train(law, job)

    search = plan.search()
    jobs = run_plan(search, train_or_diverge)
    spread = jobs[: plan.design.spread]
    assert any(job.params["lr"] > limit for job in spread)
    later = [job.params["lr"] for job in jobs[plan.design.spread :]]
    assert np.mean([lr > limit for lr in later]) < 0.2
    assert search.finished
    assert search.best()["lr"] < limit


def test_a_study_in_which_everything_diverges_ends() -> None:
    search = make_plan().search()
    jobs = run_plan(search, lambda _: math.nan)
    assert len(jobs) == make_plan().design.runs
    with pytest.raises(ValueError, match="no run has finished with a finite loss"):
        search.best()


def test_a_fixed_batch_is_planned_without_a_law_of_it() -> None:
    plan = hpo.plan(N, D, flops=0.01 * 6 * N * D, space={"lr": SPACE["lr"]}, batch_tokens=SEQ * 128)
    assert plan.expected.batch_factor is None
    law, search = PlantedLaw(), plan.search()
    jobs = run_plan(search, lambda job: law(job.fidelity.N, job.fidelity.D, job.params["lr"], SEQ * 128))
    assert len(jobs) == plan.design.runs
    lr, _ = law.find_optimum(N, D)
    assert abs(math.log(search.best()["lr"] / lr)) < 0.5


def test_a_grid_with_too_few_settings_ends_with_a_reason() -> None:
    space: dict[str, BaseDistribution] = {
        "lr": FloatDistribution(1e-3, 3e-3, step=1e-3),
        "batch_seqs": IntDistribution(64, 128, step=64),
    }
    plan, law = hpo.plan(N, D, flops=0.01 * 6 * N * D, space=space, seq_len=SEQ), PlantedLaw()
    search = plan.search()
    jobs = run_plan(search, lambda job: train(law, job))
    keys = [(job.fidelity, *job.params.values()) for job in jobs]
    assert len(set(keys)) == len(keys) < plan.design.runs
    assert search.finished
    assert "fewer than its plan has" in str(search.explain_end())


def test_a_study_is_opened_again_only_with_its_plan(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    make_plan().search(storage=journal)
    make_plan().search(storage=journal)
    with pytest.raises(ValueError, match="exists with other settings"):
        make_plan(share=0.02).search(storage=journal)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "law"}, "needs a plan"),
        ({"plan": "plan"}, 'needs scheduler="law"'),
        ({"scheduler": "law", "plan": "plan", "iterations": 1}, "leave out iterations"),
        ({"scheduler": "law", "plan": "plan", "asynchronous": True}, "promotes nothing"),
        ({"scheduler": "law", "plan": "plan"}, "at no size and rung"),
    ],
)
def test_settings_beside_a_plan_are_refused(options: dict[str, Any], message: str) -> None:
    if "plan" in options:
        options = options | {"plan": make_plan().law}
    with pytest.raises(ValueError, match=message):
        Search(SPACE, tokens=(1000, 9000), **options)


def test_a_plan_cannot_be_raised() -> None:
    search = make_plan().search()
    levels = search.ladder.levels
    for options in ({"max_tokens": levels[-1] * search.ladder.eta}, {"iterations": 2}):
        with pytest.raises(ValueError, match="the runs of a plan are fixed"):
            search.extend(**options)
        with pytest.raises(ValueError, match="the runs of a plan are fixed"):
            search.plan(**options)
    assert search.ladder.levels == levels


def test_ranges_that_leave_out_what_is_expected_are_warned_of() -> None:
    """At 1B and 50B, Step Law's published formulas give lr 0.0013 and 750K tokens, 365 sequences."""
    assert not make_plan().warnings
    narrow = {"lr": FloatDistribution(3e-3, 0.1, log=True), "batch_seqs": SPACE["batch_seqs"]}
    plan = make_plan(space=narrow)
    assert any("best lr of the target" in text and "0.003 to 0.1" in text for text in plan.warnings)
    assert not any("batch_seqs" in text for text in plan.warnings)
    assert "warning" in str(plan)
    assert all(len(line) <= 80 for line in str(plan).splitlines())
    # Under muP, the best rate is that of a base width, which nobody knows here.
    assert not make_plan(space=narrow, parametrization="mup").warnings


def test_a_plan_says_what_it_costs_and_what_it_is_worth() -> None:
    plan = make_plan()
    text = str(plan)
    assert max(map(len, text.splitlines())) <= 80
    assert "1 % of the target's" in text
    assert f"within a factor of {plan.expected.lr_factor:.2f}" in text
    assert "2 % of the target's compute" in plan.describe_alternative(2.0)
    assert "are needed" in plan.describe_alternative(1e-5)
    record = json.loads(json.dumps(plan.to_dict()))
    assert sum(group["runs"] for group in record["groups"]) == plan.design.runs
    assert record["share"] == pytest.approx(plan.share)
