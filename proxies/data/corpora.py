"""What proxies read: text as bytes or by byte-pair encoding, or files of tokens, split into train and validation once and for all.

The default corpus, "stdlib", is the source of Python's own standard library: about 30 MB, on every machine.

    "stdlib"                              Python's standard library, split by file
    a folder                              its text, split by file; one with train.bin and val.bin: those tokens
    a text file                           split by blocks of 2,048 bytes
    a .bin file                           tokens (proxies/data/token_files.py says of which width), the last sixteenth held out
    a .parquet or .jsonl file, a data set saved to disk, or hf:NAME[:CONFIG][:SPLIT][:COLUMN]   split by row; needs muscale[data]

Bytes of up to 256 MiB are held in memory. Larger text, and all that is not bytes, is tokenized once into a cache and mapped.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from proxies.data.sources import (
    TAIL,
    CorpusFile,
    Piece,
    Source,
    Split,
    add_to_digest,
    check_rows,
    digest_of,
    is_rows,
    open_source,
    sizes_of,
)
from proxies.data.token_files import Tokens, bin_layout, check_tokens, kept_tokens, key_of, open_bin, remembered
from proxies.data.tokenizer import BYTES, Encoder, check_tokenizer, decodes, make_encoder

IN_MEMORY = 1 << 28  # bytes of text that are read as they are; more go through the cache
CHUNK = 1 << 22  # bytes that are tokenized together, about


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out tokens, which never overlap."""

    name: str
    train: Tokens
    val: Tokens
    files: tuple[CorpusFile, ...]
    sha256: str  # of every relative path, size and content, in order, and of the tokenizer unless it is "bytes"
    vocab: int
    bytes_per_token: (
        float | None
    )  # of the held-out part; None for tokens of unknown text. Bits per byte: loss / ln 2 / this


def load_corpus(spec: str | Mapping[str, str], *, vocab: int = BYTES, tokenizer: str = "bytes") -> Corpus:
    """The corpus called `spec` (see above). The split depends on paths and positions only, never on a seed.

    Read once per process. Raises ValueError if there is nothing to train on, a token does not fit in `vocab`, or `spec`
    names several corpora, which `proxies.data.mixture.open_data` reads.
    """
    if not isinstance(spec, str):
        raise ValueError(
            f"needed one corpus, got {', '.join(spec)}: a mixture is read by proxies.data.mixture.open_data"
        )
    return load_corpora({"": spec}, vocab=vocab, tokenizer=tokenizer)[""]


def load_corpora(specs: Mapping[str, str], *, vocab: int = BYTES, tokenizer: str = "bytes") -> dict[str, Corpus]:
    """Several corpora by their names. A tokenizer that is trained here is trained on all of them together."""
    return _load(tuple((name, _resolved(spec)) for name, spec in specs.items()), vocab, tokenizer)


def check_corpora(specs: Mapping[str, str], *, vocab: int, seq_len: int, tokenizer: str) -> list[str]:
    """The same as check_corpus for each, and for all together."""
    tokens = [name for name, spec in specs.items() if _is_bin(_path(spec))]
    problems = []
    if len(tokens) < len(specs):
        problems += check_tokenizer(tokenizer, vocab)
    if tokens and tokenizer == "bpe":
        problems.append(
            f"tokenizer 'bpe' is trained on text, got tokens in {', '.join(specs[n] for n in tokens)}: name the tokenizer.json they were made with"
        )
    for name, spec in specs.items():
        problems += [f"{name}: {said}" if name else said for said in _check(spec, vocab, seq_len)]
    return problems


def check_corpus(spec: str, *, vocab: int = BYTES, seq_len: int = 1, tokenizer: str = "bytes") -> list[str]:
    """What would keep windows of `seq_len` tokens from being read, in words; empty if nothing is found.

    Cheap: it looks at names and sizes, at three samples of a .bin file's tokens, and opens a data set that lies on this
    machine; `load_corpus` looks at all.
    """
    return check_corpora({"": spec}, vocab=vocab, seq_len=seq_len, tokenizer=tokenizer)


