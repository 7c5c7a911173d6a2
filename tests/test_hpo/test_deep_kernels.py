"""The alternative surrogates: independent checks of their covariances, their fits, and one contract for all three."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

# First, because hpo.surrogate.gp silences a deprecation warning when it imports a dependency of BoTorch.
from hpo.surrogate.fitting import fit_bowl_kernel, fit_surrogate
from hpo.surrogate.gp import Surrogate, join_inputs
from hpo.surrogate.inputs import standardise

# isort: split
import numpy as np
import optuna
import pytest
import torch
from gpytorch.kernels import MaternKernel
from linear_operator.utils.errors import NotPSDError
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from scipy.stats import multivariate_normal, norm

from hpo import Search
from hpo.samplers.multi_fidelity import MultiFidelitySampler
from hpo.samplers.names import MODEL_SAMPLERS, SAMPLERS
from hpo.samplers.registry import make_sampler
from hpo.samplers.unit_cube import Cube
from hpo.surrogate import deep_kernels
from hpo.surrogate.kernel import FidelityKernel, make_priors
from scaling.laws.compute import Fidelity

optuna.logging.set_verbosity(optuna.logging.WARNING)

Array = NDArray[np.float64]
Make = Callable[[int], Any]

FITTERS = {"bowl": fit_bowl_kernel, "deep": deep_kernels.fit_deep_kernels, "nngp": deep_kernels.fit_nngp_kernel}
KERNELS: dict[str, Make] = {"deep": lambda d: deep_kernels.DeepKernel(d, 0), "nngp": deep_kernels.InfiniteWidthKernel}

every_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
every_surrogate = pytest.mark.parametrize("surrogate", FITTERS)


def inputs(rng: np.random.Generator, n: int, d: int) -> torch.Tensor:
    """Draw random settings and fidelities, some beyond the target and some exactly at it."""
    fidelity = np.where(rng.random((n, 2)) < 0.3, 0.0, rng.uniform(-0.5, 1.0, (n, 2)))
    return join_inputs(rng.random((n, d)), fidelity)


def randomise(kernel: Any, rng: np.random.Generator) -> Any:
    """Draw all parameters of a kernel from their priors."""
    with torch.no_grad():
        for name, parameter in kernel.named_parameters():
            prior = getattr(kernel, f"{name}_prior")
            draw = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
            parameter.copy_(prior.loc + prior.scale * draw.clamp(-3, 3))
    return kernel


def bowl_loss(U: Array, T: Array) -> Array:
    """Return a loss whose optimum moves with tokens and size; it is (0.6, 0.4) at the target."""
    centre = np.array([0.6, 0.4]) + T @ np.array([[0.2, -0.15], [-0.1, 0.05]])
    return np.asarray(2.0 + 0.4 * T[:, 0] + 0.3 * T[:, 1] + ((U - centre) ** 2) @ np.array([1.0, 0.6]))


def bowl_runs(seed: int, n: int) -> tuple[Array, Array, NDArray[np.int64], Array]:
    rng = np.random.default_rng(seed)
    U, T = rng.random((n, 2)), rng.choice([1.0, 0.5, 0.0], (n, 2))
    _, level = np.unique(T, axis=0, return_inverse=True)
    return U, T, level.astype(np.int64).ravel(), bowl_loss(U, T)


# Covariances.


def test_level_offset_is_that_of_the_default() -> None:
    rng = np.random.default_rng(0)
    a, b = inputs(rng, 6, 3), inputs(rng, 5, 3)
    default = FidelityKernel(3)
    with torch.no_grad():
        default.log_fine.fill_(-40.0)
        default.log_bowl.fill_(-40.0)
        torch.testing.assert_close(
            deep_kernels.compute_level_offset(a, b), default.forward(a, b), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_infinite_width_kernel_is_the_expectation_over_random_units(depth: int) -> None:
    """Each layer is an integral, over the angle of two correlated normals, of the product of their positive parts."""
    rng = np.random.default_rng(depth)
    kernel = randomise(deep_kernels.InfiniteWidthKernel(2, depth), rng)
    x = inputs(rng, 5, 2)
    angle = np.linspace(0, 2 * math.pi, 100_000, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)])

    def layer(k: Array) -> Array:
        """Return 2 E[relu(f) relu(g)] for normal (f, g) with each pair's covariance; the radius integrates to 2."""
        out = np.empty_like(k)
        for i in range(len(k)):
            for j in range(len(k)):
                correlation = k[i, j] / math.sqrt(k[i, i] * k[j, j])
                f = math.sqrt(k[i, i]) * circle[0]
                g = math.sqrt(k[j, j]) * (correlation * circle[0] + math.sqrt(max(0.0, 1 - correlation**2)) * circle[1])
                out[i, j] = 2 * 2 * (np.maximum(f, 0) * np.maximum(g, 0)).mean()
        return out

    scale, bias, weight = (np.exp(getattr(kernel, n).detach().numpy()) for n in ("log_input", "log_bias", "log_weight"))
    c = (x.numpy() - np.array([0.5, 0.5, 0.0, 0.0])) * scale
    k = c @ c.T
    for index in range(depth):
        k = weight[index] ** 2 * layer(k + bias[index] ** 2)
    with torch.no_grad():
        covariance = kernel.forward(x, x) - deep_kernels.compute_level_offset(x, x)
    np.testing.assert_allclose(covariance.numpy(), k, rtol=1e-6)


