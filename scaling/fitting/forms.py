"""Other forms of the loss law, and the choice among them.

Each is fitted as Hoffmann's form is: Huber loss on log loss, all starts in one batch. The choice is made by a rolling
hold-out (fit the runs with less compute, predict the next block), never by the in-sample error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaling.common.arrays import Array
from scaling.fitting.averaging import compute_shares
from scaling.fitting.huber import find_huber_optimum, make_loss_law, make_starts
from scaling.fitting.loss_law import FitError, check_rows, find_coverage_doubts, fit_loss_law
from scaling.fitting.newton import LocalModel, Objective, minimise
from scaling.laws.formulas import DataConstrainedLaw, KaplanLaw, LogLinearLaw, LossLaw

if TYPE_CHECKING:
    import pandas as pd

FormLaw: TypeAlias = LossLaw | KaplanLaw | DataConstrainedLaw | LogLinearLaw
# theta (k, p) -> ln L (k, m), Jacobian (k, m, p)
ModelFunction: TypeAlias = Callable[[Array], tuple[Array, Array]]

PARAMETER_COUNTS = {"log-linear": 3, "kaplan": 4, "chinchilla": 5, "data-constrained": 7}
# Not a form: what `Fit.predict` returns, shown beside the forms.
AVERAGE = "average"
# Shares of the runs by compute; the runs below each one predict those up to the next.
HOLDOUT_SHARES = (0.5, 0.7, 0.85)
# In ln N. An optimum this far below a run's N leaves the run no excess worth counting.
FARTHEST = 30.0
# Bounds of the decay constants of the data-constrained form. The paper found 15.4 and 5.3.
R_LOW, R_HIGH = 0.1, 1e4


@dataclass(frozen=True)
class FormFit:
    """One fitted form.

    Attributes:
        form: Its name, a key of `PARAMETERS`.
        law: The formula.
        objective: The sum of Huber terms.
        error: Mean |L / law - 1| on the fitted runs.
        status: "ok", or the doubts, in sentences.
    """

    form: str
    law: FormLaw
    objective: float
    error: float
    status: str

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters by the names of the formula."""
        return {k: float(v) for k, v in asdict(self.law).items()}

    def predict(self, N: ArrayLike, D: ArrayLike, unique: ArrayLike | None = None) -> Array:
        """Predict the loss in nats per token.

        Args:
            N: Parameters.
            D: Tokens.
            unique: Distinct tokens. Only the data-constrained form uses them.

        Returns:
            The loss, with the broadcast shape of the arguments.
        """
        return self.law(N, D, unique) if isinstance(self.law, DataConstrainedLaw) else self.law(N, D)


def fit_form(
    form: str, N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, unique: ArrayLike | None = None, delta: float = 1e-3
) -> FormFit:
    """Fit one form of the loss law to runs.

    Args:
        form: "log-linear", "kaplan" (arXiv 2001.08361), "chinchilla" (2203.15556) or "data-constrained" (2305.16264).
        N: Parameters of each run, shape (m,).
        D: Tokens of each run, shape (m,).
        loss: Final loss of each run, in nats per token, shape (m,).
        unique: Distinct tokens, one number or one per run. Only the data-constrained form uses them.
        delta: Where the Huber loss on ln L turns from quadratic to linear.

    Returns:
        The fitted form.

    Raises:
        ValueError: If the form is unknown or a row is not usable.
        FitError: If there are too few runs for the form.

    Example:
        >>> fit_form("kaplan", runs["N"], runs["D"], runs["loss"]).parameters
    """
    if form not in PARAMETER_COUNTS:
        raise ValueError(f"form must be one of {', '.join(PARAMETER_COUNTS)}, got {form!r}")
    size, tokens, losses = (np.asarray(v, float) for v in (N, D, loss))
    check_rows(size, tokens, losses, delta, 0)
    distinct = _check_unique(tokens, unique)
    if form != "chinchilla" and losses.size <= PARAMETER_COUNTS[form]:
        raise FitError(
            f"the {form} form has {PARAMETER_COUNTS[form]} parameters and needs more runs than that, "
            f"got {losses.size}: add runs, or fit log-linear"
        )
    log_n, log_d, y = np.log(size), np.log(tokens), np.log(losses)
    centre = (float(log_n.mean()), float(log_d.mean()))
    n, d = log_n - centre[0], log_d - centre[1]
    if form == "chinchilla":
        theta, value, doubts = find_huber_optimum(n, d, y, delta)
        law: FormLaw = make_loss_law(theta, centre)
    elif form == "log-linear":
        law, value, doubts = _fit_log_linear(n, d, y, delta, centre)
    elif form == "kaplan":
        law, value, doubts = _fit_kaplan(n, d, y, delta, centre)
    else:
        law, value, doubts = _fit_data_constrained(n, d, np.log(distinct) - centre[1], y, delta, centre)
    fit = FormFit(form, law, value, 0.0, " ".join(doubts + find_coverage_doubts(log_n, log_d)) or "ok")
    error = float(np.mean(np.abs(losses / fit.predict(size, tokens, distinct) - 1)))
    return FormFit(form, law, value, error, fit.status)


