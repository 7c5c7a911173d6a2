"""Groups of nearly equal N and D, the lowest losses that they tried, and what the loss law is fitted to."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.fitting.groups import CLOSE, SAME, cluster_values, group_runs
from scaling.fitting.loss_evidence import fit_loss_evidence
from scaling.fitting.loss_law import fit_loss_law
from scaling.fitting.lr_batch_law import fit_hp_law
from scaling.laws.formulas import HPLaw, LossLaw
from tests.test_scaling.test_lr_batch_law import FLOOR, LARGE, MUP, height, sweep


def plant_runs(N: np.ndarray, D: np.ndarray, seed: int, *, spread: float = 1.5, law: HPLaw = LARGE) -> pd.DataFrame:
    """Return one run at each N and D, with settings scattered about the optimum."""
    rng = np.random.default_rng(seed)
    u, v = rng.uniform(-spread, spread, (2, N.size))
    lr, batch = law(N, D)
    loss = FLOOR(N, D) * np.exp(height(u, v) + 0.002 * rng.standard_normal(N.size))
    return pd.DataFrame({"N": N, "D": D, "lr": lr * np.exp(u), "batch_tokens": batch * np.exp(v), "loss": loss})


def test_values_that_differ_by_rounding_are_one_and_evenly_spaced_ones_are_not() -> None:
    assert cluster_values(np.log([6e8, 6e8 * (1 + 1e-6), 6.004e8])).tolist() == [0, 0, 0]
    assert cluster_values(np.log([6e8, 6.1e8, 6.2e8, 2.4e9, 2.5e9])).tolist() == [0, 0, 0, 1, 1]
    dense = np.log(5e8) + np.log(10) * np.arange(54) / 53
    assert cluster_values(dense).max() == 53
    # Closer than any rounding, though nothing sets them apart.
    assert cluster_values(20 + 0.0005 * np.arange(200)).max() < 150


@given(st.lists(st.floats(15, 30), min_size=1, max_size=40))
def test_a_cluster_is_narrow_and_its_number_follows_the_value(values: list[float]) -> None:
    array = np.array(values)
    cluster = cluster_values(array)
    assert set(cluster) == set(range(cluster.max() + 1))
    assert (np.diff(cluster[np.argsort(array, kind="stable")]) >= 0).all()
    for i in range(cluster.max() + 1):
        assert np.ptp(array[cluster == i]) <= CLOSE
    for i in np.flatnonzero(np.diff(np.sort(array)) > SAME):
        left, right = np.sort(array)[[i, i + 1]]
        if right - left > CLOSE:
            assert cluster[array == left][0] < cluster[array == right][0]


def test_groups_are_those_of_equality_where_sizes_differ_widely() -> None:
    runs = sweep(LARGE, per=5, seed=0, sizes=(6e7, 2e8), tokens=(2e9, 8e9, 3e10)).sample(frac=1, random_state=1)
    groups = group_runs(runs["N"].to_numpy(), runs["D"].to_numpy())
    keys = runs[["N", "D"]].drop_duplicates().sort_values(["N", "D"])
    assert groups.N.tolist() == keys["N"].tolist()
    assert groups.D.tolist() == keys["D"].tolist()
    assert groups.counts.tolist() == [5] * 6
    assert (groups.D[groups.of] == runs["D"].to_numpy()).all()
    assert (np.sort(groups.order) == np.arange(len(runs))).all()


@pytest.mark.parametrize("ragged", [1e-6, 0.001, 0.01])
def test_tokens_that_differ_by_whole_steps_give_the_same_laws(ragged: float) -> None:
    even = sweep(LARGE, per=12, seed=2, sizes=(6e7, 2e8, 4e8), tokens=(2e9, 8e9, 3e10))
    extra = 1 + ragged * np.random.default_rng(3).uniform(size=len(even))
    odd = even.assign(D=np.round(even["D"] * extra))
    expected, fit = fit_hp_law(even), fit_hp_law(odd)
    assert len(fit.floors) == len(expected.floors) == 9
    for ours, theirs in zip(fit.law(1e9, 1e11), expected.law(1e9, 1e11), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=0.02)
    loss = [float(fit_loss_evidence(runs, hp).fit.predict(1e9, 1e11)) for runs, hp in ((even, expected), (odd, fit))]
    assert loss[1] == pytest.approx(loss[0], rel=0.003)


def test_runs_that_each_have_an_n_and_d_of_their_own_identify_the_optimum() -> None:
    rng = np.random.default_rng(4)
    N = np.exp(rng.uniform(np.log(3e7), np.log(1e9), 400))
    runs = plant_runs(N, N * np.exp(rng.uniform(np.log(10), np.log(60), 400)), seed=5)
    fit = fit_hp_law(runs)
    assert fit.identified == {"lr": True, "batch_tokens": True}
    for predicted, true in zip(fit.law(2e9, 8e10), LARGE(2e9, 8e10), strict=True):
        assert float(np.log(predicted / true)) == pytest.approx(0, abs=0.2)


def test_a_large_table_gives_the_law_of_a_part_of_it() -> None:
    """Ten thousand runs in nine groups: the first rounds see a part, and the result is that of all runs."""
    runs = sweep(LARGE, per=1200, seed=6, sizes=(6e7, 2e8, 4e8), tokens=(2e9, 8e9, 3e10))
    fit = fit_hp_law(runs)
    assert fit.n_runs == len(runs)
    assert fit.floors["n"].tolist() == [1200] * 9
    for predicted, true in zip(fit.law(1e9, 1e11), LARGE(1e9, 1e11), strict=True):
        assert float(np.log(predicted / true)) == pytest.approx(0, abs=0.15)


def test_more_groups_than_needed_are_drawn_from_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(7)
    N = np.exp(rng.uniform(np.log(3e7), np.log(1e9), 4000))
    with caplog.at_level("INFO", logger="muscale"):
        fit = fit_hp_law(plant_runs(N, 20 * N * np.exp(rng.uniform(-1, 1, 4000)), seed=8))
    assert len(fit.floors) <= 3000
    assert "a random 3,000 of" in caplog.text
    assert float(np.log(fit.law(2e9, 4e10)[0] / LARGE(2e9, 4e10)[0])) == pytest.approx(0, abs=0.1)


def test_the_lowest_loss_of_a_group_of_one_run_is_that_run() -> None:
    runs = sweep(MUP, per=12, seed=9, parametrization="mup")
    alone = runs.drop(runs.index[1:12]).reset_index(drop=True)
    fit = fit_hp_law(alone)
    assert fit.floors["n"].tolist() == [1] + [12] * 8
    assert fit.floors["loss"][0] == pytest.approx(alone["loss"][0], rel=1e-9)
    depth = fit.height(alone["lr"][0], alone["batch_tokens"][0], alone["N"][0], alone["D"][0])
    assert fit.floors["untried"][0] == pytest.approx(float(depth), abs=0.01)


def test_one_learning_rate_and_batch_give_the_law_of_the_runs_as_they_are() -> None:
    truth = LossLaw(E=1.7, A=480.0, B=2100.0, alpha=0.36, beta=0.37)
    N, D = (v.ravel() for v in np.meshgrid([3e7, 1e8, 3e8], [5e8, 1e9, 2e9, 4e9, 8e9]))
    runs = pd.DataFrame({"N": N, "D": D, "lr": 0.002, "batch_tokens": 262_144.0, "loss": truth(N, D)})
    evidence = fit_loss_evidence(runs, fit_hp_law(runs))
    assert evidence.source == "runs"
    assert "tuned like these" in evidence.doubts[0]
    assert (evidence.fit.law.alpha, evidence.fit.law.beta) == pytest.approx((0.36, 0.37), abs=1e-4)
    assert evidence.fit.law.E == pytest.approx(1.7, rel=1e-4)


def test_groups_that_never_tried_the_best_settings_count_less_and_are_counted() -> None:
    off = []
    for seed in range(5):
        runs = sweep(MUP, per=12, seed=seed, parametrization="mup")
        best = MUP(runs["N"], runs["D"])[0]
        # In the groups of the largest N only rates far above the best one were tried.
        poor = runs["N"] > 3e5
        tried = runs[~poor | (runs["lr"] > 2.2 * best)].reset_index(drop=True)
        fit = fit_hp_law(tried)
        evidence = fit_loss_evidence(tried, fit)
        assert evidence.source == "minima"
        assert (fit.floors["untried"] > 0.005).tolist() == (fit.floors["N"] > 3e5).tolist()
        count = f"{int((fit.floors['N'] > 3e5).sum())} of {len(fit.floors)} groups"
        assert f"{count} did not try the best settings" in " ".join(evidence.doubts)
        plain = fit_loss_law(*(fit.floors[c].to_numpy() for c in ("N", "D", "loss")))
        off.append([abs(float(np.log(f.predict(8e5, 5e6) / FLOOR(8e5, 5e6)))) for f in (evidence.fit, plain)])
    ours, unweighted = np.median(off, 0)
    assert ours < unweighted
    # The scatter of the lowest losses alone does not say how much these groups lack.
    floors = fit.floors
    scatter_only = fit_loss_law(*(floors[c].to_numpy() for c in ("N", "D", "loss")), sd=floors["sd"].to_numpy())
    assert evidence.fit.n_effective < scatter_only.n_effective


def test_an_uncertain_loss_moves_the_law_less() -> None:
    truth = LossLaw(E=1.7, A=480.0, B=2100.0, alpha=0.36, beta=0.37)
    N, D = (v.ravel() for v in np.meshgrid([3e7, 1e8, 3e8], [5e8, 1e9, 2e9, 4e9, 8e9]))
    loss = truth(N, D)
    loss[-1] *= 1.1
    sd = np.zeros(loss.size)
    trusted = fit_loss_law(N, D, loss, sd=sd)
    assert float(trusted.predict(1e9, 2e10)) == float(fit_loss_law(N, D, loss).predict(1e9, 2e10))
    sd[-1] = 0.1
    without = float(fit_loss_law(N[:-1], D[:-1], loss[:-1]).predict(1e9, 2e10))
    assert float(fit_loss_law(N, D, loss, sd=sd).predict(1e9, 2e10)) == pytest.approx(without, rel=0.005)
    assert abs(float(trusted.predict(1e9, 2e10)) / without - 1) > 0.03


def test_runs_without_a_rate_or_a_batch_are_left_out_and_counted() -> None:
    runs = sweep(MUP, per=10, seed=11, parametrization="mup")
    lacking = runs.copy()
    lacking.loc[[0, 5], "lr"] = np.nan
    lacking.loc[7, "batch_tokens"] = np.nan
    fit = fit_hp_law(lacking)
    assert (fit.n_runs, fit.n_without_settings) == (len(runs) - 3, 3)
    assert fit.law == fit_hp_law(runs.drop(index=[0, 5, 7])).law


def test_a_run_without_settings_at_an_n_and_d_of_its_own_counts_for_the_loss() -> None:
    runs = sweep(MUP, per=10, seed=12, parametrization="mup")
    hp = fit_hp_law(runs)
    small = fit_loss_evidence(runs, hp).fit
    alone = pd.DataFrame({"N": [8e5, 2e5], "D": [5.4e6, 6e5], "lr": np.nan, "batch_tokens": np.nan})
    alone["loss"] = 1.05 * small.predict(alone["N"], alone["D"])
    together = pd.concat([runs, alone], ignore_index=True)
    more = fit_loss_evidence(together, fit_hp_law(together)).fit
    # The one at other N and D moves the law, the one in a group of known settings is left to that group.
    assert more.ranges["N"] == (1e5, 8e5)
    assert 1.001 < float(more.predict(8e5, 5.4e6) / small.predict(8e5, 5.4e6)) < 1.05
    one = pd.concat([runs, alone.head(1)], ignore_index=True)
    assert more.law == fit_loss_evidence(one, fit_hp_law(one)).fit.law
