"""Loss along one run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from scaling.common.arrays import Array

if TYPE_CHECKING:
    import pandas as pd

SLOWEST, FASTEST = 0.02, 3.0  # range of the exponent that is searched


@dataclass(frozen=True)
class CurveLaw:
    """L(t) = E + A t^-alpha, nats per token after t tokens."""

    E: float
    A: float
    alpha: float

    def __call__(self, tokens: ArrayLike) -> Array:
        return np.asarray(self.E + self.A * np.asarray(tokens, float) ** -self.alpha)


@dataclass(frozen=True)
class Curve:
    """A law of one run's loss, with its evidence."""

    law: CurveLaw
    noise: float  # robust sd of the relative residuals
    range: tuple[float, float]  # of tokens
    status: str  # "ok", or what is doubtful

    def predict(self, tokens: ArrayLike) -> Array:
        """Loss after so many tokens, at the same constant rate; a cooldown lies below."""
        return self.law(tokens)


def fit_curve(tokens: ArrayLike, loss: ArrayLike) -> Curve:
    """Fit E + A t^-alpha to the constant-rate trunk of one run (1-d arrays; give no warm-up and no cooldown points).

    Variable projection: given alpha, A and E >= 0 follow from Huber-weighted linear least squares on relative
    residuals, so only alpha is searched. At least 4 points with distinct tokens, ValueError otherwise.
    """
    t, y = read_curve(tokens, loss)
    if np.unique(t).size < 4:
        raise ValueError(
            f"a curve needs at least 4 distinct token counts, got {np.unique(t).size}: evaluate more often"
        )
    scale = float(np.exp(np.mean(np.log(t))))
    x = t / scale
    grid = np.geomspace(SLOWEST, FASTEST, 41)
    # One scale for every alpha, that of the best median residual: else a bad alpha would forgive itself
    noise = max(min(_project(x, y, a, None)[2] for a in grid), 1e-6)
    values = [_project(x, y, a, noise)[2] for a in grid]
    i = int(np.argmin(values))
    bounds = (np.log(grid[max(i - 1, 0)]), np.log(grid[min(i + 1, len(grid) - 1)]))
    found = minimize_scalar(
        lambda log_alpha: _project(x, y, float(np.exp(log_alpha)), noise)[2],
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-7},
    )
    alpha = float(np.exp(found.x)) if found.fun <= values[i] else float(grid[i])
    E, A, _ = _project(x, y, alpha, noise)
    doubts = []
    if A <= 0:
        doubts.append("The loss does not fall along this run.")
    elif alpha < SLOWEST * 1.01 or alpha > FASTEST * 0.99:
        doubts.append(f"alpha = {alpha:.3g} is at the edge of what is searched.")
    elif E <= 0:
        doubts.append(
            "The floor E is 0: this run does not bend yet, so far ahead the curve is too low if there is one."
        )
    law = CurveLaw(E=E, A=A * scale**alpha, alpha=alpha)
    return Curve(law, noise, (float(t.min()), float(t.max())), " ".join(doubts) or "ok")


def tokens_to_reach(tokens: ArrayLike, loss: ArrayLike, level: float) -> float:
    """Tokens at which the measured curve first comes down to `level`; math.inf when it never does.

    The curve is the running minimum, linear in log tokens between points. A first point already at or below the level
    answers with its own tokens.
    """
    t, y = read_curve(tokens, loss)
    lowest = np.minimum.accumulate(y)
    below = np.flatnonzero(lowest <= level)
    if not below.size:
        return math.inf
    i = int(below[0])
    if i == 0:
        return float(t[0])
    share = (lowest[i - 1] - level) / (lowest[i - 1] - lowest[i])
    return float(np.exp(np.log(t[i - 1]) + share * (np.log(t[i]) - np.log(t[i - 1]))))


