"""The result of a training on disk, written before it is told to the study so that a killed worker loses nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

from scaling.common.atomic import write_atomically


def write_result(path: Path, loss: float) -> None:
    """Keep the loss of one training, NaN when it diverged."""
    write_atomically(path, json.dumps({"loss": loss if math.isfinite(loss) else None}))


def read_result(path: Path) -> float:
    try:
        loss = json.loads(path.read_bytes())["loss"]
        return math.nan if loss is None else float(loss)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} holds no loss: remove it, and that training is made again") from error
