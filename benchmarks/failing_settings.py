"""Search plain Optuna studies in which about half of the settings fail, with our sampler and with Optuna's.

    OMP_NUM_THREADS=1 python -m benchmarks.failing_settings [--seeds 20] [--trials 40] [--samplers ours,tpe,gp]

A failed trial raises an exception. For each problem and sampler: medians over seeds of the regret after half of the
trials and after all of them, that is the best value so far minus the lowest value of settings that do not fail; the
mean number of failures in the last 20 trials; and the wall-clock seconds per trial.

    edge       2 parameters; the slope leads into the failing half, so the optimum lies on its border
    memory     learning rate, width and batch size; a large width and batch fail, and are better
    branin     Branin's function; two of its three minima lie in the failing half
    ball       4 parameters; everything outside a ball fails, and the unconstrained minimum lies outside
    hartmann6  6 parameters; fails where their sum is above 3; the unconstrained minimum lies inside
    optimizer  learning rate and a choice of 4 optimizers, two of which always fail
    flaky      a bowl; nothing fails because of its settings, but one trial in ten fails at random
    pruned     a bowl that is reported in 9 steps and ended by Optuna's median pruner; nothing fails
    misled     the same, but good settings start slowly, so that the pruner ends many of the best
    halving    as pruned, with Optuna's successive halving
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from scipy.optimize import differential_evolution

from hpo.samplers.multi_fidelity import MultiFidelitySampler
from hpo.samplers.unit_cube import Cube

Settings = Mapping[str, Any]
Function = Callable[[Settings], float]
STEPS = 9
H6_A = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
)
H6_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


@dataclass(frozen=True)
class FailingProblem:
    """A function of settings, some of which fail.

    Attributes:
        space: The search space.
        loss: The loss of settings.
        fails: Whether settings fail.
        flaky: Probability that a trial fails whatever its settings are.
        pruner: Ends trials by the losses that they report in steps; None: they report none.
        slowness: How much longer a run takes to come down at x0 = 1 than at x0 = 0.
    """

    space: dict[str, BaseDistribution]
    loss: Function
    fails: Callable[[Settings], bool] = lambda x: False
    flaky: float = 0.0
    pruner: optuna.pruners.BasePruner | None = None
    slowness: float = 0.1

    @functools.cached_property
    def optimum(self) -> float:
        """The lowest loss of settings that do not fail."""
        cube = Cube(self.space)

        def score(point: Any) -> float:
            settings = cube.to_params(np.asarray(point))
            return 1e9 if self.fails(settings) else self.loss(settings)

        return min(
            float(differential_evolution(score, [(0, 1)] * len(self.space), rng=seed, tol=1e-10, maxiter=400).fun)
            for seed in range(3)
        )


def cube_of(n: int) -> dict[str, BaseDistribution]:
    return {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(n)}


def branin(x: Settings) -> float:
    a, b = x["x0"], x["x1"]
    t = b - 5.1 / (4 * math.pi**2) * a * a + 5 / math.pi * a - 6
    return t * t + 10 * (1 - 1 / (8 * math.pi)) * math.cos(a) + 10


def hartmann6(x: Settings) -> float:
    v = np.array([x[f"x{i}"] for i in range(6)])
    return float(-(np.array([1.0, 1.2, 3.0, 3.2]) * np.exp(-(H6_A * (v - H6_P) ** 2).sum(1))).sum())


def memory_loss(x: Settings) -> float:
    width, batch = math.log2(x["width"]), math.log2(x["batch"])
    lr = math.log10(x["lr"]) + 2.5 - 0.15 * (batch - 3)
    return 4.0 - 0.15 * (width - 6) - 0.1 * (batch - 3) + 0.15 * lr**2 + 0.01 * (batch - 4) ** 2


def bowl(x: Settings) -> float:
    return float(2 + sum((x[f"x{i}"] - c) ** 2 for i, c in enumerate((0.3, 0.6, 0.45))) + 0.05 * math.sin(9 * x["x0"]))


def ball_loss(x: Settings) -> float:
    return float(sum(w * (x[f"x{i}"] - 0.9) ** 2 for i, w in enumerate((1.0, 0.7, 0.4, 0.2))))


PROBLEMS = {
    "edge": FailingProblem(cube_of(2), lambda x: (1 - x["x0"]) + (x["x1"] - 0.3) ** 2, lambda x: x["x0"] > 0.5),
    "memory": FailingProblem(
        {
            "lr": FloatDistribution(1e-4, 1e-1, log=True),
            "width": IntDistribution(64, 1024, log=True),
            "batch": IntDistribution(1, 64, log=True),
        },
        memory_loss,
        lambda x: x["width"] * x["batch"] > 2048,
    ),
    "branin": FailingProblem(
        {"x0": FloatDistribution(-5.0, 10.0), "x1": FloatDistribution(0.0, 15.0)}, branin, lambda x: x["x0"] > 2.5
    ),
    # The ball has half of the cube's volume.
    "ball": FailingProblem(cube_of(4), ball_loss, lambda x: sum((v - 0.5) ** 2 for v in x.values()) > 0.564**2),
    "hartmann6": FailingProblem(cube_of(6), hartmann6, lambda x: sum(x.values()) > 3.0),
    "optimizer": FailingProblem(
        {
            "lr": FloatDistribution(1e-5, 1.0, log=True),
            "name": CategoricalDistribution(("adam", "lbfgs", "sgd", "shampoo")),
        },
        lambda x: (
            2 + 0.1 * (math.log10(x["lr"]) + {"adam": 3, "sgd": 1}.get(x["name"], 2)) ** 2 + 0.3 * (x["name"] == "sgd")
        ),
        lambda x: x["name"] in ("lbfgs", "shampoo"),
    ),
    "flaky": FailingProblem(cube_of(3), bowl, flaky=0.1),
    "pruned": FailingProblem(cube_of(3), bowl, pruner=optuna.pruners.MedianPruner(4, 1)),
    "misled": FailingProblem(cube_of(3), bowl, pruner=optuna.pruners.MedianPruner(4, 1), slowness=1.0),
    "halving": FailingProblem(cube_of(3), bowl, pruner=optuna.pruners.SuccessiveHalvingPruner(1, 3)),
}


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "ours":
        return MultiFidelitySampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed) if name == "tpe" else optuna.samplers.GPSampler(seed=seed)


def run(problem: FailingProblem, sampler: str, seed: int, trials: int) -> tuple[float, float, int, float]:
    """Return the regret after half of the trials and after all, the failures among the last 20, seconds per trial."""
    rng = np.random.default_rng(seed)
    names = list(problem.space)

    def objective(trial: optuna.Trial) -> float:
        x = {}
        for name in names:
            d = problem.space[name]
            if isinstance(d, FloatDistribution):
                x[name] = trial.suggest_float(name, d.low, d.high, log=d.log)
            elif isinstance(d, IntDistribution):
                x[name] = trial.suggest_int(name, d.low, d.high, log=d.log)
            else:
                x[name] = trial.suggest_categorical(name, d.choices)
        if problem.fails(x) or rng.random() < problem.flaky:
            raise RuntimeError("out of memory")
        loss = problem.loss(x)
        for step in range(STEPS if problem.pruner else 0):
            excess = 1.5 * (1 + problem.slowness * x["x0"])
            trial.report(loss + excess / (step + 1) - excess / STEPS, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return loss

    study = optuna.create_study(
        sampler=make_sampler(sampler, seed), pruner=problem.pruner or optuna.pruners.NopPruner()
    )
    began = time.perf_counter()
    study.optimize(objective, n_trials=trials, catch=(RuntimeError,))
    seconds = (time.perf_counter() - began) / trials
    values = [t.value if t.state == TrialState.COMPLETE and t.value is not None else math.inf for t in study.trials]
    failures = sum(t.state == TrialState.FAIL for t in study.trials[-20:])
    return min(values[: trials // 2]) - problem.optimum, min(values) - problem.optimum, failures, seconds


def main() -> None:
    # Optuna warns about its own experimental parts.
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--samplers", default="ours,tpe,gp")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=40)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    half = options.trials // 2
    print(f"{'problem':12}{'sampler':8}{f'at {half}':>10}{f'at {options.trials}':>10}{'failures':>10}{'s/trial':>9}")
    for name in options.problems.split(","):
        for sampler in options.samplers.split(","):
            runs = [run(PROBLEMS[name], sampler, seed, options.trials) for seed in range(options.seeds)]
            early, late = (float(np.median([r[i] for r in runs])) for i in (0, 1))
            failures, seconds = (float(np.mean([r[i] for r in runs])) for i in (2, 3))
            print(f"{name:12}{sampler:8}{early:10.4f}{late:10.4f}{failures:10.1f}{seconds:9.3f}", flush=True)


if __name__ == "__main__":
    main()
