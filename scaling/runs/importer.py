"""Read runs of other programs as one checked run table: map columns, convert units, mark unusable rows.

A mapping gives, for each column of the run table, the source's column, with its units after colons
(`scaling.runs.units`). Nothing is guessed unless asked for. Every command reads files through `import_runs`.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.common.suggest import find_similar
from scaling.formats.raw import RawTable, is_empty, raise_problems
from scaling.runs.cells import describe_mistakes, parse_numbers
from scaling.runs.columns import MAX_COLUMNS_SHOWN, Findings, has_state_name, plan_columns, quote
from scaling.runs.guesses import Guess, guess_columns
from scaling.runs.marks import (
    NO_RESULT,
    NOT_RUNS,
    find_history,
    find_parts,
    mark_copies,
    mark_rows,
    read_states,
    take_peak_lr,
)
from scaling.runs.remarks import (
    explain_signs,
    find_outliers,
    remark_accumulation,
    remark_missing_settings,
    remark_other_rates,
)
from scaling.runs.table import (
    COLUMNS,
    COUNT_COLUMNS,
    FLAG_COLUMNS,
    NUMBER_COLUMNS,
    REQUIRED_COLUMNS,
    clean_runs,
    map_cells,
    usable,
)
from scaling.runs.units import (
    EXTRA_COLUMNS,
    SCALE_UNITS,
    convert_units,
    remark_small_counts,
    settle_loss_unit,
    settle_scale,
)

if TYPE_CHECKING:
    import pandas as pd

# A table with these columns was checked before: its marks are kept, and nothing is remarked upon again.
CHECKED_COLUMNS = ("diverged", "final", "excluded", "role")
# Rows that show whether a column holds numbers.
SAMPLE_ROWS = 200
# Rows from which a guess is tried in fewer ways.
MANY_ROWS = 5000


def import_runs(
    source: str | Path,
    *,
    mapping: Mapping[str, str] | None = None,
    constants: Mapping[str, float | str] | None = None,
    metric: str = "last",
    tracking_uri: str | None = None,
    guess: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """Read the runs of another program as a checked run table.

    No row is dropped: the columns `diverged`, `final` and `excluded` mark diverged and unfinished runs, copies, and
    points before the end of a run (of rows that share a run_id, the last one with a loss is the end). Columns that are
    not mapped are kept under their own names.

    Args:
        source: A file or folder in any format of `scaling.formats`, or the name of any MLflow experiment.
        mapping: For each column of the run table, "COLUMN:UNIT:..." of the source, such as {"D": "step:steps"}. A
            column that has its name already needs none. The prefixes `config.`, `summary.`, `params.` and `metrics.`
            may be left out where only one column fits. An empty text leaves a column with the right name out;
            {"state": ""} reads no states of runs.
        constants: Values for all rows, such as {"seq_len": 2048}. {"final": True} takes every point as an end.
        metric: "last" takes the last value of each metric's history in MLflow, "min" the lowest.
        tracking_uri: The MLflow store of an experiment; by default $MLFLOW_TRACKING_URI or ./mlflow.db.
        guess: Map the columns that are neither mapped nor set by their names and values.

    Returns:
        The checked run table, and remarks on what was used and what was not.

    Raises:
        ValueError: If anything cannot be read. The message lists all mistakes, by row and column, and ends with a
            command that reads the source where one was found.
    """
    mapping, constants = dict(mapping or {}), dict(constants or {})
    _check_names(mapping, constants, str(source))
    raw, study = _read_source(source, bool(mapping or constants), metric, tracking_uri)
    if study is not None:
        clean, problems = clean_runs(study)
        raise_problems(problems, str(source))
        return clean[[c for c in COLUMNS if c in clean.columns]].reset_index(drop=True), []
    findings = Findings(remarks=list(raw.remarks))
    if guess:
        proposal = _guess(raw, mapping, constants, source)
        if proposal is not None and proposal.blanks:
            options = proposal.format_options()
            missing = [
                f"{name} is not in the source: --set {name}=NUMBER, {what}" for name, what in proposal.blanks.items()
            ]
            raise_problems([*missing, *([raw.advice] if raw.advice else []), f"all options: {options}"], str(source))
        if proposal is not None:
            mapping, constants = proposal.mapping, proposal.constants
            findings.remarks += proposal.reasons
    table = _map_columns(raw, mapping, constants, findings)
    clean, problems = clean_runs(table, findings.known)
    problems = findings.problems + problems + explain_signs(table, mapping)
    is_about_columns = any(re.search("no column|several columns|column run_id", problem) for problem in problems)
    if is_about_columns and raw.advice:
        problems.append(raw.advice)
    if is_about_columns and not guess and (proposal := _guess(raw, _keep_good(raw, mapping), constants, source)):
        fill = f", with {' and '.join(proposal.blanks)} filled in" if proposal.blanks else ""
        problems.append(f"this reads it{fill}: {format_command(source, proposal)}")
    raise_problems(problems, str(source))
    clean = clean[[c for c in COLUMNS if c in clean.columns]]
    return _add_rest(clean, raw, mapping).reset_index(drop=True), findings.remarks


def propose_import(
    source: str | Path,
    *,
    mapping: Mapping[str, str] | None = None,
    constants: Mapping[str, float | str] | None = None,
    metric: str = "last",
    tracking_uri: str | None = None,
) -> Guess | None:
    """Guess how a source can be read, by the names and values of its columns; see `import_runs` for the arguments.

    Returns:
        The guess, which was tried; None if the source cannot be read in any way that was tried.

    Raises:
        ValueError: If the source is no table, or the mapping cannot be right.
    """
    mapping, constants = dict(mapping or {}), dict(constants or {})
    _check_names(mapping, constants, str(source))
    raw, study = _read_source(source, bool(mapping or constants), metric, tracking_uri)
    if study is not None:
        return Guess({}, {}, [], {}, False)
    guess = _guess(raw, mapping, constants, source)
    return replace(guess, is_needed=True) if guess and (mapping or constants) else guess


def format_command(source: str | Path, guess: Guess, out: Path | None = None) -> str:
    """Return the command that reads a source as guessed.

    Args:
        source: As the user named it.
        guess: How it can be read.
        out: The table to write; by default one with a similar name in the working folder.
    """
    out = out or name_output(source)
    return " ".join(["scaling import", quote(str(source)), "--out", quote(str(out)), guess.format_options()]).rstrip()


def name_output(source: str | Path) -> Path:
    """Return the name of the table that `scaling import` writes if none is given, in the working folder."""
    stem = Path(str(source).rstrip("/")).name.split(".")[0] or "runs"
    return Path(f"{stem}.runs.csv" if not stem.endswith("runs") else f"{stem}-imported.csv")


def read_mapping(path: Path) -> tuple[dict[str, str], dict[str, float | str]]:
    """Read a mapping and constants from a file.

    Args:
        path: A TOML file with the tables [map] and [set].

    Returns:
        (mapping, constants), as `import_runs` takes them.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        text = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a mapping: {error}") from error
    unknown = sorted(set(text) - {"map", "set"})
    problems = [f"unknown table or name {name!r}: needed [map] and [set]" for name in unknown]
    tables: list[dict[str, Any]] = []
    for name, kinds in (("map", str), ("set", str | int | float)):
        table = text.get(name, {})
        if not isinstance(table, dict) or not all(isinstance(v, kinds) for v in table.values()):
            needed = '"COLUMN:UNIT"' if name == "map" else "a number"
            problems.append(f"[{name}]: needed NAME = {needed} on each line")
        tables.append(table)
    raise_problems(problems, str(path))
    return tables[0], tables[1]


