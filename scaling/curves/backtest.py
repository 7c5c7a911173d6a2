"""Curves of ended runs, and how well a forecast from the half of each would have told its end: a check on the very record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scaling.common.arrays import Array
from scaling.curves.in_progress import Finished, Schedule, cooldown, learn_prior, predict_end

if TYPE_CHECKING:
    from mlflow import MlflowClient

MOST_CURVES = 60  # read from a store, longest first: a history is a query
GROUPS, RUNS, SIBLINGS, TEACHERS = 6, 4, 5, 6  # of a check: at most 180 forecasts, one or two seconds
LEAST_POINTS = 3  # up to the half of a run; a forecast needs as many


@dataclass(frozen=True)
class RunCurve:
    """An ended run of N parameters: its trunk and, last, its final point."""

    run_id: str
    N: float
    tokens: Array
    loss: Array
    schedule: Schedule | None = None  # None: not recorded, taken as constant

    @property
    def D(self) -> float:
        return float(self.tokens[-1])


@dataclass(frozen=True)
class Check:
    """Forecasts from half of the tokens against the ends, over some runs of one (N, D). Errors are relative."""

    N: float
    D: float
    runs: int
    error: float  # mean of |forecast / end - 1|
    bias: float  # mean of forecast / end - 1
    held: int  # ends inside the 80 % interval
    carried: float  # mean error of the last loss seen, carried forward


def table_curves(runs: pd.DataFrame) -> list[RunCurve]:
    """The runs that a checked table holds as several rows of one run_id, the last of them its end; not rungs of a ladder."""
    if "run_id" not in runs or "rung" in runs:
        return []
    rows = runs[np.isfinite(runs["loss"]) & runs["run_id"].notna() & runs["run_id"].duplicated(keep=False)]
    found = []
    for name, mine in rows.groupby("run_id", sort=True):
        mine = mine.sort_values("D")
        if mine["N"].nunique() == 1 and len(mine) > LEAST_POINTS and not mine["diverged"].any():
            tokens, loss = (mine[c].to_numpy(float) for c in ("D", "loss"))
            found.append(RunCurve(str(name), float(mine["N"].iloc[0]), tokens, loss))
    return sorted(found, key=lambda c: (-c.D, c.run_id))[:MOST_CURVES]


def study_curves(client: MlflowClient, runs: pd.DataFrame) -> list[RunCurve]:
    """The curves of a study's proxies, each to its highest rung, with the schedule that its settings say."""
    from scaling.tracking.log import read_curve

    ended = runs[(runs["role"] == "proxy") & np.isfinite(runs["loss"]) & runs["excluded"].eq("")]
    last = ended.sort_values(["D", "run_id"], ascending=[False, True]).drop_duplicates("run_id").head(MOST_CURVES)
    found = []
    for row in last.itertuples():
        run_id, D = str(row.run_id), float(row.D)
        settings = client.get_run(run_id).data.params
        share, warmup = (float(settings.get(k, "nan")) for k in ("cooldown", "warmup_tokens"))
        known = np.isfinite([share, warmup]).all() and settings.get("schedule", "wsd") == "wsd"
        decay, floor = settings.get("decay", "1-sqrt"), float(settings.get("lr_floor", 0.1))
        schedule = cooldown(D, share=share, warmup=warmup, decay=decay, floor=floor) if known else None
        tokens, loss = (np.array(v) for v in read_curve(client, run_id))
        # a run that was promoted has branched off before and goes on beyond: points up to this branch only
        trunk = np.isfinite(loss) & (tokens <= ((1 - share) if schedule else 1) * D) if tokens.size else tokens > 0
        trunk &= tokens < D
        found.append(
            RunCurve(run_id, float(row.N), np.append(tokens[trunk], D), np.append(loss[trunk], row.loss), schedule)
        )
    return found


def check_forecasts(curves: Sequence[RunCurve]) -> list[Check]:
    """Each of a few runs of the largest groups forecast from its first half, by siblings of the same (N, D) and a prior
    learnt from the runs of other groups: what a search would have known. No run takes part in its own forecast.
    """
    groups: dict[tuple[float, float], list[RunCurve]] = {}
    for curve in curves:
        if (curve.tokens <= curve.D / 2).sum() >= LEAST_POINTS:
            groups.setdefault((curve.N, round(curve.D, -2)), []).append(curve)
    chosen = sorted(groups, key=lambda at: (-min(len(groups[at]), RUNS), -at[1], -at[0]))[:GROUPS]
    checks = []
    for at in sorted(chosen):
        mine = groups[at]
        others = [c for key in sorted(groups) if key != at for c in groups[key]]
        prior = learn_prior([_finished(c) for c in _some(others, TEACHERS)])
        errors, held, carried = [], 0, []
        for curve in _some(mine, RUNS):
            siblings = _some([c for c in mine if c is not curve], SIBLINGS)
            early = curve.tokens <= curve.D / 2
            end = predict_end(
                curve.tokens[early],
                curve.loss[early],
                curve.D,
                schedule=curve.schedule,
                prior=prior,
                siblings=[_finished(s) for s in siblings],
            )
            truth = float(curve.loss[-1])
            errors.append(end.mean / truth - 1)
            held += end.quantile(0.1) <= truth <= end.quantile(0.9)
            carried.append(float(curve.loss[early][-1]) / truth - 1)
        error, before = np.array(errors), np.array(carried)
        checks.append(
            Check(
                at[0],
                mine[0].D,
                error.size,
                float(np.abs(error).mean()),
                float(error.mean()),
                held,
                float(np.abs(before).mean()),
            )
        )
    return checks


def _some(curves: Sequence[RunCurve], most: int) -> list[RunCurve]:
    """Evenly spaced ones, in the order of run_id."""
    ordered = sorted(curves, key=lambda c: c.run_id)
    take = np.unique(np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(int))
    return [ordered[i] for i in take]


def _finished(curve: RunCurve) -> Finished:
    return Finished(curve.tokens, curve.loss, curve.schedule)
