"""Run `scaling fit` and `scaling recommend` as a user does, on tables of planted runs."""

from __future__ import annotations

import json
import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from scaling.__main__ import app
from scaling.advice.conditions import find_mixed_conditions
from scaling.advice.recommendation import recommend
from scaling.advice.table_fits import fit_table
from scaling.laws.formulas import LossLaw
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
    words = ("recommend", source, "--params", "0.8M", "--tokens", "5M", "--no-next")
    assert run(*words).stdout.startswith(f"{answer}\n\n--explain shows ")
    assert run(*words, "--explain").stdout.strip() == answer.explain()


def test_recommend_shows_the_next_run_and_published_laws(source: str) -> None:
    done = run("recommend", source, "--flops", "2e13", "--beside", "step-law", "--beside", "kaplan", "--next")
    assert done.exit_code == 0
    for shown in ("compute-optimal N", "What to run next", "nine runs", "step-law", "kaplan"):
        assert shown in done.stdout
    assert "deepseek" not in done.stdout
    at_most = parse_strict_json(run("recommend", source, "--flops", "2e13", "--at-most", "5e12", "--json").stdout)[
        "next_run"
    ]
    assert at_most["C"] <= at_most["at_most"] * (1 + 1e-9) == pytest.approx(5e12)


def test_an_untrusted_answer_exits_with_3_and_says_so_on_the_first_line(source: str) -> None:
    done = run("recommend", source, "--params", "60M", "--tokens", "5M", "--no-next")
    assert done.exit_code == 3
    assert done.stdout.startswith("NOT TO BE TRUSTED: The target's N is 150 times")
    as_json = run("recommend", source, "--params", "60M", "--tokens", "5M", "--no-next", "--json")
    assert as_json.exit_code == 3
    assert parse_strict_json(as_json.stdout)["trustworthy"] is False


def test_without_a_law_there_is_a_reason_and_no_number(tmp_path: Path) -> None:
    lone = write_table(table(sizes=(1e5,), tokens=(2e5,)), tmp_path)
    done = run("recommend", lone, "--params", "1M", "--tokens", "1M")
    assert done.exit_code == 3
    text = " ".join(done.stdout.split())
    assert text.startswith("NOT TO BE TRUSTED: there is no recommendation: a loss law needs spread in N or D")
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


def plant_plain_table() -> pd.DataFrame:
    """Return sizes, tokens and losses of 25 runs of a known law, without settings."""
    rng = np.random.default_rng(0)
    rows = [(N, ratio * N) for N in (1e7, 3e7, 1e8, 3e8, 1e9) for ratio in (5, 10, 20, 40, 80)]
    N, D = np.array(rows).T
    loss = np.asarray(LossLaw(1.7, 480.0, 2100.0, 0.36, 0.37)(N, D)) * np.exp(rng.normal(0, 0.002, N.size))
    return pd.DataFrame({"N": N, "D": D, "loss": loss})


def test_a_table_of_sizes_tokens_and_losses_is_answered_without_settings(tmp_path: Path) -> None:
    bare = write_table(plant_plain_table(), tmp_path)
    done = run("fit", bare, "--json")
    assert done.exit_code == 0
    summary = parse_strict_json(done.stdout)
    assert summary["hp_law"] is None
    assert summary["not_measured"] == {"lr": "not in this table", "batch_tokens": "not in this table"}
    for symbol, planted in (("alpha", 0.36), ("beta", 0.37), ("E", 1.7)):
        low, high = summary["loss_law_90"][symbol]
        assert summary["loss_law"][symbol] == pytest.approx(planted, rel=0.05)
        assert low - 0.02 * planted < planted < high + 0.02 * planted
    asked = ("recommend", bare, "--params", "7B", "--tokens", "140B")
    answer = parse_strict_json(run(*asked, "--json").stdout)
    assert (answer["lr"], answer["batch_tokens"], answer["hp_law"], answer["expected_regret"]) == (None,) * 4
    planted = float(LossLaw(1.7, 480.0, 2100.0, 0.36, 0.37)(7e9, 1.4e11))
    assert answer["loss_interval"][0] < planted < answer["loss_interval"][1]
    assert answer["loss"] == pytest.approx(planted, rel=0.03)
    best = float(LossLaw(1.7, 480.0, 2100.0, 0.36, 0.37).optimum(5.88e21)[0])
    assert abs(math.log(answer["optimum"]["N"] / best)) < 0.25
    assert answer["trustworthy"] is True
    shown = run(*asked)
    assert shown.exit_code == 0
    assert shown.stdout.count("not in this table") == 2
    assert "best" not in shown.stdout


