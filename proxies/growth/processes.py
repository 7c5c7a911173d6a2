"""Child processes of `proxies grow --plan`: commands of `hpo`, how much they log, how many threads they use."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("muscale.proxies")


def run_hpo(command: str, toml: Path, *options: str, uri: str | None = None) -> str:
    """Run a command of `hpo` to its end. Its log goes to stderr, at the level of this process's log.

    Args:
        command: "launch", "resume" or "best".
        toml: The study file.
        options: More options of the command.
        uri: The MLflow store. It is passed by the environment, because every user of a machine can read its command
            lines.

    Returns:
        What the command prints to stdout.

    Raises:
        RuntimeError: If the command fails.
        KeyboardInterrupt: If it was stopped by a signal.
    """
    words = [sys.executable, "-m", "hpo", command, str(toml), *options, *get_verbosity_options()]
    environment = os.environ | ({"MLFLOW_TRACKING_URI": uri} if uri else {})
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        out, _ = process.communicate()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if process.returncode in (130, 143):
        raise KeyboardInterrupt
    if process.returncode:
        raise RuntimeError(f"`hpo {command} {toml}` ended with exit code {process.returncode}; its output is above")
    return out


def get_verbosity_options() -> list[str]:
    """Return the options with which a command of the toolkit logs at the level of this process."""
    if logger.isEnabledFor(logging.DEBUG):
        return ["--verbose"]
    return [] if logger.isEnabledFor(logging.INFO) else ["--quiet"]


@contextmanager
def limit_to_one_thread() -> Iterator[None]:
    """Use one thread for torch's operations in the block.

    Small matrices are no faster with more, and processes that run at the same time would slow each other down.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
