"""Wrong settings and options of the `proxies` commands: sentences that name them, all at once, with exit code 2."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from proxies.__main__ import app
from proxies.config.proxy import ProxyConfig
from proxies.launch.monitor import Excursion
from proxies.trainers.command_family import CommandFamily
from proxies.trainers.proxy_family import ProxyFamily, Target
from scaling.common.validation import explain_errors

runner = CliRunner()
STUDY = """
[search]
tokens = { min = 4_096, max = 12_288 }
[space]
lr = { low = 5e-4, high = 0.1, log = true }
[trainer]
widths = [16]
n_layers = 1
d_head = 16
base_width = 16
seq_len = 32
batch_seqs = 8
warmup_tokens = 1024
corpus = "TEXT"
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    (folder / "text.txt").write_text("red green blue one two three\n" * 3000)
    (folder / "s.toml").write_text(STUDY.replace("TEXT", str(folder / "text.txt")))
    return folder / "s.toml"


def refuse(*arguments: str) -> str:
    """Run a command that must be refused, and return what it says."""
    result = runner.invoke(app, [*arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    for raw in ("validation error", "pydantic", "Input should", "Value error", "Traceback", "input_value"):
        assert raw not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["lr=abc"], "error: lr: needed a number, got 'abc'"),
        (["lr=inf"], "error: lr: needed a finite number, got 'inf'"),
        (["eps=1e400"], "eps: needed a finite number, got '1e400'"),
        (["nope=1"], "nope: unknown setting; known settings: alpha_attn, "),
        (["learning_rate=1"], "learning_rate: unknown setting; did you mean lr?"),
        (["n_layer=1"], "n_layer: unknown setting; did you mean n_layers?"),
        (["n_layers=1.5"], "n_layers: needed a whole number, got '1.5'"),
        (["optimizer=adam"], "got 'adam'; did you mean adamw?"),
        (["compile=perhaps"], "compile: needed true or false, got 'perhaps'"),
        (["beta1=1"], "beta1: needed a number less than 1, got '1'"),
        (["d_head=3"], "d_head: needed an even number"),
        (["seed=99999999999999999999"], "seed: needed a number less than 4,611,686,018,427,387,904"),
        (["d_model=32"], "d_model: the command sets the width itself"),
        (["lr=0.1", "lr=0.2"], "lr: set twice, to '0.1' and to '0.2'"),
        (["lr"], "needed --set name=value, got 'lr'"),
        (["mixture={a=}"], "mixture: needed a table such as {a = 1, b = 2}"),
        (["mixture=3"], "mixture: needed a table, got '3'"),
    ],
)
def test_a_wrong_setting_is_named_in_a_sentence(changes: list[str], expected: str, study: Path) -> None:
    options = [text for change in changes for text in ("--set", change)]
    assert expected in refuse("train", str(study), "--width", "16", "--tokens", "8192", *options)


