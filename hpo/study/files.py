"""The files of a study, in the folder studies/<name>/ beside its .toml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StudyFiles:
    """The paths of everything that a study writes.

    Attributes:
        toml: The study file. The other files are in the folder of the same name beside it.
    """

    toml: Path

    @property
    def name(self) -> str:
        """The study's name: that of its file without the suffix."""
        return self.toml.stem

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.toml.parent / self.name

    @property
    def journal(self) -> Path:
        """The Optuna study, which is the state of the search, unless it is kept in another storage."""
        return self.folder / "study.journal"

    @property
    def storage(self) -> Path:
        """The URL of the storage that holds the study instead of the journal, without passwords."""
        return self.folder / "storage"

    @property
    def settings(self) -> Path:
        """The settings that the study was launched with, defaults included."""
        return self.folder / "study.json"

    @property
    def manifest(self) -> Path:
        """The data files that the study trains on."""
        return self.folder / "data.json"

    @property
    def records(self) -> Path:
        """The folder of records that have not been sent to MLflow yet."""
        return self.folder / "records"

    def checkpoint(self, config: int, tokens: int, repeat: int = 0) -> Path:
        """Return the path of a finished training's checkpoint."""
        return self._run_path(config, tokens, repeat, ".pt")

    def partial(self, config: int, tokens: int, repeat: int = 0) -> Path:
        """Return the path of an interrupted training's checkpoint."""
        return self._run_path(config, tokens, repeat, ".partial.pt")

    def log(self, config: int, tokens: int, repeat: int = 0) -> Path:
        """Return the path of what a training's program prints, and of the tracebacks of its trainer."""
        return self._run_path(config, tokens, repeat, ".log")

    def result(self, config: int, tokens: int, repeat: int) -> Path:
        """Return the path of a finished training's loss.

        It is written before the loss is reported to the study, so a worker that dies in between loses nothing.
        """
        return self._run_path(config, tokens, repeat, ".json")

    def _run_path(self, config: int, tokens: int, repeat: int, ending: str) -> Path:
        return self.folder / "checkpoints" / f"{config:04d}-{tokens}{repeat_suffix(repeat)}{ending}"


def repeat_suffix(repeat: int) -> str:
    """Return the suffix of a repeat's file names and MLflow run name; empty for repeat 0."""
    return f"-repeat{repeat}" if repeat else ""