@pytest.mark.parametrize("kept", ["lr", "batch_tokens"])
def test_a_setting_that_a_table_lacks_does_not_keep_the_other_one_out(kept: str, tmp_path: Path) -> None:
    """Without a batch, the best learning rate is that at the batches of the runs."""
    rng, rows = np.random.default_rng(0), []
    law = LossLaw(1.7, 480.0, 2100.0, 0.36, 0.37)

    def best(N: float, D: float) -> float:
        return float(1.79 * N**-0.713 * D**0.307 if kept == "lr" else 0.58 * D**0.571)

    for N, ratio, shift in product((3e7, 6e7, 1.2e8, 2.4e8), (10, 40), np.linspace(-1.5, 1.5, 7)):
        loss = float(law(N, ratio * N)) * math.exp(0.015 * shift**2 + 0.001 * rng.normal())
        rows.append((N, ratio * N, best(N, ratio * N) * math.exp(shift), loss))
    path = write_table(pd.DataFrame(rows, columns=["N", "D", kept, "loss"]), tmp_path)
    done = run("recommend", path, "--params", "1B", "--tokens", "20B", "--no-next", "--json")
    answer = parse_strict_json(done.stdout)
    lacking = "batch_tokens" if kept == "lr" else "lr"
    assert answer["not_measured"] == {lacking: "not in this table"}
    assert answer[lacking] is None
    low, high = answer["lr_interval" if kept == "lr" else "batch_interval"]
    assert low < best(1e9, 2e10) < high < 8 * low
    assert answer["loss_interval"][0] < float(law(1e9, 2e10)) < answer["loss_interval"][1]
    assert run("fit", path).exit_code == 0


def test_settings_that_never_vary_leave_the_loss_law_to_the_runs_as_they_are(tmp_path: Path) -> None:
    plain = plant_plain_table()
    without = summarize_fits(check_runs(plain), compare=False)
    fixed = summarize_fits(check_runs(plain.assign(lr=0.002, batch_tokens=262144.0)), compare=False)
    decided = plain.assign(lr=0.01 * (plain["N"] / 1e7) ** -0.3, batch_tokens=1e5 * (plain["D"] / 1e9) ** 0.5)
    tied = summarize_fits(check_runs(decided), compare=False)
    assert without["loss_law"] == fixed["loss_law"] == tied["loss_law"]
    assert fixed["not_measured"] == dict.fromkeys(("lr", "batch_tokens"), "the same in every run")
    assert tied["not_measured"] == dict.fromkeys(("lr", "batch_tokens"), "one value per N and D in this table")
    assert "Every run has the learning rate 0.002" in " ".join(format_summary(fixed).split())


# --- Conditions, subsets, budgets -------------------------------------------------------------------------------------


def plant_corpora() -> pd.DataFrame:
    """Return the plain table three times, once for each corpus, with losses 8 and 20 % higher for two of them."""
    plain = plant_plain_table()
    parts = [plain.assign(loss=plain["loss"] * f, corpus=c, shard=i) for i, (c, f) in enumerate(CORPORA.items())]
    return pd.concat(parts, ignore_index=True).assign(lr=0.002, batch_tokens=262144.0)


CORPORA = {"web": 1.08, "math": 1.0, "code": 1.2}


def test_runs_alike_that_differ_are_doubted_and_the_column_that_tells_them_apart_is_named(tmp_path: Path) -> None:
    runs = plant_corpora().assign(host=np.tile(["a", "b", "c", "d", "e"], 15))
    path = write_table(runs.drop(columns="shard"), tmp_path)
    text = " ".join(run("fit", path, "--no-compare").stdout.split())
    assert "Runs alike in N, D, lr and batch differ by" in text
    assert "the column corpus explains 99 % of that (math, web +8 %, code +20 %)" in text
    done = run("recommend", path, "--params", "3B", "--tokens", "60B")
    assert done.exit_code == 3
    assert "Use --where corpus=math or --by corpus." in done.stdout


