"""How much of a lead is noise: t intervals over seeds, and the lead that the model believes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MASS = 0.95  # of every interval here
NODES = 48  # of each of two quadratures


@dataclass(frozen=True)
class Interval:
    """A mean and its Student-t interval of 95 %."""

    mean: float
    low: float
    high: float


def t_interval(values: ArrayLike) -> Interval:
    """mean -+ t(n - 1) s / sqrt(n) of independent values [n]. ValueError for fewer than 2."""
    from scipy.stats import t

    x = np.asarray(values, float)
    if x.ndim != 1 or x.size < 2:
        raise ValueError(f"an interval needs at least 2 values, got {x.size}: use more seeds")
    half = float(t.ppf(0.5 + MASS / 2, x.size - 1)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


@dataclass(frozen=True)
class Lead:
    """How far one configuration is ahead of another, and what of that is to be believed. Nats per token."""

    observed: float  # difference of the measured losses; NaN when they were not both measured
    expected: float  # what is left on average when both are trained on new seeds
    error: float  # standard error of `observed` (from seeds), or standard deviation of the lead (from a model)
    probability: float  # that the leader is truly better

    @property
    def noise_share(self) -> float:
        """Expected share of the measured lead that is noise and the selection by it; NaN without a measured lead."""
        return 1 - self.expected / self.observed if self.observed > 0 else math.nan


def lead_from_seeds(losses: ArrayLike) -> Lead:
    """The lead of the best over the second best of k configurations, each trained on the same n seeds: losses [k, n].

    Model: loss_ij = theta_i + seed_j + noise_ij, noise ~ N(0, s^2), theta_i ~ N(mu, tau^2). s^2 is pooled: the squares
    that neither the configuration's mean nor the seed's mean explains, over their (k - 1)(n - 1) degrees of freedom.
    The standard error of the lead is sqrt(2 s^2 / n). Empirical Bayes: a difference of means shrinks by 1 - w,
    w = (s^2 / n) / (s^2 / n + tau^2), to its expectation, and has the standard deviation sqrt(2 (1 - w) s^2 / n) about
    it. That answers for the selection, too: the prior says how far apart configurations are before one looks. As few
    configurations say little about tau, w is not plugged in but averaged over, under the prior that is uniform in w
    (Daniels 1999, Canadian J. Statistics 27, 567): given s^2, w is a gamma variable of shape (m + 1) / 2 cut off at 1,
    with m the configurations that tau is seen in. Those are the better half, at least 4: losses crowd at a floor, and
    the far ones would say that all are far apart.

    Assumed: that those are normal. Simulated, k = 6, n = 3, spreads of 0.2 to 2 s: with normal losses the measured lead is
    too large by 31 % of itself, the shrunken one too small by 12 % of that, and probabilities are right to 0.04. With a
    quadratic bowl of one parameter 66 %, too large by 13 %, 0.08. If a rung below, as noisy, had chosen most of them from
    such a bowl, 88 %, still too large by 27 %, and 0.9 means 0.7: only fresh seeds tell then.

    ValueError for fewer than 2 configurations or seeds, or a loss that is not finite.
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
    near = np.sort(means)[: max(4, (k + 1) // 2)]
    observed = float(near[1] - near[0])
    rest = y - means[:, None] - y.mean(0) + y.mean()
    degrees = (k - 1) * (n - 1)
    noise = float((rest**2).sum()) / degrees
    error = math.sqrt(2 * noise / n)
    if observed == 0:
        return Lead(0.0, 0.0, error, 0.5)
    if error < 1e-12 * observed:  # the trainer gives every seed the same
        return Lead(observed, observed, error, 1.0)
    u = (np.arange(NODES) + 0.5) / NODES
    v = noise / n * degrees / chi2.ppf(u, degrees)  # variance of a mean: equally likely by the residuals alone
    shape, rate = (near.size + 1) / 2, ((near - near.mean()) ** 2).sum() / (2 * v)
    below = gammainc(shape, rate)
    weight = v * below / (v * below).sum()  # and by the means
    w = gammaincinv(shape, below[:, None] * u) / rate[:, None]  # [v, u]
    shrunk = observed * (1 - float(weight @ w.mean(1)))
    sure = ndtr(np.sqrt((1 - w) / (2 * v[:, None])) * observed)
    return Lead(observed, shrunk, error, float(weight @ sure.mean(1)))


def lead_from_model(difference: tuple[float, float], observed: float = math.nan) -> Lead:
    """The same from a model's posterior mean and standard deviation of the lead."""
    from scipy.special import ndtr

    mean, sd = difference
    probability = float(ndtr(mean / sd)) if sd > 0 else 0.5 + 0.5 * float(np.sign(mean))
    return Lead(observed, mean, sd, probability)
