"""How much of the winner's lead is noise: the arithmetic, what the record says of it, and the outcome of a confirmation.

Settings that were chosen by their losses on some seeds look better on those seeds than on others ("Hyperparameters in
Reinforcement Learning and How To Tune Them", Eimer, Lindauer, Raileanu 2023, arXiv 2306.01324): tune on some, report on
others. hpo.rematch trains the answer and its runner-up again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from hpo.cube import Cube
from hpo.outcome import outcomes
from hpo.record import config_of
from hpo.workers import words
from scaling.compute import Fidelity

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.search import Search

NEAR = 0.02  # of a parameter's range: settings that are closer in all of them are the same for a comparison
ROUNDING = 1e-9  # of a parameter's range: a model's answer comes back from the unit cube
MASS = 0.95  # of every interval here
NODES = 48  # of each of two quadratures


# The arithmetic


@dataclass(frozen=True)
class Interval:
    """A mean and its Student-t interval of 95 %."""

    mean: float
    low: float
    high: float


def t_interval(values: ArrayLike) -> Interval:
    """mean -+ t(n - 1) s / sqrt(n) of independent values [n]. ValueError for fewer than 2."""
    from scipy.stats import t

    x = np.asarray(values, float)
    if x.ndim != 1 or x.size < 2:
        raise ValueError(f"an interval needs at least 2 values, got {x.size}: use more seeds")
    half = float(t.ppf(0.5 + MASS / 2, x.size - 1)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


@dataclass(frozen=True)
class Lead:
    """How far one configuration is ahead of another, and what of that is to be believed. Nats per token."""

    observed: float  # difference of the measured losses; NaN when they were not both measured
    expected: float  # what is left on average when both are trained on new seeds
    error: float  # standard error of `observed` (from seeds), or standard deviation of the lead (from a model)
    probability: float  # that the leader is truly better

    @property
    def noise_share(self) -> float:
        """Expected share of the measured lead that is noise and the selection by it; NaN without a measured lead."""
        return 1 - self.expected / self.observed if self.observed > 0 else math.nan


def lead_from_seeds(losses: ArrayLike) -> Lead:
    """The lead of the best over the second best of k configurations, each trained on the same n seeds: losses [k, n].

    Model: loss_ij = theta_i + seed_j + noise_ij, noise ~ N(0, s^2), theta_i ~ N(mu, tau^2). s^2 is pooled: the squares
    that neither the configuration's mean nor the seed's mean explains, over their (k - 1)(n - 1) degrees of freedom.
    The standard error of the lead is sqrt(2 s^2 / n). Empirical Bayes: a difference of means shrinks by 1 - w,
    w = (s^2 / n) / (s^2 / n + tau^2), to its expectation, and has the standard deviation sqrt(2 (1 - w) s^2 / n) about
    it. That answers for the selection, too: the prior says how far apart configurations are before one looks. As few
    configurations say little about tau, w is not plugged in but averaged over, under the prior that is uniform in w
    (Daniels 1999, Canadian J. Statistics 27, 567): given s^2, w is a gamma variable of shape (m + 1) / 2 cut off at 1,
    with m the configurations that tau is seen in. Those are the better half, at least 4: losses crowd at a floor, and
    the far ones would say that all are far apart.

    Assumed: that those are normal. Simulated, k = 6, n = 3, spreads of 0.2 to 2 s: with normal losses the measured lead is
    too large by 31 % of itself, the shrunken one too small by 12 % of that, and probabilities are right to 0.04. With a
    quadratic bowl of one parameter 66 %, too large by 13 %, 0.08. If a rung below, as noisy, had chosen most of them from
    such a bowl, 88 %, still too large by 27 %, and 0.9 means 0.7: only fresh seeds tell then.

    ValueError for fewer than 2 configurations or seeds, or a loss that is not finite.
    """
    from scipy.special import gammainc, gammaincinv, ndtr
    from scipy.stats import chi2

    y = np.asarray(losses, float)
    if y.ndim != 2 or min(y.shape) < 2 or not np.isfinite(y).all():
        raise ValueError(
            f"a lead needs finite losses of at least 2 configurations on at least 2 seeds, got shape {y.shape}"
        )
    k, n = y.shape
    means = y.mean(1)
    near = np.sort(means)[: max(4, (k + 1) // 2)]
    observed = float(near[1] - near[0])
    rest = y - means[:, None] - y.mean(0) + y.mean()
    degrees = (k - 1) * (n - 1)
    noise = float((rest**2).sum()) / degrees
    error = math.sqrt(2 * noise / n)
    if observed == 0:
        return Lead(0.0, 0.0, error, 0.5)
    if error < 1e-12 * observed:  # the trainer gives every seed the same
        return Lead(observed, observed, error, 1.0)
    u = (np.arange(NODES) + 0.5) / NODES
    v = noise / n * degrees / chi2.ppf(u, degrees)  # variance of a mean: equally likely by the residuals alone
    shape, rate = (near.size + 1) / 2, ((near - near.mean()) ** 2).sum() / (2 * v)
    below = gammainc(shape, rate)
    weight = v * below / (v * below).sum()  # and by the means
    w = gammaincinv(shape, below[:, None] * u) / rate[:, None]  # [v, u]
    shrunk = observed * (1 - float(weight @ w.mean(1)))
    sure = ndtr(np.sqrt((1 - w) / (2 * v[:, None])) * observed)
    return Lead(observed, shrunk, error, float(weight @ sure.mean(1)))


def lead_from_model(difference: tuple[float, float], observed: float = math.nan) -> Lead:
    """The same from a model's posterior mean and standard deviation of the lead."""
    from scipy.special import ndtr

    mean, sd = difference
    probability = float(ndtr(mean / sd)) if sd > 0 else 0.5 + 0.5 * float(np.sign(mean))
    return Lead(observed, mean, sd, probability)


