"""The settings of a proxy: shape, base shape, optimizer, schedule, data. This module does not import torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, Self

from pydantic import (
    AllowInfNan,
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
# `check_weights` refuses weights that are not finite, together with all other mistakes of a mixture.
Weight = Annotated[float, AllowInfNan(True)]


class ProxySettings(BaseModel):
    """The settings that all members of a family share; only the width is left open.

    Ratios of the shape are fixed across a family, so that every hidden matrix has the same width multiplier m. All muP
    values are those at base width (docs/math.md §2). A run has a warm-up, a trunk and, with some schedules, a cooldown
    over its last share (docs/math.md §3).
    """

    # The text below a field becomes its description in the JSON schema.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    n_layers: PositiveInt = 2
    """Number of blocks."""
    d_head: PositiveInt = 16
    """Channels per attention head; even."""
    q_per_kv: PositiveInt = 1
    """Query heads per key/value head. 1 is multi-head attention."""
    ff_mult: PositiveInt = 3
    """d_ff / d_model of the SwiGLU."""
    vocab: PositiveInt = 256
    """Number of tokens in the vocabulary."""
    seq_len: PositiveInt = 128
    """Tokens per sequence."""
    qk_norm: bool = False
    """Apply an RMSNorm to every query and key head, with one gain of d_head numbers for each of the two."""
    tied: bool = False
    """Use one table for the embedding and the unembedding."""

    parametrization: Literal["mup", "standard"] = "mup"
    """How values scale with width: "mup", or "standard", which scales only the initial standard deviation."""
    base_width: PositiveInt = 64
    """d_model at which all values hold."""
    base_layers: PositiveInt | None = None
    """Depth of the base model. None means `n_layers`, so that no depth rule applies."""
    depth_power: float = Field(1.0, ge=0, le=1)
    """Branches are multiplied by (layers / base layers)^-depth_power. 1 is CompleteP, 1/2 is depth-muP."""
    init_std: PositiveFloat = 0.08
    """Initial standard deviation of hidden matrices at base width."""
    embed_std: PositiveFloat = 1.0
    """Initial standard deviation of the token embedding. At 0.08, a proxy of 200k tokens loses 0.29 nats."""
    embed_lr_mult: PositiveFloat = 1.0
    """Learning rate of the token embedding divided by that of the other parameters."""
    alpha_in: PositiveFloat = 1.0
    """Multiplier on the embedding's output."""
    alpha_out: PositiveFloat = 1.0
    """Multiplier on the logits."""
    alpha_attn: PositiveFloat = 1.0
    """Multiplier on the attention scale 1 / sqrt(d_head)."""

    optimizer: OptimizerName = "adamw"
    """Name of the optimizer, see `proxies/model/optimizers.py`."""
    lr: PositiveFloat = 2**-7
    """Peak learning rate at base width. Prodigy finds its rate, and `lr` multiplies it."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay as given to AdamW: the decay per step is lr * weight_decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay rate of the second moment."""
    eps: PositiveFloat = 1e-8
    """Epsilon of Adam at base width."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Momentum of Muon."""
    beta3: float = Field(0.9999, ge=0, lt=1)
    """Decay rate of AdEMAMix's slow average."""
    slow_weight: NonNegativeFloat = 5.0
    """Weight of AdEMAMix's slow average, its alpha."""
    slow_warmup_tokens: int = Field(0, ge=0)
    """Tokens over which AdEMAMix raises `slow_weight` and `beta3`; 0 for none."""
    coordinate_check: str | None = None
    """Path of a certificate made by `proxies check --certificate`, for an optimizer without a verified rule."""
    batch_seqs: PositiveInt = 16
    """Sequences per optimizer step."""

    schedule: ScheduleName = "wsd"
    """Name of the learning-rate schedule, see `proxies/config/schedules.py`."""
    decay: DecayName = "1-sqrt"
    """Shape of the cooldown of "wsd", "power" and "inverse-sqrt"."""
    warmup_tokens: int = Field(8192, ge=0)
    """Tokens of the linear warm-up."""
    cooldown: float = Field(0.2, gt=0, lt=1)
    """Share of a run's tokens spent in the cooldown."""
    lr_floor: float = Field(0.1, ge=0, lt=1)
    """Share of the peak rate at which cosine and exponential decay end."""
    power_a: PositiveFloat = 4.6
    """Schedule "power": lr is at most batch_seqs * power_a * tokens^power_b."""
    power_b: float = Field(-0.51, lt=0)
    """Schedule "power": the exponent of tokens, negative."""
    sqrt_tokens: PositiveInt = 65_536
    """Schedule "inverse-sqrt": constant until this many tokens, then sqrt(sqrt_tokens / tokens)."""

    micro_seqs: PositiveInt | None = None
    """Sequences per forward and backward pass; None for the whole batch. Changes only memory, time, and the rounding of
    a sum over parts.
    """
    recompute: bool = False
    """Keep no activations inside blocks. Takes a third more compute and less memory."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Precision of matrix products; weights stay in float32. None means float32 on CPU, where it is faster, and
    bfloat16 on CUDA.
    """
    compile: bool = False
    """Use torch.compile. Takes a minute before the first step and needs a C++ compiler."""

    tokenizer: str = "bytes"
    """The tokenizer: "bytes", "bpe" (trained on the training part), or the path of a tokenizer.json."""
    corpus: str | dict[str, str] = "stdlib"
    """The data: "stdlib", text, a folder, files of tokens, or a data set (see `proxies/data/corpora.py`); several
    sources as a table by name.
    """
    mixture: dict[str, Weight] = Field(default_factory=dict, validate_default=True)
    """Training weights of several sources by name. Their sum does not matter. Empty means equal weights."""
    eval_mixture: dict[str, Weight] = Field(default_factory=dict, validate_default=True)
    """Weights of several sources in the held-out loss. Empty means equal weights, whatever is trained on."""
    order: Literal["random", "epochs"] = "random"
    """Order of the windows: "random" draws with replacement; "epochs" reads the data pass after pass."""
    eval_windows: PositiveInt = 64
    """Number of held-out windows of `seq_len` tokens, which are always the same ones."""
    early_points: bool = False
    """Also measure the held-out loss from the end of the warm-up on, so that a launch detects a wrong learning rate
    sooner.
    """
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the initial weights and of the order of the data."""

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
    def _check_together(self) -> Self:
        # One validator for all, since pydantic stops at the first that raises.
        checks = (
            _check_eval_windows,
            _check_head_size,
            _check_whole_heads,
            _check_prodigy_rate,
            _check_exponential_floor,
            _check_first_logits_of_tied_table,
        )
        if problems := [problem for check in checks for problem in check(self)]:
            raise ValueError("\n".join(problems))
        return self


class ProxyConfig(ProxySettings):
    """One proxy: the settings of its family (see `ProxySettings`) and a width.

    Raises `pydantic.ValidationError`, which lists all problems, if a setting is unknown or invalid.
    """

    d_model: PositiveInt = 64
    """Width of the residual stream; a multiple of d_head * q_per_kv."""

    @field_validator("mixture", "eval_mixture")
    @classmethod
    def _normalize(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        return normalize_weights(weights, _list_sources(info.data.get("corpus", "")))

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


def _check_eval_windows(settings: ProxySettings) -> list[str]:
    shares = normalize_weights(settings.eval_mixture, _list_sources(settings.corpus))
    counts = allot_windows(settings.eval_windows, list(shares.values()))
    missing = [name for (name, share), n in zip(shares.items(), counts, strict=True) if share > 0 and n == 0]
    if not missing:
        return []
    return [
        "eval_windows: needed a window for every source with a weight in eval_mixture, "
        f"got {settings.eval_windows} and none for {', '.join(missing)}: raise eval_windows, or set those weights to 0"
    ]


def _check_head_size(settings: ProxySettings) -> list[str]:
    if settings.d_head % 2 == 0:
        return []
    return [f"d_head: needed an even number (rotary embedding turns pairs of channels), got {settings.d_head}"]


def _check_whole_heads(settings: ProxySettings) -> list[str]:
    # A family checks its own widths.
    if not isinstance(settings, ProxyConfig):
        return []
    group = settings.d_head * settings.q_per_kv
    return [
        f"{name}: must be a multiple of d_head * q_per_kv = {group} (whole heads, whole groups), got {width}: "
        f"the nearest {'is' if width < group else 'are'} "
        + " and ".join(str(near) for near in (width // group * group, (width // group + 1) * group) if near)
        for name, width in (("d_model", settings.d_model), ("base_width", settings.base_width))
        if width % group
    ]


def _check_prodigy_rate(settings: ProxySettings) -> list[str]:
    if settings.optimizer != "prodigy" or 0.1 <= settings.lr <= 10:
        return []
    return [
        "optimizer = 'prodigy' finds the rate, which lr multiplies: needed lr from 0.1 to 10, "
        f"got {settings.lr:g}: set lr = 1"
    ]


def _check_exponential_floor(settings: ProxySettings) -> list[str]:
    if settings.decay != "exponential" or settings.lr_floor > 0:
        return []
    return ["decay = 'exponential' needs lr_floor > 0, the share of the peak where it ends, got 0"]


def _check_first_logits_of_tied_table(settings: ProxySettings) -> list[str]:
    logit_std = settings.embed_std * settings.alpha_out * math.sqrt(settings.base_width)
    if not settings.tied or logit_std <= 2:
        return []
    return [
        "tied = true: needed first logits of standard deviation embed_std * alpha_out * sqrt(base_width) "
        f"at most 2, got {logit_std:.3g}: set embed_std near {1 / math.sqrt(settings.base_width):.3g} "
        f"and alpha_in near {math.sqrt(settings.base_width):.3g}"
    ]


def _list_sources(corpus: str | dict[str, str]) -> list[str]:
    """Return the names of the sources in an order independent of the file's; a single corpus has none."""
    return [] if isinstance(corpus, str) else sorted(corpus)
