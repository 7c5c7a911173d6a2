"""Growing weights and moments: what is copied, what is preserved exactly, what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proxies.config.growth_rules import GrowthMethod, check_growth, compute_stacking_tokens
from proxies.config.proxy import ProxyConfig
from proxies.growth.moments import grow_moments, locate_moments
from proxies.growth.weights import grow, grow_tensors
from proxies.model import transformer
from proxies.model.mup import GAIN_ROLES, get_role
from proxies.model.optimizers import make_optimizer, set_lr
from proxies.model.transformer import build, compute_loss
from proxies.training.moments import load_moments

# The test of this warning turns it back into an error.
pytestmark = pytest.mark.filterwarnings("ignore:N grows")

SMALL = ProxyConfig(d_model=64, base_width=32, d_head=16, q_per_kv=2, seq_len=24, seed=1)
LARGE = SMALL.model_copy(update={"d_model": 128, "seed": 2})


def trained_like(config: ProxyConfig) -> dict[str, Tensor]:
    """Make a state in which nothing is zero or one, as after training."""
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
    """It holds for a fractional growth factor, 64 to 160. Only the norm's epsilon weighs more in the padded stream."""
    small = SMALL.model_copy(update={"q_per_kv": q_per_kv})
    large = small.model_copy(update={"d_model": 160})
    state = trained_like(small)
    grown = grow({n: t.double() for n, t in state.items()}, small, large, method="pad")
    for epsilon, tolerance in ((transformer.NORM_EPS, 1e-3), (1e-16, 1e-12)):
        monkeypatch.setattr(transformer, "NORM_EPS", epsilon)
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
        if get_role(name) in GAIN_ROLES:
            assert torch.equal(tensor[leading], state[name])
            assert (tensor[64:] == 1).all()
            continue
        padded = torch.zeros_like(fresh[name])
        padded[leading] = state[name]
        torch.testing.assert_close(tensor, 0.3 * padded + 0.5 * fresh[name])


def test_shrinking_to_nothing_is_training_from_scratch() -> None:
    grown, fresh = grow(trained_like(SMALL), SMALL, LARGE, shrink=0.0), build(LARGE).state_dict()
    for name in fresh:
        if get_role(name) not in GAIN_ROLES:
            assert torch.equal(grown[name], fresh[name])


def test_noise_breaks_the_symmetry_of_duplication_by_its_size() -> None:
    state = trained_like(SMALL)
    exact, noisy = (grow(state, SMALL, LARGE, method="duplicate", noise=n) for n in (0.0, 0.25))
    # Hidden matrices are divided by k = 2, their noise included.
    moved = 2 * (noisy["blocks.0.gate"] - exact["blocks.0.gate"])
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
    method: GrowthMethod = "duplicate"
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
    """Return a small model that is wider than its base width, so that multipliers are not 1."""
    tied = {"embed_std": 0.1, "alpha_in": 8.0} if changes["tied"] else {}
    return ProxyConfig.model_validate(SMALL.model_dump() | changes | tied)


@pytest.mark.parametrize("changes", EVERY)
@pytest.mark.parametrize("method", ["duplicate", "hyperclone"])
def test_copies_compute_the_same_function_for_every_kind_of_model(
    method: GrowthMethod, changes: dict[str, Any]
) -> None:
    small = variant(changes)
    large = small.model_copy(update={"d_model": 192})
    state = {n: t.double() for n, t in trained_like(small).items()}
    grown = grow(state, small, large, method=method)
    before = logits(small, state, torch.float64)
    assert before.std() > 0.05
    assert (before - logits(large, grown, torch.float64)).abs().max() < 1e-11


