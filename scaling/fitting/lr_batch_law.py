"""Fit the law of learning rate and batch size: one bowl for all sizes, whose minimum moves with N and D.

Every run of a group is used, not only the best: the best of ten random runs is not an optimum. Two shapes of the bowl
(`scaling.fitting.bowl`) times two widths of the weights are fitted, each is used with a B* that moves with N and with
one that does not, and the eight are averaged. On a public table of real runs (Step Law, arXiv 2503.04715: 17 groups),
fitted to the small groups and evaluated at the large ones, the predicted settings lost 0.09 % on average and 0.16 % in
the worst of seven splits. The noise of a single run there is 0.09 %.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from scaling.common.arrays import Array
from scaling.fitting.bowl import B2_INDEX, BOWLS, BowlFit, fit_bowl, make_precision, make_prior
from scaling.fitting.groups import GroupedRuns, Groups, cluster_values, group_runs
from scaling.fitting.loss_law import FitError
from scaling.fitting.minima import compute_untried_depths
from scaling.laws.formulas import HPLaw

logger = logging.getLogger("muscale.scaling")

# Heights (in ln L) above the fitted minimum at which a run has half the weight.
TAUS = (0.01, 0.02)
# Runs further above the best of their group, in ln L, belong to another regime.
MAX_EXCESS = 0.30
# Real laws curve: ln lr* and ln B* drift from them as a random walk in ln N and ln D does that starts at the runs'
# centre, by these standard deviations in the first e-fold. Set on the splits of the public table, 1 to 3 e-folds from
# the centre, where 90 % intervals then hold 91 % of both. A drift of the exponents, which grows in proportion to the
# distance, holds as much there, but is too wide at far targets (studies/LOG.md). Planted power laws need none.
DRIFT_LR, DRIFT_BATCH = 0.05, 0.08
DRIFT = np.array([0, DRIFT_LR, DRIFT_LR, 0, DRIFT_BATCH, DRIFT_BATCH])
# Prior odds that B* does not move with N. Assumed, not measured: three studies found this (arXiv 2410.21676,
# 2505.13738, 2503.04715). The runs of the last one, fitted together, give N^-0.15, which misled on another architecture
# family.
STILL_ODDS = 2.0
# An optimum is not identified if its sd (of ln lr or ln B at the centre of the data) exceeds this. Assumed, not
# measured.
MAX_OPTIMUM_SD = 0.5
# More groups than these add time, but nothing to what is known of a dozen coefficients.
MAX_GROUPS = 3000
# Draws for intervals and expectations.
DRAWS = 4000


@dataclass(frozen=True)
class HPFit:
    """A law of learning rate and batch size with its evidence, as `fit_hp_law` returns it.

    Attributes:
        law: lr*(N, D) and B*(N, D).
        fits: The averaged fits; their weights sum to 1.
        centre: Mean ln N and mean ln D over the groups.
        floors: Lowest loss of each group within the settings that it tried. Columns N, D, loss, sd (of ln loss), n
            (number of runs) and untried (how far the minimum of the bowl lies below it, in ln loss).
        status: "ok", or sentences on what is doubtful.
        identified: For "lr" and "batch_tokens", whether the runs rather than the prior determine the optimum.
        ranges: Smallest and largest N, D, lr and batch_tokens of the runs used.
        used: The runs used.
        run_ids: Identifiers of the runs used.
        n_runs: Number of runs used.
        n_diverged: Number of runs dropped because their loss is not finite and positive.
        n_far: Number of runs dropped because they are more than `MAX_EXCESS` above the best of their group.
        n_without_settings: Number of runs dropped because their learning rate or batch size is missing.

    Example:
        >>> fit = fit_hp_law(runs)
        >>> lr, batch_tokens = fit.law(7e9, 1.4e12)
        >>> (lr_low, lr_high), (batch_low, batch_high) = fit.interval(7e9, 1.4e12)
    """

    law: HPLaw
    fits: tuple[BowlFit, ...]
    centre: tuple[float, float]
    floors: pd.DataFrame
    status: str
    identified: dict[str, bool]
    ranges: dict[str, tuple[float, float]]
    used: pd.DataFrame
    run_ids: tuple[object, ...]
    n_runs: int
    n_diverged: int
    n_far: int
    n_without_settings: int

    def draw(self, N: float, D: float, n: int, seed: int) -> tuple[Array, Array]:
        """Draw the optimum of a new group at (N, D): over fits, coefficients, drift and the group's own shift.

        Args:
            N: Parameters that multiply tokens.
            D: Training tokens.
            n: Number of draws.
            seed: Seed of the draws.

        Returns:
            lr* [n], and B* [n] in tokens per step.
        """
        log_lr, log_batch, _ = self._draw(N, D, n, seed)
        return np.exp(log_lr), np.exp(log_batch)

    def interval(self, N: float, D: float, mass: float = 0.9) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return intervals for the optimum at (N, D).

        Args:
            N: Parameters that multiply tokens.
            D: Training tokens.
            mass: Probability that each interval contains the optimum.

        Returns:
            ((lr_low, lr_high), (batch_low, batch_high)), batch sizes in tokens per step.
        """
        if not 0 < mass < 1:
            raise ValueError(f"mass must lie between 0 and 1, got {mass}")
        tails = [0.5 - mass / 2, 0.5 + mass / 2]
        lr, batch = (np.quantile(v, tails) for v in self.draw(N, D, DRAWS, seed=0))
        return (float(lr[0]), float(lr[1])), (float(batch[0]), float(batch[1]))

    def expected_regret(self, N: float, D: float) -> float:
        """Return the relative loss above the optimum that is expected when a new group runs `law(N, D)`.

        It is the mean over draws of the true optimum. In general it is an upper bound: 1.1 times the measured regret on
        a real table with full groups, 1.6 times with 20 runs in each, 2.6 times with 8, and 2 to 5 times for plans of
        30 to 40 runs and a far target. Below the smallest N of the runs it is no bound: 0.6 to 0.8 times.

        Args:
            N: Parameters that multiply tokens.
            D: Training tokens.
        """
        log_lr, log_batch, which = self._draw(N, D, DRAWS, seed=0)
        lr, batch = self.law(N, D)
        u, v = np.log(lr) - log_lr, np.log(batch) - log_batch
        n, d = np.log(N) - self.centre[0], np.log(D) - self.centre[1]
        height = np.empty(DRAWS)
        for i, fit in enumerate(self.fits):
            drawn = which == i
            height[drawn] = fit.height(u[drawn], v[drawn], n, d)
        return float(np.clip(height, 0.0, 0.5).mean())

    def exponents(self, mass: float = 0.9) -> dict[str, tuple[float, float]]:
        """Return intervals (low, high) of the exponents lr_N, lr_D, batch_D and batch_N, valid beyond the data.

        Args:
            mass: Probability that each interval contains the exponent.
        """
        if not 0 < mass < 1:
            raise ValueError(f"mass must lie between 0 and 1, got {mass}")
        rng = np.random.default_rng(0)
        parts = []
        for fit in self.fits:
            cell = rng.choice(fit.cells.size, size=max(1, round(DRAWS * fit.weight)), p=fit.cells)
            sd = np.sqrt(np.diagonal(fit.covariance, axis1=1, axis2=2)[cell] + DRIFT**2)
            parts.append(fit.theta[: B2_INDEX + 1] + sd * rng.standard_normal(sd.shape))
        low, high = np.quantile(np.concatenate(parts), [0.5 - mass / 2, 0.5 + mass / 2], axis=0)
        columns = {"lr_N": 1, "lr_D": 2, "batch_D": 4, "batch_N": B2_INDEX}
        return {name: (float(low[i]), float(high[i])) for name, i in columns.items()}

    def height(self, lr: ArrayLike, batch_tokens: ArrayLike, N: ArrayLike, D: ArrayLike) -> Array:
        """Return the fitted ln L above the minimum of the bowl, averaged over the fits.

        It is only reliable near the minimum.

        Args:
            lr: Learning rate. All shapes broadcast.
            batch_tokens: Batch size in tokens per step.
            N: Parameters that multiply tokens.
            D: Training tokens.
        """
        best_lr, best_batch = self.law(N, D)
        u, v, n, d = np.broadcast_arrays(
            np.log(np.asarray(lr, float)) - np.log(best_lr),
            np.log(np.asarray(batch_tokens, float)) - np.log(best_batch),
            np.log(np.asarray(N, float)) - self.centre[0],
            np.log(np.asarray(D, float)) - self.centre[1],
        )
        flat = np.sum([f.weight * f.height(u.ravel(), v.ravel(), n.ravel(), d.ravel()) for f in self.fits], 0)
        return np.asarray(flat).reshape(u.shape)

    def _draw(self, N: float, D: float, n: int, seed: int) -> tuple[Array, Array, NDArray[np.intp]]:
        """Draw ln lr* [n], ln B* [n], and the index of the fit of each draw [n]."""
        if not (np.isfinite(N) and np.isfinite(D) and N > 0 and D > 0):
            raise ValueError(f"draws need one positive finite N and D, got N={N}, D={D}")
        rng = np.random.default_rng(seed)
        at_n, at_d = np.log(N) - self.centre[0], np.log(D) - self.centre[1]
        x = np.array([[1, at_n, at_d, 0, 0, 0], [0, 0, 0, 1, at_d, at_n]], float)
        drift = np.array([DRIFT_LR, DRIFT_BATCH]) ** 2 * (abs(at_n) + abs(at_d))
        which = rng.choice(len(self.fits), size=n, p=[f.weight for f in self.fits])
        noise, out = rng.standard_normal((n, 2)), np.empty((n, 2))
        for i, fit in enumerate(self.fits):
            drawn = np.flatnonzero(which == i)
            cell = rng.choice(fit.cells.size, size=drawn.size, p=fit.cells)
            shift = np.zeros((fit.cells.size, 2, 2))
            shift[:, [0, 1], [0, 1]] = fit.shifts**2 + drift
            factor = np.linalg.cholesky(x @ fit.covariance @ x.T + shift)
            out[drawn] = x @ fit.theta[: B2_INDEX + 1] + (factor[cell] @ noise[drawn][:, :, None])[:, :, 0]
        return out[:, 0], out[:, 1], which


