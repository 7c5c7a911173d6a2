"""Which model can be grown into which, and when. This module does not import torch, so checking a target is fast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, get_args

from proxies.config.proxy import ProxyConfig

# proxies/growth/weights.py describes what each method does.
GrowthMethod = Literal["shrink-pad-perturb", "pad", "duplicate", "hyperclone", "stack"]
# Settings that two models must share for one to be grown into the other.
FAMILY_FIELDS = (
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
    "tokenizer",
)
# Methods that do not need the large width to be a multiple of the small one.
ANY_WIDTH_METHODS: tuple[GrowthMethod, ...] = ("shrink-pad-perturb", "pad")
# Growth in N beyond which warm starts lost to training from scratch at 20 tokens per parameter: 4 to 6 times, as
# published (arXiv 2411.07340, 2605.13405).
BREAK_EVEN_GROWTH = 4.0


def check_growth(small: ProxyConfig, large: ProxyConfig, method: GrowthMethod) -> None:
    """Check that a model can be grown into another one.

    Args:
        small: The model to grow.
        large: The model that it becomes.
        method: How the weights are grown.

    Raises:
        ValueError: If it cannot. The message lists every reason.
    """
    if method not in get_args(GrowthMethod):
        raise ValueError(f"needed a method out of {', '.join(get_args(GrowthMethod))}, got {method!r}")
    problems = find_differences(small, large)
    if problems:
        problems = [f"growth keeps everything but width and depth; these differ: {'; '.join(problems)}"]
    if large.d_model < small.d_model:
        problems.append(
            f"needed a large model at least as wide as the small one ({small.d_model}), got d_model {large.d_model}"
        )
    elif method == "stack" and large.d_model > small.d_model:
        problems.append(
            f"method 'stack' grows depth alone, got d_model {small.d_model} to {large.d_model}: "
            "every other method grows both"
        )
    elif method not in ANY_WIDTH_METHODS and large.d_model % small.d_model:
        problems.append(
            f"duplication needs a whole growth factor, got {small.d_model} to {large.d_model}: choose a multiple of "
            f"{small.d_model} or a method that takes any width, {' or '.join(ANY_WIDTH_METHODS)}"
        )
    if large.n_layers % small.n_layers:
        problems.append(
            f"depth grows by repeating the whole stack, so n_layers must be a multiple of {small.n_layers}, "
            f"got {large.n_layers}"
        )
    if problems:
        raise ValueError("; ".join(problems))


def find_differences(small: ProxyConfig, large: ProxyConfig) -> list[str]:
    """List the settings that keep two models from being of one family.

    Two tokenizer files with the same content count as equal, as do two equal base depths of which one is implied.

    Args:
        small: The small model.
        large: The large model.

    Returns:
        One line per setting, "name: small value to large value"; empty for models of one family.
    """
    equivalent = {"tokenizer": _has_same_tokenizer(small, large), "base_layers": _has_same_base_depth(small, large)}
    lines = [
        f"{name}: {getattr(small, name)} to {getattr(large, name)}"
        for name in FAMILY_FIELDS
        if getattr(small, name) != getattr(large, name) and not equivalent.get(name)
    ]
    if small.tokenizer == large.tokenizer == "bpe" and small.corpus != large.corpus:
        lines.append(f"corpus, on which the tokenizer is trained: {small.corpus} to {large.corpus}")
    return lines


def _has_same_tokenizer(small: ProxyConfig, large: ProxyConfig) -> bool:
    """Return whether two tokenizer.json files have the same content, whatever their paths."""
    paths = [Path(config.tokenizer).expanduser() for config in (small, large)]
    are_files = all(path.suffix == ".json" and path.is_file() for path in paths)
    return are_files and paths[0].read_bytes() == paths[1].read_bytes()


def _has_same_base_depth(small: ProxyConfig, large: ProxyConfig) -> bool:
    """Return whether both have one base depth. A model without `base_layers` is its own base."""
    return (small.base_layers or small.n_layers) == (large.base_layers or large.n_layers)


def check_break_even(small: ProxyConfig, large: ProxyConfig) -> str | None:
    """Return a warning if N (`counts.N`) grows by more than warm starts were ever found to pay for, else None."""
    growth = large.counts.N / small.counts.N
    if growth <= BREAK_EVEN_GROWTH:
        return None
    return (
        f"N grows {growth:.1f} times, {small.counts.N:,} to {large.counts.N:,}: at 20 tokens per parameter warm starts "
        "were found to break even with training from scratch at 4 to 6 times (arXiv 2411.07340, 2605.13405): start "
        "from a larger proxy, or ask `proxies grow --plan`"
    )


def compute_stacking_tokens(N: float, C: float) -> float:
    """Return after how many tokens to stack a model, by the published fit of G_stack (arXiv 2405.15319).

    log10(tokens) = 0.88 log10(N) + 163.27 / log10(C) - 5.74

    Args:
        N: Parameters of the target.
        C: FLOPs of the target's training, 6 N D.

    Returns:
        Tokens of the small model's training.
    """
    return float(10 ** (0.88 * math.log10(N) + 163.27 / math.log10(C) - 5.74))
