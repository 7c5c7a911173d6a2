"""Choose sizes, lengths and numbers of runs, so that the law through them says most about a far target.

A law of the best settings is known at the target as well as its level and slopes are, so the runs should be as large
as the budget allows, and also far apart. Both are weighed by the variance of the optimum at the target, which has a
closed form. With n and d the logarithms of N and D over the target's, and x* either ln lr* or ln B*:

    x*(n, d) = level + a n + b d + bends (n², n d, d²) + a shift of each group's own

All coefficients have normal priors. A group of m runs at about a distance RING_RADIUS from its optimum measures it with
variance s² / ((m - 3) (2 h RING_RADIUS)² / 2), where h is the curvature of the loss and s the noise of a run and of the
bowl's shape. The posterior is that of a Gaussian process, and the expected regret is h var(x*), summed over both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scaling.common.arrays import Array

# Curvature of ln loss in ln lr and ln B: the mean over both sides, at half an e-fold from the optimum, of the median of
# 17 public groups of runs (Step Law, arXiv 2503.04715).
CURVATURES = (0.0086, 0.0082)
# Prior standard deviations of the level and of the exponents of N and D, for lr* and for B*.
PRIOR_SDS = ((1.5, 0.3, 0.3), (1.5, 0.15, 0.2))
PRIOR_SDS_MUP = ((1.5, 0.1, 0.25), (1.5, 0.15, 0.2))
# Standard deviations of a bend, and of a group's own shift.
BEND_SD, SHIFT_SD = 0.01, 0.1
# Distance of a group's runs from its optimum, in ln lr and ln B.
RING_RADIUS = 1.0
# Noise of ln loss of one run, and of the bowl's shape as a share of its height.
RUN_NOISE, SHAPE_NOISE = 0.0009, 0.15
# Sizes below this behave unlike larger ones.
LEAST_N = 2e6
# What is tried: groups on the way to the target, the ratio of neighbours in N and in D, runs of the largest group and
# of the others, and further runs of the smallest one, which are spread over the whole space.
COUNTS, RATIOS, TOP_RUNS, LOW_RUNS, SPREAD_RUNS = (2, 3, 4, 5), (2, 3, 4), (5, 6), (6, 8), 10
# Runs of a group beside the way to the target, where N and D do not move together. One at the predicted optimum tells
# the loss there; three took so much from the largest group that the regret rose.
PAIR_RUNS = 1
# Groups of fewer runs do not tell where their optimum is.
LEAST_RUNS_FOR_OPTIMUM = 3
# Factor between the budgets that are tried when one is too small.
BUDGET_STEP = 1.2


class DesignError(ValueError):
    """No design meets the request: the message says what is needed."""


@dataclass(frozen=True)
class Group:
    """Runs of one size and length.

    Attributes:
        N: Parameters that multiply tokens.
        tokens: Training tokens of each run.
        runs: The number of runs.
    """

    N: float
    tokens: int
    runs: int

    @property
    def flops(self) -> float:
        """Compute of all its runs, FLOPs."""
        return 6.0 * self.N * self.tokens * self.runs


@dataclass(frozen=True)
class Design:
    """Groups of runs, from which a law is to be fitted.

    Attributes:
        groups: The groups, cheapest first.
        spread: How many runs of the first group are spread over the whole space. All others lie around the optimum that
            the law predicts.
        eta: Ratio of neighbouring lengths.
    """

    groups: tuple[Group, ...]
    spread: int
    eta: int

    @property
    def flops(self) -> float:
        """Compute of all runs, FLOPs."""
        return sum(group.flops for group in self.groups)

    @property
    def runs(self) -> int:
        """The number of all runs."""
        return sum(group.runs for group in self.groups)

    @property
    def sizes(self) -> tuple[float, ...]:
        """The different N, in ascending order."""
        return tuple(sorted({group.N for group in self.groups}))

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of the shortest and the longest run."""
        lengths = [group.tokens for group in self.groups]
        return min(lengths), max(lengths)


