"""Optimizers built from the muP table, out of well-kept packages, behind one interface.

| name                  | from                     | what its peak rate does with width (hidden matrices)           |
|-----------------------|--------------------------|-----------------------------------------------------------------|
| adamw                 | torch, fused             | 1/m                                                             |
| adamw8bit             | torchao                  | 1/m                                                             |
| ademamix, lion        | pytorch-optimizer        | 1/m                                                             |
| schedule-free         | schedulefree             | 1/m; wants schedule "constant"                                  |
| muon, muon-rms        | torch, AdamW for the rest| 1, 1/√m                                                         |
| lamb, soap            | pytorch-optimizer        | 1/√m, 1/m; unverified: refused without a coordinate check       |
| prodigy               | prodigyopt, one per role | found; unverified; `lr` multiplies what it finds                |

Packages beyond torch come with muscale[optimizers].
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from proxies.config.optimizer_gate import refusal
from proxies.config.proxy import ProxyConfig
from proxies.model.mup import param_groups

Groups = list[dict[str, Any]]
Kind = Callable[..., torch.optim.Optimizer]

# Whose steps on FSDP2's shards are those on whole matrices. Measured, 2 ranks, 30 steps: losses of these within 1e-6 of one
# process's, Muon's within 5e-5 (DDP's own 3e-5: it works in bfloat16). Schedule-free was off by .07 without a word.
ON_SHARDS = ("adamw", "ademamix", "lion", "muon", "muon-rms")
PRODIGY_START = 1e-6  # its estimate of the distance before the first step, the package's default


class CombinedOptimizer:
    """Optimizers that step as one, each with parameter groups of its own."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> Groups:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


Optimizer = torch.optim.Optimizer | CombinedOptimizer


def make_optimizer(model: nn.Module, config: ProxyConfig, *, verified: bool = True) -> Optimizer:
    """The optimizer named in `config`, with one parameter group per role, ready to step.

    verified: refuse (ValueError) an optimizer without a verified rule at this width; only the coordinate check itself,
        which is to find out, goes without.

    The state is tensors and plain values, so that torch.load(weights_only=True) reads it, and a resumed run is bitwise
    the uninterrupted one. Schedule-free evaluates other weights than it trains: see `evaluation`.
    """
    if config.optimizer not in _BUILDERS:
        near = difflib.get_close_matches(config.optimizer, _BUILDERS, n=1, cutoff=0.0)
        raise ValueError(
            f"needed an optimizer out of {tuple(_BUILDERS)}, got {config.optimizer!r}: did you mean {near[0]!r}?"
        )
    wrong = refusal(config) if verified else None
    if wrong:
        raise ValueError(wrong)
    return _BUILDERS[config.optimizer](param_groups(model, config), config)


def check_sharding(config: ProxyConfig) -> None:
    """ValueError when this optimizer's steps on shards are not those on whole matrices."""
    if config.optimizer not in ON_SHARDS:
        raise ValueError(
            f"needed an optimizer that can work on FSDP2's shards, {', '.join(ON_SHARDS)}, got {config.optimizer!r}: choose one of "
            "these, or the engine ddp"
        )


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Every group's rate is its own peak times `factor`."""
    for group in optimizer.param_groups:
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def evaluation(optimizer: Optimizer) -> Iterator[None]:
    """While open, the model has the weights to be evaluated and kept as a result; after it, those being trained.

    For schedule-free these are x, the average, and y; for all others the same. y comes back bit for bit: it is copied,
    since computing it again from x would round. A trunk is saved outside (y, and z in the optimizer's state).
    """
    if "train_mode" not in optimizer.param_groups[0]:
        yield
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in weights]
    optimizer.eval()  # type: ignore[union-attr]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[union-attr]
        with torch.no_grad():
            for p, y in zip(weights, kept, strict=True):
                p.copy_(y)


def _adamw(groups: Groups, config: ProxyConfig) -> Optimizer:
    # One kernel per role instead of a dozen per tensor. It keeps each group's own eps and works in float64 too.
    return torch.optim.AdamW(groups, fused=True)


def _muon(adjust: str) -> Callable[[Groups, ProxyConfig], Optimizer]:
    def make(groups: Groups, config: ProxyConfig) -> Optimizer:
        # Hidden matrices alone: a step with equal singular values is meant for a map between two vectors of activations,
        # not for a table of rows or a gain. Muon's eps guards a norm and is not Adam's, so it is left alone.
        hidden = [
            {k: v for k, v in group.items() if k not in ("eps", "betas")}
            for group in groups
            if group["role"] == "hidden"
        ]
        rest = [group for group in groups if group["role"] != "hidden"]
        return CombinedOptimizer(
            torch.optim.Muon(hidden, momentum=config.momentum, adjust_lr_fn=adjust), torch.optim.AdamW(rest, fused=True)
        )

    return make


