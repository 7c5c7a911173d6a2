"""How much of the answer's lead is noise: what the record says, and the verdict of a confirmation.

Settings that were selected by their losses on some seeds look better on those seeds than on others ("Hyperparameters in
Reinforcement Learning and How To Tune Them", Eimer, Lindauer, Raileanu 2023, arXiv 2306.01324): tune on some seeds,
report on others. `hpo.confirm.runs` trains the answer and its runner-up again.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpo.confirm.contenders import SAME_SETTINGS_DISTANCE, Contender, choose_contenders
from hpo.confirm.statistics import (
    Interval,
    Lead,
    compute_t_interval,
    estimate_lead_from_model,
    estimate_lead_from_seeds,
)
from hpo.launch.progress import format_params
from hpo.samplers.protocols import ComparingSampler
from hpo.samplers.unit_cube import Cube
from hpo.storage.trial_attributes import read_config
from hpo.study.answer import SearchAnswer, find_largest_run
from hpo.study.mlflow_run import list_outcomes
from scaling.common.arrays import Array
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.search.search import Search

# Width of the output in the terminal.
LINE_LENGTH = 80
# Whether the answer's lead held on fresh seeds.
Held = Literal["yes", "no", "undecided"]


def describe_answer(search: Search, answer: SearchAnswer, study: str) -> str:
    """Return the answer of a search, and what it is: measured, or extrapolated to the target by the model.

    Args:
        search: The search.
        answer: Its answer.
        study: The study's name, for the command that the text suggests.

    Returns:
        A few lines for the terminal.
    """
    if answer.is_measured:
        lines = [f"best measured settings, at the largest run ({format_fidelity(find_largest_run(search))}):"]
    else:
        lines = [f"best settings for the target, {format_fidelity(search.target)}:"]
    width = max(map(len, answer.params))
    for name, value in answer.params.items():
        lines.append(f"  {name:<{width}} = " + (f"{value:.4g}" if isinstance(value, float) else str(value)))
    if answer.is_measured:
        text = (
            f"For the target the model has {format_params(answer.extrapolated)}, but gives these a probability of "
            f"{answer.probability:.2f} of being better at the largest run, so they are not the answer."
        )
        lines += textwrap.wrap(text, LINE_LENGTH)
    elif search.settings.plan is not None:
        lines.append(f"By the law of the planned runs; `scaling recommend {study} --target` has its intervals.")
    elif answer.is_beyond:
        lines.append("Extrapolated from the largest run by the search's model.")
    # A law needs the learning rate as a searched parameter.
    if answer.is_beyond and "lr" in search.space and search.settings.plan is None:
        verb = "Use" if answer.is_measured else "Compare with"
        lines.append(f"{verb} `scaling recommend {study} --target`, which extrapolates by a law.")
    return "\n".join(lines)


def describe_lead(search: Search, best: dict[str, Any], study: str) -> str:
    """Return what the record says about the answer's lead, and how much of it to believe.

    Args:
        search: The search.
        best: The settings of its answer, see `hpo.study.answer`.
        study: The study's name, for the command that the text suggests.

    Returns:
        A few lines for the terminal.
    """
    largest = find_largest_run(search)
    paragraphs = []
    losses = read_top_rung_losses(search)
    if len(losses) >= 2 and len(next(iter(losses.values()))) >= 2:
        paragraphs.append(_describe_lead_of_seeds(losses, largest, study))
    try:
        answer, rival = choose_contenders(search, best)
    except ValueError as error:
        return "\n".join([*paragraphs, f"no lead: {error}"])
    measured = math.nan if answer.loss is None or rival.loss is None else rival.loss - answer.loss
    paragraphs += _describe_lead_of_model(search, answer, rival, measured)
    if not paragraphs:
        value = f": {measured:.4f} nats" if math.isfinite(measured) else ""
        paragraphs.append(
            f"lead over {rival}{value}\n"
            "  one seed per configuration does not show how much of it is noise;\n"
            f"  `hpo confirm {study}` does, by training both on fresh seeds"
        )
    return "\n".join(paragraphs)


def _describe_lead_of_seeds(losses: Mapping[int, list[float]], largest: Fidelity, study: str) -> str:
    """Return what the losses of several seeds at the largest run say about the lead."""
    lead = estimate_lead_from_seeds(list(losses.values()))
    first, second = sorted(losses, key=lambda config: float(np.mean(losses[config])))[:2]
    seeds = len(next(iter(losses.values())))
    return (
        f"lead by the record at {format_fidelity(largest)}, {seeds} seeds each of {len(losses)} configurations:\n"
        f"  configuration {first} leads configuration {second} by {lead.observed:.4f} nats, "
        f"standard error {lead.error:.4f}\n"
        f"  {format_probability(lead)}\n"
        "  (empirical Bayes; overconfident if a lower rung selected these configurations:\n"
        f"  `hpo confirm {study}` checks it)"
    )


def _describe_lead_of_model(search: Search, answer: Contender, rival: Contender, measured: float) -> list[str]:
    """Return what the sampler's model says about the lead, as lines; none without a model."""
    sampler, largest = search.study.sampler, find_largest_run(search)
    if not isinstance(sampler, ComparingSampler):
        return []
    lines = []
    for fidelity in dict.fromkeys((search.target, largest)):
        posterior = sampler.difference(search.study, search.space, answer.params, rival.params, fidelity)
        if posterior is None:
            continue
        lead = estimate_lead_from_model(posterior, measured if fidelity == largest else math.nan)
        value = f"; measured {measured:.4f}" if math.isfinite(lead.observed) else ""
        place = "target" if fidelity == search.target else "largest run"
        lines.append(
            f"  at the {place} ({format_fidelity(fidelity)}): {lead.expected:.4f} +- {lead.error:.4f} nats{value}"
        )
        lines.append(f"    {format_probability(lead)}")
        if fidelity != search.target:
            lines.append("    (its optimum may differ from the target's)")
    return [f"lead over {rival}, by the model:", *lines] if lines else []


