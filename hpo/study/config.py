"""The study file: TOML read into frozen models, checked whole before anything is spent.

    seed = 0

    [search]
    tokens = { min = 81_920, max = 737_280 }   # the ladder: max, max / eta, ... down to min
    seeds = [1, 1, 3]                           # trainings of a configuration at each rung; one number for all

    [space]
    lr = { low = 1e-3, high = 1.0, log = true }
    batch_seqs = { low = 1, high = 16, log = true, type = "int" }

    [trainer]                                   # every other key goes to the trainer
    use = "proxies:ProxyFamily"
    widths = [16, 32, 64]

    [target]                                    # the run that all this is for, in the trainer's words
    d_model = 128
    tokens = 1_474_560

All mistakes are reported at once in a StudyError, each by field name.
"""

from __future__ import annotations

import inspect
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast, get_args

from optuna.distributions import BaseDistribution
from pydantic import Field, ValidationError, field_validator, model_validator

from hpo.samplers.belief import check_belief
from hpo.samplers.names import MODELS
from hpo.samplers.unit_cube import Cube
from hpo.study.schema import Dimension, LawTable, SearchTable, StudyTable, Tokens, TrainerTable, Workers, meant
from hpo.study.trainer import Trainer
from scaling.common.cli import say
from scaling.common.redact import secrets_in
from scaling.tracking.log import NAMES, unusable_names

REFUSALS = (ValueError, TypeError, ArithmeticError, OSError)  # of a trainer, of what the file says


class StudyError(ValueError):
    """Everything that is wrong with a study file, one sentence each."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} mistake{'s' if len(self.problems) > 1 else ''}"
        super().__init__(f"{where}: {count}, nothing was started\n" + "\n".join(f"  {p}" for p in self.problems))


class StudyConfig(StudyTable):
    """A study file, validated."""

    seed: int = Field(0, ge=0)
    search: SearchTable
    space: dict[str, Dimension] = Field(min_length=1)
    belief: dict[str, LawTable] = Field(default_factory=dict)
    trainer: TrainerTable = Field(default_factory=TrainerTable)
    target: dict[str, Any] | None = None
    workers: Workers = Field(default_factory=Workers)

    @field_validator("space")
    @classmethod
    def _names_can_be_recorded(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        if wrong := unusable_names(space):
            raise ValueError(f"MLflow, which keeps the record, takes no parameters named {wrong}; {NAMES}")
        return space

    @model_validator(mode="after")
    def _belief_is_used(self) -> Self:
        if self.belief and self.search.sampler not in MODELS:
            raise ValueError(f"belief needs a sampler with a model, such as 'mfbo', got {self.search.sampler!r}")
        if self.belief:
            check_belief({name: table.law for name, table in self.belief.items()}, Cube(self.distributions))
        return self

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: dimension.distribution() for name, dimension in self.space.items()}

    @property
    def probes(self) -> list[dict[str, Any]]:
        """The low end, the middle (geometric on a log range) and the high end of the space, to estimate costs at."""
        probes: list[dict[str, Any]] = [{}, {}, {}]
        for name, dimension in self.space.items():
            if dimension.choices is not None:
                values: list[Any] = [dimension.choices[0]] * 3
            else:
                assert dimension.low is not None
                assert dimension.high is not None
                low, high = dimension.low, dimension.high
                values = [low, math.sqrt(low * high) if dimension.log else (low + high) / 2, high]
                if dimension.type == "int":
                    values = [round(v) for v in values]
            for probe, value in zip(probes, values, strict=True):
                probe[name] = value
        return probes

    def with_workers(self, count: int | None) -> StudyConfig:
        """The same with so many workers; None: its own."""
        return (
            self
            if count is None
            else self.model_copy(update={"workers": self.workers.model_copy(update={"count": count})})
        )

    def make_trainer(self) -> Trainer:
        """The trainer that the study names, made with its settings."""
        return cast(Trainer, self.trainer.find()(**self.trainer.settings))


def load_study(path: Path) -> tuple[StudyConfig, Trainer]:
    """Read and check a study file and what it names. StudyError with all mistakes; nothing is written.

    The file is data. The one thing that is run is the import of its trainer, which is said first when it is not one of ours.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StudyError(str(path), [f"not TOML: {error}"]) from error
    problems = secrets_in(table)
    study: StudyConfig | None = None
    try:
        study = StudyConfig.model_validate(table)
    except ValidationError as error:
        problems += explain(error, StudyConfig)
    trainer = _check_trainer(table, study, problems)
    if problems or study is None or trainer is None:
        raise StudyError(str(path), problems)
    return study, trainer


