"""The plan of a target run: its configuration, its cost, its expected loss, and the reasons for all of it."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from proxies.config.growth_rules import GrowthMethod
from proxies.config.proxy import ProxyConfig
from proxies.config.schedules import SCHEDULES
from proxies.launch.notes import GrowthAdvice, RecommendationNote
from proxies.trainers.command import format_shell_command, resolve_command
from scaling.common.atomic import write_atomically
from scaling.common.redact import find_secrets
from scaling.common.validation import explain_errors
from scaling.curves.planned import LossBand

Arm = Literal["warm", "scratch"]
ARMS: tuple[Arm, ...] = ("warm", "scratch")
Engine = Literal["plain", "ddp", "fsdp2"]
# Points of the predicted curve that are printed.
SHOWN_POINTS = 6
# Columns of the printed plan.
LINE_WIDTH = 80

# Notes are kept as they were read: neither checked nor reordered, so that a plan is written back byte for byte.
_AS_READ = GetPydanticSchema(lambda _, handler: handler(dict[str, Any]))


class WarmStart(BaseModel):
    """The trained proxy that the target grows from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    checkpoint: Path
    N: PositiveFloat
    tokens: PositiveFloat
    loss: PositiveFloat
    method: GrowthMethod = "shrink-pad-perturb"
    shrink: float = Field(default=0.4, ge=0, le=1)
    noise: float | None = Field(default=None, ge=0)
    because: Annotated[GrowthAdvice, _AS_READ] | None = Field(
        default=None, description="the answer of `proxies grow --plan`"
    )

    @property
    def flops(self) -> float:
        """The cost of training the proxy, 6 N D."""
        return 6.0 * self.N * self.tokens


