"""Several proxies of one shape trained at once: their weights stacked, one batched program for all.

On a GPU a small proxy's step is a few hundred launches that take longer than the work in them; K members share them. On
CPU a step is mostly matrix products and memory traffic, so there it gains nothing: see `worth_stacking`.

Each member is a whole run with its own weights (views of the stack), optimizer, schedule and order of windows, so that
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
from proxies.config.steps import plan, point_steps
from proxies.data.mixture import Data, open_data
from proxies.model.optimizers import evaluation, set_lr
from proxies.model.transformer import mean_loss
from proxies.training.loop import EVAL_CHUNK
from proxies.training.run_state import CHECK_EVERY, Run, autocast
from scaling.common.measurement import Measurement
from scaling.common.signals import defer_signals

# What members may differ in: neither the shape, nor the forward pass, nor which windows there are.
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
    """Whether members are trained together faster than one by one: assumed on CUDA, not measured; not on CPU, measured."""
    return device.type == "cuda"


def train_together(
    configs: Sequence[ProxyConfig],
    tokens: int,
    *,
    stopped: Collection[int] = (),
    device: str | torch.device | None = None,
) -> Generator[tuple[int, Measurement], None, None]:
    """Train every configuration for `tokens` tokens, yielding (member, point) as `train` would yield each one's points.

    A member is its place in `configs`. Members may differ in OWN; all else must be the same. The losses are those of
    separate runs to rounding (1e-5), not bitwise: a batched matrix product sums in another order.

    stopped: members to train no further, looked at after every step and every point; the caller adds to it.
    device: CUDA if there is one, unless given.

    A member that diverged yields its last point, as in `train`, and the others go on. `seconds` is the time of all.
    Bad arguments raise ValueError here, before the first `next`.
    """
    if not configs:
        raise ValueError("needed at least one configuration, got none")
    first = configs[0].model_dump(exclude=set(OWN))
    other = sorted(
        {name for c in configs for name, value in c.model_dump(exclude=set(OWN)).items() if first[name] != value}
    )
    if other:
        raise ValueError(
            f"needed members that differ only in {', '.join(OWN)}, got others in {', '.join(other)}: train those apart"
        )
    if configs[0].compile or configs[0].recompute or configs[0].micro_seqs:
        raise ValueError(
            "needed compile and recompute off and no micro_seqs, got one of them: members trained together have no such parts"
        )
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    cuts = [plan(c, tokens) for c in configs]
    data = [open_data(c) for c in configs]
    runs = [Run(c, cut, d.sha256, where) for c, cut, d in zip(configs, cuts, data, strict=True)]
    return _points(runs, data, stopped)


def _points(
    runs: list[Run], data: list[Data], stopped: Collection[int]
) -> Generator[tuple[int, Measurement], None, None]:
    began = time.perf_counter()
    points = [point_steps(run.config, run.cut.trunk_steps or run.cut.steps - 1) for run in runs]
    live = list(range(len(runs)))
    stack = Stack([runs[k] for k in live])
    while live:
        step, end = runs[live[0]].step, runs[live[0]].cut.steps
        looking = [k for k in live if step in points[k] or step == end]
        lost = [k for k in live if (k in looking or step % CHECK_EVERY == 0) and runs[k].is_lost()]
        held = dict(zip(live, stack.evaluate(data[live[0]].held), strict=True)) if set(looking) - set(lost) else {}
        for k in [k for k in live if k in looking or k in lost]:
            loss = math.nan if k in lost else held[k]
            seconds = time.perf_counter() - began
            bad = k in lost or (step == end and not loss <= math.log(runs[k].config.vocab))
            point = runs[k].measured(loss, seconds, final=k in lost or step == end, diverged=bad)
            left = time.perf_counter()
            yield k, point
            began += time.perf_counter() - left
        staying = [k for k in live if k not in lost and k not in stopped and step < end]
        if staying != live:
            live = staying
            stack = Stack([runs[k] for k in live]) if live else stack
        if live:
            stack.advance([data[k] for k in live])


class Stack:
    """The weights of several runs, one array per parameter [K, ...]; each run's own parameters are its slices."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs, self.model, self.device = runs, runs[0].model, runs[0].device
        self.own = [dict(run.model.named_parameters()) for run in runs]
        self.weights = {
            name: torch.stack([own[name].detach() for own in self.own]).requires_grad_() for name in self.own[0]
        }
        for k, own in enumerate(self.own):
            for name, parameter in own.items():
                parameter.data = self.weights[name].detach()[k]

    def losses(self, x_kbt: Tensor, y_kbt: Tensor) -> Tensor:
        """Mean cross-entropy of every member on its batch, nats per token [K]."""

        def one(weights: dict[str, Tensor], x_bt: Tensor, y_bt: Tensor) -> Tensor:
            logits_btv: Tensor = functional_call(self.model, weights, (x_bt,))
            return mean_loss(logits_btv, y_bt)

        # torch's flash attention has no batching rule on CPU; vmap would take the members one by one.
        kernel = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with autocast(self.device, self.runs[0].config.precision), kernel:
            out: Tensor = vmap(one)(self.weights, x_kbt, y_kbt)
        return out

    def advance(self, data: list[Data]) -> Tensor:
        """One optimizer step of every member, each at its own rate on its own windows; their losses, nats per token [K]."""
        start = self.runs[0].windows_seen
        n = min(self.runs[0].config.batch_seqs, self.runs[0].cut.tokens // self.runs[0].config.seq_len - start)
        batches = [of.windows.batch(start, n) for of in data]
        x_kbt, y_kbt = (torch.stack(part).to(self.device, non_blocking=True) for part in zip(*batches, strict=True))
        losses_k = self.losses(x_kbt, y_kbt)
        losses_k.sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: weight.grad for name, weight in self.weights.items()}
        with defer_signals():
            for k, run in enumerate(self.runs):
                set_lr(run.optimizer, run.factor((start + n / 2) * run.config.seq_len))
                for name, parameter in self.own[k].items():
                    gradient = gradients[name]
                    parameter.grad = None if gradient is None else gradient[k]
                run.optimizer.step()
                run.optimizer.zero_grad(set_to_none=True)
                run.count(losses_k[k].detach(), n)
        for weight in self.weights.values():
            weight.grad = None
        return losses_k.detach()

    @torch.no_grad()
    def evaluate(self, windows: tuple[Tensor, Tensor]) -> list[float]:
        """Mean loss of every member over the same windows ([n, t] each), nats per token."""
        total_k = torch.zeros(len(self.runs), dtype=torch.float64, device=self.device)
        with ExitStack() as averaged:
            for run in self.runs:
                averaged.enter_context(evaluation(run.optimizer))
            for x_bt, y_bt in zip(*(torch.split(w, EVAL_CHUNK) for w in windows), strict=True):
                x_kbt, y_kbt = (w.to(self.device).expand(len(self.runs), -1, -1) for w in (x_bt, y_bt))
                total_k += self.losses(x_kbt, y_kbt).double() * len(x_bt)
        return (total_k / len(windows[0])).tolist()
