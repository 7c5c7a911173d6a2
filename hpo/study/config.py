"""The study file: TOML that is read into frozen models and checked whole before any compute is spent.

    seed = 0

    [search]
    tokens = { min = 81_920, max = 737_280 }    # the ladder of run lengths: max, max / eta, ... down to min
    seeds = [1, 1, 3]                           # trainings per configuration at each rung, or one number for all rungs

    [space]
    lr = { low = 1e-3, high = 1.0, log = true }
    batch_seqs = { low = 1, high = 16, log = true, type = "int" }

    [trainer]                                   # every other key is passed to the trainer
    use = "proxies:ProxyFamily"
    widths = [16, 32, 64]

    [target]                                    # the large run that is being planned, described in the trainer's terms
    d_model = 128
    tokens = 1_474_560

All mistakes are reported at once in a `StudyError`, each by field name.
"""

from __future__ import annotations

import inspect
import logging
import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

from optuna.distributions import BaseDistribution, CategoricalDistribution
from pydantic import Field, ValidationError, field_validator, model_validator

from hpo.samplers.belief import check_belief
from hpo.samplers.names import MODEL_SAMPLERS
from hpo.samplers.unit_cube import Cube
from hpo.study.law_plan import make_law_plan
from hpo.study.schema import Dimension, LawTable, SearchTable, StudyTable, Tokens, TrainerTable, Workers
from hpo.study.trainer import Trainer
from scaling.common.redact import find_secrets
from scaling.common.validation import explain_errors
from scaling.tracking.log import PARAMETER_NAME_RULE, find_unusable_names

logger = logging.getLogger("muscale.hpo")

# What a trainer may raise because of values in the study file, such as a path that no file can have.
TRAINER_ERRORS = (ValueError, TypeError, ArithmeticError, OSError)


class StudyError(ValueError):
    """All mistakes in a study file.

    Attributes:
        problems: One sentence per mistake, each of which begins with the name of its field.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} mistake{'s' if len(self.problems) > 1 else ''}"
        super().__init__(f"{where}: {count}, nothing was started\n" + "\n".join(f"  {p}" for p in self.problems))


class StudyConfig(StudyTable):
    """A validated study file.

    Attributes:
        seed: The random seed of the search.
        search: How compute is spent: run lengths, sampler, scheduler, budget.
        space: The searched parameters by name.
        belief: Where the optimum of some searched parameters is believed to lie, for a sampler with a model.
        trainer: Which trainer to use, and its settings.
        target: The large run that the settings are for, in the trainer's terms. None: the largest proxy run.
        workers: How many local processes train, and on how many threads.
    """

    seed: int = Field(0, ge=0)
    search: SearchTable
    space: dict[str, Dimension] = Field(min_length=1)
    belief: dict[str, LawTable] = Field(default_factory=dict)
    trainer: TrainerTable = Field(default_factory=TrainerTable)
    target: dict[str, Any] | None = None
    workers: Workers = Field(default_factory=Workers)

    @field_validator("space")
    @classmethod
    def _check_names(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        if unusable := find_unusable_names(space):
            raise ValueError(f"MLflow cannot store parameters named {unusable}; {PARAMETER_NAME_RULE}")
        return space

    @model_validator(mode="after")
    def _check_belief(self) -> Self:
        if self.belief and self.search.sampler not in MODEL_SAMPLERS:
            raise ValueError(f"belief needs a sampler with a model, such as 'mfbo', got {self.search.sampler!r}")
        if self.belief:
            check_belief({name: table.law for name, table in self.belief.items()}, Cube(self.distributions))
        return self

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The search space as Optuna distributions."""
        return {name: dimension.distribution() for name, dimension in self.space.items()}

    @property
    def probes(self) -> list[dict[str, Any]]:
        """Three settings to estimate costs at: the low end, the middle (geometric on a log scale) and the high end.

        All are settings that the search can choose.
        """
        probes: list[dict[str, Any]] = [{}, {}, {}]
        for name, dimension in self.space.items():
            for probe, value in zip(probes, dimension.pick_probes(), strict=True):
                probe[name] = value
        return probes

    @property
    def unused_ends(self) -> list[str]:
        """A sentence for each range whose `high` is not searched: it is no whole number of steps above low."""
        return [
            f"space.{name}: high = {dimension.high:g} is not low plus a whole number of steps; the largest value is "
            f"{dimension.largest:g}"
            for name, dimension in self.space.items()
            if dimension.largest is not None and dimension.largest != dimension.high
        ]

    def with_workers(self, count: int | None) -> StudyConfig:
        """Return the study with another number of workers, or unchanged if `count` is None."""
        if count is None:
            return self
        return self.model_copy(update={"workers": self.workers.model_copy(update={"count": count})})

    def make_trainer(self) -> Trainer:
        """Return the trainer that the study names, constructed with its settings."""
        return cast(Trainer, self.trainer.find()(**self.trainer.settings))


