"""Read the trials of a search's study: jobs, configurations, results, what was spent and what is still to run.

These functions only read the list of trials. `hpo.search.trial_writer` writes the attributes that they read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.search.hyperband import Bracket, Entry, FindRoom, Variant, count_remaining, find_standing
from hpo.search.ladder import Ladder
from hpo.search.settings import parse_tokens
from hpo.storage.trial_attributes import (
    count_resumed_tokens,
    count_trained_tokens,
    is_diverged,
    is_search_trial,
    read_config,
    read_last_tokens,
    read_loss,
    read_resumed_seeds,
    read_seeds,
    read_stopped,
)
from scaling.laws.compute import Fidelity


@dataclass(frozen=True)
class Job:
    """What to run next: train `params` at `fidelity` with `seeds` different random seeds, then tell the losses.

    Attributes:
        params: The configuration.
        fidelity: Model size N and tokens D of each training.
        resume_from: Number of the trial that it continues; None to start from the beginning.
        number: Number of its own trial.
        config: Number of the configuration's first trial.
        rung: Index of its rung.
        bracket: Its bracket.
        resume_tokens: Tokens at which the trial that it continues ended.
        seeds: How many trainings it consists of.
        resume_seeds: How many of them, the first ones, continue at `resume_tokens`. The others start at zero.
        started_tokens: Where each of them starts if a checkpoint was lost, in place of the two before; else None.
    """

    params: dict[str, Any]
    fidelity: Fidelity
    resume_from: int | None
    number: int
    config: int
    rung: int
    bracket: Bracket
    resume_tokens: int | None = None
    seeds: int = 1
    resume_seeds: int = 0
    started_tokens: tuple[int, ...] | None = None

    def get_start(self, repeat: int) -> int:
        """Return the tokens at which one of its trainings starts; 0 for the beginning."""
        if self.started_tokens is not None:
            return self.started_tokens[repeat]
        return int(self.resume_tokens or 0) if repeat < self.resume_seeds else 0


@dataclass(frozen=True)
class RemainingRuns:
    """What is still to be run, runs in progress included.

    After a raise, or in asynchronous mode, this is a lower bound: see `hpo.search.hyperband.count_remaining`.

    Attributes:
        increments: One fidelity per evaluation. D is what its seeds train together, without the tokens that they
        resume. configurations: How many of the evaluations start new configurations. counted: Whether these runs will
        be run. False if they only express a budget in runs of the largest kind.
    """

    increments: list[Fidelity]
    configurations: int
    counted: bool = True


@dataclass(frozen=True)
class Progress:
    """How far a search has come. Counts are of evaluations, that is (configuration, rung) pairs with all their seeds.

    `reused` and `tokens_reused` are what raising the largest run saved: the evaluations that were started before the
    last raise and hold a place in today's Hyperband. A new study of the same configurations whose largest run is
    today's would train them again and pay `tokens_reused` for them (resuming its own). A place counts once its rung is
    decided, so the numbers grow until the search is finished. Results that lost their place do not count. Both are 0 if
    the search was never raised, or was raised before this was recorded.

    Attributes:
        done: Evaluations with a result.
        planned: All evaluations, done ones included; None if the search has no end.
        running: Evaluations in progress.
        diverged: Evaluations with a loss that was not finite.
        configurations: Configurations that were started.
        tokens_spent: Tokens trained.
        tokens_saved: Tokens that were not trained again because runs resumed from checkpoints.
        tokens_planned: Tokens of all evaluations, spent ones included; None if the search has no end.
        reused: Evaluations that a raise reused.
        tokens_reused: Their tokens.
        stopped: Evaluations stopped early. They do not count as diverged.
        tokens_stopped: Tokens that those had left to train.
        failed: Evaluations among the diverged ones whose training crashed or failed as often as it may.
    """

    done: int
    planned: int | None
    running: int
    diverged: int
    configurations: int
    tokens_spent: int
    tokens_saved: int
    tokens_planned: int | None
    reused: int = 0
    tokens_reused: int = 0
    stopped: int = 0
    tokens_stopped: int = 0
    failed: int = 0


@dataclass(frozen=True)
class View:
    """A search as its trials show it at one moment.

    A configuration may belong to several brackets, where a later one wants the same settings again. It then has an
    entry in each, and they share its losses.

    Attributes:
        ladder: The budgets, raises included.
        trials: All trials of the study, by number.
        entries: The configurations, in the order in which they were started.
        evaluations: For each (configuration, rung) the trial that counts: the first with a result, else a pending one.
        iterations: How often Hyperband is run, raises included; None for no end.
    """

    ladder: Ladder
    trials: list[FrozenTrial]
    entries: list[Entry]
    evaluations: dict[tuple[int, int], FrozenTrial]
    iterations: int | None = None

    @property
    def pending(self) -> list[FrozenTrial]:
        """The evaluations that have no result yet."""
        return [t for t in self.evaluations.values() if not t.state.is_finished()]

    @property
    def finished(self) -> list[FrozenTrial]:
        """The evaluations that have a result."""
        return [t for t in self.evaluations.values() if t.state.is_finished()]


def read_trials(
    trials: list[FrozenTrial], ladder: Ladder, parameters: Iterable[str], iterations: int | None = None
) -> View:
    """Return the view of a search.

    Every ask reads all trials, and this function is most of its cost.

    Args:
        trials: All trials of the study, by number.
        ladder: The budgets, raises included.
        parameters: Names of the parameters in the search space.
        iterations: How often Hyperband is run, raises included; None for no end.
    """
    names = set(parameters)
    entries: dict[tuple[int, ...], Entry] = {}
    losses_by_config: dict[int, dict[int, float | None]] = {}
    evaluations: dict[tuple[int, int], FrozenTrial] = {}
    for trial in trials:
        # Trials that were added by hand, or are enqueued and not taken yet, are not the search's.
        if not is_search_trial(trial) or "repeats" in trial.user_attrs:
            continue
        attributes = trial.user_attrs
        config, rung = read_config(trial), int(attributes["rung"])
        loss = read_loss(trial) if trial.state.is_finished() else None
        is_lost = loss is not None and math.isnan(loss)
        place = (config, *attributes["bracket"])
        if place not in entries:
            # A trial that failed before it had parameters is not a configuration.
            if is_lost and config == trial.number and not names <= trial.params.keys():
                continue
            # The losses are read-only once the view is complete; here they are still private.
            losses = losses_by_config.setdefault(config, {})
            entries[place] = Entry(config, Bracket(*attributes["bracket"]), losses)
        losses = losses_by_config[config]
        if not is_lost and losses.get(rung) is None and (rung not in losses or loss is not None):
            evaluations[config, rung] = trial
            losses[rung] = loss
    return View(ladder, trials, list(entries.values()), evaluations, iterations)


def raise_view(view: View, max_tokens: int | None, iterations: int | None) -> View:
    """Return a search as it would be after a raise.

    Args:
        view: The search.
        max_tokens: The new largest run; None: as it is.
        iterations: How often Hyperband is run then; None: as it is.

    Raises:
        ValueError: If the search cannot be raised like that. The message says what works.
    """
    if iterations is not None and (view.iterations is None or iterations < view.iterations):
        present = "no iterations, but a budget" if view.iterations is None else view.iterations
        raise ValueError(f"iterations can only be raised, got {iterations}: the study has {present}")
    ladder = view.ladder if max_tokens is None else view.ladder.raised(parse_tokens(max_tokens))
    return replace(view, ladder=ladder, iterations=view.iterations if iterations is None else iterations)


def has_result(view: View) -> bool:
    """Return whether any run has had a result of its own: a loss, divergence, or an early stop, and no crash."""
    return any(t.state == TrialState.COMPLETE or "crashes" not in t.user_attrs for t in view.finished)


def plan_remaining(
    view: View,
    sizes: tuple[float, ...],
    variant: Variant,
    iterations: int,
    *,
    resumable: bool,
    room: FindRoom | None = None,
) -> RemainingRuns:
    """Return what is still to be run in a search that ends after some iterations of Hyperband.

    Args:
        view: The search.
        sizes: Parameters N of the proxies.
        variant: Which configurations compete for a place.
        iterations: How often Hyperband is run.
        resumable: Whether promotions resume from checkpoints.
        room: How many settings could be run at a size and rung; None if there is no limit.
    """
    increments = _list_pending_increments(view)
    configurations = 0
    for bracket, rung, missing in count_remaining(
        view.entries, view.ladder, variant=variant, sizes=len(sizes), iterations=iterations, room=room
    ):
        is_start = rung == bracket.start
        tokens = view.ladder.tokens(rung, resumed=resumable and not is_start)
        increments += [Fidelity(sizes[bracket.size], tokens)] * missing
        configurations += missing if is_start else 0
    return RemainingRuns(increments, configurations)


def plan_groups(view: View, groups: Sequence[tuple[Fidelity, int]]) -> RemainingRuns:
    """Return what is still to be run of a plan.

    Args:
        view: The search.
        groups: How many runs of each size and length have not been started.
    """
    increments = _list_pending_increments(view)
    for fidelity, missing in groups:
        increments += [fidelity] * missing
    return RemainingRuns(increments, sum(missing for _, missing in groups))


def plan_whole_runs(view: View, top: Fidelity, runs: float) -> RemainingRuns:
    """Return what is still to be run when only the budget that is left is known, and not what the sampler will choose.

    Args:
        view: The search.
        top: The largest run.
        runs: For how many such runs the budget is left. The fraction becomes a shorter last run.
    """
    increments = _list_pending_increments(view)
    increments += [top] * int(runs)
    rest = int(top.D * (runs - int(runs)))
    return RemainingRuns(increments + ([Fidelity(top.N, rest)] if rest else []), 0, counted=False)


def _list_pending_increments(view: View) -> list[Fidelity]:
    return [Fidelity(t.user_attrs["N"], count_trained_tokens(t)) for t in view.pending]


def measure_progress(
    view: View, plan: RemainingRuns | None, variant: Variant, raised_at: int, room: FindRoom | None = None
) -> Progress:
    """Return how far a search has come.

    Args:
        view: The search.
        plan: What is still to be run; None if the search has no end.
        variant: Which configurations compete for a place.
        raised_at: How many trials there were when the largest run was last raised; 0 if never.
        room: How many settings could be run at a size and rung; None if there is no limit.
    """
    done = view.finished
    spent, saved = sum(map(count_trained_tokens, done)), sum(map(count_resumed_tokens, done))
    stopped = [t for t in done if read_stopped(t) is not None]
    reused = []
    if raised_at:
        standing = find_standing(view.entries, view.ladder, variant=variant, room=room)
        reused = [t for place, t in view.evaluations.items() if place in standing and t.number < raised_at]
    return Progress(
        done=len(done),
        planned=None if plan is None or not plan.counted else len(done) + len(plan.increments),
        running=sum(t.state == TrialState.RUNNING for t in view.pending),
        diverged=sum(not math.isfinite(read_loss(t)) for t in done) - len(stopped),
        configurations=len({entry.config for entry in view.entries}),
        tokens_spent=spent,
        tokens_saved=saved,
        tokens_planned=None if plan is None else spent + int(sum(f.D for f in plan.increments)),
        reused=len(reused),
        tokens_reused=sum(map(count_trained_tokens, reused)),
        stopped=len(stopped),
        tokens_stopped=sum(int(t.user_attrs["tokens"]) - read_last_tokens(t) for t in stopped),
        failed=sum(is_diverged(t) and "crashes" in t.user_attrs for t in done),
    )


def build_job(trial: FrozenTrial, parameters: Iterable[str], *, resumable: bool) -> Job:
    """Return the job of a running trial.

    Args:
        trial: The trial, with all its parameters.
        parameters: Names of the parameters in the search space.
        resumable: Whether promotions resume from checkpoints.
    """
    attributes = trial.user_attrs
    continues = attributes.get("continues") if resumable else None
    started = attributes.get("started_tokens")
    return Job(
        params={name: trial.params[name] for name in parameters},
        fidelity=Fidelity(attributes["N"], attributes["tokens"]),
        resume_from=continues,
        number=trial.number,
        config=read_config(trial),
        rung=int(attributes["rung"]),
        bracket=Bracket(*attributes["bracket"]),
        resume_tokens=None if continues is None else attributes.get("resumed_tokens"),
        seeds=read_seeds(trial),
        resume_seeds=0 if continues is None else read_resumed_seeds(trial),
        started_tokens=None if started is None else tuple(started),
    )
