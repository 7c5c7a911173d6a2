"""The `proxies` command: check the parametrization, train one proxy, grow one, launch the target."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scaling.cli import DryRun, Json, Uri, interrupted_code, refusing, sigterm_as_interrupt

if TYPE_CHECKING:
    from proxies.config import ProxyConfig
    from proxies.family import ProxyFamily

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Study = Annotated[str, typer.Argument(metavar="STUDY.toml | NAME", help="a study file, or the name of one in studies/")]


@app.command()
def check(
    study: Study,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    parametrization: Annotated[str | None, typer.Option(help="'mup' or 'standard'; default: the study's")] = None,
    as_json: Json = False,
) -> None:
    """The coordinate check: do activations move alike at every width? Exit code 1 when they do not.

    Example: proxies check studies/quickstart.toml
    """
    from proxies.checks import coordinate_check

    with refusing():
        family, _ = read_family(study)
        settings = {"parametrization": parametrization} if parametrization else {}
        config = family.member(family.base_width, settings)
        config = type(config).model_validate(config.model_dump())
        widths = [
            w for w in (config.base_width // 2, *(config.base_width * 2**i for i in range(4))) if w % config.d_head == 0
        ]
        result = coordinate_check(config, widths, seeds=seeds)
    if as_json:
        typer.echo(json.dumps({"passed": result.passed, "widths": widths, "slopes": slopes(result)}))
    else:
        typer.echo(result.text)
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def train(
    study: Study,
    width: Annotated[int, typer.Option(help="d_model")],
    tokens: Annotated[int, typer.Option(help="how long, cooldown included")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of any setting, such as lr=0.01")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="checkpoint of a shorter or interrupted run to go on from")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="where the checkpoint goes")] = None,
) -> None:
    """Train one proxy of a study's family outside the search; one line of JSON per measurement.

    Example: proxies train studies/quickstart.toml --width 64 --tokens 200000 --set lr=0.0078
    """
    from dataclasses import asdict

    from proxies.training import train as run

    with refusing():
        family, _ = read_family(study)
        config = configured(family, width, set_ or [])
        points = run(config, tokens, resume=resume, save=save)
    last = None
    for last in points:
        typer.echo(json.dumps(asdict(last)))
    if last is not None and last.diverged:
        raise typer.Exit(1)


@app.command()
def recipe(
    study: Annotated[
        str, typer.Argument(metavar="STUDY.toml | NAME | PLAN.json", help="a study's family, or the target of a plan")
    ],
    width: Annotated[int | None, typer.Option(help="d_model to carry the values to")] = None,
    layers: Annotated[int | None, typer.Option(help="n_layers to carry them to (CompleteP)")] = None,
    batch: Annotated[int | None, typer.Option(help="sequences per step to carry them to")] = None,
    tuned_tokens: Annotated[int | None, typer.Option(help="length of the runs that the values were tuned with")] = None,
    tokens: Annotated[int | None, typer.Option(help="length to carry them to")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="name=value of any tuned setting, such as lr=0.01")
    ] = None,
    form: Annotated[Literal["table", "json", "torchtitan", "megatron"], typer.Option("--for")] = "table",
) -> None:
    """What every kind of parameter gets: initial std, learning rate, decay, epsilon, multiplier; also for other trainers.

    Example: proxies recipe quickstart --width 1024 --set lr=0.0078 --for torchtitan
    """
    from proxies.export import as_json, as_megatron, as_table, as_torchtitan
    from proxies.recipe import Recipe

    with refusing():
        if study.endswith(".json"):
            from proxies.launch import read_plan

            if not Path(study).is_file():
                raise ValueError(f"no plan {study}")
            plan = read_plan(Path(study))
            base, tuned = plan.config, plan.tokens
        else:
            family, _ = read_family(study)
            base, tuned = configured(family, family.base_width, set_ or []), tuned_tokens
        if tokens is not None and tuned is None:
            raise ValueError("--tokens: needed --tuned-tokens, too, the length of the runs that the values come from")
        moved = Recipe(base=base, tokens=tuned or base.batch_tokens).at(
            d_model=width, n_layers=layers, batch_seqs=batch, tokens=tokens
        )
        length = tokens or tuned
        text = {
            "table": lambda: as_table(moved, length),
            "json": lambda: as_json(moved, length),
            "torchtitan": lambda: as_torchtitan(moved),
            "megatron": lambda: as_megatron(moved, length),
        }[form]()
    typer.echo(text)


@app.command()
def grow(
    checkpoint: Annotated[Path, typer.Argument(help="a trained proxy")],
    width: Annotated[int, typer.Option(help="d_model of the grown model")],
    out: Annotated[Path, typer.Option(help="where the grown state goes, a torch file")],
    method: Annotated[Literal["shrink-pad-perturb", "pad", "duplicate"], typer.Option()] = "shrink-pad-perturb",
    shrink: Annotated[float, typer.Option(min=0, max=1)] = 0.4,
    noise: Annotated[float | None, typer.Option(min=0, help="default: the method's own")] = None,
) -> None:
    """Grow a trained proxy to a larger width of its family.

    Example: proxies grow studies/quickstart/checkpoints/0012-442368.pt --width 256 --out grown.pt
    """
    import torch

    from proxies.checkpoints import load_model
    from proxies.config import ProxyConfig
    from proxies.warmstart import grow as grow_state

    with refusing():
        if not checkpoint.is_file():
            raise ValueError(f"no checkpoint {checkpoint}")
        small, model = load_model(checkpoint)
        large = ProxyConfig.model_validate(small.model_dump() | {"d_model": width})
        state = grow_state(model.state_dict(), small, large, method=method, shrink=shrink, noise=noise)
    torch.save({"config": large.model_dump(), "model": state}, out)
    typer.echo(f"{out}: N {large.counts.N:,} from N {small.counts.N:,} by {method}")


@app.command()
def launch(
    plan: Annotated[
        str, typer.Argument(metavar="STUDY.toml | NAME | PLAN.json", help="a study with a recommendation, or its plan")
    ],
    only: Annotated[Literal["warm", "scratch"] | None, typer.Option(help="one arm instead of both")] = None,
    dry_run: DryRun = False,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """Train the target with its recommended settings: warm-started from the best proxy, and a twin from scratch.

    Example: proxies launch studies/quickstart.toml
    """
    from proxies import launch as launching

    with refusing():
        if plan.endswith(".json"):
            path = Path(plan)
            if not path.is_file():
                raise ValueError(f"no plan {path}")
            made, folder = launching.read_plan(path), path.parent
        else:
            _, toml = read_family(plan)
            made = launching.make_plan(toml, uri=tracking_uri)
            folder = toml.parent / toml.stem / f"target-{made.id}"
    if only:
        try:
            with sigterm_as_interrupt():
                launching.train_arm(made, only, folder, uri=tracking_uri)
        except KeyboardInterrupt as stop:
            raise typer.Exit(interrupted_code(stop)) from stop
        return
    typer.echo(str(made), err=True)
    typer.echo(f"  about {launching.estimate_seconds(made) / 60:.1f} core-minutes", err=True)
    if dry_run:
        return
    try:
        with sigterm_as_interrupt():
            outcome = launching.launch(made, folder, uri=tracking_uri)
    except KeyboardInterrupt as stop:
        typer.echo(f"stopped; `proxies launch {folder / 'plan.json'}` goes on where it was", err=True)
        raise typer.Exit(interrupted_code(stop)) from stop
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(outcome))
        return
    for name, value in outcome.items():
        typer.echo(f"{name}: {value}")


def read_family(study: str) -> tuple[ProxyFamily, Path]:
    """The [trainer] table of a study file, by path or name, as a family of proxies."""
    import tomllib

    from pydantic import ValidationError

    from proxies.family import ProxyFamily

    path = Path(study) if study.endswith(".toml") else Path("studies") / f"{study}.toml"
    if not path.is_file():
        raise ValueError(f"no study file {path}")
    table = tomllib.loads(path.read_text()).get("trainer", {})
    try:
        return ProxyFamily.model_validate({k: v for k, v in table.items() if k != "use"}), path
    except ValidationError as error:
        raise ValueError(f"{path}, table [trainer]: {error}; `hpo validate {path}` says more") from error


def configured(family: ProxyFamily, width: int, changes: list[str]) -> ProxyConfig:
    """The family's proxy of this width with `name=value` settings in place of its own."""
    from proxies.config import ProxyConfig

    if wrong := [s for s in changes if "=" not in s]:
        raise ValueError(f"needed --set name=value, got {', '.join(wrong)}")
    settings: dict[str, Any] = dict(s.split("=", 1) for s in changes)
    return ProxyConfig.model_validate(family.model_dump(exclude={"widths"}) | {"d_model": width} | settings)


def slopes(result: Any) -> Any:
    return json.loads(json.dumps(result.slopes, default=str))


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(app())
