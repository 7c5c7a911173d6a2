"""Which optimizers may train at widths other than the base width.

Optimizers whose rule over width is verified may; all others need a certificate, the JSON file of a passed coordinate
check: `proxies check STUDY.toml --certificate PATH`. This module does not import torch, so a study is refused quickly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxies.config.proxy import ProxyConfig

# The evidence for each rule of `proxies.model.mup.compute_rules`. "Doubled" means that a model of twice the width,
# tiled from the small one, follows the same trajectory (arXiv 2602.10545); see tests/test_proxies/test_optimizers.py.
VERIFIED_RULES = {
    "adamw": "arXiv 2203.03466; doubled to 1e-12",
    "adamw8bit": "AdamW's; doubled within the resolution of 8 bits",
    "ademamix": "the step is Adam's with a longer memory; doubled to 1e-12",
    "lion": "a sign has one size, as Adam's step has; doubled to 1e-12",
    "muon": "spectral condition, arXiv 2310.17813; doubled to 1e-12 with the iteration in float64",
    "muon-rms": "Muon's, divided by the square root by which the step size grows; doubled to 1e-12",
    "schedule-free": "the step is Adam's, its averages are linear; doubled to 1e-12",
}

# Settings that a certificate records and that a study must share. Widths and searched rates are not among them.
CERTIFIED_SETTINGS = (
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
# Results of the check that a certificate records.
MEASURED_FIELDS = ("widths", "lr", "seeds", "steps", "passed", "slopes")

# Steps of a coordinate check.
CHECK_STEPS = 10
# Prodigy searches for its rate first, for some thirty steps in which nothing moves. SOAP takes its first eigenbases
# from gradients that a zero readout makes zero, so it is Adam until it has updated them a few times, every ten steps.
CHECK_STEPS_BY_OPTIMIZER = {"prodigy": 60, "soap": 60}
# A quantity that has changed by less than this share of its size at the last step shows nothing about how changes grow.
MIN_RELATIVE_CHANGE = 0.01


def get_certified_settings(config: ProxyConfig) -> dict[str, Any]:
    """Return the settings that a certificate is about: optimizer, family and multipliers."""
    settings = {name: getattr(config, name) for name in CERTIFIED_SETTINGS}
    return settings | {"base_layers": config.base_layers or config.n_layers}


def explain_refusal(config: ProxyConfig, widths: Sequence[int] = ()) -> str | None:
    """Return why a width must not be trained with an optimizer, or None if it may.

    Only muP away from its base width claims that a rate transfers. There the optimizer needs a verified rule, or
    `coordinate_check` must name a certificate that passed, for the same settings, over widths that span these widths
    and the base width.

    Args:
        config: The proxy to train.
        widths: Further widths of its family.

    Returns:
        The reason and the command that makes a certificate, or None.
    """
    narrowest = min(config.d_model, config.base_width, *widths)
    widest = max(config.d_model, config.base_width, *widths)
    if config.parametrization != "mup" or narrowest == widest or config.optimizer in VERIFIED_RULES:
        return None
    path = config.coordinate_check or f"studies/{config.optimizer}.json"
    if config.coordinate_check is None:
        problem = "got none"
    else:
        problem = _find_certificate_problem(Path(path), config, narrowest, widest)
    if not problem:
        return None
    command = f"proxies check STUDY.toml --certificate {path}"
    # Widths that the check does not cover by default must be named.
    if narrowest < config.base_width // 2 or widest > 8 * config.base_width:
        command += f" --widths {','.join(map(str, _make_doubling_widths(narrowest, widest)))}"
    return (
        f"optimizer {config.optimizer!r} has no verified rule for widths {narrowest} to {widest}: needed a coordinate "
        f"check that passed, {problem}: run `{command}`, with coordinate_check = {path!r} in the study"
    )


def _find_certificate_problem(path: Path, config: ProxyConfig, narrowest: int, widest: int) -> str:
    """Return what is wrong with a file as a certificate for `config` and these widths; empty if nothing is."""
    if not path.is_file():
        return f"got {path}, which does not exist"
    try:
        certificate = json.loads(path.read_text())
    except ValueError:
        certificate = None
    expected = get_certified_settings(config)
    if not isinstance(certificate, dict) or not {*expected, *MEASURED_FIELDS} <= certificate.keys():
        return f"got {path}, which is not a certificate"
    differences = [
        f"{name} {certificate[name]!r}, not {value!r}" for name, value in expected.items() if certificate[name] != value
    ]
    if differences:
        return f"got {path}, which is for " + ", ".join(differences)
    if certificate["passed"] is not True:
        return f"got {path}, which did not pass"
    unmoved = _find_unmoved(certificate["slopes"])
    if unmoved:
        return f"got {path}, in which nothing moved at {', '.join(unmoved)} (raise lr)"
    widths = certificate["widths"] or [math.inf]
    if not (min(widths) <= narrowest and widest <= max(widths)):
        return f"got {path}, whose widths {widths} do not span {narrowest} to {widest}"
    return ""


def _find_unmoved(slopes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the quantities that, at some width, had not changed by the last step."""
    last = {
        (slope["over"], slope["where"], slope["what"]): [steps[-1] for steps in slope["levels"]] for slope in slopes
    }
    return [
        where
        for (over, where, what), changes in last.items()
        if (over, what) == ("width", "change")
        and any(
            change < MIN_RELATIVE_CHANGE * size for change, size in zip(changes, last[over, where, "size"], strict=True)
        )
    ]


def _make_doubling_widths(low: int, high: int) -> list[int]:
    """Return at least three widths, from `low` on, each twice the one before, that reach `high`."""
    widths = [low]
    while widths[-1] < high or len(widths) < 3:
        widths.append(2 * widths[-1])
    return widths
