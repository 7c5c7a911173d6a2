"""The figures of a report: each panel is one inline SVG, so that a page can put them side by side or below each other."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from scaling.common.arrays import Array
from scaling.common.quantities import format_count
from scaling.fitting.isoflop import Frontier
from scaling.fitting.loss_law import Fit
from scaling.fitting.lr_batch_law import HPFit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scaling.advice.recommendation import Recommendation

COLOURS = ("#1f6feb", "#d1652a", "#1a7f37", "#8250df", "#bf3989", "#0f7b83")
INK, GREY, PALE, RED = "#24292f", "#57606a", "#a4acb6", "#cf222e"
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # what labels are measured with; the page's own font is what is seen
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name is text, whatever is in it
    "svg.hashsalt": "scaling",  # the same table, the same file
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.formatter.useoffset": False,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
}
BAND_MASS = 0.8  # of every band
MAX_LINES = 6  # sizes that get a line of their own
MARKER: dict[str, Any] = {"ls": "", "marker": "o", "mew": 0.0}


@dataclass(frozen=True)
class TargetCurve:
    """A launched target run: its points on the trunk and its end."""

    name: str
    tokens: Sequence[float]
    loss: Sequence[float]
    final_tokens: float
    final_loss: float


def draw_panel(draw: Callable[[Any], None], label: str, *, width: float = 4.9, height: float = 3.4) -> str:
    """An SVG of `width` by `height` inches with one pair of axes. label: what a reader who cannot see it is told."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        ax = figure.subplots()
        draw(ax)
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_scale() == "log":
                _set_log_ticks(axis)
        # margins by hand: matplotlib's own layout takes as long as all else together
        left, bottom = (0.72 if ax.get_ylabel() else 0.45), (0.46 if ax.get_xlabel() else 0.26)
        top = 0.26 if ax.get_title() else 0.1
        figure.subplots_adjust(left / width, bottom / height, 1 - 0.14 / width, 1 - top / height)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # ids would repeat from panel to panel
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _set_log_ticks(axis: Any) -> None:
    """Powers of ten; where fewer than two lie inside, also 3, or 2 and 5, times them. As plain text: mathtext is slow to set."""
    low, high = sorted(axis.get_view_interval())
    decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.log10(high))
    for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        ticks = np.outer(decades, subs)
        if np.sum((ticks >= low) & (ticks <= high)) >= 2:
            break
    axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    if not isinstance(axis.get_major_formatter(), FuncFormatter):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}".replace("e-0", "e-").replace("e+", "e")))
    axis.set_minor_locator(NullLocator())


def count(value: float, _: object = None) -> str:
    """12345678 -> 12.3M; also a tick's formatter."""
    return format_count(value)


def assign_colours(sizes: Iterable[float]) -> dict[float, str]:
    """A colour for each distinct N: by name while they are few, from dark to light when many."""
    ordered = sorted(set(sizes))
    if len(ordered) <= len(COLOURS):
        return dict(zip(ordered, COLOURS, strict=False))
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(ordered)))
    return {N: str(to_hex(c)) for N, c in zip(ordered, shades, strict=True)}


def pick_few(values: Sequence[float], most: int = MAX_LINES) -> list[float]:
    """At most so many of them, evenly spaced in order, the ends included."""
    ordered = sorted(set(values))
    if len(ordered) <= most:
        return ordered
    return [ordered[i] for i in np.unique(np.linspace(0, len(ordered) - 1, most).round().astype(int))]


def set_loss_limits(ax: Axes, losses: Array) -> None:
    """From the least loss to a little above nine tenths of the runs: a few that failed would press the rest flat."""
    low, high = float(losses.min()), float(np.quantile(losses, 0.9))
    room = max(high - low, 0.01 * low)
    ax.set_ylim(low - 0.12 * room, high + 0.2 * room)


# --- the loss law -----------------------------------------------------------------------------------------------------


