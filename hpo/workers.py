"""Running a study: local worker processes that ask, train and tell, and the launcher that starts and watches them.

A study's files live in studies/<name>/: `study.journal` (the Optuna study, which is the state of the search), `study.json` (the
settings it was launched with), `data.json` (the files it trains on) and `checkpoints/`. A worker may die at any moment: its trial is taken up by the next one that asks.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo.study import StudyConfig, StudyError, Trainer, Workers, load_study
from scaling import tracking
from scaling.cli import say, sigterm_as_interrupt
from scaling.compute import Fidelity

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from optuna.trial import FrozenTrial

    from hpo.search import Job, Search
    from scaling.runs import Measurement

POLL_SECONDS = 0.5
OVERHEAD_SECONDS = 0.4  # of asking, evaluating and recording one run; only for the time left
GRACE_SECONDS = 30.0  # for a worker that was told to stop: the step in hand, one checkpoint


@dataclass(frozen=True)
class StudyFiles:
    """Where a study keeps what it makes, beside its .toml."""

    toml: Path

    @property
    def name(self) -> str:
        return self.toml.stem

    @property
    def folder(self) -> Path:
        return self.toml.parent / self.name

    @property
    def journal(self) -> Path:
        return self.folder / "study.journal"

    @property
    def settings(self) -> Path:
        return self.folder / "study.json"

    @property
    def manifest(self) -> Path:
        return self.folder / "data.json"

    def checkpoint(self, config: int, tokens: int) -> Path:
        return self.folder / "checkpoints" / f"{config:04d}-{tokens}.pt"

    def partial(self, config: int, tokens: int) -> Path:
        return self.folder / "checkpoints" / f"{config:04d}-{tokens}.partial.pt"


@dataclass(frozen=True)
class Estimate:
    """What is left of a search, before it is started."""

    evaluations: int
    configurations: int  # new ones
    tokens: int
    flops: float
    seconds: float  # for all workers together
    speeds: Mapping[float, float]  # N -> tokens per second of one worker


def open_search(study: StudyConfig, trainer: Trainer, storage: str | None, name: str | None = None) -> Search:
    """The study's search, on its journal; in memory without one."""
    import optuna

    from hpo.search import Search

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # our own lines say which trial ended
    search = study.search
    return Search(
        study.distributions,
        tokens=(search.tokens.min, search.tokens.max),
        eta=search.eta,
        sizes=trainer.sizes,
        target=trainer.target(**study.target) if study.target else None,
        sampler=search.sampler,
        scheduler=search.scheduler,
        variant=search.variant,
        iterations=search.iterations,
        storage=storage,
        name=name,
        seed=study.seed,
    )


def open_existing(files: StudyFiles, study: StudyConfig, trainer: Trainer) -> Search:
    """The search of a study that was launched. StudyError when the file has changed since."""
    check_same_settings(files, study)
    return open_search(study, trainer, str(files.journal), files.name)


def estimate(search: Search, study: StudyConfig, trainer: Trainer, *, max_tokens: int | None = None) -> Estimate:
    """What is left of the search (raised to max_tokens if given), with times from a few measured steps of every size."""
    plan = search.plan(max_tokens)
    sizes = [Fidelity(n, 1e6) for n in search.sizes]
    speeds = {}
    if plan.increments:  # seconds, not speeds, are averaged over the space: it is the slow settings that take the time
        seconds = np.mean(
            [trainer.seconds(probe, sizes, threads=study.workers.threads) for probe in study.probes], axis=0
        )
        speeds = {f.N: f.D / float(s) for f, s in zip(sizes, seconds, strict=True)}
    work = sum(f.D / speeds[f.N] + OVERHEAD_SECONDS for f in plan.increments)
    return Estimate(
        evaluations=len(plan.increments),
        configurations=plan.configurations,
        tokens=int(sum(f.D for f in plan.increments)),
        flops=sum(f.C for f in plan.increments),
        seconds=work / study.workers.count,
        speeds=speeds,
    )


def refuse_existing(files: StudyFiles, *, uri: str | None) -> MlflowClient:
    """The store's client, or a ValueError when it or the disk already has a study of this name."""
    afresh = f"to start afresh, `hpo forget {files.name}` removes it, or copy {files.toml} to a new name"
    if files.journal.exists():
        raise ValueError(
            f"study {files.name!r} exists in {files.folder}: `hpo resume {files.name}` goes on with it, "
            f"`hpo extend {files.name} --max-tokens ...` raises its budget; {afresh}"
        )
    client = tracking.connect(uri)
    if client.get_experiment_by_name(files.name) is not None:
        raise ValueError(
            f"MLflow at {client.tracking_uri} has a study {files.name!r} whose {files.journal} is gone: {afresh}"
        )
    return client


