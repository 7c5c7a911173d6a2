"""Recommend learning rate, batch and loss for a target, from a table of runs, with intervals and flags."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaling.advice.answer import UNTRUSTED as UNTRUSTED
from scaling.advice.answer import HPLawValues, LossLawValues, OptimalSize, RecommendationProvenance
from scaling.advice.answer import Recommendation as Recommendation
from scaling.advice.comparison import compare_published_law
from scaling.advice.conditions import find_mixed_conditions
from scaling.advice.flags import (
    CONVENTIONS,
    Flag,
    collect_flags,
    find_convention,
    find_searched_ranges,
    flag_absurd_loss,
    flag_optimum,
)
from scaling.advice.measured import flag_measured_best
from scaling.advice.next_run import NextRunNote, compute_loss_half_width, plan_next
from scaling.advice.table_fits import SETTING_NAMES, TableFits, fit_table
from scaling.common.quantities import read_count
from scaling.fitting.envelope import make_law_frontier
from scaling.fitting.loss_law import Allocation, Fit, FitError, find_coverage_doubts, fit_loss_law
from scaling.laws.published import get_published_law, list_published_laws
from scaling.runs.table import hash_rows, hash_table, usable

# A target run whose N and D are this close to the target's, as a share, is a run of the target itself.
SAME_TARGET = 0.01
# Points that the compute-optimal size by the plain law needs: a few more than the law has parameters.
MIN_POINTS = 8
# Resamples for the compute-optimal size by the plain law, and the ratio of the ends of its interval that is too wide.
BOOTSTRAP_SAMPLES, MAX_OPTIMUM_FACTOR = 200, 10.0
# The largest ln of the ratio of an interval's end to the loss.
MAX_LOG_WIDTH = 300.0


def recommend(
    runs: pd.DataFrame,
    *,
    N: float | str | None = None,
    D: float | str | None = None,
    C: float | str | None = None,
    mass: float = 0.9,
    space: Mapping[str, Sequence[float]] | None = None,
    beside: Sequence[str] = (),
    next_run: bool = False,
    at_most: float | str | None = None,
    seed: int = 0,
) -> Recommendation:
    """Recommend settings for a run at (N, D), or at the compute-optimal (N, D) of C FLOPs, and predict its loss.

    Every run of a group of equal N and D is used, not only the best one. What the table does not hold is left out of
    the answer: without learning rates and batches, it still has the loss and the compute-optimal size.

    Args:
        runs: A run table with the columns N, D and loss and, for recommended settings, lr and batch_tokens. The rows
            count that `scaling.usable` keeps, but for runs of the target itself, with which the answer is compared.
            Other optional columns: run_id, role, diverged, excluded, seq_len, parametrization, N_convention, N_total,
            N_nonembedding.
        N: Parameters of the target that multiply tokens, as a number or as text such as "7B".
        D: Training tokens of the target, such as "1.4T".
        C: Training compute of the target in FLOPs, in place of N and D.
        mass: The probability that each interval holds.
        space: The range that was searched, as {"lr": (low, high), "batch_tokens": (low, high)}; by default that of the
            runs.
        beside: Names of published laws to compare with; "all" for every one.
        next_run: Whether to choose the run that narrows the answer most (`scaling.plan_next`), which takes 1 to 3 s.
        at_most: The most FLOPs of that run; by default 3 times the largest run, but not more than a tenth of the
            target.
        seed: Seed of the fits' random draws.

    Returns:
        The recommendation. A doubtful one is returned, too: its flags say why.

    Raises:
        ValueError: If the target, an option or the table is unusable.
        FitError: If the runs allow no law.

    Example:
        >>> print(recommend(runs, N="7B", D="1.4T"))
    """
    N, D, C, at_most = (_read_quantity(*pair) for pair in (("N", N), ("D", D), ("C", C), ("at_most", at_most)))
    _check_arguments(N, D, C, mass, at_most)
    laws = [get_published_law(name) for name in (list_published_laws() if "all" in beside else dict.fromkeys(beside))]

    used, measured = usable(runs), dict[str, float]()
    if N is not None and D is not None:
        used, measured = set_target_aside(runs, used, N, D)
    fits = fit_table(used, seed=seed)
    if fits.loss is None:
        raise FitError(fits.no_loss_law)
    fit, run_noise, hp = fits.loss.fit, fits.loss.run_noise, fits.hp
    searched = find_searched_ranges(fits, space)
    best, optimum_flags = _find_optimum(fits, fit, N, D, C, mass, seed)
    if C is not None and best is not None:
        N, D = best.N, best.D
    assert N is not None
    assert D is not None

    settings, intervals = dict(fits.constants), {}
    if hp is not None:
        values = zip(SETTING_NAMES, hp.law(N, D), hp.interval(N, D, mass), strict=True)
        for name, value, interval in values:
            if fits.states[name] == "varied":
                settings[name], intervals[name] = float(value), interval
    lr, batch = settings.get("lr"), settings.get("batch_tokens")
    seq_len = _find_seq_len(used)
    loss = float(fit.predict(N, D))
    half_width = min(compute_loss_half_width(fit, run_noise, N, D, mass), MAX_LOG_WIDTH)
    loss_interval = (loss * math.exp(-half_width), loss * math.exp(half_width))
    convention = find_convention(used)
    flags = [
        *flag_absurd_loss(loss, loss_interval, fits.used["loss"]),
        *collect_flags(fits, fit, searched, N, D, find_mixed_conditions(fits)),
        *optimum_flags,
        *flag_measured_best(fits, mass),
    ]
    note: NextRunNote | None = None
    if next_run and hp is not None and len(intervals) == len(SETTING_NAMES):
        try:
            plan = plan_next(hp, fit, N, D, run_noise=run_noise, mass=mass, at_most=at_most, seq_len=seq_len)
            # Through JSON, so that tuples are lists, as in a note.
            note = json.loads(json.dumps(asdict(plan)))
        except ValueError as error:
            if at_most is not None:
                raise
            flags.append(Flag("next-run", f"No next run is proposed: {error}", serious=False))
    return Recommendation(
        N=N,
        D=D,
        C=6.0 * N * D,
        lr=lr,
        lr_interval=intervals.get("lr"),
        batch_tokens=batch,
        batch_interval=intervals.get("batch_tokens"),
        batch_seqs=None if seq_len is None or batch is None else max(1, round(batch / seq_len)),
        seq_len=seq_len,
        loss=loss,
        loss_interval=loss_interval,
        mass=mass,
        expected_regret=hp.expected_regret(N, D) if hp is not None and len(intervals) == len(SETTING_NAMES) else None,
        flags=tuple(flags),
        provenance=_build_provenance(runs, fits, convention),
        loss_law=cast(LossLawValues, asdict(fit.law) | {"status": fit.status}),
        hp_law=None if hp is None else cast(HPLawValues, asdict(hp.law) | {"status": hp.status}),
        N_interval=best.N_interval if C is not None and best is not None else None,
        D_interval=best.D_interval if C is not None and best is not None else None,
        next_run=note,
        beside=tuple(compare_published_law(law, N, D, convention) for law in laws),
        run_ids=tuple(_list_run_ids(fits)),
        optimum=_describe_optimum(best),
        not_measured={name: reason for name in SETTING_NAMES if (reason := fits.explain_setting(name))},
        refit=bool(measured),
        measured=measured,
    )


def _read_quantity(name: str, value: float | str | None) -> float | None:
    """Return a number that may be given as text, such as "7B"."""
    if isinstance(value, str):
        try:
            return read_count(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return None if value is None else float(value)


def _check_arguments(N: float | None, D: float | None, C: float | None, mass: float, at_most: float | None) -> None:
    if not ((N is not None and D is not None and C is None) or (N is None and D is None and C is not None)):
        given = ", ".join(k for k, v in (("N", N), ("D", D), ("C", C)) if v is not None) or "nothing"
        raise ValueError(f"a recommendation needs N and D, or C alone; got {given}")
    for name, value in (("N", N), ("D", D), ("C", C)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if not 0 < mass < 1:
        raise ValueError(f"mass must lie between 0 and 1, got {mass}")
    if at_most is not None and not (math.isfinite(at_most) and at_most > 0):
        raise ValueError(f"at_most must be positive FLOPs, got {at_most}")


def set_target_aside(
    runs: pd.DataFrame, used: pd.DataFrame, N: float, D: float
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Set the runs of the target itself aside, with which its prediction is compared.

    Args:
        runs: A run table.
        used: Its usable rows.
        N: Parameters of the target that multiply tokens.
        D: Training tokens of the target.

    Returns:
        The usable rows without runs of the target, and the final loss of each of its arms, in nats per token.
    """
    if "role" not in runs:
        return used, {}

    def is_own(rows: pd.DataFrame) -> NDArray[np.bool_]:
        sizes, tokens = (rows[c].to_numpy(float) for c in ("N", "D"))
        is_near = (np.abs(sizes / N - 1) < SAME_TARGET) & (np.abs(tokens / D - 1) < SAME_TARGET)
        return np.asarray(rows["role"].eq("target").to_numpy(bool) & is_near)

    own = runs[is_own(runs) & np.isfinite(runs["loss"])]
    arms = own["arm"] if "arm" in own else pd.Series("scratch", own.index)
    measured = {str(arm): float(loss) for arm, loss in zip(arms.fillna("target"), own["loss"], strict=True)}
    return used[~is_own(used)], measured