def format_probability(lead: Lead) -> str:
    """Return how much of a lead to believe, as part of a line of output."""
    text = f"better with probability {lead.probability:.2f}"
    if 0 <= lead.noise_share <= 1:
        text += (
            f"; {lead.noise_share:.0%} of the lead is expected to be noise,\n"
            f"    which leaves {lead.expected:.4f} nats on new seeds"
        )
    return text


def format_fidelity(fidelity: Fidelity) -> str:
    """Return N and D in one phrase: `N 4,944, D 24,576`."""
    return f"N {fidelity.N:,.0f}, D {fidelity.D:,.0f}"


def describe_correlations(correlations: Mapping[Fidelity, float]) -> str:
    """Return how well the losses of each rung predict those of the target, as a table for the terminal."""
    n_width = max(len(f"{at.N:,.0f}") for at in correlations)
    d_width = max(len(f"{at.D:,.0f}") for at in correlations)
    lines = ["correlation of losses with the target's, by the model:", f"  {'N':>{n_width}}  {'D':>{d_width}}"]
    for at, correlation in correlations.items():
        remark = "" if correlation > 0.5 else "  weak" if correlation > 0.1 else "  misleading"
        lines.append(f"  {at.N:>{n_width},.0f}  {at.D:>{d_width},.0f}  {correlation:.2f}{remark}")
    return "\n".join(lines)


def read_top_rung_losses(search: Search) -> dict[int, list[float]]:
    """Return the losses by seed of each configuration that finished the largest run on more than one seed."""
    largest = find_largest_run(search)
    return {
        read_config(t): t.user_attrs["losses"]
        for t in list_outcomes(search)
        if t.value is not None
        and (t.user_attrs["N"], t.user_attrs["tokens"]) == (largest.N, largest.D)
        and len(t.user_attrs.get("losses") or []) > 1
    }


@dataclass(frozen=True)
class ContenderResult:
    """The result of one contender of a confirmation.

    Attributes:
        params: The searched parameters.
        config: The number of their configuration; None if no trial of the search has trained them.
        losses: The losses on the fresh seeds; None where the run diverged.
        interval: Their mean and 95 % interval; None if any run diverged.
    """

    params: dict[str, Any]
    config: int | None
    losses: list[float | None]
    interval: Interval | None


@dataclass(frozen=True)
class Confirmation:
    """The result of a confirmation: both contenders on the same fresh seeds. Its fields are stored as JSON.

    Attributes:
        N: Parameters of the proxy.
        D: Tokens of each run.
        seeds: How many fresh seeds.
        answer: The result of the search's answer.
        rival: The result of the runner-up.
        difference: Loss of the runner-up minus loss of the answer, paired by seed, so positive if the lead held. None
            if any run diverged.
        search_lead: The same difference in the search's own record; None if it has not both at this size.
        held: Whether the lead held.
        verdict: The same in a sentence.
    """

    N: float
    D: int
    seeds: int
    answer: ContenderResult
    rival: ContenderResult
    difference: Interval | None
    search_lead: float | None
    held: Held
    verdict: str

    @property
    def fidelity(self) -> Fidelity:
        """N and D of the runs."""
        return Fidelity(self.N, self.D)


