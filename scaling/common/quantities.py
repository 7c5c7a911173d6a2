"""Large counts as people write them: 7B, 1.4T, 350M, 7e9."""

from __future__ import annotations

import re

SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
PLAIN_NUMBER = r"(\d+\.?\d*|\.\d+)"
# What tables write after a count. G is the prefix giga.
SCALE_NAMES = {
    **dict.fromkeys(("k", "thousand", "thousands"), SCALES["K"]),
    **dict.fromkeys(("m", "mn", "mio", "mil", "million", "millions"), SCALES["M"]),
    **dict.fromkeys(("b", "bn", "g", "bil", "billion", "billions"), SCALES["B"]),
    **dict.fromkeys(("t", "tn", "trillion", "trillions"), SCALES["T"]),
}
WRITTEN_COUNT = re.compile(
    rf"([+]?{PLAIN_NUMBER}(?:[eE][+]?\d{{1,2}})?)\s*({'|'.join(sorted(SCALE_NAMES, key=len, reverse=True))})?"
    r"\s*-?\s*(params?|parameters?|tokens?|toks?|flops?|sequences|seqs?)?\.?",
    re.IGNORECASE,
)


def read_count(text: str) -> float:
    """Parse a count such as 7B, 1.4T, 7e9 or 7000000000.

    Raises:
        ValueError: If the text is anything else. 7e9B and 7,000, for example, are ambiguous.
    """
    given = text.strip()
    short = re.fullmatch(PLAIN_NUMBER + "([kmbtKMBT])", given)
    if short:
        value = float(short[1]) * SCALES[short[2].upper()]
    elif re.fullmatch(PLAIN_NUMBER + r"([eE][+]?\d{1,2})?", given):
        value = float(given)
    else:
        value = 0.0
    if value <= 0:
        raise ValueError(f"needed a positive count such as 7B, 1.4T, 350M or 7e9, got {text!r}")
    return value


def split_count(text: str) -> tuple[float, float] | None:
    """Split a count as tables write it into a number and a scale, such as "0.41M", "7 billion" or "300B tokens".

    It takes more forms than `read_count`, because a cell of a table was not typed for this program.

    Args:
        text: One cell.

    Returns:
        (number, scale), such as (0.41, 1e6); the scale is 1 if there is none. None if the text is no such count, or
        names a scale after an exponent, which is ambiguous.
    """
    match = WRITTEN_COUNT.fullmatch(text.strip())
    if not match or (match[3] and re.search("[eE]", match[1])):
        return None
    return float(match[1]), SCALE_NAMES.get((match[3] or "").lower(), 1.0)


def format_count(value: float) -> str:
    """Format a count with three digits and a letter, such as 6.98B.

    Below a thousand there is no letter, and from 1e15 on it is a power of ten.
    """
    if not 999.5 <= value < 9.995e14:
        return f"{value:.3g}"
    letter = next(k for k, v in reversed(SCALES.items()) if value >= 0.9995 * v)
    scaled = value / SCALES[letter]
    return f"{scaled:.3g}{letter}" if scaled < 999.5 else f"{scaled:.0f}{letter}"
