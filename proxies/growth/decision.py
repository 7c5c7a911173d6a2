"""Is a warm start worth it? What paired runs of a small pair of models say about a larger pair of the same growth, pure.

All lengths are in tokens per parameter of the larger model of a pair (TPP). One run's annealed losses at several lengths are its
ladder; between two of its rungs ln loss is a straight line in ln tokens. How the small pair speaks for the real one, and what is
assumed in that: docs/growth.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proxies.diagnostics.lr_optimum import BootstrapInterval

MASS = 0.95  # of every interval
DRAWS = 2000
# What is believed of the gain of a pair a doubling of the width larger, at equal TPP: gain * e^(LOG_MEAN +- LOG_SD) +- OFFSET_SD, the
# same at all lengths; LOG_SD is believed as if from FREEDOM comparisons. From five small ones (docs/growth.md): rough.
LOG_MEAN, LOG_SD, OFFSET_SD, FREEDOM = -0.3, 0.7, 0.008, 4

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ladders:
    """Annealed losses of one pair, scratch and warm, the same seeds and data: row r of every array is seed r."""

    width: int  # of the pair's larger model
    scratch_at: tuple[float, ...]  # TPP, ascending
    scratch: Floats  # [seed, rung], nats per token
    warm_at: tuple[float, ...]
    warm: Mapping[str, Floats]  # by arm, [seed, rung]


@dataclass(frozen=True)
class At:
    """What an arm gains in a run of this length, as the real pair is expected to do."""

    horizon: float  # TPP
    measured: float  # gain of the small pair, mean over seeds
    gain: BootstrapInterval  # ln L_scratch - ln L_warm, both trained so long: the share of the loss that is saved
    gain_with_base: BootstrapInterval  # the same, scratch also trained on what the base model cost
    saving: BootstrapInterval  # scratch's tokens over the warm run's to the same loss; inf: more than could be seen, 0: never reached
    saving_with_base: BootstrapInterval  # the same, the base model's FLOPs counted as tokens of the warm run; NaN: within what the interval says


@dataclass(frozen=True)
class ArmAnswer:
    """One way to start against scratch."""

    name: str
    at: tuple[At, ...]  # the last one is the length that was asked about
    break_even: BootstrapInterval  # TPP where the gain ends; inf: beyond the longest length, 0: before the shortest
    break_even_with_base: BootstrapInterval

    @property
    def asked(self) -> At:
        return self.at[-1]


@dataclass(frozen=True)
class Decision:
    """Use it or not, and why."""

    use: bool
    arm: str  # the best one, used or not
    count_base: bool
    horizon: float  # TPP asked about
    base: float  # cost of the base model, in TPP of the real pair's larger model
    factor: BootstrapInterval  # of the real pair's gains over those measured
    seeds: int
    arms: tuple[ArmAnswer, ...]

    @property
    def chosen(self) -> ArmAnswer:
        return next(a for a in self.arms if a.name == self.arm)

    @property
    def json(self) -> dict[str, Any]:
        """Plain values; what is infinite is the text "inf"."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain


def decide(
    pair: Ladders,
    *,
    real_width: int,
    at: float,
    base: float,
    horizons: Sequence[float] = (),
    second: Ladders | None = None,
    count_base: bool = False,
    seed: int = 0,
) -> Decision:
    """The answer for a pair whose larger model is `real_width` wide, at `at` TPP.

    base: FLOPs of the real base model over 6 N² of the target, so that it adds to a length in TPP. horizons: lengths to be told
    about besides. second: a still smaller pair of the same growth, whose gains say how much a pair's differ.
    count_base: the warm start must also earn the base model. Used only if the interval's lower end is above 0. With several arms, of
    which the best is taken, the intervals are so wide that all of them hold together.
    """
    check_ladders(pair)
    if second is not None:
        check_ladders(second)
        if second.width >= pair.width:
            raise ValueError(f"needed a second pair below width {pair.width}, got {second.width}")
    generator = np.random.default_rng(seed)
    noise = _noise(pair, generator)
    octaves = math.log2(real_width / pair.width)
    sd = _log_sd(pair, second)
    z = generator.standard_normal((2, DRAWS + 1, 1))
    z[:, 0] = 0.0
    factor = np.exp(LOG_MEAN * octaves + sd * math.sqrt(octaves) * z[0])
    offset = OFFSET_SD * math.sqrt(octaves) * z[1]
    lengths = [*sorted(set(horizons) - {at}), at]
    gains = {name: factor * (_gain(pair, name) + noise[name]) + offset for name in pair.warm}
    x, knots = np.log([[at]]), np.log(np.array(pair.warm_at))
    mass = _for_all(np.hstack([_line(x, knots, draws) for draws in gains.values()]), MASS)
    arms = tuple(_answer(name, pair, gains[name], lengths, base, mass) for name in sorted(pair.warm))

    def gain(arm: ArmAnswer) -> BootstrapInterval:
        return arm.asked.gain_with_base if count_base else arm.asked.gain

    best = max(arms, key=lambda arm: gain(arm).value)
    return Decision(
        use=gain(best).low > 0,
        arm=best.name,
        count_base=count_base,
        horizon=at,
        base=base,
        factor=_interval(factor[:, 0], MASS),
        seeds=len(pair.scratch),
        arms=arms,
    )


