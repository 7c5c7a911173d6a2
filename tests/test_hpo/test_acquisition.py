"""What to run next against simulated runs, and the prices of what is on offer against hand-made tables."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hpo.surrogate import acquisition
from hpo.surrogate import gp as s  # first: it imports BoTorch with a dependency's deprecation warning silenced

# isort: split
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution
from scipy.special import ndtri

from hpo.samplers.unit_cube import Cube
from hpo.surrogate.acquisition import QUANTILES, MIN_USEFULNESS, AvailableRuns, make_knowledge_gradient, recommend, suggest, compute_usefulness
from hpo.surrogate.kernel import FidelityKernel, make_priors
from tests.test_hpo.synthetic import PlainCube, drifting_runs

Array = NDArray[np.float64]


def offer(U: Array, slots: Array, cost: Array, *, top: int | None, spent: tuple[float, float], **change: Any) -> AvailableRuns:
    """Slots of one size, where nothing was run yet; for what U [n, p] are, see `change`."""
    n = len(U)
    return AvailableRuns(
        **{
            "slots": slots,
            "cost": cost,
            "top": top,
            "size": np.zeros(len(slots), np.int64),
            "cube": U,
            "at": np.full(n, -1, np.int64),
            "stuck": np.zeros(n, bool),
            "continues": False,
            "limit": math.inf,
            "spent": spent,
            **change,
        }
    )


# What a run would teach


def test_knowledge_gradient_is_what_simulated_runs_gain() -> None:
    """The closed form against conditioning afresh on each of the nine outcomes, and on two hundred."""
    U, T, level, y = drifting_runs(5, 8)
    fit = s.fit_surrogate(U, T, level, y).best
    rng = np.random.default_rng(0)
    anchors = s.join_inputs(rng.random((40, 2)), np.zeros(2))
    x = s.join_inputs(np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.0, 0.0], [1.0, 0.5]]))
    closed = make_knowledge_gradient(fit, anchors)(x)
    before, _, _ = fit.posterior(anchors)
    mean, variance, _ = fit.posterior(x)

    def gain(i: int, draw: float) -> float:
        outcome = mean[i] + math.sqrt(float(variance[i]) + fit.noise) * draw
        told = s.condition_on_runs(
            fit.kernel, fit.noise, torch.cat([fit.x, x[i : i + 1]]), torch.cat([fit.z, outcome.reshape(1)])
        )
        return float(before.min() - told.posterior(anchors)[0].min())

    for i in range(2):
        assert closed[i] == pytest.approx(np.mean([gain(i, float(q)) for q in QUANTILES]), rel=1e-4, abs=1e-6)
    for i in range(2):
        fine = np.mean([gain(i, float(q)) for q in ndtri((np.arange(201) + 0.5) / 201)])
        assert closed[i] == pytest.approx(fine, rel=0.3)


def believed(fit: s.Surrogate, **logs: float) -> s.Surrogate:
    """The same runs under given hyperparameters, all elements alike; the others at the prior's medians."""
    p = {name: mean.clone() for name, (mean, _) in make_priors(2).items()}
    p |= {name: torch.full_like(p[name], value) for name, value in logs.items()}
    first = fit.best
    member = s.condition_on_runs(FidelityKernel(2, p), math.exp(2 * float(p["log_noise"])), first.x, first.z)
    return s.Surrogate(member, fit.offset, fit.scale)


