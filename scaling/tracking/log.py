"""Write to one MLflow run and read from it: metrics, parameters, tags, files and notes."""

from __future__ import annotations

import json
import math
import posixpath
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scaling.common.measurement import Measurement

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's limits: characters in a parameter, parameters in a request, characters in a tag.
MAX_PARAM_LENGTH = 6000
MAX_PARAMS_PER_REQUEST = 100
MAX_TAG_LENGTH = 8000
PARAMETER_NAME_RULE = (
    "names may have letters, digits, spaces and _ - : . /, at most 250 characters, "
    "and must not lead elsewhere as a path"
)


def point_to_metrics(point: Measurement) -> dict[str, float]:
    """Return the finite metrics of a point for MLflow; none for a point that the trainer has logged itself.

    Args:
        point: A point of a run. Its tokens become the step of the metrics.

    Returns:
        `loss` (or `final_loss` for a final point) and `train_loss` in nats per token, and `lr`.
    """
    values = {("final_loss" if point.final else "loss"): point.loss, "train_loss": point.train_loss, "lr": point.lr}
    return {} if point.recorded else {k: v for k, v in values.items() if math.isfinite(v)}


def result_to_metrics(
    *, rung: int, tokens: int, loss: float, seconds: float, checkpoint: Path | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the metrics and tags that record the result of one rung.

    Args:
        rung: The number of the rung.
        tokens: Training tokens.
        loss: Final loss, nats per token; NaN or infinite if the run diverged.
        seconds: Training time.
        checkpoint: Where the model was saved, if it was.

    Returns:
        (metrics, tags), named `rung_<rung>/...`.
    """
    result = {"loss": loss if math.isfinite(loss) else math.nan, "tokens": float(tokens), "seconds": seconds}
    tags = {f"rung_{rung}/checkpoint": str(checkpoint)} if checkpoint else {}
    return {f"rung_{rung}/{k}": v for k, v in result.items()}, tags


def log_records(
    client: MlflowClient,
    run_id: str,
    records: Iterable[tuple[Mapping[str, float], int, int]],
    tags: Mapping[str, str],
    params: Mapping[str, str] = {},
) -> None:
    """Log metrics, tags and parameters in one request (more, if there are over 100 parameters).

    Logging the same again changes nothing.

    Args:
        client: The MLflow client.
        run_id: MLflow's run id.
        records: (metrics, step, time in milliseconds since the epoch) of each record.
        tags: Tags by name.
        params: Parameters, as `serialize_params` returns them.
    """
    from mlflow.entities import Param, RunTag

    metrics = [m for values, step, at in records for m in _build_metrics(values, step, at)]
    remaining = [Param(k, v) for k, v in params.items()]
    while len(remaining) > MAX_PARAMS_PER_REQUEST:
        client.log_batch(run_id, params=remaining[:MAX_PARAMS_PER_REQUEST])
        del remaining[:MAX_PARAMS_PER_REQUEST]
    if metrics or tags or remaining:
        client.log_batch(run_id, metrics=metrics, tags=[RunTag(k, v) for k, v in tags.items()], params=remaining)


def now_ms() -> int:
    """Return the time in milliseconds since the epoch."""
    return int(time.time() * 1000)


def _build_metrics(values: Mapping[str, float], step: int, at: int) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(k, v, at, step) for k, v in values.items()]


def log_summary(client: MlflowClient, run_id: str, metrics: Mapping[str, float]) -> None:
    """Log figures of a whole study on its parent run, leaving out those that are not finite."""
    finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
    client.log_batch(run_id, metrics=_build_metrics(finite, 0, now_ms()))


def write_note(client: MlflowClient, run_id: str, name: str, value: Mapping[str, Any]) -> None:
    """Keep a JSON value on a run as the tag `muscale.<name>`, replacing an earlier one.

    Args:
        client: The MLflow client.
        run_id: MLflow's run id.
        name: The note's name.
        value: Anything that JSON can hold.

    Raises:
        ValueError: If the text is longer than MLflow's 8000 characters.
    """
    text = json.dumps(value)
    if len(text) > MAX_TAG_LENGTH:
        raise ValueError(
            f"note {name} has {len(text)} characters, MLflow takes {MAX_TAG_LENGTH}: log it as an artifact"
        )
    client.set_tag(run_id, f"muscale.{name}", text)


def read_note(client: MlflowClient, run_id: str, name: str) -> dict[str, Any] | None:
    """Return what `write_note` wrote under this name, or None."""
    text = client.get_run(run_id).data.tags.get(f"muscale.{name}")
    return None if text is None else cast(dict[str, Any], json.loads(text))


def log_file(client: MlflowClient, run_id: str, path: Path) -> None:
    """Keep a file with a run, such as a report or the resolved study."""
    client.log_artifact(run_id, str(path))


def read_curve(
    client: MlflowClient, run_id: str, metric: str = "loss", *, since: int = 0
) -> tuple[list[float], list[float]]:
    """Return the history of one metric of a run.

    Args:
        client: The MLflow client.
        run_id: MLflow's run id.
        metric: The metric's name.
        since: Leave out what was logged before this time, in milliseconds since the epoch.

    Returns:
        (tokens, values), in ascending order of tokens.
    """
    points = [p for p in client.get_metric_history(run_id, metric) if p.timestamp >= since]
    points.sort(key=lambda p: (p.step, p.timestamp))
    return [float(p.step) for p in points], [float(p.value) for p in points]


def find_unusable_names(names: Iterable[str]) -> list[str]:
    """Return the names that MLflow rejects for a parameter, by its own rule."""

    def is_usable(name: str) -> bool:
        is_plain = re.fullmatch(r"[/\w.\- :]{1,250}", name) is not None
        return is_plain and posixpath.normpath(name) == name and name != "." and not name.startswith(("..", "/"))

    return [name for name in names if not is_usable(name)]


def serialize_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters as MLflow stores them: text stays, other values become JSON, and None is left out.

    Args:
        params: Parameters by name.

    Returns:
        Texts by name.

    Raises:
        ValueError: If MLflow rejects a name, or a value is too long.
    """
    if unusable := find_unusable_names(params):
        raise ValueError(f"MLflow takes no parameters of these names: {unusable}; {PARAMETER_NAME_RULE}")
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in params.items() if v is not None}
    too_long = [k for k, v in texts.items() if len(v) > MAX_PARAM_LENGTH]
    if too_long:
        raise ValueError(
            f"parameters {too_long} are longer than MLflow's {MAX_PARAM_LENGTH} characters: "
            "log a hash or a file instead"
        )
    return texts
