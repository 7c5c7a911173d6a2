"""Trainings whose trainer raises an error: what counts as failed, and when a study stops instead."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hpo.search.search import Search
from hpo.storage.trial_attributes import is_diverged, read_crashes
from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study, open_existing
from hpo.worker.failures import FIRST_FAILURES, MAX_FAILURES_IN_A_ROW, describe_error
from hpo.worker.loop import run_worker
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity
from tests.test_hpo.toy_study import STUDY
from tests.test_hpo.toy_trainer import ToyTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

# The settings that fail, the kind of the error, and the runs so far. Tests change it.
FAULT: dict[str, Any] = {}


class FaultyTrainer(ToyTrainer):
    """Raises FAULT["error"] for settings whose lr is above FAULT["above"], or below FAULT["below"]."""

    def __call__(self, params: Mapping[str, Any], fidelity: Fidelity, **paths: Any) -> Iterator[Measurement]:
        FAULT.setdefault("runs", []).append(params["lr"])
        if params["lr"] > FAULT.get("above", 10.0) or params["lr"] < FAULT.get("below", 0.0):
            raise FAULT["error"]
        yield from super().__call__(params, fidelity, **paths)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFiles:
    """Return the files of a study that has been launched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("scaling.tracking.experiment.read_git_commit", lambda: "none")
    FAULT.clear()
    FAULT["error"] = AssertionError("lr is out of range")
    (tmp_path / "studies").mkdir()
    (tmp_path / "steps").mkdir()
    toml = tmp_path / "studies" / "toy.toml"
    text = STUDY.format(pause=0.0, seeds="1", steps=tmp_path / "steps")
    name = "tests.test_hpo.test_failing_trainings:FaultyTrainer"
    toml.write_text(text.replace("tests.test_hpo.toy_trainer:ToyTrainer", name).replace("high = 1.0", "high = 0.4"))
    files = StudyFiles(toml)
    study, trainer = load_study(toml)
    create_study(files, study, trainer, uri=None)
    return files


def open_search(files: StudyFiles) -> Search:
    study, trainer = load_study(files.toml)
    return open_existing(files, study, trainer)


def work(files: StudyFiles) -> int:
    return run_worker(files, in_child_process=False)


def test_settings_that_always_fail_count_as_diverged_after_two_attempts_and_the_others_go_on(
    files: StudyFiles, caplog: pytest.LogCaptureFixture
) -> None:
    FAULT["above"] = 0.05
    with caplog.at_level(logging.WARNING):
        assert work(files) == 0
    search = open_search(files)
    assert search.finished
    trials = search.study.get_trials()
    failed = [t for t in trials if t.params["lr"] > 0.05]
    assert failed
    assert all(is_diverged(t) for t in failed)
    for trial in failed:
        assert len(read_crashes(trial)) >= 2
        assert read_crashes(trial)[0].startswith("AssertionError: lr is out of range (test_failing_trainings.py, line ")
    assert all(t.value is not None for t in trials if t.params["lr"] <= 0.05)
    assert search.progress.failed == search.progress.diverged == len(failed)
    assert "it will be tried once more" in caplog.text
    assert "it counts as diverged" in caplog.text
    # The traceback is in a file and not on the terminal.
    assert "Traceback" not in caplog.text
    first = failed[0]
    log = files.log(first.user_attrs["config"], int(first.user_attrs["tokens"])).read_text()
    assert "Traceback" in log


def test_the_number_of_attempts_is_a_setting(files: StudyFiles) -> None:
    FAULT["above"] = 0.05
    files.toml.write_text(files.toml.read_text() + "attempts = 1\n")
    assert work(files) == 0
    failed = [t for t in open_search(files).study.get_trials() if t.params["lr"] > 0.05]
    # Only what failed before anything else had a result was tried again.
    assert min(len(read_crashes(t)) for t in failed) == 1


