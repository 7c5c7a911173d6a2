"""`scaling recommend`: recommend settings for a larger run and predict its loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scaling.cli.shared import By, Flops, Params, Source, Tokens, Where, parse_count, read_parts, store_answer
from scaling.common.cli import Json, Uri, refusing
from scaling.common.json_text import dump_json
from scaling.common.logs import show_progress
from scaling.runs.io import is_table_file

if TYPE_CHECKING:
    from scaling.advice.answer import PredictionNote, Recommendation


def recommend(
    source: Source,
    target: Annotated[bool, typer.Option("--target", help="recommend for the target in the study's file")] = False,
    params: Params = None,
    tokens: Tokens = None,
    flops: Flops = None,
    mass: Annotated[float, typer.Option(min=0.01, max=0.99, help="the probability that each interval holds")] = 0.9,
    explain: Annotated[
        bool, typer.Option("--explain", help="show every warning, the laws and what to run next")
    ] = False,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="a published law to compare with: step-law, deepseek, ..., all; may be repeated"),
    ] = None,
    next_run: Annotated[
        bool | None,
        typer.Option("--next/--no-next", help="choose the run that would narrow it most; default: with --explain"),
    ] = None,
    at_most: Annotated[
        float | None,
        typer.Option(
            parser=parse_count,
            metavar="C",
            help="most FLOPs of that run; default 3 x the largest, but at most a tenth of the target",
        ),
    ] = None,
    where: Where = None,
    by: By = None,
    tracking_uri: Uri = None,
    as_json: Json = False,
) -> None:
    """Recommend learning rate and batch for a larger run and predict its loss, with intervals and warnings.

    This is what the laws say at the target. For a search, `hpo best` is its own answer from what it measured.
    Exit code 3: do not trust the recommendation.

    Example: scaling recommend quickstart --target
    Example: scaling recommend runs.csv --params 7B --tokens 1.4T --explain --beside step-law
    Example: scaling recommend runs.csv --flops 1e21 --json
    """
    from scaling.advice.recommendation import recommend as compute_recommendation
    from scaling.common.arrays import limit_to_one_thread
    from scaling.fitting.loss_law import FitError

    with refusing(), show_progress(f"fitting laws to {source}", quiet=as_json), limit_to_one_thread():
        is_file = is_table_file(source)
        if target and is_file:
            raise ValueError(f"--target needs a study, got the file {source}: give --params and --tokens, or --flops")
        parts = read_parts(source, tracking_uri, where, by)
        notes = StudyNotes() if is_file else read_study_notes(source, tracking_uri)
        if target:
            if notes.target is None:
                raise ValueError(f"study {source!r} has no [target]: give --params and --tokens, or --flops")
            params, tokens = notes.target["N"], notes.target["D"]
        shows_next = explain or next_run is True or at_most is not None
        answers: dict[str, Recommendation | str] = {}
        for value, runs in parts.items():
            try:
                answer = compute_recommendation(
                    runs,
                    N=params,
                    D=tokens,
                    C=flops,
                    mass=mass,
                    space=notes.space,
                    beside=beside or [],
                    next_run=next_run is not False and (shows_next or as_json or target),
                    at_most=at_most,
                )
                answers[value] = add_prediction(answer, notes)
            except FitError as error:
                answers[value] = str(error)
    if target and by is None and not where and not isinstance(answers[""], str):
        store_answer(source, tracking_uri, "recommendation", answers[""].to_dict())
    if as_json:
        plain = {value: to_json_values(answer) for value, answer in answers.items()}
        typer.echo(dump_json(plain[""] if by is None else {"by": by, "parts": plain}))
    else:
        texts = {value: format_answer(answer, explain, shows_next) for value, answer in answers.items()}
        titles = {value: f"{by} = {value}" for value in texts}
        shown = [
            text if by is None else f"{titles[value]}\n{'-' * len(titles[value])}\n{text}\n"
            for value, text in texts.items()
        ]
        typer.echo("\n".join(shown))
        given = [answer for answer in answers.values() if not isinstance(answer, str)]
        typer.echo(format_footer(given, None if is_file else source, notes.best, explain=explain), nl=False)
    if not all(not isinstance(answer, str) and answer.trustworthy for answer in answers.values()):
        raise typer.Exit(3)


@dataclass(frozen=True)
class StudyNotes:
    """What a study keeps of its search and its target; each is None if it keeps nothing of that kind.

    Attributes:
        space: The searched range of lr and batch_tokens.
        target: N and D of the target in the study file.
        predicted: What was predicted of a target before it was trained.
        best: The search's own answer, as `hpo best` shows it.
    """

    space: dict[str, Any] | None = None
    target: dict[str, Any] | None = None
    predicted: dict[str, Any] | None = None
    best: dict[str, Any] | None = None


def read_study_notes(study: str, tracking_uri: str | None) -> StudyNotes:
    """Read what a study keeps of its search and its target."""
    from scaling.tracking.client import connect
    from scaling.tracking.experiment import find_study_run
    from scaling.tracking.log import read_note

    client = connect(tracking_uri)
    parent = find_study_run(client, study)
    return StudyNotes(*(read_note(client, parent, name) for name in ("space", "target", "predicted", "best")))


def add_prediction(answer: Recommendation, notes: StudyNotes) -> Recommendation:
    """Return the recommendation with what was predicted of this target before it was trained, if it was."""
    note = notes.predicted
    if note is None or not answer.refit:
        return answer
    # Notes of older versions do not name the target, which then is that of the study file.
    size = note if {"N", "D"} <= note.keys() else notes.target
    if size is None or (float(size["N"]), float(size["D"])) != (answer.N, answer.D):
        return answer
    prediction: PredictionNote = {
        "loss": float(note["loss"]),
        "loss_interval": [float(v) for v in note["loss_interval"]],
        "mass": float(note["mass"]),
    }
    return replace(answer, prediction=prediction)


def to_json_values(answer: Recommendation | str) -> dict[str, Any]:
    """Return a recommendation, or why there is none, as plain JSON values."""
    return {"trustworthy": False, "reason": answer} if isinstance(answer, str) else answer.to_dict()


def format_answer(answer: Recommendation | str, explain: bool, shows_next: bool) -> str:
    """Return a recommendation, or why there is none, as text."""
    from scaling.advice.answer import UNTRUSTED, wrap

    if isinstance(answer, str):
        return wrap(f"{UNTRUSTED}: there is no recommendation: {answer}", 0)
    if explain:
        return answer.explain()
    # Published laws are there only if they were asked for.
    shown = answer if shows_next else replace(answer, next_run=None)
    return "\n".join([str(answer), *shown.format_additions()])


def format_footer(
    answers: list[Recommendation], study: str | None, best: dict[str, Any] | None, *, explain: bool
) -> str:
    """Return what else can be asked, and what the search itself answers, with an empty line before it.

    Args:
        answers: The recommendations above.
        study: The study's name; None for a file.
        best: The search's own answer.
        explain: Whether the recommendations were shown in full.
    """
    from scaling.advice.answer import choose_caveats, wrap

    if not answers:
        return ""
    lines = []
    if not explain:
        more = max(len(answer.flags) - len(choose_caveats(answer.flags)) for answer in answers)
        remarks = f"{more} more remarks, " if more > 1 else ""
        lines.append(f"--explain shows {remarks}the laws, their runs and what to run next.")
    if study is not None:
        lines.append(
            f"This is the law at the target; `hpo best {study}` shows the search's own answer."
            + compare_with_search(answers[0], best or {})
        )
    return "".join(f"\n{wrap(line, 0)}" for line in lines) + "\n" if lines else ""


def compare_with_search(answer: Recommendation, best: dict[str, Any]) -> str:
    """Return in a sentence which of the search's settings lie outside the law's intervals; empty if none does."""
    from scaling.advice.answer import format_rate, format_tokens

    batch = best.get("batch_tokens")
    if batch is None and answer.seq_len is not None and "batch_seqs" in best:
        batch = answer.seq_len * best["batch_seqs"]
    outside = []
    if "lr" in best and answer.lr_interval is not None:
        low, high = answer.lr_interval
        outside += [] if low <= best["lr"] <= high else [f"learning rate {format_rate(best['lr'])}"]
    if batch is not None and answer.batch_interval is not None:
        low, high = answer.batch_interval
        outside += [] if low <= batch <= high else [f"batch {format_tokens(batch)}"]
    if not outside:
        return ""
    return f" Its {' and '.join(outside)} lie outside the law's intervals: try both before the target."
