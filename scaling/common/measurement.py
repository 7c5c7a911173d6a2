"""`Measurement`: what a trainer yields."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One point of a run. A trainer yields these; the consumer decides what to do with them."""

    tokens: int  # trained so far; on a final point the cooldown is included
    loss: float  # nats per token, validation, always on the same held-out windows
    lr: float = math.nan  # at base width, at that moment
    train_loss: float = math.nan  # nats per token, mean since the last point
    seconds: float = math.nan  # spent training since this call of the trainer began
    final: bool = False  # annealed: the loss of a run of exactly this many tokens. Otherwise a point on the trunk
    diverged: bool = False  # NaN, or no better than guessing at the end
    recorded: bool = False  # in MLflow already, by the trainer itself
