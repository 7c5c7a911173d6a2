"""A report is one page that needs nothing else, whatever the table holds."""

from __future__ import annotations

import dataclasses
import html
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from scaling.__main__ import app
from scaling.advice.recommendation import Recommendation, recommend
from scaling.common.quantities import format_count
from scaling.curves.backtest import RunCurve, check_forecasts, read_study_curves, read_table_curves
from scaling.fitting.lr_batch_law import fit_hp_law
from scaling.laws.published import get_published_law, list_published_laws
from scaling.report import figures, tables
from scaling.report.figures import TargetCurve
from scaling.report.html import fit_everything, render_report
from scaling.runs.io import load_runs, save_runs
from scaling.runs.table import check_runs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def plant_runs(sizes: tuple[float, ...] = (1e4, 4e4, 1.6e5), **columns: Any) -> pd.DataFrame:
    """Plant a known law and bowl; one run in each group diverged."""
    rng = np.random.default_rng(0)
    rows = []
    for N in sizes:
        for D in (1e5, 4e5, 1.6e6):
            for i in range(8):
                lr, batch = 0.003 * math.exp(rng.normal()), 500 * math.exp(rng.normal())
                loss = 1 + 20 / N**0.4 + 30 / D**0.3
                loss *= math.exp(0.01 * math.log(lr / 0.003) ** 2 + 0.005 * math.log(batch / 500) ** 2)
                rows.append((f"{N:g}-{i}", N, D, lr, batch, math.nan if i == 7 else loss))
    table = pd.DataFrame(rows, columns=["run_id", "N", "D", "lr", "batch_tokens", "loss"])
    return check_runs(table.assign(**columns))


def plant_curves(sizes: tuple[float, ...] = (1e4, 1e5), runs: int = 4, noise: float = 1e-3) -> list[RunCurve]:
    """Plant power laws along runs at a constant rate, each with its own amplitude."""
    rng = np.random.default_rng(1)
    tokens = np.geomspace(1e4, 1e6, 25)
    out = []
    for N in sizes:
        for i in range(runs):
            loss = 1.5 + (20 + i) * tokens**-0.35 + 10 / N**0.4
            out.append(RunCurve(f"{N:g}/{i}", N, tokens, loss * np.exp(noise * rng.normal(size=25))))
    return out


def find_svgs(page: str) -> list[str]:
    return ["<svg" + part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]


def find_titles(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def test_the_page_shows_the_recommendation_and_whether_targets_met_it() -> None:
    runs = plant_runs()
    answer = recommend(runs, N=6e5, D=3e6)
    held = TargetCurve("warm", [1e5, 1e6], [3.0, 2.5], 3e6, answer.loss)
    missed = TargetCurve("scratch", [1e5, 1e6], [3.0, 2.5], 3e6, 2 * answer.loss)
    page = render_report(
        "planted", runs, recommendation=answer, targets=[held, missed], warm_start={"speed-up in tokens": 1.24}
    )
    assert page.index("inside the predicted interval") < page.index("outside the predicted interval")
    assert "63 of 72 rows are used by laws; 9 kept, but excluded: diverged" in page
    assert "1.24" in page
    assert all(f.text in html.unescape(page) for f in answer.flags)
    for title in (
        "Loss against learning rate",
        "Loss against batch, tokens per step",
        "Best learning rate and batch against tokens",
        "Loss against compute",
        "Residuals of the loss law",
        "Forms of the loss law",
        "Compute-optimal size by three approaches",
        "The target against its prediction",
        "Rows that laws do not use",
        "Best runs",
        "Provenance",
    ):
        assert title in find_titles(page)
    # There are nine groups.
    assert len(find_svgs(page)) == 9 + 9 + 2 + 2 + 2 + 1 + 1


def test_every_figure_is_well_formed_and_nothing_is_fetched_or_run() -> None:
    page = render_report("planted", plant_runs(), curves=plant_curves())
    for svg in find_svgs(page):
        root = ElementTree.fromstring(svg)
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith("#") for link in links)
        known = {e.attrib["id"] for e in root.iter() if "id" in e.attrib}
        assert {link[1:] for link in links} <= known
        assert root.attrib["aria-label"]
    assert not re.search(r"<script|<link|<img|src=|@import|url\((?!#)", page)


def test_text_from_the_table_and_the_notes_is_escaped() -> None:
    evil = "<script>alert('1 & 2')</script>"
    runs = plant_runs(name=evil)
    runs.loc[:1, "excluded"] = evil
    answer = recommend(runs, N=6e5, D=3e6)
    answer = dataclasses.replace(answer, provenance=answer.provenance | {evil: evil}, next_run={evil: evil})
    target = TargetCurve(evil, [1e5, 1e6], [3.0, 2.5], 3e6, 2.0)
    page = render_report(f"a <b> {evil}", runs, recommendation=answer, targets=[target], warm_start={evil: evil})
    assert "<script" not in page
    assert "a &lt;b&gt;" in page
    assert page.count("&lt;script&gt;") > 8
    for svg in find_svgs(page):
        ElementTree.fromstring(svg)


