"""What clusters do to workers, really done to processes: killed, stopped, hung, out of memory, the disk full. What was lost is counted."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from scaling.tracking.client import connect
from scaling.tracking.experiment import find_study_run
from tests.test_hpo.test_launcher import Study

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def trainers_of(worker: psutil.Process) -> list[psutil.Process]:
    """The processes that train for a worker; Python's own helper is none."""
    return [p for p in worker.children() if "resource_tracker" not in " ".join(p.cmdline())]


def workers_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie has no command line
            if "worker" in process.cmdline():
                found.append(process)
    return found


def add(study: Study, text: str) -> None:
    toml = study.folder / "studies" / "toy.toml"
    toml.write_text(toml.read_text() + text)


def test_a_training_that_is_killed_is_tried_again_and_its_worker_lives(tmp_path: Path) -> None:
    study = Study(tmp_path, pause=0.1)
    launcher = study.start("launch", "toy")
    study.wait_until(lambda: study.trained().total() > 30, launcher)
    assert all(len(trainers_of(worker)) == 1 for worker in workers_of(launcher))

    def crashes() -> int:
        return sum(len(t.user_attrs.get("crashes", [])) for t in study.trials)

    for kill in range(20):  # one that has trained to its end and is only heard by MLflow has not crashed
        if crashes():
            break
        for worker in workers_of(launcher)[kill % 2 :][:1]:
            for victim in trainers_of(worker):
                victim.kill()
        for _ in range(20):
            if crashes():
                break
            time.sleep(0.1)
    _, err = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, err
    study.check_whole()
    assert err.count("its process was killed (SIGKILL: out of memory?)") == crashes() >= 1
    crashed = [t for t in study.trials if "crashes" in t.user_attrs]
    given_up = [t for t in crashed if len(t.user_attrs["crashes"]) == 2]
    assert err.count("it will be tried once more") == len(crashed)
    assert err.count("it counts as diverged") == len(given_up)
    assert all(t.user_attrs.get("diverged") for t in given_up)
    assert all(t.value is not None or t.user_attrs.get("diverged") for t in crashed)


def test_a_training_that_always_eats_all_memory_or_hangs_counts_as_diverged(tmp_path: Path) -> None:
    study = Study(tmp_path, pause=0.0)
    add(study, "timeout = 20.0\n")
    toml = study.folder / "studies" / "toy.toml"
    toml.write_text(toml.read_text().replace("pause =", "hungry = 1.8e-4\nhanging = 0.75\npause ="))
    said = study.run("launch", "toy")
    study.check_whole()
    reasons: dict[str, list[str]] = {}
    for trial in study.trials:
        for why in trial.user_attrs.get("crashes", []):
            reasons.setdefault("hungry" if trial.params["lr"] < 1.8e-4 else "hanging", []).append(why)
        if "crashes" in trial.user_attrs:
            assert trial.user_attrs["diverged"]
            assert len(trial.user_attrs["crashes"]) == 2
    assert set(reasons) == {"hungry", "hanging"}, "the space has both ends"
    assert all("out of memory" in why for why in reasons["hungry"])
    assert all("no measurement for 20 s" in why for why in reasons["hanging"])
    assert "it counts as diverged" in said
    runs = study.runs()
    assert int(runs["diverged"].sum()) == sum("diverged" in t.user_attrs for t in study.trials)


def test_a_worker_that_stood_still_past_its_lease_finds_its_run_taken_and_counts_nothing_twice(tmp_path: Path) -> None:
    """Worker and training are stopped together, as a suspended machine stops them."""
    study = Study(tmp_path, pause=0.05)
    add(study, "lease = 2.0\n")
    launcher = study.start("launch", "toy")
    study.wait_until(lambda: study.trained().total() > 30, launcher)
    (worker, other) = workers_of(launcher)
    stopped = [worker, *trainers_of(worker)]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    name = f"/{worker.pid}/"
    held = [t.number for t in study.trials if not t.state.is_finished() and name in t.user_attrs["worker"]]
    if not held:  # it was stopped between two trials
        pytest.skip("the worker had no run when it was stopped")

    def taken() -> bool:
        return all(name not in t.user_attrs["worker"] for t in study.trials if t.number in held)

    study.wait_until(taken, launcher)
    for process in reversed(stopped):
        process.send_signal(signal.SIGCONT)
    _, err = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, err
    assert other.pid != worker.pid
    study.check_whole()
    assert "is left to others" in err or "an outcome is not counted" in err


