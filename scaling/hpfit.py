"""The learning-rate and batch law from runs: one bowl for all sizes, its bottom moving with N and D.

    ln L(run) = offset of its (N, D) group + bowl(u, v) + noise
    u = ln lr - (a0 + a1 n + a2 d),  v = ln B - (b0 + b1 d + b2 n)

All runs of a group speak, not its best one: the best of ten random runs is no optimum. Two bowls (cubic, exponential)
times two widths of attention are fitted and averaged. On a public table of real runs (Step Law, arXiv 2503.04715: 17
groups), fitted on the small groups and asked at the large ones, the answer lost .09 % on average, .16 % at worst of
seven splits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from scaling.fit import FitError
from scaling.laws import Array, HPLaw
from scaling.newton import Local, minimise, penalised_squares

# theta: a0, a1 (n), a2 (d), b0, b1 (d), b2 (n), then the shape: ln h1, ln h2, k, and c1..c4 or b, s1, s2
Bowl: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Array, Array, Array]]
# shape (k, q), u, v (k, m) -> value, d/du, d/dv (k, m), d/dshape (k, m, q)

WIDTHS = (0.01, 0.02)  # tau: runs this far (ln L) above the fitted bottom count half
FAR = 0.30  # runs farther above their group's best, in ln L, are another regime
LEAST_SD = 7e-4  # of ln L
DRIFT = 0.08  # sd of each exponent beyond the data, set on that table: without it 80 % intervals held 43 and 68 %
SHIFTS = np.array([0.03, 0.05, 0.08, 0.12, 0.2, 0.3])  # sd of one group's own optimum about the law
# An optimum known no better than this (sd of ln lr or ln B, at the data's centre) is not identified. Assumed.
VAGUE = 0.5
DRAWS = 4000


@dataclass(frozen=True)
class BowlFit:
    """One of the averaged fits."""

    form: str  # "cubic" or "exponential"
    tau: float
    theta: Array  # (6 + shape,)
    noise: float  # sd of one run's ln L
    covariance: Array  # (cells, 6, 6) of the six coefficients, one for each pair of shift sds
    shifts: Array  # (cells, 2) sd of a group's own shift of ln lr*, ln B*
    cells: Array  # (cells,) their weights, sum 1
    floors: Array  # (groups,) fitted minimum of ln L
    floor_variance: Array  # (groups,)


@dataclass(frozen=True)
class HPFit:
    """The law, and its evidence."""

    law: HPLaw
    fits: tuple[BowlFit, ...]
    centre: tuple[float, float]  # mean ln N, mean ln D over groups
    floors: pd.DataFrame  # N, D, loss, sd, n: fitted minimum of every group; sd of ln loss; runs it rests on
    status: str  # "ok", or what is doubtful, in sentences
    identified: dict[str, bool]  # "lr", "batch_tokens": whether the runs, not the prior, say where the optimum is
    ranges: dict[str, tuple[float, float]]  # of N, D, lr, batch_tokens over the runs used
    used: pd.DataFrame  # the runs used
    run_ids: tuple[object, ...]
    n_runs: int  # used
    n_diverged: int  # dropped: no finite positive loss
    n_far: int  # dropped: more than FAR above the best of their group

    def draw(self, N: float, D: float, n: int, seed: int) -> tuple[Array, Array]:
        """n draws of (lr*, batch*) of a new group at (N, D): fit, coefficients, drift and the group's own shift."""
        log_lr, log_batch, _ = self._draw(N, D, n, seed)
        return np.exp(log_lr), np.exp(log_batch)

    def interval(self, N: float, D: float, mass: float = 0.9) -> tuple[tuple[float, float], tuple[float, float]]:
        """((lr_low, lr_high), (batch_low, batch_high)): each holds the optimum at (N, D) with probability `mass`."""
        if not 0 < mass < 1:
            raise ValueError(f"mass must lie between 0 and 1, got {mass}")
        tails = [0.5 - mass / 2, 0.5 + mass / 2]
        lr, batch = (np.quantile(v, tails) for v in self.draw(N, D, DRAWS, seed=0))
        return (float(lr[0]), float(lr[1])), (float(batch[0]), float(batch[1]))

    def expected_regret(self, N: float, D: float) -> float:
        """Relative loss above the optimum to expect from running `law(N, D)`.

        Mean over draws of where the optimum really is. On a real table 1.6 times the measured regret when groups were
        full, 3 to 11 times when they were few or small: an upper bound.
        """
        log_lr, log_batch, which = self._draw(N, D, DRAWS, seed=0)
        lr, batch = self.law(N, D)
        u, v = np.log(lr) - log_lr, np.log(batch) - log_batch
        height = np.empty(DRAWS)
        for i, fit in enumerate(self.fits):
            mine = which == i
            height[mine] = BOWLS[fit.form](fit.theta[None, 6:], u[None, mine], v[None, mine])[0][0]
        return float(np.clip(height, 0.0, 0.5).mean())

    def height(self, lr: ArrayLike, batch_tokens: ArrayLike, N: ArrayLike, D: ArrayLike) -> Array:
        """Fitted ln L above the bowl's minimum, mean of the fits; shapes broadcast. Trust it near the bottom only."""
        best_lr, best_batch = self.law(N, D)
        u, v = np.broadcast_arrays(
            np.log(np.asarray(lr, float)) - np.log(best_lr),
            np.log(np.asarray(batch_tokens, float)) - np.log(best_batch),
        )
        flat = [BOWLS[f.form](f.theta[None, 6:], u.reshape(1, -1), v.reshape(1, -1))[0][0] for f in self.fits]
        return np.asarray(np.mean(flat, 0).reshape(u.shape))

    def _draw(self, N: float, D: float, n: int, seed: int) -> tuple[Array, Array, NDArray[np.intp]]:
        if not (np.isfinite(N) and np.isfinite(D) and N > 0 and D > 0):
            raise ValueError(f"draws need one positive finite N and D, got N={N}, D={D}")
        rng = np.random.default_rng(seed)
        at_n, at_d = np.log(N) - self.centre[0], np.log(D) - self.centre[1]
        x = np.array([[1, at_n, at_d, 0, 0, 0], [0, 0, 0, 1, at_d, at_n]], float)
        drift = np.diag([0, DRIFT**2, DRIFT**2, 0, DRIFT**2, DRIFT**2])
        which = rng.integers(len(self.fits), size=n)
        noise, out = rng.standard_normal((n, 2)), np.empty((n, 2))
        for i, fit in enumerate(self.fits):
            mine = np.flatnonzero(which == i)
            cell = rng.choice(fit.cells.size, size=mine.size, p=fit.cells)
            own = np.zeros((fit.cells.size, 2, 2))
            own[:, [0, 1], [0, 1]] = fit.shifts**2
            factor = np.linalg.cholesky(x @ (fit.covariance + drift) @ x.T + own)
            out[mine] = x @ fit.theta[:6] + (factor[cell] @ noise[mine][:, :, None])[:, :, 0]
        return out[:, 0], out[:, 1], which


