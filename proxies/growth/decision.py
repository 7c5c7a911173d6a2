"""Decide whether a warm start is worth it for a pair of models, from paired runs of a smaller pair of the same growth.

Run lengths are in tokens per parameter of the larger model of a pair (TPP). A ladder holds one run's annealed losses at
several run lengths; between two of its rungs ln loss is a straight line in ln tokens. How the small pair predicts the
real one, and what is assumed in that, is in docs/growth.md. These functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from proxies.diagnostics.lr_optimum import BootstrapInterval
from proxies.growth.answer import DecisionNote

# Probability mass of every interval.
MASS = 0.95
# Number of draws behind every interval.
DRAWS = 2000
# Prior on the gain of a pair a doubling of the width larger, at equal TPP: gain * e^(LOG_MEAN +- LOG_SD) +- OFFSET_SD,
# the same at all run lengths. It comes from five small comparisons (docs/growth.md), so it is rough.
LOG_MEAN = -0.3
LOG_SD = 0.7
OFFSET_SD = 0.008
# Degrees of freedom for which LOG_SD counts.
PRIOR_FREEDOM = 4

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ladders:
    """Annealed losses of one pair, from scratch and warm, with the same seeds and data: row r of every array is seed r.

    Attributes:
        width: Width of the pair's larger model.
        scratch_at: Run lengths from scratch, TPP, ascending.
        scratch: Losses from scratch, [seed, rung], nats per token.
        warm_at: Run lengths of the warm starts, TPP, ascending.
        warm: Losses of each warm arm, [seed, rung], nats per token.
    """

    width: int
    scratch_at: tuple[float, ...]
    scratch: Floats
    warm_at: tuple[float, ...]
    warm: Mapping[str, Floats]


@dataclass(frozen=True)
class ArmAt:
    """The gain of an arm at one run length, as expected for the real pair.

    Attributes:
        horizon: The run length, TPP.
        measured: Gain of the small pair, mean over seeds.
        gain: ln L_scratch - ln L_warm at this run length: the share of the loss that is saved.
        gain_with_base: The same, with scratch also trained on the tokens that the base model cost.
        saving: Scratch's tokens over those of the warm run to the same loss. inf: more than could be seen; 0: never
            reached.
        saving_with_base: The same, with the base model's FLOPs counted as tokens of the warm run. NaN: only the
            interval is known.
    """

    horizon: float
    measured: float
    gain: BootstrapInterval
    gain_with_base: BootstrapInterval
    saving: BootstrapInterval
    saving_with_base: BootstrapInterval


@dataclass(frozen=True)
class ArmAnswer:
    """One warm start compared with scratch.

    Attributes:
        name: The start method.
        at: Its gain at each run length; the last one is the run length of the question.
        break_even: Run length at which the gain ends, TPP. inf: beyond the longest one; 0: before the shortest.
        break_even_with_base: The same, with the cost of the base model counted.
    """

    name: str
    at: tuple[ArmAt, ...]
    break_even: BootstrapInterval
    break_even_with_base: BootstrapInterval

    @property
    def asked(self) -> ArmAt:
        """The gain at the run length of the question."""
        return self.at[-1]


@dataclass(frozen=True)
class Decision:
    """Whether to use a warm start, and why.

    Attributes:
        use: The decision.
        arm: The best arm, whether it is used or not.
        count_base: Whether the gain must also pay for the base model.
        horizon: The run length of the question, TPP.
        base: Cost of the base model, in TPP of the real pair's larger model.
        factor: The real pair's gains over the measured ones.
        seeds: Number of seeds.
        arms: All arms.
    """

    use: bool
    arm: str
    count_base: bool
    horizon: float
    base: float
    factor: BootstrapInterval
    seeds: int
    arms: tuple[ArmAnswer, ...]

    @property
    def chosen(self) -> ArmAnswer:
        """The best arm."""
        return next(a for a in self.arms if a.name == self.arm)

    @property
    def json(self) -> DecisionNote:
        """The decision as JSON values; infinity is the text "inf"."""
        return cast(DecisionNote, to_json_value(asdict(self)))


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
    """Decide for a pair whose larger model is `real_width` wide.

    A warm start is used only if the lower end of its gain's interval is above 0. With several arms, of which the best
    is taken, the intervals are so wide that all of them hold together.

    Args:
        pair: The losses of the small pair.
        real_width: Width of the real pair's larger model.
        at: The run length in question, TPP.
        base: FLOPs of the real base model over 6 N² of the target, so that it adds to a run length in TPP.
        horizons: Other run lengths to report, TPP.
        second: The losses of a still smaller pair of the same growth; they show how much the gains of pairs differ.
        count_base: Whether the gain must also pay for the base model.
        seed: Seed of the draws.

    Returns:
        The decision, with the gain of every arm at every run length.

    Raises:
        ValueError: If the ladders cannot be compared, or the second pair is not smaller.
    """
    check_ladders(pair)
    if second is not None:
        check_ladders(second)
        if second.width >= pair.width:
            raise ValueError(f"needed a second pair below width {pair.width}, got {second.width}")
    generator = np.random.default_rng(seed)
    noise = _draw_noise(pair, generator)
    octaves = math.log2(real_width / pair.width)
    sd = _estimate_log_sd(pair, second)
    z = generator.standard_normal((2, DRAWS + 1, 1))
    z[:, 0] = 0.0
    factor = np.exp(LOG_MEAN * octaves + sd * math.sqrt(octaves) * z[0])
    offset = OFFSET_SD * math.sqrt(octaves) * z[1]
    lengths = [*sorted(set(horizons) - {at}), at]
    gains = {name: factor * (_compute_gain(pair, name) + noise[name]) + offset for name in pair.warm}
    x, knots = np.log([[at]]), np.log(np.array(pair.warm_at))
    mass = _find_joint_mass(np.hstack([_interpolate(x, knots, draws) for draws in gains.values()]), MASS)
    arms = tuple(_answer_arm(name, pair, gains[name], lengths, base, mass) for name in sorted(pair.warm))

    def get_gain(arm: ArmAnswer) -> BootstrapInterval:
        return arm.asked.gain_with_base if count_base else arm.asked.gain

    best = max(arms, key=lambda arm: get_gain(arm).value)
    return Decision(
        use=get_gain(best).low > 0,
        arm=best.name,
        count_base=count_base,
        horizon=at,
        base=base,
        factor=_summarize(factor[:, 0], MASS),
        seeds=len(pair.scratch),
        arms=arms,
    )


def check_ladders(pair: Ladders) -> None:
    """Raise ValueError with all reasons if the ladders of a pair cannot be compared."""
    problems = []
    for name, at, losses in [("scratch", pair.scratch_at, pair.scratch)] + [
        (name, pair.warm_at, losses) for name, losses in pair.warm.items()
    ]:
        if len(at) < 2 or list(at) != sorted(set(at)) or min(at) <= 0:
            problems.append(f"{name}: needed at least two run lengths, ascending, got {list(at)}")
        elif losses.shape != (len(pair.scratch), len(at)) or len(losses) < 2:
            problems.append(
                f"{name}: needed losses of at least two seeds, the same as scratch, at {len(at)} run lengths, got "
                f"{losses.shape}"
            )
        elif not (np.isfinite(losses).all() and (losses > 0).all()):
            problems.append(f"{name}: needed positive, finite losses: a run diverged; lower the learning rate")
    if not pair.warm:
        problems.append("needed at least one warm start to compare with scratch, got none")
    if problems:
        raise ValueError("; ".join(problems))


def _draw_noise(pair: Ladders, generator: np.random.Generator) -> dict[str, Floats]:
    """Draw the error of each arm's mean gain over seeds, [draw, warm rung]; draw 0 is zero.

    Errors are Student's t at every rung, correlated over rungs and arms as the seeds' gains are: runs of one seed share
    their trunk, arms share their run from scratch. The variance is pooled over both (runs at 2 and at 20 TPP differ by
    as much from seed to seed), with the degrees of freedom of correlated variances (Box 1954).
    """
    x = np.log(np.array([pair.warm_at]))
    scratch = _interpolate(x, np.log(np.array(pair.scratch_at)), np.log(pair.scratch))
    # [seed, arm and rung]
    gains = np.hstack([scratch - np.log(losses) for losses in pair.warm.values()])
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


def _estimate_log_sd(pair: Ladders, second: Ladders | None) -> float:
    """Estimate the sd of ln(gain over the gain of a pair half as wide).

    It is the prior's, updated with the two pairs as one more comparison.
    """
    if second is None:
        return LOG_SD
    x, knots = np.log(np.array([pair.warm_at])), np.log(np.array(second.warm_at))
    arms = sorted(pair.warm.keys() & second.warm.keys())
    ours = np.hstack([_compute_gain(pair, arm)[0] for arm in arms])
    theirs = np.hstack([_interpolate(x, knots, _compute_gain(second, arm))[0] for arm in arms])
    octaves = math.log2(pair.width / second.width)
    # The ridge keeps the prior's ratio where the smaller pair gains no more than OFFSET_SD, from which nothing can be
    # learnt.
    prior_ratio = math.exp(LOG_MEAN * octaves)
    ridge = len(ours) * OFFSET_SD**2
    ratio = float((ours @ theirs + ridge * prior_ratio) / (theirs @ theirs + ridge))
    off = (math.log(max(ratio, 0.05)) - LOG_MEAN * octaves) / math.sqrt(octaves)
    return math.sqrt((PRIOR_FREEDOM * LOG_SD**2 + off**2) / (PRIOR_FREEDOM + 1))


def _interpolate(x: Floats, knots: Floats, values: Floats) -> Floats:
    """Interpolate linearly between knots, row by row, and extrapolate along the end segments.

    x [rows or 1, n], values [rows or 1, knots] -> [rows, n].
    """
    i = np.clip(np.searchsorted(knots, x) - 1, 0, len(knots) - 2)
    share = (x - knots[i]) / (knots[i + 1] - knots[i])
    rows = max(len(x), len(values))
    i, values = np.broadcast_to(i, (rows, i.shape[1])), np.broadcast_to(values, (rows, values.shape[1]))
    left, right = np.take_along_axis(values, i, 1), np.take_along_axis(values, i + 1, 1)
    line: Floats = left + share * (right - left)
    return line


def _compute_gain(pair: Ladders, name: str) -> Floats:
    """Return the mean gain over seeds at the warm rungs, [1, rung]."""
    x, knots = np.log(np.array([pair.warm_at])), np.log(np.array(pair.scratch_at))
    gain: Floats = _interpolate(x, knots, np.log(pair.scratch).mean(axis=0)[None]) - np.log(pair.warm[name]).mean(
        axis=0
    )
    return gain


def _answer_arm(
    name: str, pair: Ladders, gain: Floats, lengths: Sequence[float], base: float, mass: float
) -> ArmAnswer:
    """Compare one arm with scratch at every run length.

    gain [draw, warm rung] is the real pair's. Its loss from scratch is assumed to fall as the small pair's does.
    """
    knots, scratch_knots = np.log(np.array(pair.warm_at)), np.log(np.array(pair.scratch_at))
    scratch = np.log(pair.scratch).mean(axis=0)[None]
    at_rungs = _interpolate(knots[None], scratch_knots, scratch)
    # [draw, rung]
    warm = at_rungs - gain
    measured = _compute_gain(pair, name)
    rows = []
    for length in lengths:
        from_scratch = _interpolate(np.log([[length]]), scratch_knots, scratch)[0]
        longer_from_scratch = _interpolate(np.log([[length + base]]), scratch_knots, scratch)[0]
        from_base = _interpolate(np.log([[length]]), knots, warm)[:, 0]
        reached = _bound_tokens_to(np.broadcast_to(from_scratch, from_base.shape), knots, warm)
        rows.append(
            ArmAt(
                length,
                float(_interpolate(np.log([[length]]), knots, measured)[0, 0]),
                _summarize(from_scratch - from_base, mass),
                _summarize(longer_from_scratch - from_base, mass),
                _summarize_bounds(_divide_by_bounds(length, reached), mass),
                _summarize_bounds(_divide_by_bounds(length, reached + base), mass),
            )
        )
    longer = _interpolate(np.log(np.array([pair.warm_at]) + base), scratch_knots, scratch)
    ends = [_summarize_bounds(_bound_crossing(knots, gain + more), mass) for more in (0.0, longer - at_rungs)]
    return ArmAnswer(name, tuple(rows), ends[0], ends[1])


def _divide_by_bounds(length: float, bounds: Floats) -> Floats:
    """Return length / bounds, [draw, 2], with the lower bound first again."""
    with np.errstate(divide="ignore"):
        ratio: Floats = length / bounds[:, ::-1]
    return ratio


def _bound_tokens_to(goal: Floats, knots: Floats, ln_loss: Floats) -> Floats:
    """Bound the run length at which each ladder [draw, rung] reaches its goal.

    Returns [draw, 2]: equal bounds where the goal is reached between two rungs, else (0, first rung) or (last rung,
    inf).
    """
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


def _bound_crossing(knots: Floats, gain: Floats) -> Floats:
    """Bound the run length at which the gain [draw, rung] ends: its last zero crossing, linear in ln length.

    Returns [draw, 2]: equal bounds where it ends between two rungs, (last rung, inf) where it does not end, (0, first
    rung) where there is none at any rung.
    """
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


def _find_joint_mass(errors: Floats, mass: float) -> float:
    """Return the mass of each arm's interval with which all hold with probability `mass`.

    errors: joint draws, [draw, arm].
    """
    ranks = (errors[1:].argsort(axis=0).argsort(axis=0) + 0.5) / DRAWS
    return float(np.quantile(np.abs(2 * ranks - 1).max(axis=1), mass))


def _summarize(draws: Floats, mass: float) -> BootstrapInterval:
    low, high = np.quantile(draws[1:], [(1 - mass) / 2, (1 + mass) / 2], method="inverted_cdf")
    return BootstrapInterval(float(draws[0]), float(low), float(high))


def _summarize_bounds(draws: Floats, mass: float) -> BootstrapInterval:
    """Return the interval of draws that may be known only by bounds, [draw, 2].

    It reaches from the quantile of the lower bounds to that of the upper bounds. Its value is inf or 0 where the
    estimate is bounded on one side only, and NaN where both bounds are finite but differ.
    """
    low = np.quantile(draws[1:, 0], (1 - mass) / 2, method="inverted_cdf")
    high = np.quantile(draws[1:, 1], (1 + mass) / 2, method="inverted_cdf")
    first = draws[0]
    if first[0] == first[1]:
        value = float(first[0])
    else:
        value = math.inf if math.isinf(first[1]) else 0.0 if first[0] == 0 else math.nan
    return BootstrapInterval(value, float(low), float(high))


def to_json_value(value: Any) -> Any:
    """Return a nested value for JSON, with "inf" for infinity and None for NaN."""
    if isinstance(value, dict):
        return {k: to_json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value
