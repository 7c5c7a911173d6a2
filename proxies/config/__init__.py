"""Settings of proxies, without torch.

The settings of a proxy, its learning-rate schedule, its steps, mixture weights, growth rules, and which optimizers may
be used. Imports only `scaling`.
"""
