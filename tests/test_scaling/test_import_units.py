"""Units of foreign tables: what names and values say together is believed, what only one of them says is asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from scaling.__main__ import app
from scaling.runs.importer import import_runs
from scaling.runs.io import load_runs, save_runs
from scaling.runs.table import usable
from scaling.runs.units import find_loss_unit, find_scale, guess_scale


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "runs.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


NATS = (3.4, 3.1, 2.9, 2.5)


def make_rows(column: str, values: list[float]) -> list[dict[str, Any]]:
    return [{"N": 1e7 * (i + 1), "D": 1e9 * (i + 1), column: v} for i, v in enumerate(values)]


@pytest.mark.parametrize("column", ["val_ppl", "Perplexity", "eval/ppl", "test perplexity", "loss (ppl)"])
def test_a_perplexity_by_name_and_values_is_converted_with_a_word(column: str, tmp_path: Path) -> None:
    path = write(tmp_path, make_rows(column, [math.exp(v) for v in NATS]))
    runs, remarks = import_runs(path, mapping={"loss": column})
    assert runs["loss"].tolist() == pytest.approx(NATS)
    assert any(r.startswith(f"{column} is read as perplexity") for r in remarks)
    assert any(f"--map loss={column}:nats if it is not" in r for r in remarks)
    as_given, _ = import_runs(path, mapping={"loss": f"{column}:nats"})
    assert as_given["loss"].tolist() == pytest.approx([math.exp(v) for v in NATS])


@pytest.mark.parametrize("values", [NATS, (0.9, 0.8, 0.7, 0.6)])
def test_a_perplexity_by_name_alone_is_asked_for(values: tuple[float, ...], tmp_path: Path) -> None:
    path = write(tmp_path, make_rows("val_ppl", list(values)))
    with pytest.raises(ValueError, match="named like perplexity") as error:
        import_runs(path, mapping={"loss": "val_ppl"})
    assert "--map loss=val_ppl:perplexity or --map loss=val_ppl:nats" in str(error.value)


def test_a_perplexity_by_values_alone_is_remarked_upon(tmp_path: Path) -> None:
    path = write(tmp_path, make_rows("loss", [math.exp(v) for v in NATS]))
    _, remarks = import_runs(path)
    assert any("worse than guessing. If it is a perplexity: --map loss=loss:perplexity" in r for r in remarks)
    assert import_runs(path, mapping={"loss": "loss:perplexity"})[0]["loss"].tolist() == pytest.approx(NATS)


@pytest.mark.parametrize("column", ["loss_bits", "val_bits_per_token", "bpt", "Loss [bits]"])
def test_bits_by_name_and_values_are_converted_with_a_word(column: str, tmp_path: Path) -> None:
    path = write(tmp_path, make_rows(column, [v / math.log(2) for v in NATS]))
    runs, remarks = import_runs(path, mapping={"loss": column})
    assert runs["loss"].tolist() == pytest.approx(NATS)
    assert any("in bits per token, times ln 2" in r for r in remarks)


@pytest.mark.parametrize("column", ["val_bpb", "bits_per_byte", "eval/bpc", "loss (bits/byte)"])
def test_bits_per_byte_are_never_taken_for_nats(column: str, tmp_path: Path) -> None:
    path = write(tmp_path, make_rows(column, [v / math.log(2) / 4 for v in NATS]))
    with pytest.raises(ValueError, match=r"is in bits per byte.*--set bytes_per_token=NUMBER"):
        import_runs(path, mapping={"loss": column})
    runs, remarks = import_runs(path, mapping={"loss": column}, constants={"bytes_per_token": 4})
    assert runs["loss"].tolist() == pytest.approx(NATS)
    assert any("is read in bits per byte" in r for r in remarks)
    assert "bytes_per_token" not in runs


@pytest.mark.parametrize(
    "column", ["val_loss", "nll", "eval/loss", "cross_entropy", "loss (nats)", "bitnet_loss", "orbit"]
)
def test_nats_are_taken_as_they_are_without_a_word(column: str, tmp_path: Path) -> None:
    assert find_loss_unit(column) in ("", "nats")
    runs, remarks = import_runs(write(tmp_path, make_rows(column, list(NATS))), mapping={"loss": column})
    assert runs["loss"].tolist() == list(NATS)
    assert remarks == []


def test_a_unit_that_is_not_known_is_answered_by_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path, make_rows("loss", list(NATS)))
    with pytest.raises(ValueError, match="loss takes nats, bits, perplexity, log-likelihood, bits-per-byte") as error:
        import_runs(path, mapping={"loss": "loss:per-word"})
    # Each of them is accepted.
    for unit in ("nats", "bits", "perplexity", "bits-per-byte"):
        assert unit in str(error.value)
        import_runs(path, mapping={"loss": f"loss:{unit}"}, constants={"bytes_per_token": 4})


def test_a_loss_that_is_not_positive_is_explained_and_the_ways_out_work(tmp_path: Path) -> None:
    path = write(tmp_path, make_rows("loss", [-1.35, -2.1, -2.31]))
    with pytest.raises(ValueError, match=r"row 0, column loss: needed a positive number, got -1\.35") as error:
        load_runs(path)
    message = str(error.value)
    assert "laws are fitted to ln(loss), so each loss must be positive" in message
    assert "--map loss=loss:log-likelihood" in message
    assert "--set loss_offset=3.4" in message
    runs, _ = import_runs(path, mapping={"loss": "loss:log-likelihood"})
    assert runs["loss"].tolist() == [1.35, 2.1, 2.31]
    runs, _ = import_runs(path, constants={"loss_offset": 3.4})
    assert runs["loss"].tolist() == pytest.approx([2.05, 1.3, 1.09])
    with pytest.raises(ValueError, match="positive") as error:
        load_runs(write(tmp_path, make_rows("loss", [3.0, -1.0])))
    assert "log-likelihood:" not in str(error.value), "not all are negative"


@pytest.mark.parametrize(
    ("column", "scale"),
    [
        ("Params (M)", "millions"),
        ("params_m", "millions"),
        ("N_millions", "millions"),
        ("Size [B]", "billions"),
        ("tokens_b", "billions"),
        ("Tokens (in billions)", "billions"),
        ("GTokens", "billions"),
        ("Tokens (T)", "trillions"),
        ("params", ""),
        ("m", ""),
        ("tokens", ""),
    ],
)
def test_scales_are_found_in_names(column: str, scale: str) -> None:
    assert find_scale(column) == scale


def test_a_scale_by_name_and_values_is_applied_with_a_word(tmp_path: Path) -> None:
    rows = [{"Params (M)": 30 * i, "Tokens (B)": 0.6 * i, "loss": 3 - i / 10} for i in (1, 2, 4)]
    runs, remarks = import_runs(write(tmp_path, rows), mapping={"N": "Params (M)", "D": "Tokens (B)"})
    assert runs["N"].tolist() == [3e7, 6e7, 1.2e8]
    assert runs["D"].tolist() == pytest.approx([6e8, 1.2e9, 2.4e9])
    assert "Params (M) is read in millions (N=Params (M):millions)" in remarks
    rows = [{"Params (M)": 30e6, "tokens": 6e8, "loss": 3}]
    runs, remarks = import_runs(write(tmp_path, rows), mapping={"N": "Params (M)", "D": "tokens"})
    assert runs["N"].tolist() == [3e7], "the values say that they are counts"


@pytest.mark.parametrize(
    ("N", "D", "options"),
    [
        ((30, 60, 500), (0.6, 2.4, 40), "--map N=N:millions --map D=D:billions"),
        ((0.03, 0.06, 0.5), (0.6, 2.4, 40), "--map N=N:billions --map D=D:billions"),
        ((30, 60, 500), (600, 2400, 40000), "--map N=N:millions --map D=D:millions"),
        ((3e7, 6e7, 5e8), (0.6, 2.4, 40), "--map D=D:billions"),
        ((30, 60, 500), (6e8, 2.4e9, 4e10), "--map N=N:millions"),
    ],
)
def test_counts_that_are_too_small_are_remarked_upon_with_the_options_that_fix_them(
    N: tuple[float, ...], D: tuple[float, ...], options: str, tmp_path: Path
) -> None:
    rows = [{"N": n, "D": d, "loss": 3 - i / 10} for i, (n, d) in enumerate(zip(N, D, strict=True))]
    path = write(tmp_path, rows)
    runs, remarks = import_runs(path)
    assert len(usable(runs)) == 3
    (remark,) = (r for r in remarks if "too small for numbers of parameters and tokens" in r)
    assert remark.endswith(f"? {options}")
    mapping = dict(text.split("=", 1) for text in options.split("--map ")[1:] for text in [text.strip()])
    fixed, remarks = import_runs(path, mapping=mapping)
    assert fixed["N"].min() >= 1e7
    assert not any("too small" in r for r in remarks)


def test_a_number_of_steps_without_its_unit_is_remarked_upon(tmp_path: Path) -> None:
    rows = [{"N": 1e7, "step": 1000 * i, "loss": 3 - i / 10} for i in (1, 2)]
    _, remarks = import_runs(write(tmp_path, rows), mapping={"D": "step"})
    assert any(r.endswith("? --map D=step:steps") for r in remarks)


def test_tokens_are_computed_from_flops_and_from_a_ratio(tmp_path: Path) -> None:
    rows = [{"N": 1e8 * i, "C": 6e8 * i * 2e9, "ratio": 20, "loss": 3 - i / 10} for i in (1, 2)]
    path = write(tmp_path, rows)
    assert import_runs(path, mapping={"D": "C:flops"})[0]["D"].tolist() == pytest.approx([2e9, 2e9])
    assert import_runs(path, mapping={"D": "ratio:per-parameter"})[0]["D"].tolist() == pytest.approx([2e9, 4e9])


def test_counts_with_letters_are_read_in_cells_and_in_options(tmp_path: Path) -> None:
    path = write(tmp_path, [{"Params(M)": n, "val_loss": 3.0} for n in ("0.41M", "3.17M", "25.2M")])
    for unit in ("", ":millions"):
        options = ["--map", f"N=Params(M){unit}", "--set", "D=1.2B", "--map", "loss=val_loss"]
        done = CliRunner().invoke(app, ["import", str(path), "--out", str(tmp_path / "t.csv"), *options])
        assert done.exit_code == 0, done.output
        runs = load_runs(tmp_path / "t.csv")
        assert runs["N"].tolist() == pytest.approx([410_000, 3.17e6, 25.2e6])
        assert runs["D"].tolist() == [1.2e9] * 3


def test_columns_that_are_not_mapped_are_kept(tmp_path: Path) -> None:
    """What tells runs apart, such as the optimizer or the corpus, may be asked for later."""
    rows = [
        {
            "n": 1e7,
            "D": 1e9 * i,
            "loss": 3.0,
            "optimizer": o,
            "depth": 4 + i,
            "empty": None,
            "state": "finished",
            "ok": True,
        }
        for i, o in enumerate(("adamw", "muon", None), 1)
    ]
    runs, _ = import_runs(write(tmp_path, rows), mapping={"N": "n"})
    assert runs["optimizer"].tolist() == ["adamw", "muon", None]
    assert runs["depth"].tolist() == [5.0, 6.0, 7.0]
    assert not {"n", "state", "empty"} & set(runs)
    for suffix in ("csv", "parquet", "jsonl", "json"):
        save_runs(runs, tmp_path / f"t.{suffix}")
        pd.testing.assert_frame_equal(load_runs(tmp_path / f"t.{suffix}"), runs)


def test_a_scale_is_guessed_from_the_other_count() -> None:
    assert guess_scale("N", "N", pd.Series([7.0]), pd.Series([140e9])) == "billions"
    assert guess_scale("N", "N", pd.Series([7.0]), pd.Series([140e6])) == "millions"
    assert guess_scale("D", "D", pd.Series([140.0]), pd.Series([7e9])) == "billions"
    assert guess_scale("N", "N", pd.Series([7e6]), pd.Series([140e6])) == ""
