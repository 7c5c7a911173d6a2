"""Optuna samplers: the multi-fidelity one of this package, and four of Optuna's by name.

A trial's fidelity stands in its user attributes "tokens" (int) and "N" (float); a trial without them ran at the target,
so that the sampler works in any study. COMPLETE trials have a loss; FAIL with the user attribute "diverged" True, and a
violated constraint (Optuna's `trial.set_constraint`), are outcomes too, as bad as the worst loss seen; PRUNED ones with
"stopped" (`hpo.worker.early_stopping`) count as their forecast, and are neither continued nor answered with; RUNNING trials are pending
and repel. Other trials say nothing, other PRUNED ones included, because a pruned value names no fidelity.

Decisions are pure: the trials and the seed determine every proposal, whichever process asks.
"""

from __future__ import annotations

import math
import secrets
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.trial import FrozenTrial

from hpo.samplers.belief import Belief, check_belief
from hpo.samplers.names import MODEL_SAMPLERS
from hpo.samplers.observations import get_direction, get_fidelity, read_observations, Observations
from hpo.samplers.unit_cube import Cube, convert_from_unit, check_distribution
from scaling.common.arrays import Array
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.surrogate.acquisition import AvailableRuns
    from hpo.surrogate.gp import Fitter, Surrogate

MIN_GAIN_PER_DOUBT = 0.5  # see MultiFidelitySampler.best


def _load_fitter(surrogate: str) -> Fitter:
    if surrogate == "bowl":
        from hpo.surrogate.gp import fit_bowl_kernel

        return fit_bowl_kernel
    from hpo.surrogate.deep_kernels import fit_deep_kernels, fit_nngp_kernel

    return {"deep": fit_deep_kernels, "nngp": fit_nngp_kernel}[surrogate]


def _count_warm_start_runs(runs: int) -> int:
    """To how many of the first runs hyperparameters are fitted from the beginning; a fit to all of them goes on from there.

    All up to 40, then the last of 40, 48, 58, ...: most asks then pay for a few steps, and still depend on nothing but the
    trials.
    """
    return runs if runs <= 40 else math.ceil(40 * 1.2 ** math.floor(math.log(runs / 40, 1.2) + 1e-9))


