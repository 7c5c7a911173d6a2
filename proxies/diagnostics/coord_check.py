"""The coordinate check of a parametrization: the size of activations must not depend on width or depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from proxies.config.proxy import ProxyConfig
from proxies.diagnostics.coord_probe import (
    DECAY_BY_RATE,
    DECAYED,
    DIVIDE_BY_EPS,
    ProbeEngine,
    ProbeResult,
    ProbeSpec,
    measure_gradient_scales,
    run_probes,
)

Axis = Literal["width", "depth"]
Quantity = Literal["size", "early", "change", "eps", "decay"]
# A slope is too steep if its whole interval lies beyond the first limit, or its value beyond the second.
CLEAR_SLOPE = 0.25
MAX_SLOPE = 0.5
# The probability of the interval over seeds.
MASS = 0.95
STRESS_STEPS = 5
# Steps for the early change of the logits. Later the loss corrects logits that move too far, and the blocks show it
# instead.
EARLY = 2
# A change below this share of the size counts as no change: QK-norm undoes decay up to rounding.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Slope:
    """The growth of a quantity: the slope of its log2 against log2 width or depth, mean over steps and seeds.

    Attributes:
        over: What is varied.
        where: The module, such as "block 0 attention"; under stress a role, such as "hidden".
        what: "size" is mean |x|, "change" is mean |x - x at step 0|, "early" is the change in steps 1 and 2; under
            stress, "eps" is the update and "decay" the share that decays.
        value: The slope.
        low: Lower end of the t interval over seeds; NaN with one seed.
        high: Its upper end.
        levels: The quantity itself: for each size its steps, mean over seeds.
    """

    over: Axis
    where: str
    what: Quantity
    value: float
    low: float
    high: float
    levels: tuple[tuple[float, ...], ...]

    @property
    def steep(self) -> bool:
        """Whether the slope is beyond the limits, or not a number."""
        if not abs(self.value) <= MAX_SLOPE:
            return True
        return self.low > CLEAR_SLOPE or self.high < -CLEAR_SLOPE


@dataclass(frozen=True)
class CoordCheck:
    """The slopes of every quantity, and whether they are flat enough.

    Attributes:
        slopes: One for each module, quantity and axis.
        widths: The widths that were trained.
        depths: The depths that were trained; empty if depth was not checked.
        lr: The learning rate at base width.
        steps: Training steps of each run.
        seeds: Seeds of each size.
        engine: What ran the steps.
        losses: For each width and seed the mean training loss of the last three steps, in nats per token.
    """

    slopes: tuple[Slope, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    lr: float
    steps: int
    seeds: int
    engine: ProbeEngine
    losses: tuple[tuple[float, ...], ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """What depends on width or depth: module (or role), quantity and axis."""
        return tuple(f"{s.where} {s.what} over {s.over}" for s in self.slopes if s.steep)

    @property
    def passed(self) -> bool:
        """Whether nothing depends on width or depth."""
        return not self.failures

    @property
    def modules(self) -> dict[str, bool]:
        """Whether all slopes are flat, for each module, or role under stress."""
        flat: dict[str, bool] = {}
        for s in self.slopes:
            flat[s.where] = flat.get(s.where, True) and not s.steep
        return flat

    @property
    def wider_is_worse(self) -> tuple[int, ...]:
        """Widths whose training loss exceeds the next smaller width's by over two standard deviations of a seed."""
        values = np.array(self.losses)
        sd = values.std(axis=1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values))
        limits = 2 * np.maximum(sd[1:], sd[:-1])
        rises = np.diff(values.mean(axis=1))
        return tuple(w for w, rise, limit in zip(self.widths[1:], rises, limits, strict=True) if not rise <= limit)

    @property
    def text(self) -> str:
        """A table with one line per quantity, and a verdict, as text."""
        lines = []
        for over, sizes in (("width", self.widths), ("depth", self.depths)):
            rows = [s for s in self.slopes if s.over == over]
            if rows:
                listed = ", ".join(map(str, sizes))
                lines.append(
                    f"{f'slope in log2 {over} ({listed})':44}{'log2':>8}{'slope':>9}{f'{MASS:.0%} interval':>18}"
                )
            for s in rows:
                span = "" if math.isnan(s.low) else f"[{s.low:+.2f}, {s.high:+.2f}]"
                lines.append(f"{s.where:44}{s.what:>8}{s.value:+9.2f}{span:>18}{'   too steep' if s.steep else ''}")
        means = ", ".join(f"{w}: {np.mean(v):.3f}" for w, v in zip(self.widths, self.losses, strict=True))
        rises = ", ".join(map(str, self.wider_is_worse))
        trend = f"rises at {rises}" if rises else "no rise beyond the spread of seeds"
        lines.append(f"training loss after {self.steps} steps by width: {means}, {trend}")
        verdict = "passed" if self.passed else f"failed, activations depend on size: {'; '.join(self.failures)}"
        lines.append(f"{self.seeds} seeds, lr {self.lr:g} at base width, engine {self.engine}: {verdict}")
        return "\n".join(lines)

    @property
    def json(self) -> dict[str, Any]:
        """The outcome as values that JSON can represent. A slope that is not a number is None."""
        more = {"passed": self.passed, "failures": self.failures, "modules": self.modules}
        more["wider_is_worse"] = self.wider_is_worse
        plain: dict[str, Any] = replace_nonfinite(asdict(self) | more)
        return plain


