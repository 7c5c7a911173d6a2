"""Continue a study, after raising its longest run or its iterations if asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo.launch.estimate import Estimate, estimate_cost
from hpo.storage.retry import retry_storage
from hpo.study.config import StudyConfig
from hpo.study.files import StudyFiles
from hpo.study.mlflow_run import record_target, update_study_run
from hpo.study.trainer import Trainer

if TYPE_CHECKING:
    from hpo.search.search import Search


def raise_study(
    files: StudyFiles,
    config: StudyConfig,
    trainer: Trainer,
    search: Search,
    max_tokens: int | None,
    iterations: int | None,
    *,
    uri: str | None,
    dry_run: bool,
) -> Estimate:
    """Raise a study, and estimate what is then left of it.

    Args:
        files: The study's files.
        config: The study.
        trainer: The study's trainer.
        search: The study's search.
        max_tokens: The new longest run; None: as it is.
        iterations: How often Hyperband is run then; None: as it is.
        uri: The MLflow store; None for the default one.
        dry_run: Only estimate, and write nothing.

    Returns:
        What is left.

    Raises:
        ValueError: If the study cannot be raised like that. Nothing is written then.
    """
    if max_tokens is not None:
        problems = trainer.problems(config.distributions, (config.search.tokens.min, max_tokens))
        if problems:
            raise ValueError("; ".join(problems))
    cost = retry_storage(lambda: estimate_cost(search, config, trainer, max_tokens=max_tokens, iterations=iterations))
    if not dry_run:
        update_study_run(files.name, uri, record_target(config, trainer))
        if max_tokens is not None or iterations is not None:
            search.extend(max_tokens, iterations=iterations)
    return cost


def advise_raise(files: StudyFiles, search: Search) -> str:
    """Return what can be done with a study that has nothing left to run."""
    reason = search.explain_end()
    if search.settings.plan is not None:
        text = "nothing left to run; `hpo plan` with a larger budget writes another study"
        return text + (f" ({reason})" if reason else "")
    raises = [
        f"`hpo extend {files.name} --max-tokens {search.ladder.levels[-1] * search.ladder.eta}` adds a longer run"
    ]
    iterations = search.current_iterations
    if iterations is not None and reason is None:
        raises.append(f"`hpo extend {files.name} --iterations {iterations + 1}` tries more settings")
    if search.budget is not None and reason is None:
        raises.append(f"a larger budget in {files.toml}, then `hpo resume {files.name}`, goes on")
    return "nothing left to run; " + ", ".join(raises) + (f" ({reason})" if reason else "")
