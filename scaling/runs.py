"""The run table: what a trainer yields, and one row per (trial, fidelity) whatever the source.

Columns (only the first three are required; the laws say which others they need):

| column | is |
|---|---|
| N, D | parameters that multiply tokens; training tokens |
| loss | validation loss of the finished (annealed) run, nats per token; NaN where diverged |
| lr, batch_tokens | peak learning rate at base width; tokens per optimizer step |
| run_id, name, config, rung | which run, its name, which configuration of the study, which rung of its ladder |
| role | "proxy", "confirm" or "target" (scored against the prediction made before it; then laws learn from it as `arm` says) |
| arm | of a target: "scratch", which laws are fitted to, or "warm", whose D is not comparable; otherwise they leave it out |
| diverged | NaN loss, or no better than guessing at the end: a recorded outcome |
| final | False where the loss is not that of a run of D tokens: unfinished, or on the way under a decaying schedule |
| excluded | why the row is kept out of laws; empty where it is used |
| N_convention | how N was counted, see scaling.imports |
| parametrization, seq_len, d_model, vocab, N_total, N_nonembedding, N_embedding, seconds, checkpoint | as logged |
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = ("N", "D", "loss")
COUNTS = ("N", "D", "batch_tokens", "seq_len", "d_model", "vocab", "N_total", "N_nonembedding", "N_embedding")
POSITIVE = (*COUNTS, "lr", "loss")
NUMBERS = (*POSITIVE, "rung", "seconds")
FLAGS = ("diverged", "final")
WORDS = (
    "run_id",
    "name",
    "config",
    "role",
    "arm",
    "excluded",
    "N_convention",
    "parametrization",
    "data_sha256",
    "checkpoint",
)
COLUMNS = (*NUMBERS, *FLAGS, *WORDS)
SUFFIXES = (".csv", ".parquet", ".jsonl", ".json")
SHOWN = 5  # mistakes of one kind that are named one by one

PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
TRUTHS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}


@dataclass(frozen=True)
class Measurement:
    """One point of a run. A trainer yields these; the consumer decides what to do with them."""

    tokens: int  # trained so far; on a final point the cooldown is included
    loss: float  # nats per token, validation, always on the same held-out windows
    lr: float = math.nan  # at base width, at that moment
    train_loss: float = math.nan  # nats per token, mean since the last point
    seconds: float = math.nan  # spent training since this call of the trainer began
    final: bool = False  # annealed: the loss of a run of exactly this many tokens. Otherwise a point on the trunk
    diverged: bool = False  # NaN, or no better than guessing at the end
    recorded: bool = False  # in MLflow already, by the trainer itself


def load_runs(source: str | Path, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """The run table of a study (an MLflow experiment's name) or of a .csv, .parquet, .jsonl or .json file, checked.

    Raises ValueError when there is no such study or file, or when a column or a row cannot be read as documented above.
    Tables with other names or units, and experiments of other programs, are for `scaling.imports.import_runs`.
    """
    if is_file(source):
        from scaling.files import read_table, typed

        return check_runs(typed(read_table(Path(source)), but=COLUMNS), origin=str(source))
    from scaling import tracking

    return check_runs(tracking.read_runs(str(source), uri=tracking_uri), origin=f"study {source}")


def is_file(source: str | Path) -> bool:
    """Whether a source is a table's file, not the name of an experiment. ValueError for a file of another kind."""
    path = Path(source)
    if path.suffix not in SUFFIXES and path.is_file():
        raise ValueError(f"needed a table of runs ({', '.join(SUFFIXES)}) or an experiment's name, got {source}")
    return path.suffix in SUFFIXES


def usable(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows that laws are fitted to: not excluded for any reason, and of targets those trained from scratch.

    Also of a table that was never checked, whose diverged and unfinished rows are left out when it has such columns.
    """
    keep = not_comparable(runs).eq("")
    if "excluded" in runs:
        return runs[keep & runs["excluded"].fillna("").eq("")]
    if "diverged" in runs:
        keep = keep & ~runs["diverged"].astype(bool)
    if "final" in runs:
        keep = keep & runs["final"].astype(bool)
    return runs[keep]


def not_comparable(runs: pd.DataFrame) -> pd.Series[Any]:
    """Why a target's row tells laws nothing, empty where it does: its D leaves out what a warm start began with."""
    import pandas as pd

    role, arm = (runs[c] if c in runs else pd.Series(None, runs.index, dtype=object) for c in ("role", "arm"))
    reasons = pd.Series("", runs.index, dtype=object)
    reasons = reasons.mask(role.eq("target") & ~arm.eq("scratch"), "target whose start is not recorded")
    return reasons.mask(role.eq("target") & arm.eq("warm"), "warm start")


def check_runs(runs: pd.DataFrame, *, origin: str = "the run table") -> pd.DataFrame:
    """The same table with `role`, `diverged`, `final` and `excluded` filled in and numbers as float64.

    Raises one ValueError with all mistakes, each with its row (its index) and column.
    """
    clean, problems = examine(runs)
    refuse(problems, origin)
    return clean


def refuse(problems: Sequence[str], origin: str) -> None:
    """One ValueError with all that is wrong, when anything is."""
    if problems:
        raise ValueError(f"{origin} cannot be used (rows count from 0):\n  " + "\n  ".join(problems))


def examine(runs: pd.DataFrame, known: Collection[tuple[str, Any]] = ()) -> tuple[pd.DataFrame, list[str]]:
    """The table as `check_runs` returns it, and what is wrong with it.

    known: (column, row) cells of which the mistake has been named already.
    """
    import numpy as np
    import pandas as pd

    known = set(known)
    problems = [] if len(runs) else ["no rows"]
    for name in REQUIRED:
        if name not in runs.columns:
            near = difflib.get_close_matches(name, [str(c) for c in runs.columns], n=1, cutoff=0.4)
            problems.append(f"no column {name}" + (f" (is it {near[0]}? rename it)" if near else ""))
    runs = runs.copy()
    for name in NUMBERS:
        if name in runs.columns:
            runs[name], wrong = as_numbers(runs[name])
            problems += mistakes(name, wrong, "a positive number" if name in POSITIVE else "a number")
            known |= {(name, row) for row in wrong}
    for name in WORDS:
        if name in runs.columns:
            words = [None if empty(v) else str(v) for v in runs[name]]
            runs[name] = pd.Series(words, runs.index, dtype=object)  # alike whatever the file and the version of pandas
    loss = runs["loss"] if "loss" in runs.columns else pd.Series(np.nan, runs.index)
    for name, default in (("diverged", ~np.isfinite(loss)), ("final", pd.Series(True, runs.index))):
        if name not in runs.columns:
            runs[name] = default
        runs[name], wrong = as_flags(runs[name], default)
        problems += mistakes(name, wrong, "true or false")
    if "role" not in runs.columns:
        runs["role"] = pd.Series("proxy", runs.index, dtype=object)
    runs["role"] = runs["role"].where(runs["role"].notna(), "proxy")
    reasons = runs["excluded"] if "excluded" in runs.columns else pd.Series("", runs.index)
    reasons = reasons.where(reasons.notna(), "").astype(object)
    reasons = reasons.mask(reasons.eq("") & runs["diverged"], "diverged")
    reasons = reasons.mask(reasons.eq("") & ~runs["final"], "not final")
    runs["excluded"] = reasons.where(reasons.ne(""), not_comparable(runs))
    for name in POSITIVE:
        if name in runs.columns:
            value = runs[name]
            bad = (value <= 0) | np.isinf(value)
            if name == "loss":
                bad &= runs["excluded"].eq("")  # an excluded run has the loss it has
            if name in REQUIRED:
                bad |= value.isna() & runs["excluded"].eq("")
            said = {row: value.iat[i] for i, row in enumerate(runs.index) if bad.iat[i] and (name, row) not in known}
            problems += mistakes(name, said, "a positive number")
    return runs, problems


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


def save_runs(runs: pd.DataFrame, path: Path) -> None:
    """Write a run table as .parquet, .csv, .jsonl or .json."""
    check_writable(path)
    if path.suffix == ".parquet":
        runs.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        runs.to_csv(path, index=False)
    else:
        rows = [{k: None if empty(v) else v for k, v in row.items()} for row in runs.to_dict("records")]
        lines = [json.dumps(row, allow_nan=False) for row in rows]  # pandas would round: 15 digits after the point
        path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]\n")


def check_writable(path: Path) -> None:
    """ValueError when a run table cannot be written there."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a run table is written as {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {path.name}")
    if not path.parent.is_dir():
        raise ValueError(f"a run table needs a folder that exists, got {path}: make {path.parent} first")
