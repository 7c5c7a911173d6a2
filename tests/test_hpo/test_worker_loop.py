"""What a worker does with trainings that end badly, without child processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.search.search import Search
from hpo.search.view import Job
from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study, open_existing
from hpo.worker import loop
from hpo.worker.job import read_losses, run_job
from hpo.worker.signals import StopSignals
from hpo.worker.training_process import ChildProcessTrainer, TrainingCrashed
from tests.test_hpo.toy_study import STUDY

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFiles:
    """Return the files of a study that has been launched, in an MLflow store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("scaling.tracking.experiment.read_git_commit", lambda: "none")
    (tmp_path / "studies").mkdir()
    (tmp_path / "steps").mkdir()
    toml = tmp_path / "studies" / "toy.toml"
    toml.write_text(STUDY.format(pause=0.0, seeds="[1, 2, 2]", steps=tmp_path / "steps"))
    files = StudyFiles(toml)
    study, trainer = load_study(toml)
    create_study(files, study, trainer, uri=None)
    return files


def count_steps(files: StudyFiles) -> int:
    return sum(len(p.read_text().splitlines()) for p in (files.toml.parents[1] / "steps").iterdir())


def open_search(files: StudyFiles) -> Search:
    study, trainer = load_study(files.toml)
    return open_existing(files, study, trainer)


class VanishingTrainer(ChildProcessTrainer):
    """Trains each job to its end, but after every third one, its process seems to end before it reports the result."""

    jobs = 0

    def __enter__(self) -> VanishingTrainer:
        return self

    def train(self, job: Job, monitor: Any, beat: Callable[[], None], stop: StopSignals) -> Any:
        losses = run_job(job, self.study.make_trainer(), self.files, self.uri, stop, monitor)
        VanishingTrainer.jobs += 1
        if VanishingTrainer.jobs % 3 == 0:
            raise TrainingCrashed("no measurement for 8 s: killed as hanging")
        return losses


def test_a_training_that_finished_before_its_process_ended_has_not_crashed(
    files: StudyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "ChildProcessTrainer", VanishingTrainer)
    monkeypatch.setattr(VanishingTrainer, "jobs", 0)
    assert loop.run_worker(files) == 0
    trials = open_search(files).study.get_trials()
    assert len(trials) == 44
    assert VanishingTrainer.jobs == 44, "no job is given out twice"
    assert not [t for t in trials if "crashes" in t.user_attrs]
    too_high = {t.number for t in trials if t.params["lr"] > 0.5}
    assert {t.number for t in trials if t.user_attrs.get("diverged")} == too_high


def test_a_result_that_was_never_reported_is_not_trained_again(files: StudyFiles) -> None:
    search, (_, trainer) = open_search(files), load_study(files.toml)
    uri = f"sqlite:///{files.toml.parents[1]}/mlflow.db"
    with StopSignals() as stop:
        # The twelfth job is at a rung of two seeds.
        for _ in range(12):
            job = search.ask()
            assert job is not None
            assert read_losses(job, files) is None
            losses = run_job(job, trainer, files, uri, stop)
            trained = count_steps(files)
            again = run_job(job, trainer, files, uri, stop)
            assert count_steps(files) == trained
            assert again == pytest.approx(losses, nan_ok=True)
            assert read_losses(job, files) == pytest.approx(losses, nan_ok=True)
            search.tell(job, losses)  # type: ignore[arg-type]
            seeds = job.seeds
    assert seeds == 2