def _check(spec: str, vocab: int, seq_len: int) -> list[str]:
    if is_rows(spec):
        return check_rows(spec)
    path = _path(spec)
    if not path.exists():
        return [f"needed 'stdlib', a data set hf:NAME or an existing file or folder, got {spec!r}: no such path"]
    if not _is_bin(path):
        sizes = sizes_of(spec)
        return _too_short(sizes["train"], sizes["val"], seq_len)
    try:
        layouts = [bin_layout(part) for part in _bin_files(path)]
    except ValueError as error:
        return [str(error)]
    n_train, n_val = _bin_sizes([count for _, _, count in layouts])
    problems = _too_short(n_train, n_val, seq_len)
    for part, (_, _, count) in zip(_bin_files(path), layouts, strict=True):
        problems += check_tokens(open_bin(part), vocab, str(part), whole=False) if count else []
    return problems


@lru_cache(maxsize=4)
def _load(specs: tuple[tuple[str, str], ...], vocab: int, tokenizer: str) -> dict[str, Corpus]:
    problems = check_corpora(dict(specs), vocab=vocab, seq_len=1, tokenizer=tokenizer)
    if problems:
        raise ValueError(f"corpus {', '.join(spec for _, spec in specs)}: " + "; ".join(problems))
    loaded = {name: _load_bin(_path(spec), vocab) for name, spec in specs if _is_bin(_path(spec))}
    texts = {name: open_source(spec) for name, spec in specs if name not in loaded}
    if tokenizer == "bytes":
        for name, source in texts.items():
            loaded[name] = _in_memory(source, vocab) if source.size <= IN_MEMORY else _cached(source, vocab)
    elif texts:
        digests = {name: digest_of(source) for name, source in texts.items()}
        encoder = make_encoder(tokenizer, vocab, [(texts[name], digests[name]) for name in texts])
        loaded |= {name: _cached(source, vocab, digests[name], encoder) for name, source in texts.items()}
    for name, spec in specs:
        if problems := _too_short(len(loaded[name].train), len(loaded[name].val), 1):
            raise ValueError(f"corpus {spec}: " + "; ".join(problems))
    return {name: loaded[name] for name, _ in specs}


def _in_memory(source: Source, vocab: int) -> Corpus:
    digest = hashlib.sha256()
    parts: dict[Split, list[bytes]] = {"train": [], "val": []}
    files: list[CorpusFile] = []
    last = None
    for piece in source.pieces():
        if source.files is None and piece.of != last:
            files.append(CorpusFile(piece.of, piece.size, piece.split))
        last = add_to_digest(digest, piece, last)
        parts[piece.split].append(piece.text)
    train, val = (np.frombuffer(b"".join(parts[split]), dtype=np.uint8) for split in ("train", "val"))
    return Corpus(source.name, train, val, source.files or tuple(files), digest.hexdigest(), vocab, 1.0)


def _cached(source: Source, vocab: int, digest: str | None = None, encoder: Encoder | None = None) -> Corpus:
    """The corpus from the cache of tokens, into which it is written first if it is not there."""
    digest = digest or digest_of(source)
    encoder = encoder or make_encoder("bytes", vocab, [])

    def build(folder: Path) -> dict[str, Any]:
        with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
            counts, read = _write_tokens(source, encoder, {"train": train, "val": val})
        if read != digest:
            raise ValueError(
                f"needed {source.name} to stay as it is, got other bytes while it was tokenized: start again"
            )
        return {"dtype": encoder.dtype} | counts

    train, val, said = kept_tokens(key_of("tokens", digest, encoder.id, encoder.dtype), build)
    ratio = said["val_bytes"] / said["val"] if said["val"] else None
    files = source.files or tuple(CorpusFile(*entry) for entry in said["files"])
    whole = digest if encoder.id == "bytes" else key_of(digest, encoder.id)
    return Corpus(source.name, train, val, files, whole, vocab, ratio)


