"""Warm starts: a small trained model grown into the first state of a larger one of the same family (docs/math.md §8).

- "shrink-pad-perturb": theta_large = shrink * pad0(theta_small) + noise * xi, xi a fresh muP initialisation at the large width
  (arXiv 2411.07340, 2605.13405). pad0 puts the small tensor in the leading block, zeros elsewhere. The default.
- "pad": the same with shrink 1 and noise 0 and the norms' gains rescaled, so that the large model computes what the small one did.
- "duplicate": every width axis repeated k times, hidden matrices divided by k (arXiv 2602.10545). Exact, also in training, Adam's
  moments included (proxies/growth/moments.py); without noise the copies never part.
- "hyperclone": the same copies, with noise that cancels between pairs of them (arXiv 2409.12903): exact, and the copies part.
- "stack": depth alone, the whole stack repeated (G_stack, arXiv 2405.15319).

With every other method depth grows by stacking, too, and width then by the method. The first two take any width that the family can
have, the next two whole multiples. The leading block is right for every tensor here: query heads stay in order and their number per
key head is fixed, so head i still reads key head i // (h / g); gate, up and down share one order of channels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from proxies.config.growth_rules import Method, beyond_break_even, check_growth
from proxies.config.proxy import ProxyConfig
from proxies.model.mup import GAINS, Role, draw, role_of, rules
from proxies.model.transformer import Transformer


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
    what is added over that of the copy it is added to (default .1, the authors' 10 dB). "pad" and "stack" have none. Norm gains are
    copied and new ones start at 1: neither shrunk nor perturbed. ValueError names every setting in which the two models may not
    differ. Warns where N grows more than fourfold.
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
    """The same, one tensor after the other, for whoever puts each away before the next is made; checked at once.

    A mapping that reads its tensors from disk when asked (proxies/training/lazy_tensors.py) is asked for one at a time.
    """
    check_growth(small, large, method)
    if method in ("pad", "stack") and noise:
        raise ValueError(
            f"method {method!r} adds no noise, got noise {noise:g}: leave it out, or choose another method"
        )
    check_shapes(state, shapes(small))
    if said := beyond_break_even(small, large):
        warnings.warn(said, stacklevel=2)
    return _grown(state, small, large, method, shrink, noise)


def _grown(
    state: Mapping[str, Tensor],
    small: ProxyConfig,
    large: ProxyConfig,
    method: Method,
    shrink: float,
    noise: float | None,
) -> Iterator[tuple[str, Tensor]]:
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


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError that names parameters which are missing, unknown or of another shape. Tensors on disk are not read."""
    sizes = {name: tuple(tensor.shape) for name, tensor in getattr(state, "shapes", state).items()}
    wrong = [name for name in expected.keys() | sizes.keys() if sizes.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(
            "the checkpoint is not of this architecture; parameters missing, unknown or of another shape: "
            f"{', '.join(sorted(wrong)[:6])}"
        )


def shapes(config: ProxyConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, without allocating one."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


def source(name: str, small: ProxyConfig) -> str:
    """The small model's parameter that this one of the large model grows from: block i from block i mod l."""
    head, *rest = name.split(".")
    return f"{head}.{int(rest[0]) % small.n_layers}.{rest[1]}" if rest else name


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
    tensor = tiled(value, role, k)
    # 1 under muP, whose multiplier falls as 1/k; a tied table serves as input, too, so there the last gain takes it.
    out = rules(small)["readout"].multiplier / rules(large)["readout"].multiplier / k
    if role == ("final_norm" if small.tied else "readout"):
        tensor *= out
    if role in GAINS:
        return tensor
    if method == "duplicate" and noise:
        tensor += _normal(tensor, generator).mul_(noise / math.sqrt(value.shape[-1]))
    if role == "hidden":
        tensor /= k
    if method == "hyperclone" and role in ("hidden", "readout"):
        share = 0.1 if noise is None else noise
        width = value.shape[-1]
        for pair in range(k // 2):  # an odd copy at the end stays as it is
            first = tensor[:, 2 * pair * width : (2 * pair + 1) * width]
            second = tensor[:, (2 * pair + 1) * width : (2 * pair + 2) * width]
            added = _normal(first, generator).mul_((share * first.square().mean()).sqrt())
            first += added
            second -= added
    return tensor


def tiled(value: Tensor, role: Role, k: int) -> Tensor:
    """A copy with every axis of width repeated k times."""
    times: tuple[int, ...] = (1, k)
    if role == "hidden":
        times = (k, k)
    elif role in GAINS:
        times = (1,) if role == "qk_norm" else (k,)
    return value.tile(times)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape).normal_(generator=generator).to(like.dtype)
