"""The target run, planned whole: what is trained and how, what it will cost, what loss is expected on the way, and why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from proxies.config.growth_rules import Method
from proxies.config.proxy import ProxyConfig
from proxies.config.schedules import SCHEDULES
from proxies.trainers.command import in_shell, resolved
from scaling.common.redact import secrets_in
from scaling.curves.planned import Band

Arm = Literal["warm", "scratch"]
ARMS: tuple[Arm, ...] = ("warm", "scratch")
Engine = Literal["plain", "ddp", "fsdp2"]
SHOWN = 6  # points of the predicted curve that are printed


class WarmStart(BaseModel):
    """The trained proxy that the target grows from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    checkpoint: Path
    N: PositiveFloat
    tokens: PositiveFloat
    loss: PositiveFloat
    method: Method = "shrink-pad-perturb"
    shrink: float = Field(default=0.4, ge=0, le=1)
    noise: float | None = Field(default=None, ge=0)
    because: dict[str, Any] | None = Field(default=None, description="what `proxies grow --plan` answered")

    @property
    def flops(self) -> float:
        """What the proxy's own training cost, 6 N D."""
        return 6.0 * self.N * self.tokens


class LaunchPlan(BaseModel):
    """The target run, in full. Where and by how many processes it is trained is no part of what it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    study: str
    config: ProxyConfig | None = Field(default=None, description="of a target that is trained here")
    command: str | None = Field(
        default=None, description="of one that another program trains, with {names} of `values` in it"
    )
    values: dict[str, Any] = Field(default_factory=dict, description="of the command: settings and sizes by name")
    cwd: Path = Field(default=Path(), description="where the command is run")
    environment: dict[str, str] = Field(default_factory=dict, description="of the command, beside ours")
    tokens: PositiveInt
    warm: WarmStart | None = None
    because: dict[str, Any] = Field(
        description="the Recommendation as `scaling recommend` wrote it, and `runs`, their names"
    )
    rates: dict[str, float] = Field(default_factory=dict, description="peak learning rate by role, as config says")
    curve: Band | None = Field(default=None, description="loss expected on the trunk, from scratch")
    no_curve: str = Field(default="", description="why there is none")
    data_sha256: str | None = None
    seconds: PositiveFloat | None = Field(default=None, description="of one arm on one core, from measured steps")
    ranks: PositiveInt = Field(default=1, description="processes on each node")
    nodes: PositiveInt = 1
    engine: Engine = "plain"
    max_restarts: int = Field(default=3, ge=0, description="of a killed rank, by torchrun")

    @model_validator(mode="after")
    def _is_one_run(self) -> Self:
        if (self.config is None) == (self.command is None):
            raise ValueError("config, command: needed one of the two, what is trained here or by another program")
        missing = [k for k in ("N", "D", "lr", "loss", "loss_interval", "mass") if k not in self.because]
        if missing:
            raise ValueError(f"because: needed a recommendation, got one without {', '.join(missing)}")
        if (self.because["N"], self.because["D"]) != (self.N, self.tokens):
            raise ValueError(
                f"because: its loss is for N {self.because['N']:,.0f}, D {self.because['D']:,.0f}, but the run has N {self.N:,.0f}, D {self.tokens:,}: "
                "make the plan again for another size or length"
            )
        if self.config is not None and self.rates and self.rates != rates_of(self.config):
            raise ValueError("rates: they follow from config.lr and the shape; change config.lr, and remove rates")
        if found := secrets_in({"command": self.command, "values": self.values, "environment": self.environment}):
            raise ValueError("; ".join(found))
        if self.command is not None:
            _ = self.words  # ValueError where a {name} has no value
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
        """Names what is trained: another configuration, length or start is another target."""
        warm = self.warm.model_dump_json(exclude={"because"}) if self.warm else ""
        what = self.config.model_dump_json() if self.config else json.dumps([self.command, self.values], sort_keys=True)
        return hashlib.sha256(f"{what} {self.tokens} {warm}".encode()).hexdigest()[:8]

    @property
    def N(self) -> float:
        return float(self.config.counts.N if self.config else self.values.get("N", self.because["N"]))

    @property
    def world(self) -> int:
        """Processes that train one arm together."""
        return self.ranks * self.nodes

    @property
    def flops(self) -> float:
        """Training FLOPs of one arm; with attention (PaLM convention) where the shape is known."""
        return (self.config.flops_per_token if self.config else 6.0 * self.N) * self.tokens

    @property
    def arms(self) -> tuple[Arm, ...]:
        return ARMS if self.warm else ("scratch",)

    def __str__(self) -> str:
        because, lines = self.because, [f"target of study {self.study}: N {self.N:,.0f}, {self.tokens:,} tokens"]
        lo, hi = because["loss_interval"]
        if self.config is not None:
            lines += _said_of(self.config)
        else:
            lines.append(f"  {in_shell(self.words, self.cwd, self.environment)}")
        if self.lr != because["lr"]:
            lines.append(
                f"  NOT AS RECOMMENDED: lr {self.lr:.4g}, recommended {because['lr']:.4g}; the prediction is for that one"
            )
        lines.append(
            f"  expected: loss {because['loss']:.4f}, {100 * because['mass']:.0f} % ({lo:.4f}, {hi:.4f}), started from scratch"
        )
        lines += [f"  {text}" for text in _curve_in_words(self.curve, self.no_curve)]
        took = f", about {self.seconds / 60:,.1f} minutes of one core" if self.seconds else ""
        lines.append(f"  cost of each arm: {self.flops:.2e} FLOPs{took}; arms: {', '.join(self.arms)}")
        lines.append(
            f"  run by {self.nodes} x {self.ranks} process{'' if self.world == 1 else 'es'}, engine {self.engine}"
            + (f", at most {self.max_restarts} restarts" if self.world > 1 else "")
        )
        if self.warm:
            w = self.warm
            how = f", shrink {w.shrink:g}" if w.method == "shrink-pad-perturb" else ""
            lines.append(
                f"  warm start: {w.name} (N {w.N:,.0f}, {w.tokens:,.0f} tokens, loss {w.loss:.4f}; its training cost {w.flops:.2e} FLOPs) "
                f"grown by {w.method}{how}{'' if w.noise is None else f', noise {w.noise:g}'}, from {w.checkpoint}"
            )
            lines += _advice_in_words(w.because)
        lines += _because_in_words(because)
        return "\n".join(lines)

    @property
    def words(self) -> list[str]:
        """The arguments of the plan's command; files that are named when it runs are left empty."""
        return resolved(self.command or "", self.values)

    @property
    def lr(self) -> float:
        """Peak rate at base width."""
        return float(self.config.lr if self.config else self.values.get("lr", self.because["lr"]))


