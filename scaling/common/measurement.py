"""`Measurement`: what a trainer yields."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One point of a run. A trainer yields measurements, and the consumer decides what to do with them.

    Attributes:
        tokens: Tokens trained so far; on a final point including the cooldown.
        loss: Validation loss in nats per token, always on the same held-out windows.
        lr: Current learning rate at base width.
        train_loss: Training loss in nats per token, averaged since the last point.
        seconds: Time spent training since this call of the trainer began.
        final: Whether the loss is annealed, that of a run of exactly this many tokens. Otherwise it is a point on the
            trunk.
        diverged: Whether the loss is NaN, or no better than guessing at the end.
        recorded: Whether the trainer itself has recorded the point in MLflow.
    """

    tokens: int
    loss: float
    lr: float = math.nan
    train_loss: float = math.nan
    seconds: float = math.nan
    final: bool = False
    diverged: bool = False
    recorded: bool = False
