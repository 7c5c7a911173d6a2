"""The plan of a study file with scheduler 'law', and how its trainer's settings relate to the law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution

from hpo.planning.design import Design, Group
from hpo.planning.law_search import LawInputs, LawPlan, find_law_inputs
from hpo.study.schema import SearchTable
from hpo.study.trainer import Trainer
from scaling.laws.compute import Fidelity

# Relative difference up to which two numbers of a trainer are the same.
TOLERANCE = 1e-6


def make_law_plan(
    search: SearchTable, space: Mapping[str, BaseDistribution], probes: Sequence[Mapping[str, Any]], trainer: Trainer
) -> LawPlan:
    """Return the plan of a study whose scheduler is 'law'.

    Args:
        search: The study's [search] table.
        space: The search space.
        probes: Some settings of the space.
        trainer: The study's trainer.

    Raises:
        ValueError: If the trainer lacks a size of the plan, or the space has no law.
    """
    sizes = sorted(trainer.sizes)
    if missing := sorted({group.size for group in search.groups if group.size >= len(sizes)}):
        raise ValueError(
            f"the trainer has {len(sizes)} sizes, numbered from 0, and search.groups names {missing}: run `hpo plan` "
            "again"
        )
    groups = tuple(Group(float(sizes[group.size]), group.tokens, group.runs) for group in search.groups)
    inputs = find_inputs(space, probes, trainer, Fidelity(sizes[0], search.tokens.min))
    return LawPlan(Design(groups, search.spread, search.eta), inputs)


def find_inputs(
    space: Mapping[str, BaseDistribution], probes: Sequence[Mapping[str, Any]], trainer: Trainer, fidelity: Fidelity
) -> LawInputs:
    """Find how the searched parameters relate to learning rate and batch size, from what the trainer says of its runs.

    Args:
        space: The search space.
        probes: Some settings of the space.
        trainer: The study's trainer.
        fidelity: A size and length that it can train.

    Raises:
        ValueError: If the space has no learning rate or batch size, or others, or the trainer's differ from them.
    """
    described = [trainer.describe(probe, fidelity) for probe in probes]
    fixed = [float(run.get("batch_tokens", math.nan)) for run in described]
    mup = described[0].get("parametrization") == "mup"
    inputs = find_law_inputs(space, 1, mup=mup, batch_tokens=fixed[0] if len(set(fixed)) == 1 else None)
    pairs = list(zip(described, probes, strict=True))
    rates = [float(run.get("lr", math.nan)) / float(probe[inputs.lr]) for run, probe in pairs]
    if not all(abs(rate - 1) <= TOLERANCE for rate in rates):
        raise ValueError(
            f"space.{inputs.lr}: a plan by laws needs the trainer's learning rate, but its `describe` has another one"
        )
    if inputs.batch is None:
        return inputs
    units = [float(run.get("batch_tokens", math.nan)) / float(probe[inputs.batch]) for run, probe in pairs]
    if not (0 < min(units) <= max(units) <= min(units) * (1 + TOLERANCE)):
        raise ValueError(
            f"space.{inputs.batch}: a plan by laws needs batch_tokens in proportion to it, but its `describe` "
            f"has {', '.join(f'{unit:g}' for unit in units)} tokens for each unit"
        )
    return LawInputs(inputs.lr, inputs.batch, units[0], inputs.mup)
