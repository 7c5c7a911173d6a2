"""Grow Adam's moments of a duplicated model, so that its training continues as the small one's would (docs/math.md §8).

Moments are named by parameter and kind, such as `blocks.0.q.exp_avg`, so that they can be moved one at a time. `step`
is the number of steps in them, the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from proxies.config.growth_rules import check_growth
from proxies.config.proxy import ProxyConfig
from proxies.growth.weights import check_shapes, compute_shapes, tile_width
from proxies.model.mup import ROLES, get_role
from proxies.training.moments import KINDS
from proxies.training.shards import Key


def locate_moments(config: ProxyConfig) -> dict[str, Key]:
    """Return the key of every moment in the `state_dict()` of `make_optimizer`'s AdamW, by the moment's name."""
    names = list(compute_shapes(config))
    # Parameter groups are in the order of roles.
    numbered = [name for role in ROLES for name in names if get_role(name) == role]
    number = {name: i for i, name in enumerate(numbered)}
    step: dict[str, Key] = {"step": ("state", 0, "step")}
    return step | {f"{name}.{kind}": ("state", number[name], kind) for name in names for kind in KINDS}


def grow_moments(moments: Mapping[str, Tensor], small: ProxyConfig, large: ProxyConfig) -> Iterator[tuple[str, Tensor]]:
    """Grow the moments of a model into those of its duplicate without noise.

    Gradients fall as 1/k but for the gains that all heads share, so first moments are tiled and divided by k, second
    ones by k squared (arXiv 2602.10545). With them, and with rates, decays and epsilons by `mup.compute_rules`, the
    steps are the small model's.

    Args:
        moments: The small model's moments by name.
        small: The small model's configuration.
        large: The large model's configuration.

    Returns:
        An iterator over the names and tensors of the large model's moments.

    Raises:
        ValueError: If the optimizer is not AdamW, the depth differs, or the models cannot be duplicated. It is raised
            at once.
    """
    check_adamw(small)
    check_growth(small, large, "duplicate")
    if large.n_layers != small.n_layers:
        raise ValueError(
            f"moments are only valid while the function stays the same, got n_layers {small.n_layers} to "
            f"{large.n_layers}: "
            "grow width alone, or do not grow the moments"
        )
    check_shapes(moments, compute_moment_shapes(small))
    return _grow_moments(moments, small, large)


def _grow_moments(
    moments: Mapping[str, Tensor], small: ProxyConfig, large: ProxyConfig
) -> Iterator[tuple[str, Tensor]]:
    k = large.d_model // small.d_model
    yield "step", moments["step"].clone()
    for name in compute_shapes(large):
        role = get_role(name)
        over = 1 if role == "qk_norm" else k
        yield f"{name}.exp_avg", tile_width(moments[f"{name}.exp_avg"], role, k).div_(over)
        yield f"{name}.exp_avg_sq", tile_width(moments[f"{name}.exp_avg_sq"], role, k).div_(over**2)


def compute_moment_shapes(config: ProxyConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every moment of a model by name."""
    return {"step": ()} | {f"{name}.{kind}": shape for name, shape in compute_shapes(config).items() for kind in KINDS}


def check_adamw(config: ProxyConfig) -> None:
    """Raise ValueError unless the optimizer is AdamW."""
    if config.optimizer != "adamw":
        raise ValueError(
            f"moments can be grown for optimizer 'adamw' only, got {config.optimizer!r}: leave them out, a new "
            "warm-up makes new ones"
        )
