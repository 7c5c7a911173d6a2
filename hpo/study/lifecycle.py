"""Create, open, compare and forget a study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hpo.storage.retry import answering
from hpo.study.config import StudyConfig, StudyError
from hpo.study.files import StudyFiles
from hpo.study.mlflow_run import refuse_away, target_of
from hpo.study.trainer import Trainer
from scaling.common.redact import without_passwords
from scaling.laws.compute import Fidelity
from scaling.tracking.client import connect
from scaling.tracking.experiment import forget_study, study_run
from scaling.tracking.log import log_file, write_note

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from hpo.search.search import Search


def open_search(
    study: StudyConfig, trainer: Trainer, storage: str | None, name: str | None = None, *, lease: float | None = None
) -> Search:
    """The study's search, in a storage; in memory without one."""
    import optuna

    from hpo.search.search import Search

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # our own lines say which trial ended
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
        resumable=resumable(trainer),
        storage=storage,
        name=name,
        seed=study.seed,
        lease=lease,
    )


def resumable(trainer: Trainer) -> bool:
    """Whether promotions go on from checkpoints: so unless the trainer says that it cannot."""
    return bool(getattr(trainer, "resumable", True))


def open_existing(files: StudyFiles, study: StudyConfig, trainer: Trainer, *, storage: str | None = None) -> Search:
    """The search of a study that was launched. StudyError when the file has changed since, ValueError when it is not in this storage."""
    check_same_settings(files, study)
    with answering(storage):
        check_storage(files, storage)
        return open_search(study, trainer, storage or str(files.journal), files.name, lease=study.workers.lease)


def check_storage(files: StudyFiles, storage: str | None) -> None:
    """ValueError when a study was launched elsewhere than in this storage (None: its journal)."""
    there = files.storage.read_text().strip() if files.storage.exists() else None
    if there and storage is None:
        raise ValueError(
            f"study {files.name!r} was launched in {there}: needed that as --storage, or $MUSCALE_STORAGE, got none"
        )
    if storage is not None and there is None:
        raise ValueError(
            f"study {files.name!r} was launched in {files.journal}: leave --storage and $MUSCALE_STORAGE out"
        )
    if storage is not None and files.name not in studies_in(storage):
        raise ValueError(
            f"study {files.name!r} was launched in {there}, and {without_passwords(storage)} has none of that name: needed the "
            "same storage"
        )


def studies_in(storage: str) -> set[str]:
    """The names of the studies that a storage has."""
    from hpo.storage.connect import open_storage

    opened, _ = open_storage(storage, None, "")
    return {study.study_name for study in opened.get_all_studies()}


def refuse_existing(files: StudyFiles, *, uri: str | None) -> MlflowClient:
    """The store's client, or a ValueError when it or the disk already has a study of this name."""
    afresh = f"to start afresh, `hpo forget {files.name}` removes it, or copy {files.toml} to a new name"
    if files.settings.exists():
        raise ValueError(
            f"study {files.name!r} exists in {files.folder}: `hpo resume {files.name}` goes on with it, "
            f"`hpo extend {files.name} --max-tokens ...` raises its budget; {afresh}"
        )
    refuse_away(uri)
    client = connect(uri)
    if client.get_experiment_by_name(files.name) is not None:
        raise ValueError(
            f"MLflow at {without_passwords(client.tracking_uri)} has a study {files.name!r} whose {files.folder} is gone: {afresh}"
        )
    return client


def create(
    files: StudyFiles, study: StudyConfig, trainer: Trainer, *, uri: str | None, storage: str | None = None
) -> Search:
    """Make the study's folder, its Optuna study and its MLflow run. ValueError when it exists."""
    client = refuse_existing(files, uri=uri)
    search = None
    if storage:
        search = open_search(study, trainer, storage, files.name, lease=study.workers.lease)
        if search.study.get_trials(deepcopy=False):
            raise ValueError(
                f"{without_passwords(storage)} has a study {files.name!r} already, which was launched elsewhere: share that one's folder and use "
                "`hpo worker`, or choose another name"
            )
    settings = study.model_dump(mode="json")
    ranges = searched_ranges(study, trainer)
    files.folder.mkdir(parents=True, exist_ok=True)
    run = study_run(
        client, files.name, artifacts=files.folder / "artifacts", params={f"study.{k}": v for k, v in settings.items()}
    )
    write_note(client, run, "space", ranges)
    target_of(study, trainer)(client, run)
    for path, value in ((files.settings, settings), (files.manifest, trainer.manifest())):
        path.write_text(json.dumps(value, indent=1) + "\n")
        log_file(client, run, path)
    if storage:
        files.storage.write_text(without_passwords(storage) + "\n")
    return search or open_search(study, trainer, str(files.journal), files.name, lease=study.workers.lease)


def forget(files: StudyFiles, *, uri: str | None, storage: str | None = None) -> bool:
    """Remove all that a study made: its folder, its runs from MLflow, and where it is kept, itself. False when there was nothing."""
    from hpo.storage.connect import open_storage

    if files.storage.exists() or storage is not None:
        check_storage(files, storage)
    if storage is not None:
        opened, _ = open_storage(storage, None, files.name)
        for study in opened.get_all_studies():
            if study.study_name in (files.name, f"{files.name}.lock"):
                opened.delete_study(study._study_id)
    gone = forget_study(connect(uri), files.name)
    if files.folder.is_dir():
        shutil.rmtree(files.folder)
        return True
    return gone


def searched_ranges(study: StudyConfig, trainer: Trainer) -> dict[str, list[float]]:
    """The searched ranges of lr and batch_tokens, in the run table's terms, for the recommendation's edge warning."""
    smallest = Fidelity(min(trainer.sizes), study.search.tokens.min)
    low, _, high = (trainer.describe(probe, smallest) for probe in study.probes)
    names = [n for n in ("lr", "batch_tokens") if n in low and n in high and low[n] < high[n]]
    return {n: [float(low[n]), float(high[n])] for n in names}


def check_same_settings(files: StudyFiles, study: StudyConfig) -> None:
    """StudyError that lists what the file says otherwise than it did at launch (workers, target and budget may change)."""
    if not files.settings.exists():
        raise ValueError(f"study {files.name!r} has not been launched: `hpo launch {files.toml}` starts it")
    # read by the model, so that a study launched before a setting existed has its default
    try:
        then = StudyConfig.model_validate_json(files.settings.read_bytes()).model_dump(mode="json")
    except ValueError as error:
        raise ValueError(f"{files.settings} is not what `hpo launch` wrote: restore it ({error})") from error
    now = study.model_dump(mode="json")
    problems = [
        f"{where}: launched with {json.dumps(old)}, the file now says {json.dumps(new)}"
        for where, old, new in differences(then, now)
        if where.split(".")[0] not in ("workers", "target") and where != "search.budget"
    ]
    if problems:
        raise StudyError(
            f"{files.toml} has changed since the study was launched; restore it, or copy it to a new name", problems
        )


def differences(then: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every leaf in which two JSON values differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif then != now:
        yield where, then, now
