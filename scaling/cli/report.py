"""`scaling report`: draw what is known of a study or a table into an HTML file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.cli.recommend import add_prediction, format_footer, read_study_notes
from scaling.cli.shared import By, Flops, Params, Source, Tokens, Where, read_parts
from scaling.common.atomic import write_atomically
from scaling.common.cli import Uri, refusing
from scaling.common.logs import show_progress
from scaling.common.redact import redact_passwords
from scaling.runs.io import is_table_file

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from mlflow import MlflowClient

    from scaling.advice.recommendation import Recommendation
    from scaling.curves.backtest import RunCurve
    from scaling.report.figures import TargetCurve

# Steps that the bar of a report counts.
REPORT_STEPS = 10


@dataclass(frozen=True)
class ReportQuestion:
    """The target that a report answers for; all None for the study's own, or for none."""

    N: float | None = None
    D: float | None = None
    C: float | None = None

    @property
    def is_given(self) -> bool:
        """Whether a target was asked for on the command line."""
        return not (self.N is None and self.D is None and self.C is None)


@dataclass(frozen=True)
class StudyRecord:
    """What a study keeps for its report.

    Attributes:
        answer: Its recommendation.
        predicted: The recommendation with what was predicted before the target was trained.
        targets: The launched targets.
        warm_start: Figures on a warm start, by name.
        curves: The curves of its runs.
        best: The search's own answer, as `hpo best` shows it.
    """

    answer: Recommendation | None = None
    predicted: Recommendation | None = None
    targets: list[TargetCurve] = field(default_factory=list)
    warm_start: dict[str, Any] | None = None
    curves: list[RunCurve] = field(default_factory=list)
    best: dict[str, Any] | None = None


def report(
    source: Source,
    out: Annotated[
        Path | None, typer.Option("--out", help="default: studies/NAME/report.html, or FILE.html beside the file")
    ] = None,
    params: Params = None,
    tokens: Tokens = None,
    flops: Flops = None,
    where: Where = None,
    by: By = None,
    tracking_uri: Uri = None,
) -> None:
    """Draw everything that is known of a study or a table into one HTML file, with the answer for a target on top.

    The target is that of --params and --tokens, or --flops; for a study, by default that of its last
    `scaling recommend --target`. With --by, each value of the column gets a file of its own.

    Example: scaling report quickstart
    Example: scaling report runs.csv --params 7B --tokens 1.4T
    """
    from scaling.common.arrays import limit_to_one_thread

    question = ReportQuestion(params, tokens, flops)
    is_file = is_table_file(source)
    answers = []
    with (
        refusing(),
        limit_to_one_thread(),
        show_progress(f"drawing the report of {source}", steps=REPORT_STEPS) as advance,
    ):
        # The name of an experiment may lead elsewhere as a path.
        if not is_file and out is None and Path(source).name != source:
            raise ValueError(f"{source!r} is not the name of a folder in studies/: give --out")
        parts = read_parts(source, tracking_uri, where, by)
        paths = {value: choose_path(source, out, by, value, is_file=is_file) for value in parts}
        for value, runs in parts.items():
            title = Path(source).name if is_file else source
            title = ", ".join([title, *(where or []), *([] if by is None else [f"{by} = {value}"])])
            record = make_record(source, runs, question, tracking_uri, is_file=is_file, is_part=bool(where or by))
            write_page(paths[value], title, runs, record, advance)
            answers.append(record)
        if not is_file:
            keep_pages(source, list(paths.values()), tracking_uri)
    for value, record, path in zip(paths, answers, paths.values(), strict=True):
        if by is not None:
            typer.echo(f"{by} = {value}")
        print_record(record, path, None if is_file else source)
    if not is_file:
        print_places(source, tracking_uri)


def choose_path(source: str, out: Path | None, by: str | None, value: str, *, is_file: bool) -> Path:
    """Return the file of a page.

    Raises:
        ValueError: If its folder does not exist.
    """
    if out is None:
        out = Path(source).with_suffix(".html") if is_file else Path("studies") / source / "report.html"
        if not is_file:
            out.parent.mkdir(parents=True, exist_ok=True)
    if not out.parent.is_dir():
        raise ValueError(f"a report needs a folder that exists, got {out}: make {out.parent} first")
    if by is None:
        return out
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in value)
    return out.with_name(f"{out.stem}.{by}-{name}{out.suffix or '.html'}")


