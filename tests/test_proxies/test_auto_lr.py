"""AutoLRS: trials compared with steps taken by hand, the cost of a search, exact continuation after an interrupt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from proxies.config.proxy import ProxyConfig
from proxies.config.steps import plan_steps
from proxies.data.mixture import open_data
from proxies.training import auto_lr
from proxies.training.auto_lr import Stage, autolrs
from proxies.training.checkpoints import load_model, load_state
from proxies.training.loop import evaluate, train
from proxies.training.run_state import Run


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes: Any) -> ProxyConfig:
    small = {"d_model": 16, "base_width": 16, "n_layers": 1, "seq_len": 8, "batch_seqs": 2, "warmup_tokens": 64}
    return ProxyConfig(**(small | {"eval_windows": 4} | changes))


# 4 steps of warm-up, three stages of 100 steps, and a cooldown of 76.
TOKENS = (4 + 3 * 100 + 76) * 16


@pytest.fixture(scope="module")
def straight() -> list[Stage]:
    return list(autolrs(config(), TOKENS, stages=3))


def same(a: Stage, b: Stage) -> bool:
    fields = ("tokens", "loss", "lr", "train_loss", "final", "diverged", "stage", "candidates", "searched_tokens")
    return all(getattr(a, f) == getattr(b, f) for f in fields)


def test_a_trial_is_a_cooldown_to_zero_judged_on_the_batches_that_come_next() -> None:
    """The same steps by hand: six at half the peak rate, then six along 1 - sqrt(u), in the middle of each."""
    c = config()
    data = open_data(c)
    ours, by_hand = (Run(c, plan_steps(c, TOKENS), data.sha256, torch.device("cpu")) for _ in range(2))
    loss = auto_lr._run_trial(ours, data.windows, 0.5, 12)
    shares = [0.5] * 6 + [0.5 * (1 - math.sqrt((k + 0.5) / 6)) for k in range(6)]
    for share in shares:
        by_hand.advance(data.windows, share)
    nexts = [evaluate(by_hand.model, data.windows.batch(c.batch_seqs * step, c.batch_seqs)) for step in range(12, 18)]
    assert loss == pytest.approx(sum(nexts) / 6, abs=1e-6)
    assert ours.step == by_hand.step == 12


def test_trials_that_diverge_get_the_worst_score_and_leave_the_run_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, auto_lr.LOST, 2.95])
    c = config()
    data = open_data(c)
    run = Run(c, plan_steps(c, TOKENS), data.sha256, torch.device("cpu"))

    def trial(run: Run, *_: Any) -> float:
        run.advance(data.windows, 1.0)
        return next(losses)

    monkeypatch.setattr(auto_lr, "_run_trial", trial)
    search = auto_lr._RateSearch(c.lr / 64, c.lr * 8, 3)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    auto_lr._search(run, data.windows, search, 0, 8, 3)
    assert [worse for _, _, worse in search.trials] == pytest.approx([0.0, auto_lr.WORSE, -0.05])
    assert run.step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


def test_a_trial_with_weights_that_are_not_finite_has_a_finite_loss() -> None:
    c = config()
    data = open_data(c)
    run = Run(c, plan_steps(c, TOKENS), data.sha256, torch.device("cpu"))
    with torch.no_grad():
        next(run.model.parameters()).fill_(math.nan)
    assert auto_lr._run_trial(run, data.windows, 1.0, 8) == auto_lr.LOST


def test_the_process_finds_the_best_of_a_planted_bowl_and_carries_it_to_the_next_stage() -> None:
    """The loss is (log2 rate - best)^2 / 50; the best moves from -7 by a third of an octave per stage."""
    search = auto_lr._RateSearch(2.0**-13, 2.0**-4, 8)
    misses = []
    for stage in range(6):
        best = -7 - stage / 3
        before = search.chosen[-1] if stage else 2.0**-5
        first = (math.log2(before) - best) ** 2 / 50
        for i in range(3):
            rate = search.propose(stage, before) if i else before
            assert before / auto_lr.REACH * 0.999 <= rate <= before * auto_lr.REACH * 1.001
            search.trials.append((rate, stage, (math.log2(rate) - best) ** 2 / 50 - first))
        search.chosen.append(search.choose(stage, before))
        misses.append(abs(math.log2(search.chosen[-1]) - best))
    assert max(misses[2:]) < 1.0
    assert sum(misses[3:]) / 3 < 0.6


def test_the_trials_of_one_stage_move_the_first_guess_in_the_next() -> None:
    """The first trial is the same; in the earlier stage low rates won in one case and high rates in the other."""
    guesses = []
    for sign in (1, -1):
        search = auto_lr._RateSearch(2.0**-13, 2.0**-1, 2)
        search.trials += [(2.0**-7, 0, 0.0), (2.0**-8, 0, -0.03 * sign), (2.0**-6, 0, 0.03 * sign)]
        search.trials += [(2.0**-7, 1, 0.0)]
        guesses.append(search.propose(1, 2.0**-7))
    assert guesses[0] < 2.0**-7 < guesses[1]


def test_a_search_costs_at_most_its_overhead_and_reports_its_trials(tmp_path: Path) -> None:
    c = config()
    points = list(autolrs(c, TOKENS, stages=3, save=tmp_path / "run.pt"))
    assert [s.stage for s in points] == [0, 1, 2, 3]
    assert [s.tokens for s in points] == [*((4 + 100 * k) * 16 for k in (1, 2, 3)), TOKENS]
    assert [s.final for s in points] == [False, False, False, True]
    assert [len(s.candidates) for s in points] == [3, 3, 3, 0]
    # Three trials of 8 steps and 4 evaluated batches, a third of a step each, fit into 30 of a stage's hundred steps;
    # three of 9 steps do not.
    assert points[-1].searched_tokens == 9 * (8 + 4 / 3) * 16 <= 0.3 * TOKENS
    assert 3 * (9 + 4 / 3) > 30
    assert points[0].candidates[0] == (c.lr, 0.0)
    for before, after in pairwise(points[:-1]):
        assert after.candidates[0] == (before.lr, 0.0), "a stage begins with the previous rate"
        assert before.lr / 2.001 < after.lr < before.lr * 2.001
    assert points[-1].lr == points[-2].lr
    saved, model = load_model(tmp_path / "run.pt")
    assert saved.schedule == "wsd"
    assert evaluate(model, open_data(c).held_out) == points[-1].loss


@pytest.mark.parametrize("stages", [1, 3, 6])
@pytest.mark.parametrize("overhead", [0.2, 0.3, 0.5])
def test_no_search_costs_more_than_its_share(stages: int, overhead: float, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def trial(run: Run, windows: Any, share: float, n: int) -> float:
        steps.append(n)
        return 3.0

    monkeypatch.setattr(auto_lr, "_run_trial", trial)
    monkeypatch.setattr(auto_lr._RateSearch, "propose", lambda *_: 0.01)
    monkeypatch.setattr(auto_lr._RateSearch, "choose", lambda *_: 0.01)
    monkeypatch.setattr(Run, "advance", lambda run, *_: run.count_step(torch.tensor(3.0), 2))
    tokens = 16 * (4 + 600) * 5 // 4
    *_, last = autolrs(config(), tokens, stages=stages, overhead=overhead)
    assert 2 * stages <= len(steps) <= 3 * stages
    assert sum(n + (n // 2) / 3 for n in steps) <= overhead * 600
    assert last.searched_tokens == math.ceil(16 * sum(n + (n // 2) / 3 for n in steps) - 1e-6)


def test_trials_are_rolled_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If the search always chooses the first rate, the run equals WSD bit for bit, also with a last batch of 1."""
    c = config()
    tokens = TOKENS - 8
    *_, plain = train(c, tokens, save=tmp_path / "plain.pt")
    monkeypatch.setattr(auto_lr._RateSearch, "choose", lambda *_: c.lr)
    *_, searched = autolrs(c, tokens, stages=3, save=tmp_path / "searched.pt")
    assert (searched.loss, searched.tokens) == (plain.loss, plain.tokens)
    assert searched.searched_tokens > 0
    ours, theirs = (load_state(tmp_path / f"{name}.pt") for name in ("searched", "plain"))
    for phase in ("trunk", "annealed"):
        for name, weight in theirs[phase]["model"].items():
            assert torch.equal(ours[phase]["model"][name], weight), f"{phase} {name}"


