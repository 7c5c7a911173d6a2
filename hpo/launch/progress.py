"""The progress of a launched search: a table with one row per finished evaluation, and what it has spent and saved."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.launch.estimate import OVERHEAD_SECONDS, Estimate
from hpo.search.view import Progress
from hpo.storage.trial_attributes import count_trained_tokens, read_crashes, read_stopped
from hpo.study.mlflow_run import list_outcomes

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.search.search import Search

logger = logging.getLogger("muscale.hpo")


def format_spending(progress: Progress) -> str:
    """Return what a search has trained and what it did not have to train, one line each."""
    rows = [
        (progress.tokens_spent, "trained"),
        (progress.tokens_saved, "saved by resuming from checkpoints"),
    ]
    if progress.reused:
        rows.append((progress.tokens_reused, f"saved by reusing {progress.reused} evaluations from before the raise"))
    if progress.stopped:
        rows.append((progress.tokens_stopped, f"saved by stopping {progress.stopped} hopeless runs"))
    width = max(len(f"{tokens:,}") for tokens, _ in rows)
    return "\n".join(f"  {tokens:>{width},} tokens {what}" for tokens, what in rows)


class ProgressLog:
    """Logs a table with one row for each evaluation that finishes, below a header.

    Args:
        search: The search.
        cost: What was left of it at the launch.
        workers: How many workers train.
    """

    def __init__(self, search: Search, cost: Estimate, workers: int) -> None:
        self._search, self._cost, self._workers = search, cost, workers
        self._shown = {t.number for t in list_outcomes(search)}
        self._total = len(self._shown) + cost.evaluations
        self._has_header = False
        # When the first run of this launch began, after its worker's imports. Seconds since the epoch.
        self._began: float | None = None
        # What has finished since, in seconds of one worker by the estimate.
        self._finished_seconds = 0.0

    def show(self) -> None:
        """Log the evaluations that have finished since the last call."""
        outcomes = list_outcomes(self._search)
        best = min((t.value for t in outcomes if t.value is not None), default=math.nan)
        new = [t for t in outcomes if t.number not in self._shown]
        if new and not self._has_header:
            logger.info(self._format_row("trial", "N", "D", "loss", "best", "time left", "settings"))
            self._has_header = True
        for trial in sorted(new, key=lambda t: t.datetime_complete or t.number):
            self._shown.add(trial.number)
            self._show_trial(trial, best)

    def _show_trial(self, trial: FrozenTrial, best: float) -> None:
        size, tokens = trial.user_attrs["N"], trial.user_attrs["tokens"]
        trained = count_trained_tokens(trial)
        seconds = trial.duration.total_seconds() if trial.duration else math.nan
        self._finished_seconds += trained / self._cost.speeds[size] + OVERHEAD_SECONDS
        if self._began is None:
            self._began = time.time() - seconds
        loss, settings = "diverged", format_params(trial.params)
        if stopped := read_stopped(trial):
            loss = "stopped"
            settings += f"  at {stopped.tokens:,} tokens, forecast {stopped.mean:.4f} +- {stopped.sd:.4f}"
        elif trial.value is not None:
            loss = f"{trial.value:.4f}"
        elif read_crashes(trial):
            loss = "failed"
        count = f"{len(self._shown)}/{max(self._total, len(self._shown))}" if self._cost.counted else len(self._shown)
        lowest, left = f"{best:.4f}" if math.isfinite(best) else "-", self._format_time_left()
        logger.info(self._format_row(count, f"{size:,.0f}", f"{tokens:,}", loss, lowest, left, settings))
        speed = trained / seconds if seconds else math.nan
        logger.debug(f"  trial {trial.number}: {trained:,} tokens in {seconds:.1f} s, {speed:,.0f} tokens/s")

    def _format_row(self, *cells: object) -> str:
        """Return a row whose columns are wide enough for the largest fidelity of the search."""
        total = str(self._total)
        widths = (
            max(len("trial"), 2 * len(total) + 1 if self._cost.counted else len(total)),
            len(f"{self._search.sizes[-1]:,.0f}"),
            len(f"{self._search.ladder.levels[-1]:,}"),
            len("diverged"),
            len("12.3456"),
            len("time left"),
        )
        columns = [f"{cell!s:>{width}}" for cell, width in zip(cells, widths, strict=False)]
        return "  ".join([*columns, str(cells[-1])])

    def _format_time_left(self) -> str:
        """Return the time left at the pace so far, by the estimate of what is left."""
        if self._began is None:
            return "?"
        total = self._cost.seconds * self._workers
        left = max(total - self._finished_seconds, 0.0)
        return format_duration((time.time() - self._began) * left / self._finished_seconds)


def format_params(params: Mapping[str, Any]) -> str:
    """Return parameters in one line: `lr=0.01 batch_seqs=8`."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def format_duration(seconds: float) -> str:
    """Return a duration as minutes and seconds: `1:47`."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
