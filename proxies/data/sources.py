"""Sources of text that is read in pieces: a file, a folder, or the standard library.

A source is read piece by piece, always in the same order, so it need not fit in memory. What is held out depends only
on paths and positions: whole files of a folder, blocks of a text file, rows of a data set.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from proxies.data.token_files import remember

Split = Literal["train", "val"]

# Files are held out if the first byte of the hash of their path is below this: 7.8 %.
VAL_HASHES = 20
# A single text file is split by blocks of this many bytes.
BLOCK_BYTES = 2048
# One block, row or token in so many is held out. A .bin file holds out its end, so that both parts stay memory-mapped.
VAL_DIVISOR = 16
# The held-out blocks of a larger file are not counted one by one when its length is checked.
EXACT_SIZE_LIMIT = 1 << 27
# A larger file is read in pieces of this many bytes.
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class CorpusFile:
    """A file that a corpus was read from.

    Attributes:
        path: Path relative to the corpus, with forward slashes.
        size: Bytes.
        split: The part that it belongs to; "both" for a single file that is divided.
    """

    path: str
    size: int
    split: Literal["train", "val", "both"]


class Piece(NamedTuple):
    """A piece of text.

    Attributes:
        origin: Relative path of the file, or number of the row.
        size: Bytes of the whole file or row.
        split: The part that the piece belongs to.
        text: The bytes.
    """

    origin: str
    size: int
    split: Split
    text: bytes


@dataclass(frozen=True)
class Source:
    """Text that can be read repeatedly.

    Attributes:
        name: Name for messages and records.
        paths: Files that the text depends on.
        size: Bytes, approximately.
        files: The files, if they are divided between the parts; None if each file belongs to one part.
        pieces: Called to read the text from the beginning.
    """

    name: str
    paths: tuple[Path, ...]
    size: int
    files: tuple[CorpusFile, ...] | None
    pieces: Callable[[], Iterator[Piece]]


class TextDigest(TypedDict):
    """The digest of a text, as kept on disk."""

    sha256: str


def import_optional(package: str, purpose: str) -> Any:
    """Import an optional package.

    Args:
        package: Name of the package.
        purpose: What it is needed for, for the message.

    Returns:
        The module.

    Raises:
        ValueError: If it is not installed. The message names the extra to install.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(
            f"needed the package {package} for {purpose}, which is not installed: pip install 'muscale[data]'"
        ) from error


def compute_digest(source: Source) -> str:
    """Return the sha256 of every relative path, size and content, in order.

    This takes one pass over the text. The digest of a large text is kept on disk.
    """

    def read() -> TextDigest:
        digest = hashlib.sha256()
        previous = None
        for piece in source.pieces():
            previous = update_digest(digest, piece, previous)
        return {"sha256": digest.hexdigest()}

    return str(remember(source.paths, "text", read)["sha256"])


def update_digest(digest: Any, piece: Piece, previous: str | None) -> str:
    """Add a piece to a digest. A file's name and size are added once, before its first piece.

    Args:
        digest: A hash object, updated in place.
        piece: The piece.
        previous: Origin of the piece before it; None for the first piece.

    Returns:
        The origin of this piece.
    """
    if piece.origin != previous:
        digest.update(f"{piece.origin}\0{piece.size}\0".encode("utf-8", "surrogateescape"))
    digest.update(piece.text)
    return piece.origin


def measure_sizes(spec: str) -> dict[Split, int]:
    """Return the bytes of both parts of a text file or folder, from names and sizes alone.

    For a large file, the division into parts is approximate.
    """
    path = Path(sysconfig.get_path("stdlib")) if spec == "stdlib" else Path(spec).expanduser()
    if path.is_file():
        size = path.stat().st_size
        if size > EXACT_SIZE_LIMIT:
            held_out = size // VAL_DIVISOR
        else:
            starts = enumerate(range(0, size, BLOCK_BYTES))
            held_out = sum(min(BLOCK_BYTES, size - start) for block, start in starts if is_held_out_block(block))
        return {"train": size - held_out, "val": held_out}
    sizes: dict[Split, int] = {"train": 0, "val": 0}
    for relative in list_files(path, python_only=spec == "stdlib"):
        sizes[assign_split(relative)] += (path / relative).stat().st_size
    return sizes


