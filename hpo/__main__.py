"""The `hpo` command: check, launch, resume, extend and read studies."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.common.cli import DryRun, Json, Uri, make_app, refusing
from scaling.common.signals import ignore_signals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpo.launch.estimate import Estimate
    from hpo.search.search import Search
    from hpo.study.config import StudyConfig
    from hpo.study.files import StudyFiles
    from hpo.study.trainer import Trainer
    from scaling.laws.compute import Fidelity

app = make_app(__doc__)
logger = logging.getLogger("muscale.hpo")

Study = Annotated[str, typer.Argument(metavar="STUDY.toml | NAME", help="a study file, or the name of one in studies/")]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar="MUSCALE_STORAGE",
        metavar="URL",
        help="where the study is kept: postgresql://..., grpc://HOST:PORT, ...; default: its journal file",
    ),
]
Count = Annotated[int | None, typer.Option("--workers", min=1, help="how many workers; default: the study's")]
Executor = Annotated[
    str, typer.Option(metavar="local|ray", help="where workers run: processes here, or nodes of a Ray cluster")
]
Address = Annotated[str, typer.Option(metavar="HOST:PORT", help="head of the Ray cluster; auto: this machine's")]


@app.command()
def validate(study: Study) -> None:
    """Check a study file and everything it names; exit with code 2 and list every mistake by field name.

    Example: hpo validate studies/quickstart.toml
    """
    from hpo.study.config import load_study
    from scaling.common.studies import find_study_file

    with refusing():
        path = find_study_file(study)
        config, trainer = load_study(path)
        # This reads the data, so that data that cannot be read are refused, too.
        trainer.manifest()
    typer.echo(f"{path} is valid")
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
    from hpo.study.lifecycle import can_resume, create_study, open_search, refuse_existing
    from scaling.common.studies import find_study_file

    ray = choose_cluster(executor, address)
    with refusing():
        files = StudyFiles(find_study_file(study))
        config, trainer = load_study(files.toml)
        config = config.with_workers(count)
        # This reads the data, so that data that cannot be read are refused before anything is written.
        trainer.manifest()
        show_example(config, trainer)
        if not dry_run:
            refuse_existing(files, uri=tracking_uri)
        cost = estimate_cost(open_search(config, trainer, None), config, trainer)
    show_cost(files, cost)
    if not can_resume(trainer):
        logger.info("  this trainer cannot continue a longer run from a shorter one: promotions start from scratch")
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
    """Continue a study that was stopped, at the same budget: nothing is lost, and nothing runs twice.

    Example: hpo resume quickstart
    """
    continue_study(study, None, count, storage, choose_cluster(executor, address), dry_run, tracking_uri)


@app.command()
def extend(
    study: Study,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="the new longest run: the old one times a power of eta")
    ],
    count: Count = None,
    storage: Storage = None,
    executor: Executor = "local",
    address: Address = "auto",
    dry_run: DryRun = False,
    tracking_uri: Uri = None,
) -> None:
    """Raise a study's longest run and pay only the difference.

    Example: hpo extend quickstart --max-tokens 1105920
    """
    continue_study(study, max_tokens, count, storage, choose_cluster(executor, address), dry_run, tracking_uri)


@app.command()
def worker(
    study: Study,
    confirm: Annotated[bool, typer.Option("--confirm", help="train what `hpo confirm` has planned")] = False,
    storage: Storage = None,
    tracking_uri: Uri = None,
) -> None:
    """Run one worker of a launched study. Any number may start and stop at any time, here or on other machines that
    see its folder.

    Example: hpo worker quickstart --storage postgresql://me@server/studies
    """
    from hpo.confirm.runs import run_confirmation_worker
    from hpo.study.files import StudyFiles
    from hpo.worker.loop import run_worker
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        if confirm:
            code = run_confirmation_worker(files, uri=tracking_uri)
        else:
            code = run_worker(files, uri=tracking_uri, storage=storage)
    # One more signal while Python shuts down is no error to show.
    ignore_signals()
    raise typer.Exit(code)


@app.command()
def status(study: Study, storage: Storage = None, as_json: Json = False) -> None:
    """Show how far a study is, what it spent, and what resuming, raising and early stopping saved.

    Example: hpo status quickstart
    """
    from dataclasses import asdict

    from hpo.launch.progress import format_spending

    search, files = open_existing(study, storage)
    progress, is_finished = search.progress, search.finished
    if as_json:
        typer.echo(json.dumps(asdict(progress) | {"finished": is_finished}))
        return
    typer.echo(f"study {files.name}: " + ("finished" if is_finished else f"unfinished, `hpo resume {study}` continues"))
    planned = f" of {progress.planned}" if progress.planned else ""
    typer.echo(f"  {progress.done}{planned} evaluations done, {progress.running} running, {progress.diverged} diverged")
    typer.echo(f"  {progress.configurations} configurations")
    typer.echo(format_spending(progress))


@app.command()
def best(study: Study, storage: Storage = None, as_json: Json = False) -> None:
    """Show the search's answer for the target, how much of its lead may be noise, how well each rung predicts the
    target, and what `hpo confirm` found.

    --json prints the parameters alone.

    Example: hpo best quickstart --json
    """
    from hpo.confirm.runs import read_confirmation
    from hpo.confirm.verdict import describe_confirmation, describe_lead, format_fidelity, is_current

    search, files = open_existing(study, storage)
    with refusing():
        answer = search.best()
    if as_json:
        typer.echo(json.dumps(answer))
        return
    with refusing():
        confirmation = read_confirmation(files)
    typer.echo(f"best settings for the target, {format_fidelity(search.target)}:")
    width = max(map(len, answer))
    for name, value in answer.items():
        typer.echo(f"  {name:<{width}} = " + (f"{value:.4g}" if isinstance(value, float) else str(value)))
    typer.echo(describe_lead(search, answer, files.name))
    show_correlations(search.usefulness())
    if confirmation is not None:
        if is_current(confirmation, search, answer):
            typer.echo(f"confirmed {describe_confirmation(confirmation)}")
        else:
            typer.echo(
                f"an earlier answer, or one at another size, was confirmed {describe_confirmation(confirmation)}"
            )


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
    """Train the search's answer and its runner-up at the largest run on fresh seeds, and report whether the lead held.

    Run it again to continue one that was stopped, or to add seeds: finished runs are kept.

    Example: hpo confirm quickstart --seeds 5
    """
    from dataclasses import asdict

    from hpo.confirm.runs import conclude, estimate_confirmation, locate_confirmation, make_plan, supervise
    from hpo.confirm.verdict import describe_confirmation, format_fidelity
    from hpo.launch.estimate import format_work
    from hpo.study import lifecycle
    from hpo.study.config import load_study
    from hpo.study.files import StudyFiles
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        config, trainer = load_study(files.toml)
        search = lifecycle.open_existing(files, config, trainer, storage=storage)
        show_example(config, trainer)
        paths = locate_confirmation(files)
        plan = make_plan(search, paths, seeds, against)
        cost = estimate_confirmation(plan, paths, config, trainer)
    logger.info(f"study {files.name}: {seeds} fresh seeds each at {format_fidelity(plan.fidelity)}")
    logger.info(f"  answer     {plan.answer}")
    logger.info(f"  runner-up  {plan.rival}")
    logger.info(f"  {cost.evaluations} of {len(plan.runs)} runs left, {format_work(cost)}")
    if not search.finished:
        logger.warning("the search is not finished: its answer may change")
    if dry_run:
        if as_json:
            typer.echo(plan.model_dump_json())
        return
    if cost.evaluations:
        code = supervise(files, plan, config, cost, uri=tracking_uri)
        if code:
            raise typer.Exit(code)
    with refusing():
        confirmation = conclude(files, plan, uri=tracking_uri)
    typer.echo(json.dumps(asdict(confirmation)) if as_json else describe_confirmation(confirmation))


@app.command()
def forget(
    study: Study,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    storage: Storage = None,
    tracking_uri: Uri = None,
) -> None:
    """Delete what a study created, so that it can be launched from scratch: its folder with all checkpoints, its runs
    in MLflow, and itself in the database that --storage names.

    Example: hpo forget quickstart --yes
    """
    from hpo.study.files import StudyFiles
    from hpo.study.lifecycle import delete_study
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
    if not yes:
        typer.confirm(f"remove {files.folder} and the runs of study {files.name!r} in MLflow?", abort=True)
    with refusing():
        existed = delete_study(files, uri=tracking_uri, storage=storage)
    typer.echo(f"{files.name}: " + ("removed" if existed else "there was nothing to remove"))


def choose_cluster(executor: str, address: str) -> str | None:
    """Return the address of the Ray cluster to run on, or None to run locally. Refuse an address without a cluster."""
    with refusing():
        if executor not in ("local", "ray"):
            raise ValueError(f"needed --executor local or ray, got {executor!r}")
        if executor == "local":
            return None
        from hpo.launch.ray_cluster import RayCluster

        with RayCluster(address):
            return address


def continue_study(
    study: str,
    max_tokens: int | None,
    count: int | None,
    storage: str | None,
    ray: str | None,
    dry_run: bool,
    tracking_uri: str | None,
) -> None:
    """Run what is left of a study, after raising its longest run to `max_tokens` unless that is None."""
    from hpo.launch.estimate import estimate_cost
    from hpo.launch.launcher import send_pending_records, supervise
    from hpo.storage.retry import retry_storage
    from hpo.study import lifecycle
    from hpo.study.config import load_study
    from hpo.study.files import StudyFiles
    from hpo.study.mlflow_run import record_ending, record_target, update_study_run
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
    if cost.evaluations or dry_run:
        show_cost(files, cost)
    if dry_run:
        return
    if not cost.evaluations:
        send_pending_records(files, tracking_uri)
        update_study_run(files.name, tracking_uri, record_ending(search))
        logger.info(f"nothing left to run; `hpo extend {files.name} --max-tokens ...` raises its budget")
        return
    finish(supervise(files, search, config.workers, cost, uri=tracking_uri, storage=storage, ray=ray), files.name)


def open_existing(study: str, storage: str | None) -> tuple[Search, StudyFiles]:
    """Return the search and the files of a launched study. Refuse one that is not."""
    from hpo.study import lifecycle
    from hpo.study.config import load_study
    from hpo.study.files import StudyFiles
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        config, trainer = load_study(files.toml)
        search = lifecycle.open_existing(files, config, trainer, storage=storage)
    return search, files


def show_example(config: StudyConfig, trainer: Trainer) -> None:
    """Log the command that a trainer which is another program would run for the smallest run with middling settings."""
    example: Any = getattr(trainer, "example", None)
    if example is not None:
        from scaling.laws.compute import Fidelity

        smallest = Fidelity(min(trainer.sizes), config.search.tokens.min)
        logger.info(f"  runs, for example: {example(config.probes[1], smallest)}")


def show_cost(files: StudyFiles, cost: Estimate) -> None:
    """Log what is left of a study."""
    from hpo.launch.estimate import format_runs, format_work

    logger.info(f"study {files.name}: {format_runs(cost)}")
    logger.info(f"  {format_work(cost)}")


def show_correlations(correlations: Mapping[Fidelity, float]) -> None:
    """Print how well the losses of each rung predict those of the target; nothing without a model."""
    if not correlations:
        return
    n_width = max(len(f"{at.N:,.0f}") for at in correlations)
    d_width = max(len(f"{at.D:,.0f}") for at in correlations)
    typer.echo("correlation of losses with the target's, by the model:")
    typer.echo(f"  {'N':>{n_width}}  {'D':>{d_width}}")
    for at, correlation in correlations.items():
        remark = "" if correlation > 0.5 else "  weak" if correlation > 0.1 else "  misleading"
        typer.echo(f"  {at.N:>{n_width},.0f}  {at.D:>{d_width},.0f}  {correlation:.2f}{remark}")


def finish(code: int, name: str) -> None:
    """End the command with an exit code, and suggest what to do next if it is 0."""
    if code == 0:
        logger.info(f"done; next: `scaling fit {name}`, `scaling recommend {name} --target`")
    raise typer.Exit(code)


def main() -> None:
    """Run the `hpo` command."""
    app()


if __name__ == "__main__":
    sys.exit(app())
