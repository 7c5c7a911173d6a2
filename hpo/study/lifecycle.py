"""Create, open, compare and delete a study."""

from __future__ import annotations

import json
import logging
import shutil
import time
import tomllib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from optuna.trial import TrialState

from hpo.storage.leases import BEATS_PER_LEASE, is_alive, is_on_this_host
from hpo.storage.presence import describe_process, list_present, lock_file
from hpo.storage.retry import refuse_storage_errors
from hpo.study.config import StudyConfig, StudyError
from hpo.study.files import StudyFiles
from hpo.study.law_plan import make_law_plan
from hpo.study.mlflow_run import record_target, require_tracking, undo_on_failure
from hpo.study.schema import Workers
from hpo.study.trainer import Trainer
from scaling.common.redact import redact_passwords
from scaling.laws.compute import Fidelity
from scaling.tracking.client import connect
from scaling.tracking.experiment import find_or_create_study_run, forget_study
from scaling.tracking.log import log_file, write_note

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from hpo.search.search import Search

logger = logging.getLogger("muscale.hpo")

# Processes that a message names.
SHOWN_PROCESSES = 4
# By how much a heartbeat of another host may be late.
LATE_SECONDS = 5.0


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
    target = trainer.target(**study.target) if study.target else None
    plan = None
    if search.scheduler == "law":
        plan = make_law_plan(search, study.distributions, study.probes, trainer)
    return Search(
        study.distributions,
        tokens=(search.tokens.min, search.tokens.max),
        eta=search.eta,
        sizes=sizes,
        target=target,
        sampler=search.sampler if plan is None else "random",
        scheduler=search.scheduler,
        plan=plan,
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
    name = files.name
    if present := list_present(files.folder):
        raise ValueError(
            f"study {name!r} is running: {describe_present(present)}. `hpo status {name}` shows how far it is, "
            f"`hpo worker {name}` adds a worker; for another study, copy {files.toml} to a new name"
        )
    if files.settings.exists():
        raise ValueError(
            f"study {name!r} exists in {files.folder}: `hpo resume {name}` continues it, `hpo extend {name}` raises "
            f"its longest run or its iterations. To start from scratch, copy {files.toml} to a new name, or delete "
            f"the study and all its runs with `hpo forget {name}`"
        )
    require_tracking(uri)
    client = connect(uri)
    if client.get_experiment_by_name(files.name) is not None:
        raise ValueError(
            f"MLflow at {redact_passwords(client.tracking_uri)} has a study {name!r}, but its folder {files.folder} is "
            "missing: if it was launched from another folder or machine, continue it there, or copy "
            f"{files.toml} to a new name; if it is of no use any more, `hpo forget {name}` deletes its runs"
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
    # The lock is on the study file, so that of two launches at the same moment one is refused.
    with lock_file(files.toml):
        return _create_study(files, study, trainer, uri, storage)


def _create_study(
    files: StudyFiles, study: StudyConfig, trainer: Trainer, uri: str | None, storage: str | None
) -> Search:
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
    manifest = trainer.manifest()
    with undo_on_failure(client, files):
        files.folder.mkdir(parents=True, exist_ok=True)
        run = find_or_create_study_run(
            client,
            files.name,
            artifacts=files.folder / "artifacts",
            params={f"study.{k}": v for k, v in settings.items()},
        )
        write_note(client, run, "space", searched_ranges)
        record_target(study, trainer)(client, run)
        for path, value in ((files.settings, settings), (files.manifest, manifest)):
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
        ValueError: If a process works on the study, or it was launched in another storage. Nothing is deleted then.
    """
    from hpo.storage.connect import open_storage

    if files.storage.exists() or storage is not None:
        check_storage(files, storage)
    refuse_running(files, storage)
    # Workers that start from now on do not find the study.
    files.settings.unlink(missing_ok=True)
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


def refuse_running(files: StudyFiles, storage: str | None) -> None:
    """Check that no process works on a study, by the locks in its folder and by the heartbeats of its running trials.

    Args:
        files: The study's files.
        storage: The URL of the storage that it was launched in; None for its journal.

    Raises:
        ValueError: If one does. The message names it.
    """
    present = list_present(files.folder)
    if not present and (storage is not None or files.journal.exists()):
        with refuse_storage_errors(storage):
            present = find_live_owners(files, storage)
    if present:
        raise ValueError(
            f"study {files.name!r} is running, and nothing was removed: {describe_present(present)}. "
            f"Stop it first, with Ctrl-C in the launcher's terminal or `kill` and the number of the process on its "
            f"host; then `hpo forget {files.name}` removes it"
        )


def describe_present(present: Sequence[str]) -> str:
    """Return the processes that work on a study for a message, of which the first few are named."""
    more = f" and {len(present) - SHOWN_PROCESSES} more" if len(present) > SHOWN_PROCESSES else ""
    return ", ".join(present[:SHOWN_PROCESSES]) + more


def find_live_owners(files: StudyFiles, storage: str | None) -> list[str]:
    """Return the workers that hold running trials of a study and are alive.

    A worker of this host is alive if its process is. Of other hosts, those are whose heartbeat changes within the time
    between two, for which this waits.

    Args:
        files: The study's files.
        storage: The URL of the storage that it was launched in; None for its journal.
    """
    from hpo.storage.connect import open_storage

    name = files.name
    try:
        opened, _ = open_storage(storage or str(files.journal), None, name)
    except ValueError:
        if storage is not None:
            raise
        # A journal that nobody can read has no worker.
        return []
    ids = {study.study_name: study._study_id for study in opened.get_all_studies()}
    if name not in ids:
        return []

    def read_beats() -> dict[str, list[tuple[int, Any]]]:
        beats: dict[str, list[tuple[int, Any]]] = {}
        for trial in opened.get_all_trials(ids[name], deepcopy=False, states=(TrialState.RUNNING,)):
            owner = str(trial.user_attrs.get("worker") or "")
            if owner and is_alive(owner):
                beats.setdefault(owner, []).append((trial.number, trial.user_attrs.get("beat")))
        return beats

    before = read_beats()
    elsewhere = {owner for owner in before if not is_on_this_host(owner)}
    if not elsewhere or len(elsewhere) < len(before):
        return [f"worker ({describe_process(owner)})" for owner in before if owner not in elsewhere]
    logger.info("trials are running on other hosts: waiting for a heartbeat of their workers")
    deadline = time.monotonic() + _read_lease(files) / BEATS_PER_LEASE + LATE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1.0)
        now = read_beats()
        moved = [owner for owner in elsewhere if now.get(owner, before[owner]) != before[owner]]
        if moved:
            return [f"worker ({describe_process(owner)})" for owner in moved]
    return []


def _read_lease(files: StudyFiles) -> float:
    """Return the length of the leases of a study's workers, in seconds; the default one if its file cannot be read."""
    try:
        return StudyConfig.model_validate(tomllib.loads(files.toml.read_text(encoding="utf-8"))).workers.lease
    except ValueError:
        return Workers().lease


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
    """Check that a study's file says what it said at launch. Workers, target and budget may change, iterations rise.

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
        if change.name.split(".")[0] not in ("workers", "target") and not _is_allowed(change)
    ]
    if problems:
        raise StudyError(
            f"{files.toml} has changed since the study was launched; restore it, or copy it to a new name", problems
        )


def _is_allowed(change: SettingChange) -> bool:
    """Return whether a setting of a launched study may change as it has: a new budget, or more iterations."""
    if change.name == "search.iterations" and isinstance(change.old, int) and isinstance(change.new, int):
        return change.new > change.old
    return change.name == "search.budget" and None not in (change.old, change.new)


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