def make_record(
    source: str,
    runs: pd.DataFrame,
    question: ReportQuestion,
    tracking_uri: str | None,
    *,
    is_file: bool,
    is_part: bool,
) -> StudyRecord:
    """Return what a page shows beside the laws: the answer to the question, and what the study keeps.

    Args:
        source: A study or a file.
        runs: The rows of the page.
        question: The target that was asked for.
        tracking_uri: The MLflow store of a study.
        is_file: Whether the source is a file.
        is_part: Whether the rows are only some of the source's.
    """
    from scaling.advice.recommendation import Recommendation
    from scaling.advice.recommendation import recommend as compute_recommendation

    answer = None
    if question.is_given:
        answer = compute_recommendation(runs, N=question.N, D=question.D, C=question.C, next_run=True)
    if is_file or is_part:
        return StudyRecord(answer)
    from scaling.curves.backtest import read_study_curves
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import read_note

    client = connect(tracking_uri)
    parent = find_study_run(client, source)
    warm_start, curves = read_note(client, parent, "warm_start"), read_study_curves(client, runs)
    if answer is not None:
        return StudyRecord(answer, warm_start=warm_start, curves=curves)
    note = read_note(client, parent, "recommendation")
    targets = read_target_curves(client, runs, read_note(client, parent, "targets") or {})
    if note is None:
        return StudyRecord(None, None, targets, warm_start, curves)
    answer = Recommendation.from_dict(note)
    if targets:
        answer = replace(answer, measured={t.name: t.final_loss for t in targets})
    notes = read_study_notes(source, tracking_uri)
    answer = add_prediction(answer, notes)
    # What was predicted before the target ran: since then, laws may have been fitted again.
    predicted = answer
    if prediction := read_note(client, parent, "predicted"):
        low, high = prediction["loss_interval"]
        predicted = replace(
            answer, loss=float(prediction["loss"]), loss_interval=(low, high), mass=float(prediction["mass"])
        )
    return StudyRecord(answer, predicted, targets, warm_start, curves, notes.best)


def read_target_curves(client: MlflowClient, runs: pd.DataFrame, arms: dict[str, str]) -> list[TargetCurve]:
    """Return the curves of the target that was launched last.

    Args:
        client: The MLflow client.
        runs: The study's run table.
        arms: MLflow's run id of each arm, by its name.
    """
    from scaling.report.figures import TargetCurve
    from scaling.tracking.log import read_curve

    curves = []
    for arm, run_id in arms.items():
        tokens, loss = read_curve(client, run_id)
        end = runs[runs["run_id"] == run_id].iloc[0]
        curves.append(TargetCurve(arm, tokens, loss, float(end["D"]), float(end["loss"])))
    return curves


def write_page(path: Path, title: str, runs: pd.DataFrame, record: StudyRecord, advance: Callable[[str], None]) -> None:
    """Render a page and write it whole."""
    from scaling.report.html import render_report

    page = render_report(
        title,
        runs,
        recommendation=record.answer,
        predicted=record.predicted,
        targets=record.targets,
        warm_start=record.warm_start,
        curves=record.curves,
        advance=advance,
    )
    write_atomically(path, page)


def keep_pages(study: str, paths: list[Path], tracking_uri: str | None) -> None:
    """Keep the pages with the study in MLflow."""
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import log_file

    client = connect(tracking_uri)
    parent = find_study_run(client, study)
    for path in paths:
        log_file(client, parent, path)


def print_record(record: StudyRecord, path: Path, study: str | None) -> None:
    """Print the answer of a page and where it is."""
    if record.answer is not None:
        typer.echo(str(record.answer))
        typer.echo(format_footer([record.answer], study, record.best, explain=True), nl=False)
    for name, value in (record.warm_start or {}).items():
        # Intervals are shown together with their values.
        if "interval" not in name:
            typer.echo(f"{name}: {value}")
    typer.echo(f"\nreport     {path}" if record.answer is not None and study is not None else f"report: {path}")


def print_places(study: str, tracking_uri: str | None) -> None:
    """Print the commands that show the study's runs and trials."""
    from scaling.tracking.client import connect

    typer.echo(f"runs       mlflow ui --backend-store-uri {redact_passwords(connect(tracking_uri).tracking_uri)}")
    journal = Path("studies") / study / "study.journal"
    if journal.exists():
        typer.echo(f"trials     optuna-dashboard {journal}")
