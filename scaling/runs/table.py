"""The run table: what a trainer yields, and one row per (trial, fidelity) whatever the source.

Columns (only the first three are required; the laws say which others they need):

| column | is |
|---|---|
| N, D | parameters that multiply tokens; training tokens |
| loss | validation loss of the finished (annealed) run, nats per token; NaN where diverged |
| lr, batch_tokens | peak learning rate at base width; tokens per optimizer step |
| run_id, name, config, rung | which run, its name, which configuration of the study, which rung of its ladder |
| role | "proxy", "confirm" or "target" (scored against the prediction made before it; then laws learn from it as `arm` says) |
| arm | of a target: "scratch", which laws are fitted to, or "warm", whose D is not comparable; otherwise they leave it out |
| diverged | NaN loss, or no better than guessing at the end: a recorded outcome |
| final | False where the loss is not that of a run of D tokens: unfinished, or on the way under a decaying schedule |
| excluded | why the row is kept out of laws; empty where it is used |
| N_convention | how N was counted, see scaling.runs.importer |
| parametrization, seq_len, d_model, vocab, N_total, N_nonembedding, N_embedding, seconds, checkpoint | as logged |
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

from scaling.runs.cells import as_flags, as_numbers, empty, mistakes, refuse

REQUIRED = ("N", "D", "loss")
COUNTS = ("N", "D", "batch_tokens", "seq_len", "d_model", "vocab", "N_total", "N_nonembedding", "N_embedding")
POSITIVE = (*COUNTS, "lr", "loss")
NUMBERS = (*POSITIVE, "rung", "seconds")
FLAGS = ("diverged", "final")
WORDS = (
    "run_id",
    "name",
    "config",
    "role",
    "arm",
    "excluded",
    "N_convention",
    "parametrization",
    "data_sha256",
    "checkpoint",
)
COLUMNS = (*NUMBERS, *FLAGS, *WORDS)


def usable(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows that laws are fitted to: not excluded for any reason, and of targets those trained from scratch.

    Also of a table that was never checked, whose diverged and unfinished rows are left out when it has such columns.
    """
    keep = not_comparable(runs).eq("")
    if "excluded" in runs:
        return runs[keep & runs["excluded"].fillna("").eq("")]
    if "diverged" in runs:
        keep = keep & ~runs["diverged"].astype(bool)
    if "final" in runs:
        keep = keep & runs["final"].astype(bool)
    return runs[keep]


def not_comparable(runs: pd.DataFrame) -> pd.Series[Any]:
    """Why a target's row tells laws nothing, empty where it does: its D leaves out what a warm start began with."""

    role, arm = (runs[c] if c in runs else pd.Series(None, runs.index, dtype=object) for c in ("role", "arm"))
    reasons = pd.Series("", runs.index, dtype=object)
    reasons = reasons.mask(role.eq("target") & ~arm.eq("scratch"), "target whose start is not recorded")
    return reasons.mask(role.eq("target") & arm.eq("warm"), "warm start")


def check_runs(runs: pd.DataFrame, *, origin: str = "the run table") -> pd.DataFrame:
    """The same table with `role`, `diverged`, `final` and `excluded` filled in and numbers as float64.

    Raises one ValueError with all mistakes, each with its row (its index) and column.
    """
    clean, problems = examine(runs)
    refuse(problems, origin)
    return clean


def examine(runs: pd.DataFrame, known: Collection[tuple[str, Any]] = ()) -> tuple[pd.DataFrame, list[str]]:
    """The table as `check_runs` returns it, and what is wrong with it.

    known: (column, row) cells of which the mistake has been named already.
    """

    known = set(known)
    problems = [] if len(runs) else ["no rows"]
    for name in REQUIRED:
        if name not in runs.columns:
            near = difflib.get_close_matches(name, [str(c) for c in runs.columns], n=1, cutoff=0.4)
            problems.append(f"no column {name}" + (f" (is it {near[0]}? rename it)" if near else ""))
    runs = runs.copy()
    for name in NUMBERS:
        if name in runs.columns:
            runs[name], wrong = as_numbers(runs[name])
            problems += mistakes(name, wrong, "a positive number" if name in POSITIVE else "a number")
            known |= {(name, row) for row in wrong}
    for name in WORDS:
        if name in runs.columns:
            words = [None if empty(v) else str(v) for v in runs[name]]
            runs[name] = pd.Series(words, runs.index, dtype=object)  # alike whatever the file and the version of pandas
    loss = runs["loss"] if "loss" in runs.columns else pd.Series(np.nan, runs.index)
    for name, default in (("diverged", ~np.isfinite(loss)), ("final", pd.Series(True, runs.index))):
        if name not in runs.columns:
            runs[name] = default
        runs[name], wrong = as_flags(runs[name], default)
        problems += mistakes(name, wrong, "true or false")
    if "role" not in runs.columns:
        runs["role"] = pd.Series("proxy", runs.index, dtype=object)
    runs["role"] = runs["role"].where(runs["role"].notna(), "proxy")
    reasons = runs["excluded"] if "excluded" in runs.columns else pd.Series("", runs.index)
    reasons = reasons.where(reasons.notna(), "").astype(object)
    reasons = reasons.mask(reasons.eq("") & runs["diverged"], "diverged")
    reasons = reasons.mask(reasons.eq("") & ~runs["final"], "not final")
    runs["excluded"] = reasons.where(reasons.ne(""), not_comparable(runs))
    for name in POSITIVE:
        if name in runs.columns:
            value = runs[name]
            bad = (value <= 0) | np.isinf(value)
            if name == "loss":
                bad &= runs["excluded"].eq("")  # an excluded run has the loss it has
            if name in REQUIRED:
                bad |= value.isna() & runs["excluded"].eq("")
            said = {row: value.iat[i] for i, row in enumerate(runs.index) if bad.iat[i] and (name, row) not in known}
            problems += mistakes(name, said, "a positive number")
    return runs, problems


def table_sha256(runs: pd.DataFrame) -> str:
    """The hash of what proxies have to say: N, D, lr, batch_tokens, loss of usable rows, in whatever order. Not of targets, so
    that launching one does not make its own recommendation an old one."""
    used = usable(runs)
    return _sha256(used[used["role"] != "target"] if "role" in used else used)


def _sha256(runs: pd.DataFrame) -> str:
    numbers = runs[["N", "D", "lr", "batch_tokens", "loss"]].to_numpy(float)
    return hashlib.sha256(np.ascontiguousarray(numbers[np.lexsort(numbers.T)], dtype="<f8").tobytes()).hexdigest()
