from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from proxies import training
from proxies.checkpoints import load_model, load_state, write_state
from proxies.config import ProxyConfig
from proxies.data import held_out, load_corpus
from proxies.model import build
from proxies.training import evaluate, plan, point_steps, train
from scaling.runs import Measurement


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise equality holds for one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes: Any) -> ProxyConfig:
    small = {
        "d_model": 32,
        "base_width": 32,
        "n_layers": 1,
        "seq_len": 16,
        "batch_seqs": 8,
        "warmup_tokens": 256,
        "eval_windows": 8,
    }
    return ProxyConfig(**(small | changes))


def same_numbers(a: Measurement, b: Measurement) -> bool:
    """Everything but the time."""
    return (a.tokens, a.loss, a.lr, a.train_loss, a.final, a.diverged) == (
        b.tokens,
        b.loss,
        b.lr,
        b.train_loss,
        b.final,
        b.diverged,
    )


def same_weights(a: Path, b: Path, which: Any = "annealed") -> bool:
    models = [load_model(path, which)[1] for path in (a, b)]
    return all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_a_run_ends_at_exactly_its_tokens_and_learns() -> None:
    *points, final = train(config(), 10_000)
    assert final.final
    assert not final.diverged
    assert final.tokens == 10_000
    assert final.loss < 0.8 * math.log(256)
    assert final.lr == 0.0
    assert points
    assert not any(p.final for p in points)
    assert [p.tokens for p in points] == sorted({p.tokens for p in points})
    assert all(256 <= p.tokens <= 8000 and p.lr == config().lr for p in points)


def test_tokens_are_rounded_down_to_whole_windows() -> None:
    *_, final = train(config(), 3_015)
    assert final.tokens == 3_008


@pytest.mark.parametrize(
    ("tokens", "cut"),
    [
        (1280, (1280, 8, 10)),  # 80 windows, 10 batches: 8 of trunk
        (1312, (1312, 8, 11)),  # 82 windows: floor(8.2) of trunk, then 8 + 8 + 2 windows
        (1300, (1296, 8, 11)),
        (640, (640, 4, 5)),  # 0.8 * 5 is 4, not 3.9999
    ],
)
def test_a_plan_is_cut_as_written_by_hand(tokens: int, cut: tuple[int, int, int]) -> None:
    ours = plan(config(), tokens)
    assert (ours.tokens, ours.trunk_steps, ours.steps) == cut


def test_the_shortest_run_named_in_the_error_is_possible_and_one_token_less_is_not() -> None:
    for changes in ({}, {"warmup_tokens": 0}, {"warmup_tokens": 1000, "cooldown": 0.37, "batch_seqs": 3}):
        c = config(**changes)
        with pytest.raises(ValueError, match="needed at least") as error:
            plan(c, 10)
        least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
        assert plan(c, least).trunk_steps * c.batch_tokens >= c.warmup_tokens
        with pytest.raises(ValueError, match="needed at least"):
            plan(c, least - 1)


def test_points_are_two_an_octave_and_do_not_depend_on_the_end() -> None:
    c = ProxyConfig()
    long = sorted(point_steps(c, 4000))
    assert sorted(point_steps(c, 500)) == [s for s in long if s <= 500]
    ratios = [b / a for a, b in pairwise(long)]
    assert all(1.3 < r < 1.55 for r in ratios[2:])
    assert long[0] * c.batch_tokens >= c.warmup_tokens


def test_evaluation_costs_a_small_share_of_a_short_run() -> None:
    c = ProxyConfig()
    for tokens in (40_000, 80_000, 400_000):
        forward_passes = 1 + len(point_steps(c, plan(c, tokens).trunk_steps))
        assert forward_passes * c.eval_windows * c.seq_len / 3 < 0.15 * tokens


def test_the_same_run_twice_gives_the_same_numbers() -> None:
    first, second = (list(train(config(), 3_000)) for _ in range(2))
    assert all(same_numbers(a, b) for a, b in zip(first, second, strict=True))


