"""Growth of a small model (weights, moments, files), and `proxies grow --plan` (question, runs, decision).

Imports the rooms `config` to `diagnostics`.
"""
