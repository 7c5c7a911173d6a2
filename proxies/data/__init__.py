"""The data of proxies: text sources, token files, the tokenizer, windows, corpora, mixtures. Imports `config`."""
