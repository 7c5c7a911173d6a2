"""Mark the rows of an imported table: which are the ends of runs, and why laws leave out the others.

No row is dropped. The column `excluded` says why laws do not use a row, and `final` which rows end their run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.runs.cells import describe_mistakes, is_empty, parse_flags, parse_numbers
from scaling.runs.columns import Findings, Plan, has_state_name
from scaling.runs.table import map_cells
from scaling.runs.vocabulary import (
    DIVERGED_STATES,
    FINISHED_STATES,
    NUMBERED_STATES,
    SHORT_STATES,
    UNFINISHED_STATES,
    split_words,
)

if TYPE_CHECKING:
    import pandas as pd

NO_LOSS = "no loss in this row"
NO_TOKENS = "no tokens yet"
NO_RESULT = "no result: no loss"
COPY = "a copy of another row"
ON_THE_WAY = "not final: a point on the way of its run"
SUPERSEDED = "superseded: the run was resumed before this point"
# Rows with these reasons are no runs of their own.
NOT_RUNS = (NO_LOSS, NO_TOKENS, COPY, ON_THE_WAY, SUPERSEDED)
# Words of columns that number or date rows, and so differ between two exports of one run.
ROW_WORDS = frozenset({"index", "unnamed", "id", "uuid", "name", "run", "number", "row", "time", "timestamp", "date"})
# Rows that differ in nothing but such columns are copies only if there are so many of them.
LEAST_COPIES, LEAST_SHARE_OF_COPIES = 3, 0.2
# Words of a column that says how much of a run is done, together with one of what it counts, and words of columns that
# say something else.
SHARE_WORDS = frozenset({"fraction", "frac", "portion", "progress", "percent", "percentage", "pct", "completion"})
WORK_WORDS = frozenset({"step", "steps", "iter", "iters", "iteration", "iterations", "epoch", "epochs", "tokens"})
COUNTED_WORDS = WORK_WORDS - {"tokens"} | {"run", "elapsed", "done", "complete", "completed", "schedule"}
# "training progress" is one, and "train fraction" a share of the data.
PROGRESS_NAMES = (["progress"], ["training", "progress"], ["train", "progress"])
OTHER_SHARE_WORDS = frozenset(
    {"warmup", "decay", "cooldown", "val", "eval", "test", "data", "mask", "lr", "learning", "dropout", "sample"}
)
# Words before what is counted up to now, and before its whole.
DONE_WORDS, WHOLE_WORDS = ("current", "completed", "elapsed", "done"), ("total", "max", "planned", "target")
# A run with at least this share done has ended, and the share of one that went on for longer.
WHOLE, LONGEST = 0.998, 1.1
# A learning rate that changes less along a run is constant.
LR_TOLERANCE = 1e-6


def read_states(
    raw: pd.DataFrame, plan: Plan, mapping: Any, has_loss: pd.Series[Any], findings: Findings
) -> pd.Series[Any]:
    """Return the state of the run of each row in lower case, empty where the source does not have it.

    Args:
        raw: The cells of the source.
        plan: The source's column of each column of the run table.
        mapping: The mapping as the user gave it. An empty text for "state" reads no states.
        has_loss: Whether each row has a finite loss, which tells what numbered states mean.
        findings: Receives remarks, and states that are not known.
    """
    import pandas as pd

    none = pd.Series("", raw.index, dtype=object)
    if "state" in mapping and not mapping["state"]:
        return none
    used = {column for column, _ in plan.values()}
    named = [c for c in map(str, raw.columns) if has_state_name(c) and c not in used]
    column = plan["state"][0] if "state" in plan else next(iter(sorted(named, key=len)), None)
    if column is None:
        return none
    texts = pd.Series(map_cells(raw[column], lambda v: "" if is_empty(v) else str(v).strip()), raw.index, dtype=object)
    unique = {text: normalize_state(text) for text in texts.unique()}
    known = {*FINISHED_STATES, *UNFINISHED_STATES, *DIVERGED_STATES, ""}
    words = set(unique.values()) - {""}
    if words and words <= set(SHORT_STATES):
        unique = {text: SHORT_STATES.get(state, "") for text, state in unique.items()}
    elif words and all(re.fullmatch(r"\d(\.0)?", word) for word in words):
        coding = _find_coding({w.removesuffix(".0") for w in words}, texts, has_loss)
        if coding:
            findings.remarks.append(f"column {column} holds {coding}'s numbers of states")
        codes = NUMBERED_STATES.get(coding, {})
        unique = {text: codes.get(state.removesuffix(".0"), state) for text, state in unique.items()}
    states = texts.map(unique)
    is_known = states.isin(known)
    if "state" not in plan and not (is_known & states.ne("")).any():
        if states.ne("").any():
            findings.remarks.append(
                f"column {column} is not read as the state of runs: it holds {texts[texts.ne('')].iloc[0]!r}"
            )
        return none
    if column != "state":
        findings.remarks.append(f"column {column} says which runs have finished")
    needed = "the state of a run, such as finished, complete, running, failed, killed or pruned"
    mistakes = describe_mistakes(column, texts[~is_known].to_dict(), needed)
    if mistakes:
        mistakes.append(f"column {column}: to read no states at all: --map state=")
    findings.problems += mistakes
    return states


def normalize_state(text: str) -> str:
    """Return a state in lower case, without the name of its enumeration and what follows it.

    "TrialState.PRUNED", "CANCELLED by 1000" and "Early-Stopped" become pruned, cancelled and early_stopped.
    """
    state = re.sub(r"^<?\w+\.(?=[A-Za-z])", "", text.strip())
    state = re.split(r"[:(>+]| by ", state)[0].strip().lower()
    return re.sub(r"[\s-]+", "_", state).rstrip("!.")


def mark_copies(raw: pd.DataFrame, table: pd.DataFrame, findings: Findings) -> pd.Series[Any]:
    """Return which rows repeat an earlier one.

    Rows are copies if all their cells are equal, but for an index. If they also differ in names or dates, they are
    copies if they are many, since two seeds may have equal losses by chance.

    Args:
        raw: The cells of the source.
        table: Its numbers.
        findings: Receives a remark.
    """
    import pandas as pd

    is_copy = pd.Series(False, raw.index)
    numbers = [n for n in ("N", "D", "loss", "lr", "batch_tokens") if n in table]
    is_finite = np.isfinite(table["loss"])
    may_be = (table.duplicated(numbers, keep=False) & is_finite).to_numpy()
    if "role" in table or not may_be.any():
        return is_copy
    rows = raw.loc[may_be].astype(str)
    index = [c for c in rows.columns if _is_index(str(c))]
    is_equal = rows.drop(columns=index).duplicated()
    is_copy[may_be] = is_equal.to_numpy()
    count, least = int(is_copy.sum()), max(LEAST_COPIES, LEAST_SHARE_OF_COPIES * len(raw))
    if not count:
        labels = [c for c in rows.columns if _labels_rows(str(c))]
        digits = table.loc[may_be, "loss"].map(lambda v: len(f"{v:.10g}".replace(".", "")))
        is_equal = rows.drop(columns=labels).duplicated() & (digits.median() >= 5)
        if labels and int(is_equal.sum()) >= least:
            is_copy[may_be] = is_equal.to_numpy()
            count = int(is_copy.sum())
    if count:
        rows_are, copies = ("row is", "a copy") if count == 1 else ("rows are", "copies")
        findings.remarks.append(
            f"{count} {rows_are} {copies} of others and no evidence, so laws leave them out. If they are runs of other "
            "seeds, add a column that tells them apart"
        )
    return is_copy


def take_peak_lr(table: pd.DataFrame, is_history: pd.Series[Any], findings: Findings, column: str) -> None:
    """Replace the learning rate of each point of a run by the highest of that run, in place.

    Args:
        table: The numbers, with `run_id` where a run has several rows.
        is_history: The rows of runs that have several.
        findings: Receives a remark.
        column: The source's column, for the remark.
    """
    if "lr" not in table:
        return
    is_zero = table["lr"].eq(0)
    if is_history.any():
        rates = table["lr"].where(is_history)
        groups = rates.groupby(table["run_id"])
        highest, lowest = groups.transform("max"), groups.transform("min")
        changes = is_history & (highest > lowest * (1 + LR_TOLERANCE))
        runs = table["run_id"][changes].nunique()
        if runs:
            table["lr"] = table["lr"].mask(changes, highest)
            findings.remarks.append(
                f"{column} changes along {runs} run{'s' if runs > 1 else ''}, "
                f"such as {table['run_id'][changes].iloc[0]}: lr is the highest of each run, its peak if the "
                "log begins early enough"
            )
        is_zero = table["lr"].eq(0)
    if is_zero.any():
        table["lr"] = table["lr"].mask(is_zero)
        findings.remarks.append(
            f"{column} is 0 in {int(is_zero.sum())} rows, as at the end of a decay: these have no lr, since laws "
            "need the peak"
        )


def find_history(table: pd.DataFrame, is_copy: pd.Series[Any]) -> pd.Series[Any]:
    """Return which rows belong to runs that have several rows, without copies."""
    import pandas as pd

    if "run_id" not in table or "rung" in table or "final" in table:
        return pd.Series(False, table.index)
    run = table["run_id"]
    return run.where(~is_copy).duplicated(keep=False) & run.ne("") & run.notna() & table["D"].notna() & ~is_copy


def find_parts(
    raw: pd.DataFrame, table: pd.DataFrame, is_history: pd.Series[Any], findings: Findings
) -> pd.Series[Any]:
    """Return which rows are points on the way of a run by a column that says how much of the run is done.

    Such a column is called `step_fraction` or `progress`, or is a pair such as `current_steps` and `total_steps`. It is
    read only if some runs of the table have ended.

    Args:
        raw: The cells of the source.
        table: Its numbers.
        is_history: The rows of runs that have several, whose ends are known.
        findings: Receives a remark.
    """
    import pandas as pd

    none = pd.Series(False, table.index)
    if "final" in table or "rung" in table:
        return none
    for name, share in _list_shares(raw):
        is_part: pd.Series[Any] = share.lt(WHOLE) & ~is_history & np.isfinite(table["loss"])
        if is_part.any():
            findings.remarks.append(
                f"{int(is_part.sum())} rows are points on the way of a run by {name}, and laws need its end "
                "(--set final=true takes every row as an end)"
            )
            return is_part
    return none


def _list_shares(raw: pd.DataFrame) -> Iterator[tuple[str, pd.Series[Any]]]:
    """Yield (name, share) for the columns that say which share of a run is done, where it is 1 for some runs."""
    words = {c: [w for part in split_words(c) for w in part] for c in map(str, raw.columns)}
    by_words = {tuple(w): c for c, w in words.items()}
    for column, own in words.items():
        shares = []
        is_share = set(own) & SHARE_WORDS and (set(own) & COUNTED_WORDS or own in PROGRESS_NAMES)
        if is_share and not set(own) & OTHER_SHARE_WORDS:
            numbers, wrong = parse_numbers(raw[column])
            if not wrong:
                shares.append((column, numbers / (100.0 if numbers.max() > 1.5 else 1.0)))
        if len(own) == 2 and own[0] in DONE_WORDS and own[1] in WORK_WORDS:
            whole = next((by_words[w, *own[1:]] for w in WHOLE_WORDS if (w, *own[1:]) in by_words), None)
            if whole is not None:
                (done, wrong), (total, also_wrong) = parse_numbers(raw[column]), parse_numbers(raw[whole])
                if not wrong and not also_wrong:
                    shares.append((f"{column} and {whole}", done / total.where(total > 0)))
        for name, share in shares:
            if share.ge(0).any() and WHOLE <= float(share.max()) <= LONGEST:
                yield name, share


def mark_rows(
    table: pd.DataFrame,
    state: pd.Series[Any],
    is_copy: pd.Series[Any],
    is_history: pd.Series[Any],
    is_part: pd.Series[Any],
    findings: Findings,
) -> None:
    """Fill in `diverged`, `final` and `excluded` where the table does not have them, in place.

    Args:
        table: The numbers, in the units of the run table, and `_diverged`: whether the loss is written as not finite.
        state: The state of the run of each row, in lower case; empty where unknown.
        is_copy: The rows that repeat others.
        is_history: The rows of runs that have several.
        is_part: The other rows that are points on the way of a run.
        findings: Receives mistakes and remarks.
    """
    import pandas as pd

    is_unfinished = state.isin(UNFINISHED_STATES)
    # A loss of exactly 0 among others is what a program writes before it has measured one.
    is_zero = table["loss"].eq(0) & bool(table["loss"].gt(0).any())
    has_loss = np.isfinite(table["loss"]) & ~is_zero
    is_ended, is_superseded = _find_ends(table, is_history, has_loss, findings)
    is_ended &= ~is_part
    is_diverged_end = is_history & is_ended & ~has_loss
    is_guess = pd.Series(False, table.index)
    if "vocab" in table:
        is_guess = table["loss"] >= np.log(table["vocab"].where(table["vocab"] > 0))
    # A row without a size and a loss is no run, but for example the parent of a sweep.
    is_blank = (table["N"].isna() | table["D"].isna()) & ~has_loss & ~table["_diverged"]
    says_ended = state.isin(FINISHED_STATES)
    default = (
        (table["_diverged"] & ~is_history)
        | is_diverged_end
        | state.isin(DIVERGED_STATES)
        | (~has_loss & says_ended & ~is_blank & ~is_history)
        | (is_guess & ~is_unfinished & is_ended)
    )
    if "diverged" in table:
        table["diverged"], wrong = parse_flags(table["diverged"], default)
        findings.problems += describe_mistakes("diverged", wrong, "true or false")
    else:
        table["diverged"] = default
    reason = table["excluded"].fillna("") if "excluded" in table else pd.Series("", table.index, dtype=object)
    diverged, is_open = table["diverged"], reason.eq("")
    reason = reason.mask(is_open & is_copy, COPY)
    reason = reason.mask(is_open & diverged & ~is_copy, "diverged")
    reason = reason.mask(is_open & diverged & ~has_loss, "diverged: no finite loss")
    reason = reason.mask(is_open & diverged & is_guess & has_loss, "diverged: no better than guessing")
    reason = reason.mask(reason.eq("") & is_superseded, SUPERSEDED)
    reason = reason.mask(reason.eq("") & is_history & ~has_loss & _has_any_loss(table, has_loss), NO_LOSS)
    reason = reason.mask(reason.eq("") & table["D"].eq(0), NO_TOKENS)
    reason = reason.mask(reason.eq("") & (is_history | is_part) & ~is_ended & has_loss, ON_THE_WAY)
    reason = reason.mask(reason.eq("") & is_unfinished, "unfinished (" + state + ")")
    reason = reason.mask(reason.eq("") & is_blank, "no result: neither a loss nor a size")
    reason = reason.mask(reason.eq("") & is_zero, "no result: the loss is 0")
    reason = reason.mask(reason.eq("") & ~has_loss, NO_RESULT)
    reason = _mark_missing_sizes(table, reason, findings)
    default = is_ended & ~is_unfinished & table["D"].ne(0)
    if "final" in table:
        table["final"], wrong = parse_flags(table["final"], default)
        findings.problems += describe_mistakes("final", wrong, "true or false")
    else:
        table["final"] = default
    table["excluded"] = reason.mask(reason.eq("") & ~table["final"], "not final")


def _find_coding(words: set[str], texts: pd.Series[Any], has_loss: pd.Series[Any]) -> str:
    """Return whose numbers of states these are: those under which most rows with a loss have finished."""
    shares = {}
    for program, codes in NUMBERED_STATES.items():
        if words <= set(codes):
            is_finished = texts.str.removesuffix(".0").map(codes).isin(FINISHED_STATES)
            shares[program] = float(is_finished[has_loss].mean()) if has_loss.any() else 0.0
    best = max(shares, key=lambda p: shares[p], default="")
    return best if shares.get(best, 0.0) >= 0.5 else ""


def _is_index(column: str) -> bool:
    """Return whether a column only numbers the rows, as pandas writes it."""
    words = [word for part in split_words(column) for word in part]
    return not words or words[0] in ("index", "unnamed", "row", "level")


def _labels_rows(column: str) -> bool:
    return bool({word for part in split_words(column) for word in part} & ROW_WORDS)


def _has_any_loss(table: pd.DataFrame, has_loss: pd.Series[Any]) -> pd.Series[Any]:
    """Return whether the run of each row has a finite loss in any row."""
    return has_loss.groupby(table["run_id"]).transform("any") if "run_id" in table else has_loss


def _find_ends(
    table: pd.DataFrame, is_history: pd.Series[Any], has_loss: pd.Series[Any], findings: Findings
) -> tuple[pd.Series[Any], pd.Series[Any]]:
    """Return which rows end their run, and which a resumed run repeats later.

    The end of a run is its last row with a loss. If losses that are not finite follow, for longer than ever between two
    losses, the run diverged, and its last row is the end.
    """
    import pandas as pd

    is_ended, is_superseded = ~is_history, pd.Series(False, table.index)
    if not is_history.any():
        return is_ended, is_superseded
    rows = table[is_history]
    with_loss = rows[has_loss[is_history]]
    repeated = with_loss[with_loss.duplicated(["run_id", "D"], keep=False)]
    mistakes: dict[Any, Any] = {}
    doubled = with_loss[with_loss["run_id"].isin(repeated["run_id"].unique())]
    for run, points in doubled.groupby("run_id", sort=False):
        old = _find_superseded(points["D"].to_numpy(float))
        if old is None:
            again = points.index[points.duplicated("D")]
            mistakes |= dict.fromkeys(again, run)
        else:
            is_superseded[points.index[old]] = True
    if mistakes:
        findings.problems += describe_mistakes("run_id", mistakes, "one row per run and number of tokens")
        findings.problems.append(
            "run_id: several runs share a name: map a column that differs from run to run, or none (--map run_id=)"
        )
    if is_superseded.any():
        names = table["run_id"][is_superseded].unique()
        findings.remarks.append(
            f"{len(names)} run{'s were' if len(names) > 1 else ' was'} resumed from an earlier point, such as "
            f"{names[0]}: of {int(is_superseded.sum())} points that stand twice, the later is kept"
        )
    live = with_loss[~is_superseded[with_loss.index]]
    last = live.groupby("run_id")["D"].transform("max")
    is_ended[live.index[live["D"] == last]] = True
    # What follows the last loss, by tokens.
    end = rows["run_id"].map(live.groupby("run_id")["D"].max())
    is_later = (end.isna() | (rows["D"] > end)) & ~has_loss[is_history]
    is_not_finite = is_later & table["_diverged"][is_history]
    doubtful = rows[rows["run_id"].isin(rows["run_id"][is_not_finite].unique())]
    for _, of_run in doubtful.groupby("run_id", sort=False):
        in_order = of_run.sort_values("D", kind="stable")
        trailing, longest = _count_gaps(has_loss[in_order.index].to_numpy())
        # An infinite loss is never a missing one.
        if trailing > longest or np.isinf(in_order["loss"].to_numpy()[-1]):
            is_ended[in_order.index] = False
            is_ended[in_order.index[-1]] = True
    return is_ended, is_superseded


def _count_gaps(has_loss: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return the number of rows after the last loss, and the most rows between two losses or before the first."""
    where = np.flatnonzero(has_loss)
    if not where.size:
        return len(has_loss), 0
    gaps = np.diff(np.concatenate([[-1], where])) - 1
    return len(has_loss) - 1 - int(where[-1]), int(gaps.max())


