"""The arms of a plan trained: one here, all of them as processes of their own, or as commands for other machines."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from proxies.launch.monitor import TAG, BandMonitor, Excursion, expected_of, in_words, score
from proxies.launch.plan import Arm, LaunchPlan, write_plan
from proxies.trainers.command import run_command
from scaling.common.cli import say
from scaling.common.measurement import Measurement
from scaling.common.redact import without_passwords
from scaling.tracking import recorder as recorder_module
from scaling.tracking import sender
from scaling.tracking.client import away, connect
from scaling.tracking.experiment import child_run, find_child, find_study_run, study_run
from scaling.tracking.log import read_curve, write_note

REPORT_SECONDS = 5.0
FOLDER = "records"  # of what MLflow has not yet, beside the plan


@dataclass(frozen=True)
class ArmResult:
    """An arm that has been trained to its end, kept beside its checkpoint: what is on disk is not trained again."""

    loss: float | None  # nats per token; None where it diverged
    tokens: int
    seconds: float
    left: Excursion | None  # where it first left its band

    @staticmethod
    def path(folder: Path, arm: Arm) -> Path:
        return folder / f"{arm}.json"

    @classmethod
    def read(cls, folder: Path, arm: Arm) -> ArmResult | None:
        path = cls.path(folder, arm)
        if not path.is_file():
            return None
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(
                f"needed how an arm ended, got something else in {path}: restore it, or remove it to train that arm again"
            ) from error

    def write(self, folder: Path, arm: Arm) -> None:
        beside = folder / f".{arm}.json.tmp"
        beside.write_text(json.dumps(asdict(self)) + "\n")
        beside.replace(self.path(folder, arm))


class TrackingUnavailable(RuntimeError):
    """MLflow did not answer when it was needed; nothing is lost."""


def train_arm(plan: LaunchPlan, arm: Arm, folder: Path, *, uri: str | None = None) -> float:
    """Train one arm to its end and record it (resumed when it was interrupted); its final loss, NaN when it diverged.

    Under torchrun this is one rank of the plan's engine; rank 0 records.
    """
    name = name_of(plan, arm)
    done = ArmResult.read(folder, arm)
    if done is not None:
        say(f"{name}: trained before, {'diverged' if done.loss is None else f'loss {done.loss:.4f}'}")
        return math.nan if done.loss is None else done.loss
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        points, rank, save = _points(plan, arm, folder, stack, uri)
        if rank:
            *_, last = points  # every rank makes them, since all train together
            return math.nan if last.diverged else last.loss
        recorder = recorder_module.Recorder(
            uri, plan.study, name, role="target", params=_params(plan, arm), folder=folder / FOLDER
        )
        with recorder as record:
            return _recorded(plan, arm, folder, points, record, save)


def _recorded(
    plan: LaunchPlan,
    arm: Arm,
    folder: Path,
    points: Iterator[Measurement],
    record: recorder_module.Recorder,
    save: Path | None,
) -> float:
    name, watch = name_of(plan, arm), BandMonitor(expected_of(plan, arm), plan.tokens)
    started, last, said = time.perf_counter(), None, 0.0
    for last in points:
        record.add(last)
        if left := watch.look(last):
            assert watch.band is not None
            say(in_words(name, left, watch.band.mass))
            if watch.first is left:
                record.tag(TAG, left.tag)
        took = time.perf_counter() - started
        if last.final or took - said > REPORT_SECONDS:
            said = took
            remaining = took * (plan.tokens - last.tokens) / max(last.tokens, 1)
            say(
                f"target, {arm}: {last.tokens:,} of {plan.tokens:,} tokens, loss {last.loss:.4f}"
                f"{' (annealed)' if last.final else ''}, {last.tokens / took:,.0f} tokens/s, left {int(remaining // 60)}:{int(remaining % 60):02d}"
            )
    if last is None or not last.final:
        raise RuntimeError(f"{name} ended without a final measurement")
    loss, seconds = math.nan if last.diverged else last.loss, time.perf_counter() - started
    record.result(rung=0, tokens=plan.tokens, loss=loss, seconds=seconds, checkpoint=save)
    record.finish()
    ArmResult(None if math.isnan(loss) else loss, plan.tokens, seconds, watch.first).write(folder, arm)
    return loss


def _points(
    plan: LaunchPlan, arm: Arm, folder: Path, stack: ExitStack, uri: str | None
) -> tuple[Iterator[Measurement], int, Path | None]:
    """The arm's measurements, this process's rank, and its checkpoint. What must be closed goes on the stack."""
    from proxies.growth.files import open_trained
    from proxies.growth.weights import grown
    from proxies.training.distributed import joined
    from proxies.training.loop import train

    if plan.config is None:
        return stack.enter_context(closing(_by_command(plan, arm, folder, uri))), 0, None
    ranks = stack.enter_context(joined(plan.engine))
    ending = ".pt" if plan.engine == "plain" else ""  # a file of one process, or a folder of shards
    save, keep = folder / f"{arm}{ending}", folder / f"{arm}.partial{ending}"
    init: Any = None
    resume = _state(folder, arm)
    if arm == "warm" and resume is None:
        if plan.warm is None:
            raise ValueError(f"the plan of study {plan.study!r} has no proxy to start from: launch with --arms scratch")
        w, trained = plan.warm, open_trained(plan.warm.checkpoint)
        init = grown(trained.weights, trained.config, plan.config, method=w.method, shrink=w.shrink, noise=w.noise)
    points = train(plan.config, plan.tokens, resume=resume, save=save, keep=keep, init=init, ranks=ranks)
    return stack.enter_context(closing(points)), ranks.rank, save


def _by_command(plan: LaunchPlan, arm: Arm, folder: Path, uri: str | None) -> Generator[Measurement, None, None]:
    """The plan's command at work. It may report to the arm's run in MLflow, which is made first for that; not while MLflow is away."""
    files = {"save": folder / f"{arm}.pt", "keep": folder / f"{arm}.partial.pt"}
    files |= {"resume": files["keep"]} if files["keep"].exists() else {}
    values = plan.values | {name: str(path.absolute()) for name, path in files.items()}
    environment = dict(plan.environment)
    if away(uri) is None:
        client = connect(uri)
        parent = study_run(client, plan.study)
        run = child_run(client, parent, name_of(plan, arm), role="target", params=_params(plan, arm))
        environment |= {"MLFLOW_RUN_ID": run, "MLFLOW_TRACKING_URI": client.tracking_uri}
    yield from run_command(plan.command or "", values, cwd=plan.cwd, environment=environment, log=folder / f"{arm}.log")


def _state(folder: Path, arm: Arm) -> Path | None:
    """What an earlier start left of the arm, whatever engine it had: where it was cut off, or else its trunk."""
    kept = [path for path in (folder / f"{arm}.partial.pt", folder / f"{arm}.partial") if path.exists()]
    kept = kept or [path for path in (folder / f"{arm}.pt", folder / arm) if path.exists()]
    return max(kept, key=lambda path: path.stat().st_mtime, default=None)


def _params(plan: LaunchPlan, arm: Arm) -> dict[str, Any]:
    from proxies.trainers.proxy_family import describe

    settings = describe(plan.config) if plan.config else {"command": plan.command, "N": plan.N, **plan.values}
    params = settings | {"tokens": plan.tokens, "arm": arm, "engine": plan.engine, "world": plan.world}
    if arm == "warm" and plan.warm:
        params |= {f"warm.{k}": v for k, v in plan.warm.model_dump(mode="json", exclude={"because"}).items()}
    return params


def name_of(plan: LaunchPlan, arm: Arm) -> str:
    """The arm's name in the record."""
    return f"target-{arm}-{plan.id}"


