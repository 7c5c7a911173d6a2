"""Measure activations, and the effect of epsilon and decay, over a few training steps, for `proxies check`.

An engine (plain, compiled, DDP, FSDP2) takes the steps; a plain copy with the same weights is measured.
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
from proxies.model.mup import get_role, strip_wrappers
from proxies.model.optimizers import make_optimizer, set_lr
from proxies.model.transformer import Block, Transformer, build, compute_loss, rms_norm
from proxies.training.distributed import ALONE, Ranks, spawn_ranks, wrap_model

ProbeEngine = Literal["plain", "compile", "ddp", "fsdp2"]
PROBE_ENGINES: tuple[ProbeEngine, ...] = ("plain", "compile", "ddp", "fsdp2")
# Optimizers that divide by sqrt(v) + eps, so that eps must follow the gradients.
DIVIDE_BY_EPS = ("adamw", "adamw8bit", "ademamix", "schedule-free")
# Optimizers that multiply weights by 1 - lr * decay. Prodigy has its own rate, and LAMB scales the decay with the
# update.
DECAY_BY_RATE = (*DIVIDE_BY_EPS, "lion", "muon", "muon-rms", "soap")
# The share of a hidden matrix at base size that decays in each step of the decay stress.
DECAYED = 0.05


@dataclass(frozen=True)
class ProbeResult:
    """The measurements of one run.

    Attributes:
        measurements: For each step from 0, (mean |x|, mean |x - x at step 0|) by quantity. Under stress there is one
            entry, by role, whose second value is the update or the share that has decayed.
        losses: The training loss of every step, in nats per token.
    """

    measurements: tuple[dict[str, tuple[float, float]], ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class ProbeSpec:
    """One run: which model, what is measured, for how long.

    Attributes:
        config: The proxy.
        what: What is measured.
        steps: Training steps.
        batch_seqs: Sequences of a batch.
        scales: For "eps" the RMS gradient by role at base size, for "decay" the factor on every decay.
        double: Whether to compute in float64.
    """

    config: ProxyConfig
    what: Literal["activations", "eps", "decay"]
    steps: int
    batch_seqs: int
    scales: Mapping[str, float] | None = None
    double: bool = False


@torch.no_grad()
def compute_coordinates(model: Transformer, x_bt: Tensor) -> dict[str, Tensor]:
    """Compute every quantity of the check on one batch.

    Args:
        model: The model.
        x_bt: Tokens, int64.

    Returns:
        Quantities by name; the outputs of branches are those before they are added to the stream.
    """
    rope = model.get_rope(x_bt)
    stream = model.stem(x_bt)
    quantities = {"embedding": stream}
    for i, block in enumerate(cast(Iterable[Block], model.blocks)):
        normed = rms_norm(stream, block.attn_norm)
        quantities[f"block {i} attention scores"] = block.attention_logits(normed, rope)
        quantities[f"block {i} attention"] = block.attention(normed, rope)
        stream = block.add_branch(stream, quantities[f"block {i} attention"])
        quantities[f"block {i} mlp"] = block.mlp(rms_norm(stream, block.mlp_norm))
        stream = block.add_branch(stream, quantities[f"block {i} mlp"])
        quantities[f"block {i} stream"] = stream
    quantities["logits"] = model.head(stream)
    return quantities


def measure_gradient_scales(spec: ProbeSpec) -> dict[str, float]:
    """Measure the RMS gradient of each role: the median over the steps of a plain run in which it is not zero."""
    model = _build_model(spec)
    scales: dict[str, list[float]] = {}

    def record_gradients() -> None:
        squares: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            squares.setdefault(get_role(name), []).append(parameter.grad.double().square().flatten())  # type: ignore[union-attr]
        for role, parts in squares.items():
            scales.setdefault(role, []).append(float(torch.cat(parts).mean().sqrt()))

    _take_steps(spec, model, make_optimizer(model, spec.config, verified=False), before_step=record_gradients)
    return {
        role: float(torch.tensor([value for value in values if value > 0] or [0.0]).median())
        for role, values in scales.items()
    }


def run_probes(specs: Sequence[ProbeSpec], engine: ProbeEngine = "plain", ranks: int = 2) -> list[ProbeResult]:
    """Run the probes in this process, or on `ranks` processes of one thread each (gloo).

    Args:
        specs: The runs.
        engine: What takes the steps.
        ranks: Processes for the engines "ddp" and "fsdp2".

    Returns:
        The measurements, in the order of `specs`.

    Raises:
        ValueError: If the engine is unknown, or the ranks cannot divide a batch.
    """
    if engine not in PROBE_ENGINES:
        raise ValueError(f"needed an engine out of {', '.join(PROBE_ENGINES)}, got {engine!r}")
    if engine == "plain" or engine == "compile":
        return [_run_probe(spec, ALONE, compiled=engine == "compile") for spec in specs]
    if any(spec.batch_seqs % ranks for spec in specs):
        raise ValueError(
            f"needed batches of a multiple of {ranks} sequences for {ranks} ranks, got {specs[0].batch_seqs}"
        )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results"
        spawn_ranks(_run_on_rank, ranks, engine, list(specs), out)
        stored = json.loads(out.read_text())
    return [
        ProbeResult(tuple({k: (size, change) for k, (size, change) in step.items()} for step in steps), tuple(losses))
        for steps, losses in stored
    ]


def _run_on_rank(ranks: Ranks, specs: Sequence[ProbeSpec], out: Path) -> None:
    """Run the probes on one rank; rank 0 writes the measurements."""
    results = [_run_probe(spec, ranks) for spec in specs]
    if ranks.rank == 0:
        out.write_text(json.dumps([(result.measurements, result.losses) for result in results]))


@torch.no_grad()
def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return whole weights by their own names, whatever wraps or shards the model. All ranks call this together."""
    return {strip_wrappers(name): gather_full(p).detach().clone() for name, p in model.named_parameters()}


