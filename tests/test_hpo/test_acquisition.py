"""The acquisition function against simulated runs, and the prices of available runs against hand-written tables."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

# First, because hpo.surrogate.gp silences a deprecation warning when it imports a dependency of BoTorch.
from hpo.surrogate import acquisition
from hpo.surrogate.fitting import fit_surrogate
from hpo.surrogate.gp import Surrogate, condition_on_runs, join_inputs

# isort: split
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution
from scipy.special import ndtri

from hpo.samplers.unit_cube import Cube
from hpo.surrogate.acquisition import (
    MIN_USEFULNESS,
    QUANTILES,
    AvailableRuns,
    compute_usefulness,
    make_knowledge_gradient,
    recommend,
    suggest,
)
from hpo.surrogate.kernel import FidelityKernel, make_priors
from tests.test_hpo.synthetic import PlainCube, drifting_runs

Array = NDArray[np.float64]


def make_available(
    U: Array, slots: Array, cost: Array, *, top: int | None, spent: tuple[float, float], **change: Any
) -> AvailableRuns:
    """Return slots of one size. The runs U [n, p] were made at other fidelities, unless `change` says otherwise."""
    n = len(U)
    return AvailableRuns(
        **{
            "slots": slots,
            "cost": cost,
            "top": top,
            "size": np.zeros(len(slots), np.int64),
            "points": U,
            "run_slots": np.full(n, -1, np.int64),
            "is_stuck": np.zeros(n, bool),
            "continues": False,
            "limit": math.inf,
            "spent": spent,
            **change,
        }
    )


# The knowledge gradient.


def test_knowledge_gradient_is_what_simulated_runs_gain() -> None:
    """The closed form agrees with conditioning on each of the nine outcomes, and on two hundred."""
    U, T, level, y = drifting_runs(5, 8)
    fit = fit_surrogate(U, T, level, y).best
    rng = np.random.default_rng(0)
    anchors = join_inputs(rng.random((40, 2)), np.zeros(2))
    x = join_inputs(np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.0, 0.0], [1.0, 0.5]]))
    closed = make_knowledge_gradient(fit, anchors)(x)
    before, _, _ = fit.posterior(anchors)
    mean, variance, _ = fit.posterior(x)

    def gain(i: int, draw: float) -> float:
        outcome = mean[i] + math.sqrt(float(variance[i]) + fit.noise) * draw
        updated = condition_on_runs(
            fit.kernel, fit.noise, torch.cat([fit.x, x[i : i + 1]]), torch.cat([fit.z, outcome.reshape(1)])
        )
        return float(before.min() - updated.posterior(anchors)[0].min())

    for i in range(2):
        assert closed[i] == pytest.approx(np.mean([gain(i, float(q)) for q in QUANTILES]), rel=1e-4, abs=1e-6)
    for i in range(2):
        fine = np.mean([gain(i, float(q)) for q in ndtri((np.arange(201) + 0.5) / 201)])
        assert closed[i] == pytest.approx(fine, rel=0.3)


def set_hyperparameters(fit: Surrogate, **logs: float) -> Surrogate:
    """Condition on the same runs with given hyperparameters; the others are at the medians of their priors."""
    p = {name: mean.clone() for name, (mean, _) in make_priors(2).items()}
    p |= {name: torch.full_like(p[name], value) for name, value in logs.items()}
    first = fit.best
    member = condition_on_runs(FidelityKernel(2, p), math.exp(2 * float(p["log_noise"])), first.x, first.z)
    return Surrogate(member, fit.offset, fit.scale)


def two_level_runs(sign: float = 1.0, n: int = 10) -> tuple[Array, Surrogate]:
    """Make half of the runs at t = 1 and half at the target. Sign -1: the best at t = 1 are the worst there."""
    U = np.random.default_rng(8).random((n, 2))
    T = np.tile(np.array([[1.0, 0.0], [0.0, 0.0]]), (n // 2, 1))
    bowl = ((U - 0.4) ** 2).sum(1)
    y = np.where(T[:, 0] > 0, sign * bowl + 1.0, bowl)
    return U, fit_surrogate(U, T, (T[:, 0] > 0).astype(np.int64), y)


def test_a_level_without_information_about_the_target_is_not_chosen() -> None:
    """The same runs with two sets of hyperparameters: low fidelities agree, or their roughness dominates."""
    U, fit = two_level_runs()
    available = make_available(U, np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([0.1, 1.0]), top=1, spent=(0.0, 0.0))
    chosen = []
    for log_rough in (-6.0, 4.0):
        model = set_hyperparameters(fit, log_bowl=-6.0, log_smooth=-6.0, log_rough=log_rough)
        chosen.append(suggest(model, PlainCube(2), U, available, seed=[1])[1])
    assert chosen == [0, 1]


def test_usefulness_is_that_of_losses_drawn_from_the_posterior() -> None:
    U, T, level, y = drifting_runs(3, 12)
    member = fit_surrogate(U, T, level, y).best
    slots = np.array([[1.0, 1.0], [0.5, 0.0], [0.0, 0.0]])
    usefulness = compute_usefulness(member, PlainCube(2), slots, [4])
    assert usefulness[2] == pytest.approx(1.0)
    points = np.random.default_rng([4]).random((64, 2))
    for slot, value in zip(slots[:2], usefulness[:2], strict=True):
        x = torch.cat([join_inputs(points, slot), join_inputs(points, np.zeros(2))])
        mean, _, v = member.posterior(x)
        joint = member.covariance(x, v, x, v) + 1e-9 * torch.eye(128, dtype=x.dtype)
        drawn = np.random.default_rng(0).standard_normal((4000, 128)) @ torch.linalg.cholesky(joint).mT.numpy()
        level, target = np.split(drawn + mean.numpy(), 2, axis=1)
        level, target = level - level.mean(1, keepdims=True), target - target.mean(1, keepdims=True)
        moments = (level * target).mean(), (level * level).mean(), (target * target).mean()
        assert value == pytest.approx(moments[0] / math.sqrt(moments[1] * moments[2]), abs=0.02)


def test_a_fidelity_that_misleads_is_found_useless_and_one_that_agrees_useful() -> None:
    slots = np.array([[1.0, 0.0], [0.0, 0.0]])
    useful = [compute_usefulness(two_level_runs(sign, 24)[1].best, PlainCube(2), slots, [0])[0] for sign in (1.0, -1.0)]
    assert useful[0] > 0.9
    assert useful[1] < MIN_USEFULNESS
    U, fit = two_level_runs(-1.0, 24)
    available = make_available(U, slots, np.array([0.01, 1.0]), top=1, spent=(0.0, 0.0))
    assert {suggest(fit, PlainCube(2), U, available, seed=[i])[1] for i in range(3)} == {1}


# Prices.


A, B, C, D = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]])
NEW = np.array([0.9, 0.9])
POINTS = np.stack([A, B, C, D, NEW])
# Slots 0, 1 and 2 are rungs of one size, which cost 1, 3 and 9 ninths. Slots 3 and 4 are of another size and cost 2 and
# 6. A was run at rungs 0 and 1; B at rung 0, where it is still running; C at the other size; D at no slot.
TABLE = make_available(
    np.stack([A, A, B, C, D]),
    np.zeros((5, 2)),
    np.array([1, 3, 9, 2, 6]) / 9,
    top=2,
    spent=(0.0, 0.0),
    size=np.array([0, 0, 0, 1, 1]),
    run_slots=np.array([0, 1, 0, 3, -1]),
    is_stuck=np.array([False, False, True, False, False]),
)
INF = math.inf


@pytest.mark.parametrize(
    ("slot", "from_scratch", "continued"),
    [
        (0, [INF, INF, 1, 1, 1], [INF, INF, 1, 1, 1]),
        (1, [INF, 3, 3, 3, 3], [INF, INF, 3, 3, 3]),
        # A costs 9 - 3. B is still running and cannot be continued yet.
        (2, [9, 9, 9, 9, 9], [6, INF, 9, 9, 9]),
        (3, [2, 2, INF, 2, 2], [2, 2, INF, 2, 2]),
        (4, [6, 6, 6, 6, 6], [6, 6, 4, 6, 6]),
    ],
)
def test_prices_are_those_of_a_hand_written_table(slot: int, from_scratch: list[float], continued: list[float]) -> None:
    """Prices of A, B, C, D and a new point, in ninths."""
    np.testing.assert_allclose(TABLE.compute_price(POINTS, slot) * 9, from_scratch)
    resuming = replace(TABLE, continues=True)
    np.testing.assert_allclose(resuming.compute_price(POINTS, slot) * 9, continued)
    # Points close to known ones are new points.
    np.testing.assert_allclose(resuming.compute_price(POINTS + 1e-6, slot) * 9, from_scratch[-1])
    six = replace(resuming, limit=6 / 9)
    np.testing.assert_allclose(six.compute_price(POINTS, slot) * 9, [x if x <= 6 else INF for x in continued])


def test_a_run_cannot_be_continued_to_a_lower_rung() -> None:
    """A run that began at a high rung, or was extended past one, is not available at a lower rung of its size."""
    began_high = make_available(
        A[None], np.zeros((2, 2)), np.array([0.1, 1.0]), top=1, spent=(0.0, 0.0), run_slots=np.array([1])
    )
    # Without continuation it could be run from scratch.
    assert began_high.compute_price(A[None], 0)[0] == pytest.approx(0.1)
    began_high = make_available(
        A[None],
        np.zeros((2, 2)),
        np.array([0.1, 1.0]),
        top=1,
        spent=(0.0, 0.0),
        run_slots=np.array([1]),
        continues=True,
    )
    assert began_high.compute_price(A[None], 0)[0] == INF


TINY = Cube({"x": FloatDistribution(0.0, 1.0, step=0.5), "kind": CategoricalDistribution(["a", "b"])})
CELLS = TINY.snap(np.array([[x, k] for x in (0.1, 0.5, 0.9) for k in (0.2, 0.7)]))


@pytest.mark.parametrize(
    ("continues", "misleading"),
    [
        (False, False),
        (True, False),
        (True, True),
        (False, True),
    ],
)
def test_nothing_known_or_running_is_suggested_while_there_is_anything_else(continues: bool, misleading: bool) -> None:
    """Six settings and two slots, until everything is run; every third run is pending when the next is chosen."""
    slots, cost = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([0.2, 1.0])
    points, at = CELLS[[0, 3]], np.array([0, 0])
    spent = np.array([0.4, 0.4])

    def loss(u: Array, slot: int) -> float:
        value = (u[0] - 0.4) ** 2 + 0.3 * u[1]
        return float(1.0 - 3.0 * value if misleading and slot == 0 else value)

    for turn in range(12):
        running = np.arange(len(at)) == len(at) - 1 if turn % 3 == 2 else np.zeros(len(at), bool)
        available = make_available(
            points, slots, cost, top=1, spent=(spent[0], spent[1]), run_slots=at, is_stuck=running, continues=continues
        )
        prices = np.stack([available.compute_price(CELLS, slot) for slot in (0, 1)])
        if not np.isfinite(prices).any():
            break
        y = np.array([loss(u, int(k)) for u, k in zip(points, at, strict=True)])
        done = ~running
        model = fit_surrogate(TINY.encode(points[done]), slots[at[done]], at[done], y[done])
        model = model.with_pending(TINY.encode(points[running]), slots[at[running]])
        point, slot = suggest(model, TINY, points, available, seed=[0, turn])
        price = float(available.compute_price(point[None], slot)[0])
        assert math.isfinite(price), (turn, point, slot, prices)
        points, at = np.vstack([points, point]), np.append(at, slot)
        spent += [price * (slot == 0), price]
    else:
        # There are 12 pairs, 2 of them known at the start: 10 turns are enough.
        assert not continues
    assert len({(*u, k) for u, k in zip(points.tolist(), at.tolist(), strict=True)}) == len(at)


# The recommendation, and the safeguard.


@pytest.mark.parametrize(("n", "tolerance"), [(7, 0.1), (10, 0.1), (25, 2e-3)])
def test_the_recommendation_is_nearly_the_best_of_a_grid_for_the_mixture(n: int, tolerance: float) -> None:
    """With few runs the members disagree, and only points that the best member finds good are ranked by the mixture.

    The result is still better for the mixture than the point that the best member finds best.
    """
    U, T, level, y = drifting_runs(4, n)
    fit = fit_surrogate(U, T, level, y)
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 81), np.linspace(0, 1, 81)), -1).reshape(-1, 2)

    def score(points: Array) -> Array:
        mean, variance = fit.posterior(join_inputs(points, np.zeros(2)))
        return np.asarray(mean + 0.5 * variance.sqrt())

    answer = recommend(fit, PlainCube(2), U, [0])
    assert score(answer[None])[0] <= score(grid).min() + tolerance
    lowest = grid[fit.best.posterior(join_inputs(grid, np.zeros(2)))[0].argmin()]
    assert score(answer[None])[0] <= score(lowest[None])[0] + 1e-2
    np.testing.assert_array_equal(answer, recommend(fit, PlainCube(2), U, [0]))


def test_among_few_cells_the_recommendation_is_the_one_with_the_least_mean_and_half_its_doubt() -> None:
    """The runs are few and noisy, so that the cell with the lowest mean is often another one."""
    others = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        seen = CELLS[rng.integers(0, 6, 5)]
        fit = fit_surrogate(TINY.encode(seen), np.zeros((5, 2)), np.zeros(5, np.int64), rng.standard_normal(5))
        mean, variance = fit.posterior(join_inputs(TINY.encode(CELLS), np.zeros(2)))
        best = int((mean + 0.5 * variance.sqrt()).argmin())
        np.testing.assert_array_equal(recommend(fit, TINY, seen, [seed]), CELLS[best])
        others += best != int(mean.argmin())
    assert others >= 1


def test_the_safeguard_runs_the_recommendation_at_the_top() -> None:
    U, T, level, y = drifting_runs(6, 20)
    fit, cube = fit_surrogate(U, T, level, y), PlainCube(2)
    slots, cost = np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([0.01, 1.0])

    def choose(spent: tuple[float, float], limit: float = INF) -> tuple[Array, int]:
        return suggest(fit, cube, U, make_available(U, slots, cost, top=1, spent=spent, limit=limit), seed=[0, 1])

    low_only = make_available(U, slots[:1], cost[:1], top=None, spent=(5.0, 5.0))
    (_, free), (point, forced) = choose((0.1, 0.1)), choose((5.0, 5.0))
    _, without_top = suggest(fit, cube, U, low_only, seed=[0, 1])
    _, too_expensive = choose((5.0, 5.0), limit=0.5)
    assert (free, forced, without_top, too_expensive) == (0, 1, 0, 0)
    np.testing.assert_array_equal(point, recommend(fit, cube, U, [0, 1, 1]))
    # Once the recommendation is running there, the next worker gets another point.
    updated = fit.with_pending(point[None], np.zeros((1, 2)))
    more = np.vstack([U, point])
    after = make_available(
        more,
        slots,
        cost,
        top=1,
        spent=(5.0, 6.0),
        run_slots=np.append(np.full(20, -1), 1),
        is_stuck=np.arange(21) == 20,
    )
    second, slot = suggest(updated, cube, more, after, seed=[0, 1])
    assert slot == 1
    assert np.abs(second - point).max() > 1e-6


@pytest.mark.parametrize(("useful", "most"), [(0.3, 1.0), (0.6, 1.5), (0.75, 3.0), (1.0, 3.0)])
def test_a_more_useful_lower_fidelity_gets_more_cost_before_the_highest(
    useful: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the highest fidelity has had half of the cost, lower ones get the other half, however useful they are."""
    U, T, level, y = drifting_runs(6, 20)
    fit, slots = fit_surrogate(U, T, level, y), np.array([[1.0, 1.0], [0.0, 0.0]])
    monkeypatch.setattr(acquisition, "compute_usefulness", lambda *_: np.array([useful, 1.0]))

    def choose_slot(low: float, high: float = 0.0, limit: float = INF) -> int:
        available = make_available(U, slots, np.array([1e-3, 1.0]), top=1, spent=(low, low + high), limit=limit)
        return suggest(fit, PlainCube(2), U, available, seed=[0, 1])[1]

    assert choose_slot(0.98 * most) == 0
    assert choose_slot(1.02 * most) == 1
    assert choose_slot(5.9, high=5.0) == 0
    assert choose_slot(6.1, high=5.0) == 1
    # Lower fidelities have had more than half of everything that can be spent.
    assert choose_slot(1.2, limit=1.1) == 1


def test_nothing_draws_from_global_generators() -> None:
    U, T, level, y = drifting_runs(7, 12)
    before = (torch.get_rng_state().clone(), np.random.get_state()[1].copy())  # type: ignore[index]
    fit = fit_surrogate(U, T, level, y)
    available = make_available(U, np.zeros((1, 2)), np.ones(1), top=0, spent=(0.0, 1.0))
    suggest(fit, PlainCube(2), U, available, seed=[0])
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
