"""Read a folder of runs: one run in each file, or one in each folder with its settings beside its results."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling.formats.events import EVENT_FILE, read_events
from scaling.formats.files import LOG_SUFFIXES, get_suffix, is_readable_name, read_file
from scaling.formats.histories import ENDINGS, name_run
from scaling.formats.json_shapes import iterate_leaves, parse_json
from scaling.formats.raw import RawTable, format_number, list_first, raise_problems

# How many folders deep, and how many files, are looked at.
DEEPEST = 5
MOST_FILES = 20_000
# Files with the settings of the run whose results stand beside them: Ray, Lightning, Hydra, W&B and plain scripts.
SETTINGS = re.compile(
    r"(params|config|configs|hparams|args|training_args|train_config|hyperparameters|settings|flags)\.(json|ya?ml)",
    re.IGNORECASE,
)
# Files that stand beside results and hold none.
IGNORED = re.compile(
    r"(tokenizer.*|special_tokens_map|vocab|added_tokens|generation_config|model_config|wandb-metadata|"
    r"experiment_state.*|searcher-state.*|basic-variant-state.*|overrides|hydra|meta|package|readme|license|requirements.*|"
    r"(all|train|eval)_results|.*\.index|error|tuner|dataset_info|state)\.\w+",
    re.IGNORECASE,
)
# Where one run has several files, the first of these is read.
PREFERRED = (
    "trainer_state.json",
    "result.json",
    "progress.csv",
    "metrics.jsonl",
    "metrics.csv",
    "history.jsonl",
    "history.csv",
    "history.json",
    "metrics.json",
    "results.json",
    "results.csv",
    "wandb-summary.json",
    "summary.json",
    "main.log",
)
STEP_NAME = re.compile(
    r"(^|[/_. ])((global|train|trainer)?_?(step|steps|iter|iters|iteration|iterations|epoch|tokens)|D)$"
)


def find_files(folder: Path) -> list[Path]:
    """Return the files in a folder, at any depth, that may hold runs, sorted; at most `MOST_FILES` + 1.

    Folders whose names begin with a dot are left out, except Hydra's.
    """
    found: list[Path] = []
    base = len(folder.parts)
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith(".") or f == ".hydra")
        if len(here.parts) - base >= DEEPEST:
            folders.clear()
        found += [here / name for name in sorted(names) if is_readable_name(name) and not name.startswith(".")]
        if len(found) > MOST_FILES:
            break
    return [file for file in found if not IGNORED.fullmatch(file.name)]


def read_folder(folder: Path) -> RawTable:
    """Read all runs in a folder as one table.

    A file is one run if it holds one row or a history, which is a column of steps that grows; then `run_id` is the path
    of the file. A file with other rows is a table of runs. Several files beside the settings of a run are one run,
    named by their folder.

    Args:
        folder: The folder.

    Returns:
        The cells of all files. Settings have the prefix "config.".

    Raises:
        ValueError: If no file holds runs, or one that should cannot be read.
    """
    import pandas as pd

    files = find_files(folder)
    if len(files) > MOST_FILES:
        raise ValueError(f"{folder} cannot be read: more than {MOST_FILES} files; name the folder that holds the runs")
    sources, skipped = _choose_files(folder, files)
    parts, names, remarks, problems = list[pd.DataFrame](), list[str](), dict[str, int](), list[str]()
    mapping: dict[str, str] = {}
    tables = 0
    for source, settings, name in sources:
        try:
            raw = read_events(source) if _is_events(source) else read_file(source)
        except ValueError as error:
            # Notes stand beside results, and runs that have just begun have no rows.
            if get_suffix(source.name) in (*LOG_SUFFIXES, ".md", ".dat") or "no rows" in str(error):
                skipped.append(source)
            else:
                problems.append(str(error))
            continue
        cells = raw.cells
        is_run = len(cells) == 1 or ":steps" in raw.mapping.get("D", "") or _is_history(cells)
        own = cells["run_id"].nunique() if "run_id" in cells else 0
        if is_run and (own == 0 or (own == 1 and raw.mapping)):
            cells["run_id"] = name
            raw.mapping.pop("run_id", None)
        tables += not is_run
        config = _read_settings(settings, skipped)
        fresh = {k: v for k, v in config.items() if k not in cells}
        if fresh:
            cells = cells.assign(
                **{k: pd.Series([v] * len(cells), cells.index, dtype=object) for k, v in fresh.items()}
            )
        if "file" not in cells and not is_run:
            cells = cells.assign(file=str(source.relative_to(folder)))
        parts.append(cells.astype(object))
        names.append(name)
        mapping = raw.mapping | mapping
        for remark in raw.remarks:
            text = remark.replace(f"{source.name} is", "the file is")
            remarks[text] = remarks.get(text, 0) + 1
    raise_problems(list_first(problems, "files"), str(folder))
    if not parts:
        raise ValueError(
            f"{folder} cannot be used: no file in it holds runs. Needed are files such as .csv, .json or .jsonl with "
            "one run each, or with one row per run"
        )
    joined = pd.concat(parts, ignore_index=True)
    columns = ["run_id", *(c for c in joined.columns if c != "run_id")] if "run_id" in joined else list(joined.columns)
    single = (
        f"{format_number(len(parts) - tables, 'run')} with the name of the file or folder as run_id"
        if len(parts) > tables
        else ""
    )
    several = f"{tables} tables of runs" if tables else ""
    lines = [f"{folder} is a folder: {' and '.join(text for text in (single, several) if text)}"]
    lines += [
        text if count == len(parts) else f"{text} ({format_number(count, 'file')})"
        for text, count in list(remarks.items())[:5]
    ]
    if skipped:
        shown = ", ".join(str(f.relative_to(folder)) for f in skipped[:4])
        lines.append(f"not read: {shown}{f' and {len(skipped) - 4} more' if len(skipped) > 4 else ''}")
    mapping = {k: v for k, v in mapping.items() if v.split(":")[0] in joined.columns}
    return RawTable(joined[columns], lines, mapping)


def _choose_files(folder: Path, files: Sequence[Path]) -> tuple[list[tuple[Path, list[Path], str]], list[Path]]:
    """Return (source, files with its settings, name of its run) for all that is read, and the files that are not."""
    places: dict[Path, list[Path]] = {}
    settings: dict[Path, list[Path]] = {}
    for walked, _, names in os.walk(folder):
        here = Path(walked)
        run = here.parent if here.name == ".hydra" else here
        settings.setdefault(run, []).extend(here / n for n in sorted(names) if SETTINGS.fullmatch(n))
    for file in files:
        if not SETTINGS.fullmatch(file.name) and file.parent.name != ".hydra":
            places.setdefault(file.parent, []).append(file)
    sources: list[tuple[Path, list[Path], str]] = []
    skipped: list[Path] = []
    for place, found in places.items():
        own = settings.get(place, [])
        if _is_older_checkpoint(place, places):
            skipped += found
            continue
        known = [place / n for n in PREFERRED if place / n in found]
        events = [f for f in found if f.name.startswith(EVENT_FILE)]
        if known or (own and found) or events:
            first = known[0] if known else place if events else _choose_result(found)
            skipped += [f for f in found if f != first and not (first == place and f in events)]
            run = _find_run_folder(place)
            sources.append(
                (first, own, str(run.relative_to(folder)) if run not in (folder, folder.parent) else name_run(folder))
            )
        elif len(found) == 1 and place != folder:
            sources.append((found[0], own, str(place.relative_to(folder))))
        else:
            sources += [(f, own, ENDINGS.sub("", str(f.relative_to(folder)))) for f in found]
    return sources, skipped


def _choose_result(found: Sequence[Path]) -> Path:
    """Return the file of a run that most likely holds its results: a table before a log."""
    return min(found, key=lambda f: (get_suffix(f.name) in (*LOG_SUFFIXES, ".md"), f.name))


def _is_older_checkpoint(place: Path, places: dict[Path, list[Path]]) -> bool:
    """Return whether a folder is a checkpoint of Hugging Face and a later one holds the whole history."""
    match = re.fullmatch(r"checkpoint-(\d+)", place.name)
    if not match:
        return False
    if any(f.name == "trainer_state.json" for f in places.get(place.parent, [])):
        return True
    others = [re.fullmatch(r"checkpoint-(\d+)", p.name) for p in places if p.parent == place.parent]
    return any(int(other[1]) > int(match[1]) for other in others if other)


def _find_run_folder(place: Path) -> Path:
    """Return the folder that names a run: above a checkpoint of Hugging Face, and above the files of W&B."""
    return place.parent if re.fullmatch(r"checkpoint-\d+|files", place.name) else place


def _is_events(source: Path) -> bool:
    return source.is_dir() or source.name.startswith(EVENT_FILE)


def _is_history(cells: Any) -> bool:
    """Return whether rows are points of one run: a column of steps or tokens grows, but for a few restarts."""
    import pandas as pd

    for name in map(str, cells.columns):
        if STEP_NAME.search(name):
            steps = pd.to_numeric(cells[name], errors="coerce").diff().dropna()
            if len(steps) and (steps > 0).mean() >= 0.8:
                return True
    return False


def _read_settings(files: Sequence[Path], skipped: list[Path]) -> dict[str, Any]:
    """Return the settings of a run under the prefix "config."; files that cannot be read are added to `skipped`."""
    import yaml

    config: dict[str, Any] = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
            document = parse_json(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
        except (ValueError, OSError, yaml.YAMLError, RecursionError):
            skipped.append(file)
            continue
        if isinstance(document, dict):
            for name, value in iterate_leaves(document):
                if not name.startswith(("_wandb", "wandb_version")):
                    plain = json.dumps(value, default=str) if isinstance(value, list) else value
                    config.setdefault(f"config.{name}", plain)
    return config
