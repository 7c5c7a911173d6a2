"""The tables of a report, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scaling.curves.backtest import ForecastCheck
from scaling.fitting.envelope import make_approaches_table
from scaling.fitting.forms import Comparison
from scaling.fitting.isoflop import Frontier
from scaling.fitting.loss_law import Fit
from scaling.fitting.lr_batch_law import HPFit
from scaling.laws.published import PublishedLaw
from scaling.report.figures import BAND_MASS, count

MAX_VALUE_LENGTH = 300  # characters of a value of a note: it may be a list of all runs
RANGE_WORDS = {True: "inside what it was measured on", False: "outside what it was measured on", None: "range not known"}


@dataclass(frozen=True)
class TableColumn:
    name: str
    format_number: bool = True


@dataclass(frozen=True)
class ReportTable:
    columns: Sequence[TableColumn]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def _make_columns(*names: str, words: Sequence[str] = ()) -> list[TableColumn]:
    """words: those that are text."""
    return [TableColumn(name, name not in words) for name in names]


def tabulate_hp_law(hp: HPFit) -> ReportTable:
    """Exponents of lr* and B*, with intervals."""
    law, spread = hp.law, hp.exponents(BAND_MASS)
    rows = []
    for name, coef, exponents in (
        ("lr*", law.lr_coef, {"lr_N": law.lr_N, "lr_D": law.lr_D}),
        ("B*, tokens", law.batch_coef, {"batch_N": law.batch_N, "batch_D": law.batch_D}),
    ):
        cells = [f"{v:+.3f} ({spread[key][0]:+.2f} to {spread[key][1]:+.2f})" for key, v in exponents.items()]
        rows.append([name, f"{coef:.4g}", *cells])
    notes = [f"{100 * BAND_MASS:.0f} % intervals, as the exponents hold beyond the data.", f"Status: {hp.status}"]
    return ReportTable(_make_columns("law", "coefficient", "exponent of N", "exponent of D", words=["law"]), rows, notes)


def tabulate_published(beside: Sequence[PublishedLaw], hp: HPFit, N: float, D: float, mup: bool) -> ReportTable | None:
    """Published laws at (N, D) below this table's; None where none speaks. mup: then only their batches can be compared."""
    lr, batch = (float(v) for v in hp.law(N, D))
    rows = [["this table", f"{lr:.4g}", f"{batch:,.0f}", "", ""]]
    for law in beside:
        rate, tokens = law(N, D)
        known = 0.0 if rate is None or mup else float(rate)  # Kaplan's line in ln N ends at nil
        said = [f"{known:.4g}" if known else "", "" if tokens is None else f"{float(tokens):,.0f}"]
        if any(said):
            rows.append([law.name, *said, RANGE_WORDS[law.covers(N, D)], f"{law.source}; N: {law.N_definition}"])
    if len(rows) < 2:
        return None
    notes = [f"At N {count(N)}, D {count(D)}."]
    if mup:
        notes.append("Their rates are left out: under muP ours are at base width.")
    words = ["published law", "", "source"]
    return ReportTable(_make_columns("published law", "lr", "batch, tokens", "", "source", words=words), rows, notes)


def tabulate_loss_law(fit: Fit, N: float, D: float) -> ReportTable:
    """The plain law, what is averaged, how far it can be trusted."""
    one = fit.law
    average = ", ".join(f"{m.form} {m.weight:.2f}" for m in fit.members)
    apart = 100 * float(fit.disagreement(N, D))
    plain = f"{one.E:.4g} + {one.A:.4g} / N^{one.alpha:.3f} + {one.B:.4g} / D^{one.beta:.3f}"
    rows = [
        ["plain law (Huber)", plain],
        ["prediction", f"average of {average}; at N {count(N)}, D {count(D)} they differ by {apart:.2g} %"],
        ["evidence", f"as of {fit.n_effective:.1f} runs near the largest compute"],
        ["status", fit.status],
    ]
    return ReportTable(_make_columns("loss law", "", words=["loss law", ""]), rows)


def tabulate_forms(found: Comparison) -> ReportTable:
    """Errors of every form in the sample and beyond it."""
    rows = []
    for s in found.scores:
        chosen = " (chosen)" if s.form == found.chosen else ""
        rows.append([s.form + chosen, *(format_number(100 * e, ".2f") for e in (s.in_sample, *s.held_out, s.mean)), s.status])
    blocks = [f"{rest} after {n}" for n, rest in found.blocks]
    notes = [
        "Mean error in %: of all that were fitted, and of the next by compute after so many with less. Chosen by the errors held out; "
        "predictions use the average.",
        *([] if found.status == "ok" else [found.status]),
    ]
    return ReportTable(
        _make_columns("form", "in sample", *blocks, "held out", "status", words=["form", "status"]), rows, notes
    )


def tabulate_approaches(found: Mapping[str, Frontier | str], C: float) -> ReportTable | None:
    """Exponents of N_opt and D_opt, and both at C FLOPs; below it, what is doubtful or cannot be."""
    rows, notes = [], []
    for row in make_approaches_table(dict(found), C).to_dict("records"):
        if row["status"] != "ok":
            notes.append(f"{row['approach']}: {row['status']}")
        if isinstance(found[str(row["approach"])], Frontier):
            exponents = [_format_with_interval(row, f"{s}_exponent", lambda v: f"{v:.3f}") for s in "ND"]
            rows.append([str(row["approach"]), *exponents, *(_format_with_interval(row, f"{s}_opt", count) for s in "ND")])
    heads = _make_columns("approach", "N exponent", "D exponent", f"N at {C:.3g} FLOPs", "D there", words=["approach"])
    return ReportTable(heads if rows else [], rows, notes)


