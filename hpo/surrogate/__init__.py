"""The Gaussian process: kernel, marginal likelihood, posterior, acquisition function, deep kernels. It imports no other
room, and it is the only room of `hpo` that imports torch, GPyTorch and BoTorch."""