def two_level_runs(sign: float = 1.0, n: int = 10) -> tuple[Array, s.Surrogate]:
    """Half the runs at t = 1, half at the target; sign -1: the low level's best settings are the target's worst."""
    U = np.random.default_rng(8).random((n, 2))
    T = np.tile(np.array([[1.0, 0.0], [0.0, 0.0]]), (n // 2, 1))
    bowl = ((U - 0.4) ** 2).sum(1)
    y = np.where(T[:, 0] > 0, sign * bowl + 1.0, bowl)
    return U, s.fit_surrogate(U, T, (T[:, 0] > 0).astype(np.int64), y)


def test_a_level_that_says_nothing_about_the_target_is_not_bought() -> None:
    """The same runs under two beliefs: low fidelities faithful, or their roughness (and no bowl) drowning the rest."""
    U, fit = two_level_runs()
    on_offer = offer(U, np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([0.1, 1.0]), top=1, spent=(0.0, 0.0))
    chosen = []
    for log_rough in (-6.0, 4.0):
        model = believed(fit, log_bowl=-6.0, log_smooth=-6.0, log_rough=log_rough)
        chosen.append(suggest(model, PlainCube(2), U, on_offer, seed=[1])[1])
    assert chosen == [0, 1]


def test_usefulness_is_that_of_losses_drawn_from_the_posterior() -> None:
    U, T, level, y = drifting_runs(3, 12)
    member = s.fit_surrogate(U, T, level, y).best
    slots = np.array([[1.0, 1.0], [0.5, 0.0], [0.0, 0.0]])
    found = compute_usefulness(member, PlainCube(2), slots, [4])
    assert found[2] == pytest.approx(1.0)
    points = np.random.default_rng([4]).random((64, 2))
    for slot, value in zip(slots[:2], found[:2], strict=True):
        x = torch.cat([s.join_inputs(points, slot), s.join_inputs(points, np.zeros(2))])
        mean, _, v = member.posterior(x)
        joint = member.covariance(x, v, x, v) + 1e-9 * torch.eye(128, dtype=x.dtype)
        drawn = np.random.default_rng(0).standard_normal((4000, 128)) @ torch.linalg.cholesky(joint).mT.numpy()
        here, target = np.split(drawn + mean.numpy(), 2, axis=1)
        here, target = here - here.mean(1, keepdims=True), target - target.mean(1, keepdims=True)
        moments = (here * target).mean(), (here * here).mean(), (target * target).mean()
        assert value == pytest.approx(moments[0] / math.sqrt(moments[1] * moments[2]), abs=0.02)


def test_a_fidelity_that_misleads_is_found_useless_and_one_that_agrees_useful() -> None:
    slots = np.array([[1.0, 0.0], [0.0, 0.0]])
    useful = [compute_usefulness(two_level_runs(sign, 24)[1].best, PlainCube(2), slots, [0])[0] for sign in (1.0, -1.0)]
    assert useful[0] > 0.9
    assert useful[1] < MIN_USEFULNESS
    U, fit = two_level_runs(-1.0, 24)
    on_offer = offer(U, slots, np.array([0.01, 1.0]), top=1, spent=(0.0, 0.0))
    assert {suggest(fit, PlainCube(2), U, on_offer, seed=[i])[1] for i in range(3)} == {1}


# What it costs


A, B, C, D = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]])
NEW = np.array([0.9, 0.9])
POINTS = np.stack([A, B, C, D, NEW])
# Slots 0, 1, 2 are rungs of one size, at 1, 3 and 9 ninths; 3, 4 of another, at 2 and 6.
TABLE = offer(
    np.stack([A, A, B, C, D]),
    np.zeros((5, 2)),
    np.array([1, 3, 9, 2, 6]) / 9,
    top=2,
    spent=(0.0, 0.0),
    size=np.array([0, 0, 0, 1, 1]),
    at=np.array([0, 1, 0, 3, -1]),  # A: rungs 0 and 1; B: rung 0, still running; C: the other size; D: elsewhere
    stuck=np.array([False, False, True, False, False]),
)
INF = math.inf


@pytest.mark.parametrize(
    ("slot", "afresh", "continued"),
    [
        (0, [INF, INF, 1, 1, 1], [INF, INF, 1, 1, 1]),
        (1, [INF, 3, 3, 3, 3], [INF, INF, 3, 3, 3]),
        (2, [9, 9, 9, 9, 9], [6, INF, 9, 9, 9]),  # A pays 9 - 3; B is not yet where it could go on
        (3, [2, 2, INF, 2, 2], [2, 2, INF, 2, 2]),
        (4, [6, 6, 6, 6, 6], [6, 6, 4, 6, 6]),
    ],
)
def test_prices_are_those_of_a_hand_written_table(slot: int, afresh: list[float], continued: list[float]) -> None:
    """In ninths, of A, B, C, D and a new point."""
    np.testing.assert_allclose(TABLE.price(POINTS, slot) * 9, afresh)
    resuming = replace(TABLE, continues=True)
    np.testing.assert_allclose(resuming.price(POINTS, slot) * 9, continued)
    np.testing.assert_allclose(resuming.price(POINTS + 1e-6, slot) * 9, afresh[-1])  # near is not the same
    six = replace(resuming, limit=6 / 9)
    np.testing.assert_allclose(six.price(POINTS, slot) * 9, [x if x <= 6 else INF for x in continued])


