"""Tables of other programs: every format gives the same runs, units are converted, mistakes are refused or marked."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from scaling.__main__ import app
from scaling.laws.compute import count_transformer
from scaling.runs.importer import import_runs, read_mapping, summarize_exclusions
from scaling.runs.io import load_runs, save_runs
from scaling.runs.readers import TABLE_SUFFIXES
from scaling.runs.table import usable

MAPPING = {
    "N": "params:millions",
    "D": "step:steps",
    "batch_tokens": "bs:sequences",
    "lr": "learning_rate",
    "loss": "val_loss",
    "run_id": "id",
}


def make_foreign_rows(rows: int = 12) -> list[dict[str, Any]]:
    """Return runs of another program: the fourth diverged, the sixth crashed."""
    r = random.Random(1)
    return [
        {
            # A careless reader takes this for a number.
            "id": f"00{i}e1",
            "state": "crashed" if i == 5 else "finished",
            "params": 10.5 * (1 + i % 3),
            "step": 1000 + i,
            "bs": 2 ** (i % 4),
            "learning_rate": r.lognormvariate(-6, 1),
            "val_loss": math.nan if i == 3 else r.lognormvariate(1, 0.1),
            "note": None if i % 2 else "a, b",
        }
        for i in range(rows)
    ]


def make_wandb_record(row: dict[str, Any]) -> dict[str, Any]:
    """Return a run as Weights & Biases stores it: nested, with each setting wrapped in a dict."""
    config = {k: {"value": row[k], "desc": None} for k in ("params", "bs", "learning_rate")}
    loss = "NaN" if math.isnan(row["val_loss"]) else row["val_loss"]
    return {
        "id": row["id"],
        "state": row["state"],
        "config": config,
        "summary": {"step": row["step"], "val_loss": loss},
    }


def print_dicts(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of the script in the manual of Weights & Biases: dicts as Python prints them."""
    config = {k: row[k] for k in ("params", "bs", "learning_rate")}
    return {
        "id": row["id"],
        "state": row["state"],
        "config": str(config),
        "summary": str({"step": row["step"], "val_loss": row["val_loss"]}),
    }


def write_source(kind: str, folder: Path) -> Path:
    """Write the foreign rows in one of KINDS."""
    rows = make_foreign_rows()
    path = folder / f"runs.{kind.split()[0]}"
    if kind == "csv":
        pd.DataFrame(rows).to_csv(path, index=False, na_rep="NaN")
    elif kind == "csv of printed dicts":
        pd.DataFrame([print_dicts(r) for r in rows]).to_csv(path)
    elif kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif kind == "parquet of dicts":
        # A column of parquet has one type, so the loss stays a number.
        both = [(r, make_wandb_record(r)) for r in rows]
        pd.DataFrame([w | {"summary": w["summary"] | {"val_loss": r["val_loss"]}} for r, w in both]).to_parquet(path)
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows))
    elif kind == "jsonl of W&B":
        path.write_text("\n".join(json.dumps(make_wandb_record(row)) for row in rows))
    elif kind == "json of W&B":
        path.write_text(json.dumps([make_wandb_record(row) for row in rows]))
    return path


def write_csv(folder: Path, text: str) -> Path:
    path = folder / "runs.csv"
    path.write_text(text)
    return path


