"""Warm starts: a small trained model grown into the first state of a larger one of the same family (docs/math.md §8).

- "shrink-pad-perturb": theta_large = shrink * pad0(theta_small) + noise * xi, xi a fresh muP initialisation at the large width
  (arXiv 2411.07340, 2605.13405). pad0 puts the small tensor in the leading block, zeros elsewhere. The default.
- "pad": the same with shrink 1 and noise 0 and the norms' gains rescaled, so that the large model computes what the small one did.
- "duplicate": every width axis repeated k times, hidden matrices divided by k (arXiv 2602.10545). Exact; without noise the copies
  never part.

The leading block is right for every tensor here: query heads stay in order and their number per key head is fixed, so head i still
reads key head i // (h / g); gate, up and down share one order of channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from proxies.config import ProxyConfig
from proxies.model import build
from proxies.mup import GAINS, role_of, rules

Method = Literal["shrink-pad-perturb", "pad", "duplicate"]
SAME = (
    "n_layers",
    "d_head",
    "q_per_kv",
    "ff_mult",
    "vocab",
    "qk_norm",
    "tied",
    "base_width",
    "base_layers",
    "depth_power",
    "parametrization",
    "alpha_in",
    "alpha_out",
    "alpha_attn",
)


def grow(
    state: Mapping[str, Tensor],
    small: ProxyConfig,
    large: ProxyConfig,
    *,
    method: Method = "shrink-pad-perturb",
    shrink: float = 0.4,
    noise: float | None = None,
) -> dict[str, Tensor]:
    """The state of a `large` model grown from the state of a `small` one.

    shrink: factor on the small model's matrices; 0.4 is what the authors use for all their scaling fits. noise: standard deviation
    of what is added, drawn from `large.seed`: for "shrink-pad-perturb" in units of the fresh initialisation (default 1), for "duplicate" in
    units of 1/sqrt(fan_in) (default 0: exact, but tune it before training such a model). Norm gains are copied and new ones start at 1: neither shrunk nor perturbed. ValueError names every setting in which the two models
    may not differ.
    """
    check_growth(small, large, method)
    fresh = build(large).state_dict()
    missing = sorted(set(fresh) ^ set(state))
    if missing:
        raise ValueError(
            f"the checkpoint is not of this architecture; parameters in only one of the two: {', '.join(missing[:6])}"
        )
    if method == "duplicate":
        return _duplicate(state, small, large, noise or 0.0)
    if method == "pad":
        return _preserve(state, small, large)
    grown = {}
    for name, start in fresh.items():
        leading = tuple(slice(n) for n in state[name].shape)
        if role_of(name) in GAINS:
            tensor = torch.ones_like(start)
            tensor[leading] = state[name]
        else:
            tensor = (1.0 if noise is None else noise) * start
            tensor[leading] += shrink * state[name]
        grown[name] = tensor
    return grown


def check_growth(small: ProxyConfig, large: ProxyConfig, method: Method) -> None:
    """ValueError that names why a model of `small` cannot be grown into one of `large`."""
    problems = [
        f"{n}: {getattr(small, n)} to {getattr(large, n)}" for n in SAME if getattr(small, n) != getattr(large, n)
    ]
    if problems:
        raise ValueError(f"growth keeps everything but the width; these differ: {'; '.join(problems)}")
    if large.d_model < small.d_model:
        raise ValueError(
            f"needed a large model at least as wide as the small one ({small.d_model}), got d_model {large.d_model}"
        )
    if method == "duplicate" and large.d_model % small.d_model:
        raise ValueError(
            f"duplication needs a whole growth factor, got {small.d_model} to {large.d_model}: choose a multiple of {small.d_model} "
            "or the method shrink-pad-perturb"
        )


def _preserve(state: Mapping[str, Tensor], small: ProxyConfig, large: ProxyConfig) -> dict[str, Tensor]:
    """Logits equal but for the norm's epsilon: RMSNorm of a zero-padded stream is larger by sqrt(d_large / d_small)."""
    correction = math.sqrt(small.d_model / large.d_model)
    readout = rules(small)["readout"].multiplier / rules(large)["readout"].multiplier
    grown = {}
    for name, shape in ((n, p.shape) for n, p in build(large).named_parameters()):
        role = role_of(name)
        tensor = (torch.ones if role in GAINS else torch.zeros)(shape, dtype=state[name].dtype)
        factor = {"norm": correction, "final_norm": correction, "readout": readout}.get(role, 1.0)
        if role == "final_norm" and small.tied:
            factor *= readout  # the table serves as input, too, so what its output side lacks goes into the last gain
        tensor[tuple(slice(n) for n in state[name].shape)] = factor * state[name]
        grown[name] = tensor
    return grown


def _duplicate(state: Mapping[str, Tensor], small: ProxyConfig, large: ProxyConfig, noise: float) -> dict[str, Tensor]:
    k = large.d_model // small.d_model
    generator = torch.Generator().manual_seed(large.seed)
    grown = {}
    for name, value in state.items():
        role = role_of(name)
        times = {"hidden": (k, k), "norm": (k,), "final_norm": (k,), "qk_norm": (1,)}.get(role, (1, k))
        tensor = value.tile(times)
        if role not in GAINS and noise:
            xi = torch.empty(tensor.shape).normal_(generator=generator) / math.sqrt(value.shape[-1])
            tensor = tensor + noise * xi.to(tensor.dtype)
        grown[name] = tensor / k if role == "hidden" else tensor
    return grown
