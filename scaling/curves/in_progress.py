"""Forecast the final loss of a run in progress, as a distribution.

    loss(t) / loss(now) = 1 + b - k (1 - x^-alpha) / alpha - c (h - h_now) + wander,    x = S(t) / S(now)

S is the sum of the learning rate over the tokens (S1 of arXiv 2408.11029; the tokens themselves, where the rate is
constant), so the first terms are E + A S^-alpha written from the present point: k is the slope now, as a share of the
loss per e-fold of S. h = 1 - sqrt(lr / peak) is how far the rate has come down, and c is what a whole cooldown gains.
In place of h, the cited law has an area with a momentum; where the decay is slow compared with that memory, it becomes
1 - lr / peak. The root was chosen on held-out model sizes: it fits better and needs no step count. Wander is a Brownian
path in ln x: what the formula leaves out grows with the distance ahead, and old points say little about the future.

The trunk alone says nothing about c. It comes from the prior, or from finished runs of the same study (`learn_prior`).
Given alpha and the noise everything is linear; both are summed over on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular

from scaling.common.arrays import Array
from scaling.curves.loss_curve import clean_curve
from scaling.curves.schedules import Schedule

# The grid over alpha and over the noise, the relative sd of one measurement.
ALPHA_GRID = np.geomspace(0.05, 3.0, 25)
NOISE_GRID = np.geomspace(1e-4, 3e-2, 9)
# Log-normal prior of the noise.
USUAL_NOISE, NOISE_SPREAD = 1e-3, 1.0
# Prior sd of b, around the median of the last points.
LEVEL_SPREAD = 0.03
# Longer curves are thinned to medians of equal steps in ln tokens.
MAX_POINTS = 48
# Points before this share of the tokens so far are left out, because the early curve has another shape.
OLDEST_SHARE = 0.05
# How many runs the prior belief counts as.
PRIOR_RUNS = 2.0
# Degrees of freedom of the Student noise, under which spikes lose their weight, and iterations of those weights.
NOISE_DEGREES = 2.0
WEIGHT_PASSES = 4


@dataclass(frozen=True)
class CurvePrior:
    """What is believed of a run before it starts.

    Attributes:
        alpha: Median of the exponent.
        alpha_spread: Sd of ln alpha.
        slope: Mean of k, as a share of the loss per e-fold of S.
        slope_spread: Sd of k.
        gain: Mean of c, what a whole cooldown gains, as a share of the loss.
        gain_spread: Sd of c.
        wander: Sd of the wander after one e-fold of S, in units of the slope.
    """

    alpha: float = 0.5
    alpha_spread: float = 0.3
    slope: float = 0.08
    slope_spread: float = 0.08
    gain: float = 0.06
    gain_spread: float = 0.04
    wander: float = 0.03


@dataclass(frozen=True)
class FinalLossForecast:
    """The final loss of a run as it will be measured: a log-normal distribution.

    Attributes:
        mean: Mean, nats per token.
        sd: Standard deviation, nats per token.
    """

    mean: float
    sd: float

    def quantile(self, p: float) -> float:
        """Return the loss, in nats per token, that the run ends below with probability p in (0, 1)."""
        return math.exp(self._log_distribution().inv_cdf(p))

    def probability_below(self, level: float) -> float:
        """Return the probability that the run ends below `level`, in nats per token."""
        return self._log_distribution().cdf(math.log(level)) if level > 0 else 0.0

    def _log_distribution(self) -> NormalDist:
        variance = math.log1p((self.sd / self.mean) ** 2)
        return NormalDist(math.log(self.mean) - variance / 2, math.sqrt(variance))


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended.

    Attributes:
        tokens: Training tokens at each point, 1-d. The last point is the final one.
        loss: Loss at each point, nats per token, 1-d.
        schedule: The schedule that it ran under; None means a constant rate.
    """

    tokens: ArrayLike
    loss: ArrayLike
    schedule: Schedule | None = None


