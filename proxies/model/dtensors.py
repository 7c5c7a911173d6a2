"""Tensors that are sharded over processes: whether one is, its local part, and the whole."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of it only (a DTensor)."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


@torch.no_grad()
def place(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a target that may be sharded; every process gives the same one, and nothing is sent."""
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor on every process; all of them ask together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
