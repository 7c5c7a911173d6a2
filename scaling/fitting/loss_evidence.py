"""Choose what a loss law is fitted to: the fitted minima of the groups, or the runs as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from scaling.fitting.groups import CLOSE
from scaling.fitting.loss_law import Fit, FitError, fit_loss_law
from scaling.fitting.lr_batch_law import HPFit

# The best settings of a group count as untried if they are expected to lower ln loss by more than this.
UNTRIED = 0.005
# How far ln loss of a run with unknown settings may lie above that of the best ones. Assumed, not measured.
UNKNOWN_SD = 0.01


@dataclass(frozen=True)
class LossEvidence:
    """A loss law with what it was fitted to.

    Attributes:
        fit: The loss law.
        run_noise: Scatter of one run about the values that the law was fitted to, sd of ln loss. An interval for one
            new run contains it.
        source: "minima" if the law was fitted to the lowest losses of the groups, "runs" if to the runs as they are.
        doubts: Sentences on what is doubtful in these values, for a user.
    """

    fit: Fit
    run_noise: float
    source: Literal["minima", "runs"]
    doubts: tuple[str, ...] = ()


def fit_loss_evidence(runs: pd.DataFrame, hp: HPFit | None, *, bootstrap: int = 0, seed: int = 0) -> LossEvidence:
    """Fit the loss law to runs.

    Args:
        runs: One row per run, with columns N, D and loss (nats per token). Runs without a finite positive loss are
            left out.
        hp: The law of learning rate and batch size of the same runs; None if the table does not contain them.
        bootstrap: Number of resamples for `Fit.samples`.
        seed: Seed of the resamples.

    Raises:
        FitError: If no law can exist.
    """
    loss = runs["loss"].to_numpy(float)
    table = runs[np.isfinite(loss) & (loss > 0)]
    if hp is not None:
        return _fit_minima(hp, _list_places_without_settings(table, hp), bootstrap, seed)
    if table.empty:
        raise FitError(f"a loss law needs runs with a finite positive loss, got {len(runs)} runs, none usable")
    N, D, loss = table[["N", "D", "loss"]].to_numpy(float).T
    return LossEvidence(fit_loss_law(N, D, loss, bootstrap=bootstrap, seed=seed), 0.0, "runs")


def _list_places_without_settings(table: pd.DataFrame, hp: HPFit) -> pd.DataFrame:
    """Return the lowest run of each N and D at which no run has both a learning rate and a batch size."""
    if not {"lr", "batch_tokens"} <= set(table.columns):
        return table.iloc[:0]
    unknown = table[table[["lr", "batch_tokens"]].isna().any(axis=1)]
    near = [
        bool(np.any(np.abs(np.log(hp.used["N"] / N)) + np.abs(np.log(hp.used["D"] / D)) < CLOSE))
        for N, D in zip(unknown["N"], unknown["D"], strict=True)
    ]
    alone = unknown[~np.array(near, bool)]
    return alone.loc[alone.groupby(["N", "D"])["loss"].idxmin()]


def _fit_minima(hp: HPFit, others: pd.DataFrame, bootstrap: int, seed: int) -> LossEvidence:
    """Fit the loss law to the lowest losses of the groups; of fewer than three groups to their runs.

    Args:
        hp: The law of learning rate and batch size.
        others: Runs whose settings are not known, at other N and D. They count like groups whose best settings were
            not tried.
        bootstrap: Number of resamples.
        seed: Seed of the resamples.
    """
    noise, tuned = float(np.mean([f.noise for f in hp.fits])), all(hp.identified.values())
    floors, doubts = hp.floors, []
    if not tuned:
        words = {"lr": "learning rate", "batch_tokens": "batch"}
        unknown = " and the best ".join(words[name] for name, known in hp.identified.items() if not known)
        doubts.append(f"The runs do not show the best {unknown}, so the loss law holds for runs tuned like these.")
    elif np.mean(floors["untried"] > UNTRIED) > 0.2:
        far = floors["untried"][floors["untried"] > UNTRIED]
        doubts.append(
            f"{len(far)} of {len(floors)} groups did not try the best settings: their lowest losses lie above what "
            f"they could reach, by about {100 * float(far.median()):.2g} %, and count less in the loss law."
        )
    if len(floors) >= 3:
        N, D, loss, sd = (floors[c].to_numpy(float) for c in ("N", "D", "loss", "sd"))
        sd = np.hypot(sd, floors["untried"].to_numpy(float) if tuned else 0.0)
        N, D, loss = (np.r_[v, others[c].to_numpy(float)] for v, c in ((N, "N"), (D, "D"), (loss, "loss")))
        sd = np.r_[sd, np.full(len(others), UNKNOWN_SD)]
        fit = fit_loss_law(N, D, loss, bootstrap=bootstrap, seed=seed, sd=sd)
        return LossEvidence(fit, noise, "minima" if tuned else "runs", tuple(doubts))
    N, D, lr, batch, loss = hp.used[["N", "D", "lr", "batch_tokens", "loss"]].to_numpy(float).T
    lowered = loss * np.exp(-hp.height(lr, batch, N, D)) if tuned else loss
    fit = fit_loss_law(N, D, lowered, bootstrap=bootstrap, seed=seed)
    return LossEvidence(fit, 0.0, "minima" if tuned else "runs", tuple(doubts))
