"""A study under fire: random faults of every kind while its workers train, then an account of what was lost.

    python -m benchmarks.soak                                            # a journal, 100 faults in 5 minutes
    python -m benchmarks.soak --storage postgresql --faults 100 --seconds 300 --seed 1

Everything is real but the training: processes of `hpo launch`, `hpo resume` and `hpo worker`, an MLflow server and a
PostgreSQL server, which are killed, suspended, cut off and filled up. The trainer sleeps, logs every step, and keeps
its state every INTERVAL steps. The seed determines which fault comes when; what it hits is chance.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from optuna.trial import FrozenTrial

from benchmarks.soak_faults import kill_worker, list_faults
from benchmarks.soak_world import (
    INTERVAL,
    ROOT,
    STEP,
    SoakWorld,
    compute_loss,
    has_result,
    open_world,
    summarize_result,
)
from hpo.search.search import Search
from hpo.storage.trial_attributes import is_diverged, read_crashes
from hpo.study.config import load_study
from hpo.study.lifecycle import open_existing
from scaling.laws.compute import Fidelity
from scaling.runs.io import load_runs
from scaling.tracking.client import connect, find_experiment_id
from scaling.tracking.log import read_curve

# With more workers, of all launchers together, one is killed instead of doing another fault.
MAX_WORKERS = 8
# While faults are still to come, a study with this share of its results slows down to this pace, so that it cannot end.
SLOW_SHARE, SLOW_PACE_SECONDS = 0.6, 2.0
# Sends the records that are left.
SEND_RECORDS = (
    "import sys; from pathlib import Path; from scaling.tracking.sender import send_spooled_records; "
    "assert send_spooled_records(Path(sys.argv[1]), sys.argv[2]) == 0"
)


@dataclass(frozen=True)
class SoakReport:
    """What is left of a study after the faults.

    Attributes:
        faults: How often each fault happened.
        evaluations: Results in the study.
        planned: Results that it should have.
        crashed: Results that count as diverged because their training crashed twice.
        lost: Results that the study had once and has no more, or whose training had finished without a result.
        doubled: Evaluations with more than one result.
        orphaned: Trials that have not finished.
        unrecorded: Results that MLflow does not have, or has differently.
        steps: Steps that were trained in all.
        repeated: Steps among them that had been trained before.
        too_far_back: Starts that went further back than a checkpoint interval.
        missing_points: Points of curves that MLflow does not have.
        tracebacks: Last lines of tracebacks. A process that is interrupted while it imports prints one, too.
        exit_codes: How often launchers ended with each exit code.
    """

    faults: dict[str, int]
    evaluations: int
    planned: int
    crashed: int
    lost: list[str]
    doubled: list[str]
    orphaned: list[str]
    unrecorded: list[str]
    steps: int
    repeated: int
    too_far_back: list[str]
    missing_points: int
    tracebacks: list[str]
    exit_codes: dict[int, int]

    @property
    def is_whole(self) -> bool:
        """Whether nothing was lost, doubled or left behind."""
        problems = (self.lost, self.doubled, self.orphaned, self.unrecorded, self.too_far_back, self.tracebacks)
        return not any(problems)


def soak(world: SoakWorld, *, seconds: float, faults: int, deadline: float = 900.0) -> None:
    """Launch a study, do faults to it, and let it finish.

    Args:
        world: The world, whose study file has been written.
        seconds: About how long the faults take together.
        faults: How many faults.
        deadline: Seconds after the last fault by which the study must have finished.

    Raises:
        RuntimeError: If the study does not start or finish.
    """
    world.start("launch", str(world.toml))
    while not list((world.folder / "steps").iterdir()):
        if world.launchers[0].poll() is not None:
            raise RuntimeError(world.log[-2000:])
        time.sleep(0.1)
    planned = open_search(world).progress.planned or 0
    began, kinds = time.monotonic(), list_faults(world)
    while (count := sum(world.faults.values())) < faults:
        due = began + (count + world.rng.uniform(0.5, 1.0)) * seconds / faults
        time.sleep(max(0.05, due - time.monotonic()))
        world.keep_going()
        if world.remember_results() > SLOW_SHARE * planned:
            world.set_pace(SLOW_PACE_SECONDS)
        if world.exit_codes[0]:
            break
        fault = world.rng.choice(kinds)
        if len(world.list_workers()) > MAX_WORKERS:
            fault = kill_worker
        if fault(world):
            world.faults[fault.__name__] += 1
            elapsed = time.monotonic() - began
            print(f"{elapsed:6.1f} s  {fault.__name__:<27}  {len(world.results)} results", flush=True)
    for timer in world.timers:
        timer.join()
    world.set_pace(0.0)
    _wait_until_finished(world, deadline)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SEND_RECORDS, str(world.files.records), world.uri],
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def _wait_until_finished(world: SoakWorld, deadline: float) -> None:
    """Resume the study until a launcher reports that it is finished, then wait for all processes to end."""
    began = time.monotonic()
    while not world.exit_codes[0]:
        if time.monotonic() - began > deadline:
            raise RuntimeError(f"the study did not end:\n{world.log[-4000:]}")
        world.keep_going()
        world.remember_results()
        time.sleep(0.5)
    for launcher in world.launchers:
        launcher.wait(deadline)
    while world.list_workers():
        if time.monotonic() - began > deadline:
            raise RuntimeError(f"workers did not end:\n{world.log[-4000:]}")
        time.sleep(0.1)


def open_search(world: SoakWorld) -> Search:
    """Return the study's search."""
    study, trainer = load_study(world.toml)
    return open_existing(world.files, study, trainer, storage=world.storage)


