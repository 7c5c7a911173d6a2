"""Read JSON and JSON lines in any shape that holds a table: all orientations of pandas, one object, a list under a key.

Nested values become columns with dotted names, dicts that were printed into a text included.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.formats.raw import RawTable, decode_text, find_repeated, list_first, raise_problems

if TYPE_CHECKING:
    import pandas as pd

# Columns of Weights & Biases that may hold dicts printed as text.
NESTED_COLUMNS = ("config", "summary", "summary_metrics", "summaryMetrics", "json_config")
# In a printed dict these constants are not valid Python.
BARE_CONSTANT = re.compile(r"(?<=[:\[,(] )(nan|inf|-inf)(?=[,}\])])")
PRINTED_DICT = re.compile(r"\s*\{.*:.*\}\s*", re.DOTALL)
# Bytes of JSON lines from which a faster reader is tried.
LARGE = 1 << 20
# Cells of a column of text that are looked at to find printed dicts.
FIRST_CELLS = 20
# Names of a list of the steps at which the losses beside it were logged.
STEPS_NAME = re.compile(r"(global_|train_)?(steps?|iters?|iterations?|tokens(_seen)?)", re.IGNORECASE)
# Lists of at most so many values may be settings of a run, such as the betas of its optimizer.
MOST_SETTINGS = 8
# Prefixes of settings that Ray joins by slashes.
SLASHED_PREFIXES = ("config/",)


def read_json(data: bytes, path: Path, *, lines_first: bool) -> RawTable:
    """Read JSON, or JSON lines.

    Args:
        data: The file, in any encoding.
        path: Its path, for error messages and for the name of a run.
        lines_first: Whether one object per line is expected.

    Returns:
        The cells. NaN stays text, so that it differs from a missing value.

    Raises:
        ValueError: If the text is not JSON, or holds no table.
    """
    data, remarks = decode_text(data, str(path))
    cells = _read_flat_lines(data) if lines_first and len(data) > LARGE else None
    if cells is not None:
        return RawTable(cells, remarks)
    text = data.decode("utf-8", "replace")
    problems: list[str] = []
    if lines_first:
        cells = flatten_rows(_iterate_lines(text, problems), str(path))
        if len(cells) > 1 and len(problems) == 1 and not text.endswith("\n") and _is_cut(text):
            remarks.append("not read: the last line, which is cut off")
            problems.clear()
        if len(cells) > 1 and not problems:
            return RawTable(cells, remarks)
    try:
        document = parse_json(text)
    except ValueError as error:
        document, kind = _parse_sequence(text), "one object after the other (JSON lines)"
        if document is None:
            document, kind = _parse_python(text), "values as Python prints them"
        if document is None:
            if not lines_first:
                read = sum(1 for _ in _iterate_lines(text, problems))
                # More broken lines than objects: the text is one document that is broken.
                if len(problems) > read:
                    raise ValueError(f"{path} cannot be read as JSON: {error}") from error
            raise_problems(list_first(problems, "lines"), str(path))
            raise ValueError(f"{path} cannot be used: no rows") from error
        remarks.append(f"the file holds {kind}")
    if lines_first and not isinstance(document, dict | list):
        raise_problems(list_first(problems, "lines"), str(path))
    raw = read_document(document, path)
    raw.remarks[:0] = remarks
    return raw


def read_document(document: Any, path: Path) -> RawTable:
    """Return the table that a parsed JSON document holds.

    Raises:
        ValueError: If it holds none.
    """
    from scaling.formats.histories import read_trainer_state

    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        return read_trainer_state(document, path)
    rows, remarks = _find_rows(document, path)
    if not rows:
        raise ValueError(f"{path} cannot be used: no rows")
    wrong = [
        f"row {i}: needed an object {{...}}, got {str(r)[:40]}" for i, r in enumerate(rows) if not isinstance(r, dict)
    ]
    raise_problems(list_first(wrong, "rows"), str(path))
    if (points := _expand_curves(rows)) is not None:
        how = "by step, read with one row per step" if len(points) > len(rows) else "without steps, read at their ends"
        remarks.append(f"the losses are lists {how}")
        rows = points
    return RawTable(flatten_rows(rows, str(path)), remarks)


def parse_json(text: str) -> Any:
    """Parse JSON; NaN and Infinity become text."""
    return json.loads(text, parse_constant=str)


def flatten_rows(rows: Iterable[Mapping[str, Any]], origin: str) -> pd.DataFrame:
    """Return the cells of nested rows, under dotted names.

    Raises:
        ValueError: If a row has two values of one dotted name.
    """
    import pandas as pd

    problems: list[str] = []
    columns: dict[str, list[Any]] = {}
    count = 0
    for i, row in enumerate(rows):
        seen = 0
        for name, cell in iterate_leaves(row):
            column = columns.get(name)
            if column is None:
                column = columns[name] = [None] * i
            if len(column) > i:
                problems.append(f"row {i}: two values for {name}")
                continue
            column.append(cell)
            seen += 1
        count = i + 1
        if seen < len(columns):
            for column in columns.values():
                if len(column) == i:
                    column.append(None)
    raise_problems(list_first(problems, "rows"), origin)
    return pd.DataFrame({name: pd.Series(c, dtype=object) for name, c in columns.items()}, index=range(count))


def expand_columns(table: pd.DataFrame, origin: str) -> pd.DataFrame:
    """Return a table whose cells that hold dicts, or texts of printed dicts, are columns with dotted names."""
    names = [str(name) for name in table.columns if _is_nested(table[name], str(name))]
    if not names:
        return table
    inner = flatten_rows(({name: row[name] for name in names} for row in table[names].to_dict("records")), origin)
    plain = table.drop(columns=names)
    repeated = find_repeated([*map(str, plain.columns), *inner.columns])
    raise_problems([f"two columns {name}" for name in repeated], origin)
    inner.index = plain.index
    # In the order of the source.
    order = list[str]()
    for name in map(str, table.columns):
        order += [name] if name not in names else [c for c in inner.columns if c == name or c.startswith(f"{name}.")]
    joined = plain.join(inner)
    return joined[[*order, *(c for c in joined.columns if c not in order)]]


def iterate_leaves(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for every value of a nested dict that is not itself a dict.

    A text that is a printed dict is opened.
    """
    for key, cell in row.items():
        name = prefix + str(key)
        if not prefix and name.startswith(SLASHED_PREFIXES):
            name = name.replace("/", ".")
        cell = _open_printed_dict(cell)
        if isinstance(cell, dict) and "value" in cell and set(cell) <= {"value", "desc"}:
            # The configuration of Weights & Biases wraps each value.
            cell = _open_printed_dict(cell["value"])
        if isinstance(cell, dict):
            yield from iterate_leaves(cell, f"{name}.")
        else:
            yield name, cell


