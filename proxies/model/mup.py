"""muP as a table: what width and depth do to each kind of parameter (docs/math.md §2).

The values of a configuration are those at base width and base depth; m = d_model / base_width and r = n_layers /
base_layers are the only things that scale them. At m = r = 1 both parametrizations give the same numbers, so the same
model. Nothing is kept in tensors: the table is found by a parameter's name, so it survives torch.compile, DDP and FSDP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from proxies.config.proxy import ProxyConfig
from proxies.model.dtensors import place

Role = Literal["embedding", "hidden", "norm", "qk_norm", "final_norm", "readout"]
ROLES: tuple[Role, ...] = ("embedding", "hidden", "norm", "qk_norm", "final_norm", "readout")
GAINS: tuple[Role, ...] = ("norm", "qk_norm", "final_norm")

_ROLE_OF_LEAF: dict[str, Role] = {
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

# What torch.compile, DDP and activation checkpointing put into the name of a parameter.
_WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")

# Power of 1/m on the rate of hidden matrices. Adam's and a sign's step has entries of one size, so it must shrink with fan_in.
# An orthogonal step has one spectral norm whatever the width (2310.17813); Muon scaled to AdamW's RMS grows as sqrt(m).
# LAMB's step is a share of its matrix, whose entries fall as 1/sqrt(m) already.
_HIDDEN_POWER = {"lamb": 0.5, "muon": 0.0, "muon-rms": 0.5}


@dataclass(frozen=True)
class Rule:
    """What one role gets at one width and depth."""

    init_mean: float
    init_std: float
    lr: float  # peak; a schedule multiplies it
    weight_decay: float  # as given to AdamW, which multiplies it by lr
    eps: float
    multiplier: float  # forward: on the embedding's output, on the readout's input, on a block's branches; 1 elsewhere


def clean(name: str) -> str:
    """A parameter's own dotted name, without what wrappers have put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def role_of(name: str) -> Role:
    """Role of the parameter with this dotted name, such as `blocks.0.gate`."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf not in _ROLE_OF_LEAF:
        raise ValueError(f"needed a parameter called one of {', '.join(_ROLE_OF_LEAF)}, got {name!r}: give it a role")
    return _ROLE_OF_LEAF[leaf]


def rules(config: ProxyConfig) -> dict[Role, Rule]:
    """The table at the width and depth of `config`.

    muP for Adam (arXiv 2203.03466, table 8, written relative to a base width) and CompleteP (2505.01618), a = depth_power:

    | role       | init std     | lr               | weight decay | eps          | multiplier            |
    |------------|--------------|------------------|--------------|--------------|-----------------------|
    | embedding  | embed_std    | lr · rho_e       | 0            | eps/m        | alpha_in              |
    | hidden     | init_std/√m  | lr/m · r^(a-1)   | wd · m·r^(1-a) | eps/m · r^-a | r^-a on each branch |
    | norm       | 0 (mean 1)   | lr · r^(a-1)     | 0            | eps/m · r^-a | 1                     |
    | qk_norm    | 0 (mean 1)   | lr · r^(a-1)     | 0            | eps · r^-a   | 1                     |
    | final_norm | 0 (mean 1)   | lr               | 0            | eps/m        | 1                     |
    | readout    | 0            | lr               | wd           | eps/m        | alpha_out / m         |

    A tied table follows the embedding's row, with both multipliers. Hidden decay grows so that lr · wd, the decay
    of one step, depends on neither width (2510.19093) nor, for a below 1, depth (derived). eps shrinks as the gradients do: with m, but for a gain of
    d_head numbers that all heads share, and inside a block with its branch's multiplier. Muon's hidden rate is lr, or
    lr/√m when scaled to AdamW's RMS, as LAMB's is, and the decay follows it.

    "standard" keeps only the 1/√m of the hidden init (it preserves variance) and knows no depth; a readout that starts
    at zero is the same in both. One m serves every hidden matrix: d_ff / d_model, d_head and the query heads per key
    head are fixed in a family.
    """
    m = config.m
    mup = config.parametrization == "mup"
    width = m if mup else 1.0  # what the optimizer and the multipliers see
    branch = config.r**-config.depth_power if mup else 1.0
    rate = config.lr * (config.r ** (config.depth_power - 1) if mup else 1.0)  # of everything in a block
    slower = width ** _HIDDEN_POWER.get(config.optimizer, 1.0)
    decay = config.weight_decay * slower * config.lr / rate  # so that lr · decay is the same at every width and depth
    eps = config.eps / width
    return {
        "embedding": Rule(0.0, config.embed_std, config.lr * config.embed_lr_mult, 0.0, eps, config.alpha_in),
        "hidden": Rule(0.0, config.init_std / math.sqrt(m), rate / slower, decay, eps * branch, branch),
        "norm": Rule(1.0, 0.0, rate, 0.0, eps * branch, 1.0),
        "qk_norm": Rule(1.0, 0.0, rate, 0.0, config.eps * branch, 1.0),
        "final_norm": Rule(1.0, 0.0, config.lr, 0.0, eps, 1.0),
        "readout": Rule(0.0, 0.0, config.lr, config.weight_decay, eps, config.alpha_out / width),
    }


def rule_of(names: Iterable[str], config: ProxyConfig) -> dict[str, Rule]:
    """The rule of every parameter, by its own name: what a checkpoint keeps and what other trainers are given."""
    table = rules(config)
    return {clean(name): table[role_of(name)] for name in names}


@torch.no_grad()
def init(model: nn.Module, config: ProxyConfig, generator: torch.Generator | None = None) -> None:
    """Draw every parameter afresh, in place, in the order of `named_parameters`.

    The generator is a CPU one made from `config.seed` unless given, so a model starts the same on every device and
    whatever the global generator did before.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(config.seed)
    table = rules(config)
    for name, parameter in model.named_parameters():
        place(parameter, draw(tuple(parameter.shape), table[role_of(name)], generator))


def draw(shape: tuple[int, ...], rule: Rule, generator: torch.Generator) -> torch.Tensor:
    """A fresh tensor by the rule, float32 on CPU; a constant one asks the generator for nothing."""
    if rule.init_std == 0:
        return torch.full(shape, rule.init_mean)
    return torch.empty(shape).normal_(rule.init_mean, rule.init_std, generator=generator)


def param_groups(model: nn.Module, config: ProxyConfig) -> list[dict[str, Any]]:
    """One AdamW group per role. `peak_lr` stays what it is here; a schedule sets `lr = factor * peak_lr` per group.

    The model may be compiled or wrapped by DDP, and its parameters sharded by FSDP2: they are known by name, and the
    table follows from `config`, not from the shape of a shard.
    """
    members: dict[Role, list[nn.Parameter]] = {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        members[role_of(name)].append(parameter)
    table = rules(config)
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
