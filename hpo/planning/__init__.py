"""Runs that make the answer at a far target best: which sizes and lengths, how many runs of each, and which settings.
It may import `surrogate`, `storage` and `samplers`.
"""
