"""Two surrogates beside the default: a deep kernel, and the kernel of an infinitely wide network.

A point is x = (settings in the unit cube, t, s), as in `hpo.surrogate.kernel`; c is x with its settings moved to the cube's
centre, u - 1/2. Both add the default's fixed level offset: at these scales a level's mean loss differs from the next
by more than the settings change it, and no kernel should have to learn that.

Deep kernel (Wilson et al. 2016, arXiv 1511.02222): a small network g moves the points, a stationary kernel compares
them where they come to lie,

    k = level offset + scale^2 M52(|h(x) - h(x')|),    h(x) = (c + g(c)) / length,    g(c) = V tanh(W c + b)

With g = 0 it is the ordinary Matern kernel; drifts and warps of the default are special cases of g. A network fitted
by marginal likelihood alone overfits a few dozen runs (Ober et al. 2021, arXiv 2102.12108), so weights have normal
priors, and several networks from different beginnings are averaged (Lakshminarayanan et al. 2016, arXiv 1612.01474).

Infinite-width network (Cho and Saul 2009; Lee et al. 2018, arXiv 1711.00165): the covariance of a random ReLU network
with DEPTH hidden layers, as their widths go to infinity, with all variances of weights and biases learned,

    k_0 = bias_0^2 + sum_i input_i^2 c_i c'_i
    k_l = bias_l^2 + weight_l^2 J(k_(l-1)),    J(k)(x, x') = sqrt(k(x, x) k(x', x')) (sin a + (pi - a) cos a) / pi
    cos a = k(x, x') / sqrt(k(x, x) k(x', x'))

so that J(k)(x, x) = k(x, x); k = level offset + k_DEPTH. The last bias is left out: the offset has a constant.

Neither has the default's term that is zero at the target and rough below it, so both believe an extrapolation from
low fidelities more readily. Priors are guesses, not tuned.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpo.surrogate.gp import JITTER  # imports BoTorch with a dependency's deprecation warning silenced
from hpo.surrogate.inputs import AXES
from hpo.surrogate.kernel import prior

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

HIDDEN = 16  # units of the deep kernel's network
NETWORKS = 3  # beginnings of the deep kernel, all kept
DEPTH = 2  # hidden layers of the infinitely wide network
ITERATIONS = 100  # a deep kernel fitted to 60 runs still gains after them, at three times the time


def level_offset(a: Tensor, b: Tensor) -> Tensor:
    """The default's prior on the mean losses of levels, 9 [1 + sum_tau (tau tau' + 0.1 tau^2 tau'^2)], [..., n, m]."""
    product = a[..., -AXES:].unsqueeze(-2) * b[..., -AXES:].unsqueeze(-3)
    return 9.0 * (1.0 + (product + 0.1 * product.square()).sum(-1))


def centred(x: Tensor) -> Tensor:
    """Settings relative to the middle of the cube; the target is 0 already."""
    return torch.cat([x[..., :-AXES] - 0.5, x[..., -AXES:]], -1)


class _Learned(Kernel):  # type: ignore[misc]
    """A kernel over inputs [..., n, d + 2] whose parameters have normal priors, the logarithms among them in a box."""

    def learn(self, name: str, start: Tensor, mean: float, sd: float) -> None:
        """Register a parameter. A name that begins with "log" is bounded at three sd, as in `hpo.surrogate.kernel`."""
        self.register_parameter(name, torch.nn.Parameter(start))
        self.register_prior(f"{name}_prior", _normal(mean, sd), name)
        if name.startswith("log"):  # transform=None: bounds for the optimizer, not a reparametrisation
            self.register_constraint(name, Interval(mean - 3 * sd, mean + 3 * sd, transform=None))

    def learn_log(self, name: str, size: int, median: float, sd: float) -> None:
        """A positive quantity by its logarithm, which begins at its prior's median."""
        self.learn(name, torch.full((size,), math.log(median), dtype=torch.float64), math.log(median), sd)


def _between(covariance: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, diag: bool) -> Tensor:
    """All pairs, [..., n, m], or row by row, [..., n]."""
    return covariance(a.unsqueeze(-2), b.unsqueeze(-2))[..., 0, 0] if diag else covariance(a, b)


