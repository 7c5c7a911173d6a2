"""Large counts as people write them: 7B, 1.4T, 350M, 7e9."""

from __future__ import annotations

import re

SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
PLAIN_NUMBER = r"(\d+\.?\d*|\.\d+)"


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


def format_count(value: float) -> str:
    """Format a count with three digits and a letter, such as 6.98B.

    Below a thousand there is no letter, and from 1e15 on it is a power of ten.
    """
    if not 999.5 <= value < 9.995e14:
        return f"{value:.3g}"
    letter = next(k for k, v in reversed(SCALES.items()) if value >= 0.9995 * v)
    scaled = value / SCALES[letter]
    return f"{scaled:.3g}{letter}" if scaled < 999.5 else f"{scaled:.0f}{letter}"
