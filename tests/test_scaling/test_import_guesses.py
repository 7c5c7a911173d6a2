"""What `scaling import FILE` proposes for tables of other programs: it is right, it can be run, and it says why."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from scaling.__main__ import app
from scaling.runs.importer import import_runs, propose_import
from scaling.runs.io import load_runs
from scaling.runs.table import usable
from scaling.runs.vocabulary import COLUMN_NAMES, rank_column, read_names
from scaling.tracking.client import connect

SIZES = (2e7, 4e7, 8e7, 1.6e8)
RATIOS = (10, 20, 40)


def compute_loss(N: float, D: float) -> float:
    return float(1.69 + 406 / N**0.34 + 411 / D**0.28)


def make_runs() -> list[tuple[float, float, float]]:
    """Return (N, D, loss) of the runs that each table below holds. D is a whole number of steps of 2**16 tokens."""
    runs = []
    for N in SIZES:
        for ratio in RATIOS:
            D = round(N * ratio / 2**16) * 2.0**16
            runs.append((N, D, compute_loss(N, D)))
    return runs


def make_hugging_face() -> list[dict[str, Any]]:
    return [
        {
            "Name": f"gpt-{i}",
            "State": "finished",
            "Runtime": 3600,
            "block_size": 1024,
            "per_device_train_batch_size": 8,
            "train_batch_size": 64,
            "learning_rate": 0.002,
            "model/num_parameters": N,
            "warmup_steps": 100,
            "eval/loss": loss,
            "train/global_step": D / 2**16,
            "train/learning_rate": 0,
            "train/loss": loss + 0.1,
            "total_flos": 6 * N * D,
        }
        for i, (N, D, loss) in enumerate(make_runs())
    ]


def make_marin() -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{i}",
            "name": f"isoflop-{N:.0e}",
            "state": "finished",
            "config": {
                "optimizer": {"learning_rate": 0.003, "min_lr_ratio": 0.1},
                "trainer": {"train_batch_size": 16, "num_train_steps": D / 2**16},
                "model": {"seq_len": 4096, "hidden_dim": 512},
            },
            "summary": {
                "_step": D / 2**16 - 1,
                "eval/paloma/c4_en/loss": loss + 0.2,
                "eval/loss": loss,
                "eval/bpb": loss / math.log(2) / 4.2,
                "train/loss": loss + 0.1,
                "throughput/total_tokens": D,
                "throughput/tokens_per_second": 1e6,
                "parameter_count": N,
                "optim/learning_rate": 0.0003,
            },
        }
        for i, (N, D, loss) in enumerate(make_runs())
    ]


def make_optuna() -> list[dict[str, Any]]:
    return [
        {
            "number": i,
            "value": loss,
            "params_lr": 0.001,
            "user_attrs_n_params": N,
            "user_attrs_tokens_seen": D,
            "user_attrs_batch_tokens": 65536,
            "state": "TrialState.COMPLETE",
        }
        for i, (N, D, loss) in enumerate(make_runs())
    ]


def make_ray() -> list[dict[str, Any]]:
    return [
        {
            "eval_loss": loss,
            "training_iteration": 10,
            "done": True,
            "trial_id": f"a{i}",
            "timestamp": 1735725600 + i,
            "status": "TERMINATED",
            "config/n_params": N,
            "config/train_tokens": D,
            "config/lr": 0.002,
            "config/batch_size": 32,
            "config/seq_len": 2048,
        }
        for i, (N, D, loss) in enumerate(make_runs())
    ]


def make_megatron() -> list[dict[str, Any]]:
    """Return the log of each run at eighths of its length; only the last point is its end."""
    return [
        {
            "experiment": f"gpt-{i}",
            "iteration": round(D / 2**16) * k // 8,
            "consumed_samples": round(D / 2**16) * k // 8 * 32,
            "global_batch_size": 32,
            "seq_length": 2048,
            "learning_rate": 0.003 * (1 - 0.9 * (k - 1) / 8),
            "lm loss": loss + 1.1 - k / 8,
            "lm loss validation": loss + 1 - k / 8,
            "grad norm": 0.3,
            "loss scale": 1.0,
            "num_parameters_M": N / 1e6,
        }
        for i, (N, D, loss) in enumerate(make_runs())
        for k in range(1, 9)
    ]


def make_readme() -> list[dict[str, Any]]:
    """Return a table as people type it: one model has several runs."""
    return [
        {
            "Model": f"{N / 1e6:.0f}M",
            "Params (M)": N / 1e6,
            "Tokens (B)": D / 1e9,
            "Val PPL": math.exp(loss),
            "LR": 0.002,
            "Batch (tokens)": "0.5M",
        }
        for N, D, loss in make_runs()
    ]


def make_olmo() -> list[dict[str, Any]]:
    return [
        {
            "run": f"ladder-{i}",
            "train/CrossEntropyLoss": loss + 0.1,
            "eval/c4_en-validation/CrossEntropyLoss": loss,
            "eval/c4_en-validation/Perplexity": math.exp(loss),
            "throughput/total_tokens": D,
            "throughput/device/tokens_per_second": 1e5,
            "model.non_embedding_params": N,
            "optim/learning_rate_group0": 0.0001,
            "optimizer.learning_rate": 0.002,
            "global_train_batch_size": 512,
            "model.max_sequence_length": 2048,
        }
        for i, (N, D, loss) in enumerate(make_runs())
    ]


def make_digitised() -> list[dict[str, Any]]:
    return [{"Model Size": N, "Training FLOP": 6 * N * D, "loss": loss} for N, D, loss in make_runs()]


def make_porian() -> list[dict[str, Any]]:
    return [
        {
            "params": N,
            "width": 512,
            "seq_len": 2048,
            "bs": 256,
            "lr": 0.003,
            "train/loss": 9,
            "val/loss": loss,
            "tokens": D,
            "flops": 6 * N * D,
        }
        for N, D, loss in make_runs()
    ]


def make_gemstones() -> list[dict[str, Any]]:
    """Return the points of each run; every second one has a validation loss."""
    return [
        {
            "params": N * 1.2,
            "params_active_precise": N,
            "run_name": f"w{i}",
            "step": k,
            "tokens": D * k / 10,
            "smooth_loss": loss + 2 - k / 10,
            "val_loss": loss + 1 - k / 10 if k % 2 == 0 else None,
            "lr_base": 0.002,
            "lr": 0.002 if k < 9 else 0.0005,
        }
        for i, (N, D, loss) in enumerate(make_runs())
        for k in range(1, 11)
    ]


def make_torchtitan() -> list[dict[str, Any]]:
    return [
        {
            "job": {"dump_folder": "x"},
            "model": {"num_params": N, "n_layers": 4},
            "optimizer": {"name": "AdamW", "lr": 0.0008, "eps": 1e-8},
            "lr_scheduler": {"warmup_steps": 200, "min_lr_factor": 0.1},
            "training": {"global_batch_size": 32, "seq_len": 2048, "steps": D / 2**16},
            "validation_metrics/loss": loss,
            "loss_metrics/global_avg_loss": loss + 0.1,
        }
        for N, D, loss in make_runs()
    ]


def make_neptune() -> list[dict[str, Any]]:
    """Return names that no known program has."""
    return [
        {
            "model.paramsNonEmbedding": N,
            "data.trainTokens": D,
            "scores.heldout.ceLoss": loss,
            "opt.peakLearningRate": 0.001,
            "note": "x",
        }
        for N, D, loss in make_runs()
    ]


TABLES = {
    "hugging face in w&b": (make_hugging_face, 0.002, 65536),
    "marin": (make_marin, 0.003, 65536),
    "optuna": (make_optuna, 0.001, 65536),
    "ray": (make_ray, 0.002, 65536),
    "megatron": (make_megatron, 0.003, 65536),
    "readme": (make_readme, 0.002, 5e5),
    "olmo": (make_olmo, 0.002, 512 * 2048),
    "digitised": (make_digitised, None, None),
    "porian": (make_porian, 0.003, 256 * 2048),
    "gemstones": (make_gemstones, 0.002, None),
    "torchtitan": (make_torchtitan, 0.0008, 65536),
    "unknown names": (make_neptune, 0.001, None),
}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as CSV, or as JSON lines if they are nested."""
    if any(isinstance(v, dict) for v in rows[0].values()):
        path = folder / "export.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        path = folder / "export.csv"
        pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", TABLES)
