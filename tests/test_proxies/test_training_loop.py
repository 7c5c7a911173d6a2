"""The training loop: run lengths, points, resuming bit for bit, interrupts, divergence, settings that save memory."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from proxies.config.proxy import ProxyConfig
from proxies.config.steps import find_eval_steps, plan_steps
from proxies.data import mixture
from proxies.data.corpora import load_corpus
from proxies.data.windows import cut_held_out
from proxies.model.transformer import build
from proxies.training import loop, run_state
from proxies.training.checkpoints import FORMAT, load_model, load_state, write_state
from proxies.training.loop import evaluate, train
from scaling.common.measurement import Measurement


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: results are equal bit for bit only with the same number of threads."""
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
    """Return whether two measurements are equal except for their time."""
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
        # 80 windows are 10 batches, 8 of them trunk.
        (1280, (1280, 8, 10)),
        # 82 windows are floor(8.2) trunk steps, then 8 + 8 + 2 windows.
        (1312, (1312, 8, 11)),
        (1300, (1296, 8, 11)),
        # 0.8 * 5 is 4, not 3.9999.
        (640, (640, 4, 5)),
    ],
)
def test_a_plan_has_the_steps_computed_by_hand(tokens: int, cut: tuple[int, int, int]) -> None:
    ours = plan_steps(config(), tokens)
    assert (ours.tokens, ours.trunk_steps, ours.steps) == cut


def test_the_shortest_run_named_in_the_error_is_possible_and_one_token_less_is_not() -> None:
    for changes in ({}, {"warmup_tokens": 0}, {"warmup_tokens": 1000, "cooldown": 0.37, "batch_seqs": 3}):
        c = config(**changes)
        with pytest.raises(ValueError, match="needed at least") as error:
            plan_steps(c, 10)
        least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
        assert plan_steps(c, least).trunk_steps * c.batch_tokens >= c.warmup_tokens
        with pytest.raises(ValueError, match="needed at least"):
            plan_steps(c, least - 1)


def test_points_are_two_an_octave_and_do_not_depend_on_the_end() -> None:
    c = ProxyConfig()
    long = sorted(find_eval_steps(c, 4000))
    assert sorted(find_eval_steps(c, 500)) == [s for s in long if s <= 500]
    ratios = [b / a for a, b in pairwise(long)]
    assert all(1.3 < r < 1.55 for r in ratios[2:])
    assert long[0] * c.batch_tokens >= c.warmup_tokens


def test_early_points_begin_after_the_warm_up_and_do_not_move_the_others() -> None:
    # Its points begin at 3 x 64 x 128 tokens.
    late = ProxyConfig(warmup_tokens=1024, batch_seqs=4)
    early = late.model_copy(update={"early_points": True})
    usual, more = find_eval_steps(late, 4000), find_eval_steps(early, 4000)
    assert min(usual) * late.batch_tokens == 24_576
    assert [s * late.batch_tokens for s in sorted(more - usual)] == [1024, 2048, 4096, 8192, 16_384]
    assert usual < more
    assert find_eval_steps(early, 7) == {2, 4}
    # After this warm-up there is nothing before the usual points.
    soon = {"warmup_tokens": 40_000, "early_points": True}
    assert (
        find_eval_steps(ProxyConfig(**soon), 90)
        == find_eval_steps(ProxyConfig(**soon | {"early_points": False}), 90)
        != set()
    )


def test_early_points_change_measurements_and_nothing_else(tmp_path: Path) -> None:
    *_, plain = train(config(), 3_000)
    first, *more = train(config(early_points=True), 3_000, save=tmp_path / "run.pt")
    assert first.tokens == max(config().warmup_tokens, config().batch_tokens)
    assert more[-1].loss == plain.loss
    # A run may be continued without them.
    *_, longer = train(config(), 5_000, resume=tmp_path / "run.pt")
    *_, straight = train(config(), 5_000)
    assert longer.loss == straight.loss


def test_evaluation_costs_a_small_share_of_a_short_run() -> None:
    c = ProxyConfig()
    for tokens in (40_000, 80_000, 400_000):
        forward_passes = 1 + len(find_eval_steps(c, plan_steps(c, tokens).trunk_steps))
        assert forward_passes * c.eval_windows * c.seq_len / 3 < 0.15 * tokens


def test_the_same_run_twice_gives_the_same_numbers() -> None:
    first, second = (list(train(config(), 3_000)) for _ in range(2))
    assert all(same_numbers(a, b) for a, b in zip(first, second, strict=True))


