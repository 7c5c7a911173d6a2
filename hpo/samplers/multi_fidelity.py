"""The multi-fidelity sampler: Bayesian optimization over settings and fidelity, as an Optuna sampler.

The fidelity of a trial is given by its user attributes "tokens" (int) and "N" (float). A trial without them counts as
run at the target, so that the sampler works in any study. Trials are used by their state:

- COMPLETE trials have a loss.
- FAIL trials with the user attribute "diverged" True are outcomes as bad as the worst loss so far. So are trials of a
  search that violate a constraint (Optuna's `trial.set_constraint`).
- PRUNED trials with the attribute "stopped" (`hpo.worker.early_stopping`) count with their forecast loss, and are
  neither continued nor recommended.
- RUNNING trials are treated as pending observations.
- In a plain study, other FAIL trials, trials that return infinity or violate a constraint, and trials that were pruned
  before they reported a finite value show where runs fail (`hpo.surrogate.feasibility`).
- In a plain study, other PRUNED trials have the loss that they reported last. Its fidelity is the share of the steps
  that were run, of the most steps that any trial of the study reported.
- All others are ignored. A search asks for such a run again.

Proposals are pure functions of the trials and the seed, in whichever process they are made.
"""

from __future__ import annotations

import math
import secrets
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.trial import FrozenTrial

from hpo.samplers.belief import Belief, check_belief, locate_in_cube
from hpo.samplers.names import MODEL_SAMPLERS
from hpo.samplers.observations import Observations, get_direction, get_fidelity, read_observations
from hpo.samplers.surrogate_cache import SurrogateCache
from hpo.samplers.unit_cube import Cube, check_distribution, convert_from_unit
from hpo.surrogate.inputs import compute_fidelity_coordinates
from scaling.common.arrays import Array
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from hpo.surrogate.acquisition import AvailableRuns

# See `MultiFidelitySampler.best`.
MIN_GAIN_PER_DOUBT = 0.5


