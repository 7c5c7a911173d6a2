"""`hpo plan` on the command line: what it prints, refuses, and writes into a study file that is then launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hpo.__main__ import app
from hpo.cli.plan import read_params
from hpo.study.config import StudyError, load_study
from hpo.study.lifecycle import open_search
from hpo.study.plan_file import read_spend
from tests.test_hpo.toy_study import PATIENCE_SECONDS, ROOT

STUDY = """
# A study of small proxies.
seed = 3

[search]
tokens = { min = 1_000, max = 9_000 }  # is replaced

[space]
lr = { low = 1e-3, high = 0.25, log = true }
batch_seqs = { low = 1, high = 8, log = true, type = "int" }

[trainer]
widths = [16]
n_layers = 1
d_head = 8
seq_len = 32
warmup_tokens = 256
eval_windows = 8
corpus = "stdlib"  # Python's own text

[target]
d_model = 48
tokens = 120_000

[workers]
count = 2
"""


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words])


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "studies" / "mine.toml"
    path.parent.mkdir()
    path.write_text(STUDY)
    return path


def test_a_target_without_a_study_is_planned() -> None:
    result = invoke("--params", "7B", "--tokens", "1.4T", "--spend", "1%")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 120
    assert "N 7B, D 1.4T" in result.stdout
    record = json.loads(invoke("--params", "7B", "--tokens", "1.4T", "--spend", "5.88e20", "--json").stdout)
    assert record["share"] == pytest.approx(0.01, rel=0.02)
    assert record["expected"]["regret"] < 0.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needed a study file, or --params and --tokens"),
        (("--params", "7B", "--tokens", "1T", "--spend", "lots"), "needed a share of the target's compute such as 1%"),
        (("--params", "7B", "--tokens", "1T", "--spend", "500h"), "a budget of 500h needs --speed"),
        (("--params", "7B", "--tokens", "1T", "--spend", "0h", "--speed", "1T"), "needed more than 0 hours"),
        (("--params", "7B", "--tokens", "1T", "--speed", "180T"), "--speed is for a budget in hours"),
        (("--params", "7B", "--tokens", "1T", "--spend", "5h", "--speed", "fast"), "--speed: needed a positive count"),
        (("--params", "32x4096", "--tokens", "1T"), "layers x width x vocabulary"),
        (("--params", "7B", "--tokens", "1T", "--spend", "100%"), "needed a share above 0% and below 100%"),
        (("--params", "7B", "--tokens", "1T", "--spend", "1e-9%"), "FLOPs"),
        (("--params", "7B", "--tokens", "1T", "--out", "x.toml"), "it needs a study file"),
    ],
)
def test_bad_options_are_refused(words: tuple[str, ...], message: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_budgets_are_shares_or_flops() -> None:
    assert read_spend("2.5%", 4e20) == pytest.approx(1e19)
    assert read_spend("3e18", 4e20) == pytest.approx(3e18)


def test_gpu_hours_are_flops_at_a_speed() -> None:
    assert read_spend("2.5h", 4e20, speed=1e14) == pytest.approx(2.5 * 3600 * 1e14)
    assert read_spend("500 GPU-hours", 4e20, speed=2e14) == pytest.approx(500 * 3600 * 2e14)
    result = invoke("--params", "1B", "--tokens", "20B", "--spend", "10h", "--speed", "40T", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["flops"] == pytest.approx(10 * 3600 * 40e12, rel=0.02)


def test_a_shape_has_the_parameters_that_multiply_tokens() -> None:
    """A block of four square matrices of attention and two of the feed-forward part, four widths wide."""
    width, layers, vocabulary = 64, 3, 100
    blocks = layers * (4 * width * width + 2 * 4 * width * width)
    assert read_params("3x64x100") == blocks + width * vocabulary
    assert read_params("7B") == 7e9


def test_a_planned_study_keeps_its_other_tables(study: Path) -> None:
    out = study.with_name("planned.toml")
    result = invoke(str(study), "--spend", "20%", "--out", str(out))
    assert result.exit_code == 0, result.output
    before, after = (tomllib.loads(path.read_text()) for path in (study, out))
    assert {k: after[k] for k in ("seed", "space", "target", "workers")} == {
        k: before[k] for k in ("seed", "space", "target", "workers")
    }
    assert "# Python's own text" in out.read_text()
    config, trainer = load_study(out)
    assert config.search.scheduler == "law"
    target = trainer.target(**after["target"])
    search = open_search(config, trainer, None)
    cost = sum(6 * trainer.sizes[g.size] * g.tokens * g.runs for g in config.search.groups)
    assert 0.7 * 0.2 * target.C < cost <= 0.2 * target.C * (1 + 1e-9)
    job = search.ask()
    assert job is not None
    assert job.fidelity.N == min(trainer.sizes)
    assert search.progress.planned == sum(group.runs for group in config.search.groups)
    # It plans the planned study again, and refuses to overwrite another one.
    assert invoke(str(out), "--spend", "40%", "--out", str(out)).exit_code == 0
    refused = invoke(str(study), "--spend", "20%", "--out", str(out))
    assert refused.exit_code == 2
    assert "exists" in refused.output


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = { low = 1e-3, high = 0.25, log = true }", "beta1 = { low = 0.5, high = 0.9 }", "learning rate"),
        ("[target]\nd_model = 48\ntokens = 120_000\n", "", "needs a [target] table"),
        ("widths = [16]", "widths = [16]\noptimizer = 'other'", "optimizer"),
    ],
)
def test_studies_without_a_plan_are_refused(study: Path, old: str, new: str, message: str) -> None:
    assert old in STUDY
    study.write_text(STUDY.replace(old, new))
    result = invoke(str(study), "--spend", "20%", "--out", str(study.with_name("out.toml")))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not study.with_name("out.toml").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": ""}, "scheduler = 'law' needs groups"),
        (
            {"groups": "groups = [{ size = 0, tokens = 1_000, runs = 9 }, { size = 7, tokens = 9_000, runs = 3 }]"},
            "[7]",
        ),
        ({"groups": "groups = [{ size = 0, tokens = 1_500, runs = 9 }]"}, "tokens must be rungs"),
        (
            {"groups": f"groups = [{', '.join(['{ size = 0, tokens = 1_000, runs = 9 }'] * 2)}]"},
            "two have the same size and tokens",
        ),
        ({"groups": "groups = [{ size = 0, tokens = 1_000, runs = 5 }]"}, "spread must be less than the runs"),
        (
            {"more": "iterations = 2\nseeds = 3"},
            "leave out iterations; scheduler = 'law' runs its groups: leave out seeds",
        ),
    ],
)
def test_mistakes_in_a_written_plan_are_reported(study: Path, change: dict[str, str], message: str) -> None:
    groups = "groups = [{ size = 0, tokens = 1_000, runs = 9 }, { size = 0, tokens = 9_000, runs = 3 }]"
    lines = ["scheduler = 'law'", change.get("groups", groups), change.get("more", "")]
    old = "tokens = { min = 1_000, max = 9_000 }  # is replaced"
    study.write_text(STUDY.replace(old, "\n".join([old, *lines])))
    with pytest.raises(StudyError) as error:
        load_study(study)
    assert message in str(error.value)


@pytest.mark.slow
def test_a_planned_study_is_launched_and_answers(study: Path) -> None:
    """From the plan to the recommendation, as a user would do it, with real training."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{study.parent}/mlflow.db"}

    def run(program: str, *words: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            [sys.executable, "-m", program, *words],
            capture_output=True,
            text=True,
            cwd=study.parent.parent,
            env=environment,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode in codes, done.stdout + done.stderr
        return done.stdout

    run("hpo", "plan", "studies/mine.toml", "--spend", "30%", "--out", "studies/planned.toml")
    run("hpo", "launch", "studies/planned.toml")
    groups = tomllib.loads((study.parent / "planned.toml").read_text())["search"]["groups"]
    status = json.loads(run("hpo", "status", "planned", "--json"))
    assert status["done"] == sum(group["runs"] for group in groups)
    best = json.loads(run("hpo", "best", "planned", "--json"))
    assert "By the law of the planned runs" in run("hpo", "best", "planned")
    advice = json.loads(run("scaling", "recommend", "planned", "--target", "--json", codes=(0, 3)))
    # Both answer from one law of the same runs.
    assert best["lr"] == pytest.approx(min(max(advice["lr"], 1e-3), 0.25), rel=1e-6)
    resumed = run("hpo", "resume", "planned")
    assert json.loads(run("hpo", "status", "planned", "--json"))["done"] == status["done"], resumed
