"""The surrogate against plain restatements of its formulas, GPyTorch, BoTorch and Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable

from hpo import surrogate as s  # first: it imports BoTorch with a dependency's deprecation warning silenced

# isort: split
import numpy as np
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.mlls import ExactMarginalLogLikelihood
from numpy.typing import NDArray
from scipy.special import ndtri

from scaling.compute import Fidelity

Array = NDArray[np.float64]


class PlainCube:
    """Every point of the cube is real, nothing is a category."""

    def __init__(self, p: int) -> None:
        self.nominal = np.zeros(p, bool)

    def snap(self, cube: Array) -> Array:
        return cube

    def features(self, cube: Array) -> Array:
        return cube


def hyperparameters(rng: np.random.Generator, d: int) -> dict[str, torch.Tensor]:
    return {
        name: mean + sd * torch.from_numpy(rng.standard_normal(tuple(mean.shape)))
        for name, (mean, sd) in s.prior(d).items()
    }


def points(rng: np.random.Generator, n: int, d: int) -> torch.Tensor:
    """Random settings and fidelities; some beyond the target, some exactly at it."""
    fidelity = np.where(rng.random((n, 2)) < 0.3, 0.0, rng.uniform(-0.5, 1.0, (n, 2)))
    return s.join(rng.random((n, d)), fidelity)


def drifting(U: Array, T: Array) -> Array:
    """A loss whose optimum moves with both axes: (0.6, 0.4) at the target."""
    centre = np.array([0.6, 0.4]) + T @ np.array([[0.2, -0.15], [-0.1, 0.05]])
    return np.asarray(2.0 + 0.4 * T[:, 0] + 0.3 * T[:, 1] + ((U - centre) ** 2) @ np.array([1.0, 0.6]))


def drifting_runs(seed: int, n: int) -> tuple[Array, Array, NDArray[np.int64], Array]:
    rng = np.random.default_rng(seed)
    U = rng.random((n, 2))
    T = rng.choice([1.0, 0.75, 0.5], (n, 2))
    _, level = np.unique(T, axis=0, return_inverse=True)
    return U, T, level.astype(np.int64).ravel(), drifting(U, T)


def test_covariance_is_the_written_formula() -> None:
    rng = np.random.default_rng(0)
    d = 3
    p = hyperparameters(rng, d)
    a, b = points(rng, 6, d), points(rng, 5, d)
    got = s.covariance(p, a, b).numpy()
    q = {name: value.numpy() for name, value in p.items()}
    for i, x in enumerate(a.numpy()):
        for j, y in enumerate(b.numpy()):
            (u, t, z), (v, t2, z2) = (x[:d], x[d], x[d + 1]), (y[:d], y[d], y[d + 1])
            offset = 9 * (1 + t * t2 + 0.1 * t**2 * t2**2 + z * z2 + 0.1 * z**2 * z2**2)
            bowl = 0.0
            for cu, cv in zip(u - 0.5, v - 0.5, strict=True):
                bowl += (1 + t * t2 + z * z2) * cu * cv + 4 * cu**2 * cv**2
            r2 = 0.0
            for k in range(d):
                moved_u = u[k] - t * q["drift"][0, k] - z * q["drift"][1, k]
                moved_v = v[k] - t2 * q["drift"][0, k] - z2 * q["drift"][1, k]
                r2 += (moved_u - moved_v) ** 2 / math.exp(q["log_length"][k]) ** 2
            r = math.sqrt(r2)
            m52 = (1 + math.sqrt(5) * r + 5 * r2 / 3) * math.exp(-math.sqrt(5) * r)
            factor = 1.0
            for k, (f, g) in enumerate([(t, t2), (z, z2)]):
                brownian = min(abs(f), abs(g)) if f * g > 0 else 0.0
                factor += math.exp(q["log_smooth"][k]) ** 2 * (f * g + 0.3 * (f * g) ** 2)
                factor += math.exp(q["log_rough"][k]) ** 2 * brownian
            expected = offset + math.exp(q["log_bowl"][0]) ** 2 * bowl + math.exp(q["log_fine"][0]) ** 2 * m52 * factor
            assert got[i, j] == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("seed", range(8))
def test_covariance_is_positive_semi_definite(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = 1 + seed % 4
    x = points(rng, 60, d)
    k = s.covariance(hyperparameters(rng, d), x, x).numpy()
    np.testing.assert_allclose(k, k.T, rtol=0, atol=1e-10)
    eigenvalues = np.linalg.eigvalsh(k)
    assert eigenvalues.min() > -1e-10 * eigenvalues.max()


def test_kernel_gives_the_diagonal_and_batches() -> None:
    rng = np.random.default_rng(3)
    kernel = s.FidelityKernel(2)
    x, y = points(rng, 7, 2), points(rng, 7, 2)
    for other in (x, y):
        full = kernel(x, other).to_dense()
        torch.testing.assert_close(kernel(x, other, diag=True), full.diagonal(), rtol=1e-9, atol=1e-9)
        batched = kernel(torch.stack([x, y]), torch.stack([other, other])).to_dense()
        torch.testing.assert_close(batched[0], full)


def test_gradient_of_the_log_posterior_is_its_slope() -> None:
    rng = np.random.default_rng(1)
    x, z = points(rng, 12, 2), torch.from_numpy(rng.standard_normal(12))
    theta = torch.cat([v.flatten() for v in hyperparameters(rng, 2).values()]).numpy()
    _, gradient = s.negative_log_posterior(theta, x, z)
    for i in range(len(theta)):
        step = np.zeros(len(theta))
        step[i] = 1e-5
        slope = s.negative_log_posterior(theta + step, x, z)[0] - s.negative_log_posterior(theta - step, x, z)[0]
        assert gradient[i] == pytest.approx(slope / 2e-5, rel=1e-4, abs=1e-5)


def test_log_posterior_is_that_of_gpytorch() -> None:
    """GPyTorch's prior is on the noise variance v, ours on ln sd: the densities differ by dv / d ln sd = 2 v."""
    rng = np.random.default_rng(2)
    x, z = points(rng, 15, 2), torch.from_numpy(rng.standard_normal(15))
    differences = []
    for _ in range(3):
        p = hyperparameters(rng, 2)
        variance = math.exp(2 * float(p["log_noise"]))
        ours, _ = s.negative_log_posterior(torch.cat([v.flatten() for v in p.values()]).numpy(), x, z)
        model = s.botorch_model(p, x, z, variance + s.JITTER).train()
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        with torch.no_grad():
            theirs = float(mll(model(x), z)) * len(x) + math.log(2 * variance)
        differences.append(ours + theirs)
    np.testing.assert_allclose(differences, differences[0], rtol=0, atol=1e-3)  # the constant of the priors


