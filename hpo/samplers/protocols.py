"""The protocols of samplers: what `hpo.Search` calls when it needs the parameters of a new configuration."""

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
    """A sampler that chooses settings and fidelity, and recommends settings itself; see `hpo.MultiFidelitySampler`."""

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
    ) -> tuple[dict[str, Any], int]:
        """Propose settings, and the index of the slot to run them at."""

    def is_hopeless(
        self, study: optuna.Study, space: dict[str, BaseDistribution], params: dict[str, Any], target: Fidelity
    ) -> bool:
        """Return whether the settings are very unlikely to be better at the target than the recommended ones."""

    def best(self, study: optuna.Study, space: dict[str, BaseDistribution], target: Fidelity) -> dict[str, Any]:
        """Recommend settings for the target."""


@runtime_checkable
class Predictor(Protocol):
    """A sampler with a model that ranks the candidates for promotion."""

    def predict(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        params: Sequence[dict[str, Any]],
        target: Fidelity,
    ) -> NDArray[np.float64] | None:
        """Predict the losses of settings at the target; None during start-up."""


@runtime_checkable
class ComparingSampler(Protocol):
    """A sampler with a model that can predict how far apart two settings are."""

    def difference(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        a: dict[str, Any],
        b: dict[str, Any],
        target: Fidelity,
    ) -> tuple[float, float] | None:
        """Return mean and standard deviation of b's loss minus a's at a fidelity; None while there is no model."""


@runtime_checkable
class UsefulnessEstimator(Protocol):
    """A sampler with a model that estimates which fidelities are worth their cost."""

    def usefulness(
        self, study: optuna.Study, space: dict[str, BaseDistribution], levels: Sequence[Fidelity], target: Fidelity
    ) -> NDArray[np.float64] | None:
        """Return how well losses at each level predict those at the target, at most 1; None during start-up."""