def summarize_exclusions(runs: pd.DataFrame) -> list[str]:
    """Return one line on how many rows of a checked table laws use, and one per reason why the others are left out."""
    reasons = runs["excluded"].value_counts()
    lines = [f"{int(runs['excluded'].eq('').sum())} of {len(runs)} rows are used by laws"]
    return lines + [f"{count} kept, but excluded: {reason}" for reason, count in reasons.items() if reason]


def count_runs(runs: pd.DataFrame) -> tuple[int, int, int]:
    """Count the runs of a checked table, without copies and points on the way.

    Returns:
        (runs, diverged runs, groups of equal N and D).
    """
    ends = runs[~runs["excluded"].isin(NOT_RUNS)]
    if "run_id" in ends:
        # The points of a run without any loss are one run.
        is_point = ends["excluded"].eq(NO_RESULT) & ends["run_id"].notna() & ends["run_id"].ne("")
        ends = ends[~(is_point & ends["run_id"].where(is_point).duplicated(keep="last"))]
    sizes = ends[["N", "D"]].dropna()
    return len(ends), int(ends["diverged"].sum()), len(sizes.drop_duplicates())


def _check_names(mapping: Mapping[str, str], constants: Mapping[str, float | str], origin: str) -> None:
    """Raise ValueError if a name is not a column of the run table, or is both mapped and set."""
    problems = []
    for name in [*mapping, *constants]:
        if name not in (*COLUMNS, *EXTRA_COLUMNS) and not (name == "state" and name in mapping):
            similar = find_similar(name, (*COLUMNS, *EXTRA_COLUMNS), cutoff=0.3)
            problems.append(f"no column {name} in a run table" + (f" (is it {similar[0]}?)" if similar else ""))
    problems += [f"{name} is both mapped and set: choose one" for name in mapping if name in constants]
    raise_problems(problems, f"the mapping for {origin}")


