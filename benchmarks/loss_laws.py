"""Loss laws on real tables: predictions beyond the data, the choice of form, and three approaches to the optimum.

    OMP_NUM_THREADS=1 python benchmarks/loss_laws.py --data FOLDER [--only beyond,few,far,forms,optimum,time]

FOLDER contains the tables (its README names sources and licences). All errors are in %.

beyond   Fit the lower 50, 70, 85 % of the runs by compute and predict the rest: error of the law, error of Fit.predict,
         how often the 80 % interval contains a run, and its half width. Means over the tables of a family, then over
         families.
few      The same at 70 %, with K random runs of the lower part.
far      Fit the whole OLMo ladder (190M to 3B) and predict the 7B and 13B targets, at 33 times its compute.
forms    The form chosen by rolling hold-out inside the lower part, scored on the rest, beside fixed forms.
optimum  Exponents of N_opt(C) by parabolas, envelope and law, beside Porian et al.'s published pairs refitted by OLS.
time     Seconds of one fit of 240 runs, alone and with 1000 bootstraps; the fastest of seven.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from scaling.common.arrays import Array
from scaling.fitting.envelope import compare_approaches, make_approaches_table
from scaling.fitting.forms import AVERAGE, compare_forms
from scaling.fitting.isoflop import fit_isoflop
from scaling.fitting.loss_law import fit_loss_law

PORIAN = ["src", "dataset", "hparams", "warmup", "decay", "param_count", "val"]
# Run, N (assumed) and D of each target.
TARGETS = {
    "7B": ("peteish7_eval_anneal", 6.89e9, 3.95e12),
    "13B": ("peteish13_eval_final", 13.2e9, 5.0e12),
}
OLMO = ("c4_en_ce", "dolma_common-crawl_ce", "pile_ce")
# Family, name, N, D, loss.
LossTable = tuple[str, str, Array, Array, Array]


def read_chinchilla(data: Path) -> pd.DataFrame:
    return pd.read_csv(data / "chinchilla_epoch.csv").query("besiroglu_excluded == 0")


def read_ladder(data: Path) -> pd.DataFrame:
    """Read the last point of every run, with N from the tokens of the runs of 20 tokens per parameter."""
    curves = pd.read_csv(data / "olmo_ladder_curves.csv").sort_values("step").groupby("run").tail(1)
    ends = curves[~curves.run.str.startswith("peteish")].rename(columns={"throughput/total_tokens": "D"})
    ends = ends.assign(size=ends.run.str.split("-").str[0])
    once = ends[ends.run.str.endswith("-1xC")].set_index("size").D
    return ends.assign(N=ends["size"].map(once / 20))


def read_tables(data: Path) -> Iterator[LossTable]:
    """Read all tables: the family, the name, and N, D and loss of the runs."""

    def table(family: str, name: str, *columns: pd.Series) -> LossTable:
        N, D, loss = (c.to_numpy(float) for c in columns)
        return family, name, N, D, loss

    c = read_chinchilla(data)
    yield table("chinchilla", "chinchilla", c.N, c.D, c.loss)
    for name in ("cool_end", "hot", "lr_ablation_hot"):
        g = pd.read_csv(data / f"gemstones_{name}.csv")
        yield table("gemstones", f"gemstones {name}", g.params_active_precise, g.tokens, g.final_loss)
    s = pd.read_csv(data / "steplaw_dense.csv")
    s = s.loc[s.groupby(["N", "D"]).smooth_loss.idxmin()]
    yield table("step law", "step law, best of each size", s.N, s.D, s.smooth_loss)
    for key, p in pd.read_csv(data / "porian_isoflop.csv").query("loss < 6").groupby(PORIAN):
        yield table("porian", "porian " + " ".join(map(str, key[1:6])), p.N, p.D, p.loss)
    o = read_ladder(data)
    for name in OLMO:
        yield table("olmo", f"olmo {name}", o.N, o.D, o[name])


def score_fit(N: Array, D: Array, loss: Array, fitted: Array, rest: Array) -> list[float]:
    """Fit some runs and predict the rest.

    Returns:
        Error of the law, error of the prediction, coverage of the 80 % interval, and its half width, all in %.
    """
    fit = fit_loss_law(N[fitted], D[fitted], loss[fitted])
    y, (low, high) = loss[rest], fit.interval(N[rest], D[rest], mass=0.8)
    errors = [100 * float(np.mean(np.abs(f(N[rest], D[rest]) / y - 1))) for f in (fit.law, fit.predict)]
    return [*errors, 100 * float(np.mean((low <= y) & (y <= high))), 100 * float(np.mean((high - low) / 2 / y))]


def average_families(rows: list[tuple[str, list[float]]]) -> Array:
    """Return the mean over families of the means of each family."""
    names = dict.fromkeys(f for f, _ in rows)
    return np.mean([np.mean([v for f, v in rows if f == name], 0) for name in names], 0)


def compare_beyond(data: Path) -> None:
    """Print the errors of predictions beyond the data."""
    head = "".join(f"{f'law {s}':>8}{'error':>7}{'holds':>7}{'half':>7}" for s in (50, 70, 85))
    print(f"{'table':46}{head}")
    scores: dict[int, list[tuple[str, list[float]]]] = {50: [], 70: [], 85: []}
    for family, name, N, D, loss in read_tables(data):
        line = ""
        for share, rows in scores.items():
            lower = N * D <= np.quantile(N * D, share / 100)
            rows.append((family, score_fit(N, D, loss, lower, ~lower)))
            line += "{:8.2f}{:7.2f}{:7.0f}{:7.2f}".format(*rows[-1][1])
        print(f"{name:46}{line}", flush=True)
    for family in dict.fromkeys(f for f, _ in scores[70]):
        means = [np.mean([v for f, v in rows if f == family], 0) for rows in scores.values()]
        print(f"  {family:44}" + "".join("{:8.2f}{:7.2f}{:7.0f}{:7.2f}".format(*m) for m in means))
    means = [average_families(rows) for rows in scores.values()]
    print(f"{'mean over families':46}" + "".join("{:8.2f}{:7.2f}{:7.0f}{:7.2f}".format(*m) for m in means))


def compare_few_runs(data: Path) -> None:
    """Print the same errors for fits to a few random runs."""
    print(f"{'K':>4}{'law':>8}{'error':>7}{'holds':>7}{'half':>7}   at 70, five draws a table")
    for count in (8, 12, 20, 40):
        rows = []
        for family, _, N, D, loss in read_tables(data):
            lower = N * D <= np.quantile(N * D, 0.7)
            for seed in range(5 if lower.sum() >= count else 0):
                chosen = np.random.default_rng(seed).choice(np.flatnonzero(lower), count, replace=False)
                rows.append((family, score_fit(N, D, loss, chosen, ~lower)))
        print(f"{count:4d}" + "{:8.2f}{:7.2f}{:7.0f}{:7.2f}".format(*average_families(rows)), flush=True)


def predict_far(data: Path) -> None:
    """Print predictions of the 7B and 13B targets from the OLMo ladder."""
    o, every = read_ladder(data), pd.read_csv(data / "olmo_ladder_curves.csv")
    for name in OLMO:
        fit = fit_loss_law(o.N, o.D, o[name])
        for target, (run, N, D) in TARGETS.items():
            truth = float(every[every.run == run].sort_values("step")[name].iloc[-1])
            low, high = (float(v) for v in fit.interval(N, D, mass=0.8))
            place = "inside" if low <= truth <= high else "outside"
            print(
                f"{name:24}{target:>4}: truth {truth:.3f}, "
                f"predicted {float(fit.predict(N, D)):.3f} ({low:.3f}, {high:.3f}) "
                f"{place}; law {float(fit.law(N, D)):.3f}"
            )


def choose_forms(data: Path) -> None:
    """Print the errors of the chosen form beside those of fixed forms."""
    names = ("log-linear", "kaplan", "chinchilla", AVERAGE)
    print(f"{'':46}" + "".join(f"{n:>12}" for n in ("chosen", *names)))
    scores: dict[int, list[tuple[str, list[float]]]] = {50: [], 70: [], 85: []}
    for family, name, N, D, loss in read_tables(data):
        for share, rows in scores.items():
            lower = N * D <= np.quantile(N * D, share / 100)
            comparison = compare_forms(N[lower], D[lower], loss[lower])
            predict: dict[str, Callable[..., Array]] = {
                s.form: s.fit.predict for s in comparison.scores if s.fit is not None
            }
            predict[AVERAGE] = fit_loss_law(N[lower], D[lower], loss[lower]).predict
            errors = {
                k: 100 * float(np.mean(np.abs(f(N[~lower], D[~lower]) / loss[~lower] - 1))) for k, f in predict.items()
            }
            rows.append((family, [errors[comparison.chosen], *(errors[n] for n in names)]))
            print(
                f"{name:40}{share:>4}  " + "".join(f"{e:12.2f}" for e in rows[-1][1]) + f"  {comparison.chosen}",
                flush=True,
            )
    for share, rows in scores.items():
        print(f"{f'mean over families, lower {share} %':46}" + "".join(f"{e:12.2f}" for e in average_families(rows)))


def fit_optimum(data: Path) -> None:
    """Print exponents of the compute optimum by the three approaches."""
    pairs = pd.read_csv(data / "porian_optimal_pairs.csv").dropna(subset=["N_opt"]).set_index(PORIAN)
    print(
        f"{'Porian et al.: exponent of N_opt':46}{'published':>10}{'isoflop':>9}{'80 %':>16}{'OLS':>8}{'rms ln N':>10}"
    )
    for key, runs in pd.read_csv(data / "porian_isoflop.csv").groupby(PORIAN):
        published = pairs.loc[[key]]
        slope = np.polyfit(np.log(published.flops), np.log(published.N_opt), 1)[0]
        frontier = fit_isoflop(runs.N, runs.D, runs.loss, C=runs.flops)
        good = pd.DataFrame([(p.C, p.N) for p in frontier.points if p.status == "ok"], columns=["C", "N"])
        ols = np.polyfit(np.log(good.C), np.log(good.N), 1)[0]
        optima = {round(float(np.log(c)), 3): n for c, n in zip(published.flops, published.N_opt, strict=True)}
        deviations = [
            np.log(n / optima[k])
            for c, n in zip(good.C, good.N, strict=True)
            if (k := round(float(np.log(c)), 3)) in optima
        ]
        low, high = frontier.N.exponent_interval()
        print(
            f"{' '.join(map(str, key[1:6])):46}{slope:10.4f}{frontier.N.law.exponent:9.4f}"
            f"{f'({low:.3f}, {high:.3f})':>16}{ols:8.4f}"
            f"{float(np.sqrt(np.mean(np.square(deviations)))):10.3f}  {frontier.status}"
        )
    c = read_chinchilla(data)
    print("\nChinchilla's points; at 5.76e23 FLOPs:")
    table = make_approaches_table(compare_approaches(c.N, c.D, c.loss, C=c.C), 5.76e23).set_index("approach")
    print(table.drop(columns="status").T.map(lambda v: f"{v:.4g}").to_string())
    for family, name, N, D, loss in read_tables(data):
        if family == "porian":
            exponents = make_approaches_table(compare_approaches(N, D, loss), 1e21).set_index("approach")["N_exponent"]
            print(f"{name:46}" + "".join(f"{k:>10} {v:.3f}" for k, v in exponents.items()) + "   C = 6 N D")


def time_fits(data: Path) -> None:
    """Print the seconds of one fit, alone and with bootstraps."""
    c = read_chinchilla(data)
    for bootstrap in (0, 1000):
        taken = []
        for _ in range(7):
            start = time.perf_counter()
            fit_loss_law(c.N, c.D, c.loss, bootstrap=bootstrap)
            taken.append(time.perf_counter() - start)
        print(f"{bootstrap:5d} bootstraps: {min(taken):.3f} s, median {float(np.median(taken)):.3f}")


PARTS = {
    "beyond": compare_beyond,
    "few": compare_few_runs,
    "far": predict_far,
    "forms": choose_forms,
    "optimum": fit_optimum,
    "time": time_fits,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of tables")
    parser.add_argument("--only", default=",".join(PARTS))
    options = parser.parse_args()
    for part in options.only.split(","):
        if part not in PARTS:
            parser.error(f"--only takes {', '.join(PARTS)}; got {part}")
        print(f"\n{part}")
        PARTS[part](options.data)


if __name__ == "__main__":
    main()
