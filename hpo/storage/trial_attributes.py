"""The user attributes of a trial: one schema that writes, checks and documents them, and accessors that read them.

The accessors read single attributes without validation, because every ask reads all trials of a study. The schema
validates a trial when it is written and when its study is opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

Index = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Stopped:
    """A run stopped early: where, its loss there, and its forecast final loss.

    Attributes:
        tokens: How many tokens the run had trained.
        loss: The loss at that point, in nats per token. The learning rate was not annealed there.
        mean: Mean of the forecast final loss.
        sd: Standard deviation of the forecast final loss.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    tokens: Annotated[int, Field(strict=True, gt=0)]
    loss: Annotated[float, Field(strict=True)]
    mean: Annotated[float, Field(strict=True)]
    sd: Annotated[float, Field(strict=True)]


class TrialAttributes(BaseModel):
    """The user attributes of a trial that belongs to a search.

    A trial is the evaluation of one configuration at one rung. The fields up to `bracket` are written when the trial is
    created, in this order. `bracket` comes last because it marks a trial as the search's own: see `is_search_trial`.
    Defaults apply to studies that are older than the attribute.

    Attributes:
        beat: Number of the last heartbeat of the trial's lease, see `hpo.storage.leases`. Absent without a lease.
        goal: The rung at which the sampler's model wants the configuration, see `hpo.search.model_driven`. Absent in a
            search with brackets.
        tokens: Training tokens at the rung, for each seed.
        N: Parameters of the proxy.
        config: Number of the configuration's first trial.
        rung: Index of the rung, from 0, the cheapest.
        continues: Number of the same configuration's trial at the rung below, which was promoted.
        resumed_tokens: Where each resumed seed started from its checkpoint; 0 if none did.
        seeds: How many trainings with different random seeds the trial consists of.
        resumed_seeds: How many of them, the first ones, started from checkpoints. Valid only if `resumed_tokens` is
            positive.
        worker: Name of the worker that runs the trial; empty after it was given back.
        bracket: Iteration, index of the proxy size, and start rung.
        losses: The loss of each seed, None where it is not finite. Absent for a single seed. The trial's value is
            their mean.
        diverged: True if a loss was not finite. The trial then has no value and its state is FAIL.
        stopped: Where and why the run was stopped early. The trial then has no value and its state is PRUNED.
        crashes: Why the training crashed or failed, once for each time.
        repeats: Number of an earlier trial that is the same run. The trial is then not run: it has no value, and its
            state is FAIL.
        started_tokens: Where each seed started, in tokens, if a checkpoint was lost or damaged: 0 for the beginning.
            It replaces `resumed_tokens` and `resumed_seeds` for what was trained.
    """

    model_config = ConfigDict(strict=True, validate_assignment=True)

    beat: Index | None = None
    goal: Index | None = None
    tokens: PositiveInt
    N: PositiveFloat
    config: Index | None = None
    rung: Index
    continues: Index | None = None
    resumed_tokens: Index | None = 0
    seeds: PositiveInt = 1
    resumed_seeds: Index = 1
    worker: str | None = ""
    bracket: list[Index] = Field(min_length=3, max_length=3)
    losses: list[float | None] | None = None
    diverged: bool = False
    stopped: Stopped | None = None
    crashes: list[str] = Field(default_factory=list)
    repeats: Index | None = None
    started_tokens: list[Index] | None = None

    def to_stored(self) -> dict[str, Any]:
        """Return the attributes that the constructor was given, as JSON types in the order of the fields."""
        return self.model_dump(exclude_unset=True, warnings=False)

    @classmethod
    def store_changes(cls, **changes: Any) -> dict[str, Any]:
        """Return some attributes as they are stored, to be written to a trial that exists.

        Args:
            **changes: New values by the name of the attribute.

        Returns:
            The values as JSON types, in the given order.

        Raises:
            ValueError: If a name or a type does not fit the schema.
        """
        record = cls.model_construct()
        for name, value in changes.items():
            setattr(record, name, value)
        stored = record.model_dump(include=set(changes), warnings=False)
        return {name: stored[name] for name in changes}


