"""The `hpo` command: check, launch, resume, extend and read studies."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.common.cli import DryRun, Json, Uri, make_app, refusing, say
from scaling.common.signals import ignore_signals

if TYPE_CHECKING:
    from hpo.launch.estimate import Estimate

app = make_app(__doc__)

Study = Annotated[str, typer.Argument(metavar="STUDY.toml | NAME", help="a study file, or the name of one in studies/")]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar="MUSCALE_STORAGE",
        metavar="URL",
        help="where the study is kept: postgresql://..., grpc://HOST:PORT, ...; default: its journal file",
    ),
]
Count = Annotated[int | None, typer.Option("--workers", min=1, help="how many; default: the study's")]
Executor = Annotated[
    str, typer.Option(metavar="local|ray", help="where workers run: processes here, or a Ray cluster's nodes")
]
Address = Annotated[str, typer.Option(metavar="HOST:PORT", help="of the Ray cluster; auto: the one of this machine")]


@app.command()
def validate(study: Study) -> None:
    """Check a study file and all that it names; exit code 2 with every mistake by field name.

    Example: hpo validate studies/quickstart.toml
    """
    from hpo.study.config import load_study
    from scaling.common.studies import find_study_file

    with refusing():
        path = find_study_file(study)
        config, trainer = load_study(path)
        trainer.manifest()  # reads the data: what cannot be read is refused, too
    typer.echo(f"{path}: good")
    show_example(config, trainer)


@app.command()
def launch(
    study: Study,
    count: Count = None,
    storage: Storage = None,
    executor: Executor = "local",
    address: Address = "auto",
    dry_run: DryRun = False,
    tracking_uri: Uri = None,
) -> None:
    """Start a study: train proxies with local workers until its budget is spent.

    Example: hpo launch studies/quickstart.toml
    """
    from hpo.launch.estimate import estimate_cost
    from hpo.launch.launcher import supervise
    from hpo.study.config import load_study
    from hpo.study.files import StudyFiles
    from hpo.study.lifecycle import create_study, open_search, refuse_existing, can_resume
    from scaling.common.studies import find_study_file

    ray = ray_at(executor, address)
    with refusing():
        files = StudyFiles(find_study_file(study))
        config, trainer = load_study(files.toml)
        config = config.with_workers(count)
        trainer.manifest()  # reads the data: what cannot be read is refused before anything is written
        show_example(config, trainer)
        if not dry_run:
            refuse_existing(files, uri=tracking_uri)
        cost = estimate_cost(open_search(config, trainer, None), config, trainer)
    typer.echo(f"{files.name}: {describe(cost)}", err=True)
    if not can_resume(trainer):
        say("  a longer run cannot go on from a shorter one with this trainer: promotions start afresh")
    if dry_run:
        return
    with refusing():
        search = create_study(files, config, trainer, uri=tracking_uri, storage=storage)
    finish(supervise(files, search, config.workers, cost, uri=tracking_uri, storage=storage, ray=ray), files.name)


@app.command()
def resume(
    study: Study,
    count: Count = None,
    storage: Storage = None,
    executor: Executor = "local",
    address: Address = "auto",
    dry_run: DryRun = False,
    tracking_uri: Uri = None,
) -> None:
    """Go on with a study that was stopped, at the same budget: nothing is lost, nothing runs twice.

    Example: hpo resume quickstart
    """
    go_on(study, None, count, storage, ray_at(executor, address), dry_run, tracking_uri)


@app.command()
def extend(
    study: Study,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="the new largest run: the old one times a power of eta")
    ],
    count: Count = None,
    storage: Storage = None,
    executor: Executor = "local",
    address: Address = "auto",
    dry_run: DryRun = False,
    tracking_uri: Uri = None,
) -> None:
    """Raise a study's largest run and pay only the difference.

    Example: hpo extend quickstart --max-tokens 1105920
    """
    go_on(study, max_tokens, count, storage, ray_at(executor, address), dry_run, tracking_uri)


@app.command()
def worker(
    study: Study,
    confirm: Annotated[bool, typer.Option("--confirm", help="train what `hpo confirm` has planned")] = False,
    storage: Storage = None,
    tracking_uri: Uri = None,
) -> None:
    """One worker of a study that was launched; any number may be started and stopped at any time, here or on other machines that
    see its folder.

    Example: hpo worker quickstart --storage postgresql://me@server/studies
    """
    from hpo.confirm import runs
    from hpo.study.files import StudyFiles
    from hpo.worker.loop import run_worker
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        code = runs.run_confirmation_worker(files, uri=tracking_uri) if confirm else run_worker(files, uri=tracking_uri, storage=storage)
    # One more signal while Python shuts down is no error to show.
    ignore_signals()
    raise typer.Exit(code)


@app.command()
def status(study: Study, storage: Storage = None, as_json: Json = False) -> None:
    """How far a study is, what it spent, and what resuming and raising saved.

    Example: hpo status quickstart
    """
    from dataclasses import asdict

    from hpo.launch.progress import format_spending

    search, _ = open_existing(study, storage)
    now = search.progress
    if as_json:
        typer.echo(json.dumps(asdict(now) | {"finished": search.finished}))
        return
    planned = f" of {now.planned}" if now.planned else ""
    typer.echo(
        f"{now.done}{planned} evaluations done, {now.running} running, {now.diverged} diverged, {now.configurations} configurations"
    )
    typer.echo(format_spending(now))
    typer.echo("finished" if search.finished else f"unfinished: `hpo resume {study}` goes on")


@app.command()
def best(study: Study, storage: Storage = None, as_json: Json = False) -> None:
    """The search's own answer for the target, how much of its lead may be noise, which rungs tell of the target, and what `hpo
    confirm` found.

    --json prints the parameters alone.

    Example: hpo best quickstart --json
    """
    from hpo.confirm.runs import read_confirmation
    from hpo.confirm.verdict import describe_confirmation, is_current, describe_lead

    search, files = open_existing(study, storage)
    with refusing():
        answer = search.best()
    if as_json:
        typer.echo(json.dumps(answer))
        return
    typer.echo(f"for N {search.target.N:,.0f}, D {search.target.D:,.0f}:")
    for name, value in answer.items():
        typer.echo(f"  {name} = {value:.4g}" if isinstance(value, float) else f"  {name} = {value}")
    typer.echo(describe_lead(search, answer, files.name))
    for at, found in search.usefulness().items():
        warning = "" if found > 0.5 else ": its ranks say little about the target" if found > 0.1 else ": it misleads"
        typer.echo(f"N {at.N:,.0f}, D {at.D:,.0f}: losses go with the target's by {found:.2f}{warning}")
    confirmed = read_confirmation(files)
    if confirmed:
        of = (
            "confirmed"
            if is_current(confirmed, search, answer)
            else "not of today's answer and size, but of an earlier one:"
        )
        typer.echo(f"{of} {describe_confirmation(confirmed)}")


@app.command()
def confirm(
    study: Study,
    seeds: Annotated[int, typer.Option(min=2, help="fresh seeds for each of the two")] = 5,
    against: Annotated[
        int | None,
        typer.Option(metavar="CONFIG", help="number of the configuration to compare with; default: the runner-up"),
    ] = None,
    storage: Storage = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    tracking_uri: Uri = None,
) -> None:
    """Train the search's answer and its runner-up at the largest run on fresh seeds, and say whether the lead held.

    Run it again to go on with one that was stopped, or with more seeds: what is trained is kept.

    Example: hpo confirm quickstart --seeds 5
    """
    from dataclasses import asdict

    from hpo.confirm.runs import conclude, estimate_confirmation, locate_confirmation, make_plan, supervise
    from hpo.confirm.verdict import describe_confirmation
    from hpo.study import lifecycle
    from hpo.study.config import load_study
    from hpo.study.files import StudyFiles
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        config, trainer = load_study(files.toml)
        search = lifecycle.open_existing(files, config, trainer, storage=storage)
        show_example(config, trainer)
        plan = make_plan(search, locate_confirmation(files), seeds, against)
        cost = estimate_confirmation(plan, locate_confirmation(files), config, trainer)
    say(f"{files.name}: {plan.answer} against {plan.rival}, {seeds} fresh seeds each at {plan.at}")
    say(f"{files.name}: {cost.evaluations} of {len(plan.runs)} runs left, {describe_work(cost)}")
    if not search.finished:
        say("the search is not finished: its answer may change")
    if dry_run:
        if as_json:
            typer.echo(plan.model_dump_json())
        return
    if cost.evaluations:
        code = supervise(files, plan, config, cost, uri=tracking_uri)
        if code:
            raise typer.Exit(code)
    with refusing():
        outcome = asdict(conclude(files, plan, uri=tracking_uri))
    typer.echo(json.dumps(outcome) if as_json else describe_confirmation(outcome))


@app.command()
def forget(
    study: Study,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    storage: Storage = None,
    tracking_uri: Uri = None,
) -> None:
    """Remove what a study made (its folder with all checkpoints, its runs in MLflow, itself where --storage keeps it), so that it can be launched afresh.

    Example: hpo forget quickstart --yes
    """
    from hpo.study import lifecycle
    from hpo.study.files import StudyFiles
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
    if not yes:
        typer.confirm(f"remove {files.folder} and the runs of study {files.name!r} in MLflow?", abort=True)
    with refusing():
        gone = lifecycle.delete_study(files, uri=tracking_uri, storage=storage)
    typer.echo(f"{files.name}: " + ("removed" if gone else "there was nothing to remove"))


def ray_at(executor: str, address: str) -> str | None:
    """The address of the Ray cluster that is asked for, if one is; refused where there is none."""
    with refusing():
        if executor not in ("local", "ray"):
            raise ValueError(f"needed --executor local or ray, got {executor!r}")
        if executor == "local":
            return None
        from hpo.launch.ray_cluster import RayCluster

        with RayCluster(address):
            return address


def go_on(
    study: str,
    max_tokens: int | None,
    count: int | None,
    storage: str | None,
    ray: str | None,
    dry_run: bool,
    tracking_uri: str | None,
) -> None:
    from hpo.launch.estimate import estimate_cost
    from hpo.launch.launcher import send_pending_records, supervise
    from hpo.storage.retry import retry_storage
    from hpo.study import lifecycle
    from hpo.study.config import load_study
    from hpo.study.files import StudyFiles
    from hpo.study.mlflow_run import record_ending, update_study_run, record_target
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        config, trainer = load_study(files.toml)
        config = config.with_workers(count)
        search = lifecycle.open_existing(files, config, trainer, storage=storage)
        show_example(config, trainer)
        if max_tokens is not None:
            problems = trainer.problems(config.distributions, (config.search.tokens.min, max_tokens))
            if problems:
                raise ValueError("; ".join(problems))
        cost = retry_storage(lambda: estimate_cost(search, config, trainer, max_tokens=max_tokens))
        if not dry_run:
            update_study_run(files.name, tracking_uri, record_target(config, trainer))
            if max_tokens is not None:
                search.extend(max_tokens)
    typer.echo(f"{files.name}: {describe(cost)}", err=True)
    if dry_run:
        return
    if not cost.evaluations:
        send_pending_records(files, tracking_uri)
        update_study_run(files.name, tracking_uri, record_ending(search))
        typer.echo(f"nothing left to run; `hpo extend {files.name} --max-tokens ...` raises its budget", err=True)
        return
    finish(supervise(files, search, config.workers, cost, uri=tracking_uri, storage=storage, ray=ray), files.name)


def open_existing(study: str, storage: str | None) -> tuple[Any, Any]:
    from hpo.study import lifecycle
    from hpo.study.config import load_study
    from hpo.study.files import StudyFiles
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        config, trainer = load_study(files.toml)
        search = lifecycle.open_existing(files, config, trainer, storage=storage)
    return search, files


def show_example(config: Any, trainer: Any) -> None:
    """What the smallest run with middling settings executes, of a trainer that is another program."""
    if hasattr(trainer, "example"):
        from scaling.laws.compute import Fidelity

        smallest = Fidelity(min(trainer.sizes), config.search.tokens.min)
        say(f"  runs, for example: {trainer.example(config.probes[1], smallest)}")


def describe(cost: Estimate) -> str:
    if not cost.counted:
        return f"a budget for {cost.evaluations} of the largest runs (the last may be shorter), spent as the model sees fit: {describe_work(cost)}"
    return f"{cost.evaluations} evaluations of {cost.configurations} configurations to run, {describe_work(cost)}"


def describe_work(cost: Estimate) -> str:
    return f"{cost.tokens:,} tokens, {cost.flops:.2e} FLOPs, about {cost.seconds / 60:.1f} minutes here"


def finish(code: int, name: str) -> None:
    if code == 0:
        typer.echo(f"done; next: `scaling fit {name}`, `scaling recommend {name} --target`", err=True)
    raise typer.Exit(code)


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(app())
