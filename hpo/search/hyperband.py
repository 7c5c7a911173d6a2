"""Incremental Hyperband: what may run next, from what was run. Nothing here remembers anything.

Iterative Deepening Hyperband (Brandt, Wever, Bengs, Hüllermeier 2023, arXiv 2302.00511) on top of Hyperband (Li et al.
2018, arXiv 1603.06560): the largest budget R of a Hyperband may be raised to eta R, again and again, and no run is
repeated.

A ladder has rungs 0 (cheapest) to K (R tokens). The bracket that starts at rung k holds ceil((K+1)/(s+1) eta^s)
configurations, s = K - k, and every rung above keeps floor(n / eta) of the n below it. After a raise each bracket keeps
its start rung, has one more rung above and room for more configurations, and a new bracket starts at eta R. All rungs
are then played again over old and new configurations together, and what already has a value is not run. The variants
differ in who competes for the k places of the next rung:

- discarding: the members of this rung, as if all had been started today. A configuration that was promoted under a
  smaller R and no longer qualifies is dropped (its results stay in the record). Who is promoted is exactly what a run
  from scratch promotes.
- preserving: in addition every configuration that was ever run at this rung.
- efficient: who was already run at the next rung keeps the place, the free places go to the best others. Costs exactly
  as many evaluations as one Hyperband with the raised R.

A rung is decided when all who compete in it have finished, so neither the order of completion nor the number of workers
changes the outcome. Ties go to the configuration that was started first. A diverged configuration (loss not finite) is
never promoted: its rung is then smaller, and empty when all diverged.

Asynchronously, nobody waits for that: of d finished ones, the best floor(d / eta) are promoted at once, as in ASHA (Li
et al. 2020, arXiv 1810.05934), as long as they may still be among the k. Such a promotion is a guess. When the rung is
decided its variant's rule holds as ever: discarding drops the wrong guesses, preserving lets them compete further up,
efficient lets them keep the place, and never gives more than k. The gain is small, because workers that wait for a rung
start configurations of other brackets meanwhile: in simulation (discarding, 3 to 5 rungs, 8 to 32 workers, durations
that differ tenfold) the top of the first bracket is decided 2 to 8 % sooner, for 4 to 7 % more evaluations, and the
whole takes from 1 % less to 10 % more time.

Ranks may also come from scores, a prediction of the loss at the target, instead of the losses of the rung. Scores
change as results come in, so this is for the efficient variant, in which a place once taken is kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count, takewhile
from typing import Literal, NamedTuple, get_args

Variant = Literal["discarding", "preserving", "efficient"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
# Numbers of configurations -> a score of each, lower is better; None: not known.
Scores = Callable[[Sequence[int]], Sequence[float] | None]
TOLERANCE = Fraction(1, 1_000_000)  # relative, on the smallest budget: 27 * 0.1 is not quite 2.7


@dataclass(frozen=True)
class Ladder:
    """The budgets that configurations are run at, in tokens, cheapest first; each eta times the one below, rounded.

    seeds: how many trainings with different random seeds an evaluation is, by rung; the last number is for all above.
    """

    levels: tuple[int, ...]
    eta: int
    seeds: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if isinstance(self.eta, bool) or not isinstance(self.eta, int) or self.eta < 2:
            raise ValueError(f"eta must be an integer of at least 2, got {self.eta!r}: 3 is a good default")
        if not self.levels or any(level < 1 for level in self.levels):
            raise ValueError(f"a ladder needs at least one level, all positive, got {self.levels}")
        if any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"the levels of a ladder must rise, got {self.levels}")
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in self.seeds)
        if not whole or not self.seeds or any(a > b for a, b in zip(self.seeds, self.seeds[1:], strict=False)):
            raise ValueError(
                "seeds are whole numbers of at least 1 that never fall from a rung to the next (who is promoted keeps "
                f"the seeds it has), got {self.seeds}"
            )

    @classmethod
    def make(cls, min_tokens: int, max_tokens: int, eta: int) -> Ladder:
        """level_k = round(max / eta^(K-k)), k = 0..K, with the largest K for which max / eta^K >= min (within 1e-6).

        Warns when only one rung fits: there is nothing to halve then, and the search is plain sampling at max_tokens.
        """
        if min_tokens <= 0 or max_tokens <= 0:
            raise ValueError(f"tokens must be positive, got min {min_tokens}, max {max_tokens}")
        if min_tokens > max_tokens:
            raise ValueError(f"tokens are (min, max) with min <= max, got ({min_tokens}, {max_tokens}): swap them")
        cls((1,), eta)  # checks eta before it is used
        top = 0
        while max_tokens >= min_tokens * eta ** (top + 1) * (1 - TOLERANCE):
            top += 1
        if top == 0:
            warnings.warn(
                f"one rung only: {max_tokens} tokens is less than eta = {eta} times {min_tokens}, so every "
                "configuration is run in full; lower the smallest budget to let Hyperband stop the bad ones early",
                UserWarning,
                stacklevel=2,
            )
        return cls(tuple(round(Fraction(max_tokens, eta ** (top - k))) for k in range(top + 1)), eta)

    @property
    def top(self) -> int:
        """K, the index of the highest rung."""
        return len(self.levels) - 1

    def seeds_at(self, rung: int) -> int:
        """How many trainings an evaluation at a rung is."""
        return self.seeds[min(rung, len(self.seeds) - 1)]

    def tokens(self, rung: int, *, resumed: bool = False) -> int:
        """What an evaluation at a rung trains, all its seeds together.

        resumed: the seeds that the rung below has go on from there, and pay the difference; new ones start at zero.
        """
        whole = self.seeds_at(rung) * self.levels[rung]
        return whole - self.seeds_at(rung - 1) * self.levels[rung - 1] if resumed else whole

    def raised(self, max_tokens: int) -> Ladder:
        """The same rungs with more on top. max_tokens: the present maximum times a power of eta (itself: no change)."""
        levels = list(self.levels)
        while levels[-1] < max_tokens:
            levels.append(levels[-1] * self.eta)
        if levels[-1] != max_tokens:
            passed = len(levels) > len(self.levels)
            near = levels[-2:] if passed else [levels[-1], levels[-1] * self.eta]
            raise ValueError(
                f"the largest budget is {self.levels[-1]} tokens and can only be raised by powers of eta = {self.eta}, "
                f"got {max_tokens}: the nearest values are {near[0]} and {near[1]}"
            )
        return replace(self, levels=tuple(levels))


class Bracket(NamedTuple):
    """Whose ranks are compared: one bracket of one Hyperband run over one proxy size."""

    iteration: int  # 0, 1, ...: Hyperband as a whole, repeated with new configurations
    size: int  # index of the proxy size; sizes never compete
    start: int  # the rung where its configurations start, counted from the bottom, so that a raise does not change it


class Entry(NamedTuple):
    """One configuration and what is known of it."""

    config: int
    bracket: Bracket
    losses: Mapping[int, float | None]  # by rung; None while it runs, not finite when it diverged, absent: never run


@dataclass(frozen=True)
class Promote:
    """Run a known configuration at this rung. (At its start rung only if that run was lost and must be repeated.)"""

    config: int
    rung: int


@dataclass(frozen=True)
class FreeSlots:
    """Room for `free` new configurations in a bracket."""

    bracket: Bracket
    free: int


def rung_sizes(start: int, top: int, eta: int) -> tuple[int, ...]:
    """Configurations at rungs start..top of the bracket that starts at rung `start` (Hyperband, algorithm 1)."""
    s = top - start
    sizes = [-(-(top + 1) * eta**s // (s + 1))]  # the ceiling, in integers: floor(log(243, 3)) is 4 in floats
    for _ in range(s):
        sizes.append(sizes[-1] // eta)
    return tuple(sizes)


@dataclass(frozen=True)
class _Rung:
    """One rung of a bracket, and what it offers to the next."""

    rung: int
    decided: bool  # whether its members are certain; nobody waits for that in asynchronous mode
    members: list[Entry]  # in the order of start; all who may still be some, while it is not decided
    ranked: list[Entry]  # finished and not diverged, best first; efficient: after those who have a place already
    places: int  # of the next rung that may be taken now


def _climb(entries: Sequence[Entry], start: int, ladder: Ladder, variant: Variant) -> Iterator[_Rung]:
    """The rungs of one bracket from its first up, decided or not."""
    sizes = rung_sizes(start, ladder.top, ladder.eta)
    members, decided = list(entries[: sizes[0]]), True
    for rung, size, above in zip(range(start, ladder.top + 1), sizes, (*sizes[1:], 0), strict=True):
        pool = members
        if variant == "preserving":
            inside = {e.config for e in members}
            pool = [e for e in entries if e.config in inside or rung in e.losses]
        done = [(loss, e) for e in pool if (loss := e.losses.get(rung)) is not None]
        ranks = [
            (variant == "efficient" and rung + 1 not in e.losses, loss, order)
            for order, (loss, e) in enumerate(done)
            if math.isfinite(loss)
        ]
        ranked = [done[order][1] for _, _, order in sorted(ranks)]
        full = rung > start or len(members) == size
        complete = decided and full and len(done) == len(pool)
        yield _Rung(rung, decided, members, ranked, above if complete else min(above, len(done) // ladder.eta))
        rising = {e.config for e in ranked[:above]}
        members, decided = [e for e in pool if e.config in rising], complete


def replay(entries: Sequence[Entry], start: int, ladder: Ladder, variant: Variant) -> list[list[Entry]]:
    """The members of the rungs start, start + 1, ... of one bracket, as far as they are decided.

    entries: those of one bracket, in the order they were started; the result keeps that order. The first rung is
    returned even while there is room in it. Where scores choose, the open places of the last rung that is returned
    are shown as the losses would give them; their number is right.
    """
    return [rung.members for rung in takewhile(lambda r: r.decided, _climb(entries, start, ladder, variant))]


def standing(entries: Iterable[Entry], ladder: Ladder, *, variant: Variant = "discarding") -> set[tuple[int, int]]:
    """The (configuration, rung) pairs that have a result and hold a place in a rung that is decided."""
    return {
        (entry.config, bracket.start + depth)
        for bracket, inside in _by_bracket(entries).items()
        for depth, members in enumerate(replay(inside, bracket.start, ladder, variant))
        for entry in members
        if entry.losses.get(bracket.start + depth) is not None
    }


def moves(
    entries: Iterable[Entry],
    ladder: Ladder,
    *,
    variant: Variant = "discarding",
    sizes: int = 1,
    iterations: int | None = 1,
    asynchronous: bool = False,
    scores: Scores | None = None,
) -> list[Promote | FreeSlots]:
    """All that may be run next, most useful first; empty when nothing can.

    entries: every configuration of the search, in the order of start. sizes: number of proxy sizes, each with a
    Hyperband of its own. iterations: how often Hyperband is run; None: without end. asynchronous: promote before a rung
    is decided, too. scores: who is promoted, instead of the losses of the rung; only with the efficient variant, else
    ValueError. Asked once at most, and only when some rung has fewer free places than candidates, for those
    candidates; the losses rank while it answers None.

    Order: promotions before starts (a promotion finishes what was paid for), certain ones before guesses; among
    promotions the highest rung first, then the bracket (size, start rung), then the better one; among starts the
    cheapest rung first, then the size. An iteration is offered only when the ones before it are finished or wait for
    runs in progress.
    """
    if scores is not None and variant != "efficient":
        raise ValueError(f"scores need the efficient variant, where places taken are kept, got {variant!r}")
    brackets = _by_bracket(entries)
    for iteration in count() if iterations is None else range(iterations):
        promotions: list[_Rise] = []
        starts: list[FreeSlots] = []
        for start in range(ladder.top + 1):
            capacity = rung_sizes(start, ladder.top, ladder.eta)[0]
            for size in range(sizes):
                bracket = Bracket(iteration, size, start)
                inside = brackets.get(bracket, [])
                if len(inside) < capacity:
                    starts.append(FreeSlots(bracket, capacity - len(inside)))
                below: _Rung | None = None
                for here in _climb(inside, start, ladder, variant):
                    if not (here.decided or asynchronous):
                        break
                    # at its start rung a configuration is due only when its run was lost
                    ranked, places = (here.members, capacity) if below is None else (below.ranked, below.places)
                    free = sum(here.rung not in e.losses for e in ranked[:places])
                    if free:
                        rivals = tuple(e.config for e in ranked if here.rung not in e.losses)
                        promotions.append(_Rise(not here.decided, -here.rung, bracket, free, rivals))
                    below = here
        if promotions or starts:
            promotions = _scored(sorted(promotions), scores)
            return [*(Promote(c, -rise.down) for rise in promotions for c in rise.rivals[: rise.free]), *starts]
    return []


class _Rise(NamedTuple):
    """Free places at a rung and who may take them, in the order of use."""

    guess: bool
    down: int  # minus the rung: the highest comes first
    bracket: Bracket
    free: int
    rivals: tuple[int, ...]  # configurations, best first


def _scored(promotions: list[_Rise], scores: Scores | None) -> list[_Rise]:
    """The rivals of contested places in the order of their scores; ties in the order they had."""
    contested = [c for rise in promotions if rise.free < len(rise.rivals) for c in rise.rivals]
    given = scores(contested) if scores is not None and contested else None
    if given is None:
        return promotions
    score = {c: float(x) for c, x in zip(contested, given, strict=True)}
    if not all(math.isfinite(x) for x in score.values()):
        raise ValueError(f"scores must be finite, got {score}: the model that predicted them is broken")
    return [rise._replace(rivals=tuple(sorted(rise.rivals, key=lambda c: score.get(c, 0.0)))) for rise in promotions]


def remaining(
    entries: Iterable[Entry], ladder: Ladder, *, variant: Variant = "discarding", sizes: int = 1, iterations: int = 1
) -> list[tuple[Bracket, int, int]]:
    """(bracket, rung, evaluations still to be started there), where there are any.

    Exact for a search that was never raised and does not run asynchronously, and for the efficient variant, as long as
    nothing more diverges. Otherwise the other variants may need more: it is assumed that earlier promotions hold their
    places, and one more run is due for each that does not.
    """
    brackets = _by_bracket(entries)
    left = []
    for iteration in range(iterations):
        for start in range(ladder.top + 1):
            for size in range(sizes):
                bracket = Bracket(iteration, size, start)
                inside = brackets.get(bracket, [])
                capacities = rung_sizes(start, ladder.top, ladder.eta)
                decided = replay(inside, start, ladder, variant)
                survivors = 0
                for depth, capacity in enumerate(capacities):
                    rung = start + depth
                    if depth < len(decided):
                        members = decided[depth]
                        room = capacity - len(members) if depth == 0 else 0
                        missing = sum(rung not in e.losses for e in members) + room
                        survivors = sum(_may_rise(e.losses.get(rung)) for e in members) + room
                    else:
                        survivors = min(capacity, survivors)
                        missing = max(0, survivors - sum(rung in e.losses for e in inside))
                    if missing:
                        left.append((bracket, rung, missing))
    return left


def _by_bracket(entries: Iterable[Entry]) -> dict[Bracket, list[Entry]]:
    brackets: dict[Bracket, list[Entry]] = {}
    for entry in entries:
        brackets.setdefault(entry.bracket, []).append(entry)
    return brackets


def _may_rise(loss: float | None) -> bool:
    return loss is None or math.isfinite(loss)
