"""`hpo confirm`: train the answer and its runner-up again on fresh random seeds.

A search uses the repeats 0, 1, ... of a configuration. A confirmation uses 1000, 1001, ..., the same for both
contenders, so that the effect of a seed on both cancels in their difference.

A confirmation writes to studies/<name>/confirm/: `plan.json`, one small file for each finished run, and in the end
`confirmed.json`. Its workers share the runs by locking one file each, so that each run is trained once, whichever
worker dies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, PositiveInt, TypeAdapter, ValidationError

from hpo.confirm.contenders import Contender, choose_contenders
from hpo.confirm.verdict import Confirmation, compare_losses
from hpo.launch.estimate import OVERHEAD_SECONDS, Estimate
from hpo.launch.launcher import send_pending_records, start_workers, watch_workers
from hpo.launch.progress import format_duration
from hpo.study.answer import choose_answer, find_largest_run
from hpo.study.config import StudyConfig, load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import check_same_settings
from hpo.study.trainer import Trainer
from hpo.worker.job import CheckpointPaths, train_once
from hpo.worker.results import read_result, write_result
from hpo.worker.signals import StopSignals
from scaling.common.atomic import write_atomically
from scaling.common.json_text import dump_json
from scaling.laws.compute import Fidelity
from scaling.tracking.client import connect, default_uri
from scaling.tracking.experiment import find_study_run
from scaling.tracking.log import write_note
from scaling.tracking.recorder import Recorder

if TYPE_CHECKING:
    from hpo.search.search import Search

logger = logging.getLogger("muscale.hpo")

# No search has as many repeats.
FIRST_REPEAT = 1000


class ConfirmationRun(NamedTuple):
    """One training of a confirmation: a contender, and the index of its random seed."""

    contender: Contender
    repeat: int


class ConfirmationPlan(BaseModel):
    """What a confirmation trains. It is stored, so that an interrupted confirmation continues with the same runs.

    Attributes:
        N: Parameters of the proxy.
        D: Tokens of each run.
        seeds: How many fresh seeds.
        target: N and D that the answer is for.
        evaluations: How many results the search had when this was planned.
        against: The configuration that the user asked to compare with; None: the runner-up.
        answer: The search's answer.
        rival: What it is compared with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    N: float
    D: int
    seeds: PositiveInt
    target: tuple[float, float]
    evaluations: int
    against: int | None
    answer: Contender
    rival: Contender

    @property
    def fidelity(self) -> Fidelity:
        """N and D of the runs."""
        return Fidelity(self.N, self.D)

    @property
    def runs(self) -> list[ConfirmationRun]:
        """All runs, seed by seed, so that a confirmation that is stopped has pairs."""
        repeats = range(FIRST_REPEAT, FIRST_REPEAT + self.seeds)
        return [ConfirmationRun(contender, repeat) for repeat in repeats for contender in (self.answer, self.rival)]


@dataclass(frozen=True)
class ConfirmationFiles:
    """The paths of everything that a confirmation writes.

    Attributes:
        folder: The folder of all files.
    """

    folder: Path

    @property
    def plan(self) -> Path:
        """The plan."""
        return self.folder / "plan.json"

    @property
    def answer(self) -> Path:
        """The verdict."""
        return self.folder / "confirmed.json"

    def result(self, plan: ConfirmationPlan, run: ConfirmationRun) -> Path:
        """Return the path of a run's loss. It depends on the run's settings, size and seed only, not on the plan."""
        text = json.dumps([run.contender.params, plan.N, plan.D], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:10]}-repeat{run.repeat}.json"

    def list_unfinished(self, plan: ConfirmationPlan) -> list[ConfirmationRun]:
        """Return the runs of a plan that have no loss yet."""
        return [run for run in plan.runs if not self.result(plan, run).exists()]


def locate_confirmation(files: StudyFiles) -> ConfirmationFiles:
    """Return the paths of a study's confirmation."""
    return ConfirmationFiles(files.folder / "confirm")


def check_repeatable(trainer: Trainer, files: StudyFiles) -> None:
    """Check that a trainer can train the same settings with other random seeds.

    Raises:
        ValueError: If it cannot, before anything is started.
    """
    if not getattr(trainer, "repeatable", True):
        raise ValueError(
            f"study {files.name!r} cannot be confirmed: that needs fresh random seeds, and its trainer takes none (a "
            "command needs {seed} for that). A launched study cannot change: put {seed} into the command in a copy of "
            f"{files.toml} under a new name, launch that, and confirm it"
        )


