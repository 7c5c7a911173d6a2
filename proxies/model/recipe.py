"""A tuned set of values, and where each goes at another width, depth, batch size or number of tokens (docs/math.md §2, §9).

Width and depth are in the muP table (`proxies.model.mup.rules`), which needs only the shape. Batch and tokens change what is
tuned itself: learning rate, betas, epsilon and decay. Both are here in one object; the laws of `scaling`, fitted to runs
at several batch sizes and lengths, are better wherever there are such runs.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, model_validator

from proxies.config.proxy import ProxyConfig

# The batch rule is derived for Adam's normalised step (arXiv 2205.10287); for others nothing is known here.
BATCH_RULE = ("adamw", "adamw8bit")


class Recipe(BaseModel):
    """Values tuned for one batch size and length, carried to others.

    Batch times c (Adam's square-root rule, arXiv 2205.10287): lr sqrt(c), 1 - beta times c, eps / sqrt(c).
    Tokens D to h D: lr h^-horizon_power (arXiv 2409.19913 measured .32 with cosine schedules at fixed batch).
    Decay: the timescale 1 / (lr wd S), the share of the run that the weights remember (2405.13698), is kept while
    timescale_power is 0; else it goes as (tokens per parameter)^-timescale_power, about .53 in 2505.13738, from memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: ProxyConfig
    tokens: PositiveInt = Field(description="length of the runs that the base was tuned with")
    horizon_power: NonNegativeFloat = 0.32
    timescale_power: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _a_step_at_least(self) -> Self:
        if self.tokens < self.base.batch_tokens:
            raise ValueError(f"tokens: needed a step of {self.base.batch_tokens:,} tokens or more, got {self.tokens:,}")
        return self

    def at(
        self,
        *,
        d_model: int | None = None,
        n_layers: int | None = None,
        batch_seqs: int | None = None,
        tokens: int | None = None,
    ) -> ProxyConfig:
        """The configuration at another width, depth, batch (sequences) or length (tokens); what is not named stays.

        The depth tuned at becomes the base depth unless one is set. Warm-up stays as it is in tokens. ValueError if the
        batch grows beyond what the betas allow, or for an optimizer whose batch rule is not known.
        """
        base = self.base
        seqs = batch_seqs or base.batch_seqs
        length = tokens or self.tokens
        shape = {
            "d_model": d_model or base.d_model,
            "n_layers": n_layers or base.n_layers,
            "base_layers": base.base_layers or base.n_layers,
        }
        moved = ProxyConfig.model_validate(base.model_dump() | shape | {"batch_seqs": seqs})
        c, h = seqs / base.batch_seqs, length / self.tokens
        if c != 1:
            if base.optimizer not in BATCH_RULE:
                raise ValueError(
                    f"batch_seqs: needed {base.batch_seqs}, the batch that was tuned, since no batch rule is known for "
                    f"{base.optimizer!r} (known for {', '.join(BATCH_RULE)}), got {seqs}: search batch_seqs instead"
                )
            most = 1 / (1 - min(base.beta1, base.beta2))
            if c >= most * (1 - 1e-9):
                raise ValueError(
                    f"batch_seqs: needed less than {most * base.batch_seqs:g}, where 1 - beta reaches 1, got {seqs}"
                )
        if length < moved.batch_tokens:
            raise ValueError(f"tokens: needed a step of {moved.batch_tokens:,} tokens or more, got {length:,}")
        growth = (length / moved.counts.N) / (self.tokens / base.counts.N)  # of tokens per parameter
        lr = base.lr * c**0.5 * h**-self.horizon_power
        # Fixed 1 / (lr wd S), with S as h / c.
        decay = base.weight_decay * (base.lr / lr) * (c / h) * growth**self.timescale_power
        return moved.model_copy(
            update={
                "lr": lr,
                "weight_decay": decay,
                "beta1": 1 - c * (1 - base.beta1),
                "beta2": 1 - c * (1 - base.beta2),
                "eps": base.eps / c**0.5,
            }
        )


def timescale(config: ProxyConfig, tokens: int) -> float:
    """1 / (lr wd S): the share of a run of `tokens` tokens over which AdamW averages its updates (arXiv 2405.13698).

    Infinite without decay. The same at every width: the hidden rate falls as its decay rises.
    """
    per_run = config.lr * config.weight_decay * tokens / config.batch_tokens
    return 1 / per_run if per_run else float("inf")
