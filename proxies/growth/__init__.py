"""Growing a small model: weights, moments, files; and `grow --plan`: the question, its runs, the decision. Imports the rooms
`config` to `diagnostics`."""
