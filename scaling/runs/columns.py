"""Choose the source's column for each column of the run table, and find those that look like one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.common.suggest import find_similar
from scaling.runs.cells import parse_numbers
from scaling.runs.table import COLUMNS, COUNT_COLUMNS, REQUIRED_COLUMNS
from scaling.runs.units import EXTRA_COLUMNS, find_loss_unit, find_unit_mistakes
from scaling.runs.vocabulary import (
    COLUMN_PREFIXES,
    PROGRESS_WORDS,
    RUN_NAMES,
    STATE_NAMES,
    rank_column,
    split_words,
    strip_prefix,
)

if TYPE_CHECKING:
    import pandas as pd

# Columns of the source that a message lists.
MAX_COLUMNS_SHOWN = 12
# Columns that a hint offers for one column of the run table.
MAX_CANDIDATES = 4
# From this number of rows with one name on, they are the points of a run.
HISTORY_ROWS = 5
# From this number of sequences or tokens on, a batch is counted in tokens.
SMALLEST_BATCH_IN_TOKENS = 16384
# What each number is that a file may lack, and a value with which a mapping is tried.
BLANKS: dict[str, tuple[str, float]] = {
    "N": ("the parameters of the model, such as 124M", 1e8),
    "D": ("the training tokens, such as 10B", 2e9),
    "seq_len": ("the tokens of one sequence, such as 2048", 2048.0),
    "batch_tokens": ("the tokens of one optimizer step, such as 524288", 524288.0),
    "bytes_per_token": ("the bytes of one token on that data, such as 4.2", 4.2),
}

Plan = dict[str, tuple[str, list[str]]]


@dataclass
class Findings:
    """What an import has to report.

    Attributes:
        remarks: What was used and what was not, one line each.
        problems: What cannot be read, one line each.
        known: The (column, row) of cells whose mistakes are among the problems.
    """

    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    known: set[tuple[str, Any]] = field(default_factory=set)


@dataclass(frozen=True)
class Candidate:
    """A column of the source that may be a column of the run table.

    Attributes:
        column: Its name in the source.
        unit: The unit that its name implies; may be empty.
        reason: Why it may be the one.
        rank: The lowest fits best.
        numbers: Its cells as numbers, NaN where empty; None where they need not be numbers.
    """

    column: str
    unit: str
    reason: str
    rank: tuple[int, int, int]
    numbers: pd.Series[Any] | None

    def format_value(self, name: str) -> str:
        """Return the value of --map, such as "D=step:steps"."""
        return f"{name}={self.column}" + (f":{self.unit}" if self.unit else "")


def plan_columns(
    raw: pd.DataFrame, mapping: Mapping[str, str], constants: Mapping[str, float | str], findings: Findings
) -> Plan:
    """Return the source's column and its units for each column of the run table, in the order of `COLUMNS`.

    Args:
        raw: The cells of the source.
        mapping: For each column of the run table, "COLUMN:UNIT:...".
        constants: Values for all rows.
        findings: Receives what is missing or wrong, with hints.
    """
    columns = [str(c) for c in raw.columns]
    plan: Plan = {n: (n, []) for n in (*COLUMNS, *EXTRA_COLUMNS) if n in columns and n not in constants}
    for name, text in mapping.items():
        if not text:
            plan.pop(name, None)
            continue
        column, units = split_column(text, columns)
        matches = find_columns(column, columns)
        if len(matches) > 1:
            shown = " or ".join(matches[:MAX_CANDIDATES])
            findings.problems.append(f"{name}={text}: several columns {column} ({shown}? write it whole)")
        elif not matches:
            findings.problems.append(f"{name}={text}: no column {column} (nearest: {_find_nearest(column, columns)})")
        findings.problems += find_unit_mistakes(name, units, text)
        if len(matches) == 1:
            plan[name] = (matches[0], units)

    plan = {name: plan[name] for name in (*COLUMNS, *EXTRA_COLUMNS, "state") if name in plan}
    missing = [n for n in REQUIRED_COLUMNS if n not in plan and n not in constants and not mapping.get(n)]
    findings.problems += [f"no column {n}{_suggest_column(n, raw)}" for n in missing]
    for name in ("lr", "batch_tokens", "run_id"):
        if name not in plan and name not in mapping and name not in constants:
            hint = _suggest_column(name, raw, plan)
            if hint:
                findings.remarks.append(f"no column {name}{hint}")
    return plan


def rank_candidates(name: str, raw: pd.DataFrame, *, but: Sequence[str] = ()) -> list[Candidate]:
    """Return the columns of a source that look like a column of the run table, by name and values, the best first.

    Args:
        name: A column of the run table.
        raw: The cells of the source.
        but: Columns that mean something else already.
    """
    candidates = []
    for column in map(str, raw.columns):
        if column in but:
            continue
        ranked = rank_column(name, column)
        if ranked is None:
            continue
        rank, unit, reason = ranked
        if name == "run_id" and (rank[2] > 1 or not _may_name_runs(raw, column)):
            continue
        numbers = None
        if name != "run_id":
            numbers, wrong = parse_numbers(raw[column], kind="count" if name in COUNT_COLUMNS else "real")
            finite = numbers[np.isfinite(numbers)]
            if wrong or not _is_plausible(name, unit, finite):
                continue
            unit = _settle_unit(name, column, unit, finite)
        candidates.append(Candidate(column, unit, reason, rank, numbers))
    return sorted(candidates, key=lambda c: c.rank)


def _may_name_runs(raw: pd.DataFrame, column: str) -> bool:
    """Return whether a column's values may be names of runs, and not of models that several runs have trained."""
    counts = raw[column].dropna().astype(str).value_counts()
    if len(counts) < 2 or "_".join(w for part in split_words(column) for w in part) in RUN_NAMES:
        return len(counts) > 1
    if counts.max() == 1 or counts.max() >= HISTORY_ROWS:
        return True
    words = {w for c in map(str, raw.columns) for part in split_words(c) for w in part}
    return bool(words & PROGRESS_WORDS)