def fit_hp_law(runs: pd.DataFrame, *, seed: int = 0) -> HPFit:
    """Fit lr*(N, D) and B*(N, D) to runs with columns N, D, lr, batch_tokens, loss; optional parametrization, run_id.

    Groups are exact (N, D). Runs without a finite positive loss are dropped and counted. When every run's
    parametrization is "mup", the prior says that lr* hardly moves with N. Small tables always get an answer; `status`
    says what in it is the prior's. `seed` is part of every fit's interface and unused: only `draw` is random.

    ValueError on missing columns or impossible settings, FitError when no run is left.
    """
    del seed
    table, n_diverged, n_far = _usable(runs)
    y, lr, batch = (np.log(table[c].to_numpy(float)) for c in ("loss", "lr", "batch_tokens"))
    sizes, group = np.unique(table[["N", "D"]].to_numpy(float), axis=0, return_inverse=True)
    group = group.ravel()
    centre = (float(np.log(sizes[:, 0]).mean()), float(np.log(sizes[:, 1]).mean()))
    n, d = np.log(sizes[group, 0]) - centre[0], np.log(sizes[group, 1]) - centre[1]
    mup = "parametrization" in table and bool((table["parametrization"] == "mup").all())
    data = _Data(y, lr, batch, n, d, group, len(sizes))
    fits = tuple(_fit_bowl(form, tau, data, _prior(form, centre, mup)) for form in BOWLS for tau in WIDTHS)

    a0, a1, a2, b0, b1, b2 = (float(v) for v in np.mean([f.theta[:6] for f in fits], 0))
    law = HPLaw(
        lr_coef=float(np.exp(a0 - a1 * centre[0] - a2 * centre[1])), lr_N=a1, lr_D=a2,
        batch_coef=float(np.exp(b0 - b1 * centre[1] - b2 * centre[0])), batch_N=b2, batch_D=b1,
    )  # fmt: skip
    floors = np.mean([f.floors for f in fits], 0)
    variance = np.mean([f.floor_variance for f in fits], 0) + np.var([f.floors for f in fits], 0)
    evidence = pd.DataFrame(
        {"N": sizes[:, 0], "D": sizes[:, 1], "loss": np.exp(floors), "sd": np.sqrt(variance), "n": np.bincount(group)}
    )
    identified = {
        name: bool(np.sqrt(np.mean([f.cells @ f.covariance[:, i, i] for f in fits])) < VAGUE)
        for name, i in (("lr", 0), ("batch_tokens", 3))
    }
    columns = ("N", "D", "lr", "batch_tokens")
    return HPFit(
        law=law,
        fits=fits,
        centre=centre,
        floors=evidence,
        status=" ".join(_doubts(table, evidence, law, identified)) or "ok",
        identified=identified,
        ranges={c: (float(table[c].min()), float(table[c].max())) for c in columns},
        used=table,
        run_ids=tuple(table["run_id"]) if "run_id" in table else tuple(table.index),
        n_runs=len(table),
        n_diverged=n_diverged,
        n_far=n_far,
    )


