"""The hand-written passes agree with autograd on the plain formulation, and are not used where they cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, vmap

from proxies.config.proxy import ProxyConfig
from proxies.model import fused
from proxies.model.optimizers import make_optimizer
from proxies.model.transformer import NORM_EPS, Transformer, build, compute_loss, make_rope_table, rms_norm, rotate

SHAPES: list[dict[str, Any]] = [
    {},
    {"q_per_kv": 2, "d_model": 64},
    {"qk_norm": True},
    {"n_layers": 4, "base_layers": 2},
    {"alpha_out": 3.0, "d_model": 64},
    {"tied": True, "embed_std": 0.1},
]


MIN_ELEMENTS = fused.MIN_ELEMENTS


@pytest.fixture(autouse=True)
def _allow_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the hand-written passes for small tensors too."""
    monkeypatch.setattr(fused, "MIN_ELEMENTS", 0)


def draw_numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def make_model(changes: dict[str, Any]) -> Transformer:
    """Return a model in float64 with every parameter away from its initial value."""
    model = build(ProxyConfig(**({"d_model": 32, "base_width": 32, "seq_len": 24, "vocab": 50} | changes))).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def draw_tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randint(50, (n, 24), generator=torch.Generator().manual_seed(seed))


def disable_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "can_fuse", lambda x: False)


Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]


