"""Many workers on one study in every shared storage: nothing is decided twice, and killed servers are waited for."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from benchmarks.many_workers import create_storage, find_faults, open_search, run_workers
from benchmarks.servers import PostgreSQLServer, find_free_port, serve_postgresql
from hpo.storage import connect, locks
from hpo.storage.leases import LeaseMonitor
from hpo.storage.locks import TicketLock, make_lock
from hpo.study.config import StudyConfig, load_study
from hpo.study.files import StudyFiles
from hpo.study.lifecycle import create_study, delete_study, list_studies, open_existing
from hpo.study.trainer import Trainer
from tests.test_hpo.test_leases import FakeClock
from tests.test_hpo.toy_study import STUDY, ToyStudy

POSTGRESQL = bool(shutil.which("postgres") or [*Path("/usr/lib/postgresql").glob("*/bin/postgres")])
needs_postgresql = pytest.mark.skipif(not POSTGRESQL, reason="needs PostgreSQL's programs")


@pytest.mark.slow
def test_32_workers_run_500_trials_none_twice_and_without_idling(tmp_path: Path) -> None:
    """Trial times differ by a factor of ten; asynchronous. How busy workers are is measured by the benchmark."""
    result = run_workers(str(tmp_path / "study.journal"), 32, 500, 0.3)
    assert result.trials >= 500
    assert not result.faults
    assert result.idle_asks == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("postgresql", marks=needs_postgresql), "grpc+journal"])
# Connections that are closed with their server are collected only later.
@pytest.mark.filterwarnings("ignore")
def test_workers_on_a_server_decide_nothing_twice(kind: str) -> None:
    with create_storage(kind) as storage:
        result = run_workers(storage, 4, 40, 0.0)
    assert result.trials >= 40
    assert not result.faults


def test_faults_are_found() -> None:
    """A promotion that is written twice and an overfull rung."""
    study = open_search("sqlite://", iterations=1, worker="here")
    for _ in range(40):
        job = study.ask()
        if job is None:
            break
        study.tell(job, job.params["lr"])
    trials = study.study.get_trials()
    assert not find_faults(study, trials)
    (promoted, *_) = (t for t in trials if t.user_attrs["continues"] is not None)
    assert any("evaluated twice" in f for f in find_faults(study, [*trials, promoted]))
    (started, *_) = (t for t in trials if t.user_attrs["continues"] is None)
    more = []
    for number in range(1000, 1100):
        extra = copy.deepcopy(started)
        extra.number, extra.user_attrs = number, started.user_attrs | {"config": number}
        more.append(extra)
    assert any("more than" in f for f in find_faults(study, [*trials, *more]))


class PostgresStudy(ToyStudy):
    """A study that is stored in PostgreSQL."""

    def __init__(self, folder: Path, url: str, pause: float) -> None:
        super().__init__(folder, pause)
        self.env["MUSCALE_STORAGE"] = self.url = url

    @property
    def trials(self) -> list[FrozenTrial]:
        return optuna.load_study(study_name="toy", storage=self.url).trials


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PostgreSQLServer]:
    with PostgreSQLServer(tmp_path, find_free_port()) as server:
        yield server


@pytest.mark.slow
@needs_postgresql
@pytest.mark.filterwarnings("ignore")
def test_a_killed_postgresql_is_waited_for(server: PostgreSQLServer, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    study = PostgresStudy(tmp_path / "work", server.url, pause=0.0)
    study.hold(tokens=6_000)
    launcher = study.start("launch", "toy")
    study.wait_until_held(2, launcher)
    server.kill()
    study.release()
    study.wait_until(lambda: "the storage does not answer" in launcher.stderr, launcher)
    server.start()
    launcher.finish()
    study.check_whole()
    assert set(study.count_steps().values()) == {1}, "training continued meanwhile"
    study.env.pop("MUSCALE_STORAGE")
    assert "was launched in postgresql" in study.run("status", "toy", code=2)
    folder = study.folder / "studies" / "toy"
    assert not (folder / "study.journal").exists()
    study.run("worker", "toy", "--storage", server.url)


def write_toy_study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StudyFiles, str, StudyConfig, Trainer]:
    """Return a study's files, the URI of its MLflow store, the study and its trainer, and change to its folder."""
    monkeypatch.chdir(folder)
    (folder / "studies").mkdir()
    toml = folder / "studies" / "toy.toml"
    toml.write_text(STUDY.format(pause=0.0, seeds=1, steps=folder))
    return StudyFiles(toml), f"sqlite:///{folder}/mlflow.db", *load_study(toml)


# Optuna warns so when a study is deleted.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader")
def test_a_study_is_opened_only_where_it_was_launched_and_forgotten_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, uri, study, trainer = write_toy_study(tmp_path, monkeypatch)
    here, elsewhere = (f"sqlite:///{tmp_path}/{name}.db" for name in ("here", "elsewhere"))
    create_study(files, study, trainer, uri=uri, storage=here)
    assert open_existing(files, study, trainer, storage=here).progress.done == 0
    with pytest.raises(ValueError, match=r"was launched in sqlite:.*here\.db: needed that as --storage"):
        open_existing(files, study, trainer)
    with pytest.raises(ValueError, match=r"elsewhere\.db has none of that name: needed the same storage"):
        open_existing(files, study, trainer, storage=elsewhere)
    assert list_studies(elsewhere) == set(), "nothing was created there"
    with pytest.raises(ValueError, match="needed that as --storage"):
        delete_study(files, uri=uri)
    assert delete_study(files, uri=uri, storage=here)
    assert list_studies(here) == set()
    assert not files.folder.exists()
    create_study(files, study, trainer, uri=uri)
    with pytest.raises(ValueError, match=r"study\.journal: leave --storage and \$MUSCALE_STORAGE out"):
        open_existing(files, study, trainer, storage=here)


