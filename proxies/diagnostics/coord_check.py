"""Is the parametrization right? The coordinate check: how large activations get must not depend on width, nor on depth."""

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
    ProbeSpec,
    ProbeResult,
    run_probes,
    measure_gradient_scales,
)

Axis = Literal["width", "depth"]
Quantity = Literal["size", "early", "change", "eps", "decay"]
CLEAR_SLOPE = 0.25  # a slope is too steep when its whole interval lies beyond this
MAX_SLOPE = 0.5  # or its value beyond this
MASS = 0.95  # of the interval over seeds
STRESS_STEPS = 5
# Steps of the logits alone: later the loss corrects them if they move too far, and the blocks show it instead.
EARLY = 2
ROUNDING = 1e-3  # a change below this share of the size is no change: QK-norm undoes decay but for rounding


@dataclass(frozen=True)
class Slope:
    """How a quantity grows: the slope of its log2 against log2 width or depth, mean over steps and seeds."""

    over: Axis
    where: str  # such as "block 0 attention"; under stress a role, such as "hidden"
    what: Quantity  # mean |x|; mean |x - x at step 0| (early: in steps 1 and 2); under stress, update and decay
    value: float
    low: float  # of the t-interval over seeds; nan with one seed
    high: float
    levels: tuple[tuple[float, ...], ...]  # the quantity itself: per size its steps, geometric mean over seeds

    @property
    def steep(self) -> bool:
        """Beyond the limits, or not a number."""
        if not abs(self.value) <= MAX_SLOPE:
            return True
        return self.low > CLEAR_SLOPE or self.high < -CLEAR_SLOPE