def _check_unique(tokens: Array, unique: ArrayLike | None) -> Array:
    """Return the distinct tokens of each run, at most its tokens; raise ValueError for unusable ones."""
    distinct = tokens if unique is None else np.broadcast_to(np.asarray(unique, float), tokens.shape)
    bad = np.flatnonzero(~(np.isfinite(distinct) & (distinct > 0)))
    if bad.size:
        raise ValueError(
            f"unique must be positive and finite, got {distinct[bad[0]]} (row {bad[0]}): give tokens, or leave it out"
        )
    return np.minimum(distinct, tokens)


# The fit of each form.


def _make_huber(model: ModelFunction, y: Array, delta: float) -> Objective:
    """Make the sum of Huber terms of ln L: Gauss-Newton Hessian, metric of Huber's quadratic majoriser."""

    def objective(theta: Array, _: NDArray[np.intp]) -> LocalModel:
        f, jacobian = model(theta)
        r = y - f
        size = np.abs(r)
        value = np.sum(np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta)), 1)
        gradient = -(np.clip(r, -delta, delta)[:, None, :] @ jacobian)[:, 0]

        def gram(weight: NDArray[np.floating]) -> Array:
            return np.asarray(np.swapaxes(jacobian * weight[:, :, None], 1, 2) @ jacobian)

        metric = gram(np.minimum(1.0, delta / np.maximum(size, 1e-300)))
        return LocalModel(value, gradient, gram((size <= delta) + 0.0), metric)

    return objective


def _find_optimum(
    model: ModelFunction, starts: Array, y: Array, delta: float, low: Array, high: Array, names: tuple[str, ...]
) -> tuple[Array, float, list[str]]:
    """Return the best end of all starts, its value, and doubts.

    names: The name of each parameter that is an exponent or a decay constant, "" for amplitudes.
    """
    ends = minimise(_make_huber(model, y, delta), starts, lower=low, upper=high, tolerance=1e-10)
    best = int(np.argmin(ends.value))
    theta, value = ends.theta[best], float(ends.value[best])
    margin = 0.01 * (high - low)
    edges = [i for i, name in enumerate(names) if name and not low[i] + margin[i] < theta[i] < high[i] - margin[i]]
    doubts = [f"{names[i]} is at its bound." for i in edges]
    near = ends.value <= value * 1.001
    apart = np.ptp(ends.theta[near], axis=0)
    loose = [names[i] for i in range(len(names)) if names[i] and i not in edges and apart[i] > 0.1]
    if loose:
        doubts.append(f"Starts that fit equally well disagree on {', '.join(loose)}.")
    return theta, value, doubts


def _fit_log_linear(
    n: Array, d: Array, y: Array, delta: float, centre: tuple[float, float]
) -> tuple[LogLinearLaw, float, list[str]]:
    """Fit theta = (ln coef, alpha, beta): ln L is linear in n and d."""
    design = np.stack([np.ones_like(n), -n, -d], 1)

    def model(theta: Array) -> tuple[Array, Array]:
        return theta @ design.T, np.broadcast_to(design, (len(theta), *design.shape))

    start = np.asarray(np.linalg.lstsq(design, y, rcond=None)[0], float)
    wide = np.array([50.0, 50.0, 50.0])
    theta, value, doubts = _find_optimum(model, start[None], y, delta, -wide, wide, ("", "", ""))
    for i, name in ((1, "N"), (2, "D")):
        if theta[i] <= 0:
            doubts.append(f"The loss does not fall with {name}.")
    c, alpha, beta = (float(v) for v in theta)
    return LogLinearLaw(float(np.exp(c + alpha * centre[0] + beta * centre[1])), alpha, beta), value, doubts