def _lion(groups: Groups, config: ProxyConfig) -> Optimizer:
    kind: Kind = _class_of("pytorch_optimizer", "Lion", config)
    return kind(groups, weight_decouple=True)


def _ademamix(groups: Groups, config: ProxyConfig) -> Optimizer:
    slow = [group | {"betas": (config.beta1, config.beta2, config.beta3)} for group in groups]
    steps = config.slow_warmup_tokens / config.batch_tokens
    kind: Kind = _class_of("pytorch_optimizer", "AdEMAMix", config)
    return kind(slow, weight_decouple=True, alpha=config.slow_weight, t_alpha_beta3=steps or None)


def _lamb(groups: Groups, config: ProxyConfig) -> Optimizer:
    # The package counts no norm of weights above 10, which those of wide matrices are: there its step would turn into
    # another function of width. The paper's has no such bound (arXiv 1904.00962), nor a correction of the first average, which
    # here would multiply the first step, whose size the norm has set, by 1 / (1 - beta1).
    kind: Kind = _class_of("pytorch_optimizer", "Lamb", config)
    optimizer = kind(groups, weight_decouple=True, adam_debias=True)
    optimizer.clamp = math.inf  # type: ignore[attr-defined]
    return optimizer


def _soap(groups: Groups, config: ProxyConfig) -> Optimizer:
    kind: Kind = _class_of("pytorch_optimizer", "SOAP", config)
    return kind(groups)


def _schedule_free(groups: Groups, config: ProxyConfig) -> Optimizer:
    # The warm-up is our schedule's; the package weighs its average by the rates that it is given.
    kind: Kind = _class_of("schedulefree", "AdamWScheduleFree", config)
    optimizer = kind(groups, warmup_steps=0)
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _prodigy(groups: Groups, config: ProxyConfig) -> Optimizer:
    # One for each role, since one Prodigy refuses groups of differing rates. Each finds the distance that its role has to
    # go, which for hidden matrices holds the 1/m already: so that goes to where the search for it starts.
    kind: Kind = _class_of("prodigyopt", "Prodigy", config)
    parts = []
    for group in groups:
        found = config.m if group["role"] == "hidden" and config.parametrization == "mup" else 1.0
        rate = group["lr"] * found
        given = [group | {"lr": rate, "peak_lr": rate}]
        parts.append(kind(given, d0=PRODIGY_START / found, use_bias_correction=True, safeguard_warmup=True))
    return CombinedOptimizer(*parts)


def _adamw8bit(groups: Groups, config: ProxyConfig) -> Optimizer:
    kind = _class_of("torchao", "AdamW8bit", config, "torchao.optim")

    class Eager(kind):  # type: ignore[misc, valid-type]
        """Not compiled on CPU: measured a minute of compiling to save 23 ms of a step at width 64."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    optimizer = (Eager if on_cpu else kind)(groups)
    optimizer.register_state_dict_post_hook(_plain)
    optimizer.register_load_state_dict_pre_hook(_quantised)
    return optimizer


def _plain(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """torchao's quantised moments as plain tensors, which a reader without torchao can load."""
    from torchao.optim.subclass_8bit import OptimState8bit

    def plain(value: Any) -> Any:
        if not isinstance(value, OptimState8bit):
            return value
        return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}

    return state | {"state": {i: {k: plain(v) for k, v in of.items()} for i, of in state["state"].items()}}


def _quantised(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    from torchao.optim.subclass_8bit import OptimState8bit

    def quantised(value: Any) -> Any:
        return OptimState8bit(**value, dtype=torch.float32) if isinstance(value, dict) else value

    return state | {"state": {i: {k: quantised(v) for k, v in of.items()} for i, of in state["state"].items()}}


def _class_of(package: str, name: str, config: ProxyConfig, module: str | None = None) -> Any:
    """A class of an optional package."""
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ValueError(
            f"needed the package {package} for optimizer {config.optimizer!r}, which is not installed: "
            "pip install 'muscale[optimizers]'"
        ) from error
    return getattr(import_module(module or package), name)


_BUILDERS: dict[str, Callable[[Groups, ProxyConfig], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "ademamix": _ademamix,
    "lamb": _lamb,
    "lion": _lion,
    "muon": _muon("original"),
    "muon-rms": _muon("match_rms_adamw"),
    "prodigy": _prodigy,
    "schedule-free": _schedule_free,
    "soap": _soap,
}
