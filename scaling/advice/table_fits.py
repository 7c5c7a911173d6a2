"""Fit all laws that a run table allows: of learning rate and batch if it holds them, and of the loss."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from scaling.common.arrays import Array, limit_to_one_thread
from scaling.common.quantities import format_count
from scaling.fitting.bowl import make_prior
from scaling.fitting.groups import group_runs
from scaling.fitting.loss_evidence import LossEvidence, fit_loss_evidence
from scaling.fitting.loss_law import FitError
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law

SETTING_NAMES = {"lr": "learning rate", "batch_tokens": "batch"}
# "varied": the runs show its best value, or could. "tied": one value in each group of equal N and D. "constant": one
# value in all runs. "missing": the table does not hold it.
SettingState = Literal["varied", "tied", "constant", "missing"]
# With fewer groups of equal N and D, the loss law is fitted to their runs.
MIN_GROUPS = 3
# Logarithms of a setting that differ by less than this are one value.
SAME_SETTING = 0.02


@dataclass(frozen=True)
class TableFits:
    """The laws that a run table allows.

    Attributes:
        used: The runs with a finite positive loss, as they are in the table.
        hp: The law of learning rate and batch; None if neither was varied.
        states: For "lr" and "batch_tokens", what the table can tell about it.
        constants: The value of each setting that all runs share.
        n_without_settings: Runs that the law of learning rate and batch leaves out, because theirs are empty.
        loss: The loss law with its evidence; None if there is none.
        no_loss_law: Why there is none; otherwise empty.
        groups: Groups of equal N and D. Columns N, D, loss (the fitted minimum, or the lowest loss), sd and n (runs).
        points: What the loss law was fitted to. Columns N, D, loss and sd (NaN if unknown).
    """

    used: pd.DataFrame
    hp: HPFit | None
    states: dict[str, SettingState]
    constants: dict[str, float]
    n_without_settings: int
    loss: LossEvidence | None
    no_loss_law: str
    groups: pd.DataFrame
    points: pd.DataFrame

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest N and D of the runs."""
        runs = self.used if self.hp is None else self.hp.used
        return {name: (float(runs[name].min()), float(runs[name].max())) for name in ("N", "D")}

    def explain_setting(self, name: str) -> str:
        """Return why the best value of a setting is not known, for a table row; empty if it was varied."""
        reasons = {
            "varied": "",
            "tied": "one value per N and D in this table",
            "constant": "the same in every run",
            "missing": "not in this table",
        }
        return reasons[self.states[name]]


def fit_table(runs: pd.DataFrame, *, bootstrap: int = 0, seed: int = 0) -> TableFits:
    """Fit all laws that a run table allows.

    Args:
        runs: The rows to fit, such as those that `scaling.usable` keeps: columns N, D and loss, and optionally lr and
            batch_tokens.
        bootstrap: Number of resamples for the parameters of the loss law.
        seed: Seed of the fits' random draws.

    Raises:
        ValueError: If a setting or a size is not positive.
        FitError: If no run has a finite positive loss.
    """
    with limit_to_one_thread():
        return _fit_table(runs, bootstrap, seed)


def _fit_table(runs: pd.DataFrame, bootstrap: int, seed: int) -> TableFits:
    loss = runs["loss"].to_numpy(float)
    used = runs[np.isfinite(loss) & (loss > 0)]
    if used.empty:
        raise FitError(f"laws need runs with a finite positive loss, got {len(runs)} runs, none usable")
    _check_sizes(used)
    states, with_settings = _find_states(used)
    hp = None
    if "varied" in states.values():
        hp = _fit_settings(with_settings, states, seed)
        # A setting with one value in each group may still be identified by the trend over groups.
        tied = {name for name in SETTING_NAMES if states[name] == "varied" and not hp.identified[name]}
        tied = {name for name in tied if not _varies_within_groups(with_settings, name)}
        if tied:
            states = {name: "tied" if name in tied else state for name, state in states.items()}
            hp = _fit_settings(with_settings, states, seed) if "varied" in states.values() else None
    evidence, reason = None, ""
    try:
        evidence = fit_loss_evidence(used, hp, bootstrap=bootstrap, seed=seed)
    except FitError as error:
        reason = str(error)
    groups = _summarize_groups(used) if hp is None else hp.floors
    points = groups
    if hp is None or len(groups) < MIN_GROUPS:
        points = (used if hp is None else hp.used)[["N", "D", "loss"]].assign(sd=np.nan, n=1).reset_index(drop=True)
    constants = {n: float(used[n].dropna().iloc[0]) for n, state in states.items() if state == "constant"}
    return TableFits(
        used=used,
        hp=hp,
        states=states,
        constants=constants,
        n_without_settings=0 if hp is None else len(used) - len(with_settings),
        loss=evidence,
        no_loss_law=reason,
        groups=groups,
        points=points,
    )