def compare_losses(
    answer: Contender, rival: Contender, fidelity: Fidelity, losses: Sequence[float], rival_losses: Sequence[float]
) -> Confirmation:
    """Return the verdict of a confirmation.

    Args:
        answer: The search's answer.
        rival: The runner-up.
        fidelity: N and D of the runs.
        losses: Losses of the answer by seed, NaN where it diverged. At least 2.
        rival_losses: Losses of the runner-up, in the same order of seeds.

    Returns:
        The confirmation.
    """
    a, b = np.asarray(losses, float), np.asarray(rival_losses, float)
    diverged, rival_diverged = int(np.isnan(a).sum()), int(np.isnan(b).sum())
    difference = None if diverged or rival_diverged else compute_t_interval(b - a)
    held: Held
    if difference is None:
        held, verdict = _judge_divergence(diverged, rival_diverged, a.size)
    else:
        held, verdict = _judge_difference(difference, a.size)
    return Confirmation(
        N=fidelity.N,
        D=int(fidelity.D),
        seeds=a.size,
        answer=_summarize_losses(answer, a),
        rival=_summarize_losses(rival, b),
        difference=difference,
        search_lead=None if answer.loss is None or rival.loss is None else rival.loss - answer.loss,
        held=held,
        verdict=verdict,
    )


def _judge_divergence(diverged: int, rival_diverged: int, seeds: int) -> tuple[Held, str]:
    """Return the verdict when some runs diverged."""
    if diverged and rival_diverged:
        verdict = (
            f"undecided: both diverged, the answer on {diverged} and the runner-up on {rival_diverged} of {seeds} "
            "fresh seeds"
        )
        return "undecided", verdict
    if diverged:
        return "no", f"the lead did not hold: the answer diverged on {diverged} of {seeds} fresh seeds"
    return "yes", f"the lead held: the runner-up diverged on {rival_diverged} of {seeds} fresh seeds"


def _judge_difference(difference: Interval, seeds: int) -> tuple[Held, str]:
    """Return the verdict from the paired difference."""
    spread = f"(95 % interval {difference.low:.4f} to {difference.high:.4f})"
    if difference.low > 0:
        return "yes", f"the lead held: {difference.mean:.4f} nats on {seeds} fresh seeds {spread}"
    if difference.high < 0:
        better = f"the runner-up is {-difference.mean:.4f} nats better on {seeds} fresh seeds"
        return "no", f"the lead did not hold: {better} {spread}"
    verdict = (
        f"undecided: the lead is {difference.mean:.4f} nats on {seeds} fresh seeds {spread}, which cannot be "
        "distinguished from zero: take either, or use more seeds"
    )
    return "undecided", verdict


def _summarize_losses(contender: Contender, losses: Array) -> ContenderResult:
    finite = np.isfinite(losses)
    return ContenderResult(
        contender.params,
        contender.config,
        [float(x) if ok else None for x, ok in zip(losses, finite, strict=True)],
        compute_t_interval(losses) if finite.all() else None,
    )


def is_current(confirmation: Confirmation, search: Search, best: dict[str, Any]) -> bool:
    """Return whether a confirmation is about the search's present answer at its present largest run.

    Args:
        confirmation: A stored confirmation.
        search: The search.
        best: The settings of its answer, see `hpo.study.answer`.
    """
    cube = Cube(search.space)
    distance = float(np.abs(cube.to_unit(confirmation.answer.params) - cube.to_unit(best)).max())
    return confirmation.fidelity == find_largest_run(search) and distance <= SAME_SETTINGS_DISTANCE


def describe_confirmation(confirmation: Confirmation) -> str:
    """Return a confirmation as a few lines for the terminal."""
    lines = [f"on {confirmation.seeds} fresh seeds at {format_fidelity(confirmation.fidelity)}:"]
    for name, result in (("answer", confirmation.answer), ("runner-up", confirmation.rival)):
        interval = result.interval
        if interval is None:
            loss = f"diverged on {sum(x is None for x in result.losses)}"
        else:
            loss = f"loss {interval.mean:.4f} (95 % interval {interval.low:.4f} to {interval.high:.4f})"
        lines += [f"  {name:<9}  {format_params(result.params)}", f"             {loss}"]
    if confirmation.search_lead is not None:
        lines.append(f"  lead in the search's own runs: {confirmation.search_lead:.4f} nats")
    return "\n".join([*lines, *textwrap.wrap(confirmation.verdict, LINE_LENGTH)])