def predict_end(
    tokens: ArrayLike,
    loss: ArrayLike,
    at: float,
    *,
    schedule: Schedule | None = None,
    prior: CurvePrior | None = None,
    siblings: Sequence[FinishedRun] = (),
) -> FinalLossForecast:
    """Forecast the final loss of a run in progress.

    Args:
        tokens: Training tokens at the known points, 1-d.
        loss: Loss at these points, nats per token, 1-d. Points with a NaN loss are left out.
        at: Tokens at the end of the run.
        schedule: The learning rate as a share of its peak, from 0 to `at` tokens. None means constant to the end, so
            that nothing is gained by a cooldown.
        prior: What is believed of the run, from `learn_prior`. The default's gain of 0.06 +- 0.04 was set by hand: it
            spans public runs (0.025 for a cooldown of a tenth, 0.06 to 0.08 for a cosine) and most of this project's
            small proxies (0.02 to 0.12, more at higher rates). Half a run says nothing about its gain, so give a
            learned prior where runs have finished.
        siblings: Finished runs of the same study. Each is forecast at the same share of its tokens; their mean error
            shifts this forecast, and their spread widens it. A prior learned from the same runs makes them look a
            little too good.

    Returns:
        The distribution of the loss after `at` tokens.

    Raises:
        ValueError: If fewer than 3 points have a finite loss, or `at` lies before the last of them.
    """
    belief = prior or CurvePrior()
    run = _prepare_run(tokens, loss, at, schedule)
    change, variance = _compute_posterior(run, belief).end
    if siblings:
        share = float(clean_curve(tokens, loss)[0][-1]) / at
        errors = np.array(
            [error for s in siblings if (error := _compute_forecast_error(s, share, belief)) is not None]
        ).reshape(-1, 2)
        weight = len(errors) / (len(errors) + PRIOR_RUNS)
        shift = weight * float(errors[:, 0].mean()) if len(errors) else 0.0
        z2 = (errors[:, 0] - shift) ** 2 / errors[:, 1]
        widening = max(1.0, (PRIOR_RUNS + float(z2.sum())) / (PRIOR_RUNS + len(errors)))
        change, variance = change + shift, variance * widening
    return FinalLossForecast(run.now * (1 + change), run.now * math.sqrt(variance))


def _compute_forecast_error(sibling: FinishedRun, share: float, prior: CurvePrior) -> tuple[float, float] | None:
    """Return how far a sibling ended above its forecast at this share of its tokens, and the variance of that forecast.

    Both are relative to the loss at that point. None if too few points lie before it.
    """
    t, y = clean_curve(sibling.tokens, sibling.loss)
    is_early = t <= share * t[-1] * (1 + 1e-3)
    if is_early.sum() < 3 or is_early.all():
        return None
    run = _prepare_run(t[is_early], y[is_early], float(t[-1]), sibling.schedule)
    change, variance = _compute_posterior(run, prior).end
    return float(y[-1]) / run.now - 1 - change, variance


def learn_prior(runs: Sequence[FinishedRun], start: CurvePrior | None = None) -> CurvePrior:
    """Learn the prior for the next run of a family from finished runs: means and spreads of ln alpha, slope and gain.

    Each run is first fitted under a prior three times as wide, whose contribution is then removed again; EM on what is
    left gives the prior.

    Args:
        runs: Finished runs.
        start: The belief before these runs, which counts as two runs; by default `CurvePrior()`.

    Returns:
        The learned prior; `start` itself if there are no runs.
    """
    first = start or CurvePrior()
    origin = np.array([math.log(first.alpha), first.slope, first.gain])
    spread = np.array([first.alpha_spread, first.slope_spread, first.gain_spread]) ** 2
    wide = replace(
        first,
        alpha_spread=3 * first.alpha_spread,
        slope_spread=3 * first.slope_spread,
        gain_spread=3 * first.gain_spread,
    )
    if not runs:
        return first
    moments = []
    for run in runs:
        t, _ = clean_curve(run.tokens, run.loss)
        prepared = _prepare_run(run.tokens, run.loss, float(t[-1]), run.schedule)
        moments.append(_compute_posterior(prepared, wide, has_ended=True).moments)
    means, variances = np.array([m for m, _ in moments]), np.array([v for _, v in moments])
    # The precision that each run itself contributes, without the wide prior.
    weight = np.maximum(1 / variances - 1 / (9 * spread), 0.0)
    pull = np.where(weight > 0, means / variances - origin / (9 * spread), 0.0)
    centre, variance = origin, spread
    for _ in range(100):
        posterior_variance = 1 / (weight + 1 / variance)
        posterior_mean = posterior_variance * (pull + centre / variance)
        centre = (PRIOR_RUNS * origin + posterior_mean.sum(0)) / (PRIOR_RUNS + len(moments))
        prior_square = PRIOR_RUNS * (spread + (origin - centre) ** 2)
        square = prior_square + ((posterior_mean - centre) ** 2 + posterior_variance).sum(0)
        variance = square / (PRIOR_RUNS + len(moments))
    alpha, slope, gain = centre
    widths = np.sqrt(variance)
    return CurvePrior(
        alpha=float(np.exp(alpha)),
        alpha_spread=float(widths[0]),
        slope=float(slope),
        slope_spread=float(widths[1]),
        gain=float(gain),
        gain_spread=float(widths[2]),
        wander=first.wander,
    )


