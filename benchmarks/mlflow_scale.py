"""MLflow under load: a fresh store opened by many at once, metrics a second, and commands beside 10,000 runs of 100 points.

    OMP_NUM_THREADS=1 python -m benchmarks.mlflow_scale                       # all; the store takes a quarter of an hour to fill
    OMP_NUM_THREADS=1 python -m benchmarks.mlflow_scale --only open rate logging
    OMP_NUM_THREADS=1 python -m benchmarks.mlflow_scale --only commands --folder /tmp/kept

`rate` is of scaling.tracking.recorder.Recorder: from the first point of three metrics to the end of the `with`, when MLflow has them all.
`logging` trains the quickstart's smallest proxy with and without a Recorder, by turns, in one process that has trained before.
The large store holds one study, "big", whose losses follow a law. Each command is a process of its own, run by turns beside
that store and beside one of 100 runs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling.common.measurement import Measurement
from scaling.tracking.client import connect, find_experiment_id
from scaling.tracking.experiment import find_or_create_child_run, set_run_status, find_or_create_study_run
from scaling.tracking.log import log_records, now_ms, result_to_metrics
from scaling.tracking.recorder import Recorder

ALL = ("open", "rate", "logging", "commands")
SMALL = 100  # runs of the other store
STUDY = """
[search]
tokens = { min = 16_384, max = 49_152 }
sampler = "random"
[space]
lr = { low = 1e-3, high = 1e-1, log = true }
[trainer]
widths = [16]
n_layers = 1
d_head = 16
base_width = 16
seq_len = 128
corpus = "stdlib"
[workers]
count = 1
"""
LOAD = "from scaling.runs.io import load_runs; print(len(load_runs('big')))"
COMMANDS: dict[str, Sequence[str]] = {
    "load_runs": ("-c", LOAD),
    "scaling fit": ("-m", "scaling", "fit", "big"),
    "scaling recommend": ("-m", "scaling", "recommend", "big", "--params", "1e9", "--tokens", "2e10", "--no-next"),
    "scaling report": ("-m", "scaling", "report", "big"),
    "hpo launch, a run or two": ("-m", "hpo", "launch", "tiny"),
    "hpo forget": ("-m", "hpo", "forget", "tiny", "--yes"),
}


def _open(uri: str, go: Any, said: Any) -> None:
    go.wait()
    began = time.perf_counter()
    try:
        client = connect(uri)
        find_or_create_study_run(client, "fresh")
        said.put((time.perf_counter() - began, None))
    except Exception as error:  # counted
        said.put((time.perf_counter() - began, repr(error)))


def opened(processes: int) -> None:
    """So many processes open a store that is not there yet, and its study."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        uri, go, said = f"sqlite:///{folder}/mlflow.db", context.Event(), context.Queue()
        running = [context.Process(target=_open, args=(uri, go, said)) for _ in range(processes)]
        for process in running:
            process.start()
        time.sleep(1 + processes)
        go.set()
        rows = [said.get(timeout=600) for _ in running]
        for process in running:
            process.join()
        client = connect(uri)
        runs = client.search_runs([find_experiment_id(client, "fresh")])
    failed = [why for _, why in rows if why]
    print(
        f"{processes} processes open a fresh store: {len(failed)} failed, {len(runs)} study, {max(s for s, _ in rows):.1f} s"
    )


def _record(uri: str, folder: str, name: str, points: int, said: Any) -> None:
    connect(uri)  # imports are not counted
    began = time.perf_counter()
    with Recorder(uri, "rate", name, role="proxy", params={"N": 1}, folder=Path(folder)) as run:
        for i in range(points):
            run.add(Measurement(1000 * (i + 1), 3.0, lr=0.01, train_loss=3.1))
        run.finish()
        kept = time.perf_counter() - began
    said.put((time.perf_counter() - began, kept, run.pending))