def test_the_loss_is_that_of_the_annealed_weights_on_held_out_windows(tmp_path: Path) -> None:
    *_, final = train(config(), 3_000, save=tmp_path / "run.pt")
    c, model = load_model(tmp_path / "run.pt")
    corpus = load_corpus("stdlib")
    x, y = cut_held_out(corpus.val, 16, 8)
    assert evaluate(model, (x, y)) == final.loss
    by_hand = torch.stack([-model(x[i : i + 1])[0].log_softmax(-1)[torch.arange(16), y[i]].mean() for i in range(8)])
    assert float(by_hand.detach().mean()) == pytest.approx(final.loss, rel=1e-5)
    assert c == config()
    assert load_state(tmp_path / "run.pt")["annealed"]["measurement"]["loss"] == final.loss


@pytest.mark.parametrize("longer", [5_000, 12_040])
def test_an_extended_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, longer: int) -> None:
    straight = list(train(config(), longer, save=tmp_path / "straight.pt"))
    list(train(config(), 2_500, save=tmp_path / "short.pt"))
    extended = list(train(config(), longer, resume=tmp_path / "short.pt", save=tmp_path / "extended.pt"))
    assert all(same_numbers(a, b) for a, b in zip(straight[-len(extended) :], extended, strict=True))
    assert same_weights(tmp_path / "straight.pt", tmp_path / "extended.pt")
    assert same_weights(tmp_path / "straight.pt", tmp_path / "extended.pt", "trunk")
    assert not same_weights(tmp_path / "straight.pt", tmp_path / "short.pt")
    # Only the new part was trained.
    assert len(extended) < len(straight)


def test_a_finished_run_can_be_annealed_again(tmp_path: Path) -> None:
    *_, first = train(config(), 2_500, save=tmp_path / "run.pt")
    *_, again = train(config(), 2_500, resume=tmp_path / "run.pt")
    assert same_numbers(first, again)


# The run has 20 steps: 16 of trunk, then cooldown.
@pytest.mark.parametrize("stop_at", [3, 15, 16, 17, 19])
@pytest.mark.parametrize("after_a_step", [False, True])
def test_a_run_interrupted_at_any_step_continues_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, after_a_step: bool
) -> None:
    straight = list(train(config(), 2_560, save=tmp_path / "straight.pt"))
    keep = tmp_path / "keep.pt"
    advance = run_state.Run.advance

    def interrupted(run: Any, windows: Any) -> None:
        if run.step == stop_at and not after_a_step:
            raise OSError("a power failure, after which nothing is written")
        advance(run, windows)
        # The interrupt comes right after the step, before anything else.
        if run.step > stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_state.Run, "advance", interrupted)
        # With 0 seconds the state is kept after every step.
        with pytest.raises((OSError, KeyboardInterrupt)):
            list(train(config(), 2_560, keep=keep, keep_every_s=0.0))
    assert load_state(keep)["phase"] == ("trunk" if stop_at + after_a_step <= 16 else "cooldown")
    rest = list(train(config(), 2_560, resume=keep, keep=keep, save=tmp_path / "rest.pt"))
    assert same_numbers(rest[-1], straight[-1])
    assert same_weights(tmp_path / "straight.pt", tmp_path / "rest.pt")
    assert same_weights(tmp_path / "straight.pt", tmp_path / "rest.pt", "trunk")
    assert not keep.exists(), "removed on completion"