def _write_tokens(source: Source, encoder: Encoder, to: Mapping[str, BinaryIO]) -> tuple[dict[str, Any], str]:
    """Tokens and bytes of both parts, the files read, and the digest of the text."""
    digest = hashlib.sha256()
    counts: dict[str, Any] = {"train": 0, "val": 0, "val_bytes": 0, "files": []}
    last: str | None = None

    def readable() -> Iterator[Piece]:
        nonlocal last
        for piece in source.pieces():
            first = piece.of != last
            last = add_to_digest(digest, piece, last)
            if encoder.id == "bytes" or decodes(piece.text):
                if source.files is None and first:
                    counts["files"].append([piece.of, piece.size, piece.split])
                yield piece

    for pieces in _batches(readable()):
        for piece, tokens in zip(pieces, encoder.encode([p.text for p in pieces]), strict=True):
            counts[piece.split] += len(tokens)
            counts["val_bytes"] += len(piece.text) if piece.split == "val" else 0
            to[piece.split].write(tokens.tobytes())
    return counts, digest.hexdigest()


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece.text)
        if held >= CHUNK:
            yield batch
            batch, held = [], 0
    yield batch


def _load_bin(path: Path, vocab: int) -> Corpus:
    files = _bin_files(path)
    arrays = [open_bin(file) for file in files]

    def read() -> dict[str, Any]:
        digest = hashlib.sha256()
        problems: list[str] = []
        for file, tokens in zip(files, arrays, strict=True):
            problems += check_tokens(tokens, vocab, str(file), whole=True)
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
            digest.update(tokens.data)
        return {"sha256": digest.hexdigest(), "problems": problems}

    said = remembered(files, f"tokens below {vocab}", read)
    if said["problems"]:
        raise ValueError(f"corpus {path}: " + "; ".join(said["problems"]))
    n_train, _ = _bin_sizes([len(tokens) for tokens in arrays])
    train, val = (arrays[0], arrays[1]) if len(arrays) == 2 else (arrays[0][:n_train], arrays[0][n_train:])
    splits: list[Any] = ["train", "val"] if len(files) == 2 else ["both"]
    listed = tuple(CorpusFile(f.name, f.stat().st_size, split) for f, split in zip(files, splits, strict=True))
    return Corpus(path.name, train, val, listed, said["sha256"], vocab, None)


def _is_bin(path: Path) -> bool:
    return len(_bin_files(path)) > 0


def _bin_files(path: Path) -> list[Path]:
    """The token file, or train.bin and val.bin of a folder; none if this is something else."""
    if path.is_file():
        return [path] if path.suffix == ".bin" else []
    pair = [path / "train.bin", path / "val.bin"]
    return pair if all(p.is_file() for p in pair) else []


def _bin_sizes(counts: list[int]) -> tuple[int, int]:
    if len(counts) == 2:
        return counts[0], counts[1]
    return counts[0] - counts[0] // TAIL, counts[0] // TAIL


def _path(spec: str) -> Path:
    return Path(sysconfig.get_path("stdlib")) if spec == "stdlib" else Path(spec).expanduser()


def _resolved(spec: str) -> str:
    return spec if spec == "stdlib" or spec.startswith("hf:") else str(Path(spec).expanduser().resolve())


def _too_short(n_train: int, n_val: int, seq_len: int) -> list[str]:
    if n_train + n_val == 0:
        return ["needed text, got nothing: no readable file, or only empty ones"]
    return [
        f"needed more than seq_len = {seq_len} tokens in the {split} part, got {n:,}: "
        + ("add files" if n == 0 else "use a larger corpus or a shorter seq_len")
        for split, n in (("train", n_train), ("validation", n_val))
        if n <= seq_len
    ]
