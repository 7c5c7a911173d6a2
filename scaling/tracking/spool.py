"""Spool files: the lines that `scaling.tracking.recorder` writes, how they are parsed, and the files beside them.

A spool file holds a head (`SpoolHead`) and then one `SpoolRecord` per line, all as JSON. Beside `<name>.spool.jsonl`
there may be `<name>.sent`, the number of bytes that MLflow has, and `<name>.refused.jsonl`, the lines that it rejected.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Required, TypedDict, cast

from filelock import FileLock

from scaling.common.atomic import write_atomically
from scaling.common.json_text import dump_json
from scaling.common.redact import redact_passwords

logger = logging.getLogger("muscale.scaling")

SPOOL_SUFFIX, POSITION_SUFFIX, REFUSED_SUFFIX = ".spool.jsonl", ".sent", ".refused.jsonl"
# MLflow's limit.
MAX_TAGS_PER_REQUEST = 100
END_STATUSES = ("FINISHED", "FAILED", "KILLED")


class SpoolHead(TypedDict):
    """The first line of a spool file: which run its records belong to."""

    study: str
    name: str
    # "proxy", "confirm" or "target".
    role: str
    params: dict[str, str]
    # Git commit of the code that runs.
    commit: str
    # When the run began, in milliseconds since the epoch.
    at: int


class SpoolRecord(TypedDict, total=False):
    """One line of a spool file after the first: metrics at a step, tags, or the status that a run ended with."""

    # When it was recorded, in milliseconds since the epoch.
    at: Required[int]
    # Training tokens; present wherever `metrics` is.
    step: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    # One of END_STATUSES.
    status: str


def parse_head(line: bytes) -> SpoolHead | None:
    """Return a line as the head of a spool file, or None if it is not one."""
    value = _parse_object(line)
    return cast(SpoolHead, value) if value is not None and _is_head(value) else None


def parse_record(line: bytes) -> SpoolRecord | None:
    """Return a line as a record, or None if it is not one, as a damaged disk (but no killed writer) leaves it."""
    value = _parse_object(line)
    if value is not None and isinstance(metrics := value.get("metrics"), dict):
        # JSON has no NaN: the loss of a run that diverged is null.
        value["metrics"] = {name: math.nan if number is None else number for name, number in metrics.items()}
    return cast(SpoolRecord, value) if value is not None and _is_record(value) else None


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_head(value: dict[str, Any]) -> bool:
    kinds = {"study": str, "name": str, "role": str, "params": dict, "commit": str, "at": int}
    has_fields = value.keys() == kinds.keys() and all(isinstance(value[key], kind) for key, kind in kinds.items())
    return has_fields and all(isinstance(text, str) for text in value["params"].values())


def _is_record(value: dict[str, Any]) -> bool:
    metrics, tags, status = value.get("metrics", {}), value.get("tags", {}), value.get("status", "FINISHED")
    if not (isinstance(metrics, dict) and isinstance(tags, dict) and status in END_STATUSES):
        return False
    integers = [value.get("at"), *([value.get("step")] if metrics else [])]
    return (
        all(isinstance(number, int) for number in integers)
        and all(isinstance(number, int | float) for number in metrics.values())
        and all(isinstance(text, str) for text in tags.values())
    )


def list_spool_files(folder: Path) -> list[Path]:
    """Return the spool files of a folder, oldest first."""
    return sorted(folder.glob("*" + SPOOL_SUFFIX))


def get_refused_path(path: Path) -> Path:
    """Return where the refused lines of a spool file are kept."""
    return path.with_name(path.name.removesuffix(SPOOL_SUFFIX) + REFUSED_SUFFIX)


def save_refused(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record that MLflow cannot take to the file of refused lines of the spool file `path`."""
    with get_refused_path(path).open("a") as file:
        file.write(dump_json(record) + "\n")


def read_batch(file: BinaryIO, size: int, path: Path) -> list[SpoolRecord]:
    """Read the next records of a spool file, and move past them.

    A last line without its end is left for later. Lines that are no records are logged and kept among the refused ones.

    Args:
        file: The open spool file, positioned at the beginning of a line.
        size: The most records to return. Fewer are returned where their tags would exceed MLflow's limit.
        path: The path of that file.

    Returns:
        The records; empty at the end of the file.
    """
    records: list[SpoolRecord] = []
    tag_names: set[str] = set()
    while len(records) < size and len(tag_names) < MAX_TAGS_PER_REQUEST - 1:
        end = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(end)
            break
        record = parse_record(line)
        if record is None:
            logger.warning(f"{path}: a damaged line is skipped and kept in {get_refused_path(path)}")
            save_refused(path, {"refused": "no record", "line": line.decode(errors="replace")})
            continue
        records.append(record)
        tag_names |= record.get("tags", {}).keys()
    return records


def count_unsent(path: Path) -> int:
    """Return how many lines of a spool file are not in MLflow yet."""
    with path.open("rb") as file:
        file.seek(read_position(path))
        return sum(line.endswith(b"\n") for line in file)


def read_position(path: Path) -> int:
    """Return how many bytes of a spool file MLflow has; 0 if that is not known, since sending twice does no harm."""
    try:
        return max(0, int(get_position_path(path).read_text()))
    except (FileNotFoundError, ValueError):
        return 0


def write_position(path: Path, position: int) -> None:
    """Keep how many bytes of a spool file MLflow has.

    Raises:
        OSError: If the note cannot be written. It then holds what it held before.
    """
    write_atomically(get_position_path(path), str(position))


def get_position_path(path: Path) -> Path:
    """Return where the position of a spool file is kept."""
    return path.with_name(path.name.removesuffix(SPOOL_SUFFIX) + POSITION_SUFFIX)


def get_lock(path: Path) -> FileLock:
    """Return the lock that the process holds which writes or sends a spool file."""
    return FileLock(f"{path}.lock", thread_local=False)


def release_lock(lock: FileLock, path: Path) -> None:
    """Release the lock of a spool file, and remove the lock's file if the spool file is gone."""
    lock.release()
    if not path.exists():
        Path(lock.lock_file).unlink(missing_ok=True)


def summarize_error(error: Exception) -> str:
    """Return the first line of an error's message, at most 300 characters, without passwords."""
    return (redact_passwords(error).splitlines() or [type(error).__name__])[0][:300]
