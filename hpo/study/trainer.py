"""The `Trainer` protocol: what a study file must name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from optuna.distributions import BaseDistribution

from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity

# Settings by name. A plain dict, because every trainer has parameters and settings of its own.
RunSettings = dict[str, Any]


class Trainer(Protocol):
    """Trains one configuration at one fidelity.

    A study's `[trainer] use = "module:name"` names a callable that returns a trainer when it is called with the other
    keys of the table. It raises ValueError for bad settings, or pydantic's ValidationError, each of whose errors is
    then reported.

    `repeat` is the index of a random seed. Repeat 0 uses the trainer's own seed. The others train the same settings
    from other initial weights on another order of the data, reproducibly.

    Optional attributes:

    - `resumable` (default True): whether a longer run can continue from the checkpoint of a shorter one. If False, it
      is never asked to, and each promotion costs its full price.
    - `repeatable` (default True): whether the same settings can be trained with another random seed.
    - `is_program` (default False): whether it runs another program, which then finds its MLflow run in the environment.
    - `example(params, fidelity)`: the command that it would run, which is shown before anything is run.
    """

    @property
    def sizes(self) -> Sequence[float]:
        """N of each proxy size, in ascending order."""

    def problems(self, space: Mapping[str, BaseDistribution], tokens: tuple[int, int] | None) -> list[str]:
        """Return why a search space cannot be trained, one sentence per problem. This must be cheap.

        Args:
            space: The searched parameters.
            tokens: Tokens of the shortest and the longest run; None if they are not known yet.
        """

    def target(self, **table: Any) -> Fidelity:
        """Return N and D of the study's `[target]` table."""

    def describe(self, params: Mapping[str, Any], fidelity: Fidelity, *, repeat: int = 0) -> RunSettings:
        """Return every setting of a run for the record, defaults included.

        They are N, lr, batch_tokens, seq_len, a hash of the data and whatever else the trainer has.
        `schedule` = "wsd" with `cooldown` and `warmup_tokens` also gives `hpo.worker.early_stopping` the schedule.
        """

    def manifest(self) -> list[dict[str, Any]]:
        """Return a record of each data file: path, size, split and more.

        Raises:
            ValueError: If the data cannot be read.
        """

    def seconds(self, params: Mapping[str, Any], fidelities: Sequence[Fidelity], *, threads: int) -> list[float]:
        """Estimate how long runs take one worker.

        Args:
            params: The searched parameters.
            fidelities: The sizes of the runs.
            threads: CPU threads of the worker.

        Returns:
            Seconds, one number per fidelity.
        """

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
        """Train, and yield the points of the loss curve, the last of them with `final=True`.

        Args:
            params: The searched parameters.
            fidelity: N and D of the run.
            resume: A checkpoint to continue from: what an earlier call wrote to `save` (a shorter run) or to `keep` (an
                interrupted one).
            save: Where to write the checkpoint of the finished run.
            keep: Where to write a checkpoint if the run is interrupted.
            repeat: The index of the random seed.
        """


@runtime_checkable
class ResizableTrainer(Protocol):
    """A trainer whose sizes `hpo plan` may choose.

    Attributes:
        size_setting: The setting that holds its sizes, such as "widths".
    """

    size_setting: str

    def list_sizes(self, largest: float) -> Mapping[float, Any]:
        """Return the sizes that it could have, up to one, as {N: value of that setting}."""