def test_fit_is_at_least_as_good_as_that_of_botorch() -> None:
    U, T, level, y = drifting_runs(0, 20)
    fit = s.fit_surrogate(U, T, level, y)
    other = s.botorch_model({n: m for n, (m, _) in s.prior(2).items()}, fit.x, fit.z, 1e-4)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(other.likelihood, other), optimizer_kwargs={"options": {"maxiter": 60}})
    with torch.no_grad():
        noise = 0.5 * torch.log(other.likelihood.noise - s.JITTER).reshape(1)
        parts = {**other.covar_module.values(), "log_noise": noise}
        theirs = torch.cat([parts[n].flatten() for n in s.NAMES]).numpy()
    ours = torch.cat([fit.p[n].flatten() for n in s.NAMES]).numpy()
    assert s.negative_log_posterior(ours, fit.x, fit.z)[0] <= s.negative_log_posterior(theirs, fit.x, fit.z)[0] + 0.1


def test_predictions_are_those_of_the_botorch_model() -> None:
    U, T, level, y = drifting_runs(1, 25)
    fit = s.fit_surrogate(U, T, level, y)
    rng = np.random.default_rng(5)
    V, W = rng.random((8, 2)), rng.random((8, 2))
    posterior = fit.model.posterior(s.join(V, W))
    mean, sd = fit.predict(V, W)
    with torch.no_grad():
        np.testing.assert_allclose(mean, fit.offset + fit.scale * posterior.mean.squeeze(-1).numpy(), atol=1e-7)
        np.testing.assert_allclose(sd, fit.scale * posterior.variance.squeeze(-1).sqrt().numpy(), rtol=1e-3, atol=1e-6)
        joint = posterior.distribution.covariance_matrix.numpy() * fit.scale**2
    np.testing.assert_allclose(fit.posterior_covariance(V, W), joint, atol=1e-6)


