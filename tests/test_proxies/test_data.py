"""Corpora of text and of token files: how they are read, split, hashed and checked; and their windows."""

from __future__ import annotations

import os
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proxies.data import token_files as on_disk
from proxies.data import token_formats
from proxies.data.corpora import check_corpus, load_cached, load_corpus
from proxies.data.sources import BLOCK_BYTES, measure_sizes
from proxies.data.token_files import remember
from proxies.data.windows import DRAW_BLOCK, Windows, cut_held_out


def words(n: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(["alpha", "beta", "gamma", "delta"], size=n))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(60):
        (tmp_path / f"part{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"part{i % 3}" / f"{i}.txt").write_text(f"<{i}>" + words(50, i))
    return tmp_path


def test_the_standard_library_is_read_from_this_python_and_split_by_file() -> None:
    corpus = load_corpus("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    content = dict.fromkeys(("train", "val"), b"")
    for file in corpus.files[:40]:
        content[file.split] += (root / file.path).read_bytes()
    assert corpus.train[: len(content["train"])].tobytes() == content["train"]
    assert corpus.val[: len(content["val"])].tobytes() == content["val"]
    assert [f.path for f in corpus.files] == sorted(f.path for f in corpus.files)
    assert not any("site-packages" in f.path or f.path.startswith("/") for f in corpus.files)
    assert "dataclasses.py" in {f.path for f in corpus.files}
    assert len(corpus.train) + len(corpus.val) == sum(f.size for f in corpus.files)
    assert 0.04 < len(corpus.val) / (len(corpus.train) + len(corpus.val)) < 0.11
    assert check_corpus("stdlib", vocab=256, seq_len=128) == []


def test_a_corpus_is_read_once_per_process() -> None:
    first = load_corpus("stdlib")
    start = time.perf_counter()
    assert load_corpus("stdlib") is first
    assert time.perf_counter() - start < 0.01


def test_a_folder_skips_what_is_hidden_or_not_text(folder: Path) -> None:
    (folder / ".hidden").write_text(words(100))
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text(words(100))
    (folder / "image.png").write_bytes(bytes([0xFF, 0xFE, 0x80]) * 100)
    corpus = load_corpus(str(folder))
    assert len(corpus.files) == 60
    train, val = corpus.train.tobytes().decode(), corpus.val.tobytes().decode()
    for file in corpus.files:
        marker = f"<{Path(file.path).stem}>"
        assert (marker in train, marker in val) == (file.split == "train", file.split == "val")
    assert {f.split for f in corpus.files} == {"train", "val"}


def test_a_changed_byte_or_name_changes_the_hash(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    hashes = {load_corpus(str(folder)).sha256}
    for change in ("none", "byte", "name"):
        copy = tmp_path_factory.mktemp(change) / "corpus"
        for file in load_corpus(str(folder)).files:
            (copy / file.path).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.path).write_bytes((folder / file.path).read_bytes())
        if change == "byte":
            (copy / "part0" / "0.txt").write_text("!" + (copy / "part0" / "0.txt").read_text()[1:])
        if change == "name":
            (copy / "part0" / "0.txt").rename(copy / "part0" / "zero.txt")
        hashes.add(load_corpus(str(copy)).sha256)
    # The exact copy has the hash of the original.
    assert len(hashes) == 3


def test_one_text_file_is_split_into_disjoint_blocks(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    # Every eight bytes are unique.
    content = "".join(f"{i:07d}\n" for i in range(64 * BLOCK_BYTES // 8))
    path.write_text(content)
    corpus = load_corpus(str(path))
    train = {corpus.train[i : i + 8].tobytes() for i in range(0, len(corpus.train), 8)}
    val = {corpus.val[i : i + 8].tobytes() for i in range(0, len(corpus.val), 8)}
    assert not train & val
    assert len(train) + len(val) == 64 * BLOCK_BYTES // 8
    assert corpus.val[:BLOCK_BYTES].tobytes().decode() == content[BLOCK_BYTES : 2 * BLOCK_BYTES]


def test_tokens_stay_memory_mapped_and_must_fit_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    tokens = np.random.default_rng(0).integers(0, 1000, size=5000).astype("<u2")
    tokens.tofile(path)
    corpus = load_corpus(str(path), vocab=1000)
    assert isinstance(corpus.train, np.memmap)
    np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.val]), tokens)
    assert check_corpus(str(path), vocab=1000, seq_len=128) == []
    assert "below vocab = 500" in check_corpus(str(path), vocab=500)[0]
    with pytest.raises(ValueError, match="below vocab = 500"):
        load_corpus(str(path), vocab=500)


def write_with_header(path: Path, magic: int, version: int, tokens: NDArray[Any]) -> None:
    """Write a token file as llm.c does: 256 int32, then the tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def test_the_width_of_tokens_is_known_by_name_or_header(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 100_000, size=5000)
    small = tokens % 50_000
    tokens.astype("<u4").tofile(tmp_path / "wide.u32.bin")
    tokens.astype("<u4").tofile(tmp_path / "wide.uint32.bin")
    write_with_header(tmp_path / "llama.bin", 20240801, 7, tokens.astype("<u4"))
    write_with_header(tmp_path / "gpt.bin", 20240520, 1, small.astype("<u2"))
    small.astype("<u2").tofile(tmp_path / "plain.bin")
    small.astype("<u2").tofile(tmp_path / "plain.u16.bin")
    small.astype(">u2").tofile(tmp_path / "swapped.u16be.bin")
    tokens.astype("<i8").tofile(tmp_path / "wider.i64.bin")
    np.save(tmp_path / "array.npy", tokens)
    np.save(tmp_path / "rows.npy", small.astype(">i4").reshape(50, 100))
    for name, expected, vocab in (
        ("wide.u32.bin", tokens, 100_000),
        ("wide.uint32.bin", tokens, 100_000),
        ("wider.i64.bin", tokens, 100_000),
        ("array.npy", tokens, 100_000),
        ("rows.npy", small, 50_000),
        ("llama.bin", tokens, 100_000),
        ("gpt.bin", small, 100_000),
        ("swapped.u16be.bin", small, 50_000),
        ("plain.u16.bin", small, 100_000),
        ("plain.bin", small, 50_000),
    ):
        corpus = load_corpus(str(tmp_path / name), vocab=vocab)
        np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.val]), expected)
        x, y = Windows(corpus.train, 16, 0).batch(0, 4)
        assert x.dtype == y.dtype == torch.int64
        assert isinstance(corpus.train, np.memmap)
    assert corpus.bytes_per_token is None


def test_a_folder_with_train_and_val_tokens_is_split_as_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {"train": rng.integers(0, 99, 3000), "val": rng.integers(0, 99, 400)}
    for name, tokens in parts.items():
        tokens.astype("<u2").tofile(tmp_path / f"{name}.bin")
    corpus = load_corpus(str(tmp_path), vocab=100)
    np.testing.assert_array_equal(corpus.train, parts["train"])
    np.testing.assert_array_equal(corpus.val, parts["val"])
    assert [(f.path, f.split) for f in corpus.files] == [("train.bin", "train"), ("val.bin", "val")]
    assert "validation part, got 400" in check_corpus(str(tmp_path), vocab=100, seq_len=500)[0]


def test_token_files_that_disagree_with_themselves_are_refused(tmp_path: Path) -> None:
    tokens = np.arange(1, 3001)
    write_with_header(tmp_path / "cut.bin", 20240520, 1, tokens.astype("<u2"))
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-2])
    tokens.astype("<u4").tofile(tmp_path / "wide.bin")
    (tmp_path / "odd.u32.bin").write_bytes(b"abcdef")
    (tmp_path / "empty.bin").touch()
    for name, message in (
        ("cut.bin", "the header of .* promises"),
        ("wide.bin", r"look like uint32 .*: name it wide\.u32\.bin"),
        ("odd.u32.bin", "uint32 tokens, four bytes each"),
        ("empty.bin", "got nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_corpus(str(tmp_path / name), vocab=10_000)


def test_a_token_that_no_sample_sees_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_formats, "SCAN_TOKENS", 10)
    tokens = np.ones(1000, "<u2")
    tokens[300] = 500
    tokens.tofile(tmp_path / "x.bin")
    assert check_corpus(str(tmp_path / "x.bin"), vocab=256) == []
    with pytest.raises(ValueError, match="below vocab = 256, got 500"):
        load_corpus(str(tmp_path / "x.bin"))


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(on_disk, "REMEMBER_ABOVE", 100)
    monkeypatch.setattr(on_disk, "SETTLED_NS", 0)
    path = tmp_path / "x.bin"
    path.write_bytes(b"a" * 1000)
    contents: list[bytes] = []

    def compute() -> dict[str, str]:
        contents.append(path.read_bytes())
        return {"first": chr(contents[-1][0])}

    assert [remember([path], "first", compute) for _ in range(3)] == [{"first": "a"}] * 3
    assert len(contents) == 1
    before = path.stat()
    # Longer than the clock's tick.
    time.sleep(0.02)
    path.write_bytes(b"b" * 1000)
    # Size and mtime are the same; only ctime shows the change.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert remember([path], "first", compute) == {"first": "b"}
    assert remember([path], "another question", compute) == {"first": "b"}
    assert len(contents) == 3


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(on_disk, "REMEMBER_ABOVE", 100)
    path = tmp_path / "x.bin"
    path.write_bytes(b"a" * 1000)
    calls = [remember([path], "n", lambda: {"n": len(path.read_bytes())}) for _ in range(2)]
    assert calls == [{"n": 1000}] * 2
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_a_remembered_digest_is_the_computed_one_and_belongs_to_one_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(on_disk, "REMEMBER_ABOVE", 100)
    monkeypatch.setattr(on_disk, "SETTLED_NS", 0)
    path = tmp_path / "x.bin"
    np.arange(5000).astype("<u2").tofile(path)
    first = load_corpus(str(path), vocab=5000)
    for _ in range(2):
        load_cached.cache_clear()
        assert load_corpus(str(path), vocab=5000).sha256 == first.sha256
    load_cached.cache_clear()
    monkeypatch.setattr(token_formats, "SCAN_TOKENS", 10)
    # The remembered check was for another vocabulary.
    with pytest.raises(ValueError, match="below vocab = 4990"):
        load_corpus(str(path), vocab=4990)


def test_a_text_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"plain text \xff\xfe " * 1000)
    with pytest.raises(ValueError, match="needed utf-8 text, got other bytes"):
        load_corpus(str(tmp_path / "x.txt"))


def test_the_estimated_sizes_of_the_parts_of_a_large_file_are_about_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_bytes(b"a" * (4000 * BLOCK_BYTES))
    exact = measure_sizes(str(tmp_path / "x.txt"))
    monkeypatch.setattr("proxies.data.sources.EXACT_SIZE_LIMIT", 1000)
    estimate = measure_sizes(str(tmp_path / "x.txt"))
    assert sum(estimate.values()) == sum(exact.values())
    assert estimate["val"] == pytest.approx(exact["val"], rel=0.15)


def test_no_character_is_cut_between_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    content = "a" + "東京🙂é" * 8000
    path.write_text(content, encoding="utf-8")
    corpus = load_corpus(str(path))
    train, val = corpus.train.tobytes().decode(), corpus.val.tobytes().decode()
    assert len(train) + len(val) == len(content)
    assert len(val) > 1000


def test_problems_are_found_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "only.txt").write_text(words(1000))
    assert "no such path" in check_corpus(str(tmp_path / "missing"))[0]
    assert "only empty ones" in check_corpus(str(tmp_path / "empty"))[0]
    assert "validation part, got 0" in check_corpus(str(tmp_path / "short.txt"), seq_len=5)[0]
    assert "two bytes each" in check_corpus(str(tmp_path / "odd.bin"))[0]
    assert "add files" in check_corpus(str(tmp_path / "one"))[0]
    assert "vocab >= 256, got 100" in check_corpus("stdlib", vocab=100)[0]
    assert "more than seq_len" in check_corpus("stdlib", seq_len=10**9)[0]
    with pytest.raises(ValueError, match="no such path"):
        load_corpus(str(tmp_path / "missing"))


def test_windows_do_not_depend_on_how_they_are_batched() -> None:
    tokens = np.arange(60_000, dtype=np.uint16)
    whole_x, whole_y = Windows(tokens, 16, seed=3).batch(0, DRAW_BLOCK + 50)
    windows = Windows(tokens, 16, seed=3)
    # Out of order, across the boundary of two draws, in batches of several sizes.
    for start, n in ((DRAW_BLOCK - 5, 20), (0, 7), (DRAW_BLOCK + 1, 3), (100, 64)):
        x, y = windows.batch(start, n)
        assert torch.equal(x, whole_x[start : start + n])
        assert torch.equal(y, whole_y[start : start + n])
    assert x.dtype == torch.int64
    # y is x one token later.
    assert torch.equal(whole_x[:, 1:], whole_y[:, :-1])
    assert torch.equal(whole_y[:, -1], whole_x[:, 0] + 16)


def test_windows_reach_both_ends_and_differ_by_seed() -> None:
    tokens = np.arange(20, dtype=np.uint8)
    x, y = Windows(tokens, 16, seed=0).batch(0, 200)
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3}
    assert int(y.max()) == 19
    long = np.zeros(10**6, dtype=np.uint8)
    assert (Windows(long, 16, 0).offsets(0, 100) != Windows(long, 16, 1).offsets(0, 100)).all()


def test_held_out_windows_are_evenly_spaced() -> None:
    x, y = cut_held_out(np.arange(1001, dtype=np.uint16), 10, 100)
    starts = x[:, 0]
    assert starts[0] == 0
    assert y[-1, -1] == 1000
    assert set(torch.diff(starts).tolist()) <= {10, 11, 9}
    assert torch.equal(cut_held_out(np.arange(11, dtype=np.uint16), 10, 2)[0], torch.arange(10).repeat(2, 1))


def test_too_few_tokens_for_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="more than seq_len = 16"):
        Windows(np.zeros(16, dtype=np.uint8), 16, 0)
    with pytest.raises(ValueError, match="validation"):
        cut_held_out(np.zeros(16, dtype=np.uint8), 16, 4)
    with pytest.raises(ValueError, match="seed >= 0"):
        Windows(np.zeros(100, dtype=np.uint8), 16, -1)
