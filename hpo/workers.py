"""Running a study: its files, and the launcher that starts and watches local workers (hpo.working is what each does).

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo import record
from hpo.outcome import figures_of, noted, outcomes, refuse_away, status_of, target_of
from hpo.patience import answering, patiently, storage_errors
from hpo.repeats import suffix
from hpo.study import StudyConfig, StudyError, Trainer, Workers
from scaling import spool, tracking
from scaling.cli import say, sigterm_as_interrupt
from scaling.compute import Fidelity
from scaling.secrets import without_passwords

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from hpo.search import Search

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
    def storage(self) -> Path:
        """Where the study is kept instead of the journal, without passwords."""
        return self.folder / "storage"

    @property
    def settings(self) -> Path:
        return self.folder / "study.json"

    @property
    def manifest(self) -> Path:
        return self.folder / "data.json"

    @property
    def records(self) -> Path:
        """What is on its way to MLflow."""
        return self.folder / "records"

    def checkpoint(self, config: int, tokens: int, repeat: int = 0) -> Path:
        return self._of_run(config, tokens, repeat, ".pt")

    def partial(self, config: int, tokens: int, repeat: int = 0) -> Path:
        return self._of_run(config, tokens, repeat, ".partial.pt")

    def result(self, config: int, tokens: int, repeat: int) -> Path:
        """The loss of a training that has ended: whoever dies before it is told, it is not made again."""
        return self._of_run(config, tokens, repeat, ".json")

    def _of_run(self, config: int, tokens: int, repeat: int, ending: str) -> Path:
        return self.folder / "checkpoints" / f"{config:04d}-{tokens}{suffix(repeat)}{ending}"


@dataclass(frozen=True)
class Estimate:
    """What is left of a search, before it is started."""

    evaluations: int
    configurations: int  # new ones
    tokens: int
    flops: float
    seconds: float  # for all workers together
    speeds: Mapping[float, float]  # N -> tokens per second of one worker
    counted: bool = True  # False: a budget's worth of the largest runs; the model decides what will be run


def open_search(
    study: StudyConfig, trainer: Trainer, storage: str | None, name: str | None = None, *, lease: float | None = None
) -> Search:
    """The study's search, in a storage; in memory without one."""
    import optuna

    from hpo.search import Search

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # our own lines say which trial ended
    search, sizes = study.search, trainer.sizes
    return Search(
        study.distributions,
        tokens=(search.tokens.min, search.tokens.max),
        eta=search.eta,
        sizes=sizes,
        target=trainer.target(**study.target) if study.target else None,
        sampler=search.sampler,
        scheduler=search.scheduler,
        variant=search.variant,
        iterations=search.iterations,
        budget=search.budget * Fidelity(max(sizes), search.tokens.max).C if search.budget else None,
        seeds=search.seeds,
        promote=search.promote,
        asynchronous=search.asynchronous,
        belief={name: table.law for name, table in study.belief.items()},
        resumable=resumable(trainer),
        storage=storage,
        name=name,
        seed=study.seed,
        lease=lease,
    )


def resumable(trainer: Trainer) -> bool:
    """Whether promotions go on from checkpoints: so unless the trainer says that it cannot."""
    return bool(getattr(trainer, "resumable", True))


def open_existing(files: StudyFiles, study: StudyConfig, trainer: Trainer, *, storage: str | None = None) -> Search:
    """The search of a study that was launched. StudyError when the file has changed since, ValueError when it is not in this storage."""
    check_same_settings(files, study)
    with answering(storage):
        check_storage(files, storage)
        return open_search(study, trainer, storage or str(files.journal), files.name, lease=study.workers.lease)


def check_storage(files: StudyFiles, storage: str | None) -> None:
    """ValueError when a study was launched elsewhere than in this storage (None: its journal)."""
    there = files.storage.read_text().strip() if files.storage.exists() else None
    if there and storage is None:
        raise ValueError(
            f"study {files.name!r} was launched in {there}: needed that as --storage, or $MUSCALE_STORAGE, got none"
        )
    if storage is not None and there is None:
        raise ValueError(
            f"study {files.name!r} was launched in {files.journal}: leave --storage and $MUSCALE_STORAGE out"
        )
    if storage is not None and files.name not in studies_in(storage):
        raise ValueError(
            f"study {files.name!r} was launched in {there}, and {without_passwords(storage)} has none of that name: needed the "
            "same storage"
        )


