"""Ask, tell, extend: a multi-fidelity search that lives in an ordinary Optuna study.

The study is the only state. Every (configuration, rung) evaluation is one trial; a promotion is a new trial that names
the one it continues. What to run next is worked out from the list of trials at every ask, so that a restart is just
asking again, and a second process sees the same. hpo.search.view reads the trials, hpo.search.hyperband or hpo.search.model_driven says what may
be run, hpo.search.trial_writer writes it.

Decisions are taken under a lock, and a kill at any point leaves either nothing or a running trial of a dead worker,
which the next ask takes over. A trial that failed without `diverged`, or was pruned without `stopped` (from the dashboard,
say), is no result: its run is asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from hpo.samplers.belief import Belief, check_belief
from hpo.samplers.drawing import draw
from hpo.samplers.protocols import FidelitySampler, Judge, Predictor
from hpo.samplers.registry import resolve_sampler
from hpo.samplers.unit_cube import Cube
from hpo.search import trial_writer
from hpo.search.hyperband import Bracket, FreeSlots, Ladder, Promote, Scores, Variant, moves
from hpo.search.model_driven import NextTrial, paid, wanted
from hpo.search.settings import Promotion, checked_seeds, checked_settings, whole_tokens
from hpo.search.trial_writer import SETTINGS
from hpo.search.view import Job, Plan, Progress, View, job_of, plan_of, progress_of, read_trials, whole_runs_of
from hpo.storage.connect import open_storage
from hpo.storage.leases import LeaseMonitor, abandoned, process_name
from hpo.storage.trial_attributes import Stopped, config_of, loss_of
from scaling.common.redact import without_passwords
from scaling.laws.compute import Fidelity


class Search:
    """A search over `space`, a dict of Optuna distributions. ValueError on bad input, before anything is written.

    tokens: smallest and largest run; the ladder between them is max / eta^i.
    sizes: parameter counts N of the proxies, one Hyperband each, kept in ascending order. Default: the target's, or 1.
    target: where the settings are to be good. Default: the largest size at the largest run; it then follows extend().
    It only says where the sampler looks, so a study may be opened again with another one.
    sampler: one of hpo.samplers.names.SAMPLERS, which give the same sequence when killed and resumed, or any Optuna sampler,
        which then answers for its own seeds.
    iterations: how often Hyperband is run: its brackets are then the plan, and the sampler fills them. None: without
        end; a sampler with a model ("mfbo") is then free to choose settings, rungs and what to continue by itself.
    budget: what a search without iterations may cost in all, in the unit of cost; None: without end. It is only a
        stopping rule, so a study may be opened again with another one.
    cost: of one training from the beginning, any unit. Default: FLOPs.
    resumable: a promotion continues the run that it promotes, and pays only the difference.
    seeds: how many trainings with different random seeds an evaluation is, whose mean loss counts: one number for all
        rungs, or one per rung, cheapest first, never falling; the last one holds for rungs that are added on top.
    promote: who goes on to the next rung: "rank", the lowest losses at this one; "predicted", the lowest losses at the
        target that the sampler predicts (the losses rank until it has a model). Places once taken are then kept, as in
        the efficient variant, whatever `variant` says.
    asynchronous: promote good runs before all of their rung have finished: the top is reached sooner, at the price of
        some promotions that prove wrong; see hpo.search.hyperband.
    belief: where the optimum of some parameters is believed to lie, for a sampler with a model; see hpo.samplers.belief.
    storage: None (memory), a path that ends in .journal, a URL, or an Optuna storage. An existing study called `name`
        ("search" by default) is opened and must have been made with the same settings.
    worker: who runs the jobs; unique among live workers. Default: this process. Jobs of a dead process of this host are
        taken over by whoever asks next. Any other name is believed to be alive, but after a restart it may take its own
        jobs up again.
    lock: path of the file that is locked to take decisions. Default: beside a journal or SQLite file; on a database server
        or behind Optuna's gRPC proxy a lock there (hpo.storage.locks).
    lease: seconds after which a job that `beat` was not called for is another's, wherever its worker is; all workers of a
        study have the same. None: only a dead process of this host loses its jobs.
    """

    def __init__(
        self,
        space: dict[str, BaseDistribution],
        *,
        tokens: tuple[int, int],
        eta: int = 3,
        sizes: Sequence[float] | None = None,
        target: Fidelity | None = None,
        sampler: str | BaseSampler = "mfbo",
        scheduler: str = "incremental-hyperband",
        variant: Variant = "discarding",
        iterations: int | None = None,
        budget: float | None = None,
        cost: Callable[[Fidelity], float] | None = None,
        resumable: bool = True,
        seeds: int | Sequence[int] = 1,
        promote: Promotion = "rank",
        asynchronous: bool = False,
        belief: Belief | None = None,
        storage: str | Path | BaseStorage | None = None,
        name: str | None = None,
        seed: int = 0,
        worker: str | None = None,
        lock: str | Path | None = None,
        lease: float | None = None,
    ) -> None:
        settings = checked_settings(
            space,
            tokens=tokens,
            eta=eta,
            sizes=sizes,
            target=target,
            scheduler=scheduler,
            variant=variant,
            iterations=iterations,
            resumable=resumable,
            promote=promote,
            asynchronous=asynchronous,
        )
        ladder = Ladder.make(settings["tokens"][0], settings["tokens"][1], eta)
        ladder = replace(ladder, seeds=checked_seeds(seeds, ladder.levels))
        settings["seeds"] = list(ladder.seeds)
        if budget is not None and (iterations is not None or not (math.isfinite(budget) and budget > 0)):
            raise ValueError(
                f"budget must be positive and finite, and stands in place of iterations, got {budget} and iterations "
                f"{iterations}"
            )
        if seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {seed}")
        if worker == "":
            raise ValueError("worker must not be empty: leave it out for host and process")
        if lease is not None and not (math.isfinite(lease) and lease > 0):
            raise ValueError(f"lease must be positive and finite, or None, got {lease}")
        self.space = dict(space)
        self.sizes: tuple[float, ...] = tuple(settings["sizes"])
        self.variant: Variant = variant if promote == "rank" else "efficient"
        self.promote: Promotion = promote
        self.asynchronous = asynchronous
        self.iterations = iterations
        self.budget = budget
        self.resumable = resumable
        self.cost = cost if cost is not None else _flops
        self.seed = seed
        self.worker = worker if worker is not None else process_name()
        self._target = target
        if belief:
            check_belief(belief, Cube(self.space))
        self._sampler = resolve_sampler(sampler, seed, belief)
        if promote == "predicted" and not isinstance(self._sampler, Predictor):
            raise ValueError(
                'promote="predicted" needs a sampler that has a method predict, such as "mfbo", got '
                f'{sampler!r}: use one, or promote="rank"'
            )
        named = sampler if isinstance(sampler, str) else None
        self._held: set[int] = set()  # numbers of the trials that this object handed out
        self._leased = lease is not None
        self._sightings = LeaseMonitor(math.inf if lease is None else lease)
        name = name if name is not None else "search"
        opened, self._lock = open_storage(storage, lock, name)
        with self._lock:
            self._opened = trial_writer.open_study(
                opened, name, self._sampler, settings, without_passwords(str(storage))
            )
        self.study = self._opened.study
        self._random = partial(trial_writer.random_for, self.study, named, seed)  # of a trial's number
        self._sampler_of = partial(trial_writer.sampler_for, self.study, self._sampler, named, seed)
        self._ladder = ladder  # raised to what the study says at every look

    # What is known

    @property
    def ladder(self) -> Ladder:
        """The budgets in tokens, raises included."""
        return self._ladder.raised(self.study.user_attrs[SETTINGS]["max_tokens"])

    @property
    def target(self) -> Fidelity:
        """Where the settings are to be good."""
        return self._target if self._target is not None else Fidelity(self.sizes[-1], self.ladder.levels[-1])

    @property
    def finished(self) -> bool:
        """Nothing is left, neither to be asked nor in progress. Never, without iterations and budget."""
        view = self._read()
        if self.iterations is None:
            return self._is_spent(view) and not view.pending
        return not view.pending and not self._moves(view)

    @property
    def progress(self) -> Progress:
        view = self._read()
        plan = None if self.iterations is None and self.budget is None else self._plan(view)
        raises = self.study.user_attrs[SETTINGS].get("raises") or [(0, 0)]
        return progress_of(view, plan, self.variant, raised_at=raises[-1][1])

    def plan(self, max_tokens: int | None = None) -> Plan:
        """What is still to be run; with max_tokens: what would be after extend(max_tokens). Writes nothing.

        ValueError when the search has no end, or the ladder cannot be raised so.
        """
        if self.iterations is None and self.budget is None:
            raise ValueError(
                "a search without end has no plan: give iterations, 1 for one Hyperband per size, or a budget"
            )
        view = self._read()
        if max_tokens is not None:
            view = replace(view, ladder=view.ladder.raised(whole_tokens(max_tokens)))
        return self._plan(view)

    def best(self) -> dict[str, Any]:
        """The search's own answer for the target: the model's, where the sampler has one; otherwise the parameters of
        the lowest loss at the highest fidelity (largest N, then D) that has a finite one. ValueError when there is none
        yet.
        """
        done = [t for t in self._read().at.values() if t.state.is_finished() and math.isfinite(loss_of(t))]
        if not done:
            raise ValueError("no run has finished with a finite loss: run some before asking for the best")
        if isinstance(self._sampler, FidelitySampler):
            return self._sampler.best(self.study, self.space, self.target)
        top = min(done, key=lambda t: (-t.user_attrs["N"], -t.user_attrs["tokens"], loss_of(t), t.number))
        return {name: top.params[name] for name in self.space}

    def usefulness(self) -> dict[Fidelity, float]:
        """For every size and rung: how far its losses go with the target's, by the sampler's model (posterior
        correlation over settings). Empty without a model."""
        levels = [Fidelity(size, tokens) for size in self.sizes for tokens in self.ladder.levels]
        if not isinstance(self._sampler, Judge):
            return {}
        found = self._sampler.usefulness(self.study, self.space, levels, self.target)
        return {} if found is None else {level: float(x) for level, x in zip(levels, found, strict=True)}

    # What to do

    def ask(self) -> Job | None:
        """The next job: first those that were given back or left by a dead worker, then promotions, then configurations
        (enqueued ones first). None: nothing can be run now; `finished` tells whether there will be more.
        """
        with self._lock:
            view = self._read()
            expired = self._sightings.expired(view.trials)
            for trial in abandoned(view.trials, self.worker, self._held, expired):
                started = self._start(trial.number)
                first = view.at[config_of(trial), int(trial.user_attrs["rung"])]
                if first is trial and not trial_writer.has_ended(trial):
                    return self._handed_out(started)
                # A second run of the same, or one whose worker was killed between the two writes of its outcome.
                trial_writer.close(self._opened, trial)
                view = self._read()
            if self._is_spent(view):
                return None
            if self.iterations is None and isinstance(self._sampler, FidelitySampler):
                created: FrozenTrial | None = self._freely(view, self._sampler)
            else:
                created = self._next(view, self._moves(view, self._predictions(view)))
            return None if created is None else self._handed_out(created)

    def tell(self, job: Job, loss: float | Sequence[float]) -> None:
        """Record the loss of each of the job's seeds, in their order; a number will do where there is one seed. Any
        that is not finite: diverged, which ranks last and is not asked again.

        ValueError, and nothing is changed, for a job that is unknown or was told already (Lost, where it was another's by
        then), or another number of losses.
        """
        losses = [float(x) for x in loss] if isinstance(loss, Sequence | np.ndarray) else [float(loss)]
        trial_writer.finish(self._opened, job, losses, self.worker if self._leased else None)
        self._held.discard(job.number)

    def beat(self, job: Job) -> None:
        """Keep a job's lease, some times within it. Lost when it is another's, or has been told."""
        trial_writer.beat(self._opened, job, self.worker)

    def report(self, job: Job, tokens: int, loss: float) -> None:
        """Keep a point of a running job's curve, for the forecasts of hpo.worker.early_stopping. ValueError when it is not running."""
        trial_writer.report(self._opened, job, tokens, loss)

    def stop(self, job: Job, stopped: Stopped) -> None:
        """Record that a job was given up on the way: it ranks last, like one that diverged, and is not asked again.

        ValueError, and nothing is changed, for a job that is unknown or was told already, or has several seeds.
        """
        if job.seeds > 1:
            raise ValueError(
                f"only a run of one seed can be stopped, trial {job.number} has {job.seeds}: tell its losses"
            )
        trial_writer.stop(self._opened, job, stopped, self.worker if self._leased else None)
        self._held.discard(job.number)

    def crashed(self, job: Job, why: str, *, attempts: int = 2) -> bool:
        """Note that a job's training crashed, and give it back; whether it is now given up, as diverged, after so many times.

        Lost, and nothing is changed, when it is another's.
        """
        if trial_writer.crashed(self._opened, job, why, self.worker) < attempts:
            self.release(job)
            return False
        self.tell(job, [math.nan] * job.seeds)
        return True

    def release(self, job: Job) -> None:
        """Give a job back unfinished: it will be asked again, as the same trial."""
        self._opened.storage.set_trial_user_attr(trial_writer.running(self._opened, job)[0], "worker", "")
        self._held.discard(job.number)

    def check_extend(self, max_tokens: int) -> None:
        """ValueError, with the nearest values that work, when extend(max_tokens) cannot be."""
        self.ladder.raised(whole_tokens(max_tokens))

    def extend(self, max_tokens: int) -> None:
        """Raise the largest run to max_tokens: the present one times a power of eta. ask() then gives what is
        missing."""
        with self._lock:
            self.check_extend(max_tokens)
            settings = self.study.user_attrs[SETTINGS]
            if whole_tokens(max_tokens) == settings["max_tokens"]:
                return
            # to how many tokens, and how many trials there were then: what they found is what the raise reuses
            raised = [whole_tokens(max_tokens), len(self.study.get_trials(deepcopy=False))]
            new = {"max_tokens": raised[0], "raises": [*settings.get("raises", []), raised]}
            self.study.set_user_attr(SETTINGS, settings | new)

    # How

    def _read(self) -> View:
        return read_trials(self.study.get_trials(deepcopy=False), self.ladder, self.space)

    def _plan(self, view: View) -> Plan:
        if self.iterations is not None:
            return plan_of(view, self.sizes, self.variant, self.iterations, resumable=self.resumable)
        top = Fidelity(self.sizes[-1], view.ladder.levels[-1])
        runs = max(self._left(view), 0.0) / self.cost(top)
        return whole_runs_of(view, top, runs)

    def _left(self, view: View) -> float:
        """Of the budget, when all that runs has ended; without end when there is none."""
        if self.budget is None:
            return math.inf
        return self.budget - paid(view, self.cost)

    def _is_spent(self, view: View) -> bool:
        """Whether not even the cheapest run can be paid."""
        if self.budget is None:
            return False
        cheapest = min(self._start_cost(view, Fidelity(size, view.ladder.levels[0])) for size in self.sizes)
        return self._left(view) < cheapest * (1 - 1e-9)

    def _moves(self, view: View, scores: Scores | None = None) -> list[Promote | FreeSlots]:
        """What may be run. Whether there is anything does not depend on the scores."""
        return moves(
            view.entries,
            view.ladder,
            variant=self.variant,
            sizes=len(self.sizes),
            iterations=self.iterations,
            asynchronous=self.asynchronous,
            scores=scores,
        )

    def _predictions(self, view: View) -> Scores | None:
        """Predicted losses at the target, by configuration; None when ranks decide."""
        sampler = self._sampler
        if self.promote == "rank" or not isinstance(sampler, Predictor):
            return None

        def scores(configs: Sequence[int]) -> Sequence[float] | None:
            params = [{name: view.trials[c].params[name] for name in self.space} for c in configs]
            predicted = sampler.predict(self.study, self.space, params, self.target)
            return None if predicted is None else [float(x) for x in predicted]

        return scores

    def _start_cost(self, view: View, fidelity: Fidelity) -> float:
        """Of all seeds of an evaluation at a fidelity, from the beginning."""
        levels = view.ladder.levels
        rung = next((k for k, level in enumerate(levels) if level >= fidelity.D), view.ladder.top)
        return view.ladder.seeds_at(rung) * self.cost(fidelity)

    def _next(self, view: View, possible: list[Promote | FreeSlots]) -> FrozenTrial | None:
        """Create the trial of the best move."""
        if not possible:
            return None
        first = possible[0]
        if isinstance(first, Promote):
            before = view.at.get((first.config, first.rung - 1))
            params = view.trials[first.config].params
            bracket = next(e.bracket for e in view.entries if e.config == first.config)
            return self._create(view, NextTrial(params, first.rung, bracket, first.config, before))
        starts = sorted(
            (m.bracket for m in possible if isinstance(m, FreeSlots)),
            key=lambda b: self._start_cost(view, self._at(view, b)),
        )
        enqueued = self._enqueued(view, starts[0])
        if enqueued is not None:
            return enqueued
        if isinstance(self._sampler, FidelitySampler):
            slots = [self._at(view, bracket) for bracket in starts]
            cost = partial(self._start_cost, view)
            params, chosen = self._sampler.propose(self.study, self.space, slots, cost, self.target)
            return self._create(view, NextTrial(params, starts[chosen].start, starts[chosen]))
        random = self._random(len(view.trials))
        params = {} if random is None else draw(self.space, self.study, random)
        return self._create(view, NextTrial(params, starts[0].start, starts[0]))

    def _enqueued(self, view: View, bracket: Bracket) -> FrozenTrial | None:
        """Start the first trial that was enqueued by hand, if there is one."""
        attrs = self._attributes(view, NextTrial({}, bracket.start, bracket))
        number = trial_writer.take_enqueued(self._opened, self.space, view, attrs)
        return None if number is None else self._start(number)

    def _freely(self, view: View, sampler: FidelitySampler) -> FrozenTrial:
        """Create the trial that the sampler's model wants."""
        enqueued = self._enqueued(view, Bracket(0, 0, 0))
        if enqueued is not None:
            return enqueued
        chosen = wanted(
            view,
            sampler,
            self.study,
            self.space,
            sizes=self.sizes,
            cost=partial(self._start_cost, view),
            target=self.target,
            resumable=self.resumable,
            left=self._left(view),
        )
        return self._create(view, chosen)

    def _at(self, view: View, bracket: Bracket) -> Fidelity:
        return Fidelity(self.sizes[bracket.size], view.ladder.levels[bracket.start])

    def _attributes(self, view: View, chosen: NextTrial) -> dict[str, Any]:
        attrs = trial_writer.attributes(view, chosen, sizes=self.sizes, worker=self.worker, resumable=self.resumable)
        return {"beat": 0} | attrs if self._leased else attrs

    def _create(self, view: View, chosen: NextTrial) -> FrozenTrial:
        trial = trial_writer.create(self._opened, self.space, chosen, self._attributes(view, chosen))
        return self._start(trial.number, trial)

    def _start(self, number: int, trial: FrozenTrial | None = None) -> FrozenTrial:
        return trial_writer.start(self._opened, self.space, number, self.worker, self._sampler_of, trial)

    def _handed_out(self, trial: FrozenTrial) -> Job:
        self._held.add(trial.number)
        return job_of(trial, self.space, resumable=self.resumable)


def _flops(fidelity: Fidelity) -> float:
    return fidelity.C
