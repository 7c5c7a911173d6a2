"""Giving up hopeless runs: `[search] stop` in a study file.

From half of its tokens on, at every point of its curve, a run's end is forecast (scaling.curves.in_progress) from the curve so far
and from the runs of the same size and rung that have ended. If it has less than the asked chance of beating the best of these, it ends there.

What such a run is: an outcome, censored. Its trial is PRUNED with the attribute `stopped`; it ranks last in its rung and is
neither promoted nor asked again, also after a raise, like a run that diverged. The forecast never stands in for a loss, but
for the sampler's model, which takes its mean. As bad as the worst measured loss of the rung, as a run that diverged counts
there, said too little: where only good runs are left to end, the worst of them is nearly as good as the best.

Only runs of one seed are stopped. The points are kept in the study, and a decision uses the runs that had ended when this
one began, so that it is a function of the record: a run that was killed and taken up again is judged as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from hpo.search.view import Job
from hpo.storage.trial_attributes import Stopped, loss_of, seeds_of
from hpo.study.trainer import Trainer
from scaling.common.measurement import Measurement
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.search.search import Search
    from scaling.curves.in_progress import CurvePrior, Finished, Schedule

Curve = dict[int, float]  # tokens -> loss on the way, nats per token
EARLIEST = (
    0.5  # of its tokens: where forecasts were measured. From a tenth they still tell who is hopeless, but as data
)
# for the model they mislead: answers .1 to .3 nats off in some of the simulated searches
SEEN = 3  # points that a forecast needs, of the run and of each that it is compared with
LEAST = 5  # runs that have ended
MOST = 16  # the latest of them; a decision costs some 5 ms for each


class Hopeless(Exception):
    """Raised out of a training that is given up."""

    def __init__(self, stopped: Stopped) -> None:
        super().__init__(f"stopped after {stopped.tokens} tokens: the end is forecast at {stopped.mean:.4f}")
        self.stopped = stopped


@dataclass
class EarlyStopper:
    """Judges one run at each of its points."""

    chance: float  # of beating the best, below which it ends
    at: int  # tokens at the end
    schedule: Schedule | None
    ended: Sequence[Finished]
    best: float  # loss among these
    curve: Curve  # all that is known
    own: int  # the last point that this run trained itself; 0: none yet
    keep: Callable[[int, float], None]
    priors: dict[int, CurvePrior] = field(default_factory=dict)  # learnt so far, see judge

    def look(self, point: Measurement) -> None:
        """Take a point of the run. Hopeless when it is to end here. A loss that is not finite is for the trainer to end on."""
        if not math.isfinite(point.loss):
            return
        self.keep(point.tokens, point.loss)
        self.curve[point.tokens] = point.loss
        self.own = point.tokens
        self.check()

    def check(self) -> None:
        """Hopeless when what is known says so; only from a point that this run has trained itself."""
        if self.own:
            known = {t: loss for t, loss in self.curve.items() if t <= self.own}
            stopped = judge(known, self.at, self.schedule, self.ended, self.best, self.chance, self.priors)
            if stopped is not None:
                raise Hopeless(stopped)


def judge(
    curve: Curve,
    at: int,
    schedule: Schedule | None,
    ended: Sequence[Finished],
    best: float,
    chance: float,
    priors: dict[int, CurvePrior],
) -> Stopped | None:
    """Whether the run of this curve, `at` tokens long, has less than `chance` of ending below `best`. None: it goes on.

    Also before EARLIEST, and while fewer than LEAST of the ended runs have SEEN points up to this share of theirs. priors: what was learnt from
    how many of these ended runs; they only become more along a run, so that their number names them.
    """
    import numpy as np

    from scaling.curves.in_progress import learn_prior, predict_end

    tokens, losses = (np.array(v, float) for v in (list(curve), list(curve.values())))
    now = int(tokens.max())
    if now < EARLIEST * at:
        return None
    near = [
        e for e in ended if (np.asarray(e.tokens) <= now / at * np.asarray(e.tokens)[-1] * (1 + 1e-3)).sum() >= SEEN
    ]
    if losses.size < SEEN or len(near) < LEAST:
        return None
    count, near = len(near), near[-MOST:]
    if count not in priors:
        priors[count] = learn_prior(near)
    end = predict_end(tokens, losses, at, schedule=schedule, prior=priors[count], siblings=near)
    return Stopped(now, curve[now], end.mean, end.sd) if end.probability_below(best) < chance else None


def watch_of(search: Search, job: Job, trainer: Trainer, chance: float) -> EarlyStopper | None:
    """The watch over a job that is about to be trained; None where nothing may be stopped."""
    if not chance or job.seeds > 1:
        return None
    from scaling.curves.in_progress import Finished

    trials = search.study.get_trials(deepcopy=False)
    trial = trials[job.number]

    def schedule(of: FrozenTrial) -> Schedule | None:
        params = {name: of.params[name] for name in search.space}
        return schedule_of(trainer.describe(params, job.fidelity), job.fidelity)

    ended = []
    before = rivals(trials, trial)
    losses = [loss_of(other) for other in before]
    for other, loss in zip(before, losses, strict=True):
        points = curve_of(trials, other)
        ended.append(Finished([*points, int(job.fidelity.D)], [*points.values(), loss], schedule(other)))
    return EarlyStopper(
        chance,
        int(job.fidelity.D),
        schedule(trial),
        ended,
        min(losses, default=math.inf),
        curve_of(trials, trial),
        max(trial.intermediate_values, default=0),
        lambda tokens, loss: search.report(job, tokens, loss),
    )


def rivals(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> list[FrozenTrial]:
    """The runs of the trial's size and rung that had ended with a loss when it began, in that order."""
    attrs, began = trial.user_attrs, trial.datetime_start
    found = [
        (other.datetime_complete, other.number, other)
        for other in trials
        if other.state == TrialState.COMPLETE
        and "bracket" in other.user_attrs
        and (other.user_attrs["N"], other.user_attrs["tokens"]) == (attrs["N"], attrs["tokens"])
        and seeds_of(other) == 1
        and math.isfinite(loss_of(other))
        and other.datetime_complete is not None
        and began is not None
        and other.datetime_complete < began
    ]
    return [other for *_, other in sorted(found)]


def curve_of(trials: Sequence[FrozenTrial], trial: FrozenTrial) -> Curve:
    """The points of a run, with those of the shorter runs that it goes on from, in order of tokens."""
    curve: Curve = {}
    run: FrozenTrial | None = trial
    while run is not None:
        curve = {**run.intermediate_values, **curve}
        run = trials[run.user_attrs["continues"]] if run.user_attrs.get("resumed_tokens") else None
    return dict(sorted(curve.items()))


def schedule_of(described: Mapping[str, Any], fidelity: Fidelity) -> Schedule | None:
    """The schedule of a run by its trainer's description: `schedule` "wsd" with `cooldown`, `warmup_tokens` and maybe `decay`
    and `lr_floor`, as those of `proxies`. None, a constant rate, for any other: what its cooldown gains is then known only
    from runs that have ended.
    """
    from scaling.curves.in_progress import cooldown

    if described.get("schedule") != "wsd":
        return None
    return cooldown(
        fidelity.D,
        share=described["cooldown"],
        warmup=described["warmup_tokens"],
        decay=described.get("decay", "1-sqrt"),
        floor=described.get("lr_floor", 0.1),
    )