def _read_source(
    source: str | Path, has_mapping: bool, metric: str, uri: str | None
) -> tuple[RawTable, pd.DataFrame | None]:
    """Return the cells of a source as they are and, if it is a study of this project, its run table."""
    import pandas as pd

    from scaling.runs.readers import is_table_file, read_raw

    if is_table_file(source):
        return read_raw(Path(source)), None
    from scaling.runs.from_mlflow import read_cells, read_runs
    from scaling.tracking.records import read_records

    records = read_records(str(source), uri=uri, metric=metric)
    if not has_mapping and any(r.tags.get("muscale.kind") == "study" for r in records):
        return RawTable(pd.DataFrame()), read_runs(str(source), uri=uri)
    return RawTable(read_cells(records)), None


def _guess(
    raw: RawTable, mapping: Mapping[str, str], constants: Mapping[str, float | str], source: str | Path
) -> Guess | None:
    """Return how a source can be read, None if no way was found."""
    if raw.cells.empty:
        return None
    tries = 0

    def is_readable(mapping: dict[str, str], constants: dict[str, float | str]) -> bool:
        nonlocal tries
        tries += 1
        if tries > (200 if len(raw.cells) < MANY_ROWS else 10):
            return False
        findings = Findings()
        table = _map_columns(raw, mapping, constants, findings)
        clean, problems = clean_runs(table, findings.known)
        return not findings.problems and not problems and len(usable(clean)) > 0

    given = {k: v for k, v in raw.mapping.items() if k not in constants} | dict(mapping)
    name = Path(str(source)).name.split(".")[0] or "run"
    return guess_columns(raw.cells, given, constants, is_readable, run_name=name)


