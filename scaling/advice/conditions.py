"""Find runs that differ in more than N, D, learning rate and batch, and the column that tells them apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from shlex import quote
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaling.advice.subsets import format_value
from scaling.advice.table_fits import TableFits
from scaling.common.arrays import Array
from scaling.fitting.groups import group_runs
from scaling.runs.table import COLUMNS

# Columns of a run table that may be a condition of a run. The others are its size, its settings, or its outcome.
CONDITION_COLUMNS = ("parametrization", "data_sha256", "seq_len", "vocab", "arm")
# Words in the name of a column that holds an outcome or the length of a run, whatever a table calls it.
OTHER_WORDS = frozenset({
    "loss", "losses", "ppl", "perplexity", "bpb", "bpc", "nll", "acc", "accuracy", "error", "score", "time",
    "seconds", "hours", "step", "steps", "iteration", "iterations", "epoch", "flops", "flop", "flos", "compute",
    "budget", "tokens", "params", "parameters", "memory", "tflops", "mfu", "grad", "norm",
})  # fmt: skip
# How an empty cell is shown.
EMPTY = "(empty)"
# Between the values of two columns, and how many columns are tried in pairs: those that explain most alone.
PAIR, MOST_PAIRED = " and ", 6
# Values of a column that names conditions: at most so many, and at most so many per run.
MAX_LEVELS, MAX_LEVELS_PER_RUN = 30, 0.5
MAX_NUMBERS = 12
# Runs alike that differ by less than this (sd of ln loss) are not worth a word, and with this much they are, even if
# no column explains it. Repeated runs of published sweeps differ by 0.1 to 1 %.
NOTABLE_SCATTER, UNEXPLAINED_SCATTER = 0.005, 0.03
# A column is named if it explains this share of the variance, more than chance does with this probability.
NOTABLE_SHARE, CHANCE, SHUFFLES = 0.5, 0.01, 200
# Degrees of freedom that runs alike need; with fewer, the distances to the law are used instead.
MIN_FREEDOM = 4
# Between the conditions with the lowest and the highest loss, a ratio from which one law for all is not trusted.
SERIOUS_SPREAD = 0.03


@dataclass(frozen=True)
class MixedConditions:
    """Runs that differ in something that laws do not know.

    Attributes:
        scatter: Sd of ln loss between runs alike, or around the law.
        column: The column that explains it; None if no column does.
        share: The share of the variance that the column explains.
        levels: Values of the column, from the lowest loss to the highest.
        excess: By which ratio the loss of each is above the lowest, less 1.
        runs: Number of runs that were compared.
        alike_in: What the compared runs are alike in, such as "N, D, lr and batch"; empty if they were compared with
            the law.
        second: A second column, where only two together explain it; `levels` are those of the pair.
    """

    scatter: float
    column: str | None
    share: float
    levels: tuple[str, ...]
    excess: tuple[float, ...]
    runs: int
    alike_in: str
    second: str = ""

    @property
    def serious(self) -> bool:
        """Whether one law for all of them should not be trusted."""
        return self.scatter > SERIOUS_SPREAD if self.column is None else self.excess[-1] > SERIOUS_SPREAD

    def __str__(self) -> str:
        if self.column is None:
            return (
                f"{self._describe_scatter()}, and no column of the table explains it: do all of them have the same "
                "data, model and optimizer?"
            )
        if self.second:
            return f"{self._describe_scatter()}, and {self._describe_pair()} of that. {self._advise()}"
        values = [self.levels[0]]
        values += [f"{level} {100 * above:+.2g} %" for level, above in zip(self.levels, self.excess, strict=True)][1:]
        if len(values) > 4:
            values = [*values[:2], "...", values[-1]]
        return (
            f"{self._describe_scatter()}, and the column {self.column} explains {self._format_share()} of that "
            f"({', '.join(values)}). {self._advise()}"
        )

    @property
    def short(self) -> str:
        """The same in at most two lines of a terminal."""
        if self.column is None:
            return f"{self._describe_scatter()}, and no column of the table explains it."
        if self.second:
            return f"{self._describe_scatter()}; {self._describe_pair()} of that. {self._advise()}"
        return f"{self._describe_scatter()}; {self.column} explains {self._format_share()} of that. {self._advise()}"

    def _describe_scatter(self) -> str:
        what = f"Runs alike in {self.alike_in} differ" if self.alike_in else "Runs differ from the laws"
        return f"{what} by {100 * self.scatter:.2g} % (sd)"

    def _describe_pair(self) -> str:
        return f"the columns {self.column} and {self.second} together explain {self._format_share()}"

    def _format_share(self) -> str:
        return f"{100 * min(self.share, 0.99):.0f} %"

    def _advise(self) -> str:
        if self.second:
            value = f"{self.column}={self.levels[0].partition(PAIR)[0].removeprefix(EMPTY)}"
            return f"Use --where {quote(value)} --by {quote(self.second)}."
        value = f"{self.column}={self.levels[0].removeprefix(EMPTY)}"
        return f"Use --where {quote(value)} or --by {quote(str(self.column))}."


def find_mixed_conditions(fits: TableFits) -> MixedConditions | None:
    """Find out whether runs differ in something that the laws do not know, and which column tells them apart.

    Runs are compared with those of equal N, D, lr and batch. In a table with few of these, their distances to the
    fitted law are compared instead.

    Args:
        fits: The laws of the table.

    Returns:
        What they differ in; None if nothing is worth a word.
    """
    runs = fits.used
    alike = _number_alike_runs(runs)
    shared = ["N", "D", *(word for name, word in (("lr", "lr"), ("batch_tokens", "batch")) if name in runs)]
    alike_in = f"{', '.join(shared[:-1])} and {shared[-1]}"
    residual, freedom = _subtract_means(np.log(runs["loss"].to_numpy(float)), alike)
    is_alike = freedom >= MIN_FREEDOM
    if not is_alike:
        distances = _compute_distances(fits)
        if distances is None:
            return None
        runs, residual = distances
        alike, freedom = np.zeros(len(runs), np.intp), len(runs) - 6
        if freedom < MIN_FREEDOM:
            return None
        residual = residual - residual.mean()
    scatter = float(np.sqrt(np.sum(residual**2) / freedom))
    if scatter < NOTABLE_SCATTER:
        return None
    found: MixedConditions | None = None
    shares: dict[str, float] = {}
    for column in _list_condition_columns(runs):
        # Where runs are compared with the law, a column that follows N only shows where the law does not fit.
        if not is_alike and runs.groupby("N")[column].nunique(dropna=False).max() < 2:
            continue
        levels, effect, share = _explain(residual, alike, runs[column], freedom)
        shares[column] = share
        if share < NOTABLE_SHARE or (found is not None and share <= found.share):
            continue
        names, excess = _sort_levels(levels, effect)
        compared = int((residual != 0).sum())
        found = MixedConditions(scatter, column, share, names, excess, compared, alike_in if is_alike else "")
    if found is None and is_alike and scatter > UNEXPLAINED_SCATTER:
        found = _explain_by_pair(runs, residual, alike, freedom, shares)
    if found is not None and found.second:
        return replace(found, scatter=scatter, alike_in=alike_in)
    if found is None and is_alike and scatter > UNEXPLAINED_SCATTER:
        return MixedConditions(scatter, None, 0.0, (), (), int((residual != 0).sum()), alike_in)
    return found


def _explain_by_pair(
    runs: pd.DataFrame, residual: Array, alike: NDArray[np.intp], freedom: int, shares: Mapping[str, float]
) -> MixedConditions | None:
    """Return the two columns that together explain how runs alike differ; None if no two do.

    Runs that were trained on several corpora and evaluated on several others need two, for example.
    """
    # Of columns that explain as much, one of names says more than one of numbers.
    best = sorted(shares, key=lambda c: (-round(shares[c], 6), pd.api.types.is_numeric_dtype(runs[c])))[:MOST_PAIRED]
    found: MixedConditions | None = None
    for first, second in combinations(best, 2):
        texts = [runs[c].astype(object).where(runs[c].notna(), EMPTY).map(format_value) for c in (first, second)]
        both = texts[0] + PAIR + texts[1]
        if both.nunique() > MAX_LEVELS:
            continue
        levels, effect, share = _explain(residual, alike, both, freedom)
        if share < NOTABLE_SHARE or (found is not None and share <= found.share):
            continue
        names, excess = _sort_levels(levels, effect)
        found = MixedConditions(0.0, first, share, names, excess, int((residual != 0).sum()), "", second)
    return found


def _sort_levels(levels: Sequence[object], effect: Array) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the levels from the lowest loss to the highest, and by which ratio each is above the lowest, less 1."""
    order = np.argsort(effect)
    excess = np.expm1(effect[order] - effect[order[0]])
    return tuple(str(levels[i]) for i in order), tuple(float(v) for v in excess)


