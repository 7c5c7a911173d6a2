"""Counts of parameters and FLOPs: by hand, by torch, and without overflow."""

from __future__ import annotations

import pytest

from proxies.config.proxy import ProxyConfig
from proxies.model.transformer import build
from scaling.laws.compute import Fidelity, count_transformer, flops_per_token


def test_compute_does_not_overflow() -> None:
    assert Fidelity(10**12, 10**14).C == pytest.approx(6e26)


def test_the_flops_of_gpt2_are_palms() -> None:
    """GPT-2 has 124M parameters, 12 layers of 12 heads of 64 and 1024 tokens: 0.857e9 per token (PaLM, appendix B)."""
    flops = flops_per_token(N=124e6, n_layers=12, n_heads=12, d_head=64, seq_len=1024)
    assert flops == pytest.approx(0.857e9, rel=1e-3)
    causal = flops_per_token(N=124e6, n_layers=12, n_heads=12, d_head=64, seq_len=1024, causal=True)
    assert causal - 6 * 124e6 == pytest.approx((flops - 6 * 124e6) * 1025 / 2048)


def test_counts_by_hand() -> None:
    counts = count_transformer(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_head=16, d_ff=96, vocab=256)
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 96)
    assert counts.N == matrices + 32 * 256
    assert counts.nonembedding == matrices + 5 * 32
    assert counts.total == matrices + 5 * 32 + 2 * 32 * 256


@pytest.mark.parametrize("q_per_kv", [1, 2])
def test_the_count_is_the_models(q_per_kv: int) -> None:
    config = ProxyConfig(d_model=96, q_per_kv=q_per_kv, d_head=16, base_width=32, n_layers=3)
    assert sum(p.numel() for p in build(config).parameters()) == config.counts.total
