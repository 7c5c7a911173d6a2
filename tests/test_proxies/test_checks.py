from __future__ import annotations

import math

import pytest
import torch

from proxies.checks import CoordCheck, Slope, coordinate_check, coordinates
from proxies.config import ProxyConfig
from proxies.model import build

WIDTHS = (32, 64, 128)


@pytest.fixture(scope="module")
def config() -> ProxyConfig:
    return ProxyConfig(base_width=64, d_model=64)


def test_mup_passes_the_coordinate_check(config: ProxyConfig) -> None:
    check = coordinate_check(config, WIDTHS, steps=6)
    assert check.passed, check.text
    assert check.failures == ()
    assert "passed" in check.text


def test_the_standard_parametrization_fails_it(config: ProxyConfig) -> None:
    check = coordinate_check(config.model_copy(update={"parametrization": "standard"}), WIDTHS, steps=6)
    assert not check.passed
    # hidden rates should fall as 1/m and do not: the stream explodes in spite of the norms
    assert check.means["block 1 stream"][1] > 0.6
    assert "too steep" in check.text


def test_every_quantity_is_measured_at_every_step(config: ProxyConfig) -> None:
    check = coordinate_check(config, WIDTHS, seeds=1, steps=2, lr=1e-3)
    of_block = ("attention scores", "attention", "mlp", "stream")
    names = ["embedding", *(f"block {i} {what}" for i in (0, 1) for what in of_block), "logits"]
    assert [(s.where, s.step) for s in check.slopes] == [(name, step) for name in names for step in (1, 2)]
    assert check.lr == 1e-3


def test_the_last_coordinate_is_what_the_model_computes(config: ProxyConfig) -> None:
    model = build(config)
    with torch.no_grad():
        model.readout.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
    seen = coordinates(model, x)
    assert torch.equal(seen["logits"], model(x))
    stream = seen["embedding"] + sum(seen[f"block {i} {branch}"] for i in (0, 1) for branch in ("attention", "mlp"))
    torch.testing.assert_close(seen["block 1 stream"], stream)


def test_a_slope_that_is_not_a_number_is_a_failure() -> None:
    fine, broken = Slope("a", 1, 0.1, 0.1), Slope("b", 1, 0.1, math.nan)
    assert CoordCheck((fine,), WIDTHS, 0.01, 0.5).passed
    assert CoordCheck((fine, broken), WIDTHS, 0.01, 0.5).failures == ("b",)


def test_two_widths_are_not_a_slope(config: ProxyConfig) -> None:
    with pytest.raises(ValueError, match="at least three widths"):
        coordinate_check(config, (32, 64))
    with pytest.raises(ValueError, match="multiple of d_head"):
        coordinate_check(config, (32, 64, 65))
