"""Studies as users run them: real processes, killed and resumed, with every trained step counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import psutil
import pytest
from optuna.trial import FrozenTrial

from hpo.study.lifecycle import find_differences
from hpo.worker.signals import StopSignals
from scaling.common.measurement import Measurement
from scaling.runs.io import load_runs
from scaling.tracking.client import connect, find_experiment_id
from scaling.tracking.experiment import find_study_run
from scaling.tracking.log import read_note

ROOT = Path(__file__).parents[2]
# A worker's start is imports; each command here takes seconds.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STUDY = """
seed = 1
[search]
tokens = {{ min = 2_000, max = 18_000 }}
sampler = "random"
seeds = {seeds}
[space]
lr = {{ low = 1e-4, high = 1.0, log = true }}
[trainer]
use = "tests.test_hpo.toy_trainer:ToyTrainer"
pause = {pause}
noise = 0.002
steps = "{steps}"
[target]
N = 10_000
D = 100_000
[workers]
count = 2
"""


class Study:
    """A study in a folder of its own, and the commands on it."""

    def __init__(self, folder: Path, pause: float, seeds: str = "1") -> None:
        self.folder, self.steps = folder, folder / "steps"
        self.steps.mkdir()
        (folder / "studies").mkdir()
        (folder / "studies" / "toy.toml").write_text(STUDY.format(pause=pause, seeds=seeds, steps=self.steps))
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.env.pop("MLFLOW_TRACKING_URI", None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        def hear_sigint() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and theirs, are born deaf to it

        return subprocess.Popen(
            [sys.executable, "-m", "hpo", *words],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=hear_sigint,
        )

    def run(self, *words: str, code: int = 0) -> str:
        process = self.start(*words)
        out, err = process.communicate(timeout=180)
        assert process.returncode == code, err
        return out + err

    def json(self, *words: str) -> dict[str, Any]:
        process = self.start(*words, "--json")
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        answer: dict[str, Any] = json.loads(out)
        return answer

    @property
    def trials(self) -> list[FrozenTrial]:
        journal = str((self.folder / "studies" / "toy" / "study.journal").resolve())
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal))
        return optuna.load_study(study_name="toy", storage=storage).trials

    def runs(self) -> pd.DataFrame:
        return load_runs("toy", tracking_uri=f"sqlite:///{self.folder}/mlflow.db")

    def results(self) -> Counter[tuple[int, int]]:
        """(configuration, rung) -> number of results."""
        done = (
            t for t in self.trials if t.state.is_finished() and (t.value is not None or t.user_attrs.get("diverged"))
        )
        return Counter((t.user_attrs["config"], t.user_attrs["rung"]) for t in done)

    def trained(self) -> Counter[str]:
        """Every step that any process trained."""
        return Counter(line for p in self.steps.glob("*.jsonl") for line in p.read_text().splitlines())

    def wait_until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        for _ in range(1800):
            if condition():
                return
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        raise AssertionError("waited three minutes in vain")

    def check_whole(self) -> None:
        """Nothing lost, nothing twice: two sizes of Hyperband with 3 rungs at eta 3 are 9 + 3 + 1, 5 + 1 and 3 runs each."""
        results = self.results()
        assert set(results.values()) == {1}
        assert not [t for t in self.trials if not t.state.is_finished()]
        by_rung = Counter(rung for _, rung in results)
        assert by_rung == {0: 2 * 9, 1: 2 * (3 + 5), 2: 2 * (1 + 1 + 3)}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path, pause=0.0)


@pytest.fixture
def slow_study(tmp_path: Path) -> Study:
    return Study(tmp_path, pause=0.05)


def test_a_study_from_launch_to_extend(study: Study) -> None:
    """One study, because every command costs seconds of imports."""
    said = study.run("launch", "toy", "--dry-run")
    assert "44 evaluations of 34 configurations" in said
    assert not (study.folder / "studies" / "toy").exists()
    assert not (study.folder / "mlflow.db").exists()

    said = study.run("launch", "studies/toy.toml")
    assert "trial 44 of 44" in said
    study.check_whole()
    assert set(study.trained().values()) == {1}, "a promotion resumes its checkpoint, so no step is trained twice"

    runs = study.runs()
    assert len(runs) == 44
    in_optuna = sorted(t.value for t in study.trials if t.value is not None)
    assert sorted(runs.loc[~runs["diverged"], "loss"]) == pytest.approx(in_optuna)
    assert int(runs["diverged"].sum()) == sum("diverged" in t.user_attrs for t in study.trials) > 0

    said = study.run("launch", "toy", code=2)
    assert "hpo resume toy" in said
    assert "hpo forget toy" in said
    toml = study.folder / "studies" / "toy.toml"
    toml.write_text(toml.read_text().replace("D = 100_000", "D = 200_000"))
    assert "nothing left to run" in study.run("resume", "toy")
    client = connect(f"sqlite:///{study.folder}/mlflow.db")
    assert read_note(client, find_study_run(client, "toy"), "target") == {"N": 10_000, "D": 200_000}
    status = study.json("status", "toy")
    assert (status["done"], status["planned"], status["finished"]) == (44, 44, True)
    assert study.json("best", "toy")["lr"] == pytest.approx(0.01, rel=1.0)

    before = study.trained().total()
    assert "the nearest" in study.run("extend", "toy", "--max-tokens", "50000", code=2)
    dry = study.run("extend", "toy", "--max-tokens", "54000", "--dry-run")
    assert study.trained().total() == before
    assert dry.split(":")[1].split("evaluations")[0] in study.run("extend", "toy", "--max-tokens", "54000")
    assert set(study.trained().values()) == {1}
    # From scratch with the larger maximum: 27 + 9 + 3 + 1, 12 + 4 + 1, 6 + 2 and 4 configurations at rungs 0 to 3.
    by_rung = Counter(rung for _, rung in study.results())
    assert by_rung[0] == 2 * 27
    assert by_rung[3] >= 2 * (1 + 1 + 2 + 4)

    toml.write_text(toml.read_text().replace("low = 1e-4", "low = 1e-5"))
    assert "space.lr.low: launched with 0.0001, the file now says 1e-05" in study.run("resume", "toy", code=2)
    toml.write_text(toml.read_text().replace("low = 1e-5", "low = 1e-4"))

    assert "removed" in study.run("forget", "toy", "--yes")
    assert not (study.folder / "studies" / "toy").exists()
    assert "44 evaluations" in study.run("launch", "toy")


@pytest.fixture
def repeated(tmp_path: Path) -> Study:
    return Study(tmp_path, pause=0.02, seeds="[1, 2, 3]")


def test_repeats_are_trained_and_recorded_once_each_whenever_the_study_is_stopped(repeated: Study) -> None:
    """Stopped where evaluations of several seeds are under way; killed once more, so that only files can remember."""
    study = repeated
    launcher = study.start("launch", "toy")
    study.wait_until(lambda: any(json.loads(step)[2] == 1 for step in study.trained()), launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    said = study.run("resume", "toy")
    study.check_whole()
    assert set(study.trained().values()) == {1}, "a repeat goes on where it was, and a finished one is not repeated"
    trained = sum(trial.user_attrs["tokens"] - trial.user_attrs["resumed_tokens"] for trial in study.trials)
    assert study.trained().total() * 1000 > trained

    seeds = (1, 2, 3)
    runs = study.runs()
    for trial in study.trials:
        attrs = trial.user_attrs
        config, tokens, count = attrs["config"], attrs["tokens"], seeds[attrs["rung"]]
        names = [f"config-{config:04d}" + (f"-repeat{r}" if r else "") for r in range(count)]
        of = runs[(runs["D"] == tokens) & runs["name"].isin(names)].set_index("name")
        if trial.value is None:
            assert of["diverged"].all()
            assert len(of) == 1, "the others need not run"
            continue
        losses = [of.loc[name, "loss"] for name in names]
        assert trial.value == pytest.approx(sum(losses) / count)
        assert attrs.get("losses", [trial.value]) == pytest.approx(losses)
        assert len(set(losses)) == count, "each repeat has a seed of its own"
    assert (runs["role"] == "proxy").all()
    status = study.json("status", "toy")
    assert f"{status['tokens_spent']:,} tokens trained; resuming checkpoints saved {status['tokens_saved']:,}" in said
    diverged = sum(trial.value is None for trial in study.trials)
    spent = study.trained().total() * 1000
    assert spent <= status["tokens_spent"] <= spent + diverged * 3 * 18_000, "diverged runs ended early"

    said = study.run("best", "toy")
    assert "seeds each of" in said
    assert "truly better with probability" in said


def test_a_confirmation_is_stopped_resumed_and_kept(slow_study: Study) -> None:
    study = slow_study
    study.run("launch", "toy")
    assert "one seed per configuration cannot tell" in study.run("best", "toy")
    tuned = study.trained()
    said = study.run("confirm", "toy", "--seeds", "3", "--dry-run")
    assert "6 of 6 runs left, 108,000 tokens" in said
    assert not (study.folder / "studies" / "toy" / "confirm").exists()

    confirming = study.start("confirm", "toy", "--seeds", "3")
    study.wait_until(lambda: (study.trained() - tuned).total() > 30, confirming)
    confirming.send_signal(signal.SIGTERM)
    _, err = confirming.communicate(timeout=60)
    assert confirming.returncode == 130
    assert "hpo confirm toy --seeds 3" in err
    found = study.json("confirm", "toy", "--seeds", "3")
    fresh = study.trained() - tuned
    assert set(fresh.values()) == {1}, "what was trained before the signal is not trained again"
    assert fresh.total() == 6 * 18
    assert {tuple(json.loads(step)[:3]) for step in fresh} == {
        (4000.0, side["params"]["lr"], repeat)
        for side in (found["answer"], found["rival"])
        for repeat in (1000, 1001, 1002)
    }
    differences = [b - a for a, b in zip(found["answer"]["losses"], found["rival"]["losses"], strict=True)]
    assert found["difference"]["mean"] == pytest.approx(sum(differences) / 3)
    assert found["search_lead"] > 0

    client = connect(f"sqlite:///{study.folder}/mlflow.db")
    note = read_note(client, find_study_run(client, "toy"), "confirmed")
    assert note is not None
    assert note["verdict"] == found["verdict"]
    runs = client.search_runs([find_experiment_id(client, "toy")], "tags.`muscale.role` = 'confirm'")
    assert sorted(r.data.metrics["confirm/loss"] for r in runs) == pytest.approx(
        sorted(found["answer"]["losses"] + found["rival"]["losses"])
    )
    assert len(study.runs()) == 44, "no law takes them for proxies"

    said = study.run("best", "toy")
    assert "confirmed on 3 fresh seeds at N 4,000, D 18,000" in said
    assert found["verdict"] in said
    assert "0 of 6 runs left" in study.run("confirm", "toy", "--seeds", "3"), "done is done"
    assert (study.trained() - tuned).total() == 6 * 18
    assert "2 of 8 runs left" in study.run("confirm", "toy", "--seeds", "4", "--dry-run")


def test_all_workers_killed_then_resumed_loses_no_configuration(slow_study: Study) -> None:
    study = slow_study
    launcher = study.start("launch", "toy")
    study.wait_until(lambda: study.trained().total() > 30, launcher)
    for child in psutil.Process(launcher.pid).children():
        child.kill()
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "hpo resume toy" in err
    hanging = [t.number for t in study.trials if t.state == optuna.trial.TrialState.RUNNING]
    assert hanging
    study.run("resume", "toy")
    study.check_whole()
    states = {t.number: t.state for t in study.trials}
    assert {states[n] for n in hanging} <= {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL}


def test_a_study_stopped_from_the_keyboard_goes_on_where_it_was(slow_study: Study) -> None:
    """Not one step is trained twice: a stopped run keeps its state. SIGTERM, ten times: test_faults.py."""
    study = slow_study
    launcher = study.start("launch", "toy")
    study.wait_until(lambda: study.trained().total() > 30, launcher)
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert "hpo resume toy" in err
    study.run("resume", "toy")
    study.check_whole()
    assert set(study.trained().values()) == {1}


def test_differences_are_named_by_their_path() -> None:
    then, now = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 3}
    assert list(find_differences(then, now)) == [("a.c", [1], [2]), ("d", 2, None), ("e", None, 3)]


def test_a_signal_interrupts_training_but_not_the_recording_of_its_result() -> None:
    made = []

    def points() -> Iterator[Measurement]:
        for i in range(3):
            made.append(i)
            if i == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield Measurement(i, 3.0, final=i == 1)

    with StopSignals() as stop:
        training = stop.interrupting(points())
        next(training)
        last = next(training)
        os.kill(os.getpid(), signal.SIGTERM)  # while the result is being recorded
        assert last.final
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            next(training)
        assert made == [0, 1], "what follows is not begun"
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
        list(stop.interrupting(points()))
    assert made == [0, 1, 0, 1, 2]
