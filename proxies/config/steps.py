"""How many steps a run of D tokens takes, and after which of them it is measured: pure functions of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from proxies.config.proxy import ProxyConfig
from proxies.config.schedules import SCHEDULES

# Measuring a point costs the forward passes of the held-out windows, a third of training on as many tokens. Two points
# per octave, the first after three times the held-out tokens, keep all evaluation near a tenth of a run.
FIRST_EVAL_RATIO = 3


@dataclass(frozen=True)
class StepPlan:
    """How D tokens are divided into steps.

    Attributes:
        tokens: D, rounded down to whole windows.
        trunk_steps: Steps of the trunk, all with full batches; 0 with a horizon.
        steps: All steps. The last batch may be smaller.
    """

    tokens: int
    trunk_steps: int
    steps: int

    @property
    def cooldown_steps(self) -> int:
        """Steps after the trunk."""
        return self.steps - self.trunk_steps


def plan_steps(config: ProxyConfig, tokens: int) -> StepPlan:
    """Divide a run into steps: floor((1 - cooldown) D / batch) full batches of trunk, then the cooldown.

    A schedule without a cooldown has all its full batches on the trunk, one with a horizon none.

    Args:
        config: The proxy.
        tokens: D, the length of the run, including the cooldown.

    Returns:
        The plan.

    Raises:
        ValueError: If nothing is left for the cooldown, or the warm-up would not end before it (with a horizon: before
            the end). The message names the least number of tokens.
    """
    windows, schedule = tokens // config.seq_len, SCHEDULES[config.schedule]
    steps = math.ceil(windows / config.batch_seqs)
    if schedule.has_horizon:
        if windows * config.seq_len <= config.warmup_tokens:
            least = (config.warmup_tokens // config.seq_len + 1) * config.seq_len
            raise ValueError(
                f"needed at least {least:,} tokens (one window more than the warm-up of {config.warmup_tokens:,} "
                f"tokens), got {tokens:,}: train longer, or shorten warmup_tokens"
            )
        return StepPlan(windows * config.seq_len, 0, steps)
    trunk_share = 1 - config.cooldown if schedule.has_cooldown else 1.0
    # The margin keeps a product such as 0.8 * 5 steps, a hair below 4 in binary, at 4.
    trunk = math.floor(trunk_share * windows / config.batch_seqs + 1e-9)
    lacks_cooldown = schedule.has_cooldown and trunk * config.batch_seqs >= windows
    if trunk < 1 or lacks_cooldown or trunk * config.batch_tokens < config.warmup_tokens:
        warmup_steps = max(1, math.ceil(config.warmup_tokens / config.batch_tokens))
        least = math.ceil(warmup_steps * config.batch_seqs / trunk_share) * config.seq_len
        cooldown_part = ", one window of cooldown" if schedule.has_cooldown else ""
        raise ValueError(
            f"needed at least {least:,} tokens (a step of trunk, the warm-up of {config.warmup_tokens:,} tokens on it"
            f"{cooldown_part}), got {tokens:,}: train longer, or shorten warmup_tokens or batch_seqs"
        )
    return StepPlan(windows * config.seq_len, trunk, steps)


def find_eval_steps(config: ProxyConfig, trunk_steps: int) -> frozenset[int]:
    """Return the trunk steps after which the held-out loss is measured, wherever the run will end.

    There are about two per octave. With `early_points` there is also one per octave before them, from the end of the
    warm-up on.

    Args:
        config: The proxy.
        trunk_steps: Steps of the trunk; with a horizon, all steps but the last.

    Returns:
        Numbers of steps, from 1 to `trunk_steps`.
    """
    earliest = max(config.warmup_tokens, config.batch_tokens)
    first = max(earliest, FIRST_EVAL_RATIO * config.eval_windows * config.seq_len)
    octaves = math.log2(max(trunk_steps * config.batch_tokens / first, 0.5))
    tokens = [first * 2 ** (j / 2) for j in range(math.ceil(2 * octaves) + 2)]
    if config.early_points:
        # The last of them stays half an octave or more below the first regular point.
        tokens += [earliest * 2**j for j in range(math.ceil(math.log2(first / earliest) - 0.5))]
    steps = (math.ceil(t / config.batch_tokens) for t in tokens)
    return frozenset(step for step in steps if step <= trunk_steps)
