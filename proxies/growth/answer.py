"""The answer of `proxies grow --plan` as JSON: what decision.json holds and the command prints with `--json`."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

# A number; "inf" for infinity; None for NaN, which JSON has not.
Bound = float | Literal["inf"] | None


class IntervalNote(TypedDict):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


class BoundsNote(TypedDict):
    """An estimate and its 95 % interval, any of which may be unbounded or unknown."""

    value: Bound
    low: Bound
    high: Bound


class ArmAtNote(TypedDict):
    """See `proxies.growth.decision.ArmAt`."""

    horizon: float
    measured: float
    gain: IntervalNote
    gain_with_base: IntervalNote
    saving: BoundsNote
    saving_with_base: BoundsNote


class ArmNote(TypedDict):
    """See `proxies.growth.decision.ArmAnswer`."""

    name: str
    at: list[ArmAtNote]
    break_even: BoundsNote
    break_even_with_base: BoundsNote


class DecisionNote(TypedDict):
    """See `proxies.growth.decision.Decision`."""

    use: bool
    arm: str
    count_base: bool
    horizon: float
    base: float
    factor: IntervalNote
    seeds: int
    arms: list[ArmNote]


class PairNote(TypedDict):
    """See `proxies.growth.question.Pair`."""

    source: int
    target: int


class QuestionNote(TypedDict):
    """The fields of `proxies.growth.question.Question` but the family, and its id."""

    id: str
    study: str
    folder: str
    source_layers: int
    real: PairNote
    small: PairNote
    second: PairNote | None
    base: float
    at: float
    horizons: list[float]
    seeds: int
    budget: float
    starts: list[str]


class GrowthReasons(TypedDict):
    """What an answer was made of."""

    question: QuestionNote
    # Tokens per parameter of the real target that the real base costs.
    base_cost: float
    # The settings that the searches found, by way to start.
    settings: dict[str, dict[str, Any]]
    # log2 of each way's best learning rate over scratch's.
    lr_octaves_from_scratch: dict[str, float]
    studies: list[str]
    runs: int
    seconds: float
    # Path of the file with the losses.
    rows: str


class GrowthAnswer(TypedDict):
    """Whether a warm start is worth it, by which method, with which settings, and why."""

    study: str
    use: bool
    method: str
    settings: dict[str, Any]
    decision: DecisionNote
    because: GrowthReasons
