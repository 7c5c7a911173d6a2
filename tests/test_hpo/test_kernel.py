"""The covariance against a direct implementation of its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hpo.surrogate.kernel import (
    HYPERPARAMETERS,
    FidelityKernel,
    compute_covariance,
    flatten_priors,
    make_priors,
    unpack_hyperparameters,
)
from tests.test_hpo.synthetic import flat, hyperparameters, points


def test_covariance_is_the_written_formula() -> None:
    rng = np.random.default_rng(0)
    d = 3
    p = hyperparameters(rng, d)
    a, b = points(rng, 6, d), points(rng, 5, d)
    covariance = compute_covariance(p, a, b).numpy()
    q = {name: value.numpy() for name, value in p.items()}
    for i, x in enumerate(a.numpy()):
        for j, y in enumerate(b.numpy()):
            (u, t, z), (v, t2, z2) = (x[:d], x[d], x[d + 1]), (y[:d], y[d], y[d + 1])
            offset = 9 * (1 + t * t2 + 0.1 * t**2 * t2**2 + z * z2 + 0.1 * z**2 * z2**2)
            bowl = 0.0
            for cu, cv in zip(u - 0.5, v - 0.5, strict=True):
                bowl += (1 + t * t2 + z * z2) * cu * cv + 4 * cu**2 * cv**2
            r2 = 0.0
            for k in range(d):
                moved_u = u[k] - t * q["drift"][0, k] - z * q["drift"][1, k]
                moved_v = v[k] - t2 * q["drift"][0, k] - z2 * q["drift"][1, k]
                r2 += (moved_u - moved_v) ** 2 / math.exp(q["log_length"][k]) ** 2
            r = math.sqrt(r2)
            m52 = (1 + math.sqrt(5) * r + 5 * r2 / 3) * math.exp(-math.sqrt(5) * r)
            factor = 1.0
            for k, (f, g) in enumerate([(t, t2), (z, z2)]):
                brownian = min(abs(f), abs(g)) if f * g > 0 else 0.0
                factor += math.exp(q["log_smooth"][k]) ** 2 * (f * g + 0.3 * (f * g) ** 2)
                factor += math.exp(q["log_rough"][k]) ** 2 * brownian
            expected = offset + math.exp(q["log_bowl"][0]) ** 2 * bowl + math.exp(q["log_fine"][0]) ** 2 * m52 * factor
            assert covariance[i, j] == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_the_shortcut_for_points_that_share_a_fidelity_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(4)
    p, a, b = hyperparameters(rng, 2), points(rng, 7, 2), points(rng, 5, 2)
    b[:, -2:] = torch.tensor([0.3, 0.8], dtype=torch.float64)
    one_by_one = torch.cat([compute_covariance(p, a, torch.stack([y, points(rng, 1, 2)[0]]))[:, :1] for y in b], dim=1)
    torch.testing.assert_close(compute_covariance(p, a, b), one_by_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_covariance_is_positive_semi_definite(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = 1 + seed % 4
    x = points(rng, 60, d)
    k = compute_covariance(hyperparameters(rng, d), x, x).numpy()
    np.testing.assert_allclose(k, k.T, rtol=0, atol=1e-10)
    eigenvalues = np.linalg.eigvalsh(k)
    assert eigenvalues.min() > -1e-10 * eigenvalues.max()


def test_kernel_gives_the_diagonal_and_batches() -> None:
    rng = np.random.default_rng(3)
    kernel = FidelityKernel(2)
    x, y = points(rng, 7, 2), points(rng, 7, 2)
    for other in (x, y):
        full = kernel(x, other).to_dense()
        torch.testing.assert_close(kernel(x, other, diag=True), full.diagonal(), rtol=1e-9, atol=1e-9)
        batched = kernel(torch.stack([x, y]), torch.stack([other, other])).to_dense()
        torch.testing.assert_close(batched[0], full)


def test_a_vector_of_hyperparameters_is_the_named_ones_in_order() -> None:
    p = hyperparameters(np.random.default_rng(5), 3)
    assert tuple(p) == HYPERPARAMETERS
    back = unpack_hyperparameters(torch.from_numpy(flat(p)), 3)
    for name, value in p.items():
        assert torch.equal(back[name], value)
    mean, sd = flatten_priors(3)
    assert len(mean) == len(sd) == 1 + 1 + 2 + 2 + 3 + 6 + 1
    for name, (middle, width) in make_priors(3).items():
        assert torch.equal(unpack_hyperparameters(torch.from_numpy(mean), 3)[name], middle)
        assert set(unpack_hyperparameters(torch.from_numpy(sd), 3)[name].flatten().tolist()) == {width}
