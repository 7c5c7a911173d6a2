"""The runs behind `proxies grow --plan`: searches by `hpo`, then ladders on fresh seeds.

Everything is kept, so a second call trains only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from filelock import FileLock, Timeout

from proxies.growth.answer import GrowthAnswer, QuestionNote
from proxies.growth.decision import Ladders, decide
from proxies.growth.processes import limit_to_one_thread, run_hpo
from proxies.growth.question import ETA, Pair, Question
from proxies.growth.trainer import GrowthFamily, StartMethod
from scaling.common.atomic import write_atomically
from scaling.common.logs import configure_logging
from scaling.common.signals import interrupt_on_sigterm
from scaling.laws.compute import Fidelity

logger = logging.getLogger("muscale.proxies")

# Repeats from here on decide. Those that tuned the settings do not, as in `hpo confirm`.
FIRST_TEST_REPEAT = 1000
# The learning rate is searched from the family's divided by this factor to the family's times it.
LR_FACTOR = 4.0


class SearchRange(TypedDict):
    """The range of a searched setting, as a study file has it."""

    low: float
    high: float
    log: NotRequired[bool]


RANGES: dict[StartMethod, dict[str, SearchRange]] = {
    "scratch": {},
    "shrink-pad-perturb": {"shrink": {"low": 0.2, "high": 1.0}, "noise": {"low": 0.05, "high": 2.0, "log": True}},
    "duplicate": {"noise": {"low": 2.0**-7, "high": 2.0, "log": True}},
    "hyperclone": {"noise": {"low": 0.01, "high": 4.0, "log": True}},
}

# The searched settings of one start method by name: lr, and shrink and noise where it has them.
Settings = dict[str, float]


class LadderRow(TypedDict):
    """A line of ladders.jsonl: the end of one run."""

    # Hash of everything that the losses of a trunk depend on.
    run: str
    tokens: int
    # Nats per token; None if it diverged.
    loss: float | None
    seconds: float
    start: str
    # Widths of the base model and of the grown one.
    widths: list[int]
    repeat: int
    params: dict[str, Any]


# Rows by run and tokens.
LadderRows = Mapping[tuple[str, int], LadderRow]


@dataclass(frozen=True)
class LadderJob:
    """One trunk to be trained, with a cooldown at every run length.

    Attributes:
        trainer: What trains it.
        params: Its settings.
        tokens: The run lengths in tokens, ascending.
        repeat: Added to the family's seed.
        home: The question's folder.
    """

    trainer: GrowthFamily
    params: Mapping[str, Any]
    tokens: Sequence[int]
    repeat: int
    home: Path


def plan_growth(
    question: Question, *, workers: int = 1, count_base: bool = False, uri: str | None = None
) -> GrowthAnswer:
    """Train what is missing and decide whether a warm start is worth it.

    After a KeyboardInterrupt the same call continues where it stopped.

    Args:
        question: The question.
        workers: Processes that train at the same time, of one thread each.
        count_base: Whether the gain must also pay for the base model.
        uri: The MLflow store of the searches; default: $MLFLOW_TRACKING_URI or ./mlflow.db.

    Returns:
        The answer, which is also written to decision.json in `question.home`.

    Raises:
        ValueError: If another process works on this question, or training from scratch or every warm start diverges.
        RuntimeError: If a search or a training process fails.
    """
    question.home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(question.home / "growth.lock", timeout=0):
            settings = {start: search_settings(question, start, workers=workers, uri=uri) for start in question.starts}
            train_ladders(question, settings, workers)
    except Timeout as error:
        raise ValueError(
            f"needed {question.home} for this process alone, but another process uses it: wait until it ends"
        ) from error
    rows = read_rows(get_rows_path(question))
    answer = conclude(question, settings, rows, count_base=count_base)
    write_atomically(question.home / "decision.json", json.dumps(answer, indent=1) + "\n")
    return answer


def conclude(
    question: Question, settings: Mapping[StartMethod, Settings], rows: LadderRows, *, count_base: bool
) -> GrowthAnswer:
    """Decide from the rows of all ladders.

    Args:
        question: The question.
        settings: The settings that the searches found, by start method.
        rows: The rows of all ladders.
        count_base: Whether the gain must also pay for the base model.

    Returns:
        The decision, and what it was made of.
    """
    ladders = [collect_ladders(question, pair, settings, rows) for pair in question.pairs]
    decision = decide(
        ladders[0],
        real_width=question.real.target,
        at=question.at,
        base=question.base_cost,
        horizons=question.horizons,
        second=ladders[1] if len(ladders) > 1 else None,
        count_base=count_base,
    )
    lr = settings["scratch"]["lr"]
    chosen: StartMethod = next(s for s in question.starts if s == decision.arm)
    note: QuestionNote = question.model_dump(mode="json", exclude={"family"}) | {"id": question.id}  # type: ignore[assignment]
    return {
        "study": question.study,
        "use": decision.use,
        "method": decision.arm,
        "settings": settings[chosen],
        "decision": decision.json,
        "because": {
            "question": note,
            "base_cost": question.base_cost,
            "settings": {start: settings[start] for start in settings},
            "lr_octaves_from_scratch": {s: math.log2(params["lr"] / lr) for s, params in settings.items()},
            "studies": [get_study_path(question, start).stem for start in question.starts],
            "runs": len(rows),
            "seconds": sum(row["seconds"] for row in rows.values()),
            "rows": str(get_rows_path(question)),
        },
    }


def collect_ladders(
    question: Question, pair: Pair, settings: Mapping[StartMethod, Settings], rows: LadderRows
) -> Ladders:
    """Return the losses of one pair as arrays. A warm start that diverged is left out.

    Raises:
        ValueError: If training from scratch or every warm start diverged.
    """
    losses: dict[str, Any] = {}
    for start, params in settings.items():
        trainer, tokens = question.make_trainer(start, pair), sorted(question.compute_ladder(pair, start))
        runs = [hash_run(trainer, params, FIRST_TEST_REPEAT + r) for r in range(question.seeds)]
        by_seed = [[rows[run, D]["loss"] if (run, D) in rows else None for D in tokens] for run in runs]
        if any(loss is None for of_seed in by_seed for loss in of_seed):
            logger.warning(f"{start}, {pair}: diverged with {params}, so it is left out")
            continue
        losses[start] = np.array(by_seed)
    if "scratch" not in losses or len(losses) < 2:
        diverged = "scratch" if "scratch" not in losses else "every warm start"
        raise ValueError(f"pair {pair}: {diverged} diverged: set a lower lr and plan again")
    scratch = losses.pop("scratch")
    return Ladders(
        width=pair.target,
        scratch_at=question.list_lengths("scratch"),
        scratch=scratch,
        warm_at=question.list_lengths(question.starts[1]),
        warm=losses,
    )


# Searches


def get_study_path(question: Question, start: StartMethod) -> Path:
    """Return the study file of one search."""
    return question.home / f"{question.study}-growth-{question.id}-{start}.toml"


def format_study(question: Question, start: StartMethod) -> str:
    """Return the text of the study file of one search."""
    trainer = question.make_trainer(start, question.small)
    least, most = question.searched_tokens
    tables: dict[str, dict[str, Any]] = {
        "search": {"tokens": {"min": least, "max": most}, "eta": ETA, "budget": question.budget},
        "space": {
            "lr": {"low": trainer.lr / LR_FACTOR, "high": trainer.lr * LR_FACTOR, "log": True},
            **RANGES[start],
        },
        "trainer": {"use": "proxies:GrowthFamily", **trainer.model_dump(mode="json")},
    }
    lines = [f"seed = {question.family.seed}"]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{k} = {format_toml_value(v)}" for k, v in table.items() if v is not None)]
    return "\n".join(lines) + "\n"


def format_toml_value(value: Any) -> str:
    """Return a plain value as TOML, in which strings, numbers, booleans and lists are as in JSON."""
    if isinstance(value, Mapping):
        items = (f"{json.dumps(k)} = {format_toml_value(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(items) + "}"
    return json.dumps(value, ensure_ascii=False)


def search_settings(question: Question, start: StartMethod, *, workers: int, uri: str | None) -> Settings:
    """Search the best settings of one start method with `hpo`, or return those found before.

    Args:
        question: The question.
        start: The start method.
        workers: Local workers of the search.
        uri: The MLflow store of the search.
    """
    toml = get_study_path(question, start)
    best = toml.with_suffix(".best.json")
    if best.exists():
        settings: Settings = json.loads(best.read_text())
        return settings
    write_atomically(toml, format_study(question, start) + f"\n[workers]\ncount = {workers}\n")
    has_begun = (toml.with_suffix("") / "study.journal").exists()
    run_hpo("resume" if has_begun else "launch", toml, uri=uri)
    text = run_hpo("best", toml, "--json")
    settings = json.loads(text)
    write_atomically(best, text)
    logger.info(f"{start}: {', '.join(f'{name} {value:.4g}' for name, value in settings.items())}")
    return settings


# Ladders


def get_rows_path(question: Question) -> Path:
    """Return the file of all ladders' rows."""
    return question.home / "ladders.jsonl"


