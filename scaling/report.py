"""One HTML file that shows a study whole: figures as inline SVG, no network, no script."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from scaling.fit import Fit, FitError, fit_loss_law
from scaling.hpfit import HPFit, fit_hp_law

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scaling.recommendation import Recommendation

COLOURS = ("#1f6feb", "#d1652a", "#1a7f37", "#8250df", "#bf3989", "#6e7781")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "axes.grid": True,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True)
class TargetCurve:
    """A launched target run: its points on the trunk and its end."""

    name: str
    tokens: Sequence[float]
    loss: Sequence[float]
    final_tokens: float
    final_loss: float


@dataclass(frozen=True)
class Section:
    """A figure, what it shows, and what to see in it."""

    title: str
    svg: str
    caption: str


def render(
    study: str,
    runs: pd.DataFrame,
    *,
    recommendation: Recommendation | None = None,
    targets: Sequence[TargetCurve] = (),
    warm_start: dict[str, Any] | None = None,
    seed: int = 0,
) -> str:
    """The page. `runs`: the checked run table, targets included; fits are made here from its proxies."""
    proxies = runs[(runs["role"] == "proxy") & ~runs["diverged"]]
    hp = fit_hp_law(proxies, seed=seed)
    floors = hp.floors
    try:
        law: Fit | None = fit_loss_law(
            floors["N"].to_numpy(), floors["D"].to_numpy(), floors["loss"].to_numpy(), seed=seed
        )
        no_law = ""
    except FitError as error:
        law, no_law = None, str(error)
    sections = [
        Section(
            "Loss against learning rate, per size",
            _svg(lambda f: _bowls(f, proxies, hp), width=10, height=3.4),
            "Each size at its largest token count. Points: runs (larger marks, larger batches). Curve: the fitted bowl at the fitted "
            "best batch. Vertical line: the law's lr*.",
        ),
        Section(
            "Loss against compute",
            _svg(lambda f: _compute(f, proxies, floors, law, recommendation, targets)),
            "Points: runs. Diamonds: the fitted minimum of each (N, D) group. Lines: the averaged prediction along each size, with the "
            "80 % band of one new run; dashed at the target's size. Bar: the recommendation's interval; star: the measured target."
            + (f" No law: {no_law}." if no_law else ""),
        ),
        Section(
            "lr* and B* against scale",
            _svg(lambda f: _optima(f, proxies, hp, recommendation), width=10, height=3.4),
            "Lines: the law at each size, with its 80 % band from draws. Points: the best single run of each group, which the law does "
            "not follow (all runs speak).",
        ),
        Section(
            "Rungs and promotions",
            _svg(lambda f: _rungs(f, runs[runs["role"] == "proxy"]), width=10, height=3.4),
            "One line per configuration, one point per rung; a cross marks a diverged run.",
        ),
    ]
    if targets:
        sections.append(
            Section(
                "The target against its prediction",
                _svg(lambda f: _target(f, targets, recommendation)),
                "Curves: validation loss on the constant-rate trunk. Star: after the cooldown, which is what the law predicts (bar).",
            )
        )
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    return page.render(
        study=study,
        recommendation=recommendation.to_dict() if recommendation else None,
        flags=recommendation.flags if recommendation else (),
        sections=sections,
        fits={"lr and batch law": hp.status, "loss law": law.status if law else no_law},
        laws=_law_rows(hp, law),
        warm_start=warm_start,
        targets=targets,
        best=runs[~runs["diverged"]].sort_values(["role", "loss"]).head(12).to_dict("records"),
        n_runs=len(runs),
        n_diverged=int(runs["diverged"].sum()),
    )


def _svg(draw: Callable[[Figure], None], *, width: float = 7.5, height: float = 4.0) -> str:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        for ax in figure.axes:  # labels between the decades run into each other
            ax.xaxis.set_minor_formatter(NullFormatter())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _colour(sizes: Sequence[float], N: float) -> str:
    return COLOURS[sorted(sizes).index(N) % len(COLOURS)]


def _count(value: float, _: object = None) -> str:
    """12345678 -> 12.3M"""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def _bowls(figure: Figure, runs: pd.DataFrame, hp: HPFit) -> None:
    sizes = sorted(runs["N"].unique())
    axes = np.atleast_1d(np.asarray(figure.subplots(1, len(sizes), sharey=True)))
    for ax, N in zip(axes, sizes, strict=True):
        D = runs.loc[runs["N"] == N, "D"].max()
        group = runs[(runs["N"] == N) & (runs["D"] == D)]
        floor = hp.floors[(hp.floors["N"] == N) & (hp.floors["D"] == D)]
        colour = _colour(sizes, N)
        marks = 12 + 60 * group["batch_tokens"] / runs["batch_tokens"].max()
        ax.scatter(group["lr"], group["loss"], s=marks, color=colour, alpha=0.7, linewidths=0)
        best_lr, best_batch = (float(v) for v in hp.law(N, D))
        if len(floor):
            lr = np.geomspace(runs["lr"].min(), runs["lr"].max(), 200)
            bowl = float(floor["loss"].iloc[0]) * np.exp(np.asarray(hp.height(lr, np.full_like(lr, best_batch), N, D)))
            ax.plot(lr, np.where(bowl < 1.35 * group["loss"].min(), bowl, np.nan), color=colour)
        ax.axvline(best_lr, color="#57606a", lw=0.8, ls=":")
        ax.set_xscale("log")
        ax.set_title(f"N {_count(N)}, D {_count(D)}")
        ax.set_xlabel("learning rate (base width)")
    axes[0].set_ylabel("validation loss, nats/token")


def _compute(
    figure: Figure,
    runs: pd.DataFrame,
    floors: pd.DataFrame,
    law: Fit | None,
    recommendation: Recommendation | None,
    targets: Sequence[TargetCurve],
) -> None:
    ax: Axes = figure.subplots()
    sizes = sorted(runs["N"].unique())
    for N in sizes:
        mine, floor, colour = runs[runs["N"] == N], floors[floors["N"] == N], _colour(sizes, N)
        ax.scatter(6 * N * mine["D"], mine["loss"], s=9, color=colour, alpha=0.45, linewidths=0)
        ax.scatter(6 * N * floor["D"], floor["loss"], s=28, marker="D", color=colour, label=f"N {_count(N)}")
        if law is not None:
            _law_line(ax, law, N, floors["D"].min(), floors["D"].max(), colour, "-")
    if recommendation is not None and law is not None:
        r = recommendation
        _law_line(ax, law, r.N, floors["D"].min(), r.D, "#24292f", "--")
        lo, hi = r.loss_interval
        ax.errorbar(
            [r.C],
            [r.loss],
            yerr=[[r.loss - lo], [hi - r.loss]],
            fmt="_",
            color="#24292f",
            capsize=4,
            label=f"target N {_count(r.N)}",
        )
        for t in targets:
            if math.isfinite(t.final_loss):
                ax.scatter(
                    [6 * r.N * t.final_tokens], [t.final_loss], marker="*", s=90, zorder=5, label=f"measured, {t.name}"
                )
    ax.set_xscale("log")
    top = runs["loss"].quantile(0.9)
    ax.set_ylim(top=top + 0.1 * (top - runs["loss"].min()))
    ax.set_xlabel("training compute C = 6ND, FLOPs")
    ax.set_ylabel("validation loss, nats/token")
    ax.legend(frameon=False, fontsize=8)


def _law_line(ax: Axes, law: Fit, N: float, low: float, high: float, colour: str, style: str) -> None:
    D = np.geomspace(low, high, 60)
    n = np.full_like(D, N)
    lo, hi = law.interval(n, D, mass=0.8)
    ax.plot(6 * N * D, np.asarray(law.predict(n, D)), style, color=colour, lw=1.2)
    ax.fill_between(6 * N * D, np.asarray(lo), np.asarray(hi), color=colour, alpha=0.1, lw=0)


def _optima(figure: Figure, runs: pd.DataFrame, hp: HPFit, recommendation: Recommendation | None) -> None:
    axes = figure.subplots(1, 2)
    sizes = sorted(runs["N"].unique())
    top = max([runs["D"].max()] + ([recommendation.D] if recommendation else []))
    D = np.geomspace(runs["D"].min(), top, 24)
    best = runs.loc[runs.groupby(["N", "D"])["loss"].idxmin()]
    for N in sizes:
        colour = _colour(sizes, N)
        bands = [hp.interval(N, d, mass=0.8) for d in D]
        lines = np.array([[float(v) for v in hp.law(N, d)] for d in D])
        for i, (ax, column) in enumerate(zip(axes, ("lr", "batch_tokens"), strict=True)):
            ax.plot(D, lines[:, i], color=colour, label=f"N {_count(N)}")
            ax.fill_between(D, [b[i][0] for b in bands], [b[i][1] for b in bands], color=colour, alpha=0.08, lw=0)
            mine = best[best["N"] == N]
            ax.scatter(mine["D"], mine[column], s=18, color=colour)
    for i, (ax, label) in enumerate(zip(axes, ("lr* (base width)", "B*, tokens per step"), strict=True)):
        if recommendation is not None:
            value, (lo, hi) = (
                (recommendation.lr, recommendation.lr_interval)
                if i == 0
                else (recommendation.batch_tokens, recommendation.batch_interval)
            )
            ax.errorbar(
                [recommendation.D],
                [value],
                yerr=[[value - lo], [hi - value]],
                fmt="*",
                color="#24292f",
                capsize=4,
                label="target",
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("training tokens D")
        ax.set_ylabel(label)
        ax.xaxis.set_major_formatter(FuncFormatter(_count))
    axes[0].legend(frameon=False, fontsize=8)


def _rungs(figure: Figure, runs: pd.DataFrame) -> None:
    sizes = sorted(runs["N"].unique())
    axes = np.atleast_1d(np.asarray(figure.subplots(1, len(sizes), sharey=True)))
    finite = runs.loc[~runs["diverged"], "loss"]
    ceiling = float(finite.quantile(0.95)) * 1.05
    for ax, N in zip(axes, sizes, strict=True):
        for _, one in runs[runs["N"] == N].groupby("run_id"):
            one = one.sort_values("D")
            ax.plot(
                one["D"], one["loss"].clip(upper=ceiling), marker="o", ms=3, lw=1, alpha=0.6, color=_colour(sizes, N)
            )
        lost = runs[(runs["N"] == N) & runs["diverged"]]
        ax.scatter(lost["D"], np.full(len(lost), ceiling), marker="x", color="#cf222e", s=20)
        ax.set_xscale("log")
        ax.set_title(f"N {_count(N)}")
        ax.set_xlabel("tokens")
        ax.xaxis.set_major_formatter(FuncFormatter(_count))
    axes[0].set_ylabel("validation loss, nats/token")


def _target(figure: Figure, targets: Sequence[TargetCurve], recommendation: Recommendation | None) -> None:
    ax: Axes = figure.subplots()
    for i, t in enumerate(targets):
        ax.plot(t.tokens, t.loss, color=COLOURS[i], lw=1.3, label=f"{t.name}, trunk")
        if math.isfinite(t.final_loss):
            ax.scatter([t.final_tokens], [t.final_loss], marker="*", s=90, color=COLOURS[i], zorder=5)
        if math.isfinite(t.final_loss) and t.tokens:  # no points, when it was too short for one on the trunk
            ax.plot([t.tokens[-1], t.final_tokens], [t.loss[-1], t.final_loss], ls=":", color=COLOURS[i], lw=1)
    if recommendation is not None:
        r = recommendation
        lo, hi = r.loss_interval
        label = f"predicted, {100 * r.mass:.0f} %"
        ax.errorbar(
            [r.D], [r.loss], yerr=[[r.loss - lo], [hi - r.loss]], fmt="_", color="#24292f", capsize=5, label=label
        )
    ax.set_xscale("log")
    ax.set_xlabel("tokens")
    ax.set_ylabel("validation loss, nats/token")
    ax.xaxis.set_major_formatter(FuncFormatter(_count))
    ax.legend(frameon=False, fontsize=8)


def _law_rows(hp: HPFit, law: Fit | None) -> list[tuple[str, str]]:
    rows = []
    if law is not None:
        one = law.law
        rows.append(("L(N, D)", f"{one.E:.4g} + {one.A:.4g} / N^{one.alpha:.3f} + {one.B:.4g} / D^{one.beta:.3f}"))
    base = [float(v) for v in hp.law(1e6, 1e6)]
    slopes = [
        [math.log(float(a) / b) / math.log(10) for a, b in zip(hp.law(*at), base, strict=True)]
        for at in ((1e7, 1e6), (1e6, 1e7))
    ]
    for i, name in enumerate(("lr*", "B*")):
        rows.append((name, f"{base[i]:.4g} (N / 1M)^{slopes[0][i]:+.3f} (D / 1M)^{slopes[1][i]:+.3f}"))
    return rows


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ study }}: scaling report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } .num td { font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
.flag { border-left: 3px solid #9a6700; padding-left: .7rem; margin: .4rem 0; } .serious { border-color: #cf222e; }
figure { margin: 0; } svg { max-width: 100%; height: auto; } figcaption, .quiet { color: #57606a; font-size: .9rem; }
</style></head><body>
<h1>{{ study }}</h1>
<p class="quiet">{{ n_runs }} results in the run table{% if n_diverged %}, {{ n_diverged }} diverged{% endif %}. Losses in nats per token on held-out text.</p>
{% if recommendation %}
<h2>Recommendation for N = {{ "{:,.0f}".format(recommendation.N) }}, D = {{ "{:,.0f}".format(recommendation.D) }}</h2>
{% set pc = "{:.0f} %".format(100 * recommendation.mass) %}
<table>
<tr><th>learning rate (base width)</th><td>{{ "{:.4g}".format(recommendation.lr) }}</td>
<td>{{ pc }}: {{ "{:.4g}".format(recommendation.lr_interval[0]) }} to {{ "{:.4g}".format(recommendation.lr_interval[1]) }}</td></tr>
<tr><th>batch, tokens per step</th><td>{{ "{:,.0f}".format(recommendation.batch_tokens) }}{% if recommendation.batch_seqs %} ({{ recommendation.batch_seqs }} sequences){% endif %}</td>
<td>{{ pc }}: {{ "{:,.0f}".format(recommendation.batch_interval[0]) }} to {{ "{:,.0f}".format(recommendation.batch_interval[1]) }}</td></tr>
<tr><th>predicted loss of one run</th><td>{{ "{:.4f}".format(recommendation.loss) }}</td>
<td>{{ pc }}: {{ "{:.4f}".format(recommendation.loss_interval[0]) }} to {{ "{:.4f}".format(recommendation.loss_interval[1]) }}</td></tr>
{% for t in targets %}
<tr><th>measured, {{ t.name }}</th><td>{{ "{:.4f}".format(t.final_loss) }}</td><td>{{ "inside" if recommendation.loss_interval[0] <= t.final_loss <= recommendation.loss_interval[1] else "outside" }} the interval</td></tr>
{% endfor %}
</table>
{% for f in flags %}<p class="flag{% if f.serious %} serious{% endif %}">{{ f.text }}</p>
{% endfor %}
{% endif %}
{% if warm_start %}
<h2>Warm start against scratch</h2>
<table>{% for k, v in warm_start.items() %}<tr><th>{{ k }}</th><td>{{ v }}</td></tr>
{% endfor %}</table>
{% endif %}
{% for s in sections %}
<h2>{{ s.title }}</h2>
<figure>{{ s.svg | safe }}<figcaption>{{ s.caption }}</figcaption></figure>
{% endfor %}
<h2>Laws</h2>
<table class="num">{% for name, text in laws %}<tr><th>{{ name }}</th><td>{{ text }}</td></tr>
{% endfor %}
{% for name, text in fits.items() %}<tr><th>status of the {{ name }}</th><td>{{ text }}</td></tr>
{% endfor %}</table>
<h2>Best runs</h2>
<div class="wide"><table class="num"><tr><th>run</th><th>role</th><th>N</th><th>D</th><th>lr</th><th>batch tokens</th><th>loss</th></tr>
{% for r in best %}<tr><td>{{ r.get("name", r.get("run_id", "")) }}</td><td>{{ r.role }}</td><td>{{ "{:,.0f}".format(r.N) }}</td><td>{{ "{:,.0f}".format(r.D) }}</td>
<td>{{ "{:.4g}".format(r.lr) }}</td><td>{{ "{:,.0f}".format(r.batch_tokens) }}</td><td>{{ "{:.4f}".format(r.loss) }}</td></tr>
{% endfor %}</table></div>
{% if recommendation %}
<p class="quiet">Provenance: {% for k, v in recommendation.provenance.items() %}{{ k }} {{ v }}{% if not loop.last %}; {% endif %}{% endfor %}.</p>
{% endif %}
</body></html>
"""
