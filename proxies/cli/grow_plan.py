"""`proxies grow --plan`: is a warm start worth it for this target? Its price, its runs, its answer in words."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from proxies.cli.shared import interrupted, numbers, read_family
from scaling.common.cli import refusing, say
from scaling.common.signals import interrupt_on_sigterm

if TYPE_CHECKING:
    from proxies.growth.question import Question
    from proxies.trainers.proxy_family import ProxyFamily


@dataclass(frozen=True)
class Options:
    """As given on the command line."""

    pair: str | None = None
    small: str | None = None
    source: int | None = None
    at: float | None = None
    horizons: str = "2,5,10,20"
    base: float | None = None
    seeds: int = 3
    budget: float = 6.0
    starts: str | None = None
    settings: list[str] = field(default_factory=list)
    workers: int = 1
    count_base: bool = False
    dry_run: bool = False
    as_json: bool = False
    uri: str | None = None


def answer(study: str, options: Options, checkpoint: Path | None = None) -> None:
    """Refuse, say the price, run what is missing, answer. An answer of either kind is exit code 0."""
    from proxies.growth.runs import plan_growth

    with refusing():
        if checkpoint is not None:
            raise ValueError(f"--plan trains its own bases: leave out {checkpoint}")
        question = asked(study, options)
    say(price(question, options.workers))
    if options.dry_run:
        return
    try:
        with interrupt_on_sigterm(), refusing():
            found = plan_growth(question, workers=options.workers, count_base=options.count_base, uri=options.uri)
    except KeyboardInterrupt as stop:
        raise interrupted(stop, question.home) from stop
    except RuntimeError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    typer.echo(json.dumps(found) if options.as_json else in_words(question, found))


def asked(study: str, options: Options) -> Question:
    """The question, with the settings that the study has found so far and --set's in their place."""
    from proxies.growth.question import make_question
    from proxies.trainers.proxy_family import ProxyFamily

    family, toml = read_family(study)
    family = ProxyFamily.model_validate(
        found_so_far(family, toml, options.uri).model_dump() | changes(options.settings)
    )
    wanted = options.starts.split(",") if options.starts else None
    if wanted is not None:
        from proxies.growth.trainer import OWN

        if wrong := [name for name in wanted if name not in OWN or name == "scratch"]:
            raise ValueError(f"--methods: needed {', '.join(k for k in OWN if k != 'scratch')}, got {', '.join(wrong)}")
    try:
        horizons = [float(part) for part in options.horizons.split(",")]
    except ValueError as error:
        raise ValueError(f"--horizons: needed numbers with commas between, got {options.horizons!r}") from error
    return make_question(
        toml,
        family,
        real=numbers("--pair", options.pair),
        small=numbers("--small", options.small),
        source=options.source,
        at=options.at,
        horizons=horizons,
        base=options.base,
        seeds=options.seeds,
        budget=options.budget,
        starts=["scratch", *wanted] if wanted else None,  # type: ignore[list-item]
    )


def found_so_far(family: ProxyFamily, toml: Path, uri: str | None) -> ProxyFamily:
    """The family as its study in MLflow says, when it has been launched."""
    from proxies.growth.question import tuned
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import read_note

    if not (toml.parent / toml.stem / "study.journal").exists():
        return family
    client = connect(uri)
    run = find_study_run(client, toml.stem)
    return tuned(family, read_note(client, run, "best"), read_note(client, run, "recommendation"))


def changes(settings: list[str]) -> dict[str, Any]:
    """name=value settings, values as TOML has them or else as text."""
    found: dict[str, Any] = {}
    for text in settings:
        name, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"needed --set name=value, got {text}")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found


def price(question: Question, workers: int) -> str:
    """What all of it costs, searches and ladders, of which what is there already is not trained again."""
    from proxies.training.throughput import measure_speed
    from scaling.laws.compute import Fidelity

    q = question
    rows = []
    speeds: dict[float, float] = {}
    for pair in q.pairs:
        trainer = q.trainer("scratch", pair)
        base = trainer.source()
        speeds[base.counts.N] = measure_speed(base, threads=1)
        seeds = q.seeds + (1 if pair == q.small else 0)
        rows.append((f"bases, {pair.source}", base, Fidelity(base.counts.N, trainer.source_tokens), float(seeds)))
        large = trainer.config({}, Fidelity(trainer.sizes[0], 1))
        speeds[trainer.sizes[0]] = measure_speed(large, threads=1)
    rows += [(what, t.config({}, size), size, count) for what, t, size, count in q.cost]
    lines = [
        f"is a warm start worth it: {q.real} at {q.at:.3g} tokens per parameter, base trained for {q.base:.3g} of its own",
        f"judged by the pair {q.small}{f' and, for what changes with size, {q.second}' if q.second else ''}; {q.home}",
    ]
    tokens = sum(size.D * count for _, _, size, count in rows)
    flops = sum(config.flops_per_token * size.D * count for _, config, size, count in rows)
    seconds = sum(size.D * count / speeds[size.N] for _, _, size, count in rows) / workers
    lines += [f"  {what}: {count:.3g} runs of {size.D:,.0f} tokens" for what, _, size, count in rows]
    target = q.trainer("scratch", q.real)
    config = target.config({}, Fidelity(target.sizes[0], 1))
    share = flops / (config.flops_per_token * q.at * target.sizes[0])
    lines.append(
        f"  in all {tokens:,.0f} tokens, {flops:.2e} FLOPs = {share:.2g} of the target's run, about {seconds / 60:.1f} minutes here"
    )
    return "\n".join(lines)


