"""Many workers on one study: trials per second by storage, how busy workers are, and whether a decision is taken twice.

    # Journal and PostgreSQL, with and without Optuna's proxy; 1, 8 and 32 workers.
    python -m benchmarks.many_workers
    python -m benchmarks.many_workers --storage journal --workers 32 --trials 500 --seconds 0.1

PostgreSQL gets a new database in a temporary folder and is started there. Its programs are looked for on the PATH and
where Debian puts them. Workers are processes that ask, sleep and tell. With --seconds S a trial sleeps between S /
3.2 and 3.2 S, a factor of ten, log-uniform.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial

from benchmarks.servers import serve_postgresql, serve_proxy
from hpo.search.hyperband import compute_rung_sizes
from hpo.search.search import Search
from hpo.storage.leases import LeaseLost

STORAGES = ("journal", "postgresql", "grpc+journal", "grpc+postgresql")
TOKENS = (1_000, 27_000)


@dataclass(frozen=True)
class CrowdResult:
    """What many workers on one study did.

    Attributes:
        trials: Number of results.
        seconds: From the first ask to the last tell.
        busy: Share of the workers' time that was training.
        asking: Mean seconds of an ask.
        idle_asks: Number of asks that gave nothing to train.
        faults: What `find_faults` found.
    """

    trials: int
    seconds: float
    busy: float
    asking: float
    idle_asks: int
    faults: list[str]


def open_search(storage: str, **changes: Any) -> Search:
    """Open a random search with several sizes and asynchronous promotions."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings: dict[str, Any] = {
        "tokens": TOKENS,
        "sizes": (1e3, 4e3),
        "sampler": "random",
        "iterations": 40,
        "asynchronous": True,
        "storage": storage,
        "name": "crowd",
        "lease": 60.0,
    }
    return Search({"lr": FloatDistribution(1e-4, 1.0, log=True)}, **(settings | changes))


def compute_loss(params: dict[str, Any], tokens: float) -> float:
    """Return the loss of a simulated training."""
    return 2 + math.log(params["lr"] / 0.01) ** 2 / 20 + float(tokens) ** -0.3


def run_worker(storage: str, name: str, trials: int, seconds: float, results: Any, start: Any) -> None:
    """Ask, sleep and tell until the study has a number of trials, then put the measured times into a queue.

    Args:
        storage: Where the study is.
        name: Name of the worker.
        trials: Number of trials at which to end.
        seconds: A trial sleeps about this long.
        results: Queue for (start, end, seconds slept, seconds asked, number of asks, number of asks that gave nothing).
        start: Event to wait for.
    """
    search = open_search(storage, worker=name)
    slept, asked, asks, idle_asks = 0.0, 0.0, 0, 0
    rng = random.Random(name)
    start.wait()
    began = ended = time.monotonic()
    while len(search.study.get_trials(deepcopy=False)) < trials:
        before = time.monotonic()
        job = search.ask()
        asked += time.monotonic() - before
        asks += 1
        if job is None:
            idle_asks += 1
            time.sleep(0.05)
            continue
        before = time.monotonic()
        time.sleep(seconds * 10 ** rng.uniform(-0.5, 0.5) if seconds else 0.0)
        slept += time.monotonic() - before
        # A result that comes too late does not count; only what the study holds does.
        with contextlib.suppress(LeaseLost):
            search.tell(job, compute_loss(job.params, job.fidelity.D))
        ended = time.monotonic()
    results.put((began, ended, slept, asked, asks, idle_asks))


def run_workers(storage: str, workers: int, trials: int, seconds: float) -> CrowdResult:
    """Run many workers on a new study, each in a process of its own.

    Args:
        storage: Where to create the study.
        workers: Number of workers.
        trials: Number of trials at which they end.
        seconds: A trial sleeps about this long.
    """
    search = open_search(storage)
    context = multiprocessing.get_context("spawn" if storage.startswith("grpc") else "fork")
    results, start = context.Queue(), context.Event()
    arguments = [(storage, f"host-{i}/1/1.0", trials, seconds, results, start) for i in range(workers)]
    processes = [context.Process(target=run_worker, args=args) for args in arguments]
    for process in processes:
        process.start()
    time.sleep(1.0 + 0.1 * workers)
    start.set()
    rows = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    first, last = min(r[0] for r in rows), max(r[1] for r in rows)
    done = [t for t in search.study.get_trials(deepcopy=False) if t.state.is_finished()]
    return CrowdResult(
        len(done),
        last - first,
        sum(r[2] for r in rows) / sum(r[1] - r[0] for r in rows),
        sum(r[3] for r in rows) / sum(r[4] for r in rows),
        sum(r[5] for r in rows),
        find_faults(search, search.study.get_trials(deepcopy=False)),
    )


def find_faults(search: Search, trials: list[FrozenTrial]) -> list[str]:
    """Return a line for each fault in a study.

    Faults are an evaluation that was run twice, a promotion without a result at the rung below, or before it, and a
    rung with more runs than it has places.
    """
    faults = []
    evaluated = [t for t in trials if "bracket" in t.user_attrs]
    counts = Counter((t.user_attrs["config"], t.user_attrs["rung"]) for t in evaluated)
    twice = [evaluation for evaluation, n in counts.items() if n > 1]
    if twice:
        faults.append(f"evaluated twice: {twice}")
    by_evaluation = {(t.user_attrs["config"], t.user_attrs["rung"]): t for t in evaluated}
    starts = {t.user_attrs["config"]: t.user_attrs["rung"] for t in reversed(evaluated)}
    for (config, rung), trial in by_evaluation.items():
        below = by_evaluation.get((config, rung - 1))
        if rung > starts[config] and (below is None or below.datetime_complete is None):
            faults.append(f"promoted without a result below: configuration {config} at rung {rung}")
        elif rung > starts[config] and trial.datetime_start is not None and below is not None:
            assert below.datetime_complete is not None
            if (below.datetime_complete - trial.datetime_start).total_seconds() > 0.05:
                faults.append(f"promoted before its result: configuration {config} at rung {rung}")
    by_rung = Counter((tuple(t.user_attrs["bracket"]), t.user_attrs["rung"]) for t in evaluated)
    for (bracket, rung), n in by_rung.items():
        start = bracket[-1]
        most = compute_rung_sizes(start, search.ladder.top, search.ladder.eta)[rung - start]
        # Asynchronous promotions may prove wrong, so that more than `most` were promoted.
        if n > most and (rung == start or not search.asynchronous):
            faults.append(f"bracket {bracket} has {n} runs at rung {rung}, more than {most}")
    return faults


@contextlib.contextmanager
def create_storage(kind: str) -> Iterator[str]:
    """Yield the path or URL of a new storage, one of STORAGES."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        storage = str(folder / "study.journal")
        if kind.endswith("postgresql"):
            storage = stack.enter_context(serve_postgresql(folder))
        if kind.startswith("grpc"):
            storage = stack.enter_context(serve_proxy(storage))
        yield storage


def main() -> None:
    """Measure every storage with every number of workers, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.0, help="a trial sleeps about this long")
    options = parser.parse_args()
    print("storage           workers  trials/s  busy  seconds/ask  faults")
    for kind in options.storage:
        for count in options.workers:
            with create_storage(kind) as storage:
                result = run_workers(storage, count, options.trials, options.seconds)
            rate = result.trials / result.seconds
            print(
                f"{kind:<17} {count:>7} {rate:>9.1f} {result.busy:>5.2f} {result.asking:>12.3f}  "
                f"{result.faults or 'none'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
