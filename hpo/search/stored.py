"""Check what a storage holds of a search before it is used: settings and trial attributes, as pydantic models."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

from optuna.distributions import json_to_distribution
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from hpo.search.hyperband import Ladder

Index = Annotated[int, Field(ge=0)]


class _Settings(BaseModel):
    """Of a search, on its study; see hpo.search.settings.checked_settings."""

    model_config = ConfigDict(strict=True)
    space: dict[str, str]
    tokens: list[PositiveInt] = Field(min_length=2, max_length=2)
    max_tokens: PositiveInt
    eta: int = Field(ge=2)
    sizes: list[PositiveFloat] = Field(min_length=1)
    variant: str
    iterations: PositiveInt | None
    scheduler: str
    resumable: bool
    raises: list[list[int]] = Field(default_factory=list)


class _Stopped(BaseModel):
    """hpo.storage.trial_attributes.Stopped as it is written."""

    model_config = ConfigDict(strict=True, extra="forbid")
    tokens: PositiveInt
    loss: float
    mean: float
    sd: float


class _Attributes(BaseModel):
    """Of a trial of a search; see hpo.search.trial_writer."""

    model_config = ConfigDict(strict=True)
    tokens: PositiveInt
    N: PositiveFloat
    rung: Index
    bracket: list[Index] = Field(min_length=3, max_length=3)
    config: Index | None = None
    continues: Index | None = None
    resumed_tokens: Index | None = 0
    seeds: PositiveInt = 1
    resumed_seeds: Index = 0
    worker: str | None = ""
    losses: list[float | None] | None = None
    goal: Index | None = None
    diverged: bool = False
    stopped: _Stopped | None = None


def check_stored(storage: BaseStorage, name: str, stored: Any, place: str) -> None:
    """ValueError when the settings of a study, or one of its trials, are not what a search writes.

    place: where the study is kept, for the message, without passwords.
    """
    where = f"settings of study {name!r}"
    try:
        settings = _Settings.model_validate(stored)
        for text in settings.space.values():
            json_to_distribution(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a single rung: said when the search is made
            ladder = Ladder.make(settings.tokens[0], settings.tokens[1], settings.eta).raised(settings.max_tokens)
        trials = storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
        for trial in trials:
            where = f"trial {trial.number} of study {name!r}"
            if "bracket" not in trial.user_attrs:
                continue
            attrs = _Attributes.model_validate(trial.user_attrs)
            _, size, start = attrs.bracket
            if not (start <= attrs.rung <= ladder.top and size < len(settings.sizes)):
                raise ValueError(f"rung {attrs.rung} of bracket {attrs.bracket}")
            for other in (attrs.config, attrs.continues):
                if other is not None and (other >= len(trials) or "bracket" not in trials[other].user_attrs):
                    raise ValueError(f"no trial {other}")
            whole = isinstance(trial.value, int | float) and settings.space.keys() <= trial.params.keys()
            if trial.state == TrialState.COMPLETE and not whole:
                raise ValueError(f"value {trial.value!r}, parameters {trial.params}")
    except Exception as error:  # what another program, or a damaged disk, has written can be anything
        raise ValueError(
            f"{place}, {where}: needed what a search writes, got something else ({error}): restore the study"
        ) from error