def test_a_study_whose_first_settings_all_fail_stops_at_once_and_loses_nothing(
    files: StudyFiles, caplog: pytest.LogCaptureFixture
) -> None:
    FAULT["below"] = 1.0
    with caplog.at_level(logging.WARNING):
        assert work(files) == 1
    assert len(FAULT["runs"]) == len(set(FAULT["runs"])) == FIRST_FAILURES
    message = caplog.records[-1].getMessage()
    assert "the first 3 settings that it tried all failed" in message
    assert "AssertionError: lr is out of range" in message
    assert "`hpo resume toy` tries them again" in message
    search = open_search(files)
    assert not search.finished
    assert search.progress.done == 0
    # Once the trainer is corrected, the same settings are tried first and nothing counts as failed.
    tried, FAULT["below"] = FAULT["runs"].copy(), 0.0
    assert work(files) == 0
    assert FAULT["runs"][3:6] == tried
    assert open_search(files).progress.diverged == 0


def test_a_study_that_is_resumed_without_a_correction_stops_again(files: StudyFiles) -> None:
    FAULT["below"] = 1.0
    assert work(files) == 1
    assert work(files) == 1
    assert len(FAULT["runs"]) == 2 * FIRST_FAILURES


def test_when_only_failing_settings_are_left_to_try_the_study_stops(tmp_path: Path, files: StudyFiles) -> None:
    """A study of one run can try no other settings."""
    toml = tmp_path / "studies" / "one.toml"
    text = files.toml.read_text().replace("2_000, max = 18_000", "2_000, max = 2_000")
    toml.write_text(text.replace("pause =", "sizes = [1000.0]\npause ="))
    one = StudyFiles(toml)
    study, trainer = load_study(toml)
    create_study(one, study, trainer, uri=None)
    FAULT["below"] = 1.0
    assert work(one) == 1
    assert len(FAULT["runs"]) == 1


def test_an_error_of_the_machine_counts_against_no_settings(
    files: StudyFiles, caplog: pytest.LogCaptureFixture
) -> None:
    FAULT.update(above=0.05, error=OSError(errno.ENOSPC, "No space left on device"))
    with caplog.at_level(logging.WARNING):
        assert work(files) == 1
    assert "No space left on device" in caplog.text
    assert "fix the cause, then `hpo resume toy` continues" in caplog.text
    assert open_search(files).progress.diverged == 0
    FAULT["above"] = 1.0
    assert work(files) == 0
    assert open_search(files).progress.diverged == 0


def test_many_failures_in_a_row_end_the_worker_and_the_study_can_go_on(
    files: StudyFiles, caplog: pytest.LogCaptureFixture
) -> None:
    search = open_search(files)
    job = search.ask()
    assert job is not None
    search.tell(job, 2.0)
    FAULT["below"] = 1.0
    with caplog.at_level(logging.WARNING):
        assert work(files) == 1
    assert f"{MAX_FAILURES_IN_A_ROW} settings failed in a row" in caplog.text
    assert open_search(files).progress.failed <= MAX_FAILURES_IN_A_ROW
    FAULT["below"] = 0.0
    assert work(files) == 0
    assert open_search(files).finished


def test_an_error_of_a_program_is_told_as_the_trainer_tells_it(tmp_path: Path) -> None:
    from proxies.trainers.command import resolve_command

    with pytest.raises(ValueError, match=r"needed a value for \{lr\}") as caught:
        resolve_command("train {lr}", {})
    assert str(describe_error(caught.value, tmp_path / "a.log")) == str(caught.value)
    assert not (tmp_path / "a.log").exists()


def test_an_error_is_reported_though_its_traceback_cannot_be_written(tmp_path: Path) -> None:
    try:
        {}["lr"]
    except KeyError as error:
        failure = describe_error(error, tmp_path / "removed" / "a.log")
    assert "KeyError: 'lr'" in str(failure)
    assert f"could not be written to {tmp_path}/removed/a.log (No such file or directory)" in str(failure)
