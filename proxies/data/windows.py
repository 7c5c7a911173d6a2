"""Which windows of tokens a run reads, in which order, and which ones it is measured on: pure functions of a position."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxies.data.token_files import Tokens

Order = Literal["random", "epochs"]

DRAW = 4096  # windows whose offsets are drawn together
ROUNDS = 8  # of the Feistel network; after 4 neighbours stay neighbours 16 to 27 % too often, after 8 by chance only


class Windows:
    """Windows of seq_len tokens, each followed by its next token.

    Where window i begins depends on (seed, i) alone. So the position in the data is one integer, the order does not
    depend on the batch size, on ranks or on workers, and a resumed run reads what an uninterrupted one would have read.

    order: "random" draws windows with replacement, anywhere. "epochs" cuts the tokens into windows side by side, reads each
        of them once in a shuffled order, then again in another one; what is left of a window is left out, at an end that
        changes from pass to pass.
    stream: nonzero for another order on the same seed (one per source of a mixture).
    """

    def __init__(self, tokens: Tokens, seq_len: int, seed: int, *, order: Order = "random", stream: int = 0) -> None:
        if len(tokens) <= seq_len:
            raise ValueError(f"needed more than seq_len = {seq_len} tokens, got {len(tokens)}: use a larger corpus")
        if seed < 0:
            raise ValueError(f"needed a seed >= 0, got {seed}: numpy seeds are not negative")
        if order not in ("random", "epochs"):
            raise ValueError(f"needed order = 'random' or 'epochs', got {order!r}")
        self.tokens, self.seq_len, self.seed, self.order, self.stream = tokens, seq_len, seed, order, stream
        self._draws: dict[int, NDArray[np.int64]] = {}

    @property
    def per_pass(self) -> int:
        """Windows side by side."""
        return (len(self.tokens) - 1) // self.seq_len

    def offsets(self, start: int, n: int) -> NDArray[np.int64]:
        """Where windows start, ..., start + n - 1 begin, int64 [n]."""
        if n == 0:
            return np.empty(0, np.int64)
        blocks = range(start // DRAW, (start + n - 1) // DRAW + 1)
        self._draws = {block: self._draws[block] if block in self._draws else self._draw(block) for block in blocks}
        drawn = np.concatenate([self._draws[block] for block in blocks])
        first = start - blocks.start * DRAW
        return drawn[first : first + n]

    def read(self, start: int, n: int) -> NDArray[np.int64]:
        """Windows start, ..., start + n - 1 and their next tokens, int64 [n, seq_len + 1]."""
        return cut(self.tokens, self.offsets(start, n), self.seq_len)

    def batch(self, start: int, n: int, *, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """Windows start, ..., start + n - 1: inputs and next tokens, int64 [n, seq_len] each.

        With ranks > 1 only this rank's part of them, see `share`.
        """
        return pairs(self.read(*share(start, n, rank, ranks)))

    def _draw(self, block: int) -> NDArray[np.int64]:
        if self.order == "epochs":
            return self._pass(block * DRAW, DRAW)
        generator = np.random.default_rng([self.seed, block, self.stream])  # a last 0 is as if it were not there
        return generator.integers(0, len(self.tokens) - self.seq_len, size=DRAW)

    def _pass(self, start: int, n: int) -> NDArray[np.int64]:
        size, left = self.per_pass, (len(self.tokens) - 1) % self.seq_len
        index = np.arange(start, start + n)
        offsets = np.empty(n, np.int64)
        for epoch in range(start // size, (start + n - 1) // size + 1):
            keys = np.random.SeedSequence([self.seed, epoch, self.stream, 1]).generate_state(ROUNDS + 1, np.uint64)
            inside = index // size == epoch
            offsets[inside] = shuffled(index[inside] % size, size, keys[1:]) * self.seq_len + int(keys[0]) % (left + 1)
        return offsets


def shuffled(index: NDArray[np.int64], size: int, keys: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int64]:
    """Where each index below `size` goes in a shuffle of all of them that is never written out, int64, shape as given.

    A Feistel network permutes the next power of four; an index that leaves [0, size) walks on until it is back inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    place = index.astype(np.uint64)
    walking = np.arange(len(place))
    while len(walking):
        left, right = place[walking] >> shift, place[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        place[walking] = (left << shift) | right
        walking = walking[place[walking] >= size]
    return place.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def share(start: int, n: int, rank: int, ranks: int) -> tuple[int, int]:
    """First window and number of windows of a rank's part of the batch start, ..., start + n - 1.

    The parts in order of rank are the batch. They differ by one window at most; with n < ranks some are empty, and a mean
    over ranks must weigh each by its windows. ValueError for a batch or a rank that there is not.
    """
    if start < 0 or n < 1:
        raise ValueError(f"needed start >= 0 and n >= 1, got start = {start}, n = {n}")
    if not 0 <= rank < ranks:
        raise ValueError(f"needed 0 <= rank < ranks, got rank = {rank}, ranks = {ranks}")
    first, end = n * rank // ranks, n * (rank + 1) // ranks
    return start + first, end - first


def held_out(tokens: Tokens, seq_len: int, n: int) -> tuple[Tensor, Tensor]:
    """n windows evenly spaced over the validation tokens: inputs and next tokens, int64 [n, seq_len] each.

    Always the same ones, whatever the seed or the batch. They overlap if there are fewer than n * seq_len tokens.
    """
    if len(tokens) <= seq_len:
        raise ValueError(
            f"needed more than seq_len = {seq_len} validation tokens, got {len(tokens)}: use a larger corpus"
        )
    last = len(tokens) - seq_len - 1
    return pairs(cut(tokens, np.arange(n, dtype=np.int64) * last // max(n - 1, 1), seq_len))


def cut(tokens: Tokens, offsets: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Windows of seq_len + 1 tokens at these offsets, int64 [n, seq_len + 1]."""
    windows: NDArray[np.int64] = tokens[offsets[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    return windows


def pairs(windows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Inputs and next tokens, two views of int64 [n, seq_len]."""
    both = torch.from_numpy(windows)
    return both[:, :-1], both[:, 1:]
