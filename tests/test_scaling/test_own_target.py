"""A target that has been trained is compared with what was predicted of it before, and is no evidence for itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from scaling.__main__ import app
from scaling.advice.recommendation import recommend
from scaling.runs.table import check_runs
from scaling.tracking.client import connect
from scaling.tracking.experiment import find_or_create_child_run, find_or_create_study_run, set_run_status
from scaling.tracking.log import log_records, now_ms, read_note, result_to_metrics, write_note
from tests.test_scaling.test_recommend import RUNS

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
TARGET = {"N": 8e5, "D": 5e6}
# The target's loss, far below what the law predicts.
MEASURED = 1.5


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def log_run(client: Any, parent: str, name: str, role: str, row: Any, folder: Path, **params: Any) -> str:
    settings = {k: row[k] for k in ("N", "lr", "batch_tokens")} | {"parametrization": "mup", "seq_len": 128} | params
    child = find_or_create_child_run(client, parent, name, role=role, params=settings)
    metrics, tags = result_to_metrics(
        rung=0, tokens=int(row["D"]), loss=float(row["loss"]), seconds=1.0, checkpoint=folder / f"{name}.pt"
    )
    log_records(client, child, [(metrics, int(row["D"]), now_ms())], tags)
    set_run_status(client, child)
    return str(child.info.run_id if hasattr(child, "info") else child)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A study with proxies, a recommendation made from them, and a target that was trained afterwards."""
    folder = tmp_path_factory.mktemp("own-target")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = connect(uri)
    parent = find_or_create_study_run(client, "s", artifacts=folder / "artifacts", params={"seed": 0})
    for i, row in enumerate(RUNS.iloc[::9].to_dict("records")):
        log_run(client, parent, f"config-{i:04d}", "proxy", row, folder)
    write_note(client, parent, "target", TARGET)
    assert run("recommend", "s", "--target", "--no-next", "--tracking-uri", uri).exit_code in (0, 3)
    note = read_note(client, parent, "recommendation")
    assert note is not None
    row = TARGET | {"lr": note["lr"], "batch_tokens": note["batch_tokens"], "loss": MEASURED}
    arm = log_run(client, parent, "target-scratch-1", "target", row, folder, arm="scratch")
    predicted = {k: note[k] for k in ("loss", "loss_interval", "mass")}
    write_note(client, parent, "predicted", predicted | TARGET)
    write_note(client, parent, "targets", {"scratch": arm})
    return uri, folder


def test_the_targets_own_run_changes_no_law_and_no_distance_to_the_runs() -> None:
    before = recommend(RUNS, N=TARGET["N"], D=TARGET["D"])
    own = RUNS.head(1).assign(**TARGET, loss=MEASURED, role="target", arm="scratch", run_id="t")
    after = recommend(
        check_runs(pd.concat([RUNS.assign(role="proxy"), own], ignore_index=True)), N=TARGET["N"], D=TARGET["D"]
    )
    assert (after.loss, after.loss_interval, after.lr) == (before.loss, before.loss_interval, before.lr)
    assert (after.refit, after.measured, before.refit) == (True, {"scratch": MEASURED}, False)
    assert [f.text for f in after.flags] == [f.text for f in before.flags]
    assert any("The target's N is 2 times the largest" in f.text for f in after.flags)
    other = recommend(check_runs(pd.concat([RUNS.assign(role="proxy"), own], ignore_index=True)), N=1.6e6, D=5e6)
    assert not other.refit
    assert other.provenance["n_runs"] == before.provenance["n_runs"] + 1


def test_recommend_shows_what_was_predicted_and_calls_the_rest_a_refit(study: tuple[str, Path]) -> None:
    uri, _ = study
    note = read_note(connect(uri), find_or_create_study_run(connect(uri), "s", artifacts=Path()), "predicted")
    assert note is not None
    done = run("recommend", "s", "--target", "--no-next", "--tracking-uri", uri)
    lines = {re.split(r" {2,}", line.strip())[0]: line for line in done.stdout.splitlines()}
    assert f"{note['loss']:.4f}" in lines["loss, predicted before"]
    assert "outside the predicted interval" in lines["measured, scratch"]
    assert f"{MEASURED:.4f}" in lines["measured, scratch"]
    assert "refit without it" in lines
    assert "Refit for N = 800,000" in done.stdout
    assert "`hpo best s`" in done.stdout
    as_json = json.loads(run("recommend", "s", "--target", "--no-next", "--json", "--tracking-uri", uri).stdout)
    assert as_json["prediction"]["loss"] == note["loss"]
    assert as_json["measured"] == {"scratch": MEASURED}
    # A refit does not replace the prediction.
    assert read_note(connect(uri), find_or_create_study_run(connect(uri), "s", artifacts=Path()), "predicted") == note


def test_the_report_shows_the_prediction_made_before(study: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    uri, folder = study
    monkeypatch.chdir(folder)
    done = run("report", "s", "--tracking-uri", uri)
    assert done.exit_code == 0, done.output
    page = (folder / "studies" / "s" / "report.html").read_text()
    note = read_note(connect(uri), find_or_create_study_run(connect(uri), "s", artifacts=Path()), "predicted")
    assert note is not None
    answer = page.split("<h2>")[0]
    assert f"{note['loss']:.4f}" in answer
    assert f"{MEASURED:.4f}" in answer
    assert "outside the predicted interval" in answer
    assert page.count("the target against its prediction") == 1