def test_botorch_acquisitions_work_with_the_model() -> None:
    U, T, level, y = drifting_runs(2, 20)
    fit = s.fit_surrogate(U, T, level, y)
    x = s.join(np.array([[0.6, 0.4], [0.0, 1.0]]), np.zeros(2)).unsqueeze(1).requires_grad_()
    best = float(fit.z.min())
    analytic = LogExpectedImprovement(fit.model, best_f=best, maximize=False)(x)
    assert analytic[0] > analytic[1]
    assert torch.isfinite(torch.autograd.grad(analytic.sum(), x)[0]).all()
    sampled = qLogExpectedImprovement(fit.model, best_f=best, sampler=SobolQMCNormalSampler(torch.Size([64]), seed=0))
    assert torch.isfinite(sampled(x)).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_drift_is_recovered_and_the_target_within_its_interval(seed: int) -> None:
    """Runs at t, s >= 0.5 only; the optimum at the target is (0.6, 0.4), at t = s = 1 it is (0.7, 0.3)."""
    U, T, level, y = drifting_runs(seed, 25)
    fit = s.fit_surrogate(U, T, level, y)
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 41), np.linspace(0, 1, 41)), -1).reshape(-1, 2)
    mean, _ = fit.predict(grid, np.zeros(2))
    assert np.abs(grid[mean.argmin()] - [0.6, 0.4]).max() <= 0.0501
    near = np.array([[0.6, 0.4]])
    mean, sd = fit.predict(near, np.zeros(2))
    assert abs(mean[0] - 2.0) < 3 * sd[0] + 0.01


