"""Growth: what is copied, what is preserved exactly, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from proxies import model
from proxies.config import ProxyConfig
from proxies.model import build, loss_of
from proxies.mup import GAINS, role_of
from proxies.optimizers import make_optimizer, set_lr
from proxies.warmstart import Method, grow, grow_moments, stacking_tokens

SMALL = ProxyConfig(d_model=64, base_width=32, d_head=16, q_per_kv=2, seq_len=24, seed=1)
LARGE = SMALL.model_copy(update={"d_model": 128, "seed": 2})


def trained_like(config: ProxyConfig) -> dict[str, Tensor]:
    """A state in which nothing is zero or one, as after training."""
    generator = torch.Generator().manual_seed(3)
    return {
        n: t + 0.1 * torch.empty(t.shape).normal_(generator=generator) for n, t in build(config).state_dict().items()
    }


def logits(config: ProxyConfig, state: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    net = build(config).double() if dtype == torch.float64 else build(config)
    net.load_state_dict({n: t.to(dtype) for n, t in state.items()})
    tokens = torch.randint(config.vocab, (3, config.seq_len), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return net(tokens)


@pytest.mark.parametrize("q_per_kv", [1, 2])
def test_padding_preserves_the_function(q_per_kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a growth factor that is no whole number, 64 to 160. Only the norm's epsilon weighs more in the padded stream."""
    small = SMALL.model_copy(update={"q_per_kv": q_per_kv})
    large = small.model_copy(update={"d_model": 160})
    state = trained_like(small)
    grown = grow({n: t.double() for n, t in state.items()}, small, large, method="pad")
    for epsilon, tolerance in ((model.NORM_EPS, 1e-3), (1e-16, 1e-12)):
        monkeypatch.setattr(model, "NORM_EPS", epsilon)
        before, after = logits(small, state, torch.float64), logits(large, grown, torch.float64)
        assert before.std() > 0.05
        assert (before - after).abs().max() < tolerance


@pytest.mark.parametrize("q_per_kv", [1, 2])
def test_duplication_preserves_the_function_exactly(q_per_kv: int) -> None:
    small = SMALL.model_copy(update={"q_per_kv": q_per_kv})
    large = small.model_copy(update={"d_model": 192})
    state = {n: t.double() for n, t in trained_like(small).items()}
    before, after = (
        logits(small, state, torch.float64),
        logits(large, grow(state, small, large, method="duplicate"), torch.float64),
    )
    assert (before - after).abs().max() < 1e-12


def test_shrink_pad_perturb_is_its_formula() -> None:
    state, fresh = trained_like(SMALL), build(LARGE).state_dict()
    grown = grow(state, SMALL, LARGE, shrink=0.3, noise=0.5)
    for name, tensor in grown.items():
        leading = tuple(slice(n) for n in state[name].shape)
        if role_of(name) in GAINS:
            assert torch.equal(tensor[leading], state[name])
            assert (tensor[64:] == 1).all()
            continue
        padded = torch.zeros_like(fresh[name])
        padded[leading] = state[name]
        torch.testing.assert_close(tensor, 0.3 * padded + 0.5 * fresh[name])


def test_shrinking_to_nothing_is_training_from_scratch() -> None:
    grown, fresh = grow(trained_like(SMALL), SMALL, LARGE, shrink=0.0), build(LARGE).state_dict()
    for name in fresh:
        if role_of(name) not in GAINS:
            assert torch.equal(grown[name], fresh[name])


def test_noise_breaks_the_symmetry_of_duplication_by_its_size() -> None:
    state = trained_like(SMALL)
    exact, noisy = (grow(state, SMALL, LARGE, method="duplicate", noise=n) for n in (0.0, 0.25))
    moved = 2 * (
        noisy["blocks.0.gate"] - exact["blocks.0.gate"]
    )  # hidden matrices, noise and all, are divided by k = 2
    assert moved.std().item() == pytest.approx(0.25 / math.sqrt(64), rel=0.05)
    assert torch.equal(noisy["final_norm"], exact["final_norm"])


def test_a_different_family_is_refused_with_every_difference() -> None:
    other = LARGE.model_copy(update={"vocab": 300, "ff_mult": 4})
    with pytest.raises(ValueError, match=r"ff_mult: 3 to 4; vocab: 256 to 300"):
        grow(trained_like(SMALL), SMALL, other)


def test_a_smaller_model_is_refused() -> None:
    with pytest.raises(ValueError, match="at least as wide"):
        grow(trained_like(LARGE), LARGE, SMALL)


def test_duplication_by_a_broken_factor_is_refused() -> None:
    method: Method = "duplicate"
    with pytest.raises(ValueError, match="whole growth factor, got 64 to 160"):
        grow(trained_like(SMALL), SMALL, SMALL.model_copy(update={"d_model": 160}), method=method)


def test_a_depth_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a multiple of 2, got 3"):
        grow(trained_like(SMALL), SMALL, LARGE.model_copy(update={"n_layers": 3}))