class MultiFidelitySampler(BaseSampler):
    """Bayesian optimisation over settings and fidelity (`hpo.surrogate.gp`), in any single-objective study.

    seed: None draws one. n_startup_trials: configurations taken from a scrambled Sobol sequence before the model is
    asked; None: max(4, number of parameters + 1). surrogate: "bowl" (`hpo.surrogate.kernel`), "deep" or "nngp" (`hpo.surrogate.deep_kernels`).
    belief: where the optimum of some parameters is believed to lie (`hpo.samplers.belief`); the first configuration is then that.

    In a plain study the parameters that all finished trials share, with the same distributions, are modelled together;
    others (conditional parameters, changing ranges, the first trial's) are drawn at random, each by itself.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        n_startup_trials: int | None = None,
        surrogate: str = "bowl",
        belief: Belief | None = None,
    ) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {seed}")
        if n_startup_trials is not None and n_startup_trials < 1:
            raise ValueError(
                f"n_startup_trials must be at least 1, got {n_startup_trials}: leave it out for the default"
            )
        if surrogate not in MODEL_SAMPLERS.values():
            raise ValueError(f"surrogate must be one of {', '.join(MODEL_SAMPLERS.values())}, got {surrogate!r}")
        self._surrogate = surrogate
        self._belief = dict(belief or {})
        self._seed = secrets.randbits(32) if seed is None else seed
        self._n_startup = n_startup_trials
        self._answered: tuple[Surrogate, Array] | None = None  # the last one's recommendation
        self._fitted: tuple[tuple[bytes, ...], Surrogate] | None = None  # the last one: an ask may need it twice
        self._begun: tuple[tuple[bytes, ...], Surrogate] | None = None  # to the first runs: see _milestone

    def reseed_rng(self) -> None:
        """Nothing to do: draws depend on the seed and the trial's number, so that copies in other workers differ."""

    # A plain study

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        get_direction(study)
        space = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: distribution for name, distribution in space.items() if not distribution.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        get_direction(study)
        if not search_space:
            return {}
        levels = [get_fidelity(t, Fidelity(1.0, 1.0)) for t in study.get_trials(deepcopy=False)]
        target = max(levels, key=lambda f: (f.N, f.D), default=Fidelity(1.0, 1.0))
        slot = get_fidelity(trial, target)
        cube = Cube(search_space)
        seen = read_observations(study, cube, target, asking=trial.number)
        return self._next(cube, seen, [slot], lambda _: 1.0, target, number=trial.number)[0]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        get_direction(study)
        rng = np.random.default_rng([self._seed, trial.number, zlib.crc32(param_name.encode())])
        return convert_from_unit(check_distribution(param_name, param_distribution), float(rng.random()))

    # A search over fidelities

    def propose(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        slots: Sequence[Fidelity],
        cost: Callable[[Fidelity], float],
        target: Fidelity,
        *,
        continues: bool = False,
        limit: float = math.inf,
    ) -> tuple[dict[str, Any], int]:
        """What to run, and the index of the slot to run it at.

        slots: the fidelities on offer; cost: of one run there, any unit; target: where the settings are to be good,
        itself on offer or not; continues: a finished run of the same settings at the same N may be carried on to a
        slot for the difference in cost; limit: what it may cost at most, no less than the cheapest slot. Start-up points
        go to the cheapest slot. Raises ValueError on no slots, an empty space or a cost that is not positive.
        """
        if not slots:
            raise ValueError("propose needs at least one slot to start in, got none")
        for slot in slots:
            if not (math.isfinite(cost(slot)) and cost(slot) > 0):
                raise ValueError(f"the cost of a run must be positive and finite, got {cost(slot)} at {slot}")
        cube = Cube(space)
        check_belief(self._belief, cube)
        seen = read_observations(study, cube, target)
        return self._next(cube, seen, slots, cost, target, number=seen.configurations, continues=continues, limit=limit)

    def best(self, study: optuna.Study, space: dict[str, BaseDistribution], target: Fidelity) -> dict[str, Any]:
        """The settings that the model recommends at the target; where the target itself was run, the best of those runs
        by the model's mean, unless the gain over it is expected to be at least SURE times its own doubt.

        During start-up the best seen at the highest fidelity (largest N, then D). ValueError while no run has a finite
        loss.
        """
        cube = Cube(space)
        seen = read_observations(study, cube, target)
        if not seen.finite.any():
            raise ValueError(
                "no trial in this space has finished with a finite loss: run some before asking for the best"
            )
        answer = self._answer(cube, seen, target)
        model = self._model(cube, seen, target)
        run = [i for i in np.flatnonzero(seen.finite) if seen.levels[i] == target]
        if model is not None and run:
            points = cube.encode(np.vstack([seen.cube[run], answer]))
            mean, joint = model.predict(points, np.zeros(2))[0], model.posterior_covariance(points, np.zeros(2))
            best = int(np.argmin(mean[:-1]))
            doubt = math.sqrt(max(float(joint[best, best] + joint[-1, -1] - 2.0 * joint[best, -1]), 0.0))
            if mean[best] - mean[-1] < MIN_GAIN_PER_DOUBT * doubt:
                answer = seen.cube[run[best]]
        return cube.to_params(answer)

    def predict(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        params: Sequence[dict[str, Any]],
        target: Fidelity,
    ) -> Array | None:
        """The loss of each at the target by the model; None while there is none."""
        believed = self._believed(study, space, params, target)
        return None if believed is None else believed[0]

    def difference(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        a: dict[str, Any],
        b: dict[str, Any],
        target: Fidelity,
    ) -> tuple[float, float] | None:
        """Posterior mean and sd of loss(b) - loss(a) at the target, without noise; None while there is no model."""
        believed = self._believed(study, space, [a, b], target)
        if believed is None:
            return None
        mean, covariance = believed
        variance = covariance[0, 0] + covariance[1, 1] - 2.0 * covariance[0, 1]
        return float(mean[1] - mean[0]), math.sqrt(max(float(variance), 0.0))

    def is_hopeless(
        self, study: optuna.Study, space: dict[str, BaseDistribution], params: dict[str, Any], target: Fidelity
    ) -> bool:
        """Whether even a lucky outcome at the target (mean - 2 sd) would be worse than the present answer's mean."""
        cube = Cube(space)
        seen = read_observations(study, cube, target)
        model = self._model(cube, seen, target)
        if model is None:
            return False
        points = np.stack([cube.to_unit(params), self._answer(cube, seen, target)])
        mean, sd = model.predict(cube.encode(points), np.zeros(2))
        return bool(mean[0] - 2.0 * sd[0] > mean[1])

    def usefulness(
        self, study: optuna.Study, space: dict[str, BaseDistribution], levels: Sequence[Fidelity], target: Fidelity
    ) -> Array | None:
        """How far losses at each of the levels go with those at the target, [l]; None while there is no model. See
        hpo.surrogate.acquisition.compute_usefulness."""
        from hpo.surrogate.acquisition import compute_usefulness
        from hpo.surrogate.gp import compute_fidelity_coordinates

        cube = Cube(space)
        seen = read_observations(study, cube, target)
        if not self._has_model(seen, cube):
            return None
        member = self._fit(cube, seen, target, levels).best
        coordinates = compute_fidelity_coordinates([*seen.levels, *levels], target)[len(seen.levels) :]
        return compute_usefulness(member, cube, coordinates, [self._seed, len(seen.loss), 3])

    # How

    def _believed(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        params: Sequence[dict[str, Any]],
        target: Fidelity,
    ) -> tuple[Array, Array] | None:
        """Posterior mean [m] and covariance [m, m] of the losses at the target."""
        cube = Cube(space)
        model = self._model(cube, read_observations(study, cube, target), target)
        if model is None:
            return None
        features = cube.encode(np.stack([cube.to_unit(p) for p in params]))
        return model.predict(features, np.zeros(2))[0], model.posterior_covariance(features, np.zeros(2))

    def _has_model(self, seen: Observations, cube: Cube) -> bool:
        startup = self._n_startup if self._n_startup is not None else max(4, len(cube.space) + 1)
        return seen.configurations >= startup and int(seen.finite.sum()) >= 2

    def _model(self, cube: Cube, seen: Observations, target: Fidelity) -> Surrogate | None:
        return self._fit(cube, seen, target, ()) if self._has_model(seen, cube) else None

    def _fit(self, cube: Cube, seen: Observations, target: Fidelity, slots: Sequence[Fidelity]) -> Surrogate:
        """The surrogate of the finished runs, then told of the pending ones. Its fidelity coordinates span slots, too."""
        from hpo.samplers.belief import make_bowl_prior
        from hpo.surrogate.gp import compute_fidelity_coordinates, fit_bowl_kernel, fit_surrogate

        n, features, levels = len(seen.loss), cube.encode(seen.cube), [*seen.levels, *slots]
        coordinates = compute_fidelity_coordinates(levels, target)[: len(seen.levels)]

        def key(runs: int) -> tuple[bytes, ...]:
            return features[:runs].tobytes(), coordinates[:runs].tobytes(), seen.loss[:runs].tobytes()

        everything = key(len(features))
        if self._fitted is not None and self._fitted[0] == everything:
            return self._fitted[1]
        ids = {level: i for i, level in enumerate(dict.fromkeys(seen.levels[:n]))}
        level = np.array([ids[f] for f in seen.levels[:n]], dtype=np.int64)
        belief = {name: law for name, law in self._belief.items() if name in cube.distributions}
        centre = make_bowl_prior(belief, cube, levels, target) if belief else None

        def fit(runs: int, fitter: Fitter) -> Surrogate:
            u, t = features[:runs], coordinates[:runs]
            return fit_surrogate(u, t, level[:runs], seen.loss[:runs], fitter=fitter, bowl=centre)

        fitter, first = _load_fitter(self._surrogate), _count_warm_start_runs(n)
        if self._surrogate == "bowl" and first < n and seen.finite[:first].any():
            if self._begun is None or self._begun[0] != key(first):
                self._begun = key(first), fit(first, fitter)
            fitter = partial(fit_bowl_kernel, near=self._begun[1].best)
        self._fitted = everything, fit(n, fitter).with_pending(features[n:], coordinates[n:])
        return self._fitted[1]

    def _answer(self, cube: Cube, seen: Observations, target: Fidelity) -> Array:
        """The cube point [p] that is recommended. At least one loss must be finite."""
        from hpo.surrogate.acquisition import recommend
        from hpo.surrogate.gp import limit_to_one_thread

        model = self._model(cube, seen, target)
        if model is None:
            rows = np.flatnonzero(seen.finite)
            best: Array = seen.cube[min(rows, key=lambda i: (-seen.levels[i].N, -seen.levels[i].D, seen.loss[i]))]
            return best
        if self._answered is None or self._answered[0] is not model:
            with limit_to_one_thread():
                self._answered = model, recommend(model, cube, seen.cube, [self._seed, len(seen.loss), 2])
        return self._answered[1]

    def _next(
        self,
        cube: Cube,
        seen: Observations,
        slots: Sequence[Fidelity],
        cost: Callable[[Fidelity], float],
        target: Fidelity,
        *,
        number: int,
        continues: bool = False,
        limit: float = math.inf,
    ) -> tuple[dict[str, Any], int]:
        if not self._has_model(seen, cube):
            from scipy.stats.qmc import Sobol  # slow to import

            sequence = Sobol(len(cube.space), scramble=True, rng=np.random.default_rng(self._seed))
            if number:  # scipy refuses to skip nothing
                sequence.fast_forward(number)
            point, cheapest = sequence.random(1)[0], min(range(len(slots)), key=lambda i: cost(slots[i]))
            if number == 0 and self._belief:
                from hpo.samplers.belief import locate_in_cube

                for name, place in locate_in_cube(self._belief, cube, slots[cheapest]).items():
                    point[list(cube.distributions).index(name)] = min(max(place, 0.0), 1.0)
            return cube.to_params(point), cheapest
        from hpo.surrogate.acquisition import suggest
        from hpo.surrogate.gp import compute_fidelity_coordinates, limit_to_one_thread

        model = self._fit(cube, seen, target, slots)
        coordinates = compute_fidelity_coordinates([*seen.levels, *slots], target)
        offer = _price_slots(seen, slots, coordinates[len(seen.levels) :], cost, continues, limit)
        with limit_to_one_thread():
            point, slot = suggest(model, cube, seen.cube, offer, seed=[self._seed, number, len(seen.levels)])
        return cube.to_params(point), slot


