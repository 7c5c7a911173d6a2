"""The transformer and its fused passes, the muP table, optimizers, the recipe and its export.
It may import `config`.
"""
