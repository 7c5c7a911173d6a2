"""Tokenizers: the bytes of the text, byte-pair encoding trained on the training part, or a given tokenizer.json.

Byte-pair encoding (Sennrich et al., arXiv 1508.07909) works on bytes, so it can encode every text and decodes to the
same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxies.data.sources import Source, import_optional, is_utf8
from proxies.data.token_files import Tokens, cache_text, compute_key

BYTE_VOCAB = 256
# Bytes of training text that byte-pair encoding is trained on, approximately; see `train_bpe`.
SAMPLE_BYTES = 1 << 25
TOKENIZER_NAMES = "'bytes', 'bpe', or a tokenizer.json file"


@dataclass(frozen=True)
class Encoder:
    """Encode texts as arrays of tokens.

    Attributes:
        id: "bytes", or the sha256 of the tokenizer.json.
        dtype: Numpy type of the tokens.
        encode: Returns one array of tokens per text.
    """

    id: str
    dtype: str
    encode: Callable[[list[bytes]], list[Tokens]]


def check_tokenizer(tokenizer: str, vocab: int) -> list[str]:
    """List the reasons why a tokenizer cannot encode text.

    Args:
        tokenizer: "bytes", "bpe", or the path of a tokenizer.json.
        vocab: Size of the vocabulary.

    Returns:
        One message per problem; empty if none is found.
    """
    if tokenizer == "bytes":
        if vocab < BYTE_VOCAB:
            return [
                f"text is read as bytes and needs vocab >= {BYTE_VOCAB}, got {vocab}: raise vocab or give a .bin file"
            ]
        return []
    if tokenizer == "bpe" and vocab <= BYTE_VOCAB:
        return [
            f"tokenizer 'bpe' begins with {BYTE_VOCAB} bytes and needs vocab > {BYTE_VOCAB}, got {vocab}: "
            "raise vocab, or use 'bytes'"
        ]
    path = Path(tokenizer).expanduser()
    if tokenizer != "bpe" and not (path.suffix == ".json" and path.is_file()):
        return [f"needed the tokenizer {TOKENIZER_NAMES}, got {tokenizer!r}"]
    try:
        import_optional("tokenizers", f"tokenizer {tokenizer!r}")
        if tokenizer != "bpe":
            _parse_tokenizer(path.read_text(), vocab, str(path))
    except ValueError as error:
        return [str(error)]
    return []


def make_encoder(tokenizer: str, vocab: int, sources: Sequence[tuple[Source, str]]) -> Encoder:
    """Return an encoder. "bpe" is trained once for the same text, vocabulary and library.

    Args:
        tokenizer: "bytes", "bpe", or the path of a tokenizer.json.
        vocab: Size of the vocabulary.
        sources: The texts to train "bpe" on, each with its sha256.

    Returns:
        The encoder.

    Raises:
        ValueError: If the package tokenizers is missing, or the file is not a tokenizer of at most `vocab` tokens.
    """
    if tokenizer == "bytes":
        return Encoder("bytes", "u1", lambda texts: [np.frombuffer(text, np.uint8) for text in texts])
    library = import_optional("tokenizers", f"tokenizer {tokenizer!r}")
    if tokenizer == "bpe":
        ordered = sorted(sources, key=lambda source: source[1])
        key = compute_key("bpe", vocab, SAMPLE_BYTES, library.__version__, [digest for _, digest in ordered])
        text = cache_text(key, ".tokenizer.json", lambda: train_bpe([source for source, _ in ordered], vocab))
    else:
        text = Path(tokenizer).expanduser().read_text()
    parsed = _parse_tokenizer(text, vocab, tokenizer)

    def encode(texts: list[bytes]) -> list[Tokens]:
        decoded = [t.decode("utf-8") for t in texts]
        return [np.asarray(e.ids, dtype) for e in parsed.encode_batch_fast(decoded, add_special_tokens=False)]

    dtype = "<u2" if vocab <= 1 << 16 else "<u4"
    return Encoder(hashlib.sha256(text.encode()).hexdigest(), dtype, encode)


def train_bpe(sources: list[Source], vocab: int) -> str:
    """Train byte-level byte-pair encoding.

    Only the training part is used: all of a small source, and every k-th piece of one larger than its equal share of
    SAMPLE_BYTES. The same text gives the same file, whatever the number of threads.

    Args:
        sources: The texts to train on.
        vocab: Maximum number of tokens.

    Returns:
        The content of tokenizer.json.
    """
    library = import_optional("tokenizers", "tokenizer 'bpe'")
    byte_level = library.pre_tokenizers.ByteLevel
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(byte_level.alphabet()), special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(_sample_text(sources), trainer)
    return str(tokenizer.to_str())


def _sample_text(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        stride = max(1, round(source.size * len(sources) / SAMPLE_BYTES))
        # Text that is not UTF-8 (a few of the standard library's tests) has no tokens but its bytes.
        texts = (piece.text for piece in source.pieces() if piece.split == "train" and is_utf8(piece.text))
        yield from (text.decode() for i, text in enumerate(texts) if i % stride == 0)


def _parse_tokenizer(text: str, vocab: int, name: str) -> Any:
    library = import_optional("tokenizers", f"tokenizer {name!r}")
    try:
        tokenizer = library.Tokenizer.from_str(text)
    except Exception as error:
        # The library raises nothing narrower.
        raise ValueError(f"needed a tokenizer.json, got {name}: {error}") from error
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= highest < vocab:
        raise ValueError(
            f"needed a tokenizer of at most vocab = {vocab} tokens, got {highest + 1} in {name}: raise vocab"
        )
    return tokenizer
