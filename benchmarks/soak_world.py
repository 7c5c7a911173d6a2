"""The world of the soak: a study whose trainer sleeps and logs its steps, its processes, and its servers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from optuna.trial import FrozenTrial
from pydantic import BaseModel, ConfigDict

from benchmarks.servers import MLflowServer, PostgreSQLServer, find_free_port
from hpo.storage.connect import open_storage
from hpo.storage.retry import get_storage_errors
from hpo.storage.trial_attributes import is_diverged, is_search_trial
from hpo.study.files import StudyFiles
from scaling.common.atomic import write_atomically
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity

ROOT = Path(__file__).parents[1]
# Steps between two checkpoints, and tokens of a step.
INTERVAL = 5
STEP = 1000
# Seconds of a step while faults happen, of the lease, and without a measurement until a training counts as hanging.
PACE_SECONDS = 0.1
LEASE_SECONDS, TIMEOUT_SECONDS = 4.0, 8.0

STUDY = """
seed = {seed}
[search]
tokens = {{ min = {low}, max = {high} }}
sampler = "random"
iterations = {iterations}
[space]
lr = {{ low = 1e-4, high = 1.0, log = true }}
[trainer]
use = "benchmarks.soak_world:SleepingTrainer"
folder = "{folder}"
[workers]
count = {workers}
lease = {lease}
timeout = {timeout}
"""


class SleepingTrainer(BaseModel):
    """A trainer that sleeps for each step as long as `folder`/pace says, and logs every step to `folder`/steps.

    It keeps its state every INTERVAL steps. A file `eat` or `hang` in the folder is meant for one training: the first
    one that sees it removes it, and then uses up all memory, or hangs.

    Attributes:
        folder: The folder of the world.
        sizes: N of each proxy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    sizes: tuple[float, ...] = (1000.0, 4000.0)

    def problems(self, space: Mapping[str, Any], tokens: tuple[int, int] | None) -> list[str]:
        return []

    def target(self, **table: Any) -> Fidelity:
        return Fidelity(float(table["N"]), float(table["D"]))

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        return {"N": fidelity.N, "lr": params["lr"], "batch_tokens": 256, "seq_len": 128}

    def manifest(self) -> list[dict[str, Any]]:
        return []

    def seconds(self, params: Mapping[str, Any], fidelities: Sequence[Fidelity], *, threads: int) -> list[float]:
        return [f.D / STEP * PACE_SECONDS for f in fidelities]

    def __call__(
        self,
        params: Mapping[str, Any],
        fidelity: Fidelity,
        *,
        resume: Path | None = None,
        save: Path | None = None,
        keep: Path | None = None,
        repeat: int = 0,
    ) -> Iterator[Measurement]:
        own = {"lr": params["lr"], "N": fidelity.N}
        state = own | {"tokens": 0} if resume is None else json.loads(resume.read_text())
        if {k: state[k] for k in own} != own or state["tokens"] > fidelity.D:
            raise RuntimeError(f"{resume}: another run's checkpoint, {state}")
        self._log_event("begin", own, state["tokens"], fidelity.D)
        try:
            while state["tokens"] < fidelity.D:
                time.sleep(float((self.folder / "pace").read_text()))
                self._suffer()
                next_state = state | {"tokens": state["tokens"] + STEP}
                self._log_event("step", own, next_state["tokens"], fidelity.D)
                # Not earlier: an interrupt would keep a step that was never yielded.
                state = next_state
                yield Measurement(state["tokens"], 3.0, lr=params["lr"])
                if keep is not None and state["tokens"] // STEP % INTERVAL == 0:
                    write_atomically(keep, json.dumps(state))
        except (GeneratorExit, KeyboardInterrupt):
            if keep is not None:
                write_atomically(keep, json.dumps(state))
            raise
        if save is not None:
            write_atomically(save, json.dumps(state))
        try:
            yield Measurement(int(fidelity.D), compute_loss(params["lr"], fidelity), final=True)
        finally:
            if keep is not None:
                keep.unlink(missing_ok=True)

    def _log_event(self, what: str, own: Mapping[str, float], tokens: int, end: float) -> None:
        with (self.folder / "steps" / f"{os.getpid()}.jsonl").open("a") as log:
            log.write(json.dumps([time.monotonic(), what, own["N"], own["lr"], tokens, int(end)]) + "\n")

    def _suffer(self) -> None:
        """Use up all memory, or hang, if a fault asks one training to."""
        for what in ("eat", "hang"):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / what).unlink()
                if what == "hang":
                    time.sleep(600)
                resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**29,) * 2)
                blocks = []
                while True:
                    blocks.append(bytearray(2**26))


def compute_loss(lr: float, fidelity: Fidelity) -> float:
    """Return the final loss of a run."""
    return 2 + math.log(lr / 0.01) ** 2 / 20 + float(fidelity.N**-0.3 + fidelity.D**-0.3)


