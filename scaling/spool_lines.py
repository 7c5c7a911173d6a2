"""The lines of a file of records, as scaling.spool writes them: what is one, and what a damaged disk has made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


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
