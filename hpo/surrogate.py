"""A Gaussian process over settings and fidelity, and what to run next according to it.

A point is x = (u, t, s): settings u in the unit cube (a category is a block of 0/1 columns), and how far below the
target the run is, t in tokens and s in size:

    t = ln(D_target / D) / ln(D_target / D_lowest),    s = ln(N_target / N) / ln(N_target / N_lowest)

The target is (0, 0), the lowest fidelity seen or offered is 1, an axis along which nothing varies is 0. With tau
running over the two axes t and s, c = u - 1/2, and primes for the second point,

    k = 9 [1 + sum_tau (tau tau' + 0.1 tau^2 tau'^2)]                                    level offset, fixed
      + bowl^2 [(1 + t t' + s s') c.c' + 4 c^2.c'^2]                                     bowl whose centre drifts
      + fine^2 M52(r) [1 + sum_tau (smooth_tau^2 (tau tau' + 0.3 tau^2 tau'^2) + rough_tau^2 b(tau, tau'))]
    r^2 = sum_i ((u_i - t d_i - s e_i) - (u'_i - t' d_i - s' e_i))^2 / length_i^2        warp by the drifts d, e
    b(tau, tau') = (|tau| + |tau'| - |tau - tau'|) / 2                                   Brownian: the smaller one

plus noise^2 + 1e-8 on the diagonal. All is a sum over the axes: for the level offset because loss laws are sums of a
term in N and a term in D (Hoffmann et al., arXiv 2203.15556); for drift and bias this is assumed, not measured. The
devices do different work: the bowl makes the drift of the optimum Bayesian, the warp moves the fine structure along,
and the last factor lets low fidelities differ from the target. b is zero at the target: an extrapolation is never
quite believed.

Hyperparameters are maximum a posteriori with normal priors (`prior`). What to run is the knowledge gradient per cost
on a discrete set (Frazier, Powell and Dayanik 2009; multi-fidelity: Poloczek, Wang and Frazier, arXiv 1603.00389),
preferred to expected improvement times correlation because it values a cheap run by what it changes at the target,
and is no longer to write: one posterior covariance and nine quantiles.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri
from torch import Tensor

from scaling.compute import Fidelity

with warnings.catch_warnings():
    # linear_operator compiles with torch.jit.script when it is imported, which newer torch deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from botorch.models import SingleTaskGP
    from gpytorch.constraints import GreaterThan, Interval
    from gpytorch.kernels import Kernel
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.means import ZeroMean
    from gpytorch.priors import LogNormalPrior, NormalPrior

Array = NDArray[np.float64]

AXES = 2  # tokens, size: the last two columns of every model input
JITTER = 1e-8
TAIL = 3.0  # excess losses are compressed from so many upper quartiles on
FIT_ROWS = 250  # hyperparameters are fitted to at most so many rows (every k-th); all rows are conditioned on
NAMES = ("log_fine", "log_bowl", "log_smooth", "log_rough", "log_length", "drift", "log_noise")
QUANTILES = ndtri((np.arange(1, 10) - 0.5) / 9)


class Domain(Protocol):
    """The settings as a unit cube with one coordinate per parameter."""

    @property
    def nominal(self) -> NDArray[np.bool_]:
        """[p], which coordinates are categories without an order."""

    def snap(self, cube: Array) -> Array:
        """[m, p] -> [m, p], each point moved to the nearest one that stands for real settings."""

    def features(self, cube: Array) -> Array:
        """[m, p] -> [m, d], the model's inputs of snapped points."""


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