@pytest.mark.parametrize(("cut_at", "kept_step"), [(0, None), (50, 25), (140, 104), (420, 347)])
def test_a_search_interrupted_at_any_step_continues_exactly(
    cut_at: int, kept_step: int | None, straight: list[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted before the first step, in a stage, in a trial of the second, and in the cooldown."""
    keep = tmp_path / "keep.pt"
    advance, taken = Run.advance, 0

    def interrupted(run: Run, *more: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken > cut_at:
            raise KeyboardInterrupt
        monkeypatch.setattr(auto_lr, "KEEP_EVERY_S", 0.0 if taken == cut_at - 1 else math.inf)
        return advance(run, *more)

    before: list[Stage] = []
    with monkeypatch.context() as m:
        m.setattr(Run, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            before.extend(autolrs(config(), TOKENS, stages=3, keep=keep))
    assert keep.exists() == (kept_step is not None)
    if keep.exists():
        saved = load_state(keep)
        assert saved.get("current", saved["trunk"])["step"] == kept_step
        with pytest.raises(ValueError, match="needed a search with"):
            autolrs(config(), TOKENS, stages=2, keep=keep)
    after = list(autolrs(config(), TOKENS, stages=3, keep=keep))
    assert len(before) + len(after) == len(straight)
    assert all(same(a, b) for a, b in zip(straight, [*before, *after], strict=True))
    assert not keep.exists()


def test_a_stage_that_diverges_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "is_lost", lambda run: run.step > 100)
    *_, last = autolrs(config(), TOKENS, stages=3)
    assert (last.stage, last.final, last.diverged, math.isnan(last.loss)) == (0, True, True, True)


def test_bad_arguments_are_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="needed stages of 63 steps"):
        autolrs(config(), TOKENS, stages=30)
    with pytest.raises(ValueError, match="needed stages of"):
        autolrs(config(), TOKENS, stages=3, overhead=0.0)
    with pytest.raises(ValueError, match="needed at least one stage"):
        autolrs(config(), TOKENS, stages=0)
    with pytest.raises(ValueError, match="lowest < highest"):
        autolrs(config(), TOKENS, stages=3, rates=(2**-7, 2**-7))
    with pytest.raises(ValueError, match="lowest <= lr <= highest"):
        autolrs(config(), TOKENS, stages=3, rates=(0.1, 1.0))


def test_the_command_prints_the_same(straight: list[Stage], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from proxies.__main__ import app

    study = tmp_path / "s.toml"
    study.write_text(
        "[trainer]\nwidths = [16]\nbase_width = 16\nn_layers = 1\nseq_len = 8\nbatch_seqs = 2\n"
        "warmup_tokens = 64\neval_windows = 4\n"
    )
    words = ["autolrs", str(study), "--width", "16", "--tokens", str(TOKENS), "--stages", "3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    theirs = [json.loads(text) for text in done.stdout.splitlines()]
    assert [(s["lr"], s["loss"]) for s in theirs] == [(s.lr, s.loss) for s in straight]
    refused = CliRunner().invoke(app, [*words, "--overhead", "0.01"])
    assert refused.exit_code == 2
