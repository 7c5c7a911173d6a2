"""Train the arms of a plan: one in this process, all as child processes, or as commands for other machines."""

from __future__ import annotations

import logging
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from proxies.growth.processes import get_verbosity_options
from proxies.launch.monitor import (
    EXCURSION_TAG,
    ArmScores,
    BandMonitor,
    Excursion,
    format_excursion,
    predict_band,
    score_arms,
)
from proxies.launch.plan import Arm, LaunchPlan, write_plan
from proxies.trainers.command import run_command
from scaling.common.atomic import write_atomically
from scaling.common.json_text import dump_json
from scaling.common.measurement import Measurement
from scaling.common.redact import redact_passwords
from scaling.tracking.client import connect, describe_outage
from scaling.tracking.experiment import find_child, find_study_run
from scaling.tracking.log import read_curve, write_note
from scaling.tracking.recorder import Recorder
from scaling.tracking.sender import send_spooled_records

if TYPE_CHECKING:
    from torch import Tensor

    from proxies.config.proxy import ProxyConfig

logger = logging.getLogger("muscale.proxies")

# Seconds between two lines of progress.
REPORT_SECONDS = 5.0
# Folder beside the plan, with the records that are not in MLflow yet.
RECORDS_FOLDER = "records"


@dataclass(frozen=True)
class ArmResult:
    """The result of an arm, kept beside its checkpoint so that the arm is not trained again.

    Attributes:
        loss: Final loss, nats per token; None if it diverged.
        tokens: Training tokens, cooldown included.
        seconds: Training time.
        left: Where the arm first left its band, if it did.
    """

    loss: float | None
    tokens: int
    seconds: float
    left: Excursion | None

    @staticmethod
    def get_path(folder: Path, arm: Arm) -> Path:
        """Return the file of an arm's result."""
        return folder / f"{arm}.json"

    @classmethod
    def read(cls, folder: Path, arm: Arm) -> ArmResult | None:
        """Return the result of an arm, or None if it has not ended; ValueError if its file cannot be read."""
        path = cls.get_path(folder, arm)
        if not path.is_file():
            return None
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(
                f"needed the result of an arm, got something else in {path}: restore it, or remove it to train that "
                "arm again"
            ) from error

    def write(self, folder: Path, arm: Arm) -> None:
        """Write the result of an arm as a whole."""
        write_atomically(self.get_path(folder, arm), dump_json(asdict(self)) + "\n")


class TrackingUnavailable(RuntimeError):
    """MLflow did not answer when it was needed. Nothing is lost."""


def train_arm(plan: LaunchPlan, arm: Arm, folder: Path, *, uri: str | None = None) -> float:
    """Train one arm to its end and record it. An interrupted arm is resumed.

    Under torchrun this process is one rank of the plan's engine, and rank 0 records.

    Args:
        plan: The plan.
        arm: The arm to train.
        folder: Where checkpoints, records and the result go.
        uri: The MLflow store; default: $MLFLOW_TRACKING_URI or ./mlflow.db.

    Returns:
        The final loss in nats per token, NaN if it diverged.
    """
    name = format_run_name(plan, arm)
    result = ArmResult.read(folder, arm)
    if result is not None:
        logger.info(f"{name}: already trained, {'diverged' if result.loss is None else f'loss {result.loss:.4f}'}")
        return math.nan if result.loss is None else result.loss
    folder.mkdir(parents=True, exist_ok=True)
    if plan.config is None:
        with (
            _create_recorder(plan, arm, folder, uri) as record,
            closing(_train_by_command(plan, arm, folder, record)) as points,
        ):
            return _record_points(plan, arm, folder, points, record, None)
    with ExitStack() as stack:
        own_points, rank, save = _open_points(plan, plan.config, arm, folder, stack)
        if rank:
            # Every rank has to consume the measurements, because all of them train together.
            *_, last = own_points
            return math.nan if last.diverged else last.loss
        with _create_recorder(plan, arm, folder, uri) as record:
            return _record_points(plan, arm, folder, own_points, record, save)


