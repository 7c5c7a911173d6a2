"""Runs and a target in, a recommendation out: learning rate, batch, loss, with intervals, and what to doubt in them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from scaling.fit import Fit, fit_loss_law
from scaling.hpfit import HPFit, fit_hp_law

TOO_FAR = 30.0  # times the largest N or D of the data; the laws were checked up to 33 times in compute
FEW_GROUPS = 6  # (N, D) groups; below, hold-out tests of the laws become thin
EDGE = 0.1  # within this share of the searched range (in logs) counts as at its edge
WORDS = {"lr": "learning rate", "batch_tokens": "batch"}


@dataclass(frozen=True)
class Flag:
    """A doubt. A serious one means: do not trust the recommendation."""

    code: str
    text: str
    serious: bool


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

    @property
    def trustworthy(self) -> bool:
        """No serious flag."""
        return not any(f.serious for f in self.flags)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the same recommendation back."""
        plain = asdict(self) | {"trustworthy": self.trustworthy}
        for name in ("lr_interval", "batch_interval", "loss_interval", "flags"):
            plain[name] = list(plain[name])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recommendation:
        values = {k: v for k, v in plain.items() if k != "trustworthy"}
        for name in ("lr_interval", "batch_interval", "loss_interval"):
            values[name] = (float(values[name][0]), float(values[name][1]))
        values["flags"] = tuple(Flag(**f) for f in values["flags"])
        return cls(**values)

    def __str__(self) -> str:
        low, high = self.batch_interval
        best, worst = self.loss_interval
        sequences = ""
        if self.batch_seqs is not None:
            sequences = f"   {self.batch_seqs:,} sequence{'' if self.batch_seqs == 1 else 's'} of {self.seq_len:,}"
        lines = [
            f"Recommendation for N = {self.N:,.0f}, D = {self.D:,.0f} (C = {self.C:.3g} FLOPs)",
            f"{'':26}{'best guess':>14}   {100 * self.mass:.0f} % interval",
            f"{'  learning rate':26}{self.lr:>14.4g}   {self.lr_interval[0]:.4g} to {self.lr_interval[1]:.4g}",
            f"{'  batch, tokens per step':26}{self.batch_tokens:>14,.0f}   {low:,.0f} to {high:,.0f}{sequences}",
            f"{'  loss, nats per token':26}{self.loss:>14.4f}   {best:.4f} to {worst:.4f}",
            f"{'  expected regret':26}{100 * self.expected_regret:>12.2f} %   at most, of the loss",
            f"From {self.provenance['n_runs']} runs in {self.provenance['n_groups']} (N, D) groups.",
        ]
        for flag in sorted(self.flags, key=lambda f: not f.serious):
            lines.append(f"  {'SERIOUS' if flag.serious else 'note'}: {flag.text}")
        verdict = "No serious doubt." if self.trustworthy else "Not to be trusted before the serious points are mended."
        lines.append(verdict)
        return "\n".join(lines)


