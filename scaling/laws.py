"""Formulas as values: loss(N, D), lr*(N, D), B*(N, D). A law is only its formula; its evidence lives in a fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """y = coef * x ** exponent"""

    coef: float
    exponent: float

    def __call__(self, x: ArrayLike) -> Array:
        return np.asarray(self.coef * np.asarray(x, float) ** self.exponent)


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, nats per token (Hoffmann et al. 2022, arXiv 2203.15556, equation 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, N: ArrayLike, D: ArrayLike) -> Array:
        """Shapes of N and D broadcast."""
        size, tokens = np.asarray(N, float), np.asarray(D, float)
        return np.asarray(self.E + self.A * size**-self.alpha + self.B * tokens**-self.beta)

    def optimum(self, C: ArrayLike) -> tuple[Array, Array]:
        """(N, D) of least loss under C = 6 N D FLOPs: N = G (C/6)^(beta/(alpha+beta)) with
        G = (alpha A / (beta B))^(1/(alpha+beta)) (arXiv 2203.15556, equation 4).

        ValueError when one of the two terms does not fall: then there is no optimum inside.
        """
        compute = np.asarray(C, float) / 6.0
        if not (self.A > 0 and self.B > 0 and self.alpha > 0 and self.beta > 0):
            raise ValueError(
                f"an optimum needs A, B, alpha and beta above 0, got {self}: add runs at other sizes or token counts, "
                "or give N and D yourself"
            )
        if not np.all(compute > 0):
            raise ValueError(f"C must be positive FLOPs, got {C!r}")
        total = self.alpha + self.beta
        # in logs: alpha A / (beta B) to the power 1 / (alpha + beta) leaves the floats when exponents are small
        log_g = np.log(self.alpha * self.A / (self.beta * self.B)) / total
        N = np.exp(log_g + self.beta / total * np.log(compute))
        return np.asarray(N), np.asarray(compute / N)


@dataclass(frozen=True)
class HPLaw:
    """lr*(N, D) = lr_coef N^lr_N D^lr_D and B*(N, D) = batch_coef N^batch_N D^batch_D, batch in tokens per step.

    The form of Step Law (arXiv 2503.04715), which has batch_N = 0. Under muP lr is that of the base width.
    """

    lr_coef: float
    lr_N: float
    lr_D: float
    batch_coef: float
    batch_N: float
    batch_D: float

    def __call__(self, N: ArrayLike, D: ArrayLike) -> tuple[Array, Array]:
        """(lr, batch_tokens); shapes of N and D broadcast."""
        size, tokens = np.asarray(N, float), np.asarray(D, float)
        lr = self.lr_coef * size**self.lr_N * tokens**self.lr_D
        return np.asarray(lr), np.asarray(self.batch_coef * size**self.batch_N * tokens**self.batch_D)
