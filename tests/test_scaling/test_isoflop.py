import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.fitting.envelope import compare_approaches, fit_envelope, make_approaches_table, make_law_frontier
from scaling.fitting.isoflop import Frontier, fit_isoflop
from scaling.fitting.loss_law import FitError, fit_loss_law
from scaling.laws.formulas import LossLaw

CHINCHILLA = LossLaw(E=1.82, A=480.0, B=2100.0, alpha=0.348, beta=0.366)
LOPSIDED = LossLaw(E=1.5, A=60.0, B=9.0e4, alpha=0.22, beta=0.5)
Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def isoflops(law: LossLaw, sd: float, seed: int, half: float = 1.6, runs: int = 9) -> Rows:
    """Return C, N, D and loss at nine compute budgets, with sizes around a middle that is not the optimum."""
    rng = np.random.default_rng(seed)
    C = np.repeat(np.geomspace(1e18, 1e21, 9), runs)
    middle = law.optimum(C)[0] * np.exp(0.5 * rng.standard_normal(9)).repeat(runs)
    N = middle * np.exp(np.tile(np.linspace(-half, half, runs), 9))
    D = C / 6 / N
    return C, N, D, law(N, D) * np.exp(sd * rng.standard_normal(N.size))


def curves(law: LossLaw, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e8, 2e10, 16), np.geomspace(2e8, 1e12, 50), indexing="ij"))
    effect = np.random.default_rng(seed).standard_normal(16).repeat(50)
    return N, D, law(N, D) * np.exp(0.001 * effect), [f"run {i}" for i in range(16) for _ in range(50)]


def test_parabolas_in_ln_n_are_recovered_exactly() -> None:
    C = np.repeat(np.geomspace(1e18, 1e21, 6), 5)
    best = 2e8 * (C / 1e18) ** 0.47
    N = best * np.tile([0.3, 0.7, 1.1, 1.8, 4.0], 6)
    loss = 3 * (C / 1e18) ** -0.05 * np.exp(0.01 * np.log(N / best) ** 2)
    frontier = fit_isoflop(N, C / 6 / N, loss)
    assert frontier.N.law.exponent == pytest.approx(0.47, abs=1e-6)
    assert frontier.D.law.exponent == pytest.approx(0.53, abs=1e-6)
    assert float(frontier.N.law(1e23)) == pytest.approx(2e8 * 1e5**0.47, rel=1e-4)
    assert [p.N for p in frontier.points] == pytest.approx(list(best[::5]), rel=1e-5)
    assert [6 * p.N * p.D for p in frontier.points] == pytest.approx(list(C[::5]), rel=1e-6)
    assert frontier.points[0].loss == pytest.approx(3.0, rel=1e-5)
    assert frontier.status == "ok"


@pytest.mark.parametrize("truth", [CHINCHILLA, LOPSIDED])
def test_isoflop_intervals_contain_the_planted_exponent_at_least_as_often_as_stated(truth: LossLaw) -> None:
    share, held, off, width = truth.beta / (truth.alpha + truth.beta), 0, [], []
    for seed in range(100):
        C, N, D, loss = isoflops(truth, 0.003, seed)
        frontier = fit_isoflop(N, D, loss, C=C)
        low, high = frontier.N.exponent_interval(0.8)
        held += int(low <= share <= high)
        width.append(high - low)
        off.append(np.log(float(frontier.N.law(3e19)) / float(truth.optimum(3e19)[0])))
    assert held >= 75
    assert np.median(width) < 0.08
    # A parabola is biased towards the flatter side of a lopsided bowl.
    assert abs(np.mean(off)) < 0.06


def test_a_group_without_a_minimum_is_left_out_and_reported() -> None:
    C, N, D, loss = isoflops(CHINCHILLA, 0.0, 1, runs=15)
    complete = fit_isoflop(N, D, loss, C=C)
    below = CHINCHILLA.optimum(C)[0] > 1.5 * N
    # At the largest compute only sizes below the optimum remain.
    kept = (C < 9e20) | below
    frontier = fit_isoflop(N[kept], D[kept], loss[kept], C=C[kept])
    assert frontier.points[-1].status == "the minimum is outside the sizes"
    assert "1 of 9 groups" in frontier.status
    assert frontier.N.law.exponent == pytest.approx(complete.N.law.exponent, abs=0.01)
    with pytest.raises(FitError, match="got 0"):
        fit_isoflop(N[below], D[below], loss[below], C=C[below])
    with pytest.raises(FitError, match="2 or more groups"):
        fit_isoflop(N[:9], D[:9], loss[:9])
    with pytest.raises(ValueError, match="C needs one positive number"):
        fit_isoflop(N, D, loss, C=C[:3])


def test_runs_that_scatter_about_a_budget_are_moved_to_it() -> None:
    C, N, _, _ = isoflops(CHINCHILLA, 0.0, 2)
    scattered = C * np.exp(np.random.default_rng(3).uniform(-0.12, 0.12, C.size))
    D = scattered / 6 / N
    budgets = np.geomspace(1e18, 1e21, 9)
    exact = fit_isoflop(N, C / 6 / N, CHINCHILLA(N, C / 6 / N), C=C)
    frontier = fit_isoflop(N, D, CHINCHILLA(N, D), budgets=budgets)
    assert len(frontier.points) == 9
    assert frontier.N.law.exponent == pytest.approx(exact.N.law.exponent, abs=0.02)
    assert float(frontier.N.law(3e19)) == pytest.approx(float(exact.N.law(3e19)), rel=0.03)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.permutations(range(81)), st.floats(-6, 6), st.floats(-6, 6), st.floats(-1, 1))
