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

from scaling.curves.backtest import RunCurve, check_forecasts, table_curves
from scaling.fitting.envelope import compare_approaches
from scaling.fitting.forms import Comparison, compare_forms
from scaling.fitting.isoflop import Frontier
from scaling.fitting.loss_law import Fit, fit_loss_law
from scaling.fitting.lr_batch_law import HPFit, fit_hp_law
from scaling.laws.published import Published, names, published
from scaling.report import figures, tables
from scaling.report.figures import TargetCurve, count, panel
from scaling.report.tables import ReportTable
from scaling.report.template import PAGE
from scaling.runs.importer import quarantine
from scaling.runs.table import usable

if TYPE_CHECKING:
    from scaling.advice.recommendation import Recommendation
    from scaling.common.arrays import Array

__all__ = ["RunCurve", "TargetCurve", "render"]

MOST_BOWLS = 12  # groups that are drawn
LEAST_BOWL = 3  # runs in one
MOST_SIZES = 8  # of curves and rungs
SMALL = {"width": 2.4, "height": 2.1}


@dataclass(frozen=True)
class Section:
    """Figures, what they show, and tables."""

    title: str
    panels: Sequence[str] = ()
    caption: str = ""
    tables: Sequence[ReportTable | None] = ()
    small: bool = False  # many little panels


@dataclass(frozen=True)
class Evidence:
    """All that is fitted for the page; a sentence in place of what these runs do not allow."""

    used: pd.DataFrame
    left_out: pd.DataFrame  # proxies with a loss that laws do not use
    floors: pd.DataFrame  # N, D, loss, sd: what the loss law is fitted to
    mup: bool  # rates are at base width
    hp: HPFit | str
    law: Fit | str
    forms: Comparison | str
    approaches: dict[str, Frontier | str]


def gather(runs: pd.DataFrame, seed: int = 0) -> Evidence:
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
    return Evidence(used, others[sized & (others["role"] != "target")], floors, mup, hp, law, forms, approaches)


