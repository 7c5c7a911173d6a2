"""A study under fire: faults of every kind, drawn at random, while its workers train; then what was lost is counted.

    python -m benchmarks.soak                                            # a journal, 100 faults in 5 minutes
    python -m benchmarks.soak --storage postgresql --faults 100 --seconds 300 --seed 1

Everything is real but the training: processes of `hpo launch`, `hpo resume` and `hpo worker`, a server of MLflow and one of
PostgreSQL, killed, stopped, cut off and filled up. The trainer sleeps, writes down every step that it has made, and keeps its
state every INTERVAL steps. Which fault comes when follows from the seed; what it meets is chance.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from optuna.trial import FrozenTrial
from pydantic import BaseModel, ConfigDict

from benchmarks.servers import MLflowServer, PostgreSQLServer, find_free_port
from hpo.storage.connect import open_storage
from hpo.storage.journal import Journal
from hpo.storage.retry import get_storage_errors
from hpo.study.config import load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import open_existing
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity
from scaling.runs.io import load_runs
from scaling.tracking.client import connect, find_experiment_id
from scaling.tracking.log import read_curve

ROOT = Path(__file__).parents[1]
INTERVAL = 5  # steps between two checkpoints
STEP = 1000  # tokens
LEASE, TIMEOUT = 4.0, 8.0  # seconds
STILL = 1.6 * LEASE  # a stopped process stands still for so long
LONG_OUTAGE = 60.0  # seconds, of MLflow's first
MOST_WORKERS = 8  # of all launchers together, before one is killed rather than another fault done

STUDY = """
seed = {seed}
[search]
tokens = {{ min = {low}, max = {high} }}
sampler = "random"
iterations = {iterations}
[space]
lr = {{ low = 1e-4, high = 1.0, log = true }}
[trainer]
use = "benchmarks.soak:Sleeper"
folder = "{folder}"
[workers]
count = {workers}
lease = {lease}
timeout = {timeout}
"""


class Sleeper(BaseModel):
    """A trainer that sleeps for as long a step as `folder`/pace says, and writes every step to `folder`/steps.

    A file eat, or hang, in the folder is meant for one training: the first that sees it removes it, and takes memory without end, or
    goes silent.
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
        return [f.D / STEP * 0.1 for f in fidelities]

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
        self._note("begin", own, state["tokens"], fidelity.D)
        try:
            while state["tokens"] < fidelity.D:
                time.sleep(float((self.folder / "pace").read_text()))
                self._suffer()
                then = state | {"tokens": state["tokens"] + STEP}
                self._note("step", own, then["tokens"], fidelity.D)
                state = then  # not before: an interrupt would keep a step that nobody was told of
                yield Measurement(state["tokens"], 3.0, lr=params["lr"])
                if keep is not None and state["tokens"] // STEP % INTERVAL == 0:
                    _write(keep, state)
        except (GeneratorExit, KeyboardInterrupt):
            if keep is not None:
                _write(keep, state)
            raise
        if save is not None:
            _write(save, state)
        try:
            yield Measurement(int(fidelity.D), loss_of(params["lr"], fidelity), final=True)
        finally:
            if keep is not None:
                keep.unlink(missing_ok=True)

    def _note(self, what: str, own: Mapping[str, float], tokens: int, to: float) -> None:
        with (self.folder / "steps" / f"{os.getpid()}.jsonl").open("a") as log:
            log.write(json.dumps([time.monotonic(), what, own["N"], own["lr"], tokens, int(to)]) + "\n")

    def _suffer(self) -> None:
        for what in ("eat", "hang"):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / what).unlink()
                if what == "hang":
                    time.sleep(600)
                resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**29,) * 2)
                blocks = []
                while True:
                    blocks.append(bytearray(2**26))


def loss_of(lr: float, fidelity: Fidelity) -> float:
    return 2 + math.log(lr / 0.01) ** 2 / 20 + float(fidelity.N**-0.3 + fidelity.D**-0.3)


