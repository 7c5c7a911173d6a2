"""Which rows of foreign tables laws use: ends of runs, states, copies, missing cells, mistyped sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling.advice.recommendation import recommend
from scaling.runs.importer import count_runs, import_runs, summarize_exclusions
from scaling.runs.io import load_runs, save_runs
from scaling.runs.marks import normalize_state
from scaling.runs.table import usable

HISTORY = {"N": "n_params", "D": "step:steps", "loss": "val_loss", "run_id": "run"}


def compute_loss(N: float, D: float) -> float:
    return float(1.69 + 406 / N**0.34 + 411 / D**0.28)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "runs.csv") -> Path:
    path = folder / name
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def make_history(missing: str, *, last_missing: int = 0) -> list[dict[str, Any]]:
    """Return a log of two runs with a validation loss in each fifth row, and `last_missing` rows after the last one."""
    rows: list[dict[str, Any]] = []
    for run, N in (("r0", 3e7), ("r1", 6e7)):
        for step in range(1, 21 + last_missing):
            has_loss = step % 5 == 0 and step <= 20
            loss = f"{compute_loss(N, step * 1e7):.4f}" if has_loss else missing
            rows.append({"run": run, "step": step, "n_params": N, "train_loss": 3.0, "val_loss": loss})
    return rows


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "None", "-"])
@pytest.mark.parametrize("last_missing", [0, 3])
def test_rows_without_a_loss_are_no_divergence(missing: str, last_missing: int, tmp_path: Path) -> None:
    path = write(tmp_path, make_history(missing, last_missing=last_missing))
    runs, _ = import_runs(path, mapping=HISTORY, constants={"batch_tokens": 1e7})
    assert not runs["diverged"].any()
    assert usable(runs)["D"].tolist() == [2e8, 2e8], "the end of a run is its last row with a loss"
    counts = runs["excluded"].value_counts()
    assert counts["no loss in this row"] == 2 * (16 + last_missing)
    assert counts["not final: a point on the way of its run"] == 6
    assert count_runs(runs) == (2, 0, 2)


@pytest.mark.parametrize("last", ["nan", "inf"])
def test_losses_that_stay_not_finite_are_divergence(last: str, tmp_path: Path) -> None:
    rows = [{"run": "a", "step": s, "n_params": 1e7, "val_loss": 5 - s / 10} for s in range(1, 9)]
    rows += [{"run": "a", "step": s, "n_params": 1e7, "val_loss": last} for s in (9, 10)]
    rows += [{"run": "b", "step": s, "n_params": 1e7, "val_loss": last} for s in (1, 2)]
    runs, _ = import_runs(write(tmp_path, rows), mapping=HISTORY, constants={"batch_tokens": 1e7})
    assert runs.index[runs["diverged"]].tolist() == [9, 11], "the last row of each run"
    assert usable(runs).empty


def test_an_infinite_loss_at_the_end_is_divergence_even_between_evaluations(tmp_path: Path) -> None:
    rows = [*make_history(""), {"run": "r0", "step": 21, "n_params": 3e7, "val_loss": "inf"}]
    runs, _ = import_runs(write(tmp_path, rows), mapping=HISTORY, constants={"batch_tokens": 1e7})
    assert runs["diverged"].sum() == 1
    assert usable(runs)["N"].tolist() == [6e7]


def test_a_point_before_the_first_step_is_kept_and_not_used(tmp_path: Path) -> None:
    rows = [{"iter": i, "val_loss": 11 - i / 500, "params": 6e6} for i in (0, 250, 500, 1000)]
    mapping = {"N": "params", "D": "iter:steps", "loss": "val_loss"}
    runs, _ = import_runs(write(tmp_path, rows), mapping=mapping, constants={"batch_tokens": 16384, "run_id": "small"})
    assert len(runs) == 4
    assert runs["excluded"][0] == "no tokens yet"
    assert usable(runs)["D"].tolist() == [1000 * 16384]
    with pytest.raises(ValueError, match="row 0, column D: needed a positive number, got -16384"):
        import_runs(write(tmp_path, [{**rows[0], "iter": -1}]), mapping=mapping, constants={"batch_tokens": 16384})


def test_a_run_that_never_started_is_not_diverged(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("N,D,lr,batch_tokens,loss\n1e7,1e9,0.1,1e5,3\n2e7,1e9,0.1,1e5,\n,,0.1,1e5,\n3e7,1e9,0.1,1e5,nan\n")
    runs = load_runs(path)
    assert runs["diverged"].tolist() == [False, False, False, True]
    assert runs["excluded"].tolist() == [
        "",
        "no result: no loss",
        "no result: neither a loss nor a size",
        "diverged: no finite loss",
    ]


def test_a_recommendation_counts_runs_without_a_result_apart(tmp_path: Path) -> None:
    rows = [{**row, "batch_tokens": 131072} for row in make_sweep()]
    rows += [
        {"lr": 0.001, "batch_tokens": 131072},
        {"N": 3e7, "D": 6e8, "lr": 0.001, "loss": "nan", "batch_tokens": 1e5},
    ]
    answer = recommend(load_runs(write(tmp_path, rows)), N=1e9, D=2e10, next_run=False)
    assert (answer.provenance["n_without_result"], answer.provenance["n_diverged"]) == (1, 1)
    assert "left out: 1 diverged, 1 without a result" in answer.explain().replace("\n", " ")


def test_a_loss_of_zero_among_others_was_never_measured(tmp_path: Path) -> None:
    path = write(tmp_path, [{"N": 1e7, "D": 1e9, "loss": 3.1}, {"N": 2e7, "D": 1e9, "loss": 0.0}])
    runs = load_runs(path)
    assert runs["excluded"].tolist() == ["", "no result: the loss is 0"]


@pytest.mark.parametrize("name", ["N", "D"])
def test_one_empty_cell_keeps_out_one_run(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = [{"N": 1e7, "D": i * 1e9, "loss": 3.0, "lr": 0.1} for i in (1, 2, 3)]
    rows[1][name] = None
    with caplog.at_level("INFO", logger="muscale"):
        runs = load_runs(write(tmp_path, rows))
    assert usable(runs).index.tolist() == [0, 2]
    what = {"N": "parameters", "D": "tokens"}[name]
    assert f"row 1: no number of {what}, so laws leave them out" in caplog.text
    with pytest.raises(ValueError, match=f"row 0, column {name}: needed a positive number, got an empty cell"):
        load_runs(write(tmp_path, [{**rows[0], name: None}]))


def test_an_empty_learning_rate_is_named_and_its_run_keeps_its_loss(tmp_path: Path) -> None:
    rows = [{"N": 1e7, "D": i * 1e9, "loss": 3.0, "lr": None if i == 2 else 0.1} for i in (1, 2, 3)]
    runs, remarks = import_runs(write(tmp_path, rows))
    assert len(usable(runs)) == 3
    assert math.isnan(runs["lr"][1])
    assert "row 1: no lr, so only the loss law uses this run" in remarks


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("TrialState.PRUNED", "pruned"),
        ("<RunStatus.FAILED: 4>", "failed"),
        ("StatusType.SUCCESS", "success"),
        ("CANCELLED by 1000", "cancelled"),
        ("CANCELLED+", "cancelled"),
        ("OUT_OF_MEMORY", "out_of_memory"),
        ("Early-Stopped", "early_stopped"),
        ("COMPLETED (exit 0)", "completed"),
        ("In Progress", "in_progress"),
        ("Finished!", "finished"),
    ],
)
def test_states_are_read_however_they_are_written(text: str, state: str) -> None:
    assert normalize_state(text) == state


@pytest.mark.parametrize(
    ("good", "bad", "label"),
    [
        ("finished", "crashed", "crashed"),
        ("COMPLETE", "PRUNED", "pruned"),
        ("TrialState.COMPLETE", "TrialState.FAIL", "fail"),
        ("TERMINATED", "ERROR", "error"),
        ("COMPLETED", "TIMEOUT", "timeout"),
        ("CD", "OOM", "out_of_memory"),
        ("FINISHED", "KILLED", "killed"),
        ("Succeeded", "EarlyStopped", "earlystopped"),
        ("1", "2", "pruned"),
        ("3", "5", "killed"),
    ],
)
@pytest.mark.parametrize("column", ["state", "status", "trial_state", "config.run_status"])
def test_the_states_of_other_programs_are_read_and_can_be_turned_off(
    good: str, bad: str, label: str, column: str, tmp_path: Path
) -> None:
    rows = [{"N": 1e7, "D": i * 1e8, "loss": 3.0 - i / 10, column: bad if i in (4, 7) else good} for i in range(1, 10)]
    rows[6]["loss"] = None
    path = write(tmp_path, rows)
    runs, _ = import_runs(path)
    assert len(usable(runs)) == 7
    assert runs["excluded"].value_counts()[f"unfinished ({label})"] == 2
    assert not runs["diverged"].any()
    runs, _ = import_runs(path, mapping={"state": ""})
    assert len(usable(runs)) == 8


def test_a_state_that_is_not_known_is_refused_with_a_way_out(tmp_path: Path) -> None:
    rows = [{"N": 1e7, "D": i * 1e8, "loss": 3.0, "state": s} for i, s in ((1, "finished"), (2, "wibble"))]
    with pytest.raises(ValueError, match=r"row 1, column state: needed the state[\s\S]*--map state=") as error:
        import_runs(write(tmp_path, rows))
    assert "'wibble'" in str(error.value)
    assert len(usable(import_runs(tmp_path / "runs.csv", mapping={"state": ""})[0])) == 2


def test_a_file_is_used_as_its_import_is(tmp_path: Path) -> None:
    """States, points on the way and copies are read alike by every command."""
    rows = [
        {"N": 1e7, "D": i * 1e8, "loss": 3.0 - i / 50, "state": "crashed" if i == 3 else "finished"}
        for i in range(1, 9)
    ]
    path = write(tmp_path, [*rows, rows[0]])
    imported, _ = import_runs(path)
    save_runs(imported, tmp_path / "t.csv")
    pd.testing.assert_frame_equal(load_runs(path), load_runs(tmp_path / "t.csv"))
    assert len(usable(load_runs(path))) == 7


@pytest.mark.parametrize("index", [None, "repeated", "new"])
def test_copies_are_no_evidence(index: str | None, tmp_path: Path) -> None:
    table = pd.DataFrame([{"N": 1e7, "D": i * 1e8, "loss": 3.0 - i / 50, "lr": 0.1} for i in range(1, 9)])
    both = pd.concat([table, table], ignore_index=index == "new")
    both.to_csv(tmp_path / "runs.csv", index=index is not None)
    runs, remarks = import_runs(tmp_path / "runs.csv")
    assert usable(runs).index.tolist() == list(range(8))
    assert runs["excluded"][8:].eq("a copy of another row").all()
    assert any(remark.startswith("8 rows are copies of others") for remark in remarks)


def test_runs_exported_twice_under_new_names_are_copies_and_equal_seeds_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"N": 1e7, "D": i * 1e8, "loss": round(3 + rng.normal(), 4), "run_id": f"a{i}"} for i in range(1, 9)]
    twice = [*rows, *({**row, "run_id": f"b{i}"} for i, row in enumerate(rows))]
    assert len(usable(import_runs(write(tmp_path, twice))[0])) == 8
    seeds = [{"N": 1e7, "D": 1e8, "loss": 3.01, "seed": i} for i in range(4)]
    assert len(usable(import_runs(write(tmp_path, seeds))[0])) == 4
    # One coincidence of two names is none.
    once = [*rows, {**rows[0], "run_id": "b"}]
    assert len(usable(import_runs(write(tmp_path, once))[0])) == 9


def test_a_resumed_run_keeps_the_later_points(tmp_path: Path) -> None:
    steps = (250, 500, 750, 500, 750, 1000)
    rows = [{"run_id": "a", "step": s, "N": 3e7, "loss": 4 - s / 1000 - i / 100} for i, s in enumerate(steps)]
    mapping = {"D": "step:steps"}
    runs, remarks = import_runs(write(tmp_path, rows), mapping=mapping, constants={"batch_tokens": 1e5})
    assert runs["excluded"].str.startswith("superseded").tolist() == [False, True, True, False, False, False]
    assert usable(runs)["D"].tolist() == [1e8]
    assert (
        "1 run was resumed from an earlier point, such as a: of 2 points that stand twice, the later is kept" in remarks
    )


def test_two_runs_of_one_name_are_refused_with_a_way_out(tmp_path: Path) -> None:
    rows = [{"run_id": "a", "D": d, "N": 3e7, "loss": 4 - i / 10} for i, d in enumerate([1e8, 2e8, 1e8, 2e8])]
    path = write(tmp_path, rows)
    with pytest.raises(ValueError, match=r"needed one row per run and number of tokens[\s\S]*--map run_id="):
        import_runs(path)
    assert len(usable(import_runs(path, mapping={"run_id": ""})[0])) == 4


def test_the_learning_rate_of_a_run_is_its_peak(tmp_path: Path) -> None:
    rows = [
        {"run_id": f"r{k}", "D": i * 1e8, "N": 3e7, "loss": 4 - i / 10, "lr": k * 0.01 * f}
        for k in (1, 2)
        for i, f in enumerate((0.1, 1.0, 0.6, 0.05), 1)
    ]
    runs, remarks = import_runs(write(tmp_path, rows))
    assert usable(runs)["lr"].tolist() == [0.01, 0.02]
    assert any(r.startswith("lr changes along 2 runs, such as r1: lr is the highest of each run") for r in remarks)


def test_a_rate_of_zero_at_the_end_of_a_decay_is_no_peak(tmp_path: Path) -> None:
    rows = [{"N": 1e7, "D": i * 1e8, "loss": 3.0 - i / 10, "lr": 0.0} for i in (1, 2, 3)]
    runs, remarks = import_runs(write(tmp_path, rows))
    assert runs["lr"].isna().all()
    assert any(r.startswith("lr is 0 in 3 rows") for r in remarks)


def test_another_column_of_learning_rates_that_differs_is_named(tmp_path: Path) -> None:
    rows = [{"N": 1e7, "D": i * 1e8, "loss": 3.0 - i / 10, "lr": 1e-5, "learning_rate": 1e-3} for i in (1, 2, 3)]
    _, remarks = import_runs(write(tmp_path, rows))
    assert any("lr is lr; learning_rate differs in 3 rows (0.001 instead of 1e-05 in row 0)" in r for r in remarks)
    assert any("--map lr=learning_rate" in r for r in remarks)
    _, remarks = import_runs(tmp_path / "runs.csv", mapping={"lr": "learning_rate"})
    assert (
        "lr is learning_rate; lr is lower (1e-05 instead of 0.001 in row 0), as a rate on the way of a schedule is"
        in (remarks)
    )


def make_sweep() -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [
        {
            "N": N,
            "D": N * r,
            "loss": compute_loss(N, N * r) * math.exp(0.01 * s**2 + rng.normal(0, 0.002)),
            "lr": 0.01 * 2.0**s,
        }
        for N in (3e7, 6e7, 1.2e8, 2.4e8, 4.8e8)
        for r in (20, 80)
        for s in (-1, 0, 1)
    ]


@pytest.mark.parametrize(("name", "factor"), [("N", 1e3), ("N", 1e-3), ("D", 1e3)])
def test_a_size_mistyped_by_a_thousand_is_named_and_left_out(name: str, factor: float, tmp_path: Path) -> None:
    rows = make_sweep()
    for row in rows[12:15]:
        row[name] = float(row[name]) * factor
    runs, remarks = import_runs(write(tmp_path, rows))
    assert runs.index[runs["excluded"].ne("")].tolist() == [12, 13, 14]
    assert set(runs["excluded"][12:15]) == {f"{name} does not fit the other runs"}
    assert any(r.startswith(f"{name} is ") and "in rows 12, 13, 14" in r for r in remarks)


def test_a_large_run_that_fits_the_law_of_the_others_is_used_without_a_word(tmp_path: Path) -> None:
    rows = [*make_sweep(), {"N": 5e10, "D": 1e12, "loss": compute_loss(5e10, 1e12), "lr": 0.01}]
    runs, remarks = import_runs(write(tmp_path, rows))
    assert len(usable(runs)) == len(rows)
    assert remarks == []


def test_a_loss_far_above_similar_runs_is_named_and_used(tmp_path: Path) -> None:
    rows = make_sweep()
    rows[13]["loss"] = float(rows[13]["loss"]) * 1.14
    runs, remarks = import_runs(write(tmp_path, rows))
    assert len(usable(runs)) == len(rows)
    assert len(remarks) == 1
    assert remarks[0].startswith("row 13 (N 120M, D 2.4B): its loss of ")
    assert "% above what similar runs lead to expect" in remarks[0]


def test_a_clean_sweep_and_its_rise_at_the_ends_are_not_remarked_upon(tmp_path: Path) -> None:
    rows = make_sweep()
    # One run at the highest rate of its group rises steeply, as real ones do.
    rows[2]["loss"] *= 1.3
    _, remarks = import_runs(write(tmp_path, rows))
    assert remarks == []


def test_exclusions_are_counted_by_reason(tmp_path: Path) -> None:
    runs, _ = import_runs(write(tmp_path, make_history("")), mapping=HISTORY, constants={"batch_tokens": 1e7})
    assert summarize_exclusions(runs) == [
        "2 of 40 rows are used by laws",
        "32 kept, but excluded: no loss in this row",
        "6 kept, but excluded: not final: a point on the way of its run",
    ]


def make_checkpoints(names: dict[str, float]) -> list[dict[str, Any]]:
    """Return three runs of five checkpoints without names of runs; `names` are columns with their value at the end."""
    rows = []
    for N in (3e7, 6e7, 1.2e8):
        for share in (0.2, 0.4, 0.6, 0.8, 1.0):
            done = {name: (whole if "total" in name else whole * share) for name, whole in names.items()}
            rows.append({"N": N, "D": share * 20 * N, "loss": compute_loss(N, share * 20 * N) + (1 - share), **done})
    return rows


@pytest.mark.parametrize(
    "names",
    [
        {"step_fraction": 1.0},
        {"portion_steps_elapsed": 1.0},
        {"training progress": 1.0},
        {"progress": 1.0},
        {"pct_complete": 100.0},
        {"current_steps": 5000.0, "total_steps": 5000.0},
        {"completed_epochs": 4.0, "total_epochs": 4.0},
    ],
)
def test_a_column_of_progress_says_which_rows_end_a_run(names: dict[str, float], tmp_path: Path) -> None:
    runs, remarks = import_runs(write(tmp_path, make_checkpoints(names)))
    assert usable(runs)["D"].tolist() == [6e8, 1.2e9, 2.4e9]
    assert count_runs(runs)[0] == 3
    assert any(remark.startswith("12 rows are points on the way of a run by ") for remark in remarks)


def test_every_row_is_an_end_if_the_user_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, make_checkpoints({"step_fraction": 1.0}))
    assert len(usable(import_runs(path, constants={"final": "true"})[0])) == 15


@pytest.mark.parametrize(
    "name", ["warmup_fraction", "train_fraction", "fraction", "decay_step_fraction", "pct_code_tokens"]
)
def test_other_shares_say_nothing_of_the_end_of_a_run(name: str, tmp_path: Path) -> None:
    assert len(usable(import_runs(write(tmp_path, make_checkpoints({name: 1.0})))[0])) == 15


def test_a_rate_and_its_maximum_are_no_progress(tmp_path: Path) -> None:
    rows = [row | {"max_lr": 1e-3} for row in make_checkpoints({"current_lr": 1e-3})]
    assert len(usable(import_runs(write(tmp_path, rows))[0])) == 15


def test_no_run_with_all_of_its_work_done_means_no_column_of_progress(tmp_path: Path) -> None:
    assert len(usable(import_runs(write(tmp_path, make_checkpoints({"step_fraction": 0.5})))[0])) == 15


def test_a_run_without_any_loss_is_one_run(tmp_path: Path) -> None:
    rows = make_history("") + [{"run": "r2", "step": s, "n_params": 6e7, "train_loss": 3.0} for s in range(1, 9)]
    runs, _ = import_runs(write(tmp_path, rows), mapping=HISTORY, constants={"batch_tokens": 1e7})
    assert count_runs(runs)[0] == 3