def _fit_kaplan(
    n: Array, d: Array, y: Array, delta: float, centre: tuple[float, float]
) -> tuple[KaplanLaw, float, list[str]]:
    """Fit theta = (a, p, b, k): ln L = e^k ln(e^(a - p n) + e^(b - d)), p = alpha_N / alpha_D, k = ln alpha_D."""

    def model(theta: Array) -> tuple[Array, Array]:
        a, p, b, k = theta.T[:, :, None]
        z1, z2 = a - p * n, b - d
        inner, power = np.logaddexp(z1, z2), np.exp(k)
        p1, p2 = np.exp(z1 - inner), np.exp(z2 - inner)
        return power * inner, np.stack([power * p1, -power * n * p1, power * p2, power * inner], 2)

    starts = []
    for p in (0.2, 0.5, 0.8, 1.2):
        # Given both exponents, L^(1/alpha) is linear in the two amplitudes.
        for alpha in (0.04, 0.08, 0.15, 0.3, 0.6):
            design = np.exp(np.stack([-p * n, -d], 1) - y[:, None] / alpha)
            amplitude = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0]
            least = 1e-3 / np.maximum(design.mean(0), 1e-300)
            a, b = np.log(np.maximum(amplitude, least))
            starts.append([a, p, b, np.log(alpha)])
    low, high = np.array([-400.0, 0.0, -400.0, np.log(0.005)]), np.array([400.0, 5.0, 400.0, np.log(3.0)])
    theta, value, doubts = _find_optimum(
        model, np.clip(starts, low, high), y, delta, low, high, ("", "alpha_N / alpha_D", "", "ln alpha_D")
    )
    a, p, b, k = (float(v) for v in theta)
    alpha = float(np.exp(k))
    log_nc = a / p + centre[0] if p > 0 else np.inf
    if not log_nc < 600:
        doubts.append("The loss does not fall with N.")
    law = KaplanLaw(float(np.exp(min(log_nc, 600.0))), float(np.exp(b + centre[1])), p * alpha, alpha)
    return law, value, doubts


def _fit_data_constrained(
    n: Array, d: Array, u: Array, y: Array, delta: float, centre: tuple[float, float]
) -> tuple[DataConstrainedLaw, float, list[str]]:
    """Fit theta = (a, alpha, b, beta, e, ln R_D, ln R_N). u is ln of the distinct tokens, centred as d is."""

    def model(theta: Array) -> tuple[Array, Array]:
        a, alpha, b, beta, _, r_d, r_n = theta.T[:, :, None]
        best = (np.log(alpha) + a - np.log(beta) - b + beta * u) / alpha
        log_d, _, by_rd = compute_log_worth(d, np.broadcast_to(u, (len(theta), u.size)), np.exp(r_d))
        log_n, by_best, by_rn = compute_log_worth(n, np.clip(best, n - FARTHEST, n), np.exp(r_n))
        # Where N exceeds the optimum, the effective N moves with the optimum.
        h = np.where((best < n) & (best > n - FARTHEST), by_best, 0.0)
        p, f = compute_shares(theta[:, :5], log_n, log_d)
        p1, p2, p3 = p
        by_alpha = -p1 * (log_n + h * (1 / alpha - best))
        by_beta = -p2 * log_d - p1 * h * (u - 1 / beta)
        columns = [p1 * (1 - h), by_alpha, p2 + p1 * h, by_beta, p3, -p2 * beta * by_rd, -p1 * alpha * by_rn]
        return f, np.stack(np.broadcast_arrays(*columns), 2)

    starts = []
    for r_d in (4.0, 15.0, 60.0):
        worth = compute_log_worth(d, u, np.array(r_d))[0]
        first = make_starts(n, worth, y, delta)
        r = np.abs(y - compute_shares(first, n, worth)[1])
        value = np.sum(np.where(r <= delta, 0.5 * r * r, delta * (r - 0.5 * delta)), 1)
        for theta5 in first[np.argsort(value)[:4]]:
            starts += [[*theta5, np.log(r_d), np.log(r_n)] for r_n in (5.0, 500.0)]
    low = np.array([y.min() - 12, 0.02, y.min() - 12, 0.02, y.min() - 12, np.log(R_LOW), np.log(R_LOW)])
    high = np.array([y.max() + 5, 3.0, y.max() + 5, 3.0, y.min() + 0.1, np.log(R_HIGH), np.log(R_HIGH)])
    names = ("", "alpha", "", "beta", "", "R_D", "R_N")
    theta, objective, doubts = _find_optimum(model, np.clip(starts, low, high), y, delta, low, high, names)
    if theta[4] < y.min() + np.log(0.01):
        doubts.append("The floor E is about 0.")
    epochs = float(np.exp(np.max(d - u)))
    if epochs < 1.01:
        doubts.append("No run repeats its data: R_D is not measured.")
    elif epochs < 3:
        doubts.append(f"No run sees its data more than {epochs:.2g} times: R_D is hardly measured.")
    law5 = make_loss_law(theta[:5], centre)
    r_d, r_n = (float(v) for v in np.exp(theta[5:]))
    return DataConstrainedLaw(law5.E, law5.A, law5.B, law5.alpha, law5.beta, r_d, r_n), objective, doubts


