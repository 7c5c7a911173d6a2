"""The names of the samplers. No imports, so that a study file can be checked fast."""

from __future__ import annotations

MODEL_SAMPLERS = {"mfbo": "bowl", "mfbo-deep": "deep", "mfbo-nngp": "nngp"}  # sampler: surrogate
SAMPLERS = (*MODEL_SAMPLERS, "random", "qmc", "tpe", "gp")
