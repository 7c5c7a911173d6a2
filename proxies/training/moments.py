"""Adam's moments in a checkpoint, and how they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from proxies.model.dtensors import copy_into
from proxies.model.mup import strip_wrappers
from proxies.model.optimizers import Optimizer

KINDS = ("exp_avg", "exp_avg_sq")


def load_moments(optimizer: Optimizer, model: nn.Module, moments: Mapping[str, Tensor]) -> None:
    """Load AdamW's moments for the parameters of a model, which may be sharded, one at a time.

    The optimizer's groups keep their learning rates, weight decays and epsilons.

    Args:
        optimizer: The optimizer of the model.
        model: The model.
        moments: "NAME.exp_avg" and "NAME.exp_avg_sq" for each parameter, and "step".
    """
    state: Any = optimizer.state  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        state[parameter] = {"step": moments["step"].to(parameter.device, torch.float32, copy=True)}
        for kind in KINDS:
            moment = torch.zeros_like(parameter.detach())
            copy_into(moment, moments[f"{strip_wrappers(name)}.{kind}"])
            state[parameter][kind] = moment
