"""Guess how a source can be read: which column is which, in what units, and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from scaling.common.quantities import format_count
from scaling.runs.cells import parse_numbers
from scaling.runs.columns import BLANKS, Candidate, quote, rank_candidates, split_column
from scaling.runs.units import guess_scale
from scaling.runs.vocabulary import split_words

if TYPE_CHECKING:
    import pandas as pd

# The columns that a guess covers, in the order of the command.
GUESSED_COLUMNS = ("N", "D", "loss", "lr", "batch_tokens", "seq_len", "run_id")

# Optional columns without which a source is tried.
LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("run_id",), ("run_id", "lr"), ("run_id", "lr", "batch_tokens"))


# Names of columns that say how large a model is.
SHAPE_NAMES = frozenset(
    {"d_model", "dim", "model_dim", "embed_dim", "n_embd", "hidden_size", "hidden_dim", "width", "emb_dim", "d_emb"}
    | {"n_layer", "n_layers", "num_layers", "layers", "num_hidden_layers", "depth", "nlayers", "num_blocks"}
)
# A column of learning rates or batches is passed over for another if it has values in fewer of the usable rows.
LEAST_FILLED = 0.5
# A size or loss with values in so small a share of the rows of another comes after it.
SPARSE = 0.25
# A rate that is lower than another by this factor in every row is that at the end of a decay.
LEAST_DECAY = 1.5
# Words of a column that may hold the peak of that rate. Others are rates of other parameters.
PEAK_WORDS = frozenset({"lr", "learning", "rate", "learningrate", "peak", "max", "initial", "init", "base"})


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
    ranked |= {name: _demote_sparse(ranked[name]) for name in ("N", "loss")}
    # Optional columns that make the source unreadable are left out, and other columns are tried for required ones.
    ways = product([*ranked["loss"][:3], None], [*ranked["D"][:3], None], [*ranked["N"][:2], None], LEFT_OUT)
    for loss, tokens, size, left_out in ways:
        if loss is None and "loss" not in mapping and "loss" not in constants:
            continue
        required = {"loss": loss, "D": tokens, "N": size}
        found = {n: c for n, c in required.items() if c is not None}
        chosen = {n: c[0] for n, c in ranked.items() if c and n not in (*left_out, *required)}
        chosen |= {n: _prefer_filled(ranked[n], found.values()) for n in ("lr", "batch_tokens") if n in chosen}
        if "lr" in chosen:
            chosen["lr"] = _prefer_peak(chosen["lr"], ranked["lr"])
        chosen |= found
        # An empty text leaves out a column that has the right name.
        empty = {n: "" for n in left_out if n in raw.columns and n not in mapping and n not in constants}
        guess = _complete_guess(raw, chosen, {**mapping, **empty}, constants, ranked, run_name)
        filled = guess.constants | {name: BLANKS[name][1] for name in guess.blanks}
        if try_mapping(guess.mapping, filled):
            return guess
    return None


def _demote_sparse(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates with those last, of equal kind, that have values in far fewer rows than the fullest."""
    counts = [int(c.numbers.notna().sum()) if c.numbers is not None else 0 for c in candidates]
    fullest: dict[int, int] = {}
    for candidate, count in zip(candidates, counts, strict=True):
        fullest[candidate.rank[0]] = max(count, fullest.get(candidate.rank[0], 0))
    is_sparse = [n < SPARSE * fullest[c.rank[0]] for c, n in zip(candidates, counts, strict=True)]
    order = sorted(range(len(candidates)), key=lambda i: (candidates[i].rank[0], is_sparse[i], i))
    return [candidates[i] for i in order]


def _prefer_filled(candidates: Sequence[Candidate], required: Iterable[Candidate]) -> Candidate:
    """Return the best candidate, or the next one that has values in many more of the rows that a law can use.

    A folder of runs may hold a table that has a column `lr` and no tokens beside runs that have `config.lr`.
    """
    import pandas as pd

    columns = [c.numbers.notna() for c in required if c.numbers is not None]
    is_usable = pd.concat(columns, axis=1).all(axis=1) if columns else None
    if is_usable is None or not is_usable.any():
        return candidates[0]
    shares = [float(c.numbers[is_usable].notna().mean()) if c.numbers is not None else 1.0 for c in candidates]
    if shares[0] >= LEAST_FILLED:
        return candidates[0]
    return next((c for c, share in zip(candidates, shares, strict=True) if share > 2 * shares[0]), candidates[0])


def _prefer_peak(chosen: Candidate, candidates: Sequence[Candidate]) -> Candidate:
    """Return the column of learning rates that holds the peak rather than `chosen`, if that is lower in all rows.

    A tracker keeps the last rate that was logged, which is that at the end of a decay, beside the setting.
    """
    if chosen.numbers is None:
        return chosen
    for other in candidates:
        if (
            other.column == chosen.column
            or other.numbers is None
            or not set(split_words(other.column)[-1]) <= PEAK_WORDS
        ):
            continue
        both = chosen.numbers.gt(0) & other.numbers.gt(0)
        # A rate that changes from row to row is logged along a run, and its own maximum is the peak.
        if not both.any() or both.sum() < chosen.numbers.gt(0).sum():
            continue
        ratio = (other.numbers / chosen.numbers)[both]
        if float(ratio.min()) >= LEAST_DECAY:
            return other
    return chosen


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
    if "N" in blanks and (shape := _find_shape(raw)):
        reasons.append(
            f"{shape}, so the runs differ in N: add the parameters of each to the source as n_params, or keep the "
            "runs of one size"
        )
    return Guess(
        {**mapping, **new},
        values,
        reasons,
        {n: BLANKS[n][0] for n in blanks},
        bool(new or blanks or notes or not all(mapping.values())),
    )


def _find_shape(raw: pd.DataFrame) -> str:
    """Return that a column of the shape of models differs from run to run, with its range; empty if none does."""
    for column in map(str, raw.columns):
        parts = split_words(column)
        if parts and "_".join(parts[-1]) in SHAPE_NAMES:
            numbers, wrong = parse_numbers(raw[column])
            if not wrong and numbers.nunique() > 1:
                return f"{column} is {numbers.min():g} to {numbers.max():g}"
    return ""


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