class LaunchPlan(BaseModel):
    """The target run in full.

    The number of processes and the engine can be changed without making it another run: they are not part of `id`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    study: str
    config: ProxyConfig | None = Field(default=None, description="the model, when it is trained by muscale")
    command: str | None = Field(
        default=None, description="the command of another program that trains it, with {names} of `values`"
    )
    values: dict[str, Any] = Field(default_factory=dict, description="settings and sizes of the command by name")
    cwd: Path = Field(default=Path(), description="the folder in which the command is run")
    environment: dict[str, str] = Field(default_factory=dict, description="environment variables added for the command")
    tokens: PositiveInt
    warm: WarmStart | None = None
    because: Annotated[RecommendationNote, _AS_READ] = Field(
        description="the Recommendation as `scaling recommend` wrote it, and `runs`, their names"
    )
    rates: dict[str, float] = Field(default_factory=dict, description="peak learning rate by role, derived from config")
    curve: LossBand | None = Field(default=None, description="expected loss on the trunk, trained from scratch")
    no_curve: str = Field(default="", description="why there is no curve")
    data_sha256: str | None = None
    seconds: PositiveFloat | None = Field(default=None, description="one arm on one core, from measured steps")
    ranks: PositiveInt = Field(default=1, description="processes on each node")
    nodes: PositiveInt = 1
    engine: Engine = "plain"
    max_restarts: int = Field(default=3, ge=0, description="restarts by torchrun after a rank was killed")

    @model_validator(mode="after")
    def _is_one_run(self) -> Self:
        if (self.config is None) == (self.command is None):
            raise ValueError("config, command: needed exactly one of them: a model trained here, or another program")
        missing = [k for k in ("N", "D", "lr", "loss", "loss_interval", "mass") if k not in self.because]
        if missing:
            raise ValueError(f"because: needed a recommendation, got one without {', '.join(missing)}")
        if (self.because["N"], self.because["D"]) != (self.N, self.tokens):
            raise ValueError(
                f"because: its loss is for N {self.because['N']:,.0f}, D {self.because['D']:,.0f}, but the run has "
                f"N {self.N:,.0f}, D {self.tokens:,}: make a new plan for another size or length"
            )
        if self.config is not None and self.rates and self.rates != compute_peak_rates(self.config):
            raise ValueError("rates: they follow from config.lr and the shape; change config.lr, and remove rates")
        secrets = find_secrets({"command": self.command, "values": self.values, "environment": self.environment})
        if secrets:
            raise ValueError("; ".join(secrets))
        if self.command is not None:
            # Raises ValueError where a {name} has no value.
            _ = self.arguments
            if self.values.get("tokens") != self.tokens:
                raise ValueError(
                    f"values.tokens: needed {self.tokens}, as tokens says, got {self.values.get('tokens')}"
                )
        if self.command is not None and self.warm is not None:
            raise ValueError("warm: a command trains from its own start, so a plan with one has no warm start")
        if self.command is not None and self.world > 1:
            raise ValueError(f"ranks, nodes: a command starts its own processes (torchrun ...), got {self.world}")
        if self.engine == "plain" and self.world > 1:
            raise ValueError(f"engine: needed ddp or fsdp2 for {self.world} processes, got 'plain'")
        return self

    @property
    def id(self) -> str:
        """A hash of what is trained: another configuration, length or warm start is another target."""
        warm = self.warm.model_dump_json(exclude={"because"}) if self.warm else ""
        what = self.config.model_dump_json() if self.config else json.dumps([self.command, self.values], sort_keys=True)
        return hashlib.sha256(f"{what} {self.tokens} {warm}".encode()).hexdigest()[:8]

    @property
    def N(self) -> float:
        """Parameters that multiply tokens."""
        return float(self.config.counts.N if self.config else self.values.get("N", self.because["N"]))

    @property
    def world(self) -> int:
        """Number of processes that train one arm together."""
        return self.ranks * self.nodes

    @property
    def flops(self) -> float:
        """Training FLOPs of one arm, with attention (PaLM convention) where the shape is known."""
        return (self.config.flops_per_token if self.config else 6.0 * self.N) * self.tokens

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that can be trained: `warm` only if there is a proxy to start from."""
        return ARMS if self.warm else ("scratch",)

    @property
    def arguments(self) -> list[str]:
        """The arguments of the plan's command, with empty values for the files that are named when it runs."""
        return resolve_command(self.command or "", self.values)

    @property
    def lr(self) -> float:
        """Peak learning rate at base width."""
        return float(self.config.lr if self.config else self.values.get("lr", self.because["lr"]))

    def __str__(self) -> str:
        head = [f"target of study {self.study}: N {self.N:,.0f}, {self.tokens:,} tokens"]
        if self.command is not None:
            # A command stays on one line, so that it can be copied.
            head.append(f"  {format_shell_command(self.arguments, self.cwd, self.environment)}")
        because = self.because
        low, high = because["loss_interval"]
        lines = _format_config(self.config) if self.config is not None else []
        if self.lr != because["lr"]:
            lines.append(
                f"NOT AS RECOMMENDED: lr {self.lr:.4g}, recommended {because['lr']:.4g}; "
                "the prediction is for the recommended rate"
            )
        lines.append(
            f"expected: loss {because['loss']:.4f}, {100 * because['mass']:.0f} % interval ({low:.4f}, {high:.4f}), "
            "trained from scratch"
        )
        lines += _format_curve(self.curve, self.no_curve)
        duration = f", about {self.seconds / 60:,.1f} minutes on one core" if self.seconds else ""
        lines.append(f"cost of each arm: {self.flops:.2e} FLOPs{duration}; arms: {', '.join(self.arms)}")
        lines.append(
            f"run by {self.nodes} x {self.ranks} process{'' if self.world == 1 else 'es'}, engine {self.engine}"
            + (f", at most {self.max_restarts} restarts" if self.world > 1 else "")
        )
        if self.warm:
            warm = self.warm
            shrink = f", shrink {warm.shrink:g}" if warm.method == "shrink-pad-perturb" else ""
            noise = "" if warm.noise is None else f", noise {warm.noise:g}"
            lines.append(
                f"warm start: {warm.name} (N {warm.N:,.0f}, {warm.tokens:,.0f} tokens, loss {warm.loss:.4f}; training "
                f"it cost {warm.flops:.2e} FLOPs), grown by {warm.method}{shrink}{noise}, from {warm.checkpoint}"
            )
            lines += _format_advice(warm.because)
        lines += _format_reasons(because)
        return "\n".join([*head, *(_wrap(line) for line in lines)])


