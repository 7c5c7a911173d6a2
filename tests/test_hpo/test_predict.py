"""The sampler's predictions, differences and hopeless settings, and trials that violate a constraint."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

from hpo.samplers.multi_fidelity import MIN_GAIN_PER_DOUBT, MultiFidelitySampler
from hpo.samplers.registry import make_sampler
from hpo.samplers.unit_cube import Cube
from hpo.search.search import Search
from scaling.laws.compute import Fidelity
from tests.test_hpo.test_samplers import CHEAP, SPACE, TARGET, add, bowl

LOW, TOP = Fidelity(1e6, 2e7), Fidelity(1e6, 8e7)
XY: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}


def make_scattered_study(n: int, seed: int = 0) -> optuna.Study:
    """Return a study with n random settings, each at one of the levels in turn. The last one is still running."""
    study, cube, rng = optuna.create_study(), Cube(SPACE), np.random.default_rng(seed)
    for i in range(n):
        params, level = cube.to_params(rng.random(2)), CHEAP[i % len(CHEAP)]
        add(study, params, level, None if i == n - 1 else bowl(params, level))
    return study


def test_differences_are_those_of_losses_drawn_from_the_joint_posterior() -> None:
    """A draw takes a member of the ensemble, then both losses together, for pairs that are near and far."""
    from hpo.surrogate.fitting import fit_surrogate
    from hpo.surrogate.gp import join_inputs
    from hpo.surrogate.inputs import compute_fidelity_coordinates

    study, cube, sampler = make_scattered_study(16), Cube(SPACE), MultiFidelitySampler(seed=0)
    runs = study.get_trials(deepcopy=False)
    levels = [Fidelity(t.user_attrs["N"], t.user_attrs["tokens"]) for t in runs]
    T = compute_fidelity_coordinates(levels, TARGET)
    U = np.stack([cube.to_unit(t.params) for t in runs])
    ids = np.array([CHEAP.index(f) for f in levels[:-1]])
    model = fit_surrogate(U[:-1], T[:-1], ids, np.array([t.value for t in runs[:-1]], float))
    model = model.with_pending(U[-1:], T[-1:])
    rng = np.random.default_rng(0)
    near, far = {"lr": 0.0011, "batch": 70}, {"lr": 0.08, "batch": 400}
    for a, b in (({"lr": 0.001, "batch": 64}, near), (near, far), (far, {"lr": 0.0002, "batch": 8})):
        x = join_inputs(np.stack([cube.to_unit(a), cube.to_unit(b)]), np.zeros(2))
        drawn = []
        for member in model.members:
            mean, _, v = member.posterior(x)
            root = np.linalg.cholesky(member.covariance(x, v, x, v).numpy() + 1e-12 * np.eye(2))
            drawn.append(mean.numpy() + rng.standard_normal((20_000, 2)) @ root.T)
        losses = np.vstack(drawn) * model.scale + model.offset
        gaps = losses[:, 1] - losses[:, 0]
        forward, backward = (
            sampler.difference(study, SPACE, a, b, TARGET),
            sampler.difference(study, SPACE, b, a, TARGET),
        )
        assert forward is not None
        assert forward[0] == pytest.approx(gaps.mean(), abs=0.02 * gaps.std())
        assert forward[1] == pytest.approx(gaps.std(), rel=0.03)
        assert backward == pytest.approx((-forward[0], forward[1]), rel=1e-9)
        predicted = sampler.predict(study, SPACE, [a, b], TARGET)
        assert predicted is not None
        assert predicted[1] - predicted[0] == pytest.approx(forward[0])
    same = sampler.difference(study, SPACE, near, near, TARGET)
    assert same == pytest.approx((0.0, 0.0), abs=1e-5)
    # Far from all runs the level is uncertain, but that uncertainty is common to neighbours.
    a, b = {"lr": 0.004, "batch": 60}, {"lr": 0.005, "batch": 70}
    between = sampler.difference(study, SPACE, a, b, TARGET)
    assert between is not None
    _, sd = model.predict(np.stack([cube.to_unit(p) for p in (a, b)]), np.zeros(2))
    assert between[1] < 0.3 * sd.min()


def test_without_a_model_nothing_is_predicted_and_nothing_is_hopeless() -> None:
    study, sampler = optuna.create_study(), MultiFidelitySampler(seed=0)
    a, b = {"lr": 0.001, "batch": 64}, {"lr": 0.1, "batch": 8}
    # Without any run, and with one.
    for _ in range(2):
        assert sampler.predict(study, SPACE, [a], TARGET) is None
        assert sampler.difference(study, SPACE, a, b, TARGET) is None
        assert not sampler.is_hopeless(study, SPACE, a, TARGET)
        add(study, a, CHEAP[0], 9.0)


def valley(params: dict[str, Any], f: Fidelity) -> float:
    return float(2.0 + (params["x"] - 0.3) ** 2 + (params["y"] - 0.6) ** 2 + 0.2 * (f == LOW))


def add_xy(study: optuna.Study, params: dict[str, Any], f: Fidelity, loss: float, **constraints: float) -> None:
    study.add_trial(
        optuna.create_trial(
            params=params,
            distributions=XY,
            value=loss,
            user_attrs={"tokens": int(f.D), "N": f.N},
            constraints=constraints,
        )
    )


def test_what_is_clearly_worse_is_hopeless_and_what_may_be_best_is_not() -> None:
    study, sampler, rng = optuna.create_study(), MultiFidelitySampler(seed=0), np.random.default_rng(1)
    for i in range(16):
        params = {"x": float(rng.random()), "y": float(rng.random())}
        add_xy(study, params, (LOW, TOP)[i % 2], valley(params, (LOW, TOP)[i % 2]))
    hopeless = [
        sampler.is_hopeless(study, XY, params, TOP)
        for params in ({"x": 0.3, "y": 0.6}, sampler.best(study, XY, TOP), {"x": 0.95, "y": 0.1}, {"x": 0.9, "y": 0.9})
    ]
    assert hopeless == [False, False, True, True]
    # A bad loss at any fidelity counts as much as the model transfers it to the target.
    add_xy(study, {"x": 0.31, "y": 0.59}, LOW, 9.0)
    assert sampler.is_hopeless(study, XY, {"x": 0.95, "y": 0.1}, TOP)


def test_with_few_noisy_runs_nearly_nothing_is_hopeless() -> None:
    study, sampler, rng = optuna.create_study(), MultiFidelitySampler(seed=0), np.random.default_rng(2)
    for _ in range(5):
        params = {"x": float(rng.random()), "y": float(rng.random())}
        add_xy(study, params, LOW, 2.0 + float(rng.standard_normal()))
    asked = [sampler.is_hopeless(study, XY, {"x": x, "y": y}, TOP) for x in (0.1, 0.5, 0.9) for y in (0.1, 0.5, 0.9)]
    assert sum(asked) <= 2


# Constraints


def test_an_infeasible_trial_is_not_the_best_before_there_is_a_model_either() -> None:
    study, sampler = optuna.create_study(), MultiFidelitySampler(seed=0, n_startup_trials=5)
    add_xy(study, {"x": 0.1, "y": 0.1}, TOP, 1.0, memory=0.5)
    with pytest.raises(ValueError, match="finite loss"):
        sampler.best(study, XY, TOP)
    add_xy(study, {"x": 0.2, "y": 0.2}, TOP, 3.0, memory=0.0, time=-1.0)
    add_xy(study, {"x": 0.3, "y": 0.3}, TOP, 2.0, memory=-1.0, time=1e-9)
    add_xy(study, {"x": 0.4, "y": 0.4}, LOW, 0.5)
    assert sampler.best(study, XY, TOP) == pytest.approx({"x": 0.2, "y": 0.2})


@pytest.mark.parametrize("broken", ["constraint", "divergence"])
def test_infeasible_regions_are_avoided_like_those_that_diverge(broken: str) -> None:
    """The loss falls towards x = 1, but a run above x = 0.6 does not count."""

    def objective(trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        if broken == "constraint":
            trial.set_constraint("memory", x - 0.6)
        elif x > 0.6:
            trial.set_user_attr("diverged", True)
            raise FloatingPointError
        return 2.0 - x + (y - 0.5) ** 2

    study = optuna.create_study(sampler=MultiFidelitySampler(seed=0))
    study.optimize(objective, n_trials=24, catch=FloatingPointError)
    late = [t.params["x"] for t in study.trials[12:]]
    assert sum(x > 0.6 for x in late) <= 4
    assert 0.4 < max(x for x in late if x <= 0.6)
    answer = MultiFidelitySampler(seed=0).best(study, XY, Fidelity(1.0, 1.0))
    assert 0.4 < answer["x"] < 0.65


# Optuna's samplers by name


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_optunas_samplers_run_a_search_by_name(name: str) -> None:
    """One Hyperband of three rungs has 9 + 3 + 1, 5 + 1, and 3 runs that start at the top."""
    assert type(make_sampler(name, seed=1)).__name__ == {"tpe": "TPESampler", "gp": "GPSampler"}[name]
    outlines = []
    for _ in range(2):
        search = Search(XY, tokens=(100, 900), sampler=name, iterations=1, seed=1)
        jobs = []
        while (job := search.ask()) is not None:
            jobs.append((job.config, job.rung, tuple(job.params.items())))
            search.tell(job, valley(job.params, job.fidelity) + 10 / job.fidelity.D)
        outlines.append(jobs)
        assert search.finished
        assert len(jobs) == 22
        done = [t for t in search.study.trials if t.user_attrs["rung"] == 2]
        assert search.best() == min(done, key=lambda t: t.value or math.inf).params
        assert all(t.state == TrialState.COMPLETE for t in search.study.trials)
    assert outlines[0] == outlines[1]
    assert len({params for _, _, params in outlines[0]}) == len({config for config, _, _ in outlines[0]})


@pytest.mark.parametrize("seed", range(6))
def test_the_answer_is_a_run_at_the_target_unless_the_model_is_sure_of_more(seed: int) -> None:
    """With random losses nothing can be gained, so the answer is a good run, or a point whose gain the model expects to
    be at least half its uncertainty."""
    rng = np.random.default_rng(seed)
    search = Search(
        {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}, tokens=(100, 900), resumable=False
    )
    for _ in range(32):
        job = search.ask()
        assert job is not None
        search.tell(job, float(rng.standard_normal()))
    answer, sampler = search.best(), search.study.sampler
    assert isinstance(sampler, MultiFidelitySampler)
    at_target = [t.params for t in search.study.trials if t.user_attrs["tokens"] == 900]
    assert at_target
    predicted = sampler.predict(search.study, search.space, at_target, search.target)
    assert predicted is not None
    best = at_target[int(np.argmin(predicted))]
    if answer != best:
        gain = sampler.difference(search.study, search.space, answer, best, search.target)
        assert gain is not None
        assert gain[0] >= MIN_GAIN_PER_DOUBT * gain[1] - 1e-9
