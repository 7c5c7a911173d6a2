"""Text and where it comes from: a file, a folder, the standard library, a data set; in pieces, split once and for all.

A source is read piece by piece, always in the same order, so that it need not fit in memory. What is held out depends on
paths and positions only: whole files of a folder, blocks of a text file, rows of a data set.
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
from typing import Any, Literal, NamedTuple

from proxies.data.token_files import cache_folder, remembered

Split = Literal["train", "val"]

VAL_OF_256 = 20  # files whose path hashes below this are held out: 7.8 %
BLOCK = 2048  # bytes; one text file is split by blocks of this size, one in sixteen held out
TAIL = 16  # a .bin file holds out its last sixteenth, so that both parts stay memory-mapped
MANY = 1 << 27  # bytes; the blocks of a larger file are not counted one by one to see whether it is long enough
PIECE = 1 << 20  # bytes; a larger file is read in pieces of this size
ROWS = (".parquet", ".jsonl")
SAVED = ("state.json", "dataset_dict.json")  # what a data set that was saved to disk has


@dataclass(frozen=True)
class CorpusFile:
    path: str  # relative to the corpus, with forward slashes
    size: int  # bytes
    split: Literal["train", "val", "both"]  # both: one file, cut into parts


class Piece(NamedTuple):
    of: str  # the file, or the number of the row
    size: int  # bytes of the whole file or row
    split: Split
    text: bytes


@dataclass(frozen=True)
class Source:
    """Text that can be read again and again."""

    name: str
    paths: tuple[Path, ...]  # what its bytes depend on
    size: int  # bytes, about
    files: tuple[CorpusFile, ...] | None  # None: every file is one piece or more, of one split
    pieces: Callable[[], Iterator[Piece]]


def need(package: str, for_what: str) -> Any:
    """The optional package. ValueError that names the extra if it is not there."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(
            f"needed the package {package} for {for_what}, which is not installed: pip install 'muscale[data]'"
        ) from error


def is_rows(spec: str) -> bool:
    """Is this a data set of rows, which the package datasets reads?"""
    path = Path(spec).expanduser()
    return spec.startswith("hf:") or path.suffix in ROWS or any((path / name).is_file() for name in SAVED)


def open_source(spec: str) -> Source:
    """The text called `spec`. ValueError if there is nothing to read."""
    if is_rows(spec):
        return _rows(spec)
    if spec == "stdlib":
        return _folder("stdlib", Path(sysconfig.get_path("stdlib")), python_only=True)
    path = Path(spec)
    return _folder(path.name, path, python_only=False) if path.is_dir() else _text(path)


def digest_of(source: Source) -> str:
    """sha256 of every relative path, size and content, in order; one pass over the text, kept if that is large."""

    def read() -> dict[str, Any]:
        digest = hashlib.sha256()
        last = None
        for piece in source.pieces():
            last = add_to_digest(digest, piece, last)
        return {"sha256": digest.hexdigest()}

    return str(remembered(source.paths, "text", read)["sha256"])


def add_to_digest(digest: Any, piece: Piece, last: str | None) -> str:
    """Add a piece; `last` is the file of the one before, so that a file's name and size come once."""
    if piece.of != last:
        digest.update(f"{piece.of}\0{piece.size}\0".encode("utf-8", "surrogateescape"))
    digest.update(piece.text)
    return piece.of


def sizes_of(spec: str) -> dict[Split, int]:
    """Bytes of the two parts, from names and sizes alone (about those of a large file); not for rows."""
    path = Path(sysconfig.get_path("stdlib")) if spec == "stdlib" else Path(spec).expanduser()
    if path.is_file():
        size = path.stat().st_size
        if size > MANY:
            held = size // TAIL
        else:
            held = sum(min(BLOCK, size - at) for i, at in enumerate(range(0, size, BLOCK)) if held_block(i))
        return {"train": size - held, "val": held}
    sizes: dict[Split, int] = {"train": 0, "val": 0}
    for relative in listing(path, python_only=spec == "stdlib"):
        sizes[split_of(relative)] += (path / relative).stat().st_size
    return sizes


def listing(root: Path, *, python_only: bool) -> list[str]:
    """Relative paths of the files below root, sorted; no hidden ones, no links to folders, no installed packages."""
    found: list[str] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [d for d in inner if d[0] != "." and not (python_only and d in ("site-packages", "dist-packages"))]
        prefix = Path(folder).relative_to(root).as_posix()
        prefix = "" if prefix == "." else prefix + "/"
        found += [prefix + name for name in names if name[0] != "." and (name.endswith(".py") or not python_only)]
    return sorted(found)


def split_of(relative: str) -> Split:
    first = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).digest()[0]
    return "val" if first < VAL_OF_256 else "train"


def held_block(index: int) -> bool:
    # One block in sixteen by hash. The salt was chosen so that block 1 is held out and block 0 is not: with it even a
    # file of two blocks has both parts.
    return hashlib.sha256(f"block {index} 0".encode()).digest()[0] < 256 // TAIL


