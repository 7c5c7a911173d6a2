"""The sampler in plain studies whose trials fail, are pruned, or are pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from hpo.samplers.multi_fidelity import MultiFidelitySampler
from hpo.samplers.observations import Observations, read_observations
from hpo.samplers.unit_cube import Cube
from hpo.surrogate.feasibility import fit_feasibility
from scaling.laws.compute import Fidelity

SPACE: dict[str, Any] = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
TARGET = Fidelity(1.0, 1.0)
Objective = Callable[[optuna.Trial], float]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)


def slope(x: float, y: float) -> float:
    """Return a loss that falls towards x = 1."""
    return (1 - x) + (y - 0.3) ** 2


def raising(trial: optuna.Trial) -> float:
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    if x > 0.5:
        raise RuntimeError("out of memory")
    return slope(x, y)


def raising_before_all_parameters_are_known(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0, 1)
    if x > 0.5:
        raise RuntimeError("out of memory")
    return slope(x, trial.suggest_float("y", 0, 1))


def returning_nan(trial: optuna.Trial) -> float:
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    return float("nan") if x > 0.5 else slope(x, y)


def returning_infinity(trial: optuna.Trial) -> float:
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    return float("inf") if x > 0.5 else slope(x, y)


def pruned_without_a_report(trial: optuna.Trial) -> float:
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    if x > 0.5:
        raise optuna.TrialPruned
    return slope(x, y)


def violating_a_constraint(trial: optuna.Trial) -> float:
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    trial.set_constraint("memory", x - 0.5)
    return slope(x, y)


def run(objective: Objective, seed: int, trials: int = 30, direction: str = "minimize") -> optuna.Study:
    study = optuna.create_study(sampler=MultiFidelitySampler(seed=seed), direction=direction)
    study.optimize(objective, n_trials=trials, catch=(RuntimeError,))
    return study


@pytest.mark.parametrize(
    "objective",
    [
        raising,
        raising_before_all_parameters_are_known,
        returning_nan,
        returning_infinity,
        pruned_without_a_report,
        violating_a_constraint,
    ],
)
def test_a_region_that_fails_is_left_and_its_border_is_approached(objective: Objective) -> None:
    study = run(objective, seed=3)
    failed = [t.params["x"] > 0.5 for t in study.trials]
    assert sum(failed[:10]) >= 1, "the slope leads there, and Sobol's points lie there, too"
    assert sum(failed[-15:]) <= 5
    succeeded = [slope(t.params["x"], t.params["y"]) for t in study.trials if t.params["x"] <= 0.5]
    # The lowest loss that can be reached is 0.5.
    assert min(succeeded) < 0.56


def test_a_failing_region_is_left_when_maximizing_too() -> None:
    study = run(lambda trial: -raising(trial), seed=3, direction="maximize")
    assert [t.params for t in study.trials] == [t.params for t in run(raising, seed=3).trials]


def test_a_choice_that_always_fails_is_hardly_tried() -> None:
    def objective(trial: optuna.Trial) -> float:
        name = trial.suggest_categorical("name", ["adam", "broken", "sgd"])
        x = trial.suggest_float("x", 0, 1)
        if name == "broken":
            raise RuntimeError("no such optimizer")
        return (x - 0.7) ** 2 + (name == "sgd")

    study = run(objective, seed=1, trials=25)
    assert sum(t.params["name"] == "broken" for t in study.trials[10:]) <= 3
    assert study.best_value < 1e-3


def test_failures_at_random_do_not_mislead() -> None:
    rng = np.random.default_rng(2)

    def objective(trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        if rng.random() < 0.2:
            raise RuntimeError("the node was lost")
        return (x - 0.62) ** 2 + (y - 0.35) ** 2

    assert run(objective, seed=0, trials=25).best_value < 5e-3


def test_when_everything_fails_settings_are_still_spread() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        raise RuntimeError("not installed")

    xs = [t.params["x"] for t in run(objective, seed=0, trials=12).trials]
    assert min(xs) < 0.25
    assert max(xs) > 0.75


def test_the_recommendation_is_not_a_setting_that_fails() -> None:
    study = run(raising, seed=3)
    answer = MultiFidelitySampler(seed=3).best(study, SPACE, TARGET)
    assert 0.35 < answer["x"] <= 0.51
    assert abs(answer["y"] - 0.3) < 0.2


# What the sampler reads


def read(*trials: optuna.trial.FrozenTrial, direction: str = "minimize") -> Observations:
    study = optuna.create_study(direction=direction)
    study.add_trials(list(trials))
    return read_observations(study, Cube(SPACE), TARGET)


def make_trial(x: float, y: float | None = 0.5, **options: Any) -> optuna.trial.FrozenTrial:
    params = {"x": x} if y is None else {"x": x, "y": y}
    return create_trial(params=params, distributions={name: SPACE[name] for name in params}, **options)


def test_a_pruned_trial_counts_with_its_last_report_at_the_share_of_the_steps_that_it_ran() -> None:
    curve = {step: 5.0 - step for step in range(4)}
    observed = read(
        make_trial(0.1, value=1.0, intermediate_values=dict.fromkeys(range(8), 1.0)),
        make_trial(0.2, state=TrialState.PRUNED, intermediate_values=curve),
        make_trial(0.3, state=TrialState.PRUNED, intermediate_values={0: float("nan")}),
    )
    assert observed.loss.tolist() == [1.0, 2.0]
    assert observed.levels == [TARGET, Fidelity(1.0, 0.5)]
    assert observed.started_at == [TARGET, TARGET]
    assert observed.failed[:, 0].tolist() == [0.3]


def test_a_pruned_trial_with_tokens_counts_at_its_share_of_them() -> None:
    attributes = {"N": 10.0, "tokens": 800}
    observed = read(
        make_trial(0.1, value=1.0, intermediate_values=dict.fromkeys(range(4), 1.0), user_attrs=attributes),
        make_trial(0.2, state=TrialState.PRUNED, intermediate_values={0: 4.0}, user_attrs=attributes),
        direction="maximize",
    )
    assert observed.levels == [Fidelity(10.0, 800.0), Fidelity(10.0, 200.0)]
    assert observed.loss.tolist() == [-1.0, -4.0]


def test_runs_of_a_search_that_are_asked_again_are_no_failures() -> None:
    of_search = {"bracket": [0, 0, 0], "rung": 0, "tokens": 100, "N": 1.0}
    observed = read(
        make_trial(0.1, state=TrialState.FAIL, user_attrs=of_search),
        make_trial(0.2, state=TrialState.PRUNED, user_attrs=of_search, intermediate_values={1: 3.0}),
        make_trial(0.3, state=TrialState.FAIL, user_attrs=of_search | {"diverged": True}),
    )
    assert len(observed.failed) == 0
    assert observed.points[:, 0].tolist() == [0.3]
    assert np.isnan(observed.loss).all()


def test_a_trial_that_failed_before_it_had_all_parameters_fails_for_any_value_of_the_others() -> None:
    observed = read(*(make_trial(0.9, None, state=TrialState.FAIL) for _ in range(40)))
    assert observed.failed[:, 0].tolist() == [0.9] * 40
    assert observed.failed[:, 1].min() < 0.2
    assert observed.failed[:, 1].max() > 0.8


def test_completed_settings_stand_for_values_that_exist() -> None:
    cube = Cube({"x": FloatDistribution(0, 1), "c": CategoricalDistribution(["a", "b", "c"])})
    points = np.stack([cube.complete_to_unit({"x": 0.25}, seed) for seed in range(20)])
    np.testing.assert_allclose(points[:, 0], 0.25)
    assert set(np.round(points[:, 1] * 6).astype(int)) == {1, 3, 5}


def test_the_classifier_finds_a_planted_border_in_one_of_six_parameters() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((60, 6))
    is_good = points[:, 2] < 0.4
    predict = fit_feasibility(points[is_good], points[~is_good])
    held_out = rng.random((500, 6))
    assert np.mean((predict(held_out) > 0.5) == (held_out[:, 2] < 0.4)) > 0.9
    middle = np.full((2, 6), 0.5)
    middle[:, 2] = 0.05, 0.95
    safe, unsafe = predict(middle)
    assert safe > 0.8
    assert unsafe < 0.2


def test_few_failures_among_many_leave_the_rest_likely_to_succeed() -> None:
    rng = np.random.default_rng(1)
    predict = fit_feasibility(rng.random((400, 2)), rng.random((4, 2)))
    assert np.median(predict(rng.random((200, 2)))) > 0.8


# Copies


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_a_copy_of_a_study_proposes_the_same(copied: Callable[[Any], Any]) -> None:
    study = run(raising, seed=0, trials=12)
    again = copied(study)
    sampler = copied(study.sampler)
    assert sampler.best(study, SPACE, TARGET) == study.sampler.best(study, SPACE, TARGET)  # type: ignore[attr-defined]
    for one in (study, again):
        one.optimize(raising, n_trials=3, catch=(RuntimeError,))
    assert [t.params for t in again.trials] == [t.params for t in study.trials]


@pytest.mark.parametrize("surrogate", ["bowl", "deep", "nngp"])
def test_a_sampler_that_has_fitted_its_model_is_pickled_without_it(surrogate: str) -> None:
    study = optuna.create_study(sampler=MultiFidelitySampler(seed=0, surrogate=surrogate, n_startup_trials=4))
    study.optimize(lambda t: (t.suggest_float("x", 0, 1) - 0.3) ** 2, n_trials=6)
    stored = pickle.dumps(study.sampler)
    assert len(stored) < 2_000
    assert isinstance(pickle.loads(stored), MultiFidelitySampler)