def find_columns(column: str, columns: Sequence[str]) -> list[str]:
    """Return the columns that a user may mean by a name.

    Args:
        column: The name as given.
        columns: The columns of the source.

    Returns:
        The column of that name or, if there is none, those of that name after a known prefix or, if there is none,
        those whose path ends with it.
    """
    if column in columns:
        return [column]
    prefixed = [p + column for p in COLUMN_PREFIXES if p + column in columns]
    return prefixed or [c for c in columns if column and c.endswith((f".{column}", f"/{column}", f":{column}"))]


def quote(text: str) -> str:
    """Return text in double quotes if a shell would otherwise change it."""
    return f'"{text}"' if any(c in text for c in " ()&;|<>$`'*?!#[]{}~\\") else text


def has_state_name(column: str) -> bool:
    """Return whether a column is called as programs call the state of a run."""
    parts = split_words(column)
    return bool(parts) and "_".join(parts[-1]) in STATE_NAMES


def _settle_unit(name: str, column: str, unit: str, finite: pd.Series[Any]) -> str:
    """Return the unit of a column, by its values where its name leaves it open."""
    if name == "batch_tokens":
        if "tokens" in "_".join(w for part in split_words(column) for w in part):
            return ""
        return "" if float(finite.median()) >= SMALLEST_BATCH_IN_TOKENS else "sequences"
    if name == "loss" and not unit:
        return find_loss_unit(column)
    return unit


def _is_plausible(name: str, unit: str, finite: pd.Series[Any]) -> bool:
    """Return whether a column's finite values may be those of a column of the run table."""
    if finite.empty:
        return False
    low, high = float(finite.min()), float(finite.max())
    if name in ("N", "seq_len", "batch_tokens", "bytes_per_token"):
        return low > 0
    if name == "D":
        return low >= 0 and high > 0
    if name == "lr":
        return low >= 0 and 0 < high <= 10
    return high <= 0 if unit == "log-likelihood" else high > 0


def split_column(text: str, columns: Sequence[str]) -> tuple[str, list[str]]:
    """Split "tokens:billions" into the column and its units; the longest prefix that is a column is the column.

    Args:
        text: The value of a mapping.
        columns: The columns of the source.
    """
    parts = text.split(":")
    for k in range(len(parts), 0, -1):
        if find_columns(":".join(parts[:k]), columns):
            return ":".join(parts[:k]), parts[k:]
    return parts[0], parts[1:]


def _find_nearest(column: str, columns: Sequence[str]) -> str:
    """Return the columns that resemble a name, by their whole names or by what follows their prefixes."""
    by_name = {strip_prefix(c): c for c in reversed(columns)}
    similar = [by_name[n] for n in find_similar(column, by_name, count=3)]
    return ", ".join(dict.fromkeys([*find_similar(column, columns, count=3), *similar][:3])) or "none"


def _suggest_column(name: str, raw: pd.DataFrame, plan: Plan | None = None) -> str:
    """Return a hint for a message, such as " (is it params? --map N=params)".

    It names the columns that look right. If there is none, it lists the columns for a required column.
    """
    but = {column for column, _ in plan.values()} if plan else set()
    candidates = [c for c in rank_candidates(name, raw) if c.column not in but]
    if name == "run_id":
        candidates = [c for c in candidates if plan and _names_runs(raw, c.column, plan)]
    if candidates:
        options = [f"{c.column}? --map {quote(c.format_value(name))}" for c in candidates[:MAX_CANDIDATES]]
        rest = len(candidates) - MAX_CANDIDATES
        return f" (is it {'; or '.join(options)}{f'; or {rest} more' if rest > 0 else ''})"
    columns = [str(c) for c in raw.columns]
    if name in REQUIRED_COLUMNS and len(name) > 1:
        similar = find_similar(name, {strip_prefix(c).lower() for c in columns}, cutoff=0.6)
        match = next((c for c in columns if similar and strip_prefix(c).lower() == similar[0]), None)
        if match:
            return f" (is it {match}? --map {quote(f'{name}={match}')})"
    if name in REQUIRED_COLUMNS:
        rest = len(columns) - MAX_COLUMNS_SHOWN
        more = f" and {rest} more" if rest > 0 else ""
        listed = f"; the source has {', '.join(columns[:MAX_COLUMNS_SHOWN]) or 'none'}{more}: --map {name}=COLUMN"
        return listed + (f", or --set {name}=NUMBER for all rows" if name in BLANKS else "")
    return ""


def _names_runs(raw: pd.DataFrame, column: str, plan: Plan) -> bool:
    """Return whether a column names runs that have several rows, none with equal tokens."""
    names = raw[column].dropna().astype(str)
    if "D" not in plan or names.is_unique:
        return False
    pairs = raw[[column, plan["D"][0]]].astype(str)
    return not pairs.duplicated().any()
