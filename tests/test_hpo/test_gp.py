"""The surrogate against GPyTorch, BoTorch, sampling, and direct implementations of its formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# First, because hpo.surrogate.gp silences a deprecation warning when it imports a dependency of BoTorch.
from hpo.surrogate.fitting import FIT_ROWS, LAPLACE_DRAWS, draw_laplace_samples, fit_bowl_kernel, fit_surrogate
from hpo.surrogate.gp import JITTER, Surrogate, condition_on_runs, join_inputs
from hpo.surrogate.inputs import TAIL_START, compute_fidelity_coordinates, standardise

# isort: split
import numpy as np
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.sampling import SobolQMCNormalSampler
from numpy.typing import NDArray
from scipy.special import ndtri

from hpo.surrogate.kernel import compute_covariance, flatten_priors
from hpo.surrogate.marginal_likelihood import NegativeLogPosterior
from scaling.laws.compute import Fidelity
from tests.test_hpo.synthetic import drifting_runs, flat, hyperparameters

Array = NDArray[np.float64]

# Losses and fidelities as inputs of the model.


def test_standardise_compresses_only_the_tail() -> None:
    # 2 is the upper quartile of c / 4, c / 2, c / 2, 2 and 20 c.
    c = TAIL_START * 2.0
    assert np.quantile([c / 4, c / 2, c / 2, 2.0, 20 * c], 0.75) == 2.0
    y, level = 1 + np.array([0, c / 4, 2.0, c / 2, 20 * c, 4.0, 4.0 + c / 2]), np.array([0, 0, 0, 0, 0, 7, 7])
    z, offset, scale = standardise(y, level)
    expected = y.copy()
    expected[4] = 1 + c * (1 + math.log(20))
    np.testing.assert_allclose(offset + scale * z, expected)
    assert offset == pytest.approx(np.mean(expected))
    low, high = expected[:5], expected[5:]
    pooled = (((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum()) / (7 - 2)
    assert scale == pytest.approx(math.sqrt(pooled))


def test_a_search_that_has_settled_keeps_the_shape_of_its_earlier_losses() -> None:
    """Twenty runs are within 0.01 of the best, and fifteen on a bowl around it. The median would compress all."""
    far = np.linspace(1.0, 3.0, 15) ** 2
    z, offset, scale = standardise(2.0 + np.concatenate([np.linspace(0, 0.01, 20), far]), np.zeros(35, np.int64))
    compressed = offset + scale * z - 2.0
    np.testing.assert_allclose(compressed[:26], np.append(np.linspace(0, 0.01, 20), far[:6]), atol=1e-12)
    assert (np.diff(compressed[20:]) > 0.3 * np.diff(far)).all()


def test_a_diverged_run_counts_as_the_worst_of_its_level() -> None:
    y = np.array([1.0, 2.0, math.nan, 5.0, 7.0, math.inf, math.nan])
    level = np.array([0, 0, 0, 1, 1, 1, 2])
    z, _, _ = standardise(y, level)
    assert z[2] == z[1]
    assert z[5] == z[4]
    # Its level has no finite loss, so it counts as the worst of all levels.
    assert z[6] >= z.max() - 1e-12
    with pytest.raises(ValueError, match="finite loss"):
        standardise(np.array([math.nan, math.inf]), np.array([0, 0]))


def test_fidelity_coordinates_of_a_hand_written_table() -> None:
    target = Fidelity(8e6, 1.6e8)
    levels = [Fidelity(8e6, 1.6e8), Fidelity(1e6, 1e7), Fidelity(2e6, 4e7), Fidelity(1.6e7, 3.2e8)]
    expected = np.array([[0, 0], [1, 1], [0.5, 2 / 3], [-0.25, -1 / 3]])
    np.testing.assert_allclose(compute_fidelity_coordinates(levels, target), expected, atol=1e-12)
    one_size = [Fidelity(5.0, 10.0), Fidelity(5.0, 1000.0)]
    np.testing.assert_allclose(compute_fidelity_coordinates(one_size, one_size[1]), [[1, 0], [0, 0]], atol=1e-12)
    with pytest.raises(ValueError, match="positive"):
        compute_fidelity_coordinates([Fidelity(0.0, 1.0)], target)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needed U \[n, d\]"):
        fit_surrogate(np.zeros((3, 2)), np.zeros((3, 1)), np.zeros(3, np.int64), np.zeros(3))


# One member.


def test_predictions_are_those_of_the_botorch_model() -> None:
    U, T, level, y = drifting_runs(1, 25)
    whole = fit_surrogate(U, T, level, y)
    fit = Surrogate(whole.best, whole.offset, whole.scale)
    rng = np.random.default_rng(5)
    V, W = rng.random((8, 2)), rng.random((8, 2))
    posterior = fit.model.posterior(join_inputs(V, W))
    mean, sd = fit.predict(V, W)
    with torch.no_grad():
        np.testing.assert_allclose(mean, fit.offset + fit.scale * posterior.mean.squeeze(-1).numpy(), atol=1e-7)
        np.testing.assert_allclose(sd, fit.scale * posterior.variance.squeeze(-1).sqrt().numpy(), rtol=1e-3, atol=1e-6)
        joint = posterior.distribution.covariance_matrix.numpy() * fit.scale**2
    np.testing.assert_allclose(fit.posterior_covariance(V, W), joint, atol=1e-6)


def test_botorch_acquisitions_work_with_the_model() -> None:
    U, T, level, y = drifting_runs(2, 20)
    fit = fit_surrogate(U, T, level, y)
    x = join_inputs(np.array([[0.6, 0.4], [0.0, 1.0]]), np.zeros(2)).unsqueeze(1).requires_grad_()
    best = float(fit.best.z.min())
    analytic = LogExpectedImprovement(fit.model, best_f=best, maximize=False)(x)
    assert analytic[0] > analytic[1]
    assert torch.isfinite(torch.autograd.grad(analytic.sum(), x)[0]).all()
    sampled = qLogExpectedImprovement(fit.model, best_f=best, sampler=SobolQMCNormalSampler(torch.Size([64]), seed=0))
    assert torch.isfinite(sampled(x)).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_drift_is_recovered_and_the_target_within_its_interval(seed: int) -> None:
    """The runs are at t, s >= 0.5. The optimum is (0.6, 0.4) at the target and (0.7, 0.3) at t = s = 1."""
    U, T, level, y = drifting_runs(seed, 25)
    fit = fit_surrogate(U, T, level, y)
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 41), np.linspace(0, 1, 41)), -1).reshape(-1, 2)
    mean, _ = fit.predict(grid, np.zeros(2))
    assert np.abs(grid[mean.argmin()] - [0.6, 0.4]).max() <= 0.0501
    near = np.array([[0.6, 0.4]])
    mean, sd = fit.predict(near, np.zeros(2))
    assert abs(mean[0] - 2.0) < 3 * sd[0] + 0.01


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
    fit = fit_surrogate(U, T, (T[:, 0] > 0).astype(np.int64), y)
    mean, sd = fit.predict(np.random.default_rng(1).random((20, 2)), np.zeros(2))
    assert np.isfinite(mean).all()
    assert np.isfinite(sd).all()


def test_all_runs_are_conditioned_on_when_there_are_more_than_the_fit_uses() -> None:
    U, T, level, y = drifting_runs(3, FIT_ROWS + 51)
    rows = []

    def fitter(x: torch.Tensor, z: torch.Tensor) -> list[tuple[Any, float]]:
        rows.append(len(x))
        return list(fit_bowl_kernel(x[:30], z[:30]))

    fit = fit_surrogate(U, T, level, y, fitter=fitter)
    assert rows == [FIT_ROWS]
    assert len(fit.x) == FIT_ROWS + 51
    mean, _ = fit.predict(U, T)
    assert np.abs(mean - (fit.offset + fit.scale * fit.best.z.numpy())).max() < 0.02


def test_pending_runs_keep_the_mean_and_lower_the_variance() -> None:
    U, T, level, y = drifting_runs(4, 15)
    fit = fit_surrogate(U, T, level, y)
    point, coordinates = np.array([[0.3, 0.8]]), np.array([[0.5, 0.5]])
    updated = fit.with_pending(point, coordinates)
    V = np.random.default_rng(0).random((10, 2))
    np.testing.assert_allclose(updated.predict(V, np.zeros(2))[0], fit.predict(V, np.zeros(2))[0], atol=1e-6)
    assert (updated.predict(V, np.zeros(2))[1] <= fit.predict(V, np.zeros(2))[1] + 1e-9).all()
    for before, after in zip(fit.members, updated.members, strict=True):
        v, w = (float(member.posterior(join_inputs(point, coordinates))[1]) for member in (before, after))
        assert w == pytest.approx(v * before.noise / (v + before.noise), rel=1e-3, abs=1e-7)
    assert fit.with_pending(np.empty((0, 2)), np.empty((0, 2))) is fit


# The ensemble.


def test_the_ensemble_is_the_mixture_of_its_members() -> None:
    """Mean, variance and covariance agree with draws: of a member, then from it."""
    U, T, level, y = drifting_runs(1, 7)
    fit = fit_surrogate(U, T, level, y)
    assert len(fit.members) == 1 + LAPLACE_DRAWS
    V = np.array([[0.2, 0.9], [0.6, 0.4], [0.61, 0.42], [0.9, 0.1]])
    rng = np.random.default_rng(0)
    drawn = []
    for member in fit.members:
        x = join_inputs(V, np.zeros(2))
        middle, _, v = member.posterior(x)
        root = np.linalg.cholesky(member.covariance(x, v, x, v).numpy() + 1e-10 * np.eye(len(V)))
        drawn.append(middle.numpy() + rng.standard_normal((40_000, len(V))) @ root.T)
    losses = fit.offset + fit.scale * np.vstack(drawn)
    mean, sd = fit.predict(V, np.zeros(2))
    np.testing.assert_allclose(mean, losses.mean(0), rtol=0, atol=0.02 * sd.max())
    np.testing.assert_allclose(sd, losses.std(0), rtol=0.03)
    joint = fit.posterior_covariance(V, np.zeros(2))
    np.testing.assert_allclose(joint, np.cov(losses.T), rtol=0, atol=0.03 * joint.max())
    np.testing.assert_allclose(np.sqrt(joint.diagonal()), sd, rtol=1e-6)


def test_draws_of_hyperparameters_stay_within_the_bounds_and_are_reproducible() -> None:
    U, T, level, y = drifting_runs(2, 10)
    fits = [fit_surrogate(U, T, level, y) for _ in range(2)]
    mean, sd = flatten_priors(2)
    distinct = set()
    for one, other in zip(fits[0].members, fits[1].members, strict=True):
        log_noise = torch.tensor([0.5 * math.log(one.noise - JITTER)], dtype=torch.float64)
        theta = flat({**one.kernel.values(), "log_noise": log_noise})
        assert (np.abs(theta - mean) <= 3 * sd + 1e-9).all()
        assert theta.tobytes() == flat({**other.kernel.values(), "log_noise": log_noise}).tobytes()
        assert torch.equal(one.alpha, other.alpha)
        distinct.add(theta.tobytes())
    assert len(distinct) == 1 + LAPLACE_DRAWS


class Normal:
    """A normal posterior with a known precision in units of the prior's sd; the last hyperparameter has no effect."""

    def __init__(self, best: Array, sd: Array, precision: Array) -> None:
        self.best, self.sd, self.precision = best, sd, precision
        self.is_free = np.append(np.ones(len(precision), bool), False)

    def __call__(self, theta: Array) -> tuple[float, Array]:
        deviation = (theta - self.best)[:-1] / self.sd[:-1]
        gradient = np.append(self.precision @ deviation / self.sd[:-1], 0.0)
        return 3.0 + 0.5 * float(deviation @ self.precision @ deviation), gradient