def _usable(runs: pd.DataFrame) -> tuple[pd.DataFrame, int, int]:
    missing = [c for c in ("N", "D", "lr", "batch_tokens", "loss") if c not in runs]
    if missing:
        raise ValueError(f"the lr/batch law needs columns N, D, lr, batch_tokens, loss; missing: {', '.join(missing)}")
    loss = runs["loss"].to_numpy(float)
    good = np.isfinite(loss) & (loss > 0)
    for name in ("N", "D", "lr", "batch_tokens"):
        values = runs[name].to_numpy(float)
        bad = np.flatnonzero(good & ~(np.isfinite(values) & (values > 0)))
        if bad.size:
            rows = ", ".join(map(str, bad[:10]))
            raise ValueError(f"{name} must be positive and finite, got {values[bad[0]]} (rows {rows}): drop these runs")
    table = runs[good]
    if table.empty:
        raise FitError(f"the lr/batch law needs runs with a finite positive loss, got {len(runs)} runs, none usable")
    log_loss = np.log(table["loss"])
    near = log_loss - log_loss.groupby([table["N"], table["D"]]).transform("min") <= FAR
    return table[near], int((~good).sum()), int((~near).sum())


def _doubts(table: pd.DataFrame, floors: pd.DataFrame, law: HPLaw, identified: dict[str, bool]) -> list[str]:
    out: list[str] = []
    if len(floors) < 2:
        out.append("One (N, D) group: how lr* and B* move with size is assumed, not measured.")
    else:
        out += [
            f"One distinct {c}: the exponents of {c} are assumed, not measured."
            for c in ("N", "D")
            if floors[c].nunique() < 2
        ]
    best = dict(zip(("lr", "batch_tokens"), law(floors["N"], floors["D"]), strict=True))
    for name, word in (("lr", "learning rate"), ("batch_tokens", "batch")):
        if table[name].nunique() < 2:
            out.append(f"One {word}: its optimum is assumed, not measured.")
        elif name == "lr" and not identified["lr"] and table["batch_tokens"].nunique() < 2:
            out.append("The best learning rate is known at the one batch that was tried, not at the best batch.")
        elif not identified[name]:
            out.append(f"The best {word} is hardly identified: more spread around it, or more runs, are needed.")
        span = table.groupby(["N", "D"])[name].agg(["min", "max"])  # sorted by N, D, as the floors are
        low, high = best[name] < span["min"].to_numpy(), best[name] > span["max"].to_numpy()
        for side, beyond in (("below", low), ("above", high)):
            if table[name].nunique() > 1 and beyond.mean() > 0.5:
                out.append(f"The best {word} lies {side} the runs' range in {beyond.sum()} of {len(floors)} groups.")
    return out


