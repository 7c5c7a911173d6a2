"""Write files so that a reader, a crash or a full disk never meets half of one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    The block writes a file there, or makes a folder. Its name is its own, so two processes that write the same path do
    not
    collide: the last one to finish wins. A file is flushed to disk before it is renamed, so `path` holds either what it
        held
    before or all of the new content. A folder replaces only an empty folder or nothing; its files are the block's to
    flush.

    Args:
        path: The file or folder to write. Its parent must exist.

    Yields:
        A path in the same folder, which does not exist yet.

    Raises:
        OSError: If the file cannot be written or renamed. `path` is then unchanged and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all.

    Args:
        path: The file to write or replace. Its folder must exist.
        content: Text, written as UTF-8, or bytes.

    Raises:
        OSError: If it cannot be written, for example because the disk is full. `path` is then unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power failure."""
    # Some file systems and platforms cannot open a folder for this; the rename itself is still atomic there.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
