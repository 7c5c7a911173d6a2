"""Plan the runs of a study file: for its target and trainer, and written back as its [search] table."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hpo.study.config import StudyConfig, StudyError, load_study
from hpo.study.law_plan import find_inputs
from hpo.study.plan import Plan, make_plan
from hpo.study.trainer import ResizableTrainer, Trainer
from scaling.common.atomic import write_atomically
from scaling.common.quantities import read_count
from scaling.common.validation import explain_errors
from scaling.laws.compute import Fidelity


@dataclass(frozen=True)
class PlannedStudy:
    """The plan of a study file.

    Attributes:
        plan: The plan.
        settings: Trainer settings that give it the planned sizes, such as {"widths": [64, 128]}. Empty if it has them.
        sizes: N of all sizes that the trainer then has, in ascending order.
    """

    plan: Plan
    settings: dict[str, Any]
    sizes: tuple[float, ...]


def read_spend(text: str, target_flops: float, speed: float | None = None) -> float:
    """Return a budget in FLOPs.

    Args:
        text: A share of the target's compute, such as "1%", FLOPs, such as "6e20", or GPU-hours, such as "500h".
        target_flops: The target's compute, FLOPs.
        speed: FLOPs per second that training reaches on one GPU, 6 N for each token. Hours need it.

    Raises:
        ValueError: If it is none of them, or the speed is missing or not needed.
    """
    hours = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(?:h|hours?|gpu-?h|gpu[- ]hours?)\s*", text, re.IGNORECASE)
    if hours:
        if speed is None:
            raise ValueError(
                f"a budget of {text.strip()} needs --speed, the FLOPs per second that your training reaches on one GPU "
                "(6 times N times its tokens per second), such as --speed 180T"
            )
        if float(hours[1]) == 0:
            raise ValueError(f"needed more than 0 hours, got {text!r}")
        return float(hours[1]) * 3600 * speed
    if speed is not None:
        raise ValueError(f"--speed is for a budget in hours, such as 500h, got {text!r}: leave it out")
    share = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", text)
    if share:
        value = float(share[1]) / 100
        if not 0 < value < 1:
            raise ValueError(f"needed a share above 0% and below 100%, got {text!r}")
        return value * target_flops
    try:
        return read_count(text)
    except ValueError as error:
        raise ValueError(
            f"needed a share of the target's compute such as 1%, FLOPs such as 6e20, or GPU-hours such as 500h, got "
            f"{text!r}"
        ) from error


def plan_study(path: Path, spend: str, speed: float | None = None) -> PlannedStudy:
    """Plan the runs of a study file for its target.

    A `ResizableTrainer` is given the sizes that suit best. Another keeps its own.

    Args:
        path: The study file, with a [target] table.
        spend: The budget, see `read_spend`.
        speed: FLOPs per second on one GPU, for a budget in hours.

    Raises:
        StudyError: If the file contains mistakes.
        ValueError: If it has no target, or the budget or the space is unusable.
    """
    study, trainer = load_study(path)
    if study.target is None:
        raise ValueError(f"{path}: a plan needs a [target] table, the large run that the settings are for")
    target = trainer.target(**study.target)
    options: Mapping[float, Any] = dict.fromkeys(map(float, trainer.sizes))
    if isinstance(trainer, ResizableTrainer):
        options = trainer.list_sizes(target.N)
    inputs = find_inputs(
        study.distributions, study.probes, trainer, Fidelity(min(trainer.sizes), study.search.tokens.min)
    )
    plan = make_plan(
        target,
        flops=read_spend(spend, target.C, speed),
        space=study.distributions,
        inputs=inputs,
        sizes=sorted(options),
        seed=study.seed,
    )
    return _fit_trainer(plan, trainer, options)


def _fit_trainer(plan: Plan, trainer: Trainer, options: Mapping[float, Any]) -> PlannedStudy:
    """Return the plan with the trainer settings that it needs."""
    if not isinstance(trainer, ResizableTrainer):
        return PlannedStudy(plan, {}, tuple(sorted(trainer.sizes)))
    sizes = plan.design.sizes
    return PlannedStudy(plan, {trainer.size_setting: [options[size] for size in sizes]}, sizes)


def write_planned_study(source: Path, out: Path, planned: PlannedStudy) -> None:
    """Write a study file whose [search] table is a plan. Its other tables and their comments stay.

    Args:
        source: The study file that was planned.
        out: The file to write; it may be the same.
        planned: The plan.

    Raises:
        ValueError: If `out` is another study that exists.
        StudyError: If the result contains mistakes. Nothing is written then.
    """
    import tomlkit

    if out.exists() and out.resolve() != source.resolve():
        raise ValueError(f"{out} exists: remove it, or choose another name")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")
    document = tomlkit.parse(source.read_text(encoding="utf-8"))
    design, search = planned.plan.design, tomlkit.table()
    search.add(tomlkit.comment(f"planned for {planned.plan.share:.2%} of the target's compute by `hpo plan`"))
    search.add("scheduler", "law")
    tokens = tomlkit.inline_table()
    tokens.update({"min": design.tokens[0], "max": design.tokens[1]})
    search.add("tokens", tokens)
    search.add("eta", design.eta)
    search.add("spread", design.spread)
    groups = tomlkit.array().multiline(True)
    for group in design.groups:
        row = tomlkit.inline_table()
        row.update({"size": planned.sizes.index(group.N), "tokens": group.tokens, "runs": group.runs})
        groups.append(row)
    search.add("groups", groups)
    document["search"] = search
    if planned.settings:
        document["trainer"].update(planned.settings)
    text = tomlkit.dumps(document)
    try:
        StudyConfig.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise StudyError(str(out), explain_errors(error, StudyConfig)) from error
    write_atomically(out, text)
