"""The muP table for other trainers: as plain JSON, as torchtitan's parameter groups, as Megatron-LM's flags."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from proxies.config.proxy import ProxyConfig
from proxies.model.mup import ParameterRule, get_role, compute_rules
from proxies.model.recipe import compute_timescale

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

# Parameter names of torchtitan's Llama-style models, old and new; patterns are searched, the first that matches wins.
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

MEGATRON_DECAY = {"1-sqrt": "minus_sqrt", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike: a pattern of their names, and their rule, without a forward multiplier."""

    pattern: str
    leaves: tuple[str, ...]  # our own last name of each
    rule: ParameterRule


def list_leaves(config: ProxyConfig) -> tuple[str, ...]:
    """The last names of the parameters that a model of this configuration has."""
    absent = (() if config.qk_norm else ("q_norm", "k_norm")) + (("readout",) if config.tied else ())
    return tuple(leaf for leaf in LEAVES if leaf not in absent)


def absorb_multipliers(config: ProxyConfig) -> dict[str, ParameterRule]:
    """The table by last name with every forward multiplier absorbed, for trainers whose model has none.

    A matrix W behind a multiplier c learns as W' = c W with initial std c std, rate c lr, decay wd / c, epsilon eps / c
    under Adam (its step does not see the size of a gradient; derived, tested). alpha_in goes into the embedding,
    alpha_attn into the queries (their norm's gain if there is one), the depth multiplier into o and down, alpha_out / m
    into the readout. A tied table cannot absorb two: ValueError.
    """
    table = compute_rules(config)
    into, out, branch = (table[role].multiplier for role in ("embedding", "readout", "hidden"))
    if config.tied and (into != 1 or out != 1):
        raise ValueError(
            f"needed an untied table, or both its multipliers 1, to write them into the weights, got tied = true with {into:g} on its "
            f"output and {out:g} on its other side's input: use the JSON form in a trainer with multipliers, or tied = false"
        )
    query = "q_norm" if config.qk_norm else "q"
    factor = {"embed": into, "readout": out, "o": branch, "down": branch, query: config.alpha_attn}
    return {leaf: _absorb(table[get_role(leaf)], factor.get(leaf, 1.0)) for leaf in list_leaves(config)}


def make_groups(config: ProxyConfig) -> list[ParameterGroup]:
    """Parameters with one rule together, each group as a pattern of torchtitan's names; every parameter in one."""
    alike: dict[ParameterRule, list[str]] = {}
    for leaf, rule in absorb_multipliers(config).items():
        alike.setdefault(rule, []).append(leaf)
    return [ParameterGroup("|".join(TORCHTITAN[leaf] for leaf in leaves), tuple(leaves), rule) for rule, leaves in alike.items()]


def format_json(config: ProxyConfig, tokens: int | None = None) -> str:
    """Everything: the configuration, the rule of every kind of parameter with its forward multiplier, and without."""
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
    return json.dumps(payload, indent=2)


def format_table(config: ProxyConfig, tokens: int | None = None) -> str:
    """For people: one line for each kind of parameter."""
    lines = [
        f"{config.optimizer} under {config.parametrization}: width {config.d_model} (m {config.m:g}), {config.n_layers} layers (r {config.r:g}), "
        f"N {config.counts.N:,}, batch {config.batch_seqs} x {config.seq_len}",
        f"{'':24}{'init std':>12}{'lr':>12}{'decay':>12}{'eps':>12}{'multiplier':>12}",
    ]
    for role, rule in compute_rules(config).items():
        names = ", ".join(leaf for leaf in list_leaves(config) if get_role(leaf) == role)
        if names:
            start = (
                f"1 + {rule.init_std:g}"
                if rule.init_mean and rule.init_std
                else f"{rule.init_mean or rule.init_std:.4g}"
            )
            lines.append(
                f"{role:24}{start:>12}{rule.lr:12.4g}{rule.weight_decay:12.4g}{rule.eps:12.2g}{rule.multiplier:12.4g}"
            )
            lines.append(f"  {names}")
    lines.append(
        f"betas {config.beta1:g}, {config.beta2:g}; attention scale {config.alpha_attn:g}/sqrt({config.d_head})"
    )
    if tokens is not None:
        lines.append(
            f"{tokens:,} tokens; weights remember {compute_timescale(config, tokens):.3g} of the run (1 / (lr x decay x steps))"
        )
    return "\n".join(lines)


