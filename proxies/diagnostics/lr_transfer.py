"""Test whether the best learning rate transfers, with adaptive grids of short runs at several sizes.

Runs that have ended are stored, so an interrupted test is resumed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxies.config.proxy import ProxyConfig
from proxies.diagnostics.lr_optimum import (
    FURTHER,
    MASS,
    WINDOW,
    TransferArm,
    choose_next_rates,
    find_best_window,
    fit_arm,
)

if TYPE_CHECKING:
    from proxies.diagnostics.coord_check import Axis

Submit = Callable[[Sequence[tuple[ProxyConfig, int]]], Iterator[tuple[int, float]]]
# (rate, seed) -> final loss
Losses = dict[tuple[int, int], float]
# Rates that are typically tried per size with the first seed, for the estimate of the cost.
TYPICAL_RATES = 8


@dataclass(frozen=True)
class Transfer:
    """The outcome of a transfer test.

    Attributes:
        over: What is varied.
        tokens: Tokens of each run.
        seeds: Seeds of each rate.
        arms: The study's own parametrization, then its control.
    """

    over: Axis
    tokens: int
    seeds: int
    arms: tuple[TransferArm, ...]

    @property
    def passed(self) -> bool:
        """Whether the study's own parametrization meets all goals."""
        return not self.arms[0].misses

    @property
    def text(self) -> str:
        """A table per arm, and a verdict, as text."""
        lines = []
        for arm in self.arms:
            lines += [f"{arm.name}: {self.tokens:,} tokens, {self.seeds} seeds, {MASS:.0%} intervals"]
            lines += [f"{self.over:>8}{'log2 best lr':>30}{'best lr':>10}{'loss':>9}{'nats/octave²':>14}"]
            for b in arm.bowls:
                lines.append(f"{b.size:>8}{b.best!s:>30}{2**b.best.value:10.5f}{b.loss:9.4f}{b.curvature:14.4f}")
            noise = arm.bowls[0].noise
            lines += [
                f"  gamma {arm.gamma} (best lr ~ {self.over}^-gamma), shift {arm.shift} octaves",
                f"  noise of a run {noise:.4f} nats",
                f"  regret at the largest size with the smallest's rate {arm.regret} nats = {arm.relative_regret:.2%}",
                f"  regret extrapolated to {FURTHER} times the largest size {arm.penalty} nats",
                f"  {'meets all goals' if not arm.misses else 'misses ' + ', '.join(arm.misses)}",
            ]
        return "\n".join(lines)

    @property
    def json(self) -> dict[str, Any]:
        """The outcome as values that JSON can represent. A loss or regret that is None means that the run diverged."""
        from proxies.diagnostics.coord_check import replace_nonfinite

        more = {
            "passed": self.passed,
            "misses": {arm.name: list(arm.misses) for arm in self.arms},
            "relative_regret": {arm.name: arm.relative_regret for arm in self.arms},
        }
        plain: dict[str, Any] = replace_nonfinite(asdict(self) | more)
        return plain


