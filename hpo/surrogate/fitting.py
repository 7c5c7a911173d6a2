"""Fit a surrogate to runs: the default kernel, draws of its hyperparameters, the ensemble conditioned on all runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import ndtri
from torch import Tensor

from hpo.surrogate.gp import (
    JITTER,
    BowlMean,
    EnsembleMember,
    Surrogate,
    condition_on_runs,
    join_inputs,
    limit_to_one_thread,
)
from hpo.surrogate.inputs import AXES, BowlPrior, standardise
from hpo.surrogate.kernel import HYPERPARAMETERS, FidelityKernel, flatten_priors, make_priors, unpack_hyperparameters
from hpo.surrogate.marginal_likelihood import NegativeLogPosterior
from scaling.common.arrays import Array

# After hpo.surrogate.gp, which imports these with a dependency's deprecation warning silenced.
# isort: split
from gpytorch.kernels import Kernel
from gpytorch.means import ZeroMean

# Hyperparameters are fitted to at most this many rows. The process is conditioned on all rows.
FIT_ROWS = 200
# Number of ensemble members besides the best.
LAPLACE_DRAWS = 4
# Iterations from each of the two starts; then the better one continues.
TRIAL_ITERATIONS = 20
# Fewest and most iterations. Between them 4,000 over the number of runs: small fits converge, large ones stay fast.
ITERATIONS = (30, 80)

# A function of model inputs x [n, d + 2] and values z [n] that returns kernels with their noise variances, best first.
Fitter = Callable[[Tensor, Tensor], Iterable[tuple[Kernel, float]]]


def fit_bowl_kernel(x: Tensor, z: Tensor, near: EnsembleMember | None = None) -> Iterator[tuple[Kernel, float]]:
    """Fit the default kernel, `FidelityKernel`: the maximum a posteriori and `LAPLACE_DRAWS` draws around it.

    The optimizer has two fixed starts: the medians of the prior, and the same with lengths one standard deviation
    shorter. From the first alone, fits to settled searches could end in a smooth, noisy mode about 60 nats worse. The
    draws come from a fixed Sobol sequence, so the result depends on the data only.

    Args:
        x: Model inputs [n, d + 2].
        z: Standardised losses [n].
        near: A member fitted to most of these runs. The optimizer then starts from its hyperparameters and takes the
            smaller number of `ITERATIONS`.

    Yields:
        Kernel and noise variance, the best first.
    """
    d = x.shape[-1] - AXES
    mean, sd = flatten_priors(d)
    posterior = NegativeLogPosterior(x.numpy(), z.numpy(), mean, sd, JITTER)
    low, high = mean - 3 * sd, mean + 3 * sd
    shorter = mean - sd * np.repeat(
        np.array(HYPERPARAMETERS) == "log_length", [m.numel() for m, _ in make_priors(d).values()]
    )

    def descend(start: Array, iterations: int) -> tuple[float, Array]:
        result = minimize(
            posterior,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(low, high, strict=True)),
            options={"maxiter": iterations},
        )
        return float(result.fun), result.x

    def build_kernel(theta: Array) -> tuple[Kernel, float]:
        p = unpack_hyperparameters(torch.from_numpy(theta), d)
        return FidelityKernel(d, p), math.exp(2.0 * float(p["log_noise"])) + JITTER

    if near is None:
        _, better = min((descend(start, TRIAL_ITERATIONS) for start in (mean, shorter)), key=lambda fit: fit[0])
        _, best = descend(better, min(max(4000 // len(x), ITERATIONS[0]), ITERATIONS[1]))
    else:
        noise = 0.5 * math.log(max(near.noise - JITTER, JITTER))
        values = [value.detach().flatten() for value in near.kernel.values().values()]
        _, best = descend(np.clip(np.append(torch.cat(values).numpy(), noise), low, high), ITERATIONS[0])
    yield build_kernel(best)
    for theta in draw_laplace_samples(posterior, best, sd, LAPLACE_DRAWS):
        yield build_kernel(np.clip(theta, low, high))


def draw_laplace_samples(posterior: NegativeLogPosterior, best: Array, sd: Array, draws: int) -> list[Array]:
    """Draw hyperparameters from the normal approximation of their posterior at its maximum.

    The approximation is made in units of the prior's standard deviation, where the curvature of the prior is 1. So no
    direction is drawn wider than the prior, even if the optimizer stopped short of the maximum. A draw that is far less
    probable than the approximation predicts is pulled towards the maximum.

    Args:
        posterior: Negative log posterior of the hyperparameters.
        best: Its minimum, [h].
        sd: Standard deviation of the prior, [h].
        draws: How many to draw.

    Returns:
        The draws, [h] each, from a fixed Sobol sequence.
    """
    # Slow to import.
    from scipy.stats.qmc import Sobol

    value, slope = posterior(best)
    free = np.flatnonzero(posterior.is_free)
    step = 1e-3
    hessian = np.empty((len(free), len(free)))
    for row, i in enumerate(free):
        shifted = best.copy()
        shifted[i] += step * sd[i]
        hessian[row] = ((posterior(shifted)[1] - slope) * sd)[free] / step
    curvature, directions = np.linalg.eigh((hessian + hessian.T) / 2)
    spread = directions / np.sqrt(np.maximum(curvature, 1.0))
    normal = ndtri(
        Sobol(len(free), scramble=True, rng=np.random.default_rng(len(free))).random(2 ** math.ceil(math.log2(draws)))
    )
    samples = []
    for variates in normal[:draws]:
        shift = np.zeros(len(best))
        shift[free] = sd[free] * (spread @ variates)
        for shrink in (1.0, 0.6, 0.36, 0.2):
            theta = best + shrink * shift
            if posterior(theta)[0] - value < 0.5 * len(free) + 3.0:
                break
        samples.append(theta)
    return samples


def fit_surrogate(
    U: Array,
    T: Array,
    level: NDArray[np.int64],
    y: Array,
    *,
    fitter: Fitter = fit_bowl_kernel,
    bowl: BowlPrior | None = None,
) -> Surrogate:
    """Fit a surrogate to n runs.

    Hyperparameters are fitted to at most `FIT_ROWS` runs: half of them are those nearest to the target in fidelity and
    then in loss, and the others are spread evenly over the rest.

    Args:
        U: Features [n, d], in [0, 1].
        T: Fidelity coordinates [n, 2].
        level: Ids of the fidelities [n].
        y: Losses [n]. Losses that are not finite are outcomes too, see `standardise`.
        fitter: Fits the kernels of the ensemble.
        bowl: Prior mean. The kernels are fitted to the residuals from it.

    Returns:
        The surrogate, conditioned on all runs.

    Raises:
        ValueError: If shapes do not match, or no loss is finite.
    """
    n = len(y)
    if U.ndim != 2 or T.shape != (n, AXES) or len(U) != n or len(level) != n or not U.shape[1]:
        raise ValueError(
            f"needed U [n, d], T [n, 2], level [n], y [n] with d >= 1, "
            f"got {U.shape}, {T.shape}, {np.shape(level)}, {np.shape(y)}"
        )
    scores, offset, scale = standardise(np.asarray(y, float), np.asarray(level))
    x, z = join_inputs(np.asarray(U, float), np.asarray(T, float)), torch.from_numpy(scores)
    mean = ZeroMean() if bowl is None else BowlMean(bowl)
    rows = torch.from_numpy(_select_fit_rows(np.abs(T).sum(1), scores))
    with limit_to_one_thread():
        kernels = iter(fitter(x[rows], z[rows] - mean(x[rows])))
        best = condition_on_runs(*next(kernels), x, z, mean)
    # Assumed, not measured: with this many runs the draws agree. Each would need a factorisation of all rows.
    if n > FIT_ROWS:
        return Surrogate(best, offset, scale)
    return Surrogate(best, offset, scale, lambda: tuple(condition_on_runs(*kernel, x, z, mean) for kernel in kernels))


def _select_fit_rows(distance: Array, z: Array) -> NDArray[np.int64]:
    """Return the indices of at most `FIT_ROWS` of n rows, ascending.

    Args:
        distance: Sum of the absolute fidelity coordinates, [n].
        z: Standardised losses, [n].
    """
    n = len(z)
    if n <= FIT_ROWS:
        return np.arange(n)
    order = np.lexsort((z, np.round(distance, 9)))
    near, rest = order[: FIT_ROWS // 2], order[FIT_ROWS // 2 :]
    even = rest[np.linspace(0, len(rest) - 1, FIT_ROWS - len(near)).astype(int)]
    return np.sort(np.concatenate([near, even]))
