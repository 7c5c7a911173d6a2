"""The settings of a search: checked when they are given, stored in its study, and compared when it is opened again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from hpo.planning.law_search import LawPlan
from hpo.samplers.unit_cube import describe_equal_choices, find_equal_choices
from hpo.search.hyperband import VARIANTS, Variant
from hpo.search.ladder import Ladder
from scaling.common.suggest import did_you_mean
from scaling.common.validation import SHOWN_CHARACTERS
from scaling.laws.compute import Fidelity

SCHEDULERS = ("incremental-hyperband", "law")
Promotion = Literal["rank", "predicted"]


class StoredSettings(BaseModel):
    """The settings of a search as its study stores them, in this order. Defaults are those of older studies.

    Attributes:
        space: Each parameter's distribution, in Optuna's JSON.
        tokens: Smallest and largest run, as they were first given.
        max_tokens: Largest run, raises included.
        eta: The reduction factor.
        sizes: Parameters N of the proxies, in ascending order.
        variant: Which configurations compete for a place.
        iterations: How often Hyperband is run; None for no end.
        scheduler: Name of the scheduler.
        resumable: Whether promotions resume from checkpoints.
        promote: Whether ranks or predictions decide promotions.
        asynchronous: Whether promotions do not wait for their rung.
        seeds: Trainings with different random seeds, by rung.
        raises: For each raise, the new largest run and how many trials there were then. Absent before the first.
        max_iterations: How often Hyperband is run after a raise. Absent before the first.
        groups: N, tokens and number of runs of each group of a plan. Absent without one.
        spread: How many runs of the first group are spread over the space. Absent without a plan.
    """

    model_config = ConfigDict(strict=True)

    space: dict[str, str]
    tokens: list[PositiveInt] = Field(min_length=2, max_length=2)
    max_tokens: PositiveInt
    eta: int = Field(ge=2)
    sizes: list[PositiveFloat] = Field(min_length=1)
    variant: str
    iterations: PositiveInt | None
    scheduler: str
    resumable: bool
    promote: str = "rank"
    asynchronous: bool = False
    seeds: list[PositiveInt] = Field(default_factory=lambda: [1])
    raises: list[list[int]] = Field(default_factory=list)
    max_iterations: PositiveInt | None = None
    groups: list[list[float]] | None = None
    spread: int | None = None

    @property
    def current_iterations(self) -> int | None:
        """How often Hyperband is run, raises included; None for no end."""
        return self.max_iterations if self.max_iterations is not None else self.iterations


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The settings of a search, checked. `hpo.Search` describes them and has their defaults.

    Those that `to_stored` returns define the study and cannot change. The others (target, budget, seed, worker, lease)
    only say how it is worked on, and may differ each time that it is opened.

    Attributes:
        ladder: The budgets, before any raise.
        proxy_sizes: Parameters N of the proxies, in ascending order.

    Raises:
        ValueError: If a setting is invalid.
    """

    space: dict[str, BaseDistribution]
    tokens: tuple[int, int]
    eta: int
    sizes: Sequence[float] | None
    target: Fidelity | None
    scheduler: str
    plan: LawPlan | None
    variant: Variant
    iterations: int | None
    budget: float | None
    resumable: bool
    seeds: int | Sequence[int]
    promote: Promotion
    asynchronous: bool
    seed: int
    worker: str | None
    lease: float | None
    ladder: Ladder = field(init=False)
    proxy_sizes: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._check_space()
        check_choice("scheduler", self.scheduler, SCHEDULERS)
        check_choice("variant", self.variant, VARIANTS)
        check_choice("promote", self.promote, get_args(Promotion))
        if not isinstance(self.asynchronous, bool):
            raise ValueError(f"asynchronous is True or False, got {self.asynchronous!r}")
        if len(self.tokens) != 2:
            raise ValueError(f"tokens are (smallest run, largest run), got {self.tokens}")
        lowest, highest = (parse_tokens(t) for t in self.tokens)
        object.__setattr__(self, "proxy_sizes", self._resolve_sizes())
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, or None for no end, got {self.iterations}")
        ladder = Ladder.make(lowest, highest, self.eta)
        object.__setattr__(self, "ladder", replace(ladder, seeds=resolve_seeds(self.seeds, ladder.levels)))
        self._check_run_options()
        if problems := self._find_plan_problems():
            raise ValueError("; ".join(problems))

    def _find_plan_problems(self) -> list[str]:
        """Return what is wrong with the plan and the settings beside it."""
        if self.scheduler != "law":
            return [] if self.plan is None else [f'a plan needs scheduler="law", got {self.scheduler!r}']
        if self.plan is None:
            return ['scheduler="law" needs a plan, as `hpo.plan` makes it']
        problems = []
        if self.iterations is not None or self.budget is not None:
            problems.append('scheduler="law" runs its plan: leave out iterations and budget')
        if self.promote != "rank" or self.asynchronous:
            problems.append('scheduler="law" promotes nothing: leave out promote and asynchronous')
        unknown = [
            f"N {group.N:g}, {group.tokens:,} tokens"
            for group in self.plan.design.groups
            if group.N not in self.proxy_sizes or group.tokens not in self.ladder.levels
        ]
        if unknown:
            problems.append(f"groups of the plan at no size and rung of the search: {'; '.join(unknown)}")
        return problems

    def _check_space(self) -> None:
        if not self.space:
            raise ValueError(
                "the search space is empty: give at least one parameter, as a dict of Optuna distributions"
            )
        for name, distribution in self.space.items():
            if not isinstance(distribution, BaseDistribution):
                raise ValueError(f"parameter {name!r} needs an Optuna distribution, got {distribution!r}")
            if isinstance(distribution, FloatDistribution) and not math.isfinite(distribution.high - distribution.low):
                raise ValueError(
                    f"parameter {name!r} needs a finite range, got {distribution.low:g} to {distribution.high:g}"
                )
            if distribution.single():
                raise ValueError(
                    f"parameter {name!r} has a single value, {distribution}: there is nothing to search; "
                    "give it to the trainer as a setting instead"
                )
            if isinstance(distribution, CategoricalDistribution) and (
                equal := find_equal_choices(distribution.choices)
            ):
                raise ValueError(f"parameter {name!r}: {describe_equal_choices(equal)}")

    def _resolve_sizes(self) -> tuple[float, ...]:
        sizes, target = self.sizes, self.target
        if target is not None and not all(math.isfinite(x) and x > 0 for x in (target.N, target.D)):
            raise ValueError(f"the target's N and D must be positive and finite, got {target}")
        if sizes is None:
            sizes = (1.0 if target is None else target.N,)
        if not sizes or not all(math.isfinite(n) and n > 0 for n in sizes):
            raise ValueError(f"sizes are parameter counts N, at least one, positive and finite, got {tuple(sizes)}")
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"sizes must differ, got {tuple(sizes)}: each has a Hyperband of its own already")
        return tuple(sorted(float(n) for n in sizes))

    def _check_run_options(self) -> None:
        """Check the settings that the study does not store."""
        budget, lease = self.budget, self.lease
        if budget is not None and (self.iterations is not None or not (math.isfinite(budget) and budget > 0)):
            raise ValueError(
                f"budget must be positive and finite, and is given in place of iterations, got {budget} and iterations "
                f"{self.iterations}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {self.seed}")
        if self.worker == "":
            raise ValueError("worker must not be empty: leave it out for host and process")
        if lease is not None and not (math.isfinite(lease) and lease > 0):
            raise ValueError(f"lease must be positive and finite, or None, got {lease}")

    @property
    def effective_variant(self) -> Variant:
        """The variant in use: promotion by prediction keeps places once taken, as the efficient variant does."""
        return self.variant if self.promote == "rank" else "efficient"

    def to_stored(self) -> StoredSettings:
        """Return what a new study stores."""
        lowest, highest = (parse_tokens(t) for t in self.tokens)
        design = None if self.plan is None else self.plan.design
        planned: dict[str, Any] = {}
        if design is not None:
            planned = {"groups": [[g.N, g.tokens, g.runs] for g in design.groups], "spread": design.spread}
        return StoredSettings.model_construct(
            **planned,
            space={name: distribution_to_json(distribution) for name, distribution in self.space.items()},
            tokens=[lowest, highest],
            max_tokens=highest,
            eta=self.eta,
            sizes=list(self.proxy_sizes),
            variant=self.variant,
            iterations=self.iterations,
            scheduler=self.scheduler,
            resumable=self.resumable,
            promote=self.promote,
            asynchronous=self.asynchronous,
            seeds=list(self.ladder.seeds),
        )

    def check_same(self, study: str, stored: StoredSettings) -> None:
        """Check that a study was made with these settings.

        The largest run may be the first one or the raised one. The iterations may be the first ones, or not fewer than
        the present ones.

        Args:
            study: Name of the study, for the message.
            stored: Its settings.

        Raises:
            ValueError: If any differ. The message lists all differences.
        """
        given, differences = self.to_stored(), []
        separate = {"space", "tokens", "max_tokens", "raises", "iterations", "max_iterations"}
        for name in StoredSettings.model_fields.keys() - separate:
            old, new = getattr(stored, name), getattr(given, name)
            if old != new:
                differences.append(f"{name}: the study has {old}, got {new}")
        first, current, iterations = stored.iterations, stored.current_iterations, given.iterations
        is_raised = iterations is not None and current is not None and iterations >= current
        if iterations != first and not is_raised:
            raised = "" if current == first else f" raised to {current}"
            differences.append(f"iterations: the study has {first}{raised}, got {iterations}; they can only be raised")
        (lowest, highest), (low, high) = stored.tokens, given.tokens
        if low != lowest or high not in (highest, stored.max_tokens):
            raised = "" if highest == stored.max_tokens else f" raised to {stored.max_tokens}"
            differences.append(f"tokens: the study has {(lowest, highest)}{raised}, got {(low, high)}")
        for name in stored.space.keys() | given.space.keys():
            old, new = (
                None if text is None else json.loads(text) for text in (s.space.get(name) for s in (stored, given))
            )
            if old != new:
                known, got = (
                    "no such parameter" if x is None else f"{x['name']} {x['attributes']}" for x in (old, new)
                )
                differences.append(f"space, {name}: the study has {known}, got {got}")
        if differences:
            listed = "".join(f"\n  {line}" for line in sorted(differences))
            raise ValueError(f"study {study!r} exists with other settings:{listed}\nuse those, or choose another name")


