"""The answer and its runner-up, trained again on fresh seeds: `hpo confirm`.

Tuning uses the repeats 0, 1, ... of a configuration, this 1000, 1001, ..., the same for both sides, so that what a seed
does to both cancels in the difference.

A rematch lives in studies/<name>/confirm/: `plan.json`, one small file for each run that ended, and at the end
`confirmed.json`. Workers share its runs by locking one file each, so that a run is done once whoever dies.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from hpo.confirm.contenders import Contender, contenders, largest
from hpo.confirm.verdict import Confirmation, at, confirmation
from hpo.launch.estimate import OVERHEAD_SECONDS, Estimate
from hpo.launch.launcher import send_left, start, watch
from hpo.launch.progress import clock
from hpo.study.config import StudyConfig, load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import check_same_settings
from hpo.study.trainer import Trainer
from hpo.worker.job import train_once
from hpo.worker.results import read_result, write_result
from hpo.worker.signals import StopSignals
from scaling.common.atomic import write_atomically
from scaling.common.cli import say
from scaling.laws.compute import Fidelity
from scaling.tracking.client import connect, default_uri
from scaling.tracking.experiment import find_study_run
from scaling.tracking.log import write_note
from scaling.tracking.recorder import Recorder

if TYPE_CHECKING:
    from hpo.search.search import Search

FIRST_REPEAT = 1000  # tuning never gets there


class Rematch(BaseModel):
    """What a confirmation trains; written down so that it is the same when it goes on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    N: float
    D: int
    seeds: PositiveInt
    target: tuple[float, float]  # N, D that the answer is for
    evaluations: int  # results of the search when this was planned
    against: int | None
    answer: Contender
    rival: Contender

    @property
    def fidelity(self) -> Fidelity:
        return Fidelity(self.N, self.D)

    @property
    def at(self) -> str:
        return at(self.fidelity)

    @property
    def runs(self) -> list[tuple[Contender, int]]:
        """(settings, repeat), seed by seed, so that a stopped confirmation has pairs."""
        repeats = range(FIRST_REPEAT, FIRST_REPEAT + self.seeds)
        return [(contender, repeat) for repeat in repeats for contender in (self.answer, self.rival)]


@dataclass(frozen=True)
class RematchFiles:
    """Where a confirmation keeps what it makes. The files of a run hang on its settings, size and repeat alone."""

    folder: Path

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def answer(self) -> Path:
        return self.folder / "confirmed.json"

    def run(self, plan: Rematch, contender: Contender, repeat: int) -> Path:
        """The file of a run's result."""
        return self.folder / f"{self.name(plan, contender, repeat)}.json"

    @staticmethod
    def name(plan: Rematch, contender: Contender, repeat: int) -> str:
        text = json.dumps([contender.params, plan.N, plan.D], sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:10]}-repeat{repeat}"

    def left(self, plan: Rematch) -> list[tuple[Contender, int]]:
        """The runs that have not ended."""
        return [(c, r) for c, r in plan.runs if not self.run(plan, c, r).exists()]


def read_plan(place: RematchFiles) -> Rematch:
    try:
        return Rematch.model_validate_json(place.plan.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{place.plan} is not what `hpo confirm` wrote: remove it, and it is planned anew ({error})"
        ) from error


def files_of(files: StudyFiles) -> RematchFiles:
    return RematchFiles(files.folder / "confirm")


def make_plan(search: Search, place: RematchFiles, seeds: int, against: int | None) -> Rematch:
    """The plan on disk when the search has not gone on since (a model's answer is the same only to rounding); else afresh.

    ValueError for fewer than 2 seeds, or when there is nothing to compare.
    """
    if seeds < 2:
        raise ValueError(f"a confirmation needs at least 2 seeds for an interval, got {seeds}: 5 is a good number")
    top, target, done = largest(search), (search.target.N, search.target.D), search.progress.done
    if place.plan.exists():
        old = read_plan(place)
        if (old.target, old.evaluations, old.N, old.D, old.against) == (target, done, top.N, int(top.D), against):
            return old.model_copy(update={"seeds": seeds})
    answer, rival = contenders(search, search.best(), against)
    return Rematch(
        N=top.N,
        D=int(top.D),
        seeds=seeds,
        target=target,
        evaluations=done,
        against=against,
        answer=answer,
        rival=rival,
    )


