"""The `proxies` command: check the parametrization, train one proxy, grow one (grow_command), launch the target (launch_command)."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import typer

from proxies.cli import grow, launch
from proxies.cli.shared import Study, configured, interrupted, numbers, read_family
from scaling.common.cli import DryRun, Json, make_app, refusing
from scaling.common.signals import exit_code_of, interrupt_on_sigterm

app = make_app(__doc__)


@app.command()
def check(
    study: Study,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    parametrization: Annotated[str | None, typer.Option(help="'mup' or 'standard'; default: the study's")] = None,
    widths: Annotated[
        str | None, typer.Option(help="such as 32,64,128; default: half the base width to eight times it")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="such as 2,4,8, at base width; default: 1 to 8 times base_layers, if it is set")
    ] = None,
    engine: Annotated[Literal["plain", "compile", "ddp", "fsdp2"], typer.Option(help="what runs the steps")] = "plain",
    ranks: Annotated[int, typer.Option(min=1, help="processes of ddp and fsdp2")] = 2,
    plot: Annotated[Path | None, typer.Option(help="a figure, .png, .pdf or .svg")] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="where the outcome goes that an optimizer without a verified rule needs, .json")
    ] = None,
    as_json: Json = False,
) -> None:
    """The coordinate check: do activations move alike at every width and depth? Exit code 1 when they do not.

    Example: proxies check studies/quickstart.toml
    """
    from proxies.config.optimizer_gate import CHECK_STEPS, CHECK_STEPS_BY_OPTIMIZER
    from proxies.diagnostics.certificate import write_certificate
    from proxies.diagnostics.coord_check import coordinate_check

    with refusing():
        family, _ = read_family(study)
        config = configured(
            family, family.base_width, [f"parametrization={parametrization}"] if parametrization else []
        )
        head, base = config.d_head * config.q_per_kv, config.base_width
        usual = [w for w in (base // 2, *(base * 2**i for i in range(4))) if w % head == 0]
        if plot is not None:
            from proxies.diagnostics.figures import check_figure, draw_check

            check_figure(plot)
        if certificate is not None and not certificate.parent.is_dir():
            raise ValueError(f"--certificate: needed a path in an existing folder, got {certificate}")
        result = coordinate_check(
            config,
            numbers("--widths", widths) or usual,
            depths=numbers("--depths", depths),
            seeds=seeds,
            steps=CHECK_STEPS_BY_OPTIMIZER.get(config.optimizer, CHECK_STEPS),
            engine=engine,
            ranks=ranks,
        )
    if plot is not None:
        draw_check(result, plot)
    if certificate is not None:
        write_certificate(certificate, config, result)
    typer.echo(json.dumps(result.json) if as_json else result.text)
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def transfer(
    study: Study,
    over: Annotated[Literal["width", "depth"], typer.Option(help="what grows")] = "width",
    sizes: Annotated[
        str | None, typer.Option(help="such as 32,64,128; default: the study's widths, or 1, 2 and 4 times its depth")
    ] = None,
    tokens: Annotated[int, typer.Option(help="of every run, cooldown included")] = 204_800,
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    control: Annotated[bool, typer.Option(help="also the standard table (over depth: no depth rule)")] = True,
    workers: Annotated[int, typer.Option(min=1, help="processes of one thread each")] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of any setting")] = None,
    plot: Annotated[Path | None, typer.Option(help="a figure, .png, .pdf or .svg")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Does the best learning rate stay as models grow? Short runs on a grid; kept, so that a second call goes on.

    Exit code 1 when the shift, the regret or the exponent is beyond its limit.

    Example: proxies transfer studies/quickstart.toml --sizes 32,64,128 --dry-run
    """
    from proxies.diagnostics.lr_transfer import make_arms, estimate_cost
    from proxies.diagnostics.lr_transfer import transfer as run

    with refusing():
        family, toml = read_family(study)
        config = configured(family, family.base_width, set_ or [])
        layers = config.base_layers or config.n_layers
        chosen = numbers("--sizes", sizes) or (
            list(family.widths) if over == "width" else [layers, 2 * layers, 4 * layers]
        )
        flops, seconds = estimate_cost(make_arms(config, over, chosen, control=control), tokens, seeds)
        runs = toml.parent / toml.stem / "transfer" / "runs.jsonl"
        typer.echo(
            f"about {flops:.2g} FLOPs, {seconds / 60:.1f} core-minutes, less what {runs} holds of it; "
            f"{seconds / 60 / workers:.1f} minutes with {workers} workers",
            err=True,
        )
        if dry_run:
            return
        if plot is not None:
            from proxies.diagnostics.figures import check_figure, draw_transfer

            check_figure(plot)
        try:
            with interrupt_on_sigterm():
                report = run(
                    config,
                    chosen,
                    tokens,
                    over=over,
                    seeds=seeds,
                    control=control,
                    runs=runs,
                    workers=workers,
                    progress=lambda text: typer.echo(text, err=True),
                )
        except KeyboardInterrupt as stop:
            typer.echo(f"stopped; the same command goes on with the runs in {runs}", err=True)
            raise typer.Exit(exit_code_of(stop)) from stop
    if plot is not None:
        draw_transfer(report, plot)
    typer.echo(json.dumps(report.json) if as_json else report.text)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def train(
    study: Study,
    width: Annotated[int, typer.Option(help="d_model")],
    tokens: Annotated[int, typer.Option(help="how long, cooldown included")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of any setting, such as lr=0.01")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="checkpoint of a shorter or interrupted run to go on from")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="what `proxies grow` has written, to start from")] = None,
    save: Annotated[Path | None, typer.Option(help="where the checkpoint goes")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="where the state of an interrupted run goes; gone on from if it is there")
    ] = None,
    peak_flops: Annotated[
        float | None, typer.Option(min=1, help="of the device, per second, for MFU; known for H100 and A100")
    ] = None,
) -> None:
    """Train one proxy of a study's family outside the search; one line of JSON per measurement.

    Example: proxies train studies/quickstart.toml --width 64 --tokens 200000 --set lr=0.0078
    """
    from dataclasses import asdict

    from proxies.growth.files import InitialState, read_grown
    from proxies.training.loop import train as run
    from proxies.training.throughput import Usage

    with refusing():
        family, _ = read_family(study)
        config = configured(family, width, set_ or [])
        if resume is not None and init is not None:
            raise ValueError("needed --resume or --init, got both: a resumed run has its weights already")
        resume = keep if keep is not None and keep.exists() else resume
        start = read_grown(init, config) if init is not None and resume is None else InitialState()
        usage = Usage(config, peak_flops)
        points = run(config, tokens, resume=resume, save=save, keep=keep, init=start.weights, moments=start.moments)
    last = None
    try:
        with interrupt_on_sigterm(), closing(points):
            for last in usage.watch(points):
                typer.echo(json.dumps(asdict(last)))
    except KeyboardInterrupt as stop:
        raise interrupted(stop, keep) from stop
    typer.echo(str(usage), err=True)
    if last is not None and last.diverged:
        raise typer.Exit(1)


