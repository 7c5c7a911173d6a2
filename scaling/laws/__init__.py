"""Formulas as values: loss laws, published laws, N, D and C, cooldown shapes. Fits nothing. Imports `common`."""
