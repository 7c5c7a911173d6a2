"""Files of every format give the same runs, and those that hold none are refused with what they have to become."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from scaling.formats import json_shapes
from scaling.formats.files import read_file
from scaling.runs.importer import import_runs
from scaling.runs.readers import is_table_file
from tests.test_scaling.test_formats_text import PLAIN, check_same

TABLE = pd.DataFrame({"N": [1e8, 2e8, 4e8], "D": [2e9, 4e9, 8e9], "loss": [3.1, 2.95, 2.8]})
ROWS: list[dict[str, float]] = TABLE.to_dict("records")


def compress_zstandard(data: bytes) -> bytes:
    import pyarrow as pa

    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return bytes(buffer.getvalue())


def test_the_rows_are_those_of_the_text() -> None:
    check_same(TABLE)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", compress_zstandard)],
)
def test_compressed_files_are_read_whatever_their_suffix(
    suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    for name, content in (("runs.csv", PLAIN), ("runs.jsonl", "\n".join(map(json.dumps, ROWS)))):
        for path in (tmp_path / f"{name}{suffix}", tmp_path / name):
            path.write_bytes(compress(content.encode()))
            check_same(import_runs(path)[0])
    damaged = tmp_path / f"cut.csv{suffix}"
    damaged.write_bytes(compress(PLAIN.encode())[:-9])
    with pytest.raises(ValueError, match="cannot be read: the compressed data is damaged"):
        import_runs(damaged)


NAMED = dict(zip("abc", ROWS, strict=True))
DOCUMENTS: dict[str, tuple[str, str]] = {
    **{orient: (TABLE.to_json(orient=orient), "") for orient in ("records", "columns", "index", "split", "table")},
    "lists by column": (json.dumps(TABLE.to_dict("list")), "one list per column"),
    "runs by name": (json.dumps(NAMED), "one object per run"),
    "columns by name of run": (
        json.dumps({c: {name: row[c] for name, row in NAMED.items()} for c in TABLE}),
        "one object per column",
    ),
    "names first": (json.dumps([list(TABLE), *TABLE.to_numpy().tolist()]), ""),
    "a list under a key": (json.dumps({"project": "x", "runs": ROWS}), "the rows are the list 'runs'"),
    "a list under two keys": (json.dumps({"data": {"runs": ROWS}}), "the rows stand under 'data'"),
    "one object per line": ("\n".join(map(json.dumps, ROWS)), "one object after the other"),
    "one object on several lines": ("\n".join(json.dumps(r, indent=1) for r in ROWS), "one object after the other"),
    "objects with commas between": (",\n".join(map(json.dumps, ROWS)), "one object after the other"),
    "a list that Python printed": (str(ROWS), "values as Python prints them"),
    "dicts that Python printed": ("\n".join(map(str, ROWS)), "values as Python prints them"),
    "a comma too many": (json.dumps(ROWS)[:-1] + ",]", "values as Python prints them"),
    "a byte order mark": ("\ufeff" + json.dumps(ROWS), ""),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".JSON", ""])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_shape_of_json_gives_the_same_runs(name: str, suffix: str, tmp_path: Path) -> None:
    text, remark = DOCUMENTS[name]
    path = tmp_path / f"runs{suffix}"
    path.write_text(text, encoding="utf-8")
    runs, remarks = import_runs(path)
    check_same(runs)
    assert remark in "\n".join(remarks) or (name == "one object per line" and suffix != ".json")
    if "name" in name and "first" not in name:
        assert runs["run_id"].tolist() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ('{"N": 1, "betas": [0.9, 0.95], "steps": [1, 2]}', ["N", "betas", "steps"]),
        ('{"config": {"lr": 1, "N": 3}, "summary": {"loss": 2}}', ["config.lr", "config.N", "summary.loss"]),
        ('{"lr": {"value": 1}, "N": {"value": 3, "desc": null}}', ["lr", "N"]),
        ('{"config": {"lr": 1}, "summary": {"lr": 2}}', ["config.lr", "summary.lr"]),
    ],
)
def test_an_object_is_one_run_unless_it_is_a_table(text: str, columns: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    cells = read_file(tmp_path / "a.json").cells
    assert cells.columns.tolist() == columns
    assert len(cells) == 1


def test_values_beside_a_list_hold_for_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"N": 7, "layers": [1, 2, 3], "history": [{"step": 1}, {"step": 2, "N": 8}]}')
    assert read_file(tmp_path / "a.json").cells.to_dict("records") == [{"N": 7, "step": 1}, {"N": 8, "step": 2}]
    (tmp_path / "a.json").write_text('{"N": 7, "step": [1, 2, 3, 4], "loss": [9, 8, 7, 6]}')
    assert read_file(tmp_path / "a.json").cells["N"].tolist() == [7] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.to_json(orient="values"), r"lists without names of columns \(pandas' orient='values'\)"),
        ('{"train": [{"a": 1}], "val": [{"a": 1}]}', "the lists train, val hold objects"),
        ('{"N": 1,', "cannot be read as JSON: Expecting property name"),
        ('{"N": 1}\n{"N": 2}\n{"N":\n', "line 3: not JSON"),
        ("[]", "no rows"),
        ("{}", "no rows"),
        ('"text"', "needed a list of runs"),
        ("[1, 2]", "row 0: needed an object"),
        ('[{"a": {"b": 1}, "a.b": 2}]', "row 0: two values for a.b"),
    ],
)
def test_json_without_a_table_is_refused_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_file(tmp_path / "a.json")
    assert "cannot be" in str(error.value)


@pytest.mark.parametrize("printed", [str, json.dumps])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_printed_dicts_are_opened_at_any_depth(suffix: str, printed: Callable[[Any], str], tmp_path: Path) -> None:
    scheduler = printed({"name": "cosine", "lr": 0.003})
    rows = [{"config": {"scheduler": scheduler, "N": 1e8}, "D": 1e9, "loss": loss} for loss in (3.1, 3.0)]
    path = tmp_path / f"runs{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".csv":
        pd.DataFrame([row | {"config": printed(row["config"])} for row in rows]).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    runs, _ = import_runs(path, mapping={"lr": "config.scheduler.lr", "N": "config.N"})
    assert runs["lr"].tolist() == [0.003, 0.003]
    assert runs["loss"].tolist() == [3.1, 3.0]


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + '\n{"N": 8e8, "D": 1e')
    runs, remarks = import_runs(path)
    check_same(runs)
    assert remarks == ["not read: the last line, which is cut off"]
    path.write_text('{"N": 1\n' + "\n".join(map(json.dumps, ROWS)))
    with pytest.raises(ValueError, match="line 1: not JSON"):
        import_runs(path)


def test_many_lines_of_json_are_read_as_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow reads large files; where it would read a cell differently, it must not."""
    r = random.Random(0)
    plain = [{"id": f"{i:03d}", "N": i, "loss": r.lognormvariate(0, 40), "ok": i % 2 == 0} for i in range(300)]
    sparse = [{k: v for k, v in row.items() if r.random() < 0.8} for row in plain]
    kinds = {
        "plain": plain,
        "sparse": sparse,
        "nested": [row | {"config": {"lr": 1}} for row in plain],
        "printed": [row | {"config": "{'lr': 1}"} for row in plain],
        "mixed": [*plain, {"id": 3, "loss": "high"}],
        "dates": [row | {"at": "2024-01-01 00:00:00"} for row in plain],
        "nan": [*plain, {"loss": float("nan")}],
        "lists": [row | {"betas": [1, 2]} for row in plain],
    }
    path = tmp_path / "a.jsonl"
    for name, rows in kinds.items():
        path.write_text("\n".join(map(json.dumps, rows)))
        careful = read_file(path).cells
        monkeypatch.setattr(json_shapes, "LARGE", 0)
        fast = read_file(path).cells
        monkeypatch.undo()
        assert fast.columns.tolist() == careful.columns.tolist(), name
        for column in careful:
            # An empty cell is None or NaN.
            assert [None if c != c else c for c in fast[column].tolist()] == careful[column].tolist(), (name, column)


