"""Read tables of text with any separator: CSV, TSV, columns of spaces, and tables of Markdown.

A clean file is read by pyarrow. What it refuses, and what needs a closer look, such as comments between the rows, is
read by Python's csv module, which can also say what is wrong with which row.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scaling.formats.raw import (
    DECIMAL_COMMA,
    SAMPLE,
    RawTable,
    decode_text,
    find_repeated,
    format_number,
    is_empty,
    is_number,
    list_first,
    raise_problems,
)

if TYPE_CHECKING:
    import pandas as pd

SEPARATORS = (",", ";", "\t", "|", "&")
SEPARATOR_NAMES = {
    ",": "commas",
    ";": "semicolons",
    "\t": "tabs",
    "|": "bars",
    "&": "ampersands",
    " ": "spaces",
    "  ": "spaces",
}
EXPECTED = {".csv": ",", ".tsv": "\t", ".tab": "\t", ".psv": "|"}
# Excel writes the separator into the first line.
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[;,\s]*', re.IGNORECASE)
# A column called "#" numbers the rows.
COMMENT = re.compile(r"^ *(?:#(?! *[,;\t|])|%).*\n?", re.MULTILINE)
# The lines between the rows in Markdown, in tables that are drawn, and in LaTeX.
RULE = re.compile(r"\s*([|:+=\s-]*[-=]{2}[|:+=\s-]*|\|?\s*:?-:?\s*(\|\s*:?-+:?\s*)+\|?|\\[a-z]+(\{.*\})*)\s*")
LINES = str.maketrans(dict.fromkeys("│┃║", "|") | dict.fromkeys("─━═", "-"))
CORNERS = re.compile("[┌-╋╒-╬╴-╿]")
# Rows above the header that may be a title.
MAX_TITLES = 30
# Words of a row of units, and the unit of the importer for those that change a value.
UNITS: dict[str, str] = {
    **dict.fromkeys(("k", "thousand", "thousands", "1e3", "10^3"), "thousands"),
    **dict.fromkeys(("m", "million", "millions", "1e6", "10^6", "mparams", "mtokens"), "millions"),
    **dict.fromkeys(("b", "bn", "g", "billion", "billions", "1e9", "10^9", "gtokens", "btokens"), "billions"),
    **dict.fromkeys(("t", "trillion", "trillions", "1e12", "10^12"), "trillions"),
    **dict.fromkeys(("step", "steps", "iterations", "updates"), "steps"),
    **dict.fromkeys(("sequence", "sequences", "seqs", "samples"), "sequences"),
    **dict.fromkeys(("bit", "bits", "bits/token", "bits per token"), "bits"),
    **dict.fromkeys(("ppl", "perplexity"), "perplexity"),
    **dict.fromkeys(("bpb", "bits/byte", "bits per byte"), "bits-per-byte"),
    **dict.fromkeys(("min", "minutes"), "minutes"),
    **dict.fromkeys(("h", "hr", "hours"), "hours"),
    **dict.fromkeys(
        ("nat", "nats", "nats/token", "nats per token", "token", "tokens", "tok", "params", "parameters"), ""
    ),
    **dict.fromkeys(("count", "s", "sec", "seconds", "1", "-", "", "flop", "flops", "id", "name", "text", "none"), ""),
}


@dataclass
class _Layout:
    """Where the table of a text begins and how its cells are separated.

    Attributes:
        separator: One character, " " for any number of spaces, or "  " for at least two.
        header: The names of the columns, as they stand.
        first_row: The number of the line, from 0, on which the first row begins.
        skipped: The title lines above the header.
        units: The unit of each column that has one, from a row under the header.
    """

    separator: str
    header: list[str]
    first_row: int
    skipped: list[str] = field(default_factory=list)
    units: dict[int, str] = field(default_factory=dict)


def read_delimited(data: bytes, origin: str, suffix: str = ".csv") -> RawTable:
    """Read a table of text.

    Args:
        data: The file, in any encoding.
        origin: The file's name, for error messages.
        suffix: The file's suffix, which decides between separators that fit equally well.

    Returns:
        The cells as text, None or NaN where empty, and remarks on everything that is not plain CSV.

    Raises:
        ValueError: If the text is no table. The message names the rows.
    """
    data, remarks = decode_text(data, origin)
    if any(bar.encode() in data[:SAMPLE] for bar in "│┃║"):
        # rich and databases draw tables with lines.
        data = CORNERS.sub("+", data.decode("utf-8", "replace").translate(LINES)).encode()
    sample = data[:SAMPLE] if len(data) <= SAMPLE else data[: max(data.rfind(b"\n", 0, SAMPLE), 0) or SAMPLE]
    lines = list(io.StringIO(sample.decode("utf-8", "replace"), newline=""))
    try:
        layout = _find_layout(lines, suffix)
    except csv.Error as error:
        raise ValueError(f"{origin} cannot be read as CSV: {error}") from error
    if layout is None:
        raise ValueError(f"{origin} cannot be used: the file has no rows")
    numbers = [name for name in layout.header if is_number(name)]
    if numbers and len(numbers) == sum(bool(name.strip()) for name in layout.header):
        raise ValueError(
            f"{origin} cannot be used: needed the names of the columns in the first line, got numbers "
            f"({', '.join(numbers[:4])}): write a line such as N,D,loss above them"
        )
    if layout.skipped:
        count = format_number(len(layout.skipped), "line")
        remarks.append(f"not read: {count} above the names of the columns ({layout.skipped[0][:40]!r})")
    if layout.separator != EXPECTED.get(suffix, ","):
        remarks.append(f"cells are separated by {SEPARATOR_NAMES.get(layout.separator, repr(layout.separator))}")
    cells = _read_clean(data, lines, layout, remarks)
    if cells is None:
        cells = _read_carefully(data.decode("utf-8", "replace"), layout, origin, remarks)
    if layout.separator != "," and b"," in data:
        _remove_points(cells, remarks)
    return finish_table(cells, layout.header, layout.units, origin, remarks)


def read_grid(grid: Sequence[Sequence[object]], origin: str) -> RawTable:
    """Read a table from the cells of a sheet, with titles, units and empty columns as in a text.

    Args:
        grid: The cells, row by row; None where empty.
        origin: The sheet, for error messages.

    Raises:
        ValueError: If there is no table.
    """
    import pandas as pd

    rows = [(i, ["" if is_empty(c) else str(c).strip() for c in row]) for i, row in enumerate(grid)]
    rows = [(i, cells) for i, cells in rows if any(cells)]
    if not rows:
        raise ValueError(f"{origin} cannot be used: it has no rows")
    start, units = _find_header(rows)
    remarks = [f"not read: {format_number(start, 'line')} above the names of the columns"] if start else []
    header = rows[start][1]
    kept = [list(grid[i]) for i, _ in rows[start + 1 + bool(units) :]]
    cells = pd.DataFrame(kept, columns=range(len(header)), dtype=object)
    return finish_table(cells, header, units, origin, remarks)


def finish_table(
    cells: pd.DataFrame, header: Sequence[str], units: dict[int, str], origin: str, remarks: list[str]
) -> RawTable:
    """Name the columns, and drop rows and unnamed columns without a value, and rows that repeat the header.

    Args:
        cells: The rows under the header; the columns are numbered.
        header: The names of the columns, which may be empty.
        units: The unit of each column that has one, as it stands under the header.
        origin: The file, for error messages.
        remarks: What was noticed so far; more is added.

    Raises:
        ValueError: If two columns have one name, or there are no rows.
    """
    if len(header) == 0 or len(cells) == 0:
        raise ValueError(_explain_no_rows(header, origin))
    names = dict[int, str]()
    for i, given in enumerate(header):
        name = given.strip()
        if not name and cells[i].map(is_empty).all():
            continue
        # pandas writes the index under an empty name.
        names[i] = name or ("index" if i == 0 else f"unnamed_{i + 1}")
        if not name and i > 0:
            remarks.append(f"column {i + 1} has no name: it is called {names[i]}")
    repeated = find_repeated(names.values())
    raise_problems([f"column {name} appears twice: rename one of the two" for name in repeated], origin)
    table = cells[list(names)].set_axis([names[i] for i in names], axis="columns")
    first = table.iloc[:, 0]
    is_header = first.eq(names[next(iter(names))])
    if is_header.any():
        is_header &= table.eq(list(table.columns)).all(axis=1)
        if is_header.any():
            remarks.append(f"not read: {format_number(int(is_header.sum()), 'row')} with the names of the columns")
    is_blank = first.isna()
    if is_blank.any():
        # Sheets end with such rows. Between others one stands for a run without a result.
        is_blank &= table.isna().all(axis=1)
        is_blank &= is_blank[::-1].cumprod()[::-1].astype(bool)
    if is_header.any() or is_blank.any():
        table = table[~is_header & ~is_blank].reset_index(drop=True)
    if not len(table):
        raise ValueError(_explain_no_rows(header, origin))
    read = {names[i]: UNITS.get(_strip_unit(unit), "") for i, unit in units.items() if i in names}
    if units:
        shown = ", ".join(f"{names[i]} in {unit}" for i, unit in units.items() if i in names and unit)
        remarks.append(f"the row under the names of the columns was read as units: {shown}")
    return RawTable(table, remarks, units={name: [unit] for name, unit in read.items() if unit})


def _explain_no_rows(header: Sequence[str], origin: str) -> str:
    named = ", ".join(name.strip() for name in header if name.strip())
    return f"{origin} cannot be used: no rows{f', only the names of its columns ({named})' if named else ''}"


def _find_layout(lines: Sequence[str], suffix: str) -> _Layout | None:
    """Find the separator, the header and the first row of a text; None if it has no lines."""
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None:
        return None
    given = SEPARATOR_LINE.fullmatch(lines[first].strip("\r\n"))
    start = first + 1 if given else 0
    separator = given[1] if given else _find_separator(lines, start, EXPECTED.get(suffix, ","))
    rows = list(_split(lines, start, separator))
    if not rows:
        return None
    # numpy's savetxt writes the header as a comment.
    comment = next((i for i in range(rows[0][0] - 1, start - 1, -1) if lines[i].strip()), None)
    if comment is not None and any(map(is_number, rows[0][1])):
        written = [lines[comment].lstrip().lstrip("#% ")]
        named = next((cells for _, cells in _split(written, 0, separator)), [])
        if len(named) == len(rows[0][1]) and not any(map(is_number, named)):
            return _Layout(separator, named, comment + 1)
    header, units = _find_header(rows)
    skipped = [" ".join(lines[line].strip(" \t\r\n;,|").split()) for line, _ in rows[:header]]
    return _Layout(separator, rows[header][1], rows[header + bool(units)][0] + 1, skipped, units)


def _find_separator(lines: Sequence[str], start: int, expected: str) -> str:
    """Return the separator by which most lines have the same number of cells.

    Spaces are tried last, and not where another separator also stands in the header: a title of words may by chance
    have as many as the table has columns.
    """
    best, score = expected, 0.0
    for separator in (expected, *(s for s in SEPARATORS if s != expected), "  ", " "):
        if separator == "  " and score >= 0.5 and _has_header(lines, start, best):
            break
        widths = Counter(len(cells) for _, cells in _split(lines, start, separator))
        count = max((count for width, count in widths.items() if width > 1), default=0)
        if count and count / widths.total() > score + 1e-9:
            best, score = separator, count / widths.total()
    return best


def _has_header(lines: Sequence[str], start: int, separator: str) -> bool:
    """Return whether a row of names has the usual number of cells."""
    rows = [cells for _, cells in _split(lines, start, separator)]
    usual = Counter(len(cells) for cells in rows).most_common(1)[0][0]
    return any(len(cells) == usual > 1 and not any(map(is_number, cells)) for cells in rows[:MAX_TITLES])


def _find_header(rows: Sequence[tuple[int, Sequence[str]]]) -> tuple[int, dict[int, str]]:
    """Return the index of the header, and the units by column if the row under it holds units.

    Args:
        rows: (line, cells) of the first rows.
    """
    usual = Counter(len(cells) for _, cells in rows[: 3 * MAX_TITLES]).most_common(1)[0][0]
    header = 0
    for i, (_, cells) in enumerate(rows[:MAX_TITLES]):
        if not _is_title(cells, [c for _, c in rows[i + 1 : i + MAX_TITLES]], usual):
            header = i
            break
    names = rows[header][1]
    if len(rows) < header + 3 or len(rows[header + 1][1]) != len(names):
        return header, {}
    under, data = rows[header + 1][1], [cells for _, cells in rows[header + 2 : header + 50]]
    units = dict[int, str]()
    for i, unit in enumerate(under):
        column = [cells[i] for cells in data if i < len(cells) and not is_empty(cells[i])]
        if is_number(unit) or (column and all(map(is_number, column)) and _strip_unit(unit) not in UNITS):
            return header, {}
        if column and all(map(is_number, column)) and not is_empty(unit):
            units[i] = unit.strip()
    return header, units


def _is_title(cells: Sequence[str], below: Sequence[Sequence[str]], usual: int) -> bool:
    """Return whether a row stands above the header: a later row fits better, and no row of data comes before that."""
    filled = sum(bool(c.strip()) for c in cells)
    for other in below:
        given = [c for c in other if c.strip()]
        if not any(map(is_number, given)) and (len(given) > filled or (len(cells) != usual == len(other))):
            return True
        if filled > 1 and len(other) == len(cells) and any(map(is_number, given)):
            return False
    return False


def _split(lines: Sequence[str], start: int, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its last line, cells) for each row from a line on; blank lines and comments are left out."""
    line_number = start

    def iterate_lines() -> Iterator[str]:
        nonlocal line_number
        for line_number in range(start, len(lines)):
            line = lines[line_number]
            if _is_comment(line) or not line.strip():
                continue
            if separator in ("|", "&", " ", "  ") and RULE.fullmatch(line):
                continue
            if separator == "|" and line.strip()[0] == "|":
                line = line.strip().strip("|") + "\n"
            elif separator == "&":
                line = re.sub(r"\\\\(\s*\\[a-z]+)*\s*$", "\n", line)
            yield line

    if separator in (" ", "  "):
        pattern = re.compile(r"\s+" if separator == " " else r"\s{2,}|\t+")
        for line in iterate_lines():
            yield line_number, pattern.split(line.strip())
    else:
        for cells in csv.reader(iterate_lines(), delimiter=separator, skipinitialspace=separator != "\t"):
            yield line_number, [c.strip(" *`$\n") for c in cells] if separator in "|&" else cells


