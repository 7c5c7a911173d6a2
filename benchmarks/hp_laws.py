"""The learning-rate and batch law: regret of its answer, the regret it expects, and what its intervals hold.

    python benchmarks/hp_laws.py --data ../shared/data     # real runs: steplaw_dense.csv, fitted small, asked large
    python benchmarks/hp_laws.py --planted 40              # made-up families of runs, the truth known

The regret is smooth: the height, at the answer, of a cubic bowl fitted to the asked group alone (planted: the true bowl),
so that the luck of single runs is no part of it. Step Law's recipe (arXiv 2503.04715) is shown beside: runs within .25 %
of their group's best, ordinary least squares in logs. A regret is a relative loss in per cent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from scaling.common.arrays import Array
from scaling.fitting.bowl import SHAPE_START, GroupedRuns, fit_bowl, make_prior
from scaling.fitting.lr_batch_law import fit_hp_law
from scaling.laws.formulas import HPLaw

MASS = 0.8
SPLITS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {  # the runs fitted; the rest of the table is asked
    "C < 3e19": lambda t: t["N"] * t["D"] < 5e18,
    "C < 5e19": lambda t: t["N"] * t["D"] < 8.4e18,
    "C < 1e20": lambda t: t["N"] * t["D"] < 1.7e19,
    "D <= 2.5e10": lambda t: t["D"] <= 2.5e10,
    "two smallest N": lambda t: t["N"] < 3e8,
    "two smallest N, D <= 2.5e10": lambda t: (t["N"] < 3e8) & (t["D"] <= 2.5e10),
    "three smallest N": lambda t: t["N"] < 5e8,
    "three smallest N, D <= 2.5e10": lambda t: (t["N"] < 5e8) & (t["D"] <= 2.5e10),
    "all but the largest N": lambda t: t["N"] < 1e9,
    "all but the smallest N": lambda t: t["N"] > 2.5e8,
}


def recipe(runs: pd.DataFrame) -> HPLaw:
    """Step Law's."""
    near = runs[runs["loss"] < 1.0025 * runs.groupby(["N", "D"])["loss"].transform("min")]
    n, d, x, y = np.log(near[["N", "D", "lr", "batch_tokens"]].to_numpy(float)).T
    one = np.ones_like(n)
    a = np.linalg.lstsq(np.stack([one, n, d], 1), x, rcond=None)[0]
    b = np.linalg.lstsq(np.stack([one, d], 1), y, rcond=None)[0]
    return HPLaw(float(np.exp(a[0])), float(a[1]), float(a[2]), float(np.exp(b[0])), 0.0, float(b[1]))


class Truth:
    """A group's own optimum, and the height of its own bowl there."""

    def __init__(self, N: float, D: float, lr: float, batch: float, height: Callable[[float, float], float]) -> None:
        self.N, self.D, self.optimum, self.height = N, D, (lr, batch), height

    def regret(self, lr: float, batch: float) -> float:
        return 100 * self.height(float(np.log(lr / self.optimum[0])), float(np.log(batch / self.optimum[1])))


def measured(N: float, D: float, runs: pd.DataFrame) -> Truth:
    """The cubic bowl of one full group of real runs, with priors three times as wide."""
    y, lr, batch = (np.log(runs[c].to_numpy(float)) for c in ("loss", "lr", "batch_tokens"))
    keep = y - y.min() <= 0.3
    nil = np.zeros(int(keep.sum()))
    data = GroupedRuns(y[keep], lr[keep], batch[keep], nil, nil, nil.astype(np.intp), 1)
    mean, sd = make_prior("cubic", (float(np.log(4e8)), float(np.log(2e10))), False)
    sd[[0, 3, *range(SHAPE_START, sd.size)]] *= 3
    fit = fit_bowl("cubic", 0.01, data, (mean, sd))

    def height(u: float, v: float) -> float:
        return float(fit.height(np.array([u]), np.array([v]), 0.0, 0.0)[0])

    return Truth(N, D, float(np.exp(fit.theta[0])), float(np.exp(fit.theta[3])), height)


def score(runs: pd.DataFrame, asked: list[Truth]) -> Array:
    """Means over the asked groups: regret, expected regret, whether intervals hold lr* and B*, the recipe's regret; s."""
    start = time.perf_counter()
    fit = fit_hp_law(runs)
    took, other, rows = time.perf_counter() - start, recipe(runs), []
    for t in asked:
        lr, batch = (float(v) for v in fit.law(t.N, t.D))
        ranges = fit.interval(t.N, t.D, MASS)
        held = [low <= at <= high for (low, high), at in zip(ranges, t.optimum, strict=True)]
        beside = t.regret(*(float(v) for v in other(t.N, t.D)))
        rows.append([t.regret(lr, batch), 100 * fit.expected_regret(t.N, t.D), *held, min(beside, 20.0), took])
    return np.asarray(np.mean(rows, 0))


def show(name: str, rows: list[Array]) -> None:
    real, expected, lr, batch, other, took = np.mean(rows, 0)
    print(
        f"{name:32}{real:9.3f}{expected:10.3f}{expected / real:7.1f}{100 * lr:8.0f}{100 * batch:6.0f}{other:11.3f}{took:7.2f}"
    )


def groups_of(runs: pd.DataFrame) -> dict[tuple[float, float], pd.DataFrame]:
    sizes = runs[["N", "D"]].drop_duplicates().sort_values(["N", "D"]).to_numpy(float)
    return {(float(N), float(D)): runs[(runs["N"] == N) & (runs["D"] == D)] for N, D in sizes}


