"""Tokenizers: the bytes of the text, byte-pair encoding trained on the training part, or a given tokenizer.json.

Byte-pair encoding (Sennrich et al., arXiv 1508.07909) works on bytes, so it can encode every text and decodes to the
same bytes.

A tokenizer.json may hold settings for batches of another model: truncation, padding, dropout. They would change the
number of tokens and are switched off. What else loses text (a normalizer that removes characters, a vocabulary that
lacks them) is found on a sample of the text.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proxies.data.sources import Source, import_optional, is_utf8
from proxies.data.token_files import Tokens, cache_text, compute_key

logger = logging.getLogger("muscale.proxies")

BYTE_VOCAB = 256
# Bytes of training text that byte-pair encoding is trained on, approximately; see `train_bpe`.
SAMPLE_BYTES = 1 << 25
TOKENIZER_NAMES = "'bytes', 'bpe', or a tokenizer.json file"
# Bytes of text on which a tokenizer.json is tried, approximately.
TRIED_BYTES = 1 << 18
# Bytes of text per token that a tokenizer.json may have.
FEWEST_BYTES_PER_TOKEN, MOST_BYTES_PER_TOKEN = 0.5, 20.0
# Share of the characters, white space aside, that a tokenizer.json may lose, and that is reported.
MOST_LOST, REPORTED_LOSS = 0.1, 0.001


@dataclass(frozen=True)
class Encoder:
    """Encode texts as arrays of tokens.

    Attributes:
        id: "bytes", or the sha256 of the tokenizer.json and of what is switched off in it.
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
        return [f"needed the tokenizer {TOKENIZER_NAMES}, got {tokenizer!r}{_suggest_file(tokenizer, path)}"]
    try:
        import_optional("tokenizers", f"tokenizer {tokenizer!r}")
        if tokenizer != "bpe":
            _parse_tokenizer(_read_file(path), vocab, str(path))
    except ValueError as error:
        return [str(error)]
    return []


class EncodingCheck(NamedTuple):
    """What became of a sample of text.

    Attributes:
        bytes_per_token: Bytes of text per token.
        lost: Share of the characters that have no token, or an unknown one; white space aside.
        examples: Up to five of those characters.
        keeps_space: Whether white space has tokens.
    """

    bytes_per_token: float
    lost: float
    examples: str
    keeps_space: bool


def check_encoding(tokenizer: str, vocab: int, source: Source) -> tuple[list[str], list[str]]:
    """Try a tokenizer.json on a sample of the text.

    Args:
        tokenizer: The path of a tokenizer.json, which `check_tokenizer` accepts.
        vocab: Size of the vocabulary.
        source: The text.

    Returns:
        Problems, because of which it cannot be used, and remarks on what the user should know.
    """
    parsed, _ = _parse_tokenizer(_read_file(Path(tokenizer).expanduser()), vocab, tokenizer)
    sample: list[str] = []
    size = 0
    for piece in source.pieces():
        if piece.split == "train" and is_utf8(piece.text):
            sample.append(piece.text[: TRIED_BYTES - size].decode("utf-8", "ignore"))
            size += len(piece.text)
        if size >= TRIED_BYTES:
            break
    if not any(text.strip() for text in sample):
        return [], []
    try:
        check = measure_encoding(parsed, sample)
    # The library raises nothing narrower.
    except Exception as error:
        return [f"the tokenizer {tokenizer} cannot encode the text ({error}): needed one for such text"], []
    percent = 100 * check.lost
    share = f"{percent:{'.0f' if percent >= 10 else '.2g'}} % of the characters, such as {' '.join(check.examples)}"
    if check.lost > MOST_LOST:
        return [
            f"needed a tokenizer that keeps the text, got {tokenizer}, which has no token for {share}: use one that "
            "was made for such text, or remove the normalizer from the file"
        ], []
    if problem := explain_ratio(tokenizer, check.bytes_per_token):
        return [problem], []
    remarks = []
    if check.lost > REPORTED_LOSS:
        remarks.append(f"{tokenizer} has no token for {share}: they are left out or unknown")
    if not check.keeps_space:
        remarks.append(f"{tokenizer} drops white space, which the bytes per token count all the same")
    return [], remarks


