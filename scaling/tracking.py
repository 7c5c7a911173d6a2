"""The one door to MLflow, which keeps the record: every run, curve and setting.

One experiment per study. In it one parent run for the study, one child run per configuration, and one child run per launched
target. A child's curve is its metrics `loss`, `train_loss` and `lr` with tokens as the step; each finished rung k adds the
metrics `rung_k/loss`, `rung_k/tokens`, `rung_k/seconds` and the tag `rung_k/checkpoint`, one that was given up the tag
`rung_k/stopped`, so that one query reads the run table without any metric history. MLflow keeps every parameter as a string; types are restored here and nowhere else.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock

from scaling.runs import Measurement

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

FLUSH_POINTS = 100  # log_batch writes 90 times as many points a second as one call per point
FLUSH_SECONDS = 10.0  # so that a long run can be watched
MAX_PARAM = 6000  # MLflow's limit on a parameter's length
MAX_TAG = 8000

NUMBERS = ("N", "D", "lr", "batch_tokens", "seq_len", "d_model", "N_total", "N_nonembedding")
WORDS = ("parametrization", "data_sha256")


def default_uri() -> str:
    """MLFLOW_TRACKING_URI when it is set, else mlflow.db in the current folder (the project's root)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def connect(uri: str | None = None) -> MlflowClient:
    """A client of the store at `uri`, which is created and migrated first, by one process at a time."""
    import logging

    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # each start of a fresh store would print a page of migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = uri or default_uri()
    if uri.startswith("sqlite:///"):
        # Several processes that open a fresh file at once all fail, so the first to come makes it while the others wait.
        path = Path(uri.removeprefix("sqlite:///")).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            client = MlflowClient(f"sqlite:///{path}")
            client.search_experiments(max_results=1)
            return client
    return MlflowClient(uri)


def experiment_id(client: MlflowClient, study: str) -> str:
    """The study's experiment; a ValueError names the nearest studies when there is none."""
    found = client.get_experiment_by_name(study)
    if found is None:
        names = [e.name for e in client.search_experiments() if e.name != "Default"]
        near = difflib.get_close_matches(study, names, n=3, cutoff=0.3) or sorted(names)[:5]
        known = f"known studies: {', '.join(near)}" if near else "the store is empty: launch a study first"
        raise ValueError(f"no study {study!r} in MLflow at {client.tracking_uri}; {known}")
    return cast(str, found.experiment_id)


def study_run(
    client: MlflowClient, study: str, *, artifacts: Path | None = None, params: Mapping[str, Any] = {}
) -> str:
    """The id of the study's parent run, which is made with `params` (and its experiment, too) when it is not there yet."""
    if client.get_experiment_by_name(study) is None:
        client.create_experiment(study, artifact_location=artifacts.resolve().as_uri() if artifacts else None)
    experiment = experiment_id(client, study)
    parents = client.search_runs([experiment], filter_string="tags.`muscale.kind` = 'study'", max_results=1)
    if parents:
        return cast(str, parents[0].info.run_id)
    tags = {"muscale.kind": "study", "muscale.git_commit": git_commit()}
    run = client.create_run(experiment, run_name=study, tags=tags)
    _log_params(client, run.info.run_id, params)
    return cast(str, run.info.run_id)


def find_study_run(client: MlflowClient, study: str) -> str:
    """The id of the parent run of a study that exists."""
    experiment = experiment_id(client, study)
    parents = client.search_runs([experiment], filter_string="tags.`muscale.kind` = 'study'", max_results=1)
    if not parents:
        raise ValueError(
            f"experiment {study!r} has no study run: it was not made by `hpo launch`; launch a study of that name"
        )
    return cast(str, parents[0].info.run_id)


def forget_study(client: MlflowClient, study: str) -> bool:
    """Delete a study's experiment; its name becomes free at once (MLflow keeps the name of a deleted one). False when there is none."""
    found = client.get_experiment_by_name(study)
    if found is None:
        return False
    client.rename_experiment(found.experiment_id, f"{study} (forgotten {time.time_ns()})")
    client.delete_experiment(found.experiment_id)
    return True


def find_child(client: MlflowClient, parent: str, name: str) -> Any:
    """The MLflow run called `name` among the parent's children, or None."""
    experiment = client.get_run(parent).info.experiment_id
    mine = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`muscale.name` = '{name}'"
    return next(iter(client.search_runs([experiment], filter_string=mine, max_results=1)), None)


def child_run(client: MlflowClient, parent: str, name: str, *, role: str, params: Mapping[str, Any]) -> str:
    """The id of the parent's child run called `name` (one per configuration or target), made when it is not there yet."""
    found = find_child(client, parent, name)
    if found is not None:
        return cast(str, found.info.run_id)
    experiment = client.get_run(parent).info.experiment_id
    tags = {
        "mlflow.parentRunId": parent,
        "muscale.kind": "run",
        "muscale.name": name,
        "muscale.role": role,
        "muscale.git_commit": git_commit(),
    }
    run = client.create_run(experiment, run_name=name, tags=tags)
    _log_params(client, run.info.run_id, params)
    return cast(str, run.info.run_id)


class CurveWriter:
    """Buffers a run's points and writes them in batches: `with CurveWriter(client, run_id) as curve: curve.add(point)`."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self._points: list[Any] = []
        self._flushed = time.monotonic()

    def __enter__(self) -> CurveWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, point: Measurement) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = {("final_loss" if point.final else "loss"): point.loss, "train_loss": point.train_loss, "lr": point.lr}
        self._points += [Metric(k, v, now, point.tokens) for k, v in values.items() if math.isfinite(v)]
        if len(self._points) >= FLUSH_POINTS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._points:
            self.client.log_batch(self.run_id, metrics=self._points)
        self._points, self._flushed = [], time.monotonic()


def log_result(
    client: MlflowClient, run_id: str, *, rung: int, tokens: int, loss: float, seconds: float, checkpoint: Path | None
) -> None:
    """The outcome of one rung; NaN loss means diverged."""
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    outcome = {"loss": loss if math.isfinite(loss) else math.nan, "tokens": float(tokens), "seconds": seconds}
    client.log_batch(
        run_id,
        metrics=[Metric(f"rung_{rung}/{k}", v, now, tokens) for k, v in outcome.items()],
        tags=[RunTag(f"rung_{rung}/checkpoint", str(checkpoint))] if checkpoint else [],
    )


def log_stopped(
    client: MlflowClient, run_id: str, *, rung: int, tokens: int, loss: float, mean: float, sd: float, seconds: float
) -> None:
    """That a rung was given up after `tokens`, at this loss (not annealed), with its end forecast as mean and sd."""
    value = {"tokens": tokens, "loss": loss, "mean": mean, "sd": sd, "seconds": seconds}
    client.set_tag(run_id, f"rung_{rung}/stopped", json.dumps(value))


def finish(client: MlflowClient, run_id: str, *, status: str = "FINISHED") -> None:
    """Close a run: FINISHED, FAILED or KILLED; RUNNING opens it again."""
    client.update_run(run_id, status=status) if status == "RUNNING" else client.set_terminated(run_id, status=status)


def log_summary(client: MlflowClient, run_id: str, metrics: Mapping[str, float]) -> None:
    """Figures of the whole study on its parent run: best loss, number of trials, ..."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
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


def read_runs(study: str, *, uri: str | None = None) -> pd.DataFrame:
    """The run table of a study: one row per (configuration or target, rung) that has finished, unchecked.

    A rung that was given up has the tokens and the loss of its last point, excluded as "stopped".
    """
    import pandas as pd

    from scaling.records import read_records

    rows = []
    for run in read_records(study, uri=uri, kind="run"):
        params, metrics, tags = run.params, run.metrics, run.tags
        fixed: dict[str, Any] = {k: float(params[k]) for k in NUMBERS if params.get(k) not in (None, "None")}
        fixed |= {k: params[k] for k in WORDS if k in params}
        fixed |= {"run_id": run.run_id, "name": tags.get("muscale.name"), "role": tags.get("muscale.role", "proxy")}
        for rung in sorted(int(m[1]) for k in metrics if (m := re.fullmatch(r"rung_(\d+)/tokens", k))):
            loss = metrics.get(f"rung_{rung}/loss", math.nan)
            rows.append(
                fixed
                | {
                    "rung": rung,
                    "D": metrics[f"rung_{rung}/tokens"],
                    "loss": loss,
                    "diverged": not math.isfinite(loss),
                    "seconds": metrics.get(f"rung_{rung}/seconds", math.nan),
                    "checkpoint": tags.get(f"rung_{rung}/checkpoint"),
                }
            )
        for rung in sorted(int(m[1]) for k in tags if (m := re.fullmatch(r"rung_(\d+)/stopped", k))):
            at = json.loads(tags[f"rung_{rung}/stopped"])  # its forecast is no measurement and stays there
            given_up = {"D": float(at["tokens"]), "loss": float(at["loss"]), "seconds": float(at["seconds"])}
            rows.append(fixed | given_up | {"rung": rung, "diverged": False, "final": False, "excluded": "stopped"})
    if not rows:
        raise ValueError(f"study {study!r} has no finished run yet: `hpo resume {study}` trains some")
    return pd.DataFrame(rows)


def read_curve(client: MlflowClient, run_id: str, metric: str = "loss") -> tuple[list[float], list[float]]:
    """(tokens, values) of one metric of one run, in order of tokens."""
    points = sorted(client.get_metric_history(run_id, metric), key=lambda p: (p.step, p.timestamp))
    return [float(p.step) for p in points], [float(p.value) for p in points]


def git_commit() -> str:
    """The commit of the current folder, with "+" when files differ from it; "unknown" outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    flat = [Param(k, v if isinstance(v, str) else json.dumps(v)) for k, v in params.items() if v is not None]
    too_long = [p.key for p in flat if len(p.value) > MAX_PARAM]
    if too_long:
        raise ValueError(
            f"parameters {too_long} are longer than MLflow's {MAX_PARAM} characters: log a hash or a file instead"
        )
    for i in range(0, len(flat), 100):
        client.log_batch(run_id, params=flat[i : i + 100])
