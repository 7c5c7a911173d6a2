"""Predicted curves, tested on runs whose law, offset from it and noise are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from scaling.common.arrays import Array
from scaling.curves.planned import LossBand, Trunk, fit_laws_without_each_size, predict_trunk
from scaling.fitting.loss_law import Fit, fit_loss_law
from scaling.laws.formulas import LossLaw

LAW = LossLaw(E=1.2, A=60.0, B=900.0, alpha=0.5, beta=0.55)
SIZES = (1e4, 2e4, 4e4, 8e4)
LR, BATCH, N, D = 4e-3, 512.0, 1.6e5, 1.2e6


def compute_offset(tokens: Array, lr: float, batch: float) -> Array:
    """Return how far the planted trunk lies above the law of annealed losses, in ln loss: a bowl on a slow rise."""
    a, b = math.log(lr / LR), math.log(batch / BATCH)
    return 0.02 * np.log(tokens / 1e4) + 0.02 * a * a + 0.015 * b * b - 0.01 * a * b


def plant_trunk(rng: np.random.Generator, N: float, D: float, lr: float, batch: float, noise: float) -> Trunk:
    """Plant a trunk with two points per octave. Half of the noise is the run's own level."""
    tokens = 1e4 * 2 ** (np.arange(int(2 * math.log2(0.8 * D / 1e4)) + 1) / 2)
    own = noise * math.sqrt(0.5) * (rng.standard_normal() + rng.standard_normal(tokens.size))
    return Trunk(N, lr, batch, tokens, np.asarray(LAW(N, tokens)) * np.exp(compute_offset(tokens, lr, batch) + own))


def plant_study(seed: int, noise: float = 0.006) -> tuple[list[Trunk], pd.DataFrame]:
    """Plant six runs of each size, and the annealed losses (N, D, loss) of good ones."""
    rng = np.random.default_rng(seed)
    trunks = [
        plant_trunk(rng, n, 3e5, LR * math.exp(rng.normal(0, 0.8)), BATCH * math.exp(rng.normal(0, 0.8)), noise)
        for n in SIZES
        for _ in range(6)
    ]
    ends = pd.DataFrame([(n, d) for n in SIZES for d in (4e4, 1e5, 3e5)], columns=["N", "D"])
    ends["loss"] = np.asarray(LAW(ends["N"], ends["D"])) * np.exp(noise / 2 * rng.standard_normal(len(ends)))
    return trunks, ends


def fit_law(ends: pd.DataFrame) -> Fit:
    return fit_loss_law(*(ends[c].to_numpy() for c in ("N", "D", "loss")))


def test_a_planted_curve_is_predicted_where_there_is_no_noise() -> None:
    trunks, ends = plant_study(0, noise=1e-5)
    band = predict_trunk(trunks, fit_law(ends), N=N, D=D, lr=LR, batch_tokens=BATCH)
    # Beyond these tokens, the rise is not known.
    is_known = np.array(band.tokens) <= 2.4e5
    truth = np.asarray(LAW(N, np.array(band.tokens))) * np.exp(compute_offset(np.array(band.tokens), LR, BATCH))
    assert np.abs(np.log(np.array(band.loss)[is_known] / truth[is_known])).max() < 0.01
    assert band.tokens[-1] == pytest.approx(D)
    assert (band.runs, band.scale) == (24, 1.0)


@pytest.mark.slow
def test_the_band_covers_new_runs() -> None:
    """In ten studies with one run each, at its own settings, the 95 % band holds at least 93 % of the points."""
    inside = []
    for seed in range(10):
        trunks, ends = plant_study(seed)
        rng = np.random.default_rng(1000 + seed)
        lr, batch = LR * math.exp(rng.normal(0, 0.4)), BATCH * math.exp(rng.normal(0, 0.4))
        without = fit_laws_without_each_size(ends)
        band = predict_trunk(trunks, fit_law(ends), N=N, D=3e5, lr=lr, batch_tokens=batch, without=without)
        run = plant_trunk(rng, N, 3e5, lr, batch, 0.006)
        for tokens, loss in zip(run.tokens, run.loss, strict=True):
            if at := band.at(float(tokens)):
                inside.append(at[0] <= loss <= at[2])
    assert len(inside) > 80
    assert np.mean(inside) >= 0.93


