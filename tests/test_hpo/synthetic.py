"""Data with a known optimum, for tests of the surrogate and of the code that uses it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hpo.surrogate.gp import join_inputs
from hpo.surrogate.kernel import make_priors

Array = NDArray[np.float64]


class PlainCube:
    """A search space in which every point of the cube stands for real settings, without categories."""

    def __init__(self, p: int) -> None:
        self.nominal = np.zeros(p, bool)

    def snap(self, points: Array) -> Array:
        return points

    def encode(self, points: Array) -> Array:
        return points


def hyperparameters(rng: np.random.Generator, d: int) -> dict[str, torch.Tensor]:
    """Draw hyperparameters from their priors, by name."""
    return {
        name: mean + sd * torch.from_numpy(rng.standard_normal(tuple(mean.shape)))
        for name, (mean, sd) in make_priors(d).items()
    }


def flat(p: dict[str, torch.Tensor]) -> Array:
    """Join hyperparameters to one vector, as `hpo.surrogate.marginal_likelihood` expects it."""
    theta: Array = torch.cat([v.detach().flatten() for v in p.values()]).numpy()
    return theta


def points(rng: np.random.Generator, n: int, d: int) -> torch.Tensor:
    """Draw random settings and fidelities, some beyond the target and some exactly at it."""
    fidelity = np.where(rng.random((n, 2)) < 0.3, 0.0, rng.uniform(-0.5, 1.0, (n, 2)))
    return join_inputs(rng.random((n, d)), fidelity)


def drifting(U: Array, T: Array) -> Array:
    """Return a loss whose optimum moves with both fidelity axes; it is (0.6, 0.4) at the target."""
    centre = np.array([0.6, 0.4]) + T @ np.array([[0.2, -0.15], [-0.1, 0.05]])
    return np.asarray(2.0 + 0.4 * T[:, 0] + 0.3 * T[:, 1] + ((U - centre) ** 2) @ np.array([1.0, 0.6]))


def drifting_runs(seed: int, n: int) -> tuple[Array, Array, NDArray[np.int64], Array]:
    """Make n runs on nine levels with t, s >= 0.5; return features, fidelity coordinates, level ids, and losses."""
    rng = np.random.default_rng(seed)
    U = rng.random((n, 2))
    T = rng.choice([1.0, 0.75, 0.5], (n, 2))
    _, level = np.unique(T, axis=0, return_inverse=True)
    return U, T, level.astype(np.int64).ravel(), drifting(U, T)
