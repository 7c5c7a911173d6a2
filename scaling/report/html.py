"""One HTML file that shows a study whole: figures as inline SVG, no network, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pandas as pd

from scaling.curves.backtest import RunCurve, check_forecasts, read_table_curves
from scaling.fitting.envelope import compare_approaches
from scaling.fitting.forms import Comparison, compare_forms
from scaling.fitting.isoflop import Frontier
from scaling.fitting.loss_law import Fit, fit_loss_law
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law
from scaling.laws.published import PublishedLaw, list_published_laws, get_published_law
from scaling.report import figures, tables
from scaling.report.figures import TargetCurve, count, draw_panel
from scaling.report.tables import ReportTable
from scaling.report.template import PAGE_TEMPLATE
from scaling.runs.importer import summarize_exclusions
from scaling.runs.table import usable

if TYPE_CHECKING:
    from scaling.advice.recommendation import Recommendation
    from scaling.common.arrays import Array

__all__ = ["RunCurve", "TargetCurve", "render"]

MAX_BOWLS = 12  # groups that are drawn
MIN_BOWL_RUNS = 3  # runs in one
MAX_SIZES = 8  # of curves and rungs
SMALL_PANEL = {"width": 2.4, "height": 2.1}


@dataclass(frozen=True)
class ReportSection:
    """Figures, what they show, and tables."""

    title: str
    panels: Sequence[str] = ()
    caption: str = ""
    tables: Sequence[ReportTable | None] = ()
    small: bool = False  # many little panels


@dataclass(frozen=True)
class ReportFits:
    """All that is fitted for the page; a sentence in place of what these runs do not allow."""

    used: pd.DataFrame
    left_out: pd.DataFrame  # proxies with a loss that laws do not use
    floors: pd.DataFrame  # N, D, loss, sd: what the loss law is fitted to
    mup: bool  # rates are at base width
    hp: HPFit | str
    law: Fit | str
    forms: Comparison | str
    approaches: dict[str, Frontier | str]


def fit_everything(runs: pd.DataFrame, seed: int = 0) -> ReportFits:
    """Fit everything to a checked run table. ValueError when no row is usable."""
    used = usable(runs)
    if used.empty:
        reasons = [f"{n} {why}" for why, n in runs["excluded"].value_counts().items() if why]
        raise ValueError(
            f"a report needs runs that laws can use, got none of {len(runs)} ({'; '.join(reasons) or 'all are targets'})"
        )
    others = runs.drop(used.index)
    sized = np.isfinite(others["loss"]) & others["N"].gt(0) & others["D"].gt(0)
    hp: HPFit | str
    try:
        hp = fit_hp_law(used, seed=seed)
        floors = hp.floors
    except ValueError as error:  # no such columns, say: then every run counts as tuned
        hp = str(error)
        floors = used[["N", "D", "loss"]].assign(sd=math.nan, n=1).reset_index(drop=True)
    at = tuple(floors[c].to_numpy(float) for c in ("N", "D", "loss"))
    law: Fit | str
    forms: Comparison | str
    approaches: dict[str, Frontier | str] = {}
    try:
        law = fit_loss_law(*at, seed=seed)
        forms = compare_forms(*at)
        approaches = compare_approaches(*at, seed=seed)
    except ValueError as error:
        law = forms = str(error)
    mup = "parametrization" in used and bool((used["parametrization"] == "mup").all())
    return ReportFits(used, others[sized & (others["role"] != "target")], floors, mup, hp, law, forms, approaches)


def render_report(
    study: str,
    runs: pd.DataFrame,
    *,
    recommendation: Recommendation | None = None,
    predicted: Recommendation | None = None,
    targets: Sequence[TargetCurve] = (),
    warm_start: dict[str, Any] | None = None,
    curves: Sequence[RunCurve] = (),
    seed: int = 0,
) -> str:
    """The page. `runs`: the checked run table, targets included; laws are fitted here, to what `usable` keeps of it.

    predicted: what targets are compared with, the prediction made before them; default: the recommendation.
    curves: of `scaling.curves.backtest.read_study_curves`; without any, those that the table itself holds. ValueError when no row
    is usable.
    """
    found, predicted = fit_everything(runs, seed), predicted or recommendation
    sections = [
        *_build_bowl_sections(found),
        *_build_optimum_sections(found, recommendation),
        *_build_loss_law_sections(found, recommendation, targets),
        *_build_frontier_sections(found, recommendation),
        *_build_curve_sections(curves or read_table_curves(runs)),
        *_build_rung_sections(runs[runs["role"] == "proxy"]),
        *_build_target_sections(targets, predicted),
        ReportSection("Rows kept out of laws", tables=[tables.tabulate_exclusions(runs)]),
        ReportSection("Best runs", tables=[tables.tabulate_best_runs(runs, found.used)]),
    ]
    plain = recommendation.to_dict() if recommendation else {}
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE_TEMPLATE)
    return page.render(
        study=study,
        counted=summarize_exclusions(runs),
        recommendation=recommendation,
        predicted=predicted,
        trustworthy=recommendation.trustworthy if recommendation else True,
        flags=sorted(recommendation.flags, key=lambda f: not f.serious) if recommendation else (),
        next_run=tables.describe_next_run(plain.get("next_run")),  # notes of older versions have none
        provenance=tables.describe_values(plain.get("provenance")),
        mup=found.mup,
        warm_start=warm_start,
        targets=targets,
        sections=[s for s in sections if s.panels or s.caption or any(s.tables)],
    )


def _get_point_of_interest(found: ReportFits, recommendation: Recommendation | None) -> tuple[float, float]:
    """(N, D) of the target, else of the group of most compute."""
    if recommendation is not None:
        return recommendation.N, recommendation.D
    largest = found.floors.iloc[int((found.floors["N"] * found.floors["D"]).argmax())]
    return float(largest["N"]), float(largest["D"])


def _build_bowl_sections(found: ReportFits) -> list[ReportSection]:
    hp = found.hp
    if isinstance(hp, str):
        return [ReportSection("Learning rate and batch", caption=f"No law of learning rate and batch: {hp}.")]
    floors = hp.floors[hp.floors["n"] >= MIN_BOWL_RUNS]
    every = list(floors[["N", "D", "loss"]].itertuples(index=False, name=None))
    shown = (
        [every[i] for i in np.unique(np.linspace(0, len(every) - 1, MAX_BOWLS).round().astype(int))] if every else []
    )
    some = f" {len(shown)} of {len(every)} groups." if len(shown) < len(every) else ""
    colours = figures.assign_colours(hp.floors["N"])
    words = {"lr": "learning rate" + (" (base width)" if found.mup else ""), "batch_tokens": "batch, tokens per step"}
    sections = []
    for column, other in (("lr", "batch"), ("batch_tokens", "learning rate")):
        if hp.used[column].nunique() < 2:
            continue  # the law's status says that its optimum is assumed
        panels = []
        for N, D, floor in shown:
            group = hp.used[(hp.used["N"] == N) & (hp.used["D"] == D)]
            draw = partial(figures.draw_bowl, group=group, hp=hp, floor=floor, column=column, colour=colours[N])
            panels.append(draw_panel(draw, f"loss against {words[column]}, N {count(N)}, D {count(D)}", **SMALL_PANEL))
        caption = (
            f"Coloured points: runs whose {other} is within 1.6 times the fitted best; grey: other runs. Curve: the fitted bowl at "
            f"the best {other}. Line and shade: the law's optimum for the group, with its 80 % interval.{some}"
        )
        sections.append(ReportSection(f"Loss against {words[column]}", panels, caption if panels else "", small=True))
    return sections


def _build_optimum_sections(found: ReportFits, recommendation: Recommendation | None) -> list[ReportSection]:
    hp = found.hp
    if isinstance(hp, str):
        return []
    laws = [get_published_law(name) for name in list_published_laws()]
    panels = []
    for i, column in enumerate(("lr", "batch_tokens")):
        speaking = [] if found.mup and column == "lr" else [(law.name, partial(_evaluate_published, law, i)) for law in laws]
        draw = partial(
            figures.draw_optima, used=hp.used, hp=hp, column=column, recommendation=recommendation, beside=speaking
        )
        panels.append(draw_panel(draw, f"best {column} against tokens"))
    caption = (
        "Lines: the law at each size, with its 80 % band from draws. Points: the best single run of each group, which the law does "
        "not follow: all runs speak. Grey: published laws at the largest size, except where they are known to be outside what they were measured on."
    )
    beside = tables.tabulate_published(laws, hp, *_get_point_of_interest(found, recommendation), found.mup)
    return [ReportSection("lr* and B* against scale", panels, caption, [tables.tabulate_hp_law(hp), beside])]


def _evaluate_published(law: PublishedLaw, i: int, N: float, D: Array) -> Array | None:
    """What a published law says of lr (0) or batch (1) where it may; NaN elsewhere, None when nowhere."""
    value = law(N, D)[i]
    if value is None:
        return None
    value = np.where((value > 0) & [law.covers(N, float(d)) is not False for d in D], value, np.nan)
    return None if np.isnan(value).all() else value


def _build_loss_law_sections(found: ReportFits, recommendation: Recommendation | None, targets: Sequence[TargetCurve]) -> list[ReportSection]:
    floors, grouped = found.floors, isinstance(found.hp, HPFit)
    fit = None if isinstance(found.law, str) else found.law
    draw = partial(
        figures.draw_compute,
        used=found.used,
        left_out=found.left_out,
        floors=floors,
        law=fit,
        recommendation=recommendation,
        targets=targets,
    )
    panels = [draw_panel(draw, "loss against compute")]
    caption = "Points: runs" + ("; pale: runs kept out of laws." if len(found.left_out) else ".")
    caption += " Diamonds: the fitted minimum of each (N, D) group." if grouped else ""
    if fit is None:
        return [ReportSection("Loss against compute", panels, f"{caption} No loss law: {found.law}.")]
    N, D = _get_point_of_interest(found, recommendation)
    panels.append(draw_panel(partial(figures.draw_two_forms, law=fit, floors=floors, N=N, D=D), "the two averaged forms"))
    one = "new group's minimum" if grouped else "new run"
    caption += (
        f" First figure: the averaged prediction along some sizes, with the 80 % band of one {one}"
        + (", dashed at the target's size; bar: the recommendation's interval" if recommendation else "")
        + ("; star: a measured target" if targets else "")
        + ". Second: what is averaged, at one size; no run has more tokens than at the vertical line."
    )
    sections = [ReportSection("Loss against compute", panels, caption, [tables.tabulate_loss_law(fit, N, D)])]
    left = []
    for column in ("N", "D"):
        draw = partial(figures.draw_residuals, law=fit, floors=floors, column=column)
        left.append(draw_panel(draw, f"what the loss law leaves, against {column}", height=2.6))
    caption = "ln(loss / prediction)" + (
        " of each group's minimum, with the minimum's own sd" if grouped else " of each run"
    )
    sections.append(
        ReportSection("What the loss law leaves", left, f"{caption}. Grey: the scatter that the interval counts with.")
    )
    if isinstance(found.forms, Comparison):
        sections.append(ReportSection("Forms of the loss law", tables=[tables.tabulate_forms(found.forms)]))
    return sections


def _build_frontier_sections(found: ReportFits, recommendation: Recommendation | None) -> list[ReportSection]:
    if not found.approaches:
        return []
    panels, caption = [], ""
    if any(isinstance(v, Frontier) for v in found.approaches.values()):
        draw = partial(figures.draw_approaches, found=found.approaches, recommendation=recommendation)
        panels = [draw_panel(draw, "compute-optimal N against compute", width=6.2, height=3.6)]
        caption = (
            "N of least loss by the envelope of runs, by parabolas at equal compute, and by the loss law; 80 % bands."
        )
    N, D = _get_point_of_interest(found, recommendation)
    table = tables.tabulate_approaches(found.approaches, 6 * N * D)
    return [ReportSection("Compute-optimal sizes, three ways", panels, caption, [table])]


def _build_curve_sections(curves: Sequence[RunCurve]) -> list[ReportSection]:
    if not curves:
        return []
    colours = figures.assign_colours(c.N for c in curves)
    panels = []
    for N in figures.pick_few(list(colours), MAX_SIZES):
        mine = [(c.tokens, c.loss) for c in curves if c.N == N]
        draw = partial(figures.draw_curves, of_one_size=mine, colour=colours[N], N=N)
        panels.append(draw_panel(draw, f"loss along runs, N {count(N)}", **SMALL_PANEL))
    checks = check_forecasts(curves)
    caption = "Loss along runs; the last point is the end, after the cooldown where there is one."
    if any(c.schedule is None for c in curves):
        caption += " Some schedules are not recorded: there, forecasts take the rate as constant."
    return [ReportSection("Curves", panels, caption, [tables.tabulate_forecasts(checks)] if checks else [], small=True)]


def _build_rung_sections(proxies: pd.DataFrame) -> list[ReportSection]:
    finite = proxies.loc[np.isfinite(proxies["loss"]), "loss"]
    if finite.empty or not {"rung", "run_id"} <= set(proxies):
        return []
    colours, ceiling = figures.assign_colours(proxies["N"]), float(finite.quantile(0.95)) * 1.05
    panels = []
    for N in figures.pick_few(list(colours), MAX_SIZES):
        draw = partial(figures.draw_rungs, runs=proxies, N=N, colour=colours[N], ceiling=ceiling)
        panels.append(draw_panel(draw, f"rungs, N {count(N)}", **SMALL_PANEL))
    caption = "One line per configuration, one point per rung; a cross marks a diverged run."
    return [ReportSection("Rungs and promotions", panels, caption, small=True)]


def _build_target_sections(targets: Sequence[TargetCurve], predicted: Recommendation | None) -> list[ReportSection]:
    if not targets:
        return []
    draw = partial(figures.draw_targets, targets=targets, recommendation=predicted)
    caption = "Curves: validation loss on the constant-rate trunk. Star: after the cooldown, which is what the law predicts (bar)."
    figure = draw_panel(draw, "the target against its prediction", width=6.2, height=3.6)
    return [ReportSection("The target against its prediction", [figure], caption)]
