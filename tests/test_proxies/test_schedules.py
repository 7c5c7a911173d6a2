from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from proxies.schedules import wsd

# By hand: warm-up over 100, branch at 800, end at 1000; 1 - sqrt(u) at u = 0, 1/4, 9/16, 1.
TABLE = [(0, 0.0), (25, 0.25), (100, 1.0), (500, 1.0), (800, 1.0), (850, 0.5), (912.5, 0.25), (1000, 0.0), (1100, 0.0)]


@pytest.mark.parametrize(("tokens", "factor"), TABLE)
def test_wsd_goes_through_the_points_written_by_hand(tokens: float, factor: float) -> None:
    assert wsd(tokens, warmup_tokens=100, branch=800, end=1000) == pytest.approx(factor, abs=1e-12)


def test_the_trunk_does_not_know_the_horizon() -> None:
    for tokens in (0, 50, 100, 799, 800):
        factors = {wsd(tokens, warmup_tokens=100, branch=b, end=2 * b) for b in (800, 8000, 10**9)}
        assert factors == {wsd(tokens, warmup_tokens=100)}


def test_it_rises_then_falls_and_stays_between_zero_and_one() -> None:
    values = [wsd(t, warmup_tokens=100, branch=800, end=1000) for t in range(1001)]
    assert all(a <= b for a, b in pairwise(values[:801]))
    assert all(a > b for a, b in pairwise(values[800:]))
    assert (min(values), max(values)) == (0.0, 1.0)


def test_mean_of_a_cooldown_sampled_in_the_middle_of_steps_is_a_third() -> None:
    # the integral of 1 - sqrt(u) is 1/3, and the training loop samples at midpoints
    middles = 800 + (np.arange(50) + 0.5) * 4
    mean = np.mean([wsd(t, warmup_tokens=100, branch=800, end=1000) for t in middles])
    assert mean == pytest.approx(1 / 3, abs=1e-3)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert wsd(0, warmup_tokens=0) == 1.0


@pytest.mark.parametrize(("branch", "end"), [(50, 1000), (800, 800), (800, 700), (800, math.inf)])
def test_phases_out_of_order_are_refused(branch: float, end: float) -> None:
    with pytest.raises(ValueError, match="warmup_tokens <= branch < end"):
        wsd(0, warmup_tokens=100, branch=branch, end=end)