def _create_recorder(plan: LaunchPlan, arm: Arm, folder: Path, uri: str | None) -> Recorder:
    name, params = format_run_name(plan, arm), _collect_params(plan, arm)
    return Recorder(uri, plan.study, name, role="target", params=params, folder=folder / RECORDS_FOLDER)


def _record_points(
    plan: LaunchPlan,
    arm: Arm,
    folder: Path,
    points: Iterator[Measurement],
    record: Recorder,
    save: Path | None,
) -> float:
    """Record and monitor an arm's measurements until its end, write its result, and return the final loss."""
    name, monitor = format_run_name(plan, arm), BandMonitor(predict_band(plan, arm), plan.tokens)
    started, last, reported = time.perf_counter(), None, 0.0
    for last in points:
        record.add(last)
        if excursion := monitor.check(last):
            assert monitor.band is not None
            logger.warning(format_excursion(name, excursion, monitor.band.mass))
            if monitor.first is excursion:
                record.set_tag(EXCURSION_TAG, excursion.tag)
        elapsed = time.perf_counter() - started
        if last.final or elapsed - reported > REPORT_SECONDS:
            reported = elapsed
            remaining = elapsed * (plan.tokens - last.tokens) / max(last.tokens, 1)
            logger.info(
                f"target, {arm}: {last.tokens:,} of {plan.tokens:,} tokens, loss {last.loss:.4f}"
                f"{' (annealed)' if last.final else ''}, {last.tokens / elapsed:,.0f} tokens/s, "
                f"{int(remaining // 60)}:{int(remaining % 60):02d} left"
            )
    if last is None or not last.final:
        raise RuntimeError(f"{name} ended without a final measurement")
    loss, seconds = math.nan if last.diverged else last.loss, time.perf_counter() - started
    record.log_result(rung=0, tokens=plan.tokens, loss=loss, seconds=seconds, checkpoint=save)
    record.finish()
    ArmResult(None if math.isnan(loss) else loss, plan.tokens, seconds, monitor.first).write(folder, arm)
    return loss


def _open_points(
    plan: LaunchPlan, config: ProxyConfig, arm: Arm, folder: Path, stack: ExitStack
) -> tuple[Iterator[Measurement], int, Path | None]:
    """Return the arm's measurements, this process's rank and its checkpoint; the stack closes what has to be closed."""
    from proxies.growth.files import open_trained
    from proxies.growth.weights import grow_tensors
    from proxies.training.distributed import join_ranks
    from proxies.training.loop import train

    ranks = stack.enter_context(join_ranks(plan.engine))
    # One process writes a file, several write a folder of shards.
    suffix = ".pt" if plan.engine == "plain" else ""
    save, keep = folder / f"{arm}{suffix}", folder / f"{arm}.partial{suffix}"
    init: Iterable[tuple[str, Tensor]] | None = None
    resume = _find_state(folder, arm)
    if arm == "warm" and resume is None:
        if plan.warm is None:
            raise ValueError(f"the plan of study {plan.study!r} has no proxy to start from: launch with --arms scratch")
        warm, trained = plan.warm, open_trained(plan.warm.checkpoint)
        init = grow_tensors(
            trained.weights, trained.config, config, method=warm.method, shrink=warm.shrink, noise=warm.noise
        )
    points = train(config, plan.tokens, resume=resume, save=save, keep=keep, init=init, ranks=ranks)
    return stack.enter_context(closing(points)), ranks.rank, save


def _train_by_command(plan: LaunchPlan, arm: Arm, folder: Path, record: Recorder) -> Generator[Measurement, None, None]:
    """Run the plan's command and yield its measurements.

    The command may report to the arm's run in MLflow, whose id it is told unless MLflow is away.
    """
    files = {"save": folder / f"{arm}.pt", "keep": folder / f"{arm}.partial.pt"}
    files |= {"resume": files["keep"]} if files["keep"].exists() else {}
    values = plan.values | {name: str(path.absolute()) for name, path in files.items()}
    environment = dict(plan.environment)
    # Only the recorder creates runs. A second client beside it would create this one twice, or fail on its parameters.
    if run := record.wait_for_run_id():
        environment |= {"MLFLOW_RUN_ID": run, "MLFLOW_TRACKING_URI": record.uri}
    yield from run_command(plan.command or "", values, cwd=plan.cwd, environment=environment, log=folder / f"{arm}.log")


