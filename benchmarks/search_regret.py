"""Regret of hpo.Search under noise, after a raised maximum, and where runs resume; time and memory of one ask.

    python benchmarks/search_regret.py noise --bench ../shared/bench --problems steplaw_dense_N --noise 0.002
    python benchmarks/search_regret.py raise --bench ../shared/bench --problems steplaw_dense_N
    python benchmarks/search_regret.py networks --seeds 10
    python benchmarks/search_regret.py ask --trials 100 1000 --sampler mfbo

noise     The problems of hpo_regret.py in the folder --bench with Gaussian noise in every loss, beside the noiseless
          search with the same seeds. The regret is computed without noise.
raise     A search whose largest run is 1/9 of the target for the first --before of its cost and is then extended twice,
          beside one that knew the target from the start.
networks  Two synthetic problems with seven parameters, some of them integers, whose runs resume.
ask       The time of one ask in a study of --trials finished trials.

Cost 1 is one run at the target fidelity, and numbers are medians over seeds. "observed" is the best loss at the highest
fidelity reached, "recommended" is Search.best().
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from scipy.optimize import minimize

from hpo import Job, Search

# Tokens that stand for fidelity 1.
UNIT = 27_000_000
LEVELS = (1 / 27, 1 / 9, 1 / 3, 1.0)


class Problem(Protocol):
    @property
    def optimum(self) -> float: ...

    def space(self) -> dict[str, BaseDistribution]: ...

    def f(self, x: dict[str, Any], z: float) -> float: ...


class PlantedNetwork:
    """A synthetic error in percent of a network after a share z of its epochs.

    It is a rotated bowl with ripples, whose optimum drifts with z, and it falls at a rate that depends on the learning
    rate.
    """

    def __init__(self, which: int) -> None:
        rng = np.random.default_rng(1000 + which)
        self.centre = rng.uniform(0.2, 0.8, 7)
        self.weight = rng.uniform(0.3, 2.0, 7) * np.array([3, 1.5, 1, 1, 0.6, 0.4, 0.2])
        self.mix = np.linalg.qr(rng.standard_normal((7, 7)))[0] * 0.3 + np.eye(7) * 0.8
        self.drift, self.phase = rng.normal(0, 0.12, 7), rng.uniform(0, 6, 7)
        fits = [
            minimize(self.error, rng.random(7), args=(1.0,), method="L-BFGS-B", bounds=[(0, 1)] * 7) for _ in range(40)
        ]
        # The optimum of the continuous relaxation, which integers cannot quite reach.
        self.optimum = float(min(fit.fun for fit in fits))

    def space(self) -> dict[str, BaseDistribution]:
        return {
            "lr": FloatDistribution(1e-5, 1e-1, log=True),
            "decay": FloatDistribution(1e-6, 1e-1, log=True),
            "momentum": FloatDistribution(0, 1),
            "depth": IntDistribution(1, 8),
            "width": IntDistribution(16, 1024, log=True),
            "batch": IntDistribution(4, 512, log=True),
            "dropout": FloatDistribution(0, 0.9),
        }

    def error(self, u: NDArray[np.float64], z: float) -> float:
        v = self.mix @ (u - self.centre - self.drift * math.log(1 / z) / math.log(27))
        bowl = float(self.weight @ (v * v))
        settled = 8 + 30 * bowl / (1 + 0.6 * bowl) + 0.45 * float(np.sin(7 * v + self.phase).sum())
        rate = 0.35 + 0.5 * math.exp(-3 * abs(u[0] - self.centre[0]))
        return settled + (1.8 + 3 * u[4]) * float(z**-rate - 1)

    def f(self, x: dict[str, Any], z: float) -> float:
        log = math.log
        u = [log(x["lr"] / 1e-5) / log(1e4), log(x["decay"] / 1e-6) / log(1e5), x["momentum"], (x["depth"] - 1) / 7]
        u += [log(x["width"] / 16) / log(64), log(x["batch"] / 4) / log(128), x["dropout"] / 0.9]
        return self.error(np.array(u), z)


@dataclass(frozen=True)
class SearchRun:
    """The result of one search.

    Attributes:
        marks: Observed and recommended regret at each checkpoint.
        seconds: CPU seconds of an evaluation.
    """

    marks: dict[float, tuple[float, float]]
    seconds: float


def run_search(
    problem: Problem,
    seed: int,
    checkpoints: Sequence[float],
    *,
    noise: float = 0.0,
    resumable: bool = False,
    raised_at: float | None = None,
    sampler: str = "mfbo",
) -> SearchRun:
    """Run one search until the last checkpoint.

    raised_at: cost at which the largest run is raised from 1/9 to 1 of the target.
    """
    rng = np.random.default_rng([seed, 99])
    largest = UNIT if raised_at is None else UNIT // 9
    search = Search(
        problem.space(),
        tokens=(UNIT // 27, largest),
        eta=3,
        seed=seed,
        resumable=resumable,
        cost=lambda fidelity: fidelity.D / UNIT,
        sampler=sampler,
    )
    spent, evaluations, seconds, top = 0.0, 0, 0.0, 0.0
    best: tuple[float, dict[str, Any]] | None = None
    marks: dict[float, tuple[float, float]] = {}
    while True:
        if raised_at is not None and largest < UNIT and spent >= raised_at - 1e-6:
            search.extend(UNIT)
            largest = UNIT
        start = time.process_time()
        job = search.ask()
        seconds += time.process_time() - start
        assert job is not None
        level = min(LEVELS, key=lambda share: abs(math.log(share * UNIT / job.fidelity.D)))
        price = level - (job.resume_tokens or 0) / UNIT
        if spent + price > checkpoints[-1] + 1e-6:
            break
        loss = problem.f(job.params, level) + noise * float(rng.standard_normal())
        search.tell(job, loss)
        spent += price
        evaluations += 1
        if level > top + 1e-9:
            top, best = level, None
        if level >= top - 1e-9 and (best is None or loss < best[0]):
            best = loss, job.params
        for mark in checkpoints:
            if mark not in marks and spent >= mark - 1e-6:
                marks[mark] = compute_regrets(problem, search, best)
    # Checkpoints that the next evaluation would have passed.
    for mark in checkpoints:
        if mark not in marks and spent >= 0.85 * mark:
            marks[mark] = compute_regrets(problem, search, best)
    return SearchRun(marks, seconds / max(evaluations, 1))


def compute_regrets(problem: Problem, search: Search, best: tuple[float, dict[str, Any]] | None) -> tuple[float, float]:
    assert best is not None
    return problem.f(best[1], 1.0) - problem.optimum, problem.f(search.best(), 1.0) - problem.optimum


def print_rows(name: str, runs: Sequence[SearchRun], checkpoints: Sequence[float]) -> None:
    for i, kind in enumerate(("observed", "recommended")):
        cells = ""
        for mark in checkpoints:
            values = [run.marks[mark][i] for run in runs if mark in run.marks]
            cells += f"{np.median(values):11.5f}" if values else f"{'-':>11s}"
        print(f"{name:34s}{kind:12s}{cells}   {np.mean([run.seconds for run in runs]):.3f} s", flush=True)


def load_problems(folder: Path) -> dict[str, Callable[[], Problem]]:
    """Load the problems of hpo_regret.py in a folder."""
    spec = importlib.util.spec_from_file_location("hpo_regret", folder / "hpo_regret.py")
    if spec is None or spec.loader is None or not (folder / "hpo_regret.py").is_file():
        raise SystemExit(f"no hpo_regret.py in {folder}: give its folder with --bench")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    problems: dict[str, Callable[[], Problem]] = module.PROBLEMS
    return problems


def time_asks(trials: int, sampler: str, parameters: int) -> None:
    """Time one ask and one best() in a study of `trials` finished trials on four rungs."""
    space: dict[str, BaseDistribution] = {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(parameters)}
    storage = optuna.storages.InMemoryStorage()

    def open_search() -> Search:
        return Search(
            space,
            tokens=(UNIT // 27, UNIT),
            storage=storage,
            name="asks",
            sampler=sampler,
            resumable=False,
            iterations=None if sampler == "mfbo" else 1000,
            cost=lambda fidelity: fidelity.D / UNIT,
        )

    old_worker = open_search()
    rng = np.random.default_rng(0)
    levels = old_worker.ladder.levels
    for number in range(trials):
        rung = int(rng.choice(4, p=[0.5, 0.25, 0.15, 0.1]))
        params = {name: float(rng.random()) for name in space}
        loss = sum((x - 0.5 - 0.05 * (3 - rung)) ** 2 for x in params.values()) + 0.3 * (3 - rung)
        user_attrs: dict[str, Any] = {
            "tokens": levels[rung],
            "N": 1.0,
            "config": number,
            "rung": rung,
            "continues": None,
        }
        user_attrs |= {"resumed_tokens": 0, "seeds": 1, "worker": "", "bracket": [number, 0, rung]}
        old_worker.study.add_trial(
            optuna.create_trial(params=params, distributions=space, value=loss, user_attrs=user_attrs)
        )
    times, new_times, answers = [], [], []

    def ask(search: Search, times: list[float]) -> Job:
        start = time.process_time()
        job = search.ask()
        times.append(time.process_time() - start)
        assert job is not None
        return job

    # A worker that has asked before and a new one take turns.
    for turn in range(12):
        old_worker.tell(ask(old_worker, times), 1.0 + 0.01 * turn)
        new_worker = open_search()
        old_worker.tell(ask(new_worker, new_times), 1.0 + 0.01 * turn)
        start = time.process_time()
        old_worker.best()
        answers.append(time.process_time() - start)
    # The first of each includes imports.
    times, new_times, answers = times[1:], new_times[1:], answers[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{sampler}, {parameters} parameters, {trials} trials: "
        f"ask {np.median(times) * 1e3:.1f} ms (at most {max(times) * 1e3:.1f}), "
        f"by a new worker {np.median(new_times) * 1e3:.1f} ms (at most {max(new_times) * 1e3:.1f}), "
        f"best {np.median(answers) * 1e3:.1f} ms, peak memory {peak:.2f} GiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("noise", "raise", "networks", "ask"))
    parser.add_argument("--bench", type=Path, default=Path("../shared/bench"))
    parser.add_argument("--problems", nargs="+", default=["steplaw_dense_N", "steplaw_dense215_D"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--checkpoints", type=float, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--noise", type=float, default=0.002)
    parser.add_argument("--before", type=float, default=1.0, help="cost spent below the raise")
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--parameters", type=int, nargs="+", default=[2, 7])
    parser.add_argument("--sampler", default="mfbo")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore")
    marks, seeds = sorted(options.checkpoints), range(options.seeds)
    if options.what == "ask":
        for parameters in options.parameters:
            for trials in options.trials:
                time_asks(trials, options.sampler, parameters)
        return
    print(f"{'median regret at cost':46s}" + "".join(f"{mark:11g}" for mark in marks))
    if options.what == "networks":
        for which in (0, 1):
            network = PlantedNetwork(which)
            runs = [run_search(network, s, marks, resumable=True, sampler=options.sampler) for s in seeds]
            print_rows(f"network {which}", runs, marks)
        return
    problems = load_problems(options.bench)
    for name in options.problems:
        problem = problems[name]()
        plain = [run_search(problem, s, marks, sampler=options.sampler) for s in seeds]
        print_rows(name, plain, marks)
        if options.what == "noise":
            noisy = [run_search(problem, s, marks, noise=options.noise, sampler=options.sampler) for s in seeds]
            print_rows(f"{name}, noise {options.noise:g}", noisy, marks)
        else:
            raised = [run_search(problem, s, marks, raised_at=options.before, sampler=options.sampler) for s in seeds]
            print_rows(f"{name}, raised at {options.before:g}", raised, marks)


if __name__ == "__main__":
    main()
