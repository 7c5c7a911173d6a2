"""The tables of a study file as frozen models, each of which checks itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, Literal, Self

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from hpo.samplers.belief import OptimumLaw
from hpo.samplers.names import MODEL_SAMPLERS, SAMPLERS
from hpo.samplers.unit_cube import describe_equal_choices, find_equal_choices
from hpo.search.ladder import Ladder
from hpo.search.settings import Promotion, resolve_seeds
from scaling.common.suggest import did_you_mean
from scaling.laws.compute import Fidelity


class StudyTable(BaseModel):
    """A frozen table in which an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Tokens(StudyTable):
    """The shortest and the longest run of the search, in training tokens."""

    min: int = Field(gt=0, le=10**18)
    max: int = Field(gt=0, le=10**18)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min must not exceed max, got min {self.min:,} > max {self.max:,}")
        return self


class GroupTable(StudyTable):
    """Runs of one size and length."""

    size: int = Field(ge=0, description="index of the proxy size, 0 for the smallest")
    tokens: int = Field(gt=0, le=10**18, description="training tokens of each run, one of the rungs")
    runs: PositiveInt


class SearchTable(StudyTable):
    """How the search spends compute. The fields are described where they are defined."""

    tokens: Tokens
    eta: int = Field(3, ge=2, description="each rung keeps the best 1/eta and trains them eta times longer")
    sampler: str = Field("mfbo", description=", ".join(SAMPLERS))
    scheduler: Literal["incremental-hyperband", "law"] = "incremental-hyperband"
    groups: tuple[GroupTable, ...] = Field((), description="the runs of scheduler 'law', as `hpo plan` writes them")
    spread: int = Field(
        8, ge=4, description="how many runs of the first group are spread over the space; all others follow the law"
    )
    variant: Literal["discarding", "preserving", "efficient"] = "discarding"
    iterations: PositiveInt | None = Field(
        None, description="how often Hyperband runs its brackets at each proxy size; 1 unless there is a budget"
    )
    budget: PositiveFloat | None = Field(
        None,
        description="instead of iterations, as a number of runs of the largest proxy for tokens.max: the sampler's "
        "model then chooses what to run and for how long, without brackets",
    )
    seeds: Annotated[tuple[PositiveInt, ...], BeforeValidator(lambda x: (x,) if type(x) is int else x)] = Field(
        (1,),
        min_length=1,
        description="trainings of a configuration with different random seeds: one number, or one per rung, "
        "cheapest first",
    )
    promote: Promotion = Field(
        "rank", description="by the losses at the rung, or by the losses predicted at the target"
    )
    stop: float = Field(
        0.0,
        ge=0,
        le=0.2,
        description="a run is stopped early if its chance of beating the best of its rung is forecast to be lower than "
        "this; 0: never",
    )
    asynchronous: bool = Field(
        False, description="promote the best runs so far instead of waiting until their rung is complete"
    )

    @model_validator(mode="before")
    @classmethod
    def _set_default_iterations(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("scheduler") == "law":
            return data
        if data.get("iterations") is None and data.get("budget") is None:
            return {**data, "iterations": 1}
        return data

    @field_validator("sampler")
    @classmethod
    def _check_sampler(cls, name: str) -> str:
        if name not in SAMPLERS:
            raise ValueError(
                f"needed one of {', '.join(SAMPLERS)}, got {name!r}{did_you_mean(name, SAMPLERS, before='; ')}"
            )
        return name

    @model_validator(mode="after")
    def _check_rungs(self) -> Self:
        ladder = Ladder.make(self.tokens.min, self.tokens.max, self.eta)
        levels = ladder.levels
        problems = []
        if levels[0] != self.tokens.min:
            below = self.tokens.min * self.eta ** (len(levels) - 1)
            problems.append(
                f"tokens.max must be tokens.min times a power of eta, got {self.tokens.max:,} = {self.tokens.min:,} x "
                f"{self.tokens.max / self.tokens.min:.4g}: the nearest are {below:,} and {below * self.eta:,}"
            )
        try:
            Ladder(levels, self.eta, resolve_seeds(self.seeds, levels))
        except ValueError as error:
            problems.append(str(error))
        problems += self._find_group_problems(levels)
        if self.budget is not None and self.iterations is not None:
            problems.append(
                "needed iterations (Hyperband's brackets) or budget (the model decides), got both: remove one"
            )
        if self.promote == "predicted" and self.sampler not in MODEL_SAMPLERS:
            problems.append(
                f"promote = 'predicted' needs a model of the loss, which sampler = 'mfbo' has, got {self.sampler!r}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _find_group_problems(self, levels: tuple[int, ...]) -> list[str]:
        """Return what is wrong with the groups of scheduler 'law'."""
        if self.scheduler != "law":
            return ["groups need scheduler = 'law'"] if self.groups else []
        if not self.groups:
            return ["scheduler = 'law' needs groups, which `hpo plan` chooses and writes"]
        problems = []
        for name, value, default in (
            ("iterations", self.iterations, None),
            ("budget", self.budget, None),
            ("promote", self.promote, "rank"),
            ("asynchronous", self.asynchronous, False),
            ("stop", self.stop, 0.0),
            ("seeds", self.seeds, (1,)),
        ):
            if value != default:
                problems.append(f"scheduler = 'law' runs its groups: leave out {name}")
        if wrong := sorted({group.tokens for group in self.groups} - set(levels)):
            problems.append(f"groups: tokens must be rungs, {', '.join(map(str, levels))}; got {wrong}")
        if len({(group.size, group.tokens) for group in self.groups}) < len(self.groups):
            problems.append("groups: two have the same size and tokens: make one of them")
        if self.groups[0].runs <= self.spread:
            problems.append(
                f"spread must be less than the runs of the first group, {self.groups[0].runs}, got {self.spread}"
            )
        return problems


class Dimension(StudyTable):
    """A searched parameter: a range or a list of choices."""

    type: Literal["float", "int"] = "float"
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    log: bool = False
    step: Annotated[FiniteFloat, Field(gt=0)] | None = None
    choices: tuple[str | float | int | bool, ...] | None = None

    @model_validator(mode="after")
    def _check_range_or_choices(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("choices cannot be combined with a range: remove low, high, log and step")
            if len(set(self.choices)) < 2:
                raise ValueError(
                    f"needed at least 2 different choices, got {list(self.choices)}: set a constant under [trainer]"
                )
            if equal := find_equal_choices(self.choices):
                raise ValueError(describe_equal_choices(equal))
            return self
        if self.low is None or self.high is None:
            raise ValueError("needed low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low {self.low:g} >= high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range needs low > 0, got {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("a log range has no step: remove one of them")
        if self.type == "int" and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError(f"an int range needs whole low and high, got {self.low:g} and {self.high:g}")
        if self.type == "int" and self.step is not None and self.step != int(self.step):
            raise ValueError(f"an int range needs a whole step, got {self.step:g}")
        if self.step is not None and self.distribution().single():
            raise ValueError(
                f"needed a step of at most high - low = {self.high - self.low:g}, got {self.step:g}: "
                "low is the only value then"
            )
        return self

    def pick_probes(self) -> list[Any]:
        """Return the smallest, a middle (geometric on a log scale) and the largest value; of choices, the first one."""
        distribution = self.distribution()
        if isinstance(distribution, CategoricalDistribution):
            return [distribution.choices[0]] * 3
        low, high = distribution.low, distribution.high
        middle = math.sqrt(low * high) if self.log else (low + high) / 2
        if self.step is not None:
            middle = low + round((middle - low) / self.step) * self.step
        values = [low, middle, high]
        return [round(v) for v in values] if self.type == "int" else [float(v) for v in values]

    @property
    def largest(self) -> float | None:
        """The largest value that is searched: `high`, or with a step the last one at or below it. None for choices."""
        distribution = self.distribution()
        return None if isinstance(distribution, CategoricalDistribution) else distribution.high

    def distribution(self) -> CategoricalDistribution | IntDistribution | FloatDistribution:
        """Return the Optuna distribution of this dimension."""
        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        assert self.low is not None
        assert self.high is not None
        with warnings.catch_warnings():
            # Optuna warns if the range is not a whole number of steps. The commands say so in their own words.
            warnings.filterwarnings("ignore", "The distribution is specified by", UserWarning)
            if self.type == "int":
                return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
            return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


class LawTable(StudyTable):
    """The believed optimum of a searched parameter: value (N / at.N)^exponent_N (D / at.D)^exponent_D."""

    value: PositiveFloat
    at: Mapping[Literal["N", "D"], PositiveFloat]
    exponent_N: float = 0.0
    exponent_D: float = 0.0

    @model_validator(mode="after")
    def _check_at(self) -> Self:
        if len(self.at) < 2:
            raise ValueError(f"at needs N and D, got {sorted(self.at)}")
        return self

    @property
    def law(self) -> OptimumLaw:
        """The table as a law that can be evaluated."""
        return OptimumLaw(self.value, Fidelity(self.at["N"], self.at["D"]), self.exponent_N, self.exponent_D)


class TrainerTable(BaseModel):
    """Which trainer to use, and its settings: all other keys of the table."""

    model_config = ConfigDict(frozen=True, extra="allow")

    use: str = Field(default="proxies:ProxyFamily", pattern=r"^\w+(\.\w+)*:\w+$")

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that the trainer is constructed with."""
        return self.model_extra or {}

    def find(self) -> Any:
        """Import what `use` names, which runs that module, and return it.

        Raises:
            ImportError: If there is no such module.
            AttributeError: If the module has no such name.
        """
        module, _, name = self.use.partition(":")
        return getattr(import_module(module), name)


class Workers(StudyTable):
    """How many processes train, and on how many CPU threads each."""

    count: PositiveInt = 1
    threads: PositiveInt = 1
    timeout: PositiveFloat | None = Field(
        default=None, description="seconds without a measurement after which a run is killed as hanging; default: never"
    )
    lease: PositiveFloat = Field(
        default=60.0, description="seconds without a heartbeat after which another worker takes over a worker's run"
    )
    attempts: PositiveInt = Field(
        default=2,
        description="how often a run is tried whose training fails, is killed or hangs, before it counts as diverged",
    )