def is_utf8(content: bytes | mmap.mmap) -> bool:
    try:
        for begin, end in _bounds(content, PIECE):
            content[begin:end].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _folder(name: str, root: Path, *, python_only: bool) -> Source:
    names = listing(root, python_only=python_only)

    def pieces() -> Iterator[Piece]:
        for relative in names:
            content = _content(root / relative)
            # The standard library has a few files in other encodings, for its tests: bytes like the others.
            if len(content) and (python_only or is_utf8(content)):
                for begin, end in _bounds(content, PIECE):
                    yield Piece(relative, len(content), split_of(relative), content[begin:end])

    paths = tuple(root / relative for relative in names)
    return Source(name, paths, sum(p.stat().st_size for p in paths), None, pieces)


def _text(path: Path) -> Source:
    size = path.stat().st_size

    def pieces() -> Iterator[Piece]:
        content = _content(path)
        if not is_utf8(content):
            raise ValueError(f"corpus {path}: needed utf-8 text, got other bytes: convert it, or name tokens .bin")
        begin, end = 0, 0
        for block, (at, after) in enumerate(_bounds(content, BLOCK)):
            if block and held_block(block) != held_block(block - 1):
                yield Piece(path.name, size, "val" if held_block(block - 1) else "train", content[begin:end])
                begin = at
            end = after
        if end:
            yield Piece(path.name, size, "val" if held_block(block) else "train", content[begin:end])

    return Source(path.name, (path,), size, (CorpusFile(path.name, size, "both"),), pieces)


def _content(path: Path) -> bytes | mmap.mmap:
    """The bytes of a file; a large one is mapped, not read."""
    if path.stat().st_size <= 16 * PIECE:
        return path.read_bytes()
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _bounds(content: bytes | mmap.mmap, step: int) -> Iterator[tuple[int, int]]:
    """Where pieces of about `step` bytes begin and end; no character of utf-8 is cut."""
    begin = 0
    for at in range(step, len(content) + step, step):
        end = min(at, len(content))
        while end < len(content) and content[end] & 0xC0 == 0x80 and end < at + 3:
            end += 1
        yield begin, end
        begin = end


def check_rows(spec: str) -> list[str]:
    """What is wrong with a data set that lies on this machine, in words; others are not looked up."""
    try:
        name, _, _, _ = _parts(spec)
        path = Path(name).expanduser()
        if not path.exists():
            if path.suffix in ROWS or path.is_absolute():
                return [f"needed an existing file or folder, got {name!r}: no such path"]
            need("datasets", f"corpus {spec!r}")
            return []
        _open_rows(spec)
    except ValueError as error:
        return [str(error)]
    return []


def _parts(spec: str) -> tuple[str, str, str, str]:
    """Name, configuration, split and column of hf:NAME[:CONFIG][:SPLIT][:COLUMN]."""
    parts = spec.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 4:
        raise ValueError(
            f"needed 'hf:NAME[:CONFIG][:SPLIT][:COLUMN]', got {spec!r}: leave a part empty for its default"
        )
    name, config, split, column = parts + [""] * (4 - len(parts))
    return name, config, split or "train", column or "text"


def _open_rows(spec: str) -> tuple[Any, str]:
    """The opened data set (of package datasets) and its text column. ValueError if it cannot be opened or has none."""
    name, config, split, column = _parts(spec)
    datasets = need("datasets", f"corpus {spec!r}")
    datasets.disable_progress_bars()
    path = Path(name).expanduser()
    try:
        if path.suffix in ROWS and path.is_file():
            kind = "parquet" if path.suffix == ".parquet" else "json"
            data = datasets.load_dataset(
                kind, data_files=str(path), split="train", cache_dir=str(cache_folder() / "datasets")
            )
        elif path.is_dir() and any((path / saved).is_file() for saved in SAVED):
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
            f"needed a column {column!r} of text in {name!r}, got {', '.join(data.column_names)}: name it, hf:{name}:::COLUMN"
        )
    holds = getattr(data.features[column], "dtype", None)
    if holds not in ("string", "large_string"):
        raise ValueError(f"needed text in column {column!r} of {name!r}, got {holds}: name another, hf:{name}:::COLUMN")
    return data, column


def _rows(spec: str) -> Source:
    name, _, _, _ = _parts(spec)
    data, column = _open_rows(spec)
    path = Path(name).expanduser()
    arrow = tuple(Path(file["filename"]) for file in data.cache_files)
    paths = (path,) if path.is_file() else arrow

    def pieces() -> Iterator[Piece]:
        for i, row in enumerate(data.select_columns([column])):
            if row[column]:
                text = (row[column] + "\n").encode("utf-8")  # rows are separated as lines are
                yield Piece(str(i), len(text), "val" if held_block(i) else "train", text)

    size = sum(p.stat().st_size for p in paths)
    files = tuple(CorpusFile(p.name, p.stat().st_size, "both") for p in paths)
    return Source(path.stem if path.exists() else name, paths, size, files, pieces)
