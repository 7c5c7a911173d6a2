"""Draw the coordinate check and the learning-rate transfer as PNG, PDF or SVG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from proxies.diagnostics.coord_check import CoordCheck, Slope
from proxies.diagnostics.lr_transfer import Transfer

SUFFIXES = (".png", ".pdf", ".svg")
RED, INK = "#cf222e", "#24292f"
COLUMNS = 5


def check_figure(path: Path) -> None:
    """Raise ValueError if a figure cannot be written to `path`, before anything is spent."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a figure is written as {', '.join(SUFFIXES)}, got {path.name}")
    if not path.parent.is_dir():
        raise ValueError(f"a figure needs an existing folder, got {path}: create {path.parent} first")


def draw_check(check: CoordCheck, path: Path) -> None:
    """Draw one panel per quantity: its size or change against width (then depth), a line per step; steep ones in red.

    Args:
        check: The outcome of the check.
        path: The file; its suffix is one of `SUFFIXES`.
    """
    shown = [s for s in check.slopes if s.what != "early"]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(3.0 * COLUMNS, 2.1 * rows), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for slope, ax in zip(shown, panels, strict=False):
        _draw_levels(ax, slope, check.widths if slope.over == "width" else check.depths)
    for ax in panels[len(shown) :]:
        ax.set_axis_off()
    verdict = "passed" if check.passed else f"failed: {len(check.failures)} slopes too steep"
    figure.suptitle(
        f"coordinate check, {check.seeds} seeds, lr {check.lr:g} at base width: {verdict}. "
        "Lines: steps, from the first (dark) to the last (light)",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def _draw_levels(ax: Any, slope: Slope, sizes: tuple[int, ...]) -> None:
    values = np.array(slope.levels)
    steps = values.shape[1]
    for step in range(steps):
        if (values[:, step] > 0).all():
            ax.plot(
                sizes, values[:, step], marker=".", lw=1, color=colormaps["viridis"](0.9 * step / max(steps - 1, 1))
            )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(sizes, [str(s) for s in sizes])
    low, high = ax.get_ylim()
    middle = float(np.sqrt(low * high))
    # A flat line must look flat.
    ax.set_ylim(min(low, middle / 2), max(high, middle * 2))
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.25)
    ax.set_title(
        f"{slope.where}: {slope.what}, {slope.value:+.2f}", fontsize=8, color=RED if slope.steep else INK, loc="left"
    )
    ax.set_xlabel(slope.over, fontsize=7)


def draw_transfer(report: Transfer, path: Path) -> None:
    """Draw loss against learning rate, a panel per arm and a line per size, and the best rates against size.

    Args:
        report: The outcome of the transfer test.
        path: The file; its suffix is one of `SUFFIXES`.
    """
    arms = report.arms
    figure = Figure(figsize=(4.2 * (len(arms) + 1), 3.6), layout="constrained")
    panels = figure.subplots(1, len(arms) + 1)
    for ax, arm in zip(panels, arms, strict=False):
        for i, bowl in enumerate(arm.bowls):
            colour = colormaps["viridis"](0.9 * i / max(len(arm.bowls) - 1, 1))
            x, y = 2.0 ** np.array(bowl.rates), np.array(bowl.losses)
            ax.plot(x, y, marker="o", ms=3, lw=0.5, ls=":", color=colour)
            curve = np.linspace(*bowl.window, 50)
            ax.plot(
                2.0**curve,
                bowl.loss + bowl.curvature * (curve - bowl.best.value) ** 2,
                color=colour,
                label=f"{report.over} {bowl.size}",
            )
            ax.plot(2.0**bowl.best.value, bowl.loss, marker="v", color=colour)
        ax.set_xscale("log", base=2)
        least = min(b.loss for b in arm.bowls)
        most = max(
            float(b.loss + b.curvature * max(abs(end - b.best.value) for end in b.window) ** 2) for b in arm.bowls
        )
        ax.set_ylim(least - 0.1 * (most - least), most + 0.5 * (most - least))
        ax.set_title(f"{arm.name}: shift {arm.shift.value:+.2f} octaves, regret {arm.relative_regret:.2%}", fontsize=9)
        ax.set_xlabel("lr at base size")
        ax.set_ylabel("held-out loss, nats per token")
        ax.legend(fontsize=7)
    last = panels[-1]
    for arm in arms:
        best = np.array([[b.best.value, b.best.low, b.best.high] for b in arm.bowls])
        last.errorbar(
            [b.size for b in arm.bowls],
            best[:, 0],
            np.maximum(np.abs(best[:, 1:] - best[:, :1]).T, 0),
            marker="o",
            capsize=3,
            label=f"{arm.name}: gamma {arm.gamma.value:+.2f}",
        )
    last.set_xscale("log", base=2)
    last.set_xlabel(report.over)
    last.set_ylabel("log2 of the best lr")
    last.legend(fontsize=7)
    figure.savefig(path, dpi=110)
