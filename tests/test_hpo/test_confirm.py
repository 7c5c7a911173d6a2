"""How much of a lead is noise: planted and recovered, hand-worked, and integrated a second way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from scipy.stats import norm

from hpo.confirm.contenders import Contender, choose_contenders
from hpo.confirm.runs import FIRST_REPEAT, ConfirmationFiles, make_plan
from hpo.confirm.statistics import estimate_lead_from_model, estimate_lead_from_seeds, compute_t_interval
from hpo.confirm.verdict import compare_losses, describe_confirmation, is_current, describe_lead
from hpo.search.search import Search
from scaling.laws.compute import Fidelity

SPACE: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-4, 1.0, log=True)}
TOP = Fidelity(1000.0, 9000.0)


def test_the_t_interval_is_the_one_of_the_tables() -> None:
    found = compute_t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.high - found.mean) == pytest.approx((2.0, 4.302653 / math.sqrt(3)))
    with pytest.raises(ValueError, match="needs at least 2 values, got 1"):
        compute_t_interval([1.0])


def test_the_standard_error_is_of_what_neither_configuration_nor_seed_explains() -> None:
    # means 2 and 4; seed means 1.5 and 4.5; residuals -+0.5, whose squares sum to 1 on 1 degree of freedom
    lead = estimate_lead_from_seeds([[1.0, 3.0], [2.0, 6.0]])
    assert lead.observed == pytest.approx(2.0)
    assert lead.error == pytest.approx(1.0)


def test_what_a_seed_does_to_all_configurations_changes_nothing() -> None:
    losses = np.random.default_rng(3).normal(size=(5, 3))
    one, other = estimate_lead_from_seeds(losses), estimate_lead_from_seeds(losses + np.array([0.0, 10.0, -4.0]) + 2.0)
    assert (one.observed, one.expected, one.error, one.probability) == pytest.approx(
        (other.observed, other.expected, other.error, other.probability)
    )


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_shrinkage_is_the_one_of_brute_force_integration(spread: float) -> None:
    """Over ln s^2 and w on a fine grid, with the densities of the model written out."""
    rng = np.random.default_rng(5)
    losses = rng.normal(0, spread, (3, 1)) + rng.normal(0, 1, (3, 4))  # 3 configurations: the better half is all
    k, n = losses.shape
    means = np.sort(losses.mean(1))
    rest = losses - losses.mean(1, keepdims=True) - losses.mean(0) + losses.mean()
    s2 = np.exp(np.linspace(-6, 8, 1501))[:, None]
    w = ((np.arange(1500) + 0.5) / 1500)[None, :]
    total = s2 / n / w  # variance of a mean about mu: s2 / n + tau^2
    within = -(k - 1) * (n - 1) / 2 * np.log(s2) - (rest**2).sum() / (2 * s2)
    between = -(k - 1) / 2 * np.log(total) - ((means - means.mean()) ** 2).sum() / (2 * total)
    weight = np.exp(within + between - (within + between).max())
    weight /= weight.sum()
    lead = means[1] - means[0]
    found = estimate_lead_from_seeds(losses)
    assert found.expected == pytest.approx(lead * float((weight * (1 - w)).sum()), rel=0.02)
    chance = float((weight * norm.cdf(lead * np.sqrt((1 - w) / (2 * s2 / n)))).sum())
    assert found.probability == pytest.approx(chance, abs=0.005)


def normal(rng: np.random.Generator, k: int, scale: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return rng.normal(0, scale, k)


def bowl(rng: np.random.Generator, k: int, scale: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Losses of a quadratic in one parameter, drawn evenly: crowded at the floor, a few far above."""
    return 3 * scale * rng.uniform(-1, 1, k) ** 2


