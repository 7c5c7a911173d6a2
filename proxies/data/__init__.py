"""What proxies read: text sources, token files, the tokenizer, training windows, corpora, mixtures. Imports `config`."""
