"""Compare schedules on real text, each at its own tuned peak rate: final losses, cost of branches, AutoLRS against WSD.

    OMP_NUM_THREADS=1 python benchmarks/schedules.py table --tokens 262144
    OMP_NUM_THREADS=1 python benchmarks/schedules.py branches --horizons 131072 262144 524288
    OMP_NUM_THREADS=1 python benchmarks/schedules.py autolrs --tokens 409600

A rate is tuned with seed 0 on a grid of factors of 2, which is extended until the best rate has worse ones on both
sides. The other seeds are run at that rate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from proxies.config.proxy import ProxyConfig
from proxies.config.steps import plan_steps
from proxies.training.auto_lr import autolrs
from proxies.training.loop import train

# log2 of the rates that every grid starts with.
FIRST = (-7, -6, -5)
# Rate, seed -> loss.
RunRate = Callable[[float, int], float]

ROWS: dict[str, dict[str, Any]] = {
    "wsd, 1-sqrt": {},
    "wsd, linear": {"decay": "linear"},
    "wsd, cosine": {"decay": "cosine"},
    "wsd, square": {"decay": "square"},
    "wsd, exponential to 0.1": {"decay": "exponential"},
    "wsd, exponential to 0.01": {"decay": "exponential", "lr_floor": 0.01},
    # The paper's a = 4.6 takes effect at 60 million tokens with this batch; before that it is WSD. This one takes
    # effect at 65,536 tokens with a rate of 2^-6.
    "power, a = 0.28": {"schedule": "power", "power_a": 0.28},
    "inverse-sqrt from 65,536": {"schedule": "inverse-sqrt"},
    "cosine to 0.1": {"schedule": "cosine"},
    "cosine to 0": {"schedule": "cosine", "lr_floor": 0.0},
    "linear to 0": {"schedule": "linear"},
    "rex": {"schedule": "rex"},
    "constant": {"schedule": "constant"},
}


def train_to_loss(config: ProxyConfig, tokens: int) -> float:
    """Train a proxy and return its final loss."""
    *_, last = train(config, tokens)
    return last.loss


def tune(run: RunRate, seeds: Sequence[int]) -> tuple[int, list[float], dict[int, float]]:
    """Return log2 of the best rate, its losses by seed, and the grid at the first seed."""
    grid = {power: run(2.0**power, seeds[0]) for power in FIRST}
    while True:
        best = min(grid, key=lambda power: grid[power])
        missing = [power for power in (best - 1, best + 1) if power not in grid]
        if not missing:
            return best, [grid[best], *(run(2.0**best, seed) for seed in seeds[1:])], grid
        grid[missing[0]] = run(2.0 ** missing[0], seeds[0])


def print_line(name: str, best: int, losses: list[float], grid: dict[int, float], start: float) -> None:
    """Print the result of tuning and the seconds since `start`."""
    spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
    each = " ".join(f"{loss:.4f}" for loss in losses)
    around = " ".join(f"2^{p} {grid[p]:.4f}" for p in sorted(grid))
    print(
        f"{name:28s} lr 2^{best}  mean {statistics.mean(losses):.4f}  sd {spread}  ({each})  grid {around}  "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )


def compare_schedules(options: argparse.Namespace) -> None:
    """Print the tuned loss of every schedule at one length."""
    for name, settings in ROWS.items():
        start = time.perf_counter()

        def run(lr: float, seed: int, settings: dict[str, Any] = settings) -> float:
            return train_to_loss(ProxyConfig(lr=lr, seed=seed, **settings), options.tokens)

        print_line(name, *tune(run, options.seeds), start)


def compare_branches(options: argparse.Namespace) -> None:
    """Print the losses of branches of one trunk beside runs planned for each length."""
    horizons = sorted(options.horizons)
    trunks: dict[tuple[float, int], dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def train_branches(lr: float, seed: int) -> dict[int, float]:
            """Return the losses of the branches of one trunk, each resumed from the branch point before."""
            if (lr, seed) not in trunks:
                saved: Path | None = None
                trunks[lr, seed] = {}
                for tokens in horizons:
                    save = Path(folder) / f"{lr}-{seed}-{tokens}.pt"
                    *_, last = train(ProxyConfig(lr=lr, seed=seed), tokens, resume=saved, save=save)
                    trunks[lr, seed][tokens], saved = last.loss, save
            return trunks[lr, seed]

        for tokens in horizons:
            start = time.perf_counter()

            def run_branch(lr: float, seed: int, tokens: int = tokens) -> float:
                return train_branches(lr, seed)[tokens]

            best, losses, grid = tune(run_branch, options.seeds)
            print_line(f"{tokens:,} branch of a trunk", best, losses, grid, start)
            planned = [train_to_loss(ProxyConfig(lr=2.0**best, seed=seed), tokens) for seed in options.seeds]
            differences = [a - b for a, b in zip(losses, planned, strict=True)]
            print(f"{tokens:,} planned for D, same rate: differences {differences}", flush=True)
            for name in ("cosine to 0.1", "linear to 0"):
                start = time.perf_counter()

                def run(lr: float, seed: int, name: str = name, tokens: int = tokens) -> float:
                    return train_to_loss(ProxyConfig(lr=lr, seed=seed, **ROWS[name]), tokens)

                print_line(f"{tokens:,} {name}", *tune(run, options.seeds), start)
    print_ladder_cost(horizons)


def print_ladder_cost(horizons: Sequence[int]) -> None:
    """Print the tokens of a ladder of rungs: with branches of one trunk, and with every rung from scratch."""
    config = ProxyConfig()
    plans = [plan_steps(config, tokens) for tokens in horizons]
    trunks = [p.trunk_steps * config.batch_tokens for p in plans]
    trained = (
        trunks[0]
        + sum(b - a for a, b in pairwise(trunks))
        + sum(p.tokens - t for p, t in zip(plans, trunks, strict=True))
    )
    top = plans[-1].tokens
    formula = top + config.cooldown * sum(horizons[:-1])
    print(
        f"ladder {list(horizons)}: {trained:,} tokens with branches (formula {formula:,.0f}), {trained / top - 1:+.1%} "
        f"over the last rung alone; from scratch {sum(horizons):,}, {sum(horizons) / top - 1:+.1%}"
    )


def compare_autolrs(options: argparse.Namespace) -> None:
    """Compare AutoLRS with WSD on as many tokens as AutoLRS trained, with and without those of its search."""
    start, spent, final_losses = time.perf_counter(), options.tokens, []
    for seed in options.seeds:
        config = ProxyConfig(seed=seed, batch_seqs=options.batch)
        for last in autolrs(config, options.tokens):
            tried = " ".join(f"{rate:.2g} {worse:+.4f}" for rate, worse in last.candidates)
            print(
                f"  seed {seed} stage {last.stage}  {last.tokens:,} tokens  loss {last.loss:.4f}  lr {last.lr:.2g}  "
                f"({tried})"
            )
        final_losses.append(last.loss)
        spent = last.tokens + last.searched_tokens
    print(
        f"autolrs, {options.tokens:,} tokens, {spent:,} with the search: mean {statistics.mean(final_losses):.4f} "
        f"{final_losses}  {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    start = time.perf_counter()

    def run(lr: float, seed: int) -> float:
        return train_to_loss(ProxyConfig(lr=lr, seed=seed, batch_seqs=options.batch), spent)

    best, losses, grid = tune(run, options.seeds)
    print_line(f"{spent:,} wsd, 1-sqrt", best, losses, grid, start)
    short = [
        train_to_loss(ProxyConfig(lr=2.0**best, seed=seed, batch_seqs=options.batch), options.tokens)
        for seed in options.seeds
    ]
    print(f"{options.tokens:,} wsd, 1-sqrt, lr 2^{best}: mean {statistics.mean(short):.4f} {short}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, command in (("table", compare_schedules), ("branches", compare_branches), ("autolrs", compare_autolrs)):
        sub = commands.add_parser(name)
        sub.set_defaults(command=command)
        sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        if name == "branches":
            sub.add_argument("--horizons", type=int, nargs="+", default=[131_072, 262_144, 524_288])
        else:
            sub.add_argument("--tokens", type=int, default=262_144)
        if name == "autolrs":
            sub.add_argument("--batch", type=int, default=4, help="sequences per step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.command(options)


if __name__ == "__main__":
    main()