def _is_comment(line: str) -> bool:
    return COMMENT.match(line) is not None


def _read_clean(data: bytes, lines: Sequence[str], layout: _Layout, remarks: list[str]) -> pd.DataFrame | None:
    """Return the rows of a table whose lines all have the same number of cells; None if that is not certain."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    separator = layout.separator.encode()
    # A single byte is found many times faster than two.
    has_quotes = b'"' in data
    if separator not in (b",", b";", b"\t") or (has_quotes and separator + b' "' in data):
        return None
    count = 0
    rows = memoryview(data)[sum(len(line.encode()) for line in lines[: layout.first_row]) :]
    if any(mark in data and b"\n" + mark in data for mark in (b"#", b"%")):
        if has_quotes:
            return None
        kept, count = re.subn(COMMENT.pattern.encode(), b"", rows, flags=re.MULTILINE)
        rows = memoryview(kept)
    names = [str(i) for i in range(len(layout.header))]
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(pa.py_buffer(rows)),
            read_options=arrow_csv.ReadOptions(column_names=names, use_threads=False),
            parse_options=arrow_csv.ParseOptions(delimiter=layout.separator, newlines_in_values=has_quotes),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid:
        return None
    remarks += [f"not read: {format_number(count, 'comment')} between or below the rows"] if count else []
    cells: pd.DataFrame = table.to_pandas()
    return cells.set_axis(range(len(names)), axis="columns")


def _read_carefully(text: str, layout: _Layout, origin: str, remarks: list[str]) -> pd.DataFrame:
    """Return the rows of any table.

    Raises:
        ValueError: If rows have more or fewer cells than there are columns. The message names them.
    """
    import pandas as pd

    lines = list(io.StringIO(text, newline=""))
    try:
        rows = [cells for _, cells in _split(lines, layout.first_row, layout.separator)]
    except csv.Error as error:
        raise ValueError(f"{origin} cannot be read as CSV: {error}") from error
    count = sum(_is_comment(line) for line in lines[layout.first_row :])
    remarks += [f"not read: {format_number(count, 'comment')} between or below the rows"] if count else []
    header = layout.header
    named = max((i + 1 for i, name in enumerate(header) if name.strip()), default=0)
    width = len(header)
    # R writes the names of rows without a name for their column.
    if rows and all(len(cells) == width + 1 for cells in rows) and _are_counted([cells[0] for cells in rows]):
        rows = [cells[1:] for cells in rows]
        remarks.append("the first cell of each row has no column: read as the row's number")
    footer: list[str] = []
    while width > 1 and len(rows) > 1 and len(rows[-1]) == 1 and not is_number(rows[-1][0]):
        footer[:0] = rows.pop()
    if footer:
        remarks.append(f"not read: {format_number(len(footer), 'line')} below the rows ({footer[0][:40]!r})")
    problems = []
    for i, cells in enumerate(rows):
        if len(cells) > width and not any(c.strip() for c in cells[width:]):
            del cells[width:]
        elif named <= len(cells) < width:
            cells += [""] * (width - len(cells))
        if len(cells) != width:
            why = f": {_explain_extra_cells(layout.separator)}" if len(cells) > width else ""
            problems.append(f"row {i}: needed {width} cells, got {len(cells)}{why}")
    raise_problems(list_first(problems, "rows"), origin)
    columns = [[cells[i] if cells[i].strip() else None for cells in rows] for i in range(width)]
    return pd.DataFrame({i: pd.Series(column, dtype=object) for i, column in enumerate(columns)})


def _remove_points(cells: pd.DataFrame, remarks: list[str]) -> None:
    """Remove the points between thousands where another column shows that the decimal mark is the comma, in place."""
    texts = {i: [c.strip() for c in cells[i].dropna() if not is_empty(c)] for i in cells.columns}
    is_decimal = [
        any("," in c for c in column) and all(DECIMAL_COMMA.fullmatch(c) or c.isdigit() for c in column)
        for column in texts.values()
    ]
    if not any(is_decimal):
        return
    for i, column in texts.items():
        if any("." in c for c in column) and all(re.fullmatch(r"[+-]?(\d{1,3}(\.\d{3})+|\d+)", c) for c in column):
            cells[i] = cells[i].map(lambda c: c.replace(".", "") if isinstance(c, str) else c)
            remarks.append(f"points between thousands left out, as in {next(c for c in column if '.' in c)}")


def _explain_extra_cells(separator: str) -> str:
    if separator == ",":
        return "a thousands separator, a decimal comma, or a comma in a text without quotes?"
    return f"one of the {SEPARATOR_NAMES.get(separator, repr(separator))} in a text without quotes?"


def _are_counted(cells: Sequence[str]) -> bool:
    """Return whether cells number the rows, from 0 or 1 on."""
    return cells == [str(i) for i in range(len(cells))] or cells == [str(i + 1) for i in range(len(cells))]


def _strip_unit(text: str) -> str:
    """Return a unit without brackets, in lower case: "(M)" is "m"."""
    return text.strip().strip("()[]").strip().lower()
