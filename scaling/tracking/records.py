"""Read all runs of one MLflow experiment as plain records, from the store each time.

There is no cache, because none can be correct: a metric, parameter or tag that is written to a run after its end
changes nothing that MLflow can be asked for. So the reading itself is fast. If the store is a SQLite file, four SELECTs
in one read-only transaction replace the client, which builds an object per value (10 to 30 times slower, see
benchmarks/load_runs.py). Every other store, and a file whose tables are not as expected, is read through the client,
one page at a time. Both give the same records.
"""

from __future__ import annotations

import gc
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scaling.common.redact import redact_passwords
from scaling.tracking.client import connect, default_uri, find_experiment_id

# Runs per request: the most that every tracking server returns at once.
PAGE_SIZE = 1000
# What MLflow's database stores write for an infinite metric: the largest float.
LARGEST_FLOAT = 1.7976931348623157e308
# The tables and columns that are read from a SQLite store.
REQUIRED_COLUMNS = {
    "experiments": {"experiment_id", "name", "lifecycle_stage"},
    "runs": {"run_uuid", "name", "status", "lifecycle_stage", "experiment_id", "start_time"},
    "latest_metrics": {"run_uuid", "key", "value", "is_nan"},
    "metrics": {"run_uuid", "key", "value", "is_nan"},
    "params": {"run_uuid", "key", "value"},
    "tags": {"run_uuid", "key", "value"},
}


@dataclass(frozen=True)
class RunRecord:
    """One run as MLflow keeps it.

    Attributes:
        run_id: MLflow's run id.
        name: The run's name; empty if it has none.
        status: "RUNNING", "SCHEDULED", "FINISHED", "FAILED" or "KILLED".
        params: Parameters, as text.
        metrics: The last or the lowest value of each metric.
        tags: Tags, as text.
    """

    run_id: str
    name: str
    status: str
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def read_records(
    experiment: str, *, uri: str | None = None, kind: str | None = None, metric: str = "last"
) -> list[RunRecord]:
    """Read the runs of an experiment that are not deleted.

    Args:
        experiment: The experiment's name.
        uri: The store's tracking URI; by default `scaling.tracking.client.default_uri()`.
        kind: Only runs whose tag `muscale.kind` has this value; by default all.
        metric: "last" takes the last value of each metric; "min" takes the lowest value of its history, unless the last
            one is not finite, since a run that diverged stays diverged. The minimum of noisy evaluations is biased low,
            and through a server it costs one request per run and metric.

    Returns:
        The runs, oldest first.

    Raises:
        ValueError: If there is no such store or experiment, or `metric` is something else.
    """
    if metric not in ("last", "min"):
        raise ValueError(f"metric is 'last' or 'min', got {metric!r}")
    uri = uri or default_uri()
    # The client would create a store that does not exist.
    if uri.startswith("sqlite:///") and "?" not in uri and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ValueError(
            f"no study {experiment!r}: there is no MLflow store at {redact_passwords(uri)}; "
            "launch a study first, or give the store's URI"
        )
    records = read_sqlite(uri, experiment, kind, metric)
    return read_through_client(uri, experiment, kind, metric) if records is None else records


def read_sqlite(uri: str, experiment: str, kind: str | None, metric: str) -> list[RunRecord] | None:
    """Read the runs of an experiment from a SQLite file; see `read_records` for the arguments.

    Returns:
        The runs, oldest first; None if the store is not a SQLite file that can be read here. The client then reports
        why.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or "?" in uri or not path.is_file():
        return None
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)) as store:
            # One transaction, so that all SELECTs see the same moment, even while others write.
            store.execute("BEGIN")
            for table, columns in REQUIRED_COLUMNS.items():
                if not columns <= {row[1] for row in store.execute(f"PRAGMA table_info({table})")}:
                    return None
            query = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'active'"
            ids = store.execute(query, (experiment,)).fetchall()
            # There may be none, or one in each of several workspaces.
            if len(ids) != 1:
                return None
            with _pause_garbage_collection():
                return _select_records(store, ids[0][0], kind, metric)
    except sqlite3.Error:
        # The file is locked, or it is not a database: the client waits, or reports why.
        return None


def _select_records(store: sqlite3.Connection, experiment: int, kind: str | None, metric: str) -> list[RunRecord]:
    selected = "SELECT run_uuid FROM runs WHERE experiment_id = ? AND lifecycle_stage = 'active'"
    values: list[object] = [experiment]
    if kind is not None:
        selected += " AND run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'muscale.kind' AND value = ?)"
        values.append(kind)
    query = f"SELECT run_uuid, name, status FROM runs WHERE run_uuid IN ({selected}) ORDER BY start_time, run_uuid"
    records = {run: RunRecord(run, name or "", status) for run, name, status in store.execute(query, values)}
    query = f"SELECT run_uuid, key, value FROM params WHERE run_uuid IN ({selected})"
    for run, key, value in store.execute(query, values):
        records[run].params[key] = value
    query = f"SELECT run_uuid, key, value FROM tags WHERE run_uuid IN ({selected})"
    for run, key, value in store.execute(query, values):
        records[run].tags[key] = value
    query = f"SELECT run_uuid, key, value, is_nan FROM latest_metrics WHERE run_uuid IN ({selected})"
    for run, key, value, is_nan in store.execute(query, values):
        records[run].metrics[key] = math.nan if is_nan else _restore_infinity(value)
    if metric == "min":
        query = (
            f"SELECT run_uuid, key, MIN(value) FROM metrics WHERE NOT is_nan AND run_uuid IN ({selected}) "
            "GROUP BY run_uuid, key"
        )
        for run, key, value in store.execute(query, values):
            if math.isfinite(records[run].metrics[key]):
                records[run].metrics[key] = _restore_infinity(value)
    return list(records.values())


def read_through_client(uri: str, experiment: str, kind: str | None, metric: str) -> list[RunRecord]:
    """Read the runs of an experiment from any store; see `read_records` for the arguments.

    Raises:
        ValueError: If there is no such experiment.
    """
    client = connect(uri)
    experiment_ids = [find_experiment_id(client, experiment)]
    query = "" if kind is None else f"tags.`muscale.kind` = '{kind}'"
    records, token = [], None
    with _pause_garbage_collection():
        while True:
            page = client.search_runs(
                experiment_ids,
                query,
                max_results=PAGE_SIZE,
                page_token=token,
                order_by=["attributes.start_time", "attributes.run_id"],
            )
            for run in page:
                metrics = {k: _restore_infinity(v) for k, v in run.data.metrics.items()}
                info, data = run.info, run.data
                records.append(
                    RunRecord(
                        info.run_id, info.run_name or "", info.status, dict(data.params), metrics, dict(data.tags)
                    )
                )
            token = page.token
            if not token:
                break
    if metric == "min":
        for record in records:
            for key in [k for k, v in record.metrics.items() if math.isfinite(v)]:
                history = (_restore_infinity(p.value) for p in client.get_metric_history(record.run_id, key))
                record.metrics[key] = min(v for v in history if not math.isnan(v))
    return records


@contextmanager
def _pause_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector in the block.

    Reading makes tens of thousands of new objects and no garbage, and the collector would walk them again and again: 3
    times slower.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _restore_infinity(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) >= LARGEST_FLOAT else float(value)
