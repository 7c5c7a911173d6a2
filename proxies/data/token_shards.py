"""Tokens in several files: the files of a folder, and how they are indexed as one array."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from proxies.data.shard_names import NAMING, ShardFiles, assign_shards
from proxies.data.sources import list_files
from proxies.data.token_files import Tokens
from proxies.data.token_formats import TOKEN_SUFFIXES, explain_format

# Files that lie beside tokens and are neither tokens nor text to train on.
COMPANIONS = re.compile(r".*\.(idx|index|metadata|json|pkl|model|lock|crc|sha256|md5)", re.IGNORECASE)
# A folder of more files is read before it is known that none of them is text.
EXAMINED_FILES = 200
COMPRESSED = re.compile(r".*\.(bin|npy)\.(gz|zst|xz|bz2)")


class JoinedTokens:
    """Several arrays of tokens that are indexed as one, without a copy.

    Args:
        parts: Arrays of one type, such as memory-mapped shards; none of them empty.
    """

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts = tuple(parts)
        self.dtype = self.parts[0].dtype
        # Where each part ends.
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int]:
        """The number of tokens, as an array has it."""
        return (len(self),)

    def __getitem__(self, key: slice | int | NDArray[np.int64]) -> NDArray[Any]:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            return np.concatenate(_cut_parts(self.parts, start, stop) or [np.empty(0, self.dtype)])
        index = np.asarray(key)
        if index.size and (index.min() < -len(self) or index.max() >= len(self)):
            raise IndexError(f"needed an index below {len(self)}, got {index.max()}")
        index = np.where(index < 0, index + len(self), index)
        part_of = np.searchsorted(self._ends, index, side="right")
        tokens = np.empty(index.shape, self.dtype)
        for k in np.unique(part_of):
            is_inside = part_of == k
            tokens[is_inside] = self.parts[k][index[is_inside] - (self._ends[k] - len(self.parts[k]))]
        return tokens

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)


def join_tokens(parts: Sequence[Tokens]) -> Tokens:
    """Return arrays of tokens as one, which is only a view of them.

    What reads tokens indexes, slices and measures them. A view of several arrays can do that, but nothing else.
    """
    return parts[0] if len(parts) == 1 else cast(Tokens, JoinedTokens(parts))


def split_tokens(parts: Sequence[Tokens], n: int) -> tuple[Tokens, Tokens]:
    """Return the first n tokens of several arrays and the rest, as views."""
    total = sum(len(part) for part in parts)
    first, rest = _cut_parts(parts, 0, n), _cut_parts(parts, n, total)
    return join_tokens(first or [parts[0][:0]]), join_tokens(rest or [parts[0][:0]])


def _cut_parts(parts: Sequence[Tokens], start: int, stop: int) -> list[Tokens]:
    """Return the pieces of several arrays that lie in a range of the whole."""
    pieces = []
    begin = 0
    for part in parts:
        low, high = max(start - begin, 0), min(stop - begin, len(part))
        if low < high:
            pieces.append(part[low:high])
        begin += len(part)
    return pieces


def find_token_files(path: Path, names: Sequence[str]) -> ShardFiles | None:
    """Return the files of tokens that a path names.

    Args:
        path: A file of tokens or a folder of them.
        names: Relative paths of the files in the folder.

    Returns:
        The files; None if the path is something else, such as text.

    Raises:
        ValueError: If a folder holds tokens and text, or it is not clear what a shard is for.
    """
    if path.is_file():
        return ShardFiles((path,), ()) if path.suffix in TOKEN_SUFFIXES else None
    if not path.is_dir():
        return None
    pair = [path / "train.bin", path / "val.bin"]
    if all(file.is_file() for file in pair):
        return ShardFiles((pair[0],), (pair[1],))
    shards = [name for name in names if name.endswith(TOKEN_SUFFIXES)]
    if not shards:
        if packed := [name for name in names if COMPRESSED.fullmatch(name)]:
            raise ValueError(f"needed plain files of tokens, got {packed[0]} in {path}: unpack the files")
        return None
    others = [name for name in names if name not in shards and not COMPANIONS.fullmatch(Path(name).name)]
    token_bytes, other_bytes = (sum((path / n).stat().st_size for n in group) for group in (shards, others))
    if other_bytes > 10 * token_bytes:
        # A binary file among text.
        return None
    if 10 * other_bytes > token_bytes:
        raise ValueError(
            f"needed a folder of tokens or of text, got both in {path}: {shards[0]} and {others[0]}: "
            "move one kind to a folder of its own"
        )
    return assign_shards(path, shards)


def check_format(path: Path, names: Sequence[str]) -> str | None:
    """Return why a file, or a folder of a few files, cannot be text, by the first bytes; None if it may be text."""
    if path.is_file():
        problem = explain_format(path)
        return f"needed utf-8 text or tokens, got {problem}" if problem else None
    files = [path / name for name in names]
    if not files or len(files) > EXAMINED_FILES or any(_begins_as_text(file) for file in files):
        return None
    if problem := explain_format(files[0]):
        return f"needed utf-8 text or tokens, got {problem}"
    return f"needed text, got no readable file{describe_files(path)}"


def _begins_as_text(file: Path) -> bool:
    with file.open("rb") as stream:
        beginning = stream.read(4096)
    try:
        # A character that the end of this part cuts is no mistake.
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return False
    return True


def describe_files(path: Path) -> str:
    """Return what a folder without text holds, and what a folder of data must hold."""
    if not path.is_dir() or not (names := list_files(path, python_only=False)):
        return ""
    endings = Counter("".join(Path(name).suffixes[-2:]) or "no ending" for name in names)
    listed = ", ".join(f"{count} with {ending}" for ending, count in endings.most_common(3))
    return f" ({listed} in {path}); a folder holds text in UTF-8, rows in .parquet or .jsonl, or tokens: {NAMING}"
