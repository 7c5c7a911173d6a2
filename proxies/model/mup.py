"""muP as a table: what width and depth do to each kind of parameter (docs/math.md §2).

The values of a configuration are those at base width and base depth. Only m = d_model / base_width and r = n_layers /
base_layers scale them. At m = r = 1 both parametrizations give the same numbers, so the same model. Nothing is stored
in tensors: a parameter's rule follows from its name, so it survives torch.compile, DDP and FSDP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from proxies.config.proxy import ProxyConfig
from proxies.model.dtensors import copy_into

Role = Literal["embedding", "hidden", "norm", "qk_norm", "final_norm", "readout"]
ROLES: tuple[Role, ...] = ("embedding", "hidden", "norm", "qk_norm", "final_norm", "readout")
GAIN_ROLES: tuple[Role, ...] = ("norm", "qk_norm", "final_norm")

_ROLES_BY_LEAF: dict[str, Role] = {
    "embed": "embedding",
    "q": "hidden",
    "k": "hidden",
    "v": "hidden",
    "o": "hidden",
    "gate": "hidden",
    "up": "hidden",
    "down": "hidden",
    "attn_norm": "norm",
    "mlp_norm": "norm",
    "q_norm": "qk_norm",
    "k_norm": "qk_norm",
    "final_norm": "final_norm",
    "readout": "readout",
}

# Parts that torch.compile, DDP and activation checkpointing insert into the name of a parameter.
_WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")

# Power of 1/m on the rate of hidden matrices; 1 for optimizers that are not listed. The entries of Adam's step and of a
# sign have one size, so the step must shrink with fan_in. An orthogonal step has the same spectral norm at every width
# (arXiv 2310.17813); Muon scaled to AdamW's RMS grows as sqrt(m). LAMB's step is a share of its matrix, whose entries
# fall as 1/sqrt(m) already.
HIDDEN_LR_POWERS = {"lamb": 0.5, "muon": 0.0, "muon-rms": 0.5}


@dataclass(frozen=True)
class ParameterRule:
    """How the parameters of one role are initialized and trained, at one width and depth.

    Attributes:
        init_mean: Mean of the initial values.
        init_std: Standard deviation of the initial values.
        lr: Peak learning rate, which a schedule multiplies.
        weight_decay: Weight decay as given to AdamW, which multiplies it by lr.
        eps: Epsilon of Adam.
        multiplier: Forward multiplier: on the embedding's output, on the readout's input, and on the branches of a
            block; 1 elsewhere.
    """

    init_mean: float
    init_std: float
    lr: float
    weight_decay: float
    eps: float
    multiplier: float


def strip_wrappers(name: str) -> str:
    """Return the dotted name of a parameter without the parts that wrappers have inserted."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def get_role(name: str) -> Role:
    """Return the role of a parameter.

    Args:
        name: Dotted name, such as `blocks.0.gate`.

    Raises:
        ValueError: If no role is known for the name.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf not in _ROLES_BY_LEAF:
        raise ValueError(f"needed a parameter called one of {', '.join(_ROLES_BY_LEAF)}, got {name!r}: give it a role")
    return _ROLES_BY_LEAF[leaf]


def compute_rules(config: ProxyConfig) -> dict[Role, ParameterRule]:
    """Return the muP table at the width and depth of a configuration.

    muP for Adam (arXiv 2203.03466, table 8, written relative to a base width) and CompleteP (arXiv 2505.01618), with
    a = depth_power:

    | role       | init std     | lr               | weight decay | eps          | multiplier            |
    |------------|--------------|------------------|--------------|--------------|-----------------------|
    | embedding  | embed_std    | lr · rho_e       | 0            | eps/m        | alpha_in              |
    | hidden     | init_std/√m  | lr/m · r^(a-1)   | wd · m·r^(1-a) | eps/m · r^-a | r^-a on each branch |
    | norm       | 0 (mean 1)   | lr · r^(a-1)     | 0            | eps/m · r^-a | 1                     |
    | qk_norm    | 0 (mean 1)   | lr · r^(a-1)     | 0            | eps · r^-a   | 1                     |
    | final_norm | 0 (mean 1)   | lr               | 0            | eps/m        | 1                     |
    | readout    | 0            | lr               | wd           | eps/m        | alpha_out / m         |

    A tied table follows the embedding's row, with both multipliers. Hidden decay grows so that lr · wd, the decay of
    one step, depends neither on width (arXiv 2510.19093) nor, for a below 1, on depth (derived). eps shrinks as the
    gradients do: with m, except for a gain of d_head numbers that all heads share, and inside a block with its branch's
    multiplier. Muon's hidden rate is lr, or lr/√m when scaled to AdamW's RMS, as LAMB's is, and the decay follows it.

    "standard" keeps only the 1/√m of the hidden init (it preserves variance) and has no depth rule; a readout that
    starts at zero is the same in both. One m serves every hidden matrix: d_ff / d_model, d_head and the query heads per
    key head are fixed in a family.

    Args:
        config: The proxy.

    Returns:
        The rule of each role.
    """
    m = config.m
    is_mup = config.parametrization == "mup"
    # The width multiplier as the optimizer and the forward multipliers see it.
    width = m if is_mup else 1.0
    branch = config.r**-config.depth_power if is_mup else 1.0
    # The rate of everything inside a block.
    rate = config.lr * (config.r ** (config.depth_power - 1) if is_mup else 1.0)
    slowdown = width ** HIDDEN_LR_POWERS.get(config.optimizer, 1.0)
    # The product lr · decay is then the same at every width and depth.
    decay = config.weight_decay * slowdown * config.lr / rate
    eps = config.eps / width
    return {
        "embedding": ParameterRule(0.0, config.embed_std, config.lr * config.embed_lr_mult, 0.0, eps, config.alpha_in),
        "hidden": ParameterRule(0.0, config.init_std / math.sqrt(m), rate / slowdown, decay, eps * branch, branch),
        "norm": ParameterRule(1.0, 0.0, rate, 0.0, eps * branch, 1.0),
        "qk_norm": ParameterRule(1.0, 0.0, rate, 0.0, config.eps * branch, 1.0),
        "final_norm": ParameterRule(1.0, 0.0, config.lr, 0.0, eps, 1.0),
        "readout": ParameterRule(0.0, 0.0, config.lr, config.weight_decay, eps, config.alpha_out / width),
    }


def map_rules(names: Iterable[str], config: ProxyConfig) -> dict[str, ParameterRule]:
    """Return the rule of every parameter by its own name, as a checkpoint stores it and other trainers receive it.

    Args:
        names: Names of parameters, with or without the parts that wrappers insert.
        config: The proxy.

    Returns:
        Rules by name without wrappers.
    """
    table = compute_rules(config)
    return {strip_wrappers(name): table[get_role(name)] for name in names}


@torch.no_grad()
def init_parameters(model: nn.Module, config: ProxyConfig, generator: torch.Generator | None = None) -> None:
    """Initialize every parameter in place, in the order of `named_parameters`.

    The random numbers are drawn on CPU, so a model starts the same on every device and whatever the state of the global
    generator.

    Args:
        model: The model; it may be wrapped, and its parameters sharded.
        config: The proxy.
        generator: A CPU generator; by default a new one seeded by `config.seed`.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(config.seed)
    table = compute_rules(config)
    for name, parameter in model.named_parameters():
        copy_into(parameter, draw_parameter(tuple(parameter.shape), table[get_role(name)], generator))


