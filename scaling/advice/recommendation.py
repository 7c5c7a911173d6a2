"""Runs and a target in, a recommendation out: learning rate, batch, loss, with intervals, and what to doubt in them."""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd

from scaling.advice.flags import CONVENTIONS, Flag, collect_flags, find_convention, flag_optimum, find_searched_ranges
from scaling.advice.next_run import NextRun, Sweep, compute_loss_half_width, plan_next
from scaling.common.quantities import format_count
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law, fit_loss_floors
from scaling.laws import published
from scaling.runs.table import hash_rows, hash_table, usable

INTERVAL_FIELDS = ("lr_interval", "batch_interval", "loss_interval", "N_interval", "D_interval")
UNTRUSTED = "NOT TO BE TRUSTED"
LINE_WIDTH = 120  # of printed lines


@dataclass(frozen=True)
class Recommendation:
    """What to run at (N, D), what to expect, and where this comes from."""

    N: float  # parameters that multiply tokens, unless provenance says otherwise
    D: float  # tokens
    C: float  # FLOPs, 6 N D
    lr: float  # at base width under muP
    lr_interval: tuple[float, float]
    batch_tokens: float  # tokens per optimizer step, not clipped to the searched range
    batch_interval: tuple[float, float]
    batch_seqs: int | None  # sequences per step, rounded; None without seq_len
    seq_len: int | None
    loss: float  # nats per token, of a run at the best settings
    loss_interval: tuple[float, float]  # of one new run
    mass: float  # of all intervals
    expected_regret: float  # relative loss lost by not knowing lr* and B* exactly; an upper bound
    flags: tuple[Flag, ...]
    provenance: dict[str, Any]
    loss_law: dict[str, Any]
    hp_law: dict[str, Any]
    # what follows is missing in older notes
    N_interval: tuple[float, float] | None = None  # of the compute-optimal N, D; None where they were given
    D_interval: tuple[float, float] | None = None
    next_run: dict[str, Any] | None = None  # scaling.advice.next_run.NextRun as a dict; None where it was not asked for
    beside: tuple[dict[str, Any], ...] = ()  # published laws at (N, D); not kept in notes
    run_ids: tuple[str, ...] = ()  # of the runs that were used; not kept in notes

    @property
    def trustworthy(self) -> bool:
        """No serious flag."""
        return not any(f.serious for f in self.flags)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the same recommendation back."""
        plain = asdict(self) | {"trustworthy": self.trustworthy}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recommendation:
        """Also of notes that were written before a field was there."""
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
        low, high = self.batch_interval
        best, worst = self.loss_interval
        sequences = ""
        if self.batch_seqs is not None:
            sequences = f"   {self.batch_seqs:,} sequence{'' if self.batch_seqs == 1 else 's'} of {self.seq_len:,}"
        flags = sorted(self.flags, key=lambda f: not f.serious)
        serious = [f.text for f in flags if f.serious]
        lines = []
        if serious:
            more = f" And {len(serious) - 1} more below." if len(serious) > 1 else ""
            lines += [_wrap(f"{UNTRUSTED}: {serious[0]}{more}"), ""]
        guess = "best guess" if self.trustworthy else "untrusted"
        lines.append(f"Recommendation for N = {self.N:,.0f}, D = {self.D:,.0f} (C = {self.C:.3g} FLOPs)")
        lines.append(f"{'':26}{guess:>16}   {100 * self.mass:.0f} % interval")
        for letter, value, pair in (("N", self.N, self.N_interval), ("D", self.D, self.D_interval)):
            if pair is not None:
                lines.append(
                    f"{'  compute-optimal ' + letter:26}{format_count(value):>16}   {format_count(pair[0])} to {format_count(pair[1])}"
                )
        lines += [
            f"{'  learning rate':26}{self.lr:>16.4g}   {self.lr_interval[0]:.4g} to {self.lr_interval[1]:.4g}",
            f"{'  batch, tokens per step':26}{self.batch_tokens:>16,.0f}   {low:,.0f} to {high:,.0f}{sequences}",
            f"{'  loss, nats per token':26}{self.loss:>16.4f}   {best:.4f} to {worst:.4f}",
            f"{'  expected regret':26}{100 * self.expected_regret:>14.2f} %   of the loss; an upper bound",
            _format_origin(self.provenance),
        ]
        if flags:
            lines += ["", "To doubt:"]
            lines += [_wrap(f"  {'SERIOUS' if f.serious else 'note'}: {f.text}") for f in flags]
        if self.beside:
            lines += [
                "",
                "Published laws, with their own settings and counts (none of them enters the recommendation):",
            ]
            lines += [_wrap(_format_published(law, self), 18) for law in self.beside]
        if self.next_run is not None:
            lines += ["", "To narrow it most:", str(parse_next_run(self.next_run))]
        lines += ["", f"{UNTRUSTED} before the serious points are mended." if serious else "No serious doubt."]
        return "\n".join(lines)


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
    """Best settings and loss at (N, D), or at the compute-optimal (N, D) of C FLOPs.

    runs: N, D, lr, batch_tokens, loss; optional run_id, role, diverged, excluded (`scaling.runs.table.usable` rows count),
    seq_len, parametrization, N_convention, N_total, N_nonembedding. space: {"lr": (low, high), "batch_tokens": (low,
    high)} that was searched (default: the data's range). beside: names of published laws, "all" for every one.
    next_run: also say which run of at most `at_most` FLOPs narrows the answer most (scaling/advice/next_run.py; 1 to 3 s).

    The loss law is fitted to the fitted minimum of every group, so that all runs speak. ValueError when the target or
    the table is unusable, FitError when no law can exist.
    """
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
    laws = [published.get_published_law(name) for name in (published.list_published_laws() if "all" in beside else dict.fromkeys(beside))]

    used = usable(runs)
    hp = fit_hp_law(used, seed=seed)
    searched = find_searched_ranges(hp, space)
    fit, run_noise = fit_loss_floors(hp, seed=seed)
    optimal: list[tuple[float, float] | None] = [None, None]
    doubts: list[Flag] = []
    if C is not None:
        best = fit.optimum(C, mass, seed=seed)
        N, D, optimal = best.N, best.D, [best.N_interval, best.D_interval]
        doubts = flag_optimum(fit, C, best)
    assert N is not None
    assert D is not None

    N, D = float(N), float(D)
    lr, batch = (float(v) for v in hp.law(N, D))
    lr_interval, batch_interval = hp.interval(N, D, mass)
    seq_len = _find_seq_len(used)
    loss, half = float(fit.predict(N, D)), compute_loss_half_width(fit, run_noise, N, D, mass)
    kind = find_convention(used)
    flags = [*collect_flags(hp, fit, used, searched, N, D), *doubts]
    planned = None
    if next_run:
        try:
            plan = plan_next(hp, fit, N, D, run_noise=run_noise, mass=mass, at_most=at_most, seq_len=seq_len)
            planned = json.loads(json.dumps(asdict(plan)))  # lists, as a note has them
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
        loss_interval=(loss * math.exp(-half), loss * math.exp(half)),
        mass=mass,
        expected_regret=hp.expected_regret(N, D),
        flags=tuple(flags),
        provenance=_build_provenance(runs, hp, kind),
        loss_law=asdict(fit.law) | {"status": fit.status},
        hp_law=asdict(hp.law) | {"status": hp.status},
        N_interval=optimal[0],
        D_interval=optimal[1],
        next_run=planned,
        beside=tuple(_compare_published(law, N, D, kind) for law in laws),
        run_ids=tuple(_list_run_ids(hp)),
    )


def parse_next_run(plain: Mapping[str, Any]) -> NextRun:
    """A `NextRun` from the dict in a recommendation."""
    own: dict[str, Any]
    sweep: dict[str, Any]
    own, sweep = ({k: tuple(v) if isinstance(v, list) else v for k, v in d.items()} for d in (plain, plain["sweep"]))
    return NextRun(**own | {"sweep": Sweep(**sweep)})


def _build_provenance(runs: pd.DataFrame, hp: HPFit, kind: str) -> dict[str, Any]:
    """Which runs, by name and by their numbers, in whatever order they came."""
    ids = _list_run_ids(hp)
    proxies = (runs[runs["role"] != "target"] if "role" in runs else runs).reset_index(drop=True)
    lost = ~np.isfinite(proxies["loss"].to_numpy(float))
    if "diverged" in proxies:
        lost |= proxies["diverged"].to_numpy(bool)
    return {
        "run_ids": len(ids),
        "run_ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "data_sha256": hash_rows(hp.used),
        "table_sha256": hash_table(runs),
        "n_runs": hp.n_runs,
        "n_diverged": int(lost.sum()),
        "n_excluded": int((~lost & ~proxies.index.isin(usable(proxies).index)).sum()),
        "n_far": hp.n_far,
        "n_groups": len(hp.floors),
        "version": _find_version(),
        "N_convention": CONVENTIONS[kind],
    }


def _wrap(text: str, indent: int = 8) -> str:
    return textwrap.fill(text, LINE_WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _list_run_ids(hp: HPFit) -> list[str]:
    """Each run once, though it may have a row at every rung."""
    return sorted({str(i) for i in hp.run_ids})


def _format_origin(provenance: Mapping[str, Any]) -> str:
    left = {"n_diverged": "diverged", "n_excluded": "excluded otherwise", "n_far": "far above their group's best"}
    out = [f"{provenance[k]} {word}" for k, word in left.items() if provenance.get(k)]
    data = (
        f"; data {provenance['data_sha256'][:12]}, muscale {provenance['version']}"
        if "data_sha256" in provenance
        else ""
    )
    return (
        f"From {provenance['n_runs']} runs in {provenance['n_groups']} (N, D) groups"
        f"{' (left out: ' + ', '.join(out) + ')' if out else ''}{data}."
    )


def _compare_published(law: published.PublishedLaw, N: float, D: float, kind: str) -> dict[str, Any]:
    """What a published law says at (N, D), with the warnings that go with it."""
    lr, batch = law(N, D)
    warnings = []
    covers = law.covers(N, D)
    if covers is False:
        warnings.append("outside the range it was measured in")
    elif covers is None and (lr is not None or batch is not None):
        warnings.append("the range it was measured in is not known here")
    if law.N_definition.startswith("non-embedding") and kind != "nonembedding":
        warnings.append(f"its N is {law.N_definition}; yours: {CONVENTIONS[kind].split(':')[0].split(';')[0]}")
    elif not law.N_definition.startswith(("non-embedding", "not in the law")):
        warnings.append(law.N_definition)
    return {
        "name": law.name,
        "source": law.source,
        "lr": None if lr is None else float(lr),
        "batch_tokens": None if batch is None else float(batch),
        "exponents": {k: dict(v) for k, v in law.exponents.items()},
        "warnings": warnings,
    }


def _format_published(law: Mapping[str, Any], ours: Recommendation) -> str:
    said = []
    if law["lr"] is not None:
        said.append(f"lr {law['lr']:.3g} ({law['lr'] / ours.lr:.2g} x ours)")
    if law["batch_tokens"] is not None:
        said.append(f"batch {format_count(law['batch_tokens'])} ({law['batch_tokens'] / ours.batch_tokens:.2g} x ours)")
    if not said:
        symbol = {"batch_tokens": "B"}
        said = [
            f"{'lr' if k == 'lr' else 'B'} as " + " ".join(f"{symbol.get(x, x)}^{e:g}" for x, e in v.items() if e)
            for k, v in law["exponents"].items()
        ]
        said.append("no level of its own")
    return f"  {law['name']:16}{', '.join(said)}{'; ' if law['warnings'] else ''}{'; '.join(law['warnings'])}. {law['source']}"


def _find_seq_len(runs: pd.DataFrame) -> int | None:
    """The sequence length of the runs; None when it was not recorded or is not one."""
    if "seq_len" not in runs:
        return None
    lengths = runs["seq_len"].dropna().unique()
    return int(lengths[0]) if len(lengths) == 1 else None


def _find_version() -> str:
    try:
        return metadata.version("muscale")
    except metadata.PackageNotFoundError:
        return "not installed"
