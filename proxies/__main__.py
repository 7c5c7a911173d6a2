"""The `proxies` command: check the parametrization, train or grow a proxy, launch the target run."""

from __future__ import annotations

import logging
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import typer

from proxies.cli import grow, launch
from proxies.cli.shared import Study, configure_proxy, parse_numbers, read_family, report_interrupt
from scaling.common.cli import DryRun, Json, make_app, refusing, say
from scaling.common.json_text import dump_json
from scaling.common.signals import exit_code_of, interrupt_on_sigterm

logger = logging.getLogger("muscale.proxies")

app = make_app(__doc__)


@app.command()
def check(
    study: Study,
    seeds: Annotated[int, typer.Option(min=1, help="random seeds")] = 3,
    parametrization: Annotated[str | None, typer.Option(help="'mup' or 'standard'; default: the study's")] = None,
    widths: Annotated[
        str | None, typer.Option(help="widths, such as 32,64,128; default: half the base width to eight times it")
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(help="depths at base width, such as 2,4,8; default: 1 to 8 times base_layers, if it is set"),
    ] = None,
    engine: Annotated[Literal["plain", "compile", "ddp", "fsdp2"], typer.Option(help="how steps are run")] = "plain",
    ranks: Annotated[int, typer.Option(min=1, help="processes of ddp and fsdp2")] = 2,
    plot: Annotated[Path | None, typer.Option(help="write a figure, .png, .pdf or .svg")] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="write the result that an optimizer without a verified rule needs, .json")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check whether activations change alike at every width and depth (coordinate check).

    Exit code 1 if they do not.

    Example: proxies check studies/quickstart.toml
    """
    from proxies.config.optimizer_gate import CHECK_STEPS, CHECK_STEPS_BY_OPTIMIZER
    from proxies.diagnostics.certificate import write_certificate
    from proxies.diagnostics.coord_check import coordinate_check

    with refusing():
        family, _ = read_family(study)
        config = configure_proxy(
            family, family.base_width, [f"parametrization={parametrization}"] if parametrization else []
        )
        head, base = config.d_head * config.q_per_kv, config.base_width
        default_widths = [w for w in (base // 2, *(base * 2**i for i in range(4))) if w % head == 0]
        if plot is not None:
            from proxies.diagnostics.figures import check_figure, draw_check

            check_figure(plot)
        if certificate is not None and not certificate.parent.is_dir():
            raise ValueError(f"--certificate: needed a path in an existing folder, got {certificate}")
        result = coordinate_check(
            config,
            parse_numbers("--widths", widths) or default_widths,
            depths=parse_numbers("--depths", depths),
            seeds=seeds,
            steps=CHECK_STEPS_BY_OPTIMIZER.get(config.optimizer, CHECK_STEPS),
            engine=engine,
            ranks=ranks,
        )
    if plot is not None:
        draw_check(result, plot)
    if certificate is not None:
        write_certificate(certificate, config, result)
    typer.echo(dump_json(result.json) if as_json else result.text)
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def transfer(
    study: Study,
    over: Annotated[Literal["width", "depth"], typer.Option(help="the axis along which models grow")] = "width",
    sizes: Annotated[
        str | None,
        typer.Option(help="sizes, such as 32,64,128; default: the study's widths, or 1, 2 and 4 times its depth"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of every run, cooldown included")] = 204_800,
    seeds: Annotated[int, typer.Option(min=1, help="random seeds")] = 2,
    control: Annotated[
        bool, typer.Option(help="also train standard parametrization (over depth: no depth rule)")
    ] = True,
    workers: Annotated[int, typer.Option(min=1, help="processes, of one thread each")] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", help="change any setting, NAME=VALUE")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a figure, .png, .pdf or .svg")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure whether the best learning rate stays the same as models grow, by short runs on a grid.

    Runs are kept, so a second call continues. Exit code 1 if the shift, the regret or the exponent exceeds its limit.

    Example: proxies transfer studies/quickstart.toml --sizes 32,64,128 --dry-run
    """
    from proxies.config.steps import plan_steps
    from proxies.diagnostics.lr_transfer import estimate_cost, make_arms
    from proxies.diagnostics.lr_transfer import transfer as measure_transfer

    with refusing():
        family, toml = read_family(study)
        config = configure_proxy(family, family.base_width, set_ or [])
        layers = config.base_layers or config.n_layers
        chosen = parse_numbers("--sizes", sizes) or (
            list(family.widths) if over == "width" else [layers, 2 * layers, 4 * layers]
        )
        # Before anything is measured, each run must be long enough for its schedule.
        plan_steps(config, tokens)
        flops, seconds = estimate_cost(make_arms(config, over, chosen, control=control), tokens, seeds)
        runs = toml.parent / toml.stem / "transfer" / "runs.jsonl"
        cost = (
            f"about {flops:.2g} FLOPs, {seconds / 60:.1f} core-minutes, less the runs that are in {runs} already; "
            f"{seconds / 60 / workers:.1f} minutes with {workers} workers"
        )
        if dry_run:
            say(cost)
            return
        logger.info(cost)
        if plot is not None:
            from proxies.diagnostics.figures import check_figure, draw_transfer

            check_figure(plot)
        try:
            with interrupt_on_sigterm():
                report = measure_transfer(
                    config,
                    chosen,
                    tokens,
                    over=over,
                    seeds=seeds,
                    control=control,
                    runs=runs,
                    workers=workers,
                    progress=logger.info,
                )
        except KeyboardInterrupt as stop:
            say(f"stopped; the same command continues with the runs in {runs}")
            raise typer.Exit(exit_code_of(stop)) from stop
    if plot is not None:
        draw_transfer(report, plot)
    typer.echo(dump_json(report.json) if as_json else report.text)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def train(
    study: Study,
    width: Annotated[int, typer.Option(help="d_model")],
    tokens: Annotated[int, typer.Option(help="training tokens, cooldown included")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="change any setting, such as lr=0.01")] = None,
    resume: Annotated[Path | None, typer.Option(help="checkpoint of a shorter or interrupted run to continue")] = None,
    init: Annotated[Path | None, typer.Option(help="initial state, written by `proxies grow`")] = None,
    save: Annotated[Path | None, typer.Option(help="where the checkpoint goes")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="where the state of an interrupted run goes; continued from if it exists")
    ] = None,
    peak_flops: Annotated[
        float | None, typer.Option(min=1, max=1e30, help="peak FLOP/s of the device, for MFU; known for H100 and A100")
    ] = None,
) -> None:
    """Train one proxy of a study's family outside the search, and print one line of JSON per measurement.

    Example: proxies train studies/quickstart.toml --width 64 --tokens 200000 --set lr=0.0078
    """
    from dataclasses import asdict

    from proxies.growth.files import InitialState, read_grown
    from proxies.training.loop import train as train_proxy
    from proxies.training.throughput import Usage

    with refusing():
        family, _ = read_family(study)
        config = configure_proxy(family, width, set_ or [])
        if resume is not None and init is not None:
            raise ValueError("needed --resume or --init, got both: a resumed run has its weights already")
        resume = keep if keep is not None and keep.exists() else resume
        start = read_grown(init, config) if init is not None and resume is None else InitialState()
        usage = Usage(config, peak_flops)
        points = train_proxy(
            config, tokens, resume=resume, save=save, keep=keep, init=start.weights, moments=start.moments
        )
    last = None
    try:
        with interrupt_on_sigterm(), closing(points):
            for last in usage.watch(points):
                typer.echo(dump_json(asdict(last)))
    except KeyboardInterrupt as stop:
        raise report_interrupt(stop, keep) from stop
    logger.info(str(usage))
    if last is not None and last.diverged:
        raise typer.Exit(1)