def make_arms(
    config: ProxyConfig, over: Axis, sizes: Sequence[int], *, control: bool = True
) -> dict[str, dict[int, ProxyConfig]]:
    """Return the configurations of each arm by size.

    Over width the arms are muP and the standard parametrization, over depth a depth rule and none. The base of the
    depth rule is the configuration's, or the smallest depth if it has none.

    Args:
        config: The study's own proxy.
        over: What is varied.
        sizes: Widths or depths.
        control: Whether to include the control arm.

    Returns:
        Configurations by arm and size.

    Raises:
        ValueError: For fewer than two sizes, or a size that the family cannot have.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"needed at least two sizes to compare, got {list(sizes)}: add sizes")
    changes: dict[str, dict[str, Any]]
    if over == "width":
        field = "d_model"
        changes = {"mup": {"parametrization": "mup"}, "standard": {"parametrization": "standard"}}
    else:
        field = "n_layers"
        base = config.base_layers or min(sizes)
        changes = {
            f"depth power {config.depth_power:g}": {"parametrization": "mup", "base_layers": base},
            "no depth rule": {"parametrization": "mup", "base_layers": None},
        }
    return {
        name: {s: ProxyConfig.model_validate(config.model_dump() | change | {field: s}) for s in sorted(set(sizes))}
        for name, change in list(changes.items())[: 2 if control else 1]
    }


def estimate_cost(arms: Mapping[str, Mapping[int, ProxyConfig]], tokens: int, seeds: int) -> tuple[float, float]:
    """Estimate the cost of a typical number of runs. The speed of each size is measured.

    Args:
        arms: Configurations by arm and size.
        tokens: Tokens of every run.
        seeds: Seeds of each rate.

    Returns:
        FLOPs, and seconds on one core.
    """
    from proxies.training.throughput import measure_speed

    runs = TYPICAL_RATES + WINDOW * (seeds - 1)
    flops = seconds = 0.0
    for members in arms.values():
        for member in members.values():
            flops += runs * tokens * member.flops_per_token
            seconds += runs * tokens / measure_speed(member, threads=1)
    return flops, seconds


def transfer(
    config: ProxyConfig,
    sizes: Sequence[int],
    tokens: int,
    *,
    over: Axis = "width",
    seeds: int = 2,
    control: bool = True,
    runs: Path | None = None,
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Transfer:
    """Find the best learning rate at each size of each arm, and what keeping the smallest size's rate costs.

    Rates are config.lr * 2^(j/2). The first seed finds the best five of each size, the other seeds repeat these. A size
    begins where the next smaller one ended. The largest size is also run around the smallest size's best rate.

    Args:
        config: The study's own proxy.
        sizes: Widths or depths.
        tokens: Tokens of every run, cooldown included.
        over: What is varied.
        seeds: Seeds of each rate.
        control: Whether to run the control arm, too.
        runs: A JSONL file. Runs that it holds are not repeated, and every run is added when it ends.
        workers: Processes, with one thread each.
        progress: Called with a line of text for every run.

    Returns:
        The outcome.

    Raises:
        ValueError: For bad arguments, or if noise hides the minimum at some size.
    """
    from proxies.config.steps import plan_steps

    if seeds < 1 or workers < 1:
        raise ValueError(f"needed at least one seed and one worker, got {seeds} and {workers}")
    arms = make_arms(config, over, sizes, control=control)
    for members in arms.values():
        for member in members.values():
            # Refuses runs that are too short for their warm-up.
            plan_steps(member, tokens)
    report = progress or (lambda _: None)
    store = _RunStore(runs, tokens, config)
    results: dict[str, dict[int, Losses]] = {}
    with open_pool(workers) as submit:
        for name, members in arms.items():
            results[name] = {}
            start, coarse = 0, None
            for size, member in members.items():
                losses: Losses = {}
                while jobs := _choose_jobs(losses, config.seed, seeds, start, coarse):
                    _run_jobs(
                        jobs,
                        member,
                        tokens,
                        store,
                        submit,
                        losses,
                        partial(_report_run, report, f"{name}, {over} {size}"),
                    )
                results[name][size] = losses
                first = {j: loss for (j, seed), loss in losses.items() if seed == config.seed}
                start, coarse = min(first, key=lambda j: first[j]), 2
            # If the smallest size's best rate lies between rates that the largest tried, the largest is run there, too.
            arm = fit_arm(name, results[name], math.log2(config.lr))
            at = 2 * (arm.bowls[0].best.value - math.log2(config.lr))
            largest = max(members)
            losses = results[name][largest]
            around = [(j, config.seed) for j in (math.floor(at), math.ceil(at)) if (j, config.seed) not in losses]
            _run_jobs(
                around,
                members[largest],
                tokens,
                store,
                submit,
                losses,
                partial(_report_run, report, f"{name}, {over} {largest}"),
            )
    return Transfer(over, tokens, seeds, tuple(fit_arm(name, results[name], math.log2(config.lr)) for name in arms))


def _choose_jobs(losses: Losses, seed: int, seeds: int, start: int, coarse: int | None) -> list[tuple[int, int]]:
    """Return (rate, seed) pairs to run next.

    First the grid of the first seed, then the best five rates with all seeds, then more if the best five move.
    """
    first = {j: loss for (j, s), loss in losses.items() if s == seed}
    if rates := choose_next_rates(first, start, coarse) if coarse else choose_next_rates(first, start):
        return [(j, seed) for j in rates]
    others = range(seed, seed + seeds)
    low, high = find_best_window(first)
    missing = [(j, s) for j in range(low, high + 1) for s in others if (j, s) not in losses and j in first]
    if missing:
        return missing
    full = {j: sum(losses[j, s] for s in others) / seeds for j in first if all((j, s) in losses for s in others)}
    return [(j, s) for j in choose_next_rates(full) for s in others if (j, s) not in losses]


def _run_jobs(
    jobs: Sequence[tuple[int, int]],
    member: ProxyConfig,
    tokens: int,
    store: _RunStore,
    submit: Submit,
    losses: Losses,
    report: Callable[[str], None],
) -> None:
    """Run the jobs that the store does not hold, and put the losses of all jobs into `losses`."""
    configs = {(j, s): member.model_copy(update={"lr": store.lr0 * 2 ** (j / 2), "seed": s}) for j, s in jobs}
    pending = []
    for job, config in configs.items():
        known = store.get(config)
        if known is None:
            pending.append(job)
        else:
            losses[job] = known
    for index, loss in submit([(configs[job], tokens) for job in pending]):
        job = pending[index]
        store.put(configs[job], loss)
        losses[job] = loss
        report(f"lr {configs[job].lr:.5f}, seed {job[1]}: {loss:.4f}")


def _report_run(report: Callable[[str], None], where: str, text: str) -> None:
    report(f"{where}: {text}")


def train_to_final_loss(config: ProxyConfig, tokens: int) -> float:
    """Train a proxy and return its held-out loss after the cooldown, in nats per token; inf if it diverged."""
    from proxies.training.loop import train

    *_, last = train(config, tokens)
    return math.inf if last.diverged else last.loss


@contextmanager
def open_pool(workers: int) -> Iterator[Submit]:
    """Yield a function that runs (config, tokens) pairs and yields (index, loss) as they end.

    Runs use one thread each, also in this process: small matrices are no faster with more threads, and the loss then
    does not depend on the number of cores.

    Args:
        workers: Number of processes; with 1, the runs take place in this process.
    """
    import torch

    if workers == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield lambda jobs: ((i, train_to_final_loss(*job)) for i, job in enumerate(jobs))
        finally:
            torch.set_num_threads(before)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def submit(jobs: Sequence[tuple[ProxyConfig, int]]) -> Iterator[tuple[int, float]]:
            futures = {pool.submit(train_to_final_loss, *job): i for i, job in enumerate(jobs)}
            for future in as_completed(futures):
                yield futures[future], future.result()

        yield submit


class _RunStore:
    """Runs that have ended, one JSON object per line: settings, tokens, hash of the data, loss (null if diverged)."""

    def __init__(self, path: Path | None, tokens: int, config: ProxyConfig) -> None:
        from proxies.data.mixture import open_data

        self.path, self.tokens, self.lr0 = path, tokens, config.lr
        self.data = open_data(config).sha256
        self.known: dict[str, float] = {}
        if path is None or not path.is_file():
            return
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                # Settings that are newer than the file have their defaults.
                settings = ProxyConfig.model_validate(row["config"])
                loss = math.inf if row["loss"] is None else float(row["loss"])
                self.known[self._make_key(settings, row["tokens"], row["data_sha256"])] = loss
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"needed one run per line, got something else in line {number} of {path} ({error}): "
                    "remove that line"
                ) from error

    def get(self, config: ProxyConfig) -> float | None:
        """Return the stored loss of a run, or None."""
        return self.known.get(self._make_key(config, self.tokens, self.data))

    def put(self, config: ProxyConfig, loss: float) -> None:
        """Store the loss of a run."""
        self.known[self._make_key(config, self.tokens, self.data)] = loss
        if self.path is None:
            return
        row = {"loss": loss if math.isfinite(loss) else None, "tokens": self.tokens, "data_sha256": self.data}
        line = json.dumps(row | {"config": config.model_dump()}, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        # One write, so that lines of two processes do not mix.
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    @staticmethod
    def _make_key(config: ProxyConfig, tokens: int, data: str) -> str:
        # The data's hash is compared instead of its path. Settings that only save memory do not matter.
        same = {"corpus", "coordinate_check", "early_points", "micro_seqs", "recompute"}
        if config.m == config.r == 1:
            # At base width and depth every parametrization is the same.
            same |= {"parametrization", "base_layers", "depth_power"}
        settings = config.model_dump(exclude=same)
        return sha256(json.dumps([settings, tokens, data], sort_keys=True).encode()).hexdigest()