def recommend(
    runs: pd.DataFrame,
    *,
    N: float | None = None,
    D: float | None = None,
    C: float | None = None,
    mass: float = 0.9,
    space: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
) -> Recommendation:
    """Best settings and loss at (N, D), or at the compute-optimal (N, D) of C FLOPs.

    runs: N, D, lr, batch_tokens, loss; optional run_id, role (targets are left out), diverged, seq_len,
    parametrization, N_total, N_nonembedding. space: {"lr": (low, high), "batch_tokens": (low, high)} that was searched
    (default: the data's range).

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

    proxies = runs[runs["role"] != "target"] if "role" in runs else runs
    if "diverged" in proxies:
        proxies = proxies.assign(loss=proxies["loss"].where(~proxies["diverged"].astype(bool)))
    hp = fit_hp_law(proxies, seed=seed)
    searched = _searched(hp, space)
    fit, run_noise = _loss_fit(hp, seed)
    if C is not None:
        N, D = (float(v) for v in fit.law.optimum(C))
    assert N is not None
    assert D is not None

    lr, batch = (float(v) for v in hp.law(N, D))
    lr_interval, batch_interval = hp.interval(N, D, mass)
    seq_len = _seq_len(proxies)
    convention, convention_flag = _convention(proxies)
    flags = [
        *_reach(hp, N, D),
        *_scales(hp, N, D),
        *_edges(hp, searched, lr, batch),
        *_doubts(hp, fit),
        convention_flag,
    ]
    ids = sorted(str(i) for i in hp.run_ids)
    return Recommendation(
        N=float(N),
        D=float(D),
        C=6.0 * float(N) * float(D),
        lr=lr,
        lr_interval=lr_interval,
        batch_tokens=batch,
        batch_interval=batch_interval,
        batch_seqs=None if seq_len is None else max(1, round(batch / seq_len)),
        seq_len=seq_len,
        loss=float(fit.predict(N, D)),
        loss_interval=_one_run(fit, run_noise, N, D, mass),
        mass=mass,
        expected_regret=hp.expected_regret(N, D),
        flags=tuple(flags),
        provenance={
            "run_ids": len(ids),
            "run_ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
            "n_runs": hp.n_runs,
            "n_diverged": hp.n_diverged,
            "n_groups": len(hp.floors),
            "version": _version(),
            "N_convention": convention,
        },
        loss_law=asdict(fit.law) | {"status": fit.status},
        hp_law=asdict(hp.law) | {"status": hp.status},
    )


def _loss_fit(hp: HPFit, seed: int) -> tuple[Fit, float]:
    """The loss law, and the noise of one run (sd of ln L) that its evidence does not show.

    Its evidence is each group's fitted minimum. Two groups are no table: there each run speaks, lowered by its height.
    """
    floors = hp.floors
    if len(floors) >= 3:
        fit = fit_loss_law(floors["N"].to_numpy(), floors["D"].to_numpy(), floors["loss"].to_numpy(), seed=seed)
        return fit, float(np.mean([f.noise for f in hp.fits]))
    N, D, lr, batch, loss = hp.used[["N", "D", "lr", "batch_tokens", "loss"]].to_numpy(float).T
    return fit_loss_law(N, D, loss * np.exp(-hp.height(lr, batch, N, D)), seed=seed), 0.0


def _one_run(fit: Fit, run_noise: float, N: float, D: float, mass: float) -> tuple[float, float]:
    """The law's interval, widened by what runs scatter about the minima it was fitted to."""
    middle = math.log(float(fit.predict(N, D)))
    half = math.log(float(fit.interval(N, D, mass)[1])) - middle
    half = math.hypot(half, float(norm.ppf(0.5 + mass / 2)) * run_noise)
    return math.exp(middle - half), math.exp(middle + half)


def _searched(hp: HPFit, space: Mapping[str, Sequence[float]] | None) -> dict[str, tuple[float, float]]:
    searched = {name: hp.ranges[name] for name in WORDS}
    for name in WORDS:
        if space is not None and name in space:
            low, high = (float(v) for v in space[name])
            if not 0 < low <= high:
                raise ValueError(f"space[{name!r}] must be (low, high) with 0 < low <= high, got {space[name]}")
            searched[name] = (low, high)
    return searched


def _seq_len(runs: pd.DataFrame) -> int | None:
    """The sequence length of the runs; None when it was not recorded or is not one."""
    if "seq_len" not in runs:
        return None
    lengths = runs["seq_len"].dropna().unique()
    return int(lengths[0]) if len(lengths) == 1 else None


def _convention(runs: pd.DataFrame) -> tuple[str, Flag]:
    name = "as given in the run table"
    others = {"N_total": "every parameter (Chinchilla)", "N_nonembedding": "non-embedding parameters (Kaplan)"}
    known = [c for c in others if c in runs and runs[c].notna().all()]
    if known:
        name = "parameters that multiply tokens: no input embedding, the unembedding once"
    for column in known:
        if np.array_equal(runs[column].to_numpy(float), runs["N"].to_numpy(float)):
            name = others[column]
    text = f"N: {name}. Count the target's N in the same way."
    if known:
        largest = runs.iloc[int(runs["N"].to_numpy(float).argmax())]
        counts = ", ".join(f"{c} {float(largest[c]):,.0f}" for c in known)
        text += f" At the largest proxy: N {float(largest['N']):,.0f}, {counts}."
    return name, Flag("n-convention", text, serious=False)


