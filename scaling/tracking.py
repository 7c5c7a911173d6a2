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
import posixpath
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock

from scaling.runs import Measurement
from scaling.secrets import without_passwords

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

MAX_PARAM = 6000  # MLflow's limit on a parameter's length
MAX_PARAMS = 100  # per request, likewise
MAX_TAG = 8000
NAMES = "letters, digits, spaces and _ - : . / will do, at most 250, if it would not lead elsewhere as a path"

RETRIES, REQUEST = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
_changing = threading.Lock()  # of the environment, by the impatient
_impatient: list[None] = []  # one for each that is inside
_before: dict[str, str | None] = {}

NUMBERS = ("N", "D", "lr", "batch_tokens", "seq_len", "d_model", "N_total", "N_nonembedding")
WORDS = ("parametrization", "data_sha256", "arm")


def default_uri() -> str:
    """MLFLOW_TRACKING_URI when it is set, else mlflow.db in the current folder (the project's root)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"


def connect(uri: str | None = None) -> MlflowClient:
    """A client of the store at `uri`, which is created and migrated first, by one process at a time."""
    import logging

    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for data
    for name in ("mlflow", "alembic"):  # each start of a fresh store would print a page of migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = uri or default_uri()
    if uri.startswith("sqlite:///"):
        # Several processes that open a fresh file at once all fail, so the first to come makes it while the others wait.
        path = Path(uri.removeprefix("sqlite:///")).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            path.touch()  # SQLite itself would let no group write to it, whatever the umask says
            client = MlflowClient(f"sqlite:///{path}")
            client.search_experiments(max_results=1)
            return client
    return MlflowClient(uri)


def load() -> None:
    """Import MLflow, which takes seconds, before a clock that should not count them."""
    import mlflow  # noqa: F401


def away(uri: str | None = None) -> str | None:
    """Why the store does not answer, in a line; None when it does."""
    try:
        with impatient():
            connect(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow's, requests', SQLAlchemy's, the file system's: all of them mean the same here
        said = without_passwords(error).splitlines()
        return f"{type(error).__name__}: {said[0][:200] if said else 'no reason given'}"
    return None


def experiment_id(client: MlflowClient, study: str) -> str:
    """The study's experiment; a ValueError names the nearest studies when there is none."""
    found = client.get_experiment_by_name(study)
    if found is None:
        names = [e.name for e in client.search_experiments() if e.name != "Default"]
        near = difflib.get_close_matches(study, names, n=3, cutoff=0.3) or sorted(names)[:5]
        known = f"known studies: {', '.join(near)}" if near else "the store is empty: launch a study first"
        raise ValueError(f"no study {study!r} in MLflow at {without_passwords(client.tracking_uri)}; {known}")
    return cast(str, found.experiment_id)


# Seen before, since every run of a study begins by asking for them: (store, experiment, its time of creation) -> its study run;
# (store, run) -> its experiment. Neither changes: a study that is launched again is another experiment, and so is one of
# the same number in a store that was made anew.
_study_runs: dict[tuple[str, str, int | None], str] = {}
_experiments: dict[tuple[str, str], str] = {}


def study_run(
    client: MlflowClient, study: str, *, artifacts: Path | None = None, params: Mapping[str, Any] = {}
) -> str:
    """The id of the study's parent run, which is made with `params` (and its experiment, too) when it is not there yet."""
    found = client.get_experiment_by_name(study)
    if found is None:
        client.create_experiment(study, artifact_location=artifacts.resolve().as_uri() if artifacts else None)
        found = client.get_experiment_by_name(study)
    experiment = found.experiment_id
    known = client.tracking_uri, experiment, found.creation_time
    if known in _study_runs:
        return _study_runs[known]
    parents = client.search_runs([experiment], filter_string="tags.`muscale.kind` = 'study'", max_results=1)
    if parents:
        _study_runs[known] = parents[0].info.run_id
        return _study_runs[known]
    tags = {"muscale.kind": "study", "muscale.git_commit": git_commit()}
    run = client.create_run(experiment, run_name=study, tags=tags)
    log_records(client, run.info.run_id, [], {}, flat_params(params))
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
    return next(iter(_children(client, parent, name)), None)


