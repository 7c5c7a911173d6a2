"""The settings of a proxy: shape, base shape, optimizer, schedule, data. This module does not import torch."""

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

from proxies.config.mixture_weights import allot_windows, check_weights, normalize_weights
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
    """The settings that all members of a family share; only the width is left open.

    Ratios of the shape are fixed across a family, so that every hidden matrix has the same width multiplier m. All muP
    values are those at base width (docs/math.md §2). A run has a warm-up, a trunk and, with some schedules, a cooldown
    over its last share (docs/math.md §3).

    Attributes:
        n_layers: Number of blocks.
        d_head: Channels per attention head; even.
        q_per_kv: Query heads per key/value head. 1 is multi-head attention.
        ff_mult: d_ff / d_model of the SwiGLU.
        vocab: Number of tokens in the vocabulary.
        seq_len: Tokens per sequence.
        qk_norm: Apply an RMSNorm to every query and key head, with one gain of d_head numbers for each of the two.
        tied: Use one table for the embedding and the unembedding.

        parametrization: "mup", or "standard", which scales only the initial standard deviation with width.
        base_width: d_model at which all values hold.
        base_layers: Depth of the base model. None means `n_layers`, so that no depth rule applies.
        depth_power: Branches are multiplied by (layers / base layers)^-depth_power. 1 is CompleteP, 1/2 is depth-muP.
        init_std: Initial standard deviation of hidden matrices at base width.
        embed_std: Initial standard deviation of the token embedding. At 0.08 instead of 1, a proxy of 200k tokens
            loses 0.29 nats.
        embed_lr_mult: Learning rate of the token embedding divided by that of the other parameters.
        alpha_in: Multiplier on the embedding's output.
        alpha_out: Multiplier on the logits.
        alpha_attn: Multiplier on the attention scale 1 / sqrt(d_head).

        optimizer: Name of the optimizer, see `proxies/model/optimizers.py`.
        lr: Peak learning rate at base width. Prodigy finds its rate, and `lr` multiplies it.
        weight_decay: Weight decay as given to AdamW: the decay per step is lr * weight_decay.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Epsilon of Adam at base width.
        momentum: Momentum of Muon.
        beta3: Decay rate of AdEMAMix's slow average.
        slow_weight: Weight of AdEMAMix's slow average, its alpha.
        slow_warmup_tokens: Tokens over which AdEMAMix raises `slow_weight` and `beta3`; 0 for none.
        coordinate_check: Path of a certificate made by `proxies check --certificate`, for an optimizer without a
            verified rule.
        batch_seqs: Sequences per optimizer step.

        schedule: Name of the learning-rate schedule, see `proxies/config/schedules.py`.
        decay: Shape of the cooldown of "wsd", "power" and "inverse-sqrt".
        warmup_tokens: Tokens of the linear warm-up.
        cooldown: Share of a run's tokens spent in the cooldown.
        lr_floor: Share of the peak rate at which cosine and exponential decay end.
        power_a: Schedule "power": lr is at most batch_seqs * power_a * tokens^power_b.
        power_b: Schedule "power": the exponent of tokens, negative.
        sqrt_tokens: Schedule "inverse-sqrt": constant until this many tokens, then sqrt(sqrt_tokens / tokens).

        micro_seqs: Sequences per forward and backward pass; None for the whole batch. Changes only memory, time, and
            the rounding of a sum over parts.
        recompute: Keep no activations inside blocks. Takes a third more compute and less memory.
        precision: Precision of matrix products; weights stay in float32. None means float32 on CPU, where it is
            faster, and bfloat16 on CUDA.
        compile: Use torch.compile. Takes a minute before the first step and needs a C++ compiler.

        tokenizer: "bytes", "bpe" (trained on the training part), or the path of a tokenizer.json.
        corpus: "stdlib", text, a folder, .bin tokens, or a data set (see `proxies/data/corpora.py`); several sources
            as a table by name.
        mixture: Training weights of several sources by name. Their sum does not matter. Empty means equal weights.
        eval_mixture: Weights of several sources in the held-out loss. Empty means equal weights, whatever is trained
            on.
        order: "random" draws windows with replacement; "epochs" reads the data pass after pass.
        eval_windows: Number of held-out windows of `seq_len` tokens, which are always the same ones.
        early_points: Also measure the held-out loss from the end of the warm-up on, so that a launch detects a wrong
            learning rate sooner.
        seed: Seed of the initial weights and of the order of the data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_layers: PositiveInt = 2
    d_head: PositiveInt = 16
    q_per_kv: PositiveInt = 1
    ff_mult: PositiveInt = 3
    vocab: PositiveInt = 256
    seq_len: PositiveInt = 128
    qk_norm: bool = False
    tied: bool = False

    parametrization: Literal["mup", "standard"] = "mup"
    base_width: PositiveInt = 64
    base_layers: PositiveInt | None = None
    depth_power: float = Field(1.0, ge=0, le=1)
    init_std: PositiveFloat = 0.08
    embed_std: PositiveFloat = 1.0
    embed_lr_mult: PositiveFloat = 1.0
    alpha_in: PositiveFloat = 1.0
    alpha_out: PositiveFloat = 1.0
    alpha_attn: PositiveFloat = 1.0

    optimizer: OptimizerName = "adamw"
    lr: PositiveFloat = 2**-7
    weight_decay: NonNegativeFloat = 0.1
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    momentum: float = Field(0.95, ge=0, lt=1)
    beta3: float = Field(0.9999, ge=0, lt=1)
    slow_weight: NonNegativeFloat = 5.0
    slow_warmup_tokens: int = Field(0, ge=0)
    coordinate_check: str | None = None
    batch_seqs: PositiveInt = 16

    schedule: ScheduleName = "wsd"
    decay: DecayName = "1-sqrt"
    warmup_tokens: int = Field(8192, ge=0)
    cooldown: float = Field(0.2, gt=0, lt=1)
    lr_floor: float = Field(0.1, ge=0, lt=1)
    power_a: PositiveFloat = 4.6
    power_b: float = Field(-0.51, lt=0)
    sqrt_tokens: PositiveInt = 65_536

    micro_seqs: PositiveInt | None = None
    recompute: bool = False
    precision: Literal["float32", "bfloat16"] | None = None
    compile: bool = False

    tokenizer: str = "bytes"
    corpus: str | dict[str, str] = "stdlib"
    mixture: dict[str, float] = Field(default_factory=dict, validate_default=True)
    eval_mixture: dict[str, float] = Field(default_factory=dict, validate_default=True)
    order: Literal["random", "epochs"] = "random"
    eval_windows: PositiveInt = 64
    early_points: bool = False
    seed: int = Field(0, ge=0)

    @field_validator("corpus")
    @classmethod
    def _check_source_names(cls, corpus: str | dict[str, str]) -> str | dict[str, str]:
        if not isinstance(corpus, str):
            wrong = [name for name in corpus if not re.fullmatch(r"[\w-]+", name)]
            if wrong or not corpus:
                raise ValueError(f"needed sources with names of letters, digits, - and _, got {wrong or 'none'}")
        return corpus

    @field_validator("mixture", "eval_mixture")
    @classmethod
    def _check_mixture(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        if "corpus" in info.data and (problems := check_weights(weights, _list_sources(info.data["corpus"]))):
            raise ValueError("; ".join(problems))
        return weights

    @model_validator(mode="after")
    def _check_eval_windows(self) -> Self:
        shares = normalize_weights(self.eval_mixture, _list_sources(self.corpus))
        counts = allot_windows(self.eval_windows, list(shares.values()))
        missing = [name for (name, share), n in zip(shares.items(), counts, strict=True) if share > 0 and n == 0]
        if missing:
            raise ValueError(
                "eval_windows: needed a window for every source with a weight in eval_mixture, "
                f"got {self.eval_windows} and none for {', '.join(missing)}: raise eval_windows, or set those weights "
                "to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_head_size(self) -> Self:
        if self.d_head % 2:
            raise ValueError(f"d_head must be even (rotary embedding turns pairs of channels), got {self.d_head}")
        return self

    @model_validator(mode="after")
    def _check_prodigy_rate(self) -> Self:
        if self.optimizer == "prodigy" and not 0.1 <= self.lr <= 10:
            raise ValueError(
                "optimizer = 'prodigy' finds the rate, which lr multiplies: needed lr from 0.1 to 10, "
                f"got {self.lr:g}: set lr = 1"
            )
        return self

    @model_validator(mode="after")
    def _check_exponential_floor(self) -> Self:
        if self.decay == "exponential" and self.lr_floor == 0:
            raise ValueError("decay = 'exponential' needs lr_floor > 0, the share of the peak where it ends, got 0")
        return self

    @model_validator(mode="after")
    def _check_first_logits_of_tied_table(self) -> Self:
        logit_std = self.embed_std * self.alpha_out * math.sqrt(self.base_width)
        if self.tied and logit_std > 2:
            raise ValueError(
                "tied = true: needed first logits of standard deviation embed_std * alpha_out * sqrt(base_width) "
                f"at most 2, got {logit_std:.3g}: set embed_std near {1 / math.sqrt(self.base_width):.3g} "
                f"and alpha_in near {math.sqrt(self.base_width):.3g}"
            )
        return self


class ProxyConfig(ProxySettings):
    """One proxy: the settings of its family (see `ProxySettings`) and a width.

    Raises `pydantic.ValidationError`, which lists all problems, if a setting is unknown or invalid.

    Attributes:
        d_model: Width of the residual stream; a multiple of d_head * q_per_kv.
    """

    d_model: PositiveInt = 64

    @field_validator("mixture", "eval_mixture")
    @classmethod
    def _normalize(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        return normalize_weights(weights, _list_sources(info.data.get("corpus", "")))

    @model_validator(mode="after")
    def _check_whole_heads(self) -> Self:
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
        """Width multiplier, d_model / base_width."""
        return self.d_model / self.base_width

    @property
    def r(self) -> float:
        """Depth multiplier, n_layers / base_layers."""
        return self.n_layers / (self.base_layers or self.n_layers)

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.d_model // self.d_head

    @property
    def n_kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_heads // self.q_per_kv

    @property
    def d_ff(self) -> int:
        """Hidden channels of the SwiGLU."""
        return self.ff_mult * self.d_model

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch_seqs * self.seq_len

    @property
    def counts(self) -> ParamCounts:
        """Parameter counts; `counts.N` counts those that multiply tokens."""
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
        """Training FLOPs per token, by PaLM's convention."""
        return flops_per_token(
            N=self.counts.N,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            d_head=self.d_head,
            seq_len=self.seq_len,
        )


def _list_sources(corpus: str | dict[str, str]) -> list[str]:
    """Return the names of the sources in an order independent of the file's; a single corpus has none."""
    return [] if isinstance(corpus, str) else sorted(corpus)
