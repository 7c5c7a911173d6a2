"""Many workers on one study: trials a second by storage, how busy they are, and whether any decision was taken twice.

    python -m benchmarks.many_workers                               # journal and PostgreSQL, with and without Optuna's proxy; 1, 8, 32
    python -m benchmarks.many_workers --storage journal --workers 32 --trials 500 --seconds 0.1

PostgreSQL is made afresh in a temporary folder and started there; its programs are looked for on the PATH and where Debian puts them.
Workers are processes that ask, sleep and tell. With --seconds S a trial sleeps between S / 3.2 and 3.2 S, a factor of ten, log-uniform.
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

from benchmarks.servers import postgresql, proxy
from hpo.search.hyperband import compute_rung_sizes
from hpo.search.search import Search
from hpo.storage.leases import LeaseLost

STORAGES = ("journal", "postgresql", "grpc+journal", "grpc+postgresql")
TOKENS = (1_000, 27_000)


@dataclass(frozen=True)
class Seen:
    """What a crowd of workers did."""

    trials: int  # results
    seconds: float  # from the first ask to the last tell
    busy: float  # share of the workers' time that was training, until the first found nothing left to start
    asking: float  # mean seconds of an ask
    faults: list[str]


def search(storage: str, **changes: Any) -> Search:
    """A random search, several sizes, promotions as soon as they can be."""
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


def loss_of(params: dict[str, Any], tokens: float) -> float:
    return 2 + math.log(params["lr"] / 0.01) ** 2 / 20 + float(tokens) ** -0.3


def worker(storage: str, name: str, trials: int, seconds: float, results: Any, go: Any) -> None:
    """Ask, sleep, tell until the study has so many results."""
    mine = search(storage, worker=name)
    slept, asked, asks = 0.0, 0.0, 0
    rng = random.Random(name)
    go.wait()
    began = ended = time.monotonic()
    while len(mine.study.get_trials(deepcopy=False)) < trials:
        before = time.monotonic()
        job = mine.ask()
        asked += time.monotonic() - before
        asks += 1
        if job is None:
            time.sleep(0.05)
            continue
        before = time.monotonic()
        time.sleep(seconds * 10 ** rng.uniform(-0.5, 0.5) if seconds else 0.0)
        slept += time.monotonic() - before
        with contextlib.suppress(LeaseLost):  # counted by what the study holds
            mine.tell(job, loss_of(job.params, job.fidelity.D))
        ended = time.monotonic()
    results.put((began, ended, slept, asked, asks))


def crowd(storage: str, workers: int, trials: int, seconds: float) -> Seen:
    """So many workers on a new study, in processes of their own."""
    study = search(storage)
    context = multiprocessing.get_context("spawn" if storage.startswith("grpc") else "fork")
    results, go = context.Queue(), context.Event()
    given = [(storage, f"host-{i}/1/1.0", trials, seconds, results, go) for i in range(workers)]
    running = [context.Process(target=worker, args=args) for args in given]
    for process in running:
        process.start()
    time.sleep(1.0 + 0.1 * workers)
    go.set()
    rows = [results.get(timeout=600) for _ in running]
    for process in running:
        process.join()
    first, last = min(r[0] for r in rows), max(r[1] for r in rows)
    done = [t for t in study.study.get_trials(deepcopy=False) if t.state.is_finished()]
    return Seen(
        len(done),
        last - first,
        sum(r[2] for r in rows) / sum(r[1] - r[0] for r in rows),
        sum(r[3] for r in rows) / sum(r[4] for r in rows),
        faults(study, study.study.get_trials(deepcopy=False)),
    )


def faults(study: Search, trials: list[FrozenTrial]) -> list[str]:
    """What must not be: an evaluation twice, a promotion without the run below, a rung with more than its share, one left over."""
    said = []
    ours = [t for t in trials if "bracket" in t.user_attrs]
    twice = [k for k, n in Counter((t.user_attrs["config"], t.user_attrs["rung"]) for t in ours).items() if n > 1]
    if twice:
        said.append(f"evaluated twice: {twice}")
    at = {(t.user_attrs["config"], t.user_attrs["rung"]): t for t in ours}
    starts = {t.user_attrs["config"]: t.user_attrs["rung"] for t in reversed(ours)}
    for (config, rung), t in at.items():
        below = at.get((config, rung - 1))
        if rung > starts[config] and (below is None or below.datetime_complete is None):
            said.append(f"promoted without a result below: configuration {config} at rung {rung}")
        elif rung > starts[config] and t.datetime_start is not None and below is not None:
            assert below.datetime_complete is not None
            if (below.datetime_complete - t.datetime_start).total_seconds() > 0.05:
                said.append(f"promoted before its result: configuration {config} at rung {rung}")
    by_rung = Counter((tuple(t.user_attrs["bracket"]), t.user_attrs["rung"]) for t in ours)
    for (bracket, rung), n in by_rung.items():
        start = bracket[-1]
        most = compute_rung_sizes(start, study.ladder.top, study.ladder.eta)[rung - start]
        if n > most and (rung == start or not study.asynchronous):  # ahead of time some rise that prove wrong
            said.append(f"bracket {bracket} has {n} runs at rung {rung}, more than {most}")
    return said


@contextlib.contextmanager
def opened(kind: str) -> Iterator[str]:
    """A fresh storage of that kind, by its URL or path."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        storage = str(folder / "study.journal")
        if kind.endswith("postgresql"):
            storage = stack.enter_context(postgresql(folder))
        if kind.startswith("grpc"):
            storage = stack.enter_context(proxy(storage))
        yield storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.0, help="a trial sleeps about this long")
    given = parser.parse_args()
    print("storage           workers  trials/s  busy  seconds/ask  faults")
    for kind in given.storage:
        for count in given.workers:
            with opened(kind) as storage:
                seen = crowd(storage, count, given.trials, given.seconds)
            rate = seen.trials / seen.seconds
            print(
                f"{kind:<17} {count:>7} {rate:>9.1f} {seen.busy:>5.2f} {seen.asking:>12.3f}  {seen.faults or 'none'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
