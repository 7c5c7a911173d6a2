"""The fit's inner loop: the log posterior of `hpo.surrogate.gp`'s hyperparameters with its gradient by hand, in numpy.

The same number as GPyTorch's exact marginal likelihood of `FidelityKernel` plus its priors (a test compares both, value
and gradient); autograd makes it 2 (300 runs) to 12 times (7 runs) slower, and it is evaluated some 100 times an ask.

With W = (K^-1 - alpha alpha^T) / 2, the derivative with respect to a hyperparameter h is sum(W * dK/dh). Lengths and
drifts enter through r^2 = sum_i (x_i - x'_i)^2, x_i = (u_i - t d_i - s e_i) / length_i, so that with a symmetric G =
W * dk/dr^2 and its row sums g, sum(G * (x_i - x'_i)(y - y')) = 2 (g x_i y - x_i G y): matrix products only.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotri

from hpo.surrogate.inputs import AXES
from scaling.common.arrays import Array


class Marginal:
    """-ln p(z | theta) - ln p(theta), up to the prior's constant, of n runs x [n, d + 2] with values z [n].

    mean, sd: of the normal prior, [h]; theta is laid out as `hpo.surrogate.gp.NAMES`: fine, bowl, smooth (2), rough (2),
    length (d), drift (2 d, tokens first), noise; logarithms but for the drifts. jitter: added to the noise variance.
    """

    def __init__(self, x: Array, z: Array, mean: Array, sd: Array, jitter: float) -> None:
        self.u, self.f, self.z = np.ascontiguousarray(x[:, :-AXES]), x[:, -AXES:], z
        self.mean, self.sd, self.jitter = mean, sd, jitter
        self.active = [a for a in range(AXES) if np.any(self.f[:, a])]  # an axis without variation adds nothing
        d = self.u.shape[1]
        on = np.zeros(AXES, dtype=bool)
        on[self.active] = True
        self.matters = np.concatenate([[True, True], on, on, np.ones(d, bool), np.repeat(on, d), [True]])  # [h]
        c = self.u - 0.5
        products = [np.outer(self.f[:, a], self.f[:, a]) for a in self.active]
        size = [np.abs(self.f[:, a]) for a in self.active]
        rough = [
            0.5 * (s[:, None] + s[None, :] - np.abs(self.f[:, a, None] - self.f[None, :, a]))
            for a, s in zip(self.active, size, strict=True)
        ]
        n = len(z)
        one = np.ones((n, n))
        self.parts = np.stack([one, *(p + 0.3 * p * p for p in products), *rough]).reshape(-1, n * n)  # of the factor
        self.offset = 9.0 * sum((p + 0.1 * p * p for p in products), one)
        self.bowl = sum(products, one) * (c @ c.T) + 4.0 * ((c * c) @ (c * c).T)
        self.room = np.empty((6, n, n))  # to work in: fresh matrices for every call took half the time

    def __call__(self, theta: Array) -> tuple[float, Array]:
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
        r2, root, decay, slope, k, fine = self.room  # r2: five times the squared distance
        np.matmul(x, -10.0 * x.T, out=r2)
        r2 += norms[:, None]
        r2 += norms
        np.maximum(r2, 5e-15, out=r2)
        np.sqrt(r2, out=root)
        np.exp(np.subtract(2.0 * theta[0], root, out=decay), out=decay)
        np.multiply(np.add(root, 1.0, out=slope), decay, out=slope)  # -6/5 of d fine / d r^2
        np.multiply(r2, decay, out=fine)
        fine /= 3.0
        fine += slope
        factor = np.dot(weights, self.parts).reshape(n, n)
        np.multiply(self.bowl, bowl2, out=k)
        k += self.offset
        k += np.multiply(fine, factor, out=root)
        k.flat[:: n + 1] += noise2 + self.jitter

        scale = float(np.trace(k)) / n
        for more in (0.0, 1e-10, 1e-8, 1e-6):
            if more:
                k.flat[:: n + 1] += more * scale
            chol, failed = dpotrf(k.T, lower=1, clean=1)  # k.T: in Fortran's order
            if not failed:
                break
        else:
            raise ValueError(f"the covariance of {n} runs is not positive definite: check their losses for huge values")
        determinant = 2.0 * float(np.log(chol.diagonal()).sum())
        lower, _ = dpotri(chol, lower=1, overwrite_c=1)
        w = np.add(lower, lower.T, out=decay)  # above its diagonal it is zero
        w.flat[:: n + 1] *= 0.5
        alpha = w @ self.z
        value = 0.5 * (float(self.z @ alpha) + determinant + n * math.log(2 * math.pi))
        w -= np.outer(alpha, alpha, out=root)  # twice W, as everywhere below

        gradient = np.zeros(len(theta))
        pull = weights * (self.parts @ np.multiply(w, fine, out=root).ravel())
        gradient[0] = pull.sum()
        gradient[1] = bowl2 * np.vdot(w, self.bowl)
        gradient[2 + active], gradient[2 + AXES + active] = np.split(pull[1:], 2)
        slope *= factor
        slope *= w
        slope *= -5.0 / 12.0
        g, gx = slope.sum(1), slope @ x
        gradient[at : at + d] = -4.0 * (g @ (x * x) - np.einsum("ij,ij->j", x, gx))
        for a in self.active:
            moved = g * self.f[:, a]
            gradient[at + d + a * d : at + d + (a + 1) * d] = -4.0 * inverse * (moved @ x - self.f[:, a] @ gx)
        gradient[-1] = noise2 * float(np.trace(w))
        off = (theta - self.mean) / self.sd
        return value + 0.5 * float(off @ off), gradient + off / self.sd
