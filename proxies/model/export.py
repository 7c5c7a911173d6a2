"""Export the muP table for other trainers: as JSON, as torchtitan's parameter groups, or as Megatron-LM's flags."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from proxies.config.proxy import ProxyConfig
from proxies.model.mup import ParameterRule, compute_rules, get_role
from proxies.model.recipe import compute_timescale
from scaling.common.json_text import dump_json

# The last part of the name of every parameter.
LEAVES = (
    "embed",
    "attn_norm",
    "q",
    "k",
    "v",
    "q_norm",
    "k_norm",
    "o",
    "mlp_norm",
    "gate",
    "up",
    "down",
    "final_norm",
    "readout",
)

# Parameter names of torchtitan's Llama-style models, old and new. Patterns are searched, and the first match wins.
TORCHTITAN = {
    "embed": r"tok_embeddings(\.embedding)?\.weight$",
    "q": r"\.wq\.weight$",
    "k": r"\.wk\.weight$",
    "v": r"\.wv\.weight$",
    "o": r"\.wo\.weight$",
    "q_norm": r"\.q_norm\.weight$",
    "k_norm": r"\.k_norm\.weight$",
    "gate": r"\.w1\.weight$",
    "down": r"\.w2\.weight$",
    "up": r"\.w3\.weight$",
    "attn_norm": r"\.attention_norm\.weight$",
    "mlp_norm": r"\.ffn_norm\.weight$",
    "final_norm": r"^norm\.weight$",
    "readout": r"^(output|lm_head)\.weight$",
}
# Muon's `adjust_lr_fn` in torch, by the name of our optimizer.
TORCHTITAN_MUON = {"muon": "original", "muon-rms": "match_rms_adamw"}

MEGATRON_DECAY = {"1-sqrt": "minus_sqrt", "linear": "linear", "cosine": "cosine"}

# Command-line flags without their dashes; None for a flag without a value.
Flags = dict[str, str | int | None]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one rule.

    Attributes:
        pattern: Pattern of torchtitan's names of these parameters.
        leaves: The last part of our name of each parameter.
        rule: Their rule, without a forward multiplier.
    """

    pattern: str
    leaves: tuple[str, ...]
    rule: ParameterRule


def list_leaves(config: ProxyConfig) -> tuple[str, ...]:
    """Return the last parts of the names of the parameters that a model of this configuration has."""
    absent = (() if config.qk_norm else ("q_norm", "k_norm")) + (("readout",) if config.tied else ())
    return tuple(leaf for leaf in LEAVES if leaf not in absent)


def absorb_multipliers(config: ProxyConfig) -> dict[str, ParameterRule]:
    """Return the muP table with every forward multiplier absorbed, for trainers whose model has no multipliers.

    A matrix W behind a multiplier c trains as W' = c W with initial std c std, rate c lr, decay wd / c, and epsilon
    eps / c under Adam, whose step does not depend on the size of a gradient (derived, tested). alpha_in goes into the
    embedding, alpha_attn into the queries (or the gain of their norm, if there is one), the depth multiplier into o and
    down, and alpha_out / m into the readout.

    Args:
        config: The proxy.

    Returns:
        The rule of every parameter, by the last part of its name.

    Raises:
        ValueError: If the table is tied, which cannot absorb two multipliers.
    """
    table = compute_rules(config)
    embedding, readout, branch = (table[role].multiplier for role in ("embedding", "readout", "hidden"))
    if config.tied and (embedding != 1 or readout != 1):
        raise ValueError(
            "needed an untied table, or both its multipliers 1, to write them into the weights, "
            f"got tied = true with {embedding:g} on its output and {readout:g} on its other side's input: "
            "use the JSON form in a trainer with multipliers, or tied = false"
        )
    query = "q_norm" if config.qk_norm else "q"
    multipliers = {"embed": embedding, "readout": readout, "o": branch, "down": branch, query: config.alpha_attn}
    return {leaf: _absorb(table[get_role(leaf)], multipliers.get(leaf, 1.0)) for leaf in list_leaves(config)}


def make_groups(config: ProxyConfig) -> list[ParameterGroup]:
    """Return the parameters grouped by rule, each group with a pattern of torchtitan's names.

    Every parameter is in exactly one group.
    """
    leaves_by_rule: dict[ParameterRule, list[str]] = {}
    for leaf, rule in absorb_multipliers(config).items():
        leaves_by_rule.setdefault(rule, []).append(leaf)
    return [
        ParameterGroup("|".join(TORCHTITAN[leaf] for leaf in leaves), tuple(leaves), rule)
        for rule, leaves in leaves_by_rule.items()
    ]


