"""Checkpoints: written whole or not at all, read without running code, refused by name when foreign or broken."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from proxies.config import ProxyConfig
from proxies.model import Transformer, build

FORMAT = "muscale-proxy-1"


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write whole or not at all: to a temporary file beside `path`, then over it.

    OSError when it cannot be written (a full disk, for one); what stood at `path` before is still there then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save(dict(state), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch's own writer raises RuntimeError where Python's would raise OSError
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        before = "the one written before is intact" if path.exists() else "nothing was written"
        raise OSError(
            number, f"cannot write a checkpoint ({error}): free space or mend the folder; {before}", str(path)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the new name must survive a power cut, too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_state(path: Path) -> dict[str, Any]:
    """A file written by `train`, on CPU. Only tensors and plain values are read, never code."""
    if not path.is_file():
        raise ValueError(f"needed a saved run, got {path}: no such file")
    try:
        # torch does not look at the checksums that it has written.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise zipfile.BadZipFile(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"needed a run saved by `train`, got {path}, which is cut short, damaged or something else "
            f"({(str(error) or type(error).__name__).splitlines()[0]}): name another checkpoint, or train it again"
        ) from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise ValueError(f"needed a run saved as {FORMAT}, got {path} with format {found!r}")
    whole: dict[str, Any] = state
    return whole


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
