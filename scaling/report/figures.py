"""The figures of a report. Each panel is one inline SVG, so that a page can place them side by side or stacked."""

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
    # The font that labels are measured with; a page shows them in its own font.
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "svg.fonttype": "none",
    # Names from a table are text, whatever they contain.
    "text.parse_math": False,
    # The same table gives the same file.
    "svg.hashsalt": "scaling",
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.formatter.useoffset": False,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
}
# The probability that each band holds.
BAND_MASS = 0.8
# Sizes that get a line of their own.
MAX_LINES = 6
MARKER: dict[str, Any] = {"ls": "", "marker": "o", "mew": 0.0}


@dataclass(frozen=True)
class TargetCurve:
    """A launched target run: the points on its trunk, and its end.

    Attributes:
        name: The name of its arm, such as "scratch".
        tokens: Training tokens at each point.
        loss: Loss at each point, nats per token.
        final_tokens: Training tokens at the end.
        final_loss: Loss after the cooldown, nats per token; NaN if it diverged.
    """

    name: str
    tokens: Sequence[float]
    loss: Sequence[float]
    final_tokens: float
    final_loss: float


def draw_panel(draw: Callable[[Any], None], label: str, *, width: float = 4.9, height: float = 3.4) -> str:
    """Draw one pair of axes as an SVG.

    Args:
        draw: Draws on the axes that it gets.
        label: What the figure shows, for screen readers.
        width: Width in inches.
        height: Height in inches.

    Returns:
        The text of an <svg> element, without ids.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        ax = figure.subplots()
        draw(ax)
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_scale() == "log":
                _set_log_ticks(axis)
        # Margins are set by hand, because the layout engines of matplotlib take as long as everything else together.
        left, bottom = (0.72 if ax.get_ylabel() else 0.45), (0.46 if ax.get_xlabel() else 0.26)
        top = 0.26 if ax.get_title() else 0.1
        figure.subplots_adjust(left / width, bottom / height, 1 - 0.14 / width, 1 - top / height)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    # Ids would repeat from panel to panel.
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _set_log_ticks(axis: Any) -> None:
    """Put ticks at powers of ten and, if fewer than two are visible, also at 3 or at 2 and 5 times them.

    Labels are plain text, since mathtext is slow to set.
    """
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


def _label_as_counts(axis: Any) -> None:
    """Label the ticks of an axis as counts, such as 12.3M."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def assign_colours(sizes: Iterable[float]) -> dict[float, str]:
    """Return a colour for each distinct N: clearly different ones for a few sizes, from dark to light for many."""
    ordered = sorted(set(sizes))
    if len(ordered) <= len(COLOURS):
        return dict(zip(ordered, COLOURS, strict=False))
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(ordered)))
    return {N: str(to_hex(c)) for N, c in zip(ordered, shades, strict=True)}


def pick_few(values: Sequence[float], most: int = MAX_LINES) -> list[float]:
    """Return at most so many of the distinct values, evenly spaced in order, with both ends."""
    ordered = sorted(set(values))
    if len(ordered) <= most:
        return ordered
    return [ordered[i] for i in np.unique(np.linspace(0, len(ordered) - 1, most).round().astype(int))]


def set_loss_limits(ax: Axes, losses: Array) -> None:
    """Show the losses up to a little above the 90th percentile; a few failed runs would press the rest flat."""
    low, high = float(losses.min()), float(np.quantile(losses, 0.9))
    room = max(high - low, 0.01 * low)
    ax.set_ylim(low - 0.12 * room, high + 0.2 * room)


# --- The loss law -----------------------------------------------------------------------------------------------------


def draw_compute(
    ax: Axes,
    used: pd.DataFrame,
    left_out: pd.DataFrame,
    floors: pd.DataFrame,
    law: Fit | None,
    recommendation: Recommendation | None,
    targets: Sequence[TargetCurve],
) -> None:
    """Draw loss against compute, with the prediction along some sizes.

    Args:
        ax: The axes.
        used: The runs that laws are fitted to.
        left_out: Other runs with a loss.
        floors: N, D and loss of the fitted minimum of each group.
        law: The loss law, if there is one.
        recommendation: Adds the prediction for the target, with its interval.
        targets: Adds the final losses of launched targets.
    """
    colours = assign_colours(floors["N"])
    if len(left_out):
        ax.plot(6 * left_out["N"] * left_out["D"], left_out["loss"], **MARKER, ms=2.5, color=PALE, alpha=0.6)
    for runs, style in ((used, {"s": 6, "alpha": 0.35}), (floors, {"s": 16, "marker": "D"})):
        ax.scatter(6 * runs["N"] * runs["D"], runs["loss"], c=runs["N"].map(colours), linewidths=0, **style)
    # With a single D the trend in D is a guess, and its band would fill the figure.
    reach = 3 if floors["D"].nunique() > 1 else 1.3
    for N in pick_few(list(colours)):
        group = floors[floors["N"] == N]
        ax.plot([], [], ls="", marker="D", ms=4, mew=0, color=colours[N], label=f"N {format_count(N)}")
        if law is not None:
            least, most = float(group["D"].min()), float(group["D"].max())
            draw_band(ax, law, N, least, max(most, reach * least), colours[N], "-", 6 * N)
    losses = [used["loss"].to_numpy(float)]
    if recommendation is not None:
        r = recommendation
        if law is not None:
            draw_band(ax, law, r.N, floors["D"].min(), r.D, INK, "--", 6 * r.N)
        draw_interval(ax, r.C, r.loss, r.loss_interval, f"target, N {format_count(r.N)}")
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