def create(files: StudyFiles, study: StudyConfig, trainer: Trainer, *, uri: str | None) -> Search:
    """Make the study's folder, its Optuna study and its MLflow run. ValueError when it exists."""
    client = refuse_existing(files, uri=uri)
    settings = study.model_dump(mode="json")
    ranges = searched_ranges(study, trainer)
    files.folder.mkdir(parents=True, exist_ok=True)
    run = tracking.study_run(
        client, files.name, artifacts=files.folder / "artifacts", params={f"study.{k}": v for k, v in settings.items()}
    )
    tracking.write_note(client, run, "space", ranges)
    note_target(client, run, study, trainer)
    for path, value in ((files.settings, settings), (files.manifest, trainer.manifest())):
        path.write_text(json.dumps(value, indent=1) + "\n")
        tracking.log_file(client, run, path)
    return open_search(study, trainer, str(files.journal), files.name)


def note_target(client: MlflowClient, run: str, study: StudyConfig, trainer: Trainer) -> None:
    """Keep the target that the file now has, for `scaling recommend --target`."""
    if study.target:
        target = trainer.target(**study.target)
        tracking.write_note(client, run, "target", {"N": target.N, "D": target.D})


def forget(files: StudyFiles, *, uri: str | None) -> bool:
    """Remove all that a study made: its folder, and its runs from MLflow. False when there was nothing."""
    gone = tracking.forget_study(tracking.connect(uri), files.name)
    if files.folder.is_dir():
        shutil.rmtree(files.folder)
        return True
    return gone


def searched_ranges(study: StudyConfig, trainer: Trainer) -> dict[str, list[float]]:
    """The searched ranges of lr and batch_tokens, in the run table's terms, for the recommendation's edge warning."""
    smallest = Fidelity(min(trainer.sizes), study.search.tokens.min)
    low, _, high = (trainer.describe(probe, smallest) for probe in study.probes)
    names = [n for n in ("lr", "batch_tokens") if n in low and n in high and low[n] < high[n]]
    return {n: [float(low[n]), float(high[n])] for n in names}


def check_same_settings(files: StudyFiles, study: StudyConfig) -> None:
    """StudyError that lists what the file says otherwise than it did at launch (workers and target may change)."""
    if not files.journal.exists():
        raise ValueError(f"study {files.name!r} has not been launched: `hpo launch {files.toml}` starts it")
    then, now = json.loads(files.settings.read_text()), study.model_dump(mode="json")
    problems = [
        f"{where}: launched with {json.dumps(old)}, the file now says {json.dumps(new)}"
        for where, old, new in differences(then, now)
        if where.split(".")[0] not in ("workers", "target")
    ]
    if problems:
        raise StudyError(
            f"{files.toml} has changed since the study was launched; restore it, or copy it to a new name", problems
        )