def render(
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
    curves: of `scaling.curves.backtest.study_curves`; without any, those that the table itself holds. ValueError when no row
    is usable.
    """
    found, predicted = gather(runs, seed), predicted or recommendation
    sections = [
        *_bowls(found),
        *_optima(found, recommendation),
        *_loss_law(found, recommendation, targets),
        *_frontiers(found, recommendation),
        *_curves(curves or table_curves(runs)),
        *_rungs(runs[runs["role"] == "proxy"]),
        *_targets(targets, predicted),
        Section("Rows kept out of laws", tables=[tables.excluded(runs)]),
        Section("Best runs", tables=[tables.best(runs, found.used)]),
    ]
    plain = recommendation.to_dict() if recommendation else {}
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    return page.render(
        study=study,
        counted=quarantine(runs),
        recommendation=recommendation,
        predicted=predicted,
        trustworthy=recommendation.trustworthy if recommendation else True,
        flags=sorted(recommendation.flags, key=lambda f: not f.serious) if recommendation else (),
        next_run=tables.next_run(plain.get("next_run")),  # notes of older versions have none
        provenance=tables.pairs(plain.get("provenance")),
        mup=found.mup,
        warm_start=warm_start,
        targets=targets,
        sections=[s for s in sections if s.panels or s.caption or any(s.tables)],
    )


def _asked(found: Evidence, recommendation: Recommendation | None) -> tuple[float, float]:
    """(N, D) of the target, else of the group of most compute."""
    if recommendation is not None:
        return recommendation.N, recommendation.D
    largest = found.floors.iloc[int((found.floors["N"] * found.floors["D"]).argmax())]
    return float(largest["N"]), float(largest["D"])


def _bowls(found: Evidence) -> list[Section]:
    hp = found.hp
    if isinstance(hp, str):
        return [Section("Learning rate and batch", caption=f"No law of learning rate and batch: {hp}.")]
    floors = hp.floors[hp.floors["n"] >= LEAST_BOWL]
    every = list(floors[["N", "D", "loss"]].itertuples(index=False, name=None))
    shown = (
        [every[i] for i in np.unique(np.linspace(0, len(every) - 1, MOST_BOWLS).round().astype(int))] if every else []
    )
    some = f" {len(shown)} of {len(every)} groups." if len(shown) < len(every) else ""
    colours = figures.palette(hp.floors["N"])
    words = {"lr": "learning rate" + (" (base width)" if found.mup else ""), "batch_tokens": "batch, tokens per step"}
    sections = []
    for column, other in (("lr", "batch"), ("batch_tokens", "learning rate")):
        if hp.used[column].nunique() < 2:
            continue  # the law's status says that its optimum is assumed
        panels = []
        for N, D, floor in shown:
            group = hp.used[(hp.used["N"] == N) & (hp.used["D"] == D)]
            draw = partial(figures.bowl, group=group, hp=hp, floor=floor, column=column, colour=colours[N])
            panels.append(panel(draw, f"loss against {words[column]}, N {count(N)}, D {count(D)}", **SMALL))
        caption = (
            f"Coloured points: runs whose {other} is within 1.6 times the fitted best; grey: other runs. Curve: the fitted bowl at "
            f"the best {other}. Line and shade: the law's optimum for the group, with its 80 % interval.{some}"
        )
        sections.append(Section(f"Loss against {words[column]}", panels, caption if panels else "", small=True))
    return sections


def _optima(found: Evidence, recommendation: Recommendation | None) -> list[Section]:
    hp = found.hp
    if isinstance(hp, str):
        return []
    laws = [published(name) for name in names()]
    panels = []
    for i, column in enumerate(("lr", "batch_tokens")):
        speaking = [] if found.mup and column == "lr" else [(law.name, partial(_said, law, i)) for law in laws]
        draw = partial(
            figures.optima, used=hp.used, hp=hp, column=column, recommendation=recommendation, beside=speaking
        )
        panels.append(panel(draw, f"best {column} against tokens"))
    caption = (
        "Lines: the law at each size, with its 80 % band from draws. Points: the best single run of each group, which the law does "
        "not follow: all runs speak. Grey: published laws at the largest size, except where they are known to be outside what they were measured on."
    )
    beside = tables.published(laws, hp, *_asked(found, recommendation), found.mup)
    return [Section("lr* and B* against scale", panels, caption, [tables.hp_law(hp), beside])]


def _said(law: Published, i: int, N: float, D: Array) -> Array | None:
    """What a published law says of lr (0) or batch (1) where it may; NaN elsewhere, None when nowhere."""
    value = law(N, D)[i]
    if value is None:
        return None
    value = np.where((value > 0) & [law.covers(N, float(d)) is not False for d in D], value, np.nan)
    return None if np.isnan(value).all() else value


def _loss_law(found: Evidence, recommendation: Recommendation | None, targets: Sequence[TargetCurve]) -> list[Section]:
    floors, grouped = found.floors, isinstance(found.hp, HPFit)
    fit = None if isinstance(found.law, str) else found.law
    draw = partial(
        figures.compute,
        used=found.used,
        left_out=found.left_out,
        floors=floors,
        law=fit,
        recommendation=recommendation,
        targets=targets,
    )
    panels = [panel(draw, "loss against compute")]
    caption = "Points: runs" + ("; pale: runs kept out of laws." if len(found.left_out) else ".")
    caption += " Diamonds: the fitted minimum of each (N, D) group." if grouped else ""
    if fit is None:
        return [Section("Loss against compute", panels, f"{caption} No loss law: {found.law}.")]
    N, D = _asked(found, recommendation)
    panels.append(panel(partial(figures.two_forms, law=fit, floors=floors, N=N, D=D), "the two averaged forms"))
    one = "new group's minimum" if grouped else "new run"
    caption += (
        f" First figure: the averaged prediction along some sizes, with the 80 % band of one {one}"
        + (", dashed at the target's size; bar: the recommendation's interval" if recommendation else "")
        + ("; star: a measured target" if targets else "")
        + ". Second: what is averaged, at one size; no run has more tokens than at the vertical line."
    )
    sections = [Section("Loss against compute", panels, caption, [tables.loss_law(fit, N, D)])]
    left = []
    for column in ("N", "D"):
        draw = partial(figures.residuals, law=fit, floors=floors, column=column)
        left.append(panel(draw, f"what the loss law leaves, against {column}", height=2.6))
    caption = "ln(loss / prediction)" + (
        " of each group's minimum, with the minimum's own sd" if grouped else " of each run"
    )
    sections.append(
        Section("What the loss law leaves", left, f"{caption}. Grey: the scatter that the interval counts with.")
    )
    if isinstance(found.forms, Comparison):
        sections.append(Section("Forms of the loss law", tables=[tables.forms(found.forms)]))
    return sections


def _frontiers(found: Evidence, recommendation: Recommendation | None) -> list[Section]:
    if not found.approaches:
        return []
    panels, caption = [], ""
    if any(isinstance(v, Frontier) for v in found.approaches.values()):
        draw = partial(figures.approaches, found=found.approaches, recommendation=recommendation)
        panels = [panel(draw, "compute-optimal N against compute", width=6.2, height=3.6)]
        caption = (
            "N of least loss by the envelope of runs, by parabolas at equal compute, and by the loss law; 80 % bands."
        )
    N, D = _asked(found, recommendation)
    table = tables.approaches(found.approaches, 6 * N * D)
    return [Section("Compute-optimal sizes, three ways", panels, caption, [table])]


def _curves(curves: Sequence[RunCurve]) -> list[Section]:
    if not curves:
        return []
    colours = figures.palette(c.N for c in curves)
    panels = []
    for N in figures.few(list(colours), MOST_SIZES):
        mine = [(c.tokens, c.loss) for c in curves if c.N == N]
        draw = partial(figures.curves, of_one_size=mine, colour=colours[N], N=N)
        panels.append(panel(draw, f"loss along runs, N {count(N)}", **SMALL))
    checks = check_forecasts(curves)
    caption = "Loss along runs; the last point is the end, after the cooldown where there is one."
    if any(c.schedule is None for c in curves):
        caption += " Some schedules are not recorded: there, forecasts take the rate as constant."
    return [Section("Curves", panels, caption, [tables.forecasts(checks)] if checks else [], small=True)]


def _rungs(proxies: pd.DataFrame) -> list[Section]:
    finite = proxies.loc[np.isfinite(proxies["loss"]), "loss"]
    if finite.empty or not {"rung", "run_id"} <= set(proxies):
        return []
    colours, ceiling = figures.palette(proxies["N"]), float(finite.quantile(0.95)) * 1.05
    panels = []
    for N in figures.few(list(colours), MOST_SIZES):
        draw = partial(figures.rungs, runs=proxies, N=N, colour=colours[N], ceiling=ceiling)
        panels.append(panel(draw, f"rungs, N {count(N)}", **SMALL))
    caption = "One line per configuration, one point per rung; a cross marks a diverged run."
    return [Section("Rungs and promotions", panels, caption, small=True)]


def _targets(targets: Sequence[TargetCurve], predicted: Recommendation | None) -> list[Section]:
    if not targets:
        return []
    draw = partial(figures.target, targets=targets, recommendation=predicted)
    caption = "Curves: validation loss on the constant-rate trunk. Star: after the cooldown, which is what the law predicts (bar)."
    figure = panel(draw, "the target against its prediction", width=6.2, height=3.6)
    return [Section("The target against its prediction", [figure], caption)]
