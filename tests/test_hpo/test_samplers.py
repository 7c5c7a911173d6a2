"""The samplers in Optuna studies, on their own and as a search uses them."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.testing import pytest_samplers
from optuna.trial import TrialState

from hpo.samplers.multi_fidelity import MultiFidelitySampler
from hpo.samplers.registry import make_sampler
from hpo.samplers.unit_cube import Cube
from scaling.laws.compute import Fidelity

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "batch": IntDistribution(8, 512, log=True),
}
TARGET = Fidelity(16e6, 3.2e8)
CHEAP = [Fidelity(1e6, 2e7), Fidelity(2e6, 2e7), Fidelity(1e6, 4e7), Fidelity(2e6, 4e7), Fidelity(4e6, 8e7)]


def optimum(f: Fidelity) -> tuple[float, float]:
    """Return ln lr* and ln batch*, which both drift with size and tokens."""
    return math.log(0.02) - 0.25 * math.log(f.N / 1e6) + 0.1 * math.log(f.D / 2e7), 3.0 + 0.35 * math.log(f.D / 2e7)


def bowl(params: dict[str, Any], f: Fidelity) -> float:
    """Return a loss law plus a quadratic bowl around the drifting optimum, in nats."""
    lr, batch = optimum(f)
    x, y = math.log(params["lr"]) - lr, math.log(params["batch"]) - batch
    return float(1.7 + 400 / f.N**0.34 + 400 / f.D**0.28 + 0.05 * x * x + 0.03 * y * y + 0.01 * x * y)


def add(study: optuna.Study, params: dict[str, Any], f: Fidelity, loss: float | None, **attrs: Any) -> None:
    """Add a trial as a search writes it. A loss of None is a running trial, NaN a diverged one."""
    diverged = loss is not None and not math.isfinite(loss)
    state = TrialState.RUNNING if loss is None else TrialState.FAIL if diverged else TrialState.COMPLETE
    study.add_trial(
        optuna.create_trial(
            state=state,
            params=params,
            distributions={name: SPACE[name] for name in params},
            value=None if loss is None or diverged else loss,
            user_attrs={"tokens": int(f.D), "N": f.N, "diverged": diverged, **attrs},
        )
    )


def searched(seed: int, n: int, slots: Sequence[Fidelity] = CHEAP) -> optuna.Study:
    """Run n proposals of the sampler on the drifting bowl."""
    study, sampler = optuna.create_study(), MultiFidelitySampler(seed=seed)
    for _ in range(n):
        params, slot = sampler.propose(study, SPACE, slots, lambda f: f.C, TARGET)
        add(study, params, slots[slot], bowl(params, slots[slot]))
    return study


@pytest.fixture(scope="module")
def searches() -> list[optuna.Study]:
    return [searched(seed, 32) for seed in range(3)]


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    cube = Cube(SPACE)
    return float(np.abs(cube.to_unit(a) - cube.to_unit(b)).max())


def test_start_up_points_are_spread_at_the_cheapest_slot_and_equal_in_every_process() -> None:
    study = optuna.create_study()
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    slots = [CHEAP[4], CHEAP[0], CHEAP[2]]
    points = []
    for _ in range(4):
        params, slot = MultiFidelitySampler(seed=7).propose(study, space, slots, lambda f: f.C, TARGET)
        repeated = MultiFidelitySampler(seed=7).propose(study, space, slots, lambda f: f.C, TARGET)
        assert (params, slot) == repeated
        assert slot == 1
        points.append((params["x"], params["y"]))
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=sum(params.values())))
    # A scrambled Sobol sequence has one point in each quarter of the square.
    assert len({(x > 0.5, y > 0.5) for x, y in points}) == 4
    other = MultiFidelitySampler(seed=8).propose(optuna.create_study(), space, slots, lambda f: f.C, TARGET)[0]
    assert abs(other["x"] - points[0][0]) > 1e-3


def test_promotions_do_not_count_as_start_up_configurations() -> None:
    study, sampler = optuna.create_study(), MultiFidelitySampler(seed=1)
    params, _ = sampler.propose(study, SPACE, CHEAP, lambda f: f.C, TARGET)
    for i, f in enumerate(CHEAP):
        add(study, params, f, bowl(params, f), config=0, continues=i - 1 if i else None)
    second, slot = sampler.propose(study, SPACE, CHEAP, lambda f: f.C, TARGET)
    sobol = optuna.create_study()
    add(sobol, params, CHEAP[0], 1.0)
    assert (second, slot) == sampler.propose(sobol, SPACE, CHEAP, lambda f: f.C, TARGET)


def test_a_proposal_is_a_function_of_the_trials_and_the_seed(searches: list[optuna.Study]) -> None:
    import torch

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    answers = []
    for _ in range(2):
        sampler = MultiFidelitySampler(seed=3)
        answers.append(
            (
                sampler.propose(searches[0], SPACE, CHEAP, lambda f: f.C, TARGET),
                sampler.best(searches[0], SPACE, TARGET),
            )
        )
    assert answers[0] == answers[1]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert before == after


def test_a_warm_started_fit_depends_on_nothing_but_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 40 runs on, most fits start at an earlier one. A new worker must still decide like one that has seen them.

    This holds also when one of the first runs ends late. Few fits start from scratch, which is the purpose.
    """
    from hpo.surrogate import fitting

    from_scratch, fit = [], fitting.fit_bowl_kernel

    def record(x: Any, z: Any, near: Any = None) -> Any:
        from_scratch.append(near is None)
        return fit(x, z, near)

    monkeypatch.setattr(fitting, "fit_bowl_kernel", record)
    rng, old = np.random.default_rng(5), MultiFidelitySampler(seed=3)
    study = optuna.create_study()
    for number in range(52):
        params = {"lr": math.exp(rng.uniform(-9, -4)), "batch": int(2 ** rng.uniform(5, 9))}
        add(study, params, CHEAP[number % 3], None if number == 20 else bowl(params, CHEAP[number % 3]))
        if number < 44:
            continue
        if number == 49:
            late = study.trials[20]
            study._storage.set_trial_state_values(
                late._trial_id, TrialState.COMPLETE, [bowl(late.params, CHEAP[20 % 3])]
            )
        proposed = old.propose(study, SPACE, CHEAP, lambda f: f.C, TARGET)
        own_fits = len(from_scratch)
        assert proposed == MultiFidelitySampler(seed=3).propose(study, SPACE, CHEAP, lambda f: f.C, TARGET)
        del from_scratch[own_fits:]
    # To the first 40 runs, to the first 48, and to these again when the late run has ended.
    assert from_scratch.count(True) == 3
    # All others, except the one where all runs are the first 48.
    assert from_scratch.count(False) == 7


