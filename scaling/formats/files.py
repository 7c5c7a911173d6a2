"""Read the runs of any file as one table of plain cells, without interpreting them.

`read_file` takes the reader of the format by the file's suffix, and by its content where the suffix does not tell. A
reader returns a `scaling.formats.raw.RawTable`: the cells under the names that they have in the source, sentences on
what was done to read them, and a mapping only where the format leaves no doubt what a column means. Nested values
become columns with dotted names: {"config": {"lr": {"value": 0.1}}} is `config.lr`.

| source | read by |
|---|---|
| .csv .tsv .tab .psv .txt .dat .md, any separator | `delimited` |
| .json .jsonl .ndjson, any orientation of pandas, trainer_state.json | `json_shapes` |
| .parquet .feather .arrow | here, with pandas |
| .xlsx .xlsm | here, with pandas and openpyxl (extra `excel`) |
| .log .out and other text with losses by step | `histories` |

All of them may be compressed with gzip, bzip2, xz or Zstandard, or be the only file in a zip archive.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.formats.events import EVENT_FILE, read_events
from scaling.formats.raw import SAMPLE_TABLE, RawTable, decode_text, find_repeated, is_empty, is_number, raise_problems

if TYPE_CHECKING:
    import pandas as pd

TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".psv", ".dat", ".md")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
ARROW_SUFFIXES = (".parquet", ".pq", ".feather", ".arrow")
EXCEL_SUFFIXES = (".xlsx", ".xlsm")
# Text that may be a table or the log of a training.
LOG_SUFFIXES = (".txt", ".log", ".out", ".err")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
READABLE_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *ARROW_SUFFIXES, *EXCEL_SUFFIXES, *LOG_SUFFIXES)
MAGIC_NUMBERS = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
JSON_BEGINNING = re.compile(rb"(\xef\xbb\xbf)?\s*(\{\s*[\"'}]|\[\s*[\[{\]])")
# What cannot be read, and how it becomes something that can.
REFUSED_SUFFIXES: dict[tuple[str, ...], str] = {
    (".pkl", ".pickle", ".p", ".joblib"): "a pickle may run any code when it is read: load it where it was written and "
    "call DataFrame.to_csv",
    (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".gguf", ".distcp"): "these are the weights of a model: needed is "
    "what was logged while it was trained",
    (".npy", ".npz", ".h5", ".hdf5", ".mat", ".nc"): "arrays have no names of columns: write "
    "pandas.DataFrame(arrays).to_csv",
    (".pdf", ".png", ".jpg", ".jpeg", ".svg", ".html", ".htm", ".docx"): "a page or a picture has no cells: copy the "
    "numbers into a table, or export the table that it was made from",
    (".xls", ".xlsb", ".ods", ".numbers"): "save the sheet as .xlsx or .csv",
    (".tar", ".tgz", ".7z", ".rar"): "unpack it first; a folder with one run in each file is read as a whole",
    (".wandb",): "a file of W&B's client: export the runs with wandb.Api().run(...).history().to_csv, or the table of "
    "runs as CSV from its page",
    (".db", ".sqlite", ".sqlite3"): "a database: give an MLflow store by --tracking-uri sqlite:///FILE and the name of "
    "the experiment; write a study of Optuna with study.trials_dataframe().to_csv",
    (".ipynb", ".py"): "a program is no table: write the runs that it holds with DataFrame.to_csv",
    (".yaml", ".yml", ".toml"): "settings are no runs: write one JSON object for each run, with its N, D and loss",
}


def read_file(path: Path) -> RawTable:
    """Read all cells of a file.

    Args:
        path: A file of any format listed above.

    Returns:
        The cells, None or NaN where empty, with rows numbered from 0, and what the format says about them. The cells of
        a text are text, so that "001" stays what it is; `scaling.runs.cells.parse_numbers` reads them.

    Raises:
        ValueError: If the file does not exist or cannot be read as a table. The message says what to do.
    """
    from scaling.formats.histories import read_chart
    from scaling.formats.json_shapes import expand_columns

    if not path.is_file():
        raise ValueError(f"needed a table of runs, got {path}: no such file")
    if path.name.startswith(EVENT_FILE):
        return read_events(path)
    try:
        raw = _read_file(path)
        raw.cells = expand_columns(raw.cells, str(path))
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: a value is nested too deeply") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return read_chart(raw, path)


def is_readable_name(name: str) -> bool:
    """Return whether a file's name says that it may hold runs: its suffix is known, with or without compression."""
    return get_suffix(name) in READABLE_SUFFIXES or name.startswith(EVENT_FILE) or name.lower().endswith(".zip")


def is_table_file(source: str | Path) -> bool:
    """Return whether a source is a file or folder of runs and not the name of an experiment.

    Args:
        source: A path or a name.

    Returns:
        Whether it is a file, is called like one that can be read, or is a folder that holds such files.
    """
    path = Path(source)
    if path.is_file() or is_readable_name(path.name):
        return True
    # The folder of a study, such as studies/mine, has the name of its experiment and holds no runs.
    return path.is_dir() and any(is_readable_name(p.name) for pattern in ("*", "*/*") for p in path.glob(pattern))


