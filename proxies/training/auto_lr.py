"""AutoLRS: search the learning rate while training, stage by stage, after arXiv 2105.10762 and at a lower cost.

At the start of a stage up to three rates, the previous one first, are each tried for about a tenth of it and rolled
back. A trial ends in a cooldown to zero and is judged by its loss on the batches that come next: what a low rate gains
by averaging noise, every candidate gains. A Gaussian process over (log rate, stage), kept from stage to stage, chooses
the next candidate and the stage's rate. After the last stage the run cools down from its rate. The paper tries ten
rates at a constant rate, extrapolates their losses by a e^(bt) + c, uses a new process in every stage, and spends as
many steps on trials as on training.

Measured at width 64 (docs/math.md §3): it loses 0.11 nats to a tuned WSD schedule of as many steps in total, two thirds
of which are the cost of the tokens spent on trials. From a rate four times too high it won against WSD at that rate;
from one four times too low it lost: short trials still favour low rates.
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
from proxies.config.steps import plan_steps
from proxies.data.mixture import WindowReader, open_data
from proxies.model.optimizers import use_eval_weights
from proxies.training.checkpoints import copy_to_cpu, load_state, write_state
from proxies.training.loop import evaluate
from proxies.training.run_state import Run
from scaling.common.measurement import Measurement
from scaling.laws.decay_shapes import DECAYS

Array = NDArray[np.float64]

# Trials of a stage, if they fit.
TRIES = 3
# The shortest trial, in steps.
LEAST_TRIAL = 8
# The share of a trial that is its cooldown.
COOLED = 0.5
# A stage's rate differs from the previous one by at most this factor: a short trial is not trusted further.
REACH = 2.0
KEEP_EVERY_S = 30.0
# Rates within REACH at which the process is evaluated.
GRID = 65
# Stands for a loss that is not finite, in nats.
LOST = 1e9
# A candidate that is worse by more, in nats, counts as much as one that diverged. Assumed, not measured.
WORSE = 0.1


@dataclass(frozen=True)
class Stage(Measurement):
    """The end of a stage: a measurement whose `lr` is the chosen rate, and how it was chosen.

    Attributes:
        stage: Its number, from 0.
        candidates: For each trial its rate and its annealed loss minus the first trial's, in nats.
        searched_tokens: Tokens of all stages so far that were trained and rolled back, plus a third of those evaluated.
    """

    stage: int = 0
    candidates: tuple[tuple[float, float], ...] = ()
    searched_tokens: int = 0


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
    """Train with a learning rate that is searched for every stage.

    The rate rises linearly to `config.lr` over the warm-up, is constant in a stage, and falls from the last stage's
    rate as `config.cooldown` and `config.decay` say. The configuration's own schedule is not used.

    Args:
        config: The proxy.
        tokens: Training tokens, without those of trials.
        stages: The number of stages.
        overhead: Tokens of trials at most, as a share of `tokens`.
        rates: The lowest and the highest rate. Default: lr / 64 and 8 lr.
        save: Where the final weights and the trunk before the cooldown are written, as for a run with the schedule
            "wsd".
        keep: Where the state is written after every search, every `KEEP_EVERY_S` seconds of training and after every
            stage. If it exists, the run is continued from it bit for bit. It is removed on completion.
        device: The device. Default: CUDA if there is one.

    Yields:
        The end of each stage, and last that of the cooldown.

    Raises:
        ValueError: For bad arguments, before the first `next`.
    """
    config = config.model_copy(update={"schedule": "wsd"})
    cut = plan_steps(config, tokens)
    low, high = rates or (config.lr / 64, config.lr * 8)
    if not 0 < low <= config.lr <= high or low == high:
        raise ValueError(
            f"needed 0 < lowest <= lr <= highest rate, and lowest < highest, got {low:g}, {config.lr:g}, {high:g}"
        )
    if stages < 1:
        raise ValueError(f"needed at least one stage, got {stages}")
    warm = math.ceil(config.warmup_tokens / config.batch_tokens)
    ends = [warm + (cut.trunk_steps - warm) * (i + 1) // stages for i in range(stages)]
    budget = overhead * ((cut.trunk_steps - warm) // stages)
    tries = min(TRIES, math.floor(budget / _count_steps(LEAST_TRIAL) + 1e-9))
    if tries < 2:
        least = math.ceil(2 * _count_steps(LEAST_TRIAL) / overhead) if overhead > 0 else "any"
        raise ValueError(
            f"needed stages of {least} steps (two trials of {LEAST_TRIAL} steps for {overhead:g} of it), got "
            f"{(cut.trunk_steps - warm) // stages}: use fewer stages, more tokens, a smaller batch or more overhead"
        )
    trial = max(n for n in range(LEAST_TRIAL, math.ceil(budget) + 1) if tries * _count_steps(n) <= budget + 1e-9)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    data = open_data(config)
    run = Run(config, cut, data.sha256, where)
    search = _RateSearch(low, high, stages)
    settings = {"stages": stages, "overhead": overhead, "rates": [low, high], "tokens": cut.tokens}
    if keep is not None and keep.exists():
        saved = load_state(keep)
        if saved.get("autolrs") != settings:
            raise ValueError(f"needed a search with {settings} in {keep}, got {saved.get('autolrs')}: remove the file")
        run.restore(saved, keep)
        search.trials += [tuple(point) for point in saved["seen"]]
        search.chosen += saved["chosen"]
    return _run_stages(run, data, ends, trial, tries, search, settings, save, keep)


def _run_stages(
    run: Run,
    data: Any,
    ends: Sequence[int],
    trial: int,
    tries: int,
    search: _RateSearch,
    settings: dict[str, Any],
    save: Path | None,
    keep: Path | None,
) -> Generator[Stage, None, None]:
    began, config = time.perf_counter(), run.config

    def keep_state() -> float:
        if keep is not None:
            write_state(
                run.to_partial_file() | {"autolrs": settings, "seen": search.trials, "chosen": search.chosen}, keep
            )
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
        rate, kept_at = search.chosen[-1], keep_state()
        while run.step < end and not run.is_lost():
            if time.perf_counter() - kept_at > KEEP_EVERY_S:
                kept_at = keep_state()
            middle = (run.tokens + min(run.tokens + config.batch_tokens, run.cut.tokens)) / 2
            run.advance(data.windows, run.compute_factor(middle) * (rate / config.lr))
        lost = run.is_lost()
        with use_eval_weights(run.optimizer):
            loss = math.nan if lost else evaluate(run.model, data.held_out)
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
            candidates=tuple((tried, worse) for tried, at, worse in search.trials if at == number),
            searched_tokens=math.ceil(_count_steps(trial) * config.batch_tokens * len(search.trials)),
        )
        run.loss_sum.zero_()
        run.loss_windows = 0
        if not at_end:
            keep_state()
        if at_end and save is not None and not lost:
            measurement = {k: v for k, v in asdict(point).items() if k in Measurement.__dataclass_fields__}
            write_state(run.to_file("done", annealed={"model": weights, "measurement": measurement}), save)
        if at_end and keep is not None:
            keep.unlink(missing_ok=True)
        yield point
        if at_end:
            return


def _search(run: Run, windows: WindowReader, search: _RateSearch, stage: int, trial: int, tries: int) -> None:
    """Try rates from the run's position, the previous one first, and choose one. The run is restored."""
    start, first = run.snapshot(), math.nan
    previous = search.chosen[-1] if search.chosen else run.config.lr
    for i in range(tries):
        rate = search.propose(stage, previous) if i else previous
        loss = _run_trial(run, windows, rate / run.config.lr, trial)
        run.load(start)
        first = first if i else loss
        search.trials.append((rate, stage, float(np.clip(loss - first, -WORSE, WORSE))))
    search.chosen.append(search.choose(stage, previous))