def differences(then: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every leaf in which two JSON values differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif then != now:
        yield where, then, now


def supervise(files: StudyFiles, search: Search, workers: Workers, cost: Estimate, *, uri: str | None) -> int:
    """Start the study's workers, show progress until it is finished; the exit code."""
    client = tracking.connect(uri)
    parent = tracking.find_study_run(client, files.name)
    tracking.finish(client, parent, status="RUNNING")
    environment = os.environ | {"OMP_NUM_THREADS": str(workers.threads), "MLFLOW_TRACKING_URI": client.tracking_uri}
    command = [sys.executable, "-m", "hpo", "worker", str(files.toml)]
    running = [subprocess.Popen(command, env=environment) for _ in range(workers.count)]
    progress = Progress(search, cost, workers.count)
    stopped = False
    try:
        with sigterm_as_interrupt():
            while any(w.poll() is None for w in running):
                progress.show()
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        stopped = True
        stop_all(running)
    progress.show()
    log_outcome(client, parent, search)
    if search.finished:
        tracking.finish(client, parent)
        return 0
    if stopped:
        tracking.finish(client, parent, status="KILLED")
        say(f"stopped; nothing is lost: `hpo resume {files.name}` carries on where it was")
        return 130
    tracking.finish(client, parent, status="FAILED")
    codes = ", ".join(str(w.returncode) for w in running)
    say(f"the workers ended before the study did (exit codes {codes}); mend the cause, then `hpo resume {files.name}`")
    return 1


def stop_all(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tell workers to stop, wait for their checkpoints, kill who does not come."""
    for process in running:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            say(
                f"worker {process.pid} did not stop within {GRACE_SECONDS:.0f} s: killed; its trial will be taken up again"
            )
            process.kill()
            process.wait()


def work(files: StudyFiles, *, uri: str | None = None) -> int:
    """One worker: ask, train, tell until nothing is left. The exit code."""
    study, trainer = load_study(files.toml)
    search = open_existing(files, study, trainer)
    client = tracking.connect(uri)
    parent = tracking.find_study_run(client, files.name)
    with StopSignals() as stop:
        while not stop.requested:
            job = search.ask()
            if job is None:
                if search.finished:
                    return 0
                time.sleep(POLL_SECONDS)  # the rung that would follow waits for another worker's run
                continue
            try:
                loss = run_job(job, trainer, files, client, parent, stop)
            except KeyboardInterrupt:
                return 130  # the trial stays as it is; whoever asks next takes it up from the partial checkpoint
            search.tell(job, loss)
    return 130


def run_job(
    job: Job, trainer: Trainer, files: StudyFiles, client: MlflowClient, parent: str, stop: StopSignals
) -> float:
    """Train one (configuration, rung) and record it; the loss, NaN when it diverged.

    KeyboardInterrupt when `stop` was asked for, but only while it trains: a run that has ended is recorded.
    """
    tokens = int(job.fidelity.D)
    save, keep = files.checkpoint(job.config, tokens), files.partial(job.config, tokens)
    save.parent.mkdir(parents=True, exist_ok=True)
    resume = keep if keep.exists() else None
    if resume is None and job.resume_tokens:
        resume = files.checkpoint(job.config, job.resume_tokens)
    params = trainer.describe(job.params, job.fidelity) | {"config": job.config, "bracket": list(job.bracket)}
    run = tracking.child_run(client, parent, f"config-{job.config:04d}", role="proxy", params=params)
    started, last = time.perf_counter(), None
    points = trainer(job.params, job.fidelity, resume=resume, save=save, keep=keep)
    with contextlib.closing(points), tracking.CurveWriter(client, run) as curve:  # type: ignore[type-var]
        for last in stop.interrupting(points):
            curve.add(last)
            if last.final:
                break
    if last is None or not last.final:
        raise RuntimeError(f"the trainer ended {job} without a final measurement: it must yield one with final=True")
    loss = math.nan if last.diverged else last.loss
    seconds = time.perf_counter() - started
    tracking.log_result(
        client,
        run,
        rung=job.rung,
        tokens=tokens,
        loss=loss,
        seconds=seconds,
        checkpoint=None if last.diverged else save,
    )
    tracking.finish(client, run)
    return loss


def outcomes(search: Search) -> list[FrozenTrial]:
    """The trials that have a result: a loss, or diverged."""
    return [
        t
        for t in search.study.get_trials(deepcopy=False)
        if t.state.is_finished() and (t.value is not None or t.user_attrs.get("diverged"))
    ]


def log_outcome(client: MlflowClient, parent: str, search: Search) -> None:
    """The study's figures on its parent run."""
    now = search.progress
    losses = [t.value for t in outcomes(search) if t.value is not None]
    figures = {
        "evaluations": float(now.done),
        "configurations": float(now.configurations),
        "diverged": float(now.diverged),
        "tokens_spent": float(now.tokens_spent),
        "tokens_saved": float(now.tokens_saved),
    }
    if losses:
        figures["best_loss"] = min(losses)
        tracking.write_note(client, parent, "best", search.best())
    tracking.log_summary(client, parent, figures)


class Progress:
    """One line on stderr for every evaluation that ends."""

    def __init__(self, search: Search, cost: Estimate, workers: int) -> None:
        self.search, self.cost, self.workers = search, cost, workers
        self.seen = {t.number for t in outcomes(search)}
        self.total = len(self.seen) + cost.evaluations
        self.began: float | None = (
            None  # seconds since the epoch; when the first run of this launch started, imports over
        )
        self.done = 0.0  # seconds of one worker by the estimate, of what has ended since

    def show(self) -> None:
        ended = outcomes(self.search)
        best = min((t.value for t in ended if t.value is not None), default=math.nan)
        for trial in sorted(
            (t for t in ended if t.number not in self.seen), key=lambda t: t.datetime_complete or t.number
        ):
            self.seen.add(trial.number)
            attrs = trial.user_attrs
            extra = attrs["tokens"] - int(attrs.get("resumed_tokens") or 0)
            self.done += extra / self.cost.speeds[attrs["N"]] + OVERHEAD_SECONDS
            took = trial.duration.total_seconds() if trial.duration else math.nan
            if self.began is None:
                self.began = time.time() - took
            loss = "diverged" if trial.value is None else f"{trial.value:.4f}"
            params = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
            say(
                f"trial {len(self.seen)} of {max(self.total, len(self.seen))}  N {attrs['N']:,.0f}  D {attrs['tokens']:,}  {params}  "
                f"loss {loss}  best {best:.4f}  {extra / took:,.0f} tokens/s  left {self.left()}"
            )

    def left(self) -> str:
        """Time left, at the pace so far, by the estimate of what is left."""
        if self.began is None:
            return "?"
        total = self.cost.seconds * self.workers
        seconds = (time.time() - self.began) * max(total - self.done, 0.0) / self.done
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


class StopSignals:
    """SIGINT and SIGTERM: noted at once, but raised only inside a trainer's steps, never while asking, telling or recording."""

    def __init__(self) -> None:
        self.requested = False
        self._inside = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _: int, __: FrameType | None) -> None:
        first = not self.requested
        self.requested = True
        if self._inside and first:
            raise KeyboardInterrupt

    def interrupting(self, points: Iterator[Measurement]) -> Iterator[Measurement]:
        """The same points; a signal interrupts the making of one, and one that came before interrupts at once."""
        while True:
            self._inside = True
            try:
                if self.requested:
                    raise KeyboardInterrupt
                point = next(points, None)
            finally:
                self._inside = False
            if point is None:
                return
            yield point
