"""The `Trainer` protocol: what a study file must name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from optuna.distributions import BaseDistribution

from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity


class Trainer(Protocol):
    """What a study's `[trainer] use = "module:name"` must make when it is called with the table's other keys.

    `repeat`: 0 is a run on the trainer's own random seed; others are the same settings with other initial weights and
    another order of the data, each always the same.

    A trainer made from bad settings raises ValueError (or pydantic's ValidationError, whose every mistake is then named).
    One whose longer runs cannot go on from shorter ones has an attribute `resumable` that is False: it is then never asked
    to, and every promotion pays its full price. One that cannot train the same settings on another random seed has
    `repeatable` False. One with a method `example(params, fidelity)` says what it runs, which is shown before it runs.
    """

    @property
    def sizes(self) -> Sequence[float]:
        """N of every proxy size, ascending."""

    def problems(self, space: Mapping[str, BaseDistribution], tokens: tuple[int, int] | None) -> list[str]:
        """Why this space, from the smallest to the largest run (None: not known yet), cannot be trained; cheap."""

    def target(self, **table: Any) -> Fidelity:
        """N and D of the `[target]` table."""

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> dict[str, Any]:
        """Every setting of one run, resolved, for the record: N, lr, batch_tokens, seq_len, ... and the data's hash.

        `schedule` "wsd" with `cooldown` and `warmup_tokens` also tells hpo.worker.early_stopping the schedule.
        """

    def manifest(self) -> list[dict[str, Any]]:
        """The data's files, one record each (path, size, split, ...). ValueError when they cannot be read."""

    def seconds(self, params: Mapping[str, Any], fidelities: Sequence[Fidelity], *, threads: int) -> list[float]:
        """About how long runs of these sizes take one worker of so many threads, with these parameters."""

    def __call__(
        self,
        params: Mapping[str, Any],
        fidelity: Fidelity,
        *,
        resume: Path | None = None,
        save: Path | None = None,
        keep: Path | None = None,
        repeat: int = 0,
    ) -> Iterator[Measurement]:
        """Train. `resume`: a file that an earlier call wrote to `save` (a shorter run) or `keep` (an interrupted one)."""
