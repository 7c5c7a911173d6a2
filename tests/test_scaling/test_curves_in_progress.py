"""Forecasts of runs in progress, tested on planted curves and on runs drawn from the prior."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from scaling.common.arrays import Array
from scaling.curves.in_progress import CurvePrior, FinalLossForecast, FinishedRun, learn_prior, predict_end
from scaling.curves.schedules import Schedule, make_cooldown_schedule, make_logged_schedule

T = np.linspace(1e8, 1e9, 40)


def plant_losses(tokens: Array, *, E: float = 2.0, A: float = 0.6, alpha: float = 0.5, scale: float = 1e9) -> Array:
    return np.asarray(E + A * (tokens / scale) ** -alpha)


def draw_run(
    rng: np.random.Generator, prior: CurvePrior, schedule: Schedule, at: float, noise: float
) -> tuple[Array, Array]:
    """Draw a run from the prior (without wander) that ends at `at` tokens, by a formula written out here again."""
    t = np.linspace(at / 40, at, 40)
    fine = np.linspace(0, at, 20001)
    share = schedule(fine)
    total = np.interp(t, fine, np.cumsum(share) * (fine[1] - fine[0]))
    alpha = prior.alpha * math.exp(prior.alpha_spread * rng.standard_normal())
    slope = prior.slope * math.exp(0.3 * rng.standard_normal())
    gain = prior.gain + prior.gain_spread * rng.standard_normal()
    x = total / total[19]
    level = 3 * (1 + slope * (x**-alpha - 1) / alpha - gain * (1 - np.sqrt(schedule(t))))
    return t, np.asarray(level * np.exp(noise * rng.standard_normal(40)))


@pytest.mark.parametrize(("E", "alpha", "within"), [(2.0, 0.5, 2e-3), (2.0, 0.3, 4e-3), (0.0, 0.1, 1.2e-2)])
def test_the_end_of_a_planted_power_law_is_found_from_its_first_half(E: float, alpha: float, within: float) -> None:
    rng = np.random.default_rng(0)
    loss = plant_losses(T, E=E, A=2.6 - E, alpha=alpha) * np.exp(5e-4 * rng.standard_normal(40))
    half = T <= 5e8
    end = predict_end(T[half], loss[half], 1e9)
    assert end.mean == pytest.approx(2.6, rel=within)
    # Carrying the last value forward would not pass.
    assert abs(loss[half][-1] / 2.6 - 1) > 4 * within


def test_intervals_cover_the_planted_ends_as_often_as_they_should() -> None:
    """Forecast 100 runs drawn from the prior, each from its half. The bounds are about three binomial sd."""
    rng = np.random.default_rng(1)
    prior = replace(CurvePrior(), wander=0.0)
    schedule = make_cooldown_schedule(1e9)
    ranks = []
    for _ in range(100):
        t, y = draw_run(rng, prior, schedule, 1e9, 1e-3)
        ranks.append(predict_end(t[:20], y[:20], 1e9, schedule=schedule, prior=prior).probability_below(y[-1]))
    off = 2 * np.abs(np.array(ranks) - 0.5)
    for mass, low, high in ((0.5, 35, 65), (0.8, 68, 92), (0.95, 88, 100)):
        assert low <= int((off <= mass).sum()) <= high


def test_spikes_and_nan_count_as_if_they_were_not_there() -> None:
    rng = np.random.default_rng(2)
    loss = plant_losses(T[:20]) * np.exp(1e-3 * rng.standard_normal(20))
    spikes, holes = [4, 9, 18], [6, 12]
    clean = np.delete(np.arange(20), spikes + holes)
    loss[spikes] *= 1.4
    loss[holes] = math.nan
    end, without = predict_end(T[:20], loss, 1e9), predict_end(T[clean], loss[clean], 1e9)
    assert end.mean == pytest.approx(without.mean, rel=2e-3)
    assert without.quantile(0.025) < 2.6 < without.quantile(0.975)
    assert end.sd < 1.5 * without.sd


def test_warm_up_points_are_left_out_when_the_schedule_is_known() -> None:
    schedule = make_cooldown_schedule(1e9, warmup=2e8)
    t = np.linspace(2.5e7, 5e8, 20)
    loss = plant_losses(t)
    wrong = np.where(t < 2e8, 9.0, loss)
    forecasts = [predict_end(t, y, 1e9, schedule=schedule) for y in (loss, wrong)]
    assert forecasts[0] == forecasts[1]


def test_three_points_are_enough_but_give_a_wide_interval() -> None:
    few = predict_end(T[[2, 3, 4]], plant_losses(T[[2, 3, 4]]), 1e9)
    many = predict_end(T[:30], plant_losses(T[:30]), 1e9)
    assert many.sd < few.sd / 5
    assert few.quantile(0.025) < 2.6 < few.quantile(0.975)


def test_the_forecast_is_the_present_loss_when_nothing_is_left_to_train() -> None:
    end = predict_end(T, plant_losses(T), 1e9)
    assert end.mean == pytest.approx(2.6, rel=1e-3)
    assert end.sd < 0.01


def test_more_noise_and_a_longer_forecast_widen_the_interval() -> None:
    rng = np.random.default_rng(3)
    shock = rng.standard_normal(20)
    sds = [predict_end(T[:20], plant_losses(T[:20]) * np.exp(s * shock), 1e9).sd for s in (1e-3, 1e-2)]
    assert sds[0] < sds[1]
    ahead = [predict_end(T[:20], plant_losses(T[:20]), at).sd for at in (6e8, 1e9, 4e9)]
    assert ahead == sorted(ahead)


def test_units_of_tokens_and_loss_and_the_order_of_points_do_not_matter() -> None:
    rng = np.random.default_rng(4)
    y = plant_losses(T[:20]) * np.exp(1e-3 * rng.standard_normal(20))
    plain = predict_end(T[:20], y, 1e9)
    shuffled = rng.permutation(20)
    other = predict_end(T[shuffled] / 2048, 3 * y[shuffled], 1e9 / 2048)
    assert (other.mean / 3, other.sd / 3) == pytest.approx((plain.mean, plain.sd), rel=1e-6)


def test_the_gain_of_a_cooldown_is_learned_from_finished_runs() -> None:
    """The cooldown of this family gains 0.1, which the default prior does not know and eight siblings show."""
    rng = np.random.default_rng(5)
    family = CurvePrior(gain=0.1, gain_spread=0.005, alpha_spread=0.1)
    schedule = make_cooldown_schedule(1e9)
    runs = [draw_run(rng, family, schedule, 1e9, 1e-3) for _ in range(9)]
    siblings = [FinishedRun(t, y, schedule) for t, y in runs[:-1]]
    learned = learn_prior(siblings)
    default = CurvePrior()
    assert abs(learned.gain - 0.1) < abs(default.gain - 0.1) / 3
    assert learned.gain_spread < default.gain_spread
    t, y = runs[-1]
    before = predict_end(t[:20], y[:20], 1e9, schedule=schedule)
    after = predict_end(t[:20], y[:20], 1e9, schedule=schedule, prior=learned)
    assert after.sd < before.sd
    assert abs(after.mean / y[-1] - 1) < abs(before.mean / y[-1] - 1) / 2
    assert learn_prior([]) == default


def test_siblings_correct_a_bias_that_the_formula_does_not_have() -> None:
    """Every run ends 8 % lower than its trunk and schedule suggest."""
    rng = np.random.default_rng(6)

    def plant_lower_end(drop: float) -> Array:
        y = plant_losses(T) * np.exp(1e-3 * rng.standard_normal(40))
        y[-1] *= 1 - drop
        return np.asarray(y)

    siblings = [FinishedRun(T, plant_lower_end(0.08 + 0.002 * rng.standard_normal())) for _ in range(10)]
    truth = 2.6 * 0.92
    plain = predict_end(T[:20], plant_lower_end(0)[:20], 1e9)
    helped = predict_end(T[:20], plant_lower_end(0)[:20], 1e9, siblings=siblings)
    assert plain.probability_below(truth) < 0.01
    assert abs(helped.mean / truth - 1) < abs(plain.mean / truth - 1) / 3
    assert helped.quantile(0.025) < truth < helped.quantile(0.975)


def test_a_long_curve_is_thinned_and_its_end_is_still_covered() -> None:
    rng = np.random.default_rng(7)
    t = np.linspace(1e6, 5e8, 5000)
    y = plant_losses(t) * np.exp(5e-3 * rng.standard_normal(5000))
    long = predict_end(t, y, 1e9)
    assert long.quantile(0.025) < 2.6 < long.quantile(0.975)
    # The last value carried forward would be off by 9 %.
    assert long.mean == pytest.approx(2.6, rel=1.2e-2)


def test_the_distribution_is_one_log_normal() -> None:
    end = FinalLossForecast(2.0, 0.1)
    assert end.probability_below(end.quantile(0.3)) == pytest.approx(0.3)
    draws = np.random.default_rng(8).standard_normal(200_000)
    spread = math.log(end.quantile(0.8413447) / end.quantile(0.5))
    sample = end.quantile(0.5) * np.exp(spread * draws)
    assert (sample.mean(), sample.std()) == pytest.approx((2.0, 0.1), rel=1e-2)
    assert end.probability_below(0.0) == end.probability_below(-1.0) == 0.0


def test_schedules_are_the_share_of_the_peak() -> None:
    wsd = make_cooldown_schedule(100.0, share=0.2, warmup=10.0)
    assert wsd(np.array([0.0, 5.0, 10.0, 80.0, 85.0, 100.0])) == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    read = make_logged_schedule([10, 20, 30], [0.1, 0.2, 0.05])
    assert read(np.array([0.0, 5.0, 10.0, 15.0, 30.0])) == pytest.approx([0, 0.25, 0.5, 0.75, 0.25])
    assert make_logged_schedule([10, 20], [0.2, 0.1])(np.array([0.0]))[0] == 1


def test_what_cannot_be_forecast_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 points"):
        predict_end([1e8, 2e8, 3e8], [3.0, math.nan, 2.9], 1e9)
    with pytest.raises(ValueError, match="at or after the last point"):
        predict_end(T, plant_losses(T), 5e8)
    with pytest.raises(ValueError, match="share of its peak"):
        predict_end(T, plant_losses(T), 1e9, schedule=lambda t: 3e-4 + 0 * t + 2)
    with pytest.raises(ValueError, match="before the cooldown"):
        make_cooldown_schedule(1e9, share=0.5, warmup=6e8)
    with pytest.raises(ValueError, match="finite and at least 0"):
        make_logged_schedule([1, 2], [0.1, math.nan])


@pytest.mark.parametrize(
    ("decay", "half"),
    [("1-sqrt", 1 - 0.5**0.5), ("linear", 0.5), ("cosine", 0.5), ("square", 0.75), ("exponential", 0.04**0.5)],
)
def test_a_cooldown_has_the_shape_that_is_asked_for(decay: str, half: float) -> None:
    schedule = make_cooldown_schedule(100.0, share=0.2, decay=decay, floor=0.04)
    end = 0.04 if decay == "exponential" else 0.0
    assert schedule(np.array([50.0, 80.0, 90.0, 100.0])) == pytest.approx([1.0, 1.0, half, end])
