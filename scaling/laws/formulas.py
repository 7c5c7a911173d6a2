"""Formulas as values: loss(N, D), lr*(N, D), B*(N, D). A law is only its formula; its evidence is part of a fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from scaling.common.arrays import Array


@dataclass(frozen=True)
class PowerLaw:
    """The power law y = coef * x ** exponent.

    Attributes:
        coef: Value at x = 1.
        exponent: Slope in logs.

    Example:
        >>> PowerLaw(coef=2.0, exponent=0.5)(16.0)
        array(8.)
    """

    coef: float
    exponent: float

    def __call__(self, x: ArrayLike) -> Array:
        """Return y, with the shape of x."""
        return np.asarray(self.coef * np.asarray(x, float) ** self.exponent)


@dataclass(frozen=True)
class LossLaw:
    """The loss law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, equation 2).

    Attributes:
        E: Irreducible loss, nats per token.
        A: Coefficient of the term in N.
        B: Coefficient of the term in D.
        alpha: Exponent of N.
        beta: Exponent of D.

    Example:
        >>> law = LossLaw(E=1.82, A=482.0, B=2085.0, alpha=0.348, beta=0.366)
        >>> loss = law(7e9, 1.4e12)
        >>> N, D = law.optimum(5.76e23)
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, N: ArrayLike, D: ArrayLike) -> Array:
        """Return the loss in nats per token.

        Args:
            N: Parameters that multiply tokens. Shapes of N and D broadcast.
            D: Training tokens.
        """
        size, tokens = np.asarray(N, float), np.asarray(D, float)
        return np.asarray(self.E + self.A * size**-self.alpha + self.B * tokens**-self.beta)

    def optimum(self, C: ArrayLike) -> tuple[Array, Array]:
        """Return the N and D of lowest loss under the constraint C = 6 N D.

        N = G (C/6)^(beta/(alpha+beta)) with G = (alpha A / (beta B))^(1/(alpha+beta)) (arXiv 2203.15556, equation 4).

        Args:
            C: Training compute in FLOPs.

        Returns:
            N and D, with the shape of C.

        Raises:
            ValueError: If one of the two terms does not fall, so there is no optimum; or C is not positive.
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
        # In logs, because alpha A / (beta B) to the power 1 / (alpha + beta) overflows when the exponents are small.
        log_g = np.log(self.alpha * self.A / (self.beta * self.B)) / total
        N = np.exp(log_g + self.beta / total * np.log(compute))
        return np.asarray(N), np.asarray(compute / N)


@dataclass(frozen=True)
class LogLinearLaw:
    """The law L(N, D) = coef N^-alpha D^-beta, a plane in logs without a floor: the baseline for other laws."""

    coef: float
    alpha: float
    beta: float

    def __call__(self, N: ArrayLike, D: ArrayLike) -> Array:
        """Return the loss in nats per token; shapes of N and D broadcast."""
        return np.asarray(self.coef * np.asarray(N, float) ** -self.alpha * np.asarray(D, float) ** -self.beta)


@dataclass(frozen=True)
class KaplanLaw:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al., arXiv 2001.08361, equation 1.5)."""

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float

    def __call__(self, N: ArrayLike, D: ArrayLike) -> Array:
        """Return the loss in nats per token; shapes of N and D broadcast."""
        size = (np.log(self.N_c) - np.log(np.asarray(N, float))) * self.alpha_N / self.alpha_D
        return np.asarray(np.exp(self.alpha_D * np.logaddexp(size, np.log(self.D_c) - np.log(np.asarray(D, float)))))

    def optimum(self, C: ArrayLike) -> tuple[Array, Array]:
        """Return the N and D of lowest loss under C = 6 N D FLOPs.

        N^(1+p) = p N_c^p C / (6 D_c) with p = alpha_N / alpha_D (derived here).

        Raises:
            ValueError: If C or an exponent is not positive.
        """
        compute, p = np.asarray(C, float) / 6.0, self.alpha_N / self.alpha_D
        if not (np.all(compute > 0) and p > 0):
            raise ValueError(f"an optimum needs C above 0 and both exponents above 0, got C={C!r}, {self}")
        N = np.exp((np.log(p) + p * np.log(self.N_c) + np.log(compute) - np.log(self.D_c)) / (1 + p))
        return np.asarray(N), np.asarray(compute / N)


