"""Compare the surrogates: how well a search with each ends, and how well each fits the same runs.

    OMP_NUM_THREADS=1 python benchmarks/surrogates.py --bench FOLDER [--seeds 5] [--budget 5] [--problems branin,...]

FOLDER contains hpo_regret.py and its data: multi-fidelity problems whose optimum is known, with fidelities 1/27, 1/9,
1/3 and 1 of the target. The cost of a run is its fidelity.

Search: medians over seeds of the regret of `Search.best()` at costs 1, 2, 5; process seconds per ask and tell.

Fit: random settings, of which 9 of 20 runs are at 1/27, 6 at 1/9, 4 at 1/3 and 1 at the target (or three times that),
and 300 held-out settings at the target. "rank" is the Spearman correlation of predicted mean and truth. "nlpd" is the
mean negative log density of the truth under the predicted normal distribution without noise, over the better half of
the held-out settings (far above the best, losses are compressed before they are fitted), in units of the standard
deviation of that half. A forecast that knows only the mean and standard deviation of that half has 1.42. Medians over
seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
from scipy.stats import norm, spearmanr

from hpo.samplers.names import MODEL_SAMPLERS
from hpo.samplers.unit_cube import Cube
from scaling.laws.compute import Fidelity

# Fidelity, and the number of runs there among 20.
MIX = {1 / 27: 9, 1 / 9: 6, 1 / 3: 4, 1.0: 1}


def load_problems(folder: Path) -> ModuleType:
    path = folder / "hpo_regret.py"
    spec = importlib.util.spec_from_file_location("hpo_regret", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ValueError(f"needed a folder with hpo_regret.py, got {folder}: give it with --bench")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_searches(bench: ModuleType, problem: Any, sampler: str, seeds: Sequence[int], budget: float) -> list[float]:
    """Return the median regret of the recommendation at each cost up to the budget, then the seconds per ask."""
    runs = [bench.run(problem, seed, budget, {"sampler": sampler}) for seed in seeds]
    costs = [c for c in (1, 2, 5) if c <= budget]
    regrets = [float(np.median([marks[c][1] for marks, _, _ in runs if c in marks])) for c in costs]
    return [*regrets, float(np.mean([seconds for _, seconds, _ in runs]))]


def measure_fits(problem: Any, surrogate: str, seeds: Sequence[int], times: int) -> list[float]:
    """Return the median rank correlation, nlpd and seconds per fit, for fits to 20 * times runs."""
    from hpo.surrogate.deep_kernels import fit_deep_kernels, fit_nngp_kernel
    from hpo.surrogate.fitting import fit_bowl_kernel, fit_surrogate
    from hpo.surrogate.inputs import compute_fidelity_coordinates

    fitter = {"bowl": fit_bowl_kernel, "deep": fit_deep_kernels, "nngp": fit_nngp_kernel}[surrogate]
    cube, scores = Cube(problem.space()), []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        z = np.repeat(list(MIX), [n * times for n in MIX.values()])
        seen = cube.snap(rng.random((len(z), len(cube.space))))
        y = np.array([problem.f(cube.to_params(point), fidelity) for point, fidelity in zip(seen, z, strict=True)])
        held_out = cube.snap(rng.random((300, len(cube.space))))
        truth = np.array([problem.f(cube.to_params(point), 1.0) for point in held_out])
        coordinates = compute_fidelity_coordinates([Fidelity(1.0, fidelity) for fidelity in z], Fidelity(1.0, 1.0))
        level = np.searchsorted(np.sort(list(MIX)), z).astype(np.int64)
        start = time.process_time()
        fit = fit_surrogate(cube.encode(seen), coordinates, level, y, fitter=fitter)
        seconds = time.process_time() - start
        mean, sd = fit.predict(cube.encode(held_out), np.zeros(2))
        better = truth <= np.median(truth)
        nlpd = -norm.logpdf(truth[better], mean[better], sd[better]).mean() - np.log(truth[better].std())
        scores.append((spearmanr(mean, truth).statistic, nlpd, seconds))
    return [float(x) for x in np.median(scores, axis=0)]


def main() -> None:
    # Optuna warns about its own experimental parts.
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="folder with hpo_regret.py")
    parser.add_argument("--problems", default="steplaw_dense_N,steplaw_dense215_D,branin")
    parser.add_argument("--samplers", default=",".join(MODEL_SAMPLERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=5.0)
    parser.add_argument("--only", choices=("fit", "search"))
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    bench = load_problems(options.bench)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for name in options.problems.split(","):
        problem = bench.PROBLEMS[name]()
        if options.only != "search":
            print(f"\n{name:20}{'runs':>6}{'rank':>8}{'nlpd':>8}{'s/fit':>8}", flush=True)
            for times in (1, 3):
                for sampler in options.samplers.split(","):
                    rank, nlpd, seconds = measure_fits(problem, MODEL_SAMPLERS[sampler], seeds, times)
                    print(f"  {sampler:18}{20 * times:6d}{rank:8.3f}{nlpd:8.2f}{seconds:8.2f}", flush=True)
        if options.only != "fit":
            print(f"\n{name:20}" + "".join(f"{c:>10d}" for c in (1, 2, 5) if c <= options.budget) + f"{'s/ask':>8}")
            for sampler in options.samplers.split(","):
                *regrets, seconds = measure_searches(bench, problem, sampler, seeds, options.budget)
                print(f"  {sampler:18}" + "".join(f"{r:10.4g}" for r in regrets) + f"{seconds:8.2f}", flush=True)


if __name__ == "__main__":
    main()
