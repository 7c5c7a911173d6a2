"""Hopeless runs are stopped early, and everything else continues as if they had diverged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
import pytest
from mlflow import MlflowClient
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import ValidationError
from typer.testing import CliRunner

from hpo.__main__ import app
from hpo.launch.progress import format_spending
from hpo.samplers import observations
from hpo.samplers.protocols import Predictor
from hpo.samplers.unit_cube import Cube
from hpo.search.hyperband import VARIANTS, Variant
from hpo.search.search import Search
from hpo.search.view import Job
from hpo.storage.trial_attributes import Stopped, read_stopped
from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study
from hpo.study.schema import SearchTable
from hpo.worker import early_stopping, loop
from hpo.worker.early_stopping import judge, make_early_stopper
from hpo.worker.job import run_job
from hpo.worker.signals import StopSignals
from scaling.common.measurement import Measurement
from scaling.curves.in_progress import CurvePrior, FinishedRun
from scaling.curves.schedules import make_cooldown_schedule
from scaling.laws.compute import Fidelity
from scaling.runs.from_mlflow import read_runs
from scaling.runs.table import check_runs, usable
from scaling.tracking.client import connect, find_experiment_id
from scaling.tracking.experiment import find_or_create_study_run

# SQLAlchemy warns about MLflow.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")

SPACE: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-4, 1.0, log=True)}
TOKENS = (16_000, 48_000)
STOPPED = Stopped(9_000, 4.0, 3.8, 0.02)


def list_points(D: float) -> list[int]:
    """Return where the trunk is measured: at four points per octave, from 1000 tokens to the cooldown."""
    return [round(1000 * 2 ** (j / 4)) for j in range(80) if 1000 * 2 ** (j / 4) <= 0.8 * D]


def compute_floor(lr: float) -> float:
    return 2 + math.log(lr / 0.01) ** 2 / 20


class PlantedTrainer:
    """Loss floor(lr) + 0.8 (t / 1000)^-0.5 on the trunk, 4 % less after the cooldown. Diverges above lr 0.7.

    Attributes:
        trained: (lr, tokens) of each point that was computed.
    """

    sizes = (1000.0,)

    def __init__(self) -> None:
        self.trained: list[tuple[float, int]] = []

    def problems(self, space: Mapping[str, Any], tokens: tuple[int, int] | None) -> list[str]:
        return []

    def manifest(self) -> list[dict[str, Any]]:
        return []

    def target(self, **table: Any) -> Fidelity:
        return Fidelity(float(table["N"]), float(table["D"]))

    def seconds(self, params: Mapping[str, Any], fidelities: Sequence[Fidelity], *, threads: int) -> list[float]:
        return [1.0 for _ in fidelities]

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        return {"N": fidelity.N, "lr": params["lr"], "schedule": "wsd", "cooldown": 0.2, "warmup_tokens": 0}

    def compute_final_loss(self, params: Mapping[str, Any], D: float) -> float:
        return float(0.96 * (compute_floor(params["lr"]) + 0.8 * (D / 1000) ** -0.5))

    def __call__(
        self,
        params: Mapping[str, Any],
        fidelity: Fidelity,
        *,
        resume: Path | None = None,
        save: Path | None = None,
        keep: Path | None = None,
        repeat: int = 0,
    ) -> Iterator[Measurement]:
        done = json.loads(resume.read_text()) if resume else 0
        assert save is not None
        assert keep is not None
        try:
            for tokens in list_points(fidelity.D):
                if tokens > done:
                    done = tokens
                    self.trained.append((params["lr"], tokens))
                    yield Measurement(tokens, compute_floor(params["lr"]) + 0.8 * (tokens / 1000) ** -0.5)
        except GeneratorExit:
            keep.write_text(json.dumps(done))
            raise
        save.write_text(json.dumps(done))
        diverged = params["lr"] > 0.7
        loss = math.nan if diverged else self.compute_final_loss(params, fidelity.D)
        yield Measurement(int(fidelity.D), loss, final=True, diverged=diverged)


class PlantedStudy:
    """A study whose jobs are trained in this process, as `hpo worker` trains them."""

    def __init__(self, folder: Path, client: MlflowClient, chance: float, **settings: Any) -> None:
        self.folder, self.client, self.chance = folder, client, chance
        self.settings: dict[str, Any] = {"tokens": TOKENS, "sampler": "random", "iterations": 2, "seed": 3} | settings
        self.trainer = PlantedTrainer()
        self.name = f"{folder.name}-{chance}"
        self.files = StudyFiles(folder / f"{self.name}.toml")
        self.files.folder.mkdir(exist_ok=True)
        self.parent = find_or_create_study_run(client, self.name)
        self.search = self.open()

    def open(self) -> Search:
        """Open the search again, as after a restart."""
        return Search(SPACE, storage=self.folder / f"{self.chance}.journal", worker="w", **self.settings)

    def run(self, job: Job) -> None:
        monitor = make_early_stopper(self.search, job, self.trainer, self.chance)
        outcome = run_job(job, self.trainer, self.files, self.client.tracking_uri, StopSignals(), monitor)
        if isinstance(outcome, Stopped):
            self.search.stop(job, outcome)
        else:
            self.search.tell(job, outcome)

    def work(self) -> list[Job]:
        jobs = []
        while (job := self.search.ask()) is not None:
            jobs.append(job)
            self.run(job)
        return jobs

    @property
    def stopped(self) -> dict[int, Stopped]:
        stopped = {t.number: read_stopped(t) for t in self.search.study.get_trials(deepcopy=False)}
        return {number: x for number, x in stopped.items() if x is not None}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return connect(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


@pytest.fixture
def study(tmp_path: Path, client: MlflowClient) -> Callable[..., PlantedStudy]:
    def make(chance: float, **settings: Any) -> PlantedStudy:
        return PlantedStudy(tmp_path, client, chance, **settings)

    return make


# The decision


def draw_run(rng: np.random.Generator, level: float, D: float = 1e6) -> tuple[dict[int, float], float]:
    """Draw the trunk and the final loss of a run with a slope, a bend and a gain of its own.

    Every measurement has a noise of 0.1 %.
    """
    t = np.linspace(0.05 * D, 0.8 * D, 16)
    k, alpha, gain = 0.5 * math.exp(0.2 * rng.standard_normal()), rng.uniform(0.3, 0.6), rng.uniform(0.03, 0.05)
    noise = np.exp(1e-3 * rng.standard_normal(17))
    trunk = (level + k * (t / 1e5) ** -alpha) * noise[:-1]
    end = (level + k * (D / 1e5) ** -alpha) * (1 - gain) * noise[-1]
    return {int(a): float(b) for a, b in zip(t, trunk, strict=True)}, float(end)


def finish_run(curve: dict[int, float], end: float, D: float = 1e6) -> FinishedRun:
    return FinishedRun([*curve, D], [*curve.values(), end], make_cooldown_schedule(D))


def decide(
    curve: dict[int, float],
    others: list[tuple[dict[int, float], float]],
    priors: dict[int, CurvePrior] | None = None,
    *,
    every: int = 1,
) -> Stopped | None:
    """Return where the run of a curve is stopped, if it is judged at each `every`-th point; None if it is not."""
    finished, schedule = [finish_run(*other) for other in others], make_cooldown_schedule(1e6)
    best = min(end for _, end in others)
    for i in range(max(every, 3), len(curve) + 1, every):
        known = dict(list(curve.items())[:i])
        stopped = judge(known, 10**6, schedule, finished, best, 0.01, {} if priors is None else priors)
        if stopped is not None:
            return stopped
    return None


@pytest.mark.slow
def test_no_run_that_ends_best_is_stopped_and_nearly_every_run_far_above_is() -> None:
    """A hundred of each."""
    wrongly_stopped, rightly_stopped, saved = 0, 0, []
    for seed in range(20):
        rng, priors = np.random.default_rng(seed), dict[int, CurvePrior]()
        others = [draw_run(rng, level) for level in rng.uniform(2.0, 2.6, 6)]
        best = min(end for _, end in others)
        for _ in range(5):
            winner = draw_run(rng, rng.uniform(1.9, 2.1))
            while winner[1] >= best:
                winner = draw_run(rng, rng.uniform(1.9, 2.1))
            wrongly_stopped += decide(winner[0], others, priors, every=5) is not None
            stopped = decide(draw_run(rng, 3.0)[0], others, priors, every=5)
            if stopped is not None:
                rightly_stopped += 1
                saved.append(1 - stopped.tokens / 1e6)
    assert wrongly_stopped == 0
    assert rightly_stopped >= 95
    assert np.median(saved) == 0.5


def test_fewer_than_five_finished_runs_stop_nothing() -> None:
    rng = np.random.default_rng(0)
    others, hopeless = [draw_run(rng, 2.0) for _ in range(5)], draw_run(rng, 9.0)[0]
    assert decide(hopeless, others) is not None
    assert decide(hopeless, others[:4]) is None
    early = dict(list(hopeless.items())[:6])
    assert max(early) < 0.5e6
    assert decide(early, others) is None, "before half of its tokens"
    late = [({t: loss for t, loss in curve.items() if t > 7.6e5}, end) for curve, end in others]
    stopped = decide(hopeless, late + others[:4])
    assert stopped is None, "runs without points up to here cannot be compared with"


def test_a_stopped_run_is_stored_with_its_forecast_and_its_last_point() -> None:
    rng = np.random.default_rng(1)
    curve, end = draw_run(rng, 3.5)
    stopped = decide(curve, [draw_run(rng, 2.0) for _ in range(8)])
    assert stopped is not None
    assert stopped.loss == curve[stopped.tokens]
    assert abs(stopped.mean - end) < 4 * stopped.sd < 0.4 * end


# In a search


def test_hopeless_runs_end_early_and_the_same_best_is_found(study: Callable[..., PlantedStudy]) -> None:
    plain, saving = study(0.0), study(0.01)
    plain.work()
    saving.work()
    assert saving.stopped
    assert len(saving.trainer.trained) < len(plain.trainer.trained)
    assert saving.search.best() == plain.search.best()
    for number, at in saving.stopped.items():
        trial = saving.search.study.trials[number]
        assert (trial.state, trial.value) == (TrialState.PRUNED, None)
        assert at.tokens == max(t for lr, t in saving.trainer.trained if lr == trial.params["lr"])
        truth = saving.trainer.compute_final_loss(trial.params, trial.user_attrs["tokens"])
        rung = [t for t in plain.search.study.trials if t.user_attrs["tokens"] == trial.user_attrs["tokens"]]
        assert truth > min(t.value for t in rung if t.value is not None)

    progress = saving.search.progress
    assert (progress.stopped, progress.diverged) == (
        len(saving.stopped),
        sum("diverged" in t.user_attrs for t in saving.search.study.trials),
    )
    assert progress.tokens_stopped == sum(
        saving.search.study.trials[i].user_attrs["tokens"] - at.tokens for i, at in saving.stopped.items()
    )
    saved = f"{progress.tokens_stopped:,} tokens saved by stopping {progress.stopped} hopeless runs"
    assert saved in format_spending(progress)
    assert "stopping" not in format_spending(plain.search.progress)
    ends = {i: at.tokens for i, at in saving.stopped.items()}
    assert progress.tokens_spent == sum(
        ends.get(t.number, t.user_attrs["tokens"]) - t.user_attrs["resumed_tokens"] for t in saving.search.study.trials
    )


def test_a_stopped_run_is_excluded_from_the_laws(study: Callable[..., PlantedStudy], client: MlflowClient) -> None:
    saving = study(0.01)
    saving.work()
    table = check_runs(read_runs(saving.name, uri=client.tracking_uri))
    rows = table[table["excluded"] == "stopped"]
    assert sorted(zip(rows["D"], rows["loss"], strict=True)) == sorted(
        (at.tokens, at.loss) for at in saving.stopped.values()
    )
    assert not rows["final"].any()
    assert not rows["diverged"].any()
    laws = usable(table)
    assert set(laws["D"]) <= set(map(float, saving.search.ladder.levels))
    done = [t.value for t in saving.search.study.trials if t.value is not None]
    assert sorted(laws["loss"]) == pytest.approx(sorted(done))
    states = {run.info.run_id: run.info.status for run in client.search_runs([find_experiment_id(client, saving.name)])}
    assert {states[run] for run in rows["run_id"]} == {"KILLED"}
    assert "KILLED" not in {states[run] for run in set(table["run_id"]) - set(rows["run_id"])}


def test_a_study_without_early_stopping_is_the_same_as_one_told_by_hand(study: Callable[..., PlantedStudy]) -> None:
    worked = study(0.0)
    worked.work()
    by_hand = Search(SPACE, **worked.settings)
    while (job := by_hand.ask()) is not None:
        diverged = job.params["lr"] > 0.7
        by_hand.tell(job, math.nan if diverged else worked.trainer.compute_final_loss(job.params, job.fidelity.D))
    trials, trials_by_hand = worked.search.study.trials, by_hand.study.trials
    assert len(trials) == len(trials_by_hand) > 10
    for a, b in zip(trials, trials_by_hand, strict=True):
        assert (a.params, a.state, a.value) == (b.params, b.state, b.value)
        assert not a.intermediate_values
        names = a.user_attrs.keys() | b.user_attrs.keys()
        assert {n for n in names if a.user_attrs.get(n) != b.user_attrs.get(n)} <= {"worker"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_is_treated_as_one_that_diverged_also_after_a_raise(variant: Variant) -> None:
    """Both searches hand out the same jobs, however the bad ones are reported, and none of those is asked again."""
    searches = [Search(SPACE, tokens=TOKENS, sampler="random", iterations=1, seed=5, variant=variant) for _ in range(2)]
    trainer, bad = PlantedTrainer(), set()
    for raised in (False, True):
        if raised:
            for search in searches:
                search.extend(3 * TOKENS[1])
        while True:
            one, other = (search.ask() for search in searches)
            assert one == other
            if one is None or other is None:
                break
            assert one.config not in bad
            if compute_floor(one.params["lr"]) > 2.5:
                bad.add(one.config)
                searches[0].tell(one, math.inf)
                searches[1].stop(other, STOPPED)
            else:
                loss = trainer.compute_final_loss(one.params, one.fidelity.D)
                searches[0].tell(one, loss)
                searches[1].tell(other, loss)
        assert all(search.finished for search in searches)
    assert bad
    progress = searches[1].progress
    assert (progress.stopped, progress.diverged) == (len(bad), 0)


def test_the_model_uses_the_forecast_of_a_stopped_run_but_never_answers_with_the_run() -> None:
    searches = [Search(SPACE, tokens=TOKENS, iterations=2, seed=7) for _ in range(2)]
    told, gave_up = searches
    for i in range(8):
        one, other = (search.ask() for search in searches)
        assert one == other
        assert one is not None
        assert other is not None
        loss = compute_floor(one.params["lr"])
        if i == 7:
            # To the model these are the same. The forecast is absurdly good, so that a mistake would show.
            told.tell(one, 1.5)
            gave_up.stop(other, Stopped(9_000, 2.0, 1.5, 0.02))
        else:
            for search in searches:
                search.tell(one, loss)
    grid = [{"lr": float(lr)} for lr in np.geomspace(1e-4, 1.0, 9)]
    predicted = [cast(Predictor, s._sampler).predict(s.study, SPACE, grid, s.target) for s in searches]
    assert predicted[0] is not None
    assert predicted[1] is not None
    np.testing.assert_allclose(predicted[0], predicted[1])
    seen = [observations.read_observations(s.study, Cube(SPACE), s.target) for s in searches]
    assert [int((~x.finite).sum()) for x in seen] == [0, 1], (
        "a run without a measured loss is neither continued nor an answer"
    )
    assert gave_up.progress.stopped == 1


def test_a_search_without_brackets_neither_continues_nor_repeats_a_stopped_run() -> None:
    search = Search(SPACE, tokens=TOKENS, budget=4.0, cost=lambda f: f.D / TOKENS[1], seed=4)
    trainer, stopped, settings = PlantedTrainer(), set[int](), set[float]()
    while (job := search.ask()) is not None:
        assert job.config not in stopped
        assert job.params["lr"] not in settings
        if compute_floor(job.params["lr"]) > 2.2:
            stopped.add(job.config)
            settings.add(job.params["lr"])
            mean = trainer.compute_final_loss(job.params, job.fidelity.D)
            search.stop(job, Stopped(int(0.6 * job.fidelity.D), 4.0, mean, 0.02))
        else:
            search.tell(job, trainer.compute_final_loss(job.params, job.fidelity.D))
    assert stopped
    assert search.progress.stopped == len(stopped)
    assert compute_floor(search.best()["lr"]) < 2.1


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc"])
def test_optunas_samplers_work_with_stopped_runs(sampler: str) -> None:
    search = Search(SPACE, tokens=TOKENS, sampler=sampler, iterations=3, seed=7)
    for i in range(12):
        job = search.ask()
        assert job is not None
        search.report(job, 9_000, 4.0)
        if i % 3:
            search.tell(job, compute_floor(job.params["lr"]))
        else:
            search.stop(job, STOPPED)
    assert search.progress.stopped == 4
    assert math.isfinite(compute_floor(search.best()["lr"]))


def test_a_worker_stops_runs_when_the_study_file_says_so_and_status_counts_them(
    tmp_path: Path, client: MlflowClient
) -> None:
    files = StudyFiles(tmp_path / "planted.toml")
    files.toml.write_text(
        """
        seed = 3
        [search]
        tokens = { min = 16_000, max = 48_000 }
        sampler = "random"
        iterations = 2
        stop = 0.01
        [space]
        lr = { low = 1e-4, high = 1.0, log = true }
        [trainer]
        use = "tests.test_hpo.test_early_stopping:PlantedTrainer"
        """
    )
    config, trainer = load_study(files.toml)
    search = create_study(files, config, trainer, uri=client.tracking_uri)
    assert loop.run_worker(files, uri=client.tracking_uri, in_child_process=False) == 0
    progress = search.progress
    assert search.finished
    assert progress.stopped
    output = CliRunner().invoke(app, ["status", str(files.toml)]).output
    assert f"{progress.tokens_stopped:,} tokens saved by stopping {progress.stopped} hopeless runs" in output
    as_json = json.loads(CliRunner().invoke(app, ["status", str(files.toml), "--json"]).stdout)
    assert (as_json["stopped"], as_json["tokens_stopped"]) == (progress.stopped, progress.tokens_stopped)


def test_a_run_that_was_killed_and_resumed_is_judged_as_before(
    study: Callable[..., PlantedStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed between its last point and the decision, and again between the two writes of its end."""

    class WorkerKilled(BaseException):
        pass

    whole, broken = study(0.01), study(0.0100001)
    whole.work()
    broken.search = broken.open()
    original_judge = early_stopping.judge

    def judge_or_die(*arguments: Any) -> Stopped | None:
        if original_judge(*arguments) is None:
            return None
        raise WorkerKilled

    monkeypatch.setattr(early_stopping, "judge", judge_or_die)
    with pytest.raises(WorkerKilled):
        broken.work()
    monkeypatch.setattr(early_stopping, "judge", original_judge)
    (hanging,) = [t.number for t in broken.search.study.trials if t.state == TrialState.RUNNING]
    trained = list(broken.trainer.trained)

    broken.search = broken.open()
    job = broken.search.ask()
    assert job is not None
    assert job.number == hanging
    write = broken.search._writer.storage.set_trial_state_values

    def die(trial_id: int, state: TrialState, *rest: Any) -> bool:
        if state == TrialState.PRUNED:
            raise WorkerKilled
        return write(trial_id, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(broken.search._writer.storage, "set_trial_state_values", die)
        with pytest.raises(WorkerKilled):
            broken.run(job)
    assert broken.trainer.trained == trained, "the stored points are enough for the decision"
    assert not broken.files.partial(job.config, int(job.fidelity.D)).exists()

    broken.search = broken.open()
    broken.work()
    assert broken.stopped == whole.stopped
    assert broken.trainer.trained == whole.trainer.trained
    assert broken.search.best() == whole.search.best()


def test_only_runs_of_one_seed_are_stopped(study: Callable[..., PlantedStudy]) -> None:
    many = study(0.01, seeds=[1, 2], iterations=4)
    jobs = many.work()
    assert many.stopped
    assert {many.search.study.trials[i].user_attrs["seeds"] for i in many.stopped} == {1}
    job = next(job for job in jobs if job.seeds == 2)
    assert make_early_stopper(many.search, job, many.trainer, 0.01) is None
    other = Search(SPACE, tokens=TOKENS, sampler="random", seeds=2)
    asked = other.ask()
    assert asked is not None
    with pytest.raises(ValueError, match="only a run of one seed"):
        other.stop(asked, STOPPED)
    assert other.progress.running == 1


def test_a_stopped_run_costs_the_budget_only_what_it_trained() -> None:
    search = Search(SPACE, tokens=TOKENS, budget=100.0, cost=lambda f: f.D / 1000, seed=1)
    job = search.ask()
    assert job is not None
    before = search._decider.compute_budget_left(search._read())
    search.stop(job, STOPPED)
    assert before == pytest.approx(100 - job.fidelity.D / 1000)
    assert search._decider.compute_budget_left(search._read()) == pytest.approx(100 - 9)
    with pytest.raises(ValueError, match="told once"):
        search.stop(job, STOPPED)


def test_a_trial_pruned_by_hand_has_no_result_and_is_asked_again() -> None:
    search = Search(SPACE, tokens=TOKENS, sampler="random", iterations=1, seed=2)
    job = search.ask()
    assert job is not None
    search.study.tell(job.number, state=optuna.trial.TrialState.PRUNED)
    again = search.ask()
    assert again is not None
    assert (again.config, again.params) == (job.config, job.params)
    assert search.progress.stopped == 0


def test_a_chance_above_the_limit_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"stop\b"):
        SearchTable.model_validate({"tokens": {"min": 1000, "max": 9000}, "stop": 0.6})
    assert SearchTable.model_validate({"tokens": {"min": 1000, "max": 9000}}).stop == 0


def test_a_run_is_compared_only_with_runs_that_had_finished_before_it_began() -> None:
    noon = datetime(2026, 1, 1, 12)

    def make_trial(began: int, ended: int | None, loss: float = 2.0, tokens: int = 9000) -> FrozenTrial:
        """Return a trial that began and ended so many minutes after noon; None: it still runs."""
        trial = create_trial(
            state=TrialState.RUNNING if ended is None else TrialState.COMPLETE,
            value=None if ended is None else loss,
            user_attrs={"N": 1e3, "tokens": tokens, "bracket": [0, 0, 0], "seeds": 1},
        )
        trial.datetime_start = noon + timedelta(minutes=began)
        trial.datetime_complete = None if ended is None else noon + timedelta(minutes=ended)
        return trial

    one = make_trial(10, None)
    before, earlier = make_trial(1, 9), make_trial(0, 8)
    others = [before, earlier, *(make_trial(*times) for times in ((2, 10), (3, 30), (5, None)))]
    others.append(make_trial(4, 5, tokens=3000))
    for number, trial in enumerate([*others, one]):
        trial.number = number
    assert early_stopping.find_rivals([*others, one], one) == [earlier, before]
