"""The surrogates of a sampler: fitted to the observations of a study, and kept because one ask may need them twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo.samplers.belief import Belief, make_bowl_prior
from hpo.samplers.observations import Observations
from hpo.samplers.unit_cube import Cube
from hpo.surrogate.inputs import compute_fidelity_coordinates
from scaling.common.arrays import Array
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.surrogate.feasibility import Feasibility
    from hpo.surrogate.fitting import Fitter
    from hpo.surrogate.gp import Surrogate


def _load_fitter(surrogate: str) -> Fitter:
    """Return the function that fits the kernels of a surrogate. Only the chosen one is imported."""
    if surrogate == "bowl":
        from hpo.surrogate.fitting import fit_bowl_kernel

        return fit_bowl_kernel
    from hpo.surrogate.deep_kernels import fit_deep_kernels, fit_nngp_kernel

    return {"deep": fit_deep_kernels, "nngp": fit_nngp_kernel}[surrogate]


def _count_warm_start_runs(runs: int) -> int:
    """Return how many of the first runs hyperparameters are fitted to from scratch. The fit to all runs starts there.

    It is all runs up to 40, then the last of 40, 48, 58, ... that is reached. Most asks then take only a few optimizer
    steps, and the result still depends on the trials only.
    """
    return runs if runs <= 40 else math.ceil(40 * 1.2 ** math.floor(math.log(runs / 40, 1.2) + 1e-9))


class SurrogateCache:
    """Fits surrogates to observations, and keeps the last one.

    Args:
        surrogate: "bowl", "deep" or "nngp".
        belief: Prior belief about the optimum, by parameter.
        seed: Seed of recommendations.
        n_startup: Number of configurations before the model is used; None for max(4, number of parameters + 1).
    """

    def __init__(self, surrogate: str, belief: Belief, seed: int, n_startup: int | None) -> None:
        self._surrogate, self._belief, self._seed, self._n_startup = surrogate, belief, seed, n_startup
        # The last surrogate and classifier, and their recommendation.
        self._last_recommendation: tuple[Surrogate, Feasibility | None, Array] | None = None
        # The last surrogate and the data that it was fitted to.
        self._last_fit: tuple[tuple[bytes, ...], Surrogate] | None = None
        # The surrogate of the first runs, see `_count_warm_start_runs`.
        self._warm_start: tuple[tuple[bytes, ...], Surrogate] | None = None
        # The last classifier of failures and the data that it was fitted to.
        self._last_feasibility: tuple[tuple[bytes, ...], Feasibility] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle keeps: all but the fitted models, which GPyTorch cannot pickle.

        They are functions of the trials, so a copy fits the same ones again.
        """
        fitted = ("_last_recommendation", "_last_fit", "_warm_start", "_last_feasibility")
        return self.__dict__ | dict.fromkeys(fitted)

    def has_model(self, observed: Observations, cube: Cube) -> bool:
        """Return whether the start-up configurations are done and two losses are known; without start-up, one."""
        startup = self._n_startup if self._n_startup is not None else max(4, len(cube.space) + 1)
        return observed.n_configurations >= startup and int(observed.finite.sum()) >= min(startup, 1) + 1

    def get(self, cube: Cube, observed: Observations, target: Fidelity) -> Surrogate | None:
        """Return the surrogate; None during start-up."""
        return self.fit(cube, observed, target, ()) if self.has_model(observed, cube) else None

    def fit(self, cube: Cube, observed: Observations, target: Fidelity, slots: Sequence[Fidelity]) -> Surrogate:
        """Fit the surrogate to the finished runs and condition it on the pending ones.

        The fidelity coordinates span the runs and the slots.
        """
        from hpo.surrogate.fitting import fit_bowl_kernel, fit_surrogate

        n, features, levels = len(observed.loss), cube.encode(observed.points), [*observed.levels, *slots]
        coordinates = compute_fidelity_coordinates(levels, target)[: len(observed.levels)]

        def make_key(runs: int) -> tuple[bytes, ...]:
            return features[:runs].tobytes(), coordinates[:runs].tobytes(), observed.loss[:runs].tobytes()

        full_key = make_key(len(features))
        if self._last_fit is not None and self._last_fit[0] == full_key:
            return self._last_fit[1]
        ids = {level: i for i, level in enumerate(dict.fromkeys(observed.levels[:n]))}
        level = np.array([ids[f] for f in observed.levels[:n]], dtype=np.int64)
        belief = {name: law for name, law in self._belief.items() if name in cube.distributions}
        bowl = make_bowl_prior(belief, cube, levels, target) if belief else None

        def fit_runs(runs: int, fitter: Fitter) -> Surrogate:
            u, t = features[:runs], coordinates[:runs]
            return fit_surrogate(u, t, level[:runs], observed.loss[:runs], fitter=fitter, bowl=bowl)

        fitter, first = _load_fitter(self._surrogate), _count_warm_start_runs(n)
        if self._surrogate == "bowl" and first < n and observed.finite[:first].any():
            if self._warm_start is None or self._warm_start[0] != make_key(first):
                self._warm_start = make_key(first), fit_runs(first, fitter)
            fitter = partial(fit_bowl_kernel, near=self._warm_start[1].best)
        self._last_fit = full_key, fit_runs(n, fitter).with_pending(features[n:], coordinates[n:])
        return self._last_fit[1]

    def fit_feasibility(self, cube: Cube, observed: Observations) -> Feasibility | None:
        """Return how likely a run at a cube point is to end with a loss; None if no trial has failed, or all have."""
        succeeded = observed.points[: len(observed.loss)][observed.finite]
        if not len(observed.failed) or not len(succeeded):
            return None
        from hpo.surrogate.feasibility import fit_feasibility

        key = observed.failed.tobytes(), succeeded.tobytes()
        if self._last_feasibility is None or self._last_feasibility[0] != key:
            predict = fit_feasibility(cube.encode(succeeded), cube.encode(observed.failed))
            self._last_feasibility = key, lambda points: predict(cube.encode(points))
        return self._last_feasibility[1]

    def recommend(self, cube: Cube, observed: Observations, target: Fidelity) -> Array:
        """Return the recommended cube point [p]. At least one loss must be finite."""
        from hpo.surrogate.acquisition import recommend
        from hpo.surrogate.gp import limit_to_one_thread

        model = self.get(cube, observed, target)
        if model is None:
            rows = np.flatnonzero(observed.finite)
            best: Array = observed.points[
                min(rows, key=lambda i: (-observed.levels[i].N, -observed.levels[i].D, observed.loss[i]))
            ]
            return best
        feasibility = self.fit_feasibility(cube, observed)
        last = self._last_recommendation
        if last is None or last[0] is not model or last[1] is not feasibility:
            seed = [self._seed, len(observed.loss), 2]
            with limit_to_one_thread():
                answer = recommend(model, cube, observed.points, seed, feasibility)
            self._last_recommendation = last = model, feasibility, answer
        return last[2]
