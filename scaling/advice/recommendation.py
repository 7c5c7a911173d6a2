"""Recommend learning rate, batch and loss for a target, from a table of runs, with intervals and flags."""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import Any, TypedDict, cast

import numpy as np
import pandas as pd

from scaling.advice.comparison import PublishedComparison, compare_published_law, format_comparison
from scaling.advice.flags import CONVENTIONS, Flag, collect_flags, find_convention, find_searched_ranges, flag_optimum
from scaling.advice.next_run import NextRun, NextRunNote, Sweep, compute_loss_half_width, plan_next
from scaling.common.quantities import format_count
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law, fit_loss_floors
from scaling.laws.published import get_published_law, list_published_laws
from scaling.runs.table import hash_rows, hash_table, usable

INTERVAL_FIELDS = ("lr_interval", "batch_interval", "loss_interval", "N_interval", "D_interval")
UNTRUSTED = "NOT TO BE TRUSTED"
# Of printed lines, in columns.
LINE_WIDTH = 80


class RecommendationProvenance(TypedDict, total=False):
    """Which runs a recommendation is based on. Older notes lack some of the keys.

    Attributes:
        run_ids: Number of distinct runs.
        run_ids_sha256: SHA-256 of their sorted run ids.
        data_sha256: SHA-256 of the numbers that the laws were fitted to.
        table_sha256: SHA-256 of the usable proxies of the table, see `scaling.runs.table.hash_table`.
        n_runs: Number of rows that the laws were fitted to.
        n_diverged: Rows left out because the run diverged.
        n_excluded: Rows left out for other reasons.
        n_far: Rows left out because they are far above the best of their group.
        n_groups: Number of (N, D) groups.
        version: The version of muscale.
        N_convention: How N was counted, a value of `scaling.advice.flags.CONVENTIONS`.
    """

    run_ids: int
    run_ids_sha256: str
    data_sha256: str
    table_sha256: str
    n_runs: int
    n_diverged: int
    n_excluded: int
    n_far: int
    n_groups: int
    version: str
    N_convention: str


