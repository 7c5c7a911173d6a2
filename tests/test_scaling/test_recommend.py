"""Recommendations, tested on planted runs whose law and bowl are known."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling.advice.flags import flag_optimum
from scaling.advice.recommendation import Recommendation, recommend
from scaling.common.quantities import format_count
from scaling.fitting.loss_evidence import fit_loss_evidence
from scaling.fitting.loss_law import FitError
from scaling.fitting.lr_batch_law import fit_hp_law
from scaling.laws.formulas import HPLaw
from scaling.runs.table import check_runs
from tests.test_scaling.test_lr_batch_law import FLOOR, MUP, sweep


def table(**changes: Any) -> pd.DataFrame:
    """Return a planted sweep with run ids; the changes are options of `sweep`."""
    runs = sweep(MUP, **({"per": 15, "seed": 0, "parametrization": "mup", "seq_len": 128} | changes))
    return runs.assign(run_id=[f"run-{i}" for i in range(len(runs))])


RUNS = table()
WIDE = {"lr": (1e-5, 1.0), "batch_tokens": (16.0, 1e6)}


def codes(answer: Recommendation) -> dict[str, bool]:
    return {f.code: f.serious for f in answer.flags}


def test_the_settings_and_the_loss_of_a_planted_law_are_recommended() -> None:
    answer = recommend(RUNS, N=8e5, D=5e6, space=WIDE)
    lr, batch = (float(v) for v in MUP(8e5, 5e6))
    assert answer.trustworthy
    assert answer.lr_interval[0] < lr < answer.lr_interval[1]
    assert answer.batch_interval[0] < batch < answer.batch_interval[1]
    assert answer.loss_interval[0] < float(FLOOR(8e5, 5e6)) < answer.loss_interval[1]
    assert answer.loss == pytest.approx(float(FLOOR(8e5, 5e6)), rel=0.03)
    assert answer.to_dict()["C"] == pytest.approx(2.4e13)
    assert answer.batch_seqs == round(answer.batch_tokens / 128)
    assert 0 < answer.expected_regret < 0.02


def test_for_compute_alone_the_size_with_the_least_averaged_prediction_is_chosen() -> None:
    answer = recommend(RUNS, C=2e13)
    size, tokens = answer.N, answer.D
    assert 6 * size * tokens == pytest.approx(2e13)
    true_size, _ = FLOOR.optimum(2e13)
    assert abs(np.log(size / true_size)) < 0.7
    same = recommend(RUNS, N=answer.N, D=answer.D)
    assert same.lr == answer.lr


@pytest.mark.parametrize("target", [{}, {"N": 1e6}, {"D": 1e6}, {"N": 1e6, "C": 1e15}, {"N": 1e6, "D": 1e6, "C": 6e12}])
def test_a_half_given_target_is_refused(target: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs N and D, or C alone"):
        recommend(RUNS, **target)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="N must be positive"):
        recommend(RUNS, N=-1.0, D=1e6)
    with pytest.raises(ValueError, match="mass"):
        recommend(RUNS, N=1e6, D=1e6, mass=1.5)
    with pytest.raises(ValueError, match="space"):
        recommend(RUNS, N=1e6, D=1e6, space={"lr": (1.0, 0.1)})
    with pytest.raises(FitError, match="spread in N or D"):
        recommend(table(sizes=(1e5,), tokens=(2e5,)), N=1e6, D=1e6)


def test_targets_are_not_fitted_and_diverged_runs_are_counted() -> None:
    plain = recommend(RUNS, N=8e5, D=5e6)
    target = RUNS.head(4).assign(N=8e5, D=5e6, loss=0.5, role="target", run_id="t")
    diverged = RUNS.head(3).assign(diverged=True, loss=0.01, run_id="d")
    mixed = pd.concat(
        [RUNS.assign(role="proxy", diverged=False), target.assign(diverged=False), diverged.assign(role="proxy")]
    )
    answer = recommend(mixed, N=8e5, D=5e6)
    assert (answer.lr, answer.loss) == (plain.lr, plain.loss)
    assert answer.provenance["n_diverged"] == 3
    assert answer.provenance["n_excluded"] == 0
    assert answer.provenance["n_runs"] == len(RUNS)


def test_excluded_rows_are_counted_and_not_fitted() -> None:
    plain = recommend(RUNS, N=8e5, D=5e6)
    stopped = RUNS.head(5).assign(loss=0.9, excluded="stopped", run_id="s")
    diverged = RUNS.head(2).assign(loss=np.nan, excluded="diverged", run_id="d")
    answer = recommend(check_runs(pd.concat([RUNS, stopped, diverged], ignore_index=True)), N=8e5, D=5e6)
    assert (answer.lr, answer.loss) == (plain.lr, plain.loss)
    assert (answer.provenance["n_excluded"], answer.provenance["n_diverged"]) == (5, 2)
    assert "(left out: 2 diverged, 5 excluded otherwise)" in " ".join(answer.explain().split())


def test_provenance_names_the_runs() -> None:
    answer = recommend(RUNS, N=8e5, D=5e6)
    ids = sorted(RUNS["run_id"])
    assert answer.provenance["run_ids"] == len(ids)
    assert answer.provenance["run_ids_sha256"] == hashlib.sha256("\n".join(ids).encode()).hexdigest()
    assert answer.run_ids == tuple(ids)
    assert answer.provenance["n_groups"] == 9
    assert recommend(RUNS.sample(frac=1, random_state=1), N=8e5, D=5e6).provenance == answer.provenance
    nudged = RUNS.assign(loss=RUNS["loss"].where(RUNS.index != 7, RUNS["loss"] * (1 + 1e-12)))
    other = recommend(nudged, N=8e5, D=5e6).provenance
    assert other["run_ids_sha256"] == answer.provenance["run_ids_sha256"]
    assert other["data_sha256"] != answer.provenance["data_sha256"]
    assert recommend(RUNS.iloc[1:], N=8e5, D=5e6).provenance["run_ids_sha256"] != answer.provenance["run_ids_sha256"]


def test_a_recommendation_survives_strict_json() -> None:
    answer = recommend(RUNS, N=8e5, D=5e6)
    text = json.dumps(answer.to_dict(), allow_nan=False)
    assert Recommendation.from_dict(json.loads(text)) == answer
    assert json.loads(text)["trustworthy"] is answer.trustworthy
    without = recommend(RUNS.drop(columns="seq_len"), N=8e5, D=5e6)
    assert (without.batch_seqs, without.seq_len) == (None, None)
    assert Recommendation.from_dict(json.loads(json.dumps(without.to_dict(), allow_nan=False))) == without


def test_every_field_comes_back_from_json_and_older_notes_are_read() -> None:
    answer = recommend(RUNS, C=2e13, beside=["all"], next_run=True)
    plain = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    assert Recommendation.from_dict(plain) == answer
    assert Recommendation.from_dict(plain).explain() == answer.explain()
    assert str(Recommendation.from_dict(plain)) == str(answer)
    for name in ("N_interval", "D_interval", "next_run", "beside", "run_ids"):
        del plain[name]
    for name in ("data_sha256", "n_excluded", "n_far"):
        del plain["provenance"][name]
    old = Recommendation.from_dict(plain | {"a_field_of_tomorrow": 1})
    assert (old.lr, old.next_run, old.beside, old.N_interval) == (answer.lr, None, (), None)
    assert "Answer for N = " in str(old)


def test_the_compute_optimal_size_has_an_interval_that_covers_the_planted_one() -> None:
    covered = 0
    for seed in range(10):
        answer = recommend(table(seed=seed, noise=0.002), C=2e13, mass=0.9)
        assert answer.N_interval is not None
        assert answer.D_interval is not None
        assert answer.N_interval[0] < answer.N < answer.N_interval[1]
        assert answer.N_interval[0] * answer.D_interval[1] == pytest.approx(2e13 / 6, rel=0.2)
        covered += answer.N_interval[0] < float(FLOOR.optimum(2e13)[0]) < answer.N_interval[1]
    assert covered >= 7
    assert recommend(RUNS, N=8e5, D=5e6).N_interval is None


def test_published_laws_are_shown_with_their_warnings() -> None:
    large = table(sizes=(6e7, 2e8, 4e8), tokens=(2e9, 8e9, 3e10))
    inside = recommend(large, N=4e8, D=3e10, beside=["step-law", "horizon"])
    step, horizon = inside.beside
    assert step["lr"] == pytest.approx(1.79 * 4e8**-0.713 * 3e10**0.307)
    assert step["batch_tokens"] == pytest.approx(0.58 * 3e10**0.571)
    assert not any("outside" in w for w in step["warnings"])
    assert any("non-embedding" in w for w in step["warnings"])
    assert (horizon["lr"], horizon["batch_tokens"]) == (None, None)
    assert "lr ~ D^-0.32 (trend only)" in inside.explain()
    outside = recommend(large.assign(N_convention="nonembedding"), N=4e9, D=3e10, beside=["step-law"]).beside[0]
    assert outside["warnings"] == ["outside the range it was measured in"]
    assert len(recommend(RUNS, N=8e5, D=5e6, beside=["all"]).beside) == 7
    with pytest.raises(ValueError, match="did you mean step-law"):
        recommend(RUNS, N=8e5, D=5e6, beside=["steplaw"])


def test_an_untrusted_answer_says_so_first_and_last_with_the_reason() -> None:
    text = recommend(RUNS, N=140 * 4e5, D=140 * 1.8e6).explain()
    first, last = text.splitlines()[0], text.splitlines()[-1]
    assert first.startswith("NOT TO BE TRUSTED: The target's N is 140 times the largest in the data")
    assert last.startswith("NOT TO BE TRUSTED")
    assert "estimate" not in text
    assert "NOT TO BE" not in str(recommend(RUNS, N=8e5, D=5e6, space=WIDE))


def test_a_next_run_is_optional_and_an_impossible_limit_is_refused() -> None:
    assert recommend(RUNS, N=8e5, D=5e6).next_run is None
    planned = recommend(RUNS, N=8e6, D=8e7, next_run=True).next_run
    assert planned is not None
    assert planned["loss_half"][1] < planned["loss_half"][0]
    tiny = recommend(RUNS, N=1e5, D=1e5, next_run=True, space=WIDE)
    assert tiny.next_run is None
    assert "next-run" in codes(tiny)
    with pytest.raises(ValueError, match="FLOPs or more"):
        recommend(RUNS, N=8e5, D=5e6, next_run=True, at_most=1e3)
    with pytest.raises(ValueError, match="at_most must be positive"):
        recommend(RUNS, N=8e5, D=5e6, at_most=-1e3)


def test_reach_beyond_the_data_is_flagged_and_serious_above_a_hundred_times() -> None:
    inside = codes(recommend(RUNS, N=2e5, D=6e5, space=WIDE))
    assert not {"beyond-N", "beyond-D", "batch-beyond-N"} & set(inside)
    near = codes(recommend(RUNS, N=95 * 4e5, D=95 * 1.8e6, space=WIDE))
    assert near["beyond-N"] is near["beyond-D"] is near["beyond-C"] is False
    assert codes(recommend(RUNS, N=105 * 4e5, D=1.8e6, space=WIDE))["beyond-N"] is True
    assert codes(recommend(RUNS, N=4e5, D=105 * 1.8e6, space=WIDE))["beyond-D"] is True
    assert codes(recommend(RUNS, N=1e5 / 105, D=1.8e6, space=WIDE))["beyond-N"] is True


def test_compute_far_beyond_the_data_is_serious_though_neither_size_nor_tokens_are() -> None:
    """No run has both the largest N and the largest D, so 95 times each is 95² times 9 of the largest compute."""
    corner = RUNS[(RUNS["N"] < 4e5) | (RUNS["D"] < 6e5)]
    corner = corner[(corner["D"] < 1.8e6) | (corner["N"] < 2e5)]
    largest = 6 * (corner["N"] * corner["D"]).max()
    answer = recommend(corner, N=95 * 4e5, D=95 * 1.8e6, space=WIDE)
    assert answer.C / largest > 10_000
    assert codes(answer)["beyond-C"] is True
    assert codes(answer)["beyond-N"] is codes(answer)["beyond-D"] is False


def test_a_wide_interval_of_the_learning_rate_is_a_serious_doubt_about_the_settings_only() -> None:
    """The rate is known within a factor of 3.7 at one size and not at another, by the printed interval itself."""
    few = RUNS.sample(16, random_state=4)
    factors = {}
    for N in np.geomspace(4e5, 3e7, 6):
        answer = recommend(few, N=N, D=4.5 * N, mass=0.9)
        assert answer.lr_interval is not None
        factors[float(np.sqrt(answer.lr_interval[1] / answer.lr_interval[0]))] = answer
    assert min(factors) < 3.7 < max(factors)
    for factor, answer in factors.items():
        assert ("lr-wide" in codes(answer)) is (factor > 3.7)
    widest = factors[max(factors)]
    (flag,) = (f for f in widest.flags if f.code == "lr-wide")
    assert flag.serious
    assert flag.about_settings
    assert f"{max(factors):.2g}" in flag.text


def test_below_the_smallest_size_the_intervals_are_doubted() -> None:
    assert codes(recommend(RUNS, N=6e4, D=6e5, space=WIDE))["below-N"] is False
    assert codes(recommend(RUNS, N=4e4, D=6e5, space=WIDE))["below-N"] is True
    assert "below-N" not in codes(recommend(RUNS, N=1e5, D=6e5, space=WIDE))


def test_a_batch_that_moves_with_size_is_flagged_with_its_factor() -> None:
    shrinking = HPLaw(MUP.lr_coef, 0.0, -0.25, MUP.batch_coef * 2e5**0.4, -0.4, 0.5)
    runs = sweep(shrinking, per=40, seed=0, parametrization="mup", sizes=(5e4, 1e5, 2e5, 4e5))
    (flag,) = (f for f in recommend(runs, N=4e6, D=1.8e6).flags if f.code == "batch-beyond-N")
    law = recommend(runs, N=4e6, D=1.8e6).hp_law
    assert f"{10 ** law['batch_N']:.2g} times that at the largest N" in flag.text
    assert "batch-beyond-N" not in codes(recommend(RUNS, N=4e6, D=1.8e6))


def test_forms_that_disagree_far_out_are_shown_side_by_side() -> None:
    far = recommend(RUNS, N=29 * 4e5, D=29 * 1.8e6)
    (flag,) = (f for f in far.flags if f.code == "forms-disagree")
    with_floor, without = (float(v) for v in re.findall(r"(\d\.\d{4}) with", flag.text))
    assert without < far.loss < with_floor
    assert not flag.serious
    assert "forms-disagree" not in codes(recommend(RUNS, N=4e5, D=1.8e6))


def test_a_recommendation_outside_the_searched_space_is_unclipped_and_flagged() -> None:
    lr, batch = (float(v) for v in MUP(4e5, 1.8e6))
    space = {"lr": (lr * 2, 1.0), "batch_tokens": (16.0, batch / 2)}
    answer = recommend(RUNS, N=4e5, D=1.8e6, space=space)
    assert {"lr-edge-low", "batch_tokens-edge-high"} <= set(codes(answer))
    assert answer.batch_tokens > batch / 2
    assert not {c for c in codes(recommend(RUNS, N=4e5, D=1.8e6, space=WIDE)) if "edge" in c}


def test_optima_outside_the_space_in_most_groups_are_serious() -> None:
    answer = recommend(RUNS, N=8e5, D=5e6, space={"lr": (1e-5, 1e-3)})
    assert codes(answer)["lr-unbracketed-high"] is True
    assert not answer.trustworthy
    assert "search higher" in " ".join(answer.explain().split())


def test_too_few_scales_are_flagged() -> None:
    two = recommend(table(sizes=(1e5, 4e5)), N=8e5, D=5e6, space=WIDE)
    assert codes(two)["few-N"] is True
    # A target between the two sizes is no serious doubt.
    assert codes(recommend(table(sizes=(1e5, 4e5)), N=2e5, D=5e6, space=WIDE))["few-N"] is False
    one = codes(recommend(table(tokens=(6e5,)), N=8e5, D=5e6, space=WIDE))
    assert one["few-D"] is True
    assert one["few-groups"] is False


def test_two_groups_give_an_answer_that_is_not_trusted() -> None:
    answer = recommend(table(sizes=(1e5, 4e5), tokens=(6e5,)), N=1e6, D=1e6)
    assert not answer.trustworthy
    assert codes(answer)["few-groups"] is True
    assert answer.loss_interval[0] < answer.loss < answer.loss_interval[1]


def test_one_batch_is_kept_and_the_best_learning_rate_is_that_at_this_batch() -> None:
    fixed = sweep(HPLaw(MUP.lr_coef, 0.0, -0.25, 2048.0, 0.0, 0.0), per=15, seed=0, parametrization="mup")
    answer = recommend(fixed.assign(batch_tokens=2048.0), N=8e5, D=5e6, space=WIDE)
    assert (answer.batch_tokens, answer.batch_interval) == (2048.0, None)
    assert answer.not_measured == {"batch_tokens": "the same in every run"}
    assert answer.lr_interval is not None
    assert answer.lr_interval[0] < float(MUP(8e5, 5e6)[0]) < answer.lr_interval[1]
    assert answer.expected_regret is None
    assert "Every run has the batch 2.05K tokens" in answer.explain()


def test_the_count_of_parameters_is_named() -> None:
    counted = RUNS.assign(N_total=RUNS["N"] * 1.5, N_nonembedding=RUNS["N"] * 0.8)
    answer = recommend(counted, N=8e5, D=5e6)
    assert answer.provenance["N_convention"].startswith("parameters that multiply tokens")
    assert any("N_total 600,000" in f.text for f in answer.flags if f.code == "n-convention")
    chinchilla = recommend(RUNS.assign(N_total=RUNS["N"]), N=8e5, D=5e6)
    assert "Chinchilla" in chinchilla.provenance["N_convention"]
    kaplan = recommend(counted.assign(N_convention="nonembedding"), N=8e5, D=5e6)
    # The convention that the table names takes precedence over what its columns suggest.
    assert "Kaplan" in kaplan.provenance["N_convention"]
    assert (
        "was not recorded" in recommend(RUNS.assign(N_convention="as given"), N=8e5, D=5e6).provenance["N_convention"]
    )
    two = recommend(RUNS.assign(N_convention=np.where(RUNS["N"] > 1e5, "total", "nonembedding")), N=8e5, D=5e6)
    assert codes(two)["n-convention"] is True


def test_more_noise_between_runs_widens_the_interval_of_one_run() -> None:
    width = [
        float(np.ptp(np.log(recommend(table(per=40, noise=s), N=2e5, D=6e5).loss_interval))) for s in (0.001, 0.02)
    ]
    # At least the noise itself.
    assert width[1] > 2 * 1.645 * 0.02 * 0.8
    assert width[1] > 2 * width[0]


def test_the_printed_table_shows_every_number_and_flag() -> None:
    answer = recommend(RUNS, N=140 * 4e5, D=5e6)
    text = answer.explain()
    for shown in (f"{answer.lr:.4g}", f"{answer.batch_tokens:,.0f}", f"{answer.loss:.4f}", "90 % interval", "SERIOUS"):
        assert shown in text
    assert all(f.text in " ".join(text.split()) for f in answer.flags)
    assert "No serious warnings" in dataclasses.replace(answer, flags=()).explain()


def test_a_learning_rate_that_moves_with_size_is_followed() -> None:
    moving = HPLaw(MUP.lr_coef * 2e5**0.5, -0.5, -0.25, MUP.batch_coef, 0.0, 0.5)
    answer = recommend(sweep(moving, per=20, seed=3), N=8e5, D=5e6)
    assert answer.lr_interval[0] < float(moving(8e5, 5e6)[0]) < answer.lr_interval[1]


def test_another_compute_optimum_by_the_plain_law_is_noted_and_one_without_bounds_is_serious() -> None:
    near, far = recommend(RUNS, C=2e13), recommend(RUNS, C=1e17)
    assert "optimum-forms" not in codes(near)
    assert codes(far)["optimum-forms"] is False
    fit = fit_loss_evidence(RUNS, fit_hp_law(RUNS)).fit
    plain = float(fit.law.optimum(1e17)[0])
    note = next(f.text for f in far.flags if f.code == "optimum-forms")
    assert f"at {format_count(plain)}, the averaged forms at {format_count(far.N)}" in note
    worse = float(fit.predict(plain, 1e17 / 6 / plain) / fit.predict(far.N, far.D) - 1)
    assert f"{100 * worse:.2f} % lower" in note
    loose = dataclasses.replace(fit.optimum(2e13), bounded=False)
    assert [(f.code, f.serious) for f in flag_optimum(fit, 2e13, loose)] == [("optimum", True)]


def test_sizes_may_be_given_as_text() -> None:
    assert recommend(RUNS, N="800K", D="5M") == recommend(RUNS, N=8e5, D=5e6)
    assert recommend(RUNS, C="2e13", at_most="5e12") == recommend(RUNS, C=2e13, at_most=5e12)
    with pytest.raises(ValueError, match="N: needed a positive count such as 7B"):
        recommend(RUNS, N="800 thousand?", D="5M")


def test_a_measured_best_outside_the_laws_interval_is_noted() -> None:
    """At the largest size the optimum has moved thirty times away from the trend of the smaller ones."""
    large = RUNS["N"].eq(4e5) & RUNS["D"].eq(1.8e6)
    assert not {c for c in codes(recommend(RUNS, N=8e5, D=5e6)) if c.startswith("measured")}
    moved = RUNS.assign(lr=RUNS["lr"].where(~large, RUNS["lr"] * 30))
    answer = recommend(moved, N=8e5, D=5e6)
    assert codes(answer).get("measured-lr") is False
    (flag,) = (f for f in answer.flags if f.code == "measured-lr")
    assert "At N 400K, D 1.8M, the best measured learning rate is" in flag.text
