"""Runs of other programs as one checked run table: names mapped, units converted, unfit rows marked, nothing guessed.

A mapping names the source's column of each of ours, with its units behind colons (`scaling.runs.units`).
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.runs.cells import as_flags, as_numbers, empty, mistakes, refuse
from scaling.runs.io import is_file
from scaling.runs.table import COLUMNS, FLAGS, NUMBERS, REQUIRED, examine
from scaling.runs.units import convert, unit_mistakes

if TYPE_CHECKING:
    import pandas as pd

PREFIXES = (
    "config.",
    "summary.",
    "summary_metrics.",
    "summaryMetrics.",
    "json_config.",
    "params.",
    "metrics.",
    "tags.",
)
FINISHED = ("finished", "completed", "complete", "done", "success")
UNFINISHED = ("running", "crashed", "failed", "killed", "scheduled", "pending", "preempted", "preempting", "cancelled")
STATES = ("state", "State", "_state", "status")  # as W&B and MLflow call it
# What a column of ours is often called. Only ever said, never used.
LIKELY = {
    "N": "params n_params num_params parameters num_parameters n_parameters param_count model_size params_active_precise",
    "D": "tokens n_tokens num_tokens total_tokens train_tokens tokens_seen step:steps _step:steps steps:steps num_steps:steps",
    "loss": "val_loss eval_loss valid_loss validation_loss val/loss eval/loss valid/loss final_loss smooth_loss test_loss",
    "lr": "learning_rate peak_lr max_lr lr_peak learning_rate_peak",
    "batch_tokens": "tokens_per_step batch_size:sequences global_batch_size:sequences batch_seqs:sequences bs:sequences",
    "seq_len": "sequence_length seq_length context_length block_size max_seq_len seqlen",
    "run_id": "run id ID run_name Name",
}


def import_runs(
    source: str | Path,
    *,
    mapping: Mapping[str, str] | None = None,
    constants: Mapping[str, float | str] | None = None,
    metric: str = "last",
    tracking_uri: str | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """The checked run table of a file or of any MLflow experiment, and remarks on what was used and what was not.

    mapping: {ours: "column:unit:..."}; a column that has our name already needs none. `config.`, `summary.`, `params.` or `metrics.` before a
    column may be left out where only one fits; an empty text keeps a column of our name out. constants: a value for all rows ({"seq_len": 2048}). metric: of MLflow's
    histories, the last value or the lowest.

    Nothing is dropped: a row of a diverged or unfinished run, or a point on the way of one (rows share a run_id; the
    one of most tokens is the last), says so in `diverged`, `final` and `excluded`. {"final": True} takes every point as an end.

    Raises one ValueError that names everything that cannot be read, by row and column.
    """
    origin = str(source)
    mapping, constants = dict(mapping or {}), dict(constants or {})
    _check_names(mapping, constants, origin)
    raw, native = _read(source, bool(mapping or constants), metric, tracking_uri)
    if native is not None:
        clean, problems = examine(native)
        remarks: list[str] = []
    else:
        table, remarks, problems, known = _interpret(raw, mapping, constants)
        clean, more = examine(table, known)
        problems += more
    refuse(problems, origin)
    return clean[[c for c in COLUMNS if c in clean.columns]].reset_index(drop=True), remarks


def read_mapping(path: Path) -> tuple[dict[str, str], dict[str, float | str]]:
    """(mapping, constants) from the tables [map] and [set] of a TOML file."""
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
    refuse(problems, str(path))
    return tables[0], tables[1]


def quarantine(runs: pd.DataFrame) -> list[str]:
    """How many rows of a checked table went where, and why: one line each."""
    reasons = runs["excluded"].value_counts()
    lines = [f"{int(runs['excluded'].eq('').sum())} of {len(runs)} rows are used by laws"]
    return lines + [f"{count} kept, but excluded: {reason}" for reason, count in reasons.items() if reason]


def _check_names(mapping: Mapping[str, str], constants: Mapping[str, float | str], origin: str) -> None:
    problems = []
    for name in [*mapping, *constants]:
        if name not in COLUMNS and not (name == "state" and name in mapping):
            near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.3)
            problems.append(f"no column {name} in a run table" + (f" (is it {near[0]}?)" if near else ""))
    problems += [f"{name} is both mapped and set: choose one" for name in mapping if name in constants]
    refuse(problems, f"the mapping for {origin}")


def _read(source: str | Path, mapped: bool, metric: str, uri: str | None) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """(cells as they are, the run table where the source is a study of ours)."""
    import pandas as pd

    if is_file(source):
        from scaling.runs.readers import read_table

        return read_table(Path(source)), None
    from scaling.runs.from_mlflow import read_runs
    from scaling.tracking.records import read_records

    records = read_records(str(source), uri=uri, metric=metric)
    if not mapped and any(r.tags.get("muscale.kind") == "study" for r in records):
        return pd.DataFrame(), read_runs(str(source), uri=uri)
    rows = []
    for r in records:
        row: dict[str, Any] = {"run_id": r.run_id, "name": r.name, "state": r.status}
        row |= {f"params.{k}": None if v == "None" else v for k, v in r.params.items()}
        row |= {f"metrics.{k}": v if math.isfinite(v) else str(v) for k, v in r.metrics.items()}
        row |= {f"tags.{k}": v for k, v in r.tags.items() if not k.startswith("mlflow.")}
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    index = [r.run_id for r in records]  # so that a mistake names its run
    return pd.DataFrame({n: pd.Series([row.get(n) for row in rows], index, dtype=object) for n in names}), None


def _interpret(
    raw: pd.DataFrame, mapping: Mapping[str, str], constants: Mapping[str, float | str]
) -> tuple[pd.DataFrame, list[str], list[str], set[tuple[str, Any]]]:
    """(the table, remarks, problems, cells named in them)."""
    import pandas as pd

    columns = [str(c) for c in raw.columns]
    problems: list[str] = []
    remarks: list[str] = []
    known: set[tuple[str, Any]] = set()
    plan: dict[str, tuple[str, list[str]]] = {n: (n, []) for n in COLUMNS if n in columns and n not in constants}
    for name, text in mapping.items():
        if not text:
            plan.pop(name, None)
            continue
        column, units = _split(text, columns)
        found = _find(column, columns)
        if len(found) != 1:
            near = difflib.get_close_matches(column, columns, n=3, cutoff=0.4)
            several = f"{' or '.join(found)}? write it whole" if found else f"nearest: {', '.join(near) or 'none'}"
            problems.append(f"{name}={text}: {'several columns' if found else 'no column'} {column} ({several})")
        problems += unit_mistakes(name, units, text)
        if len(found) == 1:
            plan[name] = (found[0], units)

    plan = {name: plan[name] for name in (*COLUMNS, "state") if name in plan}
    missing = [n for n in REQUIRED if n not in plan and n not in constants and not mapping.get(n)]
    problems += [f"no column {n}{_likely(n, columns)}" for n in missing]
    for name in ("lr", "batch_tokens", "run_id"):
        if name not in plan and name not in mapping and name not in constants and (hint := _likely(name, columns)):
            remarks.append(f"no column {name}{hint}")
    if problems:
        return pd.DataFrame({n: pd.Series(math.nan, raw.index) for n in REQUIRED}), remarks, problems, known

    table = pd.DataFrame(index=raw.index)
    for name, constant in constants.items():
        table[name] = pd.Series([constant] * len(raw), raw.index, dtype=object)
    for name, (column, _) in plan.items():
        table[name] = raw[column]
    for name in table.columns:
        if name in NUMBERS:
            value, wrong = as_numbers(table[name])
            said = f"{name} (from {plan[name][0]})" if name in plan and plan[name][0] != name else name
            problems += mistakes(said, wrong, "a number")
            known |= {(name, row) for row in wrong}
            if name == "loss":  # "nan" as text is an outcome, an empty cell none
                written = ~table[name].map(empty) & ~value.index.isin(list(wrong))
                table["_blown"] = (~value.map(math.isfinite)) & written
            table[name] = value
        elif name not in FLAGS:
            table[name] = table[name].map(_text)
    used = {column for column, _ in plan.values()}
    if unused := [c for c in columns if c not in used and c not in STATES]:
        more = f" and {len(unused) - 12} more" if len(unused) > 12 else ""
        remarks.append(f"columns not used: {', '.join(unused[:12])}{more}")
    state = _states(raw, plan, remarks, problems)
    table["_used"] = ~table["_blown"] & ~state.isin(UNFINISHED)
    problems += convert(table, {n: units for n, (_, units) in plan.items()}, known)
    _mark(table, state, problems)
    return table.drop(columns=["_blown", "_used", "state"], errors="ignore"), remarks, problems, known


def _states(
    raw: pd.DataFrame, plan: Mapping[str, tuple[str, Sequence[str]]], remarks: list[str], problems: list[str]
) -> pd.Series:
    """The state of each row's run in lower case, empty where the source does not say."""
    import pandas as pd

    column = plan["state"][0] if "state" in plan else next((c for c in STATES if c in raw.columns), None)
    if column is None:
        return pd.Series("", raw.index, dtype=object)
    words = raw[column].map(lambda v: "" if empty(v) else str(v).strip())
    lower = words.map(str.lower)
    if "state" not in plan and not lower.isin([*FINISHED, *UNFINISHED]).any():
        if words.ne("").any():
            remarks.append(
                f"column {column} is not read as the state of runs: it holds {words[words.ne('')].iloc[0]!r}"
            )
        return pd.Series("", raw.index, dtype=object)
    if column != "state":
        remarks.append(f"column {column} says which runs have finished")
    odd = words[words.ne("") & ~lower.isin([*FINISHED, *UNFINISHED])].to_dict()
    problems += mistakes(column, odd, f"the state of a run ({', '.join((*FINISHED, *UNFINISHED))})")
    return lower


