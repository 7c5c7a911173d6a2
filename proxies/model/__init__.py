"""The transformer and its fused passes, the muP table, optimizers, the recipe and its export.

Imports `config`. This room and `data` do not import each other.
"""
