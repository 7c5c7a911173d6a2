"""The Huber optimum of the loss law: all starts, or all bootstraps, as one batch of Newton problems."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaling.common.arrays import Array
from scaling.fitting.averaging import compute_shares
from scaling.fitting.newton import LocalModel, Objective, minimise
from scaling.laws.formulas import LossLaw

# theta of the law is (a, alpha, b, beta, e), with ln L = ln(e^(a - alpha n) + e^(b - beta d) + e^e) and n, d the
# logarithms of N and D minus their means.

# A term of e^-12 times the lowest loss, 6e-6 of it, is negligible.
NEGLIGIBLE_TERM = 12.0
# No measured exponent comes near this.
MAX_EXPONENT = 3.0


def make_loss_law(theta: Array, centre: tuple[float, float]) -> LossLaw:
    """Return the law with coefficients theta (5,) of centred logs. centre: means of ln N and ln D."""
    a, alpha, b, beta, e = (float(v) for v in theta)
    return LossLaw(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * centre[0])),
        B=float(np.exp(b + beta * centre[1])),
        alpha=alpha,
        beta=beta,
    )


def make_huber_objective(n: Array, d: Array, y: Array, counts: Array, delta: float) -> Objective:
    """Return the objective sum of counts * huber(ln L - ln law), for `minimise`.

    The Hessian is exact. The metric is that of the quadratic majoriser of the Huber loss.

    Args:
        n: ln N minus its mean, (m,).
        d: ln D minus its mean, (m,).
        y: ln loss, (m,).
        counts: How often each run is used in each problem, (k, m).
        delta: Where the Huber loss turns linear.
    """
    ones = np.ones_like(n)
    nn, dd = np.stack([ones, n, n * n], 1), np.stack([ones, d, d * d], 1)
    nd = np.stack([ones, n, d, n * d], 1)

    def objective(theta: Array, rows: NDArray[np.intp]) -> LocalModel:
        share, f = compute_shares(theta, n, d)
        r = y - f
        size = np.abs(r)
        count = counts[rows]
        # Derivative of the Huber term of each row.
        pull = count * np.clip(r, -delta, delta)
        value = np.sum(count * np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta)), 1)
        p1, p2, p3 = share
        g1, g2 = (pull * p1) @ nn, (pull * p2) @ dd
        g3 = np.sum(pull * p3, 1)
        gradient = -np.stack([g1[:, 0], -g1[:, 1], g2[:, 0], -g2[:, 1], g3], 1)
        # d2f = G' (diag p - p p') G, so the Hessian is a sum over J J' minus a sum over G' diag p G.
        hessian = gram(np.where(size <= delta, count, 0.0) + pull, p1, p2, p3)
        hessian[:, 0, 0] -= g1[:, 0]
        hessian[:, 0, 1] += g1[:, 1]
        hessian[:, 1, 0] += g1[:, 1]
        hessian[:, 1, 1] -= g1[:, 2]
        hessian[:, 2, 2] -= g2[:, 0]
        hessian[:, 2, 3] += g2[:, 1]
        hessian[:, 3, 2] += g2[:, 1]
        hessian[:, 3, 3] -= g2[:, 2]
        hessian[:, 4, 4] -= g3
        metric = gram(count * np.minimum(1.0, delta / np.maximum(size, 1e-300)), p1, p2, p3)
        return LocalModel(value, gradient, hessian, metric)

    def gram(weight: Array, p1: Array, p2: Array, p3: Array) -> Array:
        """Sum weight J J' over the rows by powers of n and d: matrix products instead of a (k, m, 5) tensor."""
        out = np.empty((weight.shape[0], 5, 5))
        w1, w2, w3 = weight * p1, weight * p2, weight * p3
        q11, q22, q12 = (w1 * p1) @ nn, (w2 * p2) @ dd, (w1 * p2) @ nd
        q13, q23 = (w1 * p3) @ nn[:, :2], (w2 * p3) @ dd[:, :2]
        out[:, 0, 0], out[:, 0, 1], out[:, 1, 1] = q11[:, 0], -q11[:, 1], q11[:, 2]
        out[:, 2, 2], out[:, 2, 3], out[:, 3, 3] = q22[:, 0], -q22[:, 1], q22[:, 2]
        out[:, 0, 2], out[:, 1, 2], out[:, 0, 3], out[:, 1, 3] = q12[:, 0], -q12[:, 1], -q12[:, 2], q12[:, 3]
        out[:, 0, 4], out[:, 1, 4], out[:, 2, 4], out[:, 3, 4] = q13[:, 0], -q13[:, 1], q23[:, 0], -q23[:, 1]
        out[:, 4, 4] = np.sum(w3 * p3, 1)
        upper = np.triu_indices(5, 1)
        out[:, upper[1], upper[0]] = out[:, upper[0], upper[1]]
        return out

    return objective


