"""Parse single cells of a run table as numbers and flags, and describe what is wrong with them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Mistakes of one kind that are listed one by one.
MAX_LISTED = 5
NUMBER_PATTERN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
TRUTH_VALUES = {
    "true": True,
    "1": True,
    "1.0": True,
    "yes": True,
    "false": False,
    "0": False,
    "0.0": False,
    "no": False,
}


def raise_problems(problems: Sequence[str], origin: str) -> None:
    """Raise one ValueError that lists all problems, if there are any.

    Args:
        problems: One line each.
        origin: The file, experiment or table that they are in.

    Raises:
        ValueError: If `problems` is not empty.
    """
    if problems:
        raise ValueError(f"{origin} cannot be used (rows count from 0):\n  " + "\n  ".join(problems))


def parse_numbers(column: pd.Series) -> tuple[pd.Series, dict[Any, Any]]:
    """Convert a column to float64.

    Text is a number only in the form 1234.5e6, because thousands separators mean different things in different places.

    Args:
        column: Cells of any type.

    Returns:
        The numbers, NaN where a cell is empty or not a number, and the cells that are not numbers, by row.
    """
    import pandas as pd

    if column.dtype.kind in "iuf":
        return pd.Series(column.to_numpy(dtype=float, na_value=math.nan), column.index), {}
    wrong: dict[Any, Any] = {}
    values = []
    for row, cell in zip(column.index, column.tolist(), strict=True):
        value = _parse_number(cell)
        if value is None:
            wrong[row] = cell
        values.append(math.nan if value is None else value)
    return pd.Series(values, column.index, dtype=float), wrong


def parse_flags(column: pd.Series, default: pd.Series) -> tuple[pd.Series, dict[Any, Any]]:
    """Convert a column to bool.

    Args:
        column: Cells of any type.
        default: The value of each row whose cell is empty.

    Returns:
        The flags, and the cells that are neither true nor false, by row.
    """
    import pandas as pd

    if column.dtype == bool:
        return column, {}
    wrong: dict[Any, Any] = {}
    values = []
    for row, cell, fallback in zip(column.index, column.tolist(), default.tolist(), strict=True):
        value = bool(fallback) if is_empty(cell) else TRUTH_VALUES.get(str(cell).strip().lower())
        if value is None:
            wrong[row] = cell
        values.append(bool(value))
    return pd.Series(values, column.index, dtype=bool), wrong


def describe_mistakes(column: str, wrong: dict[Any, Any], needed: str) -> list[str]:
    """Return one line for each of the first few wrong cells, and one line for the rest.

    Args:
        column: The name of the column.
        wrong: The wrong cells, by row.
        needed: What a cell should hold, such as "a positive number".

    Returns:
        At most `MAX_LISTED` + 1 lines.
    """
    lines = []
    for row, cell in list(wrong.items())[:MAX_LISTED]:
        got = "an empty cell" if is_empty(cell) else str(cell) if isinstance(cell, float) else repr(cell)[:80]
        text = f"row {row}, column {column}: needed {needed}, got {got}"
        if isinstance(cell, str) and re.fullmatch(r"\s*[+-]?\d{1,3}([,_ '\u00a0\u2009\u202f]\d{3})+(\.\d*)?\s*", cell):
            text += ": write it without thousands separators"
        lines.append(text)
    if len(wrong) > MAX_LISTED:
        lines.append(f"column {column}: {len(wrong) - MAX_LISTED} more rows like these")
    return lines


def is_empty(cell: Any) -> bool:
    """Return whether a cell has no value: None, NaN, pandas' NA or NaT, or blank text."""
    import pandas as pd

    if isinstance(cell, str):
        return not cell.strip()
    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and math.isnan(cell))


def _parse_number(cell: Any) -> float | None:
    """Return a cell as a float: NaN if it is empty, None if it is not a number."""
    if is_empty(cell):
        return math.nan
    if isinstance(cell, str):
        return float(cell.strip()) if NUMBER_PATTERN.fullmatch(cell.strip()) else None
    if isinstance(cell, bool) or not isinstance(cell, Real | Decimal):
        return None
    try:
        return float(cell)
    # An integer may have more than 308 digits.
    except OverflowError:
        return None
