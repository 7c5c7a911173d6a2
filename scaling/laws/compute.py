"""N, D and C: what counts as a parameter, a token and a FLOP.

The conventions of papers differ by tens of percent on small models, so every count is kept, and every law says which
one it uses. The formulas are in section 1 of docs/math.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fidelity:
    """The size of a training run.

    Attributes:
        N: Parameters that multiply tokens: all matrices including the unembedding, but no embedding lookup.
        D: Training tokens.

    Example:
        >>> Fidelity(N=7e9, D=1.4e12).C
        5.88e+22
    """

    N: float
    D: float

    @property
    def C(self) -> float:
        """Training FLOPs, 6 N D.

        Each multiply-add counts as two FLOPs, and the backward pass costs twice the forward pass. Attention scores are
        not counted.
        """
        # In integers the product of real sizes would overflow int64.
        return 6.0 * float(self.N) * float(self.D)


@dataclass(frozen=True)
class ParamCounts:
    """Parameters of one model, counted in three ways.

    Attributes:
        N: Parameters that multiply tokens: all matrices, the unembedding once, no embedding lookup (N in this package).
        nonembedding: All parameters except the embedding and an untied unembedding (N of Kaplan et al.).
        total: All trained parameters (N of Chinchilla).
    """

    N: int
    nonembedding: int
    total: int


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
    """Count the parameters of a decoder-only Transformer with SwiGLU, grouped-query attention, RMSNorm and no biases.

    The unembedding multiplies every token, tied or not, so N does not depend on `tied`. The total does.

    Args:
        d_model: Width of the residual stream.
        n_layers: Number of layers.
        n_heads: Number of query heads.
        n_kv_heads: Number of key and value heads.
        d_head: Width of a head.
        d_ff: Hidden width of the feed-forward layers.
        vocab: Vocabulary size.
        qk_norm: Whether queries and keys are normalised, with a gain each.
        tied: Whether the embedding and the unembedding share their weights.
    """
    attention = d_model * n_heads * d_head * 2 + 2 * d_model * n_kv_heads * d_head
    blocks = n_layers * (attention + 3 * d_model * d_ff)
    gains = (2 * n_layers + 1) * d_model + (2 * n_layers * d_head if qk_norm else 0)
    table = d_model * vocab
    return ParamCounts(N=blocks + table, nonembedding=blocks + gains, total=blocks + gains + (1 if tied else 2) * table)


def flops_per_token(*, N: float, n_layers: int, n_heads: int, d_head: int, seq_len: int, causal: bool = False) -> float:
    """Return the training FLOPs per token, 6 N + 12 L H d_head T (PaLM, appendix B; also used by nanoGPT and nanochat).

    Args:
        N: Parameters that multiply tokens.
        n_layers: Number of layers, L.
        n_heads: Number of query heads, H.
        d_head: Width of a head.
        seq_len: Sequence length in tokens, T.
        causal: Count only the (T + 1) / 2 keys that a token attends to on average. PaLM has no such discount.
    """
    keys = (seq_len + 1) / 2 if causal else seq_len
    return 6.0 * N + 12.0 * n_layers * n_heads * d_head * keys
