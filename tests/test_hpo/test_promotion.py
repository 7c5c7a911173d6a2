"""Promotion before a rung is decided, and promotion by predicted loss."""

import heapq
import math
import random
from collections.abc import Sequence
from functools import partial
from statistics import mean
from typing import NamedTuple

import pytest

from hpo.search.hyperband import (
    Bracket,
    Entry,
    FreeSlots,
    Promote,
    Variant,
    compute_rung_sizes,
    count_remaining,
    find_standing,
    list_moves,
    replay,
)
from tests.test_hpo.test_hyperband import Table, halve_by_hand, make_ladder, make_tied_losses, run_to_the_end

# Asynchronous promotion


def test_the_best_third_of_what_has_finished_goes_on_before_the_rung_is_decided() -> None:
    ladder, bracket = make_ladder(3, 3), Bracket(0, 0, 0)
    waiting = [None] * 9
    for done, guesses in [
        ([5.0, 4.0], []),
        ([5.0, 4.0, 6.0], [1]),
        ([5.0, 4.0, 6.0, 1.0, 9.0], [3]),
        # Diverged ones have finished, too.
        ([5.0, 4.0, 6.0, 1.0, math.inf, math.nan], [3, 1]),
        ([math.inf] * 8, []),
    ]:
        losses = [*done, *waiting][:9]
        entries = [Entry(i, bracket, {0: x}) for i, x in enumerate(losses)]
        entries += [Entry(9 + i, Bracket(0, 0, 1), {1: None}) for i in range(5)]
        entries += [Entry(14 + i, Bracket(0, 0, 2), {2: None}) for i in range(2)]
        # Guesses come before starts.
        expected = [*(Promote(c, 1) for c in guesses), FreeSlots(Bracket(0, 0, 2), 1)]
        assert list_moves(entries, ladder, asynchronous=True) == expected
        assert list_moves(entries, ladder) == expected[-1:]


def test_certain_promotions_come_before_guesses() -> None:
    # One result is missing.
    entries = [Entry(i, Bracket(0, 0, 0), {0: float(i) if i < 8 else None}) for i in range(9)]
    # This rung is decided.
    entries += [Entry(9 + i, Bracket(0, 1, 0), {0: float(i)}) for i in range(9)]
    entries[0].losses[1] = 1.0  # type: ignore[index]
    entries += [Entry(18 + i, Bracket(0, s, 1), {1: None}) for s in (0, 1) for i in range(5)]
    promoted = [m for m in list_moves(entries, make_ladder(3, 3), sizes=2, asynchronous=True) if isinstance(m, Promote)]
    assert promoted == [Promote(9, 1), Promote(10, 1), Promote(11, 1), Promote(1, 1)]


def test_guesses_are_never_more_than_there_are_places() -> None:
    """Rung 1 has 9 members and 5 that were run there before a raise: 3 places, though a third of 13 is 4."""
    bracket = Bracket(0, 0, 0)
    entries = [Entry(i, bracket, {0: float(i)}) for i in range(27)]
    for i in range(14):
        entries[i].losses[1] = float(i) if i < 13 else None  # type: ignore[index]
    others = [
        Entry(27 + i, Bracket(0, 0, s), {s: None}) for s in (1, 2, 3) for i in range(compute_rung_sizes(s, 3, 3)[0])
    ]
    guesses = list_moves([*entries, *others], make_ladder(4, 3), variant="preserving", asynchronous=True)
    assert guesses == [Promote(c, 2) for c in range(3)]


@pytest.mark.parametrize("eta", [2, 3])
def test_discarding_ends_asynchronously_where_it_ends_synchronously(eta: int) -> None:
    """Losses have ties and diverge, and a raise comes at any moment."""
    wrong = 0
    for seed in range(30):
        rng = random.Random(seed)
        loss = make_tied_losses(seed, rng.choice([0.0, 0.15, 0.6]))
        ladder, table = make_ladder(3, eta), Table()
        ran = run_to_the_end(
            table,
            ladder,
            "discarding",
            loss,
            rng=rng,
            workers=6,
            asynchronous=True,
            stop_after=rng.choice([None, rng.randrange(1, 40)]),
        )
        ladder = ladder.raised(ladder.levels[-1] * eta)
        ran += run_to_the_end(table, ladder, "discarding", loss, rng=rng, workers=6, asynchronous=True)
        due = set()
        for start in range(ladder.top + 1):
            inside = [e for e in table.values() if e.bracket.start == start]
            expected = halve_by_hand([e.config for e in inside], start, ladder.top, eta, loss)
            assert [{e.config for e in rung} for rung in replay(inside, start, ladder, "discarding")] == expected
            due |= {(c, start + i) for i, rung in enumerate(expected) for c in rung}
        assert due <= set(ran)
        assert find_standing(table.values(), ladder) == due
        wrong += len(ran) - len(due)
    assert wrong > 0