def commands(plan: LaunchPlan, path: Path, arm: Arm, *, uri: str | None = None) -> list[list[str]]:
    """What trains one arm of the plan in this file: one command for each node, the same on all of them.

    A URI with a password is left to the environment: what is on a command line, every user of the machine can read.
    """
    words = ["-m", "proxies", "launch", str(path), "--only", arm]
    words += ["--tracking-uri", uri] if uri and without_passwords(uri) == uri else []
    if plan.world == 1 and plan.engine == "plain":
        return [[sys.executable, *words]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(plan.ranks)]
    torchrun += ["--max-restarts", str(plan.max_restarts)]
    if plan.nodes == 1:
        torchrun.append("--standalone")
    else:
        torchrun += ["--nnodes", str(plan.nodes), "--rdzv-backend", "c10d", "--rdzv-id", f"{plan.id}-{arm}"]
        torchrun = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", *torchrun, "--rdzv-endpoint", "HOST:PORT"]
    return [[*torchrun, *words]] * plan.nodes


def shown(plan: LaunchPlan, path: Path, arms: Sequence[Arm], *, uri: str | None = None) -> str:
    """The commands as a shell takes them, with what to fill in."""
    lines = []
    for arm in arms:
        for node, words in enumerate(commands(plan, path.absolute(), arm, uri=uri)):
            lines += [f"# {arm}, node {node} of {plan.nodes}", shlex.join(words)]
    if uri and without_passwords(uri) != uri:
        lines.insert(
            0, f"# first, on each node, with its password: export MLFLOW_TRACKING_URI={without_passwords(uri)}"
        )
    if plan.nodes > 1:
        lines.insert(
            0,
            "# HOST:PORT: the first node and a free port of it, the same on all; the plan's folder: on a disk that all nodes share",
        )
    return "\n".join(
        [
            *lines,
            f"# after the last: proxies launch {shlex.quote(str(path.absolute()))}   (scores, trains nothing again)",
        ]
    )


