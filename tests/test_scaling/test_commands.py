"""Run `scaling fit` and `scaling recommend` as a user does, on tables of planted runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from scaling.__main__ import app
from scaling.advice.recommendation import recommend
from scaling.report.fit_summary import format_summary, summarize_fits
from scaling.runs.io import save_runs
from scaling.runs.table import check_runs
from tests.test_scaling.test_recommend import FLOOR, RUNS, table


def run(*words: str) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def parse_strict_json(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tables") / "runs.csv"
    save_runs(check_runs(RUNS), path)
    return str(path)


def write_table(runs: pd.DataFrame, folder: Path) -> str:
    save_runs(check_runs(runs), folder / "runs.jsonl")
    return str(folder / "runs.jsonl")


def test_recommend_answers_as_the_function_does(source: str) -> None:
    done = run("recommend", source, "--params", "800k", "--tokens", "5e6", "--no-next", "--json")
    assert done.exit_code == 0
    printed, answer = parse_strict_json(done.stdout), recommend(RUNS, N=8e5, D=5e6)
    assert printed["trustworthy"] is True
    assert (printed["lr"], printed["loss_interval"]) == (answer.lr, list(answer.loss_interval))
    assert printed["next_run"] is None
    assert run("recommend", source, "--params", "0.8M", "--tokens", "5M", "--no-next").stdout.strip() == str(answer)


def test_recommend_shows_the_next_run_and_published_laws(source: str) -> None:
    done = run("recommend", source, "--flops", "2e13", "--beside", "step-law", "--beside", "kaplan")
    assert done.exit_code == 0
    for shown in ("compute-optimal N", "What to run next", "nine runs", "step-law", "kaplan"):
        assert shown in done.stdout
    assert "deepseek" not in done.stdout
    at_most = parse_strict_json(run("recommend", source, "--flops", "2e13", "--at-most", "5e12", "--json").stdout)[
        "next_run"
    ]
    assert at_most["C"] <= at_most["at_most"] * (1 + 1e-9) == pytest.approx(5e12)


def test_an_untrusted_answer_exits_with_3_and_says_so_on_the_first_line(source: str) -> None:
    done = run("recommend", source, "--params", "40M", "--tokens", "5M", "--no-next")
    assert done.exit_code == 3
    assert done.stdout.startswith("NOT TO BE TRUSTED: The target's N is 100 times")
    as_json = run("recommend", source, "--params", "40M", "--tokens", "5M", "--no-next", "--json")
    assert as_json.exit_code == 3
    assert parse_strict_json(as_json.stdout)["trustworthy"] is False


def test_without_a_law_there_is_a_reason_and_no_number(tmp_path: Path) -> None:
    lone = write_table(table(sizes=(1e5,), tokens=(2e5,)), tmp_path)
    done = run("recommend", lone, "--params", "1M", "--tokens", "1M")
    assert done.exit_code == 3
    assert done.stdout.startswith("NOT TO BE TRUSTED: there is no recommendation. a loss law needs spread in N or D")
    summary = parse_strict_json(run("recommend", lone, "--params", "1M", "--tokens", "1M", "--json").stdout)
    assert summary["trustworthy"] is False
    assert set(summary) == {"trustworthy", "reason"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--params", "7,000", "--tokens", "1M"), "needed a positive count such as 7B"),
        (("--params", "1M"), "needs N and D, or C alone; got N"),
        (("--flops", "1e13", "--beside", "steplaw"), "did you mean step-law"),
        (("--flops", "1e13", "--at-most", "1e3"), "FLOPs or more"),
        (("--target",), "--target needs a study"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(source: str, words: tuple[str, ...], message: str) -> None:
    done = run("recommend", source, *words)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""


def test_fit_shows_every_form_and_every_approach(source: str) -> None:
    done = run("fit", source)
    assert done.exit_code == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    first = [words[0] for words in lines if words]
    for name in ("log-linear", "kaplan", "chinchilla", "average", "envelope", "isoflop", "law"):
        assert first.count(name) == 1, name
    assert "best form" in next(line for line in done.stdout.splitlines() if line.startswith("  chinchilla"))
    summary = parse_strict_json(run("fit", source, "--json").stdout)
    assert summary["form_chosen"] == "chinchilla"
    (law,) = (row for row in summary["approaches"] if row["approach"] == "law")
    planted = FLOOR.beta / (FLOOR.alpha + FLOOR.beta)
    assert law["N_exponent_low"] < planted < law["N_exponent_high"]
    assert summary["loss_law_90"]["alpha"][0] < FLOOR.alpha < summary["loss_law_90"]["alpha"][1]
    short = parse_strict_json(run("fit", source, "--no-compare", "--json").stdout)
    assert "forms" not in short
    assert short["loss_law"] == summary["loss_law"]


def test_with_two_groups_the_rate_and_batch_law_is_shown_and_the_loss_law_is_refused(tmp_path: Path) -> None:
    two = write_table(table(sizes=(1e5, 4e5), tokens=(6e5,)), tmp_path)
    done = run("fit", two)
    assert done.exit_code == 3
    assert "lr* ~ N^a D^b" in done.stdout
    assert "No loss law: needed 3 (N, D) groups or more, got 2" in done.stdout
    assert parse_strict_json(run("fit", two, "--json").stdout)["loss_law"] is None


def test_fit_counts_what_it_leaves_out() -> None:
    mixed = check_runs(pd.concat([RUNS, RUNS.head(4).assign(loss=0.5, excluded="stopped")], ignore_index=True))
    summary = summarize_fits(mixed, compare=False)
    assert (summary["runs"], summary["left_out"]) == (len(RUNS), 4)
    assert summary["loss_law"] == summarize_fits(check_runs(RUNS), compare=False)["loss_law"]
    assert f"{len(RUNS)} runs in 9 groups of equal N and D; 4 left out" in format_summary(summary)


def test_a_table_without_rates_is_refused_by_name(tmp_path: Path) -> None:
    bare = write_table(RUNS[["N", "D", "loss"]], tmp_path)
    for command in (("fit", bare), ("recommend", bare, "--flops", "1e13")):
        done = run(*command)
        assert done.exit_code == 2
        assert "missing: lr, batch_tokens" in done.stderr
