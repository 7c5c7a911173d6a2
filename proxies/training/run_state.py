"""The state of a run: weights, moments, position, and what is written of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from proxies.config.proxy import ProxyConfig
from proxies.config.schedules import SCHEDULES, factor
from proxies.config.steps import StepPlan
from proxies.data.mixture import Reader
from proxies.model import mup
from proxies.model.mup import rule_of
from proxies.model.optimizers import CombinedOptimizer, make_optimizer, set_lr
from proxies.model.transformer import Transformer, build, loss_of
from proxies.training.checkpoints import FORMAT, copy_to_cpu, reading, take
from proxies.training.distributed import ALONE, Ranks, wrapped
from proxies.training.shards import Key
from scaling.common.measurement import Measurement
from scaling.common.signals import defer_signals

CHECK_EVERY = 8  # steps between looks at the training loss
# A run is lost when its training loss is above ln(vocab) + 1, a nat worse than guessing, at so many looks in a row after
# the warm-up: 64 steps, so that a spike from which a run recovers does not end it.
LOST_LOOKS = 8
# On resuming: the data's hash is compared instead of its path; memory and time may be saved, at the price of the last bits.
FREE_TO_DIFFER = (
    "compile",
    "coordinate_check",
    "corpus",
    "early_points",
    "eval_mixture",
    "eval_windows",
    "micro_seqs",
    "recompute",
)
FLAGS = (
    "differentiable",
    "maximize",
    "capturable",
)  # of torch's optimizers: how steps are taken is not the file's to say


class Run:
    """All that changes while a proxy trains: weights, moments, position, and the loss summed since the last point.

    On several ranks each has its own; what is read off it is the same on all of them.
    """

    def __init__(
        self, config: ProxyConfig, cut: StepPlan, data_sha256: str, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.cut, self.data_sha256, self.device, self.ranks = config, cut, data_sha256, device, ranks
        self.model = _empty(config) if ranks.engine == "fsdp2" else build(config).to(device)
        if config.compile:
            _compile(self.model, ranks)
        self.engine = wrapped(self.model, ranks.engine, device)  # the model as it is trained
        if ranks.engine == "fsdp2":  # no rank ever has the whole model
            self.model.to_empty(device=device)
            mup.init(self.model, config)
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
        mine = windows.batch(start, n, rank=self.ranks.rank, ranks=self.ranks.world)
        x_bt, y_bt = (t.to(self.device, non_blocking=True) for t in mine)
        # The rate in the middle of the batch: then the mean over warm-up and cooldown is that of the continuous
        # schedule, whatever the batch size, and no step gets rate 0.
        set_lr(self.optimizer, self.factor((start + n / 2) * self.config.seq_len) if share is None else share)
        loss = self.backward(x_bt, y_bt, n)
        with defer_signals():
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

    def backward(self, x_bt: Tensor, y_bt: Tensor, n: int | None = None) -> Tensor:
        """Gradients of the batch's mean loss, by parts of micro_seqs sequences a rank; that loss, nats per token.

        x_bt, y_bt: this rank's windows of the batch's n (default: all of it). Engines take the mean of the ranks' gradients,
        so each part weighs as its windows do; a rank with fewer parts than others joins them with one that weighs nothing.
        """
        n, world = len(x_bt) if n is None else n, self.ranks.world
        total = torch.zeros((), device=self.device)
        most = -(-n // world)  # windows of a rank
        micro = self.config.micro_seqs or most
        parts = list(zip(torch.split(x_bt, micro), torch.split(y_bt, micro), strict=True)) if len(x_bt) else []
        rounds = -(-most // micro)
        for i in range(rounds):
            if i < len(parts):
                (x_pt, y_pt), weight = parts[i], world * len(parts[i][0]) / n
            else:
                x_pt = y_pt = torch.zeros(1, self.config.seq_len, dtype=torch.int64, device=self.device)
                weight = 0.0
            with self.sending(i == rounds - 1):
                with autocast(self.device, self.config.precision):
                    loss = loss_of(self.engine, x_pt, y_pt) * weight
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return self.ranks.total(total) / world if world > 1 else total

    def sending(self, last: bool) -> Any:
        """DDP sums gradients over ranks once a step, after the last part; FSDP2 after each, so that none has them whole."""
        if isinstance(self.engine, nn.parallel.DistributedDataParallel) and not last:
            return self.engine.no_sync()
        return nullcontext()

    def is_lost(self) -> bool:
        """A look at the training loss: whether it is not finite, or was far above guessing at the last LOST_LOOKS."""
        if self.look_windows and self.step % CHECK_EVERY == 0:
            high = float(self.look_sum) / self.look_windows > math.log(self.config.vocab) + 1
            self.lost_looks = self.lost_looks + 1 if high and self.tokens > self.config.warmup_tokens else 0
            self.look_sum.zero_()
            self.look_windows = 0
        lost = self.lost_looks >= LOST_LOOKS or not math.isfinite(self.loss_sum)
        return bool(self.ranks.largest(lost)[0])

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
        """Go on from a run that `read_run` has read; ValueError if it is another one or already past this one's trunk."""
        with reading(path):
            self._restore(saved, path)

    def _restore(self, saved: Mapping[str, Any], path: Path) -> None:
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
                stacklevel=4,
            )
        like = self.layout()
        self.trunk = take(saved, "trunk", path, like) if same_cooldown else None
        self.load(take(saved, "current" if same_cooldown else "trunk", path, like))

    def layout(self) -> Callable[[Key], Tensor | None]:
        """Which parameter each tensor of a snapshot belongs to, by its place there."""
        named = dict(self.model.named_parameters())
        parts = self.optimizer.parts if isinstance(self.optimizer, CombinedOptimizer) else (self.optimizer,)
        numbered: list[list[Tensor]] = [[p for group in part.param_groups for p in group["params"]] for part in parts]

        def like(at: Key) -> Tensor | None:
            match at:
                case ("model", str(name)):
                    return named.get(name)
                case ("optimizer", "state", int(i), *_):
                    return numbered[0][i]
                case ("optimizer", "parts", int(part), "state", int(i), *_):
                    return numbered[part][i]
            return None

        return like

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back, or on, to a snapshot."""
        self.model.load_state_dict(state["model"])
        # A copy: the optimizer takes tensors of the right kind as they are, and this one's trunk must stay as it is.
        own = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(copy_to_cpu(state["optimizer"]))
        for group, mine in zip(self.optimizer.param_groups, own, strict=True):
            if wrong := [key for key in mine if key not in group or _kind(group[key]) != _kind(mine[key])]:
                raise TypeError(f"the optimizer's {', '.join(wrong)}")
            group.update({flag: mine[flag] for flag in FLAGS if flag in mine})
        for part in self.optimizer.parts if isinstance(self.optimizer, CombinedOptimizer) else (self.optimizer,):
            _check_fused(part)
        self.loss_sum = state["loss_sum"].to(self.device, copy=True)
        self.loss_windows, self.step = state["loss_windows"], state["step"]
        look_sum, self.look_windows, self.lost_looks = state.get("look", (0.0, 0, 0))  # files before there were looks
        self.look_sum.fill_(look_sum)


def _check_fused(optimizer: torch.optim.Optimizer) -> None:
    """TypeError when a state is not of its parameter's shape: torch's fused steps take that for granted, and write beside it."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            for name, value in optimizer.state.get(parameter, {}).items():
                shape = () if name == "step" else tuple(parameter.shape)
                if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                    raise TypeError(f"the optimizer's {name}: needed a tensor of shape {shape}")


def _kind(value: Any) -> Any:
    """Numbers are alike: some optimizers begin with None or 0 and go on with tensors."""
    return float if value is None or isinstance(value, int | float | Tensor) else type(value)


def _compile(model: Transformer, ranks: Ranks) -> None:
    """In place, so that parameters keep their names. FSDP2 gathers weights before each part of a model: part by part."""
    if ranks.engine != "fsdp2":
        model.compile()
        return
    for block in model.blocks:
        block.forward = torch.compile(block.forward)
    for part in ("rope_for", "stem", "head"):
        setattr(model, part, torch.compile(getattr(model, part)))


def _empty(config: ProxyConfig) -> Transformer:
    """A model that has shapes but no numbers."""
    with torch.device("meta"):
        return Transformer(config)


def autocast(device: torch.device, precision: Literal["float32", "bfloat16"] | None = None) -> Any:
    """Matrix products in bfloat16 if asked for, and on CUDA unless float32 is asked for; nothing otherwise."""
    if precision == "bfloat16" or (precision is None and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