def test_what_lies_behind_a_run_is_not_sold_again() -> None:
    """A run that began at a high rung, or was extended past one, has nothing to learn at a lower one of its size."""
    began_high = offer(A[None], np.zeros((2, 2)), np.array([0.1, 1.0]), top=1, spent=(0.0, 0.0), at=np.array([1]))
    assert began_high.price(A[None], 0)[0] == pytest.approx(0.1)  # afresh, it could be
    began_high = offer(
        A[None], np.zeros((2, 2)), np.array([0.1, 1.0]), top=1, spent=(0.0, 0.0), at=np.array([1]), continues=True
    )
    assert began_high.price(A[None], 0)[0] == INF


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
    """Six settings, two slots, until all is bought; every third one is still running when the next is chosen."""
    slots, cost = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([0.2, 1.0])
    cube, at = CELLS[[0, 3]], np.array([0, 0])
    spent = np.array([0.4, 0.4])

    def loss(u: Array, slot: int) -> float:
        value = (u[0] - 0.4) ** 2 + 0.3 * u[1]
        return float(1.0 - 3.0 * value if misleading and slot == 0 else value)

    for turn in range(12):
        running = np.arange(len(at)) == len(at) - 1 if turn % 3 == 2 else np.zeros(len(at), bool)
        on_offer = offer(
            cube, slots, cost, top=1, spent=(spent[0], spent[1]), at=at, stuck=running, continues=continues
        )
        prices = np.stack([on_offer.price(CELLS, slot) for slot in (0, 1)])
        if not np.isfinite(prices).any():
            break
        y = np.array([loss(u, int(k)) for u, k in zip(cube, at, strict=True)])
        done = ~running
        model = s.fit_surrogate(TINY.encode(cube[done]), slots[at[done]], at[done], y[done])
        model = model.with_pending(TINY.encode(cube[running]), slots[at[running]])
        point, slot = suggest(model, TINY, cube, on_offer, seed=[0, turn])
        price = float(on_offer.price(point[None], slot)[0])
        assert math.isfinite(price), (turn, point, slot, prices)
        cube, at = np.vstack([cube, point]), np.append(at, slot)
        spent += [price * (slot == 0), price]
    else:
        assert not continues  # 12 pairs, 2 were there: 10 turns are enough
    assert len({(*u, k) for u, k in zip(cube.tolist(), at.tolist(), strict=True)}) == len(at)


# What is answered, and the safeguard


@pytest.mark.parametrize(("n", "tolerance"), [(7, 0.1), (10, 0.1), (25, 2e-3)])
def test_the_recommendation_is_nearly_the_best_of_a_grid_for_the_mixture(n: int, tolerance: float) -> None:
    """With few runs the members disagree, and only what the best of them finds good is judged: better than what it
    finds best, all the same."""
    U, T, level, y = drifting_runs(4, n)
    fit = s.fit_surrogate(U, T, level, y)
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 81), np.linspace(0, 1, 81)), -1).reshape(-1, 2)

    def score(points: Array) -> Array:
        mean, variance = fit.posterior(s.join_inputs(points, np.zeros(2)))
        return np.asarray(mean + 0.5 * variance.sqrt())

    answer = recommend(fit, PlainCube(2), U, [0])
    assert score(answer[None])[0] <= score(grid).min() + tolerance
    lowest = grid[fit.best.posterior(s.join_inputs(grid, np.zeros(2)))[0].argmin()]
    assert score(answer[None])[0] <= score(lowest[None])[0] + 1e-2
    np.testing.assert_array_equal(answer, recommend(fit, PlainCube(2), U, [0]))


