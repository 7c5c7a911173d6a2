"""The journal of a search: Optuna's file format, with damaged lines reported and truncated lines removed."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from io import RawIOBase
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from hpo.storage.locks import Flock


class Journal(JournalFileBackend):
    """Optuna's file of one JSON record per line, protected against truncated lines.

    A killed writer or a full disk leaves a truncated last line. Optuna skips it but appends to it, which corrupts the
    file. This class removes it before it appends. It also replaces Optuna's lock, a symbolic link, for which the
    others wait half a minute after its holder was killed. A program that writes with Optuna's own backend (to enqueue
    a trial, say) does not take this lock and needs no lock, because Optuna appends in one write.

    Attributes:
        path: The file.
        line: Number of the line that was read last, from 1.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Flock(f"{path}.flock")
        # Optuna only calls acquire and release.
        super().__init__(str(path), self.lock)  # type: ignore[arg-type]
        self.line = 0

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append all records or none.

        Raises:
            OSError: If the disk is full. The file is then unchanged.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self.lock, self.path.open("a+b", buffering=0) as file:
            end = _find_end_of_last_line(file)
            if end < os.fstat(file.fileno()).st_size:
                file.truncate(end)
            try:
                if (file.write(lines) or 0) < len(lines):
                    raise OSError(f"no space left for a whole line of {self.path}")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the records from a number on.

        Raises:
            ValueError: If a line is not valid JSON.
        """
        self.line = log_number_from
        try:
            for log in super().read_logs(log_number_from):
                self.line += 1
                yield log
        except (ValueError, RecursionError) as error:
            self.line += 1
            raise self.make_error(f"invalid JSON ({error})") from error

    def make_error(self, reason: str) -> ValueError:
        """Return the error that names the file and the line that was read last."""
        return ValueError(
            f"{self.path}, line {self.line}: needed a record of Optuna's journal, got {reason}: "
            "restore the file, or remove that line"
        )


def _find_end_of_last_line(file: RawIOBase) -> int:
    """Return the number of bytes up to the last newline, that newline included."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        newline = (file.read(end - start) or b"").rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def open_journal(path: Path) -> JournalStorage:
    """Open the Optuna storage in a journal, and create the file if it does not exist.

    Args:
        path: The file. Its folder must exist.

    Raises:
        ValueError: If a line cannot be read. The message names it.
    """
    journal = Journal(path)
    try:
        return JournalStorage(journal)
    # Optuna replays whatever the file holds, so a damaged line can raise anything.
    except Exception as error:
        if isinstance(error, OSError) or str(path) in str(error):
            raise
        raise journal.make_error(f"{type(error).__name__} ({error})") from error
