"""The user attributes of a trial, read: its configuration, tokens, loss, seeds, and how it was stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState


@dataclass(frozen=True)
class Stopped:
    """A run that was given up on the way: where, the loss there (not annealed), and its end as it was forecast (mean and sd)."""

    tokens: int
    loss: float  # nats per token, as the others
    mean: float
    sd: float


def seeds_of(trial: FrozenTrial) -> int:
    """How many trainings a trial is."""
    return int(trial.user_attrs.get("seeds", 1))  # absent from studies older than this attribute


def resumed_seeds_of(trial: FrozenTrial) -> int:
    """How many trainings of a trial go on from a checkpoint."""
    return int(trial.user_attrs.get("resumed_seeds", 1)) if trial.user_attrs.get("resumed_tokens") else 0


def resumed_tokens(trial: FrozenTrial) -> int:
    """Tokens that a trial did not train because it went on from checkpoints, all its seeds together."""
    return int(trial.user_attrs.get("resumed_tokens") or 0) * resumed_seeds_of(trial)


def trained_tokens(trial: FrozenTrial) -> int:
    """Tokens that a trial trains itself, all its seeds together."""
    return last_tokens(trial) * seeds_of(trial) - resumed_tokens(trial)


def last_tokens(trial: FrozenTrial) -> int:
    """Where each seed of a trial ends: at its rung, unless it was stopped.

    A run that was stopped within the share of the rung below that is trained once more counts as having trained nothing.
    """
    stopped = stopped_of(trial)
    if stopped is None:
        return int(trial.user_attrs["tokens"])
    return max(stopped.tokens, int(trial.user_attrs.get("resumed_tokens") or 0))


def stopped_of(trial: FrozenTrial) -> Stopped | None:
    """Of a finished trial: where and why it was given up."""
    found = trial.user_attrs.get("stopped")
    return Stopped(**found) if found and trial.state == TrialState.PRUNED else None


def config_of(trial: FrozenTrial) -> int:
    config = trial.user_attrs.get("config")
    return trial.number if config is None else int(config)


def violates(trial: FrozenTrial) -> bool:
    """Whether any constraint of the trial (Optuna's `set_constraint`) is positive."""
    return any(value > 0 for value in trial.constraints.values())


def loss_of(trial: FrozenTrial) -> float:
    """Of a finished trial: inf when it diverged, was stopped or violates a constraint, NaN when it has no result and is to
    be run again."""
    if stopped_of(trial) is not None:
        return math.inf
    if trial.state == TrialState.COMPLETE and violates(trial):
        return math.inf
    if trial.state == TrialState.COMPLETE and (value := trial.value) is not None:
        return value
    return math.inf if trial.state == TrialState.FAIL and trial.user_attrs.get("diverged") is True else math.nan