def draw_band(
    ax: Axes, law: Fit, N: float, low: float, high: float, colour: str, style: str, per_token: float = 1
) -> None:
    """Draw the prediction along one size, from `low` to `high` tokens, with its band.

    Args:
        ax: The axes.
        law: The loss law.
        N: The size.
        low: The fewest tokens.
        high: The most tokens.
        colour: The colour of line and band.
        style: The line style.
        per_token: What a token is on the x-axis, such as 6 N for compute.
    """
    D = np.geomspace(low, high, 60)
    band_low, band_high = law.interval(N, D, mass=BAND_MASS)
    ax.plot(per_token * D, law.predict(N, D), style, color=colour, lw=1.2)
    ax.fill_between(per_token * D, band_low, band_high, color=colour, alpha=0.12, lw=0)


def draw_interval(ax: Axes, x: float, y: float, ends: tuple[float, float], label: str, marker: str = "_") -> None:
    """Draw a value with its interval as a bar."""
    # The value may lie outside of its interval: under strong drift it is not a quantile of the draws.
    down, up = max(y - ends[0], 0.0), max(ends[1] - y, 0.0)
    ax.errorbar([x], [y], yerr=[[down], [up]], fmt=marker, color=INK, capsize=4, label=label, zorder=4)


def draw_two_forms(ax: Axes, law: Fit, floors: pd.DataFrame, N: float, D: float) -> None:
    """Draw both averaged forms, their average and the plain law at one N, up to a little beyond D."""
    tokens = np.geomspace(floors["D"].min(), 1.5 * max(D, floors["D"].max()), 80)
    n, d = np.full(80, math.log(N) - law.centre[0]), np.log(tokens) - law.centre[1]
    for member, style in zip(law.members, (":", "-."), strict=True):
        label = f"{member.form}, weight {member.weight:.2f}"
        ax.plot(tokens, np.exp(member.moments(n, d)[0]), style, color=GREY, lw=1.2, label=label)
    draw_band(ax, law, N, tokens[0], tokens[-1], COLOURS[0], "-")
    ax.plot([], [], color=COLOURS[0], lw=1.2, label=f"average, {100 * BAND_MASS:.0f} % band")
    ax.plot(tokens, law.law(N, tokens), "--", color=COLOURS[1], lw=1, label="plain law (Huber)")
    group = floors[np.isclose(floors["N"], N, rtol=1e-6)]
    ax.plot(group["D"], group["loss"], ls="", marker="D", ms=4, mew=0, color=INK)
    ax.axvline(floors["D"].max(), color=PALE, lw=0.8)
    ax.set_xscale("log")
    ax.set_xlabel(f"training tokens D, at N {format_count(N)}")
    ax.set_ylabel("loss, nats/token")
    _label_as_counts(ax.xaxis)
    ax.legend(fontsize=7.5)


def draw_residuals(ax: Axes, law: Fit, floors: pd.DataFrame, column: str) -> None:
    """Draw the residual of each group's minimum, as ln(loss / prediction) in %, against N or D."""
    colours = assign_colours(floors["N"])
    residual = 100 * np.log(floors["loss"].to_numpy(float) / law.predict(floors["N"], floors["D"]))
    noise = 100 * sum(m.weight * m.noise for m in law.members)
    ax.axhspan(-noise, noise, color=PALE, alpha=0.25, lw=0)
    ax.axhline(0, color=GREY, lw=0.8)
    # Where the sd is NaN, no line is drawn.
    sd = 100 * floors["sd"].to_numpy(float)
    ax.vlines(floors[column], residual - sd, residual + sd, colors=floors["N"].map(colours), lw=0.8)
    ax.scatter(floors[column], residual, s=16, marker="D", c=floors["N"].map(colours), linewidths=0)
    ax.set_xscale("log")
    ax.set_xlabel({"N": "parameters N", "D": "training tokens D"}[column])
    ax.set_ylabel("ln(loss / prediction), %")
    _label_as_counts(ax.xaxis)


