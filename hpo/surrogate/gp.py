"""A Gaussian process over settings and fidelity with the covariance of `hpo.surrogate.kernel`, fitted to all runs.

A few hundred runs leave the hyperparameters uncertain, more so in seven dimensions than in two, and the single best set
of them is overconfident. A surrogate is therefore a small ensemble: the maximum a posteriori estimate, and draws around
it from the Laplace approximation of the hyperparameters' posterior. Predictions are means and variances of the mixture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from hpo.surrogate.inputs import AXES, BowlPrior
from hpo.surrogate.kernel import make_priors
from scaling.common.arrays import Array

with warnings.catch_warnings():
    # linear_operator calls torch.jit.script when it is imported, which newer versions of torch deprecate.
    warnings.simplefilter("ignore", DeprecationWarning)
    from botorch.models import SingleTaskGP
    from gpytorch.constraints import GreaterThan
    from gpytorch.kernels import Kernel
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.means import Mean, ZeroMean
    from gpytorch.priors import LogNormalPrior


# Added to the noise variance.
JITTER = 1e-8


@dataclass(frozen=True, eq=False)
class EnsembleMember:
    """A Gaussian process with fixed hyperparameters, conditioned on runs.

    Attributes:
        kernel: The covariance.
        noise: Variance of one observation, in units of z^2.
        x: Model inputs of the runs, [n, d + 2].
        z: Standardised losses of the runs, [n].
        chol: Cholesky factor L of the covariance of the runs with noise, [n, n].
        alpha: The inverse of that covariance times z - mean, [n].
        mean: The prior mean.
    """

    kernel: Kernel
    noise: float
    x: Tensor
    z: Tensor
    chol: Tensor
    alpha: Tensor
    mean: Mean

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the posterior at model inputs [m, d + 2].

        Returns:
            Mean [m] and variance [m] in units of z, without noise; and L^-1 k(X, x) [n, m], for `covariance`.
        """
        with torch.no_grad():
            cross = self.kernel.forward(self.x, x)
            v = torch.linalg.solve_triangular(self.chol, cross, upper=False)
            variance = (self.kernel.forward(x, x, diag=True) - v.square().sum(0)).clamp_min(0.0)
            expected = self.mean(x) + self.alpha @ cross
        return expected, variance, v

    def covariance(self, a: Tensor, v_a: Tensor, b: Tensor, v_b: Tensor) -> Tensor:
        """Return the posterior covariance [m, k] of model inputs a [m, d + 2] and b [k, d + 2].

        v_a and v_b are the third values that `posterior` returned for a and b.
        """
        with torch.no_grad():
            joint: Tensor = self.kernel.forward(a, b) - v_a.mT @ v_b
        return joint

    def with_pending(self, x: Tensor) -> EnsembleMember:
        """Return the process conditioned on pending runs at x [q, d + 2] as well.

        Their losses are taken to be their posterior mean, so the mean stays as it is and the variance falls.
        """
        x_all, z_all = torch.cat([self.x, x]), torch.cat([self.z, self.posterior(x)[0]])
        return condition_on_runs(self.kernel, self.noise, x_all, z_all, self.mean)


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A fitted ensemble. It predicts z = (loss - offset) / scale, with high losses compressed as in `standardise`.

    Attributes:
        best: The member with the most probable hyperparameters.
        offset: Loss at z = 0.
        scale: Loss difference per unit of z.
        others: Returns the other members. They are computed on first use, because a suggestion rarely needs them.
    """

    best: EnsembleMember
    offset: float
    scale: float
    others: Callable[[], tuple[EnsembleMember, ...]] = tuple

    @cached_property
    def members(self) -> tuple[EnsembleMember, ...]:
        """All members, the best first."""
        with limit_to_one_thread():
            return self.best, *self.others()

    @property
    def x(self) -> Tensor:
        """Model inputs [n, d + 2] of the runs that the ensemble is conditioned on: finished ones, then pending ones."""
        return self.best.x

    @cached_property
    def model(self) -> SingleTaskGP:
        """The best member as a BoTorch model."""
        best = self.best
        return build_botorch_model(best.kernel, best.noise, best.x, best.z, best.mean)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean [m] and variance [m] of the mixture in units of z, at model inputs [m, d + 2]."""
        parts = [member.posterior(x) for member in self.members]
        mean, variance = torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
        return mean.mean(0), variance.mean(0) + mean.var(0, unbiased=False)

    def predict(self, U: Array, T: Array) -> tuple[Array, Array]:
        """Predict the loss without noise.

        Args:
            U: Features [m, d].
            T: Fidelity coordinates [m, 2], or one pair [2] for all points.

        Returns:
            Mean [m] and standard deviation [m] in units of the loss. Far above the best loss of a level they are
            compressed as in `standardise`.
        """
        mean, variance = self.posterior(join_inputs(U, T))
        return (self.offset + self.scale * mean).numpy(), (self.scale * variance.sqrt()).numpy()

    def posterior_covariance(self, U: Array, T: Array) -> Array:
        """Return the joint posterior covariance [m, m] of the losses at m points, in squared units of the loss."""
        x = join_inputs(U, T)
        parts = [(member, *member.posterior(x)) for member in self.members]
        within = torch.stack([member.covariance(x, v, x, v) for member, _, _, v in parts]).mean(0)
        means = torch.stack([mean for _, mean, _, _ in parts])
        between = torch.cov(means.mT, correction=0).reshape(len(x), len(x))
        joint: Array = (self.scale**2 * (within + between)).numpy()
        return joint

    def with_pending(self, U: Array, T: Array) -> Surrogate:
        """Return the ensemble with the runs at features U [q, d] and fidelity coordinates T [q, 2] pending.

        See `EnsembleMember.with_pending`.
        """
        if not len(U):
            return self
        x = join_inputs(U, T)

        def others() -> tuple[EnsembleMember, ...]:
            return tuple(member.with_pending(x) for member in self.members[1:])

        return Surrogate(self.best.with_pending(x), self.offset, self.scale, others)