def get_suffix(name: str) -> str:
    """Return the suffix of a file's name in lower case, before that of a compression: ".csv" for "Runs.CSV.gz"."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def _read_file(path: Path) -> RawTable:
    """Read a file by its suffix or, where that does not tell, by its content."""
    suffix = get_suffix(path.name)
    for suffixes, remedy in REFUSED_SUFFIXES.items():
        if suffix in suffixes:
            raise ValueError(f"{path} cannot be read: {remedy}.\n{SAMPLE_TABLE}")
    data, suffix = _decompress(path, suffix)
    if suffix in ARROW_SUFFIXES or (suffix not in READABLE_SUFFIXES and data[:4] == b"PAR1"):
        return _read_arrow(data, path, suffix)
    if suffix in EXCEL_SUFFIXES:
        return _read_excel(data, path)
    is_json = suffix in JSON_SUFFIXES or (suffix not in TEXT_SUFFIXES and JSON_BEGINNING.match(data) is not None)
    if is_json:
        from scaling.formats.json_shapes import read_json

        return read_json(data, path, lines_first=suffix != ".json")
    from scaling.formats.delimited import read_delimited

    if suffix not in READABLE_SUFFIXES:
        text, _ = decode_text(data[:4096], f"{path}: a file of an unknown kind, it")
        if text.lstrip()[:1] == b"<":
            raise ValueError(f"{path} cannot be read: it is a page of HTML or XML.\n{SAMPLE_TABLE}")
    if suffix not in TEXT_SUFFIXES:
        from scaling.formats.histories import read_log

        log = read_log(data, path)
        if log is not None:
            return log
        try:
            table = read_delimited(data, str(path), suffix)
            if not any(_holds_numbers(table.cells[name]) for name in table.cells):
                raise ValueError("no column holds numbers")
            return table
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be read: it is neither a table nor a log with lines such as "
                f"'step 100: train loss 3.2, val loss 3.3' or 's:100 tel:3.3'.\n{SAMPLE_TABLE}"
            ) from error
    return read_delimited(data, str(path), suffix)


def _holds_numbers(column: pd.Series) -> bool:
    """Return whether the first cells of a column that are not empty are numbers."""
    first = [str(cell) for cell in column.head(100) if not is_empty(cell)]
    return bool(first) and all(is_number(cell) for cell in first)


def _decompress(path: Path, suffix: str) -> tuple[bytes, str]:
    """Return the content of a file, unpacked if it is compressed, and the suffix of what was unpacked."""
    data = path.read_bytes()
    if path.suffix.lower() == ".zip":
        return _open_archive(data, path)
    kind = next((kind for magic, kind in MAGIC_NUMBERS.items() if data.startswith(magic)), "")
    try:
        if kind == ".gz":
            data = gzip.decompress(data)
        if kind == ".bz2":
            data = bz2.decompress(data)
        if kind == ".xz":
            data = lzma.decompress(data)
        if kind == ".zst":
            import pyarrow as pa

            data = bytes(pa.CompressedInputStream(pa.BufferReader(data), "zstd").read())
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: the compressed data is damaged ({error})") from error
    return data, suffix


def _open_archive(data: bytes, path: Path) -> tuple[bytes, str]:
    """Return the only file in an archive, and its suffix."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX")]
            if len(names) == 1:
                return archive.read(names[0]), get_suffix(names[0])
    # A password, and a compression that zipfile lacks, whose NotImplementedError is a RuntimeError, too.
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read: {error}. Unpack it, and give the file in it") from error
    except (zipfile.BadZipFile, ValueError, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be read: the compressed data is damaged ({error})") from error
    raise ValueError(
        f"{path} cannot be read: it holds {len(names)} files: unpack it. A folder with one run in each file is read as "
        f"a whole.\n{SAMPLE_TABLE}"
    )


def _read_arrow(data: bytes, path: Path, suffix: str) -> RawTable:
    import pandas as pd

    kind = "parquet" if suffix in (".parquet", ".pq") or data[:4] == b"PAR1" else "feather"
    try:
        table = pd.read_parquet(io.BytesIO(data)) if kind == "parquet" else pd.read_feather(io.BytesIO(data))
    # The error may come from Arrow, or from the metadata that pandas keeps in the file.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error}") from error
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    table.columns = pd.Index([str(name) for name in table.columns])
    raise_problems([f"column {name} appears twice" for name in find_repeated(table.columns)], str(path))
    if not len(table):
        raise ValueError(f"{path} cannot be used: no rows (only the columns {', '.join(table.columns)})")
    return RawTable(table.reset_index(drop=True))


def _read_excel(data: bytes, path: Path) -> RawTable:
    import pandas as pd

    try:
        sheets = pd.read_excel(io.BytesIO(data), sheet_name=None, header=None, dtype=object, engine="openpyxl")
    except ImportError as error:
        raise ValueError(
            f'{path} cannot be read: needed openpyxl (pip install "muscale[excel]"), or save the sheet as .csv'
        ) from error
    # The error comes from openpyxl, zipfile or an XML parser.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a workbook of Excel: {error}") from error
    filled: dict[str, Any] = {name: sheet for name, sheet in sheets.items() if sheet.notna().to_numpy().sum() > 1}
    if not filled:
        raise ValueError(f"{path} cannot be used: no rows (its sheets are empty)")
    from scaling.formats.delimited import read_grid

    name, sheet = max(filled.items(), key=lambda item: int(item[1].notna().to_numpy().sum()))
    grid = [[None if is_empty(c) else c for c in row] for row in sheet.to_numpy(dtype=object).tolist()]
    raw = read_grid(grid, f"{path}, sheet {name}")
    others = [other for other in sheets if other != name]
    if others:
        raw.remarks.insert(0, f"sheet {name!r} is read, the largest; not read: {', '.join(map(str, others))}")
    return raw
