"""The loss of a finished training, in a file that is written before the study is told of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from scaling.common.atomic import write_atomically


def write_result(path: Path, loss: float) -> None:
    """Write the loss of one training; NaN if it diverged."""
    write_atomically(path, json.dumps({"loss": loss if math.isfinite(loss) else None}))


def read_result(path: Path) -> float:
    """Return the loss of one training from its file; NaN if it diverged.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        loss = json.loads(path.read_bytes())["loss"]
        return math.nan if loss is None else float(loss)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} holds no loss: remove it, and that training is repeated") from error
