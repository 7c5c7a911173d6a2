"""How often do 90 % intervals hold, on planted tables of the kinds that people bring?

Every table is drawn from a planted loss law, planted optima of learning rate and batch with an own shift in each group,
and noise. The target has 4 times the largest N and D. Printed for each kind, over the seeds: how often the interval
of the loss of one new run, of lr* and of B* holds, their median half widths, and the median error of the loss.

    python -m benchmarks.interval_coverage [--seeds 100] [--first 0]
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd

import scaling

SIZES, RATIOS = (3e7, 8e7, 2e8, 5e8), (10.0, 20.0, 60.0)
TARGET_N, TARGET_D = 2e9, 8e10
MASS = 0.9
NOISE = 0.003
# Standard deviations of a group's own optimum about the law, in ln lr and ln B, and of its own least loss.
OWN_LR, OWN_BATCH, OWN_LOSS = 0.08, 0.1, 0.002


class PlantedWorld:
    """A loss law, optima and a bowl, drawn about published values."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.E, self.alpha, self.beta = rng.uniform(1.4, 2.0), rng.uniform(0.28, 0.42), rng.uniform(0.28, 0.42)
        self.A, self.B = 0.9 * 1e8**self.alpha, 1.1 * 2e9**self.beta
        self.lr_N, self.lr_D, self.batch_D = rng.normal(-0.6, 0.15), rng.normal(0.25, 0.1), rng.normal(0.45, 0.1)
        self.steep_lr, self.steep_batch = rng.uniform(0.01, 0.03), rng.uniform(0.005, 0.015)

    def optimum(self, N: float, D: float) -> tuple[float, float]:
        """Return ln lr* and ln B* of the law."""
        n, d = math.log(N / 1e8), math.log(D / 2e9)
        return math.log(2e-3) + self.lr_N * n + self.lr_D * d, math.log(1.5e5) + self.batch_D * d

    def least(self, N: float, D: float) -> float:
        """Return ln of the least loss of the law."""
        return math.log(self.E + self.A / N**self.alpha + self.B / D**self.beta)

    def group(self, N: float, D: float, lr: np.ndarray, batch: np.ndarray, level: float = 0.0) -> pd.DataFrame:
        """Train runs at (N, D) with settings given as ln distances from the law's optimum."""
        best_lr, best_batch = self.optimum(N, D)
        u, v = lr - OWN_LR * self.rng.normal(), batch - OWN_BATCH * self.rng.normal()
        height = (
            self.steep_lr * (u - 0.2 * v) ** 2 + self.steep_batch * v * v + 0.1 * self.steep_lr * np.maximum(u, 0) ** 3
        )
        y = self.least(N, D) + OWN_LOSS * self.rng.normal() + level + height + NOISE * self.rng.normal(size=lr.size)
        columns = {"lr": np.exp(best_lr + lr), "batch_tokens": np.exp(best_batch + batch), "loss": np.exp(y)}
        return pd.DataFrame({"N": N, "D": D} | columns)


def sweep(world: PlantedWorld, per: int, *, ragged: float = 0.0, level: float = 0.0) -> pd.DataFrame:
    """Draw `per` runs in each group; with `ragged`, tokens differ by up to that share from run to run."""
    parts = []
    for N in SIZES:
        for ratio in RATIOS:
            lr, batch = world.rng.uniform(-1.5, 1.5, (2, per))
            part = world.group(N, ratio * N, lr, batch, level)
            parts.append(part.assign(D=np.round(part["D"] * (1 + ragged * world.rng.uniform(size=per)))))
    return pd.concat(parts, ignore_index=True)


def draw_one_rate(world: PlantedWorld) -> pd.DataFrame:
    """One run per group, all with one learning rate and one batch, and no bowl: what the settings cost is unknown."""
    rows = [
        (
            N,
            r * N,
            2e-3,
            2.6e5,
            math.exp(world.least(N, r * N) + OWN_LOSS * world.rng.normal() + NOISE * world.rng.normal()),
        )
        for N in SIZES
        for r in RATIOS
    ]
    return pd.DataFrame(rows, columns=["N", "D", "lr", "batch_tokens", "loss"])