def format_json(config: ProxyConfig, tokens: int | None = None) -> str:
    """Return the configuration and the rule of every kind of parameter as JSON.

    Rules are given with forward multipliers and, unless the table is tied, also without.

    Args:
        config: The proxy.
        tokens: Tokens of the run; adds its decay timescale.

    Returns:
        JSON text.
    """
    table = compute_rules(config)
    payload: dict[str, Any] = {
        "config": config.model_dump(),
        "m": config.m,
        "r": config.r,
        "parameters": {leaf: {"role": get_role(leaf)} | asdict(table[get_role(leaf)]) for leaf in list_leaves(config)},
        "multipliers": {
            "embedding_output": table["embedding"].multiplier,
            "readout_input": table["readout"].multiplier,
            "branch": table["hidden"].multiplier,
            "attention_scale": config.alpha_attn / config.d_head**0.5,
        },
        "betas": [config.beta1, config.beta2],
    }
    if not config.tied:
        payload["without_multipliers"] = {leaf: asdict(rule) for leaf, rule in absorb_multipliers(config).items()}
    if tokens is not None:
        payload |= {"tokens": tokens, "decay_timescale": compute_timescale(config, tokens)}
    return dump_json(payload, indent=2)


def format_table(config: ProxyConfig, tokens: int | None = None) -> str:
    """Return a table for the terminal, with a line for each kind of parameter.

    Args:
        config: The proxy.
        tokens: Tokens of the run; adds its decay timescale.

    Returns:
        Lines of text.
    """
    lines = [
        f"{config.optimizer} under {config.parametrization}: width {config.d_model} (m {config.m:g}), "
        f"{config.n_layers} layers (r {config.r:g}), N {config.counts.N:,}, "
        f"batch {config.batch_seqs} x {config.seq_len}",
        f"{'':24}{'init std':>12}{'lr':>12}{'decay':>12}{'eps':>12}{'multiplier':>12}",
    ]
    for role, rule in compute_rules(config).items():
        names = ", ".join(leaf for leaf in list_leaves(config) if get_role(leaf) == role)
        if names:
            has_both = rule.init_mean and rule.init_std
            init = f"1 + {rule.init_std:g}" if has_both else f"{rule.init_mean or rule.init_std:.4g}"
            lines.append(
                f"{role:24}{init:>12}{rule.lr:12.4g}{rule.weight_decay:12.4g}{rule.eps:12.2g}{rule.multiplier:12.4g}"
            )
            lines.append(f"  {names}")
    lines.append(
        f"betas {config.beta1:g}, {config.beta2:g}; attention scale {config.alpha_attn:g}/sqrt({config.d_head})"
    )
    if tokens is not None:
        lines.append(
            f"{tokens:,} tokens; weights remember {compute_timescale(config, tokens):.3g} of the run "
            "(1 / (lr x decay x steps))"
        )
    return "\n".join(lines)


def format_torchtitan(config: ProxyConfig) -> str:
    """Return Python code for torchtitan's `OptimizersContainer.Config(param_groups=...)`.

    The initial standard deviations are comments, since torchtitan sets them in the model.

    Args:
        config: The proxy.

    Returns:
        Python code that assigns `param_groups`.

    Raises:
        ValueError: If torchtitan does not build the optimizer (it has AdamW and Muon).
    """
    if config.optimizer != "adamw" and config.optimizer not in TORCHTITAN_MUON:
        raise ValueError(
            f"needed an optimizer that torchtitan builds (adamw, muon, muon-rms), got {config.optimizer!r}"
        )
    lines = [
        f"# muP at width {config.d_model} (base {config.base_width}), {config.n_layers} layers, "
        "written without forward multipliers.",
        f"# The model must scale attention by 1/sqrt({config.d_head}) and start each group with the standard deviation "
        "given",
        "# (readout: zeros where 0). A schedule must multiply each group's own rate.",
        "param_groups = [",
    ]
    for group in make_groups(config):
        rule = group.rule
        init = f"gain {rule.init_mean:.9g}" if rule.init_mean else f"std {rule.init_std:.9g}"
        name: str = "AdamW"
        kwargs: dict[str, Any] = {"lr": rule.lr, "weight_decay": rule.weight_decay}
        if config.optimizer in TORCHTITAN_MUON and get_role(group.leaves[0]) == "hidden":
            name = "Muon"
            kwargs |= {"momentum": config.momentum, "adjust_lr_fn": TORCHTITAN_MUON[config.optimizer]}
        else:
            kwargs |= {"betas": (config.beta1, config.beta2), "eps": rule.eps}
        lines += [
            f"    ParamGroupConfig(  # {', '.join(group.leaves)}: {init}",
            f'        pattern=r"{group.pattern}",',
            f'        optimizer_name="{name}",',
            f"        optimizer_kwargs={kwargs!r},",
            "    ),",
        ]
    return "\n".join([*lines, "]"])


