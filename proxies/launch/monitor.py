"""Compare a target run with its prediction, while it runs and after it has ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Annotated

from pydantic import BeforeValidator

from proxies.launch.plan import Arm, LaunchPlan
from scaling.common.json_text import dump_json
from scaling.common.measurement import Measurement
from scaling.curves.loss_curve import find_tokens_to_reach
from scaling.curves.planned import LossBand

# MLflow tag of the first excursion. A tag holds at most 8,000 characters, so later excursions are only logged.
EXCURSION_TAG = "muscale.outside_band"
CAUSES_ABOVE = "the learning rate and its warm-up, the batch, the data and their order, the precision"
CAUSES_BELOW = "text that the data and the held-out text share, and tokens that are read more than once"

# Sentences and their values, in the order in which they are shown; stored as the note `warm_start` on the study's run.
ArmScores = dict[str, bool | float | str]


@dataclass(frozen=True)
class Excursion:
    """A point at which a run left its band.

    Attributes:
        tokens: Tokens trained at that point.
        loss: The loss there, nats per token.
        low: Lower end of the band there.
        high: Upper end of the band there.
        share: `tokens` as a share of the run's tokens.
    """

    tokens: int
    # JSON has no NaN: a file holds null for the loss of a run that diverged.
    loss: Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
    low: float
    high: float
    share: float

    @property
    def tag(self) -> str:
        """The value of the MLflow tag `EXCURSION_TAG`."""
        return dump_json(asdict(self))


@dataclass
class BandMonitor:
    """Compare the points of a run with a band as they come.

    Attributes:
        band: The band, or None if nothing is predicted.
        tokens: Tokens of the whole run.
        first: The first excursion so far.
        outside: Whether the last point was outside the band.
    """

    band: LossBand | None
    tokens: int
    first: Excursion | None = None
    outside: bool = field(default=False, init=False)

    def check(self, point: Measurement) -> Excursion | None:
        """Return the excursion that begins with this point.

        An excursion is returned once; the next one begins after the run has been inside the band again. Final points
        are scored, not monitored.
        """
        expected = None if self.band is None or point.final else self.band.at(point.tokens)
        if expected is None:
            return None
        low, _, high = expected
        # A loss that is NaN is outside, too.
        was_outside, self.outside = self.outside, not low <= point.loss <= high
        if was_outside or not self.outside:
            return None
        excursion = Excursion(point.tokens, point.loss, low, high, point.tokens / self.tokens)
        self.first = self.first or excursion
        return excursion


def format_excursion(name: str, excursion: Excursion, mass: float) -> str:
    """Return the warning that is logged for an excursion.

    Args:
        name: The run's name.
        excursion: The point at which it left its band.
        mass: The probability mass of the band.
    """
    above = not excursion.loss <= excursion.high
    return (
        f"WARNING: {name} has left its {100 * mass:.0f} % band at {excursion.tokens:,} tokens "
        f"({100 * excursion.share:.2g} % of the run): loss {excursion.loss:.4f}, {'above' if above else 'below'} "
        f"({excursion.low:.4f}, {excursion.high:.4f}); check {CAUSES_ABOVE if above else CAUSES_BELOW}"
    )


def predict_band(plan: LaunchPlan, arm: Arm) -> LossBand | None:
    """Return the band in which an arm is expected on its trunk.

    For the arm from scratch it is the plan's curve. A warm start begins elsewhere, so only limits are known. Its upper
    limit is the band from scratch: a warm start above it does not help. Its lower limit is the annealed loss, by the
    recommendation's law, of a run of the target's size on its own tokens and all of the proxy's. Both limits are
    assumed, not measured.

    Args:
        plan: The plan, with its curve and the recommendation's loss law.
        arm: The arm to predict.

    Returns:
        The band, or None where no curve is predicted or the recommendation has no loss law.
    """
    if plan.curve is None or arm == "scratch" or plan.warm is None:
        return plan.curve
    law, band = plan.because.get("loss_law", {}), plan.curve
    if not {"E", "A", "B", "alpha", "beta"} <= set(law):
        return None
    lows = []
    for tokens, loss, low in zip(band.tokens, band.loss, band.low, strict=True):
        all_tokens = tokens + plan.warm.tokens
        best = law["E"] + law["A"] / plan.N ** law["alpha"] + law["B"] / all_tokens ** law["beta"]
        # The law is taken to be as uncertain as the band.
        lows.append(min(low, best * low / loss))
    # No best guess is made; the geometric middle only fills the field.
    middles = tuple(math.sqrt(low * high) for low, high in zip(lows, band.high, strict=True))
    return LossBand(band.tokens, middles, tuple(lows), band.high, band.mass, band.runs, band.scale)


def score_arms(
    plan: LaunchPlan,
    losses: Mapping[Arm, float],
    curves: Mapping[Arm, tuple[Sequence[float], Sequence[float]]],
    excursions: Mapping[Arm, Excursion | None],
) -> ArmScores:
    """Compare the arms with the plan's prediction, which was made before they were trained, and with each other.

    Args:
        plan: The plan with its prediction.
        losses: Final loss of each arm, nats per token; NaN where it diverged.
        curves: (tokens, losses) of each arm on its trunk.
        excursions: The point where each arm first left its band, if it did.

    Returns:
        The scores. MLflow stores the keys, so they never change.
    """
    because = plan.because
    low, high = because["loss_interval"]
    sd = math.log(high / low) / 2 / NormalDist().inv_cdf(0.5 + because["mass"] / 2)
    outcome: ArmScores = {}
    for arm, loss in losses.items():
        outcome[f"loss at {plan.tokens:,} tokens, {arm}"] = round(loss, 4) if math.isfinite(loss) else "diverged"
        outcome[f"{arm} in the predicted interval"] = bool(low <= loss <= high)
        if math.isfinite(loss):
            outcome[f"{arm}, sd from the prediction"] = round(math.log(loss / because["loss"]) / sd, 2)
        if plan.curve is not None:
            point = excursions.get(arm)
            outcome[f"{arm} left its band"] = f"at {point.tokens:,} tokens, loss {point.loss:.4f}" if point else "never"
    if plan.warm and all(curves.get(arm, ((), ()))[0] for arm in ("warm", "scratch")):
        tokens, trunk = curves["scratch"]
        level = trunk[-1]
        reached = find_tokens_to_reach(*curves["warm"], level)
        outcome["loss on the trunk that both are asked for (scratch's last)"] = round(level, 4)
        outcome["tokens to it from scratch"] = int(tokens[-1])
        outcome["tokens to it from the warm start"] = "not reached" if math.isinf(reached) else int(reached)
        if math.isfinite(reached):
            # The proxy's compute, in tokens of the target.
            base = plan.warm.flops / (6.0 * plan.N)
            outcome["speed-up in tokens"] = round(tokens[-1] / reached, 2)
            outcome["speed-up when the proxy's own training is paid, too"] = round(tokens[-1] / (reached + base), 2)
    return outcome