@pytest.mark.parametrize(("truth", "close"), [(normal, 0.08), (bowl, 0.11)])
def test_the_stated_probability_is_calibrated_and_the_shrunken_lead_unbiased(
    truth: Callable[[np.random.Generator, int, float], Any], close: float
) -> None:
    """Many searches, from ones whose configurations are all alike to ones that differ by twice the noise."""
    rng = np.random.default_rng(11)
    rows = []
    for scale in (0.2, 0.5, 1.0, 2.0):
        for _ in range(400):
            theta = truth(rng, 6, scale)
            losses = theta[:, None] + rng.normal(0, 1, (1, 3)) + rng.normal(0, 1, (6, 3))
            first, second = np.argsort(losses.mean(1))[:2]
            lead = estimate_lead_from_seeds(losses)
            rows.append((lead.observed, lead.expected, lead.probability, theta[second] - theta[first]))
    observed, expected, probability, true = np.array(rows).T
    right = true > 0
    assert abs(probability.mean() - right.mean()) < close / 2
    for low, high in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 1.001)):
        of = (probability >= low) & (probability < high)
        assert of.sum() > 80
        assert abs(probability[of].mean() - right[of].mean()) < close, (low, high)
    assert observed.mean() - true.mean() > 0.2 * observed.mean(), "the measured lead is far too good"
    assert abs(expected.mean() - true.mean()) < 0.2 * observed.mean()


def test_a_lead_far_above_the_noise_is_believed_and_noise_alone_is_not() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 1, (6, 3))
    sure = estimate_lead_from_seeds(noise + 100.0 * np.arange(6)[:, None])
    assert sure.probability > 0.999
    assert sure.noise_share < 0.01
    shares = [estimate_lead_from_seeds(rng.normal(0, 1, (6, 3))).noise_share for _ in range(200)]
    assert np.mean(shares) > 0.5
    same = estimate_lead_from_seeds([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])  # every seed gives the same
    assert (same.expected, same.probability) == (1.0, 1.0)
    tied = estimate_lead_from_seeds([[1.0, 2.0], [2.0, 1.0]])
    assert (tied.expected, tied.probability) == (0.0, 0.5)


def test_a_lead_needs_two_configurations_on_two_seeds() -> None:
    for losses in ([[1.0, 2.0]], [[1.0], [2.0]], [[1.0, math.nan], [2.0, 3.0]]):
        with pytest.raises(ValueError, match="at least 2 configurations on at least 2 seeds"):
            estimate_lead_from_seeds(losses)


def test_a_models_lead_is_its_posterior() -> None:
    lead = estimate_lead_from_model((0.01, 0.01), observed=0.04)
    assert lead.probability == pytest.approx(0.841345, abs=1e-6)
    assert lead.noise_share == pytest.approx(0.75)
    assert math.isnan(estimate_lead_from_model((0.01, 0.01)).noise_share)


A, B = Contender(params={"lr": 0.01}, config=1, loss=2.0), Contender(params={"lr": 0.1}, config=2, loss=2.3)


@pytest.mark.parametrize(
    ("answer", "rival", "held", "said"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.6], "yes", "the lead held: 0.5333 nats on 3 fresh seeds"),
        ([1.5, 2.5, 3.6], [1.0, 2.0, 3.0], "no", "the runner-up is 0.5333 nats better on 3 fresh seeds"),
        ([1.0, 2.0, 3.0], [1.5, 1.5, 3.3], "undecided", "cannot be distinguished from zero"),
        ([1.0, math.nan, 3.0], [9.0, 9.0, 9.0], "no", "the answer diverged on 1 of 3"),
        ([9.0, 9.0, 9.0], [1.0, math.nan, math.nan], "yes", "the runner-up diverged on 2 of 3"),
        ([9.0, math.nan, 9.0], [1.0, math.nan, math.nan], "undecided", "both diverged, the answer on 1"),
    ],
)
def test_the_verdict_follows_the_paired_interval_and_divergence(
    answer: list[float], rival: list[float], held: str, said: str
) -> None:
    """Pairing matters: by themselves, losses 1, 2, 3 could not be told from 1.5, 2.5, 3.6."""
    found = compare_losses(A, B, TOP, answer, rival)
    assert found.held == held
    assert said in found.verdict
    assert found.search_lead == pytest.approx(0.3)
    assert (found.difference is None) == any(map(math.isnan, answer + rival))


