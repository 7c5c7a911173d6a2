"""Tokenizers: trained on the training part alone, the same on every machine, and cached on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from proxies.config.proxy import ProxyConfig
from proxies.data import tokenizer as tokenizer_module
from proxies.data.corpora import check_corpus, load_cached, load_corpora, load_corpus, open_source
from proxies.data.mixture import describe_data
from proxies.data.token_files import TokenMetadata, cache_tokens, get_cache_folder
from proxies.data.tokenizer import train_bpe
from proxies.trainers.proxy_family import ProxyFamily

ROOT = Path(__file__).parents[2]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog;",
    "naïve",
    "café",
    "→",
    "東京",
    "🙂",
    "\n\tdef",
    "f(x):",
    "return",
    "x",
]


def prose(n: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=n))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUSCALE_CACHE", str(tmp_path / "cache"))
    load_cached.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(prose(40_000), encoding="utf-8")
    return path


def train_tokenizer(vocab: int, book: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(train_bpe([open_source(str(book))], vocab))


def test_tokens_decode_to_the_text_byte_for_byte(book: Path) -> None:
    as_bytes = load_corpus(str(book))
    corpus = load_corpus(str(book), vocab=500, tokenizer="bpe")
    tokenizer = train_tokenizer(500, book)
    for tokens, raw in ((corpus.train, as_bytes.train), (corpus.val, as_bytes.val)):
        assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False).encode() == raw.tobytes()
    assert isinstance(corpus.train, np.memmap)
    assert int(corpus.train.max()) < 500
    assert corpus.bytes_per_token == pytest.approx(len(as_bytes.val) / len(corpus.val), abs=1e-12)
    assert corpus.bytes_per_token is not None
    assert corpus.bytes_per_token > 2
    assert corpus.sha256 != as_bytes.sha256


def test_a_larger_vocabulary_has_longer_tokens_and_may_need_32_bits(book: Path) -> None:
    ratios = [load_corpus(str(book), vocab=v, tokenizer="bpe").bytes_per_token or 0 for v in (257, 300, 400)]
    assert ratios == sorted(set(ratios))
    assert load_corpus(str(book), vocab=70_000, tokenizer="bpe").train.dtype == np.uint32


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    """A word that only the held-out block has never becomes a token; one of the training part does."""
    path = tmp_path / "text.txt"
    # Block 1 is held out.
    blocks = ["seldomseldom " if i == 1 else "frequent " for i in range(12)]
    path.write_bytes(b"".join((word * 300).encode()[:2048] for word in blocks))
    vocab = train_tokenizer(400, path).get_vocab()
    assert "Ġfrequent" in vocab
    assert not any("seld" in token for token in vocab)


def test_training_gives_the_same_file_in_another_process_with_other_threads(book: Path) -> None:
    code = (
        "from proxies.data.corpora import open_source; from proxies.data.tokenizer import train_bpe; "
        f"print(train_bpe([open_source({str(book)!r})], 400))"
    )
    expected = train_bpe([open_source(str(book))], 400)
    for threads in ("1", "3"):
        env = os.environ | {"PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert json.loads(out) == json.loads(expected)


def test_several_sources_share_one_tokenizer(tmp_path: Path) -> None:
    for name, word in (("a", "apple "), ("b", "banana ")):
        (tmp_path / name).write_text(word * 3000)
    corpora = load_corpora({n: str(tmp_path / n) for n in "ab"}, vocab=270, tokenizer="bpe")
    (cached,) = get_cache_folder().glob("*.tokenizer.json")
    vocab = tokenizers.Tokenizer.from_file(str(cached)).get_vocab()
    assert {"Ġapple", "Ġbanana"} <= set(vocab)
    again = load_corpora({n: str(tmp_path / n) for n in "ba"}, vocab=270, tokenizer="bpe")
    assert {n: c.sha256 for n, c in again.items()} == {n: c.sha256 for n, c in corpora.items()}


def test_the_second_reading_comes_from_the_cache(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_corpus(str(book), vocab=300, tokenizer="bpe")
    load_cached.cache_clear()
    monkeypatch.setattr(tokenizer_module, "train_bpe", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("proxies.data.corpora._write_tokens", lambda *_: pytest.fail("tokenized again"))
    again = load_corpus(str(book), vocab=300, tokenizer="bpe")
    np.testing.assert_array_equal(again.train, first.train)
    assert (again.sha256, again.files, again.bytes_per_token) == (first.sha256, first.files, first.bytes_per_token)


DAMAGES = ["truncated", "another version", "no metadata", "wrong metadata", "killed", "killed in version 0.1"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_again(damage: str, book: Path, cache: Path) -> None:
    first = np.array(load_corpus(str(book), vocab=300, tokenizer="bpe").train)
    (metadata,) = cache.glob("*/tokens.json")
    folder = metadata.parent
    if damage == "truncated":
        train = folder / "train.bin"
        train.write_bytes(train.read_bytes()[:-2])
    elif damage == "another version":
        metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"version": 0}))
    elif damage == "no metadata":
        metadata.unlink()
    elif damage == "wrong metadata":
        metadata.write_text("[1]")
    elif damage == "killed":
        folder.rename(folder.with_name(f".{folder.name}.0123456789ab.tmp"))
    else:
        folder.rename(folder.with_name(f"{folder.name}.making"))
    load_cached.cache_clear()
    np.testing.assert_array_equal(load_corpus(str(book), vocab=300, tokenizer="bpe").train, first)
    assert json.loads(metadata.read_text())["version"] == 1
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder], "nothing is left of the killed process"


def test_text_that_changes_is_tokenized_again(book: Path) -> None:
    first = load_corpus(str(book), vocab=300, tokenizer="bpe")
    book.write_text(prose(40_000, seed=1), encoding="utf-8")
    load_cached.cache_clear()
    assert load_corpus(str(book), vocab=300, tokenizer="bpe").sha256 != first.sha256


def test_text_that_changes_while_it_is_read_is_refused(
    book: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The digest is of the text before the change.
    monkeypatch.setattr("proxies.data.corpora.compute_digest", lambda _: "0" * 64)
    with pytest.raises(ValueError, match="stay as it is"):
        load_corpus(str(book), vocab=300, tokenizer="bpe")
    assert [p for p in cache.iterdir() if p.is_dir()] == []


def test_a_full_disk_leaves_no_partial_cache(book: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("proxies.data.corpora._write_tokens", fail)
        with pytest.raises(OSError, match="No space left"):
            load_corpus(str(book), vocab=300, tokenizer="bpe")
    assert [p for p in cache.iterdir() if p.is_dir()] == []
    assert len(load_corpus(str(book), vocab=300, tokenizer="bpe").train) > 1000


def test_large_text_is_mapped_and_has_the_tokens_of_small(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_corpus(str(book))
    load_cached.cache_clear()
    monkeypatch.setattr("proxies.data.corpora.MAX_BYTES_IN_MEMORY", 1000)
    # The file is then mapped instead of read.
    monkeypatch.setattr("proxies.data.sources.PIECE_BYTES", 100)
    large = load_corpus(str(book))
    assert isinstance(large.train, np.memmap)
    np.testing.assert_array_equal(large.train, small.train)
    np.testing.assert_array_equal(large.val, small.val)
    assert (large.sha256, large.files, large.bytes_per_token) == (small.sha256, small.files, 1.0)


def test_a_large_file_of_a_folder_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(prose(200, seed=i), encoding="utf-8")
    small = load_corpus(str(tmp_path / "text"))
    load_cached.cache_clear()
    monkeypatch.setattr("proxies.data.corpora.MAX_BYTES_IN_MEMORY", 1000)
    monkeypatch.setattr("proxies.data.sources.PIECE_BYTES", 50)
    large = load_corpus(str(tmp_path / "text"))
    np.testing.assert_array_equal(large.train, small.train)
    assert (large.sha256, large.files) == (small.sha256, small.files)


def test_one_process_makes_the_tokens_while_the_others_wait() -> None:
    built: list[Path] = []

    def build(folder: Path) -> TokenMetadata:
        built.append(folder)
        time.sleep(0.2)
        for part in ("train", "val"):
            np.arange(10, dtype="u1").tofile(folder / f"{part}.bin")
        return {"dtype": "u1", "train": 10, "val": 10}

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cache_tokens("key", build), range(4)))
    assert len(built) == 1
    assert all(train.tolist() == list(range(10)) for train, _, _ in results)


def test_text_of_too_few_tokens_is_refused_when_its_files_are_listed(tmp_path: Path) -> None:
    """It has enough bytes, so only tokenizing it shows the problem; that is still before a study is written."""
    path = tmp_path / "short.txt"
    path.write_text("the same words over and over " * 300)
    settings = {
        "corpus": str(path),
        "tokenizer": "bpe",
        "vocab": 400,
        "seq_len": 512,
        "widths": [16, 32],
        "base_width": 32,
    }
    family = ProxyFamily.model_validate(settings)
    with pytest.raises(ValueError, match="more than seq_len = 512"):
        family.manifest()


def test_a_tokenizer_file_can_be_given(book: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_bpe([open_source(str(book))], 300))
    corpus = load_corpus(str(book), vocab=300, tokenizer=str(path))
    np.testing.assert_array_equal(corpus.train, load_corpus(str(book), vocab=300, tokenizer="bpe").train)
    assert "at most vocab = 280 tokens, got 300" in check_corpus(str(book), vocab=280, tokenizer=str(path))[0]
    path.write_text("{}")
    assert "needed a tokenizer.json" in check_corpus(str(book), vocab=280, tokenizer=str(path))[0]


def test_wrong_tokenizers_are_refused_before_anything_is_read(book: Path, tmp_path: Path) -> None:
    assert "'bytes', 'bpe', or a tokenizer.json file, got 'words'" in check_corpus(str(book), tokenizer="words")[0]
    assert "needs vocab > 256, got 256" in check_corpus(str(book), vocab=256, tokenizer="bpe")[0]
    np.zeros(5000, "<u2").tofile(tmp_path / "x.bin")
    assert (
        "'bpe' is trained on text, got tokens" in check_corpus(str(tmp_path / "x.bin"), vocab=300, tokenizer="bpe")[0]
    )
    with pytest.raises(ValueError, match="got 'words'"):
        load_corpus(str(book), tokenizer="words")


def test_a_missing_package_is_named_with_its_extra(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert check_corpus(str(book), vocab=300, tokenizer="bpe") == [
        "needed the package tokenizers for tokenizer 'bpe', which is not installed: pip install 'muscale[data]'"
    ]
    with pytest.raises(ValueError, match="needed the package tokenizers"):
        load_corpus(str(book), vocab=300, tokenizer="bpe")


def test_the_record_of_a_run_has_the_bytes_per_token(book: Path) -> None:
    config = ProxyConfig(corpus=str(book), tokenizer="bpe", vocab=300, seq_len=32)
    assert (
        describe_data(config)["bytes_per_token"] == load_corpus(str(book), vocab=300, tokenizer="bpe").bytes_per_token
    )


def test_the_error_for_an_unusable_cache_folder_names_the_setting(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSCALE_CACHE", str(book / "inside"))
    with pytest.raises(ValueError, match="set MUSCALE_CACHE"):
        load_corpus(str(book), vocab=300, tokenizer="bpe")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.txt"
    path.write_text(prose(3000), encoding="utf-8")
    return path


def save_changed(page: Path, folder: Path, change: Callable[[tokenizers.Tokenizer], None]) -> str:
    """Save a tokenizer of the page with a change, and return its path."""
    tokenizer = train_tokenizer(300, page)
    change(tokenizer)
    tokenizer.save(str(folder / "changed.json"))
    return str(folder / "changed.json")


@pytest.mark.parametrize("setting", ["truncation", "padding", "dropout"])
def test_settings_that_change_the_number_of_tokens_are_switched_off(
    setting: str, page: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = save_changed(page, tmp_path, lambda _: None)
    expected = np.array(load_corpus(str(page), vocab=300, tokenizer=plain).train)
    load_cached.cache_clear()

    def change(tokenizer: tokenizers.Tokenizer) -> None:
        if setting == "truncation":
            tokenizer.enable_truncation(16)
        elif setting == "padding":
            tokenizer.enable_padding(length=512)
        else:
            tokenizer.model.dropout = 0.5

    changed = save_changed(page, tmp_path, change)
    with caplog.at_level("INFO", logger="muscale"):
        corpus = load_corpus(str(page), vocab=300, tokenizer=changed)
    np.testing.assert_array_equal(corpus.train, expected)
    assert f"{setting}" in caplog.text
    assert "is switched off" in caplog.text


def test_a_tokenizer_that_loses_text_is_refused_with_what_it_loses(page: Path, tmp_path: Path) -> None:
    def remove_letters(tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex("[a-z]"), "")

    path = save_changed(page, tmp_path, remove_letters)
    [problem] = check_corpus(str(page), vocab=300, tokenizer=path)
    assert "needed a tokenizer that keeps the text" in problem
    assert "remove the normalizer" in problem
    unknown = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "fox": 1}, unk_token="[UNK]"))
    unknown.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    unknown.save(str(tmp_path / "unknown.json"))
    with pytest.raises(ValueError, match=r"no token for 9\d % of the characters"):
        load_corpus(str(page), vocab=300, tokenizer=str(tmp_path / "unknown.json"))


def test_a_small_loss_and_dropped_white_space_are_reported(
    page: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.normalizer = tokenizers.normalizers.Replace("🙂", "")
        split = tokenizers.pre_tokenizers.Split(" ", "removed")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])

    path = save_changed(page, tmp_path, change)
    with caplog.at_level("WARNING", logger="muscale"):
        load_corpus(str(page), vocab=300, tokenizer=path)
    assert "% of the characters, such as 🙂" in caplog.text
    assert "drops white space" in caplog.text


def test_a_lowering_tokenizer_is_accepted(page: Path, tmp_path: Path) -> None:
    def change(tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.normalizer = tokenizers.normalizers.Lowercase()

    assert check_corpus(str(page), vocab=300, tokenizer=save_changed(page, tmp_path, change)) == []


def test_an_implausible_number_of_bytes_per_token_is_explained(page: Path, tmp_path: Path) -> None:
    def repeat(tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.normalizer = tokenizers.normalizers.Replace("x", "東京" * 100)

    [problem] = check_corpus(str(page), vocab=300, tokenizer=save_changed(page, tmp_path, repeat))
    assert "needed 0.5 to 20 bytes of text per token, got 0." in problem
    assert "tokens are added to the text" in problem


def test_what_is_not_a_tokenizer_file_says_how_to_get_one(page: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = save_changed(page, tmp_path / "folder", lambda _: None)
    Path(path).rename(tmp_path / "folder" / "tokenizer.json")
    (tmp_path / "folder" / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    (tmp_path / "sp.model").write_bytes(b"\x0a\xff")
    for name, message in (
        ("gpt2", "Tokenizer.from_pretrained('gpt2').save('tokenizer.json')"),
        (str(tmp_path / "folder"), f"name {tmp_path / 'folder' / 'tokenizer.json'}"),
        (str(tmp_path / "folder" / "tokenizer_config.json"), f"name {tmp_path / 'folder' / 'tokenizer.json'}"),
        (str(tmp_path / "sp.model"), "save_pretrained(FOLDER) writes one"),
        (str(tmp_path / "missing.json"), "no such file"),
    ):
        assert message in check_corpus(str(page), vocab=300, tokenizer=name)[0]