def test_the_loss_is_that_of_the_annealed_weights_on_held_out_windows(tmp_path: Path) -> None:
    *_, final = train(config(), 3_000, save=tmp_path / "run.pt")
    c, model = load_model(tmp_path / "run.pt")
    corpus = load_corpus("stdlib")
    x, y = held_out(corpus.val, 16, 8)
    assert evaluate(model, (x, y)) == final.loss
    by_hand = torch.stack([-model(x[i : i + 1])[0].log_softmax(-1)[torch.arange(16), y[i]].mean() for i in range(8)])
    assert float(by_hand.detach().mean()) == pytest.approx(final.loss, rel=1e-5)
    assert c == config()
    assert load_state(tmp_path / "run.pt")["annealed"]["measurement"]["loss"] == final.loss


@pytest.mark.parametrize("longer", [5_000, 12_040])
def test_an_extended_run_is_bitwise_the_straight_one(tmp_path: Path, longer: int) -> None:
    straight = list(train(config(), longer, save=tmp_path / "straight.pt"))
    list(train(config(), 2_500, save=tmp_path / "short.pt"))
    extended = list(train(config(), longer, resume=tmp_path / "short.pt", save=tmp_path / "extended.pt"))
    assert all(same_numbers(a, b) for a, b in zip(straight[-len(extended) :], extended, strict=True))
    assert same_weights(tmp_path / "straight.pt", tmp_path / "extended.pt")
    assert same_weights(tmp_path / "straight.pt", tmp_path / "extended.pt", "trunk")
    assert not same_weights(tmp_path / "straight.pt", tmp_path / "short.pt")
    assert len(extended) < len(straight)  # only the new part was trained


def test_a_finished_run_can_be_annealed_again(tmp_path: Path) -> None:
    *_, first = train(config(), 2_500, save=tmp_path / "run.pt")
    *_, again = train(config(), 2_500, resume=tmp_path / "run.pt")
    assert same_numbers(first, again)


@pytest.mark.parametrize("stop_at", [3, 15, 16, 17, 19])  # of 20 steps: 16 of trunk, then cooldown
@pytest.mark.parametrize("within_a_step", [False, True])
def test_a_run_cut_off_at_any_step_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, within_a_step: bool
) -> None:
    straight = list(train(config(), 2_560, save=tmp_path / "straight.pt"))
    keep = tmp_path / "keep.pt"
    advance = training._Run.advance

    def cut_off(run: Any, windows: Any) -> None:
        if run.step == stop_at and not within_a_step:
            raise OSError("no power, so nothing more is written")
        advance(run, windows)
        if run.step > stop_at:
            raise KeyboardInterrupt  # the weights have moved, the generator does not know it yet

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "advance", cut_off)
        with pytest.raises((OSError, KeyboardInterrupt)):
            list(train(config(), 2_560, keep=keep, keep_every_s=0.0))  # 0: a copy after every step
    assert load_state(keep)["phase"] == ("trunk" if stop_at <= 16 else "cooldown")
    rest = list(train(config(), 2_560, resume=keep, keep=keep, save=tmp_path / "rest.pt"))
    assert same_numbers(rest[-1], straight[-1])
    assert same_weights(tmp_path / "straight.pt", tmp_path / "rest.pt")
    assert same_weights(tmp_path / "straight.pt", tmp_path / "rest.pt", "trunk")
    assert not keep.exists()  # removed on completion


def test_a_run_closed_at_a_point_goes_on_after_it(tmp_path: Path) -> None:
    straight = list(train(config(), 4_000))
    run = train(config(), 4_000, keep=tmp_path / "keep.pt")
    seen = [next(run), next(run)]
    run.close()
    seen += train(config(), 4_000, resume=tmp_path / "keep.pt")
    assert len(straight) >= 4
    assert all(same_numbers(a, b) for a, b in zip(straight, seen, strict=True))


@pytest.mark.parametrize("nth", [1, 2, -1])
def test_an_interrupt_while_evaluating_loses_no_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    straight = list(train(config(), 4_000))
    stop = range(len(straight))[nth]
    calls = iter(range(100))

    def interrupted(*args: Any) -> float:
        if next(calls) == stop:
            raise KeyboardInterrupt
        return evaluate(*args)

    seen: list[Measurement] = []
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            seen.extend(iter(train(config(), 4_000, keep=tmp_path / "keep.pt")))
    rest = list(train(config(), 4_000, resume=tmp_path / "keep.pt"))
    assert all(same_numbers(a, b) for a, b in zip(straight[stop:], rest, strict=True))


