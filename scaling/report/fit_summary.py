"""What `scaling fit` says: every law fitted to a run table, the forms and approaches beside it, and how far to trust each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from scaling.common.quantities import format_count
from scaling.fitting.envelope import make_approaches_table, compare_approaches
from scaling.fitting.forms import compare_forms
from scaling.fitting.loss_law import FitError
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law, fit_loss_floors
from scaling.runs.table import usable

INTERVAL_MASS = 0.9  # of every interval here
BOOTSTRAP_SAMPLES = 400
MIN_GROUPS = 3  # (N, D) groups for a loss law
LAW_SYMBOLS = ("E", "A", "B", "alpha", "beta")


def summarize_fits(runs: pd.DataFrame, *, compare: bool = True) -> dict[str, Any]:
    """All fits as JSON values (a number that does not exist is None). compare: also the forms and the approaches, .5 s.

    `loss_law` is None, and `no_loss_law` says why, where there is none. ValueError on an unusable table.
    """
    used = usable(runs)
    hp = fit_hp_law(used)
    floors = hp.floors
    said: dict[str, Any] = {
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
        return _to_json_values(said | {"no_loss_law": str(error)})
    said |= {
        "loss_law": {p: getattr(fit.law, p) for p in LAW_SYMBOLS},
        "loss_law_90": {p: np.quantile([getattr(s, p) for s in fit.samples], [0.05, 0.95]).tolist() for p in LAW_SYMBOLS},
        "loss_law_status": fit.status,
    }
    if compare:
        forms = compare_forms(N, D, loss)
        top = float((6 * N * D).max())
        approaches = make_approaches_table(compare_approaches(N, D, loss), top, INTERVAL_MASS)
        said |= {
            "forms": forms.table().to_dict("records"),
            "form_chosen": forms.chosen,
            "forms_status": forms.status,
            "approaches": approaches.to_dict("records"),
            "approaches_at": top,
        }
    return _to_json_values(said)


def format_summary(said: dict[str, Any]) -> str:
    """The same on a terminal."""
    lines = [f"{said['runs']} runs in {said['groups']} groups of equal N and D; {said['left_out']} left out", ""]
    lines.append(f"{'N':>8} {'D':>8} {'runs':>5} {'lowest loss, fitted':>20}   {'lr* (90 %)':32} B* in tokens (90 %)")
    for row, best in zip(said["floors"], said["optima"], strict=True):
        (a, b), (c, d) = best["lr_interval"], best["batch_interval"]
        lr = f"{best['lr']:.3g} ({a:.3g} to {b:.3g})"
        batch = f"{format_count(best['batch_tokens'])} ({format_count(c)} to {format_count(d)})"
        lines.append(
            f"{format_count(row['N']):>8} {format_count(row['D']):>8} {row['n']:>5} {row['loss']:>20.4f}   {lr:32} {batch}"
        )
    law, among = said["hp_law"], said["hp_exponents_90"]
    lines += ["", "Learning rate and batch: lr* ~ N^a D^b, B* ~ N^c D^d, exponents as they hold beyond the data (90 %)"]
    for letter, name in zip("abcd", ("lr_N", "lr_D", "batch_N", "batch_D"), strict=True):
        low, high = among[name]
        lines.append(f"  {letter}  {law[name]:+.3f} ({low:+.3f} to {high:+.3f})")
    lines += [f"  status: {said['hp_law_status']}", ""]
    if said["loss_law"] is None:
        return "\n".join([*lines, f"No loss law: {said['no_loss_law']}."])
    lines.append("Loss law: E + A / N^alpha + B / D^beta (90 % of row bootstraps)")
    for symbol, (low, high) in said["loss_law_90"].items():
        lines.append(f"  {symbol:6} {said['loss_law'][symbol]:<10.4g} ({low:.4g} to {high:.4g})")
    lines.append(f"  status: {said['loss_law_status']}")
    if "forms" in said:
        lines += ["", *_format_forms(said), "", *_format_approaches(said)]
    return "\n".join(lines)


def _format_forms(said: dict[str, Any]) -> list[str]:
    blocks = [k for k in said["forms"][0] if k.startswith("block_")]
    lines = [
        "Forms of the loss law: mean error in %, in sample and where the smaller compute foretells the next block",
        f"  {'form':18}{'in sample':>10}" + "".join(f"{k.replace('_', ' '):>10}" for k in blocks) + f"{'held out':>10}",
    ]
    for row in said["forms"]:
        errors = "".join(f"{_format_percent(row[k]):>10}" for k in ("in_sample", *blocks, "held_out"))
        note = "  <- best of the forms" if row["chosen"] and row["held_out"] is not None else ""
        lines.append(f"  {row['form']:18}{errors}{note}")
        if row["status"].startswith("Cannot"):
            lines.append(f"    {row['status']}")
    lines.append("  `average` is what predictions use, whichever form is best here.")
    return [*lines, f"  status: {said['forms_status']}"]


def _format_approaches(said: dict[str, Any]) -> list[str]:
    lines = [f"Compute-optimal size: N ~ C^a, D ~ C^b (90 %), N at C = {said['approaches_at']:.3g} FLOPs"]
    for row in said["approaches"]:
        if row.get("N_exponent") is None:
            lines.append(f"  {row['approach']:9} not here: {row['status']}")
            continue
        parts = [
            f"{s} {row[f'{k}_exponent']:.3f} ({_format_exponent(row[f'{k}_exponent_low'])} to {_format_exponent(row[f'{k}_exponent_high'])})"
            for s, k in (("a", "N"), ("b", "D"))
        ]
        lines.append(f"  {row['approach']:9} {'  '.join(parts)}  N {format_count(row['N_opt'])}")
        if row["status"] != "ok":
            lines.append(f"    {row['status']}")
    return lines


def _describe_optimum(hp: HPFit, N: float, D: float) -> dict[str, Any]:
    lr, batch = (float(v) for v in hp.law(N, D))
    lr_interval, batch_interval = hp.interval(N, D, INTERVAL_MASS)
    return {"lr": lr, "lr_interval": lr_interval, "batch_tokens": batch, "batch_interval": batch_interval}


def _format_percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _format_exponent(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _to_json_values(said: dict[str, Any]) -> dict[str, Any]:
    """Plain JSON values; None for a number that is none."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if value is pd.NA:
            return None
        if isinstance(value, np.generic):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {k: plain(v) for k, v in said.items()}