def test_a_deep_kernel_whose_network_is_zero_is_an_ordinary_matern_kernel() -> None:
    rng = np.random.default_rng(1)
    kernel = randomise(deep_kernels.DeepKernel(3, 0), rng)
    a, b = inputs(rng, 6, 3), inputs(rng, 5, 3)
    plain = MaternKernel(nu=2.5, ard_num_dims=5).double()
    with torch.no_grad():
        kernel.V.zero_()
        plain.lengthscale = torch.exp(kernel.log_length)
        expected = torch.exp(2 * kernel.log_scale) * plain(a, b).to_dense()
        covariance = kernel.forward(a, b) - deep_kernels.compute_level_offset(a, b)
    torch.testing.assert_close(covariance, expected, rtol=1e-6, atol=1e-6)


def test_a_deep_kernel_compares_the_points_that_its_network_has_moved() -> None:
    rng = np.random.default_rng(2)
    kernel = randomise(deep_kernels.DeepKernel(2, 0), rng)
    x = inputs(rng, 4, 2)
    p = {name: value.detach().numpy() for name, value in kernel.named_parameters()}
    with torch.no_grad():
        covariance = (kernel.forward(x, x) - deep_kernels.compute_level_offset(x, x)).numpy()

    def move(row: Array) -> Array:
        c = row - np.array([0.5, 0.5, 0.0, 0.0])
        hidden = [
            math.tanh(sum(w * v for w, v in zip(unit, c, strict=True)) + b)
            for unit, b in zip(p["W"], p["b"], strict=True)
        ]
        return np.array([(c[i] + p["V"][i] @ hidden) / math.exp(p["log_length"][i]) for i in range(4)])

    for i in range(4):
        for j in range(i):
            r = math.dist(move(x.numpy()[i]), move(x.numpy()[j]))
            m52 = (1 + math.sqrt(5) * r + 5 * r * r / 3) * math.exp(-math.sqrt(5) * r)
            assert covariance[i, j] == pytest.approx(math.exp(2 * p["log_scale"][0]) * m52, rel=1e-8, abs=1e-10)


