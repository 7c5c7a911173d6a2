"""The report: whatever the table holds, one page that needs nothing else."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from scaling.recommendation import recommend
from scaling.report import TargetCurve, _count, render
from scaling.runs import check_runs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def planted(sizes: tuple[float, ...] = (1e4, 4e4, 1.6e5)) -> pd.DataFrame:
    """A known law and bowl; one run in each group diverged."""
    rng = np.random.default_rng(0)
    rows = []
    for N in sizes:
        for D in (1e5, 4e5, 1.6e6):
            for i in range(8):
                lr, batch = 0.003 * math.exp(rng.normal()), 500 * math.exp(rng.normal())
                loss = 1 + 20 / N**0.4 + 30 / D**0.3
                loss *= math.exp(0.01 * math.log(lr / 0.003) ** 2 + 0.005 * math.log(batch / 500) ** 2)
                rows.append((f"{N:g}-{i}", N, D, lr, batch, math.nan if i == 7 else loss))
    return check_runs(pd.DataFrame(rows, columns=["run_id", "N", "D", "lr", "batch_tokens", "loss"]))


def svgs(page: str) -> list[str]:
    return ["<svg" + part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]


def test_the_page_says_the_recommendation_and_whether_it_held() -> None:
    runs = planted()
    answer = recommend(runs, N=6e5, D=3e6)
    held = TargetCurve("warm", [1e5, 1e6], [3.0, 2.5], 3e6, answer.loss)
    missed = TargetCurve("scratch", [1e5, 1e6], [3.0, 2.5], 3e6, 2 * answer.loss)
    page = render(
        "planted", runs, recommendation=answer, targets=[held, missed], warm_start={"speed-up in tokens": 1.24}
    )
    assert page.index("inside the interval") < page.index("outside the interval")
    assert "9 diverged" in page
    assert "1.24" in page
    assert len(svgs(page)) == 5


def test_every_figure_is_well_formed_and_fetches_nothing() -> None:
    for svg in svgs(render("planted", planted())):
        root = ElementTree.fromstring(svg)
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith("#") for link in links)


def test_text_from_the_table_is_escaped() -> None:
    runs = planted()
    runs["name"] = "<script>alert(1)</script>"
    page = render("a <b>", runs)
    assert "<script>" not in page
    assert "a &lt;b&gt;" in page


def test_one_size_is_drawn_without_a_law_it_cannot_have() -> None:
    page = render("one", planted((1e4,)))
    assert len(svgs(page)) == 4


def test_the_same_table_gives_the_same_laws() -> None:
    one, two = (render("planted", planted()).split("<h2>Laws</h2>")[1] for _ in range(2))
    assert one == two


@pytest.mark.parametrize(("value", "text"), [(12_345_678, "12.3M"), (1e9, "1B"), (512, "512"), (34_816, "34.8k")])
def test_counts_are_read_at_a_glance(value: float, text: str) -> None:
    assert _count(value) == text
