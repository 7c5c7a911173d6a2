"""The `scaling` command: fit laws to logged runs, ask them about a larger run, and draw a report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.common.cli import Json, Uri, make_app, refusing, say
from scaling.common.quantities import read_count
from scaling.common.redact import redact_passwords
from scaling.runs.io import is_table_file

if TYPE_CHECKING:
    import pandas as pd

    from scaling.advice.recommendation import Recommendation
    from scaling.report.figures import TargetCurve

app = make_app(__doc__)

Source = Annotated[
    str, typer.Argument(help="a study's name (MLflow experiment), or a .csv, .parquet, .jsonl or .json file")
]
# Parts of an answer that are too long for a note, and are not kept with a study.
NOT_STORED = ("floors", "optima", "forms", "approaches", "beside", "run_ids")


def parse_count(text: str) -> float:
    """Return a number of parameters, tokens or FLOPs from the command line, such as 7B or 7e9."""
    try:
        return read_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command("import")
def import_table(
    source: Annotated[str, typer.Argument(help="a .csv, .parquet, .jsonl or .json file, or an MLflow experiment")],
    out: Annotated[Path, typer.Option("--out", help="the table to write: .parquet, .csv, .jsonl or .json")],
    maps: Annotated[
        list[str] | None, typer.Option("--map", help="NAME=COLUMN[:UNIT...] of the source; may be repeated")
    ] = None,
    constants: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE for all rows; may be repeated")
    ] = None,
    mapping: Annotated[Path | None, typer.Option(help="a .toml file with the tables map and set")] = None,
    metric: Annotated[str, typer.Option(help="which value of an MLflow metric's history: last or min")] = "last",
    tracking_uri: Uri = None,
) -> None:
    """Read runs from a file or an MLflow experiment, check them, and write one run table.

    Files may be exports of Weights & Biases. Diverged and unfinished runs stay
    in the table and are marked; laws leave them out. Units follow the column, as
    in N=params:total, D=step:steps, D=tokens:billions, loss=val_loss:bits or
    batch_tokens=batch_size:sequences; scaling/runs/units.py lists all.

    Example: scaling import sweep.csv --out runs.parquet --map N=params --map D=step:steps --set batch_tokens=524288
    """
    from scaling.runs.importer import import_runs, read_mapping, summarize_exclusions
    from scaling.runs.io import check_writable, save_runs

    with refusing():
        check_writable(out)
        all_maps, all_constants = read_mapping(mapping) if mapping else ({}, {})
        all_maps |= parse_pairs("--map", maps or [])
        all_constants |= parse_pairs("--set", constants or [])
        runs, remarks = import_runs(
            source, mapping=all_maps, constants=all_constants, metric=metric, tracking_uri=tracking_uri
        )
        save_runs(runs, out)
    for line in [*remarks, *summarize_exclusions(runs)]:
        say(line)
    diverged, groups = int(runs["diverged"].sum()), runs.groupby(["N", "D"]).ngroups
    typer.echo(f"{len(runs)} runs ({diverged} diverged) in {groups} (N, D) groups: {out}")


@app.command()
def fit(
    source: Source,
    compare: Annotated[bool, typer.Option(help="compare the forms of the loss law and the approaches, too")] = True,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """Fit the law of learning rate and batch and the loss law to all runs, and say how far each can be trusted.

    Exit code 3: there is no loss law.

    Example: scaling fit quickstart
    Example: scaling fit runs.csv --no-compare --json
    """
    from scaling.report.fit_summary import format_summary, summarize_fits
    from scaling.runs.io import load_runs

    with refusing():
        summary = summarize_fits(load_runs(source, tracking_uri=tracking_uri), compare=compare)
    store_answer(source, tracking_uri, "fit", {k: v for k, v in summary.items() if k not in NOT_STORED})
    typer.echo(json.dumps(summary, allow_nan=False) if as_json else format_summary(summary))
    if summary["loss_law"] is None:
        raise typer.Exit(3)


@app.command()
def recommend(
    source: Source,
    target: Annotated[bool, typer.Option("--target", help="recommend for the target in the study's file")] = False,
    params: Annotated[
        float | None,
        typer.Option("--params", parser=parse_count, metavar="N", help="parameters that multiply tokens: 7B, 7e9"),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option("--tokens", parser=parse_count, metavar="D", help="training tokens: 1.4T, 1.4e12")
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option("--flops", parser=parse_count, metavar="C", help="training FLOPs, for which N and D are chosen"),
    ] = None,
    mass: Annotated[float, typer.Option(min=0.01, max=0.99, help="the probability that each interval holds")] = 0.9,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="a published law to compare with: step-law, deepseek, ..., all; may be repeated"),
    ] = None,
    next_run: Annotated[bool, typer.Option("--next/--no-next", help="choose the run that would narrow it most")] = True,
    at_most: Annotated[
        float | None,
        typer.Option(
            parser=parse_count,
            metavar="C",
            help="most FLOPs of that run; default 3 x the largest, but at most a tenth of the target",
        ),
    ] = None,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """Recommend learning rate and batch for a larger run and predict its loss, with intervals and warnings.

    Exit code 3: do not trust the recommendation.

    Example: scaling recommend quickstart --target
    Example: scaling recommend runs.csv --params 7B --tokens 1.4T --beside step-law
    Example: scaling recommend runs.csv --flops 1e21 --no-next --json
    """
    from scaling.advice.recommendation import UNTRUSTED
    from scaling.advice.recommendation import recommend as compute_recommendation
    from scaling.fitting.loss_law import FitError
    from scaling.runs.io import load_runs

    with refusing():
        runs = load_runs(source, tracking_uri=tracking_uri)
        space = None
        if not is_table_file(source):
            from scaling.tracking.client import connect
            from scaling.tracking.experiment import find_study_run
            from scaling.tracking.log import read_note

            client = connect(tracking_uri)
            parent = find_study_run(client, source)
            space = read_note(client, parent, "space")
            if target:
                target_note = read_note(client, parent, "target")
                if target_note is None:
                    raise ValueError(f"study {source!r} has no [target]: give --params and --tokens, or --flops")
                params, tokens = target_note["N"], target_note["D"]
        elif target:
            raise ValueError(f"--target needs a study, got the file {source}: give --params and --tokens, or --flops")
        try:
            answer = compute_recommendation(
                runs,
                N=params,
                D=tokens,
                C=flops,
                mass=mass,
                space=space,
                beside=beside or [],
                next_run=next_run,
                at_most=at_most,
            )
        except FitError as error:
            reason = {"trustworthy": False, "reason": str(error)}
            typer.echo(json.dumps(reason) if as_json else f"{UNTRUSTED}: there is no recommendation. {error}")
            raise typer.Exit(3) from error
    if target:
        stored = {k: v for k, v in answer.to_dict().items() if k not in NOT_STORED}
        store_answer(source, tracking_uri, "recommendation", stored)
    typer.echo(json.dumps(answer.to_dict(), allow_nan=False) if as_json else str(answer))
    if not answer.trustworthy:
        raise typer.Exit(3)


@app.command()
def report(
    source: Source,
    out: Annotated[Path | None, typer.Option("--out", help="default: studies/NAME/report.html")] = None,
    tracking_uri: Uri = None,
) -> None:
    """Draw everything that is known of a study into one HTML file, and print the recommendation.

    Example: scaling report quickstart
    """
    from scaling.advice.recommendation import Recommendation
    from scaling.curves.backtest import read_study_curves
    from scaling.report.html import render_report
    from scaling.runs.io import load_runs
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import log_file, read_note

    with refusing():
        runs = load_runs(source, tracking_uri=tracking_uri)
        if is_table_file(source):
            path = out or Path(source).with_suffix(".html")
            path.write_text(render_report(Path(source).stem, runs))
            typer.echo(f"report: {path}")
            return
        # The name of an experiment may lead elsewhere as a path.
        if out is None and Path(source).name != source:
            raise ValueError(f"{source!r} is not the name of a folder in studies/: give --out")
        client = connect(tracking_uri)
        parent = find_study_run(client, source)
        note = read_note(client, parent, "recommendation")
        answer = Recommendation.from_dict(note) if note else None
        warm_start = read_note(client, parent, "warm_start")
        targets = read_target_curves(client, runs, read_note(client, parent, "targets") or {})
        # What was predicted before the target ran: since then, laws may have been fitted to the target, too.
        predicted = answer
        if answer and (prediction := read_note(client, parent, "predicted")):
            predicted = Recommendation.from_dict(answer.to_dict() | prediction)
        page = render_report(
            source,
            runs,
            recommendation=answer,
            predicted=predicted,
            targets=targets,
            warm_start=warm_start,
            curves=read_study_curves(client, runs),
        )
        path = out or Path("studies") / source / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page)
        log_file(client, parent, path)
    if answer and predicted:
        typer.echo(str(answer))
        for target in targets:
            typer.echo(format_outcome(target, predicted))
    for name, value in (warm_start or {}).items():
        # Intervals are shown together with their values.
        if "interval" not in name:
            typer.echo(f"{name}: {value}")
    typer.echo(f"\nreport     {path}")
    typer.echo(f"runs       mlflow ui --backend-store-uri {redact_passwords(client.tracking_uri)}")
    journal = Path("studies") / source / "study.journal"
    if journal.exists():
        typer.echo(f"trials     optuna-dashboard {journal}")


def format_outcome(target: TargetCurve, predicted: Recommendation) -> str:
    """Return the final loss of a launched target, compared with the predicted interval."""
    low, high = predicted.loss_interval
    place = "inside" if low <= target.final_loss <= high else "outside"
    interval = f"the {100 * predicted.mass:.0f} % interval ({low:.4f}, {high:.4f})"
    return f"measured, {target.name:8s} {target.final_loss:.4f}: {place} {interval}"


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


def store_answer(source: str, tracking_uri: str | None, name: str, value: Mapping[str, Any]) -> None:
    """Keep an answer with the study that it came from, as a note. For a file, nothing is kept."""
    if is_table_file(source):
        return
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import log_summary, write_note

    client = connect(tracking_uri)
    parent = find_study_run(client, source)
    write_note(client, parent, name, json.loads(json.dumps(value, default=float)))
    if name == "recommendation":
        log_summary(client, parent, {f"recommended_{k}": float(value[k]) for k in ("lr", "batch_tokens", "loss")})


def read_target_curves(client: Any, runs: pd.DataFrame, arms: dict[str, str]) -> list[TargetCurve]:
    """Return the curves of the target that was launched last.

    Args:
        client: The MLflow client.
        runs: The study's run table.
        arms: MLflow's run id of each arm, by its name.
    """
    from scaling.report.figures import TargetCurve
    from scaling.tracking.log import read_curve

    curves = []
    for arm, run_id in arms.items():
        tokens, loss = read_curve(client, run_id)
        end = runs[runs["run_id"] == run_id].iloc[0]
        curves.append(TargetCurve(arm, tokens, loss, float(end["D"]), float(end["loss"])))
    return curves


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    sys.exit(app())
