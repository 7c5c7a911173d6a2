"""Ask, tell, extend: a multi-fidelity search that lives in an ordinary Optuna study.

The study is the only state. Every (configuration, rung) evaluation is one trial; a promotion is a new trial that names
the one it continues. What to run next is worked out from the list of trials at every ask, so that a restart is just
asking again, and a second process sees the same. The user attributes of a trial: tokens, N, config (number of the
configuration's first trial), rung, bracket [iteration, size index, start rung], continues (trial number or None),
resumed_tokens (where each resumed seed went on), seeds, resumed_seeds, worker, losses (one per seed, when there are
several; the value is their mean), goal (the rung where a free search wants the run, see hpo.free), and diverged (True)
on a run of which a loss was not finite.

Decisions are taken under a lock, and a trial is created with its attributes in one write, so that a kill at any point
leaves either nothing or a running trial of a dead worker, which the next ask takes over. A trial that failed without
`diverged` (from the dashboard, say) is no result: its run is asked again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.belief import Belief, check_belief
from hpo.cube import Cube
from hpo.free import paid, wanted
from hpo.hyperband import Bracket, Ladder, Promote, Scores, Start, Variant, moves
from hpo.opening import (
    Promotion,
    abandoned,
    check_fresh,
    check_same,
    checked_seeds,
    checked_settings,
    open_storage,
    process_name,
    whole_tokens,
)
from hpo.parameters import FidelitySampler, Judge, Predictor, draw, fill_in, made_sampler
from hpo.record import Job as Job
from hpo.record import (
    Plan,
    Progress,
    View,
    config_of,
    job_of,
    loss_of,
    plan_of,
    progress_of,
    read_trials,
    seeds_of,
    whole_runs_of,
)
from scaling.compute import Fidelity

SETTINGS = "muscale"  # the study's user attribute


class Search:
    """A search over `space`, a dict of Optuna distributions. ValueError on bad input, before anything is written.

    tokens: smallest and largest run; the ladder between them is max / eta^i.
    sizes: parameter counts N of the proxies, one Hyperband each, kept in ascending order. Default: the target's, or 1.
    target: where the settings are to be good. Default: the largest size at the largest run; it then follows extend().
    It only says where the sampler looks, so a study may be opened again with another one.
    sampler: one of hpo.samplers.SAMPLERS, which give the same sequence when killed and resumed, or any Optuna sampler,
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
        some promotions that prove wrong; see hpo.hyperband.
    belief: where the optimum of some parameters is believed to lie, for a sampler with a model; see hpo.belief.
    storage: None (memory), a path that ends in .journal, a URL, or an Optuna storage. An existing study called `name`
        ("search" by default) is opened and must have been made with the same settings.
    worker: who runs the jobs; unique among live workers. Default: this process. Jobs of a dead process of this host are
        taken over by whoever asks next. Any other name is believed to be alive, but after a restart it may take its own
        jobs up again.
    lock: path of the file that is locked to take decisions. Default: beside a journal or SQLite file. Without one (in
        memory, a database server) threads of this process exclude each other, but processes do not.
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
        self._sampler = made_sampler(sampler, seed, belief)
        if promote == "predicted" and not isinstance(self._sampler, Predictor):
            raise ValueError(
                'promote="predicted" needs a sampler that has a method predict, such as "mfbo", got '
                f'{sampler!r}: use one, or promote="rank"'
            )
        self._named = sampler if isinstance(sampler, str) else None
        self._held: set[int] = set()  # numbers of the trials that this object handed out
        self._storage, self._lock = open_storage(storage, lock)
        with self._lock:
            self.study = optuna.create_study(
                storage=self._storage,
                study_name=name if name is not None else "search",
                direction="minimize",
                load_if_exists=True,
                sampler=self._sampler,
                pruner=optuna.pruners.NopPruner(),
            )
            self._study_id = self._storage.get_study_id_from_name(self.study.study_name)
            stored = self.study.user_attrs.get(SETTINGS)
            if stored is None:
                check_fresh(self.study)
                self.study.set_user_attr(SETTINGS, settings)
            else:
                check_same(self.study.study_name, stored, settings)
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
        plan = None if self.iterations is None and self.budget is None else self._plan(view, self.iterations)
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
        return self._plan(view, self.iterations)

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
            for trial in abandoned(view.trials, self.worker, self._held):
                number = self._start(trial.number).number
                first = view.at[config_of(trial), int(trial.user_attrs["rung"])]
                if first is trial and not trial.user_attrs.get("diverged"):
                    return self._handed_out(number)
                # A second run of the same, or one whose worker was killed between the two writes of a divergence.
                self.study.tell(number, state=TrialState.FAIL)
                view = self._read()
            if self._is_spent(view):
                return None
            if self.iterations is None and isinstance(self._sampler, FidelitySampler):
                created: int | None = self._freely(view, self._sampler)
            else:
                created = self._next(view, self._moves(view, self._predictions(view)))
            return None if created is None else self._handed_out(created)

    def tell(self, job: Job, loss: float | Sequence[float]) -> None:
        """Record the loss of each of the job's seeds, in their order; a number will do where there is one seed. Any
        that is not finite: diverged, which ranks last and is not asked again.

        ValueError, and nothing is changed, for a job that is unknown or was told already, or another number of losses.
        """
        losses = [float(x) for x in loss] if isinstance(loss, Sequence | np.ndarray) else [float(loss)]
        trial_id = self._running(job)
        seeds = seeds_of(self._storage.get_trial(trial_id))
        if len(losses) != seeds:
            raise ValueError(
                f"trial {job.number} is {seeds} training{'s' if seeds > 1 else ''}, got {len(losses)} "
                f"loss{'es' if len(losses) != 1 else ''}: tell one per seed"
            )
        try:
            if seeds > 1:
                kept = [x if math.isfinite(x) else None for x in losses]
                self._storage.set_trial_user_attr(trial_id, "losses", kept)
            if all(math.isfinite(x) for x in losses):
                self.study.tell(job.number, sum(x / seeds for x in losses))
            else:
                self._storage.set_trial_user_attr(trial_id, "diverged", True)
                self.study.tell(job.number, state=TrialState.FAIL)
        except UpdateFinishedTrialError as error:
            raise ValueError(f"trial {job.number} was told by someone else in the meantime") from error
        self._held.discard(job.number)

    def release(self, job: Job) -> None:
        """Give a job back unfinished: it will be asked again, as the same trial."""
        self._storage.set_trial_user_attr(self._running(job), "worker", "")
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

    def _plan(self, view: View, iterations: int | None) -> Plan:
        if iterations is not None:
            return plan_of(view, self.sizes, self.variant, iterations, resumable=self.resumable)
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

    def _moves(self, view: View, scores: Scores | None = None) -> list[Promote | Start]:
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

    def _next(self, view: View, possible: list[Promote | Start]) -> int | None:
        """Create the trial of the best move; its number."""
        if not possible:
            return None
        first = possible[0]
        if isinstance(first, Promote):
            before = view.at.get((first.config, first.rung - 1))
            params = view.trials[first.config].params
            bracket = next(e.bracket for e in view.entries if e.config == first.config)
            return self._create(view, params, first.rung, bracket, config=first.config, continues=before)
        starts = sorted(
            (m.bracket for m in possible if isinstance(m, Start)),
            key=lambda b: self._start_cost(view, self._at(view, b)),
        )
        enqueued = self._enqueued(view, starts[0])
        if enqueued is not None:
            return enqueued
        if isinstance(self._sampler, FidelitySampler):
            slots = [self._at(view, bracket) for bracket in starts]
            cost = partial(self._start_cost, view)
            params, chosen = self._sampler.propose(self.study, self.space, slots, cost, self.target)
            return self._create(view, params, starts[chosen].start, starts[chosen])
        random = self._random(len(view.trials))
        params = {} if random is None else draw(self.space, self.study, random)
        return self._create(view, params, starts[0].start, starts[0])

    def _enqueued(self, view: View, bracket: Bracket) -> int | None:
        """Start the first trial that was enqueued by hand, if there is one; its number."""
        for trial in view.trials:
            if trial.state == TrialState.WAITING and "bracket" not in trial.user_attrs and self._in_range(trial):
                for key, value in self._attrs(view, bracket.start, bracket, trial.number, None).items():
                    self._storage.set_trial_user_attr(self._id(trial.number), key, value)
                return self._start(trial.number).number
        return None

    def _freely(self, view: View, sampler: FidelitySampler) -> int:
        """Create the trial that the sampler's model wants; its number."""
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
        return self._create(
            view,
            chosen.params,
            chosen.rung,
            chosen.bracket,
            config=chosen.config,
            continues=chosen.continues,
            goal=chosen.goal,
        )

    def _at(self, view: View, bracket: Bracket) -> Fidelity:
        return Fidelity(self.sizes[bracket.size], view.ladder.levels[bracket.start])

    def _attrs(
        self, view: View, rung: int, bracket: Bracket, config: int, continues: FrozenTrial | None
    ) -> dict[str, Any]:
        """The attribute that makes a trial ours, bracket, comes last."""
        resumed = continues if self.resumable else None
        return {
            "tokens": view.ladder.levels[rung],
            "N": self.sizes[bracket.size],
            "config": config,
            "rung": rung,
            "continues": None if continues is None else continues.number,
            "resumed_tokens": 0 if resumed is None else resumed.user_attrs["tokens"],
            "seeds": view.ladder.seeds_at(rung),
            "resumed_seeds": 0 if resumed is None else seeds_of(resumed),
            "worker": self.worker,
            "bracket": list(bracket),
        }

    def _create(
        self,
        view: View,
        params: dict[str, Any],
        rung: int,
        bracket: Bracket,
        *,
        config: int | None = None,
        continues: FrozenTrial | None = None,
        goal: int | None = None,
    ) -> int:
        """A new running trial, in one write; its number. No params: the sampler is asked for them afterwards."""
        number = len(view.trials)
        trial_id = self._storage.create_new_trial(
            self._study_id,
            create_trial(
                state=TrialState.RUNNING,
                params={k: params[k] for k in self.space} if params else {},
                distributions=self.space if params else {},
                user_attrs=({} if goal is None else {"goal": goal})
                | self._attrs(view, rung, bracket, number if config is None else config, continues),
            ),
        )
        actual = self._storage.get_trial_number_from_id(trial_id)
        if config is None and actual != number:  # a trial was enqueued by hand in this very moment
            self._storage.set_trial_user_attr(trial_id, "config", actual)
        return self._start(actual).number

    def _start(self, number: int) -> FrozenTrial:
        """Make a trial that has our attributes run here: ours by name, and complete in its parameters."""
        trial_id = self._id(number)
        trial = self._storage.get_trial(trial_id)
        for key, value in (("worker", self.worker), ("config", config_of(trial))):
            if trial.user_attrs.get(key) != value:
                self._storage.set_trial_user_attr(trial_id, key, value)
        if trial.state == TrialState.WAITING:
            self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        if not self.space.keys() <= trial.params.keys():
            fill_in(self.space, self.study.study_name, self._storage, self._sampler_for(number), trial_id)
        return self._storage.get_trial(trial_id)

    def _sampler_for(self, number: int) -> BaseSampler:
        """What chooses the parameters of a trial: for Optuna's samplers by name one that is made for it, from a seed of
        its own, so that neither a restart nor a second worker repeats what was drawn."""
        random = self._random(number)
        if random is not None or self._named not in ("tpe", "gp"):
            return random or self._sampler
        return made_sampler(self._named, int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))

    def _random(self, number: int) -> RandomSampler | None:
        """What draws the parameters of a trial, when that is done at random: from one stream per trial, so that neither
        a restart nor a second worker repeats them. Optuna's quasi-random sampler, too, begins at random, until a trial
        is complete.
        """
        random = self._named == "random"
        if self._named == "qmc":
            random = not self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        stream = np.random.SeedSequence([self.seed, number])
        return RandomSampler(seed=int(stream.generate_state(1)[0])) if random else None

    def _in_range(self, trial: FrozenTrial) -> bool:
        """Whether the values of a trial enqueued by hand lie in the space; if not, it is failed with a warning."""
        fixed = {k: v for k, v in trial.system_attrs.get("fixed_params", {}).items() if k in self.space}
        try:
            create_trial(value=0.0, params=fixed, distributions={k: self.space[k] for k in fixed})
        except ValueError as error:
            warnings.warn(f"the enqueued trial {trial.number} is not run: {error}", UserWarning, stacklevel=4)
            self._storage.set_trial_state_values(self._id(trial.number), TrialState.RUNNING)
            self.study.tell(trial.number, state=TrialState.FAIL)
            return False
        return True

    def _handed_out(self, number: int) -> Job:
        self._held.add(number)
        return job_of(self._storage.get_trial(self._id(number)), self.space, resumable=self.resumable)

    def _running(self, job: Job) -> int:
        """The id of a job's trial. ValueError when it is not running or not this search's."""
        known = f"trial {job.number} of study {self.study.study_name!r}"
        if not 0 <= job.number < len(self.study.get_trials(deepcopy=False)):
            raise ValueError(f"{known} does not exist: tell only jobs that this search's ask() gave")
        trial_id = self._id(job.number)
        trial = self._storage.get_trial(trial_id)
        if trial.user_attrs.get("bracket") != list(job.bracket) or trial.user_attrs.get("rung") != job.rung:
            raise ValueError(f"{known} is another run than {job}: tell only jobs that this search's ask() gave")
        if trial.state != TrialState.RUNNING:
            raise ValueError(f"{known} is not running but {trial.state.name}: a job is told once")
        return trial_id

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def _flops(fidelity: Fidelity) -> float:
    return fidelity.C
