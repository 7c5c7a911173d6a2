"""Forecasts of a run's final loss from its first part, on public tables of real runs: error, and how often intervals hold.

    OMP_NUM_THREADS=1 python benchmarks/curves.py --data FOLDER

FOLDER holds olmo_ladder_curves.csv (decay to a tenth of the peak) and gemstones_hot.csv, gemstones_lr_ablation_hot.csv (constant
rate). Four forecasts of each end: the last value carried forward; the last value times the median ratio over the runs of other
sizes; `predict_end` with its default prior; with the prior learnt from the runs of other sizes; and corrected by them, too.
Sizes: N of the ladder, width of Gemstones. The default prior was set by hand after looking at these tables, the other two rows
know nothing of the size that they forecast, but the form was chosen by them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from scaling.common.arrays import Array
from scaling.curves.in_progress import FinishedRun, learn_prior, predict_end
from scaling.curves.schedules import make_logged_schedule

MASSES = (0.5, 0.8, 0.95)


@dataclass(frozen=True)
class CurveRun:
    size: str
    tokens: Array
    loss: Array
    done: FinishedRun

    def part(self, share: float) -> tuple[Array, Array]:
        early = self.tokens <= share * self.tokens[-1] * 1.001
        return self.tokens[early], self.loss[early]


def ladder(folder: Path, column: str) -> Iterator[CurveRun]:
    table = pd.read_csv(folder / "olmo_ladder_curves.csv").dropna(subset="optim/learning_rate_group0")
    for name, rows in table.groupby("run"):
        if "peteish" in str(name):  # pieces of the target runs
            continue
        tokens, loss = rows["throughput/total_tokens"].to_numpy(float), rows[column].to_numpy(float)
        schedule = make_logged_schedule(tokens, rows["optim/learning_rate_group0"].to_numpy(float))
        yield CurveRun(str(name).split("-")[0], tokens, loss, FinishedRun(tokens, loss, schedule))


def gemstones(path: Path) -> Iterator[CurveRun]:
    for _, rows in pd.read_csv(path).sort_values("tokens").groupby("run_name"):
        tokens, loss = rows["tokens"].to_numpy(float), rows["final_loss"].to_numpy(float)
        yield CurveRun(str(rows["width"].iloc[0]), tokens, loss, FinishedRun(tokens, loss))


def measure(name: str, runs: list[CurveRun], shares: tuple[float, ...]) -> None:
    sizes = sorted({run.size for run in runs})
    others = {size: [run for run in runs if run.size != size] for size in sizes}
    priors = {size: learn_prior([run.done for run in others[size]]) for size in sizes}
    for share in shares:
        rows: dict[str, list[tuple[float, float]]] = {}  # relative error, rank of the truth (NaN: no interval)
        for run in runs:
            t, y = run.part(share)
            end, at = run.loss[-1], run.tokens[-1]
            ratio = float(np.median([o.loss[-1] / o.part(share)[1][-1] for o in others[run.size]]))
            rows.setdefault("carried forward", []).append((y[-1] / end - 1, np.nan))
            rows.setdefault("median ratio of other sizes", []).append((y[-1] * ratio / end - 1, np.nan))
            known = {
                "default prior": {},
                "prior of other sizes": {"prior": priors[run.size]},
                "and corrected by them": {
                    "prior": priors[run.size],
                    "siblings": [o.done for o in others[run.size]],
                },
            }
            for label, given in known.items():
                answer = predict_end(t, y, at, schedule=run.done.schedule, **given)  # type: ignore[arg-type]
                rows.setdefault(label, []).append((answer.mean / end - 1, answer.probability_below(float(end))))
        for label, pairs in rows.items():
            error, rank = np.array(pairs).T
            held = "/".join(f"{100 * np.mean(2 * np.abs(rank - 0.5) <= mass):.0f}" for mass in MASSES)
            held = "" if np.isnan(rank).any() else f"   50/80/95 % hold {held}"
            print(
                f"{name:22s} {share:.0%} of {len(runs)} runs  {label:28s} mean |error| {100 * np.abs(error).mean():.3f} %"
                f"  mean {100 * error.mean():+.3f}  worst {100 * np.abs(error).max():.2f}{held}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tables")
    folder = parser.parse_args().data
    for column in ("c4_en_ce", "dolma_common-crawl_ce", "pile_ce"):
        measure(f"ladder {column.split('_ce')[0]}", list(ladder(folder, column)), (0.25, 0.5, 0.75))
    for name in ("gemstones_hot", "gemstones_lr_ablation_hot"):  # a quarter of ten points is two: too few
        measure(name[:22], list(gemstones(folder / f"{name}.csv")), (0.3, 0.5, 0.75))


if __name__ == "__main__":
    main()
