"""A Gaussian process over settings and fidelity: `hpo.surrogate.kernel`' covariance, fitted to the losses of all runs.

A few hundred runs leave the hyperparameters uncertain, more so in seven dimensions than in two, and a single best set
of them is overconfident. So a surrogate is a small ensemble: the maximum a posteriori, and draws around it from the
Laplace approximation of the hyperparameters' posterior. Means and variances are those of the mixture.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import ndtri
from threadpoolctl import ThreadpoolController
from torch import Tensor

from hpo.surrogate.inputs import AXES, Centre
from hpo.surrogate.kernel import NAMES, FidelityKernel, box, prior, unpack
from hpo.surrogate.marginal_likelihood import Marginal
from scaling.common.arrays import Array
from scaling.laws.compute import Fidelity

with warnings.catch_warnings():
    # linear_operator compiles with torch.jit.script when it is imported, which newer torch deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from botorch.models import SingleTaskGP
    from gpytorch.constraints import GreaterThan
    from gpytorch.kernels import Kernel
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.means import Mean, ZeroMean
    from gpytorch.priors import LogNormalPrior


JITTER = 1e-8
TAIL = 1.0  # excess losses are compressed from so many upper quartiles on
FIT_ROWS = 200  # hyperparameters are fitted to at most so many rows; all rows are conditioned on
DRAWS = 4  # of hyperparameters, besides the best
TRIAL_ITERATIONS = 20  # of both starts; the better one goes on
ITERATIONS = (30, 80)  # least and most: 4,000 over the number of runs, so that small fits converge and large ones end


def fidelity_coordinates(levels: Sequence[Fidelity], target: Fidelity) -> Array:
    """(t, s) of every level, [n, 2]; see the module's text. Levels beyond the target get negative coordinates."""
    sizes = np.array([[f.D, f.N] for f in levels], float).reshape(-1, AXES)
    if not (np.isfinite(sizes).all() and (sizes > 0).all() and target.N > 0 and target.D > 0):
        raise ValueError("fidelities need positive, finite N and D: check the trials' 'tokens' and 'N', and the target")
    below = np.log(np.array([target.D, target.N], float)) - np.log(sizes)
    span = np.abs(below).max(axis=0, initial=0.0)
    coordinates: Array = np.divide(below, span, out=np.zeros_like(below), where=span > 1e-12)
    return coordinates


def standardise(y: Array, level: NDArray[np.int64]) -> tuple[Array, float, float]:
    """Losses [n] at level ids [n] -> z [n], offset, scale: z = (y' - offset) / scale, tails compressed.

    y' = y up to an excess c over the level's lowest loss b, above it b + c (1 + ln((y - b) / c)), so that slopes
    agree at the joint. c is TAIL times the upper quartile of the positive excesses of all levels: a search that has
    settled has a small median, and compressing by that bends what it learned before. A loss that is not finite counts
    as the worst finite one of its level, or else of all. Raises ValueError when no loss is finite.

    Compressing from b upwards instead, c ln(1 + (y - b) / c), bends a level by where its best run happens to lie: with
    two or three runs per level this hid the drift of a planted optimum (25 runs on nine levels: up to a third of the
    cube off, against 0.05).
    """
    finite = np.isfinite(y)
    if not finite.any():
        raise ValueError("a surrogate needs at least one finite loss, got none: run other settings first")
    y, best = y.copy(), np.empty_like(y)
    for one in np.unique(level):
        here = level == one
        worst = y[here & finite] if (here & finite).any() else y[finite]
        y[here & ~finite] = worst.max()
        best[here] = y[here].min()
    excess = y - best
    if (excess > 0).any():
        c = TAIL * float(np.quantile(excess[excess > 0], 0.75))
        y = best + np.where(excess > c, c * (1.0 + np.log(np.maximum(excess, c) / c)), excess)
    _, ids = np.unique(level, return_inverse=True)
    within = y - (np.bincount(ids, y) / np.bincount(ids))[ids]
    freedom = len(y) - int(ids.max()) - 1
    scale = math.sqrt(float(within @ within) / freedom) if freedom > 0 else 0.0
    tiny = 1e-12 * max(1.0, float(np.abs(y).max()))
    if scale <= tiny:  # one run per level, or all the same
        scale = float(y.std()) if float(y.std()) > tiny else 1.0
    offset = float(y.mean())
    return (y - offset) / scale, offset, scale


