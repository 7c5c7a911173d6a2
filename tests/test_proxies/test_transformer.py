"""The model: its parameters, attention, rotary embedding, multipliers, and training under muP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proxies.config.proxy import ProxyConfig
from proxies.model.mup import GAIN_ROLES, get_role
from proxies.model.optimizers import make_optimizer
from proxies.model.transformer import Block, build, compute_loss, make_rope_table, rotate
from proxies.training.checkpoints import write_state


def make_config(**changes: Any) -> ProxyConfig:
    return ProxyConfig(**({"d_model": 32, "base_width": 32, "seq_len": 24, "vocab": 50} | changes))


def draw_tokens(n: int, seq_len: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(50, (n, seq_len), generator=torch.Generator().manual_seed(seed))


def randomize_readout(model: torch.nn.Module) -> torch.nn.Module:
    """Convert a model to float64 and draw its readout, which is zero initially, so that its logits are informative."""
    model = model.double()
    with torch.no_grad():
        model.readout.normal_(std=0.3, generator=torch.Generator().manual_seed(9))
    return model


def test_the_model_has_the_parameters_that_the_config_counts() -> None:
    tied = {"tied": True, "embed_std": 0.1}
    for changes in ({}, {"d_model": 64}, {"q_per_kv": 2, "n_layers": 3}, {"qk_norm": True}, tied):
        model = build(make_config(**changes))
        assert sum(p.numel() for p in model.parameters()) == model.config.counts.total
        gains = sum(p.numel() for n, p in model.named_parameters() if get_role(n) in GAIN_ROLES)
        # A tied table multiplies every token too.
        looked_up = 0 if model.config.tied else model.embed.numel()
        assert sum(p.numel() for p in model.parameters()) - gains - looked_up == model.config.counts.N


def test_an_untrained_model_predicts_all_tokens_equally() -> None:
    loss = compute_loss(build(make_config()), draw_tokens(2), draw_tokens(2, seed=1))
    assert float(loss.detach()) == pytest.approx(math.log(50), abs=1e-6)


def test_logits_do_not_depend_on_the_future() -> None:
    model = randomize_readout(build(make_config()))
    x_btd = model.stem(draw_tokens(2)).detach().requires_grad_()
    y = x_btd
    for block in model.blocks:
        y = block(y, model.get_rope(draw_tokens(2)))
    for t in (0, 10, 22):
        (gradient,) = torch.autograd.grad(model.head(y)[:, t].square().sum(), x_btd, retain_graph=True)
        assert torch.count_nonzero(gradient[:, t + 1 :]) == 0
        # Every token up to t matters.
        assert (gradient[:, : t + 1].abs().amax(dim=-1) > 0).all()


@torch.no_grad()
def test_attention_agrees_with_the_formula_written_out() -> None:
    block = build(make_config(q_per_kv=2, alpha_attn=1.5)).double().blocks[0]
    rope = make_rope_table(24, 16)
    x = torch.randn(3, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = block.attention_logits(x, rope).masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1), -math.inf)
    values = (x @ block.v.T).view(3, 24, 1, 16).repeat_interleave(2, dim=2)
    mixed = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), values).flatten(-2)
    torch.testing.assert_close(block.attention(x, rope), mixed @ block.o.T, rtol=1e-12, atol=1e-12)
    # One score by hand; there is no rotation at position 0.
    q, k = (x[0, 0] @ block.q.T)[16:], x[0, 0] @ block.k.T
    assert float(block.attention_logits(x, rope)[0, 1, 0, 0]) == pytest.approx(1.5 * float(q @ k) / 4)


@pytest.mark.parametrize("q_per_kv", [2, 4])
def test_grouped_queries_are_multi_head_attention_with_repeated_keys(q_per_kv: int) -> None:
    grouped = randomize_readout(build(make_config(d_model=64, base_width=64, q_per_kv=q_per_kv)))
    full = randomize_readout(build(make_config(d_model=64, base_width=64, q_per_kv=1)))
    state = dict(grouped.state_dict())
    for name, tensor in state.items():
        if name.endswith((".k", ".v")):
            state[name] = tensor.view(-1, 16, 64).repeat_interleave(q_per_kv, dim=0).reshape(64, 64)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(draw_tokens(2)), full(draw_tokens(2)), rtol=1e-12, atol=1e-12)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64, generator=generator).expand(1, 40, 1, 16) for _ in range(2))
    table = make_rope_table(40, 16)
    scores = torch.einsum("bthk,bshk->ts", rotate(q, table), rotate(k, table))
    for distance in (0, 1, 7, 30):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    # They do depend on its sign.
    assert abs(scores[7, 0] - scores[0, 7]) > 1e-3
    torch.testing.assert_close(rotate(q, table).norm(dim=-1), q.norm(dim=-1))


def test_the_first_rotary_pair_rotates_by_one_radian_per_token() -> None:
    x = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    x[..., 0] = 1
    rotated = rotate(x, make_rope_table(3, 4))[0, :, 0]
    expected = torch.tensor([[math.cos(t), math.sin(t), 0, 0] for t in range(3)], dtype=torch.float64)
    torch.testing.assert_close(rotated, expected)


def test_a_sequence_may_be_shorter_but_not_longer_than_the_table() -> None:
    model = randomize_readout(build(make_config()))
    torch.testing.assert_close(model(draw_tokens(2))[:, :10], model(draw_tokens(2)[:, :10]))
    with pytest.raises(ValueError, match="at most seq_len = 24"):
        model(draw_tokens(1, seq_len=25))


def test_output_multipliers_scale_the_logits() -> None:
    base = randomize_readout(build(make_config()))
    louder = randomize_readout(build(make_config(alpha_out=3.0)))
    torch.testing.assert_close(louder(draw_tokens(1)), 3 * base(draw_tokens(1)))
    wide = randomize_readout(build(make_config(d_model=64)))
    assert (base.multiplier_out, wide.multiplier_out, louder.multiplier_out) == (1.0, 0.5, 3.0)


def test_a_model_can_change_precision_and_keep_its_logits() -> None:
    model = build(make_config())
    with torch.no_grad():
        model.readout.normal_(generator=torch.Generator().manual_seed(0))
    single = model(draw_tokens(2))
    torch.testing.assert_close(model.double()(draw_tokens(2)).float(), single, rtol=1e-4, atol=1e-5)


def tile_twice(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Double the width without changing the function.

    Hidden matrices are tiled 2 x 2 and divided by 2; all other parameters are tiled along the width.
    """
    large = {}
    for name, tensor in state.items():
        role = get_role(name)
        if role == "hidden":
            large[name] = tensor.repeat(2, 2) / 2
        elif role == "qk_norm":
            large[name] = tensor
        else:
            large[name] = tensor.repeat(2) if role in ("norm", "final_norm") else tensor.repeat(1, 2)
    return large


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("heads_per_group", [1, 2])
def test_a_model_doubled_by_tiling_trains_exactly_like_the_small_one(
    heads_per_group: int, qk_norm: bool, tied: bool, tmp_path: Path
) -> None:
    """This needs the learning rates, decays, eps and the readout multiplier of muP (arXiv 2602.10545).

    Tiled in blocks, query head i + H reads group i // q_per_kv + Hkv, a copy of the group that head i reads.
    """
    # eps is large and the readout not zero, so that a wrong eps or gradient shows. The depth is not the base depth.
    shape = {
        "q_per_kv": heads_per_group,
        "eps": 1e-4,
        "weight_decay": 0.3,
        "lr": 0.01,
        "alpha_in": 1.7,
        "base_layers": 1,
    }
    shape |= {"qk_norm": qk_norm, "tied": tied} | ({"embed_std": 0.3, "alpha_in": 3.0} if tied else {})
    small = build(make_config(**shape)).double() if tied else randomize_readout(build(make_config(**shape)))
    large = build(make_config(**shape, d_model=64)).double()
    large.load_state_dict(tile_twice(small.state_dict()))
    probe = draw_tokens(2, seed=99)
    start = small(probe).detach()
    torch.testing.assert_close(large(probe), start, rtol=0, atol=1e-12)
    for model in (small, large):
        optimizer = make_optimizer(model, model.config)
        for step in range(20):
            # Continue from a file, with new objects, which must not depend on anything in the old ones.
            if step == 10:
                write_state({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt")
                saved = torch.load(tmp_path / "half.pt", weights_only=True)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.zero_()
                model.load_state_dict(saved["model"])
                optimizer = make_optimizer(model, model.config)
                optimizer.load_state_dict(saved["optimizer"])
            compute_loss(model, draw_tokens(4, seed=step), draw_tokens(4, seed=step + 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
    # The training changed the model.
    assert (small(probe) - start).abs().max() > 0.1
    torch.testing.assert_close(large(probe), small(probe), rtol=0, atol=1e-12)


def test_every_matrix_has_its_own_name_and_shape() -> None:
    """Growth pads each of them according to its role."""
    model = build(make_config(d_model=64, q_per_kv=2, n_layers=1))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "embed": (50, 64),
        "blocks.0.attn_norm": (64,),
        "blocks.0.q": (64, 64),
        "blocks.0.k": (32, 64),
        "blocks.0.v": (32, 64),
        "blocks.0.o": (64, 64),
        "blocks.0.mlp_norm": (64,),
        "blocks.0.gate": (192, 64),
        "blocks.0.up": (192, 64),
        "blocks.0.down": (64, 192),
        "final_norm": (64,),
        "readout": (50, 64),
    }
    assert isinstance(model.blocks[0], Block)
