"""A study made by muscale 0.1 and stopped halfway: later versions resume, fit and report it.

tests/data/study-0.1 holds what 0.1 wrote: the study file, journal, study.json, results, checkpoints and the MLflow
store. It was made in the folder that MLflow's artifact locations name, which the tests replace by the folder they copy
it to.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from hpo.study.config import StudyConfig, load_study
from proxies.training.checkpoints import read_run
from scaling.runs.io import load_runs

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "data" / "study-0.1"
# The loss of each evaluation that 0.1 finished, by (N, D, lr), as its progress lines showed them.
FINISHED = {
    (1232, 8192, 0.003737): 5.1134,
    (1232, 24576, 0.05302): 2.9397,
    (2880, 8192, 0.3291): 3.2237,
    (2880, 24576, 0.07049): 2.7683,
    (4944, 24576, 0.02789): 2.7138,
    (4944, 8192, 0.04649): 3.0806,
}
pytestmark = pytest.mark.filterwarnings("ignore")


def copy_sample(folder: Path) -> Path:
    """Copy the sample to a folder and move MLflow's artifact locations there."""
    shutil.copytree(SAMPLE, folder, dirs_exist_ok=True)
    with closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            store.execute(f"update {table} set {column} = replace({column}, '/home/user/project', ?)", (str(folder),))
    return folder


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sample(tmp_path_factory.mktemp("sample"))


def run(folder: Path, *words: str, codes: tuple[int, ...] = (0,)) -> str:
    """Run a command as a user would in the project's folder; its output on stdout."""
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in codes, done.stderr
    return done.stdout


def test_its_study_file_means_what_it_meant(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sample)
    study, _ = load_study(Path("studies/sample.toml"))
    # A setting that is newer than the study has its default.
    recorded = StudyConfig.model_validate_json((sample / "studies" / "sample" / "study.json").read_bytes())
    assert study == recorded
    written = json.loads((sample / "studies" / "sample" / "study.json").read_text())
    present = study.model_dump(mode="json")
    growing = ("search", "workers")
    assert {name: present[name] for name in written if name not in growing} == {
        name: value for name, value in written.items() if name not in growing
    }
    assert all(present[name].items() >= written[name].items() for name in growing)


def test_its_runs_have_the_losses_that_it_reported(sample: Path) -> None:
    runs = load_runs("sample", tracking_uri=f"sqlite:///{sample}/mlflow.db")
    assert len(runs) == 11
    reported = {(int(r.N), int(r.D), float(f"{r.lr:.4g}")): round(r.loss, 4) for r in runs.itertuples()}
    assert {key: reported[key] for key in FINISHED} == FINISHED


def test_its_checkpoints_are_read(sample: Path) -> None:
    checkpoints = sorted((sample / "studies" / "sample" / "checkpoints").glob("*.pt"))
    assert len(checkpoints) == 11
    for path in checkpoints:
        assert path.stat().st_size < 200_000
        assert read_run(path)["annealed"]["model"]


def test_its_status_is_read_without_a_change(sample: Path) -> None:
    journal = sample / "studies" / "sample" / "study.journal"
    status = json.loads(run(sample, "hpo", "status", "sample", "--json"))
    assert status["finished"] is False
    assert (status["done"], status["planned"]) == (11, 18)
    assert journal.read_bytes().startswith((SAMPLE / "studies" / "sample" / "study.journal").read_bytes())


@pytest.mark.slow
def test_it_is_resumed_fitted_recommended_from_and_reported(tmp_path: Path) -> None:
    folder = copy_sample(tmp_path)
    run(folder, "hpo", "resume", "sample")
    status = json.loads(run(folder, "hpo", "status", "sample", "--json"))
    assert (status["finished"], status["done"]) == (True, 18)
    runs = load_runs("sample", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    assert len(runs) == 18
    reported = {(int(r.N), int(r.D), float(f"{r.lr:.4g}")): round(r.loss, 4) for r in runs.itertuples()}
    assert {key: reported[key] for key in FINISHED} == FINISHED, "nothing that 0.1 finished is trained again"
    # Two rungs at three sizes: six groups, which are enough for a law of the loss; doubts about the answer are allowed.
    assert json.loads(run(folder, "scaling", "fit", "sample", "--json", codes=(0, 3)))["groups"] == 6
    answer = json.loads(run(folder, "scaling", "recommend", "sample", "--target", "--json", codes=(0, 3)))
    assert answer["loss_interval"][0] < answer["loss"] < answer["loss_interval"][1]
    run(folder, "scaling", "report", "sample")
    assert "<svg" in (folder / "studies" / "sample" / "report.html").read_text()
    # A checkpoint of 0.1 is also what a later run can be grown from.
    run(folder, "proxies", "grow", "studies/sample/checkpoints/0009-24576.pt", "--width", "16", "--out", "grown.pt")
    assert (folder / "grown.pt").exists()
