"""Text to tokens: its bytes, byte-pair encoding trained here on the training part, or a ready tokenizer.json.

Byte-pair encoding (Sennrich et al., 1508.07909) on bytes: every text can be written, and comes back byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxies.data.sources import Source, need
from proxies.data.token_files import Tokens, kept_file, key_of

BYTES = 256
SAMPLE = 1 << 25  # bytes of training text that byte-pair encoding is trained on, about; see `trained`
NAMES = "'bytes', 'bpe', or a tokenizer.json file"


@dataclass(frozen=True)
class Encoder:
    """Texts to arrays of tokens."""

    id: str  # "bytes", or the sha256 of its tokenizer.json
    dtype: str
    encode: Callable[[list[bytes]], list[Tokens]]


def check_tokenizer(tokenizer: str, vocab: int) -> list[str]:
    """Why text cannot be read by this tokenizer, in words."""
    if tokenizer == "bytes":
        if vocab < BYTES:
            return [f"text is read as bytes and needs vocab >= {BYTES}, got {vocab}: raise vocab or give a .bin file"]
        return []
    if tokenizer == "bpe" and vocab <= BYTES:
        return [
            f"tokenizer 'bpe' begins with {BYTES} bytes and needs vocab > {BYTES}, got {vocab}: raise vocab, or use 'bytes'"
        ]
    path = Path(tokenizer).expanduser()
    if tokenizer != "bpe" and not (path.suffix == ".json" and path.is_file()):
        return [f"needed the tokenizer {NAMES}, got {tokenizer!r}"]
    try:
        need("tokenizers", f"tokenizer {tokenizer!r}")
        if tokenizer != "bpe":
            _opened(path.read_text(), vocab, str(path))
    except ValueError as error:
        return [str(error)]
    return []


def make_encoder(tokenizer: str, vocab: int, sources: Sequence[tuple[Source, str]]) -> Encoder:
    """The encoder of that name; "bpe" is trained on the sources (with the sha256 of each), once for the same text."""
    if tokenizer == "bytes":
        return Encoder("bytes", "u1", lambda texts: [np.frombuffer(t, np.uint8) for t in texts])
    library = need("tokenizers", f"tokenizer {tokenizer!r}")
    if tokenizer == "bpe":
        ordered = sorted(sources, key=lambda source: source[1])
        key = key_of("bpe", vocab, SAMPLE, library.__version__, [digest for _, digest in ordered])
        text = kept_file(key, ".tokenizer.json", lambda: trained([source for source, _ in ordered], vocab))
    else:
        text = Path(tokenizer).expanduser().read_text()
    opened = _opened(text, vocab, tokenizer)

    def encode(texts: list[bytes]) -> list[Tokens]:
        decoded = [t.decode("utf-8") for t in texts]
        return [np.asarray(e.ids, dtype) for e in opened.encode_batch_fast(decoded, add_special_tokens=False)]

    dtype = "<u2" if vocab <= 1 << 16 else "<u4"
    return Encoder(hashlib.sha256(text.encode()).hexdigest(), dtype, encode)


def trained(sources: list[Source], vocab: int) -> str:
    """tokenizer.json of byte-level byte-pair encoding with at most `vocab` tokens.

    Trained on training pieces only: all of a small source; every k-th of one larger than its equal share of SAMPLE bytes.
    The same text gives the same file, whatever the number of threads.
    """
    library = need("tokenizers", "tokenizer 'bpe'")
    level = library.pre_tokenizers.ByteLevel
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = level(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(level.alphabet()), special_tokens=[], show_progress=False
    )
    made.train_from_iterator(_sample(sources), trainer)
    return str(made.to_str())


def _sample(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        every = max(1, round(source.size * len(sources) / SAMPLE))
        training = (piece.text for piece in source.pieces() if piece.split == "train" and decodes(piece.text))
        yield from (text.decode() for i, text in enumerate(training) if i % every == 0)


def decodes(text: bytes) -> bool:
    """Is it utf-8? What is not (a few of the standard library's tests) has no tokens but its bytes."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _opened(text: str, vocab: int, name: str) -> Any:
    library = need("tokenizers", f"tokenizer {name!r}")
    try:
        opened = library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"needed a tokenizer.json, got {name}: {error}") from error
    highest = max(opened.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= highest < vocab:
        raise ValueError(
            f"needed a tokenizer of at most vocab = {vocab} tokens, got {highest + 1} in {name}: raise vocab"
        )
    return opened
