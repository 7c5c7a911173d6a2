"""Covariance of losses over settings and fidelity, as a GPyTorch kernel, with priors of its hyperparameters.

A point is x = (u, t, s): settings u in the unit cube (a category is a block of 0/1 columns), and how far below the
target the run is, t in tokens and s in size:

    t = ln(D_target / D) / ln(D_target / D_lowest),    s = ln(N_target / N) / ln(N_target / N_lowest)

The target is (0, 0), the lowest fidelity seen or offered is 1, and an axis along which nothing varies is 0. With tau
running over the two axes t and s, c = u - 1/2, and primes for the second point,

    k = 9 [1 + sum_tau (tau tau' + 0.1 tau^2 tau'^2)]                                    level offset, fixed
      + bowl^2 [(1 + t t' + s s') c.c' + 4 c^2.c'^2]                                     bowl whose centre drifts
      + fine^2 M52(r) [1 + sum_tau (smooth_tau^2 (tau tau' + 0.3 tau^2 tau'^2) + rough_tau^2 b(tau, tau'))]
    r^2 = sum_i ((u_i - t d_i - s e_i) - (u'_i - t' d_i - s' e_i))^2 / length_i^2        warp by the drifts d, e
    b(tau, tau') = (|tau| + |tau'| - |tau - tau'|) / 2                                   Brownian: the smaller one

plus noise^2 + 1e-8 on the diagonal. Every part is a sum over the axes. For the level offset the reason is that loss
laws are sums of a term in N and a term in D (Hoffmann et al., arXiv 2203.15556); for drift and bias this is assumed,
not measured. The parts have different purposes: the bowl gives the drift of the optimum a posterior, the warp moves the
fine structure along with it, and the last factor lets low fidelities differ from the target. Since b is zero at the
target, some uncertainty always remains in an extrapolation from lower fidelities.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo.surrogate.inputs import AXES
from scaling.common.arrays import Array

with warnings.catch_warnings():
    # linear_operator calls torch.jit.script when it is imported, which newer versions of torch deprecate.
    warnings.simplefilter("ignore", DeprecationWarning)
    from gpytorch.constraints import Interval
    from gpytorch.kernels import Kernel
    from gpytorch.priors import NormalPrior

# The hyperparameters in the order of the vector theta.
HYPERPARAMETERS = ("log_fine", "log_bowl", "log_smooth", "log_rough", "log_length", "drift", "log_noise")


def make_priors(d: int) -> dict[str, tuple[Tensor, float]]:
    """Return the normal prior of each hyperparameter.

    The fit is bounded at three standard deviations from the mean. Logarithms are natural.

    Args:
        d: Number of feature columns.

    Returns:
        Mean and standard deviation by name, in the order of `HYPERPARAMETERS`. The drift [2, d] is in cube widths per
        unit of t or s.
    """

    def make_log_median(median: float, *shape: int) -> Tensor:
        return torch.full(shape, math.log(median), dtype=torch.float64)

    return {
        "log_fine": (make_log_median(1.0, 1), 1.0),
        "log_bowl": (make_log_median(0.5, 1), 1.0),
        "log_smooth": (make_log_median(0.3, AXES), 1.0),
        "log_rough": (make_log_median(0.1, AXES), 1.0),
        "log_length": (make_log_median(0.5 * max(1.0, d / 2) ** 0.25, d), 0.8),
        "drift": (torch.zeros(AXES, d, dtype=torch.float64), 0.3),
        "log_noise": (make_log_median(0.03, 1), 1.5),
    }


def flatten_priors(d: int) -> tuple[Array, Array]:
    """Return the prior means and standard deviations of all hyperparameters as two vectors [h].

    Args:
        d: Number of feature columns.
    """
    priors = make_priors(d).values()
    mean: Array = torch.cat([mean.flatten() for mean, _ in priors]).numpy()
    return mean, np.concatenate([np.full(mean.numel(), sd) for mean, sd in priors])


def unpack_hyperparameters(theta: Tensor, d: int) -> dict[str, Tensor]:
    """Split a vector [h] into the hyperparameters by name, for d feature columns."""
    shapes = {name: mean.shape for name, (mean, _) in make_priors(d).items()}
    parts = torch.split(theta, [shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _sum_over_axes(x: Tensor) -> Tensor:
    """Sum over the two fidelity axes; several times faster than `torch.sum` over so short a dimension."""
    return x[..., 0, :, :] + x[..., 1, :, :]


def compute_covariance(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Evaluate the module's formula without the noise.

    Args:
        p: Hyperparameters by name.
        a: Points [..., n, d + 2].
        b: Points [..., m, d + 2].

    Returns:
        k(a, b), [..., n, m].
    """
    f_a, f_b = a[..., -AXES:], b[..., -AXES:]
    u_a, u_b = a[..., :-AXES], b[..., :-AXES]
    inverse = torch.exp(-p["log_length"])
    x_a, x_b = (u_a - f_a @ p["drift"]) * inverse, (u_b - f_b @ p["drift"]) * inverse
    if b.dim() == 2 and len(b) and bool((f_b == f_b[:1]).all()):
        # Candidates share a fidelity, so everything that depends on fidelities alone is [n, 1].
        f_b = f_b[:1]
    # Shapes [..., axis, n, 1] and [..., axis, 1, m].
    tau_a, tau_b = f_a.mT.unsqueeze(-1), f_b.mT.unsqueeze(-2)
    product = tau_a * tau_b
    smooth = product + 0.3 * product.square()
    rough = 0.5 * (tau_a.abs() + tau_b.abs() - (tau_a - tau_b).abs())
    fine = torch.exp(2.0 * p["log_fine"])
    # The first dimension is smooth, rough; the second is the axis.
    weights = fine * torch.exp(2.0 * torch.stack([p["log_smooth"], p["log_rough"]]))
    factor = fine + _sum_over_axes(weights[0, :, None, None] * smooth + weights[1, :, None, None] * rough)
    offset = 9.0 * (1.0 + _sum_over_axes(product + 0.1 * product.square()))
    c_a, c_b, weight = u_a - 0.5, u_b - 0.5, torch.exp(2.0 * p["log_bowl"])
    bowl = (1.0 + _sum_over_axes(product)) * ((weight * c_a) @ c_b.mT) + (4.0 * weight * c_a.square()) @ c_b.square().mT
    r2 = x_a.square().sum(-1).unsqueeze(-1) + x_b.square().sum(-1).unsqueeze(-2) - 2.0 * (x_a @ x_b.mT)
    # The floor keeps the derivative of the root finite. M52 is flat at 0, so 1e-15 there changes nothing.
    root = torch.sqrt(5.0 * r2.clamp_min(1e-15))
    matern = (1.0 + root + root.square() / 3.0) * torch.exp(-root)
    return offset + bowl + factor * matern