class MultiFidelitySampler(BaseSampler):
    """Bayesian optimization over settings and fidelity, in any study with a single objective.

    A Gaussian process (`hpo.surrogate`) models the loss at every fidelity. The next run is the one with the largest
    knowledge gradient about the target per cost.

    `hpo.Search` calls `propose` and `best`. In a plain Optuna study, the parameters that all finished trials share with
    equal distributions are modelled jointly. Others (conditional parameters, changing ranges, those of the first trial)
    are drawn at random, each independently. Trials that fail teach the sampler which settings to leave, and pruned ones
    what they reported last.

    Args:
        seed: Seed of all draws; drawn at random by default.
        n_startup_trials: Number of configurations taken from a scrambled Sobol sequence before the model is used. The
            default is max(4, number of parameters + 1). With 0, the model is used as soon as a loss is known, otherwise
            only from the second one on.
        surrogate: "bowl" (`hpo.surrogate.kernel`), "deep" or "nngp" (`hpo.surrogate.deep_kernels`).
        belief: Power laws of where the optimum of some parameters is believed to lie, by parameter
            (`hpo.samplers.belief`). The first configuration is then this optimum.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> study = optuna.create_study(sampler=MultiFidelitySampler(seed=0))
        >>> study.optimize(objective, n_trials=50)
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
        if n_startup_trials is not None and n_startup_trials < 0:
            raise ValueError(
                f"n_startup_trials must not be negative, got {n_startup_trials}: leave it out for the default"
            )
        if surrogate not in MODEL_SAMPLERS.values():
            raise ValueError(f"surrogate must be one of {', '.join(MODEL_SAMPLERS.values())}, got {surrogate!r}")
        self._seed = secrets.randbits(32) if seed is None else seed
        self._belief = dict(belief or {})
        self._models = SurrogateCache(surrogate, self._belief, self._seed, n_startup_trials)

    def reseed_rng(self) -> None:
        """Do nothing: draws depend on the seed and the trial's number, so copies in other workers differ."""

    # In a plain Optuna study.

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that all finished trials share, except those with a single value."""
        get_direction(study)
        trials = study.get_trials(deepcopy=False)
        # A pruned trial may have ended before it had all parameters, so these count only without complete ones.
        space = intersection_search_space(trials) or intersection_search_space(trials, include_pruned=True)
        return {name: distribution for name, distribution in space.items() if not distribution.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose the parameters of a trial jointly, at the trial's fidelity or, without one, at the highest."""
        get_direction(study)
        if not search_space:
            return {}
        levels = [get_fidelity(t, Fidelity(1.0, 1.0)) for t in study.get_trials(deepcopy=False)]
        target = max(levels, key=lambda f: (f.N, f.D), default=Fidelity(1.0, 1.0))
        slot = get_fidelity(trial, target)
        cube = Cube(search_space)
        observed = read_observations(study, cube, target, asking=trial.number)
        return self._suggest(cube, observed, [slot], lambda _: 1.0, target, number=trial.number)[0]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one parameter uniformly."""
        get_direction(study)
        rng = np.random.default_rng([self._seed, trial.number, zlib.crc32(param_name.encode())])
        return convert_from_unit(check_distribution(param_name, param_distribution), float(rng.random()))

    # In a search over fidelities.

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
        """Propose the next run. Start-up configurations go to the cheapest slot.

        Args:
            study: The study.
            space: The search space.
            slots: Fidelities that can be run now.
            cost: Returns the cost of one run at a fidelity, in any unit.
            target: The fidelity at which the settings are to be good; it need not be a slot.
            continues: Whether a finished run of the same settings at the same N can be continued to a slot for the
                difference in cost.
            limit: The most that the run may cost, no less than the cost of the cheapest slot.

        Returns:
            The settings, and the index of the slot to run them at.

        Raises:
            ValueError: If there are no slots, the space is empty, or a cost is not positive and finite.
        """
        if not slots:
            raise ValueError("propose needs at least one slot to start in, got none")
        for slot in slots:
            if not (math.isfinite(cost(slot)) and cost(slot) > 0):
                raise ValueError(f"the cost of a run must be positive and finite, got {cost(slot)} at {slot}")
        cube = Cube(space)
        check_belief(self._belief, cube)
        observed = read_observations(study, cube, target)
        return self._suggest(
            cube, observed, slots, cost, target, number=observed.n_configurations, continues=continues, limit=limit
        )

    def best(self, study: optuna.Study, space: dict[str, BaseDistribution], target: Fidelity) -> dict[str, Any]:
        """Recommend settings for the target.

        They are the settings of the lowest predicted loss. If the target itself has been run, they are the run there
        with the lowest posterior mean, unless the expected gain over it is at least `MIN_GAIN_PER_DOUBT` times the
        standard deviation of that gain. During start-up they are the best run at the highest fidelity (largest N, then
        largest D).

        Args:
            study: The study.
            space: The search space.
            target: The fidelity at which the settings are to be good.

        Raises:
            ValueError: If no run has finished with a finite loss.
        """
        cube = Cube(space)
        observed = read_observations(study, cube, target)
        if not observed.finite.any():
            raise ValueError(
                "no trial in this space has finished with a finite loss: run some before asking for the best"
            )
        answer = self._models.recommend(cube, observed, target)
        model = self._models.get(cube, observed, target)
        run = [i for i in np.flatnonzero(observed.finite) if observed.levels[i] == target]
        if model is not None and run:
            points = cube.encode(np.vstack([observed.points[run], answer]))
            mean, joint = model.predict(points, np.zeros(2))[0], model.posterior_covariance(points, np.zeros(2))
            best = int(np.argmin(mean[:-1]))
            doubt = math.sqrt(max(float(joint[best, best] + joint[-1, -1] - 2.0 * joint[best, -1]), 0.0))
            if mean[best] - mean[-1] < MIN_GAIN_PER_DOUBT * doubt:
                answer = observed.points[run[best]]
        return cube.to_params(answer)

    def predict(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        params: Sequence[dict[str, Any]],
        target: Fidelity,
    ) -> Array | None:
        """Predict the losses of settings at the target.

        Args:
            study: The study.
            space: The search space.
            params: The settings, m of them.
            target: The fidelity to predict at.

        Returns:
            Posterior means [m]; None during start-up.
        """
        prediction = self._predict_jointly(study, space, params, target)
        return None if prediction is None else prediction[0]

    def difference(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        a: dict[str, Any],
        b: dict[str, Any],
        target: Fidelity,
    ) -> tuple[float, float] | None:
        """Predict the difference loss(b) - loss(a) at the target, without noise.

        Args:
            study: The study.
            space: The search space.
            a: Settings.
            b: Other settings.
            target: The fidelity to predict at.

        Returns:
            Posterior mean and standard deviation; None during start-up.
        """
        prediction = self._predict_jointly(study, space, [a, b], target)
        if prediction is None:
            return None
        mean, covariance = prediction
        variance = covariance[0, 0] + covariance[1, 1] - 2.0 * covariance[0, 1]
        return float(mean[1] - mean[0]), math.sqrt(max(float(variance), 0.0))

    def is_hopeless(
        self, study: optuna.Study, space: dict[str, BaseDistribution], params: dict[str, Any], target: Fidelity
    ) -> bool:
        """Return whether even a lucky outcome at the target (mean - 2 sd) would be above the recommendation's mean.

        Args:
            study: The study.
            space: The search space.
            params: The settings in question.
            target: The fidelity to predict at.
        """
        cube = Cube(space)
        observed = read_observations(study, cube, target)
        model = self._models.get(cube, observed, target)
        if model is None:
            return False
        points = np.stack([cube.to_unit(params), self._models.recommend(cube, observed, target)])
        mean, sd = model.predict(cube.encode(points), np.zeros(2))
        return bool(mean[0] - 2.0 * sd[0] > mean[1])

    def usefulness(
        self, study: optuna.Study, space: dict[str, BaseDistribution], levels: Sequence[Fidelity], target: Fidelity
    ) -> Array | None:
        """Return how well losses at each fidelity predict those at the target.

        See `hpo.surrogate.acquisition.compute_usefulness`.

        Args:
            study: The study.
            space: The search space.
            levels: The fidelities, l of them.
            target: The fidelity to predict.

        Returns:
            Correlations [l]; None during start-up.
        """
        from hpo.surrogate.acquisition import compute_usefulness

        cube = Cube(space)
        observed = read_observations(study, cube, target)
        if not self._models.has_model(observed, cube):
            return None
        member = self._models.fit(cube, observed, target, levels).best
        coordinates = compute_fidelity_coordinates([*observed.levels, *levels], target)[len(observed.levels) :]
        return compute_usefulness(member, cube, coordinates, [self._seed, len(observed.loss), 3])

    # The model behind both.

    def _predict_jointly(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        params: Sequence[dict[str, Any]],
        target: Fidelity,
    ) -> tuple[Array, Array] | None:
        """Return posterior means [m] and covariances [m, m] of the losses at the target; None during start-up."""
        cube = Cube(space)
        model = self._models.get(cube, read_observations(study, cube, target), target)
        if model is None:
            return None
        features = cube.encode(np.stack([cube.to_unit(p) for p in params]))
        return model.predict(features, np.zeros(2))[0], model.posterior_covariance(features, np.zeros(2))

    def _suggest(
        self,
        cube: Cube,
        observed: Observations,
        slots: Sequence[Fidelity],
        cost: Callable[[Fidelity], float],
        target: Fidelity,
        *,
        number: int,
        continues: bool = False,
        limit: float = math.inf,
    ) -> tuple[dict[str, Any], int]:
        """Return settings and a slot: by the Sobol sequence during start-up, then by the model.

        number: Position in the sequence, and part of the seed of the model's candidates.
        """
        if not self._models.has_model(observed, cube):
            # Slow to import.
            from scipy.stats.qmc import Sobol

            sequence = Sobol(len(cube.space), scramble=True, rng=np.random.default_rng(self._seed))
            # SciPy does not accept a skip of zero.
            if number:
                sequence.fast_forward(number)
            point, cheapest = sequence.random(1)[0], min(range(len(slots)), key=lambda i: cost(slots[i]))
            if number == 0 and self._belief:
                for name, coordinate in locate_in_cube(self._belief, cube, slots[cheapest]).items():
                    point[list(cube.distributions).index(name)] = min(max(coordinate, 0.0), 1.0)
            return cube.to_params(point), cheapest
        from hpo.surrogate.acquisition import suggest
        from hpo.surrogate.gp import limit_to_one_thread

        model = self._models.fit(cube, observed, target, slots)
        coordinates = compute_fidelity_coordinates([*observed.levels, *slots], target)
        available = _price_slots(observed, slots, coordinates[len(observed.levels) :], cost, continues, limit)
        with limit_to_one_thread():
            point, slot = suggest(
                model,
                cube,
                observed.points,
                available,
                seed=[self._seed, number, len(observed.levels)],
                feasibility=self._models.fit_feasibility(cube, observed),
            )
        return cube.to_params(point), slot


def _price_slots(
    observed: Observations,
    slots: Sequence[Fidelity],
    coordinates: Array,
    cost: Callable[[Fidelity], float],
    continues: bool,
    limit: float,
) -> AvailableRuns:
    """Return what the slots cost and what was spent.

    The unit of cost is a run at the most expensive fidelity within reach, because the target may be far beyond it.

    Args:
        observed: The runs.
        slots: Fidelities that can be run now.
        coordinates: Their fidelity coordinates, [l, 2].
        cost: Returns the cost of one run at a fidelity.
        continues: Whether runs can be continued.
        limit: The most that the next run may cost.
    """
    from hpo.surrogate.acquisition import AvailableRuns

    whole = np.array([cost(f) for f in observed.levels])
    saved = np.array(
        [cost(Fidelity(f.N, r)) if r else 0.0 for f, r in zip(observed.levels, observed.resumed_tokens, strict=True)]
    )
    costs = np.array([cost(f) for f in slots])
    unit = max(whole.max(), costs.max())
    full = whole >= unit * (1 - 1e-9)
    # Everything spent on a run that was continued to the top counts as spent at the top.
    reached = {point.tobytes() for point in observed.points[full]}
    low = np.array([point.tobytes() not in reached for point in observed.points])
    slot_of = {level: i for i, level in enumerate(slots)}
    sizes = {f.N: i for i, f in enumerate(slots)}
    return AvailableRuns(
        slots=coordinates,
        cost=costs / unit,
        top=int(np.argmax(costs)) if costs.max() >= unit * (1 - 1e-9) else None,
        size=np.array([sizes[f.N] for f in slots]),
        points=observed.points,
        run_slots=np.array([slot_of.get(f, -1) for f in observed.started_at]),
        is_stuck=~np.append(observed.finite, np.zeros(len(observed.levels) - len(observed.loss), dtype=bool)),
        continues=continues,
        limit=limit / unit,
        spent=(float((whole - saved)[low].sum() / unit), float((whole - saved).sum() / unit)),
    )
