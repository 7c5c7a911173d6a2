"""The Gaussian process: kernel, marginal likelihood, posterior, acquisition function, deep kernels. The only room of `hpo` that
imports torch, GPyTorch and BoTorch; it imports no other room."""
