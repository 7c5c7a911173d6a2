"""The next run narrows the intervals as promised, tested in planted worlds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from scaling.advice.answer import parse_next_run
from scaling.advice.next_run import (
    SWEEP_FACTORS,
    compute_default_limit,
    compute_interval_factors,
    compute_loss_half_width,
    list_candidates,
    plan_next,
    simulate_run,
    simulate_sweep,
)
from scaling.common.quantities import format_count, read_count
from scaling.fitting.loss_evidence import fit_loss_evidence
from scaling.fitting.loss_law import Fit
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law
from scaling.laws.formulas import HPLaw
from tests.test_scaling.test_lr_batch_law import FLOOR, LARGE, MUP, height, sweep

TARGET = (8e6, 8e7)
MASS = 0.9


def fit_planted_runs(seed: int, law: HPLaw = MUP, **changes: object) -> tuple[HPFit, Fit, float, pd.DataFrame]:
    runs = sweep(law, **({"per": 15, "seed": seed, "parametrization": "mup"} | changes))  # type: ignore[arg-type]
    hp = fit_hp_law(runs)
    evidence = fit_loss_evidence(runs, hp)
    return hp, evidence.fit, evidence.run_noise, runs


def train_runs(
    law: HPLaw, N: float, D: float, lr: np.ndarray, batch: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    """Return what such runs give in the planted world, with noise."""
    best_lr, best_batch = (float(v) for v in law(N, D))
    above = height(np.log(lr / best_lr), np.log(batch / best_batch)) + 0.003 * rng.standard_normal(lr.size)
    loss = float(FLOOR(N, D)) * np.exp(above)
    return pd.DataFrame({"N": N, "D": D, "lr": lr, "batch_tokens": batch, "loss": loss, "parametrization": "mup"})


def fit_with_new_runs(
    runs: pd.DataFrame, hp: HPFit, place: tuple[float, float], rng: np.random.Generator, sweep_of_nine: bool
) -> HPFit:
    """Add the proposed runs to the table and fit everything again."""
    lr, batch = (float(v) for v in hp.law(*place))
    factors = np.array(SWEEP_FACTORS if sweep_of_nine else (1.0,))
    lrs, batches = (v.ravel() for v in np.meshgrid(lr * factors, batch * factors))
    return fit_hp_law(pd.concat([runs, train_runs(MUP, *place, lrs, batches, rng)], ignore_index=True))


def collect_over_seeds(measure: Callable[[int], tuple[float, ...]], seeds: int = 20) -> np.ndarray:
    return np.array([measure(seed) for seed in range(seeds)])


@pytest.mark.slow
def test_a_run_narrows_the_loss_as_promised_and_the_best_candidate_more_than_the_worst() -> None:
    def measure(seed: int) -> tuple[float, ...]:
        hp, fit, noise, runs = fit_planted_runs(seed)
        places = list_candidates(hp, *TARGET)
        claims = [simulate_run(hp, fit, noise, *place, *TARGET, MASS) for place in places]
        rng = np.random.default_rng(seed)
        real = []
        for i in (int(np.argmin(claims)), int(np.argmax(claims))):
            again = fit_loss_evidence(runs, fit_with_new_runs(runs, hp, places[i], rng, False))
            real.append(compute_loss_half_width(again.fit, again.run_noise, *TARGET, MASS))
        return compute_loss_half_width(fit, noise, *TARGET, MASS), min(claims), *real

    halves = collect_over_seeds(measure)
    now, claimed, best, worst = np.median(halves, 0)
    assert claimed < now
    assert best < now
    assert 0.8 < best / claimed < 1.25
    assert best < 0.9 * worst
    assert np.mean(halves[:, 2] < halves[:, 3]) > 0.8


@pytest.mark.slow
def test_a_sweep_narrows_rate_and_batch_as_promised() -> None:
    def measure(seed: int) -> tuple[float, ...]:
        hp, fit, _, runs = fit_planted_runs(seed, per=6)
        place = list_candidates(hp, *TARGET)[-1]
        claimed = simulate_sweep(hp, fit, *place)
        real = fit_with_new_runs(runs, hp, place, np.random.default_rng(seed), True)
        widths = [np.log(compute_interval_factors(h, *TARGET, MASS)) for h in (hp, claimed, real)]
        regrets = [h.expected_regret(*TARGET) for h in (hp, claimed, real)]
        return *(float(v) for w in widths for v in w), *regrets

    now_lr, now_batch, lr, batch, real_lr, real_batch, now_regret, regret, real_regret = np.median(
        collect_over_seeds(measure), 0
    )
    assert lr < 0.9 * now_lr
    assert batch < 0.9 * now_batch
    assert regret < 0.9 * now_regret
    assert 0.8 < real_lr / lr < 1.25
    assert 0.8 < real_batch / batch < 1.25
    assert 0.7 < real_regret / regret < 1.4


def test_the_plan_is_the_best_candidate_and_stays_within_the_limit() -> None:
    hp, fit, noise, _ = fit_planted_runs(0)
    plan = plan_next(hp, fit, *TARGET, run_noise=noise, mass=MASS, at_most=5e12)
    places = list_candidates(hp, *TARGET, 5e12)
    assert (plan.N, plan.D) in places
    assert plan.C <= 5e12 * (1 + 1e-9)
    assert plan.loss_half[1] == min(simulate_run(hp, fit, noise, *p, *TARGET, MASS) for p in places)
    assert plan.loss_half[0] == compute_loss_half_width(fit, noise, *TARGET, MASS)
    assert (plan.lr, plan.batch_tokens) == tuple(float(v) for v in hp.law(plan.N, plan.D))
    assert plan.sweep.C == pytest.approx(9 * 6 * plan.sweep.N * plan.sweep.D)
    assert plan.sweep.expected_regret[1] == min(simulate_sweep(hp, fit, *p).expected_regret(*TARGET) for p in places)
    assert parse_next_run(asdict(plan)) == plan
    assert str(parse_next_run(asdict(plan))) == str(plan)


def test_batches_are_whole_sequences_all_different() -> None:
    hp, fit, noise, _ = fit_planted_runs(0)
    for length in (128, 100_000):
        plan = plan_next(hp, fit, *TARGET, run_noise=noise, seq_len=length)
        counts = [b / length for b in (plan.batch_tokens, *plan.sweep.batch_tokens)]
        assert all(c >= 1 and c == round(c) for c in counts)
        assert counts[1] < counts[2] < counts[3]
    assert plan.sweep.batch_tokens == (1e5, 2e5, 3e5)


def test_the_limit_is_three_times_the_largest_run_and_a_tenth_of_the_target() -> None:
    hp = fit_planted_runs(0)[0]
    largest = 6 * 4e5 * 1.8e6
    assert compute_default_limit(hp, *TARGET) == pytest.approx(3 * largest)
    assert compute_default_limit(hp, 8e5, 5e6) == pytest.approx(0.1 * 6 * 8e5 * 5e6)
    for target in (TARGET, (8e5, 5e6), (4e5, 1e9), (1e9, 2e6)):
        for N, D in list_candidates(hp, *target):
            assert N <= target[0] * (1 + 1e-9)
            assert D <= max(target[1], 1.8e6)
            assert 6 * N * D <= compute_default_limit(hp, *target) * (1 + 1e-9)


def test_a_larger_run_narrows_more() -> None:
    hp, fit, noise, _ = fit_planted_runs(1)
    small, large = (
        plan_next(hp, fit, *TARGET, run_noise=noise, at_most=at_most).loss_half[1] for at_most in (5e12, 4e14)
    )
    assert large < 0.8 * small


def test_a_limit_too_low_for_any_run_is_refused_with_what_is_needed() -> None:
    hp, fit, noise, _ = fit_planted_runs(0)
    with pytest.raises(ValueError, match=r"needs .* FLOPs or more, got at most 100"):
        plan_next(hp, fit, *TARGET, run_noise=noise, at_most=100.0)
    with pytest.raises(ValueError, match="at_most must be positive"):
        list_candidates(hp, *TARGET, -1.0)


def test_a_run_smaller_than_every_other_is_hardly_a_gain() -> None:
    """The run has 3e10 FLOPs, the smallest in the data 1.2e11, and the target lies just beyond the data."""
    remaining = []
    for seed in range(8):
        hp, fit, noise, _ = fit_planted_runs(seed)
        (place,) = list_candidates(hp, 4.5e5, 2e6, 3e10)
        after = simulate_run(hp, fit, noise, *place, 4.5e5, 2e6, MASS)
        remaining.append(after / compute_loss_half_width(fit, noise, 4.5e5, 2e6, MASS))
    assert 0.9 < np.median(remaining) < 1.1


def test_a_run_that_gains_nothing_is_reported_as_such() -> None:
    hp, fit, noise, _ = fit_planted_runs(0)
    plan = plan_next(hp, fit, *TARGET, run_noise=noise)
    assert "raise --at-most" in str(replace(plan, loss_half=(0.01, 0.0095)))
    assert "raise --at-most" not in str(replace(plan, loss_half=(0.01, 0.0085)))
    assert "within a factor of 2.72 now, about ± 1.00 % after" in str(replace(plan, loss_half=(1.0, 0.01)))


def test_the_mup_prior_is_kept_when_runs_are_added() -> None:
    lone = fit_planted_runs(2, sizes=(1e5,), tokens=(2e5, 6e5))
    assert simulate_sweep(lone[0], lone[1], 1e5, 1.8e6).law.lr_N == pytest.approx(0.0, abs=0.01)
    plain = fit_planted_runs(2, LARGE, sizes=(1e8,), tokens=(2e9, 8e9), parametrization="standard")
    # What the lengths show of lr_D moves lr_N a little, because their sum is known better than each of them.
    assert simulate_sweep(plain[0], plain[1], 1e8, 3e10).law.lr_N == pytest.approx(-0.6, abs=0.15)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7B", 7e9),
        ("1.4T", 1.4e12),
        ("350M", 3.5e8),
        ("10k", 1e4),
        ("7e9", 7e9),
        ("7E+9", 7e9),
        (" 42 ", 42.0),
        (".5b", 5e8),
    ],
)
def test_counts_are_read_as_people_write_them(text: str, value: float) -> None:
    assert read_count(text) == value


@pytest.mark.parametrize("text", ["", "7,000", "7e9B", "-7B", "0", "7 B", "nan", "inf", "seven", "7e-3", "7G", "1e999"])
def test_anything_else_is_refused_as_a_count(text: str) -> None:
    with pytest.raises(ValueError, match="needed a positive count such as 7B"):
        read_count(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7e9, "7B"),
        (6.979e9, "6.98B"),
        (999.4, "999"),
        (999.7, "1K"),
        (999_700.0, "1M"),
        (1.4e12, "1.4T"),
        (2e15, "2e+15"),
        (1024, "1.02K"),
    ],
)
def test_counts_are_printed_with_three_digits(value: float, text: str) -> None:
    assert format_count(value) == text
