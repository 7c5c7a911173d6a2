"""How much of a lead is noise: recovered from planted leads, worked by hand, and integrated in a second way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import RandomSampler
from scipy.special import ndtri
from scipy.stats import norm

from hpo.confirm.contenders import Contender, choose_contenders
from hpo.confirm.runs import (
    FIRST_REPEAT,
    ConfirmationFiles,
    ConfirmationRun,
    locate_confirmation,
    make_plan,
    read_confirmation,
)
from hpo.confirm.statistics import compute_t_interval, estimate_lead_from_model, estimate_lead_from_seeds
from hpo.confirm.verdict import compare_losses, describe_answer, describe_confirmation, describe_lead, is_current
from hpo.search.search import Search
from hpo.storage.trial_attributes import read_loss
from hpo.study.answer import choose_answer
from hpo.study.files import StudyFiles
from scaling.laws.compute import Fidelity

SPACE: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-4, 1.0, log=True)}
TOP = Fidelity(1000.0, 9000.0)


def test_the_t_interval_agrees_with_the_tables() -> None:
    interval = compute_t_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.high - interval.mean) == pytest.approx((2.0, 4.302653 / math.sqrt(3)))
    with pytest.raises(ValueError, match="needs at least 2 values, got 1"):
        compute_t_interval([1.0])


def test_the_standard_error_comes_from_what_neither_configuration_nor_seed_explains() -> None:
    # Means 2 and 4, seed means 1.5 and 4.5, residuals ±0.5, whose squares sum to 1 on 1 degree of freedom.
    lead = estimate_lead_from_seeds([[1.0, 3.0], [2.0, 6.0]])
    assert lead.observed == pytest.approx(2.0)
    assert lead.error == pytest.approx(1.0)


def test_an_effect_of_a_seed_on_all_configurations_changes_nothing() -> None:
    losses = np.random.default_rng(3).normal(size=(5, 3))
    one, other = estimate_lead_from_seeds(losses), estimate_lead_from_seeds(losses + np.array([0.0, 10.0, -4.0]) + 2.0)
    assert (one.observed, one.expected, one.error, one.probability) == pytest.approx(
        (other.observed, other.expected, other.error, other.probability)
    )


@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_shrinkage_agrees_with_brute_force_integration(spread: float) -> None:
    """The model's densities are integrated over ln s^2 and w on a fine grid."""
    rng = np.random.default_rng(5)
    # With 3 configurations, all of them are used.
    losses = rng.normal(0, spread, (3, 1)) + rng.normal(0, 1, (3, 4))
    k, n = losses.shape
    means = np.sort(losses.mean(1))
    residuals = losses - losses.mean(1, keepdims=True) - losses.mean(0) + losses.mean()
    s2 = np.exp(np.linspace(-6, 8, 1501))[:, None]
    w = ((np.arange(1500) + 0.5) / 1500)[None, :]
    # Variance of a mean about mu: s2 / n + tau^2.
    total = s2 / n / w
    within = -(k - 1) * (n - 1) / 2 * np.log(s2) - (residuals**2).sum() / (2 * s2)
    between = -(k - 1) / 2 * np.log(total) - ((means - means.mean()) ** 2).sum() / (2 * total)
    weight = np.exp(within + between - (within + between).max())
    weight /= weight.sum()
    difference = means[1] - means[0]
    lead = estimate_lead_from_seeds(losses)
    assert lead.expected == pytest.approx(difference * float((weight * (1 - w)).sum()), rel=0.02)
    chance = float((weight * norm.cdf(difference * np.sqrt((1 - w) / (2 * s2 / n)))).sum())
    assert lead.probability == pytest.approx(chance, abs=0.005)