def in_words(question: Question, found: dict[str, Any]) -> str:
    """The answer, and the table behind it."""
    decision = found["decision"]
    arms = {arm["name"]: arm for arm in decision["arms"]}
    arm = arms[found["method"]]
    at, factor, base = arm["at"][-1], decision["factor"], decision["base"]
    ladder = question.lengths(question.starts[1])
    gain = at["gain_with_base"] if decision["count_base"] else at["gain"]
    settings = ", ".join(f"{k} {v:.3g}" for k, v in found["settings"].items())
    counted = ", the base's cost counted" if decision["count_base"] else ""
    verdict = (
        f"use it: {found['method']} ({settings})"
        if found["use"]
        else f"do not; the best was {found['method']} ({settings})"
    )
    lines = [
        f"{question.real} at {question.at:.3g} tokens per parameter{counted}: {verdict}",
        f"  loss lower by {percent(gain)}, 95 % interval",
        "",
        f"{'tokens/N':>9}  {'lower loss':>24}  {'with the base':>24}  {'tokens saved, times':>24}  {'with the base':>24}",
    ]
    for row in sorted(arm["at"], key=lambda row: float(row["horizon"])):
        lines.append(
            f"{row['horizon']:9.3g}  {percent(row['gain']):>24}  {percent(row['gain_with_base']):>24}  {times(row, 'saving', ladder, 0.0):>24}  "
            f"{times(row, 'saving_with_base', ladder, base):>24}"
        )
    lines += [
        f"the gain ends at {ends(arm['break_even'], ladder)} tokens per parameter; with the base's cost at {ends(arm['break_even_with_base'], ladder)}",
        f"best lr after growth over scratch's: 2^{found['because']['lr_octaves_from_scratch'][found['method']]:+.2f}",
        f"seen at {question.small}, {decision['seeds']} seeds: {100 * at['measured']:+.2f} % there; the real pair's gain is taken as "
        f"{factor['value']:.2f} [{factor['low']:.2f}, {factor['high']:.2f}] of it",
    ]
    for name, other in arms.items():
        if name != found["method"]:
            lines.append(f"against it {name}: {percent(other['at'][-1]['gain'])}")
    return "\n".join(lines)


def percent(interval: dict[str, Any]) -> str:
    value, low, high = (100 * float(interval[k]) for k in ("value", "low", "high"))
    return f"{value:+.2f} % [{low:+.2f}, {high:+.2f}]"


def times(row: dict[str, Any], name: str, ladder: tuple[float, ...], base: float) -> str:
    """Outside the ladder only a bound is known: scratch's loss was reached before the first length, or not by the last."""
    value, low, high = (row[name][k] if row[name][k] is None else float(row[name][k]) for k in ("value", "low", "high"))
    at = float(row["horizon"])
    if value is None:  # before the first length, but not before the base was paid
        said = f"{at / (ladder[0] + base):.2f} to {at / base:.2f}"
    elif value == float("inf"):
        said = f"over {at / (ladder[0] + base):.2f}"
    else:
        said = f"below {at / (ladder[-1] + base):.2f}" if value == 0 else f"{value:.2f}"
    return f"{said} [{low:.2f}, {high:.2f}]"


def ends(interval: dict[str, Any], ladder: tuple[float, ...]) -> str:
    """Where a gain ends, in words where it was not seen to."""
    value, low, high = (float(interval[k]) for k in ("value", "low", "high"))
    said = (
        f"beyond {ladder[-1]:.3g}"
        if value == float("inf")
        else f"before {ladder[0]:.3g}"
        if value == 0
        else f"{value:.3g}"
    )
    return f"{said} [{low:.3g}, {high:.3g}]"
