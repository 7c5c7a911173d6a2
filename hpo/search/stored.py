"""The Optuna study of a search: opened or created, and checked before it is used."""

from __future__ import annotations

import warnings
from typing import Any

import optuna
from optuna.distributions import json_to_distribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from hpo.search.ladder import Ladder
from hpo.search.settings import SearchSettings, StoredSettings
from hpo.storage.trial_attributes import TrialAttributes, is_search_trial

# The study's user attribute that holds the settings.
SETTINGS_KEY = "muscale"


def open_study(
    storage: BaseStorage, name: str, sampler: BaseSampler, settings: SearchSettings, place: str
) -> optuna.Study:
    """Open the study of a search, and create it if it does not exist.

    Args:
        storage: Where it is.
        name: Its name.
        sampler: The sampler of the search.
        settings: The settings that it must have.
        place: Where the storage is, for messages, without passwords.

    Raises:
        ValueError: If the study is damaged, is not a search, or has other settings.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="minimize",
        load_if_exists=True,
        sampler=sampler,
        pruner=optuna.pruners.NopPruner(),
    )
    stored = study.user_attrs.get(SETTINGS_KEY)
    if stored is None:
        check_fresh(study)
        # A setting of a wrong type is stored as it is and refused when the study is opened again.
        study.set_user_attr(SETTINGS_KEY, settings.to_stored().model_dump(exclude_unset=True, warnings=False))
    else:
        settings.check_same(study.study_name, check_stored(storage, study.study_name, stored, place))
    return study


def check_stored(storage: BaseStorage, name: str, stored: Any, place: str) -> StoredSettings:
    """Check the settings and the trials of a study.

    Args:
        storage: Where the study is.
        name: Its name.
        stored: Its settings.
        place: Where the storage is, for messages, without passwords.

    Returns:
        The settings.

    Raises:
        ValueError: If the settings or a trial are not what a search writes. The message names the trial.
    """
    where = f"settings of study {name!r}"
    try:
        settings = StoredSettings.model_validate(stored)
        for text in settings.space.values():
            json_to_distribution(text)
        with warnings.catch_warnings():
            # The warning about a single rung is given when the search is created.
            warnings.simplefilter("ignore")
            ladder = Ladder.make(settings.tokens[0], settings.tokens[1], settings.eta).raised(settings.max_tokens)
        trials = storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
        for trial in trials:
            where = f"trial {trial.number} of study {name!r}"
            if not is_search_trial(trial):
                continue
            attributes = TrialAttributes.model_validate(trial.user_attrs)
            _, size, start = attributes.bracket
            if not (start <= attributes.rung <= ladder.top and size < len(settings.sizes)):
                raise ValueError(f"rung {attributes.rung} of bracket {attributes.bracket}")
            for other in (attributes.config, attributes.continues):
                if other is not None and (other >= len(trials) or not is_search_trial(trials[other])):
                    raise ValueError(f"no trial {other}")
            is_whole = isinstance(trial.value, int | float) and settings.space.keys() <= trial.params.keys()
            if trial.state == TrialState.COMPLETE and not is_whole:
                raise ValueError(f"value {trial.value!r}, parameters {trial.params}")
    # Another program or a damaged disk may have written anything.
    except Exception as error:
        raise ValueError(
            f"{place}, {where}: needed what a search writes, got something else ({error}): restore the study"
        ) from error
    return settings


def check_fresh(study: optuna.Study) -> None:
    """Check that a study without settings is empty, so that a search may use it. Enqueued trials are allowed."""
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise ValueError(f"study {study.study_name!r} exists and does not minimize one value: choose another name")
    if any(t.state != TrialState.WAITING for t in study.get_trials(deepcopy=False)):
        raise ValueError(f"study {study.study_name!r} exists and was not made by a Search: choose another name")


def read_max_tokens(study: optuna.Study) -> int:
    """Return the tokens of the largest run, raises included."""
    return int(study.user_attrs[SETTINGS_KEY]["max_tokens"])


def count_trials_before_raise(study: optuna.Study) -> int:
    """Return how many trials the study had when its largest run was last raised; 0 if never."""
    raises = study.user_attrs[SETTINGS_KEY].get("raises")
    return int(raises[-1][1]) if raises else 0


def read_raises(study: optuna.Study, iterations: int | None) -> tuple[int, int | None]:
    """Return the tokens of the largest run and how often Hyperband is run, raises included.

    Args:
        study: The study.
        iterations: How often Hyperband is run by the settings of this search, which may raise it; None for no end.
    """
    stored = study.user_attrs[SETTINGS_KEY]
    if iterations is not None:
        iterations = max(iterations, stored.get("max_iterations") or stored["iterations"] or 0)
    return int(stored["max_tokens"]), iterations


def store_iterations(study: optuna.Study, iterations: int | None) -> bool:
    """Store a new number of iterations, unless the present one is as high. Returns True."""
    stored = study.user_attrs[SETTINGS_KEY]
    if iterations is not None and iterations > (stored.get("max_iterations") or stored["iterations"] or 0):
        study.set_user_attr(SETTINGS_KEY, stored | {"max_iterations": iterations})
    return True


def store_raise(study: optuna.Study, max_tokens: int) -> None:
    """Store a new largest run, with the number of trials so far, whose results the raise reuses."""
    stored = study.user_attrs[SETTINGS_KEY]
    raises = [*stored.get("raises", []), [max_tokens, len(study.get_trials(deepcopy=False))]]
    study.set_user_attr(SETTINGS_KEY, stored | {"max_tokens": max_tokens, "raises": raises})
