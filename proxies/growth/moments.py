"""Adam's moments of a duplicated model: with them its training goes on as the small one's would (docs/math.md §8).

Moments are named by parameter and kind, such as `blocks.0.q.exp_avg`, so that they can be moved one at a time; `step` is the number
of steps that are in them, the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from proxies.config.growth_rules import check_growth
from proxies.config.proxy import ProxyConfig
from proxies.growth.weights import check_shapes, shapes, tiled
from proxies.model.mup import ROLES, role_of
from proxies.training.moments import KINDS
from proxies.training.shards import Key


def places(config: ProxyConfig) -> dict[str, Key]:
    """Where each is in the `state_dict()` of `make_optimizer`'s AdamW."""
    names = list(shapes(config))
    numbered = [name for role in ROLES for name in names if role_of(name) == role]  # groups are in the order of roles
    number = {name: i for i, name in enumerate(numbered)}
    found: dict[str, Key] = {"step": ("state", 0, "step")}
    return found | {f"{name}.{kind}": ("state", number[name], kind) for name in names for kind in KINDS}


def grown_moments(
    moments: Mapping[str, Tensor], small: ProxyConfig, large: ProxyConfig
) -> Iterator[tuple[str, Tensor]]:
    """Moments of a duplicated model (without noise) from those of the small one, one after the other; checked at once.

    Gradients fall as 1/k but for gains that all heads share, so first moments are tiled over k, second ones over k squared
    (arXiv 2602.10545). With them, and rates, decays and epsilons by `mup.rules`, steps are the small model's.
    """
    check_adamw(small)
    check_growth(small, large, "duplicate")
    if large.n_layers != small.n_layers:
        raise ValueError(
            f"moments keep their meaning only while the function stays, got n_layers {small.n_layers} to {large.n_layers}: "
            "grow width alone, or leave the moments behind"
        )
    check_shapes(moments, expected_shapes(small))
    return _grown(moments, small, large)


def _grown(moments: Mapping[str, Tensor], small: ProxyConfig, large: ProxyConfig) -> Iterator[tuple[str, Tensor]]:
    k = large.d_model // small.d_model
    yield "step", moments["step"].clone()
    for name in shapes(large):
        role = role_of(name)
        over = 1 if role == "qk_norm" else k
        yield f"{name}.exp_avg", tiled(moments[f"{name}.exp_avg"], role, k).div_(over)
        yield f"{name}.exp_avg_sq", tiled(moments[f"{name}.exp_avg_sq"], role, k).div_(over**2)


def expected_shapes(config: ProxyConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every moment of a model."""
    return {"step": ()} | {f"{name}.{kind}": shape for name, shape in shapes(config).items() for kind in KINDS}


def check_adamw(config: ProxyConfig) -> None:
    if config.optimizer != "adamw":
        raise ValueError(
            f"moments can be moved for optimizer 'adamw' alone, got {config.optimizer!r}: leave them behind, a fresh warm-up makes new ones"
        )
