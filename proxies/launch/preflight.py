"""Find everything that prevents a launch before any compute is spent, and report it all at once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from proxies.config.growth_rules import check_growth
from proxies.launch.plan import LaunchPlan, WarmStart
from proxies.launch.planner import describe_staleness

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxies.config.proxy import ProxyConfig
    from proxies.launch.plan import Arm

# Numbers that an optimizer keeps for each weight; two for optimizers not listed. SOAP's matrices grow with every layer.
MOMENTS = {"lion": 1, "muon": 1, "muon-rms": 1, "ademamix": 3, "prodigy": 4, "soap": 6}


def check_launch(plan: LaunchPlan, folder: Path, arms: Sequence[Arm]) -> None:
    """Check that these arms can be trained here and now. It is cheap and writes nothing.

    Args:
        plan: The plan.
        folder: Where checkpoints go; it need not exist yet. An arm with files there has begun, and its disk space is
            not counted again.
        arms: The arms to train.

    Raises:
        ValueError: With every reason why they cannot be trained.
    """
    problems = []
    if not set(arms) <= set(plan.arms):
        problems.append(f"--arms warm: the plan of study {plan.study!r} has no proxy to start from")
    if plan.config is not None:
        problems += _find_training_problems(plan, plan.config)
        if plan.warm is not None and "warm" in arms and not any(folder.glob("warm*")):
            problems += _find_start_problems(plan.warm, plan.config)
        problems += _find_data_problems(plan, plan.config)
    problems += _find_folder_problems(plan, folder, [arm for arm in arms if not any(folder.glob(f"{arm}*"))])
    if problems:
        raise ValueError("this cannot be launched:\n  " + "\n  ".join(problems))


def check_age(plan: LaunchPlan, folder: Path, *, uri: str | None) -> str | None:
    """Check that the plan's recommendation is as new as the study's runs.

    A plan whose training has begun is not compared again, because its prediction was made before.

    Args:
        plan: The plan.
        folder: Where its checkpoints go.
        uri: The MLflow store with the study's runs.

    Returns:
        A remark if they cannot be compared, else None.

    Raises:
        ValueError: If the recommendation is older than the runs.
    """
    from scaling.runs.io import load_runs
    from scaling.tracking.client import describe_outage

    if has_begun(folder):
        return None
    if problem := describe_outage(uri):
        return f"MLflow does not answer ({problem}), so it is not known whether the study has new runs"
    try:
        runs = load_runs(plan.study, tracking_uri=uri)
    except ValueError as error:
        # This is another store than the one from which the plan was made.
        return f"the plan cannot be compared with its study's runs: {error}"
    if outdated := describe_staleness(plan.because, runs, plan.study):
        raise ValueError(outdated)
    return None


def has_begun(folder: Path) -> bool:
    """Return whether an arm of the plan in this folder has written anything."""
    return any(any(folder.glob(f"{arm}*")) for arm in ("warm", "scratch"))


def estimate_disk_bytes(config: ProxyConfig) -> int:
    """Return the most disk space that one arm takes, in bytes.

    It is the trunk's state (weights and moments), the annealed weights, the state that is kept during training (the
    trunk's and the present one), and the latter a second time while it is replaced.
    """
    weights = 4 * config.counts.total
    state = weights * (1 + MOMENTS.get(config.optimizer, 2))
    return state + weights + 2 * (2 * state)


def _find_training_problems(plan: LaunchPlan, config: ProxyConfig) -> list[str]:
    from proxies.config.steps import plan_steps

    problems = []
    try:
        plan_steps(config, plan.tokens)
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


def _find_start_problems(warm: WarmStart, config: ProxyConfig) -> list[str]:
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


def _find_data_problems(plan: LaunchPlan, config: ProxyConfig) -> list[str]:
    from proxies.data.mixture import describe_data

    try:
        present = describe_data(config)["data_sha256"]
    except ValueError as error:
        return [f"config.corpus: {error}"]
    if plan.data_sha256 is not None and present != plan.data_sha256:
        return [
            f"config.corpus: its text has changed since the plan was made (sha256 {plan.data_sha256[:12]} then, "
            f"{present[:12]} now): restore it, or search and recommend again"
        ]
    return []


def _find_folder_problems(plan: LaunchPlan, folder: Path, fresh: Sequence[Arm]) -> list[str]:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    # Permissions alone do not show it: root may write everywhere, and a file system may be mounted read-only.
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        return [f"{folder}: needed a folder that can be written, got {existing}: {error.strerror}"]
    if plan.config is None:
        return []
    needed, free = len(fresh) * estimate_disk_bytes(plan.config), shutil.disk_usage(existing).free
    if needed > free:
        return [
            f"{folder}: needed {needed / 1e9:,.1f} GB of disk for the checkpoints of {len(fresh)} arms, "
            f"got {free / 1e9:,.1f} GB: free space, or launch with --arms scratch"
        ]
    return []
