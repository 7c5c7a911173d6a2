"""Read runs of other programs as one checked run table: map columns, convert units, mark unusable rows, guess nothing.

A mapping gives, for each column of the run table, the source's column, with its units after colons
(`scaling.runs.units`).
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.common.suggest import find_similar
from scaling.runs.cells import describe_mistakes, is_empty, parse_flags, parse_numbers, raise_problems
from scaling.runs.io import is_table_file
from scaling.runs.table import COLUMNS, FLAG_COLUMNS, NUMBER_COLUMNS, REQUIRED_COLUMNS, clean_runs
from scaling.runs.units import convert_units, find_unit_mistakes

if TYPE_CHECKING:
    import pandas as pd

# What Weights & Biases and MLflow put before the names of settings and results.
COLUMN_PREFIXES = (
    "config.",
    "summary.",
    "summary_metrics.",
    "summaryMetrics.",
    "json_config.",
    "params.",
    "metrics.",
    "tags.",
)
FINISHED_STATES = ("finished", "completed", "complete", "done", "success")
UNFINISHED_STATES = (
    "running",
    "crashed",
    "failed",
    "killed",
    "scheduled",
    "pending",
    "preempted",
    "preempting",
    "cancelled",
)
# How Weights & Biases and MLflow call the state of a run.
STATE_COLUMNS = ("state", "State", "_state", "status")
# Common names of each column, with units. They are only suggested, never used.
COMMON_NAMES = {
    "N": (
        "params",
        "n_params",
        "num_params",
        "parameters",
        "num_parameters",
        "n_parameters",
        "param_count",
        "model_size",
        "params_active_precise",
    ),
    "D": (
        "tokens",
        "n_tokens",
        "num_tokens",
        "total_tokens",
        "train_tokens",
        "tokens_seen",
        "step:steps",
        "_step:steps",
        "steps:steps",
        "num_steps:steps",
    ),
    "loss": (
        "val_loss",
        "eval_loss",
        "valid_loss",
        "validation_loss",
        "val/loss",
        "eval/loss",
        "valid/loss",
        "final_loss",
        "smooth_loss",
        "test_loss",
    ),
    "lr": ("learning_rate", "peak_lr", "max_lr", "lr_peak", "learning_rate_peak"),
    "batch_tokens": (
        "tokens_per_step",
        "batch_size:sequences",
        "global_batch_size:sequences",
        "batch_seqs:sequences",
        "bs:sequences",
    ),
    "seq_len": ("sequence_length", "seq_length", "context_length", "block_size", "max_seq_len", "seqlen"),
    "run_id": ("run", "id", "ID", "run_name", "Name"),
}
# Columns of the source that a remark lists.
MAX_COLUMNS_SHOWN = 12


@dataclass
class _Findings:
    """What an import has to report.

    Attributes:
        remarks: What was used and what was not, one line each.
        problems: What cannot be read, one line each.
        known: The (column, row) of cells whose mistakes are among the problems.
    """

    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    known: set[tuple[str, Any]] = field(default_factory=set)


def import_runs(
    source: str | Path,
    *,
    mapping: Mapping[str, str] | None = None,
    constants: Mapping[str, float | str] | None = None,
    metric: str = "last",
    tracking_uri: str | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Read the runs of another program as a checked run table.

    No row is dropped: the columns `diverged`, `final` and `excluded` mark diverged and unfinished runs, and points
    before the end of a run (of rows that share a run_id, the one with the most tokens is the end).

    Args:
        source: A .csv, .parquet, .jsonl or .json file, or the name of any MLflow experiment.
        mapping: For each column of the run table, "COLUMN:UNIT:..." of the source, such as {"D": "step:steps"}. A
            column that has its name already needs none. The prefixes `config.`, `summary.`, `params.` and `metrics.`
            may be left out where only one column fits. An empty text leaves a column with the right name out.
        constants: Values for all rows, such as {"seq_len": 2048}. {"final": True} takes every point as an end.
        metric: "last" takes the last value of each metric's history in MLflow, "min" the lowest.
        tracking_uri: The MLflow store of an experiment; by default $MLFLOW_TRACKING_URI or ./mlflow.db.

    Returns:
        The checked run table, and remarks on what was used and what was not.

    Raises:
        ValueError: If anything cannot be read. The message lists all mistakes, by row and column.
    """
    origin = str(source)
    mapping, constants = dict(mapping or {}), dict(constants or {})
    _check_names(mapping, constants, origin)
    raw, study = _read_source(source, bool(mapping or constants), metric, tracking_uri)
    findings = _Findings()
    table = study if study is not None else _map_columns(raw, mapping, constants, findings)
    clean, problems = clean_runs(table, findings.known)
    raise_problems(findings.problems + problems, origin)
    return clean[[c for c in COLUMNS if c in clean.columns]].reset_index(drop=True), findings.remarks


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