def test_the_proposed_command_reads_tables_of_other_programs_right(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, lr, batch = TABLES[name]
    path = write(tmp_path, make())
    monkeypatch.chdir(tmp_path)
    looked = CliRunner().invoke(app, ["import", path.name])
    assert looked.exit_code == 0, looked.output
    command = shlex.split(looked.stdout.splitlines()[-1])
    assert command[:2] == ["scaling", "import"]
    assert list(tmp_path.iterdir()) == [path], "looking writes nothing"
    done = CliRunner().invoke(app, command[1:])
    assert done.exit_code == 0, done.output
    used = usable(load_runs(tmp_path / "export.runs.csv"))
    assert len(used) == len(make_runs())
    for column, expected in zip(("N", "D", "loss"), np.transpose(make_runs()), strict=True):
        assert sorted(used[column]) == pytest.approx(sorted(expected), rel=1e-6), column
    for column, value in (("lr", lr), ("batch_tokens", batch)):
        assert used[column].tolist() == [value] * len(used) if value else column not in used, column
    guessed = CliRunner().invoke(app, ["import", path.name, "--guess", "--out", "b.csv"])
    assert guessed.exit_code == 0, guessed.output
    pd.testing.assert_frame_equal(load_runs(tmp_path / "b.csv"), load_runs(tmp_path / "export.runs.csv"))


@pytest.mark.parametrize("command", [["fit"], ["recommend", "--params", "1B", "--tokens", "20B"], ["report"]])
def test_commands_on_a_raw_file_end_with_the_command_that_reads_it(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, make_hugging_face())
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, [command[0], path.name, *command[1:]])
    assert refused.exit_code == 2
    last = refused.stderr.splitlines()[-1].strip()
    assert last.startswith("this reads it: scaling import export.csv --out export.runs.csv --map ")
    assert CliRunner().invoke(app, shlex.split(last.split("scaling ", 1)[1])).exit_code == 0
    assert len(usable(load_runs("export.runs.csv"))) == 12


