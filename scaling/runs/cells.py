"""Checks of single cells of a run table: numbers, flags, what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 5  # mistakes of one kind that are named one by one
PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
TRUTHS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}


def refuse(problems: Sequence[str], origin: str) -> None:
    """One ValueError with all that is wrong, when anything is."""
    if problems:
        raise ValueError(f"{origin} cannot be used (rows count from 0):\n  " + "\n  ".join(problems))


def as_numbers(column: pd.Series) -> tuple[pd.Series, dict[Any, Any]]:
    """The column as float64, NaN where it is empty, and the cells, by row, that are no numbers (NaN in the column, too).

    A text is a number only in the form 1234.5e6: with separators of thousands it could be another one elsewhere.
    """
    import pandas as pd

    if column.dtype.kind in "iuf":
        return pd.Series(column.to_numpy(dtype=float, na_value=math.nan), column.index), {}
    wrong: dict[Any, Any] = {}
    values = []
    for row, cell in zip(column.index, column.tolist(), strict=True):
        value = _number(cell)
        if value is None:
            wrong[row] = cell
        values.append(math.nan if value is None else value)
    return pd.Series(values, column.index, dtype=float), wrong


def as_flags(column: pd.Series, default: pd.Series) -> tuple[pd.Series, dict[Any, Any]]:
    """The column as bool, the default where it is empty, and the cells, by row, that are neither true nor false."""
    import pandas as pd

    if column.dtype == bool:
        return column, {}
    wrong: dict[Any, Any] = {}
    values = []
    for row, cell, other in zip(column.index, column.tolist(), default.tolist(), strict=True):
        value = bool(other) if empty(cell) else TRUTHS.get(str(cell).strip().lower())
        if value is None:
            wrong[row] = cell
        values.append(bool(value))
    return pd.Series(values, column.index, dtype=bool), wrong


def mistakes(column: str, wrong: dict[Any, Any], needed: str) -> list[str]:
    """One line for each of the first few cells (by row) and one for the rest."""
    lines = []
    for row, cell in list(wrong.items())[:SHOWN]:
        got = "an empty cell" if empty(cell) else str(cell) if isinstance(cell, float) else repr(cell)[:80]
        text = f"row {row}, column {column}: needed {needed}, got {got}"
        if isinstance(cell, str) and re.fullmatch(r"\s*[+-]?\d{1,3}([,_ '\u00a0\u2009\u202f]\d{3})+(\.\d*)?\s*", cell):
            text += ": write it without separators of thousands"
        lines.append(text)
    if len(wrong) > SHOWN:
        lines.append(f"column {column}: {len(wrong) - SHOWN} more rows like these")
    return lines


def empty(cell: Any) -> bool:
    """No value: None, NaN, pandas' NA and NaT, or blank text."""
    import pandas as pd

    if isinstance(cell, str):
        return not cell.strip()
    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and math.isnan(cell))


def _number(cell: Any) -> float | None:
    """A cell as a float, NaN when it is empty, None when it is no number."""
    if empty(cell):
        return math.nan
    if isinstance(cell, str):
        return float(cell.strip()) if PLAIN.fullmatch(cell.strip()) else None
    if isinstance(cell, bool) or not isinstance(cell, Real | Decimal):
        return None
    try:
        return float(cell)
    except OverflowError:  # an integer of more than 308 digits
        return None