_DEFAULTS = {name: field.default for name, field in TrialAttributes.model_fields.items()}


def is_search_trial(trial: FrozenTrial) -> bool:
    """Return whether a search made the trial. Others were added by hand, or are enqueued and not taken yet."""
    return "bracket" in trial.user_attrs


def read_config(trial: FrozenTrial) -> int:
    """Return the number of the first trial of the trial's configuration."""
    config = trial.user_attrs.get("config")
    return trial.number if config is None else int(config)


def read_seeds(trial: FrozenTrial) -> int:
    """Return how many trainings with different random seeds a trial consists of."""
    return int(trial.user_attrs.get("seeds", _DEFAULTS["seeds"]))


def read_resumed_seeds(trial: FrozenTrial) -> int:
    """Return how many trainings of a trial start from a checkpoint."""
    attributes = trial.user_attrs
    return int(attributes.get("resumed_seeds", _DEFAULTS["resumed_seeds"])) if attributes.get("resumed_tokens") else 0


def read_crashes(trial: FrozenTrial) -> list[str]:
    """Return why a trial's training crashed, once for each time."""
    return list(trial.user_attrs.get("crashes", []))


def list_started_tokens(trial: FrozenTrial) -> list[int]:
    """Return where each seed of a trial started, in tokens; without those that started at the beginning."""
    started = trial.user_attrs.get("started_tokens")
    if started is not None:
        return [int(tokens) for tokens in started if tokens]
    return [int(trial.user_attrs.get("resumed_tokens") or 0)] * read_resumed_seeds(trial)


def count_resumed_tokens(trial: FrozenTrial) -> int:
    """Return how many tokens of a trial come from checkpoints and were not trained again, summed over its seeds."""
    return sum(list_started_tokens(trial))


def count_trained_tokens(trial: FrozenTrial) -> int:
    """Return how many tokens a trial trains itself, summed over its seeds."""
    return read_last_tokens(trial) * read_seeds(trial) - count_resumed_tokens(trial)


def read_last_tokens(trial: FrozenTrial) -> int:
    """Return the tokens at which each seed of a trial ends: those of its rung, unless the run was stopped early.

    A run that was stopped before it had passed its checkpoint again counts as having trained nothing.
    """
    stopped = read_stopped(trial)
    if stopped is None:
        return int(trial.user_attrs["tokens"])
    return max([stopped.tokens, *list_started_tokens(trial)])


def read_stopped(trial: FrozenTrial) -> Stopped | None:
    """Return where and why a finished trial was stopped early, or None."""
    stored = trial.user_attrs.get("stopped")
    return Stopped(**stored) if stored and trial.state == TrialState.PRUNED else None


def is_diverged(trial: FrozenTrial) -> bool:
    """Return whether a trial failed because a loss was not finite, and not for a reason outside of the search."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get("diverged") is True


def has_outcome(trial: FrozenTrial) -> bool:
    """Return whether a running trial's outcome was written, but not its state: its worker was killed in between."""
    return bool(trial.user_attrs.get("diverged") or trial.user_attrs.get("stopped"))


def is_infeasible(trial: FrozenTrial) -> bool:
    """Return whether any constraint of the trial (Optuna's `set_constraint`) is positive."""
    return any(value > 0 for value in trial.constraints.values())


def read_loss(trial: FrozenTrial) -> float:
    """Return the loss of a finished trial, in nats per token.

    Returns:
        Infinity if the trial diverged, was stopped early or violates a constraint; NaN if it has no result and must be
        run again.
    """
    if read_stopped(trial) is not None:
        return math.inf
    if trial.state == TrialState.COMPLETE and is_infeasible(trial):
        return math.inf
    if trial.state == TrialState.COMPLETE and (value := trial.value) is not None:
        return value
    return math.inf if is_diverged(trial) else math.nan
