"""Mixtures of several sources: which is read when, what is measured, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.distributions import FloatDistribution
from pydantic import ValidationError

from proxies.config.mixture_weights import allot_windows, check_weights, normalize_weights
from proxies.config.proxy import ProxyConfig
from proxies.data.mixture import MAX_POSITION, MixedWindows, count_by_source, describe_data, open_data
from proxies.data.windows import Windows
from proxies.trainers.proxy_family import ProxyFamily
from proxies.training.checkpoints import load_state
from proxies.training.loop import evaluate, train
from scaling.laws.compute import Fidelity


def write_sources(tmp_path: Path, sizes: dict[str, int]) -> dict[str, str]:
    """Write one text file per name, each made of a letter of its own."""
    for letter, (name, size) in zip("abcdefgh", sizes.items(), strict=False):
        (tmp_path / f"{name}.txt").write_text((letter * 7 + " ") * (size // 8))
    return {name: str(tmp_path / f"{name}.txt") for name in sizes}


@pytest.fixture
def three(tmp_path: Path) -> dict[str, str]:
    return write_sources(tmp_path, {"python": 80_000, "docs": 40_000, "web": 24_000})


def make_config(corpus: Any, **changes: Any) -> ProxyConfig:
    settings: dict[str, Any] = {"seq_len": 16, "d_model": 32, "base_width": 32, "eval_windows": 12, "warmup_tokens": 64}
    return ProxyConfig.model_validate(settings | {"corpus": corpus} | changes)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8])
def test_every_prefix_holds_each_source_in_its_share(k: int) -> None:
    bound = 0.5 * max(1, math.ceil(math.log2(k)))
    for seed in range(20):
        shares = np.random.default_rng(seed).dirichlet(np.ones(k) * 0.7).tolist()
        i = np.arange(20_000)
        counts = count_by_source(i, shares)
        assert (counts.sum(axis=1) == i).all()
        steps = np.diff(counts, axis=0)
        assert ((steps == 0) | (steps == 1)).all()
        assert np.abs(counts - i[:, None] * np.array(shares)).max() <= bound + 1e-4


def test_a_source_without_a_share_is_never_read_and_large_positions_are_counted_exactly() -> None:
    positions = np.arange(MAX_POSITION - 1000, MAX_POSITION)
    counts = count_by_source(positions, [0.25, 0.0, 0.75])
    assert not counts[:, 1].any()
    assert np.abs(counts[:, 0] - positions / 4).max() <= 1
    with pytest.raises(ValueError, match="position up to"):
        MixedWindows([Windows(np.zeros(99, np.uint8), 4, 0)], [1.0]).batch(MAX_POSITION, 1)


def test_a_window_of_a_source_is_the_same_at_any_share(three: dict[str, str]) -> None:
    """The windows of python come in the same order; only the number of other windows between them changes."""
    windows = []
    for share in (0.2, 0.5, 0.9):
        data = open_data(make_config(three, mixture={"python": share, "docs": 1 - share, "web": 0.1}))
        x, _ = data.windows.batch(0, 200)
        windows.append(x[(x == ord("a")).any(1)])
    assert 30 < len(windows[0]) < len(windows[1]) < len(windows[2])
    for others in windows[1:]:
        assert torch.equal(others[: len(windows[0])], windows[0])


def test_sources_of_equal_length_are_not_read_in_step(tmp_path: Path) -> None:
    tokens = np.arange(20_000, dtype="<u2")
    for name in "ab":
        tokens.tofile(tmp_path / f"{name}.bin")
    data = open_data(make_config({n: str(tmp_path / f"{n}.bin") for n in "ab"}, vocab=20_000))
    x, _ = data.windows.batch(0, 200)
    # Equal shares alternate.
    first = {n: x[k::2, 0].tolist() for k, n in enumerate("ab")}
    assert len(set(first["a"]) & set(first["b"])) < 10


def test_a_batch_of_a_mixture_does_not_depend_on_batches_or_ranks(three: dict[str, str]) -> None:
    windows = open_data(make_config(three, mixture={"python": 5, "docs": 3, "web": 2}, order="epochs")).windows
    whole, _ = windows.batch(0, 300)
    backwards = torch.cat([windows.batch(start, 20)[0] for start in reversed(range(0, 300, 20))])
    assert torch.equal(torch.cat(backwards.split(20)[::-1]), whole)
    by_rank = torch.cat([windows.batch(100, 37, rank=r, ranks=3)[0] for r in range(3)])
    assert torch.equal(by_rank, whole[100:137])
    letters = [int((whole == ord(c)).any(1).sum()) for c in "abc"]
    assert letters == pytest.approx([150, 90, 60], abs=1)


def test_what_is_measured_does_not_depend_on_what_is_trained_on(three: dict[str, str]) -> None:
    one = open_data(make_config(three, mixture={"python": 1, "docs": 0, "web": 0}))
    other = open_data(make_config(three, mixture={"python": 1, "docs": 8, "web": 1}))
    assert torch.equal(one.held_out[0], other.held_out[0])
    assert {name: len(x) for name, (x, _) in one.held_out_by_source.items()} == {"python": 4, "docs": 4, "web": 4}
    weighted = open_data(make_config(three, eval_mixture={"python": 3, "docs": 1, "web": 0}))
    assert {name: len(x) for name, (x, _) in weighted.held_out_by_source.items()} == {"python": 9, "docs": 3}
    assert one.sha256 == weighted.sha256


def test_the_loss_is_the_mean_of_the_sources_in_fixed_shares_and_each_is_saved(
    three: dict[str, str], tmp_path: Path
) -> None:
    run = make_config(
        three, mixture={"python": 8, "docs": 1, "web": 1}, eval_mixture={"python": 1, "docs": 1, "web": 2}, lr=0.05
    )
    last = [*train(run, 4096, save=tmp_path / "run.pt")][-1]
    losses = load_state(tmp_path / "run.pt")["annealed"]["by_source"]
    assert set(losses) == {"python", "docs", "web"}
    assert last.loss == pytest.approx(losses["python"] / 4 + losses["docs"] / 4 + losses["web"] / 2, rel=1e-6)
    assert losses["python"] < losses["docs"], "it was read eight times as often"


def test_a_resumed_mixture_continues_as_if_uninterrupted(three: dict[str, str], tmp_path: Path) -> None:
    run = make_config(three, mixture={"python": 0.3, "docs": 0.5, "web": 0.2})
    whole = [*train(run, 8192)][-1]
    for _ in train(run, 4096, save=tmp_path / "half.pt"):
        pass
    resumed = [*train(run, 8192, resume=tmp_path / "half.pt")][-1]
    assert resumed.loss == whole.loss
    # It is measured on other windows, but trained alike.
    measured_elsewhere = make_config(three, mixture=run.mixture, eval_mixture={"python": 1, "docs": 0, "web": 0})
    train(measured_elsewhere, 8192, resume=tmp_path / "half.pt")
    other = make_config(three, mixture={"python": 0.3, "docs": 0.4, "web": 0.2})
    with pytest.raises(ValueError, match="mixture"):
        train(other, 8192, resume=tmp_path / "half.pt")


def test_the_order_in_which_sources_are_written_down_changes_nothing(three: dict[str, str]) -> None:
    weights = {"python": 5, "docs": 3, "web": 2}
    backwards = dict(reversed(three.items()))
    one = open_data(make_config(three, mixture=weights, eval_windows=13))
    other = open_data(make_config(backwards, mixture=dict(reversed(weights.items())), eval_windows=13))
    assert torch.equal(one.windows.batch(0, 50)[0], other.windows.batch(0, 50)[0])
    assert torch.equal(one.held_out[0], other.held_out[0])
    assert one.sha256 == other.sha256


def test_a_mixture_of_one_source_is_that_source(three: dict[str, str]) -> None:
    alone = open_data(make_config(three["python"]))
    named = open_data(make_config({"python": three["python"]}))
    assert torch.equal(alone.held_out[0], named.held_out[0])
    assert alone.windows.batch(0, 8)[0].shape == named.windows.batch(0, 8)[0].shape


def test_all_mistakes_in_weights_are_named_at_once(three: dict[str, str]) -> None:
    with pytest.raises(ValidationError) as caught:
        make_config(
            three, mixture={"pyton": 1, "docs": -1, "web": math.nan}, eval_mixture={"python": 0, "docs": 0, "web": 0}
        )
    message = str(caught.value)
    for part in (
        "pyton: unknown source; did you mean python?",
        "docs: needed a weight >= 0, got -1",
        "web: needed a finite number as its weight, got nan",
        "python: needed a weight, got none",
        "weight above 0",
    ):
        assert part in message
    with pytest.raises(ValidationError, match="x: unknown source; sources: only one, without a name"):
        make_config(three["docs"], mixture={"x": 1})
    with pytest.raises(ValidationError, match="names of letters"):
        make_config({"a b": three["docs"]})
    with pytest.raises(ValidationError, match="raise eval_windows"):
        make_config(three, eval_windows=2)


def test_shares_are_weights_over_their_sum_and_shares_stay_unchanged() -> None:
    shares = normalize_weights({"a": 3, "b": 9, "c": 1e-3}, ["a", "b", "c"])
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert shares["b"] == 3 * shares["a"]
    # Some of these sums differ from 1 in the last bit.
    for seed in range(100):
        drawn = dict(zip("abcde", np.random.default_rng(seed).uniform(size=5).tolist(), strict=True))
        once = normalize_weights(drawn, drawn)
        assert normalize_weights(once, once) == once
    assert normalize_weights({}, ["x", "y"]) == {"x": 0.5, "y": 0.5}
    assert check_weights({}, ["x", "y"]) == []


def test_allotted_windows_are_within_one_of_their_shares() -> None:
    for seed in range(50):
        shares = np.random.default_rng(seed).dirichlet(np.ones(5)).tolist()
        counts = allot_windows(64, shares)
        assert sum(counts) == 64
        assert np.abs(np.array(counts) - 64 * np.array(shares)).max() < 1
    assert allot_windows(64, [0.5, 0.25, 0.25]) == [32, 16, 16]


def test_a_weight_can_be_searched_and_its_share_is_recorded(three: dict[str, str]) -> None:
    family = ProxyFamily.model_validate(
        {"widths": [16, 32], "seq_len": 16, "corpus": three, "mixture": {"python": 7, "docs": 2, "web": 1}}
    )
    fidelity = Fidelity(family.sizes[0], 4096)
    record = family.describe({"mix.docs": 12.0}, fidelity)
    assert record["mixture"] == pytest.approx({"python": 0.35, "docs": 0.6, "web": 0.05})
    assert (record["mix.python"], record["mix.docs"]) == pytest.approx((0.35, 0.6))
    assert record["tokens_per_epoch"] == min(round(record[f"data_tokens.{n}"] / record[f"mix.{n}"]) for n in three)
    assert {f["source"] for f in family.manifest()} == set(three)
    assert family.problems({"mix.docs": FloatDistribution(0.1, 10, log=True)}, None) == []


def test_a_source_that_cannot_be_searched_is_named(three: dict[str, str]) -> None:
    family = ProxyFamily.model_validate({"widths": [16, 32], "seq_len": 16, "corpus": three})
    space = {"mix.dogs": FloatDistribution(0.1, 10), "mix.web": FloatDistribution(-1, 10)}
    problems = "\n".join(family.problems(space, None))
    assert "space.mix.dogs: unknown parameter; did you mean mix.docs?" in problems
    assert "space.mix.web: " in problems
    assert "weight >= 0, got -1" in problems


def test_each_source_is_checked_by_name(three: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r"docs: .*no such path"):
        ProxyFamily.model_validate({"corpus": three | {"docs": "nowhere"}, "widths": [16, 32]})


def test_the_loss_of_a_source_is_measured_on_its_own_windows(three: dict[str, str]) -> None:
    from proxies.model.transformer import build

    run = make_config(three)
    data, model = open_data(run), build(run)
    by_source = [evaluate(model, part) for part in data.held_out_by_source.values()]
    assert evaluate(model, data.held_out) == pytest.approx(sum(by_source) / 3, rel=1e-6)


def test_a_record_shows_how_often_the_text_is_read(three: dict[str, str]) -> None:
    alone = describe_data(make_config(three["python"]))
    assert alone["tokens_per_epoch"] == alone["data_tokens"]
    assert alone["bytes_per_token"] == 1.0