def _reach(hp: HPFit, N: float, D: float) -> list[Flag]:
    flags = []
    for name, value in (("N", N), ("D", D)):
        low, high = hp.ranges[name]
        ratio = max(value / high, low / value)
        if ratio > 1 + 1e-9:
            side = "above" if value > high else "below"
            text = f"The target's {name} is {ratio:.3g} times {side} the data ({low:,.0f} to {high:,.0f})."
            if ratio > TOO_FAR:
                text += f" Laws are not checked beyond {TOO_FAR:.0f} times: add runs nearer to it."
            flags.append(Flag(f"beyond-{name}", text, serious=ratio > TOO_FAR))
            if name == "N":
                text = (
                    f"B* is carried beyond the trained N with exponent {hp.law.batch_N:+.2f}; on one real table this "
                    "made it too small by a factor 1.4. Try a batch half and twice as large if you can."
                )
                flags.append(Flag("batch-beyond-N", text, serious=False))
    return flags


def _scales(hp: HPFit, N: float, D: float) -> list[Flag]:
    flags = []
    for name, value, least in (("N", N, 3), ("D", D, 2)):
        distinct = hp.floors[name].nunique()
        if distinct < least:
            low, high = hp.ranges[name]
            outside = not low <= value <= high
            text = f"{distinct} distinct {name} in the data; a trend in {name} needs at least {least}."
            flags.append(Flag(f"few-{name}", text, serious=outside))
    groups = len(hp.floors)
    if groups < FEW_GROUPS:
        flags.append(
            Flag("few-groups", f"{groups} (N, D) groups; {FEW_GROUPS} or more make a law.", serious=groups < 3)
        )
    return flags


def _edges(hp: HPFit, searched: dict[str, tuple[float, float]], lr: float, batch: float) -> list[Flag]:
    """Optima at or over the edge of what was searched: those of the data's groups, and the recommended one."""
    flags = []
    groups = [hp.interval(N, D, mass=0.9) for N, D in zip(hp.floors["N"], hp.floors["D"], strict=True)]
    for i, (name, value) in enumerate(zip(WORDS, (lr, batch), strict=True)):
        low, high = searched[name]
        if low == high:
            continue  # one value was tried: `_doubts` says that the optimum is not identified
        margin = EDGE * math.log(high / low)
        # A group's optimum counts as outside when its whole interval is: a bowl seen from one side only.
        below, above = sum(g[i][1] < low for g in groups), sum(g[i][0] > high for g in groups)
        for side, outside in (("low", below), ("high", above)):
            if outside > len(groups) / 2:
                beyond, further = ("below", "lower") if side == "low" else ("above", "higher")
                text = (
                    f"The best {WORDS[name]} lies {beyond} the searched range ({low:.4g}, {high:.4g}), with its whole 90 % "
                    f"interval, in {outside} of {len(groups)} groups: search {further}."
                )
                flags.append(Flag(f"{name}-unbracketed-{side}", text, serious=True))
        for side, edge, depth in (("low", low, math.log(value / low)), ("high", high, math.log(high / value))):
            if depth >= margin:
                continue
            where = "at the edge of" if depth >= 0 else "outside"
            text = (
                f"The recommended {WORDS[name]} {value:.4g} is {where} the searched range ({low:.4g}, {high:.4g}), on "
                f"the {side} side; it is not clipped. To measure it, widen {name} beyond {edge:.4g}."
            )
            flags.append(Flag(f"{name}-edge-{side}", text, serious=False))
    return flags


def _doubts(hp: HPFit, fit: Fit) -> list[Flag]:
    flags = []
    for name, known in hp.identified.items():
        if not known:
            text = f"The runs do not say where the best {WORDS[name]} is; the answer is mostly the prior's."
            flags.append(Flag(f"{name}-unidentified", text, serious=True))
    if hp.status != "ok":
        flags.append(Flag("hp-fit", f"Learning-rate/batch law: {hp.status}", serious=False))
    if fit.status != "ok":
        flags.append(Flag("loss-fit", f"Loss law: {fit.status}", serious=False))
    return flags


def _version() -> str:
    try:
        return metadata.version("muscale")
    except metadata.PackageNotFoundError:
        return "not installed"
