"""Incremental Hyperband: ladders, rung sizes, the variants, their costs, and what remains to run."""

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from statistics import mean

import pytest

from hpo.search.hyperband import (
    VARIANTS,
    Bracket,
    Entry,
    FreeSlots,
    Promote,
    Variant,
    compute_rung_sizes,
    count_remaining,
    list_moves,
    replay,
)
from hpo.search.ladder import Ladder

Loss = Callable[[int, int], float]
Table = dict[int, Entry]


def make_ladder(rungs: int, eta: int) -> Ladder:
    return Ladder(tuple(eta**k for k in range(rungs)), eta)


def run_to_the_end(
    table: Table,
    ladder: Ladder,
    variant: Variant,
    loss: Loss,
    *,
    rng: random.Random | None = None,
    workers: int = 1,
    stop_after: int | None = None,
    asynchronous: bool = False,
    scores: Callable[[Table, Sequence[int]], list[float] | None] | None = None,
) -> list[tuple[int, int]]:
    """Run all moves and return the (configuration, rung) pairs in the order in which they were started.

    With more than one worker, results come back in random order. Asserts that nothing is ever run twice.
    """
    rng = rng or random.Random(0)
    running: list[tuple[int, int]] = []
    ran: list[tuple[int, int]] = []
    table_scores = None if scores is None else partial(scores, table)
    while True:
        possible = []
        if len(running) < workers and (stop_after is None or len(ran) < stop_after):
            possible = list_moves(
                table.values(), ladder, variant=variant, asynchronous=asynchronous, scores=table_scores
            )
        if possible:
            move = possible[0]
            if isinstance(move, Promote):
                config, rung = move.config, move.rung
            else:
                config, rung = len(table), move.bracket.start
                table[config] = Entry(config, move.bracket, {})
            assert rung not in table[config].losses, "run twice"
            table[config].losses[rung] = None  # type: ignore[index]
            running.append((config, rung))
            ran.append((config, rung))
        elif running:
            config, rung = running.pop(rng.randrange(len(running)))
            table[config].losses[rung] = loss(config, rung)  # type: ignore[index]
        else:
            return ran


def make_tied_losses(seed: int, diverging: float) -> Loss:
    """Return a loss with only six values, so that ties are common, and a share of values that are not finite."""

    def loss(config: int, rung: int) -> float:
        rng = random.Random(f"{seed} {config} {rung}")
        return rng.choice([math.inf, math.nan]) if rng.random() < diverging else float(rng.randrange(6))

    return loss


def halve_by_hand(configs: list[int], start: int, top: int, eta: int, loss: Loss) -> list[set[int]]:
    """Return the configurations at each rung from `start` up, by a second implementation of successive halving."""
    n, members, rungs = len(configs), list(configs), [set(configs)]
    for rung in range(start, top):
        n = math.floor(Fraction(n, eta))
        ranked = sorted((loss(c, rung), c) for c in members if math.isfinite(loss(c, rung)))
        members = [c for _, c in ranked[:n]]
        rungs.append(set(members))
    return rungs


def test_levels_are_the_maximum_divided_by_powers_of_eta() -> None:
    assert Ladder.make(1, 81, 3).levels == (1, 3, 9, 27, 81)
    assert Ladder.make(2, 81, 3).levels == (3, 9, 27, 81)
    assert Ladder.make(100, 1000, 3).levels == (111, 333, 1000)
    # 1.25 and 2.5 are rounded half to even.
    assert Ladder.make(1, 5, 2).levels == (1, 2, 5)


def test_exact_powers_count_as_whole_rungs() -> None:
    for eta in (2, 3, 5, 7, 10):
        for top in range(1, 20):
            assert Ladder.make(11, 11 * eta**top, eta).top == top
            # One token short of a rung: the rung is missing, unless that is within the tolerance.
            if top > 1:
                assert Ladder.make(1, eta**top - 1, eta).top == (top - 1 if eta**top < 1_000_000 else top)


