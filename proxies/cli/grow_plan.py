"""`proxies grow --plan`: whether a warm start is worth it for a target. Its cost, its runs, and the answer as text."""

from __future__ import annotations

import logging
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from proxies.cli.shared import parse_numbers, read_family, report_interrupt, validate_family
from scaling.common.cli import refusing, say
from scaling.common.json_text import dump_json
from scaling.common.signals import interrupt_on_sigterm

if TYPE_CHECKING:
    from proxies.config.proxy import ProxyConfig
    from proxies.growth.answer import ArmAtNote, Bound, BoundsNote, GrowthAnswer, IntervalNote
    from proxies.growth.question import Question
    from proxies.trainers.proxy_family import ProxyFamily
    from scaling.laws.compute import Fidelity

logger = logging.getLogger("muscale.proxies")


@dataclass(frozen=True)
class GrowthPlanOptions:
    """The options of `proxies grow --plan` as given on the command line; see the help of `proxies grow`.

    Attributes:
        pair: --pair.
        small: --small.
        source: --from.
        at: --at.
        horizons: --horizons.
        base: --base.
        seeds: --seeds.
        budget: --budget.
        methods: --methods.
        settings: --set, once for each setting.
        workers: --workers.
        count_base: --count-base.
        dry_run: --dry-run.
        as_json: --json.
        uri: --tracking-uri.
    """

    pair: str | None
    small: str | None
    source: int | None
    at: float | None
    horizons: str
    base: float | None
    seeds: int
    budget: float
    methods: str | None
    settings: Sequence[str]
    workers: int
    count_base: bool
    dry_run: bool
    as_json: bool
    uri: str | None


def answer_question(study: str, options: GrowthPlanOptions, checkpoint: Path | None = None) -> None:
    """Show the cost, train what is missing, and print the answer. Either answer is exit code 0.

    Args:
        study: The study file or the study's name.
        options: The options of the command.
        checkpoint: The checkpoint that was given, which is an error with --plan.
    """
    from proxies.growth.runs import plan_growth

    with refusing():
        if checkpoint is not None:
            raise ValueError(f"--plan trains its own base models: leave out {checkpoint}")
        question = read_question(study, options)
    cost = format_cost(question, options.workers)
    if options.dry_run:
        say(cost)
        return
    logger.info(cost)
    try:
        with interrupt_on_sigterm(), refusing():
            answer = plan_growth(question, workers=options.workers, count_base=options.count_base, uri=options.uri)
    except KeyboardInterrupt as stop:
        raise report_interrupt(stop, question.home) from stop
    except RuntimeError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    typer.echo(dump_json(answer) if options.as_json else format_answer(question, answer))


def read_question(study: str, options: GrowthPlanOptions) -> Question:
    """Make the question from a study and the options.

    Runs are trained with the settings that the study has found so far, and with those of --set in their place.

    Args:
        study: The study file or the study's name.
        options: The options of the command.

    Raises:
        ValueError: With all mistakes.
    """
    from proxies.growth.question import QuestionOptions, make_question

    family, toml = read_family(study)
    family = validate_family(
        apply_study_results(family, toml, options.uri).model_dump() | parse_settings(options.settings), "--set: "
    )
    methods = options.methods.split(",") if options.methods else None
    if methods is not None:
        from proxies.growth.trainer import METHOD_SETTINGS

        known = [name for name in METHOD_SETTINGS if name != "scratch"]
        if unknown := [name for name in methods if name not in known]:
            raise ValueError(f"--methods: needed {', '.join(known)}, got {', '.join(unknown)}")
    try:
        horizons = [float(part) for part in options.horizons.split(",")]
    except ValueError as error:
        raise ValueError(f"--horizons: needed numbers with commas between them, got {options.horizons!r}") from error
    chosen = QuestionOptions(
        real=parse_numbers("--pair", options.pair),
        small=parse_numbers("--small", options.small),
        source=options.source,
        at=options.at,
        horizons=horizons,
        base=options.base,
        seeds=options.seeds,
        budget=options.budget,
        starts=["scratch", *methods] if methods else None,  # type: ignore[list-item]
    )
    return make_question(toml, family, chosen)


