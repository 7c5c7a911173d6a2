"""Every optimizer: its rule over width, its resume, its place in the table; and who is refused without a certificate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from proxies.__main__ import app
from proxies.config.optimizer_gate import CERTIFIED_SETTINGS, VERIFIED_RULES, explain_refusal
from proxies.config.proxy import OptimizerName, ProxyConfig
from proxies.diagnostics.certificate import write_certificate
from proxies.diagnostics.coord_check import CoordCheck, Slope
from proxies.model import mup
from proxies.model.mup import get_role
from proxies.model.optimizers import CombinedOptimizer, use_eval_weights, make_optimizer, set_lr
from proxies.model.transformer import Transformer, build, compute_loss
from proxies.trainers.proxy_family import ProxyFamily
from proxies.training.checkpoints import write_state
from tests.test_proxies.test_transformer import config, tile_twice, tokens, with_readout

ALL: tuple[str, ...] = get_args(OptimizerName)
ADAM_LIKE = {
    "adamw": {},
    "ademamix": {},
    "ademamix warming up": {"slow_warmup_tokens": 96 * 15},
    "lion": {},
    "schedule-free": {},
}


def proxy(optimizer: str, **changes: Any) -> ProxyConfig:
    return config(**{"optimizer": optimizer, "lr": 1.0 if optimizer == "prodigy" else 0.01} | changes)


def steps(model: torch.nn.Module, optimizer: Any, which: Iterable[int]) -> None:
    for step in which:
        compute_loss(model, tokens(4, seed=step), tokens(4, seed=step + 1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def doubled(optimizer: str, n_steps: int = 20, **changes: Any) -> tuple[float, float]:
    """How far the logits of a model of twice the width end from the small one's, and how far those have moved."""
    # eps and decay large enough to show
    shape = {"q_per_kv": 2, "eps": 1e-4, "weight_decay": 0.3, "alpha_in": 1.7, "base_layers": 1} | changes
    small = with_readout(build(proxy(optimizer, **shape)))
    large = build(proxy(optimizer, **shape, d_model=64)).double()
    large.load_state_dict(tile_twice(small.state_dict()))
    probe = tokens(2, seed=99)
    start = small(probe).detach()
    torch.testing.assert_close(large(probe), start, rtol=0, atol=1e-12)
    for model in (small, large):
        steps(model, make_optimizer(model, model.config, verified=False), range(n_steps))
    with torch.no_grad():
        return float((large(probe) - small(probe)).abs().max()), float((small(probe) - start).abs().max())


