"""JSON notes in a launch plan: the recommendation behind it, and the advice of `proxies grow --plan`.

They are kept exactly as they were written, keys of later versions included. These types only describe them.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from proxies.growth.answer import IntervalNote


class LossLawNote(TypedDict, total=False):
    """L(N, D) = E + A / N^alpha + B / D^beta, nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float


class ProvenanceNote(TypedDict, total=False):
    """The data and the version that a recommendation was made with."""

    n_runs: int
    # Number of (N, D) groups.
    n_groups: int
    version: str
    # Hash of the study's usable proxy runs, see `scaling.runs.table.hash_table`.
    table_sha256: str


class FlagNote(TypedDict):
    """A doubt about a recommendation."""

    code: str
    text: str
    serious: bool


class RecommendationNote(TypedDict):
    """What `scaling recommend` wrote, and under `runs` the names of the runs that it rests on."""

    N: float
    D: float
    lr: float
    # Tokens per optimizer step.
    batch_tokens: float
    # Nats per token.
    loss: float
    loss_interval: list[float]
    # Probability mass of the interval.
    mass: float
    loss_law: NotRequired[LossLawNote]
    provenance: NotRequired[ProvenanceNote]
    flags: NotRequired[list[FlagNote]]
    runs: NotRequired[list[str]]


class GrowthAdvice(TypedDict):
    """The answer of `proxies grow --plan` for the target's width."""

    use: bool
    method: str
    # Learning rate, shrink factor and noise that the search found best.
    settings: dict[str, float]
    # Tokens per parameter that the answer is for.
    horizon: float
    # Share of the loss that is saved, without and with the cost of the base model.
    gain: IntervalNote
    gain_with_base: IntervalNote