@every_kernel
@pytest.mark.parametrize("seed", range(6))
def test_covariance_is_positive_semi_definite(make: Make, seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = 1 + seed % 3
    x = inputs(rng, 50, d)
    # Runs may be repeated.
    x = torch.cat([x, x[:5]])
    with torch.no_grad():
        k = randomise(make(d), rng).forward(x, x).numpy()
    np.testing.assert_allclose(k, k.T, rtol=1e-10)
    eigenvalues = np.linalg.eigvalsh(k)
    assert eigenvalues.min() > -1e-9 * eigenvalues.max()


@every_kernel
def test_kernel_gives_the_diagonal_and_batches(make: Make) -> None:
    rng = np.random.default_rng(3)
    kernel, x, y = make(2), inputs(rng, 7, 2), inputs(rng, 7, 2)
    for other in (x, y):
        full = kernel(x, other).to_dense()
        torch.testing.assert_close(kernel(x, other, diag=True), full.diagonal(), rtol=1e-9, atol=1e-9)
        batched = kernel(torch.stack([x, y]), torch.stack([other, other])).to_dense()
        torch.testing.assert_close(batched[0], full)


@every_kernel
def test_gradients_are_slopes_even_where_runs_coincide(make: Make) -> None:
    rng = np.random.default_rng(4)
    kernel, x = make(2), inputs(rng, 6, 2)
    x = torch.cat([x, x[:2]])
    weights = torch.from_numpy(rng.standard_normal((8, 8)))

    def value() -> torch.Tensor:
        total: torch.Tensor = (weights * kernel.forward(x, x)).sum()
        return total

    torch.autograd.backward(value())
    for parameter in kernel.parameters():
        flat = parameter.detach().view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 4)):
            with torch.no_grad():
                flat[i] += 1e-5
                above = float(value())
                flat[i] -= 2e-5
                below = float(value())
                flat[i] += 1e-5
            assert float(parameter.grad.view(-1)[i]) == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-4)


# Fits.


def noise_prior() -> Any:
    """Return the default prior of the logarithm of the noise's standard deviation."""
    mean, sd = make_priors(1)["log_noise"]
    return norm(float(mean), sd)


