"""The faults of the soak. Each is a function of the world that returns whether there was anything to do it to."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.soak_world import LEASE_SECONDS, SoakWorld, list_trainings, send_signal
from hpo.storage.journal import Journal

# How long a process is suspended.
SUSPENDED_SECONDS = 1.6 * LEASE_SECONDS
# How long the first outage of MLflow lasts.
LONG_OUTAGE_SECONDS = 60.0

Fault = Callable[[SoakWorld], bool]


def kill_worker(world: SoakWorld) -> bool:
    """Kill a worker."""
    workers = world.list_workers()
    send_signal(world.rng.sample(workers, min(1, len(workers))), signal.SIGKILL)
    return bool(workers)


def kill_training(world: SoakWorld) -> bool:
    """Kill the process that trains for a worker."""
    trainings = [t for w in world.list_workers() for t in list_trainings(w)]
    send_signal(world.rng.sample(trainings, min(1, len(trainings))), signal.SIGKILL)
    return bool(trainings)


def kill_launcher(world: SoakWorld) -> bool:
    """Kill a launcher, whose workers continue."""
    launchers = [p for p in world.launchers if p.poll() is None]
    for launcher in launchers[:1]:
        launcher.kill()
    return bool(launchers)


def stop_all(world: SoakWorld) -> bool:
    """Stop all launchers and workers by ten signals in a row."""
    processes = [psutil.Process(p.pid) for p in world.launchers if p.poll() is None] + world.list_workers()
    for _ in range(10):
        send_signal(processes, world.rng.choice([signal.SIGTERM, signal.SIGINT]))
        time.sleep(0.02)
    return bool(processes)


def suspend_worker_and_training(world: SoakWorld) -> bool:
    """Suspend a worker and its training past its lease."""
    workers = world.list_workers()[:1]
    suspended = workers + [t for w in workers for t in list_trainings(w)]
    send_signal(suspended, signal.SIGSTOP)
    world.do_later(SUSPENDED_SECONDS, lambda: send_signal(suspended[::-1], signal.SIGCONT))
    return bool(workers)


def suspend_worker(world: SoakWorld) -> bool:
    """Suspend only a worker past its lease. Its training must end by itself."""
    workers = world.list_workers()[-1:]
    send_signal(workers, signal.SIGSTOP)
    world.do_later(SUSPENDED_SECONDS, lambda: send_signal(workers, signal.SIGCONT))
    return bool(workers)


def exhaust_memory(world: SoakWorld) -> bool:
    """Make a training use up all memory."""
    return _create_order(world.folder / "eat")


def hang_training(world: SoakWorld) -> bool:
    """Make a training hang."""
    return _create_order(world.folder / "hang")


def _create_order(path: Path) -> bool:
    """Create the file that a training obeys. If the previous one has not been taken, this is no other fault."""
    is_free = not path.exists()
    path.touch()
    return is_free


def start_second_launcher(world: SoakWorld) -> bool:
    """Resume the study once more."""
    world.start("resume", str(world.toml))
    return True


def start_worker(world: SoakWorld) -> bool:
    """Start one more worker."""
    world.start("worker", str(world.toml))
    return True


def fill_disk(world: SoakWorld) -> bool:
    """Let no file that one worker writes grow beyond the journal's size for a while."""
    workers = world.list_workers()[:1]
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.rlimit(psutil.RLIMIT_FSIZE, (world.files.journal.stat().st_size, psutil.RLIM_INFINITY))
            world.do_later(2.0, lambda worker=worker: _remove_limit(worker))  # type: ignore[misc]
    return bool(workers)


def _remove_limit(worker: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))


def truncate_line(world: SoakWorld) -> bool:
    """Leave in the journal what a writer leaves that is killed within a line, while it holds the lock."""
    journal = Journal(world.files.journal)
    with journal.lock, world.files.journal.open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"' + world.rng.randbytes(8).hex().encode())
    return True


def kill_postgresql(world: SoakWorld) -> bool:
    """Kill PostgreSQL and start it again after up to 3 seconds."""
    assert world.postgresql is not None
    world.postgresql.kill()
    time.sleep(world.rng.uniform(0.0, 3.0))
    world.postgresql.start()
    return True


def kill_mlflow(world: SoakWorld) -> bool:
    """Kill the MLflow server, and start it again after a minute the first time, then after up to 10 seconds."""
    assert world.mlflow is not None
    if any(timer.is_alive() and timer.name == "mlflow" for timer in world.timers):
        return False
    world.mlflow.kill()
    is_first = not world.faults[kill_mlflow.__name__]
    seconds = LONG_OUTAGE_SECONDS if is_first else world.rng.uniform(1.0, 10.0)
    world.do_later(seconds, world.mlflow.start).name = "mlflow"
    return True


ALWAYS: tuple[Fault, ...] = (
    kill_worker,
    kill_training,
    kill_launcher,
    stop_all,
    suspend_worker_and_training,
    suspend_worker,
    exhaust_memory,
    hang_training,
    start_second_launcher,
    start_worker,
)


def list_faults(world: SoakWorld) -> list[Fault]:
    """Return the faults that are possible in a world."""
    faults = list(ALWAYS)
    faults += [fill_disk, truncate_line] if world.storage is None else []
    faults += [kill_postgresql] if world.postgresql else []
    faults += [kill_mlflow] if world.mlflow else []
    return faults
