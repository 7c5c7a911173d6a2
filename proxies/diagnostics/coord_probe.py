"""A few steps of training, watched: how large every activation is, and how far eps and decay act. For `proxies check`.

The steps are those of an engine (plain, compiled, DDP, FSDP2); what is looked at is a plain twin with the same weights.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from proxies.config.proxy import ProxyConfig
from proxies.data.mixture import open_data
from proxies.model.dtensors import gather_full
from proxies.model.mup import strip_wrappers, get_role
from proxies.model.optimizers import make_optimizer, set_lr
from proxies.model.transformer import Block, Transformer, build, compute_loss, rms_norm
from proxies.training.distributed import ALONE, Ranks, spawn_ranks, wrap_model

ProbeEngine = Literal["plain", "compile", "ddp", "fsdp2"]
PROBE_ENGINES: tuple[ProbeEngine, ...] = ("plain", "compile", "ddp", "fsdp2")
# Optimizers that divide by sqrt(v) + eps, so that eps must follow the gradients.
DIVIDE_BY_EPS = ("adamw", "adamw8bit", "ademamix", "schedule-free")
# Those that multiply weights by 1 - lr * decay. Prodigy has a rate of its own, LAMB scales the decay with the update.
DECAY_BY_RATE = (*DIVIDE_BY_EPS, "lion", "muon", "muon-rms", "soap")
DECAYED = 0.05  # of a hidden matrix at base size, per step of the decay stress


@dataclass(frozen=True)
class ProbeResult:
    """One run of a few steps."""

    seen: tuple[dict[str, tuple[float, float]], ...]  # per step from 0: mean |x|, mean |x - x at step 0| by quantity
    losses: tuple[float, ...]  # training loss of every step, nats per token


@dataclass(frozen=True)
class ProbeSpec:
    """One run to be made: which model, what is watched, for how long."""

    config: ProxyConfig
    what: Literal["activations", "eps", "decay"]
    steps: int
    batch_seqs: int
    scales: Mapping[str, float] | None = None  # eps: RMS gradient by role at base size. decay: factor on every decay
    double: bool = False  # float64


@torch.no_grad()
def compute_coordinates(model: Transformer, x_bt: Tensor) -> dict[str, Tensor]:
    """Every quantity of the check, by name, on one batch; branches before they are added to the stream."""
    rope = model.get_rope(x_bt)
    stream = model.stem(x_bt)
    seen = {"embedding": stream}
    for i, block in enumerate(cast(Iterable[Block], model.blocks)):
        normed = rms_norm(stream, block.attn_norm)
        seen[f"block {i} attention scores"] = block.attention_logits(normed, rope)
        seen[f"block {i} attention"] = block.attention(normed, rope)
        stream = block.add(stream, seen[f"block {i} attention"])
        seen[f"block {i} mlp"] = block.mlp(rms_norm(stream, block.mlp_norm))
        stream = block.add(stream, seen[f"block {i} mlp"])
        seen[f"block {i} stream"] = stream
    seen["logits"] = model.head(stream)
    return seen


def measure_gradient_scales(watch: ProbeSpec) -> dict[str, float]:
    """RMS gradient of each role, the median over the steps of a plain run in which it is not zero."""
    model = _start(watch)
    found: dict[str, list[float]] = {}

    def look() -> None:
        squares: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            squares.setdefault(get_role(name), []).append(parameter.grad.double().square().flatten())  # type: ignore[union-attr]
        for role, parts in squares.items():
            found.setdefault(role, []).append(float(torch.cat(parts).mean().sqrt()))

    _steps(watch, model, make_optimizer(model, watch.config, verified=False), before_step=look)
    return {role: float(torch.tensor([v for v in values if v > 0] or [0.0]).median()) for role, values in found.items()}


def run_probes(watches: Sequence[ProbeSpec], engine: ProbeEngine = "plain", ranks: int = 2) -> list[ProbeResult]:
    """Make the runs, in this process or on `ranks` processes of one thread each (gloo)."""
    if engine not in PROBE_ENGINES:
        raise ValueError(f"needed an engine out of {', '.join(PROBE_ENGINES)}, got {engine!r}")
    if engine == "plain" or engine == "compile":
        return [_follow(watch, ALONE, compiled=engine == "compile") for watch in watches]
    if any(watch.batch_seqs % ranks for watch in watches):
        raise ValueError(
            f"needed batches of a multiple of {ranks} sequences for {ranks} ranks, got {watches[0].batch_seqs}"
        )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trails"
        spawn_ranks(_of_ranks, ranks, engine, list(watches), out)
        found = json.loads(out.read_text())
    return [
        ProbeResult(tuple({k: (at, change) for k, (at, change) in step.items()} for step in seen), tuple(losses))
        for seen, losses in found
    ]


def _of_ranks(ranks: Ranks, watches: Sequence[ProbeSpec], out: Path) -> None:
    """What one process of several does; the first writes what it saw."""
    trails = [_follow(watch, ranks) for watch in watches]
    if ranks.rank == 0:
        out.write_text(json.dumps([(trail.seen, trail.losses) for trail in trails]))


@torch.no_grad()
def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by their own names, whatever wraps or shards the model. All ranks ask together."""
    return {strip_wrappers(name): gather_full(p).detach().clone() for name, p in model.named_parameters()}


