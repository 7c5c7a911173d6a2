"""A search's journal, which is Optuna's: refused by file and line where it is damaged, and mended where a writer was killed."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Generator
from io import RawIOBase
from pathlib import Path
from typing import Annotated, Any

from optuna.distributions import json_to_distribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from hpo.hyperband import Ladder
from hpo.locks import Flock

Index = Annotated[int, Field(ge=0)]


class Journal(JournalFileBackend):
    """Optuna's file of one JSON record per line.

    Optuna passes over a last line without its end, which a killed writer or a full disk leaves, but appends the next record to it: from
    then on the file cannot be read. Here such a line goes before anything is appended. And of Optuna's lock, a symbolic link, a
    killed holder leaves the others waiting for half a minute. Who writes without this backend (to enqueue a trial, say) is not
    excluded, and need not be: Optuna appends in one write.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Flock(f"{path}.flock")
        super().__init__(str(path), self.lock)  # type: ignore[arg-type]  # acquire and release are all that is asked
        self.line = 0  # of the record read last, from 1

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """All lines or none. OSError where the disk is full, after which the file is as it was."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with self.lock, self.path.open("a+b", buffering=0) as file:
            end = _end_of_last_line(file)
            if end < os.fstat(file.fileno()).st_size:
                file.truncate(end)
            try:
                if (file.write(lines) or 0) < len(lines):
                    raise OSError(f"no space left for a whole line of {self.path}")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        self.line = log_number_from
        try:
            for log in super().read_logs(log_number_from):
                self.line += 1
                yield log
        except (ValueError, RecursionError) as error:
            self.line += 1
            raise self.refused(f"no JSON ({error})") from error

    def refused(self, why: str) -> ValueError:
        return ValueError(
            f"{self.path}, line {self.line}: needed a record of Optuna's journal, got {why}: restore the file, or remove that line"
        )


def _end_of_last_line(file: RawIOBase) -> int:
    """Bytes up to and with the last line's end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 4096)
        file.seek(begin)
        found = (file.read(end - begin) or b"").rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def open_journal(path: Path) -> JournalStorage:
    """The storage in this file, made when there is none. ValueError that names the line, or the trial, which cannot be read."""
    journal = Journal(path)
    try:
        storage = JournalStorage(journal)
    except Exception as error:  # Optuna replays what it finds, and raises whatever comes of it
        if isinstance(error, OSError) or str(path) in str(error):
            raise
        raise journal.refused(f"{type(error).__name__} ({error})") from error
    for study in storage.get_all_studies():
        if "muscale" in study.user_attrs:
            _check_search(storage, study.study_name, study.user_attrs["muscale"], path)
    return storage


class _Settings(BaseModel):
    """Of a search, on its study; see hpo.opening.checked_settings."""

    model_config = ConfigDict(strict=True)
    space: dict[str, str]
    tokens: list[PositiveInt] = Field(min_length=2, max_length=2)
    max_tokens: PositiveInt
    eta: int = Field(ge=2)
    sizes: list[PositiveFloat] = Field(min_length=1)
    variant: str
    iterations: PositiveInt | None
    scheduler: str
    resumable: bool
    raises: list[list[int]] = Field(default_factory=list)


class _Stopped(BaseModel):
    """hpo.record.Stopped as it is written."""

    model_config = ConfigDict(strict=True, extra="forbid")
    tokens: PositiveInt
    loss: float
    mean: float
    sd: float


class _Attributes(BaseModel):
    """Of a trial of a search; see hpo.trials."""

    model_config = ConfigDict(strict=True)
    tokens: PositiveInt
    N: PositiveFloat
    rung: Index
    bracket: list[Index] = Field(min_length=3, max_length=3)
    config: Index | None = None
    continues: Index | None = None
    resumed_tokens: Index | None = 0
    seeds: PositiveInt = 1
    resumed_seeds: Index = 0
    worker: str | None = ""
    losses: list[float | None] | None = None
    goal: Index | None = None
    diverged: bool = False
    stopped: _Stopped | None = None


def _check_search(storage: JournalStorage, name: str, stored: Any, path: Path) -> None:
    """What is read of a search, trial by trial: of the right kinds, and of what is there."""
    where = f"settings of study {name!r}"
    try:
        settings = _Settings.model_validate(stored)
        for text in settings.space.values():
            json_to_distribution(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a single rung: said when the search is made
            ladder = Ladder.make(settings.tokens[0], settings.tokens[1], settings.eta).raised(settings.max_tokens)
        trials = storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False)
        for trial in trials:
            where = f"trial {trial.number} of study {name!r}"
            if "bracket" not in trial.user_attrs:
                continue
            attrs = _Attributes.model_validate(trial.user_attrs)
            _, size, start = attrs.bracket
            if not (start <= attrs.rung <= ladder.top and size < len(settings.sizes)):
                raise ValueError(f"rung {attrs.rung} of bracket {attrs.bracket}")
            for other in (attrs.config, attrs.continues):
                if other is not None and (other >= len(trials) or "bracket" not in trials[other].user_attrs):
                    raise ValueError(f"no trial {other}")
            whole = isinstance(trial.value, int | float) and settings.space.keys() <= trial.params.keys()
            if trial.state == TrialState.COMPLETE and not whole:
                raise ValueError(f"value {trial.value!r}, parameters {trial.params}")
    except Exception as error:  # what another program, or a damaged disk, has written can be anything
        raise ValueError(
            f"{path}, {where}: needed what a search writes, got something else ({error}): restore the file"
        ) from error
