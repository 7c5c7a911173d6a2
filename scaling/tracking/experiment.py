"""Experiments and runs in MLflow, which keeps the record of every run, curve and setting.

There is one experiment per study. It holds one parent run for the study, one child run per configuration, and one child
run per launched target. The curve of a child run is its metrics `loss`, `train_loss` and `lr`, with tokens as the step.
Each finished rung k adds the metrics `rung_k/loss`, `rung_k/tokens` and `rung_k/seconds` and the tag
`rung_k/checkpoint`; a rung that was stopped early adds the tag `rung_k/stopped`. So one query reads the run table
without any metric history. MLflow stores every parameter as text; `scaling.runs.from_mlflow` restores the types.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scaling.tracking.client import find_experiment_id
from scaling.tracking.log import log_records, serialize_params

if TYPE_CHECKING:
    from mlflow import MlflowClient


# Caches, because every run of a study begins by asking for both:
# (store, experiment, creation time of the experiment) -> id of its study run, and (store, run) -> its experiment.
# Neither changes: a study that is launched again is another experiment, and the creation time tells apart experiments
# with the same number in a store that was deleted and created again.
_study_runs: dict[tuple[str, str, int | None], str] = {}
_experiment_ids: dict[tuple[str, str], str] = {}


def find_or_create_study_run(
    client: MlflowClient, study: str, *, artifacts: Path | None = None, params: Mapping[str, Any] = {}
) -> str:
    """Return the id of a study's parent run, creating the run and its experiment if they do not exist.

    Args:
        client: The MLflow client.
        study: The study's name.
        artifacts: The folder for the artifacts of a new experiment; by default MLflow's own choice.
        params: Parameters of a new run.

    Returns:
        MLflow's run id.
    """
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        client.create_experiment(study, artifact_location=artifacts.resolve().as_uri() if artifacts else None)
        experiment = client.get_experiment_by_name(study)
    key = client.tracking_uri, experiment.experiment_id, experiment.creation_time
    if key in _study_runs:
        return _study_runs[key]
    query = "tags.`muscale.kind` = 'study'"
    parents = client.search_runs([experiment.experiment_id], filter_string=query, max_results=1)
    if parents:
        _study_runs[key] = parents[0].info.run_id
        return _study_runs[key]
    tags = {"muscale.kind": "study", "muscale.git_commit": read_git_commit()}
    run = client.create_run(experiment.experiment_id, run_name=study, tags=tags)
    log_records(client, run.info.run_id, [], {}, serialize_params(params))
    return cast(str, run.info.run_id)


def find_study_run(client: MlflowClient, study: str) -> str:
    """Return the id of the parent run of an existing study.

    Args:
        client: The MLflow client.
        study: The study's name.

    Returns:
        MLflow's run id.

    Raises:
        ValueError: If there is no such experiment, or if it was not created by `hpo launch`.
    """
    experiment = find_experiment_id(client, study)
    parents = client.search_runs([experiment], filter_string="tags.`muscale.kind` = 'study'", max_results=1)
    if not parents:
        raise ValueError(
            f"experiment {study!r} has no study run: it was not made by `hpo launch`; launch a study of that name"
        )
    return cast(str, parents[0].info.run_id)


def forget_study(client: MlflowClient, study: str) -> bool:
    """Delete the experiment of a study and free its name.

    The experiment is renamed first, because MLflow reserves the names of deleted experiments.

    Args:
        client: The MLflow client.
        study: The study's name.

    Returns:
        Whether there was such an experiment.
    """
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        return False
    client.rename_experiment(experiment.experiment_id, f"{study} (forgotten {time.time_ns()})")
    client.delete_experiment(experiment.experiment_id)
    return True


def find_child(client: MlflowClient, parent: str, name: str) -> Any:
    """Return the MLflow run named `name` among the children of `parent`, or None."""
    return next(iter(_find_children(client, parent, name)), None)


def find_or_create_child_run(
    client: MlflowClient, parent: str, name: str, *, role: str, params: Mapping[str, Any]
) -> str:
    """Return the id of a child run, creating the run if it does not exist.

    An existing run gets the parameters that it lacks, because its creator may have been killed before writing them.

    Args:
        client: The MLflow client.
        parent: The id of the study's parent run.
        name: The name of the configuration or target.
        role: "proxy", "confirm" or "target".
        params: The settings of the run.

    Returns:
        MLflow's run id.
    """
    run_id, missing = prepare_child_run(client, parent, name, role, serialize_params(params))
    log_records(client, run_id, [], {}, missing)
    return run_id


def prepare_child_run(
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
    """Return the id of a child run and the parameters that it lacks, creating the run if it does not exist.

    Unlike `find_or_create_child_run`, this writes no parameters: the caller can send them together with the first
    records.

    Args:
        client: The MLflow client.
        parent: The id of the study's parent run.
        name: The name of the configuration or target.
        role: "proxy", "confirm" or "target".
        params: The settings of the run, as `serialize_params` returns them.
        commit: The git commit of a run that began before MLflow could be reached; by default the current one.
        began: When that run began, in milliseconds since the epoch; by default now.
        reopen: Whether a run that has ended is set to RUNNING again.

    Returns:
        MLflow's run id, and the parameters that the run lacks.
    """
    run = find_child(client, parent, name)
    if run is not None:
        if reopen and run.info.status != "RUNNING":
            set_run_status(client, run.info.run_id, status="RUNNING")
        return run.info.run_id, {k: v for k, v in params.items() if k not in run.data.params}
    tags = {
        "mlflow.parentRunId": parent,
        "muscale.kind": "run",
        "muscale.name": name,
        "muscale.role": role,
        "muscale.git_commit": commit or read_git_commit(),
    }
    run = client.create_run(_get_experiment_id(client, parent), run_name=name, tags=tags, start_time=began)
    return run.info.run_id, dict(params)


def delete_empty_duplicates(client: MlflowClient, parent: str, run_id: str) -> None:
    """Delete the other child runs with the name of this one that hold no metrics.

    A server creates such runs when it answers late to a request that timed out and was sent again.
    """
    for run in _find_children(client, parent, client.get_run(run_id).data.tags["muscale.name"]):
        if run.info.run_id != run_id and not run.data.metrics:
            client.delete_run(run.info.run_id)


def _get_experiment_id(client: MlflowClient, run_id: str) -> str:
    """Return the id of the experiment that a run belongs to."""
    key = client.tracking_uri, run_id
    if key not in _experiment_ids:
        _experiment_ids[key] = client.get_run(run_id).info.experiment_id
    return _experiment_ids[key]


def _find_children(client: MlflowClient, parent: str, name: str) -> list[Any]:
    """Return the child runs of this name: those with metrics first, then by age."""
    query = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`muscale.name` = '{name}'"
    runs = client.search_runs([_get_experiment_id(client, parent)], filter_string=query)
    return sorted(runs, key=lambda run: (not run.data.metrics, run.info.start_time, run.info.run_id))


def set_run_status(client: MlflowClient, run_id: str, *, status: str = "FINISHED", at: int | None = None) -> None:
    """Close a run, or open it again.

    Args:
        client: The MLflow client.
        run_id: MLflow's run id.
        status: "FINISHED", "FAILED" or "KILLED" closes the run, "RUNNING" opens it again.
        at: When it ended, in milliseconds since the epoch; by default now.
    """
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status=status, end_time=at)


def read_git_commit() -> str:
    """Return the git commit, with "+" if tracked files differ from it, or "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
