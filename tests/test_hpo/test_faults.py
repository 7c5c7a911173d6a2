"""What clusters do to workers, done to real processes: killed, suspended, hung, out of memory, the disk full."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import psutil
import pytest

from hpo.storage.trial_attributes import is_diverged, read_crashes
from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study
from scaling.tracking.client import connect
from scaling.tracking.experiment import find_study_run
from tests.test_hpo.toy_study import PATIENCE_SECONDS, ToyStudy, list_trainers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_a_training_that_is_killed_is_tried_once_more_and_its_worker_survives(tmp_path: Path) -> None:
    study = ToyStudy(tmp_path, pause=0.0)
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    first, second = launcher.list_workers()
    # The first worker's training is killed twice, the second worker's once. Each worker asks for its run again at once.
    for worker in (first, second, first):
        (trainer,) = list_trainers(worker)
        trainer.kill()
        study.wait_until(lambda killed=trainer.pid: killed not in study.list_held(), launcher)  # type: ignore[misc]
        study.wait_until_held(2, launcher)
    study.release()
    log = launcher.finish()
    study.check_whole()
    assert log.count("its process was killed (SIGKILL: out of memory?)") == 3
    assert log.count("it will be tried once more") == 2
    assert log.count("it counts as diverged") == 1
    once, twice = sorted((t for t in study.trials if read_crashes(t)), key=lambda t: len(read_crashes(t)))
    assert (len(read_crashes(once)), len(read_crashes(twice))) == (1, 2)
    assert once.value is not None
    assert is_diverged(twice)


def test_a_training_that_always_runs_out_of_memory_or_hangs_counts_as_diverged(tmp_path: Path) -> None:
    study = ToyStudy(tmp_path, pause=0.0)
    study.add_to_file("timeout = 30.0\n")
    study.replace_in_file("pause =", "hungry = 1.01e-4\nhanging = 0.99\npause =")
    files = StudyFiles(study.toml)
    search = create_study(files, *load_study(study.toml), uri=f"sqlite:///{study.folder}/mlflow.db")
    for lr in (1e-4, 1.0):
        search.study.enqueue_trial({"lr": lr})
    output = study.run("resume", "toy")
    study.check_whole()
    hungry, hanging = sorted((t for t in study.trials if read_crashes(t)), key=lambda t: t.params["lr"])
    assert [hungry.params["lr"], hanging.params["lr"]] == [1e-4, 1.0]
    assert is_diverged(hungry)
    assert is_diverged(hanging)
    assert len(read_crashes(hungry)) == len(read_crashes(hanging)) == 2
    assert all("out of memory" in reason for reason in read_crashes(hungry))
    assert all("no measurement for 30 s" in reason for reason in read_crashes(hanging))
    assert "it counts as diverged" in output
    runs = study.load_runs()
    assert int(runs["diverged"].sum()) == sum(map(is_diverged, study.trials))


def test_a_worker_suspended_past_its_lease_finds_its_run_taken_and_nothing_counts_twice(tmp_path: Path) -> None:
    """Worker and training are suspended together, as a suspended machine does it."""
    study = ToyStudy(tmp_path, pause=0.0)
    study.add_to_file("lease = 2.0\n")
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    worker, _ = launcher.list_workers()
    suspended = [worker, *list_trainers(worker)]
    for process in suspended:
        process.send_signal(signal.SIGSTOP)
    name = f"/{worker.pid}/"
    own = [t.number for t in study.trials if not t.state.is_finished() and name in t.user_attrs["worker"]]
    assert len(own) == 1
    study.release()
    study.wait_until(lambda: name not in study.trials[own[0]].user_attrs["worker"], launcher)
    for process in reversed(suspended):
        process.send_signal(signal.SIGCONT)
    log = launcher.finish()
    study.check_whole()
    assert "is left to other workers" in log or "is not counted" in log


def test_ten_signals_in_a_row_are_one(tmp_path: Path) -> None:
    study = ToyStudy(tmp_path, pause=0.0)
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    processes = (psutil.Process(launcher.process.pid), *launcher.list_workers())
    for _ in range(10):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
    launcher.finish(130)
    study.release()
    study.run("resume", "toy")
    study.check_whole()
    assert set(study.count_steps().values()) == {1}, "each training kept its state"


def test_three_launchers_of_one_study_of_which_one_is_killed_do_its_work_once(tmp_path: Path) -> None:
    study = ToyStudy(tmp_path, pause=0.0)
    study.hold()
    first = study.start("launch", "toy")
    study.wait_until_held(2, first)
    others = [study.start("resume", "toy") for _ in range(2)]
    study.wait_until_held(6, others[0])
    orphans = first.list_workers()
    first.process.kill()
    study.release()
    for launcher in others:
        launcher.finish()
    psutil.wait_procs(orphans, timeout=PATIENCE_SECONDS)
    study.check_whole()
    assert set(study.count_steps().values()) == {1}, "six workers, and no step was trained twice"
    assert "nothing left to run" in study.run("resume", "toy")


def test_a_training_ends_with_its_worker(tmp_path: Path) -> None:
    study = ToyStudy(tmp_path, pause=0.0)
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    worker = launcher.list_workers()[0]
    trainers = list_trainers(worker)
    assert trainers
    worker.kill()
    _, alive = psutil.wait_procs(trainers, timeout=PATIENCE_SECONDS)
    assert not alive
    study.release()
    launcher.finish()
    study.check_whole()


def test_without_mlflow_a_launch_is_refused_and_a_resume_continues(tmp_path: Path) -> None:
    study = ToyStudy(tmp_path, pause=0.0)
    study.env["MLFLOW_TRACKING_URI"] = "http://me:secret@127.0.0.1:9"
    output = study.run("launch", "toy", code=2)
    assert "MLflow at http://***@127.0.0.1:9 does not answer" in output
    assert "secret" not in output
    assert not (study.folder / "studies" / "toy").exists()
    del study.env["MLFLOW_TRACKING_URI"]
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    launcher.process.send_signal(signal.SIGTERM)
    launcher.finish(130)
    study.release()
    study.env["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    output = study.run("resume", "toy")
    assert "MLflow does not take the state of study 'toy'" in output
    assert "are not in MLflow yet" in output
    study.check_whole()
    del study.env["MLFLOW_TRACKING_URI"]
    assert "nothing left to run" in study.run("resume", "toy")
    runs = study.load_runs()
    in_optuna = sorted(t.value for t in study.trials if t.value is not None)
    assert sorted(runs.loc[~runs["diverged"], "loss"]) == pytest.approx(in_optuna)
    assert len(runs) == 44
    client = connect(f"sqlite:///{study.folder}/mlflow.db")
    run = client.get_run(find_study_run(client, "toy"))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["evaluations"] == 44
    study.run("resume", "toy")
    assert client.get_run(run.info.run_id).info.end_time == run.info.end_time, "a finished run keeps its end time"


def test_a_full_disk_is_waited_out(tmp_path: Path) -> None:
    """The files of one worker must not grow for a while. Its results are neither lost nor written in part."""
    study = ToyStudy(tmp_path, pause=0.0)
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    worker, _ = launcher.list_workers()
    size = (study.folder / "studies" / "toy" / "study.journal").stat().st_size
    unlimited = psutil.RLIM_INFINITY
    worker.rlimit(psutil.RLIMIT_FSIZE, (size, unlimited))
    study.release()
    study.wait_until(lambda: "the storage does not answer, trying again" in launcher.stderr, launcher)
    worker.rlimit(psutil.RLIMIT_FSIZE, (unlimited, unlimited))
    launcher.finish()
    study.check_whole()
    assert set(study.count_steps().values()) == {1}
