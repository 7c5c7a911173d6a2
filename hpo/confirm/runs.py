"""Train the answer and its runner-up again with fresh seeds: `hpo confirm`.

Tuning uses the repeats 0, 1, ... of a configuration. A confirmation uses 1000, 1001, ..., the same for both sides, so
that the effect of a seed on both cancels in the difference.

Its files are in studies/<name>/confirm/: `plan.json`, one small file for each run that ended, and at the end
`confirmed.json`. Workers share the runs by locking one file each, so a run is done once even if workers are killed.
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
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from hpo.confirm.contenders import Contender, choose_contenders, find_largest_run
from hpo.confirm.verdict import Confirmation, compare_losses, format_fidelity
from hpo.launch.estimate import OVERHEAD_SECONDS, Estimate
from hpo.launch.launcher import send_pending_records, start_workers, watch_workers
from hpo.launch.progress import format_duration
from hpo.study.config import StudyConfig, load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import check_same_settings
from hpo.study.trainer import Trainer
from hpo.worker.job import train_once
from hpo.worker.results import read_result, write_result
from hpo.worker.signals import StopSignals
from scaling.common.atomic import write_atomically
from scaling.laws.compute import Fidelity
from scaling.tracking.client import connect, default_uri
from scaling.tracking.experiment import find_study_run
from scaling.tracking.log import write_note
from scaling.tracking.recorder import Recorder

if TYPE_CHECKING:
    from hpo.search.search import Search

logger = logging.getLogger("muscale.hpo")

# The first repeat of a confirmation. Tuning never reaches it.
FIRST_REPEAT = 1000


class ConfirmationPlan(BaseModel):
    """What a confirmation trains. It is stored, so that a resumed confirmation trains the same.

    Attributes:
        N: Parameters of the model that is trained.
        D: Tokens of each run.
        seeds: Fresh seeds for each side.
        target: N and D that the answer is for.
        evaluations: Finished evaluations of the search when this was planned.
        against: The configuration that was asked for as the rival, or None.
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
        """The size of each run."""
        return Fidelity(self.N, self.D)

    @property
    def at(self) -> str:
        """The size of each run as text."""
        return format_fidelity(self.fidelity)

    @property
    def runs(self) -> list[tuple[Contender, int]]:
        """(settings, repeat) of each run, seed by seed, so that a stopped confirmation has pairs."""
        repeats = range(FIRST_REPEAT, FIRST_REPEAT + self.seeds)
        return [(contender, repeat) for repeat in repeats for contender in (self.answer, self.rival)]


@dataclass(frozen=True)
class ConfirmationFiles:
    """The files of a confirmation. Those of a run depend only on its settings, size and repeat."""

    folder: Path

    @property
    def plan(self) -> Path:
        """What is trained."""
        return self.folder / "plan.json"

    @property
    def answer(self) -> Path:
        """The outcome."""
        return self.folder / "confirmed.json"

    def run(self, plan: ConfirmationPlan, contender: Contender, repeat: int) -> Path:
        """Return the file of a run's result."""
        return self.folder / f"{self.name(plan, contender, repeat)}.json"

    @staticmethod
    def name(plan: ConfirmationPlan, contender: Contender, repeat: int) -> str:
        """Return the name of a run, which its files begin with."""
        text = json.dumps([contender.params, plan.N, plan.D], sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:10]}-repeat{repeat}"

    def list_pending(self, plan: ConfirmationPlan) -> list[tuple[Contender, int]]:
        """Return the runs that have not ended."""
        return [(c, r) for c, r in plan.runs if not self.run(plan, c, r).exists()]


def read_plan(place: ConfirmationFiles) -> ConfirmationPlan:
    """Read the plan of a confirmation. ValueError if the file is damaged."""
    try:
        return ConfirmationPlan.model_validate_json(place.plan.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{place.plan} is not what `hpo confirm` wrote: remove it to plan the confirmation again ({error})"
        ) from error


def locate_confirmation(files: StudyFiles) -> ConfirmationFiles:
    """Return the files of a study's confirmation."""
    return ConfirmationFiles(files.folder / "confirm")


def make_plan(search: Search, place: ConfirmationFiles, seeds: int, against: int | None) -> ConfirmationPlan:
    """Return the stored plan if the search has not continued since it was made, else a new one.

    The stored plan is reused because a model's answer is reproducible only up to rounding.

    Args:
        search: The search.
        place: The confirmation's files.
        seeds: Fresh seeds for each side.
        against: The configuration to compare with, or None for the runner-up.

    Returns:
        The plan.

    Raises:
        ValueError: For fewer than 2 seeds, or if there is nothing to compare.
    """
    if seeds < 2:
        raise ValueError(f"a confirmation needs at least 2 seeds for an interval, got {seeds}: 5 is a good number")
    top, target, done = find_largest_run(search), (search.target.N, search.target.D), search.progress.done
    if place.plan.exists():
        old = read_plan(place)
        if (old.target, old.evaluations, old.N, old.D, old.against) == (target, done, top.N, int(top.D), against):
            return old.model_copy(update={"seeds": seeds})
    answer, rival = choose_contenders(search, search.best(), against)
    return ConfirmationPlan(
        N=top.N,
        D=int(top.D),
        seeds=seeds,
        target=target,
        evaluations=done,
        against=against,
        answer=answer,
        rival=rival,
    )