class LossLawValues(TypedDict):
    """The fitted loss law L = E + A / N^alpha + B / D^beta in nats per token, and "ok" or what is doubtful."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    status: str


class HPLawValues(TypedDict):
    """The fitted law of learning rate and batch, each a power of N and D, and "ok" or what is doubtful."""

    lr_coef: float
    lr_N: float
    lr_D: float
    batch_coef: float
    batch_N: float
    batch_D: float
    status: str


@dataclass(frozen=True)
class Recommendation:
    """What to run at (N, D), which loss to expect, and what this is based on.

    Printing it shows all of this as text. `to_dict` and `from_dict` convert it to plain JSON values and back.

    Attributes:
        N: Parameters that multiply tokens, unless the provenance says otherwise.
        D: Training tokens.
        C: Training compute 6 N D, FLOPs.
        lr: Peak learning rate, at base width under muP.
        lr_interval: Its interval.
        batch_tokens: Tokens per optimizer step, not clipped to the searched range.
        batch_interval: Its interval, tokens per step.
        batch_seqs: Sequences per optimizer step, rounded; None if the sequence length of the runs is not known.
        seq_len: The sequence length of the runs, tokens; None if it was not recorded or differs.
        loss: Expected loss of a run with these settings, nats per token.
        loss_interval: The interval of one new run, nats per token.
        mass: The probability that each interval holds.
        expected_regret: Loss that is lost because the best lr and batch are not known exactly, as a share of the loss;
            an upper bound.
        flags: Reasons to doubt this. If any of them is serious, do not trust the recommendation.
        provenance: Which runs it is based on.
        loss_law: The fitted loss law.
        hp_law: The fitted law of learning rate and batch.
        N_interval: The interval of the compute-optimal N; None if N and D were given.
        D_interval: The interval of the compute-optimal D, tokens; None if N and D were given.
        next_run: What to run next, as JSON keeps a `scaling.advice.next_run.NextRun`; None if it was not asked for.
        beside: What published laws give at (N, D). Not kept in notes.
        run_ids: The runs that the laws were fitted to. Not kept in notes.
    """

    N: float
    D: float
    C: float
    lr: float
    lr_interval: tuple[float, float]
    batch_tokens: float
    batch_interval: tuple[float, float]
    batch_seqs: int | None
    seq_len: int | None
    loss: float
    loss_interval: tuple[float, float]
    mass: float
    expected_regret: float
    flags: tuple[Flag, ...]
    provenance: RecommendationProvenance
    loss_law: LossLawValues
    hp_law: HPLawValues
    # The fields below are missing in older notes.
    N_interval: tuple[float, float] | None = None
    D_interval: tuple[float, float] | None = None
    next_run: NextRunNote | None = None
    beside: tuple[PublishedComparison, ...] = ()
    run_ids: tuple[str, ...] = ()

    @property
    def trustworthy(self) -> bool:
        """Whether no flag is serious."""
        return not any(f.serious for f in self.flags)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, from which `from_dict` makes the same recommendation again."""
        plain = asdict(self) | {"trustworthy": self.trustworthy}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recommendation:
        """Return the recommendation that `to_dict` converted.

        Args:
            plain: JSON values, also from an earlier or later version: missing fields get their defaults, unknown ones
                are ignored.
        """
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in plain.items() if k in known}
        for name in INTERVAL_FIELDS:
            if values.get(name) is not None:
                values[name] = (float(values[name][0]), float(values[name][1]))
        values["flags"] = tuple(Flag(**f) for f in values["flags"])
        for name in ("beside", "run_ids"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)

    def __str__(self) -> str:
        flags = sorted(self.flags, key=lambda f: not f.serious)
        serious = [f.text for f in flags if f.serious]
        lines = []
        if serious:
            more = f" And {len(serious) - 1} more below." if len(serious) > 1 else ""
            lines += [_wrap(f"{UNTRUSTED}: {serious[0]}{more}", 0), ""]
        lines += [*self._format_settings(), "", _wrap(_format_origin(self.provenance), 0)]
        if flags:
            lines += ["", "Warnings:"]
            lines += [_wrap(f"  {'SERIOUS' if f.serious else 'note'}: {f.text}", 4) for f in flags]
        if self.beside:
            lines += ["", "Published laws, for comparison only; each has its own setting and its own N:"]
            lines += [_wrap(format_comparison(law, self.lr, self.batch_tokens), 18) for law in self.beside]
        if self.next_run is not None:
            lines += ["", "What to run next to narrow this most:", str(parse_next_run(self.next_run))]
        end = f"{UNTRUSTED} until the serious warnings are resolved." if serious else "No serious warnings."
        return "\n".join([*lines, "", end])

    def _format_settings(self) -> list[str]:
        """Return the table of settings and loss, one line per row."""
        (batch_low, batch_high), (loss_low, loss_high) = self.batch_interval, self.loss_interval
        guess = "best guess" if self.trustworthy else "untrusted"
        rows = [("", guess, f"{100 * self.mass:.0f} % interval")]
        for symbol, value, interval in (("N", self.N, self.N_interval), ("D", self.D, self.D_interval)):
            if interval is not None:
                text = f"{format_count(interval[0])} to {format_count(interval[1])}"
                rows.append((f"compute-optimal {symbol}", format_count(value), text))
        rows.append(("training FLOPs, 6ND", f"{self.C:.3g}", ""))
        rows.append(("learning rate", f"{self.lr:.4g}", f"{self.lr_interval[0]:.4g} to {self.lr_interval[1]:.4g}"))
        rows.append(("batch, tokens per step", f"{self.batch_tokens:,.0f}", f"{batch_low:,.0f} to {batch_high:,.0f}"))
        if self.batch_seqs is not None:
            rows.append((f"  in sequences of {self.seq_len:,}", f"{self.batch_seqs:,}", ""))
        rows.append(("loss, nats per token", f"{self.loss:.4f}", f"{loss_low:.4f} to {loss_high:.4f}"))
        rows.append(("expected regret", f"{100 * self.expected_regret:.2f} %", "of the loss; an upper bound"))
        title = f"Recommendation for N = {self.N:,.0f}, D = {self.D:,.0f}"
        return [title, *(f"  {name:26}{value:>16}   {interval}".rstrip() for name, value, interval in rows)]


