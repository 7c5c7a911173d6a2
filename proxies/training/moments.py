"""Adam's moments in a checkpoint: which optimizers keep them, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from proxies.model.dtensors import place
from proxies.model.mup import clean
from proxies.model.optimizers import Optimizer

KINDS = ("exp_avg", "exp_avg_sq")


def load_moments(optimizer: Optimizer, model: nn.Module, moments: Mapping[str, Tensor]) -> None:
    """Give AdamW's moments to the parameters of a model, which may be sharded, one at a time.

    Its groups, with rates, decays and epsilons, stay its own.
    """
    state: Any = optimizer.state  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        state[parameter] = {"step": moments["step"].to(parameter.device, torch.float32, copy=True)}
        for kind in KINDS:
            moment = torch.zeros_like(parameter.detach())
            place(moment, moments[f"{clean(name)}.{kind}"])
            state[parameter][kind] = moment