def test_the_drift_is_followed_to_an_unseen_larger_target(searches: list[optuna.Study]) -> None:
    """The target has four times the parameters and tokens of any run.

    From the cheapest level to the target the optimum moves by a fifth of the cube.
    """
    lr, batch = optimum(TARGET)
    truth = {"lr": math.exp(lr), "batch": round(math.exp(batch))}
    floor = bowl(truth, TARGET)
    recommended, lowest = [], []
    for seed, study in enumerate(searches):
        answer = MultiFidelitySampler(seed=seed).best(study, SPACE, TARGET)
        assert distance(answer, truth) < 0.05
        recommended.append(bowl(answer, TARGET) - floor)
        # The settings of the run with the lowest loss, without a model.
        lowest.append(bowl(study.best_params, TARGET) - floor)
    assert max(recommended) < 0.001
    assert np.median(recommended) < 0.2 * np.median(lowest)


def test_cheap_runs_are_preferred_while_they_are_informative(searches: list[optuna.Study]) -> None:
    for study in searches:
        tokens = [t.user_attrs["tokens"] for t in study.trials]
        assert tokens.count(int(2e7)) > tokens.count(int(8e7)) > 0
        assert len({(t.user_attrs["N"], t.user_attrs["tokens"]) for t in study.trials}) > 1


def test_workers_that_ask_at_once_get_different_points(searches: list[optuna.Study]) -> None:
    study = optuna.create_study()
    study.add_trials(searches[1].trials)
    sampler, proposals = MultiFidelitySampler(seed=0), []
    for _ in range(4):
        params, slot = sampler.propose(study, SPACE, CHEAP, lambda f: f.C, TARGET)
        proposals.append((*Cube(SPACE).to_unit(params), CHEAP[slot].N, CHEAP[slot].D))
        add(study, params, CHEAP[slot], None)
    for i, one in enumerate(proposals):
        for other in proposals[:i]:
            same_level = one[2:] == other[2:]
            assert not same_level or np.abs(np.subtract(one[:2], other[:2])).max() > 0.01