def _mark(table: pd.DataFrame, state: pd.Series, problems: list[str]) -> None:
    """`diverged`, `final` and `excluded`, in place, as far as the table does not have them."""
    import numpy as np
    import pandas as pd

    unfinished = state.isin(UNFINISHED)
    lost = ~np.isfinite(table["loss"].to_numpy(float))
    guess = pd.Series(False, table.index)
    if "vocab" in table:
        guess = table["loss"] >= np.log(table["vocab"].where(table["vocab"] > 0))
    bare = (table["N"].isna() | table["D"].isna()) & lost & ~table["_blown"]  # a sweep's parent, say: no run
    default = table["_blown"] | (pd.Series(lost, table.index) & ~unfinished & ~bare) | (guess & ~unfinished)
    if "diverged" in table:
        table["diverged"], wrong = as_flags(table["diverged"], default)
        problems += mistakes("diverged", wrong, "true or false")
    else:
        table["diverged"] = default
    reason = table["excluded"] if "excluded" in table else pd.Series("", table.index, dtype=object)
    new = reason.eq("")
    reason = reason.mask(new & table["diverged"], "diverged: no finite loss")
    reason = reason.mask(new & table["diverged"] & ~lost, "diverged")
    reason = reason.mask(new & table["diverged"] & guess & ~lost, "diverged: no better than guessing")
    reason = reason.mask(new & unfinished & ~table["diverged"], "unfinished (" + state + ")")

    reason = reason.mask(reason.eq("") & bare, "no result: neither a loss nor a size")

    last = pd.Series(True, table.index)
    if "run_id" in table and "rung" not in table and "final" not in table:
        run, tokens = table["run_id"], table["D"]
        several = run.duplicated(keep=False) & run.ne("") & tokens.notna()
        last = ~several | tokens.eq(tokens.groupby(run).transform("max"))
        twice = table[several].duplicated(["run_id", "D"]) if several.any() else several
        again = run[twice.index[twice]].to_dict()
        problems += mistakes("run_id", again, "one row per run and number of tokens")
    default = last & ~unfinished
    if "final" in table:
        table["final"], wrong = as_flags(table["final"], default)
        problems += mistakes("final", wrong, "true or false")
    else:
        table["final"] = default
    reason = reason.mask(reason.eq("") & ~last, "not final: a point on the way of its run")
    table["excluded"] = reason.mask(reason.eq("") & ~table["final"], "not final")