@every_kernel
def test_what_is_maximised_is_the_log_posterior(make: Make) -> None:
    """It is compared with SciPy's densities. The prior of the noise is on the logarithm of its standard deviation."""
    U, T, level, y = bowl_runs(0, 14)
    x, z = join_inputs(U, T), torch.from_numpy(standardise(y, level)[0])
    value, kernel, noise = deep_kernels._fit_kernel(make(2), x, z)
    with torch.no_grad():
        k = kernel.forward(x, x).numpy() + noise * np.eye(len(z))
    expected = multivariate_normal(np.zeros(len(z)), k).logpdf(z.numpy())
    for name, parameter in kernel.named_parameters():
        prior = getattr(kernel, f"{name}_prior")
        expected += norm(float(prior.loc), float(prior.scale)).logpdf(parameter.detach().numpy()).sum()
    expected += noise_prior().logpdf(0.5 * math.log(noise))
    assert value * len(z) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_more_probable_than_the_network_that_made_the_data(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, x, noise = randomise(deep_kernels.InfiniteWidthKernel(2), rng), inputs(rng, 30, 2), 1e-3
    with torch.no_grad():
        k = truth.forward(x, x).numpy() + noise * np.eye(30)
    z = np.linalg.cholesky(k) @ rng.standard_normal(30)

    def posterior(kernel: Any, noise: float) -> float:
        with torch.no_grad():
            k = kernel.forward(x, x).numpy() + noise * np.eye(30)
        total = float(multivariate_normal(np.zeros(30), k).logpdf(z)) + noise_prior().logpdf(0.5 * math.log(noise))
        for name, parameter in kernel.named_parameters():
            prior = getattr(kernel, f"{name}_prior")
            total += norm(float(prior.loc), float(prior.scale)).logpdf(parameter.detach().numpy()).sum()
        return float(total)

    [(kernel, fitted_noise)] = deep_kernels.fit_nngp_kernel(x, torch.from_numpy(z))
    assert posterior(kernel, fitted_noise) > posterior(truth, noise)


@pytest.mark.slow
def test_networks_are_returned_with_the_most_probable_first() -> None:
    U, T, level, y = bowl_runs(1, 25)
    x, z = join_inputs(U, T), torch.from_numpy(standardise(y, level)[0])
    values = [
        deep_kernels._fit_kernel(deep_kernels.DeepKernel(2, seed), x, z)[0] for seed in range(deep_kernels.NETWORKS)
    ]
    best = deep_kernels._fit_kernel(deep_kernels.DeepKernel(2, int(np.argmax(values))), x, z)[1]
    kernels = deep_kernels.fit_deep_kernels(x, z)
    assert len(kernels) == deep_kernels.NETWORKS
    for name, parameter in kernels[0][0].named_parameters():
        torch.testing.assert_close(parameter, dict(best.named_parameters())[name])


@pytest.mark.parametrize("seed", range(3))
def test_fits_from_other_initialisations_reach_the_same_posterior(seed: int) -> None:
    """A badly scaled parameter would stop the optimizer early, at a different point each time."""
    U, T, level, y = bowl_runs(seed, 20)
    x, z = join_inputs(U, T), torch.from_numpy(standardise(y, level)[0])
    rng = np.random.default_rng(seed)
    starts = [
        deep_kernels.InfiniteWidthKernel(2),
        *(randomise(deep_kernels.InfiniteWidthKernel(2), rng) for _ in range(3)),
    ]
    values = [len(z) * deep_kernels._fit_kernel(kernel, x, z)[0] for kernel in starts]
    assert max(values) - min(values) < 0.1


def test_a_fit_that_meets_a_singular_covariance_restarts_from_a_draw_with_a_fixed_seed() -> None:
    class Singular(deep_kernels.InfiniteWidthKernel):
        calls = 0

        def covariance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:
                raise NotPSDError
            return super().covariance(a, b)

    U, T, level, y = bowl_runs(2, 15)
    x, z = join_inputs(U, T), torch.from_numpy(standardise(y, level)[0])
    before = torch.get_rng_state().clone()
    smooth, _, _ = deep_kernels._fit_kernel(deep_kernels.InfiniteWidthKernel(2), x, z)
    values = []
    for seed in (3, 4):
        torch.default_generator.manual_seed(seed)
        started = torch.get_rng_state().clone()
        kernel = Singular(2)
        values.append(deep_kernels._fit_kernel(kernel, x, z)[0])
        assert kernel.calls > 10
        assert torch.equal(torch.get_rng_state(), started)
    torch.set_rng_state(before)
    assert values[0] == values[1] == pytest.approx(smooth, abs=0.05)


# One contract for all.


@every_surrogate
@pytest.mark.parametrize("seed", range(2))
def test_the_optimum_at_the_target_is_found_and_its_loss_within_the_interval(surrogate: str, seed: int) -> None:
    U, T, level, y = bowl_runs(seed, 40)
    fit = fit_surrogate(U, T, level, y, fitter=FITTERS[surrogate])
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 41), np.linspace(0, 1, 41)), -1).reshape(-1, 2)
    mean, sd = fit.predict(grid, np.zeros(2))
    assert np.abs(grid[mean.argmin()] - [0.6, 0.4]).max() <= 0.1
    truth = bowl_loss(grid, np.zeros((len(grid), 2)))
    assert np.corrcoef(mean, truth)[0, 1] > 0.95
    assert (np.abs(mean - truth) < 3 * sd + 0.01).mean() > 0.9


