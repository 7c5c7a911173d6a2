"""Formulas as values: loss laws, published laws, N, D and C, cooldown shapes. Nothing here fits anything. Imports `common`."""
