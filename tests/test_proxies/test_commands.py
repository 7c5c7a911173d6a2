"""The command `proxies recipe`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from proxies.__main__ import app
from proxies.config.proxy import ProxyConfig
from proxies.model.mup import compute_rules

runner = CliRunner()
QUICKSTART = "studies/quickstart.toml"


def test_a_recipe_is_the_table_at_the_requested_width() -> None:
    result = runner.invoke(app, ["recipe", QUICKSTART, "--width", "256", "--set", "lr=0.01", "--for", "json"])
    assert result.exit_code == 0, result.output
    gate = json.loads(result.stdout)["parameters"]["gate"]
    expected = compute_rules(ProxyConfig(d_model=256, base_width=64, lr=0.01))["hidden"]
    assert (gate["lr"], gate["weight_decay"]) == pytest.approx((expected.lr, expected.weight_decay))


def test_a_recipe_for_more_tokens_has_a_lower_learning_rate() -> None:
    result = runner.invoke(
        app, ["recipe", QUICKSTART, "--set", "lr=0.01", "--tuned-tokens", "200000", "--tokens", "2000000"]
    )
    assert result.exit_code == 0, result.output
    assert f"{0.01 * 10**-0.32:.4g}" in result.stdout
    assert "2,000,000 tokens" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "2000000"], "needed --tuned-tokens"),
        (["--batch", "5000"], "where 1 - beta reaches 1"),
        (["--set", "lr"], "needed --set name=value"),
        (["--set", "lr=-1"], "greater than 0"),
        (["--width", "65"], "d_model: must be a multiple"),
        (["--for", "torchtitan", "--set", "optimizer=lion"], "got 'lion'"),
    ],
)
def test_invalid_options_of_recipe_exit_with_code_2(options: list[str], message: str) -> None:
    result = runner.invoke(app, ["recipe", QUICKSTART, *options])
    assert result.exit_code == 2
    assert message in result.stderr
