"""N, D and C: what counts as a parameter, a token and a FLOP.

Conventions differ between papers by tens of percent on small models, so every count is kept and every law says which one
it used. Formulas: MATH §1 of docs/math.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fidelity:
    """The size of a training run: N parameters that multiply tokens, D training tokens."""

    N: float
    D: float

    @property
    def C(self) -> float:
        """Training FLOPs, 6 N D: two per multiply-add, forward once and backward twice (attention scores not counted)."""
        return 6.0 * float(self.N) * float(self.D)  # floats: the product of real sizes overflows int64


@dataclass(frozen=True)
class ParamCounts:
    """One model counted three ways."""

    N: int  # multiply tokens: all matrices, the unembedding once, no input look-up (our N)
    nonembedding: int  # total without input look-up and untied unembedding (Kaplan's N)
    total: int  # every trained number (Chinchilla's N)


def count_transformer(
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    d_head: int,
    d_ff: int,
    vocab: int,
    qk_norm: bool = False,
    tied: bool = False,
) -> ParamCounts:
    """Decoder-only, SwiGLU, grouped-query attention, RMSNorm gains, no biases.

    The unembedding multiplies every token, tied or not, so N does not depend on `tied`; the total does.
    """
    attention = d_model * n_heads * d_head * 2 + 2 * d_model * n_kv_heads * d_head
    blocks = n_layers * (attention + 3 * d_model * d_ff)
    gains = (2 * n_layers + 1) * d_model + (2 * n_layers * d_head if qk_norm else 0)
    table = d_model * vocab
    return ParamCounts(N=blocks + table, nonembedding=blocks + gains, total=blocks + gains + (1 if tied else 2) * table)


def flops_per_token(*, N: float, n_layers: int, n_heads: int, d_head: int, seq_len: int, causal: bool = False) -> float:
    """Training FLOPs per token, 6 N + 12 L H d_head T (PaLM, appendix B; as nanoGPT and nanochat count).

    The attention term has no causal discount there; `causal=True` counts only the (T + 1) / 2 keys that a token sees.
    """
    keys = (seq_len + 1) / 2 if causal else seq_len
    return 6.0 * N + 12.0 * n_layers * n_heads * d_head * keys
