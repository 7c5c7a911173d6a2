"""Corpora: text as bytes or by byte-pair encoding, or files of tokens, with a fixed split into training and validation.

The default corpus, "stdlib", is the source of Python's own standard library: about 30 MB, on every machine.

| corpus                             | what is read                                                               |
|------------------------------------|----------------------------------------------------------------------------|
| "stdlib"                           | Python's standard library, split by file                                   |
| a folder of text                   | its text, split by file                                                    |
| a text file                        | its text, split by blocks of 2,048 bytes                                   |
| a file of tokens, .bin or .npy     | its tokens, the last sixteenth held out (proxies/data/token_formats.py)    |
| a folder of such files             | its shards, split by their names (proxies/data/shard_names.py)             |
| rows in .parquet or .jsonl         | their text, split by row; needs muscale[data]                              |
| a folder of such files             | the same, split by their names if these say train and val                  |
| a data set saved to disk           | its rows of text, split by row; needs muscale[data]                        |
| hf:NAME[:CONFIG][:SPLIT][:COLUMN]  | the rows of a data set of a hub, split by row; needs muscale[data]         |

Up to 256 MiB of bytes are held in memory. Larger text, and any text that is not used as bytes, is tokenized once into a
cache and memory-mapped.
"""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np

from proxies.data.rows import check_dataset, find_rows_among_text, is_dataset, open_rows
from proxies.data.shard_names import ShardFiles
from proxies.data.sources import (
    VAL_DIVISOR,
    CorpusFile,
    Piece,
    Source,
    Split,
    compute_digest,
    is_utf8,
    list_files,
    measure_sizes,
    open_folder,
    open_text_file,
    update_digest,
)
from proxies.data.token_files import (
    TokenMetadata,
    Tokens,
    cache_tokens,
    compute_key,
    remember,
)
from proxies.data.token_formats import check_tokens, format_type, open_tokens, read_layout
from proxies.data.token_shards import check_format, describe_files, find_token_files, join_tokens, split_tokens
from proxies.data.tokenizer import (
    BYTE_VOCAB,
    Encoder,
    check_encoding,
    check_tokenizer,
    explain_ratio,
    make_encoder,
)

logger = logging.getLogger("muscale.proxies")

