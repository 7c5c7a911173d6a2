"""Is the parametrization right? The coordinate check: how large activations get must not depend on width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from proxies.config import ProxyConfig
from proxies.data import Tokens, Windows, load_corpus
from proxies.model import Block, Transformer, build, loss_of, norm
from proxies.optimizers import make_optimizer, set_lr

Coordinates = dict[str, Tensor]


@dataclass(frozen=True)
class Slope:
    """How a quantity grows with width after `step` steps: the slope of log2(quantity) against log2(width)."""

    where: str  # such as "block 0 attention"
    step: int
    size: float  # of mean |x|
    change: float  # of mean |x - x at step 0|


@dataclass(frozen=True)
class CoordCheck:
    """The slopes of every quantity at every step, and whether they are flat enough."""

    slopes: tuple[Slope, ...]  # of every quantity at every step
    widths: tuple[int, ...]
    lr: float  # at base width
    limit: float  # on |slope|, mean over steps

    @property
    def means(self) -> dict[str, tuple[float, float]]:
        """Slopes of size and of change for each quantity, mean over steps (a single step's slope is noisy)."""
        return {
            where: (
                float(np.mean([s.size for s in self.slopes if s.where == where])),
                float(np.mean([s.change for s in self.slopes if s.where == where])),
            )
            for where in dict.fromkeys(s.where for s in self.slopes)
        }

    @property
    def failures(self) -> tuple[str, ...]:
        """Quantities with a slope beyond the limit, or not finite."""
        return tuple(
            where
            for where, (size, change) in self.means.items()
            if not (abs(size) <= self.limit and abs(change) <= self.limit)
        )

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def text(self) -> str:
        """A table with one line per quantity, and a verdict."""
        lines = [f"{'slope of log2 |x| in log2 width':32}{'size':>8}{'change':>8}"]
        for where, (size, change) in self.means.items():
            lines.append(f"{where:32}{size:8.2f}{change:8.2f}{'   too steep' if where in self.failures else ''}")
        verdict = "passed" if self.passed else "failed, activations depend on width"
        widths = ", ".join(map(str, self.widths))
        lines.append(f"widths {widths}; lr {self.lr:g} at base width; limit {self.limit:g}: {verdict}")
        return "\n".join(lines)


def coordinate_check(
    config: ProxyConfig,
    widths: Sequence[int] | None = None,
    *,
    seeds: int = 3,
    steps: int = 10,
    lr: float | None = None,
    batch_seqs: int = 4,
    limit: float = 0.5,
) -> CoordCheck:
    """Train each width for a few steps on the same data and fit how every activation scales with width.

    Measured before the final norm as well as after, since a norm hides an exploding stream: embeddings, the output of
    every branch, the stream after every block, attention scores, logits (coordinate check of arXiv 2203.03466,
    appendix D.1; the limits are docs/math.md §6).

    widths: at least three, whole heads each; half the base width to four times it unless given.
    lr: at base width, constant; three times that of `config` unless given, since at a gentle rate a wrong
        parametrization looks right for ten steps.
    limit: on every |slope|, mean over steps. Measured at base widths 32 and 64, one and three times the default lr,
        with and without grouped queries: the steepest under muP is 0.38 (0.25 or less in 11 of 12 cases), under the
        standard table 1.05 to 2.8.
    """
    base = config.base_width
    chosen = tuple(sorted(set(widths if widths is not None else (base // 2, base, 2 * base, 4 * base))))
    if len(chosen) < 3:
        raise ValueError(f"needed at least three widths for a slope, got {list(chosen)}: add widths")
    if seeds < 1 or steps < 1:
        raise ValueError(f"needed at least one seed and one step, got {seeds} and {steps}")
    rate = 3 * config.lr if lr is None else lr
    members = [ProxyConfig.model_validate(config.model_dump() | {"d_model": w, "lr": rate}) for w in chosen]

    tokens = load_corpus(config.corpus, vocab=config.vocab).train
    runs: list[list[list[Coordinates]]] = []  # width, seed, step 0 to steps
    for member in members:
        runs.append([_trail(member, config.seed + seed, tokens, steps, batch_seqs) for seed in range(seeds)])

    slopes = []
    for name in runs[0][0][0]:
        for step in range(1, steps + 1):
            size = [_mean_abs([trail[step][name] for trail in trails]) for trails in runs]
            change = [_mean_abs([trail[step][name] - trail[0][name] for trail in trails]) for trails in runs]
            slopes.append(Slope(name, step, _slope(chosen, size), _slope(chosen, change)))
    return CoordCheck(tuple(slopes), chosen, rate, limit)


@torch.no_grad()
def coordinates(model: Transformer, x_bt: Tensor) -> Coordinates:
    """Every quantity of the check, by name, on one batch."""
    rope = model.rope_for(x_bt)
    stream = model.stem(x_bt)
    seen: Coordinates = {"embedding": stream}
    for i, block in enumerate(cast(Iterable[Block], model.blocks)):
        normed = norm(stream, block.attn_norm)
        seen[f"block {i} attention scores"] = block.attention_logits(normed, rope)
        seen[f"block {i} attention"] = block.attention(normed, rope)
        stream = block.add(stream, seen[f"block {i} attention"])
        seen[f"block {i} mlp"] = block.mlp(norm(stream, block.mlp_norm))
        stream = block.add(stream, seen[f"block {i} mlp"])
        seen[f"block {i} stream"] = stream
    seen["logits"] = model.head(stream)
    return seen


def _trail(config: ProxyConfig, seed: int, tokens: Tokens, steps: int, batch_seqs: int) -> list[Coordinates]:
    """The coordinates on one fixed batch after 0, 1, ..., steps steps at the peak rate."""
    model = build(config.model_copy(update={"seed": seed}))
    optimizer = make_optimizer(model, config)
    set_lr(optimizer, 1.0)
    windows = Windows(tokens, config.seq_len, seed)
    probe, _ = windows.batch(steps * batch_seqs, batch_seqs)  # not trained on
    trail = [coordinates(model, probe)]
    for step in range(steps):
        loss_of(model, *windows.batch(step * batch_seqs, batch_seqs)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trail.append(coordinates(model, probe))
    return trail


def _mean_abs(tensors: list[Tensor]) -> float:
    return float(torch.stack([x.abs().mean() for x in tensors]).mean())


def _slope(widths: Sequence[int], values: list[float]) -> float:
    """Least-squares slope of log2(value) against log2(width); 0 if all are zero, nan if one is, or is not finite."""
    if not any(values):
        return 0.0  # nothing moves at any width: behind a zero readout no gradient reaches the embedding in step 1
    if not all(0 < v < math.inf for v in values):
        return math.nan
    return float(np.polyfit(np.log2(widths), np.log2(values), 1)[0])
