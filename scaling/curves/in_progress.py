"""The final loss of a run that is still going on, as a distribution.

    loss(t) / loss(now) = 1 + b - k (1 - x^-alpha) / alpha - c (h - h_now) + wander,    x = S(t) / S(now)

S is the sum of the learning rate over the tokens (S1 of arXiv 2408.11029: tokens, where the rate is constant), so the
first terms are E + A S^-alpha written from the present point: k is the slope now, in loss shares per e-fold of S.
h = 1 - sqrt(lr / peak) is how far the rate has come down and c what a whole cooldown gains. The cited law has an area with a
momentum in place of h; where the decay is slow against that memory, that is 1 - lr / peak. The root, chosen on held-out
model sizes, fits better and needs no step count. Wander is a Brownian path in ln x: what the formula leaves out grows with the
distance ahead, and old points say little about the future.

The trunk alone says nothing about c: its gain comes from the prior, or from runs of the same study that have ended
(`learn_prior`). All is linear given alpha and the noise, which are summed over on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular

from scaling.common.arrays import Array
from scaling.curves.loss_curve import read_curve
from scaling.laws.decay_shapes import DECAYS

Schedule: TypeAlias = Callable[[Array], Array]  # tokens -> learning rate as a share of its peak

ALPHAS = np.geomspace(0.05, 3.0, 25)
NOISES = np.geomspace(1e-4, 3e-2, 9)  # relative sd of one measurement
USUAL_NOISE, NOISE_SPREAD = 1e-3, 1.0  # prior, log-normal
LEVEL = 0.03  # prior sd of b, beside the median of the last points
MOST_POINTS = 48  # longer curves are thinned to medians of equal steps in ln tokens
OLDEST = 0.05  # points before this share of the tokens seen are left out: the early curve is another one
WORTH = 2.0  # runs that a belief held beforehand counts as
TAIL = 2.0  # degrees of freedom of the noise: spikes lose their weight
PASSES = 4  # over the weights


@dataclass(frozen=True)
class CurvePrior:
    """What is believed of a run before it starts."""

    alpha: float = 0.5  # median
    alpha_spread: float = 0.3  # sd of ln alpha
    slope: float = 0.08  # k, share of the loss per e-fold
    slope_spread: float = 0.08
    gain: float = 0.06  # c, share of the loss
    gain_spread: float = 0.04
    wander: float = 0.03  # sd after one e-fold, in units of the slope


@dataclass(frozen=True)
class EndLoss:
    """The final loss as it will be measured, nats per token: log-normal with this mean and sd."""

    mean: float
    sd: float

    def quantile(self, p: float) -> float:
        """The loss that the run ends below with probability p, in (0, 1)."""
        return math.exp(self._log().inv_cdf(p))

    def probability_below(self, level: float) -> float:
        """The probability that the run ends below `level`, nats per token."""
        return self._log().cdf(math.log(level)) if level > 0 else 0.0

    def _log(self) -> NormalDist:
        variance = math.log1p((self.sd / self.mean) ** 2)
        return NormalDist(math.log(self.mean) - variance / 2, math.sqrt(variance))


@dataclass(frozen=True)
class Finished:
    """A run that has ended: 1-d tokens and loss, the last point its final one, and the schedule it ran under."""

    tokens: ArrayLike
    loss: ArrayLike
    schedule: Schedule | None = None


def cooldown(
    at: float, *, share: float = 0.2, warmup: float = 0.0, decay: str = "1-sqrt", floor: float = 0.1
) -> Schedule:
    """Warm-up over `warmup` tokens, the constant rate, then a decay (by default 1 - sqrt(u)) over the last `share` of `at` tokens.

    decay: a name in `scaling.laws.decay_shapes`; floor: where "exponential" ends.
    """
    if not (at > 0 and 0 < share < 1 and 0 <= warmup <= (1 - share) * at):
        raise ValueError(f"needed 0 < share < 1 and a warm-up before the cooldown, got {at=}, {share=}, {warmup=}")
    start = (1 - share) * at

    def factor(tokens: Array) -> Array:
        up = np.minimum(tokens / warmup, 1.0) if warmup else 1.0
        return np.asarray(up * DECAYS[decay](np.clip((tokens - start) / (at - start), 0.0, 1.0), floor))

    return factor


def logged(tokens: ArrayLike, lr: ArrayLike) -> Schedule:
    """The schedule that was logged or planned: linear between points, from 0 rate at 0 tokens if the first lies below peak."""
    t, rate = np.asarray(tokens, float), np.asarray(lr, float)
    if t.ndim != 1 or t.shape != rate.shape or not t.size or not np.all(np.isfinite(rate) & (rate >= 0)):
        raise ValueError("tokens and lr must be 1-d, of one length above 0, and every lr finite and at least 0")
    order = np.argsort(t, kind="stable")
    t, share = t[order], rate[order] / rate.max()
    first = 0.0 if share[0] < 0.99 else 1.0
    return lambda tokens: np.asarray(np.interp(tokens, np.r_[0.0, t], np.r_[first, share]))


def predict_end(
    tokens: ArrayLike,
    loss: ArrayLike,
    at: float,
    *,
    schedule: Schedule | None = None,
    prior: CurvePrior | None = None,
    siblings: Sequence[Finished] = (),
) -> EndLoss:
    """The loss after `at` tokens of a run of which these points are known (1-d; NaN losses are left out).

    schedule: rate over peak, from 0 to `at` tokens; None: constant to the end, so nothing is gained by a cooldown.
    prior: of `learn_prior`, or the default. Its gain of 0.06 +- 0.04 spans public runs (0.025 for a cooldown of a tenth,
        0.06 to 0.08 for a cosine) and most of this project's small proxies (0.02 to 0.12, more at higher rates); it was
        set by hand. Half a run says nothing of its gain: give a learnt prior where runs have ended.
    siblings: ended runs of the same study. Each is forecast at the same share of its tokens; their mean error moves this
        forecast, their spread widens it. A prior learnt from them makes them look a little too good.
    At least 3 finite points, ValueError otherwise, or when `at` lies before the last.
    """
    belief = prior or CurvePrior()
    run = _prepare(tokens, loss, at, schedule)
    posterior = _posterior(run, belief)
    change, variance = posterior.end
    if siblings:
        share = float(read_curve(tokens, loss)[0][-1]) / at
        errors = np.array([e for s in siblings if (e := _error(s, share, belief)) is not None]).reshape(-1, 2)
        weight = len(errors) / (len(errors) + WORTH)
        shift = weight * float(errors[:, 0].mean()) if len(errors) else 0.0
        z2 = (errors[:, 0] - shift) ** 2 / errors[:, 1]
        change, variance = change + shift, variance * max(1.0, (WORTH + float(z2.sum())) / (WORTH + len(errors)))
    return EndLoss(run.now * (1 + change), run.now * math.sqrt(variance))


def _error(sibling: Finished, share: float, prior: CurvePrior) -> tuple[float, float] | None:
    """What a sibling ended above its forecast at this share of its tokens, and the forecast's variance; both relative."""
    t, y = read_curve(sibling.tokens, sibling.loss)
    early = t <= share * t[-1] * (1 + 1e-3)
    if early.sum() < 3 or early.all():
        return None
    run = _prepare(t[early], y[early], float(t[-1]), sibling.schedule)
    change, variance = _posterior(run, prior).end
    return float(y[-1]) / run.now - 1 - change, variance