@every_surrogate
def test_one_level_beyond_the_target_categories_and_equal_losses_give_finite_predictions(surrogate: str) -> None:
    rng = np.random.default_rng(0)
    cube = Cube({"c": CategoricalDistribution(["a", "b", "d"]), "x": FloatDistribution(0, 1)})
    U = cube.encode(cube.snap(rng.random((9, 2))))
    held = cube.encode(cube.snap(rng.random((20, 2))))
    wild = np.array([1e12, 1.0, 2.0, math.inf, 3.0, -5.0, math.nan, 2.0, 2.0])
    for y, at in ((np.full(9, 3.0), [0.0, 0.0]), (wild, [-0.5, 1.0]), (U @ [0.1, 0.2, 0.3, 1.0], [1.0, 0.0])):
        fit = fit_surrogate(U, np.tile(at, (9, 1)), np.zeros(9, np.int64), y, fitter=FITTERS[surrogate])
        mean, sd = fit.predict(held, np.zeros(2))
        assert np.isfinite(mean).all()
        assert np.isfinite(sd).all()
    one = fit_surrogate(U[:1], np.zeros((1, 2)), np.zeros(1, np.int64), wild[1:2], fitter=FITTERS[surrogate])
    assert one.predict(U[:1], np.zeros(2))[0][0] == pytest.approx(1.0, abs=0.1)


@every_surrogate
def test_the_same_point_many_times_gives_the_mean_of_its_losses(surrogate: str) -> None:
    U, y = np.full((6, 2), 0.3), np.array([1.0, 1.1, 0.9, 1.05, 0.95, 1.0])
    fit = fit_surrogate(U, np.zeros((6, 2)), np.zeros(6, np.int64), y, fitter=FITTERS[surrogate])
    assert fit.predict(U[:1], np.zeros(2))[0][0] == pytest.approx(1.0, abs=0.02)


@every_surrogate
def test_pending_runs_keep_the_mean_and_lower_the_variance(surrogate: str) -> None:
    U, T, level, y = bowl_runs(4, 15)
    fit = fit_surrogate(U, T, level, y, fitter=FITTERS[surrogate])
    point, coordinates = np.array([[0.3, 0.8]]), np.array([[0.5, 0.5]])
    V = np.random.default_rng(0).random((10, 2))
    updated = fit.with_pending(point, coordinates)
    np.testing.assert_allclose(updated.predict(V, np.zeros(2))[0], fit.predict(V, np.zeros(2))[0], atol=1e-5)
    assert (updated.predict(V, np.zeros(2))[1] <= fit.predict(V, np.zeros(2))[1] + 1e-9).all()
    for one, other in zip(fit.members, updated.members, strict=True):
        x = join_inputs(point, coordinates)
        before, after = float(one.posterior(x)[1][0]), float(other.posterior(x)[1][0])
        assert after == pytest.approx(before * one.noise / (before + one.noise), rel=1e-3)


@every_surrogate
def test_predictions_are_those_of_botorch(surrogate: str) -> None:
    U, T, level, y = bowl_runs(5, 15)
    fit = fit_surrogate(U, T, level, y, fitter=FITTERS[surrogate])
    first = Surrogate(fit.best, fit.offset, fit.scale)
    V = np.random.default_rng(5).random((8, 2))
    posterior = fit.model.posterior(join_inputs(V, np.full(2, 0.3)))
    mean, sd = first.predict(V, np.full(2, 0.3))
    with torch.no_grad():
        np.testing.assert_allclose(mean, fit.offset + fit.scale * posterior.mean.squeeze(-1).numpy(), atol=1e-6)
        np.testing.assert_allclose(sd, fit.scale * posterior.variance.squeeze(-1).sqrt().numpy(), rtol=1e-3, atol=1e-6)


@every_surrogate
def test_a_fit_is_repeated_exactly_and_leaves_the_global_generators_alone(surrogate: str) -> None:
    U, T, level, y = bowl_runs(6, 12)

    def state() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]

    before, V = state(), np.random.default_rng(0).random((5, 2))
    one, two = (fit_surrogate(U, T, level, y, fitter=FITTERS[surrogate]).predict(V, np.zeros(2))[0] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert state() == before


# In a search.

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "batch": IntDistribution(8, 512, log=True),
    "kind": CategoricalDistribution(["a", "b"]),
}
SLOTS = [Fidelity(1e6, 1e7), Fidelity(1e6, 1e8)]
TARGET = Fidelity(1e6, 1e8)