def make_bounds(y: Array) -> tuple[Array, Array]:
    """Return lower and upper bounds of theta, (5,) each. y: ln loss, (m,)."""
    low = y.min() - NEGLIGIBLE_TERM
    return np.array([low, 0.0, low, 0.0, low]), np.array(
        [y.max() + 5, MAX_EXPONENT, y.max() + 5, MAX_EXPONENT, y.min() + 0.1]
    )


def make_starts(n: Array, d: Array, y: Array, delta: float) -> Array:
    """Return starts of theta, (k, 5), on a grid of exponents.

    Given the exponents the law is linear in (A, B, E), which are solved for by weighted least squares.
    """
    grid = np.array([0.08, 0.15, 0.25, 0.35, 0.5, 0.75, 1.1])
    # An axis with one value does not determine its exponent.
    assumed = np.array([0.35])
    alpha, beta = np.meshgrid(grid if np.ptp(n) > 0 else assumed, grid if np.ptp(d) > 0 else assumed)
    alpha, beta = alpha.ravel(), beta.ravel()
    columns = [np.exp(-np.outer(alpha, n)), np.exp(-np.outer(beta, d)), np.ones((alpha.size, n.size))]
    # The residuals are relative, so they are close to those of ln L.
    design = np.stack(columns, 2) * np.exp(-y)[:, None]
    weight = np.ones((alpha.size, n.size))
    for _ in range(4):
        normal = np.swapaxes(design * weight[:, :, None], 1, 2) @ design
        normal[:, range(3), range(3)] *= 1 + 1e-8
        amplitude = np.linalg.solve(normal, np.sum(design * weight[:, :, None], 1)[:, :, None])[:, :, 0]
        size = np.abs(1 - (design @ amplitude[:, :, None])[:, :, 0])
        weight = np.minimum(1.0, delta / np.maximum(size, 1e-12))
    # A small lower bound leaves every term able to grow.
    amplitude = np.log(np.maximum(amplitude, 0.02 * np.exp(y.min())))
    return np.stack([amplitude[:, 0], alpha, amplitude[:, 1], beta, amplitude[:, 2]], 1)


def find_huber_optimum(
    n: Array, d: Array, y: Array, delta: float, credit: Array | None = None
) -> tuple[Array, float, list[str]]:
    """Find the law of lowest Huber loss from all starts.

    Args:
        n: ln N minus its mean, (m,).
        d: ln D minus its mean, (m,).
        y: ln loss, (m,).
        delta: Where the Huber loss turns linear.
        credit: Factors of the runs' terms, (m,); default 1.

    Returns:
        theta (5,), the objective there, and sentences on what is doubtful.
    """
    low, high = make_bounds(y)
    starts = np.clip(make_starts(n, d, y, delta), low, high)
    counts = np.tile(np.ones_like(y) if credit is None else credit, (len(starts), 1))
    objective = make_huber_objective(n, d, y, counts, delta)
    first = objective(starts, np.arange(len(starts))).value
    ends = minimise(objective, starts[np.argsort(first)[:12]], lower=low, upper=high)
    best = int(np.argmin(ends.value))
    theta, value = ends.theta[best], float(ends.value[best])

    doubts = []
    no_floor = bool(theta[4] < y.min() + np.log(0.01))
    # Towards E = 0 the valley is flat and endless, which the next doubt reports.
    if not ends.converged[best] and not no_floor:
        doubts.append("The search for the optimum ran out of iterations.")
    if no_floor:
        doubts.append(
            "The floor E is about 0: these runs do not bend, so the law far beyond them is too low if there is one."
        )
    for i, name in ((0, "A"), (2, "B")):
        if theta[i] < low[i] + 1:
            doubts.append(f"The term in {'N' if i == 0 else 'D'} vanished ({name} at its bound).")
    for i, name in ((1, "alpha"), (3, "beta")):
        if not 0.01 < theta[i] < MAX_EXPONENT - 0.01:
            doubts.append(f"{name} = {theta[i]:.2f} is at its bound.")
    near = ends.value <= value * 1.001
    apart = np.abs(ends.theta[near] - theta)[:, [1, 3, 4]].max(axis=0) * np.array([1, 1, 0 if no_floor else 1])
    if np.any(apart > 0.1) and np.ptp(n) > 0 and np.ptp(d) > 0:
        doubts.append(
            "Starts that fit equally well disagree "
            f"(alpha by {apart[0]:.2g}, beta by {apart[1]:.2g}, ln E by {apart[2]:.2g})."
        )
    return theta, value, doubts


def fit_bootstraps(
    theta: Array,
    n: Array,
    d: Array,
    y: Array,
    delta: float,
    count: int,
    rng: np.random.Generator,
    credit: Array | None = None,
) -> Array:
    """Refit the law to `count` resamples of the rows, each from the optimum of all rows; theta (count, 5)."""
    low, high = make_bounds(y)
    taken = rng.multinomial(y.size, np.full(y.size, 1 / y.size), size=count).astype(float)
    taken = taken if credit is None else taken * credit
    start = np.tile(theta, (count, 1))
    return minimise(make_huber_objective(n, d, y, taken, delta), start, lower=low, upper=high, tolerance=1e-9).theta