def format_torchtitan(config: ProxyConfig) -> str:
    """Python for torchtitan's `OptimizersContainer.Config(param_groups=...)`, with the initial stds as comments.

    ValueError for optimizers that torchtitan does not build (it has AdamW and Muon).
    """
    muon = {"muon": "original", "muon-rms": "match_rms_adamw"}
    if config.optimizer != "adamw" and config.optimizer not in muon:
        raise ValueError(
            f"needed an optimizer that torchtitan builds (adamw, muon, muon-rms), got {config.optimizer!r}"
        )
    lines = [
        f"# muP at width {config.d_model} (base {config.base_width}), {config.n_layers} layers, written without forward multipliers.",
        f"# The model must scale attention by 1/sqrt({config.d_head}) and start each group with the standard deviation given",
        "# (readout: zeros where 0). A schedule must multiply each group's own rate.",
        "param_groups = [",
    ]
    for group in make_groups(config):
        rule = group.rule
        start = f"gain {rule.init_mean:.9g}" if rule.init_mean else f"std {rule.init_std:.9g}"
        kind, more = "AdamW", {"betas": (config.beta1, config.beta2), "eps": rule.eps}
        if config.optimizer in muon and get_role(group.leaves[0]) == "hidden":
            kind, more = "Muon", {"momentum": getattr(config, "momentum", 0.95), "adjust_lr_fn": muon[config.optimizer]}
        kwargs = {"lr": rule.lr, "weight_decay": rule.weight_decay} | more
        lines += [
            f"    ParamGroupConfig(  # {', '.join(group.leaves)}: {start}",
            f'        pattern=r"{group.pattern}",',
            f'        optimizer_name="{kind}",',
            f"        optimizer_kwargs={kwargs!r},",
            "    ),",
        ]
    return "\n".join([*lines, "]"])


def format_megatron(config: ProxyConfig, tokens: int | None = None) -> str:
    """Flags for Megatron-LM's own muP (`--scaling-recipe`), one to a line, and as comments what they cannot say.

    ValueError for anything but AdamW under muP.
    """
    if config.optimizer != "adamw" or config.parametrization != "mup":
        raise ValueError(
            f"needed optimizer 'adamw' under 'mup' for Megatron's recipe, got {config.optimizer!r} under {config.parametrization!r}"
        )
    table = compute_rules(config)
    deep = config.depth_power == 1
    flags: dict[str, Any] = {
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
        "scaling-recipe": "depth_mup" if deep else "mup",
        "scaling-base-hidden-size": config.base_width,
    }
    if deep:
        flags["scaling-base-num-layers"] = config.base_layers or config.n_layers
    # Megatron's softmax scale is sqrt(base head size) / head size^power.
    flags |= {
        "scaling-base-head-dim": _number(config.d_head * config.alpha_attn**2),
        "mup-embedding-mult": _number(table["embedding"].multiplier),
        "mup-output-mult": _number(table["readout"].multiplier),
        "init-method-std": _number(config.init_std),
        "embedding-init-method-std": _number(config.embed_std),
        "optimizer": "adam",
        "lr": _number(config.lr),
        "weight-decay": _number(config.weight_decay),
        "adam-beta1": _number(config.beta1),
        "adam-beta2": _number(config.beta2),
        "adam-eps": _number(config.eps),
        "clip-grad": 0,
        "global-batch-size": config.batch_seqs,
    }
    if config.n_kv_heads != config.n_heads:
        flags |= {"group-query-attention": None, "num-query-groups": config.n_kv_heads}
    if config.qk_norm:
        flags["qk-layernorm"] = None
    if not config.tied:
        flags["untie-embeddings-and-output-weights"] = None
    notes: list[str] = []
    if tokens is not None:
        samples = tokens // config.seq_len
        flags |= {"train-samples": samples, "lr-decay-samples": samples, "min-lr": 0}
        flags |= {"lr-warmup-samples": config.warmup_tokens // config.seq_len}
        if config.schedule == "wsd" and config.decay in MEGATRON_DECAY:
            flags |= {"lr-decay-style": "WSD", "lr-wsd-decay-style": MEGATRON_DECAY[config.decay]}
            flags["lr-wsd-decay-samples"] = round(samples * config.cooldown)
        elif config.schedule in ("cosine", "linear", "constant"):
            flags["lr-decay-style"] = config.schedule
            flags["min-lr"] = _number(config.lr * config.lr_floor) if config.schedule == "cosine" else 0
        else:
            notes.append(f"schedule {config.schedule!r} with decay {config.decay!r} has to be added by hand")
    notes += [
        "the embedding decays there unless excluded; here it does not",
        "its output projections start at init-method-std / sqrt(2 base layers); here like every hidden matrix",
        "its readout starts at a random matrix; here at zero",
    ]
    if flags["mup-output-mult"] == "1" and config.m != 1:  # its default means "not given", and becomes 1 / m
        flags["mup-output-mult"] = "1.0000001"
        notes.append("a mup-output-mult of exactly 1 means 1/m there, so it is a hair above 1")
    if not deep:
        notes += ["hidden decay is not multiplied by the width there: lr x decay falls as 1/m"]
        notes += [f"it knows no depth power {config.depth_power:g}"] if config.r != 1 else []
    if config.embed_lr_mult != 1:
        notes.append(f"embed_lr_mult {config.embed_lr_mult:g} has no flag")
    if config.qk_norm:
        notes.append("the epsilon of q and k norms is divided by the width there; here it is not")
    said = [
        "# for Megatron-LM with --scaling-recipe (2026); what these flags cannot say:",
        *(f"#  - {n}" for n in notes),
    ]
    return "\n".join([*said, *(f"--{k}" if v is None else f"--{k} {v}" for k, v in flags.items())])


def _absorb(rule: ParameterRule, c: float) -> ParameterRule:
    return replace(
        rule,
        init_mean=c * rule.init_mean,
        init_std=c * rule.init_std,
        lr=c * rule.lr,
        weight_decay=rule.weight_decay / c,
        eps=rule.eps / c,
        multiplier=1.0,
    )


def _number(value: float) -> str:
    return re.sub(r"e-0?", "e-", f"{value:.12g}")
