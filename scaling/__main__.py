"""The `scaling` command: fit laws to logged runs, ask them about a larger run, and draw a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scaling.cli.fit import fit
from scaling.cli.recommend import recommend
from scaling.cli.report import report
from scaling.common.cli import Uri, make_app, refusing, say

if TYPE_CHECKING:
    from scaling.runs.guesses import Guess

app = make_app(__doc__)


@app.command("import")
def import_table(
    source: Annotated[str, typer.Argument(help="a file or folder of runs, or an MLflow experiment")],
    out: Annotated[
        Path | None, typer.Option("--out", help="the table to write: .parquet, .csv, .jsonl or .json")
    ] = None,
    maps: Annotated[
        list[str] | None, typer.Option("--map", help="NAME=COLUMN[:UNIT...] of the source; may be repeated")
    ] = None,
    constants: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE for all rows; may be repeated")
    ] = None,
    mapping: Annotated[Path | None, typer.Option(help="a .toml file with the tables map and set")] = None,
    guess: Annotated[bool, typer.Option("--guess", help="map the other columns by their names and values")] = False,
    metric: Annotated[str, typer.Option(help="which value of an MLflow metric's history: last or min")] = "last",
    tracking_uri: Uri = None,
) -> None:
    """Read runs from a file, a folder or an MLflow experiment, check them, and write one run table.

    Without --out, it only looks: it says which columns it would read, and ends
    with the command that reads them. Diverged and unfinished runs, copies and
    points on the way stay in the table and are marked; laws leave them out.

    \b
    Needed are N, D and loss; lr and batch_tokens for the law of these two:
      N,D,loss,lr,batch_tokens,run_id
      124e6,2.5e9,3.31,0.0018,524288,small-1
      350M,7B,2.95,0.0012,524288,medium-1

    \b
    Units follow the column, after colons:
      N             total, total-tied, nonembedding, total-as-is, ...
      D             steps (needs batch_tokens), sequences (needs seq_len),
                    per-parameter, flops
      loss          bits, perplexity, bits-per-byte (needs bytes_per_token),
                    log-likelihood; loss_offset is added to every loss
      batch_tokens  sequences (needs seq_len)
      all counts    thousands, millions, billions, trillions

    Example: scaling import sweep.csv
    Example: scaling import sweep.csv --guess --out runs.parquet
    Example: scaling import sweep.csv --out runs.parquet --map N=params --map D=step:steps --set batch_tokens=524288
    """
    from scaling.runs.importer import (
        count_runs,
        import_runs,
        name_output,
        propose_import,
        read_mapping,
        summarize_exclusions,
    )
    from scaling.runs.io import check_writable, save_runs

    with refusing():
        all_maps, all_constants = read_mapping(mapping) if mapping else ({}, {})
        all_maps |= parse_pairs("--map", maps or [])
        all_constants |= parse_pairs("--set", constants or [])
        if out is None and not guess:
            proposal = propose_import(
                source, mapping=all_maps, constants=all_constants, metric=metric, tracking_uri=tracking_uri
            )
            if proposal is None:
                # This says why.
                import_runs(source, mapping=all_maps, constants=all_constants, metric=metric, tracking_uri=tracking_uri)
            else:
                typer.echo(format_proposal(source, proposal))
            return
        path = out or name_output(source)
        check_writable(path)
        runs, remarks = import_runs(
            source, mapping=all_maps, constants=all_constants, metric=metric, tracking_uri=tracking_uri, guess=guess
        )
        save_runs(runs, path)
    for line in [*remarks, *summarize_exclusions(runs)]:
        say(line)
    count, diverged, groups = count_runs(runs)
    typer.echo(f"{count} runs ({diverged} diverged) in {groups} (N, D) groups: {path}")


def format_proposal(source: str, proposal: Guess) -> str:
    """Return what `scaling import` says of a source that it only looked at, and the command that reads it."""
    from scaling.runs.columns import quote
    from scaling.runs.importer import format_command

    if not proposal.is_needed:
        return f"{source} needs no mapping: every command reads it as it is\n\nscaling fit {quote(source)}"
    lines = [f"{source} can be read so:", *(f"  {reason}" for reason in proposal.reasons), ""]
    if proposal.blanks:
        lines.append(f"Fill in {', '.join(proposal.blanks)}, then:")
    else:
        lines.append("This command reads it, and --guess does the same without the options --map:")
    return "\n".join([*lines, format_command(source, proposal)])


def parse_pairs(option: str, given: list[str]) -> dict[str, str]:
    """Return {"N": "params"} for ["N=params"].

    Args:
        option: The option that they were given with, for the error message.
        given: Its values.

    Raises:
        ValueError: If a value has no name before an equals sign.
    """
    wrong = [text for text in given if "=" not in text.lstrip("=")]
    if wrong:
        raise ValueError(f"{option} needs NAME=..., got {', '.join(wrong)}")
    return {name.strip(): value.strip() for name, _, value in (text.partition("=") for text in given)}


app.command()(fit)
app.command()(recommend)
app.command()(report)


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    sys.exit(app())