@pytest.mark.parametrize("losses", [[2.0] * 7, [math.nan] * 7, [2.0, math.nan, math.nan, 1e30, 3.0, 2.5, math.inf]])
def test_odd_losses_do_not_stop_the_search(losses: list[float]) -> None:
    study, sampler = optuna.create_study(), MultiFidelitySampler(seed=0)
    for loss in losses:
        params, slot = sampler.propose(study, SPACE, CHEAP, lambda f: f.C, TARGET)
        add(study, params, CHEAP[slot], loss)
    params, _ = sampler.propose(study, SPACE, CHEAP, lambda f: f.C, TARGET)
    assert Cube(SPACE).contains(optuna.create_trial(params=params, distributions=SPACE, value=0.0))
    if not any(map(math.isfinite, losses)):
        with pytest.raises(ValueError, match="finite loss"):
            sampler.best(study, SPACE, TARGET)
    else:
        assert set(sampler.best(study, SPACE, TARGET)) == set(SPACE)


def test_regions_that_diverge_are_avoided() -> None:
    """The loss is a bowl around lr = 0.003, and everything above 0.01, a third of the range, diverges."""
    study, sampler, level = optuna.create_study(), MultiFidelitySampler(seed=0), Fidelity(1e6, 2e7)
    for _ in range(20):
        params, _ = sampler.propose(study, SPACE, [level], lambda f: f.C, level)
        loss = 2 + 0.1 * math.log(params["lr"] / 0.003) ** 2 + 0.01 * math.log(params["batch"] / 64) ** 2
        add(study, params, level, math.nan if params["lr"] > 0.01 else loss)
    assert sum(t.state == TrialState.FAIL for t in study.trials[8:]) <= 3
    assert 0.002 < sampler.best(study, SPACE, level)["lr"] < 0.0045


def test_best_before_there_is_a_model_is_the_best_at_the_highest_fidelity() -> None:
    study, sampler = optuna.create_study(), MultiFidelitySampler(seed=0)
    with pytest.raises(ValueError, match="finite loss"):
        sampler.best(study, SPACE, TARGET)
    add(study, {"lr": 0.001, "batch": 8}, CHEAP[0], 1.0)
    add(study, {"lr": 0.002, "batch": 9}, CHEAP[1], 3.0)
    add(study, {"lr": 0.003, "batch": 10}, CHEAP[1], 2.0)
    assert sampler.best(study, SPACE, TARGET) == pytest.approx({"lr": 0.003, "batch": 10})


def test_trials_of_another_space_are_left_out(searches: list[optuna.Study]) -> None:
    study = optuna.create_study()
    study.add_trials(searches[0].trials)
    before = MultiFidelitySampler(seed=0).best(study, SPACE, TARGET)
    study.add_trial(
        optuna.create_trial(
            params={"lr": 0.5, "batch": 8},
            distributions={"lr": FloatDistribution(1e-4, 1.0), "batch": SPACE["batch"]},
            value=-100.0,
        )
    )
    study.add_trial(optuna.create_trial(params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)}, value=-100.0))
    assert MultiFidelitySampler(seed=0).best(study, SPACE, TARGET) == before


def hill(trial: optuna.Trial) -> float:
    x, y = trial.suggest_float("x", -5, 5), trial.suggest_float("y", 1e-3, 1e1, log=True)
    return (x - 1.5) ** 2 + 2 * (math.log10(y) + 1) ** 2 + 0.3 * math.sin(3 * x)


@pytest.mark.slow
def test_in_a_plain_study_it_beats_random_sampling() -> None:
    def compute_median(make: Callable[[int], BaseSampler]) -> float:
        best = []
        for seed in range(5):
            study = optuna.create_study(sampler=make(seed))
            study.optimize(hill, n_trials=25)
            best.append(study.best_value)
        return float(np.median(best))

    grid = np.linspace(-5, 5, 20001)
    floor = float(((grid - 1.5) ** 2 + 0.3 * np.sin(3 * grid)).min())
    mfbo = compute_median(lambda seed: make_sampler("mfbo", seed=seed)) - floor
    at_random = compute_median(lambda seed: make_sampler("random", seed=seed)) - floor
    assert mfbo < 0.01
    assert mfbo < 0.1 * at_random


