"""Loss laws from runs: the Huber optimum as the law, and an average of two forms as the prediction.

The law is Hoffmann's (arXiv 2203.15556), fitted as in its appendix D.2: Huber loss (delta 1e-3) on log loss. Beyond
its data that form is mostly too high, so a prediction averages two (scaling/fitting/averaging.py), and their disagreement
widens its interval.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from scaling.common.arrays import Array
from scaling.fitting.averaging import Member, fit_members, softmax, tabulate
from scaling.fitting.newton import Local, Objective, minimise
from scaling.laws.formulas import LossLaw

# theta of the law: (a, alpha, b, beta, e), with ln L = ln(e^(a - alpha n) + e^(b - beta d) + e^e), n and d logs less
# their means

FAINT = 12.0  # a term e^-12 of the least loss is nil: 6e-6 of it
STEEPEST = 3.0  # no measured exponent comes near
DRAWS = 400  # of coefficients, for the interval of an optimum
SPREAD = 0.25  # share of the forms' squared disagreement that enters the variance


class FitError(ValueError):
    """The fit that was asked for cannot exist on these data."""


@dataclass(frozen=True)
class Allocation:
    """How compute is best divided between N and D, with an interval each."""

    N: float
    D: float
    N_interval: tuple[float, float]
    D_interval: tuple[float, float]
    bounded: bool  # whether the interval ends inside what was searched


@dataclass(frozen=True)
class Fit:
    """A loss law with its evidence. `law` is the plain Huber optimum; `predict` and `interval` average two forms."""

    law: LossLaw
    samples: list[LossLaw]  # the law refitted to row bootstraps
    status: str  # "ok", or what is doubtful, in sentences
    ranges: dict[str, tuple[float, float]]  # of N and D
    run_ids: tuple[Hashable, ...]
    objective: float  # sum of Huber terms at the law
    n_effective: float  # runs that count, after the weights by compute
    centre: tuple[float, float]  # mean ln N, mean ln D
    members: tuple[Member, ...]

    def predict(self, N: ArrayLike, D: ArrayLike) -> Array:
        """Expected loss, the average of the two forms in logs. `law(N, D)` errs about twice as much far out."""
        return np.asarray(np.exp(self._moments(N, D)[0]))

    def interval(self, N: ArrayLike, D: ArrayLike, mass: float = 0.8) -> tuple[Array, Array]:
        """(low, high) that hold the loss of ONE NEW RUN with probability `mass`; centred on `predict`.

        At an N that was trained, of that very model; it is wider where no run had this N.
        """
        if not 0 < mass < 1:
            raise ValueError(f"mass must lie between 0 and 1, got {mass}")
        mean, spread, variance = self._moments(N, D)
        noise = sum(m.weight * m.noise for m in self.members)
        reach = norm.ppf(0.5 + mass / 2) * np.sqrt(variance + noise**2 + SPREAD * spread**2)
        return np.asarray(np.exp(mean - reach)), np.asarray(np.exp(mean + reach))

    def optimum(self, C: float, mass: float = 0.8, *, seed: int = 0) -> Allocation:
        """The N of least predicted loss under C = 6 N D FLOPs, by the average of the forms; D follows from it.

        The interval: of the same minimum for draws of each form's coefficients, as often as the form weighs. Minima
        are looked for from 1e-3 to 1e4 times the sizes of the data; FitError when the average has none inside.
        """
        if not (np.isfinite(C) and C > 0 and 0 < mass < 1):
            raise ValueError(f"an optimum needs positive finite FLOPs and a mass between 0 and 1, got {C=}, {mass=}")
        low, high = (np.log(v) for v in self.ranges["N"])
        n = np.linspace(low + np.log(1e-3), high + np.log(1e4), 800)
        n_, d_ = n - self.centre[0], np.log(C / 6.0) - n - self.centre[1]
        weight = np.array([m.weight for m in self.members])
        middle = int(np.argmin(weight @ np.array([m.curves(m.theta[None], n_, d_)[0] for m in self.members])))
        if middle in (0, n.size - 1):
            raise FitError(
                "the predicted loss has no minimum between very small and very large models: add runs at other N and D/N"
            )
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(DRAWS, weight)
        found = [
            n[np.argmin(m.curves(rng.multivariate_normal(m.theta, m.covariance, size=count), n_, d_), axis=1)]
            for m, count in zip(self.members, counts, strict=True)
        ]
        below, above = np.quantile(np.concatenate(found), [0.5 - mass / 2, 0.5 + mass / 2])
        bounded = bool(below > n[0] and above < n[-1])
        N, ends = float(np.exp(n[middle])), (float(np.exp(below)), float(np.exp(above)))
        return Allocation(N, C / 6.0 / N, ends, (C / 6.0 / ends[1], C / 6.0 / ends[0]), bounded)

    def disagreement(self, N: ArrayLike, D: ArrayLike) -> Array:
        """By how much the two forms disagree there: weighted standard deviation of ln L, so a relative loss."""
        return self._moments(N, D)[1]

    def _moments(self, N: ArrayLike, D: ArrayLike) -> tuple[Array, Array, Array]:
        """Mean of ln L, sd between forms, variance within forms."""
        size, tokens = np.broadcast_arrays(np.asarray(N, float), np.asarray(D, float))
        if not (np.all(np.isfinite(size) & (size > 0)) and np.all(np.isfinite(tokens) & (tokens > 0))):
            raise ValueError(f"a prediction needs positive finite N and D, got N={N!r}, D={D!r}")
        n, d = np.log(size).ravel() - self.centre[0], np.log(tokens).ravel() - self.centre[1]
        moments = [m.moments(n, d) for m in self.members]
        weight = np.array([m.weight for m in self.members])[:, None]
        values, variances = (np.array(v) for v in zip(*moments, strict=True))
        mean = np.sum(weight * values, 0)
        spread = np.sqrt(np.sum(weight * (values - mean) ** 2, 0))
        within = np.sum(weight * variances, 0)
        return mean.reshape(size.shape), spread.reshape(size.shape), within.reshape(size.shape)


def fit_loss_law(
    N: ArrayLike,
    D: ArrayLike,
    loss: ArrayLike,
    *,
    delta: float = 1e-3,
    bootstrap: int = 0,
    seed: int = 0,
    run_ids: Sequence[Hashable] | None = None,
) -> Fit:
    """Fit E + A/N^alpha + B/D^beta to runs (1-d arrays of one length, loss in nats per token).

    `delta` is Huber's, in ln L. `bootstrap` counts row resamples for `samples`; they show how loose the parameters are,
    the intervals do not use them. ValueError on unusable rows, FitError when no law can exist.
    """
    size, tokens, losses = (np.asarray(v, float) for v in (N, D, loss))
    check_rows(size, tokens, losses, delta, bootstrap)
    ids = tuple(range(losses.size)) if run_ids is None else tuple(run_ids)
    if len(ids) != losses.size:
        raise ValueError(f"run_ids needs one entry per run, got {len(ids)} for {losses.size} runs")
    log_n, log_d, y = np.log(size), np.log(tokens), np.log(losses)
    centre = (float(log_n.mean()), float(log_d.mean()))
    n, d = log_n - centre[0], log_d - centre[1]

    theta, objective, doubts = huber_optimum(n, d, y, delta)
    samples = (
        _bootstraps(theta, n, d, y, delta, bootstrap, np.random.default_rng(seed)) if bootstrap else np.empty((0, 5))
    )
    table = tabulate(log_n, log_d, y, centre)
    effective = table.effective
    members = fit_members(table)
    if effective < 8:
        doubts.append(
            f"Only {effective:.1f} runs count near the largest compute; below 8 the interval is not known to hold."
        )
    doubts += coverage_doubts(log_n, log_d)
    return Fit(
        law=loss_law(theta, centre),
        samples=[loss_law(t, centre) for t in samples],
        status=" ".join(doubts) or "ok",
        ranges={"N": (float(size.min()), float(size.max())), "D": (float(tokens.min()), float(tokens.max()))},
        run_ids=ids,
        objective=objective,
        n_effective=effective,
        centre=centre,
        members=members,
    )


def check_rows(N: Array, D: Array, loss: Array, delta: float, bootstrap: int) -> None:
    if not (N.ndim == D.ndim == loss.ndim == 1 and N.size == D.size == loss.size):
        raise ValueError(f"N, D and loss must be 1-d and of one length, got shapes {N.shape}, {D.shape}, {loss.shape}")
    if not (delta > 0 and bootstrap >= 0):
        raise ValueError(f"delta must be above 0 and bootstrap at least 0, got delta={delta}, bootstrap={bootstrap}")
    for name, values in (("N", N), ("D", D), ("loss", loss)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            shown = ", ".join(str(i) for i in bad[:10]) + (", ..." if bad.size > 10 else "")
            raise ValueError(
                f"{name} must be positive and finite, got {values[bad[0]]} (rows {shown}): drop these runs"
            )
    if loss.size < 3:
        raise FitError(f"a loss law needs at least 3 runs, got {loss.size}: add runs")
    if np.unique(N).size < 2 and np.unique(D).size < 2:
        raise FitError(
            "a loss law needs spread in N or D, got one N and one D: add runs at another size or token count"
        )


def coverage_doubts(log_n: Array, log_d: Array) -> list[str]:
    """Sentences on what the choice of sizes and token counts cannot tell, whatever the losses."""
    doubts = []
    for name, values, symbol in (("N", np.sort(log_n), "alpha"), ("D", np.sort(log_d), "beta")):
        level = np.concatenate([[0], np.cumsum(np.diff(values) > 0.05)])  # equal to 5 %: one scale
        span, count = float(np.exp(values[-1] - values[0])), int(level[-1]) + 1
        inner = min(np.ptp(values[level > 0]), np.ptp(values[level < count - 1])) if count > 2 else 0.0
        if count == 1:
            doubts.append(f"One distinct {name}: {symbol} and what depends on {name} are assumed, not measured.")
        elif count == 2:
            doubts.append(f"Two distinct {name}: they give a slope, but not where it ends; {symbol} and E are tied.")
        elif span < 4:
            doubts.append(f"{name} covers only a factor of {span:.2g}: {symbol} is hardly measured.")
        elif inner < np.log(2):
            lone = min(int(np.sum(level == 0)), int(np.sum(level == count - 1)))
            doubts.append(f"{symbol} hangs on {lone} run(s): without them {name} covers less than a factor of 2.")
    if not doubts and abs(np.corrcoef(log_n, log_d)[0, 1]) > 0.98:
        doubts.append("N and D move together: alpha and beta cannot be told apart. Vary D/N.")
    return doubts


def loss_law(theta: Array, centre: tuple[float, float]) -> LossLaw:
    a, alpha, b, beta, e = (float(v) for v in theta)
    return LossLaw(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * centre[0])),
        B=float(np.exp(b + beta * centre[1])),
        alpha=alpha,
        beta=beta,
    )


# --- the law: Huber optimum on log loss -------------------------------------------------------------------------------


def _huber(n: Array, d: Array, y: Array, counts: Array, delta: float) -> Objective:
    """Sum of counts * huber(ln L - ln law), exact Hessian; the metric is that of Huber's quadratic majoriser.

    counts (k, m): how often each run is taken in each problem.
    """
    one = np.ones_like(n)
    nn, dd = np.stack([one, n, n * n], 1), np.stack([one, d, d * d], 1)
    nd = np.stack([one, n, d, n * d], 1)

    def local(theta: Array, rows: NDArray[np.intp]) -> Local:
        share, f = softmax(theta, n, d)
        r = y - f
        size = np.abs(r)
        count = counts[rows]
        pull = count * np.clip(r, -delta, delta)  # derivative of the Huber term, by row
        value = np.sum(count * np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta)), 1)
        p1, p2, p3 = share
        g1, g2 = (pull * p1) @ nn, (pull * p2) @ dd
        g3 = np.sum(pull * p3, 1)
        gradient = -np.stack([g1[:, 0], -g1[:, 1], g2[:, 0], -g2[:, 1], g3], 1)
        # d2f = G' (diag p - p p') G, so the Hessian is a sum over J J' less one over G' diag p G
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
        return Local(value, gradient, hessian, metric)

    def gram(weight: Array, p1: Array, p2: Array, p3: Array) -> Array:
        """Sum over rows of weight J J', by powers of n and d: plain matrix products instead of a (k, m, 5) tensor."""
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

    return local


