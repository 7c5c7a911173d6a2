"""Fit a loss law to runs: the Huber optimum is the law, and an average of two forms is the prediction.

The law is that of Hoffmann et al. (arXiv 2203.15556), fitted as in their appendix D.2 with Huber loss (delta 1e-3) on
log loss. Beyond its data that form is mostly too high, so a prediction averages two forms
(`scaling.fitting.averaging`), and their disagreement widens its interval.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from scaling.common.arrays import Array
from scaling.fitting.averaging import AveragedForm, fit_averaged_forms, whiten_runs
from scaling.fitting.groups import cluster_values
from scaling.fitting.huber import find_huber_optimum, fit_bootstraps, make_loss_law
from scaling.laws.formulas import LossLaw

# Draws of the coefficients for the interval of an optimum.
DRAWS = 400
# Scatter of runs about a loss law that is typical of real tables, sd of ln loss.
SCATTER = 0.003
# Share of the squared disagreement of the forms that enters the variance.
DISAGREEMENT_SHARE = 0.25


class FitError(ValueError):
    """The requested fit cannot exist on these data."""


@dataclass(frozen=True)
class Allocation:
    """The best division of a compute budget between N and D, with intervals.

    Attributes:
        N: Optimal number of parameters.
        D: Optimal number of training tokens.
        N_interval: (low, high) of the optimal N.
        D_interval: (low, high) of the optimal D.
        bounded: Whether the interval ends inside the searched range of N.
    """

    N: float
    D: float
    N_interval: tuple[float, float]
    D_interval: tuple[float, float]
    bounded: bool


@dataclass(frozen=True)
class Fit:
    """A loss law with its evidence, as `fit_loss_law` returns it.

    `law` is the Huber optimum of Hoffmann's form. `predict`, `interval` and `optimum` instead average two forms, one
    with a floor and one without, because a single form errs about twice as much beyond its data.

    Attributes:
        law: L(N, D) = E + A / N^alpha + B / D^beta, nats per token.
        samples: The law refitted to bootstraps of the rows; empty unless requested.
        status: "ok", or sentences on what is doubtful.
        ranges: Smallest and largest "N" and "D" of the runs.
        run_ids: Identifiers of the runs.
        objective: Sum of the Huber terms at the law.
        n_effective: Effective number of runs, after weighting by compute.
        centre: Mean ln N and mean ln D of the runs.
        members: The two averaged forms.

    Example:
        >>> fit = fit_loss_law(runs["N"], runs["D"], runs["loss"])
        >>> fit.predict(7e9, 1.4e12)
        >>> low, high = fit.interval(7e9, 1.4e12, mass=0.8)
    """

    law: LossLaw
    samples: list[LossLaw]
    status: str
    ranges: dict[str, tuple[float, float]]
    run_ids: tuple[Hashable, ...]
    objective: float
    n_effective: float
    centre: tuple[float, float]
    members: tuple[AveragedForm, ...]

    def predict(self, N: ArrayLike, D: ArrayLike) -> Array:
        """Return the expected loss, the average of the two forms in logs.

        Args:
            N: Parameters that multiply tokens. Shapes of N and D broadcast.
            D: Training tokens.

        Returns:
            Loss in nats per token. Far beyond the data, `law(N, D)` errs about twice as much.
        """
        return np.asarray(np.exp(self._moments(N, D)[0]))

    def interval(self, N: ArrayLike, D: ArrayLike, mass: float = 0.8) -> tuple[Array, Array]:
        """Return an interval for the loss of one new run, centred on `predict` in logs.

        At an N that was trained, it is the interval for that same model. It is wider where no run had this N.

        Args:
            N: Parameters that multiply tokens. Shapes of N and D broadcast.
            D: Training tokens.
            mass: Probability that the interval contains the loss.

        Returns:
            (low, high) in nats per token.
        """
        if not 0 < mass < 1:
            raise ValueError(f"mass must lie between 0 and 1, got {mass}")
        mean, spread, variance = self._moments(N, D)
        noise = sum(m.weight * m.noise for m in self.members)
        reach = ndtri(0.5 + mass / 2) * np.sqrt(variance + noise**2 + DISAGREEMENT_SHARE * spread**2)
        return np.asarray(np.exp(mean - reach)), np.asarray(np.exp(mean + reach))

    def optimum(self, C: float, mass: float = 0.8, *, seed: int = 0) -> Allocation:
        """Return the N and D of lowest predicted loss under C = 6 N D, by the average of the forms.

        The interval contains the same minimum for draws of the coefficients of both forms, in proportion to their
        weights. Minima are sought from 1e-3 to 1e4 times the sizes of the runs.

        Args:
            C: Training compute in FLOPs.
            mass: Probability that the interval contains the optimum.
            seed: Seed of the draws.

        Raises:
            FitError: If the predicted loss has no minimum inside the searched range.
            ValueError: If C is not positive and finite, or `mass` is not between 0 and 1.
        """
        if not (np.isfinite(C) and C > 0 and 0 < mass < 1):
            raise ValueError(f"an optimum needs positive finite FLOPs and a mass between 0 and 1, got {C=}, {mass=}")
        low, high = (np.log(v) for v in self.ranges["N"])
        log_n = np.linspace(low + np.log(1e-3), high + np.log(1e4), 800)
        n, d = log_n - self.centre[0], np.log(C / 6.0) - log_n - self.centre[1]
        weight = np.array([m.weight for m in self.members])
        best = int(np.argmin(weight @ np.array([m.evaluate(m.theta[None], n, d)[0] for m in self.members])))
        if best in (0, log_n.size - 1):
            raise FitError(
                "the predicted loss has no minimum between very small and very large models: "
                "add runs at other N and D/N"
            )
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(DRAWS, weight)
        minima = []
        for m, count in zip(self.members, counts, strict=True):
            # Rounding can leave an eigenvalue of the covariance slightly below zero.
            drawn = rng.multivariate_normal(m.theta, m.covariance, size=count, check_valid="ignore")
            minima.append(log_n[np.argmin(m.evaluate(drawn, n, d), axis=1)])
        below, above = np.quantile(np.concatenate(minima), [0.5 - mass / 2, 0.5 + mass / 2])
        bounded = bool(below > log_n[0] and above < log_n[-1])
        N, ends = float(np.exp(log_n[best])), (float(np.exp(below)), float(np.exp(above)))
        return Allocation(N, C / 6.0 / N, ends, (C / 6.0 / ends[1], C / 6.0 / ends[0]), bounded)

    def disagreement(self, N: ArrayLike, D: ArrayLike) -> Array:
        """Return how much the two forms disagree: their weighted standard deviation of ln L, a relative loss.

        N and D are as in `predict`.
        """
        return self._moments(N, D)[1]

    def _moments(self, N: ArrayLike, D: ArrayLike) -> tuple[Array, Array, Array]:
        """Return the mean of ln L, its standard deviation between forms, and its variance within forms."""
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
    sd: ArrayLike | None = None,
) -> Fit:
    """Fit the loss law L(N, D) = E + A / N^alpha + B / D^beta to runs.

    The law is the optimum of a Huber loss on ln L (Hoffmann et al., arXiv 2203.15556, equation 2 and appendix D.2). The
    fit's predictions and intervals average it with a form without a floor, see `Fit`.

    Args:
        N: Parameters that multiply tokens, one per run, 1-d.
        D: Training tokens, one per run, 1-d.
        loss: Validation loss in nats per token, one per run, 1-d.
        delta: Where the Huber loss turns from quadratic to linear, in ln L.
        bootstrap: Number of resamples of the rows for `Fit.samples`. They show how uncertain the parameters are; the
            intervals do not use them.
        seed: Seed of the resamples.
        run_ids: One identifier per run; row numbers by default.
        sd: How uncertain each loss is beyond the scatter of one run, standard deviation of ln loss, 1-d. The weight of
            a run is divided by 1 + (sd / `SCATTER`)². Default: 0.

    Returns:
        The fit. Its `status` is "ok", or says in sentences what is doubtful.

    Raises:
        ValueError: If a row is unusable, or shapes do not match.
        FitError: If no law can exist: with fewer than three runs, or with a single N and a single D.

    Example:
        >>> fit = fit_loss_law(runs["N"], runs["D"], runs["loss"], bootstrap=200)
        >>> fit.law
        LossLaw(E=1.82, A=478.0, B=2143.0, alpha=0.347, beta=0.367)
    """
    size, tokens, losses = (np.asarray(v, float) for v in (N, D, loss))
    check_rows(size, tokens, losses, delta, bootstrap)
    ids = tuple(range(losses.size)) if run_ids is None else tuple(run_ids)
    if len(ids) != losses.size:
        raise ValueError(f"run_ids needs one entry per run, got {len(ids)} for {losses.size} runs")
    log_n, log_d, y = np.log(size), np.log(tokens), np.log(losses)
    centre = (float(log_n.mean()), float(log_d.mean()))
    n, d = log_n - centre[0], log_d - centre[1]

    credit = None if sd is None else 1 / (1 + (np.asarray(sd, float) / SCATTER) ** 2)
    theta, objective, doubts = find_huber_optimum(n, d, y, delta, credit)
    rng = np.random.default_rng(seed)
    samples = fit_bootstraps(theta, n, d, y, delta, bootstrap, rng, credit) if bootstrap else np.empty((0, 5))
    table = whiten_runs(log_n, log_d, y, centre, credit)
    effective = table.effective
    members = fit_averaged_forms(table)
    if effective < 8:
        doubts.append(
            f"Only {effective:.1f} runs count near the largest compute; below 8 the interval is not known to hold."
        )
    doubts += find_coverage_doubts(log_n, log_d)
    return Fit(
        law=make_loss_law(theta, centre),
        samples=[make_loss_law(t, centre) for t in samples],
        status=" ".join(doubts) or "ok",
        ranges={"N": (float(size.min()), float(size.max())), "D": (float(tokens.min()), float(tokens.max()))},
        run_ids=ids,
        objective=objective,
        n_effective=effective,
        centre=centre,
        members=members,
    )


def check_rows(N: Array, D: Array, loss: Array, delta: float, bootstrap: int) -> None:
    """Raise ValueError for unusable rows or options, and FitError when these runs allow no loss law."""
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


def find_coverage_doubts(log_n: Array, log_d: Array) -> list[str]:
    """Return sentences on what these sizes and token counts cannot determine, whatever the losses."""
    doubts = []
    for name, values, symbol in (("N", np.sort(log_n), "alpha"), ("D", np.sort(log_d), "beta")):
        level = cluster_values(values)
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
