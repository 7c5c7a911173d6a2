"""The state of a run: weights, moments and position, and how it is saved and restored."""

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
from proxies.config.schedules import SCHEDULES, compute_lr_factor
from proxies.config.steps import StepPlan
from proxies.data.mixture import WindowReader
from proxies.model import mup
from proxies.model.mup import map_rules
from proxies.model.optimizers import CombinedOptimizer, make_optimizer, set_lr
from proxies.model.transformer import Transformer, build, compute_loss
from proxies.training.checkpoints import FORMAT, copy_to_cpu, explain_damage, materialize_tensors
from proxies.training.distributed import ALONE, Ranks, wrap_model
from proxies.training.shards import Key
from scaling.common.measurement import Measurement
from scaling.common.signals import defer_signals

# Steps between checks of the training loss.
CHECK_EVERY = 8
# A run is lost when its training loss is above ln(vocab) + 1, one nat worse than guessing, at this many checks in a row
# after the warm-up. That is 64 steps, so a spike from which a run recovers does not end it.
LOST_CHECKS = 8
# Settings that may differ on resuming. The data's hash is compared instead of its path. The settings that save memory
# or time change only the last bits.
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
# Flags of torch's optimizers that say how steps are taken, which a checkpoint must not change.
FLAGS = ("differentiable", "maximize", "capturable")


