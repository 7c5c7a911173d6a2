"""Warm starts: grow a small trained model into the initial state of a larger one of the same family (docs/math.md §8).

- "shrink-pad-perturb": theta_large = shrink * pad0(theta_small) + noise * xi, with xi a fresh muP initialisation at the
large
  width (arXiv 2411.07340, 2605.13405). pad0 puts the small tensor into the leading block and zeros elsewhere. The
  default.
- "pad": the same with shrink 1 and noise 0 and rescaled norm gains, so that the large model computes the same function
as the
  small one.
- "duplicate": every width axis is repeated k times, hidden matrices are divided by k (arXiv 2602.10545). The function
is the
  same, and stays so during training if Adam's moments are grown too (proxies/growth/moments.py): without noise the
  copies never diverge from each other.
- "hyperclone": the same copies, with noise that cancels between pairs of them (arXiv 2409.12903): the function is the
same, but
  the copies diverge in training.
- "stack": grows depth alone, repeating the whole stack of blocks (G_stack, arXiv 2405.15319).

Every other method grows depth by stacking, too, and then width. "shrink-pad-perturb" and "pad" take any width that the
family can have, "duplicate" and "hyperclone" whole multiples. The leading block is right for every tensor here: query
heads stay in order and their number per key head is fixed, so head i still reads key head i // (h / g); gate, up and
down share one order of channels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from proxies.config.growth_rules import GrowthMethod, check_break_even, check_growth
from proxies.config.proxy import ProxyConfig
from proxies.model.mup import GAIN_ROLES, Role, compute_rules, draw_parameter, get_role
from proxies.model.transformer import Transformer


def grow(
    state: Mapping[str, Tensor],
    small: ProxyConfig,
    large: ProxyConfig,
    *,
    method: GrowthMethod = "shrink-pad-perturb",
    shrink: float = 0.4,
    noise: float | None = None,
) -> dict[str, Tensor]:
    """Grow the state of a `small` model into the state of a `large` one.

    Norm gains are copied and new ones start at 1; they are neither shrunk nor perturbed.

    Args:
        state: The small model's parameters by name.
        small: The small model's configuration.
        large: The large model's configuration; noise is drawn from `large.seed`.
        method: How to grow, see the module's docstring.
        shrink: Factor on the small model's matrices, for "shrink-pad-perturb" only. 0.4 is what the authors use for all
            their scaling fits.
        noise: Amount of noise; None for the method's default. For "shrink-pad-perturb" it is in units of the fresh
            initialisation (default 1). For "duplicate" it is in units of 1/sqrt(fan_in) (default 0: exact, but tune it
            before training such a model). For "hyperclone" it is the mean square of what is added over that of the copy
            to which it is added (default 0.1, the authors' 10 dB). "pad" and "stack" take none.

    Returns:
        The large model's parameters by name.

    Raises:
        ValueError: If the models are not of one family, or cannot be grown by this method. All differences are named.

    Warns:
        UserWarning: If N grows more than fourfold, beyond which warm starts lost to training from scratch.
    """
    return dict(grow_tensors(state, small, large, method=method, shrink=shrink, noise=noise))


def grow_tensors(
    state: Mapping[str, Tensor],
    small: ProxyConfig,
    large: ProxyConfig,
    *,
    method: GrowthMethod = "shrink-pad-perturb",
    shrink: float = 0.4,
    noise: float | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Grow a model one tensor at a time, for callers that store each tensor before the next is made.

    The arguments are those of `grow` and are checked at once. A mapping that reads its tensors from disk
    (proxies/training/lazy_tensors.py) is read one tensor at a time.

    Returns:
        An iterator over the names and tensors of the large model.

    Raises:
        ValueError: As `grow`, before the first tensor.
    """
    check_growth(small, large, method)
    if method in ("pad", "stack") and noise:
        raise ValueError(
            f"method {method!r} adds no noise, got noise {noise:g}: leave it out, or choose another method"
        )
    check_shapes(state, compute_shapes(small))
    if doubt := check_break_even(small, large):
        warnings.warn(doubt, stacklevel=2)
    return _grow_tensors(state, small, large, method, shrink, noise)


def _grow_tensors(
    state: Mapping[str, Tensor],
    small: ProxyConfig,
    large: ProxyConfig,
    method: GrowthMethod,
    shrink: float,
    noise: float | None,
) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(large.seed)
    for name, shape in compute_shapes(large).items():
        value, role = state[find_source_name(name, small)], get_role(name)
        if method == "shrink-pad-perturb":
            fresh = draw_parameter(shape, compute_rules(large)[role], generator)
            yield name, _shrink_pad_perturb(value, fresh, role, shrink, 1.0 if noise is None else noise)
        elif method == "pad":
            yield name, _pad(value, shape, role, small, large)
        else:
            yield name, _duplicate(value, role, small, large, method, noise, generator)


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check the names and shapes of a model's tensors, without reading those on disk.

    Args:
        state: Tensors by name. A mapping with an attribute `shapes` is not read.
        expected: The shape of every tensor by name.

    Raises:
        ValueError: If tensors are missing, unknown or have another shape. The message names up to six of them.
    """
    sizes = {name: tuple(tensor.shape) for name, tensor in getattr(state, "shapes", state).items()}
    wrong = [name for name in expected.keys() | sizes.keys() if sizes.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(
            "the checkpoint has another architecture; parameters that are missing, unknown or have another shape: "
            f"{', '.join(sorted(wrong)[:6])}"
        )


def compute_shapes(config: ProxyConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


def find_source_name(name: str, small: ProxyConfig) -> str:
    """Return the small model's parameter from which one of the large model grows: block i from block i mod l."""
    head, *rest = name.split(".")
    return f"{head}.{int(rest[0]) % small.n_layers}.{rest[1]}" if rest else name


def _shrink_pad_perturb(value: Tensor, fresh: Tensor, role: Role, shrink: float, noise: float) -> Tensor:
    leading = tuple(slice(n) for n in value.shape)
    if role in GAIN_ROLES:
        tensor = torch.ones_like(fresh, dtype=value.dtype)
        tensor[leading] = value
        return tensor
    tensor = fresh.to(value.dtype).mul_(noise)
    tensor[leading] += shrink * value
    return tensor


def _pad(value: Tensor, shape: tuple[int, ...], role: Role, small: ProxyConfig, large: ProxyConfig) -> Tensor:
    # RMSNorm of a zero-padded stream is larger by sqrt(d_large / d_small). With this factor the logits are equal up to
    # the norm's epsilon.
    factor = {"norm": 1.0, "final_norm": 1.0}.get(role, 0.0) * math.sqrt(small.d_model / large.d_model) or 1.0
    readout = compute_rules(small)["readout"].multiplier / compute_rules(large)["readout"].multiplier
    # A tied table is also the input embedding, so the factor of its output side goes into the last gain.
    if role == ("final_norm" if small.tied else "readout"):
        factor *= readout
    tensor = (torch.ones if role in GAIN_ROLES else torch.zeros)(shape, dtype=value.dtype)
    tensor[tuple(slice(n) for n in value.shape)] = factor * value
    return tensor


def _duplicate(
    value: Tensor,
    role: Role,
    small: ProxyConfig,
    large: ProxyConfig,
    method: GrowthMethod,
    noise: float | None,
    generator: torch.Generator,
) -> Tensor:
    k = large.d_model // small.d_model
    tensor = tile_width(value, role, k)
    # The factor is 1 under muP, whose multiplier falls as 1/k. A tied table is also the input embedding, so the last
    # gain takes its factor.
    out = compute_rules(small)["readout"].multiplier / compute_rules(large)["readout"].multiplier / k
    if role == ("final_norm" if small.tied else "readout"):
        tensor *= out
    if role in GAIN_ROLES:
        return tensor
    if method == "duplicate" and noise:
        tensor += _draw_normal(tensor, generator).mul_(noise / math.sqrt(value.shape[-1]))
    if role == "hidden":
        tensor /= k
    if method == "hyperclone" and role in ("hidden", "readout"):
        share = 0.1 if noise is None else noise
        width = value.shape[-1]
        # An odd copy at the end stays as it is.
        for pair in range(k // 2):
            first = tensor[:, 2 * pair * width : (2 * pair + 1) * width]
            second = tensor[:, (2 * pair + 1) * width : (2 * pair + 2) * width]
            added = _draw_normal(first, generator).mul_((share * first.square().mean()).sqrt())
            first += added
            second -= added
    return tensor


def tile_width(value: Tensor, role: Role, k: int) -> Tensor:
    """Return a copy with every width axis repeated k times."""
    repeats: tuple[int, ...] = (1, k)
    if role == "hidden":
        repeats = (k, k)
    elif role in GAIN_ROLES:
        repeats = (1,) if role == "qk_norm" else (k,)
    return value.tile(repeats)


def _draw_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape).normal_(generator=generator).to(like.dtype)
