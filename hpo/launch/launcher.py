"""Running a study: its files, and the launcher that starts and watches local workers (hpo.worker.loop is what each does).

A study's files live in studies/<name>/: `study.journal` (the Optuna study, which is the state of the search), `study.json` (the
settings it was launched with), `data.json` (the files it trains on) and `checkpoints/`. A worker may die at any moment: its trial is taken up by the next one that asks.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.launch.estimate import Estimate
from hpo.launch.progress import ProgressLine, spent_in_words
from hpo.storage.retry import patiently, storage_errors
from hpo.study.files import StudyFiles
from hpo.study.mlflow_run import figures_of, noted, status_of
from hpo.study.schema import Workers
from hpo.worker.signals import GRACE_SECONDS, POLL_SECONDS
from scaling.common.cli import say
from scaling.common.signals import ignore_signals, interrupt_on_sigterm
from scaling.tracking import sender
from scaling.tracking.client import connect

if TYPE_CHECKING:
    from hpo.search.search import Search


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
    uri = connect(uri).tracking_uri
    noted(files.name, uri, status_of("RUNNING"))
    show, codes = patiently(lambda: ProgressLine(search, cost, workers.count)).show, ""
    if ray is not None:
        from hpo.launch.ray_cluster import Ray

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
    if left := sender.send(files.records, uri):
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
        with interrupt_on_sigterm():
            while any(w.poll() is None for w in running):
                with contextlib.suppress(*storage_errors()):  # the workers say it, and wait for it
                    show()
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        stopped = True
        ignore_signals()
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
