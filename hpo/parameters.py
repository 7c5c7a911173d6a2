"""How a new configuration gets its parameters: what a sampler may be, and how one is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState, create_trial

from hpo.belief import Belief
from scaling.compute import Fidelity


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
class Judge(Protocol):
    """A sampler with a model, which can say which rungs are worth their cost."""

    def usefulness(
        self, study: optuna.Study, space: dict[str, BaseDistribution], levels: Sequence[Fidelity], target: Fidelity
    ) -> NDArray[np.float64] | None:
        """How far losses at each level go with those at the target, at most 1; None while there is no model yet."""


def made_sampler(sampler: str | BaseSampler, seed: int, belief: Belief | None = None) -> BaseSampler:
    """The sampler of that name, or the one given. ValueError when it is neither, or cannot use a belief."""
    if isinstance(sampler, BaseSampler):
        if belief:
            raise ValueError("a belief goes to a sampler that is given by name: give it to your sampler itself")
        return sampler
    if not isinstance(sampler, str):
        raise ValueError(f"sampler must be a name or an Optuna sampler, got {sampler!r}")
    from hpo.samplers import make_sampler

    return make_sampler(sampler, seed=seed, belief=belief)


def draw(space: Mapping[str, BaseDistribution], study: optuna.Study, sampler: RandomSampler) -> dict[str, Any]:
    """Parameters for a trial that is not there yet, the same as fill_in would choose."""
    nobody = create_trial(state=TrialState.RUNNING)
    return {name: sampler.sample_independent(study, nobody, name, dist) for name, dist in space.items()}


def fill_in(
    space: Mapping[str, BaseDistribution], study: str, storage: BaseStorage, sampler: BaseSampler, trial_id: int
) -> None:
    """Have an Optuna sampler choose all parameters that a running trial does not have yet."""
    # A study object of its own, because Optuna caches the list of trials between ask and tell.
    trial = Trial(optuna.load_study(study_name=study, storage=storage, sampler=sampler), trial_id)
    for name, dist in space.items():
        if isinstance(dist, FloatDistribution):
            trial.suggest_float(name, dist.low, dist.high, step=dist.step, log=dist.log)
        elif isinstance(dist, IntDistribution):
            trial.suggest_int(name, dist.low, dist.high, step=dist.step, log=dist.log)
        elif isinstance(dist, CategoricalDistribution):
            trial.suggest_categorical(name, dist.choices)
        else:
            raise ValueError(f"parameter {name!r} must be a float, int or categorical distribution, got {dist}")
