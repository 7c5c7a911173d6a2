"""The journal when things go wrong: a writer killed in a line, a damaged line, a trial with impossible attributes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from hpo.search.search import Search


def open_search(path: Path, worker: str = "me") -> Search:
    return Search(
        {"lr": FloatDistribution(1e-3, 1.0, log=True)},
        tokens=(100, 900),
        iterations=1,
        sampler="random",
        storage=path,
        worker=worker,
    )


def run_trials(path: Path, count: int) -> Search:
    search, rng = open_search(path), random.Random(0)
    for _ in range(count):
        job = search.ask()
        assert job is not None
        search.tell(job, rng.random())
    return search


def read_results(path: Path) -> list[tuple[int, float | None]]:
    return [(t.number, t.value) for t in open_search(path, "reader").study.trials]


@pytest.mark.parametrize("left", [1, 10, 60])
def test_only_a_line_that_was_cut_by_a_kill_is_lost_and_no_reader_fails(left: int, tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run_trials(path, 3)
    before, lines = read_results(path), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + lines[-1][:left])
    assert read_results(path) == before
    search = open_search(path)
    job = search.ask()
    assert job is not None
    search.tell(job, 0.5)
    assert read_results(path) == [*before, (3, 0.5)]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
    assert path.read_bytes().startswith(b"".join(lines))


def test_optuna_alone_appends_to_such_a_line_and_then_cannot_read_the_file(tmp_path: Path) -> None:
    """This is why hpo.storage.journal exists. When it fails, Optuna handles such lines itself."""
    path = str(tmp_path / "x.journal")
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend(path)))
    with open(path, "ab") as file:
        file.write(b'{"op_code":')
    study.set_user_attr("a", 1)
    with pytest.raises(ValueError, match="Expecting"):
        study.set_user_attr("b", 2)
    with pytest.raises(ValueError, match="Expecting"):
        JournalStorage(JournalFileBackend(path))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"\xff\xfe\x00", "invalid JSON"),
        (b'{"op_code": 4, "worker', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b"[1, 2]", "TypeError"),
        (b'{"op_code": 99}', "AssertionError"),
        (b'{"op_code": 4, "worker_id": "x", "study_id": 0}', "KeyError"),
    ],
)
def test_a_damaged_line_is_refused_by_file_and_number(line: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run_trials(path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], line + b"\n", *lines[4:]]))
    with pytest.raises(ValueError, match=rf"{path}, line 5: needed a record of Optuna's journal, got {why}"):
        open_search(path)
    path.write_bytes(b"".join(lines))
    assert len(read_results(path)) == 3


def change_journal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the first record that is a trial of the search."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    change(next(row for row in rows if row["op_code"] == 4))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "attrs",
    [
        {"rung": 7},
        {"rung": "0"},
        {"bracket": [0, 5, 0]},
        {"bracket": None},
        {"tokens": -1},
        {"N": "many"},
        {"config": 99},
        {"continues": 99},
        {"seeds": 0},
        {"stopped": {"tokens": 5}},
    ],
    ids=str,
)
def test_a_trial_with_impossible_attributes_is_refused_by_number(attrs: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    run_trials(path, 3)
    change_journal(path, lambda row: row["user_attrs"].update(attrs))
    with pytest.raises(ValueError, match=rf"{path}, trial 0 of study 'search': needed what a search writes"):
        open_search(path)


def test_trials_of_other_studies_in_a_journal_are_ignored(tmp_path: Path) -> None:
    """A plain Optuna study in the same journal has attributes that mean nothing to a search."""
    path = tmp_path / "study.journal"
    run_trials(path, 2)
    other = optuna.create_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="other")
    trial = other.ask()
    trial.set_user_attr("rung", "first")
    other.tell(trial, 1.0)
    assert len(read_results(path)) == 2