def recommend(
    runs: pd.DataFrame,
    *,
    N: float | None = None,
    D: float | None = None,
    C: float | None = None,
    mass: float = 0.9,
    space: Mapping[str, Sequence[float]] | None = None,
    beside: Sequence[str] = (),
    next_run: bool = False,
    at_most: float | None = None,
    seed: int = 0,
) -> Recommendation:
    """Recommend settings for a run at (N, D), or at the compute-optimal (N, D) of C FLOPs, and predict its loss.

    The loss law is fitted to the fitted minimum of every (N, D) group, so that every run of a group is used, not only
    the best.

    Args:
        runs: A run table with the columns N, D, lr, batch_tokens and loss, of which the rows count that
            `scaling.usable` keeps. Optional columns: run_id, role, diverged, excluded, seq_len, parametrization,
            N_convention, N_total, N_nonembedding.
        N: Parameters of the target that multiply tokens.
        D: Training tokens of the target.
        C: Training compute of the target, FLOPs, in place of N and D.
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
    """
    _check_arguments(N, D, C, mass, at_most)
    laws = [get_published_law(name) for name in (list_published_laws() if "all" in beside else dict.fromkeys(beside))]

    used = usable(runs)
    hp = fit_hp_law(used, seed=seed)
    searched = find_searched_ranges(hp, space)
    fit, run_noise = fit_loss_floors(hp, seed=seed)
    N_interval, D_interval = None, None
    optimum_flags: list[Flag] = []
    if C is not None:
        best = fit.optimum(C, mass, seed=seed)
        N, D, N_interval, D_interval = best.N, best.D, best.N_interval, best.D_interval
        optimum_flags = flag_optimum(fit, C, best)
    assert N is not None
    assert D is not None

    N, D = float(N), float(D)
    lr, batch = (float(v) for v in hp.law(N, D))
    lr_interval, batch_interval = hp.interval(N, D, mass)
    seq_len = _find_seq_len(used)
    loss, half_width = float(fit.predict(N, D)), compute_loss_half_width(fit, run_noise, N, D, mass)
    convention = find_convention(used)
    flags = [*collect_flags(hp, fit, used, searched, N, D), *optimum_flags]
    note: NextRunNote | None = None
    if next_run:
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
        lr_interval=lr_interval,
        batch_tokens=batch,
        batch_interval=batch_interval,
        batch_seqs=None if seq_len is None else max(1, round(batch / seq_len)),
        seq_len=seq_len,
        loss=loss,
        loss_interval=(loss * math.exp(-half_width), loss * math.exp(half_width)),
        mass=mass,
        expected_regret=hp.expected_regret(N, D),
        flags=tuple(flags),
        provenance=_build_provenance(runs, hp, convention),
        loss_law=cast(LossLawValues, asdict(fit.law) | {"status": fit.status}),
        hp_law=cast(HPLawValues, asdict(hp.law) | {"status": hp.status}),
        N_interval=N_interval,
        D_interval=D_interval,
        next_run=note,
        beside=tuple(compare_published_law(law, N, D, convention) for law in laws),
        run_ids=tuple(_list_run_ids(hp)),
    )


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


def parse_next_run(note: Mapping[str, Any]) -> NextRun:
    """Return the `NextRun` that a recommendation keeps as JSON values."""
    own: dict[str, Any]
    sweep: dict[str, Any]
    own, sweep = ({k: tuple(v) if isinstance(v, list) else v for k, v in d.items()} for d in (note, note["sweep"]))
    return NextRun(**own | {"sweep": Sweep(**sweep)})


def _build_provenance(runs: pd.DataFrame, hp: HPFit, convention: str) -> RecommendationProvenance:
    """Return which runs the laws were fitted to. It does not depend on the order of the rows."""
    ids = _list_run_ids(hp)
    proxies = (runs[runs["role"] != "target"] if "role" in runs else runs).reset_index(drop=True)
    has_diverged = ~np.isfinite(proxies["loss"].to_numpy(float))
    if "diverged" in proxies:
        has_diverged |= proxies["diverged"].to_numpy(bool)
    return {
        "run_ids": len(ids),
        "run_ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "data_sha256": hash_rows(hp.used),
        "table_sha256": hash_table(runs),
        "n_runs": hp.n_runs,
        "n_diverged": int(has_diverged.sum()),
        "n_excluded": int((~has_diverged & ~proxies.index.isin(usable(proxies).index)).sum()),
        "n_far": hp.n_far,
        "n_groups": len(hp.floors),
        "version": _find_version(),
        "N_convention": CONVENTIONS[convention],
    }


def _wrap(text: str, indent: int) -> str:
    """Wrap text to LINE_WIDTH, with so many spaces before all lines but the first."""
    return textwrap.fill(
        text, LINE_WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _list_run_ids(hp: HPFit) -> list[str]:
    """Return the id of each run once, though it may have a row at every rung."""
    return sorted({str(i) for i in hp.run_ids})


def _format_origin(provenance: RecommendationProvenance) -> str:
    """Return in a sentence which runs a recommendation is based on."""
    reasons = (
        (provenance.get("n_diverged", 0), "diverged"),
        (provenance.get("n_excluded", 0), "excluded otherwise"),
        (provenance.get("n_far", 0), "far above the best of their group"),
    )
    left_out = ", ".join(f"{count} {reason}" for count, reason in reasons if count)
    data = (
        f" Data {provenance['data_sha256'][:12]}, muscale {provenance['version']}."
        if "data_sha256" in provenance
        else ""
    )
    return (
        f"Based on {provenance['n_runs']} runs in {provenance['n_groups']} groups of equal N and D"
        f"{f' (left out: {left_out})' if left_out else ''}.{data}"
    )


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