def rates_of(config: ProxyConfig) -> dict[str, float]:
    """Peak learning rate of every role that the model has, at its width and depth."""
    from proxies.model.export import leaves_of
    from proxies.model.mup import role_of, rules

    roles = dict.fromkeys(role_of(leaf) for leaf in leaves_of(config))
    table = rules(config)
    return {role: table[role].lr for role in roles}


def read_plan(path: Path) -> LaunchPlan:
    """A plan from its file. ValueError that names every mistake in it by field."""
    if not path.is_file():
        raise ValueError(f"no plan {path}")
    try:
        plan = LaunchPlan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no JSON: {error}: make the plan again with `proxies launch STUDY --dry-run`"
        ) from error
    except ValidationError as error:
        said = [f"{'.'.join(str(part) for part in e['loc'])}: {_reason(e)}".removeprefix(": ") for e in error.errors()]
        raise ValueError(f"{path} is no plan that can be launched:\n  " + "\n  ".join(said)) from error
    except OverflowError as error:
        raise ValueError(f"{path} is no plan that can be launched: a number in it is too large ({error})") from error
    try:
        str(plan)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:  # of what notes hold, as it is
        raise ValueError(f"{path} is no plan that can be launched: its reasons cannot be read ({error!r})") from error
    return plan


def write_plan(plan: LaunchPlan, path: Path) -> None:
    """Write it, and make its folder; whoever reads it meanwhile sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(plan.model_dump_json(indent=2) + "\n")
    beside.replace(path)


def _reason(error: Any) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    got = (
        ""
        if error["type"] in ("missing", "extra_forbidden")
        else f", got {json.dumps(error['input'], default=repr)[:80]}"
    )
    return f"{error['msg'][0].lower()}{error['msg'][1:]}{got}"


def _said_of(c: ProxyConfig) -> list[str]:
    rates = ", ".join(f"{role} {rate:.4g}" for role, rate in rates_of(c).items())
    cools = SCHEDULES[c.schedule].cools
    end = f", the last {100 * c.cooldown:g} % down by {c.decay}" if cools else ""
    return [
        f"  d_model {c.d_model}, {c.n_layers} layers, batch {c.batch_seqs} x {c.seq_len} = {c.batch_tokens:,} tokens, {c.optimizer}",
        f"  lr {c.lr:.4g} at base width {c.base_width}; here by group: {rates}",
        f"  schedule {c.schedule}: warm-up over {c.warmup_tokens:,} tokens{end}",
    ]


def _curve_in_words(curve: Band | None, reason: str) -> list[str]:
    if curve is None:
        return [f"no curve on the way there is predicted: {reason}"] if reason else []
    count = len(curve.tokens)
    few = sorted({round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    points = [
        f"{curve.tokens[i]:,.0f} tokens {curve.loss[i]:.3f} ({curve.low[i]:.3f}, {curve.high[i]:.3f})" for i in few
    ]
    return [f"on the way, before the cooldown, {100 * curve.mass:.0f} %, from {curve.runs} curves: {'; '.join(points)}"]


def _advice_in_words(advice: dict[str, Any] | None) -> list[str]:
    if advice is None:
        return []
    gain, settings = advice["gain"], ", ".join(f"{k} {v:.3g}" for k, v in advice["settings"].items())
    return [
        f"  `proxies grow --plan` said: {'use it' if advice['use'] else 'DO NOT USE IT'}, {advice['method']} ({settings}); at {advice['horizon']:g} tokens per "
        f"parameter it gains {100 * gain['value']:.2g} % of the loss, {100 * gain['low']:.2g} to {100 * gain['high']:.2g}"
    ]


def _because_in_words(because: dict[str, Any]) -> list[str]:
    origin, runs = because.get("provenance", {}), because.get("runs", [])
    lines = []
    if "n_runs" in origin:
        names = f": {', '.join(runs[:3])}{', ...' if len(runs) > 3 else ''}" if runs else ""
        lines.append(
            f"  because: {origin['n_runs']} runs in {origin.get('n_groups', '?')} (N, D) groups{names}; muscale {origin.get('version', '?')}"
        )
    lines += [f"  SERIOUS DOUBT: {f['text']}" for f in because.get("flags", []) if f.get("serious")]
    return lines
