"""Published laws of learning rate and batch size, by name, to be shown beside a fit. None of them is a default.

`published("step-law")(N, D)` gives (lr, batch_tokens), None in the place of what a law does not say. Where a paper states
only how an optimum moves, its constant being its authors' own setting's, the answer is (None, None) and `exponents` says
how. N, D: parameters that multiply tokens, tokens; every law says how its own N differs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from scaling.common.arrays import Array


@dataclass(frozen=True)
class Term:
    """coef N^N D^D"""

    coef: float
    N: float
    D: float

    def __call__(self, size: Array, tokens: Array) -> Array:
        return np.asarray(self.coef * size**self.N * tokens**self.D)


@dataclass(frozen=True)
class LogTerm:
    """at_one + slope ln N, nil where that is negative"""

    at_one: float
    slope: float

    def __call__(self, size: Array, tokens: Array) -> Array:
        return np.asarray(np.maximum(self.at_one + self.slope * np.log(size), 0.0) + 0.0 * tokens)


@dataclass(frozen=True)
class Published:
    """A law of the literature: its formula, its units, where it was measured, how sure the numbers are."""

    name: str
    source: str  # paper, arXiv id
    formula: str
    N_is: str
    measured: str  # the range and the setting it was found in
    sure: str  # how the numbers here were checked
    lr: Term | LogTerm | None = None
    batch_tokens: Term | None = None
    exponents: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: MappingProxyType({}))
    # of "lr" and "batch_tokens" in N, D, batch_tokens: also where there is no constant
    N_range: tuple[float, float] | None = None  # measured within; None where we do not know it surely
    D_range: tuple[float, float] | None = None

    def __call__(self, N: ArrayLike, D: ArrayLike) -> tuple[Array | None, Array | None]:
        """(lr, batch_tokens) at N parameters and D tokens, which broadcast; None for what the law does not say."""
        size, tokens = np.asarray(N, float), np.asarray(D, float)
        for letter, values in (("N", size), ("D", tokens)):
            if not np.all(np.isfinite(values) & (values > 0)):
                raise ValueError(f"a published law needs positive finite {letter}, got {values}")
        lr = None if self.lr is None else self.lr(size, tokens)
        return lr, None if self.batch_tokens is None else self.batch_tokens(size, tokens)

    def covers(self, N: float, D: float) -> bool | None:
        """Whether (N, D) lies where the law was measured; None where that range is not known."""
        if self.N_range is None or self.D_range is None:
            return None
        return self.N_range[0] <= N <= self.N_range[1] and self.D_range[0] <= D <= self.D_range[1]


def _of_compute(coef: float, exponent: float) -> Term:
    """coef C^exponent with C = 6 N D."""
    return Term(coef * 6.0**exponent, exponent, exponent)


LAWS = (
    Published(
        name="step-law",
        source="Step Law, arXiv 2503.04715",
        formula="lr = 1.79 N^-0.713 D^0.307, B = 0.58 D^0.571 tokens",
        N_is="non-embedding parameters",
        measured="dense, 6e7 to 1.1e9 parameters, 2e9 to 1e11 tokens, AdamW, cosine to a fixed 1e-5",
        sure="the constants agree in every place where we saw them; the lower end of N and D is from memory",
        lr=Term(1.79, -0.713, 0.307),
        batch_tokens=Term(0.58, 0.0, 0.571),
        exponents={"lr": {"N": -0.713, "D": 0.307}, "batch_tokens": {"N": 0.0, "D": 0.571}},
        N_range=(6e7, 1.1e9),
        D_range=(2e9, 1e11),
    ),
    Published(
        name="deepseek",
        source="DeepSeek LLM, arXiv 2401.02954",
        formula="lr = 0.3118 C^-0.1250, B = 0.2920 C^0.3271 tokens",
        N_is="the paper's C is M D, M its non-embedding FLOPs per token with attention; here M = 6 N, so C comes out a little small",
        measured="compute-optimal models, AdamW, a schedule in three steps; it says nothing of N and D apart",
        sure="the constants agree in two places beside the paper; the range of C it was measured over is not given here",
        lr=_of_compute(0.3118, -0.1250),
        batch_tokens=_of_compute(0.2920, 0.3271),
        exponents={"lr": {"N": -0.1250, "D": -0.1250}, "batch_tokens": {"N": 0.3271, "D": 0.3271}},
    ),
    Published(
        name="kaplan",
        source="Scaling laws for neural language models, arXiv 2001.08361, appendix D",
        formula="lr = 0.003239 - 0.0001395 ln N",
        N_is="non-embedding parameters",
        measured="up to 1.5e9 parameters, Adam, batches of half a million tokens, cosine; not about D",
        sure="from memory, not seen again; it is nil from N = 1.2e10 on and no law there. "
        "The paper's batch is a critical one, a function of the loss reached, not of N and D: left out",
        lr=LogTerm(0.003239, -0.0001395),
    ),
    Published(
        name="power-scheduler",
        source="Power scheduler, arXiv 2408.13359",
        formula="lr = batch a D^b, b = -0.51",
        N_is="not in the law: muP",
        measured="muP, warmup-stable-decay, small models",
        sure="the exponents are certain to about .01; a is 4 to 4.6 in sequences per batch in different places: left out",
        exponents={"lr": {"N": 0.0, "D": -0.51, "batch_tokens": 1.0}},
    ),
    Published(
        name="horizon",
        source="Scaling optimal learning rate across token horizons, arXiv 2409.19913",
        formula="lr = lr(D1) (D / D1)^-0.32 at a fixed batch",
        N_is="not in the law; also under muP",
        measured="a fixed batch: with a batch that grows the rate falls more slowly",
        sure="the exponent was read in a summary of the paper",
        exponents={"lr": {"D": -0.32, "batch_tokens": 0.0}},
    ),
    Published(
        name="critical-batch",
        source="How does critical batch size scale in pre-training, arXiv 2410.21676",
        formula="critical batch in D^0.47, hardly in N",
        N_is="85e6 to 1.2e9 parameters, total or not: not given here",
        measured="Adam, C4, a constant rate with averaged weights; the batch at which steps cost 20 % more, not the best batch",
        sure="the exponent is given as about .47 in a summary; that it hardly moves with N is in the abstract",
        exponents={"batch_tokens": {"N": 0.0, "D": 0.47}},
    ),
    Published(
        name="power-lines",
        source="Power lines, arXiv 2505.13738",
        formula="best batch in D^0.383, not in N",
        N_is="not in the law",
        measured="muP, AdamW with a tuned weight decay, linear to nil",
        sure="the exponent is used by public code that names the paper; that N plays no part is in the abstract",
        exponents={"batch_tokens": {"N": 0.0, "D": 0.383}},
    ),
)


def names() -> tuple[str, ...]:
    """The published laws that can be shown."""
    return tuple(law.name for law in LAWS)


def published(name: str) -> Published:
    """The law of that name; ValueError with the nearest known name otherwise."""
    for law in LAWS:
        if law.name == name:
            return law
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"no published law named {name!r}: {hint}known are {', '.join(names())}")
