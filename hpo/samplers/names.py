"""The names of the samplers. This module imports nothing, so that checking a study file is fast."""

from __future__ import annotations

# Samplers with a model, and the surrogate of each.
MODEL_SAMPLERS = {"mfbo": "bowl", "mfbo-deep": "deep", "mfbo-nngp": "nngp"}
SAMPLERS = (*MODEL_SAMPLERS, "random", "qmc", "tpe", "gp")
