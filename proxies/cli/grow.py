"""`proxies grow`: grow a trained proxy into the initial state of a larger model."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from proxies.cli.grow_plan import GrowthPlanOptions, answer_question
from proxies.config.growth_rules import GrowthMethod, check_break_even, compute_stacking_tokens
from scaling.common.cli import DryRun, Json, Uri, refusing, say

if TYPE_CHECKING:
    from proxies.config.proxy import ProxyConfig

logger = logging.getLogger("muscale.proxies")

# Tokens per parameter of a target whose run length is not given.
DEFAULT_TOKENS_PER_PARAMETER = 20
# Heading of the options of --plan in the help.
PLAN = "With --plan"


def grow(
    checkpoint: Annotated[Path | None, typer.Argument(help="a trained proxy, a file or a folder")] = None,
    out: Annotated[
        Path | None, typer.Option(help="where the grown state goes: a file .pt, or a folder of shards")
    ] = None,
    width: Annotated[int | None, typer.Option(help="d_model of the grown model; default: the proxy's")] = None,
    layers: Annotated[
        int | None, typer.Option(help="n_layers of the grown model, a multiple of the proxy's; default: the proxy's")
    ] = None,
    method: Annotated[GrowthMethod, typer.Option(help="how to grow, see docs/math.md §8")] = "shrink-pad-perturb",
    shrink: Annotated[
        float, typer.Option(min=0, max=1, help="factor on the proxy's matrices (shrink-pad-perturb)")
    ] = 0.4,
    noise: Annotated[
        float | None, typer.Option(min=0, max=1000, help="amount of noise; default: the method's own")
    ] = None,
    which: Annotated[
        Literal["annealed", "trunk"] | None,
        typer.Option(help="weights after or before the cooldown; default: annealed, with --moments trunk"),
    ] = None,
    moments: Annotated[
        bool, typer.Option("--moments", help="grow Adam's moments, too (duplicate without noise)")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of the planned run, for advice on when to stack; default: 20 per parameter"),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="STUDY.toml | NAME",
            help="is it worth it for this study's target? Measured with a small pair",
            rich_help_panel=PLAN,
        ),
    ] = None,
    pair: Annotated[str | None, typer.Option(help="widths in question, such as 64,96", rich_help_panel=PLAN)] = None,
    small_pair: Annotated[
        str | None, typer.Option("--small", help="widths to train; default: half of those", rich_help_panel=PLAN)
    ] = None,
    source: Annotated[
        int | None,
        typer.Option("--from", help="width of the base model; default: the largest proxy's", rich_help_panel=PLAN),
    ] = None,
    at: Annotated[
        float | None,
        typer.Option(help="tokens per parameter of the target; default: the study's", rich_help_panel=PLAN),
    ] = None,
    horizons: Annotated[
        str, typer.Option(help="other run lengths to report, tokens per parameter", rich_help_panel=PLAN)
    ] = "2,5,10,20",
    base: Annotated[
        float | None,
        typer.Option(
            help="tokens per parameter of the base model; default: the longest proxies'", rich_help_panel=PLAN
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="seeds of the runs that decide", rich_help_panel=PLAN)] = 3,
    budget: Annotated[float, typer.Option(help="budget of each search, in runs to --at", rich_help_panel=PLAN)] = 6.0,
    methods: Annotated[
        str | None, typer.Option(help="methods to compare; default: all that the growth allows", rich_help_panel=PLAN)
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="change a setting of the family", rich_help_panel=PLAN),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes, of one thread each", rich_help_panel=PLAN)] = 1,
    count_base: Annotated[
        bool, typer.Option("--count-base", help="the gain must also pay for the base model", rich_help_panel=PLAN)
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    tracking_uri: Uri = None,
) -> None:
    """Grow a trained proxy into a wider or deeper model of its family; `proxies train --init` starts from it.

    With --plan nothing is grown: small pairs of the same growth show whether it is worth it (docs/growth.md).

    Example: proxies grow studies/quickstart/checkpoints/0012-442368.pt --width 128 --out grown.pt
    """
    if plan is not None:
        options = GrowthPlanOptions(
            pair=pair,
            small=small_pair,
            source=source,
            at=at,
            horizons=horizons,
            base=base,
            seeds=seeds,
            budget=budget,
            methods=methods,
            settings=changes or [],
            workers=workers,
            count_base=count_base,
            dry_run=dry_run,
            as_json=as_json,
            uri=tracking_uri,
        )
        answer_question(plan, options, checkpoint)
        return
    from proxies.growth.files import open_trained, write_grown

    with refusing():
        if checkpoint is None or out is None:
            raise ValueError(
                "needed a checkpoint and --out to grow it, or --plan STUDY to find out whether it is worth it"
            )
        trained = open_trained(checkpoint, which or ("trunk" if moments else "annealed"))
        small = trained.config
        large = enlarge(small, width, layers)
        with warnings.catch_warnings():
            # It is logged below, in a line of its own.
            warnings.filterwarnings("ignore", "N grows")
            try:
                write_grown(trained, large, out, method=method, shrink=shrink, noise=noise, moments=moments)
            except OSError as error:
                say(f"error: {error}")
                raise typer.Exit(1) from error
    if doubt := check_break_even(small, large):
        logger.warning(f"warning: {doubt}")
    if large.n_layers > small.n_layers:
        length = tokens or DEFAULT_TOKENS_PER_PARAMETER * large.counts.N
        logger.info(describe_stacking_time(large, length, trained.tokens))
    typer.echo(f"{out}: N {large.counts.N:,} from N {small.counts.N:,} by {method}{', moments too' if moments else ''}")


def enlarge(small: ProxyConfig, width: int | None, layers: int | None) -> ProxyConfig:
    """Return the configuration of a larger model of the same family.

    A model of another depth keeps the small one's base depth, or has the small one's depth as its base (CompleteP).

    Args:
        small: The small model's configuration.
        width: d_model; None for the small one's.
        layers: n_layers; None for the small one's.
    """
    from proxies.config.proxy import ProxyConfig

    if width is None and layers is None:
        raise ValueError("needed --width, --layers or both, got neither")
    size = {"d_model": width or small.d_model, "n_layers": layers or small.n_layers}
    if size["n_layers"] != small.n_layers:
        size["base_layers"] = small.base_layers or small.n_layers
    return ProxyConfig.model_validate(small.model_dump() | size)


def describe_stacking_time(large: ProxyConfig, tokens: int, trained: int) -> str:
    """Return when to stack by G_stack's fit, and whether the fit can apply to a run of this size.

    Args:
        large: The grown model's configuration.
        tokens: Tokens of the planned run.
        trained: Tokens after which the small model is stacked.
    """
    best = compute_stacking_tokens(large.counts.N, 6.0 * large.counts.N * tokens)
    text = (
        f"stacking for N {large.counts.N:,} and {tokens:,} tokens: after {best:,.3g} tokens by G_stack's fit "
        f"(arXiv 2405.15319), here after {trained:,}"
    )
    return (
        text if best < tokens else f"{text}; the fit exceeds the run and is far outside its range, so it is no advice"
    )