def _write(path: Path, state: Mapping[str, Any]) -> None:
    """Whole or not at all, as a trainer has to."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(state))
    os.replace(beside, path)


@dataclass
class World:
    """A study, what runs of it, and what was done to that."""

    folder: Path
    storage: str | None  # None: the journal
    uri: str
    rng: random.Random
    mlflow: MLflowServer | None = None
    postgresql: PostgreSQLServer | None = None
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    codes: Counter[int] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)  # faults
    later: list[threading.Thread] = field(default_factory=list)
    seen: dict[int, tuple[str, float | None, bool]] = field(default_factory=dict)

    @property
    def toml(self) -> Path:
        return self.folder / "studies" / "soak.toml"

    @property
    def files(self) -> StudyFiles:
        return StudyFiles(self.toml)

    def make(self, *, workers: int, iterations: int, tokens: tuple[int, int], seed: int) -> None:
        (self.folder / "studies").mkdir(parents=True)
        (self.folder / "steps").mkdir()
        self.pace(0.1)
        text = STUDY.format(
            seed=seed,
            low=tokens[0],
            high=tokens[1],
            iterations=iterations,
            folder=self.folder,
            workers=workers,
            lease=LEASE,
            timeout=TIMEOUT,
        )
        self.toml.write_text(text)

    def pace(self, seconds: float) -> None:
        beside = self.folder / "pace.new"
        beside.write_text(f"{seconds:.4f}")
        os.replace(beside, self.folder / "pace")

    def start(self, *words: str) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": self.uri}
        env.pop("MUSCALE_STORAGE", None)
        if self.storage:
            env["MUSCALE_STORAGE"] = self.storage
        command = [sys.executable, "-W", "ignore", "-m", "hpo", *words]
        with (self.folder / "log").open("ab") as log:
            self.launchers.append(subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log))

    def keep_going(self) -> None:
        """Some launcher of the study runs, as whoever wants its result would see to."""
        for launcher in [p for p in self.launchers if p.poll() is not None]:
            self.launchers.remove(launcher)
            self.codes[launcher.returncode] += 1
        if not self.launchers:
            self.start("resume", str(self.toml))

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                words = process.cmdline()
                if "worker" in words and str(self.toml) in words and process.status() != psutil.STATUS_STOPPED:
                    found.append(process)
        return sorted(found, key=lambda p: p.pid)

    def trials(self) -> list[FrozenTrial]:
        storage, _ = open_storage(self.storage or str(self.files.journal), None, "soak")
        study = storage.get_study_id_from_name("soak")
        return [t for t in storage.get_all_trials(study) if "bracket" in t.user_attrs]

    def look(self) -> int:
        """Remember every result that the study has by now; how many."""
        with contextlib.suppress(*get_storage_errors(), KeyError, ValueError):
            self.seen |= {t.number: result_of(t) for t in self.trials() if t.state.is_finished() and has_result(t)}
        return len(self.seen)

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, do)
        timer.start()
        self.later.append(timer)


def trainings(worker: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in worker.children() if "resource_tracker" not in " ".join(p.cmdline())]
    return []


def has_result(trial: FrozenTrial) -> bool:
    return trial.value is not None or bool(trial.user_attrs.get("diverged"))


def result_of(trial: FrozenTrial) -> tuple[str, float | None, bool]:
    return trial.state.name, trial.value, bool(trial.user_attrs.get("diverged"))


def send(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def worker_killed(world: World) -> bool:
    found = world.workers()
    send(world.rng.sample(found, min(1, len(found))), signal.SIGKILL)
    return bool(found)


def training_killed(world: World) -> bool:
    found = [t for w in world.workers() for t in trainings(w)]
    send(world.rng.sample(found, min(1, len(found))), signal.SIGKILL)
    return bool(found)


def launcher_killed(world: World) -> bool:
    found = [p for p in world.launchers if p.poll() is None]
    for launcher in found[:1]:
        launcher.kill()
    return bool(found)


def told_to_stop(world: World) -> bool:
    """Ten times in a row, the launcher and all workers."""
    found = [psutil.Process(p.pid) for p in world.launchers if p.poll() is None] + world.workers()
    for _ in range(10):
        send(found, world.rng.choice([signal.SIGTERM, signal.SIGINT]))
        time.sleep(0.02)
    return bool(found)


def stood_still(world: World) -> bool:
    """A worker and its training, past its lease."""
    found = world.workers()[:1]
    stopped = found + [t for w in found for t in trainings(w)]
    send(stopped, signal.SIGSTOP)
    world.after(STILL, lambda: send(stopped[::-1], signal.SIGCONT))
    return bool(found)


def worker_stood_still(world: World) -> bool:
    """Only the worker: its training has to end by itself."""
    found = world.workers()[-1:]
    send(found, signal.SIGSTOP)
    world.after(STILL, lambda: send(found, signal.SIGCONT))
    return bool(found)


def out_of_memory(world: World) -> bool:
    return laid(world.folder / "eat")


def hung(world: World) -> bool:
    return laid(world.folder / "hang")


def laid(path: Path) -> bool:
    """Whether the one before has been taken: else this is no other fault."""
    free = not path.exists()
    path.touch()
    return free


def second_launcher(world: World) -> bool:
    world.start("resume", str(world.toml))
    return True


def one_more_worker(world: World) -> bool:
    world.start("worker", str(world.toml))
    return True


def disk_full(world: World) -> bool:
    """For one worker: no file of its own may grow beyond the journal's size."""
    found = world.workers()[:1]
    for worker in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.rlimit(psutil.RLIMIT_FSIZE, (world.files.journal.stat().st_size, psutil.RLIM_INFINITY))
            world.after(2.0, lambda worker=worker: unlimited(worker))  # type: ignore[misc]
    return bool(found)