def _price_slots(
    seen: Observations,
    slots: Sequence[Fidelity],
    coordinates: Array,
    cost: Callable[[Fidelity], float],
    continues: bool,
    limit: float,
) -> AvailableRuns:
    """What the slots (at fidelity coordinates [l, 2]) cost, and what was paid.

    The unit of cost is a run at the dearest fidelity within reach: the target itself may be far beyond it.
    """
    from hpo.surrogate.acquisition import AvailableRuns

    whole = np.array([cost(f) for f in seen.levels])
    saved = np.array([cost(Fidelity(f.N, r)) if r else 0.0 for f, r in zip(seen.levels, seen.resumed, strict=True)])
    costs = np.array([cost(f) for f in slots])
    unit = max(whole.max(), costs.max())
    full = whole >= unit * (1 - 1e-9)
    # All that a run cost that was carried on to the top counts as spent there.
    reached = {point.tobytes() for point in seen.cube[full]}
    low = np.array([point.tobytes() not in reached for point in seen.cube])
    slot_of = {level: i for i, level in enumerate(slots)}
    sizes = {f.N: i for i, f in enumerate(slots)}
    return AvailableRuns(
        slots=coordinates,
        cost=costs / unit,
        top=int(np.argmax(costs)) if costs.max() >= unit * (1 - 1e-9) else None,
        size=np.array([sizes[f.N] for f in slots]),
        cube=seen.cube,
        at=np.array([slot_of.get(f, -1) for f in seen.levels]),
        stuck=~np.append(seen.finite, np.zeros(len(seen.levels) - len(seen.loss), dtype=bool)),
        continues=continues,
        limit=limit / unit,
        spent=(float((whole - saved)[low].sum() / unit), float((whole - saved).sum() / unit)),
    )
