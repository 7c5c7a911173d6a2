"""What a worker makes of trainings that end badly, with the processes left out."""

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
from tests.test_hpo.test_launcher import STUDY

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFiles:
    """A study that was launched, in a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("scaling.tracking.experiment.read_git_commit", lambda: "none")
    (tmp_path / "studies").mkdir()
    (tmp_path / "steps").mkdir()
    toml = tmp_path / "studies" / "toy.toml"
    toml.write_text(STUDY.format(pause=0.0, seeds="[1, 2, 2]", steps=tmp_path / "steps"))
    made = StudyFiles(toml)
    study, trainer = load_study(toml)
    create_study(made, study, trainer, uri=None)
    return made


def steps(files: StudyFiles) -> int:
    return sum(len(p.read_text().splitlines()) for p in (files.toml.parents[1] / "steps").iterdir())


def opened(files: StudyFiles) -> Search:
    study, trainer = load_study(files.toml)
    return open_existing(files, study, trainer)


class Leaving(ChildProcessTrainer):
    """A process that trains every job to its end, and every third time goes before it can say so."""

    jobs = 0

    def __enter__(self) -> Leaving:
        return self

    def train(self, job: Job, watch: Any, beat: Callable[[], None], stop: StopSignals) -> Any:
        losses = run_job(job, self.study.make_trainer(), self.files, self.uri, stop, watch)
        Leaving.jobs += 1
        if Leaving.jobs % 3 == 0:
            raise TrainingCrashed("no measurement for 8 s: killed as hanging")
        return losses


def test_a_training_that_ended_before_its_process_went_has_not_crashed(
    files: StudyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "ChildProcessTrainer", Leaving)
    assert loop.run_worker(files) == 0
    trials = opened(files).study.get_trials()
    assert len(trials) == 44
    assert Leaving.jobs == 44, "none is given twice"
    assert not [t for t in trials if "crashes" in t.user_attrs]
    diverges = {t.number for t in trials if t.params["lr"] > 0.5}
    assert {t.number for t in trials if t.user_attrs.get("diverged")} == diverges


def test_a_result_that_nobody_told_is_not_trained_again(files: StudyFiles) -> None:
    search, (_, trainer) = opened(files), load_study(files.toml)
    uri = f"sqlite:///{files.toml.parents[1]}/mlflow.db"
    with StopSignals() as stop:
        for _ in range(12):  # up to a rung of two seeds
            job = search.ask()
            assert job is not None
            assert read_losses(job, files) is None
            losses = run_job(job, trainer, files, uri, stop)
            made = steps(files)
            again = run_job(job, trainer, files, uri, stop)
            assert steps(files) == made
            assert again == pytest.approx(losses, nan_ok=True)
            assert read_losses(job, files) == pytest.approx(losses, nan_ok=True)
            search.tell(job, losses)  # type: ignore[arg-type]
    assert job.seeds == 2
