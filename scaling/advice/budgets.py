"""Compute budgets of isoFLOP runs: as they are given, or in a column of the run table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from scaling.advice.table_fits import TableFits
from scaling.common.arrays import Array
from scaling.common.quantities import read_count
from scaling.fitting.groups import group_runs

# Names of a column that holds training compute, in lower case without separators.
COMPUTE_NAMES = ("c", "compute", "budget", "flops", "flop", "flos")
COMPUTE_PARTS = ("flop", "flos", "computebudget", "trainingcompute", "traincompute")
# FLOPs in the units in which compute is given, the last one a petaflop/s-day.
COMPUTE_UNITS = (1.0, 1e9, 1e12, 1e15, 1e18, 1e21, 8.64e19)
# A run whose 6 N D is within this factor of a budget belongs to it.
BUDGET_RATIO = 1.2
# A column counts as compute if it is within this factor of 6 N D in every row, and its median within the other.
MAX_ROW_RATIO, MAX_MEDIAN_RATIO = 10.0, 2.5


def read_budgets(text: str) -> list[float]:
    """Return compute budgets from text such as 1e18,3e18,1e19, in FLOPs, in ascending order.

    Raises:
        ValueError: If there are fewer than two, or one of them is no positive number.
    """
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    try:
        budgets = sorted({read_count(word) for word in words})
    except ValueError as error:
        raise ValueError(f"--budgets needs FLOPs such as 1e18,3e18,1e19, got {text!r}: {error}") from error
    if len(budgets) < 2:
        raise ValueError(f"--budgets needs at least two budgets such as 1e18,3e18,1e19, got {text!r}")
    return budgets


def assign_budgets(compute: Array, budgets: Sequence[float]) -> Array:
    """Return the compute of runs, with the nearest budget in its place where that is close.

    Runs of one budget are alike in the compute that their owner counts, which may not be 6 N D.

    Args:
        compute: 6 N D of each run, FLOPs.
        budgets: The budgets, FLOPs.
    """
    nominal = np.sort(np.asarray(budgets, float))
    nearest = nominal[np.argmin(np.abs(np.log(compute[:, None] / nominal)), axis=1)]
    return np.where(np.abs(np.log(compute / nearest)) < math.log(BUDGET_RATIO), nearest, compute)


def find_compute_column(runs: pd.DataFrame) -> tuple[str, Array] | None:
    """Return the name of the column that holds the compute of each run, and its values in FLOPs.

    A column is recognised by its name and by its values, which must be close to 6 N D in one of the usual units.

    Args:
        runs: A run table without empty N and D.

    Returns:
        The name and the FLOPs of each row; None if there is no such column.
    """
    nominal = 6 * runs["N"].to_numpy(float) * runs["D"].to_numpy(float)
    for name in map(str, runs.columns):
        plain = re.sub(r"[^a-z]", "", name.lower())
        if not (plain in COMPUTE_NAMES or any(part in plain for part in COMPUTE_PARTS)):
            continue
        values = pd.to_numeric(runs[name], errors="coerce").to_numpy(float)
        if not (np.isfinite(values) & (values > 0)).all():
            continue
        for unit in COMPUTE_UNITS:
            ratio = np.abs(np.log(values * unit / nominal))
            if ratio.max() < math.log(MAX_ROW_RATIO) and np.median(ratio) < math.log(MAX_MEDIAN_RATIO):
                return name, values * unit
    return None


def find_point_compute(fits: TableFits) -> tuple[str, Array] | None:
    """Return the compute, in FLOPs, of every point that the loss law was fitted to, by the table's own column.

    Args:
        fits: The laws of a table.

    Returns:
        The name of the column, and the FLOPs of each row of `fits.points`; None if the table holds no compute.
    """
    is_grouped = fits.hp is not None and len(fits.points) == len(fits.hp.floors) and fits.points is fits.groups
    runs = fits.hp.used if is_grouped and fits.hp is not None else fits.used
    column = find_compute_column(runs)
    if column is None or not is_grouped:
        return column
    groups = group_runs(runs["N"].to_numpy(float), runs["D"].to_numpy(float))
    if len(groups.counts) != len(fits.points):
        return None
    return column[0], np.exp(np.bincount(groups.of, np.log(column[1])) / groups.counts)