def annealed_ends(points: pd.DataFrame, *, below: float = 0.2) -> pd.Series[Any]:
    """Which rows of a table of curve points are the final loss of an annealed run; bool, on the table's own index.

    Columns `run_id`, `tokens`, and either `lr` (the rate at that point; `lr_peak`, or else the run's largest lr, is its peak)
    or `schedule` and `D` (tokens that the schedule was made for). With lr: the rate has come down to at most `below` of its
    peak, and the run ends there or its rate rises again (a cooldown branch, after which the trunk goes on). With a
    schedule: the last 0.5 % of D is reached, and the schedule is not "constant". A run of one point is judged by `lr_peak`;
    without it its row is not an end.

    ValueError when a column is missing, or a token count or rate cannot be read.
    """
    import pandas as pd

    by_rate = "lr" in points.columns
    need = ("run_id", "tokens", "lr") if by_rate else ("run_id", "tokens", "schedule", "D")
    if missing := [name for name in need if name not in points.columns]:
        raise ValueError(
            f"needed run_id, tokens and lr, or run_id, tokens, schedule and D; got no {', '.join(missing)}"
        )
    numbers = [
        name for name in ("tokens", "lr", "lr_peak", "D") if name in need or (by_rate and name in points.columns)
    ]
    values = {name: pd.to_numeric(points[name], errors="coerce").to_numpy(float) for name in numbers}
    for name, column in values.items():
        wrong = ~np.isfinite(column) | ((column < 0) if name == "lr" else (column <= 0))
        if wrong.any():
            row = points.index[int(np.argmax(wrong))]
            raise ValueError(
                f"row {row}, column {name}: needed a positive number, got {points[name].iloc[int(np.argmax(wrong))]!r}"
            )
    if not by_rate:
        ended = (values["tokens"] >= 0.995 * values["D"]) & (points["schedule"] != "constant").to_numpy()
        return pd.Series(ended, index=points.index, name="final")
    final = np.zeros(len(points), bool)
    for members in points.reset_index(drop=True).groupby("run_id", sort=False).indices.values():
        rows = np.asarray(members)
        rows = rows[np.argsort(values["tokens"][rows], kind="stable")]
        rate = values["lr"][rows]
        peak = values["lr_peak"][rows] if "lr_peak" in values else np.full(rate.size, rate.max())
        peaked = np.maximum.accumulate(rate) > below * peak  # not before: a warm-up's rate is low, too
        leaves = np.r_[rate[1:] > rate[:-1], True]
        single = rate.size == 1 and "lr_peak" in values
        final[rows] = (rate <= below * peak) & (peaked | single) & leaves
    return pd.Series(final, index=points.index, name="final")


def read_curve(tokens: ArrayLike, loss: ArrayLike) -> tuple[Array, Array]:
    """(tokens, loss), sorted by tokens; points without a finite loss are dropped (a run that broke off), other bad input is refused."""
    t, y = np.asarray(tokens, float), np.asarray(loss, float)
    if t.ndim != 1 or t.shape != y.shape or not t.size:
        raise ValueError(f"tokens and loss must be 1-d and of one length above 0, got shapes {t.shape} and {y.shape}")
    if not np.all(np.isfinite(t) & (t > 0)):
        raise ValueError("tokens must be positive and finite: drop the point before the first step")
    kept = np.isfinite(y)
    if not kept.any() or np.any(y[kept] <= 0):
        raise ValueError("loss must be positive, in nats per token, and finite somewhere")
    t, y = t[kept], y[kept]
    order = np.argsort(t, kind="stable")
    return t[order], y[order]


def _project(x: Array, y: Array, alpha: float, noise: float | None) -> tuple[float, float, float]:
    """(E, A, misfit) at this alpha.

    Misfit: sum of Huber terms in units of `noise`, or, without it, 1.48 times the median absolute residual.
    """
    design = np.stack([np.ones_like(x), x**-alpha], 1) / y[:, None]
    weight = np.ones_like(x)
    answer = np.zeros(2)
    for _ in range(8):
        answer = _nonnegative(design, weight)
        size = np.abs(1 - design @ answer)
        width = 1.345 * (noise if noise is not None else max(1.4826 * float(np.median(size)), 1e-9))
        weight = np.minimum(1.0, width / np.maximum(size, 1e-300))
    if noise is None:
        return float(answer[0]), float(answer[1]), 1.4826 * float(np.median(size))
    return (
        float(answer[0]),
        float(answer[1]),
        float(np.sum(np.where(size <= width, size**2, width * (2 * size - width))) / noise**2),
    )


def _nonnegative(design: Array, weight: Array) -> Array:
    """Least squares of 1 on two columns, both coefficients at least 0."""
    gram, pull = (design.T * weight) @ design, design.T @ weight
    both = np.linalg.lstsq(gram, pull, rcond=None)[0]
    if np.all(both >= 0):
        return np.asarray(both)
    alone = pull / np.diag(gram)
    i = int(np.argmax(pull * alone))  # the column that explains more by itself
    return np.where(np.arange(2) == i, alone, 0.0)