def in_float64(grad: Tensor, coefficients: tuple[float, float, float], n_steps: int, eps: float) -> Tensor:
    """The quintic iteration towards the nearest orthogonal matrix, x <- a x + (b A + c A^2) x with A = x x^T."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(n_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


@pytest.mark.parametrize("name", ADAM_LIKE)
def test_a_doubled_model_makes_the_same_steps(name: str) -> None:
    """Of Lion as well: a sign is that of rounding only where a gradient is zero by cancellation, which none here is."""
    apart, moved = doubled(name.split()[0], **ADAM_LIKE[name])
    assert moved > 1
    assert apart < 1e-12


def test_prodigy_finds_the_rate_of_a_doubled_model() -> None:
    apart, moved = doubled("prodigy", 100)  # its search for the distance takes some thirty of them
    assert moved > 1
    assert apart < 1e-12


@pytest.mark.parametrize("name", ["muon", "muon-rms"])
def test_a_doubled_model_makes_the_same_orthogonal_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apart, moved = doubled(name)
    assert moved > 1
    assert apart < 3e-3 * moved  # torch iterates in bfloat16, which keeps three digits
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", in_float64)
    apart, moved = doubled(name)
    assert moved > 1
    assert apart < 1e-12


def test_eight_bits_follow_the_doubled_model_as_far_as_they_can_say() -> None:
    apart, moved = doubled("adamw8bit")
    assert apart < 0.01 * moved


@pytest.mark.parametrize(
    ("name", "power"), [("muon", 1.0), ("muon-rms", 0.0), ("lion", 0.5), ("schedule-free", 0.0), ("adamw8bit", 0.5)]
)
def test_another_power_of_the_width_leaves_the_small_models_path(
    name: str, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mup.HIDDEN_LR_POWERS, name, power)
    apart, moved = doubled(name)
    assert apart > 0.05 * moved


def stream_change(name: str, width: int) -> float:
    """Mean |x - x at the start| of the stream before the final norm, on a batch not trained on, after ten steps."""
    model = build(proxy(name, d_model=width, base_width=64, seed=width).model_copy(update={"lr": 0.2}))
    optimizer = make_optimizer(model, model.config)

    @torch.no_grad()
    def stream() -> Tensor:
        x = model.stem(tokens(4, seed=99))
        for block in model.blocks:
            x = block(x, model.get_rope(tokens(4, seed=99)))
        return x

    start = stream()
    steps(model, optimizer, range(10))
    return float((stream() - start).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrong"), [("muon", 1.0), ("muon-rms", 0.0)])
def test_the_stream_moves_alike_at_every_width_under_muon(
    name: str, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = (32, 64, 128, 256, 512)

    def slope() -> float:
        return float(np.polyfit(np.log2(widths), np.log2([stream_change(name, w) for w in widths]), 1)[0])

    right = slope()
    monkeypatch.setitem(mup.HIDDEN_LR_POWERS, name, wrong)
    assert abs(right) < 0.3
    assert abs(slope()) > abs(right) + 0.25


def test_muon_gets_hidden_matrices_and_nothing_else() -> None:
    model = build(proxy("muon", qk_norm=True))
    optimizer = make_optimizer(model, model.config)
    assert isinstance(optimizer, CombinedOptimizer)
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    role = {id(p): get_role(n) for n, p in model.named_parameters()}
    given = [{role[id(p)] for g in part.param_groups for p in g["params"]} for part in optimizer.parts]
    assert given == [{"hidden"}, {"embedding", "norm", "qk_norm", "final_norm", "readout"}]


def test_lamb_steps_by_a_share_of_its_matrix_however_large_the_matrix() -> None:
    """The share falls as 1/sqrt(m) by the table and the entries do by their start: together 1/m, also past a norm of 10."""
    sizes = []
    for width in (32, 512):
        model = build(proxy("lamb", d_model=width, weight_decay=0.0))
        gate = model.blocks[0].gate
        before = gate.detach().clone()
        optimizer = make_optimizer(model, model.config, verified=False)
        gate.grad = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        sizes.append(float((gate.detach() - before).square().mean().sqrt()))
    assert float(before.norm()) > 10
    assert sizes[0] == pytest.approx(0.01 * 0.08, rel=0.03)
    assert sizes[1] == pytest.approx(sizes[0] / 16, rel=0.03)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_its_group_and_every_group_its_own_peak(name: str) -> None:
    model = build(proxy(name))
    optimizer = make_optimizer(model, model.config)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for factor in (0.5, 0.25, 1.0):  # of the peak each time, not of what was left of it
        set_lr(optimizer, factor)
        for group in optimizer.param_groups:
            assert float(group["lr"]) == pytest.approx(group["peak_lr"] * factor)
            assert group["role"] in mup.ROLES


# Without a gradient Prodigy does nothing. Schedule-free decays z by what y has: the same in its first step alone.
@pytest.mark.parametrize("name", [n for n in ALL if n != "prodigy"])
def test_decay_is_decoupled_and_that_of_one_step_does_not_depend_on_width(name: str) -> None:
    taken = {"schedule-free": 1}.get(name, 4)
    for width in (32, 64):
        model = build(proxy(name, d_model=width, weight_decay=0.5))
        before = model.blocks[0].gate.detach().clone()
        optimizer = make_optimizer(model, model.config, verified=False)
        for _ in range(taken):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        n = taken - (name == "soap")  # its first step only starts the eigenbases
        torch.testing.assert_close(model.blocks[0].gate.detach(), before * (1 - 0.01 * 0.5) ** n, rtol=1e-5, atol=1e-8)
        assert torch.equal(model.final_norm.detach(), torch.ones(width))


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in leaves(item)]
    return [x for item in value for x in leaves(item)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("name", ALL)
def test_a_run_goes_on_from_a_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    settings = proxy(name, d_model=64, base_width=64, weight_decay=0.3)  # large enough for 8-bit moments

    def some(model: Transformer, optimizer: Any, which: range) -> None:
        for step in which:
            set_lr(optimizer, min(1.0, (step + 1) / 6))
            steps(model, optimizer, [step])
            with use_eval_weights(optimizer), torch.no_grad():
                compute_loss(model, tokens(1), tokens(1, seed=1))

    whole = build(settings)
    some(whole, make_optimizer(whole, settings), range(24))
    first = build(settings)
    optimizer = make_optimizer(first, settings)
    some(first, optimizer, range(13))
    write_state({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    assert {type(x) for x in leaves(saved["optimizer"])} <= {Tensor, int, float, str, bool, type(None)}
    second = build(settings.model_copy(update={"seed": 7}))
    second.load_state_dict(saved["model"])
    optimizer = make_optimizer(second, settings)
    optimizer.load_state_dict(saved["optimizer"])
    some(second, optimizer, range(13, 24))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole.embed, first.embed)


def test_schedule_free_is_evaluated_at_the_mean_of_its_points() -> None:
    """At a constant rate x is the mean of z over the steps so far, and y = (1 - beta1) z + beta1 x (arXiv 2405.15682)."""
    model = with_readout(build(proxy("schedule-free")))
    optimizer = make_optimizer(model, model.config)
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(5):
        steps(model, optimizer, [step])
        z = [optimizer.state[p]["z"].clone() for p in model.parameters()]
        sums = [s + part for s, part in zip(sums, z, strict=True)]
        y = [p.detach().clone() for p in model.parameters()]
        with use_eval_weights(optimizer):
            for p, part, total, trained in zip(model.parameters(), z, sums, y, strict=True):
                x = total / (step + 1)
                torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-12)
                torch.testing.assert_close(trained, 0.1 * part + 0.9 * x, rtol=0, atol=1e-12)
        assert all(torch.equal(p, was) for p, was in zip(model.parameters(), y, strict=True))


def test_evaluation_gives_the_trained_weights_back_after_an_error() -> None:
    model = build(proxy("schedule-free"))
    optimizer = make_optimizer(model, model.config)
    steps(model, optimizer, range(2))
    before = model.embed.detach().clone()

    def stopped() -> None:
        with use_eval_weights(optimizer):
            assert not torch.equal(model.embed, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert torch.equal(model.embed, before)
    steps(model, optimizer, [2])  # it trains again


def test_settings_of_one_optimizer_reach_it() -> None:
    model = build(proxy("ademamix"))
    made = proxy("ademamix", beta3=0.99, slow_weight=3.0, slow_warmup_tokens=7680, batch_seqs=8)
    for group in make_optimizer(model, made).param_groups:
        assert (group["betas"], group["alpha"]) == ((0.9, 0.95, 0.99), 3.0)
        assert group["t_alpha_beta3"] == 7680 / (8 * 24)
    assert make_optimizer(model, proxy("ademamix")).param_groups[0]["t_alpha_beta3"] is None
    muon = make_optimizer(model, proxy("muon", momentum=0.8)).param_groups[0]
    assert (muon["momentum"], muon["eps"]) == (0.8, 1e-7)


def test_prodigy_wants_a_multiplier_and_no_rate() -> None:
    with pytest.raises(ValueError, match=r"needed lr from 0\.1 to 10, got 0\.0078125: set lr = 1"):
        config(optimizer="prodigy")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("lion", "pytorch_optimizer"),
        ("ademamix", "pytorch_optimizer"),
        ("lamb", "pytorch_optimizer"),
        ("soap", "pytorch_optimizer"),
        ("schedule-free", "schedulefree"),
        ("prodigy", "prodigyopt"),
        ("adamw8bit", "torchao"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    settings = proxy(name)
    with pytest.raises(ValueError, match=rf"the package {package} for optimizer '{name}'.*muscale\[optimizers\]"):
        make_optimizer(build(settings), settings)


UNVERIFIED = sorted(set(ALL) - set(VERIFIED_RULES))


def certificate(path: Path, about: ProxyConfig, *, moved: float = 0.3, **changes: Any) -> Path:
    """Of a check that looked at one quantity, found it flat, and was then changed by hand."""
    levels = {"size": 1.0, "early": moved, "change": moved}
    flat = tuple(Slope("width", "logits", what, 0.0, -0.1, 0.1, ((of,) * 10,) * 3) for what, of in levels.items())  # type: ignore[arg-type]
    check = CoordCheck(flat, (16, 32, 64), (), 0.03, 10, 3, "plain", ((5.0,), (5.0,), (5.0,)))
    write_certificate(path, about, check)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_an_optimizer_without_a_verified_rule_is_refused_at_other_widths() -> None:
    assert UNVERIFIED == ["lamb", "prodigy", "soap"]
    for name in UNVERIFIED:
        wide = proxy(name, d_model=64)
        with pytest.raises(ValueError, match=rf"proxies check STUDY\.toml --certificate studies/{name}\.json"):
            make_optimizer(build(wide), wide)
        make_optimizer(build(wide), wide, verified=False)  # the check itself
        for allowed in (proxy(name), proxy(name, d_model=64, parametrization="standard")):
            make_optimizer(build(allowed), allowed)


def test_a_certificate_that_passed_lets_it_train(tmp_path: Path) -> None:
    path = certificate(tmp_path / "soap.json", proxy("soap"))
    wide = proxy("soap", d_model=64, coordinate_check=str(path))
    assert explain_refusal(wide) is None
    make_optimizer(build(wide), wide)
    assert explain_refusal(proxy("soap", d_model=64, coordinate_check=str(path), lr=0.02, beta2=0.9, eps=1e-6)) is None
    assert set(CERTIFIED_SETTINGS) <= json.loads(path.read_text()).keys()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "which does not exist"),
        (lambda path: path.write_text("{"), "which is not a certificate"),
        (lambda path: path.write_text('{"passed": true}'), "which is not a certificate"),
        (lambda path: certificate(path, proxy("lamb")), "which is for optimizer 'lamb', not 'soap'"),
        (
            lambda path: certificate(path, proxy("soap", n_layers=4)),
            "which is for base_layers 4, not 2|n_layers 4, not 2",
        ),
        (lambda path: certificate(path, proxy("soap", alpha_in=2.0)), r"which is for alpha_in 2\.0, not 1\.0"),
        (lambda path: certificate(path, proxy("soap"), passed=False), "which did not pass"),
        (lambda path: certificate(path, proxy("soap"), moved=1e-4), "in which nothing moved at logits"),
        (
            lambda path: certificate(path, proxy("soap"), widths=[16, 32]),
            r"whose widths \[16, 32\] do not span 32 to 64",
        ),
        (
            lambda path: certificate(path, proxy("soap"), widths=[48, 64]),
            r"whose widths \[48, 64\] do not span 32 to 64",
        ),
    ],
)
def test_another_certificate_is_refused_by_name(spoil: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    path = certificate(tmp_path / "soap.json", proxy("soap"))
    wide = proxy("soap", d_model=64, coordinate_check=str(path))
    assert explain_refusal(wide) is None
    spoil(path)
    with pytest.raises(ValueError, match=said) as error:
        make_optimizer(build(wide), wide)
    assert str(path) in str(error.value)


@pytest.mark.slow
def test_the_command_writes_what_the_trainer_then_accepts_or_refuses(tmp_path: Path) -> None:
    """At a tenth of its rate Prodigy stands still for the whole check, which passes and is no certificate."""
    text = tmp_path / "text.txt"
    text.write_text("all the world's a stage, and all the men and women merely players " * 400)
    shape = {"corpus": str(text), "n_layers": 1, "seq_len": 32, "base_width": 32}
    for optimizer, lr, passed, said in (
        ("prodigy", 0.1, True, "in which nothing moved at"),
        ("prodigy", 1.0, False, "which did not pass"),
        ("lamb", 0.03, True, None),
    ):
        path, study = tmp_path / f"{optimizer}.json", tmp_path / f"{optimizer}.toml"
        family = shape | {"optimizer": optimizer, "lr": lr, "coordinate_check": str(path)}
        lines = [f"{name} = {json.dumps(value)}" for name, value in family.items()]
        study.write_text("\n".join(["[trainer]", "widths = [16, 32]", *lines]))
        arguments = ["check", str(study), "--widths", "16,32,64", "--seeds", "1", "--certificate", str(path)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == (0 if passed else 1), result.output
        written = json.loads(path.read_text())
        assert (written["steps"], written["widths"]) == (10 if optimizer == "lamb" else 60, [16, 32, 64])
        refused = explain_refusal(ProxyConfig(**family, d_model=64))
        assert refused is None if said is None else said in (refused or "")


def test_a_study_of_several_widths_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    from optuna.distributions import FloatDistribution

    family = {"widths": (16, 32), "base_width": 32, "optimizer": "lamb", "seq_len": 32, "warmup_tokens": 512}
    space = {"alpha_in": FloatDistribution(0.5, 2.0), "momentum": FloatDistribution(0.5, 0.9)}
    said = ProxyFamily(**family).problems(space, None)
    assert [text.split(":")[0] for text in said] == ["space.momentum", "trainer.optimizer", "space.alpha_in"]
    path = certificate(tmp_path / "lamb.json", ProxyConfig(optimizer="lamb", base_width=32))
    checked = ProxyFamily(**family, coordinate_check=str(path))
    assert checked.problems({"lr": FloatDistribution(0.01, 0.1)}, None) == []
    assert ProxyFamily(**family | {"widths": (32,)}).problems({}, None) == []
    assert checked.target(d_model=64, tokens=1000).D == 1000
    with pytest.raises(ValueError, match="do not span 32 to 128"):
        checked.target(d_model=128, tokens=1000)
