"""Published laws of learning rate and batch size, by name, to be shown beside a fit. None of them is a default.

`get_published_law("step-law")(N, D)` returns (lr, batch_tokens), with None for what a law does not state. If a paper
states only how an optimum moves, because its constant holds for its authors' setting only, the result is (None, None)
and `exponents` describes the movement. N counts parameters that multiply tokens, D tokens; every law says how its own N
differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from scaling.common.arrays import Array
from scaling.common.suggest import did_you_mean


@dataclass(frozen=True)
class PowerTerm:
    """The power law coef size^N tokens^D, with exponents N and D."""

    coef: float
    N: float
    D: float

    def __call__(self, size: Array, tokens: Array) -> Array:
        return np.asarray(self.coef * size**self.N * tokens**self.D)


@dataclass(frozen=True)
class LogTerm:
    """The law at_one + slope ln N, or 0 where that is negative."""

    at_one: float
    slope: float

    def __call__(self, size: Array, tokens: Array) -> Array:
        return np.asarray(np.maximum(self.at_one + self.slope * np.log(size), 0.0) + 0.0 * tokens)


@dataclass(frozen=True)
class PublishedLaw:
    """A law from the literature: its formula, its units, where it was measured, and how certain its numbers are.

    Attributes:
        name: Name by which it is selected.
        source: Paper and arXiv id.
        formula: The formula as text.
        N_definition: What the law counts as N.
        measured: Range and setting in which it was measured.
        confidence: How the numbers here were checked.
        lr: Optimal learning rate; None if the law does not state it.
        batch_tokens: Optimal batch size in tokens per step; None if the law does not state it.
        exponents: Exponents of "lr" and "batch_tokens" in N, D and batch_tokens, also without a constant.
        N_range: Range of N in which it was measured; None if not known with certainty.
        D_range: Range of D in which it was measured; None if not known with certainty.
    """

    name: str
    source: str
    formula: str
    N_definition: str
    measured: str
    confidence: str
    lr: PowerTerm | LogTerm | None = None
    batch_tokens: PowerTerm | None = None
    exponents: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: MappingProxyType({}))
    N_range: tuple[float, float] | None = None
    D_range: tuple[float, float] | None = None

    def __call__(self, N: ArrayLike, D: ArrayLike) -> tuple[Array | None, Array | None]:
        """Return (lr, batch_tokens), with None for what the law does not state.

        Args:
            N: Parameters that multiply tokens. Shapes of N and D broadcast.
            D: Training tokens.

        Raises:
            ValueError: If N or D is not positive and finite.
        """
        size, tokens = np.asarray(N, float), np.asarray(D, float)
        for letter, values in (("N", size), ("D", tokens)):
            if not np.all(np.isfinite(values) & (values > 0)):
                raise ValueError(f"a published law needs positive finite {letter}, got {values}")
        lr = None if self.lr is None else self.lr(size, tokens)
        return lr, None if self.batch_tokens is None else self.batch_tokens(size, tokens)

    def covers(self, N: float, D: float) -> bool | None:
        """Return whether (N, D) lies in the range where the law was measured; None if that range is not known."""
        if self.N_range is None or self.D_range is None:
            return None
        return self.N_range[0] <= N <= self.N_range[1] and self.D_range[0] <= D <= self.D_range[1]


def _make_compute_term(coef: float, exponent: float) -> PowerTerm:
    """Return the term coef C^exponent with C = 6 N D."""
    return PowerTerm(coef * 6.0**exponent, exponent, exponent)


PUBLISHED_LAWS = (
    PublishedLaw(
        name="step-law",
        source="Step Law, arXiv 2503.04715",
        formula="lr = 1.79 N^-0.713 D^0.307, B = 0.58 D^0.571 tokens",
        N_definition="non-embedding parameters",
        measured="dense, 6e7 to 1.1e9 parameters, 2e9 to 1e11 tokens, AdamW, cosine to a fixed 1e-5",
        confidence="the constants agree in every source that we checked; "
        "the lower end of the range of N and D is from memory",
        lr=PowerTerm(1.79, -0.713, 0.307),
        batch_tokens=PowerTerm(0.58, 0.0, 0.571),
        exponents={"lr": {"N": -0.713, "D": 0.307}, "batch_tokens": {"N": 0.0, "D": 0.571}},
        N_range=(6e7, 1.1e9),
        D_range=(2e9, 1e11),
    ),
    PublishedLaw(
        name="deepseek",
        source="DeepSeek LLM, arXiv 2401.02954",
        formula="lr = 0.3118 C^-0.1250, B = 0.2920 C^0.3271 tokens",
        N_definition="the paper's C is M D, with M its non-embedding FLOPs per token including attention; "
        "here M = 6 N, so C is slightly too small",
        measured="compute-optimal models, AdamW, a schedule in three steps; N and D are not separated",
        confidence="the constants agree in two sources besides the paper; "
        "the range of C in which it was measured is not given here",
        lr=_make_compute_term(0.3118, -0.1250),
        batch_tokens=_make_compute_term(0.2920, 0.3271),
        exponents={"lr": {"N": -0.1250, "D": -0.1250}, "batch_tokens": {"N": 0.3271, "D": 0.3271}},
    ),
    PublishedLaw(
        name="kaplan",
        source="Scaling laws for neural language models, arXiv 2001.08361, appendix D",
        formula="lr = 0.003239 - 0.0001395 ln N",
        N_definition="non-embedding parameters",
        measured="up to 1.5e9 parameters, Adam, batches of half a million tokens, cosine; D does not enter",
        confidence="from memory, not checked again; it is zero from N = 1.2e10 on, where it does not apply. "
        "The paper's batch is a critical batch, a function of the loss reached, not of N and D: left out",
        lr=LogTerm(0.003239, -0.0001395),
    ),
    PublishedLaw(
        name="power-scheduler",
        source="Power scheduler, arXiv 2408.13359",
        formula="lr = batch a D^b, b = -0.51",
        N_definition="not in the law: muP",
        measured="muP, warmup-stable-decay, small models",
        confidence="the exponents are certain to about 0.01; "
        "sources give a as 4 to 4.6 in sequences per batch: left out",
        exponents={"lr": {"N": 0.0, "D": -0.51, "batch_tokens": 1.0}},
    ),
    PublishedLaw(
        name="horizon",
        source="Scaling optimal learning rate across token horizons, arXiv 2409.19913",
        formula="lr = lr(D1) (D / D1)^-0.32 at a fixed batch",
        N_definition="not in the law; also under muP",
        measured="a fixed batch: with a batch that grows, the learning rate falls more slowly",
        confidence="the exponent is from a summary of the paper",
        exponents={"lr": {"D": -0.32, "batch_tokens": 0.0}},
    ),
    PublishedLaw(
        name="critical-batch",
        source="How does critical batch size scale in pre-training, arXiv 2410.21676",
        formula="critical batch in D^0.47, hardly in N",
        N_definition="85e6 to 1.2e9 parameters; whether total or not is not given here",
        measured="Adam, C4, a constant learning rate with averaged weights; "
        "the batch at which steps cost 20 % more, not the best batch",
        confidence="the exponent is given as about 0.47 in a summary; the abstract says that it hardly moves with N",
        exponents={"batch_tokens": {"N": 0.0, "D": 0.47}},
    ),
    PublishedLaw(
        name="power-lines",
        source="Power lines, arXiv 2505.13738",
        formula="best batch in D^0.383, not in N",
        N_definition="not in the law",
        measured="muP, AdamW with a tuned weight decay, linear decay to zero",
        confidence="the exponent is used by public code that cites the paper; the abstract says that N has no effect",
        exponents={"batch_tokens": {"N": 0.0, "D": 0.383}},
    ),
)


def list_published_laws() -> tuple[str, ...]:
    """Return the names of the published laws."""
    return tuple(law.name for law in PUBLISHED_LAWS)


def get_published_law(name: str) -> PublishedLaw:
    """Return a published law by name.

    Raises:
        ValueError: If no law has this name. The message suggests the most similar one.
    """
    for law in PUBLISHED_LAWS:
        if law.name == name:
            return law
    known = list_published_laws()
    hint = did_you_mean(name, known, cutoff=0.3)
    raise ValueError(f"no published law named {name!r}: {hint}{' ' if hint else ''}known are {', '.join(known)}")