def coordinate_check(
    config: ProxyConfig,
    widths: Sequence[int] | None = None,
    *,
    depths: Sequence[int] | None = None,
    seeds: int = 3,
    steps: int = 10,
    lr: float | None = None,
    batch_seqs: int = 4,
    engine: ProbeEngine = "plain",
    ranks: int = 2,
    double: bool = False,
) -> CoordCheck:
    """Train each width (and depth) for a few steps on the same data, and fit how every activation scales with it.

    Embeddings, the output of every branch, the stream after every block, attention scores and logits are measured
    before the final norm as well as after it, since a norm hides an exploding stream (coordinate check of arXiv
    2203.03466, appendix D.1). Two short runs under stress show what ten steps do not: epsilon raised to each role's RMS
    gradient at base size, where the update must still not depend on width, and a decay of 5 % per step.

    A slope is fitted for each seed, mean over steps 1 to `steps`. It fails if the whole t interval over seeds is beyond
    1/4 or the value is beyond 1/2. docs/math.md §6 has the false alarms and the power of this rule.

    Args:
        config: The proxy.
        widths: At least three widths of whole heads. Default: from half the base width to four times it.
        depths: At least three numbers of layers at base width. Default: 1, 2, 4 and 8 times `base_layers` if the
            configuration has one, else none. The first and the last block are measured.
        seeds: Seeds of each size.
        steps: Training steps of each run.
        lr: The constant learning rate at base width. Default: three times the configuration's, since at a gentle rate a
            wrong parametrization looks right for ten steps.
        batch_seqs: Sequences of a batch.
        engine: What runs the steps; the measured quantities do not depend on it.
        ranks: Processes for the engines "ddp" and "fsdp2".
        double: Whether to compute in float64.

    Returns:
        The slopes and the verdict.

    Raises:
        ValueError: For bad arguments.
    """
    base = config.base_width
    wide = _check_sizes("widths", widths if widths is not None else (base // 2, base, 2 * base, 4 * base))
    if depths is None:
        deep = tuple(config.base_layers * 2**i for i in range(4)) if config.base_layers else ()
    else:
        deep = _check_sizes("depths", depths) if len(depths) else ()
    if seeds < 1 or steps < 1:
        raise ValueError(f"needed at least one seed and one step, got {seeds} and {steps}")
    rate = 3 * config.lr if lr is None else lr

    def make_member(**size: int) -> ProxyConfig:
        return ProxyConfig.model_validate(config.model_dump() | {"lr": rate} | size)

    axes: list[tuple[Axis, tuple[int, ...], list[ProxyConfig]]]
    axes = [("width", wide, [make_member(d_model=w) for w in wide])]
    if deep:
        axes.append(("depth", deep, [make_member(d_model=base, n_layers=n) for n in deep]))
    start = ProbeSpec(
        make_member(d_model=base, n_layers=config.base_layers or config.n_layers), "eps", STRESS_STEPS, batch_seqs
    )
    stress = _choose_stress(start)

    plans: list[tuple[str, int, int, str]] = []
    specs: list[ProbeSpec] = []
    for over, sizes, members in axes:
        for size, member in zip(sizes, members, strict=True):
            for seed in range(seeds):
                seeded = member.model_copy(update={"seed": config.seed + seed})
                plans.append((over, size, seed, "activations"))
                specs.append(ProbeSpec(seeded, "activations", steps, batch_seqs, double=double))
                for kind, scales in stress.items():
                    plans.append((over, size, seed, kind))
                    specs.append(ProbeSpec(seeded, kind, STRESS_STEPS, batch_seqs, scales, double))
    results = dict(zip(plans, run_probes(specs, engine, ranks), strict=True))

    slopes: list[Slope] = []
    for over, sizes, _ in axes:
        runs = [[results[over, size, seed, "activations"] for seed in range(seeds)] for size in sizes]
        slopes += fit_slopes(over, sizes, runs)
        for kind in stress:
            runs = [[results[over, size, seed, kind] for seed in range(seeds)] for size in sizes]
            slopes += _fit_stress_slopes(over, sizes, runs, kind)
    losses = tuple(
        tuple(float(np.mean(results["width", w, s, "activations"].losses[-3:])) for s in range(seeds)) for w in wide
    )
    return CoordCheck(tuple(slopes), wide, deep, rate, steps, seeds, engine, losses)


def _choose_stress(start: ProbeSpec) -> dict[Literal["eps", "decay"], dict[str, float]]:
    """Return the stresses that can act on the optimizer, with their scales at base size."""
    config = start.config
    kinds: dict[Literal["eps", "decay"], dict[str, float]] = {}
    if config.optimizer in DIVIDE_BY_EPS:
        kinds["eps"] = measure_gradient_scales(start)
    if config.weight_decay > 0 and config.optimizer in DECAY_BY_RATE:
        kinds["decay"] = {"factor": DECAYED / (config.lr * config.weight_decay)}
    return kinds


def fit_slopes(over: Axis, sizes: tuple[int, ...], runs: list[list[ProbeResult]]) -> list[Slope]:
    """Fit size and change of every quantity that all sizes share, and the early change of the logits.

    Args:
        over: What is varied.
        sizes: The widths or depths.
        runs: For each size one result per seed.

    Returns:
        The slopes.
    """
    slopes = []
    for where, names in _match_quantities(over, runs).items():
        # Model size, seed, step, (size, change). Step 0 has no change, and its size is not that of training.
        values = np.array(
            [
                [[step[name] for step in result.measurements[1:]] for result in seeds]
                for name, seeds in zip(names, runs, strict=True)
            ]
        )
        size, change = values[..., 0], values[..., 1]
        change = np.where((change < ROUNDING * size).all(axis=(0, 1)), 0.0, change)
        slopes.append(fit_slope(over, where, "size", sizes, size))
        if where == "logits":
            slopes.append(fit_slope(over, where, "early", sizes, change[:, :, :EARLY]))
        slopes.append(fit_slope(over, where, "change", sizes, change))
    return slopes


def _match_quantities(over: Axis, runs: list[list[ProbeResult]]) -> dict[str, list[str]]:
    """Return the name of each quantity at every size. Over depth: those of the first and last block and outside blocks.

    The stream after the first block is not among them: one layer's share of it falls as 1 / depth when all is well.
    """
    names_by_size = [list(seeds[0].measurements[0]) for seeds in runs]
    if over == "width":
        return {name: [name] * len(runs) for name in names_by_size[0]}
    inner = [name.removeprefix("block 0 ") for name in names_by_size[0] if name.startswith("block 0 ")]
    last = [sum(name.endswith(" stream") for name in names) - 1 for names in names_by_size]
    return {
        "embedding": ["embedding"] * len(runs),
        **{f"first block {what}": [f"block 0 {what}"] * len(runs) for what in inner if what != "stream"},
        **{f"last block {what}": [f"block {i} {what}" for i in last] for what in inner},
        "logits": ["logits"] * len(runs),
    }


def _fit_stress_slopes(
    over: Axis, sizes: tuple[int, ...], runs: list[list[ProbeResult]], what: Literal["eps", "decay"]
) -> list[Slope]:
    roles = list(runs[0][0].measurements[0])
    return [
        fit_slope(over, role, what, sizes, np.array([[[r.measurements[0][role][1]] for r in seeds] for seeds in runs]))
        for role in roles
    ]


def fit_slope(over: Axis, where: str, what: Quantity, sizes: tuple[int, ...], values: np.ndarray[Any, Any]) -> Slope:
    """Fit the slope of log2 of values [size, seed, step].

    It is NaN if a value is zero or not finite while others at its step are not. A step at which all are zero is
    excluded: behind a zero readout no gradient reaches the embedding in step 1.
    """
    moving = values.any(axis=(0, 1))
    used = values[:, :, moving]
    levels = tuple(tuple(float(x) for x in row) for row in np.abs(values).mean(axis=1))
    if used.size == 0:
        return Slope(over, where, what, 0.0, 0.0, 0.0, levels)
    if not ((used > 0) & np.isfinite(used)).all():
        return Slope(over, where, what, math.nan, math.nan, math.nan, levels)
    # Mean over steps: [size, seed].
    heights = np.log2(used).mean(axis=2)
    per_seed = np.polyfit(np.log2(sizes), heights, 1)[0]
    value, n = float(per_seed.mean()), len(per_seed)
    if n == 1:
        return Slope(over, where, what, value, math.nan, math.nan, levels)
    half = float(stats.t.ppf((1 + MASS) / 2, n - 1) * per_seed.std(ddof=1) / math.sqrt(n))
    return Slope(over, where, what, value, value - half, value + half, levels)


def _check_sizes(name: str, given: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(sorted(set(given)))
    if len(chosen) < 3:
        raise ValueError(f"{name}: needed at least three widths or depths for a slope, got {list(chosen)}: add some")
    return chosen


def replace_nonfinite(value: Any) -> Any:
    """Return a copy with null in place of NaN and infinity, which JSON cannot represent."""
    if isinstance(value, dict):
        return {k: replace_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
