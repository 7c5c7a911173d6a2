"""Does a plan keep its promise? Regret and intervals at the target, promised by `hpo.plan` and found on planted laws.

Each world is drawn: the exponents of lr* and B* from wide ranges about those of published laws, a bend of each law, a
shift of each group's own (sd 0.1), a bowl that is steeper at high rates, a loss law, and noise of 0.1 % of the loss.
The plan is made, its search is run to the end, and the answer is compared with the planted optimum at the target.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_promise [--worlds 100] [--shares 0.003,0.01,0.03,0.1] [--first 0]

Columns: the regret at the target (median, 90 % quantile, mean) and the promised one, %; how often the promised 90 %
intervals of the learning rate and the batch size hold the planted optimum; the same of `scaling.recommend`, and of the
loss of a run at its settings; the error of the predicted loss, %.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

import hpo
import scaling

SEQ_LEN = 2048
SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 0.1, log=True),
    "batch_seqs": IntDistribution(4, 4096, log=True),
}
TARGETS = ((1e9, 2e10), (3e9, 3e11), (4e8, 8e10))


@dataclass
class World:
    """A planted family of runs.

    Attributes:
        seed: What it is drawn from.
    """

    seed: int

    def __post_init__(self) -> None:
        rng = self.rng = np.random.default_rng([self.seed, 3])
        # Exponents of lr* and B* where N and D grow together, and what N takes of them.
        along_lr, along_batch = rng.uniform(-0.6, -0.2), rng.uniform(0.4, 0.75)
        self.lr_n = rng.uniform(-0.8, -0.2)
        self.batch_n = rng.uniform(-0.2, 0.3)
        self.lr_d, self.batch_d = along_lr - self.lr_n, along_batch - self.batch_n
        self.lr, self.batch = math.log(2e-3) + rng.normal(0, 0.7), math.log(4e5) + rng.normal(0, 0.7)
        self.bends = rng.normal(0, 0.01, size=(2, 3))
        self.heights = 0.0085 * np.exp(rng.normal(0, 0.3, size=2))
        self.skew, self.turn = rng.uniform(0.3, 1.5), rng.normal(-0.2, 0.2)
        self.floor = rng.uniform(0.5, 1.9)
        self.a, self.b = rng.uniform(0.25, 0.45), rng.uniform(0.25, 0.45)

    def find_optimum(self, N: float, D: float) -> tuple[float, float]:
        """Return ln lr* and ln B*, with a shift of this (N, D)'s own."""
        n, d = math.log(N / 4e8), math.log(D / 2e10)
        rng = np.random.default_rng([self.seed, round(1000 * math.log(N)), round(1000 * math.log(D))])
        bends = self.bends @ np.array([n * n, n * d, d * d])
        shifts = rng.normal(0, 0.1, size=2)
        lr = self.lr + self.lr_n * n + self.lr_d * d + bends[0] + shifts[0]
        return float(lr), float(self.batch + self.batch_n * n + self.batch_d * d + bends[1] + shifts[1])

    def compute_excess(self, N: float, D: float, lr: float, batch: float) -> float:
        """Return ln loss above the lowest one."""
        best_lr, best_batch = self.find_optimum(N, D)
        v = math.log(batch) - best_batch
        u = math.log(lr) - best_lr + self.turn * v
        x = min(self.skew * u, 30.0)
        return float(self.heights[0] * 2 * (math.expm1(x) - x) / self.skew**2 + self.heights[1] * v * v)

    def compute_loss(self, N: float, D: float, lr: float, batch: float) -> float:
        """Return the loss of one run, with noise. NaN if it diverges."""
        excess = self.compute_excess(N, D, lr, batch)
        if excess > 1.0:
            return math.nan
        least = self.floor + 1.0 * (N / 4e8) ** -self.a + 0.9 * (D / 2e10) ** -self.b
        return float(least * math.exp(excess + 0.001 * self.rng.normal()))


def run_plan(seed: int, N: float, D: float, share: float) -> dict[str, float]:
    """Run one plan on one planted world and return what was promised and found."""
    world = World(seed)
    plan = hpo.plan(N, D, flops=share * 6 * N * D, space=SPACE, seq_len=SEQ_LEN, seed=seed)
    search, rows = plan.search(), []
    while (job := search.ask()) is not None:
        setting = (job.fidelity.N, job.fidelity.D, job.params["lr"], SEQ_LEN * float(job.params["batch_seqs"]))
        loss = world.compute_loss(*setting)
        search.tell(job, loss)
        rows.append((*setting, loss))
    table = pd.DataFrame(rows, columns=["N", "D", "lr", "batch_tokens", "loss"]).assign(
        diverged=lambda t: t.loss.isna()
    )
    advice = scaling.recommend(table, N=N, D=D)
    best_lr, best_batch = world.find_optimum(N, D)
    assert advice.lr is not None
    assert advice.batch_tokens is not None
    assert advice.lr_interval is not None
    assert advice.batch_interval is not None
    assert plan.expected.batch_factor is not None
    real = world.compute_loss(N, D, advice.lr, advice.batch_tokens)
    off_lr, off_batch = math.log(advice.lr) - best_lr, math.log(advice.batch_tokens) - best_batch
    return {
        "share": share,
        "regret": math.expm1(min(world.compute_excess(N, D, advice.lr, advice.batch_tokens), 0.5)),
        "promised": plan.expected.regret,
        "expected": advice.expected_regret or math.nan,
        "lr_kept": abs(off_lr) <= math.log(plan.expected.lr_factor),
        "batch_kept": abs(off_batch) <= math.log(plan.expected.batch_factor),
        "lr_held": advice.lr_interval[0] <= math.exp(best_lr) <= advice.lr_interval[1],
        "batch_held": advice.batch_interval[0] <= math.exp(best_batch) <= advice.batch_interval[1],
        "loss_held": advice.loss_interval[0] <= real <= advice.loss_interval[1],
        "loss_error": abs(advice.loss / real - 1),
        "trusted": advice.trustworthy,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="seed of the first world")
    parser.add_argument("--shares", default="0.003,0.01,0.03,0.1", help="budgets, as shares of the target's compute")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for share in map(float, options.shares.split(",")):
        seeds = range(options.first, options.first + options.worlds)
        t = pd.DataFrame([run_plan(seed, *TARGETS[seed % len(TARGETS)], share) for seed in seeds])
        regret = 100 * t["regret"]
        print(
            f"{share:6.1%}  regret {regret.median():.2f} / {regret.quantile(0.9):.2f}, mean {regret.mean():.2f}; "
            f"promised {100 * t['promised'].mean():.2f}, by the law after the runs {100 * t['expected'].median():.2f}; "
            f"promise holds lr {t['lr_kept'].mean():.0%} batch {t['batch_kept'].mean():.0%}; "
            f"recommend holds lr {t['lr_held'].mean():.0%} batch {t['batch_held'].mean():.0%} "
            f"loss {t['loss_held'].mean():.0%}; loss error {100 * t['loss_error'].median():.2f}; "
            f"trusted {t['trusted'].mean():.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
