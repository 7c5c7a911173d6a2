"""Files of tokens as other programs write them: their width, their headers, their shards."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from proxies.data.corpora import check_corpus, load_cached, load_corpus
from proxies.data.token_shards import JoinedTokens
from proxies.data.token_width import recognize_type
from proxies.data.windows import Windows

TYPES = ("<u2", ">u2", "<u4", ">u4", "<i8", ">i8")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSCALE_CACHE", str(tmp_path / "cache"))
    load_cached.cache_clear()


def make_tokens(kind: str, n: int = 20_000) -> tuple[NDArray[np.int64], int]:
    """Return tokens and the size of their vocabulary."""
    rng = np.random.default_rng(0)
    ranks = rng.zipf(1.2, n) - 1
    return {
        "words": (np.minimum(ranks, 50_256), 50_257),
        "large": (np.minimum(ranks, 127_999), 128_000),
        "uniform": (rng.integers(0, 50_257, n), 50_257),
        "uniform large": (rng.integers(0, 256_000, n), 256_000),
        "letters": (rng.choice(65, n, p=np.arange(65, 0, -1) / 2145), 65),
        "bases": (rng.integers(0, 4, n), 4),
        "counting": (np.arange(n) % 5000, 5000),
    }[kind]


@pytest.mark.parametrize("kind", ["words", "large", "uniform", "uniform large", "letters", "bases", "counting"])
@pytest.mark.parametrize("dtype", TYPES)
def test_tokens_of_another_width_are_noticed_whatever_they_are(kind: str, dtype: str, tmp_path: Path) -> None:
    tokens, vocab = make_tokens(kind)
    if vocab > np.iinfo(dtype).max:
        pytest.skip("the type cannot hold them")
    tokens.astype(dtype).tofile(tmp_path / "tokens.bin")
    problems = check_corpus(str(tmp_path / "tokens.bin"), vocab=vocab, seq_len=16)
    if dtype == "<u2":
        assert problems == []
        return
    width = {"2": "u16", "4": "u32", "8": "i64"}[dtype[2]] + ("be" if dtype[0] == ">" else "")
    assert f"name it tokens.{width}.bin" in problems[0]
    # The remedy works, and so does the other one.
    (tmp_path / "tokens.bin").rename(tmp_path / f"tokens.{width}.bin")
    np.save(tmp_path / "tokens.npy", tokens.astype(dtype))
    for name in (f"tokens.{width}.bin", "tokens.npy"):
        corpus = load_corpus(str(tmp_path / name), vocab=vocab)
        np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.val]), tokens)


def test_a_plain_file_cannot_hold_a_vocabulary_beyond_16_bits(tmp_path: Path) -> None:
    np.random.default_rng(0).integers(0, 60_000, 5000).astype("<u2").tofile(tmp_path / "x.bin")
    [problem] = check_corpus(str(tmp_path / "x.bin"), vocab=100_000)
    assert "vocabulary of 100,000" in problem
    assert "name it x.u32.bin" in problem
    assert "set vocab to at most 65,536" in problem
    (tmp_path / "x.bin").rename(tmp_path / "x.u16.bin")
    assert check_corpus(str(tmp_path / "x.u16.bin"), vocab=100_000) == []


@pytest.mark.parametrize("stated", ["u32", "u16"])
def test_a_name_that_states_another_width_is_noticed(stated: str, tmp_path: Path) -> None:
    tokens, vocab = make_tokens("words")
    tokens.astype("<i8").tofile(tmp_path / f"x.{stated}.bin")
    [problem] = check_corpus(str(tmp_path / f"x.{stated}.bin"), vocab=vocab)
    assert "as its name states" in problem
    assert "look like int64 (eight bytes each)" in problem
    assert "name it x.i64.bin" in problem


def test_files_of_bytes_text_and_floats_are_named(tmp_path: Path) -> None:
    letters, _ = make_tokens("letters")
    words, vocab = make_tokens("words")
    letters.astype("u1").tofile(tmp_path / "bytes.bin")
    words.astype("<f4").tofile(tmp_path / "floats.bin")
    (tmp_path / "text.bin").write_text("the quick brown fox\n" * 500)
    for name, message in (
        ("bytes.bin", r"look like uint8 \(one byte each\).*name it bytes\.u8\.bin"),
        ("floats.bin", r"numbers of type float32: convert it"),
        ("text.bin", r"bytes are text: name text \.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            load_corpus(str(tmp_path / name), vocab=vocab)
    (tmp_path / "bytes.bin").rename(tmp_path / "bytes.u8.bin")
    corpus = load_corpus(str(tmp_path / "bytes.u8.bin"), vocab=65)
    np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.val]), letters)


def test_small_tokens_that_alternate_are_no_halves_of_larger_ones(tmp_path: Path) -> None:
    """As sums are written: a digit, an operator, a digit, ..."""
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.integers(0, 10, 5000), rng.integers(10, 13, 5000)], axis=1).ravel()
    tokens.astype("<u2").tofile(tmp_path / "sums.bin")
    assert check_corpus(str(tmp_path / "sums.bin"), vocab=13) == []


@pytest.mark.parametrize("kind", ["words", "uniform", "letters", "bases", "counting"])
def test_nothing_is_recognized_in_few_tokens_or_constant_ones(kind: str) -> None:
    tokens, _ = make_tokens(kind, 30)
    assert recognize_type(tokens.astype("<u2").tobytes()) is None
    assert recognize_type(np.full(1000, 7, "<u2").tobytes()) is None


def test_marks_for_padding_are_named(tmp_path: Path) -> None:
    tokens, vocab = make_tokens("words")
    tokens[::50] = -100
    tokens.astype("<i4").tofile(tmp_path / "x.u32.bin")
    np.save(tmp_path / "x.npy", tokens)
    for name in ("x.u32.bin", "x.npy"):
        [problem] = check_corpus(str(tmp_path / name), vocab=vocab)
        assert f"below vocab = {vocab}, got -100 in" in problem
        assert "padding" in problem


def test_files_that_hold_no_plain_tokens_say_what_they_are(tmp_path: Path) -> None:
    tokens, vocab = make_tokens("words")
    (tmp_path / "packed.bin").write_bytes(gzip.compress(tokens.astype("<u2").tobytes()))
    np.savez(tmp_path / "x.npz", tokens)
    (tmp_path / "x.npz").rename(tmp_path / "zip.bin")
    np.save(tmp_path / "floats.npy", tokens.astype(float))
    np.save(tmp_path / "cube.npy", tokens.reshape(20, 10, 100))
    header = np.zeros(256, "<i4")
    header[:3] = 777, 1, len(tokens)
    (tmp_path / "header.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    header[:3] = 20240520, 9, len(tokens)
    (tmp_path / "version.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    for name, message in (
        ("packed.bin", "compressed with gzip, .*: unpack it with gunzip"),
        ("zip.bin", "a zip archive"),
        ("floats.npy", "whole numbers, got float64"),
        ("cube.npy", r"got shape \(20, 10, 100\)"),
        ("header.bin", r"another header of 1,024 bytes, \[777, 1, 20000\]"),
        ("version.bin", "version 1 of the header .* got version 9"),
    ):
        with pytest.raises(ValueError, match=message):
            load_corpus(str(tmp_path / name), vocab=vocab)


def write_with_header(path: Path, tokens: NDArray[Any], *, wide: bool = False) -> None:
    """Write a shard as llm.c and modded-nanogpt do: 256 int32, then the tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = (20240801, 7, len(tokens)) if wide else (20240520, 1, len(tokens))
    path.write_bytes(header.tobytes() + tokens.astype("<u4" if wide else "<u2").tobytes())


