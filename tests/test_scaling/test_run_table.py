"""Tables come back bit by bit, every mistake is reported, and unusable rows stay in the table but out of laws."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling.runs.io import load_runs, save_runs
from scaling.runs.table import check_runs, usable


def make_table() -> pd.DataFrame:
    return pd.DataFrame(
        {"N": [1e6, 2e6], "D": [1e7, 1e7], "loss": [3.0, 2.5], "lr": [0.01, 0.02], "batch_tokens": [256, 512]}
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".json"])
def test_a_file_comes_back_as_it_was(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"runs{suffix}"
    save_runs(make_table(), path)
    runs = load_runs(path)
    pd.testing.assert_frame_equal(runs[list(make_table())], make_table().astype(float))
    assert runs["role"].tolist() == ["proxy", "proxy"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".json"])
def test_every_bit_of_a_checked_table_comes_back(suffix: str, tmp_path: Path) -> None:
    r = random.Random(0)
    rows = 50
    runs = check_runs(
        pd.DataFrame(
            {
                "N": [r.lognormvariate(20, 3) for _ in range(rows)],
                "D": [r.lognormvariate(25, 3) for _ in range(rows)],
                "loss": [math.nan if i % 7 == 0 else r.lognormvariate(1, 0.5) for i in range(rows)],
                "lr": [r.lognormvariate(-30, 9) for _ in range(rows)],
                "run_id": [f"{i:05d}" for i in range(rows)],
                "final": [i % 5 > 0 for i in range(rows)],
            }
        )
    )
    path = tmp_path / f"runs{suffix}"
    save_runs(runs, path)
    loaded = load_runs(path)
    for name in ("N", "D", "loss", "lr"):
        assert np.array_equal(loaded[name].to_numpy(), runs[name].to_numpy(), equal_nan=True), name
    for name in ("run_id", "role", "diverged", "final", "excluded"):
        assert loaded[name].tolist() == runs[name].tolist(), name


def test_all_mistakes_of_a_table_are_named_at_once() -> None:
    wrong = (
        make_table().rename(columns={"loss": "losss"}).assign(N=[-1.0, 2e6], lr=["fast", "0.02"], final=[True, "maybe"])
    )
    with pytest.raises(ValueError, match="cannot be used") as error:
        check_runs(wrong, origin="runs.csv")
    message = str(error.value)
    assert "no column loss (is it losss? rename it)" in message
    assert "row 0, column N: needed a positive number, got -1.0" in message
    assert "row 0, column lr: needed a positive number, got 'fast'" in message
    assert "row 1, column final: needed true or false, got 'maybe'" in message


def test_a_missing_loss_is_a_diverged_run_and_a_missing_size_is_a_mistake() -> None:
    runs = check_runs(make_table().assign(loss=[3.0, math.nan]))
    assert runs["diverged"].tolist() == [False, True]
    with pytest.raises(ValueError, match="row 1, column D"):
        check_runs(make_table().assign(D=[1e7, math.nan]))


@pytest.mark.parametrize("value", [math.inf, 0.0, -3.0])
@pytest.mark.parametrize("name", ["N", "D", "lr", "batch_tokens"])
def test_a_size_that_is_not_positive_and_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"row 1, column {name}: needed a positive number"):
        check_runs(make_table().astype(float).assign(**{name: [1.0, value]}))


@pytest.mark.parametrize(
    ("cell", "remedy"),
    [
        ("1,000", "a decimal comma? write 1.000; a thousands separator? write 1000"),
        ("7B", "write 7000000000"),
        ("1,0,0", "got '1,0,0'"),
    ],
)
def test_a_number_that_can_mean_two_things_is_refused_with_row_and_column(cell: str, remedy: str) -> None:
    with pytest.raises(ValueError, match="row 1, column loss: needed a positive number, got") as error:
        check_runs(make_table().assign(loss=["3", cell]))
    assert str(error.value).endswith(remedy)


def test_truth_written_as_text_is_read_as_truth() -> None:
    """In plain Python, `bool("False")` is True."""
    runs = check_runs(make_table().assign(diverged=["False", "true"], final=["1", "no"]))
    assert runs["diverged"].tolist() == [False, True]
    assert runs["final"].tolist() == [True, False]


def test_laws_get_no_excluded_row_and_of_targets_those_from_scratch() -> None:
    runs_of_each_kind = pd.DataFrame(
        {
            "N": 1e6,
            "D": 1e7,
            "loss": [3.0, math.nan, 3.1, 3.2, 3.3, 3.4, 3.5],
            "final": [True, True, False, True, True, True, True],
            "role": ["proxy", "proxy", "proxy", "target", "proxy", "target", "target"],
            "arm": [None, None, None, None, None, "scratch", "warm"],
            "excluded": ["", "", "", "", "a spike in the data", "", ""],
        }
    )
    runs = check_runs(runs_of_each_kind)
    unknown = "target whose start is not recorded"
    assert runs["excluded"].tolist() == ["", "diverged", "not final", unknown, "a spike in the data", "", "warm start"]
    assert usable(runs)["loss"].tolist() == [3.0, 3.4]
    assert len(runs) == 7, "no row is dropped"
    unchecked = runs_of_each_kind.drop(columns="excluded").assign(diverged=runs_of_each_kind["loss"].isna())
    assert usable(unchecked)["loss"].tolist() == [3.0, 3.3, 3.4]
    assert usable(check_runs(runs_of_each_kind.drop(columns="arm")))["loss"].tolist() == [3.0], (
        "without the column `arm`, no target is used"
    )
    assert check_runs(runs)["excluded"].tolist() == runs["excluded"].tolist()
    assert len(usable(make_table())) == 2, "without these columns, all rows are used"


def test_an_excluded_row_may_lack_what_a_used_one_needs() -> None:
    runs = check_runs(make_table().assign(D=[1e7, math.nan], final=[True, False]))
    assert len(usable(runs)) == 1


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_runs(tmp_path / "none.csv")
    (tmp_path / "runs.pt").write_text("N\n1")
    with pytest.raises(ValueError, match=r"runs\.pt cannot be read: these are the weights of a model"):
        load_runs(tmp_path / "runs.pt")
    with pytest.raises(ValueError, match=r"\.jsonl or \.json, got runs\.xlsx"):
        save_runs(make_table(), tmp_path / "runs.xlsx")
    with pytest.raises(ValueError, match="folder that exists"):
        save_runs(make_table(), tmp_path / "nowhere" / "runs.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "N,D,loss\n1,2,3\n1,2,000,3\n", "row 1: needed 3 cells, got 4: a thousands separator"),
        ("a.csv", "N,N,loss\n1,2,3\n", "column N appears twice"),
        ("a.csv", "", "no rows"),
        ("a.jsonl", '{"N": 1}\n{"N": \n[1]\n', r"line 2: not JSON[\s\S]*line 3: needed an object"),
        ("a.json", "3", "needed a list of runs"),
        ("a.json", "[1]", "row 0: needed an object"),
        ("a.jsonl", '{"a.b": 1, "a": {"b": 2}}', "row 0: two values for a.b"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
    ],
)
def test_a_file_that_is_no_table_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_runs(tmp_path / name)


def test_json_lines_may_be_ragged(tmp_path: Path) -> None:
    rows = [{"N": 1e6, "D": 1e7, "loss": 3.0}, {"loss": 2.0, "D": 2e7, "N": 1e6, "lr": 0.1}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    runs = load_runs(tmp_path / "a.jsonl")
    assert runs["D"].tolist() == [1e7, 2e7]
    assert math.isnan(runs["lr"][0])
    assert runs["lr"][1] == 0.1