def apply_study_results(family: ProxyFamily, toml: Path, uri: str | None) -> ProxyFamily:
    """Return the family with what its study has found so far in MLflow, if it has been launched."""
    from proxies.growth.question import apply_found_settings
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import read_note

    if not (toml.parent / toml.stem / "study.journal").exists():
        return family
    client = connect(uri)
    run = find_study_run(client, toml.stem)
    return apply_found_settings(family, read_note(client, run, "best"), read_note(client, run, "recommendation"))


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE settings; a value is TOML, or else plain text."""
    parsed: dict[str, Any] = {}
    for text in settings:
        name, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"needed --set name=value, got {text}")
        try:
            parsed[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed[name] = value
    return parsed


def format_cost(question: Question, workers: int) -> str:
    """Return the cost of all base models, searches and ladders, those included that have been trained before.

    Args:
        question: The question.
        workers: Processes that train at the same time.
    """
    from proxies.training.throughput import measure_speed
    from scaling.laws.compute import Fidelity

    rows: list[tuple[str, ProxyConfig, Fidelity, float]] = []
    # Tokens per second by N.
    speeds: dict[float, float] = {}
    for pair in question.pairs:
        trainer = question.make_trainer("scratch", pair)
        base = trainer.source()
        speeds[base.counts.N] = measure_speed(base, threads=1)
        # One more base model serves the search.
        seeds = question.seeds + (1 if pair == question.small else 0)
        rows.append((f"bases, {pair.source}", base, Fidelity(base.counts.N, trainer.source_tokens), float(seeds)))
        large = trainer.config({}, Fidelity(trainer.sizes[0], 1))
        speeds[trainer.sizes[0]] = measure_speed(large, threads=1)
    rows += [(runs.what, runs.trainer.config({}, runs.size), runs.size, runs.count) for runs in question.planned_runs]
    tokens = sum(size.D * count for _, _, size, count in rows)
    flops = sum(config.flops_per_token * size.D * count for _, config, size, count in rows)
    seconds = sum(size.D * count / speeds[size.N] for _, _, size, count in rows) / workers
    target = question.make_trainer("scratch", question.real)
    config = target.config({}, Fidelity(target.sizes[0], 1))
    share = flops / (config.flops_per_token * question.at * target.sizes[0])
    second = f"; {question.second} shows how gains change with size" if question.second else ""
    lines = [
        f"is a warm start worth it, {question.real} at {question.at:.3g} tokens per parameter?",
        f"base model: {question.base:.3g} tokens per parameter of its own",
        f"judged by the pair {question.small}{second}",
        f"folder: {question.home}",
    ]
    for what, _, size, count in rows:
        lines.append(f"  {what}: {count:.3g} run{'' if count == 1 else 's'} of {size.D:,.0f} tokens")
    lines += [
        f"  total: {tokens:,.0f} tokens, {flops:.2e} FLOPs ({share:.2g} of the target's run),",
        f"  about {seconds / 60:.1f} minutes on this machine",
    ]
    return "\n".join(lines)


def format_answer(question: Question, answer: GrowthAnswer) -> str:
    """Return the answer as text, with the tables behind it."""
    decision = answer["decision"]
    arms = {arm["name"]: arm for arm in decision["arms"]}
    arm = arms[answer["method"]]
    at, factor = arm["at"][-1], decision["factor"]
    ladder = question.list_lengths(question.starts[1])
    gain = at["gain_with_base"] if decision["count_base"] else at["gain"]
    settings = ", ".join(f"{k} {v:.3g}" for k, v in answer["settings"].items())
    counted = ", the base's cost counted" if decision["count_base"] else ""
    verdict = f"use it: {answer['method']}" if answer["use"] else f"do not use it; the best was {answer['method']}"
    lines = [
        f"{question.real} at {question.at:.3g} tokens per parameter{counted}:",
        f"  {verdict}",
        f"  settings: {settings}",
        f"  loss lower by {format_percent(gain)}, 95 % interval",
        "",
        *format_tables(arm["at"], ladder, decision["base"]),
        "",
        f"the gain ends {format_end(arm['break_even'], ladder)} tokens per parameter;",
        f"  with the base's cost it ends {format_end(arm['break_even_with_base'], ladder)}",
        f"best lr after growth over scratch's: 2^{answer['because']['lr_octaves_from_scratch'][answer['method']]:+.2f}",
        f"measured at {question.small}, {decision['seeds']} seeds: {100 * at['measured']:+.2f} %;",
        "  the real pair's gain is assumed to be "
        f"{factor['value']:.2f} [{factor['low']:.2f}, {factor['high']:.2f}] times that",
    ]
    others = [other for name, other in arms.items() if name != answer["method"]]
    lines += [f"{other['name']} for comparison: {format_percent(other['at'][-1]['gain'])}" for other in others]
    return "\n".join(lines)


def format_tables(rows: Sequence[ArmAtNote], ladder: tuple[float, ...], base: float) -> list[str]:
    """Return the lines of two tables over run length: how much the loss is lower, and how many tokens are saved.

    Args:
        rows: The gain of an arm at each run length.
        ladder: The run lengths of the ladder, tokens per parameter.
        base: Cost of the base model in tokens per parameter of the target.
    """
    ordered = sorted(rows, key=lambda row: float(row["horizon"]))
    lines = [f"{'tokens/N':>9}  {'lower loss':>26}  {'with the base':>26}"]
    for row in ordered:
        gains = format_percent(row["gain"]), format_percent(row["gain_with_base"])
        lines.append(f"{row['horizon']:9.3g}  {gains[0]:>26}  {gains[1]:>26}")
    lines.append(f"{'tokens/N':>9}  {'times fewer tokens':>26}  {'with the base':>26}")
    for row in ordered:
        savings = (
            format_saving(row["saving"], row["horizon"], ladder, 0.0),
            format_saving(row["saving_with_base"], row["horizon"], ladder, base),
        )
        lines.append(f"{row['horizon']:9.3g}  {savings[0]:>26}  {savings[1]:>26}")
    return lines


def format_percent(interval: IntervalNote) -> str:
    """Return a share and its interval in percent."""
    value, low, high = (100 * float(part) for part in (interval["value"], interval["low"], interval["high"]))
    return f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]"


def format_saving(saving: BoundsNote, horizon: float, ladder: tuple[float, ...], base: float) -> str:
    """Return how many times fewer tokens a warm start needs.

    Outside the ladder only a bound is known: scratch's loss was reached before the first run length, or not by the
        last.

    Args:
        saving: Scratch's tokens over the warm run's to the same loss.
        horizon: Scratch's run length, tokens per parameter.
        ladder: The run lengths of the ladder, tokens per parameter.
        base: Tokens per parameter that are added to the warm run's.
    """
    value, low, high = _to_float(saving["value"]), _to_float(saving["low"]), _to_float(saving["high"])
    if math.isnan(value):
        # It was reached before the first run length, but not before the base was paid.
        text = f"{horizon / (ladder[0] + base):.2f} to {horizon / base:.2f}"
    elif value == math.inf:
        text = f"over {horizon / (ladder[0] + base):.2f}"
    else:
        text = f"below {horizon / (ladder[-1] + base):.2f}" if value == 0 else f"{value:.2f}"
    return f"{text} [{low:.2f}, {high:.2f}]"


def format_end(interval: BoundsNote, ladder: tuple[float, ...]) -> str:
    """Return where a gain ends: at a run length, or beyond or before all of the ladder's."""
    value, low, high = (_to_float(part) for part in (interval["value"], interval["low"], interval["high"]))
    if value == math.inf:
        text = f"beyond {ladder[-1]:.3g}"
    else:
        text = f"before {ladder[0]:.3g}" if value == 0 else f"at {value:.3g}"
    return f"{text} [{low:.3g}, {high:.3g}]"


def _to_float(bound: Bound) -> float:
    return math.nan if bound is None else float(bound)
