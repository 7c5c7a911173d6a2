"""Fit the envelope of runs (approach 1 of Hoffmann et al., arXiv 2203.15556) and compare the three approaches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaling.common.arrays import Array
from scaling.fitting.isoflop import ComputeOptimum, Frontier, Trend, find_range, fit_isoflop, take_logs
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
    """Fit compute-optimal N and D by approach 1 of Hoffmann et al. (arXiv 2203.15556), the envelope of runs.

    Power laws are fitted through N and D of the best run in each bin of compute. A bin is used if both a smaller and a
    larger N were run beside its best one. Intervals come from a bootstrap over runs.

    Args:
        N: Parameters of each row, shape (m,).
        D: Tokens of each row, shape (m,).
        loss: Loss of each row, in nats per token, shape (m,).
        C: Compute of each row in FLOPs, shape (m,). Default: 6 N D.
        run_ids: Rows that share an id are points of one curve, interpolated in ln C. Without ids each row is a run of
            its own, and the least loss of a bin is used.
        bins: Number of bins of ln C. Default: by the number of rows.
        bootstrap: Number of resamples.
        seed: Seed of the bootstrap.

    Returns:
        The trends of N_opt and D_opt with their points.

    Raises:
        FitError: If fewer than two bins are usable.
        ValueError: If a row is not usable.

    Example:
        >>> frontier = fit_envelope(curves["N"], curves["D"], curves["loss"], run_ids=curves["run_id"].tolist())
        >>> frontier.D.interval(1e24)
    """
    n, d, y, c = take_logs(N, D, loss, C)
    grid, values, at_n, at_d, size = _arrange_candidates(n, d, y, c, run_ids, bins)
    runs = len(size)
    first, points = _fit_winners(grid, values, at_n, at_d, size, np.ones(len(values), bool))
    rng = np.random.default_rng(seed)
    if first is None:
        raise FitError(
            "the envelope needs 2 or more compute budgets at which a size between others is best, got fewer from "
            f"{runs} runs: add sizes at each budget"
        )
    samples = []
    for _ in range(bootstrap):
        drawn = rng.multinomial(runs, np.full(runs, 1 / runs)) > 0
        resampled, _ = _fit_winners(grid, values, at_n, at_d, size, drawn)
        if resampled is not None:
            samples.append(resampled)
    sizes = len({p.N for p in points if p.status == "ok"})
    doubts = []
    if sizes < 4:
        doubts.append(f"Only {sizes} size(s) are ever the best: the envelope is coarse.")
    if len(samples) < max(20, bootstrap / 2):
        doubts.append(f"Only {len(samples)} of {bootstrap} resamples have an envelope: the intervals are unreliable.")
    good = np.log([p.C for p in points if p.status == "ok"])
    trends = []
    for i in (0, 1):
        spread = np.cov(np.array([s[i] for s in samples]).T) if len(samples) > 2 else np.full((2, 2), np.nan)
        level, exponent = first[i]
        middle = float(grid.mean())
        law = PowerLaw(float(np.exp(level - exponent * middle)), float(exponent))
        trends.append(Trend(law, middle, spread, max(sizes - 2.0, 1.0)))
    return Frontier("envelope", trends[0], trends[1], points, find_range(good), " ".join(doubts) or "ok")


def make_law_frontier(fit: Fit, C: ArrayLike) -> Frontier:
    """Return compute-optimal N and D by approach 3: the optimum of a fitted loss law with C = 6 N D.

    Args:
        fit: A fit of the loss law with bootstrap samples, from which the intervals come.
        C: Compute in FLOPs at which the intervals are centred, a number or shape (m,).

    Returns:
        The trends of N_opt and D_opt, without points.

    Raises:
        ValueError: If the law has no optimum, or fewer than 20 samples have one.
    """
    log_c = np.log(np.atleast_1d(np.asarray(C, float)))
    middle = float(log_c.mean())

    def make_trend(law_samples: list[tuple[float, float]], law: PowerLaw) -> Trend:
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
        make_trend([p[:2] for p in pairs], laws[0]),
        make_trend([p[2:] for p in pairs], laws[1]),
        (),
        find_range(log_c),
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
    """Fit compute-optimal N and D by the three approaches of Hoffmann et al. (arXiv 2203.15556).

    Args:
        N: Parameters of each row, shape (m,).
        D: Tokens of each row, shape (m,).
        loss: Loss of each row, in nats per token, shape (m,).
        C: Compute of each row in FLOPs, shape (m,). Default: 6 N D.
        budgets: Nominal compute budgets, see `fit_isoflop`.
        run_ids: Ids of runs, see `fit_envelope`. Where they repeat, approaches 2 and 3 use the last row of each run.
        bootstrap: Number of resamples for approaches 1 and 3.
        seed: Seed of the bootstrap.

    Returns:
        The result under "envelope", "isoflop" and "law"; the reason as a sentence in place of a result that these runs
        do not allow.

    Example:
        >>> approaches = compare_approaches(runs["N"], runs["D"], runs["loss"])
        >>> make_approaches_table(approaches, C=1e24)
    """
    n, d, y, c = take_logs(N, D, loss, C)
    last = np.arange(n.size)
    if run_ids is not None:
        _check_run_ids(run_ids, n.size)
        ends: dict[Hashable, int] = {}
        for i, name in enumerate(run_ids):
            if name not in ends or d[i] > d[ends[name]]:
                ends[name] = i
        last = np.array(sorted(ends.values()))
    size, tokens, losses, compute = (np.exp(v) for v in (n, d, y, c))
    results: dict[str, Frontier | str] = {}
    try:
        results["envelope"] = fit_envelope(
            size, tokens, losses, C=compute, run_ids=run_ids, bootstrap=bootstrap, seed=seed
        )
    except FitError as error:
        results["envelope"] = str(error)
    try:
        results["isoflop"] = fit_isoflop(size[last], tokens[last], losses[last], C=compute[last], budgets=budgets)
    except FitError as error:
        results["isoflop"] = str(error)
    try:
        fit = fit_loss_law(size[last], tokens[last], losses[last], bootstrap=bootstrap, seed=seed)
        results["law"] = make_law_frontier(fit, compute[last])
    # FitError is a ValueError.
    except ValueError as error:
        results["law"] = str(error)
    return results


def make_approaches_table(approaches: dict[str, Frontier | str], C: float, mass: float = 0.8) -> pd.DataFrame:
    """Tabulate the approaches, one row each: exponents, N_opt and D_opt at C FLOPs with intervals, and the status."""
    import pandas as pd

    rows = []
    for name, result in approaches.items():
        row: dict[str, object] = {"approach": name}
        if isinstance(result, Frontier):
            for symbol, trend in (("N", result.N), ("D", result.D)):
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
        rows.append(row | {"status": result.status if isinstance(result, Frontier) else result})
    return pd.DataFrame(rows)


def _check_run_ids(run_ids: Sequence[Hashable], rows: int) -> None:
    """Raise ValueError unless there is one id per row."""
    if len(run_ids) != rows:
        raise ValueError(f"run_ids needs one entry per row, got {len(run_ids)} for {rows} rows")


def _arrange_candidates(
    n: Array, d: Array, y: Array, c: Array, run_ids: Sequence[Hashable] | None, bins: int | None
) -> tuple[Array, Array, Array, Array, Array]:
    """Return a grid of ln C (j,); ln loss (inf where there is none), ln N, ln D on it (runs, j); and ln N (runs,)."""
    if bins is not None and bins < 2:
        raise ValueError(f"bins must be 2 or more, got {bins}")
    if run_ids is not None:
        _check_run_ids(run_ids, n.size)
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
    # The runs of a bin differ in compute: they are moved to its middle along the trend of the least losses.
    least = np.array([[c[number == j][np.argmin(y[number == j])], y[number == j].min()] for j in np.unique(number)])
    slope = float(np.polyfit(least[:, 0], least[:, 1], 1)[0]) if len(least) > 1 else 0.0
    shift = grid[number] - c
    rows = np.arange(n.size)
    values[rows, number] = y + slope * shift
    at_n, at_d = np.tile(n[:, None], grid.size), np.tile(d[:, None], grid.size)
    at_n[rows, number], at_d[rows, number] = n + 0.5 * shift, d + 0.5 * shift
    return grid, values, at_n, at_d, n


def _fit_winners(
    grid: Array, values: Array, n: Array, d: Array, size: Array, taken: NDArray[np.bool_]
) -> tuple[tuple[Array, Array] | None, tuple[ComputeOptimum, ...]]:
    """Fit lines (level at the middle of the grid, exponent) to the best runs' ln N and ln D; None below two bins."""
    points, usable = [], []
    for j in range(grid.size):
        rows = np.flatnonzero(np.isfinite(values[:, j]) & taken)
        if rows.size < 3:
            continue
        best = rows[np.argmin(values[rows, j])]
        edge = not size[rows].min() + 0.05 < size[best] < size[rows].max() - 0.05
        status = "the smallest or largest size is the best" if edge else "ok"
        C, N, D, loss = (float(np.exp(v)) for v in (grid[j], n[best, j], d[best, j], values[best, j]))
        points.append(ComputeOptimum(C, N, D, loss, np.nan, rows.size, status))
        if not edge:
            usable.append((grid[j] - grid.mean(), n[best, j], d[best, j]))
    if len(usable) < 2:
        return None, tuple(points)
    x, log_n, log_d = np.array(usable).T
    lines = [np.polyfit(x, v, 1)[::-1] for v in (log_n, log_d)]
    return (lines[0], lines[1]), tuple(points)
