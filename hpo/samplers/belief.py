"""Where the optimum is believed to lie before anything was run: a published law, or last month's study.

    x*(N, D) = value (N / N_0)^a (D / D_0)^b

for any parameter that is searched on a log scale. The surrogate then starts from a bowl with this centre instead of
from nothing; the process models what is left, so that data move the centre and may turn the bowl over.
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

BOWL_SHARE = 0.7  # of the losses' spread within a level that the believed bowl makes out; assumed


@dataclass(frozen=True)
class OptimumLaw:
    """A power law of one parameter's optimum. at: N_0 and D_0, where the optimum is `value`."""

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
        return float(self.value * (at.N / self.at.N) ** self.exponent_N * (at.D / self.at.D) ** self.exponent_D)


Belief = Mapping[str, OptimumLaw]  # by parameter


def make_belief(fit: HPFit, at: Fidelity, *, lr: str = "lr", batch: str | None = None) -> dict[str, OptimumLaw]:
    """The laws of learning rate and batch size (in tokens) that `scaling.fit_hp_law` found, as a belief.

    at: a fidelity within the fitted runs' reach. lr, batch: the parameters' names; None: not searched, or not in tokens.
    """
    tenfold = (Fidelity(at.N * 10, at.D), Fidelity(at.N, at.D * 10))
    here = fit.law(at.N, at.D)
    there = [fit.law(f.N, f.D) for f in tenfold]
    return {
        name: OptimumLaw(float(here[i]), at, *(math.log10(float(other[i]) / float(here[i])) for other in there))
        for i, name in ((0, lr), (1, batch))
        if name is not None
    }


def check_belief(belief: Belief, cube: Cube) -> None:
    """ValueError that names every parameter that is not in the space or not on a log scale."""
    wrong = [
        f"{name} is not searched" if name not in cube.distributions else f"{name} is not searched on a log scale"
        for name in belief
        if not getattr(cube.distributions.get(name), "log", False)
    ]
    if wrong:
        raise ValueError(f"a belief is a power law of a searched parameter: {'; '.join(wrong)}; remove it")


def locate_in_cube(belief: Belief, cube: Cube, at: Fidelity) -> dict[str, float]:
    """The believed optimum at a fidelity, by parameter, as cube coordinates; they may lie outside [0, 1]."""
    found = {}
    for name, law in belief.items():
        low, high = cube.get_range(name)
        found[name] = (math.log(law(at)) - low) / (high - low)
    return found


def make_bowl_prior(belief: Belief, cube: Cube, levels: Sequence[Fidelity], target: Fidelity) -> BowlPrior:
    """The belief as the model wants it. levels: those that span the fidelity coordinates, as in fidelity_coordinates."""
    check_belief(belief, cube)
    offset, columns = 0, {}
    for name, distribution in cube.distributions.items():
        columns[name] = offset
        offset += len(distribution.choices) if isinstance(distribution, CategoricalDistribution) else 1
    sizes = np.log([[f.D, f.N] for f in levels])
    reach = np.log([target.D, target.N]) - sizes
    span = np.abs(reach).max(axis=0)
    below = (
        Fidelity(target.N, target.D * math.exp(-span[0])),
        Fidelity(target.N * math.exp(-span[1]), target.D),
    )
    top = locate_in_cube(belief, cube, target)
    names = list(belief)
    at_target = np.array([top[name] for name in names])
    moves = np.array([[locate_in_cube(belief, cube, f)[name] - top[name] for name in names] for f in below])
    u = np.random.default_rng(0).random((256, len(names)))
    bowl = ((u - at_target) ** 2).sum(1)
    return BowlPrior(tuple(columns[name] for name in names), at_target, moves, BOWL_SHARE / float(bowl.std()))
