"""Write to one MLflow run and read from it: metrics, parameters, tags, files, notes."""

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

MAX_PARAM = 6000  # MLflow's limit on a parameter's length
MAX_PARAMS = 100  # per request, likewise
MAX_TAG = 8000
NAMES = "letters, digits, spaces and _ - : . / will do, at most 250, if it would not lead elsewhere as a path"


def metrics_of(point: Measurement) -> dict[str, float]:
    """What MLflow is told of a point, with its tokens as the step; nothing of one that the trainer logged itself."""
    values = {("final_loss" if point.final else "loss"): point.loss, "train_loss": point.train_loss, "lr": point.lr}
    return {} if point.recorded else {k: v for k, v in values.items() if math.isfinite(v)}


def result_of(
    *, rung: int, tokens: int, loss: float, seconds: float, checkpoint: Path | None
) -> tuple[dict[str, float], dict[str, str]]:
    """What MLflow is told of the outcome of one rung, metrics and tags; NaN loss means diverged."""
    outcome = {"loss": loss if math.isfinite(loss) else math.nan, "tokens": float(tokens), "seconds": seconds}
    tags = {f"rung_{rung}/checkpoint": str(checkpoint)} if checkpoint else {}
    return {f"rung_{rung}/{k}": v for k, v in outcome.items()}, tags


def log_records(
    client: MlflowClient,
    run_id: str,
    records: Iterable[tuple[Mapping[str, float], int, int]],
    tags: Mapping[str, str],
    params: Mapping[str, str] = {},
) -> None:
    """Metrics, each record's with its step and time (ms), tags and parameters, in one call. Written again, they change nothing."""
    from mlflow.entities import Param, RunTag

    metrics = [m for values, step, at in records for m in _metrics(values, step, at)]
    flat = [Param(k, v) for k, v in params.items()]
    while len(flat) > MAX_PARAMS:
        client.log_batch(run_id, params=flat[:MAX_PARAMS])
        del flat[:MAX_PARAMS]
    if metrics or tags or flat:
        client.log_batch(run_id, metrics=metrics, tags=[RunTag(k, v) for k, v in tags.items()], params=flat)


def now_ms() -> int:
    return int(time.time() * 1000)


def _metrics(values: Mapping[str, float], step: int, at: int) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(k, v, at, step) for k, v in values.items()]


def log_summary(client: MlflowClient, run_id: str, metrics: Mapping[str, float]) -> None:
    """Figures of the whole study on its parent run: best loss, number of trials, ..."""
    from mlflow.entities import Metric

    now = now_ms()
    client.log_batch(run_id, metrics=[Metric(k, float(v), now, 0) for k, v in metrics.items() if math.isfinite(v)])


def write_note(client: MlflowClient, run_id: str, name: str, value: Mapping[str, Any]) -> None:
    """A JSON value on a run as the tag `muscale.<name>`, replaced when written again."""
    text = json.dumps(value)
    if len(text) > MAX_TAG:
        raise ValueError(f"note {name} has {len(text)} characters, MLflow takes {MAX_TAG}: log it as an artifact")
    client.set_tag(run_id, f"muscale.{name}", text)


def read_note(client: MlflowClient, run_id: str, name: str) -> dict[str, Any] | None:
    """What `write_note` wrote, or None."""
    text = client.get_run(run_id).data.tags.get(f"muscale.{name}")
    return None if text is None else cast(dict[str, Any], json.loads(text))


def log_file(client: MlflowClient, run_id: str, path: Path) -> None:
    """Keep a file (a report, the resolved study) with a run."""
    client.log_artifact(run_id, str(path))


def read_curve(
    client: MlflowClient, run_id: str, metric: str = "loss", *, since: int = 0
) -> tuple[list[float], list[float]]:
    """(tokens, values) of one metric of one run, in order of tokens; only what was logged at `since` (ms) or later."""
    points = [p for p in client.get_metric_history(run_id, metric) if p.timestamp >= since]
    points.sort(key=lambda p: (p.step, p.timestamp))
    return [float(p.step) for p in points], [float(p.value) for p in points]


def unusable_names(names: Iterable[str]) -> list[str]:
    """Those that MLflow refuses for a parameter, by its own rule."""

    def usable(name: str) -> bool:
        plain = re.fullmatch(r"[/\w.\- :]{1,250}", name) is not None
        return plain and posixpath.normpath(name) == name and name != "." and not name.startswith(("..", "/"))

    return [name for name in names if not usable(name)]


def flat_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as MLflow keeps them, without those that are None. ValueError when it takes no such name, or one is too long."""
    if wrong := unusable_names(params):
        raise ValueError(f"MLflow takes no parameters of these names: {wrong}; {NAMES}")
    flat = {k: v if isinstance(v, str) else json.dumps(v) for k, v in params.items() if v is not None}
    too_long = [k for k, v in flat.items() if len(v) > MAX_PARAM]
    if too_long:
        raise ValueError(
            f"parameters {too_long} are longer than MLflow's {MAX_PARAM} characters: log a hash or a file instead"
        )
    return flat