def hash_run(trainer: GrowthFamily, params: Mapping[str, Any], repeat: int) -> str:
    """Return a name of a trunk: a hash of everything that its losses depend on, but not of where its files are."""
    settings = trainer.model_dump(mode="json", exclude={"bases"})
    return hashlib.sha256(json.dumps([settings, dict(params), repeat], sort_keys=True).encode()).hexdigest()[:16]


def read_rows(path: Path) -> dict[tuple[str, int], LadderRow]:
    """Read the losses that are known.

    Args:
        path: A file with one row per line; it need not exist.

    Returns:
        Rows by run and tokens.

    Raises:
        ValueError: If a line is not a row. The message has its number.
    """
    rows: dict[tuple[str, int], LadderRow] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row: LadderRow = json.loads(line)
            if not isinstance(row["loss"], float | int | None):
                raise TypeError(f"loss {row['loss']!r}")
            rows[row["run"], row["tokens"]] = row
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"needed one run per line, got something else in line {number} of {path}: remove it"
            ) from error
    return rows


def train_ladders(question: Question, settings: Mapping[StartMethod, Settings], workers: int) -> None:
    """Train what is missing of every ladder of every seed.

    Args:
        question: The question.
        settings: The settings of every start method.
        workers: Processes that train at the same time, of one thread each.

    Raises:
        RuntimeError: If a process fails.
    """
    jobs = _list_missing_jobs(question, settings)
    if workers == 1 or len(jobs) < 2:
        with limit_to_one_thread():
            for job in jobs:
                train_ladder(job)
        return
    context = get_context("spawn")
    level = logger.getEffectiveLevel()
    running = [
        context.Process(target=_train_jobs, args=(jobs[i::workers], level)) for i in range(min(workers, len(jobs)))
    ]
    for process in running:
        process.start()
    try:
        for process in running:
            process.join()
    except KeyboardInterrupt:
        for process in running:
            process.terminate()
            process.join()
        raise
    if codes := [p.exitcode for p in running if p.exitcode]:
        if 130 in codes:
            raise KeyboardInterrupt
        raise RuntimeError(f"ladders ended with exit codes {codes}; their output is above")


