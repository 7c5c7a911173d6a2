"""The data of a run: one corpus, or several read in given shares and measured in fixed ones.

Which source window i comes from depends on (i, shares) alone, and which of that source's windows it is on (seed, source,
how many came before). So runs that differ in their shares read the windows of a source in the same order.
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

from proxies.config.mixture_weights import MIX, allotted
from proxies.config.proxy import ProxyConfig
from proxies.data.corpora import Corpus, load_corpora
from proxies.data.windows import Windows, held_out, pairs, share

BITS = 30
LONGEST = 1 << (62 - BITS)  # windows; beyond, the products would not fit in int64


class Mixed:
    """Windows of several sources, interleaved so that every prefix holds each source in its share.

    The sources are halved, in the order given, until one is left; of i windows that come to a pair of halves the first gets
    round(share * i). So no source is ever further from its share than half a window for each halving: 1/2 for two
    sources, 1 for up to four.
    """

    def __init__(self, parts: Sequence[Windows], shares: Sequence[float]) -> None:
        if len(parts) != len(shares) or not parts:
            raise ValueError(f"needed one share for each source, got {len(parts)} sources and {len(shares)} shares")
        self.parts, self.shares = tuple(parts), tuple(shares)

    def read(self, start: int, n: int) -> NDArray[np.int64]:
        """Windows start, ..., start + n - 1 and their next tokens, int64 [n, seq_len + 1]."""
        if start + n > LONGEST:
            raise ValueError(f"needed a position up to {LONGEST:,} windows, got {start + n:,}")
        read = counts_at(np.arange(start, start + n + 1), self.shares)
        source = np.diff(read, axis=0).argmax(axis=1)
        windows = np.empty((n, self.parts[0].seq_len + 1), np.int64)
        for k, part in enumerate(self.parts):
            windows[source == k] = part.read(int(read[0, k]), int(read[-1, k] - read[0, k]))
        return windows

    def batch(self, start: int, n: int, *, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """The same as Windows.batch."""
        return pairs(self.read(*share(start, n, rank, ranks)))


def counts_at(i: NDArray[np.int64], shares: Sequence[float]) -> NDArray[np.int64]:
    """How many of the first i windows come from each source, int64 [len(i), sources]."""
    if len(shares) == 1:
        return i[:, None]
    middle = len(shares) // 2
    total = sum(shares)
    # Whole numbers: rounding in floating point could give a window to nobody.
    unit = round(sum(shares[:middle]) / total * (1 << BITS)) if total else 0
    first = (i * unit + (1 << (BITS - 1))) >> BITS
    return np.concatenate([counts_at(first, shares[:middle]), counts_at(i - first, shares[middle:])], axis=1)


Reader = Windows | Mixed


@dataclass(frozen=True, eq=False)
class Data:
    """What a run reads and what it is measured on."""

    windows: Reader
    held: tuple[Tensor, Tensor]  # held-out windows of all sources, one after the other
    parts: Mapping[str, tuple[Tensor, Tensor]]  # the same by source; empty for a single corpus without a name
    sha256: str
    corpora: Mapping[str, Corpus]


def open_data(config: ProxyConfig) -> Data:
    """The data of this run. ValueError if it cannot be read.

    The held-out windows do not depend on the training shares: losses of different mixtures can be compared. A mean over
    them weighs the sources by `eval_mixture`, to one window.
    """
    corpora = corpora_of(config)
    names = sorted(config.mixture)  # equal records may list them in another order, and must read the same

    def windows(name: str) -> Windows:
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) + 1 if names else 0
        return Windows(corpora[name].train, config.seq_len, config.seed, order=config.order, stream=stream)

    if not names:
        (corpus,) = corpora.values()
        held = held_out(corpus.val, config.seq_len, config.eval_windows)
        return Data(windows(""), held, {}, corpus.sha256, corpora)
    parts = {name: held_out(corpora[name].val, config.seq_len, n) for name, n in measured_windows(config).items() if n}
    held = torch.cat([x for x, _ in parts.values()]), torch.cat([y for _, y in parts.values()])
    mixed = Mixed([windows(name) for name in names], [config.mixture[name] for name in names])
    return Data(mixed, held, parts, _sha256(corpora), corpora)


def measured_windows(config: ProxyConfig) -> dict[str, int]:
    """How many held-out windows each source has; a single corpus is called ""."""
    if not config.eval_mixture:
        return {"": config.eval_windows}
    names = sorted(config.eval_mixture)
    return dict(zip(names, allotted(config.eval_windows, [config.eval_mixture[name] for name in names]), strict=True))


def corpora_of(config: ProxyConfig) -> dict[str, Corpus]:
    """The corpora of this run by name; a single one without a name is called ""."""
    specs = {"": config.corpus} if isinstance(config.corpus, str) else config.corpus
    return load_corpora(specs, vocab=config.vocab, tokenizer=config.tokenizer)


def record(config: ProxyConfig) -> dict[str, Any]:
    """What is recorded of a run's data: hash, sizes, shares.

    tokens_per_epoch: training tokens after which the first source has been read as often as it is long; a run of D
    tokens has seen it D / tokens_per_epoch times, whether its windows are drawn or passed through.
    bytes_per_token: of the held-out text, in evaluation shares; bits per byte are loss / ln 2 / this.
    """
    corpora = corpora_of(config)
    shares = config.mixture or {"": 1.0}
    measured = {name: n / config.eval_windows for name, n in measured_windows(config).items() if n}
    ratios = [(share, corpora[name].bytes_per_token) for name, share in measured.items()]
    known = [share * ratio for share, ratio in ratios if ratio is not None]
    said: dict[str, Any] = {
        "data_sha256": _sha256(corpora),
        "data_tokens": sum(len(c.train) for c in corpora.values()),
        "data_files": sum(len(c.files) for c in corpora.values()),
        "tokens_per_epoch": round(min(len(corpora[n].train) / s for n, s in shares.items() if s)),
        "bytes_per_token": sum(known) if len(known) == len(ratios) else None,
    }
    said |= {f"data_tokens.{name}": len(corpus.train) for name, corpus in corpora.items() if name}
    return said | {MIX + name: share for name, share in config.mixture.items()}


def _sha256(corpora: Mapping[str, Corpus]) -> str:
    if list(corpora) == [""]:
        return corpora[""].sha256
    said = "".join(f"{name}\0{corpora[name].sha256}\n" for name in sorted(corpora))
    return hashlib.sha256(said.encode()).hexdigest()
