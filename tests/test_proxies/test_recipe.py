"""Recipes over batch size, run length and decay timescale: what stays the same, and each exponent by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxies.config.proxy import ProxyConfig
from proxies.model.mup import compute_rules
from proxies.model.recipe import Recipe, compute_timescale

BASE = ProxyConfig(lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, batch_seqs=16, d_model=64, n_layers=2)
D = 2_000_000


def test_nothing_changes_at_the_tuned_size_and_length() -> None:
    same = Recipe(base=BASE, tokens=D).at()
    assert same.model_copy(update={"base_layers": None}) == BASE
    assert compute_rules(same) == compute_rules(BASE)


def test_four_times_the_batch_by_hand() -> None:
    """The rate doubles, each beta is four times as far from 1, the epsilon halves, and the timescale stays the same."""
    moved = Recipe(base=BASE, tokens=D).at(batch_seqs=64)
    assert (moved.lr, moved.beta1, moved.beta2, moved.eps) == pytest.approx((0.02, 0.6, 0.8, 0.5e-8))
    assert moved.weight_decay == pytest.approx(0.2)


def test_ten_times_the_tokens_by_hand() -> None:
    moved = Recipe(base=BASE, tokens=D).at(tokens=10 * D)
    assert moved.lr == pytest.approx(0.01 * 10**-0.32)
    assert moved.weight_decay == pytest.approx(0.1 * 10 ** (0.32 - 1))
    assert (moved.beta1, moved.eps) == (BASE.beta1, BASE.eps)


def test_the_timescale_follows_tokens_per_parameter_if_its_power_is_set() -> None:
    recipe = Recipe(base=BASE, tokens=D, timescale_power=0.5)
    assert compute_timescale(recipe.at(tokens=4 * D), 4 * D) == pytest.approx(compute_timescale(BASE, D) / 2)
    wide = recipe.at(d_model=128)
    assert compute_timescale(wide, D) == pytest.approx(
        compute_timescale(BASE, D) * (wide.counts.N / BASE.counts.N) ** 0.5
    )


@settings(max_examples=60, deadline=None)
@given(
    seqs=st.integers(1, 150),
    tokens=st.integers(100_000, 10**12),
    width=st.sampled_from([16, 64, 256]),
    layers=st.integers(1, 24),
    power=st.floats(0, 1),
)
def test_the_decay_of_a_whole_run_is_the_same_everywhere(
    seqs: int, tokens: int, width: int, layers: int, power: float
) -> None:
    """The invariant, of the values that the optimizer gets: rate times decay of the hidden matrices, times steps."""
    moved = Recipe(base=BASE, tokens=D, horizon_power=power).at(
        d_model=width, n_layers=layers, batch_seqs=seqs, tokens=tokens
    )
    new, base = compute_rules(moved)["hidden"], compute_rules(BASE)["hidden"]
    steps = tokens / moved.batch_tokens
    assert new.lr * new.weight_decay * steps == pytest.approx(base.lr * base.weight_decay * D / BASE.batch_tokens)


def test_two_changes_in_a_row_equal_one() -> None:
    once = Recipe(base=BASE, tokens=D).at(batch_seqs=64, tokens=6 * D, n_layers=8)
    half = Recipe(base=BASE, tokens=D).at(batch_seqs=32, tokens=3 * D, n_layers=4)
    twice = Recipe(base=half, tokens=3 * D).at(batch_seqs=64, tokens=6 * D, n_layers=8)
    for name in ("lr", "weight_decay", "beta1", "beta2", "eps", "r"):
        assert getattr(twice, name) == pytest.approx(getattr(once, name))


def test_the_tuned_depth_becomes_the_base_depth() -> None:
    deep = Recipe(base=BASE, tokens=D).at(n_layers=8, d_model=128)
    assert (deep.r, deep.m) == (4.0, 2.0)
    assert compute_rules(deep)["hidden"].multiplier == 0.25


def test_a_batch_beyond_the_betas_is_refused_with_the_largest_one() -> None:
    with pytest.raises(ValueError, match=r"needed less than 160, where 1 - beta reaches 1, got 160"):
        Recipe(base=BASE, tokens=D).at(batch_seqs=160)
    assert Recipe(base=BASE, tokens=D).at(batch_seqs=159).beta1 > 0


def test_an_optimizer_without_a_batch_rule_keeps_its_batch() -> None:
    recipe = Recipe(base=BASE.model_copy(update={"optimizer": "muon"}), tokens=D)
    assert recipe.at(tokens=2 * D).batch_seqs == 16
    with pytest.raises(ValueError, match="no batch rule is known for 'muon'"):
        recipe.at(batch_seqs=32)


def test_a_run_shorter_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="a step of 2,048 tokens"):
        Recipe(base=BASE, tokens=2_000)
    with pytest.raises(ValueError, match="a step of 2,048 tokens"):
        Recipe(base=BASE, tokens=D).at(tokens=2_000)


def test_without_decay_the_timescale_is_infinite() -> None:
    assert compute_timescale(BASE.model_copy(update={"weight_decay": 0.0}), D) == float("inf")
    assert Recipe(base=BASE.model_copy(update={"weight_decay": 0.0}), tokens=D).at(tokens=2 * D).weight_decay == 0
