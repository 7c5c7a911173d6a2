"""How many steps a run of D tokens takes, and after which of them it is measured. Pure functions of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from proxies.config.proxy import ProxyConfig
from proxies.config.schedules import SCHEDULES

# A trunk point costs the forward passes of the held-out windows, a third of training on as many tokens. Two points an
# octave, the first after three times the held-out tokens, keep all evaluation near a tenth of a run.
FIRST_POINT = 3


@dataclass(frozen=True)
class StepPlan:
    """How D tokens are cut into steps."""

    tokens: int  # D, rounded down to whole windows
    trunk_steps: int  # full batches; 0 with a horizon
    steps: int  # all; the last batch may be smaller

    @property
    def cooldown_steps(self) -> int:
        return self.steps - self.trunk_steps


def plan(config: ProxyConfig, tokens: int) -> StepPlan:
    """Steps of a run of `tokens` tokens: floor((1 - cooldown) D / batch) full ones of trunk, the rest is cooldown.

    A schedule without a cooldown has all its full batches on the trunk, one with a horizon none. Raises ValueError if
    nothing is left for the cooldown, or the warm-up would not end before it (before the end, with a horizon).
    """
    windows, schedule = tokens // config.seq_len, SCHEDULES[config.schedule]
    steps = math.ceil(windows / config.batch_seqs)
    if schedule.has_horizon:
        if windows * config.seq_len <= config.warmup_tokens:
            least = (config.warmup_tokens // config.seq_len + 1) * config.seq_len
            raise ValueError(
                f"needed at least {least:,} tokens (one window more than the warm-up of {config.warmup_tokens:,} tokens), "
                f"got {tokens:,}: train longer, or shorten warmup_tokens"
            )
        return StepPlan(windows * config.seq_len, 0, steps)
    trunk_share = 1 - config.cooldown if schedule.cools else 1.0
    # The margin keeps a product such as 0.8 * 5 steps, a hair below 4 in binary, at 4.
    trunk = math.floor(trunk_share * windows / config.batch_seqs + 1e-9)
    no_cooldown = schedule.cools and trunk * config.batch_seqs >= windows
    if trunk < 1 or no_cooldown or trunk * config.batch_tokens < config.warmup_tokens:
        warm = max(1, math.ceil(config.warmup_tokens / config.batch_tokens))
        least = math.ceil(warm * config.batch_seqs / trunk_share) * config.seq_len
        cooled = ", one window of cooldown" if schedule.cools else ""
        raise ValueError(
            f"needed at least {least:,} tokens (a step of trunk, the warm-up of {config.warmup_tokens:,} tokens on it"
            f"{cooled}), got {tokens:,}: train longer, or shorten warmup_tokens or batch_seqs"
        )
    return StepPlan(windows * config.seq_len, trunk, steps)


def point_steps(config: ProxyConfig, trunk_steps: int) -> frozenset[int]:
    """Trunk steps (all but the last, with a horizon) after which the held-out loss is taken, wherever the run will end.

    About two an octave; with `early_points` also one an octave before them, from the end of the warm-up on.
    """
    soonest = max(config.warmup_tokens, config.batch_tokens)
    first = max(soonest, FIRST_POINT * config.eval_windows * config.seq_len)
    octaves = math.log2(max(trunk_steps * config.batch_tokens / first, 0.5))
    tokens = [first * 2 ** (j / 2) for j in range(math.ceil(2 * octaves) + 2)]
    if config.early_points:
        tokens += [
            soonest * 2**j for j in range(math.ceil(math.log2(first / soonest) - 0.5))
        ]  # the last not close to first
    points = (math.ceil(t / config.batch_tokens) for t in tokens)
    return frozenset(p for p in points if p <= trunk_steps)