def _count_steps(trial: int) -> float:
    """Return the cost of a trial in steps: half as many batches are evaluated at the end, a third of a step each."""
    return trial + (trial // 2) / 3


def _run_trial(run: Run, windows: WindowReader, share: float, steps: int) -> float:
    """Train at a share of the peak rate with a cooldown to zero; return the loss on the next steps // 2 batches."""
    cooled = int(COOLED * steps)
    for k in range(steps):
        u = max(0.0, (k - steps + cooled + 0.5) / cooled) if cooled else 0.0
        run.advance(windows, share * float(DECAYS[run.config.decay](u, run.config.lr_floor)))
    with use_eval_weights(run.optimizer):
        loss = evaluate(run.model, windows.batch(run.windows_seen, steps // 2 * run.config.batch_seqs))
    return loss if math.isfinite(loss) else LOST


@dataclass
class _RateSearch:
    """The trials so far, and a Gaussian process over (log rate, stage) fitted to them.

    Attributes:
        low: The lowest rate.
        high: The highest rate.
        stages: The number of stages.
        trials: For each trial its rate, its stage, and its annealed loss minus that of the stage's first trial.
        chosen: The chosen rate of each stage.
    """

    low: float
    high: float
    stages: int
    trials: list[tuple[float, int, float]] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)

    def choose(self, stage: int, previous: float) -> float:
        """Return the rate of least expected annealed loss in a searched stage, within REACH of the previous rate."""
        return self._find_best(_import_botorch().PosteriorMean(self._fit_process(), maximize=False), stage, previous)

    def propose(self, stage: int, previous: float) -> float:
        """Return the rate to try next: that of the largest expected log improvement on the stage's trials.

        With a single trial so far, half of its rate is tried if the range allows.
        """
        if len(self.trials) == 1:
            return max(previous / 2, self.low)
        best = min(worse for _, at, worse in self.trials if at == stage)
        gain = _import_botorch().LogExpectedImprovement(self._fit_process(), best_f=best, maximize=False)
        return self._find_best(gain, stage, previous)

    def _find_best(self, value: Any, stage: int, previous: float) -> float:
        near = np.geomspace(max(previous / REACH, self.low), min(previous * REACH, self.high), GRID)
        with torch.no_grad():
            values = value(self._make_inputs(near, np.full(GRID, stage)).unsqueeze(1))
        return float(near[int(values.argmax())])

    def _make_inputs(self, rates: Array, stages: NDArray[Any]) -> torch.Tensor:
        position = np.log(rates / self.low) / math.log(self.high / self.low)
        return torch.tensor(np.stack([position, stages / max(self.stages - 1, 1)], -1), dtype=torch.float64)

    def _fit_process(self) -> Any:
        botorch = _import_botorch()
        rates, stages, worse = (np.array(column, float) for column in zip(*self.trials, strict=True))
        model = botorch.SingleTaskGP(
            self._make_inputs(rates, stages), torch.tensor(worse, dtype=torch.float64)[:, None]
        )
        botorch.fit_gpytorch_mll(botorch.ExactMarginalLogLikelihood(model.likelihood, model))
        return model


def _import_botorch() -> SimpleNamespace:
    """Import what is needed from BoTorch and GPyTorch: two seconds that `train` should not pay."""
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