def fit_hp_law(runs: pd.DataFrame, *, seed: int = 0) -> HPFit:
    """Fit the optimal learning rate lr*(N, D) and batch size B*(N, D) to runs.

    Both are power laws in N and D (the form of Step Law, arXiv 2503.04715), whose optimum is the minimum of one bowl in
    (ln lr, ln B) that all groups of equal (N, D) share. Every run is used, not only the best of each group. If the
    parametrization of every run is "mup", the prior says that lr* hardly moves with N.

    A small table always gets a result, which for a single run is the prior itself; `status` says what comes from the
    prior. The prior of the levels assumes parameters and tokens: with other units a few runs are not enough.

    Args:
        runs: One row per run, with columns N, D (tokens), lr, batch_tokens (tokens per step) and loss (nats per token);
            optionally parametrization and run_id. Runs without a finite positive loss, or with NaN as learning rate or
            batch size, are dropped and counted.
        seed: Unused: only `HPFit.draw` is random. Every fit accepts it.

    Returns:
        The fit. Its `status` is "ok", or says in sentences what is doubtful.

    Raises:
        ValueError: If a column is missing, or a setting is not positive and finite.
        FitError: If no run is usable.

    Example:
        >>> fit = fit_hp_law(runs)
        >>> fit.law.lr_D, fit.exponents()["lr_D"]
    """
    del seed
    table, n_diverged, n_far, n_without = _select_usable(runs)
    groups = group_runs(table["N"].to_numpy(float), table["D"].to_numpy(float))
    if groups.counts.size > MAX_GROUPS:
        logger.info(
            f"The laws are fitted to a random {MAX_GROUPS:,} of {groups.counts.size:,} groups of equal N and D."
        )
        chosen = np.random.default_rng(0).permutation(groups.counts.size)[:MAX_GROUPS]
        table = table[np.isin(groups.of, chosen)]
        groups = group_runs(table["N"].to_numpy(float), table["D"].to_numpy(float))
    table = table.iloc[groups.order]
    centre = (float(np.log(groups.N).mean()), float(np.log(groups.D).mean()))
    N, D, y, lr, batch = np.log(table[["N", "D", "loss", "lr", "batch_tokens"]].to_numpy(float)).T
    mup = "parametrization" in table and bool((table["parametrization"] == "mup").all())
    data = GroupedRuns(y, lr, batch, N - centre[0], D - centre[1], groups.starts)
    priors = {form: make_prior(form, centre, mup) for form in BOWLS}
    bowls = [
        fit_bowl(form, tau, data, (mean, make_precision(sd, mup)))
        for form, (mean, sd) in priors.items()
        for tau in TAUS
    ]
    fits = tuple(f for bowl in bowls for f in _split_by_b2(bowl, 1 / len(bowls)))

    a0, a1, a2, b0, b1, b2 = (float(v) for v in np.sum([f.weight * f.theta[: B2_INDEX + 1] for f in fits], 0))
    law = HPLaw(
        lr_coef=float(np.exp(a0 - a1 * centre[0] - a2 * centre[1])), lr_N=a1, lr_D=a2,
        batch_coef=float(np.exp(b0 - b1 * centre[1] - b2 * centre[0])), batch_N=b2, batch_D=b1,
    )  # fmt: skip
    identified = {
        name: bool(np.sqrt(np.mean([f.spread[i, i] for f in bowls])) < MAX_OPTIMUM_SD)
        for name, i in (("lr", 0), ("batch_tokens", 3))
    }
    depths = [compute_untried_depths([f], data, identified) for f in bowls]
    lowest = [f.floors + depth for f, depth in zip(bowls, depths, strict=True)]
    variance = np.mean([f.floor_variance for f in bowls], 0) + np.var(lowest, 0)
    evidence = pd.DataFrame(
        {
            "N": groups.N,
            "D": groups.D,
            "loss": np.exp(np.mean(lowest, 0)),
            "sd": np.sqrt(variance),
            "n": groups.counts,
            "untried": np.mean(depths, 0),
        }
    )
    columns = ("N", "D", "lr", "batch_tokens")
    return HPFit(
        law=law,
        fits=fits,
        centre=centre,
        floors=evidence,
        status=" ".join(_find_doubts(table, groups, evidence, law, identified)) or "ok",
        identified=identified,
        ranges={c: (float(table[c].min()), float(table[c].max())) for c in columns},
        used=table,
        run_ids=tuple(table["run_id"]) if "run_id" in table else tuple(table.index),
        n_runs=len(table),
        n_diverged=n_diverged,
        n_far=n_far,
        n_without_settings=n_without,
    )