# Text of at most this many bytes is held in memory if its bytes are its tokens.
MAX_BYTES_IN_MEMORY = 1 << 28
# Files of tokens that are sampled before a study is written, approximately; then all are read.
CHECKED_SHARDS = 16
# Bytes that are tokenized together, approximately.
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out tokens, which never overlap.

    Attributes:
        name: Name for messages and records.
        train: Training tokens.
        val: Held-out tokens.
        files: The files that they were read from.
        sha256: Hash of every relative path, size and content, in order, and of the tokenizer unless it is "bytes".
        vocab: Size of the vocabulary.
        bytes_per_token: Bytes of text per token of the held-out part; None for tokens of unknown text. Bits per byte
            are loss / ln 2 / bytes_per_token.
    """

    name: str
    train: Tokens
    val: Tokens
    files: tuple[CorpusFile, ...]
    sha256: str
    vocab: int
    bytes_per_token: float | None


class TokenFileCheck(TypedDict):
    """The digest of token files and the problems found in them, as kept on disk."""

    sha256: str
    problems: list[str]


def load_corpus(spec: str | Mapping[str, str], *, vocab: int = BYTE_VOCAB, tokenizer: str = "bytes") -> Corpus:
    """Load a corpus. The split depends only on paths and positions, never on a seed.

    A corpus is read once per process.

    Args:
        spec: The corpus, see the table of this module.
        vocab: Size of the vocabulary.
        tokenizer: "bytes", "bpe", or the path of a tokenizer.json.

    Returns:
        The corpus.

    Raises:
        ValueError: If there is nothing to train on, a token does not fit in `vocab`, or `spec` names several corpora,
            which `proxies.data.mixture.open_data` reads.
    """
    if not isinstance(spec, str):
        raise ValueError(
            f"needed one corpus, got {', '.join(spec)}: a mixture is read by proxies.data.mixture.open_data"
        )
    return load_corpora({"": spec}, vocab=vocab, tokenizer=tokenizer)[""]


def load_corpora(specs: Mapping[str, str], *, vocab: int = BYTE_VOCAB, tokenizer: str = "bytes") -> dict[str, Corpus]:
    """Load several corpora by name. The tokenizer "bpe" is trained on all of them together.

    See `load_corpus` for the arguments and errors.
    """
    return load_cached(tuple((name, _resolve(spec)) for name, spec in specs.items()), vocab, tokenizer)


def open_source(spec: str, names: Sequence[str] | None = None) -> Source:
    """Return the text that a corpus setting names.

    Args:
        spec: "stdlib", a data set, or the path of a text file or folder.
        names: Relative paths of the files in the folder, if they have been listed already.

    Returns:
        The source. Its text is not read yet.

    Raises:
        ValueError: If a data set cannot be opened.
    """
    names = _list_names(spec) if names is None else names
    if spec != "stdlib" and is_dataset(spec, names):
        return open_rows(spec)
    if spec == "stdlib":
        return open_folder("stdlib", Path(sysconfig.get_path("stdlib")), python_only=True)
    path = Path(spec)
    if not path.is_dir():
        return open_text_file(path)
    if rows := find_rows_among_text(path, names):
        logger.warning(
            f"{path}: its files of rows are read as plain text, braces and all, because they lie among text: "
            f"{rows[0]}; to read the text inside, move them to a folder of their own"
        )
    return open_folder(path.name, path, python_only=False)


def check_corpora(specs: Mapping[str, str], *, vocab: int, seq_len: int, tokenizer: str) -> list[str]:
    """List the problems of several corpora, each and together. See `check_corpus`."""
    found: dict[str, ShardFiles | None] = {}
    problems = []
    # Folders are listed once, because that takes time in large ones.
    listed = {name: _list_names(spec) for name, spec in specs.items()}
    for name, spec in specs.items():
        try:
            found[name] = _find_tokens(spec, listed[name])
        except ValueError as error:
            problems.append(_name_source(name, str(error)))
    token_corpora = [name for name, files in found.items() if files is not None]
    if len(token_corpora) < len(found):
        problems += check_tokenizer(tokenizer, vocab)
    if token_corpora and tokenizer == "bpe":
        problems.append(
            f"tokenizer 'bpe' is trained on text, got tokens in {', '.join(specs[name] for name in token_corpora)}: "
            "name the tokenizer.json they were made with"
        )
    given = tokenizer if tokenizer not in ("bytes", "bpe") and not problems else None
    for name, files in found.items():
        if files is None:
            checked = _check_text(specs[name], seq_len, listed[name])
        else:
            checked = _check_shards(files, vocab, seq_len)
        # A data set of a hub is not looked up here.
        if given and files is None and not checked and not specs[name].startswith("hf:"):
            checked, _ = check_encoding(given, vocab, open_source(specs[name], listed[name]))
        problems += [_name_source(name, problem) for problem in checked]
    return problems


def check_corpus(spec: str, *, vocab: int = BYTE_VOCAB, seq_len: int = 1, tokenizer: str = "bytes") -> list[str]:
    """List what would keep windows of `seq_len` tokens from being read.

    The check is cheap: it looks at names and sizes and at three samples of the tokens of a few files, and opens data
    sets on this machine. `load_corpus` looks at everything.

    Args:
        spec: The corpus, see the table of this module.
        vocab: Size of the vocabulary.
        seq_len: Tokens per window.
        tokenizer: "bytes", "bpe", or the path of a tokenizer.json.

    Returns:
        One message per problem; empty if none is found.
    """
    return check_corpora({"": spec}, vocab=vocab, seq_len=seq_len, tokenizer=tokenizer)


@lru_cache(maxsize=4)
def load_cached(specs: tuple[tuple[str, str], ...], vocab: int, tokenizer: str) -> dict[str, Corpus]:
    """Load corpora, once per process for the same arguments. See `load_corpora`.

    Args:
        specs: Pairs of name and resolved spec.
        vocab: Size of the vocabulary.
        tokenizer: "bytes", "bpe", or the path of a tokenizer.json.
    """
    problems = check_corpora(dict(specs), vocab=vocab, seq_len=1, tokenizer=tokenizer)
    if problems:
        raise ValueError(f"corpus {', '.join(spec for _, spec in specs)}: " + "; ".join(problems))
    listed = {name: _list_names(spec) for name, spec in specs}
    found = {name: _find_tokens(spec, listed[name]) for name, spec in specs}
    paths = {name: _find_path(spec) for name, spec in specs}
    loaded = {name: _load_tokens(paths[name], files, vocab) for name, files in found.items() if files is not None}
    texts = {name: open_source(spec, listed[name]) for name, spec in specs if name not in loaded}
    if tokenizer == "bytes":
        for name, source in texts.items():
            fits = source.size <= MAX_BYTES_IN_MEMORY
            loaded[name] = _load_in_memory(source, vocab) if fits else _load_from_cache(source, vocab)
    elif texts:
        digests = {name: compute_digest(source) for name, source in texts.items()}
        encoder = make_encoder(tokenizer, vocab, [(texts[name], digests[name]) for name in texts])
        loaded |= {name: _load_from_cache(source, vocab, digests[name], encoder) for name, source in texts.items()}
        if tokenizer != "bpe":
            _check_loaded(texts, loaded, tokenizer, vocab)
    for name, spec in specs:
        if problems := _check_length(len(loaded[name].train), len(loaded[name].val), 1, paths[name]):
            raise ValueError(f"corpus {spec}: " + "; ".join(problems))
    return {name: loaded[name] for name, _ in specs}


def _check_loaded(texts: Mapping[str, Source], loaded: Mapping[str, Corpus], tokenizer: str, vocab: int) -> None:
    """Log what is known of a tokenizer.json on these texts; raise ValueError if it cannot be used for them."""
    for name, source in texts.items():
        problems, remarks = check_encoding(tokenizer, vocab, source)
        ratio = loaded[name].bytes_per_token
        problems += [problem for problem in [explain_ratio(tokenizer, ratio) if ratio else None] if problem]
        if problems:
            raise ValueError(f"corpus {source.name}: " + "; ".join(problems))
        for remark in remarks:
            logger.warning(remark)


def _check_text(spec: str, seq_len: int, names: Sequence[str]) -> list[str]:
    if spec != "stdlib" and is_dataset(spec, names):
        return check_dataset(spec)
    path = _find_path(spec)
    if not path.exists():
        remedy = ": name the folder that holds the files" if any(mark in spec for mark in "*?[") else ""
        return [
            f"needed 'stdlib', a data set hf:NAME or an existing file or folder, got {spec!r}: no such path{remedy}"
        ]
    if spec != "stdlib" and (problem := check_format(path, names)):
        return [problem]
    sizes = measure_sizes(spec)
    return _check_length(sizes["train"], sizes["val"], seq_len, path)


def _check_shards(files: ShardFiles, vocab: int, seq_len: int) -> list[str]:
    try:
        layouts = {file: read_layout(file) for file in files.all}
    except ValueError as error:
        return [str(error)]
    counts = [[layouts[file].length for file in group] for group in (files.train, files.val)]
    problems = _check_length(*_split_counts(*counts), seq_len)
    filled = [file for file, layout in layouts.items() if layout.length]
    # All of them are checked when they are loaded.
    for file in filled[:: max(1, len(filled) // CHECKED_SHARDS)]:
        problems += check_tokens(file, vocab, whole=False)
        if problems:
            return problems
    return problems + _check_same_type({file: layouts[file].dtype for file in filled})


def _check_same_type(types: Mapping[Path, str]) -> list[str]:
    """Return a problem if not all shards hold tokens of one type, which shows that they do not belong together."""
    first: dict[str, Path] = {}
    for file, dtype in types.items():
        first.setdefault(dtype, file)
    if len(first) < 2:
        return []
    listed = ", ".join(f"{format_type(dtype)} in {file}" for dtype, file in first.items())
    return [f"needed shards of one type, got {listed}: write them again in one type, or leave out the others"]


def _load_in_memory(source: Source, vocab: int) -> Corpus:
    digest = hashlib.sha256()
    parts: dict[Split, list[bytes]] = {"train": [], "val": []}
    files: list[CorpusFile] = []
    previous = None
    for piece in source.pieces():
        if source.files is None and piece.origin != previous:
            files.append(CorpusFile(piece.origin, piece.size, piece.split))
        previous = update_digest(digest, piece, previous)
        parts[piece.split].append(piece.text)
    train, val = (np.frombuffer(b"".join(parts[split]), dtype=np.uint8) for split in ("train", "val"))
    return Corpus(source.name, train, val, source.files or tuple(files), digest.hexdigest(), vocab, 1.0)


def _load_from_cache(source: Source, vocab: int, digest: str | None = None, encoder: Encoder | None = None) -> Corpus:
    """Return a corpus from the cache of tokens, and write it there first if it is missing."""
    digest = digest or compute_digest(source)
    encoder = encoder or make_encoder("bytes", vocab, [])

    def build(folder: Path) -> TokenMetadata:
        with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
            metadata, digest_read = _write_tokens(source, encoder, {"train": train, "val": val})
        if digest_read != digest:
            raise ValueError(
                f"needed {source.name} to stay as it is, got other bytes while it was tokenized: start again"
            )
        return metadata

    train, val, metadata = cache_tokens(compute_key("tokens", digest, encoder.id, encoder.dtype), build)
    ratio = metadata["val_bytes"] / metadata["val"] if metadata["val"] else None
    files = source.files or tuple(CorpusFile(*entry) for entry in metadata["files"])
    sha256 = digest if encoder.id == "bytes" else compute_key(digest, encoder.id)
    return Corpus(source.name, train, val, files, sha256, vocab, ratio)


def _write_tokens(source: Source, encoder: Encoder, streams: Mapping[Split, BinaryIO]) -> tuple[TokenMetadata, str]:
    """Tokenize a source into one stream per part; return the metadata and the digest of the text that was read."""
    digest = hashlib.sha256()
    metadata: TokenMetadata = {"dtype": encoder.dtype, "train": 0, "val": 0, "val_bytes": 0, "files": []}
    previous: str | None = None

    def read_encodable_pieces() -> Iterator[Piece]:
        nonlocal previous
        for piece in source.pieces():
            is_first = piece.origin != previous
            previous = update_digest(digest, piece, previous)
            if encoder.id == "bytes" or is_utf8(piece.text):
                if source.files is None and is_first:
                    metadata["files"].append([piece.origin, piece.size, piece.split])
                yield piece

    for pieces in _batch_pieces(read_encodable_pieces()):
        for piece, tokens in zip(pieces, encoder.encode([piece.text for piece in pieces]), strict=True):
            metadata[piece.split] += len(tokens)
            metadata["val_bytes"] += len(piece.text) if piece.split == "val" else 0
            streams[piece.split].write(tokens.tobytes())
    return metadata, digest.hexdigest()


def _batch_pieces(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces in lists of about CHUNK_BYTES."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _load_tokens(path: Path, files: ShardFiles, vocab: int) -> Corpus:
    for remark in files.remarks:
        logger.warning(remark)
    names = {file: file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files.all}
    arrays = {file: open_tokens(file) for file in files.all}

    def read() -> TokenFileCheck:
        digest = hashlib.sha256()
        problems: list[str] = []
        for file, tokens in arrays.items():
            problems += check_tokens(file, vocab, whole=True)
            digest.update(f"{names[file]}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
            digest.update(tokens.data)
        return {"sha256": digest.hexdigest(), "problems": problems}

    check = remember(files.all, f"tokens below {vocab} in their width", read)
    problems = [*check["problems"], *_check_same_type({file: tokens.dtype.str for file, tokens in arrays.items()})]
    if problems:
        raise ValueError(f"corpus {path}: " + "; ".join(problems))
    train, val = ([arrays[file] for file in group] for group in (files.train, files.val))
    if val:
        parts = join_tokens(train), join_tokens(val)
        splits: list[Any] = ["train"] * len(train) + ["val"] * len(val)
    else:
        n_train, _ = _split_counts([len(tokens) for tokens in train], [])
        parts, splits = split_tokens(train, n_train), ["both"] * len(train)
    corpus_files = tuple(
        CorpusFile(names[file], file.stat().st_size, split) for file, split in zip(files.all, splits, strict=True)
    )
    return Corpus(path.name, *parts, corpus_files, check["sha256"], vocab, None)


def _find_tokens(spec: str, names: Sequence[str]) -> ShardFiles | None:
    """Return the files of tokens that a corpus setting names; None if it names text."""
    return None if spec == "stdlib" or is_dataset(spec, names) else find_token_files(_find_path(spec), names)


def _list_names(spec: str) -> list[str]:
    """Return the relative paths of the files in a folder; none for the standard library, which is always text."""
    path = _find_path(spec)
    return list_files(path, python_only=False) if spec != "stdlib" and path.is_dir() else []


def _name_source(name: str, problem: str) -> str:
    return f"{name}: {problem}" if name else problem


def _split_counts(train: list[int], val: list[int]) -> tuple[int, int]:
    """Return the number of training and of held-out tokens, given the tokens of the files for each."""
    n = sum(train)
    return (n, sum(val)) if val else (n - n // VAL_DIVISOR, n // VAL_DIVISOR)


def _find_path(spec: str) -> Path:
    return Path(sysconfig.get_path("stdlib")) if spec == "stdlib" else Path(spec).expanduser()


def _resolve(spec: str) -> str:
    return spec if spec == "stdlib" or spec.startswith("hf:") else str(Path(spec).expanduser().resolve())


def _check_length(n_train: int, n_val: int, seq_len: int, path: Path | None = None) -> list[str]:
    if n_train + n_val == 0:
        return [
            "needed text, got nothing: no readable file, or only empty ones" + (describe_files(path) if path else "")
        ]
    return [
        f"needed more than seq_len = {seq_len} tokens in the {split} part, got {n:,}: "
        + ("add files" if n == 0 else "use a larger corpus or a shorter seq_len")
        for split, n in (("train", n_train), ("validation", n_val))
        if n <= seq_len
    ]
