"""Workers on the nodes of a Ray cluster. Ray places and restarts them; what they do is hpo.worker.loop, as everywhere."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpo.storage.retry import storage_errors
from hpo.study.files import StudyFiles
from hpo.study.schema import Workers
from hpo.worker.signals import GRACE_SECONDS, POLL_SECONDS
from scaling.common.cli import say
from scaling.common.redact import without_passwords
from scaling.common.signals import interrupt_on_sigterm

HEAD_SECONDS = 5.0  # between two looks whether the cluster's head answers


class Ray:
    """A connection to a cluster: `with Ray(address) as ray: ray.work(...)`. ValueError without the extra, or without a cluster there."""

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--executor ray needs Ray: pip install 'muscale[ray]'") from error
        self._ray, self._address = ray, address

    def __enter__(self) -> Ray:
        environment = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        try:
            self._ray.init(
                address=self._address, runtime_env={"env_vars": environment}, logging_level=40, log_to_driver=True
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"no Ray cluster at {without_passwords(self._address)}: {error}; `ray start --head` makes one"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def work(
        self, files: StudyFiles, workers: Workers, *, uri: str, storage: str | None, show: Callable[[], None]
    ) -> bool:
        """Run so many workers until the study is finished, with progress; whether a signal had them stopped.

        A worker that dies with its node is started again where there is room, for as long as this process lives.
        """
        gpus = float(self._ray.cluster_resources().get("GPU", 0.0))
        share = min(1.0, gpus / workers.count)
        remote = self._ray.remote(num_cpus=workers.threads, num_gpus=share, max_retries=-1)(_work)
        given = (str(files.toml.absolute()), uri, storage, workers.threads)
        running = [remote.remote(*given) for _ in range(workers.count)]
        room = float(self._ray.cluster_resources().get("CPU", 0.0)) / workers.threads
        if room < workers.count:
            say(
                f"the cluster has room for {int(room)} of {workers.count} workers now; the others start when there is more"
            )
        looked, away = time.monotonic(), False
        try:
            with interrupt_on_sigterm():
                while running:
                    if time.monotonic() - looked > HEAD_SECONDS:
                        away, looked = self._look_for_the_head(files.name, away), time.monotonic()
                    ended, running = self._ray.wait(running, timeout=POLL_SECONDS)
                    self._ray.get(ended)  # what a worker raised is raised here
                    with contextlib.suppress(*storage_errors()):  # the workers say it, and wait for it
                        show()
        except KeyboardInterrupt:
            self._stop(running)
            return True
        return False

    def _look_for_the_head(self, study: str, was_away: bool) -> bool:
        """Whether the cluster's head is away, said once: Ray itself ends this process, after a minute, without a word about the study."""
        host, _, port = self._ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_SECONDS).close()
        except OSError as error:
            if not was_away:
                say(
                    f"the head of the Ray cluster does not answer ({error}): Ray will end this program; its workers may go on or end. Nothing "
                    f"is lost: `hpo resume {study}` watches again, here or on another cluster, and adds workers"
                )
            return True
        return False

    def _stop(self, running: list[Any]) -> None:
        """Let workers keep their states, then end who does not come."""
        for task in running:
            self._ray.cancel(task, force=False)  # a KeyboardInterrupt there, as from a terminal
        deadline = time.monotonic() + GRACE_SECONDS
        while running and time.monotonic() < deadline:
            _, running = self._ray.wait(running, num_returns=len(running), timeout=1.0)
        for task in running:
            self._ray.cancel(task, force=True)


def _work(toml: str, uri: str, storage: str | None, threads: int) -> int:
    """On a node."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from hpo.worker.loop import work

    return work(StudyFiles(Path(toml)), uri=uri, storage=storage)
