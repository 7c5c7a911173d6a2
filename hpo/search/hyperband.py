"""Incremental Hyperband: what may run next, given what has run. The functions here are pure and keep no state.

Iterative Deepening Hyperband (Brandt, Wever, Bengs, Hüllermeier 2023, arXiv 2302.00511) on top of Hyperband (Li et al.
2018, arXiv 1603.06560): the largest budget R of a Hyperband may be raised to eta R, any number of times, and no run is
repeated.

A ladder has rungs 0 (cheapest) to K (R tokens). The bracket that starts at rung k has ceil((K+1)/(s+1) eta^s)
configurations, s = K - k, and every rung above keeps floor(n / eta) of the n below it. After a raise each bracket keeps
its start rung, gains one rung at the top and room for more configurations, and a new bracket starts at eta R. All rungs
are then replayed over old and new configurations together, and evaluations that already have a value are not run. The
variants differ in which configurations compete for the k places of the next rung:

- discarding: the members of this rung, as if all had been started today. A configuration that was promoted under a
  smaller R and no longer qualifies is dropped (its results stay in the record). The promotions are exactly those of a
  run from scratch.
- preserving: in addition, every configuration that was ever run at this rung.
- efficient: configurations that were already run at the next rung keep their places, and the free places go to the best
  of the others. Costs exactly as many evaluations as one Hyperband with the raised R.

A rung is decided when all its competitors have finished, so neither the order of completion nor the number of workers
changes the outcome. Ties go to the configuration that was started first. A diverged configuration (loss not finite) is
never promoted: the next rung is then smaller, and empty if all diverged.

In asynchronous mode a promotion does not wait for that: of d finished configurations, the best floor(d / eta) are
promoted at once, as in ASHA (Li et al. 2020, arXiv 1810.05934), as long as they may still be among the k. Such a
promotion is a guess. When the rung is decided, the rule of its variant applies as usual: discarding drops the wrong
guesses, preserving lets them compete further up, efficient lets them keep the place, and never gives more than k. The
gain is small, because workers that wait for a rung start configurations of other brackets meanwhile: in simulation
(discarding, 3 to 5 rungs, 8 to 32 workers, durations that differ tenfold) the top of the first bracket is decided 2 to
8 % sooner, for 4 to 7 % more evaluations, and the whole search takes from 1 % less to 10 % more time.

A space may have too few settings to fill a bracket (`Room`). The bracket is then closed: it is complete with the
configurations that it has, and its rungs keep their places.

Ranks may also come from scores, which predict the loss at the target, instead of the losses of the rung. Scores change
as results come in, so they are only allowed in the efficient variant, in which a configuration keeps its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Literal, NamedTuple, get_args

from hpo.search.ladder import Ladder

Variant = Literal["discarding", "preserving", "efficient"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
# Numbers of configurations -> a score for each, lower is better; None if there is no model yet.
Scores = Callable[[Sequence[int]], Sequence[float] | None]


class Room(NamedTuple):
    """How many settings could still be run at a size and rung.

    Attributes:
        free: Settings that can be run now.
        busy: Settings that can be run when a shorter run of theirs has ended.
    """

    free: int
    busy: int


# (index of the size, rung) -> the room there, in a space with a limited number of settings.
FindRoom = Callable[[int, int], Room]


class Bracket(NamedTuple):
    """One bracket of one Hyperband over one proxy size: the configurations whose ranks are compared.

    Attributes:
        iteration: 0, 1, ...: which repetition of Hyperband, each with new configurations.
        size: Index of the proxy size. Sizes never compete.
        start: The rung at which its configurations start, counted from the bottom, so that a raise does not change it.
    """

    iteration: int
    size: int
    start: int


class Entry(NamedTuple):
    """One configuration and its results.

    Attributes:
        config: Number of the configuration.
        bracket: The bracket that it belongs to.
        losses: Loss by rung. None while it runs, not finite if it diverged, absent if it was never run there.
    """

    config: int
    bracket: Bracket
    losses: Mapping[int, float | None]


@dataclass(frozen=True)
class Promote:
    """Run a known configuration at a rung of a bracket. At its start rung this repeats a run that was lost."""

    config: int
    rung: int
    bracket: Bracket | None = field(default=None, compare=False)


@dataclass(frozen=True)
class FreeSlots:
    """Room for `free` new configurations in a bracket."""

    bracket: Bracket
    free: int


def compute_rung_sizes(start: int, top: int, eta: int) -> tuple[int, ...]:
    """Return the number of configurations at the rungs start..top of the bracket that starts at rung `start`.

    This is algorithm 1 of Hyperband (arXiv 1603.06560).
    """
    s = top - start
    # The ceiling is taken in integers, because floor(log(243, 3)) is 4 in floats.
    sizes = [-(-(top + 1) * eta**s // (s + 1))]
    for _ in range(s):
        sizes.append(sizes[-1] // eta)
    return tuple(sizes)


@dataclass(frozen=True)
class _Rung:
    """One rung of a bracket, and what it offers to the next rung.

    Attributes:
        rung: Index of the rung.
        decided: Whether its members are certain. Asynchronous mode does not wait for that.
        members: Its members in the order of start; while it is not decided, all that may still become members.
        ranked: Members that finished and did not diverge, best first. In the efficient variant, those that already have
            a place at the next rung come first.
        places: Places of the next rung that may be taken now.
    """

    rung: int
    decided: bool
    members: list[Entry]
    ranked: list[Entry]
    places: int


def _climb(
    entries: Sequence[Entry], start: int, ladder: Ladder, variant: Variant, is_closed: bool = False
) -> Iterator[_Rung]:
    """Yield the rungs of one bracket from its first one up, decided or not."""
    sizes = compute_rung_sizes(start, ladder.top, ladder.eta)
    members, is_decided = list(entries[: sizes[0]]), True
    for rung, size, next_size in zip(range(start, ladder.top + 1), sizes, (*sizes[1:], 0), strict=True):
        pool = members
        if variant == "preserving":
            numbers = {e.config for e in members}
            pool = [e for e in entries if e.config in numbers or rung in e.losses]
        done = [(loss, e) for e in pool if (loss := e.losses.get(rung)) is not None]
        ranks = [
            (variant == "efficient" and rung + 1 not in e.losses, loss, order)
            for order, (loss, e) in enumerate(done)
            if math.isfinite(loss)
        ]
        ranked = [done[order][1] for _, _, order in sorted(ranks)]
        is_full = rung > start or len(members) == size or is_closed
        is_complete = is_decided and is_full and len(done) == len(pool)
        places = next_size if is_complete else min(next_size, len(done) // ladder.eta)
        yield _Rung(rung, is_decided, members, ranked, places)
        promoted = {e.config for e in ranked[:next_size]}
        members, is_decided = [e for e in pool if e.config in promoted], is_complete


def replay(
    entries: Sequence[Entry], start: int, ladder: Ladder, variant: Variant, is_closed: bool = False
) -> list[list[Entry]]:
    """Return the members of the rungs start, start + 1, ... of one bracket, as far as they are decided.

    Where scores rank the configurations, the members of the last rung that is returned are those that the losses would
    promote; only their number is right.

    Args:
        entries: The configurations of the bracket, in the order in which they were started.
        start: The bracket's first rung, which is returned even while there is room in it.
        ladder: The budgets.
        variant: Which configurations compete.
        is_closed: Whether the space has no more settings for the bracket.

    Returns:
        The members of each rung, in the order of `entries`.
    """
    rungs = _climb(entries, start, ladder, variant, is_closed)
    return [rung.members for rung in takewhile(lambda r: r.decided, rungs)]


def find_standing(
    entries: Iterable[Entry], ladder: Ladder, *, variant: Variant = "discarding", room: FindRoom | None = None
) -> set[tuple[int, int]]:
    """Return the (configuration, rung) pairs that have a result and hold a place in a decided rung."""
    return {
        (entry.config, bracket.start + depth)
        for bracket, inside in _group_by_bracket(entries).items()
        for depth, members in enumerate(replay(inside, bracket.start, ladder, variant, _is_closed(room, bracket)))
        for entry in members
        if entry.losses.get(bracket.start + depth) is not None
    }


def list_moves(
    entries: Iterable[Entry],
    ladder: Ladder,
    *,
    variant: Variant = "discarding",
    sizes: int = 1,
    iterations: int | None = 1,
    asynchronous: bool = False,
    scores: Scores | None = None,
    room: FindRoom | None = None,
) -> list[Promote | FreeSlots]:
    """Return everything that may be run next, the most useful first.

    The order is: promotions before starts (a promotion completes what was already paid for) and certain promotions
    before guesses; among promotions the highest rung first, then the bracket (size, start rung), then the better
    configuration; among starts the cheapest rung first, then the size. An iteration is offered only when the ones
    before it are finished or wait for runs in progress.

    Args:
        entries: All configurations of the search, in the order in which they were started.
        ladder: The budgets.
        variant: Which configurations compete for a place.
        sizes: Number of proxy sizes, each with a Hyperband of its own.
        iterations: How often Hyperband is run; None for no end.
        asynchronous: Also promote before a rung is decided.
        scores: Ranks the configurations instead of the losses of the rung. Called at most once, and only if some rung
            has fewer free places than candidates, for those candidates. The losses rank while it returns None.
        room: How many settings could be started at a size and rung; None if there is no limit.

    Returns:
        The moves; empty if nothing can be run now.

    Raises:
        ValueError: If there are scores and the variant is not the efficient one, or a score is not finite.
    """
    if scores is not None and variant != "efficient":
        raise ValueError(f"scores need the efficient variant, where places taken are kept, got {variant!r}")
    brackets = _group_by_bracket(entries)
    for iteration in count() if iterations is None else range(iterations):
        promotions: list[_Promotion] = []
        starts: list[FreeSlots] = []
        for start in range(ladder.top + 1):
            capacity = compute_rung_sizes(start, ladder.top, ladder.eta)[0]
            for size in range(sizes):
                bracket = Bracket(iteration, size, start)
                inside = brackets.get(bracket, [])
                free = capacity - len(inside) if room is None else min(capacity - len(inside), room(size, start).free)
                if free > 0:
                    starts.append(FreeSlots(bracket, free))
                below: _Rung | None = None
                for rung in _climb(inside, start, ladder, variant, _is_closed(room, bracket)):
                    if not (rung.decided or asynchronous):
                        break
                    # At its start rung a configuration is due only if its run was lost.
                    ranked, places = (rung.members, capacity) if below is None else (below.ranked, below.places)
                    free = sum(rung.rung not in e.losses for e in ranked[:places])
                    if free:
                        rivals = tuple(e.config for e in ranked if rung.rung not in e.losses)
                        promotions.append(_Promotion(not rung.decided, -rung.rung, bracket, free, rivals))
                    below = rung
        if promotions or starts:
            promotions = _rank_by_scores(sorted(promotions), scores)
            return [*(Promote(c, -p.negative_rung, p.bracket) for p in promotions for c in p.rivals[: p.free]), *starts]
        if room is not None and all(bracket.iteration < iteration for bracket in brackets):
            # Another iteration would find no settings either.
            break
    return []


class _Promotion(NamedTuple):
    """Free places at a rung and the configurations that may take them. The fields are ordered as promotions sort.

    Attributes:
        is_guess: Whether the rung below is not decided yet.
        negative_rung: Minus the rung, so that the highest comes first.
        bracket: The bracket.
        free: Number of free places.
        rivals: Candidates for them, best first.
    """

    is_guess: bool
    negative_rung: int
    bracket: Bracket
    free: int
    rivals: tuple[int, ...]


def _rank_by_scores(promotions: list[_Promotion], scores: Scores | None) -> list[_Promotion]:
    """Sort the rivals of contested places by their scores. Ties keep their order."""
    contested = [c for promotion in promotions if promotion.free < len(promotion.rivals) for c in promotion.rivals]
    values = scores(contested) if scores is not None and contested else None
    if values is None:
        return promotions
    score = {c: float(x) for c, x in zip(contested, values, strict=True)}
    if not all(math.isfinite(x) for x in score.values()):
        raise ValueError(f"scores must be finite, got {score}: the model that predicted them is broken")
    return [p._replace(rivals=tuple(sorted(p.rivals, key=lambda c: score.get(c, 0.0)))) for p in promotions]


def count_remaining(
    entries: Iterable[Entry],
    ladder: Ladder,
    *,
    variant: Variant = "discarding",
    sizes: int = 1,
    iterations: int = 1,
    room: FindRoom | None = None,
) -> list[tuple[Bracket, int, int]]:
    """Count the evaluations that are still to be started, by bracket and rung.

    The count is exact for a search that was never raised and is not asynchronous, and for the efficient variant, as
    long as nothing more diverges. Otherwise the other variants may need more: earlier promotions are assumed to hold
    their places, and each one that does not costs one more run. In a space with too few settings the count is an upper
    bound.

    Args:
        entries: All configurations of the search, in the order in which they were started.
        ladder: The budgets.
        variant: Which configurations compete for a place.
        sizes: Number of proxy sizes.
        iterations: How often Hyperband is run.
        room: How many settings could be run at a size and rung; None if there is no limit.

    Returns:
        (bracket, rung, number of evaluations) for each rung with any.
    """
    brackets = _group_by_bracket(entries)
    remaining = []
    # How many settings are left at (size, rung) for what has not been counted yet.
    left: dict[tuple[int, int], int] = {}
    for iteration in range(iterations):
        for start in range(ladder.top + 1):
            for size in range(sizes):
                bracket = Bracket(iteration, size, start)
                inside = brackets.get(bracket, [])
                capacities = compute_rung_sizes(start, ladder.top, ladder.eta)
                decided = replay(inside, start, ladder, variant, _is_closed(room, bracket))
                survivors = 0
                for depth, capacity in enumerate(capacities):
                    rung = start + depth
                    most = sum(room(size, rung)) if room is not None else None
                    if most is not None:
                        most = left.setdefault((size, rung), most)
                    if depth < len(decided):
                        members = decided[depth]
                        free = capacity - len(members) if depth == 0 else 0
                        free = free if most is None else min(free, most)
                        missing = sum(rung not in e.losses for e in members) + free
                        survivors = sum(_may_be_promoted(e.losses.get(rung)) for e in members) + free
                    else:
                        survivors = min(capacity, survivors)
                        missing = max(0, survivors - sum(rung in e.losses for e in inside))
                    if most is not None:
                        missing = min(missing, most)
                        left[size, rung] = most - missing
                    if missing:
                        remaining.append((bracket, rung, missing))
    return remaining


def _group_by_bracket(entries: Iterable[Entry]) -> dict[Bracket, list[Entry]]:
    brackets: dict[Bracket, list[Entry]] = {}
    for entry in entries:
        brackets.setdefault(entry.bracket, []).append(entry)
    return brackets


def _is_closed(room: FindRoom | None, bracket: Bracket) -> bool:
    """Return whether the space has no settings that the bracket could still start with, now or later."""
    return room is not None and not any(room(bracket.size, bracket.start))


def _may_be_promoted(loss: float | None) -> bool:
    return loss is None or math.isfinite(loss)
