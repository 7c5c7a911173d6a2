"""The finished runs of one size and length as an Optuna study, for plots and importances of Optuna."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.storage.connect import open_storage
from hpo.storage.trial_attributes import is_diverged, is_search_trial, read_stopped
from hpo.study.files import StudyFiles
from scaling.common.studies import find_study_file
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.search.search import Search

# The largest relative difference of N and D at which they count as the ones that were asked for.
TOLERANCE = 1e-6


def select_trials(
    study: str | Path | Search | optuna.Study,
    *,
    N: float | None = None,
    D: float | None = None,
    storage: str | None = None,
) -> optuna.Study:
    """Return the finished runs of one size and one number of tokens as an Optuna study in memory.

    A search mixes runs of several sizes and lengths, whose losses cannot be compared. Optuna's importances, contour and
    history plots need runs that can be. Of a run that continues a shorter one, the curve begins where the shorter one
    began. The user attribute `trial` is the number of the trial in the search.

    Args:
        study: A launched study (its name or file), a search, or its Optuna study.
        N: Parameters of the proxy. Default: the largest.
        D: Tokens of the run. Default: the most tokens of finished runs of that size.
        storage: The URL of the storage in which the study was launched, if it is given by name; default: its journal.

    Returns:
        The study. Diverged runs are failed trials, and runs that were stopped early are pruned ones.

    Raises:
        ValueError: If there is no such study, or no finished run of this size and length. The message lists those
            that there are.

    Example:
        >>> study = hpo.select_trials("quickstart")
        >>> optuna.importance.get_param_importances(study)
    """
    source = _find_study(study, storage)
    trials = source.get_trials(deepcopy=False)
    finished = [
        t
        for t in trials
        if is_search_trial(t) and (t.value is not None or is_diverged(t) or read_stopped(t) is not None)
    ]
    counts = Counter(Fidelity(float(t.user_attrs["N"]), float(t.user_attrs["tokens"])) for t in finished)
    groups = [f for f in counts if _matches(f.N, N) and _matches(f.D, D)]
    if not groups:
        listed = "; ".join(
            f"N {f.N:,.0f}, D {f.D:,.0f} ({counts[f]})" for f in sorted(counts, key=lambda f: (f.N, f.D))
        )
        asked = ", ".join(f"{name} {value:,.0f}" for name, value in (("N", N), ("D", D)) if value is not None)
        raise ValueError(
            f"study {source.study_name!r} has no finished run{f' of {asked}' if asked else ''}: it has "
            f"{listed or 'none at all'}"
        )
    chosen = max(groups, key=lambda f: (f.N, f.D))
    selected = optuna.create_study(
        study_name=f"{source.study_name}, N {chosen.N:,.0f}, D {chosen.D:,.0f}",
        storage=optuna.storages.InMemoryStorage(),
        direction=source.direction,
    )
    selected.add_trials(
        [
            _copy_trial(t, trials)
            for t in finished
            if (float(t.user_attrs["N"]), float(t.user_attrs["tokens"])) == (chosen.N, chosen.D)
        ]
    )
    return selected


def join_curve(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> dict[int, float]:
    """Return the points (tokens: loss) of a run and of the shorter runs that it continues, in order of tokens.

    The last point of a finished run is left out. It was measured after a cooldown that a longer run does not continue.
    """
    curve: dict[int, float] = {}
    run: FrozenTrial | None = trial
    while run is not None:
        points = {step: loss for step, loss in run.intermediate_values.items() if step != run.user_attrs["tokens"]}
        curve = {**points, **curve}
        run = trials[run.user_attrs["continues"]] if run.user_attrs.get("resumed_tokens") else None
    return dict(sorted(curve.items()))


def _find_study(study: str | Path | Search | optuna.Study, storage: str | None) -> optuna.Study:
    if isinstance(study, optuna.Study):
        return study
    if not isinstance(study, str | Path):
        return study.study
    files = StudyFiles(find_study_file(str(study)))
    if storage is None and files.storage.exists():
        raise ValueError(
            f"study {files.name!r} was launched in {files.storage.read_text().strip()}: give that URL as storage"
        )
    if storage is None and not files.journal.exists():
        raise ValueError(f"study {files.name!r} has not been launched: `hpo launch {files.toml}` starts it")
    opened, _ = open_storage(storage or files.journal, None, files.name)
    try:
        return optuna.load_study(study_name=files.name, storage=opened)
    except KeyError as error:
        raise ValueError(f"the storage has no study {files.name!r}: give the one in which it was launched") from error


def _matches(value: float, wanted: float | None) -> bool:
    return wanted is None or abs(value - wanted) <= TOLERANCE * wanted


def _copy_trial(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    end = int(trial.user_attrs["tokens"])
    last = {end: trial.intermediate_values[end]} if end in trial.intermediate_values else {}
    return create_trial(
        state=trial.state,
        value=trial.value if trial.state == TrialState.COMPLETE else None,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs | {"trial": trial.number},
        intermediate_values=join_curve(trials, trial) | last,
    )
