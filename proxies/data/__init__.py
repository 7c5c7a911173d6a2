"""The data of proxies: text sources, token files, the tokenizer, training windows, corpora, mixtures. It may import
`config`.
"""
