"""AutoLRS: its parts against planted curves, its price, and that a search cut off goes on exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proxies import stagewise
from proxies.checkpoints import load_model
from proxies.config import ProxyConfig
from proxies.mixture import open_data
from proxies.stagewise import Stage, autolrs, clean, extrapolate, predicted
from proxies.training import evaluate


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes: Any) -> ProxyConfig:
    small = {"d_model": 16, "base_width": 16, "n_layers": 1, "seq_len": 8, "batch_seqs": 2, "warmup_tokens": 64}
    return ProxyConfig(**(small | {"eval_windows": 4} | changes))


TOKENS = (4 + 3 * 80) * 16  # 4 steps of warm-up, three stages of 80 steps


def same(a: Stage, b: Stage) -> bool:
    fields = ("tokens", "loss", "lr", "train_loss", "final", "diverged", "stage", "candidates", "searched_tokens")
    return all(getattr(a, f) == getattr(b, f) for f in fields)


@pytest.mark.parametrize(("a", "time", "c"), [(1.0, 15.0, 2.0), (0.3, 60.0, 3.0), (-0.5, 8.0, 4.0)])
def test_a_planted_exponential_is_extrapolated_exactly(a: float, time: float, c: float) -> None:
    losses = a * np.exp(-np.arange(40) / time) + c
    assert extrapolate(losses, 400) == pytest.approx(a * math.exp(-400 / time) + c, abs=1e-4)


def test_a_noisy_one_is_extrapolated_with_little_bias() -> None:
    rng = np.random.default_rng(0)
    errors = [extrapolate(np.exp(-np.arange(100) / 20) + 2 + rng.normal(0, 0.05, 100), 1000) - 2 for _ in range(100)]
    assert abs(np.mean(errors)) < 3 * np.std(errors) / 10 + 0.005
    assert np.std(errors) < 0.05


def test_cleaning_takes_the_spikes_of_the_first_half_alone() -> None:
    curve = np.exp(-np.arange(200) / 50)
    spiked = curve.copy()
    spiked[[10, 40, 70, 150]] += 3.0
    steps, losses = clean(spiked)
    assert {10, 40, 70}.isdisjoint(steps.astype(int))
    assert 150 in steps
    assert 200 - len(steps) <= 30  # ten times 3 % of a hundred
    assert losses[steps < 100] == pytest.approx(curve[steps[steps < 100].astype(int)])


def test_the_noise_of_the_batches_is_taken_out_of_a_comparison() -> None:
    """Two curves a planted .02 apart in the end, with noise ten times that: the same for both, then each its own."""
    rng = np.random.default_rng(1)
    t = np.arange(100)
    low, high = np.exp(-t / 20) + 2.0, np.exp(-t / 20) + 2.0 - 0.02 * (1 - np.exp(-t / 20))
    shared, own = [], []
    for _ in range(40):
        noise = rng.normal(0, 0.2, 100)
        shared.append(predicted(high + noise, low + noise, 1000) + 0.02)
        own.append(predicted(high + noise, low + rng.normal(0, 0.2, 100), 1000) + 0.02)
    assert abs(np.mean(shared)) < 0.01
    assert np.std(shared) < 0.5 * np.std(own)


def test_a_trial_that_diverged_is_as_bad_as_can_be() -> None:
    first = np.linspace(3, 2, 20)
    assert predicted(np.full(20, math.nan), first, 100) == stagewise.WORSE
    assert predicted(np.full(20, 1e9), first, 100) == stagewise.WORSE
    assert predicted(first, first, 100) == 0.0


def test_the_process_finds_the_best_of_a_planted_bowl_and_carries_it_to_the_next_stage() -> None:
    """Loss (log2 rate - best)^2 / 50, the best moving from -7 by a third of an octave a stage; three trials in each."""
    search = stagewise._Search(2.0**-13, 2.0**-4, 8, [])
    misses = []
    for stage in range(6):
        best = -7 - stage / 3
        rate = search.rate_for(stage - 1) if stage else 2.0**-5
        first = (math.log2(rate) - best) ** 2 / 50
        for i in range(3):
            if i:
                rate = search.propose(stage)
            search.seen.append((math.log2(rate), stage, (math.log2(rate) - best) ** 2 / 50 - first))
        misses.append(abs(math.log2(search.rate_for(stage)) - best))
    assert max(misses[2:]) < 1.0
    assert np.mean(misses[3:]) < 0.6


def test_a_search_costs_what_it_may_and_says_what_it_tried(tmp_path: Path) -> None:
    c = config()
    found = list(autolrs(c, TOKENS, stages=3, save=tmp_path / "run.pt"))
    assert [s.stage for s in found] == [0, 1, 2]
    assert [s.tokens for s in found] == [(4 + 80 * k) * 16 for k in (1, 2, 3)]
    assert [s.final for s in found] == [False, False, True]
    assert [len(s.candidates) for s in found] == [3, 3, 3]  # of 8 steps each: 24 = .3 * 80
    assert found[-1].searched_tokens == 9 * 8 * 16 <= 0.3 * TOKENS
    assert found[0].candidates[0] == (c.lr, 0.0)
    for before, after in pairwise(found):
        assert after.candidates[0] == (pytest.approx(before.lr), 0.0), "a stage begins with the rate before"
    assert all(c.lr / 64 * 0.999 <= rate <= c.lr * 8 * 1.001 for s in found for rate, _ in s.candidates)
    saved, model = load_model(tmp_path / "run.pt")
    assert saved.schedule == "constant"
    assert evaluate(model, open_data(c).held) == found[-1].loss


def test_what_is_tried_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the search always answers the first rate, the run is the plain one at a constant rate, bit for bit."""
    from proxies.training import train

    c = config()
    *_, plain = train(config(schedule="constant"), TOKENS)
    monkeypatch.setattr(stagewise._Search, "rate_for", lambda *_: c.lr)
    *_, searched = autolrs(c, TOKENS, stages=3)
    assert searched.loss == plain.loss
    assert searched.searched_tokens > 0


