"""Log to stderr from the commands. Libraries only create loggers under "muscale" and leave handlers to the program."""

from __future__ import annotations

import logging
import sys

from scaling.common.redact import redact_passwords

ROOT = "muscale"


class RedactingFormatter(logging.Formatter):
    """Format a record as its message alone, without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_passwords(super().format(record))


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Write to what sys.stderr is at that moment, so that redirecting it works after the handler was made."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        return sys.stderr


def configure_logging(level: int = logging.INFO) -> None:
    """Send the records of all muscale loggers to stderr, one line each.

    A second call only changes the level. Records still propagate to the root logger's handlers, if a program has any.

    Args:
        level: The least level that is shown: `logging.INFO` for progress, `logging.WARNING` for `--quiet`,
            `logging.DEBUG` for `-v`.
    """
    logger = logging.getLogger(ROOT)
    logger.setLevel(level)
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        handler = StderrHandler()
        handler.setFormatter(RedactingFormatter("%(message)s"))
        logger.addHandler(handler)
