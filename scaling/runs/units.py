"""Convert the units of a run table, and the three ways to count parameters.

| column | units; the first is the default |
|---|---|
| N | as given; multiplying; total; total-tied; nonembedding; total-as-is; nonembedding-as-is |
| D | tokens; sequences (times seq_len); steps (times batch_tokens); per-parameter (times N); flops (over 6 N) |
| batch_tokens | tokens; sequences (times seq_len) |
| loss | nats (per token); bits (per token, times ln 2); perplexity (its logarithm) |
| loss | bits-per-byte (times ln 2 and bytes_per_token); log-likelihood (times -1) |
| seconds | seconds; minutes; hours |
| all counts | also thousands, millions, billions, trillions |

N here counts the parameters that multiply tokens: the unembedding once, no input lookup (docs/math.md §1). One
embedding table has N_embedding, or vocab * d_model, parameters. So N = total - table if there are two tables, N = total
if one table serves both ends (total-tied), and N = nonembedding + table. The as-is units convert nothing. The column
N_convention keeps which it was: "multiplying", "total", "nonembedding" or "as given". Norm gains (below 0.1 %) are not
subtracted.

A name and values that both say another unit are believed, with a remark: a `val_ppl` of 9 to 27 is a perplexity, and
`Params (M)` of 30 to 500 are millions. If only the name says so, the unit has to be given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.runs.cells import describe_mistakes
from scaling.runs.table import COUNT_COLUMNS
from scaling.runs.vocabulary import LOSS_UNIT_WORDS, SCALE_WORDS, find_bracketed, rank_column, split_words

if TYPE_CHECKING:
    import pandas as pd

SCALE_UNITS = {"thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}
COLUMN_UNITS: dict[str, tuple[str, ...]] = {
    "N": ("multiplying", "total", "total-tied", "nonembedding", "total-as-is", "nonembedding-as-is"),
    "D": ("tokens", "sequences", "steps", "per-parameter", "flops"),
    "batch_tokens": ("tokens", "sequences"),
    "loss": ("nats", "bits", "perplexity", "log-likelihood", "bits-per-byte"),
    "seconds": ("seconds", "minutes", "hours"),
}
# What can be mapped or set to convert the loss, and is not kept: bytes per token, and a number added to every loss.
EXTRA_COLUMNS = ("bytes_per_token", "loss_offset")
# A loss in nats per token above this is worse than guessing among 160,000 tokens.
WORST_LOSS_IN_NATS = 12.0
# A model has at least so many parameters, and a run at least so many tokens; smaller numbers are in other units.
SMALLEST_N, SMALLEST_D = 1e4, 1e5


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
        if unit not in scales + others and not (name == "loss" and unit == "bpb"):
            allowed = ", ".join(others + scales) or "none"
            needs = " (which needs bytes_per_token, too)" if name == "loss" else ""
            problems.append(f"{name}={text}: unknown unit {unit!r}; {name} takes {allowed}{needs}")
    for kinds in (scales, [*others, "bpb"]):
        if sum(u in kinds for u in units) > 1:
            problems.append(f"{name}={text}: two units of one kind")
    return problems


def find_loss_unit(column: str) -> str:
    """Return the unit of a loss that a column's name states; empty if it states none."""
    words = [word for part in split_words(column) for word in part]
    texts = {*words, "_".join(words), *find_bracketed(column)}
    texts |= {"_".join(words[i : i + n]) for n in (2, 3) for i in range(len(words))}
    return next((unit for unit, names in LOSS_UNIT_WORDS.items() if texts & names), "")


def settle_loss_unit(
    column: str, units: list[str], loss: pd.Series[Any], *, has_bytes: bool
) -> tuple[list[str], list[str], list[str]]:
    """Return the units of a loss whose mapping states none: as its name and values say.

    Args:
        column: The column of the source.
        units: The units that were given.
        loss: Its numbers, NaN where empty.
        has_bytes: Whether the bytes per token are known.

    Returns:
        (units, remarks, problems). A unit that only the name states is a problem, and so is one that the values
        contradict.
    """
    finite = loss[np.isfinite(loss)]
    if units or finite.empty:
        return units, [], []
    unit, low, high, middle = find_loss_unit(column), float(finite.min()), float(finite.max()), float(finite.median())
    told = f"--map loss={column}:nats if it is not"
    if unit == "perplexity":
        if low >= 1 and middle > 8:
            return (
                [unit],
                [f"{column} is read as perplexity, its logarithm is the loss (loss={column}:perplexity; {told})"],
                [],
            )
        return units, [], [_ask_loss_unit(column, unit, low, high)]
    if unit == "bits":
        if low > 0 and high < WORST_LOSS_IN_NATS / math.log(2):
            return [unit], [f"{column} is read in bits per token, times ln 2 (loss={column}:bits; {told})"], []
        return units, [], [_ask_loss_unit(column, unit, low, high)]
    if unit == "bits-per-byte":
        if has_bytes:
            return [unit], [f"{column} is read in bits per byte, times ln 2 and bytes_per_token ({told})"], []
        return units, [], [explain_bits_per_byte(column)]
    if not unit and low > 0 and middle > WORST_LOSS_IN_NATS:
        remark = (
            f"{column} holds losses of {low:.4g} to {high:.4g}: nats per token above {WORST_LOSS_IN_NATS:g} are worse "
            f"than guessing. If it is a perplexity: --map loss={column}:perplexity"
        )
        return units, [remark], []
    return units, [], []


