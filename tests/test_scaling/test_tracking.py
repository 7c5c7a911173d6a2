"""The record: what is logged comes back as it was, from several processes, whatever MLflow does to types."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from scaling import tracking
from scaling.runs import Measurement, check_runs, load_runs, save_runs

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that is made once: a fresh one costs two seconds of migrations."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def log_two_configurations(uri: str, study: str, folder: Path) -> str:
    client = tracking.connect(uri)
    parent = tracking.study_run(client, study, artifacts=folder, params={"seed": 0})
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
        run = tracking.child_run(client, parent, f"config-{config:04d}", role="proxy", params=params)
        with tracking.CurveWriter(client, run) as curve:
            for tokens in (1000, 2000, 3000):
                curve.add(Measurement(tokens, 4.0 - tokens / 1000, lr=lr, train_loss=math.nan))
        rungs = [(0, 3000, 1.5), (1, 9000, 1.25)] if config == 0 else [(0, 3000, math.nan)]
        for rung, tokens, loss in rungs:
            path = None if math.isnan(loss) else folder / f"{config}-{tokens}.pt"
            tracking.log_result(client, run, rung=rung, tokens=tokens, loss=loss, seconds=2.0, checkpoint=path)
        tracking.finish(client, run)
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
    assert tracking.read_curve(tracking.connect(uri), run) == ([1000.0, 2000.0, 3000.0], [3.0, 2.0, 1.0])


def test_notes_are_replaced_not_added(uri: str, tmp_path: Path) -> None:
    client = tracking.connect(uri)
    parent = log_two_configurations(uri, "notes", tmp_path)
    assert tracking.read_note(client, parent, "best") is None
    for value in ({"lr": 0.1}, {"lr": 0.2, "deep": {"list": [1, 2.5]}}):
        tracking.write_note(client, parent, "best", value)
        assert tracking.read_note(client, parent, "best") == value
    with pytest.raises(ValueError, match="8000"):
        tracking.write_note(client, parent, "best", {"x": "y" * 9000})


def test_an_unknown_study_is_refused_with_the_nearest_name(uri: str, tmp_path: Path) -> None:
    log_two_configurations(uri, "quickstart", tmp_path)
    with pytest.raises(ValueError, match=r"no study 'quickstrat'.*quickstart"):
        load_runs("quickstrat", tracking_uri=uri)


@pytest.mark.slow
def test_six_processes_may_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    """Without the lock all six fail."""
    code = "import sys; from scaling import tracking; c = tracking.connect(sys.argv[1]); print(len(c.search_experiments()))"
    command = [sys.executable, "-W", "ignore", "-c", code, f"sqlite:///{tmp_path}/mlflow.db"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    out = [p.communicate() for p in running]
    assert [p.returncode for p in running] == [0] * 6, out[0][1][-2000:]
    assert len({o[0] for o in out}) == 1


def table() -> pd.DataFrame:
    return pd.DataFrame(
        {"N": [1e6, 2e6], "D": [1e7, 1e7], "loss": [3.0, 2.5], "lr": [0.01, 0.02], "batch_tokens": [256, 512]}
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_file_comes_back_as_it_was(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"runs{suffix}"
    save_runs(table(), path)
    runs = load_runs(path)
    pd.testing.assert_frame_equal(runs[list(table())], table().astype(float))
    assert runs["role"].tolist() == ["proxy", "proxy"]


def test_all_mistakes_of_a_table_are_named_at_once() -> None:
    wrong = table().rename(columns={"loss": "losss"}).assign(N=[-1.0, 2e6], lr=["fast", "0.02"])
    with pytest.raises(ValueError, match="cannot be used") as error:
        check_runs(wrong, origin="runs.csv")
    said = str(error.value)
    assert "no column loss (is it losss? rename it)" in said
    assert "row 0, column N: needed a positive number, got -1.0" in said
    assert "row 0, column lr: needed a positive number, got 'fast'" in said


def test_a_missing_loss_is_a_diverged_run_and_a_missing_size_is_a_mistake() -> None:
    runs = check_runs(table().assign(loss=[3.0, math.nan]))
    assert runs["diverged"].tolist() == [False, True]
    with pytest.raises(ValueError, match="row 1, column D"):
        check_runs(table().assign(D=[1e7, math.nan]))


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_runs(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"\.parquet, \.csv or \.jsonl"):
        save_runs(table(), tmp_path / "runs.xlsx")
