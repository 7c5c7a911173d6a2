"""What a search writes into its Optuna study: its settings, and its trials as they begin, are taken over and end.

What all trials say together is read in hpo.search.view. The user attributes of a trial: tokens, N, config (number of the
configuration's first trial), rung, bracket [iteration, size index, start rung], continues (trial number or None),
resumed_tokens (where each resumed seed went on), seeds, resumed_seeds, worker, beat (of its lease: hpo.storage.leases), losses (one per seed, when there are
several; the value is their mean), goal (the rung where a free search wants the run, see hpo.search.model_driven), diverged (True)
on a run of which a loss was not finite, crashes (why its training did, each time), and stopped (tokens, loss, mean, sd: record.Stopped) on one that was given up, whose
state is PRUNED and which has no value. Where runs may be stopped, intermediate values are the points of their curves.

A trial is created with its attributes in one write, so that a kill at any point leaves either nothing or a running
trial of a dead worker. It may lack parameters then; whoever starts it fills them in.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.samplers.drawing import fill_in
from hpo.samplers.registry import resolve_sampler
from hpo.search.model_driven import NextTrial
from hpo.search.settings import check_fresh, check_same
from hpo.search.stored import check_stored
from hpo.search.view import Job, View
from hpo.storage.leases import LeaseLost
from hpo.storage.trial_attributes import Stopped, config_of, seeds_of

SETTINGS = "muscale"  # the study's user attribute


class Opened(NamedTuple):
    """A study with its storage, which alone can make a trial that runs already or write to one begun elsewhere."""

    study: optuna.Study
    storage: BaseStorage
    study_id: int  # as the storage knows it


def open_study(storage: BaseStorage, name: str, sampler: BaseSampler, settings: dict[str, Any], place: str) -> Opened:
    """The study of that name, made when there is none. ValueError when it is not a search with these settings.

    place: where the storage is, for messages, without passwords.
    """
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="minimize",
        load_if_exists=True,
        sampler=sampler,
        pruner=optuna.pruners.NopPruner(),
    )
    stored = study.user_attrs.get(SETTINGS)
    if stored is None:
        check_fresh(study)
        study.set_user_attr(SETTINGS, settings)
    else:
        check_stored(storage, study.study_name, stored, place)
        check_same(study.study_name, stored, settings)
    return Opened(study, storage, storage.get_study_id_from_name(study.study_name))


def id_of(opened: Opened, number: int) -> int:
    """How the storage calls the trial of that number."""
    return opened.storage.get_trial_id_from_study_id_trial_number(opened.study_id, number)


# The beginning


def attributes(
    view: View, chosen: NextTrial, *, sizes: Sequence[float], worker: str, resumable: bool
) -> dict[str, Any]:
    """Of the next trial, when it is to be the chosen one. The one that makes a trial ours, bracket, comes last."""
    continues = chosen.continues
    resumed = continues if resumable else None
    goal = {} if chosen.goal is None else {"goal": chosen.goal}
    return goal | {
        "tokens": view.ladder.levels[chosen.rung],
        "N": sizes[chosen.bracket.size],
        "config": len(view.trials) if chosen.config is None else chosen.config,
        "rung": chosen.rung,
        "continues": None if continues is None else continues.number,
        "resumed_tokens": 0 if resumed is None else resumed.user_attrs["tokens"],
        "seeds": view.ladder.seeds_at(chosen.rung),
        "resumed_seeds": 0 if resumed is None else seeds_of(resumed),
        "worker": worker,
        "bracket": list(chosen.bracket),
    }


def create(
    opened: Opened, space: Mapping[str, BaseDistribution], chosen: NextTrial, attrs: Mapping[str, Any]
) -> FrozenTrial:
    """A new running trial, in one write. No params: the sampler is asked for them when it is started."""
    params = chosen.params
    trial_id = opened.storage.create_new_trial(
        opened.study_id,
        create_trial(
            state=TrialState.RUNNING,
            params={k: params[k] for k in space} if params else {},
            distributions=dict(space) if params else {},
            user_attrs=dict(attrs),
        ),
    )
    trial = opened.storage.get_trial(trial_id)
    if chosen.config is None and attrs["config"] != trial.number:  # a trial was enqueued by hand in this very moment
        opened.storage.set_trial_user_attr(trial_id, "config", trial.number)
        return opened.storage.get_trial(trial_id)
    return trial


def take_enqueued(
    opened: Opened, space: Mapping[str, BaseDistribution], view: View, attrs: Mapping[str, Any]
) -> int | None:
    """Give the first trial that was enqueued by hand these attributes, as a configuration of its own; its number. None
    when there is no such trial. One out of range is failed with a warning."""
    for trial in view.trials:
        if trial.state == TrialState.WAITING and "bracket" not in trial.user_attrs and _in_range(opened, space, trial):
            for key, value in {**attrs, "config": trial.number}.items():
                opened.storage.set_trial_user_attr(id_of(opened, trial.number), key, value)
            return trial.number
    return None


def _in_range(opened: Opened, space: Mapping[str, BaseDistribution], trial: FrozenTrial) -> bool:
    fixed = {k: v for k, v in trial.system_attrs.get("fixed_params", {}).items() if k in space}
    try:
        create_trial(value=0.0, params=fixed, distributions={k: space[k] for k in fixed})
    except ValueError as error:
        warnings.warn(f"the enqueued trial {trial.number} is not run: {error}", UserWarning, stacklevel=5)
        opened.storage.set_trial_state_values(id_of(opened, trial.number), TrialState.RUNNING)
        opened.study.tell(trial.number, state=TrialState.FAIL)
        return False
    return True


def start(
    opened: Opened,
    space: Mapping[str, BaseDistribution],
    number: int,
    worker: str,
    sampler_of: Callable[[int], BaseSampler],
    trial: FrozenTrial | None = None,
) -> FrozenTrial:
    """Make a trial that has our attributes run here: this worker's by name, and complete in its parameters.

    trial: as it is now, where that is known: each reading is half a dozen statements on a server.
    sampler_of: what chooses the parameters of the trial of a number, if it has none yet; see sampler_for.
    """
    trial_id = id_of(opened, number)
    trial = trial or opened.storage.get_trial(trial_id)
    own = {"worker": worker, "config": config_of(trial)}
    missing = {key: value for key, value in own.items() if trial.user_attrs.get(key) != value}
    for key, value in missing.items():
        opened.storage.set_trial_user_attr(trial_id, key, value)
    waiting, complete = trial.state == TrialState.WAITING, space.keys() <= trial.params.keys()
    if waiting:
        opened.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    if not complete:
        fill_in(space, opened.study.study_name, opened.storage, sampler_of(number), trial_id)
    return opened.storage.get_trial(trial_id) if missing or waiting or not complete else trial


# Its parameters


def sampler_for(study: optuna.Study, sampler: BaseSampler, named: str | None, seed: int, number: int) -> BaseSampler:
    """What chooses the parameters of a trial: for Optuna's samplers by name one that is made for it, from a seed of
    its own, so that neither a restart nor a second worker repeats what was drawn.

    sampler: of the search; named: its name, None when it was given as an object.
    """
    random = random_for(study, named, seed, number)
    if random is not None or named not in ("tpe", "gp"):
        return random or sampler
    return resolve_sampler(named, _stream(seed, number))


def random_for(study: optuna.Study, named: str | None, seed: int, number: int) -> RandomSampler | None:
    """What draws the parameters of a trial, when that is done at random: from one stream per trial, so that neither
    a restart nor a second worker repeats them. Optuna's quasi-random sampler, too, begins at random, until a trial
    is complete.
    """
    random = named == "random"
    if named == "qmc":
        random = not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return RandomSampler(seed=_stream(seed, number)) if random else None


def _stream(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


# The end


def report(opened: Opened, job: Job, tokens: int, loss: float) -> None:
    """Keep a point of a job's curve; one at the same tokens is replaced."""
    opened.storage.set_trial_intermediate_value(running(opened, job)[0], tokens, loss)


