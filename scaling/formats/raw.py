"""The table that a reader returns, and the small questions about single cells that every reader asks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scaling.common.quantities import split_count

if TYPE_CHECKING:
    import pandas as pd

# Bytes of a file from which its layout is found.
SAMPLE = 1 << 16
# What an error says at the end where a file is nothing like a table.
SAMPLE_TABLE = "Needed is a table with one row per run, such as a .csv file:\n  N,D,loss\n  1e8,2e9,3.1"
# Mistakes of one kind that are listed one by one.
MAX_LISTED = 5
NUMBER_PATTERN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
# What programs and people write into a cell without a value. "nan" is not among them: it is an outcome.
MISSING_MARKERS = frozenset(
    {"", "na", "n/a", "n.a.", "#n/a", "#na", "<na>", "none", "null", "nil", "nat", "missing"}
    | {"-", "--", "---", "\u2013", "\u2014", "?", "."}
)
# Underscores, spaces and apostrophes between groups of three digits never stand for a decimal point.
PLAIN_GROUPS = re.compile(r"[+-]?\d{1,3}([_ '\u2019\u00a0\u2009\u202f]\d{3})+(\.\d*)?")
COMMA_GROUPS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
DOT_GROUPS = re.compile(r"[+-]?\d{1,3}(\.\d{3}){2,}")
DECIMAL_COMMA = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d*),\d*([eE][+-]?\d+)?")


@dataclass
class RawTable:
    """The cells of a source as they are, and what its format says about them.

    Attributes:
        cells: One row per run, or per run and step. Nested names are joined by dots: `config.lr`.
        remarks: What was done to read the cells, one sentence each, for the user.
        mapping: The source's column, with units, for columns of the run table, where the format leaves no doubt, such
            as {"D": "step:steps", "loss": "eval_loss"} for a trainer state of Hugging Face. A mapping or constant of
            the user replaces it.
        units: The units of a column of the source, such as {"params": ["millions"]}, where a row under the header
            gives them.
        advice: What to do about columns that the format cannot hold, for an error message.
    """

    cells: pd.DataFrame
    remarks: list[str] = field(default_factory=list)
    mapping: dict[str, str] = field(default_factory=dict)
    units: dict[str, list[str]] = field(default_factory=dict)
    advice: str = ""


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


def list_first(problems: Sequence[str], more: str) -> list[str]:
    """Return the first `MAX_LISTED` problems and, if there are others, one line on how many."""
    rest = len(problems) - MAX_LISTED
    return [*problems[:MAX_LISTED], *([f"{rest} more {more} like these"] if rest > 0 else [])]


def decode_text(data: bytes, origin: str) -> tuple[bytes, list[str]]:
    """Return a text as UTF-8 without a byte order mark, and a remark if it was written in another encoding.

    Raises:
        ValueError: If the bytes are no text.
    """
    marks = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
    encoding = next((name for mark, name in marks if data.startswith(mark)), "")
    sample = data[:SAMPLE]
    if not encoding and len(sample) > 3 and b"\0" in sample:
        odd, even = sample[1::2].count(0), sample[::2].count(0)
        encoding = "utf-16-le" if odd > len(sample) / 4 > even else "utf-16-be" if even > len(sample) / 4 > odd else ""
    try:
        if encoding:
            text = data.decode(encoding)
            return text.encode("utf-8", "surrogatepass"), [f"the text is {encoding.upper()}"]
        if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", sample):
            raise ValueError(f"{origin} cannot be read: it holds bytes that are no text.\n{SAMPLE_TABLE}")
        data = data.removeprefix(b"\xef\xbb\xbf")
        # Decoding checks the text; a text of ASCII needs no check.
        if not data.isascii():
            data.decode("utf-8")
        return data, []
    except UnicodeDecodeError as error:
        if encoding:
            raise ValueError(f"{origin} cannot be read: it begins like {encoding.upper()}, {error.reason}") from error
    for encoding in ("cp1252", "latin-1"):
        try:
            return data.decode(encoding).encode(), [
                f"the text is not UTF-8 and was read as {encoding} (Western Europe)"
            ]
        except UnicodeDecodeError:
            continue
    raise AssertionError("latin-1 decodes everything")


def is_empty(cell: Any) -> bool:
    """Return whether a cell has no value: None, NaN, pandas' NA or NaT, blank text, or one of `MISSING_MARKERS`."""
    import pandas as pd

    if isinstance(cell, str):
        return (len(cell) < 8 and cell.strip().lower() in MISSING_MARKERS) or not cell.strip()
    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and math.isnan(cell))


def is_number(text: str) -> bool:
    """Return whether a text is a number in any of the forms that `parse_numbers` reads, but not "nan" or "inf"."""
    text = text.strip()
    if not any(c.isdigit() for c in text):
        return False
    return bool(
        NUMBER_PATTERN.fullmatch(text)
        or PLAIN_GROUPS.fullmatch(text)
        or COMMA_GROUPS.fullmatch(text)
        or DOT_GROUPS.fullmatch(text)
        or DECIMAL_COMMA.fullmatch(text)
        or split_count(text)
    )


def format_number(count: int, noun: str) -> str:
    """Return a number of things, such as "1 run" or "3 runs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def find_repeated(names: Iterable[str]) -> list[str]:
    """Return the names that stand more than once, sorted."""
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
