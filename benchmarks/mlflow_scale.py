"""Measure MLflow under load: processes that open a fresh store, metrics per second, commands beside 10,000 runs.

    OMP_NUM_THREADS=1 python -m benchmarks.mlflow_scale                       # all; filling the store takes 15 minutes
    OMP_NUM_THREADS=1 python -m benchmarks.mlflow_scale --only open rate logging
    OMP_NUM_THREADS=1 python -m benchmarks.mlflow_scale --only commands --folder /tmp/kept

`rate` measures `scaling.tracking.recorder.Recorder`: from the first point of three metrics to the end of the `with`
block, when MLflow has them all. `logging` trains the quickstart's smallest proxy with and without a Recorder, in turns,
in one process that has trained before. The large store holds one study, "big", with 100 points per run and losses that
follow a law. Each command is a process of its own, run in turns beside that store and beside one of 100 runs.
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
from scaling.tracking.experiment import find_or_create_child_run, find_or_create_study_run, set_run_status
from scaling.tracking.log import log_records, now_ms, result_to_metrics
from scaling.tracking.recorder import Recorder

MEASUREMENTS = ("open", "rate", "logging", "commands")
# Runs in the small store.
SMALL_RUNS = 100
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


def open_store(uri: str, start: Any, results: Any) -> None:
    start.wait()
    began = time.perf_counter()
    try:
        client = connect(uri)
        find_or_create_study_run(client, "fresh")
        results.put((time.perf_counter() - began, None))
    # Failures are counted.
    except Exception as error:
        results.put((time.perf_counter() - began, repr(error)))


def measure_opening(processes: int) -> None:
    """Let so many processes open a store that does not exist yet, and create its study."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        uri, start, results = f"sqlite:///{folder}/mlflow.db", context.Event(), context.Queue()
        running = [context.Process(target=open_store, args=(uri, start, results)) for _ in range(processes)]
        for process in running:
            process.start()
        time.sleep(1 + processes)
        start.set()
        rows = [results.get(timeout=600) for _ in running]
        for process in running:
            process.join()
        client = connect(uri)
        runs = client.search_runs([find_experiment_id(client, "fresh")])
    failed = [error for _, error in rows if error]
    seconds = max(s for s, _ in rows)
    print(f"{processes} processes open a fresh store: {len(failed)} failed, {len(runs)} study, {seconds:.1f} s")


def record_points(uri: str, folder: str, name: str, points: int, results: Any) -> None:
    # Connect first, so that imports are not counted.
    connect(uri)
    began = time.perf_counter()
    with Recorder(uri, "rate", name, role="proxy", params={"N": 1}, folder=Path(folder)) as run:
        for i in range(points):
            run.add(Measurement(1000 * (i + 1), 3.0, lr=0.01, train_loss=3.1))
        run.finish()
        on_disk = time.perf_counter() - began
    results.put((time.perf_counter() - began, on_disk, run.pending))