def _find_optimum(
    fits: TableFits, fit: Fit, N: float | None, D: float | None, C: float | None, mass: float, seed: int
) -> tuple[Allocation | None, list[Flag]]:
    """Return the compute-optimal size at C FLOPs, or at those of (N, D), with what is doubtful about it.

    It is that of the averaged prediction or, where that has no bounds, of the plain law. If the size was asked for,
    FitError is raised where neither has one.
    """
    asked = C is not None
    compute = C if C is not None else 6.0 * cast(float, N) * cast(float, D)
    best, failure = None, None
    try:
        best = fit.optimum(compute, mass, seed=seed)
    except FitError as error:
        failure = error
    if best is not None and best.bounded:
        return best, flag_optimum(fit, compute, best) if asked else []
    plain = _find_plain_optimum(fits, compute, mass, seed)
    if plain is not None:
        text = (
            "The averaged forms do not bound the compute-optimal size, so it is that of the plain law "
            "E + A/N^alpha + B/D^beta, whose interval does not include the doubt about its form."
        )
        short = "The compute-optimal size is that of the plain law alone; the averaged forms do not bound it."
        return plain, [Flag("optimum-plain", text, serious=False, short=short)]
    if not asked:
        return None, []
    if best is None:
        raise cast(FitError, failure)
    return best, flag_optimum(fit, compute, best)


