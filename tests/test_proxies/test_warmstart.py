"""Growth: what is copied, what is preserved exactly, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from proxies import model
from proxies.config import ProxyConfig
from proxies.model import build
from proxies.mup import GAINS, role_of
from proxies.warmstart import Method, grow

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
    other = LARGE.model_copy(update={"n_layers": 3, "ff_mult": 4})
    with pytest.raises(ValueError, match=r"n_layers: 2 to 3; ff_mult: 3 to 4"):
        grow(trained_like(SMALL), SMALL, other)


def test_a_smaller_model_is_refused() -> None:
    with pytest.raises(ValueError, match="at least as wide"):
        grow(trained_like(LARGE), LARGE, SMALL)


def test_duplication_by_a_broken_factor_is_refused() -> None:
    method: Method = "duplicate"
    with pytest.raises(ValueError, match="whole growth factor, got 64 to 160"):
        grow(trained_like(SMALL), SMALL, SMALL.model_copy(update={"d_model": 160}), method=method)


def test_a_foreign_checkpoint_is_refused() -> None:
    state = trained_like(SMALL)
    state["blocks.9.q"] = state.pop("blocks.1.q")
    with pytest.raises(ValueError, match=r"blocks\.1\.q, blocks\.9\.q"):
        grow(state, SMALL, LARGE)