# Who is compared


class Contender(BaseModel):
    """Settings, and their number when the record has them."""

    model_config = ConfigDict(frozen=True)
    params: dict[str, Any]
    config: int | None
    loss: float | None  # in the record at the largest run, when it has finished there

    def __str__(self) -> str:
        return f"{'new settings' if self.config is None else f'configuration {self.config}'} ({words(self.params)})"


def largest(search: Search) -> Fidelity:
    """The largest proxy at its largest token count."""
    return Fidelity(search.sizes[-1], search.ladder.levels[-1])


def contenders(search: Search, best: dict[str, Any], against: int | None = None) -> tuple[Contender, Contender]:
    """The search's answer, and the best other settings of the record at the highest fidelity (largest N, then D).

    Other: at least 2 % of its range away in some parameter, because a model's answer often lies just beside a run.
    best: what search.best() says. against: a configuration's number, instead of the best other. ValueError when there is no such configuration, it has
    the answer's settings, or nothing else has run.
    """
    top = largest(search)
    ran = sorted(
        (t for t in outcomes(search) if t.value is not None),
        key=lambda t: (-t.user_attrs["N"], -t.user_attrs["tokens"], t.value, t.number),
    )

    cube = Cube(search.space)

    def apart(trial: FrozenTrial, params: dict[str, Any]) -> float:
        return float(np.abs(cube.unit(trial.params) - cube.unit(params)).max())

    def made(params: dict[str, Any]) -> Contender:
        own = [t for t in ran if apart(t, params) < ROUNDING]
        there = [t.value for t in own if (t.user_attrs["N"], t.user_attrs["tokens"]) == (top.N, top.D)]
        return Contender(
            params=settings(search, own[0]) if own else params,
            config=config_of(own[0]) if own else None,
            loss=there[0] if there else None,
        )

    answer = made(best)
    others = [t for t in ran if apart(t, answer.params) > NEAR]
    if against is not None:
        known = sorted({config_of(t) for t in others})
        others = [t for t in others if config_of(t) == against]
        if not others:
            raise ValueError(
                f"needed a configuration with a finite loss and other settings than the answer's, got {against}: "
                f"there are {', '.join(map(str, known)) or 'none'}"
            )
    if not others:
        raise ValueError(
            "nothing to compare the answer with: no run with other settings has finished with a finite loss"
        )
    return answer, made(settings(search, others[0]))


