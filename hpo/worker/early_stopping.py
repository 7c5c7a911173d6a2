"""Early stopping of hopeless runs: `[search] stop` in a study file.

From half of its tokens on, the final loss of a run is forecast at every point of its curve
(`scaling.curves.in_progress`), from the curve so far and from the finished runs of the same size and rung. If its
chance of beating the best of these is lower than the study asks for, it ends there.

A stopped run is a censored result. Its trial is PRUNED and has the attribute `stopped`. Like a run that diverged, it
ranks last in its rung and is neither promoted nor asked again, also after the budget is raised. The forecast never
stands in for a loss, except in the sampler's model, which uses the forecast's mean. Using the worst measured loss of
the rung instead, as for runs that diverged, carried too little information: if only good runs finish, the worst of
them is nearly as good as the best.

Only runs of one seed are stopped. The points of the curves are stored in the study, and a decision uses only runs
that had finished when this one began. So it is a function of the record: a run that is killed and resumed is judged
as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from hpo.search.view import Job
from hpo.storage.trial_attributes import Stopped, is_search_trial, read_loss, read_seeds
from hpo.study.selection import join_curve
from hpo.study.trainer import Trainer
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.search.search import Search
    from scaling.curves.in_progress import CurvePrior, FinishedRun
    from scaling.curves.schedules import Schedule

# Tokens -> loss at that point of a run, in nats per token.
Curve = dict[int, float]

# Share of its tokens that a run has trained before it may be stopped. Forecasts were measured from here on. From a
# tenth on they still identify hopeless runs, but mislead the model as data: in some of the simulated searches the
# answers were off by 0.1 to 0.3 nats.
EARLIEST_SHARE = 0.5
# Points that a forecast needs, of the run and of each run that it is compared with.
MIN_POINTS = 3
# Finished runs that a decision needs.
MIN_FINISHED_RUNS = 5
# Finished runs that a decision uses, the latest ones. Each costs about 5 ms per decision.
MAX_FINISHED_RUNS = 16


class StoppedEarly(Exception):
    """Raised in a training to stop it early.

    Attributes:
        stopped: Where the run was stopped, and its forecast.
    """

    def __init__(self, stopped: Stopped) -> None:
        super().__init__(f"stopped after {stopped.tokens} tokens: the final loss is forecast at {stopped.mean:.4f}")
        self.stopped = stopped


@dataclass
class EarlyStopper:
    """Decides at each point of one run whether to stop it.

    Attributes:
        chance: The run is stopped if its chance of beating the best finished run is lower than this.
        tokens: The run's tokens at its end.
        schedule: The run's learning-rate schedule; None: constant.
        finished: The runs of the same size and rung that had finished when this one began.
        best: The lowest loss among them.
        curve: All known points of the run.
        last_tokens: The last point that this run trained itself, not the shorter run that it continues; 0: none yet.
        report: Stores a point (tokens, loss) in the study.
        priors: Priors learned from the finished runs so far, see `judge`.
    """

    chance: float
    tokens: int
    schedule: Schedule | None
    finished: Sequence[FinishedRun]
    best: float
    curve: Curve
    last_tokens: int
    report: Callable[[int, float], None]
    priors: dict[int, CurvePrior] = field(default_factory=dict)

    def observe(self, point: Measurement) -> None:
        """Store a point of the run and decide.

        A loss that is not finite is ignored, since the trainer itself ends on it.

        Raises:
            StoppedEarly: If the run is to be stopped here.
        """
        if not math.isfinite(point.loss):
            return
        self.report(point.tokens, point.loss)
        self.curve[point.tokens] = point.loss
        self.last_tokens = point.tokens
        self.check()

    def check(self) -> None:
        """Decide from the points known so far, if the run has trained one of them itself.

        Raises:
            StoppedEarly: If the run is to be stopped.
        """
        if self.last_tokens:
            known = {tokens: loss for tokens, loss in self.curve.items() if tokens <= self.last_tokens}
            stopped = judge(known, self.tokens, self.schedule, self.finished, self.best, self.chance, self.priors)
            if stopped is not None:
                raise StoppedEarly(stopped)


def judge(
    curve: Curve,
    end_tokens: int,
    schedule: Schedule | None,
    finished: Sequence[FinishedRun],
    best: float,
    chance: float,
    priors: dict[int, CurvePrior],
) -> Stopped | None:
    """Decide whether a run is stopped at the last point of its curve.

    It is not before EARLIEST_SHARE of its tokens, nor while fewer than MIN_FINISHED_RUNS of the finished runs have
    MIN_POINTS points up to the same share of theirs.

    Args:
        curve: The run's points so far.
        end_tokens: The run's tokens at its end.
        schedule: The run's learning-rate schedule; None: constant.
        finished: The finished runs to compare it with.
        best: The lowest loss among them.
        chance: Stop the run if its chance of ending below `best` is lower than this.
        priors: The priors learned so far, by the number of finished runs that they were learned from. A run compares
            itself with ever more of the same list, so this number identifies them. Updated in place.

    Returns:
        Where and why the run is stopped; None if it continues.
    """
    import numpy as np

    from scaling.curves.in_progress import learn_prior, predict_end

    tokens, losses = (np.array(values, float) for values in (list(curve), list(curve.values())))
    now = int(tokens.max())
    if now < EARLIEST_SHARE * end_tokens:
        return None

    def count_points(run: FinishedRun) -> int:
        """Return how many points of a finished run lie within the share of its tokens that this run has trained."""
        points = np.asarray(run.tokens)
        return int((points <= now / end_tokens * points[-1] * (1 + 1e-3)).sum())

    comparable = [run for run in finished if count_points(run) >= MIN_POINTS]
    if losses.size < MIN_POINTS or len(comparable) < MIN_FINISHED_RUNS:
        return None
    count, comparable = len(comparable), comparable[-MAX_FINISHED_RUNS:]
    if count not in priors:
        priors[count] = learn_prior(comparable)
    end = predict_end(tokens, losses, end_tokens, schedule=schedule, prior=priors[count], siblings=comparable)
    return Stopped(now, curve[now], end.mean, end.sd) if end.probability_below(best) < chance else None


def make_early_stopper(search: Search, job: Job, trainer: Trainer, chance: float) -> EarlyStopper | None:
    """Return the early stopper of a job that is about to be trained.

    Args:
        search: The search.
        job: The job.
        trainer: The study's trainer, which describes the schedules of the runs.
        chance: The study's `[search] stop`.

    Returns:
        The early stopper; None if the job must not be stopped, because `chance` is 0 or it has several seeds.
    """
    if not chance or job.seeds > 1:
        return None
    from scaling.curves.in_progress import FinishedRun

    trials = search.study.get_trials(deepcopy=False)
    trial = trials[job.number]

    def read_trial_schedule(other: FrozenTrial) -> Schedule | None:
        params = {name: other.params[name] for name in search.space}
        return read_schedule(trainer.describe(params, job.fidelity), job.fidelity)

    finished = []
    rivals = find_rivals(trials, trial)
    losses = [read_loss(rival) for rival in rivals]
    for rival, loss in zip(rivals, losses, strict=True):
        curve = join_curve(trials, rival)
        tokens, points = [*curve, int(job.fidelity.D)], [*curve.values(), loss]
        finished.append(FinishedRun(tokens, points, read_trial_schedule(rival)))
    return EarlyStopper(
        chance=chance,
        tokens=int(job.fidelity.D),
        schedule=read_trial_schedule(trial),
        finished=finished,
        best=min(losses, default=math.inf),
        curve=join_curve(trials, trial),
        last_tokens=max(trial.intermediate_values, default=0),
        report=lambda tokens, loss: search.report(job, tokens, loss),
    )


def find_rivals(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> list[FrozenTrial]:
    """Return the trials of the same size and rung that had finished with a loss when a trial began.

    Args:
        trials: All trials of the study.
        trial: The trial that they are compared with.

    Returns:
        The trials of one seed among them, in the order in which they finished.
    """
    attrs, began = trial.user_attrs, trial.datetime_start
    rivals = [
        (other.datetime_complete, other.number, other)
        for other in trials
        if other.state == TrialState.COMPLETE
        and is_search_trial(other)
        and (other.user_attrs["N"], other.user_attrs["tokens"]) == (attrs["N"], attrs["tokens"])
        and read_seeds(other) == 1
        and math.isfinite(read_loss(other))
        and other.datetime_complete is not None
        and began is not None
        and other.datetime_complete < began
    ]
    return [other for *_, other in sorted(rivals)]


def read_schedule(described: Mapping[str, Any], fidelity: Fidelity) -> Schedule | None:
    """Return the learning-rate schedule of a run from its trainer's description.

    Args:
        described: What `Trainer.describe` returns: `schedule` = "wsd" with `cooldown`, `warmup_tokens` and optionally
            `decay` and `lr_floor`, as for the trainers of `proxies`.
        fidelity: N and D of the run.

    Returns:
        The schedule. None, a constant rate, for any other one: what its cooldown gains is then known only from finished
        runs.
    """
    from scaling.curves.schedules import make_cooldown_schedule

    if described.get("schedule") != "wsd":
        return None
    return make_cooldown_schedule(
        fidelity.D,
        share=described["cooldown"],
        warmup=described["warmup_tokens"],
        decay=described.get("decay", "1-sqrt"),
        floor=described.get("lr_floor", 0.1),
    )