def _start(watch: ProbeSpec) -> Transformer:
    model = build(watch.config)
    return model.double() if watch.double else model


def _follow(watch: ProbeSpec, ranks: Ranks, *, compiled: bool = False) -> ProbeResult:
    twin = _start(watch)
    model = wrap_model(_start(watch), ranks.engine, torch.device("cpu"))
    if compiled:
        torch.compiler.reset()  # every model is another one: past eight, calls would go on uncompiled
        model = cast(nn.Module, torch.compile(model))
    optimizer = make_optimizer(model, watch.config, verified=False)  # to find out is what this is for
    if watch.what == "activations":
        return _activations(watch, model, optimizer, twin, ranks)
    assert watch.scales is not None
    for group in optimizer.param_groups:
        if watch.what == "eps":
            group["eps"] *= watch.scales[group["role"]] / watch.config.eps
            group["weight_decay"] = 0.0
        else:
            group["weight_decay"] *= watch.scales["factor"]
    losses = _steps(watch, model, optimizer, ranks)
    return ProbeResult((_moved(watch, twin, gather_weights(model), optimizer),), losses)


def _activations(watch: ProbeSpec, model: nn.Module, optimizer: Any, twin: Transformer, ranks: Ranks) -> ProbeResult:
    probe, _ = open_data(watch.config).windows.batch(watch.steps * watch.batch_seqs, watch.batch_seqs)  # not trained on
    first = compute_coordinates(twin, probe)
    seen: list[dict[str, tuple[float, float]]] = []

    def look() -> None:
        weights = gather_weights(model)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(weights[name])
        now = compute_coordinates(twin, probe)
        seen.append({name: (float(x.abs().mean()), float((x - first[name]).abs().mean())) for name, x in now.items()})

    look()
    losses = _steps(watch, model, optimizer, ranks, after_step=look)
    return ProbeResult(tuple(seen), losses)


def _steps(
    watch: ProbeSpec,
    model: nn.Module,
    optimizer: Any,
    ranks: Ranks = ALONE,
    *,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
) -> tuple[float, ...]:
    """Steps at the peak rate; rank r takes its part of every batch. The losses are those of the whole batch."""
    windows = open_data(watch.config).windows
    set_lr(optimizer, 1.0)
    losses = []
    for step in range(watch.steps):
        loss = compute_loss(
            model, *windows.batch(step * watch.batch_seqs, watch.batch_seqs, rank=ranks.rank, ranks=ranks.world)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        if before_step is not None:
            before_step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(ranks.sum_over_ranks(loss.detach().double())) / ranks.world)
        if after_step is not None:
            after_step()
    return tuple(losses)


def _moved(
    watch: ProbeSpec, twin: Transformer, weights: Mapping[str, Tensor], optimizer: Any
) -> dict[str, tuple[float, float]]:
    """eps: mean |w - w at start| over the peak rate, by role. decay: the share of the start that is gone, by role.

    In its second place, as a change. The share gone is 1 - <w, w0> / <w0, w0>: what training adds is almost orthogonal
    to the start. Nothing can be said of the decay of a readout that starts at zero.
    """
    rates = {group["role"]: group["peak_lr"] for group in optimizer.param_groups}
    decayed = {group["role"] for group in optimizer.param_groups if group["weight_decay"] > 0}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, start in twin.named_parameters():
        pairs.setdefault(get_role(name), []).append((start.detach().flatten(), weights[name].flatten()))
    moved = {}
    for role, both in pairs.items():
        w0, w = (torch.cat(part) for part in zip(*both, strict=True))
        if watch.what == "eps":
            moved[role] = float((w - w0).abs().mean()) / rates[role]
        elif role in decayed and bool(w0.any()):
            moved[role] = 1 - float(w @ w0) / float(w0 @ w0)
    return {role: (math.nan, value) for role, value in moved.items()}
