"""Decide what a search runs next, from its trials."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState

from hpo.planning.law_search import COLUMNS, LawPlan, choose_settings, recommend_settings
from hpo.samplers.drawing import draw_settings
from hpo.samplers.protocols import FidelitySampler, Predictor
from hpo.samplers.registry import resolve_sampler
from hpo.search.distinct import RunIndex, RunState, SettingsGrid, find_checkpoint, find_config
from hpo.search.hyperband import Bracket, FindRoom, FreeSlots, Promote, Scores, compute_rung_sizes, list_moves
from hpo.search.ladder import Ladder
from hpo.search.model_driven import NextTrial, choose_next, compute_spent_cost, has_next_run
from hpo.search.settings import SearchSettings
from hpo.search.view import RemainingRuns, View, plan_groups, plan_remaining, plan_whole_runs, raise_view
from hpo.storage.trial_attributes import read_loss
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Decider:
    """Decides what a search runs next, as a function of its trials.

    It keeps no state, so a restart is just asking again. Brackets are the plan if there are iterations or the sampler
    has no model (`hpo.search.hyperband`); otherwise the model chooses freely (`hpo.search.model_driven`).

    Attributes:
        settings: The settings of the search.
        study: Its Optuna study, which the sampler reads.
        sampler: The sampler.
        sampler_name: The sampler's name; None if it was given as an object.
        cost: Cost of one training from the beginning, in any unit.
        grid: The settings of the search space, told apart.
    """

    settings: SearchSettings
    study: optuna.Study
    sampler: BaseSampler
    sampler_name: str | None
    cost: Callable[[Fidelity], float]
    grid: SettingsGrid = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", SettingsGrid(self.settings.space))

    # What is left

    @property
    def has_end(self) -> bool:
        """Whether the search ends, after its iterations or its budget."""
        settings = self.settings
        return settings.iterations is not None or settings.budget is not None or settings.plan is not None

    def find_target(self, ladder: Ladder) -> Fidelity:
        """Return where the settings are to be good: by default, the largest size at the largest run."""
        target = self.settings.target
        return target if target is not None else Fidelity(self.settings.proxy_sizes[-1], ladder.levels[-1])

    def is_finished(self, view: View) -> bool:
        """Return whether nothing is left to start or in progress."""
        if view.pending:
            return False
        if self.settings.plan is not None:
            return not self.list_open_groups(view)
        if view.iterations is None:
            return self.is_budget_spent(view) or self.is_exhausted(view)
        return not self.list_moves(view)

    def is_exhausted(self, view: View) -> bool:
        """Return whether the space has no run that could be made now, because its settings have been run."""
        if self.grid.count == math.inf:
            return False
        if not self.is_model_driven:
            return not self.list_moves(view)
        # A run that failed without a result is made again.
        if any(not entry.losses for entry in view.entries):
            return False
        return not has_next_run(
            RunIndex(view, self.grid),
            self.settings.proxy_sizes,
            lambda fidelity: self.compute_cost(view.ladder, fidelity),
            self.compute_budget_left(view),
            resumable=self.settings.resumable,
        )

    def explain_end(self, view: View) -> str | None:
        """Return why a search is finished before its iterations or its budget are; None if it is not."""
        if self.grid.count == math.inf or not self.is_finished(view) or not self._was_cut_short(view):
            return None
        done = len(view.finished)
        runs = f"its {int(self.grid.count):,} settings allowed {done:,} runs, none twice"
        text = f"the search space is exhausted: {runs}"
        if self.settings.plan is not None:
            return f"{text}, fewer than its plan has"
        if view.iterations is not None:
            iterations = "one iteration" if view.iterations == 1 else f"{view.iterations} iterations"
            return f"{text}, fewer than the brackets of {iterations} have places for"
        if self.settings.budget is None:
            return text
        left = max(self.compute_budget_left(view), 0.0) / self.settings.budget
        levels = view.ladder.levels
        index = RunIndex(view, self.grid)
        has_more = any(
            index.count_room(size, rung).free
            for size in range(len(self.settings.proxy_sizes))
            for rung in range(len(levels))
        )
        if has_more:
            rest = f"{left:.0%} of the budget that is left"
            return f"no run that is left can be paid: {runs}, and any other costs more than the {rest}"
        return f"{text}; {left:.0%} of the budget is left"

    def _was_cut_short(self, view: View) -> bool:
        """Return whether a finished search would have gone on in a space with more settings."""
        if self.settings.plan is not None:
            return any(self._count_missing(view))
        if view.iterations is None:
            return not self.is_budget_spent(view)
        members: dict[Bracket, int] = {}
        for entry in view.entries:
            members[entry.bracket] = members.get(entry.bracket, 0) + 1
        top, eta = view.ladder.top, view.ladder.eta
        return any(
            members.get(Bracket(iteration, size, start), 0) < compute_rung_sizes(start, top, eta)[0]
            for iteration in range(view.iterations)
            for size in range(len(self.settings.proxy_sizes))
            for start in range(top + 1)
        )

    def make_room(self, view: View) -> FindRoom | None:
        """Return the function that counts the settings that could still be run; None if there is no limit to them."""
        return None if self.grid.count == math.inf else RunIndex(view, self.grid).count_room

    def is_budget_spent(self, view: View) -> bool:
        """Return whether the budget that is left does not pay even the cheapest run."""
        if self.settings.budget is None:
            return False
        cheapest = min(
            self.compute_cost(view.ladder, Fidelity(size, view.ladder.levels[0])) for size in self.settings.proxy_sizes
        )
        # The tolerance is for sums of many costs.
        return self.compute_budget_left(view) < cheapest * (1 - 1e-9)

    def compute_budget_left(self, view: View) -> float:
        """Return what is left of the budget when all runs in progress have ended; infinity without a budget."""
        if self.settings.budget is None:
            return math.inf
        return self.settings.budget - compute_spent_cost(view, self.cost)

    def compute_cost(self, ladder: Ladder, fidelity: Fidelity) -> float:
        """Return the cost of an evaluation at a fidelity from the beginning, with all its seeds."""
        rung = next((k for k, level in enumerate(ladder.levels) if level >= fidelity.D), ladder.top)
        return ladder.seeds_at(rung) * self.cost(fidelity)

    def plan(self, view: View) -> RemainingRuns:
        """Return what is still to be run in a search that ends."""
        settings = self.settings
        if settings.plan is not None:
            missing = self._count_missing(view)
            groups = zip(settings.plan.design.groups, missing, strict=True)
            return plan_groups(view, [(Fidelity(group.N, group.tokens), count) for group, count in groups])
        if view.iterations is not None:
            return plan_remaining(
                view,
                settings.proxy_sizes,
                settings.effective_variant,
                view.iterations,
                resumable=settings.resumable,
                room=self.make_room(view),
            )
        top = Fidelity(settings.proxy_sizes[-1], view.ladder.levels[-1])
        return plan_whole_runs(view, top, max(self.compute_budget_left(view), 0.0) / self.cost(top))

    def raise_view(self, view: View, max_tokens: int | None, iterations: int | None) -> View:
        """Return a search as it would be after a raise, see `hpo.search.view.raise_view`. ValueError with a plan."""
        if self.settings.plan is not None and (max_tokens is not None or iterations is not None):
            raise ValueError("the runs of a plan are fixed: `hpo plan` with a larger budget writes another study")
        return raise_view(view, max_tokens, iterations)

    # What to run next

    @property
    def is_model_driven(self) -> bool:
        """Whether the sampler's model chooses rungs and continuations, too, because there are no brackets."""
        settings = self.settings
        return settings.iterations is None and settings.plan is None and isinstance(self.sampler, FidelitySampler)

    @property
    def has_brackets(self) -> bool:
        """Whether Hyperband's brackets are the plan."""
        return self.settings.plan is None and not self.is_model_driven

    def list_open_groups(self, view: View) -> list[Bracket]:
        """Return the groups of the plan with runs that have not been started, cheapest first, as brackets."""
        assert self.settings.plan is not None
        index = RunIndex(view, self.grid)
        is_limited = self.grid.count < math.inf
        return [
            bracket
            for bracket, missing in zip(self._list_groups(view), self._count_missing(view), strict=True)
            if missing and not (is_limited and index.count_room(bracket.size, bracket.start).free == 0)
        ]

    def _list_groups(self, view: View) -> list[Bracket]:
        """Return the groups of the plan as brackets, cheapest first."""
        assert self.settings.plan is not None
        sizes, levels = self.settings.proxy_sizes, view.ladder.levels
        return [Bracket(0, sizes.index(g.N), levels.index(g.tokens)) for g in self.settings.plan.design.groups]

    def _count_missing(self, view: View) -> list[int]:
        """Return how many runs of each group of the plan have not been started."""
        assert self.settings.plan is not None
        started = Counter((t.user_attrs["bracket"][1], t.user_attrs["rung"]) for t in view.evaluations.values())
        groups = zip(self._list_groups(view), self.settings.plan.design.groups, strict=True)
        return [max(group.runs - started[bracket.size, bracket.start], 0) for bracket, group in groups]

    def _choose_for_law(self, view: View, plan: LawPlan, bracket: Bracket) -> NextTrial | None:
        """Return the next run of a group of the plan; None if its settings have been run."""
        group = self._list_groups(view).index(bracket)
        place = plan.design.groups[group].runs - self._count_missing(view)[group]
        params = choose_settings(
            self._list_runs(view, plan), plan, self.settings.space, group, place, self.settings.seed
        )
        return self._make_distinct(view, bracket, params)

    def recommend(self, view: View) -> dict[str, Any]:
        """Return the settings that the law of the runs recommends for the target, within the space."""
        plan, target = self.settings.plan, self.find_target(view.ladder)
        assert plan is not None
        return recommend_settings(self._list_runs(view, plan), plan, self.settings.space, target.N, target.D)

    def _list_runs(self, view: View, plan: LawPlan) -> pd.DataFrame:
        """Return the runs that have ended, as the law reads them."""
        import pandas as pd

        rows = [
            (
                float(trial.user_attrs["N"]),
                float(trial.user_attrs["tokens"]),
                float(trial.params[plan.inputs.lr]),
                plan.inputs.compute_batch_tokens(trial.params),
                read_loss(trial),
            )
            for trial in view.finished
        ]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def list_moves(self, view: View, scores: Scores | None = None) -> list[Promote | FreeSlots]:
        """Return what may be run in a search with brackets.

        Args:
            view: The search.
            scores: Ranks promotions, see `make_scores`. Whether there are any moves does not depend on it.
        """
        settings = self.settings
        return list_moves(
            view.entries,
            view.ladder,
            variant=settings.effective_variant,
            sizes=len(settings.proxy_sizes),
            iterations=view.iterations,
            asynchronous=settings.asynchronous,
            scores=scores,
            room=self.make_room(view),
        )

    def make_scores(self, view: View) -> Scores | None:
        """Return the function that predicts the losses of configurations at the target; None if the ranks decide."""
        sampler = self.sampler
        if self.settings.promote == "rank" or not isinstance(sampler, Predictor):
            return None

        def predict(configs: Sequence[int]) -> Sequence[float] | None:
            params = [{name: view.trials[c].params[name] for name in self.settings.space} for c in configs]
            losses = sampler.predict(self.study, self.settings.space, params, self.find_target(view.ladder))
            return None if losses is None else [float(x) for x in losses]

        return predict

    def choose_promotion(self, view: View, moves: Sequence[Promote | FreeSlots]) -> NextTrial | None:
        """Return the first promotion among the moves; None if new configurations are to be started, or nothing."""
        if not moves or not isinstance(moves[0], Promote):
            return None
        move = moves[0]
        assert move.bracket is not None
        runs = {rung: trial for (config, rung), trial in view.evaluations.items() if config == move.config}
        below = find_checkpoint(runs, move.rung)
        return NextTrial(view.trials[move.config].params, move.rung, move.bracket, move.config, below)

    def list_brackets(self, view: View, moves: Sequence[Promote | FreeSlots]) -> list[Bracket]:
        """Return the brackets with room for new configurations, the cheapest first.

        In a model-driven search there is one bracket, at the lowest rung of the smallest size, for enqueued trials.
        """
        if self.settings.plan is not None:
            return self.list_open_groups(view)
        if self.is_model_driven:
            return [Bracket(0, 0, 0)]
        brackets = (move.bracket for move in moves if isinstance(move, FreeSlots))
        return sorted(brackets, key=lambda b: self.compute_cost(view.ladder, self._find_fidelity(view, b)))

    def find_run(
        self, view: View, bracket: Bracket, params: Mapping[str, Any], *, besides: int | None = None
    ) -> tuple[RunState, NextTrial]:
        """Return how settings can be run as a new configuration of a bracket.

        Args:
            view: The search.
            bracket: The bracket.
            params: The settings.
            besides: Number of a trial that is left out, because it is the one that is to run them.

        Returns:
            Whether they can be run now, and the trial. If they have been run at this size before, it is the next one of
            their configuration, and continues the longest checkpoint below.
        """
        index = RunIndex(view, self.grid, besides)
        state = index.check(bracket.size, bracket.start, params)
        return state, self._start_or_continue(index, bracket, params)

    def _start_or_continue(self, index: RunIndex, bracket: Bracket, params: Mapping[str, Any]) -> NextTrial:
        runs = index.find(bracket.size, params)
        config = find_config(runs)
        if config is None:
            return NextTrial(dict(params), bracket.start, bracket)
        # Settings that were rounded differently are the same.
        known = next(iter(runs.values())).params
        return NextTrial(known, bracket.start, bracket, config, find_checkpoint(runs, bracket.start))

    def choose_instead(self, view: View, bracket: Bracket, wanted: Mapping[str, Any]) -> NextTrial | None:
        """Return a new configuration of a bracket in place of settings that have been run; None if there is none."""
        index, seed = RunIndex(view, self.grid), self._make_seed(len(view.trials))
        if self.grid.count == math.inf:
            drawn = draw_settings(self.settings.space, self.study, RandomSampler(seed=seed))
            return self._start_or_continue(index, bracket, drawn)
        sampler = self.sampler
        rng = np.random.default_rng(seed)

        def is_free(params: dict[str, Any]) -> bool:
            return index.check(bracket.size, bracket.start, params) == "free"

        def rank(several: Sequence[dict[str, Any]]) -> Sequence[float] | None:
            if self.sampler_name in ("random", "qmc"):
                return [float(x) for x in rng.random(len(several))]
            if not isinstance(sampler, Predictor):
                return None
            losses = sampler.predict(self.study, self.settings.space, several, self.find_target(view.ladder))
            return None if losses is None else [float(x) for x in losses]

        params = index.choose(wanted, is_free, rng=rng, rank=rank)
        return None if params is None else self._start_or_continue(index, bracket, params)

    def choose_configuration(self, view: View, brackets: Sequence[Bracket]) -> NextTrial | None:
        """Return the next trial if nothing is promoted and no trial is enqueued.

        Args:
            view: The search.
            brackets: What `list_brackets` returned, at least one.

        Returns:
            The trial; without parameters if the sampler chooses them when it starts. None if nothing can be run now.
        """
        if self.settings.plan is not None:
            return self._choose_for_law(view, self.settings.plan, brackets[0])
        if isinstance(self.sampler, FidelitySampler):
            return self._ask_model(view, self.sampler, brackets)
        random = self.make_random_sampler(len(view.trials))
        if random is None:
            return NextTrial({}, brackets[0].start, brackets[0])
        params = draw_settings(self.settings.space, self.study, random)
        return self._make_distinct(view, brackets[0], params)

    def _make_distinct(self, view: View, bracket: Bracket, params: dict[str, Any]) -> NextTrial | None:
        """Return the trial of settings as a new configuration of a bracket, or of others if these have been run."""
        state, trial = self.find_run(view, bracket, params)
        return trial if state == "free" else self.choose_instead(view, bracket, params)

    def _ask_model(self, view: View, sampler: FidelitySampler, brackets: Sequence[Bracket]) -> NextTrial | None:
        def cost(fidelity: Fidelity) -> float:
            return self.compute_cost(view.ladder, fidelity)

        target = self.find_target(view.ladder)
        if self.is_model_driven:
            return choose_next(
                view,
                sampler,
                self.study,
                self.settings.space,
                sizes=self.settings.proxy_sizes,
                cost=cost,
                target=target,
                resumable=self.settings.resumable,
                left=self.compute_budget_left(view),
                index=RunIndex(view, self.grid),
                seed=self._make_seed(len(view.trials)),
            )
        slots = [self._find_fidelity(view, bracket) for bracket in brackets]
        params, chosen = sampler.propose(self.study, self.settings.space, slots, cost, target)
        return self._make_distinct(view, brackets[chosen], params)

    def _find_fidelity(self, view: View, bracket: Bracket) -> Fidelity:
        """Return the size and tokens at which the configurations of a bracket start."""
        return Fidelity(self.settings.proxy_sizes[bracket.size], view.ladder.levels[bracket.start])

    # The parameters of a trial

    def make_sampler(self, number: int) -> BaseSampler:
        """Return the sampler that chooses the parameters of the trial with a given number.

        Optuna's samplers that were given by name are made for each trial, with a seed of its own, so that neither a
        restart nor a second worker repeats what was drawn.
        """
        random = self.make_random_sampler(number)
        if random is not None:
            return random
        if self.sampler_name not in ("tpe", "gp"):
            return self.sampler
        return resolve_sampler(self.sampler_name, self._make_seed(number))

    def make_random_sampler(self, number: int) -> RandomSampler | None:
        """Return what draws the parameters of a trial at random, from a stream of its own; None if they are not random.

        Optuna's quasi-random sampler also starts at random, until a trial is complete.
        """
        is_random = self.sampler_name == "random"
        if self.sampler_name == "qmc":
            is_random = not self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return RandomSampler(seed=self._make_seed(number)) if is_random else None

    def _make_seed(self, number: int) -> int:
        return int(np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0])
