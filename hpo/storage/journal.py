"""A search's journal, which is Optuna's: refused by file and line where it is damaged, and mended where a writer was killed."""

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
    """Optuna's file of one JSON record per line.

    Optuna passes over a last line without its end, which a killed writer or a full disk leaves, but appends the next record to it: from
    then on the file cannot be read. Here such a line goes before anything is appended. And of Optuna's lock, a symbolic link, a
    killed holder leaves the others waiting for half a minute. Who writes without this backend (to enqueue a trial, say) is not
    excluded, and need not be: Optuna appends in one write.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Flock(f"{path}.flock")
        super().__init__(str(path), self.lock)  # type: ignore[arg-type]  # acquire and release are all that is asked
        self.line = 0  # of the record read last, from 1

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """All lines or none. OSError where the disk is full, after which the file is as it was."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self.lock, self.path.open("a+b", buffering=0) as file:
            end = _end_of_last_line(file)
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
        self.line = log_number_from
        try:
            for log in super().read_logs(log_number_from):
                self.line += 1
                yield log
        except (ValueError, RecursionError) as error:
            self.line += 1
            raise self.refused(f"no JSON ({error})") from error

    def refused(self, why: str) -> ValueError:
        return ValueError(
            f"{self.path}, line {self.line}: needed a record of Optuna's journal, got {why}: restore the file, or remove that line"
        )


def _end_of_last_line(file: RawIOBase) -> int:
    """Bytes up to and with the last line's end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 4096)
        file.seek(begin)
        found = (file.read(end - begin) or b"").rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def open_journal(path: Path) -> JournalStorage:
    """The storage in this file, made when there is none. ValueError that names the line which cannot be read."""
    journal = Journal(path)
    try:
        return JournalStorage(journal)
    except Exception as error:  # Optuna replays what it finds, and raises whatever comes of it
        if isinstance(error, OSError) or str(path) in str(error):
            raise
        raise journal.refused(f"{type(error).__name__} ({error})") from error
