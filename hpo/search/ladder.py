"""The ladder of budgets on which configurations are compared."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from fractions import Fraction

# Relative tolerance on the smallest budget, because 27 * 0.1 is not quite 2.7.
TOLERANCE = Fraction(1, 1_000_000)


@dataclass(frozen=True)
class Ladder:
    """The budgets at which configurations are run.

    Attributes:
        levels: Tokens at each rung, cheapest first, each eta times the one below and rounded.
        eta: The reduction factor, at least 2.
        seeds: How many trainings with different random seeds an evaluation consists of, by rung. The last number holds
            for all rungs above.
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
        are_whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in self.seeds)
        if not are_whole or not self.seeds or any(a > b for a, b in zip(self.seeds, self.seeds[1:], strict=False)):
            raise ValueError(
                "seeds are whole numbers of at least 1 that never fall from one rung to the next (a promoted "
                f"configuration keeps its seeds), got {self.seeds}"
            )

    @classmethod
    def make(cls, min_tokens: int, max_tokens: int, eta: int) -> Ladder:
        """Return the ladder with level_k = round(max / eta^(K-k)), k = 0..K.

        K is the largest number for which max / eta^K >= min, within a relative tolerance of 1e-6. Warns when only one
        rung fits: then nothing can be halved, and the search is plain sampling at max_tokens.

        Args:
            min_tokens: Tokens of the smallest run.
            max_tokens: Tokens of the largest run.
            eta: The reduction factor.

        Raises:
            ValueError: If a number is out of range.
        """
        if min_tokens <= 0 or max_tokens <= 0:
            raise ValueError(f"tokens must be positive, got min {min_tokens}, max {max_tokens}")
        if min_tokens > max_tokens:
            raise ValueError(f"tokens are (min, max) with min <= max, got ({min_tokens}, {max_tokens}): swap them")
        # Check eta before it is used.
        cls((1,), eta)
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
        """Return how many trainings an evaluation at a rung consists of."""
        return self.seeds[min(rung, len(self.seeds) - 1)]

    def tokens(self, rung: int, *, resumed: bool = False) -> int:
        """Return how many tokens an evaluation at a rung trains, summed over its seeds.

        Args:
            rung: Index of the rung.
            resumed: The seeds of the rung below continue from their checkpoints and train only the difference. New
                seeds start at zero.
        """
        total = self.seeds_at(rung) * self.levels[rung]
        return total - self.seeds_at(rung - 1) * self.levels[rung - 1] if resumed else total

    def raised(self, max_tokens: int) -> Ladder:
        """Return a ladder with the same rungs and more at the top.

        Args:
            max_tokens: The present maximum times a power of eta. The present maximum itself changes nothing.

        Raises:
            ValueError: If it is any other number. The message names the nearest valid ones.
        """
        levels = list(self.levels)
        while levels[-1] < max_tokens:
            levels.append(levels[-1] * self.eta)
        if levels[-1] != max_tokens:
            was_passed = len(levels) > len(self.levels)
            nearest = levels[-2:] if was_passed else [levels[-1], levels[-1] * self.eta]
            raise ValueError(
                f"the largest budget is {self.levels[-1]} tokens and can only be raised by powers of eta = {self.eta}, "
                f"got {max_tokens}: the nearest values are {nearest[0]} and {nearest[1]}"
            )
        return replace(self, levels=tuple(levels))
