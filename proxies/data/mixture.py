"""The data of a run: one corpus, or several corpora read in given shares and measured in fixed ones.

The source of window i depends only on (i, shares); which of that source's windows it is depends only on (seed, source,
number of its windows before). So runs with different shares read the windows of a source in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proxies.config.mixture_weights import MIX_PREFIX, allot_windows
from proxies.config.proxy import ProxyConfig
from proxies.data.corpora import Corpus, load_corpora
from proxies.data.windows import Windows, assign_windows, cut_held_out, split_targets

# Shares are rounded to multiples of 2^-SHARE_BITS.
SHARE_BITS = 30
# Windows; beyond this position, products with a share would not fit into int64.
MAX_POSITION = 1 << (62 - SHARE_BITS)


class MixedWindows:
    """Windows of several sources, interleaved so that every prefix contains each source in its share.

    The sources are halved, in the given order, until one is left. Of i windows that go to a pair of halves, the first
    half gets round(share * i). So no source is ever further from its share than half a window per halving: 1/2 for two
    sources, 1 for up to four.

    Args:
        parts: The windows of each source.
        shares: The share of each source; they sum to 1.

    Raises:
        ValueError: If there are no sources, or not one share per source.
    """

    def __init__(self, parts: Sequence[Windows], shares: Sequence[float]) -> None:
        if len(parts) != len(shares) or not parts:
            raise ValueError(f"needed one share for each source, got {len(parts)} sources and {len(shares)} shares")
        self.parts, self.shares = tuple(parts), tuple(shares)

    def read(self, start: int, n: int) -> NDArray[np.int64]:
        """Return windows start, ..., start + n - 1 and their next tokens, int64 [n, seq_len + 1]."""
        if start + n > MAX_POSITION:
            raise ValueError(f"needed a position up to {MAX_POSITION:,} windows, got {start + n:,}")
        counts = count_by_source(np.arange(start, start + n + 1), self.shares)
        source = np.diff(counts, axis=0).argmax(axis=1)
        windows = np.empty((n, self.parts[0].seq_len + 1), np.int64)
        for k, part in enumerate(self.parts):
            windows[source == k] = part.read(int(counts[0, k]), int(counts[-1, k] - counts[0, k]))
        return windows

    def batch(self, start: int, n: int, *, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """Return windows start, ..., start + n - 1 as inputs and next tokens. See `Windows.batch`."""
        return split_targets(self.read(*assign_windows(start, n, rank, ranks)))


def count_by_source(i: NDArray[np.int64], shares: Sequence[float]) -> NDArray[np.int64]:
    """Return how many of the first i windows come from each source.

    Args:
        i: Positions.
        shares: The share of each source.

    Returns:
        Counts, int64 [len(i), sources].
    """
    if len(shares) == 1:
        return i[:, None]
    middle = len(shares) // 2
    total = sum(shares)
    # Integers, since floating-point rounding could leave a window without a source.
    unit = round(sum(shares[:middle]) / total * (1 << SHARE_BITS)) if total else 0
    first = (i * unit + (1 << (SHARE_BITS - 1))) >> SHARE_BITS
    return np.concatenate(
        [count_by_source(first, shares[:middle]), count_by_source(i - first, shares[middle:])], axis=1
    )


WindowReader = Windows | MixedWindows


@dataclass(frozen=True, eq=False)
class RunData:
    """What a run reads and what it is measured on.

    Attributes:
        windows: The training windows.
        held_out: Inputs and next tokens of the held-out windows of all sources, one source after the other.
        held_out_by_source: The same windows by source; empty for a single corpus without a name.
        sha256: Hash of the data.
        corpora: The corpora by name; a single corpus without a name is called "".
    """

    windows: WindowReader
    held_out: tuple[Tensor, Tensor]
    held_out_by_source: Mapping[str, tuple[Tensor, Tensor]]
    sha256: str
    corpora: Mapping[str, Corpus]


def open_data(config: ProxyConfig) -> RunData:
    """Open the data of a run.

    The held-out windows do not depend on the training shares, so losses of different mixtures can be compared. A mean
    over them weights the sources by `eval_mixture`, up to the rounding to whole windows.

    Args:
        config: The proxy.

    Returns:
        The data.

    Raises:
        ValueError: If the data cannot be read.
    """
    corpora = load_run_corpora(config)
    # Equal records may list the sources in another order, and must read the same.
    names = sorted(config.mixture)

    def make_windows(name: str) -> Windows:
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) + 1 if names else 0
        return Windows(corpora[name].train, config.seq_len, config.seed, order=config.order, stream=stream)

    if not names:
        (corpus,) = corpora.values()
        held_out = cut_held_out(corpus.val, config.seq_len, config.eval_windows)
        return RunData(make_windows(""), held_out, {}, corpus.sha256, corpora)
    by_source = {
        name: cut_held_out(corpora[name].val, config.seq_len, n) for name, n in allot_eval_windows(config).items() if n
    }
    held_out = torch.cat([x for x, _ in by_source.values()]), torch.cat([y for _, y in by_source.values()])
    mixed = MixedWindows([make_windows(name) for name in names], [config.mixture[name] for name in names])
    return RunData(mixed, held_out, by_source, _compute_sha256(corpora), corpora)


def allot_eval_windows(config: ProxyConfig) -> dict[str, int]:
    """Return the number of held-out windows of each source; a single corpus without a name is called ""."""
    if not config.eval_mixture:
        return {"": config.eval_windows}
    names = sorted(config.eval_mixture)
    counts = allot_windows(config.eval_windows, [config.eval_mixture[name] for name in names])
    return dict(zip(names, counts, strict=True))


def load_run_corpora(config: ProxyConfig) -> dict[str, Corpus]:
    """Return the corpora of a run by name; a single corpus without a name is called ""."""
    specs = {"": config.corpus} if isinstance(config.corpus, str) else config.corpus
    return load_corpora(specs, vocab=config.vocab, tokenizer=config.tokenizer)


def describe_data(config: ProxyConfig) -> dict[str, Any]:
    """Return what is recorded of the data of a run.

    Args:
        config: The proxy.

    Returns:
        data_sha256: Hash of the data.
        data_tokens, data_tokens.NAME: Training tokens, and those of each named source.
        data_files: Number of files.
        tokens_per_epoch: Training tokens after which the first source has been read as often as it is long. A run of D
            tokens sees it D / tokens_per_epoch times, whether its windows are drawn or read pass by pass.
        bytes_per_token: Bytes of the held-out text per token, in evaluation shares; None if unknown. Bits per byte are
            loss / ln 2 / bytes_per_token.
        mix.NAME: Training share of each named source.
    """
    corpora = load_run_corpora(config)
    shares = config.mixture or {"": 1.0}
    eval_shares = {name: n / config.eval_windows for name, n in allot_eval_windows(config).items() if n}
    ratios = [(share, corpora[name].bytes_per_token) for name, share in eval_shares.items()]
    known = [share * ratio for share, ratio in ratios if ratio is not None]
    record: dict[str, Any] = {
        "data_sha256": _compute_sha256(corpora),
        "data_tokens": sum(len(corpus.train) for corpus in corpora.values()),
        "data_files": sum(len(corpus.files) for corpus in corpora.values()),
        "tokens_per_epoch": round(min(len(corpora[name].train) / share for name, share in shares.items() if share)),
        "bytes_per_token": sum(known) if len(known) == len(ratios) else None,
    }
    record |= {f"data_tokens.{name}": len(corpus.train) for name, corpus in corpora.items() if name}
    return record | {MIX_PREFIX + name: share for name, share in config.mixture.items()}


def _compute_sha256(corpora: Mapping[str, Corpus]) -> str:
    if list(corpora) == [""]:
        return corpora[""].sha256
    lines = "".join(f"{name}\0{corpora[name].sha256}\n" for name in sorted(corpora))
    return hashlib.sha256(lines.encode()).hexdigest()