# --- one bowl ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    y: Array  # (m,) ln loss
    lr: Array  # (m,) logs
    batch: Array  # (m,)
    n: Array  # (m,) ln N less the centre
    d: Array  # (m,)
    group: NDArray[np.intp]  # (m,)
    groups: int

    @property
    def member(self) -> Array:
        """(m, groups) one-hot: group sums are matrix products."""
        return np.eye(self.groups)[self.group]


def _cubic(shape: Array, u: Array, v: Array) -> tuple[Array, Array, Array, Array]:
    """h1 (u + k v)² + h2 v² + c1 u³ + c2 u² v + c3 u v² + c4 v³"""
    log_h1, log_h2, k, c1, c2, c3, c4 = shape.T[:, :, None]
    h1, h2, z = np.exp(np.clip(log_h1, -30, 30)), np.exp(np.clip(log_h2, -30, 30)), u + k * v
    first, second = h1 * z * z, h2 * v * v
    uu, uv, vv = u * u, u * v, v * v
    value = first + second + c1 * uu * u + c2 * uu * v + c3 * u * vv + c4 * vv * v
    by_u = 2 * h1 * z + 3 * c1 * uu + 2 * c2 * uv + c3 * vv
    by_v = 2 * h1 * z * k + 2 * h2 * v + c2 * uu + 2 * c3 * uv + 3 * c4 * vv
    return value, by_u, by_v, np.stack([first, second, 2 * h1 * z * v, uu * u, uu * v, u * vv, vv * v], 2)


def _exponential(shape: Array, u: Array, v: Array) -> tuple[Array, Array, Array, Array]:
    """h1 phi(u + k v; s1) + h2 phi(v + b u; s2): convex, steeper on one side"""
    log_h1, log_h2, k, b, s1, s2 = shape.T[:, :, None]
    h1, h2 = np.exp(np.clip(log_h1, -30, 30)), np.exp(np.clip(log_h2, -30, 30))
    f1, z1, t1 = _phi(u + k * v, s1)
    f2, z2, t2 = _phi(v + b * u, s2)
    by_u, by_v = h1 * z1 + h2 * z2 * b, h1 * z1 * k + h2 * z2
    by_shape = np.stack([h1 * f1, h2 * f2, h1 * z1 * v, h2 * z2 * u, h1 * t1, h2 * t2], 2)
    return h1 * f1 + h2 * f2, by_u, by_v, by_shape


