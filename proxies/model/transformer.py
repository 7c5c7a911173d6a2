"""The proxy: a small decoder-only transformer with pre-RMSNorm, rotary positions, SwiGLU and grouped queries.

There are no biases. Every matrix is its own named parameter [out, in], so that growth can pad each one:

    embed [v, d]    blocks.i.attn_norm [d]    blocks.i.q [h·k, d]    blocks.i.k, .v [g·k, d]     blocks.i.o [d, h·k]
                    blocks.i.mlp_norm [d]     blocks.i.gate, .up [f, d]                          blocks.i.down [d, f]
    final_norm [d]  readout [v, d] unless tied; blocks.i.q_norm, .k_norm [k] with QK-norm

Query head i reads key/value head i // (h / g); the rows of one head are adjacent.
"""

# b batch, t time, s time (keys), d model, h query heads, g key/value heads, k per head, f hidden, v vocabulary

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proxies.config.proxy import ProxyConfig
from proxies.model import fused, mup

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0


def make_rope_table(seq_len: int, d_head: int) -> Tensor:
    """Return the table of rotary embedding (RoFormer, arXiv 2104.09864).

    Args:
        seq_len: Number of positions.
        d_head: Channels per head.

    Returns:
        e^(i t w_j) with w_j = 10000^(-2j / d_head), complex128 [t, 1, k/2].
    """
    angle_tj = _compute_angles(seq_len, d_head, torch.device("cpu"))
    return torch.polar(torch.ones_like(angle_tj), angle_tj)[:, None, :]


def _compute_angles(seq_len: int, d_head: int, device: torch.device) -> Tensor:
    w_j = ROPE_BASE ** (-torch.arange(0, d_head, 2, dtype=torch.float64, device=device) / d_head)
    return torch.outer(torch.arange(seq_len, dtype=torch.float64, device=device), w_j)


