"""Read a trained checkpoint one tensor at a time, and write and read the grown file from which a training starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from proxies.config.growth_rules import GrowthMethod, find_differences
from proxies.config.proxy import ProxyConfig
from proxies.growth.moments import check_adamw, compute_moment_shapes, grow_moments, locate_moments
from proxies.growth.weights import check_shapes, compute_shapes, grow_tensors
from proxies.training.checkpoints import check_destination, explain_damage, read_config, write_run
from proxies.training.lazy_tensors import open_run

FORMAT = "muscale-grown-1"
Which = Literal["annealed", "trunk"]


@dataclass(frozen=True)
class TrainedRun:
    """A saved run that can be grown. Its tensors are read from disk on access.

    Attributes:
        path: The checkpoint.
        which: The state to grow: after the cooldown, or the trunk.
        config: The configuration it was trained with.
        weights: Parameters by name.
        moments: Adam's moments by name; None after the cooldown, and for another optimizer than AdamW.
        data_sha256: Hash of its data.
        tokens: Tokens trained up to that state.
    """

    path: Path
    which: Which
    config: ProxyConfig
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor] | None
    data_sha256: str
    tokens: int


@dataclass(frozen=True)
class InitialState:
    """The state from which a training starts, read from disk on access.

    Attributes:
        weights: Parameters by name; None for a fresh initialisation.
        moments: Adam's moments by name; None for zeros.
    """

    weights: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Tensor] | None = None


def open_trained(path: Path, which: Which = "annealed") -> TrainedRun:
    """Open a run saved by `train`, reading its header only.

    Args:
        path: The checkpoint, a file or a folder.
        which: "annealed" for the weights after the cooldown, "trunk" for the state at the branch point or where the run
            was interrupted.

    Raises:
        ValueError: If there is no such run, or it has no such state.
    """
    run = open_run(path)
    saved = run.saved
    if which not in saved:
        raise ValueError(
            f"needed a run that has ended, got {path} in its {saved.get('phase')}: ask for 'trunk', or finish the run"
        )
    with explain_damage(path):
        kept = saved[which]
        config = read_config(saved, kept["model"])
        weights = run.tensors({name: (which, "model", name) for name in kept["model"]})
        moments = None
        if which == "trunk" and config.optimizer == "adamw" and kept["optimizer"]["state"]:
            moments = run.tensors({name: (which, "optimizer", *key) for name, key in locate_moments(config).items()})
        tokens = saved["tokens"] if which == "annealed" else kept["windows"] * config.seq_len
        return TrainedRun(path, which, config, weights, moments, saved["data_sha256"], tokens)


def write_grown(
    trained: TrainedRun,
    large: ProxyConfig,
    out: Path,
    *,
    method: GrowthMethod = "shrink-pad-perturb",
    shrink: float = 0.4,
    noise: float | None = None,
    moments: bool = False,
) -> None:
    """Grow a saved run into a new file, which `read_grown` and `proxies train --init` read.

    The small model's tensors are read one at a time; the large model is held in memory once.

    Args:
        trained: The run to grow.
        large: The large model's configuration.
        out: Where the grown state goes, written as a whole: a file .pt, or a folder of shards.
        method: How to grow, see `proxies.growth.weights`.
        shrink: See `proxies.growth.weights.grow`.
        noise: See `proxies.growth.weights.grow`.
        moments: Whether to grow Adam's moments, too; only for "duplicate" without noise.

    Raises:
        ValueError: If the run cannot be grown like this. Nothing is written.
        OSError: If the file cannot be written.
    """
    check_destination(out)
    if out.exists() and out.samefile(trained.path):
        raise ValueError(f"needed another path for the grown state than the checkpoint's, got {out}")
    if moments:
        check_moments(trained, method, noise)
    weights = grow_tensors(trained.weights, trained.config, large, method=method, shrink=shrink, noise=noise)
    origin = {"from": str(trained.path), "which": trained.which, "N": trained.config.counts.N, "tokens": trained.tokens}
    origin |= {"data_sha256": trained.data_sha256, "method": method, "shrink": shrink, "noise": noise}
    state: dict[str, Any] = {"format": FORMAT, "config": large.model_dump(), "grown": origin}
    # Both iterators are made, and so checked, before the first tensor is read.
    grown_moments = None
    if moments and trained.moments is not None:
        grown_moments = grow_moments(trained.moments, trained.config, large)
    state["model"] = dict(weights)
    if grown_moments is not None:
        state["moments"] = dict(grown_moments)
    write_run(state, out)


def check_moments(trained: TrainedRun, method: GrowthMethod, noise: float | None) -> None:
    """Raise ValueError with the reason if the moments of a run cannot be grown by this method."""
    check_adamw(trained.config)
    if method != "duplicate" or noise:
        raise ValueError(
            f"moments can only be grown by method 'duplicate' without noise, got {method!r}, noise {noise or 0:g}: "
            "the others "
            "change gradients in ways that no rule can invert; leave the moments out"
        )
    if trained.moments is None:
        raise ValueError(
            f"{trained.path} has no moments in its {trained.which!r} state: ask for 'trunk' of a run that has taken "
            "steps on it"
        )


def read_grown(path: Path, config: ProxyConfig) -> InitialState:
    """Open a grown state for a training of `config`.

    Args:
        path: What `write_grown` wrote.
        config: The configuration to be trained.

    Raises:
        ValueError: If it was grown for another model. The message names all differences.
    """
    run = open_run(path, FORMAT)
    state = run.saved
    with explain_damage(path):
        theirs = read_config(state, state["model"])
    differences = [
        f"{name}: {getattr(theirs, name)} to {getattr(config, name)}"
        for name in ("d_model", "n_layers")
        if getattr(theirs, name) != getattr(config, name)
    ] + find_differences(theirs, config)
    if "moments" in state and config.optimizer != theirs.optimizer:
        differences.append(f"optimizer, whose moments it holds: {theirs.optimizer} to {config.optimizer}")
    if differences:
        raise ValueError(
            f"needed a model grown for this configuration, got {path}; these differ: {'; '.join(differences)}"
        )
    with explain_damage(path):
        weights = run.tensors({name: ("model", name) for name in state["model"]})
        check_shapes(weights, compute_shapes(config))
        moments = None
        if "moments" in state:
            moments = run.tensors({name: ("moments", name) for name in state["moments"]})
            check_shapes(moments, compute_moment_shapes(config))
        return InitialState(weights, moments)