def describe_settings_used(fits: TableFits) -> str:
    """Return in a sentence what the answer assumes of settings that were not varied; empty if all were."""
    if set(fits.states.values()) == {"missing"}:
        return "The table holds neither learning rates nor batches."
    parts = []
    for name, word in SETTING_NAMES.items():
        if fits.states[name] == "missing":
            parts.append(f"The table holds no {word}.")
        elif fits.states[name] == "constant":
            value = fits.constants[name]
            shown = f"{value:.4g}" if name == "lr" else f"{format_count(value)} tokens"
            parts.append(f"Every run has the {word} {shown}: its best value is not measured.")
        elif fits.states[name] == "tied":
            parts.append(f"All runs of equal N and D share one {word}: its best value is not measured.")
    return " ".join(parts)


def _check_sizes(used: pd.DataFrame) -> None:
    for name in ("N", "D"):
        values = used[name].to_numpy(float)
        wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if wrong.size:
            rows = ", ".join(map(str, wrong[:10]))
            raise ValueError(
                f"{name} must be positive and finite, got {values[wrong[0]]} (rows {rows}): drop these runs"
            )


def _find_states(used: pd.DataFrame) -> tuple[dict[str, SettingState], pd.DataFrame]:
    """Return the state of each setting as far as the column alone shows it, and the runs that have all settings."""
    states: dict[str, SettingState] = {}
    has_settings = np.ones(len(used), bool)
    for name in SETTING_NAMES:
        if name not in used or used[name].isna().all():
            states[name] = "missing"
            continue
        has_settings &= used[name].notna().to_numpy()
        values = used[name].dropna().to_numpy(float)
        # A value that is not positive is refused by name where the law is fitted.
        is_constant = bool((values > 0).all() and np.ptp(np.log(values)) < SAME_SETTING)
        states[name] = "constant" if is_constant else "varied"
    return states, used[has_settings]


def _varies_within_groups(runs: pd.DataFrame, name: str) -> bool:
    groups = group_runs(runs["N"].to_numpy(float), runs["D"].to_numpy(float))
    values = np.log(runs[name].to_numpy(float))[groups.order]
    spread = np.maximum.reduceat(values, groups.starts) - np.minimum.reduceat(values, groups.starts)
    return bool((spread > SAME_SETTING).any())


def _fit_settings(runs: pd.DataFrame, states: dict[str, SettingState], seed: int) -> HPFit:
    """Fit the law of learning rate and batch, with the prior's best value for a setting that was not varied.

    The law of the other setting then holds at the values that the runs had, whatever they were.
    """
    unknown = [name for name in SETTING_NAMES if states[name] != "varied"]
    if not unknown:
        return fit_hp_law(runs, seed=seed)
    hp = fit_hp_law(runs.assign(**{name: _compute_prior_optimum(runs, name) for name in unknown}), seed=seed)
    sentences = re.split(r"(?<=\.) (?=[A-Z])", hp.status)
    kept = [s for s in sentences if not any(SETTING_NAMES[name] in s for name in unknown)]
    return replace(hp, status=" ".join(kept) or "ok")


def _compute_prior_optimum(runs: pd.DataFrame, name: str) -> Array:
    """Return the best value of a setting at each run by the prior of the law."""
    N, D = (runs[c].to_numpy(float) for c in ("N", "D"))
    groups = group_runs(N, D)
    centre = (float(np.log(groups.N).mean()), float(np.log(groups.D).mean()))
    mup = "parametrization" in runs and bool((runs["parametrization"] == "mup").all())
    a0, a1, a2, b0, b1, b2 = make_prior("cubic", centre, mup)[0][:6]
    n, d = np.log(N) - centre[0], np.log(D) - centre[1]
    return np.asarray(np.exp(a0 + a1 * n + a2 * d if name == "lr" else b0 + b1 * d + b2 * n))


def _summarize_groups(used: pd.DataFrame) -> pd.DataFrame:
    """Return the groups of equal N and D with the lowest loss of each."""
    groups = group_runs(used["N"].to_numpy(float), used["D"].to_numpy(float))
    lowest = np.minimum.reduceat(used["loss"].to_numpy(float)[groups.order], groups.starts)
    return pd.DataFrame({"N": groups.N, "D": groups.D, "loss": lowest, "sd": np.nan, "n": groups.counts})
