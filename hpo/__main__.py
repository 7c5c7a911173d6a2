"""The `hpo` command: plan, check, launch, resume, extend and read studies."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.cli.options import Address, Count, Executor, Storage, Study, choose_cluster
from hpo.cli.plan import plan_command
from scaling.common.cli import DryRun, Json, Uri, make_app, refusing, say
from scaling.common.json_text import dump_json
from scaling.common.signals import ignore_signals

if TYPE_CHECKING:
    from hpo.launch.estimate import Estimate
    from hpo.search.search import Search
    from hpo.study.config import StudyConfig
    from hpo.study.files import StudyFiles
    from hpo.study.trainer import Trainer

app = make_app(__doc__)
app.command("plan")(plan_command)
logger = logging.getLogger("muscale.hpo")


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
    finish(supervise(files, search, config.workers, cost, uri=tracking_uri, storage=storage, ray=ray), search, files)


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
    """Continue a study that was stopped, with a larger `budget` or more `iterations` if its file has them by now.

    Example: hpo resume quickstart
    """
    continue_study(study, None, None, count, storage, choose_cluster(executor, address), dry_run, tracking_uri)


@app.command()
def extend(
    study: Study,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="the new longest run: the old one times a power of eta")
    ] = None,
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=1, help="how often Hyperband is run then, with new settings")
    ] = None,
    count: Count = None,
    storage: Storage = None,
    executor: Executor = "local",
    address: Address = "auto",
    dry_run: DryRun = False,
    tracking_uri: Uri = None,
) -> None:
    """Raise a study's longest run or its iterations, and pay only the difference.

    Example: hpo extend quickstart --max-tokens 1105920
    """
    if max_tokens is None and iterations is None:
        raise typer.BadParameter("needed --max-tokens, a longer run, or --iterations, more settings; got neither")
    cluster = choose_cluster(executor, address)
    continue_study(study, max_tokens, iterations, count, storage, cluster, dry_run, tracking_uri)


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
    from hpo.storage.presence import announce_presence
    from hpo.study.files import StudyFiles
    from hpo.worker.loop import run_worker
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        if confirm:
            with announce_presence(files.folder, "worker"):
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

    from hpo.launch.outcome import explain_lack_of_answer
    from hpo.launch.progress import format_spending

    search, files = open_existing(study, storage)
    progress, is_finished = search.progress, search.finished
    if as_json:
        typer.echo(dump_json(asdict(progress) | {"finished": is_finished}))
        return
    typer.echo(f"study {files.name}: " + ("finished" if is_finished else f"unfinished, `hpo resume {study}` continues"))
    planned = f" of {progress.planned}" if progress.planned else ""
    diverged = f"{progress.diverged} diverged" + (f" ({progress.failed} failed)" if progress.failed else "")
    typer.echo(f"  {progress.done}{planned} evaluations done, {progress.running} running, {diverged}")
    typer.echo(f"  {progress.configurations} configurations")
    typer.echo(format_spending(progress))
    if ending := search.explain_end():
        typer.echo(f"  {ending}")
    if reason := explain_lack_of_answer(search, files):
        typer.echo(reason)


@app.command()
def best(study: Study, storage: Storage = None, as_json: Json = False) -> None:
    """Show the search's answer for the target, how much of its lead may be noise, how well each rung predicts the
    target, and what `hpo confirm` found.

    --json prints the parameters alone.

    Example: hpo best quickstart --json
    """
    from hpo.confirm.runs import read_confirmation
    from hpo.confirm.verdict import (
        describe_answer,
        describe_confirmation,
        describe_correlations,
        describe_lead,
        is_current,
    )
    from hpo.study.answer import choose_answer

    search, files = open_existing(study, storage)
    refuse_without_answer(search, files)
    with refusing():
        answer = choose_answer(search)
    if as_json:
        typer.echo(dump_json(answer.params))
        return
    with refusing():
        confirmation = read_confirmation(files)
    typer.echo(describe_answer(search, answer, files.name))
    typer.echo(describe_lead(search, answer.params, files.name))
    if correlations := search.usefulness():
        typer.echo(describe_correlations(correlations))
    if confirmation is not None:
        if is_current(confirmation, search, answer.params):
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

    from hpo.confirm.runs import (
        check_repeatable,
        conclude,
        estimate_confirmation,
        locate_confirmation,
        make_plan,
        supervise,
    )
    from hpo.confirm.verdict import describe_confirmation, format_fidelity
    from hpo.launch.estimate import format_work
    from hpo.study import lifecycle
    from hpo.study.config import load_study
    from hpo.study.files import StudyFiles
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        config, trainer = load_study(files.toml)
        check_repeatable(trainer, files)
        search = lifecycle.open_existing(files, config, trainer, storage=storage)
        refuse_without_answer(search, files)
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
    typer.echo(dump_json(asdict(confirmation)) if as_json else describe_confirmation(confirmation))


@app.command()
def forget(
    study: Study,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    storage: Storage = None,
    tracking_uri: Uri = None,
) -> None:
    """Delete what a study created, so that it can be launched from scratch: its folder with all checkpoints, its runs
    in MLflow, and itself in the database that --storage names. Refused while a launcher or a worker of it is alive.

    Example: hpo forget quickstart --yes
    """
    from hpo.study.files import StudyFiles
    from hpo.study.lifecycle import delete_study, refuse_running
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        refuse_running(files, storage)
    if not yes:
        typer.confirm(f"remove {files.folder} and the runs of study {files.name!r} in MLflow?", abort=True)
    with refusing():
        existed = delete_study(files, uri=tracking_uri, storage=storage)
    typer.echo(f"{files.name}: " + ("removed" if existed else "there was nothing to remove"))


def continue_study(
    study: str,
    max_tokens: int | None,
    iterations: int | None,
    count: int | None,
    storage: str | None,
    ray: str | None,
    dry_run: bool,
    tracking_uri: str | None,
) -> None:
    """Run what is left of a study, after raising its longest run and its iterations unless they are None."""
    from hpo.launch.continuation import advise_raise, raise_study
    from hpo.launch.launcher import send_pending_records, supervise
    from hpo.storage.presence import announce_presence
    from hpo.study import lifecycle
    from hpo.study.config import load_study
    from hpo.study.files import StudyFiles
    from hpo.study.mlflow_run import record_ending, update_study_run
    from scaling.common.studies import find_study_file

    with refusing():
        files = StudyFiles(find_study_file(study))
        config, trainer = load_study(files.toml)
    with announce_presence(files.folder, "launcher"):
        with refusing():
            config = config.with_workers(count)
            search = lifecycle.open_existing(files, config, trainer, storage=storage)
            show_example(config, trainer)
            raises = (max_tokens, iterations)
            cost = raise_study(files, config, trainer, search, *raises, uri=tracking_uri, dry_run=dry_run)
        if cost.evaluations or dry_run:
            show_cost(files, cost)
        if cost.evaluations and not dry_run:
            code = supervise(files, search, config.workers, cost, uri=tracking_uri, storage=storage, ray=ray)
            finish(code, search, files)
        elif not dry_run:
            send_pending_records(files, tracking_uri)
            update_study_run(files.name, tracking_uri, record_ending(search))
            refuse_without_answer(search, files)
            logger.info(advise_raise(files, search))


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
    """Log the command that a trainer which is another program would run for the smallest run with middling settings.

    Before that, warn of ranges that end below what the study file says.
    """
    for sentence in config.unused_ends:
        logger.warning(f"  {sentence}")
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


def finish(code: int, search: Search, files: StudyFiles) -> None:
    """End the command with an exit code, and suggest what to do next if it is 0."""
    if code == 0:
        refuse_without_answer(search, files)
        logger.info(f"done; next: `scaling fit {files.name}`, `scaling recommend {files.name} --target`")
    raise typer.Exit(code)


def refuse_without_answer(search: Search, files: StudyFiles) -> None:
    """End the command with exit code 3, and report what to change, if a search has finished without a single loss."""
    from hpo.launch.outcome import explain_lack_of_answer
    from hpo.storage.retry import retry_storage

    if reason := retry_storage(lambda: explain_lack_of_answer(search, files)):
        say(f"error: {reason}")
        raise typer.Exit(3)


def main() -> None:
    """Run the `hpo` command."""
    app()


if __name__ == "__main__":
    sys.exit(app())