def test_seeds_that_differ_by_their_scatter_are_no_condition() -> None:
    plain = plant_plain_table()
    rng = np.random.default_rng(1)
    seeds = [plain.assign(loss=plain["loss"] * np.exp(rng.normal(0, 0.01, len(plain))), seed=i) for i in range(3)]
    fits = fit_table(check_runs(pd.concat(seeds, ignore_index=True)))
    assert find_mixed_conditions(fits) is None


def test_a_condition_is_found_among_runs_that_are_all_of_another_size() -> None:
    plain = plant_plain_table()
    optimizer = np.where(np.arange(len(plain)) % 2 == 0, "adamw", "sgd")
    runs = plain.assign(loss=plain["loss"] * np.where(optimizer == "sgd", 1.1, 1.0), optimizer=optimizer)
    mixed = find_mixed_conditions(fit_table(check_runs(runs)))
    assert mixed is not None
    assert (mixed.column, mixed.alike_in, mixed.levels) == ("optimizer", "", ("adamw", "sgd"))
    assert mixed.excess[1] == pytest.approx(0.1, abs=0.03)


def test_scatter_that_no_column_explains_is_doubted_too() -> None:
    plain = plant_plain_table()
    rng = np.random.default_rng(1)
    parts = [plain.assign(loss=plain["loss"] * np.exp(rng.normal(0, 0.08, len(plain)))) for _ in range(3)]
    mixed = find_mixed_conditions(fit_table(check_runs(pd.concat(parts, ignore_index=True))))
    assert mixed is not None
    assert mixed.column is None
    assert "no column of the table explains it" in str(mixed)


def test_two_columns_that_explain_only_together_are_named() -> None:
    plain = plant_plain_table()
    parts = [
        plain.assign(loss=plain["loss"] * trained * (1.2 if tested == "code" else 1.0), train=corpus, tested=tested)
        for corpus, trained in (("web", 1.0), ("books", 1.2))
        for tested in ("prose", "code")
    ]
    mixed = find_mixed_conditions(fit_table(check_runs(pd.concat(parts, ignore_index=True))))
    assert mixed is not None
    assert {mixed.column, mixed.second} == {"train", "tested"}
    assert mixed.share > 0.95
    assert "together explain 99 % of that" in str(mixed)
    assert ("--where train=web --by tested" in str(mixed)) or ("--where tested=prose --by train" in str(mixed))


