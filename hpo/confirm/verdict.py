"""Describe how much of the winner's lead is noise, from the record and from a confirmation.

Settings that were chosen by their losses on some seeds look better on those seeds than on others ("Hyperparameters in
Reinforcement Learning and How To Tune Them", Eimer, Lindauer, Raileanu 2023, arXiv 2306.01324). So tune on some seeds
and report on others: hpo.confirm.runs trains the answer and its runner-up again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpo.confirm.contenders import SAME_SETTINGS_DISTANCE, Contender, choose_contenders, find_largest_run
from hpo.confirm.statistics import (
    Interval,
    Lead,
    compute_t_interval,
    estimate_lead_from_model,
    estimate_lead_from_seeds,
)
from hpo.launch.progress import format_params
from hpo.samplers.unit_cube import Cube
from hpo.storage.trial_attributes import read_config
from hpo.study.mlflow_run import list_outcomes
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.search.search import Search


def describe_lead(search: Search, best: dict[str, Any], name: str) -> str:
    """Describe the winner's lead in the record, and how credible it is.

    Args:
        search: The search.
        best: The answer, from `search.best()`.
        name: The study's name, for the commands in the text.

    Returns:
        A few lines.
    """
    top = find_largest_run(search)
    lines = []
    table = read_top_rung_losses(search)
    if len(table) >= 2 and len(next(iter(table.values()))) >= 2:
        lead = estimate_lead_from_seeds(list(table.values()))
        first, second = sorted(table, key=lambda c: float(np.mean(table[c])))[:2]
        lines.append(
            f"the record: configuration {first} leads configuration {second} by {lead.observed:.4f} nats at "
            f"{format_fidelity(top)}; "
            f"standard error {lead.error:.4f} from {len(next(iter(table.values())))} seeds each of {len(table)} "
            f"configurations\n  {describe_probability(lead)} (empirical Bayes; overconfident if a lower rung "
            f"chose them: see `hpo confirm {name}`)"
        )
    try:
        answer, rival = choose_contenders(search, best)
    except ValueError as error:
        return "\n".join([*lines, f"no lead: {error}"])
    difference = getattr(search.study.sampler, "difference", None)
    measured = math.nan if answer.loss is None or rival.loss is None else rival.loss - answer.loss
    for fidelity in dict.fromkeys((search.target, top)):
        posterior = difference and difference(search.study, search.space, answer.params, rival.params, fidelity)
        if posterior is None:
            continue
        lead = estimate_lead_from_model(posterior, measured if fidelity == top else math.nan)
        measurement = f"; measured {measured:.4f}" if math.isfinite(lead.observed) else ""
        beyond = "" if fidelity == search.target else ", whose optimum may differ from the target's,"
        lines.append(
            f"the model: at {format_fidelity(fidelity)}{beyond} this leads {rival} by {lead.expected:.4f} "
            f"+- {lead.error:.4f} "
            f"nats{measurement}\n  {describe_probability(lead)}"
        )
    if not lines:
        measurement = f" ({measured:.4f} nats)" if math.isfinite(measured) else ""
        lines.append(
            f"one seed per configuration does not show how much of the lead{measurement} over {rival} is noise; "
            f"`hpo confirm {name}` trains both with fresh seeds"
        )
    return "\n".join(lines)


def describe_probability(lead: Lead) -> str:
    """Describe how likely a lead is real, and how much of it is expected to remain."""
    text = f"truly better with probability {lead.probability:.2f}"
    if 0 <= lead.noise_share <= 1:
        text += (
            f"; {lead.noise_share:.0%} of the lead is expected to be noise, {lead.expected:.4f} to remain on new seeds"
        )
    return text


def format_fidelity(fidelity: Fidelity) -> str:
    """Format N and D as text."""
    return f"N {fidelity.N:,.0f}, D {fidelity.D:,.0f}"


def read_top_rung_losses(search: Search) -> dict[int, list[float]]:
    """Return the losses by seed of each configuration that finished the largest run on more than one seed."""
    top = find_largest_run(search)
    return {
        read_config(t): t.user_attrs["losses"]
        for t in list_outcomes(search)
        if t.value is not None
        and (t.user_attrs["N"], t.user_attrs["tokens"]) == (top.N, top.D)
        and len(t.user_attrs.get("losses") or []) > 1
    }


@dataclass(frozen=True)
class ContenderResult:
    """One side of a confirmation.

    Attributes:
        params: Its settings.
        config: Its number in the record, or None.
        losses: Its losses on the fresh seeds; None where it diverged.
        interval: Their mean with its interval; None if any diverged.
    """

    params: dict[str, Any]
    config: int | None
    losses: list[float | None]
    interval: Interval | None


@dataclass(frozen=True)
class Confirmation:
    """The answer and its runner-up on the same fresh seeds.

    Attributes:
        N: Parameters of the model.
        D: Tokens of each run.
        seeds: The number of seeds.
        answer: The search's answer.
        rival: The runner-up.
        difference: The runner-up's loss minus the answer's, paired by seed: positive if the lead held. None if any
            diverged.
        search_lead: The same difference in the search's own record, if it has both at this size.
        held: Whether the lead held.
        verdict: The outcome as a sentence.
    """

    N: float
    D: int
    seeds: int
    answer: ContenderResult
    rival: ContenderResult
    difference: Interval | None
    search_lead: float | None
    held: Literal["yes", "no", "undecided"]
    verdict: str


def compare_losses(
    answer: Contender, rival: Contender, fidelity: Fidelity, losses: Sequence[float], rival_losses: Sequence[float]
) -> Confirmation:
    """Compare the answer with its runner-up.

    Args:
        answer: The search's answer.
        rival: The runner-up.
        fidelity: The size of each run.
        losses: The answer's losses by seed, NaN where it diverged; at least 2.
        rival_losses: The runner-up's, on the same seeds.

    Returns:
        The outcome.
    """
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
        difference = compute_t_interval(b - a)
        spread = f"(95 % interval {difference.low:.4f} to {difference.high:.4f})"
        if difference.low > 0:
            held, verdict = "yes", f"the lead held: {difference.mean:.4f} nats on {n} fresh seeds {spread}"
        elif difference.high < 0:
            held = "no"
            gain = f"{-difference.mean:.4f} nats better on {n} fresh seeds {spread}"
            verdict = f"the lead did not hold: the runner-up is {gain}"
        else:
            verdict = (
                f"undecided: the lead is {difference.mean:.4f} nats on {n} fresh seeds {spread}, which cannot be "
                "distinguished from zero: use either, or more seeds"
            )
    return Confirmation(
        N=fidelity.N,
        D=int(fidelity.D),
        seeds=n,
        answer=_summarize_losses(answer, a),
        rival=_summarize_losses(rival, b),
        difference=difference,
        search_lead=None if answer.loss is None or rival.loss is None else rival.loss - answer.loss,
        held=held,
        verdict=verdict,
    )


def _summarize_losses(contender: Contender, losses: np.ndarray[Any, np.dtype[np.float64]]) -> ContenderResult:
    finite = np.isfinite(losses)
    return ContenderResult(
        contender.params,
        contender.config,
        [float(x) if ok else None for x, ok in zip(losses, finite, strict=True)],
        compute_t_interval(losses) if finite.all() else None,
    )


def is_current(value: Mapping[str, Any], search: Search, best: dict[str, Any]) -> bool:
    """Return whether a stored confirmation is of this answer at the present largest run."""
    top, cube = find_largest_run(search), Cube(search.space)
    distance = float(np.abs(cube.to_unit(value["answer"]["params"]) - cube.to_unit(best)).max())
    return (value["N"], value["D"]) == (top.N, top.D) and distance <= SAME_SETTINGS_DISTANCE


def describe_confirmation(value: Mapping[str, Any]) -> str:
    """Format a stored confirmation as lines of text."""
    lines = [f"on {value['seeds']} fresh seeds at {format_fidelity(Fidelity(value['N'], value['D']))}:"]
    for who, side in (("answer", value["answer"]), ("runner-up", value["rival"])):
        bad = sum(x is None for x in side["losses"])
        i = side["interval"]
        loss = (
            f"diverged on {bad}"
            if i is None
            else f"loss {i['mean']:.4f} (95 % interval {i['low']:.4f} to {i['high']:.4f})"
        )
        lines.append(f"  {who:<10}{format_params(side['params'])}  {loss}")
    if value["search_lead"] is not None:
        lines.append(f"  the search's own runs had a lead of {value['search_lead']:.4f}")
    return "\n".join([*lines, value["verdict"]])
