"""Runs that make the answer at a far target best: which sizes and lengths, how many runs of each, and which settings.
It imports no other subpackage of `hpo`.
"""