class DeepKernel(_Learned):
    """Matern-5/2 after a network with one hidden layer. d: number of feature columns; seed: of its first weights."""

    def __init__(self, d: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(name: str, *shape: int, sd: float) -> None:
            self.learn(name, sd * torch.randn(shape, generator=generator, dtype=torch.float64), 0.0, sd)

        p = d + AXES
        self.learn_log("log_scale", 1, 2.0, 1.0)
        self.learn_log("log_length", p, 0.5 * max(1.0, d / 2) ** 0.25, 0.8)
        weights("W", HIDDEN, p, sd=2.0 / math.sqrt(p))
        weights("b", HIDDEN, sd=1.0)
        # Moves of about 0.3 cube widths, the default's prior for a drift.
        weights("V", p, HIDDEN, sd=0.3 / math.sqrt(HIDDEN))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        return _between(self.covariance, x1, x2, diag)

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        h_a, h_b = self.moved(a), self.moved(b)
        r2 = h_a.square().sum(-1).unsqueeze(-1) + h_b.square().sum(-1).unsqueeze(-2) - 2.0 * (h_a @ h_b.mT)
        # The floor keeps the root's derivative finite; M52 is flat at 0, so that 1e-15 there changes nothing.
        root = torch.sqrt(5.0 * r2.clamp_min(1e-15))
        matern = (1.0 + root + root.square() / 3.0) * torch.exp(-root)
        return level_offset(a, b) + torch.exp(2.0 * self.log_scale) * matern

    def moved(self, x: Tensor) -> Tensor:
        """h(x), [..., n, d + 2]."""
        c = centred(x)
        h: Tensor = (c + torch.tanh(c @ self.W.mT + self.b) @ self.V.mT) * torch.exp(-self.log_length)
        return h


class InfiniteWidthKernel(_Learned):
    """The network Gaussian process of a ReLU network. d: number of feature columns."""

    def __init__(self, d: int, depth: int = DEPTH) -> None:
        super().__init__()
        self.depth = depth
        self.learn_log("log_input", d + AXES, 3.0, 1.0)
        self.learn_log("log_bias", depth, 1.0, 1.0)
        self.learn_log("log_weight", depth, 1.0, 0.5)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        return _between(self.covariance, x1, x2, diag)

    def covariance(self, a: Tensor, b: Tensor) -> Tensor:
        scale = torch.exp(self.log_input)
        bias, weight = torch.exp(2.0 * self.log_bias), torch.exp(2.0 * self.log_weight)
        c_a, c_b = centred(a) * scale, centred(b) * scale
        k_aa, k_bb, k = c_a.square().sum(-1), c_b.square().sum(-1), c_a @ c_b.mT
        for layer in range(self.depth):
            k_aa, k_bb, k = k_aa + bias[layer], k_bb + bias[layer], k + bias[layer]
            norm = torch.sqrt(k_aa.unsqueeze(-1) * k_bb.unsqueeze(-2))
            # Just inside 1, where the arc cosine has a derivative: the value changes by 1e-12 of itself.
            cos = (k / norm).clamp(-1 + 1e-12, 1 - 1e-12)
            angle = torch.arccos(cos)
            k = weight[layer] * norm * (torch.sqrt(1 - cos.square()) + (math.pi - angle) * cos) / math.pi
            k_aa, k_bb = weight[layer] * k_aa, weight[layer] * k_bb
        return level_offset(a, b) + k


def _normal(mean: float, sd: float) -> NormalPrior:
    return NormalPrior(torch.tensor(mean, dtype=torch.float64), torch.tensor(sd, dtype=torch.float64))


def _likelihood() -> GaussianLikelihood:
    """Noise with the default's prior on the logarithm of its sd, beginning at the median.

    A prior on the variance itself, searched as it is, has a slope of 1e6 near 1e-6: fits from different beginnings
    then ended 2 to 20 nats apart (20 and 60 runs of a planted bowl). Softplus is a logarithm there.
    """
    mean, sd = prior(1)["log_noise"]
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(JITTER)).double()

    def log_sd(one: GaussianLikelihood) -> Tensor:
        return 0.5 * torch.log(one.noise)

    def set_log_sd(one: GaussianLikelihood, value: Tensor) -> None:
        one.noise = torch.exp(2.0 * value)

    likelihood.register_prior("log_noise_prior", _normal(float(mean), sd), log_sd, set_log_sd)
    set_log_sd(likelihood, mean)
    return likelihood


def _fitted(kernel: Kernel, x: Tensor, z: Tensor) -> tuple[float, Kernel, float]:
    """Maximum a posteriori from the kernel's present parameters: log posterior per run, kernel, noise variance."""

    def harmless(warning: warnings.WarningMessage) -> bool:
        """A line search that finds nothing better has arrived; jitter on a diagonal is what conditioning adds, too."""
        return issubclass(warning.category, OptimizationWarning | NumericalWarning)

    model = SingleTaskGP(
        x,
        z.unsqueeze(-1),
        likelihood=_likelihood(),
        covar_module=kernel,
        mean_module=ZeroMean(),
        outcome_transform=None,
    )
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    with torch.random.fork_rng(devices=[]):  # a fit that meets a singular covariance begins again at a draw
        torch.default_generator.manual_seed(0)
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": ITERATIONS}}, warning_handler=harmless)
    with torch.no_grad():
        mll.train()
        value = mll(model(*model.train_inputs), model.train_targets).item()
        mll.eval()
    return value, kernel, model.likelihood.noise.item()


def fit_deep(x: Tensor, z: Tensor) -> list[tuple[Kernel, float]]:
    """A `hpo.surrogate.gp.Fitter`: NETWORKS deep kernels from fixed beginnings, the most probable first."""
    fits = [_fitted(DeepKernel(x.shape[-1] - AXES, seed), x, z) for seed in range(NETWORKS)]
    return [(kernel, noise) for _, kernel, noise in sorted(fits, key=lambda fit: -fit[0])]


def fit_nngp(x: Tensor, z: Tensor) -> list[tuple[Kernel, float]]:
    """A `hpo.surrogate.gp.Fitter`: the kernel of an infinitely wide network, at the maximum a posteriori."""
    _, kernel, noise = _fitted(InfiniteWidthKernel(x.shape[-1] - AXES), x, z)
    return [(kernel, noise)]
