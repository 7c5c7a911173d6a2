"""Settings without torch: of a proxy, its schedule, its steps, mixture weights, growth rules, and which optimizers may
be used. It imports `scaling` only.
"""
