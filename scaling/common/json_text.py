"""Write JSON that every reader takes: a number that is not finite becomes null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON, with null for NaN and infinities, which JSON does not have.

    Args:
        value: Numbers, text, and lists, tuples and mappings of them.
        indent: Spaces per level; None for one line.

    Returns:
        The text, without an end of line.
    """
    return json.dumps(_replace_nonfinite(value), indent=indent, allow_nan=False)


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(inner) for key, inner in value.items()}
    return [_replace_nonfinite(inner) for inner in value] if isinstance(value, list | tuple) else value
