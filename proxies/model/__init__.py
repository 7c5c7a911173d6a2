"""The transformer and its fused passes, the muP table, optimizers, the recipe and its export. Imports `config`; it stands beside
`data` and neither imports the other."""