def draw_normal_losses(rng: np.random.Generator, k: int, scale: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    return rng.normal(0, scale, k)


def draw_bowl_losses(rng: np.random.Generator, k: int, scale: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Draw losses of a quadratic in one uniform parameter: most are near the minimum, a few far above."""
    return 3 * scale * rng.uniform(-1, 1, k) ** 2


@pytest.mark.parametrize(("truth", "close"), [(draw_normal_losses, 0.08), (draw_bowl_losses, 0.11)])
def test_the_stated_probability_is_calibrated_and_the_shrunken_lead_unbiased(
    truth: Callable[[np.random.Generator, int, float], Any], close: float
) -> None:
    """The searches range from configurations that are almost equal to ones that differ by twice the noise."""
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
        within = (probability >= low) & (probability < high)
        assert within.sum() > 80
        assert abs(probability[within].mean() - right[within].mean()) < close, (low, high)
    assert observed.mean() - true.mean() > 0.2 * observed.mean(), "the measured lead is far too large"
    assert abs(expected.mean() - true.mean()) < 0.2 * observed.mean()


def test_a_lead_far_above_the_noise_is_believed_and_noise_alone_is_not() -> None:
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 1, (6, 3))
    sure = estimate_lead_from_seeds(noise + 100.0 * np.arange(6)[:, None])
    assert sure.probability > 0.999
    assert sure.noise_share < 0.01
    shares = [estimate_lead_from_seeds(rng.normal(0, 1, (6, 3))).noise_share for _ in range(200)]
    assert np.mean(shares) > 0.5
    without_noise = estimate_lead_from_seeds([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    assert (without_noise.expected, without_noise.probability) == (1.0, 1.0)
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
    ("answer", "rival", "held", "words"),
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
    answer: list[float], rival: list[float], held: str, words: str
) -> None:
    """Pairing matters: without it, losses of 1, 2, 3 could not be told from 1.5, 2.5, 3.6."""
    confirmation = compare_losses(A, B, TOP, answer, rival)
    assert confirmation.held == held
    assert words in confirmation.verdict
    assert confirmation.search_lead == pytest.approx(0.3)
    assert (confirmation.difference is None) == any(map(math.isnan, answer + rival))


def test_a_paired_interval_contains_the_planted_difference_as_often_as_it_should() -> None:
    rng = np.random.default_rng(8)
    inside = 0
    for _ in range(400):
        seed = rng.normal(0, 3, 5)
        losses, rival_losses = seed + rng.normal(0, 1, 5), seed + 0.7 + rng.normal(0, 1, 5)
        difference = compare_losses(A, B, TOP, list(losses), list(rival_losses)).difference
        assert difference is not None
        inside += difference.low <= 0.7 <= difference.high
    assert 0.92 <= inside / 400 <= 0.98


class SamplerWithModel(RandomSampler):
    """A random sampler that claims to know the difference of any two losses.

    Attributes:
        is_beyond: Whether the optimum at the target lies on the other side of the one at TOP.
    """

    is_beyond = False

    def difference(
        self, study: optuna.Study, space: dict[str, Any], a: dict[str, Any], b: dict[str, Any], target: Fidelity
    ) -> tuple[float, float]:
        sign = 1 if target.D > TOP.D else -1 if self.is_beyond else 1
        return sign * math.log(b["lr"] / a["lr"]) ** 2 / 100, 0.01


def finish_search(*, seeds: int = 1, sampler: Any = "random", target: Fidelity | None = None) -> Search:
    """Return a finished search with the loss 2 + ln(lr / 0.01)^2 / 20, and ±0.001 on the first two of several seeds."""
    search = Search(
        SPACE, tokens=(1000, 9000), sizes=[1000.0], sampler=sampler, iterations=1, seed=4, seeds=seeds, target=target
    )
    while (job := search.ask()) is not None:
        loss = 2 + math.log(job.params["lr"] / 0.01) ** 2 / 20
        search.tell(job, [loss + (0.001, -0.001, 0.0)[i] * (-1) ** job.config for i in range(seeds)])
    return search


def measure_distance(contender: Contender) -> float:
    """Return how far a contender is from the optimum."""
    return abs(math.log(contender.params["lr"] / 0.01))


def test_the_answer_is_compared_with_the_best_other_settings_at_the_largest_run() -> None:
    search = finish_search()
    answer, rival = choose_contenders(search, search.best())
    at_top = [t for t in search.study.trials if t.user_attrs["tokens"] == 9000]
    ranked = sorted(at_top, key=read_loss)
    assert (answer.params, answer.loss) == (ranked[0].params, ranked[0].value)
    others = [t for t in ranked if abs(math.log(t.params["lr"] / answer.params["lr"])) > 0.02 * math.log(1e4)]
    assert rival.params == others[0].params
    # Settings just beside a run are not other settings: an answer moved by 0.1 % of the range has the same rival.
    moved = {"lr": answer.params["lr"] * math.exp(0.001 * math.log(1e4))}
    beside, same = choose_contenders(search, moved)
    assert (beside.config, beside.loss, same.params) == (None, None, rival.params)
    # Settings that went to the unit cube and back are the same settings.
    assert choose_contenders(search, {"lr": answer.params["lr"] * (1 + 1e-15)})[0] == answer


def test_another_rival_can_be_named_by_its_number() -> None:
    search = finish_search()
    answer, rival = choose_contenders(search, search.best())
    worst = max((t for t in search.study.trials if t.user_attrs["rung"] == 0), key=lambda t: t.value or 0.0)
    _, named = choose_contenders(search, search.best(), against=worst.number)
    assert (named.config, named.params, named.loss) == (worst.number, worst.params, None)
    assert measure_distance(answer) < measure_distance(rival) < measure_distance(named)
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


def test_the_description_of_a_lead_depends_on_what_can_be_known() -> None:
    one = finish_search()
    text = describe_lead(one, one.best(), "mine")
    assert "one seed per configuration does not show" in text
    assert "`hpo confirm mine`" in text
    several = finish_search(seeds=3)
    text = describe_lead(several, several.best(), "mine")
    losses = [t.user_attrs["losses"] for t in several.study.trials if t.user_attrs["tokens"] == 9000]
    lead = estimate_lead_from_seeds(losses)
    assert f"by {lead.observed:.4f} nats" in text
    assert f"probability {lead.probability:.2f}" in text
    modelled = finish_search(sampler=SamplerWithModel(seed=4))
    answer, rival = choose_contenders(modelled, modelled.best())
    gap = math.log(rival.params["lr"] / answer.params["lr"]) ** 2 / 100
    text = describe_lead(modelled, modelled.best(), "mine")
    assert f"lead over {rival}, by the model" in text
    assert f"{gap:.4f} +- 0.0100 nats" in text
    assert f"probability {norm.cdf(gap / 0.01):.2f}" in text


def test_a_lead_at_a_far_target_is_described_before_the_lead_at_the_largest_run() -> None:
    sampler = SamplerWithModel(seed=4)
    sampler.is_beyond = True
    search = finish_search(sampler=sampler, target=Fidelity(1000.0, 90_000))
    at_target, at_top = [line for line in describe_lead(search, search.best(), "mine").splitlines() if "nats" in line]
    assert "at the target (N 1,000, D 90,000): " in at_target
    assert "measured" not in at_target
    assert "at the largest run (N 1,000, D 9,000): -" in at_top
    assert "measured" in at_top


def test_a_confirmation_trains_both_on_the_same_fresh_seeds_and_is_planned_once(tmp_path: Path) -> None:
    search, paths = finish_search(), ConfirmationFiles(tmp_path)
    plan = make_plan(search, paths, 3, None)
    assert [r for _, r in plan.runs] == [FIRST_REPEAT + i for i in (0, 0, 1, 1, 2, 2)]
    assert plan.fidelity == TOP
    assert len({paths.result(plan, run) for run in plan.runs}) == 6
    paths.result(plan, ConfirmationRun(plan.rival, FIRST_REPEAT)).write_text("{}")
    assert paths.list_unfinished(plan) == [(plan.answer, FIRST_REPEAT), *plan.runs[2:]]
    # A model's answer is reproducible only up to rounding, so a plan for the same record stays.
    moved = plan.model_copy(update={"answer": A})
    paths.plan.write_text(moved.model_dump_json())
    again = make_plan(search, paths, 4, None)
    assert again.answer == A
    assert again.seeds == 4
    assert make_plan(search, paths, 4, again.rival.config).answer == plan.answer, "another rival is another plan"
    search.extend(27_000)
    assert make_plan(search, paths, 4, None).fidelity.D == 27_000
    with pytest.raises(ValueError, match="at least 2 seeds"):
        make_plan(search, paths, 1, None)


def test_a_stored_confirmation_is_told_apart_from_one_of_another_answer(tmp_path: Path) -> None:
    search, files = finish_search(), StudyFiles(tmp_path / "s.toml")
    assert read_confirmation(files) is None
    answer, rival = choose_contenders(search, search.best())
    confirmation = compare_losses(answer, rival, TOP, [2.0, math.nan], [2.2, 2.4])
    path = locate_confirmation(files).answer
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(confirmation)))
    assert read_confirmation(files) == confirmation
    assert is_current(confirmation, search, search.best())
    assert not is_current(confirmation, search, rival.params)
    text = describe_confirmation(confirmation)
    assert "on 2 fresh seeds at N 1,000, D 9,000" in text
    assert " ".join(text.split()).endswith(confirmation.verdict)
    search.extend(27_000)
    assert not is_current(confirmation, search, search.best())
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"confirmed\.json is not what `hpo confirm` wrote"):
        read_confirmation(files)


# The answer that is printed


class ContradictingSampler(RandomSampler):
    """A model that answers lr = 1e-3 and gives it a stated probability of beating any other settings."""

    def __init__(self, probability: float) -> None:
        super().__init__(seed=0)
        self.probability = probability

    def propose(self, study: Any, space: Any, slots: Any, cost: Any, target: Any, **_: Any) -> Any:
        settings = {"lr": 10 ** -(1 + len(study.trials) % 7 / 2)}
        return settings, 0

    def is_hopeless(self, study: Any, space: Any, params: Any, target: Any) -> bool:
        return False

    def best(self, study: Any, space: Any, target: Any) -> dict[str, Any]:
        return {"lr": 1e-3}

    def difference(self, study: Any, space: Any, a: Any, b: Any, target: Any) -> tuple[float, float]:
        return float(ndtri(self.probability)), 1.0


@pytest.mark.parametrize(
    ("probability", "target", "is_measured"),
    [(0.01, Fidelity(4000.0, 90_000), True), (0.3, Fidelity(4000.0, 90_000), False), (0.01, TOP, False)],
)
def test_an_extrapolation_that_its_model_does_not_believe_is_not_printed_as_best(
    probability: float, target: Fidelity, is_measured: bool
) -> None:
    space = {"lr": FloatDistribution(1e-5, 1.0, log=True)}
    search = Search(
        space,
        tokens=(1_000, 9_000),
        sizes=(1000.0,),
        target=target,
        sampler=ContradictingSampler(probability),
        iterations=1,
    )
    while (job := search.ask()) is not None:
        search.tell(job, abs(math.log10(job.params["lr"]) + 2))
    answer = choose_answer(search)
    assert answer.is_measured == is_measured
    assert answer.params["lr"] == pytest.approx(1e-2 if is_measured else 1e-3)
    assert answer.probability == pytest.approx(probability)
    text = describe_answer(search, answer, "s")
    if is_measured:
        assert text.startswith("best measured settings, at the largest run (N 1,000, D 9,000):\n  lr = 0.01\n")
        assert "lr=0.001, but gives these a probability of 0.01" in " ".join(text.split())
        assert "Use `scaling recommend s --target`" in text
    else:
        assert text.startswith(f"best settings for the target, N {target.N:,.0f}")
        assert ("Extrapolated" in text) == (target != TOP)
