"""Formulas as values: loss laws, published laws, N, D and C, cooldown shapes. Nothing here is fitted. It may import
`common`.
"""
