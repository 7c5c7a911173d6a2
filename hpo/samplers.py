"""Optuna samplers: the multi-fidelity one of this package, and two of Optuna's by name.

A trial's fidelity stands in its user attributes "tokens" (int) and "N" (float); a trial without them ran at the target,
so that the sampler works in any study. COMPLETE trials have a loss; FAIL with the user attribute "diverged" True is an
outcome too, as bad as the worst loss seen; RUNNING trials are pending and repel. Other trials say nothing, PRUNED ones
included, because a pruned value names no fidelity.

Decisions are pure: the trials and the seed determine every proposal, whichever process asks.
"""

from __future__ import annotations

import difflib
import math
import secrets
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from scaling.compute import Fidelity

if TYPE_CHECKING:
    from hpo.surrogate import Surrogate

Array = NDArray[np.float64]

SAMPLERS = ("mfbo", "random", "qmc")


def make_sampler(name: str, *, seed: int | None = None) -> BaseSampler:
    """The sampler called "mfbo" (MultiFidelitySampler), "random" or "qmc" (Optuna's). ValueError for other names."""
    if name == "mfbo":
        return MultiFidelitySampler(seed=seed)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "qmc":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # stable since Optuna 3.0
            return optuna.samplers.QMCSampler(scramble=True, seed=seed)
    near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0.0)
    raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}: did you mean {near[0]!r}?")