def law_box(y: Array) -> tuple[Array, Array]:
    low = y.min() - FAINT
    return np.array([low, 0.0, low, 0.0, low]), np.array([y.max() + 5, STEEPEST, y.max() + 5, STEEPEST, y.min() + 0.1])


def law_starts(n: Array, d: Array, y: Array, delta: float) -> Array:
    """A grid of exponents; given these the law is linear in (A, B, E), solved by weighted least squares (k, 5)."""
    grid = np.array([0.08, 0.15, 0.25, 0.35, 0.5, 0.75, 1.1])
    assumed = np.array([0.35])  # an axis with one value tells nothing of its exponent
    alpha, beta = np.meshgrid(grid if np.ptp(n) > 0 else assumed, grid if np.ptp(d) > 0 else assumed)
    alpha, beta = alpha.ravel(), beta.ravel()
    columns = [np.exp(-np.outer(alpha, n)), np.exp(-np.outer(beta, d)), np.ones((alpha.size, n.size))]
    design = np.stack(columns, 2) * np.exp(-y)[:, None]  # relative residuals: near those of ln L
    weight = np.ones((alpha.size, n.size))
    for _ in range(4):
        normal = np.swapaxes(design * weight[:, :, None], 1, 2) @ design
        normal[:, range(3), range(3)] *= 1 + 1e-8
        amplitude = np.linalg.solve(normal, np.sum(design * weight[:, :, None], 1)[:, :, None])[:, :, 0]
        size = np.abs(1 - (design @ amplitude[:, :, None])[:, :, 0])
        weight = np.minimum(1.0, delta / np.maximum(size, 1e-12))
    amplitude = np.log(
        np.maximum(amplitude, 0.02 * np.exp(y.min()))
    )  # a small floor, so that every term can still grow
    return np.stack([amplitude[:, 0], alpha, amplitude[:, 1], beta, amplitude[:, 2]], 1)


