"""A recipe exported to other trainers gives the same training."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from proxies.config.proxy import ProxyConfig
from proxies.model.export import (
    TORCHTITAN,
    absorb_multipliers,
    format_json,
    format_megatron,
    format_torchtitan,
    make_groups,
)
from proxies.model.mup import compute_rules
from proxies.model.optimizers import make_optimizer
from proxies.model.transformer import Transformer, build, compute_loss

WIDE: dict[str, Any] = {
    "d_model": 64,
    "base_width": 32,
    "n_layers": 4,
    "base_layers": 2,
    "q_per_kv": 2,
    "seq_len": 16,
    "vocab": 40,
    "lr": 0.01,
    "eps": 1e-5,
    "weight_decay": 0.4,
    "alpha_in": 3.0,
    "alpha_out": 2.0,
    "alpha_attn": 1.5,
    "embed_lr_mult": 2.0,
}


def draw_tokens(step: int) -> torch.Tensor:
    return torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_absorbed_multipliers_train_the_same_model(qk_norm: bool) -> None:
    """Compare a proxy with a model without multipliers, its initial weights scaled and its groups as exported."""
    config = ProxyConfig(**WIDE, qk_norm=qk_norm)
    ours, plain = build(config).double(), build(config).double()
    with torch.no_grad():
        ours.readout.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    table, exported = compute_rules(config), absorb_multipliers(config)
    multipliers = {"embed": 3.0, "readout": 2.0 / 2, "o": 0.5, "down": 0.5, "q_norm" if qk_norm else "q": 1.5}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(ours.get_parameter(name) * multipliers.get(name.rsplit(".", 1)[-1], 1.0))
    strip_multipliers(plain)
    x = draw_tokens(99)
    torch.testing.assert_close(plain(x), ours(x), rtol=0, atol=1e-12)

    adamw = torch.optim.AdamW(
        [
            {"params": [p], "lr": rule.lr, "weight_decay": rule.weight_decay, "eps": rule.eps}
            for name, p in plain.named_parameters()
            for rule in [exported[name.rsplit(".", 1)[-1]]]
        ],
        betas=(config.beta1, config.beta2),
    )
    start = ours(x).detach()
    for model, optimizer in ((ours, make_optimizer(ours, config)), (plain, adamw)):
        for step in range(12):
            compute_loss(model, draw_tokens(step), draw_tokens(step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (ours(x) - start).abs().max() > 0.1
    torch.testing.assert_close(plain(x), ours(x), rtol=0, atol=1e-11)
    assert table["hidden"].multiplier == 0.5


def strip_multipliers(model: Transformer) -> None:
    model.multiplier_in = model.multiplier_out = 1.0
    for block in model.blocks:
        block.branch = 1.0
        block.scale = model.config.d_head**-0.5


# The names of a torchtitan Llama's parameters, before and after attention.qkv_linear was introduced.
NAMES = {
    "embed": ("tok_embeddings.weight", "tok_embeddings.embedding.weight"),
    "q": ("layers.0.attention.wq.weight", "layers.11.attention.qkv_linear.wq.weight"),
    "k": ("layers.0.attention.wk.weight", "layers.11.attention.qkv_linear.wk.weight"),
    "v": ("layers.0.attention.wv.weight", "layers.11.attention.qkv_linear.wv.weight"),
    "o": ("layers.0.attention.wo.weight",),
    "q_norm": ("layers.0.attention.q_norm.weight",),
    "k_norm": ("layers.0.attention.k_norm.weight",),
    "gate": ("layers.0.feed_forward.w1.weight",),
    "down": ("layers.3.feed_forward.w2.weight",),
    "up": ("layers.0.feed_forward.w3.weight",),
    "attn_norm": ("layers.0.attention_norm.weight",),
    "mlp_norm": ("layers.0.ffn_norm.weight",),
    "final_norm": ("norm.weight",),
    "readout": ("output.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"alpha_attn": 1.0, "base_layers": 4}])
def test_every_parameter_is_in_the_one_group_that_has_its_rule(changes: dict[str, Any]) -> None:
    config = ProxyConfig(**(WIDE | changes))
    groups, exported = make_groups(config), absorb_multipliers(config)
    assert len({group.rule for group in groups}) == len(groups) < len(exported)
    for leaf, names in NAMES.items():
        for name in names:
            matched = [group for group in groups if re.search(group.pattern, name)]
            if leaf not in exported:
                assert matched == []
                continue
            assert [group.rule for group in matched] == [exported[leaf]]
    assert set(TORCHTITAN) == set(NAMES)


def run_torchtitan_code(config: ProxyConfig) -> list[dict[str, Any]]:
    """Run the exported code and return the keyword arguments of every ParamGroupConfig."""
    groups: list[dict[str, Any]] = []
    exec(format_torchtitan(config), {"ParamGroupConfig": lambda **kwargs: groups.append(kwargs)})
    return groups


def test_torchtitan_gets_valid_python_with_the_exact_numbers() -> None:
    config = ProxyConfig(**WIDE)
    groups = run_torchtitan_code(config)
    rules = {group.pattern: group.rule for group in make_groups(config)}
    assert [group["pattern"] for group in groups] == list(rules)
    for group in groups:
        rule, kwargs = rules[group["pattern"]], group["optimizer_kwargs"]
        assert group["optimizer_name"] == "AdamW"
        assert (kwargs["lr"], kwargs["weight_decay"], kwargs["eps"]) == (rule.lr, rule.weight_decay, rule.eps)
        assert kwargs["betas"] == (0.9, 0.95)


def test_muon_gets_only_hidden_matrices_in_torchtitan() -> None:
    groups = run_torchtitan_code(ProxyConfig(**WIDE, optimizer="muon"))
    hidden = {g["optimizer_name"] for g in groups if re.search(g["pattern"], "layers.0.feed_forward.w2.weight")}
    others = {g["optimizer_name"] for g in groups if re.search(g["pattern"], "tok_embeddings.weight")}
    assert (hidden, others) == ({"Muon"}, {"AdamW"})
    with pytest.raises(ValueError, match="got 'lion'"):
        format_torchtitan(ProxyConfig(**WIDE, optimizer="lion"))


def test_a_tied_table_with_multipliers_cannot_be_absorbed() -> None:
    config = ProxyConfig(**(WIDE | {"tied": True, "embed_std": 0.05}))
    with pytest.raises(ValueError, match="tied = true with 3 on its output and 1 on its other"):
        absorb_multipliers(config)
    assert "without_multipliers" not in json.loads(format_json(config))


def test_json_contains_the_table() -> None:
    config = ProxyConfig(**WIDE)
    exported = json.loads(format_json(config, tokens=1_000_000))
    assert (exported["m"], exported["r"]) == (2.0, 2.0)
    assert exported["parameters"]["gate"]["lr"] == 0.005
    assert exported["parameters"]["gate"]["weight_decay"] == 0.8
    assert exported["multipliers"] == {
        "embedding_output": 3.0,
        "readout_input": 1.0,
        "branch": 0.5,
        "attention_scale": 0.375,
    }
    assert exported["decay_timescale"] == pytest.approx(1 / (0.01 * 0.4 * 1_000_000 / (16 * 16)))
    assert ProxyConfig.model_validate(exported["config"]) == config


def parse_flags(text: str) -> dict[str, str]:
    """Return the flags that have a value."""
    return dict(line[2:].split(" ", 1) for line in text.splitlines() if line.startswith("--") and " " in line)


def test_megatron_gets_its_own_recipe_and_a_list_of_what_it_lacks() -> None:
    text = format_megatron(ProxyConfig(**WIDE), tokens=160_000)
    flags = parse_flags(text)
    flags_without_value = {line for line in text.splitlines() if line.startswith("--") and " " not in line}
    assert flags["scaling-recipe"] == "depth_mup"
    assert (flags["scaling-base-hidden-size"], flags["scaling-base-num-layers"]) == ("32", "2")
    # Megatron's softmax scale is sqrt(base head size) / head size.
    assert float(flags["scaling-base-head-dim"]) ** 0.5 / 16 == pytest.approx(1.5 / 4)
    assert (flags["mup-embedding-mult"], flags["lr"]) == ("3", "0.01")
    # Megatron takes exactly 1 for "not given" and would replace it by 1/m.
    assert 1 < float(flags["mup-output-mult"]) < 1 + 1e-6
    base = format_megatron(ProxyConfig(**(WIDE | {"d_model": 32, "alpha_out": 1.0})))
    assert "--mup-output-mult 1\n" in base
    assert (flags["num-query-groups"], flags["train-samples"], flags["lr-wsd-decay-samples"]) == ("2", "10000", "2000")
    assert {"--swiglu", "--group-query-attention", "--untie-embeddings-and-output-weights"} <= flags_without_value
    assert "embed_lr_mult 2 has no flag" in text
    with pytest.raises(ValueError, match="got 'muon' under 'mup'"):
        format_megatron(ProxyConfig(**WIDE, optimizer="muon"))


@pytest.mark.parametrize(
    ("changes", "style"),
    [
        ({"decay": "cosine"}, {"lr-decay-style": "WSD", "lr-wsd-decay-style": "cosine"}),
        ({"schedule": "cosine", "lr_floor": 0.2}, {"lr-decay-style": "cosine", "min-lr": "0.002"}),
        ({"schedule": "linear"}, {"lr-decay-style": "linear", "min-lr": "0"}),
    ],
)
def test_megatron_gets_the_schedule_or_a_note_about_it(changes: dict[str, Any], style: dict[str, str]) -> None:
    flags = parse_flags(format_megatron(ProxyConfig(**WIDE, **changes), tokens=160_000))
    assert style.items() <= flags.items()
    unknown = format_megatron(ProxyConfig(**WIDE, decay="square"), tokens=160_000)
    assert "decay 'square' has to be added by hand" in unknown
    assert "lr-decay-style" not in unknown
