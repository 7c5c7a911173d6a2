"""How a cooldown ends: shapes of the learning rate from the trunk's rate at u = 0 to the run's end at u = 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# decay(u, floor): from 1 to 0, but for the exponential one (2404.06395), which halves at equal steps and ends at the floor
DECAYS: dict[str, Callable[[Any, float], Any]] = {
    "1-sqrt": lambda u, _: 1 - np.sqrt(u),
    "linear": lambda u, _: 1 - u,
    "cosine": lambda u, _: (1 + np.cos(np.pi * u)) / 2,
    "square": lambda u, _: 1 - u * u,
    "exponential": lambda u, floor: floor**u,
}
