"""The run table: one row per (trial, fidelity), whatever the source.

Only the first three columns are required; each law names the others that it needs.

| column | meaning |
|---|---|
| N, D | parameters that multiply tokens; training tokens |
| loss | validation loss of the finished (annealed) run, nats per token; NaN where diverged |
| lr, batch_tokens | peak learning rate at base width; tokens per optimizer step |
| run_id, name, config, rung | the run, its name, its configuration in the study, its rung of the ladder |
| role | "proxy", "confirm" or "target"; a target is compared with the prediction made before it |
| arm | of a target: "scratch" (laws are fitted to it) or "warm" (its D is not comparable); others are left out |
| diverged | NaN loss, or no better than guessing at the end: a recorded outcome |
| final | False if the loss is not that of a run of D tokens: unfinished, or before the end of a decaying schedule |
| excluded | why laws do not use the row; empty if they do |
| N_convention | how N was counted, see `scaling.runs.units` |
| parametrization, seq_len, d_model, vocab, N_total, N_nonembedding, N_embedding, seconds, checkpoint | as logged |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pandas as pd

from scaling.common.suggest import find_similar
from scaling.runs.cells import describe_mistakes, is_empty, parse_flags, parse_numbers, raise_problems

REQUIRED_COLUMNS = ("N", "D", "loss")
COUNT_COLUMNS = ("N", "D", "batch_tokens", "seq_len", "d_model", "vocab", "N_total", "N_nonembedding", "N_embedding")
POSITIVE_COLUMNS = (*COUNT_COLUMNS, "lr", "loss")
NUMBER_COLUMNS = (*POSITIVE_COLUMNS, "rung", "seconds")
FLAG_COLUMNS = ("diverged", "final")
TEXT_COLUMNS = (
    "run_id",
    "name",
    "config",
    "role",
    "arm",
    "excluded",
    "N_convention",
    "parametrization",
    "data_sha256",
    "checkpoint",
)
COLUMNS = (*NUMBER_COLUMNS, *FLAG_COLUMNS, *TEXT_COLUMNS)


def usable(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that laws are fitted to: those not excluded and, of targets, those trained from scratch.

    A table that was never checked works, too: its diverged and unfinished rows are left out if it has such columns.

    Args:
        runs: A run table.

    Returns:
        Some of its rows, with their index.
    """
    keep = explain_not_comparable(runs).eq("")
    if "excluded" in runs:
        return runs[keep & runs["excluded"].fillna("").eq("")]
    if "diverged" in runs:
        keep = keep & ~runs["diverged"].astype(bool)
    if "final" in runs:
        keep = keep & runs["final"].astype(bool)
    return runs[keep]


def explain_not_comparable(runs: pd.DataFrame) -> pd.Series[Any]:
    """Return why laws cannot use the row of a target, for each row; empty where they can.

    The D of a warm start leaves out the tokens that its initial weights were trained on.
    """
    role, arm = (runs[c] if c in runs else pd.Series(None, runs.index, dtype=object) for c in ("role", "arm"))
    reasons = pd.Series("", runs.index, dtype=object)
    reasons = reasons.mask(role.eq("target") & ~arm.eq("scratch"), "target whose start is not recorded")
    return reasons.mask(role.eq("target") & arm.eq("warm"), "warm start")


def check_runs(runs: pd.DataFrame, *, origin: str = "the run table") -> pd.DataFrame:
    """Check a run table and fill in `role`, `diverged`, `final` and `excluded`.

    Args:
        runs: A run table.
        origin: Where it comes from, for error messages.

    Returns:
        A copy whose numbers are float64.

    Raises:
        ValueError: If anything is wrong. The message lists all mistakes, each with its row (of the index) and column.
    """
    clean, problems = clean_runs(runs)
    raise_problems(problems, origin)
    return clean