def test_each_value_of_a_column_gets_a_law_of_its_own(tmp_path: Path) -> None:
    path = write_table(plant_corpora(), tmp_path)
    parts = parse_strict_json(run("fit", path, "--by", "corpus", "--json").stdout)["parts"]
    for corpus, factor in CORPORA.items():
        assert parts[corpus]["loss_law"]["E"] == pytest.approx(1.7 * factor, rel=0.03)
        one = parse_strict_json(run("fit", path, "--where", f"corpus={corpus}", "--no-compare", "--json").stdout)
        assert one["loss_law"] == parts[corpus]["loss_law"]
        assert one["doubts"] == []
    shown = run("recommend", path, "--by", "corpus", "--params", "3B", "--tokens", "60B")
    assert [line for line in shown.stdout.splitlines() if line.startswith("corpus = ")] == [
        "corpus = code",
        "corpus = math",
        "corpus = web",
    ]
    both = run("fit", path, "--where", "corpus=web", "--where", "corpus=math", "--where", "shard=1", "--json")
    assert parse_strict_json(both.stdout)["runs"] == 25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--where", "corpsu=web"), "the table has no such column; did you mean corpus?"),
        (("--where", "corpus=wiki"), "no row has it; corpus has code, math, web"),
        (("--where", "web"), "--where needs COLUMN=VALUE, got 'web'"),
        (("--where", "corpus=web", "--where", "shard=1"), "no row meets all conditions"),
        (("--by", "N", "--where", "N=10M"), "--by needs a column with 2 to 30 values, and N has 1: 10000000"),
        (("--budgets", "1e18"), "at least two budgets"),
        (("--budgets", "1e18,x"), "FLOPs such as 1e18,3e18,1e19"),
        (("--budgets", "1e18,1e19", "--no-compare"), "drop one"),
    ],
)
def test_rows_and_budgets_that_cannot_be_chosen_are_refused(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run("fit", write_table(plant_corpora(), tmp_path), *words)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize("column", ["C", "flops_budget", "compute_exaflops", None])
def test_isoflop_groups_follow_the_budgets_that_the_owner_counts(column: str | None, tmp_path: Path) -> None:
    """The planned budgets are not 6 N D: every run has a share of embeddings, so 6 N D differs along a budget."""
    law, rows = LossLaw(1.7, 480.0, 480.0, 0.35, 0.35), []
    for C, factor in product((1e18, 3e18, 1e19), np.geomspace(0.25, 4, 7)):
        N = factor * float(law.optimum(C)[0])
        D = C / (6 * N) * (1.05 - 0.09 * math.log(factor))
        rows.append((C, N, D, float(law(N, D))))
    runs = pd.DataFrame(rows, columns=["C", "N", "D", "loss"])
    if column == "compute_exaflops":
        runs["C"] /= 1e18
    runs = runs.drop(columns="C") if column is None else runs.rename(columns={"C": column})
    words = ("--budgets", "1e18,3e18,1e19") if column is None else ()
    summary = parse_strict_json(run("fit", write_table(runs, tmp_path), "--json", *words).stdout)
    (isoflop,) = (row for row in summary["approaches"] if row["approach"] == "isoflop")
    assert isoflop["N_exponent"] == pytest.approx(0.5, abs=0.02)
    # The least loss along the budget that was planned, which 6 N D misses by a factor.
    N = np.geomspace(0.25, 4, 2000) * float(law.optimum(summary["approaches_at"])[0])
    D = summary["approaches_at"] / (6 * N) * (1.05 - 0.09 * np.log(N / float(law.optimum(summary["approaches_at"])[0])))
    assert isoflop["N_opt"] == pytest.approx(float(N[np.argmin(law(N, D))]), rel=0.05)
    assert summary["compute_column"] == column


# --- Numbers and text -------------------------------------------------------------------------------------------------


def test_no_line_is_long_and_an_absurd_loss_is_no_answer(tmp_path: Path) -> None:
    """N and D in the wrong unit put the target far below the runs, where a power law explodes."""
    plain = plant_plain_table()
    path = write_table(plain.assign(N=plain["N"] * 1e12, D=plain["D"] * 1e13), tmp_path)
    asked = ("recommend", path, "--params", "2B", "--tokens", "40B")
    for words in (asked, (*asked, "--explain")):
        done = run(*words)
        assert done.exit_code == 3
        assert done.stdout.startswith("NOT TO BE TRUSTED: The runs allow no answer for the loss of this target")
        assert "loss, nats per token          no answer" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert not re.search(r"\d{16}", done.stdout)
    assert max(map(len, run("fit", path).stdout.splitlines())) <= 80
    parse_strict_json(run(*asked, "--json").stdout)


def test_the_short_answer_has_a_verdict_four_numbers_and_three_caveats_of_two_lines(source: str) -> None:
    done = run("recommend", source, "--params", "8M", "--tokens", "50M")
    verdict, table, caveats, footer = done.stdout.strip().split("\n\n")
    assert verdict.startswith("Use learning rate ")
    rows = [line for line in table.splitlines()[2:] if not line.startswith("    in sequences")]
    assert [re.split(r" {2,}", row.strip())[0] for row in rows] == [
        "learning rate",
        "batch, tokens per step",
        "loss, nats per token",
        "compute-optimal N",
    ]
    assert all(re.search(r"\S to \S", row) for row in rows)
    lines = caveats.splitlines()[1:]
    assert sum(line.startswith("  - ") for line in lines) == 3
    assert len(lines) <= 6
    assert footer.startswith("--explain shows")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "The target has 20 times the largest N" in caveats
