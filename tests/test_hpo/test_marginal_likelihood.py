"""The log posterior of the hyperparameters and its analytic gradient against differences, GPyTorch and BoTorch."""

from __future__ import annotations

import math
from typing import Any

# First, because hpo.surrogate.gp silences a deprecation warning when it imports a dependency of BoTorch.
from hpo.surrogate.fitting import fit_bowl_kernel, fit_surrogate
from hpo.surrogate.gp import JITTER, build_botorch_model, condition_on_runs, join_inputs

# isort: split
import numpy as np
import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from gpytorch.mlls import ExactMarginalLogLikelihood

from hpo.surrogate.kernel import HYPERPARAMETERS, FidelityKernel, flatten_priors, make_priors, unpack_hyperparameters
from hpo.surrogate.marginal_likelihood import NegativeLogPosterior
from tests.test_hpo.synthetic import drifting_runs, flat, hyperparameters, points


def planted(rng: np.random.Generator, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor, NegativeLogPosterior]:
    x, z = points(rng, n, d), torch.from_numpy(rng.standard_normal(n))
    return x, z, NegativeLogPosterior(x.numpy(), z.numpy(), *flatten_priors(d), JITTER)


@pytest.mark.parametrize("flat_axes", [(), (0,), (1,), (0, 1)])
def test_gradient_of_the_log_posterior_is_its_slope(flat_axes: tuple[int, ...]) -> None:
    """It holds also if nothing varies along an axis, whose terms are then left out."""
    rng = np.random.default_rng(1)
    x, z, _ = planted(rng, 12, 2)
    for axis in flat_axes:
        x[:, 2 + axis] = 0.0
    posterior = NegativeLogPosterior(x.numpy(), z.numpy(), *flatten_priors(2), JITTER)
    p = hyperparameters(rng, 2)
    # This noise keeps the covariance well conditioned. A difference of values is exact to about eps times the condition
    # number over the step; with less noise the result depends on the BLAS of the processor.
    p["log_noise"] = p["log_noise"].clamp_min(-2.0)
    theta = flat(p)
    _, gradient = posterior(theta)
    for i in range(len(theta)):
        step = np.zeros(len(theta))
        step[i] = 1e-5
        slope = (posterior(theta + step)[0] - posterior(theta - step)[0]) / 2e-5
        assert gradient[i] == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_log_posterior_and_its_gradient_are_those_of_gpytorch(d: int) -> None:
    """GPyTorch's prior is on the noise variance v and ours on ln sd, so the densities differ by dv / d ln sd = 2 v."""
    rng = np.random.default_rng(2 + d)
    x, z, posterior = planted(rng, 15, d)
    differences = []
    for _ in range(3):
        p = hyperparameters(rng, d)
        # At this noise the jitter of the variance is negligible.
        p["log_noise"] = p["log_noise"].clamp_min(-5.0)
        variance = math.exp(2 * float(p["log_noise"]))
        value, gradient = posterior(flat(p))
        kernel = FidelityKernel(d, p)
        model = build_botorch_model(kernel, variance + JITTER, x, z).train()
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        gpytorch_value = mll(model(x), z) * len(x)
        gpytorch_value.backward()
        differences.append(value + float(gpytorch_value.detach()) + math.log(2 * variance))
        raw = model.likelihood.noise_covar.raw_noise.grad
        # The last term is the derivative of ln 2 v.
        noise = -2 * variance * raw.flatten() - 2
        slopes = torch.cat([*(getattr(kernel, n).grad.flatten() * -1 for n in HYPERPARAMETERS[:-1]), noise])
        np.testing.assert_allclose(gradient, slopes.numpy(), rtol=1e-3, atol=1e-3)
    # They all equal the constant of the priors.
    np.testing.assert_allclose(differences, differences[0], rtol=0, atol=2e-3)


def test_hyperparameters_of_an_axis_that_does_not_vary_have_no_effect() -> None:
    rng = np.random.default_rng(6)
    x, z, _ = planted(rng, 10, 2)
    # All runs are of one size.
    x[:, 3] = 0.0
    posterior = NegativeLogPosterior(x.numpy(), z.numpy(), *flatten_priors(2), JITTER)
    idle = {
        name: (~part.bool()).numpy().tolist()
        for name, part in unpack_hyperparameters(torch.from_numpy(posterior.is_free.astype(float)), 2).items()
    }
    assert idle["log_smooth"] == idle["log_rough"] == [False, True]
    assert idle["drift"] == [[False, False], [True, True]]
    assert not any(any(idle[name]) for name in ("log_fine", "log_bowl", "log_length", "log_noise"))
    theta = flat(hyperparameters(rng, 2))
    value, _ = posterior(theta)
    shifted = theta + ~posterior.is_free
    mean, sd = flatten_priors(2)
    by_prior = 0.5 * (((shifted - mean) / sd) ** 2 - ((theta - mean) / sd) ** 2).sum()
    assert posterior(shifted)[0] - value == pytest.approx(by_prior, abs=1e-9)


@pytest.mark.parametrize(("n", "rippled"), [(20, False), (60, True)])
def test_fit_is_at_least_as_good_as_that_of_botorch(n: int, rippled: bool) -> None:
    U, T, level, y = drifting_runs(0, n)
    fit = fit_surrogate(U, T, level, y + 0.1 * np.sin(9 * U[:, 0] + 4 * T[:, 0]) * rippled)
    best = fit.best
    other = build_botorch_model(FidelityKernel(2), 1e-4, best.x, best.z)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(other.likelihood, other), optimizer_kwargs={"options": {"maxiter": 60}})
    posterior = NegativeLogPosterior(best.x.numpy(), best.z.numpy(), *flatten_priors(2), JITTER)

    def value(kernel: FidelityKernel, noise: float) -> float:
        log_noise = torch.tensor([0.5 * math.log(noise - JITTER)], dtype=torch.float64)
        return posterior(flat({**kernel.values(), "log_noise": log_noise}))[0]

    fitted = value(best.kernel, best.noise)
    assert fitted <= value(other.covar_module, float(other.likelihood.noise.detach())) + 0.1
    # There is much to fit: the medians of the priors are far worse.
    if rippled:
        assert fitted < posterior(flat({name: mean for name, (mean, _) in make_priors(2).items()}))[0] - 5.0


def test_a_warm_started_fit_is_on_average_as_good_as_one_from_scratch() -> None:
    """Both may end in a mode of these noiseless losses that is not the best one."""
    worse, better = [], []
    for seed in range(8):
        U, T, _, y = drifting_runs(seed, 60)
        x, z = join_inputs(U, T), torch.from_numpy((y - y.mean()) / y.std())
        posterior = NegativeLogPosterior(x.numpy(), z.numpy(), *flatten_priors(2), JITTER)

        def value(kernel: Any, noise: float, posterior: NegativeLogPosterior = posterior) -> float:
            log_noise = torch.tensor([0.5 * math.log(noise - JITTER)], dtype=torch.float64)
            return posterior(flat({**kernel.values(), "log_noise": log_noise}))[0]

        fewer = next(fit_bowl_kernel(x[:50], z[:50]))
        warm_started = value(*next(fit_bowl_kernel(x, z, condition_on_runs(*fewer, x[:50], z[:50]))))
        worse.append(warm_started - value(*next(fit_bowl_kernel(x, z))))
        better.append(value(*fewer) - warm_started)
    assert np.mean(worse) < 0.5
    assert min(better) > 0.01
