"""Warm starts: a small trained model grown into the first state of a larger one of the same family (docs/math.md §8).

- "shrink-pad-perturb": theta_large = shrink * pad0(theta_small) + noise * xi, xi a fresh muP initialisation at the large width
  (arXiv 2411.07340, 2605.13405). pad0 puts the small tensor in the leading block, zeros elsewhere. The default.
- "pad": the same with shrink 1 and noise 0 and the norms' gains rescaled, so that the large model computes what the small one did.
- "duplicate": every width axis repeated k times, hidden matrices divided by k (arXiv 2602.10545). Exact, also in training, Adam's
  moments included; without noise the copies never part.
- "hyperclone": the same copies, with noise that cancels between pairs of them (arXiv 2409.12903): exact, and the copies part.

Depth grows by repeating the whole stack (G_stack, arXiv 2405.15319). The leading block is right for every tensor here: query heads
stay in order and their number per key head is fixed, so head i still reads key head i // (h / g); gate, up and down share one order
of channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from proxies.config import ProxyConfig
from proxies.model import Transformer
from proxies.mup import GAINS, ROLES, Role, draw, role_of, rules

Method = Literal["shrink-pad-perturb", "pad", "duplicate", "hyperclone"]
SAME = (
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

    shrink: factor on the small model's matrices ("shrink-pad-perturb" only); 0.4 is what the authors use for all their scaling fits.
    noise, drawn from `large.seed`: for "shrink-pad-perturb" in units of the fresh initialisation (default 1); for "duplicate" in
    units of 1/sqrt(fan_in) (default 0: exact, but tune it before training such a model); for "hyperclone" the mean square of
    what is added over that of the copy it is added to (default .1, the authors' 10 dB). Norm gains are copied and new ones start
    at 1: neither shrunk nor perturbed. ValueError names every setting in which the two models may not differ.
    """
    return dict(grown(state, small, large, method=method, shrink=shrink, noise=noise))


