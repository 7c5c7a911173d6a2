"""The `scaling` command: fit laws to logged runs, ask them about a larger run, draw it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.common.cli import Json, Uri, make_app, refusing, say
from scaling.common.quantities import read_count
from scaling.common.redact import redact_passwords
from scaling.runs.io import is_table_file

if TYPE_CHECKING:
    import pandas as pd

    from scaling.report.figures import TargetCurve

app = make_app(__doc__)

Source = Annotated[
    str, typer.Argument(help="a study's name (MLflow experiment), or a .csv, .parquet, .jsonl or .json file")
]
LONG = ("floors", "optima", "forms", "approaches", "beside", "run_ids")  # not kept with a study: a note is short


def parse_count(text: str) -> float:
    """Return a number of parameters, tokens or FLOPs from the command line, such as 7B or 7e9."""
    try:
        return read_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="a .csv, .parquet, .jsonl or .json file, or an MLflow experiment")],
    out: Annotated[Path, typer.Option("--out", help="where the checked table goes: .parquet, .csv, .jsonl or .json")],
    map_: Annotated[list[str] | None, typer.Option("--map", help="OURS=COLUMN[:UNIT...]; may be repeated")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="OURS=VALUE for all rows; may be repeated")] = None,
    mapping: Annotated[Path | None, typer.Option(help="a .toml file with the tables map and set")] = None,
    metric: Annotated[str, typer.Option(help="of an MLflow metric's history: last or min")] = "last",
    tracking_uri: Uri = None,
) -> None:
    """Read runs from a file (also as W&B exports them) or an MLflow experiment, check them, and write one run table.

    Diverged and unfinished runs stay in it, marked; laws leave them out. Units: N=params:total, D=step:steps, D=tokens:billions,
    batch_tokens=batch_size:sequences, loss=val_loss:bits, ... (all of them: scaling/runs/units.py).

    Example: scaling import sweep.csv --out sweep.parquet --map N=params --map D=step:steps --map batch_tokens=bs:sequences --set seq_len=2048
    """
    from scaling.runs.importer import import_runs, summarize_exclusions, read_mapping
    from scaling.runs.io import check_writable, save_runs

    with refusing():
        check_writable(out)
        mapped, constants = read_mapping(mapping) if mapping else ({}, {})
        mapped |= pairs("--map", map_ or [])
        constants |= pairs("--set", set_ or [])
        runs, remarks = import_runs(
            source, mapping=mapped, constants=constants, metric=metric, tracking_uri=tracking_uri
        )
        save_runs(runs, out)
    for line in [*remarks, *summarize_exclusions(runs)]:
        say(line)
    typer.echo(
        f"{len(runs)} runs ({int(runs['diverged'].sum())} diverged) in {runs.groupby(['N', 'D']).ngroups} (N, D) groups: {out}"
    )


@app.command()
def fit(
    source: Source,
    compare: Annotated[bool, typer.Option(help="the forms of the loss law and the approaches side by side")] = True,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """Fit the learning-rate/batch law and the loss law to all runs; say how far each can be trusted. Exit code 3: no loss law.

    Example: scaling fit quickstart
    Example: scaling fit runs.csv --no-compare --json
    """
    from scaling.report.fit_summary import summarize_fits, format_summary
    from scaling.runs.io import load_runs

    with refusing():
        said = summarize_fits(load_runs(source, tracking_uri=tracking_uri), compare=compare)
    record(source, tracking_uri, "fit", {k: v for k, v in said.items() if k not in LONG})
    typer.echo(json.dumps(said, allow_nan=False) if as_json else format_summary(said))
    if said["loss_law"] is None:
        raise typer.Exit(3)


@app.command()
def recommend(
    source: Source,
    target: Annotated[bool, typer.Option("--target", help="for the [target] of the study's file")] = False,
    params: Annotated[
        float | None,
        typer.Option("--params", parser=parse_count, metavar="N", help="parameters that multiply tokens: 7B, 7e9"),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option("--tokens", parser=parse_count, metavar="D", help="training tokens: 1.4T, 1.4e12")
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option("--flops", parser=parse_count, metavar="C", help="training FLOPs: N and D are chosen, too"),
    ] = None,
    mass: Annotated[float, typer.Option(min=0.01, max=0.99, help="of every interval")] = 0.9,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="a published law to show beside: step-law, deepseek, ..., all; may be repeated"),
    ] = None,
    next_run: Annotated[bool, typer.Option("--next/--no-next", help="say which run would narrow it most")] = True,
    at_most: Annotated[
        float | None,
        typer.Option(
            parser=parse_count,
            metavar="C",
            help="FLOPs of that run; default 3 x the largest, a tenth of the target at most",
        ),
    ] = None,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """The learning rate, batch size and loss to expect of a larger run, with intervals and warnings. Exit code 3: do not trust it.

    Example: scaling recommend quickstart --target
    Example: scaling recommend runs.csv --params 7B --tokens 1.4T --beside step-law
    Example: scaling recommend runs.csv --flops 1e21 --no-next --json
    """
    from scaling.advice.recommendation import UNTRUSTED
    from scaling.advice.recommendation import recommend as ask
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
                wanted = read_note(client, parent, "target")
                if wanted is None:
                    raise ValueError(f"study {source!r} has no [target]: give --params and --tokens, or --flops")
                params, tokens = wanted["N"], wanted["D"]
        elif target:
            raise ValueError(f"--target needs a study, got the file {source}: give --params and --tokens, or --flops")
        try:
            answer = ask(
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
        record(source, tracking_uri, "recommendation", {k: v for k, v in answer.to_dict().items() if k not in LONG})
    typer.echo(json.dumps(answer.to_dict(), allow_nan=False) if as_json else str(answer))
    if not answer.trustworthy:
        raise typer.Exit(3)


@app.command()
def report(
    source: Source,
    out: Annotated[Path | None, typer.Option("--out", help="default: studies/NAME/report.html")] = None,
    tracking_uri: Uri = None,
) -> None:
    """Draw everything that is known of a study into one HTML file, and print the answer in short.

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
        if out is None and Path(source).name != source:  # MLflow knows names that would lead elsewhere
            raise ValueError(f"{source!r} is no name of a folder in studies/: say --out")
        client = connect(tracking_uri)
        parent = find_study_run(client, source)
        note = read_note(client, parent, "recommendation")
        answer = Recommendation.from_dict(note) if note else None
        warm = read_note(client, parent, "warm_start")
        curves = target_curves(client, runs, read_note(client, parent, "targets") or {})
        before = answer  # what was predicted before the target ran: since then laws may have learnt from it
        if answer and (told := read_note(client, parent, "predicted")):
            before = Recommendation.from_dict(answer.to_dict() | told)
        page = render_report(
            source,
            runs,
            recommendation=answer,
            predicted=before,
            targets=curves,
            warm_start=warm,
            curves=read_study_curves(client, runs),
        )
        path = out or Path("studies") / source / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page)
        log_file(client, parent, path)
    if answer and before:
        typer.echo(str(answer))
        lo, hi = before.loss_interval
        for curve in curves:
            place = "inside" if lo <= curve.final_loss <= hi else "outside"
            typer.echo(
                f"measured, {curve.name:8s} {curve.final_loss:.4f}: {place} the {100 * before.mass:.0f} % interval ({lo:.4f}, {hi:.4f})"
            )
    for name, value in (warm or {}).items():
        if "interval" not in name:  # said above, with the interval
            typer.echo(f"{name}: {value}")
    typer.echo(f"\nreport     {path}")
    typer.echo(f"runs       mlflow ui --backend-store-uri {redact_passwords(client.tracking_uri)}")
    journal = Path("studies") / source / "study.journal"
    if journal.exists():
        typer.echo(f"trials     optuna-dashboard {journal}")


def pairs(option: str, given: list[str]) -> dict[str, str]:
    """{"N": "params"} of ["N=params"]."""
    wrong = [text for text in given if "=" not in text.lstrip("=")]
    if wrong:
        raise ValueError(f"{option} needs OURS=..., got {', '.join(wrong)}")
    return {name.strip(): value.strip() for name, _, value in (text.partition("=") for text in given)}


def record(source: str, tracking_uri: str | None, name: str, value: dict[str, Any]) -> None:
    """Keep an answer with the study that it came from (a file has no place for it)."""
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


def target_curves(client: Any, runs: pd.DataFrame, arms: dict[str, str]) -> list[TargetCurve]:
    """The curves of the target launched last. arms: its name of each arm -> run id."""
    from scaling.report.figures import TargetCurve
    from scaling.tracking.log import read_curve

    curves = []
    for arm, run_id in arms.items():
        tokens, loss = read_curve(client, run_id)
        end = runs[runs["run_id"] == run_id].iloc[0]
        curves.append(TargetCurve(arm, tokens, loss, float(end["D"]), float(end["loss"])))
    return curves


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(app())