def test_a_signal_in_the_middle_of_a_step_leaves_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while only some weights have changed; the state after that step is kept."""
    straight = list(train(config(), 2_560, save=tmp_path / "straight.pt"))
    keep, step = tmp_path / "keep.pt", torch.optim.AdamW.step

    def interrupted(optimizer: torch.optim.AdamW) -> None:
        step(optimizer)
        if next(iter(optimizer.state.values()))["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(train(config(), 2_560, keep=keep, keep_every_s=math.inf))
    assert load_state(keep)["trunk"]["step"] == 5
    rest = list(train(config(), 2_560, resume=keep, save=tmp_path / "rest.pt"))
    assert same_numbers(rest[-1], straight[-1])
    assert same_weights(tmp_path / "straight.pt", tmp_path / "rest.pt")


def test_a_run_closed_at_a_point_continues_after_it(tmp_path: Path) -> None:
    straight = list(train(config(), 4_000))
    run = train(config(), 4_000, keep=tmp_path / "keep.pt")
    points = [next(run), next(run)]
    run.close()
    points += train(config(), 4_000, resume=tmp_path / "keep.pt")
    assert len(straight) >= 4
    assert all(same_numbers(a, b) for a, b in zip(straight, points, strict=True))


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

    points: list[Measurement] = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            points.extend(iter(train(config(), 4_000, keep=tmp_path / "keep.pt")))
    rest = list(train(config(), 4_000, resume=tmp_path / "keep.pt"))
    assert all(same_numbers(a, b) for a, b in zip(straight[stop:], rest, strict=True))


def test_a_run_interrupted_in_its_cooldown_can_be_extended_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(train(config(), 4_000, save=tmp_path / "straight.pt"))
    with monkeypatch.context() as patch:

        def interrupted(*args: Any) -> float:
            raise KeyboardInterrupt

        patch.setattr(loop, "evaluate", interrupted)
        patch.setattr(loop, "find_eval_steps", lambda *_: frozenset())
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
    # How the run is evaluated may change.
    *_, final = train(config(eval_windows=4), 5_000, resume=saved)
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
    assert final.tokens <= 8 * config().batch_tokens, "noticed within a few steps"
    assert not keep.exists()
    assert not save.exists()


def test_a_rate_far_too_high_ends_no_better_than_guessing() -> None:
    *_, final = train(config(lr=30.0), 4_000)
    assert final.final
    assert final.diverged
    assert not final.loss <= math.log(256)


def test_a_file_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    write_state({"format": FORMAT, "number": 1}, path)

    def disk_full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_state({"format": FORMAT, "number": 2}, path)
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


HORIZONS = ("cosine", "linear", "rex")


@pytest.mark.parametrize("schedule", HORIZONS)
# The run has 20 steps.
@pytest.mark.parametrize("stop_at", [1, 9, 19])
def test_under_a_horizon_an_interrupted_run_continues_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, stop_at: int
) -> None:
    c = config(schedule=schedule)
    straight = list(train(c, 2_560, save=tmp_path / "straight.pt"))
    interrupt_at(monkeypatch, stop_at, c, 2_560, tmp_path / "keep.pt")
    rest = list(train(c, 2_560, resume=tmp_path / "keep.pt", save=tmp_path / "rest.pt"))
    assert same_numbers(rest[-1], straight[-1])
    assert rest[-1].lr == pytest.approx(c.lr * (0.1 if schedule == "cosine" else 0.0), abs=1e-15)
    assert same_weights(tmp_path / "straight.pt", tmp_path / "rest.pt")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, c: ProxyConfig, tokens: int, keep: Path) -> None:
    """Interrupt a run before this step, with its state in `keep`."""
    advance = run_state.Run.advance

    def interrupted(run: Any, *args: Any) -> Any:
        if run.step == step:
            raise KeyboardInterrupt
        return advance(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run_state.Run, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(train(c, tokens, keep=keep))


@pytest.mark.parametrize("schedule", HORIZONS)
def test_under_a_horizon_a_longer_run_starts_from_the_beginning_with_a_warning(tmp_path: Path, schedule: str) -> None:
    c = config(schedule=schedule)
    list(train(c, 2_560, save=tmp_path / "short.pt"))
    straight = list(train(c, 4_000))
    with pytest.warns(
        UserWarning, match=f"schedule '{schedule}' has a horizon: a run of 4,000 tokens starts from the beginning"
    ):
        again = train(c, 4_000, resume=tmp_path / "short.pt")
    assert all(same_numbers(a, b) for a, b in zip(straight, again, strict=True))
    assert len(straight) > 2, "there are trunk points, too"


@pytest.mark.parametrize("schedule", ["power", "inverse-sqrt", "constant"])
def test_without_a_horizon_a_longer_run_continues(tmp_path: Path, schedule: str) -> None:
    c = config(schedule=schedule, sqrt_tokens=512, power_a=0.02)
    straight = list(train(c, 5_000, save=tmp_path / "straight.pt"))
    list(train(c, 2_500, save=tmp_path / "short.pt"))
    extended = list(train(c, 5_000, resume=tmp_path / "short.pt", save=tmp_path / "extended.pt"))
    assert same_numbers(straight[-1], extended[-1])
    assert len(extended) < len(straight)
    assert same_weights(tmp_path / "straight.pt", tmp_path / "extended.pt")


def test_a_constant_rate_has_no_cooldown() -> None:
    c = config(schedule="constant")
    assert (plan_steps(c, 1280).trunk_steps, plan_steps(c, 1280).cooldown_steps) == (10, 0)
    # One window is left over.
    assert (plan_steps(c, 1300).trunk_steps, plan_steps(c, 1300).cooldown_steps) == (10, 1)
    for tokens in (1280, 1300):
        *_, last = train(c, tokens)
        assert (last.lr, last.tokens, last.final) == (c.lr, tokens // 16 * 16, True)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_shortest_run_of_another_schedule_is_the_one_that_its_error_names(schedule: str) -> None:
    for changes in ({}, {"warmup_tokens": 0}, {"warmup_tokens": 1000, "batch_seqs": 3}):
        c = config(schedule=schedule, **changes)
        with pytest.raises(ValueError, match="needed at least") as error:
            plan_steps(c, 1)
        least = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
        assert plan_steps(c, least).steps * c.batch_tokens > c.warmup_tokens - 1
        with pytest.raises(ValueError, match="needed at least"):
            plan_steps(c, least - 1)


OPTIMIZERS = {
    "adamw": "torch",
    "adamw8bit": "torchao",
    "ademamix": "pytorch_optimizer",
    "lamb": "pytorch_optimizer",
    "lion": "pytorch_optimizer",
    "muon": "torch",
    "muon-rms": "torch",
    "prodigy": "prodigyopt",
    "schedule-free": "schedulefree",
    "soap": "pytorch_optimizer",
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_every_optimizer_continues_exactly_on_the_trunk_and_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, schedule: str
) -> None:
    pytest.importorskip(OPTIMIZERS[optimizer])
    c = config(optimizer=optimizer, schedule=schedule, lr=1.0 if optimizer == "prodigy" else 2**-9, eval_windows=1)
    straight = list(train(c, 1_280, save=tmp_path / "straight.pt"))
    # The run has 10 steps, 8 of them trunk under wsd.
    for stop_at in (5, 9):
        interrupt_at(monkeypatch, stop_at, c, 1_280, tmp_path / "keep.pt")
        rest = list(train(c, 1_280, resume=tmp_path / "keep.pt", save=tmp_path / "rest.pt"))
        assert same_numbers(rest[-1], straight[-1])
        assert same_weights(tmp_path / "straight.pt", tmp_path / "rest.pt")
    _, annealed = load_model(tmp_path / "straight.pt")
    assert evaluate(annealed, mixture.open_data(c).held_out) == straight[-1].loss, (
        "the saved weights are the evaluated ones"
    )


@pytest.mark.parametrize("optimizer", ["adamw", "schedule-free"])
def test_evaluating_changes_nothing(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    pytest.importorskip(OPTIMIZERS[optimizer])
    c = config(optimizer=optimizer, schedule="constant")
    *points, last = train(c, 4_000)
    monkeypatch.setattr(loop, "find_eval_steps", lambda *_: frozenset())
    *none, unevaluated = train(c, 4_000)
    assert points
    assert not none
    assert unevaluated.loss == last.loss


@pytest.mark.parametrize("micro", [1, 3, 8, 100])
def test_a_batch_in_parts_is_the_whole_batch(micro: int) -> None:
    whole, parts = (list(train(config(batch_seqs=8, micro_seqs=m), 3_000)) for m in (None, micro))
    for a, b in zip(whole, parts, strict=True):
        assert (a.tokens, a.lr) == (b.tokens, b.lr)
        assert (a.loss, a.train_loss) == pytest.approx((b.loss, b.train_loss), rel=1e-4)
    if micro >= 8:
        assert same_numbers(whole[-1], parts[-1])


def test_gradients_of_parts_add_up_to_those_of_the_batch() -> None:
    """In float64, with parts of 3, 3 and 2 sequences."""
    grads = []
    data = mixture.open_data(config())
    x_bt, y_bt = data.windows.batch(0, 8)
    for micro in (None, 3):
        c = config(micro_seqs=micro)
        run = run_state.Run(c, plan_steps(c, 3_000), data.sha256, torch.device("cpu"))
        run.model.double()
        loss = run.backward(x_bt, y_bt)
        grads.append([loss, *(p.grad for p in run.model.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if a.ndim == 0 else 1e-11, atol=1e-13)


def test_recomputing_activations_changes_no_loss_and_takes_less_memory() -> None:
    plain, again = (list(train(config(n_layers=2, recompute=r), 3_000)) for r in (False, True))
    assert all(same_numbers(a, b) for a, b in zip(plain, again, strict=True))
    kept = [measure_kept_bytes(config(n_layers=4, recompute=r)) for r in (False, True)]
    assert kept[1] < 0.3 * kept[0]


def measure_kept_bytes(c: ProxyConfig) -> int:
    """Return the bytes of all tensors that one forward pass keeps for the backward pass."""
    model, sizes = build(c), dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    x_bt = torch.zeros(8, 16, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x_bt).sum()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert loss.requires_grad
    return sum(size for at, size in sizes.items() if at not in own)


def test_how_memory_is_saved_may_change_on_resuming(tmp_path: Path) -> None:
    list(train(config(), 2_500, save=tmp_path / "run.pt"))
    *_, last = train(config(micro_seqs=4, recompute=True), 4_000, resume=tmp_path / "run.pt")
    *_, straight = train(config(), 4_000)
    assert last.loss == pytest.approx(straight.loss, rel=1e-4)


def test_a_run_that_is_long_far_worse_than_guessing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at eight failed checks in a row after the warm-up, after 64 of its 100 steps."""
    from proxies.model.transformer import compute_loss

    height = math.log(256) + 1.01
    monkeypatch.setattr(run_state, "compute_loss", lambda *args: compute_loss(*args) * 0 + height)
    *_, last = train(config(), 12_800)
    assert (last.final, last.diverged, math.isnan(last.loss)) == (True, True, True)
    # There are 2 steps of warm-up, and checks after steps 8, 16, ..., 64.
    assert last.tokens == (2 // 8 + 8) * 8 * 128
    height = math.log(256) + 0.99
    *_, last = train(config(), 12_800)
    assert last.tokens == 12_800


@pytest.mark.parametrize("bad_steps", [(40, 47), (8, 63)])
def test_a_spike_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch, bad_steps: tuple[int, int]) -> None:
    from proxies.model.transformer import compute_loss

    steps = iter(range(10_000))

    def spike(*args: Any) -> torch.Tensor:
        first, last = bad_steps
        return compute_loss(*args) + (1000.0 if first <= next(steps) < last else 0.0)

    monkeypatch.setattr(run_state, "compute_loss", spike)
    monkeypatch.setattr(loop, "evaluate", lambda *_: 3.0)
    *_, last = train(config(), 12_800)
    assert (last.tokens, last.diverged) == (12_800, False)