def draw_approaches(ax: Axes, approaches: Mapping[str, Frontier | str], recommendation: Recommendation | None) -> None:
    """Draw the compute-optimal N against compute, by each approach that the runs allow."""
    names = {"envelope": "1 envelope", "isoflop": "2 isoFLOP", "law": "3 law"}
    frontiers = {k: v for k, v in approaches.items() if isinstance(v, Frontier)}
    top = max([f.range[1] for f in frontiers.values()] + ([recommendation.C] if recommendation else []))
    drawn: list[Array] = []
    for (name, frontier), colour in zip(frontiers.items(), COLOURS, strict=False):
        C = np.geomspace(frontier.range[0], top, 60)
        low, high = frontier.N.interval(C, BAND_MASS)
        ax.plot(C, frontier.N.law(C), color=colour, lw=1.2, label=names.get(name, name))
        ax.fill_between(C, low, high, color=colour, alpha=0.12, lw=0)
        good = [p for p in frontier.points if p.status == "ok"]
        ax.plot([p.C for p in good], [p.N for p in good], **MARKER, ms=4, color=colour)
        drawn += [frontier.N.law(C), np.array([p.N for p in good])]
    if recommendation is not None:
        ax.scatter([recommendation.C], [recommendation.N], marker="*", s=80, color=INK, zorder=5, label="target")
        drawn.append(np.array([recommendation.N]))
    every = np.concatenate(drawn)
    ax.set_xscale("log")
    ax.set_yscale("log")
    # A band may be too wide to be useful, so only lines and points set the limits.
    ax.set_ylim(every.min() / 4, every.max() * 4)
    ax.set_xlabel("training compute C, FLOPs")
    ax.set_ylabel("optimal N, parameters")
    _label_as_counts(ax.yaxis)
    ax.legend(fontsize=7.5)


# --- Learning rate and batch ------------------------------------------------------------------------------------------


def draw_bowl(ax: Axes, group: pd.DataFrame, hp: HPFit, floor: float, column: str, colour: str) -> None:
    """Draw the runs of one (N, D) against lr or batch, with the fitted bowl at the best value of the other.

    Args:
        ax: The axes.
        group: The runs of one N and D.
        hp: The law of learning rate and batch.
        floor: The fitted minimum of the group, nats per token.
        column: "lr" or "batch_tokens".
        colour: The colour of this N.
    """
    N, D = float(group["N"].iloc[0]), float(group["D"].iloc[0])
    best = dict(zip(("lr", "batch_tokens"), (float(v) for v in hp.law(N, D)), strict=True))
    ends = dict(zip(("lr", "batch_tokens"), hp.interval(N, D, mass=BAND_MASS), strict=True))
    other = "batch_tokens" if column == "lr" else "lr"
    is_near = (np.abs(np.log(group[other] / best[other])) < math.log(1.6)).to_numpy()
    ax.axvspan(*ends[column], color=colour, alpha=0.12, lw=0)
    ax.axvline(best[column], color=colour, lw=0.9)
    ax.plot(group.loc[~is_near, column], group.loc[~is_near, "loss"], **MARKER, ms=2.5, color=PALE)
    ax.plot(group.loc[is_near, column], group.loc[is_near, "loss"], **MARKER, ms=3.5, color=colour)
    low, high = min(group[column].min(), ends[column][0]), max(group[column].max(), ends[column][1])
    x = np.geomspace(low, high, 100)
    at = {column: x, other: np.full_like(x, best[other])}
    height = hp.height(at["lr"], at["batch_tokens"], N, D)
    ax.plot(x, floor * np.exp(np.clip(height, -1, 1)), color=INK, lw=1)
    ax.set_xscale("log")
    set_loss_limits(ax, np.append(group["loss"].to_numpy(float), floor))
    ax.set_title(f"N {format_count(N)}, D {format_count(D)}")
    if column == "batch_tokens":
        _label_as_counts(ax.xaxis)


