"""Which windows of tokens a run reads, in which order, and which it is measured on: pure functions of a position."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxies.data.token_files import Tokens

Order = Literal["random", "epochs"]

# Windows whose offsets are drawn together.
DRAW_BLOCK = 4096
# Rounds of the Feistel network. After 4 rounds, neighbours stay neighbours 16 to 27 % too often; after 8, no more often
# than by chance.
FEISTEL_ROUNDS = 8


class Windows:
    """Windows of seq_len tokens, each followed by its next token.

    Where window i begins depends only on (seed, i). So the position in the data is one integer, the order does not
    depend on the batch size, on ranks or on workers, and a resumed run reads what an uninterrupted one would have read.

    Args:
        tokens: The tokens to read.
        seq_len: Tokens per window.
        seed: Seed of the order.
        order: "random" draws windows with replacement, anywhere. "epochs" cuts the tokens into adjacent windows, reads
            each once in a shuffled order, then again in another order. Tokens that do not fill a window are left out,
            at an end that changes from pass to pass.
        stream: A number other than 0 gives another order for the same seed (one per source of a mixture).

    Raises:
        ValueError: If there are too few tokens for a window, the seed is negative, or the order is unknown.
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
    def windows_per_epoch(self) -> int:
        """Number of adjacent windows."""
        return (len(self.tokens) - 1) // self.seq_len

    def offsets(self, start: int, n: int) -> NDArray[np.int64]:
        """Return where windows start, ..., start + n - 1 begin, int64 [n]."""
        if n == 0:
            return np.empty(0, np.int64)
        blocks = range(start // DRAW_BLOCK, (start + n - 1) // DRAW_BLOCK + 1)
        self._draws = {block: self._draws[block] if block in self._draws else self._draw(block) for block in blocks}
        drawn = np.concatenate([self._draws[block] for block in blocks])
        first = start - blocks.start * DRAW_BLOCK
        return drawn[first : first + n]

    def read(self, start: int, n: int) -> NDArray[np.int64]:
        """Return windows start, ..., start + n - 1 and their next tokens, int64 [n, seq_len + 1]."""
        return cut_windows(self.tokens, self.offsets(start, n), self.seq_len)

    def batch(self, start: int, n: int, *, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """Return a batch of windows, or one rank's part of it.

        Args:
            start: Number of the first window.
            n: Number of windows.
            rank: Rank whose part is read, see `assign_windows`.
            ranks: Number of ranks.

        Returns:
            Inputs and next tokens, int64 [n, seq_len] each.
        """
        return split_targets(self.read(*assign_windows(start, n, rank, ranks)))

    def _draw(self, block: int) -> NDArray[np.int64]:
        if self.order == "epochs":
            return self._compute_epoch_offsets(block * DRAW_BLOCK, DRAW_BLOCK)
        # A trailing 0 leaves the seed as if it were not there.
        generator = np.random.default_rng([self.seed, block, self.stream])
        return generator.integers(0, len(self.tokens) - self.seq_len, size=DRAW_BLOCK)

    def _compute_epoch_offsets(self, start: int, n: int) -> NDArray[np.int64]:
        size, left_out = self.windows_per_epoch, (len(self.tokens) - 1) % self.seq_len
        index = np.arange(start, start + n)
        offsets = np.empty(n, np.int64)
        for epoch in range(start // size, (start + n - 1) // size + 1):
            keys = np.random.SeedSequence([self.seed, epoch, self.stream, 1]).generate_state(
                FEISTEL_ROUNDS + 1, np.uint64
            )
            in_epoch = index // size == epoch
            places = shuffle_indices(index[in_epoch] % size, size, keys[1:])
            offsets[in_epoch] = places * self.seq_len + int(keys[0]) % (left_out + 1)
        return offsets


def shuffle_indices(index: NDArray[np.int64], size: int, keys: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int64]:
    """Return where indices go in a shuffle of range(size), without computing the whole shuffle.

    A Feistel network permutes the next power of four. An index that leaves [0, size) is permuted again until it is
    back inside.

    Args:
        index: Indices below `size`.
        size: Number of elements of the shuffle.
        keys: One key per round.

    Returns:
        Places in the shuffle, int64, of the shape of `index`.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    place = index.astype(np.uint64)
    outside = np.arange(len(place))
    while len(outside):
        left, right = place[outside] >> shift, place[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix_bits(right ^ key) & mask)
        place[outside] = (left << shift) | right
        outside = outside[place[outside] >= size]
    return place.astype(np.int64)


def _mix_bits(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of x affects every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def assign_windows(start: int, n: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the windows of a batch that a rank reads.

    The parts of all ranks, in order, are the batch. They differ by one window at most. With n < ranks some are empty,
    and a mean over ranks must weight each by its windows.

    Args:
        start: First window of the batch.
        n: Windows in the batch.
        rank: The rank.
        ranks: Number of ranks.

    Returns:
        The first window of the part and its number of windows.

    Raises:
        ValueError: If there is no such batch or rank.
    """
    if start < 0 or n < 1:
        raise ValueError(f"needed start >= 0 and n >= 1, got start = {start}, n = {n}")
    if not 0 <= rank < ranks:
        raise ValueError(f"needed 0 <= rank < ranks, got rank = {rank}, ranks = {ranks}")
    first, end = n * rank // ranks, n * (rank + 1) // ranks
    return start + first, end - first


def cut_held_out(tokens: Tokens, seq_len: int, n: int) -> tuple[Tensor, Tensor]:
    """Return windows evenly spaced over the validation tokens, whatever the seed or the batch.

    They overlap if there are fewer than n * seq_len tokens.

    Args:
        tokens: Validation tokens.
        seq_len: Tokens per window.
        n: Number of windows.

    Returns:
        Inputs and next tokens, int64 [n, seq_len] each.

    Raises:
        ValueError: If there are too few tokens for a window.
    """
    if len(tokens) <= seq_len:
        raise ValueError(
            f"needed more than seq_len = {seq_len} validation tokens, got {len(tokens)}: use a larger corpus"
        )
    last = len(tokens) - seq_len - 1
    return split_targets(cut_windows(tokens, np.arange(n, dtype=np.int64) * last // max(n - 1, 1), seq_len))


def cut_windows(tokens: Tokens, offsets: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Return windows of seq_len + 1 tokens at these offsets, int64 [n, seq_len + 1]."""
    windows: NDArray[np.int64] = tokens[offsets[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    return windows


def split_targets(windows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return inputs and next tokens of windows, two views of int64 [n, seq_len]."""
    tokens = torch.from_numpy(windows)
    return tokens[:, :-1], tokens[:, 1:]