def _keep_good(raw: RawTable, mapping: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a mapping that are right by themselves."""
    good = {}
    for name, text in mapping.items():
        findings = Findings()
        plan_columns(raw.cells, {name: text} | dict.fromkeys(REQUIRED_COLUMNS, "") | {name: text}, {}, findings)
        if not findings.problems:
            good[name] = text
    return good


def _map_columns(
    raw: RawTable, mapping: Mapping[str, str], constants: Mapping[str, float | str], findings: Findings
) -> pd.DataFrame:
    """Return the run table of a source, unchecked; empty if a column cannot be found."""
    import pandas as pd

    cells = raw.cells
    mapping = {k: v for k, v in raw.mapping.items() if k not in constants} | dict(mapping)
    plan = plan_columns(cells, mapping, constants, findings)
    for name, (column, units) in plan.items():
        if not units and column in raw.units:
            plan[name] = (column, list(raw.units[column]))
    if findings.problems:
        return pd.DataFrame({n: pd.Series(math.nan, cells.index) for n in REQUIRED_COLUMNS})

    table = pd.DataFrame(index=cells.index)
    for name, constant in constants.items():
        table[name] = pd.Series([constant] * len(cells), cells.index, dtype=object)
    for name, (column, _) in plan.items():
        table[name] = cells[column]
    for name in table.columns:
        if name in (*NUMBER_COLUMNS, *EXTRA_COLUMNS):
            _parse_column(name, table, plan, findings)
        elif name not in FLAG_COLUMNS:
            table[name] = pd.Series(map_cells(table[name], _format_cell), table.index, dtype=object)
    used = {column for column, _ in plan.values()}
    is_checked = set(CHECKED_COLUMNS) <= set(table.columns)
    unused = [c for c in map(str, cells.columns) if c not in used and not has_state_name(c)]
    if unused and not is_checked:
        rest = len(unused) - MAX_COLUMNS_SHOWN
        more = f" and {rest} more" if rest > 0 else ""
        findings.remarks.append(f"columns not used: {', '.join(unused[:MAX_COLUMNS_SHOWN])}{more}")
    none = pd.Series("", cells.index, dtype=object)
    state = none if is_checked else read_states(cells, plan, mapping, table["loss"].notna(), findings)
    if not is_checked:
        _settle_units(table, cells, plan, findings)
    table["_used"] = table["loss"].notna() & ~table["_diverged"]
    by_column = {name: units for name, (_, units) in plan.items()}
    findings.problems += convert_units(table, by_column, findings.known, findings.remarks)
    is_copy = pd.Series(False, cells.index) if is_checked else mark_copies(cells, table, findings)
    is_history = find_history(table, is_copy)
    if not is_checked:
        take_peak_lr(table, is_history, findings, plan.get("lr", ("lr", []))[0])
    none = pd.Series(False, cells.index)
    is_part = none if is_checked else find_parts(cells, table, is_history, findings)
    mark_rows(table, state, is_copy, is_history, is_part, findings)
    if not is_checked and not findings.problems:
        findings.remarks += remark_small_counts(table[table["excluded"].eq("")], plan)
        findings.remarks += remark_missing_settings(table)
        findings.remarks += remark_other_rates(cells, table, plan)
        findings.remarks += remark_accumulation(cells, plan)
        outliers = find_outliers(table[table["excluded"].eq("")])
        findings.remarks += outliers.remarks
        table["excluded"] = table["excluded"].mask(
            table.index.isin(outliers.excluded), table.index.map(outliers.excluded)
        )
    return table.drop(columns=["_diverged", "_used", "state", *EXTRA_COLUMNS], errors="ignore")


def _parse_column(
    name: str, table: pd.DataFrame, plan: Mapping[str, tuple[str, list[str]]], findings: Findings
) -> None:
    """Replace the cells of a column by numbers, in place. `_diverged` is whether the loss is written as not finite."""
    import numpy as np

    column, units = plan.get(name, (name, []))
    scale = next((SCALE_UNITS[u] for u in units if u in SCALE_UNITS), 1.0)
    numbers, wrong = parse_numbers(
        table[name],
        kind="count" if name in COUNT_COLUMNS else "real",
        scale=scale,
        name=column,
        remarks=findings.remarks,
    )
    findings.problems += describe_mistakes(f"{name} (from {column})" if column != name else name, wrong, "a number")
    findings.known |= {(name, row) for row in wrong}
    if name == "loss":
        # The text "nan" is an outcome; an empty cell is not.
        is_diverged = ~np.isfinite(numbers.to_numpy(float)) & ~numbers.index.isin(list(wrong))
        is_diverged[is_diverged] = np.array([not is_empty(c) for c in table[name][is_diverged].tolist()], dtype=bool)
        table["_diverged"] = is_diverged
    table[name] = numbers


def _settle_units(
    table: pd.DataFrame, cells: pd.DataFrame, plan: dict[str, tuple[str, list[str]]], findings: Findings
) -> None:
    """Add the units to a plan that names and values both state, in place."""
    for name, (column, units) in plan.items():
        if name == "loss":
            settled = settle_loss_unit(column, units, table["loss"], has_bytes="bytes_per_token" in table)
        elif name in ("N", "D"):
            settled = settle_scale(name, column, units, table[name])
        else:
            continue
        plan[name] = (column, settled[0])
        findings.remarks += settled[1]
        findings.problems += settled[2]


def _add_rest(runs: pd.DataFrame, raw: RawTable, mapping: Mapping[str, str]) -> pd.DataFrame:
    """Return a run table with the other columns of its source, except those that say what was read from it already."""
    import pandas as pd

    cells = raw.cells
    plan = plan_columns(cells, {**raw.mapping, **mapping}, {}, Findings())
    used = {column for column, _ in plan.values()}
    rest: dict[str, Any] = {}
    for column in map(str, cells.columns):
        if column in used or column in COLUMNS or column in EXTRA_COLUMNS or has_state_name(column):
            continue
        # Most texts show in their first rows that they are no numbers.
        numbers, wrong = parse_numbers(cells[column].iloc[:SAMPLE_ROWS])
        if not wrong:
            numbers, wrong = parse_numbers(cells[column])
        if not wrong and numbers.notna().any():
            rest[column] = numbers
        elif wrong:
            texts = map_cells(cells[column], lambda cell: _format_cell(cell) or None)
            rest[column] = pd.Series(texts, cells.index, dtype=object)
    return pd.concat([runs, pd.DataFrame(rest, index=runs.index)], axis=1) if rest else runs


def _format_cell(cell: Any) -> str:
    if is_empty(cell):
        return ""
    # A list of one name is the name.
    if isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], str):
        return cell[0]
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
