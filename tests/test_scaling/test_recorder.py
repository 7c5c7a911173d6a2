"""Each record arrives exactly once, whatever is killed, stopped, locked or full while MLflow is away."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from benchmarks.servers import MLflowServer, find_free_port
from scaling.common.measurement import Measurement
from scaling.runs.from_mlflow import read_runs
from scaling.tracking import recorder, sender, spool
from scaling.tracking.client import RETRIES_VARIABLE, TIMEOUT_VARIABLE, connect, fail_fast
from scaling.tracking.experiment import (
    delete_empty_duplicates,
    find_or_create_child_run,
    find_or_create_study_run,
    set_run_status,
)
from scaling.tracking.log import log_records, point_to_metrics
from scaling.tracking.recorder import Recorder
from scaling.tracking.records import read_records
from scaling.tracking.sender import send_spooled_records

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Create the store once, because a fresh one costs two seconds of migrations."""
    store = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    connect(store)
    return store


@pytest.fixture(scope="module")
def away() -> str:
    """Return an address that refuses every connection."""
    return f"http://127.0.0.1:{find_free_port()}"


def points(first: int, last: int) -> Iterator[Measurement]:
    for i in range(first, last):
        yield Measurement(tokens=1000 * i, loss=4.0 - i / 1000, lr=0.01, train_loss=5.0 - i / 1000)


def record(where: str, study: str, folder: Path, n: int = 150, name: str = "run") -> Recorder:
    """Record a whole run of n points."""
    with Recorder(where, study, name, role="target", params={"N": 1000, "lr": 0.01}, folder=folder) as run:
        for point in points(1, n + 1):
            run.add(point)
        run.set_tag("muscale.first", "1")
        run.set_tag("muscale.first", "2")
        run.log_result(rung=0, tokens=1000 * n, loss=1.5, seconds=2.0, checkpoint=folder / "x.pt")
        run.finish()
    return run


def rows(where: str, study: str) -> Counter[tuple[str, str, int, float]]:
    """Count how often the store has each (run, metric, step, value), over all runs that are not deleted."""
    path = where.removeprefix("sqlite:///")
    query = """SELECT r.name, m.key, m.step, m.value FROM metrics m JOIN runs r USING (run_uuid)
               JOIN experiments e USING (experiment_id) WHERE e.name = ? AND r.lifecycle_stage = 'active'"""
    with closing(sqlite3.connect(path, timeout=30)) as store:
        return Counter(store.execute(query, (study,)).fetchall())


def expected(n: int, name: str = "run", outcome: bool = True) -> Counter[tuple[str, str, int, float]]:
    keys = [(name, k, p.tokens, v) for p in points(1, n + 1) for k, v in point_to_metrics(p).items()]
    result = {"loss": 1.5, "tokens": 1000.0 * n, "seconds": 2.0} if outcome else {}
    return Counter(keys + [(name, f"rung_0/{k}", 1000 * n, v) for k, v in result.items()])


def check_whole(where: str, study: str, folder: Path, n: int = 150, name: str = "run") -> None:
    """Check that every point is there once, in one run, and that nothing is left in the folder."""
    assert rows(where, study) == expected(n, name)
    [run] = read_records(study, uri=where, kind="run")
    assert run.status == "FINISHED"
    assert run.params == {"N": "1000", "lr": "0.01"}
    assert run.tags["muscale.first"] == "2"
    assert run.tags["rung_0/checkpoint"] == str(folder / "x.pt")
    assert run.tags["muscale.role"] == "target"
    assert leftovers(folder) == []


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".spool.lock")


def test_a_run_arrives_whole_and_leaves_no_file(uri: str, tmp_path: Path) -> None:
    run = record(uri, "whole", tmp_path)
    assert (run.pending, run.lost) == (0, 0)
    check_whole(uri, "whole", tmp_path)


