"""Fit the loss along one run, and find the ends of annealed runs."""

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

# The range of the exponent that is searched.
MIN_ALPHA, MAX_ALPHA = 0.02, 3.0


@dataclass(frozen=True)
class CurveLaw:
    """The law L(t) = E + A t^-alpha, in nats per token after t tokens.

    Attributes:
        E: The floor, nats per token.
        A: The coefficient, nats per token at t = 1.
        alpha: The exponent.
    """

    E: float
    A: float
    alpha: float

    def __call__(self, tokens: ArrayLike) -> Array:
        return np.asarray(self.E + self.A * np.asarray(tokens, float) ** -self.alpha)


@dataclass(frozen=True)
class CurveFit:
    """The law of the loss of one run, with its evidence.

    Attributes:
        law: The fitted law.
        noise: Robust sd of the relative residuals.
        range: The fewest and the most tokens among the points.
        status: "ok", or what is doubtful about the fit.
    """

    law: CurveLaw
    noise: float
    range: tuple[float, float]
    status: str

    def predict(self, tokens: ArrayLike) -> Array:
        """Return the loss in nats per token after so many tokens at the same constant rate, without a cooldown."""
        return self.law(tokens)


def fit_curve(tokens: ArrayLike, loss: ArrayLike) -> CurveFit:
    """Fit E + A t^-alpha to the constant-rate trunk of one run.

    This is variable projection: given alpha, A and E >= 0 follow from Huber-weighted linear least squares on relative
    residuals, so that only alpha is searched.

    Args:
        tokens: Training tokens at each point, 1-d, without the warm-up and the cooldown.
        loss: Loss at each point, nats per token, 1-d. Points without a finite loss are left out.

    Returns:
        The fit. A doubtful one is returned, too: its `status` says what is wrong.

    Raises:
        ValueError: If there are fewer than 4 distinct token counts, or a number cannot be used.
    """
    t, y = clean_curve(tokens, loss)
    if np.unique(t).size < 4:
        raise ValueError(
            f"a curve needs at least 4 distinct token counts, got {np.unique(t).size}: evaluate more often"
        )
    scale = float(np.exp(np.mean(np.log(t))))
    x = t / scale
    grid = np.geomspace(MIN_ALPHA, MAX_ALPHA, 41)
    # All alphas share one residual scale, that of the best median residual: otherwise a bad alpha would excuse its own
    # misfit.
    noise = max(min(_fit_linear_part(x, y, a, None)[2] for a in grid), 1e-6)
    values = [_fit_linear_part(x, y, a, noise)[2] for a in grid]
    i = int(np.argmin(values))
    bounds = (np.log(grid[max(i - 1, 0)]), np.log(grid[min(i + 1, len(grid) - 1)]))
    minimum = minimize_scalar(
        lambda log_alpha: _fit_linear_part(x, y, float(np.exp(log_alpha)), noise)[2],
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-7},
    )
    alpha = float(np.exp(minimum.x)) if minimum.fun <= values[i] else float(grid[i])
    E, A, _ = _fit_linear_part(x, y, alpha, noise)
    doubts = []
    if A <= 0:
        doubts.append("The loss does not fall along this run.")
    elif alpha < MIN_ALPHA * 1.01 or alpha > MAX_ALPHA * 0.99:
        doubts.append(f"alpha = {alpha:.3g} is at the edge of the range that is searched.")
    elif E <= 0:
        doubts.append(
            "The floor E is 0: this run does not level off yet. If there is a floor, the curve is too low far ahead."
        )
    law = CurveLaw(E=E, A=A * scale**alpha, alpha=alpha)
    return CurveFit(law, noise, (float(t.min()), float(t.max())), " ".join(doubts) or "ok")


def find_tokens_to_reach(tokens: ArrayLike, loss: ArrayLike, level: float) -> float:
    """Return the tokens at which the measured curve first falls to `level`.

    The curve is the running minimum, linear in log tokens between the points.

    Args:
        tokens: Training tokens at each point, 1-d.
        loss: Loss at each point, nats per token, 1-d.
        level: A loss, nats per token.

    Returns:
        Tokens: those of the first point if it lies at or below the level already, `math.inf` if the curve never falls
            so far.
    """
    t, y = clean_curve(tokens, loss)
    lowest = np.minimum.accumulate(y)
    reached = np.flatnonzero(lowest <= level)
    if not reached.size:
        return math.inf
    i = int(reached[0])
    if i == 0:
        return float(t[0])
    share = (lowest[i - 1] - level) / (lowest[i - 1] - lowest[i])
    return float(np.exp(np.log(t[i - 1]) + share * (np.log(t[i]) - np.log(t[i - 1]))))


