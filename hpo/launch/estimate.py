"""Estimate what is left of a search: evaluations, tokens, FLOPs and time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hpo.study.config import StudyConfig
from hpo.study.trainer import Trainer
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.search.search import Search

# Time to ask for, evaluate and record one run, besides its training. Only the time left depends on it.
OVERHEAD_SECONDS = 0.4


@dataclass(frozen=True)
class Estimate:
    """What is left of a search.

    Attributes:
        evaluations: Runs, each with all its seeds.
        configurations: New configurations among them.
        tokens: Training tokens of all runs together.
        flops: Training FLOPs of all runs together.
        seconds: Time until all workers together have trained them.
        speeds: Tokens per second of one worker by N.
        counted: Whether the runs are known. If False, the runs are a budget's worth of the largest ones, and the
            sampler's model decides what is trained.
    """

    evaluations: int
    configurations: int
    tokens: int
    flops: float
    seconds: float
    speeds: Mapping[float, float]
    counted: bool = True


def estimate_cost(
    search: Search,
    study: StudyConfig,
    trainer: Trainer,
    *,
    max_tokens: int | None = None,
    iterations: int | None = None,
) -> Estimate:
    """Estimate what is left of a search, with the time from a few measured steps at each proxy size.

    Args:
        search: The search.
        study: The study, which gives the number of workers and the settings to measure at.
        trainer: The study's trainer, which measures.
        max_tokens: Estimate what would be left if the longest run were raised to this many tokens.
        iterations: Estimate what would be left if Hyperband were run this often.

    Returns:
        The estimate.

    Raises:
        ValueError: If the search has no end, or cannot be raised like that.
    """
    plan = search.plan(max_tokens, iterations=iterations)
    sizes = [Fidelity(n, 1e6) for n in search.sizes]
    speeds = {}
    if plan.increments:
        # Seconds are averaged over the space, not speeds, because slow settings take most of the time.
        seconds = np.mean(
            [trainer.seconds(probe, sizes, threads=study.workers.threads) for probe in study.probes], axis=0
        )
        speeds = {f.N: f.D / float(s) for f, s in zip(sizes, seconds, strict=True)}
    worker_seconds = sum(f.D / speeds[f.N] + OVERHEAD_SECONDS for f in plan.increments)
    return Estimate(
        evaluations=len(plan.increments),
        configurations=plan.configurations,
        tokens=int(sum(f.D for f in plan.increments)),
        flops=sum(f.C for f in plan.increments),
        seconds=worker_seconds / study.workers.count,
        speeds=speeds,
        counted=plan.counted,
    )


def format_runs(cost: Estimate) -> str:
    """Return how many runs are left, for a line of output."""
    if cost.counted:
        return f"{cost.evaluations} evaluations of {cost.configurations} configurations to run"
    return f"budget for {cost.evaluations} of the largest runs (the last may be shorter); the model chooses what to run"


def format_work(cost: Estimate) -> str:
    """Return the tokens, FLOPs and time that are left, for a line of output."""
    return f"{cost.tokens:,} tokens, {cost.flops:.2e} FLOPs, about {format_rough_duration(cost.seconds)} here"


def format_rough_duration(seconds: float) -> str:
    """Return a duration in the largest unit of which it is at least 1.5, such as "3.4 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