def stop(opened: Opened, job: Job, stopped: Stopped, worker: str | None = None) -> None:
    """End a job's trial as given up. ValueError, and nothing is changed, for a job that is not running."""
    trial_id, _ = running(opened, job, worker)
    try:
        opened.storage.set_trial_user_attr(trial_id, "stopped", asdict(stopped))
        # not study.tell, which would take the last point of the curve for the trial's value
        opened.storage.set_trial_state_values(trial_id, TrialState.PRUNED)
    except UpdateFinishedTrialError as error:
        raise LeaseLost(f"trial {job.number} was told by someone else in the meantime") from error


def beat(opened: Opened, job: Job, worker: str) -> None:
    """Write the next number of a lease. Lost when the trial is not this worker's any more, or has ended."""
    trial_id, trial = running(opened, job, worker)
    try:
        opened.storage.set_trial_user_attr(trial_id, "beat", int(trial.user_attrs.get("beat", 0)) + 1)
    except UpdateFinishedTrialError as error:
        raise LeaseLost(f"trial {job.number} was told by someone else in the meantime") from error


def crashed(opened: Opened, job: Job, why: str, worker: str) -> int:
    """Note why a running trial's training crashed; how often it has."""
    trial_id, trial = running(opened, job, worker)
    reasons = [*trial.user_attrs.get("crashes", []), why]
    opened.storage.set_trial_user_attr(trial_id, "crashes", reasons)
    return len(reasons)


