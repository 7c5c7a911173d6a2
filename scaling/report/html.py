"""Render one HTML file that shows a whole study: figures as inline SVG, no network access, no scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pandas as pd

from scaling.advice.answer import choose_caveats, sort_flags
from scaling.advice.budgets import find_point_compute
from scaling.advice.conditions import find_mixed_conditions
from scaling.advice.recommendation import Recommendation, set_target_aside
from scaling.advice.table_fits import SETTING_NAMES, TableFits, fit_table
from scaling.common.quantities import format_count
from scaling.curves.backtest import RunCurve, check_forecasts, read_table_curves
from scaling.fitting.envelope import compare_approaches
from scaling.fitting.forms import Comparison, compare_forms
from scaling.fitting.groups import group_runs
from scaling.fitting.isoflop import Frontier
from scaling.fitting.loss_law import Fit
from scaling.fitting.lr_batch_law import HPFit
from scaling.laws.published import PublishedLaw, get_published_law, list_published_laws
from scaling.report import figures, tables
from scaling.report.figures import TargetCurve, draw_panel
from scaling.report.tables import ReportTable
from scaling.report.template import PAGE_TEMPLATE
from scaling.runs.importer import summarize_exclusions
from scaling.runs.table import usable

if TYPE_CHECKING:
    from scaling.common.arrays import Array

# Groups whose bowls are drawn, and runs that such a group needs.
MAX_BOWLS = 12
MIN_BOWL_RUNS = 3
# Sizes whose curves and rungs are drawn.
MAX_SIZES = 8
# Inches.
SMALL_PANEL = {"width": 2.4, "height": 2.1}


@dataclass(frozen=True)
class ReportSection:
    """A part of the page.

    Attributes:
        title: The heading.
        panels: Figures, as SVG.
        caption: What they show.
        tables: Tables below them.
        small: Whether the figures are small, and many.
    """

    title: str
    panels: Sequence[str] = ()
    caption: str = ""
    tables: Sequence[ReportTable | None] = ()
    small: bool = False


@dataclass(frozen=True)
class ReportFits:
    """All that is fitted for the page. A sentence takes the place of what these runs do not allow.

    Attributes:
        used: The runs that laws are fitted to.
        left_out: Proxies with a loss that laws do not use.
        floors: N, D, loss and sd of each group.
        points: N, D, loss and sd of what the loss law is fitted to: the groups, or the runs as they are.
        mup: Whether learning rates are at base width.
        table: All laws of the table, with what it can tell of learning rate and batch.
        hp: The law of learning rate and batch.
        law: The loss law.
        forms: The comparison of its forms.
        approaches: The compute-optimal sizes by each approach.
    """

    used: pd.DataFrame
    left_out: pd.DataFrame
    floors: pd.DataFrame
    points: pd.DataFrame
    mup: bool
    table: TableFits
    hp: HPFit | str
    law: Fit | str
    forms: Comparison | str
    approaches: dict[str, Frontier | str]


def fit_everything(runs: pd.DataFrame, seed: int = 0, *, target: tuple[float, float] | None = None) -> ReportFits:
    """Fit everything that a report shows.

    Args:
        runs: A checked run table.
        seed: Seed of the fits' random draws.
        target: N and D of a target whose own runs are not fitted, because they are compared with the laws.

    Returns:
        The fits, or the reasons why they do not exist.

    Raises:
        ValueError: If laws can use no row.
    """
    used = usable(runs)
    if target is not None:
        used, _ = set_target_aside(runs, used, *target)
    if used.empty:
        reasons = [f"{n} {reason}" for reason, n in runs["excluded"].value_counts().items() if reason]
        raise ValueError(
            f"a report needs runs that laws can use, got none of {len(runs)} "
            f"({'; '.join(reasons) or 'all are targets'})"
        )
    others = runs.drop(used.index)
    has_result = np.isfinite(others["loss"]) & others["N"].gt(0) & others["D"].gt(0)
    table = fit_table(used, seed=seed)
    N, D, loss = (table.points[c].to_numpy(float) for c in ("N", "D", "loss"))
    forms: Comparison | str = table.no_loss_law
    approaches: dict[str, Frontier | str] = {}
    if table.loss is not None:
        compute = find_point_compute(table)
        try:
            forms = compare_forms(N, D, loss)
            approaches = compare_approaches(N, D, loss, C=None if compute is None else compute[1], seed=seed)
        except ValueError as error:
            forms = str(error)
    hp: HPFit | str = "not in this table"
    if table.hp is not None:
        hp = replace(table.hp, used=_move_to_groups(table.hp.used))
    elif "missing" not in table.states.values():
        hp = "neither was varied at equal N and D"
    return ReportFits(
        used=used,
        left_out=others[has_result & (others["role"] != "target")],
        floors=table.groups,
        points=_move_to_groups(table.points),
        mup="parametrization" in used and bool((used["parametrization"] == "mup").all()),
        table=table,
        hp=hp,
        law=table.no_loss_law if table.loss is None else table.loss.fit,
        forms=forms,
        approaches=approaches,
    )


def _move_to_groups(runs: pd.DataFrame) -> pd.DataFrame:
    """Return runs with N and D of their group, so that nearly equal sizes share a colour and a panel."""
    groups = group_runs(runs["N"].to_numpy(float), runs["D"].to_numpy(float))
    return runs.assign(N=groups.N[groups.of], D=groups.D[groups.of])


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
    advance: Callable[[str], None] = lambda text: None,
) -> str:
    """Render the page.

    Args:
        study: The title.
        runs: The checked run table, with the targets. Laws are fitted here, to the rows that `scaling.usable` keeps.
        recommendation: The recommendation to show.
        predicted: The prediction that targets are compared with, made before them; by default the recommendation.
        targets: The launched targets.
        warm_start: Figures on a warm start, by name.
        curves: The curves of `scaling.curves.backtest.read_study_curves`; by default those that the table holds.
        seed: Seed of the fits' random draws.
        advance: Called with what is drawn next, for a bar of progress.

    Returns:
        The text of an HTML file.

    Raises:
        ValueError: If laws can use no row.
    """
    answer = recommendation
    if answer is not None and targets and not answer.measured:
        answer = replace(answer, measured={t.name: t.final_loss for t in targets})
    target = None if answer is None else (answer.N, answer.D)
    fits, predicted = fit_everything(runs, seed, target=target), predicted or answer
    sections: list[ReportSection] = []
    parts: tuple[tuple[str, Callable[[], list[ReportSection]]], ...] = (
        ("learning rate and batch", lambda: _build_bowl_sections(fits)),
        ("their laws", lambda: _build_optimum_sections(fits, answer)),
        ("loss law", lambda: _build_loss_law_sections(fits, answer, targets)),
        ("compute-optimal sizes", lambda: _build_frontier_sections(fits, answer)),
        ("loss curves", lambda: _build_curve_sections(curves or read_table_curves(runs))),
        ("rungs", lambda: _build_rung_sections(runs[runs["role"] == "proxy"])),
        ("targets", lambda: _build_target_sections(targets, predicted)),
    )
    for what, build in parts:
        advance(f"drawing: {what}")
        sections += build()
    sections += [
        ReportSection("Rows that laws do not use", tables=[tables.tabulate_exclusions(runs)]),
        ReportSection("Best runs", tables=[tables.tabulate_best_runs(runs, fits.used)]),
    ]
    plain = answer.to_dict() if answer else {}
    mixed = find_mixed_conditions(fits.table)
    doubts = [*([] if mixed is None else [str(mixed)]), *(fits.table.loss.doubts if fits.table.loss else ())]
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE_TEMPLATE)
    return page.render(
        study=study,
        counted=summarize_exclusions(runs),
        recommendation=answer,
        target=tables.describe_target(answer) if answer else "",
        rows=tables.list_answer_rows(answer, mup=fits.mup) if answer else (),
        trustworthy=answer.trustworthy if answer else True,
        flags=sort_flags(answer.flags) if answer else (),
        caveats=choose_caveats(answer.flags) if answer else (),
        doubts=() if answer else doubts,
        # Notes of older versions have no next run.
        next_run=tables.describe_next_run(plain.get("next_run")),
        provenance=tables.describe_values(plain.get("provenance")),
        warm_start=warm_start,
        sections=[s for s in sections if s.panels or s.caption or any(s.tables)],
    )


def _get_point_of_interest(fits: ReportFits, recommendation: Recommendation | None) -> tuple[float, float]:
    """Return (N, D) of the target or, without one, of the group with the most compute."""
    if recommendation is not None:
        return recommendation.N, recommendation.D
    largest = fits.floors.iloc[int((fits.floors["N"] * fits.floors["D"]).argmax())]
    return float(largest["N"]), float(largest["D"])


def _build_bowl_sections(fits: ReportFits) -> list[ReportSection]:
    hp = fits.hp
    if isinstance(hp, str):
        return [ReportSection("Learning rate and batch", caption=f"No law of learning rate and batch: {hp}.")]
    floors = hp.floors[hp.floors["n"] >= MIN_BOWL_RUNS]
    groups = list(floors[["N", "D", "loss"]].itertuples(index=False, name=None))
    picked: list[int] = []
    if groups:
        picked = np.unique(np.linspace(0, len(groups) - 1, MAX_BOWLS).round().astype(int)).tolist()
    colours = figures.assign_colours(hp.floors["N"])
    names = {"lr": "learning rate" + (" (base width)" if fits.mup else ""), "batch_tokens": "batch, tokens per step"}
    sections = []
    for column, setting, other in (("lr", "learning rate", "batch"), ("batch_tokens", "batch", "learning rate")):
        if fits.table.states[column] != "varied":
            continue
        panels = []
        for N, D, floor in (groups[i] for i in picked):
            group = hp.used[(hp.used["N"] == N) & (hp.used["D"] == D)]
            draw = partial(figures.draw_bowl, group=group, hp=hp, floor=floor, column=column, colour=colours[N])
            label = f"loss against {names[column]}, N {format_count(N)}, D {format_count(D)}"
            panels.append(draw_panel(draw, label, **SMALL_PANEL))
        caption = (
            f"Coloured points: runs whose {other} is within a factor of 1.6 of the fitted best; grey: other runs. "
            f"Curve: the fitted bowl at the best {other}. "
        )
        if fits.table.states["batch_tokens" if column == "lr" else "lr"] != "varied":
            caption = f"Points: runs. Curve: the fitted bowl at the {other} of these runs. "
        caption += f"Line and shaded area: the best {setting} by the law, with its 80 % interval."
        if len(picked) < len(groups):
            caption += f" {len(picked)} of {len(groups)} groups are shown."
        sections.append(ReportSection(f"Loss against {names[column]}", panels, caption if panels else "", small=True))
    return sections


def _build_optimum_sections(fits: ReportFits, recommendation: Recommendation | None) -> list[ReportSection]:
    hp = fits.hp
    if isinstance(hp, str):
        return []
    laws = [get_published_law(name) for name in list_published_laws()]
    panels = []
    varied = [name for name in SETTING_NAMES if fits.table.states[name] == "varied"]
    for i, column in enumerate(SETTING_NAMES):
        if column not in varied:
            continue
        beside = [(law.name, partial(_evaluate_published, law, i)) for law in laws]
        if fits.mup and column == "lr":
            beside = []
        draw = partial(
            figures.draw_optima, used=hp.used, hp=hp, column=column, recommendation=recommendation, beside=beside
        )
        panels.append(draw_panel(draw, f"best {column} against tokens"))
    caption = (
        "Lines: the law at each size, with its 80 % band. Points: the best single run of each group; the law is "
        "fitted to all runs, so it need not pass through them. Grey: published laws at the largest size, where they "
        "are not known to be outside the range they were measured in."
    )
    N, D = _get_point_of_interest(fits, recommendation)
    published = tables.tabulate_published(laws, hp, N, D, fits.mup) if len(varied) == 2 else None
    title = "Best learning rate and batch against tokens"
    return [ReportSection(title, panels, caption, [tables.tabulate_hp_law(hp, varied), published])]


def _evaluate_published(law: PublishedLaw, i: int, N: float, D: Array) -> Array | None:
    """Return the lr (0) or batch (1) of a published law; NaN where it does not apply, None if it applies nowhere."""
    value = law(N, D)[i]
    if value is None:
        return None
    value = np.where((value > 0) & [law.covers(N, float(d)) is not False for d in D], value, np.nan)
    return None if np.isnan(value).all() else value


def _build_loss_law_sections(
    fits: ReportFits, recommendation: Recommendation | None, targets: Sequence[TargetCurve]
) -> list[ReportSection]:
    floors, has_groups = fits.floors, fits.table.points is fits.table.groups
    law = None if isinstance(fits.law, str) else fits.law
    draw = partial(
        figures.draw_compute,
        used=_move_to_groups(fits.table.used),
        left_out=fits.left_out,
        floors=floors,
        law=law,
        recommendation=recommendation,
        targets=targets,
    )
    panels = [draw_panel(draw, "loss against compute")]
    caption = "Points: runs" + ("; pale: runs that laws do not use." if len(fits.left_out) else ".")
    lowest = "the fitted minimum" if has_groups else "the lowest loss"
    caption += f" Diamonds: {lowest} of each (N, D) group."
    if law is None:
        return [ReportSection("Loss against compute", panels, f"{caption} No loss law: {fits.law}.")]
    N, D = _get_point_of_interest(fits, recommendation)
    draw = partial(figures.draw_two_forms, law=law, floors=fits.points, N=N, D=D)
    panels.append(draw_panel(draw, "the two averaged forms of the loss law"))
    one = "the minimum of a new group" if has_groups else "a new run"
    caption += (
        f" First figure: the averaged prediction along some sizes, with the 80 % band of {one}"
        + (", dashed at the size of the target; bar: the interval of the recommendation" if recommendation else "")
        + ("; star: a measured target" if targets else "")
        + ". Second figure: the forms that are averaged, at one size; no run has more tokens than the vertical line."
    )
    sections = [ReportSection("Loss against compute", panels, caption, [tables.tabulate_loss_law(law, N, D)])]
    panels = []
    for column in ("N", "D"):
        draw = partial(figures.draw_residuals, law=law, floors=fits.points, column=column)
        panels.append(draw_panel(draw, f"residuals of the loss law against {column}", height=2.6))
    caption = "ln(loss / prediction) of each " + (
        "group's minimum, with the standard deviation of that minimum" if has_groups else "run"
    )
    caption += ". Grey: the scatter that the intervals assume."
    sections.append(ReportSection("Residuals of the loss law", panels, caption))
    if isinstance(fits.forms, Comparison):
        sections.append(ReportSection("Forms of the loss law", tables=[tables.tabulate_forms(fits.forms)]))
    return sections


def _build_frontier_sections(fits: ReportFits, recommendation: Recommendation | None) -> list[ReportSection]:
    if not fits.approaches:
        return []
    panels, caption = [], ""
    if any(isinstance(v, Frontier) for v in fits.approaches.values()):
        draw = partial(figures.draw_approaches, approaches=fits.approaches, recommendation=recommendation)
        panels = [draw_panel(draw, "compute-optimal N against compute", width=6.2, height=3.6)]
        caption = (
            "The N with the lowest loss at each compute, by the envelope of the runs, by parabolas at equal compute, "
            "and by the loss law, with 80 % bands."
        )
    N, D = _get_point_of_interest(fits, recommendation)
    table = tables.tabulate_approaches(fits.approaches, 6 * N * D)
    return [ReportSection("Compute-optimal size by three approaches", panels, caption, [table])]


def _build_curve_sections(curves: Sequence[RunCurve]) -> list[ReportSection]:
    if not curves:
        return []
    colours = figures.assign_colours(c.N for c in curves)
    panels = []
    for N in figures.pick_few(list(colours), MAX_SIZES):
        of_size = [(c.tokens, c.loss) for c in curves if c.N == N]
        draw = partial(figures.draw_curves, curves=of_size, colour=colours[N], N=N)
        panels.append(draw_panel(draw, f"loss along runs, N {format_count(N)}", **SMALL_PANEL))
    checks = check_forecasts(curves)
    caption = "Loss along runs. The last point is the final loss, after the cooldown if there is one."
    if any(c.schedule is None for c in curves):
        caption += " Some schedules are not recorded: forecasts of those runs assume a constant learning rate."
    table = [tables.tabulate_forecasts(checks)] if checks else []
    return [ReportSection("Loss curves", panels, caption, table, small=True)]


def _build_rung_sections(proxies: pd.DataFrame) -> list[ReportSection]:
    finite = proxies.loc[np.isfinite(proxies["loss"]), "loss"]
    if finite.empty or not {"rung", "run_id"} <= set(proxies):
        return []
    colours, ceiling = figures.assign_colours(proxies["N"]), float(finite.quantile(0.95)) * 1.05
    panels = []
    for N in figures.pick_few(list(colours), MAX_SIZES):
        draw = partial(figures.draw_rungs, runs=proxies, N=N, colour=colours[N], ceiling=ceiling)
        panels.append(draw_panel(draw, f"rungs, N {format_count(N)}", **SMALL_PANEL))
    caption = "One line per configuration, one point per rung. A cross marks a diverged run."
    return [ReportSection("Rungs and promotions", panels, caption, small=True)]


def _build_target_sections(targets: Sequence[TargetCurve], predicted: Recommendation | None) -> list[ReportSection]:
    if not targets:
        return []
    draw = partial(figures.draw_targets, targets=targets, recommendation=predicted)
    caption = (
        "Lines: validation loss on the constant-rate trunk. Star: the loss after the cooldown, which is what the law "
        "predicts (bar)."
    )
    figure = draw_panel(draw, "the target against its prediction", width=6.2, height=3.6)
    return [ReportSection("The target against its prediction", [figure], caption)]
