"""The run table: what a trainer yields, and one row per (trial, fidelity) whatever the source.

Columns (only the first three are required; the laws say which others they need):

| column | is |
|---|---|
| N, D | parameters that multiply tokens; training tokens |
| loss | validation loss of the finished (annealed) run, nats per token; NaN where diverged |
| lr, batch_tokens | peak learning rate at base width; tokens per optimizer step |
| run_id, config, rung | which run, which configuration of the study, which rung of its ladder |
| role | "proxy" or "target" (a target is scored against its prediction, never fitted) |
| diverged | NaN loss, or no better than guessing at the end: a recorded outcome |
| parametrization, seq_len, d_model, N_total, N_nonembedding, seconds, checkpoint | as logged |
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = ("N", "D", "loss")
POSITIVE = ("N", "D", "lr", "batch_tokens", "loss", "seq_len", "d_model", "N_total", "N_nonembedding")


@dataclass(frozen=True)
class Measurement:
    """One point of a run. A trainer yields these; the consumer decides what to do with them."""

    tokens: int  # trained so far; on a final point the cooldown is included
    loss: float  # nats per token, validation, always on the same held-out windows
    lr: float = math.nan  # at base width, at that moment
    train_loss: float = math.nan  # nats per token, mean since the last point
    seconds: float = math.nan  # spent training since this call of the trainer began
    final: bool = False  # annealed: the loss of a run of exactly this many tokens. Otherwise a point on the trunk
    diverged: bool = False  # NaN, or no better than guessing at the end


def load_runs(source: str | Path, *, tracking_uri: str | None = None) -> pd.DataFrame:
    """The run table of a study (an MLflow experiment's name) or of a .csv, .parquet or .jsonl file, checked.

    Raises ValueError when there is no such study or file, or when a column or a row cannot be read as documented above.
    """
    import pandas as pd

    def read_jsonl(path: Path) -> pd.DataFrame:
        return pd.read_json(path, lines=True)

    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".csv": pd.read_csv,
        ".parquet": pd.read_parquet,
        ".jsonl": read_jsonl,
    }
    path = Path(source)
    if path.suffix in readers:
        if not path.exists():
            raise ValueError(f"needed a table of runs, got {source}: no such file")
        return check_runs(readers[path.suffix](path), origin=str(source))
    from scaling import tracking

    return check_runs(tracking.read_runs(str(source), uri=tracking_uri), origin=f"study {source}")


def check_runs(runs: pd.DataFrame, *, origin: str = "the run table") -> pd.DataFrame:
    """The same table with `role` and `diverged` filled in and numbers as float64; all mistakes in one ValueError."""
    import numpy as np
    import pandas as pd

    problems = []
    for name in REQUIRED:
        if name not in runs.columns:
            near = difflib.get_close_matches(name, [str(c) for c in runs.columns], n=1, cutoff=0.4)
            problems.append(f"no column {name}" + (f" (is it {near[0]}? rename it)" if near else ""))
    runs = runs.copy()
    if "diverged" not in runs.columns:
        runs["diverged"] = (
            ~np.isfinite(pd.to_numeric(runs["loss"], errors="coerce")) if "loss" in runs.columns else False
        )
    runs["diverged"] = runs["diverged"].astype(bool)
    if "role" not in runs.columns:
        runs["role"] = "proxy"
    for name in POSITIVE:
        if name not in runs.columns:
            continue
        numbers = pd.to_numeric(runs[name], errors="coerce").astype(float)
        unreadable = numbers.isna() & runs[name].notna()
        wrong = unreadable | (numbers <= 0)
        if name in REQUIRED:
            wrong |= numbers.isna() & ~(runs["diverged"] if name == "loss" else False)
        for row, value in runs.loc[wrong, name].head(5).items():
            problems.append(
                f"row {row}, column {name}: needed a positive number, got {getattr(value, 'item', lambda v=value: v)()!r}"
            )
        if wrong.sum() > 5:
            problems.append(f"column {name}: {int(wrong.sum()) - 5} more rows like these")
        runs[name] = numbers
    if problems:
        raise ValueError(f"{origin} cannot be used:\n  " + "\n  ".join(problems))
    return runs


def save_runs(runs: pd.DataFrame, path: Path) -> None:
    """Write a run table as .parquet, .csv or .jsonl."""
    if path.suffix == ".parquet":
        runs.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        runs.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        runs.to_json(path, orient="records", lines=True)
    else:
        raise ValueError(f"a run table is written as .parquet, .csv or .jsonl, got {path.name}")
