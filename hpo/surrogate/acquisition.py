"""What to run next, and what to answer, from a surrogate: the discrete knowledge gradient per cost at the target.

Knowledge gradient on a discrete set: Frazier, Powell and Dayanik 2009; with fidelities: Poloczek, Wang and Frazier,
arXiv 1603.00389. Preferred to expected improvement times correlation because it values a cheap run by what it changes
at the target, and is no longer to write: one posterior covariance and nine quantiles.
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

from hpo.surrogate.gp import EnsembleMember, Surrogate, join
from hpo.surrogate.inputs import AXES, Domain
from scaling.common.arrays import Array

KNOWN = 300  # of the settings run before, so many are looked at again in one question
BELOW = (1.0, 3.0)  # runs at the highest fidelity whose cost may go to lower ones before: least and most, by usefulness
USEFUL = 0.1  # a fidelity whose losses go less with the target's is not bought while there is another
QUANTILES = ndtri((np.arange(1, 10) - 0.5) / 9)


def _jitter(rng: np.random.Generator, domain: Domain, centres: Array, per: int, sd: float) -> Array:
    """`per` neighbours of each centre; coordinates move with probability max(1/2, 2/p), categories are drawn afresh."""
    cube = np.repeat(centres, per, axis=0)
    chance = max(0.5, 2 / cube.shape[1])
    moved = np.clip(cube + sd * rng.standard_normal(cube.shape), 0.0, 1.0)
    moves = rng.random(cube.shape) < np.where(domain.nominal, min(chance, 2 * sd), chance)
    return domain.snap(np.where(moves, np.where(domain.nominal, rng.random(cube.shape), moved), cube))


Score = Callable[[Array], Array]  # cube points [m, p] -> [m], the lower the better


def _pool(score: Score, domain: Domain, seen: Array, rng: np.random.Generator, uniform: int) -> tuple[Array, Array]:
    """Uniform points, the settings seen, and neighbours at three ranges of the eight best: [m, p], and their scores [m]."""
    known = np.unique(seen, axis=0)
    if len(known) > KNOWN:
        known = known[rng.permutation(len(known))[:KNOWN]]
    pool = np.vstack([domain.snap(rng.random((uniform, seen.shape[1]))), known])
    rounds = [(sd, 8, -(-uniform // 16)) for sd in (0.15, 0.05, 0.015)]
    return _refined(score, domain, pool, score(pool), rng, rounds)


def _refined(
    score: Score,
    domain: Domain,
    pool: Array,
    scores: Array,
    rng: np.random.Generator,
    rounds: Sequence[tuple[float, int, int]],
) -> tuple[Array, Array]:
    """The pool with neighbours of its best points: in each round (sd, centres, neighbours of each)."""
    for sd, centres, per in rounds:
        new = _jitter(rng, domain, pool[np.argsort(scores, kind="stable")[:centres]], per, sd)
        pool, scores = np.vstack([pool, new]), np.append(scores, score(new))
    return pool, scores


def _mean_at_target(member: EnsembleMember, domain: Domain) -> Score:
    return lambda cube: member.posterior(join(domain.features(cube), np.zeros(AXES)))[0].numpy()


def recommend(surrogate: Surrogate, domain: Domain, seen: Array, seed: Sequence[int]) -> Array:
    """The cube point [p] with the least mean + sd / 2 at the target.

    The best member's mean leads to a pool, and the mixture judges the 150 best of it. Refining by the mixture itself
    answers too cautiously: Hartmann-6 at cost 5 .085 instead of .021, dense215_D .0033 instead of .0019 (20 seeds).
    seen [n, p]: cube points of all runs, snapped.
    """
    rng = np.random.default_rng(seed)
    score = _mean_at_target(surrogate.best, domain)
    pool, mean = _pool(score, domain, seen, rng, 400)
    pool, mean = _refined(score, domain, pool, mean, rng, [(sd, 4, 40) for sd in (0.02, 0.006, 0.002)])
    different = np.unique(pool, axis=0, return_index=True)[1]  # few cells would fill all places with one
    pool = pool[different[np.argsort(mean[different], kind="stable")[:150]]]
    mixed, variance = surrogate.posterior(join(domain.features(pool), np.zeros(AXES)))
    chosen: Array = pool[int((mixed + 0.5 * variance.sqrt()).argmin())]
    return chosen


def knowledge_gradient(member: EnsembleMember, anchors: Tensor) -> Callable[[Tensor], Array]:
    """A function of x [m, d + 2]: how much one run at each is expected to lower the least mean over the anchors, [m].

    anchors [a, d + 2]: points at the target. In units of z. Zero where nothing is left to learn.
    """
    mean, _, v_a = member.posterior(anchors)

    def gain(x: Tensor) -> Array:
        _, variance, v_x = member.posterior(x)
        shift = member.covariance(anchors, v_a, x, v_x) / torch.sqrt(variance + member.noise)
        least = torch.stack([(mean.unsqueeze(-1) + q * shift).amin(0) for q in QUANTILES]).mean(0)
        gained: Array = torch.where(variance > 1e-7, (mean.min() - least).clamp_min(0.0), 0.0).numpy()
        return gained

    return gain


def _same(a: Array, b: Array) -> NDArray[np.bool_]:
    """Which rows of a [m, p] equal which of b [n, p], [m, n]."""
    equal = np.ones((len(a), len(b)), dtype=bool)
    for one, other in zip(a.T, b.T, strict=True):  # several times faster than a reduction over so short a dimension
        equal &= np.abs(one[:, None] - other) < 1e-9
    return equal


def usefulness(member: EnsembleMember, domain: Domain, slots: Array, seed: Sequence[int]) -> Array:
    """How far losses at each of the slots [l, 2] go with those at the target, over settings: [l].

    The expected covariance of the two over 64 uniform points, posterior doubt included, over the root of the product of
    their expected variances. 1: the same ranks; 0: a fidelity that says nothing; below 0: one that misleads. From few
    runs it is mostly what the prior believes.
    """
    rng = np.random.default_rng(seed)
    features = domain.features(domain.snap(rng.random((64, len(domain.nominal)))))
    x_t = join(features, np.zeros(AXES))
    mean_t, _, v_t = member.posterior(x_t)

    def moment(m_a: Tensor, m_b: Tensor, joint: Tensor) -> float:
        means = ((m_a - m_a.mean()) * (m_b - m_b.mean())).mean()
        return float(means + joint.diagonal().mean() - joint.mean())

    spread_t = moment(mean_t, mean_t, member.covariance(x_t, v_t, x_t, v_t))
    found = np.empty(len(slots))
    for i, slot in enumerate(slots):
        x = join(features, slot)
        mean, _, v = member.posterior(x)
        spread = moment(mean, mean, member.covariance(x, v, x, v))
        together = moment(mean, mean_t, member.covariance(x, v, x_t, v_t))
        found[i] = together / math.sqrt(max(spread * spread_t, 1e-300))
    return found


@dataclass(frozen=True)
class Offer:
    """What may be run: slots [l, 2], fidelity coordinates; cost [l] of a run there from the beginning, where the dearest
    fidelity within reach costs 1; top: the slot of that one, None when it is not on offer.

    What was run: cube [n, p], slot ids at [n] (-1: elsewhere), stuck [n] (running, or diverged), and continues: whether another run may be
    continued to a slot of a higher cost at the same size for the difference. limit: what may be spent at most. size [l]: which slots are of one size.
    spent: cost so far of what did not reach the dearest fidelity, and in all.
    """

    slots: Array
    cost: Array
    top: int | None
    size: NDArray[np.int64]
    cube: Array
    at: NDArray[np.int64]
    stuck: NDArray[np.bool_]
    continues: bool
    limit: float
    spent: tuple[float, float]

    def price(self, cube: Array, slot: int) -> Array:
        """Of running each point [m, p] at a slot, [m]; infinite where that was run, is running, or is behind."""
        same = _same(cube, self.cube)
        blocked = same & (self.at == slot)
        price = np.full(len(cube), float(self.cost[slot]))
        if self.continues:
            here = same & (self.at >= 0) & (self.size[self.at] == self.size[slot])
            done = np.where(here, self.cost[self.at], 0.0).max(1, initial=0.0)
            blocked |= here & self.stuck
            blocked |= (done >= self.cost[slot])[:, None]
            price = price - done
        return np.where(blocked.any(1) | (price > self.limit * (1 + 1e-9)), np.inf, price)


def _worth_while(useful: Array, offer: Offer, pool: Array) -> list[int]:
    """The slots to look at: those that go with the target, or else all where anything of the pool can be run."""
    open_ = np.array([np.isfinite(offer.price(pool, slot)).any() for slot in range(len(useful))])
    good = np.flatnonzero((useful >= USEFUL) & open_)
    return [int(i) for i in (good if len(good) else np.flatnonzero(open_))]


def suggest(
    surrogate: Surrogate, domain: Domain, seen: Array, offer: Offer, *, seed: Sequence[int]
) -> tuple[Array, int]:
    """The cube point [p] and the slot with the largest knowledge gradient per cost.

    seen [n, p]: cube points of all runs. About half the cost goes to the highest fidelity, once a lower one has had as
    much as its usefulness u warrants (BELOW, u / (1 - u), but half of all that may be spent at most): when the winner would go beyond that, the present
    recommendation is run at the highest instead, a safeguard against low fidelities that mislead. Half from the
    beginning had two to four times the regret at cost 2 on most problems (20 seeds, studies/LOG.md). Gains are the best
    member's: a mean over all, or a member drawn anew for every question, was slower and no better on two parameters.
    """
    rng = np.random.default_rng(seed)
    member = surrogate.best
    pool, mean = _pool(_mean_at_target(member, domain), domain, seen, rng, 200)
    at_target = join(domain.features(pool), np.zeros(AXES))
    sd: Array = member.posterior(at_target)[1].sqrt().clamp_min(1e-12).numpy()
    order = np.argsort(mean, kind="stable")
    anchors = at_target[np.concatenate([order[:128], rng.permutation(order[128:])[:128]])]
    gap = (mean[order[0]] - mean) / sd
    improvement = sd * (gap * ndtr(gap) + np.exp(-0.5 * gap**2) / math.sqrt(2 * math.pi))
    by_improvement = np.argsort(-improvement, kind="stable")
    candidates = pool[np.concatenate([by_improvement[:60], order[:15], rng.permutation(len(pool))[:75]])]

    knowledge = knowledge_gradient(member, anchors)

    def gains(cube: Array, slot: int) -> tuple[Array, Array]:
        """What each would teach (-1: cannot be run), and that per cost."""
        price = offer.price(cube, slot)
        gain = np.where(np.isfinite(price), knowledge(join(domain.features(cube), offer.slots[slot])), -1.0)
        return gain, gain / (np.where(np.isfinite(price), price, 0.0) + 0.02)

    cheapest = int(np.argmin(offer.cost))
    useful = usefulness(member, domain, offer.slots, [*seed, 3])
    levels = _worth_while(useful, offer, pool)
    winner, slot, highest = candidates[0], cheapest, -math.inf
    for level in levels:
        points, (_, score) = candidates, gains(candidates, level)
        for reach in (0.1, 0.03):
            near = _jitter(rng, domain, points[np.argsort(-score, kind="stable")[:4]], 12, reach)
            points, score = np.vstack([points, near]), np.append(score, gains(near, level)[1])
        best = int(np.argmax(score))
        if score[best] > highest:
            winner, slot, highest = points[best], level, float(score[best])

    low, total = offer.spent
    top = offer.top
    trusted = float(np.clip(useful[slot] / max(1.0 - useful[slot], 1e-9), *BELOW))
    most = max(min(trusted, 0.5 * (total + offer.limit)), 0.5 * (total + 1))
    if top is not None and slot != top and low + float(offer.price(winner[None], slot)[0]) > most:
        answer = recommend(surrogate, domain, seen, [*seed, 1])
        open_ = np.isfinite(offer.price(pool, top))
        if float(gains(answer[None], top)[0][0]) > 1e-12:
            winner, slot = answer, top
        elif open_.any():  # known there already
            winner, slot = pool[np.flatnonzero(open_)[np.argmax(improvement[open_])]], top
    return winner, slot