def _find_plain_optimum(fits: TableFits, C: float, mass: float, seed: int) -> Allocation | None:
    """Return the compute-optimal size by the plain law, with its bootstrap interval; None if that is too wide."""
    N, D, loss = (fits.points[c].to_numpy(float) for c in ("N", "D", "loss"))
    # Few points, or sizes and token counts that do not determine the exponents, have no honest bootstrap.
    if len(N) < MIN_POINTS or find_coverage_doubts(np.log(N), np.log(D)):
        return None
    try:
        frontier = make_law_frontier(fit_loss_law(N, D, loss, bootstrap=BOOTSTRAP_SAMPLES, seed=seed), C)
    # The law has no optimum, or too few of its resamples have one.
    except ValueError:
        return None
    (low, high), (D_low, D_high) = (trend.interval(C, mass) for trend in (frontier.N, frontier.D))
    if not high < MAX_OPTIMUM_FACTOR * low:
        return None
    size = float(frontier.N.law(C))
    intervals = (float(low), float(high)), (float(D_low), float(D_high))
    return Allocation(size, C / 6.0 / size, *intervals, bounded=True)


def _describe_optimum(best: Allocation | None) -> OptimalSize | None:
    if best is None or not best.bounded:
        return None
    return {"N": best.N, "D": best.D, "N_interval": list(best.N_interval), "D_interval": list(best.D_interval)}


def _build_provenance(runs: pd.DataFrame, fits: TableFits, convention: str) -> RecommendationProvenance:
    """Return which runs the laws were fitted to. It does not depend on the order of the rows."""
    ids = _list_run_ids(fits)
    proxies = (runs[runs["role"] != "target"] if "role" in runs else runs).reset_index(drop=True)
    has_diverged = ~np.isfinite(proxies["loss"].to_numpy(float))
    if "diverged" in proxies:
        has_diverged = proxies["diverged"].to_numpy(bool)
    is_used = proxies.index.isin(usable(proxies).index)
    reasons = proxies["excluded"] if "excluded" in proxies else pd.Series("", proxies.index)
    has_no_result = ~has_diverged & reasons.fillna("").str.startswith("no result").to_numpy(bool)
    is_full = fits.hp is not None and not any(fits.explain_setting(name) for name in SETTING_NAMES)
    fitted = fits.hp.used if is_full and fits.hp is not None else fits.used
    return {
        "run_ids": len(ids),
        "run_ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "data_sha256": hash_rows(fitted),
        "table_sha256": hash_table(runs),
        "n_runs": len(fits.used) if fits.hp is None else fits.hp.n_runs,
        "n_diverged": int(has_diverged.sum()),
        "n_without_result": int(has_no_result.sum()),
        "n_excluded": int((~has_diverged & ~has_no_result & ~is_used).sum()),
        "n_far": 0 if fits.hp is None else fits.hp.n_far,
        "n_groups": len(fits.groups),
        "version": _find_version(),
        "N_convention": CONVENTIONS[convention],
    }


def _list_run_ids(fits: TableFits) -> list[str]:
    """Return the id of each run once, though it may have a row at every rung."""
    if fits.hp is not None:
        return sorted({str(i) for i in fits.hp.run_ids})
    return sorted({str(i) for i in fits.used.get("run_id", fits.used.index)})


def _find_seq_len(runs: pd.DataFrame) -> int | None:
    """Return the sequence length of the runs, or None if it was not recorded or differs."""
    if "seq_len" not in runs:
        return None
    lengths = runs["seq_len"].dropna().unique()
    return int(lengths[0]) if len(lengths) == 1 else None


def _find_version() -> str:
    try:
        return metadata.version("muscale")
    except metadata.PackageNotFoundError:
        return "not installed"
