"""Weights of the sources of a mixture, which need not sum to 1. This module does not import torch.

To search a mixture, search the weights of all sources but one: `"mix.NAME" = { low = 0.1, high = 10, log = true }`. The
remaining weight stays at its value in `mixture`; searching it too would only move the sum. A run records its shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from scaling.common.suggest import did_you_mean

# Prefix of the name of a searched weight.
MIX_PREFIX = "mix."


def check_weights(weights: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """List everything that is wrong with the weights of a mixture.

    Args:
        weights: Weight of each source by name. No weights mean equal ones.
        names: Names of the sources.

    Returns:
        One message per problem; empty if the weights are valid.
    """
    known = list(names)
    problems = []
    for name, weight in weights.items():
        if name not in known:
            hint = did_you_mean(name, known) or f"sources: {', '.join(known) or 'only one, without a name'}"
            problems.append(f"{name}: unknown source; {hint}")
        elif not math.isfinite(weight):
            problems.append(f"{name}: needed a finite number as its weight, got {weight}")
        elif weight < 0:
            problems.append(f"{name}: needed a weight >= 0, got {weight}")
    if weights:
        problems += [
            f"{name}: needed a weight, got none: name every source, or none for equal weights"
            for name in known
            if name not in weights
        ]
        if not any(weights.values()):
            problems.append(f"needed a source with a weight above 0, got {dict(weights)}: all are 0")
    return problems


def normalize_weights(weights: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return weights as shares that sum to 1, in the order of `names`.

    Args:
        weights: Weight of each source by name; empty for equal shares.
        names: Names of the sources.

    Returns:
        Share of each source. Weights that sum to 1 already are returned unchanged.
    """
    known = {name: float(weights[name]) if weights else 1.0 for name in names}
    total = sum(known.values())
    # Otherwise the last bit would change every time a record is read.
    if abs(total - 1) < 1e-9:
        return known
    return {name: weight / total for name, weight in known.items()}


def allot_windows(n: int, shares: Sequence[float]) -> list[int]:
    """Divide n windows by the method of largest remainders.

    Args:
        n: Number of windows.
        shares: Shares that sum to 1.

    Returns:
        Windows per share, each within 1 of n * share; their sum is n.
    """
    exact = [n * share for share in shares]
    counts = [int(windows + 1e-9) for windows in exact]
    by_remainder = sorted(range(len(shares)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: n - sum(counts)]:
        counts[k] += 1
    return counts
