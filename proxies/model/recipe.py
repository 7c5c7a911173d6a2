"""Carry tuned values to another width, depth, batch size or number of tokens (docs/math.md §2).

The muP table (`proxies.model.mup.compute_rules`) covers width and depth and needs only the shape. Batch size and number
of tokens change the tuned values themselves: learning rate, betas, epsilon and decay. A `Recipe` handles all of them.
The laws of `scaling`, fitted to runs at several batch sizes and run lengths, are better wherever there are such runs.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt, model_validator

from proxies.config.proxy import ProxyConfig

# The batch rule is derived for Adam's normalized step (arXiv 2205.10287). No rule is known here for other optimizers.
BATCH_RULE_OPTIMIZERS = ("adamw", "adamw8bit")


class Recipe(BaseModel):
    """Values tuned for one batch size and run length, to be carried to others.

    - Batch size times c (Adam's square-root rule, arXiv 2205.10287): lr times sqrt(c), 1 - beta times c, eps divided by
      sqrt(c).
    - Tokens from D to h D: lr times h^-horizon_power. arXiv 2409.19913 measured 0.32, with cosine schedules at fixed
      batch size.
    - Decay: the timescale 1 / (lr wd S), the share of the run over which weights are averaged (arXiv 2405.13698), stays
      the same if timescale_power is 0. Otherwise it changes as (tokens per parameter)^-timescale_power; about 0.53 in
      arXiv 2505.13738, from memory.

    Attributes:
        base: The proxy with the tuned values.
        tokens: Tokens of the runs that it was tuned with.
        horizon_power: Power of the number of tokens by which lr falls.
        timescale_power: Power of tokens per parameter by which the decay timescale falls.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: ProxyConfig
    tokens: PositiveInt
    horizon_power: NonNegativeFloat = 0.32
    timescale_power: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check_length(self) -> Self:
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
        """Return the configuration at another width, depth, batch size or length.

        The tuned depth becomes the base depth unless one is set. The warm-up stays the same in tokens.

        Args:
            d_model: Width; by default the tuned one.
            n_layers: Number of layers; by default the tuned one.
            batch_seqs: Sequences per step; by default the tuned number.
            tokens: Tokens of the run; by default the tuned number.

        Returns:
            The configuration with the values for that place.

        Raises:
            ValueError: If the batch size grows beyond what the betas allow, changes for an optimizer without a known
                batch rule, or the run is shorter than a step.
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
            if base.optimizer not in BATCH_RULE_OPTIMIZERS:
                raise ValueError(
                    f"batch_seqs: needed {base.batch_seqs}, the batch that was tuned, since no batch rule is known for "
                    f"{base.optimizer!r} (known for {', '.join(BATCH_RULE_OPTIMIZERS)}), got {seqs}: "
                    "search batch_seqs instead"
                )
            limit = 1 / (1 - min(base.beta1, base.beta2))
            if c >= limit * (1 - 1e-9):
                raise ValueError(
                    f"batch_seqs: needed less than {limit * base.batch_seqs:g}, where 1 - beta reaches 1, got {seqs}"
                )
        if length < moved.batch_tokens:
            raise ValueError(f"tokens: needed a step of {moved.batch_tokens:,} tokens or more, got {length:,}")
        # Growth of tokens per parameter.
        growth = (length / moved.counts.N) / (self.tokens / base.counts.N)
        lr = base.lr * c**0.5 * h**-self.horizon_power
        # Keeps 1 / (lr wd S) fixed, with S as h / c.
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


def compute_timescale(config: ProxyConfig, tokens: int) -> float:
    """Return 1 / (lr wd S), the share of a run over which AdamW averages its updates (arXiv 2405.13698).

    It is the same at every width, since the hidden rate falls as its decay rises.

    Args:
        config: The proxy.
        tokens: Tokens of the run.

    Returns:
        The timescale as a share of the run; infinite without decay.
    """
    per_run = config.lr * config.weight_decay * tokens / config.batch_tokens
    return 1 / per_run if per_run else float("inf")