KINDS = (
    "csv",
    "csv of printed dicts",
    "parquet",
    "parquet of dicts",
    "jsonl",
    "jsonl of W&B",
    "json of W&B",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_table(kind: str, tmp_path: Path) -> None:
    runs, _ = import_runs(write_source(kind, tmp_path), mapping=MAPPING, constants={"seq_len": 512})
    rows = make_foreign_rows()
    assert runs["N"].tolist() == [r["params"] * 1e6 for r in rows]
    assert runs["batch_tokens"].tolist() == [r["bs"] * 512 for r in rows]
    assert runs["D"].tolist() == [r["step"] * r["bs"] * 512 for r in rows]
    assert runs["lr"].tolist() == [r["learning_rate"] for r in rows]
    assert np.array_equal(runs["loss"], [r["val_loss"] for r in rows], equal_nan=True)
    assert runs["run_id"].tolist() == [r["id"] for r in rows]
    assert runs["diverged"].tolist() == [i == 3 for i in range(12)]
    assert runs["final"].tolist() == [i != 5 for i in range(12)]
    assert len(usable(runs)) == 10
    lines = summarize_exclusions(runs)
    assert lines[0] == "10 of 12 rows are used by laws"
    assert set(lines[1:]) == {
        "1 kept, but excluded: diverged: no finite loss",
        "1 kept, but excluded: unfinished (crashed)",
    }


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_an_imported_table_is_read_back_by_name_alone(suffix: str, tmp_path: Path) -> None:
    runs, _ = import_runs(write_source("csv", tmp_path), mapping=MAPPING, constants={"seq_len": 512})
    path = tmp_path / f"out{suffix}"
    save_runs(runs, path)
    pd.testing.assert_frame_equal(load_runs(path), runs)
    again, remarks = import_runs(path)
    pd.testing.assert_frame_equal(again, runs)
    assert remarks == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"D": "tokens"}, {"D": "gtokens:billions"}),
        ({"D": "tokens"}, {"D": "step:steps", "batch_tokens": "bt"}),
        ({"D": "tokens"}, {"D": "step:steps", "batch_tokens": "bs:sequences", "seq_len": "T"}),
        ({"D": "tokens"}, {"D": "seqs:sequences", "seq_len": "T"}),
        ({"batch_tokens": "bt"}, {"batch_tokens": "bs:sequences", "seq_len": "T"}),
        ({"loss": "nats"}, {"loss": "bits:bits"}),
        ({"loss": "nats"}, {"loss": "ppl:perplexity"}),
        ({"seconds": "s"}, {"seconds": "h:hours"}),
    ],
)
def test_two_units_of_one_quantity_give_one_number(
    first: dict[str, str], second: dict[str, str], tmp_path: Path
) -> None:
    r = np.random.default_rng(0)
    T, bs, step, nats, s = (
        r.integers(1, 99, 9) * 8,
        r.integers(1, 64, 9),
        r.integers(1, 9999, 9),
        1 + r.random(9),
        r.random(9),
    )
    tokens = T * bs * step
    table = pd.DataFrame(
        {"n": 1e6, "tokens": tokens, "gtokens": tokens / 1e9, "step": step, "T": T, "bs": bs, "bt": T * bs}
    )
    table = table.assign(seqs=bs * step, nats=nats, bits=nats / math.log(2), ppl=np.exp(nats), s=s, h=s / 3600)
    table.to_csv(tmp_path / "a.csv", index=False)
    both = [
        import_runs(tmp_path / "a.csv", mapping={"N": "n", "D": "tokens", "loss": "nats", **mapping})[0]
        for mapping in (first, second)
    ]
    (name,) = first
    assert both[0][name].tolist() == pytest.approx(both[1][name].tolist(), rel=1e-12)
    assert both[0][name].tolist() == pytest.approx(table[first[name]].tolist(), rel=1e-12)


@pytest.mark.parametrize("table", ["vocab", "N_embedding"])
@pytest.mark.parametrize("unit", ["total", "nonembedding"])
def test_parameters_counted_in_another_way_are_converted(unit: str, table: str, tmp_path: Path) -> None:
    """Compare with the counts of a Transformer by its shape. Norm gains, which multiply no token, stay in."""
    d, vocab, layers = 64, 1000, 3
    counts = count_transformer(d_model=d, n_layers=layers, n_heads=4, n_kv_heads=2, d_head=16, d_ff=192, vocab=vocab)
    row = {"n": getattr(counts, unit), "D": 1e9, "loss": 3.0, "vocab": vocab, "d_model": d, "N_embedding": vocab * d}
    kept = {k: v for k, v in row.items() if k not in ({"N_embedding"} if table == "vocab" else {"vocab", "d_model"})}
    pd.DataFrame([kept]).to_csv(tmp_path / "a.csv", index=False)
    runs, _ = import_runs(tmp_path / "a.csv", mapping={"N": f"n:{unit}"})
    assert runs["N"][0] == counts.N + (2 * layers + 1) * d
    assert runs[f"N_{unit}"][0] == getattr(counts, unit)
    assert runs["N_convention"][0] == "multiplying"


