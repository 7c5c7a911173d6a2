"""The runs behind `proxies grow --plan`: searches by `hpo`, then ladders on fresh seeds. All kept: a second call goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from proxies.growth.decision import Ladders, decide
from proxies.growth.question import ETA, Pair, Question
from proxies.growth.trainer import GrowthFamily, Start
from scaling.common.cli import say
from scaling.common.signals import interrupt_on_sigterm
from scaling.laws.compute import Fidelity

TESTED = 1000  # repeats from here on decide: those that tuned do not (as in `hpo confirm`)
LR_FACTOR = 4.0  # searched on both sides of the family's
RANGES: dict[Start, dict[str, dict[str, Any]]] = {
    "scratch": {},
    "shrink-pad-perturb": {"shrink": {"low": 0.2, "high": 1.0}, "noise": {"low": 0.05, "high": 2.0, "log": True}},
    "duplicate": {"noise": {"low": 2.0**-7, "high": 2.0, "log": True}},
    "hyperclone": {"noise": {"low": 0.01, "high": 4.0, "log": True}},
}

Settings = dict[str, Any]
Row = dict[str, Any]


def plan_growth(
    question: Question, *, workers: int = 1, count_base: bool = False, uri: str | None = None
) -> dict[str, Any]:
    """Run what is missing and answer; the answer as plain values, which is also written to `question.home`/decision.json.

    ValueError when another process is at it, or scratch diverges. KeyboardInterrupt leaves everything to go on from.
    """
    question.home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(question.home / "growth.lock", timeout=0):
            settings = {start: search(question, start, workers=workers, uri=uri) for start in question.starts}
            climb_all(question, settings, workers)
    except Timeout as error:
        raise ValueError(
            f"needed {question.home} for itself, but another process is at it: wait for its end"
        ) from error
    rows = read_rows(rows_path(question))
    answer = conclude(question, settings, rows, count_base=count_base)
    write_whole(question.home / "decision.json", json.dumps(answer, indent=1) + "\n")
    return answer


def conclude(
    question: Question, settings: Mapping[Start, Settings], rows: Mapping[tuple[str, int], Row], *, count_base: bool
) -> dict[str, Any]:
    """The decision of the rows, with what it is made of."""
    ladders = [of_pair(question, pair, settings, rows) for pair in question.pairs]
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
    chosen: Start = next(s for s in question.starts if s == decision.arm)
    return {
        "study": question.study,
        "use": decision.use,
        "method": decision.arm,
        "settings": settings[chosen],
        "decision": decision.json,
        "because": {
            "question": question.model_dump(mode="json", exclude={"family"}) | {"id": question.id},
            "base_cost": question.base_cost,
            "settings": dict(settings),
            "lr_octaves_from_scratch": {s: math.log2(found["lr"] / lr) for s, found in settings.items()},
            "studies": [study_path(question, start).stem for start in question.starts],
            "runs": len(rows),
            "seconds": sum(row["seconds"] for row in rows.values()),
            "rows": str(rows_path(question)),
        },
    }


def of_pair(
    question: Question, pair: Pair, settings: Mapping[Start, Settings], rows: Mapping[tuple[str, int], Row]
) -> Ladders:
    """The rows of one pair as arrays. An arm that diverged is left out; ValueError when that is scratch, or all the others."""
    losses: dict[str, Any] = {}
    for start, found in settings.items():
        trainer, tokens = question.trainer(start, pair), sorted(question.ladder(pair, start))
        keys = [run_name(trainer, found, TESTED + r) for r in range(question.seeds)]
        got = [[rows[key, D]["loss"] if (key, D) in rows else None for D in tokens] for key in keys]
        if any(loss is None for row in got for loss in row):
            say(f"{start}, {pair}: diverged at {found}: left out")
            continue
        losses[start] = np.array(got)
    if "scratch" not in losses or len(losses) < 2:
        raise ValueError(
            f"pair {pair}: {'scratch' if 'scratch' not in losses else 'every warm start'} diverged: set a lower lr and plan again"
        )
    scratch = losses.pop("scratch")
    return Ladders(
        width=pair.target,
        scratch_at=question.lengths("scratch"),
        scratch=scratch,
        warm_at=question.lengths(question.starts[1]),
        warm=losses,
    )


# Searches


def study_path(question: Question, start: Start) -> Path:
    return question.home / f"{question.study}-growth-{question.id}-{start}.toml"


def study_text(question: Question, start: Start) -> str:
    """The study file of one search."""
    trainer = question.trainer(start, question.small)
    least, most = question.searched
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
        lines += ["", f"[{name}]", *(f"{k} = {toml_value(v)}" for k, v in table.items() if v is not None)]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A plain value as TOML; JSON has the same strings, numbers, booleans and lists."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    return json.dumps(value, ensure_ascii=False)


def search(question: Question, start: Start, *, workers: int, uri: str | None) -> Settings:
    """The settings that `hpo` finds for one way to start, asked only once."""
    toml = study_path(question, start)
    found = toml.with_suffix(".best.json")
    if found.exists():
        settings: Settings = json.loads(found.read_text())
        return settings
    write_whole(toml, study_text(question, start) + f"\n[workers]\ncount = {workers}\n")
    there = (toml.with_suffix("") / "study.journal").exists()
    hpo("resume" if there else "launch", toml, uri=uri)
    text = hpo("best", toml, "--json")
    settings = json.loads(text)
    write_whole(found, text)
    say(f"{start}: {settings}")
    return settings


def hpo(command: str, toml: Path, *options: str, uri: str | None = None) -> str:
    """Another command of the toolkit; its output. What it says on the way is seen. RuntimeError when it fails.

    uri: of MLflow. It goes by the environment: what is on a command line, every user of the machine can read.
    """
    words = [sys.executable, "-m", "hpo", command, str(toml), *options]
    environment = os.environ | ({"MLFLOW_TRACKING_URI": uri} if uri else {})
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        out, _ = process.communicate()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if process.returncode in (130, 143):
        raise KeyboardInterrupt
    if process.returncode:
        raise RuntimeError(f"`hpo {command} {toml}` ended with exit code {process.returncode}; what it said is above")
    return out


# Ladders


def rows_path(question: Question) -> Path:
    return question.home / "ladders.jsonl"


def run_name(trainer: GrowthFamily, params: Mapping[str, Any], repeat: int) -> str:
    """Names a trunk: everything that its losses depend on, but not where its files are."""
    said = trainer.model_dump(mode="json", exclude={"bases"})
    return hashlib.sha256(json.dumps([said, dict(params), repeat], sort_keys=True).encode()).hexdigest()[:16]


def read_rows(path: Path) -> dict[tuple[str, int], Row]:
    """Losses that are known, by run and tokens. ValueError names a line that is none."""
    rows = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
            if not isinstance(row["loss"], float | int | None):
                raise TypeError(f"loss {row['loss']!r}")
            rows[row["run"], row["tokens"]] = row
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"needed one run per line, got something else in line {number} of {path}: remove it"
            ) from error
    return rows


def climb_all(question: Question, settings: Mapping[Start, Settings], workers: int) -> None:
    """Every ladder of every seed, as far as it is missing, in so many processes of one thread."""
    rows = read_rows(rows_path(question))
    jobs = []
    for pair in question.pairs:
        for repeat in range(TESTED, TESTED + question.seeds):
            for start, params in settings.items():
                trainer, tokens = question.trainer(start, pair), sorted(question.ladder(pair, start))
                known = [rows.get((run_name(trainer, params, repeat), D)) for D in tokens]
                if not all(known) and not any(row and row["loss"] is None for row in known):
                    jobs.append((trainer, params, tokens, repeat, question.home))
    if workers == 1 or len(jobs) < 2:
        with one_thread():
            for job in jobs:
                climb(*job)
        return
    context = get_context("spawn")
    running = [context.Process(target=climb_each, args=(jobs[i::workers],)) for i in range(min(workers, len(jobs)))]
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
        raise RuntimeError(f"ladders ended with exit codes {codes}; what they said is above")


def climb_each(jobs: Sequence[tuple[GrowthFamily, Settings, list[int], int, Path]]) -> None:
    """What one process does."""
    try:
        with interrupt_on_sigterm(), one_thread():
            for job in jobs:
                climb(*job)
    except KeyboardInterrupt:
        sys.exit(130)


def climb(trainer: GrowthFamily, params: Mapping[str, Any], tokens: Sequence[int], repeat: int, home: Path) -> None:
    """One trunk with a cooldown at every rung that has no row yet; a row is added as its rung ends, the last one if it diverges."""
    name, path = run_name(trainer, params, repeat), home / "ladders.jsonl"
    folder = home / "ladders"
    folder.mkdir(exist_ok=True)
    known, before = read_rows(path), None
    for D in tokens:
        save, keep = folder / f"{name}-{D}.pt", folder / f"{name}-{D}.partial.pt"
        if (name, D) not in known:
            began, resume = time.perf_counter(), keep if keep.exists() else before
            size = Fidelity(trainer.sizes[0], D)
            *_, last = trainer(params, size, resume=resume, save=save, keep=keep, repeat=repeat)
            loss = None if last.diverged else last.loss
            add_row(
                path,
                {
                    "run": name,
                    "tokens": D,
                    "loss": loss,
                    "seconds": time.perf_counter() - began,
                    "start": trainer.start,
                    "widths": [trainer.source_width, trainer.widths[0]],
                    "repeat": repeat,
                    "params": dict(params),
                },
            )
            say(
                f"{trainer.source_width} to {trainer.widths[0]}, {trainer.start}, seed {repeat}, {D:,} tokens: "
                f"{'diverged' if loss is None else f'{loss:.4f}'}"
            )
            if loss is None:
                return
        if trainer.resumable and save.exists():
            before = save


def add_row(path: Path, row: Row) -> None:
    """One write, so that lines of two processes do not mix."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, (json.dumps(row, allow_nan=False) + "\n").encode())
    finally:
        os.close(handle)


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices are no faster with more, and two processes would get in each other's way."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
