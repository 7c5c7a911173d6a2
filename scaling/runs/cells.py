"""Parse single cells of a run table as numbers and flags, and describe what is wrong with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scaling.common.quantities import SCALES, split_count
from scaling.formats.raw import COMMA_GROUPS, DECIMAL_COMMA, DOT_GROUPS, MAX_LISTED, NUMBER_PATTERN, PLAIN_GROUPS
from scaling.formats.raw import RawTable as RawTable
from scaling.formats.raw import is_empty as is_empty
from scaling.formats.raw import raise_problems as raise_problems

if TYPE_CHECKING:
    import pandas as pd

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
# One comma before exactly three digits: 3,912 is 3.912 in one country and 3912 in another.
EITHER_COMMA = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
POWER = re.compile(r"(?:(\d+\.?\d*)\s*[x\u00d7*\u00b7]\s*)?(\d{1,2})\s*(?:\^|\*\*)\s*([+-]?\d{1,2})")
# A number with what may stand behind it: 3,1 or 410 M.
LEADING_NUMBER = re.compile(r"[+-]?\d[\d.,]*([eE][+-]?\d+)?")

Kind = Literal["count", "real", "number"]


def parse_numbers(
    column: pd.Series,
    *,
    kind: Kind = "number",
    scale: float = 1.0,
    name: str = "",
    remarks: list[str] | None = None,
) -> tuple[pd.Series, dict[Any, Any]]:
    """Convert a column to float64.

    Beside numbers as programs write them (1234.5e6), it reads 2,95 or 1,200,000 where the column as a whole shows
    whether commas are decimal, and, in a column of counts, 0.41M or 7 billion.

    Args:
        column: Cells of any type.
        kind: "count" for whole numbers that may be large, such as tokens; "real" for those that are small and have
            decimals, such as a loss or a learning rate. It decides what 3,912 is where no other cell does: 3912 in
            counts, and 3.912 in reals. In a "number" that cell is a mistake.
        scale: The scale that the unit of the column will multiply by, such as 1e6 for "millions". Cells that name the
            same scale themselves (0.41M) are not multiplied twice; cells that name another one are mistakes.
        name: The column, for the remarks.
        remarks: A list to which a sentence is added for each kind of cell that was not a plain number.

    Returns:
        The numbers, NaN where a cell is empty or not a number, and the cells that are not numbers, by row.
    """
    import pandas as pd

    if column.dtype.kind in "iuf":
        return pd.Series(column.to_numpy(dtype=float, na_value=math.nan), column.index), {}
    plain = _parse_plain_text(column)
    if plain is not None:
        return plain, {}
    codes, cells = _list_different_cells(column)
    style = _find_comma_style(cells, kind, scale)
    if any(isinstance(cell, str) and DOT_GROUPS.fullmatch(cell.strip()) for cell in cells):
        style = "points"
    values, wrong, examples = [], dict[int, Any](), dict[str, str]()
    for i, cell in enumerate(cells):
        value = _parse_number(cell) if style != "points" or not isinstance(cell, str) or "." not in cell else None
        if value is None and isinstance(cell, str):
            value, way = _parse_written(cell.strip(), style, kind, scale)
            if value is not None:
                shown = int(value) if value.is_integer() and abs(value) < 1e15 else value
                examples.setdefault(way, f"{cell.strip()!r} as {shown}")
        if value is None:
            wrong[i] = cell
        values.append(math.nan if value is None else value)
    if remarks is not None:
        of = f"column {name}: " if name else ""
        remarks += [f"{of}{way}, such as {example}" for way, example in examples.items()]
    numbers = np.array([*values, math.nan])[codes]
    if not wrong:
        return pd.Series(numbers, column.index), {}
    rows = np.flatnonzero(np.isin(codes, list(wrong)))
    labels = column.index[rows].tolist()
    return pd.Series(numbers, column.index), {
        label: wrong[code] for label, code in zip(labels, codes[rows].tolist(), strict=True)
    }


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
        lines.append(f"row {row}, column {column}: needed {needed}, got {got}{_suggest_writing(cell)}")
    if len(wrong) > MAX_LISTED:
        lines.append(f"column {column}: {len(wrong) - MAX_LISTED} more rows like these")
    return lines


def _parse_plain_text(column: pd.Series) -> pd.Series | None:
    """Convert a column whose cells are all plain numbers as text, or missing; None if there is anything else."""
    import pandas as pd

    if pd.api.types.infer_dtype(column, skipna=True) != "string":
        return None
    if isinstance(column.dtype, pd.StringDtype):
        import pyarrow as pa

        try:
            plain = pa.array(column, from_pandas=True).cast(pa.float64())
            return pd.Series(plain.to_numpy(zero_copy_only=False), column.index)
        # Python reads some forms that Arrow does not, such as +3.
        except pa.ArrowInvalid:
            pass
    cells = column.to_numpy(dtype=object, na_value=math.nan)
    try:
        values = cells.astype(float)
    # TypeError: pandas' NA.
    except (ValueError, TypeError, OverflowError):
        return None
    # Python reads 1_000; here it is a number that somebody wrote, like 1,000.
    if any("_" in cell for cell in cells if isinstance(cell, str)):
        return None
    return pd.Series(values, column.index)


def _list_different_cells(column: pd.Series) -> tuple[np.ndarray[Any, Any], list[Any]]:
    """Return the number of each row's cell, -1 where there is none, and the cells; equal texts are listed once."""
    import pandas as pd

    # Other cells may be equal and not the same, such as 1 and True, or have no hash.
    if pd.api.types.infer_dtype(column, skipna=True) != "string":
        return np.arange(len(column)), column.tolist()
    codes, cells = pd.factorize(column)
    return codes, list(cells)


