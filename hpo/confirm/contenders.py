"""Which configurations may be the best: the answer and those too close to it to be told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from hpo.launch.progress import words
from hpo.samplers.unit_cube import Cube
from hpo.storage.trial_attributes import config_of
from hpo.study.mlflow_run import outcomes
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.search.search import Search

NEAR = 0.02  # of a parameter's range: settings that are closer in all of them are the same for a comparison
ROUNDING = 1e-9  # of a parameter's range: a model's answer comes back from the unit cube


class Contender(BaseModel):
    """Settings, and their number when the record has them."""

    model_config = ConfigDict(frozen=True)
    params: dict[str, Any]
    config: int | None
    loss: float | None  # in the record at the largest run, when it has finished there

    def __str__(self) -> str:
        return f"{'new settings' if self.config is None else f'configuration {self.config}'} ({words(self.params)})"


def largest(search: Search) -> Fidelity:
    """The largest proxy at its largest token count."""
    return Fidelity(search.sizes[-1], search.ladder.levels[-1])


def contenders(search: Search, best: dict[str, Any], against: int | None = None) -> tuple[Contender, Contender]:
    """The search's answer, and the best other settings of the record at the highest fidelity (largest N, then D).

    Other: at least 2 % of its range away in some parameter, because a model's answer often lies just beside a run.
    best: what search.best() says. against: a configuration's number, instead of the best other. ValueError when there is no such configuration, it has
    the answer's settings, or nothing else has run.
    """
    top = largest(search)
    ran = sorted(
        (t for t in outcomes(search) if t.value is not None),
        key=lambda t: (-t.user_attrs["N"], -t.user_attrs["tokens"], t.value, t.number),
    )

    cube = Cube(search.space)

    def apart(trial: FrozenTrial, params: dict[str, Any]) -> float:
        return float(np.abs(cube.unit(trial.params) - cube.unit(params)).max())

    def made(params: dict[str, Any]) -> Contender:
        own = [t for t in ran if apart(t, params) < ROUNDING]
        there = [t.value for t in own if (t.user_attrs["N"], t.user_attrs["tokens"]) == (top.N, top.D)]
        return Contender(
            params=settings(search, own[0]) if own else params,
            config=config_of(own[0]) if own else None,
            loss=there[0] if there else None,
        )

    answer = made(best)
    others = [t for t in ran if apart(t, answer.params) > NEAR]
    if against is not None:
        known = sorted({config_of(t) for t in others})
        others = [t for t in others if config_of(t) == against]
        if not others:
            raise ValueError(
                f"needed a configuration with a finite loss and other settings than the answer's, got {against}: "
                f"there are {', '.join(map(str, known)) or 'none'}"
            )
    if not others:
        raise ValueError(
            "nothing to compare the answer with: no run with other settings has finished with a finite loss"
        )
    return answer, made(settings(search, others[0]))


def settings(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    """A trial's searched parameters, in the space's order."""
    return {name: trial.params[name] for name in search.space}