def choose_design(
    N: float,
    D: float,
    flops: float,
    *,
    mup: bool = False,
    sizes: Sequence[float] | None = None,
    least_N: float = LEAST_N,
    least_tokens: float = 1.0,
) -> Design:
    """Choose the design with the lowest expected regret at (N, D) that a budget pays.

    Args:
        N: Parameters of the target that multiply tokens.
        D: Training tokens of the target.
        flops: The budget: what all runs may cost together, FLOPs.
        mup: Whether learning rates are those of a base width under muP, so that lr* hardly moves with N.
        sizes: The sizes that can be trained; by default any.
        least_N: The smallest useful size.
        least_tokens: The fewest tokens of a run, such as a number of steps times the smallest batch.

    Returns:
        The design.

    Raises:
        DesignError: If the budget does not pay for runs of different sizes.
    """
    limits = _Limits(N, D, sizes, least_N, least_tokens)
    for shapes in _list_shapes():
        designs = [design for shape in shapes if (design := _scale_shape(shape, flops, limits)) is not None]
        if designs:
            return min(designs, key=lambda design: expected_regret(design, N, D, mup=mup))
    raise DesignError(_explain_budget(flops, limits))


@dataclass(frozen=True)
class _Limits:
    """The target, and what can be trained."""

    N: float
    D: float
    sizes: Sequence[float] | None
    least_N: float
    least_tokens: float


@dataclass(frozen=True)
class _Shape:
    """A design without a scale: steps below the top in N and in D, and runs, of each group."""

    ratio: int
    steps: tuple[tuple[int, int, int], ...]


def _list_shapes() -> list[list[_Shape]]:
    """Return the shapes with three groups or more on the way to the target, and those with two for smaller budgets."""
    shapes: list[list[_Shape]] = [[], []]
    for count, ratio, top, low in itertools.product(COUNTS, RATIOS, TOP_RUNS, LOW_RUNS):
        along = [(i, i, low if i else top) for i in range(count)]
        # Beside the way N and D do not move together, which tells the loss law what each of them is worth.
        beside = [(0, 1, PAIR_RUNS), (1, 0, PAIR_RUNS)]
        shapes[count < 3].append(_Shape(ratio, (*along, *beside)))
    return shapes


def _scale_shape(shape: _Shape, flops: float, limits: _Limits) -> Design | None:
    """Return a shape at the scale that spends the budget; None if its runs would be too small or too large."""
    n_steps, d_steps, runs = (np.array(column) for column in zip(*shape.steps, strict=True))
    runs = runs + np.where(np.arange(runs.size) == np.argmax(n_steps + d_steps), SPREAD_RUNS, 0)
    ratio = float(shape.ratio)
    cost = 6 * limits.N * limits.D * float(np.sum(ratio ** -(n_steps + d_steps) * runs))
    chosen = _choose_sizes(limits.N * math.sqrt(flops / cost), shape.ratio, int(n_steps.max()), limits)
    if chosen is None:
        return None
    group_sizes = np.array([chosen[step] for step in n_steps])
    # Sizes that exist differ from the wanted ones, so the lengths take up the rest of the budget.
    longest = flops / (6 * float(np.sum(group_sizes * ratio**-d_steps * runs)))
    top_tokens = _round_tokens(longest, shape.ratio, int(d_steps.max()))
    tokens = [round(top_tokens / shape.ratio**step) for step in d_steps]
    if min(tokens) < max(limits.least_tokens, 1) or group_sizes.max() > limits.N or top_tokens > limits.D:
        return None
    columns = zip(group_sizes, tokens, runs, strict=True)
    groups = [Group(float(size), int(length), int(count)) for size, length, count in columns]
    return Design(tuple(sorted(groups, key=lambda g: (g.N * g.tokens, g.N))), SPREAD_RUNS, shape.ratio)


