"""Training a proxy: a trunk at constant rate that knows no horizon, then a cooldown that ends at exactly D tokens.

The trunk's state at the branch point is what a longer run of the same configuration resumes, so extending a run pays
only for the new tokens. A resumed run is bitwise the uninterrupted one, on the same device with the same thread count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from proxies.checkpoints import FORMAT, copy_to_cpu, load_state, load_weights, write_state
from proxies.config import ProxyConfig
from proxies.data import Windows, held_out, load_corpus
from proxies.model import build, loss_of
from proxies.mup import rule_of
from proxies.optimizers import make_optimizer, set_lr
from proxies.schedules import wsd
from scaling.runs import Measurement

CHECK_EVERY = 8  # steps between looks at whether the loss is still finite
EVAL_CHUNK = 16  # windows per forward pass; fixed, so that the same weights always give the same loss
# A trunk point costs the forward passes of the held-out windows, a third of training on as many tokens. Two points an
# octave, the first after three times the held-out tokens, keep all evaluation near a tenth of a run.
FIRST_POINT = 3
FREE_TO_DIFFER = ("corpus", "eval_windows")  # on resuming: the data's hash is compared instead of its path


@dataclass(frozen=True)
class Plan:
    """How D tokens are cut into steps."""

    tokens: int  # D, rounded down to whole windows
    trunk_steps: int  # full batches
    steps: int  # trunk and cooldown; the last batch may be smaller

    @property
    def cooldown_steps(self) -> int:
        return self.steps - self.trunk_steps


def plan(config: ProxyConfig, tokens: int) -> Plan:
    """Steps of a run of `tokens` tokens: floor((1 - cooldown) D / batch) full ones of trunk, the rest is cooldown.

    Raises ValueError if nothing is left for the cooldown or the warm-up would not end on the trunk.
    """
    windows = tokens // config.seq_len
    # The margin keeps a product such as 0.8 * 5 steps, a hair below 4 in binary, at 4.
    trunk = math.floor((1 - config.cooldown) * windows / config.batch_seqs + 1e-9)
    if trunk < 1 or trunk * config.batch_seqs >= windows or trunk * config.batch_tokens < config.warmup_tokens:
        steps = max(1, math.ceil(config.warmup_tokens / config.batch_tokens))
        least = math.ceil(steps * config.batch_seqs / (1 - config.cooldown)) * config.seq_len
        raise ValueError(
            f"needed at least {least:,} tokens (a step of trunk, the warm-up of {config.warmup_tokens:,} tokens on it, "
            f"one window of cooldown), got {tokens:,}: train longer, or shorten warmup_tokens or batch_seqs"
        )
    return Plan(windows * config.seq_len, trunk, math.ceil(windows / config.batch_seqs))


def point_steps(config: ProxyConfig, trunk_steps: int) -> frozenset[int]:
    """Trunk steps after which the held-out loss is taken: about two an octave, wherever the run will end."""
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
        in the cooldown of this very D, so does the cooldown.
    save: gets the trunk's state at the branch point, then also the annealed weights and their measurement.
    keep: gets the whole state every `keep_every_s` seconds and when the run is cut off; removed on completion.
    device: CUDA if there is one, unless given. There the forward pass runs under bfloat16 autocast.
    init: weights to start from instead of fresh ones (a warm start), by parameter name.

    A loss that is not finite ends the run with final=True, diverged=True, loss=NaN and the tokens trained so far. A
    final loss above ln(vocab), that of guessing, is reported with diverged=True too.
    Bad arguments raise ValueError here, before the first `next`.
    """
    cut = plan(config, tokens)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if resume is not None and init is not None:
        raise ValueError("needed resume or init, got both: a resumed run has its weights already")
    for name, path in (("save", save), ("keep", keep)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name}: needed a path in an existing folder, got {path}: create {path.parent}")
    corpus = load_corpus(config.corpus, vocab=config.vocab)
    windows = Windows(corpus.train, config.seq_len, config.seed)
    held = held_out(corpus.val, config.seq_len, config.eval_windows)
    run = _Run(config, cut, corpus.sha256, where)
    if init is not None:
        load_weights(run.model, init)
    if resume is not None:
        run.restore(load_state(resume), resume)
    return _measurements(run, windows, held, save, keep, keep_every_s)