def test_ten_signals_in_a_row_are_one(tmp_path: Path) -> None:
    study = Study(tmp_path, pause=0.05)
    launcher = study.start("launch", "toy")
    study.wait_until(lambda: study.trained().total() > 30, launcher)
    processes = (psutil.Process(launcher.pid), *workers_of(launcher))
    for _ in range(10):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, err
    study.run("resume", "toy")
    study.check_whole()
    assert set(study.trained().values()) == {1}, "each training kept its state"


def test_three_launchers_of_one_study_one_of_them_killed_do_its_work_once(tmp_path: Path) -> None:
    study = Study(tmp_path, pause=0.3)
    first = study.start("launch", "toy")
    study.wait_until(lambda: study.trained().total() > 2, first)
    others = [study.start("resume", "toy") for _ in range(2)]
    for launcher in others:
        study.wait_until(lambda launcher=launcher: len(workers_of(launcher)) == 2, launcher)  # type: ignore[misc]
    orphans = workers_of(first)
    first.kill()
    first.communicate()
    for launcher in others:
        _, err = launcher.communicate(timeout=180)
        assert launcher.returncode == 0, err
    psutil.wait_procs(orphans, timeout=30)
    study.check_whole()
    assert set(study.trained().values()) == {1}, "six workers, and no step was trained twice"
    assert "nothing left to run" in study.run("resume", "toy")


def test_a_training_ends_with_its_worker(tmp_path: Path) -> None:
    study = Study(tmp_path, pause=0.05)
    launcher = study.start("launch", "toy")
    study.wait_until(lambda: study.trained().total() > 30, launcher)
    worker = workers_of(launcher)[0]
    trainers = trainers_of(worker)
    assert trainers
    worker.kill()
    gone, alive = psutil.wait_procs(trainers, timeout=10)
    assert gone
    assert not alive
    launcher.communicate(timeout=180)
    study.check_whole()


def test_without_mlflow_a_launch_is_refused_and_a_resume_goes_on(tmp_path: Path) -> None:
    study = Study(tmp_path, pause=0.02)
    study.env["MLFLOW_TRACKING_URI"] = "http://me:secret@127.0.0.1:9"
    said = study.run("launch", "toy", code=2)
    assert "MLflow at http://***@127.0.0.1:9 does not answer" in said
    assert "secret" not in said
    assert not (study.folder / "studies" / "toy").exists()
    del study.env["MLFLOW_TRACKING_URI"]
    launcher = study.start("launch", "toy")
    study.wait_until(lambda: study.trained().total() > 20, launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    study.env["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    said = study.run("resume", "toy")
    assert "MLflow does not take the state of study 'toy'" in said
    assert "are not in MLflow yet" in said
    study.check_whole()
    del study.env["MLFLOW_TRACKING_URI"]
    assert "nothing left to run" in study.run("resume", "toy")
    runs = study.runs()
    in_optuna = sorted(t.value for t in study.trials if t.value is not None)
    assert sorted(runs.loc[~runs["diverged"], "loss"]) == pytest.approx(in_optuna)
    assert len(runs) == 44
    client = connect(f"sqlite:///{study.folder}/mlflow.db")
    run = client.get_run(find_study_run(client, "toy"))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["evaluations"] == 44
    study.run("resume", "toy")
    assert client.get_run(run.info.run_id).info.end_time == run.info.end_time, "it ended when it did"


def test_a_full_disk_is_waited_out(tmp_path: Path) -> None:
    """A worker whose files may not grow: what it finds then is neither lost nor written in part."""
    study = Study(tmp_path, pause=0.02)
    launcher = study.start("launch", "toy")
    study.wait_until(lambda: study.trained().total() > 20, launcher)
    (worker, _) = workers_of(launcher)
    size = (study.folder / "studies" / "toy" / "study.journal").stat().st_size
    unlimited = psutil.RLIM_INFINITY
    worker.rlimit(psutil.RLIMIT_FSIZE, (size, unlimited))
    time.sleep(3)
    worker.rlimit(psutil.RLIMIT_FSIZE, (unlimited, unlimited))
    _, err = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, err
    assert "the storage does not answer, trying again" in err
    study.check_whole()
    assert set(study.trained().values()) == {1}