def format_megatron(config: ProxyConfig, tokens: int | None = None) -> str:
    """Return flags for Megatron-LM's own muP (`--scaling-recipe`), one per line.

    Comments list what the flags cannot express.

    Args:
        config: The proxy.
        tokens: Tokens of the run; adds the schedule.

    Returns:
        Lines of text.

    Raises:
        ValueError: If the optimizer is not AdamW or the parametrization is not muP.
    """
    if config.optimizer != "adamw" or config.parametrization != "mup":
        raise ValueError(
            "needed optimizer 'adamw' under 'mup' for Megatron's recipe, "
            f"got {config.optimizer!r} under {config.parametrization!r}"
        )
    flags = _make_megatron_flags(config)
    notes: list[str] = []
    if tokens is not None:
        flags |= _make_megatron_schedule(config, tokens)
        if "lr-decay-style" not in flags:
            notes.append(f"schedule {config.schedule!r} with decay {config.decay!r} has to be added by hand")
    notes += [
        "the embedding decays there unless excluded; here it does not",
        "its output projections start at init-method-std / sqrt(2 base layers); here like every hidden matrix",
        "its readout starts at a random matrix; here at zero",
    ]
    # Megatron's default for this flag is 1, which it takes for "not given" and replaces by 1 / m.
    if flags["mup-output-mult"] == "1" and config.m != 1:
        flags["mup-output-mult"] = "1.0000001"
        notes.append("a mup-output-mult of exactly 1 means 1/m there, so it is slightly above 1")
    if config.depth_power != 1:
        notes += ["hidden decay is not multiplied by the width there: lr x decay falls as 1/m"]
        notes += [f"it has no depth power {config.depth_power:g}"] if config.r != 1 else []
    if config.embed_lr_mult != 1:
        notes.append(f"embed_lr_mult {config.embed_lr_mult:g} has no flag")
    if config.qk_norm:
        notes.append("the epsilon of q and k norms is divided by the width there; here it is not")
    header = [
        "# for Megatron-LM with --scaling-recipe (2026); what these flags cannot express:",
        *(f"#  - {note}" for note in notes),
    ]
    return "\n".join([*header, *(f"--{k}" if v is None else f"--{k} {v}" for k, v in flags.items())])


def _make_megatron_flags(config: ProxyConfig) -> Flags:
    """Return the flags of shape, parametrization and optimizer."""
    table = compute_rules(config)
    is_deep = config.depth_power == 1
    flags: Flags = {
        "num-layers": config.n_layers,
        "hidden-size": config.d_model,
        "ffn-hidden-size": config.d_ff,
        "num-attention-heads": config.n_heads,
        "kv-channels": config.d_head,
        "seq-length": config.seq_len,
        "max-position-embeddings": config.seq_len,
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "swiglu": None,
        "disable-bias-linear": None,
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "scaling-recipe": "depth_mup" if is_deep else "mup",
        "scaling-base-hidden-size": config.base_width,
    }
    if is_deep:
        flags["scaling-base-num-layers"] = config.base_layers or config.n_layers
    flags |= {
        # Megatron's softmax scale is sqrt(base head size) / head size^power.
        "scaling-base-head-dim": _format_number(config.d_head * config.alpha_attn**2),
        "mup-embedding-mult": _format_number(table["embedding"].multiplier),
        "mup-output-mult": _format_number(table["readout"].multiplier),
        "init-method-std": _format_number(config.init_std),
        "embedding-init-method-std": _format_number(config.embed_std),
        "optimizer": "adam",
        "lr": _format_number(config.lr),
        "weight-decay": _format_number(config.weight_decay),
        "adam-beta1": _format_number(config.beta1),
        "adam-beta2": _format_number(config.beta2),
        "adam-eps": _format_number(config.eps),
        "clip-grad": 0,
        "global-batch-size": config.batch_seqs,
    }
    if config.n_kv_heads != config.n_heads:
        flags |= {"group-query-attention": None, "num-query-groups": config.n_kv_heads}
    if config.qk_norm:
        flags["qk-layernorm"] = None
    if not config.tied:
        flags["untie-embeddings-and-output-weights"] = None
    return flags


def _make_megatron_schedule(config: ProxyConfig, tokens: int) -> Flags:
    """Return the flags of length and schedule; without "lr-decay-style" if Megatron does not have the schedule."""
    samples = tokens // config.seq_len
    flags: Flags = {"train-samples": samples, "lr-decay-samples": samples, "min-lr": 0}
    flags["lr-warmup-samples"] = config.warmup_tokens // config.seq_len
    if config.schedule == "wsd" and config.decay in MEGATRON_DECAY:
        flags |= {"lr-decay-style": "WSD", "lr-wsd-decay-style": MEGATRON_DECAY[config.decay]}
        flags["lr-wsd-decay-samples"] = round(samples * config.cooldown)
    elif config.schedule in ("cosine", "linear", "constant"):
        flags["lr-decay-style"] = config.schedule
        flags["min-lr"] = _format_number(config.lr * config.lr_floor) if config.schedule == "cosine" else 0
    return flags


def _absorb(rule: ParameterRule, multiplier: float) -> ParameterRule:
    return replace(
        rule,
        init_mean=multiplier * rule.init_mean,
        init_std=multiplier * rule.init_std,
        lr=multiplier * rule.lr,
        weight_decay=rule.weight_decay / multiplier,
        eps=rule.eps / multiplier,
        multiplier=1.0,
    )


def _format_number(value: float) -> str:
    return re.sub(r"e-0?", "e-", f"{value:.12g}")