def _list_missing_jobs(question: Question, settings: Mapping[StartMethod, Settings]) -> list[LadderJob]:
    rows = read_rows(get_rows_path(question))
    jobs = []
    for pair in question.pairs:
        for repeat in range(FIRST_TEST_REPEAT, FIRST_TEST_REPEAT + question.seeds):
            for start, params in settings.items():
                trainer, tokens = question.make_trainer(start, pair), sorted(question.compute_ladder(pair, start))
                known = [rows.get((hash_run(trainer, params, repeat), D)) for D in tokens]
                if not all(known) and not any(row and row["loss"] is None for row in known):
                    jobs.append(LadderJob(trainer, params, tokens, repeat, question.home))
    return jobs


def _train_jobs(jobs: Sequence[LadderJob], level: int) -> None:
    """Train ladders in a child process, which logs at the level of its parent."""
    configure_logging(level)
    try:
        with interrupt_on_sigterm(), limit_to_one_thread():
            for job in jobs:
                train_ladder(job)
    except KeyboardInterrupt:
        sys.exit(130)


def train_ladder(job: LadderJob) -> None:
    """Train one trunk with a cooldown at every run length that has no row yet.

    A row is added when a run ends. If it diverges, it is the last one.
    """
    trainer = job.trainer
    run, path = hash_run(trainer, job.params, job.repeat), job.home / "ladders.jsonl"
    folder = job.home / "ladders"
    folder.mkdir(exist_ok=True)
    known, before = read_rows(path), None
    for D in job.tokens:
        save, keep = folder / f"{run}-{D}.pt", folder / f"{run}-{D}.partial.pt"
        if (run, D) not in known:
            started, resume = time.perf_counter(), keep if keep.exists() else before
            size = Fidelity(trainer.sizes[0], D)
            *_, last = trainer(job.params, size, resume=resume, save=save, keep=keep, repeat=job.repeat)
            loss = None if last.diverged else last.loss
            append_row(
                path,
                {
                    "run": run,
                    "tokens": D,
                    "loss": loss,
                    "seconds": time.perf_counter() - started,
                    "start": trainer.start,
                    "widths": [trainer.source_width, trainer.widths[0]],
                    "repeat": job.repeat,
                    "params": dict(job.params),
                },
            )
            logger.info(
                f"{trainer.source_width} to {trainer.widths[0]}, {trainer.start}, seed {job.repeat}, {D:,} tokens: "
                f"{'diverged' if loss is None else f'{loss:.4f}'}"
            )
            if loss is None:
                return
        if trainer.resumable and save.exists():
            before = save


def append_row(path: Path, row: LadderRow) -> None:
    """Append a row in one write, so that the lines of two processes do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, (json.dumps(row, allow_nan=False) + "\n").encode())
    finally:
        os.close(descriptor)
