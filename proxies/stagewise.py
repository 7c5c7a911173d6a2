"""A learning-rate schedule found while training, stage by stage: AutoLRS (arXiv 2105.10762), at less than its price.

At the start of a stage a few rates are tried for a tenth of it each and rolled back; their losses are extrapolated to the
stage's end by a e^(bt) + c, and the stage is trained at the rate that a Gaussian process believes best. The paper tries ten
rates with a process of its own in every stage, as many steps as it trains. Here one process over (log rate, stage) is
carried along, so that a stage needs two or three; all candidates see the same batches, so that the noise of these is taken out.

Measured at width 64 (docs/math.md §3): it loses to a tuned WSD of as many steps in all by a quarter of a nat. A rate sixteen
times lower wins every short trial, whatever it costs later, so the rate falls after a third of the run and stays there.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import make_lsq_spline
from scipy.optimize import minimize_scalar

from proxies.checkpoints import copy_to_cpu, load_state, write_state
from proxies.config import ProxyConfig
from proxies.mixture import open_data
from proxies.optimizers import evaluation
from proxies.training import Run, evaluate, plan
from scaling.runs import Measurement

Array = NDArray[np.float64]

TRIAL = 0.1  # of a stage, as in the paper
LEAST_TRIAL = 8  # steps: fewer make no curve
PASSES, WORST = 10, 0.03  # of the cleaning, as in the paper
GRID = 129  # rates that the process is asked about
WORSE = 0.1  # nats: a candidate that is worse by more is as bad as one that diverged; assumed


@dataclass(frozen=True)
class Stage(Measurement):
    """The end of a stage: its measurement, with the rate that was chosen as `lr`, and how it was."""

    stage: int = 0
    candidates: tuple[tuple[float, float], ...] = ()  # rate, extrapolated loss at the stage's end over the first one's
    searched_tokens: int = 0  # of all stages so far: trained and rolled back


def autolrs(
    config: ProxyConfig,
    tokens: int,
    *,
    stages: int = 8,
    overhead: float = 0.3,
    rates: tuple[float, float] | None = None,
    save: Path | None = None,
    keep: Path | None = None,
    device: str | torch.device | None = None,
) -> Generator[Stage, None, None]:
    """Train for `tokens` tokens with a rate searched for every stage, yielding the end of each; the last is final.

    The rate is linear to config.lr over the warm-up and constant in a stage; config's own schedule is not used. Searching
    costs at most `overhead` times the tokens on top.

    rates: lowest and highest; default lr / 64 and 8 lr.
    save: gets the weights in the end, as of a run with the schedule "constant".
    keep: gets the state after every stage; gone on from if it is there, bit for bit; removed on completion.

    Bad arguments raise ValueError here, before the first `next`.
    """
    config = config.model_copy(update={"schedule": "constant"})
    cut = plan(config, tokens)
    low, high = rates or (config.lr / 64, config.lr * 8)
    if not 0 < low <= config.lr <= high:
        raise ValueError(f"needed 0 < lowest <= lr <= highest rate, got {low:g}, {config.lr:g}, {high:g}")
    if stages < 1:
        raise ValueError(f"needed at least one stage, got {stages}")
    warm = math.ceil(config.warmup_tokens / config.batch_tokens)
    ends = [warm + (cut.steps - warm) * (i + 1) // stages for i in range(stages)]
    shortest = (cut.steps - warm) // stages
    trial = max(LEAST_TRIAL, round(TRIAL * shortest))
    tries = math.floor(overhead * shortest / trial + 1e-9)
    if tries < 2:
        raise ValueError(
            f"needed stages of {math.ceil(2 * trial / overhead) if overhead > 0 else 'any'} steps (two candidates of "
            f"{trial} steps for {overhead:g} of it), got {shortest}: fewer stages, more tokens, a smaller batch or more overhead"
        )
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    data = open_data(config)
    run = Run(config, cut, data.sha256, where)
    search = _Search(low, high, stages, [])
    settings = {"stages": stages, "overhead": overhead, "rates": [low, high], "tokens": cut.tokens}
    if keep is not None and keep.exists():
        saved = load_state(keep)
        if saved.get("autolrs") != settings:
            raise ValueError(f"needed a search with {settings} in {keep}, got {saved.get('autolrs')}: remove the file")
        run.restore(saved, keep)
        search.seen += [tuple(point) for point in saved["seen"]]
    return _stages(run, data, ends, trial, tries, search, settings, save, keep)


def _stages(
    run: Run,
    data: Any,
    ends: Sequence[int],
    trial: int,
    tries: int,
    search: _Search,
    settings: dict[str, Any],
    save: Path | None,
    keep: Path | None,
) -> Generator[Stage, None, None]:
    began, config = time.perf_counter(), run.config
    while run.step * config.batch_tokens < config.warmup_tokens:
        run.advance(data.windows)
    for number, end in enumerate(ends):
        if run.step >= end:
            continue
        here = run.snapshot()
        rate = search.rate_for(number - 1) if number else config.lr
        candidates: list[tuple[float, float]] = []
        first: Array | None = None
        for i in range(tries):
            if i:
                rate = search.propose(number)
            series = np.array([float(run.advance(data.windows, rate / config.lr)) for _ in range(trial)])
            run.load(here)
            first = series if first is None else first
            worse = predicted(series, first, end - here["step"])
            search.seen.append((math.log2(rate), number, worse))
            candidates.append((rate, worse))
        rate = search.rate_for(number)
        while run.step < end and not run.is_lost():
            run.advance(data.windows, rate / config.lr)
        lost = run.is_lost()
        with evaluation(run.optimizer):
            loss = math.nan if lost else evaluate(run.model, data.held)
            weights = copy_to_cpu(run.model.state_dict())
        at_end = lost or run.step == run.cut.steps
        point = Stage(
            tokens=run.tokens,
            loss=loss,
            lr=rate,
            train_loss=float(run.loss_sum) / max(run.loss_windows, 1),
            seconds=time.perf_counter() - began,
            final=at_end,
            diverged=lost or (at_end and not loss <= math.log(config.vocab)),
            stage=number,
            candidates=tuple(candidates),
            searched_tokens=trial * config.batch_tokens * len(search.seen),
        )
        run.loss_sum.zero_()
        run.loss_windows = 0
        if keep is not None and not at_end:
            write_state(run.file("trunk", autolrs=settings, seen=search.seen) | {"trunk": run.snapshot()}, keep)
        if at_end and save is not None and not lost:
            run.trunk = run.snapshot()
            measurement = {k: v for k, v in asdict(point).items() if k in Measurement.__dataclass_fields__}
            write_state(run.file("done", annealed={"model": weights, "measurement": measurement}), save)
        if at_end and keep is not None:
            keep.unlink(missing_ok=True)
        yield point
        if at_end:
            return


@dataclass
class _Search:
    """The rates tried so far and what is believed of the others: a Gaussian process over (log2 rate, stage)."""

    low: float
    high: float
    stages: int
    seen: list[tuple[float, int, float]]  # log2 rate, stage, extrapolated loss over that of the stage's first candidate

    @property
    def grid(self) -> Array:
        return np.linspace(math.log2(self.low), math.log2(self.high), GRID)

    def rate_for(self, stage: int) -> float:
        """The rate with the lowest expected loss at the end of a stage that has been searched."""
        return self._best(_botorch().PosteriorMean(self._process(), maximize=False), stage)

    def propose(self, stage: int) -> float:
        """The rate to try next: of the largest expected improvement on the stage's candidates, in logarithms.

        The first rate after the very first one has nothing to go by but that one: a quarter of it, where the range allows.
        """
        if len(self.seen) == 1:
            return max(2 ** (self.seen[0][0] - 2), self.low)
        best = min(worse for _, at, worse in self.seen if at == stage)
        gain = _botorch().LogExpectedImprovement(self._process(), best_f=best, maximize=False)
        return self._best(gain, stage)

    def _best(self, value: Any, stage: int) -> float:
        with torch.no_grad():
            values = value(self._inputs(self.grid, np.full(GRID, stage)).unsqueeze(1))
        return float(2.0 ** self.grid[int(values.argmax())])

    def _inputs(self, log_rates: Array, stages: NDArray[Any]) -> torch.Tensor:
        width = self.grid[-1] - self.grid[0]
        return torch.tensor(
            np.stack([(log_rates - self.grid[0]) / width, stages / max(self.stages - 1, 1)], -1), dtype=torch.float64
        )

    def _process(self) -> Any:
        bo = _botorch()
        log_rates, stages, worse = (np.array(column, float) for column in zip(*self.seen, strict=True))
        model = bo.SingleTaskGP(self._inputs(log_rates, stages), torch.tensor(worse, dtype=torch.float64)[:, None])
        bo.fit_gpytorch_mll(bo.ExactMarginalLogLikelihood(model.likelihood, model))
        return model


def _botorch() -> SimpleNamespace:
    """What is needed of botorch and gpytorch, imported when first asked for: two seconds that `train` does not pay."""
    with warnings.catch_warnings():
        # linear_operator compiles with torch.jit.script when it is imported, which newer torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        from botorch.acquisition import LogExpectedImprovement, PosteriorMean
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood
    return SimpleNamespace(
        ExactMarginalLogLikelihood=ExactMarginalLogLikelihood,
        LogExpectedImprovement=LogExpectedImprovement,
        PosteriorMean=PosteriorMean,
        SingleTaskGP=SingleTaskGP,
        fit_gpytorch_mll=fit_gpytorch_mll,
    )


def predicted(series: Array, first: Array, at: int) -> float:
    """Loss after `at` steps by a trial's losses (one a step), over that of the stage's first trial on the same batches.

    What the first one's curve has beyond a smooth one is the noise of the batches, and is taken from the others.
    """
    if not np.isfinite(series).all():
        return WORSE
    if series is first:
        return 0.0
    noise = first - smooth(np.arange(len(first), dtype=float), first)(np.arange(len(first)))
    difference = extrapolate(series - noise, at) - extrapolate(first - noise, at)
    return float(np.clip(difference, -WORSE, WORSE))


def smooth(steps: Array, losses: Array) -> Any:
    """A quadratic spline with one knot in the middle."""
    a, b = steps[0], steps[-1]
    return make_lsq_spline(steps, losses, np.r_[[a] * 3, (a + b) / 2, [b] * 3], k=2)


def clean(losses: Array) -> tuple[Array, Array]:
    """Steps and losses without spikes: ten times the worst 3 % of the first half are left out, as seen from a spline."""
    steps = np.arange(len(losses), dtype=float)
    for _ in range(PASSES):
        half = np.flatnonzero(steps < len(losses) / 2)
        drop = int(WORST * len(half))
        residual = np.abs(losses - smooth(steps, losses)(steps))[half]
        kept = np.ones(len(steps), bool)
        kept[half[np.argsort(residual)[len(half) - drop :]]] = False
        steps, losses = steps[kept], losses[kept]
    return steps, losses


def extrapolate(losses: Array, at: int) -> float:
    """a e^(bt) + c, b < 0, fitted to one loss a step, cleaned, at step `at`: b by a search in one dimension, a and c by
    least squares. Its time constant lies between two steps and the horizon.
    """
    steps, losses = clean(losses)

    def solved(log_time: float) -> tuple[float, Array]:
        columns = np.stack([np.exp(-steps / math.exp(log_time)), np.ones_like(steps)], -1)
        solution, *_ = np.linalg.lstsq(columns, losses, rcond=None)
        return float(((columns @ solution - losses) ** 2).sum()), solution

    ends = (math.log(2.0), math.log(max(at, 4)))
    tried = np.linspace(*ends, 25)
    start = int(np.argmin([solved(x)[0] for x in tried]))
    around = (tried[max(start - 1, 0)], tried[min(start + 1, len(tried) - 1)])
    best = float(minimize_scalar(lambda x: solved(x)[0], bounds=around, method="bounded").x)
    a, c = solved(best)[1]
    return float(a * math.exp(-at / math.exp(best)) + c)
