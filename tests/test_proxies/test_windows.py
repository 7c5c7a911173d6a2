"""Which windows are read and in which order: by rank and by pass, independent of the batch size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proxies.data.windows import DRAW_BLOCK, FEISTEL_ROUNDS, Windows, assign_windows, shuffle_indices

TOKENS = np.arange(60_001, dtype=np.uint16)


def keys(seed: int) -> NDArray[np.unsignedinteger[Any]]:
    return np.random.SeedSequence([seed]).generate_state(FEISTEL_ROUNDS, np.uint64)


@pytest.mark.parametrize("order", ["random", "epochs"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_parts_of_all_ranks_in_order_are_the_batch_of_one(order: str, ranks: int) -> None:
    windows = Windows(TOKENS, 16, seed=3, order=order)  # type: ignore[arg-type]
    for start, n in ((0, 16), (DRAW_BLOCK - 3, 10), (5, 3)):
        x, y = windows.batch(start, n)
        parts = [windows.batch(start, n, rank=r, ranks=ranks) for r in range(ranks)]
        assert torch.equal(torch.cat([p[0] for p in parts]), x)
        assert torch.equal(torch.cat([p[1] for p in parts]), y)
        lengths = [len(p[0]) for p in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_out_of_range_is_refused(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="0 <= rank < ranks"):
        assign_windows(0, 4, rank, ranks)


def test_an_empty_batch_or_a_negative_position_is_refused() -> None:
    for start, n in ((-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="start >= 0 and n >= 1"):
            Windows(TOKENS, 16, 0).batch(start, n)


@pytest.mark.parametrize("order", ["random", "epochs"])
def test_the_order_does_not_depend_on_who_reads_or_when(order: str) -> None:
    whole, _ = Windows(TOKENS, 16, seed=1, order=order).batch(0, 2 * DRAW_BLOCK)  # type: ignore[arg-type]
    starts = np.random.default_rng(0).permutation(range(0, 2 * DRAW_BLOCK, 64))

    # Every call makes a new reader, as a new worker would.
    def read(start: int) -> torch.Tensor:
        return Windows(TOKENS, 16, seed=1, order=order).batch(int(start), 64)[0]  # type: ignore[arg-type]

    with ThreadPoolExecutor(3) as pool:
        parts = dict(zip(starts.tolist(), pool.map(read, starts), strict=True))
    assert torch.equal(torch.cat([parts[s] for s in sorted(parts)]), whole)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_a_shuffle_is_a_permutation(size: int) -> None:
    place = shuffle_indices(np.arange(size), size, keys(0))
    assert sorted(place.tolist()) == list(range(size))


def test_a_shuffle_has_the_moments_of_a_random_permutation() -> None:
    """Over many keys every place is equally likely, and neighbours are separated."""
    size, draws = 12, 3000
    places = np.stack([shuffle_indices(np.arange(size), size, keys(seed)) for seed in range(draws)])
    expected = draws / size
    for k in range(size):
        counts = np.bincount(places[:, k], minlength=size)
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        assert chi2 < 40, "11 degrees of freedom: beyond 40 once in 30,000"
    are_neighbours = np.abs(np.diff(places, axis=1)) == 1
    # 2 (n - 1) of the n (n - 1) ordered pairs are neighbours.
    assert are_neighbours.mean() == pytest.approx(2 / size, rel=0.05)


def test_a_pass_reads_every_window_once_and_the_next_in_another_order() -> None:
    windows = Windows(TOKENS[:1000], 16, seed=0, order="epochs")
    size = windows.windows_per_epoch
    assert size == 62
    passes = [windows.offsets(k * size, size) for k in range(4)]
    for offsets in passes:
        assert sorted((offsets - offsets.min()).tolist()) == list(range(0, size * 16, 16))
        assert offsets.min() >= 0
        assert offsets.max() + 16 <= 999
    assert len({tuple(p) for p in passes}) == 4
    assert len({int(p.min()) for p in passes}) > 1, "what is left out changes"


def test_a_batch_across_two_passes_is_the_end_of_one_and_the_beginning_of_the_next() -> None:
    windows = Windows(TOKENS[:1000], 16, seed=0, order="epochs")
    whole = windows.offsets(0, 200)
    np.testing.assert_array_equal(windows.offsets(50, 100), whole[50:150])


def test_passes_differ_by_seed_and_by_stream() -> None:
    orders = [
        Windows(TOKENS, 16, seed, order="epochs", stream=stream).offsets(0, 50).tolist()
        for seed, stream in ((0, 0), (1, 0), (0, 1))
    ]
    draws = [
        Windows(TOKENS, 16, seed, stream=stream).offsets(0, 50).tolist() for seed, stream in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(o) for o in orders + draws}) == 6


def test_the_draws_are_those_of_earlier_versions() -> None:
    """With another order, old checkpoints would resume with other data. The values predate streams."""
    expected = np.random.default_rng([7, 1]).integers(0, len(TOKENS) - 16, size=DRAW_BLOCK)[:20]
    np.testing.assert_array_equal(Windows(TOKENS, 16, 7).offsets(DRAW_BLOCK, 20), expected)


def test_a_corpus_of_one_window_has_one_per_pass() -> None:
    windows = Windows(TOKENS[:17], 16, 0, order="epochs")
    assert windows.offsets(0, 5).tolist() == [0] * 5


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="'random' or 'epochs', got 'sorted'"):
        Windows(TOKENS, 16, 0, order="sorted")  # type: ignore[arg-type]