def test_a_count_that_is_not_converted_says_so(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "n,D,loss\n1000,1e6,3\n")
    conventions = {}
    for unit in ("", ":multiplying", ":total-as-is", ":nonembedding-as-is", ":total-tied"):
        runs, _ = import_runs(path, mapping={"N": f"n{unit}"})
        assert runs["N"][0] == 1000
        conventions[unit] = runs["N_convention"][0]
    assert list(conventions.values()) == ["as given", "multiplying", "total", "nonembedding", "multiplying"]
    with pytest.raises(
        ValueError, match=r"N as total needs N_embedding, or vocab and d_model.*total-tied.*total-as-is"
    ):
        import_runs(path, mapping={"N": "n:total"})
    with pytest.raises(ValueError, match="row 0, column N: needed the total parameters of a model with its embedding"):
        import_runs(path, mapping={"N": "n:total"}, constants={"N_embedding": 2000})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"N": "width"}, r"N=width: no column width \(nearest: .*\)"),
        ({"N": "n:furlongs"}, "unknown unit 'furlongs'; N takes multiplying, total"),
        ({"N": "n:millions:billions"}, "two units of one kind"),
        ({"lr": "lr:billions"}, "unknown unit 'billions'; lr takes none"),
        (
            {"loss": "loss:bits-per-byte"},
            "bits per byte, which become nats per token by the bytes of one token.*bytes_per_token=NUMBER",
        ),
        ({"loss": "loss:bpb"}, "bits per byte"),
        ({"D": "D:steps"}, "D in steps needs batch_tokens: map it, or set batch_tokens=NUMBER"),
        ({"D": "D:sequences"}, "D in sequences needs seq_len"),
        ({"lrr": "lr"}, r"no column lrr in a run table \(is it lr\?\)"),
        ({"loss": "acc"}, "several columns acc .config.acc or summary.acc. write it whole"),
        ({"state": "name"}, "row 0, column name: needed the state of a run"),
    ],
)
def test_a_mapping_that_cannot_be_right_is_refused(mapping: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path, "n,N,D,loss,lr,config.acc,summary.acc,name\n1,1,1,1,1,1,1,a\n")
    with pytest.raises(ValueError, match=message):
        import_runs(path, mapping=mapping)


def test_a_value_is_mapped_or_set_not_both(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lr is both mapped and set"):
        import_runs(write_csv(tmp_path, "N,D,loss,lr\n1,1,1,1\n"), mapping={"lr": "lr"}, constants={"lr": 0.1})


def test_common_names_are_proposed_and_never_used(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "config.n_params,_step,eval/loss,learning_rate,batch size\n1e6,1e6,1,1,1\n")
    with pytest.raises(ValueError, match="cannot be used") as error:
        import_runs(path)
    message = str(error.value)
    assert "no column N (is it config.n_params? --map N=config.n_params)" in message
    assert "no column D (is it _step? --map D=_step:steps)" in message
    assert "no column loss (is it eval/loss? --map loss=eval/loss)" in message
    mapping = {"N": "n_params", "D": "_step", "loss": "eval/loss"}
    runs, remarks = import_runs(path, mapping=mapping)
    assert "lr" not in runs
    assert remarks == [
        "no column lr (is it learning_rate? --map lr=learning_rate)",
        'no column batch_tokens (is it batch size? --map "batch_tokens=batch size:sequences")',
        "columns not used: learning_rate, batch size",
    ]


def test_all_mistakes_are_named_with_row_and_column_at_once(tmp_path: Path) -> None:
    text = 'n,D,loss,lr\n"1,2,3",1e9,3,0.1\n2000,-1,3,0.1\n3000,1e9,high,0.1\n4000,1e9,3,\n5000,1e9,3,-0.1\n'
    with pytest.raises(ValueError, match="cannot be used") as error:
        import_runs(write_csv(tmp_path, text), mapping={"N": "n"})
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  row 0, column N (from n): needed a number, got '1,2,3'",
        "  row 2, column loss: needed a number, got 'high'",
        "  row 1, column D: needed a positive number, got -1.0",
        "  row 4, column lr: needed a positive number, got -0.1",
    ]


