"""Read a study file as TOML, for commands that need only parts of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Args:
        path: The file, in UTF-8.

    Returns:
        Its tables and values.

    Raises:
        ValueError: If the file is not TOML. The message names the file.
    """
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