def test_maximising_is_minimising_the_negative() -> None:
    studies = []
    for sign, direction in ((1, StudyDirection.MINIMIZE), (-1, StudyDirection.MAXIMIZE)):
        study = optuna.create_study(direction=direction, sampler=MultiFidelitySampler(seed=4))
        study.optimize(lambda trial, sign=sign: sign * hill(trial), n_trials=9)  # type: ignore[misc]
        studies.append(study)
    assert [t.params for t in studies[0].trials] == [t.params for t in studies[1].trials]


def test_a_conditional_space_is_sampled() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["a", "b"]) == "a":
            return trial.suggest_float("x", 0, 1)
        return 1 + trial.suggest_int("n", 1, 5)

    study = optuna.create_study(sampler=MultiFidelitySampler(seed=0))
    study.optimize(objective, n_trials=15)
    kinds = [t.params["kind"] for t in study.trials]
    # "a" is always better.
    assert kinds[8:].count("a") > kinds[8:].count("b")


def test_a_study_with_every_kind_of_parameter_runs() -> None:
    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        width = trial.suggest_int("width", 16, 256, step=16)
        drop = trial.suggest_float("drop", 0.0, 0.5, step=0.25)
        name = trial.suggest_categorical("name", ["adam", "sgd", "muon"])
        return math.log10(lr / 1e-3) ** 2 + abs(width - 64) / 64 + drop + {"adam": 0.5, "sgd": 2.0, "muon": 0.0}[name]

    study = optuna.create_study(sampler=MultiFidelitySampler(seed=1))
    study.optimize(objective, n_trials=25)
    assert study.best_params["name"] == "muon"
    assert study.best_params["drop"] == 0.0


def test_two_directions_are_refused() -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    with pytest.raises(ValueError, match="2 directions"):
        MultiFidelitySampler(seed=0).propose(study, SPACE, CHEAP, lambda f: f.C, TARGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": []}, "at least one slot"),
        ({"space": {}}, "at least one parameter"),
        ({"cost": lambda f: 0.0}, "must be positive"),
        ({"cost": lambda f: math.inf}, "must be positive"),
    ],
)
def test_bad_input_is_refused_before_anything_is_spent(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"space": SPACE, "slots": CHEAP, "cost": lambda f: f.C, "target": TARGET, **change}
    with pytest.raises(ValueError, match=message):
        MultiFidelitySampler(seed=0).propose(optuna.create_study(), **call)


def test_samplers_are_created_by_name() -> None:
    assert isinstance(make_sampler("mfbo", seed=0), MultiFidelitySampler)
    assert isinstance(make_sampler("random", seed=0), optuna.samplers.RandomSampler)
    assert isinstance(make_sampler("qmc", seed=0), optuna.samplers.QMCSampler)
    with pytest.raises(ValueError, match="did you mean random"):
        make_sampler("rnadom", seed=0)
    with pytest.raises(ValueError, match="non-negative"):
        MultiFidelitySampler(seed=-1)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        MultiFidelitySampler(n_startup_trials=-1)


def test_importing_the_samplers_does_not_import_torch() -> None:
    code = (
        "import sys, hpo.samplers.multi_fidelity; "
        "print([m for m in ('torch', 'botorch', 'scipy.stats') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


class TestOptunasOwnContract(
    pytest_samplers.BasicSamplerTestCase,
    pytest_samplers.RelativeSamplerTestCase,
    pytest_samplers.SingleOnlySamplerTestCase,
):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        # As Optuna tests its own samplers with a model: no trial is left to the start-up.
        return lambda: MultiFidelitySampler(seed=0, n_startup_trials=0)


def test_without_start_up_the_model_is_used_from_the_first_loss() -> None:
    """One loss is enough for a model, which then leaves the Sobol sequence; no loss, or only NaN, is not."""
    proposals: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for startup, proposed in proposals.items():
        for losses in ([], [math.nan], [2.0]):
            study, sampler = optuna.create_study(), MultiFidelitySampler(seed=0, n_startup_trials=startup)
            for loss in losses:
                add(study, {"lr": 0.003, "batch": 64}, CHEAP[0], loss)
            proposed.append(sampler.propose(study, SPACE, CHEAP[:1], lambda f: f.C, CHEAP[0])[0])
    assert proposals[0][:2] == proposals[1][:2]
    assert proposals[1][1] == proposals[1][2] != proposals[0][2]