def test_one_group_is_drawn_without_laws_it_cannot_have() -> None:
    runs = plant_runs((1e4,))
    page = render_report("one", runs[runs["D"] == 1e5])
    assert "No loss law: a loss law needs spread in N or D" in page
    assert "Compute-optimal size by three approaches" not in find_titles(page)
    assert len(find_svgs(page)) == 1 + 1 + 2 + 1


def test_a_column_that_does_not_vary_has_no_bowl() -> None:
    shown = find_titles(render_report("one lr", plant_runs(lr=0.003)))
    assert "Loss against learning rate" not in shown
    assert "Loss against batch, tokens per step" in shown


def test_a_table_of_sizes_tokens_and_losses_is_enough() -> None:
    runs = plant_runs()
    best = runs.loc[runs.groupby(["N", "D"])["loss"].idxmin(), ["N", "D", "loss"]]
    page = render_report("bare", check_runs(best))
    assert "No law of learning rate and batch: not in this table." in page
    assert "Forms of the loss law" in find_titles(page)


def test_a_table_without_usable_rows_is_refused_with_the_reasons() -> None:
    runs = plant_runs()
    with pytest.raises(ValueError, match=r"got none of 9 \(9 diverged\)"):
        render_report("lost", runs[runs["diverged"]])


def test_excluded_rows_change_no_law_and_are_counted() -> None:
    runs = plant_runs()
    odd = runs.tail(8).assign(loss=0.5, diverged=False, final=False, excluded="not final: <a point>")
    clean, more = fit_everything(runs), fit_everything(pd.concat([runs, odd], ignore_index=True))
    assert not isinstance(clean.law, str)
    assert not isinstance(more.law, str)
    assert more.law.law == clean.law.law
    assert len(more.left_out) == 8
    table = tables.tabulate_exclusions(pd.concat([runs, odd], ignore_index=True))
    assert table is not None
    assert {row[0]: row[1] for row in table.rows} == {"diverged": "9", "not final: <a point>": "8"}


def test_the_same_table_gives_the_same_page() -> None:
    one, two = (render_report("planted", plant_runs((1e4, 4e4)), curves=plant_curves()) for _ in range(2))
    assert one == two


def test_a_note_of_an_older_version_is_drawn() -> None:
    runs = plant_runs()
    plain = recommend(runs, N=6e5, D=3e6).to_dict()
    for new in ("next_run", "beside", "run_ids", "N_interval", "D_interval"):
        plain.pop(new, None)
    page = render_report("old", runs, recommendation=Recommendation.from_dict(plain))
    assert "What to run next" not in page


def test_the_next_run_is_described_in_words() -> None:
    sweep = {
        "N": 2e4, "D": 3e6, "lr": [1e-3, 2e-3, 4e-3], "batch_tokens": [100.0, 200.0, 400.0],
        "lr_factor": [1.6, 1.3], "batch_factor": [2.0, 1.7],
    }  # fmt: skip
    rows = dict(
        tables.describe_next_run(
            {"N": 1.5e5, "D": 2e6, "lr": 2.1e-3, "batch_tokens": 640.0, "loss_half": [0.031, 0.018], "sweep": sweep}
        )
    )
    assert rows["one run"] == "N 150K, D 2M, lr 0.0021, batch 640 tokens"
    assert rows["loss at the target"] == "± 3.10 % now, ± 1.80 % expected after it"
    assert rows["batch at the target"] == "within a factor of 2.00 now, 1.70 expected after them"


def test_under_mup_published_rates_are_not_compared() -> None:
    laws = [get_published_law(name) for name in list_published_laws()]
    hp = fit_hp_law(plant_runs())
    for mup, shown in ((False, {"step-law", "deepseek", "kaplan"}), (True, {"step-law", "deepseek"})):
        table = tables.tabulate_published(laws, hp, 4e8, 1e10, mup)
        assert table is not None
        assert {row[0] for row in table.rows[1:]} == shown
        assert all(bool(row[1]) is not mup for row in table.rows[1:])


def test_planted_curves_are_forecast_from_their_half_and_no_forecast_uses_the_end_of_its_run() -> None:
    checks = check_forecasts(plant_curves())
    assert [(c.N, c.runs) for c in checks] == [(1e4, 4), (1e5, 4)]
    for c in checks:
        # The noise is 0.001.
        assert c.error < 0.004
        assert c.error < c.carried_error / 4
        assert c.covered >= 3
    # The forecast of the only run of a group is the same, whatever its end.
    lone, rest = plant_curves((3e4,), runs=1)[0], plant_curves()
    other = dataclasses.replace(lone, loss=np.append(lone.loss[:-1], 1.3 * lone.loss[-1]))
    (a,), (b,) = ([c for c in check_forecasts([x, *rest]) if c.N == 3e4] for x in (lone, other))
    assert (1 + a.bias) * lone.loss[-1] == pytest.approx((1 + b.bias) * other.loss[-1])


