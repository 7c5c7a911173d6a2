"""Read the curves of finished runs, and check on them how well the first half of a run predicts its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scaling.common.arrays import Array
from scaling.curves.in_progress import FinishedRun, learn_prior, predict_end
from scaling.curves.schedules import Schedule, make_cooldown_schedule

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Curves read from a store, longest runs first, because each history is a query.
MAX_CURVES = 60
# Of a check: groups of equal (N, D), runs in each, siblings of each run, runs for the prior. Together they make at most
# 180 forecasts, which take one or two seconds.
MAX_GROUPS, MAX_RUNS, MAX_SIBLINGS, MAX_PRIOR_RUNS = 6, 4, 5, 6
# Points in the first half of a run; a forecast needs as many.
MIN_POINTS = 3


@dataclass(frozen=True)
class RunCurve:
    """A finished run: the points on its trunk and, last, its final point.

    Attributes:
        run_id: MLflow's run id, or the one in the table.
        N: Parameters that multiply tokens.
        tokens: Training tokens at each point, ascending, 1-d.
        loss: Loss at each point, nats per token, 1-d.
        schedule: The learning rate as a share of its peak; None if it was not recorded, and is taken as constant.
    """

    run_id: str
    N: float
    tokens: Array
    loss: Array
    schedule: Schedule | None = None

    @property
    def D(self) -> float:
        """Training tokens of the whole run."""
        return float(self.tokens[-1])


@dataclass(frozen=True)
class ForecastCheck:
    """Forecasts from the first half of runs of one (N, D), compared with their final losses. Errors are relative.

    Attributes:
        N: Parameters that multiply tokens.
        D: Training tokens.
        runs: How many runs were forecast.
        error: Mean of |forecast / final loss - 1|.
        bias: Mean of forecast / final loss - 1.
        covered: How many final losses lie inside the 80 % interval.
        carried_error: Mean of |last loss of the first half / final loss - 1|: the error without a forecast.
    """

    N: float
    D: float
    runs: int
    error: float
    bias: float
    covered: int
    carried_error: float


def read_table_curves(runs: pd.DataFrame) -> list[RunCurve]:
    """Return the curves of a table that holds several rows of one run_id, the last of them the end of the run.

    Args:
        runs: A checked run table. A table with rungs holds no such curves.

    Returns:
        At most `MAX_CURVES` curves, the longest runs first.
    """
    if "run_id" not in runs or "rung" in runs:
        return []
    rows = runs[np.isfinite(runs["loss"]) & runs["run_id"].notna() & runs["run_id"].duplicated(keep=False)]
    curves = []
    for run_id, points in rows.groupby("run_id", sort=True):
        points = points.sort_values("D")
        if points["N"].nunique() == 1 and len(points) > MIN_POINTS and not points["diverged"].any():
            tokens, loss = (points[c].to_numpy(float) for c in ("D", "loss"))
            curves.append(RunCurve(str(run_id), float(points["N"].iloc[0]), tokens, loss))
    return sorted(curves, key=lambda c: (-c.D, c.run_id))[:MAX_CURVES]


def read_study_curves(client: MlflowClient, runs: pd.DataFrame) -> list[RunCurve]:
    """Return the curves of a study's proxies, each up to its highest rung.

    Args:
        client: The MLflow client.
        runs: The study's checked run table.

    Returns:
        At most `MAX_CURVES` curves, the longest runs first, with the schedules that the settings of the runs describe.
    """
    from scaling.tracking.log import read_curve

    finished = runs[(runs["role"] == "proxy") & np.isfinite(runs["loss"]) & runs["excluded"].eq("")]
    ends = finished.sort_values(["D", "run_id"], ascending=[False, True]).drop_duplicates("run_id").head(MAX_CURVES)
    curves = []
    for row in ends.itertuples():
        run_id, D = str(row.run_id), float(row.D)
        settings = client.get_run(run_id).data.params
        share, warmup = (float(settings.get(k, "nan")) for k in ("cooldown", "warmup_tokens"))
        is_known = np.isfinite([share, warmup]).all() and settings.get("schedule", "wsd") == "wsd"
        decay, floor = settings.get("decay", "1-sqrt"), float(settings.get("lr_floor", 0.1))
        schedule = make_cooldown_schedule(D, share=share, warmup=warmup, decay=decay, floor=floor) if is_known else None
        tokens, loss = (np.array(v) for v in read_curve(client, run_id))
        # The curve of a run that was promoted branched off before this rung's cooldown and continues beyond it: take
        # the points up to the branch only.
        branch = ((1 - share) if schedule else 1) * D
        is_trunk = np.isfinite(loss) & (tokens <= branch) if tokens.size else tokens > 0
        is_trunk &= tokens < D
        tokens, loss = np.append(tokens[is_trunk], D), np.append(loss[is_trunk], row.loss)
        curves.append(RunCurve(run_id, float(row.N), tokens, loss, schedule))
    return curves


def check_forecasts(curves: Sequence[RunCurve]) -> list[ForecastCheck]:
    """Forecast some runs from their first half and compare with their final losses.

    Each forecast uses what a search would have known: siblings of the same (N, D), and a prior learned from runs of
    other groups. No run takes part in its own forecast.

    Args:
        curves: Curves of finished runs.

    Returns:
        One check for each of the largest groups of equal (N, D), in ascending order.
    """
    groups: dict[tuple[float, float], list[RunCurve]] = {}
    for curve in curves:
        if (curve.tokens <= curve.D / 2).sum() >= MIN_POINTS:
            groups.setdefault((curve.N, round(curve.D, -2)), []).append(curve)
    largest = sorted(groups, key=lambda key: (-min(len(groups[key]), MAX_RUNS), -key[1], -key[0]))[:MAX_GROUPS]
    return [_check_group(groups, key) for key in sorted(largest)]


def _check_group(groups: dict[tuple[float, float], list[RunCurve]], key: tuple[float, float]) -> ForecastCheck:
    group = groups[key]
    others = [curve for other in sorted(groups) if other != key for curve in groups[other]]
    prior = learn_prior([_to_finished_run(c) for c in _pick_evenly(others, MAX_PRIOR_RUNS)])
    errors, covered, carried_errors = [], 0, []
    for curve in _pick_evenly(group, MAX_RUNS):
        siblings = _pick_evenly([c for c in group if c is not curve], MAX_SIBLINGS)
        is_early = curve.tokens <= curve.D / 2
        forecast = predict_end(
            curve.tokens[is_early],
            curve.loss[is_early],
            curve.D,
            schedule=curve.schedule,
            prior=prior,
            siblings=[_to_finished_run(s) for s in siblings],
        )
        final_loss = float(curve.loss[-1])
        errors.append(forecast.mean / final_loss - 1)
        covered += forecast.quantile(0.1) <= final_loss <= forecast.quantile(0.9)
        carried_errors.append(float(curve.loss[is_early][-1]) / final_loss - 1)
    error, carried = np.array(errors), np.array(carried_errors)
    return ForecastCheck(
        N=key[0],
        D=group[0].D,
        runs=error.size,
        error=float(np.abs(error).mean()),
        bias=float(error.mean()),
        covered=covered,
        carried_error=float(np.abs(carried).mean()),
    )


def _pick_evenly(curves: Sequence[RunCurve], most: int) -> list[RunCurve]:
    """Return at most so many curves, evenly spaced in the order of their run_id."""
    ordered = sorted(curves, key=lambda c: c.run_id)
    picked = np.unique(np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(int))
    return [ordered[i] for i in picked]


def _to_finished_run(curve: RunCurve) -> FinishedRun:
    return FinishedRun(curve.tokens, curve.loss, curve.schedule)
