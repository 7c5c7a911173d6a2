"""`hpo plan`: choose the small runs for a large target, and write them into a study file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.common.cli import Json, refusing, say
from scaling.common.json_text import dump_json
from scaling.common.quantities import read_count

if TYPE_CHECKING:
    from hpo.study.plan import Plan

# Ranges that are planned for without a study file: they hold the best settings of public runs of every size.
LR_RANGE, BATCH_RANGE = (1e-5, 0.1), (2**13, 2**25)
# Other budgets that are shown beside the one that was asked for.
ALTERNATIVES = (0.5, 2.0)


def plan_command(
    study: Annotated[
        str | None,
        typer.Argument(metavar="STUDY.toml | NAME", help="a study file with [trainer], [space] and [target]"),
    ] = None,
    spend: Annotated[
        str,
        typer.Option(
            help="what all runs may cost: a share of the target's compute (1%), FLOPs (6e20), GPU-hours (500h)"
        ),
    ] = "1%",
    speed: Annotated[
        str | None, typer.Option(help="FLOPs per second of your training on one GPU (180T), for GPU-hours")
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            help="N of the target without a study, such as 7B, or its layers x width x vocabulary: 32x4096x32000"
        ),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="its training tokens, such as 1.4T")] = None,
    mup: Annotated[bool, typer.Option("--mup", help="learning rates are those of a base width under muP")] = False,
    out: Annotated[
        Path | None, typer.Option(help="write the study with the plan to this file; it may be STUDY.toml itself")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the search, without a study")] = 0,
    as_json: Json = False,
) -> None:
    """Choose sizes, lengths and numbers of small runs, so that their law says most about a large target.

    With a study file, the sizes are those that its trainer can have, and --out writes the study that runs the plan.

    Example: hpo plan --params 7B --tokens 1.4T --spend 1%
    """
    with refusing():
        problems = []
        if study is None and (params is None or tokens is None):
            problems.append("needed a study file, or --params and --tokens of the target")
        if study is not None and (params is not None or tokens is not None or mup):
            problems.append("a study file has its own target: leave out --params, --tokens and --mup")
        if study is None and out is not None:
            problems.append("--out writes a study, so it needs a study file with a trainer to start from")
        flops_per_second = None
        try:
            flops_per_second = None if speed is None else read_count(speed)
        except ValueError as error:
            problems.append(f"--speed: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        if study is None:
            assert params is not None
            assert tokens is not None
            _show(_plan_alone(read_params(params), read_count(tokens), spend, flops_per_second, mup, seed), as_json)
            return
        from hpo.study.plan_file import plan_study, write_planned_study
        from scaling.common.studies import find_study_file

        path = find_study_file(study)
        planned = plan_study(path, spend, flops_per_second)
        if out is not None:
            write_planned_study(path, out, planned)
    _show(planned.plan, as_json)
    if out is not None:
        say(f"written to {out}; next: `hpo launch {out}`")


def read_params(text: str) -> float:
    """Return N of a count such as 7B, or of a transformer's shape as layers x width x vocabulary.

    A shape has 12 width² parameters in each layer (Kaplan et al., arXiv 2001.08361), and the unembedding.

    Raises:
        ValueError: If it is neither.
    """
    shape = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*x\s*(\d+)\s*", text)
    if shape and all(int(number) > 0 for number in shape.groups()):
        layers, width, vocabulary = map(float, shape.groups())
        return 12 * layers * width**2 + width * vocabulary
    try:
        return read_count(text)
    except ValueError as error:
        raise ValueError(
            f"--params: needed a count such as 7B, or layers x width x vocabulary such as 32x4096x32000, got {text!r}"
        ) from error


def _plan_alone(N: float, D: float, spend: str, speed: float | None, mup: bool, seed: int) -> Plan:
    """Return the plan for a target of any model family, with wide ranges."""
    from optuna.distributions import FloatDistribution, IntDistribution

    from hpo.study.plan import plan
    from hpo.study.plan_file import read_spend

    space = {
        "lr": FloatDistribution(*LR_RANGE, log=True),
        "batch_tokens": IntDistribution(*BATCH_RANGE, log=True),
    }
    parametrization: Any = "mup" if mup else "standard"
    flops = read_spend(spend, 6 * N * D, speed)
    return plan(N, D, flops=flops, space=space, parametrization=parametrization, seed=seed)


def _show(plan: Plan, as_json: bool) -> None:
    if as_json:
        typer.echo(dump_json(plan.to_dict()))
        return
    typer.echo(plan)
    typer.echo("\nat other budgets:")
    for factor in ALTERNATIVES:
        typer.echo(f"  {plan.describe_alternative(factor)}")