def launch(
    plan: LaunchPlan, path: Path, *, arms: Sequence[Arm] | None = None, uri: str | None = None
) -> dict[str, Any]:
    """Train the arms (beside each other on a CPU with cores to spare, else one after the other), then score them.

    path: where the plan is written; checkpoints and records go beside it. RuntimeError when an arm failed, Away when only MLflow
    is missing.
    """
    folder = path.parent
    write_plan(plan, path)
    wanted = list(arms or plan.arms)
    left = [
        arm for arm in wanted if ArmResult.read(folder, arm) is None and not _recorded_elsewhere(plan, arm, folder, uri)
    ]
    cores = os.cpu_count() or 1
    at_once = max(1, len(left)) if not _has_gpu() and cores >= len(left) * plan.ranks else 1
    threads = max(1, cores // (at_once * plan.ranks))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if uri:
        environment["MLFLOW_TRACKING_URI"] = uri
    for i in range(0, len(left), at_once):
        some = [commands(plan, path, arm, uri=uri)[0] for arm in left[i : i + at_once]]
        running = [subprocess.Popen(words, env=environment) for words in some]
        try:
            codes = [p.wait() for p in running]
        except KeyboardInterrupt:
            for p in running:
                p.terminate()  # after Ctrl-C they know already, after SIGTERM not; either way they save where they are
            for p in running:
                p.wait()
            raise
        if any(codes):
            raise RuntimeError(
                f"an arm of {path} ended with exit codes {codes}; mend the cause and launch again: it resumes"
            )
    return scored(plan, folder, wanted, uri=uri)


def scored(plan: LaunchPlan, folder: Path, arms: Sequence[Arm], *, uri: str | None = None) -> dict[str, Any]:
    """Send what MLflow has not yet, score the arms, keep that on the study's run as the note `warm_start`; Away without MLflow."""
    waiting = sender.send(folder / FOLDER, uri) if (folder / FOLDER).is_dir() else 0
    if problem := away(uri):
        raise TrackingUnavailable(f"MLflow does not answer ({problem})")
    if waiting:
        raise TrackingUnavailable(f"{waiting} records are not in MLflow yet")
    client = connect(uri)
    parent = find_study_run(client, plan.study)
    runs = {arm: find_child(client, parent, name_of(plan, arm)) for arm in arms}
    ended = {arm: ArmResult.read(folder, arm) for arm in arms}
    losses = {arm: _loss(ended[arm], run.data.metrics) for arm, run in runs.items()}
    curves = {arm: read_curve(client, run.info.run_id) for arm, run in runs.items()}
    first = {arm: end.left if end else None for arm, end in ended.items()}
    outcome = score(plan, losses, curves, first)
    write_note(client, parent, "warm_start", outcome)
    write_note(client, parent, "targets", {arm: run.info.run_id for arm, run in runs.items()})
    predicted = {k: plan.because[k] for k in ("loss", "loss_interval", "mass")}
    write_note(client, parent, "predicted", predicted)
    return outcome


def _loss(ended: ArmResult | None, metrics: Mapping[str, float]) -> float:
    if ended is None:
        return float(metrics["rung_0/loss"])
    return math.nan if ended.loss is None else ended.loss


def _recorded_elsewhere(plan: LaunchPlan, arm: Arm, folder: Path, uri: str | None) -> bool:
    """Whether MLflow has the end of this very arm, trained in another folder or before ends were kept beside checkpoints."""
    if away(uri):
        return False
    client = connect(uri)
    if client.get_experiment_by_name(plan.study) is None:
        return False
    run = find_child(client, find_study_run(client, plan.study), name_of(plan, arm))
    if run is None or "rung_0/tokens" not in run.data.metrics:
        return False
    say(f"{name_of(plan, arm)}: trained before, loss {run.data.metrics['rung_0/loss']:.4f}")
    return True


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