def compute_log_worth(amount: Array, distinct: Array, decay: Array) -> tuple[Array, Array, Array]:
    """Return ln(U + U R (1 - exp(-(e^(amount - distinct) - 1) / R))) and its derivatives by ln U and by ln R.

    distinct: ln U. decay: R.
    """
    repeats = np.expm1(amount - distinct)
    left = np.exp(-repeats / decay)
    gain = 1 + decay * (1 - left)
    return distinct + np.log(gain), 1 - left * (repeats + 1) / gain, (decay * (1 - left) - left * repeats) / gain


# The choice among the forms.


@dataclass(frozen=True)
class FormScore:
    """The errors of one form: mean |ln L - ln prediction|, so relative errors.

    Attributes:
        form: Its name, or "average".
        in_sample: The error on all runs of the fit to all runs.
        held_out: The error on each held-out block; NaN where the form could not be fitted.
        fit: The fit to all runs; None for the average and where the form cannot be fitted.
        status: "ok", or the doubts, in sentences.
    """

    form: str
    in_sample: float
    held_out: tuple[float, ...]
    fit: FormFit | None
    status: str

    @property
    def mean(self) -> float:
        """The mean error over the held-out blocks."""
        return float(np.mean(self.held_out)) if self.held_out else float("nan")


@dataclass(frozen=True)
class Comparison:
    """Forms compared by how well they predict held-out runs.

    Attributes:
        scores: One for each form, and one for the average, which is shown but cannot be chosen.
        blocks: For each block (number of runs fitted, number of runs predicted).
        chosen: The form with the least held-out error. The data-constrained form is chosen only if it beats
            Chinchilla's, its special case, by a standard error.
        status: "ok", or why the choice is doubtful.
    """

    scores: tuple[FormScore, ...]
    blocks: tuple[tuple[int, int], ...]
    chosen: str
    status: str

    def table(self) -> pd.DataFrame:
        """Tabulate the forms, one row each: parameters, errors in % (in sample, each block, mean), chosen, status."""
        import pandas as pd

        rows = []
        for s in self.scores:
            row: dict[str, object] = {
                "form": s.form,
                "parameters": PARAMETER_COUNTS.get(s.form),
                "in_sample": 100 * s.in_sample,
            }
            row |= {f"block_{i + 1}": 100 * e for i, e in enumerate(s.held_out)}
            rows.append(row | {"held_out": 100 * s.mean, "chosen": s.form == self.chosen, "status": s.status})
        table = pd.DataFrame(rows)
        return table.astype({"parameters": "Int64"})


