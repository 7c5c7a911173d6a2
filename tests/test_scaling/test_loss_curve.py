import math

import numpy as np
import pandas as pd
import pytest

from scaling.curves.loss_curve import annealed_ends, find_tokens_to_reach, fit_curve


def test_a_planted_curve_is_recovered_and_extrapolates() -> None:
    t = np.linspace(1e4, 1e6, 50)
    curve = fit_curve(t, 1.5 + 200 * t**-0.45)
    assert (curve.law.E, curve.law.A, curve.law.alpha) == pytest.approx((1.5, 200, 0.45), rel=1e-4)
    assert float(curve.predict(1e8)) == pytest.approx(1.5 + 200 * 1e8**-0.45, rel=1e-5)
    assert curve.status == "ok"


def test_spikes_do_not_move_the_curve() -> None:
    rng = np.random.default_rng(0)
    t = np.geomspace(1e4, 1e6, 80)
    loss = (1.5 + 200 * t**-0.45) * np.exp(0.002 * rng.standard_normal(80))
    spiked = loss.copy()
    spiked[::9] *= 1.5
    plain, robust = fit_curve(t, loss), fit_curve(t, spiked)
    assert float(robust.predict(2e6)) == pytest.approx(float(plain.predict(2e6)), rel=2e-3)
    assert plain.noise == pytest.approx(0.002, rel=0.4)


def test_no_other_exponent_fits_better() -> None:
    """Compare variable projection with a plain least-squares search, on data without outliers."""
    rng = np.random.default_rng(1)
    t = np.geomspace(1e4, 1e6, 40)
    loss = (2 + 50 * t**-0.3) * np.exp(1e-4 * rng.standard_normal(40))
    curve = fit_curve(t, loss)

    def squares(alpha: float) -> float:
        design = np.stack([np.ones(40), t**-alpha], 1) / loss[:, None]
        return float(np.sum((1 - design @ np.linalg.lstsq(design, np.ones(40), rcond=None)[0]) ** 2))

    grid = np.linspace(0.2, 0.4, 2001)
    assert curve.law.alpha == pytest.approx(grid[np.argmin([squares(a) for a in grid])], abs=0.02)


def test_the_status_names_a_run_that_does_not_learn_or_does_not_level_off() -> None:
    t = np.geomspace(1e4, 1e6, 20)
    assert "does not fall" in fit_curve(t, 1 + 0.1 * np.log(t)).status
    assert "does not level off" in fit_curve(t, 9 - 0.3 * np.log(t)).status


def test_a_curve_needs_points_that_can_be_read() -> None:
    with pytest.raises(ValueError, match="at least 4 distinct"):
        fit_curve([1e4, 1e5, 1e5, 1e6], [3, 2, 2, 1])
    with pytest.raises(ValueError, match="one length"):
        fit_curve([1e4, 1e5], [3.0])
    with pytest.raises(ValueError, match="before the first step"):
        find_tokens_to_reach([0.0, 1e5], [3.0, 2.0], 2.5)


def test_tokens_to_reach_is_linear_in_log_tokens() -> None:
    assert find_tokens_to_reach([1e3, 1e4, 1e5], [4, 3, 2], 3.5) == pytest.approx(10**3.5)
    assert find_tokens_to_reach([1e3, 1e4, 1e5], [4, 3, 2], 2.25) == pytest.approx(10**4.75)
    # The order of the points does not matter.
    assert find_tokens_to_reach([1e5, 1e3, 1e4], [2, 4, 3], 3) == pytest.approx(1e4)


def test_tokens_to_reach_takes_the_first_crossing_of_the_running_minimum() -> None:
    tokens, loss = [1e3, 1e4, 1e5, 1e6], [4.0, 3.0, 3.8, 2.0]
    assert find_tokens_to_reach(tokens, loss, 3.0) == pytest.approx(1e4)
    # The last segment starts at 3, the minimum so far, not at 3.8.
    assert find_tokens_to_reach(tokens, loss, 2.5) == pytest.approx(10**5.5)
    assert find_tokens_to_reach(tokens, loss, 5.0) == 1e3
    assert find_tokens_to_reach(tokens, loss, 1.9) == math.inf
    assert find_tokens_to_reach(tokens, [4.0, math.nan, 3.0, 2.0], 3.5) == pytest.approx(1e4)


def test_only_annealed_ends_are_final() -> None:
    """Check a cosine run, a trunk with two cooldown branches, a constant run and a run that stopped in its warm-up."""
    rows = [
        # The first point lies in the warm-up.
        ("cosine", 1, 0.01, False),
        ("cosine", 2, 1.0, False),
        ("cosine", 3, 0.5, False),
        ("cosine", 4, 0.15, False),
        ("cosine", 5, 0.1, True),
        ("branches", 1, 1.0, False),
        ("branches", 2, 0.0, True),
        ("branches", 3, 1.0, False),
        ("branches", 4, 0.0, True),
        ("constant", 1, 1.0, False),
        ("constant", 2, 1.0, False),
        ("warm-up", 1, 0.01, False),
    ]
    table = pd.DataFrame(rows, columns=["run_id", "tokens", "lr", "answer"])
    table = table.assign(lr=table.lr * 3e-4).sample(frac=1, random_state=0)
    assert (annealed_ends(table) == table.answer).all()
    assert list(annealed_ends(pd.DataFrame({"run_id": ["a"], "tokens": [5], "lr": [0.0], "lr_peak": [1e-3]}))) == [True]


def test_a_schedule_made_for_other_tokens_is_not_at_its_end() -> None:
    table = pd.DataFrame(
        {"run_id": "a", "tokens": [50, 100, 100, 100], "schedule": ["cosine", "cosine", "constant", "wsd"], "D": 100}
    )
    assert list(annealed_ends(table)) == [False, True, False, True]
    with pytest.raises(ValueError, match="no schedule, D"):
        annealed_ends(table[["run_id", "tokens"]])
    with pytest.raises(ValueError, match="row 1, column lr"):
        annealed_ends(pd.DataFrame({"run_id": "a", "tokens": [1, 2], "lr": [1e-3, math.nan]}))
