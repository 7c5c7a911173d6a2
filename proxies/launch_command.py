"""`proxies launch`: the target, planned, trained and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from proxies.commands import read_family
from scaling.cli import DryRun, Json, Uri, interrupted_code, refusing, sigterm_as_interrupt


def launch(
    plan: Annotated[
        str, typer.Argument(metavar="STUDY.toml | NAME | PLAN.json", help="a study with a recommendation, or its plan")
    ],
    only: Annotated[Literal["warm", "scratch"] | None, typer.Option(help="one arm instead of both")] = None,
    dry_run: DryRun = False,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """Train the target with its recommended settings: warm-started from the best proxy, and a twin from scratch.

    Example: proxies launch studies/quickstart.toml
    """
    from proxies import launch as launching

    with refusing():
        if plan.endswith(".json"):
            path = Path(plan)
            if not path.is_file():
                raise ValueError(f"no plan {path}")
            made, folder = launching.read_plan(path), path.parent
        else:
            _, toml = read_family(plan)
            made = launching.make_plan(toml, uri=tracking_uri)
            folder = toml.parent / toml.stem / f"target-{made.id}"
    if only:
        try:
            with sigterm_as_interrupt():
                launching.train_arm(made, only, folder, uri=tracking_uri)
        except KeyboardInterrupt as stop:
            raise typer.Exit(interrupted_code(stop)) from stop
        return
    typer.echo(str(made), err=True)
    typer.echo(f"  about {launching.estimate_seconds(made) / 60:.1f} core-minutes", err=True)
    if dry_run:
        return
    try:
        with sigterm_as_interrupt():
            outcome = launching.launch(made, folder, uri=tracking_uri)
    except KeyboardInterrupt as stop:
        typer.echo(f"stopped; `proxies launch {folder / 'plan.json'}` goes on where it was", err=True)
        raise typer.Exit(interrupted_code(stop)) from stop
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(outcome))
        return
    for name, value in outcome.items():
        typer.echo(f"{name}: {value}")