def draw_compute(
    ax: Axes,
    used: pd.DataFrame,
    left_out: pd.DataFrame,
    floors: pd.DataFrame,
    law: Fit | None,
    recommendation: Recommendation | None,
    targets: Sequence[TargetCurve],
) -> None:
    """Loss against compute, with the prediction along some sizes."""
    colours = assign_colours(floors["N"])
    if len(left_out):
        ax.plot(6 * left_out["N"] * left_out["D"], left_out["loss"], **MARKER, ms=2.5, color=PALE, alpha=0.6)
    for runs, style in ((used, {"s": 6, "alpha": 0.35}), (floors, {"s": 16, "marker": "D"})):
        ax.scatter(6 * runs["N"] * runs["D"], runs["loss"], c=runs["N"].map(colours), linewidths=0, **style)
    reach = (
        3 if floors["D"].nunique() > 1 else 1.3
    )  # with one D the trend in D is a guess, and its band fills the figure
    for N in pick_few(list(colours)):
        mine = floors[floors["N"] == N]
        ax.plot([], [], ls="", marker="D", ms=4, mew=0, color=colours[N], label=f"N {count(N)}")
        if law is not None:
            least, most = float(mine["D"].min()), float(mine["D"].max())
            draw_band(ax, law, N, least, max(most, reach * least), colours[N], "-", 6 * N)
    losses = [used["loss"].to_numpy(float)]
    if recommendation is not None:
        r = recommendation
        if law is not None:
            draw_band(ax, law, r.N, floors["D"].min(), r.D, INK, "--", 6 * r.N)
        draw_interval(ax, r.C, r.loss, r.loss_interval, f"target, N {count(r.N)}")
        losses.append(np.array([r.loss_interval[0]]))
        for i, t in enumerate(targets):
            if math.isfinite(t.final_loss):
                colour = COLOURS[i % len(COLOURS)]
                ax.scatter([6 * r.N * t.final_tokens], [t.final_loss], marker="*", s=90, zorder=5, color=colour)
                losses.append(np.array([t.final_loss]))
    ax.set_xscale("log")
    set_loss_limits(ax, np.concatenate(losses))
    ax.set_xlabel("training compute C = 6ND, FLOPs")
    ax.set_ylabel("loss, nats/token")
    ax.legend(fontsize=7.5)


def draw_band(ax: Axes, law: Fit, N: float, low: float, high: float, colour: str, style: str, per_token: float = 1) -> None:
    """The prediction along one size, with its band."""
    D = np.geomspace(low, high, 60)
    lo, hi = law.interval(N, D, mass=BAND_MASS)
    ax.plot(per_token * D, law.predict(N, D), style, color=colour, lw=1.2)
    ax.fill_between(per_token * D, lo, hi, color=colour, alpha=0.12, lw=0)


def draw_interval(ax: Axes, x: float, y: float, ends: tuple[float, float], label: str, mark: str = "_") -> None:
    # the value itself need not lie inside: under strong drift the answer is no quantile of the draws
    down, up = max(y - ends[0], 0.0), max(ends[1] - y, 0.0)
    ax.errorbar([x], [y], yerr=[[down], [up]], fmt=mark, color=INK, capsize=4, label=label, zorder=4)


def draw_two_forms(ax: Axes, law: Fit, floors: pd.DataFrame, N: float, D: float) -> None:
    """At one N, from the data's tokens to D and a little beyond: both forms, their average, the plain law."""
    tokens = np.geomspace(floors["D"].min(), 1.5 * max(D, floors["D"].max()), 80)
    n, d = np.full(80, math.log(N) - law.centre[0]), np.log(tokens) - law.centre[1]
    for member, style in zip(law.members, (":", "-."), strict=True):
        label = f"{member.form}, weight {member.weight:.2f}"
        ax.plot(tokens, np.exp(member.moments(n, d)[0]), style, color=GREY, lw=1.2, label=label)
    draw_band(ax, law, N, tokens[0], tokens[-1], COLOURS[0], "-")
    ax.plot([], [], color=COLOURS[0], lw=1.2, label=f"average, {100 * BAND_MASS:.0f} % band")
    ax.plot(tokens, law.law(N, tokens), "--", color=COLOURS[1], lw=1, label="plain law (Huber)")
    mine = floors[np.isclose(floors["N"], N, rtol=1e-6)]
    ax.plot(mine["D"], mine["loss"], ls="", marker="D", ms=4, mew=0, color=INK)
    ax.axvline(floors["D"].max(), color=PALE, lw=0.8)
    ax.set_xscale("log")
    ax.set_xlabel(f"training tokens D, at N {count(N)}")
    ax.set_ylabel("loss, nats/token")
    ax.xaxis.set_major_formatter(FuncFormatter(count))
    ax.legend(fontsize=7.5)