def join_inputs(U: Array, T: Array) -> Tensor:
    """Join features [m, d] and fidelity coordinates [m, 2] (or one pair [2] for all) to model inputs [m, d + 2]."""
    return torch.from_numpy(np.hstack([U, np.broadcast_to(T, (len(U), AXES))]))


def _factorise(k: Tensor) -> Tensor:
    """Return the Cholesky factor of k, with more jitter where rounding leaves a negative pivot.

    Raises:
        ValueError: If the matrix is not positive definite even with the largest jitter.
    """
    scale = float(k.diagonal().mean())
    for jitter in (0.0, 1e-10, 1e-8, 1e-6):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(k + jitter * scale * torch.eye(len(k), dtype=k.dtype))
        if not int(failed):
            return factor
    raise ValueError(f"the covariance of {len(k)} runs is not positive definite: check their losses for huge values")


class BowlMean(Mean):  # type: ignore[misc]
    """A quadratic bowl over some feature columns, whose centre moves linearly with the fidelity coordinates."""

    def __init__(self, prior: BowlPrior) -> None:
        super().__init__()
        self.columns, self.curvature = list(prior.columns), prior.curvature
        self.at_target, self.moves = torch.from_numpy(prior.at_target), torch.from_numpy(prior.moves)

    def forward(self, x: Tensor) -> Tensor:
        """Return the height of the bowl, [..., n], at model inputs [..., n, d + 2]."""
        from_centre = x[..., self.columns] - self.at_target - x[..., -AXES:] @ self.moves
        bowl: Tensor = self.curvature * from_centre.square().sum(-1)
        return bowl


def condition_on_runs(kernel: Kernel, noise: float, x: Tensor, z: Tensor, mean: Mean | None = None) -> EnsembleMember:
    """Condition a Gaussian process on runs.

    Args:
        kernel: The covariance.
        noise: Variance of one observation, in units of z^2.
        x: Model inputs of the runs, [n, d + 2].
        z: Their standardised losses, [n].
        mean: The prior mean; 0 by default.
    """
    mean = ZeroMean() if mean is None else mean
    with torch.no_grad():
        chol = _factorise(kernel.forward(x, x) + noise * torch.eye(len(x), dtype=x.dtype))
        alpha = torch.cholesky_solve((z - mean(x)).unsqueeze(-1), chol).squeeze(-1)
    return EnsembleMember(kernel, noise, x, z, chol, alpha, mean)


def build_botorch_model(kernel: Kernel, noise: float, x: Tensor, z: Tensor, mean: Mean | None = None) -> SingleTaskGP:
    """Return a BoTorch model in evaluation mode with this kernel, mean and noise variance.

    The arguments are those of `condition_on_runs`.
    """
    median, sd = make_priors(x.shape[-1] - AXES)["log_noise"]
    likelihood = GaussianLikelihood(
        noise_prior=LogNormalPrior(2.0 * float(median), 2.0 * sd),
        noise_constraint=GreaterThan(JITTER, transform=None, initial_value=noise),
    )
    model = SingleTaskGP(
        x,
        z.unsqueeze(-1),
        likelihood=likelihood,
        covar_module=kernel,
        mean_module=mean or ZeroMean(),
        outcome_transform=None,
    )
    with torch.no_grad():
        likelihood.noise_covar.raw_noise.fill_(noise)
    return model.eval()


@cache
def _get_thread_pools() -> ThreadpoolController:
    """Return the thread pools of the loaded libraries, which take long to find."""
    return ThreadpoolController()


def limit_to_one_thread() -> AbstractContextManager[Any]:
    """Return a context in which torch and NumPy use a single thread.

    The matrices are small, and the threads of several workers busy-wait for each other: they made an ask ten times
    slower on two busy cores.
    """
    pools: AbstractContextManager[Any] = _get_thread_pools().limit(limits=1)
    return pools