def explain_bits_per_byte(column: str) -> str:
    """Return what is needed to read bits per byte as a loss."""
    return (
        f"{column} is in bits per byte, which become nats per token by the bytes of one token on that data: add "
        "--set bytes_per_token=NUMBER (about 4.2 for English text and a vocabulary of 50,000; with 1, every loss is in "
        "nats per byte)"
    )


def _ask_loss_unit(column: str, unit: str, low: float, high: float) -> str:
    return (
        f"{column} is named like {unit}, and its values of {low:.4g} to {high:.4g} do not say so: choose "
        f"--map loss={column}:{unit} or --map loss={column}:nats"
    )


def find_scale(column: str) -> str:
    """Return the scale that a column's name states, such as "millions" for "Params (M)"; empty if it states none."""
    brackets = find_bracketed(column)
    words = [word for part in split_words(column, strip=False) for word in part]
    # A single letter is a scale only in parentheses or as the last word.
    named = {w for w in words if len(w) > 1} | set(words[-1:]) if len(words) > 1 else set(words) - set("kmbgt")
    for unit, names in SCALE_WORDS.items():
        if named & names or any(set(re.split(r"[^a-z]+", text)) & names for text in brackets):
            return unit
    return ""


def guess_scale(name: str, column: str, numbers: pd.Series[Any], partner: pd.Series[Any] | None = None) -> str:
    """Return the scale of a count whose numbers are too small to be counts; empty if they are not.

    Args:
        name: "N" or "D".
        column: The column of the source.
        numbers: Its numbers, NaN where empty.
        partner: The numbers of the other of N and D in the same rows, if known. Of two scales that both make sense,
            the one is chosen that trains with the more usual number of tokens per parameter.
    """
    finite = numbers[np.isfinite(numbers) & (numbers > 0)]
    smallest = SMALLEST_N if name == "N" else SMALLEST_D
    if finite.empty or float(finite.max()) >= smallest:
        return ""
    if stated := find_scale(column):
        return stated
    middle = float(finite.median())
    # A model has at most 1e13 parameters, a run at most 1e14 tokens.
    options = {u: f * middle for u, f in SCALE_UNITS.items() if 3e5 <= f * middle <= (3e12 if name == "N" else 1e14)}
    if partner is None or not options:
        if name == "N":
            return "millions" if middle >= 5 else "billions"
        return "billions" if "billions" in options else "millions"
    other = float(partner[np.isfinite(partner) & (partner > 0)].median())
    if not math.isfinite(other):
        return guess_scale(name, column, numbers)

    def judge(option: tuple[str, float]) -> float:
        """Return how unusual the best reading of both numbers is: few parameters, few tokens, or an odd ratio."""
        costs = []
        for factor in (1.0, *SCALE_UNITS.values()):
            N, D = (option[1], other * factor) if name == "N" else (other * factor, option[1])
            if factor == 1.0 and other < (SMALLEST_D if name == "N" else SMALLEST_N):
                continue
            unusual = abs(math.log(D / N / 20)) + 0.05 * math.log(N)
            costs.append(unusual + 2 * (N < 1e6) + 2 * (D < 1e8))
        return min(costs)

    return min(options.items(), key=judge)[0]


def settle_scale(
    name: str, column: str, units: list[str], numbers: pd.Series[Any]
) -> tuple[list[str], list[str], list[str]]:
    """Return the units of N or D with the scale that the column's name states, if the numbers are too small without.

    Args:
        name: "N" or "D".
        column: The column of the source.
        units: The units that were given.
        numbers: Its numbers, NaN where empty.

    Returns:
        (units, remarks, problems).
    """
    finite = numbers[np.isfinite(numbers) & (numbers > 0)]
    if finite.empty or float(finite.max()) >= (SMALLEST_N if name == "N" else SMALLEST_D):
        return units, [], []
    scale = find_scale(column)
    if not scale or set(units) & {*SCALE_UNITS, "steps", "sequences", "per-parameter"}:
        return units, [], []
    text = f"{name}={':'.join([column, *units, scale])}"
    return [*units, scale], [f"{column} is read in {scale} ({text})"], []


