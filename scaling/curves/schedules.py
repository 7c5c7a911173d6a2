"""Learning-rate schedules as functions of the tokens, for forecasts of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from scaling.common.arrays import Array
from scaling.laws.decay_shapes import DECAYS

# Tokens -> learning rate as a share of its peak.
Schedule: TypeAlias = Callable[[Array], Array]


def make_cooldown_schedule(
    at: float, *, share: float = 0.2, warmup: float = 0.0, decay: str = "1-sqrt", floor: float = 0.1
) -> Schedule:
    """Return a schedule with a warm-up, a constant rate and a decay.

    Args:
        at: Tokens at the end of the decay.
        share: The share of them over which the rate decays.
        warmup: Tokens of the linear warm-up.
        decay: The shape of the decay, a name in `scaling.laws.decay_shapes`; by default 1 - sqrt(u).
        floor: Where the shape "exponential" ends, as a share of the peak.

    Returns:
        The rate as a share of its peak, as a function of the tokens.

    Raises:
        ValueError: If the share is not in (0, 1), or the warm-up ends after the decay begins.
    """
    if not (at > 0 and 0 < share < 1 and 0 <= warmup <= (1 - share) * at):
        raise ValueError(f"needed 0 < share < 1 and a warm-up before the cooldown, got {at=}, {share=}, {warmup=}")
    start = (1 - share) * at

    def compute_factor(tokens: Array) -> Array:
        up = np.minimum(tokens / warmup, 1.0) if warmup else 1.0
        return np.asarray(up * DECAYS[decay](np.clip((tokens - start) / (at - start), 0.0, 1.0), floor))

    return compute_factor


def make_logged_schedule(tokens: ArrayLike, lr: ArrayLike) -> Schedule:
    """Return a schedule that was logged or planned, linear between its points.

    If the first rate lies below the peak, the schedule rises to it from rate 0 at 0 tokens.

    Args:
        tokens: Training tokens at each point, 1-d, in any order.
        lr: Learning rate at each point, 1-d.

    Returns:
        The rate as a share of its peak, as a function of the tokens.

    Raises:
        ValueError: If the shapes differ or a rate is negative or not finite.
    """
    t, rate = np.asarray(tokens, float), np.asarray(lr, float)
    if t.ndim != 1 or t.shape != rate.shape or not t.size or not np.all(np.isfinite(rate) & (rate >= 0)):
        raise ValueError("tokens and lr must be 1-d, of one length above 0, and every lr finite and at least 0")
    order = np.argsort(t, kind="stable")
    t, share = t[order], rate[order] / rate.max()
    first = 0.0 if share[0] < 0.99 else 1.0
    return lambda tokens: np.asarray(np.interp(tokens, np.r_[0.0, t], np.r_[first, share]))
