"""Optimizers with the parameter groups of the muP table, from maintained packages, behind one interface.

| name                  | from                      | factor on its peak rate with width (hidden matrices)            |
|-----------------------|---------------------------|-----------------------------------------------------------------|
| adamw                 | torch, fused              | 1/m                                                             |
| adamw8bit             | torchao                   | 1/m                                                             |
| ademamix, lion        | pytorch-optimizer         | 1/m                                                             |
| schedule-free         | schedulefree              | 1/m; meant for schedule "constant"                              |
| muon, muon-rms        | torch, AdamW for the rest | 1, 1/√m                                                         |
| lamb, soap            | pytorch-optimizer         | 1/√m, 1/m; unverified: refused without a coordinate check       |
| prodigy               | prodigyopt, one per role  | finds its rate, which `lr` multiplies; unverified               |

Packages other than torch come with muscale[optimizers].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from proxies.config.optimizer_gate import explain_refusal
from proxies.config.proxy import ProxyConfig
from proxies.model.mup import param_groups
from scaling.common.suggest import find_similar

Groups = list[dict[str, Any]]
OptimizerClass = Callable[..., torch.optim.Optimizer]

# Optimizers whose steps on FSDP2's shards are the same as on whole matrices. Measured with 2 ranks and 30 steps: their
# losses are within 1e-6 of one process's, Muon's within 5e-5 (3e-5 with DDP, since it works in bfloat16). Schedule-free
# was off by 0.07 without an error.
SHARDABLE = ("adamw", "ademamix", "lion", "muon", "muon-rms")
# Prodigy's estimate of the distance before the first step, the default of the package.
PRODIGY_START = 1e-6


class CombinedOptimizer:
    """Several optimizers that step as one, each with parameter groups of its own.

    Args:
        *parts: The optimizers.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> Groups:
        """The parameter groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Step every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of every part's parameters."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the states of all parts."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


Optimizer = torch.optim.Optimizer | CombinedOptimizer


def make_optimizer(model: nn.Module, config: ProxyConfig, *, verified: bool = True) -> Optimizer:
    """Return the optimizer of a configuration, with one parameter group per role.

    Its state consists of tensors and plain values, so `torch.load(weights_only=True)` reads it, and a resumed run is
    bit for bit the uninterrupted one. Schedule-free evaluates other weights than it trains, see `use_eval_weights`.

    Args:
        model: The model; it may be compiled, wrapped or sharded.
        config: The proxy.
        verified: Refuse an optimizer without a verified rule at this width. Only the coordinate check passes False,
            since it tests the rule.

    Returns:
        The optimizer, ready to step.

    Raises:
        ValueError: If the optimizer is unknown, refused, or its package is missing.
    """
    if config.optimizer not in _BUILDERS:
        (nearest,) = find_similar(config.optimizer, _BUILDERS, cutoff=0.0)
        raise ValueError(
            f"needed an optimizer out of {tuple(_BUILDERS)}, got {config.optimizer!r}: did you mean {nearest!r}?"
        )
    reason = explain_refusal(config) if verified else None
    if reason:
        raise ValueError(reason)
    return _BUILDERS[config.optimizer](param_groups(model, config), config)


def check_sharding(config: ProxyConfig) -> None:
    """Raise ValueError if the optimizer's steps on shards differ from its steps on whole matrices."""
    if config.optimizer not in SHARDABLE:
        raise ValueError(
            f"needed an optimizer that can work on FSDP2's shards, {', '.join(SHARDABLE)}, got {config.optimizer!r}: "
            "choose one of these, or the engine ddp"
        )


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set the rate of every group to its own peak rate times `factor`."""
    for group in optimizer.param_groups:
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def use_eval_weights(optimizer: Optimizer) -> Iterator[None]:
    """Give the model the weights to evaluate while the context is open, and the trained weights afterwards.

    For schedule-free, the weights to evaluate and to keep as a result are x, the average, and those being trained are
    y. For all other optimizers they are the same. y is copied and restored bit for bit, since computing it from x would
    round. A trunk is saved outside the context (y, with z in the optimizer's state).

    Args:
        optimizer: The optimizer of the model.
    """
    if "train_mode" not in optimizer.param_groups[0]:
        yield
        return
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    copies = [parameter.detach().clone() for parameter in weights]
    optimizer.eval()  # type: ignore[union-attr]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[union-attr]
        with torch.no_grad():
            for parameter, y in zip(weights, copies, strict=True):
                parameter.copy_(y)


def _make_adamw(groups: Groups, config: ProxyConfig) -> Optimizer:
    # The fused form uses one kernel per role instead of a dozen per tensor. It keeps each group's own eps and works in
    # float64 too.
    return torch.optim.AdamW(groups, fused=True)


def _make_muon_builder(adjust_lr: str) -> Callable[[Groups, ProxyConfig], Optimizer]:
    def make_muon(groups: Groups, config: ProxyConfig) -> Optimizer:
        # Muon gets only hidden matrices: a step with equal singular values suits a map between two vectors of
        # activations, not a table of rows or a gain. Its eps guards a norm and is not Adam's, so it keeps its default.
        hidden = [
            {k: v for k, v in group.items() if k not in ("eps", "betas")}
            for group in groups
            if group["role"] == "hidden"
        ]
        rest = [group for group in groups if group["role"] != "hidden"]
        return CombinedOptimizer(
            torch.optim.Muon(hidden, momentum=config.momentum, adjust_lr_fn=adjust_lr),
            torch.optim.AdamW(rest, fused=True),
        )

    return make_muon


def _make_lion(groups: Groups, config: ProxyConfig) -> Optimizer:
    lion: OptimizerClass = _import_class("pytorch_optimizer", "Lion", config)
    return lion(groups, weight_decouple=True)


def _make_ademamix(groups: Groups, config: ProxyConfig) -> Optimizer:
    three_betas = [group | {"betas": (config.beta1, config.beta2, config.beta3)} for group in groups]
    steps = config.slow_warmup_tokens / config.batch_tokens
    ademamix: OptimizerClass = _import_class("pytorch_optimizer", "AdEMAMix", config)
    return ademamix(three_betas, weight_decouple=True, alpha=config.slow_weight, t_alpha_beta3=steps or None)


def _make_lamb(groups: Groups, config: ProxyConfig) -> Optimizer:
    # The package clips the norm of weights at 10, which wide matrices exceed; its step would then depend on width in
    # another way. The paper (arXiv 1904.00962) has no such bound. Nor does it correct the bias of the first average,
    # which here would multiply the first step, whose size the norm has set, by 1 / (1 - beta1).
    lamb: OptimizerClass = _import_class("pytorch_optimizer", "Lamb", config)
    optimizer = lamb(groups, weight_decouple=True, adam_debias=True)
    optimizer.clamp = math.inf  # type: ignore[attr-defined]
    return optimizer


def _make_soap(groups: Groups, config: ProxyConfig) -> Optimizer:
    soap: OptimizerClass = _import_class("pytorch_optimizer", "SOAP", config)
    return soap(groups)


def _make_schedule_free(groups: Groups, config: ProxyConfig) -> Optimizer:
    # The warm-up is our schedule's; the package weights its average by the rates that it is given.
    schedule_free: OptimizerClass = _import_class("schedulefree", "AdamWScheduleFree", config)
    optimizer = schedule_free(groups, warmup_steps=0)
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _make_prodigy(groups: Groups, config: ProxyConfig) -> Optimizer:
    # One Prodigy refuses groups of differing rates, so there is one per role. Each finds the distance that its role has
    # to move, which for hidden matrices includes the factor 1/m. So that factor is removed from the rate and applied to
    # where the search for the distance starts.
    prodigy: OptimizerClass = _import_class("prodigyopt", "Prodigy", config)
    parts = []
    for group in groups:
        width = config.m if group["role"] == "hidden" and config.parametrization == "mup" else 1.0
        rate = group["lr"] * width
        scaled = [group | {"lr": rate, "peak_lr": rate}]
        parts.append(prodigy(scaled, d0=PRODIGY_START / width, use_bias_correction=True, safeguard_warmup=True))
    return CombinedOptimizer(*parts)


def _make_adamw8bit(groups: Groups, config: ProxyConfig) -> Optimizer:
    adamw8bit = _import_class("torchao", "AdamW8bit", config, "torchao.optim")

    class EagerAdamW8bit(adamw8bit):  # type: ignore[misc, valid-type]
        """AdamW8bit without compilation: on CPU a minute of compiling saved 23 ms per step at width 64 (measured)."""

        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    is_on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    optimizer = (EagerAdamW8bit if is_on_cpu else adamw8bit)(groups)
    optimizer.register_state_dict_post_hook(_unpack_quantized)
    optimizer.register_load_state_dict_pre_hook(_pack_quantized)
    return optimizer


def _unpack_quantized(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Replace torchao's quantized moments by plain tensors, which can be loaded without torchao."""
    from torchao.optim.subclass_8bit import OptimState8bit

    def unpack(value: Any) -> Any:
        if not isinstance(value, OptimState8bit):
            return value
        return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}

    return state | {"state": {i: {k: unpack(v) for k, v in moments.items()} for i, moments in state["state"].items()}}


def _pack_quantized(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Undo `_unpack_quantized`."""
    from torchao.optim.subclass_8bit import OptimState8bit

    def pack(value: Any) -> Any:
        return OptimState8bit(**value, dtype=torch.float32) if isinstance(value, dict) else value

    return state | {"state": {i: {k: pack(v) for k, v in moments.items()} for i, moments in state["state"].items()}}


def _import_class(package: str, name: str, config: ProxyConfig, module: str | None = None) -> Any:
    """Return a class of an optional package, or raise ValueError with the extra to install."""
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
    "adamw": _make_adamw,
    "adamw8bit": _make_adamw8bit,
    "ademamix": _make_ademamix,
    "lamb": _make_lamb,
    "lion": _make_lion,
    "muon": _make_muon_builder("original"),
    "muon-rms": _make_muon_builder("match_rms_adamw"),
    "prodigy": _make_prodigy,
    "schedule-free": _make_schedule_free,
    "soap": _make_soap,
}
