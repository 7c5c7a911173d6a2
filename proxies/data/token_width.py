"""Find out from the bytes of a file of tokens whether it is read in the width and byte order in which it was written.

Read in another width, a file gives other tokens and another number of them, and often all are below the vocabulary. It
shows in the values: if 32-bit tokens are read as 16-bit ones, every second value is the upper half of a token, nearly
always the same small number, whatever the tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# What states the type of the tokens: a header or an index, the name of the file, or nothing.
Stated = Literal["file", "name", "nothing"]

# Fewer values show nothing.
FEWEST_VALUES = 64
# The upper halves of tokens below 2^20 are at most this.
LARGEST_UPPER_HALF = 15
# What a type is called, and what to do with a file that holds it.
NAMES = {
    "u1": ("uint8 (one byte each)", ".u8.bin"),
    "<u2": ("uint16 (two bytes each)", ".u16.bin"),
    ">u2": ("big-endian uint16", ".u16be.bin"),
    "<u4": ("uint32 (four bytes each)", ".u32.bin"),
    ">u4": ("big-endian uint32", ".u32be.bin"),
    "<i8": ("int64 (eight bytes each)", ".i64.bin"),
    ">i8": ("big-endian int64", ".i64be.bin"),
}


def check_width(samples: Sequence[bytes], dtype: str, vocab: int, path: Path, *, stated: Stated) -> str | None:
    """Return why a file is not read as it was written, or None if nothing shows it.

    Args:
        samples: Bytes of the file, each sample from a multiple of eight bytes on.
        dtype: Numpy type that the tokens are read as.
        vocab: Size of the vocabulary.
        path: The file, for the message.
        stated: What states that type. What the file itself states is believed.

    Returns:
        What was needed, what was found, and what to do.
    """
    if stated == "file":
        return None
    evidence = [found for sample in samples if (found := recognize_type(sample))]
    recognized = evidence[0] if evidence and len(set(evidence)) == 1 else None
    if recognized is not None and _has_same_width(recognized, dtype):
        recognized = None
    if recognized is not None:
        return (
            f"needed tokens of {_name(dtype)}, as {'its name states' if stated == 'name' else 'a plain .bin holds'}, "
            f"got {path}, whose {_explain(recognized)}: {_remedy(recognized, path)}"
            + (", or save the tokens with numpy.save as .npy, which states their type" if recognized in NAMES else "")
        )
    if vocab > 1 << 16 and stated == "nothing":
        return (
            f"needed tokens of a vocabulary of {vocab:,}, got a plain .bin, which holds uint16 tokens up to 65,535, "
            f"{path}: if it holds uint32, name it {_rename(path, '.u32.bin')}; if it holds uint16, set vocab to at "
            f"most 65,536, or name it {_rename(path, '.u16.bin')}"
        )
    return None


def explain_out_of_range(
    token: int, samples: Sequence[bytes], dtype: str, vocab: int, path: Path, *, stated: Stated
) -> str:
    """Return the message for a token that the vocabulary does not have, with the type in which all would fit.

    Args:
        token: The token, negative or at least `vocab`.
        samples: Bytes of the file.
        dtype: Numpy type that the tokens are read as.
        vocab: Size of the vocabulary.
        path: The file.
        stated: What states that type.
    """
    kind = np.dtype(dtype)
    needed = f"needed tokens below vocab = {vocab}, got {token} in {path}"
    for other in NAMES if stated != "file" else ():
        # Any file of larger tokens can be read as bytes.
        if other != "u1" and not _has_same_width(other, dtype) and all(_fits(s, other, vocab) for s in samples):
            return f"{needed}; read as {_name(other)}, all are below it: {_remedy(other, path)}"
    mark = token if token < 0 else token - (1 << 8 * kind.itemsize)
    if mark in (-1, -100):
        return (
            f"needed tokens below vocab = {vocab}, got {mark} in {path}, which marks padding or ignored labels: "
            "remove those values"
        )
    return f"{needed}: " + ("save tokens that are not negative" if token < 0 else "raise vocab")


def recognize_type(sample: bytes) -> str | None:
    """Return the type that the bytes of a file of tokens show, or None if they show none.

    Args:
        sample: Bytes from a multiple of eight bytes on.

    Returns:
        A key of NAMES, "text", "<f4" or "<f8".
    """
    sample = sample[: len(sample) // 8 * 8]
    if len(sample) < 2 * FEWEST_VALUES:
        return None
    if _is_text(sample):
        return "text"
    for dtype in ("<f4", "<f8"):
        with np.errstate(invalid="ignore"):
            numbers = np.frombuffer(sample, dtype)
            is_token = (numbers >= 0) & (numbers < 1 << 24) & (numbers == np.floor(numbers))
            if is_token.mean() > 0.99 and (numbers >= 1).mean() > 0.5:
                return dtype
    halves = np.frombuffer(sample, "<u2").reshape(-1, 4)
    for order, quarters in (("<", halves), (">", halves.byteswap()[:, ::-1])):
        # Column 0 is the lowest quarter of eight bytes.
        if _are_upper_halves(quarters[:, 1:], quarters[:, 0]):
            return f"{order}i8"
        if _are_upper_halves(quarters[:, 1::2], quarters[:, ::2]):
            return f"{order}u4"
    first, second = np.frombuffer(sample, "u1").reshape(-1, 2).T
    counts = [np.bincount(column, minlength=256) for column in (first, second)]
    entropies = [_compute_entropy(column) for column in counts]
    # The upper bytes of tokens vary less than the lower ones, and the lower ones take all values if the upper ones do
    # vary.
    varies_more = entropies[1] > entropies[0] + 1 or (entropies[0] == 0 and entropies[1] > 0.5)
    reaches_higher = len(first) > 5000 and min(entropies) > 4 and first.max() < second.max()
    if varies_more or reaches_higher:
        return ">u2"
    different = int(np.count_nonzero(counts[0] + counts[1]))
    distance = float(np.abs(counts[0] - counts[1]).sum()) / (2 * len(first))
    noise = 0.02 + 0.6 * (different / len(first)) ** 0.5
    # Both bytes of a pair are alike: each is a token by itself. Those of random 16-bit numbers are alike, too.
    if different > 1 and max(entropies) < 7 and noise < 0.25 and distance < noise:
        return "u1"
    return None


def _are_upper_halves(upper: NDArray[Any], lower: NDArray[Any]) -> bool:
    """Return whether 16-bit values are the upper parts of tokens whose lowest 16 bits are `lower`."""
    # -1 and -100, which mark padding, have only ones there.
    if np.mean((upper <= LARGEST_UPPER_HALF) | (upper == 0xFFFF)) < 0.999:
        return False
    # Tokens beyond 2^16 belong to a large vocabulary. Small tokens that alternate are something else.
    if np.any((upper > 0) & (upper < 0xFFFF)) and lower.max() < 4096:
        return False
    entropy = max(_compute_entropy(np.bincount(column)) for column in np.atleast_2d(upper.T))
    return _compute_entropy(np.bincount(lower.ravel())) > max(2 * entropy, 0.5)


def _compute_entropy(counts: NDArray[Any]) -> float:
    """Return the entropy of a histogram, in bits."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _is_text(sample: bytes) -> bool:
    is_plain = np.zeros(256, bool)
    is_plain[[9, 10, 13, *range(32, 127)]] = True
    values = np.frombuffer(sample, "u1")
    if is_plain[values].mean() > 0.999:
        return True
    # A sample may begin and end within a character.
    text = sample.decode("utf-8", "replace")
    return text.count("\ufffd") <= 8 and bool((is_plain[values] | (values >= 0x80)).mean() > 0.999)


