"""Tables as others write them (CSV, parquet, JSON lines, a JSON list) as a DataFrame of plain cells, nothing interpreted.

Nested values become columns with dotted names: {"config": {"lr": {"value": 0.1}}} is `config.lr`. A file that cannot be read
as a table is refused with a ValueError that names its rows.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.runs.cells import SHOWN, as_numbers, empty, refuse

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet", ".jsonl", ".json")
NESTED = (
    "config",
    "summary",
    "summary_metrics",
    "summaryMetrics",
    "json_config",
)  # of W&B: may be dicts printed as text
BARE = re.compile(r"(?<=[:\[,(] )(nan|inf|-inf)(?=[,}\])])")  # in a printed dict, which has no such constants


def read_table(path: Path) -> pd.DataFrame:
    """All cells of a .csv (as text), .parquet, .jsonl or .json file; rows are numbered from 0."""
    import pandas as pd

    readers: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        ".csv": _csv,
        ".parquet": _parquet,
        ".jsonl": _json_lines,
        ".json": _json_list,
    }
    if path.suffix not in readers:
        raise ValueError(f"needed a table of runs ({', '.join(SUFFIXES)}), got {path.name}")
    if not path.is_file():
        raise ValueError(f"needed a table of runs, got {path}: no such file")
    try:
        rows = readers[path.suffix](path)
        problems: list[str] = []
        flat = []
        for i, row in enumerate(rows):
            cells: dict[str, Any] = {}
            for name, cell in _leaves(row):
                if name in cells:
                    problems.append(f"row {i}: two values for {name}")
                cells[name] = cell
            flat.append(cells)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: needed UTF-8 text, {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: a value is nested too deeply") from error
    refuse(problems, str(path))
    names = list(dict.fromkeys(name for row in flat for name in row))
    return pd.DataFrame({name: pd.Series([row.get(name) for row in flat], dtype=object) for name in names})


def typed(raw: pd.DataFrame, *, but: Collection[str]) -> pd.DataFrame:
    """Columns of text that hold only numbers as float64, except those named in `but`."""
    table = raw.copy()
    for name in table.columns:
        if name not in but:
            column, wrong = as_numbers(table[name])
            if not wrong:
                table[name] = column
    return table


def _csv(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [cells for cells in csv.reader(file) if cells]
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    if not lines:
        return []
    header = [name.strip() for name in lines[0]]
    if header[0] == "":
        header[0] = "index"  # as pandas writes it
    problems = [f"column {name or '(no name)'} appears twice" for name in _repeated(header)]
    ragged = [(row, len(cells)) for row, cells in enumerate(lines[1:]) if len(cells) != len(header)]
    for row, found in ragged[:SHOWN]:
        why = ": a separator of thousands, or a comma in a text without quotes?" if found > len(header) else ""
        problems.append(f"row {row}: needed {len(header)} cells, got {found}{why}")
    if len(ragged) > SHOWN:
        problems.append(f"{len(ragged) - SHOWN} more rows like these")
    refuse(problems, str(path))
    return [dict(zip(header, (c if c.strip() else None for c in cells), strict=True)) for cells in lines[1:]]


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except Exception as error:  # of Arrow, or what pandas' own notes in the file lead to
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    table.columns = pd.Index([str(name) for name in table.columns])
    refuse([f"column {name} appears twice" for name in _repeated(list(table.columns))], str(path))
    return [{str(k): None if empty(v) else v for k, v in row.items()} for row in table.to_dict("records")]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    problems = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _parse(line)
            except ValueError as error:
                problems.append(f"line {number}: not JSON ({error})")
                continue
            if not isinstance(row, dict):
                problems.append(f"line {number}: needed an object {{...}}, got {line.strip()[:40]}")
                continue
            rows.append(row)
    more = [f"{len(problems) - SHOWN} more lines like these"] if len(problems) > SHOWN else []
    refuse(problems[:SHOWN] + more, str(path))
    return rows


def _json_list(path: Path) -> list[dict[str, Any]]:
    try:
        rows = _parse(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} cannot be read: needed a list of runs [{{...}}, ...], got {type(rows).__name__}")
    wrong = [
        f"row {i}: needed an object {{...}}, got {str(r)[:40]}" for i, r in enumerate(rows) if not isinstance(r, dict)
    ]
    refuse(wrong[:SHOWN], str(path))
    return rows


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=str)  # NaN stays a text, so that it differs from a missing value


def _leaves(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every value that is not itself a dict."""
    for key, cell in row.items():
        name = prefix + str(key)
        if not prefix and name in NESTED and isinstance(cell, str) and cell.lstrip().startswith("{"):
            cell = _printed(cell)
        if isinstance(cell, dict) and "value" in cell and set(cell) <= {"value", "desc"}:
            cell = cell["value"]  # of W&B's config
        if isinstance(cell, dict):
            yield from _leaves(cell, f"{name}.")
        else:
            yield name, cell


def _printed(text: str) -> Any:
    """A dict written as JSON or as Python prints it; the text itself when it is neither."""
    try:
        return _parse(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(BARE.sub(r"'\1'", text))
    except (ValueError, SyntaxError, MemoryError):
        return text


def _repeated(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
