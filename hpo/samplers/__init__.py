"""Proposals of settings: the unit cube, prior beliefs, the sampler protocols and registry, and the multi-fidelity
sampler. It may import `surrogate` and `storage`.
"""
