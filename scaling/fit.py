"""Loss laws from runs: the Huber optimum as the law, and an average of two forms as the prediction.

The law is Hoffmann's (arXiv 2203.15556), fitted as in its appendix D.2: Huber loss (delta 1e-3) on log loss. Beyond
its data that form is mostly too high and a law without a floor (Kaplan et al., arXiv 2001.08361) mostly too low; about
half of all held-out runs lie between. So a prediction averages both, and their disagreement widens its interval. On 14
real tables, trained on the lower 70 % of runs by compute, the nominal 80 % interval so made held 86 % of the rest
(plain bootstrap with residuals: 46 %).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from scaling.laws import Array, LossLaw
from scaling.newton import Local, Objective, minimise, penalised_squares

# theta of the law, and of the member with a floor: (a, alpha, b, beta, e), with
# ln L = ln(e^(a - alpha n) + e^(b - beta d) + e^e), n and d logs less their means
Form: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Array]]  # theta (k, 5), n, d (m,) -> (k, m), (k, m, 5)

FAINT = 12.0  # a term e^-12 of the least loss is nil: 6e-6 of it
STEEPEST = 3.0  # no measured exponent comes near
SPREAD = 0.25  # share of the forms' squared disagreement that enters the variance
LEAST_SD = 5e-4  # of ln L: no table is known to this


class FitError(ValueError):
    """The fit that was asked for cannot exist on these data."""


@dataclass(frozen=True)
class Member:
    """One of the two averaged forms, fitted."""

    form: str  # "floor" or "no floor"
    theta: Array  # (5,)
    covariance: Array  # (5, 5), Laplace
    noise: float  # rms residual of ln L: one run about the form
    weight: float


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
        """(low, high) that hold the loss of ONE NEW RUN with probability `mass`; centred on `predict`."""
        if not 0 < mass < 1:
            raise ValueError(f"mass must lie between 0 and 1, got {mass}")
        mean, spread, variance = self._moments(N, D)
        noise = sum(m.weight * m.noise for m in self.members)
        reach = norm.ppf(0.5 + mass / 2) * np.sqrt(variance + noise**2 + SPREAD * spread**2)
        return np.asarray(np.exp(mean - reach)), np.asarray(np.exp(mean + reach))

    def disagreement(self, N: ArrayLike, D: ArrayLike) -> Array:
        """By how much the two forms disagree there: weighted standard deviation of ln L, so a relative loss."""
        return self._moments(N, D)[1]

    def _moments(self, N: ArrayLike, D: ArrayLike) -> tuple[Array, Array, Array]:
        """Mean of ln L, sd between forms, variance within forms."""
        size, tokens = np.broadcast_arrays(np.asarray(N, float), np.asarray(D, float))
        if not (np.all(np.isfinite(size) & (size > 0)) and np.all(np.isfinite(tokens) & (tokens > 0))):
            raise ValueError(f"a prediction needs positive finite N and D, got N={N!r}, D={D!r}")
        n, d = np.log(size).ravel() - self.centre[0], np.log(tokens).ravel() - self.centre[1]
        values, variances = [], []
        for m in self.members:
            f, jacobian = FORMS[m.form](m.theta[None], n, d)
            values.append(f[0])
            variances.append(np.einsum("mi,ij,mj->m", jacobian[0], m.covariance, jacobian[0]))
        weight = np.array([m.weight for m in self.members])[:, None]
        mean = np.sum(weight * np.array(values), 0)
        spread = np.sqrt(np.sum(weight * (np.array(values) - mean) ** 2, 0))
        within = np.sum(weight * np.array(variances), 0)
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
    _check(size, tokens, losses, delta, bootstrap)
    ids = tuple(range(losses.size)) if run_ids is None else tuple(run_ids)
    if len(ids) != losses.size:
        raise ValueError(f"run_ids needs one entry per run, got {len(ids)} for {losses.size} runs")
    log_n, log_d, y = np.log(size), np.log(tokens), np.log(losses)
    centre = (float(log_n.mean()), float(log_d.mean()))
    n, d = log_n - centre[0], log_d - centre[1]

    theta, objective, doubts = _huber_optimum(n, d, y, delta)
    samples = (
        _bootstraps(theta, n, d, y, delta, bootstrap, np.random.default_rng(seed)) if bootstrap else np.empty((0, 5))
    )
    weight = _compute_weights(log_n + log_d)
    effective = float(weight.sum())
    members = _average([_member(form, weight, n, d, y) for form in FORMS], effective)
    if effective < 8:
        doubts.append(
            f"Only {effective:.1f} runs count near the largest compute; below 8 the interval is not known to hold."
        )
    for name, values, symbol in (("N", size, "alpha"), ("D", tokens, "beta")):
        if np.unique(values).size < 2:
            doubts.append(f"One distinct {name}: {symbol} and what depends on {name} are assumed, not measured.")
    return Fit(
        law=_law(theta, centre),
        samples=[_law(t, centre) for t in samples],
        status=" ".join(doubts) or "ok",
        ranges={"N": (float(size.min()), float(size.max())), "D": (float(tokens.min()), float(tokens.max()))},
        run_ids=ids,
        objective=objective,
        n_effective=effective,
        centre=centre,
        members=members,
    )


def _check(N: Array, D: Array, loss: Array, delta: float, bootstrap: int) -> None:
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


def _law(theta: Array, centre: tuple[float, float]) -> LossLaw:
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
        share, f = _softmax(theta, n, d)
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


def _softmax(theta: Array, n: Array, d: Array) -> tuple[tuple[Array, Array, Array], Array]:
    """Shares of the three terms and ln of their sum, each (k, m)."""
    a, alpha, b, beta, e = theta.T[:, :, None]
    z1, z2 = a - alpha * n, b - beta * d
    top = np.maximum(np.maximum(z1, z2), e)
    x1, x2, x3 = np.exp(z1 - top), np.exp(z2 - top), np.exp(e - top)
    total = x1 + x2 + x3
    return (x1 / total, x2 / total, x3 / total), top + np.log(total)


def _box(y: Array) -> tuple[Array, Array]:
    low = y.min() - FAINT
    return np.array([low, 0.0, low, 0.0, low]), np.array([y.max() + 5, STEEPEST, y.max() + 5, STEEPEST, y.min() + 0.1])


def _starts(n: Array, d: Array, y: Array, delta: float) -> Array:
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


def _huber_optimum(n: Array, d: Array, y: Array, delta: float) -> tuple[Array, float, list[str]]:
    low, high = _box(y)
    starts = np.clip(_starts(n, d, y, delta), low, high)
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
    low, high = _box(y)
    taken = rng.multinomial(y.size, np.full(y.size, 1 / y.size), size=count).astype(float)
    start = np.tile(theta, (count, 1))
    return minimise(_huber(n, d, y, taken, delta), start, lower=low, upper=high, tolerance=1e-9).theta


# --- the prediction: two forms, runs near the largest compute weigh most ----------------------------------------------


def _floor(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    (p1, p2, p3), f = _softmax(theta, n, d)
    return f, np.stack([p1, -n * p1, p2, -d * p2, p3], 2)


def _no_floor(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """e^k ln(e^(a - alpha n) + e^(b - beta d)): (A/N^.. + B/D^..)^(e^k), Kaplan's form."""
    a, alpha, b, beta, k = theta.T[:, :, None]
    z1, z2 = a - alpha * n, b - beta * d
    inner = np.logaddexp(z1, z2)
    p1, p2, power = np.exp(z1 - inner), np.exp(z2 - inner), np.exp(np.clip(k, -20, 20))
    f = power * inner
    return f, np.stack([power * p1, -power * n * p1, power * p2, -power * d * p2, f], 2)


