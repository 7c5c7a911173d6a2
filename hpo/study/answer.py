"""The answer of a search: its law's or model's settings for the target, or the best measured ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from hpo.samplers.protocols import ComparingSampler
from hpo.storage.trial_attributes import is_search_trial, read_loss
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.search.search import Search

# The model's settings for a target beyond the largest run are not the answer if the model itself gives them a lower
# probability than this of beating the best measured ones at the largest run.
MIN_PROBABILITY = 0.05


@dataclass(frozen=True)
class SearchAnswer:
    """What a search recommends.

    Attributes:
        params: The settings to use: `extrapolated`, or `measured` if the model contradicts itself.
        extrapolated: The settings that `Search.best` returns, which are for the target.
        measured: The settings of the lowest loss at the largest run; None if none has finished there.
        loss: That loss; None likewise.
        probability: The model's probability that `extrapolated` beat `measured` at the largest run; NaN without a
            model or measured settings.
        is_beyond: Whether the target is beyond the largest run.
    """

    params: dict[str, Any]
    extrapolated: dict[str, Any]
    measured: dict[str, Any] | None
    loss: float | None
    probability: float
    is_beyond: bool

    @property
    def is_measured(self) -> bool:
        """Whether the answer is the measured settings instead of the model's."""
        return self.params is not self.extrapolated


def find_largest_run(search: Search) -> Fidelity:
    """Return the fidelity of the largest proxy at its largest token count."""
    return Fidelity(search.sizes[-1], search.ladder.levels[-1])


def choose_answer(search: Search) -> SearchAnswer:
    """Choose between the model's settings for the target and the best ones measured at the largest run.

    Raises:
        ValueError: If no run has finished with a finite loss.
    """
    extrapolated, trial, largest = search.best(), _find_best_trial(search), find_largest_run(search)
    is_beyond = search.target != largest
    if trial is None:
        return SearchAnswer(extrapolated, extrapolated, None, None, math.nan, is_beyond)
    measured = {name: trial.params[name] for name in search.space}
    probability = _compute_probability(search, extrapolated, measured, largest)
    params = measured if is_beyond and probability < MIN_PROBABILITY else extrapolated
    return SearchAnswer(params, extrapolated, measured, trial.value, probability, is_beyond)


def _find_best_trial(search: Search) -> FrozenTrial | None:
    """Return the trial with the lowest loss at the largest run, or None if no run has finished there."""
    largest = find_largest_run(search)
    finished = [
        t
        for t in search.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if is_search_trial(t)
        and (t.user_attrs["N"], t.user_attrs["tokens"]) == (largest.N, largest.D)
        and math.isfinite(read_loss(t))
    ]
    return min(finished, key=lambda t: (read_loss(t), t.number), default=None)


def _compute_probability(search: Search, a: dict[str, Any], b: dict[str, Any], at: Fidelity) -> float:
    """Return the model's probability that settings `a` beat `b` at a fidelity; NaN without a model."""
    from scipy.special import ndtr

    sampler = search.study.sampler
    # A plan's answer is the law's, about which the sampler's model says nothing.
    if search.settings.plan is not None or not isinstance(sampler, ComparingSampler):
        return math.nan
    posterior = sampler.difference(search.study, search.space, a, b, at)
    if posterior is None:
        return math.nan
    mean, sd = posterior
    return float(ndtr(mean / sd)) if sd > 0 else 0.5 + 0.5 * float((mean > 0) - (mean < 0))