def test_feather_is_read_like_parquet(tmp_path: Path) -> None:
    for path in (tmp_path / "a.feather", tmp_path / "a.arrow"):
        TABLE.to_feather(path)
        check_same(import_runs(path)[0])
    TABLE.to_parquet(tmp_path / "a.pq")
    check_same(import_runs(tmp_path / "a.pq")[0])
    TABLE.iloc[:0].to_parquet(tmp_path / "a.pq")
    with pytest.raises(ValueError, match=r"cannot be used: no rows \(only the columns N, D, loss\)"):
        read_file(tmp_path / "a.pq")


def test_the_largest_sheet_of_a_workbook_is_read(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    path = tmp_path / "runs.xlsx"
    TABLE.to_excel(path, index=False)
    check_same(import_runs(path)[0])
    with pd.ExcelWriter(path) as workbook:
        pd.DataFrame({"notes": ["none"]}).to_excel(workbook, sheet_name="readme", index=False)
        TABLE.to_excel(workbook, sheet_name="runs", index=False, startrow=3, startcol=2)
        workbook.book["runs"]["C1"] = "Scaling runs of March"
    runs, remarks = import_runs(path)
    check_same(runs)
    assert remarks == [
        "sheet 'runs' is read, the largest; not read: readme",
        "not read: 1 line above the names of the columns",
    ]
    with pd.ExcelWriter(path) as workbook:
        pd.DataFrame().to_excel(workbook, sheet_name="empty")
    with pytest.raises(ValueError, match="no rows"):
        import_runs(path)
    path.write_text("no workbook")
    with pytest.raises(ValueError, match="cannot be read as a workbook of Excel"):
        import_runs(path)


@pytest.mark.parametrize(("module", "name"), [("openpyxl", "a.xlsx"), ("tensorboard", "events.out.tfevents.1")])
def test_a_missing_extra_is_named(module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"PK")
    for loaded in [m for m in sys.modules if m == module or m.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    extra = {"openpyxl": "excel"}.get(module, module)
    with pytest.raises(ValueError, match=rf"cannot be read: .*pip install .muscale\[{extra}\]"):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.pkl", "a pickle may run any code"),
        ("a.PT", "needed is what was logged while it was trained"),
        ("a.safetensors", "needed is what was logged"),
        ("a.pdf", "copy the numbers into a table"),
        ("a.npz", "arrays have no names of columns"),
        ("a.tar.gz", "unpack it first"),
        ("a.ods", r"save the sheet as \.xlsx or \.csv"),
        ("mlflow.db", "--tracking-uri sqlite:///FILE"),
        ("a.log", "it is neither a table nor a log with lines such as 'step 100: train loss 3.2"),
        ("a.out", "neither a table nor a log"),
        ("a", "neither a table nor a log"),
    ],
)
def test_what_is_no_table_is_refused_with_what_it_has_to_become(name: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("loading\nready\n")
    assert is_table_file(tmp_path / name)
    with pytest.raises(ValueError, match=remedy) as error:
        import_runs(tmp_path / name)
    message = str(error.value)
    assert "cannot be read" in message
    # The sample is a table itself.
    sample = "\n".join(line.strip() for line in message.splitlines()[-2:])
    (tmp_path / "sample.csv").write_text(sample)
    assert import_runs(tmp_path / "sample.csv")[0]["loss"].tolist() == [3.1]


def test_the_only_file_in_an_archive_is_read(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv.zip"
    TABLE.to_csv(path, index=False)
    check_same(import_runs(path)[0])
    with zipfile.ZipFile(tmp_path / "runs.zip", "w") as archive:
        archive.writestr("folder/runs.JSON", json.dumps(ROWS))
    check_same(import_runs(tmp_path / "runs.zip")[0])
    with zipfile.ZipFile(tmp_path / "runs.zip", "a") as archive:
        archive.writestr("other.csv", PLAIN)
    with pytest.raises(ValueError, match=r"it holds 2 files: unpack it\. A folder"):
        import_runs(tmp_path / "runs.zip")
    path.write_text("no archive")
    with pytest.raises(ValueError, match="the compressed data is damaged"):
        import_runs(path)


def test_an_archive_with_a_password_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "runs.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("runs.csv", PLAIN)
    data = bytearray(path.read_bytes())
    # Bit 0 of the flags, in the header of the file and in the directory of the archive.
    for place in (6, data.index(b"PK\x01\x02") + 8):
        data[place] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"password required for extraction\. Unpack it") as error:
        import_runs(path)
    assert "damaged" not in str(error.value)


def test_the_sample_table_in_a_message_needs_no_pickle_to_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="a pickle may run any code"):
        read_file(path)
    assert not (tmp_path / "ran").exists()


def test_telling_a_file_from_an_experiment_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom scaling.runs.readers import is_table_file\n"
        "assert is_table_file('a.csv') and is_table_file('a.TSV.gz') and not is_table_file('quickstart')\n"
        "print(sorted({'pandas', 'numpy', 'pyarrow', 'mlflow', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
