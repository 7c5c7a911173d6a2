"""The data of proxies: text sources, token files, the tokenizer, training windows, corpora, mixtures. It may import
`config`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # Scripts for version 0.1 import it from here.
    if name == "load_corpus":
        from proxies.data.corpora import load_corpus

        return load_corpus
    raise AttributeError(f"module 'proxies.data' has no attribute {name!r}")
