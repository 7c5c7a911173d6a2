"""Create, open, compare and delete a study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from hpo.storage.retry import refuse_storage_errors
from hpo.study.config import StudyConfig, StudyError
from hpo.study.files import StudyFiles
from hpo.study.mlflow_run import record_target, require_tracking
from hpo.study.trainer import Trainer
from scaling.common.redact import redact_passwords
from scaling.laws.compute import Fidelity
from scaling.tracking.client import connect
from scaling.tracking.experiment import find_or_create_study_run, forget_study
from scaling.tracking.log import log_file, write_note

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from hpo.search.search import Search


def open_search(
    study: StudyConfig, trainer: Trainer, storage: str | None, name: str | None = None, *, lease: float | None = None
) -> Search:
    """Return the search that a study describes.

    Args:
        study: The study.
        trainer: The study's trainer, which gives the proxy sizes and the target.
        storage: A journal's path or a storage's URL; None for memory.
        name: Name of the Optuna study.
        lease: Seconds without a heartbeat after which another worker takes over a run; None: never.

    Returns:
        The search.

    Raises:
        ValueError: If the storage cannot be opened, or holds a study of that name with other settings.
    """
    import optuna

    from hpo.search.search import Search

    # The launcher logs each finished trial itself.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, sizes = study.search, trainer.sizes
    return Search(
        study.distributions,
        tokens=(search.tokens.min, search.tokens.max),
        eta=search.eta,
        sizes=sizes,
        target=trainer.target(**study.target) if study.target else None,
        sampler=search.sampler,
        scheduler=search.scheduler,
        variant=search.variant,
        iterations=search.iterations,
        budget=search.budget * Fidelity(max(sizes), search.tokens.max).C if search.budget else None,
        seeds=search.seeds,
        promote=search.promote,
        asynchronous=search.asynchronous,
        belief={name: table.law for name, table in study.belief.items()},
        resumable=can_resume(trainer),
        storage=storage,
        name=name,
        seed=study.seed,
        lease=lease,
    )


def can_resume(trainer: Trainer) -> bool:
    """Return whether a trainer's promotions continue from checkpoints: yes, unless it has `resumable` = False."""
    return bool(getattr(trainer, "resumable", True))


def open_existing(files: StudyFiles, study: StudyConfig, trainer: Trainer, *, storage: str | None = None) -> Search:
    """Return the search of a study that has been launched.

    Args:
        files: The study's files.
        study: The study, as its file says now.
        trainer: The study's trainer.
        storage: The URL of the storage that it was launched in; None for its journal.

    Returns:
        The search, whose workers hold leases.

    Raises:
        StudyError: If the file has changed since the launch.
        ValueError: If the study has not been launched, is not in this storage, or the storage does not answer.
    """
    check_same_settings(files, study)
    with refuse_storage_errors(storage):
        check_storage(files, storage)
        return open_search(study, trainer, storage or str(files.journal), files.name, lease=study.workers.lease)


def check_storage(files: StudyFiles, storage: str | None) -> None:
    """Check that a study was launched in a storage.

    Args:
        files: The study's files.
        storage: The storage's URL; None for the study's journal.

    Raises:
        ValueError: If it was launched in another one. The message names that one.
    """
    recorded = files.storage.read_text().strip() if files.storage.exists() else None
    if recorded and storage is None:
        raise ValueError(
            f"study {files.name!r} was launched in {recorded}: needed that as --storage, or $MUSCALE_STORAGE, got none"
        )
    if storage is not None and recorded is None:
        raise ValueError(
            f"study {files.name!r} was launched in {files.journal}: leave --storage and $MUSCALE_STORAGE out"
        )
    if storage is not None and files.name not in list_studies(storage):
        raise ValueError(
            f"study {files.name!r} was launched in {recorded}, and {redact_passwords(storage)} has none of that name: "
            "needed the same storage"
        )


def list_studies(storage: str) -> set[str]:
    """Return the names of the studies in a storage."""
    from hpo.storage.connect import open_storage

    opened, _ = open_storage(storage, None, "")
    return {study.study_name for study in opened.get_all_studies()}


def refuse_existing(files: StudyFiles, *, uri: str | None) -> MlflowClient:
    """Check that neither the disk nor MLflow already has a study of this name.

    Args:
        files: The study's files.
        uri: The MLflow store; None for the default one.

    Returns:
        A client of the MLflow store.

    Raises:
        ValueError: If one of them has, or MLflow does not answer. The message says how to continue or to start over.
    """
    remedy = f"to start from scratch, `hpo forget {files.name}` removes it, or copy {files.toml} to a new name"
    if files.settings.exists():
        raise ValueError(
            f"study {files.name!r} exists in {files.folder}: `hpo resume {files.name}` continues it, "
            f"`hpo extend {files.name} --max-tokens ...` raises its budget; {remedy}"
        )
    require_tracking(uri)
    client = connect(uri)
    if client.get_experiment_by_name(files.name) is not None:
        raise ValueError(
            f"MLflow at {redact_passwords(client.tracking_uri)} has a study {files.name!r}, but its folder "
            f"{files.folder} is missing: {remedy}"
        )
    return client


