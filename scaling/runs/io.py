"""Load a run table from a file or an MLflow experiment, and save it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.runs.cells import is_empty
from scaling.runs.readers import TABLE_SUFFIXES
from scaling.runs.readers import is_table_file as is_table_file

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("muscale.scaling")


def load_runs(source: str | Path, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """Load and check a run table; `scaling.runs.table` documents its columns.

    A file is read as `scaling.import_runs` reads it without a mapping: by the names of its columns, with states, units
    and points on the way. Files with other names are read by `scaling.import_runs` with a mapping.

    Args:
        source: The name of a study (an MLflow experiment), or a file or folder of runs.
        tracking_uri: The MLflow store of a study; by default $MLFLOW_TRACKING_URI or ./mlflow.db.

    Returns:
        The checked table.

    Raises:
        ValueError: If there is no such study or file, or if a column or row cannot be read. The message ends with the
            command that reads the source, where one was found.
    """
    # Imported here, so that a command can tell a file from an experiment without pandas.
    from scaling.runs.columns import quote
    from scaling.runs.importer import import_runs, name_output, propose_import

    if is_table_file(source):
        runs, remarks = import_runs(source)
        options = []
        for remark in remarks:
            if not remark.startswith("columns not used"):
                logger.info(remark)
            if remark.startswith("no column "):
                options += re.findall(r"--map (?:\"[^\"]+\"|[^\s;)]+)", remark)[:1]
        if options:
            command = f"scaling import {quote(str(source))} --out {quote(str(name_output(source)))}"
            logger.info(f"to use such a column: {command} {' '.join(options)}")
        return runs
    from scaling.runs.from_mlflow import read_runs
    from scaling.runs.importer import format_command
    from scaling.runs.table import check_runs
    from scaling.tracking.records import read_records

    try:
        runs = read_runs(str(source), uri=tracking_uri)
    except ValueError:
        records = read_records(str(source), uri=tracking_uri)
        if not records or any("muscale.kind" in r.tags for r in records):
            raise
        guess = propose_import(source, tracking_uri=tracking_uri)
        command = (
            format_command(source, guess) if guess else f"scaling import {source} --out runs.csv --map N=COLUMN ..."
        )
        raise ValueError(
            f"experiment {source!r} holds {len(records)} runs of another program: import them first:\n  {command}"
        ) from None
    return check_runs(runs, origin=f"study {source}")


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
