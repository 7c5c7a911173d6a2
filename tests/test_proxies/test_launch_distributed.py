"""Launches as a user starts them: in one process, on two ranks of which one is killed, without MLflow, by a command."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from proxies.config.proxy import ProxyConfig
from proxies.launch.arms import ArmResult, train_arm
from proxies.launch.plan import LaunchPlan, write_plan
from scaling.curves.planned import LossBand
from scaling.runs.io import load_runs
from scaling.runs.table import usable
from scaling.tracking import experiment, recorder
from scaling.tracking.client import connect
from scaling.tracking.experiment import find_or_create_study_run, find_study_run
from scaling.tracking.log import read_curve, read_note

ROOT = Path(__file__).parents[2]
STARTED: list[subprocess.Popen[str]] = []
# Nothing listens there.
NOWHERE = "http://127.0.0.1:9"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    text = tmp_path / "text.txt"
    text.write_text("all the world's a stage, and all the men and women merely players " * 400)
    config = ProxyConfig(
        d_model=32,
        base_width=16,
        d_head=16,
        n_layers=1,
        seq_len=16,
        batch_seqs=4,
        warmup_tokens=64,
        lr=0.01,
        corpus=str(text),
    )
    config = config.model_copy(update={"eval_windows": 8})
    return make_plan(config=config, tokens=16_384, N=float(config.counts.N), lr=config.lr)


def make_plan(*, tokens: int, N: float, lr: float, **fields: Any) -> LaunchPlan:
    loss = {"loss": 1.0, "loss_interval": [0.01, 5.0], "mass": 0.9}
    # Every point lies below this band.
    band = LossBand((512.0, float(tokens)), (8.0, 8.0), (7.0, 7.0), (9.0, 9.0), 0.95, 9, 1.0)
    because = {"N": N, "D": float(tokens), "lr": lr} | loss
    return LaunchPlan(study="s", tokens=tokens, because=because, curve=band, **fields)


def start(path: Path, uri: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "proxies", "launch", str(path), "--tracking-uri", uri, "--json", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    STARTED.append(subprocess.Popen(command, cwd=path.parent, env=env, **streams))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def _terminate_started_processes() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.communicate()


def wait_for(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=900)
    assert process.returncode == code, err
    return out, err


LayOut = Callable[[LaunchPlan, str], tuple[Path, str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an MLflow store with an empty study; it is copied, because making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    find_or_create_study_run(connect(f"sqlite:///{path}"), "s", artifacts=path.parent / "artifacts")
    return path


@pytest.fixture
def lay_out(store: Path, tmp_path: Path) -> LayOut:
    """Return a function that writes a plan into a new folder, beside a store of its own."""

    def write(plan: LaunchPlan, name: str) -> tuple[Path, str]:
        path = tmp_path / name / "plan.json"
        write_plan(plan, path)
        shutil.copy(store, path.parent)
        return path, f"sqlite:///{path.parent}/mlflow.db"

    return write


def test_two_ranks_of_which_one_is_killed_give_the_loss_of_one_and_one_record(
    plan: LaunchPlan, lay_out: LayOut, tmp_path: Path
) -> None:
    alone, uri = lay_out(plan, "alone")
    process = start(alone, uri)
    both, other = lay_out(plan, "both")
    pair = start(both, other, "--ranks", "2", "--engine", "ddp")
    records = tmp_path / "both" / "records"

    def points() -> int:
        return sum(file.read_text().count('"loss"') for file in records.glob("*.jsonl"))

    wait_until(lambda: points() >= 3, pair)
    (victim,) = (p for p in psutil.Process(pair.pid).children(recursive=True) if read_rank(p) == "1")
    victim.kill()
    out, stderr = wait_for(process)
    again, pair_stderr = wait_for(pair)
    assert json.loads(out)["scratch in the predicted interval"] is True
    first, second = (ArmResult.read(tmp_path / name, "scratch") for name in ("alone", "both"))
    assert first is not None
    assert second is not None
    assert first.loss is not None
    assert second.loss == pytest.approx(first.loss, abs=1e-5)
    assert pair_stderr.count("has left its 95 % band at 576 tokens") == 2, (
        "logged once in each start, so it was restarted"
    )
    client = connect(other)
    runs = load_runs("s", tracking_uri=other)
    assert runs[["role", "arm", "excluded"]].to_numpy().tolist() == [["target", "scratch", ""]]
    assert len(usable(runs)) == 1
    curve = read_curve(client, runs.at[0, "run_id"])
    lone = read_curve(connect(uri), load_runs("s", tracking_uri=uri).at[0, "run_id"])
    assert dict(zip(*curve, strict=True)) == pytest.approx(dict(zip(*lone, strict=True)), abs=1e-5)
    # The band lies above all points: one warning in each start, one tag, and a line in the score.
    assert stderr.count("WARNING: target-scratch-") == 1
    assert "has left its 95 % band at 576 tokens (3.5 % of the run)" in stderr, (
        "the first point within the band's tokens"
    )
    tag = json.loads(client.get_run(runs.at[0, "run_id"]).data.tags["muscale.outside_band"])
    assert (tag["tokens"], tag["low"]) == (576, pytest.approx(7.0))
    assert json.loads(again)["scratch left its band"].startswith("at 576 tokens")


def test_without_mlflow_it_trains_and_a_later_start_only_sends_and_scores(plan: LaunchPlan, lay_out: LayOut) -> None:
    assert plan.config is not None
    plan = make_plan(config=plan.config, tokens=4096, N=plan.N, lr=plan.lr)
    path, uri = lay_out(plan, "away")
    _, stderr = wait_for(start(path, NOWHERE), 3)
    assert "trained, but not scored: MLflow does not answer" in stderr
    trained = (path.parent / "scratch.pt").stat().st_mtime_ns
    out, _ = wait_for(start(path, uri))
    loss = json.loads(out)["loss at 4,096 tokens, scratch"]
    assert (path.parent / "scratch.pt").stat().st_mtime_ns == trained
    runs = load_runs("s", tracking_uri=uri)
    assert runs["loss"].tolist() == pytest.approx([loss], abs=1e-4)
    assert len(read_curve(connect(uri), runs.at[0, "run_id"])[0]) >= 4
    note = read_note(connect(uri), find_study_run(connect(uri), "s"), "predicted")
    assert note == {"N": plan.N, "D": 4096, "loss": 1.0, "loss_interval": [0.01, 5.0], "mass": 0.9}


def test_a_command_trains_the_target_with_the_plans_values(lay_out: LayOut, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import json, sys\n"
        "lr, tokens = float(sys.argv[1]), int(sys.argv[2])\n"
        "for t in (tokens // 4, tokens // 2, tokens):\n"
        "    print(json.dumps({'tokens': t, 'loss': 1 + lr + 100 / t, 'final': t == tokens}))\n"
    )
    values = {"lr": 0.5, "N": 1000, "tokens": 1000, "batch_tokens": 32}
    made = make_plan(tokens=1000, N=1000.0, lr=0.5, command=f"{{python}} {script} {{lr}} {{tokens}}", values=values)
    path, uri = lay_out(made.model_copy(update={"curve": None}), "command")
    out, stderr = wait_for(start(path, uri))
    assert f"{script} 0.5 1000" in stderr
    assert json.loads(out)["loss at 1,000 tokens, scratch"] == 1.6
    row = usable(load_runs("s", tracking_uri=uri)).iloc[0]
    assert (row["N"], row["D"], row["lr"], row["batch_tokens"], row["loss"]) == (1000, 1000, 0.5, 32, 1.6)
    assert math.isfinite(row["seconds"])
    shutil.rmtree(path.parent / "records")
    script.write_text("raise SystemExit(3)")
    again, there = lay_out(made.model_copy(update={"curve": None}), "broken")
    _, stderr = wait_for(start(again, there), 1)
    assert "ended with exit code 3" in stderr, stderr


def test_the_recorder_alone_creates_the_run_of_a_command(
    lay_out: LayOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_child = experiment.find_child

    def find_slowly(*arguments: Any) -> Any:
        run = find_child(*arguments)
        # Whatever else looks for the run meanwhile does not find it either.
        time.sleep(0.5)
        return run

    monkeypatch.setattr(experiment, "find_child", find_slowly)
    monkeypatch.setattr(recorder, "FIRST_FLUSH_SECONDS", 0.0)
    script = tmp_path / "train.py"
    script.write_text(
        "import json, os, pathlib\n"
        "names = 'MLFLOW_RUN_ID', 'MLFLOW_TRACKING_URI'\n"
        "pathlib.Path('told').write_text(json.dumps([os.environ[name] for name in names]))\n"
        "print(json.dumps({'tokens': 1000, 'loss': 2.0, 'final': True}))\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    values = {"lr": 0.5, "N": 1000, "tokens": 1000}
    made = make_plan(tokens=1000, N=1000.0, lr=0.5, command=f"{{python}} {script}", values=values, cwd=elsewhere)
    made = made.model_copy(update={"curve": None})
    path, uri = lay_out(made, "command")
    monkeypatch.chdir(path.parent)
    assert train_arm(made, "scratch", path.parent, uri="sqlite:///mlflow.db") == 2.0
    run = load_runs("s", tracking_uri=uri)["run_id"].item()
    assert json.loads((elsewhere / "told").read_text()) == [run, uri], "an address that is valid in its own folder"


def read_rank(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RANK") if "--only" in process.cmdline() else None
    except psutil.Error:
        return None


def wait_until(ready: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not ready():
        assert time.monotonic() < deadline
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.05)
