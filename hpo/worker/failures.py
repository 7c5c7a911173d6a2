"""Trainings that end with an error: what is told of it, and whether the settings may be its cause."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

# Failures of the first settings after which a worker ends, if no run has succeeded yet: the cause is then probably the
# trainer, and not the settings.
FIRST_FAILURES = 3
# Settings that may fail one after the other in one worker. Later failures in a row may come from the machine.
MAX_FAILURES_IN_A_ROW = 10
# Errors of the machine, which no settings cause.
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)
# Names of the exceptions that mean a lack of memory: Python's, and torch's, which must not be imported here.
OUT_OF_MEMORY_ERRORS = ("MemoryError", "OutOfMemoryError")
# Errors whose text is a sentence for the user when these packages raise them.
OWN_PACKAGES = ("hpo", "proxies", "scaling")


class TrainingFailed(Exception):
    """A trainer raised an error.

    Attributes:
        reason: What went wrong, for a user.
        is_of_machine: Whether the cause is the machine, such as a full disk, and not the settings.
    """

    def __init__(self, reason: str, is_of_machine: bool = False) -> None:
        super().__init__(reason, is_of_machine)
        self.reason, self.is_of_machine = reason, is_of_machine

    def __str__(self) -> str:
        return self.reason


def describe_error(error: BaseException, log: Path) -> TrainingFailed:
    """Return a trainer's error as one that a worker reports. A traceback of foreign code is appended to a log file.

    Args:
        error: The error.
        log: The log file of the run.
    """
    is_of_machine = isinstance(error, OSError) and error.errno in MACHINE_ERRORS
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).resolve().parents[2]
    last = Path(frames[-1].filename).resolve() if frames else root
    is_own = any(last.is_relative_to(root / package) for package in OWN_PACKAGES)
    if is_own and isinstance(error, ValueError | RuntimeError):
        return TrainingFailed(str(error), is_of_machine)
    try:
        with log.open("a", encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
        kept = f"its traceback is in {log}"
    # The disk is full, or the study was removed.
    except OSError as problem:
        kept = f"its traceback could not be written to {log} ({problem.strerror})"
    where = f" ({last.name}, line {frames[-1].lineno})" if frames else ""
    text = str(error).strip()
    name = type(error).__name__
    return TrainingFailed(f"{name}{f': {text}' if text else ''}{where}; {kept}", is_of_machine)
