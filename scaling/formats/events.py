"""Read the event files of TensorBoard, with the extra `tensorboard`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from scaling.formats.histories import name_run
from scaling.formats.raw import RawTable

# What the names of event files begin with.
EVENT_FILE = "events.out.tfevents"
HELD_OUT_LOSS = re.compile(r"(?=.*loss)(?=.*(^|[/_. ])(val|valid|validation|eval|evaluation)([/_. ]|$))", re.IGNORECASE)


def read_events(path: Path) -> RawTable:
    """Read the scalars of an event file of TensorBoard, or of all event files in a folder, with one row per step.

    Raises:
        ValueError: If the extra `tensorboard` is not installed, or there are no scalars.
    """
    try:
        from tensorboard.backend.event_processing import event_accumulator
        from tensorboard.plugins.hparams import plugin_data_pb2
        from tensorboard.util import tensor_util
    except ImportError as error:
        raise ValueError(
            f'{path} cannot be read: event files of TensorBoard need pip install "muscale[tensorboard]"'
        ) from error
    import numpy as np
    import pandas as pd

    sizes = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}
    events = event_accumulator.EventAccumulator(str(path), size_guidance=sizes)
    events.Reload()
    rows: dict[int, dict[str, Any]] = {}
    tags = events.Tags()
    for tag in [*tags["scalars"], *tags["tensors"]]:
        for event in events.Scalars(tag) if tag in tags["scalars"] else events.Tensors(tag):
            value = event.value if hasattr(event, "value") else tensor_util.make_ndarray(event.tensor_proto)
            # Tensors may be histograms, images or texts.
            if getattr(value, "size", 1) != 1 or getattr(value, "dtype", np.dtype(float)).kind not in "iuf":
                break
            number = float(value)
            # Text, because NaN is an outcome and not a missing value.
            rows.setdefault(event.step, {})[tag] = number if math.isfinite(number) else str(number)
    if not rows:
        raise ValueError(f"{path} cannot be used: no rows (the event files hold no scalars)")
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    steps = sorted(rows)
    cells = pd.DataFrame({n: pd.Series([rows[step].get(n) for step in steps], dtype=object) for n in names})
    cells.insert(0, "step", steps)
    cells.insert(0, "run_id", name_run(path))
    try:
        contents = events.PluginTagToContent("hparams")
    # There are no hyperparameters.
    except KeyError:
        contents = {}
    for content in contents.values():
        start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        for name, value in start.hparams.items():
            kind = value.WhichOneof("kind")
            if kind:
                cells[f"config.{name}"] = getattr(value, kind)
    losses = [name for name in names if HELD_OUT_LOSS.match(name)]
    mapping = {"D": "step:steps"} | ({"loss": losses[0]} if len(losses) == 1 else {})
    return RawTable(cells, [f"event files of TensorBoard: {len(steps)} steps of {', '.join(names[:8])}"], mapping)
