"""Optimizers built from the muP table."""

from __future__ import annotations

import difflib

import torch
from torch import nn

from proxies.config import ProxyConfig
from proxies.mup import param_groups

OPTIMIZERS = ("adamw",)


def make_optimizer(model: nn.Module, config: ProxyConfig) -> torch.optim.AdamW:
    """The optimizer named in `config`, with one parameter group per role.

    Fused: one kernel per role instead of a dozen per tensor. It keeps each group's own eps and works in float64 too.
    """
    if config.optimizer not in OPTIMIZERS:
        near = difflib.get_close_matches(config.optimizer, OPTIMIZERS, n=1, cutoff=0.0)
        raise ValueError(
            f"needed an optimizer out of {OPTIMIZERS}, got {config.optimizer!r}: did you mean {near[0]!r}?"
        )
    return torch.optim.AdamW(param_groups(model, config), fused=True)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate is its own peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
