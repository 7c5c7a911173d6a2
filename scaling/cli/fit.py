"""`scaling fit`: fit laws to all runs."""

from __future__ import annotations

from typing import Annotated

import typer

from scaling.cli.shared import By, Source, Where, read_parts, store_answer
from scaling.common.cli import Json, Uri, refusing
from scaling.common.json_text import dump_json
from scaling.common.logs import show_progress


def fit(
    source: Source,
    compare: Annotated[bool, typer.Option(help="compare the forms of the loss law and the approaches, too")] = True,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="C,C,...", help="compute budgets of isoFLOP runs; default: the table's column, or 6ND"),
    ] = None,
    where: Where = None,
    by: By = None,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """Fit the law of learning rate and batch and the loss law to all runs, and say how far each can be trusted.

    A table of sizes, tokens and losses is enough for the loss law. Exit code 3: there is no loss law.

    Example: scaling fit quickstart
    Example: scaling fit runs.csv --where optimizer=adamw --no-compare --json
    Example: scaling fit runs.csv --budgets 1e18,3e18,1e19
    """
    from scaling.advice.budgets import read_budgets
    from scaling.common.arrays import limit_to_one_thread
    from scaling.report.fit_summary import format_parts, format_summary, summarize_fits

    with refusing(), show_progress(f"fitting laws to {source}", quiet=as_json), limit_to_one_thread():
        if budgets is not None and not compare:
            raise ValueError("--budgets is for the compute-optimal size, which --no-compare leaves out: drop one")
        chosen = None if budgets is None else read_budgets(budgets)
        parts = read_parts(source, tracking_uri, where, by)
        summaries = {
            value: summarize_fits(runs, compare=compare and by is None, budgets=chosen) for value, runs in parts.items()
        }
    if by is not None:
        typer.echo(dump_json({"by": by, "parts": summaries}) if as_json else format_parts(by, summaries))
    else:
        if not where:
            store_answer(source, tracking_uri, "fit", summaries[""])
        typer.echo(dump_json(summaries[""]) if as_json else format_summary(summaries[""]))
    if any(summary["loss_law"] is None for summary in summaries.values()):
        raise typer.Exit(3)
