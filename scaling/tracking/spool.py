"""The lines of a file of records, as scaling.tracking.recorder writes them: what is one, and what a damaged disk has made of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from scaling.common.cli import say
from scaling.common.redact import without_passwords


def read_line(line: bytes, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """A line as a head or a record; None when it is none: a damaged disk, not a killed writer, leaves such lines."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and wanted(said) else None


def is_head(said: dict[str, Any]) -> bool:
    kinds = {"study": str, "name": str, "role": str, "params": dict, "commit": str, "at": int}
    good = said.keys() == kinds.keys() and all(isinstance(said[key], kind) for key, kind in kinds.items())
    return good and all(isinstance(value, str) for value in said["params"].values())


def is_record(said: dict[str, Any]) -> bool:
    metrics, tags, status = said.get("metrics", {}), said.get("tags", {}), said.get("status", "FINISHED")
    if not (isinstance(metrics, dict) and isinstance(tags, dict) and status in ("FINISHED", "FAILED", "KILLED")):
        return False
    numbers = [said.get("at"), *([said.get("step")] if metrics else [])]
    return (
        all(isinstance(value, int) for value in numbers)
        and all(isinstance(value, int | float) for value in metrics.values())
        and all(isinstance(value, str) for value in tags.values())
    )


MAX_TAGS = 100  # per request, by MLflow

ENDING, ASIDE = ".spool.jsonl", ".refused.jsonl"


def _spooled(folder: Path) -> list[Path]:
    """The files with records, oldest first."""
    return sorted(folder.glob("*" + ENDING))


def _aside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(ENDING) + ASIDE)


def _set_aside(path: Path, record: Mapping[str, Any]) -> None:
    with _aside(path).open("a") as file:
        file.write(json.dumps(record) + "\n")


def _batch(file: BinaryIO, size: int, path: Path) -> list[dict[str, Any]]:
    """The next `size` records of whole lines, at most; the file then stands behind them. Lines that are none are set aside."""
    records: list[dict[str, Any]] = []
    names: set[str] = set()
    while len(records) < size and len(names) < MAX_TAGS - 1:
        end = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(end)
            break
        record = read_line(line, is_record)
        if record is None:
            say(f"{path}: a line that is no record, kept in {_aside(path)}")
            _set_aside(path, {"refused": "no record", "line": line.decode(errors="replace")})
            continue
        records.append(record)
        names |= record.get("tags", {}).keys()
    return records


def _left(path: Path) -> int:
    """How many records of a file have not arrived."""
    with path.open("rb") as file:
        file.seek(_position(path))
        return sum(line.endswith(b"\n") for line in file)


def _position(path: Path) -> int:
    """Bytes of a file that have arrived."""
    try:
        return max(0, int(_note_of(path).read_text()))
    except (FileNotFoundError, ValueError):
        return 0  # what is sent twice does no harm


def _write_position(path: Path, position: int) -> None:
    """Whole or not at all."""
    beside = _note_of(path).with_suffix(".tmp")
    with beside.open("w") as file:
        file.write(str(position))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, _note_of(path))


def _note_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(ENDING) + ".sent")


def _lock_of(path: Path) -> FileLock:
    return FileLock(f"{path}.lock", thread_local=False)


def _release(lock: FileLock, path: Path) -> None:
    lock.release()
    if not path.exists():
        Path(lock.lock_file).unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (without_passwords(error).splitlines() or [type(error).__name__])[0][:300]
