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

Without a horizon, the rate before the branch does not depend on where the run ends, so a longer run continues from the
trunk of a shorter one. With a horizon, the rate depends on it at every step, so a longer run starts from scratch.
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
    """One row of the table.

    Attributes:
        shape: shape(settings, x) is the factor after the warm-up; x is z with a horizon, and t, in tokens, without.
        has_horizon: Whether the rate depends on the end of the run at every step.
        has_cooldown: Whether the run ends in a cooldown branch.
    """

    shape: Callable[[ProxySettings, float], float]
    has_horizon: bool = False
    has_cooldown: bool = False


def _power(settings: ProxySettings, tokens: float) -> float:
    return min(1.0, settings.batch_seqs * settings.power_a * math.pow(max(tokens, 1.0), settings.power_b) / settings.lr)


def _inverse_sqrt(settings: ProxySettings, tokens: float) -> float:
    return min(1.0, math.sqrt(settings.sqrt_tokens / max(tokens, 1.0)))


def _cosine(settings: ProxySettings, z: float) -> float:
    return settings.lr_floor + (1 - settings.lr_floor) * (1 + math.cos(math.pi * z)) / 2


SCHEDULES: dict[ScheduleName, Schedule] = {
    "wsd": Schedule(lambda _, tokens: 1.0, has_cooldown=True),
    "power": Schedule(_power, has_cooldown=True),
    "inverse-sqrt": Schedule(_inverse_sqrt, has_cooldown=True),
    "constant": Schedule(lambda _, tokens: 1.0),
    "cosine": Schedule(_cosine, has_horizon=True),
    "linear": Schedule(lambda _, z: 1 - z, has_horizon=True),
    "rex": Schedule(lambda _, z: (1 - z) / (1 - z / 2), has_horizon=True),
}


def compute_lr_factor(
    settings: ProxySettings, tokens: float, *, branch: float = math.inf, end: float = math.inf
) -> float:
    """Return the share of the peak rate after a number of tokens.

    Args:
        settings: The settings of the proxy.
        tokens: Tokens seen.
        branch: Tokens at which the cooldown begins; infinite for the trunk.
        end: Tokens at which the run ends; infinite for the trunk. A schedule with a horizon has no trunk and needs it.

    Returns:
        The factor, in [0, 1], by which to multiply every peak rate.

    Raises:
        ValueError: If warm-up, branch and end are out of order, or only one of branch and end is given.
    """
    schedule, warmup = SCHEDULES[settings.schedule], settings.warmup_tokens
    if schedule.has_horizon:
        if not warmup < end < math.inf:
            raise ValueError(f"schedule {settings.schedule!r}: needed warmup_tokens < end < inf, got {warmup}, {end:g}")
        if tokens < warmup:
            return max(tokens, 0.0) / warmup
        return schedule.shape(settings, min((tokens - warmup) / (end - warmup), 1.0))
    if math.isinf(branch) != math.isinf(end) or not warmup <= branch or not (branch < end or math.isinf(end)):
        raise ValueError(
            f"schedule {settings.schedule!r}: needed warmup_tokens <= branch < end, or neither branch nor end, "
            f"got {warmup}, {branch:g}, {end:g}"
        )
    if tokens < warmup:
        return max(tokens, 0.0) / warmup * schedule.shape(settings, warmup)
    if tokens <= branch or not schedule.has_cooldown:
        return schedule.shape(settings, tokens)
    u = min((tokens - branch) / (end - branch), 1.0)
    return schedule.shape(settings, branch) * float(DECAYS[settings.decay](u, settings.lr_floor))


def find_unused_settings(settings: ProxySettings) -> set[str]:
    """Return the settings that this schedule never reads. Searching one of them would waste a study."""
    name, has_cooldown = settings.schedule, SCHEDULES[settings.schedule].has_cooldown
    is_used = {
        "cooldown": has_cooldown,
        "lr_floor": name == "cosine" or (has_cooldown and settings.decay == "exponential"),
        "power_a": name == "power",
        "power_b": name == "power",
        "sqrt_tokens": name == "inverse-sqrt",
    }
    return {setting for setting, used in is_used.items() if not used}
