"""Two alternatives to the default surrogate: a deep kernel, and the kernel of an infinitely wide network.

A point is x = (settings in the unit cube, t, s), as in `hpo.surrogate.kernel`; c is x with its settings relative to the
centre of the cube, u - 1/2. Both kernels add the fixed level offset of the default kernel: the mean losses of two
levels differ by more than the settings change them, and no kernel should have to learn that.

Deep kernel (Wilson et al. 2016, arXiv 1511.02222): a small network g moves the points, and a stationary kernel compares
the moved points,

    k = level offset + scale^2 M52(|h(x) - h(x')|),    h(x) = (c + g(c)) / length,    g(c) = V tanh(W c + b)

With g = 0 it is the ordinary Matern kernel; the drifts and warps of the default kernel are special cases of g. A
network fitted by marginal likelihood alone overfits a few dozen runs (Ober et al. 2021, arXiv 2102.12108). So the
weights have normal priors, and networks from several initialisations are averaged (Lakshminarayanan et al. 2016, arXiv
1612.01474).

Infinite-width network (Cho and Saul 2009; Lee et al. 2018, arXiv 1711.00165): the covariance of a random ReLU network
with DEPTH hidden layers, as their widths go to infinity, with all variances of weights and biases learned,

    k_0 = bias_0^2 + sum_i input_i^2 c_i c'_i
    k_l = bias_l^2 + weight_l^2 J(k_(l-1)),    J(k)(x, x') = sqrt(k(x, x) k(x', x')) (sin a + (pi - a) cos a) / pi
    cos a = k(x, x') / sqrt(k(x, x) k(x', x'))

so that J(k)(x, x) = k(x, x), and k = level offset + k_DEPTH. The last bias is left out: the offset has a constant.

Neither kernel has the default's term that is zero at the target and rough below it, so both trust an extrapolation from
low fidelities more. The priors are guesses, not tuned.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpo.surrogate.gp import JITTER
from hpo.surrogate.inputs import AXES
from hpo.surrogate.kernel import make_priors

# After hpo.surrogate.gp, which imports BoTorch with a dependency's deprecation warning silenced.
# isort: split
from botorch.exceptions.warnings import OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.constraints import GreaterThan, Interval
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ZeroMean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import NormalPrior
from gpytorch.utils.warnings import NumericalWarning

# Hidden units of the deep kernel's network.
HIDDEN = 16
# Initialisations of the deep kernel. All of them become members of the ensemble.
NETWORKS = 3
# Hidden layers of the infinitely wide network.
DEPTH = 2
# A deep kernel fitted to 60 runs still improves with more iterations, but takes three times as long.
ITERATIONS = 100


def compute_level_offset(a: Tensor, b: Tensor) -> Tensor:
    """Return the level offset of the default kernel, 9 [1 + sum_tau (tau tau' + 0.1 tau^2 tau'^2)], [..., n, m]."""
    product = a[..., -AXES:].unsqueeze(-2) * b[..., -AXES:].unsqueeze(-3)
    return 9.0 * (1.0 + (product + 0.1 * product.square()).sum(-1))


def centre_settings(x: Tensor) -> Tensor:
    """Subtract the centre of the cube from the settings of points [..., n, d + 2]; the target is at 0 already."""
    return torch.cat([x[..., :-AXES] - 0.5, x[..., -AXES:]], -1)


class _KernelWithPriors(Kernel):  # type: ignore[misc]
    """A kernel over inputs [..., n, d + 2] whose parameters have normal priors. Logarithms are bounded."""

    def add_parameter(self, name: str, start: Tensor, mean: float, sd: float) -> None:
        """Register a parameter and its prior. A name that begins with "log" is bounded at three sd."""
        self.register_parameter(name, torch.nn.Parameter(start))
        self.register_prior(f"{name}_prior", _make_normal_prior(mean, sd), name)
        # With transform=None the interval bounds the optimizer and does not reparametrise.
        if name.startswith("log"):
            self.register_constraint(name, Interval(mean - 3 * sd, mean + 3 * sd, transform=None))

    def add_log_parameter(self, name: str, size: int, median: float, sd: float) -> None:
        """Register the logarithm of a positive quantity, initialised at the median of its prior."""
        self.add_parameter(name, torch.full((size,), math.log(median), dtype=torch.float64), math.log(median), sd)


def _evaluate(covariance: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, diag: bool) -> Tensor:
    """Evaluate a covariance for all pairs, [..., n, m], or with `diag` row by row, [..., n]."""
    return covariance(a.unsqueeze(-2), b.unsqueeze(-2))[..., 0, 0] if diag else covariance(a, b)


class DeepKernel(_KernelWithPriors):
    """A Matern-5/2 kernel on the output of a network with one hidden layer.

    Args:
        d: Number of feature columns.
        seed: Seed of the initial weights.
    """

    def __init__(self, d: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def add_weights(name: str, *shape: int, sd: float) -> None:
            self.add_parameter(name, sd * torch.randn(shape, generator=generator, dtype=torch.float64), 0.0, sd)

        p = d + AXES
        self.add_log_parameter("log_scale", 1, 2.0, 1.0)
        self.add_log_parameter("log_length", p, 0.5 * max(1.0, d / 2) ** 0.25, 0.8)
        add_weights("W", HIDDEN, p, sd=2.0 / math.sqrt(p))
        add_weights("b", HIDDEN, sd=1.0)
        # Points move by about 0.3 cube widths, the prior of a drift in the default kernel.
        add_weights("V", p, HIDDEN, sd=0.3 / math.sqrt(HIDDEN))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Return k(x1, x2), [..., n, m]; with `diag` row by row, [..., n]."""
        return _evaluate(self.covariance, x1, x2, diag)

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return k(a, b), [..., n, m]."""
        h_a, h_b = self.warp(a), self.warp(b)
        r2 = h_a.square().sum(-1).unsqueeze(-1) + h_b.square().sum(-1).unsqueeze(-2) - 2.0 * (h_a @ h_b.mT)
        # The floor keeps the derivative of the root finite. M52 is flat at 0, so 1e-15 there changes nothing.
        root = torch.sqrt(5.0 * r2.clamp_min(1e-15))
        matern = (1.0 + root + root.square() / 3.0) * torch.exp(-root)
        return compute_level_offset(a, b) + torch.exp(2.0 * self.log_scale) * matern

    def warp(self, x: Tensor) -> Tensor:
        """Return h(x), [..., n, d + 2]."""
        c = centre_settings(x)
        h: Tensor = (c + torch.tanh(c @ self.W.mT + self.b) @ self.V.mT) * torch.exp(-self.log_length)
        return h


class InfiniteWidthKernel(_KernelWithPriors):
    """The covariance of an infinitely wide ReLU network.

    Args:
        d: Number of feature columns.
        depth: Number of hidden layers.
    """

    def __init__(self, d: int, depth: int = DEPTH) -> None:
        super().__init__()
        self.depth = depth
        self.add_log_parameter("log_input", d + AXES, 3.0, 1.0)
        self.add_log_parameter("log_bias", depth, 1.0, 1.0)
        self.add_log_parameter("log_weight", depth, 1.0, 0.5)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Return k(x1, x2), [..., n, m]; with `diag` row by row, [..., n]."""
        return _evaluate(self.covariance, x1, x2, diag)

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return k(a, b), [..., n, m]."""
        scale = torch.exp(self.log_input)
        bias, weight = torch.exp(2.0 * self.log_bias), torch.exp(2.0 * self.log_weight)
        c_a, c_b = centre_settings(a) * scale, centre_settings(b) * scale
        k_aa, k_bb, k = c_a.square().sum(-1), c_b.square().sum(-1), c_a @ c_b.mT
        for layer in range(self.depth):
            k_aa, k_bb, k = k_aa + bias[layer], k_bb + bias[layer], k + bias[layer]
            norm = torch.sqrt(k_aa.unsqueeze(-1) * k_bb.unsqueeze(-2))
            # The arc cosine has no derivative at 1; staying inside changes the value by 1e-12 of itself.
            cos = (k / norm).clamp(-1 + 1e-12, 1 - 1e-12)
            angle = torch.arccos(cos)
            k = weight[layer] * norm * (torch.sqrt(1 - cos.square()) + (math.pi - angle) * cos) / math.pi
            k_aa, k_bb = weight[layer] * k_aa, weight[layer] * k_bb
        return compute_level_offset(a, b) + k


def _make_normal_prior(mean: float, sd: float) -> NormalPrior:
    """Return a normal prior in double precision."""
    return NormalPrior(torch.tensor(mean, dtype=torch.float64), torch.tensor(sd, dtype=torch.float64))


def _make_likelihood() -> GaussianLikelihood:
    """Return a likelihood with the default kernel's prior on the logarithm of the noise sd, starting at its median.

    A prior on the untransformed variance has a slope of 1e6 near 1e-6, and fits from different initialisations then
    ended 2 to 20 nats apart (20 and 60 runs of a planted bowl). Near there the softplus acts as a logarithm.
    """
    mean, sd = make_priors(1)["log_noise"]
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(JITTER)).double()

    def get_log_sd(owner: GaussianLikelihood) -> Tensor:
        return 0.5 * torch.log(owner.noise)

    def set_log_sd(owner: GaussianLikelihood, value: Tensor) -> None:
        owner.noise = torch.exp(2.0 * value)

    likelihood.register_prior("log_noise_prior", _make_normal_prior(float(mean), sd), get_log_sd, set_log_sd)
    set_log_sd(likelihood, mean)
    return likelihood


def _fit_kernel(kernel: Kernel, x: Tensor, z: Tensor) -> tuple[float, Kernel, float]:
    """Maximise the posterior from the kernel's current parameters.

    Returns:
        Log posterior per run, the kernel, and the noise variance.
    """

    def is_harmless(warning: warnings.WarningMessage) -> bool:
        """A line search that finds no improvement has converged, and conditioning adds jitter as well."""
        return issubclass(warning.category, OptimizationWarning | NumericalWarning)

    model = SingleTaskGP(
        x,
        z.unsqueeze(-1),
        likelihood=_make_likelihood(),
        covar_module=kernel,
        mean_module=ZeroMean(),
        outcome_transform=None,
    )
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    # BoTorch restarts from random parameters when it meets a singular covariance.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": ITERATIONS}}, warning_handler=is_harmless)
    with torch.no_grad():
        mll.train()
        value = mll(model(*model.train_inputs), model.train_targets).item()
        mll.eval()
    return value, kernel, model.likelihood.noise.item()


def fit_deep_kernels(x: Tensor, z: Tensor) -> list[tuple[Kernel, float]]:
    """Fit `NETWORKS` deep kernels from fixed initialisations; a `hpo.surrogate.fitting.Fitter`.

    Args:
        x: Model inputs [n, d + 2].
        z: Standardised losses [n].

    Returns:
        Kernels with their noise variances, the most probable first.
    """
    fits = [_fit_kernel(DeepKernel(x.shape[-1] - AXES, seed), x, z) for seed in range(NETWORKS)]
    return [(kernel, noise) for _, kernel, noise in sorted(fits, key=lambda fit: -fit[0])]


def fit_nngp_kernel(x: Tensor, z: Tensor) -> list[tuple[Kernel, float]]:
    """Fit the kernel of an infinitely wide network to the maximum a posteriori; a `hpo.surrogate.fitting.Fitter`.

    Args:
        x: Model inputs [n, d + 2].
        z: Standardised losses [n].

    Returns:
        One kernel with its noise variance.
    """
    _, kernel, noise = _fit_kernel(InfiniteWidthKernel(x.shape[-1] - AXES), x, z)
    return [(kernel, noise)]