def _open_printed_dict(cell: Any) -> Any:
    """Return the dict that a text holds as JSON or as Python prints it, or the cell itself if it is neither."""
    if not isinstance(cell, str) or "{" not in cell[:9] or not PRINTED_DICT.fullmatch(cell):
        return cell
    try:
        opened = parse_json(cell)
    except ValueError:
        try:
            opened = ast.literal_eval(BARE_CONSTANT.sub(r"'\1'", cell.strip()))
        except (ValueError, SyntaxError, MemoryError, TypeError):
            return cell
    return opened if isinstance(opened, dict) else cell


def _is_nested(column: pd.Series, name: str) -> bool:
    """Return whether any cell of a column holds a dict, or one of the first cells a printed dict."""
    if column.dtype.kind in "iufbMm":
        return False
    if name.startswith(SLASHED_PREFIXES):
        return True
    if column.dtype == object and any(isinstance(cell, dict) for cell in column):
        return True
    first = column.dropna().head(FIRST_CELLS)
    return any(isinstance(_open_printed_dict(cell), dict) for cell in first)


def _iterate_lines(text: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON lines, and add the lines that hold none to `problems`."""
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.append(f"line {number}: not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield row
        else:
            problems.append(f"line {number}: needed an object {{...}}, got {line.strip()[:40]}")


def _read_flat_lines(data: bytes) -> pd.DataFrame | None:
    """Return the cells of many JSON lines, read by pyarrow; None if `flatten_rows` would read them differently.

    That is so for nested objects, NaN, values of several types in one column, and texts that look like dates.
    """
    import pyarrow as pa
    from pyarrow import json as arrow_json

    # Arrow cannot tell these from missing values.
    if b"NaN" in data or b"Infinity" in data:
        return None
    try:
        read_options = arrow_json.ReadOptions(use_threads=False, block_size=1 << 24)
        table = arrow_json.read_json(pa.BufferReader(pa.py_buffer(data)), read_options=read_options)
    except pa.ArrowInvalid:
        return None
    if not all(kind in (pa.int64(), pa.float64(), pa.string(), pa.bool_()) for kind in table.schema.types):
        return None
    # Braces within a text may be a printed dict.
    if data.count(b"{") > table.num_rows or table.num_rows < 2:
        return None
    cells: pd.DataFrame = table.to_pandas(integer_object_nulls=True)
    return cells


def _is_cut(text: str) -> bool:
    """Return whether the last line of JSON lines begins an object that does not end, as while a program writes it."""
    last = text.rsplit("\n", 1)[-1]
    try:
        parse_json(last)
    except json.JSONDecodeError:
        return last.lstrip().startswith("{") and not last.rstrip().endswith("}")
    return False


def _parse_sequence(text: str) -> list[Any] | None:
    """Return the objects of a text that holds one after the other, on any number of lines; None if it does not."""
    decoder = json.JSONDecoder(parse_constant=str)
    documents, position = [], 0
    while position < len(text):
        if text[position] in " \t\r\n,":
            position += 1
            continue
        try:
            document, position = decoder.raw_decode(text, position)
        except ValueError:
            return None
        documents.append(document)
    return documents if documents and all(isinstance(d, dict) for d in documents) else None


def _parse_python(text: str) -> Any:
    """Return a list or dict that Python printed, on one line or on several; None if the text is none."""
    text = text.strip()
    if not text.startswith(("[", "{")):
        return None
    # One dict per line.
    for written in (text, f"[{','.join(line for line in text.splitlines() if line.strip())}]"):
        try:
            document = ast.literal_eval(BARE_CONSTANT.sub(r"'\1'", written))
        except (ValueError, SyntaxError, MemoryError, TypeError):
            continue
        if isinstance(document, list | dict):
            return document
    return None


def _find_rows(document: Any, path: Path) -> tuple[list[Any], list[str]]:
    """Return the rows of a document, and remarks on how they were found.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(document, list):
        return _read_list(document, path), []
    if not isinstance(document, dict):
        raise ValueError(
            f"{path} cannot be read: needed a list of runs [{{...}}, ...] or an object, got {type(document).__name__}"
        )
    if found := _read_split(document) or _read_columns(document) or _read_objects(document):
        rows, orientation = found
        return rows, [f"the file is read as {orientation}"]
    if nested := [key for key, value in document.items() if _is_list_of_objects(value)]:
        if len(nested) > 1:
            raise ValueError(
                f"{path} cannot be read: the lists {', '.join(nested)} hold objects: write the one with the runs as a "
                "file of its own, [{...}, ...]"
            )
        # What stands beside the list holds for all its rows.
        beside = {k: v for k, v in document.items() if not isinstance(v, list)}
        return [beside | row for row in document[nested[0]]], [f"the rows are the list {nested[0]!r}"]
    (key, value), *others = document.items() if document else [("", None)]
    if not others and isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
        rows, remarks = _find_rows(value, path)
        return rows, [f"the rows stand under {key!r}", *remarks]
    return ([document], []) if document else ([], [])


def _read_list(document: list[Any], path: Path) -> list[Any]:
    """Return the rows of a list: objects, or lists of which the first holds the names."""
    if not document or not all(isinstance(row, list) for row in document):
        return document
    names, *rows = document
    if names and all(isinstance(name, str) for name in names) and all(len(row) == len(names) for row in rows):
        return [dict(zip(names, row, strict=True)) for row in rows]
    # TensorBoard writes a curve as [[wall time, step, value], ...].
    if path.name.startswith("run-") and "-tag-" in path.name and all(len(row) == 3 for row in document):
        return [dict(zip(("Wall time", "Step", "Value"), row, strict=True)) for row in document]
    raise ValueError(
        f"{path} cannot be read: the rows are lists without names of columns (pandas' orient='values'). Write the "
        "table with orient='records', or put a list of the names first"
    )


def _read_split(document: Mapping[str, Any]) -> tuple[list[Any], str] | None:
    """Return the rows of {"columns": [...], "data": [[...], ...]}, or of {"schema": ..., "data": [{...}, ...]}."""
    names, data = document.get("columns"), document.get("data")
    if not isinstance(data, list) or not data:
        return None
    if isinstance(names, list) and all(isinstance(row, list) and len(row) == len(names) for row in data):
        rows = [dict(zip(map(str, names), row, strict=True)) for row in data]
        return rows, "names and data (orient='split')"
    schema = document.get("schema")
    if isinstance(schema, dict) and _is_list_of_objects(data):
        unnamed = {"index"} if schema.get("primaryKey") == ["index"] else set()
        return [{k: v for k, v in row.items() if k not in unnamed} for row in data], "a table with a schema"
    return None


def _read_columns(document: Mapping[str, Any]) -> tuple[list[Any], str] | None:
    """Return the rows of {"N": [...], "loss": [...]}; single values beside the lists hold for all rows."""
    lists = [v for v in document.values() if isinstance(v, list)]
    if not lists or any(isinstance(v, dict) for v in document.values()) or len({len(v) for v in lists}) != 1:
        return None
    # Short lists beside single values may be settings of one run, such as the betas of its optimizer.
    if len(lists) < len(document) and (len(lists) < 2 or len(lists[0]) <= 3):
        return None
    if any(isinstance(cell, dict | list) for values in lists for cell in values):
        return None
    rows = [{k: v[i] if isinstance(v, list) else v for k, v in document.items()} for i in range(len(lists[0]))]
    return rows, "one list per column"


def _read_objects(document: Mapping[str, Any]) -> tuple[list[Any], str] | None:
    """Return the rows of {"N": {"0": ...}, "loss": {"0": ...}} or of {"run-1": {"N": ..., "loss": ...}}."""
    values = list(document.values())
    if not values or not all(isinstance(v, dict) and v for v in values) or set(document) <= set(NESTED_COLUMNS):
        return None
    keys = [set(map(str, v)) for v in values]
    shared = set.intersection(*keys)
    # {"lr": {"value": 0.1}} is the configuration of one run of Weights & Biases.
    if not shared or shared <= {"value", "desc"}:
        return None
    is_numbered = all(key.isdecimal() for key in document)
    inner_is_numbered = all(key.isdecimal() for key in keys[0])
    if not is_numbered and (inner_is_numbered or (_names_a_loss(document) and not _names_a_loss(keys[0]))):
        index = list(dict.fromkeys(key for v in values for key in v))
        rows = [{name: column.get(i) for name, column in document.items()} for i in index]
        rows = rows if inner_is_numbered else [{"run_id": i, **row} for i, row in zip(index, rows, strict=True)]
        return rows, "one object per column (orient='columns')"
    if len(document) == 1 and not is_numbered and not _names_a_loss(keys[0]):
        return None
    rows = values if is_numbered else [{"run_id": key, **row} for key, row in document.items()]
    return rows, "one object per run (orient='index')"


def _expand_curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return one row per step of runs whose losses are lists; None if no run has such lists."""
    curves = [_read_curves(row) for row in rows]
    if not any(curves):
        return None
    expanded = list[dict[str, Any]]()
    for i, (row, points) in enumerate(zip(rows, curves, strict=True)):
        name = {"run_id": f"run-{i}"} if len(rows) > 1 and "run_id" not in row else {}
        expanded += [{**name, **point} for point in points or [dict(row)]]
    return expanded


def _read_curves(run: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return one row per step of a run whose losses are [[step, loss], ...], or lists beside one of the steps.

    Losses without steps, as one per epoch, become one row with the last of each. None if there are no such lists, or if
    the run also has its last loss as a number.
    """
    lists = {k: v for k, v in run.items() if isinstance(v, list) and v}
    if not _names_a_loss(lists) or any(
        _names_a_loss([k]) and isinstance(v, int | float) and not re.search(r"best|min", k) for k, v in run.items()
    ):
        return None
    rest = {k: v for k, v in run.items() if k not in lists or len(v) <= MOST_SETTINGS}
    pairs = {k: v for k, v in lists.items() if all(_is_numbers(point) and len(point) == 2 for point in v)}
    if _names_a_loss(pairs):
        by_step: dict[float, dict[str, Any]] = {}
        for name, curve in pairs.items():
            for step, value in curve:
                by_step.setdefault(step, {})[name] = value
        fixed = {k: v for k, v in rest.items() if k not in pairs}
        return [{**fixed, "step": step, **by_step[step]} for step in sorted(by_step)]
    axis = next((k for k, v in lists.items() if STEPS_NAME.fullmatch(k) and _is_numbers(v)), None)
    series = {k: v for k, v in lists.items() if axis and len(v) == len(lists[axis])}
    if not _names_a_loss(series):
        ends = {k: v[-1] for k, v in lists.items() if _names_a_loss([k]) and _is_numbers(v)}
        return [{k: v for k, v in rest.items() if k not in ends} | ends] if ends else None
    fixed = {k: v for k, v in rest.items() if k not in series}
    return [{**fixed, **dict(zip(series, point, strict=True))} for point in zip(*series.values(), strict=True)]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, int | float) for v in value)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(row, dict) for row in value)


def _names_a_loss(names: Iterable[str]) -> bool:
    return any(re.search(r"loss|ppl|perplexity|bpb|nll", name, re.IGNORECASE) for name in names)
