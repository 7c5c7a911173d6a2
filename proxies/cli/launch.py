"""`proxies launch`: the target, planned, trained and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scaling.common.cli import DryRun, Json, Uri, refusing, say
from scaling.common.signals import exit_code_of, interrupt_on_sigterm

if TYPE_CHECKING:
    from proxies.launch.plan import Arm, Engine, LaunchPlan


def launch(
    plan: Annotated[
        str, typer.Argument(metavar="STUDY.toml | NAME | PLAN.json", help="a study with a recommendation, or its plan")
    ],
    arms: Annotated[
        Literal["both", "warm", "scratch"], typer.Option(help="what to train; a large run wants one")
    ] = "both",
    ranks: Annotated[int | None, typer.Option(min=1, help="processes on each node; default: the plan's, 1")] = None,
    engine: Annotated[
        Literal["plain", "ddp", "fsdp2"] | None,
        typer.Option(help="default: plain for one process, else fsdp2 on GPUs and ddp on CPUs"),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="with --print-command: machines")] = None,
    max_restarts: Annotated[int | None, typer.Option(min=0, help="of a killed process; default 3")] = None,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="the command of each node, and nothing else")
    ] = False,
    only: Annotated[Literal["warm", "scratch"] | None, typer.Option(hidden=True, help="train this arm here")] = None,
    dry_run: DryRun = False,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """Train the target with its recommended settings: warm-started from the best proxy, and a twin from scratch.

    Exit code 3: trained, but MLflow was away, so that it is not scored yet; the same command does that later.

    Example: proxies launch studies/quickstart.toml --dry-run
    """
    from proxies.launch.arms import ArmResult, TrackingUnavailable, format_commands, train_arm
    from proxies.launch.arms import launch as go
    from proxies.launch.plan import write_plan
    from proxies.launch.preflight import check_age, check_launch

    with refusing():
        made, path = find_plan(plan, tracking_uri)
        if only:
            check_launch(made, path.parent, [only])
        else:
            made = apply_options(made, ranks, nodes, engine, max_restarts)
            chosen: list[Arm] = list(made.arms) if arms == "both" else [arms]
            left = [arm for arm in chosen if ArmResult.read(path.parent, arm) is None]
            say(str(made))
            check_launch(made, path.parent, left)
            if remark := check_age(made, path.parent, uri=tracking_uri):
                say(f"note: {remark}")
            if made.nodes > 1 and not print_command and not dry_run:
                raise ValueError(
                    f"{made.nodes} nodes are not started from here: --print-command says what to run on each"
                )
    if only:
        try:
            with refusing(), interrupt_on_sigterm():
                train_arm(made, only, path.parent, uri=tracking_uri)
        except KeyboardInterrupt as stop:
            raise typer.Exit(exit_code_of(stop)) from stop
        return
    if print_command or dry_run:
        write_plan(made, path)
        say(f"the plan is in {path}: launch it, edit it or move it; nothing was started")
        if print_command:
            typer.echo(format_commands(made, path, chosen, uri=tracking_uri))
        return
    try:
        with interrupt_on_sigterm():
            outcome = go(made, path, arms=chosen, uri=tracking_uri)
    except KeyboardInterrupt as stop:
        say(f"stopped; `proxies launch {path}` goes on where it was")
        raise typer.Exit(exit_code_of(stop)) from stop
    except TrackingUnavailable as gone:
        say(
            f"trained, but not scored: {gone}; nothing is lost: `proxies launch {path}` sends the records and scores, training nothing again"
        )
        raise typer.Exit(3) from gone
    except RuntimeError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(outcome))
        return
    for name, value in outcome.items():
        typer.echo(f"{name}: {value}")


def find_plan(source: str, uri: str | None) -> tuple[LaunchPlan, Path]:
    """The plan of a file, or of a study, and its file. One that has begun to train keeps the prediction made before."""
    from proxies.launch.plan import read_plan
    from proxies.launch.planner import make_plan
    from proxies.launch.preflight import has_begun

    if source.endswith(".json"):
        return read_plan(Path(source)), Path(source)
    toml = Path(source) if source.endswith(".toml") else Path("studies") / f"{source}.toml"
    if not toml.is_file():
        raise ValueError(f"no study file {toml}")
    made = make_plan(toml, uri=uri)
    path = toml.parent / toml.stem / f"target-{made.id}" / "plan.json"
    if path.is_file() and has_begun(path.parent):
        return read_plan(path), path
    return made, path


def apply_options(
    plan: LaunchPlan, ranks: int | None, nodes: int | None, engine: Engine | None, max_restarts: int | None
) -> LaunchPlan:
    """The plan as the options want it run."""
    from proxies.launch.plan import LaunchPlan

    given = {"ranks": ranks, "nodes": nodes, "engine": engine, "max_restarts": max_restarts}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return plan
    world = (ranks or plan.ranks) * (nodes or plan.nodes)
    if engine is None and world == 1:
        changes["engine"] = "plain"
    elif engine is None and plan.engine == "plain":
        import torch

        changes["engine"] = "fsdp2" if torch.cuda.is_available() else "ddp"
    return LaunchPlan.model_validate(plan.model_dump() | changes)