def test_a_batch_without_its_sequence_length_keeps_one_run_out(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "N,D,loss,bs,seq_len\n1e6,1e8,3,8,128\n1e6,2e8,2,8,\n")
    runs, remarks = import_runs(path, mapping={"batch_tokens": "bs:sequences"})
    assert runs["batch_tokens"].tolist() == pytest.approx([1024, math.nan], nan_ok=True)
    assert len(usable(runs)) == 2
    assert "row 1: no batch_tokens, which needs seq_len to be read in sequences" in remarks
    path = write_csv(tmp_path, "N,D,loss,bs,seq_len\n1e6,1e8,3,8,\n1e6,2e8,2,8,\n")
    with pytest.raises(ValueError, match="row 1, column seq_len: needed a number, to read batch_tokens in sequences"):
        import_runs(path, mapping={"batch_tokens": "bs:sequences"})


def test_points_before_the_end_of_a_run_are_kept_and_marked(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "run,N,D,loss\na,1e6,1e8,5\na,1e6,3e8,3\na,1e6,2e8,4\nb,1e6,1e8,5.1\n")
    runs, _ = import_runs(path, mapping={"run_id": "run"})
    assert runs["final"].tolist() == [False, True, False, True]
    assert usable(runs)["D"].tolist() == [3e8, 1e8]
    assert set(runs["excluded"]) == {"", "not final: a point on the way of its run"}
    runs, _ = import_runs(path, mapping={"run_id": "run"}, constants={"final": True})
    assert len(usable(runs)) == 4, "under a constant rate every point may be used"
    runs, remarks = import_runs(path)
    assert len(usable(runs)) == 4
    assert remarks == ["no column run_id (is it run? --map run_id=run)", "columns not used: run"]
    with pytest.raises(ValueError, match="row 2, column run_id: needed one row per run and number of tokens, got 'a'"):
        import_runs(write_csv(tmp_path, "run_id,N,D,loss\na,1,100,5\na,1,300,3\na,1,300,2.9\n"))


def test_a_loss_no_better_than_guessing_is_diverged(tmp_path: Path) -> None:
    path = write_csv(tmp_path, f"N,D,loss\n1,1,{math.log(256) + 0.01}\n1,1,{math.log(256) - 0.01}\n1,1,inf\n")
    runs, _ = import_runs(path, constants={"vocab": 256})
    assert runs["diverged"].tolist() == [True, False, True]
    assert runs["excluded"].tolist() == ["diverged: no better than guessing", "", "diverged: no finite loss"]


def test_a_crash_is_no_divergence_unless_its_loss_is_not_finite(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path,
        "N,D,loss,State\n1e6,1e8,,crashed\n1e6,,NaN,failed\n1e6,1e8,3,finished\n,,,finished\n1e6,1e8,,finished\n",
    )
    runs, remarks = import_runs(path)
    assert runs["diverged"].tolist() == [False, True, False, False, True]
    assert runs["excluded"].tolist() == [
        "unfinished (crashed)",
        "diverged: no finite loss",
        "",
        "no result: neither a loss nor a size",
        "diverged: no finite loss",
    ]
    assert remarks == ["column State says which runs have finished"]


def test_a_column_called_status_is_used_only_for_known_words(tmp_path: Path) -> None:
    runs, remarks = import_runs(write_csv(tmp_path, "N,D,loss,status\n1e6,1e8,1,ok\n"))
    assert len(usable(runs)) == 1
    assert remarks == ["column status is not read as the state of runs: it holds 'ok'"]
    with pytest.raises(ValueError, match="row 1, column status: needed the state of a run"):
        import_runs(write_csv(tmp_path, "N,D,loss,status\n1e6,1e8,1,finished\n1e6,1e8,1,ok\n"))