def annealed_ends(points: pd.DataFrame, *, below: float = 0.2) -> pd.Series[Any]:
    """Find the rows of a table of curve points that hold the final loss of an annealed run.

    With learning rates, a row is an end if the rate has come down to at most `below` of its peak, and the run ends
    there or its rate rises again (the end of a cooldown branch, after which the trunk continues). With a schedule, a
    row is an end if the last 0.5 % of D is reached and the schedule is not "constant".

    Args:
        points: A table with the columns `run_id`, `tokens`, and either `lr` (the rate at that point) or `schedule` and
            `D` (the tokens that the schedule was made for). The peak of a run is its `lr_peak` or, without that column,
            its largest `lr`. A run with a single point needs `lr_peak`; without it the row is no end.
        below: The most that the rate may be at an end, as a share of its peak.

    Returns:
        Bool, on the index of the table.

    Raises:
        ValueError: If a column is missing, or a token count or rate cannot be read.
    """
    import pandas as pd

    by_rate = "lr" in points.columns
    needed = ("run_id", "tokens", "lr") if by_rate else ("run_id", "tokens", "schedule", "D")
    if missing := [name for name in needed if name not in points.columns]:
        raise ValueError(
            f"needed run_id, tokens and lr, or run_id, tokens, schedule and D; got no {', '.join(missing)}"
        )
    numbers = [
        name for name in ("tokens", "lr", "lr_peak", "D") if name in needed or (by_rate and name in points.columns)
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
        # Only after the peak, because the rate of a warm-up is low, too.
        has_peaked = np.maximum.accumulate(rate) > below * peak
        is_last_or_rises = np.r_[rate[1:] > rate[:-1], True]
        is_single = rate.size == 1 and "lr_peak" in values
        final[rows] = (rate <= below * peak) & (has_peaked | is_single) & is_last_or_rises
    return pd.Series(final, index=points.index, name="final")


def clean_curve(tokens: ArrayLike, loss: ArrayLike) -> tuple[Array, Array]:
    """Check a curve, sort it by tokens and drop the points without a finite loss.

    Args:
        tokens: Training tokens at each point, 1-d.
        loss: Loss at each point, nats per token, 1-d.

    Returns:
        (tokens, loss).

    Raises:
        ValueError: If the shapes differ, a token count is not positive and finite, a loss is not positive, or none is
            finite.
    """
    t, y = np.asarray(tokens, float), np.asarray(loss, float)
    if t.ndim != 1 or t.shape != y.shape or not t.size:
        raise ValueError(f"tokens and loss must be 1-d and of one length above 0, got shapes {t.shape} and {y.shape}")
    if not np.all(np.isfinite(t) & (t > 0)):
        raise ValueError("tokens must be positive and finite: drop the point before the first step")
    is_finite = np.isfinite(y)
    if not is_finite.any() or np.any(y[is_finite] <= 0):
        raise ValueError("loss must be positive, in nats per token, and finite somewhere")
    t, y = t[is_finite], y[is_finite]
    order = np.argsort(t, kind="stable")
    return t[order], y[order]


def _fit_linear_part(x: Array, y: Array, alpha: float, noise: float | None) -> tuple[float, float, float]:
    """Fit E and A at this alpha.

    Returns:
        (E, A, misfit). The misfit is the sum of the Huber terms in units of `noise` or, without it, 1.48 times the
        median absolute residual.
    """
    design = np.stack([np.ones_like(x), x**-alpha], 1) / y[:, None]
    weight = np.ones_like(x)
    E, A = 0.0, 0.0
    for _ in range(8):
        coefficients = _solve_nonnegative(design, weight)
        E, A = float(coefficients[0]), float(coefficients[1])
        size = np.abs(1 - design @ coefficients)
        width = 1.345 * (noise if noise is not None else max(1.4826 * float(np.median(size)), 1e-9))
        weight = np.minimum(1.0, width / np.maximum(size, 1e-300))
    if noise is None:
        return E, A, 1.4826 * float(np.median(size))
    return E, A, float(np.sum(np.where(size <= width, size**2, width * (2 * size - width))) / noise**2)


def _solve_nonnegative(design: Array, weight: Array) -> Array:
    """Solve the weighted least squares of 1 on two columns, with both coefficients at least 0."""
    gram, pull = (design.T * weight) @ design, design.T @ weight
    both = np.linalg.lstsq(gram, pull, rcond=None)[0]
    if np.all(both >= 0):
        return np.asarray(both)
    alone = pull / np.diag(gram)
    # The column that explains more by itself.
    i = int(np.argmax(pull * alone))
    return np.where(np.arange(2) == i, alone, 0.0)