def test_numbers_that_the_file_lacks_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "log.csv"
    path.write_text(
        "step,train_loss,val_loss,lr\n" + "".join(f"{s},4,{4 - s / 500},0.001\n" for s in (0, 100, 200, 300))
    )
    looked = CliRunner().invoke(app, ["import", "log.csv"])
    assert looked.exit_code == 0
    assert "Fill in N, batch_tokens, then:" in looked.stdout
    assert "N is not in the source: give the parameters of the model, such as 124M" in looked.stdout
    assert looked.stdout.splitlines()[-1].endswith("--set run_id=log --set N=NUMBER --set batch_tokens=NUMBER")
    refused = CliRunner().invoke(app, ["import", "log.csv", "--guess"])
    assert refused.exit_code == 2
    assert "N is not in the source: --set N=NUMBER" in refused.stderr
    done = CliRunner().invoke(app, ["import", "log.csv", "--guess", "--set", "N=124M", "--set", "batch_tokens=0.5M"])
    assert done.exit_code == 0, done.output
    used = usable(load_runs("log.runs.csv"))
    assert used[["N", "D"]].to_numpy().tolist() == [[124e6, 1.5e8]], "only the end of the one run"


def test_bits_per_byte_ask_for_the_bytes_per_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"params": N, "tokens": D, "val_bpb": loss / math.log(2) / 4.2} for N, D, loss in make_runs()]
    path = write(tmp_path, rows)
    command = CliRunner().invoke(app, ["import", path.name]).stdout.splitlines()[-1]
    assert command.endswith("--map loss=val_bpb:bits-per-byte --set bytes_per_token=NUMBER")
    runs, _ = import_runs(path, guess=True, constants={"bytes_per_token": 4.2})
    assert runs["loss"].tolist() == pytest.approx([loss for _, _, loss in make_runs()])
    runs, _ = import_runs(write(tmp_path, [{**row, "bytes_per_token": 4.2} for row in rows]), guess=True)
    assert runs["loss"].tolist() == pytest.approx([loss for _, _, loss in make_runs()])


