from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.fitting.bowl import B2_INDEX, BOWLS, SHAPE_START, evaluate_model, make_precision, make_prior, phi
from scaling.fitting.groups import GroupedRuns
from scaling.fitting.loss_law import FitError
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law
from scaling.laws.formulas import HPLaw, LossLaw

FLOOR = LossLaw(E=1.2, A=30.0, B=90.0, alpha=0.3, beta=0.35)
MUP = HPLaw(lr_coef=2**-7 * 6e5**0.25, lr_N=0.0, lr_D=-0.25, batch_coef=2000 * 6e5**-0.5, batch_N=0.0, batch_D=0.5)
LARGE = HPLaw(lr_coef=1.8, lr_N=-0.7, lr_D=0.3, batch_coef=0.6, batch_N=0.0, batch_D=0.57)


def height(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return a lopsided bowl, steeper on the side of large learning rates. It is neither of the fitted forms."""
    return 0.02 * (u - 0.3 * v) ** 2 + 0.01 * v * v + 0.006 * np.maximum(u, 0) ** 3


def sweep(
    law: HPLaw,
    *,
    per: int,
    seed: int,
    sizes: tuple[float, ...] = (1e5, 2e5, 4e5),
    tokens: tuple[float, ...] = (2e5, 6e5, 1.8e6),
    noise: float = 0.003,
    spread: float = 1.5,
    off: float = 0.0,
    own: float = 0.0,
    scale: Callable[[float, float], float] = lambda N, D: 1.0,
    **columns: object,
) -> pd.DataFrame:
    """Draw (lr, batch) about the optimum.

    Args:
        law: The optimum.
        per: Runs in each group.
        seed: Seed of the draws.
        sizes: N of the groups.
        tokens: D of the groups.
        noise: Standard deviation of ln loss of a run.
        spread: Half the range of ln lr and ln B.
        off: Shift of the tried batches from the optimum, in ln B.
        own: Standard deviation of each group's own shift of ln lr* and ln B*.
        scale: Height of the bowl by (N, D).
        columns: Further columns.
    """
    rng, rows = np.random.default_rng(seed), []
    for N in sizes:
        for D in tokens:
            lr, batch = (float(v) for v in law(N, D))
            u, v = rng.uniform(-spread, spread, per), rng.uniform(-spread, spread, per) + off
            shift = own * rng.standard_normal(2) if own else np.zeros(2)
            depth = scale(N, D) * height(u - shift[0], v - shift[1])
            loss = float(FLOOR(N, D)) * np.exp(depth + noise * rng.standard_normal(per))
            rows += [(N, D, lr * np.exp(a), batch * np.exp(b), y) for a, b, y in zip(u, v, loss, strict=True)]
    return pd.DataFrame(rows, columns=["N", "D", "lr", "batch_tokens", "loss"]).assign(**columns)


def test_a_planted_law_is_recovered_and_extrapolated_to_four_times_the_size() -> None:
    runs = sweep(LARGE, per=30, seed=0, sizes=(6e7, 2e8, 4e8), tokens=(2e9, 8e9, 3e10))
    fit = fit_hp_law(runs)
    assert fit.status == "ok"
    assert (fit.law.lr_N, fit.law.lr_D, fit.law.batch_D) == pytest.approx((-0.7, 0.3, 0.57), abs=0.06)
    for predicted, true in zip(fit.law(1.6e9, 1.2e11), LARGE(1.6e9, 1.2e11), strict=True):
        assert float(np.log(predicted / true)) == pytest.approx(0, abs=0.25)


def test_under_mup_the_rate_does_not_move_with_size_and_its_trend_in_tokens_is_kept() -> None:
    fit = fit_hp_law(sweep(MUP, per=20, seed=1, parametrization="mup"))
    assert fit.law.lr_N == pytest.approx(0.0, abs=0.05)
    assert fit.law.lr_D == pytest.approx(-0.25, abs=0.06)
    steeper = HPLaw(MUP.lr_coef * 6e5**0.15, 0.0, -0.4, MUP.batch_coef, 0.0, 0.5)
    assert fit_hp_law(sweep(steeper, per=20, seed=1, parametrization="mup")).law.lr_D == pytest.approx(-0.4, abs=0.08)


def test_the_mup_prior_needs_every_run_to_be_mup() -> None:
    lone = sweep(MUP, per=12, seed=2, sizes=(1e5,), tokens=(6e5,))
    assert fit_hp_law(lone.assign(parametrization="mup")).law.lr_N == pytest.approx(0.0, abs=0.01)
    assert fit_hp_law(lone).law.lr_N == pytest.approx(-0.6, abs=0.01)
    mixed = lone.assign(parametrization=["mup"] * 11 + ["standard"])
    assert fit_hp_law(mixed).law.lr_N == pytest.approx(-0.6, abs=0.01)


@pytest.mark.parametrize(("per", "noise"), [(3, 0.01), (6, 0.003), (20, 0.003)])
def test_intervals_hold_the_planted_optimum(per: int, noise: float) -> None:
    held, runs = np.zeros(2), 12
    true = [float(v) for v in MUP(8e5, 5e6)]
    for seed in range(runs):
        fit = fit_hp_law(sweep(MUP, per=per, seed=seed, noise=noise, parametrization="mup"))
        held += [low <= t <= high for (low, high), t in zip(fit.interval(8e5, 5e6, mass=0.9), true, strict=True)]
    assert np.all(held >= 9)


def test_the_expected_regret_bounds_the_real_one_and_falls_with_runs() -> None:
    real, expected = {}, {}
    for per in (4, 30):
        fits = [fit_hp_law(sweep(MUP, per=per, seed=s, parametrization="mup")) for s in range(6)]
        off = [np.log(np.array(f.law(8e5, 5e6)) / np.array(MUP(8e5, 5e6))) for f in fits]
        real[per] = np.mean([height(u, v) for u, v in off])
        expected[per] = np.mean([f.expected_regret(8e5, 5e6) for f in fits])
        assert real[per] < expected[per]
    assert expected[30] < 0.7 * expected[4]


def test_floors_are_the_planted_minima_though_no_run_is_there() -> None:
    """All learning rates are far from the optimum, so every run lies above its floor. The fitted minimum does not."""
    runs = sweep(MUP, per=25, seed=3, noise=0.002, parametrization="mup")
    runs = runs[np.abs(np.log(runs["lr"] / MUP(runs["N"], runs["D"])[0])) > 0.5]
    fit = fit_hp_law(runs)
    floors = fit.floors
    assert list(floors.columns) == ["N", "D", "loss", "sd", "n", "untried"]
    assert (floors["untried"] < 0.001).all(), "rates on both sides were tried"
    assert len(floors) == 9
    assert floors["n"].sum() == fit.n_runs == len(runs)
    off = np.log(floors["loss"] / FLOOR(floors["N"], floors["D"]))
    assert np.abs(off).max() < 0.006
    assert np.mean(np.abs(off) < 2.5 * floors["sd"]) > 0.8


def test_the_height_is_zero_at_the_law_and_grows_away_from_it() -> None:
    fit = fit_hp_law(sweep(MUP, per=20, seed=4, parametrization="mup"))
    lr, batch = fit.law(2e5, 6e5)
    assert float(fit.height(lr, batch, 2e5, 6e5)) == pytest.approx(0, abs=1e-12)
    u = np.array([-1.0, -0.5, 0.5, 1.0])
    np.testing.assert_allclose(fit.height(lr * np.exp(u), batch, 2e5, 6e5), height(u, 0 * u), atol=0.006)
    assert fit.height(lr * np.exp(u)[:, None], batch * np.exp(u), 2e5, 6e5).shape == (4, 4)


def test_the_law_is_the_mean_of_the_fits_and_draws_scatter_about_it() -> None:
    fit = fit_hp_law(sweep(MUP, per=20, seed=5, parametrization="mup"))
    x = np.array([1, np.log(8e5) - fit.centre[0], np.log(5e6) - fit.centre[1]])
    assert sum(f.weight for f in fit.fits) == pytest.approx(1)
    mean = sum(f.weight * float(f.theta[:3] @ x) for f in fit.fits)
    assert float(np.log(fit.law(8e5, 5e6)[0])) == pytest.approx(mean)
    lr, batch = fit.draw(8e5, 5e6, 4000, seed=1)
    assert lr.shape == batch.shape == (4000,)
    assert np.log(lr).mean() == pytest.approx(float(np.log(fit.law(8e5, 5e6)[0])), abs=0.03)
    # The drift alone gives this.
    assert np.log(lr).std() > 0.05 * np.sqrt(abs(x[1]) + abs(x[2]))
    np.testing.assert_array_equal(lr, fit.draw(8e5, 5e6, 4000, seed=1)[0])
    near, far = (np.diff(np.log(fit.interval(N, D)[0]))[0] for N, D in ((2e5, 6e5), (1e8, 1e9)))
    assert far > 1.5 * near


def test_the_optimum_drifts_like_a_random_walk_beyond_what_the_runs_leave_open() -> None:
    """Its variance is 0.05² (lr) and 0.08² (B) for each e-fold of N and D, on top of coefficients and group shifts."""
    fit = fit_hp_law(sweep(MUP, per=20, seed=5))
    single = replace(fit, fits=(replace(fit.fits[0], weight=1.0),))
    (bowl,) = single.fits
    for n, d in ((0.0, 0.0), (2.0, 0.0), (3.0, 4.0)):
        N, D = np.exp(np.add(fit.centre, (n, d)))
        drawn = np.log(single.draw(N, D, 40_000, seed=1))
        x = np.array([[1, n, d, 0, 0, 0], [0, 0, 0, 1, d, n]])
        known = np.diag(x @ bowl.spread @ x.T) + bowl.cells @ bowl.shifts**2
        np.testing.assert_allclose(drawn.var(1), known + np.array([0.05, 0.08]) ** 2 * (n + d), rtol=0.05)


def test_neither_the_order_of_runs_nor_the_level_of_a_group_moves_the_law() -> None:
    runs = sweep(MUP, per=20, seed=6)
    fit, shuffled = fit_hp_law(runs), fit_hp_law(runs.sample(frac=1.0, random_state=0))
    assert fit.law.lr_D == pytest.approx(shuffled.law.lr_D, abs=1e-5)
    shifted = fit_hp_law(runs.assign(loss=runs["loss"] * np.where(runs["N"] > 1.5e5, 2.0, 1.0)))
    assert shifted.law.lr_N == pytest.approx(fit.law.lr_N, abs=0.002)


def test_diverged_runs_and_another_regime_are_dropped_and_counted() -> None:
    runs = sweep(MUP, per=20, seed=7, parametrization="mup")
    clean = fit_hp_law(runs)
    lost = pd.concat([runs, runs.head(5).assign(loss=np.nan), runs.head(3).assign(loss=runs["loss"].max() * 3)])
    fit = fit_hp_law(lost)
    assert (fit.n_runs, fit.n_diverged, fit.n_far) == (180, 5, 3)
    assert fit.law == clean.law


def test_one_batch_size_gives_a_learning_rate_and_a_status_that_the_batch_is_assumed() -> None:
    runs = sweep(MUP, per=10, seed=8, parametrization="mup")
    runs["batch_tokens"] = 2048.0
    fit = fit_hp_law(runs)
    assert "One batch" in fit.status
    assert not fit.identified["batch_tokens"]
    (_, _), (low, high) = fit.interval(1e5, 2e5)
    assert high / low > 10


def test_one_group_gives_a_result_and_a_status_that_the_trend_is_assumed() -> None:
    fit = fit_hp_law(sweep(MUP, per=15, seed=9, sizes=(1e5,), tokens=(6e5,), parametrization="mup"))
    assert "One (N, D) group" in fit.status
    assert float(np.log(fit.law(1e5, 6e5)[0] / MUP(1e5, 6e5)[0])) == pytest.approx(0, abs=0.5)


def test_a_single_run_gives_the_prior() -> None:
    fit = fit_hp_law(sweep(MUP, per=1, seed=10, sizes=(1e5,), tokens=(2e5,), parametrization="mup"))
    assert float(fit.law(1e5, 2e5)[0]) == pytest.approx(2**-7, rel=1e-4)
    assert fit.identified == {"lr": False, "batch_tokens": False}


@pytest.mark.parametrize("off", [-2.5, 2.5])
def test_an_optimum_beyond_the_tried_batches_is_named(off: float) -> None:
    fit = fit_hp_law(sweep(MUP, per=20, seed=11, off=off, spread=1.0, parametrization="mup"))
    side = "below" if off > 0 else "above"
    assert f"The best batch lies {side} the runs' range" in fit.status


def test_impossible_tables_are_refused() -> None:
    runs = sweep(MUP, per=3, seed=12)
    with pytest.raises(ValueError, match=r"missing: lr"):
        fit_hp_law(runs.drop(columns="lr"))
    with pytest.raises(ValueError, match=r"lr must be positive and finite, got -1.0 \(rows 4\)"):
        fit_hp_law(runs.assign(lr=np.where(np.arange(len(runs)) == 4, -1.0, runs["lr"])))
    with pytest.raises(FitError, match="none usable"):
        fit_hp_law(runs.assign(loss=np.nan))
    fit = fit_hp_law(runs)
    for ask in (lambda: fit.interval(1e6, 1e6, mass=1.0), lambda: fit.exponents(mass=0.0)):
        with pytest.raises(ValueError, match="mass"):
            ask()
    with pytest.raises(ValueError, match="positive finite"):
        fit.draw(-1.0, 1e6, 10, seed=0)


@pytest.mark.parametrize("column", [True, False])
def test_under_mup_the_fit_finds_exponent_zero_in_size_and_the_planted_one_in_tokens(column: bool) -> None:
    """lr* at base width is constant in N and falls as D^-0.32, at the constant batch of arXiv 2409.19913."""
    law = HPLaw(2**-7 * 6e5**0.32, 0.0, -0.32, 2000.0, 0.0, 0.0)
    runs = sweep(law, per=25, seed=21, **({"parametrization": "mup"} if column else {}))
    fit = fit_hp_law(runs)
    low, high = fit.exponents(0.9)["lr_N"]
    assert low < 0.0 < high
    # The default prior alone is 1 wide, about -0.6.
    assert high - low < 0.5
    assert fit.law.lr_N == pytest.approx(0.0, abs=0.08)
    low, high = fit.exponents(0.9)["lr_D"]
    assert low < -0.32 < high < 0.0
    assert fit.law.lr_D == pytest.approx(-0.32, abs=0.06)


SIZES, TOKENS = (6e7, 2e8, 6e8), (2e9, 8e9, 3e10)


def test_a_batch_that_moves_with_size_is_found_when_the_evidence_is_strong() -> None:
    strong = HPLaw(1.8, -0.7, 0.3, 0.6 * 2e8**0.5, -0.5, 0.57)
    fit = fit_hp_law(sweep(strong, per=30, seed=22, sizes=SIZES, tokens=TOKENS))
    assert fit.law.batch_N == pytest.approx(-0.5, abs=0.1)
    weak = HPLaw(1.8, -0.7, 0.3, 0.6 * 2e8**0.1, -0.1, 0.57)
    fit = fit_hp_law(sweep(weak, per=30, seed=22, sizes=SIZES, tokens=TOKENS))
    moving = max(f.theta[B2_INDEX] for f in fit.fits if abs(f.theta[B2_INDEX]) > 1e-9)
    # It is shrunk towards zero, not to zero.
    assert moving < fit.law.batch_N < 0
    low, high = fit.exponents(0.8)["batch_N"]
    assert low < -0.1
    assert high > 0.0


def test_half_of_the_fits_have_a_batch_that_does_not_move_with_size() -> None:
    fits = fit_hp_law(sweep(LARGE, per=12, seed=23, sizes=SIZES, tokens=TOKENS)).fits
    still = [f for f in fits if abs(f.theta[B2_INDEX]) < 1e-12]
    assert len(still) == len(fits) / 2 == 4
    for f in still:
        # The condition holds for the mean over the cells, so single cells are not exactly zero.
        assert np.abs(f.covariance[:, B2_INDEX]).max() < 1e-4
        assert np.all(np.linalg.eigvalsh(f.covariance) > -1e-9)


def test_a_bowl_that_flattens_with_size_does_not_bias_the_optima() -> None:
    def flatter(N: float, D: float) -> float:
        return float((D / 8e9) ** -0.15 * (N / 2e8) ** -0.05)

    runs = sweep(LARGE, per=40, seed=24, sizes=SIZES, tokens=TOKENS, noise=0.001, scale=flatter)
    fit = fit_hp_law(runs)
    for f in fit.fits:
        assert f.theta[SHAPE_START - 2 : SHAPE_START] == pytest.approx((-0.05, -0.15), abs=0.05)
    assert (fit.law.lr_N, fit.law.lr_D, fit.law.batch_D) == pytest.approx((-0.7, 0.3, 0.57), abs=0.05)
    lr, batch = fit.law(2e8, 3e10)
    small_lr, small_batch = fit.law(2e8, 2e9)
    ratio = float(fit.height(lr * np.exp(0.8), batch, 2e8, 3e10)) / float(
        fit.height(small_lr * np.exp(0.8), small_batch, 2e8, 2e9)
    )
    assert ratio == pytest.approx(15**-0.15, rel=0.15)


@pytest.mark.parametrize("exponent", [-0.4, 0.0, 0.4])
def test_other_exponents_than_the_priors_are_found(exponent: float) -> None:
    law = HPLaw(2e-3 * 2e8**-exponent * 8e9**exponent, exponent, -exponent, 3e5 * 8e9**-0.4, 0.0, 0.4)
    fit = fit_hp_law(sweep(law, per=20, seed=25, sizes=SIZES, tokens=TOKENS, own=0.08))
    assert (fit.law.lr_N, fit.law.lr_D, fit.law.batch_D) == pytest.approx((exponent, -exponent, 0.4), abs=0.12)


def check_result(fit: HPFit) -> None:
    """Check what every result must have, however few runs there are."""
    lr, batch = (float(v) for v in fit.law(4e8, 1e10))
    assert 0 < lr < np.inf
    assert 0 < batch < np.inf
    ranges = fit.interval(4e8, 1e10, 0.8)
    assert all(0 < low < high < np.inf for low, high in ranges)
    assert 0 < fit.expected_regret(4e8, 1e10) <= 0.5
    assert np.isfinite(fit.floors["loss"]).all()


@pytest.mark.parametrize("what", ["one run a group", "one group", "one lr", "one batch", "one of each", "NaN", "one N"])
def test_few_runs_give_a_result_and_a_status(what: str) -> None:
    runs = sweep(LARGE, per=6, seed=26, sizes=SIZES, tokens=TOKENS)
    table = {
        "one run a group": runs.groupby(["N", "D"]).head(1),
        "one group": runs.head(6),
        "one lr": runs.assign(lr=2e-3),
        "one batch": runs.assign(batch_tokens=3e5),
        "one of each": runs.assign(lr=2e-3, batch_tokens=3e5),
        "NaN": runs.assign(loss=np.where(np.arange(len(runs)) % 6 < 5, np.nan, runs["loss"])),
        "one N": runs[runs["N"] == 6e7],
    }[what]
    fit = fit_hp_law(table)
    check_result(fit)
    assert fit.status != "ok"
    assert fit.n_runs + fit.n_diverged + fit.n_far == len(table)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    tokens=st.floats(0.01, 10.0),
    params=st.floats(0.01, 10.0),
    lr=st.floats(0.1, 10.0),
    loss=st.floats(0.3, 3.0),
)
def test_other_units_change_the_coefficients_and_not_the_optimum(
    tokens: float, params: float, lr: float, loss: float
) -> None:
    """With tokens in sequences or N in millions the optimum is the same, except for the weak prior of the level."""
    runs = sweep(LARGE, per=20, seed=27, sizes=SIZES, tokens=TOKENS)
    fit = fit_hp_law(runs)
    converted = fit_hp_law(
        runs.assign(
            N=runs["N"] * params, D=runs["D"] * tokens, batch_tokens=runs["batch_tokens"] * tokens,
            lr=runs["lr"] * lr, loss=runs["loss"] * loss,
        )
    )  # fmt: skip
    optimum, converted_optimum = fit.law(1e9, 6e10), converted.law(1e9 * params, 6e10 * tokens)
    assert float(converted_optimum[0]) == pytest.approx(lr * float(optimum[0]), rel=0.03)
    assert float(converted_optimum[1]) == pytest.approx(tokens * float(optimum[1]), rel=0.03)
    assert (converted.law.lr_N, converted.law.lr_D, converted.law.batch_D) == pytest.approx(
        (fit.law.lr_N, fit.law.lr_D, fit.law.batch_D), abs=0.01
    )


@settings(max_examples=4, deadline=None, derandomize=True)
@given(order=st.integers(0, 1000), copies=st.integers(2, 3))
def test_order_and_duplicates_of_runs_do_not_move_the_optimum(order: int, copies: int) -> None:
    runs = sweep(LARGE, per=20, seed=28, sizes=SIZES, tokens=TOKENS)
    once = fit_hp_law(runs).law(1e9, 6e10)
    shuffled = fit_hp_law(runs.sample(frac=1.0, random_state=order)).law(1e9, 6e10)
    assert [float(v) for v in shuffled] == pytest.approx([float(v) for v in once], rel=1e-4)
    # Copies only weaken the priors a little.
    twice = fit_hp_law(pd.concat([runs] * copies)).law(1e9, 6e10)
    assert [float(v) for v in twice] == pytest.approx([float(v) for v in once], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("per", [10])
def test_eighty_per_cent_intervals_contain_planted_optima_of_new_groups(per: int) -> None:
    """100 families of runs have exponents from the prior; every group, including the new one, has its own shift."""
    held, bound = np.zeros(2), []
    for seed in range(100):
        rng = np.random.default_rng([per, seed])
        a1, a2, b1 = rng.normal([-0.6, 0.2, 0.5], [0.2, 0.2, 0.15])
        law = HPLaw(2e-3 * 2e8**-a1 * 8e9**-a2, a1, a2, 3e5 * 8e9**-b1, 0.0, b1)
        fit = fit_hp_law(sweep(law, per=per, seed=seed, sizes=SIZES, tokens=TOKENS, own=0.08, noise=0.002))
        true = np.array([float(v) for v in law(1e9, 5e10)]) * np.exp(0.08 * rng.standard_normal(2))
        held += [low <= t <= high for (low, high), t in zip(fit.interval(1e9, 5e10, 0.8), true, strict=True)]
        off = np.log(np.array([float(v) for v in fit.law(1e9, 5e10)]) / true)
        bound.append((float(height(off[0], off[1])), fit.expected_regret(1e9, 5e10)))
    assert np.all(held >= 75)
    real, expected = np.mean(bound, 0)
    assert real < expected < 8 * real


@pytest.mark.parametrize("form", list(BOWLS))
def test_bowl_derivatives_are_those_of_differences(form: str) -> None:
    rng = np.random.default_rng(13)
    shape = np.array([[-4.0, -5.0, -0.3, 0.004, -0.002, 0.003, 0.001]]) if form == "cubic" else None
    shape = np.array([[-4.0, -5.0, -0.3, 0.2, 0.6, -0.4]]) if shape is None else shape
    u, v, h, bowl = rng.normal(size=(1, 9)), rng.normal(size=(1, 9)), 1e-6, BOWLS[form]
    _, by_u, by_v, by_shape = bowl(shape, u, v)
    np.testing.assert_allclose(by_u, (bowl(shape, u + h, v)[0] - bowl(shape, u - h, v)[0]) / (2 * h), atol=1e-8)
    np.testing.assert_allclose(by_v, (bowl(shape, u, v + h)[0] - bowl(shape, u, v - h)[0]) / (2 * h), atol=1e-8)
    for i, e in enumerate(np.eye(shape.size)):
        slope = (bowl(shape + h * e, u, v)[0] - bowl(shape - h * e, u, v)[0]) / (2 * h)
        np.testing.assert_allclose(by_shape[:, :, i], slope, atol=1e-8)


@pytest.mark.parametrize("form", list(BOWLS))
def test_the_slopes_of_the_whole_model_are_those_of_differences(form: str) -> None:
    rng = np.random.default_rng(14)
    m = 7
    data = GroupedRuns(
        np.zeros(m), rng.normal(size=m), rng.normal(size=m), rng.normal(size=m), rng.normal(size=m), np.array([0, 3])
    )
    mean, sd = make_prior(form, (20.0, 23.0), False)
    theta = mean + 0.3 * sd * rng.normal(size=mean.size)
    theta[[0, 3]] = 0.2, -0.1
    _, jacobian = evaluate_model(form, theta[None], data)
    for i, e in enumerate(np.eye(theta.size)):
        h = 1e-6
        up, down = (evaluate_model(form, (theta + sign * h * e)[None], data)[0] for sign in (1, -1))
        np.testing.assert_allclose(jacobian[:, :, i], (up - down) / (2 * h), atol=1e-8)


def test_phi_is_a_square_without_skew_and_is_continuous() -> None:
    z = np.array([[-1.0, 0.5, 2.0]])
    np.testing.assert_allclose(phi(z, np.zeros((1, 1)))[0], z**2)
    below, above = (phi(np.ones((1, 1)), np.full((1, 1), s)) for s in (0.0099999, 0.0100001))
    for a, b in zip(below, above, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-7)


@pytest.mark.parametrize(
    ("mup", "pair", "prior_sd", "together"),
    [
        (False, (1, 2), 0.3, 0.2),
        (False, (4, 5), 0.2, 0.2),
        (True, (4, 5), 0.2, 0.2),
    ],
)
def test_the_sum_of_exponents_is_known_better_than_each(
    mup: bool, pair: tuple[int, int], prior_sd: float, together: float
) -> None:
    """Two measurements of the sum: that of both exponents' priors, and the one of published laws."""
    covariance = np.linalg.inv(make_precision(make_prior("cubic", (20.0, 23.0), mup)[1], mup))
    both = covariance[np.ix_(pair, pair)]
    assert both.sum() == pytest.approx(1 / (1 / (2 * prior_sd**2) + 1 / together**2))
    # Their difference is as unknown as before.
    assert both[0, 0] + both[1, 1] - 2 * both[0, 1] == pytest.approx(2 * prior_sd**2)


def test_under_mup_the_rate_exponents_have_no_prior_on_their_sum() -> None:
    sd = make_prior("cubic", (20.0, 23.0), True)[1]
    covariance = np.linalg.inv(make_precision(sd, True))
    assert covariance[1, 2] == 0
    assert covariance[1, 1] == pytest.approx(sd[1] ** 2)
