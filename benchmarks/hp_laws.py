"""The law of learning rate and batch size: its regret, the regret it expects, and the coverage of its intervals.

    python benchmarks/hp_laws.py --data ../shared/data     # real runs: steplaw_dense.csv, fitted small, predicted large
    python benchmarks/hp_laws.py --planted 40              # synthetic families of runs whose optimum is known

The regret is the height, at the predicted settings, of a cubic bowl fitted to the held-out group alone (for planted
families: of the true bowl), so the noise of single runs does not enter. Step Law's recipe (arXiv 2503.04715) is shown
for comparison: ordinary least squares in logs on the runs within 0.25 % of their group's best. A regret is a relative
loss in per cent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from scaling.common.arrays import Array
from scaling.fitting.bowl import SHAPE_START, fit_bowl, make_precision, make_prior
from scaling.fitting.groups import GroupedRuns
from scaling.fitting.lr_batch_law import fit_hp_law
from scaling.laws.formulas import HPLaw

MASS = 0.8
# Which runs are fitted. The rest of the table is held out.
SPLITS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
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


def fit_recipe(runs: pd.DataFrame) -> HPLaw:
    """Fit the law by the recipe of Step Law."""
    near = runs[runs["loss"] < 1.0025 * runs.groupby(["N", "D"])["loss"].transform("min")]
    n, d, x, y = np.log(near[["N", "D", "lr", "batch_tokens"]].to_numpy(float)).T
    one = np.ones_like(n)
    a = np.linalg.lstsq(np.stack([one, n, d], 1), x, rcond=None)[0]
    b = np.linalg.lstsq(np.stack([one, d], 1), y, rcond=None)[0]
    return HPLaw(float(np.exp(a[0])), float(a[1]), float(a[2]), float(np.exp(b[0])), 0.0, float(b[1]))


class GroupTruth:
    """The optimum of one group, and its bowl."""

    def __init__(self, N: float, D: float, lr: float, batch: float, height: Callable[[float, float], float]) -> None:
        self.N, self.D, self.optimum, self.height = N, D, (lr, batch), height

    def compute_regret(self, lr: float, batch: float) -> float:
        """Return the regret of settings in per cent."""
        return 100 * self.height(float(np.log(lr / self.optimum[0])), float(np.log(batch / self.optimum[1])))


def measure_truth(N: float, D: float, runs: pd.DataFrame) -> GroupTruth:
    """Fit a cubic bowl to one full group of real runs, with priors three times as wide as usual."""
    y, lr, batch = (np.log(runs[c].to_numpy(float)) for c in ("loss", "lr", "batch_tokens"))
    keep = y - y.min() <= 0.3
    zeros = np.zeros(int(keep.sum()))
    data = GroupedRuns(y[keep], lr[keep], batch[keep], zeros, zeros, np.array([0]))
    mean, sd = make_prior("cubic", (float(np.log(4e8)), float(np.log(2e10))), False)
    sd[[0, 3, *range(SHAPE_START, sd.size)]] *= 3
    fit = fit_bowl("cubic", 0.01, data, (mean, make_precision(sd, False)))

    def height(u: float, v: float) -> float:
        return float(fit.height(np.array([u]), np.array([v]), 0.0, 0.0)[0])

    return GroupTruth(N, D, float(np.exp(fit.theta[0])), float(np.exp(fit.theta[3])), height)


def score_fit(runs: pd.DataFrame, truths: list[GroupTruth]) -> Array:
    """Return means over the held-out groups.

    They are the regret, the expected regret, whether the intervals contain lr* and B*, the regret of the recipe, and
    the seconds of the fit.
    """
    start = time.perf_counter()
    fit = fit_hp_law(runs)
    seconds, recipe, rows = time.perf_counter() - start, fit_recipe(runs), []
    for t in truths:
        lr, batch = (float(v) for v in fit.law(t.N, t.D))
        ranges = fit.interval(t.N, t.D, MASS)
        held = [low <= optimum <= high for (low, high), optimum in zip(ranges, t.optimum, strict=True)]
        recipe_regret = t.compute_regret(*(float(v) for v in recipe(t.N, t.D)))
        rows.append(
            [t.compute_regret(lr, batch), 100 * fit.expected_regret(t.N, t.D), *held, min(recipe_regret, 20.0), seconds]
        )
    return np.asarray(np.mean(rows, 0))


def print_row(name: str, rows: list[Array]) -> None:
    regret, expected, lr, batch, recipe, seconds = np.mean(rows, 0)
    print(
        f"{name:32}{regret:9.3f}{expected:10.3f}{expected / regret:7.1f}{100 * lr:8.0f}{100 * batch:6.0f}"
        f"{recipe:11.3f}{seconds:7.2f}"
    )


def split_groups(runs: pd.DataFrame) -> dict[tuple[float, float], pd.DataFrame]:
    sizes = runs[["N", "D"]].drop_duplicates().sort_values(["N", "D"]).to_numpy(float)
    return {(float(N), float(D)): runs[(runs["N"] == N) & (runs["D"] == D)] for N, D in sizes}


def thin_groups(runs: pd.DataFrame, per_group: int, rng: np.random.Generator) -> pd.DataFrame:
    if not per_group:
        return runs
    kept = [group.iloc[rng.permutation(len(group))[:per_group]] for group in split_groups(runs).values()]
    return pd.concat(kept, ignore_index=True)


def compare_real(folder: Path, per_groups: list[int], draws: int) -> None:
    table = pd.read_csv(folder / "steplaw_dense.csv").drop(columns="loss").rename(columns={"smooth_loss": "loss"})
    table = table[["N", "D", "lr", "batch_tokens", "loss"]].astype(float)
    truths = {size: measure_truth(*size, group) for size, group in split_groups(table).items()}
    for per_group in per_groups:
        print(f"{f'{per_group} runs a group' if per_group else 'all runs'}")
        everything = []
        for name, is_fitted in SPLITS.items():
            small = is_fitted(table)
            held_out = [truths[size] for size in split_groups(table[~small])]
            rows = []
            for seed in range(draws if per_group else 1):
                rows.append(score_fit(thin_groups(table[small], per_group, np.random.default_rng(seed)), held_out))
            print_row(f"  {name}", rows)
            everything.append(np.mean(rows, 0))
        print_row("  mean", everything)


def make_family(
    rng: np.random.Generator, per_group: int, centre: tuple[float, float, float, float] | None, noise: float
) -> tuple[pd.DataFrame, list[GroupTruth]]:
    """Make runs of nine groups, and four held-out groups with up to 8 times the N and 8 times the D.

    The bowl is neither of the fitted forms, its height and skew vary with N and D, and the optimum of every group has
    its own shift of 0.08.

    Args:
        rng: Generator of the draws.
        per_group: Runs in each group.
        centre: Exponents a1, a2, b1, b2; None to draw them from the prior of the fit (b2 is 0 in two of three cases).
        noise: Standard deviation of ln loss of a run.
    """
    if centre is None:
        a1, a2, b1 = rng.normal([-0.6, 0.2, 0.5], [0.3, 0.3, 0.2])
        b2 = rng.normal(0, 0.2) * (rng.uniform() < 1 / 3)
    else:
        a1, a2, b1, b2 = centre
    skew, tilt, flatter = rng.uniform(0.0, 0.004), rng.uniform(-0.5, -0.1), rng.uniform(-0.2, 0.1, 2)
    heights = 0.01 * np.exp(0.4 * rng.normal(size=2))

    def truth(N: float, D: float) -> GroupTruth:
        n, d = np.log(N / 2e8), np.log(D / 1e10)
        shift = 0.08 * rng.normal(size=2)
        lr, batch = 3e-3 * np.exp(a1 * n + a2 * d + shift[0]), 3e5 * np.exp(b1 * d + b2 * n + shift[1])

        def height(u: float, v: float) -> float:
            z = u + tilt * v
            bowl = heights[0] * z * z + 0.6 * heights[1] * v * v + (skew + 0.001 * n) * max(z, 0.0) ** 3
            return float(bowl * np.exp(flatter @ [n, d]))

        return GroupTruth(N, D, float(lr), float(batch), height)

    rows = []
    for N in (6e7, 1.5e8, 4e8):
        for D in (3e9, 1e10, 3e10):
            t = truth(N, D)
            # The middle of the box is slightly off the optimum.
            box = rng.uniform(-2, 2, (per_group, 2)) + 0.35 * rng.normal(size=2)
            for x, y in box:
                loss = 3 * (N / 1e8) ** -0.05 * (D / 1e10) ** -0.05 * np.exp(t.height(x, y) + noise * rng.normal())
                rows.append((N, D, t.optimum[0] * np.exp(x), t.optimum[1] * np.exp(y), loss))
    runs = pd.DataFrame(rows, columns=["N", "D", "lr", "batch_tokens", "loss"])
    return runs, [truth(N, D) for N, D in ((8e8, 3e10), (8e8, 1e11), (3.2e9, 6e10), (3.2e9, 2.4e11))]


def compare_planted(count: int, per_groups: list[int], noise: float) -> None:
    centres: dict[str, tuple[float, float, float, float] | None] = {
        "exponents from the prior": None,
        "-0.4, 0, 0.4, 0": (-0.4, 0.0, 0.4, 0.0),
        "-0.7, 0.3, 0.57, 0": (-0.7, 0.3, 0.57, 0.0),
        "-0.7, 0.3, 0.57, -0.2": (-0.7, 0.3, 0.57, -0.2),
        "-0.2, -0.3, 0.4, 0": (-0.2, -0.3, 0.4, 0.0),
    }
    for per_group in per_groups:
        print(f"{per_group or 60} runs a group, noise of a run {100 * noise:g} %")
        for name, centre in centres.items():
            rows = []
            for seed in range(count):
                runs, truths = make_family(np.random.default_rng(seed), per_group or 60, centre, noise)
                rows.append(score_fit(runs, truths))
            print_row(f"  {name}", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with steplaw_dense.csv")
    parser.add_argument("--planted", type=int, default=0, metavar="COUNT", help="families for each row")
    parser.add_argument("--per-group", type=int, nargs="+", default=[0, 20, 10, 8], help="runs a group; 0: all")
    parser.add_argument("--draws", type=int, default=6, help="random subsets of the runs of real groups")
    parser.add_argument("--noise", type=float, default=0.001, help="sd of a planted run's ln loss")
    options = parser.parse_args()
    if options.data is None and not options.planted:
        parser.error("needed --data FOLDER, --planted COUNT, or both")
    print(f"{'%':32}{'regret':>9}{'expected':>10}{'ratio':>7}{'80%: lr':>8}{'B':>6}{'recipe':>11}{'s':>7}")
    if options.data is not None:
        compare_real(options.data, options.per_group, options.draws)
    if options.planted:
        compare_planted(options.planted, options.per_group, options.noise)


if __name__ == "__main__":
    main()