def prior(d: int) -> dict[str, tuple[Tensor, float]]:
    """Mean and standard deviation of the normal prior of each hyperparameter, for d feature columns.

    The fit is bounded at three standard deviations from the mean. Natural logarithms; drift [2, d] is in cube widths
    per unit of t or s.
    """

    def log_median(median: float, *shape: int) -> Tensor:
        return torch.full(shape, math.log(median), dtype=torch.float64)

    return {
        "log_fine": (log_median(1.0, 1), 1.0),
        "log_bowl": (log_median(0.5, 1), 1.0),
        "log_smooth": (log_median(0.3, AXES), 1.0),
        "log_rough": (log_median(0.1, AXES), 1.0),
        "log_length": (log_median(0.5 * max(1.0, d / 2) ** 0.25, d), 0.8),
        "drift": (torch.zeros(AXES, d, dtype=torch.float64), 0.3),
        "log_noise": (log_median(0.01, 1), 1.0),
    }


def _box(d: int) -> tuple[Array, Array]:
    """Mean and standard deviation of all hyperparameters in one vector, in the order of NAMES."""
    priors = prior(d).values()
    mean: Array = torch.cat([mean.flatten() for mean, _ in priors]).numpy()
    return mean, np.concatenate([np.full(mean.numel(), sd) for mean, sd in priors])


def _over_axes(x: Tensor) -> Tensor:
    """Sum over the axis of tokens and sizes; several times faster than a reduction over so short a dimension."""
    return x[..., 0, :, :] + x[..., 1, :, :]


