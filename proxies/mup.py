"""muP as a table: what width does to each kind of parameter (docs/math.md §2).

The values of a configuration are those at base width; m = d_model / base_width is the only thing that scales them.
At m = 1 both parametrizations give the same numbers, so the same model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from proxies.config import ProxyConfig

Role = Literal["embedding", "hidden", "norm", "readout"]
ROLES: tuple[Role, ...] = ("embedding", "hidden", "norm", "readout")

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
    "final_norm": "norm",
    "readout": "readout",
}


@dataclass(frozen=True)
class Rule:
    """What one role gets at one width."""

    init_mean: float
    init_std: float
    lr: float  # peak; a schedule multiplies it
    weight_decay: float  # as given to AdamW, which multiplies it by lr
    eps: float
    multiplier: float  # forward: on the embedding's output, on the readout's input; 1 elsewhere


def role_of(name: str) -> Role:
    """Role of the parameter with this dotted name, such as `blocks.0.gate`."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf not in _ROLE_OF_LEAF:
        raise ValueError(f"needed a parameter called one of {', '.join(_ROLE_OF_LEAF)}, got {name!r}: give it a role")
    return _ROLE_OF_LEAF[leaf]


def rules(config: ProxyConfig) -> dict[Role, Rule]:
    """The table at the width of `config`.

    muP for Adam (arXiv 2203.03466, table 8, written relative to a base width):

    | role      | init std     | lr         | weight decay | eps   | multiplier    |
    |-----------|--------------|------------|--------------|-------|---------------|
    | embedding | embed_std    | lr · rho_e | 0            | eps/m | alpha_in      |
    | hidden    | init_std/√m  | lr/m       | wd · m       | eps/m | 1             |
    | norm      | 0 (mean 1)   | lr         | 0            | eps/m | 1             |
    | readout   | 0            | lr         | wd           | eps/m | alpha_out / m |

    Hidden decay grows with m so that lr · wd, the decay of one step, does not depend on width (arXiv 2510.19093).
    eps shrinks with m because all gradients do. "standard" keeps only the 1/√m of the hidden init (it preserves
    variance); a readout that starts at zero is the same in both.

    One m serves every hidden matrix: d_ff / d_model, d_head and the query heads per key head are fixed in a family.
    """
    m = config.m
    mup = config.parametrization == "mup"
    width = m if mup else 1.0  # what the optimizer and the multipliers see
    eps = config.eps / width
    return {
        "embedding": Rule(0.0, config.embed_std, config.lr * config.embed_lr_mult, 0.0, eps, config.alpha_in),
        "hidden": Rule(0.0, config.init_std / math.sqrt(m), config.lr / width, config.weight_decay * width, eps, 1.0),
        "norm": Rule(1.0, 0.0, config.lr, 0.0, eps, 1.0),
        "readout": Rule(0.0, 0.0, config.lr, config.weight_decay, eps, config.alpha_out / width),
    }


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
        rule = table[role_of(name)]
        if rule.init_std == 0:
            parameter.fill_(rule.init_mean)
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(rule.init_mean, rule.init_std, generator=generator))


def param_groups(model: nn.Module, config: ProxyConfig) -> list[dict[str, Any]]:
    """One AdamW group per role. `peak_lr` stays what it is here; a schedule sets `lr = factor * peak_lr` per group."""
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
