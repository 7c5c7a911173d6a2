"""Tell files and folders of runs from names of experiments, and read them as tables of plain cells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scaling.formats.files import is_readable_name

if TYPE_CHECKING:
    from scaling.formats.raw import RawTable

# What a run table is written as.
TABLE_SUFFIXES = (".csv", ".parquet", ".jsonl", ".json")


def is_table_file(source: str | Path) -> bool:
    """Return whether a source is a file or folder of runs and not the name of an experiment.

    Args:
        source: A path or a name.

    Returns:
        True for every file that exists, for a name with the suffix of a format that can be read, and for a folder. A
        name without a slash is a folder only if there are such files in it and no experiment of MLflow has the name;
        "./NAME" is always the folder.
    """
    path = Path(source)
    if path.is_dir():
        from scaling.formats.folders import find_files

        if len(path.parts) > 1 or str(source) != path.name:
            return True
        return bool(find_files(path)) and not _is_experiment(path.name)
    return path.is_file() or is_readable_name(path.name)


def read_raw(source: Path) -> RawTable:
    """Read all cells of a file or folder of runs.

    Args:
        source: A file of any format of `scaling.formats.files`, or a folder of them.

    Returns:
        The cells, None or NaN where empty, with rows numbered from 0, and what the format says about them. The cells of
        a text are text, so that "001" stays what it is; `scaling.runs.cells.parse_numbers` reads them.

    Raises:
        ValueError: If the source does not exist or cannot be read as a table. The message says what to do.
    """
    if source.is_dir():
        from scaling.formats.folders import read_folder

        return read_folder(source)
    from scaling.formats.files import read_file

    return read_file(source)


def _is_experiment(name: str) -> bool:
    """Return whether the default store of MLflow, if there is one, has an experiment of this name."""
    from scaling.tracking.client import connect, default_uri

    uri = default_uri()
    # The client would create a store that does not exist.
    if uri.startswith("sqlite:///") and "?" not in uri and not Path(uri.removeprefix("sqlite:///")).exists():
        return False
    return connect(uri).get_experiment_by_name(name) is not None