@dataclass
class SoakWorld:
    """A study, the processes that work on it, and what was done to them.

    Attributes:
        folder: The folder of everything.
        storage: The URL of the study's storage; None for its journal.
        uri: The MLflow store.
        rng: Draws the faults.
        mlflow: The MLflow server, if there is one.
        postgresql: The PostgreSQL server, if there is one.
        launchers: The launchers and separate workers that were started and have not been waited for.
        exit_codes: How often each exit code occurred.
        faults: How often each fault happened, by name.
        timers: What still happens later, such as the end of a suspension.
        results: (state, value, diverged) of each trial that ever had a result, by number.
    """

    folder: Path
    storage: str | None
    uri: str
    rng: random.Random
    mlflow: MLflowServer | None = None
    postgresql: PostgreSQLServer | None = None
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    exit_codes: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    timers: list[threading.Thread] = field(default_factory=list)
    results: dict[int, tuple[str, float | None, bool]] = field(default_factory=dict)

    @property
    def toml(self) -> Path:
        """The study file."""
        return self.folder / "studies" / "soak.toml"

    @property
    def files(self) -> StudyFiles:
        """The study's files."""
        return StudyFiles(self.toml)

    @property
    def log(self) -> str:
        """What all processes have written."""
        return (self.folder / "log").read_text()

    def write_study(self, *, workers: int, iterations: int, tokens: tuple[int, int], seed: int) -> None:
        """Write the study file.

        Args:
            workers: Workers per launcher.
            iterations: Iterations of Hyperband.
            tokens: Tokens of the shortest and the longest run.
            seed: The search's random seed.
        """
        (self.folder / "studies").mkdir(parents=True)
        (self.folder / "steps").mkdir()
        self.set_pace(PACE_SECONDS)
        text = STUDY.format(
            seed=seed,
            low=tokens[0],
            high=tokens[1],
            iterations=iterations,
            folder=self.folder,
            workers=workers,
            lease=LEASE_SECONDS,
            timeout=TIMEOUT_SECONDS,
        )
        self.toml.write_text(text)

    def set_pace(self, seconds: float) -> None:
        """Set how long each step takes from now on."""
        write_atomically(self.folder / "pace", f"{seconds:.4f}")

    def start(self, *words: str) -> None:
        """Start a command of `hpo`."""
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": self.uri}
        env.pop("MUSCALE_STORAGE", None)
        if self.storage:
            env["MUSCALE_STORAGE"] = self.storage
        command = [sys.executable, "-W", "ignore", "-m", "hpo", *words]
        with (self.folder / "log").open("ab") as log:
            self.launchers.append(subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log))

    def keep_going(self) -> None:
        """Resume the study if no launcher runs, as a user would."""
        for launcher in [p for p in self.launchers if p.poll() is not None]:
            self.launchers.remove(launcher)
            self.exit_codes[launcher.returncode] += 1
        if not self.launchers:
            self.start("resume", str(self.toml))

    def list_workers(self) -> list[psutil.Process]:
        """Return the workers of all launchers that are not suspended, by process number."""
        workers = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                words = process.cmdline()
                if "worker" in words and str(self.toml) in words and process.status() != psutil.STATUS_STOPPED:
                    workers.append(process)
        return sorted(workers, key=lambda p: p.pid)

    def read_trials(self) -> list[FrozenTrial]:
        """Return the search's trials as they are now."""
        storage, _ = open_storage(self.storage or str(self.files.journal), None, "soak")
        study = storage.get_study_id_from_name("soak")
        return [t for t in storage.get_all_trials(study) if is_search_trial(t)]

    def remember_results(self) -> int:
        """Remember every result that the study has by now, and return how many there are."""
        with contextlib.suppress(*get_storage_errors(), KeyError, ValueError):
            self.results |= {t.number: summarize_result(t) for t in self.read_trials() if has_result(t)}
        return len(self.results)

    def do_later(self, seconds: float, action: Callable[[], object]) -> threading.Thread:
        """Do something after so many seconds, in a thread."""
        timer = threading.Timer(seconds, action)
        timer.start()
        self.timers.append(timer)
        return timer


def list_trainings(worker: psutil.Process) -> list[psutil.Process]:
    """Return the processes that train for a worker, without Python's resource tracker."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in worker.children() if "resource_tracker" not in " ".join(p.cmdline())]
    return []


def has_result(trial: FrozenTrial) -> bool:
    """Return whether a trial has finished with a loss, or diverged."""
    return trial.state.is_finished() and (trial.value is not None or is_diverged(trial))


def summarize_result(trial: FrozenTrial) -> tuple[str, float | None, bool]:
    """Return state, value and divergence of a trial, which must not change once it has a result."""
    return trial.state.name, trial.value, is_diverged(trial)


def send_signal(processes: Sequence[psutil.Process], number: int) -> None:
    """Send a signal to those of the processes that still exist."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextlib.contextmanager
def open_world(
    storage: str, seed: int, *, mlflow_server: bool = True, folder: Path | None = None
) -> Iterator[SoakWorld]:
    """Create a world with its servers, and kill all of its processes at the end of the block.

    Args:
        storage: "journal" or "postgresql".
        seed: The random seed of the faults.
        mlflow_server: Whether MLflow is a server; otherwise it is a SQLite file.
        folder: The folder to use; None: a temporary one.

    Yields:
        The world.
    """
    with contextlib.ExitStack() as stack:
        home = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        if storage == "postgresql" and folder is None:
            # PostgreSQL's user must be able to enter it.
            home.chmod(0o711)
        world = SoakWorld(home / "work", None, f"sqlite:///{home}/mlflow.db", random.Random(seed))
        if mlflow_server:
            world.mlflow = MLflowServer(home)
            world.mlflow.start()
            world.uri = world.mlflow.uri
            stack.callback(world.mlflow.kill)
        if storage == "postgresql":
            world.postgresql = stack.enter_context(PostgreSQLServer(home, find_free_port()))
            world.storage = world.postgresql.url
        try:
            yield world
        finally:
            for timer in world.timers:
                timer.join()
            for launcher in world.launchers:
                launcher.kill()
            send_signal(world.list_workers(), signal.SIGKILL)
