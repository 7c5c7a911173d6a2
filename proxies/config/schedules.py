"""Learning-rate schedules as pure functions of tokens seen; every factor multiplies each group's own peak rate.

t tokens, w warm-up (linear from 0), z = (t - w) / (end - w), u = (t - branch) / (end - branch):

| schedule     | after the warm-up                       | then           | horizon | source                          |
|--------------|-----------------------------------------|----------------|---------|---------------------------------|
| wsd          | 1                                       | times decay(u) | no      | 2405.18392, 2404.06395          |
| power        | min(1, batch_seqs a t^b / lr)           | times decay(u) | no      | 2408.13359                      |
| inverse-sqrt | min(1, sqrt(sqrt_tokens / t))           | times decay(u) | no      | 2607.10959; start assumed       |
| constant     | 1                                       | -              | no      | for schedule-free and Prodigy   |
| cosine       | floor + (1 - floor) (1 + cos(pi z)) / 2 | -              | yes     | 1608.03983                      |
| linear       | 1 - z                                   | -              | yes     | linear to zero, 2502.15938      |
| rex          | (1 - z) / (1 - z / 2)                   | -              | yes     | 2107.04197                      |

Without a horizon the rate before the branch does not depend on where the run ends, so that a longer run goes on from a
shorter one's trunk. With one it does, at every step: a longer run starts afresh.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxies.config.proxy import ScheduleName
from scaling.laws.decay_shapes import DECAYS

if TYPE_CHECKING:
    from proxies.config.proxy import ProxySettings


@dataclass(frozen=True)
class Schedule:
    """One row of the table. share(settings, x): of the peak, after the warm-up; x is z with a horizon, else t."""

    share: Callable[[ProxySettings, float], float]
    has_horizon: bool = False
    cools: bool = False  # ends in a cooldown branch


def _power(settings: ProxySettings, tokens: float) -> float:
    return min(1.0, settings.batch_seqs * settings.power_a * math.pow(max(tokens, 1.0), settings.power_b) / settings.lr)


def _inverse_sqrt(settings: ProxySettings, tokens: float) -> float:
    return min(1.0, math.sqrt(settings.sqrt_tokens / max(tokens, 1.0)))


def _cosine(settings: ProxySettings, z: float) -> float:
    return settings.lr_floor + (1 - settings.lr_floor) * (1 + math.cos(math.pi * z)) / 2


SCHEDULES: dict[ScheduleName, Schedule] = {
    "wsd": Schedule(lambda _, tokens: 1.0, cools=True),
    "power": Schedule(_power, cools=True),
    "inverse-sqrt": Schedule(_inverse_sqrt, cools=True),
    "constant": Schedule(lambda _, tokens: 1.0),
    "cosine": Schedule(_cosine, has_horizon=True),
    "linear": Schedule(lambda _, z: 1 - z, has_horizon=True),
    "rex": Schedule(lambda _, z: (1 - z) / (1 - z / 2), has_horizon=True),
}


def factor(settings: ProxySettings, tokens: float, *, branch: float = math.inf, end: float = math.inf) -> float:
    """The share of the peak rate after `tokens` tokens, in [0, 1].

    branch, end: where the cooldown begins and where the run ends, in tokens. Without them it is the trunk; a schedule
    with a horizon has none and needs `end`.
    """
    schedule, warmup = SCHEDULES[settings.schedule], settings.warmup_tokens
    if schedule.has_horizon:
        if not warmup < end < math.inf:
            raise ValueError(f"schedule {settings.schedule!r}: needed warmup_tokens < end < inf, got {warmup}, {end:g}")
        if tokens < warmup:
            return max(tokens, 0.0) / warmup
        return schedule.share(settings, min((tokens - warmup) / (end - warmup), 1.0))
    if math.isinf(branch) != math.isinf(end) or not warmup <= branch or not (branch < end or math.isinf(end)):
        raise ValueError(
            f"schedule {settings.schedule!r}: needed warmup_tokens <= branch < end, or neither branch nor end, "
            f"got {warmup}, {branch:g}, {end:g}"
        )
    if tokens < warmup:
        return max(tokens, 0.0) / warmup * schedule.share(settings, warmup)
    if tokens <= branch or not schedule.cools:
        return schedule.share(settings, tokens)
    u = min((tokens - branch) / (end - branch), 1.0)
    return schedule.share(settings, branch) * float(DECAYS[settings.decay](u, settings.lr_floor))


def unread(settings: ProxySettings) -> set[str]:
    """Settings that this schedule never looks at: searching one would spend a study on nothing."""
    name, cools = settings.schedule, SCHEDULES[settings.schedule].cools
    read = {
        "cooldown": cools,
        "lr_floor": name == "cosine" or (cools and settings.decay == "exponential"),
        "power_a": name == "power",
        "power_b": name == "power",
        "sqrt_tokens": name == "inverse-sqrt",
    }
    return {setting for setting, is_read in read.items() if not is_read}