def make_report(world: SoakWorld) -> SoakReport:
    """Compare two accounts of a finished study: the trainer's own log, and what Optuna and MLflow hold."""
    search, trials = open_search(world), world.read_trials()
    results = [t for t in trials if has_result(t)]
    by_run = Counter((t.user_attrs["config"], t.user_attrs["rung"]) for t in results)
    log = read_steps(world.folder / "steps")
    orphaned = [f"trial {t.number}: {t.state.name}" for t in trials if not t.state.is_finished()]
    progress = search.progress
    if not search.finished or progress.done != progress.planned:
        orphaned.append(f"{progress.done} of {progress.planned} evaluations")
    unrecorded, missing_points = compare_with_mlflow(world, results)
    return SoakReport(
        faults=dict(sorted(world.faults.items())),
        evaluations=len(results),
        planned=progress.planned or 0,
        crashed=sum(map(is_diverged, results)),
        lost=find_losses(world, results, log.finished),
        doubled=[f"configuration {c} at rung {r}: {n} results" for (c, r), n in by_run.items() if n > 1],
        orphaned=orphaned,
        unrecorded=unrecorded,
        steps=log.steps,
        repeated=log.repeated,
        too_far_back=log.too_far_back,
        missing_points=missing_points,
        tracebacks=re.findall(r"^[\w.]+(?:Error|Exception)\b.*", world.log, re.MULTILINE),
        exit_codes=dict(world.exit_codes),
    )


def find_losses(world: SoakWorld, results: Sequence[FrozenTrial], finished: set[tuple[float, float, int]]) -> list[str]:
    """Return every result that was lost, changed or is wrong.

    Args:
        world: The world, which remembers the results that were seen earlier.
        results: The trials with results now.
        finished: (N, lr, tokens) of the runs whose last step was trained.

    Returns:
        One sentence per problem.
    """
    now = {t.number: summarize_result(t) for t in results}
    lost = [f"trial {n}: {old}, now {now.get(n)}" for n, old in world.results.items() if now.get(n) != old]
    for trial in results:
        size, tokens, lr = trial.user_attrs["N"], trial.user_attrs["tokens"], trial.params["lr"]
        expected = compute_loss(lr, Fidelity(size, tokens))
        if trial.value is not None and trial.value != expected:
            lost.append(f"trial {trial.number}: {trial.value}, trained to {expected}")
        if is_diverged(trial):
            if len(read_crashes(trial)) < 2:
                lost.append(f"trial {trial.number}: diverged without two crashes")
            if (size, lr, tokens) in finished:
                lost.append(f"trial {trial.number}: counts as diverged, though its training had finished")
    return lost