def test_standardise_compresses_only_the_tail() -> None:
    y, level = np.array([1.0, 1.5, 3.0, 2.0, 41.0, 5.0, 6.0]), np.array([0, 0, 0, 0, 0, 7, 7])
    z, offset, scale = s.standardise(y, level)
    c = 3 * 2.0  # upper quartile of 0.5, 1, 1, 2, 40
    expected = [1.0, 1.5, 3.0, 2.0, 1 + c * (1 + math.log(40 / c)), 5.0, 6.0]
    np.testing.assert_allclose(offset + scale * z, expected)
    assert offset == pytest.approx(np.mean(expected))
    low, high = np.array(expected[:5]), np.array(expected[5:])
    pooled = (((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum()) / (7 - 2)
    assert scale == pytest.approx(math.sqrt(pooled))


def test_a_search_that_has_settled_keeps_the_shape_of_what_it_saw_before() -> None:
    """Twenty runs within 0.01 of the best and fifteen of a bowl around it: the median is small, yet nothing is bent."""
    far = np.linspace(1.0, 3.0, 15) ** 2
    y = 2.0 + np.concatenate([np.linspace(0, 0.01, 20), far])
    z, offset, scale = s.standardise(y, np.zeros(35, np.int64))
    np.testing.assert_allclose(offset + scale * z, y)


def test_a_diverged_run_counts_as_the_worst_of_its_level() -> None:
    y = np.array([1.0, 2.0, math.nan, 5.0, 7.0, math.inf, math.nan])
    level = np.array([0, 0, 0, 1, 1, 1, 2])
    z, _, _ = s.standardise(y, level)
    assert z[2] == z[1]
    assert z[5] == z[4]
    assert z[6] >= z.max() - 1e-12  # nothing finite at its level: the worst of all
    with pytest.raises(ValueError, match="finite loss"):
        s.standardise(np.array([math.nan, math.inf]), np.array([0, 0]))


def test_fidelity_coordinates_of_a_hand_written_table() -> None:
    target = Fidelity(8e6, 1.6e8)
    levels = [Fidelity(8e6, 1.6e8), Fidelity(1e6, 1e7), Fidelity(2e6, 4e7), Fidelity(1.6e7, 3.2e8)]
    expected = [[0, 0], [1, 1], [0.5, 2 / 3], [-0.25, -1 / 3]]
    np.testing.assert_allclose(s.fidelity_coordinates(levels, target), expected, atol=1e-12)
    one_size = [Fidelity(5.0, 10.0), Fidelity(5.0, 1000.0)]
    np.testing.assert_allclose(s.fidelity_coordinates(one_size, one_size[1]), [[1, 0], [0, 0]], atol=1e-12)
    with pytest.raises(ValueError, match="positive"):
        s.fidelity_coordinates([Fidelity(0.0, 1.0)], target)


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: (rng.random((6, 2)), np.full(6, 3.0)),
        lambda rng: (rng.random((1, 2)), np.array([2.0])),
        lambda rng: (np.tile(rng.random((1, 2)), (5, 1)), np.array([1.0, 1.1, 0.9, math.nan, 1.0])),
        lambda rng: (rng.random((6, 2)), np.array([1e12, 1.0, 2.0, math.inf, 3.0, -5.0])),
    ],
    ids=["constant", "one run", "one point many times", "wild"],
)
def test_odd_data_give_a_finite_prediction(make: Callable[[np.random.Generator], tuple[Array, Array]]) -> None:
    U, y = make(np.random.default_rng(0))
    T = np.tile(np.array([[1.0, 0.0], [0.0, 0.0]]), (len(y), 1))[: len(y)]
    fit = s.fit_surrogate(U, T, (T[:, 0] > 0).astype(np.int64), y)
    mean, sd = fit.predict(np.random.default_rng(1).random((20, 2)), np.zeros(2))
    assert np.isfinite(mean).all()
    assert np.isfinite(sd).all()


def test_more_runs_than_the_fit_looks_at_are_still_conditioned_on() -> None:
    U, T, level, y = drifting_runs(3, s.FIT_ROWS + 51)
    fit = s.fit_surrogate(U, T, level, y, iterations=10)
    assert len(fit.x) == s.FIT_ROWS + 51
    mean, _ = fit.predict(U, T)
    assert np.abs(mean - (fit.offset + fit.scale * fit.z.numpy())).max() < 0.02


def test_pending_runs_keep_the_mean_and_lower_the_doubt() -> None:
    U, T, level, y = drifting_runs(4, 15)
    fit = s.fit_surrogate(U, T, level, y)
    there, at = np.array([[0.3, 0.8]]), np.array([[0.5, 0.5]])
    told = fit.with_pending(there, at)
    V = np.random.default_rng(0).random((10, 2))
    np.testing.assert_allclose(told.predict(V, np.zeros(2))[0], fit.predict(V, np.zeros(2))[0], atol=1e-6)
    assert told.predict(there, at)[1][0] < 0.2 * fit.predict(there, at)[1][0]
    assert (told.predict(V, np.zeros(2))[1] <= fit.predict(V, np.zeros(2))[1] + 1e-9).all()
    assert fit.with_pending(np.empty((0, 2)), np.empty((0, 2))) is fit