def estimate_confirmation(
    plan: ConfirmationPlan, place: ConfirmationFiles, study: StudyConfig, trainer: Trainer
) -> Estimate:
    """Estimate the remaining work of a confirmation."""
    pending = place.list_pending(plan)
    seconds = 0.0
    for contender in (plan.answer, plan.rival):
        count = sum(c is contender for c, _ in pending)
        if count:
            each = trainer.seconds(contender.params, [plan.fidelity], threads=study.workers.threads)[0]
            seconds += count * (each + OVERHEAD_SECONDS)
    return Estimate(
        evaluations=len(pending),
        configurations=len({c.model_dump_json() for c, _ in pending}),
        tokens=len(pending) * plan.D,
        flops=len(pending) * plan.fidelity.C,
        seconds=seconds / min(study.workers.count, max(len(pending), 1)),
        speeds={},
    )


def run_confirmation_worker(files: StudyFiles, *, uri: str | None = None) -> int:
    """Run one worker of a confirmation: train every run that no other worker trains. Return the exit code."""
    study, trainer = load_study(files.toml)
    check_same_settings(files, study)
    place = locate_confirmation(files)
    plan = read_plan(place)
    store = uri or default_uri()
    with StopSignals() as stop:
        for contender, repeat in plan.runs:
            result = place.run(plan, contender, repeat)
            try:
                with FileLock(f"{result}.lock").acquire(timeout=0):
                    if result.exists():
                        continue
                    params = trainer.describe(contender.params, plan.fidelity, repeat=repeat) | {"repeat": repeat}
                    recorder = Recorder(
                        store,
                        files.name,
                        f"confirm-{result.stem}",
                        role="confirm",
                        params=params,
                        folder=files.records,
                    )
                    try:
                        with recorder as record:
                            train_once(
                                trainer,
                                contender.params,
                                plan.fidelity,
                                repeat,
                                keep=result.with_suffix(".partial.pt"),
                                record=record,
                                ended=partial(_keep_result, record, plan.D, result),
                                stop=stop,
                            )
                    except KeyboardInterrupt:
                        return 130
            # Another worker trains this run.
            except Timeout:
                continue
    return 0


def _keep_result(record: Recorder, tokens: int, result: Path, loss: float, seconds: float) -> None:
    # These are not the metrics of a rung: the run table, and so every law, contains the search's own runs only.
    outcome = {"loss": loss, "tokens": float(tokens), "seconds": seconds}
    record.log_figures({f"confirm/{k}": v for k, v in outcome.items()})
    record.finish()
    write_result(result, loss)


def supervise(files: StudyFiles, plan: ConfirmationPlan, study: StudyConfig, cost: Estimate, *, uri: str | None) -> int:
    """Start workers for the pending runs and log progress until they are done. Return the exit code."""
    place = locate_confirmation(files)
    place.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(place.plan, plan.model_dump_json(indent=1) + "\n")
    uri = connect(uri).tracking_uri
    total = len(plan.runs)
    pending = {place.run(plan, c, r) for c, r in place.list_pending(plan)}
    began, first = time.monotonic(), len(pending)

    def log_progress() -> None:
        for contender, repeat in plan.runs:
            path = place.run(plan, contender, repeat)
            if path not in pending or not path.exists():
                continue
            pending.remove(path)
            loss = read_result(path)
            seconds = (time.monotonic() - began) / (first - len(pending)) * len(pending)
            logger.info(
                f"run {total - len(pending)} of {total}  {'answer' if contender is plan.answer else 'runner-up':<9}  "
                f"fresh seed {repeat - FIRST_REPEAT + 1}  loss {'diverged' if math.isnan(loss) else f'{loss:.4f}'}  "
                f"left {format_duration(seconds)}"
            )

    running = start_workers(files, study.workers, uri, min(study.workers.count, cost.evaluations), "--confirm")
    stopped = watch_workers(running, log_progress)
    send_pending_records(files, uri)
    if not place.list_pending(plan):
        return 0
    if stopped:
        logger.info(f"stopped, nothing is lost: `hpo confirm {files.name} --seeds {plan.seeds}` continues")
        return 130
    codes = ", ".join(str(w.returncode) for w in running)
    logger.info(
        f"the workers ended early (exit codes {codes}): fix the cause, then run `hpo confirm {files.name}` again"
    )
    return 1


def conclude(files: StudyFiles, plan: ConfirmationPlan, *, uri: str | None) -> Confirmation:
    """Compare all runs of a finished confirmation and store the outcome in its folder and on the study's MLflow run."""
    place = locate_confirmation(files)
    losses = [
        [read_result(place.run(plan, c, FIRST_REPEAT + i)) for i in range(plan.seeds)]
        for c in (plan.answer, plan.rival)
    ]
    confirmation = compare_losses(plan.answer, plan.rival, plan.fidelity, losses[0], losses[1])
    value = asdict(confirmation)
    write_atomically(place.answer, json.dumps(value, indent=1) + "\n")
    client = connect(uri)
    for side in ("answer", "rival"):
        # In MLflow each loss is a run of its own, and a note has to be short.
        value[side].pop("losses")
    write_note(client, find_study_run(client, files.name), "confirmed", value)
    return confirmation


def read_confirmation(files: StudyFiles) -> dict[str, Any] | None:
    """Return the outcome that `conclude` stored, or None."""
    path = locate_confirmation(files).answer
    value: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return value