def rotate(x_bthk: Tensor, table: Tensor) -> Tensor:
    """Rotate channels (2j, 2j + 1) of every head by the angle of their position.

    The channels of a pair form a complex number: measured two to three times as fast on CPU as pairing the halves.

    Args:
        x_bthk: Queries or keys.
        table: Complex [t, 1, k/2], or, under torch.compile, its real and imaginary parts [t, 1, k/2, 2].

    Returns:
        The rotated queries or keys, of the shape of `x_bthk`.
    """
    if not table.is_complex():
        even, odd = x_bthk.reshape(*x_bthk.shape[:-1], -1, 2).unbind(-1)
        cos, sin = table.unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    if fused.can_fuse(x_bthk):
        return fused.rotate(x_bthk, table)
    pairs = torch.view_as_complex(x_bthk.reshape(*x_bthk.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2)


class Block(nn.Module):
    """One layer: x + branch * attention(norm(x)), then x + branch * swiglu(norm(x)).

    The factor `branch` depends only on depth.

    Args:
        config: The proxy.
    """

    def __init__(self, config: ProxyConfig) -> None:
        super().__init__()
        d, k, f = config.d_model, config.d_head, config.d_ff
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, k
        self.scale = config.alpha_attn / math.sqrt(k)
        self.branch = mup.compute_rules(config)["hidden"].multiplier
        self.attn_norm = _make_empty_parameter(d)
        self.q = _make_empty_parameter(self.n_heads * k, d)
        self.k = _make_empty_parameter(self.n_kv_heads * k, d)
        self.v = _make_empty_parameter(self.n_kv_heads * k, d)
        self.o = _make_empty_parameter(d, self.n_heads * k)
        self.q_norm: nn.Parameter | None = _make_empty_parameter(k) if config.qk_norm else None
        self.k_norm: nn.Parameter | None = _make_empty_parameter(k) if config.qk_norm else None
        self.mlp_norm = _make_empty_parameter(d)
        self.gate = _make_empty_parameter(f, d)
        self.up = _make_empty_parameter(f, d)
        self.down = _make_empty_parameter(d, f)

    def qk(self, x_btd: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated queries [b, t, h, k] and keys [b, t, g, k] of a normalized stream."""
        return self._rotate_heads(F.linear(x_btd, self.q), F.linear(x_btd, self.k), rope)

    def _rotate_heads(self, q_btd: Tensor, k_btd: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        q_bthk, k_btgk = self._split_heads(q_btd, self.n_heads), self._split_heads(k_btd, self.n_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_bthk, k_btgk = rms_norm(q_bthk, self.q_norm), rms_norm(k_btgk, self.k_norm)
        # Under autocast; there are no complex numbers of that precision.
        if q_bthk.dtype in (torch.bfloat16, torch.float16):
            dtype = q_bthk.dtype
            return rotate(q_bthk.float(), rope).to(dtype), rotate(k_btgk.float(), rope).to(dtype)
        return rotate(q_bthk, rope), rotate(k_btgk, rope)

    def _split_heads(self, x_btd: Tensor, n: int) -> Tensor:
        return x_btd.view(*x_btd.shape[:2], n, self.d_head)

    def attention(self, x_btd: Tensor, rope: Tensor) -> Tensor:
        """Return the output of the attention branch [b, t, d] for a normalized stream."""
        q_btd, k_btd, v_btd = (F.linear(x_btd, w) for w in (self.q, self.k, self.v))
        return F.linear(self._mix_values(q_btd, k_btd, v_btd, rope), self.o)

    def _mix_values(self, q_btd: Tensor, k_btd: Tensor, v_btd: Tensor, rope: Tensor) -> Tensor:
        """Return the values as weighted by the attention of every head, [b, t, h·k]."""
        q_bthk, k_btgk = self._rotate_heads(q_btd, k_btd, rope)
        v_btgk = self._split_heads(v_btd, self.n_kv_heads)
        out_bhtk = F.scaled_dot_product_attention(
            q_bthk.transpose(1, 2),
            k_btgk.transpose(1, 2),
            v_btgk.transpose(1, 2),
            is_causal=True,
            scale=self.scale,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )
        return out_bhtk.transpose(1, 2).flatten(-2)

    def attention_logits(self, x_btd: Tensor, rope: Tensor) -> Tensor:
        """Return the scaled scores [b, h, t, s] before mask and softmax. For checks only; training never forms them."""
        q_bthk, k_btgk = self.qk(x_btd, rope)
        k_bthk = k_btgk.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2)
        return self.scale * torch.einsum("bthk,bshk->bhts", q_bthk, k_bthk)

    def mlp(self, x_btd: Tensor) -> Tensor:
        """Return the output of the SwiGLU branch [b, t, d] for a normalized stream."""
        return F.linear(F.silu(F.linear(x_btd, self.gate)) * F.linear(x_btd, self.up), self.down)

    def forward(self, x_btd: Tensor, rope: Tensor) -> Tensor:
        # Both paths compute the same; the fused one reads and writes memory fewer times.
        if fused.can_fuse(x_btd):
            q_btd, k_btd, v_btd = fused.norm_linears(x_btd, self.attn_norm, (self.q, self.k, self.v), NORM_EPS)
            x_btd = fused.add_linear(x_btd, self._mix_values(q_btd, k_btd, v_btd, rope), self.o, self.branch)
            gate_btf, up_btf = fused.norm_linears(x_btd, self.mlp_norm, (self.gate, self.up), NORM_EPS)
            return fused.add_linear(x_btd, fused.swiglu(gate_btf, up_btf), self.down, self.branch)
        x_btd = self.add_branch(x_btd, self.attention(rms_norm(x_btd, self.attn_norm), rope))
        return self.add_branch(x_btd, self.mlp(rms_norm(x_btd, self.mlp_norm)))

    def add_branch(self, x_btd: Tensor, branch_btd: Tensor) -> Tensor:
        """Add the output of a branch, scaled by a power of depth (CompleteP), to the stream."""
        return x_btd + branch_btd if self.branch == 1 else torch.add(x_btd, branch_btd, alpha=self.branch)


class Transformer(nn.Module):
    """A model of tokens [b, t] (int64) that returns logits [b, t, v].

    Its parameters are empty until `mup.init_parameters` fills them; `build` does both.

    Args:
        config: The proxy.
    """

    def __init__(self, config: ProxyConfig) -> None:
        super().__init__()
        self.config = config
        table = mup.compute_rules(config)
        self.multiplier_in = table["embedding"].multiplier
        self.multiplier_out = table["readout"].multiplier
        self.embed = _make_empty_parameter(config.vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = _make_empty_parameter(config.d_model)
        self.readout = None if config.tied else _make_empty_parameter(config.vocab, config.d_model)
        # Not a buffer: it follows from the shape, and `.double()` would cast complex numbers to real ones.
        self._ropes: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def get_rope(self, tokens_bt: Tensor) -> Tensor:
        """Return the rotary table for the positions of these tokens, in the precision of the weights.

        Raises:
            ValueError: If the sequences are longer than `seq_len`.
        """
        seq_len = tokens_bt.shape[-1]
        if seq_len > self.config.seq_len:
            raise ValueError(
                f"needed at most seq_len = {self.config.seq_len} tokens in a sequence, got {seq_len}: "
                "cut the input or raise seq_len"
            )
        # The code generator of torch.compile has no complex numbers, so it gets pairs of real ones [t, 1, k/2, 2].
        if torch.compiler.is_compiling():
            angle_tj = _compute_angles(seq_len, self.config.d_head, tokens_bt.device)
            return torch.stack((angle_tj.cos(), angle_tj.sin()), -1)[:, None].to(self.embed.dtype)
        dtype = torch.complex128 if self.embed.dtype == torch.float64 else torch.complex64
        key = (tokens_bt.device, dtype)
        if key not in self._ropes:
            self._ropes[key] = make_rope_table(self.config.seq_len, self.config.d_head).to(*key)
        return self._ropes[key][:seq_len]

    def stem(self, tokens_bt: Tensor) -> Tensor:
        """Return the residual stream [b, t, d] before the first block."""
        x_btd = F.embedding(tokens_bt, self.embed)
        return x_btd if self.multiplier_in == 1 else x_btd * self.multiplier_in

    def head(self, x_btd: Tensor) -> Tensor:
        """Return the logits [b, t, v] of the residual stream after the last block."""
        weight_vd = self.embed if self.readout is None else self.readout
        gain_d = self.final_norm if self.multiplier_out == 1 else self.final_norm * self.multiplier_out
        if fused.can_fuse(x_btd):
            return fused.norm_linears(x_btd, gain_d, (weight_vd,), NORM_EPS)[0]
        return F.linear(rms_norm(x_btd, gain_d), weight_vd)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        rope = self.get_rope(tokens_bt)
        x_btd = self.stem(tokens_bt)
        for block in self.blocks:
            if self.config.recompute and torch.is_grad_enabled():
                # Nothing in a block is random, so there is no generator state to preserve.
                x_btd = checkpoint(block, x_btd, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x_btd = block(x_btd, rope)
        return self.head(x_btd)


def rms_norm(x_btd: Tensor, gain_d: Tensor) -> Tensor:
    """Return RMSNorm: x / rms(x) * gain."""
    return F.rms_norm(x_btd, gain_d.shape, gain_d, NORM_EPS)


def compute_loss(model: nn.Module, x_bt: Tensor, y_bt: Tensor) -> Tensor:
    """Return the mean cross-entropy of a model, in nats per token.

    Args:
        model: The model.
        x_bt: Input tokens, int64.
        y_bt: Next tokens, int64.

    Returns:
        A scalar.
    """
    return mean_cross_entropy(model(x_bt), y_bt)


def mean_cross_entropy(logits_btv: Tensor, y_bt: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits, in nats per token, computed in float32 or higher."""
    if logits_btv.dtype in (torch.bfloat16, torch.float16):
        logits_btv = logits_btv.float()
    logits_nv, y_n = logits_btv.flatten(0, 1), y_bt.flatten()
    return fused.cross_entropy(logits_nv, y_n) if fused.can_fuse(logits_nv) else F.cross_entropy(logits_nv, y_n)


def build(config: ProxyConfig) -> Transformer:
    """Build an untrained model on CPU, in float32.

    Args:
        config: The proxy.

    Returns:
        The model, initialized from `config.seed` alone.
    """
    model = Transformer(config)
    mup.init_parameters(model, config)
    return model


def _make_empty_parameter(*shape: int) -> nn.Parameter:
    """Return a parameter for `mup.init_parameters` to fill, without drawing from the global generator."""
    return nn.Parameter(torch.empty(*shape))
