"""Helpers of the `scaling` commands: their common options, counts from text, the rows that are asked for, notes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.common.quantities import read_count
from scaling.runs.io import is_table_file

if TYPE_CHECKING:
    import pandas as pd

# Parts of an answer that are too long for a note, and are not kept with a study.
NOT_STORED = ("floors", "optima", "forms", "approaches", "beside", "run_ids")

Source = Annotated[str, typer.Argument(help="a study's name (MLflow experiment), or a file or folder of runs")]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="COLUMN=VALUE", help="use only rows with this value; may be repeated"),
]
By = Annotated[str | None, typer.Option("--by", metavar="COLUMN", help="fit each value of this column by itself")]


def parse_count(text: str) -> float:
    """Return a number of parameters, tokens or FLOPs from the command line, such as 7B or 7e9."""
    try:
        return read_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Params = Annotated[
    float | None,
    typer.Option("--params", parser=parse_count, metavar="N", help="parameters that multiply tokens: 7B, 7e9"),
]
Tokens = Annotated[
    float | None, typer.Option("--tokens", parser=parse_count, metavar="D", help="training tokens: 1.4T, 1.4e12")
]
Flops = Annotated[
    float | None,
    typer.Option("--flops", parser=parse_count, metavar="C", help="training FLOPs, for which N and D are chosen"),
]


def read_parts(
    source: str, tracking_uri: str | None, where: list[str] | None, by: str | None
) -> dict[str, pd.DataFrame]:
    """Read the rows that are asked for.

    Args:
        source: A study or a file.
        tracking_uri: The MLflow store of a study.
        where: Conditions on the rows, each "column=value".
        by: A column, each value of which is a part of its own.

    Returns:
        The run table of each part, by the value of the column; without `by`, one table under "".

    Raises:
        ValueError: If the source cannot be read, or a column or a value is not in the table.
    """
    from scaling.advice.subsets import select_rows, split_rows
    from scaling.runs.io import load_runs

    runs = select_rows(load_runs(source, tracking_uri=tracking_uri), where or [])
    return {"": runs} if by is None else split_rows(runs, by)


def store_answer(source: str, tracking_uri: str | None, name: str, value: Mapping[str, Any]) -> None:
    """Keep an answer with the study that it came from, as a note. For a file, nothing is kept."""
    if is_table_file(source):
        return
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import log_summary, write_note

    client = connect(tracking_uri)
    parent = find_study_run(client, source)
    stored = {key: inner for key, inner in value.items() if key not in NOT_STORED}
    write_note(client, parent, name, json.loads(json.dumps(stored, default=float)))
    if name == "recommendation":
        numbers = {k: stored[k] for k in ("lr", "batch_tokens", "loss") if stored[k] is not None}
        log_summary(client, parent, {f"recommended_{k}": float(v) for k, v in numbers.items()})
