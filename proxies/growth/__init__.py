"""Growing a small model (weights, moments, files), and `proxies grow --plan` (question, runs, decision). It may import
`config` to `diagnostics`.
"""