def compute_peak_rates(config: ProxyConfig) -> dict[str, float]:
    """Return the peak learning rate of every role that the model has, at its width and depth."""
    from proxies.model.export import list_leaves
    from proxies.model.mup import compute_rules, get_role

    roles = dict.fromkeys(get_role(leaf) for leaf in list_leaves(config))
    table = compute_rules(config)
    return {role: table[role].lr for role in roles}


def read_plan(path: Path) -> LaunchPlan:
    """Read a plan from its file.

    Args:
        path: A JSON file that `write_plan` wrote; it may have been edited since.

    Returns:
        The validated plan.

    Raises:
        ValueError: If there is no such file, or it is not a plan. The message names every mistake by field.
    """
    if not path.is_file():
        raise ValueError(f"no plan {path}")
    try:
        plan = LaunchPlan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON: {error}: make the plan again with `proxies launch STUDY --dry-run`"
        ) from error
    except ValidationError as error:
        problems = explain_errors(error, LaunchPlan)
        raise ValueError(f"{path} is not a plan that can be launched:\n  " + "\n  ".join(problems)) from error
    except OverflowError as error:
        raise ValueError(f"{path} is not a plan that can be launched: a number in it is too large ({error})") from error
    # The notes are not validated, so formatting them is what shows whether they can be read.
    try:
        str(plan)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not a plan that can be launched: `because` cannot be read ({error!r})") from error
    return plan


def write_plan(plan: LaunchPlan, path: Path) -> None:
    """Write a plan as JSON, creating its folder; a concurrent reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, plan.model_dump_json(indent=2) + "\n")


def _wrap(line: str) -> str:
    # Words are never broken, so that a path can be copied.
    return textwrap.fill(
        line,
        LINE_WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _format_config(config: ProxyConfig) -> list[str]:
    rates = ", ".join(f"{role} {rate:.4g}" for role, rate in compute_peak_rates(config).items())
    cooldown = (
        f", cooldown over the last {100 * config.cooldown:g} % by {config.decay}"
        if SCHEDULES[config.schedule].has_cooldown
        else ""
    )
    return [
        f"d_model {config.d_model}, {config.n_layers} layers, batch {config.batch_seqs} x {config.seq_len} = "
        f"{config.batch_tokens:,} tokens, {config.optimizer}",
        f"lr {config.lr:.4g} at base width {config.base_width}; by group at this width: {rates}",
        f"schedule {config.schedule}: warm-up over {config.warmup_tokens:,} tokens{cooldown}",
    ]


def _format_curve(curve: LossBand | None, reason: str) -> list[str]:
    if curve is None:
        return [f"no curve is predicted for the run: {reason}"] if reason else []
    count = len(curve.tokens)
    few = sorted({round(i * (count - 1) / (SHOWN_POINTS - 1)) for i in range(SHOWN_POINTS)})
    points = [
        f"{curve.tokens[i]:,.0f} tokens {curve.loss[i]:.3f} ({curve.low[i]:.3f}, {curve.high[i]:.3f})" for i in few
    ]
    return [
        f"expected before the cooldown, {100 * curve.mass:.0f} % band from {curve.runs} curves: {'; '.join(points)}"
    ]


def _format_advice(advice: GrowthAdvice | None) -> list[str]:
    if advice is None:
        return []
    gain, settings = advice["gain"], ", ".join(f"{k} {v:.3g}" for k, v in advice["settings"].items())
    return [
        f"`proxies grow --plan` advised: {'use it' if advice['use'] else 'DO NOT USE IT'}, {advice['method']} "
        f"({settings}); at {advice['horizon']:g} tokens per parameter it lowers the loss by "
        f"{100 * gain['value']:.2g} %, interval {100 * gain['low']:.2g} to {100 * gain['high']:.2g} %"
    ]


def _format_reasons(because: RecommendationNote) -> list[str]:
    origin, runs = because.get("provenance", {}), because.get("runs", [])
    lines = []
    if "n_runs" in origin:
        names = f": {', '.join(runs[:3])}{', ...' if len(runs) > 3 else ''}" if runs else ""
        lines.append(
            f"based on {origin['n_runs']} runs in {origin.get('n_groups', '?')} (N, D) groups{names}; "
            f"muscale {origin.get('version', '?')}"
        )
    lines += [f"SERIOUS DOUBT: {flag['text']}" for flag in because.get("flags", []) if flag.get("serious")]
    return lines
