"""Tables of text as people have them: any separator, encoding and way to write a number gives the same runs."""

from __future__ import annotations

import csv
import io
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling.common.quantities import split_count
from scaling.formats import delimited
from scaling.formats.delimited import read_delimited
from scaling.formats.raw import RawTable
from scaling.runs.cells import parse_numbers
from scaling.runs.importer import import_runs

PLAIN = "N,D,loss\n100000000,2000000000,3.1\n200000000,4000000000,2.95\n400000000,8000000000,2.8\n"
LINES = PLAIN.splitlines()


def check_same(runs: pd.DataFrame) -> None:
    """Fail if runs are not those of `PLAIN`."""
    assert runs["N"].tolist() == [1e8, 2e8, 4e8]
    assert runs["D"].tolist() == [2e9, 4e9, 8e9]
    assert runs["loss"].tolist() == [3.1, 2.95, 2.8]


def read(text: str | bytes, suffix: str = ".csv") -> RawTable:
    return read_delimited(text if isinstance(text, bytes) else text.encode(), "runs", suffix)


VARIANTS: dict[str, tuple[str, str | bytes, str]] = {
    "semicolons": (".csv", PLAIN.replace(",", ";"), "cells are separated by semicolons"),
    "bars": (".csv", PLAIN.replace(",", "|"), "cells are separated by bars"),
    "tabs in .csv": (".csv", PLAIN.replace(",", "\t"), "cells are separated by tabs"),
    "tabs in .tsv": (".tsv", PLAIN.replace(",", "\t"), ""),
    "commas in .tsv": (".tsv", PLAIN, "cells are separated by commas"),
    "spaces": (".txt", PLAIN.replace(",", " "), "cells are separated by spaces"),
    "columns": (".txt", "\n".join("".join(f"{c:>14}" for c in line.split(",")) for line in LINES), "spaces"),
    "a table of Markdown": (
        ".md",
        "\n".join(f"| {line.replace(',', ' | ')} |" for line in [LINES[0], ":-:,---,--:", *LINES[1:]]),
        "bars",
    ),
    "a table that a database drew": (
        ".txt",
        "\n".join([LINES[0].replace(",", " | "), "---+---+---", *(x.replace(",", " | ") for x in LINES[1:])]),
        "bars",
    ),
    "a table in a frame": (
        ".txt",
        "\n".join(["┌──┬──┬──┐", *(f"│ {x.replace(',', ' │ ')} │" for x in LINES), "└──┴──┴──┘"]),
        "bars",
    ),
    "a table of LaTeX": (
        ".tex",
        "\\begin{tabular}{lll}\n\\toprule\n"
        + "\n".join(x.replace(",", " & $").replace("$D", "$D$ ") + r"$ \\ \hline" for x in LINES).replace("$ &", "$ & ")
        + "\n\\end{tabular}\n",
        "ampersands",
    ),
    "rules under the header": (".txt", PLAIN.replace(",", "  ").replace("loss\n", "loss\n--  --  --\n"), "spaces"),
    "Excel's first line": (".csv", "sep=;\n" + PLAIN.replace(",", ";"), "semicolons"),
    "decimal commas": (".csv", PLAIN.replace(",", ";").replace(".", ","), "decimal commas read as points"),
    "decimal commas after Excel's first line": (
        ".csv",
        "sep=;\r\n" + PLAIN.replace(",", ";").replace(".", ","),
        "such as '3,1' as 3.1",
    ),
    "points between thousands": (
        ".csv",
        "N;D;loss\n100.000.000;2.000.000.000;3,1\n200.000.000;4.000.000.000;2,95\n400.000.000;8.000.000.000;2,8\n",
        "points between thousands left out, as in 100.000.000",
    ),
    "commas between thousands": (
        ".csv",
        'N,D,loss\n"100,000,000",2e9,3.1\n"200,000,000",4e9,2.95\n"400,000,000",8e9,2.8\n',
        "column N: thousands separators left out, such as '100,000,000' as 100000000",
    ),
    "three decimals after commas": (
        ".csv",
        'N,D,loss\n1e8,2e9,"3,100"\n2e8,4e9,"2,950"\n4e8,8e9,"2,800"\n',
        "column loss: decimal commas read as points, such as '3,100' as 3.1",
    ),
    "a byte order mark": (".csv", b"\xef\xbb\xbf" + PLAIN.encode(), ""),
    "UTF-16": (".csv", PLAIN.encode("utf-16"), "the text is UTF-16"),
    "UTF-16 without a mark": (".csv", PLAIN.encode("utf-16-be"), "the text is UTF-16-BE"),
    "tabs in UTF-16": (".txt", PLAIN.replace(",", "\t").encode("utf-16"), "tabs"),
    "Latin-1": (
        ".csv",
        "\n".join(f"{line},{name}" for line, name in zip(LINES, ("modèle", "é", "è", "à"), strict=True)).encode(
            "latin-1"
        ),
        "the text is not UTF-8 and was read as cp1252",
    ),
    "carriage returns": (".csv", PLAIN.replace("\n", "\r"), ""),
    "lines of Windows": (".csv", PLAIN.replace("\n", "\r\n"), ""),
    "blank lines": (".csv", PLAIN.replace("\n", "\n\n"), ""),
    "empty rows": (".csv", PLAIN + ",,\n,,\n", ""),
    "a title": (".csv", "Scaling runs of March\n\n" + PLAIN, "not read: 1 line above the names of the columns"),
    "a title in cells": (".csv", "Scaling runs,,\nof March,,\n" + PLAIN, "not read: 2 lines above"),
    "a title with a comma": (".csv", "Exported, 2024-05-01\n" + PLAIN, "('Exported, 2024-05-01')"),
    "a title of as many words as columns": (".tsv", "Runs of March\n" + PLAIN.replace(",", "\t"), "not read: 1 line"),
    "decimal commas between spaces": (".txt", PLAIN.replace(",", " ").replace(".", ","), "decimal commas"),
    "a title of words": (".txt", "Scaling runs of March\n" + PLAIN.replace(",", " "), "not read: 1 line"),
    "comments": (
        ".csv",
        "# made by sweep.py\n# of March\n" + PLAIN + "# end\n",
        "not read: 1 comment between or below the rows",
    ),
    "comments between rows": (".csv", PLAIN.replace("3.1\n", "3.1\n# next\n"), "1 comment"),
    "comments beside quotes": (".csv", PLAIN.replace("3.1\n", '"3.1"\n# next\n'), "1 comment"),
    "a header as a comment": (".txt", "# N D loss\n" + "\n".join(LINES[1:]).replace(",", " "), "spaces"),
    "units in brackets": (
        ".csv",
        "N,D,loss\n(M),(B),nats\n100,2,3.1\n200,4,2.95\n400,8,2.8\n",
        "the row under the names of the columns was read as units: N in (M), D in (B), loss in nats",
    ),
    "units in words": (
        ".csv",
        "model,N,D,loss\n,millions,billions,\nx,100,2,3.1\ny,200,4,2.95\nz,400,8,2.8\n",
        "N in millions, D in billions",
    ),
    "columns without a name": (".csv", "\n".join(f"{line},," for line in LINES), ""),
    "a separator at the end of the header": (".csv", PLAIN.replace("loss\n", "loss,\n"), ""),
    "a separator at the end of the rows": (".csv", "\n".join([LINES[0], *(f"{r}," for r in LINES[1:])]), ""),
    "names of rows as in R": (
        ".csv",
        "\n".join([LINES[0], *(f'"{i}",{line}' for i, line in enumerate(LINES[1:], 1))]),
        "the first cell of each row has no column",
    ),
    "spaces before quotes": (".csv", "\n".join(", ".join(f'"{c}"' for c in x.split(",")) for x in LINES), ""),
    "a line below the rows": (".csv", PLAIN + "\nTotal: 3 runs\n", "not read: 1 line below the rows ('Total: 3 runs')"),
    "two files in one": (".csv", "\n".join([*LINES[:2], LINES[0], *LINES[2:]]), "1 row with the names of the columns"),
    "letters": (
        ".csv",
        "N,D,loss\n100M,2B,3.1\n200 M,4 billion,2.95\n0.4B,8B tokens,2.8\n",
        "column N: counts with letters or words read, such as '100M' as 100000000",
    ),
    "powers": (".csv", "N,D,loss\n10^8,2x10^9,3.1\n2*10**8,4x10^9,2.95\n4e8,8e9,2.8\n", "powers read"),
    "an upper-case suffix": (".CSV", PLAIN, ""),
    "no suffix": ("", PLAIN, ""),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_to_write_a_table_gives_the_same_runs(name: str, tmp_path: Path) -> None:
    suffix, text, remark = VARIANTS[name]
    path = tmp_path / f"runs{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    runs, remarks = import_runs(path)
    check_same(runs)
    assert remark in "\n".join(remarks)
    if not remark:
        assert [r for r in remarks if not r.startswith("columns not used")] == []


@pytest.mark.parametrize("marker", ["NA", "N/A", "n/a", "None", "null", "-", "--", "?", "#N/A", "<NA>", " ", ""])
def test_a_marker_of_a_missing_value_is_an_empty_cell(marker: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(f"N,D,loss,lr\n1e8,2e9,3.1,{marker}\n2e8,4e9,{marker},0.1\n4e8,8e9,2.8,0.1\n")
    runs, _ = import_runs(path)
    assert np.array_equal(runs["loss"], [3.1, np.nan, 2.8], equal_nan=True)
    assert np.array_equal(runs["lr"], [np.nan, 0.1, 0.1], equal_nan=True)
    assert not runs["diverged"].any(), "a missing loss is no divergence"
    path.write_text("N,D,loss\n1e8,2e9,3.1\n2e8,4e9,nan\n")
    assert import_runs(path)[0]["diverged"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N,D,loss\n", r"runs cannot be used: no rows, only the names of its columns \(N, D, loss\)$"),
        ("", "no rows$"),
        (
            "\n".join(LINES[1:]),
            "needed the names of the columns in the first line, got numbers .*: write a line such as",
        ),
        (
            "N,D,loss\n1e8,2e9,3,1\n2e8,4e9,2,95\n",
            "row 0: needed 3 cells, got 4: a thousands separator, a decimal comma",
        ),
        ("N,D,loss\n1,2,3\n1\n", "row 1: needed 3 cells, got 1$"),
        ("N;D;loss\n1;2;3\n1;2\n", "row 1: needed 3 cells, got 2$"),
        ("N,N,loss\n1,2,3\n", "column N appears twice: rename one of the two"),
        (bytes(range(256)), "it holds bytes that are no text[^$]*Needed is a table with one row per run"),
    ],
)
def test_what_is_no_table_is_refused_with_what_to_do(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(text)
    assert "cannot be" in str(error.value)


def test_only_known_words_under_the_header_are_units() -> None:
    assert read("N,loss\nbig,high\n1,2\n").cells["N"].tolist() == ["big", "1"]
    assert read("model,size\nsmall,\nlarge,\n").cells["model"].tolist() == ["small", "large"]
    assert read("N,loss\nM,\n1,2\n").units == {"N": ["millions"]}


def test_the_first_line_of_excel_is_no_title_and_decides() -> None:
    raw = read("sep=;\nN;D,loss\n1;2,3\n")
    assert raw.cells.columns.tolist() == ["N", "D,loss"]
    assert raw.remarks == ["cells are separated by semicolons"]


def test_a_unit_of_the_mapping_wins_over_the_row_of_units(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("params,tokens,loss\nM,B,\n3,5,3.1\n")
    assert import_runs(path, mapping={"N": "params", "D": "tokens"})[0]["N"].tolist() == [3e6]
    assert import_runs(path, mapping={"N": "params:billions", "D": "tokens"})[0]["N"].tolist() == [3e9]


def test_a_column_without_a_name_is_kept_if_it_holds_something() -> None:
    raw = read("N,,loss,\n1,a,3,\n2,b,4,\n")
    assert raw.cells.columns.tolist() == ["N", "unnamed_2", "loss"]
    assert raw.remarks == ["column 2 has no name: it is called unnamed_2"]


def test_text_stays_as_it_was_written() -> None:
    raw = read("run_id,config,N\n001,1e3,1\n2.50,+3,1\n")
    assert raw.cells["run_id"].tolist() == ["001", "2.50"]
    assert raw.cells["config"].tolist() == ["1e3", "+3"]


@pytest.mark.parametrize(
    ("cells", "kind", "scale", "expected"),
    [
        (["3,1", "2,95"], "real", 1.0, [3.1, 2.95]),
        (["0,003", "0,010"], "number", 1.0, [0.003, 0.01]),
        (["1.234,5", "2,5"], "number", 1.0, [1234.5, 2.5]),
        (["3,912", "3,1"], "number", 1.0, [3.912, 3.1]),
        (["3,912", "3.1"], "number", 1.0, [3912.0, 3.1]),
        (["3,912", "3,612"], "real", 1.0, [3.912, 3.612]),
        (["3,912", "3,612"], "count", 1.0, [3912.0, 3612.0]),
        (["3,912", "3,612"], "count", 1e6, None),
        (["3,912", "3,612"], "number", 1.0, None),
        # 987 beside 1,234 is a perplexity, or a mistake.
        (["1,234", "987"], "real", 1.0, None),
        (["1,234,567", "12"], "number", 1.0, [1234567.0, 12.0]),
        (["1.234.567", "410.000"], "number", 1.0, [1234567.0, 410000.0]),
        (["1.234.567", "3.1"], "number", 1.0, None),
        (["1_000", "1 000", "1'000'000", "1\u202f000"], "number", 1.0, [1e3, 1e3, 1e6, 1e3]),
        (["0.41M", "3.17M", "7B", "1.2T", "410 M"], "count", 1.0, [410000.0, 3170000.0, 7e9, 1.2e12, 410e6]),
        (["0,41M", "3,17M"], "count", 1.0, [410000.0, 3170000.0]),
        (["0.41M", "3"], "count", 1e6, [0.41, 3.0]),
        (["0.41M"], "count", 1e9, None),
        (["7B"], "real", 1.0, None),
        (["2^20", "3x10^8"], "count", 1.0, [2.0**20, 3e8]),
        (["\u22123", "1e\u22123"], "number", 1.0, [-3.0, 0.001]),
        (["high"], "number", 1.0, None),
        (["1,2,3"], "number", 1.0, None),
        ([1.5, "2,000"], "number", 1.0, [1.5, 2000.0]),
        ([True, "3"], "number", 1.0, None),
    ],
)
def test_a_column_as_a_whole_says_what_its_commas_and_letters_are(
    cells: list[object], kind: str, scale: float, expected: list[float] | None
) -> None:
    numbers, wrong = parse_numbers(pd.Series(cells, dtype=object), kind=kind, scale=scale)  # type: ignore[arg-type]
    assert (numbers.tolist() if not wrong else None) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.41M", (0.41, 1e6)),
        ("7 billion", (7.0, 1e9)),
        ("300B tokens", (300.0, 1e9)),
        ("1.5G", (1.5, 1e9)),
        ("7e9 params", (7e9, 1.0)),
        ("7e9B", None),
        ("8x7B", None),
        ("-3M", None),
        ("3.1 nats", None),
    ],
)
def test_a_count_is_split_into_number_and_scale(text: str, expected: tuple[float, float] | None) -> None:
    assert split_count(text) == expected


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x00", exclude_categories=["C"]), max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.tuples(TEXTS, TEXTS, st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=5),
    separator=st.sampled_from([",", ";", "\t"]),
)
def test_the_fast_reader_and_the_careful_one_agree(
    cells: list[tuple[str, str, float]], separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter=separator, lineterminator="\n").writerows([("name", "note", "N"), *cells])
    data = file.getvalue().encode()

    def read_cells() -> list[list[object]] | str:
        try:
            table = read_delimited(data, "runs", ".csv").cells
        except ValueError as error:
            return str(error)
        return [
            [None if pd.isna(c) or not str(c).strip() else str(c).strip() for c in r] for r in table.to_numpy().tolist()
        ]

    both = read_cells()
    with monkeypatch.context() as patch:
        patch.setattr(delimited, "_read_clean", lambda *_: None)
        assert read_cells() == both


