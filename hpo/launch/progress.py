"""The progress line of a launcher."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.launch.estimate import OVERHEAD_SECONDS, Estimate
from hpo.search import view
from hpo.storage.trial_attributes import stopped_of, trained_tokens
from hpo.study.mlflow_run import outcomes
from scaling.common.cli import say

if TYPE_CHECKING:
    from hpo.search.search import Search


def spent_in_words(now: view.Progress) -> str:
    """What was trained, and what was not because it had been trained before."""
    said = f"{now.tokens_spent:,} tokens trained; resuming checkpoints saved {now.tokens_saved:,}"
    if now.reused:
        said += f", and results from before the raise {now.tokens_reused:,} ({now.reused} evaluations)"
    if now.stopped:
        said += f"; stopping {now.stopped} hopeless runs saved {now.tokens_stopped:,}"
    return said


class ProgressLine:
    """One line on stderr for every evaluation that ends."""

    def __init__(self, search: Search, cost: Estimate, workers: int) -> None:
        self.search, self.cost, self.workers = search, cost, workers
        self.seen = {t.number for t in outcomes(search)}
        self.total = len(self.seen) + cost.evaluations
        self.began: float | None = (
            None  # seconds since the epoch; when the first run of this launch started, imports over
        )
        self.done = 0.0  # seconds of one worker by the estimate, of what has ended since

    def show(self) -> None:
        ended = outcomes(self.search)
        best = min((t.value for t in ended if t.value is not None), default=math.nan)
        for trial in sorted(
            (t for t in ended if t.number not in self.seen), key=lambda t: t.datetime_complete or t.number
        ):
            self.seen.add(trial.number)
            attrs = trial.user_attrs
            extra = trained_tokens(trial)
            self.done += extra / self.cost.speeds[attrs["N"]] + OVERHEAD_SECONDS
            took = trial.duration.total_seconds() if trial.duration else math.nan
            if self.began is None:
                self.began = time.time() - took
            loss = "diverged" if trial.value is None else f"{trial.value:.4f}"
            if stopped := stopped_of(trial):
                loss = f"stopped at {stopped.tokens:,} tokens (forecast {stopped.mean:.4f} +- {stopped.sd:.4f})"
            say(
                f"trial {len(self.seen)}{self.of()}  N {attrs['N']:,.0f}  D {attrs['tokens']:,}  {words(trial.params)}  "
                f"loss {loss}  best {best:.4f}  {extra / took:,.0f} tokens/s  left {self.left()}"
            )

    def of(self) -> str:
        return f" of {max(self.total, len(self.seen))}" if self.cost.counted else ""

    def left(self) -> str:
        """Time left, at the pace so far, by the estimate of what is left."""
        if self.began is None:
            return "?"
        total = self.cost.seconds * self.workers
        seconds = (time.time() - self.began) * max(total - self.done, 0.0) / self.done
        return clock(seconds)


def words(params: Mapping[str, Any]) -> str:
    """Parameters in one line."""
    return " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