def load_study(path: Path) -> tuple[StudyConfig, Trainer]:
    """Read and check a study file and construct its trainer. Nothing is written.

    The file is data. The only code that it makes run is its trainer's module, whose import is logged first unless the
    trainer is a built-in one.

    Args:
        path: The study file.

    Returns:
        The study and its trainer.

    Raises:
        StudyError: If the file or the trainer's settings contain mistakes. It lists all of them.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StudyError(str(path), [f"not TOML: {error}"]) from error
    problems = find_secrets(table)
    study: StudyConfig | None = None
    try:
        study = StudyConfig.model_validate(table)
    except ValidationError as error:
        problems += explain_errors(error, StudyConfig)
    trainer = _check_trainer(table, study, problems)
    if infinite := dict(_find_infinite(table)):
        # Trainers that compute with such a value may fail without naming it.
        unnamed = tuple(f"{part}: " for part in {name.split(".")[0] for name in infinite})
        problems = [p for p in problems if not p.startswith(unnamed)]
        problems += [
            f"{name}: needed a finite number, got {value}"
            for name, value in infinite.items()
            if not any(p.startswith(f"{name}: ") for p in problems)
        ]
    if problems or study is None or trainer is None:
        raise StudyError(str(path), problems)
    return study, trainer


def _find_infinite(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Yield each number in a TOML value that is infinite or NaN, with its dotted name."""
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _find_infinite(inner, f"{where}.{key}" if where else str(key))


def _check_trainer(table: dict[str, Any], study: StudyConfig | None, problems: list[str]) -> Trainer | None:
    """Construct the trainer and append its mistakes to `problems`, also if other tables of the file are wrong."""
    raw = table.get("trainer", {})
    # A [trainer] that is malformed as a whole is already among the problems of the study.
    if not isinstance(raw, dict):
        return None
    try:
        trainer_table = TrainerTable.model_validate(raw)
    except ValidationError:
        return None
    if not trainer_table.use.startswith("proxies"):
        logger.info(f"importing the trainer {trainer_table.use}")
    try:
        factory = trainer_table.find()
    # The module is the user's code, so it may raise anything.
    except Exception as error:
        problems.append(
            f"trainer.use: cannot import {trainer_table.use!r} ({error}); the built-in one is 'proxies:ProxyFamily'"
        )
        return None
    trainer = _make_trainer(factory, trainer_table.settings, problems)
    if trainer is None:
        return None
    problems += _check_takes_repeat(trainer, trainer_table.use)
    if study is not None and max(study.search.seeds) > 1 and not getattr(trainer, "repeatable", True):
        problems.append("search.seeds: this trainer cannot take another random seed (a command needs {seed} for that)")
    tokens = study.search.tokens if study else _read_tokens(table)
    space = study.distributions if study else _read_space(table)
    try:
        problems += trainer.problems(space, (tokens.min, tokens.max) if tokens else None)
    except TRAINER_ERRORS as error:
        problems.append(f"trainer: {error}")
    if study is not None and study.search.scheduler == "law" and not problems:
        try:
            make_law_plan(study.search, study.distributions, study.probes, trainer)
        except TRAINER_ERRORS as error:
            problems.append(f"search: {error}")
    if isinstance(table.get("target"), dict):
        try:
            trainer.target(**table["target"])
        except ValidationError as error:
            # A trainer may name a model of its [target] table, whose keys are then suggested.
            problems += [f"target.{p}" for p in explain_errors(error, getattr(trainer, "target_table", None))]
        except TRAINER_ERRORS as error:
            problems.append(f"target: {error}")
    return trainer


def _check_takes_repeat(trainer: Trainer, name: str) -> list[str]:
    """Return a problem for each method without the keyword `repeat`, which would fail in the first worker."""
    problems = []
    for method in ("__call__", "describe"):
        parameters = inspect.signature(getattr(trainer, method)).parameters
        if "repeat" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            problems.append(
                f"trainer.use: {name}'s {method} needs a keyword `repeat: int = 0`, the index of the random seed to "
                "train with"
            )
    return problems


def _make_trainer(factory: Callable[..., Any], settings: dict[str, Any], problems: list[str]) -> Trainer | None:
    """Construct the trainer. If some settings are wrong, leave them out, so that the rest can still be checked."""
    try:
        return cast(Trainer, factory(**settings))
    except ValidationError as error:
        problems += [f"trainer.{p}" for p in explain_errors(error, factory)]
        wrong = {item["loc"][0] for item in error.errors() if item["loc"]}
    except TRAINER_ERRORS as error:
        problems.append(f"trainer: {error}")
        return None
    try:
        return cast(Trainer, factory(**{k: v for k, v in settings.items() if k not in wrong}))
    except TRAINER_ERRORS:
        # These mistakes are among the problems already, or follow from those.
        return None


def _read_space(table: dict[str, Any]) -> dict[str, BaseDistribution]:
    """Return the dimensions of a faulty study file that are valid. The others are among the problems already."""
    space: dict[str, BaseDistribution] = {}
    raw = table.get("space")
    for name, value in raw.items() if isinstance(raw, dict) else ():
        try:
            space[name] = Dimension.model_validate(value).distribution()
        except ValidationError:
            # The trainer then knows the name, so that a command that uses it is not reported as well.
            choices = value.get("choices") if isinstance(value, dict) else None
            if isinstance(choices, list) and choices:
                space[name] = CategoricalDistribution(list(dict.fromkeys(map(str, choices))))
    return space


def _read_tokens(table: dict[str, Any]) -> Tokens | None:
    """Return the run lengths of a faulty study file, or None if they are invalid."""
    raw = table.get("search")
    try:
        return Tokens.model_validate(raw.get("tokens") if isinstance(raw, dict) else None)
    except ValidationError:
        return None