def measure_rate(processes: int, points: int) -> None:
    """Measure metrics per second through a Recorder, all processes together."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        uri, results = f"sqlite:///{folder}/mlflow.db", context.Queue()
        find_or_create_study_run(connect(uri), "rate")
        arguments = [(uri, f"{folder}/records", f"run-{i}", points, results) for i in range(processes)]
        running = [context.Process(target=record_points, args=args) for args in arguments]
        for process in running:
            process.start()
        rows = [results.get(timeout=3600) for _ in running]
        for process in running:
            process.join()
    slowest, on_disk, pending = max(r[0] for r in rows), max(r[1] for r in rows), sum(r[2] for r in rows)
    total = 3 * points * processes
    print(
        f"{processes} recorders, {total:,} metrics: {total / slowest:,.0f} per second in MLflow ({pending} left), "
        f"{total / on_disk:,.0f} per second on disk"
    )


def measure_logging(rounds: int) -> None:
    """Measure what recording adds to a training: until its last step, until MLflow has it all, and in CPU time."""
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

        def run_plain(_: int) -> tuple[float, float, float, int]:
            began, cpu = time.perf_counter(), time.process_time()
            trained, points = train(None)
            return trained - began, time.perf_counter() - began, time.process_time() - cpu, points

        def run_recorded(i: int) -> tuple[float, float, float, int]:
            began, cpu = time.perf_counter(), time.process_time()
            with Recorder(
                uri, "quickstart", f"run-{i}", role="proxy", params=described, folder=Path(folder) / "records"
            ) as run:
                trained, points = train(run)
            return trained - began, time.perf_counter() - began, time.process_time() - cpu, points

        rows = []
        for i in range(-2, rounds):
            first, second = (run_plain, run_recorded) if i % 2 else (run_recorded, run_plain)
            pair = {first: first(i), second: second(i)}
            if i >= 0:
                rows.append((pair[run_plain], pair[run_recorded]))
    seconds = statistics.median(plain[0] for plain, _ in rows)
    print(f"quickstart's smallest proxy, {rows[0][0][3]} points, {seconds:.2f} s, {rounds} pairs; recording adds")
    for k, label in enumerate(("until the last step", "until MLflow has it", "in CPU time")):
        excess = [100 * (recorded[k] / plain[k] - 1) for plain, recorded in rows]
        low, middle, high = statistics.quantiles(excess, n=4)
        print(f"  {label:22}{middle:+6.1f} % ({low:+.1f}, {high:+.1f})")


def fill_store(path: Path, runs: int, points: int) -> None:
    """Log a study "big" with so many runs of 8 sizes and 6 token counts, each with a curve of so many points."""
    client = connect(f"sqlite:///{path}")
    parent = find_or_create_study_run(client, "big")
    draw, began, writing = random.Random(0), time.perf_counter(), 0.0
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
        writing += time.perf_counter() - now
        set_run_status(client, run)
    seconds = time.perf_counter() - began
    print(
        f"{runs:,} runs, {runs * points:,} points: {seconds:.0f} s, {runs / seconds:.0f} runs per second, "
        f"{runs * points / writing:,.0f} points per second while writing them, {path.stat().st_size / 2**20:,.0f} MiB",
        flush=True,
    )


def measure_commands(large: Path, small: Path, rounds: int) -> None:
    """Measure the seconds of each command, beside both stores in turns."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    env.pop("MLFLOW_TRACKING_URI", None)
    print(f"{'':26}{'small':>8}{'large':>8}   seconds, median of {rounds}")
    for name, arguments in COMMANDS.items():
        measured: dict[Path, list[float]] = {small: [], large: []}
        for _ in range(rounds):
            for folder, times in measured.items():
                if name == "hpo launch, a run or two":
                    subprocess.run(
                        [sys.executable, *COMMANDS["hpo forget"]], cwd=folder, env=env, capture_output=True, check=False
                    )
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", *arguments],
                    cwd=folder,
                    env=env,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                times.append(time.perf_counter() - began)
                # Exit code 3 is an answer with doubts.
                if done.returncode not in (0, 3):
                    raise RuntimeError(f"{name} in {folder} ended with {done.returncode}: {done.stderr[-2000:]}")
        print(
            f"{name:26}{statistics.median(measured[small]):8.1f}{statistics.median(measured[large]):8.1f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=100, help="points of each run")
    parser.add_argument("--processes", type=int, default=16, help="processes that open a fresh store")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of trainings, with and without a Recorder")
    parser.add_argument("--folder", type=Path, help="where the stores are kept, and used if they exist")
    options = parser.parse_args()
    if "open" in options.only:
        measure_opening(options.processes)
    if "rate" in options.only:
        for processes in (1, 4):
            measure_rate(processes, 20_000)
    if "logging" in options.only:
        measure_logging(options.pairs)
    if "commands" in options.only:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.folder or Path(temporary)).absolute()
            for name, runs in (("small", SMALL_RUNS), ("large", options.runs)):
                (folder / name / "studies").mkdir(parents=True, exist_ok=True)
                (folder / name / "studies" / "tiny.toml").write_text(STUDY)
                mark = folder / name / "filled.json"
                if not mark.exists():
                    fill_store(folder / name / "mlflow.db", runs, options.points)
                    mark.write_text(json.dumps({"runs": runs, "points": options.points}))
            measure_commands(folder / "large", folder / "small", options.rounds)


if __name__ == "__main__":
    main()
