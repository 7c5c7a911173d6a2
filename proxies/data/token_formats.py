"""Files of tokens made elsewhere: how their tokens are stored, by header, by name, or by the index beside them.

| file                                        | tokens                                                             |
|---------------------------------------------|--------------------------------------------------------------------|
| plain .bin (nanoGPT, numpy's tofile)        | little-endian uint16                                               |
| .u8.bin, .u16.bin, .u32.bin, .i64.bin, ...  | as the name says, little-endian; .u16be.bin and so on: big-endian  |
| .bin with the header of llm.c               | as the header says: uint16 or uint32                               |
| .bin with an .idx beside it (Megatron)      | as the index says                                                  |
| .npy                                        | as its header says: whole numbers, one or two axes                 |

A plain .bin says nothing of its width, so its bytes are examined (see `proxies.data.token_width`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proxies.data.token_files import Tokens
from proxies.data.token_width import Stated, check_width, explain_out_of_range

TOKEN_SUFFIXES = (".bin", ".npy")
# Magic number to version and numpy type (llm.c and modded-nanogpt: tokens of GPT-2; llm.c: tokens of Llama 3).
HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
HEADER_BYTES = 1024
# A name that states the width, such as tokens.u32.bin.
STATED_TYPE = re.compile(r"\.(u|uint|i|int)(8|16|32|64)(le|be)?\.bin$")
# First bytes of the index of Megatron and NeMo, and its codes of numpy types.
INDEX_MAGIC = b"MMIDIDX\0\0"
INDEX_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
NUMPY_MAGIC = b"\x93NUMPY"
# First bytes of files that hold no plain tokens: what they are, and what to do with them. Two bytes would be too few:
# they could be the first token.
OTHER_FORMATS: Mapping[bytes, tuple[str, str]] = {
    b"\x1f\x8b\x08\x00": ("compressed with gzip", "unpack it with gunzip"),
    b"\x1f\x8b\x08\x08": ("compressed with gzip", "unpack it with gunzip"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it with unzstd"),
    b"\xfd7zXZ\0": ("compressed with xz", "unpack it with unxz"),
    b"BZh9": ("compressed with bzip2", "unpack it with bunzip2"),
    b"PK\x03\x04": ("a zip archive, as torch.save and numpy.savez write", "save its array of tokens with numpy.save"),
    b"\x80\x02\x8a": ("a pickle, as torch.save wrote", "save its array of tokens with numpy.save"),
    b"\x80\x03c": ("a pickle", "save its array of tokens with numpy.save"),
    b"\x80\x04\x95": ("a pickle", "save its array of tokens with numpy.save"),
    b"\x80\x05\x95": ("a pickle", "save its array of tokens with numpy.save"),
    b"\x89HDF": ("HDF5", "save its array of tokens with numpy.save"),
    b"PAR1": ("parquet", "name it .parquet"),
    b"ARROW1": ("Arrow", "save its array of tokens with numpy.save"),
    INDEX_MAGIC: ("the index of a Megatron data set", "name the .bin beside it"),
    b"TNTIDX\0\0": ("the index of a fairseq data set", "save the tokens of its .bin with numpy.save"),
}
# Tokens read in each of the places that a check samples, and bytes that show their width.
SCAN_TOKENS = 1 << 20
SAMPLE_BYTES = 1 << 18


class TokenLayout(NamedTuple):
    """How the tokens of a file are stored.

    Attributes:
        dtype: Numpy type.
        offset: Byte of the first token.
        length: Number of tokens.
        stated: What states the type: the file itself by a header or an index, its name, or nothing, so that it is
            assumed to be uint16.
    """

    dtype: str
    offset: int
    length: int
    stated: Stated


def read_layout(path: Path) -> TokenLayout:
    """Return how the tokens of a file are stored.

    Args:
        path: A file that ends in .bin or .npy.

    Returns:
        The layout.

    Raises:
        ValueError: If the file is something else, or its size does not fit its header, its index or its width.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        beginning = stream.read(HEADER_BYTES)
    if beginning.startswith(NUMPY_MAGIC):
        return _read_numpy_layout(path)
    if problem := explain_format(path):
        raise ValueError(f"needed plain tokens, got {problem}")
    if path.suffix == ".npy" and size:
        raise ValueError(f"needed an array that numpy.save wrote, got other bytes in {path}: name plain tokens .bin")
    index = path.with_suffix(".idx")
    if index.is_file():
        return _read_index_layout(path, index)
    header = [int(value) for value in np.frombuffer(beginning[:12], "<i4")] if len(beginning) >= 12 else []
    if header and header[0] in HEADERS:
        return _read_header_layout(path, size, header)
    if len(beginning) == HEADER_BYTES < size and any(beginning[:32]) and not any(beginning[32:]):
        raise ValueError(
            f"needed plain tokens or the header of llm.c, got {path}, which begins with another header of "
            f"{HEADER_BYTES:,} bytes, {header}: write its tokens with numpy.save as .npy"
        )
    stated = STATED_TYPE.search(path.name)
    dtype = _parse_stated_type(stated) if stated else "<u2"
    width = np.dtype(dtype).itemsize
    if size % width:
        raise ValueError(
            f"needed {format_type(dtype)} tokens, {_count_bytes(width)} each, got {size:,} bytes in {path}, which is "
            f"no multiple of {width}: the file is cut off, has a header of its own, or has another width; "
            "write it with numpy.save as .npy, which states its width"
        )
    return TokenLayout(dtype, 0, size // width, "name" if stated else "nothing")


def explain_format(path: Path) -> str | None:
    """Return what a file is that holds neither plain tokens nor text, and what to do with it, by its first bytes."""
    with path.open("rb") as stream:
        beginning = stream.read(16)
    for magic, (what, remedy) in OTHER_FORMATS.items():
        if beginning.startswith(magic):
            return f"a file that is {what}, {path}: {remedy}"
    return None


def open_tokens(path: Path) -> Tokens:
    """Return the tokens of a file, memory-mapped.

    Raises:
        ValueError: If the file is empty, or `read_layout` refuses it.
    """
    layout = read_layout(path)
    if not layout.length:
        raise ValueError(f"needed tokens, got an empty file {path}")
    return np.memmap(path, dtype=layout.dtype, mode="r", offset=layout.offset, shape=(layout.length,))


def check_tokens(path: Path, vocab: int, *, whole: bool) -> list[str]:
    """List the reasons why a file cannot hold tokens below `vocab`, or is not read as it was written.

    Args:
        path: The file.
        vocab: Size of the vocabulary.
        whole: Check all tokens, instead of three samples.

    Returns:
        One message per problem; empty if none is found.
    """
    try:
        layout, tokens = read_layout(path), open_tokens(path)
    except ValueError as error:
        return [str(error)]
    n = len(tokens)
    starts = range(0, n, SCAN_TOKENS) if whole else sorted({0, n // 2, max(n - SCAN_TOKENS, 0)})
    # Width and byte order show in any sample that begins with a whole token of eight bytes.
    offsets = sorted({0, n * tokens.itemsize // 16 * 8})
    samples = [bytes(tokens.view("u1")[offset : offset + SAMPLE_BYTES]) for offset in offsets]
    problem = check_width(samples, layout.dtype, vocab, path, stated=layout.stated)
    if problem is not None:
        return [problem]
    is_signed = tokens.dtype.kind == "i"
    for start in starts:
        part = tokens[start : start + SCAN_TOKENS]
        highest = int(part.max())
        if highest >= vocab:
            return [explain_out_of_range(highest, samples, layout.dtype, vocab, path, stated=layout.stated)]
        if is_signed and (lowest := int(part.min())) < 0:
            return [explain_out_of_range(lowest, samples, layout.dtype, vocab, path, stated=layout.stated)]
    return []


def format_type(dtype: str) -> str:
    """Return the name of a numpy type for a message, such as "uint16" or "big-endian uint16"."""
    kind = np.dtype(dtype)
    return f"{'big-endian ' if dtype[0] == '>' else ''}{kind.name}"


def _parse_stated_type(stated: re.Match[str]) -> str:
    order = ">" if stated[3] == "be" else "<"
    return f"{order}{stated[1][0]}{int(stated[2]) // 8}"


def _count_bytes(width: int) -> str:
    return {1: "one byte", 2: "two bytes", 4: "four bytes", 8: "eight bytes"}[width]


def _read_header_layout(path: Path, size: int, header: list[int]) -> TokenLayout:
    magic, version, count = header[:3]
    known, dtype = HEADERS[magic]
    if version != known:
        raise ValueError(
            f"needed version {known} of the header that begins with {magic} (llm.c), got version {version} in {path}: "
            "write its tokens with numpy.save as .npy"
        )
    if size != HEADER_BYTES + count * np.dtype(dtype).itemsize:
        raise ValueError(
            f"needed the {count:,} tokens that the header of {path} promises, got {size:,} bytes: copy it again"
        )
    return TokenLayout(dtype, HEADER_BYTES, count, "file")


def _read_index_layout(path: Path, index: Path) -> TokenLayout:
    """Return the layout that a Megatron index states: magic, version, type, sequences, documents, lengths, ..."""
    with index.open("rb") as stream:
        head = stream.read(34)
        if not head.startswith(INDEX_MAGIC) or len(head) < 34:
            raise ValueError(
                f"needed the index of a Megatron data set beside {path}, got something else in {index}: if the tokens "
                "are plain, move the .idx elsewhere"
            )
        version, code, sequences, _ = struct.unpack("<QBQQ", head[9:])
        if version != 1 or code not in INDEX_TYPES:
            raise ValueError(f"needed a Megatron index of version 1, got version {version}, type {code}, in {index}")
        lengths = np.fromfile(stream, "<i4", count=sequences)
    dtype = INDEX_TYPES[code]
    count, size = int(lengths.sum(dtype=np.int64)), path.stat().st_size
    if np.dtype(dtype).kind == "f":
        raise ValueError(f"needed tokens as whole numbers, got {np.dtype(dtype).name} in {path}: convert them")
    if len(lengths) != sequences or size != count * np.dtype(dtype).itemsize:
        raise ValueError(
            f"needed the {count:,} tokens of {np.dtype(dtype).name} that {index} promises, got {size:,} bytes in "
            f"{path}: copy both again"
        )
    return TokenLayout(dtype, 0, count, "file")


def _read_numpy_layout(path: Path) -> TokenLayout:
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"needed an array of tokens, got {path} ({error}): save it again with numpy.save") from error
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"needed tokens as whole numbers, got {array.dtype.name} in {path}: save array.astype(numpy.uint32)"
        )
    if array.ndim > 2 or array.ndim == 0 or not array.flags.c_contiguous:
        raise ValueError(
            f"needed one axis of tokens, or rows of them, got shape {array.shape} in {path}: save array.ravel()"
        )
    return TokenLayout(array.dtype.str, array.offset, array.size, "file")