def test_a_run_cut_off_in_its_cooldown_can_be_extended_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(train(config(), 4_000, save=tmp_path / "straight.pt"))
    with monkeypatch.context() as patch:

        def interrupted(*args: Any) -> float:
            raise KeyboardInterrupt

        patch.setattr(training, "evaluate", interrupted)
        patch.setattr(training, "point_steps", lambda *_: frozenset())
        with pytest.raises(KeyboardInterrupt):
            list(train(config(), 2_560, keep=tmp_path / "keep.pt"))
    assert load_state(tmp_path / "keep.pt")["phase"] == "cooldown"
    list(train(config(), 4_000, resume=tmp_path / "keep.pt", save=tmp_path / "longer.pt"))
    assert same_weights(tmp_path / "straight.pt", tmp_path / "longer.pt")


def test_another_run_is_not_resumed_and_the_differences_are_named(tmp_path: Path) -> None:
    saved = tmp_path / "run.pt"
    list(train(config(), 4_000, save=saved))
    with pytest.raises(ValueError, match=r"lr: 0\.0078125 there, 0\.5 here; seed: 0 there, 1 here"):
        train(config(lr=0.5, seed=1), 5_000, resume=saved)
    with pytest.raises(ValueError, match="trunk: 25 steps there, 16 here"):
        train(config(), 2_560, resume=saved)
    other = tmp_path / "other.txt"
    other.write_text("some other text. " * 1000)
    with pytest.raises(ValueError, match="data: sha256"):
        train(config(corpus=str(other)), 5_000, resume=saved)
    with pytest.raises(ValueError, match="no such file"):
        train(config(), 5_000, resume=tmp_path / "missing.pt")
    write_state({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="format None"):
        train(config(), 5_000, resume=tmp_path / "foreign.pt")
    *_, final = train(config(eval_windows=4), 5_000, resume=saved)  # how it is measured may change
    assert final.final


def test_bad_arguments_are_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needed at least"):
        train(config(), 100)
    with pytest.raises(ValueError, match="existing folder"):
        train(config(), 4_000, save=tmp_path / "missing" / "run.pt")
    with pytest.raises(ValueError, match="no such path"):
        train(config(corpus=str(tmp_path / "missing.txt")), 4_000)
    with pytest.raises(ValueError, match=r"embed: \(256, 64\) given, \(256, 32\) needed"):
        train(config(), 4_000, init=build(config(d_model=64)).state_dict())
    with pytest.raises(ValueError, match="got both"):
        train(config(), 4_000, init={}, resume=tmp_path / "run.pt")


def test_a_warm_start_begins_from_the_given_weights(tmp_path: Path) -> None:
    *_, cold = train(config(), 10_000, save=tmp_path / "cold.pt")
    _, trained = load_model(tmp_path / "cold.pt")
    first = next(train(config(lr=1e-9), 4_000, init=trained.state_dict()))
    assert first.loss == pytest.approx(cold.loss, abs=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    weights = build(config()).state_dict()
    weights["blocks.0.gate"][0, 0] = math.nan
    keep, save = tmp_path / "keep.pt", tmp_path / "save.pt"
    (final,) = train(config(), 4_000, init=weights, keep=keep, save=save)
    assert final.final
    assert final.diverged
    assert math.isnan(final.loss)
    assert final.tokens <= 8 * config().batch_tokens  # noticed within a few steps
    assert not keep.exists()
    assert not save.exists()


def test_a_rate_far_too_high_ends_no_better_than_guessing() -> None:
    *_, final = train(config(lr=30.0), 4_000)
    assert final.final
    assert final.diverged
    assert not final.loss <= math.log(256)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    write_state({"format": training.FORMAT, "number": 1}, path)

    def disk_full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(training.torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_state({"format": training.FORMAT, "number": 2}, path)
    assert load_state(path)["number"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_the_trunk_of_an_unfinished_run_is_not_its_annealed_model(tmp_path: Path) -> None:
    run = train(config(), 4_000, keep=tmp_path / "keep.pt")
    next(run)
    run.close()
    with pytest.raises(ValueError, match="ask for 'trunk'"):
        load_model(tmp_path / "keep.pt")
    assert load_model(tmp_path / "keep.pt", "trunk")[0] == config()


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    list(train(config(), 2_560))
    assert torch.equal(torch.random.get_rng_state(), before)
