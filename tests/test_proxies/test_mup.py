"""The muP table against tables written by hand, and how models and optimizers follow it."""

from __future__ import annotations

import itertools

import pytest
import torch

from proxies.config.proxy import ProxyConfig
from proxies.model.mup import compute_rules, get_role, map_rules, param_groups, strip_wrappers
from proxies.model.optimizers import make_optimizer, set_lr
from proxies.model.transformer import build

SETTINGS = {
    "base_width": 64,
    "init_std": 0.08,
    "embed_std": 0.05,
    "lr": 0.01,
    "embed_lr_mult": 3.0,
    "weight_decay": 0.1,
    "eps": 1e-8,
    "alpha_in": 2.0,
    "alpha_out": 5.0,
}

# The specification by hand: (init std, lr, weight decay, eps, forward multiplier) of each role at each width.
TABLE = {
    ("mup", 32): {
        "embedding": (0.05, 0.03, 0.0, 2e-8, 2.0),
        "hidden": (0.1131370849898476, 0.02, 0.05, 2e-8, 1.0),
        "norm": (0.0, 0.01, 0.0, 2e-8, 1.0),
        "final_norm": (0.0, 0.01, 0.0, 2e-8, 1.0),
        "readout": (0.0, 0.01, 0.1, 2e-8, 10.0),
    },
    ("mup", 64): {
        "embedding": (0.05, 0.03, 0.0, 1e-8, 2.0),
        "hidden": (0.08, 0.01, 0.1, 1e-8, 1.0),
        "norm": (0.0, 0.01, 0.0, 1e-8, 1.0),
        "final_norm": (0.0, 0.01, 0.0, 1e-8, 1.0),
        "readout": (0.0, 0.01, 0.1, 1e-8, 5.0),
    },
    ("mup", 256): {
        "embedding": (0.05, 0.03, 0.0, 0.25e-8, 2.0),
        "hidden": (0.04, 0.0025, 0.4, 0.25e-8, 1.0),
        "norm": (0.0, 0.01, 0.0, 0.25e-8, 1.0),
        "final_norm": (0.0, 0.01, 0.0, 0.25e-8, 1.0),
        "readout": (0.0, 0.01, 0.1, 0.25e-8, 1.25),
    },
    ("standard", 64): {
        "embedding": (0.05, 0.03, 0.0, 1e-8, 2.0),
        "hidden": (0.08, 0.01, 0.1, 1e-8, 1.0),
        "norm": (0.0, 0.01, 0.0, 1e-8, 1.0),
        "final_norm": (0.0, 0.01, 0.0, 1e-8, 1.0),
        "readout": (0.0, 0.01, 0.1, 1e-8, 5.0),
    },
    ("standard", 256): {
        "embedding": (0.05, 0.03, 0.0, 1e-8, 2.0),
        "hidden": (0.04, 0.01, 0.1, 1e-8, 1.0),
        "norm": (0.0, 0.01, 0.0, 1e-8, 1.0),
        "final_norm": (0.0, 0.01, 0.0, 1e-8, 1.0),
        "readout": (0.0, 0.01, 0.1, 1e-8, 5.0),
    },
}
CASES = [(*key, role) for key, roles in TABLE.items() for role in roles]


@pytest.mark.parametrize(("parametrization", "width", "role"), CASES)
def test_the_table_is_the_one_written_by_hand(parametrization: str, width: int, role: str) -> None:
    config = ProxyConfig(**SETTINGS, parametrization=parametrization, d_model=width)
    rule = compute_rules(config)[role]
    values = (rule.init_std, rule.lr, rule.weight_decay, rule.eps, rule.multiplier)
    assert values == pytest.approx(TABLE[parametrization, width][role], rel=1e-12)
    assert rule.init_mean == (1.0 if role.endswith("norm") else 0.0)


# A model twice as wide and four times as deep, by hand, for depth power 1 (CompleteP) and 1/2:
# (lr, weight decay, eps, multiplier).
DEEP = {
    1.0: {
        "embedding": (0.03, 0.0, 0.5e-8, 2.0),
        "hidden": (0.005, 0.2, 0.125e-8, 0.25),
        "norm": (0.01, 0.0, 0.125e-8, 1.0),
        "qk_norm": (0.01, 0.0, 0.25e-8, 1.0),
        "final_norm": (0.01, 0.0, 0.5e-8, 1.0),
        "readout": (0.01, 0.1, 0.5e-8, 2.5),
    },
    0.5: {
        "embedding": (0.03, 0.0, 0.5e-8, 2.0),
        "hidden": (0.0025, 0.4, 0.25e-8, 0.5),
        "norm": (0.005, 0.0, 0.25e-8, 1.0),
        "qk_norm": (0.005, 0.0, 0.5e-8, 1.0),
        "final_norm": (0.01, 0.0, 0.5e-8, 1.0),
        "readout": (0.01, 0.1, 0.5e-8, 2.5),
    },
}