def _compute_variance(p: dict[str, Tensor], a: Tensor) -> Tensor:
    """Evaluate k(x, x) for every row, [..., n]."""
    c2, f = (a[..., :-AXES] - 0.5).square(), a[..., -AXES:]
    f2 = f.square()
    offset = 9.0 * (1.0 + (f2 + 0.1 * f2.square()).sum(-1))
    bowl = (1.0 + f2.sum(-1)) * c2.sum(-1) + 4.0 * c2.square().sum(-1)
    smooth, rough = torch.exp(2.0 * p["log_smooth"]), torch.exp(2.0 * p["log_rough"])
    factor = 1.0 + (smooth * (f2 + 0.3 * f2.square()) + rough * f.abs()).sum(-1)
    return offset + torch.exp(2.0 * p["log_bowl"]) * bowl + torch.exp(2.0 * p["log_fine"]) * factor


class FidelityKernel(Kernel):  # type: ignore[misc]
    """The module's covariance as a GPyTorch kernel over inputs [..., n, d + 2] (settings, t, s).

    The parameters are the logarithms themselves (drifts are not transformed), with normal priors and the bounds of the
    fit, so that GPyTorch's marginal likelihood and BoTorch's fitting see the same posterior as `fit_surrogate`.
    """

    def __init__(self, d: int, values: dict[str, Tensor] | None = None) -> None:
        """Create the kernel.

        Args:
            d: Number of feature columns.
            values: Hyperparameters by name; the medians of their priors by default.
        """
        super().__init__()
        for name, (mean, sd) in make_priors(d).items():
            # The noise belongs to the likelihood.
            if name == "log_noise":
                continue
            start = mean if values is None else values[name]
            self.register_parameter(name, torch.nn.Parameter(start.clone()))
            self.register_prior(f"{name}_prior", NormalPrior(mean, torch.full_like(mean, sd)), name)
            # With transform=None the interval bounds the optimizer and does not reparametrise. The mean is the same
            # for all elements, and BoTorch needs a single number.
            middle = float(mean.flatten()[0])
            self.register_constraint(name, Interval(middle - 3 * sd, middle + 3 * sd, transform=None))

    def values(self) -> dict[str, Tensor]:
        """Return the hyperparameters of the kernel by name."""
        return {name: getattr(self, name) for name in HYPERPARAMETERS[:-1]}

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Return k(x1, x2), [..., n, m]; with `diag` row by row, [..., n]."""
        if diag:
            if x1 is x2 or torch.equal(x1, x2):
                return _compute_variance(self.values(), x1)
            return compute_covariance(self.values(), x1.unsqueeze(-2), x2.unsqueeze(-2))[..., 0, 0]
        return compute_covariance(self.values(), x1, x2)
