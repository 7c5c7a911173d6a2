"""Which processes work on a study: each locks a file in the study's folder, which the system unlocks when it ends.

The files are in the folder `live`. A file that nobody locks was left by a process that was killed. Behind a network
disk whose locks hold between hosts, processes of other hosts are seen, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hpo.storage.leases import identify_process, parse_process_name

LIVE_FOLDER = "live"


class StudyRemoved(Exception):
    """The study's folder was removed while a process worked on it."""


@contextlib.contextmanager
def announce_presence(folder: Path, role: str) -> Iterator[None]:
    """Show in a study's folder, for the length of the block, that this process works on the study.

    Args:
        folder: The study's folder.
        role: What the process is: "worker" or "launcher".
    """
    name = identify_process()
    live = folder / LIVE_FOLDER
    # The study's folder must exist: a study that was removed is not made again.
    with contextlib.suppress(FileNotFoundError):
        live.mkdir(exist_ok=True)
    path = live / f"{role}-{re.sub(r'[^-.0-9A-Za-z]', '_', name)}"
    file, is_locked = -1, False
    # The disk may be full or the folder gone, which what follows reports. Only `hpo forget` needs the file.
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # This process may have announced itself already.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
        os.pwrite(file, f"{role} {name}".encode(), 0)
    try:
        yield
    finally:
        if is_locked:
            with contextlib.suppress(OSError):
                path.unlink()
        if file >= 0:
            os.close(file)


def list_present(folder: Path) -> list[str]:
    """Return the processes that work on a study, launchers first, as "launcher (host, process 123)"."""
    found = []
    for path in sorted((folder / LIVE_FOLDER).glob("*")):
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                role, _, name = file.read().decode(errors="replace").partition(" ")
                found.append(f"{role or 'process'} ({describe_process(name)})")
    return found


def describe_process(name: str) -> str:
    """Return a worker's name for a message: its host and process number."""
    parsed = parse_process_name(name)
    return name if parsed is None else f"process {parsed[1]} on {parsed[0].rpartition(':')[0] or parsed[0]}"


def check_not_removed(settings: Path) -> None:
    """Check that a study exists.

    Args:
        settings: The file of the study's settings, which a launch writes once. The folder around it may exist without
            the study: a trainer or a library that wrote into it at the last moment has made it again.

    Raises:
        StudyRemoved: If the file does not exist, while the folder of the studies does. If that is missing, too, a disk
            is away.
    """
    if reason := explain_removal(settings):
        raise StudyRemoved(reason)


def explain_removal(settings: Path) -> str | None:
    """Return that a study is gone, as a sentence, or None if it is not. See `check_not_removed`."""
    folder = settings.parent
    if folder.parent.is_dir() and not settings.is_file():
        return f"study {folder.name!r} is gone: its folder {folder} was removed"
    return None


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the lock of an existing file, which is not changed, for the length of the block."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
