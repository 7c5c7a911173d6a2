from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from scaling.fitting.forms import PARAMETER_COUNTS, compare_forms, compute_log_worth, fit_form
from scaling.fitting.loss_law import FitError, fit_loss_law
from scaling.laws.formulas import DataConstrainedLaw, KaplanLaw, LogLinearLaw, LossLaw

CHINCHILLA = LossLaw(E=1.82, A=480.0, B=2100.0, alpha=0.348, beta=0.366)
KAPLAN = KaplanLaw(N_c=8.8e13, D_c=5.4e13, alpha_N=0.076, alpha_D=0.103)
PLANE = LogLinearLaw(coef=60.0, alpha=0.07, beta=0.06)
REPEATED = DataConstrainedLaw(E=1.7, A=500.0, B=1500.0, alpha=0.34, beta=0.36, R_D=12.0, R_N=6.0)
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def grid(n: int = 8) -> Rows:
    """Return N, D and unique tokens; a third of the runs see their data four times, a third sixteen times."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 1e10, n), np.geomspace(2e9, 4e11, n)))
    return N, D, D / np.resize([1.0, 4.0, 16.0], N.size)


def noise(sd: float, seed: int, size: int) -> np.ndarray:
    return np.exp(sd * np.random.default_rng(seed).standard_normal(size))


@pytest.mark.parametrize(
    ("form", "truth"),
    [("chinchilla", CHINCHILLA), ("kaplan", KAPLAN), ("log-linear", PLANE), ("data-constrained", REPEATED)],
)
def test_a_planted_form_is_recovered_exactly_without_noise(form: str, truth: Callable[..., np.ndarray]) -> None:
    N, D, U = grid()
    given = (N, D, U) if form == "data-constrained" else (N, D)
    fit = fit_form(form, N, D, truth(*given), unique=U)
    for name, value in vars(truth).items():
        assert fit.parameters[name] == pytest.approx(value, rel=1e-4), name
    assert fit.status == "ok"
    assert fit.objective < 1e-15
    assert fit.error < 1e-6
    np.testing.assert_allclose(
        fit.predict(1e11, 1e12, unique=1e11), truth(*((1e11, 1e12, 1e11)[: len(given)])), rtol=1e-4
    )


@pytest.mark.parametrize("form", ["kaplan", "log-linear", "data-constrained"])
def test_no_other_optimiser_finds_a_lower_huber_sum(form: str) -> None:
    N, D, U = grid()
    loss = REPEATED(N, D, U) * noise(0.005, 0, N.size)
    fit = fit_form(form, N, D, loss, unique=U)
    law = type(fit.law)
    scale = np.array([v if v else 1.0 for v in fit.parameters.values()])

    def huber(relative: np.ndarray) -> float:
        candidate = law(**dict(zip(fit.parameters, relative * scale, strict=True)))
        f = candidate(N, D, U) if isinstance(candidate, DataConstrainedLaw) else candidate(N, D)
        r = np.abs(np.log(loss / f))
        return float(np.where(r <= 1e-3, r * r / 2, 1e-3 * (r - 5e-4)).sum())

    assert huber(np.ones(scale.size)) == pytest.approx(fit.objective, rel=1e-9)
    rng = np.random.default_rng(1)
    for _ in range(4):
        start = 1 + 0.02 * rng.standard_normal(scale.size)
        other = minimize(huber, start, method="Nelder-Mead", options={"maxiter": 1500, "xatol": 1e-10, "fatol": 1e-16})
        assert fit.objective <= other.fun * (1 + 1e-6)


def test_the_worth_of_repeated_data_has_the_derivatives_of_differences() -> None:
    amount, distinct, decay, h = np.array([3.0, 2.0, 1.1]), np.array([1.0, 1.5, 1.1]), 7.0, 1e-6
    value, by_distinct, by_decay = compute_log_worth(amount, distinct, np.array(decay))
    # Without repetition every token is worth 1.
    np.testing.assert_allclose(np.exp(value[2]), np.exp(1.1))
    up, down = (compute_log_worth(amount, distinct + s * h, np.array(decay))[0] for s in (1, -1))
    np.testing.assert_allclose(by_distinct, (up - down) / (2 * h), atol=1e-8)
    up, down = (compute_log_worth(amount, distinct, np.array(decay * np.exp(s * h)))[0] for s in (1, -1))
    np.testing.assert_allclose(by_decay, (up - down) / (2 * h), atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "truth"),
    [("chinchilla", CHINCHILLA), ("kaplan", KAPLAN), ("log-linear", PLANE), ("data-constrained", REPEATED)],
)
def test_the_planted_form_is_chosen(form: str, truth: Callable[..., np.ndarray]) -> None:
    N, D, U = grid()
    given = (N, D, U) if form == "data-constrained" else (N, D)
    chosen = [compare_forms(N, D, truth(*given) * noise(0.002, seed, N.size), unique=U).chosen for seed in range(4)]
    assert chosen.count(form) >= 3, chosen


def test_more_parameters_fit_better_in_sample_and_are_not_chosen_for_it() -> None:
    """The truth has no penalty for repeated data, so the data-constrained form fits the noise."""
    N, D, U = grid()
    comparison = compare_forms(N, D, CHINCHILLA(N, D) * noise(0.005, 3, N.size), unique=U)
    plain, rich = (next(s.fit for s in comparison.scores if s.form == f) for f in ("chinchilla", "data-constrained"))
    assert plain is not None
    assert rich is not None
    assert rich.objective < plain.objective
    assert comparison.chosen == "chinchilla"


def test_the_held_out_error_is_that_of_a_fit_by_hand_and_equal_compute_stays_together() -> None:
    C = np.repeat(np.geomspace(1e18, 1e21, 8), 6)
    N = np.sqrt(C / 120) * np.tile(np.geomspace(0.3, 3, 6), 8)
    loss = CHINCHILLA(N, C / 6 / N) * noise(0.004, 2, N.size)
    comparison = compare_forms(N, C / 6 / N, loss, C=C)
    assert comparison.blocks == ((24, 12), (36, 6), (42, 6))
    fitted, held = np.arange(48) < 24, (np.arange(48) >= 24) & (np.arange(48) < 36)
    D = C / 6 / N
    for score in comparison.scores:
        if score.form == "average":
            predicted = fit_loss_law(N[fitted], D[fitted], loss[fitted]).predict(N[held], D[held])
        else:
            predicted = fit_form(score.form, N[fitted], D[fitted], loss[fitted]).predict(N[held], D[held])
        assert score.held_out[0] == pytest.approx(np.mean(np.abs(np.log(loss[held] / predicted))))
    assert comparison.chosen == "chinchilla"


def test_the_table_shows_every_form_the_baseline_and_the_average() -> None:
    N, D, U = grid()
    table = compare_forms(N, D, REPEATED(N, D, U) * noise(0.002, 1, N.size), unique=U).table()
    assert list(table["form"]) == ["log-linear", "kaplan", "chinchilla", "data-constrained", "average"]
    assert list(table["parameters"][:4]) == [3, 4, 5, 7]
    assert table["chosen"].sum() == 1
    np.testing.assert_allclose(table["held_out"], table[["block_1", "block_2", "block_3"]].mean(axis=1))
    # No run repeats its data here.
    once = compare_forms(N, D, CHINCHILLA(N, D))
    assert "data-constrained" not in [s.form for s in once.scores]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.permutations(range(64)), st.floats(-6, 6), st.floats(-1, 1), st.sampled_from(list(PARAMETER_COUNTS)))
def test_units_and_the_order_of_rows_do_not_change_a_form(
    order: list[int], unit: float, nats: float, form: str
) -> None:
    N, D, U = grid()
    loss, unit, nats = REPEATED(N, D, U) * noise(0.003, 4, N.size), 10**unit, 10**nats
    one = fit_form(form, N, D, loss, unique=U)
    N2, D2, U2, loss2 = N[order] * unit, D[order] * unit, U[order] * unit, loss[order] * nats
    other = fit_form(form, N2, D2, loss2, unique=U2)
    assert other.objective == pytest.approx(one.objective, rel=1e-3)
    np.testing.assert_allclose(
        other.predict(1e11 * unit, 1e12 * unit, 1e12 * unit), one.predict(1e11, 1e12, 1e12) * nats, rtol=5e-3
    )
    for name in ("alpha", "beta", "R_D", "alpha_N", "alpha_D"):
        if name in one.parameters and form != "kaplan":
            assert other.parameters[name] == pytest.approx(one.parameters[name], rel=0.02)


def test_the_status_names_what_is_not_identified() -> None:
    N, D, U = grid()
    assert "R_D is not measured" in fit_form("data-constrained", N, D, CHINCHILLA(N, D), unique=D).status
    assert "R_D is hardly measured" in fit_form("data-constrained", N, D, REPEATED(N, D, D / 2), unique=D / 2).status
    assert "does not fall with D" in fit_form("log-linear", N, D, 30 * N**-0.1 * D**0.01).status
    assert (
        "One distinct N" in fit_form("kaplan", np.full(8, 1e9), np.geomspace(1e9, 1e11, 8), np.linspace(4, 3, 8)).status
    )
    assert "alpha_N / alpha_D is at its bound" in fit_form("kaplan", N, D, 1e3 * D**-0.25).status
    straight = fit_form("data-constrained", N, D, (30 * N**-0.1 + 40 * D**-0.1) ** 1.3, unique=U).status
    assert "The floor E is about 0" in straight


def test_with_few_runs_the_choice_is_a_named_default() -> None:
    N, D, _ = grid()
    few = compare_forms(N[:5], D[:5] * np.arange(1, 6), CHINCHILLA(N[:5], D[:5] * np.arange(1, 6)))
    assert few.chosen == "chinchilla"
    assert "by default, not by test" in few.status
    assert np.isnan(few.scores[0].mean)
    with pytest.raises(FitError, match="kaplan form has 4 parameters"):
        fit_form("kaplan", N[:4], D[:4] * np.arange(1, 5), np.array([4.0, 3.9, 3.8, 3.7]))
    with pytest.raises(ValueError, match="form must be one of"):
        fit_form("mine", N, D, CHINCHILLA(N, D))
    with pytest.raises(ValueError, match="unique must be positive"):
        fit_form("data-constrained", N, D, CHINCHILLA(N, D), unique=-1.0)