def _build_model(spec: ProbeSpec) -> Transformer:
    model = build(spec.config)
    return model.double() if spec.double else model


def _run_probe(spec: ProbeSpec, ranks: Ranks, *, compiled: bool = False) -> ProbeResult:
    twin = _build_model(spec)
    model = wrap_model(_build_model(spec), ranks.engine, torch.device("cpu"))
    if compiled:
        # Every model is a new one, and after eight of them torch would run uncompiled.
        torch.compiler.reset()
        model = cast(nn.Module, torch.compile(model))
    # Not verified: whether the optimizer's rule holds is what the check finds out.
    optimizer = make_optimizer(model, spec.config, verified=False)
    if spec.what == "activations":
        return _measure_activations(spec, model, optimizer, twin, ranks)
    assert spec.scales is not None
    for group in optimizer.param_groups:
        if spec.what == "eps":
            group["eps"] *= spec.scales[group["role"]] / spec.config.eps
            group["weight_decay"] = 0.0
        else:
            group["weight_decay"] *= spec.scales["factor"]
    losses = _take_steps(spec, model, optimizer, ranks)
    return ProbeResult((_measure_movement(spec, twin, gather_weights(model), optimizer),), losses)


def _measure_activations(
    spec: ProbeSpec, model: nn.Module, optimizer: Any, twin: Transformer, ranks: Ranks
) -> ProbeResult:
    # These windows are not trained on.
    probe, _ = open_data(spec.config).windows.batch(spec.steps * spec.batch_seqs, spec.batch_seqs)
    first = compute_coordinates(twin, probe)
    measurements: list[dict[str, tuple[float, float]]] = []

    def record_activations() -> None:
        weights = gather_weights(model)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(weights[name])
        coordinates = compute_coordinates(twin, probe)
        measurements.append(
            {name: (float(x.abs().mean()), float((x - first[name]).abs().mean())) for name, x in coordinates.items()}
        )

    record_activations()
    losses = _take_steps(spec, model, optimizer, ranks, after_step=record_activations)
    return ProbeResult(tuple(measurements), losses)


def _take_steps(
    spec: ProbeSpec,
    model: nn.Module,
    optimizer: Any,
    ranks: Ranks = ALONE,
    *,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
) -> tuple[float, ...]:
    """Take steps at the peak rate, each rank on its part of every batch, and return the losses of the whole batches."""
    windows = open_data(spec.config).windows
    set_lr(optimizer, 1.0)
    losses = []
    for step in range(spec.steps):
        loss = compute_loss(
            model, *windows.batch(step * spec.batch_seqs, spec.batch_seqs, rank=ranks.rank, ranks=ranks.world)
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


def _measure_movement(
    spec: ProbeSpec, twin: Transformer, weights: Mapping[str, Tensor], optimizer: Any
) -> dict[str, tuple[float, float]]:
    """Measure how far weights moved under stress, by role.

    The measure is the second value of each pair, like a change. For "eps" it is mean |w - w0| divided by the peak rate.
    For "decay" it is the share of the initial weights that is gone, 1 - <w, w0> / <w0, w0>, since what training adds is
    almost orthogonal to the initial weights. The decay of a readout that starts at zero cannot be measured.
    """
    rates = {group["role"]: group["peak_lr"] for group in optimizer.param_groups}
    decayed = {group["role"] for group in optimizer.param_groups if group["weight_decay"] > 0}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, start in twin.named_parameters():
        pairs.setdefault(get_role(name), []).append((start.detach().flatten(), weights[name].flatten()))
    movement = {}
    for role, members in pairs.items():
        w0, w = (torch.cat(part) for part in zip(*members, strict=True))
        if spec.what == "eps":
            movement[role] = float((w - w0).abs().mean()) / rates[role]
        elif role in decayed and bool(w0.any()):
            movement[role] = 1 - float(w @ w0) / float(w0 @ w0)
    return {role: (math.nan, value) for role, value in movement.items()}