def resolve_seeds(seeds: int | Sequence[int], levels: Sequence[int]) -> tuple[int, ...]:
    """Return the number of trainings by rung, without repetitions of the last number, which holds for all rungs above.

    `Ladder` checks that the numbers are whole and positive and do not fall.

    Args:
        seeds: One number for all rungs, or one for each.
        levels: Tokens at each rung.

    Raises:
        ValueError: If it is neither.
    """
    numbers = tuple(seeds) if isinstance(seeds, Sequence) else (seeds,)
    if isinstance(seeds, str) or len(numbers) not in (1, len(levels)):
        raise ValueError(
            f"seeds needs one number, or one for each of the {len(levels)} rungs {tuple(levels)}, cheapest first, got "
            f"{seeds!r}"
        )
    while len(numbers) > 1 and numbers[-1] == numbers[-2]:
        numbers = numbers[:-1]
    return numbers


def parse_tokens(tokens: float) -> int:
    """Return a number of tokens as an integer. ValueError if it is not whole and positive."""
    if not math.isfinite(tokens) or tokens != int(tokens) or tokens <= 0:
        raise ValueError(f"tokens must be a positive whole number, got {tokens}")
    return int(tokens)


def parse_losses(trial: int, loss: Any) -> list[float]:
    """Return what a search was told about a trial as a list of numbers.

    Args:
        trial: The number of the trial, for the message.
        loss: A number, or one for each seed. They may be infinite or NaN. Text is not read as a number.

    Raises:
        ValueError: If it is anything else.
    """
    is_list = isinstance(loss, Iterable) and not isinstance(loss, str | bytes | Mapping | Set)
    # Arrays and tensors without dimensions are iterable by their type, but cannot be iterated over.
    values = list(loss) if is_list and getattr(loss, "ndim", None) != 0 else [loss]
    try:
        if any(isinstance(x, Sequence | bool | np.bool_) or getattr(x, "ndim", None) for x in values):
            raise TypeError("text, a truth value, or a list within a list")
        return [float(x) for x in values]
    except (TypeError, ValueError, OverflowError) as error:
        given = repr(loss)
        shown = given if len(given) <= SHOWN_CHARACTERS else f"{given[:SHOWN_CHARACTERS]}..."
        raise ValueError(f"trial {trial}: needed a number per seed, got {shown}") from error


def parse_point(trial: int, tokens: Any, loss: Any) -> tuple[int, float]:
    """Return a point of a loss curve as numbers; raise ValueError if it is not a number of tokens and a loss."""
    if isinstance(tokens, bool) or not isinstance(tokens, int | np.integer) or tokens < 0:
        raise ValueError(f"trial {trial}: needed a whole number of tokens, got {tokens!r}")
    (value,) = parse_losses(trial, [loss])
    return int(tokens), value


def check_choice(setting: str, value: str, known: Iterable[str]) -> None:
    """Check that a setting has one of the known values. The ValueError suggests the most similar one."""
    names = list(known)
    if value not in names:
        suggestion = did_you_mean(str(value), names, before=": ", cutoff=0.0)
        raise ValueError(f"{setting} must be one of {', '.join(names)}, got {value!r}{suggestion}")
