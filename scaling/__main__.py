"""The `scaling` command: fit laws to logged runs, ask them about a larger run, draw it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.cli import Json, Uri, refusing

if TYPE_CHECKING:
    import pandas as pd

    from scaling.report import TargetCurve

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Source = Annotated[str, typer.Argument(help="a study's name (MLflow experiment), or a .csv, .parquet or .jsonl file")]


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="a .csv, .parquet or .jsonl file, or a study's name")],
    out: Annotated[Path, typer.Option("--out", help="where the checked table goes: .parquet, .csv or .jsonl")],
    tracking_uri: Uri = None,
) -> None:
    """Check a table of runs and write it with its columns in order.

    Example: scaling import sweep.csv --out sweep.parquet
    """
    from scaling.runs import load_runs, save_runs

    with refusing():
        runs = load_runs(source, tracking_uri=tracking_uri)
        save_runs(runs, out)
    typer.echo(
        f"{len(runs)} runs ({int(runs['diverged'].sum())} diverged) in {runs.groupby(['N', 'D']).ngroups} (N, D) groups: {out}"
    )


@app.command()
def fit(source: Source, tracking_uri: Uri = None, as_json: Json = False) -> None:
    """Fit the learning-rate/batch law and the loss law to all runs; say how far each can be trusted.

    Example: scaling fit quickstart
    """
    from scaling.fit import FitError, fit_loss_law
    from scaling.hpfit import fit_hp_law

    with refusing():
        runs = load_proxies(source, tracking_uri)
        hp = fit_hp_law(runs)
        floors = hp.floors
        try:
            law = fit_loss_law(floors["N"].to_numpy(), floors["D"].to_numpy(), floors["loss"].to_numpy(), bootstrap=400)
        except FitError as error:
            typer.echo(f"no loss law: {error}", err=True)
            raise typer.Exit(3) from error
    columns = {p: [getattr(s, p) for s in law.samples] for p in ("E", "A", "B", "alpha", "beta")}
    said: dict[str, Any] = {
        "runs": len(runs),
        "groups": len(floors),
        "loss_law": {p: getattr(law.law, p) for p in columns},
        "loss_law_90": {p: quantiles(v) for p, v in columns.items()},
        "loss_law_status": law.status,
        "hp_law": vars(hp.law),
        "hp_law_status": hp.status,
        "floors": floors.to_dict("records"),
    }
    record(source, tracking_uri, "fit", {k: v for k, v in said.items() if k != "floors"})
    if as_json:
        typer.echo(json.dumps(said, default=float))
        return
    typer.echo(f"{len(runs)} runs in {len(floors)} groups of equal N and D\n")
    typer.echo(f"{'N':>12} {'D':>14} {'runs':>5} {'fitted minimum':>15}")
    for row in floors.itertuples():
        typer.echo(f"{row.N:>12,.0f} {row.D:>14,.0f} {row.n:>5} {row.loss:>15.4f}")
    typer.echo("\nloss(N, D) = E + A / N^alpha + B / D^beta, with 90 % bootstrap intervals")
    for p, (lo, hi) in said["loss_law_90"].items():
        typer.echo(f"  {p:6s} {said['loss_law'][p]:<10.4g} ({lo:.4g}, {hi:.4g})")
    typer.echo(f"  status: {law.status}\n\nlr*(N, D) and B*(N, D)")
    for D in sorted(floors["D"].unique()):
        for N in sorted(floors.loc[floors["D"] == D, "N"].unique()):
            lr, batch = (float(v) for v in hp.law(N, D))
            (a, b), (c, d) = hp.interval(N, D, mass=0.9)
            typer.echo(
                f"  N {N:>10,.0f}  D {D:>12,.0f}  lr {lr:.4g} ({a:.4g}, {b:.4g})  batch {batch:,.0f} ({c:,.0f}, {d:,.0f}) tokens"
            )
    typer.echo(f"  status: {hp.status}")


@app.command()
def recommend(
    source: Source,
    target: Annotated[bool, typer.Option("--target", help="for the [target] of the study's file")] = False,
    params: Annotated[float | None, typer.Option("--params", help="N, parameters that multiply tokens")] = None,
    tokens: Annotated[float | None, typer.Option("--tokens", help="D, training tokens")] = None,
    flops: Annotated[float | None, typer.Option("--flops", help="C, training FLOPs: N and D are chosen, too")] = None,
    mass: Annotated[float, typer.Option(min=0.01, max=0.99, help="of every interval")] = 0.9,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """The learning rate, batch size and loss to expect of a larger run, with intervals and warnings. Exit code 3: do not trust it.

    Example: scaling recommend quickstart --target
    Example: scaling recommend runs.csv --params 7e9 --tokens 1.4e12 --json
    """
    from scaling.recommendation import recommend as ask

    with refusing():
        runs = load_proxies(source, tracking_uri)
        space = None
        if not is_file(source):
            from scaling import tracking

            client = tracking.connect(tracking_uri)
            parent = tracking.find_study_run(client, source)
            space = tracking.read_note(client, parent, "space")
            if target:
                wanted = tracking.read_note(client, parent, "target")
                if wanted is None:
                    raise ValueError(f"study {source!r} has no [target]: give --params and --tokens, or --flops")
                params, tokens = wanted["N"], wanted["D"]
        elif target:
            raise ValueError(f"--target needs a study, got the file {source}: give --params and --tokens, or --flops")
        answer = ask(runs, N=params, D=tokens, C=flops, mass=mass, space=space)
    if target:
        record(source, tracking_uri, "recommendation", answer.to_dict())
    typer.echo(json.dumps(answer.to_dict()) if as_json else str(answer))
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
    from scaling import tracking
    from scaling.recommendation import Recommendation
    from scaling.report import render
    from scaling.runs import load_runs

    with refusing():
        runs = load_runs(source, tracking_uri=tracking_uri)
        if is_file(source):
            path = out or Path(source).with_suffix(".html")
            path.write_text(render(Path(source).stem, runs))
            typer.echo(f"report: {path}")
            return
        client = tracking.connect(tracking_uri)
        parent = tracking.find_study_run(client, source)
        note = tracking.read_note(client, parent, "recommendation")
        answer = Recommendation.from_dict(note) if note else None
        warm = tracking.read_note(client, parent, "warm_start")
        curves = target_curves(client, runs, tracking.read_note(client, parent, "targets") or {})
        page = render(source, runs, recommendation=answer, targets=curves, warm_start=warm)
        path = out or Path("studies") / source / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page)
        tracking.log_file(client, parent, path)
    if answer:
        typer.echo(str(answer))
        lo, hi = answer.loss_interval
        for curve in curves:
            place = "inside" if lo <= curve.final_loss <= hi else "outside"
            typer.echo(
                f"measured, {curve.name:8s} {curve.final_loss:.4f}: {place} the {100 * answer.mass:.0f} % interval ({lo:.4f}, {hi:.4f})"
            )
    for name, value in (warm or {}).items():
        if "interval" not in name:  # said above, with the interval
            typer.echo(f"{name}: {value}")
    typer.echo(f"\nreport     {path}")
    typer.echo(f"runs       mlflow ui --backend-store-uri {client.tracking_uri}")
    journal = Path("studies") / source / "study.journal"
    if journal.exists():
        typer.echo(f"trials     optuna-dashboard {journal}")


def is_file(source: str) -> bool:
    return Path(source).suffix in (".csv", ".parquet", ".jsonl")


def load_proxies(source: str, tracking_uri: str | None) -> pd.DataFrame:
    """The runs that laws are fitted to."""
    from scaling.runs import load_runs

    runs = load_runs(source, tracking_uri=tracking_uri)
    return runs[runs["role"] != "target"]


def record(source: str, tracking_uri: str | None, name: str, value: dict[str, Any]) -> None:
    """Keep an answer with the study that it came from (a file has no place for it)."""
    if is_file(source):
        return
    from scaling import tracking

    client = tracking.connect(tracking_uri)
    parent = tracking.find_study_run(client, source)
    tracking.write_note(client, parent, name, json.loads(json.dumps(value, default=float)))
    if name == "recommendation":
        tracking.log_summary(
            client, parent, {f"recommended_{k}": float(value[k]) for k in ("lr", "batch_tokens", "loss")}
        )


def quantiles(values: list[float]) -> tuple[float, float]:
    import numpy as np

    lo, hi = np.percentile(values, [5, 95])
    return float(lo), float(hi)


def target_curves(client: Any, runs: pd.DataFrame, arms: dict[str, str]) -> list[TargetCurve]:
    """The curves of the target launched last. arms: its name of each arm -> run id."""
    from scaling import tracking
    from scaling.report import TargetCurve

    curves = []
    for arm, run_id in arms.items():
        tokens, loss = tracking.read_curve(client, run_id)
        end = runs[runs["run_id"] == run_id].iloc[0]
        curves.append(TargetCurve(arm, tokens, loss, float(end["D"]), float(end["loss"])))
    return curves


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(app())
