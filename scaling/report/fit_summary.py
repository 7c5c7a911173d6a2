"""Fit every law to a run table and show how far each can be trusted: what `scaling fit` prints."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pandas as pd

from scaling.common.quantities import format_count
from scaling.fitting.envelope import compare_approaches, make_approaches_table
from scaling.fitting.forms import compare_forms
from scaling.fitting.loss_law import FitError
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law, fit_loss_floors
from scaling.runs.table import usable

# The probability that each interval here holds.
INTERVAL_MASS = 0.9
BOOTSTRAP_SAMPLES = 400
# (N, D) groups that a loss law needs.
MIN_GROUPS = 3
LAW_SYMBOLS = ("E", "A", "B", "alpha", "beta")
# Of printed lines, in columns.
LINE_WIDTH = 80


class GroupOptimum(TypedDict):
    """The best settings of one (N, D) group by the fitted law.

    Attributes:
        lr: Peak learning rate, at base width.
        lr_interval: Its 90 % interval.
        batch_tokens: Tokens per optimizer step.
        batch_interval: Its 90 % interval, tokens per step.
    """

    lr: float
    lr_interval: Sequence[float]
    batch_tokens: float
    batch_interval: Sequence[float]


class FitSummary(TypedDict):
    """All fits to one run table, as plain JSON values. A number that does not exist is None.

    Attributes:
        runs: Rows that the laws were fitted to.
        left_out: Rows that they were not fitted to.
        groups: Number of (N, D) groups.
        floors: N, D, loss (the fitted minimum, nats per token), sd and n (runs) of each group.
        hp_law: Coefficients and exponents of the law of learning rate and batch.
        hp_exponents_90: 90 % intervals of its exponents beyond the data.
        hp_law_status: "ok", or what is doubtful about it.
        optima: The best settings of each group, in the order of `floors`.
        loss_law: E, A, B, alpha and beta; None if there is no loss law.
        no_loss_law: Why there is none.
        loss_law_90: 90 % bootstrap intervals of its parameters.
        loss_law_status: "ok", or what is doubtful about it.
        forms: Errors of each form of the loss law, in sample and held out.
        form_chosen: The form with the least held-out error.
        forms_status: "ok", or what is doubtful about the choice.
        approaches: Compute-optimal exponents by each of the three approaches of Hoffmann et al. 2022.
        approaches_at: The compute, in FLOPs, at which the approaches give N and D.
    """

    runs: int
    left_out: int
    groups: int
    floors: list[dict[str, float]]
    hp_law: dict[str, float]
    hp_exponents_90: dict[str, Sequence[float]]
    hp_law_status: str
    optima: list[GroupOptimum]
    loss_law: dict[str, float] | None
    no_loss_law: NotRequired[str]
    loss_law_90: NotRequired[dict[str, Sequence[float]]]
    loss_law_status: NotRequired[str]
    forms: NotRequired[list[dict[str, Any]]]
    form_chosen: NotRequired[str]
    forms_status: NotRequired[str]
    approaches: NotRequired[list[dict[str, Any]]]
    approaches_at: NotRequired[float]


def summarize_fits(runs: pd.DataFrame, *, compare: bool = True) -> FitSummary:
    """Fit every law to a run table.

    Args:
        runs: A checked run table.
        compare: Whether to compare the forms of the loss law and the approaches, too, which takes 0.5 s.

    Returns:
        All fits as JSON values.

    Raises:
        ValueError: If the table is unusable.
    """
    used = usable(runs)
    hp = fit_hp_law(used)
    floors = hp.floors
    summary: dict[str, Any] = {
        "runs": hp.n_runs,
        "left_out": len(runs) - hp.n_runs,
        "groups": len(floors),
        "floors": floors.to_dict("records"),
        "hp_law": vars(hp.law),
        "hp_exponents_90": hp.exponents(INTERVAL_MASS),
        "hp_law_status": hp.status,
        "optima": [_describe_optimum(hp, N, D) for N, D in zip(floors["N"], floors["D"], strict=True)],
        "loss_law": None,
    }
    N, D, loss = (floors[c].to_numpy() for c in ("N", "D", "loss"))
    try:
        if len(floors) < MIN_GROUPS:
            raise FitError(f"needed {MIN_GROUPS} (N, D) groups or more, got {len(floors)}: add runs at other sizes")
        fit, _ = fit_loss_floors(hp, bootstrap=BOOTSTRAP_SAMPLES)
    except FitError as error:
        return _to_json_values(summary | {"no_loss_law": str(error)})
    samples = {p: [getattr(s, p) for s in fit.samples] for p in LAW_SYMBOLS}
    summary |= {
        "loss_law": {p: getattr(fit.law, p) for p in LAW_SYMBOLS},
        "loss_law_90": {p: np.quantile(values, [0.05, 0.95]).tolist() for p, values in samples.items()},
        "loss_law_status": fit.status,
    }
    if compare:
        forms = compare_forms(N, D, loss)
        top = float((6 * N * D).max())
        approaches = make_approaches_table(compare_approaches(N, D, loss), top, INTERVAL_MASS)
        summary |= {
            "forms": forms.table().to_dict("records"),
            "form_chosen": forms.chosen,
            "forms_status": forms.status,
            "approaches": approaches.to_dict("records"),
            "approaches_at": top,
        }
    return _to_json_values(summary)


def format_summary(summary: FitSummary) -> str:
    """Return all fits as text for a terminal of 80 columns."""
    count, groups = summary["runs"], summary["groups"]
    lines = [f"{count} runs in {groups} groups of equal N and D; {summary['left_out']} left out", ""]
    lines += _format_groups(summary)
    lines += ["", *_format_hp_law(summary), ""]
    if summary["loss_law"] is None:
        return "\n".join([*lines, _wrap(f"No loss law: {summary['no_loss_law']}.", 2)])
    lines.append("Loss law: E + A / N^alpha + B / D^beta, with 90 % bootstrap intervals")
    for symbol, (low, high) in summary["loss_law_90"].items():
        lines.append(f"  {symbol:6} {summary['loss_law'][symbol]:<10.4g} ({low:.4g} to {high:.4g})")
    lines.append(_wrap(f"  Status: {summary['loss_law_status']}", 4))
    if "forms" in summary:
        lines += ["", *_format_forms(summary), "", *_format_approaches(summary)]
    return "\n".join(lines)


def _format_groups(summary: FitSummary) -> list[str]:
    lines = [
        "Each group: lowest loss as fitted, in nats per token, and the best settings",
        "by the law (90 % intervals in parentheses)",
        f"{'N':>6}{'D':>8}{'runs':>6}{'loss':>9}   {'learning rate':30}batch in tokens",
    ]
    for floor, best in zip(summary["floors"], summary["optima"], strict=True):
        (lr_low, lr_high), (batch_low, batch_high) = best["lr_interval"], best["batch_interval"]
        lr = f"{best['lr']:.3g} ({lr_low:.3g}–{lr_high:.3g})"
        batch = f"{format_count(best['batch_tokens'])} ({format_count(batch_low)}–{format_count(batch_high)})"
        size = f"{format_count(floor['N']):>6}{format_count(floor['D']):>8}"
        lines.append(f"{size}{floor['n']:>6}{floor['loss']:>9.4f}   {lr:30}{batch}")
    return lines


def _format_hp_law(summary: FitSummary) -> list[str]:
    law, intervals = summary["hp_law"], summary["hp_exponents_90"]
    lines = [
        "Learning rate and batch: lr* ~ N^a D^b, B* ~ N^c D^d, with 90 % intervals of the",
        "exponents beyond the data",
    ]
    for letter, name in zip("abcd", ("lr_N", "lr_D", "batch_N", "batch_D"), strict=True):
        low, high = intervals[name]
        lines.append(f"  {letter}  {law[name]:+.3f} ({low:+.3f} to {high:+.3f})")
    return [*lines, _wrap(f"  Status: {summary['hp_law_status']}", 4)]


def _format_forms(summary: FitSummary) -> list[str]:
    forms = summary["forms"]
    blocks = [k for k in forms[0] if k.startswith("block_")]
    lines = [
        "Forms of the loss law: mean error in %, in sample and on held-out blocks, each",
        "predicted from all groups with less compute",
        f"  {'form':12}{'in sample':>10}" + "".join(f"{k.replace('_', ' '):>10}" for k in blocks) + f"{'held out':>10}",
    ]
    for row in forms:
        errors = "".join(f"{_format_percent(row[k]):>10}" for k in ("in_sample", *blocks, "held_out"))
        mark = "  best form" if row["chosen"] and row["held_out"] is not None else ""
        lines.append(f"  {row['form']:12}{errors}{mark}")
        if row["status"].startswith("Cannot"):
            lines.append(_wrap(f"    {row['status']}", 4))
    lines.append("  Predictions use the average, whichever form is best here.")
    return [*lines, _wrap(f"  Status: {summary['forms_status']}", 4)]


def _format_approaches(summary: FitSummary) -> list[str]:
    lines = [
        "Compute-optimal size: N ~ C^a, D ~ C^b, with 90 % intervals",
        f"  {'approach':10}{'a':24}{'b':24}N at {summary['approaches_at']:.3g} FLOPs",
    ]
    for row in summary["approaches"]:
        if row.get("N_exponent") is None:
            lines.append(_wrap(f"  {row['approach']:10}not available: {row['status']}", 4))
            continue
        exponents = "".join(f"{_format_exponent(row, f'{symbol}_exponent'):24}" for symbol in "ND")
        lines.append(f"  {row['approach']:10}{exponents}{format_count(row['N_opt'])}")
        if row["status"] != "ok":
            lines.append(_wrap(f"    {row['status']}", 4))
    return lines


def _wrap(text: str, indent: int) -> str:
    """Wrap text to LINE_WIDTH, with so many spaces before all lines but the first."""
    return textwrap.fill(text, LINE_WIDTH, subsequent_indent=" " * indent, break_long_words=False)


def _describe_optimum(hp: HPFit, N: float, D: float) -> GroupOptimum:
    lr, batch = (float(v) for v in hp.law(N, D))
    lr_interval, batch_interval = hp.interval(N, D, INTERVAL_MASS)
    return {"lr": lr, "lr_interval": lr_interval, "batch_tokens": batch, "batch_interval": batch_interval}


def _format_percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _format_exponent(row: Mapping[str, Any], name: str) -> str:
    """Return a value and its interval, with "?" for what does not exist."""
    value, low, high = ("?" if row[key] is None else f"{row[key]:.3f}" for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} ({low} to {high})"


def _to_json_values(summary: dict[str, Any]) -> FitSummary:
    """Return plain JSON values, with None for numbers that do not exist."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: convert(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [convert(v) for v in value]
        if value is pd.NA:
            return None
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return cast(FitSummary, convert(summary))