@cache
def _compute_b2_variance() -> float:
    """Return the prior variance of b2."""
    _, sd = make_prior("cubic", (0.0, 0.0), False)
    return float(np.linalg.inv(make_precision(sd, False))[B2_INDEX, B2_INDEX])


def _split_by_b2(fit: BowlFit, weight: float) -> tuple[BowlFit, BowlFit]:
    """Return the fit with a B* that moves with N, and the fit with one that does not, with their weights.

    The odds are the Savage-Dickey ratio: the posterior density of b2 at zero over its prior density, both widened by
    the drift beyond the data.
    """
    before, after = _compute_b2_variance() + DRIFT_BATCH**2, fit.spread[B2_INDEX, B2_INDEX] + DRIFT_BATCH**2
    log_odds = np.log(STILL_ODDS) - 0.5 * (fit.theta[B2_INDEX] ** 2 / after + np.log(after / before))
    still = weight / (1 + np.exp(-log_odds))
    return replace(fit, weight=weight - still), fit.without_b2(still)


def _select_usable(runs: pd.DataFrame) -> tuple[pd.DataFrame, int, int, int]:
    """Return the usable runs; how many diverged, lie far above the best of their group, or lack a setting."""
    missing = [c for c in ("N", "D", "lr", "batch_tokens", "loss") if c not in runs]
    if missing:
        raise ValueError(f"the lr/batch law needs columns N, D, lr, batch_tokens, loss; missing: {', '.join(missing)}")
    loss, settings = runs["loss"].to_numpy(float), runs[["lr", "batch_tokens"]].to_numpy(float)
    good, known = np.isfinite(loss) & (loss > 0), ~np.isnan(settings).any(1)
    for name in ("N", "D", "lr", "batch_tokens"):
        values = runs[name].to_numpy(float)
        bad = np.flatnonzero(good & known & ~(np.isfinite(values) & (values > 0)))
        if bad.size:
            rows = ", ".join(map(str, bad[:10]))
            raise ValueError(f"{name} must be positive and finite, got {values[bad[0]]} (rows {rows}): drop these runs")
    table = runs[good & known]
    if table.empty:
        raise FitError(
            f"the lr/batch law needs runs with lr, batch_tokens and a finite positive loss, got {len(runs)} runs, none "
            "usable"
        )
    groups = group_runs(table["N"].to_numpy(float), table["D"].to_numpy(float))
    log_loss = np.log(table["loss"].to_numpy(float))
    near = log_loss - np.minimum.reduceat(log_loss[groups.order], groups.starts)[groups.of] <= MAX_EXCESS
    return table[near], int((~good).sum()), int((~near).sum()), int((good & ~known).sum())