def test_a_server_that_does_not_answer_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "SERVER_SECONDS", 0.2)
    with pytest.raises(
        ValueError, match=r"postgresql://me:\*\*\*@127\.0\.0\.1:9/x does not answer: .*refused"
    ) as caught:
        open_search("postgresql://me:hush@127.0.0.1:9/x")
    assert "hush" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no proxy answers at grpc://127\.0\.0\.1:9 within"):
        open_search("grpc://127.0.0.1:9")


@pytest.mark.filterwarnings("ignore:The ``noload`` loader")
def test_a_server_that_fails_while_a_study_is_opened_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna.exceptions import StorageInternalError

    files, uri, study, trainer = write_toy_study(tmp_path, monkeypatch)
    here = f"sqlite:///{tmp_path}/here.db"
    create_study(files, study, trainer, uri=uri, storage=here)

    def raise_connection_error(*_: object, **__: object) -> None:
        raise StorageInternalError("the server closed the connection")

    monkeypatch.setattr("hpo.search.search.open_study", raise_connection_error)
    with pytest.raises(ValueError, match=r"here\.db no longer answers \(StorageInternalError\): start it, then"):
        open_existing(files, study, trainer, storage=here)

    def raise_disk_full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hpo.search.search.open_study", raise_disk_full)
    with pytest.raises(ValueError, match=r"cannot be read or written .*No space left.*free disk space"):
        open_existing(files, study, trainer, storage=here)


def test_tickets_admit_one_at_a_time_and_all_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(locks, "POLL_SECONDS", 0.002)
    storage = optuna.storages.InMemoryStorage()
    inside, most_inside, order = 0, 0, list[int]()

    def take_turns(who: int) -> None:
        nonlocal inside, most_inside
        lock = TicketLock(storage, "study")
        for _ in range(5):
            with lock:
                inside += 1
                most_inside = max(most_inside, inside)
                order.append(who)
                time.sleep(0.002)
                inside -= 1

    threads = [threading.Thread(target=take_turns, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most_inside == 1
    assert sorted(order) == sorted([*range(6)] * 5)


def test_a_ticket_of_a_dead_or_stopped_holder_is_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.002)
    storage = optuna.storages.InMemoryStorage()
    dead, stopped, mine = (TicketLock(storage, "study") for _ in range(3))
    dead._owner = f"{mine._owner.rsplit('/', 2)[0]}/99999999/1.0"
    dead.__enter__()
    with mine:
        pass
    with pytest.raises(RuntimeError, match="was taken from this process"):
        dead.__exit__(None, None, None)
    clock = FakeClock()
    mine._monitor = LeaseMonitor(30.0, clock)
    monkeypatch.setattr(locks.time, "sleep", lambda _: setattr(clock, "now", clock.now + 16))
    stopped.__enter__()
    # No more heartbeats.
    stopped._stop.set()
    with mine:
        assert clock.now > 30
    with pytest.raises(RuntimeError, match="was taken from this process"):
        stopped.__exit__(None, None, None)


def test_the_next_in_the_queue_lists_no_tickets_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing all tickets behind a proxy costs most: 32 workers that do it again and again stop the server."""
    import threading

    monkeypatch.setattr(locks, "POLL_SECONDS", 0.002)
    lists = 0

    class CountingStorage(optuna.storages.InMemoryStorage):
        def get_all_trials(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal lists
            lists += 1
            return super().get_all_trials(*args, **kwargs)

    storage = CountingStorage()
    first, second = TicketLock(storage, "study"), TicketLock(storage, "study")
    entered = threading.Event()

    def enter_second() -> None:
        with second:
            entered.set()

    with first:
        waiting = threading.Thread(target=enter_second)
        waiting.start()
        time.sleep(0.2)
        assert not entered.is_set()
    waiting.join(timeout=10)
    assert entered.is_set()
    assert lists == 2, "one each"


def test_the_lock_depends_on_the_kind_of_storage(tmp_path: Path) -> None:
    memory = optuna.storages.InMemoryStorage()
    assert make_lock(memory, memory, "s") is make_lock(memory, memory, "t")

    class ForeignStorage(optuna.storages.InMemoryStorage):
        pass

    assert make_lock(ForeignStorage(), memory, "s") is not None
    with pytest.raises(ValueError, match=r"needed grpc://HOST:PORT, got 'grpc://nowhere'"):
        open_search("grpc://nowhere")


@needs_postgresql
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_advisory_lock_is_released_when_its_holder_dies(tmp_path: Path) -> None:
    import multiprocessing
    import signal

    with serve_postgresql(tmp_path) as url:
        context = multiprocessing.get_context("spawn")
        held = context.Event()
        holder = context.Process(target=hold_lock, args=(url, held))
        holder.start()
        assert held.wait(60)
        os.kill(holder.pid or 0, signal.SIGKILL)
        holder.join()
        began = time.monotonic()
        # The URL as a user writes it, without the driver.
        job = open_search(url.replace("+psycopg2", ""), worker="here").ask()
        assert job is not None
        assert time.monotonic() - began < 20
        assert [t.state for t in open_search(url, worker="there").study.trials] == [TrialState.RUNNING]


def hold_lock(url: str, held: Any) -> None:
    mine = open_search(url, worker="holder")
    with mine._lock:
        held.set()
        time.sleep(600)
