"""What is logged to MLflow comes back unchanged, from several processes, whatever MLflow does to types."""

from __future__ import annotations

import math
import random
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scaling.common.measurement import Measurement
from scaling.runs.importer import import_runs, summarize_exclusions
from scaling.runs.io import load_runs
from scaling.runs.table import usable
from scaling.tracking import records
from scaling.tracking.client import connect
from scaling.tracking.experiment import find_or_create_child_run, find_or_create_study_run, forget_study, set_run_status
from scaling.tracking.log import (
    log_records,
    now_ms,
    point_to_metrics,
    read_curve,
    read_note,
    result_to_metrics,
    write_note,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Create the store once, because a fresh one costs two seconds of migrations."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def log_two_configurations(uri: str, study: str, folder: Path) -> str:
    client = connect(uri)
    parent = find_or_create_study_run(client, study, artifacts=folder, params={"seed": 0})
    for config, lr in enumerate((0.01, 0.5)):
        params = {
            "N": 1000,
            "lr": lr,
            "batch_tokens": 256,
            "seq_len": 128,
            "parametrization": "mup",
            "config": config,
            "none": None,
        }
        run = find_or_create_child_run(client, parent, f"config-{config:04d}", role="proxy", params=params)
        points = [Measurement(t, 4.0 - t / 1000, lr=lr, train_loss=math.nan) for t in (1000, 2000, 3000)]
        curve = [(point_to_metrics(p), p.tokens, now_ms()) for p in points]
        log_records(client, run, curve, {})
        rungs = [(0, 3000, 1.5), (1, 9000, 1.25)] if config == 0 else [(0, 3000, math.nan)]
        for rung, tokens, loss in rungs:
            path = None if math.isnan(loss) else folder / f"{config}-{tokens}.pt"
            metrics, tags = result_to_metrics(rung=rung, tokens=tokens, loss=loss, seconds=2.0, checkpoint=path)
            log_records(client, run, [(metrics, tokens, now_ms())], tags)
        set_run_status(client, run)
    return parent


def test_a_study_comes_back_as_its_run_table(uri: str, tmp_path: Path) -> None:
    log_two_configurations(uri, "round-trip", tmp_path)
    runs = load_runs("round-trip", tracking_uri=uri).sort_values(["name", "rung"]).reset_index(drop=True)
    assert runs[["N", "D", "lr", "batch_tokens", "rung"]].to_numpy().tolist() == [
        [1000, 3000, 0.01, 256, 0],
        [1000, 9000, 0.01, 256, 1],
        [1000, 3000, 0.5, 256, 0],
    ]
    assert runs["loss"].tolist()[:2] == [1.5, 1.25]
    assert runs["diverged"].tolist() == [False, False, True]
    assert runs["checkpoint"].tolist()[:2] == [str(tmp_path / "0-3000.pt"), str(tmp_path / "0-9000.pt")]
    assert set(runs["role"]) == {"proxy"}
    assert set(runs["parametrization"]) == {"mup"}


def test_logging_again_finds_the_same_runs(uri: str, tmp_path: Path) -> None:
    first = log_two_configurations(uri, "again", tmp_path)
    assert log_two_configurations(uri, "again", tmp_path) == first
    assert len(load_runs("again", tracking_uri=uri)) == 3


def test_a_curve_comes_back_in_order_of_tokens(uri: str, tmp_path: Path) -> None:
    log_two_configurations(uri, "curve", tmp_path)
    run = load_runs("curve", tracking_uri=uri)["run_id"].iloc[0]
    assert read_curve(connect(uri), run) == ([1000.0, 2000.0, 3000.0], [3.0, 2.0, 1.0])


def test_notes_are_replaced_not_added(uri: str, tmp_path: Path) -> None:
    client = connect(uri)
    parent = log_two_configurations(uri, "notes", tmp_path)
    assert read_note(client, parent, "best") is None
    for value in ({"lr": 0.1}, {"lr": 0.2, "deep": {"list": [1, 2.5]}}):
        write_note(client, parent, "best", value)
        assert read_note(client, parent, "best") == value


def test_a_note_that_is_longer_than_a_tag_comes_back_whole(uri: str, tmp_path: Path) -> None:
    client = connect(uri)
    parent = log_two_configurations(uri, "long-notes", tmp_path)
    for length in (9000, 700_000, 20_000, 10):
        write_note(client, parent, "best", {"x": "y" * length, "lr": 0.1})
        assert read_note(client, parent, "best") == {"x": "y" * length, "lr": 0.1}
    write_note(client, parent, "best", {"x": "y" * 9000})
    client.set_tag(parent, "muscale.best.part1", "edited")
    with pytest.raises(ValueError, match="note best in MLflow is not whole"):
        read_note(client, parent, "best")


def test_an_unknown_study_is_refused_with_the_nearest_name(uri: str, tmp_path: Path) -> None:
    log_two_configurations(uri, "quickstart", tmp_path)
    with pytest.raises(ValueError, match=r"no study 'quickstrat'.*quickstart"):
        load_runs("quickstrat", tracking_uri=uri)


@pytest.mark.slow
def test_six_processes_may_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    """Without the lock all six fail."""
    code = (
        "import sys; from scaling.tracking.client import connect; print(len(connect(sys.argv[1]).search_experiments()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, f"sqlite:///{tmp_path}/mlflow.db"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    out = [p.communicate() for p in running]
    assert [p.returncode for p in running] == [0] * 6, out[0][1][-2000:]
    assert len({o[0] for o in out}) == 1


def log_foreign_runs(uri: str, experiment: str, rows: int = 6) -> tuple[Any, list[str]]:
    """Log runs as another program would: the third diverged, the fourth is still running, the last is deleted.

    Returns:
        (client, run ids).
    """
    from mlflow.entities import Metric, Param, RunTag

    client = connect(uri)
    e = client.create_experiment(experiment)
    ids = []
    for i in range(rows):
        run = client.create_run(e, run_name=f"run {i}", start_time=1000 + i).info.run_id
        loss = math.nan if i == 2 else 3.0 + i / 10
        metrics = [Metric("eval/loss", v, 1, s) for s, v in enumerate([9.0, 2.0, loss])]
        metrics += [Metric("step", 500.0, 1, 0), Metric("norm", math.inf, 1, 0)]
        params = {"params": 10**6 * (i + 1), "lr": 0.01 * (i + 1), "bs": 8, "seq_len": 128, "seed": None}
        client.log_batch(run, metrics, [Param(k, str(v)) for k, v in params.items()], [RunTag("who", f"\u00e9 {i}")])
        if i != 3:
            client.set_terminated(run)
        ids.append(run)
    client.delete_run(ids[-1])
    return client, ids


def read_both_ways(uri: str, experiment: str, **options: Any) -> list[records.RunRecord]:
    """Return the records as read from the file, after checking that MLflow's client gives the same."""
    from_file = records.read_sqlite(uri, experiment, options.get("kind"), options.get("metric", "last"))
    from_client = records.read_through_client(uri, experiment, options.get("kind"), options.get("metric", "last"))
    assert from_file is not None
    # A NaN differs from itself; its text does not.
    assert [repr(r) for r in map(sort_fields, from_file)] == [repr(r) for r in map(sort_fields, from_client)]
    return from_file


def sort_fields(record: records.RunRecord) -> list[Any]:
    """Return the fields of a record, with its dicts as sorted lists."""
    values = (sorted(d.items()) for d in (record.params, record.metrics, record.tags))
    return [record.run_id, record.name, record.status, *values]


@pytest.mark.parametrize("metric", ["last", "min"])
def test_the_file_is_read_as_the_client_reads_it(metric: str, uri: str) -> None:
    _, ids = log_foreign_runs(uri, f"two ways {metric}")
    runs = read_both_ways(uri, f"two ways {metric}", metric=metric)
    assert [r.run_id for r in runs] == ids[:-1]
    losses = [r.metrics["eval/loss"] for r in runs]
    expected = [2.0, 2.0, math.nan, 2.0, 2.0] if metric == "min" else [3.0, 3.1, math.nan, 3.3, 3.4]
    assert losses == pytest.approx(expected, nan_ok=True)
    assert runs[0].metrics["norm"] == math.inf
    assert runs[4].tags["who"] == "\u00e9 4"


def test_only_runs_of_one_kind_are_read_when_asked(uri: str, tmp_path: Path) -> None:
    log_two_configurations(uri, "kinds", tmp_path)
    assert [r.name for r in read_both_ways(uri, "kinds", kind="run")] == ["config-0000", "config-0001"]
    assert [r.name for r in read_both_ways(uri, "kinds", kind="study")] == ["kinds"]
    assert len(read_both_ways(uri, "kinds")) == 3


def test_every_change_of_a_store_is_seen_by_the_next_reading(uri: str) -> None:
    """A metric that is written after a run ended changes none of the run's own fields, so no cache could notice it."""
    client, ids = log_foreign_runs(uri, "changes")
    before = client.get_run(ids[0]).info
    client.log_metric(ids[0], "eval/loss", 1.25, step=7)
    after = client.get_run(ids[0]).info
    assert (before.end_time, before.status, before.lifecycle_stage) == (
        after.end_time,
        after.status,
        after.lifecycle_stage,
    )
    assert read_both_ways(uri, "changes")[0].metrics["eval/loss"] == 1.25
    client.set_tag(ids[0], "who", "else")
    assert read_both_ways(uri, "changes")[0].tags["who"] == "else"
    client.log_param(ids[0], "late", "1")
    assert read_both_ways(uri, "changes")[0].params["late"] == "1"
    client.set_terminated(ids[3])
    assert read_both_ways(uri, "changes")[3].status == "FINISHED"
    client.delete_run(ids[1])
    assert [r.run_id for r in read_both_ways(uri, "changes")] == [ids[0], *ids[2:5]]
    client.restore_run(ids[5])
    new = client.create_run(client.get_experiment_by_name("changes").experiment_id, start_time=1).info.run_id
    assert [r.run_id for r in read_both_ways(uri, "changes")] == [new, ids[0], *ids[2:]]


def test_random_histories_are_read_alike_both_ways(uri: str) -> None:
    r = random.Random(0)
    client = connect(uri)
    e = client.create_experiment("random")
    ids: list[str] = []
    for _ in range(60):
        what = r.random()
        if what < 0.3 or not ids:
            ids.append(client.create_run(e, start_time=r.randrange(5)).info.run_id)
        elif what < 0.7:
            value = r.choice([math.nan, math.inf, -math.inf, r.gauss(0, 1), r.gauss(0, 1)])
            client.log_metric(r.choice(ids), r.choice("ab"), value, step=r.randrange(3), timestamp=r.randrange(9))
        elif what < 0.85:
            client.set_tag(r.choice(ids), r.choice("ab"), r.choice(["", "x", "`'\""]))
        elif what < 0.95:
            client.set_terminated(r.choice(ids), r.choice(["FINISHED", "FAILED", "KILLED"]))
        else:
            client.delete_run(ids.pop(r.randrange(len(ids))))
    for metric in ("last", "min"):
        assert len(read_both_ways(uri, "random", metric=metric)) == len(ids)


def test_a_file_that_is_no_store_is_left_to_the_client(uri: str, tmp_path: Path) -> None:
    assert records.read_sqlite(f"sqlite:///{tmp_path}/none.db", "x", None, "last") is None
    (tmp_path / "text.db").write_text("no database")
    assert records.read_sqlite(f"sqlite:///{tmp_path}/text.db", "x", None, "last") is None
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE runs (run_uuid TEXT)")
    assert records.read_sqlite(f"sqlite:///{tmp_path}/other.db", "x", None, "last") is None
    assert records.read_sqlite("http://localhost:1", "x", None, "last") is None
    assert records.read_sqlite(uri, "no such experiment", None, "last") is None
    with pytest.raises(ValueError, match="there is no MLflow store at"):
        load_runs("x", tracking_uri=f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(ValueError, match="'last' or 'min', got 'mean'"):
        records.read_records("x", uri=uri, metric="mean")


def test_reading_neither_writes_nor_waits_for_a_writer(uri: str, tmp_path: Path) -> None:
    log_foreign_runs(uri, "busy")
    path = Path(uri.removeprefix("sqlite:///"))
    before = path.read_bytes()
    writer = sqlite3.connect(path, isolation_level=None)
    # A writer that has not committed yet.
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE runs SET status = 'FAILED'")
    runs = records.read_sqlite(uri, "busy", None, "last")
    writer.execute("ROLLBACK")
    writer.close()
    assert runs is not None
    assert [r.status for r in runs] == ["FINISHED"] * 3 + ["RUNNING"] + ["FINISHED"]
    assert path.read_bytes() == before


def test_runs_of_another_program_become_a_run_table(uri: str) -> None:
    _, ids = log_foreign_runs(uri, "foreign")
    mapping = {
        "N": "params.params",
        "lr": "lr",
        "batch_tokens": "bs:sequences",
        "seq_len": "seq_len",
        "D": "metrics.step:steps",
        "loss": "eval/loss",
    }
    runs, _ = import_runs("foreign", mapping=mapping, tracking_uri=uri)
    assert runs["run_id"].tolist() == ids[:-1]
    assert runs["N"].tolist() == [1e6 * (i + 1) for i in range(5)]
    assert runs["D"].tolist() == [500 * 8 * 128] * 5
    assert runs["excluded"].tolist() == ["", "", "diverged: no finite loss", "unfinished (running)", ""]
    assert usable(runs)["loss"].tolist() == [3.0, 3.1, 3.4]
    assert summarize_exclusions(runs)[0] == "3 of 5 rows are used by laws"
    lowest, _ = import_runs("foreign", mapping=mapping, tracking_uri=uri, metric="min")
    assert usable(lowest)["loss"].tolist() == [2.0] * 3, "a low loss before the end does not repair a run that diverged"
    with pytest.raises(ValueError, match=r"no column N \(is it params\.params\? --map N=params\.params\)"):
        import_runs("foreign", tracking_uri=uri)
    with pytest.raises(ValueError, match=f"row {ids[0]}, column lr .from tags.who.: needed a number, got '\u00e9 0'"):
        import_runs("foreign", mapping={**mapping, "lr": "who"}, tracking_uri=uri)


def test_a_study_of_ours_needs_no_mapping(uri: str, tmp_path: Path) -> None:
    log_two_configurations(uri, "ours", tmp_path)
    runs, remarks = import_runs("ours", tracking_uri=uri)
    assert remarks == []
    assert runs["D"].tolist() == [3000, 9000, 3000]
    assert runs["excluded"].tolist() == ["", "", "diverged"]


def test_a_study_that_was_forgotten_and_made_again_has_a_run_of_its_own(uri: str) -> None:
    client = connect(uri)
    first = find_or_create_study_run(client, "again")
    assert find_or_create_study_run(client, "again") == first
    child = find_or_create_child_run(client, first, "config-0", role="proxy", params={})
    forget_study(client, "again")
    second = find_or_create_study_run(client, "again")
    assert second != first
    assert find_or_create_child_run(client, second, "config-0", role="proxy", params={}) != child
