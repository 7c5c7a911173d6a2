"""The loss of a finished training, in a file that is written before the study is told of it.

Beside the loss stand the size and the checksum of the checkpoint that the training wrote.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from scaling.common.atomic import write_atomically


class CheckpointRecord(NamedTuple):
    """What a checkpoint was when it was written.

    Attributes:
        bytes: Its size.
        crc32: Its checksum; None if it was too large to compute one.
    """

    bytes: int
    crc32: int | None


def write_result(path: Path, loss: float, checkpoint: CheckpointRecord | None = None) -> None:
    """Write the loss of one training, NaN if it diverged, and a record of its checkpoint."""
    record: dict[str, Any] = {"loss": loss if math.isfinite(loss) else None}
    if checkpoint is not None:
        record["checkpoint"] = checkpoint._asdict()
    write_atomically(path, json.dumps(record))


def read_checkpoint_record(path: Path) -> CheckpointRecord | None:
    """Return what a training's checkpoint was when it was written; None if its file does not have it."""
    try:
        record = json.loads(path.read_bytes())["checkpoint"]
        checksum = record["crc32"]
        return CheckpointRecord(int(record["bytes"]), None if checksum is None else int(checksum))
    except (OSError, ValueError, LookupError, TypeError):
        return None


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
