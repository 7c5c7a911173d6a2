"""The tables of a report, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from scaling.advice.answer import Recommendation, format_tokens
from scaling.common.quantities import format_count
from scaling.curves.backtest import ForecastCheck
from scaling.fitting.envelope import make_approaches_table
from scaling.fitting.forms import Comparison
from scaling.fitting.isoflop import Frontier
from scaling.fitting.loss_law import Fit
from scaling.fitting.lr_batch_law import HPFit
from scaling.laws.published import PublishedLaw
from scaling.report.figures import BAND_MASS

# Characters of a value that are shown; a value in a note may be a list of all runs.
MAX_VALUE_LENGTH = 300
RANGE_WORDS = {True: "inside its range", False: "outside its range", None: "range not known"}


@dataclass(frozen=True)
class TableColumn:
    """A column of a table.

    Attributes:
        name: Its heading.
        is_number: Whether its cells are aligned to the right.
    """

    name: str
    is_number: bool = True


@dataclass(frozen=True)
class ReportTable:
    """A table of text.

    Attributes:
        columns: The columns.
        rows: The cells of each row.
        notes: Sentences below the table.
    """

    columns: Sequence[TableColumn]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def _make_columns(*names: str, texts: Sequence[str] = ()) -> list[TableColumn]:
    """Return columns of these names, of which those in `texts` hold text."""
    return [TableColumn(name, name not in texts) for name in names]


def list_answer_rows(answer: Recommendation, *, mup: bool) -> list[tuple[str, str, str]]:
    """Return the rows (name, value, interval or remark) of a recommendation.

    Args:
        answer: The recommendation.
        mup: Whether learning rates are at base width.
    """
    settings = answer.list_setting_rows()
    if mup:
        settings[0] = (f"{settings[0][0]} (base width)", *settings[0][1:])
    rows = [*settings, *answer.list_loss_rows(), *answer.list_optimum_rows()]
    if answer.expected_regret is not None:
        rows.append(("expected regret", f"{100 * answer.expected_regret:.2f} %", "of the loss; an upper bound"))
    return rows


def describe_target(answer: Recommendation) -> str:
    """Return the size of the target in a sentence, and whether it has been trained."""
    size = f"For N = {format_tokens(answer.N)}, D = {format_tokens(answer.D)}: {answer.C:.3g} FLOPs."
    if answer.refit:
        size += " The target has been trained; its own runs are not among those that the laws are fitted to."
    return size


def tabulate_hp_law(hp: HPFit, names: Collection[str] = ("lr", "batch_tokens")) -> ReportTable:
    """Tabulate the coefficients and exponents of lr* and B*, with intervals, as far as each is named."""
    law, intervals = hp.law, hp.exponents(BAND_MASS)
    rows = []
    for name, coef, exponents in (
        ("lr*", law.lr_coef, {"lr_N": law.lr_N, "lr_D": law.lr_D}),
        ("B*, tokens", law.batch_coef, {"batch_N": law.batch_N, "batch_D": law.batch_D}),
    ):
        if not any(key.startswith(name.split("_")[0]) for key in exponents for name in names):
            continue
        cells = [f"{v:+.3f} ({intervals[key][0]:+.2f} to {intervals[key][1]:+.2f})" for key, v in exponents.items()]
        rows.append([name, f"{coef:.4g}", *cells])
    notes = [f"With {100 * BAND_MASS:.0f} % intervals of the exponents beyond the data.", f"Status: {hp.status}"]
    return ReportTable(
        _make_columns("law", "coefficient", "exponent of N", "exponent of D", texts=["law"]), rows, notes
    )


def tabulate_published(laws: Sequence[PublishedLaw], hp: HPFit, N: float, D: float, mup: bool) -> ReportTable | None:
    """Tabulate published laws at (N, D), below the law of this table.

    Args:
        laws: The published laws.
        hp: The law of learning rate and batch.
        N: Parameters that multiply tokens.
        D: Training tokens.
        mup: Whether learning rates are at base width: then only batches can be compared.

    Returns:
        The table; None if no published law applies.
    """
    lr, batch = (float(v) for v in hp.law(N, D))
    rows = [["fitted here", f"{lr:.4g}", f"{batch:,.0f}", "", ""]]
    for law in laws:
        law_lr, law_batch = law(N, D)
        # Kaplan's line in ln N ends at a rate of zero.
        shown_lr = 0.0 if law_lr is None or mup else float(law_lr)
        cells = [f"{shown_lr:.4g}" if shown_lr else "", "" if law_batch is None else f"{float(law_batch):,.0f}"]
        if any(cells):
            rows.append([law.name, *cells, RANGE_WORDS[law.covers(N, D)], f"{law.source}; N: {law.N_definition}"])
    if len(rows) < 2:
        return None
    notes = [f"At N {format_count(N)}, D {format_count(D)}. Range: where the law was measured."]
    if mup:
        notes.append("Their learning rates are left out, because under muP those of this table are at base width.")
    names = ("published law", "lr", "batch, tokens", "range", "source")
    return ReportTable(_make_columns(*names, texts=["published law", "range", "source"]), rows, notes)


def tabulate_loss_law(fit: Fit, N: float, D: float) -> ReportTable:
    """Tabulate the plain law, the averaged forms and how far they can be trusted at (N, D)."""
    law = fit.law
    plain = f"{law.E:.4g} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}"
    forms = " and ".join(f'"{m.form}" (weight {m.weight:.2f})' for m in fit.members)
    disagreement = 100 * float(fit.disagreement(N, D))
    place = f"N {format_count(N)}, D {format_count(D)}"
    rows = [
        ["plain law (Huber)", plain],
        ["prediction", f"average of {forms}; at {place} they differ by {disagreement:.2g} %"],
        ["evidence", f"equivalent to {fit.n_effective:.1f} runs near the largest compute"],
        ["status", fit.status],
    ]
    return ReportTable(_make_columns("loss law", "", texts=["loss law", ""]), rows)


def tabulate_forms(comparison: Comparison) -> ReportTable:
    """Tabulate the errors of every form of the loss law, in sample and held out."""
    rows = []
    for s in comparison.scores:
        chosen = " (chosen)" if s.form == comparison.chosen else ""
        errors = [format_number(100 * e, ".2f") for e in (s.in_sample, *s.held_out, s.mean)]
        rows.append([s.form + chosen, *errors, s.status])
    blocks = [f"{predicted} after {fitted}" for fitted, predicted in comparison.blocks]
    notes = [
        'Mean error in %, in sample and held out: "3 after 9" is the error of the next 3 by compute, predicted from '
        "the 9 with less. The form is chosen by its held-out error; predictions use the average.",
        *([] if comparison.status == "ok" else [comparison.status]),
    ]
    names = ("form", "in sample", *blocks, "held out", "status")
    return ReportTable(_make_columns(*names, texts=["form", "status"]), rows, notes)


def tabulate_approaches(frontiers: Mapping[str, Frontier | str], C: float) -> ReportTable | None:
    """Tabulate the exponents of the compute-optimal N and D by each approach, and both at C FLOPs.

    The notes say what is doubtful, and which approaches these runs do not allow.
    """
    rows, notes = [], []
    for row in make_approaches_table(dict(frontiers), C).to_dict("records"):
        name = str(row["approach"])
        if row["status"] != "ok":
            notes.append(f"{name}: {row['status']}")
        if isinstance(frontiers[name], Frontier):
            exponents = [_format_with_interval(row, f"{s}_exponent", lambda v: f"{v:.3f}") for s in "ND"]
            optima = [_format_with_interval(row, f"{s}_opt", format_count) for s in "ND"]
            rows.append([name, *exponents, *optima])
    names = ("approach", "exponent of N", "exponent of D", f"N at {C:.3g} FLOPs", "D there")
    return ReportTable(_make_columns(*names, texts=["approach"]) if rows else [], rows, notes)


def tabulate_forecasts(checks: Sequence[ForecastCheck]) -> ReportTable:
    """Tabulate how well the first half of a run predicts its final loss."""
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
        "Forecasts of the final loss from the first half of a run, with the other runs of its group and a prior "
        "learned from other groups. Without a forecast: the last loss of the first half."
    )
    names = ("N", "D", "runs", "mean error", "bias", "in 80 % interval", "error without a forecast")
    return ReportTable(_make_columns(*names), rows, [note])


def tabulate_exclusions(runs: pd.DataFrame) -> ReportTable | None:
    """Tabulate why laws do not use some rows, and how many; None if they use all."""
    reasons = {str(reason): n for reason, n in runs["excluded"].value_counts().items() if reason}
    names = _name_rows(runs)
    rows = []
    for reason, n in reasons.items():
        excluded = list(dict.fromkeys(names[(runs["excluded"] == reason).to_numpy()]))
        rows.append([reason, str(n), ", ".join(excluded[:3]) + (", ..." if len(excluded) > 3 else "")])
    return ReportTable(_make_columns("reason", "rows", "runs", texts=["reason", "runs"]), rows) if rows else None


def tabulate_best_runs(runs: pd.DataFrame, used: pd.DataFrame, most: int = 12) -> ReportTable:
    """Tabulate the targets, and then the runs with the lowest losses."""
    targets = runs[(runs["role"] == "target") & np.isfinite(runs["loss"])]
    shown = pd.concat([targets, used[used["role"] != "target"].nsmallest(most, "loss")])
    cells = [_name_rows(shown), shown["role"].astype(str)]
    for name, form in (("N", ",.0f"), ("D", ",.0f"), ("lr", ".4g"), ("batch_tokens", ",.0f"), ("loss", ".4f")):
        values = shown[name].to_numpy(float) if name in shown else np.full(len(shown), math.nan)
        cells.append([format_number(v, form) for v in values])
    columns = _make_columns("run", "role", "N", "D", "lr", "batch, tokens", "loss", texts=["run", "role"])
    return ReportTable(columns, [list(row) for row in zip(*cells, strict=True)])


def describe_next_run(note: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return the rows that describe what to run next.

    Args:
        note: A `scaling.advice.next_run.NextRun` as a note keeps it. A note of another version is shown as it is.

    Returns:
        (name, text) of each row.
    """
    if note is None or not {"N", "D", "lr", "batch_tokens", "loss_half"} <= set(note):
        return describe_values(note)
    now, after = note["loss_half"]
    batch = format_count(note["batch_tokens"])
    run = f"N {format_count(note['N'])}, D {format_count(note['D'])}, lr {note['lr']:.3g}, batch {batch} tokens"
    rows = [
        ("one run", run),
        ("loss at the target", f"± {100 * now:.2f} % now, ± {100 * after:.2f} % expected after it"),
    ]
    sweep = note.get("sweep")
    if isinstance(sweep, Mapping) and {"N", "D", "lr", "batch_tokens", "lr_factor", "batch_factor"} <= set(sweep):
        rates = ", ".join(f"{v:.3g}" for v in sweep["lr"])
        batches = ", ".join(format_count(v) for v in sweep["batch_tokens"])
        size = f"N {format_count(sweep['N'])}, D {format_count(sweep['D'])}"
        rows.append(("nine runs", f"{size}, lr {rates}, each with batch {batches}"))
        for name, setting in (("lr_factor", "lr"), ("batch_factor", "batch")):
            now, after = sweep[name]
            text = f"within a factor of {now:.2f} now, {after:.2f} expected after them"
            rows.append((f"{setting} at the target", text))
    return rows


def describe_values(values: Any) -> list[tuple[str, str]]:
    """Return the (name, text) of each value of a note, whatever it holds."""
    if not isinstance(values, Mapping):
        return [] if values is None else [("", str(values))]
    rows = [(str(k).replace("_", " "), _format_value(v)) for k, v in values.items() if v is not None]
    return [(k, v if len(v) <= MAX_VALUE_LENGTH else f"{v[:MAX_VALUE_LENGTH]} ...") for k, v in rows]


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
    """Return a number in this format, or an empty text if it is not finite."""
    return format(value, form) if math.isfinite(value) else ""


def _name_rows(runs: pd.DataFrame) -> np.ndarray[Any, Any]:
    """Return a name for each row: its own or, without one, its run_id or its index."""
    names = np.array([str(i) for i in runs.index], dtype=object)
    for column in ("run_id", "name"):
        if column in runs:
            names = np.where(runs[column].notna(), runs[column].astype(str), names)
    return names


def _format_with_interval(row: Mapping[Any, Any], name: str, form: Callable[[float], str]) -> str:
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    interval = f"{form(low)} to {form(high)}" if math.isfinite(low + high) else "no interval"
    return f"{form(value)} ({interval})"