def test_units_and_the_order_of_runs_leave_the_exponents(order: list[int], n: float, c: float, nats: float) -> None:
    C, N, D, loss = isoflops(CHINCHILLA, 0.004, 5)
    n, c, nats = 10**n, 10**c, 10**nats
    one = fit_isoflop(N, D, loss, C=C)
    other = fit_isoflop(N[order] * n, D[order], loss[order] * nats, C=C[order] * c)
    assert other.N.law.exponent == pytest.approx(one.N.law.exponent, rel=1e-6)
    assert other.D.law.exponent == pytest.approx(one.D.law.exponent, rel=1e-6)
    assert float(other.N.law(1e22 * c)) == pytest.approx(float(one.N.law(1e22)) * n, rel=1e-6)
    assert other.N.exponent_interval() == pytest.approx(one.N.exponent_interval(), rel=1e-5)


def test_the_envelope_of_curves_finds_the_planted_exponent() -> None:
    share = CHINCHILLA.beta / (CHINCHILLA.alpha + CHINCHILLA.beta)
    held = 0
    for seed in range(10):
        N, D, loss, ids = curves(CHINCHILLA, seed)
        frontier = fit_envelope(N, D, loss, run_ids=ids, bootstrap=60, seed=seed)
        assert frontier.N.law.exponent == pytest.approx(share, abs=0.06)
        assert frontier.N.law.exponent + frontier.D.law.exponent == pytest.approx(1.0, abs=0.01)
        low, high = frontier.N.exponent_interval(0.8)
        held += int(low <= share <= high)
        excluded = [p for p in frontier.points if p.status != "ok"]
        assert all(p.N in (pytest.approx(1e8), pytest.approx(2e10)) or p.runs < 16 for p in excluded)
    assert held >= 7


def test_the_envelope_needs_a_best_size_between_others() -> None:
    N = np.repeat([1e8, 1e9], 20)
    D = np.tile(np.geomspace(1e9, 1e11, 20), 2)
    with pytest.raises(FitError, match="a size between others"):
        fit_envelope(N, D, CHINCHILLA(N, D))
    with pytest.raises(ValueError, match="one entry per row"):
        fit_envelope(N, D, CHINCHILLA(N, D), run_ids=["a"])


def test_the_law_approach_is_the_optimum_of_the_law() -> None:
    C, N, D, loss = isoflops(CHINCHILLA, 0.003, 6)
    fit = fit_loss_law(N, D, loss, bootstrap=60)
    frontier = make_law_frontier(fit, C)
    for compute in (1e18, 1e22):
        assert (float(frontier.N.law(compute)), float(frontier.D.law(compute))) == pytest.approx(
            [float(v) for v in fit.law.optimum(compute)]
        )
    assert frontier.N.law.exponent + frontier.D.law.exponent == pytest.approx(1.0)
    low, high = frontier.N.exponent_interval(0.95)
    assert low < CHINCHILLA.beta / (CHINCHILLA.alpha + CHINCHILLA.beta) < high
    with pytest.raises(ValueError, match="bootstrap=200"):
        make_law_frontier(fit_loss_law(N, D, loss), C)


def test_the_three_approaches_agree_on_planted_data_and_the_table_shows_them() -> None:
    C, N, D, loss = isoflops(CHINCHILLA, 0.002, 7, runs=13)
    approaches = compare_approaches(N, D, loss, C=C, bootstrap=60)
    assert list(approaches) == ["envelope", "isoflop", "law"]
    for frontier in approaches.values():
        assert isinstance(frontier, Frontier)
        assert frontier.N.law.exponent == pytest.approx(0.513, abs=0.07)
    table = make_approaches_table(approaches, 1e22).set_index("approach")
    truth = float(CHINCHILLA.optimum(1e22)[0])
    assert np.all((table["N_opt_low"] < truth) & (truth < table["N_opt_high"]))
    assert np.all(table["N_exponent_low"] < table["N_exponent_high"])


def test_an_approach_that_the_runs_do_not_allow_is_a_sentence_in_its_place() -> None:
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e8, 1e10, 5), np.geomspace(2e9, 2e11, 4)))
    approaches = compare_approaches(N, D, CHINCHILLA(N, D) * np.exp(0.003 * np.cos(7 * np.arange(20))), bootstrap=40)
    assert isinstance(approaches["isoflop"], str)
    assert "groups of compute" in approaches["isoflop"]
    assert isinstance(approaches["law"], Frontier)
    assert "groups of compute" in make_approaches_table(approaches, 1e22)["status"][1]


def test_curves_give_their_last_points_to_the_other_approaches() -> None:
    N, D, loss, ids = curves(CHINCHILLA)
    approaches = compare_approaches(N, D, loss, run_ids=ids, bootstrap=40)
    last = D == D.max()
    law = fit_loss_law(N[last], D[last], loss[last])
    assert "One distinct D" in law.status
    assert isinstance(approaches["envelope"], Frontier)
    assert isinstance(approaches["law"], str) or "One distinct D" in approaches["law"].status
