"""Beliefs about where the optimum lies before any run: from a published law, or from an earlier study.

    x*(N, D) = value (N / N_0)^a (D / D_0)^b

for any parameter that is searched on a log scale. The prior mean of the surrogate is then a bowl with this centre
instead of zero. The process models the residuals, so the data can move the centre and even invert the bowl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.distributions import CategoricalDistribution

from hpo.samplers.unit_cube import Cube
from hpo.surrogate.inputs import BowlPrior
from scaling.laws.compute import Fidelity

if TYPE_CHECKING:
    from scaling.fitting.lr_batch_law import HPFit

# Share of the spread of the losses within a level that the believed bowl explains. Assumed, not measured.
BOWL_SHARE = 0.7


@dataclass(frozen=True)
class OptimumLaw:
    """A power law of the optimum of one parameter.

    Attributes:
        value: The optimum at the fidelity `at`.
        at: N_0 and D_0.
        exponent_N: Exponent of N.
        exponent_D: Exponent of D.
    """

    value: float
    at: Fidelity
    exponent_N: float = 0.0
    exponent_D: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.value, self.at.N, self.at.D)
        if not all(math.isfinite(x) and x > 0 for x in numbers):
            raise ValueError(f"a law needs a positive, finite value, N and D, got {numbers}")
        if not (math.isfinite(self.exponent_N) and math.isfinite(self.exponent_D)):
            raise ValueError(f"a law's exponents must be finite, got {self.exponent_N} and {self.exponent_D}")

    def __call__(self, at: Fidelity) -> float:
        """Return the optimum at a fidelity."""
        return float(self.value * (at.N / self.at.N) ** self.exponent_N * (at.D / self.at.D) ** self.exponent_D)


# Laws by parameter.
Belief = Mapping[str, OptimumLaw]


def make_belief(fit: HPFit, at: Fidelity, *, lr: str = "lr", batch: str | None = None) -> dict[str, OptimumLaw]:
    """Turn a fitted law of learning rate and batch size into a belief.

    Args:
        fit: The result of `scaling.fit_hp_law`.
        at: A fidelity within the range of the fitted runs.
        lr: Name of the parameter that is the learning rate.
        batch: Name of the parameter that is the batch size in tokens; None if it is not searched, or not in tokens.
    """
    tenfold = (Fidelity(at.N * 10, at.D), Fidelity(at.N, at.D * 10))
    optimum = fit.law(at.N, at.D)
    tenfold_optima = [fit.law(f.N, f.D) for f in tenfold]
    return {
        name: OptimumLaw(
            float(optimum[i]), at, *(math.log10(float(other[i]) / float(optimum[i])) for other in tenfold_optima)
        )
        for i, name in ((0, lr), (1, batch))
        if name is not None
    }


def check_belief(belief: Belief, cube: Cube) -> None:
    """Check that every parameter of a belief is searched on a log scale.

    Raises:
        ValueError: If some are not; the message names them all.
    """
    wrong = [
        f"{name} is not searched" if name not in cube.distributions else f"{name} is not searched on a log scale"
        for name in belief
        if not getattr(cube.distributions.get(name), "log", False)
    ]
    if wrong:
        raise ValueError(f"a belief is a power law of a searched parameter: {'; '.join(wrong)}; remove it")


def locate_in_cube(belief: Belief, cube: Cube, at: Fidelity) -> dict[str, float]:
    """Return the believed optimum at a fidelity as cube coordinates by parameter. They may lie outside [0, 1]."""
    coordinates = {}
    for name, law in belief.items():
        low, high = cube.get_range(name)
        coordinates[name] = (math.log(law(at)) - low) / (high - low)
    return coordinates


def make_bowl_prior(belief: Belief, cube: Cube, levels: Sequence[Fidelity], target: Fidelity) -> BowlPrior:
    """Turn a belief into the prior mean of the surrogate.

    Args:
        belief: Laws by parameter.
        cube: The search space.
        levels: The fidelities that span the coordinates, as in `compute_fidelity_coordinates`.
        target: The fidelity at the origin of the coordinates.

    Raises:
        ValueError: If a parameter is not searched on a log scale.
    """
    check_belief(belief, cube)
    offset, columns = 0, {}
    for name, distribution in cube.distributions.items():
        columns[name] = offset
        offset += len(distribution.choices) if isinstance(distribution, CategoricalDistribution) else 1
    sizes = np.log([[f.D, f.N] for f in levels])
    below_target = np.log([target.D, target.N]) - sizes
    span = np.abs(below_target).max(axis=0)
    # The fidelities at coordinates (1, 0) and (0, 1).
    axis_ends = (
        Fidelity(target.N, target.D * math.exp(-span[0])),
        Fidelity(target.N * math.exp(-span[1]), target.D),
    )
    centre = locate_in_cube(belief, cube, target)
    names = list(belief)
    at_target = np.array([centre[name] for name in names])
    moves = np.array([[locate_in_cube(belief, cube, f)[name] - centre[name] for name in names] for f in axis_ends])
    u = np.random.default_rng(0).random((256, len(names)))
    bowl = ((u - at_target) ** 2).sum(1)
    return BowlPrior(tuple(columns[name] for name in names), at_target, moves, BOWL_SHARE / float(bowl.std()))