def test_failed_checks_are_not_forgotten_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from proxies.model.transformer import compute_loss

    monkeypatch.setattr(run_state, "compute_loss", lambda *args: compute_loss(*args) * 0 + 9.0)
    *_, straight = train(config(), 12_800)
    for stop_at in (13, 32, 57):
        interrupt_at(monkeypatch, stop_at, config(), 12_800, tmp_path / "keep.pt")
        *_, rest = train(config(), 12_800, resume=tmp_path / "keep.pt")
        assert (rest.tokens, rest.diverged) == (straight.tokens, True)


def test_a_signal_waits_until_the_step_is_complete() -> None:
    import os
    import signal

    done = []

    def step() -> None:
        with run_state.defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(sum(range(1000)))

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_terminated_command_keeps_its_run_and_continues_exactly(tmp_path: Path) -> None:
    """After SIGTERM and exit code 143 the same command has the same end as an uninterrupted run."""
    import json
    import os
    import signal
    import subprocess
    import sys

    (tmp_path / "s.toml").write_text("[trainer]\nwidths = [32]\nseq_len = 16\nwarmup_tokens = 256\neval_windows = 8\n")
    words = [sys.executable, "-m", "proxies", "train", "s.toml", "--width", "32", "--tokens", "40000"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*words, *more], cwd=tmp_path, env=env, text=True, stdout=pipe, stderr=pipe)

    straight, _ = start().communicate(timeout=120)
    process = start("--keep", "keep.pt")
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "continues from keep.pt" in stderr
    tokens = load_state(tmp_path / "keep.pt")["trunk"]["windows"] * 16
    assert json.loads(first)["tokens"] <= tokens < 40_000
    process = start("--keep", "keep.pt", "--peak-flops", "1e12")
    rest, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "peak memory" in stderr
    assert "MFU" in stderr
    ends = [json.loads(out.splitlines()[-1]) for out in (straight, rest)]
    assert [ends[0][k] for k in ("tokens", "loss", "train_loss")] == [
        ends[1][k] for k in ("tokens", "loss", "train_loss")
    ]
    assert not (tmp_path / "keep.pt").exists()


def test_speed_and_mfu_are_those_of_the_measurements_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    from proxies.training.throughput import Usage

    c = config()
    usage = Usage(c, peak_flops=1e9)
    points = [Measurement(1000, 3.0, seconds=2.0), Measurement(5000, 3.0, seconds=4.0, final=True)]
    assert list(usage.watch(iter(points))) == points
    assert usage.tokens_per_second == 2000.0
    # One layer of width 32, two heads of 16, T = 16.
    palm = 6 * (4 * 32 * 32 + 3 * 32 * 96 + 32 * 256) + 12 * 1 * 32 * 16
    assert usage.mfu == pytest.approx(2000 * palm / 1e9)
    assert "2,000 tokens/s" in str(usage)
    assert Usage(c).mfu is None
