"""The hand-written passes give what autograd makes of the plain formulation, and step aside where they cannot be used."""

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
from proxies.model.transformer import NORM_EPS, Transformer, build, compute_loss, rms_norm, make_rope_table, rotate

SHAPES: list[dict[str, Any]] = [
    {},
    {"q_per_kv": 2, "d_model": 64},
    {"qk_norm": True},
    {"n_layers": 4, "base_layers": 2},
    {"alpha_out": 3.0, "d_model": 64},
    {"tied": True, "embed_std": 0.1},
]


SMALL = fused.MIN_ELEMENTS


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' tensors are small."""
    monkeypatch.setattr(fused, "MIN_ELEMENTS", 0)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def model_of(changes: dict[str, Any]) -> Transformer:
    """In float64, every parameter away from where it starts."""
    model = build(ProxyConfig(**({"d_model": 32, "base_width": 32, "seq_len": 24, "vocab": 50} | changes))).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randint(50, (n, 24), generator=torch.Generator().manual_seed(seed))


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "can_fuse", lambda x: False)


Case = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]


def cases() -> dict[str, Case]:
    table = make_rope_table(5, 4)
    turn = torch.view_as_real(table)

    def turned(x: Tensor) -> Tensor:
        even, odd, cos, sin = x[..., ::2], x[..., 1::2], turn[..., 0], turn[..., 1]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    def rms(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * gain

    y = torch.tensor([0, 2, 2, 1])
    return {
        "normed linears": (
            lambda x, g, a, b: fused.norm_linears(x, g, (a, b), 0.1),  # an eps that is felt
            lambda x, g, a, b: (rms(x, g) @ a.T, rms(x, g) @ b.T),
            (numbers(2, 3, 6), numbers(6, seed=1), numbers(4, 6, seed=2), numbers(5, 6, seed=3)),
        ),
        "swiglu": (
            fused.swiglu,
            lambda a, b: a / (1 + torch.exp(-a)) * b,
            (numbers(2, 3, 4), numbers(2, 3, 4, seed=1)),
        ),
        "rotate": (lambda x: fused.rotate(x, table), turned, (numbers(2, 5, 3, 4),)),
        "add linear": (
            lambda x, h, w: fused.add_linear(x, h, w, 0.3),
            lambda x, h, w: x + 0.3 * (h @ w.T),
            (numbers(2, 3, 4), numbers(2, 3, 5, seed=1), numbers(4, 5, seed=2)),
        ),
        "cross-entropy": (
            lambda z: fused.cross_entropy(z, y),
            lambda z: (z.exp().sum(1).log() - z[torch.arange(4), y]).mean(),
            (numbers(4, 3),),
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_each_piece_is_its_formula_and_its_gradient_is_the_difference_quotient(name: str) -> None:
    ours, formula, inputs = cases()[name]
    torch.testing.assert_close(ours(*inputs), formula(*inputs), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, inputs)


def test_a_swiglu_longer_than_one_part_has_the_gradients_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CACHE_ELEMENTS", 20)  # 5 rows of 4, then 2
    up, weight = numbers(7, 4, seed=1), numbers(7, 4, seed=2).detach()
    for gate in (numbers(7, 4), numbers(4, 7).detach().T.requires_grad_()):  # rows side by side in memory, or not
        ours = torch.autograd.grad((fused.swiglu(gate, up) * weight).sum(), (gate, up))
        torch.testing.assert_close(ours, torch.autograd.grad((F.silu(gate) * up * weight).sum(), (gate, up)))


@pytest.mark.parametrize("changes", SHAPES)
def test_loss_and_every_gradient_are_those_of_the_plain_formulation(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, results = model_of(changes), []
    for plain in (False, True):
        if plain:
            plainly(monkeypatch)
        loss = compute_loss(model, tokens(3), tokens(3, seed=1))
        results.append((loss.detach(), torch.autograd.grad(loss, tuple(model.parameters()))))
    (ours, gradients), (theirs, expected) = results
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for a, b in zip(gradients, expected, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-12


def test_training_follows_the_plain_formulation(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for plain in (False, True):
        if plain:
            plainly(monkeypatch)
        model = model_of({"recompute": True, "qk_norm": True})
        optimizer = make_optimizer(model, model.config)
        for step in range(10):
            compute_loss(model, tokens(4, seed=step), tokens(4, seed=step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model(tokens(2, seed=99)))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)
    assert not torch.equal(*ends), "the two ways must not be one"


def test_in_single_precision_the_loss_agrees_to_its_last_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of({}).float()
    with torch.no_grad():
        fast = float(compute_loss(model, tokens(3), tokens(3, seed=1)))
        plainly(monkeypatch)
        assert float(compute_loss(model, tokens(3), tokens(3, seed=1))) == pytest.approx(fast, rel=1e-6)


def test_they_step_aside_for_other_precisions_transforms_and_the_compiler() -> None:
    x, seen = torch.zeros(2), []
    assert fused.can_fuse(x)
    assert fused.can_fuse(x.double())
    assert not fused.can_fuse(x.bfloat16())
    assert not fused.can_fuse(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.can_fuse(x)
    vmap(lambda row: (seen.append(fused.can_fuse(x)), row)[1])(x)
    assert seen == [False]
    compiled = torch.compile(lambda t: t + 1 if fused.can_fuse(t) else t - 1, backend="eager")
    assert compiled(x).tolist() == [-1, -1]


def test_small_batches_are_trained_plainly_and_to_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """There Python's share in a hand-written pass is more than the memory traffic that it saves."""
    monkeypatch.setattr(fused, "MIN_ELEMENTS", SMALL)
    assert not fused.can_fuse(torch.zeros(128, 64)), "one sequence of the quickstart's largest proxy"
    assert fused.can_fuse(torch.zeros(16 * 128, 64))
    used = []
    apply = fused._NormLinears.apply
    monkeypatch.setattr(fused._NormLinears, "apply", lambda *given: (used.append(1), apply(*given))[1])
    model = model_of({})
    plain = compute_loss(model, tokens(3), tokens(3, seed=1)).item()
    assert not used
    monkeypatch.setattr(fused, "MIN_ELEMENTS", 0)
    assert compute_loss(model, tokens(3), tokens(3, seed=1)).item() == pytest.approx(plain, rel=1e-13)
    assert used


def test_a_model_compiled_without_graph_breaks_gives_the_same_loss() -> None:
    model = model_of({"q_per_kv": 2, "qk_norm": True})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    eager, ours = (compute_loss(m, tokens(2), tokens(2, seed=1)).item() for m in (model, compiled))
    assert ours == pytest.approx(eager, rel=1e-12)


def test_a_transformed_model_gives_the_same_logits() -> None:
    model = model_of({})
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # flash attention has no vmap on CPU
        rows = vmap(lambda x: functional_call(model, weights, (x[None],))[0])(tokens(3))
    torch.testing.assert_close(rows, model(tokens(3)).detach(), rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_is_normed_to_zeros_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    (out,) = fused.norm_linears(x, torch.ones(4, dtype=torch.float64), (torch.eye(4, dtype=torch.float64),), NORM_EPS)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / math.sqrt(NORM_EPS)))
    torch.testing.assert_close(out, rms_norm(x, torch.ones(4, dtype=torch.float64)))


def test_the_two_forms_of_the_rotary_table_turn_alike() -> None:
    x, table = numbers(2, 5, 3, 4), make_rope_table(5, 4)
    torch.testing.assert_close(rotate(x, torch.view_as_real(table)), rotate(x, table), rtol=1e-12, atol=1e-12)