def draw_parameter(shape: tuple[int, ...], rule: ParameterRule, generator: torch.Generator) -> torch.Tensor:
    """Return initial values by a rule, float32 on CPU. A constant tensor draws nothing from the generator."""
    if rule.init_std == 0:
        return torch.full(shape, rule.init_mean)
    return torch.empty(shape).normal_(rule.init_mean, rule.init_std, generator=generator)


def param_groups(model: nn.Module, config: ProxyConfig) -> list[dict[str, Any]]:
    """Return one optimizer parameter group per role, with the values of the muP table.

    The model may be compiled or wrapped by DDP, and its parameters sharded by FSDP2: parameters are recognized by name,
    and the table follows from `config`, not from the shape of a shard.

    Args:
        model: The model.
        config: The proxy.

    Returns:
        Groups with "params", "role", "lr", "peak_lr", "weight_decay", "eps" and "betas", for `torch.optim.AdamW`.
        `peak_lr` stays constant; a schedule sets `lr = factor * peak_lr` in each group.
    """
    members: dict[Role, list[nn.Parameter]] = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        members[get_role(name)].append(parameter)
    table = compute_rules(config)
    return [
        {
            "params": members[role],
            "role": role,
            "lr": table[role].lr,
            "peak_lr": table[role].lr,
            "weight_decay": table[role].weight_decay,
            "eps": table[role].eps,
            "betas": (config.beta1, config.beta2),
        }
        for role in ROLES
        if members[role]
    ]
