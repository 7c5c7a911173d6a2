"""The transfer test: planted parabolas are recovered, runs are made once, and a minimum at an edge is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from proxies.__main__ import app
from proxies.config.proxy import ProxyConfig
from proxies.diagnostics import lr_transfer
from proxies.diagnostics.figures import draw_transfer
from proxies.diagnostics.lr_optimum import FURTHER, BootstrapInterval, choose_next_rates, find_best_window, fit_arm
from proxies.diagnostics.lr_transfer import Transfer, make_arms, train_to_final_loss, transfer

SIZES = (32, 64, 128, 256)


def compute_loss(j: int, best: float, curvature: float = 0.04) -> float:
    """Return the loss at rate j, which diverges three octaves above the best."""
    return 2.0 + curvature * ((j - best) / 2) ** 2 if j < best + 6 else math.inf


@pytest.mark.parametrize("best", [-23.3, -5.2, -0.4, 0.0, 3.7, 12.4])
@pytest.mark.parametrize("start", [0, 5])
def test_the_grid_finds_the_best_five_wherever_they_are(best: float, start: int) -> None:
    losses: dict[int, float] = {}
    while rates := choose_next_rates(losses, start):
        assert not set(rates) & losses.keys(), "a rate is chosen twice"
        losses |= {j: compute_loss(j, best) for j in rates}
    everywhere = {j: compute_loss(j, best) for j in range(-40, 41)}
    first, last = find_best_window(losses)
    assert last - first == 4
    assert sorted(losses[j] for j in range(first, last + 1)) == sorted(everywhere.values())[:5]
    assert {first - 1, last + 1} & losses.keys(), "nothing beyond the lower end was tried"
    assert len(losses) <= 10 + abs(best - start) / 4


def test_if_everything_diverges_the_grid_moves_down() -> None:
    losses: dict[int, float] = {}
    while rates := choose_next_rates(losses):
        losses |= {j: compute_loss(j, -30.0) for j in rates}
    assert find_best_window(losses) == (-32, -28)


def plant_runs(
    gamma: float, *, noise: float = 0.0, seeds: int = 2, seed: int = 0
) -> dict[int, dict[tuple[int, int], float]]:
    """Make runs whose best rate is lr0 at size 64 and changes as size^-gamma; a seed shifts all losses of its size."""
    generator = np.random.default_rng(seed)
    runs: dict[int, dict[tuple[int, int], float]] = {}
    for size in SIZES:
        best = -2 * gamma * math.log2(size / 64)
        center = round(best)
        runs[size] = {
            (j, s): compute_loss(j, best) - 0.1 * math.log2(size / 64) + 0.05 * s + noise * generator.standard_normal()
            for j in range(center - 4, center + 5)
            for s in range(seeds)
        }
    return runs


@pytest.mark.parametrize("gamma", [-0.2, 0.0, 0.35, 1.0])
def test_a_planted_exponent_is_recovered_with_its_shift_and_regret(gamma: float) -> None:
    arm = fit_arm("a", plant_runs(gamma), -7.0)
    assert arm.gamma.value == pytest.approx(gamma, abs=1e-9)
    assert arm.shift.value == pytest.approx(-3 * gamma, abs=1e-9)
    assert [b.best.value for b in arm.bowls] == pytest.approx([-7 - gamma * math.log2(s / 64) for s in SIZES])
    assert arm.bowls[0].curvature == pytest.approx(0.04)
    # Seeds shift all losses alike, which is no noise.
    assert arm.bowls[0].noise == pytest.approx(0, abs=1e-9)
    # Inside the window of the parabola.
    if abs(gamma) < 0.3:
        assert arm.regret.value == pytest.approx(0.04 * (3 * gamma) ** 2)
    assert arm.penalty.value == pytest.approx(0.04 * (gamma * math.log2(FURTHER * 8)) ** 2)
    assert (not arm.misses) is (gamma == 0)


def test_beyond_the_window_regret_is_measured_and_divergence_is_infinite() -> None:
    runs = plant_runs(0.5)
    # The best rate is j = -2 at size 256 and j = 1 at size 32. At 256, the losses from -6 to 2 are known.
    assert fit_arm("a", runs, 0.0).regret.value == pytest.approx(0.04 * 1.5**2)
    for s in (0, 1):
        runs[256][1, s] = math.inf
        runs[256][2, s] = math.inf
    arm = fit_arm("a", runs, 0.0)
    assert arm.regret.value == math.inf
    written = json.loads(json.dumps(Transfer("width", 1, 2, (arm,)).json, allow_nan=False))
    assert written["arms"][0]["regret"]["value"] is None
    assert written["passed"] is False


def test_the_intervals_have_their_nominal_coverage() -> None:
    arms = [fit_arm("a", plant_runs(0.1, noise=0.01, seed=seed), 0.0, seed=seed) for seed in range(100)]
    gamma = sum(a.gamma.low <= 0.1 <= a.gamma.high for a in arms)
    shift = sum(a.shift.low <= -0.3 <= a.shift.high for a in arms)
    # 95 of 100, within three binomial standard deviations.
    assert 88 <= gamma <= 100
    assert 88 <= shift <= 100
    noise = [a.bowls[0].noise for a in arms]
    assert float(np.mean(noise)) == pytest.approx(0.01, rel=0.05)
    length = np.mean([a.gamma.high - a.gamma.low for a in arms])
    spread = np.std([a.gamma.value for a in arms])
    assert length == pytest.approx(2 * 1.96 * spread, rel=0.25)


def test_losses_without_a_minimum_are_refused() -> None:
    runs = plant_runs(0.0)
    runs[64] = {(j, s): 2.0 - 0.01 * j**2 for j, s in runs[64]}
    with pytest.raises(ValueError, match="at size 64"):
        fit_arm("a", runs, 0.0)
    with pytest.raises(ValueError, match="at least two sizes"):
        fit_arm("a", {64: runs[32]}, 0.0)


def train_fake(config: ProxyConfig, tokens: int) -> float:
    """Return the loss of a trainer whose best rate is constant under muP and falls as 1 / width without it."""
    best = 2**-7 if config.parametrization == "mup" or config.m == 1 else 2**-7 / config.m
    return 2.0 + 0.05 * math.log2(config.lr / best) ** 2 - 0.1 * math.log2(config.m) + 0.01 * config.seed


def test_the_report_of_a_planted_family(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[ProxyConfig] = []

    def record_call(config: ProxyConfig, tokens: int) -> float:
        calls.append(config)
        return train_fake(config, tokens)

    monkeypatch.setattr(lr_transfer, "train_to_final_loss", record_call)
    config = ProxyConfig(corpus=text, lr=2**-6)
    runs = tmp_path / "transfer" / "runs.jsonl"
    report = transfer(config, (32, 64, 128), 16384, runs=runs, seeds=2)
    mup, standard = report.arms
    assert (mup.name, standard.name) == ("mup", "standard")
    assert [b.best.value for b in mup.bowls] == pytest.approx([-7, -7, -7])
    assert [b.best.value for b in standard.bowls] == pytest.approx([-6, -7, -8])
    assert standard.gamma.value == pytest.approx(1)
    assert standard.regret.value == pytest.approx(0.05 * 2**2)
    assert report.passed
    assert len({c.model_dump_json() for c in calls}) == len(calls) == len(runs.read_text().splitlines())
    # At base width both arms have the same model, so it was run once.
    at_base_width = [(c.lr, c.seed) for c in calls if c.d_model == 64]
    assert len(set(at_base_width)) == len(at_base_width)
    before = len(calls)
    again = transfer(config, (32, 64, 128), 16384, runs=runs, seeds=2)
    assert again == report
    assert len(calls) == before, "stored runs are repeated"
    transfer(config, (32, 64, 128), 16384, runs=runs, seeds=3)
    assert {c.seed for c in calls[before:]} == {2}, "another seed repeats the runs of the others"
    assert "misses" in report.text
    assert json.loads(json.dumps(report.json))["passed"] is True
    draw_transfer(report, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").read_bytes()[:4] == b"\x89PNG"


def test_stored_runs_of_other_settings_lengths_or_data_are_not_used(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[ProxyConfig] = []
    monkeypatch.setattr(
        lr_transfer, "train_to_final_loss", lambda config, tokens: calls.append(config) or train_fake(config, tokens)
    )
    other = tmp_path / "other.txt"
    other.write_text("to be or not to be, that is the question " * 1000)
    runs = tmp_path / "runs.jsonl"
    config = ProxyConfig(corpus=text)
    transfer(config, (32, 64), 16384, runs=runs, seeds=1, control=False)
    n = len(calls)
    for changed, tokens in (
        (config, 32768),
        (config.model_copy(update={"beta2": 0.9}), 16384),
        (config.model_copy(update={"seed": 1}), 16384),
        (config.model_copy(update={"corpus": str(other)}), 16384),
    ):
        calls.clear()
        transfer(changed, (32, 64), tokens, runs=runs, seeds=1, control=False)
        assert len(calls) == n
    with runs.open("a") as stream:
        stream.write('{"loss": 2.0, "tok')
    with pytest.raises(ValueError, match=f"line {5 * n + 1} of .*: remove that line"):
        transfer(config, (32, 64), 16384, runs=runs, seeds=1)


def test_over_depth_the_control_has_no_rule() -> None:
    arms = make_arms(ProxyConfig(base_layers=2), "depth", (2, 8))
    with_rule, no_rule = (arms[name][8] for name in ("depth power 1", "no depth rule"))
    assert (with_rule.r, no_rule.r, with_rule.n_layers, no_rule.n_layers) == (4, 1, 8, 8)
    assert make_arms(ProxyConfig(), "depth", (2, 4))["depth power 1"][4].r == 2
    assert [*make_arms(ProxyConfig(), "width", (32, 64), control=False)] == ["mup"]


def test_invalid_arguments_are_refused_before_any_training(text: str) -> None:
    config = ProxyConfig(corpus=text)
    with pytest.raises(ValueError, match="at least two sizes"):
        transfer(config, (64,), 16384)
    with pytest.raises(ValueError, match="multiple of d_head"):
        transfer(config, (64, 65), 16384)
    with pytest.raises(ValueError, match="one seed and one worker"):
        transfer(config, (32, 64), 16384, workers=0)
    with pytest.raises(ValueError, match="needed at least"):
        transfer(config, (32, 64), 256)


@pytest.mark.slow
def test_losses_are_those_of_the_trainer_whatever_the_number_of_processes(tmp_path: Path, text: str) -> None:
    """This trains tiny models, in this process and in two others."""
    settings: dict[str, Any] = {
        "base_width": 16,
        "d_model": 16,
        "d_head": 8,
        "seq_len": 16,
        "n_layers": 1,
        "batch_seqs": 4,
    }
    config = ProxyConfig(**settings, warmup_tokens=64, eval_windows=4, corpus=text)
    with lr_transfer.open_pool(1) as run_here, lr_transfer.open_pool(2) as run_in_processes:
        jobs = [(config.model_copy(update={"lr": lr}), 1024) for lr in (0.001, 0.01, 1e6)]
        losses = dict(run_here(jobs))
        assert losses == dict(run_in_processes(jobs))
    assert losses[0] == train_to_final_loss(*jobs[0])
    assert math.isinf(losses[2]), "the third run did not diverge"


def test_a_dry_run_of_the_command_prints_the_cost_and_starts_nothing(tmp_path: Path, text: str) -> None:
    study = tmp_path / "small.toml"
    study.write_text(f'[trainer]\nwidths = [32, 64]\nbase_width = 32\nd_head = 8\nseq_len = 16\ncorpus = "{text}"\n')
    result = CliRunner().invoke(app, ["transfer", str(study), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "core-minutes" in result.output
    assert not (tmp_path / "small").exists()
    assert CliRunner().invoke(app, ["transfer", str(study), "--sizes", "32"]).exit_code == 2


def test_an_interval_is_formatted_as_value_and_ends() -> None:
    assert str(BootstrapInterval(0.1, -0.2, 0.4)) == "+0.100 [-0.200, +0.400]"


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("all the world's a stage, and all the men and women merely players " * 400)
    return str(path)
