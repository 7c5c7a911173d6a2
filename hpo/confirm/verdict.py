"""How much of the winner's lead is noise: the arithmetic, what the record says of it, and the outcome of a confirmation.

Settings that were chosen by their losses on some seeds look better on those seeds than on others ("Hyperparameters in
Reinforcement Learning and How To Tune Them", Eimer, Lindauer, Raileanu 2023, arXiv 2306.01324): tune on some, report on
others. hpo.confirm.runs trains the answer and its runner-up again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpo.confirm.contenders import NEAR, Contender, contenders, largest
from hpo.confirm.statistics import Interval, Lead, lead_from_model, lead_from_seeds, t_interval
from hpo.launch.progress import words
from hpo.samplers.unit_cube import Cube
from hpo.storage.trial_attributes import config_of
from hpo.study.mlflow_run import outcomes
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.search.search import Search


# The arithmetic


# Who is compared


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