def _find_doubts(
    table: pd.DataFrame, groups: Groups, floors: pd.DataFrame, law: HPLaw, identified: dict[str, bool]
) -> list[str]:
    """Return sentences on what is doubtful in the law. The table is sorted by group."""
    out: list[str] = []
    if len(floors) < 2:
        out.append("One (N, D) group: how lr* and B* move with size is assumed, not measured.")
    else:
        out += [
            f"One distinct {c}: the exponents of {c} are assumed, not measured."
            for c in ("N", "D")
            if cluster_values(np.log(floors[c].to_numpy(float))).max() == 0
        ]
    best = dict(zip(("lr", "batch_tokens"), law(table["N"], table["D"]), strict=True))
    for name, word in (("lr", "learning rate"), ("batch_tokens", "batch")):
        values = table[name].to_numpy(float)
        if table[name].nunique() < 2:
            out.append(f"One {word}: its optimum is assumed, not measured.")
            continue
        if name == "lr" and not identified["lr"] and table["batch_tokens"].nunique() < 2:
            out.append("The best learning rate is known at the one batch that was tried, not at the best batch.")
        elif not identified[name]:
            out.append(f"The best {word} is hardly identified: more spread around it, or more runs, are needed.")
        low, high = np.minimum.reduceat(values, groups.starts), np.maximum.reduceat(values, groups.starts)
        optimum = np.asarray(best[name])[groups.starts]
        # A group with one value has no range of its own.
        varied = low < high
        if not varied.any():
            continue
        for side, beyond in (("below", optimum < low), ("above", optimum > high)):
            if np.mean(beyond[varied]) > 0.5:
                count = int(beyond[varied].sum())
                out.append(f"The best {word} lies {side} the runs' range in {count} of {int(varied.sum())} groups.")
    return out
