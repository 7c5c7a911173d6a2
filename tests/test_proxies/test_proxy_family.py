"""The trainer that a study names: its sizes, what it refuses, what it records."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from pydantic import ValidationError

from proxies.config.proxy import ProxyConfig
from proxies.trainers.proxy_family import SEARCHABLE, ProxyFamily
from proxies.training.throughput import measure_speed
from scaling.laws.compute import Fidelity

FAMILY = ProxyFamily(widths=(64, 32), seq_len=32, warmup_tokens=512, eval_windows=8)


def test_sizes_ascend_and_map_back_to_their_widths() -> None:
    assert list(FAMILY.sizes) == sorted(FAMILY.sizes)
    for width, N in zip((32, 64), FAMILY.sizes, strict=True):
        config = FAMILY.config({"lr": 0.02, "batch_seqs": 3}, Fidelity(N, 4096))
        assert (config.d_model, config.lr, config.batch_seqs, config.counts.N) == (width, 0.02, 3, N)


def test_a_repeat_is_the_same_settings_on_another_seed() -> None:
    family = FAMILY.model_copy(update={"seed": 7})
    fidelity = Fidelity(family.sizes[0], 4096)
    first, third = (family.config({"lr": 0.02}, fidelity, repeat=r) for r in (0, 2))
    assert first == family.config({"lr": 0.02}, fidelity)
    assert (first.seed, third.seed) == (7, 9)
    assert third.model_copy(update={"seed": 7}) == first


def test_a_repeat_trains_other_initial_weights_on_another_order(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("all the world's a stage, and all the men and women merely players " * 400)
    family = FAMILY.model_copy(update={"corpus": str(text)})
    fidelity = Fidelity(family.sizes[0], 4096)
    losses = [[*family({}, fidelity, repeat=r)][-1].loss for r in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == pytest.approx(losses[0], rel=0.3)
    assert family.describe({}, fidelity, repeat=1)["seed"] == family.seed + 1


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match="no width of this family has N = 12345"):
        FAMILY.config({}, Fidelity(12345, 4096))


def test_searched_values_are_checked_like_settings() -> None:
    with pytest.raises(ValidationError, match="beta2"):
        FAMILY.config({"beta2": 1.5}, Fidelity(FAMILY.sizes[0], 4096))


def test_searchable_settings_do_not_change_the_shape() -> None:
    base = FAMILY.member(32)
    for name in SEARCHABLE:
        assert name in ProxyConfig.model_fields
        value = getattr(base, name)
        other = FAMILY.member(32, {name: value * 2 if isinstance(value, int) else value / 2})
        assert other.counts == base.counts


def test_problems_are_named_by_their_field() -> None:
    space = {
        "lr": FloatDistribution(1e-3, 1.0),
        "n_layers": IntDistribution(1, 4),
        "batch_seqs": IntDistribution(1, 64),
    }
    problems = "\n".join(FAMILY.problems(space, (2048, 8192)))
    assert "space.n_layers: unknown parameter" in problems
    assert (
        "search.tokens.min: the smallest run must hold at least two of the largest steps (2 x 2,048 = 4,096 tokens)"
        in problems
    )
    assert FAMILY.problems({"lr": FloatDistribution(1e-3, 1.0)}, (2048, 8192)) == []


def test_the_record_of_a_run_has_its_counts_and_its_data(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("all the world's a stage " * 4000)
    family = FAMILY.model_copy(update={"corpus": str(text)})
    record = family.describe({"lr": 0.02}, Fidelity(family.sizes[0], 4096))
    assert record["lr"] == 0.02
    assert record["batch_tokens"] == family.batch_seqs * 32
    assert record["N"] < record["N_total"]
    assert len(record["data_sha256"]) == 64
    assert record["data_tokens"] < text.stat().st_size, "some of it is held out"


def test_the_target_is_a_member_of_the_family() -> None:
    assert FAMILY.target(d_model=128, tokens=1000) == Fidelity(float(FAMILY.member(128).counts.N), 1000.0)
    with pytest.raises(ValidationError, match="multiple of d_head"):
        FAMILY.target(d_model=100, tokens=1000)
    with pytest.raises(ValidationError, match="shrink"):
        FAMILY.target(d_model=128, tokens=1000, shrink=2)


def test_speed_is_measured_and_wider_is_slower() -> None:
    slow, fast = (measure_speed(FAMILY.member(w, {"batch_seqs": 16}), threads=1, min_seconds=0.1) for w in (256, 32))
    assert 0 < slow < fast