def test_among_few_cells_the_recommendation_is_the_one_with_the_least_mean_and_half_its_doubt() -> None:
    """From few noisy runs, so that the cell with the lowest mean is often another one."""
    others = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        seen = CELLS[rng.integers(0, 6, 5)]
        fit = s.fit_surrogate(TINY.encode(seen), np.zeros((5, 2)), np.zeros(5, np.int64), rng.standard_normal(5))
        mean, variance = fit.posterior(s.join_inputs(TINY.encode(CELLS), np.zeros(2)))
        best = int((mean + 0.5 * variance.sqrt()).argmin())
        np.testing.assert_array_equal(recommend(fit, TINY, seen, [seed]), CELLS[best])
        others += best != int(mean.argmin())
    assert others >= 1


def test_the_safeguard_runs_the_recommendation_at_the_top() -> None:
    U, T, level, y = drifting_runs(6, 20)
    fit, cube = s.fit_surrogate(U, T, level, y), PlainCube(2)
    slots, cost = np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([0.01, 1.0])

    def choice(spent: tuple[float, float], limit: float = INF) -> tuple[Array, int]:
        return suggest(fit, cube, U, offer(U, slots, cost, top=1, spent=spent, limit=limit), seed=[0, 1])

    low_only = offer(U, slots[:1], cost[:1], top=None, spent=(5.0, 5.0))
    (_, free), (point, forced) = choice((0.1, 0.1)), choice((5.0, 5.0))
    _, not_offered = suggest(fit, cube, U, low_only, seed=[0, 1])
    _, too_dear = choice((5.0, 5.0), limit=0.5)
    assert (free, forced, not_offered, too_dear) == (0, 1, 0, 0)
    np.testing.assert_array_equal(point, recommend(fit, cube, U, [0, 1, 1]))
    # Once it is running there, the next worker gets another point.
    told = fit.with_pending(point[None], np.zeros((1, 2)))
    more = np.vstack([U, point])
    after = offer(
        more, slots, cost, top=1, spent=(5.0, 6.0), at=np.append(np.full(20, -1), 1), stuck=np.arange(21) == 20
    )
    again, slot = suggest(told, cube, more, after, seed=[0, 1])
    assert slot == 1
    assert np.abs(again - point).max() > 1e-6


@pytest.mark.parametrize(("useful", "most"), [(0.3, 1.0), (0.6, 1.5), (0.75, 3.0), (1.0, 3.0)])
def test_a_lower_fidelity_gets_the_more_before_the_highest_the_more_it_tells(
    useful: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once the highest has had its half, as much as that, whatever it tells."""
    U, T, level, y = drifting_runs(6, 20)
    fit, slots = s.fit_surrogate(U, T, level, y), np.array([[1.0, 1.0], [0.0, 0.0]])
    monkeypatch.setattr(acquisition, "compute_usefulness", lambda *_: np.array([useful, 1.0]))

    def slot(low: float, high: float = 0.0, limit: float = INF) -> int:
        on_offer = offer(U, slots, np.array([1e-3, 1.0]), top=1, spent=(low, low + high), limit=limit)
        return suggest(fit, PlainCube(2), U, on_offer, seed=[0, 1])[1]

    assert slot(0.98 * most) == 0
    assert slot(1.02 * most) == 1
    assert slot(5.9, high=5.0) == 0
    assert slot(6.1, high=5.0) == 1
    assert slot(1.2, limit=1.1) == 1  # more than half of all there is


def test_nothing_draws_from_global_generators() -> None:
    U, T, level, y = drifting_runs(7, 12)
    before = (torch.get_rng_state().clone(), np.random.get_state()[1].copy())  # type: ignore[index]
    fit = s.fit_surrogate(U, T, level, y)
    suggest(fit, PlainCube(2), U, offer(U, np.zeros((1, 2)), np.ones(1), top=0, spent=(0.0, 1.0)), seed=[0])
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]