def test_draws_have_the_spread_of_a_normal_posterior_but_never_more_than_the_prior() -> None:
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    # The last one is below the prior's 1, as if the optimizer had stopped short of the maximum.
    curvature = np.array([100.0, 9.0, 1.0, 0.2])
    best, sd = np.arange(5.0), np.array([1.0, 0.5, 2.0, 1.0, 0.3])
    posterior = Normal(best, sd, rotation @ np.diag(curvature) @ rotation.T)
    drawn = np.array(draw_laplace_samples(posterior, best, sd, 1024))  # type: ignore[arg-type]
    assert (drawn[:, -1] == best[-1]).all()
    along = ((drawn - best) / sd)[:, :-1] @ rotation
    np.testing.assert_allclose(np.median(along, axis=0), 0.0, atol=0.03)
    quartiles = np.quantile(along, [0.25, 0.75], axis=0)
    expected = float(ndtri(0.75)) / np.sqrt(np.maximum(curvature, 1.0))
    np.testing.assert_allclose(quartiles[1] - quartiles[0], 2 * expected, rtol=0.06)
    beyond = np.array([posterior(theta)[0] - 3.0 for theta in drawn])
    assert beyond.max() < 0.5 * 4 + 3


def draw_from_prior(seed: int, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a loss from the model itself at the target: n + 30 inputs, the values there, and n noisy values."""
    rng = np.random.default_rng(seed)
    p = hyperparameters(rng, d)
    x = join_inputs(rng.random((n + 30, d)), np.zeros(2))
    root = torch.linalg.cholesky(compute_covariance(p, x, x) + 1e-9 * torch.eye(len(x), dtype=x.dtype))
    f = root @ torch.from_numpy(rng.standard_normal(len(x)))
    return x, f, f[:n] + math.exp(float(p["log_noise"])) * torch.from_numpy(rng.standard_normal(n))


@pytest.mark.parametrize("seed", range(3))
def test_draws_have_the_spread_of_the_posterior_itself(seed: int) -> None:
    """The moments are computed by importance sampling from a wider distribution of five hyperparameters."""
    x, _, z = draw_from_prior(seed, 25, 1)
    kernel, noise = next(fit_bowl_kernel(x[:25], z))
    log_noise = torch.tensor([0.5 * math.log(noise - JITTER)], dtype=torch.float64)
    best = flat({**kernel.values(), "log_noise": log_noise})
    mean, sd = flatten_priors(1)
    posterior = NegativeLogPosterior(x[:25].numpy(), z.numpy(), mean, sd, JITTER)
    free = np.flatnonzero(posterior.is_free)
    drawn: Array = np.array(draw_laplace_samples(posterior, best, sd, 64))[:, free]

    rng = np.random.default_rng(0)
    root = 1.3 * np.linalg.cholesky(np.cov(drawn.T))
    normal, chi2 = rng.standard_normal((2500, len(free))), rng.chisquare(8, 2500) / 8
    variates = normal / np.sqrt(chi2)[:, None]
    theta = np.tile(best, (2500, 1))
    theta[:, free] += variates @ root.T
    log_proposal = -0.5 * (8 + len(free)) * np.log1p((variates**2).sum(1) / 8)
    log_weight = np.array([-posterior(row)[0] for row in theta]) - log_proposal
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    # The number of effective draws.
    assert 1 / (weight**2).sum() > 300
    true_mean = weight @ theta[:, free]
    true_sd = np.sqrt(weight @ (theta[:, free] - true_mean) ** 2)
    assert (np.abs(drawn.mean(0) - true_mean) < 0.5 * true_sd).all()
    ratio = drawn.std(0) / true_sd
    assert (ratio > 0.6).all()
    assert (ratio < 1.35).all()


def test_with_few_runs_the_ensemble_covers_better_than_its_best_member() -> None:
    """Fifty losses are drawn from the model, with eight runs each: coverage of a 90 % interval, and the log score."""
    inside, score = np.zeros(2), np.zeros(2)
    for seed in range(50):
        x, f, z = draw_from_prior(seed, 8, 2)
        members = tuple(condition_on_runs(kernel, noise, x[:8], z) for kernel, noise in fit_bowl_kernel(x[:8], z))
        best, others = members[0], members[1:]
        for i, fit in enumerate((Surrogate(best, 0.0, 1.0), Surrogate(best, 0.0, 1.0, lambda kept=others: kept))):
            mean, variance = fit.posterior(x[8:])
            residual = ((f[8:] - mean) / variance.sqrt()).numpy()
            inside[i] += (np.abs(residual) < ndtri(0.95)).mean() / 50
            score[i] += float((-0.5 * residual**2 - 0.5 * np.log(variance.numpy())).mean()) / 50
    assert inside[0] + 0.04 < inside[1] < 0.95
    assert inside[1] > 0.78
    assert score[1] > score[0] + 0.2
