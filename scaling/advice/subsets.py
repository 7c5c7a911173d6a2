"""Choose rows of a run table by the value of a column: what `--where` and `--by` do."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scaling.common.quantities import read_count
from scaling.common.suggest import did_you_mean

if TYPE_CHECKING:
    import pandas as pd

# Values of a column for each of which a law of its own is fitted, at most.
MAX_PARTS = 30
# Values that an error message lists.
SHOWN_VALUES = 8


def select_rows(runs: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Return the rows that meet all conditions.

    Args:
        runs: A run table.
        conditions: Each "column=value". Of several with one column, a row meets one of them. Numbers are compared as
            numbers, with 7B for 7e9, and the value of an empty cell is "".

    Returns:
        The rows, with their index.

    Raises:
        ValueError: If a condition cannot be read, or a column or a value is not in the table.
    """
    wanted: dict[str, list[str]] = {}
    problems = []
    for text in conditions:
        name, separator, value = text.partition("=")
        name = name.strip()
        if not separator or not name:
            problems.append(f"--where needs COLUMN=VALUE, got {text!r}")
        elif name not in runs.columns:
            problems.append(_explain_column("--where", name, runs))
        else:
            wanted.setdefault(name, []).append(value.strip())
    for name, values in wanted.items():
        for value in values:
            if not _matches(runs[name], value).any():
                problems.append(f"--where {name}={value}: no row has it; {name} has {_list_values(runs[name])}")
    if problems:
        raise ValueError("\n  ".join(problems))
    for name, values in wanted.items():
        keep = _matches(runs[name], values[0])
        for value in values[1:]:
            keep |= _matches(runs[name], value)
        runs = runs[keep]
    if wanted and runs.empty:
        raise ValueError("no row meets all conditions of --where: give fewer of them")
    return runs


def split_rows(runs: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    """Return the rows of each value of a column, in the order of the values; rows where it is empty are left out.

    Args:
        runs: A run table.
        column: Its column.

    Raises:
        ValueError: If there is no such column, or if it has one value or too many.
    """
    if column not in runs.columns:
        raise ValueError(_explain_column("--by", column, runs))
    filled = runs[runs[column].notna() & runs[column].map(str).ne("")]
    parts = {format_value(value): rows for value, rows in filled.groupby(column, sort=True)}
    if not 2 <= len(parts) <= MAX_PARTS:
        raise ValueError(
            f"--by needs a column with 2 to {MAX_PARTS} values, and {column} has {len(parts)}: "
            f"{_list_values(runs[column])}"
        )
    return parts


def _matches(column: pd.Series[Any], value: str) -> pd.Series[Any]:
    """Return which cells have this value."""
    texts = column.map(format_value)
    matches = texts.eq(value) | (column.isna() if value == "" else False)
    try:
        number = read_count(value) if re.search(r"[kmbtKMBT]$", value) else float(value)
    except ValueError:
        return matches
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce")
    return matches | (numbers - number).abs().le(1e-9 * abs(number))


def format_value(value: Any) -> str:
    """Return a cell as `--where` and `--by` name it: a whole number without a decimal point."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def _list_values(column: pd.Series[Any]) -> str:
    values = [format_value(v) for v in sorted(column.dropna().unique(), key=str)]
    more = f", ... ({len(values)} in all)" if len(values) > SHOWN_VALUES else ""
    return ", ".join(values[:SHOWN_VALUES]) + more if values else "no values"


def _explain_column(option: str, name: str, runs: pd.DataFrame) -> str:
    names = [str(c) for c in runs.columns]
    similar = did_you_mean(name, names)
    known = f"; {similar}" if similar else f": it has {', '.join(names)}"
    return f"{option} {name}: the table has no such column{known}"