def _number_alike_runs(runs: pd.DataFrame) -> NDArray[np.intp]:
    """Number the groups of runs that are alike in N, D and, where the table has them, learning rate and batch."""
    groups = group_runs(runs["N"].to_numpy(float), runs["D"].to_numpy(float)).of
    settings = [np.round(np.log(runs[c].to_numpy(float)), 2) for c in ("lr", "batch_tokens") if c in runs]
    table = np.column_stack([groups.astype(float), *settings])
    return np.asarray(np.unique(np.nan_to_num(table, nan=-1e9), axis=0, return_inverse=True)[1]).ravel()


def _subtract_means(y: Array, group: NDArray[np.intp]) -> tuple[Array, int]:
    """Return the distances to the mean of each group, and their degrees of freedom."""
    counts = np.bincount(group)
    means = np.bincount(group, y) / counts
    return y - means[group], int(y.size - counts.size)


def _compute_distances(fits: TableFits) -> tuple[pd.DataFrame, Array] | None:
    """Return runs and ln(loss / what the laws predict with their settings); None without a loss law."""
    if fits.loss is None:
        return None
    runs = fits.used if fits.hp is None else fits.hp.used
    N, D, loss = runs[["N", "D", "loss"]].to_numpy(float).T
    predicted = np.log(fits.loss.fit.law(N, D))
    if fits.hp is not None and fits.loss.source == "minima":
        lr, batch = runs[["lr", "batch_tokens"]].to_numpy(float).T
        predicted = predicted + fits.hp.height(lr, batch, N, D)
    return runs, np.log(loss) - predicted


