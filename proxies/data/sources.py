"""Sources of text: a file, a folder, the standard library, or a data set, read in pieces.

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

from proxies.data.token_files import get_cache_folder, remember

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
DATASET_SUFFIXES = (".parquet", ".jsonl")
# Files in the folder of a data set that was saved to disk.
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")


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


def is_dataset(spec: str) -> bool:
    """Return whether a corpus is a data set of rows, which the package datasets reads."""
    path = Path(spec).expanduser()
    is_saved = any((path / name).is_file() for name in SAVED_DATASET_FILES)
    return spec.startswith("hf:") or path.suffix in DATASET_SUFFIXES or is_saved


def open_source(spec: str) -> Source:
    """Return the text that a corpus setting names.

    Args:
        spec: "stdlib", a data set, or the path of a text file or folder.

    Returns:
        The source. Its text is not read yet.

    Raises:
        ValueError: If a data set cannot be opened.
    """
    if is_dataset(spec):
        return _open_dataset_source(spec)
    if spec == "stdlib":
        return _open_folder("stdlib", Path(sysconfig.get_path("stdlib")), python_only=True)
    path = Path(spec)
    return _open_folder(path.name, path, python_only=False) if path.is_dir() else _open_text_file(path)


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


def check_dataset(spec: str) -> list[str]:
    """List what is wrong with a data set on this machine. Remote data sets are not looked up.

    Returns:
        One message per problem; empty if none is found.
    """
    try:
        name, _, _, _ = _parse_dataset_spec(spec)
        path = Path(name).expanduser()
        if not path.exists():
            if path.suffix in DATASET_SUFFIXES or path.is_absolute():
                return [f"needed an existing file or folder, got {name!r}: no such path"]
            import_optional("datasets", f"corpus {spec!r}")
            return []
        _open_dataset(spec)
    except ValueError as error:
        return [str(error)]
    return []


def _open_folder(name: str, root: Path, *, python_only: bool) -> Source:
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


def _open_text_file(path: Path) -> Source:
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


def _parse_dataset_spec(spec: str) -> tuple[str, str, str, str]:
    """Return name, configuration, split and column of hf:NAME[:CONFIG][:SPLIT][:COLUMN]."""
    parts = spec.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 4:
        raise ValueError(
            f"needed 'hf:NAME[:CONFIG][:SPLIT][:COLUMN]', got {spec!r}: leave a part empty for its default"
        )
    name, config, split, column = parts + [""] * (4 - len(parts))
    return name, config, split or "train", column or "text"


def _open_dataset(spec: str) -> tuple[Any, str]:
    """Return a data set (of the package datasets) and the name of its text column.

    Raises:
        ValueError: If the data set cannot be opened or has no such column of text.
    """
    name, config, split, column = _parse_dataset_spec(spec)
    datasets = import_optional("datasets", f"corpus {spec!r}")
    datasets.disable_progress_bars()
    path = Path(name).expanduser()
    try:
        if path.suffix in DATASET_SUFFIXES and path.is_file():
            builder = "parquet" if path.suffix == ".parquet" else "json"
            data = datasets.load_dataset(
                builder, data_files=str(path), split="train", cache_dir=str(get_cache_folder() / "datasets")
            )
        elif path.is_dir() and any((path / saved).is_file() for saved in SAVED_DATASET_FILES):
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise ValueError(f"needed a split {split!r}, got {', '.join(data)}")
                data = data[split]
        else:
            data = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot open data set {name!r}, split {split!r}: {error}") from error
    if column not in data.column_names:
        raise ValueError(
            f"needed a column {column!r} of text in {name!r}, got {', '.join(data.column_names)}: "
            f"name it, hf:{name}:::COLUMN"
        )
    dtype = getattr(data.features[column], "dtype", None)
    if dtype not in ("string", "large_string"):
        raise ValueError(f"needed text in column {column!r} of {name!r}, got {dtype}: name another, hf:{name}:::COLUMN")
    return data, column


def _open_dataset_source(spec: str) -> Source:
    name, _, _, _ = _parse_dataset_spec(spec)
    data, column = _open_dataset(spec)
    path = Path(name).expanduser()
    arrow_files = tuple(Path(file["filename"]) for file in data.cache_files)
    paths = (path,) if path.is_file() else arrow_files

    def pieces() -> Iterator[Piece]:
        for i, row in enumerate(data.select_columns([column])):
            if row[column]:
                # Rows are separated as lines are.
                text = (row[column] + "\n").encode("utf-8")
                yield Piece(str(i), len(text), "val" if is_held_out_block(i) else "train", text)

    size = sum(p.stat().st_size for p in paths)
    files = tuple(CorpusFile(p.name, p.stat().st_size, "both") for p in paths)
    return Source(path.stem if path.exists() else name, paths, size, files, pieces)