def _phi(z: Array, s: Array) -> tuple[Array, Array, Array]:
    """phi(z; s) = 2 (e^(sz) - sz - 1) / s², z² at s = 0; with its derivatives by z and s."""
    x = np.clip(s * z, -40.0, 40.0)
    tiny = np.abs(x) < 1e-2
    safe = np.where(tiny, 1.0, x)
    grown = np.expm1(safe)
    g = np.where(tiny, 1 + x / 3 + x**2 / 12 + x**3 / 60, 2 * (grown - safe) / safe**2)
    slope = np.where(tiny, 1 / 3 + x / 6 + x**2 / 20 + x**3 / 90, (2 * safe * grown - 4 * (grown - safe)) / safe**3)
    first = np.where(tiny, 1 + x / 2 + x**2 / 6 + x**3 / 24, grown / safe)
    return z * z * g, 2 * z * first, z**3 * slope


BOWLS: dict[str, Bowl] = {"cubic": _cubic, "exponential": _exponential}


def _prior(form: str, centre: tuple[float, float], mup: bool) -> tuple[Array, Array]:
    """(mean, sd) of theta. Step Law's exponents widened; measured to matter on small sweeps."""
    if mup:
        # Assumed: lr* is stored at base width, where muP leaves it alone; with tokens it falls as D^-.32 at fixed batch
        # (arXiv 2409.19913), plus about half of the batch's exponent. The level is that of the proxies' default.
        a1, a2, level, N, D = (0.0, 0.1), (-0.1, 0.25), np.log(2.0**-7), 1e5, 2e5
    else:
        a1, a2, level, N, D = (-0.6, 0.3), (0.2, 0.3), np.log(2e-3), 4e8, 2e10
    b1, b2 = (0.5, 0.2), (0.0, 0.2)
    a0 = level + a1[0] * (centre[0] - np.log(N)) + a2[0] * (centre[1] - np.log(D))
    b0 = np.log(4e5) + b1[0] * (centre[1] - np.log(2e10)) + b2[0] * (centre[0] - np.log(4e8))
    pairs = [(a0, 1.5), a1, a2, (b0, 1.5), b1, b2, (np.log(0.01), 1.0), (np.log(0.005), 1.0), (-0.3, 0.4)]
    pairs += [(0.0, 0.01)] * 4 if form == "cubic" else [(0.0, 0.4), (0.5, 0.5), (0.0, 0.5)]
    mean, sd = np.array(pairs, float).T
    return mean, sd


def _model(form: str, theta: Array, data: _Data) -> tuple[Array, Array]:
    """Bowl (k, m) and its Jacobian (k, m, p)."""
    a0, a1, a2, b0, b1, b2 = theta[:, :6].T[:, :, None]
    u, v = data.lr - (a0 + a1 * data.n + a2 * data.d), data.batch - (b0 + b1 * data.d + b2 * data.n)
    value, by_u, by_v, by_shape = BOWLS[form](theta[:, 6:], u, v)
    moving = [-by_u, -by_u * data.n, -by_u * data.d, -by_v, -by_v * data.d, -by_v * data.n]
    return value, np.concatenate([np.stack(moving, 2), by_shape], 2)