def remark_small_counts(table: pd.DataFrame, columns: Mapping[str, tuple[str, Sequence[str]]]) -> list[str]:
    """Return a remark if N and D are too small to be counts, with the options that fix it.

    Args:
        table: N and D of the rows that laws use.
        columns: The source's column and units of each column of the run table.
    """
    parts, options = [], []
    for name, partner, smallest in (("N", "D", SMALLEST_N), ("D", "N", SMALLEST_D)):
        positive = table[name][np.isfinite(table[name]) & (table[name] > 0)]
        if positive.empty or float(positive.max()) >= smallest:
            continue
        column, units = columns.get(name, (name, []))
        scale = guess_scale(name, column, positive, table[partner])
        low, high = float(positive.min()), float(positive.max())
        parts.append(f"{name} is {low:g} to {high:g}" if low < high else f"{name} is {low:g}")
        named = rank_column(name, column)
        if named and named[1] in ("steps", "sequences") and not units:
            options.append(f"--map {name}={column}:{named[1]}")
        elif {"steps", "sequences"} & set(units):
            options.append(f"check {' and '.join(u for u in ('batch_tokens', 'seq_len') if u in table)}")
        elif name in columns:
            options.append(f"--map {name}={':'.join([column, *units, scale])}")
        else:
            options.append(f"--set {name}={low:g}{ {'thousands': 'K'}.get(scale, scale[:1].upper()) }")
    if not parts:
        return []
    return [f"{' and '.join(parts)}: too small for numbers of parameters and tokens? {' '.join(options)}"]


def convert_units(
    table: pd.DataFrame,
    units: Mapping[str, Sequence[str]],
    known: set[tuple[str, Any]],
    remarks: list[str],
) -> list[str]:
    """Convert all columns to the units of the run table, in place.

    Args:
        table: Numbers as given, and `_used`, which is True for the rows that laws will use.
        units: The units of each column; a column without units is left as it is.
        known: The (column, row) of cells whose mistakes have been reported; new ones are added.
        remarks: Receives a line on rows that cannot be converted, whose cells become empty.

    Returns:
        What is missing or wrong, one line each.
    """
    problems: list[str] = []

    def multiply(name: str, other: str, unit: str) -> None:
        if other not in table:
            problems.append(f"{name} in {unit} needs {other}: map it, or set {other}=NUMBER for all rows")
            return
        is_missing = table[other].isna() & table[name].notna() & table["_used"]
        missing = dict.fromkeys(table.index[is_missing])
        if table[other].isna().all():
            problems.extend(describe_mistakes(other, missing, f"a number, to read {name} in {unit}"))
            known.update((name, row) for row in missing)
        elif missing:
            rows = ", ".join(map(str, list(missing)[:5])) + (
                f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            )
            remarks.append(
                f"row{'s' if len(missing) > 1 else ''} {rows}: no {name}, which needs {other} to be read in {unit}"
            )
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
    factor = {"minutes": 60.0, "hours": 3600.0, "bits": math.log(2), "log-likelihood": -1.0}
    for name in ("seconds", "loss"):
        for unit in units.get(name, ()):
            table[name] = table[name] * factor.get(unit, 1.0)
    if "perplexity" in units.get("loss", ()):
        below = {row: v for row, v in table["loss"].items() if v <= 0}
        problems += describe_mistakes("loss", below, "a positive perplexity")
        known |= {("loss", row) for row in below}
        table["loss"] = table["loss"].where(table["loss"] > 0).map(math.log)
    if {"bits-per-byte", "bpb"} & set(units.get("loss", ())):
        if "bytes_per_token" in table:
            multiply("loss", "bytes_per_token", "bits-per-byte")
            table["loss"] = table["loss"] * math.log(2)
        else:
            problems.append(explain_bits_per_byte("loss"))
    if "loss_offset" in table:
        table["loss"] = table["loss"] + table["loss_offset"]
    if "N" in table:
        problems += _convert_parameters(table, set(units.get("N", ())) - set(SCALE_UNITS), known)
        if "per-parameter" in units.get("D", ()):
            multiply("D", "N", "per-parameter")
        if "flops" in units.get("D", ()):
            table["D"] = table["D"] / (6 * table["N"])
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
