"""Weights of several sources, which need not sum to 1. No torch here.

A simplex is searched by weights: `"mix.NAME" = { low = 0.1, high = 10, log = true }` for all sources but one, whose weight stays
where `mixture` has it (with the last one searched, too, only the sum would move). What a run records are its shares.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

MIX = "mix."  # what the name of a searched weight begins with


def check_weights(weights: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Everything that is wrong with the weights of the sources called `names`, in words. No weights mean equal ones."""
    known = list(names)
    problems = []
    for name, weight in weights.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"sources: {', '.join(known) or 'only one, without a name'}"
            problems.append(f"{name}: unknown source; {hint}")
        elif not (math.isfinite(weight) and weight >= 0):
            problems.append(f"{name}: needed a weight >= 0, got {weight}")
    if weights:
        problems += [
            f"{name}: needed a weight, got none: name every source, or none for equal ones"
            for name in known
            if name not in weights
        ]
        if not any(weights.values()):
            problems.append(f"needed a source with a weight above 0, got {dict(weights)}: all are 0")
    return problems


def shares_of(weights: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Shares that sum to 1, in order of `names`; equal ones without weights. Shares stay as they are."""
    known = {name: float(weights[name]) if weights else 1.0 for name in names}
    total = sum(known.values())
    if abs(total - 1) < 1e-9:  # else the last bit would move with every reading of a record
        return known
    return {name: weight / total for name, weight in known.items()}


def allotted(n: int, shares: Sequence[float]) -> list[int]:
    """n windows given out in these shares (their sum is 1), by largest remainders: each within 1 of n * share."""
    exact = [n * s for s in shares]
    given = [int(e + 1e-9) for e in exact]
    by_rest = sorted(range(len(shares)), key=lambda k: (given[k] - exact[k], k))
    for k in by_rest[: n - sum(given)]:
        given[k] += 1
    return given
