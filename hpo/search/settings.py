"""Opening a search: its arguments checked, its storage and lock."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import TrialState

from hpo.search.hyperband import VARIANTS
from scaling.laws.compute import Fidelity

SCHEDULERS = ("incremental-hyperband",)
Promotion = Literal["rank", "predicted"]
# What a study has that was made before these settings existed.
BEFORE: dict[str, Any] = {"seeds": [1], "promote": "rank", "asynchronous": False}


def checked_settings(
    space: Mapping[str, BaseDistribution],
    *,
    tokens: tuple[int, int],
    eta: int,
    sizes: Sequence[float] | None,
    target: Fidelity | None,
    scheduler: str,
    variant: str,
    iterations: int | None,
    resumable: bool,
    promote: str,
    asynchronous: bool,
) -> dict[str, Any]:
    """The settings of a search as they are stored, or ValueError. (min <= max and eta are checked by Ladder.make.)"""
    if not space:
        raise ValueError("the search space is empty: give at least one parameter, as a dict of Optuna distributions")
    for name, distribution in space.items():
        if not isinstance(distribution, BaseDistribution):
            raise ValueError(f"parameter {name!r} needs an Optuna distribution, got {distribution!r}")
        if distribution.single():
            raise ValueError(
                f"parameter {name!r} has a single value, {distribution}: there is nothing to search; give it to the "
                "trainer as a setting instead"
            )
    one_of("scheduler", scheduler, SCHEDULERS)
    one_of("variant", variant, VARIANTS)
    one_of("promote", promote, get_args(Promotion))
    if not isinstance(asynchronous, bool):
        raise ValueError(f"asynchronous is True or False, got {asynchronous!r}")
    if len(tokens) != 2:
        raise ValueError(f"tokens are (smallest run, largest run), got {tokens}")
    lowest, highest = (whole_tokens(t) for t in tokens)
    if target is not None and not all(math.isfinite(x) and x > 0 for x in (target.N, target.D)):
        raise ValueError(f"the target's N and D must be positive and finite, got {target}")
    if sizes is None:
        sizes = (1.0 if target is None else target.N,)
    if not sizes or not all(math.isfinite(n) and n > 0 for n in sizes):
        raise ValueError(f"sizes are parameter counts N, at least one, positive and finite, got {tuple(sizes)}")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes must differ, got {tuple(sizes)}: each has a Hyperband of its own already")
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be at least 1, or None for no end, got {iterations}")
    return {
        "space": {name: distribution_to_json(distribution) for name, distribution in space.items()},
        "tokens": [lowest, highest],
        "max_tokens": highest,  # raised by extend()
        "eta": eta,
        "sizes": sorted(float(n) for n in sizes),
        "variant": variant,
        "iterations": iterations,
        "scheduler": scheduler,
        "resumable": resumable,
        "promote": promote,
        "asynchronous": asynchronous,
    }


def checked_seeds(seeds: int | Sequence[int], levels: Sequence[int]) -> tuple[int, ...]:
    """Training seeds by rung, without repetition of the last number, which holds for all rungs above. ValueError when
    it is neither one number nor one per level. (That they are whole, positive and do not fall is checked by Ladder.)
    """
    given = tuple(seeds) if isinstance(seeds, Sequence) else (seeds,)
    if isinstance(seeds, str) or len(given) not in (1, len(levels)):
        raise ValueError(
            f"seeds needs one number, or one for each of the {len(levels)} rungs {tuple(levels)}, cheapest first, got "
            f"{seeds!r}"
        )
    while len(given) > 1 and given[-1] == given[-2]:
        given = given[:-1]
    return given


def check_same(study: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ValueError that lists all differences. The largest run may be the original one or the one it was raised to."""
    found = []
    for key in given.keys() - {"space", "tokens", "max_tokens"}:
        old = stored[key] if key in stored else BEFORE[key]
        if old != given[key]:
            found.append(f"{key}: the study has {old}, got {given[key]}")
    (lowest, highest), (low, high) = stored["tokens"], given["tokens"]
    if low != lowest or high not in (highest, stored["max_tokens"]):
        raised = "" if highest == stored["max_tokens"] else f" raised to {stored['max_tokens']}"
        found.append(f"tokens: the study has {(lowest, highest)}{raised}, got {(low, high)}")
    for name in stored["space"].keys() | given["space"].keys():
        old, new = (
            None if json_ is None else json.loads(json_) for json_ in (s["space"].get(name) for s in (stored, given))
        )
        if old != new:
            there, here = ("no such parameter" if x is None else f"{x['name']} {x['attributes']}" for x in (old, new))
            found.append(f"space, {name}: the study has {there}, got {here}")
    if found:
        listed = "".join(f"\n  {line}" for line in sorted(found))
        raise ValueError(f"study {study!r} exists with other settings:{listed}\nuse those, or choose another name")


def check_fresh(study: optuna.Study) -> None:
    """ValueError when a study that has no settings of ours is not an empty one."""
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise ValueError(f"study {study.study_name!r} exists and does not minimize one value: choose another name")
    if any(t.state != TrialState.WAITING for t in study.get_trials(deepcopy=False)):
        raise ValueError(f"study {study.study_name!r} exists and was not made by a Search: choose another name")


def whole_tokens(tokens: float) -> int:
    """Tokens as an integer; ValueError when they are not whole and positive."""
    if not math.isfinite(tokens) or tokens != int(tokens) or tokens <= 0:
        raise ValueError(f"tokens must be a positive whole number, got {tokens}")
    return int(tokens)


def one_of(what: str, given: str, known: Iterable[str]) -> None:
    """ValueError with the nearest name when `given` is not known."""
    names = list(known)
    if given not in names:
        near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.0)[0]
        raise ValueError(f"{what} must be one of {', '.join(names)}, got {given!r}: did you mean {near!r}?")