def child_run(client: MlflowClient, parent: str, name: str, *, role: str, params: Mapping[str, Any]) -> str:
    """The id of the parent's child run called `name` (one per configuration or target), made when it is not there yet.

    One that is there gets the parameters that it lacks: whoever made it may have been cut off before they were written.
    """
    run, missing = child_lacking(client, parent, name, role, flat_params(params))
    log_records(client, run, [], {}, missing)
    return run


def child_lacking(
    client: MlflowClient,
    parent: str,
    name: str,
    role: str,
    params: Mapping[str, str],
    *,
    commit: str | None = None,
    began: int | None = None,
    reopen: bool = False,
) -> tuple[str, dict[str, str]]:
    """As child_run, but the parameters that it lacks are left to the caller, who can send them with the first records.

    commit, began (ms since the epoch): of a run that began before MLflow could be told; default: now. reopen: also one that
    has ended is running again.
    """
    found = find_child(client, parent, name)
    if found is not None:
        if reopen and found.info.status != "RUNNING":
            finish(client, found.info.run_id, status="RUNNING")
        return found.info.run_id, {k: v for k, v in params.items() if k not in found.data.params}
    experiment = _experiment_of(client, parent)
    tags = {
        "mlflow.parentRunId": parent,
        "muscale.kind": "run",
        "muscale.name": name,
        "muscale.role": role,
        "muscale.git_commit": commit or git_commit(),
    }
    run = client.create_run(experiment, run_name=name, tags=tags, start_time=began)
    return run.info.run_id, dict(params)


def drop_twins(client: MlflowClient, parent: str, run_id: str) -> None:
    """Delete empty runs with the name of this one: a server's late answer to a request that was given up and made again."""
    for run in _children(client, parent, client.get_run(run_id).data.tags["muscale.name"]):
        if run.info.run_id != run_id and not run.data.metrics:
            client.delete_run(run.info.run_id)


def _experiment_of(client: MlflowClient, run_id: str) -> str:
    known = client.tracking_uri, run_id
    if known not in _experiments:
        _experiments[known] = client.get_run(run_id).info.experiment_id
    return _experiments[known]


def _children(client: MlflowClient, parent: str, name: str) -> list[Any]:
    """Runs of this name, those that hold something first, then by age."""
    experiment = _experiment_of(client, parent)
    mine = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`muscale.name` = '{name}'"
    found = client.search_runs([experiment], filter_string=mine)
    return sorted(found, key=lambda run: (not run.data.metrics, run.info.start_time, run.info.run_id))


@contextmanager
def impatient(seconds: float = 10.0) -> Iterator[None]:
    """MLflow's own retries (for minutes, and also of requests that make things) off, its timeout short unless it was set.

    MLflow reads both from the environment at every call, so that calls of other threads are impatient meanwhile, too.
    """
    with _changing:
        if not _impatient:
            _before.update({name: os.environ.get(name) for name in (RETRIES, REQUEST)})
            os.environ[RETRIES] = "0"
            os.environ.setdefault(REQUEST, str(round(seconds)))
        _impatient.append(None)
    try:
        yield
    finally:
        with _changing:
            _impatient.pop()
            if not _impatient:
                for name, value in _before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


def refused(error: Exception) -> bool:
    """Whether MLflow will never take this: not away, not busy, not the wrong address, but told something that it cannot keep."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


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


def finish(client: MlflowClient, run_id: str, *, status: str = "FINISHED", at: int | None = None) -> None:
    """Close a run: FINISHED, FAILED or KILLED, at that time (ms; default: now); RUNNING opens it again."""
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status=status, end_time=at)


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


def read_curve(
    client: MlflowClient, run_id: str, metric: str = "loss", *, since: int = 0
) -> tuple[list[float], list[float]]:
    """(tokens, values) of one metric of one run, in order of tokens; only what was logged at `since` (ms) or later."""
    points = [p for p in client.get_metric_history(run_id, metric) if p.timestamp >= since]
    points.sort(key=lambda p: (p.step, p.timestamp))
    return [float(p.step) for p in points], [float(p.value) for p in points]


def git_commit() -> str:
    """The commit of the current folder, with "+" when files differ from it; "unknown" outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
