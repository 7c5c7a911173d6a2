"""What a proxy is: shape, base shape, optimizer, schedule, data. No torch here, so that a study is checked in no time."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from scaling.compute import ParamCounts, count_transformer, flops_per_token

OptimizerName = Literal[
    "adamw",
    "adamw8bit",
    "ademamix",
    "lamb",
    "lion",
    "muon",
    "muon-rms",
    "prodigy",
    "schedule-free",
    "soap",
]


class ProxySettings(BaseModel):
    """All that the members of a family share; only the width is left open."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # shape: ratios are fixed across a family, so that every hidden matrix has the same width multiplier m
    n_layers: PositiveInt = 2
    d_head: PositiveInt = 16
    q_per_kv: PositiveInt = Field(1, description="query heads per key/value head (1: multi-head attention)")
    ff_mult: PositiveInt = Field(3, description="d_ff / d_model, SwiGLU")
    vocab: PositiveInt = 256
    seq_len: PositiveInt = 128
    qk_norm: bool = Field(False, description="RMSNorm of every query and key head, one gain of d_head numbers each")
    tied: bool = Field(False, description="one table for embedding and unembedding")

    # muP (docs/math.md §2): all values are those at base width
    parametrization: Literal["mup", "standard"] = "mup"
    base_width: PositiveInt = 64
    base_layers: PositiveInt | None = Field(
        None, description="depth of the base model; default: n_layers, no depth rule"
    )
    depth_power: float = Field(1.0, ge=0, le=1, description="branches times (L / L0)^-this: 1 CompleteP, 1/2 depth-muP")
    init_std: PositiveFloat = Field(0.08, description="hidden matrices at base width")
    embed_std: PositiveFloat = Field(1.0, description="token embedding; at 0.08 a 200k-token proxy loses 0.29 nats")
    embed_lr_mult: PositiveFloat = Field(1.0, description="learning rate of the token embedding over the others'")
    alpha_in: PositiveFloat = Field(1.0, description="multiplier on the embedding's output")
    alpha_out: PositiveFloat = Field(1.0, description="multiplier on the logits")
    alpha_attn: PositiveFloat = Field(1.0, description="multiplier on the attention scale 1/sqrt(d_head)")

    # optimizer
    optimizer: OptimizerName = "adamw"
    lr: PositiveFloat = Field(2**-7, description="peak learning rate at base width")
    weight_decay: NonNegativeFloat = Field(0.1, description="as given to AdamW: decay per step is lr * weight_decay")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    batch_seqs: PositiveInt = Field(16, description="sequences per optimizer step")

    # schedule: warm-up, constant trunk, 1 - sqrt cooldown over the last share of the run (WSD, arXiv 2405.18392)
    schedule: Literal["wsd"] = "wsd"
    warmup_tokens: int = Field(8192, ge=0)
    cooldown: float = Field(0.2, gt=0, lt=1, description="share of a run's tokens spent in the cooldown branch")

    # data
    corpus: str = Field("stdlib", description="'stdlib', or a text file, a folder, or a .bin file of uint16 tokens")
    eval_windows: PositiveInt = Field(64, description="held-out windows of seq_len tokens, always the same ones")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _rope_needs_pairs(self) -> Self:
        if self.d_head % 2:
            raise ValueError(f"d_head must be even (rotary embedding turns pairs of channels), got {self.d_head}")
        return self

    @model_validator(mode="after")
    def _a_tied_table_starts_small(self) -> Self:
        start = self.embed_std * self.alpha_out * math.sqrt(self.base_width)
        if self.tied and start > 2:
            raise ValueError(
                f"tied = true: needed first logits of standard deviation embed_std * alpha_out * sqrt(base_width) at most 2, "
                f"got {start:.3g}: set embed_std near {1 / math.sqrt(self.base_width):.3g} and alpha_in near {math.sqrt(self.base_width):.3g}"
            )
        return self


class ProxyConfig(ProxySettings):
    """One proxy: the settings of its family and a width."""

    d_model: PositiveInt = 64

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        group = self.d_head * self.q_per_kv
        for name in ("d_model", "base_width"):
            if getattr(self, name) % group:
                raise ValueError(
                    f"{name} must be a multiple of d_head * q_per_kv = {group} (whole heads, whole groups), "
                    f"got {getattr(self, name)}"
                )
        return self

    @property
    def m(self) -> float:
        """Width multiplier d / d0."""
        return self.d_model / self.base_width

    @property
    def r(self) -> float:
        """Depth multiplier L / L0."""
        return self.n_layers / (self.base_layers or self.n_layers)

    @property
    def n_heads(self) -> int:
        return self.d_model // self.d_head

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads // self.q_per_kv

    @property
    def d_ff(self) -> int:
        return self.ff_mult * self.d_model

    @property
    def batch_tokens(self) -> int:
        return self.batch_seqs * self.seq_len

    @property
    def counts(self) -> ParamCounts:
        return count_transformer(
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            d_head=self.d_head,
            d_ff=self.d_ff,
            vocab=self.vocab,
            qk_norm=self.qk_norm,
            tied=self.tied,
        )

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token, PaLM convention."""
        return flops_per_token(
            N=self.counts.N,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_head=self.d_head,
            seq_len=self.seq_len,
        )
