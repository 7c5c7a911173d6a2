"""Properties of every fit: units and the order of rows do not matter, and intervals have their stated coverage."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.common.arrays import Array
from scaling.curves.in_progress import FinishedRun, learn_prior, predict_end
from scaling.curves.loss_curve import fit_curve
from scaling.curves.schedules import make_cooldown_schedule
from scaling.fitting.forms import PARAMETER_COUNTS, fit_form
from scaling.fitting.isoflop import fit_isoflop
from scaling.fitting.loss_law import fit_loss_law
from scaling.fitting.lr_batch_law import fit_hp_law
from scaling.laws.formulas import DataConstrainedLaw, HPLaw, LossLaw

LAW = LossLaw(E=1.7, A=420.0, B=900.0, alpha=0.34, beta=0.31)
T = np.geomspace(2e7, 1e9, 30)
powers = st.floats(-6, 6)


def runs(seed: int, noise: float = 0.003) -> tuple[Array, Array, Array]:
    """Return N, D and loss of 7 x 6 runs that do not lie on a grid."""
    rng = np.random.default_rng(seed)
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(3e7, 6e9, 7), np.geomspace(6e8, 1e11, 6)))
    N, D = N * np.exp(0.1 * rng.standard_normal(42)), D * np.exp(0.1 * rng.standard_normal(42))
    return N, D, LAW(N, D) * np.exp(noise * rng.standard_normal(42))


def isoflops(noise: float = 0.003) -> tuple[Array, Array, Array]:
    C, ratio = (x.ravel() for x in np.meshgrid(np.geomspace(3e18, 3e21, 6), np.geomspace(0.2, 5.0, 9)))
    N = np.asarray(ratio * np.sqrt(C / 6 / 20))
    D = C / 6 / N
    return N, D, LAW(N, D) * np.exp(noise * np.random.default_rng(8).standard_normal(N.size))


def swept(law: HPLaw, seed: int, per: int = 12, own: float = 0.0) -> pd.DataFrame:
    """Draw learning rates and batch sizes about a law in a lopsided bowl, at three sizes and two token counts.

    own: standard deviation (in ln) of the optimum of each group about the law.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for N in (6e7, 2e8, 7e8):
        for D in (2e9, 1e10):
            best_lr, best_batch = (v * math.exp(own * rng.standard_normal()) for v in law(N, D))
            u, v = rng.uniform(-1.5, 1.5, per), rng.uniform(-1.5, 1.5, per)
            height = 0.012 * (u - 0.3 * v) ** 2 * np.exp(0.3 * u) + 0.008 * v**2
            loss = LAW(N, D) * np.exp(height + 0.001 * rng.standard_normal(per))
            lr, batch = best_lr * np.exp(u), best_batch * np.exp(v)
            rows.append(pd.DataFrame({"N": N, "D": D, "lr": lr, "batch_tokens": batch, "loss": loss}))
    return pd.concat(rows, ignore_index=True)


# Units: N in millions, tokens in sequences, loss in bits.


@settings(max_examples=20, deadline=None, derandomize=True)
@given(powers, st.floats(-1, 1), st.integers(0, 5))
def test_a_curve_keeps_its_exponent_in_other_units(tokens: float, nats: float, seed: int) -> None:
    q, loss = (
        10**nats,
        (2 + 0.6 * (T / 1e9) ** -0.4) * np.exp(1e-3 * np.random.default_rng(seed).standard_normal(T.size)),
    )
    one, other = fit_curve(T, loss), fit_curve(T * 10**tokens, loss * q)
    assert other.law.alpha == pytest.approx(one.law.alpha, rel=1e-4)
    assert (other.law.E, other.law.A) == pytest.approx(
        (q * one.law.E, q * one.law.A * 10 ** (tokens * other.law.alpha)), rel=1e-3
    )
    assert float(other.predict(1e11 * 10**tokens)) == pytest.approx(q * float(one.predict(1e11)), rel=1e-4)