def test_a_paired_interval_holds_the_planted_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    inside = 0
    for _ in range(400):
        seed = rng.normal(0, 3, 5)
        found = compare_losses(A, B, TOP, list(seed + rng.normal(0, 1, 5)), list(seed + 0.7 + rng.normal(0, 1, 5)))
        assert found.difference is not None
        inside += found.difference.low <= 0.7 <= found.difference.high
    assert 0.92 <= inside / 400 <= 0.98


class Modelled(RandomSampler):
    """A sampler that claims to know the difference of any two losses."""

    def difference(
        self, study: optuna.Study, space: dict[str, Any], a: dict[str, Any], b: dict[str, Any], target: Fidelity
    ) -> tuple[float, float]:
        sign = 1 if target.D > TOP.D else -1 if self.beyond else 1
        return sign * math.log(b["lr"] / a["lr"]) ** 2 / 100, 0.01

    beyond = False  # whether the target is, and lies on the other side of the optimum at TOP


def searched(*, seeds: int = 1, sampler: Any = "random", target: Fidelity | None = None) -> Search:
    """A finished search; loss (ln(lr / 0.01))^2 / 20 and, with more seeds, +-0.001 on the first two."""
    search = Search(
        SPACE, tokens=(1000, 9000), sizes=[1000.0], sampler=sampler, iterations=1, seed=4, seeds=seeds, target=target
    )
    while (job := search.ask()) is not None:
        loss = 2 + math.log(job.params["lr"] / 0.01) ** 2 / 20
        search.tell(job, [loss + (0.001, -0.001, 0.0)[i] * (-1) ** job.config for i in range(seeds)])
    return search


def excess(contender: Contender) -> float:
    return abs(math.log(contender.params["lr"] / 0.01))


def test_the_answer_meets_the_best_other_settings_at_the_largest_run() -> None:
    search = searched()
    answer, rival = choose_contenders(search, search.best())
    at_top = [t for t in search.study.trials if t.user_attrs["tokens"] == 9000]
    ranked = sorted(at_top, key=lambda t: t.value)
    assert (answer.params, answer.loss) == (ranked[0].params, ranked[0].value)
    others = [t for t in ranked if abs(math.log(t.params["lr"] / answer.params["lr"])) > 0.02 * math.log(1e4)]
    assert rival.params == others[0].params
    # beside a run is not another setting: the answer moved by 0.1 % of the range meets the same rival
    moved = {"lr": answer.params["lr"] * math.exp(0.001 * math.log(1e4))}
    beside, same = choose_contenders(search, moved)
    assert (beside.config, beside.loss, same.params) == (None, None, rival.params)
    # from the unit cube and back is the same setting
    assert choose_contenders(search, {"lr": answer.params["lr"] * (1 + 1e-15)})[0] == answer


def test_another_rival_can_be_named_by_its_number() -> None:
    search = searched()
    answer, rival = choose_contenders(search, search.best())
    worst = max((t for t in search.study.trials if t.user_attrs["rung"] == 0), key=lambda t: t.value or 0.0)
    _, named = choose_contenders(search, search.best(), against=worst.number)
    assert (named.config, named.params, named.loss) == (worst.number, worst.params, None)
    assert excess(answer) < excess(rival) < excess(named)
    for wrong in (10_000, answer.config):
        with pytest.raises(ValueError, match=f"got {wrong}: there are 0, "):
            choose_contenders(search, search.best(), against=wrong)