@dataclass(frozen=True, eq=False)
class EnsembleMember:
    """One process with fixed hyperparameters, given z [n] at model inputs x [n, d + 2]."""

    kernel: Kernel
    noise: float  # variance of one observation, in units of z^2
    x: Tensor
    z: Tensor
    chol: Tensor  # [n, n], of the covariance with noise
    alpha: Tensor  # [n], its inverse times z - mean
    mean: Mean

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Model inputs [m, d + 2] -> mean [m], variance [m] in z units, and L^-1 k(X, x) [n, m]."""
        with torch.no_grad():
            cross = self.kernel.forward(self.x, x)
            v = torch.linalg.solve_triangular(self.chol, cross, upper=False)
            variance = (self.kernel.forward(x, x, diag=True) - v.square().sum(0)).clamp_min(0.0)
            expected = self.mean(x) + self.alpha @ cross
        return expected, variance, v

    def covariance(self, a: Tensor, v_a: Tensor, b: Tensor, v_b: Tensor) -> Tensor:
        """Posterior covariance [m, k] of points a and b, with what `posterior` gave for both."""
        with torch.no_grad():
            joint: Tensor = self.kernel.forward(a, b) - v_a.mT @ v_b
        return joint

    def with_pending(self, x: Tensor) -> EnsembleMember:
        """Told that runs at x will come out at their posterior mean: the mean stays."""
        x_all, z_all = torch.cat([self.x, x]), torch.cat([self.z, self.posterior(x)[0]])
        return condition(self.kernel, self.noise, x_all, z_all, self.mean)


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A fitted ensemble; it predicts z = (loss - offset) / scale, compressed far up."""

    best: EnsembleMember  # the most probable hyperparameters
    offset: float
    scale: float
    others: Callable[[], tuple[EnsembleMember, ...]] = (
        tuple  # made when first asked for: a suggestion seldom needs them
    )

    @cached_property
    def members(self) -> tuple[EnsembleMember, ...]:
        with one_thread():
            return self.best, *self.others()

    @property
    def x(self) -> Tensor:
        """[n, d + 2], what is conditioned on: runs, then pending runs."""
        return self.best.x

    @cached_property
    def model(self) -> SingleTaskGP:
        """The best member as BoTorch sees it."""
        best = self.best
        return botorch_model(best.kernel, best.noise, best.x, best.z, best.mean)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Model inputs [m, d + 2] -> mean [m] and variance [m] of the mixture, in z units."""
        parts = [member.posterior(x) for member in self.members]
        mean, variance = torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
        return mean.mean(0), variance.mean(0) + mean.var(0, unbiased=False)

    def predict(self, U: Array, T: Array) -> tuple[Array, Array]:
        """Features [m, d] at fidelity coordinates [m, 2] -> mean [m] and sd [m] of the loss there, without noise.

        In loss units near each level's best; far above it they are compressed as in `standardise`.
        """
        mean, variance = self.posterior(join(U, T))
        return (self.offset + self.scale * mean).numpy(), (self.scale * variance.sqrt()).numpy()

    def posterior_covariance(self, U: Array, T: Array) -> Array:
        """Joint posterior covariance of the losses at m points, [m, m], squared loss units."""
        x = join(U, T)
        parts = [(member, *member.posterior(x)) for member in self.members]
        within = torch.stack([member.covariance(x, v, x, v) for member, _, _, v in parts]).mean(0)
        means = torch.stack([mean for _, mean, _, _ in parts])
        between = torch.cov(means.mT, correction=0).reshape(len(x), len(x))
        joint: Array = (self.scale**2 * (within + between)).numpy()
        return joint

    def with_pending(self, U: Array, T: Array) -> Surrogate:
        """The same, told that running evaluations will come out at their posterior mean: the mean stays."""
        if not len(U):
            return self
        x = join(U, T)

        def others() -> tuple[EnsembleMember, ...]:
            return tuple(member.with_pending(x) for member in self.members[1:])

        return Surrogate(self.best.with_pending(x), self.offset, self.scale, others)


def join(U: Array, T: Array) -> Tensor:
    """Features [m, d] and fidelity coordinates [m, 2] (or one [2] for all) -> model inputs [m, d + 2]."""
    return torch.from_numpy(np.hstack([U, np.broadcast_to(T, (len(U), AXES))]))


def _cholesky(k: Tensor) -> Tensor:
    """Cholesky factor, with more jitter where rounding leaves a negative pivot. ValueError when that does not help."""
    scale = float(k.diagonal().mean())
    for jitter in (0.0, 1e-10, 1e-8, 1e-6):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(k + jitter * scale * torch.eye(len(k), dtype=k.dtype))
        if not int(failed):
            return factor
    raise ValueError(f"the covariance of {len(k)} runs is not positive definite: check their losses for huge values")


class BelievedBowl(Mean):  # type: ignore[misc]
    """A quadratic bowl over some feature columns whose centre moves linearly with the fidelity coordinates."""

    def __init__(self, centre: Centre) -> None:
        super().__init__()
        self.columns, self.curvature = list(centre.columns), centre.curvature
        self.at_target, self.moves = torch.from_numpy(centre.at_target), torch.from_numpy(centre.moves)

    def forward(self, x: Tensor) -> Tensor:
        off = x[..., self.columns] - self.at_target - x[..., -AXES:] @ self.moves
        bowl: Tensor = self.curvature * off.square().sum(-1)
        return bowl


def condition(kernel: Kernel, noise: float, x: Tensor, z: Tensor, mean: Mean | None = None) -> EnsembleMember:
    """The process with this covariance, noise variance and mean (0), given values z [n] at model inputs x [n, d + 2]."""
    mean = ZeroMean() if mean is None else mean
    with torch.no_grad():
        chol = _cholesky(kernel.forward(x, x) + noise * torch.eye(len(x), dtype=x.dtype))
        alpha = torch.cholesky_solve((z - mean(x)).unsqueeze(-1), chol).squeeze(-1)
    return EnsembleMember(kernel, noise, x, z, chol, alpha, mean)


def botorch_model(kernel: Kernel, noise: float, x: Tensor, z: Tensor, mean: Mean | None = None) -> SingleTaskGP:
    """A SingleTaskGP with this kernel, mean and noise variance, ready to predict."""
    median, sd = prior(x.shape[-1] - AXES)["log_noise"]
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


Fitter = Callable[[Tensor, Tensor], Iterable[tuple[Kernel, float]]]  # x, z -> kernels, noise variances; best first


def fit_bowl(x: Tensor, z: Tensor, near: EnsembleMember | None = None) -> Iterator[tuple[Kernel, float]]:
    """The default: FidelityKernel at the maximum a posteriori and at DRAWS draws around it.

    Two fixed starts: the prior's medians, and those with lengths one standard deviation shorter. From the first alone,
    fits to settled searches could end in a smooth, noisy mode some 60 nats worse. near: a member fitted to most of these
    runs; the search then begins and, after the least ITERATIONS, ends close to it. The draws come from a fixed Sobol sequence,
    so that the answer depends on nothing but the data.
    """
    d = x.shape[-1] - AXES
    mean, sd = box(d)
    posterior = Marginal(x.numpy(), z.numpy(), mean, sd, JITTER)
    low, high = mean - 3 * sd, mean + 3 * sd
    short = mean - sd * np.repeat(np.array(NAMES) == "log_length", [m.numel() for m, _ in prior(d).values()])

    def descend(start: Array, iterations: int) -> tuple[float, Array]:
        found = minimize(
            posterior,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(low, high, strict=True)),
            options={"maxiter": iterations},
        )
        return float(found.fun), found.x

    def kernel(theta: Array) -> tuple[Kernel, float]:
        p = unpack(torch.from_numpy(theta), d)
        return FidelityKernel(d, p), math.exp(2.0 * float(p["log_noise"])) + JITTER

    if near is None:
        _, ahead = min((descend(start, TRIAL_ITERATIONS) for start in (mean, short)), key=lambda fit: fit[0])
        _, best = descend(ahead, min(max(4000 // len(x), ITERATIONS[0]), ITERATIONS[1]))
    else:
        noise = 0.5 * math.log(max(near.noise - JITTER, JITTER))
        values = [value.detach().flatten() for value in near.kernel.values().values()]
        _, best = descend(np.clip(np.append(torch.cat(values).numpy(), noise), low, high), ITERATIONS[0])
    yield kernel(best)
    for theta in laplace_draws(posterior, best, sd, DRAWS):
        yield kernel(np.clip(theta, low, high))


def laplace_draws(posterior: Marginal, best: Array, sd: Array, draws: int) -> list[Array]:
    """Hyperparameters from the normal approximation of their posterior at its maximum, [h] each.

    In units of the prior's sd, where the prior's own curvature is 1: no direction is drawn wider than the prior, even
    where the maximum was not quite reached. A draw far less probable than the approximation says is pulled inwards.
    """
    from scipy.stats.qmc import Sobol  # slow to import

    value, slope = posterior(best)
    free = np.flatnonzero(posterior.matters)
    step = 1e-3
    hessian = np.empty((len(free), len(free)))
    for row, i in enumerate(free):
        moved = best.copy()
        moved[i] += step * sd[i]
        hessian[row] = ((posterior(moved)[1] - slope) * sd)[free] / step
    curvature, directions = np.linalg.eigh((hessian + hessian.T) / 2)
    spread = directions / np.sqrt(np.maximum(curvature, 1.0))
    normal = ndtri(
        Sobol(len(free), scramble=True, rng=np.random.default_rng(len(free))).random(2 ** math.ceil(math.log2(draws)))
    )
    kept = []
    for one in normal[:draws]:
        shift = np.zeros(len(best))
        shift[free] = sd[free] * (spread @ one)
        for shrink in (1.0, 0.6, 0.36, 0.2):
            theta = best + shrink * shift
            if posterior(theta)[0] - value < 0.5 * len(free) + 3.0:
                break
        kept.append(theta)
    return kept


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Let torch and numpy use a single thread: the matrices are small, and threads of several workers, which wait for
    each other actively, made an ask ten times slower on two busy cores."""
    pools: AbstractContextManager[Any] = _pools().limit(limits=1)
    return pools