def draw_scattered(world: PlantedWorld, runs: int = 150) -> pd.DataFrame:
    """Every run has an N, a D and settings of its own."""
    rng, parts = world.rng, []
    for _ in range(runs):
        N = math.exp(rng.uniform(math.log(SIZES[0]), math.log(SIZES[-1])))
        D = N * math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[-1])))
        parts.append(world.group(round(N), round(D), *rng.uniform(-1.5, 1.5, (2, 1))))
    return pd.concat(parts, ignore_index=True)


def draw_two_corpora(world: PlantedWorld) -> pd.DataFrame:
    """Two corpora whose losses differ by 20 %; the first is chosen, as `--where corpus=web` does."""
    web, code = sweep(world, 8), sweep(world, 8, level=-0.2)
    both = pd.concat([web.assign(corpus="web"), code.assign(corpus="code")], ignore_index=True)
    return both[both["corpus"] == "web"].reset_index(drop=True)


KINDS: dict[str, Callable[[PlantedWorld], pd.DataFrame]] = {
    "12 groups of 8 runs": lambda world: sweep(world, 8),
    "one learning rate and batch": draw_one_rate,
    "N, D and loss only": lambda world: draw_one_rate(world)[["N", "D", "loss"]],
    "ragged D, 12 groups of 8": lambda world: sweep(world, 8, ragged=0.003),
    "3 runs in each group": lambda world: sweep(world, 3),
    "150 runs, each its own N and D": draw_scattered,
    "one of two corpora": draw_two_corpora,
}


def main() -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    names = ("loss", "half %", "error %", "lr", "factor", "batch", "factor")
    print(f"{'kind':32s}" + "".join(f"{name:>8s}" for name in names) + "   (loss, lr, batch: held in %)")
    for kind, draw in KINDS.items():
        rows = []
        for seed in range(options.first, options.first + options.seeds):
            world = PlantedWorld(np.random.default_rng([seed, 5]))
            answer = scaling.recommend(draw(world), N=TARGET_N, D=TARGET_D, mass=MASS)
            row = {}
            if answer.loss is not None and answer.loss_interval is not None:
                real = world.least(TARGET_N, TARGET_D) + math.hypot(OWN_LOSS, NOISE) * world.rng.normal()
                low, high = (math.log(v) for v in answer.loss_interval)
                row |= {
                    "loss": low <= real <= high,
                    "half": (high - low) / 2,
                    "error": abs(math.log(answer.loss) - real),
                }
            own = OWN_LR * world.rng.normal(), OWN_BATCH * world.rng.normal()
            names = (("lr", answer.lr_interval), ("batch", answer.batch_interval))
            for (name, interval), centre, shift in zip(names, world.optimum(TARGET_N, TARGET_D), own, strict=True):
                if interval is not None:
                    low, high = (math.log(v) for v in interval)
                    row |= {name: low <= centre + shift <= high, f"{name} factor": math.exp((high - low) / 2)}
            rows.append(row)
        table = pd.DataFrame(rows)

        columns = ("loss", "half", "error", "lr", "lr factor", "batch", "batch factor")
        print(f"{kind:32s}" + "".join(_format_column(table, column) for column in columns), flush=True)


def _format_column(table: pd.DataFrame, column: str) -> str:
    """Format a share in percent, a median relative distance in percent, or a median factor."""
    if column not in table or table[column].isna().all():
        return f"{'-':>8s}"
    values = table[column].dropna().astype(float)
    if column in ("loss", "lr", "batch"):
        return f"{100 * values.mean():8.0f}"
    return f"{values.median() * (1 if 'factor' in column else 100):8.2f}"


if __name__ == "__main__":
    main()
