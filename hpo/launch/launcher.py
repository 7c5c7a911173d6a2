"""The launcher: starts the workers of a study, watches them, and shows progress. `hpo.worker.loop` is what each does.

A worker may die at any moment. The next one that asks takes over its trial.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.launch.estimate import Estimate
from hpo.launch.progress import ProgressLog, format_spending
from hpo.storage.presence import StudyRemoved, announce_presence, check_not_removed, explain_removal
from hpo.storage.retry import get_storage_errors, retry_storage
from hpo.study.files import StudyFiles
from hpo.study.mlflow_run import record_figures, set_status, update_study_run
from hpo.study.schema import Workers
from hpo.worker.signals import GRACE_SECONDS, POLL_SECONDS
from scaling.common.signals import ignore_signals, interrupt_on_sigterm
from scaling.tracking.client import connect
from scaling.tracking.sender import send_spooled_records

if TYPE_CHECKING:
    from hpo.search.search import Search

logger = logging.getLogger("muscale.hpo")


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
    """Start a study's workers, watch them until the study is finished, and record how it ended.

    Args:
        files: The study's files.
        search: The study's search.
        workers: How many workers to start, and on how many threads each.
        cost: What is left of the search.
        uri: The MLflow store; None for the default one.
        storage: The URL of the storage that the study was launched in; None for its journal.
        ray: The address of the Ray cluster to run them on; None: run them as processes on this machine.

    Returns:
        The exit code: 0 if the study is finished, 130 if a signal stopped it, 1 if the workers ended before.
    """
    with announce_presence(files.folder, "launcher"):
        try:
            return _supervise(files, search, workers, cost, connect(uri).tracking_uri, storage, ray)
        except (StudyRemoved, ValueError) as error:
            # MLflow lacks a study that was removed.
            logger.error(f"{explain_removal(files.settings) or error}; the launcher ends")
            return 1


def _supervise(
    files: StudyFiles,
    search: Search,
    workers: Workers,
    cost: Estimate,
    uri: str,
    storage: str | None,
    ray: str | None,
) -> int:
    update_study_run(files.name, uri, set_status("RUNNING"))
    show, exit_codes = retry_storage(lambda: ProgressLog(search, cost, workers.count)).show, ""
    if ray is not None:
        from hpo.launch.ray_cluster import RayCluster

        with RayCluster(ray) as cluster:
            was_stopped = cluster.run_workers(files, workers, uri=uri, storage=storage, show=show)
        retry_storage(show)
    else:
        processes = start_workers(files, workers, uri, workers.count, storage=storage)
        was_stopped = watch_workers(processes, show, partial(check_not_removed, files.settings))
        exit_codes = f" (exit codes {', '.join(str(p.returncode) for p in processes)})"
    check_not_removed(files.settings)
    send_pending_records(files, uri)
    figures = retry_storage(lambda: record_figures(search))
    is_finished = retry_storage(lambda: search.finished)
    status = "FINISHED" if is_finished else "KILLED" if was_stopped else "FAILED"
    update_study_run(files.name, uri, figures, set_status(status))
    logger.info(format_spending(retry_storage(lambda: search.progress)))
    if is_finished:
        if reason := retry_storage(search.explain_end):
            logger.warning(f"  {reason}")
        return 0
    if was_stopped:
        logger.info(f"stopped; nothing is lost: `hpo resume {files.name}` continues")
        return 130
    logger.error(
        f"the workers ended before the study did{exit_codes}: see their messages above, fix the cause, "
        f"then `hpo resume {files.name}` continues"
    )
    return 1


def send_pending_records(files: StudyFiles, uri: str | None) -> None:
    """Send the records to MLflow that the workers could not send."""
    if unsent := send_spooled_records(files.records, uri):
        logger.warning(
            f"{unsent} records are not in MLflow yet; they are kept in {files.records}, and `hpo resume {files.name}` "
            "sends them"
        )


def start_workers(
    files: StudyFiles, workers: Workers, uri: str, count: int, *options: str, storage: str | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start worker processes of a study on this machine, each with a GPU of its own if there are enough.

    Args:
        files: The study's files.
        workers: The threads of each worker.
        uri: The MLflow store.
        count: How many to start.
        *options: More options of `hpo worker`.
        storage: The URL of the storage that the study was launched in; None for its journal.

    Returns:
        The processes.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(workers.threads), "MLFLOW_TRACKING_URI": uri}
    if storage is not None:
        # Not in the command line, which `ps` shows to everyone on the machine.
        environment["MUSCALE_STORAGE"] = storage
    command = [sys.executable, "-m", "hpo", "worker", str(files.toml), *options, *choose_verbosity()]
    return [subprocess.Popen(command, env=environment | gpu) for gpu in assign_gpus(count, list_visible_gpus())]


def choose_verbosity() -> list[str]:
    """Return the option by which another command logs as much as this one."""
    level = logger.getEffectiveLevel()
    return ["--quiet"] if level >= logging.WARNING else ["--verbose"] if level <= logging.DEBUG else []


def assign_gpus(count: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """Assign one GPU to each worker, which workers share only if there are fewer GPUs.

    Args:
        count: How many workers there are.
        gpus: Names of the GPUs, as in CUDA_VISIBLE_DEVICES.

    Returns:
        What to add to the environment of each worker; nothing without GPUs.
    """
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(count)]


def list_visible_gpus() -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names or, if it is not set, those that Linux's driver shows."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None:
        return [gpu.strip() for gpu in variable.split(",") if gpu.strip() not in ("", "-1")]
    return sorted((p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*")), key=int)


def watch_workers(
    processes: Sequence[subprocess.Popen[bytes]], show: Callable[[], None], check: Callable[[], None] | None = None
) -> bool:
    """Show progress until all workers have ended, and once more then. A signal stops them.

    Args:
        processes: The workers.
        show: Logs what has finished since its last call.
        check: Is called if the storage does not answer at the end, and raises if it is pointless to wait for it.

    Returns:
        Whether a signal stopped them.
    """
    was_stopped = False
    try:
        with interrupt_on_sigterm():
            while any(p.poll() is None for p in processes):
                # While the storage is down, the workers log it and wait for it.
                with contextlib.suppress(*get_storage_errors()):
                    show()
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        was_stopped = True
        ignore_signals()
        stop_workers(processes)
    retry_storage(show, check=check)
    return was_stopped


def stop_workers(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop workers: wait GRACE_SECONDS for them to write their checkpoints, then kill those that are left."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            logger.warning(
                f"worker {process.pid} did not stop within {GRACE_SECONDS:.0f} s and was killed; "
                "another worker will take over its trial"
            )
            process.kill()
            process.wait()