def draw_residuals(ax: Axes, law: Fit, floors: pd.DataFrame, column: str) -> None:
    """What the prediction leaves of each group's minimum, against N or D."""
    colours = assign_colours(floors["N"])
    left = 100 * np.log(floors["loss"].to_numpy(float) / law.predict(floors["N"], floors["D"]))
    noise = 100 * sum(m.weight * m.noise for m in law.members)
    ax.axhspan(-noise, noise, color=PALE, alpha=0.25, lw=0)
    ax.axhline(0, color=GREY, lw=0.8)
    ends = 100 * floors["sd"].to_numpy(float)  # NaN draws no line
    ax.vlines(floors[column], left - ends, left + ends, colors=floors["N"].map(colours), lw=0.8)
    ax.scatter(floors[column], left, s=16, marker="D", c=floors["N"].map(colours), linewidths=0)
    ax.set_xscale("log")
    ax.set_xlabel({"N": "parameters N", "D": "training tokens D"}[column])
    ax.set_ylabel("ln(loss / prediction), %")
    ax.xaxis.set_major_formatter(FuncFormatter(count))


def draw_approaches(ax: Axes, found: Mapping[str, Frontier | str], recommendation: Recommendation | None) -> None:
    """N_opt(C) by each approach that these runs allow."""
    names = {"envelope": "1 envelope", "isoflop": "2 isoFLOP", "law": "3 law"}
    drawn = {k: v for k, v in found.items() if isinstance(v, Frontier)}
    top = max([f.range[1] for f in drawn.values()] + ([recommendation.C] if recommendation else []))
    seen: list[Array] = []
    for (name, frontier), colour in zip(drawn.items(), COLOURS, strict=False):
        C = np.geomspace(frontier.range[0], top, 60)
        low, high = frontier.N.interval(C, BAND_MASS)
        ax.plot(C, frontier.N.law(C), color=colour, lw=1.2, label=names.get(name, name))
        ax.fill_between(C, low, high, color=colour, alpha=0.12, lw=0)
        good = [p for p in frontier.points if p.status == "ok"]
        ax.plot([p.C for p in good], [p.N for p in good], **MARKER, ms=4, color=colour)
        seen += [frontier.N.law(C), np.array([p.N for p in good])]
    if recommendation is not None:
        ax.scatter([recommendation.C], [recommendation.N], marker="*", s=80, color=INK, zorder=5, label="target")
        seen.append(np.array([recommendation.N]))
    every = np.concatenate(seen)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(every.min() / 4, every.max() * 4)  # a band may be wide beyond all use
    ax.set_xlabel("training compute C, FLOPs")
    ax.set_ylabel("optimal N, parameters")
    ax.yaxis.set_major_formatter(FuncFormatter(count))
    ax.legend(fontsize=7.5)


# --- learning rate and batch ------------------------------------------------------------------------------------------


def draw_bowl(ax: Axes, group: pd.DataFrame, hp: HPFit, floor: float, column: str, colour: str) -> None:
    """Runs of one (N, D) against lr or batch, with the fitted bowl's cut at the best value of the other."""
    N, D = float(group["N"].iloc[0]), float(group["D"].iloc[0])
    best = dict(zip(("lr", "batch_tokens"), (float(v) for v in hp.law(N, D)), strict=True))
    ends = dict(zip(("lr", "batch_tokens"), hp.interval(N, D, mass=BAND_MASS), strict=True))
    other = "batch_tokens" if column == "lr" else "lr"
    near = (np.abs(np.log(group[other] / best[other])) < math.log(1.6)).to_numpy()
    ax.axvspan(*ends[column], color=colour, alpha=0.12, lw=0)
    ax.axvline(best[column], color=colour, lw=0.9)
    ax.plot(group.loc[~near, column], group.loc[~near, "loss"], **MARKER, ms=2.5, color=PALE)
    ax.plot(group.loc[near, column], group.loc[near, "loss"], **MARKER, ms=3.5, color=colour)
    low, high = min(group[column].min(), ends[column][0]), max(group[column].max(), ends[column][1])
    x = np.geomspace(low, high, 100)
    at = {column: x, other: np.full_like(x, best[other])}
    height = hp.height(at["lr"], at["batch_tokens"], N, D)
    ax.plot(x, floor * np.exp(np.clip(height, -1, 1)), color=INK, lw=1)
    ax.set_xscale("log")
    set_loss_limits(ax, np.append(group["loss"].to_numpy(float), floor))
    ax.set_title(f"N {count(N)}, D {count(D)}")
    if column == "batch_tokens":
        ax.xaxis.set_major_formatter(FuncFormatter(count))


