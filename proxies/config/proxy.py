"""What a proxy is: shape, base shape, optimizer, schedule, data. No torch here, so that a study is checked in no time."""

from __future__ import annotations

import math
import re
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from proxies.config.mixture_weights import allotted, check_weights, shares_of
from scaling.laws.compute import ParamCounts, count_transformer, flops_per_token

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

ScheduleName = Literal["wsd", "power", "inverse-sqrt", "cosine", "linear", "rex", "constant"]
DecayName = Literal["1-sqrt", "linear", "cosine", "square", "exponential"]


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
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    beta3: float = Field(0.9999, ge=0, lt=1, description="of AdEMAMix's slow average")
    slow_weight: NonNegativeFloat = Field(5.0, description="AdEMAMix's alpha: weight of the slow average")
    slow_warmup_tokens: int = Field(0, ge=0, description="AdEMAMix raises slow_weight and beta3 over so many tokens")
    coordinate_check: str | None = Field(
        None, description="certificate from `proxies check --certificate`, for an optimizer without a verified rule"
    )
    batch_seqs: PositiveInt = Field(16, description="sequences per optimizer step")

    # schedule (docs/math.md §3): warm-up, trunk, and, where there is one, a cooldown over the last share of the run
    schedule: ScheduleName = "wsd"
    decay: DecayName = Field("1-sqrt", description="shape of the cooldown of 'wsd', 'power' and 'inverse-sqrt'")
    warmup_tokens: int = Field(8192, ge=0)
    cooldown: float = Field(0.2, gt=0, lt=1, description="share of a run's tokens spent in the cooldown branch")
    lr_floor: float = Field(0.1, ge=0, lt=1, description="share of the peak where cosine and exponential decay end")
    power_a: PositiveFloat = Field(4.6, description="'power': lr at most batch_seqs * a * tokens^b")
    power_b: float = Field(-0.51, lt=0, description="'power': the exponent of tokens")
    sqrt_tokens: PositiveInt = Field(
        65_536, description="'inverse-sqrt': constant until here, then sqrt(here / tokens)"
    )

    # memory: neither changes what is computed, but for the rounding of a sum over parts
    micro_seqs: PositiveInt | None = Field(None, description="sequences per forward and backward; default: the batch")
    recompute: bool = Field(False, description="keep no activations inside blocks: a third more work, less memory")

    # speed
    precision: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="of matrix products; weights stay float32. Default: float32 on CPU (there faster), bfloat16 on CUDA",
    )
    compile: bool = Field(False, description="torch.compile: a minute before the first step; needs a C++ compiler")

    # data
    tokenizer: str = Field("bytes", description="'bytes', 'bpe' (trained on the training part), or a tokenizer.json")
    corpus: str | dict[str, str] = Field(
        "stdlib",
        description="'stdlib', text, a folder, .bin tokens, a data set (proxies/data/corpora.py); several by name",
    )
    mixture: dict[str, float] = Field(
        default_factory=dict,
        validate_default=True,
        description="weights of several sources in training, by name; their sum does not matter; default: equal",
    )
    eval_mixture: dict[str, float] = Field(
        default_factory=dict,
        validate_default=True,
        description="the same for the held-out loss; default: equal, whatever is trained on",
    )
    order: Literal["random", "epochs"] = Field(
        "random", description="windows drawn with replacement, or pass after pass"
    )
    eval_windows: PositiveInt = Field(64, description="held-out windows of seq_len tokens, always the same ones")
    early_points: bool = Field(
        False, description="the held-out loss from the end of the warm-up on: a launch sees a wrong rate sooner"
    )
    seed: int = Field(0, ge=0)

    @field_validator("corpus")
    @classmethod
    def _sources_have_names(cls, corpus: str | dict[str, str]) -> str | dict[str, str]:
        if not isinstance(corpus, str):
            wrong = [name for name in corpus if not re.fullmatch(r"[\w-]+", name)]
            if wrong or not corpus:
                raise ValueError(f"needed sources with names of letters, digits, - and _, got {wrong or 'none'}")
        return corpus

    @field_validator("mixture", "eval_mixture")
    @classmethod
    def _weights_make_shares(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        if "corpus" in info.data and (problems := check_weights(weights, _names(info.data["corpus"]))):
            raise ValueError("; ".join(problems))
        return weights

    @model_validator(mode="after")
    def _every_source_is_measured(self) -> Self:
        shares = shares_of(self.eval_mixture, _names(self.corpus))
        given = allotted(self.eval_windows, list(shares.values()))
        missing = [name for (name, share), n in zip(shares.items(), given, strict=True) if share > 0 and n == 0]
        if missing:
            raise ValueError(
                f"eval_windows: needed a window for every source with a weight in eval_mixture, got {self.eval_windows} "
                f"and none for {', '.join(missing)}: raise eval_windows, or set those weights to 0"
            )
        return self

    @model_validator(mode="after")
    def _rope_needs_pairs(self) -> Self:
        if self.d_head % 2:
            raise ValueError(f"d_head must be even (rotary embedding turns pairs of channels), got {self.d_head}")
        return self

    @model_validator(mode="after")
    def _prodigy_finds_its_own_rate(self) -> Self:
        if self.optimizer == "prodigy" and not 0.1 <= self.lr <= 10:
            raise ValueError(
                f"optimizer = 'prodigy' finds the rate, which lr multiplies: needed lr from 0.1 to 10, got {self.lr:g}: set lr = 1"
            )
        return self

    @model_validator(mode="after")
    def _exponential_decay_ends_above_zero(self) -> Self:
        if self.decay == "exponential" and self.lr_floor == 0:
            raise ValueError("decay = 'exponential' needs lr_floor > 0, the share of the peak where it ends, got 0")
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

    @field_validator("mixture", "eval_mixture")
    @classmethod
    def _shares(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        return shares_of(weights, _names(info.data.get("corpus", "")))

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


def _names(corpus: str | dict[str, str]) -> list[str]:
    """Names of the sources in an order that no file can change; a single corpus has none."""
    return [] if isinstance(corpus, str) else sorted(corpus)
