"""The one door to MLflow, which keeps the record: every run, curve and setting.

One experiment per study. In it one parent run for the study, one child run per configuration, and one child run per launched
target. A child's curve is its metrics `loss`, `train_loss` and `lr` with tokens as the step; each finished rung k adds the
metrics `rung_k/loss`, `rung_k/tokens`, `rung_k/seconds` and the tag `rung_k/checkpoint`, one that was given up the tag
`rung_k/stopped`, so that one query reads the run table without any metric history. MLflow keeps every parameter as a string; types are restored here and nowhere else.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scaling.tracking.client import experiment_id
from scaling.tracking.log import flat_params, log_records

if TYPE_CHECKING:
    from mlflow import MlflowClient


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


def finish(client: MlflowClient, run_id: str, *, status: str = "FINISHED", at: int | None = None) -> None:
    """Close a run: FINISHED, FAILED or KILLED, at that time (ms; default: now); RUNNING opens it again."""
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status=status, end_time=at)


def git_commit() -> str:
    """The commit of the current folder, with "+" when files differ from it; "unknown" outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
