"""A study that processes work on is neither removed nor launched again, and one that was removed ends them."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution

from hpo.search.search import Search
from hpo.storage import connect, presence
from hpo.storage.leases import identify_process
from hpo.storage.presence import StudyRemoved, announce_presence, check_not_removed, list_present
from hpo.study import lifecycle
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import delete_study, refuse_existing, refuse_running
from hpo.worker.job import run_job
from hpo.worker.signals import StopSignals
from tests.test_hpo.toy_study import PATIENCE_SECONDS, ROOT, ToyStudy
from tests.test_hpo.toy_trainer import ToyTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

HOLD = """
import sys, time
from pathlib import Path
from hpo.storage.presence import announce_presence
with announce_presence(Path(sys.argv[1]), "worker"):
    print("here", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def files(tmp_path: Path) -> StudyFiles:
    files = StudyFiles(tmp_path / "studies" / "s.toml")
    files.folder.mkdir(parents=True)
    files.toml.write_text("")
    files.settings.write_text("{}")
    return files


@contextmanager
def hold_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Work on a study in another process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_processes_that_work_on_a_study_are_listed_until_they_end(files: StudyFiles) -> None:
    assert list_present(files.folder) == []
    with announce_presence(files.folder, "launcher"), hold_elsewhere(files.folder) as process:
        launcher, worker = list_present(files.folder)
        assert launcher.startswith(f"launcher (process {os.getpid()} on ")
        assert worker.startswith(f"worker (process {process.pid} on ")
        # A process that is killed leaves its file, and is not listed.
        process.kill()
        process.wait()
        assert list_present(files.folder) == [launcher]
        assert len(list((files.folder / presence.LIVE_FOLDER).iterdir())) == 2
    assert list_present(files.folder) == []


def test_a_running_study_is_not_removed(files: StudyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "forget_study", lambda client, name: True)
    monkeypatch.setattr(lifecycle, "connect", lambda uri: None)
    with hold_elsewhere(files.folder) as process:
        expected = rf"study 's' is running, and nothing was removed: worker \(process {process.pid} on .*Stop it first"
        with pytest.raises(ValueError, match=expected):
            delete_study(files, uri=None)
        assert files.settings.exists()
    assert delete_study(files, uri=None)
    assert not files.folder.exists()


def test_a_running_study_is_not_launched_again_and_nobody_is_advised_to_remove_it(files: StudyFiles) -> None:
    with hold_elsewhere(files.folder) as process, pytest.raises(ValueError, match="is running") as caught:
        refuse_existing(files, uri=None)
    message = str(caught.value)
    assert str(process.pid) in message
    assert "`hpo worker s` adds a worker" in message
    assert "forget" not in message
    with pytest.raises(ValueError, match=r"exists in .*`hpo resume s` continues it"):
        refuse_existing(files, uri=None)


@pytest.mark.parametrize(
    ("owner", "beats", "is_running"), [("here", False, True), ("away", True, True), ("away", False, False)]
)
def test_workers_without_a_lock_are_known_by_their_running_trials(
    files: StudyFiles, owner: str, beats: bool, is_running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an older version, and those of other hosts where locks do not hold between hosts."""
    from optuna.distributions import FloatDistribution

    name = identify_process() if owner == "here" else "other:1/17/1.5"
    options = {"tokens": (1, 3), "storage": files.journal, "name": "s", "sampler": "random", "lease": 60.0}
    search = Search({"x": FloatDistribution(0, 1)}, worker=name, **options)  # type: ignore[arg-type]
    job = search.ask()
    assert job is not None
    monkeypatch.setattr(lifecycle, "_read_lease", lambda files: 0.03)
    monkeypatch.setattr(lifecycle, "LATE_SECONDS", 1.5)
    sleep = time.sleep

    def wait(seconds: float) -> None:
        if beats:
            search.beat(job)
        sleep(min(seconds, 0.5))

    monkeypatch.setattr(time, "sleep", wait)
    if is_running:
        with pytest.raises(ValueError, match="is running, and nothing was removed: worker"):
            refuse_running(files, None)
    else:
        refuse_running(files, None)


def test_a_damaged_journal_does_not_keep_a_study_from_being_removed(files: StudyFiles) -> None:
    files.journal.write_text("{broken\n{}\n")
    refuse_running(files, None)


def test_a_study_is_gone_only_if_the_folder_around_it_is_there(files: StudyFiles) -> None:
    check_not_removed(files.settings)
    missing = StudyFiles(files.toml.with_stem("t"))
    with pytest.raises(StudyRemoved, match=r"study 't' is gone: its folder .* was removed"):
        check_not_removed(missing.settings)
    # A disk is away.
    check_not_removed(missing.folder / "u" / "study.json")


def test_a_study_is_gone_though_its_folder_was_made_again(files: StudyFiles) -> None:
    files.settings.unlink()
    (files.folder / "checkpoints").mkdir()
    with pytest.raises(StudyRemoved, match=r"study 's' is gone"):
        check_not_removed(files.settings)


def test_a_job_makes_no_folder_of_a_study_that_is_gone(tmp_path: Path) -> None:
    files = StudyFiles(tmp_path / "s.toml")
    space = {"lr": FloatDistribution(1e-4, 0.1, log=True)}
    job = Search(space, tokens=(1000, 3000), sizes=[1000.0], sampler="random").ask()
    assert job is not None
    with StopSignals() as stop, pytest.raises(FileNotFoundError):
        run_job(job, ToyTrainer(), files, f"sqlite:///{tmp_path}/mlflow.db", stop)
    assert not files.folder.exists()


def test_presence_makes_no_folder_of_a_study_that_is_gone(tmp_path: Path) -> None:
    with announce_presence(tmp_path / "gone", "worker"):
        pass
    assert not (tmp_path / "gone").exists()


def test_storage_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, files: StudyFiles) -> None:
    from hpo.storage.retry import retry_storage

    def fail() -> None:
        raise FileNotFoundError("the journal")

    def check() -> None:
        check_not_removed(files.folder.parent / "t" / "study.json")

    with pytest.raises(StudyRemoved):
        retry_storage(fail, check=check)


@pytest.mark.slow
def test_forget_is_refused_while_a_study_runs_and_removing_its_folder_ends_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    study = ToyStudy(tmp_path, pause=0.05)
    study.hold()
    launch = study.start("launch", "toy")
    study.wait_until_held(2, launch)
    assert "study 'toy' is running, and nothing was removed: launcher (process" in study.run(
        "forget", "toy", "--yes", code=2
    )
    assert "study 'toy' is running" in study.run("launch", "toy", code=2)
    study.release()
    # If the folder is removed by hand, the workers end with a sentence.
    folder = tmp_path / "studies" / "toy"
    folder.rename(tmp_path / "elsewhere")
    output = launch.finish(1)
    assert "study 'toy' is gone: its folder studies/toy was removed; the launcher ends" in output
    assert "Traceback" not in output
    # A process that still wrote may have made the folder again, but not the study.
    assert not (folder / "study.json").exists()


ASK = """
import sys
import optuna
from optuna.distributions import FloatDistribution
import hpo
optuna.logging.set_verbosity(optuna.logging.CRITICAL)
print("ready", flush=True)
sys.stdin.readline()
space = {"x": FloatDistribution(0, 1)}
job = hpo.Search(space, tokens=(1, 27), iterations=1, storage=sys.argv[1], sampler="random", worker=sys.argv[2]).ask()
print(job.number)
"""


@pytest.mark.parametrize("make_url", [lambda f: f"sqlite:///{f}/fresh.db", lambda f: f"{f}/fresh.journal"])
def test_processes_may_open_a_fresh_study_at_the_same_moment(tmp_path: Path, make_url: Callable[[Path], str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ASK, make_url(tmp_path), f"worker-{i}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    numbers = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, err
        numbers.append(int(out))
    assert sorted(numbers) == [0, 1, 2, 3]


def test_the_tables_of_a_fresh_file_are_made_under_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect_once, was_locked = connect._connect, list[bool]()

    def observe(url: str) -> Any:
        with (tmp_path / "s.db.ask.lock").open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                was_locked.append(False)
            except BlockingIOError:
                was_locked.append(True)
        return connect_once(url)

    monkeypatch.setattr(connect, "_connect", observe)
    connect.open_storage(f"sqlite:///{tmp_path}/s.db", None, "s")
    assert was_locked == [True]


@pytest.mark.parametrize(("reason", "is_race"), [("table studies already exists", True), ("no such host", False)])
def test_a_database_whose_tables_another_process_makes_is_tried_again(
    reason: str, is_race: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    attempts = list[str]()

    def fail_once(url: str) -> Any:
        attempts.append(url)
        if len(attempts) == 1:
            raise ValueError(f"{url} does not answer") from OperationalError("create", {}, Exception(reason))
        return "storage", "cache"

    monkeypatch.setattr(connect, "_connect", fail_once)
    if is_race:
        opened: Any = connect._open_database("postgresql://server/studies")
        assert opened == ("storage", "cache")
    else:
        with pytest.raises(ValueError, match="does not answer"):
            connect._open_database("postgresql://server/studies")
    assert len(attempts) == 1 + is_race


def test_a_sqlite_file_in_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    from optuna.distributions import FloatDistribution

    with pytest.raises(ValueError, match=r"there is no folder .*/none: make it, or correct the address"):
        Search({"x": FloatDistribution(0, 1)}, tokens=(1, 3), storage=f"sqlite:///{tmp_path}/none/s.db")