def _split(text: str, columns: Sequence[str]) -> tuple[str, list[str]]:
    """ "tokens:billions" -> ("tokens", ["billions"]); the longest beginning that is a column is the column."""
    parts = text.split(":")
    for k in range(len(parts), 0, -1):
        if _find(":".join(parts[:k]), columns):
            return ":".join(parts[:k]), parts[k:]
    return parts[0], parts[1:]


def _find(column: str, columns: Sequence[str]) -> list[str]:
    """The columns of that name, or else of that name behind one of the prefixes."""
    return [column] if column in columns else [p + column for p in PREFIXES if p + column in columns]


def _likely(name: str, columns: Sequence[str]) -> str:
    """ " (is it params? --map N=params)" where a column has a common name, an exact one behind a prefix, or a similar one."""
    bare = {_bare(c).lower(): c for c in reversed(columns)}
    for guess in (name, *LIKELY.get(name, "").split()):
        column, _, unit = guess.partition(":")
        if column.lower() in bare:
            found = bare[column.lower()]
            return f" (is it {found}? --map {_quoted(f'{name}={found}' + (f':{unit}' if unit else ''))})"
    if name in REQUIRED and len(name) > 1:
        near = difflib.get_close_matches(name, list(bare), n=1, cutoff=0.6)
        if near:
            return f" (is it {bare[near[0]]}? --map {_quoted(f'{name}={bare[near[0]]}')})"
    return f"; the source has {', '.join(columns[:12]) or 'none'}: --map {name}=COLUMN" if name in REQUIRED else ""


def _bare(column: str) -> str:
    return next((column.removeprefix(p) for p in PREFIXES if column.startswith(p)), column)


def _quoted(text: str) -> str:
    return f'"{text}"' if any(c in text for c in " ()&;|<>$`'*?!#") else text


def _text(cell: Any) -> str:
    if empty(cell):
        return ""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
