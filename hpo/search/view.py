"""What the trials of a search's study say: jobs, configurations, results, what was spent and what is still to come.

A pure reading of the trial list; the attributes that are read here are written by hpo.search.trial_writer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from optuna.trial import FrozenTrial, TrialState

from hpo.search.hyperband import Bracket, Entry, Ladder, Variant, remaining, standing
from hpo.storage.trial_attributes import (
    config_of,
    last_tokens,
    loss_of,
    resumed_tokens,
    seeds_of,
    stopped_of,
    trained_tokens,
)
from scaling.laws.compute import Fidelity


@dataclass(frozen=True)
class Job:
    """What to run next: train `params` at `fidelity`, with `seeds` different random seeds, then tell the losses."""

    params: dict[str, Any]
    fidelity: Fidelity
    resume_from: int | None  # number of the trial that it continues; None: from the beginning
    number: int  # of its trial
    config: int  # number of the configuration's first trial
    rung: int
    bracket: Bracket
    resume_tokens: int | None = None  # where the trial that it continues ended
    seeds: int = 1  # how many trainings it is
    resume_seeds: int = 0  # how many of them, the first ones, go on from resume_tokens; the others start at zero


@dataclass(frozen=True)
class Plan:
    """What is still to be run, runs in progress included. After a raise, or asynchronously, a lower bound: see
    hyperband.remaining."""

    increments: list[Fidelity]  # one per evaluation; D is what its seeds train together, without what they resume
    configurations: int  # new ones among them
    counted: bool = True  # False: what a budget is worth in runs of the largest kind, not what will be run


@dataclass(frozen=True)
class Progress:
    """How far a search is. Counts are of evaluations, (configuration, rung) pairs, each with all its seeds; planned is
    None when it has no end.

    reused: what raising saved. Evaluations that were started before the last raise and hold a place in today's
    Hyperband: a study of the same configurations that begins with today's largest run would train them again, and pay
    tokens_reused for them (resuming its own). Places count when their rung is decided, so that the numbers grow until
    the search is finished; results that lost their place are not among them. 0 when never raised (or before this was
    recorded).
    """

    done: int
    planned: int | None
    running: int
    diverged: int
    configurations: int
    tokens_spent: int
    tokens_saved: int  # by resuming
    tokens_planned: int | None  # spent ones included
    reused: int = 0
    tokens_reused: int = 0
    stopped: int = 0  # given up as hopeless; not among the diverged
    tokens_stopped: int = 0  # that those had still before them


@dataclass(frozen=True)
class View:
    """A search, read once."""

    ladder: Ladder  # of today
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
    """trials: all of the study, by number. parameters: the names in the space. Every ask reads all: this is its cost."""
    names = set(parameters)
    entries: dict[int, Entry] = {}
    at: dict[tuple[int, int], FrozenTrial] = {}
    for trial in trials:
        attrs = trial.user_attrs
        if "bracket" not in attrs:
            continue  # someone else's, or enqueued by hand and not taken yet
        config, rung = config_of(trial), int(attrs["rung"])
        loss = loss_of(trial) if trial.state.is_finished() else None
        lost = loss is not None and math.isnan(loss)
        entry = entries.get(config)
        if entry is None:
            if lost and config == trial.number and not names <= trial.params.keys():
                continue  # it failed before it had parameters: not a configuration
            entry = entries[config] = Entry(config, Bracket(*attrs["bracket"]), {})
        losses = cast(dict[int, float | None], entry.losses)  # nobody else has it yet
        if not lost and losses.get(rung) is None and (rung not in losses or loss is not None):
            at[config, rung] = trial
            losses[rung] = loss
    return View(ladder, trials, list(entries.values()), at)


def plan_of(view: View, sizes: tuple[float, ...], variant: Variant, iterations: int, *, resumable: bool) -> Plan:
    """What is still to be run of a search that ends."""
    increments = [Fidelity(t.user_attrs["N"], trained_tokens(t)) for t in view.pending]
    configurations = 0
    for bracket, rung, missing in remaining(
        view.entries, view.ladder, variant=variant, sizes=len(sizes), iterations=iterations
    ):
        first = rung == bracket.start
        increments += [
            Fidelity(sizes[bracket.size], view.ladder.tokens(rung, resumed=resumable and not first))
        ] * missing
        configurations += missing if first else 0
    return Plan(increments, configurations)


def whole_runs_of(view: View, top: Fidelity, runs: float) -> Plan:
    """What is still to be run when a budget for so many runs like `top` is left and nobody knows yet what they will be:
    counted as such runs, the last one a shorter one."""
    increments = [Fidelity(t.user_attrs["N"], trained_tokens(t)) for t in view.pending]
    increments += [top] * int(runs)
    rest = int(top.D * (runs - int(runs)))
    return Plan(increments + ([Fidelity(top.N, rest)] if rest else []), 0, counted=False)


def progress_of(view: View, plan: Plan | None, variant: Variant, raised_at: int) -> Progress:
    """plan: what is still to be run, None when the search has no end. raised_at: how many trials there were when the
    largest run was last raised; 0: never.
    """
    done = [t for t in view.at.values() if t.state.is_finished()]
    spent, saved = sum(map(trained_tokens, done)), sum(map(resumed_tokens, done))
    given_up = [t for t in done if stopped_of(t) is not None]
    reused = []
    if raised_at:
        places = standing(view.entries, view.ladder, variant=variant)
        reused = [trial for place, trial in view.at.items() if place in places and trial.number < raised_at]
    return Progress(
        done=len(done),
        planned=None if plan is None or not plan.counted else len(done) + len(plan.increments),
        running=sum(t.state == TrialState.RUNNING for t in view.pending),
        diverged=sum(not math.isfinite(loss_of(t)) for t in done) - len(given_up),
        configurations=len(view.entries),
        tokens_spent=spent,
        tokens_saved=saved,
        tokens_planned=None if plan is None else spent + int(sum(f.D for f in plan.increments)),
        reused=len(reused),
        tokens_reused=sum(map(trained_tokens, reused)),
        stopped=len(given_up),
        tokens_stopped=sum(int(t.user_attrs["tokens"]) - last_tokens(t) for t in given_up),
    )


def job_of(trial: FrozenTrial, parameters: Iterable[str], *, resumable: bool) -> Job:
    """A running trial as the job that it is. resumable: whether promotions go on from checkpoints."""
    attrs = trial.user_attrs
    resume = attrs.get("continues") if resumable else None
    return Job(
        params={name: trial.params[name] for name in parameters},
        fidelity=Fidelity(attrs["N"], attrs["tokens"]),
        resume_from=resume,
        number=trial.number,
        config=config_of(trial),
        rung=int(attrs["rung"]),
        bracket=Bracket(*attrs["bracket"]),
        resume_tokens=None if resume is None else attrs.get("resumed_tokens"),
        seeds=seeds_of(trial),
        resume_seeds=0 if resume is None else int(attrs.get("resumed_seeds", 1)),
    )