@dataclass(frozen=True)
class DataConstrainedLaw:
    """L = E + A / N'^alpha + B / D'^beta, in which repeated data are worth less (Muennighoff et al., arXiv 2305.16264).

    U of the D tokens are distinct, so R = D/U - 1 counts the repetitions, and D' = U + U R_D (1 - exp(-R / R_D)). In
    the same way N' = U_N + U_N R_N (1 - exp(-(N/U_N - 1) / R_N)) where N exceeds U_N, the optimal N for U tokens in one
    epoch.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    R_D: float
    R_N: float

    def __call__(self, N: ArrayLike, D: ArrayLike, unique: ArrayLike | None = None) -> Array:
        """Return the loss in nats per token.

        Args:
            N: Parameters that multiply tokens. All shapes broadcast.
            D: Training tokens.
            unique: Distinct tokens U. None, or U > D, means that no token is repeated.
        """
        size, tokens = np.asarray(N, float), np.asarray(D, float)
        distinct = tokens if unique is None else np.minimum(np.asarray(unique, float), tokens)
        # At the optimum for U tokens, alpha A N^-alpha = beta B U^-beta.
        ratio = np.log(self.alpha * self.A) - np.log(self.beta * self.B)
        best = (ratio + self.beta * np.log(distinct)) / self.alpha - np.log(size)
        size = _discount_repeats(size, size * np.exp(np.clip(best, -30.0, 0.0)), self.R_N)
        tokens = _discount_repeats(tokens, distinct, self.R_D)
        return np.asarray(self.E + self.A * size**-self.alpha + self.B * tokens**-self.beta)


def _discount_repeats(amount: Array, distinct: Array, decay: float) -> Array:
    """Return U + U R (1 - exp(-(amount/U - 1) / R)) for U distinct units and decay constant R."""
    return np.asarray(distinct * (1 - decay * np.expm1(-(amount / distinct - 1) / decay)))


@dataclass(frozen=True)
class HPLaw:
    """The law lr*(N, D) = lr_coef N^lr_N D^lr_D and B*(N, D) = batch_coef N^batch_N D^batch_D.

    This is the form of Step Law (arXiv 2503.04715), which has batch_N = 0. Under muP the learning rate is that of the
    base width.

    Attributes:
        lr_coef: Coefficient of the learning rate.
        lr_N: Exponent of N in the learning rate.
        lr_D: Exponent of D in the learning rate.
        batch_coef: Coefficient of the batch size, in tokens per step.
        batch_N: Exponent of N in the batch size.
        batch_D: Exponent of D in the batch size.

    Example:
        >>> step_law = HPLaw(1.79, -0.713, 0.307, 0.58, 0.0, 0.571)
        >>> lr, batch_tokens = step_law(1e9, 1e11)
    """

    lr_coef: float
    lr_N: float
    lr_D: float
    batch_coef: float
    batch_N: float
    batch_D: float

    def __call__(self, N: ArrayLike, D: ArrayLike) -> tuple[Array, Array]:
        """Return the optimal learning rate and batch size.

        Args:
            N: Parameters that multiply tokens. Shapes of N and D broadcast.
            D: Training tokens.

        Returns:
            Learning rate, and batch size in tokens per step.
        """
        size, tokens = np.asarray(N, float), np.asarray(D, float)
        lr = self.lr_coef * size**self.lr_N * tokens**self.lr_D
        return np.asarray(lr), np.asarray(self.batch_coef * size**self.batch_N * tokens**self.batch_D)