def thinned(runs: pd.DataFrame, per: int, rng: np.random.Generator) -> pd.DataFrame:
    if not per:
        return runs
    kept = [group.iloc[rng.permutation(len(group))[:per]] for group in groups_of(runs).values()]
    return pd.concat(kept, ignore_index=True)


def real(folder: Path, pers: list[int], draws: int) -> None:
    table = pd.read_csv(folder / "steplaw_dense.csv").drop(columns="loss").rename(columns={"smooth_loss": "loss"})
    table = table[["N", "D", "lr", "batch_tokens", "loss"]].astype(float)
    truths = {size: measured(*size, group) for size, group in groups_of(table).items()}
    for per in pers:
        print(f"{f'{per} runs a group' if per else 'all runs'}")
        everything = []
        for name, fitted in SPLITS.items():
            small = fitted(table)
            asked = [truths[size] for size in groups_of(table[~small])]
            rows = []
            for seed in range(draws if per else 1):
                rows.append(score(thinned(table[small], per, np.random.default_rng(seed)), asked))
            show(f"  {name}", rows)
            everything.append(np.mean(rows, 0))
        show("  mean", everything)


def family(
    rng: np.random.Generator, per: int, centre: tuple[float, float, float, float] | None, noise: float
) -> tuple[pd.DataFrame, list[Truth]]:
    """Runs of nine groups, then the four asked ones, up to 8 times N and 8 times D beyond.

    centre: a1, a2, b1, b2; None: drawn from the fit's own prior (b2: nil in two of three). The bowl is none of the
    fitted forms, its height and lopsidedness differ with N and D, and every group's optimum is shifted by its own .08.
    """
    if centre is None:
        a1, a2, b1 = rng.normal([-0.6, 0.2, 0.5], [0.3, 0.3, 0.2])
        b2 = rng.normal(0, 0.2) * (rng.uniform() < 1 / 3)
    else:
        a1, a2, b1, b2 = centre
    skew, tilt, flatter = rng.uniform(0.0, 0.004), rng.uniform(-0.5, -0.1), rng.uniform(-0.2, 0.1, 2)
    heights = 0.01 * np.exp(0.4 * rng.normal(size=2))

    def truth(N: float, D: float) -> Truth:
        n, d = np.log(N / 2e8), np.log(D / 1e10)
        own = 0.08 * rng.normal(size=2)
        lr, batch = 3e-3 * np.exp(a1 * n + a2 * d + own[0]), 3e5 * np.exp(b1 * d + b2 * n + own[1])

        def height(u: float, v: float) -> float:
            z = u + tilt * v
            bowl = heights[0] * z * z + 0.6 * heights[1] * v * v + (skew + 0.001 * n) * max(z, 0.0) ** 3
            return float(bowl * np.exp(flatter @ [n, d]))

        return Truth(N, D, float(lr), float(batch), height)

    rows = []
    for N in (6e7, 1.5e8, 4e8):
        for D in (3e9, 1e10, 3e10):
            t = truth(N, D)
            box = rng.uniform(-2, 2, (per, 2)) + 0.35 * rng.normal(size=2)  # its middle misses the optimum a little
            for x, y in box:
                loss = 3 * (N / 1e8) ** -0.05 * (D / 1e10) ** -0.05 * np.exp(t.height(x, y) + noise * rng.normal())
                rows.append((N, D, t.optimum[0] * np.exp(x), t.optimum[1] * np.exp(y), loss))
    runs = pd.DataFrame(rows, columns=["N", "D", "lr", "batch_tokens", "loss"])
    return runs, [truth(N, D) for N, D in ((8e8, 3e10), (8e8, 1e11), (3.2e9, 6e10), (3.2e9, 2.4e11))]


def planted(count: int, pers: list[int], noise: float) -> None:
    centres: dict[str, tuple[float, float, float, float] | None] = {
        "exponents from the prior": None,
        "-.4, 0, .4, 0": (-0.4, 0.0, 0.4, 0.0),
        "-.7, .3, .57, 0": (-0.7, 0.3, 0.57, 0.0),
        "-.7, .3, .57, -.2": (-0.7, 0.3, 0.57, -0.2),
        "-.2, -.3, .4, 0": (-0.2, -0.3, 0.4, 0.0),
    }
    for per in pers:
        print(f"{per or 60} runs a group, noise of a run {100 * noise:g} %")
        for name, centre in centres.items():
            rows = []
            for seed in range(count):
                runs, asked = family(np.random.default_rng(seed), per or 60, centre, noise)
                rows.append(score(runs, asked))
            show(f"  {name}", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with steplaw_dense.csv")
    parser.add_argument("--planted", type=int, default=0, metavar="COUNT", help="families for each row")
    parser.add_argument("--per-group", type=int, nargs="+", default=[0, 20, 10, 8], help="runs a group; 0: all")
    parser.add_argument("--draws", type=int, default=6, help="random choices of the runs of real groups")
    parser.add_argument("--noise", type=float, default=0.001, help="sd of a planted run's ln loss")
    options = parser.parse_args()
    if options.data is None and not options.planted:
        parser.error("say --data FOLDER, --planted COUNT, or both")
    print(f"{'%':32}{'regret':>9}{'expected':>10}{'ratio':>7}{'80%: lr':>8}{'B':>6}{'recipe':>11}{'s':>7}")
    if options.data is not None:
        real(options.data, options.per_group, options.draws)
    if options.planted:
        planted(options.planted, options.per_group, options.noise)


if __name__ == "__main__":
    main()