def _cells(distribution: BaseDistribution) -> int | None:
    """How many evenly spaced values a parameter has; None when it is continuous or an integer on a log scale."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return math.floor((distribution.high - distribution.low) / distribution.step + 1e-8) + 1
    return None


def _ends(distribution: IntDistribution | FloatDistribution) -> tuple[float, float]:
    """The values (or their logarithms) at 0 and 1 of a parameter without cells; integers get half a unit more."""
    half = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    low, high = distribution.low - half, distribution.high + half
    return (math.log(low), math.log(high)) if distribution.log else (low, high)


def _known_kind(
    name: str, distribution: BaseDistribution
) -> CategoricalDistribution | IntDistribution | FloatDistribution:
    if isinstance(distribution, CategoricalDistribution | IntDistribution | FloatDistribution):
        return distribution
    raise ValueError(f"{name}: needed a Float, Int or Categorical distribution, got {type(distribution).__name__}")


def _to_unit(distribution: CategoricalDistribution | IntDistribution | FloatDistribution, value: Any) -> float:
    cells = _cells(distribution)
    if isinstance(distribution, CategoricalDistribution):
        return (int(distribution.to_internal_repr(value)) + 0.5) / len(distribution.choices)
    if cells is not None:
        assert distribution.step is not None  # only stepped parameters and categories have cells
        return float((round((value - distribution.low) / distribution.step) + 0.5) / cells)
    low, high = _ends(distribution)
    raw = math.log(value) if distribution.log else float(value)
    return 0.5 if high == low else (raw - low) / (high - low)


def _from_unit(distribution: CategoricalDistribution | IntDistribution | FloatDistribution, unit: float) -> Any:
    cells = _cells(distribution)
    if cells is not None:
        k = min(int(unit * cells), cells - 1)
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices[k]
        assert distribution.step is not None
        value = distribution.low + k * distribution.step
        return value if isinstance(distribution, IntDistribution) else min(float(value), distribution.high)
    assert not isinstance(distribution, CategoricalDistribution)
    low, high = _ends(distribution)
    raw = low + unit * (high - low)
    value = min(max(math.exp(raw) if distribution.log else raw, distribution.low), distribution.high)
    return round(value) if isinstance(distribution, IntDistribution) else float(value)


@dataclass(frozen=True)
class Cube:
    """A search space as the unit cube, one coordinate per parameter in the order of the space's names.

    Continuous parameters fill [0, 1], logarithmic ones in their logarithm. One of k evenly spaced values or
    categories is the middle of one of k equal cells. A snapped point stands for values that exist: rounding comes
    before the model.
    """

    space: dict[str, BaseDistribution]
    distributions: dict[str, CategoricalDistribution | IntDistribution | FloatDistribution] = field(init=False)

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("a search space needs at least one parameter, got none: add a distribution")
        kinds = {name: _known_kind(name, distribution) for name, distribution in self.space.items()}
        object.__setattr__(self, "distributions", kinds)

    @cached_property
    def nominal(self) -> NDArray[np.bool_]:
        return np.array([isinstance(d, CategoricalDistribution) for d in self.distributions.values()])

    def unit(self, params: dict[str, Any]) -> Array:
        return np.array([_to_unit(d, params[name]) for name, d in self.distributions.items()], float)

    def params(self, point: Array) -> dict[str, Any]:
        return {name: _from_unit(d, float(u)) for (name, d), u in zip(self.distributions.items(), point, strict=True)}

    def holds(self, trial: FrozenTrial) -> bool:
        """Whether the trial has a value inside the space for every parameter."""
        for name, distribution in self.distributions.items():
            if name not in trial.params:
                return False
            value = trial.params[name]
            if isinstance(distribution, CategoricalDistribution):
                if value not in distribution.choices:
                    return False
            elif isinstance(value, str | bool) or value is None or not distribution.low <= value <= distribution.high:
                return False
        return True

    def snap(self, cube: Array) -> Array:
        out = np.empty_like(cube)
        for j, distribution in enumerate(self.distributions.values()):
            cells = _cells(distribution)
            if cells is not None:
                out[:, j] = (np.minimum(np.floor(cube[:, j] * cells), cells - 1) + 0.5) / cells
            elif isinstance(distribution, IntDistribution):
                low, high = _ends(distribution)
                values = np.rint(np.exp(low + cube[:, j] * (high - low))).clip(distribution.low, distribution.high)
                out[:, j] = (np.log(values) - low) / (high - low)
            else:
                out[:, j] = 0.5 if distribution.single() else cube[:, j]
        return out

    def features(self, cube: Array) -> Array:
        """Snapped points [m, p] -> model inputs [m, d]: numbers as they are, a category as k columns of 0 and 1."""
        columns = []
        for j, distribution in enumerate(self.distributions.values()):
            if isinstance(distribution, CategoricalDistribution):
                k = len(distribution.choices)
                columns.append(np.eye(k)[np.minimum((cube[:, j] * k).astype(int), k - 1)])
            else:
                columns.append(cube[:, j : j + 1])
        return np.hstack(columns)


@dataclass(frozen=True)
class _Seen:
    """What the trials of a study say: finished runs, then pending ones."""

    cube: Array  # [n + q, p]
    levels: list[Fidelity]  # n + q
    loss: Array  # [n], minimised; NaN when diverged
    configurations: int  # distinct ones ever started, also those that failed

    @property
    def finite(self) -> NDArray[np.bool_]:
        return np.isfinite(self.loss)


def _fidelity(trial: FrozenTrial, default: Fidelity) -> Fidelity:
    attrs = trial.user_attrs
    return Fidelity(float(attrs["N"]), float(attrs["tokens"])) if "N" in attrs and "tokens" in attrs else default


def _look(study: optuna.Study, cube: Cube, target: Fidelity, asking: int | None = None) -> _Seen:
    """Read all trials but the one that asks."""
    sign = -1.0 if _direction(study) == StudyDirection.MAXIMIZE else 1.0
    done: list[tuple[Array, Fidelity, float]] = []
    pending: list[tuple[Array, Fidelity]] = []
    configurations = set()
    for trial in study.get_trials(deepcopy=False):
        if trial.number == asking or trial.state == TrialState.WAITING:
            continue
        configurations.add(trial.user_attrs.get("config", trial.number))
        if not cube.holds(trial):
            continue
        diverged = trial.state == TrialState.FAIL and trial.user_attrs.get("diverged") is True
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            loss = sign * trial.value
            done.append((cube.unit(trial.params), _fidelity(trial, target), loss if math.isfinite(loss) else math.nan))
        elif diverged:
            done.append((cube.unit(trial.params), _fidelity(trial, target), math.nan))
        elif trial.state == TrialState.RUNNING:
            pending.append((cube.unit(trial.params), _fidelity(trial, target)))
    points = [u for u, _, _ in done] + [u for u, _ in pending]
    return _Seen(
        np.array(points, float).reshape(-1, len(cube.space)),
        [f for _, f, _ in done] + [f for _, f in pending],
        np.array([y for _, _, y in done], float),
        len(configurations),
    )


def _direction(study: optuna.Study) -> StudyDirection:
    if len(study.directions) != 1:
        raise ValueError(
            f"MultiFidelitySampler minimises one loss, got a study with {len(study.directions)} directions"
        )
    return study.direction


def _fit(seen: _Seen, cube: Cube, coordinates: Array) -> Surrogate:
    """The surrogate of the finished runs, then told of the pending ones. coordinates [n + q, 2]."""
    from hpo.surrogate import fit_surrogate

    n = len(seen.loss)
    features = cube.features(seen.cube)
    ids = {level: i for i, level in enumerate(dict.fromkeys(seen.levels[:n]))}
    level = np.array([ids[f] for f in seen.levels[:n]], dtype=np.int64)
    model = fit_surrogate(features[:n], coordinates[:n], level, seen.loss)
    return model.with_pending(features[n:], coordinates[n:])


class MultiFidelitySampler(BaseSampler):
    """Bayesian optimisation over settings and fidelity (`hpo.surrogate`), in any single-objective study.

    seed: None draws one. n_startup_trials: configurations taken from a scrambled Sobol sequence before the model is
    asked; None: max(4, number of parameters + 1).

    In a plain study the parameters that all finished trials share, with the same distributions, are modelled together;
    others (conditional parameters, changing ranges, the first trial's) are drawn at random, each by itself.
    """

    def __init__(self, *, seed: int | None = None, n_startup_trials: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {seed}")
        if n_startup_trials is not None and n_startup_trials < 1:
            raise ValueError(
                f"n_startup_trials must be at least 1, got {n_startup_trials}: leave it out for the default"
            )
        self._seed = secrets.randbits(32) if seed is None else seed
        self._n_startup = n_startup_trials

    def reseed_rng(self) -> None:
        """Nothing to do: draws depend on the seed and the trial's number, so that copies in other workers differ."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        _direction(study)
        space = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: distribution for name, distribution in space.items() if not distribution.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        _direction(study)
        if not search_space:
            return {}
        levels = [_fidelity(t, Fidelity(1.0, 1.0)) for t in study.get_trials(deepcopy=False)]
        target = max(levels, key=lambda f: (f.N, f.D), default=Fidelity(1.0, 1.0))
        slot = _fidelity(trial, target)
        cube = Cube(search_space)
        seen = _look(study, cube, target, asking=trial.number)
        return self._next(cube, seen, [slot], lambda _: 1.0, target, number=trial.number)[0]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        _direction(study)
        rng = np.random.default_rng([self._seed, trial.number, zlib.crc32(param_name.encode())])
        return _from_unit(_known_kind(param_name, param_distribution), float(rng.random()))

    def propose(
        self,
        study: optuna.Study,
        space: dict[str, BaseDistribution],
        slots: Sequence[Fidelity],
        cost: Callable[[Fidelity], float],
        target: Fidelity,
    ) -> tuple[dict[str, Any], int]:
        """A new configuration, and the index of the slot to start it in.

        slots: the fidelities on offer; cost: of one run there, any unit; target: where the settings are to be good,
        itself on offer or not. Start-up points go to the cheapest slot. Raises ValueError on no slots, an empty space
        or a cost that is not positive.
        """
        if not slots:
            raise ValueError("propose needs at least one slot to start in, got none")
        for slot in slots:
            if not (math.isfinite(cost(slot)) and cost(slot) > 0):
                raise ValueError(f"the cost of a run must be positive and finite, got {cost(slot)} at {slot}")
        cube = Cube(space)
        seen = _look(study, cube, target)
        return self._next(cube, seen, slots, cost, target, number=seen.configurations)

    def best(self, study: optuna.Study, space: dict[str, BaseDistribution], target: Fidelity) -> dict[str, Any]:
        """The settings that the model recommends at the target.

        During start-up the best seen at the highest fidelity (largest N, then D). ValueError while no run has a finite
        loss.
        """
        cube = Cube(space)
        seen = _look(study, cube, target)
        if not seen.finite.any():
            raise ValueError(
                "no trial in this space has finished with a finite loss: run some before asking for the best"
            )
        n = len(seen.loss)
        if not self._has_model(seen, cube):
            rows = np.flatnonzero(seen.finite)
            return cube.params(seen.cube[min(rows, key=lambda i: (-seen.levels[i].N, -seen.levels[i].D, seen.loss[i]))])
        from hpo.surrogate import fidelity_coordinates, recommend

        model = _fit(seen, cube, fidelity_coordinates(seen.levels, target))
        return cube.params(recommend(model, cube, seen.cube, [self._seed, n, 2]))

    def _has_model(self, seen: _Seen, cube: Cube) -> bool:
        startup = self._n_startup if self._n_startup is not None else max(4, len(cube.space) + 1)
        return seen.configurations >= startup and int(seen.finite.sum()) >= 2

    def _next(
        self,
        cube: Cube,
        seen: _Seen,
        slots: Sequence[Fidelity],
        cost: Callable[[Fidelity], float],
        target: Fidelity,
        *,
        number: int,
    ) -> tuple[dict[str, Any], int]:
        cheapest = min(range(len(slots)), key=lambda i: cost(slots[i]))
        if not self._has_model(seen, cube):
            from scipy.stats.qmc import Sobol  # slow to import

            sequence = Sobol(len(cube.space), scramble=True, rng=np.random.default_rng(self._seed))
            if number:  # scipy refuses to skip nothing
                sequence.fast_forward(number)
            return cube.params(sequence.random(1)[0]), cheapest
        from hpo.surrogate import fidelity_coordinates, suggest

        coordinates = fidelity_coordinates([*seen.levels, *slots], target)
        model = _fit(seen, cube, coordinates[: len(seen.levels)])
        # The unit of cost is a run at the highest fidelity within reach: the target itself may be far beyond it.
        paid = np.array([cost(f) for f in seen.levels])
        costs = np.array([cost(f) for f in slots])
        unit = max(paid.max(), costs.max())
        top = int(np.argmax(costs)) if costs.max() >= unit * (1 - 1e-9) else None
        low = paid[paid < unit * (1 - 1e-9)].sum()
        point, slot = suggest(
            model,
            cube,
            seen.cube,
            coordinates[len(seen.levels) :],
            costs / unit,
            top=top,
            spent=(float(low / unit), float(paid.sum() / unit)),
            seed=[self._seed, number, len(seen.levels)],
        )
        return cube.params(point), slot
