"""Workers on the nodes of a Ray cluster. Ray places and restarts them; `hpo.worker.loop` is what each does."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpo.storage.retry import get_storage_errors
from hpo.study.files import StudyFiles
from hpo.study.schema import Workers
from hpo.worker.signals import GRACE_SECONDS, POLL_SECONDS
from scaling.common.logs import configure_logging
from scaling.common.redact import redact_passwords
from scaling.common.signals import interrupt_on_sigterm

logger = logging.getLogger("muscale.hpo")

# Time between two checks that the cluster's head answers.
HEAD_SECONDS = 5.0


class RayCluster:
    """A connection to a Ray cluster: `with RayCluster(address) as cluster: cluster.run_workers(...)`.

    Args:
        address: HOST:PORT of the cluster's head; "auto" for the cluster of this machine.

    Raises:
        ValueError: If Ray is not installed or, on entering the block, if no cluster answers at the address.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--executor ray needs Ray: pip install 'muscale[ray]'") from error
        self._ray, self._address = ray, address

    def __enter__(self) -> RayCluster:
        environment = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        try:
            self._ray.init(
                address=self._address,
                runtime_env={"env_vars": environment},
                logging_level=logging.ERROR,
                log_to_driver=True,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"no Ray cluster at {redact_passwords(self._address)}: {error}; `ray start --head` starts one"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def run_workers(
        self, files: StudyFiles, workers: Workers, *, uri: str, storage: str | None, show: Callable[[], None]
    ) -> bool:
        """Run workers on the cluster until the study is finished, and show progress. A signal stops them.

        As long as this process lives, a worker that dies with its node is restarted on another one.

        Args:
            files: The study's files, which every node must see under the same path.
            workers: How many workers to run, and on how many threads each.
            uri: The MLflow store.
            storage: The URL of the storage that the study was launched in; None for its journal.
            show: Logs what has finished since its last call.

        Returns:
            Whether a signal stopped them.
        """
        gpus = float(self._ray.cluster_resources().get("GPU", 0.0))
        gpu_share = min(1.0, gpus / workers.count)
        remote = self._ray.remote(num_cpus=workers.threads, num_gpus=gpu_share, max_retries=-1)(_run_worker)
        arguments = (str(files.toml.absolute()), uri, storage, workers.threads, logger.getEffectiveLevel())
        tasks = [remote.remote(*arguments) for _ in range(workers.count)]
        room = float(self._ray.cluster_resources().get("CPU", 0.0)) / workers.threads
        if room < workers.count:
            logger.warning(
                f"the cluster has room for {int(room)} of {workers.count} workers now; the others start when there is "
                "more"
            )
        checked, is_down = time.monotonic(), False
        try:
            with interrupt_on_sigterm():
                while tasks:
                    if time.monotonic() - checked > HEAD_SECONDS:
                        is_down, checked = self._check_head(files.name, is_down), time.monotonic()
                    ended, tasks = self._ray.wait(tasks, timeout=POLL_SECONDS)
                    # This raises here what a worker raised there.
                    self._ray.get(ended)
                    # While the storage is down, the workers log it and wait for it.
                    with contextlib.suppress(*get_storage_errors()):
                        show()
        except KeyboardInterrupt:
            self._stop(tasks)
            return True
        return False

    def _check_head(self, study: str, was_down: bool) -> bool:
        """Return whether the cluster's head is down, and log it once.

        After a minute without the head, Ray itself ends this process and says nothing about the study.
        """
        host, _, port = self._ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_SECONDS).close()
        except OSError as error:
            if not was_down:
                logger.error(
                    f"the head of the Ray cluster does not answer ({error}): Ray will end this program; its workers "
                    f"may continue or end. Nothing is lost: `hpo resume {study}` continues, here or on another cluster"
                )
            return True
        return False

    def _stop(self, tasks: list[Any]) -> None:
        """Stop workers: wait GRACE_SECONDS for them to write their checkpoints, then kill those that are left."""
        for task in tasks:
            # Without force, Ray raises KeyboardInterrupt in the worker.
            self._ray.cancel(task, force=False)
        deadline = time.monotonic() + GRACE_SECONDS
        while tasks and time.monotonic() < deadline:
            _, tasks = self._ray.wait(tasks, num_returns=len(tasks), timeout=1.0)
        for task in tasks:
            self._ray.cancel(task, force=True)


def _run_worker(toml: str, uri: str, storage: str | None, threads: int, level: int) -> int:
    """Run one worker on a node, and return its exit code."""
    configure_logging(level)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from hpo.worker.loop import run_worker

    return run_worker(StudyFiles(Path(toml)), uri=uri, storage=storage)
