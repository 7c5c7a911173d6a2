"""Choose the next run, and the settings to recommend: the discrete knowledge gradient per cost at the target.

The knowledge gradient on a discrete set is that of Frazier, Powell and Dayanik 2009; with fidelities, that of Poloczek,
Wang and Frazier, arXiv 1603.00389. It is preferred to expected improvement times correlation because it values a cheap
run by what the run changes at the target, and takes no more code: one posterior covariance and nine quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from torch import Tensor

from hpo.surrogate.feasibility import MIN_FEASIBILITY, RISK_AVERSION, SAFE_FEASIBILITY, Feasibility
from hpo.surrogate.gp import EnsembleMember, Surrogate, join_inputs
from hpo.surrogate.inputs import AXES, Domain
from scaling.common.arrays import Array

# Number of settings run earlier that are considered again in one call.
MAX_KNOWN_POINTS = 300
# Cost that lower fidelities may take before the highest gets its half, in runs at the highest: least and most.
LOW_FIDELITY_SHARE = (1.0, 3.0)
# Skip fidelities whose losses correlate less with the target's, if others remain.
MIN_USEFULNESS = 0.1
# Added to the score of settings that are likely to fail, per unit of probability below the least that is accepted, in
# units of z: all others come first.
FAILURE_PENALTY = 1e4
# Nine equally likely standard normal values.
QUANTILES = ndtri((np.arange(1, 10) - 0.5) / 9)

# A function of cube points [m, p] that returns scores [m]; lower is better.
ScoreFunction = Callable[[Array], Array]


def _draw_neighbours(rng: np.random.Generator, domain: Domain, centres: Array, count: int, sd: float) -> Array:
    """Draw `count` neighbours of each centre.

    A coordinate moves with probability max(1/2, 2/p), by a normal step; a category is drawn again uniformly.
    """
    points = np.repeat(centres, count, axis=0)
    chance = max(0.5, 2 / points.shape[1])
    moved = np.clip(points + sd * rng.standard_normal(points.shape), 0.0, 1.0)
    is_moved = rng.random(points.shape) < np.where(domain.nominal, min(chance, 2 * sd), chance)
    return domain.snap(np.where(is_moved, np.where(domain.nominal, rng.random(points.shape), moved), points))


def _build_pool(
    score: ScoreFunction, domain: Domain, seen: Array, rng: np.random.Generator, n_uniform: int
) -> tuple[Array, Array]:
    """Return candidate points [m, p] and their scores [m].

    They are uniform points, the settings already run, and neighbours of the eight best at three distances.
    """
    known = np.unique(seen, axis=0)
    if len(known) > MAX_KNOWN_POINTS:
        known = known[rng.permutation(len(known))[:MAX_KNOWN_POINTS]]
    pool = np.vstack([domain.snap(rng.random((n_uniform, seen.shape[1]))), known])
    rounds = [(sd, 8, -(-n_uniform // 16)) for sd in (0.15, 0.05, 0.015)]
    return _refine_pool(score, domain, pool, score(pool), rng, rounds)


def _refine_pool(
    score: ScoreFunction,
    domain: Domain,
    pool: Array,
    scores: Array,
    rng: np.random.Generator,
    rounds: Sequence[tuple[float, int, int]],
) -> tuple[Array, Array]:
    """Add neighbours of the best points to the pool, in rounds of (sd, centres, neighbours of each centre)."""
    for sd, centres, count in rounds:
        new = _draw_neighbours(rng, domain, pool[np.argsort(scores, kind="stable")[:centres]], count, sd)
        pool, scores = np.vstack([pool, new]), np.append(scores, score(new))
    return pool, scores


def _make_target_score(
    member: EnsembleMember, domain: Domain, feasibility: Feasibility | None, least: float = MIN_FEASIBILITY
) -> ScoreFunction:
    """Return a function that scores points by the member's posterior mean at the target.

    Points that are less likely than `least` to end with a loss come last.
    """

    def predict(points: Array) -> Array:
        mean: Array = member.posterior(join_inputs(domain.encode(points), np.zeros(AXES)))[0].numpy()
        return mean

    return predict if feasibility is None else lambda points: predict(points) + _penalise(feasibility(points), least)


def _penalise(probability: Array, least: float) -> Array:
    """Return what is added to the scores of points with these probabilities of success, [m]."""
    penalty: Array = FAILURE_PENALTY * np.maximum(least - probability, 0.0)
    return penalty


def recommend(
    surrogate: Surrogate, domain: Domain, seen: Array, seed: Sequence[int], feasibility: Feasibility | None = None
) -> Array:
    """Return the settings with the lowest posterior mean + sd / 2 at the target.

    The mean of the best member selects a pool, and the mixture ranks the 150 best points of it. Refining the pool by
    the mixture itself is too cautious: regret 0.085 instead of 0.021 on Hartmann-6 at cost 5, 0.0033 instead of 0.0019
    on dense215_D (20 seeds).

    Args:
        surrogate: The fitted ensemble.
        domain: The search space.
        seen: Snapped cube points of all runs, [n, p].
        seed: Seed of the random candidates.
        feasibility: How likely a run is to end with a loss; None: certain everywhere.

    Returns:
        A cube point [p].
    """
    rng = np.random.default_rng(seed)
    # Where runs fail at random, no settings are safe.
    least = 0.0 if feasibility is None else min(SAFE_FEASIBILITY, 0.9 * float(feasibility(seen).mean()))
    score = _make_target_score(surrogate.best, domain, feasibility, least)
    pool, mean = _build_pool(score, domain, seen, rng, 400)
    pool, mean = _refine_pool(score, domain, pool, mean, rng, [(sd, 4, 40) for sd in (0.02, 0.006, 0.002)])
    # In a space with few cells, duplicates would take all 150 places.
    distinct = np.unique(pool, axis=0, return_index=True)[1]
    pool = pool[distinct[np.argsort(mean[distinct], kind="stable")[:150]]]
    mixed, variance = surrogate.posterior(join_inputs(domain.encode(pool), np.zeros(AXES)))
    cautious = (mixed + 0.5 * variance.sqrt()).numpy()
    if feasibility is not None:
        cautious = cautious + _penalise(feasibility(pool), least)
    chosen: Array = pool[int(cautious.argmin())]
    return chosen


def make_knowledge_gradient(member: EnsembleMember, anchors: Tensor) -> Callable[[Tensor], Array]:
    """Return the knowledge gradient as a function of model inputs x [m, d + 2].

    It is the amount by which one run at x is expected to lower the smallest posterior mean over the anchors, [m], in
    units of z. It is zero where the posterior variance is.

    Args:
        member: The process that predicts.
        anchors: Points at the target, [a, d + 2].
    """
    mean, _, v_a = member.posterior(anchors)

    def compute_gain(x: Tensor) -> Array:
        _, variance, v_x = member.posterior(x)
        shift = member.covariance(anchors, v_a, x, v_x) / torch.sqrt(variance + member.noise)
        least = torch.stack([(mean.unsqueeze(-1) + q * shift).amin(0) for q in QUANTILES]).mean(0)
        expected: Array = torch.where(variance > 1e-7, (mean.min() - least).clamp_min(0.0), 0.0).numpy()
        return expected

    return compute_gain


def _match_points(a: Array, b: Array) -> NDArray[np.bool_]:
    """Return which rows of a [m, p] equal which rows of b [n, p], as [m, n]."""
    equal = np.ones((len(a), len(b)), dtype=bool)
    # Several times faster than a reduction over so short a dimension.
    for u_a, u_b in zip(a.T, b.T, strict=True):
        equal &= np.abs(u_a[:, None] - u_b) < 1e-9
    return equal


def compute_usefulness(member: EnsembleMember, domain: Domain, slots: Array, seed: Sequence[int]) -> Array:
    """Return how well losses at each fidelity predict those at the target: a posterior correlation over settings.

    It is the expected covariance of the losses at both fidelities over 64 uniform points, posterior uncertainty
    included, divided by the root of the product of their expected variances. 1 means the same ranking of the settings,
    0 a fidelity without information, and a negative value one that misleads. With few runs it is mostly the prior's.

    Args:
        member: The process that predicts.
        domain: The search space.
        slots: Fidelity coordinates, [l, 2].
        seed: Seed of the uniform points.

    Returns:
        Correlations [l].
    """
    rng = np.random.default_rng(seed)
    features = domain.encode(domain.snap(rng.random((64, len(domain.nominal)))))
    x_t = join_inputs(features, np.zeros(AXES))
    mean_t, _, v_t = member.posterior(x_t)

    def moment(m_a: Tensor, m_b: Tensor, joint: Tensor) -> float:
        """Return the expected covariance over the points, from posterior means and the posterior covariance."""
        means = ((m_a - m_a.mean()) * (m_b - m_b.mean())).mean()
        return float(means + joint.diagonal().mean() - joint.mean())

    spread_t = moment(mean_t, mean_t, member.covariance(x_t, v_t, x_t, v_t))
    result = np.empty(len(slots))
    for i, slot in enumerate(slots):
        x = join_inputs(features, slot)
        mean, _, v = member.posterior(x)
        spread = moment(mean, mean, member.covariance(x, v, x, v))
        covariance = moment(mean, mean_t, member.covariance(x, v, x_t, v_t))
        result[i] = covariance / math.sqrt(max(spread * spread_t, 1e-300))
    return result


@dataclass(frozen=True)
class AvailableRuns:
    """The fidelities that can be run next, what they cost, and what was run so far.

    The unit of cost is a run from scratch at the most expensive fidelity within reach.

    Attributes:
        slots: Fidelity coordinates of the slots, [l, 2].
        cost: Cost of a run from scratch at each slot, [l].
        top: The slot of cost 1; None when it cannot be run now.
        size: Ids of the model sizes of the slots, [l].
        points: Cube points of the runs so far, [n, p].
        run_slots: Slot of each of these runs, -1 for a fidelity that is no slot, [n].
        is_stuck: Which of these runs cannot be continued, because they are running or diverged, [n].
        continues: Whether a run can be continued to a more expensive slot of the same size for the difference in cost.
        limit: The most that may be spent.
        spent: Cost so far of the runs that did not reach the most expensive fidelity, and of all runs.
    """

    slots: Array
    cost: Array
    top: int | None
    size: NDArray[np.int64]
    points: Array
    run_slots: NDArray[np.int64]
    is_stuck: NDArray[np.bool_]
    continues: bool
    limit: float
    spent: tuple[float, float]

    def compute_price(self, points: Array, slot: int) -> Array:
        """Return the cost of running each point [m, p] at a slot, [m].

        It is infinite where that run exists already, where a run of these settings cannot be continued or is beyond the
        slot, and above the limit.
        """
        same = _match_points(points, self.points)
        blocked = same & (self.run_slots == slot)
        price = np.full(len(points), float(self.cost[slot]))
        if self.continues:
            same_size = same & (self.run_slots >= 0) & (self.size[self.run_slots] == self.size[slot])
            done = np.where(same_size, self.cost[self.run_slots], 0.0).max(1, initial=0.0)
            blocked |= same_size & self.is_stuck
            blocked |= (done >= self.cost[slot])[:, None]
            price = price - done
        return np.where(blocked.any(1) | (price > self.limit * (1 + 1e-9)), np.inf, price)


def _select_slots(usefulness: Array, available: AvailableRuns, pool: Array) -> list[int]:
    """Return the slots to consider: those that correlate with the target, or else all where a point can be run."""
    is_possible = np.array([np.isfinite(available.compute_price(pool, slot)).any() for slot in range(len(usefulness))])
    good = np.flatnonzero((usefulness >= MIN_USEFULNESS) & is_possible)
    return [int(i) for i in (good if len(good) else np.flatnonzero(is_possible))]


def suggest(
    surrogate: Surrogate,
    domain: Domain,
    seen: Array,
    available: AvailableRuns,
    *,
    seed: Sequence[int],
    feasibility: Feasibility | None = None,
) -> tuple[Array, int]:
    """Choose the point and the slot with the largest knowledge gradient per cost.

    Where runs may fail, the gain is multiplied by the squared probability that the run ends with a loss, and losses
    that are predicted for settings that probably fail do not count.

    About half of the cost goes to the highest fidelity, as a safeguard against low fidelities that mislead. This starts
    only when lower fidelities have had as much as their usefulness u warrants: u / (1 - u) within `LOW_FIDELITY_SHARE`,
    and at most half of everything that may be spent. When the best candidate would exceed that, the current
    recommendation is run at the highest fidelity instead. Giving it half from the start had two to four times the
    regret at cost 2 on most problems (20 seeds, studies/LOG.md).

    Gains are those of the best member. A mean over all members, or a member drawn at random for each call, was slower
    and no better on two parameters.

    Args:
        surrogate: The fitted ensemble.
        domain: The search space.
        seen: Cube points of all runs, [n, p].
        available: What can be run, and its cost.
        seed: Seed of the random candidates.
        feasibility: How likely a run is to end with a loss; None: certain everywhere.

    Returns:
        A cube point [p], and the index of the slot.
    """
    rng = np.random.default_rng(seed)
    member = surrogate.best
    pool, scores = _build_pool(_make_target_score(member, domain, feasibility), domain, seen, rng, 200)
    at_target = join_inputs(domain.encode(pool), np.zeros(AXES))
    predicted, variance, _ = member.posterior(at_target)
    mean: Array = scores if feasibility is None else predicted.numpy()
    sd: Array = variance.sqrt().clamp_min(1e-12).numpy()
    order = np.argsort(scores, kind="stable")
    chance = np.ones(len(pool)) if feasibility is None else feasibility(pool)
    if (chance >= MIN_FEASIBILITY).any():
        order = order[chance[order] >= MIN_FEASIBILITY]
    anchors = at_target[np.concatenate([order[:128], rng.permutation(order[128:])[:128]])]
    z = (mean[order[0]] - mean) / sd
    improvement = sd * (z * ndtr(z) + np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)) * chance**RISK_AVERSION
    by_improvement = np.argsort(-improvement, kind="stable")
    candidates = pool[np.concatenate([by_improvement[:60], order[:15], rng.permutation(len(pool))[:75]])]

    knowledge_gradient = make_knowledge_gradient(member, anchors)

    def compute_gains(points: Array, slot: int) -> tuple[Array, Array]:
        """Return the knowledge gradient of each point, -1 where it cannot be run, and the same per cost."""
        price = available.compute_price(points, slot)
        inputs = join_inputs(domain.encode(points), available.slots[slot])
        gain = knowledge_gradient(inputs)
        if feasibility is not None:
            gain = gain * feasibility(points) ** RISK_AVERSION
        gain = np.where(np.isfinite(price), gain, -1.0)
        return gain, gain / (np.where(np.isfinite(price), price, 0.0) + 0.02)

    cheapest = int(np.argmin(available.cost))
    usefulness = compute_usefulness(member, domain, available.slots, [*seed, 3])
    levels = _select_slots(usefulness, available, pool)
    winner, slot, highest = candidates[0], cheapest, -math.inf
    for level in levels:
        points, (_, score) = candidates, compute_gains(candidates, level)
        for radius in (0.1, 0.03):
            neighbours = _draw_neighbours(rng, domain, points[np.argsort(-score, kind="stable")[:4]], 12, radius)
            points, score = np.vstack([points, neighbours]), np.append(score, compute_gains(neighbours, level)[1])
        best = int(np.argmax(score))
        if score[best] > highest:
            winner, slot, highest = points[best], level, float(score[best])

    low_cost, total_cost = available.spent
    top = available.top
    trusted = float(np.clip(usefulness[slot] / max(1.0 - usefulness[slot], 1e-9), *LOW_FIDELITY_SHARE))
    max_low = max(min(trusted, 0.5 * (total_cost + available.limit)), 0.5 * (total_cost + 1))
    if top is not None and slot != top and low_cost + float(available.compute_price(winner[None], slot)[0]) > max_low:
        answer = recommend(surrogate, domain, seen, [*seed, 1], feasibility)
        is_possible = np.isfinite(available.compute_price(pool, top))
        if float(compute_gains(answer[None], top)[0][0]) > 1e-12:
            winner, slot = answer, top
        # The recommendation is known at the highest fidelity already.
        elif is_possible.any():
            winner, slot = pool[np.flatnonzero(is_possible)[np.argmax(improvement[is_possible])]], top
    return winner, slot