class StepLog(NamedTuple):
    """What the trainer's own log says.

    Attributes:
        steps: Steps that were trained.
        repeated: Steps among them that had been trained before.
        too_far_back: Starts that went further back than a checkpoint interval.
        finished: (N, lr, tokens) of the runs whose last step was trained.
    """

    steps: int
    repeated: int
    too_far_back: list[str]
    finished: set[tuple[float, float, int]]


def read_steps(folder: Path) -> StepLog:
    """Read the logs of all processes that trained."""
    by_run: dict[tuple[float, float, int], list[tuple[float, str, int, str]]] = defaultdict(list)
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            at, what, size, lr, tokens, end = json.loads(line)
            by_run[size, lr, end].append((at, what, tokens, path.stem))
    steps, repeated, too_far_back = 0, 0, []
    for run, events in by_run.items():
        furthest = 0
        trained: Counter[int] = Counter()
        for _, what, tokens, process in sorted(events):
            if what == "step":
                trained[tokens] += 1
                furthest = max(furthest, tokens)
            elif furthest - tokens > INTERVAL * STEP:
                too_far_back.append(f"{run}: process {process} began at {tokens}, {furthest} had been reached")
        steps += trained.total()
        repeated += trained.total() - len(trained)
    finished = {run for run, events in by_run.items() if max(tokens for _, _, tokens, _ in events) >= run[2]}
    return StepLog(steps, repeated, too_far_back, finished)


def compare_with_mlflow(world: SoakWorld, results: Sequence[FrozenTrial]) -> tuple[list[str], int]:
    """Compare the results of a study with MLflow's run table.

    Args:
        world: The world.
        results: The trials with results.

    Returns:
        A sentence for each result that MLflow lacks or has differently, and the number of points that its curves lack.
    """
    runs = load_runs("soak", tracking_uri=world.uri)
    rows = {
        (name, int(tokens)): (loss, bool(diverged))
        for name, tokens, loss, diverged in runs[["name", "D", "loss", "diverged"]].values
    }
    expected = {
        (f"config-{t.user_attrs['config']:04d}", int(t.user_attrs["tokens"])): (t.value, t.value is None)
        for t in results
    }
    problems = [f"{len(runs)} rows for {len(expected)} results"] if len(runs) != len(expected) else []
    for key, (loss, diverged) in expected.items():
        row = rows.get(key)
        if row is None or row[1] != diverged or (loss is not None and abs(row[0] - loss) > 1e-12):
            problems.append(f"{key}: {(loss, diverged)} in the study, {row} in MLflow")
    client = connect(world.uri)
    points: dict[str, set[int]] = defaultdict(set)
    experiment = find_experiment_id(client, "soak")
    for run in client.search_runs([experiment], "tags.`muscale.role` = 'proxy'", max_results=5000):
        points[run.info.run_name or ""] |= {int(step) for step in read_curve(client, run.info.run_id)[0]}
    longest: dict[str, int] = {}
    for (name, tokens), (loss, _) in expected.items():
        if loss is not None:
            longest[name] = max(tokens, longest.get(name, 0))
    missing = sum(len(set(range(STEP, tokens + 1, STEP)) - points[name]) for name, tokens in longest.items())
    return problems, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=("journal", "postgresql"), default="journal")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="a new folder, which is kept")
    options = parser.parse_args()
    with open_world(options.storage, options.seed, folder=options.folder) as world:
        world.write_study(
            workers=options.workers, iterations=options.iterations, tokens=(6_000, 162_000), seed=options.seed
        )
        soak(world, seconds=options.seconds, faults=options.faults)
        report = make_report(world)
    for name, value in vars(report).items():
        print(f"{name:<15}{value if not isinstance(value, list) or value else 'none'}")
    sys.exit(0 if report.is_whole else 1)


if __name__ == "__main__":
    main()
