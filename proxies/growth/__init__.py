"""Growth of a small model (weights, moments, files), and `proxies grow --plan` (question, runs, decision). It may
import everything from `config` to `diagnostics`.
"""
