"""Compare the answers that a finished study gives for its target, on planted studies.

    OMP_NUM_THREADS=1 python -m benchmarks.one_answer [--studies 60] [--noise 0.003,0.02] [--json FILE]

A planted study is the quickstart without training: three sizes, three rungs, lr and batch searched on log scales, a
target of 4 times the parameters and twice the tokens of the largest run. The loss is a law of N and D plus a lopsided
bowl around lr*(N, D) and B*(N, D), whose coefficients, exponents and widths are drawn for each study; far above lr* a
run diverges. Four answers are compared by their regret at the target, without noise:

    best       `Search.best()`, the sampler's model
    measured   the settings of the lowest loss at the largest run
    law        `scaling.recommend`
    printed    what `hpo best` prints: `best`, unless the model itself finds it worse where it was measured

The tables show the median and the 90th percentile of the regret, how often each answer is nearer than each other one,
and, for studies sorted by the model's probability that `best` beats `measured` at the largest run, how often it does so
at the target.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import FloatDistribution, IntDistribution

from hpo.search.search import Search
from hpo.study.answer import choose_answer
from scaling.advice.recommendation import recommend
from scaling.fitting.loss_law import FitError
from scaling.laws.compute import Fidelity

SIZES = (14_000.0, 43_000.0, 143_000.0)
TOKENS = (81_920, 737_280)
TARGET = Fidelity(4 * SIZES[-1], 2 * TOKENS[1])
SPACE = {"lr": FloatDistribution(5e-4, 0.25, log=True), "batch_seqs": IntDistribution(1, 16, log=True)}
SEQ_LEN = 128
ANSWERS = ("best", "measured", "law", "printed")


@dataclass(frozen=True)
class PlantedSearch:
    """A loss whose optimum is known at every fidelity.

    Attributes:
        alpha: Exponents of N and D in the loss law.
        lr: Optimum of the learning rate at the smallest run, and its exponents of N and D.
        batch: The same for the batch in tokens.
        curvature: Loss per squared unit of ln lr and of ln batch, in nats, and their correlation.
        skew: How much steeper the loss rises above lr* than below.
        noise: Standard deviation of one loss, in nats.
    """

    alpha: tuple[float, float]
    lr: tuple[float, float, float]
    batch: tuple[float, float, float]
    curvature: tuple[float, float, float]
    skew: float
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator, noise: float) -> PlantedSearch:
        """Draw a study. lr* stays within the searched range at every rung; B* may leave it beyond the ladder."""
        return cls(
            (rng.uniform(0.2, 0.4), rng.uniform(0.25, 0.45)),
            (math.exp(rng.uniform(math.log(4e-3), math.log(4e-2))), rng.uniform(-0.3, 0.1), rng.uniform(-0.3, 0.15)),
            (math.exp(rng.uniform(math.log(150), math.log(500))), rng.uniform(-0.1, 0.1), rng.uniform(0.1, 0.5)),
            (
                math.exp(rng.normal(math.log(0.04), 0.5)),
                math.exp(rng.normal(math.log(0.03), 0.5)),
                rng.uniform(-0.5, 0.2),
            ),
            rng.uniform(0.0, 0.4),
            noise,
        )

    def locate_optimum(self, at: Fidelity) -> tuple[float, float]:
        """Return ln lr* and ln B* at a fidelity."""
        sizes = math.log(at.N / SIZES[0]), math.log(at.D / TOKENS[0])
        lr, batch = ((math.log(c), a, b) for c, a, b in (self.lr, self.batch))
        return lr[0] + lr[1] * sizes[0] + lr[2] * sizes[1], batch[0] + batch[1] * sizes[0] + batch[2] * sizes[1]

    def compute_excess(self, lr: float, batch: float, at: Fidelity) -> float:
        """Return the loss above the optimum, in nats; infinity where the run diverges."""
        centre = self.locate_optimum(at)
        x, y = math.log(lr) - centre[0], math.log(batch) - centre[1]
        if x > 3.5:
            return math.inf
        a, b, r = self.curvature
        bowl = a * x * x + b * y * y + 2 * r * math.sqrt(a * b) * x * y
        return bowl * (1 + self.skew * math.tanh(x))

    def compute_loss(self, lr: float, batch: float, at: Fidelity) -> float:
        """Return the loss without noise."""
        base = 1.4 + 25 * at.N ** -self.alpha[0] + 60 * at.D ** -self.alpha[1]
        return base + self.compute_excess(lr, batch, at)


def run_study(planted: PlantedSearch, seed: int) -> dict[str, Any]:
    """Search a planted study and return the regret of each answer at the target."""
    rng = np.random.default_rng(seed)
    search = Search(SPACE, tokens=TOKENS, sizes=SIZES, target=TARGET, iterations=1, seed=seed)
    rows = []
    while (job := search.ask()) is not None:
        lr, batch = job.params["lr"], float(job.params["batch_seqs"] * SEQ_LEN)
        loss = planted.compute_loss(lr, batch, job.fidelity) + planted.noise * rng.standard_normal()
        search.tell(job, loss)
        row = {"N": job.fidelity.N, "D": job.fidelity.D, "lr": lr, "batch_tokens": batch, "loss": loss}
        rows.append(row | {"run_id": str(job.number), "diverged": not math.isfinite(loss)})
    answer = choose_answer(search)
    result = {"best": answer.extrapolated, "measured": answer.measured, "printed": answer.params}
    regrets = {
        name: planted.compute_excess(params["lr"], params["batch_seqs"] * SEQ_LEN, TARGET)
        for name, params in result.items()
        if params is not None
    }
    # No law, or no law of the settings, is as bad as a run that diverges.
    regrets["law"] = math.inf
    with contextlib.suppress(FitError):
        advice = recommend(pd.DataFrame(rows), N=TARGET.N, D=TARGET.D)
        if advice.lr is not None and advice.batch_tokens is not None:
            regrets["law"] = planted.compute_excess(advice.lr, advice.batch_tokens, TARGET)
    return regrets | {"probability": answer.probability}


def show(results: list[dict[str, Any]], noise: float) -> None:
    table = pd.DataFrame(results)
    print(f"\nnoise {noise:g} nats, {len(table)} studies: regret at the target, in nats")
    print(f"{'answer':10}{'median':>9}{'90 %':>9}   nearer than " + "".join(f"{name:>10}" for name in ANSWERS))
    for name in ANSWERS:
        own = table[name]
        wins = []
        for other in ANSWERS:
            differ = (own - table[other]).abs() > 1e-6
            wins.append(f"{(own < table[other])[differ].mean():10.2f}" if differ.any() else f"{'-':>10}")
        print(f"{name:10}{own.median():9.4f}{own.quantile(0.9):9.4f}{'':15}" + "".join(wins))
    print("model's probability that best beats measured, at the largest run -> studies, best nearer at the target")
    differ = table[(table["best"] - table["measured"]).abs() > 1e-6]
    for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 1.01)):
        part = differ[(differ["probability"] >= low) & (differ["probability"] < high)]
        nearer = f"{(part['best'] < part['measured']).mean():.2f}" if len(part) else "-"
        regrets = f"{part['best'].median():.4f} / {part['measured'].median():.4f}" if len(part) else ""
        print(f"  {low:.2f} to {min(high, 1):.2f}: {len(part):4d}  {nearer}  {regrets}", flush=True)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=60)
    parser.add_argument("--noise", default="0.003,0.02")
    parser.add_argument("--json", type=Path, help="write every study's regrets here")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    everything: dict[str, Any] = {}
    for noise in map(float, options.noise.split(",")):
        results, began = [], time.perf_counter()
        for seed in range(options.studies):
            planted = PlantedSearch.draw(np.random.default_rng(1000 + seed), noise)
            results.append(run_study(planted, seed))
            everything[str(noise)] = results
            if options.json is not None:
                options.json.write_text(json.dumps(everything))
        show(results, noise)
        print(f"{(time.perf_counter() - began) / options.studies:.1f} s per study")


if __name__ == "__main__":
    main()