def create_study(
    files: StudyFiles, study: StudyConfig, trainer: Trainer, *, uri: str | None, storage: str | None = None
) -> Search:
    """Create a study's folder, its Optuna study and its MLflow run.

    Args:
        files: The study's files.
        study: The study.
        trainer: The study's trainer.
        uri: The MLflow store; None for the default one.
        storage: The URL of the storage to keep it in; None for a journal in its folder.

    Returns:
        The study's search.

    Raises:
        ValueError: If the study exists already, or MLflow or the storage does not answer.
    """
    client = refuse_existing(files, uri=uri)
    search = None
    if storage:
        search = open_search(study, trainer, storage, files.name, lease=study.workers.lease)
        if search.study.get_trials(deepcopy=False):
            raise ValueError(
                f"{redact_passwords(storage)} already has a study {files.name!r}, which was launched from another "
                "folder: share that folder and use `hpo worker`, or choose another name"
            )
    settings = study.model_dump(mode="json")
    searched_ranges = compute_searched_ranges(study, trainer)
    files.folder.mkdir(parents=True, exist_ok=True)
    run = find_or_create_study_run(
        client, files.name, artifacts=files.folder / "artifacts", params={f"study.{k}": v for k, v in settings.items()}
    )
    write_note(client, run, "space", searched_ranges)
    record_target(study, trainer)(client, run)
    for path, value in ((files.settings, settings), (files.manifest, trainer.manifest())):
        path.write_text(json.dumps(value, indent=1) + "\n")
        log_file(client, run, path)
    if storage:
        files.storage.write_text(redact_passwords(storage) + "\n")
    return search or open_search(study, trainer, str(files.journal), files.name, lease=study.workers.lease)


def delete_study(files: StudyFiles, *, uri: str | None, storage: str | None = None) -> bool:
    """Delete everything that a study created: its folder, its experiment in MLflow, and itself in the storage.

    Args:
        files: The study's files. The .toml is kept.
        uri: The MLflow store; None for the default one.
        storage: The URL of the storage that it was launched in; None for its journal.

    Returns:
        Whether there was anything to delete.

    Raises:
        ValueError: If the study was launched in another storage.
    """
    from hpo.storage.connect import open_storage

    if files.storage.exists() or storage is not None:
        check_storage(files, storage)
    if storage is not None:
        opened, _ = open_storage(storage, None, files.name)
        for study in opened.get_all_studies():
            if study.study_name in (files.name, f"{files.name}.lock"):
                opened.delete_study(study._study_id)
    was_in_mlflow = forget_study(connect(uri), files.name)
    if files.folder.is_dir():
        shutil.rmtree(files.folder)
        return True
    return was_in_mlflow


def compute_searched_ranges(study: StudyConfig, trainer: Trainer) -> dict[str, list[float]]:
    """Return the searched ranges of `lr` and `batch_tokens`, for the warning that a recommendation is at an edge.

    Args:
        study: The study.
        trainer: The study's trainer, which translates its parameters into the run table's columns.

    Returns:
        [low, high] by column, only of those that are searched.
    """
    smallest = Fidelity(min(trainer.sizes), study.search.tokens.min)
    low, _, high = (trainer.describe(probe, smallest) for probe in study.probes)
    names = [n for n in ("lr", "batch_tokens") if n in low and n in high and low[n] < high[n]]
    return {n: [float(low[n]), float(high[n])] for n in names}


class SettingChange(NamedTuple):
    """A setting that differs between two versions of a study.

    Attributes:
        name: The setting's dotted name, such as "space.lr.low".
        old: Its earlier value; None if it had none.
        new: Its present value; None if it has none.
    """

    name: str
    old: Any
    new: Any


def check_same_settings(files: StudyFiles, study: StudyConfig) -> None:
    """Check that a study's file says what it said at launch. Workers, target and budget may change.

    Args:
        files: The study's files.
        study: The study, as its file says now.

    Raises:
        StudyError: If it has changed. It lists every changed setting.
        ValueError: If the study has not been launched, or its recorded settings are damaged.
    """
    if not files.settings.exists():
        raise ValueError(f"study {files.name!r} has not been launched: `hpo launch {files.toml}` starts it")
    # The model reads the recorded settings, so that a setting that is newer than the study gets its default.
    try:
        launched = StudyConfig.model_validate_json(files.settings.read_bytes()).model_dump(mode="json")
    except ValueError as error:
        raise ValueError(f"{files.settings} is not what `hpo launch` wrote: restore it ({error})") from error
    problems = [
        f"{change.name}: launched with {json.dumps(change.old)}, the file now says {json.dumps(change.new)}"
        for change in find_differences(launched, study.model_dump(mode="json"))
        if change.name.split(".")[0] not in ("workers", "target") and change.name != "search.budget"
    ]
    if problems:
        raise StudyError(
            f"{files.toml} has changed since the study was launched; restore it, or copy it to a new name", problems
        )


def find_differences(old: Any, new: Any, where: str = "") -> Iterator[SettingChange]:
    """Yield every leaf in which two JSON values differ.

    Args:
        old: The earlier value, of nested dictionaries.
        new: The present one.
        where: The dotted name of both within a larger value.

    Yields:
        The changes, in alphabetical order of their names.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from find_differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield SettingChange(where, old, new)
