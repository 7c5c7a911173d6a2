"""`proxies launch`: plan, train and score the target run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scaling.common.cli import DryRun, Json, Uri, refusing, say
from scaling.common.json_text import dump_json
from scaling.common.signals import exit_code_of, interrupt_on_sigterm
from scaling.common.studies import find_study_file

if TYPE_CHECKING:
    from proxies.launch.plan import Arm, Engine, LaunchPlan

logger = logging.getLogger("muscale.proxies")


def launch(
    plan: Annotated[
        str, typer.Argument(metavar="STUDY.toml | NAME | PLAN.json", help="a study with a recommendation, or its plan")
    ],
    arms: Annotated[
        Literal["both", "warm", "scratch"], typer.Option(help="the arms to train; train only one of a large run")
    ] = "both",
    ranks: Annotated[int | None, typer.Option(min=1, help="processes on each node; default: the plan's, 1")] = None,
    engine: Annotated[
        Literal["plain", "ddp", "fsdp2"] | None,
        typer.Option(help="default: plain for one process, else fsdp2 on GPUs and ddp on CPUs"),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="machines, with --print-command")] = None,
    max_restarts: Annotated[
        int | None, typer.Option(min=0, help="restarts after a process was killed; default: the plan's, 3")
    ] = None,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="print the command of each node, and train nothing")
    ] = False,
    only: Annotated[
        Literal["warm", "scratch"] | None, typer.Option(hidden=True, help="train this arm in this process")
    ] = None,
    dry_run: DryRun = False,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """Train the target with its recommended settings: one arm warm-started from the best proxy, and one from scratch.

    Exit code 3: trained, but not scored, because MLflow does not answer; run the same command again later.

    Example: proxies launch studies/quickstart.toml --dry-run
    """
    from proxies.launch.arms import ArmResult, TrackingUnavailable, format_commands, train_arm
    from proxies.launch.arms import launch as launch_arms
    from proxies.launch.plan import write_plan
    from proxies.launch.preflight import check_age, check_launch

    with refusing():
        launch_plan, path = find_plan(plan, tracking_uri)
        if only:
            check_launch(launch_plan, path.parent, [only])
        else:
            launch_plan = apply_options(launch_plan, ranks, nodes, engine, max_restarts)
            chosen: list[Arm] = list(launch_plan.arms) if arms == "both" else [arms]
            waiting = [arm for arm in chosen if ArmResult.read(path.parent, arm) is None]
            # A dry run is only for reading the plan, so --quiet does not hide it there.
            if dry_run:
                say(str(launch_plan))
            else:
                logger.info(str(launch_plan))
            check_launch(launch_plan, path.parent, waiting)
            if remark := check_age(launch_plan, path.parent, uri=tracking_uri):
                logger.warning(f"note: {remark}")
            if launch_plan.nodes > 1 and not print_command and not dry_run:
                raise ValueError(
                    f"{launch_plan.nodes} nodes cannot be started from here: --print-command shows what to run on each"
                )
    if only:
        try:
            with refusing(), interrupt_on_sigterm():
                train_arm(launch_plan, only, path.parent, uri=tracking_uri)
        except KeyboardInterrupt as stop:
            raise typer.Exit(exit_code_of(stop)) from stop
        return
    if print_command or dry_run:
        write_plan(launch_plan, path)
        say(f"the plan is in {path};\nlaunch it, edit it or move it; nothing was started")
        if print_command:
            typer.echo(format_commands(launch_plan, path, chosen, uri=tracking_uri))
        return
    try:
        with interrupt_on_sigterm():
            outcome = launch_arms(launch_plan, path, arms=chosen, uri=tracking_uri)
    except KeyboardInterrupt as stop:
        say(f"stopped; `proxies launch {path}` continues where it stopped")
        raise typer.Exit(exit_code_of(stop)) from stop
    except TrackingUnavailable as gone:
        say(
            f"trained, but not scored: {gone}; nothing is lost: `proxies launch {path}` sends the records and scores, "
            "without training again"
        )
        raise typer.Exit(3) from gone
    except RuntimeError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(dump_json(outcome))
        return
    for name, value in outcome.items():
        typer.echo(f"{name}: {value}")


def find_plan(source: str, uri: str | None) -> tuple[LaunchPlan, Path]:
    """Read a plan from its file, or make the plan of a study.

    A plan whose training has begun is read from its file, so that it keeps the prediction that was launch_plan before.

    Args:
        source: A plan's file, a study file, or the name of a study in `studies/`.
        uri: The MLflow store.

    Returns:
        The plan and its file, which need not exist yet.

    Raises:
        ValueError: If there is no such file, or no plan can be launch_plan.
    """
    from proxies.launch.plan import read_plan
    from proxies.launch.planner import make_plan
    from proxies.launch.preflight import has_begun

    if source.endswith(".json"):
        return read_plan(Path(source)), Path(source)
    toml = find_study_file(source)
    launch_plan = make_plan(toml, uri=uri)
    path = toml.parent / toml.stem / f"target-{launch_plan.id}" / "plan.json"
    if path.is_file() and has_begun(path.parent):
        return read_plan(path), path
    return launch_plan, path


def apply_options(
    plan: LaunchPlan, ranks: int | None, nodes: int | None, engine: Engine | None, max_restarts: int | None
) -> LaunchPlan:
    """Return the plan with other processes.

    Args:
        plan: The plan.
        ranks: Processes on each node; None for the plan's.
        nodes: Machines; None for the plan's.
        engine: The engine; None for one that fits the number of processes.
        max_restarts: Restarts of a killed process; None for the plan's.
    """
    from proxies.launch.plan import LaunchPlan

    options = {"ranks": ranks, "nodes": nodes, "engine": engine, "max_restarts": max_restarts}
    changes = {name: value for name, value in options.items() if value is not None}
    if not changes:
        return plan
    world = (ranks or plan.ranks) * (nodes or plan.nodes)
    if engine is None and world == 1:
        changes["engine"] = "plain"
    elif engine is None and plan.engine == "plain":
        import torch

        changes["engine"] = "fsdp2" if torch.cuda.is_available() else "ddp"
    return LaunchPlan.model_validate(plan.model_dump() | changes)
