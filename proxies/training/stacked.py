"""Train several proxies of one shape at once, with their weights stacked and one batched program for all.

On a GPU, a small proxy's step consists of a few hundred kernel launches that take longer than the work in them; K
members share the launches. On CPU a step is mostly matrix products and memory traffic, so nothing is gained there: see
`worth_stacking`.

Each member is a complete run with its own weights (views of the stack), optimizer, schedule and order of windows, so
every optimizer works as it does alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from proxies.config.proxy import ProxyConfig
from proxies.config.steps import find_eval_steps, plan_steps
from proxies.data.mixture import RunData, open_data
from proxies.model.optimizers import set_lr, use_eval_weights
from proxies.model.transformer import mean_cross_entropy
from proxies.training.loop import EVAL_CHUNK
from proxies.training.run_state import CHECK_EVERY, Run, autocast
from scaling.common.measurement import Measurement
from scaling.common.signals import defer_signals

# Settings in which members may differ. They change neither the shape, nor the forward pass, nor the set of windows.
OWN = (
    "beta1",
    "beta2",
    "beta3",
    "cooldown",
    "decay",
    "embed_lr_mult",
    "embed_std",
    "eps",
    "init_std",
    "lr",
    "lr_floor",
    "momentum",
    "optimizer",
    "schedule",
    "seed",
    "slow_warmup_tokens",
    "slow_weight",
    "warmup_tokens",
    "weight_decay",
)


def worth_stacking(device: torch.device) -> bool:
    """Return whether training members together is faster than one by one.

    On CUDA this is assumed, not measured. On CPU it was measured to be slower.
    """
    return device.type == "cuda"


def train_together(
    configs: Sequence[ProxyConfig],
    tokens: int,
    *,
    stopped: Collection[int] = (),
    device: str | torch.device | None = None,
) -> Generator[tuple[int, Measurement], None, None]:
    """Train several configurations together.

    Members may differ in the settings of `OWN`. Losses equal those of separate runs up to rounding (1e-5), not bit for
    bit, since a batched matrix product sums in another order. A member that diverges yields its last point, as in
    `train`, and the others continue.

    Args:
        configs: One configuration per member.
        tokens: Training tokens of each.
        stopped: Members to train no further. It is read after every step and every point, and the caller may add to it.
        device: The device. Default: CUDA if there is one.

    Yields:
        (member, measurement), as `train` would yield each member's measurements. A member is its index in `configs`.
        `seconds` is the time of all members together.

    Raises:
        ValueError: For bad arguments, before the first `next`.
    """
    if not configs:
        raise ValueError("needed at least one configuration, got none")
    first = configs[0].model_dump(exclude=set(OWN))
    other = sorted(
        {name for c in configs for name, value in c.model_dump(exclude=set(OWN)).items() if first[name] != value}
    )
    if other:
        raise ValueError(
            f"needed members that differ only in {', '.join(OWN)}, got others in {', '.join(other)}: train those "
            "separately"
        )
    if configs[0].compile or configs[0].recompute or configs[0].micro_seqs:
        raise ValueError(
            "needed compile and recompute off and no micro_seqs, got one of them: stacked training does not support "
            "these"
        )
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    cuts = [plan_steps(c, tokens) for c in configs]
    data = [open_data(c) for c in configs]
    runs = [Run(c, cut, d.sha256, where) for c, cut, d in zip(configs, cuts, data, strict=True)]
    return _generate_points(runs, data, stopped)


def _generate_points(
    runs: list[Run], data: list[RunData], stopped: Collection[int]
) -> Generator[tuple[int, Measurement], None, None]:
    began = time.perf_counter()
    points = [find_eval_steps(run.config, run.cut.trunk_steps or run.cut.steps - 1) for run in runs]
    live = list(range(len(runs)))
    stack = Stack([runs[k] for k in live])
    while live:
        step, end = runs[live[0]].step, runs[live[0]].cut.steps
        measured = [k for k in live if step in points[k] or step == end]
        lost = [k for k in live if (k in measured or step % CHECK_EVERY == 0) and runs[k].is_lost()]
        held = dict(zip(live, stack.evaluate(data[live[0]].held_out), strict=True)) if set(measured) - set(lost) else {}
        for k in [k for k in live if k in measured or k in lost]:
            loss = math.nan if k in lost else held[k]
            seconds = time.perf_counter() - began
            bad = k in lost or (step == end and not loss <= math.log(runs[k].config.vocab))
            point = runs[k].measure(loss, seconds, final=k in lost or step == end, diverged=bad)
            paused = time.perf_counter()
            yield k, point
            began += time.perf_counter() - paused
        remaining = [k for k in live if k not in lost and k not in stopped and step < end]
        if remaining != live:
            live = remaining
            stack = Stack([runs[k] for k in live]) if live else stack
        if live:
            stack.advance([data[k] for k in live])


class Stack:
    """The stacked weights of several runs, a tensor [K, ...] per parameter; each run's parameters are its slices."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs, self.model, self.device = runs, runs[0].model, runs[0].device
        self.own = [dict(run.model.named_parameters()) for run in runs]
        self.weights = {
            name: torch.stack([own[name].detach() for own in self.own]).requires_grad_() for name in self.own[0]
        }
        for k, own in enumerate(self.own):
            for name, parameter in own.items():
                parameter.data = self.weights[name].detach()[k]

    def compute_losses(self, x_kbt: Tensor, y_kbt: Tensor) -> Tensor:
        """Return the mean cross-entropy of every member on its batch, in nats per token, shape [K]."""

        def compute_loss(weights: dict[str, Tensor], x_bt: Tensor, y_bt: Tensor) -> Tensor:
            logits_btv: Tensor = functional_call(self.model, weights, (x_bt,))
            return mean_cross_entropy(logits_btv, y_bt)

        # torch's flash attention has no batching rule on CPU: vmap would process the members one by one.
        kernel = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with autocast(self.device, self.runs[0].config.precision), kernel:
            losses_k: Tensor = vmap(compute_loss)(self.weights, x_kbt, y_kbt)
        return losses_k

    def advance(self, data: list[RunData]) -> Tensor:
        """Take one optimizer step of every member, each at its own rate on its own windows.

        Args:
            data: Each member's data.

        Returns:
            The losses, in nats per token, shape [K].
        """
        start = self.runs[0].windows_seen
        n = min(self.runs[0].config.batch_seqs, self.runs[0].cut.tokens // self.runs[0].config.seq_len - start)
        batches = [member.windows.batch(start, n) for member in data]
        x_kbt, y_kbt = (torch.stack(part).to(self.device, non_blocking=True) for part in zip(*batches, strict=True))
        losses_k = self.compute_losses(x_kbt, y_kbt)
        losses_k.sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: weight.grad for name, weight in self.weights.items()}
        with defer_signals():
            for k, run in enumerate(self.runs):
                set_lr(run.optimizer, run.compute_factor((start + n / 2) * run.config.seq_len))
                for name, parameter in self.own[k].items():
                    gradient = gradients[name]
                    parameter.grad = None if gradient is None else gradient[k]
                run.optimizer.step()
                run.optimizer.zero_grad(set_to_none=True)
                run.count_step(losses_k[k].detach(), n)
        for weight in self.weights.values():
            weight.grad = None
        return losses_k.detach()

    @torch.no_grad()
    def evaluate(self, windows: tuple[Tensor, Tensor]) -> list[float]:
        """Return every member's mean loss over the same windows ([n, t] each), in nats per token."""
        total_k = torch.zeros(len(self.runs), dtype=torch.float64, device=self.device)
        with ExitStack() as averaged:
            for run in self.runs:
                averaged.enter_context(use_eval_weights(run.optimizer))
            for x_bt, y_bt in zip(*(torch.split(w, EVAL_CHUNK) for w in windows), strict=True):
                x_kbt, y_kbt = (w.to(self.device).expand(len(self.runs), -1, -1) for w in (x_bt, y_bt))
                total_k += self.compute_losses(x_kbt, y_kbt).double() * len(x_bt)
        return (total_k / len(windows[0])).tolist()
