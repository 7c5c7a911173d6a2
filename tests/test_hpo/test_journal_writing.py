"""The journal: a line is written whole or not at all, also when a writer is killed or the disk is full."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from hpo.storage import locks
from hpo.storage.journal import Journal
from hpo.storage.locks import Flock


def read_lines(path: Path, backend: Any = Journal) -> list[dict[str, Any]]:
    return list(backend(path).read_logs(0))


def test_a_broken_last_line_is_neither_read_nor_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    first, second = ({"op": n, "text": "x" * n} for n in (5, 100_000))
    Journal(path).append_logs([first, second])
    whole = path.read_bytes()
    for cut in (1, 2, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:-cut])
        kept = [first] if cut < len(whole) - 20 else []
        assert read_lines(path) == kept
        Journal(path).append_logs([{"op": 3}])
        assert read_lines(path) == [*kept, {"op": 3}]
        assert read_lines(path, lambda p: JournalFileBackend(str(p))) == [*kept, {"op": 3}], (
            "as Optuna's own reader reads it"
        )


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    backend = Journal(path)
    backend.append_logs([{"op": 1}])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"no space left|File too large"):
            backend.append_logs([{"op": 2, "text": "x" * 100}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    backend.append_logs([{"op": 3}])
    assert read_lines(path) == [{"op": 1}, {"op": 3}]


def test_a_stopped_process_that_holds_the_lock_is_logged_and_a_killed_one_releases_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    monkeypatch.setattr(locks, "LATE_SECONDS", 0.3)
    code = (
        f"from hpo.storage.locks import Flock; import time; Flock({str(path)!r}).acquire(); "
        "print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    is_locked = threading.Event()

    def wait() -> None:
        with Flock(path):
            is_locked.set()

    thread = threading.Thread(target=wait)
    holder.send_signal(signal.SIGSTOP)
    thread.start()
    assert not is_locked.wait(1.0)
    message = caplog.messages[-1]
    assert f"/{holder.pid}/" in message
    remedy = f"`kill -CONT {holder.pid}` continues it if it was stopped, `kill -9 {holder.pid}` frees the lock"
    assert f"(stopped); {remedy}" in message
    holder.kill()
    assert is_locked.wait(5)
    thread.join()
    holder.communicate()


def test_a_lock_can_be_taken_again_by_its_thread_and_by_no_other(tmp_path: Path) -> None:
    lock, order = Flock(tmp_path / "lock"), list[str]()

    def other() -> None:
        with lock:
            order.append("other")

    with lock:
        with lock:
            thread = threading.Thread(target=other)
            thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def append_records(path: str, who: int, count: int) -> None:
    backend = Journal(Path(path))
    for n in range(count):
        backend.append_logs([{"who": who, "n": n, "text": "x" * (17 * who)}])


def test_many_writers_lose_and_mix_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_records, args=(str(tmp_path / "a.journal"), who, 40)) for who in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    rows = read_lines(tmp_path / "a.journal")
    assert [[row["n"] for row in rows if row["who"] == who] for who in range(4)] == [list(range(40))] * 4


def test_a_study_continues_after_a_writer_was_killed_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = optuna.create_study(storage=JournalStorage(Journal(path)), study_name="a")
    study.tell(study.ask(), 1.0)
    path.write_bytes(path.read_bytes() + path.read_bytes()[:25])
    again = optuna.load_study(storage=JournalStorage(Journal(path)), study_name="a")
    again.tell(again.ask(), 2.0)
    assert [t.value for t in study.trials] == [1.0, 2.0]
