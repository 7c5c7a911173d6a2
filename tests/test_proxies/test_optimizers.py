"""Every optimizer: its rule over width, its resume, its parameter groups, and which need a certificate."""

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
from proxies.model.optimizers import CombinedOptimizer, make_optimizer, set_lr, use_eval_weights
from proxies.model.transformer import Transformer, build, compute_loss
from proxies.trainers.proxy_family import ProxyFamily
from proxies.training.checkpoints import write_state
from tests.test_proxies.test_transformer import draw_tokens, make_config, randomize_readout, tile_twice

ALL: tuple[str, ...] = get_args(OptimizerName)
ADAM_LIKE = {
    "adamw": {},
    "ademamix": {},
    "ademamix warming up": {"slow_warmup_tokens": 96 * 15},
    "lion": {},
    "schedule-free": {},
}


def make_proxy_config(optimizer: str, **changes: Any) -> ProxyConfig:
    return make_config(**{"optimizer": optimizer, "lr": 1.0 if optimizer == "prodigy" else 0.01} | changes)


def take_steps(model: torch.nn.Module, optimizer: Any, which: Iterable[int]) -> None:
    for step in which:
        compute_loss(model, draw_tokens(4, seed=step), draw_tokens(4, seed=step + 1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_doubled(optimizer: str, n_steps: int = 20, **changes: Any) -> tuple[float, float]:
    """Train a model and one of twice the width, tiled from it.

    Returns:
        The largest difference of their logits after training, and the largest change of the small model's logits.
    """
    # eps and decay are large enough to matter.
    shape = {"q_per_kv": 2, "eps": 1e-4, "weight_decay": 0.3, "alpha_in": 1.7, "base_layers": 1} | changes
    small = randomize_readout(build(make_proxy_config(optimizer, **shape)))
    large = build(make_proxy_config(optimizer, **shape, d_model=64)).double()
    large.load_state_dict(tile_twice(small.state_dict()))
    probe = draw_tokens(2, seed=99)
    start = small(probe).detach()
    torch.testing.assert_close(large(probe), start, rtol=0, atol=1e-12)
    for model in (small, large):
        take_steps(model, make_optimizer(model, model.config, verified=False), range(n_steps))
    with torch.no_grad():
        return float((large(probe) - small(probe)).abs().max()), float((small(probe) - start).abs().max())


def orthogonalize_in_float64(
    grad: Tensor, coefficients: tuple[float, float, float], n_steps: int, eps: float
) -> Tensor:
    """Run the quintic iteration to the nearest orthogonal matrix, x <- a x + (b A + c A^2) x with A = x x^T."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(n_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


@pytest.mark.parametrize("name", ADAM_LIKE)
def test_a_doubled_model_takes_the_same_steps(name: str) -> None:
    """This holds for Lion too: rounding decides a sign only where a gradient cancels to zero, and none here does."""
    difference, change = train_doubled(name.split()[0], **ADAM_LIKE[name])
    assert change > 1
    assert difference < 1e-12


def test_prodigy_finds_the_rate_of_a_doubled_model() -> None:
    # Its search for the distance takes some thirty steps.
    difference, change = train_doubled("prodigy", 100)
    assert change > 1
    assert difference < 1e-12


@pytest.mark.parametrize("name", ["muon", "muon-rms"])
def test_a_doubled_model_takes_the_same_orthogonal_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    difference, change = train_doubled(name)
    assert change > 1
    # torch iterates in bfloat16, which keeps three digits.
    assert difference < 3e-3 * change
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", orthogonalize_in_float64)
    difference, change = train_doubled(name)
    assert change > 1
    assert difference < 1e-12


def test_eight_bits_follow_the_doubled_model_within_their_resolution() -> None:
    difference, change = train_doubled("adamw8bit")
    assert difference < 0.01 * change


@pytest.mark.parametrize(
    ("name", "power"), [("muon", 1.0), ("muon-rms", 0.0), ("lion", 0.5), ("schedule-free", 0.0), ("adamw8bit", 0.5)]
)
def test_another_power_of_the_width_leaves_the_small_models_trajectory(
    name: str, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mup.HIDDEN_LR_POWERS, name, power)
    difference, change = train_doubled(name)
    assert difference > 0.05 * change


def measure_stream_change(name: str, width: int) -> float:
    """Return the mean absolute change of the stream before the final norm after ten steps, on an unseen batch."""
    model = build(make_proxy_config(name, d_model=width, base_width=64, seed=width).model_copy(update={"lr": 0.2}))
    optimizer = make_optimizer(model, model.config)

    @torch.no_grad()
    def compute_stream() -> Tensor:
        x = model.stem(draw_tokens(4, seed=99))
        for block in model.blocks:
            x = block(x, model.get_rope(draw_tokens(4, seed=99)))
        return x

    start = compute_stream()
    take_steps(model, optimizer, range(10))
    return float((compute_stream() - start).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrong"), [("muon", 1.0), ("muon-rms", 0.0)])
def test_under_muon_the_change_of_the_stream_does_not_depend_on_width(
    name: str, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's iteration in bfloat16 takes 20 minutes on a processor that has no instructions for it.
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", orthogonalize_in_float64)
    widths = (32, 64, 128, 256, 512)

    def fit_slope() -> float:
        return float(np.polyfit(np.log2(widths), np.log2([measure_stream_change(name, w) for w in widths]), 1)[0])

    slope = fit_slope()
    monkeypatch.setitem(mup.HIDDEN_LR_POWERS, name, wrong)
    assert abs(slope) < 0.3
    assert abs(fit_slope()) > abs(slope) + 0.25


def test_muon_gets_hidden_matrices_and_nothing_else() -> None:
    model = build(make_proxy_config("muon", qk_norm=True))
    optimizer = make_optimizer(model, model.config)
    assert isinstance(optimizer, CombinedOptimizer)
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    role = {id(p): get_role(n) for n, p in model.named_parameters()}
    roles = [{role[id(p)] for g in part.param_groups for p in g["params"]} for part in optimizer.parts]
    assert roles == [{"hidden"}, {"embedding", "norm", "qk_norm", "final_norm", "readout"}]


def test_lamb_steps_by_a_share_of_its_matrix_however_large_the_matrix() -> None:
    """The share falls as 1/sqrt(m), and so do the initial entries: together 1/m, also above a norm of 10."""
    sizes = []
    for width in (32, 512):
        model = build(make_proxy_config("lamb", d_model=width, weight_decay=0.0))
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
    model = build(make_proxy_config(name))
    optimizer = make_optimizer(model, model.config)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    # Each factor applies to the peak, not to the current rate.
    for factor in (0.5, 0.25, 1.0):
        set_lr(optimizer, factor)
        for group in optimizer.param_groups:
            assert float(group["lr"]) == pytest.approx(group["peak_lr"] * factor)
            assert group["role"] in mup.ROLES


# Without a gradient Prodigy does nothing. Schedule-free decays z by y, which equals z only in the first step.
@pytest.mark.parametrize("name", [n for n in ALL if n != "prodigy"])
def test_decay_is_decoupled_and_does_not_depend_on_width(name: str) -> None:
    n_steps = {"schedule-free": 1}.get(name, 4)
    for width in (32, 64):
        model = build(make_proxy_config(name, d_model=width, weight_decay=0.5))
        before = model.blocks[0].gate.detach().clone()
        optimizer = make_optimizer(model, model.config, verified=False)
        for _ in range(n_steps):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        # SOAP's first step only starts the eigenbases.
        n = n_steps - (name == "soap")
        torch.testing.assert_close(model.blocks[0].gate.detach(), before * (1 - 0.01 * 0.5) ** n, rtol=1e-5, atol=1e-8)
        assert torch.equal(model.final_norm.detach(), torch.ones(width))


def list_leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in list_leaves(item)]
    return [x for item in value for x in list_leaves(item)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("name", ALL)
def test_a_run_resumes_from_a_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    # The model is large enough for 8-bit moments.
    settings = make_proxy_config(name, d_model=64, base_width=64, weight_decay=0.3)

    def train(model: Transformer, optimizer: Any, which: range) -> None:
        for step in which:
            set_lr(optimizer, min(1.0, (step + 1) / 6))
            take_steps(model, optimizer, [step])
            with use_eval_weights(optimizer), torch.no_grad():
                compute_loss(model, draw_tokens(1), draw_tokens(1, seed=1))

    whole = build(settings)
    train(whole, make_optimizer(whole, settings), range(24))
    first = build(settings)
    optimizer = make_optimizer(first, settings)
    train(first, optimizer, range(13))
    write_state({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    assert {type(x) for x in list_leaves(saved["optimizer"])} <= {Tensor, int, float, str, bool, type(None)}
    second = build(settings.model_copy(update={"seed": 7}))
    second.load_state_dict(saved["model"])
    optimizer = make_optimizer(second, settings)
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, range(13, 24))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole.embed, first.embed)


def test_schedule_free_is_evaluated_at_the_mean_of_its_iterates() -> None:
    """At a constant rate x is the mean of z so far, and y = (1 - beta1) z + beta1 x (arXiv 2405.15682)."""
    model = randomize_readout(build(make_proxy_config("schedule-free")))
    optimizer = make_optimizer(model, model.config)
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(5):
        take_steps(model, optimizer, [step])
        z = [optimizer.state[p]["z"].clone() for p in model.parameters()]
        sums = [s + part for s, part in zip(sums, z, strict=True)]
        y = [p.detach().clone() for p in model.parameters()]
        with use_eval_weights(optimizer):
            for p, part, total, trained in zip(model.parameters(), z, sums, y, strict=True):
                x = total / (step + 1)
                torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-12)
                torch.testing.assert_close(trained, 0.1 * part + 0.9 * x, rtol=0, atol=1e-12)
        assert all(torch.equal(p, before) for p, before in zip(model.parameters(), y, strict=True))


def test_the_trained_weights_are_restored_after_an_error() -> None:
    model = build(make_proxy_config("schedule-free"))
    optimizer = make_optimizer(model, model.config)
    take_steps(model, optimizer, range(2))
    before = model.embed.detach().clone()

    def interrupt() -> None:
        with use_eval_weights(optimizer):
            assert not torch.equal(model.embed, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert torch.equal(model.embed, before)
    # The optimizer is in training mode again.
    take_steps(model, optimizer, [2])


def test_an_optimizer_gets_its_own_settings() -> None:
    model = build(make_proxy_config("ademamix"))
    settings = make_proxy_config("ademamix", beta3=0.99, slow_weight=3.0, slow_warmup_tokens=7680, batch_seqs=8)
    for group in make_optimizer(model, settings).param_groups:
        assert (group["betas"], group["alpha"]) == ((0.9, 0.95, 0.99), 3.0)
        assert group["t_alpha_beta3"] == 7680 / (8 * 24)
    assert make_optimizer(model, make_proxy_config("ademamix")).param_groups[0]["t_alpha_beta3"] is None
    muon = make_optimizer(model, make_proxy_config("muon", momentum=0.8)).param_groups[0]
    assert (muon["momentum"], muon["eps"]) == (0.8, 1e-7)


def test_prodigy_needs_a_multiplier_instead_of_a_rate() -> None:
    with pytest.raises(ValueError, match=r"needed lr from 0\.1 to 10, got 0\.0078125: set lr = 1"):
        make_config(optimizer="prodigy")


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
    settings = make_proxy_config(name)
    with pytest.raises(ValueError, match=rf"the package {package} for optimizer '{name}'.*muscale\[optimizers\]"):
        make_optimizer(build(settings), settings)


UNVERIFIED = sorted(set(ALL) - set(VERIFIED_RULES))


def write_test_certificate(path: Path, config: ProxyConfig, *, change: float = 0.3, **edits: Any) -> Path:
    """Write the certificate of a check of one quantity, which is flat, and edit its JSON."""
    levels = {"size": 1.0, "early": change, "change": change}
    flat = tuple(
        Slope("width", "logits", quantity, 0.0, -0.1, 0.1, ((level,) * 10,) * 3)  # type: ignore[arg-type]
        for quantity, level in levels.items()
    )
    check = CoordCheck(flat, (16, 32, 64), (), 0.03, 10, 3, "plain", ((5.0,), (5.0,), (5.0,)))
    write_certificate(path, config, check)
    path.write_text(json.dumps(json.loads(path.read_text()) | edits))
    return path


def test_an_optimizer_without_a_verified_rule_is_refused_at_other_widths() -> None:
    assert UNVERIFIED == ["lamb", "prodigy", "soap"]
    for name in UNVERIFIED:
        wide = make_proxy_config(name, d_model=64)
        with pytest.raises(ValueError, match=rf"proxies check STUDY\.toml --certificate studies/{name}\.json"):
            make_optimizer(build(wide), wide)
        # The check itself is not refused.
        make_optimizer(build(wide), wide, verified=False)
        for allowed in (make_proxy_config(name), make_proxy_config(name, d_model=64, parametrization="standard")):
            make_optimizer(build(allowed), allowed)


def test_a_certificate_that_passed_allows_other_widths(tmp_path: Path) -> None:
    path = write_test_certificate(tmp_path / "soap.json", make_proxy_config("soap"))
    wide = make_proxy_config("soap", d_model=64, coordinate_check=str(path))
    assert explain_refusal(wide) is None
    make_optimizer(build(wide), wide)
    assert (
        explain_refusal(make_proxy_config("soap", d_model=64, coordinate_check=str(path), lr=0.02, beta2=0.9, eps=1e-6))
        is None
    )
    assert set(CERTIFIED_SETTINGS) <= json.loads(path.read_text()).keys()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "which does not exist"),
        (lambda path: path.write_text("{"), "which is not a certificate"),
        (lambda path: path.write_text('{"passed": true}'), "which is not a certificate"),
        (
            lambda path: write_test_certificate(path, make_proxy_config("lamb")),
            "which is for optimizer 'lamb', not 'soap'",
        ),
        (
            lambda path: write_test_certificate(path, make_proxy_config("soap", n_layers=4)),
            "which is for base_layers 4, not 2|n_layers 4, not 2",
        ),
        (
            lambda path: write_test_certificate(path, make_proxy_config("soap", alpha_in=2.0)),
            r"which is for alpha_in 2\.0, not 1\.0",
        ),
        (lambda path: write_test_certificate(path, make_proxy_config("soap"), passed=False), "which did not pass"),
        (
            lambda path: write_test_certificate(path, make_proxy_config("soap"), change=1e-4),
            "in which nothing moved at logits",
        ),
        (
            lambda path: write_test_certificate(path, make_proxy_config("soap"), widths=[16, 32]),
            r"whose widths \[16, 32\] do not span 32 to 64",
        ),
        (
            lambda path: write_test_certificate(path, make_proxy_config("soap"), widths=[48, 64]),
            r"whose widths \[48, 64\] do not span 32 to 64",
        ),
    ],
)
def test_an_unsuitable_certificate_is_refused_by_name(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    path = write_test_certificate(tmp_path / "soap.json", make_proxy_config("soap"))
    wide = make_proxy_config("soap", d_model=64, coordinate_check=str(path))
    assert explain_refusal(wide) is None
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        make_optimizer(build(wide), wide)
    assert str(path) in str(error.value)


@pytest.mark.slow
def test_the_command_writes_what_the_trainer_then_accepts_or_refuses(tmp_path: Path) -> None:
    """At a tenth of its rate, Prodigy changes nothing in the whole check, which passes but is no valid certificate."""
    text = tmp_path / "text.txt"
    text.write_text("all the world's a stage, and all the men and women merely players " * 400)
    shape = {"corpus": str(text), "n_layers": 1, "seq_len": 32, "base_width": 32}
    for optimizer, lr, passed, reason in (
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
        refusal = explain_refusal(ProxyConfig(**family, d_model=64))
        assert refusal is None if reason is None else reason in (refusal or "")


def test_a_study_of_several_widths_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    from optuna.distributions import FloatDistribution

    family = {"widths": (16, 32), "base_width": 32, "optimizer": "lamb", "seq_len": 32, "warmup_tokens": 512}
    space = {"alpha_in": FloatDistribution(0.5, 2.0), "momentum": FloatDistribution(0.5, 0.9)}
    problems = ProxyFamily(**family).problems(space, None)
    assert [text.split(":")[0] for text in problems] == ["space.momentum", "trainer.optimizer", "space.alpha_in"]
    path = write_test_certificate(tmp_path / "lamb.json", ProxyConfig(optimizer="lamb", base_width=32))
    checked = ProxyFamily(**family, coordinate_check=str(path))
    assert checked.problems({"lr": FloatDistribution(0.01, 0.1)}, None) == []
    assert ProxyFamily(**family | {"widths": (32,)}).problems({}, None) == []
    assert checked.target(d_model=64, tokens=1000).D == 1000
    with pytest.raises(ValueError, match="do not span 32 to 128"):
        checked.target(d_model=128, tokens=1000)
