"""What proxies read: bytes of text or a file of tokens, split into train and validation once and for all.

The default corpus, "stdlib", is the source of Python's own standard library: about 30 MB, on every machine.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Split = Literal["train", "val"]
Tokens = NDArray[Any]  # 1-D, uint8 (bytes) or uint16 (.bin)

BYTES = 256
VAL_OF_256 = 20  # files whose path hashes below this are held out: 7.8 %
BLOCK = 2048  # bytes; one text file is split by blocks of this size, one in sixteen held out
TAIL = 16  # a .bin file holds out its last sixteenth, so that both parts stay memory-mapped
DRAW = 4096  # windows whose offsets are drawn together
SCAN = 1 << 20  # tokens looked at in each of the places that a check samples


@dataclass(frozen=True)
class CorpusFile:
    path: str  # relative to the corpus, with forward slashes
    size: int  # bytes
    split: Literal["train", "val", "both"]  # both: one file, cut into parts


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out tokens, which never overlap."""

    name: str
    train: Tokens
    val: Tokens
    files: tuple[CorpusFile, ...]
    sha256: str  # of every relative path, size and content, in order
    vocab: int


def load_corpus(spec: str, *, vocab: int = BYTES) -> Corpus:
    """The corpus called `spec`: "stdlib", a text file, a folder of text, or a .bin file of little-endian uint16 tokens.

    A folder (and the standard library) is split by file, a text file by blocks, a .bin file at its tail; the split
    depends on paths and positions only, never on a seed. Read once per process. Raises ValueError if there is nothing
    to train on or a token does not fit in `vocab`.
    """
    return _load(spec if spec == "stdlib" else str(Path(spec).expanduser().resolve()), vocab)


def check_corpus(spec: str, *, vocab: int = BYTES, seq_len: int = 1) -> list[str]:
    """What would keep windows of `seq_len` tokens from being read, in words; empty if nothing is found.

    Cheap: it looks at names and sizes, and for a .bin file at three samples of its tokens; `load_corpus` looks at all.
    """
    path = Path(sysconfig.get_path("stdlib")) if spec == "stdlib" else Path(spec).expanduser()
    if not path.exists():
        return [f"needed 'stdlib' or an existing file or folder, got {spec!r}: no such path"]
    if path.suffix == ".bin" and path.is_file():
        return _check_bin(path, vocab, seq_len)
    problems = []
    if vocab < BYTES:
        problems.append(
            f"text is read as bytes and needs vocab >= {BYTES}, got {vocab}: raise vocab or give a .bin file"
        )
    if path.is_file():
        size = path.stat().st_size
        held = sum(min(BLOCK, size - at) for i, at in enumerate(range(0, size, BLOCK)) if _held_block(i))
        sizes: dict[Split, int] = {"train": size - held, "val": held}
    else:
        sizes = {"train": 0, "val": 0}
        for relative in _listing(path, python_only=spec == "stdlib"):
            sizes[_split_of(relative)] += (path / relative).stat().st_size
    return problems + _too_short(sizes["train"], sizes["val"], seq_len)


