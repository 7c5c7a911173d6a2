"""Rows of text: files of .parquet or JSON lines, folders of such files, and data sets of the package datasets."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from proxies.data.shard_names import ShardFiles, assign_shards
from proxies.data.sources import CorpusFile, Piece, Source, Split, import_optional, is_held_out_block, list_files
from proxies.data.token_files import compute_key, get_cache_folder, stamp_files
from scaling.common.atomic import replacing

logger = logging.getLogger("muscale.proxies")

# Endings of files of rows, and the name of their reader in the package datasets.
ROW_READERS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json"}
ROW_FILE = re.compile(r".*(\.parquet|(\.jsonl|\.ndjson)(\.gz|\.zst|\.xz|\.bz2)?|\.json(\.gz|\.zst|\.xz|\.bz2))")
ROW_NAMING = "give all files names with train or val, or none of them"
# A folder is one of rows if they are more than this share of its bytes.
MAIN_SHARE = 0.9
# Files in the folder of a data set that was saved to disk.
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")


def is_dataset(spec: str, names: Sequence[str] | None = None) -> bool:
    """Return whether a corpus is a data set of rows, which the package datasets reads.

    Args:
        spec: The corpus.
        names: Relative paths of the files, if it is a folder and they have been listed already.
    """
    path = Path(spec).expanduser()
    return spec.startswith("hf:") or _is_saved_dataset(path) or bool(_list_row_files(path, names))


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED_DATASET_FILES)


def _list_row_files(path: Path, names: Sequence[str] | None = None) -> list[str]:
    """Return a file of rows, or the relative paths of those in a folder that holds little else; else nothing."""
    if not path.is_dir():
        return [path.name] if ROW_FILE.fullmatch(path.name) else []
    rows, share = _measure_rows(path, list_files(path, python_only=False) if names is None else names)
    return rows if share > MAIN_SHARE else []


def find_rows_among_text(path: Path, names: Sequence[str]) -> list[str]:
    """Return the files of rows in a folder of text with these files, if they are a part of it that matters."""
    rows, share = _measure_rows(path, names)
    return rows if share > 1 - MAIN_SHARE else []


def _measure_rows(folder: Path, names: Sequence[str]) -> tuple[list[str], float]:
    """Return the relative paths of the files of rows in a folder, and their share of its bytes."""
    rows = [name for name in names if ROW_FILE.fullmatch(name)]
    if not rows:
        return [], 0.0
    sizes = {name: (folder / name).stat().st_size for name in names}
    return rows, sum(sizes[name] for name in rows) / max(sum(sizes.values()), 1)


def check_dataset(spec: str) -> list[str]:
    """List what is wrong with a data set on this machine. Remote data sets are not looked up.

    Returns:
        One message per problem; empty if none is found.
    """
    try:
        name, _, _, _ = _parse_dataset_spec(spec)
        path = Path(name).expanduser()
        if not path.exists():
            if ROW_FILE.fullmatch(path.name) or path.is_absolute():
                return [f"needed an existing file or folder, got {name!r}: no such path"]
            import_optional("datasets", f"corpus {spec!r}")
            return []
        _open_dataset(spec)
    except ValueError as error:
        return [str(error)]
    return []


def _parse_dataset_spec(spec: str) -> tuple[str, str, str, str]:
    """Return name, configuration, split and column of hf:NAME[:CONFIG][:SPLIT][:COLUMN]."""
    parts = spec.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 4:
        raise ValueError(
            f"needed 'hf:NAME[:CONFIG][:SPLIT][:COLUMN]', got {spec!r}: leave a part empty for its default"
        )
    name, config, split, column = parts + [""] * (4 - len(parts))
    return name, config, split or "train", column or "text"


class OpenedRows(NamedTuple):
    """Rows of text of a data set.

    Attributes:
        parts: Data sets of the package datasets, each with the part that it belongs to; None if it is divided by row.
        column: The column of text.
        files: The files that the rows are read from.
        remarks: What a user should know of the files, one sentence each.
    """

    parts: list[tuple[Any, Split | None]]
    column: str
    files: tuple[tuple[Path, CorpusFile], ...]
    remarks: tuple[str, ...] = ()


def _open_dataset(spec: str) -> OpenedRows:
    """Open a data set.

    Raises:
        ValueError: If the data set cannot be opened or has no such column of text.
    """
    name, config, split, column = _parse_dataset_spec(spec)
    datasets = import_optional("datasets", f"corpus {spec!r}")
    datasets.disable_progress_bars()
    # Its errors are raised, too.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    path = Path(name).expanduser()
    parts: list[tuple[Any, Split | None]]
    remarks: tuple[str, ...] = ()
    try:
        if path.exists() and (names := _list_row_files(path)):
            shards = assign_shards(path, names, naming=ROW_NAMING) if path.is_dir() else ShardFiles((path,), ())
            remarks = shards.remarks
            loaded = _load_row_files(datasets, shards)
            parts = [(loaded["train"], "train"), (loaded["val"], "val")] if shards.val else [(loaded["train"], None)]
            splits: list[Any] = ["train"] * len(shards.train) + ["val"] * len(shards.val)
            listed = zip(shards.all, splits if shards.val else ["both"] * len(splits), strict=True)
            root = path if path.is_dir() else path.parent
            files = tuple(
                (file, CorpusFile(file.relative_to(root).as_posix(), file.stat().st_size, part))
                for file, part in listed
            )
        else:
            if path.is_dir() and _is_saved_dataset(path):
                data = datasets.load_from_disk(str(path))
                if isinstance(data, datasets.DatasetDict):
                    if split not in data:
                        raise ValueError(f"needed a split {split!r}, got {', '.join(data)}")
                    data = data[split]
            else:
                data = datasets.load_dataset(name, config or None, split=split)
            parts = [(data, None)]
            arrow = [Path(file["filename"]) for file in data.cache_files]
            files = tuple((file, CorpusFile(file.name, file.stat().st_size, "both")) for file in arrow)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ else error
        raise ValueError(f"cannot open data set {name!r}, split {split!r}: {reason}") from error
    for data, _ in parts:
        _check_column(data, column, name)
    return OpenedRows(parts, column, files, remarks)


def _load_row_files(datasets: Any, shards: ShardFiles) -> Any:
    """Read files of rows of one format by the package datasets."""
    endings = {file.suffix if file.suffix in ROW_READERS else Path(file.stem).suffix for file in shards.all}
    readers = {ROW_READERS.get(ending, "json") for ending in endings}
    if len(readers) > 1:
        raise ValueError(f"needed rows of one format, got {' and '.join(sorted(endings))} in {shards.all[0].parent}")
    files = {"train": [str(_unpack(file)) for file in shards.train]}
    if shards.val:
        files["val"] = [str(_unpack(file)) for file in shards.val]
    return datasets.load_dataset(*readers, data_files=files, cache_dir=str(get_cache_folder() / "datasets"))


def _unpack(file: Path) -> Path:
    """Return a file compressed with zstd as an unpacked copy in the cache; other files are returned as they are.

    The package datasets unpacks the other formats itself, but needs one more package for this one.
    """
    if file.suffix != ".zst":
        return file
    pyarrow = import_optional("pyarrow", f"rows in {file.name}")
    path = get_cache_folder() / f"{compute_key('unpacked', stamp_files([file]))}{Path(file.stem).suffix}"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            with (
                replacing(path) as temporary,
                pyarrow.OSFile(str(file)) as packed,
                pyarrow.CompressedInputStream(packed, "zstd") as stream,
                temporary.open("wb") as copy,
            ):
                shutil.copyfileobj(stream, copy, 1 << 20)
    return path


def _check_column(data: Any, column: str, name: str) -> None:
    """Raise ValueError if a data set has no such column of text."""
    text = [c for c in data.column_names if getattr(data.features[c], "dtype", None) in ("string", "large_string")]
    if column in text:
        return
    remedy = f"hf:{name}:::{text[0] if len(text) == 1 else 'COLUMN'}"
    if column not in data.column_names:
        raise ValueError(
            f"needed a column {column!r} of text in {name!r}, got {', '.join(data.column_names)}: name it, {remedy}"
        )
    dtype = getattr(data.features[column], "dtype", None)
    raise ValueError(f"needed text in column {column!r} of {name!r}, got {dtype}: name another, {remedy}")


def open_rows(spec: str) -> Source:
    """Return the rows of a data set as text, each followed by an end of line.

    Raises:
        ValueError: If the data set cannot be opened or has no such column of text.
    """
    name, _, _, _ = _parse_dataset_spec(spec)
    rows = _open_dataset(spec)
    for remark in rows.remarks:
        logger.warning(remark)
    path = Path(name).expanduser()

    def pieces() -> Iterator[Piece]:
        i = 0
        for data, part in rows.parts:
            for row in data.select_columns([rows.column]):
                if row[rows.column]:
                    # Rows are separated as lines are.
                    text = (row[rows.column] + "\n").encode("utf-8")
                    yield Piece(str(i), len(text), part or ("val" if is_held_out_block(i) else "train"), text)
                i += 1

    files = tuple(file for _, file in rows.files)
    title = path.stem if path.exists() else name
    return Source(title, tuple(p for p, _ in rows.files), sum(file.size for file in files), files, pieces)
