"""Start the next trial of a search: what the decider chose, an enqueued one, or others in place of repeated runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from hpo.search.decide import Decider
from hpo.search.hyperband import Bracket
from hpo.search.model_driven import NextTrial
from hpo.search.trial_writer import TrialWriter
from hpo.search.view import View

logger = logging.getLogger("muscale.hpo")


@dataclass(frozen=True)
class TrialStarter:
    """Starts the trials of one search for one worker. It is called under the search's lock.

    Attributes:
        decider: Decides what is run.
        writer: Writes it.
        read: Returns the search as it is now.
    """

    decider: Decider
    writer: TrialWriter
    read: Callable[[], View]

    def start_next(self, view: View) -> FrozenTrial | None:
        """Start the trial that is to run next; None if nothing can be run now."""
        decider = self.decider
        moves = decider.list_moves(view, decider.make_scores(view)) if decider.has_brackets else []
        promotion = decider.choose_promotion(view, moves)
        if promotion is not None:
            return self._create(view, promotion)
        brackets = decider.list_brackets(view, moves)
        if not brackets:
            return None
        for enqueued in self.writer.list_enqueued(view):
            started = self._take_enqueued(view, enqueued, brackets[0])
            if started is not None:
                return started
        chosen = decider.choose_configuration(view, brackets)
        return None if chosen is None else self._create(view, chosen)

    def _take_enqueued(self, view: View, trial: FrozenTrial, bracket: Bracket) -> FrozenTrial | None:
        """Start an enqueued trial in a bracket; None if it has to wait, or repeats a run and is closed."""
        fixed = self.writer.read_fixed(trial)
        if not self.writer.space.keys() <= fixed.keys():
            # The sampler fills in the rest, after which the trial may repeat a run.
            chosen = NextTrial({}, bracket.start, bracket)
            return self.settle(view, self.writer.take_enqueued(view, trial, chosen))
        state, chosen = self.decider.find_run(view, bracket, fixed)
        if state == "busy":
            return None
        if state == "taken":
            self._close_repeated(view, self.writer.take_enqueued(view, trial, NextTrial({}, bracket.start, bracket)))
            return None
        return self.writer.take_enqueued(view, trial, chosen)

    def _create(self, view: View, chosen: NextTrial) -> FrozenTrial | None:
        trial = self.writer.create_trial(view, chosen)
        started = self.writer.start_trial(trial.number, trial)
        return started if chosen.params else self.settle(view, started)

    def settle(self, view: View, trial: FrozenTrial) -> FrozenTrial | None:
        """Make sure that a running trial whose parameters the sampler has just chosen repeats no run.

        Args:
            view: The search before the trial had its parameters.
            trial: The trial.

        Returns:
            The trial, which continues an earlier run of its settings if there is one; or another trial in its place, if
            it would repeat a run. None if there is no other that can be run now.
        """
        bracket = Bracket(*trial.user_attrs["bracket"])
        params = {name: trial.params[name] for name in self.writer.space}
        state, chosen = self.decider.find_run(view, bracket, params, besides=trial.number)
        if state == "free":
            return trial if chosen.config is None else self.writer.continue_run(trial, chosen)
        self._close_repeated(view, trial)
        instead = self.decider.choose_instead(view, bracket, params)
        return None if instead is None else self._create(self.read(), instead)

    def _close_repeated(self, view: View, trial: FrozenTrial) -> None:
        """Close a trial that would repeat a run. Its number of an enqueued trial is logged."""
        bracket = Bracket(*trial.user_attrs["bracket"])
        params = {name: trial.params[name] for name in self.writer.space}
        _, chosen = self.decider.find_run(view, bracket, params, besides=trial.number)
        assert chosen.config is not None
        self.writer.close_repeated(trial, chosen.config)
        if "fixed_params" in trial.system_attrs:
            logger.warning(f"the enqueued trial {trial.number} is not run: its settings are those of {chosen.config}")

    def log_end(self, view: View) -> bool:
        """Log why the search ended early. Return whether it did."""
        reason = self.decider.explain_end(view)
        if reason is not None:
            logger.warning(reason)
        return reason is not None
