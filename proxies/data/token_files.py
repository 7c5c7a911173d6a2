"""Tokens on disk: .bin files of others, and the cache of text that was tokenized here.

A .bin file is plain little-endian uint16, or uint32 when its name ends in .u32.bin or .uint32.bin; a header of 256 int32 as
llm.c writes it (magic, version, number of tokens) is recognized and says the width itself.

The cache is a folder: MUSCALE_CACHE, or muscale in XDG_CACHE_HOME, or ~/.cache/muscale. What is in it can be made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

Tokens = NDArray[Any]  # 1-D; uint8, uint16 or uint32

VERSION = 1  # of the cache; another one is never read
WIDE = (".u32.bin", ".uint32.bin")
HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic -> version, type (llm.c: GPT-2's and Llama 3's tokens)
HEADER_BYTES = 1024
SCAN = 1 << 20  # tokens looked at in each of the places that a check samples
REMEMBER_ABOVE = 1 << 26  # bytes; below, reading all again costs less than 0.1 s
SETTLED_NS = 2_000_000_000  # a file changed less than this ago may change again within the clock's tick


def bin_layout(path: Path) -> tuple[str, int, int]:
    """A token file's numpy type, where its tokens begin (bytes), and how many there are. ValueError if sizes disagree."""
    size = path.stat().st_size
    head = [int(v) for v in np.fromfile(path, "<i4", count=3)]
    if len(head) == 3 and head[0] in HEADERS and head[1] == HEADERS[head[0]][0]:
        kind = HEADERS[head[0]][1]
        if size != HEADER_BYTES + head[2] * np.dtype(kind).itemsize:
            raise ValueError(
                f"needed the {head[2]:,} tokens that the header of {path} promises, got {size:,} bytes: copy it again"
            )
        return kind, HEADER_BYTES, head[2]
    kind = "<u4" if path.name.endswith(WIDE) else "<u2"
    width = np.dtype(kind).itemsize
    if size % width:
        words = {2: "uint16 tokens, two bytes each", 4: "uint32 tokens, four bytes each"}[width]
        raise ValueError(
            f"needed {words}, got {size:,} bytes in {path}: write it as numpy uint16, or as uint32 named .u32.bin"
        )
    return kind, 0, size // width


def open_bin(path: Path) -> Tokens:
    """The tokens of a .bin file, memory-mapped. ValueError if it is empty or sizes disagree."""
    kind, offset, count = bin_layout(path)
    if not count:
        raise ValueError(f"needed tokens, got an empty file {path}")
    return np.memmap(path, dtype=kind, mode="r", offset=offset, shape=(count,))


def check_tokens(tokens: Tokens, vocab: int, where: str, *, whole: bool) -> list[str]:
    """Why these cannot be tokens below `vocab`; without `whole` from three samples of them."""
    n = len(tokens)
    places = range(0, n, SCAN) if whole else sorted({0, n // 2, max(n - SCAN, 0)})
    highest = max(int(tokens[at : at + SCAN].max()) for at in places)
    if highest >= vocab:
        return [f"needed tokens below vocab = {vocab}, got {highest} in {where}: raise vocab"]
    sample = tokens[:SCAN]
    if tokens.dtype.itemsize == 2 and n > 64 and sample[::2].any() and not sample[1::2].any():
        return [f"needed uint16 tokens, got every second one 0 in {where}: it looks like uint32, name it .u32.bin"]
    return []


def cache_folder() -> Path:
    """Where tokens, tokenizers and digests are kept, made if it is not there. ValueError if it cannot be."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("MUSCALE_CACHE") or Path(base) / "muscale").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"needed a folder to keep tokens in, got {folder} ({error}): set MUSCALE_CACHE") from error
    return folder


def key_of(*parts: Any) -> str:
    """A name for what follows from these values: sha256 of their JSON and the cache's version."""
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()


def stamp(files: Sequence[Path]) -> list[list[Any]]:
    """Path, size, times and inode of every file. A program can set mtime back, but not ctime."""
    stats = [(str(path), path.stat()) for path in files]
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]


def remembered(files: Sequence[Path], what: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """compute(), a reading of all these files, kept on disk under their stamp if they are large.

    Assumed safe: a file whose bytes change gets another size, mtime or ctime. That fails for a change within the clock's
    tick (so files touched in the last two seconds are not remembered), for writes through a memory map that are not
    flushed yet, and on file systems that keep no ctime.
    """
    before = stamp(files)
    if sum(entry[1] for entry in before) <= REMEMBER_ABOVE:
        return compute()
    path = cache_folder() / "digests" / f"{key_of(what, before)}.json"
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    value = compute()
    newest = max(max(entry[2], entry[3]) for entry in before)
    if stamp(files) == before and time.time_ns() - newest > SETTLED_NS:
        write_whole(path, json.dumps(value))
    return value


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as stream:
            stream.write(text)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def kept_file(key: str, ending: str, make: Callable[[], str]) -> str:
    """The text kept under this key, made by one process while the others wait."""
    path = cache_folder() / f"{key}{ending}"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            write_whole(path, make())
        return path.read_text()


def kept_tokens(key: str, build: Callable[[Path], Mapping[str, Any]]) -> tuple[Tokens, Tokens, dict[str, Any]]:
    """Training tokens, held-out tokens (memory-mapped) and what `build` said of them, from the cache.

    build(folder): writes train.bin and val.bin there and says {"dtype": ..., "train": tokens, "val": tokens, ...}. It is
    called by one process while the others wait, when there is nothing under this key or its sizes are not what it said.
    """
    folder = cache_folder() / key
    with FileLock(f"{folder}.lock"):
        said = _said(folder)
        if said is None:
            making = folder.with_name(f"{key}.making")  # only who holds the lock makes it; what a killed one left goes
            shutil.rmtree(making, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            making.mkdir()
            try:
                text = json.dumps(dict(build(making)) | {"version": VERSION})
                for part in ("train.bin", "val.bin"):
                    with (making / part).open("rb") as stream:
                        os.fsync(stream.fileno())
                write_whole(making / "tokens.json", text)
                os.replace(making, folder)
            finally:
                shutil.rmtree(making, ignore_errors=True)
            said = _said(folder)
            if said is None:
                raise ValueError(f"needed tokens as they were just written in {folder}, got others: is the disk full?")
    train, val = (
        np.memmap(folder / f"{part}.bin", dtype=said["dtype"], mode="r") if said[part] else np.empty(0, said["dtype"])
        for part in ("train", "val")
    )
    return train, val, said


def _said(folder: Path) -> dict[str, Any] | None:
    """What the cache says of its tokens; None if they are not there, of another version, or of another size."""
    try:
        said: dict[str, Any] = json.loads((folder / "tokens.json").read_text())
        width = np.dtype(said["dtype"]).itemsize
        sizes = [(folder / f"{part}.bin").stat().st_size == width * said[part] for part in ("train", "val")]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # to be made again
    return said if all(sizes) and said.get("version") == VERSION else None