def compare_forms(
    N: ArrayLike,
    D: ArrayLike,
    loss: ArrayLike,
    *,
    C: ArrayLike | None = None,
    unique: ArrayLike | None = None,
    delta: float = 1e-3,
) -> Comparison:
    """Compare the forms of the loss law by a rolling hold-out.

    Every form is fitted to the 50, 70 and 85 % of the runs with the least compute and predicts the next block. Then it
    is fitted to all runs.

    Args:
        N: Parameters of each run, shape (m,).
        D: Tokens of each run, shape (m,).
        loss: Final loss of each run, in nats per token, shape (m,).
        C: Compute of each run in FLOPs, shape (m,). Default: 6 N D. Runs of equal compute stay in one block.
        unique: Distinct tokens, one number or one per run. The data-constrained form is included if they are given and
            some run repeats its data.
        delta: Where the Huber loss on ln L turns from quadratic to linear.

    Returns:
        The forms with their errors, and the chosen one.

    Raises:
        ValueError: If a row is not usable.
        FitError: If there are too few runs.

    Example:
        >>> compare_forms(runs["N"], runs["D"], runs["loss"]).chosen
        'chinchilla'
    """
    size, tokens, losses = (np.asarray(v, float) for v in (N, D, loss))
    check_rows(size, tokens, losses, delta, 0)
    distinct = _check_unique(tokens, unique)
    compute = np.log(size) + np.log(tokens) if C is None else np.log(np.asarray(C, float))
    if compute.shape != losses.shape or not np.all(np.isfinite(compute)):
        raise ValueError(f"C needs one positive number per run, got shape {compute.shape} for {losses.size} runs")
    forms = [f for f in PARAMETER_COUNTS if f != "data-constrained" or np.any(tokens > 1.01 * distinct)]
    edges = [*(float(np.quantile(compute, s, method="inverted_cdf")) for s in HOLDOUT_SHARES), float(compute.max())]
    blocks = [(compute <= a + 1e-9, (compute > a + 1e-9) & (compute <= b + 1e-9)) for a, b in pairwise(edges)]
    blocks = [(fitted, held) for fitted, held in blocks if held.any() and fitted.sum() > PARAMETER_COUNTS["chinchilla"]]

    def measure_errors(
        form: str, fitted: NDArray[np.bool_], held: NDArray[np.bool_]
    ) -> tuple[Array, FormFit | None, str]:
        """Return |ln L - ln prediction| of each run of `held`, the fit to `fitted`, and its status."""
        try:
            if form == AVERAGE:
                average = fit_loss_law(size[fitted], tokens[fitted], losses[fitted], delta=delta)
                fit, predicted, status = None, average.predict(size[held], tokens[held]), average.status
            else:
                fit = fit_form(form, size[fitted], tokens[fitted], losses[fitted], unique=distinct[fitted], delta=delta)
                predicted, status = fit.predict(size[held], tokens[held], distinct[held]), fit.status
        except FitError as error:
            return np.full(int(held.sum()), np.nan), None, f"Cannot be fitted: {error}."
        return np.abs(np.log(losses[held] / predicted)), fit, status

    everything = np.ones(losses.size, bool)
    scores, misses = [], {}
    for form in [*forms, AVERAGE]:
        inside, fit, status = measure_errors(form, everything, everything)
        misses[form] = [measure_errors(form, fitted, held)[0] for fitted, held in blocks]
        scores.append(FormScore(form, float(inside.mean()), tuple(float(m.mean()) for m in misses[form]), fit, status))
    candidates = [s for s in scores if s.form != AVERAGE and np.isfinite(s.mean)]
    counts = tuple((int(fitted.sum()), int(held.sum())) for fitted, held in blocks)
    if not candidates:
        doubt = f"{losses.size} runs leave nothing to hold out: the form is Chinchilla's by default, not by test."
        return Comparison(tuple(scores), counts, "chinchilla", doubt)
    chosen = min(candidates, key=lambda s: s.mean).form
    as_good = [s.form for s in candidates if _measure_lag(misses[s.form], misses[chosen]) <= 0]
    if chosen == "data-constrained" and "chinchilla" in as_good:
        chosen = "chinchilla"
    doubts = []
    if len(blocks) < len(HOLDOUT_SHARES) or min(c[1] for c in counts) < 3:
        doubts.append("Few runs were held out: the choice may be due to chance.")
    if len(as_good) > 1:
        others = " and ".join(form for form in as_good if form != chosen)
        doubts.append(f"As good within a standard error: {others}.")
    return Comparison(tuple(scores), counts, chosen, " ".join(doubts) or "ok")


def _measure_lag(misses: list[Array], best: list[Array]) -> float:
    """Return by how much more than a standard error the mean of block means is larger than that of the best form.

    Runs of a block are treated as independent.
    """
    differences = [a - b for a, b in zip(misses, best, strict=True)]
    error = np.sqrt(sum(float(np.var(d, ddof=1)) / d.size for d in differences if d.size > 1)) / len(differences)
    return float(np.mean([d.mean() for d in differences]) - error - 1e-12)