def run(study: optuna.Study, params: dict[str, Any], at: Fidelity, loss: float | None) -> None:
    """Add a trial as a search writes it. A loss of None is a running trial, NaN a diverged one."""
    diverged = loss is not None and not math.isfinite(loss)
    state = TrialState.RUNNING if loss is None else TrialState.FAIL if diverged else TrialState.COMPLETE
    study.add_trial(
        optuna.create_trial(
            state=state,
            params=params,
            distributions=SPACE,
            value=None if loss is None or diverged else loss,
            user_attrs={"tokens": int(at.D), "N": at.N, "diverged": diverged},
        )
    )


@every_surrogate
@pytest.mark.parametrize("losses", [[2.0] * 6, [2.0, math.nan, 3.0, None, 2.5, math.inf, None]])
def test_the_search_continues_after_equal_diverged_and_pending_runs(surrogate: str, losses: list[float | None]) -> None:
    study, rng = optuna.create_study(), np.random.default_rng(0)
    cube = Cube(SPACE)
    for i, (point, loss) in enumerate(zip(rng.random((len(losses), 3)), losses, strict=True)):
        run(study, cube.to_params(point), SLOTS[i % 2], loss)
    sampler = MultiFidelitySampler(seed=0, surrogate=surrogate)
    params, slot = sampler.propose(study, SPACE, SLOTS, lambda f: f.C, TARGET)
    assert slot in (0, 1)
    assert cube.contains(optuna.create_trial(params=params, distributions=SPACE, value=0.0))
    assert all(
        np.abs(cube.to_unit(params) - cube.to_unit(t.params)).max() > 1e-9 for t in study.trials if t.value is None
    )
    assert set(sampler.best(study, SPACE, TARGET)) == set(SPACE)
    again = MultiFidelitySampler(seed=0, surrogate=surrogate).propose(study, SPACE, SLOTS, lambda f: f.C, TARGET)
    assert again == (params, slot)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", MODEL_SAMPLERS)
def test_a_search_with_each_surrogate_ends_near_the_optimum(sampler: str) -> None:
    def loss(params: dict[str, Any], tokens: float) -> float:
        drift = 0.1 * math.log(tokens / 27_000)
        x, y = math.log10(params["lr"] / 0.003) + drift, math.log2(params["batch"] / 64) / 3
        return float(2.0 + (1000 / tokens) ** 0.3 + 0.3 * x * x + 0.2 * y * y + (0.1 if params["kind"] == "a" else 0.0))

    search = Search(SPACE, tokens=(1000, 27_000), sampler=sampler, seed=0, resumable=False)
    for _ in range(20):
        job = search.ask()
        assert job is not None
        search.tell(job, loss(job.params, job.fidelity.D))
    best = search.best()
    assert loss(best, 27_000) < loss({"lr": 0.003, "batch": 64, "kind": "b"}, 27_000) + 0.02


def test_samplers_with_other_surrogates_are_created_by_name() -> None:
    assert set(MODEL_SAMPLERS) <= set(SAMPLERS)
    for name in MODEL_SAMPLERS:
        assert isinstance(make_sampler(name, seed=0), MultiFidelitySampler)
    with pytest.raises(ValueError, match="one of bowl, deep, nngp, got 'depe'"):
        MultiFidelitySampler(surrogate="depe")


def test_the_module_is_imported_only_when_it_is_used() -> None:
    code = (
        "import sys, optuna\n"
        "from hpo.samplers.multi_fidelity import MultiFidelitySampler\n"
        "for surrogate in ('bowl', 'nngp'):\n"
        "    study = optuna.create_study(sampler=MultiFidelitySampler(seed=0, surrogate=surrogate))\n"
        "    study.optimize(lambda t: t.suggest_float('x', 0, 1), n_trials=6)\n"
        "    print('hpo.surrogate.deep_kernels' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False\nTrue\n"
