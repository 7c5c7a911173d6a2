"""Corpora: text as bytes or by byte-pair encoding, or files of tokens, with a fixed split into training and validation.

The default corpus, "stdlib", is the source of Python's own standard library: about 30 MB, on every machine.

| corpus                             | what is read                                                               |
|------------------------------------|----------------------------------------------------------------------------|
| "stdlib"                           | Python's standard library, split by file                                   |
| a folder                           | its text, split by file; if it has train.bin and val.bin, those tokens     |
| a text file                        | its text, split by blocks of 2,048 bytes                                   |
| a .bin file                        | its tokens, the last sixteenth held out (see proxies/data/token_files.py)  |
| a .parquet or .jsonl file          | its rows of text, split by row; needs muscale[data]                        |
| a data set saved to disk           | its rows of text, split by row; needs muscale[data]                        |
| hf:NAME[:CONFIG][:SPLIT][:COLUMN]  | the rows of a data set of a hub, split by row; needs muscale[data]         |

Up to 256 MiB of bytes are held in memory. Larger text, and any text that is not used as bytes, is tokenized once into a
cache and memory-mapped.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np

from proxies.data.sources import (
    VAL_DIVISOR,
    CorpusFile,
    Piece,
    Source,
    Split,
    check_dataset,
    compute_digest,
    is_dataset,
    is_utf8,
    measure_sizes,
    open_source,
    update_digest,
)
from proxies.data.token_files import (
    TokenMetadata,
    Tokens,
    cache_tokens,
    check_tokens,
    compute_key,
    open_bin,
    read_bin_layout,
    remember,
)
from proxies.data.tokenizer import BYTE_VOCAB, Encoder, check_tokenizer, make_encoder

# Text of at most this many bytes is held in memory if its bytes are its tokens.
MAX_BYTES_IN_MEMORY = 1 << 28
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


def check_corpora(specs: Mapping[str, str], *, vocab: int, seq_len: int, tokenizer: str) -> list[str]:
    """List the problems of several corpora, each and together. See `check_corpus`."""
    token_corpora = [name for name, spec in specs.items() if _is_bin(_find_path(spec))]
    problems = []
    if len(token_corpora) < len(specs):
        problems += check_tokenizer(tokenizer, vocab)
    if token_corpora and tokenizer == "bpe":
        problems.append(
            f"tokenizer 'bpe' is trained on text, got tokens in {', '.join(specs[name] for name in token_corpora)}: "
            "name the tokenizer.json they were made with"
        )
    for name, spec in specs.items():
        problems += [f"{name}: {problem}" if name else problem for problem in _check_spec(spec, vocab, seq_len)]
    return problems


def check_corpus(spec: str, *, vocab: int = BYTE_VOCAB, seq_len: int = 1, tokenizer: str = "bytes") -> list[str]:
    """List what would keep windows of `seq_len` tokens from being read.

    The check is cheap: it looks at names and sizes and at three samples of a .bin file's tokens, and opens data sets on
    this machine. `load_corpus` looks at everything.

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
    loaded = {name: _load_bin(_find_path(spec), vocab) for name, spec in specs if _is_bin(_find_path(spec))}
    texts = {name: open_source(spec) for name, spec in specs if name not in loaded}
    if tokenizer == "bytes":
        for name, source in texts.items():
            fits = source.size <= MAX_BYTES_IN_MEMORY
            loaded[name] = _load_in_memory(source, vocab) if fits else _load_from_cache(source, vocab)
    elif texts:
        digests = {name: compute_digest(source) for name, source in texts.items()}
        encoder = make_encoder(tokenizer, vocab, [(texts[name], digests[name]) for name in texts])
        loaded |= {name: _load_from_cache(source, vocab, digests[name], encoder) for name, source in texts.items()}
    for name, spec in specs:
        if problems := _check_length(len(loaded[name].train), len(loaded[name].val), 1):
            raise ValueError(f"corpus {spec}: " + "; ".join(problems))
    return {name: loaded[name] for name, _ in specs}


def _check_spec(spec: str, vocab: int, seq_len: int) -> list[str]:
    if is_dataset(spec):
        return check_dataset(spec)
    path = _find_path(spec)
    if not path.exists():
        return [f"needed 'stdlib', a data set hf:NAME or an existing file or folder, got {spec!r}: no such path"]
    if not _is_bin(path):
        sizes = measure_sizes(spec)
        return _check_length(sizes["train"], sizes["val"], seq_len)
    files = _find_bin_files(path)
    try:
        counts = [count for _, _, count in map(read_bin_layout, files)]
    except ValueError as error:
        return [str(error)]
    n_train, n_val = _split_counts(counts)
    problems = _check_length(n_train, n_val, seq_len)
    for file, count in zip(files, counts, strict=True):
        problems += check_tokens(open_bin(file), vocab, str(file), whole=False) if count else []
    return problems


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


def _load_bin(path: Path, vocab: int) -> Corpus:
    files = _find_bin_files(path)
    arrays = [open_bin(file) for file in files]

    def read() -> TokenFileCheck:
        digest = hashlib.sha256()
        problems: list[str] = []
        for file, tokens in zip(files, arrays, strict=True):
            problems += check_tokens(tokens, vocab, str(file), whole=True)
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
            digest.update(tokens.data)
        return {"sha256": digest.hexdigest(), "problems": problems}

    check = remember(files, f"tokens below {vocab}", read)
    if check["problems"]:
        raise ValueError(f"corpus {path}: " + "; ".join(check["problems"]))
    n_train, _ = _split_counts([len(tokens) for tokens in arrays])
    train, val = (arrays[0], arrays[1]) if len(arrays) == 2 else (arrays[0][:n_train], arrays[0][n_train:])
    splits: list[Any] = ["train", "val"] if len(files) == 2 else ["both"]
    corpus_files = tuple(CorpusFile(f.name, f.stat().st_size, split) for f, split in zip(files, splits, strict=True))
    return Corpus(path.name, train, val, corpus_files, check["sha256"], vocab, None)


def _is_bin(path: Path) -> bool:
    return len(_find_bin_files(path)) > 0


def _find_bin_files(path: Path) -> list[Path]:
    """Return the token file, or train.bin and val.bin of a folder; empty if the path is something else."""
    if path.is_file():
        return [path] if path.suffix == ".bin" else []
    pair = [path / "train.bin", path / "val.bin"]
    return pair if all(file.is_file() for file in pair) else []


def _split_counts(counts: list[int]) -> tuple[int, int]:
    """Return the number of training and of held-out tokens, given the tokens of each file."""
    if len(counts) == 2:
        return counts[0], counts[1]
    return counts[0] - counts[0] // VAL_DIVISOR, counts[0] // VAL_DIVISOR


def _find_path(spec: str) -> Path:
    return Path(sysconfig.get_path("stdlib")) if spec == "stdlib" else Path(spec).expanduser()


def _resolve(spec: str) -> str:
    return spec if spec == "stdlib" or spec.startswith("hf:") else str(Path(spec).expanduser().resolve())


def _check_length(n_train: int, n_val: int, seq_len: int) -> list[str]:
    if n_train + n_val == 0:
        return ["needed text, got nothing: no readable file, or only empty ones"]
    return [
        f"needed more than seq_len = {seq_len} tokens in the {split} part, got {n:,}: "
        + ("add files" if n == 0 else "use a larger corpus or a shorter seq_len")
        for split, n in (("train", n_train), ("validation", n_val))
        if n <= seq_len
    ]