def test_numbers_are_read_to_the_last_bit_by_both_ways() -> None:
    r = random.Random(0)
    numbers = [r.lognormvariate(0, 60) for _ in range(2000)]
    texts = [repr(x) for x in numbers]
    for column in (
        pd.Series(texts, dtype="str"),
        pd.Series(texts, dtype=object),
        pd.Series(["+1", *texts], dtype="str"),
    ):
        assert parse_numbers(column)[0].tolist()[-2000:] == numbers


def test_a_large_table_is_read_about_as_fast_as_by_pandas(tmp_path: Path) -> None:
    r = np.random.default_rng(0)
    rows = 100_000
    table = {"run_id": [f"run{i // 50:06d}" for i in range(rows)], "N": r.choice([1e7, 1e8], rows)}
    path = tmp_path / "runs.csv"
    pd.DataFrame({**table, **{name: r.lognormal(1, 1, rows) for name in "abcdef"}}).to_csv(path, index=False)
    data = path.read_bytes()

    def measure(what: object) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            what()  # type: ignore[operator]
            times.append(time.process_time() - start)
        return min(times)

    measure(lambda: read_delimited(data, "runs"))
    # Usually once as long; the careful way takes over ten times as long.
    assert measure(lambda: read_delimited(data, "runs")) < 4 * measure(lambda: pd.read_csv(io.BytesIO(data)))