def _list_condition_columns(runs: pd.DataFrame) -> list[str]:
    """Return the columns that may name conditions: few values, and neither a size, a setting nor an outcome."""
    columns = []
    for name in map(str, runs.columns):
        words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
        if name in COLUMNS and name not in CONDITION_COLUMNS:
            continue
        if name not in CONDITION_COLUMNS and words & OTHER_WORDS:
            continue
        levels = runs[name].astype(object).where(runs[name].notna(), "").map(str).nunique()
        most = MAX_NUMBERS if pd.api.types.is_float_dtype(runs[name]) else MAX_LEVELS
        if 2 <= levels <= min(most, max(2, MAX_LEVELS_PER_RUN * len(runs))):
            columns.append(name)
    return columns


def _explain(
    residual: Array, group: NDArray[np.intp], column: pd.Series[Any], freedom: int
) -> tuple[list[object], Array, float]:
    """Return the levels of a column, the effect of each on ln loss, and the share of the variance they explain.

    The share is adjusted for the number of levels, and zero where shuffled levels explain as much.
    """
    code, levels = pd.factorize(column.astype(object).where(column.notna(), EMPTY).map(format_value), sort=True)
    design = np.eye(len(levels))[code]
    # Runs are compared within their group only.
    design = np.column_stack([_subtract_means(x, group)[0] for x in design.T]) if group.any() else design
    design = design - design.mean(0)
    effect = np.linalg.lstsq(design, residual, rcond=1e-9)[0]
    total = float(residual @ residual)
    rank = int(np.linalg.matrix_rank(design, tol=1e-9 * max(1.0, float(np.abs(design).max())) * len(residual)))
    explained = 1 - float(np.sum((residual - design @ effect) ** 2)) / total
    share = 1 - (1 - explained) * freedom / max(freedom - rank, 1)
    if freedom <= rank:
        return list(levels), effect, 0.0
    # What explains too little need not be tested.
    if share < NOTABLE_SHARE:
        return list(levels), effect, share
    rng = np.random.default_rng(0)
    inverse = np.linalg.pinv(design)
    chance = 0
    for _ in range(SHUFFLES):
        shuffled = _shuffle_within(residual, group, rng)
        chance += bool(1 - np.sum((shuffled - design @ (inverse @ shuffled)) ** 2) / total >= explained - 1e-12)
    return list(levels), effect, share if (chance + 1) / (SHUFFLES + 1) <= CHANCE else 0.0


def _shuffle_within(values: Array, group: NDArray[np.intp], rng: np.random.Generator) -> Array:
    """Return the values shuffled among the members of each group."""
    order = np.lexsort((rng.random(values.size), group))
    out = np.empty_like(values)
    out[np.argsort(group, kind="stable")] = values[order]
    return out