def _choose_sizes(top: float, ratio: int, steps: int, limits: _Limits) -> list[float] | None:
    """Return the size at each step below the top: of those that can be trained, the nearest ones; None if too few."""
    if top / ratio**steps < limits.least_N / ratio or top / ratio < limits.least_N:
        return None
    # The smallest size may be larger than wanted, by less than the ratio.
    wanted = [max(top / ratio**step, limits.least_N) for step in range(steps + 1)]
    if limits.sizes is None:
        return wanted
    usable = [size for size in limits.sizes if size >= limits.least_N]
    if len(usable) < 2:
        return None
    chosen = [min(usable, key=lambda size: abs(math.log(size / want))) for want in wanted]
    # Groups of one size and length would be the same group.
    if len(set(chosen)) < len(chosen):
        return None
    # Where there is no size near the wanted one, N and D would move apart.
    farthest = max(abs(math.log(size / want)) for size, want in zip(chosen, wanted, strict=True))
    return chosen if farthest <= math.log(ratio) / 2 + 1e-9 else None


def _round_tokens(longest: float, ratio: int, steps: int) -> int:
    """Return the most tokens, at most `longest`, for which the lengths below are whole multiples of the shortest."""
    unit = int(ratio**steps)
    return max(int(longest) // unit, 1) * unit


def expected_regret(design: Design, N: float, D: float, *, mup: bool = False) -> float:
    """Return the regret at (N, D) that is expected after the runs of a design, as a share of the loss.

    Args:
        design: The design.
        N: Parameters of the target that multiply tokens.
        D: Training tokens of the target.
        mup: Whether learning rates are those of a base width under muP.
    """
    return float(np.array(CURVATURES) @ compute_variances(design, N, D, mup=mup))


def compute_variances(design: Design, N: float, D: float, *, mup: bool = False) -> Array:
    """Return the variances of ln lr* and ln B* at (N, D) after the runs of a design, its own shift included, (2,).

    The arguments are those of `expected_regret`.
    """
    telling = [group for group in design.groups if group.runs >= LEAST_RUNS_FOR_OPTIMUM]
    sizes, tokens, runs = np.array([(group.N, group.tokens, group.runs) for group in telling], float).T
    n, d = np.log(sizes / N), np.log(tokens / D)
    basis = np.stack([np.ones_like(n), n, d, n * n, n * d, d * d], 1)
    variances = []
    for curvature, sds in zip(CURVATURES, PRIOR_SDS_MUP if mup else PRIOR_SDS, strict=True):
        prior = np.square([*sds, BEND_SD, BEND_SD, BEND_SD])
        noise = RUN_NOISE**2 + (SHAPE_NOISE * curvature * RING_RADIUS**2) ** 2
        measured = noise / (np.maximum(runs - 3, 0.2) * (2 * curvature * RING_RADIUS) ** 2 / 2)
        covariance = basis * prior @ basis.T + np.diag(measured + SHIFT_SD**2)
        # At the target all of n and d are zero.
        cross = basis[:, 0] * prior[0]
        variances.append(prior[0] - cross @ np.linalg.solve(covariance, cross) + SHIFT_SD**2)
    return np.array(variances)


def _explain_budget(flops: float, limits: _Limits) -> str:
    """Return why no design is possible, and which budget would be enough."""
    least, target = f"{limits.least_N:.3g} parameters", 6 * limits.N * limits.D
    usable = None if limits.sizes is None else [size for size in limits.sizes if limits.least_N <= size <= limits.N]
    if usable is not None and len(usable) < 2:
        return (
            f"a plan needs two sizes or more from {least} to the target's {limits.N:.3g}, got {len(usable)}: give more"
        )
    enough = flops
    while enough < target:
        enough *= BUDGET_STEP
        if any(_scale_shape(shape, enough, limits) is not None for shapes in _list_shapes() for shape in shapes):
            return (
                f"the budget of {flops:.3g} FLOPs ({100 * flops / target:.2g} % of the target's) does not pay for runs "
                f"of different sizes, of {least} or more: about {enough:.2g} FLOPs ({100 * enough / target:.2g} %) are "
                "needed"
            )
    return (
        f"no sizes of {least} or more and runs of {limits.least_tokens:.3g} tokens or more lie below the target "
        f"(N {limits.N:.3g}, D {limits.D:.3g}): lower these limits, or search at the target itself"
    )
