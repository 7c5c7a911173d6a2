"""All runs of one MLflow experiment as plain records, read anew each time.

There is no cache, because none can be right: a metric, parameter or tag written to a run after its end moves nothing
that MLflow can be asked for. So the reading itself is fast. Where the store is a SQLite file, four selects in one read-only
transaction replace the client, which builds an object per value (10 to 30 times slower, see benchmarks/load_runs.py). Every other
store, and a file whose tables are not as expected, is read through the client, a page at a time. Both give the same records.
"""

from __future__ import annotations

import gc
import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scaling.common.redact import without_passwords
from scaling.tracking.client import connect, default_uri, experiment_id

PAGE = 1000  # runs; the most that every tracking server gives at once
LARGEST = 1.7976931348623157e308  # what MLflow's database stores write for an infinite metric
NEEDED = {
    "experiments": {"experiment_id", "name", "lifecycle_stage"},
    "runs": {"run_uuid", "name", "status", "lifecycle_stage", "experiment_id", "start_time"},
    "latest_metrics": {"run_uuid", "key", "value", "is_nan"},
    "metrics": {"run_uuid", "key", "value", "is_nan"},
    "params": {"run_uuid", "key", "value"},
    "tags": {"run_uuid", "key", "value"},
}


@dataclass(frozen=True)
class Record:
    """One run as MLflow keeps it. Parameters and tags are text; a metric is its last value, or its lowest."""

    run_id: str
    name: str
    status: str  # RUNNING, SCHEDULED, FINISHED, FAILED or KILLED
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def read_records(
    experiment: str, *, uri: str | None = None, kind: str | None = None, metric: str = "last"
) -> list[Record]:
    """Every run of the experiment that is not deleted, oldest first.

    kind: only those with this tag `muscale.kind`. metric: "min" is the lowest value of each metric's history (of one that did not end
    finite, the end: a run that blew up stays so). Of noisy evaluations it is too good, and through a server it costs
    one call per run and metric.

    Raises ValueError when there is no such store or experiment.
    """
    if metric not in ("last", "min"):
        raise ValueError(f"metric is 'last' or 'min', got {metric!r}")
    uri = uri or default_uri()
    if uri.startswith("sqlite:///") and "?" not in uri and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ValueError(  # the client would make one
            f"no study {experiment!r}: there is no MLflow store at {without_passwords(uri)}; launch a study first, or give the store's URI"
        )
    found = _from_sqlite(uri, experiment, kind, metric)
    return _from_client(uri, experiment, kind, metric) if found is None else found


def _from_sqlite(uri: str, experiment: str, kind: str | None, metric: str) -> list[Record] | None:
    """None when this store is no SQLite file that can be read here: the client then says what it is."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or "?" in uri or not path.is_file():
        return None
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)) as store:
            store.execute("BEGIN")  # one moment for all selects, whoever writes meanwhile
            for table, columns in NEEDED.items():
                if not columns <= {row[1] for row in store.execute(f"PRAGMA table_info({table})")}:
                    return None
            named = "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'active'"
            ids = store.execute(named, (experiment,)).fetchall()
            if len(ids) != 1:  # none, or one in each of several workspaces
                return None
            with _without_gc():
                return _select(store, ids[0][0], kind, metric)
    except sqlite3.Error:
        return None  # locked, or not a database: the client waits, or says why


def _select(store: sqlite3.Connection, experiment: int, kind: str | None, metric: str) -> list[Record]:
    chosen = "SELECT run_uuid FROM runs WHERE experiment_id = ? AND lifecycle_stage = 'active'"
    given: list[object] = [experiment]
    if kind is not None:
        chosen += " AND run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'muscale.kind' AND value = ?)"
        given.append(kind)
    records = {
        run: Record(run, name or "", status)
        for run, name, status in store.execute(
            f"SELECT run_uuid, name, status FROM runs WHERE run_uuid IN ({chosen}) ORDER BY start_time, run_uuid", given
        )
    }
    for run, key, value in store.execute(
        f"SELECT run_uuid, key, value FROM params WHERE run_uuid IN ({chosen})", given
    ):
        records[run].params[key] = value
    for run, key, value in store.execute(f"SELECT run_uuid, key, value FROM tags WHERE run_uuid IN ({chosen})", given):
        records[run].tags[key] = value
    last = f"SELECT run_uuid, key, value, is_nan FROM latest_metrics WHERE run_uuid IN ({chosen})"
    for run, key, value, is_nan in store.execute(last, given):
        records[run].metrics[key] = math.nan if is_nan else _finite_or_not(value)
    if metric == "min":
        low = f"SELECT run_uuid, key, MIN(value) FROM metrics WHERE NOT is_nan AND run_uuid IN ({chosen}) GROUP BY run_uuid, key"
        for run, key, value in store.execute(low, given):
            if math.isfinite(records[run].metrics[key]):
                records[run].metrics[key] = _finite_or_not(value)
    return list(records.values())


def _from_client(uri: str, experiment: str, kind: str | None, metric: str) -> list[Record]:
    client = connect(uri)
    wanted = [experiment_id(client, experiment)]
    query = "" if kind is None else f"tags.`muscale.kind` = '{kind}'"
    records, token = [], None
    with _without_gc():
        while True:
            page = client.search_runs(
                wanted,
                query,
                max_results=PAGE,
                page_token=token,
                order_by=["attributes.start_time", "attributes.run_id"],
            )
            for run in page:
                metrics = {k: _finite_or_not(v) for k, v in run.data.metrics.items()}
                info, data = run.info, run.data
                records.append(
                    Record(info.run_id, info.run_name or "", info.status, dict(data.params), metrics, dict(data.tags))
                )
            token = page.token
            if not token:
                break
    if metric == "min":
        for record in records:
            for key in [k for k, v in record.metrics.items() if math.isfinite(v)]:
                history = (_finite_or_not(p.value) for p in client.get_metric_history(record.run_id, key))
                record.metrics[key] = min(v for v in history if not math.isnan(v))
    return records


@contextmanager
def _without_gc() -> Iterator[None]:
    """Tens of thousands of new objects and no garbage, which the collector would walk again and again: 3 times slower."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _finite_or_not(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) >= LARGEST else float(value)