def settings(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    """A trial's searched parameters, in the space's order."""
    return {name: trial.params[name] for name in search.space}


def lead_in_words(search: Search, best: dict[str, Any], name: str) -> str:
    """What the record says of the winner's lead, and how much of that to believe; `name` is the study's."""
    top = largest(search)
    said = []
    table = seeds_of_top_rung(search)
    if len(table) >= 2 and len(next(iter(table.values()))) >= 2:
        lead = lead_from_seeds(list(table.values()))
        first, second = sorted(table, key=lambda c: float(np.mean(table[c])))[:2]
        said.append(
            f"the record: configuration {first} leads configuration {second} by {lead.observed:.4f} nats at {at(top)}; "
            f"standard error {lead.error:.4f} from {len(next(iter(table.values())))} seeds each of {len(table)} "
            f"configurations\n  {believe(lead)} (empirical Bayes; too sure where a lower rung chose them: "
            f"`hpo confirm {name}` tells)"
        )
    try:
        answer, rival = contenders(search, best)
    except ValueError as error:
        return "\n".join([*said, f"no lead: {error}"])
    difference = getattr(search.study.sampler, "difference", None)
    measured = math.nan if answer.loss is None or rival.loss is None else rival.loss - answer.loss
    for fidelity in dict.fromkeys((search.target, top)):
        posterior = difference and difference(search.study, search.space, answer.params, rival.params, fidelity)
        if posterior is None:
            continue
        lead = lead_from_model(posterior, measured if fidelity == top else math.nan)
        found = f"; measured {measured:.4f}" if math.isfinite(lead.observed) else ""
        beyond = "" if fidelity == search.target else ", whose optimum may be another than the target's,"
        said.append(
            f"the model: at {at(fidelity)}{beyond} this leads {rival} by {lead.expected:.4f} +- {lead.error:.4f} "
            f"nats{found}\n  {believe(lead)}"
        )
    if not said:
        found = f" ({measured:.4f} nats)" if math.isfinite(measured) else ""
        said.append(
            f"one seed per configuration cannot tell how much of the lead{found} over {rival} is noise; "
            f"`hpo confirm {name}` can, by training both on fresh seeds"
        )
    return "\n".join(said)


def believe(lead: Lead) -> str:
    said = f"truly better with probability {lead.probability:.2f}"
    if 0 <= lead.noise_share <= 1:
        said += (
            f"; {lead.noise_share:.0%} of the lead is expected to be noise, {lead.expected:.4f} to be left on new seeds"
        )
    return said


def at(fidelity: Fidelity) -> str:
    return f"N {fidelity.N:,.0f}, D {fidelity.D:,.0f}"


def seeds_of_top_rung(search: Search) -> dict[int, list[float]]:
    """The losses by seed of each configuration that finished the largest run on more than one."""
    top = largest(search)
    return {
        config_of(t): t.user_attrs["losses"]
        for t in outcomes(search)
        if t.value is not None
        and (t.user_attrs["N"], t.user_attrs["tokens"]) == (top.N, top.D)
        and len(t.user_attrs.get("losses") or []) > 1
    }


# What came of it


@dataclass(frozen=True)
class Side:
    """One of the two: its settings and its losses on the fresh seeds (None: diverged)."""

    params: dict[str, Any]
    config: int | None
    losses: list[float | None]
    interval: Interval | None  # None when any diverged


@dataclass(frozen=True)
class Confirmation:
    """The two on the same fresh seeds."""

    N: float
    D: int
    seeds: int
    answer: Side
    rival: Side
    difference: (
        Interval | None
    )  # runner-up less answer, paired by seed: positive when the lead held. None: any diverged
    search_lead: float | None  # the same in the search's own record, when it has both at this size
    held: Literal["yes", "no", "undecided"]
    verdict: str


def confirmation(
    answer: Contender, rival: Contender, fidelity: Fidelity, losses: Sequence[float], rival_losses: Sequence[float]
) -> Confirmation:
    """The outcome from the losses by seed, NaN where diverged, in the same order of seeds. At least 2 seeds."""
    a, b = np.asarray(losses, float), np.asarray(rival_losses, float)
    bad_a, bad_b = int(np.isnan(a).sum()), int(np.isnan(b).sum())
    n = a.size
    difference = None
    held: Literal["yes", "no", "undecided"] = "undecided"
    if bad_a and bad_b:
        verdict = f"undecided: both diverged, the answer on {bad_a} and the runner-up on {bad_b} of {n} fresh seeds"
    elif bad_a or bad_b:
        held = "no" if bad_a else "yes"
        who, count = ("answer", bad_a) if bad_a else ("runner-up", bad_b)
        verdict = f"the lead {'did not hold' if bad_a else 'held'}: the {who} diverged on {count} of {n} fresh seeds"
    else:
        difference = t_interval(b - a)
        spread = f"(95 % interval {difference.low:.4f} to {difference.high:.4f})"
        if difference.low > 0:
            held, verdict = "yes", f"the lead held: {difference.mean:.4f} nats on {n} fresh seeds {spread}"
        elif difference.high < 0:
            held = "no"
            verdict = f"the lead did not hold: the runner-up is {-difference.mean:.4f} nats better on {n} fresh seeds {spread}"
        else:
            verdict = (
                f"undecided: the lead is {difference.mean:.4f} nats on {n} fresh seeds {spread}, which cannot be told "
                "from zero: take either, or use more seeds"
            )
    return Confirmation(
        N=fidelity.N,
        D=int(fidelity.D),
        seeds=n,
        answer=_side(answer, a),
        rival=_side(rival, b),
        difference=difference,
        search_lead=None if answer.loss is None or rival.loss is None else rival.loss - answer.loss,
        held=held,
        verdict=verdict,
    )


def _side(contender: Contender, losses: np.ndarray[Any, np.dtype[np.float64]]) -> Side:
    finite = np.isfinite(losses)
    return Side(
        contender.params,
        contender.config,
        [float(x) if ok else None for x, ok in zip(losses, finite, strict=True)],
        t_interval(losses) if finite.all() else None,
    )


def is_of(value: Mapping[str, Any], search: Search, best: dict[str, Any]) -> bool:
    """Whether a kept confirmation is of this answer, at today's largest run."""
    top, cube = largest(search), Cube(search.space)
    moved = float(np.abs(cube.unit(value["answer"]["params"]) - cube.unit(best)).max())
    return (value["N"], value["D"]) == (top.N, top.D) and moved <= NEAR


def in_words(value: Mapping[str, Any]) -> str:
    """A kept confirmation as lines."""
    lines = [f"on {value['seeds']} fresh seeds at {at(Fidelity(value['N'], value['D']))}:"]
    for who, side in (("answer", value["answer"]), ("runner-up", value["rival"])):
        bad = sum(x is None for x in side["losses"])
        i = side["interval"]
        loss = (
            f"diverged on {bad}"
            if i is None
            else f"loss {i['mean']:.4f} (95 % interval {i['low']:.4f} to {i['high']:.4f})"
        )
        lines.append(f"  {who:<10}{words(side['params'])}  {loss}")
    if value["search_lead"] is not None:
        lines.append(f"  the search's own runs had a lead of {value['search_lead']:.4f}")
    return "\n".join([*lines, value["verdict"]])