@dataclass(frozen=True)
class _RunInProgress:
    """The known points of a run, relative to the present one. The last entry of u and h is the end of the run.

    Attributes:
        now: Loss at the present point, nats per token.
        u: ln S / S(now), shape [points + 1].
        h: How far the rate has come down since now, shape [points + 1].
        y: Loss / now - 1, shape [points].
        count: How many measurements each point stands for, shape [points].
        slope: A rough slope, which only sets the size of the wander.
    """

    now: float
    u: Array
    h: Array
    y: Array
    count: Array
    slope: float


@dataclass(frozen=True)
class _Posterior:
    """What is known of a run after its points.

    Attributes:
        end: Mean and variance of final loss / now - 1.
        moments: Means and variances of ln alpha, k and c, shape [3] each.
    """

    end: tuple[float, float]
    moments: tuple[Array, Array]


def _prepare_run(tokens: ArrayLike, loss: ArrayLike, at: float, schedule: Schedule | None) -> _RunInProgress:
    """Check the points and the schedule of a run, and express them relative to the last point."""
    t, y = clean_curve(tokens, loss)
    if t.size < 3:
        raise ValueError(
            f"a forecast needs at least 3 points with a finite loss, got {t.size}: wait for more of the run"
        )
    if not (math.isfinite(at) and at >= t[-1]):
        raise ValueError(f"needed `at` at or after the last point, {t[-1]:g} tokens, got {at:g}")
    fine = np.unique(np.r_[0.0, np.linspace(0.0, at, 1025), t])
    share = np.ones_like(fine) if schedule is None else np.asarray(schedule(fine), float)
    if share.shape != fine.shape or not np.all(np.isfinite(share) & (share >= 0) & (share <= 1 + 1e-9)):
        raise ValueError("a schedule gives the rate as a share of its peak: one number in [0, 1] for every token count")
    total = np.r_[0.0, np.cumsum(np.diff(fine) * (share[1:] + share[:-1]) / 2)]
    is_kept = (t >= OLDEST_SHARE * t[-1]) & (t >= fine[int(np.argmax(share >= 0.99 * share.max()))])
    if is_kept.sum() < 3:
        is_kept = np.arange(t.size) >= t.size - 3
    t, y, count = _thin_points(t[is_kept], y[is_kept])
    t_and_end = np.append(t, at)
    sums: Array = np.interp(t_and_end, fine, total)
    if not sums[0] > 0:
        raise ValueError("the schedule has a rate of 0 up to the first point: give tokens in the schedule's own units")
    u: Array = np.log(sums / sums[-2])
    come_down: Array = 1 - np.sqrt(np.minimum(np.interp(t_and_end, fine, share), 1.0))
    now = float(np.median(y[-3:]))
    # The slope over the last factor of two in S, at least three points.
    recent = np.flatnonzero(u[:-1] >= min(-0.7, u[max(u.size - 4, 0)]))
    older, newer = recent[: recent.size // 2], recent[recent.size // 2 :]
    distance = float(np.median(u[newer]) - np.median(u[older]))
    slope = float(np.median(y[older]) - np.median(y[newer])) / now / distance if distance > 0 else 0.0
    return _RunInProgress(now, u, come_down - come_down[-2], y / now - 1, count, max(slope, 0.01))


def _thin_points(t: Array, y: Array) -> tuple[Array, Array, Array]:
    """Thin a curve to at most MAX_POINTS points, the medians of equal cells in ln tokens.

    Returns:
        (tokens, loss, how many measurements each point counts as).
    """
    if t.size <= MAX_POINTS:
        return t, y, np.ones(t.size)
    edges = np.linspace(np.log(t[0]), np.log(t[-1]), MAX_POINTS + 1)[1:-1]
    cell = np.searchsorted(edges, np.log(t))
    groups = [cell == i for i in np.unique(cell)]
    count = np.array([g.sum() for g in groups], float)
    # A median has 2 / pi of the efficiency of a mean.
    count = np.where(count > 2, 2 / math.pi * count, count)
    return np.array([np.exp(np.log(t[g]).mean()) for g in groups]), np.array([np.median(y[g]) for g in groups]), count


def _find_initial_weights(y: Array) -> Array:
    """Return the first weights of the points: spikes, far from the median of five neighbours, count little."""
    if y.size < 5:
        return np.ones(y.size)
    neighbours = np.lib.stride_tricks.sliding_window_view(np.pad(y, 2, mode="reflect"), 5)
    distance = np.abs(y - np.median(neighbours, axis=1))
    width = 3 * 1.4826 * max(float(np.median(distance)), 1e-4)
    return np.asarray(np.minimum(1.0, (width / np.maximum(distance, 1e-12)) ** 2))


def _compute_posterior(run: _RunInProgress, prior: CurvePrior, *, has_ended: bool = False) -> _Posterior:
    """Sum the Gaussian posteriors of (b, k, c) over alpha and noise, with Student weights found in a few passes.

    Args:
        run: The points.
        prior: What is believed of the run beforehand.
        has_ended: Whether the last point is the end of the run: then it is no spike, however far a cooldown has lowered
            it.

    Returns:
        The distribution of the final loss and of the parameters.
    """
    m = run.y.size
    bend = np.expm1(-np.outer(ALPHA_GRID, run.u)) / ALPHA_GRID[:, None]
    # Shape [alphas, points + 1, 3].
    design = np.stack([np.ones_like(bend), bend, np.broadcast_to(-run.h, bend.shape)], -1)
    known, ahead = design[:, :m], design[:, m]
    centre = np.array([0.0, prior.slope, prior.gain])
    precision = np.array([LEVEL_SPREAD, prior.slope_spread, prior.gain_spread]) ** -2.0
    path = (prior.wander * run.slope) ** 2 * np.minimum.outer(run.u - run.u[0], run.u - run.u[0])
    log_prior = -0.5 * (np.log(ALPHA_GRID / prior.alpha) / prior.alpha_spread) ** 2
    initial_weight, parts = _find_initial_weights(run.y), []
    if has_ended:
        initial_weight[-1] = 1.0
    for noise in NOISE_GRID:
        weight = initial_weight
        for _ in range(WEIGHT_PASSES):
            chol = np.linalg.cholesky(path[:m, :m] + np.diag(noise**2 / (weight * run.count)))
            r = solve_triangular(chol, run.y, lower=True)
            # The path at the end, given the path at the points.
            tied = solve_triangular(chol, path[:m, m], lower=True)
            white = solve_triangular(chol, known.transpose(1, 0, 2).reshape(m, -1), lower=True).reshape(
                m, len(ALPHA_GRID), 3
            )
            gram = np.einsum("mai,maj->aij", white, white) + np.diag(precision)
            cov = np.linalg.inv(gram)
            pull = np.einsum("mai,m->ai", white, r) + precision * centre
            theta = np.einsum("aij,aj->ai", cov, pull)
            left = r[:, None] - np.einsum("mai,ai->ma", white, theta)
            misfit = (left**2).sum(0) + ((theta - centre) ** 2 * precision).sum(1)
            log_likelihood = log_prior - 0.5 * misfit - np.log(np.diag(chol)).sum() - 0.5 * np.linalg.slogdet(gram)[1]
            share = np.exp(log_likelihood - log_likelihood.max())
            smooth = np.einsum("ami,ai->ma", known, theta) + path[:m, :m] @ solve_triangular(chol.T, left, lower=False)
            off = (run.y - smooth @ share / share.sum()) ** 2 * run.count / noise**2
            used, weight = weight, np.minimum(1.0, (NOISE_DEGREES + 1) / (NOISE_DEGREES + off))
            if has_ended:
                weight[-1] = 1.0
        # Replace the weighted Gaussian density by the Student density: otherwise spikes would pass for noise
        # everywhere.
        student = -0.5 * (NOISE_DEGREES + 1) * np.log1p(off / NOISE_DEGREES) + 0.5 * used * off - 0.5 * np.log(used)
        log_likelihood += student[: m - has_ended].sum() - 0.5 * (math.log(noise / USUAL_NOISE) / NOISE_SPREAD) ** 2
        lean = ahead - np.einsum("mai,m->ai", white, tied)
        mean = np.einsum("ai,ai->a", ahead, theta) + tied @ left
        variance = path[m, m] - tied @ tied + np.einsum("ai,aij,aj->a", lean, cov, lean) + noise**2
        parts.append((log_likelihood, mean, variance, theta, np.diagonal(cov, axis1=1, axis2=2)))
    log_likelihoods, means, variances, thetas, spreads = (np.array(part) for part in zip(*parts, strict=True))
    share = np.exp(log_likelihoods - log_likelihoods.max())
    share /= share.sum()
    end = float((share * means).sum())
    logs = np.log(ALPHA_GRID)
    log_alpha = float(share.sum(0) @ logs)
    theta = np.einsum("na,nai->i", share, thetas)
    spread = np.einsum("na,nai->i", share, spreads + (thetas - theta) ** 2)
    return _Posterior(
        (end, float((share * (variances + (means - end) ** 2)).sum())),
        (
            np.array([log_alpha, theta[1], theta[2]]),
            np.array([float(share.sum(0) @ (logs - log_alpha) ** 2), spread[1], spread[2]]),
        ),
    )