def has_ended(trial: FrozenTrial) -> bool:
    """Whether a running trial's outcome was written, but not its state: its worker was killed in between."""
    return bool(trial.user_attrs.get("diverged") or trial.user_attrs.get("stopped"))


def close(opened: Opened, trial: FrozenTrial) -> None:
    """End a running trial that nobody works on, by the outcome that was written, or as one without a result."""
    state = TrialState.PRUNED if trial.user_attrs.get("stopped") else TrialState.FAIL
    opened.storage.set_trial_state_values(id_of(opened, trial.number), state)


def running(opened: Opened, job: Job, worker: str | None = None) -> tuple[int, FrozenTrial]:
    """A job's trial, and its id. ValueError when it is not running or not this search's; Lost when it is not this worker's."""
    known = f"trial {job.number} of study {opened.study.study_name!r}"
    try:
        trial_id = id_of(opened, job.number) if job.number >= 0 else None
    except KeyError:
        trial_id = None
    if trial_id is None:
        raise ValueError(f"{known} does not exist: tell only jobs that this search's ask() gave")
    trial = opened.storage.get_trial(trial_id)
    attrs, theirs = trial.user_attrs, (list(job.bracket), job.rung, job.seeds)
    if (attrs.get("bracket"), attrs.get("rung"), seeds_of(trial)) != theirs:
        raise ValueError(f"{known} is another run than {job}: tell only jobs that this search's ask() gave")
    if trial.state != TrialState.RUNNING:
        raise LeaseLost(f"{known} is not running but {trial.state.name}: a job is told once")
    owner = attrs.get("worker")
    if worker is not None and owner != worker:
        raise LeaseLost(
            f"{known} was taken over by {owner or 'nobody yet'}: its lease had run out, or it was given back"
        )
    return trial_id, trial


def finish(opened: Opened, job: Job, losses: Sequence[float], worker: str | None = None) -> None:
    """End a job's trial: with the mean of the losses, one per seed, or as diverged when one of them is not finite.

    worker: whose it must be, where it is leased. ValueError, and nothing is changed, for a job that is not running or another
    number of losses.
    """
    (trial_id, trial), seeds = running(opened, job, worker), job.seeds
    if len(losses) != seeds:
        raise ValueError(
            f"trial {job.number} is {seeds} training{'s' if seeds > 1 else ''}, got {len(losses)} "
            f"loss{'es' if len(losses) != 1 else ''}: tell one per seed"
        )
    try:
        if seeds > 1:
            kept = [x if math.isfinite(x) else None for x in losses]
            opened.storage.set_trial_user_attr(trial_id, "losses", kept)
        if all(math.isfinite(x) for x in losses):
            _end(opened, trial_id, trial, TrialState.COMPLETE, [float(sum(x / seeds for x in losses))])
        else:
            opened.storage.set_trial_user_attr(trial_id, "diverged", True)
            _end(opened, trial_id, trial, TrialState.FAIL)
    except UpdateFinishedTrialError as error:
        raise LeaseLost(f"trial {job.number} was told by someone else in the meantime") from error


def _end(
    opened: Opened, trial_id: int, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None = None
) -> None:
    """What study.tell does, which would read the trial twice more: a tenth of all that a trial costs behind a proxy."""
    try:
        opened.study.sampler.after_trial(opened.study, trial, state, values)
    finally:
        opened.storage.set_trial_state_values(trial_id, state, values)