def draw_optima(
    ax: Axes,
    used: pd.DataFrame,
    hp: HPFit,
    column: str,
    recommendation: Recommendation | None,
    beside: Sequence[tuple[str, Callable[[float, Array], Array | None]]] = (),
) -> None:
    """lr* or B* against tokens, a line for each of some sizes. beside: published laws at the largest, as (name, of N and D)."""
    i = ("lr", "batch_tokens").index(column)
    top = max([used["D"].max()] + ([recommendation.D] if recommendation else []))
    D = np.geomspace(used["D"].min(), top, 16) if top > used["D"].min() else top * np.geomspace(0.5, 2, 16)
    best = used.loc[used.groupby(["N", "D"])["loss"].idxmin()]
    colours = assign_colours(used["N"])
    for N in pick_few(list(colours)):
        ends = np.array([hp.interval(N, d, mass=BAND_MASS)[i] for d in D])
        ax.plot(D, hp.law(N, D)[i], color=colours[N], label=f"N {count(N)}")
        ax.fill_between(D, ends[:, 0], ends[:, 1], color=colours[N], alpha=0.08, lw=0)
    ax.scatter(best["D"], best[column], s=16, c=best["N"].map(colours), linewidths=0)
    at = max(colours)
    for (name, of), style in zip(beside, (":", "-.", "--"), strict=False):
        theirs = of(at, D)
        if theirs is not None:
            ax.plot(D, theirs, style, color=GREY, lw=1.1, label=f"{name}, N {count(at)}")
    if recommendation is not None:
        r = recommendation
        value, ends_r = ((r.lr, r.lr_interval), (r.batch_tokens, r.batch_interval))[i]
        draw_interval(ax, r.D, value, ends_r, f"target, N {count(r.N)}", "*")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("training tokens D")
    ax.set_ylabel(("lr*", "B*, tokens per step")[i])
    ax.xaxis.set_major_formatter(FuncFormatter(count))
    if i:
        ax.yaxis.set_major_formatter(FuncFormatter(count))
    ax.legend(fontsize=7.5)


# --- runs -------------------------------------------------------------------------------------------------------------


def draw_curves(ax: Axes, of_one_size: Sequence[tuple[Array, Array]], colour: str, N: float) -> None:
    """Loss along runs, the last point the final one."""
    for tokens, loss in of_one_size:
        ax.plot(tokens, loss, color=colour, lw=0.8, alpha=0.5)
        ax.plot(tokens[-1:], loss[-1:], **MARKER, ms=3, color=colour)
    ax.set_xscale("log")
    set_loss_limits(ax, np.concatenate([y for _, y in of_one_size]))
    ax.set_title(f"N {count(N)}")
    ax.set_xlabel("tokens")
    ax.xaxis.set_major_formatter(FuncFormatter(count))


def draw_rungs(ax: Axes, runs: pd.DataFrame, N: float, colour: str, ceiling: float) -> None:
    """One line per configuration of this size, one point per rung."""
    mine = runs[runs["N"] == N]
    for _, one in mine.groupby("run_id"):
        one = one.sort_values("D")
        ax.plot(one["D"], one["loss"].clip(upper=ceiling), marker="o", ms=3, lw=1, alpha=0.6, color=colour)
    lost = mine[mine["diverged"]]
    ax.plot(lost["D"], np.full(len(lost), ceiling), ls="", marker="x", ms=5, color=RED)
    ax.set_xscale("log")
    ax.set_title(f"N {count(N)}")
    ax.set_xlabel("tokens")
    ax.xaxis.set_major_formatter(FuncFormatter(count))


def draw_targets(ax: Axes, targets: Sequence[TargetCurve], recommendation: Recommendation | None) -> None:
    """The launched targets, and what had been predicted."""
    for i, t in enumerate(targets):
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(t.tokens, t.loss, color=colour, lw=1.3, label=f"{t.name}, trunk")
        if math.isfinite(t.final_loss):
            ax.scatter([t.final_tokens], [t.final_loss], marker="*", s=90, color=colour, zorder=5)
        if math.isfinite(t.final_loss) and t.tokens:  # no points, when it was too short for one on the trunk
            ax.plot([t.tokens[-1], t.final_tokens], [t.loss[-1], t.final_loss], ls=":", color=colour, lw=1)
    if recommendation is not None:
        r = recommendation
        draw_interval(ax, r.D, r.loss, r.loss_interval, f"predicted, {100 * r.mass:.0f} %")
    ax.set_xscale("log")
    ax.set_xlabel("tokens")
    ax.set_ylabel("loss, nats/token")
    ax.xaxis.set_major_formatter(FuncFormatter(count))
    ax.legend(fontsize=7.5)