def studies_in(storage: str) -> set[str]:
    """The names of the studies that a storage has."""
    from hpo.opening import open_storage

    opened, _ = open_storage(storage, None, "")
    return {study.study_name for study in opened.get_all_studies()}


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
        counted=plan.counted,
    )


def refuse_existing(files: StudyFiles, *, uri: str | None) -> MlflowClient:
    """The store's client, or a ValueError when it or the disk already has a study of this name."""
    afresh = f"to start afresh, `hpo forget {files.name}` removes it, or copy {files.toml} to a new name"
    if files.settings.exists():
        raise ValueError(
            f"study {files.name!r} exists in {files.folder}: `hpo resume {files.name}` goes on with it, "
            f"`hpo extend {files.name} --max-tokens ...` raises its budget; {afresh}"
        )
    refuse_away(uri)
    client = tracking.connect(uri)
    if client.get_experiment_by_name(files.name) is not None:
        raise ValueError(
            f"MLflow at {without_passwords(client.tracking_uri)} has a study {files.name!r} whose {files.folder} is gone: {afresh}"
        )
    return client


def create(
    files: StudyFiles, study: StudyConfig, trainer: Trainer, *, uri: str | None, storage: str | None = None
) -> Search:
    """Make the study's folder, its Optuna study and its MLflow run. ValueError when it exists."""
    client = refuse_existing(files, uri=uri)
    search = None
    if storage:
        search = open_search(study, trainer, storage, files.name, lease=study.workers.lease)
        if search.study.get_trials(deepcopy=False):
            raise ValueError(
                f"{without_passwords(storage)} has a study {files.name!r} already, which was launched elsewhere: share that one's folder and use "
                "`hpo worker`, or choose another name"
            )
    settings = study.model_dump(mode="json")
    ranges = searched_ranges(study, trainer)
    files.folder.mkdir(parents=True, exist_ok=True)
    run = tracking.study_run(
        client, files.name, artifacts=files.folder / "artifacts", params={f"study.{k}": v for k, v in settings.items()}
    )
    tracking.write_note(client, run, "space", ranges)
    target_of(study, trainer)(client, run)
    for path, value in ((files.settings, settings), (files.manifest, trainer.manifest())):
        path.write_text(json.dumps(value, indent=1) + "\n")
        tracking.log_file(client, run, path)
    if storage:
        files.storage.write_text(without_passwords(storage) + "\n")
    return search or open_search(study, trainer, str(files.journal), files.name, lease=study.workers.lease)


