"""The files of a study: the folder studies/<name>/ beside its .toml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StudyFiles:
    """Where a study keeps what it makes, beside its .toml."""

    toml: Path

    @property
    def name(self) -> str:
        return self.toml.stem

    @property
    def folder(self) -> Path:
        return self.toml.parent / self.name

    @property
    def journal(self) -> Path:
        return self.folder / "study.journal"

    @property
    def storage(self) -> Path:
        """Where the study is kept instead of the journal, without passwords."""
        return self.folder / "storage"

    @property
    def settings(self) -> Path:
        return self.folder / "study.json"

    @property
    def manifest(self) -> Path:
        return self.folder / "data.json"

    @property
    def records(self) -> Path:
        """What is on its way to MLflow."""
        return self.folder / "records"

    def checkpoint(self, config: int, tokens: int, repeat: int = 0) -> Path:
        return self._of_run(config, tokens, repeat, ".pt")

    def partial(self, config: int, tokens: int, repeat: int = 0) -> Path:
        return self._of_run(config, tokens, repeat, ".partial.pt")

    def result(self, config: int, tokens: int, repeat: int) -> Path:
        """The loss of a training that has ended: whoever dies before it is told, it is not made again."""
        return self._of_run(config, tokens, repeat, ".json")

    def _of_run(self, config: int, tokens: int, repeat: int, ending: str) -> Path:
        return self.folder / "checkpoints" / f"{config:04d}-{tokens}{suffix(repeat)}{ending}"


def suffix(repeat: int) -> str:
    """What the files and the MLflow run of a repeat have at the end of their names: nothing for the first."""
    return f"-repeat{repeat}" if repeat else ""
