"""Measure how long loading an MLflow experiment with many runs takes.

    OMP_NUM_THREADS=1 python benchmarks/load_runs.py --runs 10000
    OMP_NUM_THREADS=1 python benchmarks/load_runs.py --store old.db --rounds 5

Three ways are compared: `scaling` reading the SQLite file, `scaling` reading through MLflow's client, and MLflow
itself. A temporary SQLite store is first filled through the client, which takes minutes; --store keeps it at that path,
or uses it if it exists. Every reading is a process of its own, and the ways take turns, so that only the file is cached
and a noisy machine disturbs all alike; the column `its CPU` is hardly affected by noise. `load` is the reading alone;
`process` includes the imports. There is no cache: the second load takes as long as the first.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXPERIMENT = "another program's"
MAPPING = {
    "N": "params.params",
    "D": "metrics.tokens",
    "lr": "params.lr",
    "batch_tokens": "params.batch_size:sequences",
    "seq_len": "params.seq_len",
    "loss": "metrics.val_loss",
}
TIMED = (
    "import time; t = time.perf_counter(); c = time.process_time(); n = len({}); "
    "print(n, time.perf_counter() - t, time.process_time() - c)"
)
READINGS = {
    "scaling, file": "from scaling.runs.importer import import_runs\nimport pandas\n"
    + TIMED.format("import_runs({name!r}, mapping={mapping!r}, tracking_uri={uri!r})[0]"),
    "scaling, client": "import mlflow\nfrom scaling.tracking import records\n"
    "from scaling.runs.importer import import_runs\nimport pandas\n"
    "records.read_sqlite = lambda *_: None\n"
    + TIMED.format("import_runs({name!r}, mapping={mapping!r}, tracking_uri={uri!r})[0]"),
    "mlflow.search_runs": "import mlflow\nmlflow.set_tracking_uri({uri!r})\n"
    + TIMED.format("mlflow.search_runs(experiment_names=[{name!r}])"),
}


def fill_store(path: Path, runs: int) -> None:
    """Log finished runs with 8 parameters and 5 metrics of 3 points each."""
    from mlflow.entities import Metric, Param

    from scaling.tracking.client import connect

    client = connect(f"sqlite:///{path}")
    experiment = client.create_experiment(EXPERIMENT)
    draw = random.Random(0)
    for i in range(runs):
        run = client.create_run(experiment, run_name=f"run {i}", tags={"owner": "someone"}).info.run_id
        params = {
            "params": 10**6 * (1 + i % 7),
            "lr": 2.0 ** -(5 + i % 9),
            "batch_size": 2 ** (3 + i % 6),
            "seq_len": 2048,
        }
        params |= {"optimizer": "adamw", "seed": i, "weight_decay": 0.1, "d_model": 512}
        metrics = [
            Metric(name, 2 + draw.random(), 1000 + step, step)
            for name in ("val_loss", "train_loss", "tokens", "grad_norm", "seconds")
            for step in range(3)
        ]
        client.log_batch(run, metrics, [Param(k, str(v)) for k, v in params.items()])
        client.set_terminated(run)


def measure(reading: str, uri: str) -> tuple[int, float, float, float]:
    """Return (runs read, seconds of the reading, its CPU seconds, seconds of the whole process)."""
    code = READINGS[reading].format(name=EXPERIMENT, mapping=MAPPING, uri=uri)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    process = time.perf_counter() - began
    count, seconds, cpu = done.stdout.split()
    return int(count), float(seconds), float(cpu), process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--store", type=Path, help="a SQLite store of this benchmark: used if it exists, otherwise created"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = (options.store or Path(folder) / "mlflow.db").resolve()
        if not path.exists():
            began = time.perf_counter()
            fill_store(path, options.runs)
            print(f"filled in {time.perf_counter() - began:.0f} s")
        measured: dict[str, list[tuple[int, float, float, float]]] = {reading: [] for reading in READINGS}
        for _ in range(options.rounds):
            for reading, times in measured.items():
                times.append(measure(reading, f"sqlite:///{path}"))
    print(
        f"{'':20}{'runs':>8}{'first load':>12}{'second':>9}{'median':>9}{'its CPU':>9}{'median process':>16}   seconds"
    )
    for reading, times in measured.items():
        loads = [seconds for _, seconds, *_ in times]
        second = f"{loads[1]:9.2f}" if len(loads) > 1 else f"{'':9}"
        cpu, process = (statistics.median(t[k] for t in times) for k in (2, 3))
        print(
            f"{reading:20}{times[0][0]:>8}{loads[0]:12.2f}{second}{statistics.median(loads):9.2f}{cpu:9.2f}{process:16.2f}"
        )


if __name__ == "__main__":
    main()