def test_cancelling_noise_has_its_size_and_separates_the_copies() -> None:
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
    for state in (plain, noisy):
        net = build(config)
        net.load_state_dict(state)
        optimizer = make_optimizer(net, config)
        for step in range(3):
            x = torch.randint(config.vocab, (4, 24), generator=torch.Generator().manual_seed(step))
            compute_loss(net, x, x.roll(-1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        nets.append(net.blocks[0].down.detach())
    halves = [(w[:64, :192] - w[64:, :192]).abs().max() / w.abs().max() for w in nets]
    assert halves[0] < 1e-4 < 1e-2 < halves[1]


@pytest.mark.parametrize("changes", [c for c in EVERY if c["parametrization"] == "mup"])
def test_a_duplicated_run_continues_as_the_small_one_would_moments_included(changes: dict[str, Any]) -> None:
    small = variant(changes).model_copy(update={"eps": 1e-5, "weight_decay": 0.3, "lr": 0.01})
    large = small.model_copy(update={"d_model": 128})

    def steps(net: torch.nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randint(small.vocab, (4, 24), generator=torch.Generator().manual_seed(step))
            compute_loss(net, x, x.roll(-1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()

    net = build(small).double()
    net.load_state_dict({n: t.double() for n, t in trained_like(small).items()})
    optimizer = make_optimizer(net, small)
    set_lr(optimizer, 0.7)
    steps(net, optimizer, 0, 6)
    wide = build(large).double()
    wide.load_state_dict(grow(net.state_dict(), small, large, method="duplicate"))
    wide_optimizer = make_optimizer(wide, large)
    moments = {name: reduce(getitem, key, optimizer.state_dict()) for name, key in locate_moments(small).items()}
    load_moments(wide_optimizer, wide, dict(grow_moments(moments, small, large)))
    for each in (optimizer, wide_optimizer):
        set_lr(each, 0.4)
    steps(net, optimizer, 6, 26)
    steps(wide, wide_optimizer, 6, 26)
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
    assert compute_stacking_tokens(8e9, 6 * 8e9 * 15e12) == pytest.approx(6.58e9, rel=2e-3)


@pytest.mark.parametrize("method", ["shrink-pad-perturb", "pad", "duplicate", "hyperclone"])
def test_width_and_depth_together_are_depth_and_then_width(method: GrowthMethod) -> None:
    """A grown stack has noise of its own; the rest is the wide version of the block that it repeats."""
    state = {n: t.double() for n, t in trained_like(SMALL).items()}
    deep = SMALL.model_copy(update={"n_layers": 4, "base_layers": 2})
    both = deep.model_copy(update={"d_model": 128, "seed": 2})
    stacked = grow(state, SMALL, deep, method="stack")
    at_once = grow(state, SMALL, both, method=method)
    in_turn = grow(stacked, deep, both, method=method)
    assert all(torch.equal(at_once[name], in_turn[name]) for name in at_once)
    if method in ("duplicate", "hyperclone"):
        before, after = logits(deep, stacked, torch.float64), logits(both, at_once, torch.float64)
        assert (before - after).abs().max() < 1e-11


@pytest.mark.parametrize(("power", "order"), [(1.0, 2), (0.5, 1)])
def test_under_completep_a_stack_is_the_small_model_to_first_order_in_its_branches(power: float, order: int) -> None:
    """With g blocks of 1/g of the branch each, the difference falls with the square of the branches."""
    small = SMALL.model_copy(update={"base_layers": 2, "depth_power": power})
    deep = small.model_copy(update={"n_layers": 6})
    state = {n: t.double() for n, t in trained_like(small).items()}

    def distance(branches: float) -> float:
        weak = {n: branches * t if n.endswith((".o", ".down")) else t for n, t in state.items()}
        stacked = grow(weak, small, deep, method="stack")
        return float((logits(small, weak, torch.float64) - logits(deep, stacked, torch.float64)).abs().max())

    assert distance(1e-3) > 1e-12
    assert math.log2(distance(2e-3) / distance(1e-3)) == pytest.approx(order, abs=0.05)


def test_cancelling_noise_of_nothing_is_duplication() -> None:
    state = trained_like(SMALL)
    plain = grow(state, SMALL, LARGE, method="duplicate")
    silent = grow(state, SMALL, LARGE, method="hyperclone", noise=0.0)
    assert all(torch.equal(plain[name], silent[name]) for name in plain)


def test_all_that_is_wrong_with_a_pair_is_named_at_once(tmp_path: Path) -> None:
    other = SMALL.model_copy(update={"d_model": 32, "n_layers": 3, "vocab": 300, "tokenizer": "bpe", "alpha_out": 2.0})
    with pytest.raises(ValueError, match="vocab: 256 to 300") as refused:
        check_growth(SMALL, other, "pad")
    for problem in ("tokenizer: bytes to bpe", "alpha_out: 1.0 to 2.0", "at least as wide", "a multiple of 2, got 3"):
        assert problem in str(refused.value)


def test_a_tokenizer_is_its_content_and_not_its_path(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.json" for name in "abc"]
    for path, text in zip(files, ("{}", "{}", "[]"), strict=True):
        path.write_text(text)
    one, moved, another = (SMALL.model_copy(update={"tokenizer": str(path)}) for path in files)
    check_growth(one, moved, "pad")
    with pytest.raises(ValueError, match=r"tokenizer: .*a\.json to .*c\.json"):
        check_growth(one, another, "pad")
    trained, elsewhere = (
        SMALL.model_copy(update={"tokenizer": "bpe", "vocab": 300, "corpus": c}) for c in ("stdlib", "docs")
    )
    check_growth(trained, trained, "pad")
    with pytest.raises(ValueError, match="corpus, on which the tokenizer is trained: stdlib to docs"):
        check_growth(trained, elsewhere, "pad")
    # Bytes need no tokenizer, so the corpus may differ.
    check_growth(SMALL, SMALL.model_copy(update={"corpus": "docs"}), "pad")


def test_a_base_depth_may_be_named_later_but_not_changed() -> None:
    """A model without a base depth is its own base."""
    deep = {"n_layers": 4, "base_layers": 2}
    check_growth(SMALL, SMALL.model_copy(update=deep), "stack")
    with pytest.raises(ValueError, match="base_layers: None to 1"):
        check_growth(SMALL, SMALL.model_copy(update=deep | {"base_layers": 1}), "stack")


class CountedState(Mapping[str, Tensor]):
    """A state that records which of its tensors are read."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state, self.reads = state, list[str]()
        self.shapes = {name: tensor.to("meta") for name, tensor in state.items()}

    def __getitem__(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.state[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_tensors_are_read_when_they_are_grown_and_not_before() -> None:
    state = CountedState(trained_like(SMALL))
    parts = grow_tensors(state, SMALL, LARGE, method="duplicate")
    assert state.reads == []
    for i, (name, _) in enumerate(parts, 1):
        assert state.reads[-1] == name
        assert len(state.reads) == i
    with pytest.raises(ValueError, match="at least as wide"):
        # It is refused at once, not with the first tensor.
        grow_tensors(state, LARGE, SMALL)
