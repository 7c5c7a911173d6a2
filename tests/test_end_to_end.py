"""The whole loop on real text, small: every command as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from proxies.launch.plan import read_plan
from scaling.fitting.lr_batch_law import fit_hp_law
from scaling.runs.io import load_runs
from scaling.tracking.client import connect
from scaling.tracking.experiment import find_study_run
from scaling.tracking.log import read_curve, read_note

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STUDY = """
[search]
tokens = { min = 16_384, max = 49_152 }
[space]
lr = { low = 1e-3, high = 0.5, log = true }
batch_seqs = { low = 2, high = 8, log = true, type = "int" }
weight_decay = { low = 0.01, high = 1.0, log = true }
[trainer]
widths = [16, 32, 48]
seq_len = 64
warmup_tokens = 2048
eval_windows = 32
[target]
d_model = 64
tokens = 65_536
[workers]
count = 2
"""


class Loop:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        (folder / "studies").mkdir()
        (folder / "studies" / "small.toml").write_text(STUDY)

    def run(self, *words: str, codes: tuple[int, ...] = (0,)) -> str:
        env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=self.folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode in codes, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """Run the loop once; the tests examine its results."""
    made = Loop(tmp_path_factory.mktemp("loop"))
    made.run("hpo", "launch", "studies/small.toml")
    made.run("scaling", "fit", "small")
    made.run("scaling", "recommend", "small", "--target", codes=(0, 3))
    made.run("proxies", "launch", "studies/small.toml")
    made.run("scaling", "report", "small")
    return made


def test_every_configuration_is_a_run_with_its_settings(loop: Loop) -> None:
    runs = load_runs("small", tracking_uri=loop.uri)
    proxies = runs[runs["role"] == "proxy"]
    # Two rungs at eta 3 are 3 + 1 and 2 evaluations, of 5 configurations, at each of three sizes.
    assert len(proxies) == 3 * 6
    assert proxies["run_id"].nunique() == 3 * 5
    assert proxies["loss"].between(2.0, 5.6).all()
    assert proxies["data_sha256"].nunique() == 1
    assert (proxies["batch_tokens"] % 64 == 0).all()
    for path in proxies["checkpoint"]:
        assert (loop.folder / path).exists()


def test_curves_and_settings_are_in_mlflow(loop: Loop) -> None:
    client = connect(loop.uri)
    run = load_runs("small", tracking_uri=loop.uri).query("role == 'proxy' and D == 49152").iloc[0]["run_id"]
    tokens, losses = read_curve(client, run)
    assert tokens == sorted(tokens)
    assert len(tokens) >= 2
    assert losses[-1] < losses[0]
    params = client.get_run(run).data.params
    assert {"lr", "weight_decay", "data_sha256", "N_total", "d_model", "seed"} <= params.keys()
    parent = client.get_run(find_study_run(client, "small"))
    assert {"best_loss", "evaluations", "recommended_lr"} <= parent.data.metrics.keys()
    assert parent.data.metrics["evaluations"] == 18
    assert {
        "muscale.recommendation",
        "muscale.best",
        "muscale.warm_start",
        "muscale.git_commit",
    } <= parent.data.tags.keys()
    assert {"report.html", "study.json", "data.json"} <= {f.path for f in client.list_artifacts(parent.info.run_id)}
    files = json.loads((loop.folder / "studies" / "small" / "data.json").read_text())
    assert len(files) == int(params["data_files"]) > 1000
    assert {f["split"] for f in files} == {"train", "val"}


def test_the_target_is_launched_as_recommended_and_scored(loop: Loop) -> None:
    plan = read_plan(next((loop.folder / "studies" / "small").glob("target-*/plan.json")))
    assert plan.config.lr == plan.because["lr"]
    assert plan.config.d_model == 64
    best = json.loads(loop.run("hpo", "best", "small", "--json"))
    assert plan.config.weight_decay == best["weight_decay"], "what no law covers comes from the search's own answer"
    assert plan.warm is not None
    assert plan.warm.N == load_runs("small", tracking_uri=loop.uri).query("role == 'proxy'")["N"].max()
    targets = load_runs("small", tracking_uri=loop.uri).query("role == 'target'").set_index("name")
    assert set(targets.index) == {f"target-warm-{plan.id}", f"target-scratch-{plan.id}"}
    assert (targets["D"] == 65_536).all()
    note = read_note(connect(loop.uri), find_study_run(connect(loop.uri), "small"), "warm_start")
    assert note is not None
    assert note["loss at 65,536 tokens, warm"] == pytest.approx(targets.at[f"target-warm-{plan.id}", "loss"], abs=1e-4)


def test_launching_the_target_again_trains_nothing_again(loop: Loop) -> None:
    (trained,) = (loop.folder / "studies" / "small").glob("target-*/warm.pt")
    before = trained.stat().st_mtime_ns
    again = json.loads(loop.run("proxies", "launch", "small", "--json"))
    assert "loss at 65,536 tokens, warm" in again
    assert trained.stat().st_mtime_ns == before


def test_the_report_is_one_file_that_needs_no_network(loop: Loop) -> None:
    page = (loop.folder / "studies" / "small" / "report.html").read_text()
    # Two workers race, so how many runs of a group are near enough to its best for a bowl differs from study to study.
    law = fit_hp_law(load_runs("small", tracking_uri=loop.uri))
    bowls = int((law.floors["n"] >= 3).sum())
    assert 3 <= bowls <= 6, "three sizes at two run lengths"
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    assert "<script" not in page
    for title, figures in {
        "Loss against learning rate (base width)": bowls,
        "Loss against batch, tokens per step": bowls,
        "Loss against compute": 2,
        "Best learning rate and batch against tokens": 2,
        # One for each size.
        "Loss curves": 3,
        "Rungs and promotions": 3,
        "The target against its prediction": 1,
    }.items():
        assert f"<h2>{title}</h2>" in page
        assert page.split(f"<h2>{title}</h2>")[1].split("<h2>")[0].count("<svg") == figures


def test_json_answers_are_json(loop: Loop) -> None:
    answer = json.loads(loop.run("scaling", "recommend", "small", "--target", "--json", codes=(0, 3)))
    assert answer["loss_interval"][0] < answer["loss"] < answer["loss_interval"][1]
    groups = json.loads(loop.run("scaling", "fit", "small", "--json"))["groups"]
    assert groups == 7, "six of the search, and the target from scratch"
    assert json.loads(loop.run("hpo", "status", "small", "--json"))["finished"] is True


def test_a_table_leaves_mlflow_and_comes_back(loop: Loop) -> None:
    loop.run("scaling", "import", "small", "--out", "small.parquet")
    there = load_runs(loop.folder / "small.parquet")
    here = load_runs("small", tracking_uri=loop.uri)
    assert sorted(there["loss"]) == sorted(here["loss"])
    loop.run("scaling", "recommend", "small.parquet", "--params", "1e5", "--tokens", "1e5", codes=(0, 3))


def test_questions_that_cannot_be_answered_are_refused(loop: Loop) -> None:
    loop.run("scaling", "recommend", "smal", "--target", codes=(2,))
    loop.run("scaling", "recommend", "small", "--params", "1e5", codes=(2,))
    loop.run("scaling", "recommend", "small.csv", "--target", codes=(2,))
    loop.run("proxies", "launch", "nowhere.json", codes=(2,))
    loop.run("proxies", "train", "small", "--width", "17", "--tokens", "20000", codes=(2,))


def test_the_coordinate_check_passes_under_mup_and_fails_without(loop: Loop) -> None:
    assert "passed" in loop.run("proxies", "check", "small", "--seeds", "1").lower()
    answer = json.loads(
        loop.run("proxies", "check", "small", "--seeds", "1", "--parametrization", "standard", "--json", codes=(1,))
    )
    assert answer["passed"] is False


def test_one_proxy_can_be_trained_and_grown_by_hand(loop: Loop) -> None:
    words = ["proxies", "train", "small", "--width", "32", "--tokens", "16384", "--set", "lr=0.01", "--save", "one.pt"]
    points = [json.loads(line) for line in loop.run(*words).splitlines()]
    assert points[-1]["final"] is True
    assert points[-1]["tokens"] == 16_384
    assert "N " in loop.run("proxies", "grow", "one.pt", "--width", "64", "--out", "grown.pt")
    assert (loop.folder / "grown.pt").exists()
