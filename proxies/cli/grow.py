"""`proxies grow`: the state of a larger model from a trained proxy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from proxies.cli.grow_plan import Options, answer
from proxies.config.growth_rules import GrowthMethod, check_break_even, compute_stacking_tokens
from scaling.common.cli import DryRun, Json, Uri, refusing, say

if TYPE_CHECKING:
    from proxies.config.proxy import ProxyConfig

PER_PARAMETER = 20  # tokens, of a target whose length is not given
PLAN = "With --plan"


def grow(
    checkpoint: Annotated[Path | None, typer.Argument(help="a trained proxy, a file or a folder")] = None,
    out: Annotated[
        Path | None, typer.Option(help="where the grown state goes: a file .pt, or a folder of shards")
    ] = None,
    width: Annotated[int | None, typer.Option(help="d_model of the grown model; default: the proxy's")] = None,
    layers: Annotated[int | None, typer.Option(help="its n_layers, a multiple; default: the proxy's")] = None,
    method: Annotated[GrowthMethod, typer.Option(help="see docs/math.md §8")] = "shrink-pad-perturb",
    shrink: Annotated[float, typer.Option(min=0, max=1, help="of shrink-pad-perturb")] = 0.4,
    noise: Annotated[float | None, typer.Option(min=0, help="default: the method's own")] = None,
    which: Annotated[
        Literal["annealed", "trunk"] | None,
        typer.Option(help="weights after the cooldown or before it; default: annealed, with --moments trunk"),
    ] = None,
    moments: Annotated[bool, typer.Option("--moments", help="Adam's, too (duplicate without noise)")] = False,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="of the run to come, for when to stack; default: 20 per parameter")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="STUDY.toml | NAME",
            help="is it worth it for this study's [target]? Ask a small pair",
            rich_help_panel=PLAN,
        ),
    ] = None,
    pair: Annotated[
        str | None, typer.Option(help="ask about these widths, such as 64,96", rich_help_panel=PLAN)
    ] = None,
    stand_in: Annotated[
        str | None, typer.Option("--small", help="the pair to train; default: half of it", rich_help_panel=PLAN)
    ] = None,
    source: Annotated[
        int | None, typer.Option("--from", help="width of the base; default: the largest proxy's", rich_help_panel=PLAN)
    ] = None,
    at: Annotated[
        float | None, typer.Option(help="tokens per parameter of the target; default: its own", rich_help_panel=PLAN)
    ] = None,
    horizons: Annotated[str, typer.Option(help="others to be told about", rich_help_panel=PLAN)] = "2,5,10,20",
    base: Annotated[
        float | None,
        typer.Option(help="tokens per parameter of the base; default: the longest proxies'", rich_help_panel=PLAN),
    ] = None,
    seeds: Annotated[int, typer.Option(help="of the runs that decide", rich_help_panel=PLAN)] = 3,
    budget: Annotated[float, typer.Option(help="runs to --at for each search", rich_help_panel=PLAN)] = 6.0,
    methods: Annotated[
        str | None, typer.Option(help="default: all that the growth allows", rich_help_panel=PLAN)
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="a setting of the family", rich_help_panel=PLAN),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes of one thread", rich_help_panel=PLAN)] = 1,
    count_base: Annotated[
        bool, typer.Option("--count-base", help="the gain must pay for the base model, too", rich_help_panel=PLAN)
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    tracking_uri: Uri = None,
) -> None:
    """Grow a trained proxy into a wider or deeper model of its family; `proxies train --init` starts from it.

    With --plan nothing is grown: small pairs of the same growth are trained to tell whether it is worth it (docs/growth.md).

    Example: proxies grow studies/quickstart/checkpoints/0012-442368.pt --width 128 --out grown.pt
    """
    if plan is not None:
        given = Options(
            pair,
            stand_in,
            source,
            at,
            horizons,
            base,
            seeds,
            budget,
            methods,
            changes or [],
            workers,
            count_base,
            dry_run,
            as_json,
            tracking_uri,
        )
        answer(plan, given, checkpoint)
        return
    from proxies.growth.files import open_trained, write_grown

    with refusing():
        if checkpoint is None or out is None:
            raise ValueError("needed a checkpoint and --out to grow it, or --plan STUDY to ask whether it is worth it")
        trained = open_trained(checkpoint, which or ("trunk" if moments else "annealed"))
        small = trained.config
        large = enlarged(small, width, layers)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "N grows")  # said below, in a line of its own
            try:
                write_grown(trained, large, out, method=method, shrink=shrink, noise=noise, moments=moments)
            except OSError as error:
                say(f"error: {error}")
                raise typer.Exit(1) from error
    if said := check_break_even(small, large):
        say(f"warning: {said}")
    if large.n_layers > small.n_layers:
        length = tokens or PER_PARAMETER * large.counts.N
        say(when_to_stack(large, length, trained.tokens))
    typer.echo(f"{out}: N {large.counts.N:,} from N {small.counts.N:,} by {method}{', moments too' if moments else ''}")


def enlarged(small: ProxyConfig, width: int | None, layers: int | None) -> ProxyConfig:
    """The family's model of this size. Of another depth, it has the small one's base, or that depth as its base (CompleteP)."""
    from proxies.config.proxy import ProxyConfig

    if width is None and layers is None:
        raise ValueError("needed --width, --layers or both: what is to grow")
    size = {"d_model": width or small.d_model, "n_layers": layers or small.n_layers}
    if size["n_layers"] != small.n_layers:
        size["base_layers"] = small.base_layers or small.n_layers
    return ProxyConfig.model_validate(small.model_dump() | size)


def when_to_stack(large: ProxyConfig, tokens: int, trained: int) -> str:
    """What G_stack's fit says about the time of growth, and whether it can be meant for a run of this size."""
    best = compute_stacking_tokens(large.counts.N, 6.0 * large.counts.N * tokens)
    text = f"stacking for N {large.counts.N:,} and {tokens:,} tokens: after {best:,.3g} tokens by G_stack's fit (arXiv 2405.15319), here after {trained:,}"
    return text if best < tokens else f"{text}; more than the run has, so it is far outside what was fitted: no advice"