def learn_prior(runs: Sequence[Finished], start: CurvePrior | None = None) -> CurvePrior:
    """The prior for the next run of a family: means and spreads of ln alpha, slope and gain over runs that have ended.

    Each run is first read under a prior three times as wide, whose share is then taken out again; EM on what is left.
    `start` counts as two runs, so without runs it comes back.
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
    found = []
    for run in runs:
        t, _ = read_curve(run.tokens, run.loss)
        found.append(_posterior(_prepare(run.tokens, run.loss, float(t[-1]), run.schedule), wide, ended=True).moments)
    seen, doubt = np.array([m for m, _ in found]), np.array([v for _, v in found])
    weight = np.maximum(1 / doubt - 1 / (9 * spread), 0.0)  # precision that the run itself brings
    pull = np.where(weight > 0, seen / doubt - origin / (9 * spread), 0.0)
    centre, variance = origin, spread
    for _ in range(100):
        post = 1 / (weight + 1 / variance)
        each = post * (pull + centre / variance)
        centre = (WORTH * origin + each.sum(0)) / (WORTH + len(found))
        square = WORTH * (spread + (origin - centre) ** 2) + ((each - centre) ** 2 + post).sum(0)
        variance = square / (WORTH + len(found))
    alpha, slope, gain = centre
    widths = np.sqrt(variance)
    return CurvePrior(
        float(np.exp(alpha)),
        float(widths[0]),
        float(slope),
        float(widths[1]),
        float(gain),
        float(widths[2]),
        first.wander,
    )


@dataclass(frozen=True)
class _RunInProgress:
    """The known points in units of the present one; the end is the last entry of u and h."""

    now: float  # loss there, nats per token
    u: Array  # ln S / S(now), points + 1
    h: Array  # rate come down since now, points + 1
    y: Array  # loss / now - 1
    count: Array  # measurements that each point stands for
    slope: float  # rough, only to set the size of the wander


@dataclass(frozen=True)
class _Posterior:
    end: tuple[float, float]  # mean and variance of loss(at) / now - 1
    moments: tuple[Array, Array]  # means and variances of ln alpha, k, c


def _prepare(tokens: ArrayLike, loss: ArrayLike, at: float, schedule: Schedule | None) -> _RunInProgress:
    t, y = read_curve(tokens, loss)
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
    kept = (t >= OLDEST * t[-1]) & (t >= fine[int(np.argmax(share >= 0.99 * share.max()))])
    if kept.sum() < 3:
        kept = np.arange(t.size) >= t.size - 3
    t, y, count = _thin(t[kept], y[kept])
    here = np.append(t, at)
    sums: Array = np.interp(here, fine, total)
    if not sums[0] > 0:
        raise ValueError("the schedule has a rate of 0 up to the first point: give tokens in the schedule's own units")
    u: Array = np.log(sums / sums[-2])
    come_down: Array = 1 - np.sqrt(np.minimum(np.interp(here, fine, share), 1.0))
    now = float(np.median(y[-3:]))
    recent = np.flatnonzero(u[:-1] >= min(-0.7, u[max(u.size - 4, 0)]))  # the last factor of two, three points at least
    older, newer = recent[: recent.size // 2], recent[recent.size // 2 :]
    apart = float(np.median(u[newer]) - np.median(u[older]))
    falls = float(np.median(y[older]) - np.median(y[newer])) / now / apart if apart > 0 else 0.0
    return _RunInProgress(now, u, come_down - come_down[-2], y / now - 1, count, max(falls, 0.01))


def _thin(t: Array, y: Array) -> tuple[Array, Array, Array]:
    """(tokens, loss, what each counts) of at most MOST_POINTS points: the medians of equal cells in ln tokens."""
    if t.size <= MOST_POINTS:
        return t, y, np.ones(t.size)
    edges = np.linspace(np.log(t[0]), np.log(t[-1]), MOST_POINTS + 1)[1:-1]
    cell = np.searchsorted(edges, np.log(t))
    groups = [cell == i for i in np.unique(cell)]
    count = np.array([g.sum() for g in groups], float)
    count = np.where(count > 2, 2 / math.pi * count, count)  # efficiency of a median
    return np.array([np.exp(np.log(t[g]).mean()) for g in groups]), np.array([np.median(y[g]) for g in groups]), count


def _calm(y: Array) -> Array:
    """First weights: points far from the median of their five neighbours, a spike, count little."""
    if y.size < 5:
        return np.ones(y.size)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(y, 2, mode="reflect"), 5)
    apart = np.abs(y - np.median(around, axis=1))
    return np.asarray(
        np.minimum(1.0, (3 * 1.4826 * max(float(np.median(apart)), 1e-4) / np.maximum(apart, 1e-12)) ** 2)
    )


def _posterior(run: _RunInProgress, prior: CurvePrior, *, ended: bool = False) -> _Posterior:
    """Sum over alpha and noise of the Gaussian posteriors of (b, k, c), with Student weights found in a few passes.

    ended: the last point is the run's end, so it cannot be a spike, however far a cooldown has brought it down.
    """
    m = run.y.size
    bend = np.expm1(-np.outer(ALPHAS, run.u)) / ALPHAS[:, None]
    design = np.stack([np.ones_like(bend), bend, np.broadcast_to(-run.h, bend.shape)], -1)  # alphas, points + 1, 3
    known, ahead = design[:, :m], design[:, m]
    centre = np.array([0.0, prior.slope, prior.gain])
    precision = np.array([LEVEL, prior.slope_spread, prior.gain_spread]) ** -2.0
    path = (prior.wander * run.slope) ** 2 * np.minimum.outer(run.u - run.u[0], run.u - run.u[0])
    log_prior = -0.5 * (np.log(ALPHAS / prior.alpha) / prior.alpha_spread) ** 2
    calm, parts = _calm(run.y), []
    if ended:
        calm[-1] = 1.0
    for noise in NOISES:
        weight = calm
        for _ in range(PASSES):
            chol = np.linalg.cholesky(path[:m, :m] + np.diag(noise**2 / (weight * run.count)))
            r = solve_triangular(chol, run.y, lower=True)
            tied = solve_triangular(chol, path[:m, m], lower=True)  # the path at the end, given the path at the points
            white = solve_triangular(chol, known.transpose(1, 0, 2).reshape(m, -1), lower=True).reshape(
                m, len(ALPHAS), 3
            )
            gram = np.einsum("mai,maj->aij", white, white) + np.diag(precision)
            cov = np.linalg.inv(gram)
            pull = np.einsum("mai,m->ai", white, r) + precision * centre
            theta = np.einsum("aij,aj->ai", cov, pull)
            left = r[:, None] - np.einsum("mai,ai->ma", white, theta)
            misfit = (left**2).sum(0) + ((theta - centre) ** 2 * precision).sum(1)
            like = log_prior - 0.5 * misfit - np.log(np.diag(chol)).sum() - 0.5 * np.linalg.slogdet(gram)[1]
            share = np.exp(like - like.max())
            smooth = np.einsum("ami,ai->ma", known, theta) + path[:m, :m] @ solve_triangular(chol.T, left, lower=False)
            off = (run.y - smooth @ share / share.sum()) ** 2 * run.count / noise**2
            used, weight = weight, np.minimum(1.0, (TAIL + 1) / (TAIL + off))
            if ended:
                weight[-1] = 1.0
        # The weighted Gaussian's place is taken by the Student density: else spikes would pass for noise everywhere
        student = -0.5 * (TAIL + 1) * np.log1p(off / TAIL) + 0.5 * used * off - 0.5 * np.log(used)
        like += student[: m - ended].sum() - 0.5 * (math.log(noise / USUAL_NOISE) / NOISE_SPREAD) ** 2
        lean = ahead - np.einsum("mai,m->ai", white, tied)
        mean = np.einsum("ai,ai->a", ahead, theta) + tied @ left
        variance = path[m, m] - tied @ tied + np.einsum("ai,aij,aj->a", lean, cov, lean) + noise**2
        parts.append((like, mean, variance, theta, np.diagonal(cov, axis1=1, axis2=2)))
    likes, means, variances, thetas, spreads = (np.array(part) for part in zip(*parts, strict=True))
    share = np.exp(likes - likes.max())
    share /= share.sum()
    end = float((share * means).sum())
    logs = np.log(ALPHAS)
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
