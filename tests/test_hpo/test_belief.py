"""Beliefs: a power law, its place in the unit cube, and its effect on the surrogate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hpo import MultiFidelitySampler, Search
from hpo.samplers.belief import OptimumLaw, check_belief, locate_in_cube, make_belief, make_bowl_prior
from hpo.samplers.unit_cube import Cube
from hpo.surrogate.fitting import fit_surrogate
from hpo.surrogate.gp import BowlMean, join_inputs
from hpo.surrogate.inputs import compute_fidelity_coordinates
from scaling.fitting.lr_batch_law import fit_hp_law
from scaling.laws.compute import Fidelity

SPACE = {
    "kind": CategoricalDistribution(("a", "b", "c")),
    "lr": FloatDistribution(1e-4, 1.0, log=True),
    "batch": IntDistribution(1, 64, log=True),
    "momentum": FloatDistribution(0.0, 1.0),
}
LR = OptimumLaw(0.01, Fidelity(1e6, 1e8), exponent_N=-0.5, exponent_D=0.25)


def test_a_law_is_its_power_law() -> None:
    assert LR(Fidelity(1e6, 1e8)) == pytest.approx(0.01)
    assert LR(Fidelity(4e6, 16e8)) == pytest.approx(0.01 / 2 * 2)
    assert locate_in_cube({"lr": LR}, Cube(SPACE), Fidelity(1e6, 1e8)) == {"lr": pytest.approx(0.5)}


def test_the_bowl_has_its_bottom_where_the_law_says_at_every_fidelity() -> None:
    cube, target = Cube(SPACE), Fidelity(8e6, 1e9)
    levels = [Fidelity(n, d) for n in (1e6, 8e6) for d in (1e7, 1e8, 1e9)]
    belief: dict[str, OptimumLaw] = {"lr": LR, "batch": OptimumLaw(8.0, Fidelity(1e6, 1e8), 0.0, 0.5)}
    mean = BowlMean(make_bowl_prior(belief, cube, levels, target))
    for level, coordinates in zip(levels, compute_fidelity_coordinates(levels, target), strict=True):
        best: dict[str, Any] = {name: law(level) for name, law in belief.items()} | {"kind": "b", "momentum": 0.3}
        points = [best | {"lr": best["lr"] * factor} for factor in (1.0, 0.9, 1.1)]
        x = join_inputs(cube.encode(np.stack([cube.to_unit(p) for p in points])), coordinates)
        bottom, *others = mean(x).tolist()
        assert bottom == pytest.approx(0.0, abs=1e-12)
        assert min(others) > 1e-4


def test_the_surrogate_follows_the_belief_without_runs_and_the_data_with_them() -> None:
    cube = Cube({"lr": SPACE["lr"], "wd": FloatDistribution(1e-4, 1.0, log=True)})
    levels = [Fidelity(1e6, 1e7), Fidelity(1e6, 1e8)]
    rng = np.random.default_rng(0)
    u = rng.random((30, 2))
    level = rng.integers(0, 2, 30)
    coordinates = compute_fidelity_coordinates([levels[i] for i in level], levels[1])
    losses = 3.0 + 0.2 * (1 - level) + ((u - [0.8, 0.3]) ** 2).sum(1)
    wrong = make_bowl_prior({"lr": OptimumLaw(1e-3, levels[1])}, cube, levels, levels[1])
    grid = np.stack([np.linspace(0, 1, 101), np.full(101, 0.3)], axis=1)

    def optimum(n: int) -> float:
        fitted = fit_surrogate(u[:n], coordinates[:n], level[:n], losses[:n], bowl=wrong)
        return float(grid[np.argmin(fitted.predict(grid, np.zeros(2))[0]), 0])

    assert optimum(2) < 0.45, "after two runs the optimum is near the belief, 0.25"
    assert optimum(30) == pytest.approx(0.8, abs=0.03), "after thirty runs the belief has no influence"


def test_botorch_sees_the_same_mean() -> None:
    cube = Cube({"lr": SPACE["lr"]})
    levels = [Fidelity(1e6, 1e7), Fidelity(1e6, 1e8)]
    u, level = np.linspace(0, 1, 8)[:, None], np.arange(8) % 2
    coordinates = compute_fidelity_coordinates([levels[i] for i in level], levels[1])
    bowl = make_bowl_prior({"lr": OptimumLaw(1e-3, levels[1])}, cube, levels, levels[1])
    fitted = fit_surrogate(u, coordinates, level, (u[:, 0] - 0.5) ** 2, bowl=bowl)
    x = join_inputs(np.linspace(0, 1, 5)[:, None], np.zeros(2))
    mean = fitted.model.posterior(x).mean[:, 0].detach()
    assert mean.tolist() == pytest.approx(fitted.best.posterior(x)[0].tolist(), abs=1e-9)


def test_the_first_configuration_is_the_believed_one() -> None:
    search = Search(
        {"lr": SPACE["lr"], "momentum": SPACE["momentum"]}, tokens=(10**7, 9 * 10**7), sizes=(1e6,), belief={"lr": LR}
    )
    job = search.ask()
    assert job is not None
    assert job.params["lr"] == pytest.approx(LR(job.fidelity))


def test_a_fitted_law_is_a_belief() -> None:
    """The planted law is lr* = 0.01 (N / 1e7)^-0.3 (D / 1e9)^-0.2, batch* = 1e5 (D / 1e9)^0.5."""
    rng = np.random.default_rng(1)
    rows = [
        (n, d, lr, batch)
        for n in (1e6, 4e6, 16e6)
        for d in (1e8, 4e8, 16e8)
        for lr in 10.0 ** rng.uniform(-3.5, -0.5, 5)
        for batch in 10.0 ** rng.uniform(4, 6, 2)
    ]
    n, d, lr, batch = np.array(rows).T
    off_lr = np.log(lr / (0.01 * (n / 1e7) ** -0.3 * (d / 1e9) ** -0.2))
    off_batch = np.log(batch / (1e5 * (d / 1e9) ** 0.5))
    loss = (2 + 100 * n**-0.35 + 300 * d**-0.35) * np.exp(0.01 * off_lr**2 + 0.005 * off_batch**2)
    fit = fit_hp_law(pd.DataFrame({"N": n, "D": d, "lr": lr, "batch_tokens": batch, "loss": loss}))
    at = Fidelity(4e6, 4e8)
    belief = make_belief(fit, at, lr="lr", batch="batch_tokens")
    for name, i in (("lr", 0), ("batch_tokens", 1)):
        for f in (at, Fidelity(16e6, 16e8)):
            assert belief[name](f) == pytest.approx(float(fit.law(f.N, f.D)[i]), rel=1e-6)
    assert belief["lr"](Fidelity(1e7, 1e9)) == pytest.approx(0.01, rel=0.3)


def test_mistakes_are_refused_and_all_named() -> None:
    cube = Cube(SPACE)
    with pytest.raises(ValueError, match="width is not searched; momentum is not searched on a log scale"):
        check_belief({"width": LR, "momentum": LR, "lr": LR}, cube)
    with pytest.raises(ValueError, match="positive"):
        OptimumLaw(-1.0, Fidelity(1e6, 1e8))
    with pytest.raises(ValueError, match="exponents"):
        OptimumLaw(1.0, Fidelity(1e6, 1e8), exponent_D=math.nan)
    with pytest.raises(ValueError, match="lr is not searched"):
        Search({"momentum": SPACE["momentum"]}, tokens=(10**7, 9 * 10**7), belief={"lr": LR})
    with pytest.raises(ValueError, match="needs a model"):
        Search({"lr": SPACE["lr"]}, tokens=(10**7, 9 * 10**7), sampler="tpe", belief={"lr": LR})
    with pytest.raises(ValueError, match="by name"):
        Search({"lr": SPACE["lr"]}, tokens=(10**7, 9 * 10**7), sampler=MultiFidelitySampler(), belief={"lr": LR})
