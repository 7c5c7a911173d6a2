"""Logs, trainer states, charts, event files and folders of runs become one row per run and step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from scaling.formats.files import read_file
from scaling.formats.histories import merge_steps, name_run
from scaling.formats.raw import RawTable
from scaling.runs.importer import import_runs
from scaling.runs.readers import is_table_file, read_raw

SIZE = {"N": 1e8, "batch_tokens": 1000}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def list_losses(raw: RawTable) -> list[tuple[int, float | None, float | None]]:
    """Return (step, validation loss, training loss) of each row."""

    def read(cell: Any) -> float | None:
        return None if cell is None or cell != cell else float(cell)

    cells = raw.cells.reindex(columns=["step", "val_loss", "train_loss"])
    return [(int(s), read(v), read(t)) for s, v, t in cells.itertuples(index=False)]


LOGS: dict[str, tuple[str, list[tuple[int, float | None, float | None]]]] = {
    "llm.c": (
        "s:0 tel:11.0\ns:0 trl:11.1 lr:0.000001 norm:15.3\ns:250 eval:0.28\n"
        "s:1000 trl:4.1 lr:0.0006\ns:1000 tel:4.05\n",
        [(0, 11.0, 11.1), (1000, 4.05, 4.1)],
    ),
    "nanoGPT": (
        "step 0: train loss 10.9, val loss 10.95\niter 0: loss 10.9, time 41s, mfu -100.00%\n"
        "step 500: train loss 3.5, val loss 3.52\niter 500: loss 3.4000, time 250.11ms, mfu 30.1%\n",
        [(0, 10.95, 10.9), (500, 3.52, 3.5), (500, None, 3.4)],
    ),
    "modded-nanogpt": (
        "import torch\nprint('step:5 of', 3)\nstep:0/1530 val_loss:10.8258 train_time:0ms step_avg:nanms\n"
        "step:1/1530 train_time:100ms step_avg:99.01ms\nstep:1530/1530 val_loss:3.2790 train_time:151ms\n",
        [(0, 10.8258, None), (1530, 3.279, None)],
    ),
    "nanochat": (
        "step 00100/21400 (0.47%) | loss: 5.300000 | lrm: 1.00 | dt: 500.00ms | tok/sec: 1,000,000 | mfu: 48.00\n"
        "step 00200/21400 (0.93%) | loss: 4.900000 | lrm: 1.00 | dt: 500.00ms | tok/sec: 1,000,000 | mfu: 48.00\n",
        [(100, None, 5.3), (200, None, 4.9)],
    ),
    "torchtitan": (
        "[titan] 10:00:00,123 - root - INFO - \x1b[31mstep: 10  \x1b[32mloss:  4.1234  \x1b[33mgrad_norm: 1.2\n"
        "[titan] 10:00:01,001 - root - INFO - validate step: 10  loss:  4.2 memory:  1.2GiB\n",
        [(10, 4.2, 4.1234)],
    ),
    "Megatron-LM": (
        " iteration      100/  500000 | consumed samples:        25600 | elapsed time (ms): 500.1 | learning"
        " rate: 1.5E-04 | global batch size:   256 | lm loss: 6.5E+00 | grad norm: 1.100 |\n"
        " validation loss at iteration 100 | lm loss value: 6.4E+00 | lm loss PPL: 6.018450E+02 | \n",
        [(100, 6.4, 6.5)],
    ),
    "llama2.c": (
        "500 | loss 3.1 | lr 1e-4 | 200.00ms | mfu 1.00%\nstep 1000: train loss 2.9, val loss 3.0\n",
        [(500, None, 3.1), (1000, 3.0, 2.9)],
    ),
    "plain": ("Step 1,000 | Validation loss: 3.25\nStep 2,000 | Validation loss: nan\n", [(1000, 3.25, None)]),
}


@pytest.mark.parametrize("program", LOGS)
def test_the_log_of_a_training_program_is_read_by_step(program: str, tmp_path: Path) -> None:
    text, expected = LOGS[program]
    raw = read_file(write(tmp_path / "small-1" / "main.log", "starting\n\n" + text))
    read = list_losses(raw)
    assert read[: len(expected)] == expected
    assert raw.cells["run_id"].unique().tolist() == ["small-1"]
    assert raw.mapping["D"] == "step:steps"
    assert raw.mapping.get("loss") == ("val_loss" if any(v for _, v, _ in expected) else None)
    if program == "plain":
        assert len(read) == 2
        assert math.isnan(float(raw.cells["val_loss"][1])), "a loss that is not finite is an outcome"
        assert raw.cells["val_loss"][1] == "nan"


def test_a_log_gives_its_other_values_by_name(tmp_path: Path) -> None:
    raw = read_file(write(tmp_path / "a.log", LOGS["llm.c"][0]))
    assert raw.cells.columns.tolist() == ["run_id", "step", "val_loss", "lr", "norm", "train_loss"]
    raw = read_file(write(tmp_path / "a.log", LOGS["Megatron-LM"][0]))
    assert raw.cells["global_batch_size"].tolist() == ["256"]
    assert raw.cells["learning_rate"].tolist() == ["1.5E-04"]
    text = "tokens per iteration will be: 491,520\nnumber of parameters: 123.59M\n" + LOGS["nanoGPT"][0]
    runs, remarks = import_runs(write(tmp_path / "a.log", text.replace("0:", "1:")), mapping={"N": "n_params"})
    assert runs["batch_tokens"].unique().tolist() == [491520]
    assert runs["N"].unique().tolist() == [123.59e6]
    assert "n_params is the number of parameters in the log, 123.59M; it does not say which" in remarks


def test_a_log_is_imported_with_what_it_lacks(tmp_path: Path) -> None:
    path = write(tmp_path / "main.log", "s:500 tel:5.0\n" + LOGS["llm.c"][0].split("\n", 2)[2])
    runs, remarks = import_runs(path, constants=SIZE)
    assert runs[runs["excluded"].eq("")][["D", "loss"]].to_numpy().tolist() == [[1e6, 4.05]]
    assert remarks[:2] == [
        "main.log is read as a log: 3 of 4 lines name a step and a loss",
        "val_loss at 2 steps, train_loss at 1 step",
    ]
    with pytest.raises(ValueError, match=r"no column N[\s\S]*--set N=NUMBER and --set batch_tokens=NUMBER"):
        import_runs(path)


def test_rows_of_one_step_are_joined_and_a_resumed_run_is_not() -> None:
    rows = [{"step": 1, "a": 1}, {"step": 1, "b": 2}, {"step": 2, "a": 3}, {"step": 1, "a": 1}, {"step": 1, "a": 4}]
    joined = [{"step": 1, "a": 1, "b": 2}, {"step": 2, "a": 3}, {"step": 1, "a": 1}, {"step": 1, "a": 4}]
    assert merge_steps(rows, "step") == joined
    assert merge_steps([{"a": 1}, {"b": 2}], "step") == [{"a": 1}, {"b": 2}]


HISTORY = [
    {"epoch": 0.1, "learning_rate": 1e-3, "loss": 4.1, "step": 100},
    {"epoch": 1.0, "learning_rate": 1e-4, "loss": 3.4, "step": 1000},
    {"epoch": 1.0, "eval_loss": 3.3, "eval_runtime": 2.0, "step": 1000},
    {"epoch": 1.0, "train_loss": 3.9, "train_runtime": 9.0, "step": 1000},
]


def test_a_trainer_state_is_read_with_the_loss_of_its_evaluations(tmp_path: Path) -> None:
    state = json.dumps({"global_step": 1000, "log_history": HISTORY}, indent=1)
    path = write(tmp_path / "tiny" / "checkpoint-1000" / "trainer_state.json", state)
    raw = read_file(path)
    assert raw.cells["run_id"].tolist() == ["tiny", "tiny"]
    assert raw.cells["train_loss"].tolist() == [4.1, 3.4], "the mean of the summary is no training loss"
    runs, _ = import_runs(path, constants=SIZE)
    used = runs[runs["excluded"].eq("")]
    assert used[["D", "loss", "lr"]].to_numpy().tolist() == [[1e6, 3.3, 1e-3]]
    seen = [row | {"num_input_tokens_seen": row["step"] * 7} for row in HISTORY]
    path.write_text(json.dumps({"log_history": seen}))
    assert import_runs(path, constants={"N": 1e8})[0]["D"].tolist() == [700, 7000]
    path.write_text('{"log_history": []}')
    with pytest.raises(ValueError, match="no rows"):
        import_runs(path)
    path.write_text('{"log_history": [3]}')
    with pytest.raises(ValueError, match="log_history, entry 0: needed an object"):
        import_runs(path)


CHART = """"Step","small-1 - val/loss","small-1 - val/loss__MIN","small-1 - val/loss__MAX","big - 2 - val/loss"
"100","10.9","10.9","10.9","10.8"
"1000","4.1","4.1","4.1","3.8"
"2000","","","","3.4"
"""


def test_a_chart_of_wandb_is_one_row_per_run_and_step(tmp_path: Path) -> None:
    runs, remarks = import_runs(write(tmp_path / "chart.csv", CHART), constants=SIZE)
    assert runs[["run_id", "D", "loss"]].to_numpy().tolist() == [
        ["small-1", 1e5, 10.9],
        ["small-1", 1e6, 4.1],
        ["big - 2", 1e5, 10.8],
        ["big - 2", 1e6, 3.8],
        ["big - 2", 2e6, 3.4],
    ]
    assert runs["final"].tolist() == [False, True, False, False, True]
    assert "the file is a chart of Weights & Biases: 2 runs, read with one row per Step of val/loss" in remarks
    with pytest.raises(
        ValueError, match=r'no column N[\s\S]*--set N=NUMBER. Several sizes: add a column "small-1 - N"'
    ):
        import_runs(tmp_path / "chart.csv", constants={"batch_tokens": 1000})


def test_the_remedy_for_a_chart_of_several_sizes_works(tmp_path: Path) -> None:
    lines = CHART.splitlines()
    text = "\n".join([lines[0] + ',"small-1 - N","big - 2 - N"', *(f"{line},1e8,2e8" for line in lines[1:])])
    runs, _ = import_runs(write(tmp_path / "chart.csv", text), constants={"batch_tokens": 1000})
    final = runs[runs["final"]]
    assert final[["run_id", "N"]].to_numpy().tolist() == [["small-1", 1e8], ["big - 2", 2e8]]


def test_a_chart_says_when_its_values_are_means(tmp_path: Path) -> None:
    chart = '"trainer/global_step","a - eval/loss","a - eval/loss__MIN","a - eval/loss__MAX"\n10,3.1,3.0,3.2\n'
    raw = read_file(write(tmp_path / "a.csv", chart))
    assert raw.remarks[-1] == "its values are means over several steps or runs (__MIN and __MAX differ from them)"
    assert raw.mapping == {"run_id": "run_id", "D": "trainer/global_step:steps", "loss": "eval/loss"}
    raw = read_file(write(tmp_path / "a.csv", chart.replace("eval/loss", "train/loss")))
    assert "loss" not in raw.mapping, "a training loss is not taken unasked"


def test_a_table_with_dashes_in_its_names_is_no_chart(tmp_path: Path) -> None:
    raw = read_file(write(tmp_path / "a.csv", "run,N - total,D - tokens,loss\na,1,2,3\n"))
    assert raw.cells.columns.tolist() == ["run", "N - total", "D - tokens", "loss"]


@pytest.mark.parametrize("name", ["run-exp1-tag-val_loss.csv", "run-exp1-tag-val_loss.json"])
def test_a_curve_of_tensorboard_is_read_with_the_name_of_its_run(name: str, tmp_path: Path) -> None:
    rows = [[1.7e9, 100, 4.1], [1.7e9, 200, 3.9]]
    text = (
        json.dumps(rows)
        if name.endswith("json")
        else "\n".join(["Wall time,Step,Value", *(f"{a},{b},{c}" for a, b, c in rows)])
    )
    runs, _ = import_runs(write(tmp_path / name, text), constants=SIZE)
    assert runs[["run_id", "D", "loss"]].to_numpy().tolist() == [["exp1", 1e5, 4.1], ["exp1", 2e5, 3.9]]


def write_events(folder: Path, points: list[tuple[str, int, float]], *, as_tensors: bool = False) -> None:
    import numpy as np
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util import tensor_util

    writer = EventFileWriter(str(folder))
    for tag, step, number in points:
        value = (
            {"tensor": tensor_util.make_tensor_proto(np.float32(number))} if as_tensors else {"simple_value": number}
        )
        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, **value)])
        writer.add_event(event_pb2.Event(wall_time=1.7e9 + step, step=step, summary=summary))
    writer.close()


@pytest.mark.parametrize("as_tensors", [False, True])
def test_event_files_are_read_one_by_one_and_as_folders(as_tensors: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    points = [("train/loss", 10, 4.5), ("val/loss", 10, 4.0), ("train/loss", 20, 3.5), ("val/loss", 20, math.nan)]
    for name in ("a", "b"):
        write_events(tmp_path / "logs" / name, points, as_tensors=as_tensors)
    (file,) = (tmp_path / "logs" / "a").iterdir()
    for source, names in ((tmp_path / "logs", ["a", "a", "b", "b"]), (file, ["a", "a"]), (file.parent, ["a", "a"])):
        runs, _ = import_runs(source, constants=SIZE)
        assert runs["run_id"].tolist() == names
        assert runs["D"].tolist()[:2] == [1e4, 2e4]
        assert runs["loss"].tolist()[0] == 4.0
        assert runs["diverged"].tolist()[:2] == [False, True]
    file.write_bytes(b"hello")
    with pytest.raises(ValueError, match="no rows"):
        import_runs(file)


def test_each_file_of_a_folder_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, loss in enumerate((3.1, 2.95)):
        write(tmp_path / "runs" / f"run{i}.json", json.dumps({"N": 1e8 * (i + 1), "D": 2e9, "loss": loss}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for source in ("runs", "./runs", "runs/", tmp_path / "runs"):
        assert is_table_file(source)
        runs, remarks = import_runs(source)
        assert runs[["run_id", "N", "loss"]].to_numpy().tolist() == [["run0", 1e8, 3.1], ["run1", 2e8, 2.95]]
        assert remarks[0].endswith("runs is a folder: 2 runs with the name of the file or folder as run_id")
    assert import_runs("runs/run0.json")[0]["loss"].tolist() == [3.1]
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_name_is_an_experiment_before_it_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scaling.tracking.client import connect

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connect().create_experiment("first")
    for name in ("first", "second"):
        write(tmp_path / name / "a.json", '{"N": 1, "D": 1, "loss": 1}')
    (tmp_path / "third").mkdir()
    assert [is_table_file(name) for name in ("first", "./first", "second", "third")] == [False, True, True, False]


def test_histories_and_tables_of_runs_are_told_apart(tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / "a" / f"small-{i}.csv", "step,val_loss,lr\n10,4,.1\n20,3.5,.1\n")
        write(tmp_path / "b" / f"sweep-{i}.csv", f"N,D,loss\n1e6,2e7,4.{i}\n2e6,2e7,3.5\n1e6,4e7,3.7\n")
    runs, _ = import_runs(tmp_path / "a", mapping={"D": "step:steps", "loss": "val_loss"}, constants=SIZE)
    assert runs["run_id"].tolist() == ["small-0", "small-0", "small-1", "small-1"]
    assert runs["final"].tolist() == [False, True, False, True]
    runs, remarks = import_runs(tmp_path / "b")
    assert runs["final"].all()
    assert remarks[0].endswith("is a folder: 2 tables of runs")


def test_settings_beside_results_are_read_with_them(tmp_path: Path) -> None:
    for i in range(2):
        trial = tmp_path / "ray" / f"train_{i}"
        write(trial / "params.json", json.dumps({"lr": 0.001 * (i + 1), "model": {"N": 1e8}}))
        rows = [{"loss": 4.0 - k, "training_iteration": k, "trial_id": f"x{i}"} for k in (1, 2)]
        write(trial / "result.json", "\n".join(map(json.dumps, rows)))
        write(trial / "progress.csv", "loss,training_iteration,trial_id\n9,1,x\n")
        version = tmp_path / "lightning" / f"version_{i}"
        write(version / "metrics.csv", "epoch,step,train_loss,val_loss\n0,10,4.1,\n0,19,,3.9\n1,39,,3.2\n")
        write(version / "hparams.yaml", f"lr: {0.001 * (i + 1)}\nn_params: 1000000\n")
        local = tmp_path / "wandb" / f"run-{i}" / "files"
        write(
            local / "config.yaml",
            f"lr:\n  value: {0.001 * (i + 1)}\nn_params:\n  value: 1000000\n_wandb:\n  value: 3\n",
        )
        write(local / "wandb-summary.json", json.dumps({"val/loss": 3.2, "tokens": 2e6}))
        write(local / "output.log", "hello\n")
    write(tmp_path / "ray" / "experiment_state-1.json", "{}")
    batch = {"batch_tokens": 1000}
    mapping = {"N": "config.model.N", "D": "training_iteration:steps", "lr": "config.lr"}
    runs, _ = import_runs(tmp_path / "ray", mapping=mapping, constants=batch)
    used = runs[runs["excluded"].eq("")]
    assert used[["run_id", "lr", "D", "loss"]].to_numpy().tolist() == [
        ["train_0", 0.001, 2e3, 2],
        ["train_1", 0.002, 2e3, 2],
    ]
    mapping = {"N": "n_params", "D": "step:steps", "lr": "config.lr", "loss": "val_loss"}
    runs, _ = import_runs(tmp_path / "lightning", mapping=mapping, constants=batch)
    used = runs[runs["excluded"].eq("")]
    assert used[["run_id", "lr", "loss"]].to_numpy().tolist() == [["version_0", 0.001, 3.2], ["version_1", 0.002, 3.2]]
    mapping = {"N": "n_params", "D": "tokens", "lr": "config.lr", "loss": "val/loss"}
    runs, remarks = import_runs(tmp_path / "wandb", mapping=mapping)
    assert runs[["run_id", "lr", "loss"]].to_numpy().tolist() == [["run-0", 0.001, 3.2], ["run-1", 0.002, 3.2]]
    assert "not read: run-0/files/output.log, run-1/files/output.log" in remarks


def test_the_last_checkpoint_holds_the_history_of_a_run(tmp_path: Path) -> None:
    for step in (500, 1000):
        history = [row for row in HISTORY if row["step"] <= step]
        write(tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json", json.dumps({"log_history": history}))
    raw = read_raw(tmp_path / "out")
    assert raw.cells["step"].tolist() == [100, 1000]
    assert raw.cells["run_id"].unique().tolist() == ["out"]
    assert "not read: checkpoint-500/trainer_state.json" in raw.remarks


def test_a_folder_with_damaged_files_is_refused_and_notes_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.json", '{"N": 1e8, "D": 1e9, "loss": 3}')
    write(tmp_path / "b.csv", "N,D,loss\n")
    write(tmp_path / "notes.txt", "hello")
    write(tmp_path / "readme.md", "hello")
    runs, remarks = import_runs(tmp_path)
    assert runs["run_id"].tolist() == ["a"]
    assert "not read: b.csv, notes.txt" in remarks
    write(tmp_path / "c.json", "{broken")
    write(tmp_path / "d.csv", "N,N\n1,2\n")
    with pytest.raises(ValueError, match=r"c\.json cannot be read as JSON[\s\S]*column N appears twice"):
        import_runs(tmp_path)
    write(tmp_path / "empty" / "notes.txt", "hello")
    with pytest.raises(ValueError, match="no file in it holds runs"):
        import_runs(tmp_path / "empty")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/small/main.log", "small"),
        ("/x/small/checkpoint-10/trainer_state.json", "small"),
        ("/x/exp/version_0/metrics.csv", "exp"),
        ("/x/exp/lr-0.1.log", "lr-0.1"),
        ("/x/exp/run7.csv.gz", "run7"),
    ],
)
def test_a_run_is_named_by_its_file_or_the_nearest_folder(path: str, name: str) -> None:
    assert name_run(Path(path)) == name


def write_json(path: Path, document: Any) -> Path:
    return write(path, json.dumps(document))


PAIRS = {"train_loss": [[100, 5.0], [200, 4.5], [300, 4.2]], "eval_loss": [[100, 5.1], [300, 4.3]]}
SERIES = {"steps": [100, 200, 300], "train_losses": [5.0, 4.5, 4.2], "val_losses": [5.1, 4.6, 4.3]}


@pytest.mark.parametrize("curves", [PAIRS, SERIES])
def test_lists_of_losses_by_step_are_the_history_of_a_run(curves: dict[str, Any], tmp_path: Path) -> None:
    path = write_json(tmp_path / "run.json", {"config": {"n_params": 1e7, "batch_size": 32}, **curves})
    runs, remarks = import_runs(path, constants={"seq_len": 1024}, guess=True)
    assert "the losses are lists by step, read with one row per step" in remarks
    end = runs[runs["excluded"].eq("")]
    assert end[["N", "D", "loss"]].to_numpy().tolist() == [[1e7, 300 * 32 * 1024, 4.3]]


def test_several_runs_with_lists_of_losses_each_end_once(tmp_path: Path) -> None:
    runs = [{"n_params": N, "val_loss": [[100, 5.0], [200, loss]]} for N, loss in ((1e7, 4.0), (2e7, 3.5))]
    table, _ = import_runs(write_json(tmp_path / "runs.json", runs), constants={"batch_tokens": 1000}, guess=True)
    assert table[table["excluded"].eq("")][["N", "D", "loss"]].to_numpy().tolist() == [[1e7, 2e5, 4.0], [2e7, 2e5, 3.5]]


def test_losses_per_epoch_are_read_at_their_end_and_a_final_loss_is_kept(tmp_path: Path) -> None:
    run = {"num_params": 1e7, "train_losses": [4.0, 3.6], "val_losses": [4.1, 3.8], "best_val_loss": 3.7}
    per_epoch, remarks = import_runs(write_json(tmp_path / "epochs.json", run), constants={"D": 1e9}, guess=True)
    assert per_epoch["loss"].tolist() == [3.8]
    assert "the losses are lists without steps, read at their ends" in remarks
    final = write_json(tmp_path / "final.json", {**run, "final_val_loss": 3.9})
    assert import_runs(final, constants={"D": 1e9}, guess=True)[0]["loss"].tolist() == [3.9]


def test_a_log_may_name_both_losses_without_the_word(tmp_path: Path) -> None:
    text = "step 0: train 4.8350, val 4.9583\nstep 0 | loss 4.9710\nstep 500: train 2.1, val 2.3\nstep 510 | loss 2.2\n"
    raw = read_file(write(tmp_path / "run-a.txt", text))
    losses = {step: val for step, val, _ in list_losses(raw) if val is not None}
    assert losses == {0: 4.9583, 500: 2.3}


def test_predictions_in_a_trainer_state_are_no_runs(tmp_path: Path) -> None:
    history = [
        {"step": 10, "loss": 3.0, "learning_rate": 1e-4},
        {"step": 10, "eval_loss": 3.1},
        {"epoch": 1.0, "predict_loss": 3.2, "predict_runtime": 5.0},
    ]
    path = write_json(tmp_path / "trainer_state.json", {"log_history": history})
    cells = read_file(path).cells
    assert cells[["step", "eval_loss", "train_loss"]].to_numpy().tolist() == [[10, 3.1, 3.0]]