@pytest.mark.parametrize("power", DEEP)
def test_the_table_of_a_deeper_model_is_the_one_written_by_hand(power: float) -> None:
    config = ProxyConfig(**SETTINGS, d_model=128, n_layers=8, base_layers=2, depth_power=power, qk_norm=True)
    table = compute_rules(config)
    for role, expected in DEEP[power].items():
        rule = table[role]
        assert (rule.lr, rule.weight_decay, rule.eps, rule.multiplier) == pytest.approx(expected, rel=1e-12)
    assert build(config).blocks[5].branch == pytest.approx(DEEP[power]["hidden"][-1])
    standard = compute_rules(config.model_copy(update={"parametrization": "standard"}))
    assert standard["hidden"].multiplier == 1.0
    assert {standard[role].lr for role in ("hidden", "norm")} == {0.01}


def test_the_rate_of_muon_does_not_depend_on_width_and_scaled_to_adams_rms_falls_as_the_root() -> None:
    for name, lr, decay in (("muon", 0.01, 0.1), ("muon-rms", 0.005, 0.2), ("lion", 0.0025, 0.4)):
        hidden = compute_rules(ProxyConfig(**SETTINGS, d_model=256, optimizer=name))["hidden"]
        assert (hidden.lr, hidden.weight_decay) == pytest.approx((lr, decay))


def test_a_parameter_is_recognized_through_any_wrapper() -> None:
    config = ProxyConfig(**SETTINGS, d_model=32, n_layers=1)
    names = [name for name, _ in build(config).named_parameters()]
    wrapped = [
        f"_orig_mod.module.{name}".replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.") for name in names
    ]
    assert [strip_wrappers(name) for name in wrapped] == names
    assert map_rules(wrapped, config) == map_rules(names, config)


@pytest.mark.parametrize("width", [32, 256])
def test_a_model_is_drawn_and_grouped_by_the_table(width: int) -> None:
    config = ProxyConfig(**SETTINGS, d_model=width)
    model = build(config)
    expected = TABLE["mup", width]
    for name, parameter in model.named_parameters():
        std = float(parameter.detach().std(correction=0))
        assert std == pytest.approx(expected[get_role(name)][0], rel=0.06)
    groups = {group["role"]: group for group in make_optimizer(model, config).param_groups}
    for role, (_, lr, decay, eps, _) in expected.items():
        assert (groups[role]["lr"], groups[role]["weight_decay"], groups[role]["eps"]) == pytest.approx(
            (lr, decay, eps)
        )
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_one_decay_step_shrinks_hidden_weights_alike_at_every_width() -> None:
    rules = [compute_rules(ProxyConfig(**SETTINGS, d_model=d))["hidden"] for d in (32, 64, 128, 1024)]
    assert [rule.lr * rule.weight_decay for rule in rules] == pytest.approx([1e-3] * 4)


def test_at_base_width_both_parametrizations_are_one_model() -> None:
    models = []
    for parametrization in ("mup", "standard"):
        config = ProxyConfig(**SETTINGS, parametrization=parametrization, d_model=64)
        model = build(config)
        optimizer = make_optimizer(model, config)
        x = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def test_the_start_follows_from_the_seed_and_not_from_the_global_generator() -> None:
    torch.manual_seed(1)
    first = build(ProxyConfig(seed=5))
    before = torch.random.get_rng_state()
    second = build(ProxyConfig(seed=5))
    assert torch.equal(torch.random.get_rng_state(), before)
    other = build(ProxyConfig(seed=6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embed, other.embed)


def test_a_schedule_scales_every_group_by_its_own_peak() -> None:
    config = ProxyConfig(**SETTINGS, d_model=256)
    optimizer = make_optimizer(build(config), config)
    # Each factor applies to the peak, not to the current rate.
    for factor in (0.5, 0.25, 1.0):
        set_lr(optimizer, factor)
        rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx(
            {"embedding": 0.03 * factor, "hidden": 0.0025 * factor}
            | dict.fromkeys(("norm", "final_norm", "readout"), 0.01 * factor)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_optimizer_agrees_with_the_plain_one_for_every_group(dtype: torch.dtype) -> None:
    # This eps is large enough to matter.
    config = ProxyConfig(**{**SETTINGS, "eps": 1e-3}, d_model=32)
    models = [build(config).to(dtype) for _ in range(2)]
    fused = make_optimizer(models[0], config)
    plain = torch.optim.AdamW(param_groups(models[1], config), foreach=False, fused=False)
    assert fused.defaults["fused"]
    for step, (model, optimizer) in itertools.product(range(5), zip(models, (fused, plain), strict=True)):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        optimizer.step()
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 1e-2)


def test_an_unknown_parameter_has_no_role() -> None:
    with pytest.raises(ValueError, match=r"got 'blocks\.0\.bias'"):
        get_role("blocks.0.bias")


def test_the_error_for_an_unknown_optimizer_suggests_the_nearest_name() -> None:
    config = ProxyConfig().model_copy(update={"optimizer": "adam"})
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        make_optimizer(build(config), config)


def test_a_tied_table_with_large_first_logits_is_refused_with_what_to_set() -> None:
    with pytest.raises(ValueError, match=r"at most 2, got 8: set embed_std near 0\.125 and alpha_in near 8"):
        ProxyConfig(tied=True)
    model = build(ProxyConfig(tied=True, embed_std=0.125, alpha_in=8.0))
    x = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    assert float(model(x).detach().std()) == pytest.approx(1.0, rel=0.3)
