"""Two plain training steps to measure the proxies against, written from the architectures alone.

`gpt2`: the choices of nanoGPT. An eager GPT-2 block with LayerNorm, one matrix for queries, keys and values, torch's
    causal attention, GELU between d and 4d, learned positions, a head tied to the embedding, and AdamW that is fused
    only on CUDA.
`llama`: exactly a proxy's shape, parameters and function, written the common way, with RMSNorm by its formula, rotary
    positions by halves, SwiGLU, three separate projections, and AdamW on lists (foreach).

Both use cross-entropy over flattened logits, clip gradients at norm 1, and set them to None.
"""

# b batch, t time, d model, h heads, k per head, v vocabulary

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proxies.config.proxy import ProxyConfig

Step = Callable[[Tensor, Tensor], Tensor]


class Gpt2Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, d: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1 = nn.LayerNorm(d, bias=False)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.norm_2 = nn.LayerNorm(d, bias=False)
        self.fc = nn.Linear(d, 4 * d, bias=False)
        self.proj = nn.Linear(4 * d, d, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        b, t, d = x_btd.shape
        heads = (
            part.view(b, t, self.n_heads, d // self.n_heads).transpose(1, 2)
            for part in self.qkv(self.norm_1(x_btd)).split(d, dim=2)
        )
        mixed_bhtk = F.scaled_dot_product_attention(*heads, is_causal=True)
        x_btd = x_btd + self.out(mixed_bhtk.transpose(1, 2).contiguous().view(b, t, d))
        return x_btd + self.proj(F.gelu(self.fc(self.norm_2(x_btd))))


class Gpt2(nn.Module):
    """GPT-2: tokens [b, t] to logits [b, t, v]."""

    def __init__(self, config: ProxyConfig) -> None:
        super().__init__()
        d = config.d_model
        self.tokens = nn.Embedding(config.vocab, d)
        self.positions = nn.Embedding(config.seq_len, d)
        self.blocks = nn.ModuleList(Gpt2Block(d, config.n_heads) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(d, bias=False)
        self.head = nn.Linear(d, config.vocab, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x_bt: Tensor) -> Tensor:
        x_btd = self.tokens(x_bt) + self.positions(torch.arange(x_bt.shape[1], device=x_bt.device))
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.head(self.norm(x_btd))


class PlainNorm(nn.Module):
    """RMSNorm by its formula."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


def rotate_halves(x_bhtk: Tensor, cos_tk: Tensor, sin_tk: Tensor) -> Tensor:
    """Apply rotary positions to the pairs made of a head's two halves."""
    left, right = x_bhtk.chunk(2, dim=-1)
    return x_bhtk * cos_tk + torch.cat((-right, left), dim=-1) * sin_tk


class LlamaBlock(nn.Module):
    """A block of a Llama-style model."""

    def __init__(self, config: ProxyConfig) -> None:
        super().__init__()
        d, k, f = config.d_model, config.d_head, config.d_ff
        self.d_head, self.is_grouped = k, config.q_per_kv > 1
        self.norm_1, self.norm_2 = PlainNorm(d), PlainNorm(d)
        self.q = nn.Linear(d, config.n_heads * k, bias=False)
        self.k = nn.Linear(d, config.n_kv_heads * k, bias=False)
        self.v = nn.Linear(d, config.n_kv_heads * k, bias=False)
        self.o = nn.Linear(config.n_heads * k, d, bias=False)
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((d, f), (d, f), (f, d)))

    def split_heads(self, x_btd: Tensor) -> Tensor:
        """Return [b, h, t, k]."""
        return x_btd.view(*x_btd.shape[:2], -1, self.d_head).transpose(1, 2)

    def forward(self, x_btd: Tensor, cos_tk: Tensor, sin_tk: Tensor) -> Tensor:
        normed_btd = self.norm_1(x_btd)
        q_bhtk = rotate_halves(self.split_heads(self.q(normed_btd)), cos_tk, sin_tk)
        k_bhtk = rotate_halves(self.split_heads(self.k(normed_btd)), cos_tk, sin_tk)
        mixed_bhtk = F.scaled_dot_product_attention(
            q_bhtk, k_bhtk, self.split_heads(self.v(normed_btd)), is_causal=True, enable_gqa=self.is_grouped
        )
        x_btd = x_btd + self.o(mixed_bhtk.transpose(1, 2).contiguous().flatten(2))
        normed_btd = self.norm_2(x_btd)
        return x_btd + self.down(F.silu(self.gate(normed_btd)) * self.up(normed_btd))


class Llama(nn.Module):
    """A Llama-style model: tokens [b, t] to logits [b, t, v]."""

    def __init__(self, config: ProxyConfig) -> None:
        super().__init__()
        d, k = config.d_model, config.d_head
        self.tokens = nn.Embedding(config.vocab, d)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layers))
        self.norm = PlainNorm(d)
        self.head = nn.Linear(d, config.vocab, bias=False)
        speed_j = 10_000.0 ** (-torch.arange(0, k, 2, dtype=torch.float64) / k)
        angle_tk = torch.outer(torch.arange(config.seq_len), speed_j).repeat(1, 2)
        self.register_buffer("cos", angle_tk.cos().float())
        self.register_buffer("sin", angle_tk.sin().float())

    def forward(self, x_bt: Tensor) -> Tensor:
        x_btd = self.tokens(x_bt)
        for block in self.blocks:
            x_btd = block(x_btd, self.cos, self.sin)
        return self.head(self.norm(x_btd))


def compute_gpt2_flops_per_token(config: ProxyConfig) -> float:
    """Return the training FLOPs per token of `gpt2`, by PaLM's convention, as for the proxies."""
    d, layers = config.d_model, config.n_layers
    return 6.0 * (12 * layers * d * d + d * config.vocab) + 12.0 * layers * d * config.seq_len


def make_plain_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Return a function that takes one training step on a batch and returns its loss."""

    def step(x_bt: Tensor, y_bt: Tensor) -> Tensor:
        logits_btv = model(x_bt)
        loss = F.cross_entropy(logits_btv.view(-1, logits_btv.shape[-1]), y_bt.reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def make_gpt2_step(config: ProxyConfig) -> Step:
    """Return a training step of GPT-2 at this width, depth, number of heads and length."""
    model = Gpt2(config)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return make_plain_step(model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95)))


def make_llama_step(config: ProxyConfig) -> Step:
    """Return a training step of the proxy's own shape, written plainly."""
    model = Llama(config)
    return make_plain_step(model, torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), foreach=True))
