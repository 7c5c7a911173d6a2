"""Draw settings at random, and complete settings of which a user has fixed some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState, create_trial


def draw_settings(space: Mapping[str, BaseDistribution], study: optuna.Study, sampler: RandomSampler) -> dict[str, Any]:
    """Draw parameters for a trial that does not exist yet, the same that `complete_settings` would choose."""
    unsaved = create_trial(state=TrialState.RUNNING)
    return {name: sampler.sample_independent(study, unsaved, name, dist) for name, dist in space.items()}


def complete_settings(
    space: Mapping[str, BaseDistribution], study: str, storage: BaseStorage, sampler: BaseSampler, trial_id: int
) -> None:
    """Let an Optuna sampler choose all parameters that a running trial does not have yet.

    Args:
        space: The search space.
        study: Name of the study.
        storage: Storage of the study.
        sampler: The sampler.
        trial_id: Id of the trial in the storage.

    Raises:
        ValueError: If the space contains a distribution that is not a float, int or categorical one.
    """
    # A new study object, because Optuna caches the list of trials between ask and tell.
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
