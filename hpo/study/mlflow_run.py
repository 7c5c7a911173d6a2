"""A study's own run in MLflow: its target, status and figures. While MLflow is down, the next resume sends them."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hpo.storage.trial_attributes import is_diverged, is_search_trial, read_stopped
from hpo.study.answer import choose_answer
from hpo.study.config import StudyConfig
from hpo.study.files import StudyFiles
from hpo.study.trainer import Trainer
from scaling.common.redact import redact_passwords
from scaling.tracking.client import connect, default_uri, describe_outage, fail_fast
from scaling.tracking.experiment import find_study_run, forget_study, set_run_status
from scaling.tracking.log import log_summary, write_note
from scaling.tracking.spool import summarize_error

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from optuna.trial import FrozenTrial

    from hpo.search.search import Search

logger = logging.getLogger("muscale.hpo")

# A change to a study's run, given a client and the run's id.
RunUpdate = Callable[["MlflowClient", str], None]


def require_tracking(uri: str | None) -> None:
    """Check that MLflow answers, before anything is created that it would have to record.

    Raises:
        ValueError: If it does not.
    """
    if outage := describe_outage(uri):
        where = redact_passwords(uri or default_uri())
        raise ValueError(
            f"MLflow at {where} does not answer ({outage}): start it or correct the address; nothing was created"
        )


@contextmanager
def undo_on_failure(client: MlflowClient, files: StudyFiles) -> Iterator[None]:
    """Remove what the block has created of a new study if it fails, so that the same command can be run again.

    Args:
        client: The MLflow client.
        files: The study's files. A folder that existed before keeps what others have put there.

    Raises:
        ValueError: Instead of an error of MLflow, of its store or of the file system.
    """
    existed = files.folder.exists()
    try:
        yield
    except BaseException as error:
        if not existed:
            shutil.rmtree(files.folder, ignore_errors=True)
        for path in (files.settings, files.manifest, files.storage):
            path.unlink(missing_ok=True)
        try:
            forget_study(client, files.name)
        # The store may fail for the same reason; what is left there is then named.
        except Exception as other:
            logger.warning(
                f"experiment {files.name!r} may be left in MLflow ({summarize_error(other)}): "
                f"`hpo forget {files.name}` removes it"
            )
        if isinstance(error, ValueError) or not isinstance(error, Exception):
            raise
        raise ValueError(
            f"study {files.name!r} could not be created ({type(error).__name__}: {summarize_error(error)}): correct "
            "that and launch it again; nothing of it is left"
        ) from error


def update_study_run(study: str, uri: str | None, *updates: RunUpdate) -> bool:
    """Apply updates to a study's run in MLflow. If MLflow is down, log a warning and leave them to the next resume.

    Args:
        study: The study's name.
        uri: The MLflow store; None for the default one.
        *updates: What to change, in this order.

    Returns:
        Whether MLflow took all updates.

    Raises:
        ValueError: If MLflow has no such study.
    """
    try:
        with fail_fast():
            client = connect(uri)
            run = find_study_run(client, study)
            for update in updates:
                update(client, run)
    except ValueError:
        raise
    # The error may come from MLflow, requests or SQLAlchemy. The next resume makes these updates again.
    except Exception as error:
        logger.warning(
            f"MLflow does not take the state of study {study!r} ({type(error).__name__}: {summarize_error(error)}); "
            f"`hpo resume {study}` sends it later"
        )
        return False
    return True


def record_target(study: StudyConfig, trainer: Trainer) -> RunUpdate:
    """Return an update that stores the study file's present target, for `scaling recommend --target`."""

    def update(client: MlflowClient, run: str) -> None:
        if study.target:
            target = trainer.target(**study.target)
            write_note(client, run, "target", {"N": target.N, "D": target.D})

    return update


def set_status(status: str) -> RunUpdate:
    """Return an update that sets the run's status: RUNNING, FINISHED, FAILED or KILLED."""
    return lambda client, run: set_run_status(client, run, status=status)


def record_figures(search: Search) -> RunUpdate:
    """Return an update that stores the search's counts and best settings, as they are now."""
    progress = search.progress
    losses = [t.value for t in list_outcomes(search) if t.value is not None]
    figures = {
        "evaluations": float(progress.done),
        "configurations": float(progress.configurations),
        "diverged": float(progress.diverged),
        "stopped": float(progress.stopped),
        "tokens_spent": float(progress.tokens_spent),
        "tokens_saved": float(progress.tokens_saved),
        "tokens_reused": float(progress.tokens_reused),
        "tokens_stopped": float(progress.tokens_stopped),
    }
    best: dict[str, Any] | None = None
    if losses:
        figures["best_loss"] = min(losses)
        best = choose_answer(search).params

    def update(client: MlflowClient, run: str) -> None:
        if best is not None:
            write_note(client, run, "best", best)
        log_summary(client, run, figures)

    return update


def record_ending(search: Search) -> RunUpdate:
    """Return an update that stores the figures and the end of a finished search, unless MLflow already has them."""

    def update(client: MlflowClient, run: str) -> None:
        # A run that MLflow knows to have finished keeps its end time.
        if client.get_run(run).info.status != "FINISHED":
            record_figures(search)(client, run)
            set_run_status(client, run)

    return update


def list_outcomes(search: Search) -> list[FrozenTrial]:
    """Return the trials of a search that have a result: a loss, divergence, or an early stop."""
    trials = [t for t in search.study.get_trials(deepcopy=False) if t.state.is_finished() and is_search_trial(t)]
    return [t for t in trials if t.value is not None or is_diverged(t) or read_stopped(t)]
