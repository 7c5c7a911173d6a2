"""Tensors that are sharded over processes: recognize them, fill them and gather them."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds only a part of a tensor (a DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def copy_into(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a target that may be sharded.

    Every process passes the same tensor, so nothing is sent.

    Args:
        target: The tensor to fill.
        whole: The values, of the full shape of `target`.
    """
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


def gather_full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor on every process. All processes must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