def _check_trainer(table: dict[str, Any], study: StudyConfig | None, problems: list[str]) -> Trainer | None:
    """Also when other tables are wrong, so that the trainer's mistakes come in the same breath."""
    raw = table.get("trainer", {})
    if not isinstance(raw, dict):
        return None  # named already
    try:
        named = TrainerTable.model_validate(raw)
    except ValidationError:
        return None  # named already
    if not named.use.startswith("proxies"):
        say(f"importing the trainer {named.use}")
    try:
        make = named.find()
    except Exception as error:  # whatever that module raises
        problems.append(
            f"trainer.use: cannot import {named.use!r} ({error}); the built-in one is 'proxies:ProxyFamily'"
        )
        return None
    trainer = _make(make, named.settings, problems)
    if trainer is None:
        return None
    problems += _without_repeat(trainer, named.use)
    if study is not None and max(study.search.seeds) > 1 and not getattr(trainer, "repeatable", True):
        problems.append("search.seeds: this trainer cannot take another random seed (a command needs {seed} for that)")
    tokens = study.search.tokens if study else _readable_tokens(table)
    space = study.distributions if study else _readable_space(table)
    try:
        problems += trainer.problems(space, (tokens.min, tokens.max) if tokens else None)
    except REFUSALS as error:  # a path that no file can have, say
        problems.append(f"trainer: {error}")
    if isinstance(table.get("target"), dict):
        try:
            trainer.target(**table["target"])
        except ValidationError as error:
            # a trainer may say which keys its [target] knows, for the hint
            problems += [f"target.{p}" for p in explain(error, getattr(trainer, "target_table", None))]
        except REFUSALS as error:
            problems.append(f"target: {error}")
    return trainer


def _without_repeat(trainer: Trainer, name: str) -> list[str]:
    """A trainer written before there were repeats would fail in the first worker."""
    said = []
    for method in ("__call__", "describe"):
        takes = inspect.signature(getattr(trainer, method)).parameters
        if "repeat" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            said.append(
                f"trainer.use: {name}'s {method} needs a keyword `repeat: int = 0`, the index of the random seed to train with"
            )
    return said


def _make(make: Any, settings: dict[str, Any], problems: list[str]) -> Trainer | None:
    """The trainer; after a mistake one without the wrong settings, so that the rest of the file can still be checked."""
    try:
        return cast(Trainer, make(**settings))
    except ValidationError as error:
        problems += [f"trainer.{p}" for p in explain(error, make)]
        wrong = {item["loc"][0] for item in error.errors() if item["loc"]}
    except REFUSALS as error:
        problems.append(f"trainer: {error}")
        return None
    try:
        return cast(Trainer, make(**{k: v for k, v in settings.items() if k not in wrong}))
    except REFUSALS:
        return None  # its mistakes are named already, or follow from those


def _readable_space(table: dict[str, Any]) -> dict[str, BaseDistribution]:
    space = {}
    raw = table.get("space")
    for name, value in raw.items() if isinstance(raw, dict) else ():
        try:
            space[name] = Dimension.model_validate(value).distribution()
        except ValidationError:
            continue  # named already, by field
    return space


def _readable_tokens(table: dict[str, Any]) -> Tokens | None:
    raw = table.get("search")
    try:
        return Tokens.model_validate(raw.get("tokens") if isinstance(raw, dict) else None)
    except ValidationError:
        return None  # named already, by field


def explain(error: ValidationError, model: Any) -> list[str]:
    """Pydantic's errors as `field: what was needed, what was got`, unknown keys with the nearest known one."""
    said = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            hint = meant(str(item["loc"][-1]), known) or (f"known here: {', '.join(known)}" if known else "")
            said.append(f"{where}: unknown key; {hint}".rstrip("; "))
        elif item["type"] == "missing":
            said.append(f"{where}: missing")
        elif item["type"] == "literal_error":
            expected = str(item["ctx"]["expected"])
            choices = expected.replace("'", "").replace(" or ", ", ").split(", ")
            hint = meant(str(item["input"]), choices, before="; ")
            said.append(f"{where}: needed {expected}, got {item['input']!r}{hint}")
        elif item["type"] == "value_error":
            # a mistake of several fields together has no place of its own: its message begins with their names
            said.append(f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"]))
        else:
            needed = item["msg"][0].lower() + item["msg"][1:]
            said.append(f"{where}: {needed}, got {json.dumps(item['input'], default=repr)}")
    return said


def _fields_at(model: Any, loc: Sequence[int | str]) -> list[str]:
    """The field names of the (nested) model at `loc`."""
    for part in loc:
        fields: Mapping[str, Any] = getattr(model, "model_fields", {})
        inside_dict = (get_args(model) or (model,))[-1]
        model = fields[str(part)].annotation if part in fields else inside_dict
    return sorted(getattr(model, "model_fields", {}))
