"""Which model can be grown into which, and when. No torch here, so that a study's target is checked in no time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, get_args

from proxies.config.proxy import ProxyConfig

Method = Literal[
    "shrink-pad-perturb", "pad", "duplicate", "hyperclone", "stack"
]  # what each does: proxies/growth/weights.py
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
    "tokenizer",
)
ANY_WIDTH: tuple[Method, ...] = ("shrink-pad-perturb", "pad")
# Growth in N beyond which warm starts lost to training from scratch at 20 tokens per parameter: 4 to 6 times, as published.
BREAK_EVEN = 4.0


def check_growth(small: ProxyConfig, large: ProxyConfig, method: Method) -> None:
    """ValueError with all the reasons why a model of `small` cannot be grown into one of `large`."""
    if method not in get_args(Method):
        raise ValueError(f"needed a method out of {', '.join(get_args(Method))}, got {method!r}")
    problems = differences(small, large)
    if problems:
        problems = [f"growth keeps everything but width and depth; these differ: {'; '.join(problems)}"]
    if large.d_model < small.d_model:
        problems.append(
            f"needed a large model at least as wide as the small one ({small.d_model}), got d_model {large.d_model}"
        )
    elif method == "stack" and large.d_model > small.d_model:
        problems.append(
            f"method 'stack' grows depth alone, got d_model {small.d_model} to {large.d_model}: every other method grows both"
        )
    elif method not in ANY_WIDTH and large.d_model % small.d_model:
        problems.append(
            f"duplication needs a whole growth factor, got {small.d_model} to {large.d_model}: choose a multiple of {small.d_model} "
            f"or a method that takes any width, {' or '.join(ANY_WIDTH)}"
        )
    if large.n_layers % small.n_layers:
        problems.append(
            f"depth grows by repeating the whole stack, so n_layers must be a multiple of {small.n_layers}, got {large.n_layers}"
        )
    if problems:
        raise ValueError("; ".join(problems))


def differences(small: ProxyConfig, large: ProxyConfig) -> list[str]:
    """What keeps two models from being of one family, tokens' meanings included: `name: value there to value here`."""
    alike = {"tokenizer": _same_tokenizer(small, large), "base_layers": _same_base(small, large)}
    said = [
        f"{name}: {getattr(small, name)} to {getattr(large, name)}"
        for name in SAME
        if getattr(small, name) != getattr(large, name) and not alike.get(name)
    ]
    if small.tokenizer == large.tokenizer == "bpe" and small.corpus != large.corpus:
        said.append(f"corpus, on which the tokenizer is trained: {small.corpus} to {large.corpus}")
    return said


def _same_tokenizer(small: ProxyConfig, large: ProxyConfig) -> bool:
    """Whether two tokenizer.json files hold the same, wherever they lie."""
    paths = [Path(c.tokenizer).expanduser() for c in (small, large)]
    return all(p.suffix == ".json" and p.is_file() for p in paths) and paths[0].read_bytes() == paths[1].read_bytes()


def _same_base(small: ProxyConfig, large: ProxyConfig) -> bool:
    """Whether both have one base depth; a model without one is its own."""
    return (small.base_layers or small.n_layers) == (large.base_layers or large.n_layers)


def beyond_break_even(small: ProxyConfig, large: ProxyConfig) -> str | None:
    """A warning where N (`counts.N`) grows by more than was ever found to pay."""
    factor = large.counts.N / small.counts.N
    if factor <= BREAK_EVEN:
        return None
    return (
        f"N grows {factor:.1f} times, {small.counts.N:,} to {large.counts.N:,}: at 20 tokens per parameter warm starts were found to "
        "break even with training from scratch at 4 to 6 times (arXiv 2411.07340, 2605.13405): start from a larger proxy, or ask `proxies grow --plan`"
    )


def stacking_tokens(N: float, C: float) -> float:
    """Tokens after which to stack for a target of N parameters and C = 6 N D FLOPs (G_stack, arXiv 2405.15319, its fit)."""
    return float(10 ** (0.88 * math.log10(N) + 163.27 / math.log10(C) - 5.74))
