"""Schedules as functions of tokens: one contract for all, tables by hand, and published numbers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from proxies.config.proxy import DecayName, ProxyConfig, ScheduleName
from proxies.config.schedules import SCHEDULES, compute_lr_factor, find_unused_settings
from scaling.curves.schedules import make_cooldown_schedule
from scaling.laws.decay_shapes import DECAYS

WARMUP, BRANCH, END = 100, 800, 1000


def make_settings(schedule: ScheduleName = "wsd", **changes: Any) -> ProxyConfig:
    """Return settings with a warm-up of 100 tokens; power and inverse-sqrt start to fall at 400 tokens."""
    small = {"warmup_tokens": WARMUP, "sqrt_tokens": 400, "batch_seqs": 16, "lr": 0.01, "power_b": -0.5}
    return ProxyConfig(schedule=schedule, **({"power_a": 0.01 * 20 / 16} | small | changes))


def factor_at(config: ProxyConfig, tokens: float, *, branch: float = BRANCH, end: float = END) -> float:
    return compute_lr_factor(config, tokens, branch=branch, end=end)


MEMBERS = [
    make_settings(name, decay=decay)
    for name, schedule in SCHEDULES.items()
    for decay in (DECAYS if schedule.has_cooldown else ("1-sqrt",))
]
FREE = [m for m in MEMBERS if not SCHEDULES[m.schedule].has_horizon]
BOUND = [m for m in MEMBERS if SCHEDULES[m.schedule].has_horizon]


def get_name(member: ProxyConfig) -> str:
    return f"{member.schedule}, {member.decay}"


def get_promised_end(member: ProxyConfig) -> float:
    """Return the final factor by the table in proxies/config/schedules.py.

    Power and inverse-sqrt are at sqrt(400 / 800) at the branch.
    """
    trunk = {"wsd": 1.0, "power": math.sqrt(0.5), "inverse-sqrt": math.sqrt(0.5)}
    if member.schedule in trunk:
        return trunk[member.schedule] * 0.1 if member.decay == "exponential" else 0.0
    return {"constant": 1.0, "cosine": 0.1, "linear": 0.0, "rex": 0.0}[member.schedule]


def test_every_name_is_in_the_registry_and_the_other_way_round() -> None:
    assert set(SCHEDULES) == set(get_args(ScheduleName))
    assert set(DECAYS) == set(get_args(DecayName))
    assert {name for name, s in SCHEDULES.items() if s.has_horizon} == {"cosine", "linear", "rex"}
    assert {name for name, s in SCHEDULES.items() if s.has_cooldown} == {"wsd", "power", "inverse-sqrt"}


@pytest.mark.parametrize("member", MEMBERS, ids=get_name)
class TestEverySchedule:
    def test_starts_at_zero_or_without_warm_up_at_its_peak(self, member: ProxyConfig) -> None:
        assert factor_at(member, 0) == 0.0
        assert factor_at(member.model_copy(update={"warmup_tokens": 0}), 0) == 1.0

    def test_is_at_its_peak_after_the_warm_up_to_which_it_rises_in_a_straight_line(self, member: ProxyConfig) -> None:
        assert factor_at(member, WARMUP) == 1.0
        assert [factor_at(member, t) for t in (25, 50, 75)] == pytest.approx([0.25, 0.5, 0.75], abs=1e-12)

    def test_stays_between_zero_and_one_and_never_rises_again(self, member: ProxyConfig) -> None:
        values = [factor_at(member, t) for t in range(END + 50)]
        assert 0 <= min(values) <= max(values) == 1.0
        assert all(a >= b for a, b in pairwise(values[WARMUP:]))

    def test_ends_where_promised_and_stays_there(self, member: ProxyConfig) -> None:
        assert factor_at(member, END) == pytest.approx(get_promised_end(member), abs=1e-12)
        if member.schedule != "constant":
            assert factor_at(member, END + 50) == pytest.approx(get_promised_end(member), abs=1e-12)

    def test_is_continuous(self, member: ProxyConfig) -> None:
        # 1 - sqrt falls by sqrt(h / 200) in the first h tokens of its cooldown; no schedule changes faster.
        tokens = np.linspace(0, END, 200_001)
        steps = np.abs(np.diff([factor_at(member, t) for t in tokens]))
        assert steps.max() <= math.sqrt(0.005 / 200) * 1.001

    def test_is_the_same_in_other_units_of_tokens(self, member: ProxyConfig) -> None:
        """Only power has a scale of its own in tokens: a in the new unit is a 1000^-b."""
        bigger = member.model_copy(
            update={"warmup_tokens": WARMUP * 1000, "sqrt_tokens": 400_000, "power_a": member.power_a * 1000**0.5}
        )
        for t in (1, 99, 100, 399, 500, 801, 950, 999, 1000):
            rescaled = factor_at(bigger, t * 1000, branch=BRANCH * 1000, end=END * 1000)
            assert rescaled == pytest.approx(factor_at(member, t), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("member", FREE, ids=get_name)
def test_without_a_horizon_the_trunk_does_not_depend_on_the_end(member: ProxyConfig) -> None:
    for tokens in (0, 50, 100, 399, 500, 799, 800):
        factors = {factor_at(member, tokens, branch=b, end=2 * b) for b in (800, 8000, 10**9)}
        assert factors == {compute_lr_factor(member, tokens)}


@pytest.mark.parametrize("member", BOUND, ids=get_name)
def test_with_a_horizon_every_step_after_the_warm_up_depends_on_it(member: ProxyConfig) -> None:
    for tokens in (101, 300, 800):
        assert compute_lr_factor(member, tokens, end=1000) < compute_lr_factor(member, tokens, end=1001)
    with pytest.raises(ValueError, match=r"needed warmup_tokens < end < inf"):
        compute_lr_factor(member, 300)


# Factors by hand, with a warm-up of 100 tokens, the branch at 800 and the end at 1000.
TABLE: list[tuple[ProxyConfig, dict[float, float]]] = [
    (make_settings("wsd"), {500: 1, 850: 0.5, 912.5: 0.25}),
    (make_settings("wsd", decay="linear"), {500: 1, 850: 0.75, 900: 0.5}),
    (make_settings("wsd", decay="cosine"), {850: (2 + math.sqrt(2)) / 4, 900: 0.5}),
    (make_settings("wsd", decay="square"), {850: 0.9375, 900: 0.75}),
    (make_settings("wsd", decay="exponential"), {900: math.sqrt(0.1), 1000: 0.1}),
    (make_settings("wsd", decay="exponential", lr_floor=1 / 16), {850: 1 / 2, 900: 1 / 4, 950: 1 / 8}),
    (make_settings("inverse-sqrt"), {100: 1, 400: 1, 640: math.sqrt(0.625), 850: math.sqrt(0.5) / 2}),
    (make_settings("power"), {100: 1, 400: 1, 640: math.sqrt(0.625), 850: math.sqrt(0.5) / 2}),
    (make_settings("cosine"), {550: 0.55, 325: 0.1 + 0.9 * (2 + math.sqrt(2)) / 4}),
    (make_settings("cosine", lr_floor=0), {550: 0.5}),
    (make_settings("linear"), {550: 0.5, 325: 0.75}),
    (make_settings("rex"), {550: 2 / 3, 325: 6 / 7}),
    (make_settings("constant"), {500: 1, 999: 1}),
]


@pytest.mark.parametrize(("member", "points"), TABLE, ids=lambda v: get_name(v) if isinstance(v, ProxyConfig) else "")
def test_it_goes_through_the_points_written_by_hand(member: ProxyConfig, points: dict[float, float]) -> None:
    for tokens, share in points.items():
        assert factor_at(member, tokens) == pytest.approx(share, abs=1e-12)


def test_power_has_the_papers_rate_in_the_papers_units() -> None:
    # arXiv 2408.13359: with 128 sequences per step, after a billion tokens, 4.6 * 128 * (1e9)^-0.51 = 1.5e-2, below
    # eta_max = 2e-2.
    config = ProxyConfig(schedule="power", lr=0.02, batch_seqs=128)
    assert config.lr * compute_lr_factor(config, 1e9) == pytest.approx(1.513e-2, rel=1e-3)
    assert config.lr * compute_lr_factor(config, 1e8) == 0.02


@pytest.mark.parametrize("member", MEMBERS, ids=get_name)
def test_sampling_in_the_middle_of_steps_gives_the_mean_of_the_schedule(member: ProxyConfig) -> None:
    """The training loop samples there. The reference is the mean of 100,000 points, for 10 and 50 cooldown steps."""
    fine = np.mean([factor_at(member, t) for t in BRANCH + (np.arange(100_000) + 0.5) * 0.002])
    for steps in (10, 50):
        middles = BRANCH + (np.arange(steps) + 0.5) * 200 / steps
        assert np.mean([factor_at(member, t) for t in middles]) == pytest.approx(fine, abs=0.1 / steps)
    if get_name(member) == "wsd, 1-sqrt":
        assert fine == pytest.approx(1 / 3, abs=1e-4)


def test_wsd_is_the_schedule_that_forecasts_use() -> None:
    ours = [factor_at(make_settings("wsd"), t) for t in range(0, 1001, 7)]
    expected = make_cooldown_schedule(1000.0, share=0.2, warmup=100.0)(np.arange(0, 1001, 7.0))
    assert ours == pytest.approx(expected.tolist(), abs=1e-12)


def test_cosine_and_linear_agree_with_torch() -> None:
    def run_torch(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler, rates = make(optimizer), []
        for _ in range(901):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    cosine = run_torch(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=900, eta_min=0.1))
    linear = run_torch(
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=900)
    )
    assert [factor_at(make_settings("cosine"), 100 + t) for t in range(901)] == pytest.approx(cosine, abs=1e-9)
    assert [factor_at(make_settings("linear"), 100 + t) for t in range(901)] == pytest.approx(linear, abs=1e-9)


@pytest.mark.parametrize(("branch", "end"), [(50, 1000), (800, 800), (800, 700), (800, math.inf)])
def test_phases_out_of_order_are_refused(branch: float, end: float) -> None:
    with pytest.raises(ValueError, match="warmup_tokens <= branch < end"):
        factor_at(make_settings(), 0, branch=branch, end=end)


def test_a_setting_that_a_schedule_never_reads_does_not_change_it() -> None:
    """A setting that it reads does change it: the list of unused settings is checked against the formulas."""
    others = {"cooldown": 0.5, "lr_floor": 0.3, "power_a": 0.005, "power_b": -0.7, "sqrt_tokens": 200}
    for member in MEMBERS:
        branch = (1 - member.cooldown) * END
        for name, value in others.items():
            changed = member.model_copy(update={name: value})
            after = (1 - changed.cooldown) * END
            same = all(
                factor_at(member, t, branch=branch) == factor_at(changed, t, branch=after)
                for t in range(WARMUP + 1, END, 50)
            )
            assert same == (name in find_unused_settings(member)), (get_name(member), name)


def test_an_exponential_decay_to_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match="needs lr_floor > 0"):
        ProxyConfig(decay="exponential", lr_floor=0)