def unlimited(worker: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))


def line_cut_off(world: World) -> bool:
    """What a writer leaves that is killed in the middle of a line, its lock with it."""
    journal = Journal(world.files.journal)
    with journal.lock, world.files.journal.open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"' + world.rng.randbytes(8).hex().encode())
    return True


def postgresql_killed(world: World) -> bool:
    assert world.postgresql is not None
    world.postgresql.kill()
    time.sleep(world.rng.uniform(0.0, 3.0))
    world.postgresql.start()
    return True


def mlflow_killed(world: World) -> bool:
    assert world.mlflow is not None
    if any(t.is_alive() and t.name == "mlflow" for t in world.later):
        return False
    world.mlflow.kill()
    once = not world.done[mlflow_killed.__name__]
    world.after(LONG_OUTAGE if once else world.rng.uniform(1.0, 10.0), world.mlflow.start)
    world.later[-1].name = "mlflow"
    return True


ALWAYS = (
    worker_killed,
    training_killed,
    launcher_killed,
    told_to_stop,
    stood_still,
    worker_stood_still,
    out_of_memory,
    hung,
    second_launcher,
    one_more_worker,
)


def faults_of(world: World) -> list[Callable[[World], bool]]:
    found: list[Callable[[World], bool]] = list(ALWAYS)
    found += [disk_full, line_cut_off] if world.storage is None else []
    found += [postgresql_killed] if world.postgresql else []
    found += [mlflow_killed] if world.mlflow else []
    return found


@dataclass(frozen=True)
class Counts:
    """What is left when all is over."""

    faults: dict[str, int]
    evaluations: int
    planned: int
    crashed: int  # evaluations that count as diverged since their training crashed twice
    lost: list[str]  # results that were in the study once, or whose training had ended, and are not there
    doubled: list[str]
    orphaned: list[str]
    unsaid: list[str]  # results that MLflow has not, or otherwise
    steps: int  # in all
    again: int  # of them a second time or more
    beyond: list[str]  # starts that went further back than a checkpoint interval
    unseen: int  # points of curves that MLflow has not
    tracebacks: list[str]  # their last lines; a process that is interrupted while it imports says so, too
    codes: dict[int, int]  # how launchers ended -> how often

    @property
    def whole(self) -> bool:
        return not (self.lost or self.doubled or self.orphaned or self.unsaid or self.beyond or self.tracebacks)


