"""Write to one MLflow run and read from it: metrics, parameters, tags, files and notes.

MLflow limits names, values and the size of a request. Nothing is refused because of that: odd characters in names are
replaced, long values are cut and kept whole in a file, and large requests are divided.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import posixpath
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scaling.common.measurement import Measurement
from scaling.common.redact import redact_passwords

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("muscale.scaling")

# MLflow's limits: characters in a name, a parameter and a tag; parameters, tags and metrics in a request.
MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_PARAMS_PER_REQUEST = MAX_TAGS_PER_REQUEST = 100
MAX_METRICS_PER_REQUEST = 800
# Characters of a long value that are kept in the parameter or tag itself, with the sha256 of the whole.
KEPT_CHARACTERS = 500
# Folder among the files of a run that holds the values that were too long for a parameter.
LONG_VALUES = "long_values"
# Keys of a note that is divided into several tags.
DIVIDED_NOTE = {"parts", "sha256"}
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
    """Log metrics, tags and parameters in one request (more, if there are very many).

    Logging the same again changes nothing. A parameter that is too long for MLflow is cut, and the whole is kept as a
    file of the run, in the folder `LONG_VALUES`.

    Args:
        client: The MLflow client.
        run_id: MLflow's run id.
        records: (metrics, step, time in milliseconds since the epoch) of each record.
        tags: Tags by name.
        params: Parameters, as `serialize_params` returns them.
    """
    from mlflow.entities import Param, RunTag

    metrics = [m for values, step, at in records for m in _build_metrics(values, step, at)]
    run_tags = [RunTag(make_usable_name(k), _shorten(v, MAX_TAG_LENGTH)) for k, v in tags.items()]
    run_params = [Param(k, _shorten(v, MAX_PARAM_LENGTH)) for k, v in params.items()]
    while metrics or run_tags or run_params:
        client.log_batch(
            run_id,
            metrics=metrics[:MAX_METRICS_PER_REQUEST],
            tags=run_tags[:MAX_TAGS_PER_REQUEST],
            params=run_params[:MAX_PARAMS_PER_REQUEST],
        )
        del metrics[:MAX_METRICS_PER_REQUEST], run_tags[:MAX_TAGS_PER_REQUEST], run_params[:MAX_PARAMS_PER_REQUEST]
    for name, text in params.items():
        if len(text) > MAX_PARAM_LENGTH:
            _keep_long_value(client, run_id, name, text)


def _keep_long_value(client: MlflowClient, run_id: str, name: str, text: str) -> None:
    """Keep a value that was cut as a file of the run. A failure is only logged, since no result depends on it."""
    try:
        client.log_text(run_id, text, f"{LONG_VALUES}/{re.sub(r'[^-.0-9A-Za-z_]', '_', name)}.txt")
    # Files may be in any store, each with errors of its own.
    except Exception as error:
        logger.warning(
            f"parameter {name} is cut to {KEPT_CHARACTERS} characters in MLflow, because the whole cannot be stored "
            f"as a file of the run: {redact_passwords(error)}"
        )


def _shorten(text: str, limit: int) -> str:
    """Return a text, or the beginning of one that is longer than the limit, with the length and hash of the whole."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text[:KEPT_CHARACTERS]} ... (cut: {len(text):,} characters, sha256 {digest})"


def now_ms() -> int:
    """Return the time in milliseconds since the epoch."""
    return int(time.time() * 1000)


def _build_metrics(values: Mapping[str, float], step: int, at: int) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(make_usable_name(k), v, at, step) for k, v in values.items()]


def log_summary(client: MlflowClient, run_id: str, metrics: Mapping[str, float]) -> None:
    """Log figures of a whole study on its parent run, leaving out those that are not finite."""
    finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
    log_records(client, run_id, [(finite, 0, now_ms())], {})


def write_note(client: MlflowClient, run_id: str, name: str, value: Mapping[str, Any]) -> None:
    """Keep a JSON value on a run as the tag `muscale.<name>`, replacing an earlier one.

    A text that is longer than MLflow's limit for a tag is divided into several tags.

    Args:
        client: The MLflow client.
        run_id: MLflow's run id.
        name: The note's name.
        value: Anything that JSON can hold.
    """
    text = json.dumps(value)
    if len(text) <= MAX_TAG_LENGTH:
        client.set_tag(run_id, f"muscale.{name}", text)
        return
    parts = [text[i : i + MAX_TAG_LENGTH] for i in range(0, len(text), MAX_TAG_LENGTH)]
    log_records(client, run_id, [], {_name_part(name, i): part for i, part in enumerate(parts)})
    # This tag is written last: until then, a reader finds the earlier note.
    head = {"parts": len(parts), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    client.set_tag(run_id, f"muscale.{name}", json.dumps(head))


def read_note(client: MlflowClient, run_id: str, name: str) -> dict[str, Any] | None:
    """Return what `write_note` wrote under this name, or None.

    Raises:
        ValueError: If a note in several tags is not whole.
    """
    tags = client.get_run(run_id).data.tags
    return parse_note(tags, name)


def parse_note(tags: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """Return a note from the tags of its run, or None. See `read_note`."""
    text = tags.get(f"muscale.{name}")
    if text is None:
        return None
    value = cast(dict[str, Any], json.loads(text))
    if value.keys() != DIVIDED_NOTE:
        return value
    whole = "".join(tags.get(_name_part(name, i), "") for i in range(value["parts"]))
    if hashlib.sha256(whole.encode()).hexdigest() != value["sha256"]:
        raise ValueError(f"note {name} in MLflow is not whole: it is being written, or its tags were edited; try again")
    return cast(dict[str, Any], json.loads(whole))


def _name_part(note: str, index: int) -> str:
    return f"muscale.{note}.part{index}"


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


def make_usable_name(name: str) -> str:
    """Return a name that MLflow takes for a parameter, a metric or a tag.

    Args:
        name: Any name.

    Returns:
        The name, or, if MLflow rejects it, one with "_" for odd characters and a hash that keeps it distinct.
    """
    if not find_unusable_names([name]):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    plain = re.sub(r"[^-\w.]", "_", name, flags=re.ASCII).strip("._") or "name"
    return f"{plain[: MAX_NAME_LENGTH - len(digest) - 1]}_{digest}"


def serialize_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters as text: text stays, other values become JSON, and None is left out.

    Args:
        params: Parameters by name.

    Returns:
        Texts by name, whole; names that MLflow rejects are replaced (see `make_usable_name`).
    """
    return {
        make_usable_name(k): v if isinstance(v, str) else json.dumps(v, default=str)
        for k, v in params.items()
        if v is not None
    }