def test_all_wrong_settings_and_a_wrong_width_are_named_at_once(study: Path) -> None:
    wrong = ["--set", "lr=abc", "--set", "nope=1", "--set", "beta2=7", "--set", "decay"]
    message = refuse("train", str(study), "--width", "65", "--tokens", "8192", *wrong)
    assert "error: 5 mistakes" in message
    for part in (
        "lr: needed a number, got 'abc'",
        "nope: unknown setting",
        "beta2: needed a number less than 1",
        "--set: needed --set name=value, got 'decay'",
        "d_model: must be a multiple of d_head * q_per_kv = 16 (whole heads, whole groups), got 65: "
        "the nearest are 64 and 80",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recipe", "STUDY", "--width", "4097"], "d_model: must be a multiple of d_head * q_per_kv = 16"),
        (["recipe", "STUDY", "--width", "0"], "'--width': needed a number of at least 1, got '0'"),
        (["recipe", "STUDY", "--batch", "0"], "'--batch': needed a number of at least 1, got '0'"),
        (
            ["recipe", "STUDY", "--for", "jsonn"],
            "'--for': needed one of table, json, torchtitan, megatron, got jsonn; ",
        ),
        (["train", "STUDY", "--width", "x", "--tokens", "1"], "'--width': needed a whole number, got 'x'"),
        (["train", "STUDY", "--width", "-16", "--tokens", "8192"], "d_model: needed a number greater than 0, got -16"),
        (["train", "STUDY", "--width", "16", "--tokens", "9000", "--peak-flops", "inf"], "'--peak-flops': needed "),
        (["autolrs", "STUDY", "--width", "16", "--tokens", "8192", "--overhead", "inf"], "'--overhead': needed a "),
        (["check", "STUDY", "--parametrization", "mu"], "parametrization: needed 'mup' or 'standard', got 'mu'"),
        (["check", "STUDY", "--engine", "ddpp"], "got ddpp; did you mean ddp?"),
        (["transfer", "STUDY", "--sizes", "16,17"], "d_model: must be a multiple"),
        (["transfer", "STUDY", "--sizes", "16,32", "--tokens", "100", "--dry-run"], "needed at least 1,280 tokens"),
        (["transfer", "STUDY", "--sizes", "16,32", "--set", "schedule=cosinus"], "got 'cosinus'; did you mean cosine?"),
        (["grow", "--plan", "STUDY", "--pair", "16,32", "--set", "lr=abc", "--set", "nope=1"], "--set: 2 mistakes"),
        (["grow", "x.pt", "--width", "32", "--out", "y.pt", "--noise", "inf"], "'--noise': needed a number"),
    ],
)
def test_a_wrong_option_of_any_command_is_named(arguments: list[str], expected: str, study: Path) -> None:
    assert expected in refuse(*(str(study) if text == "STUDY" else text for text in arguments))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('[trainer]\nweight_decay = "x"\nlrr = 1\nwidth = [3]', "[trainer]: 3 mistakes"),
        ("trainer = 3", "needed a table [trainer], got trainer = 3"),
        ('[trainer]\nuse = "proxies:CommandFamily"\ncommand = "x"', "one whose runs a command trains"),
        ('[trainer]\nuse = "my.module:Mine"\nfoo = 1', "use = 'my.module:Mine'; needed a study of proxies:ProxyFamily"),
        ("[[[", "is not TOML"),
    ],
)
def test_a_wrong_study_is_named_with_its_table(table: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text(table)
    assert expected in refuse("train", str(tmp_path / "wrong.toml"), "--width", "16", "--tokens", "8192")


def test_a_wrong_target_is_named_with_its_table(study: Path, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(study.read_text() + "[target]\nd_model = 32\ntokens = -1\nshrink = nan\n")
    for command in (["launch"], ["grow", "--plan"]):
        message = refuse(*command, str(tmp_path / "t.toml"))
        assert "[target]: 2 mistakes" in message
        assert "shrink: needed a finite number, got nan" in message


def list_number_settings(model: type[ProxyConfig] | type[ProxyFamily]) -> list[str]:
    """Return the settings that are single numbers."""
    schema = model.model_json_schema()["properties"]
    kinds = {name: [s, *s.get("anyOf", [])] for name, s in schema.items()}
    return [name for name, options in kinds.items() if {o.get("type") for o in options} & {"number", "integer"}]


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_no_setting_of_a_proxy_is_an_infinite_number_or_none(number: float) -> None:
    for model in (ProxyConfig, ProxyFamily):
        names = list_number_settings(model)
        assert {"weight_decay", "embed_std", "lr", "power_b", "seed"} <= set(names)
        with pytest.raises(ValidationError) as caught:
            model.model_validate(dict.fromkeys(names, number))
        problems = {p.split(":")[0]: p for p in explain_errors(caught.value, model)}
        assert set(problems) >= set(names)
        assert problems["weight_decay"] == f"weight_decay: needed a finite number, got {number}"
    with pytest.raises(ValidationError, match="finite"):
        Target.model_validate({"d_model": 64, "tokens": 1000, "noise": abs(number)})
    table = {"command": "x {tokens} {lr}", "sizes": ({"N": 100.0},)}
    with pytest.raises(ValidationError, match="finite"):
        CommandFamily(**table, fixed={"lr": number})
    with pytest.raises(ValidationError, match="finite"):
        CommandFamily(**table, tokens_per_second=number)
    with pytest.raises(ValueError, match="tokens: needed a finite positive number"):
        CommandFamily(**table).target(N=100.0, tokens=number)


def test_every_setting_has_a_description_in_the_schema() -> None:
    for model in (ProxyConfig, ProxyFamily):
        properties = model.model_json_schema()["properties"]
        assert [name for name, entry in properties.items() if not entry.get("description")] == []
    assert ProxyConfig.model_json_schema()["properties"]["cooldown"]["description"] == (
        "Share of a run's tokens spent in the cooldown."
    )


def test_a_diverged_run_prints_json_with_null(study: Path) -> None:
    result = runner.invoke(app, ["train", str(study), "--width", "16", "--tokens", "8192", "--set", "lr=1e9"])
    assert result.exit_code == 1
    lines = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    assert lines[-1]["diverged"] is True
    assert lines[-1]["loss"] is None


def test_a_recipe_without_decay_is_json(study: Path) -> None:
    options = ["--set", "weight_decay=0", "--tuned-tokens", "10000", "--tokens", "20000", "--for", "json"]
    result = runner.invoke(app, ["recipe", str(study), *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout, parse_constant=pytest.fail)["decay_timescale"] is None


def test_an_excursion_with_a_loss_that_is_none_is_json_and_is_read_back() -> None:
    from pydantic import TypeAdapter

    excursion = Excursion(100, math.nan, 1.0, 2.0, 0.5)
    assert json.loads(excursion.tag, parse_constant=pytest.fail)["loss"] is None
    assert math.isnan(TypeAdapter(Excursion).validate_json(excursion.tag).loss)