def grown(
    state: Mapping[str, Tensor],
    small: ProxyConfig,
    large: ProxyConfig,
    *,
    method: Method = "shrink-pad-perturb",
    shrink: float = 0.4,
    noise: float | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The same, one tensor after the other, for whoever writes them away before the next is made."""
    check_growth(small, large, method)
    expected = shapes(small)
    wrong = [n for n in expected.keys() | state.keys() if n not in state or tuple(state[n].shape) != expected.get(n)]
    if wrong:
        raise ValueError(
            "the checkpoint is not of this architecture; parameters missing, unknown or of another shape: "
            f"{', '.join(sorted(wrong)[:6])}"
        )
    generator = torch.Generator().manual_seed(large.seed)
    for name, shape in shapes(large).items():
        value, role = state[source(name, small)], role_of(name)
        if method == "shrink-pad-perturb":
            fresh = draw(shape, rules(large)[role], generator)
            yield name, _mixed(value, fresh, role, shrink, 1.0 if noise is None else noise)
        elif method == "pad":
            yield name, _padded(value, shape, role, small, large)
        else:
            yield name, _tiled(value, role, small, large, method, noise, generator)


def check_growth(small: ProxyConfig, large: ProxyConfig, method: Method) -> None:
    """ValueError that names why a model of `small` cannot be grown into one of `large`."""
    problems = [
        f"{n}: {getattr(small, n)} to {getattr(large, n)}" for n in SAME if getattr(small, n) != getattr(large, n)
    ]
    if problems:
        raise ValueError(f"growth keeps everything but width and depth; these differ: {'; '.join(problems)}")
    if large.d_model < small.d_model:
        raise ValueError(
            f"needed a large model at least as wide as the small one ({small.d_model}), got d_model {large.d_model}"
        )
    if large.n_layers % small.n_layers:
        raise ValueError(
            f"depth grows by repeating the whole stack, so n_layers must be a multiple of {small.n_layers}, got {large.n_layers}"
        )
    copies = method in ("duplicate", "hyperclone")
    if copies and large.d_model % small.d_model:
        raise ValueError(
            f"duplication needs a whole growth factor, got {small.d_model} to {large.d_model}: choose a multiple of {small.d_model} "
            "or the method shrink-pad-perturb"
        )


def shapes(config: ProxyConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, without allocating one."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


def source(name: str, small: ProxyConfig) -> str:
    """The small model's parameter that this one of the large model grows from: block i from block i mod l."""
    head, *rest = name.split(".")
    return f"{head}.{int(rest[0]) % small.n_layers}.{rest[1]}" if rest else name


def stacking_tokens(N: float, C: float) -> float:
    """Tokens after which to stack for a target of N parameters and C = 6 N D FLOPs (G_stack, arXiv 2405.15319, its fit)."""
    return float(10 ** (0.88 * math.log10(N) + 163.27 / math.log10(C) - 5.74))


def grow_moments(optimizer: Mapping[str, Any], small: ProxyConfig, large: ProxyConfig) -> dict[str, Any]:
    """AdamW's state for a duplicated model (method "duplicate", noise 0): the trajectory goes on as the small one's would.

    optimizer: the small model's `state_dict()`, made by `make_optimizer`. Gradients fall as 1/k but for gains that all heads
    share, so first moments are tiled over k, second ones over k squared (arXiv 2602.10545). Rates, decays and epsilons are those
    of `large`. Blocks that stack copy their source's.
    """
    check_growth(small, large, "duplicate")
    k = large.d_model // small.d_model
    numbers = {name: i for i, name in enumerate(_by_group(small))}
    state = {}
    for i, name in enumerate(_by_group(large)):
        role, before = role_of(name), optimizer["state"][numbers[source(name, small)]]
        over = 1 if role == "qk_norm" else k
        state[i] = {
            "step": before["step"].clone(),
            "exp_avg": _tile(before["exp_avg"], role, k) / over,
            "exp_avg_sq": _tile(before["exp_avg_sq"], role, k) / over**2,
        }
    names, table, groups, first = _by_group(large), rules(large), [], 0
    for group in optimizer["param_groups"]:
        rule = table[group["role"]]
        count = sum(role_of(name) == group["role"] for name in names)
        rates = {"lr": rule.lr * group["lr"] / group["peak_lr"], "peak_lr": rule.lr}
        kept = rates | {"weight_decay": rule.weight_decay, "eps": rule.eps, "params": list(range(first, first + count))}
        groups.append({**group, **kept})
        first += count
    return {"state": state, "param_groups": groups}


def _by_group(config: ProxyConfig) -> list[str]:
    """Names in the order in which an optimizer numbers its parameters: by role, then as the model has them."""
    names = list(shapes(config))
    return [name for role in ROLES for name in names if role_of(name) == role]


def _mixed(value: Tensor, fresh: Tensor, role: Role, shrink: float, noise: float) -> Tensor:
    leading = tuple(slice(n) for n in value.shape)
    if role in GAINS:
        tensor = torch.ones_like(fresh, dtype=value.dtype)
        tensor[leading] = value
        return tensor
    tensor = fresh.to(value.dtype).mul_(noise)
    tensor[leading] += shrink * value
    return tensor


def _padded(value: Tensor, shape: tuple[int, ...], role: Role, small: ProxyConfig, large: ProxyConfig) -> Tensor:
    """Logits equal but for the norm's epsilon: RMSNorm of a zero-padded stream is larger by sqrt(d_large / d_small)."""
    factor = {"norm": 1.0, "final_norm": 1.0}.get(role, 0.0) * math.sqrt(small.d_model / large.d_model) or 1.0
    readout = rules(small)["readout"].multiplier / rules(large)["readout"].multiplier
    # A tied table serves as input, too, so what its output side lacks goes into the last gain.
    if role == ("final_norm" if small.tied else "readout"):
        factor *= readout
    tensor = (torch.ones if role in GAINS else torch.zeros)(shape, dtype=value.dtype)
    tensor[tuple(slice(n) for n in value.shape)] = factor * value
    return tensor


def _tiled(
    value: Tensor,
    role: Role,
    small: ProxyConfig,
    large: ProxyConfig,
    method: Method,
    noise: float | None,
    generator: torch.Generator,
) -> Tensor:
    k = large.d_model // small.d_model
    tensor = _tile(value, role, k)
    # 1 under muP, whose multiplier falls as 1/k; a tied table serves as input, too, so there the last gain takes it.
    out = rules(small)["readout"].multiplier / rules(large)["readout"].multiplier / k
    if role == ("final_norm" if small.tied else "readout"):
        tensor = tensor * out
    if role in GAINS:
        return tensor
    if method == "duplicate" and noise:
        tensor = tensor + noise * _normal(tensor, generator) / math.sqrt(value.shape[-1])
    if role == "hidden":
        tensor = tensor / k
    if method == "hyperclone" and role in ("hidden", "readout"):
        share = 0.1 if noise is None else noise
        width = value.shape[-1]
        for pair in range(k // 2):  # an odd copy at the end stays as it is
            first = tensor[:, 2 * pair * width : (2 * pair + 1) * width]
            second = tensor[:, (2 * pair + 1) * width : (2 * pair + 2) * width]
            added = _normal(first, generator) * (share * first.square().mean()).sqrt()
            first += added
            second -= added
    return tensor


def _tile(value: Tensor, role: Role, k: int) -> Tensor:
    times: tuple[int, ...] = (1, k)
    if role == "hidden":
        times = (k, k)
    elif role in GAINS:
        times = (1,) if role == "qk_norm" else (k,)
    return value.tile(times)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape).normal_(generator=generator).to(like.dtype)