def _find_superseded(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """Return which points of a run stand again later because it was resumed; None if it was not resumed.

    A resumed run starts again between its first and its last point, and goes on from there.

    Args:
        tokens: The tokens of the points, in the order of the rows.
    """
    steps = np.diff(tokens)
    if (steps == 0).any() or not (steps < 0).any():
        return None
    starts = np.concatenate([[0], np.flatnonzero(steps < 0) + 1])
    if (tokens[starts[1:]] <= tokens[0]).any():
        return None
    old = np.zeros(len(tokens), dtype=bool)
    for start in starts[1:]:
        old[:start] |= tokens[:start] >= tokens[start]
    return old


def _mark_missing_sizes(table: pd.DataFrame, reason: pd.Series[Any], findings: Findings) -> pd.Series[Any]:
    """Return the reasons with those of rows that have a loss and no N or D. If no row has them, it is a mistake."""
    for name, what in (("N", "number of parameters"), ("D", "number of tokens")):
        is_missing = table[name].isna() & reason.eq("")
        missing: Sequence[Any] = [row for row in table.index[is_missing] if (name, row) not in findings.known]
        if not missing or table[name].notna().sum() == 0:
            continue
        reason = reason.mask(is_missing & table.index.isin(missing), f"no {what}")
        shown = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        findings.remarks.append(f"row{'s' if len(missing) > 1 else ''} {shown}: no {what}, so laws leave them out")
    return reason