def _has_same_width(recognized: str, dtype: str) -> bool:
    if recognized not in NAMES:
        # The tokens of a file of bytes may be those of text.
        return recognized == "text" and np.dtype(dtype).itemsize == 1
    a, b = np.dtype(recognized), np.dtype(dtype)
    return a.itemsize == b.itemsize and (a.itemsize == 1 or (recognized[0] == ">") == (dtype[0] == ">"))


def _fits(sample: bytes, dtype: str, vocab: int) -> bool:
    values = np.frombuffer(sample[: len(sample) // 8 * 8], dtype)
    return len(values) >= FEWEST_VALUES // 4 and int(values.max()) < vocab and int(values.min()) >= 0


def _name(dtype: str) -> str:
    return next((name for other, (name, _) in NAMES.items() if _has_same_width(other, dtype)), dtype)


def _explain(recognized: str) -> str:
    width = 8 if recognized.endswith("8") else 4 if recognized.endswith("4") else 1
    if recognized == "text":
        return "bytes are text"
    if recognized in ("<f4", "<f8"):
        return f"bytes are numbers of type {np.dtype(recognized).name}"
    if recognized == "u1":
        return f"bytes look like {_name(recognized)}: both bytes of a pair have the same frequencies"
    if recognized == ">u2":
        return f"values look like {_name(recognized)}: the lower byte of each varies less than the upper one"
    others = "every second one hardly varies" if width == 4 else "three of every four hardly vary"
    return f"values look like {_name(recognized)}: {others}"


def _remedy(recognized: str, path: Path) -> str:
    if recognized == "text":
        return "name text .txt, or tokens of one byte .u8.bin"
    if recognized not in NAMES:
        kind = np.dtype(recognized).name
        return (
            f"convert it with numpy.save('{path.stem}.npy', numpy.fromfile('{path.name}', '{kind}').astype('uint32'))"
        )
    return f"name it {_rename(path, NAMES[recognized][1])}"


def _rename(path: Path, suffix: str) -> str:
    """Return the name that states another type, such as tokens.u32.bin for tokens.bin."""
    stem = path.name.removesuffix(".bin")
    for stated in ("u8", "u16", "u16be", "u32", "u32be", "i64", "i64be", "uint16", "uint32", "int64"):
        stem = stem.removesuffix(f".{stated}")
    return stem + suffix