def _geometry(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What of k(a, b) does not depend on hyperparameters: offset, bowl / bowl^2, and per axis smooth, rough."""
    c_a, c_b = a[..., :-AXES] - 0.5, b[..., :-AXES] - 0.5
    one, other = (
        a[..., -AXES:].mT.unsqueeze(-1),
        b[..., -AXES:].mT.unsqueeze(-2),
    )  # [..., axis, n, 1], [..., axis, 1, m]
    product = one * other
    offset = 9.0 * (1.0 + _over_axes(product + 0.1 * product.square()))
    bowl = (1.0 + _over_axes(product)) * (c_a @ c_b.mT) + 4.0 * (c_a.square() @ c_b.square().mT)
    smooth = product + 0.3 * product.square()
    rough = 0.5 * (one.abs() + other.abs() - (one - other).abs())
    return offset, bowl, smooth, rough


def _combine(p: dict[str, Tensor], a: Tensor, b: Tensor, geometry: tuple[Tensor, ...]) -> Tensor:
    offset, bowl, smooth, rough = geometry
    inverse = torch.exp(-p["log_length"])
    x_a = (a[..., :-AXES] - a[..., -AXES:] @ p["drift"]) * inverse
    x_b = (b[..., :-AXES] - b[..., -AXES:] @ p["drift"]) * inverse
    r2 = x_a.square().sum(-1).unsqueeze(-1) + x_b.square().sum(-1).unsqueeze(-2) - 2.0 * (x_a @ x_b.mT)
    # The floor keeps the root's derivative finite; M52 is flat at 0, so that 1e-15 there changes nothing.
    root = torch.sqrt(5.0 * r2.clamp_min(1e-15))
    matern = (1.0 + root + root.square() / 3.0) * torch.exp(-root)
    weights = torch.exp(2.0 * torch.stack([p["log_smooth"], p["log_rough"]])).unsqueeze(-1).unsqueeze(-1)
    factor = 1.0 + _over_axes(weights[0] * smooth + weights[1] * rough)
    return offset + torch.exp(2.0 * p["log_bowl"]) * bowl + torch.exp(2.0 * p["log_fine"]) * matern * factor


def covariance(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """k(a, b), [..., n, d + 2] and [..., m, d + 2] -> [..., n, m]: the module's formula without the noise."""
    return _combine(p, a, b, _geometry(a, b))


def _variance(p: dict[str, Tensor], a: Tensor) -> Tensor:
    """k(x, x) of every row, [..., n]."""
    c2, f = (a[..., :-AXES] - 0.5).square(), a[..., -AXES:]
    f2 = f.square()
    offset = 9.0 * (1.0 + (f2 + 0.1 * f2.square()).sum(-1))
    bowl = (1.0 + f2.sum(-1)) * c2.sum(-1) + 4.0 * c2.square().sum(-1)
    smooth, rough = torch.exp(2.0 * p["log_smooth"]), torch.exp(2.0 * p["log_rough"])
    factor = 1.0 + (smooth * (f2 + 0.3 * f2.square()) + rough * f.abs()).sum(-1)
    return offset + torch.exp(2.0 * p["log_bowl"]) * bowl + torch.exp(2.0 * p["log_fine"]) * factor


class FidelityKernel(Kernel):  # type: ignore[misc]
    """The module's covariance as a GPyTorch kernel over inputs [..., n, d + 2] (settings, t, s).

    Parameters are the logarithms themselves (drifts as they are), with normal priors and the fit's box as bounds, so
    that GPyTorch's marginal likelihood and BoTorch's fitting see the same posterior as `fit_surrogate`.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        for name, (mean, sd) in prior(d).items():
            if name == "log_noise":  # belongs to the likelihood
                continue
            self.register_parameter(name, torch.nn.Parameter(mean.clone()))
            self.register_prior(f"{name}_prior", NormalPrior(mean, torch.full_like(mean, sd)), name)
            # transform=None: bounds for the optimizer, not a reparametrisation
            middle = float(mean.flatten()[0])  # the same for all elements, and BoTorch wants one number
            self.register_constraint(name, Interval(middle - 3 * sd, middle + 3 * sd, transform=None))

    def values(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES[:-1]}

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        if diag:
            if torch.equal(x1, x2):
                return _variance(self.values(), x1)
            return covariance(self.values(), x1.unsqueeze(-2), x2.unsqueeze(-2))[..., 0, 0]
        return covariance(self.values(), x1, x2)


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A fitted process. `model` is BoTorch's view of it; it predicts z = (loss - offset) / scale, compressed far up."""

    model: SingleTaskGP
    p: dict[str, Tensor]  # hyperparameters
    x: Tensor  # [n, d + 2], what is conditioned on: runs, then pending runs
    z: Tensor  # [n]
    chol: Tensor  # [n, n], of the covariance with noise
    alpha: Tensor  # [n], its inverse times z
    offset: float
    scale: float

    @property
    def noise(self) -> float:
        """Variance of one observation, in units of z^2."""
        return math.exp(2.0 * float(self.p["log_noise"])) + JITTER

    def predict(self, U: Array, T: Array) -> tuple[Array, Array]:
        """Features [m, d] at fidelity coordinates [m, 2] -> mean [m] and sd [m] of the loss there, without noise.

        In loss units near each level's best; far above it they are compressed as in `standardise`.
        """
        mean, variance, _ = self.posterior(join(U, T))
        return (self.offset + self.scale * mean).numpy(), (self.scale * variance.sqrt()).numpy()

    def posterior_covariance(self, U: Array, T: Array) -> Array:
        """Joint posterior covariance of the losses at m points, [m, m], squared loss units."""
        x = join(U, T)
        _, _, v = self.posterior(x)
        with torch.no_grad():
            joint: Array = (self.scale**2 * (covariance(self.p, x, x) - v.mT @ v)).numpy()
        return joint

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Model inputs [m, d + 2] -> mean [m], variance [m] in z units, and L^-1 k(X, x) [n, m]."""
        with torch.no_grad():
            cross = covariance(self.p, self.x, x)
            v = torch.linalg.solve_triangular(self.chol, cross, upper=False)
            variance = (_variance(self.p, x) - v.square().sum(0)).clamp_min(0.0)
        return self.alpha @ cross, variance, v

    def with_pending(self, U: Array, T: Array) -> Surrogate:
        """The same process, told that running evaluations will come out at their posterior mean: the mean stays."""
        if not len(U):
            return self
        x = join(U, T)
        return condition(
            self.p, torch.cat([self.x, x]), torch.cat([self.z, self.posterior(x)[0]]), self.offset, self.scale
        )


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


def condition(p: dict[str, Tensor], x: Tensor, z: Tensor, offset: float, scale: float) -> Surrogate:
    """The process with hyperparameters p given values z [n] at model inputs x [n, d + 2]."""
    noise = math.exp(2.0 * float(p["log_noise"])) + JITTER
    with torch.no_grad():
        chol = _cholesky(covariance(p, x, x) + noise * torch.eye(len(x), dtype=x.dtype))
        alpha = torch.cholesky_solve(z.unsqueeze(-1), chol).squeeze(-1)
    return Surrogate(botorch_model(p, x, z, noise), p, x, z, chol, alpha, offset, scale)


def botorch_model(p: dict[str, Tensor], x: Tensor, z: Tensor, noise: float) -> SingleTaskGP:
    """A SingleTaskGP with FidelityKernel at these hyperparameters, ready to predict."""
    mean, sd = prior(x.shape[-1] - AXES)["log_noise"]
    likelihood = GaussianLikelihood(
        noise_prior=LogNormalPrior(2.0 * float(mean), 2.0 * sd),
        noise_constraint=GreaterThan(JITTER, transform=None, initial_value=noise),
    )
    kernel = FidelityKernel(x.shape[-1] - AXES)
    model = SingleTaskGP(
        x, z.unsqueeze(-1), likelihood=likelihood, covar_module=kernel, mean_module=ZeroMean(), outcome_transform=None
    )
    with torch.no_grad():
        for name, parameter in kernel.values().items():
            parameter.copy_(p[name])
        likelihood.noise_covar.raw_noise.fill_(noise)
    return model.eval()


def _unpack(theta: Tensor, d: int) -> dict[str, Tensor]:
    shapes = {name: mean.shape for name, (mean, _) in prior(d).items()}
    parts = torch.split(theta, [shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def negative_log_posterior(
    theta: Array, x: Tensor, z: Tensor, geometry: tuple[Tensor, ...] | None = None
) -> tuple[float, Array]:
    """-ln p(z | theta) - ln p(theta) but for the prior's constant, and its gradient; theta flat, as in NAMES."""
    variable = torch.tensor(theta, requires_grad=True)
    p = _unpack(variable, x.shape[-1] - AXES)
    n, eye = len(x), torch.eye(len(x), dtype=x.dtype)
    k = _combine(p, x, x, geometry or _geometry(x, x)) + (torch.exp(2.0 * p["log_noise"]) + JITTER) * eye
    chol = _cholesky(k.detach())
    alpha = torch.cholesky_solve(z.unsqueeze(-1), chol)
    value = 0.5 * float(z @ alpha.squeeze(-1)) + float(chol.diagonal().log().sum()) + 0.5 * n * math.log(2 * math.pi)
    # d value / dK = (K^-1 - alpha alpha^T) / 2 is known, so that autograd need not go through the factorisation.
    (gradient,) = torch.autograd.grad(k, variable, 0.5 * (torch.cholesky_inverse(chol) - alpha @ alpha.mT))
    mean, sd = _box(x.shape[-1] - AXES)
    off = (theta - mean) / sd
    return value + 0.5 * float(off @ off), gradient.numpy() + off / sd


def fit_surrogate(U: Array, T: Array, level: NDArray[np.int64], y: Array, *, iterations: int = 40) -> Surrogate:
    """Fit the process to n runs: features U [n, d] in [0, 1], fidelity coordinates T [n, 2], level ids, losses y [n].

    Losses that are not finite are outcomes too (see `standardise`). Two fixed starts, so that the answer depends on
    nothing but the data: the prior's medians, and those with lengths one standard deviation shorter. From the first
    alone, fits to settled searches could end in a smooth, noisy mode some 60 nats worse. Raises ValueError on
    mismatched shapes or when no loss is finite.
    """
    n = len(y)
    if U.ndim != 2 or T.shape != (n, AXES) or len(U) != n or len(level) != n or not U.shape[1]:
        raise ValueError(
            f"needed U [n, d], T [n, 2], level [n], y [n] with d >= 1, "
            f"got {U.shape}, {T.shape}, {np.shape(level)}, {np.shape(y)}"
        )
    scores, offset, scale = standardise(np.asarray(y, float), np.asarray(level))
    x, z = join(np.asarray(U, float), np.asarray(T, float)), torch.from_numpy(scores)
    stride = -(-n // FIT_ROWS)
    x_fit, z_fit = x[::stride], z[::stride]
    mean, sd = _box(U.shape[1])
    short = mean - sd * np.repeat(np.array(NAMES) == "log_length", [m.numel() for m, _ in prior(U.shape[1]).values()])
    results = [
        minimize(
            negative_log_posterior,
            start,
            args=(x_fit, z_fit, _geometry(x_fit, x_fit)),
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(mean - 3 * sd, mean + 3 * sd, strict=True)),
            options={"maxiter": iterations},
        )
        for start in (mean, short)
    ]
    p = _unpack(torch.from_numpy(min(results, key=lambda r: float(r.fun)).x), U.shape[1])
    return condition(p, x, z, offset, scale)


def _jitter(rng: np.random.Generator, domain: Domain, centres: Array, per: int, sd: float) -> Array:
    """`per` neighbours of each centre; coordinates move with probability max(1/2, 2/p), categories are drawn afresh."""
    cube = np.repeat(centres, per, axis=0)
    chance = max(0.5, 2 / cube.shape[1])
    moved = np.clip(cube + sd * rng.standard_normal(cube.shape), 0.0, 1.0)
    moves = rng.random(cube.shape) < np.where(domain.nominal, min(chance, 2 * sd), chance)
    return domain.snap(np.where(moves, np.where(domain.nominal, rng.random(cube.shape), moved), cube))


def _target_mean(surrogate: Surrogate, domain: Domain, cube: Array) -> Array:
    mean: Array = surrogate.posterior(join(domain.features(cube), np.zeros(AXES)))[0].numpy()
    return mean


def _pool(surrogate: Surrogate, domain: Domain, seen: Array, rng: np.random.Generator, uniform: int) -> Array:
    """Uniform points, all settings seen, and neighbours at three ranges of the eight best by mean at the target."""
    pool = np.vstack([domain.snap(rng.random((uniform, seen.shape[1]))), seen])
    mean = _target_mean(surrogate, domain, pool)
    for sd in (0.15, 0.05, 0.015):
        best = pool[np.argsort(mean, kind="stable")[:8]]
        new = _jitter(rng, domain, best, -(-uniform // 16), sd)
        pool, mean = np.vstack([pool, new]), np.append(mean, _target_mean(surrogate, domain, new))
    return pool


def recommend(surrogate: Surrogate, domain: Domain, seen: Array, seed: Sequence[int]) -> Array:
    """The cube point [p] with the least mean + sd / 2 at the target, among the 200 of a refined pool best by mean.

    seen [n, p]: cube points of all runs, snapped.
    """
    rng = np.random.default_rng(seed)
    pool = _pool(surrogate, domain, seen, rng, 400)
    for sd in (0.02, 0.006):
        best = pool[np.argsort(_target_mean(surrogate, domain, pool), kind="stable")[:4]]
        pool = np.vstack([pool, _jitter(rng, domain, best, 40, sd)])
    mean, variance, _ = surrogate.posterior(join(domain.features(pool), np.zeros(AXES)))
    good = np.argsort(mean.numpy(), kind="stable")[:200]
    chosen: Array = pool[good[np.argmin((mean + 0.5 * variance.sqrt()).numpy()[good])]]
    return chosen


def knowledge_gradient(surrogate: Surrogate, anchors: Tensor) -> Callable[[Tensor], Array]:
    """A function of x [m, d + 2]: how much one run at each is expected to lower the least mean over the anchors, [m].

    anchors [a, d + 2]: points at the target. In units of z. Zero where nothing is left to learn.
    """
    mean, _, v_a = surrogate.posterior(anchors)

    def gain(x: Tensor) -> Array:
        _, variance, v_x = surrogate.posterior(x)
        with torch.no_grad():
            shift = (covariance(surrogate.p, anchors, x) - v_a.mT @ v_x) / torch.sqrt(variance + surrogate.noise)
            least = torch.stack([(mean.unsqueeze(-1) + q * shift).amin(0) for q in QUANTILES]).mean(0)
            gained: Array = torch.where(variance > 1e-7, (mean.min() - least).clamp_min(0.0), 0.0).numpy()
        return gained

    return gain


def _is_known(surrogate: Surrogate, x: Tensor) -> NDArray[np.bool_]:
    """Which rows were run, or are running, at just that fidelity: [m]. Doing it again is not a new configuration."""
    known: NDArray[np.bool_] = ((x.unsqueeze(1) - surrogate.x).abs().amax(-1).amin(1) < 1e-9).numpy()
    return known


def suggest(
    surrogate: Surrogate,
    domain: Domain,
    seen: Array,
    slots: Array,
    costs: Array,
    *,
    top: int | None,
    spent: tuple[float, float],
    seed: Sequence[int],
    share: float = 0.5,
) -> tuple[Array, int]:
    """The cube point [p] and the slot with the largest knowledge gradient per cost.

    seen [n, p]: cube points of all runs; slots [l, 2]: fidelity coordinates on offer; costs [l]: of one run there,
    where one at the highest fidelity costs 1; top: the slot of that highest fidelity, None when it is not offered;
    spent: cost so far below it, and in all. At least about `share` of the cost goes to the highest fidelity: when the
    winner would break that, the present recommendation is run there instead, a safeguard against low fidelities that
    mislead.
    """
    rng = np.random.default_rng(seed)
    pool = _pool(surrogate, domain, seen, rng, 200)
    at_target = join(domain.features(pool), np.zeros(AXES))
    mean_t, variance, _ = surrogate.posterior(at_target)
    mean, sd = mean_t.numpy(), variance.sqrt().clamp_min(1e-12).numpy()
    order = np.argsort(mean, kind="stable")
    anchors = at_target[np.concatenate([order[:128], rng.permutation(order[128:])[:128]])]
    gap = (mean[order[0]] - mean) / sd
    improvement = sd * (gap * ndtr(gap) + np.exp(-0.5 * gap**2) / math.sqrt(2 * math.pi))
    by_improvement = np.argsort(-improvement, kind="stable")
    candidates = pool[np.concatenate([by_improvement[:60], order[:15], rng.permutation(len(pool))[:75]])]

    knowledge = knowledge_gradient(surrogate, anchors)

    def gains(cube: Array, slot: int) -> Array:
        x = join(domain.features(cube), slots[slot])
        return np.where(_is_known(surrogate, x), -1.0, knowledge(x))

    winner, slot, highest = candidates[0], int(np.argmin(costs)), -math.inf
    for level in range(len(slots)):
        points, gain = candidates, gains(candidates, level)
        for reach in (0.1, 0.03):
            near = _jitter(rng, domain, points[np.argsort(-gain, kind="stable")[:4]], 12, reach)
            points, gain = np.vstack([points, near]), np.append(gain, gains(near, level))
        best = int(np.argmax(gain))
        score = float(gain[best]) / (float(costs[level]) + 0.02)
        if score > highest:
            winner, slot, highest = points[best], level, score

    low, total = spent
    if top is not None and slot != top and low + float(costs[slot]) > (1 - share) * (total + 1):
        winner, slot = recommend(surrogate, domain, seen, [*seed, 1]), top
        if float(gains(winner[None], top)[0]) <= 1e-12:  # known there already
            new = ~_is_known(surrogate, join(domain.features(pool), slots[top]))
            if new.any():
                winner = pool[np.flatnonzero(new)[np.argmax(improvement[new])]]
    return winner, slot
