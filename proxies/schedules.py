"""Learning-rate schedules as pure functions of tokens seen; every factor multiplies each group's own peak rate."""

from __future__ import annotations

import math


def wsd(tokens: float, *, warmup_tokens: float, branch: float = math.inf, end: float = math.inf) -> float:
    """Warm-up, stable, decay (arXiv 2405.18392): the share of the peak rate after `tokens` tokens, in [0, 1].

    Linear from 0 to 1 over `warmup_tokens`, then 1; from `branch` on 1 - sqrt(u), where u goes from 0 at `branch` to 1
    at `end`. Without a branch it is the trunk, which knows no horizon.
    """
    if math.isinf(branch) != math.isinf(end) or not warmup_tokens <= branch or not (branch < end or math.isinf(end)):
        raise ValueError(
            f"needed warmup_tokens <= branch < end, or neither branch nor end, "
            f"got warmup_tokens = {warmup_tokens:g}, branch = {branch:g}, end = {end:g}"
        )
    if tokens < warmup_tokens:
        return max(tokens, 0.0) / warmup_tokens
    if tokens <= branch:
        return 1.0
    return 1.0 - math.sqrt(min((tokens - branch) / (end - branch), 1.0))
