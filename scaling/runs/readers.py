"""Read a table from CSV, parquet, JSON lines or a JSON list as a DataFrame of plain cells, without interpreting them.

Nested values become columns with dotted names: {"config": {"lr": {"value": 0.1}}} is `config.lr`. A file that cannot be
read as a table raises a ValueError that names the rows.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.runs.cells import MAX_LISTED, is_empty, parse_numbers, raise_problems

if TYPE_CHECKING:
    import pandas as pd

TABLE_SUFFIXES = (".csv", ".parquet", ".jsonl", ".json")
# Columns of Weights & Biases that may hold dicts printed as text.
NESTED_COLUMNS = ("config", "summary", "summary_metrics", "summaryMetrics", "json_config")
# In a printed dict these constants are not valid Python.
BARE_CONSTANT = re.compile(r"(?<=[:\[,(] )(nan|inf|-inf)(?=[,}\])])")


def read_table(path: Path) -> pd.DataFrame:
    """Read all cells of a table.

    Args:
        path: A .csv, .parquet, .jsonl or .json file.

    Returns:
        The cells as objects (those of a CSV file as text), None where empty. Rows are numbered from 0.

    Raises:
        ValueError: If the file does not exist or cannot be read as a table.
    """
    import pandas as pd

    readers: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".jsonl": _read_json_lines,
        ".json": _read_json_list,
    }
    if path.suffix not in readers:
        raise ValueError(f"needed a table of runs ({', '.join(TABLE_SUFFIXES)}), got {path.name}")
    if not path.is_file():
        raise ValueError(f"needed a table of runs, got {path}: no such file")
    try:
        rows = readers[path.suffix](path)
        problems: list[str] = []
        flat = []
        for i, row in enumerate(rows):
            cells: dict[str, Any] = {}
            for name, cell in _iterate_leaves(row):
                if name in cells:
                    problems.append(f"row {i}: two values for {name}")
                cells[name] = cell
            flat.append(cells)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: needed UTF-8 text, {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: a value is nested too deeply") from error
    raise_problems(problems, str(path))
    names = list(dict.fromkeys(name for row in flat for name in row))
    return pd.DataFrame({name: pd.Series([row.get(name) for row in flat], dtype=object) for name in names})


def convert_numeric_columns(raw: pd.DataFrame, *, but: Collection[str]) -> pd.DataFrame:
    """Return a copy whose columns that hold only numbers are float64, except the columns named in `but`."""
    table = raw.copy()
    for name in table.columns:
        if name not in but:
            column, wrong = parse_numbers(table[name])
            if not wrong:
                table[name] = column
    return table


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [cells for cells in csv.reader(file) if cells]
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    if not lines:
        return []
    header = [name.strip() for name in lines[0]]
    if header[0] == "":
        # pandas writes the index under an empty name.
        header[0] = "index"
    problems = [f"column {name or '(no name)'} appears twice" for name in _find_repeated(header)]
    ragged = [(row, len(cells)) for row, cells in enumerate(lines[1:]) if len(cells) != len(header)]
    for row, count in ragged[:MAX_LISTED]:
        why = ": a thousands separator, or a comma in a text without quotes?" if count > len(header) else ""
        problems.append(f"row {row}: needed {len(header)} cells, got {count}{why}")
    if len(ragged) > MAX_LISTED:
        problems.append(f"{len(ragged) - MAX_LISTED} more rows like these")
    raise_problems(problems, str(path))
    return [dict(zip(header, (c if c.strip() else None for c in cells), strict=True)) for cells in lines[1:]]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    # The error may come from Arrow, or from the metadata that pandas keeps in the file.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    table.columns = pd.Index([str(name) for name in table.columns])
    raise_problems([f"column {name} appears twice" for name in _find_repeated(list(table.columns))], str(path))
    return [{str(k): None if is_empty(v) else v for k, v in row.items()} for row in table.to_dict("records")]


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    problems = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _parse_json(line)
            except ValueError as error:
                problems.append(f"line {number}: not JSON ({error})")
                continue
            if not isinstance(row, dict):
                problems.append(f"line {number}: needed an object {{...}}, got {line.strip()[:40]}")
                continue
            rows.append(row)
    more = [f"{len(problems) - MAX_LISTED} more lines like these"] if len(problems) > MAX_LISTED else []
    raise_problems(problems[:MAX_LISTED] + more, str(path))
    return rows


def _read_json_list(path: Path) -> list[dict[str, Any]]:
    try:
        rows = _parse_json(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} cannot be read: needed a list of runs [{{...}}, ...], got {type(rows).__name__}")
    wrong = [
        f"row {i}: needed an object {{...}}, got {str(r)[:40]}" for i, r in enumerate(rows) if not isinstance(r, dict)
    ]
    raise_problems(wrong[:MAX_LISTED], str(path))
    return rows


def _parse_json(text: str) -> Any:
    # NaN stays text, so that it differs from a missing value.
    return json.loads(text, parse_constant=str)


def _iterate_leaves(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for every value of a nested dict that is not itself a dict."""
    for key, cell in row.items():
        name = prefix + str(key)
        if not prefix and name in NESTED_COLUMNS and isinstance(cell, str) and cell.lstrip().startswith("{"):
            cell = _parse_printed_dict(cell)
        if isinstance(cell, dict) and "value" in cell and set(cell) <= {"value", "desc"}:
            # The configuration of Weights & Biases wraps each value.
            cell = cell["value"]
        if isinstance(cell, dict):
            yield from _iterate_leaves(cell, f"{name}.")
        else:
            yield name, cell


def _parse_printed_dict(text: str) -> Any:
    """Return a dict that was written as JSON or as Python prints it, or the text itself if it is neither."""
    try:
        return _parse_json(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(BARE_CONSTANT.sub(r"'\1'", text))
    except (ValueError, SyntaxError, MemoryError):
        return text


def _find_repeated(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