@app.command()
def autolrs(
    study: Study,
    width: Annotated[int, typer.Option(help="d_model")],
    tokens: Annotated[int, typer.Option(help="training tokens, without those that the search adds")],
    stages: Annotated[int, typer.Option(min=1, help="stages with one rate each, before the cooldown")] = 2,
    overhead: Annotated[
        float, typer.Option(min=0, max=1000, help="at most this many tokens of search per training token")
    ] = 0.3,
    set_: Annotated[list[str] | None, typer.Option("--set", help="change any setting, such as lr=0.01")] = None,
    save: Annotated[Path | None, typer.Option(help="where the checkpoint goes")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="where the state after every stage goes; continued from if it exists")
    ] = None,
) -> None:
    """Train one proxy with a learning rate searched stage by stage, and print one line of JSON per stage.

    It lost to a tuned WSD schedule (docs/math.md §3).

    Example: proxies autolrs studies/quickstart.toml --width 64 --tokens 800000 --set batch_seqs=4
    """
    from dataclasses import asdict

    from proxies.training.auto_lr import autolrs as search_rates

    with refusing():
        family, _ = read_family(study)
        points = search_rates(
            configure_proxy(family, width, set_ or []), tokens, stages=stages, overhead=overhead, save=save, keep=keep
        )
    last = None
    try:
        with interrupt_on_sigterm(), closing(points):
            for last in points:
                typer.echo(dump_json(asdict(last)))
    except KeyboardInterrupt as stop:
        raise report_interrupt(stop, keep) from stop
    if last is not None and last.diverged:
        raise typer.Exit(1)


@app.command()
def recipe(
    study: Annotated[
        str, typer.Argument(metavar="STUDY.toml | NAME | PLAN.json", help="a study's family, or the target of a plan")
    ],
    width: Annotated[int | None, typer.Option(min=1, help="d_model to carry the values to")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="n_layers to carry them to (CompleteP)")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="sequences per step to carry them to")] = None,
    tuned_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of the runs that the values were tuned with")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="tokens to carry them to")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="change any tuned setting, such as lr=0.01")] = None,
    form: Annotated[
        Literal["table", "json", "torchtitan", "megatron"], typer.Option("--for", help="output format")
    ] = "table",
) -> None:
    """Show the initial std, learning rate, decay, epsilon and multiplier of every kind of parameter.

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
            base, tuned = configure_proxy(family, family.base_width, set_ or []), tuned_tokens
        if tokens is not None and tuned is None:
            raise ValueError("--tokens: needed --tuned-tokens, too, the tokens of the runs that the values come from")
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
    """Run the command."""
    app()


if __name__ == "__main__":
    sys.exit(app())