class Run:
    """Everything that changes while a proxy trains: weights, moments, position, and the loss since the last point.

    Each rank has its own run; the values that it reports are the same on all ranks.
    """

    def __init__(
        self, config: ProxyConfig, cut: StepPlan, data_sha256: str, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.cut, self.data_sha256, self.device, self.ranks = config, cut, data_sha256, device, ranks
        self.model = _build_empty(config) if ranks.engine == "fsdp2" else build(config).to(device)
        if config.compile:
            _compile_model(self.model, ranks)
        # The model as it is trained.
        self.engine = wrap_model(self.model, ranks.engine, device)
        # No rank ever holds the whole model.
        if ranks.engine == "fsdp2":
            self.model.to_empty(device=device)
            mup.init_parameters(self.model, config)
        self.names = tuple(name for name, _ in self.model.named_parameters())
        self.optimizer = make_optimizer(self.model, config)
        self.step = 0
        # Kept on the device: reading it would stall the steps.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.loss_windows = 0
        # The same since the last check, and the number of checks in a row that failed.
        self.check_sum, self.check_windows = torch.zeros_like(self.loss_sum), 0
        self.lost_checks = 0
        # The state at the branch point, once it is reached.
        self.trunk: dict[str, Any] | None = None

    @property
    def windows_seen(self) -> int:
        """Training windows used so far, of the whole batch on all ranks."""
        return min(self.step * self.config.batch_seqs, self.cut.tokens // self.config.seq_len)

    @property
    def tokens(self) -> int:
        """Tokens trained so far."""
        return self.windows_seen * self.config.seq_len

    def compute_factor(self, tokens: float) -> float:
        """Return the share of the peak rate at a position. Only a step beyond the trunk may know where the run ends."""
        if self.step < self.cut.trunk_steps or self.cut.cooldown_steps == 0:
            return compute_lr_factor(self.config, tokens)
        return compute_lr_factor(
            self.config, tokens, branch=self.cut.trunk_steps * self.config.batch_tokens, end=self.cut.tokens
        )

    def advance(self, windows: WindowReader, share: float | None = None) -> Tensor:
        """Take one optimizer step. Weights, moments and position change together, once the gradients are known.

        Args:
            windows: The training windows.
            share: The share of the peak rate. Default: the schedule's.

        Returns:
            The batch's loss, in nats per token.
        """
        start = self.windows_seen
        n = min(self.config.batch_seqs, self.cut.tokens // self.config.seq_len - start)
        mine = windows.batch(start, n, rank=self.ranks.rank, ranks=self.ranks.world)
        x_bt, y_bt = (t.to(self.device, non_blocking=True) for t in mine)
        # The rate in the middle of the batch: so its mean over warm-up and cooldown is that of the continuous schedule
        # for any batch size, and no step has rate 0.
        set_lr(self.optimizer, self.compute_factor((start + n / 2) * self.config.seq_len) if share is None else share)
        loss = self.backward(x_bt, y_bt, n)
        with defer_signals():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.count_step(loss, n)
        return loss

    def count_step(self, loss: Tensor, n: int) -> None:
        """Record that a step was taken on n windows with this mean loss."""
        self.loss_sum += loss * n
        self.check_sum += loss * n
        self.loss_windows += n
        self.check_windows += n
        self.step += 1

    def measure(self, loss: float, seconds: float, *, final: bool = False, diverged: bool = False) -> Measurement:
        """Return the measurement at this position and reset the mean training loss that it reports."""
        train_loss = float(self.loss_sum) / self.loss_windows if self.loss_windows else math.nan
        self.loss_sum.zero_()
        self.loss_windows = 0
        return Measurement(
            self.tokens, loss, self.config.lr * self.compute_factor(self.tokens), train_loss, seconds, final, diverged
        )

    def backward(self, x_bt: Tensor, y_bt: Tensor, n: int | None = None) -> Tensor:
        """Compute gradients of the batch's mean loss, in parts of `micro_seqs` sequences per rank.

        Engines take the mean of the ranks' gradients, so each part is weighted by its windows. A rank with fewer parts
        than others takes part with one of weight zero.

        Args:
            x_bt: This rank's inputs.
            y_bt: This rank's next tokens.
            n: Windows of the whole batch. Default: this rank's.

        Returns:
            The batch's mean loss, in nats per token.
        """
        n, world = len(x_bt) if n is None else n, self.ranks.world
        total = torch.zeros((), device=self.device)
        # The largest number of windows of a rank.
        most = -(-n // world)
        micro = self.config.micro_seqs or most
        parts = list(zip(torch.split(x_bt, micro), torch.split(y_bt, micro), strict=True)) if len(x_bt) else []
        rounds = -(-most // micro)
        for i in range(rounds):
            if i < len(parts):
                (x_pt, y_pt), weight = parts[i], world * len(parts[i][0]) / n
            else:
                x_pt = y_pt = torch.zeros(1, self.config.seq_len, dtype=torch.int64, device=self.device)
                weight = 0.0
            with self.defer_gradients(i == rounds - 1):
                with autocast(self.device, self.config.precision):
                    loss = compute_loss(self.engine, x_pt, y_pt) * weight
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return self.ranks.sum_over_ranks(total) / world if world > 1 else total

    def defer_gradients(self, last: bool) -> Any:
        """Make DDP sum gradients over ranks once a step, after the last part.

        FSDP2 sums after each part, so that no rank holds all gradients.
        """
        if isinstance(self.engine, nn.parallel.DistributedDataParallel) and not last:
            return self.engine.no_sync()
        return nullcontext()

    def is_lost(self) -> bool:
        """Return whether the training loss is not finite, or far above guessing at the last `LOST_CHECKS` checks."""
        if self.check_windows and self.step % CHECK_EVERY == 0:
            high = float(self.check_sum) / self.check_windows > math.log(self.config.vocab) + 1
            self.lost_checks = self.lost_checks + 1 if high and self.tokens > self.config.warmup_tokens else 0
            self.check_sum.zero_()
            self.check_windows = 0
        lost = self.lost_checks >= LOST_CHECKS or not math.isfinite(self.loss_sum)
        return bool(self.ranks.max_over_ranks(lost)[0])

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the state on CPU."""
        state = {
            "step": self.step,
            "windows": self.windows_seen,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.loss_sum,
            "loss_windows": self.loss_windows,
            "look": [float(self.check_sum), self.check_windows, self.lost_checks],
        }
        copied: dict[str, Any] = copy_to_cpu(state)
        return copied

    def to_file(self, phase: Literal["trunk", "cooldown", "done"], **more: Any) -> dict[str, Any]:
        """Return what a checkpoint holds: the header, the trunk's state, and more."""
        return {
            "format": FORMAT,
            "config": self.config.model_dump(),
            "mup": {name: asdict(rule) for name, rule in map_rules(self.names, self.config).items()},
            "data_sha256": self.data_sha256,
            "phase": phase,
            "tokens": self.cut.tokens,
            "trunk": self.trunk,
            **more,
        }

    def to_partial_file(self) -> dict[str, Any]:
        """Return what the checkpoint of an unfinished run holds."""
        if self.trunk is None:
            return self.to_file("trunk") | {"trunk": self.snapshot()}
        return self.to_file("cooldown", current=self.snapshot())

    def restore(self, saved: Mapping[str, Any], path: Path) -> None:
        """Continue from a saved run.

        Args:
            saved: What `read_run` returned.
            path: The checkpoint.

        Raises:
            ValueError: If it has other settings or data, or is already past this run's trunk.
        """
        with explain_damage(path):
            self._restore(saved, path)

    def _restore(self, saved: Mapping[str, Any], path: Path) -> None:
        ours = self.config.model_dump()
        # Settings that are newer than the file have their defaults.
        theirs = ProxyConfig.model_validate(saved["config"]).model_dump()
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
                + ": start a new run, or give the right file"
            )
        same_cooldown = saved["phase"] == "cooldown" and saved["tokens"] == self.cut.tokens
        if SCHEDULES[self.config.schedule].has_horizon and not same_cooldown and saved["phase"] != "trunk":
            warnings.warn(
                f"schedule {self.config.schedule!r} has a horizon: a run of {self.cut.tokens:,} tokens starts from the "
                f"beginning, it cannot continue {path}, which is {saved['phase']} for {saved['tokens']:,} tokens",
                stacklevel=4,
            )
        like = self.make_layout()
        self.trunk = materialize_tensors(saved, "trunk", path, like) if same_cooldown else None
        self.load(materialize_tensors(saved, "current" if same_cooldown else "trunk", path, like))

    def make_layout(self) -> Callable[[Key], Tensor | None]:
        """Return a function from a position in a snapshot to the parameter that its tensor belongs to."""
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
        """Set the state to a snapshot's."""
        self.model.load_state_dict(state["model"])
        # A copy, because the optimizer keeps tensors of the right kind as they are, and the trunk's must not change.
        own = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(copy_to_cpu(state["optimizer"]))
        for group, mine in zip(self.optimizer.param_groups, own, strict=True):
            if wrong := [key for key in mine if key not in group or _get_kind(group[key]) != _get_kind(mine[key])]:
                raise TypeError(f"the optimizer's {', '.join(wrong)}")
            group.update({flag: mine[flag] for flag in FLAGS if flag in mine})
        for part in self.optimizer.parts if isinstance(self.optimizer, CombinedOptimizer) else (self.optimizer,):
            _check_fused_state(part)
        self.loss_sum = state["loss_sum"].to(self.device, copy=True)
        self.loss_windows, self.step = state["loss_windows"], state["step"]
        # Files of the first versions have no checks.
        check_sum, self.check_windows, self.lost_checks = state.get("look", (0.0, 0, 0))
        self.check_sum.fill_(check_sum)


def _check_fused_state(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError if a state does not have its parameter's shape: torch's fused steps would write out of bounds."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            for name, value in optimizer.state.get(parameter, {}).items():
                shape = () if name == "step" else tuple(parameter.shape)
                if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                    raise TypeError(f"the optimizer's {name}: needed a tensor of shape {shape}")


def _get_kind(value: Any) -> Any:
    """Return the kind of a value. All numbers are one kind: some optimizers start with None and later have tensors."""
    return float if value is None or isinstance(value, int | float | Tensor) else type(value)


def _compile_model(model: Transformer, ranks: Ranks) -> None:
    """Compile in place, so that parameters keep their names; part by part for FSDP2, which gathers weights so."""
    if ranks.engine != "fsdp2":
        model.compile()
        return
    for block in model.blocks:
        block.forward = torch.compile(block.forward)
    for part in ("get_rope", "stem", "head"):
        setattr(model, part, torch.compile(getattr(model, part)))


def _build_empty(config: ProxyConfig) -> Transformer:
    """Build a model with shapes but without values."""
    with torch.device("meta"):
        return Transformer(config)


def autocast(device: torch.device, precision: Literal["float32", "bfloat16"] | None = None) -> Any:
    """Return a context in which matrix products are in bfloat16.

    Args:
        device: Where the model is.
        precision: None means bfloat16 on CUDA and float32 elsewhere.

    Returns:
        The context; it does nothing for float32.
    """
    if precision == "bfloat16" or (precision is None and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