def _check_names(mapping: Mapping[str, str], constants: Mapping[str, float | str], origin: str) -> None:
    """Raise ValueError if a name is not a column of the run table, or is both mapped and set."""
    problems = []
    for name in [*mapping, *constants]:
        if name not in COLUMNS and not (name == "state" and name in mapping):
            similar = find_similar(name, COLUMNS, cutoff=0.3)
            problems.append(f"no column {name} in a run table" + (f" (is it {similar[0]}?)" if similar else ""))
    problems += [f"{name} is both mapped and set: choose one" for name in mapping if name in constants]
    raise_problems(problems, f"the mapping for {origin}")


def _read_source(
    source: str | Path, has_mapping: bool, metric: str, uri: str | None
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Return the cells of a source as they are and, if it is a study of this project, its run table."""
    import pandas as pd

    if is_table_file(source):
        from scaling.runs.readers import read_table

        return read_table(Path(source)), None
    from scaling.runs.from_mlflow import read_runs
    from scaling.tracking.records import read_records

    records = read_records(str(source), uri=uri, metric=metric)
    if not has_mapping and any(r.tags.get("muscale.kind") == "study" for r in records):
        return pd.DataFrame(), read_runs(str(source), uri=uri)
    rows = []
    for r in records:
        row: dict[str, Any] = {"run_id": r.run_id, "name": r.name, "state": r.status}
        row |= {f"params.{k}": None if v == "None" else v for k, v in r.params.items()}
        row |= {f"metrics.{k}": v if math.isfinite(v) else str(v) for k, v in r.metrics.items()}
        row |= {f"tags.{k}": v for k, v in r.tags.items() if not k.startswith("mlflow.")}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    # Indexed by run, so that an error message names the run of a mistake.
    index = [r.run_id for r in records]
    return pd.DataFrame({n: pd.Series([row.get(n) for row in rows], index, dtype=object) for n in names}), None


def _map_columns(
    raw: pd.DataFrame, mapping: Mapping[str, str], constants: Mapping[str, float | str], findings: _Findings
) -> pd.DataFrame:
    """Return the run table of a source, unchecked; empty if a column cannot be found."""
    import pandas as pd

    columns = [str(c) for c in raw.columns]
    plan = _plan_columns(columns, mapping, constants, findings)
    if findings.problems:
        return pd.DataFrame({n: pd.Series(math.nan, raw.index) for n in REQUIRED_COLUMNS})

    table = pd.DataFrame(index=raw.index)
    for name, constant in constants.items():
        table[name] = pd.Series([constant] * len(raw), raw.index, dtype=object)
    for name, (column, _) in plan.items():
        table[name] = raw[column]
    for name in table.columns:
        if name in NUMBER_COLUMNS:
            numbers, wrong = parse_numbers(table[name])
            label = f"{name} (from {plan[name][0]})" if name in plan and plan[name][0] != name else name
            findings.problems += describe_mistakes(label, wrong, "a number")
            findings.known |= {(name, row) for row in wrong}
            if name == "loss":
                # The text "nan" is an outcome; an empty cell is not.
                is_given = ~table[name].map(is_empty) & ~numbers.index.isin(list(wrong))
                table["_diverged"] = (~numbers.map(math.isfinite)) & is_given
            table[name] = numbers
        elif name not in FLAG_COLUMNS:
            table[name] = table[name].map(_format_cell)
    used = {column for column, _ in plan.values()}
    if unused := [c for c in columns if c not in used and c not in STATE_COLUMNS]:
        rest = len(unused) - MAX_COLUMNS_SHOWN
        more = f" and {rest} more" if rest > 0 else ""
        findings.remarks.append(f"columns not used: {', '.join(unused[:MAX_COLUMNS_SHOWN])}{more}")
    state = _read_states(raw, plan, findings)
    table["_used"] = ~table["_diverged"] & ~state.isin(UNFINISHED_STATES)
    findings.problems += convert_units(table, {n: units for n, (_, units) in plan.items()}, findings.known)
    _mark_rows(table, state, findings)
    return table.drop(columns=["_diverged", "_used", "state"], errors="ignore")


def _plan_columns(
    columns: Sequence[str], mapping: Mapping[str, str], constants: Mapping[str, float | str], findings: _Findings
) -> dict[str, tuple[str, list[str]]]:
    """Return the source's column and its units for each column of the run table, in the order of `COLUMNS`."""
    plan: dict[str, tuple[str, list[str]]] = {n: (n, []) for n in COLUMNS if n in columns and n not in constants}
    for name, text in mapping.items():
        if not text:
            plan.pop(name, None)
            continue
        column, units = _split_column(text, columns)
        matches = _find_columns(column, columns)
        if len(matches) > 1:
            hint = f"{' or '.join(matches)}? write it whole"
            findings.problems.append(f"{name}={text}: several columns {column} ({hint})")
        elif not matches:
            hint = f"nearest: {', '.join(find_similar(column, columns, count=3)) or 'none'}"
            findings.problems.append(f"{name}={text}: no column {column} ({hint})")
        findings.problems += find_unit_mistakes(name, units, text)
        if len(matches) == 1:
            plan[name] = (matches[0], units)

    plan = {name: plan[name] for name in (*COLUMNS, "state") if name in plan}
    missing = [n for n in REQUIRED_COLUMNS if n not in plan and n not in constants and not mapping.get(n)]
    findings.problems += [f"no column {n}{_suggest_column(n, columns)}" for n in missing]
    for name in ("lr", "batch_tokens", "run_id"):
        if name not in plan and name not in mapping and name not in constants:
            hint = _suggest_column(name, columns)
            if hint:
                findings.remarks.append(f"no column {name}{hint}")
    return plan


def _read_states(raw: pd.DataFrame, plan: Mapping[str, tuple[str, Sequence[str]]], findings: _Findings) -> pd.Series:
    """Return the state of the run of each row in lower case, empty where the source does not have it."""
    import pandas as pd

    column = plan["state"][0] if "state" in plan else next((c for c in STATE_COLUMNS if c in raw.columns), None)
    if column is None:
        return pd.Series("", raw.index, dtype=object)
    states = raw[column].map(lambda v: "" if is_empty(v) else str(v).strip())
    lower = states.map(str.lower)
    if "state" not in plan and not lower.isin([*FINISHED_STATES, *UNFINISHED_STATES]).any():
        if states.ne("").any():
            findings.remarks.append(
                f"column {column} is not read as the state of runs: it holds {states[states.ne('')].iloc[0]!r}"
            )
        return pd.Series("", raw.index, dtype=object)
    if column != "state":
        findings.remarks.append(f"column {column} says which runs have finished")
    unknown = states[states.ne("") & ~lower.isin([*FINISHED_STATES, *UNFINISHED_STATES])].to_dict()
    needed = f"the state of a run ({', '.join((*FINISHED_STATES, *UNFINISHED_STATES))})"
    findings.problems += describe_mistakes(column, unknown, needed)
    return lower


def _mark_rows(table: pd.DataFrame, state: pd.Series, findings: _Findings) -> None:
    """Fill in `diverged`, `final` and `excluded` where the table does not have them, in place."""
    import numpy as np
    import pandas as pd

    is_unfinished = state.isin(UNFINISHED_STATES)
    has_no_loss = ~np.isfinite(table["loss"].to_numpy(float))
    is_guess = pd.Series(False, table.index)
    if "vocab" in table:
        is_guess = table["loss"] >= np.log(table["vocab"].where(table["vocab"] > 0))
    # A row without a size and a loss is no run, but for example the parent of a sweep.
    is_blank = (table["N"].isna() | table["D"].isna()) & has_no_loss & ~table["_diverged"]
    default = (
        table["_diverged"]
        | (pd.Series(has_no_loss, table.index) & ~is_unfinished & ~is_blank)
        | (is_guess & ~is_unfinished)
    )
    if "diverged" in table:
        table["diverged"], wrong = parse_flags(table["diverged"], default)
        findings.problems += describe_mistakes("diverged", wrong, "true or false")
    else:
        table["diverged"] = default
    reason = table["excluded"] if "excluded" in table else pd.Series("", table.index, dtype=object)
    is_open = reason.eq("")
    reason = reason.mask(is_open & table["diverged"], "diverged: no finite loss")
    reason = reason.mask(is_open & table["diverged"] & ~has_no_loss, "diverged")
    reason = reason.mask(is_open & table["diverged"] & is_guess & ~has_no_loss, "diverged: no better than guessing")
    reason = reason.mask(is_open & is_unfinished & ~table["diverged"], "unfinished (" + state + ")")
    reason = reason.mask(reason.eq("") & is_blank, "no result: neither a loss nor a size")

    is_last = pd.Series(True, table.index)
    if "run_id" in table and "rung" not in table and "final" not in table:
        run, tokens = table["run_id"], table["D"]
        has_several = run.duplicated(keep=False) & run.ne("") & tokens.notna()
        is_last = ~has_several | tokens.eq(tokens.groupby(run).transform("max"))
        is_repeated = table[has_several].duplicated(["run_id", "D"]) if has_several.any() else has_several
        repeated = run[is_repeated.index[is_repeated]].to_dict()
        findings.problems += describe_mistakes("run_id", repeated, "one row per run and number of tokens")
    default = is_last & ~is_unfinished
    if "final" in table:
        table["final"], wrong = parse_flags(table["final"], default)
        findings.problems += describe_mistakes("final", wrong, "true or false")
    else:
        table["final"] = default
    reason = reason.mask(reason.eq("") & ~is_last, "not final: a point on the way of its run")
    table["excluded"] = reason.mask(reason.eq("") & ~table["final"], "not final")


def _split_column(text: str, columns: Sequence[str]) -> tuple[str, list[str]]:
    """Split "tokens:billions" into the column and its units; the longest prefix that is a column is the column."""
    parts = text.split(":")
    for k in range(len(parts), 0, -1):
        if _find_columns(":".join(parts[:k]), columns):
            return ":".join(parts[:k]), parts[k:]
    return parts[0], parts[1:]


def _find_columns(column: str, columns: Sequence[str]) -> list[str]:
    """Return the column of that name or, if there is none, those of that name after a known prefix."""
    return [column] if column in columns else [p + column for p in COLUMN_PREFIXES if p + column in columns]


def _suggest_column(name: str, columns: Sequence[str]) -> str:
    """Return a hint for an error message, such as " (is it params? --map N=params)".

    It names a column with a common name or, for a required column, a similar one. If there is none, it lists the
    columns.
    """
    by_name = {_strip_prefix(c).lower(): c for c in reversed(columns)}
    for candidate in (name, *COMMON_NAMES.get(name, ())):
        column, _, unit = candidate.partition(":")
        if column.lower() in by_name:
            match = by_name[column.lower()]
            return f" (is it {match}? --map {_quote(f'{name}={match}' + (f':{unit}' if unit else ''))})"
    if name in REQUIRED_COLUMNS and len(name) > 1:
        similar = find_similar(name, by_name, cutoff=0.6)
        if similar:
            return f" (is it {by_name[similar[0]]}? --map {_quote(f'{name}={by_name[similar[0]]}')})"
    if name in REQUIRED_COLUMNS:
        return f"; the source has {', '.join(columns[:MAX_COLUMNS_SHOWN]) or 'none'}: --map {name}=COLUMN"
    return ""


def _strip_prefix(column: str) -> str:
    return next((column.removeprefix(p) for p in COLUMN_PREFIXES if column.startswith(p)), column)


def _quote(text: str) -> str:
    """Return text in double quotes if a shell would otherwise change it."""
    return f'"{text}"' if any(c in text for c in " ()&;|<>$`'*?!#") else text


def _format_cell(cell: Any) -> str:
    if is_empty(cell):
        return ""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