def write_megatron(path: Path, tokens: NDArray[Any], dtype: str, code: int) -> None:
    """Write a data set as Megatron and NeMo do: the tokens, and an index of two documents beside them."""
    tokens.astype(dtype).tofile(path)
    lengths = np.array([100, len(tokens) - 100], "<i4")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, 2, 3)
    rest = np.array([0, 100 * np.dtype(dtype).itemsize], "<i8").tobytes() + np.arange(3).astype("<i8").tobytes()
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + rest)


PARTS = {"train": [np.arange(3000) % 997, np.arange(2000) % 991], "val": [np.arange(700) % 983]}


def write_shards(layout: str, folder: Path) -> None:
    """Write PARTS as one of the common layouts."""
    folder.mkdir()
    for split, parts in PARTS.items():
        for i, tokens in enumerate(parts):
            # Sorted as text, 10 would come before 9.
            number = 9 + i
            if layout in ("llm.c", "llm.c, wide"):
                write_with_header(folder / f"fineweb_{split}_{number}.bin", tokens, wide=layout.endswith("wide"))
            elif layout == "numpy":
                np.save(folder / f"edufineweb_{split}_{i:06d}.npy", tokens.astype(np.uint16))
            elif layout == "plain":
                tokens.astype("<u2").tofile(folder / f"{split}-{i:05d}-of-00002.bin")
            elif layout == "stated":
                tokens.astype("<i8").tofile(folder / f"{split}_{number}.i64.bin")
            elif layout == "folders":
                (folder / split).mkdir(exist_ok=True)
                tokens.astype("<u2").tofile(folder / split / f"{number}.bin")
            else:
                name = {"train": "training", "val": "valid"}[split]
                write_megatron(folder / f"{name}_{i}_text_document.bin", tokens, "<i4", 4)


