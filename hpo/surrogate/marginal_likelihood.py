"""The inner loop of the fit: log posterior of the hyperparameters and its analytic gradient, in NumPy.

The value equals GPyTorch's exact marginal likelihood of `FidelityKernel` plus its priors (a test compares value and
gradient). With autograd it is 2 (300 runs) to 12 times (7 runs) slower, and each ask evaluates it about 100 times.

With W = (K^-1 - alpha alpha^T) / 2, the derivative with respect to a hyperparameter h is sum(W * dK/dh). Lengths and
drifts enter through r^2 = sum_i (x_i - x'_i)^2, x_i = (u_i - t d_i - s e_i) / length_i. So for a symmetric matrix G =
W * dk/dr^2 with row sums g, sum(G * (x_i - x'_i)(y - y')) = 2 (g x_i y - x_i G y), which needs matrix products only.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotri

from hpo.surrogate.inputs import AXES
from scaling.common.arrays import Array


class NegativeLogPosterior:
    """-ln p(z | theta) - ln p(theta), up to the constant of the prior, with its gradient.

    The vector theta is laid out as `hpo.surrogate.kernel.HYPERPARAMETERS`: fine, bowl, smooth (2), rough (2),
    length (d), drift (2 d, tokens first), noise. All are logarithms except the drifts.

    Args:
        x: Model inputs of the n runs, [n, d + 2].
        z: Their standardised losses, [n].
        mean: Mean of the normal prior, [h].
        sd: Standard deviation of the normal prior, [h].
        jitter: Added to the noise variance.

    Attributes:
        is_free: Which hyperparameters the likelihood depends on, [h].
    """

    def __init__(self, x: Array, z: Array, mean: Array, sd: Array, jitter: float) -> None:
        self.u, self.f, self.z = np.ascontiguousarray(x[:, :-AXES]), x[:, -AXES:], z
        self.mean, self.sd, self.jitter = mean, sd, jitter
        # An axis without variation adds nothing.
        self.active = [a for a in range(AXES) if np.any(self.f[:, a])]
        d = self.u.shape[1]
        is_active = np.zeros(AXES, dtype=bool)
        is_active[self.active] = True
        self.is_free = np.concatenate(
            [[True, True], is_active, is_active, np.ones(d, bool), np.repeat(is_active, d), [True]]
        )
        c = self.u - 0.5
        products = [np.outer(self.f[:, a], self.f[:, a]) for a in self.active]
        size = [np.abs(self.f[:, a]) for a in self.active]
        rough = [
            0.5 * (s[:, None] + s[None, :] - np.abs(self.f[:, a, None] - self.f[None, :, a]))
            for a, s in zip(self.active, size, strict=True)
        ]
        n = len(z)
        ones = np.ones((n, n))
        # The terms of the factor that multiplies the fine structure.
        self.factor_terms = np.stack([ones, *(p + 0.3 * p * p for p in products), *rough]).reshape(-1, n * n)
        self.offset = 9.0 * sum((p + 0.1 * p * p for p in products), ones)
        self.bowl = sum(products, ones) * (c @ c.T) + 4.0 * ((c * c) @ (c * c).T)
        # Allocating new matrices in every call took half of the time.
        self.workspace = np.empty((6, n, n))

    def __call__(self, theta: Array) -> tuple[float, Array]:
        """Return the value and the gradient [h] at the hyperparameters theta [h]."""
        n, d = self.u.shape
        bowl2 = math.exp(2.0 * theta[1])
        active = np.array(self.active, dtype=int)
        weights = np.exp(2.0 * np.concatenate([[0.0], theta[2 + active], theta[2 + AXES + active]]))
        at = 2 + 2 * AXES
        inverse = np.exp(-theta[at : at + d])
        drift = theta[at + d : at + d + AXES * d].reshape(AXES, d)
        noise2 = math.exp(2.0 * theta[-1])

        x = (self.u - self.f @ drift) * inverse
        norms = 5.0 * np.einsum("ij,ij->i", x, x)
        # r2 is five times the squared distance.
        r2, root, decay, slope, k, fine = self.workspace
        np.matmul(x, -10.0 * x.T, out=r2)
        r2 += norms[:, None]
        r2 += norms
        np.maximum(r2, 5e-15, out=r2)
        np.sqrt(r2, out=root)
        np.exp(np.subtract(2.0 * theta[0], root, out=decay), out=decay)
        # slope is -6/5 of d fine / d r^2.
        np.multiply(np.add(root, 1.0, out=slope), decay, out=slope)
        np.multiply(r2, decay, out=fine)
        fine /= 3.0
        fine += slope
        factor = np.dot(weights, self.factor_terms).reshape(n, n)
        np.multiply(self.bowl, bowl2, out=k)
        k += self.offset
        k += np.multiply(fine, factor, out=root)
        k.flat[:: n + 1] += noise2 + self.jitter

        scale = float(np.trace(k)) / n
        for jitter in (0.0, 1e-10, 1e-8, 1e-6):
            if jitter:
                k.flat[:: n + 1] += jitter * scale
            # k.T is in Fortran order.
            chol, failed = dpotrf(k.T, lower=1, clean=1)
            if not failed:
                break
        else:
            raise ValueError(f"the covariance of {n} runs is not positive definite: check their losses for huge values")
        determinant = 2.0 * float(np.log(chol.diagonal()).sum())
        lower, _ = dpotri(chol, lower=1, overwrite_c=1)
        # `lower` is zero above its diagonal.
        w = np.add(lower, lower.T, out=decay)
        w.flat[:: n + 1] *= 0.5
        alpha = w @ self.z
        value = 0.5 * (float(self.z @ alpha) + determinant + n * math.log(2 * math.pi))
        # From here on w is twice W.
        w -= np.outer(alpha, alpha, out=root)

        gradient = np.zeros(len(theta))
        by_weight = weights * (self.factor_terms @ np.multiply(w, fine, out=root).ravel())
        gradient[0] = by_weight.sum()
        gradient[1] = bowl2 * np.vdot(w, self.bowl)
        gradient[2 + active], gradient[2 + AXES + active] = np.split(by_weight[1:], 2)
        slope *= factor
        slope *= w
        slope *= -5.0 / 12.0
        g, gx = slope.sum(1), slope @ x
        gradient[at : at + d] = -4.0 * (g @ (x * x) - np.einsum("ij,ij->j", x, gx))
        for a in self.active:
            weighted = g * self.f[:, a]
            gradient[at + d + a * d : at + d + (a + 1) * d] = -4.0 * inverse * (weighted @ x - self.f[:, a] @ gx)
        gradient[-1] = noise2 * float(np.trace(w))
        deviation = (theta - self.mean) / self.sd
        return value + 0.5 * float(deviation @ deviation), gradient + deviation / self.sd