def test_a_search_cut_off_goes_on_exactly(tmp_path: Path) -> None:
    keep = tmp_path / "keep.pt"
    straight = list(autolrs(config(), TOKENS, stages=3))
    cut = autolrs(config(), TOKENS, stages=3, keep=keep)
    seen = [next(cut), next(cut)]
    cut.close()
    with pytest.raises(ValueError, match="needed a search with"):
        autolrs(config(), TOKENS, stages=2, keep=keep)
    seen += autolrs(config(), TOKENS, stages=3, keep=keep)
    assert len(seen) == len(straight)
    assert all(same(a, b) for a, b in zip(straight, seen, strict=True))
    assert not keep.exists()


def test_a_stage_that_diverges_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stagewise.Run, "is_lost", lambda run: run.step > 100)
    *_, last = autolrs(config(), TOKENS, stages=3)
    assert (last.stage, last.final, last.diverged, math.isnan(last.loss)) == (1, True, True, True)


def test_bad_arguments_are_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="needed stages of 54 steps"):
        autolrs(config(), TOKENS, stages=30)
    with pytest.raises(ValueError, match="needed stages of"):
        autolrs(config(), TOKENS, stages=3, overhead=0.0)
    with pytest.raises(ValueError, match="needed at least one stage"):
        autolrs(config(), TOKENS, stages=0)
    with pytest.raises(ValueError, match="lowest <= lr <= highest"):
        autolrs(config(), TOKENS, stages=3, rates=(0.1, 1.0))


def test_the_command_says_the_same(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from proxies.__main__ import app

    study = tmp_path / "s.toml"
    study.write_text(
        "[trainer]\nwidths = [16]\nbase_width = 16\nn_layers = 1\nseq_len = 8\nbatch_seqs = 2\nwarmup_tokens = 64\neval_windows = 4\n"
    )
    words = ["autolrs", str(study), "--width", "16", "--tokens", str(TOKENS), "--stages", "3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    ours = list(autolrs(config(), TOKENS, stages=3))
    theirs = [json.loads(text) for text in done.stdout.splitlines()]
    assert [(s["lr"], s["loss"]) for s in theirs] == [(s.lr, s.loss) for s in ours]
    refused = CliRunner().invoke(app, [*words, "--overhead", "0.01"])
    assert refused.exit_code == 2