@pytest.mark.parametrize("layout", ["llm.c", "llm.c, wide", "numpy", "plain", "stated", "folders", "megatron"])
def test_shards_for_training_are_read_in_order_and_those_for_validation_apart(layout: str, tmp_path: Path) -> None:
    write_shards(layout, tmp_path / "shards")
    # What lies beside tokens does not matter.
    (tmp_path / "shards" / "README.md").write_text("tokens")
    (tmp_path / "shards" / "meta.pkl").write_bytes(b"\x80\x04\x95")
    assert check_corpus(str(tmp_path / "shards"), vocab=1000, seq_len=64) == []
    corpus = load_corpus(str(tmp_path / "shards"), vocab=1000)
    np.testing.assert_array_equal(np.asarray(corpus.train), np.concatenate(PARTS["train"]))
    np.testing.assert_array_equal(np.asarray(corpus.val), np.concatenate(PARTS["val"]))
    assert [file.split for file in corpus.files] == ["train", "train", "val"]
    assert len(corpus.sha256) == 64


def test_joined_shards_give_the_windows_of_one_array() -> None:
    parts = [np.arange(start, stop, dtype=np.uint16) for start, stop in ((0, 700), (700, 703), (703, 5000))]
    joined, whole = JoinedTokens(parts), np.concatenate(parts)
    assert len(joined) == 5000
    for order in ("random", "epochs"):
        one, other = (Windows(tokens, 16, 3, order=order) for tokens in (joined, whole))  # type: ignore[arg-type]
        np.testing.assert_array_equal(one.read(0, 500), other.read(0, 500))
    for cut in (slice(None), slice(698, 705), slice(-10, None), slice(0, 5000, 7), slice(5, 5)):
        np.testing.assert_array_equal(joined[cut], whole[cut])
    index = np.array([[0, 699, 700], [702, 703, -1]])
    np.testing.assert_array_equal(joined[index], whole[index])
    with pytest.raises(IndexError):
        joined[np.array([5000])]


def test_shards_without_validation_hold_out_their_end(tmp_path: Path) -> None:
    tokens, vocab = make_tokens("words", 16_000)
    for i in range(2):
        tokens[8000 * i : 8000 * (i + 1)].astype("<u2").tofile(tmp_path / f"shard_{i}.bin")
    corpus = load_corpus(str(tmp_path), vocab=vocab)
    np.testing.assert_array_equal(np.asarray(corpus.train), tokens[:15_000])
    np.testing.assert_array_equal(np.asarray(corpus.val), tokens[15_000:])
    assert {file.split for file in corpus.files} == {"both"}


def test_folders_of_shards_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    tokens, vocab = make_tokens("words", 4000)

    def write(name: str, dtype: str = "<u2") -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tokens.astype(dtype).tofile(tmp_path / name)

    for name in (
        "unclear/train_0.bin",
        "unclear/other.bin",
        "val/val_0.bin",
        "text/train_0.bin",
        "types/train.u16.bin",
    ):
        write(name)
    write("types/val.u32.bin", "<u4")
    write("width/train_0.bin", "<u4")
    write("width/val_0.bin", "<u4")
    (tmp_path / "text" / "book.txt").write_text("words " * 1000)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train.bin.gz").write_bytes(gzip.compress(b"ab" * 1000))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"\x89PNG\xff\xfe" * 500)
    for folder, message in (
        ("unclear", r"got train_0\.bin and other\.bin .*call them train\.bin and val\.bin"),
        ("val", r"shards to train on, got only val_0\.bin"),
        ("text", r"got both in .*book\.txt: move one kind"),
        ("types", "shards of one type, got uint16 in .*uint32 in"),
        ("width", r"name it train_0\.u32\.bin"),
        ("packed", r"got train\.bin\.gz .*unpack"),
        ("images", r"1 with \.png .*call them train\.bin and val\.bin"),
    ):
        load_cached.cache_clear()
        with pytest.raises(ValueError, match=message):
            load_corpus(str(tmp_path / folder), vocab=vocab)


def test_missing_shards_and_those_for_testing_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, vocab = make_tokens("words", 4000)
    for name in ("train_001", "train_003", "val_000", "test_000"):
        tokens.astype("<u2").tofile(tmp_path / f"{name}.bin")
    with caplog.at_level("WARNING", logger="muscale"):
        corpus = load_corpus(str(tmp_path), vocab=vocab)
    assert [file.path for file in corpus.files] == ["train_001.bin", "train_003.bin", "val_000.bin"]
    assert "shards for training are missing: train_002.bin" in caplog.text
    assert "files for testing are not read: test_000.bin" in caplog.text


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tokens, vocab = make_tokens("words", 4000)
    write_megatron(tmp_path / "x.bin", tokens, "<i4", 8)
    with pytest.raises(ValueError, match=r"4,000 tokens of uint16 that .*x\.idx promises, got 16,000 bytes"):
        load_corpus(str(tmp_path / "x.bin"), vocab=vocab)
    with pytest.raises(ValueError, match=r"the index of a Megatron data set, .*name the \.bin beside it"):
        load_corpus(str(tmp_path / "x.idx"), vocab=vocab)