class Windows:
    """Random windows of seq_len tokens, each followed by its next token.

    Where window i begins depends on (seed, i) alone. So the position in the data is one integer, the order does not
    depend on the batch size, and a resumed run reads what an uninterrupted one would have read. Windows are drawn
    with replacement.
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int) -> None:
        if len(tokens) <= seq_len:
            raise ValueError(f"needed more than seq_len = {seq_len} tokens, got {len(tokens)}: use a larger corpus")
        if seed < 0:
            raise ValueError(f"needed a seed >= 0, got {seed}: numpy seeds are not negative")
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self._draws: dict[int, NDArray[np.int64]] = {}

    def offsets(self, start: int, n: int) -> NDArray[np.int64]:
        """Where windows start, ..., start + n - 1 begin, int64 [n]."""
        blocks = range(start // DRAW, (start + n - 1) // DRAW + 1)
        self._draws = {block: self._draws[block] if block in self._draws else self._draw(block) for block in blocks}
        drawn = np.concatenate([self._draws[block] for block in blocks])
        first = start - blocks.start * DRAW
        return drawn[first : first + n]

    def batch(self, start: int, n: int) -> tuple[Tensor, Tensor]:
        """Windows start, ..., start + n - 1: inputs and next tokens, int64 [n, seq_len] each."""
        if start < 0 or n < 1:
            raise ValueError(f"needed start >= 0 and n >= 1, got start = {start}, n = {n}")
        return _cut(self.tokens, self.offsets(start, n), self.seq_len)

    def _draw(self, block: int) -> NDArray[np.int64]:
        generator = np.random.default_rng([self.seed, block])
        return generator.integers(0, len(self.tokens) - self.seq_len, size=DRAW)


def held_out(tokens: Tokens, seq_len: int, n: int) -> tuple[Tensor, Tensor]:
    """n windows evenly spaced over the validation tokens: inputs and next tokens, int64 [n, seq_len] each.

    Always the same ones, whatever the seed or the batch. They overlap if there are fewer than n * seq_len tokens.
    """
    if len(tokens) <= seq_len:
        raise ValueError(
            f"needed more than seq_len = {seq_len} validation tokens, got {len(tokens)}: use a larger corpus"
        )
    last = len(tokens) - seq_len - 1
    return _cut(tokens, np.arange(n, dtype=np.int64) * last // max(n - 1, 1), seq_len)


def _cut(tokens: Tokens, offsets: NDArray[np.int64], seq_len: int) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(tokens[offsets[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


@lru_cache(maxsize=4)
def _load(spec: str, vocab: int) -> Corpus:
    problems = check_corpus(spec, vocab=vocab)
    if problems:
        raise ValueError(f"corpus {spec}: " + "; ".join(problems))
    if spec == "stdlib":
        return _load_folder("stdlib", Path(sysconfig.get_path("stdlib")), vocab, python_only=True)
    path = Path(spec)
    if path.is_dir():
        return _load_folder(path.name, path, vocab, python_only=False)
    return _load_bin(path, vocab) if path.suffix == ".bin" else _load_text(path, vocab)


def _load_folder(name: str, root: Path, vocab: int, *, python_only: bool) -> Corpus:
    digest = hashlib.sha256()
    files: list[CorpusFile] = []
    parts: dict[Split, list[bytes]] = {"train": [], "val": []}
    for relative in _listing(root, python_only=python_only):
        content = (root / relative).read_bytes()
        if not content or not (python_only or _is_utf8(content)):
            continue
        split = _split_of(relative)
        parts[split].append(content)
        files.append(CorpusFile(relative, len(content), split))
        digest.update(f"{relative}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    train, val = (np.frombuffer(b"".join(parts[split]), dtype=np.uint8) for split in ("train", "val"))
    # Sizes were checked before; files that do not decode have been left out since.
    if problems := _too_short(len(train), len(val), 1):
        raise ValueError(f"corpus {root}: " + "; ".join(problems))
    return Corpus(name, train, val, tuple(files), digest.hexdigest(), vocab)


def _load_text(path: Path, vocab: int) -> Corpus:
    content = path.read_bytes()
    if not _is_utf8(content):
        raise ValueError(f"corpus {path}: needed utf-8 text, got other bytes: convert it, or name tokens .bin")
    tokens = np.frombuffer(content, dtype=np.uint8)
    held = np.repeat([_held_block(i) for i in range(-(-len(tokens) // BLOCK))], BLOCK)[: len(tokens)]
    files = (CorpusFile(path.name, len(content), "both"),)
    return Corpus(path.name, tokens[~held], tokens[held], files, _sha256_of_one(path, content), vocab)


def _load_bin(path: Path, vocab: int) -> Corpus:
    tokens = np.memmap(path, dtype="<u2", mode="r")
    highest = max(int(tokens[at : at + SCAN].max()) for at in range(0, len(tokens), SCAN))
    if highest >= vocab:
        raise ValueError(f"corpus {path}: needed tokens below vocab = {vocab}, got {highest}: raise vocab")
    split = len(tokens) - len(tokens) // TAIL
    files = (CorpusFile(path.name, path.stat().st_size, "both"),)
    return Corpus(path.name, tokens[:split], tokens[split:], files, _sha256_of_one(path, tokens.data), vocab)


def _check_bin(path: Path, vocab: int, seq_len: int) -> list[str]:
    size = path.stat().st_size
    if size % 2:
        return [f"needed uint16 tokens, two bytes each, got {size:,} bytes in {path}: write it as numpy uint16"]
    n = size // 2
    problems = _too_short(n - n // TAIL, n // TAIL, seq_len)
    if n:
        tokens = np.memmap(path, dtype="<u2", mode="r")
        highest = max(int(tokens[at : at + SCAN].max()) for at in {0, n // 2, max(n - SCAN, 0)})
        if highest >= vocab:
            problems.append(f"needed tokens below vocab = {vocab}, got {highest}: raise vocab")
    return problems


def _too_short(n_train: int, n_val: int, seq_len: int) -> list[str]:
    if n_train + n_val == 0:
        return ["needed text, got nothing: no readable file, or only empty ones"]
    return [
        f"needed more than seq_len = {seq_len} tokens in the {split} part, got {n:,}: "
        + ("add files" if n == 0 else "use a larger corpus or a shorter seq_len")
        for split, n in (("train", n_train), ("validation", n_val))
        if n <= seq_len
    ]


def _listing(root: Path, *, python_only: bool) -> list[str]:
    """Relative paths of the files below root, sorted; no hidden ones, no links to folders, no installed packages."""
    found: list[str] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [d for d in inner if d[0] != "." and not (python_only and d in ("site-packages", "dist-packages"))]
        prefix = Path(folder).relative_to(root).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        found += [prefix + name for name in names if name[0] != "." and (name.endswith(".py") or not python_only)]
    return sorted(found)


def _split_of(relative: str) -> Split:
    first = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).digest()[0]
    return "val" if first < VAL_OF_256 else "train"


def _held_block(index: int) -> bool:
    # One block in sixteen by hash. The salt was chosen so that block 1 is held out and block 0 is not: with it even a
    # file of two blocks has both parts.
    return hashlib.sha256(f"block {index} 0".encode()).digest()[0] < BYTES // TAIL


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _sha256_of_one(path: Path, content: Any) -> str:
    digest = hashlib.sha256(f"{path.name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
    digest.update(content)
    return digest.hexdigest()
