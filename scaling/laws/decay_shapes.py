"""Shapes of a learning-rate cooldown, from its start at u = 0 to the end of the run at u = 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# decay(u, floor) falls from 1 to 0. Only the exponential shape (arXiv 2404.06395) ends at the floor, and halves at
# equal steps.
DECAYS: dict[str, Callable[[Any, float], Any]] = {
    "1-sqrt": lambda u, _: 1 - np.sqrt(u),
    "linear": lambda u, _: 1 - u,
    "cosine": lambda u, _: (1 + np.cos(np.pi * u)) / 2,
    "square": lambda u, _: 1 - u * u,
    "exponential": lambda u, floor: floor**u,
}
