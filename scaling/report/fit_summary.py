"""Fit every law to a run table and show how far each can be trusted: what `scaling fit` prints."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pandas as pd

from scaling.advice.budgets import assign_budgets, find_point_compute
from scaling.advice.conditions import find_mixed_conditions
from scaling.advice.table_fits import MIN_GROUPS, SETTING_NAMES, TableFits, describe_settings_used, fit_table
from scaling.common.quantities import format_count
from scaling.fitting.envelope import compare_approaches, make_approaches_table
from scaling.fitting.forms import compare_forms
from scaling.fitting.lr_batch_law import HPFit
from scaling.runs.table import usable

# The probability that each interval here holds.
INTERVAL_MASS = 0.9
BOOTSTRAP_SAMPLES = 400
LAW_SYMBOLS = ("E", "A", "B", "alpha", "beta")
# Of printed lines, in columns.
LINE_WIDTH = 80
# Groups that are printed, and whose best settings get an interval, which takes 1 ms each.
MAX_GROUPS = 60


class GroupOptimum(TypedDict):
    """The best settings of one (N, D) group by the fitted law.

    A setting that the runs did not vary is None, and so are the intervals of groups beyond the first `MAX_GROUPS`.

    Attributes:
        lr: Peak learning rate, at base width.
        lr_interval: Its 90 % interval.
        batch_tokens: Tokens per optimizer step.
        batch_interval: Its 90 % interval, tokens per step.
    """

    lr: float | None
    lr_interval: Sequence[float] | None
    batch_tokens: float | None
    batch_interval: Sequence[float] | None


class FitSummary(TypedDict):
    """All fits to one run table, as plain JSON values. A number that does not exist is None.

    Attributes:
        runs: Rows that the laws were fitted to.
        left_out: Rows that they were not fitted to.
        groups: Number of (N, D) groups.
        single_run_groups: Groups with one run.
        floors: N, D, loss (the fitted minimum or, if `loss_source` is "runs", the lowest, nats per token), sd and n
            (runs) of each group.
        hp_law: Coefficients and exponents of the law of learning rate and batch; None if the table holds neither, or
            neither was varied.
        hp_exponents_90: 90 % intervals of its exponents beyond the data.
        hp_law_status: "ok", or what is doubtful about it.
        not_measured: Why the best value of "lr" or "batch_tokens" is not known, such as "not in this table".
        optima: The best settings of each group, in the order of `floors`.
        doubts: Sentences on runs that do not fit together, the worst first.
        loss_source: "minima" if the loss law was fitted to the minima of groups, "runs" if to the runs as they are.
        loss_law: E, A, B, alpha and beta; None if there is no loss law.
        no_loss_law: Why there is none.
        loss_law_90: 90 % bootstrap intervals of its parameters.
        loss_law_status: "ok", or what is doubtful about it.
        forms: Errors of each form of the loss law, in sample and held out.
        form_chosen: The form with the least held-out error.
        forms_status: "ok", or what is doubtful about the choice.
        approaches: Compute-optimal exponents by each of the three approaches of Hoffmann et al. 2022.
        approaches_at: The compute, in FLOPs, at which the approaches give N and D.
        compute_column: The column whose compute the approaches use; None if they use 6 N D.
    """

    runs: int
    left_out: int
    groups: int
    single_run_groups: int
    floors: list[dict[str, float]]
    hp_law: dict[str, float] | None
    hp_exponents_90: dict[str, Sequence[float]] | None
    hp_law_status: str
    not_measured: dict[str, str]
    doubts: list[str]
    loss_source: NotRequired[str]
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
    compute_column: NotRequired[str | None]


def summarize_fits(runs: pd.DataFrame, *, compare: bool = True, budgets: Sequence[float] | None = None) -> FitSummary:
    """Fit every law that a run table allows.

    Args:
        runs: A checked run table.
        compare: Whether to compare the forms of the loss law and the approaches, too, which takes 0.5 s.
        budgets: Nominal compute budgets of isoFLOP runs, in FLOPs. By default, a column of the table that holds the
            compute of each run, or 6 N D.

    Returns:
        All fits as JSON values.

    Raises:
        ValueError: If the table is unusable.
    """
    fits = fit_table(usable(runs), bootstrap=BOOTSTRAP_SAMPLES)
    hp, groups, mixed = fits.hp, fits.groups, find_mixed_conditions(fits)
    n_runs = len(fits.used) if hp is None else hp.n_runs + fits.n_without_settings
    summary: dict[str, Any] = {
        "runs": n_runs,
        "left_out": len(runs) - n_runs,
        "groups": len(groups),
        "single_run_groups": int((groups["n"] == 1).sum()),
        "floors": groups.to_dict("records"),
        "hp_law": None if hp is None else vars(hp.law),
        "hp_exponents_90": None if hp is None else hp.exponents(INTERVAL_MASS),
        "hp_law_status": _join_statuses(fits),
        "not_measured": {name: reason for name in SETTING_NAMES if (reason := fits.explain_setting(name))},
        "optima": [
            _describe_optimum(fits, hp, N, D, with_interval=i < MAX_GROUPS)
            for i, (N, D) in enumerate(zip(groups["N"], groups["D"], strict=True))
        ],
        "doubts": [*([] if mixed is None else [str(mixed)]), *(() if fits.loss is None else fits.loss.doubts)],
        "loss_law": None,
    }
    if fits.loss is None or len(groups) < MIN_GROUPS:
        few = f"needed {MIN_GROUPS} (N, D) groups or more, got {len(groups)}: add runs at other sizes"
        return _to_json_values(summary | {"no_loss_law": few if len(groups) < MIN_GROUPS else fits.no_loss_law})
    fit = fits.loss.fit
    samples = {p: [getattr(s, p) for s in fit.samples] for p in LAW_SYMBOLS}
    summary |= {
        "loss_source": fits.loss.source,
        "loss_law": {p: getattr(fit.law, p) for p in LAW_SYMBOLS},
        "loss_law_90": {p: np.quantile(values, [0.05, 0.95]).tolist() for p, values in samples.items()},
        "loss_law_status": fit.status,
    }
    if compare:
        N, D, loss = (fits.points[c].to_numpy(float) for c in ("N", "D", "loss"))
        column = find_point_compute(fits)
        compute = None if column is None else column[1]
        if budgets is not None:
            column, compute = None, assign_budgets(6 * N * D, budgets)
        forms = compare_forms(N, D, loss)
        top = float((6 * N * D if compute is None else compute).max())
        frontiers = compare_approaches(N, D, loss, C=compute, budgets=budgets)
        summary |= {
            "forms": forms.table().to_dict("records"),
            "form_chosen": forms.chosen,
            "forms_status": forms.status,
            "approaches": make_approaches_table(frontiers, top, INTERVAL_MASS).to_dict("records"),
            "approaches_at": top,
            "compute_column": None if column is None else column[0],
        }
    return _to_json_values(summary)


def format_summary(summary: FitSummary, *, with_groups: bool = True) -> str:
    """Return all fits as text for a terminal of 80 columns.

    Args:
        summary: The fits.
        with_groups: Whether to list the groups of equal N and D.
    """
    count, groups = summary["runs"], summary["groups"]
    single = summary["single_run_groups"]
    of_one = f" ({'each' if single == groups else single} with one run)" if single else ""
    lines = [f"{count} runs in {groups} groups of equal N and D{of_one}; {summary['left_out']} left out"]
    if summary["doubts"]:
        lines += ["", *(_wrap(f"Doubt: {doubt}", 2) for doubt in summary["doubts"])]
    if with_groups:
        lines += ["", *_format_groups(summary)]
    lines += ["", *_format_hp_law(summary), ""]
    law = summary["loss_law"]
    if law is None:
        return "\n".join([*lines, _wrap(f"No loss law: {summary['no_loss_law']}.", 2)])
    lines.append("Loss law: E + A / N^alpha + B / D^beta, with 90 % bootstrap intervals")
    for symbol, (low, high) in summary["loss_law_90"].items():
        lines.append(f"  {symbol:6} {law[symbol]:<10.4g} ({low:.4g} to {high:.4g})")
    if summary["hp_law"] is None:
        lines.append(_wrap("  Fitted to the runs as they are, since they do not show the best settings.", 4))
    lines.append(_wrap(f"  Status: {summary['loss_law_status']}", 4))
    if "forms" in summary:
        lines += ["", *_format_forms(summary), "", *_format_approaches(summary)]
    return "\n".join(lines)


def format_parts(column: str, parts: Mapping[str, FitSummary]) -> str:
    """Return the fits of each value of a column as text: their loss laws side by side, then each of them."""
    width = max(len(column), *map(len, parts))
    head = "".join(f"{symbol:>10}" for symbol in LAW_SYMBOLS)
    lines = [f"Loss law for each value of {column}: E + A / N^alpha + B / D^beta", f"  {column:{width}}  runs{head}"]
    for value, summary in parts.items():
        law = summary["loss_law"]
        numbers = "".join(f"{law[symbol]:>10.4g}" for symbol in LAW_SYMBOLS) if law else "   no loss law"
        lines.append(f"  {value:{width}}{summary['runs']:>6}{numbers}")
    for value, summary in parts.items():
        title = f"{column} = {value}"
        lines += ["", title, "-" * len(title), format_summary(summary, with_groups=False)]
    return "\n".join(lines)


def _format_groups(summary: FitSummary) -> list[str]:
    is_measured = summary["hp_law"] is None
    answered = [name for name in SETTING_NAMES if name not in summary["not_measured"]]
    what = "lowest loss measured" if is_measured else "lowest loss as fitted"
    title = f"Each group: {what}, in nats per token"
    lines = [f"{title}, and the best settings", "by the law (90 % intervals in parentheses)"] if answered else [title]
    heads = {"lr": f"{'learning rate':30}", "batch_tokens": "batch in tokens"}
    lines.append(f"{'N':>6}{'D':>8}{'runs':>6}{'loss':>9}   {''.join(heads[name] for name in answered)}".rstrip())
    for floor, best in list(zip(summary["floors"], summary["optima"], strict=True))[:MAX_GROUPS]:
        cells = ""
        if best["lr"] is not None and best["lr_interval"] is not None:
            low, high = best["lr_interval"]
            rate = f"{best['lr']:.3g} ({low:.3g}–{high:.3g})"
            cells += f"{rate:30}"
        if best["batch_tokens"] is not None and best["batch_interval"] is not None:
            low, high = best["batch_interval"]
            cells += f"{format_count(best['batch_tokens'])} ({format_count(low)}–{format_count(high)})"
        size = f"{format_count(floor['N']):>6}{format_count(floor['D']):>8}"
        lines.append(f"{size}{floor['n']:>6}{_format_loss(floor['loss']):>9}   {cells}".rstrip())
    if len(summary["floors"]) > MAX_GROUPS:
        lines.append(f"  ... and {len(summary['floors']) - MAX_GROUPS} more groups, which --json lists")
    return lines


def _format_loss(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= value < 1e4 else f"{value:.3g}"


def _format_hp_law(summary: FitSummary) -> list[str]:
    law, intervals = summary["hp_law"], summary["hp_exponents_90"]
    if law is None or intervals is None:
        return [_wrap(f"Learning rate and batch: no law. {summary['hp_law_status']}", 2)]
    lines = [
        "Learning rate and batch: lr* ~ N^a D^b, B* ~ N^c D^d, with 90 % intervals of the",
        "exponents beyond the data",
    ]
    for letter, name in zip("abcd", ("lr_N", "lr_D", "batch_N", "batch_D"), strict=True):
        low, high = intervals[name]
        reason = summary["not_measured"].get("lr" if name.startswith("lr") else "batch_tokens")
        lines.append(f"  {letter}  {reason}" if reason else f"  {letter}  {law[name]:+.3f} ({low:+.3f} to {high:+.3f})")
    return [*lines, _wrap(f"  Status: {summary['hp_law_status']}", 4)]


def _join_statuses(fits: TableFits) -> str:
    """Return "ok", or sentences on what is doubtful about the law of learning rate and batch."""
    sentences = [describe_settings_used(fits)]
    if fits.hp is not None and fits.hp.status != "ok":
        sentences.append(fits.hp.status)
    if fits.n_without_settings:
        sentences.append(
            f"{fits.n_without_settings} of {len(fits.used)} runs have no learning rate or batch and are left out here."
        )
    return " ".join(s for s in sentences if s) or "ok"


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
        *([f"  C is that of the column {summary['compute_column']}"] if summary.get("compute_column") else []),
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


def _describe_optimum(fits: TableFits, hp: HPFit | None, N: float, D: float, *, with_interval: bool) -> GroupOptimum:
    best: GroupOptimum = {"lr": None, "lr_interval": None, "batch_tokens": None, "batch_interval": None}
    if hp is None:
        return best
    lr, batch = (float(v) for v in hp.law(N, D))
    lr_interval, batch_interval = hp.interval(N, D, INTERVAL_MASS) if with_interval else (None, None)
    if fits.states["lr"] == "varied":
        best |= {"lr": lr, "lr_interval": lr_interval}
    if fits.states["batch_tokens"] == "varied":
        best |= {"batch_tokens": batch, "batch_interval": batch_interval}
    return best


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
