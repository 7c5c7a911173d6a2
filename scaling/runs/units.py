"""Units of the run table's columns, and the three ways in which parameters are counted.

| ours | units; the first is meant when none is given |
|---|---|
| N | as given; multiplying; total; total-tied; nonembedding; total-as-is; nonembedding-as-is |
| D | tokens; sequences (times seq_len); steps (times batch_tokens) |
| batch_tokens | tokens; sequences (times seq_len) |
| loss | nats (per token); bits (per token, times ln 2); perplexity (its logarithm) |
| seconds | seconds; minutes; hours |
| all counts | also thousands, millions, billions, trillions |

Our N counts what multiplies tokens: the unembedding once, no input look-up (docs/math.md §1). One table has N_embedding, or
vocab * d_model, parameters. So N = total - table with two tables, N = total where one table serves both ends (total-tied), and
N = nonembedding + table. The as-is units convert nothing. Column N_convention says which it was: "multiplying", "total", "nonembedding" or
"as given". Norm gains (below 0.1 %) stay in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scaling.runs.cells import mistakes
from scaling.runs.table import COUNTS

if TYPE_CHECKING:
    import pandas as pd

SCALES = {"thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}
UNITS: dict[str, tuple[str, ...]] = {
    "N": ("multiplying", "total", "total-tied", "nonembedding", "total-as-is", "nonembedding-as-is"),
    "D": ("tokens", "sequences", "steps"),
    "batch_tokens": ("tokens", "sequences"),
    "loss": ("nats", "bits", "perplexity", "bits-per-byte", "bpb"),
    "seconds": ("seconds", "minutes", "hours"),
}


def unit_mistakes(name: str, units: Sequence[str], text: str) -> list[str]:
    scales = list(SCALES) if name in COUNTS else []
    others = list(UNITS.get(name, ()))
    problems = []
    for unit in units:
        if unit in ("bits-per-byte", "bpb") and name == "loss":
            problems.append(
                f"{name}={text}: bits per byte are no loss per token without the bytes per token of that data: "
                "multiply by them and by ln 2 first, and map the column that holds nats"
            )
        elif unit not in scales + others:
            allowed = ", ".join(u for u in others + scales if u != "bpb") or "none"
            problems.append(f"{name}={text}: unknown unit {unit!r}; {name} takes {allowed}")
    for kinds in (scales, others):
        if sum(u in kinds for u in units) > 1:
            problems.append(f"{name}={text}: two units of one kind")
    return problems


def convert(table: pd.DataFrame, units: Mapping[str, Sequence[str]], known: set[tuple[str, Any]]) -> list[str]:
    """Every column in our unit, in place; what is missing for it."""
    problems: list[str] = []

    def times(name: str, other: str, unit: str) -> None:
        if other not in table:
            problems.append(f"{name} in {unit} needs {other}: map it, or set {other}=NUMBER for all rows")
            return
        lacking = table[other].isna() & table[name].notna() & table["_used"]
        problems.extend(mistakes(other, dict.fromkeys(table.index[lacking]), f"a number, to read {name} in {unit}"))
        known.update((name, row) for row in table.index[lacking])
        table[name] = table[name] * table[other]

    for name in COUNTS:
        for word in units.get(name, ()):
            table[name] = table[name] * SCALES.get(word, 1.0)
    if "sequences" in units.get("batch_tokens", ()):
        times("batch_tokens", "seq_len", "sequences")
    if "sequences" in units.get("D", ()):
        times("D", "seq_len", "sequences")
    if "steps" in units.get("D", ()):
        times("D", "batch_tokens", "steps")
    factor = {"minutes": 60.0, "hours": 3600.0, "bits": math.log(2)}
    for name in ("seconds", "loss"):
        for word in units.get(name, ()):
            table[name] = table[name] * factor.get(word, 1.0)
    if "perplexity" in units.get("loss", ()):
        below = {row: v for row, v in table["loss"].items() if v <= 0}
        problems += mistakes("loss", below, "a positive perplexity")
        known |= {("loss", row) for row in below}
        table["loss"] = table["loss"].where(table["loss"] > 0).map(math.log)
    if "N" in table:
        problems += _count(table, set(units.get("N", ())) - set(SCALES), known)
    return problems


def _count(table: pd.DataFrame, words: set[str], known: set[tuple[str, Any]]) -> list[str]:
    """N in our convention where the unit says how, and N_convention."""
    given = table["N"]
    kind = next(iter(words), "as given")
    if "N_convention" not in table:
        table["N_convention"] = kind.removesuffix("-as-is") if kind.endswith("-as-is") or not words else "multiplying"
    if kind in ("as given", "multiplying"):
        return []
    table["N_nonembedding" if kind.startswith("nonembedding") else "N_total"] = given
    if kind not in ("total", "nonembedding"):
        return []
    if "N_embedding" in table:
        size = table["N_embedding"]
    elif {"vocab", "d_model"} <= set(table.columns):
        size = table["vocab"] * table["d_model"]
    else:
        other = "total-tied where one table serves both ends, " if kind == "total" else ""
        return [
            f"N as {kind} needs N_embedding, or vocab and d_model (map or set them); or {other}or {kind}-as-is to keep the count"
        ]
    table["N"] = given - size if kind == "total" else given + size
    bad = {row: v for row, v in given[table["N"] <= 0].items() if ("N", row) not in known}
    known |= {("N", row) for row in bad}
    return mistakes("N", bad, f"the {kind} parameters of a model with its embedding table")