def _find_state(folder: Path, arm: Arm) -> Path | None:
    """Return what an earlier start with any engine left of the arm: an interrupted state, else its trunk, else None."""
    kept = [path for path in (folder / f"{arm}.partial.pt", folder / f"{arm}.partial") if path.exists()]
    kept = kept or [path for path in (folder / f"{arm}.pt", folder / arm) if path.exists()]
    return max(kept, key=lambda path: path.stat().st_mtime, default=None)


def _collect_params(plan: LaunchPlan, arm: Arm) -> dict[str, Any]:
    """Return the MLflow parameters of an arm's run."""
    from proxies.trainers.proxy_family import describe

    settings = describe(plan.config) if plan.config else {"command": plan.command, "N": plan.N, **plan.values}
    params = settings | {"tokens": plan.tokens, "arm": arm, "engine": plan.engine, "world": plan.world}
    if arm == "warm" and plan.warm:
        params |= {f"warm.{k}": v for k, v in plan.warm.model_dump(mode="json", exclude={"because"}).items()}
    return params


def format_run_name(plan: LaunchPlan, arm: Arm) -> str:
    """Return the name of an arm's run in MLflow."""
    return f"target-{arm}-{plan.id}"


def build_commands(plan: LaunchPlan, path: Path, arm: Arm, *, uri: str | None = None) -> list[list[str]]:
    """Build the commands that train one arm, one for each node, the same on all of them.

    Args:
        plan: The plan.
        path: The plan's file.
        arm: The arm to train.
        uri: The MLflow store. A URI with a password is left to the environment, because every user of a machine can
            read its command lines.

    Returns:
        The arguments of each node's command. The address of the first node is to be filled in where there are several.
    """
    words = ["-m", "proxies", "launch", str(path), "--only", arm]
    words += ["--tracking-uri", uri] if uri and redact_passwords(uri) == uri else []
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


def format_commands(plan: LaunchPlan, path: Path, arms: Sequence[Arm], *, uri: str | None = None) -> str:
    """Format the commands of all nodes for a shell, with comments on what to fill in."""
    lines = []
    for arm in arms:
        for node, words in enumerate(build_commands(plan, path.absolute(), arm, uri=uri)):
            lines += [f"# {arm}, node {node} of {plan.nodes}", shlex.join(words)]
    if uri and redact_passwords(uri) != uri:
        lines.insert(0, f"# first, on each node, with its password: export MLFLOW_TRACKING_URI={redact_passwords(uri)}")
    if plan.nodes > 1:
        lines.insert(
            0,
            "# HOST:PORT is the first node and a free port on it, the same on all nodes; "
            "put the plan's folder on a disk that all nodes share",
        )
    score = f"# after the last: proxies launch {shlex.quote(str(path.absolute()))}   (scores, trains nothing again)"
    return "\n".join([*lines, score])


