"""Compare a recommendation with published laws of learning rate and batch."""

from __future__ import annotations

from typing import TypedDict

from scaling.advice.flags import CONVENTIONS
from scaling.common.quantities import format_count
from scaling.laws.published import PublishedLaw


class PublishedComparison(TypedDict):
    """What a published law gives at the target.

    Attributes:
        name: The name of the law.
        source: The paper.
        lr: Learning rate; None if the law gives none.
        batch_tokens: Tokens per optimizer step; None if the law gives none.
        exponents: The exponents of "lr" and "batch_tokens", by symbol.
        warnings: Why the numbers may not apply.
    """

    name: str
    source: str
    lr: float | None
    batch_tokens: float | None
    exponents: dict[str, dict[str, float]]
    warnings: list[str]


def compare_published_law(law: PublishedLaw, N: float, D: float, convention: str) -> PublishedComparison:
    """Evaluate a published law at (N, D).

    Args:
        law: The law.
        N: Parameters that multiply tokens.
        D: Training tokens.
        convention: How this N was counted, a key of `scaling.advice.flags.CONVENTIONS`.

    Returns:
        What the law gives, with the warnings that belong to it.
    """
    lr, batch = law(N, D)
    warnings = []
    is_covered = law.covers(N, D)
    if is_covered is False:
        warnings.append("outside the range it was measured in")
    elif is_covered is None and (lr is not None or batch is not None):
        warnings.append("the range it was measured in is not known here")
    if law.N_definition.startswith("non-embedding") and convention != "nonembedding":
        yours = CONVENTIONS[convention].split(":")[0].split(";")[0]
        warnings.append(f"its N is {law.N_definition}; yours: {yours}")
    elif not law.N_definition.startswith(("non-embedding", "not in the law")):
        warnings.append(law.N_definition)
    return {
        "name": law.name,
        "source": law.source,
        "lr": None if lr is None else float(lr),
        "batch_tokens": None if batch is None else float(batch),
        "exponents": {k: dict(v) for k, v in law.exponents.items()},
        "warnings": warnings,
    }


def format_comparison(comparison: PublishedComparison, lr: float | None, batch_tokens: float | None) -> str:
    """Return what a published law gives as text, relative to the recommended lr and batch if there are any."""
    parts = []
    if comparison["lr"] is not None:
        ratio = "" if lr is None else f" ({comparison['lr'] / lr:.2g} x recommended)"
        parts.append(f"lr {comparison['lr']:.3g}{ratio}")
    if comparison["batch_tokens"] is not None:
        ratio = "" if batch_tokens is None else f" ({comparison['batch_tokens'] / batch_tokens:.2g} x recommended)"
        parts.append(f"batch {format_count(comparison['batch_tokens'])}{ratio}")
    if not parts:
        symbols = {"batch_tokens": "B"}
        for setting, exponents in comparison["exponents"].items():
            power = " ".join(f"{symbols.get(x, x)}^{e:g}" for x, e in exponents.items() if e)
            parts.append(f"{'lr' if setting == 'lr' else 'B'} ~ {power}")
        parts[-1] += " (trend only)"
    text = "; ".join([", ".join(parts), *comparison["warnings"]])
    return f"  {comparison['name']:16}{text}. {comparison['source']}"
