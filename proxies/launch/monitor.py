"""A target beside its prediction: while it runs, and when it has ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

from proxies.launch.plan import Arm, LaunchPlan
from scaling.common.measurement import Measurement
from scaling.curves.loss_curve import tokens_to_reach
from scaling.curves.planned import Band

# A tag holds at most 8,000 characters; the first excursion is what is kept, the others are in the log.
TAG = "muscale.outside_band"
CAUSES_ABOVE = "the learning rate and its warm-up, the batch, the data and their order, the precision"
CAUSES_BELOW = "what the data and the held-out text have in common, whether the same tokens are read again"


@dataclass(frozen=True)
class Excursion:
    """A point at which a run left its band."""

    tokens: int
    loss: float
    low: float
    high: float
    share: float  # of the run's tokens

    @property
    def tag(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class BandMonitor:
    """Compares points with a band as they come: `look` answers when the run leaves it, once until it is inside again."""

    band: Band | None
    tokens: int  # of the whole run
    first: Excursion | None = None
    outside: bool = field(default=False, init=False)

    def look(self, point: Measurement) -> Excursion | None:
        """The excursion that begins with this point. Final points are scored, not watched."""
        expected = None if self.band is None or point.final else self.band.at(point.tokens)
        if expected is None:
            return None
        low, _, high = expected
        before, self.outside = self.outside, not low <= point.loss <= high  # also where it is NaN
        if before or not self.outside:
            return None
        left = Excursion(point.tokens, point.loss, low, high, point.tokens / self.tokens)
        self.first = self.first or left
        return left


def in_words(name: str, left: Excursion, mass: float) -> str:
    """The warning that the log gets."""
    above = not left.loss <= left.high
    return (
        f"WARNING: {name} has left its {100 * mass:.0f} % band at {left.tokens:,} tokens ({100 * left.share:.2g} % of the run): loss {left.loss:.4f}, "
        f"{'above' if above else 'below'} ({left.low:.4f}, {left.high:.4f}); look at {CAUSES_ABOVE if above else CAUSES_BELOW}"
    )


def expected_of(plan: LaunchPlan, arm: Arm) -> Band | None:
    """The band of an arm on its trunk.

    From scratch it is the plan's. A warm start begins elsewhere, so only its ends are known: above, a run from scratch does no
    worse than its own band (a warm start that does, is no help); below, none is better than the annealed loss of a run of the
    target's size on its own tokens and all of the proxy's, by the recommendation's law. Both are assumed, not measured.
    """
    if plan.curve is None or arm == "scratch" or plan.warm is None:
        return plan.curve
    law, band = plan.because.get("loss_law", {}), plan.curve
    if not {"E", "A", "B", "alpha", "beta"} <= set(law):
        return None
    lows = []
    for tokens, loss, low in zip(band.tokens, band.loss, band.low, strict=True):
        every = tokens + plan.warm.tokens
        best = law["E"] + law["A"] / plan.N ** law["alpha"] + law["B"] / every ** law["beta"]
        lows.append(min(low, best * low / loss))  # the law's own doubt is that of the band
    middles = tuple(math.sqrt(low * high) for low, high in zip(lows, band.high, strict=True))  # no best guess is made
    return Band(band.tokens, middles, tuple(lows), band.high, band.mass, band.runs, band.scale)


def score(
    plan: LaunchPlan,
    losses: Mapping[Arm, float],
    curves: Mapping[Arm, tuple[Sequence[float], Sequence[float]]],
    left: Mapping[Arm, Excursion | None],
) -> dict[str, Any]:
    """What the arms gave: against the plan's own prediction, made before, and against each other.

    losses: final, NaN where it diverged; curves: (tokens, losses) on the trunk; left: where an arm first left its band.
    """
    because = plan.because
    lo, hi = because["loss_interval"]
    sd = math.log(hi / lo) / 2 / NormalDist().inv_cdf(0.5 + because["mass"] / 2)
    outcome: dict[str, Any] = {}
    for arm, loss in losses.items():
        outcome[f"loss at {plan.tokens:,} tokens, {arm}"] = round(loss, 4) if math.isfinite(loss) else "diverged"
        outcome[f"{arm} in the predicted interval"] = bool(lo <= loss <= hi)
        if math.isfinite(loss):
            outcome[f"{arm}, sd from the prediction"] = round(math.log(loss / because["loss"]) / sd, 2)
        if plan.curve is not None:
            point = left.get(arm)
            outcome[f"{arm} left its band"] = f"at {point.tokens:,} tokens, loss {point.loss:.4f}" if point else "never"
    if plan.warm and all(curves.get(arm, ((), ()))[0] for arm in ("warm", "scratch")):
        tokens, trunk = curves["scratch"]
        level = trunk[-1]
        reached = tokens_to_reach(*curves["warm"], level)
        outcome["loss on the trunk that both are asked for (scratch's last)"] = round(level, 4)
        outcome["tokens to it from scratch"] = int(tokens[-1])
        outcome["tokens to it from the warm start"] = "not reached" if math.isinf(reached) else int(reached)
        if math.isfinite(reached):
            base = plan.warm.flops / (6.0 * plan.N)  # the proxy's compute in tokens of the target
            outcome["speed-up in tokens"] = round(tokens[-1] / reached, 2)
            outcome["speed-up when the proxy's own training is paid, too"] = round(tokens[-1] / (reached + base), 2)
    return outcome