def test_a_table_with_the_right_names_needs_no_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [{"N": N, "D": D, "loss": loss} for N, D, loss in make_runs()])
    looked = CliRunner().invoke(app, ["import", "export.csv"])
    assert looked.stdout.splitlines()[-1] == "scaling fit export.csv"


def test_every_column_that_looks_right_is_offered_however_deep(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    metrics = {f"metric_{i:02d}": i for i in range(30)}
    rows = [
        {"summary": metrics | {"val/": {"web_loss": 3.1 - i, "code_loss": 2.0}, "model/": {"num_params": 1e8 * i}}}
        | {"config": {"tokens": 2e9 * i}}
        for i in (1, 2)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match="cannot be used") as error:
        import_runs(path)
    message = str(error.value)
    assert "no column N (is it summary.model/.num_params? --map N=summary.model/.num_params)" in message
    assert "is it summary.val/.web_loss? --map loss=summary.val/.web_loss; or summary.val/.code_loss?" in message
    assert "no column D (is it config.tokens? --map D=config.tokens)" in message


def test_a_name_is_found_by_the_end_of_its_path(tmp_path: Path) -> None:
    rows = [
        {"config": {"scheduler": {"lr": 0.1, "name": "cosine"}, "N": 1e7, "D": 1e9 * i}, "loss": 3.0} for i in (1, 2)
    ]
    mapping = {"lr": "lr", "N": "N", "D": "D"}
    runs, _ = import_runs(write(tmp_path, rows), mapping=mapping)
    assert runs["lr"].tolist() == [0.1, 0.1]


def test_no_name_of_runs_is_offered_that_would_be_refused(tmp_path: Path) -> None:
    rows = [{"run_name": n, "seed": s, "N": 1e7, "D": 2e9, "loss": 3 + s / 10} for n in "ab" for s in (1, 2)]
    _, remarks = import_runs(write(tmp_path, rows))
    assert not any("run_name?" in remark for remark in remarks)
    guess = propose_import(tmp_path / "export.csv")
    assert guess is not None
    assert "run_id" not in guess.mapping


def test_one_model_trained_on_several_lengths_is_not_taken_for_one_run(tmp_path: Path) -> None:
    guess = propose_import(write(tmp_path, make_readme()))
    assert guess is not None
    assert "run_id" not in guess.mapping


def test_a_file_without_a_loss_has_no_proposal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("N,D,accuracy\n1e7,1e9,0.5\n")
    refused = CliRunner().invoke(app, ["import", "a.csv"])
    assert refused.exit_code == 2
    assert "no column loss; the source has N, D, accuracy: --map loss=COLUMN" in refused.stderr


@pytest.mark.parametrize("name", COLUMN_NAMES)
def test_every_known_name_is_known_for_its_column(name: str) -> None:
    for known, unit, _ in read_names(name):
        ranked = rank_column(name, known)
        assert ranked is not None, known
        assert ranked[0][0] in (0, 1, 4), known
        if name != "loss":
            assert ranked[1] == unit, known


@pytest.mark.parametrize("prefix", ["", "config.", "summary.", "params_", "model/"])
@pytest.mark.parametrize("known", ["params_active", "params_count", "n_params", "params"])
def test_known_names_are_found_behind_prefixes(prefix: str, known: str) -> None:
    assert rank_column("N", prefix + known) is not None


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("D", "tokens_per_second"),
        ("D", "throughput/tokens_per_sec"),
        ("D", "max_position_tokens"),
        ("N", "grad_norm"),
        ("N", "params_dropout"),
        ("N", "params.batch_size"),
        ("N", "tokens_per_param"),
        ("loss", "aux_loss"),
        ("loss", "loss_scale"),
        ("loss", "train/z_loss"),
        ("lr", "min_lr"),
        ("lr", "lr_scheduler.type"),
        ("lr", "lr_warmup_steps"),
        ("batch_tokens", "micro_batch_size"),
        ("batch_tokens", "per_device_train_batch_size"),
        ("batch_tokens", "eval_batch_size"),
    ],
)
def test_names_that_only_look_alike_are_not_offered(name: str, column: str) -> None:
    assert rank_column(name, column) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_an_experiment_of_another_program_is_to_be_imported_and_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/foreign.db"
    monkeypatch.chdir(tmp_path)
    client = connect(uri)
    experiment = client.create_experiment("sweep")
    for N, D, loss in make_runs():
        run = client.create_run(experiment).info.run_id
        for name, value in {"model.n_params": N, "optim.lr": 0.002, "batch_size": 64, "seq_len": 1024}.items():
            client.log_param(run, name, value)
        for name, value in {"val_loss": loss, "tokens_seen": D}.items():
            client.log_metric(run, name, value)
        client.set_terminated(run)
    refused = CliRunner().invoke(app, ["fit", "sweep", "--tracking-uri", uri])
    assert refused.exit_code == 2
    assert "experiment 'sweep' holds 12 runs of another program: import them first" in refused.stderr
    assert "resume" not in refused.stderr
    command = shlex.split(refused.stderr.strip().splitlines()[-1])
    done = CliRunner().invoke(app, [*command[1:], "--tracking-uri", uri])
    assert done.exit_code == 0, done.output
    used = usable(load_runs("sweep.runs.csv"))
    for column, expected in zip(("N", "D", "loss"), np.transpose(make_runs()), strict=True):
        assert sorted(used[column]) == pytest.approx(sorted(expected), rel=1e-9), column
    assert used["lr"].tolist() == [0.002] * 12
    assert used["batch_tokens"].tolist() == [65536.0] * 12