@app.command()
def autolrs(
    study: Study,
    width: Annotated[int, typer.Option(help="d_model")],
    tokens: Annotated[int, typer.Option(help="how long, without what the search adds")],
    stages: Annotated[int, typer.Option(min=1, help="stages of one rate each, before the cooldown")] = 2,
    overhead: Annotated[float, typer.Option(min=0, help="tokens of the search over those trained, at most")] = 0.3,
    set_: Annotated[list[str] | None, typer.Option("--set", help="name=value of any setting, such as lr=0.01")] = None,
    save: Annotated[Path | None, typer.Option(help="where the checkpoint goes")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="where the state after every stage goes; gone on from if it is there")
    ] = None,
) -> None:
    """Train one proxy with a learning rate searched stage by stage; one line of JSON per stage. It lost to a tuned WSD.

    Example: proxies autolrs studies/quickstart.toml --width 64 --tokens 800000 --set batch_seqs=4
    """
    from dataclasses import asdict

    from proxies.training.auto_lr import autolrs as search

    with refusing():
        family, _ = read_family(study)
        found = search(
            configured(family, width, set_ or []), tokens, stages=stages, overhead=overhead, save=save, keep=keep
        )
    last = None
    try:
        with interrupt_on_sigterm(), closing(found):
            for last in found:
                typer.echo(json.dumps(asdict(last)))
    except KeyboardInterrupt as stop:
        raise interrupted(stop, keep) from stop
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
    from proxies.model.export import format_json, format_megatron, format_table, format_torchtitan
    from proxies.model.recipe import Recipe

    tuned: int | None
    with refusing():
        if study.endswith(".json"):
            from proxies.launch.plan import read_plan

            plan = read_plan(Path(study))
            if plan.config is None:
                raise ValueError(f"{study} is for a command, whose parameters have no rules here")
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
            "table": lambda: format_table(moved, length),
            "json": lambda: format_json(moved, length),
            "torchtitan": lambda: format_torchtitan(moved),
            "megatron": lambda: format_megatron(moved, length),
        }[form]()
    typer.echo(text)


app.command()(grow.grow)
app.command()(launch.launch)


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(app())
