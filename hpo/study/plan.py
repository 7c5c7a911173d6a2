"""Plan the small runs that make the answer at a large target best, and search with them: `hpo.plan`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution

from hpo.planning.design import CURVATURES, LEAST_N, Design, Group, choose_design, compute_variances
from hpo.planning.law_search import LawInputs, LawPlan, find_law_inputs
from hpo.search.search import Search
from scaling.common.quantities import format_count
from scaling.laws.compute import Fidelity

# Half width of a normal distribution's 90 % interval, in standard deviations.
NORMAL_90 = 1.6449
# The smallest useful size, as a share of the target's N.
LEAST_SHARE = 1e-3
# A run trains at least so many optimizer steps, at the smallest batch of the space.
LEAST_STEPS = 100


@dataclass(frozen=True)
class Expectation:
    """What the answer at the target is expected to be worth, before any run.

    Attributes:
        lr_factor: The 90 % interval of the best learning rate will reach from the answer divided by this to the answer
            times this.
        batch_factor: The same of the best batch size; None if it is not searched.
        regret: The loss above the best one that is expected at the target, as a share of the loss.
    """

    lr_factor: float
    batch_factor: float | None
    regret: float


@dataclass(frozen=True)
class Plan:
    """Small runs for a large target, as `hpo.plan` chooses them.

    Attributes:
        target: N and D of the target.
        groups: The runs, a group for each size and length, cheapest first.
        flops: What all of them cost, FLOPs.
        share: The same as a share of the target's compute.
        expected: What their answer is expected to be worth.
        design: The groups as the search needs them.
        law: The design, and how the searched parameters relate to the law.
        space: The search space.
        seed: Seed of the search.
        sizes: The N that can be trained; None for any.
        least_N: The smallest useful N.
    """

    target: Fidelity
    law: LawPlan
    space: Mapping[str, BaseDistribution]
    seed: int
    sizes: tuple[float, ...] | None = None
    least_N: float = LEAST_N

    @property
    def design(self) -> Design:
        """The groups as the search needs them."""
        return self.law.design

    @property
    def groups(self) -> tuple[Group, ...]:
        """The runs, a group for each size and length, cheapest first."""
        return self.design.groups

    @property
    def flops(self) -> float:
        """What all runs cost, FLOPs."""
        return self.design.flops

    @property
    def share(self) -> float:
        """What all runs cost, as a share of the target's compute."""
        return self.design.flops / self.target.C

    @property
    def expected(self) -> Expectation:
        """What the answer is expected to be worth."""
        variances = compute_variances(self.design, self.target.N, self.target.D, mup=self.law.inputs.mup)
        searched = variances[: len(self.law.inputs.names)]
        factors = [float(factor) for factor in np.exp(NORMAL_90 * np.sqrt(searched))]
        regret = float(np.array(CURVATURES)[: searched.size] @ searched)
        return Expectation(factors[0], factors[1] if len(factors) > 1 else None, regret)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Ranges that leave out what published laws recommend, for the target and the largest runs."""
        return find_excluded_optima(self.law.inputs, self.space, self.target, self.groups[-1])

    def search(self, **options: Any) -> Search:
        """Return the search that runs the plan. Its `ask` returns None when all runs have been started.

        Args:
            **options: More arguments of `hpo.Search`, such as `storage`.
        """
        return Search(
            dict(self.space),
            tokens=self.design.tokens,
            eta=self.design.eta,
            sizes=self.design.sizes,
            target=self.target,
            scheduler="law",
            plan=self.law,
            seed=self.seed,
            **{"sampler": "random", **options},
        )

    def describe_alternative(self, factor: float) -> str:
        """Return what the budget times a factor would bring, in one line."""
        name = f"{100 * factor * self.share:.2g} % of the target's compute"
        try:
            other = make_plan(
                self.target,
                flops=factor * self.flops,
                space=self.space,
                inputs=self.law.inputs,
                sizes=self.sizes,
                least_N=self.least_N,
            )
        except ValueError as error:
            return f"{name}: {error}"
        expected = other.expected
        factors = f"learning rate within {expected.lr_factor:.2f}"
        if expected.batch_factor is not None:
            factors += f", batch size within {expected.batch_factor:.2f}"
        return f"{name}: {factors}, loss {100 * expected.regret:.2f} % above the best"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dict that JSON can hold."""
        return {
            "N": self.target.N,
            "D": self.target.D,
            "flops": self.flops,
            "share": self.share,
            "spread": self.design.spread,
            "groups": [asdict(group) for group in self.groups],
            "expected": asdict(self.expected),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        expected = self.expected
        batch = []
        if expected.batch_factor is not None:
            batch = [f"            batch size within a factor of {expected.batch_factor:.2f}"]
        lines = [
            f"target      N {format_count(self.target.N)}, D {format_count(self.target.D)}, {self.target.C:.3g} FLOPs",
            f"cost        {self.flops:.3g} FLOPs, {100 * self.share:.2g} % of the target's, {self.design.runs} runs",
            "",
            f"{'N':>10}{'D':>10}{'runs':>6}{'FLOPs':>10}{'share':>8}",
        ]
        lines += [
            f"{format_count(group.N):>10}{format_count(group.tokens):>10}{group.runs:>6}{group.flops:>10.2g}"
            f"{group.flops / self.flops:>8.0%}"
            for group in self.groups
        ]
        lines += [
            "",
            f"expected    learning rate within a factor of {expected.lr_factor:.2f} of the best (90 %)",
            *batch,
            f"            loss {100 * expected.regret:.2f} % above the best possible",
            *(textwrap.fill(f"warning     {text}", 80, subsequent_indent=" " * 12) for text in self.warnings),
        ]
        return "\n".join(lines)


def find_excluded_optima(
    inputs: LawInputs, space: Mapping[str, BaseDistribution], target: Fidelity, largest: Group
) -> tuple[str, ...]:
    """Return a sentence for each range that the law would have to leave, by what is expected before any run.

    Args:
        inputs: How the searched parameters relate to the law.
        space: The search space.
        target: N and D of the target.
        largest: The largest runs of the plan.
    """
    from scaling.fitting.bowl import BATCH_EXPONENTS, make_prior

    out = []
    for place, N, D in (("largest runs", largest.N, float(largest.tokens)), ("target", target.N, target.D)):
        prior, _ = make_prior("cubic", (math.log(N), math.log(D)), inputs.mup)
        # The level of B* stands before its exponents.
        expected = {inputs.batch: math.exp(prior[BATCH_EXPONENTS[0] - 1]) / inputs.batch_unit}
        # Under muP the level of lr* depends on the base width.
        if not inputs.mup:
            expected[inputs.lr] = math.exp(prior[0])
        for name in inputs.names:
            low, high = space[name].low, space[name].high  # type: ignore[attr-defined]
            if name in expected and not low <= expected[name] <= high:
                out.append(
                    f"published laws expect the best {name} of the {place} near {expected[name]:.2g}, outside its "
                    f"range of {low:g} to {high:g}: widen it, unless you know better"
                )
    return tuple(out)


def plan(
    N: float,
    D: float,
    *,
    flops: float,
    space: Mapping[str, BaseDistribution],
    seq_len: int | None = None,
    batch_tokens: float | None = None,
    parametrization: Literal["standard", "mup"] = "standard",
    sizes: Sequence[float] | None = None,
    least_N: float | None = None,
    seed: int = 0,
) -> Plan:
    """Choose the small runs after which the best learning rate and batch size of a large target are known best.

    Sizes, lengths and numbers of runs are chosen here, by the variance of the laws at the target
    (`hpo.planning.design`). The settings of each run are chosen when the search asks for it, from the law of the runs
    before it (`hpo.planning.law_search`).

    Args:
        N: Parameters of the target that multiply tokens.
        D: Training tokens of the target.
        flops: What all runs may cost together, FLOPs, at 6 N D for each.
        space: The ranges of the learning rate ("lr" or "learning_rate") and the batch size ("batch_seqs",
            "batch_tokens", "batch_size" or "batch"), as Optuna distributions.
        seq_len: Tokens of a sequence, if the batch size counts sequences.
        batch_tokens: The batch in tokens per optimizer step, if it is not searched.
        parametrization: "mup" if learning rates are those of a base width under muP, else "standard".
        sizes: The N that can be trained; by default any.
        least_N: The smallest useful N; by default a thousandth of the target's, and 2 million if any can be trained.
        seed: Seed of the search.

    Returns:
        The plan. Print it, then run what `plan.search()` asks for.

    Raises:
        ValueError: If the target, the budget or the space is unusable. The message lists all mistakes.

    Example:
        >>> space = {"lr": FloatDistribution(1e-4, 0.1, log=True), "batch_seqs": IntDistribution(4, 1024, log=True)}
        >>> p = hpo.plan(7e9, 1.4e12, flops=6e20, space=space, seq_len=2048)
        >>> print(p)
        >>> search = p.search(storage="study.journal")
    """
    problems = [
        f"{name} must be positive and finite, got {value}"
        for name, value in (("N", N), ("D", D), ("flops", flops), ("least_N", least_N))
        if value is not None and not (math.isfinite(value) and value > 0)
    ]
    if parametrization not in ("standard", "mup"):
        problems.append(f"parametrization is 'standard' or 'mup', got {parametrization!r}")
    inputs = None
    try:
        inputs = find_law_inputs(space, seq_len, mup=parametrization == "mup", batch_tokens=batch_tokens)
    except ValueError as error:
        problems.append(str(error))
    if problems or inputs is None:
        raise ValueError("; ".join(problems))
    return make_plan(Fidelity(N, D), flops=flops, space=space, inputs=inputs, sizes=sizes, least_N=least_N, seed=seed)


def make_plan(
    target: Fidelity,
    *,
    flops: float,
    space: Mapping[str, BaseDistribution],
    inputs: LawInputs,
    sizes: Sequence[float] | None = None,
    least_N: float | None = None,
    seed: int = 0,
) -> Plan:
    """Return the plan for a target, as `plan` does, with parameters of any names.

    Args:
        target: N and D of the target.
        flops: What all runs may cost together, FLOPs.
        space: The search space.
        inputs: How its parameters relate to learning rate and batch size.
        sizes: The N that can be trained; by default any.
        least_N: The smallest useful N; by default a thousandth of the target's, and 2 million if any can be trained.
        seed: Seed of the search.

    Raises:
        ValueError: If the budget pays for no plan. The message says what would.
    """
    if flops >= target.C:
        raise ValueError(
            f"the budget of {flops:.3g} FLOPs is not below the target's {target.C:.3g}: search at the target itself"
        )
    if least_N is None:
        least_N = LEAST_SHARE * target.N if sizes is not None else max(LEAST_N, LEAST_SHARE * target.N)
    least_batch = 1.0 if inputs.batch is None else float(space[inputs.batch].low)  # type: ignore[attr-defined]
    design = choose_design(
        target.N,
        target.D,
        flops,
        mup=inputs.mup,
        sizes=sizes,
        least_N=least_N,
        least_tokens=LEAST_STEPS * inputs.batch_unit * least_batch,
    )
    kept = None if sizes is None else tuple(sizes)
    return Plan(target, LawPlan(design, inputs), space, seed, kept, least_N)
