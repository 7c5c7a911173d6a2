"""Regret of hpo.Search under noise, after a raised maximum, and where runs resume; time and memory of one ask.

    python benchmarks/search_regret.py noise --bench ../shared/bench --problems steplaw_dense_N --noise 0.002
    python benchmarks/search_regret.py raise --bench ../shared/bench --problems steplaw_dense_N
    python benchmarks/search_regret.py networks --seeds 10
    python benchmarks/search_regret.py ask --trials 100 1000 --sampler mfbo

noise: the problems of hpo_regret.py in the folder --bench, every loss with Gaussian noise, regret without it, beside the
noiseless search of the same seeds. raise: a search whose largest run is 1/9 of the target's for the first --before of
its cost, then extended twice, beside one that knew from the start. networks: two planted seven-parameter problems with
integers whose runs resume. Cost 1 is one run at the target fidelity; medians over seeds; "observed" is the best loss at
the highest fidelity reached, "recommended" is Search.best().
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

UNIT = 27_000_000  # tokens that stand for fidelity 1
LEVELS = (1 / 27, 1 / 9, 1 / 3, 1.0)


class Problem(Protocol):
    @property
    def optimum(self) -> float: ...

    def space(self) -> dict[str, BaseDistribution]: ...

    def f(self, x: dict[str, Any], z: float) -> float: ...


class Network:
    """Error in percent of a network after a share z of its epochs, planted: a rotated bowl with ripples, whose optimum
    drifts with z, and a rate of learning that depends on the learning rate."""

    def __init__(self, which: int) -> None:
        rng = np.random.default_rng(1000 + which)
        self.centre = rng.uniform(0.2, 0.8, 7)
        self.weight = rng.uniform(0.3, 2.0, 7) * np.array([3, 1.5, 1, 1, 0.6, 0.4, 0.2])
        self.mix = np.linalg.qr(rng.standard_normal((7, 7)))[0] * 0.3 + np.eye(7) * 0.8
        self.drift, self.phase = rng.normal(0, 0.12, 7), rng.uniform(0, 6, 7)
        fits = [
            minimize(self.error, rng.random(7), args=(1.0,), method="L-BFGS-B", bounds=[(0, 1)] * 7) for _ in range(40)
        ]
        self.optimum = float(
            min(fit.fun for fit in fits)
        )  # of the continuous relaxation: integers cannot quite reach it

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
    """What one search reached at each checkpoint: (observed, recommended), and the CPU seconds of an evaluation."""

    marks: dict[float, tuple[float, float]]
    seconds: float


def search(
    problem: Problem,
    seed: int,
    checkpoints: Sequence[float],
    *,
    noise: float = 0.0,
    resumable: bool = False,
    raised_at: float | None = None,
    sampler: str = "mfbo",
) -> SearchRun:
    """One search until the last checkpoint. raised_at: the cost at which the largest run is raised from 1/9 to 1."""
    rng = np.random.default_rng([seed, 99])
    largest = UNIT if raised_at is None else UNIT // 9
    it = Search(
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
            it.extend(UNIT)
            largest = UNIT
        began = time.process_time()
        job = it.ask()
        seconds += time.process_time() - began
        assert job is not None
        level = min(LEVELS, key=lambda share: abs(math.log(share * UNIT / job.fidelity.D)))
        price = level - (job.resume_tokens or 0) / UNIT
        if spent + price > checkpoints[-1] + 1e-6:
            break
        loss = problem.f(job.params, level) + noise * float(rng.standard_normal())
        it.tell(job, loss)
        spent += price
        evaluations += 1
        if level > top + 1e-9:
            top, best = level, None
        if level >= top - 1e-9 and (best is None or loss < best[0]):
            best = loss, job.params
        for mark in checkpoints:
            if mark not in marks and spent >= mark - 1e-6:
                marks[mark] = regrets(problem, it, best)
    for mark in checkpoints:  # what the next evaluation would have overrun
        if mark not in marks and spent >= 0.85 * mark:
            marks[mark] = regrets(problem, it, best)
    return SearchRun(marks, seconds / max(evaluations, 1))


def regrets(problem: Problem, it: Search, best: tuple[float, dict[str, Any]] | None) -> tuple[float, float]:
    assert best is not None
    return problem.f(best[1], 1.0) - problem.optimum, problem.f(it.best(), 1.0) - problem.optimum


def show(name: str, runs: Sequence[SearchRun], checkpoints: Sequence[float]) -> None:
    for i, kind in enumerate(("observed", "recommended")):
        cells = ""
        for mark in checkpoints:
            values = [run.marks[mark][i] for run in runs if mark in run.marks]
            cells += f"{np.median(values):11.5f}" if values else f"{'-':>11s}"
        print(f"{name:34s}{kind:12s}{cells}   {np.mean([run.seconds for run in runs]):.3f} s", flush=True)


def problems_of(folder: Path) -> dict[str, Callable[[], Problem]]:
    """The problems of hpo_regret.py in a folder."""
    spec = importlib.util.spec_from_file_location("hpo_regret", folder / "hpo_regret.py")
    if spec is None or spec.loader is None or not (folder / "hpo_regret.py").is_file():
        raise SystemExit(f"no hpo_regret.py in {folder}: give its folder with --bench")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    problems: dict[str, Callable[[], Problem]] = module.PROBLEMS
    return problems


def time_asks(trials: int, sampler: str, parameters: int) -> None:
    """One ask, and one best(), in a study of so many finished trials on four rungs."""
    space: dict[str, BaseDistribution] = {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(parameters)}
    storage = optuna.storages.InMemoryStorage()

    def opened() -> Search:
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

    it = opened()
    rng = np.random.default_rng(0)
    levels = it.ladder.levels
    for number in range(trials):
        rung = int(rng.choice(4, p=[0.5, 0.25, 0.15, 0.1]))
        params = {name: float(rng.random()) for name in space}
        loss = sum((x - 0.5 - 0.05 * (3 - rung)) ** 2 for x in params.values()) + 0.3 * (3 - rung)
        attrs: dict[str, Any] = {"tokens": levels[rung], "N": 1.0, "config": number, "rung": rung, "continues": None}
        attrs |= {"resumed_tokens": 0, "seeds": 1, "worker": "", "bracket": [number, 0, rung]}
        it.study.add_trial(optuna.create_trial(params=params, distributions=space, value=loss, user_attrs=attrs))
    times, fresh, answers = [], [], []

    def timed(search: Search, times: list[float]) -> Job:
        began = time.process_time()
        job = search.ask()
        times.append(time.process_time() - began)
        assert job is not None
        return job

    for turn in range(12):  # asks in turn by a worker that has asked before and by one that has just come
        it.tell(timed(it, times), 1.0 + 0.01 * turn)
        other = opened()
        it.tell(timed(other, fresh), 1.0 + 0.01 * turn)
        began = time.process_time()
        it.best()
        answers.append(time.process_time() - began)
    times, fresh, answers = times[1:], fresh[1:], answers[1:]  # the first imports
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{sampler}, {parameters} parameters, {trials} trials: ask {np.median(times) * 1e3:.1f} ms (most {max(times) * 1e3:.1f}), "
        f"of a new worker {np.median(fresh) * 1e3:.1f} ms (most {max(fresh) * 1e3:.1f}), best {np.median(answers) * 1e3:.1f} ms, peak memory {peak:.2f} GiB",
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
            network = Network(which)
            runs = [search(network, s, marks, resumable=True, sampler=options.sampler) for s in seeds]
            show(f"network {which}", runs, marks)
        return
    problems = problems_of(options.bench)
    for name in options.problems:
        problem = problems[name]()
        plain = [search(problem, s, marks, sampler=options.sampler) for s in seeds]
        show(name, plain, marks)
        if options.what == "noise":
            noisy = [search(problem, s, marks, noise=options.noise, sampler=options.sampler) for s in seeds]
            show(f"{name}, noise {options.noise:g}", noisy, marks)
        else:
            raised = [search(problem, s, marks, raised_at=options.before, sampler=options.sampler) for s in seeds]
            show(f"{name}, raised at {options.before:g}", raised, marks)


if __name__ == "__main__":
    main()
