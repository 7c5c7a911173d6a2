"""The cache of text that was tokenized here, and of what was found out about large files.

The cache is a folder: $MUSCALE_CACHE, or else muscale in $XDG_CACHE_HOME, or else ~/.cache/muscale. Everything in it
can be made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar, cast

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from scaling.common.atomic import replacing, write_atomically

# One-dimensional whole numbers.
Tokens = NDArray[Any]
Value = TypeVar("Value")

# Version of the cache. Another version is never read.
VERSION = 1
# Files of fewer bytes are read again instead, which takes less than 0.1 s.
REMEMBER_ABOVE = 1 << 26
# A file changed less than this ago may change again within the clock's tick.
SETTLED_NS = 2_000_000_000


class TokenMetadata(TypedDict):
    """What tokens.json holds: the numpy type and the number of tokens of train.bin and val.bin."""

    dtype: str
    train: int
    val: int
    # Bytes of the text of the held-out part.
    val_bytes: NotRequired[int]
    # Name, size in bytes and split of every file or row, if the source does not list them itself.
    files: NotRequired[list[list[Any]]]
    version: NotRequired[int]


class FileStamp(NamedTuple):
    """What changes with a file. A program can set mtime back, but not ctime."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def get_cache_folder() -> Path:
    """Return the folder of tokens, tokenizers and digests, and create it if needed.

    Raises:
        ValueError: If it cannot be created.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("MUSCALE_CACHE") or Path(base) / "muscale").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"needed a folder to keep tokens in, got {folder} ({error}): set MUSCALE_CACHE") from error
    return folder


def compute_key(*parts: Any) -> str:
    """Return the cache key of something that depends on these values: the sha256 of their JSON and of the version."""
    return hashlib.sha256(json.dumps([VERSION, *parts], sort_keys=True).encode()).hexdigest()


def stamp_files(files: Sequence[Path]) -> list[FileStamp]:
    """Return path, size, times and inode of every file."""
    stats = [(str(path), path.stat()) for path in files]
    return [FileStamp(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]


def remember(files: Sequence[Path], name: str, compute: Callable[[], Value]) -> Value:
    """Return `compute()`, which reads files, and keep the result on disk if the files are large.

    The result is stored under `name` and the stamp of the files. Assumed safe: a file whose bytes change gets another
    size, mtime or ctime. That fails for a change within the clock's tick (so files changed in the last two seconds are
    not remembered), for writes through a memory map that are not flushed yet, and on file systems without ctime.

    Args:
        files: All files that the result depends on.
        name: What is computed from them.
        compute: Called if the result is not stored. What it returns must be JSON.

    Returns:
        The result of `compute`, now or earlier.
    """
    before = stamp_files(files)
    if sum(file.size for file in before) <= REMEMBER_ABOVE:
        return compute()
    path = get_cache_folder() / "digests" / f"{compute_key(name, before)}.json"
    if path.is_file():
        return cast(Value, json.loads(path.read_text()))
    value = compute()
    newest = max(max(file.mtime_ns, file.ctime_ns) for file in before)
    if stamp_files(files) == before and time.time_ns() - newest > SETTLED_NS:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(value))
    return value


def cache_text(key: str, suffix: str, make: Callable[[], str]) -> str:
    """Return the text cached under a key. One process makes it if it is missing, while the others wait.

    Args:
        key: Key made by `compute_key`.
        suffix: Ending of the file's name.
        make: Called if the text is missing.

    Returns:
        The text.
    """
    path = get_cache_folder() / f"{key}{suffix}"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            write_atomically(path, make())
        return path.read_text()


def cache_tokens(key: str, build: Callable[[Path], TokenMetadata]) -> tuple[Tokens, Tokens, TokenMetadata]:
    """Return tokens from the cache. One process makes them if they are missing or damaged, while the others wait.

    Args:
        key: Key made by `compute_key`.
        build: build(folder) writes train.bin and val.bin into the folder and returns their metadata.

    Returns:
        Training tokens and held-out tokens, both memory-mapped, and their metadata.

    Raises:
        ValueError: If the tokens cannot be read back as they were written.
    """
    folder = get_cache_folder() / key
    with FileLock(f"{folder}.lock"):
        metadata = _read_metadata(folder)
        if metadata is None:
            # Only the holder of the lock writes here, so these are left by a process that was killed. The second name
            # is the one that version 0.1 used.
            for leftover in (folder, folder.with_name(f"{key}.making"), *folder.parent.glob(f".{key}.*.tmp")):
                shutil.rmtree(leftover, ignore_errors=True)
            with replacing(folder) as temporary:
                temporary.mkdir()
                text = json.dumps(dict(build(temporary)) | {"version": VERSION})
                for part in ("train.bin", "val.bin"):
                    with (temporary / part).open("rb") as stream:
                        os.fsync(stream.fileno())
                write_atomically(temporary / "tokens.json", text)
            metadata = _read_metadata(folder)
            if metadata is None:
                raise ValueError(f"needed tokens as they were just written in {folder}, got others: is the disk full?")
    dtype = metadata["dtype"]
    train, val = (
        np.memmap(folder / f"{part}.bin", dtype=dtype, mode="r") if count else np.empty(0, dtype)
        for part, count in (("train", metadata["train"]), ("val", metadata["val"]))
    )
    return train, val, metadata


def _read_metadata(folder: Path) -> TokenMetadata | None:
    """Return the metadata of cached tokens; None if they are missing, damaged or of another version."""
    try:
        metadata: TokenMetadata = json.loads((folder / "tokens.json").read_text())
        width = np.dtype(metadata["dtype"]).itemsize
        counts = (("train", metadata["train"]), ("val", metadata["val"]))
        fit = [(folder / f"{part}.bin").stat().st_size == width * count for part, count in counts]
    except (OSError, ValueError, KeyError, TypeError):
        # The tokens are made again.
        return None
    return metadata if all(fit) and metadata.get("version") == VERSION else None