def test_one_run_has_no_rival() -> None:
    search = Search(SPACE, tokens=(1000, 9000), sampler="random", iterations=1)
    job = search.ask()
    assert job is not None
    search.tell(job, 2.0)
    with pytest.raises(ValueError, match="nothing to compare the answer with"):
        choose_contenders(search, search.best())
    assert "no lead" in describe_lead(search, search.best(), "s")


def test_what_is_said_of_a_lead_depends_on_what_can_be_known() -> None:
    one = searched()
    said = describe_lead(one, one.best(), "mine")
    assert "one seed per configuration does not show" in said
    assert "`hpo confirm mine`" in said
    several = searched(seeds=3)
    said = describe_lead(several, several.best(), "mine")
    losses = [t.user_attrs["losses"] for t in several.study.trials if t.user_attrs["tokens"] == 9000]
    lead = estimate_lead_from_seeds(losses)
    assert f"by {lead.observed:.4f} nats" in said
    assert f"probability {lead.probability:.2f}" in said
    modelled = searched(sampler=Modelled(seed=4))
    answer, rival = choose_contenders(modelled, modelled.best())
    gap = math.log(rival.params["lr"] / answer.params["lr"]) ** 2 / 100
    said = describe_lead(modelled, modelled.best(), "mine")
    assert f"leads {rival} by {gap:.4f} +- 0.0100 nats" in said
    assert f"probability {norm.cdf(gap / 0.01):.2f}" in said


def test_a_lead_at_a_far_target_is_told_before_that_at_the_largest_run() -> None:
    sampler = Modelled(seed=4)
    sampler.beyond = True
    search = searched(sampler=sampler, target=Fidelity(1000.0, 90_000))
    at_target, at_top = [line for line in describe_lead(search, search.best(), "mine").splitlines() if "nats" in line]
    assert "at N 1,000, D 90,000 this leads" in at_target
    assert "measured" not in at_target
    assert "at N 1,000, D 9,000, whose optimum may differ from the target's, this leads" in at_top
    assert "by -" in at_top
    assert "measured" in at_top


def test_a_confirmation_trains_both_on_the_same_fresh_seeds_and_is_planned_once(tmp_path: Path) -> None:
    search, place = searched(), ConfirmationFiles(tmp_path)
    plan = make_plan(search, place, 3, None)
    assert [r for _, r in plan.runs] == [FIRST_REPEAT + i for i in (0, 0, 1, 1, 2, 2)]
    assert plan.fidelity == TOP
    assert len({place.run(plan, c, r) for c, r in plan.runs}) == 6
    place.run(plan, plan.rival, FIRST_REPEAT).write_text("{}")
    assert place.list_pending(plan) == [(plan.answer, FIRST_REPEAT), *plan.runs[2:]]
    # A model's answer may come out a hair different next time; what was planned for the same record stays.
    moved = plan.model_copy(update={"answer": A})
    place.plan.write_text(moved.model_dump_json())
    again = make_plan(search, place, 4, None)
    assert again.answer == A
    assert again.seeds == 4
    assert make_plan(search, place, 4, again.rival.config).answer == plan.answer, "another rival is another plan"
    search.extend(27_000)
    assert make_plan(search, place, 4, None).fidelity.D == 27_000
    with pytest.raises(ValueError, match="at least 2 seeds"):
        make_plan(search, place, 1, None)


def test_a_kept_confirmation_is_told_apart_from_one_of_another_answer() -> None:
    from dataclasses import asdict

    search = searched()
    answer, rival = choose_contenders(search, search.best())
    kept = asdict(compare_losses(answer, rival, TOP, [2.0, 2.1], [2.2, 2.4]))
    assert is_current(kept, search, search.best())
    assert not is_current(kept, search, rival.params)
    said = describe_confirmation(kept)
    assert "on 2 fresh seeds at N 1,000, D 9,000" in said
    assert said.endswith(kept["verdict"])
    search.extend(27_000)
    assert not is_current(kept, search, search.best())
