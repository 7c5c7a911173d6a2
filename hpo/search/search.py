"""Ask, tell, extend: a multi-fidelity search in an ordinary Optuna study.

The study is the only state. Every (configuration, rung) evaluation is one trial; a promotion is a new trial that names
the one that it continues. Each ask decides from the list of trials what to run next, so that a restart is just asking
again, and a second process sees the same. `hpo.search.view` reads the trials, `hpo.search.decide` chooses what to run,
and `hpo.search.trial_writer` writes it.

Decisions are taken under a lock. A kill at any point leaves either nothing or a running trial of a dead worker, which
the next ask takes over. A trial that failed without `diverged`, or was pruned without `stopped` (from the dashboard,
say), has no result: its run is asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from hpo.planning.law_search import LawPlan
from hpo.samplers.belief import Belief, check_belief
from hpo.samplers.protocols import FidelitySampler, Predictor, UsefulnessEstimator
from hpo.samplers.registry import resolve_sampler
from hpo.samplers.unit_cube import Cube
from hpo.search.decide import Decider
from hpo.search.hyperband import Variant
from hpo.search.ladder import Ladder
from hpo.search.settings import Promotion, SearchSettings, parse_losses, parse_point, parse_tokens
from hpo.search.starter import TrialStarter
from hpo.search.stored import (
    count_trials_before_raise,
    open_study,
    read_max_tokens,
    read_raises,
    store_iterations,
    store_raise,
)
from hpo.search.trial_writer import TrialWriter
from hpo.search.view import (
    Job,
    Progress,
    RemainingRuns,
    View,
    build_job,
    has_result,
    measure_progress,
    read_trials,
)
from hpo.storage.connect import open_storage
from hpo.storage.leases import LeaseMonitor, find_abandoned, identify_process
from hpo.storage.trial_attributes import Stopped, has_outcome, read_config, read_loss
from scaling.common.redact import redact_passwords
from scaling.laws.compute import Fidelity


class Search:
    """A search for the best configuration at a target fidelity, from cheaper runs.

    Args:
        space: The search space, a dict of Optuna distributions.
        tokens: Smallest and largest run. The ladder between them is max / eta^i.
        eta: Each rung keeps the best 1/eta and trains them eta times longer.
        sizes: Parameters N of the proxies, one Hyperband each, kept in ascending order. Default: the target's, or 1.
        target: Where the settings are to be good. Default: the largest size at the largest run, which then follows
            `extend`. It only tells the sampler where to look, so a study may be opened again with another one.
        sampler: One of `hpo.samplers.names.SAMPLERS`, which give the same sequence when killed and resumed; or any
            Optuna sampler, which is then responsible for its own seeds.
        scheduler: "incremental-hyperband", or "law", which runs a plan about the optimum that a law predicts.
        plan: The runs of scheduler "law", as `hpo.plan` makes them; None for others.
        variant: Which configurations compete for a place after a raise, see `hpo.search.hyperband`.
        iterations: How often Hyperband is run. Its brackets are then the plan, and the sampler fills them. A study may
            be opened again with more of them. None: no end; a sampler with a model ("mfbo") then chooses settings,
            rungs and what to continue by itself.
        budget: What a search without iterations may cost in total, in the unit of `cost`; None: no end. It is only a
            stopping rule, so a study may be opened again with another one.
        cost: Cost of one training from the beginning, in any unit. Default: FLOPs.
        resumable: A promotion continues the run that it promotes, and pays only the difference.
        seeds: How many trainings with different random seeds an evaluation consists of. Their mean loss counts. One
            number for all rungs, or one per rung, cheapest first, never falling; the last one holds for rungs that are
            added on top.
        promote: Which configurations are promoted to the next rung: "rank", the lowest losses at this one; "predicted",
            the lowest losses at the target that the sampler predicts (the losses rank until it has a model). Places
            once taken are then kept, as in the efficient variant, for any `variant`.
        asynchronous: Promote good runs before their whole rung has finished. The top is reached sooner, at the price of
            some promotions that prove wrong: see `hpo.search.hyperband`.
        belief: Where the optimum of some parameters is believed to lie, for a sampler with a model: see
            `hpo.samplers.belief`.
        storage: None (memory), a path that ends in .journal, a URL, or an Optuna storage. An existing study called
            `name` is opened and must have been made with the same settings.
        name: Name of the study. Default: "search".
        seed: Seed of the sampler.
        worker: Name of the process that runs the jobs, unique among live workers. Default: this process. Jobs of a dead
            process of this host are taken over by the next worker that asks. A worker with any other name counts as
            alive, but after a restart it may take its own jobs up again.
        lock: Path of the file that is locked to take decisions. Default: beside a journal or SQLite file; on a database
            server or behind Optuna's gRPC proxy, a lock there (`hpo.storage.locks`).
        lease: Seconds without a call of `beat` after which another worker may take a job over, on any host. It is the
            same for all workers of a study. None: only a dead process of this host loses its jobs.

    Raises:
        ValueError: On bad input, before anything is written.
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
        plan: LawPlan | None = None,
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
        self.settings = settings = SearchSettings(
            space=dict(space) if space else {},
            tokens=tokens,
            eta=eta,
            sizes=sizes,
            target=target,
            scheduler=scheduler,
            plan=plan,
            variant=variant,
            iterations=iterations,
            budget=budget,
            resumable=resumable,
            seeds=seeds,
            promote=promote,
            asynchronous=asynchronous,
            seed=seed,
            worker=worker,
            lease=lease,
        )
        self.space = settings.space
        self.sizes: tuple[float, ...] = settings.proxy_sizes
        self.variant: Variant = settings.effective_variant
        self.promote: Promotion = promote
        self.asynchronous = asynchronous
        self.iterations = iterations
        self.budget = budget
        self.resumable = resumable
        self.cost = cost if cost is not None else attrgetter("C")
        self.seed = seed
        self.worker = worker if worker is not None else identify_process()
        if belief:
            check_belief(belief, Cube(self.space))
        self._sampler = resolve_sampler(sampler, seed, belief)
        if promote == "predicted" and not isinstance(self._sampler, Predictor):
            raise ValueError(
                'promote="predicted" needs a sampler that has a method predict, such as "mfbo", got '
                f'{sampler!r}: use one, or promote="rank"'
            )
        # Numbers of the trials that this object has handed out.
        self._held: set[int] = set()
        # Numbers of those that failed here while no run had had a result.
        self._set_aside: set[int] = set()
        self._has_logged_end = self._has_stored_iterations = False
        self._lease_monitor = LeaseMonitor(math.inf if lease is None else lease)
        name = name if name is not None else "search"
        opened, self._lock = open_storage(storage, lock, name)
        with self._lock:
            self.study = open_study(opened, name, self._sampler, settings, redact_passwords(str(storage)))
        sampler_name = sampler if isinstance(sampler, str) else None
        self._decider = Decider(settings, self.study, self._sampler, sampler_name, self.cost)
        self._writer = writer = TrialWriter(
            self.study,
            opened,
            space=self.space,
            sizes=self.sizes,
            worker=self.worker,
            is_leased=lease is not None,
            resumable=resumable,
            make_sampler=self._decider.make_sampler,
        )
        self._starter = TrialStarter(self._decider, writer, self._read)

    # What is known

    @property
    def ladder(self) -> Ladder:
        """The budgets in tokens, raises included."""
        return self.settings.ladder.raised(read_max_tokens(self.study))

    @property
    def current_iterations(self) -> int | None:
        """How often Hyperband is run, raises included; None for no end."""
        return read_raises(self.study, self.settings.iterations)[1]

    @property
    def target(self) -> Fidelity:
        """Where the settings are to be good."""
        return self._decider.find_target(self.ladder)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to ask or in progress.

        Without iterations and a budget, it is when all runs that a space without continuous parameters allows are made.
        """
        return self._decider.is_finished(self._read())

    def explain_end(self) -> str | None:
        """Return why the search is finished before its iterations or its budget are; None if it is not."""
        return self._decider.explain_end(self._read())

    @property
    def progress(self) -> Progress:
        """What was run, spent and saved so far, and what is planned."""
        view = self._read()
        plan = self._decider.plan(view) if self._decider.has_end else None
        raised_at, room = count_trials_before_raise(self.study), self._decider.make_room(view)
        return measure_progress(view, plan, self.variant, raised_at, room)

    def plan(self, max_tokens: int | None = None, *, iterations: int | None = None) -> RemainingRuns:
        """Return what is still to be run, or would be after `extend` with the same arguments. Writes nothing.

        Raises:
            ValueError: If the search has no end, or cannot be raised like that.
        """
        if not self._decider.has_end:
            raise ValueError(
                "a search without end has no plan: give iterations, 1 for one Hyperband per size, or a budget"
            )
        return self._decider.plan(self._decider.raise_view(self._read(), max_tokens, iterations))

    def best(self) -> dict[str, Any]:
        """Return the search's answer: the settings for the target.

        With a plan, this is the law's answer. If the sampler has a model, it is the model's. Otherwise these are the
        parameters of the lowest loss at the highest fidelity (largest N, then D) that has a finite one.

        Raises:
            ValueError: If no run has finished with a finite loss.
        """
        view = self._read()
        done = [t for t in view.finished if math.isfinite(read_loss(t))]
        if not done:
            raise ValueError("no run has finished with a finite loss: run some before asking for the best")
        if self.settings.plan is not None:
            return self._decider.recommend(view)
        if isinstance(self._sampler, FidelitySampler):
            return self._sampler.best(self.study, self.space, self.target)
        top = min(done, key=lambda t: (-t.user_attrs["N"], -t.user_attrs["tokens"], read_loss(t), t.number))
        return {name: top.params[name] for name in self.space}

    def usefulness(self) -> dict[Fidelity, float]:
        """Return how far the losses of every size and rung correlate with the target's; empty without a model."""
        levels = [Fidelity(size, tokens) for size in self.sizes for tokens in self.ladder.levels]
        if not isinstance(self._sampler, UsefulnessEstimator):
            return {}
        found = self._sampler.usefulness(self.study, self.space, levels, self.target)
        return {} if found is None else {level: float(x) for level, x in zip(levels, found, strict=True)}

    # What to do

    def ask(self) -> Job | None:
        """Return the next job, or None if nothing can be run now. `finished` tells whether there will be more.

        Jobs that were given back or left by a dead worker come first, then promotions, then new configurations
        (enqueued ones first). Settings that have been run at a size and rung are not run there again.
        """
        with self._lock:
            view = self._read()
            expired = self._lease_monitor.find_expired(view.trials)
            skipped = self._set_aside if self._set_aside and not has_result(view) else frozenset[int]()
            abandoned = find_abandoned(view.trials, self.worker, self._held, expired)
            for trial in (t for t in abandoned if t.number not in skipped):
                was_complete, started = self.space.keys() <= trial.params.keys(), self._writer.start_trial(trial.number)
                counted = view.evaluations.get((read_config(trial), int(trial.user_attrs["rung"])))
                if counted is trial and not has_outcome(trial):
                    # The parameters may have been chosen just now, as those of a run that exists.
                    settled = started if was_complete else self._starter.settle(view, started)
                    if settled is not None:
                        return self._hand_out(settled)
                else:
                    # It is a second run of the same evaluation, or its worker was killed while it wrote the outcome.
                    self._writer.close_abandoned(trial)
                view = self._read()
            created = None if self._decider.is_budget_spent(view) else self._starter.start_next(view)
            if created is None:
                # Where workers hold leases, their launcher logs it.
                if self.settings.lease is None and not self._has_logged_end:
                    self._has_logged_end = self._starter.log_end(view)
                return None
            if not self._has_stored_iterations:
                self._has_stored_iterations = store_iterations(self.study, view.iterations)
            return self._hand_out(created)

    def tell(self, job: Job, loss: float | Sequence[float]) -> None:
        """Record the result of a job.

        Args:
            job: The job.
            loss: The loss of each of its seeds, in their order; a number for a single seed. One that is not finite
                means that the run diverged: it ranks last and is not asked again.

        Raises:
            ValueError: If the job is unknown, or the number of losses is wrong. Nothing is changed then.
            LeaseLost: If the job was told already, or is another worker's by now. Nothing is changed then.
        """
        losses = parse_losses(job.number, loss)
        self._writer.finish_trial(job, losses)
        self._held.discard(job.number)

    def beat(self, job: Job) -> None:
        """Keep a job's lease. Call this a few times within its length.

        Raises:
            LeaseLost: If the job is another worker's by now, or has been told.
        """
        self._writer.record_heartbeat(job)

    def report(self, job: Job, tokens: int, loss: float) -> None:
        """Record a point of a running job's loss curve, for the forecasts of `hpo.worker.early_stopping`.

        Args:
            job: The job.
            tokens: Tokens that the run has trained.
            loss: Its loss there, in nats per token.

        Raises:
            ValueError: If the job is not running.
        """
        self._writer.report_point(job, *parse_point(job.number, tokens, loss))

    def stop(self, job: Job, stopped: Stopped) -> None:
        """Record that a job was stopped early. It ranks last, like one that diverged, and is not asked again.

        Args:
            job: The job.
            stopped: Where and why it was stopped.

        Raises:
            ValueError: If the job is unknown, was told already, or has several seeds. Nothing is changed then.
        """
        if job.seeds > 1:
            raise ValueError(
                f"only a run of one seed can be stopped, trial {job.number} has {job.seeds}: tell its losses"
            )
        self._writer.stop_trial(job, stopped)
        self._held.discard(job.number)

    def record_start(self, job: Job, started_tokens: Sequence[int]) -> Job:
        """Record where each seed of a job starts, if a checkpoint was lost, and return the job that starts there.

        Args:
            job: The job.
            started_tokens: Tokens of the checkpoint that each of its seeds continues; 0 for the beginning.
        """
        self._writer.record_start(job, started_tokens)
        return replace(job, started_tokens=tuple(started_tokens))

    @property
    def has_result(self) -> bool:
        """Whether any run has had a result of its own: a loss, divergence, or an early stop, and no crash."""
        return has_result(self._read())

    @property
    def set_aside(self) -> frozenset[int]:
        """Numbers of the trials that this object gave back for good, until another run has a result."""
        return frozenset(self._set_aside)

    @property
    def is_stuck(self) -> bool:
        """Whether every run that is left failed in this process, and none has had a result."""
        view = self._read()
        pending = {trial.number for trial in view.pending}
        return bool(pending) and pending <= self._set_aside and not has_result(view)

    def crashed(self, job: Job, why: str, *, attempts: int | None = 2) -> bool:
        """Record that a job's training crashed or failed, and give the job back.

        Args:
            job: The job.
            why: The reason, which is kept with the trial.
            attempts: After this many crashes the job counts as diverged. None: never; as long as no run has had a
                result, this object does not ask for the job again then.

        Returns:
            Whether it now counts as diverged.

        Raises:
            LeaseLost: If the job is another worker's by now. Nothing is changed then.
        """
        count = self._writer.record_crash(job, why)
        if attempts is None or count < attempts:
            if attempts is None:
                self._set_aside.add(job.number)
            self.release(job)
            return False
        self.tell(job, [math.nan] * job.seeds)
        return True

    def release(self, job: Job) -> None:
        """Give a job back unfinished. It is asked again, as the same trial."""
        self._writer.release_trial(job)
        self._held.discard(job.number)

    def check_extend(self, max_tokens: int) -> None:
        """Check that `extend(max_tokens)` is possible. The ValueError names the nearest values that are."""
        self.ladder.raised(parse_tokens(max_tokens))

    def extend(self, max_tokens: int | None = None, *, iterations: int | None = None) -> None:
        """Raise the largest run, or the number of iterations, or both. `ask` then returns what is missing.

        Args:
            max_tokens: The present largest run times a power of eta; None: as it is.
            iterations: How often Hyperband is run, at least as often as now; None: as it is.

        Raises:
            ValueError: If it is any other number. The message names the nearest values that work.
        """
        with self._lock:
            view = self._decider.raise_view(self._read(), max_tokens, iterations)
            if view.ladder.levels[-1] != read_max_tokens(self.study):
                store_raise(self.study, view.ladder.levels[-1])
            store_iterations(self.study, view.iterations)

    def _read(self) -> View:
        max_tokens, iterations = read_raises(self.study, self.settings.iterations)
        ladder = self.settings.ladder.raised(max_tokens)
        return read_trials(self.study.get_trials(deepcopy=False), ladder, self.space, iterations)

    def _hand_out(self, trial: FrozenTrial) -> Job:
        self._held.add(trial.number)
        return build_job(trial, self.space, resumable=self.resumable)