def test_a_rate_eight_times_off_is_outside_at_the_first_points() -> None:
    trunks, ends = plant_study(1)
    band = predict_trunk(trunks, fit_law(ends), N=N, D=D, lr=LR, batch_tokens=BATCH)
    rng = np.random.default_rng(2)
    for factor, leaves in ((1.0, False), (8.0, True), (1 / 8, True)):
        run = plant_trunk(rng, N, D, LR * factor, BATCH, 0.006)
        first = [(t, y) for t, y in zip(run.tokens, run.loss, strict=True) if t <= 2.1e4]
        intervals = [(band.at(float(t)), y) for t, y in first]
        is_outside = [not at[0] <= y <= at[2] for at, y in intervals if at is not None]
        assert len(is_outside) == 3
        assert any(is_outside) is leaves


def test_the_band_grows_beyond_the_longest_trunk_and_with_the_reach() -> None:
    trunks, ends = plant_study(3)
    fit = fit_law(ends)
    near, far = (predict_trunk(trunks, fit, N=n, D=D, lr=LR, batch_tokens=BATCH) for n in (1e5, 1e6))

    def width(band: LossBand, i: int) -> float:
        return math.log(band.high[i] / band.low[i])

    assert width(near, -1) > width(near, -3)
    assert all(width(far, i) > width(near, i) for i in range(len(near.tokens)))


def test_a_size_that_the_others_do_not_predict_widens_the_band() -> None:
    """Sizes that are predicted well leave the band as it is; one that is off by 15 % widens it."""
    trunks, ends = plant_study(4, noise=0.002)
    fit, without = fit_law(ends), fit_laws_without_each_size(ends)
    assert sorted(without) == list(SIZES)
    bands = []
    for factor in (1.0, 1.15):
        shifted = [Trunk(t.N, t.lr, t.batch_tokens, t.tokens, t.loss * (factor if t.N == 2e4 else 1)) for t in trunks]
        bands.append(predict_trunk(shifted, fit, N=N, D=D, lr=LR, batch_tokens=BATCH, without=without))
    calm, wild = bands
    assert calm.scale < 1.1
    assert wild.scale > 1.5
    assert wild.high[2] / wild.low[2] > calm.high[2] / calm.low[2]


def test_two_sizes_leave_none_out() -> None:
    _, ends = plant_study(5)
    assert fit_laws_without_each_size(ends[ends["N"] < 3e4]) == {}


def test_too_few_runs_near_the_settings_make_no_curve() -> None:
    trunks, ends = plant_study(5)
    fit = fit_law(ends)
    with pytest.raises(ValueError, match=r"needs 4 runs or more near lr 0\.004 and batch 512 with points at the same"):
        predict_trunk(trunks[:3], fit, N=N, D=D, lr=LR, batch_tokens=BATCH)
    with pytest.raises(ValueError, match="train more proxies near these settings"):
        predict_trunk(trunks, fit, N=N, D=D, lr=LR * 1e4, batch_tokens=BATCH)


def test_a_band_is_read_between_its_points_and_not_outside() -> None:
    band = LossBand((1e4, 4e4), (4.0, 1.0), (2.0, 0.5), (8.0, 2.0), 0.95, 9, 1.0)
    at = band.at(2e4)
    assert at is not None
    assert at == pytest.approx((1.0, 2.0, 4.0))
    assert band.at(9e3) is None
    assert band.at(5e4) is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (((), (), (), ()), "one at least"),
        (((1e4, 2e4), (2.0,), (1.0,), (3.0,)), "as many losses"),
        (((2e4, 1e4), (2.0, 2.0), (1.0, 1.0), (3.0, 3.0)), "ascending"),
        (((1e4,), (2.0,), (2.5,), (3.0,)), "low <= loss"),
    ],
)
def test_a_band_edited_into_nonsense_is_refused(columns: tuple[tuple[float, ...], ...], message: str) -> None:
    tokens, loss, low, high = columns
    with pytest.raises(ValueError, match=message):
        LossBand(tokens, loss, low, high, 0.95, 9, 1.0)
