"""The envelope of runs (approach 1 of Hoffmann et al., arXiv 2203.15556), and the three approaches side by side."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaling.common.arrays import Array
from scaling.fitting.isoflop import Frontier, Optimum, Trend, fit_isoflop, logs, span
from scaling.fitting.loss_law import Fit, FitError, fit_loss_law
from scaling.laws.formulas import PowerLaw

if TYPE_CHECKING:
    import pandas as pd


def fit_envelope(
    N: ArrayLike,
    D: ArrayLike,
    loss: ArrayLike,
    *,
    C: ArrayLike | None = None,
    run_ids: Sequence[Hashable] | None = None,
    bins: int | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> Frontier:
    """Approach 1: the least loss over runs at each compute, then power laws through the winners' N and D.

    run_ids: rows that share one are points of one curve, interpolated in ln C; else each row is a run of its own and
    the least loss of a bin counts. A bin counts when its winner has both a smaller and a larger N beside it. Intervals
    by bootstrap over runs. FitError below two usable bins.
    """
    n, d, y, c = logs(N, D, loss, C)
    grid, values, at_n, at_d, size = _candidates(n, d, y, c, run_ids, bins)
    runs = len(size)
    (first, points), rng = (
        _winners(grid, values, at_n, at_d, size, np.ones(len(values), bool)),
        np.random.default_rng(seed),
    )
    if first is None:
        raise FitError(
            f"the envelope needs 2 or more computes at which a size between others is best, got fewer from {runs} runs: "
            "add sizes at each compute"
        )
    samples = []
    for _ in range(bootstrap):
        again = _winners(grid, values, at_n, at_d, size, rng.multinomial(runs, np.full(runs, 1 / runs)) > 0)[0]
        if again is not None:
            samples.append(again)
    sizes = len({p.N for p in points if p.status == "ok"})
    doubts = []
    if sizes < 4:
        doubts.append(f"Only {sizes} size(s) ever win: the envelope is coarse.")
    if len(samples) < max(20, bootstrap / 2):
        doubts.append(f"Only {len(samples)} of {bootstrap} resamples have an envelope: intervals are unreliable.")
    good = np.log([p.C for p in points if p.status == "ok"])
    trends = []
    for i in (0, 1):
        spread = np.cov(np.array([s[i] for s in samples]).T) if len(samples) > 2 else np.full((2, 2), np.nan)
        level, exponent = first[i]
        middle = float(grid.mean())
        law = PowerLaw(float(np.exp(level - exponent * middle)), float(exponent))
        trends.append(Trend(law, middle, spread, max(sizes - 2.0, 1.0)))
    return Frontier("envelope", trends[0], trends[1], points, span(good), " ".join(doubts) or "ok")


def law_frontier(fit: Fit, C: ArrayLike) -> Frontier:
    """Approach 3: the optimum of the fitted law (which has C = 6 N D), its intervals by the fit's bootstrap samples.

    C: FLOPs at which intervals are centred. ValueError when the law has no optimum, or without samples.
    """
    at = np.log(np.atleast_1d(np.asarray(C, float)))
    middle = float(at.mean())

    def trend(law_samples: list[tuple[float, float]], law: PowerLaw) -> Trend:
        return Trend(law, middle, np.cov(np.array(law_samples).T), np.inf)

    pairs = []
    for law in fit.samples:
        if law.alpha > 0.01 and law.beta > 0.01 and law.A > 0 and law.B > 0:
            size, tokens = law.optimum(np.exp(middle))
            share = law.beta / (law.alpha + law.beta)
            pairs.append((float(np.log(size)), share, float(np.log(tokens)), 1 - share))
    if len(pairs) < 20:
        raise ValueError(
            f"intervals need 20 or more usable bootstrap samples, got {len(pairs)}: fit with bootstrap=200"
        )
    best = [float(v) for v in fit.law.optimum(np.exp(middle))]
    share = fit.law.beta / (fit.law.alpha + fit.law.beta)
    laws = [PowerLaw(float(v * np.exp(-x * middle)), x) for v, x in zip(best, (share, 1 - share), strict=True)]
    return Frontier(
        "law",
        trend([p[:2] for p in pairs], laws[0]),
        trend([p[2:] for p in pairs], laws[1]),
        (),
        span(at),
        fit.status,
    )


def compare_approaches(
    N: ArrayLike,
    D: ArrayLike,
    loss: ArrayLike,
    *,
    C: ArrayLike | None = None,
    budgets: ArrayLike | None = None,
    run_ids: Sequence[Hashable] | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> dict[str, Frontier | str]:
    """The three approaches by name; a sentence in place of one that these runs do not allow.

    With `run_ids` that repeat (curves), approaches 2 and 3 use each run's last row.
    """
    n, d, y, c = logs(N, D, loss, C)
    last = np.arange(n.size)
    if run_ids is not None:
        _check_ids(run_ids, n.size)
        ends: dict[Hashable, int] = {}
        for i, name in enumerate(run_ids):
            if name not in ends or d[i] > d[ends[name]]:
                ends[name] = i
        last = np.array(sorted(ends.values()))
    size, tokens, losses, compute = (np.exp(v) for v in (n, d, y, c))
    found: dict[str, Frontier | str] = {}
    try:
        found["envelope"] = fit_envelope(
            size, tokens, losses, C=compute, run_ids=run_ids, bootstrap=bootstrap, seed=seed
        )
    except FitError as error:
        found["envelope"] = str(error)
    try:
        found["isoflop"] = fit_isoflop(size[last], tokens[last], losses[last], C=compute[last], budgets=budgets)
    except FitError as error:
        found["isoflop"] = str(error)
    try:
        fit = fit_loss_law(size[last], tokens[last], losses[last], bootstrap=bootstrap, seed=seed)
        found["law"] = law_frontier(fit, compute[last])
    except ValueError as error:  # FitError is one
        found["law"] = str(error)
    return found


def approaches_table(approaches: dict[str, Frontier | str], C: float, mass: float = 0.8) -> pd.DataFrame:
    """One row per approach: exponents and N_opt, D_opt at C FLOPs, each with its interval; status."""
    import pandas as pd

    rows = []
    for name, found in approaches.items():
        row: dict[str, object] = {"approach": name}
        if isinstance(found, Frontier):
            for symbol, trend in (("N", found.N), ("D", found.D)):
                low, high = trend.interval(C, mass)
                row |= {f"{symbol}_exponent": trend.law.exponent}
                row |= dict(
                    zip(
                        (f"{symbol}_exponent_low", f"{symbol}_exponent_high"),
                        trend.exponent_interval(mass),
                        strict=True,
                    )
                )
                row |= {
                    f"{symbol}_opt": float(trend.law(C)),
                    f"{symbol}_opt_low": float(low),
                    f"{symbol}_opt_high": float(high),
                }
        rows.append(row | {"status": found.status if isinstance(found, Frontier) else found})
    return pd.DataFrame(rows)


def _check_ids(run_ids: Sequence[Hashable], rows: int) -> None:
    if len(run_ids) != rows:
        raise ValueError(f"run_ids needs one entry per row, got {len(run_ids)} for {rows} rows")


def _candidates(
    n: Array, d: Array, y: Array, c: Array, run_ids: Sequence[Hashable] | None, bins: int | None
) -> tuple[Array, Array, Array, Array, Array]:
    """Grid of ln C (j,), ln loss, ln N, ln D of every run there (runs, j), inf where a run says nothing; ln N."""
    if bins is not None and bins < 2:
        raise ValueError(f"bins must be 2 or more, got {bins}")
    if run_ids is not None:
        _check_ids(run_ids, n.size)
        names: dict[Hashable, list[int]] = {}
        for i, name in enumerate(run_ids):
            names.setdefault(name, []).append(i)
        curves = [np.array(rows)[np.argsort(c[rows])] for rows in names.values() if len(rows) > 1]
        if len(curves) >= 3:
            grid = np.linspace(c.min(), c.max(), bins or 40)
            shape = (len(curves), grid.size)
            values, at_n, at_d = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
            for i, rows in enumerate(curves):
                inside = (grid >= c[rows[0]]) & (grid <= c[rows[-1]])
                values[i, inside] = np.interp(grid[inside], c[rows], y[rows])
                at_d[i] = np.interp(grid, c[rows], d[rows])
                at_n[i] = n[rows[0]]
            return grid, values, at_n, at_d, at_n[:, 0]
    edges = np.linspace(c.min(), c.max(), (bins or int(np.clip(n.size // 8, 4, 30))) + 1)
    grid = (edges[1:] + edges[:-1]) / 2
    number = np.clip(np.searchsorted(edges, c, side="right") - 1, 0, grid.size - 1)
    values = np.full((n.size, grid.size), np.inf)
    # a bin's runs differ in compute: they are moved to its middle along the trend of the least losses
    least = np.array([[c[number == j][np.argmin(y[number == j])], y[number == j].min()] for j in np.unique(number)])
    slope = float(np.polyfit(least[:, 0], least[:, 1], 1)[0]) if len(least) > 1 else 0.0
    move = grid[number] - c
    rows = np.arange(n.size)
    values[rows, number] = y + slope * move
    at_n, at_d = np.tile(n[:, None], grid.size), np.tile(d[:, None], grid.size)
    at_n[rows, number], at_d[rows, number] = n + 0.5 * move, d + 0.5 * move
    return grid, values, at_n, at_d, n


def _winners(
    grid: Array, values: Array, n: Array, d: Array, size: Array, taken: NDArray[np.bool_]
) -> tuple[tuple[Array, Array] | None, tuple[Optimum, ...]]:
    """Lines (level at the middle of the grid, exponent) through the winners' ln N and ln D; None below two bins."""
    points, at = [], []
    for j in range(grid.size):
        rows = np.flatnonzero(np.isfinite(values[:, j]) & taken)
        if rows.size < 3:
            continue
        best = rows[np.argmin(values[rows, j])]
        edge = not size[rows].min() + 0.05 < size[best] < size[rows].max() - 0.05
        status = "the smallest or largest size wins" if edge else "ok"
        C, N, D, loss = (float(np.exp(v)) for v in (grid[j], n[best, j], d[best, j], values[best, j]))
        points.append(Optimum(C, N, D, loss, np.nan, rows.size, status))
        if not edge:
            at.append((grid[j] - grid.mean(), n[best, j], d[best, j]))
    if len(at) < 2:
        return None, tuple(points)
    x, log_n, log_d = np.array(at).T
    lines = [np.polyfit(x, v, 1)[::-1] for v in (log_n, log_d)]
    return (lines[0], lines[1]), tuple(points)