def test_a_ladder_of_one_rung_warns_and_is_plain_sampling() -> None:
    with pytest.warns(UserWarning, match="one rung only"):
        ladder = Ladder.make(50, 100, 3)
    assert ladder.levels == (100,)
    assert list_moves([], ladder) == [FreeSlots(Bracket(0, 0, 0), 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 3), "positive"),
        ((10, -1, 3), "positive"),
        ((10, 9, 3), "min <= max"),
        ((1, 9, 1), "eta"),
        ((1, 9, 2.5), "eta"),
        ((1, 9, True), "eta"),
    ],
)
def test_invalid_ladders_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ladder.make(*arguments)


def test_a_raised_ladder_keeps_its_lower_rungs() -> None:
    ladder = Ladder.make(100, 1000, 3)
    assert ladder.raised(9000).levels == (111, 333, 1000, 3000, 9000)
    assert ladder.raised(3000).raised(9000) == ladder.raised(9000)
    assert ladder.raised(1000) == ladder


@pytest.mark.parametrize(
    ("max_tokens", "nearest"), [(4000, "3000 and 9000"), (999, "1000 and 3000"), (1001, "1000 and 3000")]
)
def test_a_ladder_is_raised_by_powers_of_eta_only(max_tokens: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest):
        Ladder.make(100, 1000, 3).raised(max_tokens)


def test_bracket_sizes_are_those_of_the_formula_by_hand() -> None:
    # eta 3: ceil(5/5 81), ceil(5/4 27) = ceil(33.75), ceil(5/3 9), ceil(5/2 3), 5
    assert [compute_rung_sizes(k, 4, 3) for k in range(5)] == [
        (81, 27, 9, 3, 1),
        (34, 11, 3, 1),
        (15, 5, 1),
        (8, 2),
        (5,),
    ]
    assert [compute_rung_sizes(k, 4, 2) for k in range(5)] == [(16, 8, 4, 2, 1), (10, 5, 2, 1), (7, 3, 1), (5, 2), (5,)]
    # Beyond the range in which floats are exact.
    assert compute_rung_sizes(0, 40, 3)[0] == 3**40


def test_ties_go_to_the_one_that_was_started_first_and_diverged_ones_are_not_promoted() -> None:
    losses = [2.0, 1.0, math.inf, 1.0, 1.0, math.nan, 3.0, 2.0, 4.0]
    entries = [Entry(i, Bracket(0, 0, 0), {0: x}) for i, x in enumerate(losses)]
    first, second = replay(entries, 0, make_ladder(3, 3), "discarding")
    assert [e.config for e in first] == list(range(9))
    assert [e.config for e in second] == [1, 3, 4]
    nearly_all_diverged = [Entry(i, Bracket(0, 0, 0), {0: 1.0 if i == 5 else math.inf}) for i in range(9)]
    assert [e.config for e in replay(nearly_all_diverged, 0, make_ladder(3, 3), "discarding")[1]] == [5]
    all_diverged = [Entry(i, Bracket(0, 0, 0), {0: math.nan}) for i in range(9)]
    assert [[e.config for e in rung] for rung in replay(all_diverged, 0, make_ladder(3, 3), "discarding")] == [
        list(range(9)),
        [],
        [],
    ]


def test_promotions_come_first_highest_rung_first_then_the_better_one() -> None:
    ladder = make_ladder(3, 3)
    entries = [Entry(i, Bracket(0, 0, 0), {0: float(-i)}) for i in range(9)]
    entries += [Entry(9 + i, Bracket(0, 0, 1), {1: float(i)}) for i in range(5)]
    assert list_moves(entries, ladder) == [
        Promote(9, 2),
        Promote(8, 1),
        Promote(7, 1),
        Promote(6, 1),
        FreeSlots(Bracket(0, 0, 2), 3),
    ]