@pytest.mark.parametrize("cut_off", [False, True])
def test_parameters_arrive_with_the_first_records_however_many(cut_off: bool, uri: str, tmp_path: Path) -> None:
    study = f"parameters {cut_off}"
    # The process that created the run was killed before it wrote all parameters.
    if cut_off:
        client = connect(uri)
        find_or_create_child_run(
            client, find_or_create_study_run(client, study), "run", role="target", params={"p7": 7}
        )
    params = {f"p{i}": i for i in range(250)}
    with Recorder(uri, study, "run", role="target", params=params, folder=tmp_path) as run:
        for point in points(1, 300):
            run.add(point)
    [found] = read_records(study, uri=uri, kind="run")
    assert found.params == {k: str(v) for k, v in params.items()}
    assert rows(uri, study) == expected(299, outcome=False)


def test_a_short_run_is_sent_as_a_whole_and_a_long_one_soon(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_or_create_study_run(connect(uri), "short")
    first = recorder.FIRST_FLUSH_SECONDS
    # A minute is long enough that the run ends before the first flush, even on a busy machine.
    monkeypatch.setattr(recorder, "FIRST_FLUSH_SECONDS", 60.0)
    sent: list[int] = []
    log = log_records
    monkeypatch.setattr(sender, "log_records", lambda *given: (sent.append(len(given[2])), log(*given)))
    with Recorder(uri, "short", "run", role="target", params={"N": 1}, folder=tmp_path) as run:
        run.add(next(points(1, 2)))
        # Long enough that the point would be sent if it were not held back.
        time.sleep(0.5)
        for point in points(2, 21):
            run.add(point)
        run.finish()
    assert sent == [20]
    assert read_records("short", uri=uri, kind="run")[0].params == {"N": "1"}
    find_or_create_study_run(connect(uri), "long")
    monkeypatch.setattr(recorder, "FIRST_FLUSH_SECONDS", first)
    sent.clear()
    with Recorder(uri, "long", "run", role="target", params={"N": 1}, folder=tmp_path) as run:
        run.add(Measurement(1000, 3.0))
        until = time.monotonic() + 60
        while run.pending and time.monotonic() < until:
            time.sleep(0.05)
        [found] = read_records("long", uri=uri, kind="run")
    assert found.params == {"N": "1"}
    assert found.status == "RUNNING"
    assert sent == [1]


def test_asking_for_the_id_of_a_run_does_not_wait_for_the_first_flush(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than the test would wait.
    monkeypatch.setattr(recorder, "FIRST_FLUSH_SECONDS", 60.0)
    with Recorder(uri, "asked", "run", role="target", params={}, folder=tmp_path) as run:
        assert run.wait_for_run_id() is not None


def test_the_recorder_writes_what_the_direct_calls_write(uri: str, tmp_path: Path) -> None:
    record(uri, "spooled", tmp_path, n=5)
    client = connect(uri)
    parent = find_or_create_study_run(client, "direct")
    run = find_or_create_child_run(client, parent, "run", role="target", params={"N": 1000, "lr": 0.01})
    for point in points(1, 6):
        for key, value in (("loss", point.loss), ("train_loss", point.train_loss), ("lr", point.lr)):
            client.log_metric(run, key, value, step=point.tokens)
    for key, value in (("loss", 1.5), ("tokens", 5000.0), ("seconds", 2.0)):
        client.log_metric(run, f"rung_0/{key}", value, step=5000)
    client.set_tag(run, "rung_0/checkpoint", str(tmp_path / "x.pt"))
    client.set_tag(run, "muscale.first", "2")
    set_run_status(client, run)
    assert rows(uri, "direct") == rows(uri, "spooled")
    [a], [b] = (read_records(s, uri=uri, kind="run") for s in ("direct", "spooled"))
    assert (a.params, a.metrics, a.status) == (b.params, b.metrics, b.status)
    own = {"mlflow.parentRunId"}
    assert {k: v for k, v in a.tags.items() if k not in own} == {k: v for k, v in b.tags.items() if k not in own}


def test_a_server_that_is_away_costs_seconds_and_no_record(uri: str, away: str, tmp_path: Path) -> None:
    began = time.monotonic()
    run = record(away, "away", tmp_path)
    assert time.monotonic() - began < sender.CLOSE_SECONDS
    assert (run.pending, run.lost) == (155, 0)
    assert send_spooled_records(tmp_path, away) == 155
    assert send_spooled_records(tmp_path, uri) == 0
    check_whole(uri, "away", tmp_path)
    assert send_spooled_records(tmp_path, uri) == 0
    check_whole(uri, "away", tmp_path)


def test_the_next_recorder_sends_what_the_last_one_left(uri: str, away: str, tmp_path: Path) -> None:
    record(away, "next", tmp_path, name="first")
    with Recorder(uri, "next", "second", role="target", params={}, folder=tmp_path) as run:
        run.finish()
    assert rows(uri, "next") == expected(150, "first")
    assert {r.name: r.status for r in read_records("next", uri=uri, kind="run")} == {
        "first": "FINISHED",
        "second": "FINISHED",
    }
    assert leftovers(tmp_path) == []


def test_a_run_that_goes_on_is_one_run_and_its_time_is_when_it_began(uri: str, away: str, tmp_path: Path) -> None:
    began = time.time() * 1000
    with Recorder(away, "on", "run", role="target", params={"N": 1}, folder=tmp_path) as run:
        run.add(Measurement(1000, 3.0))
        run.finish("KILLED")
    time.sleep(0.3)
    with Recorder(uri, "on", "run", role="target", params={"N": 1, "world": 2}, folder=tmp_path) as run:
        run.add(Measurement(2000, 2.5))
    assert rows(uri, "on") == Counter([("run", "loss", 1000, 3.0), ("run", "loss", 2000, 2.5)])
    [found] = read_records("on", uri=uri, kind="run")
    assert found.status == "RUNNING", "killed, then opened again, and not finished"
    assert found.params == {"N": "1", "world": "2"}
    assert abs(connect(uri).get_run(found.run_id).info.start_time - began) < 250


@pytest.mark.parametrize("sent", [0, 1, 60, 140])
def test_what_is_sent_again_after_a_crash_is_there_once(sent: int, uri: str, away: str, tmp_path: Path) -> None:
    """The crash comes between a batch and the note of it, so everything after `sent` lines is sent twice."""
    study = f"crash {sent}"
    record(away, study, tmp_path)
    [path] = tmp_path.glob("*" + spool.SPOOL_SUFFIX)
    text = path.read_bytes()
    assert send_spooled_records(tmp_path, uri) == 0
    path.write_bytes(text)
    lines = text.splitlines(keepends=True)
    if sent:
        spool.get_position_path(path).write_text(str(len(b"".join(lines[:sent]))))
    assert send_spooled_records(tmp_path, uri) == 0
    check_whole(uri, study, tmp_path)


@pytest.mark.parametrize("cut", [1, 30])
def test_a_last_line_cut_off_by_a_kill_is_skipped_with_a_warning(
    cut: int, uri: str, away: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(away, f"cut {cut}", tmp_path)
    [path] = tmp_path.glob("*" + spool.SPOOL_SUFFIX)
    path.write_bytes(path.read_bytes()[:-cut])
    assert send_spooled_records(tmp_path, uri) == 0
    assert "its last line was cut off" in caplog.text
    assert rows(uri, f"cut {cut}") == expected(150)
    [run] = read_records(f"cut {cut}", uri=uri, kind="run")
    assert run.status == "RUNNING", "the line that was cut off held FINISHED"
    assert leftovers(tmp_path) == []


def test_a_file_that_is_still_written_is_left_alone(uri: str, away: str, tmp_path: Path) -> None:
    with Recorder(away, "live", "one", role="target", params={}, folder=tmp_path) as run:
        run.add(Measurement(1000, 3.0))
        assert send_spooled_records(tmp_path, uri) == 2
        with Recorder(uri, "live", "two", role="target", params={}, folder=tmp_path) as other:
            other.add(Measurement(1000, 2.0))
        assert rows(uri, "live") == Counter([("two", "loss", 1000, 2.0)])
        with Recorder(uri, "live", "one", role="target", params={}, folder=tmp_path) as again:
            again.add(Measurement(2000, 2.0))
        assert again.pending == 2, "later records of a run wait for its earlier ones"
    assert send_spooled_records(tmp_path, uri) == 0
    assert rows(uri, "live") == Counter(
        [("two", "loss", 1000, 2.0), ("one", "loss", 1000, 3.0), ("one", "loss", 2000, 2.0)]
    )


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_left_by_an_error_says_so(error: type[BaseException], status: str, uri: str, tmp_path: Path) -> None:
    with pytest.raises(error), Recorder(uri, status, "run", role="target", params={}, folder=tmp_path):
        raise error
    [run] = read_records(status, uri=uri, kind="run")
    assert run.status == status


def test_a_diverged_run_keeps_its_nan_and_a_logged_point_is_not_logged_again(uri: str, tmp_path: Path) -> None:
    with Recorder(uri, "nan", "run", role="proxy", params={}, folder=tmp_path) as run:
        run.add(Measurement(500, 3.0, recorded=True))
        run.add(Measurement(1000, float("nan"), final=True, diverged=True))
        run.log_result(rung=1, tokens=1000, loss=float("inf"), seconds=1.0, checkpoint=None)
    table = read_runs("nan", uri=uri)
    assert table["diverged"].tolist() == [True]
    assert {key for _, key, _, _ in rows(uri, "nan")} == {"rung_1/loss", "rung_1/tokens", "rung_1/seconds"}


def test_what_mlflow_refuses_is_set_aside_and_the_rest_arrives(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise the name would be replaced by one that MLflow takes.
    monkeypatch.setattr("scaling.tracking.log.make_usable_name", lambda name: name)
    with Recorder(uri, "refused", "run", role="target", params={}, folder=tmp_path) as run:
        run.add(Measurement(1000, 3.0))
        run.set_tag("no/good\x00name", "x")
        run.add(Measurement(2000, 2.0))
        run.finish()
    assert run.pending == 0
    assert rows(uri, "refused") == Counter([("run", "loss", 1000, 3.0), ("run", "loss", 2000, 2.0)])
    assert "MLflow refuses a record" in caplog.text
    [aside] = tmp_path.glob("*" + spool.REFUSED_SUFFIX)
    [line] = map(json.loads, aside.read_text().splitlines())
    assert line["tags"] == {"no/good\x00name": "x"}
    assert read_records("refused", uri=uri, kind="run")[0].status == "FINISHED"


def test_long_values_and_odd_names_are_recorded_and_refuse_nothing(uri: str, tmp_path: Path) -> None:
    command = "program " + " ".join(f"--option-{i} {i}" for i in range(600))
    params = {"command": command, "l!r": 1, "a//b": 2, "a/b. c:-_": 3, "n" * 300: 4}
    params |= {f"option {i}": i for i in range(250)}
    with Recorder(uri, "long values", "run", role="target", params=params, folder=tmp_path) as run:
        run.add(Measurement(1000, 3.0))
        run.set_tag("note: " + "t" * 300, "v" * 9000)
        run.log_figures({f"figure {i}!": float(i) for i in range(1500)})
        run.finish()
    assert leftovers(tmp_path) == []
    [record] = read_records("long values", uri=uri, kind="run")
    assert len(record.params) == len(params)
    assert record.params["a/b. c:-_"] == "3"
    assert record.params["option 249"] == "249"
    [odd] = [value for name, value in record.params.items() if name.startswith("l_r_")]
    assert odd == "1"
    # The parameter is cut and names the whole, which is a file of the run.
    digest = hashlib.sha256(command.encode()).hexdigest()
    assert record.params["command"].startswith(command[:400])
    assert f"{len(command):,} characters, sha256 {digest}" in record.params["command"]
    whole = connect(uri).download_artifacts(record.run_id, "long_values/command.txt", str(tmp_path))
    assert Path(whole).read_text() == command
    assert sorted(v for k, v in record.metrics.items() if k.startswith("figure")) == [float(i) for i in range(1500)]


def test_a_folder_that_cannot_be_written_is_refused_before_the_run(away: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Recorder(away, "s", "run", role="target", params={}, folder=tmp_path / "file")
    assert leftovers(tmp_path) == ["file"]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Limit the size of every file that this process writes in the block, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_no_training_and_the_loss_is_counted(
    uri: str, away: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MAX_BUFFERED_BYTES", 2000)
    with room_for(1500):
        run = record(away, "full", tmp_path)
    [path] = tmp_path.glob("*" + spool.SPOOL_SUFFIX)
    on_disk = [json.loads(line) for line in path.read_text().splitlines()]
    assert run.lost == 155 - len(on_disk) > 0
    assert caplog.text.count("cannot write records to") == 1
    assert f"{run.lost} records are lost" in caplog.text
    assert send_spooled_records(tmp_path, uri) == 0
    kept = [r for r in on_disk if "metrics" in r]
    assert rows(uri, "full") == Counter(("run", k, r["step"], v) for r in kept for k, v in r["metrics"].items())


def test_a_disk_that_is_full_for_a_while_loses_nothing(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Recorder(uri, "tight", "run", role="target", params={"N": 1000, "lr": 0.01}, folder=tmp_path) as run:
        size = run.path.stat().st_size + 700
        for point in points(1, 101):
            if point.tokens == 20_000:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            if point.tokens == 80_000:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            run.add(point)
    assert "cannot write records to" in caplog.text
    assert (run.lost, run.pending) == (0, 0)
    assert rows(uri, "tight") == expected(100, outcome=False)


def test_failing_fast_is_undone_and_a_timeout_that_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RETRIES_VARIABLE, raising=False)
    monkeypatch.setenv(TIMEOUT_VARIABLE, "77")
    inside = []
    with fail_fast():
        with fail_fast():
            inside.append((os.environ[RETRIES_VARIABLE], os.environ[TIMEOUT_VARIABLE]))
        inside.append((os.environ[RETRIES_VARIABLE], os.environ[TIMEOUT_VARIABLE]))
    assert inside == [("0", "77")] * 2
    assert RETRIES_VARIABLE not in os.environ
    assert os.environ[TIMEOUT_VARIABLE] == "77"


def test_an_empty_twin_of_a_run_is_dropped_and_a_run_with_points_never(uri: str) -> None:
    client = connect(uri)
    parent = find_or_create_study_run(client, "twins")
    first = find_or_create_child_run(client, parent, "run", role="target", params={})
    tags = client.get_run(first).data.tags
    experiment = client.get_run(parent).info.experiment_id
    # A server that hung creates a second run when it answers a request that was sent again meanwhile.
    late = client.create_run(experiment, tags=tags, start_time=1).info.run_id
    log_records(client, first, [({"loss": 3.0}, 1, 1)], {})
    assert find_or_create_child_run(client, parent, "run", role="target", params={}) == first, (
        "older, but nothing in it"
    )
    delete_empty_duplicates(client, parent, late)
    assert client.get_run(first).info.lifecycle_stage == "active"
    delete_empty_duplicates(client, parent, first)
    assert client.get_run(late).info.lifecycle_stage == "deleted"


@pytest.mark.slow
def test_a_locked_store_delays_records_and_loses_none(uri: str, tmp_path: Path) -> None:
    record(uri, "locked", tmp_path / "before", name="before")
    path = uri.removeprefix("sqlite:///")
    code = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "c.execute('BEGIN IMMEDIATE'); print(flush=True); time.sleep(10); c.execute('ROLLBACK')"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    began = time.monotonic()
    run = record(uri, "locked", tmp_path / "during", name="during")
    assert time.monotonic() - began < sender.CLOSE_SECONDS + 5
    holder.communicate()
    # The thread still sends when the end of the run has stopped waiting for it.
    for _ in range(300):
        if not (run.pending or leftovers(tmp_path / "during")):
            break
        time.sleep(0.1)
    assert send_spooled_records(tmp_path / "during", uri) == 0
    assert rows(uri, "locked") == expected(150, "before") + expected(150, "during")


@pytest.mark.slow
def test_a_server_that_is_away_killed_restarted_or_hung_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "FIRST_TIMEOUT_SECONDS", 4.0)
    server, folder = MLflowServer(tmp_path), tmp_path / "records"

    def until(done: Callable[[], bool]) -> None:
        for _ in range(3000):
            if done():
                return
            time.sleep(0.1)
        raise AssertionError("waited five minutes in vain")

    def add(first: int, last: int) -> float:
        longest = 0.0
        for point in points(first, last):
            began = time.monotonic()
            run.add(point)
            longest = max(longest, time.monotonic() - began)
        return longest

    try:
        with Recorder(server.uri, "server", "run", role="target", params={"N": 1000, "lr": 0.01}, folder=folder) as run:
            # The server is away from the start.
            add(1, 51)
            server.start()
            until(lambda: run.pending == 0)
            stop = threading.Thread(target=server.kill)
            stop.start()
            # The server is killed while hundreds of points are on their way.
            longest = add(51, 451)
            stop.join()
            server.start()
            until(lambda: run.pending == 0)
            # A stopped server takes connections and never answers.
            server.signal(signal.SIGSTOP)
            longest = max(longest, add(451, 801))
            time.sleep(7)
            server.signal(signal.SIGCONT)
            until(lambda: run.pending == 0)
            add(801, 1001)
            run.set_tag("muscale.first", "2")
            run.log_result(rung=0, tokens=1_000_000, loss=1.5, seconds=2.0, checkpoint=folder / "x.pt")
            run.finish()
        check_whole(server.store, "server", folder, n=1000)
        assert longest < 1.0, "no training waited for MLflow"

        # The server is stopped before the run is created and until after its end.
        server.signal(signal.SIGSTOP)
        began = time.monotonic()
        left = record(server.uri, "hung", folder)
        assert time.monotonic() - began < sender.CLOSE_SECONDS + 5
        assert left.pending == 155
        server.signal(signal.SIGCONT)
        until(lambda: send_spooled_records(folder, server.uri) == 0 and leftovers(folder) == [])
        check_whole(server.store, "hung", folder)
    finally:
        server.signal(signal.SIGCONT)
        server.kill()


KILLED = """
import os, signal, sys
from pathlib import Path
from scaling.common.measurement import Measurement
from scaling.tracking.recorder import Recorder
with Recorder(sys.argv[1], "killed", "run", role="target", params={"N": 1}, folder=Path(sys.argv[2])) as run:
    for i in range(1, 1001):
        run.add(Measurement(1000 * i, 3.0))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_process_killed_while_it_sends_loses_nothing_that_it_recorded(uri: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, uri, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    copy = shutil.copytree(tmp_path, tmp_path.parent / "copy")
    assert send_spooled_records(tmp_path, uri) == 0
    assert rows(uri, "killed") == Counter(("run", "loss", 1000 * i, 3.0) for i in range(1, 1001))
    assert send_spooled_records(copy, uri) == 0
    assert rows(uri, "killed") == Counter(("run", "loss", 1000 * i, 3.0) for i in range(1, 1001))


@pytest.mark.parametrize(
    "line", [b"\xff\x00 {", b"[1]", b'{"at": "late"}', b'{"at": 1, "metrics": {"loss": "low"}, "step": 1}']
)
def test_a_damaged_line_is_set_aside_and_holds_nothing_up(
    line: bytes, uri: str, away: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = f"damaged {line!r}".replace("'", "")
    record(away, study, tmp_path, 20).close()
    (path,) = tmp_path.glob("*.spool.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:10], line + b"\n", *lines[10:]]))
    assert send_spooled_records(tmp_path, uri) == 0
    assert "a damaged line is skipped and kept in" in caplog.text
    (aside,) = tmp_path.glob("*.refused.jsonl")
    assert json.loads(aside.read_text())["line"].strip() == line.decode(errors="replace")
    (run,) = read_records(study, uri=uri, kind="run")
    assert run.metrics["loss"] == pytest.approx(4.0 - 20 / 1000)


def test_a_file_of_records_without_a_head_is_put_aside_whole(uri: str, away: str, tmp_path: Path) -> None:
    record(away, "headless", tmp_path, 20).close()
    (path,) = tmp_path.glob("*.spool.jsonl")
    before = path.read_bytes()[1:]
    path.write_bytes(before)
    record(away, "with a head", tmp_path, 20, name="other").close()
    assert send_spooled_records(tmp_path, uri) == 0
    (aside,) = tmp_path.glob("*.refused.jsonl")
    assert aside.read_bytes() == before
    assert len(read_records("with a head", uri=uri, kind="run")) == 1