def test_curves_in_a_table_are_found_and_rungs_of_a_ladder_are_not_curves() -> None:
    rows = [(c.run_id, c.N, t, y) for c in plant_curves() for t, y in zip(c.tokens, c.loss, strict=True)]
    runs = check_runs(pd.DataFrame(rows, columns=["run_id", "N", "D", "loss"]).assign(final=False))
    curves = read_table_curves(runs)
    assert {c.run_id for c in curves} == {c.run_id for c in plant_curves()}
    assert all(c.D == 1e6 and c.tokens.size == 25 for c in curves)
    assert read_table_curves(runs.assign(rung=0)) == []


class StubClient:
    """The part of an MLflow client that reading a curve needs: one run, with points beyond 1000 tokens."""

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params={"cooldown": "0.2", "warmup_tokens": "10"}))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        assert (run_id, key) == ("a", "loss")
        return [SimpleNamespace(step=t, timestamp=0, value=5 - t / 1000) for t in (100, 200, 400, 700, 850, 950, 1200)]


def test_a_studys_curves_stop_where_the_cooldown_branches_off() -> None:
    """After the branch, the trunk continues to a rung that is not in the table yet."""
    rows = {"run_id": ["a", "a"], "N": 100, "D": [500, 1000], "loss": [4.1, 3.5], "rung": [0, 1]}
    (curve,) = read_study_curves(cast(Any, StubClient()), check_runs(pd.DataFrame(rows)))
    assert curve.tokens.tolist() == [100, 200, 400, 700, 1000]
    assert curve.loss.tolist() == [4.9, 4.8, 4.6, 4.3, 3.5]
    assert curve.schedule is not None
    assert curve.schedule(np.array([5.0, 500.0, 800.0, 850.0, 1000.0])).tolist() == pytest.approx([0.5, 1, 1, 0.5, 0])


def test_every_size_has_its_own_colour_and_a_selection_keeps_both_ends() -> None:
    for sizes in (range(1, 5), range(1, 40)):
        colours = figures.assign_colours(float(N) for N in sizes)
        assert len(set(colours.values())) == len(sizes)
    assert figures.pick_few(list(range(100)), 4) == [0, 33, 66, 99]
    assert figures.pick_few([3.0, 1.0, 2.0], 4) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("value", "text"), [(12_345_678, "12.3M"), (1e9, "1B"), (512, "512"), (34_816, "34.8K")])
def test_counts_are_short(value: float, text: str) -> None:
    assert format_count(value) == text


# --- The command ------------------------------------------------------------------------------------------------------


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_page_of_a_file_has_its_name_as_title_and_the_answer_on_top(tmp_path: Path) -> None:
    path = tmp_path / "my sweep.csv"
    save_runs(plant_runs(), path)
    done = run("report", path, "--params", "600K", "--tokens", "3M")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "my sweep.html").read_text()
    assert re.findall("<h1>(.*?)</h1>", page) == ["my sweep.csv"]
    assert "<title>my sweep.csv" in page
    top = html.unescape(page.split("<h2>")[0])
    answer = recommend(load_runs(path), N="600K", D="3M")
    assert answer.verdict in top
    for name in ("learning rate", "batch, tokens per step", "loss, nats per token", "compute-optimal N"):
        assert name in top
    assert f"{answer.loss:.4f}" in top
    assert str(answer) in done.stdout
    assert str(tmp_path / "my sweep.html") in done.stdout


def test_a_report_of_a_plain_table_says_what_it_does_not_hold(tmp_path: Path) -> None:
    runs = plant_runs((1e4, 4e4, 1.6e5, 6.4e5)).drop(columns=["lr", "batch_tokens"])
    save_runs(runs.loc[runs.groupby(["N", "D"])["loss"].idxmin()], tmp_path / "runs.csv")
    done = run("report", tmp_path / "runs.csv", "--flops", "1e13")
    assert done.exit_code == 0, done.output
    top = (tmp_path / "runs.html").read_text().split("<h2>")[0]
    assert top.count("not in this table") == 2


def test_each_value_of_a_column_gets_a_page(tmp_path: Path) -> None:
    both = pd.concat([plant_runs(corpus="web text"), plant_runs(corpus="code")], ignore_index=True)
    save_runs(both, tmp_path / "runs.csv")
    done = run("report", tmp_path / "runs.csv", "--by", "corpus")
    assert done.exit_code == 0, done.output
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert set(pages) == {"runs.corpus-code.html", "runs.corpus-web_text.html"}
    assert "<h1>runs.csv, corpus = web text</h1>" in pages["runs.corpus-web_text.html"]
    assert "63 of 72 rows are used by laws" in pages["runs.corpus-code.html"]
    assert run("report", tmp_path / "runs.csv", "--out", tmp_path / "no" / "page.html").exit_code == 2


def test_runs_of_nearly_equal_size_share_a_panel_and_a_colour() -> None:
    """D in whole steps differs a little from batch to batch."""
    runs = plant_runs()
    jitter = np.random.default_rng(0).uniform(-2e-4, 2e-4, len(runs))
    page = render_report("steps", check_runs(runs.assign(D=runs["D"] * (1 + jitter))))
    assert len(find_svgs(page)) == len(find_svgs(render_report("exact", runs)))
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
