"""Optuna's journal file, made to survive a writer that dies or finds the disk full in the middle of a line.

As it is, what follows a broken line is glued to it, and the study cannot be read again; and a lock whose holder was killed stalls
the others for half a minute. Files are the same as Optuna's, which can read them.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

LOOK_BACK = 1 << 16  # bytes; a line is shorter, or is looked for in steps of this


class Flock:
    """A lock between processes and threads that the system gives up with its holder, however that ends; waits in its queue."""

    def __init__(self, path: str | Path) -> None:
        self._path = str(Path(path).absolute())
        self._thread = threading.RLock()  # the same file may be locked again by whoever has it
        self._depth = 0
        self._file = -1

    def acquire(self) -> bool:
        self._thread.acquire()
        try:
            if self._depth == 0:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX)
                except BaseException:
                    os.close(self._file)
                    raise
            self._depth += 1
        except BaseException:
            self._thread.release()
            raise
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            os.close(self._file)  # and with it the lock
        self._thread.release()

    def __enter__(self) -> Flock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Journal(JournalFileBackend):
    """The backend of a JournalStorage, at this path."""

    def __init__(self, path: str | Path) -> None:
        # Not Optuna's own .lock, a symbolic link that a killed holder leaves behind. A writer without this backend (someone who enqueues
        # a trial) is not excluded, and need not be: it appends in one write, too.
        self._whole = Flock(f"{path}.flock")
        super().__init__(str(path), lock_obj=self._whole)  # type: ignore[arg-type]  # acquire and release are all that is asked

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """All lines or none. OSError where the disk is full, after which the file is as it was."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self._whole:
            file = os.open(self._file_path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            try:
                end = whole_lines(file)
                if end < os.fstat(file).st_size:
                    os.ftruncate(
                        file, end
                    )  # what a writer that was killed had begun: nobody was told that it was written
                try:
                    if os.write(file, lines) < len(lines):
                        raise OSError(f"no space left for a whole line of {self._file_path}")
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, end)
                    raise
            finally:
                os.close(file)


def whole_lines(file: int) -> int:
    """Bytes of an open file up to the end of its last whole line."""
    end = os.fstat(file).st_size
    while end:
        begin = max(0, end - LOOK_BACK)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