def huber_optimum(n: Array, d: Array, y: Array, delta: float) -> tuple[Array, float, list[str]]:
    low, high = law_box(y)
    starts = np.clip(law_starts(n, d, y, delta), low, high)
    objective = _huber(n, d, y, np.ones((len(starts), y.size)), delta)
    first = objective(starts, np.arange(len(starts))).value
    ends = minimise(objective, starts[np.argsort(first)[:12]], lower=low, upper=high)
    best = int(np.argmin(ends.value))
    theta, value = ends.theta[best], float(ends.value[best])

    doubts = []
    no_floor = bool(theta[4] < y.min() + np.log(0.01))
    if not ends.converged[best] and not no_floor:  # towards E = 0 the valley is flat without end; that is said below
        doubts.append("The search for the optimum ran out of iterations.")
    if no_floor:
        doubts.append(
            "The floor E is about 0: these runs do not bend, so the law far beyond them is too low if there is one."
        )
    for i, name in ((0, "A"), (2, "B")):
        if theta[i] < low[i] + 1:
            doubts.append(f"The term in {'N' if i == 0 else 'D'} vanished ({name} at its bound).")
    for i, name in ((1, "alpha"), (3, "beta")):
        if not 0.01 < theta[i] < STEEPEST - 0.01:
            doubts.append(f"{name} = {theta[i]:.2f} is at its bound.")
    near = ends.value <= value * 1.001
    apart = np.abs(ends.theta[near] - theta)[:, [1, 3, 4]].max(axis=0) * np.array([1, 1, 0 if no_floor else 1])
    if np.any(apart > 0.1) and np.ptp(n) > 0 and np.ptp(d) > 0:
        doubts.append(
            "Starts that fit equally well disagree "
            f"(alpha by {apart[0]:.2g}, beta by {apart[1]:.2g}, ln E by {apart[2]:.2g})."
        )
    return theta, value, doubts


def _bootstraps(
    theta: Array, n: Array, d: Array, y: Array, delta: float, count: int, rng: np.random.Generator
) -> Array:
    """The law refitted to `count` resamples of the rows, each from the optimum of all rows (count, 5)."""
    low, high = law_box(y)
    taken = rng.multinomial(y.size, np.full(y.size, 1 / y.size), size=count).astype(float)
    start = np.tile(theta, (count, 1))
    return minimise(_huber(n, d, y, taken, delta), start, lower=low, upper=high, tolerance=1e-9).theta