def test_a_rung_waits_for_all_its_runs_and_a_lost_run_is_repeated() -> None:
    ladder, bracket = make_ladder(2, 3), Bracket(0, 0, 0)
    entries = [Entry(i, bracket, {0: float(i)}) for i in range(3)]
    assert list_moves(entries, ladder)[0] == Promote(0, 1)
    entries[2] = Entry(2, bracket, {0: None})
    assert list_moves(entries, ladder) == [FreeSlots(Bracket(0, 0, 1), 2)]
    entries[2] = Entry(2, bracket, {})
    assert list_moves(entries, ladder)[0] == Promote(2, 0)


def test_sizes_never_compete_and_the_cheapest_start_comes_first() -> None:
    ladder = make_ladder(2, 3)
    assert list_moves([], ladder, sizes=2) == [
        FreeSlots(Bracket(0, 0, 0), 3),
        FreeSlots(Bracket(0, 1, 0), 3),
        FreeSlots(Bracket(0, 0, 1), 2),
        FreeSlots(Bracket(0, 1, 1), 2),
    ]
    entries = [Entry(i, Bracket(0, i // 3, 0), {0: float(i)}) for i in range(6)]
    assert list_moves(entries, ladder, sizes=2)[:2] == [Promote(0, 1), Promote(3, 1)]


def test_the_next_iteration_opens_when_the_one_before_is_done_or_waits() -> None:
    ladder = make_ladder(2, 3)
    table: Table = {}
    run_to_the_end(table, ladder, "discarding", lambda c, _: float(c))
    assert list_moves(table.values(), ladder, iterations=1) == []
    again = [FreeSlots(Bracket(1, 0, 0), 3), FreeSlots(Bracket(1, 0, 1), 2)]
    assert (
        list_moves(table.values(), ladder, iterations=2) == list_moves(table.values(), ladder, iterations=None) == again
    )
    # Its promotion exists already, but nothing else can be run either.
    table[0].losses[0] = None  # type: ignore[index]
    assert list_moves(table.values(), ladder, iterations=None) == again


def test_results_may_arrive_in_any_order() -> None:
    for variant in VARIANTS:
        for seed in range(10):
            rng = random.Random(seed)
            loss = make_tied_losses(seed, 0.2)
            table: Table = {}
            ran = run_to_the_end(table, make_ladder(3, 3), variant, loss, rng=rng, workers=rng.randrange(1, 8))
            at: dict[int, list[int]] = {}
            for config, entry in table.items():
                at.setdefault(entry.bracket.start, []).append(config)
            expected = {
                (c, start + i)
                for start, configs in at.items()
                for i, rung in enumerate(halve_by_hand(configs, start, 2, 3, loss))
                for c in rung
            }
            assert set(ran) == expected


@pytest.mark.parametrize("eta", [2, 3])
def test_discarding_equals_a_run_from_scratch_after_two_raises_at_any_moment(eta: int) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        loss = make_tied_losses(seed, rng.choice([0.0, 0.15, 0.6]))
        ladder, table = make_ladder(2, eta), Table()
        for _ in range(2):
            # The raise comes while rungs are still open, or after the end.
            stop = rng.choice([None, rng.randrange(1, 20)])
            run_to_the_end(table, ladder, "discarding", loss, rng=rng, workers=rng.randrange(1, 6), stop_after=stop)
            ladder = ladder.raised(ladder.levels[-1] * eta)
        run_to_the_end(table, ladder, "discarding", loss, rng=rng, workers=rng.randrange(1, 6))
        for start in range(ladder.top + 1):
            inside = [e for e in table.values() if e.bracket.start == start]
            assert len(inside) == compute_rung_sizes(start, ladder.top, eta)[0]
            expected = halve_by_hand([e.config for e in inside], start, ladder.top, eta, loss)
            assert [{e.config for e in rung} for rung in replay(inside, start, ladder, "discarding")] == expected
            for i, rung in enumerate(expected):
                assert all(start + i in table[c].losses for c in rung)


@pytest.mark.parametrize("variant", ["preserving", "efficient"])
def test_what_was_run_competes_or_keeps_its_place_after_a_raise(variant: Variant) -> None:
    """The rule of each variant is checked rung by rung on the final table after two raises."""
    for seed in range(20):
        rng = random.Random(seed)
        loss = make_tied_losses(seed, 0.1)
        ladder, table = make_ladder(2, 2), Table()
        for raises in range(3):
            before = {c: set(e.losses) for c, e in table.items()}
            if raises:
                ladder = ladder.raised(ladder.levels[-1] * 2)
            run_to_the_end(table, ladder, variant, loss, rng=rng, workers=3)
        for start in range(ladder.top + 1):
            inside = {c: e for c, e in table.items() if e.bracket.start == start}
            sizes = compute_rung_sizes(start, ladder.top, 2)
            rungs = [{e.config for e in rung} for rung in replay(list(inside.values()), start, ladder, variant)]
            for i in range(len(sizes) - 1):
                below, here, k, rung = rungs[i], rungs[i + 1], sizes[i + 1], start + i
                ran_below = {c for c in inside if rung in inside[c].losses}
                had_place = {c for c in below if rung + 1 in before.get(c, ())}
                pool = ran_below if variant == "preserving" else below
                free = k if variant == "preserving" else k - len(had_place)
                rivals = pool if variant == "preserving" else pool - had_place
                best = sorted((loss(c, rung), c) for c in rivals if math.isfinite(loss(c, rung)))[:free]
                assert here == {c for _, c in best} | (set() if variant == "preserving" else had_place)
                assert len(here) <= k
            # Nothing is ever dropped.
            if variant == "efficient":
                assert all({c for c in inside if start + i in inside[c].losses} == rung for i, rung in enumerate(rungs))


def count_spent_tokens(table: Table, ladder: Ladder, *, resumed: bool) -> int:
    """Return the tokens of all runs in full or, if they resume, of each configuration's highest rung only."""
    tokens = ladder.levels
    return sum(tokens[max(e.losses)] if resumed else sum(tokens[r] for r in e.losses) for e in table.values())


def compute_shares(top: int, eta: int, variant: Variant, seed: int) -> tuple[Fraction, Fraction]:
    """Return the cost of a raised run, relative to Hyperband at R and again at eta R: in full, and with resumed runs.

    A loss is a Gaussian quality of the configuration plus equal noise at each rung.
    """

    def loss(config: int, rung: int) -> float:
        return random.Random(f"{seed} {config}").gauss(0, 1) + random.Random(f"{seed} {config} {rung}").gauss(0, 1)

    # In units of the smallest budget R / eta^top, so that it is exact even where that is a fraction.
    small = make_ladder(top + 1, eta)
    large = small.raised(eta * small.levels[-1])
    table: Table = {}
    run_to_the_end(table, small, variant, loss)
    twice = count_spent_tokens(table, small, resumed=False)
    run_to_the_end(table, large, variant, loss)
    scratch: Table = {}
    run_to_the_end(scratch, large, variant, loss)
    twice += count_spent_tokens(scratch, large, resumed=False)
    plain, resumed = (count_spent_tokens(table, large, resumed=is_resumed) for is_resumed in (False, True))
    return Fraction(plain, twice), Fraction(resumed, twice)


def test_one_hyperband_costs_what_the_authors_say() -> None:
    def compute_cost(top: int, eta: int, unit: Fraction) -> Fraction:
        table: Table = {}
        run_to_the_end(table, make_ladder(top + 1, eta), "discarding", lambda c, _: float(c))
        return count_spent_tokens(table, make_ladder(top + 1, eta), resumed=False) * unit

    assert compute_cost(4, 2, Fraction(1)) + compute_cost(5, 2, Fraction(1)) == 1500
    assert compute_cost(5, 2, Fraction(1)) == 1128
    assert compute_cost(3, 3, Fraction(16, 9)) == 752
    # This is 890.67.
    assert compute_cost(2, 3, Fraction(16, 9)) + compute_cost(3, 3, Fraction(16, 9)) == Fraction(2672, 3)


@pytest.mark.parametrize(
    ("top", "eta", "share"),
    [(4, 2, Fraction(1128, 1500)), (2, 3, Fraction(752 * 3, 2672)), (5, 2, 0.7233), (3, 3, 0.8181)],
)
def test_the_efficient_variant_costs_one_hyperband(top: int, eta: int, share: Fraction | float) -> None:
    for seed in range(3):
        plain, _ = compute_shares(top, eta, "efficient", seed)
        assert plain == share if isinstance(share, Fraction) else float(plain) == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize(
    ("top", "eta", "variant", "share", "resumed_share"),
    [
        (4, 2, "preserving", 0.767, 0.545),
        (4, 2, "discarding", 0.770, 0.545),
        (2, 3, "preserving", 0.852, 0.72),
        (2, 3, "discarding", 0.854, 0.72),
        (4, 2, "efficient", 0.752, 0.545),
        (2, 3, "efficient", 0.8443, 0.72),
    ],
)
def test_a_raise_costs_what_the_authors_measured(
    top: int, eta: int, variant: Variant, share: float, resumed_share: float
) -> None:
    costs = [compute_shares(top, eta, variant, seed) for seed in range(25)]
    assert mean(float(plain) for plain, _ in costs) == pytest.approx(share, abs=0.004)
    assert mean(float(resumed) for _, resumed in costs) <= resumed_share


def test_what_remains_is_what_is_then_run() -> None:
    for seed in range(10):
        rng = random.Random(seed)
        ladder, table = make_ladder(3, 3), Table()

        def loss(config: int, rung: int, seed: int = seed) -> float:
            return random.Random(f"{seed} {config} {rung}").random()

        run_to_the_end(table, ladder, "efficient", loss, stop_after=rng.randrange(40))
        for _ in range(2):
            expected = sum(missing for _, _, missing in count_remaining(table.values(), ladder, variant="efficient"))
            assert len(run_to_the_end(table, ladder, "efficient", loss)) == expected
            assert count_remaining(table.values(), ladder, variant="efficient") == []
            ladder = ladder.raised(ladder.levels[-1] * 3)


def test_what_remains_after_a_raise_is_a_lower_bound() -> None:
    for variant in VARIANTS:
        ladder, table = make_ladder(4, 2), Table()
        loss = make_tied_losses(1, 0.0)
        run_to_the_end(table, ladder, variant, loss)
        ladder = ladder.raised(16)
        expected = sum(missing for _, _, missing in count_remaining(table.values(), ladder, variant=variant))
        ran = len(run_to_the_end(table, ladder, variant, loss))
        assert expected <= ran <= 1.15 * expected


def test_tokens_count_every_seed_and_new_ones_start_at_zero() -> None:
    ladder = Ladder((100, 300, 900), 3, (1, 1, 3))
    assert [ladder.seeds_at(k) for k in range(5)] == [1, 1, 3, 3, 3]
    assert [ladder.tokens(k) for k in range(3)] == [100, 300, 2700]
    assert ladder.tokens(1, resumed=True) == 200
    assert ladder.tokens(2, resumed=True) == (900 - 300) + 2 * 900
    assert ladder.raised(2700).tokens(3, resumed=True) == 3 * (2700 - 900)


@pytest.mark.parametrize("seeds", [(), (0,), (2, 1), (1.5,), (True,), (-1, 2)])
def test_invalid_seeds_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="seeds are whole numbers of at least 1 that never fall"):
        Ladder((1, 3), 3, seeds)
