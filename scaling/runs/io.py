"""Load a run table from a file or an MLflow experiment, and save it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.runs.cells import is_empty
from scaling.runs.readers import TABLE_SUFFIXES

if TYPE_CHECKING:
    import pandas as pd


def load_runs(source: str | Path, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """Load and check a run table; `scaling.runs.table` documents its columns.

    Tables with other names or units, and experiments of other programs, are read by `scaling.import_runs`.

    Args:
        source: The name of a study (an MLflow experiment), or a .csv, .parquet, .jsonl or .json file.
        tracking_uri: The MLflow store of a study; by default $MLFLOW_TRACKING_URI or ./mlflow.db.

    Returns:
        The checked table.

    Raises:
        ValueError: If there is no such study or file, or if a column or row cannot be read.
    """
    # Imported here, so that a command can tell a file from an experiment without pandas.
    from scaling.runs.table import COLUMNS, check_runs

    if is_table_file(source):
        from scaling.runs.readers import convert_numeric_columns, read_table

        return check_runs(convert_numeric_columns(read_table(Path(source)), but=COLUMNS), origin=str(source))
    from scaling.runs.from_mlflow import read_runs

    return check_runs(read_runs(str(source), uri=tracking_uri), origin=f"study {source}")


def is_table_file(source: str | Path) -> bool:
    """Return whether a source is the file of a table and not the name of an experiment.

    Args:
        source: A path or a name.

    Returns:
        Whether its suffix is one of `TABLE_SUFFIXES`.

    Raises:
        ValueError: If it is a file of another kind.
    """
    path = Path(source)
    if path.suffix not in TABLE_SUFFIXES and path.is_file():
        raise ValueError(f"needed a table of runs ({', '.join(TABLE_SUFFIXES)}) or an experiment's name, got {source}")
    return path.suffix in TABLE_SUFFIXES


def save_runs(runs: pd.DataFrame, path: Path) -> None:
    """Write a run table.

    Args:
        runs: The table.
        path: A .parquet, .csv, .jsonl or .json file.

    Raises:
        ValueError: If the suffix is another one or the folder does not exist.
    """
    check_writable(path)
    if path.suffix == ".parquet":
        runs.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        runs.to_csv(path, index=False)
    else:
        rows = [{k: None if is_empty(v) else v for k, v in row.items()} for row in runs.to_dict("records")]
        # Not DataFrame.to_json, which rounds to 15 decimal places.
        lines = [json.dumps(row, allow_nan=False) for row in rows]
        path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else "[" + ",\n".join(lines) + "]\n")


def check_writable(path: Path) -> None:
    """Raise ValueError if a run table cannot be written to this path."""
    if path.suffix not in TABLE_SUFFIXES:
        raise ValueError(
            f"a run table is written as {', '.join(TABLE_SUFFIXES[:-1])} or {TABLE_SUFFIXES[-1]}, got {path.name}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"a run table needs a folder that exists, got {path}: make {path.parent} first")
