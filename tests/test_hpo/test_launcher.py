"""Studies as users run them: real processes, killed and resumed, with every trained step counted."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest

from hpo.storage.trial_attributes import is_diverged
from hpo.study.lifecycle import find_differences
from hpo.worker.signals import StopSignals
from scaling.common.measurement import Measurement
from scaling.tracking.client import connect, find_experiment_id
from scaling.tracking.experiment import find_study_run
from scaling.tracking.log import read_note
from tests.test_hpo.toy_study import PATIENCE_SECONDS, ToyStudy, list_trainers

# Each command takes seconds to import.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def study(tmp_path: Path) -> ToyStudy:
    return ToyStudy(tmp_path, pause=0.0)


def test_a_study_from_launch_to_extend(study: ToyStudy) -> None:
    """It is one study, because every command takes seconds to import."""
    output = study.run("launch", "toy", "--dry-run")
    assert "44 evaluations of 34 configurations" in output
    assert not (study.folder / "studies" / "toy").exists()
    assert not (study.folder / "mlflow.db").exists()

    output = study.run("launch", "studies/toy.toml")
    assert "44/44" in output
    study.check_whole()
    assert set(study.count_steps().values()) == {1}, "a promotion resumes its checkpoint, so no step is trained twice"

    runs = study.load_runs()
    assert len(runs) == 44
    in_optuna = sorted(t.value for t in study.trials if t.value is not None)
    assert sorted(runs.loc[~runs["diverged"], "loss"]) == pytest.approx(in_optuna)
    assert int(runs["diverged"].sum()) == sum(map(is_diverged, study.trials)) > 0

    output = study.run("launch", "toy", code=2)
    assert "hpo resume toy" in output
    assert "hpo forget toy" in output
    study.replace_in_file("D = 100_000", "D = 200_000")
    assert "nothing left to run" in study.run("resume", "toy")
    client = connect(f"sqlite:///{study.folder}/mlflow.db")
    assert read_note(client, find_study_run(client, "toy"), "target") == {"N": 10_000, "D": 200_000}
    status = study.run_json("status", "toy")
    assert (status["done"], status["planned"], status["finished"]) == (44, 44, True)
    # Workers race, so the answer differs from run to run: within a factor of 4, where the space has one of 10,000.
    assert abs(math.log(study.run_json("best", "toy")["lr"] / 0.01)) < math.log(4)

    before = study.count_steps().total()
    assert "the nearest" in study.run("extend", "toy", "--max-tokens", "50000", code=2)
    planned = study.run("extend", "toy", "--max-tokens", "54000", "--dry-run")
    assert study.count_steps().total() == before
    assert planned.split(":")[1].split("evaluations")[0] in study.run("extend", "toy", "--max-tokens", "54000")
    assert set(study.count_steps().values()) == {1}
    # Hyperband with the larger maximum has 27 + 9 + 3 + 1, 12 + 4 + 1, 6 + 2 and 4 configurations at rungs 0 to 3.
    by_rung = Counter(rung for _, rung in study.count_results())
    assert by_rung[0] == 2 * 27
    assert by_rung[3] >= 2 * (1 + 1 + 2 + 4)

    study.replace_in_file("low = 1e-4", "low = 1e-5")
    assert "space.lr.low: launched with 0.0001, the file now says 1e-05" in study.run("resume", "toy", code=2)
    study.replace_in_file("low = 1e-5", "low = 1e-4")

    assert "removed" in study.run("forget", "toy", "--yes")
    assert not (study.folder / "studies" / "toy").exists()
    output = study.run("launch", "toy", "--verbose")
    assert "44 evaluations" in output
    assert "tokens/s" in output


def test_repeats_are_trained_and_recorded_once_each_whenever_the_study_is_stopped(tmp_path: Path) -> None:
    """The study is stopped while evaluations of several seeds are in progress."""
    study = ToyStudy(tmp_path, pause=0.0, seeds="[1, 2, 3]")
    study.hold(repeat=1)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    launcher.process.send_signal(signal.SIGTERM)
    launcher.finish(130)
    study.release()
    output = study.run("resume", "toy")
    study.check_whole()
    steps = study.count_steps()
    assert set(steps.values()) == {1}, "a repeat continues where it was, and a finished one is not repeated"
    trained = sum(trial.user_attrs["tokens"] - trial.user_attrs["resumed_tokens"] for trial in study.trials)
    assert steps.total() * 1000 > trained

    seeds = (1, 2, 3)
    runs = study.load_runs()
    for trial in study.trials:
        attrs = trial.user_attrs
        config, tokens, count = attrs["config"], attrs["tokens"], seeds[attrs["rung"]]
        names = [f"config-{config:04d}" + (f"-repeat{r}" if r else "") for r in range(count)]
        rows = runs[(runs["D"] == tokens) & runs["name"].isin(names)].set_index("name")
        if trial.value is None:
            assert rows["diverged"].all()
            assert len(rows) == 1, "after one repeat has diverged, the others need not run"
            continue
        losses = [rows.loc[name, "loss"] for name in names]
        assert trial.value == pytest.approx(sum(losses) / count)
        assert attrs.get("losses", [trial.value]) == pytest.approx(losses)
        assert len(set(losses)) == count, "each repeat has a seed of its own"
    assert (runs["role"] == "proxy").all()
    status = study.run_json("status", "toy")
    assert f"{status['tokens_spent']:,} tokens trained" in output
    assert f"{status['tokens_saved']:,} tokens saved by resuming from checkpoints" in output
    diverged = sum(trial.value is None for trial in study.trials)
    spent = steps.total() * 1000
    assert spent <= status["tokens_spent"] <= spent + diverged * 3 * 18_000, "diverged runs end early"

    output = study.run("best", "toy")
    assert "seeds each of" in output
    assert "better with probability" in output


def test_a_confirmation_is_stopped_resumed_and_stored(study: ToyStudy) -> None:
    assert study.run("launch", "toy", "--quiet") == "", "its workers are quiet, too"
    assert "one seed per configuration does not show" in study.run("best", "toy")
    tuned = study.count_steps()
    output = study.run("confirm", "toy", "--seeds", "3", "--dry-run")
    assert "6 of 6 runs left, 108,000 tokens" in output
    assert not (study.folder / "studies" / "toy" / "confirm").exists()

    study.hold()
    confirming = study.start("confirm", "toy", "--seeds", "3")
    study.wait_until_held(2, confirming)
    confirming.process.send_signal(signal.SIGTERM)
    assert "hpo confirm toy --seeds 3" in confirming.finish(130)
    study.release()
    result = study.run_json("confirm", "toy", "--seeds", "3")
    fresh = study.count_steps() - tuned
    assert set(fresh.values()) == {1}, "what was trained before the signal is not trained again"
    assert fresh.total() == 6 * 18
    assert {tuple(json.loads(step)[:3]) for step in fresh} == {
        (4000.0, side["params"]["lr"], repeat)
        for side in (result["answer"], result["rival"])
        for repeat in (1000, 1001, 1002)
    }
    differences = [b - a for a, b in zip(result["answer"]["losses"], result["rival"]["losses"], strict=True)]
    assert result["difference"]["mean"] == pytest.approx(sum(differences) / 3)
    assert result["search_lead"] > 0

    client = connect(f"sqlite:///{study.folder}/mlflow.db")
    note = read_note(client, find_study_run(client, "toy"), "confirmed")
    assert note is not None
    assert note["verdict"] == result["verdict"]
    runs = client.search_runs([find_experiment_id(client, "toy")], "tags.`muscale.role` = 'confirm'")
    assert sorted(r.data.metrics["confirm/loss"] for r in runs) == pytest.approx(
        sorted(result["answer"]["losses"] + result["rival"]["losses"])
    )
    assert len(study.load_runs()) == 44, "the laws do not use these runs"

    output = study.run("best", "toy")
    assert "confirmed on 3 fresh seeds at N 4,000, D 18,000" in output
    assert result["verdict"] in " ".join(output.split())
    assert "0 of 6 runs left" in study.run("confirm", "toy", "--seeds", "3"), "finished runs are not repeated"
    assert (study.count_steps() - tuned).total() == 6 * 18
    assert "2 of 8 runs left" in study.run("confirm", "toy", "--seeds", "4", "--dry-run")


def test_a_study_whose_workers_were_all_killed_resumes_without_losing_a_configuration(study: ToyStudy) -> None:
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    workers = launcher.list_workers()
    trainers = [trainer for worker in workers for trainer in list_trainers(worker)]
    for worker in workers:
        worker.kill()
    assert "hpo resume toy" in launcher.finish(1)
    psutil.wait_procs(trainers, timeout=PATIENCE_SECONDS)
    interrupted = [t.number for t in study.trials if t.state == optuna.trial.TrialState.RUNNING]
    assert len(interrupted) == 2
    study.release()
    study.run("resume", "toy")
    study.check_whole()
    states = {t.number: t.state for t in study.trials}
    assert {states[n] for n in interrupted} <= {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL}


def test_a_study_that_was_stopped_from_the_keyboard_continues_where_it_was(study: ToyStudy) -> None:
    """No step is trained twice, because a run that is stopped keeps its state. test_faults.py stops one by SIGTERM."""
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    launcher.process.send_signal(signal.SIGINT)
    assert "hpo resume toy" in launcher.finish(130)
    study.release()
    study.run("resume", "toy")
    study.check_whole()
    assert set(study.count_steps().values()) == {1}


def test_differences_are_named_by_their_path() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 3}
    assert list(find_differences(old, new)) == [("a.c", [1], [2]), ("d", 2, None), ("e", None, 3)]


def test_a_signal_interrupts_training_but_not_the_recording_of_its_result() -> None:
    computed = []

    def train() -> Iterator[Measurement]:
        for i in range(3):
            computed.append(i)
            if i == 2:
                signal.raise_signal(signal.SIGTERM)
            yield Measurement(i, 3.0, final=i == 1)

    with StopSignals() as stop:
        points = stop.iterate(train())
        next(points)
        last = next(points)
        # Here a worker records the result.
        signal.raise_signal(signal.SIGTERM)
        assert last.final
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            next(points)
        assert computed == [0, 1], "the next step is not begun"
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
        list(stop.iterate(train()))
    assert computed == [0, 1, 0, 1, 2]
