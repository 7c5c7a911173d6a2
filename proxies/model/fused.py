"""The pieces of a block with hand-written backward passes, for fewer passes over memory on CPU in eager mode.

Each gives the result of its plain formulation, up to rounding, and saves only tensors that its backward pass needs:

    norm_linears     norm(x) @ W.T for several W: one norm, and the gradients of x summed inside the matrix products
    swiglu           silu(gate) * up; the backward pass works on groups of rows that stay in cache
    rotate           rotary positions, with one table as wide as the heads
    add_linear       x + branch * (h @ W.T), the sum inside the matrix product
    cross_entropy    the logits' gradient made from the log-probabilities, without a third array as large

Where `can_fuse` is false (another device, lower precision, torch.compile, torch.func) the model runs the plain
formulation, which those compile, cast or batch themselves. The same holds for a batch so small that the overhead of
Python in these passes exceeds what they save.
"""

# n rows (tokens), d model, f hidden, o outputs, v vocabulary

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Smaller tensors use the plain formulation. Measured: a step takes up to 1.28 times as long as a plain one at 4k
# elements, 1.02 to 0.93 times at 65k, 0.98 to 0.93 times at 131k (studies/LOG.md).
MIN_ELEMENTS = 100_000
# Elements per part of a tensor; four such parts fit into 1 MiB in float32.
CACHE_ELEMENTS = 1 << 16

aten: Any = torch.ops.aten


def can_fuse(x: Tensor) -> bool:
    """Return whether the hand-written passes can be used on a tensor in the present context."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and x.numel() >= MIN_ELEMENTS
    )


def norm_linears(x: Tensor, gain_d: Tensor, weights: Sequence[Tensor], eps: float) -> tuple[Tensor, ...]:
    """Apply an RMSNorm and several linear maps to its output.

    Args:
        x: Input [..., d].
        gain_d: Gain of the norm [d].
        weights: Matrices [o, d].
        eps: Added to the mean square.

    Returns:
        x / rms(x) * gain @ W.T for each matrix W, [..., o].
    """
    outs: tuple[Tensor, ...] = _NormLinears.apply(x.reshape(-1, x.shape[-1]), gain_d, eps, *weights)  # type: ignore[no-untyped-call]
    return tuple(_restore_shape(out_no, x) for out_no in outs)


def _restore_shape(rows_no: Tensor, like: Tensor) -> Tensor:
    """Return rows [n, o] as [..., o].

    For autograd this is not a view, since FSDP2 warns of views among the outputs of a module.
    """
    out: Tensor = aten._unsafe_view(rows_no, (*like.shape[:-1], rows_no.shape[-1]))
    return out


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, gain_d: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        x_nd = x_nd.contiguous()
        d = x_nd.shape[-1]
        # The rms times sqrt(d): x / rms = x * sqrt(d) / length is then a row of a weight norm, whose backward pass is
        # one kernel in torch. It takes the length as given, so eps is included exactly.
        length_n1 = torch.linalg.vector_norm(x_nd, dim=-1, keepdim=True).square_().add_(d * eps).sqrt_()
        y_nd = (x_nd * (math.sqrt(d) / length_n1)).mul_(gain_d)
        ctx.save_for_backward(x_nd, gain_d, length_n1, y_nd, *weights)
        return tuple(y_nd @ w_od.t() for w_od in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_nd, gain_d, length_n1, y_nd, *weights = ctx.saved_tensors
        root = torch.full_like(length_n1, math.sqrt(x_nd.shape[-1]))
        dy_nd = grads[0] @ weights[0]
        for g_no, w_od in zip(grads[1:], weights[1:], strict=True):
            dy_nd.addmm_(g_no, w_od)
        dgain_d = (dy_nd * x_nd).t() @ (root / length_n1)[:, 0]
        dx_nd, _ = aten._weight_norm_interface_backward(dy_nd.mul_(gain_d), x_nd, root, length_n1, 0)
        return dx_nd, dgain_d, None, *(g_no.t() @ y_nd for g_no in grads)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, all [..., f]."""
    out: Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        act = F.silu(gate)
        ctx.save_for_backward(gate, up, act)
        return act * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, act = ctx.saved_tensors
        dup = grad * act
        # Contiguous, so that its parts are views.
        dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        parts = zip(*(_split_rows(tensor) for tensor in (grad, gate, up, dgate)), strict=True)
        for grad_part, gate_part, up_part, dgate_part in parts:
            product = torch.mul(grad_part, up_part, out=dgate_part)
            aten.silu_backward.grad_input(product, gate_part, grad_input=dgate_part)
        return dgate, dup


def _split_rows(x: Tensor) -> Iterator[Tensor]:
    """Yield rows [., f], CACHE_ELEMENTS elements at a time, as views of a contiguous tensor."""
    rows = x.contiguous().view(-1, x.shape[-1])
    return iter(torch.split(rows, max(1, CACHE_ELEMENTS // x.shape[-1])))


def rotate(x_bthk: Tensor, table_t1j: Tensor) -> Tensor:
    """Multiply channels (2j, 2j + 1) of every head, as a complex number, by the table's entry for its position."""
    out: Tensor = _Rotate.apply(x_bthk, table_t1j)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bthk: Tensor, table_t1j: Tensor) -> Tensor:
        ctx.table = table_t1j
        return _multiply_pairs(x_bthk, table_t1j)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bthk: Tensor) -> tuple[Tensor, None]:
        return _multiply_pairs(grad_bthk, ctx.table.conj().resolve_conj()), None


def _multiply_pairs(x_bthk: Tensor, table_t1j: Tensor) -> Tensor:
    # The table is made as wide as the heads, so that the product runs over whole rows: three times as fast as over
    # k / 2 numbers at k = 16.
    table_thj = table_t1j.expand(-1, x_bthk.shape[2], -1).contiguous()
    pairs = torch.view_as_complex(x_bthk.reshape(*x_bthk.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table_thj).flatten(-2)


def add_linear(x: Tensor, h: Tensor, weight: Tensor, branch: float) -> Tensor:
    """Return x + branch * (h @ weight.T), [..., d]."""
    flat = torch.addmm(x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1]), weight.t(), alpha=branch)
    return _restore_shape(flat, x)


def cross_entropy(logits_nv: Tensor, y_n: Tensor) -> Tensor:
    """Return the mean of -log softmax(logits)[y], in nats."""
    out: Tensor = _CrossEntropy.apply(logits_nv, y_n)  # type: ignore[no-untyped-call]
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_nv: Tensor, y_n: Tensor) -> Tensor:
        log_p_nv = torch.log_softmax(logits_nv, -1)
        ctx.save_for_backward(log_p_nv, y_n)
        return -log_p_nv.gather(1, y_n[:, None]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_p_nv, y_n = ctx.saved_tensors
        share = grad / len(y_n)
        dlogits_nv = log_p_nv.exp().mul_(share)
        dlogits_nv.scatter_add_(1, y_n[:, None], -share.expand(len(y_n), 1))
        return dlogits_nv, None
