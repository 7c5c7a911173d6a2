"""Learning curves in the trials of a study, and the trials of one size and length as a study of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

import hpo
from hpo.search.search import Search
from hpo.search.view import Job
from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study, open_existing
from hpo.study.selection import join_curve, select_trials
from hpo.worker import curve_recording
from hpo.worker.curve_recording import MAX_POINTS, CurveRecorder
from hpo.worker.loop import run_worker
from scaling.common.measurement import Measurement
from tests.test_hpo.toy_study import STUDY

SPACE: dict[str, Any] = {"lr": FloatDistribution(1e-4, 1.0, log=True), "x": FloatDistribution(0, 1)}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def loss_of(job: Job) -> float:
    """Return a loss that depends on lr at the largest run only, and on x at all others only."""
    is_largest = (job.fidelity.N, job.fidelity.D) == (40.0, 900)
    return math.log10(job.params["lr"]) ** 2 if is_largest else 10 + job.params["x"]


@pytest.fixture(scope="module")
def search() -> Search:
    search = Search(SPACE, tokens=(100, 900), sizes=(10.0, 40.0), iterations=2, sampler="random", seed=4)
    while (job := search.ask()) is not None:
        start = job.resume_tokens or 0
        for tokens in range(start + 50, int(job.fidelity.D), 50):
            search.report(job, tokens, 20.0 - tokens / 100)
        search.report(job, int(job.fidelity.D), loss_of(job))
        search.tell(job, math.nan if job.number == 3 else loss_of(job))
    return search


def test_runs_of_one_size_and_length_are_a_study_whose_importances_are_their_own(search: Search) -> None:
    largest = select_trials(search)
    assert {(t.user_attrs["N"], t.user_attrs["tokens"]) for t in largest.trials} == {(40.0, 900)}
    importances = optuna.importance.get_param_importances(
        largest, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    assert max(importances, key=importances.__getitem__) == "lr"
    smallest = hpo.select_trials(search.study, N=10, D=100)
    importances = optuna.importance.get_param_importances(
        smallest, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    assert max(importances, key=importances.__getitem__) == "x"
    expected = [t for t in search.study.trials if (t.user_attrs["N"], t.user_attrs["tokens"]) == (10.0, 100)]
    assert [t.user_attrs["trial"] for t in smallest.trials] == [t.number for t in expected]
    assert [t.value for t in smallest.trials] == [t.value for t in expected]
    assert sum(t.state == TrialState.FAIL for t in smallest.trials) == 1, "the diverged one"


def test_the_curve_of_a_promoted_run_begins_where_the_shorter_run_began(search: Search) -> None:
    largest = select_trials(search, N=40)
    promoted = [t for t in largest.trials if t.user_attrs["resumed_tokens"]]
    assert promoted
    for trial in promoted:
        curve = trial.intermediate_values
        assert min(curve) == 50
        # The end of the shorter run, after its cooldown, is no point of this one.
        assert trial.user_attrs["resumed_tokens"] not in curve
        assert curve[900] == trial.value
        without_end = join_curve(search.study.trials, search.study.trials[trial.user_attrs["trial"]])
        assert without_end == {k: v for k, v in curve.items() if k != 900}


def test_a_size_or_length_that_was_not_run_is_refused_with_those_that_were(search: Search) -> None:
    with pytest.raises(ValueError, match=r"no finished run of N 11: it has N 10, D 100 \(\d+\); .*N 40, D 900 \(\d+\)"):
        select_trials(search, N=11)
    with pytest.raises(ValueError, match="no finished run: it has none at all"):
        select_trials(optuna.create_study())


def launch_toy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFiles:
    """Launch a small study of the toy trainer, without workers."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setattr("scaling.tracking.experiment.read_git_commit", lambda: "none")
    (folder / "studies").mkdir()
    (folder / "steps").mkdir()
    toml = folder / "studies" / "toy.toml"
    text = STUDY.format(pause=0.0, seeds="[1, 2]", steps=folder / "steps").replace("18_000", "6_000")
    toml.write_text(text.replace("pause", "sizes = [1000.0]\npause"))
    files = StudyFiles(toml)
    study, trainer = load_study(toml)
    create_study(files, study, trainer, uri=None)
    return files


@pytest.mark.filterwarnings("ignore")
def test_a_worker_stores_the_curve_of_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = launch_toy(tmp_path, monkeypatch)
    # Whatever the disk of this machine takes.
    monkeypatch.setattr(curve_recording, "TIME_SHARE", math.inf)
    assert run_worker(files, in_child_process=False) == 0
    study, trainer = load_study(files.toml)
    trials = open_existing(files, study, trainer).study.get_trials()
    finished = [t for t in trials if t.state == TrialState.COMPLETE]
    assert len(finished) >= 4
    assert {t.user_attrs["seeds"] for t in finished} == {1, 2}
    for trial in finished:
        start, end = trial.user_attrs["resumed_tokens"], trial.user_attrs["tokens"]
        # The toy trainer measures every 1,000 tokens, and again at the end.
        assert sorted(trial.intermediate_values) == list(range(start + 1_000, end + 1, 1_000))
        if trial.user_attrs["seeds"] == 1:
            assert trial.intermediate_values[end] == trial.value
    assert len(hpo.select_trials("toy", N=1_000, D=2_000).trials) == sum(
        (t.user_attrs["N"], t.user_attrs["tokens"]) == (1_000, 2_000) for t in trials
    )
    with pytest.raises(ValueError, match="did you mean toy"):
        hpo.select_trials("toyy")


def ask_for_a_run_of_3000_tokens() -> tuple[Search, Job]:
    search = Search(SPACE, tokens=(3_000, 9_000), iterations=1, sampler="random")
    job = search.ask()
    assert job is not None
    assert job.fidelity.D == 3_000
    return search, job


def test_a_long_run_stores_a_bounded_number_of_points_and_only_those_of_its_first_seed(tmp_path: Path) -> None:
    search, job = ask_for_a_run_of_3000_tokens()
    first_result = tmp_path / "result.json"
    recorder = CurveRecorder(search, job, first_result)
    for tokens in range(1, 3_000):
        recorder._next_time = -math.inf
        recorder.observe(Measurement(tokens, math.nan if tokens == 1_500 else 3.0))
    stored = sorted(search.study.trials[0].intermediate_values)
    assert len(stored) == MAX_POINTS
    assert stored[0] < 3_000 / MAX_POINTS
    assert stored[-1] > 3_000 - 2 * 3_000 / MAX_POINTS
    first_result.write_text("{}")
    second_seed = CurveRecorder(search, job, first_result)
    second_seed.observe(Measurement(1, 5.0))
    assert sorted(search.study.trials[0].intermediate_values) == stored


def test_a_slow_storage_gets_fewer_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, job = ask_for_a_run_of_3000_tokens()
    now = 0.0

    def wait(*_: Any) -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr(curve_recording.time, "monotonic", lambda: now)
    written: list[int] = []
    monkeypatch.setattr(search, "report", lambda job, tokens, loss: (written.append(tokens), wait()))
    recorder = CurveRecorder(search, job, tmp_path / "none")
    for tokens in range(30, 3_000, 30):
        # Each measurement takes 2 s, and storing one takes 1 s.
        now += 2.0
        recorder.observe(Measurement(tokens, 3.0))
    assert 3 <= len(written) <= 6, "at most a fiftieth of the time is spent on storing"
