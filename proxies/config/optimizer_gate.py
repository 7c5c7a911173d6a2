"""Which optimizers may train other widths than the base's: those whose rule is verified, others by a certificate.

A certificate is the JSON file of a coordinate check: `proxies check STUDY.toml --certificate PATH`. No torch here, so
that a study is refused in no time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxies.config.proxy import ProxyConfig

if TYPE_CHECKING:
    pass

# The evidence for each rule of `proxies.model.mup.rules`. "Doubled": a model of twice the width, tiled from the small one, makes
# the same trajectory (arXiv 2602.10545), in tests/test_proxies/test_optimizers.py.
VERIFIED = {
    "adamw": "arXiv 2203.03466; doubled to 1e-12",
    "adamw8bit": "AdamW's; doubled within what 8 bits can say",
    "ademamix": "the step is Adam's with a longer memory; doubled to 1e-12",
    "lion": "a sign has one size, as Adam's step has; doubled to 1e-12",
    "muon": "spectral condition, arXiv 2310.17813; doubled to 1e-12 with the iteration in float64",
    "muon-rms": "the same, over the root that the size of the step grows by; doubled to 1e-12",
    "schedule-free": "the step is Adam's, its averages are linear; doubled to 1e-12",
}

SETTINGS = (
    "optimizer",
    "parametrization",
    "base_width",
    "base_layers",
    "depth_power",
    "n_layers",
    "d_head",
    "q_per_kv",
    "ff_mult",
    "qk_norm",
    "tied",
    "alpha_in",
    "alpha_out",
    "alpha_attn",
)
MEASURED = ("widths", "lr", "seeds", "steps", "passed", "slopes")

STEPS = 10  # of a coordinate check
# Prodigy looks for its rate first: some thirty steps in which nothing moves. SOAP takes its first eigenbases from gradients
# that a zero readout makes zero, so it is Adam until it has turned them a few times, every ten steps.
STEPS_OF = {"prodigy": 60, "soap": 60}
MOVED = 0.01  # of its size: a quantity that has changed by less at the last step says nothing about how changes grow


def certified_settings(config: ProxyConfig) -> dict[str, Any]:
    """What a certificate is about: optimizer, family and multipliers. Widths and searched rates are not."""
    return {name: getattr(config, name) for name in SETTINGS} | {"base_layers": config.base_layers or config.n_layers}


def refusal(config: ProxyConfig, widths: Sequence[int] = ()) -> str | None:
    """Why this width (and `widths` besides) must not be trained with this optimizer; None where it may be.

    Only muP away from its base width claims that a rate transfers. There the optimizer needs a verified rule, or
    `coordinate_check` must name a certificate that passed, of these very settings, over widths that span these and the
    base.
    """
    ends = min(config.d_model, config.base_width, *widths), max(config.d_model, config.base_width, *widths)
    if config.parametrization != "mup" or ends[0] == ends[1] or config.optimizer in VERIFIED:
        return None
    path = config.coordinate_check or f"studies/{config.optimizer}.json"
    wrong = "got none" if config.coordinate_check is None else _faults(Path(path), config, ends)
    if not wrong:
        return None
    command = f"proxies check STUDY.toml --certificate {path}"
    if ends[0] < config.base_width // 2 or ends[1] > 8 * config.base_width:  # beyond the check's own widths
        command += f" --widths {','.join(map(str, _doubling(*ends)))}"
    return (
        f"optimizer {config.optimizer!r} has no verified rule for widths {ends[0]} to {ends[1]}: needed a coordinate check "
        f"that passed, {wrong}: run `{command}`, with coordinate_check = {path!r} in the study"
    )


def _faults(path: Path, config: ProxyConfig, ends: tuple[int, int]) -> str:
    """What is wrong with this file as a certificate for `config` and these widths; empty if nothing is."""
    if not path.is_file():
        return f"got {path}, which does not exist"
    try:
        said = json.loads(path.read_text())
    except ValueError:
        said = None
    expected = certified_settings(config)
    if not isinstance(said, dict) or not {*expected, *MEASURED} <= said.keys():
        return f"got {path}, which is not a certificate"
    other = [f"{name} {said[name]!r}, not {value!r}" for name, value in expected.items() if said[name] != value]
    if other:
        return f"got {path}, which is for " + ", ".join(other)
    if said["passed"] is not True:
        return f"got {path}, which did not pass"
    still = _unmoved(said["slopes"])
    if still:
        return f"got {path}, in which nothing moved at {', '.join(still)} (raise lr)"
    widths = said["widths"] or [math.inf]
    if not (min(widths) <= ends[0] and ends[1] <= max(widths)):
        return f"got {path}, whose widths {widths} do not span {ends[0]} to {ends[1]}"
    return ""


def _unmoved(slopes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Quantities that after the last step of some width were still where they began."""
    last = {(s["over"], s["where"], s["what"]): [steps[-1] for steps in s["levels"]] for s in slopes}
    return [
        where
        for (over, where, what), changes in last.items()
        if (over, what) == ("width", "change")
        and any(c < MOVED * size for c, size in zip(changes, last[over, where, "size"], strict=True))
    ]


def _doubling(low: int, high: int) -> list[int]:
    """At least three widths from `low` on that reach `high`."""
    widths = [low]
    while widths[-1] < high or len(widths) < 3:
        widths.append(2 * widths[-1])
    return widths