def fit_surrogate(
    U: Array,
    T: Array,
    level: NDArray[np.int64],
    y: Array,
    *,
    fitter: Fitter = fit_bowl,
    centre: Centre | None = None,
) -> Surrogate:
    """Fit to n runs: features U [n, d] in [0, 1], fidelity coordinates T [n, 2], level ids, losses y [n].

    centre: of the bowl that is believed in beforehand; the fit is to what it leaves. Losses that are not finite are
    outcomes too (see `standardise`). Hyperparameters see at most FIT_ROWS runs: half of them those nearest the target
    in fidelity and then in loss, the others spread evenly over the rest. Raises ValueError on mismatched shapes or when
    no loss is finite.
    """
    n = len(y)
    if U.ndim != 2 or T.shape != (n, AXES) or len(U) != n or len(level) != n or not U.shape[1]:
        raise ValueError(
            f"needed U [n, d], T [n, 2], level [n], y [n] with d >= 1, "
            f"got {U.shape}, {T.shape}, {np.shape(level)}, {np.shape(y)}"
        )
    scores, offset, scale = standardise(np.asarray(y, float), np.asarray(level))
    x, z = join(np.asarray(U, float), np.asarray(T, float)), torch.from_numpy(scores)
    mean = ZeroMean() if centre is None else BelievedBowl(centre)
    rows = torch.from_numpy(_representative(np.abs(T).sum(1), scores))
    with one_thread():
        kernels = iter(fitter(x[rows], z[rows] - mean(x[rows])))
        best = condition(*next(kernels), x, z, mean)
    if n > FIT_ROWS:  # assumed: draws agree by then; each would have a factorisation of all rows
        return Surrogate(best, offset, scale)
    return Surrogate(best, offset, scale, lambda: tuple(condition(*fitted, x, z, mean) for fitted in kernels))


def _representative(distance: Array, z: Array) -> NDArray[np.int64]:
    """At most FIT_ROWS of n rows, ascending."""
    n = len(z)
    if n <= FIT_ROWS:
        return np.arange(n)
    order = np.lexsort((z, np.round(distance, 9)))
    near, rest = order[: FIT_ROWS // 2], order[FIT_ROWS // 2 :]
    even = rest[np.linspace(0, len(rest) - 1, FIT_ROWS - len(near)).astype(int)]
    return np.sort(np.concatenate([near, even]))