def estimate(plan: Rematch, place: RematchFiles, study: StudyConfig, trainer: Trainer) -> Estimate:
    """What is left of a confirmation."""
    left = place.left(plan)
    seconds = 0.0
    for contender in (plan.answer, plan.rival):
        count = sum(c is contender for c, _ in left)
        if count:
            each = trainer.seconds(contender.params, [plan.fidelity], threads=study.workers.threads)[0]
            seconds += count * (each + OVERHEAD_SECONDS)
    return Estimate(
        evaluations=len(left),
        configurations=len({c.model_dump_json() for c, _ in left}),
        tokens=len(left) * plan.D,
        flops=len(left) * plan.fidelity.C,
        seconds=seconds / min(study.workers.count, max(len(left), 1)),
        speeds={},
    )


def work(files: StudyFiles, *, uri: str | None = None) -> int:
    """One worker of a confirmation: train what nobody else trains. The exit code."""
    study, trainer = load_study(files.toml)
    check_same_settings(files, study)
    place = files_of(files)
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
            except Timeout:
                continue  # another worker is at it
    return 0


def _keep_result(record: Recorder, tokens: int, result: Path, loss: float, seconds: float) -> None:
    # Not a rung's metrics: the run table, and so every law, is of the search's own runs.
    outcome = {"loss": loss, "tokens": float(tokens), "seconds": seconds}
    record.figures({f"confirm/{k}": v for k, v in outcome.items()})
    record.finish()
    write_result(result, loss)


def supervise(files: StudyFiles, plan: Rematch, study: StudyConfig, cost: Estimate, *, uri: str | None) -> int:
    """Start workers on what is left, show progress until it is done; the exit code."""
    place = files_of(files)
    place.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(place.plan, plan.model_dump_json(indent=1) + "\n")
    uri = connect(uri).tracking_uri
    total = len(plan.runs)
    left = {place.run(plan, c, r) for c, r in place.left(plan)}
    began, first = time.monotonic(), len(left)

    def show() -> None:
        for contender, repeat in plan.runs:
            path = place.run(plan, contender, repeat)
            if path not in left or not path.exists():
                continue
            left.remove(path)
            loss = read_result(path)
            seconds = (time.monotonic() - began) / (first - len(left)) * len(left)
            say(
                f"run {total - len(left)} of {total}  {'answer' if contender is plan.answer else 'runner-up':<9}  "
                f"fresh seed {repeat - FIRST_REPEAT + 1}  loss {'diverged' if math.isnan(loss) else f'{loss:.4f}'}  "
                f"left {clock(seconds)}"
            )

    running = start(files, study.workers, uri, min(study.workers.count, cost.evaluations), "--confirm")
    stopped = watch(running, show)
    send_left(files, uri)
    if not place.left(plan):
        return 0
    if stopped:
        say(f"stopped; nothing is lost: `hpo confirm {files.name} --seeds {plan.seeds}` carries on where it was")
        return 130
    codes = ", ".join(str(w.returncode) for w in running)
    say(f"the workers ended early (exit codes {codes}); mend the cause, then run `hpo confirm {files.name}` again")
    return 1


def conclude(files: StudyFiles, plan: Rematch, *, uri: str | None) -> Confirmation:
    """Read all runs of a confirmation that is done, keep the outcome in its folder and on the study's run."""
    place = files_of(files)
    losses = [
        [read_result(place.run(plan, c, FIRST_REPEAT + i)) for i in range(plan.seeds)]
        for c in (plan.answer, plan.rival)
    ]
    made = confirmation(plan.answer, plan.rival, plan.fidelity, losses[0], losses[1])
    value = asdict(made)
    write_atomically(place.answer, json.dumps(value, indent=1) + "\n")
    client = connect(uri)
    for side in ("answer", "rival"):
        value[side].pop("losses")  # each is a run of its own there, and a note is short
    write_note(client, find_study_run(client, files.name), "confirmed", value)
    return made


def read_confirmation(files: StudyFiles) -> dict[str, Any] | None:
    """What `conclude` kept, or None."""
    path = files_of(files).answer
    value: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return value
