"""Suggest the name that a user probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def find_similar(name: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.4) -> list[str]:
    """Return up to `count` known names that resemble `name`, the most similar first.

    Args:
        name: What was given.
        known: The names to choose from.
        count: How many to return at most.
        cutoff: The least similarity, from 0 (anything) to 1 (equal), by `difflib.SequenceMatcher`.

    Returns:
        The similar names; empty when none reaches the cutoff.
    """
    return difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str], *, before: str = "", cutoff: float = 0.4) -> str:
    """Return the question that ends an error message about an unknown name.

    Args:
        name: What was given.
        known: The names to choose from.
        before: Text in front of the question, such as ": ".
        cutoff: The least similarity, see `find_similar`.

    Returns:
        `before` and "did you mean NAME?"; an empty string when no known name is similar enough.
    """
    similar = find_similar(name, known, cutoff=cutoff)
    return f"{before}did you mean {similar[0]}?" if similar else ""
