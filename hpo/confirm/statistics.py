"""How much of a lead is noise: t intervals over seeds, and the probability that a lead is real."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# Of every interval in this module.
CONFIDENCE = 0.95
# Equally likely points in each of the two dimensions that are averaged over.
QUADRATURE_POINTS = 48
# With fewer configurations than this, all are used to estimate how far apart they are.
MIN_NEAR_CONFIGURATIONS = 4


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % Student-t interval."""

    mean: float
    low: float
    high: float


def compute_t_interval(values: ArrayLike) -> Interval:
    """Return the mean of independent values and its interval, mean ± t(n - 1) s / sqrt(n).

    Args:
        values: At least 2 numbers, shape [n].

    Returns:
        The 95 % interval.

    Raises:
        ValueError: If there are fewer than 2 values.
    """
    from scipy.stats import t

    x = np.asarray(values, float)
    if x.ndim != 1 or x.size < 2:
        raise ValueError(f"an interval needs at least 2 values, got {x.size}: use more seeds")
    half = float(t.ppf(0.5 + CONFIDENCE / 2, x.size - 1)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


@dataclass(frozen=True)
class Lead:
    """How far one configuration is ahead of another, in nats per token, and how much of that to believe.

    Attributes:
        observed: Difference of the measured losses; NaN if not both were measured.
        expected: Expected difference if both are trained on new seeds.
        error: Standard error of `observed` (from seeds), or standard deviation of the lead (from a model).
        probability: Probability that the leader is truly better.
    """

    observed: float
    expected: float
    error: float
    probability: float

    @property
    def noise_share(self) -> float:
        """Expected share of the measured lead that is noise and selection; NaN without a measured lead."""
        return 1 - self.expected / self.observed if self.observed > 0 else math.nan


def estimate_lead_from_seeds(losses: ArrayLike) -> Lead:
    """Estimate the lead of the best over the second best of k configurations, each trained on the same n seeds.

    Model: loss_ij = theta_i + seed_j + noise_ij, noise ~ N(0, s^2), theta_i ~ N(mu, tau^2). s^2 is pooled: the squares
    that neither the configuration's mean nor the seed's mean explains, over their (k - 1)(n - 1) degrees of freedom.
    The standard error of the lead is sqrt(2 s^2 / n).

    Empirical Bayes: a difference of means shrinks by the factor 1 - w, w = (s^2 / n) / (s^2 / n + tau^2), to its
    expectation, around which its standard deviation is sqrt(2 (1 - w) s^2 / n). This also corrects for selection,
    because the prior describes how far apart configurations are before their losses are seen. Few configurations carry
    little information about tau, so w is not plugged in but averaged over, under a prior that is uniform in w (Daniels
    1999, Canadian J. Statistics 27, 567): given s^2, w is a gamma variable of shape (m + 1) / 2 truncated at 1, where m
    is the number of configurations from which tau is estimated. These are the better half, at least 4, because losses
    crowd near a minimum and the far ones would suggest that all are far apart.

    Assumed: that these are normal. Simulated with k = 6, n = 3 and spreads of 0.2 to 2 s:

    - Normal losses: the measured lead is too large by 31 % of itself, the shrunken one too small by 12 % of the
      measured one, and probabilities are right to 0.04.
    - A quadratic bowl of one parameter: 66 %, too large by 13 %, 0.08.
    - Such a bowl from which an equally noisy lower rung selected most configurations: 88 %, still too large by 27 %,
      and a probability of 0.9 means 0.7. Only fresh seeds help then.

    Args:
        losses: Finite losses in nats per token, shape [k, n], k >= 2, n >= 2.

    Returns:
        The lead.

    Raises:
        ValueError: If there are fewer than 2 configurations or seeds, or a loss is not finite.
    """
    from scipy.special import gammainc, gammaincinv, ndtr
    from scipy.stats import chi2

    y = np.asarray(losses, float)
    if y.ndim != 2 or min(y.shape) < 2 or not np.isfinite(y).all():
        raise ValueError(
            f"a lead needs finite losses of at least 2 configurations on at least 2 seeds, got shape {y.shape}"
        )
    k, n = y.shape
    means = y.mean(1)
    near = np.sort(means)[: max(MIN_NEAR_CONFIGURATIONS, (k + 1) // 2)]
    observed = float(near[1] - near[0])
    residuals = y - means[:, None] - y.mean(0) + y.mean()
    degrees = (k - 1) * (n - 1)
    noise = float((residuals**2).sum()) / degrees
    error = math.sqrt(2 * noise / n)
    if observed == 0:
        return Lead(0.0, 0.0, error, 0.5)
    # The trainer returns the same loss for every seed.
    if error < 1e-12 * observed:
        return Lead(observed, observed, error, 1.0)
    u = (np.arange(QUADRATURE_POINTS) + 0.5) / QUADRATURE_POINTS
    # Variances of a mean that are equally likely by the residuals alone, then their weights by the means.
    v = noise / n * degrees / chi2.ppf(u, degrees)
    shape, rate = (near.size + 1) / 2, ((near - near.mean()) ** 2).sum() / (2 * v)
    below = gammainc(shape, rate)
    weight = v * below / (v * below).sum()
    # Shape [v, u].
    w = gammaincinv(shape, below[:, None] * u) / rate[:, None]
    expected = observed * (1 - float(weight @ w.mean(1)))
    probability = ndtr(np.sqrt((1 - w) / (2 * v[:, None])) * observed)
    return Lead(observed, expected, error, float(weight @ probability.mean(1)))


def estimate_lead_from_model(difference: tuple[float, float], observed: float = math.nan) -> Lead:
    """Return the lead that a model believes in.

    Args:
        difference: Posterior mean and standard deviation of the rival's loss minus the leader's.
        observed: The measured difference; NaN if not both were measured.

    Returns:
        The lead.
    """
    from scipy.special import ndtr

    mean, sd = difference
    probability = float(ndtr(mean / sd)) if sd > 0 else 0.5 + 0.5 * float(np.sign(mean))
    return Lead(observed, mean, sd, probability)