@pytest.mark.parametrize("variant", ["preserving", "efficient"])
def test_asynchronously_every_variant_ends_and_the_efficient_one_costs_one_hyperband(variant: Variant) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        loss = make_tied_losses(seed, 0.0)
        ladder, table = make_ladder(3, 3), Table()
        ran = run_to_the_end(table, ladder, variant, loss, rng=rng, workers=5, asynchronous=True)
        ladder = ladder.raised(27)
        left = sum(missing for _, _, missing in count_remaining(table.values(), ladder, variant=variant))
        more = run_to_the_end(table, ladder, variant, loss, rng=rng, workers=5, asynchronous=True)
        assert count_remaining(table.values(), ladder, variant=variant) == []
        for start in range(4):
            inside = {c for c, e in table.items() if e.bracket.start == start}
            for i, k in enumerate(compute_rung_sizes(start, 3, 3)):
                at = sum(c in inside and r == start + i for c, r in ran + more)
                assert at == k if variant == "efficient" else at >= k
        assert len(more) == left if variant == "efficient" else len(more) >= left


class SimulatedSearch(NamedTuple):
    """The result of a simulated search.

    Attributes:
        hours: Its duration.
        busy: Share of the workers' time that was training.
        evaluations: Number of runs.
        top: Members of the highest rung of each bracket, by their place in the bracket.
        first: When the first bracket's highest rung was decided.
    """

    hours: float
    busy: float
    evaluations: int
    top: set[tuple[Bracket, int]]
    first: float


def simulate(
    seed: int,
    *,
    asynchronous: bool,
    variant: Variant = "discarding",
    iterations: int | None = 1,
    until: float = math.inf,
    rungs: int = 4,
    workers: int = 8,
) -> SimulatedSearch:
    """Simulate a search whose runs last as long as their tokens, times a factor of the configuration between 1 and 10.

    A configuration is the n-th of its bracket, and this determines its quality and duration, whenever it is started.
    """
    ladder = make_ladder(rungs, 3)
    table, places = Table(), dict[int, tuple[Bracket, int]]()
    running: list[tuple[float, int, int]] = []
    now = work = 0.0
    evaluations, first = 0, math.nan

    def rng(config: int, what: str) -> random.Random:
        return random.Random(f"{seed} {places[config]} {what}")

    while True:
        while len(running) < workers and now < until:
            possible = list_moves(
                table.values(), ladder, variant=variant, iterations=iterations, asynchronous=asynchronous
            )
            if not possible:
                break
            move = possible[0]
            if isinstance(move, Promote):
                config, rung = move.config, move.rung
            else:
                config, rung = len(table), move.bracket.start
                places[config] = move.bracket, sum(e.bracket == move.bracket for e in table.values())
                table[config] = Entry(config, move.bracket, {})
            table[config].losses[rung] = None  # type: ignore[index]
            below = ladder.levels[rung - 1] if rung > table[config].bracket.start else 0
            hours = (ladder.levels[rung] - below) * 10 ** rng(config, "slow").random()
            heapq.heappush(running, (now + hours, config, rung))
            evaluations += 1
            work += min(hours, until - now)
        if not running or running[0][0] > until:
            break
        now, config, rung = heapq.heappop(running)
        noise = rng(config, f"noise {rung}").gauss(0, 0.5)
        table[config].losses[rung] = rng(config, "good").gauss(0, 1) + noise  # type: ignore[index]
        if math.isnan(first):
            one = replay([e for e in table.values() if e.bracket == Bracket(0, 0, 0)], 0, ladder, variant)
            if len(one) == rungs and all(e.losses.get(rungs - 1) is not None for e in one[-1]):
                first = now
    end = now if math.isinf(until) else until
    top = {
        places[e.config]
        for bracket in {e.bracket for e in table.values()}
        if len(rungs := replay([e for e in table.values() if e.bracket == bracket], bracket.start, ladder, variant))
        == ladder.top - bracket.start + 1
        for e in rungs[-1]
    }
    return SimulatedSearch(end, work / (workers * end), evaluations, top, first)


def test_asynchronous_workers_wait_less_and_the_outcome_is_the_same() -> None:
    """The gain is small, because workers that wait for a rung start configurations of the other brackets meanwhile."""
    synchronous = [simulate(seed, asynchronous=False, rungs=3) for seed in range(20)]
    asynchronous = [simulate(seed, asynchronous=True, rungs=3) for seed in range(20)]
    assert all(a.top == b.top and len(a.top) == 1 + 1 + 3 for a, b in zip(asynchronous, synchronous, strict=True))
    assert mean(a.busy for a in asynchronous) > mean(b.busy for b in synchronous) + 0.01
    assert all(a.first <= b.first for a, b in zip(asynchronous, synchronous, strict=True))
    assert mean(a.first for a in asynchronous) < 0.97 * mean(b.first for b in synchronous)
    assert {b.evaluations for b in synchronous} == {22}
    assert 22 < mean(a.evaluations for a in asynchronous) < 1.07 * 22