def guess_table(folder: Path, rows: list[dict[str, Any]]) -> Any:
    path = folder / "table.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    guess = propose_import(path)
    assert guess is not None
    return guess


def test_the_last_rate_of_a_tracker_is_not_taken_for_the_peak(tmp_path: Path) -> None:
    rows = [{"n_params": N, "iter": D / 2**16, "val/loss": loss, "batch_size": 64, "block_size": 1024, "lr": 1e-4,
             "learning_rate": 1e-3} for N, D, loss in make_runs()]  # fmt: skip
    assert guess_table(tmp_path, rows).mapping["lr"] == "learning_rate"
    swapped = [row | {"lr": row["learning_rate"], "learning_rate": row["lr"]} for row in rows]
    assert "lr" not in guess_table(tmp_path, swapped).mapping
    # The rate of other parameters is no peak.
    others = [{k: v for k, v in row.items() if k != "learning_rate"} | {"matrix_lr": 0.02} for row in rows]
    assert "lr" not in guess_table(tmp_path, others).mapping


def test_a_rate_that_only_rows_without_tokens_have_gives_way(tmp_path: Path) -> None:
    runs = [{"n_params": N, "train_tokens": D, "val_loss": loss, "config.lr": 1e-3} for N, D, loss in make_runs()]
    summary = [{"n_params": 2e7, "val_loss": 3.0 + i, "lr": 10.0**-i} for i in range(2, 5)]
    assert guess_table(tmp_path, summary + runs).mapping["lr"] == "config.lr"


