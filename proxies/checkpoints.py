"""Checkpoints: written whole or not at all, read without running code, refused by name when foreign or broken."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from proxies.config import ProxyConfig
from proxies.model import Transformer, build

FORMAT = "muscale-proxy-1"


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write whole or not at all: to a temporary file beside `path`, then over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save(dict(state), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Any]:
    """A file written by `train`, on CPU. Only tensors and plain values are read, never code."""
    if not path.is_file():
        raise ValueError(f"needed a saved run, got {path}: no such file")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("format") != FORMAT:
        raise ValueError(f"needed a run saved as {FORMAT}, got {path} with format {state.get('format')!r}")
    return state


def load_model(path: Path, which: Literal["annealed", "trunk"] = "annealed") -> tuple[ProxyConfig, Transformer]:
    """Configuration and model of a saved run: the weights after the cooldown, or those at its branch point."""
    state = load_state(path)
    if which not in ("annealed", "trunk"):
        raise ValueError(f"needed which = 'annealed' or 'trunk', got {which!r}")
    if which not in state:
        raise ValueError(
            f"needed a run that has ended, got {path} in its {state['phase']}: ask for 'trunk', or finish it"
        )
    config = ProxyConfig.model_validate(state["config"])
    model = build(config)
    load_weights(model, state[which]["model"])
    return config, model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: tuple(t.shape) for name, t in weights.items()}
    wrong = [
        f"{name}: {given.get(name, 'missing')} given, {own.get(name, 'no such parameter')} needed"
        for name in sorted(own.keys() | given.keys())
        if own.get(name) != given.get(name)
    ]
    if wrong:
        raise ValueError("needed weights of this configuration's shape, got " + "; ".join(wrong))
    model.load_state_dict(dict(weights))


def copy_to_cpu(value: Any) -> Any:
    """Nested dicts, lists and tuples with every tensor copied to CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(item) for item in value)
    return value