def forget(files: StudyFiles, *, uri: str | None, storage: str | None = None) -> bool:
    """Remove all that a study made: its folder, its runs from MLflow, and where it is kept, itself. False when there was nothing."""
    from hpo.opening import open_storage

    if files.storage.exists() or storage is not None:
        check_storage(files, storage)
    if storage is not None:
        opened, _ = open_storage(storage, None, files.name)
        for study in opened.get_all_studies():
            if study.study_name in (files.name, f"{files.name}.lock"):
                opened.delete_study(study._study_id)
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
    """StudyError that lists what the file says otherwise than it did at launch (workers, target and budget may change)."""
    if not files.settings.exists():
        raise ValueError(f"study {files.name!r} has not been launched: `hpo launch {files.toml}` starts it")
    # read by the model, so that a study launched before a setting existed has its default
    try:
        then = StudyConfig.model_validate_json(files.settings.read_bytes()).model_dump(mode="json")
    except ValueError as error:
        raise ValueError(f"{files.settings} is not what `hpo launch` wrote: restore it ({error})") from error
    now = study.model_dump(mode="json")
    problems = [
        f"{where}: launched with {json.dumps(old)}, the file now says {json.dumps(new)}"
        for where, old, new in differences(then, now)
        if where.split(".")[0] not in ("workers", "target") and where != "search.budget"
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


def supervise(
    files: StudyFiles,
    search: Search,
    workers: Workers,
    cost: Estimate,
    *,
    uri: str | None,
    storage: str | None = None,
    ray: str | None = None,
) -> int:
    """Start the study's workers, here or on the Ray cluster at an address, show progress until it is finished; the exit code."""
    uri = tracking.connect(uri).tracking_uri
    noted(files.name, uri, status_of("RUNNING"))
    show, codes = patiently(lambda: Progress(search, cost, workers.count)).show, ""
    if ray is not None:
        from hpo.cluster import Ray

        with Ray(ray) as cluster:
            stopped = cluster.work(files, workers, uri=uri, storage=storage, show=show)
        patiently(show)
    else:
        running = start(files, workers, uri, workers.count, storage=storage)
        stopped = watch(running, show)
        codes = f" (exit codes {', '.join(str(w.returncode) for w in running)})"
    send_left(files, uri)
    figures = patiently(lambda: figures_of(search))
    finished = patiently(lambda: search.finished)
    noted(files.name, uri, figures, status_of("FINISHED" if finished else "KILLED" if stopped else "FAILED"))
    say(spent_in_words(patiently(lambda: search.progress)))
    if finished:
        return 0
    if stopped:
        say(f"stopped; nothing is lost: `hpo resume {files.name}` carries on where it was")
        return 130
    say(f"the workers ended before the study did{codes}; mend the cause, then `hpo resume {files.name}`")
    return 1


def send_left(files: StudyFiles, uri: str | None) -> None:
    """Send what the workers could not."""
    if left := spool.send(files.records, uri):
        say(f"{left} records are not in MLflow yet; {files.records} keeps them, `hpo resume {files.name}` sends them")


def start(
    files: StudyFiles, workers: Workers, uri: str, count: int, *options: str, storage: str | None = None
) -> list[subprocess.Popen[bytes]]:
    """So many worker processes of the study, each with a GPU of its own as far as there are any."""
    shared = os.environ | {"OMP_NUM_THREADS": str(workers.threads), "MLFLOW_TRACKING_URI": uri}
    if storage is not None:
        shared["MUSCALE_STORAGE"] = storage  # and not where `ps` shows it to everyone
    command = [sys.executable, "-m", "hpo", "worker", str(files.toml), *options]
    return [subprocess.Popen(command, env=shared | pinned) for pinned in pins(count, visible_gpus())]


def pins(count: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """What each of so many workers finds in its environment: one GPU, shared only where there are more workers than GPUs."""
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(count)]


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; without it, what Linux's driver shows."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    return sorted((p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*")), key=int)


def watch(running: Sequence[subprocess.Popen[bytes]], show: Callable[[], None]) -> bool:
    """Show progress while workers run, and once more at the end; whether a signal had them stopped."""
    stopped = False
    try:
        with sigterm_as_interrupt():
            while any(w.poll() is None for w in running):
                with contextlib.suppress(*storage_errors()):  # the workers say it, and wait for it
                    show()
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        stopped = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # from here to the end: what they ask for is being done
        stop_all(running)
    patiently(show)
    return stopped


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


def spent_in_words(now: record.Progress) -> str:
    """What was trained, and what was not because it had been trained before."""
    said = f"{now.tokens_spent:,} tokens trained; resuming checkpoints saved {now.tokens_saved:,}"
    if now.reused:
        said += f", and results from before the raise {now.tokens_reused:,} ({now.reused} evaluations)"
    if now.stopped:
        said += f"; stopping {now.stopped} hopeless runs saved {now.tokens_stopped:,}"
    return said


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
            extra = record.trained_tokens(trial)
            self.done += extra / self.cost.speeds[attrs["N"]] + OVERHEAD_SECONDS
            took = trial.duration.total_seconds() if trial.duration else math.nan
            if self.began is None:
                self.began = time.time() - took
            loss = "diverged" if trial.value is None else f"{trial.value:.4f}"
            if stopped := record.stopped_of(trial):
                loss = f"stopped at {stopped.tokens:,} tokens (forecast {stopped.mean:.4f} +- {stopped.sd:.4f})"
            say(
                f"trial {len(self.seen)}{self.of()}  N {attrs['N']:,.0f}  D {attrs['tokens']:,}  {words(trial.params)}  "
                f"loss {loss}  best {best:.4f}  {extra / took:,.0f} tokens/s  left {self.left()}"
            )

    def of(self) -> str:
        return f" of {max(self.total, len(self.seen))}" if self.cost.counted else ""

    def left(self) -> str:
        """Time left, at the pace so far, by the estimate of what is left."""
        if self.began is None:
            return "?"
        total = self.cost.seconds * self.workers
        seconds = (time.time() - self.began) * max(total - self.done, 0.0) / self.done
        return clock(seconds)


def words(params: Mapping[str, Any]) -> str:
    """Parameters in one line."""
    return " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
