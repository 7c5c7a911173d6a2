"""The coordinate check: its arithmetic by hand, and that it fails in the right place when a rule is broken."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from proxies.__main__ import app
from proxies.cli.shared import parse_numbers
from proxies.config.proxy import ProxyConfig
from proxies.diagnostics.coord_check import CoordCheck, Slope, coordinate_check, fit_slope, fit_slopes
from proxies.diagnostics.coord_probe import ProbeResult, ProbeSpec, compute_coordinates, measure_gradient_scales
from proxies.diagnostics.figures import draw_check
from proxies.model import mup
from proxies.model.mup import ParameterRule, Role
from proxies.model.transformer import Block, build

WIDTHS = (32, 64, 128)


def make_tiny_config(**changes: Any) -> ProxyConfig:
    return ProxyConfig(base_width=32, d_model=32, d_head=8, seq_len=16, vocab=256, **changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("all the world's a stage, and all the men and women merely players " * 400)
    return str(path)


def make_slope(where: str, value: float, low: float = math.nan, high: float = math.nan) -> Slope:
    return Slope("width", where, "size", value, low, high, ((1.0,), (1.0,), (1.0,)))


def make_check(
    *slopes: Slope, losses: tuple[tuple[float, ...], ...] = ((3.0, 3.1), (2.9, 3.0), (2.8, 2.9))
) -> CoordCheck:
    return CoordCheck(slopes, WIDTHS, (), 0.01, 10, 2, "plain", losses)


def test_the_slope_of_a_power_law_is_its_exponent_with_students_interval() -> None:
    widths = (32, 64, 128, 256)
    exponents = np.array([0.2, 0.3, 0.7])
    values = 5.0 * np.array(widths)[:, None, None] ** exponents[None, :, None] * np.ones((1, 1, 4))
    slope = fit_slope("width", "a", "size", widths, values)
    assert slope.value == pytest.approx(0.4)
    # The first factor is Student's t with 2 degrees of freedom at 97.5 %, from a table.
    half = 4.302652729911275 * math.sqrt(0.07) / math.sqrt(3)
    assert (slope.low, slope.high) == pytest.approx((0.4 - half, 0.4 + half))
    assert np.array(slope.levels).shape == (4, 4)


def test_a_step_in_which_nothing_changes_is_excluded_and_a_single_zero_is_a_failure() -> None:
    values = np.ones((3, 2, 2)) * np.array(WIDTHS)[:, None, None]
    values[:, :, 0] = 0
    assert fit_slope("width", "a", "change", WIDTHS, values).value == pytest.approx(1.0)
    assert fit_slope("width", "a", "change", WIDTHS, 0 * values).value == 0
    values[1, 1, 1] = 0
    assert math.isnan(fit_slope("width", "a", "change", WIDTHS, values).value)
    assert fit_slope("width", "a", "change", WIDTHS, values).steep


@pytest.mark.parametrize(
    ("value", "low", "high", "steep"),
    [
        # The interval is not beyond 1/4.
        (0.4, 0.2, 0.6, False),
        (0.4, 0.3, 0.5, True),
        (-0.4, -0.5, -0.3, True),
        (0.51, -3.0, 4.0, True),
        (-0.51, -3.0, 4.0, True),
        (0.24, 0.23, 0.25, False),
        # One seed gives no interval.
        (0.49, math.nan, math.nan, False),
        (math.nan, math.nan, math.nan, True),
        (math.inf, math.inf, math.inf, True),
    ],
)
def test_which_slopes_are_too_steep(value: float, low: float, high: float, steep: bool) -> None:
    check = make_check(make_slope("a", 0.0), make_slope("b", value, low, high))
    assert check.passed is not steep
    assert check.modules == {"a": True, "b": not steep}
    assert check.failures == (("b size over width",) if steep else ())
    assert ("too steep" in check.text) is steep


def test_wider_is_worse_only_beyond_the_noise_of_seeds() -> None:
    # The standard deviation of a seed is 0.0707, so a rise up to 0.141 is noise.
    assert make_check(losses=((3.0, 3.1), (3.1, 3.2), (2.8, 2.9))).wider_is_worse == ()
    assert make_check(losses=((3.0, 3.1), (3.2, 3.3), (2.8, 2.9))).wider_is_worse == (64,)
    assert make_check(losses=((3.0, 3.1), (2.9, 3.0), (math.nan, 2.9))).wider_is_worse == (128,)


def test_a_change_within_rounding_is_no_change() -> None:
    def make_result(change: float) -> ProbeResult:
        name = "logits"
        return ProbeResult(({name: (1.0, 0.0)}, {name: (1.0, change)}, {name: (1.0, 0.5)}), (3.0, 3.0))

    (_, early, change) = fit_slopes("width", WIDTHS, [[make_result(1e-8 * w**2)] for w in WIDTHS])
    assert (early.value, change.value) == pytest.approx((0.0, 0.0))
    (_, early, change) = fit_slopes("width", WIDTHS, [[make_result(1e-2 * w)] for w in WIDTHS])
    # The mean of a step of slope 1 and one of slope 0.
    assert (early.value, change.value) == pytest.approx((0.5, 0.5))


def test_over_depth_the_first_and_the_last_block_are_measured(text: str) -> None:
    check = coordinate_check(
        make_tiny_config(corpus=text, n_layers=1, base_layers=1), (16, 32, 64), depths=(1, 2, 3), seeds=1, steps=2
    )
    deep = [s.where for s in check.slopes if s.over == "depth" and s.what == "size"]
    inner = ("attention scores", "attention", "mlp")
    # One layer's share of the stream falls as 1 / depth if all is well, so only the whole stream is measured.
    first, last = ([f"{which} block {what}" for what in inner] for which in ("first", "last"))
    assert deep == ["embedding", *first, *last, "last block stream", "logits"]
    wide = [s.where for s in check.slopes if s.over == "width" and s.what == "size"]
    assert wide == ["embedding", *(f"block 0 {what}" for what in (*inner, "stream")), "logits"]
    assert check.depths == (1, 2, 3)
    assert "slope in log2 depth (1, 2, 3)" in check.text


def test_the_last_coordinate_is_what_the_model_computes() -> None:
    model = build(ProxyConfig(base_width=64, d_model=64, base_layers=1))
    with torch.no_grad():
        model.readout.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(1))
    coordinates = compute_coordinates(model, x)
    torch.testing.assert_close(coordinates["logits"], model(x))
    branches = sum(coordinates[f"block {i} {branch}"] for i in (0, 1) for branch in ("attention", "mlp"))
    torch.testing.assert_close(coordinates["block 1 stream"], coordinates["embedding"] + 0.5 * branches)


def test_the_scale_of_a_gradient_is_its_root_mean_square(text: str) -> None:
    from proxies.data.mixture import open_data
    from proxies.model.transformer import compute_loss

    config = make_tiny_config(corpus=text, tied=True, embed_std=0.1)
    scales = measure_gradient_scales(ProbeSpec(config, "eps", 1, 4))
    model = build(config)
    compute_loss(model, *open_data(config).windows.batch(0, 4)).backward()
    assert scales["embedding"] == pytest.approx(float(model.embed.grad.square().mean().sqrt()), rel=1e-5)
    assert set(scales) == {"embedding", "hidden", "norm", "final_norm"}


def test_a_check_can_be_written_as_json_and_drawn(tmp_path: Path) -> None:
    check = make_check(make_slope("a", math.nan), make_slope("b", 0.1, 0.0, 0.2))
    written = json.loads(json.dumps(check.json, allow_nan=False))
    assert written["passed"] is False
    assert [slope["value"] for slope in written["slopes"]] == [None, 0.1]
    draw_check(check, tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"


def test_invalid_arguments_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    config = ProxyConfig(base_width=64, d_model=64)
    with pytest.raises(ValueError, match="at least three"):
        coordinate_check(config, (32, 64))
    with pytest.raises(ValueError, match="depths: needed at least three"):
        coordinate_check(config, WIDTHS, depths=(2, 4))
    with pytest.raises(ValueError, match="multiple of d_head"):
        coordinate_check(config, (32, 64, 65))
    with pytest.raises(ValueError, match="one seed and one step"):
        coordinate_check(config, WIDTHS, seeds=0)
    with pytest.raises(ValueError, match=r"out of plain, compile, ddp, fsdp2, got 'jax'"):
        coordinate_check(config, WIDTHS, engine="jax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a multiple of 3 sequences for 3 ranks"):
        coordinate_check(config, WIDTHS, engine="ddp", ranks=3)
    with pytest.raises(ValueError, match="--widths: needed whole numbers"):
        parse_numbers("--widths", "32;64")
    study = tmp_path / "small.toml"
    study.write_text("[trainer]\nwidths = [32, 64]\n")
    result = CliRunner().invoke(app, ["check", str(study), "--plot", str(tmp_path / "check.gif")])
    assert result.exit_code == 2


@pytest.mark.slow
def test_the_command_prints_what_the_function_returns(tmp_path: Path, text: str) -> None:
    study = tmp_path / "small.toml"
    study.write_text(f'[trainer]\nwidths = [32]\nbase_width = 32\nd_head = 8\nseq_len = 16\ncorpus = "{text}"\n')
    options = ["--widths", "16,32,64", "--seeds", "1", "--json", "--plot", str(tmp_path / "c.svg")]
    result = CliRunner().invoke(app, ["check", str(study), *options])
    printed = json.loads(result.stdout)
    direct = coordinate_check(make_tiny_config(corpus=text), (16, 32, 64), seeds=1)
    assert printed["slopes"] == json.loads(json.dumps(direct.json))["slopes"]
    assert result.exit_code == (0 if direct.passed else 1)
    assert "<svg" in (tmp_path / "c.svg").read_text()


# Rules broken on purpose, one at a time: the change, the failures that it must cause, and the ending of the names of
# the failures that count.

Change = Callable[[Role, ParameterRule, ProxyConfig], dict[str, float]]
BROKEN: dict[str, tuple[Change, set[str], str]] = {
    "eps forgotten": (
        lambda role, rule, c: {"eps": c.eps},
        {f"{role} eps over width" for role in ("embedding", "hidden", "norm", "final_norm", "readout")},
        "",
    ),
    "decay not scaled": (
        lambda role, rule, c: {"weight_decay": c.weight_decay} if role == "hidden" else {},
        {"hidden decay over width"},
        "",
    ),
    "embedding lr / m": (
        lambda role, rule, c: {"lr": rule.lr / c.m} if role == "embedding" else {},
        {"embedding change over width"},
        "",
    ),
    "readout not divided by m": (
        lambda role, rule, c: {"multiplier": c.alpha_out} if role == "readout" else {},
        {"logits early over width"},
        " early over width",
    ),
    "readout lr / m": (
        lambda role, rule, c: {"lr": rule.lr / c.m} if role == "readout" else {},
        {"logits early over width"},
        " early over width",
    ),
    "hidden lr not scaled": (
        lambda role, rule, c: {"lr": c.lr} if role == "hidden" else {},
        {f"block {i} stream {what} over width" for i in (0, 1) for what in ("size", "change")},
        " over width",
    ),
    "hidden init not scaled": (
        lambda role, rule, c: {"init_std": c.init_std} if role == "hidden" else {},
        {"block 0 mlp size over width", "block 1 mlp size over width"},
        " over width",
    ),
    "hidden init / m": (
        lambda role, rule, c: {"init_std": c.init_std / c.m} if role == "hidden" else {},
        {"block 0 mlp size over width", "block 1 mlp size over width"},
        " over width",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_fails_at_its_module(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, expected, ending = BROKEN[what]
    compute_rules = mup.compute_rules
    monkeypatch.setattr(
        mup,
        "compute_rules",
        lambda config: {k: replace(v, **change(k, v, config)) for k, v in compute_rules(config).items()},
    )
    check = coordinate_check(ProxyConfig(), WIDTHS)
    failed = {f for f in check.failures if f.endswith(ending)}
    if ending == " over width":
        assert expected <= failed, check.text
    else:
        # These and no others of the kind.
        assert failed == expected, check.text


@pytest.mark.slow
def test_an_attention_scale_that_falls_with_width_fails_at_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Block.__init__

    def init_with_wrong_scale(self: Block, config: ProxyConfig) -> None:
        init(self, config)
        # The scale becomes 1 / sqrt(d_model), as if the heads grew.
        self.scale /= math.sqrt(config.m)

    monkeypatch.setattr(Block, "__init__", init_with_wrong_scale)
    check = coordinate_check(ProxyConfig(), WIDTHS)
    assert "block 0 attention scores size over width" in check.failures, check.text
    assert not [f for f in check.failures if f.startswith(("embedding", "logits", "hidden"))], check.text


@pytest.mark.slow
def test_mup_passes_and_the_standard_table_fails() -> None:
    check = coordinate_check(ProxyConfig(), (32, 64, 128, 256))
    assert check.passed, check.text
    standard = coordinate_check(ProxyConfig(parametrization="standard"), (32, 64, 128, 256))
    # Hidden rates should fall as 1/m and do not, so the stream explodes in spite of the norms.
    assert {f"block {i} stream {what} over width" for i in (0, 1) for what in ("size", "change")} <= set(
        standard.failures
    )


@pytest.mark.slow
def test_over_depth_completep_is_flat_and_no_rule_is_not() -> None:
    completep = coordinate_check(ProxyConfig(base_layers=2), WIDTHS, depths=(2, 4, 8))
    assert not [f for f in completep.failures if f.endswith("over depth")], completep.text
    no_rule = coordinate_check(ProxyConfig(), WIDTHS, depths=(2, 4, 8))
    assert "last block stream change over depth" in no_rule.failures, no_rule.text