def read_plan(paths: ConfirmationFiles) -> ConfirmationPlan:
    """Return the stored plan of a confirmation.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        return ConfirmationPlan.model_validate_json(paths.plan.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{paths.plan} is not what `hpo confirm` wrote: remove it, and a new one is written ({error})"
        ) from error


def make_plan(search: Search, paths: ConfirmationFiles, seeds: int, against: int | None) -> ConfirmationPlan:
    """Return the stored plan if the search has not changed since, and otherwise a new one.

    The stored one is kept because a model's answer is reproducible only up to rounding.

    Args:
        search: The search.
        paths: The confirmation's files.
        seeds: How many fresh seeds, at least 2.
        against: The number of a configuration to compare with; None: the runner-up.

    Returns:
        The plan. It is not written.

    Raises:
        ValueError: If there are fewer than 2 seeds, or nothing to compare the answer with.
    """
    if seeds < 2:
        raise ValueError(f"a confirmation needs at least 2 seeds for an interval, got {seeds}: 5 is a good number")
    largest, target, done = find_largest_run(search), (search.target.N, search.target.D), search.progress.done
    if paths.plan.exists():
        old = read_plan(paths)
        current = (target, done, largest.N, int(largest.D), against)
        if (old.target, old.evaluations, old.N, old.D, old.against) == current:
            return old.model_copy(update={"seeds": seeds})
    answer, rival = choose_contenders(search, choose_answer(search).params, against)
    return ConfirmationPlan(
        N=largest.N,
        D=int(largest.D),
        seeds=seeds,
        target=target,
        evaluations=done,
        against=against,
        answer=answer,
        rival=rival,
    )


def estimate_confirmation(
    plan: ConfirmationPlan, paths: ConfirmationFiles, study: StudyConfig, trainer: Trainer
) -> Estimate:
    """Estimate what is left of a confirmation.

    Args:
        plan: The plan.
        paths: The confirmation's files.
        study: The study, which gives the number of workers.
        trainer: The study's trainer, which measures a few steps.

    Returns:
        The estimate.
    """
    unfinished = paths.list_unfinished(plan)
    seconds = 0.0
    for contender in (plan.answer, plan.rival):
        count = sum(run.contender is contender for run in unfinished)
        if count:
            run_seconds = trainer.seconds(contender.params, [plan.fidelity], threads=study.workers.threads)[0]
            seconds += count * (run_seconds + OVERHEAD_SECONDS)
    return Estimate(
        evaluations=len(unfinished),
        configurations=len({run.contender.model_dump_json() for run in unfinished}),
        tokens=len(unfinished) * plan.D,
        flops=len(unfinished) * plan.fidelity.C,
        seconds=seconds / min(study.workers.count, max(len(unfinished), 1)),
        speeds={},
    )


def run_confirmation_worker(files: StudyFiles, *, uri: str | None = None) -> int:
    """Run one worker of a confirmation: train every run that no other worker trains.

    Args:
        files: The study's files.
        uri: The MLflow store; None for the default one.

    Returns:
        The exit code: 0 if nothing is left for this worker, 130 if a signal stopped it.
    """
    study, trainer = load_study(files.toml)
    check_same_settings(files, study)
    paths = locate_confirmation(files)
    plan = read_plan(paths)
    store = uri or default_uri()
    with StopSignals() as stop:
        for run in plan.runs:
            result = paths.result(plan, run)
            try:
                with FileLock(f"{result}.lock").acquire(timeout=0):
                    if not result.exists():
                        _train_run(run, plan.fidelity, result, trainer, files, store, stop)
            except KeyboardInterrupt:
                return 130
            except Timeout:
                # Another worker trains this run.
                continue
    return 0


def _train_run(
    run: ConfirmationRun,
    fidelity: Fidelity,
    result: Path,
    trainer: Trainer,
    files: StudyFiles,
    store: str,
    stop: StopSignals,
) -> None:
    """Train and record one run of a confirmation.

    Raises:
        KeyboardInterrupt: If a stop signal arrived before the end.
    """
    contender, repeat = run
    params = trainer.describe(contender.params, fidelity, repeat=repeat) | {"repeat": repeat}
    name = f"confirm-{result.stem}"
    with Recorder(store, files.name, name, role="confirm", params=params, folder=files.records) as record:
        train_once(
            trainer,
            contender.params,
            fidelity,
            repeat,
            checkpoints=CheckpointPaths(result.with_suffix(".partial.pt")),
            record=record,
            on_result=partial(_save_result, record, int(fidelity.D), result),
            stop=stop,
        )


def _save_result(record: Recorder, tokens: int, result: Path, loss: float, seconds: float) -> None:
    # These are not the metrics of a rung, because the run table, and so every law, contains only the search's own runs.
    figures = {"loss": loss, "tokens": float(tokens), "seconds": seconds}
    record.log_figures({f"confirm/{name}": value for name, value in figures.items()})
    record.finish()
    write_result(result, loss)


def supervise(files: StudyFiles, plan: ConfirmationPlan, study: StudyConfig, cost: Estimate, *, uri: str | None) -> int:
    """Store a plan, start workers for what is left of it, and show progress until it is finished.

    Args:
        files: The study's files.
        plan: The plan.
        study: The study, which gives the number of workers.
        cost: What is left of the plan.
        uri: The MLflow store; None for the default one.

    Returns:
        The exit code: 0 if all runs have finished, 130 if a signal stopped them, 1 if the workers ended before.
    """
    paths = locate_confirmation(files)
    paths.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(paths.plan, plan.model_dump_json(indent=1) + "\n")
    uri = connect(uri).tracking_uri
    count = min(study.workers.count, cost.evaluations)
    processes = start_workers(files, study.workers, uri, count, "--confirm")
    was_stopped = watch_workers(processes, ConfirmationProgress(paths, plan).show)
    send_pending_records(files, uri)
    if not paths.list_unfinished(plan):
        return 0
    if was_stopped:
        logger.info(f"stopped; nothing is lost: `hpo confirm {files.name} --seeds {plan.seeds}` continues")
        return 130
    codes = ", ".join(str(process.returncode) for process in processes)
    logger.error(
        f"the workers ended early (exit codes {codes}): see their messages above, fix the cause, "
        f"then run `hpo confirm {files.name}` again"
    )
    return 1


class ConfirmationProgress:
    """Logs a table with one row for each run of a confirmation that finishes, below a header."""

    def __init__(self, paths: ConfirmationFiles, plan: ConfirmationPlan) -> None:
        self._paths, self._plan = paths, plan
        self._unfinished = {paths.result(plan, run) for run in paths.list_unfinished(plan)}
        self._began, self._first_count = time.monotonic(), len(self._unfinished)

    def show(self) -> None:
        """Log the runs that have finished since the last call."""
        for run in self._plan.runs:
            path = self._paths.result(self._plan, run)
            if path not in self._unfinished or not path.exists():
                continue
            if len(self._unfinished) == self._first_count:
                self._show_row("run", "contender", "seed", "loss", "time left")
            self._unfinished.remove(path)
            total, left = len(self._plan.runs), len(self._unfinished)
            seconds = (time.monotonic() - self._began) / (self._first_count - left) * left
            loss = read_result(path)
            self._show_row(
                f"{total - left}/{total}",
                "answer" if run.contender is self._plan.answer else "runner-up",
                str(run.repeat - FIRST_REPEAT + 1),
                "diverged" if math.isnan(loss) else f"{loss:.4f}",
                format_duration(seconds),
            )

    def _show_row(self, count: str, contender: str, seed: str, loss: str, left: str) -> None:
        width = 2 * len(str(len(self._plan.runs))) + 1
        logger.info(f"{count:>{width}}  {contender:<9}  {seed:>4}  {loss:>8}  {left:>9}")


def conclude(files: StudyFiles, plan: ConfirmationPlan, *, uri: str | None) -> Confirmation:
    """Return the verdict of a finished confirmation, and store it in its folder and on the study's MLflow run.

    Args:
        files: The study's files.
        plan: The plan, all of whose runs have finished.
        uri: The MLflow store; None for the default one.

    Returns:
        The confirmation.
    """
    paths = locate_confirmation(files)
    losses, rival_losses = (
        [read_result(paths.result(plan, run)) for run in plan.runs if run.contender is contender]
        for contender in (plan.answer, plan.rival)
    )
    confirmation = compare_losses(plan.answer, plan.rival, plan.fidelity, losses, rival_losses)
    value = asdict(confirmation)
    write_atomically(paths.answer, dump_json(value, indent=1) + "\n")
    client = connect(uri)
    for side in ("answer", "rival"):
        # Each loss is a run of its own in MLflow, where a note must be short.
        value[side].pop("losses")
    write_note(client, find_study_run(client, files.name), "confirmed", value)
    return confirmation


def read_confirmation(files: StudyFiles) -> Confirmation | None:
    """Return the stored verdict of a study's confirmation, or None if it has none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = locate_confirmation(files).answer
    if not path.exists():
        return None
    try:
        return TypeAdapter(Confirmation).validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{path} is not what `hpo confirm` wrote: run `hpo confirm {files.name}` to write it again ({error})"
        ) from error