def test_a_foreign_checkpoint_is_refused() -> None:
    state = trained_like(SMALL)
    state["blocks.9.q"] = state.pop("blocks.1.q")
    with pytest.raises(ValueError, match=r"blocks\.1\.q, blocks\.9\.q"):
        grow(state, SMALL, LARGE)


EVERY = [
    {"q_per_kv": g, "qk_norm": n, "tied": t, "parametrization": p}
    for g in (1, 2)
    for n in (False, True)
    for t in (False, True)
    for p in ("mup", "standard")
]


def variant(changes: dict[str, Any]) -> ProxyConfig:
    """Wider than its base, so that multipliers are not 1."""
    tied = {"embed_std": 0.1, "alpha_in": 8.0} if changes["tied"] else {}
    return ProxyConfig.model_validate(SMALL.model_dump() | changes | tied)


@pytest.mark.parametrize("changes", EVERY)
@pytest.mark.parametrize("method", ["duplicate", "hyperclone"])
def test_copies_compute_the_same_function_for_every_kind_of_model(method: Method, changes: dict[str, Any]) -> None:
    small = variant(changes)
    large = small.model_copy(update={"d_model": 192})
    state = {n: t.double() for n, t in trained_like(small).items()}
    grown = grow(state, small, large, method=method)
    before = logits(small, state, torch.float64)
    assert before.std() > 0.05
    assert (before - logits(large, grown, torch.float64)).abs().max() < 1e-11


def test_cancelling_noise_has_its_size_and_parts_the_copies() -> None:
    state = trained_like(SMALL)
    plain, noisy = (
        grow(state, SMALL, LARGE, method="duplicate"),
        grow(state, SMALL, LARGE, method="hyperclone", noise=0.25),
    )
    for name in ("blocks.1.up", "readout"):
        added = noisy[name] - plain[name]
        torch.testing.assert_close(added[:, :64], -added[:, 64:])
        assert float(added.square().mean() / plain[name].square().mean()) == pytest.approx(0.25, rel=0.05)
    config = LARGE
    nets = []
    for grown in (plain, noisy):
        net = build(config)
        net.load_state_dict(grown)
        optimizer = make_optimizer(net, config)
        for step in range(3):
            x = torch.randint(config.vocab, (4, 24), generator=torch.Generator().manual_seed(step))
            loss_of(net, x, x.roll(-1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        nets.append(net.blocks[0].down.detach())
    halves = [(w[:64, :192] - w[64:, :192]).abs().max() / w.abs().max() for w in nets]
    assert halves[0] < 1e-4 < 1e-2 < halves[1]


@pytest.mark.parametrize("changes", [c for c in EVERY if c["parametrization"] == "mup"])
def test_a_duplicated_run_goes_on_as_the_small_one_would_moments_included(changes: dict[str, Any]) -> None:
    small = variant(changes).model_copy(update={"eps": 1e-5, "weight_decay": 0.3, "lr": 0.01})
    large = small.model_copy(update={"d_model": 128})

    def steps(net: torch.nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randint(small.vocab, (4, 24), generator=torch.Generator().manual_seed(step))
            loss_of(net, x, x.roll(-1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()

    net = build(small).double()
    net.load_state_dict({n: t.double() for n, t in trained_like(small).items()})
    optimizer = make_optimizer(net, small)
    set_lr(optimizer, 0.7)
    steps(net, optimizer, 0, 6)
    wide = build(large).double()
    wide.load_state_dict(grow(net.state_dict(), small, large, method="duplicate"))
    its = make_optimizer(wide, large)
    its.load_state_dict(grow_moments(optimizer.state_dict(), small, large))
    for one in (optimizer, its):
        set_lr(one, 0.4)
    steps(net, optimizer, 6, 26)
    steps(wide, its, 6, 26)
    x = torch.randint(small.vocab, (3, 24), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        assert (net(x) - wide(x)).abs().max() < 1e-12 * max(1.0, float(net(x).abs().max()))


def test_stacking_repeats_the_whole_stack_and_width_follows() -> None:
    state = trained_like(SMALL)
    deep = SMALL.model_copy(update={"n_layers": 6})
    grown = grow(state, SMALL, deep, method="duplicate")
    for i in range(6):
        assert torch.equal(grown[f"blocks.{i}.gate"], state[f"blocks.{i % 2}.gate"])
    assert len([n for n in grown if n.startswith("blocks.")]) == 3 * len([n for n in state if n.startswith("blocks.")])
    both = grow(state, SMALL, LARGE.model_copy(update={"n_layers": 4}), method="duplicate")
    wide = grow(state, SMALL, LARGE, method="duplicate")
    assert torch.equal(both["blocks.3.q"], wide["blocks.1.q"])


def test_tokens_before_stacking_are_those_of_the_papers_example() -> None:
    """Llama-3 8B on 15T tokens: 6.58 billion (arXiv 2405.15319)."""
    assert stacking_tokens(8e9, 6 * 8e9 * 15e12) == pytest.approx(6.58e9, rel=2e-3)