def test_with_larger_rungs_the_top_is_reached_sooner_at_the_price_of_wrong_guesses() -> None:
    synchronous = [simulate(seed, asynchronous=False) for seed in range(10)]
    asynchronous = [simulate(seed, asynchronous=True) for seed in range(10)]
    assert all(a.top == b.top and len(a.top) == 1 + 1 + 2 + 4 for a, b in zip(asynchronous, synchronous, strict=True))
    assert mean(a.first for a in asynchronous) < 0.97 * mean(b.first for b in synchronous)
    assert {b.evaluations for b in synchronous} == {69}
    assert 69 < mean(a.evaluations for a in asynchronous) < 1.07 * 69


def test_without_end_no_worker_waits_in_either_mode() -> None:
    for asynchronous in (False, True):
        assert simulate(0, asynchronous=asynchronous, iterations=None, until=500.0).busy == pytest.approx(1.0)


# Promotion by predicted loss


def score_upside_down(table: Table, configs: Sequence[int]) -> list[float]:
    """Return scores that predict the worst at its rung to be the best."""
    return [-table[c].losses[max(r for r, x in table[c].losses.items() if x is not None)] for c in configs]  # type: ignore[operator]


def test_scores_choose_instead_of_losses() -> None:
    table: Table = {}
    run_to_the_end(table, make_ladder(3, 3), "efficient", lambda c, _: float(c), scores=score_upside_down)
    inside = [e for e in table.values() if e.bracket.start == 0]
    configs = [e.config for e in inside]
    assert [[e.config for e in rung] for rung in replay(inside, 0, make_ladder(3, 3), "efficient")] == [
        configs,
        configs[-3:],
        configs[-1:],
    ]


def test_scores_are_asked_for_contested_places_only() -> None:
    """In a bracket of 9, 4 do not diverge, for 3 places. The others (5 for 1 place, 3 at the top) are complete."""
    asked: list[tuple[int, ...]] = []

    def scores(table: Table, configs: Sequence[int]) -> list[float]:
        asked.append(tuple(configs))
        return score_upside_down(table, configs)

    table: Table = {}
    run_to_the_end(
        table, make_ladder(3, 3), "efficient", lambda c, _: float(c) if c < 4 or c >= 9 else math.inf, scores=scores
    )
    # As in a search, each question fills one place. The last of 4 rivals is left over, then 2 of the 3 above.
    assert asked == [(0, 1, 2, 3), (0, 1, 2), (0, 1), (1, 2, 3), (9, 10, 11, 12, 13)]


def test_scores_are_not_asked_for_when_there_is_room_for_all() -> None:
    entries = [Entry(i, Bracket(0, 0, 0), {0: float(i) if i < 2 else math.inf}) for i in range(9)]

    def scores(_: Sequence[int]) -> list[float]:
        raise AssertionError("there are 2 candidates for 3 places")

    assert list_moves(entries, make_ladder(3, 3), variant="efficient", scores=scores)[:2] == [
        Promote(0, 1),
        Promote(1, 1),
    ]


def test_all_contested_places_are_one_question() -> None:
    entries = [Entry(i, Bracket(0, size, 0), {0: float(i)}) for i in range(18) for size in [i // 9]]
    asked: list[Sequence[int]] = []

    def scores(configs: Sequence[int]) -> list[float]:
        asked.append(configs)
        return [-float(c) for c in configs]

    promoted = list_moves(entries, make_ladder(3, 3), variant="efficient", sizes=2, scores=scores)[:6]
    assert promoted == [Promote(c, 1) for c in (8, 7, 6, 17, 16, 15)]
    assert asked == [list(range(18))]


def test_places_once_taken_are_kept_whatever_is_predicted_later() -> None:
    """Predictions are drawn again at every question, as from a model that changes with every result."""

    def draw_scores(dice: random.Random, _: Table, configs: Sequence[int]) -> list[float] | None:
        return [dice.random() for _ in configs] if dice.random() < 0.8 else None

    for seed in range(20):
        for asynchronous in (False, True):
            rng = random.Random(seed)
            ladder, table = make_ladder(3, 2), Table()
            ran = []
            for _ in range(2):
                ran += run_to_the_end(
                    table,
                    ladder,
                    "efficient",
                    make_tied_losses(seed, 0.1),
                    rng=rng,
                    workers=4,
                    asynchronous=asynchronous,
                    scores=partial(draw_scores, random.Random(seed + 100)),
                )
                ladder = ladder.raised(ladder.levels[-1] * 2)
            for start in range(4):
                for i, k in enumerate(compute_rung_sizes(start, 3, 2)):
                    assert sum(table[c].bracket.start == start and r == start + i for c, r in ran) <= k
            assert count_remaining(table.values(), make_ladder(4, 2), variant="efficient") == []


def test_scores_that_cannot_be_used_are_refused() -> None:
    entries = [Entry(i, Bracket(0, 0, 0), {0: float(i)}) for i in range(9)]
    with pytest.raises(ValueError, match="scores need the efficient variant"):
        list_moves(entries, make_ladder(3, 3), scores=lambda _: None)
    with pytest.raises(ValueError, match="scores must be finite"):
        list_moves(entries, make_ladder(3, 3), variant="efficient", scores=lambda configs: [math.nan for _ in configs])
    assert list_moves(entries, make_ladder(3, 3), variant="efficient", scores=lambda _: None) == list_moves(
        entries, make_ladder(3, 3)
    )