def rate(processes: int, points: int) -> None:
    """Metrics a second through a Recorder, all processes together."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        uri, said = f"sqlite:///{folder}/mlflow.db", context.Queue()
        find_or_create_study_run(connect(uri), "rate")
        given = [(uri, f"{folder}/records", f"run-{i}", points, said) for i in range(processes)]
        running = [context.Process(target=_record, args=args) for args in given]
        for process in running:
            process.start()
        rows = [said.get(timeout=3600) for _ in running]
        for process in running:
            process.join()
    slowest, kept, pending = max(r[0] for r in rows), max(r[1] for r in rows), sum(r[2] for r in rows)
    total = 3 * points * processes
    print(
        f"{processes} recorders, {total:,} metrics: {total / slowest:,.0f} a second in MLflow ({pending} left), "
        f"{total / kept:,.0f} a second on disk"
    )


def logging(rounds: int) -> None:
    """What recording adds to a training: until its last step, and until MLflow has it all; wall and CPU time of the process."""
    from hpo.study.config import load_study
    from scaling.laws.compute import Fidelity

    study, trainer = load_study(Path("studies/quickstart.toml"))
    fidelity, params = Fidelity(min(trainer.sizes), study.search.tokens.min), study.probes[1]
    described = trainer.describe(params, fidelity)
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        find_or_create_study_run(connect(uri), "quickstart")

        def train(run: Recorder | None) -> tuple[float, int]:
            points = 0
            for point in trainer(params, fidelity, save=Path(folder) / "save.pt", keep=Path(folder) / "keep.pt"):
                points += 1
                if run is not None:
                    run.add(point)
            if run is not None:
                run.log_result(rung=0, tokens=int(fidelity.D), loss=2.0, seconds=1.0, checkpoint=None)
                run.finish()
            return time.perf_counter(), points

        def plain(_: int) -> tuple[float, float, float, int]:
            began, cpu = time.perf_counter(), time.process_time()
            trained, points = train(None)
            return trained - began, time.perf_counter() - began, time.process_time() - cpu, points

        def recorded(i: int) -> tuple[float, float, float, int]:
            began, cpu = time.perf_counter(), time.process_time()
            with Recorder(
                uri, "quickstart", f"run-{i}", role="proxy", params=described, folder=Path(folder) / "records"
            ) as run:
                trained, points = train(run)
            return trained - began, time.perf_counter() - began, time.process_time() - cpu, points

        rows = []
        for i in range(-2, rounds):
            first, second = (plain, recorded) if i % 2 else (recorded, plain)
            pair = {first: first(i), second: second(i)}
            if i >= 0:
                rows.append((pair[plain], pair[recorded]))
    print(
        f"quickstart's smallest proxy, {rows[0][0][3]} points, {statistics.median(p[0] for p, _ in rows):.2f} s, {rounds} pairs; recording adds"
    )
    for k, what in enumerate(("until the last step", "until MLflow has it", "in CPU time")):
        more = [100 * (r[k] / p[k] - 1) for p, r in rows]
        low, middle, high = statistics.quantiles(more, n=4)
        print(f"  {what:22}{middle:+6.1f} % ({low:+.1f}, {high:+.1f})")


def fill(path: Path, runs: int, points: int) -> None:
    """A study "big" of so many runs of 8 sizes and 6 lengths, each with a curve of so many points."""
    client = connect(f"sqlite:///{path}")
    parent = find_or_create_study_run(client, "big")
    draw, began, added = random.Random(0), time.perf_counter(), 0.0
    for i in range(runs):
        size, tokens = 1e6 * 2.0 ** draw.randrange(8), int(1e8 * 2.0 ** draw.randrange(6))
        lr, batch = 10 ** draw.uniform(-3.5, -1.5), 2 ** draw.randrange(14, 19)
        best = math.log(2.0 * size**-0.3)
        loss = (
            1.7
            + (5e5 / size) ** 0.35
            + (2e7 / tokens) ** 0.35
            + 0.02 * (math.log(lr) - best) ** 2
            + draw.gauss(0, 0.003)
        )
        params = {"N": size, "lr": lr, "batch_tokens": batch, "seq_len": 1024, "config": i}
        run = find_or_create_child_run(client, parent, f"config-{i:05d}", role="proxy", params=params)
        now = time.perf_counter()
        curve = [({"loss": loss + 2 / (1 + j)}, tokens * (j + 1) // (points + 1), now_ms()) for j in range(points)]
        metrics, tags = result_to_metrics(rung=0, tokens=tokens, loss=loss, seconds=1.0, checkpoint=None)
        log_records(client, run, [*curve, (metrics, tokens, now_ms())], tags)
        added += time.perf_counter() - now
        set_run_status(client, run)
    took = time.perf_counter() - began
    print(
        f"{runs:,} runs, {runs * points:,} points: {took:.0f} s, {runs / took:.0f} runs a second, "
        f"{runs * points / added:,.0f} points a second while writing them, {path.stat().st_size / 2**20:,.0f} MiB",
        flush=True,
    )


def commands(large: Path, small: Path, rounds: int) -> None:
    """Seconds of each command, beside both stores by turns."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    env.pop("MLFLOW_TRACKING_URI", None)
    print(f"{'':26}{'small':>8}{'large':>8}   seconds, median of {rounds}")
    for name, words in COMMANDS.items():
        taken: dict[Path, list[float]] = {small: [], large: []}
        for _ in range(rounds):
            for folder, times in taken.items():
                if name == "hpo launch, a run or two":
                    subprocess.run(
                        [sys.executable, *COMMANDS["hpo forget"]], cwd=folder, env=env, capture_output=True, check=False
                    )
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", *words],
                    cwd=folder,
                    env=env,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                times.append(time.perf_counter() - began)
                if done.returncode not in (0, 3):  # 3: an answer with doubts
                    raise RuntimeError(f"{name} in {folder} ended with {done.returncode}: {done.stderr[-2000:]}")
        print(f"{name:26}{statistics.median(taken[small]):8.1f}{statistics.median(taken[large]):8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=100, help="of each run")
    parser.add_argument("--processes", type=int, default=16, help="that open a fresh store")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=20, help="of trainings with and without records")
    parser.add_argument("--folder", type=Path, help="where the stores are kept, and used when they are there")
    given = parser.parse_args()
    if "open" in given.only:
        opened(given.processes)
    if "rate" in given.only:
        for processes in (1, 4):
            rate(processes, 20_000)
    if "logging" in given.only:
        logging(given.pairs)
    if "commands" in given.only:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (given.folder or Path(temporary)).absolute()
            for name, runs in (("small", SMALL), ("large", given.runs)):
                (folder / name / "studies").mkdir(parents=True, exist_ok=True)
                (folder / name / "studies" / "tiny.toml").write_text(STUDY)
                done = folder / name / "filled.json"
                if not done.exists():
                    fill(folder / name / "mlflow.db", runs, given.points)
                    done.write_text(json.dumps({"runs": runs, "points": given.points}))
            commands(folder / "large", folder / "small", given.rounds)


if __name__ == "__main__":
    main()