def test_knowledge_gradient_is_what_simulated_runs_gain() -> None:
    """The closed form against conditioning afresh on each of the nine outcomes, and on two hundred."""
    U, T, level, y = drifting_runs(5, 8)
    fit = s.fit_surrogate(U, T, level, y)
    rng = np.random.default_rng(0)
    anchors = s.join(rng.random((40, 2)), np.zeros(2))
    x = s.join(np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.0, 0.0], [1.0, 0.5]]))
    closed = s.knowledge_gradient(fit, anchors)(x)
    before, _, _ = fit.posterior(anchors)
    mean, variance, _ = fit.posterior(x)

    def gain(i: int, draw: float) -> float:
        outcome = mean[i] + math.sqrt(float(variance[i]) + fit.noise) * draw
        told = s.condition(fit.p, torch.cat([fit.x, x[i : i + 1]]), torch.cat([fit.z, outcome.reshape(1)]), 0.0, 1.0)
        return float(before.min() - told.posterior(anchors)[0].min())

    for i in range(2):
        assert closed[i] == pytest.approx(np.mean([gain(i, float(q)) for q in s.QUANTILES]), rel=1e-4, abs=1e-6)
    for i in range(2):
        fine = np.mean([gain(i, float(q)) for q in ndtri((np.arange(201) + 0.5) / 201)])
        assert closed[i] == pytest.approx(fine, rel=0.3)


def test_the_safeguard_runs_the_recommendation_at_the_top() -> None:
    U, T, level, y = drifting_runs(6, 20)
    fit, cube = s.fit_surrogate(U, T, level, y), PlainCube(2)
    slots, costs = np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([0.01, 1.0])
    kwargs = {"seed": [0, 1]}
    _, free = s.suggest(fit, cube, U, slots, costs, top=1, spent=(0.1, 0.1), **kwargs)
    point, forced = s.suggest(fit, cube, U, slots, costs, top=1, spent=(5.0, 5.0), **kwargs)
    _, not_offered = s.suggest(fit, cube, U, slots[:1], costs[:1], top=None, spent=(5.0, 5.0), **kwargs)
    assert (free, forced, not_offered) == (0, 1, 0)
    np.testing.assert_array_equal(point, s.recommend(fit, cube, U, [0, 1, 1]))
    # Once it is running there, the next worker gets another point.
    told = fit.with_pending(point[None], np.zeros((1, 2)))
    again, slot = s.suggest(told, cube, np.vstack([U, point]), slots, costs, top=1, spent=(5.0, 6.0), **kwargs)
    assert slot == 1
    assert np.abs(again - point).max() > 1e-6


def test_a_level_that_says_nothing_about_the_target_is_not_bought() -> None:
    """The same runs under two beliefs: low fidelities faithful, or their roughness (and no bowl) drowning the rest."""
    U = np.random.default_rng(8).random((10, 2))
    T = np.tile(np.array([[1.0, 0.0], [0.0, 0.0]]), (5, 1))
    fit = s.fit_surrogate(U, T, (T[:, 0] > 0).astype(np.int64), ((U - 0.4) ** 2).sum(1) + T[:, 0])
    slots, costs = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([0.1, 1.0])
    chosen = []
    for log_rough in (-6.0, 4.0):
        p = {name: mean.clone() for name, (mean, _) in s.prior(2).items()}
        p["log_bowl"], p["log_smooth"], p["log_rough"] = (
            torch.full_like(v, x)
            for v, x in ((p["log_bowl"], -6.0), (p["log_smooth"], -6.0), (p["log_rough"], log_rough))
        )
        believed = s.condition(p, fit.x, fit.z, fit.offset, fit.scale)
        chosen.append(s.suggest(believed, PlainCube(2), U, slots, costs, top=1, spent=(0.0, 0.0), seed=[1])[1])
    assert chosen == [0, 1]


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needed U \[n, d\]"):
        s.fit_surrogate(np.zeros((3, 2)), np.zeros((3, 1)), np.zeros(3, np.int64), np.zeros(3))


def test_nothing_draws_from_global_generators() -> None:
    U, T, level, y = drifting_runs(7, 12)
    before = (torch.get_rng_state().clone(), np.random.get_state()[1].copy())  # type: ignore[union-attr, index]
    fit = s.fit_surrogate(U, T, level, y)
    s.suggest(fit, PlainCube(2), U, np.zeros((1, 2)), np.ones(1), top=0, spent=(0.0, 1.0), seed=[0])
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
