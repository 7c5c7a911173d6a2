"""How a new configuration gets its parameters: what a sampler may be, and how one is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution

from scaling.laws.compute import Fidelity


@runtime_checkable
class FidelitySampler(Protocol):
    """A sampler that chooses what to run and how far, and has an answer of its own; see hpo.MultiFidelitySampler."""

    def propose(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        slots: Sequence[Fidelity],
        cost: Callable[[Fidelity], float],
        target: Fidelity,
        *,
        continues: bool = False,
        limit: float = math.inf,
    ) -> tuple[dict[str, Any], int]: ...

    def is_hopeless(
        self, study: optuna.Study, space: dict[str, BaseDistribution], params: dict[str, Any], target: Fidelity
    ) -> bool: ...

    def best(self, study: optuna.Study, space: dict[str, BaseDistribution], target: Fidelity) -> dict[str, Any]: ...


@runtime_checkable
class Predictor(Protocol):
    """A sampler with a model, which can say who should be promoted."""

    def predict(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        params: Sequence[dict[str, Any]],
        target: Fidelity,
    ) -> NDArray[np.float64] | None:
        """The loss of each at the target; None while there is no model yet."""


@runtime_checkable
class UsefulnessEstimator(Protocol):
    """A sampler with a model, which can say which rungs are worth their cost."""

    def usefulness(
        self, study: optuna.Study, space: dict[str, BaseDistribution], levels: Sequence[Fidelity], target: Fidelity
    ) -> NDArray[np.float64] | None:
        """How far losses at each level go with those at the target, at most 1; None while there is no model yet."""