def check_ladders(pair: Ladders) -> None:
    """ValueError for ladders that cannot be compared."""
    wrong = []
    for name, at, losses in [("scratch", pair.scratch_at, pair.scratch)] + [
        (name, pair.warm_at, losses) for name, losses in pair.warm.items()
    ]:
        if len(at) < 2 or list(at) != sorted(set(at)) or min(at) <= 0:
            wrong.append(f"{name}: needed at least two lengths, ascending, got {list(at)}")
        elif losses.shape != (len(pair.scratch), len(at)) or len(losses) < 2:
            wrong.append(
                f"{name}: needed losses of at least two seeds, the same as scratch, at {len(at)} lengths, got {losses.shape}"
            )
        elif not (np.isfinite(losses).all() and (losses > 0).all()):
            wrong.append(f"{name}: needed positive, finite losses: a run diverged; lower the learning rate")
    if not pair.warm:
        wrong.append("needed at least one warm start to compare with scratch, got none")
    if wrong:
        raise ValueError("; ".join(wrong))


def _noise(pair: Ladders, generator: np.random.Generator) -> dict[str, Floats]:
    """Draws [draw, warm rung] of the error of each arm's mean gain over seeds; draw 0 is none.

    Student's t at every rung, correlated over rungs and arms as the seeds' gains are: runs of one seed share their trunk, arms their
    scratch. The variance is pooled over both (runs at 2 and at 20 TPP were seen to differ by as much from seed to seed), with the
    degrees of freedom that correlated ones are worth (Box 1954).
    """
    x = np.log(np.array([pair.warm_at]))
    scratch = _line(x, np.log(np.array(pair.scratch_at)), np.log(pair.scratch))
    gains = np.hstack([scratch - np.log(losses) for losses in pair.warm.values()])  # [seed, arm and rung]
    seeds = len(gains)
    off = gains - gains.mean(axis=0)
    covariance = off.T @ off / (seeds - 1)
    own = np.diag(covariance)
    freedom = seeds - 1.0
    if own.mean() > 0:
        freedom *= max(1.0, float(own.sum() ** 2 / (covariance**2).sum()))
        off = off / np.sqrt(np.maximum(own, 1e-30)) * math.sqrt(own.mean())
    z = generator.standard_normal((DRAWS + 1, seeds)) * np.sqrt(freedom / generator.chisquare(freedom, (DRAWS + 1, 1)))
    draws: Floats = z @ off / math.sqrt(seeds * (seeds - 1))
    draws[0] = 0.0
    return dict(zip(pair.warm, np.hsplit(draws, len(pair.warm)), strict=True))


def _log_sd(pair: Ladders, second: Ladders | None) -> float:
    """Deviation of ln(gain over the gain of a pair half as wide): the prior's, with what the two pairs show as one comparison more."""
    if second is None:
        return LOG_SD
    x, knots = np.log(np.array([pair.warm_at])), np.log(np.array(second.warm_at))
    arms = sorted(pair.warm.keys() & second.warm.keys())
    ours = np.hstack([_gain(pair, arm)[0] for arm in arms])
    theirs = np.hstack([_line(x, knots, _gain(second, arm))[0] for arm in arms])
    octaves = math.log2(pair.width / second.width)
    # A ridge: where the smaller pair gains no more than OFFSET_SD nothing is learnt, and the ratio is the believed one.
    believed = math.exp(LOG_MEAN * octaves)
    ridge = len(ours) * OFFSET_SD**2
    ratio = float((ours @ theirs + ridge * believed) / (theirs @ theirs + ridge))
    off = (math.log(max(ratio, 0.05)) - LOG_MEAN * octaves) / math.sqrt(octaves)
    return math.sqrt((FREEDOM * LOG_SD**2 + off**2) / (FREEDOM + 1))


def _line(x: Floats, knots: Floats, values: Floats) -> Floats:
    """Row by row the line through (knots, values) at x, straight between knots; beyond them the end segments go on.

    x [rows or 1, n], values [rows or 1, knots] -> [rows, n].
    """
    i = np.clip(np.searchsorted(knots, x) - 1, 0, len(knots) - 2)
    share = (x - knots[i]) / (knots[i + 1] - knots[i])
    rows = max(len(x), len(values))
    i, values = np.broadcast_to(i, (rows, i.shape[1])), np.broadcast_to(values, (rows, values.shape[1]))
    first, then = np.take_along_axis(values, i, 1), np.take_along_axis(values, i + 1, 1)
    line: Floats = first + share * (then - first)
    return line


def _gain(pair: Ladders, name: str) -> Floats:
    """Mean gain over seeds at the warm rungs: [1, rung]."""
    x, knots = np.log(np.array([pair.warm_at])), np.log(np.array(pair.scratch_at))
    gain: Floats = _line(x, knots, np.log(pair.scratch).mean(axis=0)[None]) - np.log(pair.warm[name]).mean(axis=0)
    return gain