def list_files(root: Path, *, python_only: bool) -> list[str]:
    """Return the relative paths of the files below a folder, sorted.

    Hidden files are left out, and links to folders are not followed.

    Args:
        root: The folder.
        python_only: List only .py files, without installed packages.

    Returns:
        Relative paths with forward slashes.
    """
    paths: list[str] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [d for d in inner if d[0] != "." and not (python_only and d in ("site-packages", "dist-packages"))]
        prefix = Path(folder).relative_to(root).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        paths += [prefix + name for name in names if name[0] != "." and (name.endswith(".py") or not python_only)]
    return sorted(paths)


def assign_split(relative: str) -> Split:
    """Return the part that a file of a folder belongs to, by the hash of its relative path."""
    first = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).digest()[0]
    return "val" if first < VAL_HASHES else "train"


def is_held_out_block(index: int) -> bool:
    """Return whether a block of a text file, or a row, is held out: one in sixteen, by a hash of its number."""
    # The salt was chosen so that block 1 is held out and block 0 is not, so that even a file of two blocks has both
    # parts.
    return hashlib.sha256(f"block {index} 0".encode()).digest()[0] < 256 // VAL_DIVISOR


def is_utf8(content: bytes | mmap.mmap) -> bool:
    """Return whether bytes are valid UTF-8."""
    try:
        for begin, end in _find_bounds(content, PIECE_BYTES):
            content[begin:end].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def open_folder(name: str, root: Path, *, python_only: bool) -> Source:
    """Return the text of a folder, split by file.

    Args:
        name: Name for messages and records.
        root: The folder.
        python_only: Read only .py files, without installed packages.
    """
    names = list_files(root, python_only=python_only)

    def pieces() -> Iterator[Piece]:
        for relative in names:
            content = _read_content(root / relative)
            # The standard library has a few files in other encodings, for its tests. They are used as bytes.
            if len(content) and (python_only or is_utf8(content)):
                for begin, end in _find_bounds(content, PIECE_BYTES):
                    yield Piece(relative, len(content), assign_split(relative), content[begin:end])

    paths = tuple(root / relative for relative in names)
    return Source(name, paths, sum(path.stat().st_size for path in paths), None, pieces)


def open_text_file(path: Path) -> Source:
    """Return the text of a file, split by blocks. Reading it raises ValueError if it is not UTF-8."""
    size = path.stat().st_size

    def pieces() -> Iterator[Piece]:
        content = _read_content(path)
        if not is_utf8(content):
            raise ValueError(f"corpus {path}: needed utf-8 text, got other bytes: convert it, or name tokens .bin")
        begin, end = 0, 0
        for block, (block_begin, block_end) in enumerate(_find_bounds(content, BLOCK_BYTES)):
            if block and is_held_out_block(block) != is_held_out_block(block - 1):
                yield Piece(path.name, size, "val" if is_held_out_block(block - 1) else "train", content[begin:end])
                begin = block_begin
            end = block_end
        if end:
            yield Piece(path.name, size, "val" if is_held_out_block(block) else "train", content[begin:end])

    return Source(path.name, (path,), size, (CorpusFile(path.name, size, "both"),), pieces)


def _read_content(path: Path) -> bytes | mmap.mmap:
    """Return the bytes of a file. A large file is memory-mapped."""
    if path.stat().st_size <= 16 * PIECE_BYTES:
        return path.read_bytes()
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _find_bounds(content: bytes | mmap.mmap, step: int) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of pieces of about `step` bytes that do not cut a UTF-8 character."""
    begin = 0
    for target in range(step, len(content) + step, step):
        end = min(target, len(content))
        while end < len(content) and content[end] & 0xC0 == 0x80 and end < target + 3:
            end += 1
        yield begin, end
        begin = end
