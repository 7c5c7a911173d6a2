"""A study of the toy trainer, and the commands on it as a user runs them: as processes in a folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import psutil
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial

from hpo.storage.trial_attributes import is_diverged
from scaling.common.atomic import write_atomically
from scaling.runs.io import load_runs

ROOT = Path(__file__).parents[2]
# Only bounds how long a test that fails may take: on a busy machine every command needs many times its usual seconds.
PATIENCE_SECONDS = 600.0

STUDY = """
seed = 1
[search]
tokens = {{ min = 2_000, max = 18_000 }}
sampler = "random"
seeds = {seeds}
[space]
lr = {{ low = 1e-4, high = 1.0, log = true }}
[trainer]
use = "tests.test_hpo.toy_trainer:ToyTrainer"
pause = {pause}
noise = 0.002
steps = "{steps}"
[target]
N = 10_000
D = 100_000
[workers]
count = 2
"""


class RunningCommand:
    """A command that runs in a process of its own, with its output in files.

    Args:
        words: The words behind `hpo`.
        folder: The working directory.
        environment: The environment variables.
        log: Path of the output files, without their suffixes.
    """

    def __init__(self, words: tuple[str, ...], folder: Path, environment: dict[str, str], log: Path) -> None:
        def restore_sigint() -> None:
            # The background jobs of a shell, and their children, ignore SIGINT from birth.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hpo", *words],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=err,
                preexec_fn=restore_sigint,
            )

    @property
    def stdout(self) -> str:
        """What it and its workers have written to stdout so far."""
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        """What it and its workers have written to stderr so far."""
        return self._err.read_text()

    def finish(self, code: int | None = 0) -> str:
        """Wait until it ends, check its exit code (None: any), and return its stderr."""
        self.process.wait(PATIENCE_SECONDS)
        assert code is None or self.process.returncode == code, self.stderr
        return self.stderr

    def list_workers(self) -> list[psutil.Process]:
        """Return the worker processes of a launcher. The others are its zombies and Python's helpers."""
        workers = []
        for process in psutil.Process(self.process.pid).children():
            try:
                if "worker" in process.cmdline():
                    workers.append(process)
            except psutil.NoSuchProcess:
                continue
        return workers


def list_trainers(worker: psutil.Process) -> list[psutil.Process]:
    """Return the processes that train for a worker, without Python's resource tracker."""
    return [p for p in worker.children() if "resource_tracker" not in " ".join(p.cmdline())]


def is_running(number: int) -> bool:
    """Return whether there is a process of this number that is not a zombie."""
    try:
        return bool(psutil.Process(number).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class ToyStudy:
    """A study of the toy trainer in a folder of its own, and the commands on it.

    Args:
        folder: An existing folder.
        pause: Seconds that each step of a training takes.
        seeds: The study's `seeds`, as TOML.
    """

    def __init__(self, folder: Path, pause: float, seeds: str = "1") -> None:
        self.folder, self.steps = folder, folder / "steps"
        self.toml = folder / "studies" / "toy.toml"
        self.steps.mkdir()
        self.toml.parent.mkdir()
        self.toml.write_text(STUDY.format(pause=pause, seeds=seeds, steps=self.steps))
        self.env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.env.pop("MLFLOW_TRACKING_URI", None)
        self._commands = 0

    def add_to_file(self, text: str) -> None:
        """Append lines to the study file, whose last table is [workers]."""
        self.toml.write_text(self.toml.read_text() + text)

    def replace_in_file(self, old: str, new: str) -> None:
        """Replace a part of the study file."""
        text = self.toml.read_text()
        assert old in text
        self.toml.write_text(text.replace(old, new))

    def start(self, *words: str) -> RunningCommand:
        """Start a command, such as `launch toy`."""
        self._commands += 1
        return RunningCommand(words, self.folder, self.env, self.folder / f"command-{self._commands}")

    def run(self, *words: str, code: int = 0) -> str:
        """Run a command to its end, check its exit code, and return what it wrote."""
        command = self.start(*words)
        command.finish(code)
        return command.stdout + command.stderr

    def run_json(self, *words: str) -> dict[str, Any]:
        """Run a command with --json and return its answer."""
        command = self.start(*words, "--json")
        command.finish()
        answer: dict[str, Any] = json.loads(command.stdout)
        return answer

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials of the study, as they are now."""
        journal = str((self.folder / "studies" / "toy" / "study.journal").resolve())
        storage = JournalStorage(JournalFileBackend(journal))
        return optuna.load_study(study_name="toy", storage=storage).trials

    def load_runs(self) -> pd.DataFrame:
        """Return the study's run table from MLflow."""
        return load_runs("toy", tracking_uri=f"sqlite:///{self.folder}/mlflow.db")

    def count_results(self) -> Counter[tuple[int, int]]:
        """Return the number of results of each (configuration, rung)."""
        done = [t for t in self.trials if t.state.is_finished() and (t.value is not None or is_diverged(t))]
        return Counter((t.user_attrs["config"], t.user_attrs["rung"]) for t in done)

    def count_steps(self) -> Counter[str]:
        """Return how often each step was trained by any process. A step is JSON: [N, lr, repeat, tokens]."""
        return Counter(line for p in self.steps.glob("*.jsonl") for line in p.read_text().splitlines())

    def wait_until(self, condition: Callable[[], bool], command: RunningCommand) -> None:
        """Wait until a condition holds, which it must while the command runs."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert command.process.poll() is None, command.stderr
            assert time.monotonic() < deadline, f"waited in vain: {command.stderr}"
            time.sleep(0.1)

    def hold(self, *, repeat: int = 0, tokens: int = 0) -> None:
        """Make every training of at least this repeat and this many tokens wait after its first step, until `release`.

        A study that is held before it is launched cannot finish, so what a test does to it happens in the middle of its
        trainings, however slow the machine is.
        """
        write_atomically(self.steps / "hold", json.dumps([repeat, tokens]))

    def release(self) -> None:
        """Let the held trainings continue."""
        (self.steps / "hold").unlink()

    def list_held(self) -> set[int]:
        """Return the process numbers of the trainings that wait now."""
        return {n for path in self.steps.glob("held-*") if is_running(n := int(path.name.removeprefix("held-")))}

    def wait_until_held(self, count: int, command: RunningCommand) -> None:
        """Wait until so many trainings wait."""
        self.wait_until(lambda: len(self.list_held()) >= count, command)

    def check_whole(self) -> None:
        """Check that nothing was lost and nothing was done twice.

        Two sizes of Hyperband with 3 rungs at eta 3 have 9 + 3 + 1, 5 + 1 and 3 runs each.
        """
        results = self.count_results()
        assert set(results.values()) == {1}
        assert not [t for t in self.trials if not t.state.is_finished()]
        by_rung = Counter(rung for _, rung in results)
        assert by_rung == {0: 2 * 9, 1: 2 * (3 + 5), 2: 2 * (1 + 1 + 3)}