def soak(world: World, *, seconds: float, faults: int, deadline: float = 900.0) -> None:
    """So many faults in about so much time; then let the study end."""
    world.start("launch", str(world.toml))
    while not list((world.folder / "steps").iterdir()):
        if world.launchers[0].poll() is not None:
            raise RuntimeError((world.folder / "log").read_text()[-2000:])
        time.sleep(0.1)
    began, kinds = time.monotonic(), faults_of(world)
    while (count := sum(world.done.values())) < faults:
        due = began + (count + world.rng.uniform(0.5, 1.0)) * seconds / faults
        time.sleep(max(0.05, due - time.monotonic()))
        world.keep_going()
        if world.look() and world.codes[0]:
            break
        fault = world.rng.choice(kinds)
        if len(world.workers()) > MOST_WORKERS:
            fault = worker_killed
        if fault(world):
            world.done[fault.__name__] += 1
            print(f"{time.monotonic() - began:6.1f} s  {fault.__name__}  {len(world.seen)} results", flush=True)
    for timer in world.later:
        timer.join()
    world.pace(0.0)
    ended = time.monotonic()
    while not world.codes[0]:
        if time.monotonic() - ended > deadline:
            raise RuntimeError(f"the study did not end:\n{(world.folder / 'log').read_text()[-4000:]}")
        world.keep_going()
        world.look()
        time.sleep(0.5)
    for launcher in world.launchers:
        launcher.wait(120)
    for _ in range(600):
        if not world.workers():
            break
        time.sleep(0.1)
    subprocess.run(  # sends what is left of the records
        [sys.executable, "-W", "ignore", "-c", SEND, str(world.files.records), world.uri],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


SEND = (
    "import sys; from pathlib import Path; from scaling.tracking.sender import send_spooled_records as send; "
    "assert send(Path(sys.argv[1]), sys.argv[2]) == 0"
)


def counted(world: World) -> Counts:
    """Two accounts of one study are compared: the trainer's own, and what Optuna and MLflow hold."""
    study, trainer = load_study(world.toml)
    search = open_existing(world.files, study, trainer, storage=world.storage)
    trials = world.trials()
    results = [t for t in trials if t.state.is_finished() and has_result(t)]
    by_run = Counter((t.user_attrs["config"], t.user_attrs["rung"]) for t in results)
    now = {t.number: result_of(t) for t in results}
    lost = [f"trial {n}: {was}, now {now.get(n)}" for n, was in world.seen.items() if now.get(n) != was]
    lost += [
        f"trial {t.number}: {t.value}, trained to {expected}"
        for t in results
        if t.value is not None
        and t.value != (expected := loss_of(t.params["lr"], Fidelity(t.user_attrs["N"], t.user_attrs["tokens"])))
    ]
    orphaned = [f"trial {t.number}: {t.state.name}" for t in trials if not t.state.is_finished()]
    progress = search.progress
    if not search.finished or progress.done != progress.planned:
        orphaned.append(f"{progress.done} of {progress.planned} evaluations")
    steps, again, beyond, ended = trained(world.folder / "steps")
    crashed = [t for t in results if t.user_attrs.get("diverged")]
    lost += [f"trial {t.number}: diverged without two crashes" for t in crashed if len(t.user_attrs["crashes"]) < 2]
    lost += [
        f"trial {t.number}: counts as diverged, though its training had ended"
        for t in crashed
        if (t.user_attrs["N"], t.params["lr"], t.user_attrs["tokens"]) in ended
    ]
    unsaid, unseen = recorded(world, results)
    return Counts(
        faults=dict(sorted(world.done.items())),
        evaluations=len(results),
        planned=progress.planned or 0,
        crashed=len(crashed),
        lost=lost,
        doubled=[f"configuration {c} at rung {r}: {n} results" for (c, r), n in by_run.items() if n > 1],
        orphaned=orphaned,
        unsaid=unsaid,
        steps=steps,
        again=again,
        beyond=beyond,
        unseen=unseen,
        tracebacks=re.findall(r"^[\w.]+(?:Error|Exception)\b.*", (world.folder / "log").read_text(), re.MULTILINE),
        codes=dict(world.codes),
    )


def trained(folder: Path) -> tuple[int, int, list[str], set[tuple[float, float, int]]]:
    """Steps, those made again, starts that went too far back, and the runs whose last step was made."""
    by_run: dict[tuple[float, float, int], list[tuple[float, str, int, str]]] = defaultdict(list)
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            at, what, size, lr, tokens, to = json.loads(line)
            by_run[size, lr, to].append((at, what, tokens, path.stem))
    count, again, beyond = 0, 0, []
    for run, events in by_run.items():
        furthest = 0
        made: Counter[int] = Counter()
        for _, what, tokens, process in sorted(events):
            if what == "step":
                made[tokens] += 1
                furthest = max(furthest, tokens)
            elif furthest - tokens > INTERVAL * STEP:
                beyond.append(f"{run}: process {process} began at {tokens}, {furthest} had been reached")
        count += made.total()
        again += made.total() - len(made)
    return count, again, beyond, {run for run, events in by_run.items() if max(e[2] for e in events) >= run[2]}


def recorded(world: World, results: Sequence[FrozenTrial]) -> tuple[list[str], int]:
    """Results that MLflow's run table has not once and so, and how many points its curves lack."""
    runs = load_runs("soak", tracking_uri=world.uri)
    rows = {
        (name, int(tokens)): (loss, bool(gone))
        for name, tokens, loss, gone in runs[["name", "D", "loss", "diverged"]].values
    }
    wanted = {
        (f"config-{t.user_attrs['config']:04d}", int(t.user_attrs["tokens"])): (t.value, t.value is None)
        for t in results
    }
    said = [f"{len(runs)} rows for {len(wanted)} results"] if len(runs) != len(wanted) else []
    for key, (loss, gone) in wanted.items():
        got = rows.get(key)
        if got is None or got[1] != gone or (loss is not None and abs(got[0] - loss) > 1e-12):
            said.append(f"{key}: {(loss, gone)} in the study, {got} in MLflow")
    client = connect(world.uri)
    points: dict[str, set[int]] = defaultdict(set)
    for run in client.search_runs([find_experiment_id(client, "soak")], "tags.`muscale.role` = 'proxy'", max_results=5000):
        points[run.info.run_name or ""] |= {int(step) for step in read_curve(client, run.info.run_id)[0]}
    tops: dict[str, int] = {}
    for (name, tokens), (loss, _) in wanted.items():
        if loss is not None:
            tops[name] = max(tokens, tops.get(name, 0))
    return said, sum(len(set(range(STEP, top + 1, STEP)) - points[name]) for name, top in tops.items())


@contextlib.contextmanager
def world_of(storage: str, seed: int, *, mlflow_server: bool = True, folder: Path | None = None) -> Iterator[World]:
    """A world in a folder, with its servers. All that runs of it is killed in the end."""
    with contextlib.ExitStack() as stack:
        here = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        if storage == "postgresql" and folder is None:
            here.chmod(0o711)
        world = World(here / "work", None, f"sqlite:///{here}/mlflow.db", random.Random(seed))
        if mlflow_server:
            world.mlflow = MLflowServer(here)
            world.mlflow.start()
            world.uri = world.mlflow.uri
            stack.callback(world.mlflow.kill)
        if storage == "postgresql":
            world.postgresql = stack.enter_context(PostgreSQLServer(here, find_free_port()))
            world.storage = world.postgresql.url
        try:
            yield world
        finally:
            for timer in world.later:
                timer.join()
            for launcher in world.launchers:
                launcher.kill()
            send(world.workers(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=("journal", "postgresql"), default="journal")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="kept; a new one")
    given = parser.parse_args()
    with world_of(given.storage, given.seed, folder=given.folder) as world:
        world.make(workers=given.workers, iterations=given.iterations, tokens=(6_000, 162_000), seed=given.seed)
        soak(world, seconds=given.seconds, faults=given.faults)
        found = counted(world)
    for name, value in vars(found).items():
        print(f"{name:<12}{value if not isinstance(value, list) or value else 'none'}")
    sys.exit(0 if found.whole else 1)


if __name__ == "__main__":
    main()