def ended(seed: int, unit: float = 1.0, nats: float = 1.0) -> FinishedRun:
    rng = np.random.default_rng(seed)
    slope, gain = 0.6 * math.exp(0.2 * rng.standard_normal()), 0.05 + 0.01 * rng.standard_normal()
    trunk = 2 + slope * (T[:25] / 1e9) ** -0.4
    loss = np.r_[trunk, (2 + slope) * (1 - gain)] * np.exp(1e-3 * rng.standard_normal(26))
    return FinishedRun(unit * np.r_[T[:25], 1e9], nats * loss, make_cooldown_schedule(unit * 1e9))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(powers, st.floats(-1, 1), st.permutations(range(4)), st.permutations(range(20)))
def test_a_forecast_with_siblings_depends_neither_on_units_nor_on_the_order_of_runs_and_points(
    tokens: float, nats: float, order: list[int], shuffled: list[int]
) -> None:
    unit, q = 10**tokens, 10**nats
    run = ended(9)
    t, loss = np.asarray(run.tokens)[:20], np.asarray(run.loss)[:20]
    siblings = [ended(i) for i in range(4)]
    converted = [ended(i, unit, q) for i in order]
    one = predict_end(t, loss, 1e9, schedule=run.schedule, prior=learn_prior(siblings), siblings=siblings)
    other = predict_end(
        unit * t[shuffled], q * loss[shuffled], unit * 1e9, schedule=make_cooldown_schedule(unit * 1e9),
        prior=learn_prior(converted), siblings=converted,
    )  # fmt: skip
    assert (other.mean / q, other.sd / q) == pytest.approx((one.mean, one.sd), rel=1e-6)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(powers, powers, st.integers(0, 3))
def test_n_and_d_have_independent_units_in_every_form(n: float, d: float, seed: int) -> None:
    """This includes Kaplan's and the data-constrained form, in which N and D share a bracket."""
    N, D, _ = runs(seed)
    U, n, d = np.minimum(D, 8e9), 10**n, 10**d
    truth = DataConstrainedLaw(LAW.E, LAW.A, LAW.B, LAW.alpha, LAW.beta, 12.0, 6.0)
    loss = truth(N, D, U) * np.exp(0.002 * np.random.default_rng(seed).standard_normal(N.size))
    for form in PARAMETER_COUNTS:
        one = fit_form(form, N, D, loss, unique=U)
        other = fit_form(form, N * n, D * d, loss, unique=U * d)
        assert other.objective == pytest.approx(one.objective, rel=1e-3)
        converted = other.predict(2e10 * n, 2e11 * d, 5e10 * d)
        assert float(converted) == pytest.approx(float(one.predict(2e10, 2e11, 5e10)), rel=3e-3)


# Duplicated rows.


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.permutations(range(42)), st.sampled_from(list(PARAMETER_COUNTS)), st.integers(2, 3))
def test_duplication_of_all_rows_leaves_a_form_where_it_is(order: list[int], form: str, copies: int) -> None:
    N, D, loss = runs(1)
    rows = np.tile(order, copies)
    U = np.minimum(D, 8e9)
    one = fit_form(form, N, D, loss, unique=U)
    more = fit_form(form, N[rows], D[rows], loss[rows], unique=U[rows])
    assert more.objective == pytest.approx(copies * one.objective, rel=1e-3)
    assert more.error == pytest.approx(one.error, rel=1e-2)
    assert float(more.predict(2e10, 2e11, 5e10)) == pytest.approx(float(one.predict(2e10, 2e11, 5e10)), rel=3e-3)