def _find_comma_style(cells: Iterable[Any], kind: Kind, scale: float) -> str:
    """Return what a comma is in a column: "decimal", "groups", or "" where the cells do not tell or disagree."""
    is_decimal = is_groups = is_either = is_whole = False
    for cell in cells:
        if not isinstance(cell, str):
            is_groups |= isinstance(cell, float) and not cell.is_integer()
            continue
        match = LEADING_NUMBER.match(cell.strip())
        number = match[0] if match else ""
        if "," not in number:
            is_groups |= bool(re.fullmatch(r"[+-]?\d*\.\d+([eE].*)?", number))
            is_whole |= bool(re.fullmatch(r"\d{2,}", number))
        elif EITHER_COMMA.fullmatch(number):
            is_either = True
        elif COMMA_GROUPS.fullmatch(number) and not re.fullmatch(r"[+-]?0,\d*", number):
            is_groups = True
        elif DECIMAL_COMMA.fullmatch(number):
            is_decimal = True
    if is_decimal != is_groups:
        return "decimal" if is_decimal else "groups"
    if is_decimal or not is_either:
        return ""
    if kind == "real":
        # 987 beside 1,234 may be a perplexity.
        return "" if is_whole else "decimal"
    return "groups" if kind == "count" and scale == 1.0 else ""


def _parse_written(text: str, style: str, kind: Kind, scale: float) -> tuple[float | None, str]:
    """Return a number that is not plain text, and a phrase on how it was read; (None, "") if it is none."""
    if PLAIN_GROUPS.fullmatch(text):
        return float(re.sub(r"[^\d.+-]", "", text)), "thousands separators left out"
    if style == "points" and re.fullmatch(r"[+-]?\d{1,3}(\.\d{3})+", text):
        return float(text.replace(".", "")), "thousands separators left out"
    if "\u2212" in text and NUMBER_PATTERN.fullmatch(plain := text.replace("\u2212", "-")):
        return float(plain), "minus signs read"
    if match := POWER.fullmatch(text):
        return float(match[1] or 1) * float(match[2]) ** int(match[3]), "powers read"
    way = ""
    number = LEADING_NUMBER.match(text)
    if number and "," in number[0] and style in ("decimal", "groups"):
        pattern = DECIMAL_COMMA if style == "decimal" else COMMA_GROUPS
        if not pattern.fullmatch(number[0]):
            return None, ""
        plain = number[0].replace(".", "").replace(",", ".") if style == "decimal" else number[0].replace(",", "")
        way = "decimal commas read as points" if style == "decimal" else "thousands separators left out"
        text = plain + text[number.end() :]
        if NUMBER_PATTERN.fullmatch(text):
            return float(text), way
    # The same file cannot use the comma and the point for decimals.
    elif style == "decimal" and number and "." in number[0]:
        return None, ""
    if kind == "count" and (split := split_count(text)):
        value, own = split
        if own == 1.0 or scale == 1.0:
            return value * own, "counts with letters or words read"
        if own == scale:
            return value, "cells name its unit themselves"
    return None, ""


def _suggest_writing(cell: Any) -> str:
    """Return the end of a message about a cell that is nearly a number: how to write it. Empty for other cells."""
    if not isinstance(cell, str):
        return ""
    text = cell.strip()
    if EITHER_COMMA.fullmatch(text):
        return (
            f": a decimal comma? write {text.replace(',', '.')}; a thousands separator? write {text.replace(',', '')}"
        )
    if PLAIN_GROUPS.fullmatch(text) or COMMA_GROUPS.fullmatch(text):
        return ": write it without thousands separators"
    if DECIMAL_COMMA.fullmatch(text) and any(c.isdigit() for c in text):
        return f": a decimal comma? write {text.replace('.', '').replace(',', '.')}"
    split = split_count(text)
    if split and split[1] in SCALES.values():
        return f": write {split[0] * split[1]:.15g}"
    return ""


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