def test_a_size_that_one_row_has_gives_way(tmp_path: Path) -> None:
    runs = [{"n_params": N, "train_tokens": D, "final_val_loss": loss} for N, D, loss in make_runs()]
    summary = [{"summary.tiny.params": 2e7, "summary.tiny.val_loss": 3.0}]
    mapping = guess_table(tmp_path, summary + runs).mapping
    assert (mapping["N"], mapping["loss"]) == ("n_params", "final_val_loss")


def test_the_calls_of_a_tracker_are_no_steps_of_training(tmp_path: Path) -> None:
    rows = [{"n_params": N, "iter": D / 2**16, "_step": i + 3, "val/loss": loss, "tokens_per_step": 2**16}
            for i, (N, D, loss) in enumerate(make_runs())]  # fmt: skip
    assert guess_table(tmp_path, rows).mapping["D"] == "iter:steps"
    only = [{"_step" if k == "iter" else k: v for k, v in row.items() if k != "_step"} for row in rows]
    assert guess_table(tmp_path, only).mapping["D"] == "_step:steps"


def test_a_loss_in_nats_comes_before_its_perplexity(tmp_path: Path) -> None:
    rows = [{"N": N, "D": D, "C4 Eval PPL": math.exp(loss), "C4 Eval Loss": loss} for N, D, loss in make_runs()]
    assert guess_table(tmp_path, rows).mapping["loss"] == "C4 Eval Loss"


def test_the_losses_of_single_steps_are_offered_where_there_are_no_others(tmp_path: Path) -> None:
    rows = [{"epoch": 0, "step": 50 * i, "train_loss_step": 9.0 - i, "train_perplexity_step": math.exp(9.0 - i)}
            for i in range(1, 6)]  # fmt: skip
    guess = guess_table(tmp_path, rows)
    assert guess.mapping == {"D": "step:steps", "loss": "train_loss_step"}
    assert set(guess.blanks) == {"N", "batch_tokens"}


def test_runs_of_several_shapes_are_not_given_one_size(tmp_path: Path) -> None:
    rows = [{"config.d_model": 64 * (1 + i % 3), "tokens": D, "val_loss": loss} for i, (_, D, loss) in
            enumerate(make_runs())]  # fmt: skip
    guess = guess_table(tmp_path, rows)
    assert any("config.d_model is 64 to 192, so the runs differ in N" in reason for reason in guess.reasons)
    same = guess_table(tmp_path, [row | {"config.d_model": 64} for row in rows])
    assert not any("differ in N" in reason for reason in same.reasons)


def test_millions_of_parameters_are_known_by_their_short_name(tmp_path: Path) -> None:
    rows = [{"model_mparams": N / 1e6, "tokens": D, "val_loss": loss} for N, D, loss in make_runs()]
    assert guess_table(tmp_path, rows).mapping["N"] == "model_mparams:millions"


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "config.grad_accum", "accumulate_grad_batches"])
def test_a_batch_that_may_be_a_part_of_a_step_is_named(name: str, tmp_path: Path) -> None:
    rows = [{"N": N, "iter": D / 2**16, "loss": loss, "batch_size": 8, "seq_len": 1024, name: 8}
            for N, D, loss in make_runs()]  # fmt: skip
    path = tmp_path / "table.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    assert any(f"{name} is 8" in remark for remark in import_runs(path, guess=True)[1])
    whole = [{("global_batch_size" if k == "batch_size" else k): v for k, v in row.items()} for row in rows]
    pd.DataFrame(whole).to_csv(path, index=False)
    assert not any("is 8: if" in remark for remark in import_runs(path, guess=True)[1])