def test_a_run_counted_four_times_has_more_weight_but_never_more_than_four_runs() -> None:
    """Copies are no evidence, but no fit can recognise them. Intervals narrow by at most half, as with four runs."""
    N, D, loss = runs(2)
    narrowed = []
    for rows in (np.arange(42), np.tile(np.arange(42), 4)):
        low, high = fit_loss_law(N[rows], D[rows], loss[rows]).interval(2e10, 2e11)
        narrowed.append(float(np.log(high / low)))
    assert 0.5 * narrowed[0] < narrowed[1] <= narrowed[0] * 1.001
    N, D, loss = isoflops()
    widths = []
    for rows in (np.arange(54), np.tile(np.arange(54), 4)):
        trend = fit_isoflop(N[rows], D[rows], loss[rows]).N
        widths.append((float(np.ptp(trend.exponent_interval())), trend.law.exponent))
    assert widths[1][1] == pytest.approx(widths[0][1], rel=0.02)
    assert 0.4 * widths[0][0] < widths[1][0] <= widths[0][0] * 1.05
    table = swept(HPLaw(lr_coef=20.0, lr_N=-0.6, lr_D=0.15, batch_coef=40.0, batch_N=0.0, batch_D=0.42), seed=3)
    fits = [fit_hp_law(t) for t in (table, pd.concat([table] * 4, ignore_index=True))]
    for i in range(2):
        once, four = (np.log(f.interval(2e9, 4e10, 0.8)[i]) for f in fits)
        assert 0.5 * np.ptp(once) < np.ptp(four) <= np.ptp(once) * 1.02


# Coverage of planted laws.


@pytest.mark.slow
def test_eighty_per_cent_of_new_runs_fall_inside_eighty_per_cent_intervals_at_every_distance() -> None:
    """100 sets of runs differ in sizes, noise and law; predictions are made inside, just above and far beyond them.

    Inside, only noise is left, so the count is binomial (sd 4). Beyond, the interval also allows for a wrong form,
    which a planted law never has: it may contain too many runs, not too few.
    """
    held, points = np.zeros(3), ((5e8, 8e9), (1.2e10, 2e11), (1e11, 2e12))
    for seed in range(100):
        rng = np.random.default_rng(5000 + seed)
        noise = float(rng.choice([0.002, 0.005, 0.01]))
        law = LossLaw(
            E=rng.uniform(1.3, 2.0),
            A=420 * math.exp(0.3 * rng.standard_normal()),
            B=900 * math.exp(0.3 * rng.standard_normal()),
            alpha=rng.uniform(0.3, 0.38),
            beta=rng.uniform(0.28, 0.36),
        )
        N, D, _ = runs(seed)
        fit = fit_loss_law(N, D, law(N, D) * np.exp(noise * rng.standard_normal(N.size)))
        for i, (n, d) in enumerate(points):
            low, high = fit.interval(n, d, 0.8)
            held[i] += low <= law(n, d) * math.exp(noise * rng.standard_normal()) <= high
    assert 68 <= held[0] <= 92, held
    assert np.all(held[1:] >= 70), held


@pytest.mark.slow
def test_lr_and_batch_intervals_contain_optima_that_scatter_and_drift_as_the_fit_assumes() -> None:
    """100 families use a bowl that is neither of the two fitted ones, with optima 0.08 (sd of ln) off their law.

    Predictions are made at the centre, and at 20 times N and 13 times D, where the planted optimum has drifted by 0.05
    (lr) and 0.08 (batch) times the square root of the distance in e-folds, as the intervals assume.
    """
    held, widths = np.zeros((2, 2)), []
    centre, beyond = (2e8, 4.5e9), (4e9, 6e10)
    for seed in range(100):
        rng = np.random.default_rng(9000 + seed)
        a1, a2, b1 = rng.normal([-0.5, 0.1, 0.45], [0.15, 0.15, 0.1])
        law = HPLaw(1.5e-3 * 2e8**-a1 * 5e9**-a2, a1, a2, 4e5 * 5e9**-b1, 0.0, b1)
        fit = fit_hp_law(swept(law, seed, own=0.08))
        reach = np.log([beyond[0] / centre[0], beyond[1] / centre[1]])
        for i, (N, D) in enumerate((centre, beyond)):
            drift = i * np.array([0.05, 0.08]) * np.sqrt(reach.sum()) * rng.standard_normal(2)
            true = np.log([float(v) for v in law(N, D)]) + drift + 0.08 * rng.standard_normal(2)
            intervals = np.log(fit.interval(N, D, 0.8))
            held[i] += (intervals[:, 0] <= true) & (true <= intervals[:, 1])
            widths.append(intervals[:, 1] - intervals[:, 0])
    assert np.all((held >= 68) & (held <= 97)), held
    assert np.median(widths) < 0.7, "the intervals must be informative: a factor of two in total"