def test_a_column_with_the_right_name_can_be_left_out(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "N,D,loss,rung\n1,1,1,upper\n")
    with pytest.raises(ValueError, match="row 0, column rung"):
        import_runs(path)
    assert "rung" not in import_runs(path, mapping={"rung": ""})[0]
    with pytest.raises(ValueError, match="no column N"):
        import_runs(path, mapping={"rung": "", "N": ""})


def test_the_command_writes_a_table_or_nothing(tmp_path: Path) -> None:
    source, out = write_source("csv", tmp_path), tmp_path / "out.parquet"
    file = tmp_path / "mapping.toml"
    file.write_text("[map]\n" + "\n".join(f'{k} = "{v}"' for k, v in MAPPING.items()) + "\n[set]\nseq_len = 999\n")
    done = CliRunner().invoke(
        app, ["import", str(source), "--out", str(out), "--mapping", str(file), "--set", "seq_len=512"]
    )
    assert done.exit_code == 0, done.output
    assert "12 runs (1 diverged)" in done.stdout
    assert "10 of 12 rows are used by laws" in done.stderr
    pd.testing.assert_frame_equal(
        load_runs(out), import_runs(source, mapping=MAPPING, constants={"seq_len": 512})[0], check_like=True
    )
    for wrong in (["--map", "N=nothing"], ["--map", "N"], ["--mapping", str(tmp_path / "no.toml")]):
        other = tmp_path / "other.csv"
        done = CliRunner().invoke(app, ["import", str(source), "--out", str(other), *wrong])
        assert done.exit_code == 2, done.output
        assert "error: " in done.stderr
        assert not other.exists()


@pytest.mark.parametrize("text", ["[map", "[map]\nN = 3", "map = 3", "[maps]\nN = 'n'", "[set]\nN = []"])
def test_a_mapping_file_is_checked(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(ValueError, match=r"m\.toml cannot be"):
        read_mapping(tmp_path / "m.toml")


CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["1,000", "NaN", "-inf", "1e400", "finished", "crashed", "3.5", "{'a': nan}", '{"value": 2}', "0"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["value", "desc", "loss", "lr"]), st.floats(), max_size=2),
)
NAME = st.one_of(
    st.sampled_from(
        ["N", "D", "loss", "lr", "batch_tokens", "run_id", "state", "config", "summary", "final", "diverged"]
    ),
    st.text(max_size=4),
)
UNIT = st.sampled_from(
    ["", ":steps", ":sequences", ":total", ":billions", ":bits", ":perplexity", ":nonembedding", ":x"]
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(NAME, CELL, max_size=7), max_size=5),
    good=st.booleans(),
    suffix=st.sampled_from([".jsonl", ".json", ".csv"]),
    mapping=st.dictionaries(NAME, st.tuples(NAME, UNIT).map("".join), max_size=4),
    constants=st.dictionaries(NAME, st.one_of(st.floats(), st.text(max_size=3)), max_size=2),
)
def test_every_table_is_either_checked_or_refused(
    tmp_path: Path, rows: list[Any], good: bool, suffix: str, mapping: dict[str, str], constants: dict[str, Any]
) -> None:
    # Some tables must be readable.
    if good:
        rows = [{**row, "N": 1e6, "D": 1e9, "loss": 3.0} for row in rows]
        mapping, constants = {k: v for k, v in mapping.items() if k in ("N", "D", "loss")}, {}
    path = tmp_path / f"fuzz{suffix}"
    if suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        frame = pd.DataFrame([[row.get(n) for n in names] for row in rows], columns=names, dtype=object)
        path.write_bytes(frame.to_csv(index=False).encode("utf-8", "surrogatepass"))
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    refused = ""
    try:
        runs, _ = import_runs(path, mapping=mapping, constants=constants)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert "cannot be" in refused
        return
    used = usable(runs)
    assert len(runs) == len(rows)
    for name in ("N", "D", "loss"):
        assert (np.isfinite(used[name]) & (used[name] > 0)).all()
    assert used["final"].all()
    assert not used["diverged"].any()
    assert (runs["excluded"].ne("") | runs.index.isin(used.index) | runs["role"].eq("target")).all()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(TABLE_SUFFIXES),
    content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)),
)
def test_every_file_is_either_read_or_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be"):
        import_runs(path)
