"""Say what a user should know of a table: runs that do not fit the others, settings that are missing or ambiguous."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scaling.common.quantities import format_count
from scaling.runs.cells import parse_numbers
from scaling.runs.columns import Plan, quote, rank_candidates
from scaling.runs.vocabulary import split_words

if TYPE_CHECKING:
    import pandas as pd

# A size this many times above or below all others may be mistyped.
SIZE_GAP = 30.0
# At most this share of the rows may be taken for mistyped.
LARGEST_SHARE = 1 / 3
FACTORS = (1e-3, 1e3, 1e-6, 1e6, 1e-9, 1e9)
# A size is wrong if the law of the others misses the loss by more than this (of ln loss), and so many times more than
# with the right size.
LEAST_MISS, LEAST_RATIO = 0.02, 4.0
# A loss is far off if it is more than so many robust sd, and more than this (of ln loss), from what is expected.
LOSS_SDS, LEAST_LOSS_MISS = 6.0, 0.05
# Runs with a larger leverage in the regression, or with so many times the mean leverage, are not judged: at the ends of
# a table a quadratic is no law.
LARGEST_LEVERAGE, LEVERAGE_RATIO = 0.7, 3.0
# Runs that the regression is fitted to, at most.
MOST_REGRESSED = 5000
# Iterations of the robust regression, and its tuning constant (Tukey's biweight).
STEPS, TUNING = 20, 4.685
MAX_NAMED = 3
# Words of a batch that is that of a whole optimizer step.
WHOLE_BATCH_WORDS = frozenset({"global", "total", "effective", "tokens", "gbs"})


@dataclass
class Outliers:
    """Rows that do not fit the others.

    Attributes:
        remarks: What was found, one line each.
        excluded: Why a row should be left out of laws, by row.
    """

    remarks: list[str] = field(default_factory=list)
    excluded: dict[Any, str] = field(default_factory=dict)


def find_outliers(runs: pd.DataFrame) -> Outliers:
    """Find runs that do not fit the others.

    A size is reported as wrong only if the law of the other runs predicts the loss with a size that is a thousand, a
    million or a billion times smaller or larger, and not with the given one. All other oddities are only named.

    Args:
        runs: The rows that laws use: N, D and loss, and lr and batch_tokens where known.
    """
    outliers = Outliers()
    runs = runs[np.isfinite(runs["loss"]) & (runs["loss"] > 0) & (runs["N"] > 0) & (runs["D"] > 0)]
    if len(runs) < 4:
        return outliers
    for name in ("N", "D"):
        _check_sizes(name, runs, outliers)
    _check_losses(runs[~runs.index.isin(list(outliers.excluded))], outliers)
    return outliers


def explain_signs(table: pd.DataFrame, mapping: Mapping[str, str]) -> list[str]:
    """Return why a loss must be positive and what to do, if one that laws would use is not."""
    if "excluded" not in table or "loss" not in table:
        return []
    used = table["loss"][table["excluded"].eq("")]
    if not (used <= 0).any():
        return []
    text = "laws are fitted to ln(loss), so each loss must be positive. "
    if (used < 0).all() and not mapping.get("loss", "").endswith("log-likelihood"):
        column = mapping.get("loss", "loss")
        text += f"If these are log-likelihoods: --map {quote(f'loss={column}:log-likelihood')}. "
    offset = math.ceil(10 * (1 - float(used.min()))) / 10
    text += (
        "The negative log-likelihood of a density may have any sign: add a constant to all losses, which is then part "
        f"of E, such as --set loss_offset={offset:g}. A loss that nobody measured: leave its cell empty"
    )
    return [text]


def remark_missing_settings(table: pd.DataFrame) -> list[str]:
    """Return a remark on rows that laws use and that lack a learning rate or a batch which others have."""
    used = table[table["excluded"].eq("")]
    remarks = []
    for name in ("lr", "batch_tokens"):
        if name in used and used[name].isna().any() and used[name].notna().any():
            rows = used.index[used[name].isna()]
            shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
            remarks.append(
                f"row{'s' if len(rows) > 1 else ''} {shown}: no {name}, so only the loss law uses "
                f"{'these runs' if len(rows) > 1 else 'this run'}"
            )
    return remarks


def remark_other_rates(cells: pd.DataFrame, table: pd.DataFrame, plan: Plan) -> list[str]:
    """Return a remark if another column of learning rates differs from the one that was taken."""
    if "lr" not in plan:
        return []
    taken = plan["lr"][0]
    used = table["excluded"].eq("") & table["lr"].notna()
    for other in rank_candidates("lr", cells, but=[taken]):
        if other.numbers is None or other.rank[0] > 0:
            continue
        ratio = (other.numbers / table["lr"])[used & other.numbers.gt(0)]
        differs = ratio.index[np.abs(np.log(ratio.to_numpy(float))) > 0.01]
        if len(differs):
            row = differs[0]
            values = f"{other.numbers[row]:.4g} instead of {table['lr'][row]:.4g} in row {row}"
            if float(ratio.max()) <= 1.01:
                return [f"lr is {taken}; {other.column} is lower ({values}), as a rate on the way of a schedule is"]
            return [
                f"lr is {taken}; {other.column} differs in {len(differs)} rows ({values}). lr is the peak rate: "
                f"--map {quote(f'lr={other.column}')} takes the other"
            ]
    return []


def remark_accumulation(cells: pd.DataFrame, plan: Plan) -> list[str]:
    """Return a remark if a batch may be one of several whose gradients are summed before an optimizer step."""
    column, units = plan.get("batch_tokens", ("", []))
    if "sequences" not in units or {w for part in split_words(column) for w in part} & WHOLE_BATCH_WORDS:
        return []
    for other in map(str, cells.columns):
        words = {w for part in split_words(other) for w in part}
        if not (words & {"grad", "gradient", "grads"} and any(w.startswith("accum") for w in words)):
            continue
        parts = parse_numbers(cells[other])[0]
        parts = parts[np.isfinite(parts)]
        if len(parts) and float(parts.max()) > 1:
            low, high = float(parts.min()), float(parts.max())
            count = f"{high:g}" if low == high else f"{low:g} to {high:g}"
            return [
                f"{other} is {count}: if {column} counts the sequences of one of these parts, batch_tokens, and D from "
                f"steps, are {count} times as large. Then give the tokens of a whole step, by a column of them or "
                "--set batch_tokens=NUMBER"
            ]
    return []


def _check_sizes(name: str, runs: pd.DataFrame, outliers: Outliers) -> None:
    """Report sizes that lie far from all others where a thousandth or a thousandfold would not."""
    odd = _split_off(runs[name].to_numpy(float))
    if odd is None:
        return
    others, suspects = runs[~odd], runs[odd]
    low, high = float(others[name].min()), float(others[name].max())
    for value, rows in suspects.groupby(name):
        size = float(str(value))
        factor = next((f for f in FACTORS if low / 3 <= size * f <= high * 3), None)
        if factor is None:
            continue
        given, right = format_count(size), format_count(size * factor)
        which = f"row{'s' if len(rows) > 1 else ''} {_list_rows(rows)}"
        others_are = f"all others are {format_count(low)} to {format_count(high)}"
        misses = _miss_losses(name, others, rows, factor)
        if misses and misses[0] > max(LEAST_MISS, LEAST_RATIO * misses[1]):
            outliers.excluded |= dict.fromkeys(rows.index, f"{name} does not fit the other runs")
            outliers.remarks.append(
                f"{name} is {given} in {which}; {others_are}. The law of the others misses the loss there by "
                f"{100 * misses[0]:.0f} %, and with {right} by {100 * misses[1]:.1f} %: laws leave "
                f"{'these rows' if len(rows) > 1 else 'this row'} out. Correct {name} in the source"
            )
        elif misses is None or misses[0] > LEAST_MISS:
            outliers.remarks.append(f"{name} is {given} in {which}; {others_are}. Is it {right}?")


def _split_off(sizes: NDArray[np.float64]) -> NDArray[np.bool_] | None:
    """Return which sizes lie beyond a gap that splits a small part of the rows off, None if there is no such gap."""
    distinct = np.unique(np.log(sizes))
    if len(distinct) < 3:
        return None
    gaps = np.diff(distinct)
    k = int(np.argmax(gaps))
    if gaps[k] < math.log(SIZE_GAP):
        return None
    is_high = np.log(sizes) > distinct[k] + gaps[k] / 2
    odd = is_high if is_high.mean() <= 0.5 else ~is_high
    return odd if odd.mean() <= LARGEST_SHARE else None


def _miss_losses(name: str, others: pd.DataFrame, rows: pd.DataFrame, factor: float) -> tuple[float, float] | None:
    """Return by how much of ln loss the law of the others misses the best loss of rows, as given and corrected.

    Returns:
        None if the others do not determine a law.
    """
    # Imported here, since few tables have such sizes, and scipy takes its time.
    from scaling.fitting.loss_law import FitError, fit_loss_law

    groups = others.groupby(["N", "D"])["loss"].min().reset_index()
    try:
        law = fit_loss_law(*(groups[c].to_numpy(float) for c in ("N", "D", "loss"))).law
    except FitError:
        return None
    best = rows.groupby(["N", "D"])["loss"].min().reset_index()
    corrected = best.assign(**{name: best[name] * factor})
    misses = []
    for table in (best, corrected):
        predicted = law(table["N"].to_numpy(float), table["D"].to_numpy(float))
        misses.append(float(np.median(np.abs(np.log(table["loss"].to_numpy(float) / predicted)))))
    return misses[0], misses[1]


def _check_losses(runs: pd.DataFrame, outliers: Outliers) -> None:
    """Name losses that are far from those of similar runs."""
    residual = _regress_losses(runs)
    if residual is None:
        return
    sd = 1.4826 * float(np.median(np.abs(residual)))
    is_odd = np.abs(residual) > max(LOSS_SDS * sd, LEAST_LOSS_MISS)
    # The loss rises steeply at the ends of a sweep, which is no mistake.
    is_odd &= ~((residual > 0) & _is_end_of_sweep(runs))
    count = int(is_odd.sum())
    if not count or count > max(MAX_NAMED, 0.05 * len(runs)):
        return
    order = np.flatnonzero(is_odd)[np.argsort(-np.abs(residual[is_odd]))]
    for i in order[:MAX_NAMED]:
        row = runs.iloc[i]
        side = "above" if residual[i] > 0 else "below"
        outliers.remarks.append(
            f"row {runs.index[i]} (N {format_count(row['N'])}, D {format_count(row['D'])}): its loss of "
            f"{row['loss']:.4g} is {100 * abs(math.expm1(residual[i])):.0f} % {side} what similar runs lead to "
            "expect. Crashed, or mistyped?"
        )
    if count > MAX_NAMED:
        outliers.remarks.append(f"{count - MAX_NAMED} more runs have such losses")


def _regress_losses(runs: pd.DataFrame) -> NDArray[np.float64] | None:
    """Return the residuals of a robust regression of ln loss on a quadratic in ln N, ln D, ln lr and ln batch.

    Returns:
        None if there are too few runs for any such regression. The residual is 0 where a run is too far from the others
        to be judged.
    """
    y = np.log(runs["loss"].to_numpy(float))
    columns = []
    for name in ("N", "D", "lr", "batch_tokens"):
        if name in runs and runs[name].gt(0).all() and runs[name].nunique() > 1:
            value = np.log(runs[name].to_numpy(float))
            columns.append((value - value.mean()) / value.std())
    squares = [a * b for i, a in enumerate(columns) for b in columns[i:]]
    some = np.linspace(0, len(y) - 1, min(len(y), MOST_REGRESSED)).astype(int)
    for features in (columns + squares, columns):
        design = np.column_stack([np.ones(len(y)), *features])
        _, sizes, axes = np.linalg.svd(design[some], full_matrices=False)
        rank = int(np.sum(sizes > sizes[0] * 1e-9))
        if len(y) < 2 * rank:
            continue
        # A run far from all others determines its own expectation.
        leverage = np.sum((design @ (axes[:rank] / sizes[:rank, None]).T) ** 2, axis=1)
        weights = np.ones(len(some))
        coefficients = np.zeros(design.shape[1])
        for _ in range(STEPS):
            root = np.sqrt(weights)
            coefficients = np.linalg.lstsq(design[some] * root[:, None], y[some] * root, rcond=None)[0]
            residual = y[some] - design[some] @ coefficients
            scale = 1.4826 * float(np.median(np.abs(residual))) or 1e-12
            weights = np.clip(1 - (residual / (TUNING * scale)) ** 2, 0, None) ** 2 + 1e-9
        largest = min(LARGEST_LEVERAGE, max(LEVERAGE_RATIO * rank / len(y), 0.05))
        return np.where(leverage > largest, 0.0, y - design @ coefficients)
    return None


def _is_end_of_sweep(runs: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which runs have the lowest or highest lr or batch of several at their N and D."""
    is_end = np.zeros(len(runs), dtype=bool)
    keys = [runs["N"], runs["D"]]
    for name in ("lr", "batch_tokens"):
        if name in runs:
            values = runs[name].groupby(keys)
            low, high = values.transform("min"), values.transform("max")
            is_end |= ((low < high) & ((runs[name] == low) | (runs[name] == high))).to_numpy()
    return is_end


def _list_rows(rows: pd.DataFrame) -> str:
    shown = ", ".join(map(str, rows.index[:5]))
    return shown + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
