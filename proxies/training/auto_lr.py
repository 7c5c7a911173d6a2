"""A learning-rate schedule found while training, stage by stage, after AutoLRS (arXiv 2105.10762) and at less than its price.

At the start of a stage up to three rates, the one before first, are tried for about a tenth of it each and rolled back.
A trial ends in a cooldown to zero and is judged by its loss on the batches that come next: what a low rate gains by averaging
noise away, every candidate gains. A Gaussian process over (log rate, stage), carried along, chooses the next candidate and the
stage's rate. After the last stage the run cools down from its rate. The paper tries ten rates at a constant rate, extrapolates
their losses by a e^(bt) + c, has a process of its own in every stage, and pays as many steps as it trains.

Measured at width 64 (docs/math.md §3): it loses to a tuned WSD of as many steps in all by .11 nats, two thirds of them the price
of the tokens that it searches with. From a rate four times too high it won against WSD at that rate, from one four times too
low it lost: short trials still favour low rates.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from proxies.config.proxy import ProxyConfig
from proxies.config.steps import plan
from proxies.data.mixture import Reader, open_data
from proxies.model.optimizers import evaluation
from proxies.training.checkpoints import copy_to_cpu, load_state, write_state
from proxies.training.loop import evaluate
from proxies.training.run_state import Run
from scaling.common.measurement import Measurement
from scaling.laws.decay_shapes import DECAYS

Array = NDArray[np.float64]

TRIES = 3  # a stage, where they fit
LEAST_TRIAL = 8  # steps
COOLED = 0.5  # of a trial
# A stage's rate is at most so many times the one before, or as little: a short trial is not trusted further.
REACH = 2.0
KEEP_EVERY_S = 30.0
GRID = 65  # rates within REACH that the process is asked about
LOST = 1e9  # nats, for a loss that is not finite
WORSE = 0.1  # nats: a candidate that is worse by more is as bad as one that diverged; assumed


@dataclass(frozen=True)
class Stage(Measurement):
    """The end of a stage: its measurement, with the rate that was chosen as `lr`, and how it was."""

    stage: int = 0
    candidates: tuple[tuple[float, float], ...] = ()  # rate, its trial's annealed loss over the first one's
    searched_tokens: int = 0  # of all stages so far: trained and rolled back, and a third of those looked at


def autolrs(
    config: ProxyConfig,
    tokens: int,
    *,
    stages: int = 2,
    overhead: float = 0.3,
    rates: tuple[float, float] | None = None,
    save: Path | None = None,
    keep: Path | None = None,
    device: str | torch.device | None = None,
) -> Generator[Stage, None, None]:
    """Train for `tokens` tokens with a rate searched for every stage, yielding the end of each and last that of a cooldown.

    The rate is linear to config.lr over the warm-up, constant in a stage, and after the last one falls from its rate as
    config.cooldown and config.decay say; config's own schedule is not used. Searching costs at most `overhead` times the
    tokens on top.

    rates: lowest and highest; default lr / 64 and 8 lr.
    save: gets the weights in the end and the trunk before the cooldown, as of a run with the schedule "wsd".
    keep: gets the state after every search, every KEEP_EVERY_S seconds of training and after every stage; gone on from if
        it is there, bit for bit; removed on completion.

    Bad arguments raise ValueError here, before the first `next`.
    """
    config = config.model_copy(update={"schedule": "wsd"})
    cut = plan(config, tokens)
    low, high = rates or (config.lr / 64, config.lr * 8)
    if not 0 < low <= config.lr <= high or low == high:
        raise ValueError(
            f"needed 0 < lowest <= lr <= highest rate, and lowest < highest, got {low:g}, {config.lr:g}, {high:g}"
        )
    if stages < 1:
        raise ValueError(f"needed at least one stage, got {stages}")
    warm = math.ceil(config.warmup_tokens / config.batch_tokens)
    ends = [warm + (cut.trunk_steps - warm) * (i + 1) // stages for i in range(stages)]
    budget = overhead * ((cut.trunk_steps - warm) // stages)  # steps
    tries = min(TRIES, math.floor(budget / _price(LEAST_TRIAL) + 1e-9))
    if tries < 2:
        least = math.ceil(2 * _price(LEAST_TRIAL) / overhead) if overhead > 0 else "any"
        raise ValueError(
            f"needed stages of {least} steps (two candidates of {LEAST_TRIAL} steps for {overhead:g} of it), got "
            f"{(cut.trunk_steps - warm) // stages}: fewer stages, more tokens, a smaller batch or more overhead"
        )
    trial = max(n for n in range(LEAST_TRIAL, math.ceil(budget) + 1) if tries * _price(n) <= budget + 1e-9)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    data = open_data(config)
    run = Run(config, cut, data.sha256, where)
    search = _Rates(low, high, stages)
    settings = {"stages": stages, "overhead": overhead, "rates": [low, high], "tokens": cut.tokens}
    if keep is not None and keep.exists():
        saved = load_state(keep)
        if saved.get("autolrs") != settings:
            raise ValueError(f"needed a search with {settings} in {keep}, got {saved.get('autolrs')}: remove the file")
        run.restore(saved, keep)
        search.seen += [tuple(point) for point in saved["seen"]]
        search.chosen += saved["chosen"]
    return _stages(run, data, ends, trial, tries, search, settings, save, keep)


def _stages(
    run: Run,
    data: Any,
    ends: Sequence[int],
    trial: int,
    tries: int,
    search: _Rates,
    settings: dict[str, Any],
    save: Path | None,
    keep: Path | None,
) -> Generator[Stage, None, None]:
    began, config = time.perf_counter(), run.config

    def put_aside() -> float:
        if keep is not None:
            write_state(run.partial() | {"autolrs": settings, "seen": search.seen, "chosen": search.chosen}, keep)
        return time.perf_counter()

    while run.step * config.batch_tokens < config.warmup_tokens:
        run.advance(data.windows)
    for number, end in enumerate([*ends, run.cut.steps]):
        if run.step >= end:
            continue
        if number == len(ends):
            run.trunk = run.trunk or run.snapshot()
        elif number == len(search.chosen):
            _search(run, data.windows, search, number, trial, tries)
        rate, kept = search.chosen[-1], put_aside()
        while run.step < end and not run.is_lost():
            if time.perf_counter() - kept > KEEP_EVERY_S:
                kept = put_aside()
            middle = (run.tokens + min(run.tokens + config.batch_tokens, run.cut.tokens)) / 2
            run.advance(data.windows, run.factor(middle) * (rate / config.lr))
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
            candidates=tuple((tried, worse) for tried, at, worse in search.seen if at == number),
            searched_tokens=math.ceil(_price(trial) * config.batch_tokens * len(search.seen)),
        )
        run.loss_sum.zero_()
        run.loss_windows = 0
        if not at_end:
            put_aside()
        if at_end and save is not None and not lost:
            measurement = {k: v for k, v in asdict(point).items() if k in Measurement.__dataclass_fields__}
            write_state(run.file("done", annealed={"model": weights, "measurement": measurement}), save)
        if at_end and keep is not None:
            keep.unlink(missing_ok=True)
        yield point
        if at_end:
            return


def _search(run: Run, windows: Reader, search: _Rates, stage: int, trial: int, tries: int) -> None:
    """Try rates from where the run is, beginning with the one before, and choose; the run is left as it was."""
    here, first = run.snapshot(), math.nan
    before = search.chosen[-1] if search.chosen else run.config.lr
    for i in range(tries):
        rate = search.propose(stage, before) if i else before
        loss = _annealed(run, windows, rate / run.config.lr, trial)
        run.load(here)
        first = first if i else loss
        search.seen.append((rate, stage, float(np.clip(loss - first, -WORSE, WORSE))))
    search.chosen.append(search.rate_for(stage, before))


def _price(trial: int) -> float:
    """Steps that a trial of so many costs: half as many batches are looked at in the end, forwards only, a third each."""
    return trial + (trial // 2) / 3


def _annealed(run: Run, windows: Reader, share: float, steps: int) -> float:
    """Loss on the next steps // 2 batches after so many steps at a share of the peak rate, cooled to zero over the last."""
    cooled = int(COOLED * steps)
    for k in range(steps):
        u = max(0.0, (k - steps + cooled + 0.5) / cooled) if cooled else 0.0
        run.advance(windows, share * float(DECAYS[run.config.decay](u, run.config.lr_floor)))
    with evaluation(run.optimizer):
        loss = evaluate(run.model, windows.batch(run.windows_seen, steps // 2 * run.config.batch_seqs))
    return loss if math.isfinite(loss) else LOST


@dataclass
class _Rates:
    """The rates tried so far and what is believed of the others: a Gaussian process over (log rate, stage)."""

    low: float
    high: float
    stages: int
    # rate, stage, annealed loss over that of the stage's first candidate
    seen: list[tuple[float, int, float]] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)  # one a stage

    def rate_for(self, stage: int, before: float) -> float:
        """The rate with the lowest expected annealed loss in a stage that has been searched, within REACH of the one before."""
        return self._best(_botorch().PosteriorMean(self._process(), maximize=False), stage, before)

    def propose(self, stage: int, before: float) -> float:
        """The rate to try next: of the largest expected improvement on the stage's candidates, in logarithms.

        The first rate after the very first one has nothing to go by but that one: a half of it, where the range allows.
        """
        if len(self.seen) == 1:
            return max(before / 2, self.low)
        best = min(worse for _, at, worse in self.seen if at == stage)
        gain = _botorch().LogExpectedImprovement(self._process(), best_f=best, maximize=False)
        return self._best(gain, stage, before)

    def _best(self, value: Any, stage: int, before: float) -> float:
        near = np.geomspace(max(before / REACH, self.low), min(before * REACH, self.high), GRID)
        with torch.no_grad():
            values = value(self._inputs(near, np.full(GRID, stage)).unsqueeze(1))
        return float(near[int(values.argmax())])

    def _inputs(self, rates: Array, stages: NDArray[Any]) -> torch.Tensor:
        place = np.log(rates / self.low) / math.log(self.high / self.low)
        return torch.tensor(np.stack([place, stages / max(self.stages - 1, 1)], -1), dtype=torch.float64)

    def _process(self) -> Any:
        bo = _botorch()
        rates, stages, worse = (np.array(column, float) for column in zip(*self.seen, strict=True))
        model = bo.SingleTaskGP(self._inputs(rates, stages), torch.tensor(worse, dtype=torch.float64)[:, None])
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
