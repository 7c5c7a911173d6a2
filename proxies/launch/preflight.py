"""What stands in the way of a launch, found before anything is spent: all of it at once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from proxies.config.growth_rules import check_growth
from proxies.launch.plan import LaunchPlan, WarmStart
from proxies.launch.planner import older_than

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxies.config.proxy import ProxyConfig
    from proxies.launch.plan import Arm

# Numbers that an optimizer keeps for each weight. Of those not here two; SOAP's matrices come to more with every layer.
MOMENTS = {"lion": 1, "muon": 1, "muon-rms": 1, "ademamix": 3, "prodigy": 4, "soap": 6}


def check_launch(plan: LaunchPlan, folder: Path, arms: Sequence[Arm]) -> None:
    """ValueError with every reason why these arms cannot be trained here and now; cheap, and nothing is written.

    folder: where checkpoints go; it may not be there yet. Arms that have begun are not measured for disk space again.
    """
    problems = (
        []
        if set(arms) <= set(plan.arms)
        else [f"--arms warm: the plan of study {plan.study!r} has no proxy to start from"]
    )
    if plan.config is not None:
        problems += _untrainable(plan, plan.config)
        if plan.warm is not None and "warm" in arms and not any(folder.glob("warm*")):
            problems += _start(plan.warm, plan.config)
        problems += _data(plan, plan.config)
    problems += _folder(plan, folder, [arm for arm in arms if not any(folder.glob(f"{arm}*"))])
    if problems:
        raise ValueError("this cannot be launched:\n  " + "\n  ".join(problems))


def check_age(plan: LaunchPlan, folder: Path, *, uri: str | None) -> str | None:
    """A remark where the plan's recommendation cannot be compared with the study's runs; ValueError where it is older.

    A plan that has begun to train is not compared again: its prediction was made before.
    """
    from scaling.runs.io import load_runs
    from scaling.tracking.client import away

    if begun(folder):
        return None
    if problem := away(uri):
        return f"MLflow does not answer ({problem}), so it is not known whether the study has new runs"
    try:
        runs = load_runs(plan.study, tracking_uri=uri)
    except ValueError as error:  # another store than the one that the plan was made from
        return f"the plan cannot be compared with its study's runs: {error}"
    if old := older_than(plan.because, runs, plan.study):
        raise ValueError(old)
    return None


def begun(folder: Path) -> bool:
    """Whether an arm of the plan in this folder has something on disk."""
    return any(any(folder.glob(f"{arm}*")) for arm in ("warm", "scratch"))


def bytes_needed(config: ProxyConfig) -> int:
    """Disk that one arm takes at most: the trunk's state (weights and moments) and the annealed weights, beside them the state
    that is kept on the way (trunk and present), and that once more while it is replaced."""
    weights = 4 * config.counts.total
    state = weights * (1 + MOMENTS.get(config.optimizer, 2))
    return state + weights + 2 * (2 * state)


def _untrainable(plan: LaunchPlan, config: ProxyConfig) -> list[str]:
    from proxies.config.steps import plan as cut

    problems = []
    try:
        cut(config, plan.tokens)
    except ValueError as error:
        problems.append(f"tokens: {error}")
    if config.batch_seqs % plan.world:
        below = config.batch_seqs // plan.world * plan.world
        near = [n for n in (below, below + plan.world) if n]
        problems.append(
            f"batch_seqs: needed a multiple of the {plan.world} processes, got {config.batch_seqs}: "
            f"take {' or '.join(map(str, near))}, or another number of processes"
        )
    if plan.engine == "fsdp2":
        from proxies.model.optimizers import check_sharding

        try:
            check_sharding(config)
        except ValueError as error:
            problems.append(f"engine: {error}")
    return problems


def _start(warm: WarmStart, config: ProxyConfig) -> list[str]:
    from proxies.growth.files import open_trained

    if not warm.checkpoint.exists():
        return [f"warm.checkpoint: no {warm.checkpoint}: name another, or launch with --arms scratch"]
    problems = []
    if config.counts.N < warm.N:
        problems.append(
            f"config: needed a target at least as large as the proxy, N {warm.N:,.0f}, got N {config.counts.N:,}"
        )
    try:
        small = open_trained(warm.checkpoint).config
        if small.counts.N != warm.N:
            problems.append(f"warm.checkpoint: needed the model of N {warm.N:,.0f}, got one of N {small.counts.N:,}")
        check_growth(small, config, warm.method)
    except ValueError as error:
        problems.append(f"warm.checkpoint, {warm.checkpoint}: {error}")
    return problems


def _data(plan: LaunchPlan, config: ProxyConfig) -> list[str]:
    from proxies.data.mixture import record

    try:
        found = record(config)["data_sha256"]
    except ValueError as error:
        return [f"config.corpus: {error}"]
    if plan.data_sha256 is not None and found != plan.data_sha256:
        return [
            f"config.corpus: its text has changed since the plan was made (sha256 {plan.data_sha256[:12]} then, {found[:12]} now): "
            "bring it back, or search and recommend anew"
        ]
    return []


def _folder(plan: LaunchPlan, folder: Path, fresh: Sequence[Arm]) -> list[str]:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(
            dir=there
        ).close()  # permissions alone do not tell: of root, of a file system mounted for reading
    except OSError as error:
        return [f"{folder}: needed a folder that can be written, got {there}: {error.strerror}"]
    if plan.config is None:
        return []
    needed, free = len(fresh) * bytes_needed(plan.config), shutil.disk_usage(there).free
    if needed > free:
        return [
            f"{folder}: needed {needed / 1e9:,.1f} GB of disk for the checkpoints of {len(fresh)} arms, got {free / 1e9:,.1f} GB: "
            "free space, or launch with --arms scratch"
        ]
    return []
