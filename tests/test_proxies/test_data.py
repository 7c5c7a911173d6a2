from __future__ import annotations

import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from proxies.data import BLOCK, DRAW, Windows, check_corpus, held_out, load_corpus


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
    began = time.perf_counter()
    assert load_corpus("stdlib") is first
    assert time.perf_counter() - began < 0.01


def test_a_folder_skips_what_is_hidden_or_not_text(folder: Path) -> None:
    (folder / ".hidden").write_text(words(100))
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text(words(100))
    (folder / "image.png").write_bytes(bytes([0xFF, 0xFE, 0x80]) * 100)
    corpus = load_corpus(str(folder))
    assert len(corpus.files) == 60
    train, val = corpus.train.tobytes().decode(), corpus.val.tobytes().decode()
    for file in corpus.files:
        mark = f"<{Path(file.path).stem}>"
        assert (mark in train, mark in val) == (file.split == "train", file.split == "val")
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
    assert len(hashes) == 3  # the faithful copy has the hash of the original


def test_one_text_file_is_split_into_disjoint_blocks(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    content = "".join(f"{i:07d}\n" for i in range(64 * BLOCK // 8))  # every eight bytes are unique
    path.write_text(content)
    corpus = load_corpus(str(path))
    train = {corpus.train[i : i + 8].tobytes() for i in range(0, len(corpus.train), 8)}
    val = {corpus.val[i : i + 8].tobytes() for i in range(0, len(corpus.val), 8)}
    assert not train & val
    assert len(train) + len(val) == 64 * BLOCK // 8
    assert corpus.val[:BLOCK].tobytes().decode() == content[BLOCK : 2 * BLOCK]


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
    whole_x, whole_y = Windows(tokens, 16, seed=3).batch(0, DRAW + 50)
    windows = Windows(tokens, 16, seed=3)
    # out of order, across the seam of two draws, in batches of several sizes
    for start, n in ((DRAW - 5, 20), (0, 7), (DRAW + 1, 3), (100, 64)):
        x, y = windows.batch(start, n)
        assert torch.equal(x, whole_x[start : start + n])
        assert torch.equal(y, whole_y[start : start + n])
    assert x.dtype == torch.int64
    assert torch.equal(whole_x[:, 1:], whole_y[:, :-1])  # y is x one token later
    assert torch.equal(whole_y[:, -1], whole_x[:, 0] + 16)


def test_windows_reach_both_ends_and_differ_by_seed() -> None:
    tokens = np.arange(20, dtype=np.uint8)
    x, y = Windows(tokens, 16, seed=0).batch(0, 200)
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3}
    assert int(y.max()) == 19
    far = np.zeros(10**6, dtype=np.uint8)
    assert (Windows(far, 16, 0).offsets(0, 100) != Windows(far, 16, 1).offsets(0, 100)).all()


def test_held_out_windows_are_evenly_spaced() -> None:
    x, y = held_out(np.arange(1001, dtype=np.uint16), 10, 100)
    starts = x[:, 0]
    assert starts[0] == 0
    assert y[-1, -1] == 1000
    assert set(torch.diff(starts).tolist()) <= {10, 11, 9}
    assert torch.equal(held_out(np.arange(11, dtype=np.uint16), 10, 2)[0], torch.arange(10).repeat(2, 1))


def test_too_few_tokens_for_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="more than seq_len = 16"):
        Windows(np.zeros(16, dtype=np.uint8), 16, 0)
    with pytest.raises(ValueError, match="validation"):
        held_out(np.zeros(16, dtype=np.uint8), 16, 4)
    with pytest.raises(ValueError, match="seed >= 0"):
        Windows(np.zeros(100, dtype=np.uint8), 16, -1)