def tabulate_forecasts(checks: Sequence[ForecastCheck]) -> ReportTable:
    """How well half of a run told its end."""
    rows = [
        [
            f"{c.N:,.0f}",
            f"{c.D:,.0f}",
            str(c.runs),
            f"{100 * c.error:.2f} %",
            f"{100 * c.bias:+.2f} %",
            f"{c.covered} of {c.runs}",
            f"{100 * c.carried_error:.2f} %",
        ]
        for c in checks
    ]
    note = (
        "The end forecast from the first half of a run, by siblings of its group and a prior learnt from other groups."
    )
    heads = ("N", "D", "runs", "mean error", "bias", "80 % interval held", "error of the last loss seen")
    return ReportTable(_make_columns(*heads), rows, [note])


def tabulate_exclusions(runs: pd.DataFrame) -> ReportTable | None:
    """Why rows are kept out of laws, and how many."""
    reasons = {str(why): n for why, n in runs["excluded"].value_counts().items() if why}
    called = _name_rows(runs)
    rows = []
    for why, n in reasons.items():
        which = list(dict.fromkeys(called[(runs["excluded"] == why).to_numpy()]))
        rows.append([why, str(n), ", ".join(which[:3]) + (", ..." if len(which) > 3 else "")])
    return ReportTable(_make_columns("reason", "rows", "which", words=["reason", "which"]), rows) if rows else None


def tabulate_best_runs(runs: pd.DataFrame, used: pd.DataFrame, most: int = 12) -> ReportTable:
    """Targets, then the runs of least loss."""
    targets = runs[(runs["role"] == "target") & np.isfinite(runs["loss"])]
    shown = pd.concat([targets, used[used["role"] != "target"].nsmallest(most, "loss")])
    cells = [_name_rows(shown), shown["role"].astype(str)]
    for name, form in (("N", ",.0f"), ("D", ",.0f"), ("lr", ".4g"), ("batch_tokens", ",.0f"), ("loss", ".4f")):
        values = shown[name].to_numpy(float) if name in shown else np.full(len(shown), math.nan)
        cells.append([format_number(v, form) for v in values])
    heads = _make_columns("run", "role", "N", "D", "lr", "batch tokens", "loss", words=["run", "role"])
    return ReportTable(heads, [list(row) for row in zip(*cells, strict=True)])


def describe_next_run(plan: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """`scaling.advice.next_run.NextRun` as a note keeps it, in words; of a note of another form, whatever it holds."""
    if plan is None or not {"N", "D", "lr", "batch_tokens", "loss_half"} <= set(plan):
        return describe_values(plan)
    now, then = plan["loss_half"]
    rows = [
        (
            "one run",
            f"N {count(plan['N'])}, D {count(plan['D'])}, lr {plan['lr']:.3g}, batch {count(plan['batch_tokens'])} tokens",
        ),
        ("loss interval at the target", f"± {100 * now:.2f} % now, ± {100 * then:.2f} % expected then"),
    ]
    sweep = plan.get("sweep")
    if isinstance(sweep, Mapping) and {"N", "D", "lr", "batch_tokens", "lr_factor", "batch_factor"} <= set(sweep):
        rates, batches = ", ".join(f"{v:.3g}" for v in sweep["lr"]), ", ".join(count(v) for v in sweep["batch_tokens"])
        rows.append(("nine runs", f"N {count(sweep['N'])}, D {count(sweep['D'])}, lr {rates} by batch {batches}"))
        for name, word in (("lr_factor", "lr"), ("batch_factor", "batch")):
            now, then = sweep[name]
            rows.append((f"{word} at the target", f"within a factor {now:.2f} now, {then:.2f} expected then"))
    return rows


def describe_values(values: Any) -> list[tuple[str, str]]:
    """A note's dict as text, whatever it holds."""
    if not isinstance(values, Mapping):
        return [] if values is None else [("", str(values))]
    shown = [(str(k).replace("_", " "), _format_value(v)) for k, v in values.items() if v is not None]
    return [(k, v if len(v) <= MAX_VALUE_LENGTH else f"{v[:MAX_VALUE_LENGTH]} ...") for k, v in shown]


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {v}" for k, v in describe_values(value))
    if isinstance(value, list | tuple):
        return ", ".join(_format_value(v) for v in value)
    return str(value)


def format_number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


def _name_rows(runs: pd.DataFrame) -> np.ndarray[Any, Any]:
    """A name for each row: its own, else the run's, else the row's."""
    called = np.array([str(i) for i in runs.index], dtype=object)
    for column in ("run_id", "name"):
        if column in runs:
            called = np.where(runs[column].notna(), runs[column].astype(str), called)
    return called


def _format_with_interval(row: Mapping[Any, Any], name: str, form: Callable[[float], str]) -> str:
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return (
        f"{form(value)} ({form(low)} to {form(high)})" if math.isfinite(low + high) else f"{form(value)} (no interval)"
    )
