"""Load a run table from a file or an MLflow experiment, and save it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.runs.cells import empty
from scaling.runs.readers import SUFFIXES

if TYPE_CHECKING:
    import pandas as pd


def load_runs(source: str | Path, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """The run table of a study (an MLflow experiment's name) or of a .csv, .parquet, .jsonl or .json file, checked.

    Raises ValueError when there is no such study or file, or when a column or a row cannot be read as documented above.
    Tables with other names or units, and experiments of other programs, are for `scaling.runs.importer.import_runs`.
    """
    # Imported here, so that a command can tell a file from an experiment without pandas.
    from scaling.runs.table import COLUMNS, check_runs

    if is_file(source):
        from scaling.runs.readers import read_table, typed

        return check_runs(typed(read_table(Path(source)), but=COLUMNS), origin=str(source))
    from scaling.runs.from_mlflow import read_runs

    return check_runs(read_runs(str(source), uri=tracking_uri), origin=f"study {source}")


def is_file(source: str | Path) -> bool:
    """Whether a source is a table's file, not the name of an experiment. ValueError for a file of another kind."""
    path = Path(source)
    if path.suffix not in SUFFIXES and path.is_file():
        raise ValueError(f"needed a table of runs ({', '.join(SUFFIXES)}) or an experiment's name, got {source}")
    return path.suffix in SUFFIXES


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
