"""Data sets of rows: parquet, jsonl, saved to disk. The tests make them and read them without a network."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest

from proxies.data.corpora import check_corpus, load_cached, load_corpus
from proxies.data.sources import is_held_out_block

ROWS = [f"<{i}> été {'word ' * (i % 7 + 3)}" for i in range(400)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSCALE_CACHE", str(tmp_path / "cache"))
    load_cached.cache_clear()


def write_dataset(kind: str, folder: Path, table: dict[str, list[Any]]) -> str:
    """Write a table in one of the formats and return its corpus setting."""
    data = datasets.Dataset.from_dict(table)
    if kind == "jsonl":
        names = list(table)
        rows = [json.dumps(dict(zip(names, row, strict=True))) for row in zip(*table.values(), strict=True)]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        return str(folder / "rows.jsonl")
    if kind == "parquet":
        data.to_parquet(folder / "rows.parquet")
        return str(folder / "rows.parquet")
    if kind == "saved":
        data.save_to_disk(folder / "saved")
        return str(folder / "saved")
    datasets.DatasetDict({"train": data, "test": data.select(range(30))}).save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "splits"])
def test_rows_are_read_as_lines_and_split_by_their_number(kind: str, tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    spec = write_dataset(kind, tmp_path, {"id": list(range(400)), "text": ROWS})
    corpus = load_corpus(spec)
    lines = {
        held: "".join(r + "\n" for i, r in enumerate(ROWS) if is_held_out_block(i) == held) for held in (False, True)
    }
    assert corpus.train.tobytes().decode() == lines[False]
    assert corpus.val.tobytes().decode() == lines[True]
    assert check_corpus(spec, seq_len=32) == []
    assert all(f.split == "both" for f in corpus.files)
    assert len(corpus.sha256) == 64


def test_all_formats_of_the_same_rows_have_one_hash(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    hashes = {load_corpus(write_dataset(k, tmp_path, {"text": ROWS})).sha256 for k in ("jsonl", "parquet", "saved")}
    assert len(hashes) == 1
    load_cached.cache_clear()
    assert load_corpus(write_dataset("jsonl", tmp_path, {"text": ROWS[1:]})).sha256 not in hashes


def test_a_column_and_a_split_can_be_named(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    spec = write_dataset("splits", tmp_path, {"body": ROWS})
    assert load_corpus(f"{spec}::test:body").train.tobytes().startswith(ROWS[0].encode())
    assert "needed a column 'text' of text" in check_corpus(spec)[0]
    assert "got body: name it, hf:" in check_corpus(spec)[0]
    assert "needed a split 'valid', got train, test" in check_corpus(f"{spec}::valid:body")[0]


def test_a_data_set_without_text_is_refused(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    spec = write_dataset("parquet", tmp_path, {"text": list(range(50))})
    assert "needed text in column 'text'" in check_corpus(spec)[0]
    with pytest.raises(ValueError, match="got int64"):
        load_corpus(spec)
    spec = write_dataset("saved", tmp_path, {"text": ["", ""] * 20})
    with pytest.raises(ValueError, match="got nothing"):
        load_corpus(spec)


def test_rows_are_tokenized_too(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    corpus = load_corpus(write_dataset("saved", tmp_path, {"text": ROWS}), vocab=300, tokenizer="bpe")
    assert isinstance(corpus.train, np.memmap)
    assert corpus.bytes_per_token is not None
    assert corpus.bytes_per_token > 1.5


def test_a_missing_or_broken_data_set_is_refused(tmp_path: Path) -> None:
    assert "no such path" in check_corpus(str(tmp_path / "none.parquet"))[0]
    assert "no such path" in check_corpus(f"hf:{tmp_path / 'none'}")[0]
    assert "needed 'hf:NAME[:CONFIG][:SPLIT][:COLUMN]'" in check_corpus("hf:a:b:c:d:e")[0]
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    assert "cannot open data set" in check_corpus(str(tmp_path / "bad.parquet"))[0]


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_dataset("jsonl", tmp_path, {"text": ROWS})
    monkeypatch.setitem(sys.modules, "datasets", None)
    for corpus in (spec, "hf:somebody/something"):
        assert "needed the package datasets" in check_corpus(corpus)[0]
        assert "pip install 'muscale[data]'" in check_corpus(corpus)[0]


def write_rows(path: Path, rows: list[str], column: str = "text") -> None:
    """Write JSON lines, compressed as the name says."""
    path.parent.mkdir(exist_ok=True)
    content = "".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet"])
def test_a_folder_of_rows_is_read_file_by_file(ending: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    for i, part in enumerate((ROWS[:150], ROWS[150:])):
        name = f"shard_{i:05d}{ending}"
        if ending == ".parquet":
            folder.mkdir(exist_ok=True)
            datasets.Dataset.from_dict({"text": part}).to_parquet(folder / name)
        else:
            write_rows(folder / name, part)
    (folder / "README.md").write_text("rows")
    assert check_corpus(str(folder), seq_len=32) == []
    corpus = load_corpus(str(folder))
    expected = "".join(row + "\n" for i, row in enumerate(ROWS) if not is_held_out_block(i))
    assert corpus.train.tobytes().decode() == expected
    assert [file.path for file in corpus.files] == [f"shard_0000{i}{ending}" for i in range(2)]
    # One file alone is read, too.
    assert load_corpus(str(folder / f"shard_00000{ending}")).train.tobytes().decode() in expected


def test_files_of_rows_whose_names_say_what_they_are_for_are_split_so(tmp_path: Path) -> None:
    for i, part in enumerate((ROWS[:150], ROWS[150:300])):
        write_rows(tmp_path / "rows" / f"train-{i:05d}-of-00002.jsonl", part)
    write_rows(tmp_path / "rows" / "validation-00000-of-00001.jsonl", ROWS[300:])
    corpus = load_corpus(str(tmp_path / "rows"))
    assert corpus.train.tobytes().decode() == "".join(row + "\n" for row in ROWS[:300])
    assert corpus.val.tobytes().decode() == "".join(row + "\n" for row in ROWS[300:])
    assert [file.split for file in corpus.files] == ["train", "train", "val"]


def test_a_folder_of_rows_with_another_column_says_how_to_name_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows" / "a.jsonl", ROWS, "content")
    [problem] = check_corpus(str(tmp_path / "rows"))
    remedy = f"hf:{tmp_path / 'rows'}:::content"
    assert problem.endswith(f"name it, {remedy}")
    assert load_corpus(remedy).train.tobytes().startswith(ROWS[0].encode())


def test_rows_of_two_formats_or_among_text_are_not_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "rows" / "a.jsonl", ROWS)
    datasets.Dataset.from_dict({"text": ROWS * 3}).to_parquet(tmp_path / "rows" / "b.parquet")
    assert "needed rows of one format, got .jsonl and .parquet" in check_corpus(str(tmp_path / "rows"))[0]
    write_rows(tmp_path / "mixed" / "a.jsonl", ROWS)
    for i in range(40):
        (tmp_path / "mixed" / f"{i}.txt").write_text("word " * 200)
    with caplog.at_level("WARNING", logger="muscale"):
        load_corpus(str(tmp_path / "mixed"))
    assert "its files of rows are read as plain text" in caplog.text