def _fit_bowl(form: str, tau: float, data: _Data, prior: tuple[Array, Array]) -> BowlFit:
    mean, sd = prior
    precision = sd**-2.0
    member = data.member
    lowest = np.full(data.groups, np.inf)
    np.minimum.at(lowest, data.group, data.y)
    gap = data.y - lowest[data.group]

    near = gap <= 0.01
    centroid = mean.copy()
    centroid[0] = np.mean((data.lr - mean[1] * data.n - mean[2] * data.d)[near])
    centroid[3] = np.mean((data.batch - mean[4] * data.d - mean[5] * data.n)[near])
    theta = np.stack([mean, centroid])

    first = np.exp(-gap / tau)
    weight = np.tile(first, (2, 1))
    s = np.full(2, 0.004)
    for _ in range(6):

        def local(at: Array, rows: NDArray[np.intp], weight: Array = weight, s: Array = s) -> Local:
            w = weight[rows]
            value, jacobian = _model(form, at, data)
            r, jacobian = _less_group_mean(data.y - value, w, member), _less_group_mean(jacobian, w, member)
            return penalised_squares(r, jacobian, w / s[rows, None] ** 2, at - mean, precision)

        theta = minimise(local, theta, tolerance=1e-9, iterations=60).theta
        value, _ = _model(form, theta, data)
        r = _less_group_mean(data.y - value, weight, member)
        total = weight.sum(1)
        used, weight = weight, 5 / (4 + (r / s[:, None]) ** 2) / (1 + (value / tau) ** 2)
        s = np.sqrt(np.sum(used * r**2, 1) / np.maximum(total - data.groups - 8, total / 4))
        s = np.maximum(s, LEAST_SD)

    # The two ends weigh runs each in its own way, so compare them on one scale: the first pass's weights, Student's t
    r = _less_group_mean(data.y - value, np.tile(first, (2, 1)), member)
    misfit = 2.5 * np.sum(first * np.log1p((r / s.min()) ** 2 / 4), 1) + 0.5 * np.sum(((theta - mean) / sd) ** 2, 1)
    best = int(np.argmin(misfit))
    return _evidence(form, tau, theta[best], float(s[best]), used[best], data, mean, precision)


def _less_group_mean(values: Array, weight: Array, member: Array) -> Array:
    """values (k, m) or (k, m, p) less the weighted mean of their group: offsets profiled out."""
    total = weight @ member
    if values.ndim == 2:
        return values - ((weight * values) @ member / total) @ member.T
    mean = np.swapaxes(member.T @ (weight[:, :, None] * values), 1, 2) / total[:, None, :]
    return values - np.swapaxes(mean @ member.T, 1, 2)


def _evidence(
    form: str, tau: float, theta: Array, s: float, weight: Array, data: _Data, mean: Array, precision: Array
) -> BowlFit:
    """Linearise at the fit; each group's optimum is shifted by its own (lr, batch) of unknown sds, on a grid."""
    value, jacobian = (v[0] for v in _model(form, theta[None], data))
    member, p = data.member, theta.size
    total = weight @ member
    offset = (weight * (data.y - value)) @ member / total
    slope = (member.T @ (weight[:, None] * jacobian)) / total[:, None]  # (groups, p)
    x = np.concatenate([jacobian - slope[data.group], (data.y - value - offset[data.group])[:, None]], 1) / s
    gram = np.stack([(x[i].T * weight[i]) @ x[i] for i in (data.group == g for g in range(data.groups))])

    prior = np.diag(precision)
    away = precision * (theta - mean)
    grid = np.array([(lr, batch) for lr in SHIFTS for batch in SHIFTS])
    score, covariance = np.empty(len(grid)), np.empty((len(grid), p, p))
    for i, sds in enumerate(grid):
        inner = np.eye(2) + sds[:, None] * gram[:, [0, 3]][:, :, [0, 3]] * sds  # (groups, 2, 2)
        across = sds[:, None] * gram[:, [0, 3]]  # (groups, 2, p + 1)
        left = np.sum(gram - np.swapaxes(across, 1, 2) @ np.linalg.solve(inner, across), 0)
        precise = left[:p, :p] + prior
        covariance[i] = np.linalg.inv(precise)
        pull = left[:p, p] - away
        misfit = left[p, p] - pull @ covariance[i] @ pull
        log_prior = np.sum((np.log(sds / 0.1) / 0.5) ** 2)  # log-normal about .1
        score[i] = -0.5 * (np.linalg.slogdet(inner)[1].sum() + np.linalg.slogdet(precise)[1] + misfit + log_prior)
    cells = np.exp(score - score.max())
    cells /= cells.sum()
    spread = np.tensordot(cells, covariance, 1)
    floor_variance = s**2 / total + np.einsum("gp,pq,gq->g", slope, spread, slope)
    return BowlFit(form, tau, theta, s, covariance[:, :6, :6], grid, cells, offset, floor_variance)
