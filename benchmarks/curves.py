"""Measure forecasts of the final loss of a run from its first part, on public tables of real runs: error and coverage.

    OMP_NUM_THREADS=1 python benchmarks/curves.py --data FOLDER

FOLDER holds olmo_ladder_curves.csv (decay to a tenth of the peak), and gemstones_hot.csv and
gemstones_lr_ablation_hot.csv (constant rate). Five forecasts of each end are compared: the last value carried forward;
the last value times the median ratio over the runs of other sizes; `predict_end` with its default prior; with the prior
learned from the runs of other sizes; and corrected by those runs, too. The size is N for the ladder and the width for
Gemstones. The default prior was set by hand after looking at these tables. The other two know nothing of the size that
they forecast, but the formula was chosen on them.
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
    """A run with its curve.

    Attributes:
        size: A name for its size.
        tokens: Training tokens at each point, 1-d.
        loss: Loss at each point, nats per token, 1-d.
        finished: The same as a finished run, with its schedule.
    """

    size: str
    tokens: Array
    loss: Array
    finished: FinishedRun

    def cut(self, share: float) -> tuple[Array, Array]:
        """Return (tokens, loss) up to this share of the tokens."""
        is_early = self.tokens <= share * self.tokens[-1] * 1.001
        return self.tokens[is_early], self.loss[is_early]


def read_ladder(folder: Path, column: str) -> Iterator[CurveRun]:
    """Yield the runs of the OLMo ladder, with the loss of one validation set."""
    table = pd.read_csv(folder / "olmo_ladder_curves.csv").dropna(subset="optim/learning_rate_group0")
    for name, rows in table.groupby("run"):
        # These are pieces of the target runs.
        if "peteish" in str(name):
            continue
        tokens, loss = rows["throughput/total_tokens"].to_numpy(float), rows[column].to_numpy(float)
        schedule = make_logged_schedule(tokens, rows["optim/learning_rate_group0"].to_numpy(float))
        yield CurveRun(str(name).split("-")[0], tokens, loss, FinishedRun(tokens, loss, schedule))


def read_gemstones(path: Path) -> Iterator[CurveRun]:
    """Yield the runs of a Gemstones table, at a constant rate."""
    for _, rows in pd.read_csv(path).sort_values("tokens").groupby("run_name"):
        tokens, loss = rows["tokens"].to_numpy(float), rows["final_loss"].to_numpy(float)
        yield CurveRun(str(rows["width"].iloc[0]), tokens, loss, FinishedRun(tokens, loss))


def measure(name: str, runs: list[CurveRun], shares: tuple[float, ...]) -> None:
    """Print the errors of each forecast from these shares of the tokens."""
    sizes = sorted({run.size for run in runs})
    others = {size: [run for run in runs if run.size != size] for size in sizes}
    priors = {size: learn_prior([run.finished for run in others[size]]) for size in sizes}
    for share in shares:
        # The relative error, and the rank of the truth (NaN without an interval).
        rows: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            t, y = run.cut(share)
            end, at = run.loss[-1], run.tokens[-1]
            ratio = float(np.median([o.loss[-1] / o.cut(share)[1][-1] for o in others[run.size]]))
            rows.setdefault("carried forward", []).append((y[-1] / end - 1, np.nan))
            rows.setdefault("median ratio of other sizes", []).append((y[-1] * ratio / end - 1, np.nan))
            options = {
                "default prior": {},
                "prior of other sizes": {"prior": priors[run.size]},
                "and corrected by them": {
                    "prior": priors[run.size],
                    "siblings": [o.finished for o in others[run.size]],
                },
            }
            for label, arguments in options.items():
                forecast = predict_end(t, y, at, schedule=run.finished.schedule, **arguments)  # type: ignore[arg-type]
                rows.setdefault(label, []).append((forecast.mean / end - 1, forecast.probability_below(float(end))))
        for label, pairs in rows.items():
            error, rank = np.array(pairs).T
            coverage = "/".join(f"{100 * np.mean(2 * np.abs(rank - 0.5) <= mass):.0f}" for mass in MASSES)
            coverage = "" if np.isnan(rank).any() else f"   50/80/95 % intervals cover {coverage}"
            print(
                f"{name:22s} {share:.0%} of {len(runs)} runs  {label:28s} mean |error| "
                f"{100 * np.abs(error).mean():.3f} %  mean {100 * error.mean():+.3f}  worst "
                f"{100 * np.abs(error).max():.2f}{coverage}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tables")
    folder = parser.parse_args().data
    for column in ("c4_en_ce", "dolma_common-crawl_ce", "pile_ce"):
        measure(f"ladder {column.split('_ce')[0]}", list(read_ladder(folder, column)), (0.25, 0.5, 0.75))
    # Not from a quarter: of ten points that is two, too few.
    for name in ("gemstones_hot", "gemstones_lr_ablation_hot"):
        measure(name[:22], list(read_gemstones(folder / f"{name}.csv")), (0.3, 0.5, 0.75))


if __name__ == "__main__":
    main()