def draw_optima(
    ax: Axes,
    used: pd.DataFrame,
    hp: HPFit,
    column: str,
    recommendation: Recommendation | None,
    beside: Sequence[tuple[str, Callable[[float, Array], Array | None]]] = (),
) -> None:
    """Draw the best lr or batch against tokens, with a line for each of some sizes.

    Args:
        ax: The axes.
        used: The runs that the law was fitted to.
        hp: The law of learning rate and batch.
        column: "lr" or "batch_tokens".
        recommendation: Adds the recommended setting, with its interval.
        beside: Published laws as (name, function of N and D), drawn at the largest size.
    """
    i = ("lr", "batch_tokens").index(column)
    top = max([used["D"].max()] + ([recommendation.D] if recommendation else []))
    D = np.geomspace(used["D"].min(), top, 16) if top > used["D"].min() else top * np.geomspace(0.5, 2, 16)
    best = used.loc[used.groupby(["N", "D"])["loss"].idxmin()]
    colours = assign_colours(used["N"])
    for N in pick_few(list(colours)):
        ends = np.array([hp.interval(N, d, mass=BAND_MASS)[i] for d in D])
        ax.plot(D, hp.law(N, D)[i], color=colours[N], label=f"N {format_count(N)}")
        ax.fill_between(D, ends[:, 0], ends[:, 1], color=colours[N], alpha=0.08, lw=0)
    ax.scatter(best["D"], best[column], s=16, c=best["N"].map(colours), linewidths=0)
    largest = max(colours)
    for (name, evaluate), style in zip(beside, (":", "-.", "--"), strict=False):
        values = evaluate(largest, D)
        if values is not None:
            ax.plot(D, values, style, color=GREY, lw=1.1, label=f"{name}, N {format_count(largest)}")
    if recommendation is not None:
        r = recommendation
        value, interval = ((r.lr, r.lr_interval), (r.batch_tokens, r.batch_interval))[i]
        if value is not None and interval is not None:
            draw_interval(ax, r.D, value, interval, f"target, N {format_count(r.N)}", "*")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("training tokens D")
    ax.set_ylabel(("lr*", "B*, tokens per step")[i])
    _label_as_counts(ax.xaxis)
    if column == "batch_tokens":
        _label_as_counts(ax.yaxis)
    ax.legend(fontsize=7.5)


# --- Runs -------------------------------------------------------------------------------------------------------------


def draw_curves(ax: Axes, curves: Sequence[tuple[Array, Array]], colour: str, N: float) -> None:
    """Draw (tokens, loss) along runs of one size, each with its final point marked."""
    for tokens, loss in curves:
        ax.plot(tokens, loss, color=colour, lw=0.8, alpha=0.5)
        ax.plot(tokens[-1:], loss[-1:], **MARKER, ms=3, color=colour)
    ax.set_xscale("log")
    set_loss_limits(ax, np.concatenate([y for _, y in curves]))
    ax.set_title(f"N {format_count(N)}")
    ax.set_xlabel("tokens")
    _label_as_counts(ax.xaxis)


def draw_rungs(ax: Axes, runs: pd.DataFrame, N: float, colour: str, ceiling: float) -> None:
    """Draw one line per configuration of this size, with one point per rung; losses above `ceiling` are clipped."""
    of_size = runs[runs["N"] == N]
    for _, run in of_size.groupby("run_id"):
        run = run.sort_values("D")
        ax.plot(run["D"], run["loss"].clip(upper=ceiling), marker="o", ms=3, lw=1, alpha=0.6, color=colour)
    diverged = of_size[of_size["diverged"]]
    ax.plot(diverged["D"], np.full(len(diverged), ceiling), ls="", marker="x", ms=5, color=RED)
    ax.set_xscale("log")
    ax.set_title(f"N {format_count(N)}")
    ax.set_xlabel("tokens")
    _label_as_counts(ax.xaxis)


def draw_targets(ax: Axes, targets: Sequence[TargetCurve], recommendation: Recommendation | None) -> None:
    """Draw the launched targets and what was predicted of them."""
    for i, t in enumerate(targets):
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(t.tokens, t.loss, color=colour, lw=1.3, label=f"{t.name}, trunk")
        if math.isfinite(t.final_loss):
            ax.scatter([t.final_tokens], [t.final_loss], marker="*", s=90, color=colour, zorder=5)
        # A run may be too short for a point on its trunk.
        if math.isfinite(t.final_loss) and t.tokens:
            ax.plot([t.tokens[-1], t.final_tokens], [t.loss[-1], t.final_loss], ls=":", color=colour, lw=1)
    if recommendation is not None:
        r = recommendation
        draw_interval(ax, r.D, r.loss, r.loss_interval, f"predicted, {100 * r.mass:.0f} %")
    ax.set_xscale("log")
    ax.set_xlabel("tokens")
    ax.set_ylabel("loss, nats/token")
    _label_as_counts(ax.xaxis)
    ax.legend(fontsize=7.5)
