"""The Gaussian process: kernel, marginal likelihood, posterior, acquisition function, deep kernels. It is the only
subpackage of `hpo` that imports torch, GPyTorch and BoTorch, and it imports no other subpackage.
"""
