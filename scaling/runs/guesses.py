"""Guess how a source can be read: which column is which, in what units, and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from scaling.common.quantities import format_count
from scaling.runs.columns import BLANKS, Candidate, quote, rank_candidates, split_column
from scaling.runs.units import guess_scale

if TYPE_CHECKING:
    import pandas as pd

# The columns that a guess covers, in the order of the command.
GUESSED_COLUMNS = ("N", "D", "loss", "lr", "batch_tokens", "seq_len", "run_id")

# Optional columns without which a source is tried.
LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("run_id",), ("run_id", "lr"), ("run_id", "lr", "batch_tokens"))


@dataclass(frozen=True)
class Guess:
    """How a source can be read.

    Attributes:
        mapping: As `scaling.import_runs` takes it.
        constants: As `scaling.import_runs` takes them.
        reasons: Why each column was chosen, one line each.
        blanks: Numbers that the source does not hold and the user has to give, with what each is.
        is_needed: Whether the source cannot be read as well without the mapping.
    """

    mapping: dict[str, str]
    constants: dict[str, float | str]
    reasons: list[str]
    blanks: dict[str, str]
    is_needed: bool

    def format_options(self) -> str:
        """Return the options of `scaling import` that say the same."""
        options = [f"--map {quote(f'{name}={column}')}" for name, column in self.mapping.items() if column != name]
        options += [f"--set {quote(f'{name}={value}')}" for name, value in self.constants.items()]
        return " ".join(options + [f"--set {name}=NUMBER" for name in self.blanks])


def guess_columns(
    raw: pd.DataFrame,
    mapping: Mapping[str, str],
    constants: Mapping[str, float | str],
    try_mapping: Callable[[dict[str, str], dict[str, float | str]], bool],
    *,
    run_name: str = "run",
) -> Guess | None:
    """Guess how a source can be read, by the names and values of its columns.

    Args:
        raw: The cells of the source.
        mapping: What is mapped already; it is kept.
        constants: What is set already; it is kept.
        try_mapping: Returns whether the source can be read with a mapping and constants. A guess that cannot is not
            returned.
        run_name: The run_id of a source that holds the points of one run.

    Returns:
        The guess; None if the source cannot be read in any way that was tried.
    """
    ranked = {
        name: []
        if name in mapping or name in constants
        else rank_candidates(name, raw, but=[split_column(c, list(raw.columns))[0] for c in mapping.values()])
        for name in GUESSED_COLUMNS
    }
    # Optional columns that make the source unreadable are left out, and other columns are tried for required ones.
    ways = product([*ranked["loss"][:3], None], [*ranked["D"][:3], None], [*ranked["N"][:2], None], LEFT_OUT)
    for loss, tokens, size, left_out in ways:
        if loss is None and "loss" not in mapping and "loss" not in constants:
            continue
        required = {"loss": loss, "D": tokens, "N": size}
        chosen = {n: c[0] for n, c in ranked.items() if c and n not in (*left_out, *required)}
        chosen |= {n: c for n, c in required.items() if c is not None}
        # An empty text leaves out a column that has the right name.
        empty = {n: "" for n in left_out if n in raw.columns and n not in mapping and n not in constants}
        guess = _complete_guess(raw, chosen, {**mapping, **empty}, constants, ranked, run_name)
        filled = guess.constants | {name: BLANKS[name][1] for name in guess.blanks}
        if try_mapping(guess.mapping, filled):
            return guess
    return None


def _complete_guess(
    raw: pd.DataFrame,
    chosen: Mapping[str, Candidate],
    mapping: Mapping[str, str],
    constants: Mapping[str, float | str],
    ranked: Mapping[str, Sequence[Candidate]],
    run_name: str,
) -> Guess:
    """Return a guess from the chosen columns: scales of counts, what batch and D need, and what is missing."""
    chosen = dict(chosen)
    notes: dict[str, str] = {}
    _choose_scales(chosen)
    units = {n: split_column(c, list(raw.columns))[1] for n, c in mapping.items()}
    units |= {n: c.unit.split(":") for n, c in chosen.items()}
    given = {*chosen, *mapping, *constants}
    blanks = [n for n in ("N", "D") if n not in given]
    tokens_need_batch = "steps" in units.get("D", [])
    if tokens_need_batch and "batch_tokens" not in given:
        blanks.append("batch_tokens")
    needs_length = "sequences" in units.get("D", []) or "sequences" in units.get("batch_tokens", [])
    if needs_length and "seq_len" not in given:
        if "sequences" in units.get("D", []) or tokens_need_batch or "batch_tokens" in mapping:
            blanks.append("seq_len")
        else:
            batch = chosen.pop("batch_tokens")
            notes["batch_tokens"] = (
                f"left out: {batch.column} counts sequences, and the source does not say how long they are "
                f"(--map {quote(batch.format_value('batch_tokens'))} --set seq_len=NUMBER)"
            )
    elif not needs_length:
        chosen.pop("seq_len", None)
    if {"bits-per-byte", "bpb"} & set(units.get("loss", [])) and "bytes_per_token" not in given:
        found = rank_candidates("bytes_per_token", raw)
        if found:
            chosen["bytes_per_token"] = found[0]
        else:
            blanks.append("bytes_per_token")
    values: dict[str, float | str] = dict(constants)
    if "run_id" not in given and _is_one_run(chosen, tokens_need_batch):
        values["run_id"] = run_name
        notes["run_id"] = "D grows from row to row, as in the log of one run: only its end is used"
    order = [*GUESSED_COLUMNS, "bytes_per_token"]
    texts = {n: c.format_value(n).partition("=")[2] for n, c in chosen.items()}
    # A column that has its name already needs no mapping.
    new = {n: texts[n] for n in order if texts.get(n, n) != n}
    reasons = [
        f"{n} is {c.column}{_describe_unit(c.unit)}: {_describe(c, ranked.get(n, ()))}"
        for n in order
        if (c := chosen.get(n)) is not None and not (c.column == n and not c.unit and len(ranked.get(n, ())) < 2)
    ]
    reasons += [f"{n} is left out: the rows cannot be read with it" for n, c in mapping.items() if not c]
    reasons += [f"{n}: {text}" for n, text in notes.items()]
    reasons += [f"{n} is not in the source: give {BLANKS[n][0]}" for n in blanks]
    return Guess(
        {**mapping, **new},
        values,
        reasons,
        {n: BLANKS[n][0] for n in blanks},
        bool(new or blanks or notes or not all(mapping.values())),
    )


def _describe(candidate: Candidate, others: Sequence[Candidate]) -> str:
    """Return why a column was chosen, its range, and the other columns that fit."""
    text = candidate.reason
    if candidate.numbers is not None:
        finite = candidate.numbers[np.isfinite(candidate.numbers)]
        low, high = float(finite.min()), float(finite.max())
        shown = _format_number
        text += f"; {shown(low)} to {shown(high)}" if low < high else f"; {shown(low)} in all rows"
    rest = [c.column for c in others if c.column != candidate.column]
    if rest:
        text += f" (not {', '.join(rest[:3])}{f' or {len(rest) - 3} more' if len(rest) > 3 else ''})"
    return text


def _format_number(value: float) -> str:
    if value >= 1e6:
        return format_count(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _describe_unit(unit: str) -> str:
    return f", in {unit.replace(':', ', ')}" if unit and not unit.endswith("-as-is") else ""


def _choose_scales(chosen: dict[str, Candidate]) -> None:
    """Add thousands, millions or billions to the units of N and D where only these make sense, in place."""
    N, D = chosen.get("N"), chosen.get("D")
    for name, candidate in (("N", N), ("D", D)):
        if candidate is None or candidate.numbers is None or (name == "D" and candidate.unit not in ("", "tokens")):
            continue
        partner = (D if name == "N" else N) if D is None or not D.unit else None
        scale = guess_scale(
            name,
            candidate.column,
            candidate.numbers,
            partner.numbers if partner and partner.numbers is not None else None,
        )
        if scale:
            unit = ":".join(u for u in (candidate.unit, scale) if u)
            chosen[name] = Candidate(candidate.column, unit, candidate.reason, candidate.rank, candidate.numbers)


def _is_one_run(chosen: Mapping[str, Candidate], counts_steps: bool) -> bool:
    """Return whether the rows are the points of one run: steps that grow from row to row, at one size and rate."""
    D = chosen.get("D")
    if D is None or D.numbers is None or not counts_steps:
        return False
    tokens = D.numbers.dropna()
    others = [chosen[n].numbers for n in ("N", "batch_tokens") if n in chosen]
    is_constant = all(n is not None and n.dropna().nunique() <= 1 for n in others)
    return bool(len(tokens) > 2 and is_constant and (tokens.diff().dropna() >= 0).all() and tokens.nunique() > 2)
