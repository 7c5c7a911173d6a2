"""A minute of random faults; benchmarks/soak.py makes any number of them, with servers of MLflow and PostgreSQL among the victims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import INTERVAL, STEP, counted, soak, trained, world_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_orphaned_whatever_happens_to_the_workers(tmp_path: Path) -> None:
    with world_of("journal", 7, mlflow_server=False, folder=tmp_path) as world:
        world.make(workers=2, iterations=1, tokens=(6_000, 54_000), seed=7)
        soak(world, seconds=40.0, faults=14)
        found = counted(world)
    said = (world.folder / "log").read_text()[-4000:]
    assert found.whole, f"{found}\n{said}"
    assert sum(found.faults.values()) >= 10
    assert found.evaluations == found.planned == 44
    assert found.again <= INTERVAL * sum(found.faults.values())


def events(folder: Path, *rows: tuple[str, int]) -> Any:
    """What `trained` says of one run of 20 steps with these events."""
    lines = [json.dumps([at, what, 1e3, 0.1, tokens * STEP, 20 * STEP]) for at, (what, tokens) in enumerate(rows)]
    (folder / "1.jsonl").write_text("\n".join(lines) + "\n")
    return trained(folder)


def test_the_count_sees_what_was_trained_again_and_who_began_too_early(tmp_path: Path) -> None:
    steps = [("step", i) for i in range(1, 21)]
    run = (1e3, 0.1, 20 * STEP)
    assert events(tmp_path, ("begin", 0), *steps) == (20, 0, [], {run})
    kept = [("begin", 0), *steps[:13], ("begin", 10), *steps[10:]]
    assert events(tmp_path, *kept) == (23, 3, [], {run})
    lost = [("begin", 0), *steps[:13], ("begin", 5), *steps[5:18]]
    count, again, beyond, ended = events(tmp_path, *lost)
    assert (count, again, ended) == (26, 8, set())
    assert len(beyond) == 1
    assert "began at 5000, 13000 had been reached" in beyond[0]
