"""Convert the units of a run table, and the three ways to count parameters.

| column | units; the first is the default |
|---|---|
| N | as given; multiplying; total; total-tied; nonembedding; total-as-is; nonembedding-as-is |
| D | tokens; sequences (times seq_len); steps (times batch_tokens) |
| batch_tokens | tokens; sequences (times seq_len) |
| loss | nats (per token); bits (per token, times ln 2); perplexity (its logarithm) |
| seconds | seconds; minutes; hours |
| all counts | also thousands, millions, billions, trillions |

N here counts the parameters that multiply tokens: the unembedding once, no input lookup (docs/math.md §1). One
embedding table has N_embedding, or vocab * d_model, parameters. So N = total - table if there are two tables, N = total
if one table serves both ends (total-tied), and N = nonembedding + table. The as-is units convert nothing. The column
N_convention keeps which it was: "multiplying", "total", "nonembedding" or "as given". Norm gains (below 0.1 %) are not
subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scaling.runs.cells import describe_mistakes
from scaling.runs.table import COUNT_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

SCALE_UNITS = {"thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}
COLUMN_UNITS: dict[str, tuple[str, ...]] = {
    "N": ("multiplying", "total", "total-tied", "nonembedding", "total-as-is", "nonembedding-as-is"),
    "D": ("tokens", "sequences", "steps"),
    "batch_tokens": ("tokens", "sequences"),
    "loss": ("nats", "bits", "perplexity", "bits-per-byte", "bpb"),
    "seconds": ("seconds", "minutes", "hours"),
}


def find_unit_mistakes(name: str, units: Sequence[str], text: str) -> list[str]:
    """Return what is wrong with the units of a column, one line per mistake.

    Args:
        name: The column of the run table.
        units: The units that were given.
        text: The mapping as the user wrote it, such as "tokens:billions".
    """
    scales = list(SCALE_UNITS) if name in COUNT_COLUMNS else []
    others = list(COLUMN_UNITS.get(name, ()))
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


def convert_units(table: pd.DataFrame, units: Mapping[str, Sequence[str]], known: set[tuple[str, Any]]) -> list[str]:
    """Convert all columns to the units of the run table, in place.

    Args:
        table: Numbers as given, and `_used`, which is True for the rows that laws will use.
        units: The units of each column; a column without units is left as it is.
        known: The (column, row) of cells whose mistakes have been reported; new ones are added.

    Returns:
        What is missing or wrong, one line each.
    """
    problems: list[str] = []

    def multiply(name: str, other: str, unit: str) -> None:
        if other not in table:
            problems.append(f"{name} in {unit} needs {other}: map it, or set {other}=NUMBER for all rows")
            return
        is_missing = table[other].isna() & table[name].notna() & table["_used"]
        problems.extend(
            describe_mistakes(other, dict.fromkeys(table.index[is_missing]), f"a number, to read {name} in {unit}")
        )
        known.update((name, row) for row in table.index[is_missing])
        table[name] = table[name] * table[other]

    for name in COUNT_COLUMNS:
        for unit in units.get(name, ()):
            table[name] = table[name] * SCALE_UNITS.get(unit, 1.0)
    if "sequences" in units.get("batch_tokens", ()):
        multiply("batch_tokens", "seq_len", "sequences")
    if "sequences" in units.get("D", ()):
        multiply("D", "seq_len", "sequences")
    if "steps" in units.get("D", ()):
        multiply("D", "batch_tokens", "steps")
    factor = {"minutes": 60.0, "hours": 3600.0, "bits": math.log(2)}
    for name in ("seconds", "loss"):
        for unit in units.get(name, ()):
            table[name] = table[name] * factor.get(unit, 1.0)
    if "perplexity" in units.get("loss", ()):
        below = {row: v for row, v in table["loss"].items() if v <= 0}
        problems += describe_mistakes("loss", below, "a positive perplexity")
        known |= {("loss", row) for row in below}
        table["loss"] = table["loss"].where(table["loss"] > 0).map(math.log)
    if "N" in table:
        problems += _convert_parameters(table, set(units.get("N", ())) - set(SCALE_UNITS), known)
    return problems


def _convert_parameters(table: pd.DataFrame, units: set[str], known: set[tuple[str, Any]]) -> list[str]:
    """Convert N to the parameters that multiply tokens where the units say how, and fill in N_convention, in place."""
    given = table["N"]
    kind = next(iter(units), "as given")
    if "N_convention" not in table:
        table["N_convention"] = kind.removesuffix("-as-is") if kind.endswith("-as-is") or not units else "multiplying"
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
        alternative = "total-tied where one table serves both ends, " if kind == "total" else ""
        return [
            f"N as {kind} needs N_embedding, or vocab and d_model (map or set them); "
            f"or {alternative}or {kind}-as-is to keep the count"
        ]
    table["N"] = given - size if kind == "total" else given + size
    wrong = {row: v for row, v in given[table["N"] <= 0].items() if ("N", row) not in known}
    known |= {("N", row) for row in wrong}
    return describe_mistakes("N", wrong, f"the {kind} parameters of a model with its embedding table")
