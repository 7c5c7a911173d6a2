"""Proposals of settings: the unit cube, prior beliefs, the sampler protocols and registry, the multi-fidelity sampler.
Imports `surrogate` and `storage`."""
