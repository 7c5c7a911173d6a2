"""The study's own run in MLflow: its target, status and figures. Where MLflow is away they wait for the next resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hpo.storage.trial_attributes import stopped_of
from hpo.study.config import StudyConfig
from hpo.study.trainer import Trainer
from scaling.common.cli import say
from scaling.common.redact import without_passwords
from scaling.tracking.client import away, connect, default_uri, impatient
from scaling.tracking.experiment import find_study_run, finish
from scaling.tracking.log import log_summary, write_note

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from optuna.trial import FrozenTrial

    from hpo.search.search import Search

Note = Callable[["MlflowClient", str], None]  # what to do, given a client and the id of the study's run


def refuse_away(uri: str | None) -> None:
    """ValueError when MLflow does not answer, before anything is made that it would have to know."""
    if why := away(uri):
        where = without_passwords(uri or default_uri())
        raise ValueError(f"MLflow at {where} does not answer ({why}): start it, or mend the address; nothing was made")


def noted(study: str, uri: str | None, *notes: Note) -> bool:
    """Do this to a study's run; whether MLflow took it. ValueError when it has no such study."""
    try:
        with impatient():
            client = connect(uri)
            run = find_study_run(client, study)
            for note in notes:
                note(client, run)
    except ValueError:
        raise
    except Exception as error:  # MLflow's, requests', SQLAlchemy's: the runs' records wait on disk, this is made anew
        said = (without_passwords(error).splitlines() or [""])[0][:200]
        say(
            f"MLflow does not take the state of study {study!r} ({type(error).__name__}: {said}); `hpo resume {study}` sends it later"
        )
        return False
    return True


def target_of(study: StudyConfig, trainer: Trainer) -> Note:
    """Keep the target that the file now has, for `scaling recommend --target`."""

    def note(client: MlflowClient, run: str) -> None:
        if study.target:
            target = trainer.target(**study.target)
            write_note(client, run, "target", {"N": target.N, "D": target.D})

    return note


def status_of(status: str) -> Note:
    return lambda client, run: finish(client, run, status=status)


def figures_of(search: Search) -> Note:
    """The search's counts and its best, read now."""
    now = search.progress
    losses = [t.value for t in outcomes(search) if t.value is not None]
    figures = {
        "evaluations": float(now.done),
        "configurations": float(now.configurations),
        "diverged": float(now.diverged),
        "stopped": float(now.stopped),
        "tokens_spent": float(now.tokens_spent),
        "tokens_saved": float(now.tokens_saved),
        "tokens_reused": float(now.tokens_reused),
        "tokens_stopped": float(now.tokens_stopped),
    }
    best: dict[str, Any] | None = None
    if losses:
        figures["best_loss"] = min(losses)
        best = search.best()

    def note(client: MlflowClient, run: str) -> None:
        if best is not None:
            write_note(client, run, "best", best)
        log_summary(client, run, figures)

    return note


def ending_of(search: Search) -> Note:
    """The figures and the end of a search that has finished, where MLflow was away then; else nothing: it ended when it did."""

    def note(client: MlflowClient, run: str) -> None:
        if client.get_run(run).info.status != "FINISHED":
            figures_of(search)(client, run)
            finish(client, run)

    return note


def outcomes(search: Search) -> list[FrozenTrial]:
    """The trials that have a result: a loss, diverged, or stopped."""
    ours = [t for t in search.study.get_trials(deepcopy=False) if t.state.is_finished() and "bracket" in t.user_attrs]
    return [t for t in ours if t.value is not None or t.user_attrs.get("diverged") or stopped_of(t)]