class _Run:
    """All that changes while a proxy trains: weights, moments, position, and the loss summed since the last point."""

    def __init__(self, config: ProxyConfig, cut: Plan, data_sha256: str, device: torch.device) -> None:
        self.config, self.cut, self.data_sha256, self.device = config, cut, data_sha256, device
        self.model = build(config).to(device)
        self.names = tuple(name for name, _ in self.model.named_parameters())
        self.optimizer = make_optimizer(self.model, config)
        self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # kept there: reading it would stall steps
        self.loss_windows = 0
        self.trunk: dict[str, Any] | None = None  # the state at the branch point, once it is reached

    @property
    def windows_seen(self) -> int:
        return min(self.step * self.config.batch_seqs, self.cut.tokens // self.config.seq_len)

    @property
    def tokens(self) -> int:
        return self.windows_seen * self.config.seq_len

    def factor(self, tokens: float) -> float:
        """Share of the peak rate; only a step of the cooldown may know where the run ends."""
        if self.step < self.cut.trunk_steps:
            return wsd(tokens, warmup_tokens=self.config.warmup_tokens)
        branch = self.cut.trunk_steps * self.config.batch_tokens
        return wsd(tokens, warmup_tokens=self.config.warmup_tokens, branch=branch, end=self.cut.tokens)

    def advance(self, windows: Windows) -> None:
        """One optimizer step. Weights, moments and position change only after the gradients are known."""
        start = self.windows_seen
        n = min(self.config.batch_seqs, self.cut.tokens // self.config.seq_len - start)
        x_bt, y_bt = (t.to(self.device, non_blocking=True) for t in windows.batch(start, n))
        # The rate in the middle of the batch: then the mean over warm-up and cooldown is that of the continuous
        # schedule, whatever the batch size, and no step gets rate 0.
        set_lr(self.optimizer, self.factor((start + n / 2) * self.config.seq_len))
        with autocast(self.device):
            loss = loss_of(self.model, x_bt, y_bt)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach() * n
        self.loss_windows += n
        self.step += 1

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state, on CPU."""
        state = {
            "step": self.step,
            "windows": self.windows_seen,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.loss_sum,
            "loss_windows": self.loss_windows,
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
        state = saved["current"] if same_cooldown else saved["trunk"]
        self.trunk = saved["trunk"] if same_cooldown else None
        self.model.load_state_dict(state["model"])
        # A copy: the optimizer takes tensors of the right kind as they are, and this one's trunk must stay as it is.
        self.optimizer.load_state_dict(copy_to_cpu(state["optimizer"]))
        self.loss_sum = state["loss_sum"].to(self.device, copy=True)
        self.loss_windows, self.step = state["loss_windows"], state["step"]


def _measurements(
    run: _Run,
    windows: Windows,
    held: tuple[Tensor, Tensor],
    save: Path | None,
    keep: Path | None,
    keep_every_s: float,
) -> Generator[Measurement, None, None]:
    began = kept = time.perf_counter()
    points = point_steps(run.config, run.cut.trunk_steps)
    whole = True  # false while a step is under way: such a state must not be kept

    def measure(loss: float, *, final: bool = False, diverged: bool = False) -> Measurement:
        train_loss = float(run.loss_sum) / run.loss_windows if run.loss_windows else math.nan
        run.loss_sum.zero_()
        run.loss_windows = 0
        lr = run.config.lr * run.factor(run.tokens)
        return Measurement(run.tokens, loss, lr, train_loss, time.perf_counter() - began, final, diverged)

    try:
        while True:
            at_branch, at_end = run.step == run.cut.trunk_steps, run.step == run.cut.steps
            # Nothing summed means that the point of this step was taken before the run was cut off.
            at_point = run.step in points and run.loss_windows > 0
            looked_at = at_branch or at_end or at_point or run.step % CHECK_EVERY == 0
            if looked_at and not math.isfinite(run.loss_sum):
                last = measure(math.nan, final=True, diverged=True)
                break
            if at_point:
                point = measure(evaluate(run.model, held))
                left = time.perf_counter()
                yield point
                began += time.perf_counter() - left  # what the consumer does meanwhile is not training
            if at_branch and run.trunk is None:
                run.trunk = run.snapshot()
                if save is not None:
                    write_state(run.file("trunk"), save)
            if at_end:
                loss = evaluate(run.model, held)
                last = measure(loss, final=True, diverged=not loss <= math.log(run.config.vocab))
                if save is not None:
                    annealed = {"model": copy_to_cpu(run.model.state_dict()), "measurement": asdict(last)}
                    write_state(run.file("done", annealed=annealed), save)
                break
            whole = False
            run.advance(windows)
            whole = True
            if keep is not None and time.perf_counter() - kept > keep_every_s:
                write_state(run.partial(), keep)
                kept = time.perf_counter()
    except (GeneratorExit, KeyboardInterrupt):
        # Cut off in the middle of a step, the weights may be half updated; the file kept before stays as it is.
        if keep is not None and whole:
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
    with autocast(device):
        for x_bt, y_bt in zip(torch.split(x_nt, EVAL_CHUNK), torch.split(y_nt, EVAL_CHUNK), strict=True):
            total += loss_of(model, x_bt.to(device), y_bt.to(device)).double() * len(x_bt)
    return float(total) / len(x_nt)


def autocast(device: torch.device) -> Any:
    """bfloat16 on CUDA, nothing elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
