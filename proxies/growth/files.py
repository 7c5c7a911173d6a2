"""What growth reads and writes: a trained checkpoint, tensor by tensor, and the grown file that a training starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from proxies.config.growth_rules import Method, differences
from proxies.config.proxy import ProxyConfig
from proxies.growth.moments import check_adamw, expected_shapes, grown_moments, places
from proxies.growth.weights import check_shapes, grown, shapes
from proxies.training.checkpoints import check_place, config_of, reading, write_run
from proxies.training.lazy_tensors import open_run

FORMAT = "muscale-grown-1"
Which = Literal["annealed", "trunk"]


@dataclass(frozen=True)
class Trained:
    """A saved run that can be grown. Its tensors are read when they are asked for."""

    path: Path
    which: Which
    config: ProxyConfig
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor] | None  # by name; None after the cooldown, or for another optimizer than AdamW
    data_sha256: str
    tokens: int  # trained


@dataclass(frozen=True)
class InitialState:
    """What a training starts from: weights and perhaps moments, read when they are asked for; fresh ones where there are none."""

    weights: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Tensor] | None = None


def open_trained(path: Path, which: Which = "annealed") -> Trained:
    """A run saved by `train`: after its cooldown, or its trunk, at the branch point or wherever it was cut off.

    ValueError if there is none, or it has no such state.
    """
    run = open_run(path)
    saved = run.saved
    if which not in saved:
        raise ValueError(
            f"needed a run that has ended, got {path} in its {saved.get('phase')}: ask for 'trunk', or finish it"
        )
    with reading(path):
        kept = saved[which]
        config = config_of(saved, kept["model"])
        weights = run.tensors({name: (which, "model", name) for name in kept["model"]})
        moments = None
        if which == "trunk" and config.optimizer == "adamw" and kept["optimizer"]["state"]:
            moments = run.tensors({name: (which, "optimizer", *key) for name, key in places(config).items()})
        tokens = saved["tokens"] if which == "annealed" else kept["windows"] * config.seq_len
        return Trained(path, which, config, weights, moments, saved["data_sha256"], tokens)


def write_grown(
    trained: Trained,
    large: ProxyConfig,
    out: Path,
    *,
    method: Method = "shrink-pad-perturb",
    shrink: float = 0.4,
    noise: float | None = None,
    moments: bool = False,
) -> None:
    """Grow a saved run into `out`, written whole or not at all; `read_grown` and `proxies train --init` read it.

    moments: Adam's, too ("duplicate" without noise). The small model's tensors are read one at a time; the large one is held once.
    ValueError before anything is written, OSError when it cannot be.
    """
    check_place(out)
    if out.exists() and out.samefile(trained.path):
        raise ValueError(f"needed another path than the checkpoint's for what is grown, got {out}")
    if moments:
        check_moments(trained, method, noise)
    weights = grown(trained.weights, trained.config, large, method=method, shrink=shrink, noise=noise)
    said = {"from": str(trained.path), "which": trained.which, "N": trained.config.counts.N, "tokens": trained.tokens}
    said |= {"data_sha256": trained.data_sha256, "method": method, "shrink": shrink, "noise": noise}
    state: dict[str, Any] = {"format": FORMAT, "config": large.model_dump(), "grown": said}
    more = grown_moments(trained.moments, trained.config, large) if moments and trained.moments is not None else None
    state["model"] = dict(weights)
    if more is not None:
        state["moments"] = dict(more)
    write_run(state, out)


def check_moments(trained: Trained, method: Method, noise: float | None) -> None:
    """ValueError that says why the moments of a run cannot be moved by this method."""
    check_adamw(trained.config)
    if method != "duplicate" or noise:
        raise ValueError(
            f"moments can be moved by method 'duplicate' without noise alone, got {method!r}, noise {noise or 0:g}: the others "
            "change gradients in ways that no rule undoes; leave them behind"
        )
    if trained.moments is None:
        raise ValueError(
            f"{trained.path} has no moments in its {trained.which!r} state: ask for 'trunk' of a run that has taken steps on it"
        )


def read_grown(path: Path, config: ProxyConfig) -> InitialState:
    """What `write_grown` wrote, for a training of `config`. ValueError that names all differences when it is for another model."""
    run = open_run(path, FORMAT)
    state = run.saved
    with reading(path):
        theirs = config_of(state, state["model"])
    wrong = [
        f"{name}: {getattr(theirs, name)} to {getattr(config, name)}"
        for name in ("d_model", "n_layers")
        if getattr(theirs, name) != getattr(config, name)
    ] + differences(theirs, config)
    if "moments" in state and config.optimizer != theirs.optimizer:
        wrong.append(f"optimizer, whose moments it holds: {theirs.optimizer} to {config.optimizer}")
    if wrong:
        raise ValueError(f"needed a model grown for this configuration, got {path}; these differ: {'; '.join(wrong)}")
    with reading(path):
        weights = run.tensors({name: ("model", name) for name in state["model"]})
        check_shapes(weights, shapes(config))
        moments = None
        if "moments" in state:
            moments = run.tensors({name: ("moments", name) for name in state["moments"]})
            check_shapes(moments, expected_shapes(config))
        return InitialState(weights, moments)