def clean_runs(runs: pd.DataFrame, known: Collection[tuple[str, Any]] = ()) -> tuple[pd.DataFrame, list[str]]:
    """Return the table as `check_runs` does, and what is wrong with it.

    Args:
        runs: A run table.
        known: The (column, row) of cells whose mistakes have been reported already.

    Returns:
        The table, and one line per mistake.
    """
    known = set(known)
    problems = [] if len(runs) else ["no rows"]
    for name in REQUIRED_COLUMNS:
        if name not in runs.columns:
            similar = find_similar(name, (str(c) for c in runs.columns))
            problems.append(f"no column {name}" + (f" (is it {similar[0]}? rename it)" if similar else ""))
    runs = runs.copy()
    for name in NUMBER_COLUMNS:
        if name in runs.columns:
            runs[name], wrong = parse_numbers(runs[name], kind="count" if name in COUNT_COLUMNS else "number")
            needed = "a positive number" if name in POSITIVE_COLUMNS else "a number"
            problems += describe_mistakes(name, wrong, needed)
            known |= {(name, row) for row in wrong}
    for name in TEXT_COLUMNS:
        if name in runs.columns:
            # The same type whatever the file and the version of pandas.
            texts = map_cells(runs[name], lambda v: None if is_empty(v) else str(v))
            runs[name] = pd.Series(texts, runs.index, dtype=object)
    loss = runs["loss"] if "loss" in runs.columns else pd.Series(np.nan, runs.index)
    for name, default in (("diverged", ~np.isfinite(loss)), ("final", pd.Series(True, runs.index))):
        if name not in runs.columns:
            runs[name] = default
        runs[name], wrong = parse_flags(runs[name], default)
        problems += describe_mistakes(name, wrong, "true or false")
    if "role" not in runs.columns:
        runs["role"] = pd.Series("proxy", runs.index, dtype=object)
    runs["role"] = runs["role"].where(runs["role"].notna(), "proxy")
    reasons = runs["excluded"] if "excluded" in runs.columns else pd.Series("", runs.index)
    reasons = reasons.where(reasons.notna(), "").astype(object)
    reasons = reasons.mask(reasons.eq("") & runs["diverged"], "diverged")
    reasons = reasons.mask(reasons.eq("") & ~runs["final"], "not final")
    runs["excluded"] = reasons.where(reasons.ne(""), explain_not_comparable(runs))
    for name in POSITIVE_COLUMNS:
        if name in runs.columns:
            value = runs[name]
            is_wrong = (value <= 0) | np.isinf(value)
            if name == "loss":
                # An excluded run may have any loss.
                is_wrong &= runs["excluded"].eq("")
            if name == "D":
                # A point before the first step has no tokens.
                is_wrong &= ~(value.eq(0) & runs["excluded"].ne(""))
            if name in REQUIRED_COLUMNS:
                is_wrong |= value.isna() & runs["excluded"].eq("")
            new = {row: cell for row, cell in value[is_wrong].items() if (name, row) not in known}
            problems += describe_mistakes(name, new, "a positive number")
    return runs, problems


def map_cells(column: pd.Series[Any], function: Callable[[Any], Any]) -> list[Any]:
    """Return a function of each cell, computed once for equal cells.

    Args:
        column: Cells of any type.
        function: What to compute from a cell.
    """
    cells = column.tolist()
    # 1, 1.0 and True are equal, and lists have no hash.
    if not set(map(type, cells)) <= {str, float, type(None)}:
        return [function(cell) for cell in cells]
    results = {cell: function(cell) for cell in set(cells)}
    return [results[cell] for cell in cells]


def hash_table(runs: pd.DataFrame) -> str:
    """Return the SHA-256 of the proxies that laws can use, in whatever order.

    It covers N, D, lr, batch_tokens and loss. Targets are left out, so that launching one does not make the
    recommendation that it was launched with outdated.
    """
    used = usable(runs)
    return hash_rows(used[used["role"] != "target"] if "role" in used else used)


def hash_rows(runs: pd.DataFrame) -> str:
    """Return the SHA-256 of N, D, lr, batch_tokens and loss of all rows, in whatever order; missing columns are NaN."""
    numbers = runs.reindex(columns=["N", "D", "lr", "batch_tokens", "loss"]).to_numpy(float)
    return hashlib.sha256(np.ascontiguousarray(numbers[np.lexsort(numbers.T)], dtype="<f8").tobytes()).hexdigest()
