"""What the trials of a search's study say: its configurations and results, what it spent, and what is still to come.

A pure reading of the trial list; the attributes that are read here are written by hpo.search.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from optuna.trial import FrozenTrial, TrialState

from hpo.hyperband import Bracket, Entry, Ladder, Variant, remaining
from scaling.compute import Fidelity


@dataclass(frozen=True)
class Plan:
    """What is still to be run, runs in progress included. After a raise a lower bound: see hyperband.remaining."""

    increments: list[Fidelity]  # one per evaluation; D is what it trains itself, without what it resumes
    configurations: int  # new ones among them


@dataclass(frozen=True)
class Progress:
    """How far a search is. Counts are of evaluations, (configuration, rung) pairs; planned is None when it has no
    end."""

    done: int
    planned: int | None
    running: int
    diverged: int
    configurations: int
    tokens_spent: int
    tokens_saved: int  # by resuming
    tokens_planned: int | None  # spent ones included


@dataclass(frozen=True)
class View:
    """A search, read once."""

    ladder: Ladder
    trials: list[FrozenTrial]
    entries: list[Entry]
    at: dict[
        tuple[int, int], FrozenTrial
    ]  # (config, rung) -> the trial that counts: the first result, else a pending one

    @property
    def pending(self) -> list[FrozenTrial]:
        """Those that count and have no result yet."""
        return [t for t in self.at.values() if not t.state.is_finished()]


def read_trials(trials: list[FrozenTrial], ladder: Ladder, parameters: Iterable[str]) -> View:
    """trials: all of the study, by number. parameters: the names in the space."""
    names = set(parameters)
    entries: dict[int, Entry] = {}
    at: dict[tuple[int, int], FrozenTrial] = {}
    for trial in trials:
        attrs = trial.user_attrs
        if "bracket" not in attrs:
            continue  # someone else's, or enqueued by hand and not taken yet
        number, config, rung = trial.number, config_of(trial), int(attrs["rung"])
        loss = loss_of(trial) if trial.state.is_finished() else None
        lost = loss is not None and math.isnan(loss)
        entry = entries.get(config)
        if entry is None:
            if lost and config == number and not names <= trial.params.keys():
                continue  # it failed before it had parameters: not a configuration
            entry = entries[config] = Entry(config, Bracket(*attrs["bracket"]), {})
        losses = cast(dict[int, float | None], entry.losses)  # nobody else has it yet
        if not lost and losses.get(rung) is None and (rung not in losses or loss is not None):
            at[config, rung] = trial
            losses[rung] = loss
    return View(ladder, trials, list(entries.values()), at)


def plan_of(view: View, sizes: tuple[float, ...], variant: Variant, iterations: int, *, resumable: bool) -> Plan:
    """What is still to be run of a search that ends."""
    levels = view.ladder.levels
    increments = [
        Fidelity(t.user_attrs["N"], t.user_attrs["tokens"] - int(t.user_attrs.get("resumed_tokens") or 0))
        for t in view.pending
    ]
    configurations = 0
    for bracket, rung, missing in remaining(
        view.entries, view.ladder, variant=variant, sizes=len(sizes), iterations=iterations
    ):
        first = rung == bracket.start
        below = levels[rung - 1] if resumable and not first else 0
        increments += [Fidelity(sizes[bracket.size], levels[rung] - below)] * missing
        configurations += missing if first else 0
    return Plan(increments, configurations)


def progress_of(view: View, plan: Plan | None) -> Progress:
    """plan: what is still to be run, None when the search has no end."""
    done = [t for t in view.at.values() if t.state.is_finished()]
    saved = sum(int(t.user_attrs.get("resumed_tokens") or 0) for t in done)
    spent = sum(int(t.user_attrs["tokens"]) for t in done) - saved
    return Progress(
        done=len(done),
        planned=None if plan is None else len(done) + len(plan.increments),
        running=sum(t.state == TrialState.RUNNING for t in view.pending),
        diverged=sum(not math.isfinite(loss_of(t)) for t in done),
        configurations=len(view.entries),
        tokens_spent=spent,
        tokens_saved=saved,
        tokens_planned=None if plan is None else spent + int(sum(f.D for f in plan.increments)),
    )


def config_of(trial: FrozenTrial) -> int:
    config = trial.user_attrs.get("config")
    return trial.number if config is None else int(config)


def loss_of(trial: FrozenTrial) -> float:
    """Of a finished trial: inf when it diverged, NaN when it has no result and is to be run again."""
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        return trial.value
    return math.inf if trial.state == TrialState.FAIL and trial.user_attrs.get("diverged") is True else math.nan
