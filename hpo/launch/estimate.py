"""What is left of a search: evaluations, tokens, FLOPs, time."""

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

OVERHEAD_SECONDS = 0.4  # of asking, evaluating and recording one run; only for the time left


@dataclass(frozen=True)
class Estimate:
    """What is left of a search, before it is started."""

    evaluations: int
    configurations: int  # new ones
    tokens: int
    flops: float
    seconds: float  # for all workers together
    speeds: Mapping[float, float]  # N -> tokens per second of one worker
    counted: bool = True  # False: a budget's worth of the largest runs; the model decides what will be run


def estimate(search: Search, study: StudyConfig, trainer: Trainer, *, max_tokens: int | None = None) -> Estimate:
    """What is left of the search (raised to max_tokens if given), with times from a few measured steps of every size."""
    plan = search.plan(max_tokens)
    sizes = [Fidelity(n, 1e6) for n in search.sizes]
    speeds = {}
    if plan.increments:  # seconds, not speeds, are averaged over the space: it is the slow settings that take the time
        seconds = np.mean(
            [trainer.seconds(probe, sizes, threads=study.workers.threads) for probe in study.probes], axis=0
        )
        speeds = {f.N: f.D / float(s) for f, s in zip(sizes, seconds, strict=True)}
    work = sum(f.D / speeds[f.N] + OVERHEAD_SECONDS for f in plan.increments)
    return Estimate(
        evaluations=len(plan.increments),
        configurations=plan.configurations,
        tokens=int(sum(f.D for f in plan.increments)),
        flops=sum(f.C for f in plan.increments),
        seconds=work / study.workers.count,
        speeds=speeds,
        counted=plan.counted,
    )
