"""Training a proxy: a trunk that knows no horizon, then a cooldown that ends at exactly D tokens.

The trunk's state at the branch point is what a longer run of the same configuration resumes, so extending a run pays
only for the new tokens. A schedule with a horizon has no trunk: its branch point is the start, so a longer run starts
afresh. A resumed run is bitwise the uninterrupted one, on the same device with the same thread count.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from proxies.checkpoints import FORMAT, copy_to_cpu, load_state, load_weights, write_state
from proxies.config import ProxyConfig
from proxies.mixture import Data, Reader, open_data
from proxies.model import build, loss_of
from proxies.mup import rule_of
from proxies.optimizers import evaluation, make_optimizer, set_lr
from proxies.schedules import SCHEDULES, factor
from scaling.runs import Measurement

CHECK_EVERY = 8  # steps between looks at the training loss
# A run is lost when its training loss is above ln(vocab) + 1, a nat worse than guessing, at so many looks in a row after
# the warm-up: 64 steps, so that a spike from which a run recovers does not end it.
LOST_LOOKS = 8
EVAL_CHUNK = 16  # windows per forward pass; fixed, so that the same weights always give the same loss
# A trunk point costs the forward passes of the held-out windows, a third of training on as many tokens. Two points an
# octave, the first after three times the held-out tokens, keep all evaluation near a tenth of a run.
FIRST_POINT = 3
# On resuming: the data's hash is compared instead of its path; memory may be saved, at the price of the last bits.
FREE_TO_DIFFER = ("coordinate_check", "corpus", "eval_mixture", "eval_windows", "micro_seqs", "recompute")


@dataclass(frozen=True)
class Plan:
    """How D tokens are cut into steps."""

    tokens: int  # D, rounded down to whole windows
    trunk_steps: int  # full batches; 0 with a horizon
    steps: int  # all; the last batch may be smaller

    @property
    def cooldown_steps(self) -> int:
        return self.steps - self.trunk_steps


def plan(config: ProxyConfig, tokens: int) -> Plan:
    """Steps of a run of `tokens` tokens: floor((1 - cooldown) D / batch) full ones of trunk, the rest is cooldown.

    A schedule without a cooldown has all its full batches on the trunk, one with a horizon none. Raises ValueError if
    nothing is left for the cooldown, or the warm-up would not end before it (before the end, with a horizon).
    """
    windows, schedule = tokens // config.seq_len, SCHEDULES[config.schedule]
    steps = math.ceil(windows / config.batch_seqs)
    if schedule.has_horizon:
        if windows * config.seq_len <= config.warmup_tokens:
            least = (config.warmup_tokens // config.seq_len + 1) * config.seq_len
            raise ValueError(
                f"needed at least {least:,} tokens (one window more than the warm-up of {config.warmup_tokens:,} tokens), "
                f"got {tokens:,}: train longer, or shorten warmup_tokens"
            )
        return Plan(windows * config.seq_len, 0, steps)
    trunk_share = 1 - config.cooldown if schedule.cools else 1.0
    # The margin keeps a product such as 0.8 * 5 steps, a hair below 4 in binary, at 4.
    trunk = math.floor(trunk_share * windows / config.batch_seqs + 1e-9)
    no_cooldown = schedule.cools and trunk * config.batch_seqs >= windows
    if trunk < 1 or no_cooldown or trunk * config.batch_tokens < config.warmup_tokens:
        warm = max(1, math.ceil(config.warmup_tokens / config.batch_tokens))
        least = math.ceil(warm * config.batch_seqs / trunk_share) * config.seq_len
        cooled = ", one window of cooldown" if schedule.cools else ""
        raise ValueError(
            f"needed at least {least:,} tokens (a step of trunk, the warm-up of {config.warmup_tokens:,} tokens on it"
            f"{cooled}), got {tokens:,}: train longer, or shorten warmup_tokens or batch_seqs"
        )
    return Plan(windows * config.seq_len, trunk, steps)


def point_steps(config: ProxyConfig, trunk_steps: int) -> frozenset[int]:
    """Trunk steps (all but the last, with a horizon) after which the held-out loss is taken: about two an octave, wherever the run will end."""
    first = max(config.warmup_tokens, FIRST_POINT * config.eval_windows * config.seq_len, config.batch_tokens)
    octaves = math.log2(max(trunk_steps * config.batch_tokens / first, 0.5))
    points = (math.ceil(first * 2 ** (j / 2) / config.batch_tokens) for j in range(math.ceil(2 * octaves) + 2))
    return frozenset(p for p in points if p <= trunk_steps)


def train(
    config: ProxyConfig,
    tokens: int,
    *,
    resume: Path | None = None,
    save: Path | None = None,
    keep: Path | None = None,
    keep_every_s: float = 30.0,
    device: str | torch.device | None = None,
    init: Mapping[str, Tensor] | None = None,
) -> Generator[Measurement, None, None]:
    """Train for `tokens` tokens (rounded down to whole windows), yielding trunk points and last the annealed point.

    resume: a file written by `save` or `keep` for the same configuration and data. Its trunk goes on; if it was cut off
        in the cooldown of this very D, so does the cooldown. With a horizon only this very D goes on; another starts
        afresh, with a warning.
    save: gets the trunk's state at the branch point, then also the annealed weights and their measurement.
    keep: gets the whole state every `keep_every_s` seconds and when the run is cut off; removed on completion.
    device: CUDA if there is one, unless given. There matrix products are in bfloat16, unless config.precision says other.
    init: weights to start from instead of fresh ones (a warm start), by parameter name.

    A loss that is not finite, or that has been lost for long (LOST_LOOKS), ends the run with final=True, diverged=True,
    loss=NaN and the tokens trained so far. A final loss above ln(vocab), that of guessing, is reported with
    diverged=True too.
    Bad arguments raise ValueError here, before the first `next`.
    """
    cut = plan(config, tokens)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if resume is not None and init is not None:
        raise ValueError("needed resume or init, got both: a resumed run has its weights already")
    for name, path in (("save", save), ("keep", keep)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name}: needed a path in an existing folder, got {path}: create {path.parent}")
    data = open_data(config)
    run = Run(config, cut, data.sha256, where)
    if init is not None:
        load_weights(run.model, init)
    if resume is not None:
        run.restore(load_state(resume), resume)
    return _measurements(run, data, save, keep, keep_every_s)


class Run:
    """All that changes while a proxy trains: weights, moments, position, and the loss summed since the last point."""

    def __init__(self, config: ProxyConfig, cut: Plan, data_sha256: str, device: torch.device) -> None:
        self.config, self.cut, self.data_sha256, self.device = config, cut, data_sha256, device
        self.model = build(config).to(device)
        if config.compile:
            self.model.compile()  # in place: parameters keep their names
        self.names = tuple(name for name, _ in self.model.named_parameters())
        self.optimizer = make_optimizer(self.model, config)
        self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # kept there: reading it would stall steps
        self.loss_windows = 0
        self.look_sum, self.look_windows = torch.zeros_like(self.loss_sum), 0  # since the last look
        self.lost_looks = 0  # in a row
        self.trunk: dict[str, Any] | None = None  # the state at the branch point, once it is reached

    @property
    def windows_seen(self) -> int:
        return min(self.step * self.config.batch_seqs, self.cut.tokens // self.config.seq_len)

    @property
    def tokens(self) -> int:
        return self.windows_seen * self.config.seq_len

    def factor(self, tokens: float) -> float:
        """Share of the peak rate; only a step beyond the trunk may know where the run ends."""
        if self.step < self.cut.trunk_steps or self.cut.cooldown_steps == 0:
            return factor(self.config, tokens)
        return factor(self.config, tokens, branch=self.cut.trunk_steps * self.config.batch_tokens, end=self.cut.tokens)

    def advance(self, windows: Reader, share: float | None = None) -> Tensor:
        """One optimizer step at this share of the peak rate (default: the schedule's); the batch's loss, nats per token.

        Weights, moments and position change together, once the gradients are known.
        """
        start = self.windows_seen
        n = min(self.config.batch_seqs, self.cut.tokens // self.config.seq_len - start)
        x_bt, y_bt = (t.to(self.device, non_blocking=True) for t in windows.batch(start, n))
        # The rate in the middle of the batch: then the mean over warm-up and cooldown is that of the continuous
        # schedule, whatever the batch size, and no step gets rate 0.
        set_lr(self.optimizer, self.factor((start + n / 2) * self.config.seq_len) if share is None else share)
        loss = self.backward(x_bt, y_bt)
        with uninterrupted():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.count(loss, n)
        return loss

    def count(self, loss: Tensor, n: int) -> None:
        """A step was taken on n windows of this mean loss."""
        self.loss_sum += loss * n
        self.look_sum += loss * n
        self.loss_windows += n
        self.look_windows += n
        self.step += 1

    def measured(self, loss: float, seconds: float, *, final: bool = False, diverged: bool = False) -> Measurement:
        """The point here, with the mean training loss since the last one, which is counted anew from here."""
        train_loss = float(self.loss_sum) / self.loss_windows if self.loss_windows else math.nan
        self.loss_sum.zero_()
        self.loss_windows = 0
        return Measurement(
            self.tokens, loss, self.config.lr * self.factor(self.tokens), train_loss, seconds, final, diverged
        )

    def backward(self, x_bt: Tensor, y_bt: Tensor) -> Tensor:
        """Gradients of the batch's mean loss, by parts of micro_seqs sequences; that loss, nats per token."""
        total = torch.zeros((), device=self.device)
        micro = self.config.micro_seqs or len(x_bt)
        for x_pt, y_pt in zip(torch.split(x_bt, micro), torch.split(y_bt, micro), strict=True):
            with autocast(self.device, self.config.precision):
                loss = loss_of(self.model, x_pt, y_pt) * (len(x_pt) / len(x_bt))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def is_lost(self) -> bool:
        """A look at the training loss: whether it is not finite, or was far above guessing at the last LOST_LOOKS."""
        if self.look_windows and self.step % CHECK_EVERY == 0:
            high = float(self.look_sum) / self.look_windows > math.log(self.config.vocab) + 1
            self.lost_looks = self.lost_looks + 1 if high and self.tokens > self.config.warmup_tokens else 0
            self.look_sum.zero_()
            self.look_windows = 0
        return self.lost_looks >= LOST_LOOKS or not math.isfinite(self.loss_sum)

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state, on CPU."""
        state = {
            "step": self.step,
            "windows": self.windows_seen,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.loss_sum,
            "loss_windows": self.loss_windows,
            "look": [float(self.look_sum), self.look_windows, self.lost_looks],
        }
        copied: dict[str, Any] = copy_to_cpu(state)
        return copied

    def file(self, phase: Literal["trunk", "cooldown", "done"], **more: Any) -> dict[str, Any]:
        """What is written: the header, the trunk's state, and more."""
        return {
            "format": FORMAT,
            "config": self.config.model_dump(),
            "mup": {name: asdict(rule) for name, rule in rule_of(self.names, self.config).items()},
            "data_sha256": self.data_sha256,
            "phase": phase,
            "tokens": self.cut.tokens,
            "trunk": self.trunk,
            **more,
        }

    def partial(self) -> dict[str, Any]:
        if self.trunk is None:
            return self.file("trunk") | {"trunk": self.snapshot()}
        return self.file("cooldown", current=self.snapshot())

    def restore(self, saved: Mapping[str, Any], path: Path) -> None:
        """Go on from a file; ValueError if it belongs to another run or is already past this one's trunk."""
        ours = self.config.model_dump()
        theirs = ProxyConfig.model_validate(
            saved["config"]
        ).model_dump()  # settings younger than the file: their defaults
        wrong = [
            f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
            for name in sorted(ours.keys() | theirs.keys())
            if name not in FREE_TO_DIFFER and ours.get(name) != theirs.get(name)
        ]
        if saved["data_sha256"] != self.data_sha256:
            wrong.append(f"data: sha256 {saved['data_sha256'][:12]} there, {self.data_sha256[:12]} here")
        if saved["trunk"]["step"] > self.cut.trunk_steps:
            wrong.append(f"trunk: {saved['trunk']['step']} steps there, {self.cut.trunk_steps} here")
        if wrong:
            raise ValueError(
                f"needed a shorter run with the same settings to resume, got {path} with other "
                + "; ".join(wrong)
                + ": start afresh, or name the right file"
            )
        same_cooldown = saved["phase"] == "cooldown" and saved["tokens"] == self.cut.tokens
        if SCHEDULES[self.config.schedule].has_horizon and not same_cooldown and saved["phase"] != "trunk":
            warnings.warn(
                f"schedule {self.config.schedule!r} has a horizon: a run of {self.cut.tokens:,} tokens starts afresh, it "
                f"cannot go on from {path}, which is {saved['phase']} for {saved['tokens']:,}",
                stacklevel=3,
            )
        state = saved["current"] if same_cooldown else saved["trunk"]
        self.trunk = saved["trunk"] if same_cooldown else None
        self.load(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back, or on, to a snapshot."""
        self.model.load_state_dict(state["model"])
        # A copy: the optimizer takes tensors of the right kind as they are, and this one's trunk must stay as it is.
        self.optimizer.load_state_dict(copy_to_cpu(state["optimizer"]))
        self.loss_sum = state["loss_sum"].to(self.device, copy=True)
        self.loss_windows, self.step = state["loss_windows"], state["step"]
        look_sum, self.look_windows, self.lost_looks = state.get("look", (0.0, 0, 0))  # files before there were looks
        self.look_sum.fill_(look_sum)


def _measurements(
    run: Run,
    data: Data,
    save: Path | None,
    keep: Path | None,
    keep_every_s: float,
) -> Generator[Measurement, None, None]:
    began = kept = time.perf_counter()
    points = point_steps(run.config, run.cut.trunk_steps or run.cut.steps - 1)

    def measure(loss: float, *, final: bool = False, diverged: bool = False) -> Measurement:
        return run.measured(loss, time.perf_counter() - began, final=final, diverged=diverged)

    try:
        while True:
            at_branch, at_end = run.step == run.cut.trunk_steps, run.step == run.cut.steps
            # Nothing summed means that the point of this step was taken before the run was cut off.
            at_point = run.step in points and run.loss_windows > 0
            looked_at = at_branch or at_end or at_point or run.step % CHECK_EVERY == 0
            if looked_at and run.is_lost():
                last = measure(math.nan, final=True, diverged=True)
                break
            if at_point:
                with evaluation(run.optimizer):
                    point = measure(evaluate(run.model, data.held))
                left = time.perf_counter()
                yield point
                began += time.perf_counter() - left  # what the consumer does meanwhile is not training
            if at_branch and run.trunk is None:
                run.trunk = run.snapshot()
                if save is not None:
                    write_state(run.file("trunk"), save)
            if at_end:
                with evaluation(run.optimizer):
                    loss = evaluate(run.model, data.held)
                    last = measure(loss, final=True, diverged=not loss <= math.log(run.config.vocab))
                    annealed = {"model": copy_to_cpu(run.model.state_dict()), "measurement": asdict(last)}
                    if data.parts and save is not None:
                        annealed["by_source"] = {name: evaluate(run.model, part) for name, part in data.parts.items()}
                if save is not None:
                    write_state(run.file("done", annealed=annealed), save)
                break
            run.advance(data.windows)
            if keep is not None and time.perf_counter() - kept > keep_every_s:
                write_state(run.partial(), keep)
                kept = time.perf_counter()
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        if keep is not None:  # a step is whole or not begun, whenever a signal came
            write_state(run.partial(), keep)
        raise
    try:
        yield last
    finally:  # not before the measurement is out: an interrupt in between would lose both
        if keep is not None:
            keep.unlink(missing_ok=True)


@torch.no_grad()
def evaluate(model: nn.Module, windows: tuple[Tensor, Tensor]) -> float:
    """Mean loss over windows (inputs and next tokens, [n, t] each), nats per token."""
    x_nt, y_nt = windows
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    config: ProxyConfig = model.config  # type: ignore[assignment]
    with autocast(device, config.precision):
        for x_bt, y_bt in zip(torch.split(x_nt, EVAL_CHUNK), torch.split(y_nt, EVAL_CHUNK), strict=True):
            total += loss_of(model, x_bt.to(device), y_bt.to(device)).double() * len(x_bt)
    return float(total) / len(x_nt)


def autocast(device: torch.device, precision: Literal["float32", "bfloat16"] | None = None) -> Any:
    """Matrix products in bfloat16 if asked for, and on CUDA unless float32 is asked for; nothing otherwise."""
    if precision == "bfloat16" or (precision is None and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block. They only ever interrupt the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda n, _: came.append(n))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for n in came:
            signal.raise_signal(n)