def launch(plan: LaunchPlan, path: Path, *, arms: Sequence[Arm] | None = None, uri: str | None = None) -> ArmScores:
    """Train the arms in child processes, then score them.

    The arms are trained at the same time on a CPU with enough cores, else one after the other. The child processes log
    at the level at which this one does.

    Args:
        plan: The plan.
        path: Where the plan is written. Checkpoints and records go beside it.
        arms: The arms to train; default: all that the plan has.
        uri: The MLflow store; default: $MLFLOW_TRACKING_URI or ./mlflow.db.

    Returns:
        The scores, see `score_arms`.

    Raises:
        RuntimeError: If an arm failed.
        TrackingUnavailable: If the arms were trained, but MLflow does not answer.
    """
    folder = path.parent
    write_plan(plan, path)
    chosen = list(arms or plan.arms)
    waiting = [
        arm
        for arm in chosen
        if ArmResult.read(folder, arm) is None and not _is_recorded_elsewhere(plan, arm, folder, uri)
    ]
    cores = os.cpu_count() or 1
    at_once = max(1, len(waiting)) if not _has_gpu() and cores >= len(waiting) * plan.ranks else 1
    threads = max(1, cores // (at_once * plan.ranks))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if uri:
        environment["MLFLOW_TRACKING_URI"] = uri
    verbosity = get_verbosity_options()
    for i in range(0, len(waiting), at_once):
        batch = [build_commands(plan, path, arm, uri=uri)[0] + verbosity for arm in waiting[i : i + at_once]]
        running = [subprocess.Popen(words, env=environment) for words in batch]
        try:
            codes = [process.wait() for process in running]
        except KeyboardInterrupt:
            # Ctrl-C has reached them already, SIGTERM has not. Either way they save their state before they end.
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            raise
        if any(codes):
            raise RuntimeError(
                f"an arm of {path} ended with exit codes {codes}; fix the cause and launch again: it resumes"
            )
    return send_and_score(plan, folder, chosen, uri=uri)


def send_and_score(plan: LaunchPlan, folder: Path, arms: Sequence[Arm], *, uri: str | None = None) -> ArmScores:
    """Send the records that are not in MLflow yet, then score the arms.

    The scores are kept on the study's run as the note `warm_start`.

    Args:
        plan: The plan.
        folder: The folder of the plan, with the arms' results and records.
        arms: The arms to score. All of them have ended.
        uri: The MLflow store; default: $MLFLOW_TRACKING_URI or ./mlflow.db.

    Returns:
        The scores, see `score_arms`.

    Raises:
        TrackingUnavailable: If MLflow does not answer, or has not taken all records.
    """
    unsent = send_spooled_records(folder / RECORDS_FOLDER, uri) if (folder / RECORDS_FOLDER).is_dir() else 0
    if problem := describe_outage(uri):
        raise TrackingUnavailable(f"MLflow does not answer ({problem})")
    if unsent:
        raise TrackingUnavailable(f"{unsent} records are not in MLflow yet")
    client = connect(uri)
    parent = find_study_run(client, plan.study)
    runs = {arm: find_child(client, parent, format_run_name(plan, arm)) for arm in arms}
    results = {arm: ArmResult.read(folder, arm) for arm in arms}
    losses = {arm: _read_loss(results[arm], run.data.metrics) for arm, run in runs.items()}
    curves = {arm: read_curve(client, run.info.run_id) for arm, run in runs.items()}
    excursions = {arm: result.left if result else None for arm, result in results.items()}
    outcome = score_arms(plan, losses, curves, excursions)
    write_note(client, parent, "warm_start", outcome)
    write_note(client, parent, "targets", {arm: run.info.run_id for arm, run in runs.items()})
    because = plan.because
    predicted = {
        "N": because["N"],
        "D": because["D"],
        "loss": because["loss"],
        "loss_interval": because["loss_interval"],
        "mass": because["mass"],
    }
    write_note(client, parent, "predicted", predicted)
    return outcome


def _read_loss(result: ArmResult | None, metrics: Mapping[str, float]) -> float:
    if result is None:
        return float(metrics["rung_0/loss"])
    return math.nan if result.loss is None else result.loss


def _is_recorded_elsewhere(plan: LaunchPlan, arm: Arm, folder: Path, uri: str | None) -> bool:
    """Return whether MLflow has the end of this arm without a result on disk.

    It was then trained in another folder, or by a version that kept no results beside checkpoints.
    """
    if describe_outage(uri):
        return False
    client = connect(uri)
    if client.get_experiment_by_name(plan.study) is None:
        return False
    run = find_child(client, find_study_run(client, plan.study), format_run_name(plan, arm))
    if run is None or "rung_0/tokens" not in run.data.metrics:
        return False
    logger.info(f"{format_run_name(plan, arm)}: already trained, loss {run.data.metrics['rung_0/loss']:.4f}")
    return True


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
