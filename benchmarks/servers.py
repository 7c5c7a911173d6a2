"""Servers that a test or benchmark can kill and start again: PostgreSQL, Optuna's gRPC proxy, `mlflow server`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from scaling.tracking.client import connect


class MLflowServer:
    """`mlflow server` on a file, which can be killed, stopped and started again at the same address.

    Attributes:
        store: URL of the file.
        log: The file of its output.
        port: Its port on this host.
        uri: Its address.
    """

    def __init__(self, folder: Path) -> None:
        self.store, self.log = f"sqlite:///{folder}/mlflow.db", folder / "server.log"
        self.port = find_free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        connect(self.store)

    def start(self) -> None:
        """Start the server and wait until it answers. RuntimeError if it does not within five minutes."""
        options = ["--backend-store-uri", self.store, "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "mlflow", "server", *options],
                # Job execution takes half of its start.
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(3000):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.1)
        raise RuntimeError(f"the server did not answer in five minutes: {self.log.read_text()[-2000:]}")

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the server."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Kill all processes of the server."""
        self.signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def serve_postgresql(folder: Path, port: int | None = None) -> Iterator[str]:
    """Yield the URL of the database of a new PostgreSQL server, which is stopped at the end."""
    with PostgreSQLServer(folder, port or find_free_port()) as server:
        yield server.url


class PostgreSQLServer:
    """A PostgreSQL server that can be killed and started again.

    Attributes:
        folder: Where its files are.
        port: Its port on this host.
        url: URL of its database.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder / "postgresql", port
        self.url = f"postgresql+psycopg2://muscale@127.0.0.1:{port}/postgres"
        candidates = [shutil.which("postgres"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres")))]
        folders = [Path(path).resolve().parent for path in candidates if path]
        if not folders:
            raise RuntimeError("needed PostgreSQL's programs (initdb, postgres), found none: install postgresql")
        self.programs = folders[-1]

    def __enter__(self) -> PostgreSQLServer:
        self.folder.mkdir(mode=0o700)
        # Its programs refuse to run as root, so they run as the user postgres, who must be able to reach the folder.
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
            for parent in self.folder.parents:
                if parent != Path("/") and parent.stat().st_mode & 0o1 == 0:
                    parent.chmod(parent.stat().st_mode | 0o1)
        self._run("initdb", "-D", str(self.folder), "-U", "muscale", "--auth", "trust", "-E", "UTF8", "--no-sync")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server and wait until it answers. RuntimeError if it does not within a minute."""
        words = [str(self.programs / "postgres"), "-D", str(self.folder), "-p", str(self.port), "-k", str(self.folder)]
        words += ["-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self._as_user(words), stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while subprocess.run(
            [str(self.programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False
        ).returncode:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"PostgreSQL did not start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill all processes of the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _run(self, program: str, *words: str) -> None:
        subprocess.run(self._as_user([str(self.programs / program), *words]), check=True, capture_output=True)

    @staticmethod
    def _as_user(words: list[str]) -> list[str]:
        """Return a command that runs as the user postgres if this process is root."""
        if os.geteuid() != 0:
            return words
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *words]


@contextlib.contextmanager
def serve_proxy(storage: str) -> Iterator[str]:
    """Yield the URL of Optuna's gRPC proxy in front of a storage."""
    port = find_free_port()
    code = (
        "import sys; from hpo.storage.connect import open_storage; from optuna.storages import run_grpc_proxy_server; "
        "run_grpc_proxy_server(open_storage(sys.argv[1], None, 'x')[0], host='127.0.0.1', port=int(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, storage, str(port)], stderr=subprocess.DEVNULL
    )
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def find_free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
