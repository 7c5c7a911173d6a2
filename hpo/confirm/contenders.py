"""The two configurations that a confirmation compares: the search's answer and its runner-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from hpo.launch.progress import format_params
from hpo.samplers.unit_cube import Cube
from hpo.storage.trial_attributes import read_config
from hpo.study.answer import find_largest_run
from hpo.study.mlflow_run import list_outcomes

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.search.search import Search

# As shares of a parameter's range. Settings that are closer than the first in every parameter are the same for a
# comparison; those that are closer than the second are equal, because a model's answer comes back from the unit cube.
SAME_SETTINGS_DISTANCE = 0.02
ROUNDING_DISTANCE = 1e-9


class Contender(BaseModel):
    """Settings that take part in a comparison.

    Attributes:
        params: The searched parameters.
        config: The number of their configuration; None if no trial has trained them.
        loss: Their loss at the largest run in the record; None if they have not finished there.
    """

    model_config = ConfigDict(frozen=True)

    params: dict[str, Any]
    config: int | None
    loss: float | None

    def __str__(self) -> str:
        name = "new settings" if self.config is None else f"configuration {self.config}"
        return f"{name} ({format_params(self.params)})"


def choose_contenders(search: Search, best: dict[str, Any], against: int | None = None) -> tuple[Contender, Contender]:
    """Return the search's answer, and the best other settings at the highest fidelity (largest N, then D).

    Other settings are at least 2 % of the range away in some parameter, because a model's answer often lies just beside
    a run.

    Args:
        search: The search.
        best: The settings of its answer, see `hpo.study.answer`.
        against: The number of a configuration to compare with, instead of the best other one.

    Returns:
        The answer and its rival.

    Raises:
        ValueError: If there is no such configuration, it has the answer's settings, or no other one has finished.
    """
    largest = find_largest_run(search)
    finished = sorted(
        (t for t in list_outcomes(search) if t.value is not None),
        key=lambda t: (-t.user_attrs["N"], -t.user_attrs["tokens"], t.value, t.number),
    )

    cube = Cube(search.space)

    def measure_distance(trial: FrozenTrial, params: dict[str, Any]) -> float:
        return float(np.abs(cube.to_unit(trial.params) - cube.to_unit(params)).max())

    def make_contender(params: dict[str, Any]) -> Contender:
        own = [t for t in finished if measure_distance(t, params) < ROUNDING_DISTANCE]
        losses = [t.value for t in own if (t.user_attrs["N"], t.user_attrs["tokens"]) == (largest.N, largest.D)]
        return Contender(
            params=read_params(search, own[0]) if own else params,
            config=read_config(own[0]) if own else None,
            loss=losses[0] if losses else None,
        )

    answer = make_contender(best)
    others = [t for t in finished if measure_distance(t, answer.params) > SAME_SETTINGS_DISTANCE]
    if against is not None:
        known = sorted({read_config(t) for t in others})
        others = [t for t in others if read_config(t) == against]
        if not others:
            raise ValueError(
                f"needed a configuration with a finite loss and other settings than the answer's, got {against}: "
                f"there are {', '.join(map(str, known)) or 'none'}"
            )
    if not others:
        raise ValueError(
            "nothing to compare the answer with: no run with other settings has finished with a finite loss"
        )
    return answer, make_contender(read_params(search, others[0]))


def read_params(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's searched parameters, in the order of the space."""
    return {name: trial.params[name] for name in search.space}
