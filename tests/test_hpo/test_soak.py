"""A minute of random faults. benchmarks/soak.py does any number of them, also to servers of MLflow and PostgreSQL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.soak import make_report, read_steps, soak
from benchmarks.soak_world import INTERVAL, LEASE_SECONDS, PACE_SECONDS, STEP, open_world

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_orphaned_whatever_happens_to_the_workers(tmp_path: Path) -> None:
    with open_world("journal", 7, mlflow_server=False, folder=tmp_path) as world:
        world.write_study(workers=2, iterations=1, tokens=(6_000, 54_000), seed=7)
        soak(world, seconds=40.0, faults=14)
        report = make_report(world)
    assert report.is_whole, f"{report}\n{world.log[-4000:]}"
    faults = sum(report.faults.values())
    assert faults == 14
    assert report.evaluations == report.planned == 44
    # A run restarts at most a checkpoint interval back, and its old process may continue for the length of a lease.
    assert report.repeated <= (INTERVAL + LEASE_SECONDS / PACE_SECONDS) * faults


def write_events(folder: Path, *events: tuple[str, int]) -> None:
    """Write the log of one run of 20 steps."""
    lines = [json.dumps([at, what, 1e3, 0.1, step * STEP, 20 * STEP]) for at, (what, step) in enumerate(events)]
    (folder / "1.jsonl").write_text("\n".join(lines) + "\n")


def test_the_account_shows_what_was_repeated_and_which_starts_went_too_far_back(tmp_path: Path) -> None:
    steps = [("step", i) for i in range(1, 21)]
    run = (1e3, 0.1, 20 * STEP)
    write_events(tmp_path, ("begin", 0), *steps)
    assert read_steps(tmp_path) == (20, 0, [], {run})
    write_events(tmp_path, ("begin", 0), *steps[:13], ("begin", 10), *steps[10:])
    assert read_steps(tmp_path) == (23, 3, [], {run})
    write_events(tmp_path, ("begin", 0), *steps[:13], ("begin", 5), *steps[5:18])
    count, repeated, too_far_back, finished = read_steps(tmp_path)
    assert (count, repeated, finished) == (26, 8, set())
    assert len(too_far_back) == 1
    assert "began at 5000, 13000 had been reached" in too_far_back[0]