def _answer(name: str, pair: Ladders, gain: Floats, lengths: Sequence[float], base: float, mass: float) -> ArmAnswer:
    """gain [draw, warm rung]: of the real pair, whose scratch is taken to fall as this one's."""
    knots, scratch_knots = np.log(np.array(pair.warm_at)), np.log(np.array(pair.scratch_at))
    scratch = np.log(pair.scratch).mean(axis=0)[None]
    at_rungs = _line(knots[None], scratch_knots, scratch)
    warm = at_rungs - gain  # [draw, rung]
    measured = _gain(pair, name)
    rows = []
    for h in lengths:
        now = _line(np.log([[h]]), scratch_knots, scratch)[0]
        later = _line(np.log([[h + base]]), scratch_knots, scratch)[0]
        then = _line(np.log([[h]]), knots, warm)[:, 0]
        reached = _tokens_to(np.broadcast_to(now, then.shape), knots, warm)
        rows.append(
            At(
                h,
                float(_line(np.log([[h]]), knots, measured)[0, 0]),
                _interval(now - then, mass),
                _interval(later - then, mass),
                _bounded(_over(h, reached), mass),
                _bounded(_over(h, reached + base), mass),
            )
        )
    longer = _line(np.log(np.array([pair.warm_at]) + base), scratch_knots, scratch)
    ends = [_bounded(_crossing(knots, gain + more), mass) for more in (0.0, longer - at_rungs)]
    return ArmAnswer(name, tuple(rows), ends[0], ends[1])


def _over(length: float, bounds: Floats) -> Floats:
    """length / bounds, [draw, 2], the lower bound first again."""
    with np.errstate(divide="ignore"):
        ratio: Floats = length / bounds[:, ::-1]
    return ratio


def _tokens_to(goal: Floats, knots: Floats, ln_loss: Floats) -> Floats:
    """[draw, 2], bounds of the length at which each ladder [draw, rung] reaches its goal: equal where it does so between two
    rungs, else (0, first rung) or (last rung, inf)."""
    falling = np.minimum.accumulate(ln_loss, axis=1)
    reached = falling <= goal[:, None]
    i = np.maximum(reached.argmax(axis=1), 1)
    row = np.arange(len(goal))
    step = falling[row, i - 1] - falling[row, i]
    share = np.clip((falling[row, i - 1] - goal) / np.where(step > 0, step, 1.0), 0, 1)
    length = np.exp(knots[i - 1] + share * (knots[i] - knots[i - 1]))
    bounds = np.stack([length, length], axis=1)
    bounds[reached[:, 0]] = 0.0, math.exp(knots[0])
    bounds[~reached[:, -1]] = math.exp(knots[-1]), math.inf
    return bounds


def _crossing(knots: Floats, gain: Floats) -> Floats:
    """[draw, 2], bounds of the length after which the gain [draw, rung] is gone: its last way through 0, by straight lines in ln
    length; (last rung, inf) where it is not gone, (0, first rung) where it never was there."""
    positive = gain > 0
    last = gain.shape[1] - 1 - positive[:, ::-1].argmax(axis=1)
    i, row = np.minimum(last, gain.shape[1] - 2), np.arange(len(gain))
    step = gain[row, i] - gain[row, i + 1]
    share = np.clip(gain[row, i] / np.where(step > 0, step, 1.0), 0, 1)
    length = np.exp(knots[i] + share * (knots[i + 1] - knots[i]))
    bounds = np.stack([length, length], axis=1)
    bounds[positive[:, -1]] = math.exp(knots[-1]), math.inf
    bounds[~positive.any(axis=1)] = 0.0, math.exp(knots[0])
    return bounds


def _for_all(errors: Floats, mass: float) -> float:
    """The mass that every arm's interval needs for all of them to hold with probability `mass`, from joint draws [draw, arm]."""
    ranks = (errors[1:].argsort(axis=0).argsort(axis=0) + 0.5) / DRAWS
    return float(np.quantile(np.abs(2 * ranks - 1).max(axis=1), mass))


def _interval(draws: Floats, mass: float) -> BootstrapInterval:
    low, high = np.quantile(draws[1:], [(1 - mass) / 2, (1 + mass) / 2], method="inverted_cdf")
    return BootstrapInterval(float(draws[0]), float(low), float(high))


def _bounded(draws: Floats, mass: float) -> BootstrapInterval:
    """The interval of draws [draw, 2] of which only bounds may be known: from the lower ends below, from the upper ones above.

    Its value is inf or 0 where the estimate has a bound on one side only, and NaN where it has two.
    """
    low = np.quantile(draws[1:, 0], (1 - mass) / 2, method="inverted_cdf")
    high = np.quantile(draws[1:, 1], (1 + mass) / 2, method="inverted_cdf")
    first = draws[0]
    if first[0] == first[1]:
        value = float(first[0])
    else:
        value = math.inf if math.isinf(first[1]) else 0.0 if first[0] == 0 else math.nan
    return BootstrapInterval(value, float(low), float(high))


def finite(value: Any) -> Any:
    """The same for JSON: "inf" for infinity, null for NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value