@dataclass(frozen=True)
class CoordCheck:
    """The slopes of every quantity, and whether they are flat enough."""

    slopes: tuple[Slope, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]  # empty: not looked at
    lr: float  # at base width
    steps: int
    seeds: int
    engine: ProbeEngine
    losses: tuple[tuple[float, ...], ...]  # per width and seed: training loss of the last three steps, nats per token

    @property
    def failures(self) -> tuple[str, ...]:
        """What depends on width or depth: module (or role), quantity, axis."""
        return tuple(f"{s.where} {s.what} over {s.over}" for s in self.slopes if s.steep)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def modules(self) -> dict[str, bool]:
        """Each module, or role under stress: True if all its slopes are flat."""
        flat: dict[str, bool] = {}
        for s in self.slopes:
            flat[s.where] = flat.get(s.where, True) and not s.steep
        return flat

    @property
    def wider_is_worse(self) -> tuple[int, ...]:
        """Widths whose training loss is above that of the next smaller by more than two standard deviations of a seed."""
        values = np.array(self.losses)
        sd = values.std(axis=1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values))
        most = 2 * np.maximum(sd[1:], sd[:-1])
        rise = np.diff(values.mean(axis=1))
        return tuple(w for w, up, noise in zip(self.widths[1:], rise, most, strict=True) if not up <= noise)

    @property
    def text(self) -> str:
        """A table with one line per quantity, and a verdict."""
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
        worse = (
            f", rises at {', '.join(map(str, self.wider_is_worse))}"
            if self.wider_is_worse
            else ", no rise beyond the seeds' spread"
        )
        lines.append(f"training loss after {self.steps} steps by width: {means}{worse}")
        verdict = "passed" if self.passed else f"failed, activations depend on size: {'; '.join(self.failures)}"
        lines.append(f"{self.seeds} seeds, lr {self.lr:g} at base width, engine {self.engine}: {verdict}")
        return "\n".join(lines)

    @property
    def json(self) -> dict[str, Any]:
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
    """Train each width (and depth) for a few steps on the same data and fit how every activation scales with it.

    Measured before the final norm as well as after, since a norm hides an exploding stream: embeddings, the output of
    every branch, the stream after every block, attention scores, logits (coordinate check of arXiv 2203.03466,
    appendix D.1). Two short runs under stress show what ten steps do not: eps raised to each role's RMS gradient at
    base size, where the update must still not depend on width, and a decay of 5 % a step.

    A slope is taken for each seed, mean over steps 1 to `steps`. It fails where the whole t-interval over seeds is
    beyond 1/4 or the value is beyond 1/2 (docs/math.md §6 has the false alarms and the power of this rule).

    widths: at least three, whole heads each; half the base width to four times it unless given.
    depths: numbers of layers at base width, at least three; 1, 2, 4 and 8 times base_layers if the configuration has
        one, none otherwise. The first and the last block are watched.
    lr: at base width, constant; three times that of `config` unless given, since at a gentle rate a wrong
        parametrization looks right for ten steps.
    engine, ranks: what runs the steps; the quantities do not depend on it. double: float64.
    """
    base = config.base_width
    wide = _sizes("widths", widths if widths is not None else (base // 2, base, 2 * base, 4 * base))
    usual = tuple(config.base_layers * 2**i for i in range(4)) if config.base_layers else ()
    deep = _sizes("depths", depths) if depths is not None and len(depths) else usual if depths is None else ()
    if seeds < 1 or steps < 1:
        raise ValueError(f"needed at least one seed and one step, got {seeds} and {steps}")
    rate = 3 * config.lr if lr is None else lr

    def member(**size: int) -> ProxyConfig:
        return ProxyConfig.model_validate(config.model_dump() | {"lr": rate} | size)

    axes: list[tuple[Axis, tuple[int, ...], list[ProxyConfig]]]
    axes = [("width", wide, [member(d_model=w) for w in wide])]
    if deep:
        axes.append(("depth", deep, [member(d_model=base, n_layers=n) for n in deep]))
    start = ProbeSpec(
        member(d_model=base, n_layers=config.base_layers or config.n_layers), "eps", STRESS_STEPS, batch_seqs
    )
    stress = _stress(start)

    plans: list[tuple[str, int, int, str]] = []
    watches: list[ProbeSpec] = []
    for over, sizes, members in axes:
        for size, one in zip(sizes, members, strict=True):
            for seed in range(seeds):
                seeded = one.model_copy(update={"seed": config.seed + seed})
                plans.append((over, size, seed, "activations"))
                watches.append(ProbeSpec(seeded, "activations", steps, batch_seqs, double=double))
                for kind, scales in stress.items():
                    plans.append((over, size, seed, kind))
                    watches.append(ProbeSpec(seeded, kind, STRESS_STEPS, batch_seqs, scales, double))
    trails = dict(zip(plans, run_probes(watches, engine, ranks), strict=True))

    slopes: list[Slope] = []
    for over, sizes, _ in axes:
        runs = [[trails[over, size, seed, "activations"] for seed in range(seeds)] for size in sizes]
        slopes += fit_slopes(over, sizes, runs)
        for kind in stress:
            runs = [[trails[over, size, seed, kind] for seed in range(seeds)] for size in sizes]
            slopes += _stress_slopes(over, sizes, runs, kind)
    losses = tuple(
        tuple(float(np.mean(trails["width", w, s, "activations"].losses[-3:])) for s in range(seeds)) for w in wide
    )
    return CoordCheck(tuple(slopes), wide, deep, rate, steps, seeds, engine, losses)


def _stress(start: ProbeSpec) -> dict[Literal["eps", "decay"], dict[str, float]]:
    """The stresses that can act on this optimizer, with their scales at base size."""
    config = start.config
    kinds: dict[Literal["eps", "decay"], dict[str, float]] = {}
    if config.optimizer in DIVIDE_BY_EPS:
        kinds["eps"] = measure_gradient_scales(start)
    if config.weight_decay > 0 and config.optimizer in DECAY_BY_RATE:
        kinds["decay"] = {"factor": DECAYED / (config.lr * config.weight_decay)}
    return kinds


def fit_slopes(over: Axis, sizes: tuple[int, ...], runs: list[list[ProbeResult]]) -> list[Slope]:
    """Size and change of every quantity that all sizes share, and the early change of the logits."""
    found = []
    for where, names in _shared(over, runs).items():
        # size of the model, seed, step, (size, change); step 0 has no change, and its size is not that of training
        seen = np.array(
            [[[s[name] for s in t.seen[1:]] for t in trails] for name, trails in zip(names, runs, strict=True)]
        )
        size, change = seen[..., 0], seen[..., 1]
        change = np.where((change < ROUNDING * size).all(axis=(0, 1)), 0.0, change)
        found.append(fit_slope(over, where, "size", sizes, size))
        if where == "logits":
            found.append(fit_slope(over, where, "early", sizes, change[:, :, :EARLY]))
        found.append(fit_slope(over, where, "change", sizes, change))
    return found


def _shared(over: Axis, runs: list[list[ProbeResult]]) -> dict[str, list[str]]:
    """The name of each quantity at every size. Over depth: the first and the last block's, and all outside blocks.

    Not the stream after the first block: one layer's share of it falls as 1 / depth where all is well.
    """
    named = [list(trails[0].seen[0]) for trails in runs]
    if over == "width":
        return {name: [name] * len(runs) for name in named[0]}
    inner = [name.removeprefix("block 0 ") for name in named[0] if name.startswith("block 0 ")]
    last = [sum(name.endswith(" stream") for name in names) - 1 for names in named]
    return {
        "embedding": ["embedding"] * len(runs),
        **{f"first block {what}": [f"block 0 {what}"] * len(runs) for what in inner if what != "stream"},
        **{f"last block {what}": [f"block {i} {what}" for i in last] for what in inner},
        "logits": ["logits"] * len(runs),
    }


def _stress_slopes(
    over: Axis, sizes: tuple[int, ...], runs: list[list[ProbeResult]], what: Literal["eps", "decay"]
) -> list[Slope]:
    roles = list(runs[0][0].seen[0])
    return [
        fit_slope(over, role, what, sizes, np.array([[[t.seen[0][role][1]] for t in trails] for trails in runs]))
        for role in roles
    ]


def fit_slope(over: Axis, where: str, what: Quantity, sizes: tuple[int, ...], values: np.ndarray[Any, Any]) -> Slope:
    """The slope of log2 of values [size, seed, step]; nan if one is zero or not finite while others at its step are not.

    A step at which all are zero is left out: behind a zero readout no gradient reaches the embedding in step 1.
    """
    moving = values.any(axis=(0, 1))
    used = values[:, :, moving]
    shown = tuple(tuple(float(x) for x in row) for row in np.abs(values).mean(axis=1))
    if used.size == 0:
        return Slope(over, where, what, 0.0, 0.0, 0.0, shown)
    if not ((used > 0) & np.isfinite(used)).all():
        return Slope(over, where, what, math.nan, math.nan, math.nan, shown)
    heights = np.log2(used).mean(axis=2)  # size, seed
    per_seed = np.polyfit(np.log2(sizes), heights, 1)[0]
    value, n = float(per_seed.mean()), len(per_seed)
    if n == 1:
        return Slope(over, where, what, value, math.nan, math.nan, shown)
    half = float(stats.t.ppf((1 + MASS) / 2, n - 1) * per_seed.std(ddof=1) / math.sqrt(n))
    return Slope(over, where, what, value, value - half, value + half, shown)


def _sizes(name: str, given: Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(sorted(set(given)))
    if len(chosen) < 3:
        raise ValueError(f"{name}: needed at least three widths or depths for a slope, got {list(chosen)}: add some")
    return chosen


def replace_nonfinite(value: Any) -> Any:
    """The same with null for what JSON cannot say: nan and infinity."""
    if isinstance(value, dict):
        return {k: replace_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