def measure_encoding(tokenizer: Any, texts: Sequence[str]) -> EncodingCheck:
    """Return how much of some texts their tokens hold, by the characters that each token stands for."""
    unknown_name = getattr(tokenizer.model, "unk_token", None)
    unknown = tokenizer.token_to_id(unknown_name) if isinstance(unknown_name, str) else None
    tokens = counted = lost = spaces = spaces_kept = 0
    examples: dict[str, None] = {}
    for text, encoding in zip(texts, tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True):
        is_kept = np.zeros(len(text) + 1, bool)
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            is_kept[begin:end] |= token != unknown
        is_space = np.array([character.isspace() for character in text], bool)
        is_lost = ~is_kept[: len(text)] & ~is_space
        tokens += len(encoding.ids)
        counted += int((~is_space).sum())
        lost += int(is_lost.sum())
        spaces += int(is_space.sum())
        spaces_kept += int((is_space & is_kept[: len(text)]).sum())
        examples |= dict.fromkeys(text[i] for i in np.flatnonzero(is_lost)[:100])
    size = sum(len(text.encode()) for text in texts)
    return EncodingCheck(
        size / max(tokens, 1), lost / max(counted, 1), "".join(list(examples)[:5]), spaces_kept >= 0.5 * spaces
    )


def explain_ratio(tokenizer: str, bytes_per_token: float) -> str | None:
    """Return why a tokenizer.json cannot have so many bytes of text per token, or None if it can."""
    if FEWEST_BYTES_PER_TOKEN <= bytes_per_token <= MOST_BYTES_PER_TOKEN:
        return None
    cause = "most of the text is lost" if bytes_per_token > MOST_BYTES_PER_TOKEN else "tokens are added to the text"
    return (
        f"needed {FEWEST_BYTES_PER_TOKEN:g} to {MOST_BYTES_PER_TOKEN:g} bytes of text per token, got "
        f"{bytes_per_token:.3g} from {tokenizer}: {cause}, so remove the normalizer from the file or use another one"
    )


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
        text = _read_file(Path(tokenizer).expanduser())
    parsed, changes = _parse_tokenizer(text, vocab, tokenizer)
    for change in changes:
        logger.info(f"{tokenizer}: {change}, which would change the number of tokens, is switched off")

    def encode(texts: list[bytes]) -> list[Tokens]:
        decoded = [t.decode("utf-8") for t in texts]
        try:
            encoded = parsed.encode_batch_fast(decoded, add_special_tokens=False)
        # The library raises nothing narrower.
        except Exception as error:
            raise ValueError(f"the tokenizer {tokenizer} cannot encode the text ({error})") from error
        return [np.asarray(e.ids, dtype) for e in encoded]

    dtype = "<u2" if vocab <= 1 << 16 else "<u4"
    return Encoder(hashlib.sha256("\0".join([text, *changes]).encode()).hexdigest(), dtype, encode)


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


def _parse_tokenizer(text: str, vocab: int, name: str) -> tuple[Any, list[str]]:
    """Return a tokenizer, and what was switched off in it because it changes the number of tokens."""
    library = import_optional("tokenizers", f"tokenizer {name!r}")
    try:
        tokenizer = library.Tokenizer.from_str(text)
    # The library raises nothing narrower.
    except Exception as error:
        beside = Path(name).expanduser().with_name("tokenizer.json")
        remedy = f": name {beside}" if beside.is_file() and beside.name != Path(name).name else ""
        raise ValueError(f"needed a tokenizer.json, got {name}, which cannot be read ({error}){remedy}") from error
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= highest < vocab:
        raise ValueError(
            f"needed a tokenizer of at most vocab = {vocab} tokens, got {highest + 1} in {name}: raise vocab"
        )
    changes = []
    if tokenizer.truncation is not None:
        changes.append(f"truncation to {tokenizer.truncation['max_length']} tokens")
        tokenizer.no_truncation()
    if tokenizer.padding is not None:
        changes.append("padding")
        tokenizer.no_padding()
    if dropout := getattr(tokenizer.model, "dropout", None):
        changes.append(f"dropout of {dropout:g}")
        tokenizer.model.dropout = None
    return tokenizer, changes


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"needed a tokenizer.json, got other bytes in {path}") from error


def _suggest_file(tokenizer: str, path: Path) -> str:
    """Return what to do about the name of a tokenizer that is no tokenizer.json."""
    converter = "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one"
    if path.is_dir():
        file = path / "tokenizer.json"
        return f", a folder: name {file}" if file.is_file() else f", a folder without tokenizer.json: {converter}"
    if path.is_file():
        return f", which is none: {converter}"
    if path.suffix.lower() not in (".json", ".txt", ".model") and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", tokenizer):
        return (
            ": no such file; for the tokenizer of that name on a hub, "
            f"tokenizers.Tokenizer.from_pretrained({tokenizer!r}).save('tokenizer.json') writes one"
        )
    return ": no such file"