def make_cases() -> dict[str, Case]:
    table = make_rope_table(5, 4)
    rotation = torch.view_as_real(table)

    def rotate_by_formula(x: Tensor) -> Tensor:
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], rotation[..., 0], rotation[..., 1]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def rms(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * gain

    y = torch.tensor([0, 2, 2, 1])
    return {
        "normed linears": (
            # This eps is large enough to matter.
            lambda x, g, a, b: fused.norm_linears(x, g, (a, b), 0.1),
            lambda x, g, a, b: (rms(x, g) @ a.T, rms(x, g) @ b.T),
            (draw_numbers(2, 3, 6), draw_numbers(6, seed=1), draw_numbers(4, 6, seed=2), draw_numbers(5, 6, seed=3)),
        ),
        "swiglu": (
            fused.swiglu,
            lambda a, b: a / (1 + torch.exp(-a)) * b,
            (draw_numbers(2, 3, 4), draw_numbers(2, 3, 4, seed=1)),
        ),
        "rotate": (lambda x: fused.rotate(x, table), rotate_by_formula, (draw_numbers(2, 5, 3, 4),)),
        "add linear": (
            lambda x, h, w: fused.add_linear(x, h, w, 0.3),
            lambda x, h, w: x + 0.3 * (h @ w.T),
            (draw_numbers(2, 3, 4), draw_numbers(2, 3, 5, seed=1), draw_numbers(4, 5, seed=2)),
        ),
        "cross-entropy": (
            lambda z: fused.cross_entropy(z, y),
            lambda z: (z.exp().sum(1).log() - z[torch.arange(4), y]).mean(),
            (draw_numbers(4, 3),),
        ),
    }


@pytest.mark.parametrize("name", make_cases())
def test_each_piece_is_its_formula_and_its_gradient_is_the_difference_quotient(name: str) -> None:
    ours, formula, inputs = make_cases()[name]
    torch.testing.assert_close(ours(*inputs), formula(*inputs), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, inputs)


def test_a_swiglu_longer_than_one_part_has_the_gradients_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    # Parts of 5 rows and of 2 rows.
    monkeypatch.setattr(fused, "CACHE_ELEMENTS", 20)
    up, weight = draw_numbers(7, 4, seed=1), draw_numbers(7, 4, seed=2).detach()
    # Rows that are contiguous in memory, and rows that are not.
    for gate in (draw_numbers(7, 4), draw_numbers(4, 7).detach().T.requires_grad_()):
        ours = torch.autograd.grad((fused.swiglu(gate, up) * weight).sum(), (gate, up))
        torch.testing.assert_close(ours, torch.autograd.grad((F.silu(gate) * up * weight).sum(), (gate, up)))


@pytest.mark.parametrize("changes", SHAPES)
def test_loss_and_every_gradient_are_those_of_the_plain_formulation(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, results = make_model(changes), []
    for plain in (False, True):
        if plain:
            disable_fused(monkeypatch)
        loss = compute_loss(model, draw_tokens(3), draw_tokens(3, seed=1))
        results.append((loss.detach(), torch.autograd.grad(loss, tuple(model.parameters()))))
    (fused_loss, fused_gradients), (plain_loss, plain_gradients) = results
    assert fused_loss.item() == pytest.approx(plain_loss.item(), rel=1e-12)
    for a, b in zip(fused_gradients, plain_gradients, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-12


def test_training_follows_the_plain_formulation(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = []
    for plain in (False, True):
        if plain:
            disable_fused(monkeypatch)
        model = make_model({"recompute": True, "qk_norm": True})
        optimizer = make_optimizer(model, model.config)
        for step in range(10):
            compute_loss(model, draw_tokens(4, seed=step), draw_tokens(4, seed=step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        logits.append(model(draw_tokens(2, seed=99)))
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
    assert not torch.equal(*logits), "both runs took the same path"


def test_in_single_precision_the_loss_agrees_to_its_last_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model({}).float()
    with torch.no_grad():
        fast = float(compute_loss(model, draw_tokens(3), draw_tokens(3, seed=1)))
        disable_fused(monkeypatch)
        assert float(compute_loss(model, draw_tokens(3), draw_tokens(3, seed=1))) == pytest.approx(fast, rel=1e-6)


def test_they_are_not_used_with_other_precisions_transforms_or_the_compiler() -> None:
    x, results = torch.zeros(2), []
    assert fused.can_fuse(x)
    assert fused.can_fuse(x.double())
    assert not fused.can_fuse(x.bfloat16())
    assert not fused.can_fuse(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.can_fuse(x)
    vmap(lambda row: (results.append(fused.can_fuse(x)), row)[1])(x)
    assert results == [False]
    compiled = torch.compile(lambda t: t + 1 if fused.can_fuse(t) else t - 1, backend="eager")
    assert compiled(x).tolist() == [-1, -1]


def test_small_batches_are_trained_plainly_and_to_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """For them, the overhead of Python in a hand-written pass exceeds the memory traffic that it saves."""
    monkeypatch.setattr(fused, "MIN_ELEMENTS", MIN_ELEMENTS)
    assert not fused.can_fuse(torch.zeros(128, 64)), "one sequence of the quickstart's largest proxy"
    assert fused.can_fuse(torch.zeros(16 * 128, 64))
    calls = []
    apply = fused._NormLinears.apply
    monkeypatch.setattr(fused._NormLinears, "apply", lambda *args: (calls.append(1), apply(*args))[1])
    model = make_model({})
    plain = compute_loss(model, draw_tokens(3), draw_tokens(3, seed=1)).item()
    assert not calls
    monkeypatch.setattr(fused, "MIN_ELEMENTS", 0)
    assert compute_loss(model, draw_tokens(3), draw_tokens(3, seed=1)).item() == pytest.approx(plain, rel=1e-13)
    assert calls


def test_a_model_compiled_without_graph_breaks_gives_the_same_loss() -> None:
    model = make_model({"q_per_kv": 2, "qk_norm": True})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    eager, ours = (compute_loss(m, draw_tokens(2), draw_tokens(2, seed=1)).item() for m in (model, compiled))
    assert ours == pytest.approx(eager, rel=1e-12)


def test_a_transformed_model_gives_the_same_logits() -> None:
    model = make_model({})
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # Flash attention has no vmap on CPU.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        rows = vmap(lambda x: functional_call(model, weights, (x[None],))[0])(draw_tokens(3))
    torch.testing.assert_close(rows, model(draw_tokens(3)).detach(), rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_is_normalized_to_zeros_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    (out,) = fused.norm_linears(x, torch.ones(4, dtype=torch.float64), (torch.eye(4, dtype=torch.float64),), NORM_EPS)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / math.sqrt(NORM_EPS)))
    torch.testing.assert_close(out, rms_norm(x, torch.ones(4, dtype=torch.float64)))


def test_the_two_forms_of_the_rotary_table_rotate_alike() -> None:
    x, table = draw_numbers(2, 5, 3, 4), make_rope_table(5, 4)
    torch.testing.assert_close(rotate(x, torch.view_as_real(table)), rotate(x, table), rtol=1e-12, atol=1e-12)