FORMS: dict[str, Form] = {"floor": _floor, "no floor": _no_floor}


def _compute_weights(log_compute: Array) -> Array:
    """min(1, C / C90)^1.5, C90 the 90 % quantile; scaled so that their sum is the effective number of runs."""
    q = np.minimum(1.0, np.exp(log_compute - np.quantile(log_compute, 0.9))) ** 1.5
    return np.asarray(q * q.sum() / np.sum(q * q))


def _member(form: str, weight: Array, n: Array, d: Array, y: Array) -> Member:
    """Penalised least squares on ln L; its weight is filled in by `_average`."""
    pairs = [(0.2, 0.2), (0.2, 0.5), (0.5, 0.2), (0.5, 0.5)]
    if form == "floor":
        floor = y.min() - 0.3
        term = np.log((np.exp(y.mean()) - np.exp(floor)) / 2)
        theta = np.array([[term, a, term, b, floor] for a, b in pairs])
        centre, sd = np.array([term, 0.35, term, 0.35, floor]), np.array([WEAK, 0.2, WEAK, 0.2, WEAK])
    else:
        theta = np.array(
            [
                [y.mean() * np.exp(-k) - 0.7, a, y.mean() * np.exp(-k) - 0.7, a, k]
                for a in (0.2, 0.6)
                for k in (-1.5, -0.5)
            ]
        )
        middle = y.mean() * np.e - 0.7
        centre, sd = np.array([middle, 0.7, middle, 0.7, -1.0]), np.array([WEAK, 0.4, WEAK, 0.4, 1.0])
    precision, model, effective = sd**-2.0, FORMS[form], float(weight.sum())

    s = 0.01
    for _ in range(6):

        def local(at: Array, rows: NDArray[np.intp], s: float = s) -> Local:
            f, jacobian = model(at, n, d)
            w = np.broadcast_to(weight / s**2, f.shape)
            return penalised_squares(y - f, jacobian, w, at - centre, precision)

        ends = minimise(local, theta, tolerance=1e-9)
        theta = ends.theta
        best = theta[np.argmin(ends.value)]
        f, jacobian = (v[0] for v in model(best[None], n, d))
        squares = float(np.sum(weight * (y - f) ** 2))
        before, s = s, max(np.sqrt(squares / max(effective - 5, effective / 3, 1.0)), LEAST_SD)
        if abs(s / before - 1) < 0.03:
            break
    information = (jacobian.T * (weight / s**2)) @ jacobian + np.diag(precision)
    noise = max(float(np.sqrt(squares / effective)), LEAST_SD)
    return Member(form, best, np.linalg.inv(information), noise, weight=1.0)


WEAK = 30.0  # sd of the amplitudes' prior: only there so that a table with one N or one D has an answer


def _average(members: list[Member], effective: float) -> tuple[Member, ...]:
    """Weights by likelihood to the power 1/16: the runs of one table are far from independent."""
    noise = np.array([m.noise for m in members])
    share = (noise / noise.min()) ** (-effective / 16)
    share = share / share.sum()
    return tuple(Member(m.form, m.theta, m.covariance, m.noise, float(w)) for m, w in zip(members, share, strict=True))
